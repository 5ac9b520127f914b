//! Nodes and relays made of nothing but quinn: what they say is up to the test.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use macula_peer_testkit::frame::of_map;
use macula_peer_testkit::quic::{self, Key};
use macula_peer_wire::{Limits, MessageType, RawFrame, Reassembler};
use quinn::{
    Connection, Endpoint, EndpointConfig, ReadError, ReadExactError, RecvStream, SendStream, TokioRuntime,
    TransportConfig, VarInt,
};
use ring::hmac;
use rmpv::Value;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{PATIENCE, frame};

pub const ALPN: &str = "macula-peer/1";

pub const SESSION: u8 = 0xF0;
pub const NUMBER: u8 = 0xF1;
pub const CONTROL: u8 = 0xF2;
pub const ASK_NODE: u8 = 0xF3;
pub const FOR_NODE: u8 = 0xF4;
pub const REQUEST: u8 = 0xF5;

pub fn transport() -> TransportConfig {
    let mut transport = quic::transport(256, 256);
    // Datagrams of the longest packets fit.
    transport.initial_mtu(1452);
    transport
}

/// A request with an id. `again`: the requester knows that it came before.
pub fn question(id: u64, again: bool, kind: MessageType, n: u64) -> Vec<u8> {
    let name = [&u128::from(id).to_be_bytes()[..], &[again.into()]].concat();
    [raw_frame(REQUEST, &name), frame(kind, n, 8).to_vec()].concat()
}

/// A connection that shows a key of its own.
pub async fn dial(to: &str, key: &Key) -> Connection {
    dial_with(to, key, transport()).await
}

pub async fn dial_with(to: &str, key: &Key, transport: TransportConfig) -> Connection {
    dial_from("127.0.0.1", to, key, transport).await
}

/// From an address of this host: all of 127.0.0.0/8 are.
pub async fn dial_from(ip: &str, to: &str, key: &Key, transport: TransportConfig) -> Connection {
    let endpoint = Endpoint::client((ip.parse::<IpAddr>().unwrap(), 0).into()).unwrap();
    let config = quic::client_config_with_key(ALPN, transport, key).unwrap();
    let connecting = endpoint.connect_with(config, to.parse().unwrap(), "node").unwrap();
    timeout(PATIENCE, connecting).await.expect("connected in time").unwrap()
}

pub async fn stranger(to: &str) -> Connection {
    dial(to, &quic::key().unwrap()).await
}

/// Speaks only `macula`, allows `streams` streams, and serves each connection with `serve`. It lives as long as the
/// runtime.
pub fn macula_server<S>(streams: u32, serve: impl Fn(Connection) -> S + Send + Sync + 'static) -> (Runtime, SocketAddr)
where
    S: Future<Output = ()> + Send + 'static,
{
    macula_server_at(SocketAddr::from(([127, 0, 0, 1], 0)), streams, serve)
}

/// The same at this address.
pub fn macula_server_at<S>(
    address: SocketAddr,
    streams: u32,
    serve: impl Fn(Connection) -> S + Send + Sync + 'static,
) -> (Runtime, SocketAddr)
where
    S: Future<Output = ()> + Send + 'static,
{
    let runtime = quic::tokio_runtime(1).unwrap();
    let address = runtime.block_on(async {
        let server = quic::server_config(&["macula".into()], quic::transport(streams, 3)).unwrap();
        // A forwarder takes what greases the bit of RFC 9287 for no QUIC.
        let mut config = EndpointConfig::default();
        config.grease_quic_bit(false);
        let socket = UdpSocket::bind(address).unwrap();
        let endpoint = Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime)).unwrap();
        let address = endpoint.local_addr().unwrap();
        let serve = Arc::new(serve);
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let serve = serve.clone();
                tokio::spawn(async move { serve(incoming.await.unwrap()).await });
            }
        });
        address
    });
    (runtime, address)
}

/// Opens a session without having met its receiver.
pub fn opening(id: u64, channel: u8) -> Vec<u8> {
    opening_to(id, channel, [0; 8])
}

/// Opens a session with a receiver that was in this run when it was met.
pub fn opening_to(id: u64, channel: u8, run: [u8; 8]) -> Vec<u8> {
    let mut payload = [0; 25];
    payload[..8].copy_from_slice(&id.to_be_bytes());
    payload[16] = channel;
    payload[17..].copy_from_slice(&run);
    raw_frame(SESSION, &payload)
}

pub fn numbered(number: u64) -> Vec<u8> {
    raw_frame(NUMBER, &number.to_be_bytes())
}

/// A stream of a session, and its receiver's first word: whether it is known, and what is expected.
pub async fn session(connection: &Connection, id: u64) -> (Stream, bool, u64) {
    let mut stream = Stream::open(connection).await;
    stream.say(opening(id, 0)).await;
    let (known, _, expected) = stream.greeting().await.expect("greeted");
    (stream, known, expected)
}

pub async fn word(stream: &mut Stream) -> u64 {
    match words(stream).await {
        (0, expected) => expected,
        refused => panic!("{refused:?}"),
    }
}

/// An acknowledgement, or the error for which a message is refused and its number.
pub async fn words(stream: &mut Stream) -> (u8, u64) {
    let word = stream.bytes(9).await.expect("acknowledged");
    (word[0], u64::from_be_bytes(word[1..].try_into().unwrap()))
}

/// One frame, of any type.
pub fn raw_frame(type_id: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![1, type_id, 0, 0];
    frame.put_u32(payload.len() as u32);
    frame.extend_from_slice(payload);
    frame
}

pub fn bin(bytes: impl AsRef<[u8]>) -> Value {
    Value::Binary(bytes.as_ref().to_vec())
}

/// A message whose payload is a map.
pub fn map(kind: MessageType, fields: &[(&str, Value)]) -> Bytes {
    let fields = fields.iter().map(|(key, value)| (bin(key), value.clone())).collect();
    of_map(kind.id(), fields).into()
}

pub fn connect_as(node_id: &str, more: &[(&str, Value)]) -> Bytes {
    let fields = [
        ("version", Value::from(1)),
        ("node_id", bin(node_id)),
        ("realm_id", bin("")),
        ("capabilities", Value::Array(vec![])),
    ];
    map(MessageType::Connect, &[&fields, more].concat())
}

pub fn relay_request(session: &str, target: &str) -> Bytes {
    map(MessageType::RelayRequest, &[("session_id", bin(session)), ("target_id", bin(target))])
}

/// What a NAT is said to be like.
pub type Nat = [(&'static str, Value); 3];

pub fn nat(mapping: &str, filtering: &str, allocation: &str) -> Nat {
    [("mapping", bin(mapping)), ("filtering", bin(filtering)), ("allocation", bin(allocation))]
}

pub fn describe(nat: &Nat, candidates: &[&str]) -> Bytes {
    let candidates = ("candidates", Value::Array(candidates.iter().map(bin).collect()));
    map(MessageType::Cast, &[&nat[..], &[candidates]].concat())
}

pub fn punch_request(session: &str, target: &str) -> Bytes {
    map(MessageType::PunchRequest, &[("session_id", bin(session)), ("target_id", bin(target))])
}

pub fn punch_execute(session: impl AsRef<[u8]>, ports: &[u16]) -> Bytes {
    let ports = Value::Array(ports.iter().map(|&port| Value::from(port)).collect());
    map(MessageType::PunchExecute, &[("session_id", bin(session)), ("ports", ports)])
}

pub fn punch_result(session: &str, success: bool) -> Bytes {
    map(MessageType::PunchResult, &[("session_id", bin(session)), ("success", Value::Boolean(success))])
}

/// The other node's attempt is over, as a relay tells it.
pub fn punch_over(session: impl AsRef<[u8]>, error: Option<&str>) -> Bytes {
    let mut fields = vec![("session_id", bin(session)), ("success", Value::Boolean(error.is_none()))];
    fields.extend(error.map(|error| ("error", bin(error))));
    map(MessageType::PunchResult, &fields)
}

/// A session of two nodes, as a relay tells one of them of it, and the signals of it.
pub struct Punch {
    pub session: [u8; 16],
    secret: [u8; 32],
}

impl Punch {
    pub const INITIATOR: u8 = 0;
    pub const RESPONDER: u8 = 1;
    pub const PING: u8 = 3;
    pub const PONG: u8 = 4;

    pub fn new() -> Self {
        Self { session: fastrand::u128(..).to_be_bytes(), secret: [fastrand::u8(..); 32] }
    }

    /// An answer that the node has requested under this id.
    pub fn asked(session: &[u8]) -> Self {
        Self { session: session.try_into().unwrap(), ..Self::new() }
    }

    /// What the node is told of another one.
    pub fn coordinate(&self, role: u8, peer: SocketAddr, key: [u8; 32], nat: &Nat) -> Bytes {
        let fields = [
            ("session_id", bin(self.session)),
            ("peer_id", bin("peer")),
            ("peer_host", bin(peer.ip().to_string())),
            ("peer_ports", Value::Array(vec![Value::from(peer.port())])),
            ("role", bin(["initiator", "responder"][usize::from(role)])),
            ("key", bin(key)),
            ("secret", bin(self.secret)),
            ("delay", Value::from(0)),
            ("candidates", Value::Array(vec![])),
        ];
        map(MessageType::PunchCoordinate, &[&fields[..], nat].concat())
    }

    pub fn signal(&self, kind: u8, sender: u8, nonce: u64) -> Vec<u8> {
        let mut signal = vec![0x08, kind];
        signal.extend_from_slice(&self.session[..8]);
        signal.extend_from_slice(&nonce.to_be_bytes());
        signal.push(sender);
        let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.secret), &signal);
        signal.extend_from_slice(&mac.as_ref()[..16]);
        signal
    }

    /// The kind and the nonce of a signal of the other side.
    pub fn read(&self, signal: &[u8], sender: u8) -> Option<(u8, u64)> {
        let nonce = u64::from_be_bytes(signal.get(10..18)?.try_into().unwrap());
        (self.signal(signal[1], sender, nonce) == signal).then_some((signal[1], nonce))
    }
}

impl Default for Punch {
    fn default() -> Self {
        Self::new()
    }
}

pub fn disconnect(circuit: u32) -> Bytes {
    let fields = [("reason", bin("closed")), ("message", bin("")), ("circuit", Value::from(circuit))];
    map(MessageType::Disconnect, &fields)
}

/// A datagram that carries a whole packet.
pub fn packet(circuit: u32, bytes: &[u8]) -> Bytes {
    let mut datagram = BytesMut::new();
    datagram.put_u32(circuit);
    datagram.put_u8(0);
    datagram.put_slice(bytes);
    datagram.freeze()
}

/// The map in a message.
#[derive(Debug, Clone)]
pub struct Said {
    pub kind: u8,
    fields: Vec<(Value, Value)>,
}

impl Said {
    pub fn of(frame: &RawFrame) -> Self {
        match rmpv::decode::read_value(&mut frame.payload()) {
            Ok(Value::Map(fields)) => Self { kind: frame.type_id(), fields },
            _ => Self { kind: frame.type_id(), fields: vec![] },
        }
    }

    pub fn text(&self, key: &str) -> Option<String> {
        match self.get(key)? {
            Value::Binary(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }

    pub fn uint(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// The elements of a list.
    pub fn texts(&self, key: &str) -> Option<Vec<String>> {
        let Value::Array(values) = self.get(key)? else { return None };
        let text = |value: &Value| match value {
            Value::Binary(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        };
        values.iter().map(text).collect()
    }

    pub fn bytes(&self, key: &str) -> Option<&[u8]> {
        match self.get(key)? {
            Value::Binary(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.fields.iter().find(|(name, _)| *name == bin(key)).map(|(_, value)| value)
    }
}

/// One stream, and the frames that come back on it.
pub struct Stream {
    pub send: SendStream,
    pub receive: RecvStream,
    frames: Reassembler,
}

impl From<(SendStream, RecvStream)> for Stream {
    fn from((send, receive): (SendStream, RecvStream)) -> Self {
        Self { send, receive, frames: Reassembler::new(Limits::default()) }
    }
}

impl Stream {
    pub async fn open(connection: &Connection) -> Self {
        let (send, receive) = timeout(PATIENCE, connection.open_bi()).await.expect("a stream in time").unwrap();
        Self::from((send, receive))
    }

    /// A control stream, on which nothing was said yet.
    pub async fn control(connection: &Connection) -> Self {
        let mut stream = Self::open(connection).await;
        stream.say(raw_frame(CONTROL, &[])).await;
        stream
    }

    pub async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        // The receiver may have stopped the stream already; what it sends back tells.
        let _ = timeout(PATIENCE, self.send.write_all(bytes.as_ref())).await.expect("written in time");
    }

    /// `Err`: the error that the stream was reset with, if it was.
    pub async fn frame(&mut self) -> Result<RawFrame, Option<VarInt>> {
        loop {
            if let Some(frame) = self.frames.next_frame().unwrap() {
                return Ok(frame);
            }
            match timeout(PATIENCE, self.receive.read_chunk(usize::MAX, true)).await.expect("heard in time") {
                Ok(Some(chunk)) => self.frames.push(chunk.bytes),
                Err(ReadError::Reset(code)) => return Err(Some(code)),
                Ok(None) | Err(_) => return Err(None),
            }
        }
    }

    pub async fn hear(&mut self) -> Said {
        Said::of(&self.frame().await.expect("the stream goes on"))
    }

    /// What is said to a relay's request.
    pub async fn ask(&mut self, question: impl AsRef<[u8]>) -> Said {
        self.say(question).await;
        self.hear().await
    }

    /// The circuit, or the error's name.
    pub async fn circuit_to(&mut self, target: &str) -> Result<u32, String> {
        let said = self.ask(relay_request("s", target)).await;
        match (said.uint("circuit"), said.text("error")) {
            (Some(circuit), None) => Ok(circuit as u32),
            (None, Some(error)) => Err(error),
            _ => panic!("{said:?}"),
        }
    }

    /// The next `len` bytes. `Err`: as for a frame.
    pub async fn bytes(&mut self, len: usize) -> Result<Vec<u8>, Option<VarInt>> {
        let mut bytes = vec![0; len];
        match timeout(PATIENCE, self.receive.read_exact(&mut bytes)).await.expect("heard in time") {
            Ok(()) => Ok(bytes),
            Err(ReadExactError::ReadError(ReadError::Reset(code))) => Err(Some(code)),
            Err(_) => Err(None),
        }
    }

    /// The first word on a stream of a session: whether it is known, the receiver's run, and what is expected. `Err`: as for
    /// a frame.
    pub async fn greeting(&mut self) -> Result<(bool, [u8; 8], u64), Option<VarInt>> {
        let word = self.bytes(17).await?;
        Ok((word[0] == 1, word[1..9].try_into().unwrap(), u64::from_be_bytes(word[9..].try_into().unwrap())))
    }

    /// The error that the other side stopped the stream with.
    pub async fn stopped(&mut self) -> Option<VarInt> {
        timeout(PATIENCE, self.send.stopped()).await.expect("stopped in time").unwrap()
    }
}

/// A control stream of a node that is registered.
pub async fn registered(connection: &Connection, node_id: &str) -> Stream {
    let mut control = Stream::control(connection).await;
    let said = control.ask(connect_as(node_id, &[])).await;
    assert!(said.text("address").is_some(), "{said:?}");
    control
}

/// First packets of QUIC handshakes, each of its own.
pub fn initials(count: usize) -> Vec<Vec<u8>> {
    let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let runtime = quic::tokio_runtime(1).unwrap();
    let inside = runtime.enter();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let key = quic::key().unwrap();
    let config = quic::client_config_with_key(ALPN, quic::transport(0, 0), &key).unwrap();
    let mut packets = Vec::with_capacity(count);
    let mut buffer = [0; 2000];
    while packets.len() < count {
        let connecting = endpoint.connect_with(config.clone(), sink.local_addr().unwrap(), "node").unwrap();
        let len = sink.recv(&mut buffer).unwrap();
        // A long header of type Initial, not the goodbye of the attempt before.
        if buffer[0] & 0xF0 == 0xC0 && len >= 1200 {
            packets.push(buffer[..len].to_vec());
        }
        drop(connecting);
    }
    drop(inside);
    runtime.shutdown_background();
    packets
}

/// Lets quinn endpoints on loopback talk over a circuit.
pub struct Bridge {
    pub address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Bridge {
    /// For a client that dials `address`.
    pub async fn new(connection: Connection, circuit: u32) -> Self {
        let socket = Arc::new(tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let client = Arc::new(Mutex::new(None));
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let (socket, client, connection) = (socket.clone(), client.clone(), connection.clone());
            async move {
                let mut buffer = [0; 2000];
                while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                    *client.lock().unwrap() = Some(from);
                    // Too long is lost.
                    let _ = connection.send_datagram_wait(packet(circuit, &buffer[..len])).await;
                }
            }
        });
        tasks.spawn(async move {
            while let Ok(datagram) = connection.read_datagram().await {
                let to = *client.lock().unwrap();
                if let Some(to) = to {
                    let _ = socket.send_to(&datagram[5..], to).await;
                }
            }
        });
        Self { address, _tasks: tasks }
    }
}

/// How a relay treats circuits.
#[derive(Clone, PartialEq, Eq)]
pub enum Manner {
    /// All circuits lead to this node.
    Misroute(String),
    Swallow,
    /// Every datagram twice, and old ones again.
    Replay,
    /// Now and then a circuit ends.
    End,
}

/// A relay that keeps to the protocol as far as it likes.
pub struct FakeRelay {
    pub address: String,
    world: Arc<World>,
    _tasks: JoinSet<()>,
}

struct World {
    manner: Mutex<Manner>,
    nodes: Mutex<HashMap<String, FakeNode>>,
    /// What nodes are told beside their address when they register.
    welcome: Mutex<Vec<(&'static str, Value)>>,
    /// What nodes said that is not about circuits.
    said: Mutex<Vec<Said>>,
    circuits: Mutex<Vec<Option<[String; 2]>>>,
}

#[derive(Clone)]
struct FakeNode {
    connection: Connection,
    send: Arc<tokio::sync::Mutex<SendStream>>,
}

impl FakeRelay {
    /// Must be called inside a runtime.
    pub fn new(manner: Manner) -> Self {
        let config = quic::server_config(&[ALPN.into()], transport()).unwrap();
        let endpoint = Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = endpoint.local_addr().unwrap().to_string();
        let world = Arc::new(World {
            manner: Mutex::new(manner),
            nodes: Mutex::default(),
            welcome: Mutex::default(),
            said: Mutex::default(),
            circuits: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let world = world.clone();
            async move {
                let mut nodes = JoinSet::new();
                while let Some(incoming) = endpoint.accept().await {
                    let world = world.clone();
                    nodes.spawn(async move {
                        if let Ok(connection) = incoming.await {
                            world.serve(connection).await;
                        }
                    });
                }
            }
        });
        Self { address, world, _tasks: tasks }
    }

    pub fn set_manner(&self, manner: Manner) {
        *self.world.manner.lock().unwrap() = manner;
    }

    /// Nodes are told this too when they register.
    pub fn set_welcome(&self, fields: Vec<(&'static str, Value)>) {
        *self.world.welcome.lock().unwrap() = fields;
    }

    /// What nodes said of this type, if it is not about circuits.
    pub fn said(&self, kind: MessageType) -> Vec<Said> {
        self.world.said.lock().unwrap().iter().filter(|said| said.kind == kind.id()).cloned().collect()
    }

    pub fn knows(&self, node: &str) -> bool {
        self.world.nodes.lock().unwrap().contains_key(node)
    }

    /// The connection of a node that is registered.
    pub fn connection(&self, node: &str) -> Connection {
        self.world.nodes.lock().unwrap()[node].connection.clone()
    }

    /// Says something to a node on its control stream.
    pub async fn say(&self, node: &str, bytes: &[u8]) {
        let node = self.world.nodes.lock().unwrap()[node].clone();
        node.send.lock().await.write_all(bytes).await.unwrap();
    }
}

impl World {
    async fn serve(self: Arc<Self>, connection: Connection) {
        let mut streams = JoinSet::new();
        let accepting = async {
            // Not every stream that is opened is needed.
            while let Ok((send, receive)) = connection.accept_bi().await {
                let (world, send) = (self.clone(), Arc::new(tokio::sync::Mutex::new(send)));
                let node = FakeNode { connection: connection.clone(), send };
                streams.spawn(async move { world.hear(&node, receive).await });
            }
        };
        tokio::select! {
            () = accepting => {}
            () = self.forward(&connection) => {}
        }
    }

    async fn hear(&self, node: &FakeNode, mut receive: RecvStream) {
        let (mut frames, mut name) = (Reassembler::new(Limits::default()), String::new());
        while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
            frames.push(chunk.bytes);
            while let Some(frame) = frames.next_frame().unwrap() {
                let said = Said::of(&frame);
                match MessageType::from_id(said.kind) {
                    Some(MessageType::Connect) => {
                        name = said.text("node_id").unwrap();
                        self.nodes.lock().unwrap().insert(name.clone(), node.clone());
                        let mut fields = vec![("address", bin("127.0.0.1:1"))];
                        fields.extend(self.welcome.lock().unwrap().clone());
                        tell(node, &map(MessageType::Reply, &fields)).await;
                    }
                    Some(MessageType::RelayRequest) => {
                        let session = said.text("session_id").unwrap_or_default();
                        let target = match &*self.manner.lock().unwrap() {
                            Manner::Misroute(other) => other.clone(),
                            _ => said.text("target_id").unwrap(),
                        };
                        // As it came: it need not be text.
                        let session = said.get("session_id").cloned().unwrap_or(bin(session));
                        let circuit = {
                            let mut circuits = self.circuits.lock().unwrap();
                            circuits.push(Some([name.clone(), target]));
                            circuits.len() as u64 - 1
                        };
                        let fields = [("session_id", session), ("circuit", Value::from(circuit))];
                        tell(node, &map(MessageType::Reply, &fields)).await;
                    }
                    Some(MessageType::Disconnect) => self.end(said.uint("circuit").unwrap() as u32).await,
                    _ => self.said.lock().unwrap().push(said),
                }
            }
        }
    }

    async fn end(&self, circuit: u32) {
        let Some(ends) = self.circuits.lock().unwrap()[circuit as usize].take() else { return };
        for end in ends {
            let node = self.nodes.lock().unwrap().get(&end).cloned();
            if let Some(node) = node {
                tell(&node, &disconnect(circuit)).await;
            }
        }
    }

    async fn forward(&self, connection: &Connection) {
        let mut old = Vec::new();
        while let Ok(datagram) = connection.read_datagram().await {
            let circuit = u32::from_be_bytes(datagram[..4].try_into().unwrap());
            let Some(ends) = self.circuits.lock().unwrap().get(circuit as usize).cloned().flatten() else { continue };
            let to = {
                let nodes = self.nodes.lock().unwrap();
                let other = |end: &&String| {
                    nodes.get(*end).is_some_and(|node| node.connection.stable_id() != connection.stable_id())
                };
                ends.iter().find(other).and_then(|end| nodes.get(end)).cloned()
            };
            let Some(to) = to else { continue };
            let manner = self.manner.lock().unwrap().clone();
            match manner {
                Manner::Swallow => continue,
                Manner::End if fastrand::u8(..) == 0 => {
                    self.end(circuit).await;
                    continue;
                }
                Manner::Replay => {
                    let _ = to.connection.send_datagram_wait(datagram.clone()).await;
                    old.push(datagram.clone());
                    let again: Bytes = old[fastrand::usize(..old.len())].clone();
                    let _ = to.connection.send_datagram_wait(again).await;
                }
                Manner::End | Manner::Misroute(_) => {}
            }
            let _ = to.connection.send_datagram_wait(datagram).await;
        }
    }
}

/// Gone is as good.
async fn tell(node: &FakeNode, message: &Bytes) {
    let _ = node.send.lock().await.write_all(message).await;
}

/// Polls until it holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
