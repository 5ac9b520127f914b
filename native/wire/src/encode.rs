use std::io;

use rmp::encode as msgpack;

use crate::frame::VERSION;
use crate::limits::{HEADER_LEN, Limits};
use crate::message_type::MessageType;
use crate::terms::count_terms;

/// Writes one frame into a buffer, value by value, in the order of the wire.
///
/// Exactly one value makes the payload. A container is opened by [`array`](Self::array) or
/// [`map`](Self::map), filled with exactly as many values as announced there, and closed by
/// [`end`](Self::end), also when it is empty; a map's values alternate, key first. The writer does
/// not count them: wrong counts make a frame that no one can read.
///
/// What a value takes is checked before it is copied, so the buffer never outgrows the limit.
/// After an error the buffer's content is of no use, the buffer itself may be used again.
#[derive(Debug)]
pub struct FrameWriter<'a> {
    out: Bounded<'a>,
    depth: usize,
    max_depth: usize,
    max_terms: usize,
}

impl<'a> FrameWriter<'a> {
    /// Clears `buf` and starts a frame of type `ty` in it.
    pub fn new(buf: &'a mut Vec<u8>, ty: MessageType, limits: Limits) -> Self {
        buf.clear();
        buf.extend_from_slice(&[VERSION, ty.id(), 0, 0, 0, 0, 0, 0]);
        Self {
            out: Bounded { buf, max: limits.frame() },
            depth: 0,
            max_depth: limits.depth(),
            max_terms: limits.max_terms,
        }
    }

    /// Writes nil.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn nil(&mut self) -> Result<(), EncodeError> {
        msgpack::write_nil(&mut self.out).map_err(|_| self.too_large())
    }

    /// Writes a boolean.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn bool(&mut self, value: bool) -> Result<(), EncodeError> {
        msgpack::write_bool(&mut self.out, value).map_err(|_| self.too_large())
    }

    /// Writes a number in its shortest form: of the unsigned family when it is not negative, of
    /// the signed family when it is.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn int(&mut self, value: i64) -> Result<(), EncodeError> {
        msgpack::write_sint(&mut self.out, value).map_err(|_| self.too_large())?;
        Ok(())
    }

    /// Writes a number in its shortest form of the unsigned family.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn uint(&mut self, value: u64) -> Result<(), EncodeError> {
        msgpack::write_uint(&mut self.out, value).map_err(|_| self.too_large())?;
        Ok(())
    }

    /// Writes a float, in 64 bits always.
    ///
    /// # Errors
    /// [`EncodeError::NotFinite`], [`EncodeError::TooLarge`].
    pub fn float(&mut self, value: f64) -> Result<(), EncodeError> {
        if !value.is_finite() {
            return Err(EncodeError::NotFinite);
        }
        msgpack::write_f64(&mut self.out, value).map_err(|_| self.too_large())
    }

    /// Writes bytes as the bin family: binaries, and the names of atoms.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn bin(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        msgpack::write_bin(&mut self.out, bytes).map_err(|_| self.too_large())
    }

    /// Writes text as the str family: lists whose elements are all Unicode code points.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`].
    pub fn str(&mut self, text: &str) -> Result<(), EncodeError> {
        msgpack::write_str(&mut self.out, text).map_err(|_| self.too_large())
    }

    /// Opens an array of `len` elements.
    ///
    /// # Errors
    /// [`EncodeError::TooDeep`]; [`EncodeError::TooLarge`], also when that many elements cannot fit.
    pub fn array(&mut self, len: usize) -> Result<(), EncodeError> {
        let announced = self.open(len)?;
        msgpack::write_array_len(&mut self.out, announced).map_err(|_| self.too_large())?;
        Ok(())
    }

    /// Opens a map of `len` pairs of key and value.
    ///
    /// # Errors
    /// [`EncodeError::TooDeep`]; [`EncodeError::TooLarge`], also when that many pairs cannot fit.
    pub fn map(&mut self, len: usize) -> Result<(), EncodeError> {
        let announced = self.open(len)?;
        msgpack::write_map_len(&mut self.out, announced).map_err(|_| self.too_large())?;
        Ok(())
    }

    /// Closes the innermost open container.
    pub fn end(&mut self) {
        debug_assert!(self.depth > 0, "no container is open");
        self.depth -= 1;
    }

    /// Bytes written so far, header included.
    #[expect(clippy::len_without_is_empty, reason = "there is always a header")]
    pub fn len(&self) -> usize {
        self.out.buf.len()
    }

    /// Bytes that still fit into the frame.
    pub fn room(&self) -> usize {
        self.out.room()
    }

    /// Completes the frame, which is then the whole of the buffer, and returns its length in bytes.
    ///
    /// # Errors
    /// [`EncodeError::TooManyTerms`].
    pub fn finish(self) -> Result<usize, EncodeError> {
        debug_assert!(self.depth == 0, "a container is still open");
        let (payload_len, max) = (self.len() - HEADER_LEN, self.max_terms);
        if payload_len > max && count_terms(&self.out.buf[HEADER_LEN..], max) > max {
            return Err(EncodeError::TooManyTerms { max });
        }
        self.out.buf[4..HEADER_LEN].copy_from_slice(&(payload_len as u32).to_be_bytes());
        Ok(self.len())
    }

    fn open(&mut self, len: usize) -> Result<u32, EncodeError> {
        if self.depth == self.max_depth {
            return Err(EncodeError::TooDeep { max: self.max_depth });
        }
        // An element takes a byte at the least, so the count never reaches 2^32 either.
        if len > self.out.room() {
            return Err(self.too_large());
        }
        self.depth += 1;
        Ok(len as u32)
    }

    fn too_large(&self) -> EncodeError {
        EncodeError::TooLarge { max: self.out.max }
    }
}

/// A buffer that takes a write whole or not at all; its only error is that there is no room.
#[derive(Debug)]
struct Bounded<'a> {
    buf: &'a mut Vec<u8>,
    max: usize,
}

impl Bounded<'_> {
    fn room(&self) -> usize {
        self.max.saturating_sub(self.buf.len())
    }
}

impl io::Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > self.room() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.buf.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a value cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The frame would be longer than the limit of `max` bytes.
    #[error("the frame would be longer than the limit of {max} bytes")]
    TooLarge {
        /// The limit in bytes, header included.
        max: usize,
    },
    /// More than `max` containers would be inside one another.
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
    /// A float is not a number or infinite, which no receiver could read.
    #[error("a float that is not finite")]
    NotFinite,
}
