//! The frames that the fake gateway reads and writes, with a MessagePack library of their own: an oracle that is independent of
//! the code under test.

use rmpv::{Value, ValueRef};

/// Version, type, flags, reserved, then the payload's length in four bytes.
pub const HEADER: usize = 8;

/// The types that the testkit's programs send or answer.
pub mod kind {
    #![allow(missing_docs)]
    pub const CONNECT: u8 = 0x01;
    pub const PING: u8 = 0x03;
    pub const PONG: u8 = 0x04;
    pub const CALL: u8 = 0x20;
    pub const REPLY: u8 = 0x21;
    pub const RPC_REQUEST: u8 = 0x24;
    pub const RPC_REPLY: u8 = 0x25;
    pub const FIND_NODE: u8 = 0x40;
    pub const FIND_NODE_REPLY: u8 = 0x41;
    pub const STORE: u8 = 0x42;
    pub const FIND_VALUE: u8 = 0x43;
    pub const FIND_VALUE_REPLY: u8 = 0x44;
    pub const NAT_PROBE: u8 = 0x50;
    pub const NAT_PROBE_REPLY: u8 = 0x51;
    pub const RELAY_REQUEST: u8 = 0x56;
}

/// The name of a message type.
pub fn type_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        kind::CONNECT => "connect",
        0x02 => "disconnect",
        kind::PING => "ping",
        kind::PONG => "pong",
        0x10 => "publish",
        0x11 => "subscribe",
        0x12 => "unsubscribe",
        0x13 => "pubsub_route",
        kind::CALL => "call",
        kind::REPLY => "reply",
        0x22 => "cast",
        0x23 => "rpc_route",
        kind::RPC_REQUEST => "rpc_request",
        kind::RPC_REPLY => "rpc_reply",
        0x30 => "swim_ping",
        0x31 => "swim_ack",
        0x32 => "swim_ping_req",
        kind::FIND_NODE => "find_node",
        kind::FIND_NODE_REPLY => "find_node_reply",
        kind::STORE => "store",
        kind::FIND_VALUE => "find_value",
        kind::FIND_VALUE_REPLY => "find_value_reply",
        kind::NAT_PROBE => "nat_probe",
        kind::NAT_PROBE_REPLY => "nat_probe_reply",
        0x52 => "punch_request",
        0x53 => "punch_coordinate",
        0x54 => "punch_execute",
        0x55 => "punch_result",
        kind::RELAY_REQUEST => "relay_request",
        0x57 => "relay_data",
        0x60 => "bridge_rpc",
        0x61 => "bridge_data",
        _ => return None,
    })
}

/// A decoded frame.
#[derive(Debug)]
pub struct Frame<'a> {
    /// The type id.
    pub kind: u8,
    /// The payload's fields; none when it is not a map.
    pub fields: Vec<(ValueRef<'a>, ValueRef<'a>)>,
    /// Bytes that followed the frame.
    pub extra: usize,
}

impl<'a> Frame<'a> {
    /// The value under a binary key.
    pub fn field(&self, key: &str) -> Option<&ValueRef<'a>> {
        let key = bin(key.as_bytes());
        self.fields.iter().find(|(k, _)| *k == key).map(|(_, value)| value)
    }

    /// The integer under a binary key.
    pub fn int(&self, key: &str) -> Option<i128> {
        match self.field(key)? {
            ValueRef::Integer(number) => number.as_u64().map(i128::from).or(number.as_i64().map(i128::from)),
            _ => None,
        }
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// They end too early.
    Incomplete,
    /// Version, type or payload is wrong.
    Invalid,
}

/// The frame at the beginning of `bytes`.
pub fn decode(bytes: &[u8]) -> Result<Frame<'_>, Fault> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(Fault::Incomplete)?;
    let mut payload = rest.get(..payload_length(header)).ok_or(Fault::Incomplete)?;
    let extra = rest.len() - payload.len();
    if header[0] != 1 || type_name(header[1]).is_none() {
        return Err(Fault::Invalid);
    }
    let value = rmpv::decode::read_value_ref(&mut payload).map_err(|_| Fault::Invalid)?;
    if !payload.is_empty() {
        return Err(Fault::Invalid);
    }
    let fields = if let ValueRef::Map(fields) = value { fields } else { Vec::new() };
    Ok(Frame { kind: header[1], fields, extra })
}

/// The payload's length as the header states it.
pub fn payload_length(header: &[u8; HEADER]) -> usize {
    u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize
}

/// A value of the bin family.
pub fn bin(bytes: &[u8]) -> ValueRef<'_> {
    ValueRef::Binary(bytes)
}

/// A frame whose payload is a map with binary keys.
#[allow(clippy::expect_used)]
pub fn encode<'a>(kind: u8, fields: &[(&'a str, ValueRef<'a>)]) -> Vec<u8> {
    let map = fields.iter().map(|(key, value)| (bin(key.as_bytes()), value.clone())).collect();
    let mut payload = Vec::new();
    rmpv::encode::write_value_ref(&mut payload, &ValueRef::Map(map)).expect("a vector takes all");
    frame(kind, &payload)
}

/// A frame whose payload is a map with any keys.
#[allow(clippy::expect_used)]
pub fn of_map(kind: u8, fields: Vec<(Value, Value)>) -> Vec<u8> {
    let mut payload = Vec::new();
    rmpv::encode::write_value(&mut payload, &Value::Map(fields)).expect("a vector takes all");
    frame(kind, &payload)
}

/// A store of `#{<<"v">> => binary()}` that is `size` bytes long with its header.
pub fn store_of_size(size: usize) -> Result<Vec<u8>, String> {
    const AROUND: usize = HEADER + 4;
    let room = size.checked_sub(AROUND + 2).ok_or_else(|| format!("a frame has at least {} bytes", AROUND + 2))?;
    let mut payload = vec![0x81, 0xc4, 1, b'v'];
    // Padding to an exact size may need a length one step wider than the shortest.
    match room {
        0..=0xff => payload.extend([0xc4, room as u8]),
        0x100..=0x1_0000 => {
            payload.push(0xc5);
            payload.extend(((room - 1) as u16).to_be_bytes());
        }
        _ => {
            payload.push(0xc6);
            payload.extend(((room - 3) as u32).to_be_bytes());
        }
    }
    payload.resize(size - HEADER, b'.');
    Ok(frame(kind::STORE, &payload))
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![1, kind, 0, 0];
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn fields_survive_a_round_trip() {
        for number in [0, u64::MAX.into(), -1, i64::MIN.into()] {
            let value = i64::try_from(number).map_or_else(|_| ValueRef::from(number as u64), ValueRef::from);
            let bytes = encode(kind::PING, &[("n", value), ("b", bin(&[7; 256]))]);
            let frame = decode(&bytes).unwrap();
            assert_eq!(frame.int("n"), Some(number));
            assert_eq!(frame.field("b"), Some(&bin(&[7; 256])));
            assert_eq!((frame.kind, frame.extra), (kind::PING, 0));
        }
    }

    #[test]
    fn a_store_has_the_size_asked_for() {
        assert!(store_of_size(13).is_err());
        for size in [14, 128, 269, 270, 271, 65_549, 65_550, 65_551, 65_552, 65_553, 100_000] {
            let bytes = store_of_size(size).unwrap();
            assert_eq!(bytes.len(), size);
            assert!(matches!(decode(&bytes).unwrap().field("v"), Some(ValueRef::Binary(_))), "{size}");
        }
    }

    #[test]
    fn malformed_frames_are_recognized() {
        let ping = encode(kind::PING, &[("timestamp", ValueRef::from(1))]);
        assert_eq!(decode(&ping[..ping.len() - 1]).unwrap_err(), Fault::Incomplete);
        assert_eq!(decode(&ping[..5]).unwrap_err(), Fault::Incomplete);
        assert_eq!(decode(&[&ping[..], &ping[..]].concat()).unwrap().extra, ping.len());
        assert_eq!(decode(&frame(0x99, &[0x80])).unwrap_err(), Fault::Invalid);
        assert_eq!(decode(&frame(kind::PING, &[0x80, 0x80])).unwrap_err(), Fault::Invalid);
        assert_eq!(decode(&frame(kind::PING, &[0x81, 0x01])).unwrap_err(), Fault::Invalid);
        assert!(decode(&frame(kind::PING, &[0x93, 1, 0x92, 2, 3, 0x81, 4, 5])).unwrap().fields.is_empty());
    }
}
