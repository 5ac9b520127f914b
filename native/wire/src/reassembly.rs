use std::collections::VecDeque;
use std::mem;

use crate::frame::{FrameError, Header};
use crate::limits::{HEADER_LEN, Limits};
use bytes::{Buf, Bytes, BytesMut};

/// Cuts a stream of bytes, arriving in chunks of any size, into frames.
///
/// A frame that lies inside one chunk is a slice of that chunk, and keeps the chunk alive as long as
/// it lives; other frames are copied together. Memory follows what has arrived,
/// not what a header announces.
#[derive(Debug)]
pub struct Reassembler {
    limits: Limits,
    /// The first bytes of a frame that began in a chunk used up by now.
    partial: BytesMut,
    /// What comes after `partial`; no chunk is empty.
    chunks: VecDeque<Bytes>,
    buffered: usize,
}

impl Reassembler {
    /// An empty reassembler. Of the limits only [`Limits::max_frame`] matters here.
    pub fn new(limits: Limits) -> Self {
        Self { limits, partial: BytesMut::new(), chunks: VecDeque::new(), buffered: 0 }
    }

    /// Adds the next bytes of the stream. Take out the frames before adding more: nothing here bounds the number of
    /// waiting chunks.
    pub fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.buffered += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    /// Takes out the next frame; `None` until more bytes are pushed. A frame of an unknown type is
    /// a frame like any other.
    ///
    /// # Errors
    /// [`FrameError::UnsupportedVersion`] or [`FrameError::TooLarge`], as soon as the header is
    /// there. Where the next frame would begin is then unknown: the stream is lost, and every
    /// further call returns the same error.
    pub fn next_frame(&mut self) -> Result<Option<RawFrame>, FrameError> {
        let frame = match self.slice_frame()? {
            Some(frame) => frame,
            None => match self.copy_frame()? {
                Some(frame) => frame,
                None => return Ok(None),
            },
        };
        self.buffered -= frame.bytes().len();
        Ok(Some(frame))
    }

    /// The header of the frame that [`next_frame`](Self::next_frame) has just found incomplete, if that much is there.
    pub fn announced(&self) -> Option<Header> {
        Header::parse(&self.partial, self.limits).ok()
    }

    /// Whether no bytes are buffered, as it must be at the end of a stream.
    pub fn is_empty(&self) -> bool {
        self.buffered == 0
    }

    /// Bytes pushed and not yet taken out as frames.
    pub fn buffered(&self) -> usize {
        self.buffered
    }

    /// The next frame, if it lies inside the first chunk.
    fn slice_frame(&mut self) -> Result<Option<RawFrame>, FrameError> {
        let Some(chunk) = self.chunks.front_mut() else {
            return Ok(None);
        };
        if !self.partial.is_empty() || chunk.len() < HEADER_LEN {
            return Ok(None);
        }
        let Header { payload_len, .. } = Header::parse(chunk, self.limits)?;
        if chunk.len() - HEADER_LEN < payload_len {
            return Ok(None);
        }
        let frame = chunk.split_to(HEADER_LEN + payload_len);
        if chunk.is_empty() {
            self.chunks.pop_front();
        }
        Ok(Some(RawFrame(frame)))
    }

    /// The next frame, copied together from the first chunks; what there is of it is kept.
    fn copy_frame(&mut self) -> Result<Option<RawFrame>, FrameError> {
        if !self.fill_partial(HEADER_LEN) {
            return Ok(None);
        }
        let Header { payload_len, .. } = Header::parse(&self.partial, self.limits)?;
        if !self.fill_partial(HEADER_LEN + payload_len) {
            return Ok(None);
        }
        Ok(Some(RawFrame(mem::take(&mut self.partial).freeze())))
    }

    /// Moves bytes to `partial` until it has `len`; whether there were enough.
    fn fill_partial(&mut self, len: usize) -> bool {
        while self.partial.len() < len {
            let Some(chunk) = self.chunks.front_mut() else {
                return false;
            };
            let taken = chunk.split_to(chunk.len().min(len - self.partial.len()));
            if chunk.is_empty() {
                self.chunks.pop_front();
            }
            self.partial.extend_from_slice(&taken);
        }
        true
    }
}

/// A frame taken out of a stream, its payload not looked at yet.
///
/// The header is kept with it, so that it can go on as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame(Bytes);

impl RawFrame {
    /// The type id, which need not be that of a [`MessageType`](crate::MessageType).
    pub fn type_id(&self) -> u8 {
        self.0[1]
    }

    /// The payload, for [`decode_payload`](crate::decode_payload).
    pub fn payload(&self) -> &[u8] {
        &self.0[HEADER_LEN..]
    }

    /// The payload alone.
    pub fn into_payload(mut self) -> Bytes {
        self.0.advance(HEADER_LEN);
        self.0
    }

    /// The whole frame, header included.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// The whole frame, header included.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}
