//! Limits, and the errors that no vector has.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::ops::Range;

use bytes::Bytes;
use macula_peer_wire::value::{self, Value, ValueBuilder};
use macula_peer_wire::{
    Build, EncodeError, FrameError, FrameWriter, HEADER_LEN, Header, Limits, MAX_DEPTH_CEILING, MessageType,
    PayloadError, Reassembler, decode_payload,
};

const MAX_FRAME: usize = 64;
const SMALL: Limits = Limits { max_frame: MAX_FRAME, max_depth: 64, max_terms: 1000 };

#[test]
fn defaults() {
    assert_eq!(Limits::default(), Limits { max_frame: 16_777_216, max_depth: 64, max_terms: 1_000_000 });
}

#[test]
fn depth() {
    let limits = Limits::default();
    for nested in [nested_arrays, nested_maps, nested_keys] {
        let frame = value::encode(MessageType::Store, &nested(64), limits).unwrap();
        assert_eq!(value::decode(&frame, limits), Ok((MessageType::Store, nested(64))));

        let refused = value::encode(MessageType::Store, &nested(65), limits);
        assert_eq!(refused, Err(EncodeError::TooDeep { max: 64 }));
        let one_more = Limits { max_depth: 65, ..limits };
        let frame = value::encode(MessageType::Store, &nested(65), one_more).unwrap();
        assert_eq!(value::decode(&frame, limits), Err(FrameError::Payload(PayloadError::TooDeep { max: 64 })));
    }
}

#[test]
fn depth_is_counted_inside_not_along() {
    let siblings = Value::Array((0..100).map(|_| nested_maps(63)).collect());
    let frame = value::encode(MessageType::Store, &siblings, Limits::default()).unwrap();
    assert_eq!(value::decode(&frame, Limits::default()), Ok((MessageType::Store, siblings)));
}

#[test]
fn depth_has_a_ceiling() {
    let limits = Limits { max_depth: usize::MAX, ..Limits::default() };
    let too_deep = PayloadError::TooDeep { max: MAX_DEPTH_CEILING };
    let decoded = decode_payload(&[0x91; 1_000_000], limits, &mut ValueBuilder);
    assert_eq!(decoded, Err(too_deep));
    let refused = value::encode(MessageType::Store, &nested_arrays(MAX_DEPTH_CEILING + 1), limits);
    assert_eq!(refused, Err(EncodeError::TooDeep { max: MAX_DEPTH_CEILING }));
}

/// A thousand terms in the fewest bytes, and one more, of each kind.
#[test]
fn terms() {
    let texts = |n: usize| Value::Array(vec![Value::Str("a".repeat(n - 2))]);
    let empty_maps = |n: usize| Value::Array(vec![Value::Map(vec![]); n - 1]);
    let keys = |n: u64| Value::Map((1..n / 2 + n % 2).map(|key| (Value::Uint(key), Value::Nil)).collect());
    for many in [texts as fn(usize) -> Value, empty_maps] {
        let limits = Limits { max_terms: 1000, ..Limits::default() };
        let frame = value::encode(MessageType::Store, &many(1000), limits).unwrap();
        assert_eq!(value::decode(&frame, limits), Ok((MessageType::Store, many(1000))));
        let refused = value::encode(MessageType::Store, &many(1001), limits);
        assert_eq!(refused, Err(EncodeError::TooManyTerms { max: 1000 }));
        let frame = value::encode(MessageType::Store, &many(1001), Limits::default()).unwrap();
        let too_many = FrameError::Payload(PayloadError::TooManyTerms { max: 1000 });
        assert_eq!(value::decode(&frame, limits), Err(too_many));
    }
    let odd = Limits { max_terms: 999, ..Limits::default() };
    assert!(value::encode(MessageType::Store, &keys(999), odd).is_ok());
    assert!(value::encode(MessageType::Store, &keys(1001), odd).is_err());
    // Any number of bytes is allowed, whatever they are.
    let binary = Value::Array(vec![Value::Bin(vec![0; 100_000]); 500]);
    assert!(value::encode(MessageType::Store, &binary, odd).is_err(), "the frame is too large");
    let binary = Value::Array(vec![Value::Bin(vec![0; 10_000]); 500]);
    let frame = value::encode(MessageType::Store, &binary, odd).unwrap();
    assert_eq!(value::decode(&frame, odd), Ok((MessageType::Store, binary)));
}

#[test]
fn too_many_terms_are_refused_before_anything_is_built() {
    for term in [&[0x80][..], &[0x90], &[0xC0], &[0xA0], &[0x81, 1, 1], &[0x91, 0x80], &[0xC4, 1, 7], &[0xA1, b'a']] {
        let n = (16 << 20) / term.len() - 1;
        let payload = [&[0xDD], &(n as u32).to_be_bytes()[..], &term.repeat(n)].concat();
        let refused = decode_payload(&payload, Limits::default(), &mut Few(0));
        assert_eq!(refused, Err(PayloadError::TooManyTerms { max: 1_000_000 }), "{term:?}");
    }
}

#[test]
fn frame_length() {
    let fitting = Value::Bin(vec![0; MAX_FRAME - HEADER_LEN - 2]);
    let frame = value::encode(MessageType::Store, &fitting, SMALL).unwrap();
    assert_eq!(frame.len(), MAX_FRAME);
    assert_eq!(value::decode(&frame, SMALL), Ok((MessageType::Store, fitting)));

    let larger = Value::Bin(vec![0; MAX_FRAME - HEADER_LEN - 1]);
    let refused = value::encode(MessageType::Store, &larger, SMALL);
    assert_eq!(refused, Err(EncodeError::TooLarge { max: MAX_FRAME }));
    let frame = value::encode(MessageType::Store, &larger, Limits::default()).unwrap();
    let too_large = FrameError::TooLarge { len: MAX_FRAME + 1, max: MAX_FRAME };
    assert_eq!(value::decode(&frame, SMALL), Err(too_large.clone()));
    assert_eq!(value::decode(&frame[..HEADER_LEN], SMALL), Err(too_large.clone()));
    assert_eq!(Header::parse(&frame, SMALL), Err(too_large));
}

#[test]
fn too_large_payloads_are_refused_before_they_are_copied() {
    type Write<'a> = &'a dyn Fn(&mut FrameWriter<'_>) -> Result<(), EncodeError>;

    let text = "a".repeat(1 << 20);
    let too_large = Err(EncodeError::TooLarge { max: MAX_FRAME });
    let mut buf = Vec::with_capacity(MAX_FRAME);
    let large = vec![0; 1 << 20];
    let writes: [Write<'_>; 4] =
        [&|writer| writer.bin(&large), &|writer| writer.str(&text), &|writer| writer.array(MAX_FRAME), &|writer| {
            writer.map(usize::MAX)
        }];
    for write in writes {
        let mut writer = FrameWriter::new(&mut buf, MessageType::Store, SMALL);
        assert_eq!(write(&mut writer), too_large);
        assert_eq!(buf.capacity(), MAX_FRAME);
    }
}

#[test]
fn floats_are_finite() {
    for float in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let refused = value::encode(MessageType::Store, &Value::Float(float), SMALL);
        assert_eq!(refused, Err(EncodeError::NotFinite));
        let wide = [&[0xCB], float.to_be_bytes().as_slice()].concat();
        let narrow = [&[0xCA], (float as f32).to_be_bytes().as_slice()].concat();
        for payload in [wide, narrow] {
            assert_eq!(payload_of(&payload), Err(PayloadError::Incomplete));
        }
    }
}

#[test]
fn malformed_payloads() {
    let cases: [(&[u8], PayloadError); 5] = [
        (&[0xC1], PayloadError::Reserved),
        // The leftmost error counts, also when the container around it cannot be complete.
        (&[0xDD, 0xFF, 0xFF, 0xFF, 0xFF, 0xC1], PayloadError::Reserved),
        (&[0xDF, 0xFF, 0xFF, 0xFF, 0xFF, 1], PayloadError::Incomplete),
        (&[0xA3, 0xED, 0xA0, 0x80], PayloadError::InvalidString(vec![0xED, 0xA0, 0x80])),
        (&[0xC0, 0xC1], PayloadError::TrailingBytes),
    ];
    for (payload, error) in cases {
        assert_eq!(payload_of(payload), Err(error), "{payload:x?}");
    }
}

#[test]
fn extensions_are_refused_when_they_are_all_there() {
    let cases: [(&[u8], usize); 8] = [
        (&[0xC7, 3], 3),
        (&[0xC8, 1, 2], 0x102),
        (&[0xC9, 0, 1, 0, 2], 0x1_0002),
        (&[0xD4], 1),
        (&[0xD5], 2),
        (&[0xD6], 4),
        (&[0xD7], 8),
        (&[0xD8], 16),
    ];
    for (start, len) in cases {
        let payload = [start, &[5], &vec![0; len]].concat();
        assert_eq!(payload_of(&payload), Err(PayloadError::Extension(start[0])));
        assert_eq!(payload_of(&payload[..payload.len() - 1]), Err(PayloadError::Incomplete));
    }
}

#[test]
fn numbers_in_longer_forms() {
    assert_eq!(payload_of(&[0xD0, 5]), Ok(Value::Uint(5)));
    assert_eq!(payload_of(&[0xD2, 0xFF, 0xFF, 0xFF, 0xFE]), Ok(Value::Int(-2)));
    assert_eq!(payload_of(&[0xCF, 0, 0, 0, 0, 0, 0, 0, 1]), Ok(Value::Uint(1)));
}

#[test]
fn a_stream_is_refused_with_its_header() {
    let cases: [([u8; HEADER_LEN], FrameError); 2] = [
        ([2, 0x42, 0, 0, 0, 0, 0, 0], FrameError::UnsupportedVersion(2)),
        ([1, 0x42, 0, 0, 0, 0, 0, 57], FrameError::TooLarge { len: MAX_FRAME + 1, max: MAX_FRAME }),
    ];
    for (header, error) in cases {
        for split in 0..HEADER_LEN {
            let mut reassembler = Reassembler::new(SMALL);
            reassembler.push(Bytes::copy_from_slice(&header[..split]));
            assert_eq!(reassembler.next_frame(), Ok(None));
            reassembler.push(Bytes::copy_from_slice(&header[split..]));
            assert_eq!(reassembler.next_frame(), Err(error.clone()));
            assert_eq!(reassembler.next_frame(), Err(error.clone()));
            assert_eq!(reassembler.buffered(), HEADER_LEN);
        }
    }
}

#[test]
fn frames_inside_a_chunk_are_not_copied() {
    let frame = [1, 0xFF, 0, 0, 0, 0, 0, 1, 0x80];
    let chunk = Bytes::from([frame, frame].concat());
    let mut reassembler = Reassembler::new(SMALL);
    reassembler.push(chunk.clone());
    for start in [0, frame.len()] {
        let frame = reassembler.next_frame().unwrap().unwrap();
        assert_eq!(frame.type_id(), 0xFF);
        assert_eq!(frame.payload(), [0x80]);
        assert_eq!(frame.bytes().as_ptr(), chunk[start..].as_ptr());
        assert_eq!(frame.into_payload().as_ptr(), chunk[start + HEADER_LEN..].as_ptr());
    }
    assert_eq!(reassembler.next_frame(), Ok(None));
}

fn payload_of(payload: &[u8]) -> Result<Value, PayloadError> {
    decode_payload(payload, Limits::default(), &mut ValueBuilder)
}

/// `depth` arrays inside one another.
fn nested_arrays(depth: usize) -> Value {
    (1..depth).fold(Value::Array(vec![]), |inner, _| Value::Array(vec![inner]))
}

/// `depth` maps inside one another, each the value of the one around it.
fn nested_maps(depth: usize) -> Value {
    (1..depth).fold(Value::Map(vec![]), |inner, _| Value::Map(vec![(Value::Nil, inner)]))
}

/// `depth` maps inside one another, each the key of the one around it.
fn nested_keys(depth: usize) -> Value {
    (1..depth).fold(Value::Map(vec![]), |inner, _| Value::Map(vec![(inner, Value::Nil)]))
}

/// A builder that stops after this many values.
struct Few(usize);

impl Build for Few {
    type Term = ();

    fn goes_on(&mut self, values: usize) -> bool {
        let left = self.0.checked_sub(values);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }

    fn nil(&mut self) {}
    fn bool(&mut self, _: bool) {}
    fn uint(&mut self, _: u64) {}
    fn int(&mut self, _: i64) {}
    fn float(&mut self, _: f64) {}
    fn bin(&mut self, _: Range<usize>, _: &[u8]) {}
    fn str(&mut self, _: &str) {}
    fn array(&mut self, _: Vec<()>) {}
    fn map(&mut self, _: Vec<()>, _: Vec<()>) {}
}

#[test]
fn a_builder_can_stop_decoding() {
    let three = [0x92, 1, 2];
    assert_eq!(decode_payload(&three, Limits::default(), &mut Few(3)), Ok(()));
    assert_eq!(decode_payload(&three, Limits::default(), &mut Few(2)), Err(PayloadError::Stopped));
    // The string and its code points.
    let text = [0xA3, b'a', b'b', b'c'];
    assert_eq!(decode_payload(&text, Limits::default(), &mut Few(4)), Ok(()));
    assert_eq!(decode_payload(&text, Limits::default(), &mut Few(3)), Err(PayloadError::Stopped));
    // A binary is one value.
    assert_eq!(decode_payload(&[0xC4, 3, 1, 2, 3], Limits::default(), &mut Few(1)), Ok(()));
}
