//! Any bytes as a message of a control stream: nothing panics, and what is decoded can be said again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use macula_peer_core::proto::control::{FromNode, FromRelay};
use macula_peer_wire::{Limits, RawFrame, Reassembler, VERSION};

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
