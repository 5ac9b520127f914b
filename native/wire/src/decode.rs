use std::ops::Range;

use crate::limits::Limits;
use crate::terms::count_terms;
use rmp::Marker;

/// The most elements that room is made for before they are there. Without such a bound containers
/// inside one another could each claim room for all the bytes that follow, multiplying a small
/// frame's memory by its depth and by the size of a term.
const MAX_PREALLOCATED: usize = 256;

/// Reads the single MessagePack value that `payload` must consist of.
///
/// # Errors
/// [`PayloadError::TooManyTerms`] before anything is built; else the first met going through the
/// payload from left to right. [`PayloadError::TrailingBytes`] is therefore the last.
pub fn decode_payload<B: Build>(payload: &[u8], limits: Limits, builder: &mut B) -> Result<B::Term, PayloadError> {
    let max = limits.max_terms;
    // Fewer bytes are fewer terms, and need not be counted.
    if payload.len() > max && count_terms(payload, max) > max {
        return Err(PayloadError::TooManyTerms { max });
    }
    let mut reader = Reader { payload, at: 0, max_depth: limits.depth(), builder };
    let term = reader.value()?;
    if reader.at < payload.len() {
        return Err(PayloadError::TrailingBytes);
    }
    Ok(term)
}

/// Whether [`decode_payload`] can read a payload, without building anything of it.
///
/// # Errors
/// As [`decode_payload`].
pub fn check_payload(payload: &[u8], limits: Limits) -> Result<(), PayloadError> {
    decode_payload(payload, limits, &mut Nothing)
}

/// Builds nothing: a vector of its terms takes no memory.
struct Nothing;

impl Build for Nothing {
    type Term = ();

    fn nil(&mut self) {}
    fn bool(&mut self, _: bool) {}
    fn uint(&mut self, _: u64) {}
    fn int(&mut self, _: i64) {}
    fn float(&mut self, _: f64) {}
    fn bin(&mut self, _: Range<usize>, _: &[u8]) {}
    fn str(&mut self, _: &str) {}
    fn array(&mut self, _: Vec<()>) {}
    fn map(&mut self, _: Vec<()>, _: Vec<()>) {}
}

/// Makes the caller's terms out of a payload, innermost and leftmost first.
pub trait Build {
    /// A finished value.
    type Term;

    /// Whether to go on, asked before each value and, with the length in bytes, before each string, whose code points are
    /// values of their own to Erlang.
    fn goes_on(&mut self, _values: usize) -> bool {
        true
    }

    /// Nil, the atom `null`.
    fn nil(&mut self) -> Self::Term;
    /// A boolean.
    fn bool(&mut self, value: bool) -> Self::Term;
    /// A number that is not negative, in whichever form it was written.
    fn uint(&mut self, value: u64) -> Self::Term;
    /// A negative number.
    fn int(&mut self, value: i64) -> Self::Term;
    /// A finite float; one of 32 bits was widened.
    fn float(&mut self, value: f64) -> Self::Term;
    /// A binary: `bytes`, which are those at `range` in the payload.
    fn bin(&mut self, range: Range<usize>, bytes: &[u8]) -> Self::Term;
    /// A string, to Erlang the list of its code points.
    fn str(&mut self, text: &str) -> Self::Term;
    /// An array.
    fn array(&mut self, items: Vec<Self::Term>) -> Self::Term;
    /// A map with as many values as keys, both in the order of the wire. Of equal keys the last
    /// counts.
    fn map(&mut self, keys: Vec<Self::Term>, values: Vec<Self::Term>) -> Self::Term;
}

/// Why a payload is malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// The payload ends inside a value; or a float is not a number or infinite, for which the
    /// original has no other name either.
    #[error("incomplete value")]
    Incomplete,
    /// There are bytes after the value.
    #[error("bytes after the value")]
    TrailingBytes,
    /// A string, given here, is not UTF-8.
    #[error("a string that is not UTF-8")]
    InvalidString(Vec<u8>),
    /// A value of an extension type follows, begun by the given marker byte.
    #[error("extension type {0:#04x}")]
    Extension(u8),
    /// The builder declined to [go on](Build::goes_on).
    #[error("not read to its end")]
    Stopped,
    /// There is the byte `0xC1`, which MessagePack reserves.
    #[error("the reserved byte 0xc1")]
    Reserved,
    /// More than `max` containers are inside one another.
    #[error("more than {max} containers inside one another")]
    TooDeep {
        /// The limit in containers.
        max: usize,
    },
    /// There are more than `max` terms.
    #[error("more than {max} terms")]
    TooManyTerms {
        /// The limit in terms.
        max: usize,
    },
}

struct Reader<'p, 'b, B> {
    payload: &'p [u8],
    at: usize,
    max_depth: usize,
    builder: &'b mut B,
}

/// A container that is incomplete.
enum Open<T> {
    Array {
        missing: usize,
        items: Vec<T>,
    },
    /// Keys and values alternate; there is one more key when a value comes next.
    Map {
        missing: usize,
        keys: Vec<T>,
        values: Vec<T>,
    },
}

/// What was read.
enum Read<T> {
    Whole(T),
    Begun(Open<T>),
}

impl<T> Open<T> {
    /// Takes the next element.
    fn push(&mut self, term: T) {
        match self {
            Self::Array { missing, items } => {
                *missing -= 1;
                items.push(term);
            }
            Self::Map { keys, values, .. } if keys.len() == values.len() => keys.push(term),
            Self::Map { missing, values, .. } => {
                *missing -= 1;
                values.push(term);
            }
        }
    }

    fn is_complete(&self) -> bool {
        let (Self::Array { missing, .. } | Self::Map { missing, .. }) = self;
        *missing == 0
    }

    fn build(self, builder: &mut impl Build<Term = T>) -> T {
        match self {
            Self::Array { items, .. } => builder.array(items),
            Self::Map { keys, values, .. } => builder.map(keys, values),
        }
    }
}

impl<'p, B: Build> Reader<'p, '_, B> {
    /// Reads the next value. Keeps incomplete containers on the heap: schedulers have small stacks.
    fn value(&mut self) -> Result<B::Term, PayloadError> {
        let mut open: Vec<Open<B::Term>> = Vec::new();
        loop {
            match self.next(open.len())? {
                Read::Begun(container) => open.push(container),
                Read::Whole(term) => match open.last_mut() {
                    Some(innermost) => innermost.push(term),
                    None => return Ok(term),
                },
            }
            while let Some(complete) = open.pop_if(|innermost| innermost.is_complete()) {
                let term = complete.build(self.builder);
                match open.last_mut() {
                    Some(innermost) => innermost.push(term),
                    None => return Ok(term),
                }
            }
        }
    }

    /// Reads the next value, which is inside `depth` containers, or the part of a container before its elements.
    fn next(&mut self, depth: usize) -> Result<Read<B::Term>, PayloadError> {
        self.ask(1)?;
        let [byte] = self.take()?;
        let whole = match Marker::from_u8(byte) {
            Marker::Null => Ok(self.builder.nil()),
            Marker::False => Ok(self.builder.bool(false)),
            Marker::True => Ok(self.builder.bool(true)),
            Marker::FixPos(n) => Ok(self.builder.uint(n.into())),
            Marker::U8 => self.take().map(u8::from_be_bytes).map(|n| self.builder.uint(n.into())),
            Marker::U16 => self.take().map(u16::from_be_bytes).map(|n| self.builder.uint(n.into())),
            Marker::U32 => self.take().map(u32::from_be_bytes).map(|n| self.builder.uint(n.into())),
            Marker::U64 => self.take().map(u64::from_be_bytes).map(|n| self.builder.uint(n)),
            Marker::FixNeg(n) => Ok(self.signed(n.into())),
            Marker::I8 => self.take().map(i8::from_be_bytes).map(|n| self.signed(n.into())),
            Marker::I16 => self.take().map(i16::from_be_bytes).map(|n| self.signed(n.into())),
            Marker::I32 => self.take().map(i32::from_be_bytes).map(|n| self.signed(n.into())),
            Marker::I64 => self.take().map(i64::from_be_bytes).map(|n| self.signed(n)),
            Marker::F32 => self.take().map(f32::from_be_bytes).and_then(|x| self.float(x.into())),
            Marker::F64 => self.take().map(f64::from_be_bytes).and_then(|x| self.float(x)),
            Marker::FixStr(len) => self.str(len.into()),
            Marker::Str8 => self.len8().and_then(|len| self.str(len)),
            Marker::Str16 => self.len16().and_then(|len| self.str(len)),
            Marker::Str32 => self.len32().and_then(|len| self.str(len)),
            Marker::Bin8 => self.len8().and_then(|len| self.bin(len)),
            Marker::Bin16 => self.len16().and_then(|len| self.bin(len)),
            Marker::Bin32 => self.len32().and_then(|len| self.bin(len)),
            Marker::FixArray(len) => return self.array(len.into(), depth),
            Marker::Array16 => return self.len16().and_then(|len| self.array(len, depth)),
            Marker::Array32 => return self.len32().and_then(|len| self.array(len, depth)),
            Marker::FixMap(len) => return self.map(len.into(), depth),
            Marker::Map16 => return self.len16().and_then(|len| self.map(len, depth)),
            Marker::Map32 => return self.len32().and_then(|len| self.map(len, depth)),
            Marker::FixExt1 => self.extension(byte, 1),
            Marker::FixExt2 => self.extension(byte, 2),
            Marker::FixExt4 => self.extension(byte, 4),
            Marker::FixExt8 => self.extension(byte, 8),
            Marker::FixExt16 => self.extension(byte, 16),
            Marker::Ext8 => self.len8().and_then(|len| self.extension(byte, len)),
            Marker::Ext16 => self.len16().and_then(|len| self.extension(byte, len)),
            Marker::Ext32 => self.len32().and_then(|len| self.extension(byte, len)),
            Marker::Reserved => Err(PayloadError::Reserved),
        };
        whole.map(Read::Whole)
    }

    /// The signed family may hold numbers that are not negative.
    fn signed(&mut self, value: i64) -> B::Term {
        match u64::try_from(value) {
            Ok(value) => self.builder.uint(value),
            Err(_) => self.builder.int(value),
        }
    }

    fn float(&mut self, value: f64) -> Result<B::Term, PayloadError> {
        if !value.is_finite() {
            return Err(PayloadError::Incomplete);
        }
        Ok(self.builder.float(value))
    }

    fn str(&mut self, len: usize) -> Result<B::Term, PayloadError> {
        let bytes = self.slice(len)?;
        self.ask(len)?;
        match str::from_utf8(bytes) {
            Ok(text) => Ok(self.builder.str(text)),
            Err(_) => Err(PayloadError::InvalidString(bytes.to_vec())),
        }
    }

    fn bin(&mut self, len: usize) -> Result<B::Term, PayloadError> {
        let bytes = self.slice(len)?;
        Ok(self.builder.bin(self.at - len..self.at, bytes))
    }

    fn array(&mut self, len: usize, depth: usize) -> Result<Read<B::Term>, PayloadError> {
        self.check_depth(depth)?;
        let items = Vec::with_capacity(self.capacity(len, 1));
        Ok(Read::Begun(Open::Array { missing: len, items }))
    }

    fn map(&mut self, len: usize, depth: usize) -> Result<Read<B::Term>, PayloadError> {
        self.check_depth(depth)?;
        let capacity = self.capacity(len, 2);
        let (keys, values) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        Ok(Read::Begun(Open::Map { missing: len, keys, values }))
    }

    fn extension(&mut self, marker: u8, len: usize) -> Result<B::Term, PayloadError> {
        let [_type] = self.take()?;
        self.slice(len)?;
        Err(PayloadError::Extension(marker))
    }

    fn ask(&mut self, values: usize) -> Result<(), PayloadError> {
        if self.builder.goes_on(values) { Ok(()) } else { Err(PayloadError::Stopped) }
    }

    fn check_depth(&self, depth: usize) -> Result<(), PayloadError> {
        if depth >= self.max_depth {
            return Err(PayloadError::TooDeep { max: self.max_depth });
        }
        Ok(())
    }

    /// Room to make for `len` elements of at least `min_len` bytes each.
    fn capacity(&self, len: usize, min_len: usize) -> usize {
        len.min((self.payload.len() - self.at) / min_len).min(MAX_PREALLOCATED)
    }

    fn len8(&mut self) -> Result<usize, PayloadError> {
        Ok(u8::from_be_bytes(self.take()?).into())
    }

    fn len16(&mut self) -> Result<usize, PayloadError> {
        Ok(u16::from_be_bytes(self.take()?).into())
    }

    fn len32(&mut self) -> Result<usize, PayloadError> {
        Ok(u32::from_be_bytes(self.take()?) as usize)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], PayloadError> {
        let bytes = self.payload[self.at..].first_chunk().ok_or(PayloadError::Incomplete)?;
        self.at += N;
        Ok(*bytes)
    }

    fn slice(&mut self, len: usize) -> Result<&'p [u8], PayloadError> {
        let bytes = self.payload[self.at..].get(..len).ok_or(PayloadError::Incomplete)?;
        self.at += len;
        Ok(bytes)
    }
}
