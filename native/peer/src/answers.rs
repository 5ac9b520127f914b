//! Answers that this node gives by itself: it alone knows where a message came from.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use macula_peer_wire::value::{Value, ValueBuilder, encode};
use macula_peer_wire::{Limits, MessageType, decode_payload};

/// The answer to a `nat_probe` that came from this address: a frame with the original's fields, `node_id` as in the
/// probe. `None`: the probe cannot be read.
pub(crate) fn nat_probe_reply(probe: &[u8], from: SocketAddr, limits: Limits) -> Option<Bytes> {
    let reply = vec![
        (text("node_id"), field(probe, "node_id", limits)?),
        (text("reflexive_ip"), text(&from.ip().to_string())),
        (text("reflexive_port"), Value::Uint(from.port().into())),
        (text("server_time"), now()),
    ];
    frame(MessageType::NatProbeReply, reply, limits)
}

/// The answer to a `ping`: a frame with the original's fields, `timestamp` as in the ping. `None`: the ping cannot be
/// read.
pub(crate) fn pong(ping: &[u8], limits: Limits) -> Option<Bytes> {
    let reply = vec![(text("timestamp"), field(ping, "timestamp", limits)?), (text("server_time"), now())];
    frame(MessageType::Pong, reply, limits)
}

fn field(payload: &[u8], name: &str, limits: Limits) -> Option<Value> {
    let Value::Map(fields) = decode_payload(payload, limits, &mut ValueBuilder).ok()? else { return None };
    fields.into_iter().find(|(key, _)| *key == text(name)).map(|(_, value)| value)
}

fn frame(kind: MessageType, fields: Vec<(Value, Value)>, limits: Limits) -> Option<Bytes> {
    encode(kind, &Value::Map(fields), limits).ok().map(Bytes::from)
}

fn now() -> Value {
    Value::Uint(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64)
}

fn text(text: &str) -> Value {
    Value::Bin(text.into())
}
