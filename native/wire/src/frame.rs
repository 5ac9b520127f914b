use crate::decode::{Build, PayloadError, decode_payload};
use crate::limits::{HEADER_LEN, Limits};
use crate::message_type::MessageType;

/// The protocol version, the first byte of every frame.
pub const VERSION: u8 = 1;

/// Reads the frame at the front of `bytes`; bytes after it are ignored.
///
/// The terms are made by `builder`, whose byte ranges count from the start of the payload, that
/// is from `bytes[HEADER_LEN]`. The payload may be any MessagePack value, not only a map.
///
/// # Errors
/// The first that applies, in the order of the variants of [`FrameError`].
pub fn decode<B: Build>(bytes: &[u8], limits: Limits, builder: &mut B) -> Result<(MessageType, B::Term), FrameError> {
    let header = Header::parse(bytes, limits)?;
    let payload = bytes[HEADER_LEN..].get(..header.payload_len).ok_or(FrameError::IncompletePayload)?;
    let ty = MessageType::from_id(header.type_id).ok_or(FrameError::UnknownType(header.type_id))?;
    Ok((ty, decode_payload(payload, limits, builder)?))
}

/// What a frame's header says. Its flags and its reserved byte are not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The type id, which need not be that of a [`MessageType`].
    pub type_id: u8,
    /// Length of the payload in bytes.
    pub payload_len: usize,
}

impl Header {
    /// Reads the header at the front of `bytes`.
    ///
    /// # Errors
    /// [`FrameError::InvalidHeader`], [`FrameError::UnsupportedVersion`] or
    /// [`FrameError::TooLarge`], the first that applies.
    pub fn parse(bytes: &[u8], limits: Limits) -> Result<Self, FrameError> {
        let Some(&[version, type_id, _flags, _reserved, a, b, c, d]) = bytes.first_chunk() else {
            return Err(FrameError::InvalidHeader);
        };
        if version != VERSION {
            return Err(FrameError::UnsupportedVersion(version));
        }
        let payload_len = u32::from_be_bytes([a, b, c, d]) as usize;
        let (len, max) = (payload_len.saturating_add(HEADER_LEN), limits.frame());
        if len > max {
            return Err(FrameError::TooLarge { len, max });
        }
        Ok(Self { type_id, payload_len })
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// There are fewer than [`HEADER_LEN`] bytes.
    #[error("fewer bytes than a header has")]
    InvalidHeader,
    /// The first byte, given here, is not [`VERSION`].
    #[error("unsupported protocol version {0}")]
    UnsupportedVersion(u8),
    /// The header announces a frame of `len` bytes, more than the `max` of the [`Limits`].
    #[error("a frame of {len} bytes is longer than the limit of {max}")]
    TooLarge {
        /// Length of the announced frame in bytes, header included.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// There are fewer bytes than the header announces.
    #[error("fewer bytes than the header announces")]
    IncompletePayload,
    /// The type id, given here, is not that of any [`MessageType`].
    #[error("unknown message type id {0}")]
    UnknownType(u8),
    /// The payload is malformed.
    #[error("malformed payload: {0}")]
    Payload(#[from] PayloadError),
}
