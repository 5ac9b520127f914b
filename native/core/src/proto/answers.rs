//! Answers that this node gives without a handler: only it knows where a message came from.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use macula_peer_wire::{HEADER_LEN, Limits, MessageType, check_payload};

use super::map::{Map, MapWriter};

/// Longer questions are not answered: strangers ask, and the answer repeats a part of the question.
pub const LIMITS: Limits = Limits { max_frame: 4096, max_depth: 8, max_terms: 1024 };

/// The answer to a `nat_probe` that came from this address: a frame with the original's fields, `node_id` as in the
/// probe. `None`: the probe cannot be read.
pub fn nat_probe_reply(probe: &[u8], from: SocketAddr, now: SystemTime, limits: Limits) -> Option<Bytes> {
    let reply = MapWriter::default()
        .raw("node_id", field(probe, "node_id")?)
        .bin("reflexive_ip", &from.ip())
        .value("reflexive_port", &from.port())
        .value("server_time", &milliseconds(now));
    within(reply.frame(MessageType::NatProbeReply), limits)
}

/// The answer to a `ping`: a frame with the original's fields, `timestamp` as in the ping. `None`: the ping cannot be
/// read.
pub fn pong(ping: &[u8], now: SystemTime, limits: Limits) -> Option<Bytes> {
    let reply =
        MapWriter::default().raw("timestamp", field(ping, "timestamp")?).value("server_time", &milliseconds(now));
    within(reply.frame(MessageType::Pong), limits)
}

/// The MessagePack of a field.
fn field<'a>(payload: &'a [u8], name: &str) -> Option<&'a [u8]> {
    if payload.len() > LIMITS.max_frame {
        return None;
    }
    Map::split(payload, LIMITS).ok()??.raw(name)
}

fn within(frame: Bytes, limits: Limits) -> Option<Bytes> {
    let fits = frame.len() <= limits.max_frame && check_payload(&frame[HEADER_LEN..], limits).is_ok();
    fits.then_some(frame)
}

fn milliseconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::iter;

    use rmpv::Value;

    use super::*;

    fn text(text: &str) -> Value {
        Value::Binary(text.into())
    }

    fn payload(value: Value) -> Vec<u8> {
        let mut payload = Vec::new();
        rmpv::encode::write_value(&mut payload, &Value::Map(vec![(text("node_id"), value)])).unwrap();
        payload
    }

    #[test]
    fn a_question_is_read_as_far_as_it_is_short() {
        let answer =
            |value| nat_probe_reply(&payload(value), ([20, 0, 0, 1], 7000).into(), UNIX_EPOCH, Limits::default());
        let array = |n| Value::Array(iter::repeat_n(Value::Map(Vec::new()), n).collect());
        assert!(answer(Value::Binary(vec![7; 255])).is_some());
        assert!(answer(Value::Binary(vec![7; 4096])).is_none(), "too long");
        assert!(answer(array(1000)).is_some());
        assert!(answer(array(1024)).is_none(), "too many terms");
        let deep = |n| (0..n).fold(Value::from(1), |inner, _| Value::Array(vec![inner]));
        assert!(answer(deep(7)).is_some() && answer(deep(8)).is_none());
    }

    #[test]
    fn an_answer_repeats_the_question_and_says_where_it_came_from() {
        let reply =
            nat_probe_reply(&payload(text("me")), ([20, 0, 0, 1], 7000).into(), UNIX_EPOCH, Limits::default()).unwrap();
        let said = rmpv::decode::read_value(&mut &reply[HEADER_LEN..]).unwrap();
        let expected = [
            ("node_id", text("me")),
            ("reflexive_ip", text("20.0.0.1")),
            ("reflexive_port", 7000.into()),
            ("server_time", 0.into()),
        ];
        assert_eq!(reply[1], MessageType::NatProbeReply.id());
        assert_eq!(said, Value::Map(expected.map(|(key, value)| (text(key), value)).into()));
    }

    #[test]
    fn an_answer_keeps_to_the_limits_of_messages() {
        let limits = Limits { max_frame: 64, ..Limits::default() };
        let pong = |len| pong(&ping(len), UNIX_EPOCH, limits);
        assert!(pong(1).is_some() && pong(64).is_none());
    }

    fn ping(len: usize) -> Vec<u8> {
        let mut ping = Vec::new();
        let fields = vec![(text("timestamp"), Value::Binary(vec![0; len]))];
        rmpv::encode::write_value(&mut ping, &Value::Map(fields)).unwrap();
        ping
    }
}
