//! Frames and the few bits of MessagePack that the stand-ins need.

/// Version, type, flags, reserved, then the payload's length in four bytes.
pub const HEADER: usize = 8;

/// The types that the stand-ins send or answer.
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

/// A MessagePack value as far as a stand-in cares for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// Any integer of up to 64 bits.
    Int(i128),
    /// The bin family.
    Bin(&'a [u8]),
    /// The str family.
    Str(&'a str),
    /// Anything else, nested values included.
    Other,
}

/// A decoded frame.
#[derive(Debug)]
pub struct Frame<'a> {
    /// The type id.
    pub kind: u8,
    /// The payload's fields; none when it is not a map.
    pub fields: Vec<(Value<'a>, Value<'a>)>,
    /// Bytes that followed the frame.
    pub extra: usize,
}

impl<'a> Frame<'a> {
    /// The value under a binary key.
    pub fn field(&self, key: &str) -> Option<Value<'a>> {
        let key = Value::Bin(key.as_bytes());
        self.fields.iter().find(|(k, _)| *k == key).map(|(_, value)| *value)
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
    let payload = rest.get(..payload_length(header)).ok_or(Fault::Incomplete)?;
    if header[0] != 1 || type_name(header[1]).is_none() {
        return Err(Fault::Invalid);
    }
    let fields = fields(payload).ok_or(Fault::Invalid)?;
    Ok(Frame { kind: header[1], fields, extra: rest.len() - payload.len() })
}

/// The payload's length as the header states it.
pub fn payload_length(header: &[u8; HEADER]) -> usize {
    u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize
}

fn fields(payload: &[u8]) -> Option<Vec<(Value<'_>, Value<'_>)>> {
    let mut reader = Reader(payload);
    let mut fields = Vec::new();
    match reader.map_header() {
        Some(count) => {
            for _ in 0..count {
                fields.push((reader.value()?, reader.value()?));
            }
        }
        None => _ = reader.value()?,
    }
    reader.0.is_empty().then_some(fields)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Leaves the reader where it is when no map follows.
    fn map_header(&mut self) -> Option<u64> {
        let mut ahead = Reader(self.0);
        let count = match ahead.uint(1)? {
            marker @ 0x80..=0x8f => marker & 0x0f,
            0xde => ahead.uint(2)?,
            0xdf => ahead.uint(4)?,
            _ => return None,
        };
        *self = ahead;
        Some(count)
    }

    /// Counts what is left instead of recursing, so that nesting cannot exhaust the stack.
    fn value(&mut self) -> Option<Value<'a>> {
        let (value, mut pending) = self.item()?;
        while pending > 0 {
            pending += self.item()?.1;
            pending -= 1;
        }
        Some(value)
    }

    fn item(&mut self) -> Option<(Value<'a>, u64)> {
        if let Some(pairs) = self.map_header() {
            return Some((Value::Other, 2 * pairs));
        }
        let marker = self.uint(1)?;
        Some(match marker {
            0x00..=0x7f => (Value::Int(marker.into()), 0),
            0x90..=0x9f => (Value::Other, marker & 0x0f),
            0xa0..=0xbf => (self.str(marker & 0x1f)?, 0),
            0xc0 | 0xc2 | 0xc3 => (Value::Other, 0),
            0xc4..=0xc6 => (self.uint(1 << (marker - 0xc4)).and_then(|length| self.take(length)).map(Value::Bin)?, 0),
            0xca => (self.take(4).map(|_| Value::Other)?, 0),
            0xcb => (self.take(8).map(|_| Value::Other)?, 0),
            0xcc..=0xcf => (Value::Int(self.uint(1 << (marker - 0xcc))?.into()), 0),
            0xd0..=0xd3 => (self.int(1 << (marker - 0xd0))?, 0),
            0xd9..=0xdb => (self.uint(1 << (marker - 0xd9)).and_then(|length| self.str(length))?, 0),
            0xdc => (Value::Other, self.uint(2)?),
            0xdd => (Value::Other, self.uint(4)?),
            0xe0..=0xff => (Value::Int(i128::from(marker) - 256), 0),
            _ => return None,
        })
    }

    fn str(&mut self, length: u64) -> Option<Value<'a>> {
        str::from_utf8(self.take(length)?).ok().map(Value::Str)
    }

    fn int(&mut self, width: u64) -> Option<Value<'a>> {
        let unused = 64 - 8 * width as u32;
        Some(Value::Int((((self.uint(width)? << unused) as i64) >> unused).into()))
    }

    fn uint(&mut self, width: u64) -> Option<u64> {
        Some(self.take(width)?.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

/// A frame whose payload is a map of at most 15 fields with binary keys.
pub fn encode(kind: u8, fields: &[(&str, Value<'_>)]) -> Vec<u8> {
    let mut payload = vec![0x80 | fields.len() as u8];
    for (key, value) in fields {
        put_bin(&mut payload, key.as_bytes());
        match value {
            Value::Int(number) => put_int(&mut payload, *number),
            Value::Bin(bytes) => put_bin(&mut payload, bytes),
            Value::Str(text) => put_str(&mut payload, text),
            Value::Other => payload.push(0xc0),
        }
    }
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

fn put_int(out: &mut Vec<u8>, number: i128) {
    match number {
        -32..=0x7f => out.push(number as u8),
        0x80..=0xff => out.extend([0xcc, number as u8]),
        0x100..=0xffff => {
            out.push(0xcd);
            out.extend((number as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(0xce);
            out.extend((number as u32).to_be_bytes());
        }
        0x1_0000_0000.. => {
            out.push(0xcf);
            out.extend((number as u64).to_be_bytes());
        }
        -0x80..-32 => out.extend([0xd0, number as u8]),
        -0x8000..-0x80 => {
            out.push(0xd1);
            out.extend((number as i16).to_be_bytes());
        }
        -0x8000_0000..-0x8000 => {
            out.push(0xd2);
            out.extend((number as i32).to_be_bytes());
        }
        _ => {
            out.push(0xd3);
            out.extend((number as i64).to_be_bytes());
        }
    }
}

fn put_bin(out: &mut Vec<u8>, bytes: &[u8]) {
    match bytes.len() {
        length @ 0..=0xff => out.extend([0xc4, length as u8]),
        length @ 0x100..=0xffff => {
            out.push(0xc5);
            out.extend((length as u16).to_be_bytes());
        }
        length => {
            out.push(0xc6);
            out.extend((length as u32).to_be_bytes());
        }
    }
    out.extend(bytes);
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    match text.len() {
        length @ 0..=0x1f => out.push(0xa0 | length as u8),
        length @ 0x20..=0xff => out.extend([0xd9, length as u8]),
        length @ 0x100..=0xffff => {
            out.push(0xda);
            out.extend((length as u16).to_be_bytes());
        }
        length => {
            out.push(0xdb);
            out.extend((length as u32).to_be_bytes());
        }
    }
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn fields_survive_a_round_trip() {
        let long = "x".repeat(300);
        let numbers =
            [0, 127, 128, 65_535, 65_536, u64::MAX.into(), -1, -32, -33, -128, -129, -32_769, i64::MIN.into()];
        for number in numbers {
            let bytes = encode(
                kind::PING,
                &[("n", Value::Int(number)), ("b", Value::Bin(&[7; 256])), ("s", Value::Str(&long))],
            );
            let frame = decode(&bytes).unwrap();
            assert_eq!(frame.field("n"), Some(Value::Int(number)));
            assert_eq!(frame.field("b"), Some(Value::Bin(&[7; 256])));
            assert_eq!(frame.field("s"), Some(Value::Str(&long)));
            assert_eq!((frame.kind, frame.extra), (kind::PING, 0));
        }
    }

    #[test]
    fn a_store_has_the_size_asked_for() {
        assert!(store_of_size(13).is_err());
        for size in [14, 128, 269, 270, 271, 65_549, 65_550, 65_551, 65_552, 65_553, 100_000] {
            let bytes = store_of_size(size).unwrap();
            assert_eq!(bytes.len(), size);
            assert!(matches!(decode(&bytes).unwrap().field("v"), Some(Value::Bin(_))), "{size}");
        }
    }

    #[test]
    fn what_is_no_frame_is_told_apart() {
        let ping = encode(kind::PING, &[("timestamp", Value::Int(1))]);
        assert_eq!(decode(&ping[..ping.len() - 1]).unwrap_err(), Fault::Incomplete);
        assert_eq!(decode(&ping[..5]).unwrap_err(), Fault::Incomplete);
        assert_eq!(decode(&[&ping[..], &ping[..]].concat()).unwrap().extra, ping.len());
        assert_eq!(decode(&frame(0x99, &[0x80])).unwrap_err(), Fault::Invalid);
        assert_eq!(decode(&frame(kind::PING, &[0x80, 0x80])).unwrap_err(), Fault::Invalid);
        assert_eq!(decode(&frame(kind::PING, &[0x81, 0x01, 0xd4, 0, 0])).unwrap_err(), Fault::Invalid);
        assert!(decode(&frame(kind::PING, &[0x93, 1, 0x92, 2, 3, 0x81, 4, 5])).unwrap().fields.is_empty());
    }
}
