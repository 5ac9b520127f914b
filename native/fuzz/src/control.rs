//! Any bytes as a message of a control stream: nothing panics, and what is decoded can be said again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use macula_peer_wire::{Limits, RawFrame, Reassembler, VERSION};

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
    let frame = raw([&[VERSION, type_id, 0, 0], &(payload.len() as u32).to_be_bytes()[..], payload].concat().into());
    if let Ok(message) = FromNode::decode(&frame) {
        assert_eq!(FromNode::decode(&raw(message.encode())), Ok(message));
    }
    if let Ok(message) = FromRelay::decode(&frame) {
        assert_eq!(FromRelay::decode(&raw(message.encode())), Ok(message));
    }
});

fn raw(frame: Bytes) -> RawFrame {
    let mut frames = Reassembler::new(Limits::default());
    frames.push(frame);
    frames.next_frame().expect("its header is right").expect("it is whole")
}
