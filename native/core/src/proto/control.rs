//! The messages of a control stream, between a node and its relay.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use bytes::Bytes;
use macula_peer_wire::{Limits, MessageType, PayloadError, RawFrame};
use serde::Deserialize;

use super::map::{BadField, Binary, Map, MapWriter};
use crate::nat::{Allocation, Filtering, Mapping, NatProfile};
use crate::proto::signal::{Role, SECRET_LEN, Secret};
use crate::types::Fingerprint;

/// The longest message and the deepest nesting: several times what the longest of today needs, so that later ones may
/// say more.
pub const LIMITS: Limits = Limits { max_frame: 4096, max_depth: 8, max_terms: 4096 };

/// The type id of the empty frame that a control stream begins with.
pub const OPENER: u8 = 0xF2;

const VERSION: u64 = 1;

/// Bytes of successions in one message.
pub const MAX_SUCCESSIONS_LEN: usize = 3072;

/// Length of a node's proof that it knows the realm's secret.
pub const PROOF_LEN: usize = 32;

/// A node's name, or what the requester calls a circuit until it has one: 1 to 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Id(Bytes);

impl Id {
    pub const MAX_LEN: usize = 255;

    pub fn new(bytes: impl Into<Bytes>) -> Option<Self> {
        let bytes = bytes.into();
        (1..=Self::MAX_LEN).contains(&bytes.len()).then_some(Self(bytes))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Binary<'_> for Id {
    fn to_binary(&self) -> Cow<'_, [u8]> {
        self.as_bytes().into()
    }

    fn from_binary(bytes: &[u8]) -> Option<Self> {
        Self::new(Bytes::copy_from_slice(bytes))
    }
}

/// What a node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromNode {
    /// Always the first.
    Connect { node_id: Id, proof: Option<[u8; PROOF_LEN]>, successions: Vec<Bytes> },
    /// Asks for a circuit.
    RelayRequest { session_id: Id, target_id: Id },
    /// Ends a circuit.
    Disconnect { circuit: u32, reason: Reason },
    /// The NAT that the node is behind, and its local addresses. Again whenever they change.
    Describe { profile: NatProfile, candidates: Vec<SocketAddr> },
    /// Asks for a direct path.
    PunchRequest { session_id: Id, target_id: Id },
    /// Ports that the node's NAT is about to give, the likeliest first.
    PunchExecute { session_id: Id, ports: Vec<u16> },
    /// The node's attempt is over.
    PunchResult { session_id: Id, result: Result<(), PunchFailure> },
}

/// What a relay says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromRelay {
    /// The node is registered, and is seen at this address. Said again when the address changes.
    Registered { address: SocketAddr, probes: Option<Probes> },
    /// The node is not registered, or no longer: nothing follows.
    Refused { error: Refusal },
    /// The requested circuit.
    Opened { session_id: Id, circuit: u32 },
    /// Why there is no circuit.
    NotOpened { session_id: Id, error: Refusal },
    /// A circuit has ended.
    Disconnect { circuit: u32, reason: Reason },
    /// Packets of the circuit were dropped.
    Dropped { circuit: u32, limit: Limit },
    /// Another node and this one are to find a direct path.
    PunchCoordinate(Box<Coordinate>),
    /// Ports that the other node's NAT is about to give.
    PunchExecute { session_id: Id, ports: Vec<u16> },
    /// Why there is no attempt to find a direct path.
    NotPunched { session_id: Id, error: Refusal },
    /// The other node's attempt is over, and so is the session.
    PunchResult { session_id: Id, result: Result<(), PunchFailure> },
}

/// What one of two nodes needs to know to find a direct path to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordinate {
    pub session_id: Id,
    pub role: Role,
    /// The other node.
    pub peer_id: Id,
    pub key: Fingerprint,
    /// Where the relay sees it.
    pub address: SocketAddr,
    pub profile: NatProfile,
    /// Its local addresses, where the two may be in one network.
    pub candidates: Vec<SocketAddr>,
    /// What signals between the two are authenticated with.
    pub secret: [u8; SECRET_LEN],
    /// After which both begin.
    pub delay: Duration,
}

/// How a node probes its relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probes {
    /// Of the node's signals to the relay, and the relay's to the node.
    pub id: u64,
    pub secret: Secret,
    /// The relay's second port.
    pub port: u16,
    /// The relay's second address, which has that port too.
    pub ip: Option<IpAddr>,
}

/// Texts that the protocol lists, and an unknown one for those of later versions.
macro_rules! names {
    ($(#[$doc:meta])* $vis:vis $type:ident { $($(#[$variant_doc:meta])* $variant:ident $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        $vis enum $type {
            $($(#[$variant_doc])* $variant,)*
            /// One that this version does not know.
            Unknown,
        }

        impl $type {
            /// Every one that has a name of its own.
            $vis const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// Its name in the protocol.
            $vis fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Unknown => "unknown",
                }
            }

        }

        impl Binary<'_> for $type {
            fn to_binary(&self) -> Cow<'_, [u8]> {
                self.name().as_bytes().into()
            }

            fn from_binary(name: &[u8]) -> Option<Self> {
                Some(Self::ALL.into_iter().find(|known| known.name().as_bytes() == name).unwrap_or(Self::Unknown))
            }
        }
    };
}

names! {
    /// Why a relay refuses a request.
    pub Refusal {
        /// Another key has the node id, or had it a short time ago.
        NodeIdTaken "node_id_taken",
        /// The proof is missing or wrong.
        Realm "realm",
        /// As many nodes are registered as may be.
        Registrations "registrations",
        /// The node's key has its share of the names.
        RegistrationsPerKey "registrations_per_key",
        /// The node's address has its share of the names.
        RegistrationsPerAddress "registrations_per_address",
        /// Too many registrations came at once.
        AcceptRate "accept_rate",
        /// Too many registrations of the node's key came at once.
        AcceptRatePerKey "accept_rate_per_key",
        /// Too many registrations from the node's address came at once.
        AcceptRatePerAddress "accept_rate_per_address",
        /// There is no such target.
        NotRegistered "not_registered",
        /// As many circuits exist as may.
        Sessions "sessions",
        /// The node that asks has opened as many circuits as it may, or as many lead to the target.
        SessionsPerNode "sessions_per_node",
        /// The key of the node that asks has its share of the circuits, of all or of those to the target.
        SessionsPerKey "sessions_per_key",
        /// The address of the node that asks has its share of them.
        SessionsPerAddress "sessions_per_address",
        /// The target has just registered, and will soon know what NAT it is behind.
        NotReady "not_ready",
        /// The two have been asked to find a direct path already.
        InProgress "in_progress",
        /// One of the two is seen at an IPv4 address, the other at an IPv6 address.
        AddressFamily "address_family",
        /// The node asked too often.
        RequestRate "request_rate",
        /// The message could not be read, or had no place where it came.
        Malformed "malformed",
        /// Another connection with the node's key has taken its registration over.
        TakenOver "taken_over",
        /// The relay's operator refuses the node.
        Denied "denied",
        /// It could not be found out whether the relay wants the node.
        Undecided "undecided",
        /// The relay's operator has kicked the node, and it may return later.
        Kicked "kicked",
    }
}

names! {
    /// Why an attempt to find a direct path failed, as nodes tell each other.
    pub PunchFailure {
        /// The node's settings allow no hole punching, or not as many packets as it would take.
        NotAllowed "not_allowed",
        /// Neither NAT gives ports that the other side could know.
        BothHard "both_hard",
        /// Nothing came through.
        TimedOut "timeout",
        /// The node has reached its limit of attempts.
        Busy "busy",
        /// The node's socket has moved.
        Interrupted "interrupted",
        /// The node no longer needs the path.
        Unwanted "unwanted",
    }
}

names! {
    /// Why a circuit ended.
    pub Reason {
        /// The other side's registration ended.
        Gone "gone",
        /// Nothing was carried for long.
        Idle "idle",
        /// The other side ended it.
        Closed "closed",
    }
}

names! {
    /// Why packets were dropped.
    pub Limit {
        /// Bytes per second of the circuit.
        Bandwidth "bandwidth",
        /// Bytes that wait to be sent to the receiving node.
        PacketQueue "packet_queue",
        /// Length of a packet.
        PacketSize "packet_size",
    }
}

/// Why a frame is no control message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    #[error("a control message of {0} bytes")]
    TooLarge(usize),
    #[error("a message of type {0:#04x} on a control stream")]
    Type(u8),
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error("a control message that is no map")]
    NotAMap,
    /// The field is missing where it must be, or is not what it must be.
    #[error("a control message with a bad field {0}")]
    Field(&'static str),
}

impl From<BadField> for ControlError {
    fn from(BadField(field): BadField) -> Self {
        Self::Field(field)
    }
}

impl FromNode {
    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let map = MapWriter::default();
        match self {
            Self::Connect { node_id, proof, successions } => {
                let map = map.value("version", &VERSION).bin("node_id", node_id);
                let map = map.bin("realm_id", &Bytes::new()).value("capabilities", &[(); 0]);
                let map = map.optional_bin("proof", proof.as_ref());
                let map = if successions.is_empty() { map } else { map.bins("successions", successions) };
                map.frame(MessageType::Connect)
            }
            Self::RelayRequest { session_id, target_id } => {
                map.bin("session_id", session_id).bin("target_id", target_id).frame(MessageType::RelayRequest)
            }
            Self::Disconnect { circuit, reason } => disconnect(*circuit, *reason),
            Self::Describe { profile, candidates } => {
                nat(map, profile).bins("candidates", candidates).frame(MessageType::Cast)
            }
            Self::PunchRequest { session_id, target_id } => {
                map.bin("session_id", session_id).bin("target_id", target_id).frame(MessageType::PunchRequest)
            }
            Self::PunchExecute { session_id, ports } => {
                map.bin("session_id", session_id).value("ports", ports).frame(MessageType::PunchExecute)
            }
            Self::PunchResult { session_id, result } => punch_result(session_id, *result),
        }
    }

    pub fn decode(frame: &RawFrame) -> Result<Self, ControlError> {
        let map = &read(frame)?;
        Ok(match MessageType::from_id(frame.type_id()) {
            Some(MessageType::Connect) => {
                if map.value::<u64>("version")? != VERSION {
                    return Err(ControlError::Field("version"));
                }
                let proof = map.optional_bin("proof")?;
                let successions = if map.has("successions") { map.bins("successions")? } else { Vec::new() };
                Self::Connect { node_id: map.bin("node_id")?, proof, successions }
            }
            Some(MessageType::RelayRequest) => {
                Self::RelayRequest { session_id: map.bin("session_id")?, target_id: map.bin("target_id")? }
            }
            Some(MessageType::Disconnect) => Self::Disconnect { circuit: map.value("circuit")?, reason: reason(map)? },
            Some(MessageType::Cast) => Self::Describe { profile: read_nat(map)?, candidates: map.bins("candidates")? },
            Some(MessageType::PunchRequest) => {
                Self::PunchRequest { session_id: map.bin("session_id")?, target_id: map.bin("target_id")? }
            }
            Some(MessageType::PunchExecute) => {
                Self::PunchExecute { session_id: map.bin("session_id")?, ports: map.list("ports")? }
            }
            Some(MessageType::PunchResult) => {
                Self::PunchResult { session_id: map.bin("session_id")?, result: read_punch_result(map)? }
            }
            _ => return Err(ControlError::Type(frame.type_id())),
        })
    }
}

impl FromRelay {
    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let map = MapWriter::default();
        match self {
            Self::Registered { address, probes } => {
                let map = map.bin("address", address);
                let map = match probes {
                    Some(probes) => probes.write(map),
                    None => map,
                };
                map.frame(MessageType::Reply)
            }
            Self::Refused { error } => map.bin("error", error).frame(MessageType::Reply),
            Self::Opened { session_id, circuit } => {
                map.bin("session_id", session_id).value("circuit", circuit).frame(MessageType::Reply)
            }
            Self::NotOpened { session_id, error } => {
                map.bin("session_id", session_id).bin("error", error).frame(MessageType::Reply)
            }
            Self::Disconnect { circuit, reason } => disconnect(*circuit, *reason),
            Self::Dropped { circuit, limit } => {
                map.bin("limit", limit).value("circuit", circuit).frame(MessageType::Cast)
            }
            Self::PunchCoordinate(coordinate) => coordinate.encode(),
            Self::PunchExecute { session_id, ports } => {
                map.bin("session_id", session_id).value("ports", ports).frame(MessageType::PunchExecute)
            }
            Self::NotPunched { session_id, error } => {
                map.bin("session_id", session_id).bin("error", error).frame(MessageType::PunchResult)
            }
            Self::PunchResult { session_id, result } => punch_result(session_id, *result),
        }
    }

    pub fn decode(frame: &RawFrame) -> Result<Self, ControlError> {
        let map = &read(frame)?;
        Ok(match MessageType::from_id(frame.type_id()) {
            Some(MessageType::Reply) => return Self::reply(map),
            Some(MessageType::Disconnect) => Self::Disconnect { circuit: map.value("circuit")?, reason: reason(map)? },
            Some(MessageType::Cast) => Self::Dropped { circuit: map.value("circuit")?, limit: map.bin("limit")? },
            Some(MessageType::PunchCoordinate) => Self::PunchCoordinate(Box::new(Coordinate::read(map)?)),
            Some(MessageType::PunchExecute) => {
                Self::PunchExecute { session_id: map.bin("session_id")?, ports: map.list("ports")? }
            }
            Some(MessageType::PunchResult) if map.has("success") => {
                Self::PunchResult { session_id: map.bin("session_id")?, result: read_punch_result(map)? }
            }
            Some(MessageType::PunchResult) => {
                Self::NotPunched { session_id: map.bin("session_id")?, error: map.bin("error")? }
            }
            _ => return Err(ControlError::Type(frame.type_id())),
        })
    }

    fn reply(map: &Map<'_>) -> Result<Self, ControlError> {
        Ok(match (map.optional_bin("session_id")?, map.optional_bin("error")?) {
            (Some(session_id), Some(error)) => Self::NotOpened { session_id, error },
            (Some(session_id), None) => Self::Opened { session_id, circuit: map.value("circuit")? },
            (None, Some(error)) => Self::Refused { error },
            (None, None) => Self::Registered { address: map.bin("address")?, probes: Probes::read(map)? },
        })
    }
}

impl Coordinate {
    /// With the original's fields, and those that it lacks.
    fn encode(&self) -> Bytes {
        let map = MapWriter::default()
            .bin("session_id", &self.session_id)
            .bin("peer_id", &self.peer_id)
            .bin("peer_host", &self.address.ip())
            .value("peer_ports", &[self.address.port()])
            .bin("role", &self.role)
            .bin("key", self.key.as_bytes())
            .bin("secret", &self.secret)
            .value("delay", &(self.delay.as_millis() as u64))
            .bins("candidates", &self.candidates);
        nat(map, &self.profile).frame(MessageType::PunchCoordinate)
    }

    fn read(map: &Map<'_>) -> Result<Self, ControlError> {
        let host: IpAddr = map.bin("peer_host")?;
        let port: u16 = map.list("peer_ports")?.first().copied().ok_or(ControlError::Field("peer_host"))?;
        Ok(Self {
            session_id: map.bin("session_id")?,
            role: map.bin("role")?,
            peer_id: map.bin("peer_id")?,
            key: map.bin::<[u8; _]>("key")?.into(),
            address: (host, port).into(),
            profile: read_nat(map)?,
            candidates: map.bins("candidates")?,
            secret: map.bin("secret")?,
            delay: Duration::from_millis(map.value("delay")?),
        })
    }
}

impl Probes {
    fn write(&self, map: MapWriter) -> MapWriter {
        map.bin("probe_id", &self.id.to_be_bytes())
            .bin("probe_secret", self.secret.as_bytes())
            .value("probe_port", &self.port)
            .optional_bin("probe_ip", self.ip.as_ref())
    }

    /// A relay that names no id offers none.
    fn read(map: &Map<'_>) -> Result<Option<Self>, ControlError> {
        let Some(id) = map.optional_bin("probe_id")? else { return Ok(None) };
        Ok(Some(Self {
            id: u64::from_be_bytes(id),
            secret: map.bin::<[u8; _]>("probe_secret")?.into(),
            port: map.value::<NonZeroU16>("probe_port")?.get(),
            ip: map.optional_bin("probe_ip")?,
        }))
    }
}

impl Binary<'_> for Role {
    fn to_binary(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Initiator => b"initiator".into(),
            Self::Responder => b"responder".into(),
        }
    }

    fn from_binary(name: &[u8]) -> Option<Self> {
        [Self::Initiator, Self::Responder].into_iter().find(|role| *role.to_binary() == *name)
    }
}

fn read(frame: &RawFrame) -> Result<Map<'_>, ControlError> {
    let len = frame.bytes().len();
    if len > LIMITS.max_frame {
        return Err(ControlError::TooLarge(len));
    }
    Map::split(frame.payload(), LIMITS)?.ok_or(ControlError::NotAMap)
}

fn punch_result(session_id: &Id, result: Result<(), PunchFailure>) -> Bytes {
    let map = MapWriter::default().bin("session_id", session_id).value("success", &result.is_ok());
    map.optional_bin("error", result.err().as_ref()).frame(MessageType::PunchResult)
}

fn read_punch_result(map: &Map<'_>) -> Result<Result<(), PunchFailure>, ControlError> {
    Ok(match map.value("success")? {
        true => Ok(()),
        false => Err(map.optional_bin("error")?.unwrap_or(PunchFailure::Unknown)),
    })
}

/// What is not known is left out.
fn nat(map: MapWriter, profile: &NatProfile) -> MapWriter {
    let name = |name: &'static str| Bytes::from_static(name.as_bytes());
    let map = map
        .optional_bin("mapping", profile.mapping.map(|mapping| name(mapping.name())).as_ref())
        .optional_bin("filtering", profile.filtering.map(|filtering| name(filtering.name())).as_ref())
        .optional_bin("allocation", profile.allocation.map(|allocation| name(allocation.name())).as_ref());
    match profile.allocation.and_then(Allocation::step) {
        Some(step) => map.value("step", &step),
        None => map,
    }
}

/// Any integer. One that does not fit counts as none.
#[derive(Deserialize)]
#[serde(untagged)]
enum Step {
    Fits(i16),
    Low(#[expect(dead_code, reason = "only its type counts")] i64),
    High(#[expect(dead_code, reason = "only its type counts")] u64),
}

/// Names that this version does not know count as none.
fn read_nat(map: &Map<'_>) -> Result<NatProfile, ControlError> {
    let name = |key| map.optional_bin::<&[u8]>(key);
    let step = if map.has("step") { Some(map.value("step")?) } else { None };
    let step = if let Some(Step::Fits(step)) = step { Some(step) } else { None };
    Ok(NatProfile {
        mapping: name("mapping")?.and_then(Mapping::from_name),
        filtering: name("filtering")?.and_then(Filtering::from_name),
        allocation: name("allocation")?.and_then(|name| Allocation::from_name(name, step)),
    })
}

fn disconnect(circuit: u32, reason: Reason) -> Bytes {
    let said = match reason {
        Reason::Gone => "the other side's registration ended",
        Reason::Idle => "the circuit carried nothing for long",
        Reason::Closed => "the other side ended the circuit",
        Reason::Unknown => "",
    };
    let map = MapWriter::default().bin("reason", &reason).bin("message", &said.as_bytes());
    map.value("circuit", &circuit).frame(MessageType::Disconnect)
}

fn reason(map: &Map<'_>) -> Result<Reason, ControlError> {
    map.bin::<&[u8]>("message")?;
    Ok(map.bin("reason")?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fmt::Debug;

    use bytes::BytesMut;
    use macula_peer_wire::{HEADER_LEN, Reassembler};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rmpv::Value;

    use super::super::map::MAX_LISTED;
    use super::*;

    fn raw(frame: &Bytes) -> RawFrame {
        let mut frames = Reassembler::new(Limits::default());
        frames.push(frame.clone());
        frames.next_frame().unwrap().unwrap()
    }

    fn of(type_id: u8, payload: &[u8]) -> RawFrame {
        let mut frame = BytesMut::new();
        crate::proto::session::put_header(&mut frame, type_id, payload.len());
        frame.extend_from_slice(payload);
        raw(&frame.freeze())
    }

    fn made(ty: MessageType, pairs: Vec<(Value, Value)>) -> RawFrame {
        let mut payload = Vec::new();
        rmpv::encode::write_value(&mut payload, &Value::Map(pairs)).unwrap();
        of(ty.id(), &payload)
    }

    fn text(text: &str) -> Value {
        Value::Binary(text.into())
    }

    fn field(key: &str, value: Value) -> (Value, Value) {
        (text(key), value)
    }

    fn some_id(bytes: &'static [u8]) -> Id {
        Id::new(bytes).unwrap()
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn sequential(step: i16) -> NatProfile {
        NatProfile {
            mapping: Some(Mapping::PortDependent),
            filtering: Some(Filtering::HostDependent),
            allocation: Some(Allocation::Contiguous(step)),
        }
    }

    fn from_node() -> Vec<FromNode> {
        vec![
            FromNode::Connect { node_id: some_id(b"a"), proof: None, successions: Vec::new() },
            FromNode::Connect {
                node_id: Id::new(vec![255; 255]).unwrap(),
                proof: Some([7; PROOF_LEN]),
                successions: vec![vec![1; MAX_SUCCESSIONS_LEN - 1].into(), vec![2].into()],
            },
            FromNode::RelayRequest { session_id: some_id(b"\0"), target_id: Id::new(vec![1; 255]).unwrap() },
            FromNode::Disconnect { circuit: u32::MAX, reason: Reason::Closed },
            FromNode::Describe { profile: NatProfile::default(), candidates: Vec::new() },
            FromNode::Describe { profile: sequential(-3), candidates: vec![address("10.0.0.1:9443"); MAX_LISTED] },
            FromNode::PunchRequest { session_id: some_id(b"s"), target_id: some_id(b"b") },
            FromNode::PunchExecute { session_id: some_id(b"s"), ports: vec![u16::MAX; MAX_LISTED] },
            FromNode::PunchResult { session_id: some_id(b"s"), result: Ok(()) },
            FromNode::PunchResult { session_id: some_id(b"s"), result: Err(PunchFailure::NotAllowed) },
        ]
    }

    fn probes(ip: Option<IpAddr>) -> Probes {
        Probes { id: u64::MAX - 1, secret: [9; SECRET_LEN].into(), port: 65535, ip }
    }

    fn from_relay() -> Vec<FromRelay> {
        vec![
            FromRelay::Registered { address: "[2001:db8::1]:9443".parse().unwrap(), probes: None },
            FromRelay::Registered { address: "127.0.0.1:1".parse().unwrap(), probes: Some(probes(None)) },
            FromRelay::Registered {
                address: "127.0.0.1:1".parse().unwrap(),
                probes: Some(probes(Some("2001:db8::2".parse().unwrap()))),
            },
            FromRelay::Refused { error: Refusal::NodeIdTaken },
            FromRelay::Opened { session_id: some_id(b"s"), circuit: 0 },
            FromRelay::NotOpened { session_id: some_id(b"s"), error: Refusal::SessionsPerNode },
            FromRelay::Disconnect { circuit: 1, reason: Reason::Gone },
            FromRelay::Dropped { circuit: 1, limit: Limit::PacketSize },
            FromRelay::PunchCoordinate(Box::new(Coordinate {
                session_id: Id::new(vec![1; 255]).unwrap(),
                role: Role::Responder,
                peer_id: Id::new(vec![2; 255]).unwrap(),
                key: [3; 32].into(),
                address: address("[2001:db8::1]:9443"),
                profile: sequential(2),
                candidates: vec![address("[fd00:1111:2222:3333:4444:5555:6666:7777]:65535"); MAX_LISTED],
                secret: [4; SECRET_LEN],
                delay: Duration::from_millis(40),
            })),
            FromRelay::PunchExecute { session_id: some_id(b"s"), ports: vec![1] },
            FromRelay::NotPunched { session_id: some_id(b"s"), error: Refusal::InProgress },
            FromRelay::PunchResult { session_id: some_id(b"s"), result: Ok(()) },
            FromRelay::PunchResult { session_id: some_id(b"s"), result: Err(PunchFailure::Busy) },
        ]
    }

    #[test]
    fn messages_come_back_as_they_were() {
        for message in from_node() {
            assert_eq!(FromNode::decode(&raw(&message.encode())), Ok(message));
        }
        for message in from_relay() {
            assert_eq!(FromRelay::decode(&raw(&message.encode())), Ok(message));
        }
    }

    /// The vectors were recorded from an implementation of its own, which read and wrote MessagePack by hand.
    #[test]
    fn every_vector_is_written_and_read_as_recorded() {
        for vector in include_str!("../../../../test/vectors/control.tsv").lines() {
            let [side, what, hex, result] = vector.split('\t').collect::<Vec<_>>()[..] else { panic!("{vector}") };
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            let frame: Bytes = (0..hex.len()).step_by(2).map(byte).collect();
            match side {
                "node" => check(FromNode::decode(&raw(&frame)), FromNode::encode, what, &frame, result),
                _ => check(FromRelay::decode(&raw(&frame)), FromRelay::encode, what, &frame, result),
            }
        }
    }

    fn check<T: Debug>(
        read: Result<T, ControlError>,
        encode: fn(&T) -> Bytes,
        what: &str,
        frame: &Bytes,
        expected: &str,
    ) {
        if what == "said" {
            let message = read.unwrap();
            assert_eq!((format!("{message:?}").as_str(), encode(&message)), (expected, frame.clone()));
        } else {
            assert_eq!(format!("{read:?}"), expected, "{frame:?}");
        }
    }

    #[test]
    fn a_side_refuses_messages_that_only_the_other_may_send() {
        for message in &from_node()[..3] {
            let frame = raw(&message.encode());
            assert_eq!(FromRelay::decode(&frame), Err(ControlError::Type(frame.type_id())));
        }
        let frame = raw(&from_relay()[0].encode());
        assert_eq!(FromNode::decode(&frame), Err(ControlError::Type(frame.type_id())));
    }

    #[test]
    fn every_name_is_the_protocols() {
        let document = include_str!("../../../../docs/protocol.md");
        let refusals = Refusal::ALL.map(Refusal::name);
        let reasons = Reason::ALL.map(Reason::name);
        let limits = Limit::ALL.map(Limit::name);
        let failures = PunchFailure::ALL.map(PunchFailure::name);
        for name in refusals.iter().chain(&reasons).chain(&limits).chain(&failures) {
            assert!(document.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn a_connect_without_a_proper_node_id_version_or_proof_is_refused() {
        let version = || field("version", Value::from(1));
        let node_id = || field("node_id", text("a"));
        let refused = |field, pairs| {
            let decoded = FromNode::decode(&made(MessageType::Connect, pairs));
            assert_eq!(decoded, Err(ControlError::Field(field)));
        };
        refused("version", vec![node_id()]);
        refused("version", vec![node_id(), field("version", Value::from(2))]);
        refused("node_id", vec![version()]);
        refused("node_id", vec![version(), field("node_id", text(""))]);
        refused("node_id", vec![version(), field("node_id", Value::Binary(vec![0; 256]))]);
        refused("node_id", vec![version(), field("node_id", "a".into())]);
        refused("proof", vec![version(), node_id(), field("proof", Value::Binary(vec![0; 31]))]);
        refused("proof", vec![version(), node_id(), field("proof", Value::Nil)]);
        for wrong in
            [Value::Nil, Value::Array(vec![Value::Nil]), Value::Array(vec![Value::Binary(vec![1]); MAX_LISTED + 1])]
        {
            refused("successions", vec![version(), node_id(), field("successions", wrong)]);
        }
    }

    #[test]
    fn unknown_fields_do_no_harm_and_unknown_names_have_their_place() {
        let pairs = vec![
            (Value::from(1), Value::Nil),
            field("node_id", text("old")),
            field("more", Value::Array(vec![Value::Nil])),
            field("node_id", text("new")),
            field("version", Value::from(1)),
        ];
        let expected = FromNode::Connect { node_id: some_id(b"new"), proof: None, successions: Vec::new() };
        assert_eq!(FromNode::decode(&made(MessageType::Connect, pairs)), Ok(expected));

        let refused = made(MessageType::Reply, vec![field("error", text("full_moon"))]);
        assert_eq!(FromRelay::decode(&refused), Ok(FromRelay::Refused { error: Refusal::Unknown }));
    }

    #[test]
    fn a_relay_that_offers_probes_says_all_of_it() {
        let all = || {
            vec![
                field("probe_id", Value::Binary(vec![1; 8])),
                field("probe_secret", Value::Binary(vec![1; SECRET_LEN])),
                field("probe_port", Value::from(9)),
                field("probe_ip", text("192.0.2.1")),
                field("address", text("127.0.0.1:1")),
            ]
        };
        let decode = |pairs| FromRelay::decode(&made(MessageType::Reply, pairs));
        let Ok(FromRelay::Registered { probes: Some(probes), .. }) = decode(all()) else { panic!("probes") };
        assert_eq!((probes.id, probes.port), (0x0101010101010101, 9));
        for (name, wrong) in [
            ("probe_id", Value::Binary(vec![1; 7])),
            ("probe_secret", Value::Binary(vec![1; 31])),
            ("probe_port", Value::from(0)),
            ("probe_port", Value::from(65536)),
            ("probe_ip", text("localhost")),
        ] {
            let pairs = all().into_iter().chain([field(name, wrong)]).collect();
            assert_eq!(decode(pairs), Err(ControlError::Field(name)));
        }
        for missing in ["probe_secret", "probe_port"] {
            let pairs = all().into_iter().filter(|(key, _)| *key != text(missing)).collect();
            assert_eq!(decode(pairs), Err(ControlError::Field(missing)));
        }
    }

    #[test]
    fn numbers_addresses_and_sizes_are_bounded() {
        let pairs = |circuit: u64| {
            vec![field("reason", text("idle")), field("message", text("")), field("circuit", Value::from(circuit))]
        };
        let decode = |circuit| FromNode::decode(&made(MessageType::Disconnect, pairs(circuit)));
        assert_eq!(decode(u32::MAX.into()), Ok(FromNode::Disconnect { circuit: u32::MAX, reason: Reason::Idle }));
        assert_eq!(decode(1 << 32), Err(ControlError::Field("circuit")));

        for address in ["localhost:1", "127.0.0.1", "127.0.0.1:70000", ""] {
            let reply = made(MessageType::Reply, vec![field("address", text(address))]);
            assert_eq!(FromRelay::decode(&reply), Err(ControlError::Field("address")), "{address}");
        }

        let large = of(MessageType::Reply.id(), &[0; 5000]);
        assert_eq!(FromRelay::decode(&large), Err(ControlError::TooLarge(5008)));
        assert_eq!(FromNode::decode(&large), Err(ControlError::TooLarge(5008)));
        let nil = of(MessageType::Reply.id(), &[0xC0]);
        assert_eq!(FromRelay::decode(&nil), Err(ControlError::NotAMap));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_decoded_to_an_encodable_message(
            ty in prop::sample::select(vec![0x01, 0x02, 0x21, 0x22, 0x56, 0xF2, 0x00]),
            payload in vec(any::<u8>(), 0..256),
        ) {
            decoded_or_refused(&of(ty, &payload));
        }

        #[test]
        fn mutated_messages_are_decoded_or_refused(
            which in any::<prop::sample::Index>(),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut all: Vec<_> = from_node().iter().map(FromNode::encode).collect();
            all.extend(from_relay().iter().map(FromRelay::encode));
            let mut frame = which.get(&all).to_vec();
            for (at, byte) in changes {
                let at = HEADER_LEN + at.index(frame.len() - HEADER_LEN);
                frame[at] = byte;
            }
            decoded_or_refused(&raw(&frame.into()));
        }
    }

    fn decoded_or_refused(frame: &RawFrame) {
        if let Ok(message) = FromNode::decode(frame) {
            assert_eq!(FromNode::decode(&raw(&message.encode())), Ok(message));
        }
        if let Ok(message) = FromRelay::decode(frame) {
            assert_eq!(FromRelay::decode(&raw(&message.encode())), Ok(message));
        }
    }
}
