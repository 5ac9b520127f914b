//! Any bytes as a frame and as a payload: nothing panics, and what is decoded can be written and
//! read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use macula_peer_wire::value::{self, Value, ValueBuilder};
use macula_peer_wire::{Limits, MessageType, decode_payload};

fuzz_target!(|bytes: &[u8]| {
    if let Ok((ty, value)) = value::decode(bytes, Limits::default()) {
        round_trip(ty, value);
    }
    if let Ok(value) = decode_payload(bytes, Limits::default(), &mut ValueBuilder) {
        round_trip(MessageType::Store, value);
    }
});

fn round_trip(ty: MessageType, value: Value) {
    let frame = value::encode(ty, &value, Limits::default()).expect("decoded under these limits");
    assert_eq!(value::decode(&frame, Limits::default()), Ok((ty, value)));
}
