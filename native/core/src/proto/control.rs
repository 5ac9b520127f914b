//! The messages of a control stream, between a node and its relay.

use std::net::{IpAddr, SocketAddr};
use std::str;
use std::time::Duration;

use bytes::Bytes;
use macula_peer_wire::value::{Value, ValueBuilder, encode};
use macula_peer_wire::{Limits, MessageType, PayloadError, RawFrame, decode_payload};

use crate::nat::{Allocation, Filtering, Mapping, NatProfile};
use crate::proto::signal::{SECRET_LEN, Secret};
use crate::punch::Role;
use crate::types::Fingerprint;

/// The longest message and the deepest nesting: several times what the longest of today needs, so that later ones may
/// say more.
pub const LIMITS: Limits = Limits { max_frame: 4096, max_depth: 8, max_terms: 4096 };

/// The type id of the empty frame that a control stream begins with.
pub const OPENER: u8 = 0xF2;

const VERSION: u64 = 1;

/// Ports or addresses in one message.
const MAX_LISTED: usize = 16;

/// Bytes of successions in one message.
pub const MAX_SUCCESSIONS_LEN: usize = 3072;

/// Length of a node's proof that it knows the realm's secret.
pub const PROOF_LEN: usize = 32;

/// A node's name, or what the asker calls a circuit until it has one: 1 to 255 bytes.
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
    PunchResult { session_id: Id, result: Result<(), GivenUp> },
}

/// What a relay says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromRelay {
    /// The node is registered, and is seen at this address. Said again when the address changes.
    Registered { address: SocketAddr, probes: Option<Probes> },
    /// The node is not registered, or no longer: nothing follows.
    Refused { error: Refusal },
    /// The circuit that was asked for.
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
    PunchResult { session_id: Id, result: Result<(), GivenUp> },
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

/// Texts that the protocol lists, with a place for those that a later version may add.
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

            fn from_name(name: &[u8]) -> Self {
                Self::ALL.into_iter().find(|known| known.name().as_bytes() == name).unwrap_or(Self::Unknown)
            }
        }
    };
}

names! {
    /// Why a relay does not do what it was asked for.
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
        /// Whoever runs the relay does not want the node.
        Denied "denied",
        /// It could not be found out whether the relay wants the node.
        Undecided "undecided",
        /// Whoever runs the relay made the node leave, and it may come back later.
        Kicked "kicked",
    }
}

names! {
    /// Why a node looks no longer for a direct path to another, or not at all.
    pub GivenUp {
        /// It would take more packets than the node's settings allow.
        NotAllowed "not_allowed",
        /// Neither NAT gives ports that the other side could know.
        BothHard "both_hard",
        /// Nothing came through.
        TimedOut "timeout",
        /// The node makes as many attempts as it may.
        Busy "busy",
        /// The node's socket has moved.
        Interrupted "interrupted",
        /// Nobody at the node wants it any more.
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

impl FromNode {
    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Connect { node_id, proof, successions } => {
                let mut fields = vec![
                    ("version", Value::Uint(VERSION)),
                    ("node_id", id(node_id)),
                    ("realm_id", text("")),
                    ("capabilities", Value::Array(Vec::new())),
                ];
                fields.extend(proof.map(|proof| ("proof", Value::Bin(proof.into()))));
                if !successions.is_empty() {
                    let statements = successions.iter().map(|statement| Value::Bin(statement.to_vec()));
                    fields.push(("successions", Value::Array(statements.collect())));
                }
                message(MessageType::Connect, fields)
            }
            Self::RelayRequest { session_id, target_id } => {
                message(MessageType::RelayRequest, vec![("session_id", id(session_id)), ("target_id", id(target_id))])
            }
            Self::Disconnect { circuit, reason } => disconnect(*circuit, *reason),
            Self::Describe { profile, candidates } => {
                let mut fields = nat(profile);
                fields.push(addresses(candidates));
                message(MessageType::Cast, fields)
            }
            Self::PunchRequest { session_id, target_id } => {
                message(MessageType::PunchRequest, vec![("session_id", id(session_id)), ("target_id", id(target_id))])
            }
            Self::PunchExecute { session_id, ports } => execute(session_id, ports),
            Self::PunchResult { session_id, result } => punch_result(session_id, *result),
        }
    }

    pub fn decode(frame: &RawFrame) -> Result<Self, ControlError> {
        let fields = Fields::decode(frame)?;
        match MessageType::from_id(frame.type_id()) {
            Some(MessageType::Cast) => {
                Ok(Self::Describe { profile: fields.nat()?, candidates: fields.addresses("candidates")? })
            }
            Some(MessageType::PunchRequest) => {
                Ok(Self::PunchRequest { session_id: fields.id("session_id")?, target_id: fields.id("target_id")? })
            }
            Some(MessageType::PunchExecute) => {
                Ok(Self::PunchExecute { session_id: fields.id("session_id")?, ports: fields.ports("ports")? })
            }
            Some(MessageType::PunchResult) => {
                Ok(Self::PunchResult { session_id: fields.id("session_id")?, result: fields.punch_result()? })
            }
            Some(MessageType::Connect) => {
                if fields.uint("version")? != VERSION {
                    return Err(ControlError::Field("version"));
                }
                let proof = match fields.get("proof") {
                    Some(_) => Some(fields.bin("proof")?.try_into().map_err(|_| ControlError::Field("proof"))?),
                    None => None,
                };
                Ok(Self::Connect { node_id: fields.id("node_id")?, proof, successions: fields.successions()? })
            }
            Some(MessageType::RelayRequest) => {
                Ok(Self::RelayRequest { session_id: fields.id("session_id")?, target_id: fields.id("target_id")? })
            }
            Some(MessageType::Disconnect) => {
                Ok(Self::Disconnect { circuit: fields.circuit()?, reason: fields.reason()? })
            }
            _ => Err(ControlError::Type(frame.type_id())),
        }
    }
}

impl FromRelay {
    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let error = |refusal: &Refusal| ("error", text(refusal.name()));
        match self {
            Self::Registered { address, probes } => {
                let mut fields = vec![("address", text(&address.to_string()))];
                if let Some(Probes { id, secret, port, ip }) = probes {
                    fields.push(("probe_id", Value::Bin(id.to_be_bytes().into())));
                    fields.push(("probe_secret", Value::Bin(secret.as_bytes().into())));
                    fields.push(("probe_port", Value::Uint((*port).into())));
                    fields.extend(ip.map(|ip| ("probe_ip", text(&ip.to_string()))));
                }
                message(MessageType::Reply, fields)
            }
            Self::Refused { error: refusal } => message(MessageType::Reply, vec![error(refusal)]),
            Self::Opened { session_id, circuit } => message(
                MessageType::Reply,
                vec![("session_id", id(session_id)), ("circuit", Value::Uint((*circuit).into()))],
            ),
            Self::NotOpened { session_id, error: refusal } => {
                message(MessageType::Reply, vec![("session_id", id(session_id)), error(refusal)])
            }
            Self::Disconnect { circuit, reason } => disconnect(*circuit, *reason),
            Self::Dropped { circuit, limit } => message(
                MessageType::Cast,
                vec![("limit", text(limit.name())), ("circuit", Value::Uint((*circuit).into()))],
            ),
            Self::PunchCoordinate(coordinate) => coordinate.encode(),
            Self::PunchExecute { session_id, ports } => execute(session_id, ports),
            Self::NotPunched { session_id, error: refusal } => {
                message(MessageType::PunchResult, vec![("session_id", id(session_id)), error(refusal)])
            }
            Self::PunchResult { session_id, result } => punch_result(session_id, *result),
        }
    }

    pub fn decode(frame: &RawFrame) -> Result<Self, ControlError> {
        let fields = Fields::decode(frame)?;
        match MessageType::from_id(frame.type_id()) {
            Some(MessageType::Reply) => fields.reply(),
            Some(MessageType::Disconnect) => {
                Ok(Self::Disconnect { circuit: fields.circuit()?, reason: fields.reason()? })
            }
            Some(MessageType::Cast) => {
                Ok(Self::Dropped { circuit: fields.circuit()?, limit: Limit::from_name(fields.bin("limit")?) })
            }
            Some(MessageType::PunchCoordinate) => Ok(Self::PunchCoordinate(Box::new(fields.coordinate()?))),
            Some(MessageType::PunchExecute) => {
                Ok(Self::PunchExecute { session_id: fields.id("session_id")?, ports: fields.ports("ports")? })
            }
            Some(MessageType::PunchResult) if fields.get("success").is_some() => {
                Ok(Self::PunchResult { session_id: fields.id("session_id")?, result: fields.punch_result()? })
            }
            Some(MessageType::PunchResult) => Ok(Self::NotPunched {
                session_id: fields.id("session_id")?,
                error: Refusal::from_name(fields.bin("error")?),
            }),
            _ => Err(ControlError::Type(frame.type_id())),
        }
    }
}

impl Coordinate {
    /// With the original's fields, and those that it lacks.
    fn encode(&self) -> Bytes {
        let mut fields = vec![
            ("session_id", id(&self.session_id)),
            ("peer_id", id(&self.peer_id)),
            ("peer_host", text(&self.address.ip().to_string())),
            ("peer_ports", ports(&[self.address.port()])),
            ("role", text(role_name(self.role))),
            ("key", Value::Bin(self.key.as_bytes().to_vec())),
            ("secret", Value::Bin(self.secret.to_vec())),
            ("delay", Value::Uint(self.delay.as_millis() as u64)),
            addresses(&self.candidates),
        ];
        fields.extend(nat(&self.profile));
        message(MessageType::PunchCoordinate, fields)
    }
}

const ROLES: [Role; 2] = [Role::Initiator, Role::Responder];

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Initiator => "initiator",
        Role::Responder => "responder",
    }
}

fn execute(session_id: &Id, told: &[u16]) -> Bytes {
    message(MessageType::PunchExecute, vec![("session_id", id(session_id)), ("ports", ports(told))])
}

fn punch_result(session_id: &Id, result: Result<(), GivenUp>) -> Bytes {
    let mut fields = vec![("session_id", id(session_id)), ("success", Value::Bool(result.is_ok()))];
    fields.extend(result.err().map(|why| ("error", text(why.name()))));
    message(MessageType::PunchResult, fields)
}

fn ports(ports: &[u16]) -> Value {
    Value::Array(ports.iter().map(|&port| Value::Uint(port.into())).collect())
}

fn addresses(addresses: &[SocketAddr]) -> (&'static str, Value) {
    ("candidates", Value::Array(addresses.iter().map(|address| text(&address.to_string())).collect()))
}

/// What is not known is left out.
fn nat(profile: &NatProfile) -> Vec<(&'static str, Value)> {
    let step = profile.allocation.and_then(Allocation::step);
    let fields = [
        ("mapping", profile.mapping.map(|mapping| text(mapping.name()))),
        ("filtering", profile.filtering.map(|filtering| text(filtering.name()))),
        ("allocation", profile.allocation.map(|allocation| text(allocation.name()))),
        ("step", step.map(|step| Value::Int(step.into()))),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn disconnect(circuit: u32, reason: Reason) -> Bytes {
    let said = match reason {
        Reason::Gone => "the other side's registration ended",
        Reason::Idle => "the circuit carried nothing for long",
        Reason::Closed => "the other side ended the circuit",
        Reason::Unknown => "",
    };
    let fields =
        vec![("reason", text(reason.name())), ("message", text(said)), ("circuit", Value::Uint(circuit.into()))];
    message(MessageType::Disconnect, fields)
}

fn message(ty: MessageType, fields: Vec<(&'static str, Value)>) -> Bytes {
    let map = Value::Map(fields.into_iter().map(|(key, value)| (text(key), value)).collect());
    #[expect(clippy::expect_used, reason = "two ids of 255 bytes are the most: far below the limits")]
    encode(ty, &map, LIMITS).expect("within the limits").into()
}

fn text(text: &str) -> Value {
    Value::Bin(text.into())
}

fn id(id: &Id) -> Value {
    Value::Bin(id.as_bytes().into())
}

/// The map of a message. Fields that the protocol does not name are not looked at.
struct Fields(Vec<(Value, Value)>);

impl Fields {
    fn decode(frame: &RawFrame) -> Result<Self, ControlError> {
        let len = frame.bytes().len();
        if len > LIMITS.max_frame {
            return Err(ControlError::TooLarge(len));
        }
        match decode_payload(frame.payload(), LIMITS, &mut ValueBuilder)? {
            Value::Map(pairs) => Ok(Self(pairs)),
            _ => Err(ControlError::NotAMap),
        }
    }

    fn reply(&self) -> Result<FromRelay, ControlError> {
        let error = match self.get("error") {
            Some(_) => Some(Refusal::from_name(self.bin("error")?)),
            None => None,
        };
        let session_id = match self.get("session_id") {
            Some(_) => Some(self.id("session_id")?),
            None => None,
        };
        match (session_id, error) {
            (Some(session_id), Some(error)) => Ok(FromRelay::NotOpened { session_id, error }),
            (Some(session_id), None) => Ok(FromRelay::Opened { session_id, circuit: self.circuit()? }),
            (None, Some(error)) => Ok(FromRelay::Refused { error }),
            (None, None) => Ok(FromRelay::Registered { address: self.address()?, probes: self.probes()? }),
        }
    }

    fn probes(&self) -> Result<Option<Probes>, ControlError> {
        if self.get("probe_id").is_none() {
            return Ok(None);
        }
        let id = self.bin("probe_id")?.try_into().map_err(|_| ControlError::Field("probe_id"))?;
        let secret = <[u8; SECRET_LEN]>::try_from(self.bin("probe_secret")?);
        let secret = secret.map_err(|_| ControlError::Field("probe_secret"))?;
        let port = u16::try_from(self.uint("probe_port")?).ok().filter(|&port| port != 0);
        let ip = match self.get("probe_ip") {
            Some(_) => Some(self.ip("probe_ip")?),
            None => None,
        };
        Ok(Some(Probes {
            id: u64::from_be_bytes(id),
            secret: secret.into(),
            port: port.ok_or(ControlError::Field("probe_port"))?,
            ip,
        }))
    }

    fn circuit(&self) -> Result<u32, ControlError> {
        self.uint("circuit")?.try_into().map_err(|_| ControlError::Field("circuit"))
    }

    fn reason(&self) -> Result<Reason, ControlError> {
        self.bin("message")?;
        Ok(Reason::from_name(self.bin("reason")?))
    }

    fn coordinate(&self) -> Result<Coordinate, ControlError> {
        let host = str::from_utf8(self.bin("peer_host")?).ok().and_then(|host| host.parse::<IpAddr>().ok());
        let port = self.ports("peer_ports")?.first().copied();
        let (Some(host), Some(port)) = (host, port) else { return Err(ControlError::Field("peer_host")) };
        let role = self.bin("role")?;
        let role = ROLES.into_iter().find(|known| role_name(*known).as_bytes() == role);
        Ok(Coordinate {
            session_id: self.id("session_id")?,
            role: role.ok_or(ControlError::Field("role"))?,
            peer_id: self.id("peer_id")?,
            key: self.array("key")?.into(),
            address: (host, port).into(),
            profile: self.nat()?,
            candidates: self.addresses("candidates")?,
            secret: self.array("secret")?,
            delay: Duration::from_millis(self.uint("delay")?),
        })
    }

    /// Names that this version does not know are as good as none.
    fn nat(&self) -> Result<NatProfile, ControlError> {
        let name = |key| match self.get(key) {
            Some(_) => self.bin(key).map(Some),
            None => Ok(None),
        };
        let step = match self.get("step") {
            Some(&Value::Int(step)) => i16::try_from(step).ok(),
            Some(&Value::Uint(step)) => i16::try_from(step).ok(),
            Some(_) => return Err(ControlError::Field("step")),
            None => None,
        };
        Ok(NatProfile {
            mapping: name("mapping")?.and_then(Mapping::from_name),
            filtering: name("filtering")?.and_then(Filtering::from_name),
            allocation: name("allocation")?.and_then(|name| Allocation::from_name(name, step)),
        })
    }

    fn punch_result(&self) -> Result<Result<(), GivenUp>, ControlError> {
        match (self.bool("success")?, self.get("error")) {
            (true, _) => Ok(Ok(())),
            (false, Some(_)) => Ok(Err(GivenUp::from_name(self.bin("error")?))),
            (false, None) => Ok(Err(GivenUp::Unknown)),
        }
    }

    fn addresses(&self, key: &'static str) -> Result<Vec<SocketAddr>, ControlError> {
        let address = |value: &Value| match value {
            Value::Bin(text) => str::from_utf8(text).ok()?.parse().ok(),
            _ => None,
        };
        self.list(key)?.iter().map(|value| address(value).ok_or(ControlError::Field(key))).collect()
    }

    fn ports(&self, key: &'static str) -> Result<Vec<u16>, ControlError> {
        let port = |value: &Value| match value {
            Value::Uint(port) => u16::try_from(*port).ok(),
            _ => None,
        };
        self.list(key)?.iter().map(|value| port(value).ok_or(ControlError::Field(key))).collect()
    }

    fn successions(&self) -> Result<Vec<Bytes>, ControlError> {
        let statement = |value: &Value| match value {
            Value::Bin(statement) => Some(Bytes::copy_from_slice(statement)),
            _ => None,
        };
        let key = "successions";
        match self.get(key) {
            Some(_) => self.list(key)?.iter().map(|value| statement(value).ok_or(ControlError::Field(key))).collect(),
            None => Ok(Vec::new()),
        }
    }

    fn list(&self, key: &'static str) -> Result<&[Value], ControlError> {
        match self.get(key) {
            Some(Value::Array(values)) if values.len() <= MAX_LISTED => Ok(values),
            _ => Err(ControlError::Field(key)),
        }
    }

    fn bool(&self, key: &'static str) -> Result<bool, ControlError> {
        match self.get(key) {
            Some(&Value::Bool(value)) => Ok(value),
            _ => Err(ControlError::Field(key)),
        }
    }

    fn array<const LEN: usize>(&self, key: &'static str) -> Result<[u8; LEN], ControlError> {
        self.bin(key)?.try_into().map_err(|_| ControlError::Field(key))
    }

    fn address(&self) -> Result<SocketAddr, ControlError> {
        let text = str::from_utf8(self.bin("address")?).ok();
        text.and_then(|text| text.parse().ok()).ok_or(ControlError::Field("address"))
    }

    fn ip(&self, key: &'static str) -> Result<IpAddr, ControlError> {
        let text = str::from_utf8(self.bin(key)?).ok();
        text.and_then(|text| text.parse().ok()).ok_or(ControlError::Field(key))
    }

    fn id(&self, key: &'static str) -> Result<Id, ControlError> {
        Id::new(Bytes::copy_from_slice(self.bin(key)?)).ok_or(ControlError::Field(key))
    }

    fn uint(&self, key: &'static str) -> Result<u64, ControlError> {
        match self.get(key) {
            Some(&Value::Uint(value)) => Ok(value),
            _ => Err(ControlError::Field(key)),
        }
    }

    fn bin(&self, key: &'static str) -> Result<&[u8], ControlError> {
        match self.get(key) {
            Some(Value::Bin(bytes)) => Ok(bytes),
            _ => Err(ControlError::Field(key)),
        }
    }

    /// Of equal keys the last counts, as everywhere in macula.
    fn get(&self, key: &str) -> Option<&Value> {
        let named = |(name, _): &&(Value, Value)| matches!(name, Value::Bin(name) if name == key.as_bytes());
        self.0.iter().rfind(named).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bytes::BytesMut;
    use macula_peer_wire::{HEADER_LEN, Reassembler};
    use proptest::collection::vec;
    use proptest::prelude::*;

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
        raw(&encode(ty, &Value::Map(pairs), Limits::default()).unwrap().into())
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
            FromNode::PunchResult { session_id: some_id(b"s"), result: Err(GivenUp::NotAllowed) },
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
            FromRelay::PunchResult { session_id: some_id(b"s"), result: Err(GivenUp::Busy) },
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

    #[test]
    fn a_side_does_not_take_what_only_the_other_says() {
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
        let given_up = GivenUp::ALL.map(GivenUp::name);
        for name in refusals.iter().chain(&reasons).chain(&limits).chain(&given_up) {
            assert!(document.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn a_connect_without_a_proper_node_id_version_or_proof_is_refused() {
        let version = || field("version", Value::Uint(1));
        let node_id = || field("node_id", text("a"));
        let refused = |field, pairs| {
            let decoded = FromNode::decode(&made(MessageType::Connect, pairs));
            assert_eq!(decoded, Err(ControlError::Field(field)));
        };
        refused("version", vec![node_id()]);
        refused("version", vec![node_id(), field("version", Value::Uint(2))]);
        refused("node_id", vec![version()]);
        refused("node_id", vec![version(), field("node_id", text(""))]);
        refused("node_id", vec![version(), field("node_id", Value::Bin(vec![0; 256]))]);
        refused("node_id", vec![version(), field("node_id", Value::Str("a".into()))]);
        refused("proof", vec![version(), node_id(), field("proof", Value::Bin(vec![0; 31]))]);
        refused("proof", vec![version(), node_id(), field("proof", Value::Nil)]);
        for wrong in
            [Value::Nil, Value::Array(vec![Value::Nil]), Value::Array(vec![Value::Bin(vec![1]); MAX_LISTED + 1])]
        {
            refused("successions", vec![version(), node_id(), field("successions", wrong)]);
        }
    }

    #[test]
    fn unknown_fields_do_no_harm_and_unknown_names_have_their_place() {
        let pairs = vec![
            (Value::Uint(1), Value::Nil),
            field("node_id", text("old")),
            field("more", Value::Array(vec![Value::Nil])),
            field("node_id", text("new")),
            field("version", Value::Uint(1)),
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
                field("probe_id", Value::Bin(vec![1; 8])),
                field("probe_secret", Value::Bin(vec![1; SECRET_LEN])),
                field("probe_port", Value::Uint(9)),
                field("probe_ip", text("192.0.2.1")),
                field("address", text("127.0.0.1:1")),
            ]
        };
        let decode = |pairs| FromRelay::decode(&made(MessageType::Reply, pairs));
        let Ok(FromRelay::Registered { probes: Some(probes), .. }) = decode(all()) else { panic!("probes") };
        assert_eq!((probes.id, probes.port), (0x0101010101010101, 9));
        for (name, wrong) in [
            ("probe_id", Value::Bin(vec![1; 7])),
            ("probe_secret", Value::Bin(vec![1; 31])),
            ("probe_port", Value::Uint(0)),
            ("probe_port", Value::Uint(65536)),
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
        let pairs = |circuit| {
            vec![field("reason", text("idle")), field("message", text("")), field("circuit", Value::Uint(circuit))]
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
        fn any_bytes_are_decoded_to_what_can_be_said_again_or_refused(
            ty in prop::sample::select(vec![0x01, 0x02, 0x21, 0x22, 0x56, 0xF2, 0x00]),
            payload in vec(any::<u8>(), 0..256),
        ) {
            decoded_or_refused(&of(ty, &payload));
        }

        #[test]
        fn so_are_messages_with_some_bytes_changed(
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
