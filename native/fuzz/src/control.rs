//! Any bytes as a message of a control stream: nothing panics, and what is decoded can be said again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use macula_peer_wire::{HEADER_LEN, RawFrame};

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/relay/control.rs"]
mod control;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/decide/nat.rs"]
mod nat;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/decide/punch.rs"]
mod punch;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/signal.rs"]
mod signal;

/// Where the engine has them.
mod decide {
    pub(crate) use crate::{nat, punch};
}

/// Without what makes keys and certificates.
mod identity {
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Fingerprint([u8; 32]);

    impl From<[u8; 32]> for Fingerprint {
        fn from(hash: [u8; 32]) -> Self {
            Self(hash)
        }
    }

    impl Fingerprint {
        pub(crate) fn as_bytes(&self) -> &[u8; 32] {
            &self.0
        }
    }
}

use control::{FromNode, FromRelay};

fuzz_target!(|bytes: &[u8]| {
    let Some((&type_id, payload)) = bytes.split_first() else { return };
    let frame = RawFrame { type_id, payload: Bytes::copy_from_slice(payload) };
    if let Ok(message) = FromNode::decode(&frame) {
        assert_eq!(FromNode::decode(&raw(message.encode())), Ok(message));
    }
    if let Ok(message) = FromRelay::decode(&frame) {
        assert_eq!(FromRelay::decode(&raw(message.encode())), Ok(message));
    }
});

fn raw(mut frame: Bytes) -> RawFrame {
    let payload = frame.split_off(HEADER_LEN);
    RawFrame { type_id: frame[1], payload }
}
