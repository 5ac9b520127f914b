//! An owned tree of what a payload can hold, for callers without terms of their own. Simple, not
//! fast.

use std::ops::Range;

use crate::decode::Build;
use crate::encode::{EncodeError, FrameWriter};
use crate::frame::FrameError;
use crate::limits::Limits;
use crate::message_type::MessageType;

/// Writes a frame of type `ty` with `value` as its payload, and returns its bytes. Does not check required fields.
///
/// # Errors
/// [`EncodeError`].
pub fn encode(ty: MessageType, value: &Value, limits: Limits) -> Result<Vec<u8>, EncodeError> {
    let mut buf = Vec::new();
    let mut writer = FrameWriter::new(&mut buf, ty, limits);
    value.write(&mut writer)?;
    writer.finish()?;
    Ok(buf)
}

/// Reads the frame at the front of `bytes`; bytes after it are ignored.
///
/// # Errors
/// As [`decode`](crate::decode()).
pub fn decode(bytes: &[u8], limits: Limits) -> Result<(MessageType, Value), FrameError> {
    crate::decode(bytes, limits, &mut ValueBuilder)
}

/// A MessagePack value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nil, the atom `null`.
    Nil,
    /// A boolean.
    Bool(bool),
    /// A number that is not negative.
    Uint(u64),
    /// A number, when it was decoded a negative one.
    Int(i64),
    /// A finite float.
    Float(f64),
    /// A binary.
    Bin(Vec<u8>),
    /// A string, to Erlang the list of its code points.
    Str(String),
    /// An array.
    Array(Vec<Value>),
    /// Pairs of key and value in the order of the wire, equal keys included.
    Map(Vec<(Value, Value)>),
}

impl Value {
    fn write(&self, writer: &mut FrameWriter<'_>) -> Result<(), EncodeError> {
        match self {
            Self::Nil => writer.nil(),
            Self::Bool(value) => writer.bool(*value),
            Self::Uint(value) => writer.uint(*value),
            Self::Int(value) => writer.int(*value),
            Self::Float(value) => writer.float(*value),
            Self::Bin(bytes) => writer.bin(bytes),
            Self::Str(text) => writer.str(text),
            Self::Array(items) => {
                writer.array(items.len())?;
                items.iter().try_for_each(|item| item.write(writer))?;
                writer.end();
                Ok(())
            }
            Self::Map(pairs) => {
                writer.map(pairs.len())?;
                for (key, value) in pairs {
                    key.write(writer)?;
                    value.write(writer)?;
                }
                writer.end();
                Ok(())
            }
        }
    }
}

/// Builds [`Value`]s.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValueBuilder;

impl Build for ValueBuilder {
    type Term = Value;

    fn nil(&mut self) -> Value {
        Value::Nil
    }

    fn bool(&mut self, value: bool) -> Value {
        Value::Bool(value)
    }

    fn uint(&mut self, value: u64) -> Value {
        Value::Uint(value)
    }

    fn int(&mut self, value: i64) -> Value {
        Value::Int(value)
    }

    fn float(&mut self, value: f64) -> Value {
        Value::Float(value)
    }

    fn bin(&mut self, _range: Range<usize>, bytes: &[u8]) -> Value {
        Value::Bin(bytes.to_vec())
    }

    fn str(&mut self, text: &str) -> Value {
        Value::Str(text.to_owned())
    }

    fn array(&mut self, items: Vec<Value>) -> Value {
        Value::Array(items)
    }

    fn map(&mut self, keys: Vec<Value>, values: Vec<Value>) -> Value {
        Value::Map(keys.into_iter().zip(values).collect())
    }
}
