//! NAT probes: a relay tells who asks at which address it sees it.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use macula_peer_wire::value::{Value, ValueBuilder, encode};
use macula_peer_wire::{Limits, MessageType, decode_payload};

/// The answer to a `nat_probe` that came from this address: a frame with the original's fields, `node_id` as in the
/// probe. `None`: the probe cannot be read.
pub(crate) fn answer(probe: &[u8], from: SocketAddr, limits: Limits) -> Option<Bytes> {
    let Value::Map(fields) = decode_payload(probe, limits, &mut ValueBuilder).ok()? else { return None };
    let node_id = fields.into_iter().find(|(key, _)| *key == text("node_id")).map(|(_, value)| value)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let reply = Value::Map(vec![
        (text("node_id"), node_id),
        (text("reflexive_ip"), text(&from.ip().to_string())),
        (text("reflexive_port"), Value::Uint(from.port().into())),
        (text("server_time"), Value::Uint(now.as_millis() as u64)),
    ]);
    encode(MessageType::NatProbeReply, &reply, limits).ok().map(Bytes::from)
}

fn text(text: &str) -> Value {
    Value::Bin(text.into())
}
