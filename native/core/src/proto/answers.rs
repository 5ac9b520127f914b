//! Answers that this node gives by itself: it alone knows where a message came from.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use macula_peer_wire::value::{Value, ValueBuilder, encode};
use macula_peer_wire::{Limits, MessageType, decode_payload};

/// What is read of a question, and no more: strangers ask, and what they say is echoed.
pub const LIMITS: Limits = Limits { max_frame: 4096, max_depth: 8, max_terms: 1024 };

/// The answer to a `nat_probe` that came from this address: a frame with the original's fields, `node_id` as in the
/// probe. `None`: the probe cannot be read.
pub fn nat_probe_reply(probe: &[u8], from: SocketAddr, now: SystemTime, limits: Limits) -> Option<Bytes> {
    let reply = vec![
        (text("node_id"), field(probe, "node_id")?),
        (text("reflexive_ip"), text(&from.ip().to_string())),
        (text("reflexive_port"), Value::Uint(from.port().into())),
        (text("server_time"), milliseconds(now)),
    ];
    frame(MessageType::NatProbeReply, reply, limits)
}

/// The answer to a `ping`: a frame with the original's fields, `timestamp` as in the ping. `None`: the ping cannot be
/// read.
pub fn pong(ping: &[u8], now: SystemTime, limits: Limits) -> Option<Bytes> {
    let reply = vec![(text("timestamp"), field(ping, "timestamp")?), (text("server_time"), milliseconds(now))];
    frame(MessageType::Pong, reply, limits)
}

fn field(payload: &[u8], name: &str) -> Option<Value> {
    if payload.len() > LIMITS.max_frame {
        return None;
    }
    let Value::Map(fields) = decode_payload(payload, LIMITS, &mut ValueBuilder).ok()? else { return None };
    fields.into_iter().find(|(key, _)| *key == text(name)).map(|(_, value)| value)
}

fn frame(kind: MessageType, fields: Vec<(Value, Value)>, limits: Limits) -> Option<Bytes> {
    encode(kind, &Value::Map(fields), limits).ok().map(Bytes::from)
}

fn milliseconds(at: SystemTime) -> Value {
    Value::Uint(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64)
}

fn text(text: &str) -> Value {
    Value::Bin(text.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::iter;

    use super::*;

    fn payload(value: Value) -> Vec<u8> {
        let frame = encode(MessageType::NatProbe, &Value::Map(vec![(text("node_id"), value)]), Limits::default());
        frame.unwrap()[8..].to_vec()
    }

    #[test]
    fn a_question_is_read_as_far_as_it_is_short() {
        let answer =
            |value| nat_probe_reply(&payload(value), ([20, 0, 0, 1], 7000).into(), UNIX_EPOCH, Limits::default());
        let array = |n| Value::Array(iter::repeat_n(Value::Map(Vec::new()), n).collect());
        assert!(answer(Value::Bin(vec![7; 255])).is_some());
        assert!(answer(Value::Bin(vec![7; 4096])).is_none(), "too long");
        assert!(answer(array(1000)).is_some());
        assert!(answer(array(1024)).is_none(), "too many terms");
        let deep = |n| (0..n).fold(Value::Uint(1), |inner, _| Value::Array(vec![inner]));
        assert!(answer(deep(7)).is_some() && answer(deep(8)).is_none());
    }

    #[test]
    fn an_answer_repeats_the_question_and_says_where_it_came_from() {
        let reply =
            nat_probe_reply(&payload(text("me")), ([20, 0, 0, 1], 7000).into(), UNIX_EPOCH, Limits::default()).unwrap();
        let said = |name: &str| field(&reply[8..], name);
        assert_eq!(reply[1], MessageType::NatProbeReply.id());
        assert_eq!([said("node_id"), said("reflexive_ip")], [Some(text("me")), Some(text("20.0.0.1"))]);
        assert_eq!(said("reflexive_port"), Some(Value::Uint(7000)));
    }
}
