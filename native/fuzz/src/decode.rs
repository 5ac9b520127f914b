//! Any bytes as a frame and as a payload: nothing panics, and what is decoded can be written and
//! read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use macula_peer_wire::value::{self, Value, ValueBuilder};
use macula_peer_wire::{Limits, MessageType, check_payload, count_terms, decode_payload};

fuzz_target!(|bytes: &[u8]| {
    if let Ok((ty, value)) = value::decode(bytes, Limits::default()) {
        round_trip(ty, value);
    }
    let terms = count_terms(bytes, usize::MAX);
    assert!(terms <= bytes.len());
    if let Ok(value) = decode_payload(bytes, Limits::default(), &mut ValueBuilder) {
        assert_eq!(terms_of(&value), terms);
        round_trip(MessageType::Store, value);
    }
    // The same under limits that inputs reach: what is refused is refused with or without building it.
    let small = Limits { max_terms: 16, max_depth: 4, ..Limits::default() };
    let decoded = decode_payload(bytes, small, &mut ValueBuilder);
    assert_eq!(check_payload(bytes, small), decoded.as_ref().map(drop).map_err(Clone::clone));
    if let Ok(value) = decoded {
        assert!(terms_of(&value) <= 16);
    }
});

fn terms_of(value: &Value) -> usize {
    1 + match value {
        Value::Str(text) => text.len(),
        Value::Array(items) => items.iter().map(terms_of).sum(),
        Value::Map(pairs) => pairs.iter().map(|(key, value)| terms_of(key) + terms_of(value)).sum(),
        _ => 0,
    }
}

fn round_trip(ty: MessageType, value: Value) {
    let frame = value::encode(ty, &value, Limits::default()).expect("decoded under these limits");
    assert_eq!(value::decode(&frame, Limits::default()), Ok((ty, value)));
}
