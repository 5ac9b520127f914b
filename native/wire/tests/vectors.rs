//! Frames recorded from the original, in both directions.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod erlang;

use std::collections::BTreeMap;
use std::fs;

use erlang::Term;
use macula_peer_wire::value::{self, Value};
use macula_peer_wire::{EncodeError, FrameError, FrameWriter, Limits, MessageType, PayloadError};

/// `true` counts what was compared, `false` what this crate cannot meet or does otherwise on
/// purpose, so that no vector is left out unnoticed.
#[test]
fn encoding() {
    let mut counts = BTreeMap::new();
    for (input, expected) in vectors("encode.tsv") {
        let (outcome, compared) = match encode(&erlang::parse(&input)) {
            Ok(frame) if input.starts_with("{dht_store,") => {
                assert_eq!(frame[1], MessageType::Store.id());
                ("refused by the original, an alias of store here", false)
            }
            Ok(frame) => {
                let original = bytes(&expected);
                if frame != original {
                    assert_eq!(decode(&frame), decode(&original), "{input}");
                    assert!(input.matches(" => ").count() > 1, "{input}");
                }
                ("a frame", true)
            }
            Err(Refusal::Message(what)) => {
                assert!(expected.starts_with("EXC "), "{input}");
                (what, true)
            }
            Err(Refusal::Term(what)) => {
                assert!(expected.starts_with("EXC "), "{input}");
                (what, false)
            }
        };
        *counts.entry((compared, outcome)).or_insert(0) += 1;
    }
    assert_eq!(
        counts,
        BTreeMap::from([
            ((true, "a frame"), 144),
            ((true, "a required field missing"), 1),
            ((false, "a message that is not a map"), 1),
            ((false, "a type that is not an atom"), 1),
            ((false, "big integer"), 4),
            ((false, "bitstring"), 2),
            ((false, "fun"), 2),
            ((false, "improper list"), 6),
            ((false, "pid"), 1),
            ((false, "port"), 1),
            ((false, "reference"), 1),
            ((false, "refused by the original, an alias of store here"), 1),
            ((false, "tuple"), 14),
        ])
    );
}

#[test]
fn decoding() {
    let mut compared = 0;
    for (input, expected) in vectors("decode.tsv") {
        assert_eq!(decode(&bytes(&input)), erlang::parse(&expected), "{input}");
        compared += 1;
    }
    assert_eq!(compared, 252);
}

/// Why a message is refused: for what it is, or for a term that never comes as far as the frame
/// writer, because only the walker of Erlang terms can meet it.
enum Refusal {
    Message(&'static str),
    Term(&'static str),
}

impl From<EncodeError> for Refusal {
    fn from(error: EncodeError) -> Self {
        panic!("{error}")
    }
}

fn encode(input: &Term) -> Result<Vec<u8>, Refusal> {
    let Term::Tuple(parts) = input else { panic!("{input:?}") };
    let [ty, message] = parts.as_slice() else { panic!("{input:?}") };
    let Term::Atom(ty) = ty else {
        return Err(Refusal::Term("a type that is not an atom"));
    };
    let Term::Map(fields) = message else {
        return Err(Refusal::Term("a message that is not a map"));
    };
    let ty = MessageType::from_name(ty).ok_or(Refusal::Message("an unknown type"))?;
    check_required(ty, fields)?;
    let mut buf = Vec::new();
    let mut writer = FrameWriter::new(&mut buf, ty, Limits::default());
    write(message, &mut writer)?;
    assert_eq!(writer.finish(), Ok(buf.len()));
    Ok(buf)
}

fn check_required(ty: MessageType, message: &BTreeMap<Term, Term>) -> Result<(), Refusal> {
    let required = ty.required();
    let Some(first) = required.fields.first() else {
        return Ok(());
    };
    let binary = |name: &str| Term::Binary(name.as_bytes().to_vec());
    let binary_keys = required.binary_keys && message.contains_key(&binary(first));
    let key = |name: &&str| {
        if binary_keys { binary(name) } else { Term::atom(name) }
    };
    if required.fields.iter().all(|name| message.contains_key(&key(name))) {
        Ok(())
    } else {
        Err(Refusal::Message("a required field missing"))
    }
}

fn write(term: &Term, writer: &mut FrameWriter<'_>) -> Result<(), Refusal> {
    match term {
        Term::Atom(name) => match name.as_str() {
            "true" => writer.bool(true)?,
            "false" => writer.bool(false)?,
            "null" => writer.nil()?,
            name => writer.bin(name.as_bytes())?,
        },
        Term::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
            (Ok(value), _) => writer.int(value)?,
            (_, Ok(value)) => writer.uint(value)?,
            _ => return Err(Refusal::Term("big integer")),
        },
        Term::Float(bits) => writer.float(f64::from_bits(*bits))?,
        Term::Binary(bytes) => writer.bin(bytes)?,
        Term::List(items) => match items.iter().map(code_point).collect::<Option<String>>() {
            Some(text) => writer.str(&text)?,
            None => {
                writer.array(items.len())?;
                items.iter().try_for_each(|item| write(item, writer))?;
                writer.end();
            }
        },
        Term::Map(pairs) => {
            writer.map(pairs.len())?;
            for (key, value) in pairs {
                write(key, writer)?;
                write(value, writer)?;
            }
            writer.end();
        }
        Term::Tuple(_) => return Err(Refusal::Term("tuple")),
        Term::Unsendable(what) => return Err(Refusal::Term(what)),
    }
    Ok(())
}

fn code_point(term: &Term) -> Option<char> {
    let Term::Int(value) = term else { return None };
    char::from_u32(u32::try_from(*value).ok()?)
}

/// The result as the original would print it.
fn decode(frame: &[u8]) -> Term {
    match value::decode(frame, Limits::default()) {
        Ok((ty, value)) => Term::Tuple(vec![Term::atom("ok"), Term::Tuple(vec![Term::atom(ty.name()), term(value)])]),
        Err(error) => Term::error(match error {
            FrameError::InvalidHeader => Term::atom("invalid_header"),
            FrameError::UnsupportedVersion(version) => tagged("unsupported_version", version.into()),
            FrameError::TooLarge { .. } => panic!("{error}"),
            FrameError::IncompletePayload => Term::atom("incomplete_payload"),
            FrameError::UnknownType(id) => tagged("unknown_type", id.into()),
            FrameError::Payload(error) => Term::Tuple(vec![Term::atom("msgpack_decode_error"), payload_error(error)]),
        }),
    }
}

fn payload_error(error: PayloadError) -> Term {
    match error {
        PayloadError::Incomplete => Term::atom("incomplete"),
        PayloadError::TrailingBytes => Term::atom("not_just_binary"),
        PayloadError::InvalidString(bytes) => Term::Tuple(vec![Term::atom("invalid_string"), Term::Binary(bytes)]),
        PayloadError::Extension(marker) => Term::Tuple(vec![Term::atom("badarg"), tagged("bad_ext", marker.into())]),
        PayloadError::Reserved
        | PayloadError::Stopped
        | PayloadError::TooDeep { .. }
        | PayloadError::TooManyTerms { .. } => panic!("{error}"),
    }
}

fn tagged(tag: &str, value: i128) -> Term {
    Term::Tuple(vec![Term::atom(tag), Term::Int(value)])
}

fn term(value: Value) -> Term {
    match value {
        Value::Nil => Term::atom("null"),
        Value::Bool(value) => Term::Atom(value.to_string()),
        Value::Uint(value) => Term::Int(value.into()),
        Value::Int(value) => Term::Int(value.into()),
        Value::Float(value) => Term::Float(value.to_bits()),
        Value::Bin(bytes) => Term::Binary(bytes),
        Value::Str(text) => Term::List(text.chars().map(|c| Term::Int(c as i128)).collect()),
        Value::Array(items) => Term::List(items.into_iter().map(term).collect()),
        Value::Map(pairs) => Term::Map(pairs.into_iter().map(|(key, value)| (term(key), term(value))).collect()),
    }
}

fn vectors(name: &str) -> Vec<(String, String)> {
    let path = format!("{}/../../test/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).expect(&path);
    text.lines()
        .map(|line| line.split_once('\t').expect(line))
        .map(|(input, expected)| (input.to_owned(), expected.to_owned()))
        .collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2), "{hex}");
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}
