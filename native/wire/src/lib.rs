//! The wire format of macula 0.14.3: frames, message types and MessagePack rules. No I/O.
//!
//! A frame is an 8-byte header and a payload: version `0x01`, type id, flags `0x00`, reserved
//! `0x00`, payload length (`u32`, big-endian), then one MessagePack value, as a rule a map.
//!
//! - [`FrameWriter`] writes a frame while the caller walks its own terms.
//! - [`decode()`] and [`decode_payload`] read one, building the caller's own terms through [`Build`].
//! - [`check_payload`] and [`count_terms`] tell what a payload costs without building anything.
//! - [`Reassembler`] cuts a byte stream into frames.
//! - [`value`] is an owned tree for callers without terms of their own.
//!
//! Every one of them holds to [`Limits`].
#![forbid(unsafe_code)]

mod decode;
mod encode;
mod frame;
mod limits;
mod message_type;
mod reassembly;
mod terms;
pub mod value;

pub use decode::{Build, PayloadError, check_payload, decode_payload};
pub use encode::{EncodeError, FrameWriter};
pub use frame::{FrameError, Header, VERSION, decode};
pub use limits::{HEADER_LEN, Limits, MAX_DEPTH_CEILING, MAX_FRAME_CEILING};
pub use message_type::{MessageType, Required};
pub use reassembly::{RawFrame, Reassembler};
pub use terms::count_terms;
