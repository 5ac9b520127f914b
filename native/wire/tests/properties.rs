//! What holds for any value, any bytes and any chunking.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use macula_peer_wire::value::{self, Value, ValueBuilder};
use macula_peer_wire::{
    FrameError, HEADER_LEN, Limits, MessageType, Reassembler, check_payload, count_terms, decode_payload,
};
use proptest::collection::vec;
use proptest::num::f64::{NORMAL, SUBNORMAL, ZERO};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// The same value for an independent implementation of MessagePack.
fn oracle(value: &Value) -> rmpv::Value {
    match value {
        Value::Nil => rmpv::Value::Nil,
        Value::Bool(value) => (*value).into(),
        Value::Uint(n) => (*n).into(),
        Value::Int(n) => (*n).into(),
        Value::Float(float) => (*float).into(),
        Value::Bin(bytes) => rmpv::Value::Binary(bytes.clone()),
        Value::Str(text) => text.as_str().into(),
        Value::Array(items) => rmpv::Value::Array(items.iter().map(oracle).collect()),
        Value::Map(pairs) => rmpv::Value::Map(pairs.iter().map(|(key, value)| (oracle(key), oracle(value))).collect()),
    }
}

/// As the documentation has it.
fn terms_of(value: &Value) -> usize {
    1 + match value {
        Value::Str(text) => text.len(),
        Value::Array(items) => items.iter().map(terms_of).sum(),
        Value::Map(pairs) => pairs.iter().map(|(key, value)| terms_of(key) + terms_of(value)).sum(),
        _ => 0,
    }
}

proptest! {
    #[test]
    fn values_come_back_as_they_were(ty in types(), value in values()) {
        let frame = value::encode(ty, &value, Limits::default()).unwrap();
        prop_assert_eq!(value::decode(&frame, Limits::default()), Ok((ty, value)));
    }

    #[test]
    fn another_implementation_reads_what_is_written_and_writes_the_same(value in values()) {
        let frame = value::encode(MessageType::Store, &value, Limits::default()).unwrap();
        let (payload, mut written) = (&frame[HEADER_LEN..], Vec::new());
        prop_assert_eq!(rmpv::decode::read_value(&mut &*payload).unwrap(), oracle(&value));
        rmpv::encode::write_value(&mut written, &oracle(&value)).unwrap();
        prop_assert_eq!(written, payload);
    }

    #[test]
    fn another_implementation_reads_the_same_in_any_bytes(bytes in vec(any::<u8>(), 0..64)) {
        if let Ok(value) = decode_payload(&bytes, Limits::default(), &mut ValueBuilder) {
            let mut rest = &bytes[..];
            let read = rmpv::decode::read_value(&mut rest).unwrap();
            // It keeps floats of 32 bits as such.
            let same = read == oracle(&value) || format!("{read:?}").contains("F32");
            prop_assert!(same && rest.is_empty(), "{read:?} {value:?}");
        }
    }

    #[test]
    fn a_cut_frame_is_incomplete(ty in types(), value in values(), cut in any::<Index>()) {
        let frame = value::encode(ty, &value, Limits::default()).unwrap();
        let cut = cut.index(frame.len());
        let expected = if cut < HEADER_LEN {
            FrameError::InvalidHeader
        } else {
            FrameError::IncompletePayload
        };
        prop_assert_eq!(value::decode(&frame[..cut], Limits::default()), Err(expected));
    }

    #[test]
    fn a_cut_payload_is_malformed(value in values(), cut in any::<Index>()) {
        let frame = value::encode(MessageType::Store, &value, Limits::default()).unwrap();
        let payload = &frame[HEADER_LEN..];
        let cut = &payload[..cut.index(payload.len())];
        prop_assert!(decode_payload(cut, Limits::default(), &mut ValueBuilder).is_err());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in vec(any::<u8>(), 0..512)) {
        let _ = value::decode(&bytes, Limits::default());
        if let Ok(value) = decode_payload(&bytes, Limits::default(), &mut ValueBuilder) {
            let frame = value::encode(MessageType::Store, &value, Limits::default()).unwrap();
            prop_assert_eq!(
                value::decode(&frame, Limits::default()),
                Ok((MessageType::Store, value))
            );
        }
    }

    #[test]
    fn terms_are_counted_without_building_them(value in values(), enough in 0..200usize) {
        let frame = value::encode(MessageType::Store, &value, Limits::default()).unwrap();
        let (counted, is) = (count_terms(&frame[HEADER_LEN..], enough), terms_of(&value));
        prop_assert_eq!(counted > enough, is > enough);
        prop_assert_eq!(count_terms(&frame[HEADER_LEN..], usize::MAX), is);
    }

    #[test]
    fn checking_accepts_exactly_what_decoding_accepts(bytes in vec(any::<u8>(), 0..64)) {
        let decoded = decode_payload(&bytes, Limits::default(), &mut ValueBuilder);
        prop_assert!(count_terms(&bytes, usize::MAX) <= bytes.len());
        prop_assert_eq!(check_payload(&bytes, Limits::default()), decoded.map(drop));
    }

    #[test]
    fn any_chunking_yields_the_same_frames(
        frames in vec((any::<u8>(), vec(any::<u8>(), 0..64)), 0..8),
        tail in 0..HEADER_LEN,
        cuts in vec(any::<Index>(), 0..24),
        drain_each_time in any::<bool>(),
    ) {
        let frames: Vec<_> = frames.iter().map(|(type_id, payload)| wire(*type_id, payload)).collect();
        let mut stream = frames.concat();
        stream.extend_from_slice(&[1, 0x42, 0, 0, 0, 0, 0, 0][..tail]);

        let mut reassembler = Reassembler::new(Limits::default());
        let mut seen = Vec::new();
        for chunk in chunks(stream.into(), &cuts) {
            reassembler.push(chunk);
            while drain_each_time && let Some(frame) = reassembler.next_frame().unwrap() {
                seen.push(frame.into_bytes());
            }
        }
        while let Some(frame) = reassembler.next_frame().unwrap() {
            seen.push(frame.into_bytes());
        }
        prop_assert_eq!(seen, frames);
        prop_assert_eq!(reassembler.buffered(), tail);
        prop_assert_eq!(reassembler.is_empty(), tail == 0);
    }
}

fn types() -> impl Strategy<Value = MessageType> {
    select(MessageType::ALL.as_slice())
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::Uint),
        (0..64u32, any::<u64>()).prop_map(|(bits, n)| Value::Uint(n >> bits)),
        (0..63u32, any::<i64>()).prop_map(|(bits, n)| Value::Int(!(n & i64::MAX) >> bits)),
        (NORMAL | SUBNORMAL | ZERO).prop_map(Value::Float),
        vec(any::<u8>(), 0..300).prop_map(Value::Bin),
        vec(any::<char>(), 0..300).prop_map(|text| Value::Str(text.into_iter().collect())),
    ];
    leaf.prop_recursive(6, 128, 20, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..20).prop_map(Value::Array),
            vec((inner.clone(), inner), 0..20).prop_map(Value::Map),
        ]
    })
}

fn wire(type_id: u8, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    // The two unchecked bytes are kept as they are.
    let mut bytes = vec![1, type_id, 0xA5, 0x5A];
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn chunks(mut stream: Bytes, cuts: &[Index]) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    for cut in cuts {
        // Pieces of the size of a header and below are where the seams are.
        let len = cut.index(2 * HEADER_LEN + 1 + stream.len() / 4).min(stream.len());
        chunks.push(stream.split_to(len));
    }
    chunks.push(stream);
    chunks
}
