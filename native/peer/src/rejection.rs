//! How a receiver says that it does not take a message: the errors of streams (docs/protocol.md).

use macula_peer_wire::{FrameError, PayloadError};
use quinn::VarInt;

use crate::error::Rejection;

const TOO_SLOW: u8 = 1;
const MALFORMED: u8 = 2;
const TOO_LARGE: u8 = 8;
const TOO_DEEP: u8 = 9;
const TOO_MANY_TERMS: u8 = 10;

impl Rejection {
    /// The error that stands for it.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::TooSlow => TOO_SLOW,
            Self::Malformed | Self::Unread => MALFORMED,
            Self::TooLarge => TOO_LARGE,
            Self::TooDeep => TOO_DEEP,
            Self::TooManyTerms => TOO_MANY_TERMS,
        }
    }

    /// What an error stands for, if it is about a message.
    pub(crate) fn of(code: VarInt) -> Option<Self> {
        match u8::try_from(code.into_inner()).ok()? {
            TOO_SLOW => Some(Self::TooSlow),
            MALFORMED => Some(Self::Malformed),
            TOO_LARGE => Some(Self::TooLarge),
            TOO_DEEP => Some(Self::TooDeep),
            TOO_MANY_TERMS => Some(Self::TooManyTerms),
            _ => None,
        }
    }
}

impl From<&PayloadError> for Rejection {
    fn from(error: &PayloadError) -> Self {
        match error {
            PayloadError::TooDeep { .. } => Self::TooDeep,
            PayloadError::TooManyTerms { .. } => Self::TooManyTerms,
            _ => Self::Malformed,
        }
    }
}

impl From<&FrameError> for Rejection {
    fn from(error: &FrameError) -> Self {
        match error {
            FrameError::TooLarge { .. } => Self::TooLarge,
            FrameError::Payload(error) => error.into(),
            _ => Self::Malformed,
        }
    }
}
