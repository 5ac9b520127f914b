#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;

use macula_peer_core::nat::NatProfile;
use macula_peer_core::proto::control::OPENER;
use macula_peer_core::proto::packet::{Half, Joiner, Packet};
use macula_peer_core::proto::signal::Role;
use macula_peer_core::types::Secret;
use macula_peer_testkit::quic;
use macula_peer_wire::{Limits, VERSION};
use quinn::{Endpoint, TransportConfig, VarInt};
use tokio::task::JoinSet;

use super::super::testing::responder;
use super::*;
use crate::identity::realm_proof;

const PATIENCE: Duration = Duration::from_secs(20);
const ALPN: &str = "macula-peer/1";

/// A relay at a real endpoint, which takes the name that a client asks for as its key.
struct Running {
    relay: Arc<Relay>,
    address: SocketAddr,
    tasks: JoinSet<()>,
}

/// Where the shares of keys and addresses are not what is looked at: all nodes are at one address.
fn unshared() -> RelayConfig {
    RelayConfig { key_share: 100, address_share: 100, ..RelayConfig::default() }
}

fn running(config: RelayConfig) -> Running {
    running_with(config, transport())
}

fn running_with(config: RelayConfig, transport: TransportConfig) -> Running {
    let relay = Relay::new(config, responder(), Arc::default());
    let tls = quic::server_config(&[ALPN.into()], transport).unwrap();
    let endpoint = Endpoint::server(tls, "127.0.0.1:0".parse().unwrap()).unwrap();
    let address = endpoint.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(accept(relay.clone(), endpoint));
    Running { relay, address, tasks }
}

async fn accept(relay: Arc<Relay>, endpoint: Endpoint) {
    let mut connections = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        let relay = relay.clone();
        connections.spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let mut streams = JoinSet::new();
            while let Ok((send, mut receive)) = connection.accept_bi().await {
                let (relay, connection) = (relay.clone(), connection.clone());
                streams.spawn(async move {
                    let mut frames = Reassembler::new(Limits::default());
                    let opener = loop {
                        if let Some(frame) = frames.next_frame().unwrap() {
                            break frame;
                        }
                        let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await else { return };
                        frames.push(chunk.bytes);
                    };
                    assert_eq!(opener.type_id(), OPENER);
                    let remote = Remote::fixed(connection.remote_address());
                    let owner = key_of(&connection);
                    let opener = Opener { connection: connection.clone(), remote, owner, place: None };
                    relay.serve(opener, send, receive, frames).await;
                });
            }
        });
    }
}

fn key_of(connection: &Connection) -> Fingerprint {
    let data = connection.handshake_data().unwrap().downcast::<quinn::crypto::rustls::HandshakeData>().unwrap();
    let mut key = [0; 32];
    for (to, from) in key.iter_mut().zip(data.server_name.unwrap().bytes()) {
        *to = from;
    }
    key.into()
}

/// Without a search for a larger MTU, so that what fits does not change.
fn transport() -> TransportConfig {
    let mut transport = quic::transport(100, 0);
    transport.mtu_discovery_config(None).initial_mtu(1452);
    transport
}

async fn connect(address: SocketAddr, key: &str) -> Connection {
    connect_with(address, key, transport()).await
}

async fn connect_with(address: SocketAddr, key: &str, transport: TransportConfig) -> Connection {
    connect_from(1, address, key, transport).await
}

/// From one of the addresses of this host.
async fn connect_from(host: u8, address: SocketAddr, key: &str, transport: TransportConfig) -> Connection {
    let endpoint = Endpoint::client(([127, 0, 0, host], 0).into()).unwrap();
    let config = quic::client_config(ALPN, transport).unwrap();
    endpoint.connect_with(config, address, key).unwrap().await.unwrap()
}

/// A node's control stream.
struct Node {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    frames: Reassembler,
}

impl Node {
    async fn open(connection: &Connection) -> Self {
        let (mut send, receive) = connection.open_bi().await.unwrap();
        send.write_all(&[VERSION, OPENER, 0, 0, 0, 0, 0, 0]).await.unwrap();
        Self { connection: connection.clone(), send, receive, frames: Reassembler::new(LIMITS) }
    }

    /// Registered as `name` with a key of that name.
    async fn registered(running: &Running, name: &str) -> Self {
        let mut node = Self::open(&connect(running.address, name).await).await;
        assert!(matches!(node.register(name).await, FromRelay::Registered { .. }));
        node
    }

    async fn register(&mut self, name: &str) -> FromRelay {
        self.say(connect_as(name)).await;
        self.hear().await
    }

    async fn circuit_to(&mut self, name: &str) -> u32 {
        match self.request(name).await {
            Ok(circuit) => circuit,
            Err(error) => panic!("no circuit to {name}: {error:?}"),
        }
    }

    async fn request(&mut self, name: &str) -> Result<u32, Refusal> {
        let asked = id(format!("to {name}"));
        self.say(FromNode::RelayRequest { session_id: asked.clone(), target_id: id(name) }).await;
        match self.hear().await {
            FromRelay::Opened { session_id, circuit } if session_id == asked => Ok(circuit),
            FromRelay::NotOpened { session_id, error } if session_id == asked => Err(error),
            other => panic!("{other:?}"),
        }
    }

    async fn say(&mut self, message: FromNode) {
        self.say_bytes(&message.encode()).await;
    }

    async fn say_bytes(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.send.write_all(bytes)).await.unwrap().unwrap();
    }

    async fn hear(&mut self) -> FromRelay {
        self.hear_or_end().await.expect("the stream goes on")
    }

    /// `Err`: the stream ended, was reset with a code, or the connection is gone.
    async fn hear_or_end(&mut self) -> Result<FromRelay, Option<VarInt>> {
        loop {
            if let Some(frame) = self.frames.next_frame().unwrap() {
                return Ok(FromRelay::decode(&frame).unwrap());
            }
            match timeout(PATIENCE, self.receive.read_chunk(usize::MAX, true)).await.expect("heard in time") {
                Ok(Some(chunk)) => self.frames.push(chunk.bytes),
                Err(quinn::ReadError::Reset(code)) => return Err(Some(code)),
                Ok(None) | Err(_) => return Err(None),
            }
        }
    }

    /// How the stream ends, whatever is said before.
    async fn end(&mut self) -> Option<VarInt> {
        loop {
            if let Err(code) = self.hear_or_end().await {
                return code;
            }
        }
    }

    async fn send_packet(&self, circuit: u32, bytes: impl Into<Bytes>) {
        self.send_packets([Packet { circuit, form: Form::Whole, bytes: bytes.into() }.encode()]).await;
    }

    async fn send_packets(&self, datagrams: impl IntoIterator<Item = Bytes>) {
        for datagram in datagrams {
            timeout(PATIENCE, self.connection.send_datagram_wait(datagram)).await.unwrap().unwrap();
        }
    }

    async fn datagram(&self) -> Bytes {
        timeout(PATIENCE, self.connection.read_datagram()).await.expect("a datagram in time").unwrap()
    }

    async fn packet(&self, joiner: &mut Joiner) -> (u32, Bytes) {
        loop {
            let packet = parse(self.datagram().await).expect("a packet");
            if let Some(whole) = joiner.push(packet, Instant::now()) {
                return whole;
            }
        }
    }
}

fn id(name: impl AsRef<str>) -> Id {
    Id::new(name.as_ref().as_bytes().to_vec()).unwrap()
}

fn connect_as(name: &str) -> FromNode {
    FromNode::Connect { node_id: id(name), proof: None, successions: Vec::new() }
}

fn request(session: &str, target: &str) -> FromNode {
    FromNode::RelayRequest { session_id: id(session), target_id: id(target) }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn of(counts: &[(&'static str, u64)], name: &str) -> u64 {
    counts.iter().find(|(known, _)| *known == name).unwrap().1
}

fn refused(error: Refusal) -> FromRelay {
    FromRelay::Refused { error }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_registered_and_told_its_address() {
    let running = running(RelayConfig::default());
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quic::client_config(ALPN, transport()).unwrap();
    let connection = endpoint.connect_with(config, running.address, "a").unwrap().await.unwrap();
    let mut node = Node::open(&connection).await;
    let address = endpoint.local_addr().unwrap();
    let FromRelay::Registered { address: seen_at, .. } = node.register("a").await else { panic!("registered") };
    assert_eq!(seen_at, address);
    assert_eq!(running.relay.stats().registrations, 1);
    node.send.finish().unwrap();
    assert_eq!(node.hear_or_end().await, Err(None));
    assert_eq!(running.relay.stats().registrations, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_with_the_opener_is_read_too_and_so_is_what_comes_byte_by_byte() {
    let running = running(RelayConfig::default());
    let mut together = vec![VERSION, OPENER, 0, 0, 0, 0, 0, 0];
    together.extend_from_slice(&connect_as("a").encode());
    together.extend_from_slice(&request("1", "b").encode());
    let connection = connect(running.address, "a").await;
    let (mut send, receive) = connection.open_bi().await.unwrap();
    send.write_all(&together).await.unwrap();
    let mut node = Node { connection, send, receive, frames: Reassembler::new(LIMITS) };
    assert!(matches!(node.hear().await, FromRelay::Registered { .. }));
    let error = Refusal::NotRegistered;
    assert_eq!(node.hear().await, FromRelay::NotOpened { session_id: id("1"), error });
    for byte in request("2", "b").encode() {
        node.say_bytes(&[byte]).await;
        yield_now().await;
    }
    assert_eq!(node.hear().await, FromRelay::NotOpened { session_id: id("2"), error });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_id_is_refused_to_another_key_also_in_the_grace_period() {
    let grace = Duration::from_millis(300);
    let running = running(RelayConfig { grace, ..RelayConfig::default() });
    let owner = Node::registered(&running, "a").await;
    let thief = connect(running.address, "thief").await;
    assert_eq!(Node::open(&thief).await.register("a").await, refused(Refusal::NodeIdTaken));

    let gone = Instant::now();
    owner.connection.close(0u8.into(), b"");
    until("the registration ends", || running.relay.stats().registrations == 0).await;
    let freed = timeout(PATIENCE, async {
        while Node::open(&thief).await.register("a").await == refused(Refusal::NodeIdTaken) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        gone.elapsed()
    });
    assert!(freed.await.unwrap() >= grace);
    assert!(of(&running.relay.stats().refused, "node_id_taken") >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_replaces_its_registration() {
    let running = running(RelayConfig::default());
    let mut old = Node::registered(&running, "a").await;
    let mut other = Node::registered(&running, "b").await;
    let circuit = other.circuit_to("a").await;
    let new = Node::registered(&running, "a").await;
    assert_eq!(old.hear_or_end().await, Ok(refused(Refusal::TakenOver)));
    assert_eq!(old.hear_or_end().await, Err(None));
    assert_eq!(other.hear().await, FromRelay::Disconnect { circuit, reason: Reason::Gone });
    assert_eq!(running.relay.stats().registrations, 2);

    let circuit = other.circuit_to("a").await;
    other.send_packet(circuit, "to the new one").await;
    assert_eq!(new.packet(&mut Joiner::default()).await, (circuit, "to the new one".into()));
}

/// Sends packets of `len` bytes in flights of 16, and checks that each comes whole and in its turn.
async fn carries(from: &Node, to: &Node, circuit: u32, len: usize, split: Option<usize>) {
    let (mut splitter, mut joiner) = (Splitter::default(), Joiner::default());
    let numbered = |n: usize| -> Vec<u8> { n.to_be_bytes().into_iter().cycle().take(len).collect() };
    for flight in 0..20 {
        let flight = flight * 16..(flight + 1) * 16;
        for n in flight.clone() {
            match splitter.fit(circuit, &numbered(n), split.unwrap_or(usize::MAX), SplitBy::Sender) {
                Fit::Whole(datagram) => from.send_packets([datagram]).await,
                Fit::Halves(halves) => from.send_packets(halves).await,
                Fit::TooLarge => panic!("too large"),
            }
        }
        for n in flight {
            assert_eq!(to.packet(&mut joiner).await, (circuit, numbered(n).into()));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_pass_both_ways_intact_and_in_order() {
    let running = running(RelayConfig { bandwidth: 1 << 30, ..RelayConfig::default() });
    let mut a = Node::registered(&running, "a").await;
    let b = Node::registered(&running, "b").await;
    let circuit = a.circuit_to("b").await;
    carries(&a, &b, circuit, 1200, None).await;
    carries(&b, &a, circuit, 1200, None).await;
    carries(&b, &a, circuit, 1, None).await;
    let stats = running.relay.stats();
    assert_eq!((stats.forwarded_packets, stats.circuits, stats.stray), (3 * 320, 1, 0));
    assert_eq!(stats.forwarded_bytes, 320 * (1205 + 1205 + 6));
    assert!(stats.dropped.iter().all(|&(_, n)| n == 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_packet_that_does_not_fit_on_the_way_to_or_from_the_relay_is_cut_in_two() {
    let mut narrow = transport();
    narrow.initial_mtu(1200);
    // What the relay sends is narrow, what the nodes send is not.
    let running = running_with(RelayConfig { bandwidth: 1 << 30, ..RelayConfig::default() }, narrow);
    let mut a = Node::registered(&running, "a").await;
    let b = Node::registered(&running, "b").await;
    let circuit = a.circuit_to("b").await;
    carries(&a, &b, circuit, 1200, None).await;
    assert_eq!(running.relay.stats().forwarded_packets, 2 * 320, "each in two");
    carries(&b, &a, circuit, 1000, None).await;
    assert_eq!(running.relay.stats().forwarded_packets, 3 * 320, "these fit");
    // Cut by their sender: they pass as they are.
    carries(&b, &a, circuit, 1200, Some(1160)).await;
    assert_eq!(running.relay.stats().forwarded_packets, 5 * 320);
}

/// Two nodes that are told of each other, under this id.
async fn brought_together(a: &mut Node, b: &mut Node, session: &str, target: &str) {
    let target_id = id(target);
    a.say(FromNode::PunchRequest { session_id: id(session), target_id }).await;
    for (node, role) in [(a, Role::Initiator), (b, Role::Responder)] {
        match node.hear().await {
            FromRelay::PunchCoordinate(told) => assert_eq!((told.session_id, told.role), (id(session), role)),
            other => panic!("{other:?}"),
        }
    }
}

async fn described(running: &Running, name: &str) -> Node {
    let mut node = Node::registered(running, name).await;
    node.say(FromNode::Describe { profile: NatProfile::default(), candidates: Vec::new() }).await;
    // Once it is answered, the relay has heard what came before.
    assert_eq!(node.request("nobody").await, Err(Refusal::NotRegistered));
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_hears_at_once_how_the_others_attempt_went_and_nobody_else_has_a_say() {
    let running = running(RelayConfig::default());
    let mut a = described(&running, "a").await;
    let mut b = described(&running, "b").await;
    let mut c = described(&running, "c").await;
    let over = |session, result| FromNode::PunchResult { session_id: id(session), result };
    let told = |session, result| FromRelay::PunchResult { session_id: id(session), result };

    brought_together(&mut a, &mut b, "1", "b").await;
    c.say(over("1", Err(PunchFailure::Busy))).await;
    c.say(over("1", Ok(()))).await;
    assert_eq!(c.request("nobody").await, Err(Refusal::NotRegistered));
    // It does not decide.
    b.say(over("1", Ok(()))).await;
    b.say(over("1", Err(PunchFailure::NotAllowed))).await;
    assert_eq!(a.hear().await, told("1", Err(PunchFailure::NotAllowed)), "only that");
    assert_eq!(running.relay.stats().punched, 0);

    brought_together(&mut b, &mut a, "2", "a").await;
    b.say(over("2", Err(PunchFailure::Interrupted))).await;
    assert_eq!(a.hear().await, told("2", Err(PunchFailure::Interrupted)));
    brought_together(&mut a, &mut b, "3", "b").await;
    a.say(over("3", Ok(()))).await;
    // No more is said of what is over.
    a.say(over("3", Err(PunchFailure::TimedOut))).await;
    assert_eq!(b.hear().await, told("3", Ok(())));
    b.say(over("3", Err(PunchFailure::TimedOut))).await;
    for (node, name) in [(&mut a, "b"), (&mut b, "a"), (&mut c, "a")] {
        node.circuit_to(name).await;
    }
    assert_eq!(running.relay.stats().punched, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_of_somebody_elses_circuit_are_dropped() {
    let running = running(RelayConfig::default());
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    let mut c = Node::registered(&running, "c").await;
    let [theirs, own] = [a.circuit_to("b").await, c.circuit_to("b").await];
    c.send_packet(theirs, "forged").await;
    c.send_packet(own, "honest").await;
    assert_eq!(b.packet(&mut Joiner::default()).await, (own, "honest".into()));
    assert_eq!(running.relay.stats().stray, 1);

    // Nor can it end it.
    c.say(FromNode::Disconnect { circuit: theirs, reason: Reason::Closed }).await;
    c.say(FromNode::Disconnect { circuit: own, reason: Reason::Closed }).await;
    assert_eq!(b.hear().await, FromRelay::Disconnect { circuit: own, reason: Reason::Closed });
    a.send_packet(theirs, "still there").await;
    assert_eq!(b.packet(&mut Joiner::default()).await, (theirs, "still there".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_ends_a_circuit_and_the_other_one_hears_of_it() {
    let running = running(RelayConfig::default());
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    for closer in 0..2 {
        let circuit = a.circuit_to("b").await;
        let (from, to) = if closer == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        from.say(FromNode::Disconnect { circuit, reason: Reason::Closed }).await;
        assert_eq!(to.hear().await, FromRelay::Disconnect { circuit, reason: Reason::Closed });
        assert_eq!(running.relay.stats().circuits, 0);
        to.send_packet(circuit, "late").await;
        until("a packet of an ended circuit is dropped", || running.relay.stats().stray == closer + 1).await;
        // Said too late it does no harm.
        to.say(FromNode::Disconnect { circuit, reason: Reason::Closed }).await;
    }
    assert!(matches!(a.request("b").await, Ok(2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_lost_ends_its_circuits() {
    let running = running(RelayConfig::default());
    let mut b = Node::registered(&running, "b").await;
    for graceful in [true, false] {
        let mut a = Node::registered(&running, "a").await;
        let mut circuits = [a.circuit_to("b").await, b.circuit_to("a").await];
        if graceful {
            a.send.finish().unwrap();
        } else {
            a.connection.close(0u8.into(), b"");
        }
        let mut ended = [0; 2];
        for ended in &mut ended {
            let FromRelay::Disconnect { circuit, reason: Reason::Gone } = b.hear().await else { panic!("not gone") };
            *ended = circuit;
        }
        ended.sort();
        circuits.sort();
        assert_eq!(ended, circuits);
        assert_eq!(running.relay.stats().circuits, 0);
    }
    assert_eq!(b.request("a").await, Err(Refusal::NotRegistered));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_aborted_ends_its_registration() {
    let mut running = running(RelayConfig::default());
    let mut a = Node::registered(&running, "a").await;
    let _b = Node::registered(&running, "b").await;
    a.circuit_to("b").await;
    running.tasks.shutdown().await;
    until("nothing is left", || running.relay.stats().registrations == 0).await;
    assert_eq!(running.relay.stats().circuits, 0);
    assert!(lock(&running.relay.state).served.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_limit_of_requests_has_its_name() {
    let config =
        RelayConfig { max_registrations: 4, max_sessions: 3, max_sessions_per_node: 2, accept_rate: 6, ..unshared() };
    let running = running(config);
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    let mut c = Node::registered(&running, "c").await;
    let _d = Node::registered(&running, "d").await;
    let late = connect(running.address, "e").await;
    assert_eq!(Node::open(&late).await.register("e").await, refused(Refusal::Registrations));
    // Some more are let through while these are asked for.
    let mut asked = 0;
    while Node::open(&late).await.register("e").await != refused(Refusal::AcceptRate) {
        asked += 1;
        assert!(asked < 100);
    }

    assert_eq!(a.request("nobody").await, Err(Refusal::NotRegistered));
    assert_eq!(a.request("a").await, Err(Refusal::NotRegistered));
    a.circuit_to("b").await;
    a.circuit_to("b").await;
    assert_eq!(a.request("c").await, Err(Refusal::SessionsPerNode));
    assert_eq!(c.request("b").await, Err(Refusal::SessionsPerNode));
    b.circuit_to("d").await;
    assert_eq!(c.request("d").await, Err(Refusal::Sessions));
    assert_eq!(b.request("d").await, Err(Refusal::Sessions));
    let stats = running.relay.stats();
    assert_eq!((stats.registrations, stats.circuits), (4, 3));
    for (name, n) in [("not_registered", 2), ("sessions_per_node", 2), ("sessions", 2)] {
        assert_eq!(of(&stats.refused, name), n, "{name}");
    }
    assert!(of(&stats.refused, "accept_rate") > 0 && of(&stats.refused, "registrations") > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_proves_that_it_knows_the_realms_secret() {
    let running =
        running(RelayConfig { realm_secret: Some(Secret::new(b"secret".to_vec())), ..RelayConfig::default() });
    let connection = connect(running.address, "a").await;
    let proof = |connection: &Connection, secret: &[u8], name: &str| {
        Some(realm_proof(connection, secret, name.as_bytes()).unwrap())
    };
    let elsewhere = connect(running.address, "a").await;
    let wrong = [
        None,
        proof(&connection, b"guess", "a"),
        proof(&connection, b"secret", "another"),
        proof(&elsewhere, b"secret", "a"),
    ];
    for proof in wrong {
        let mut node = Node::open(&connection).await;
        node.say(FromNode::Connect { node_id: id("a"), proof, successions: Vec::new() }).await;
        assert_eq!(node.hear().await, refused(Refusal::Realm));
        assert_eq!(node.hear_or_end().await, Err(None));
    }
    let mut node = Node::open(&connection).await;
    node.say(FromNode::Connect {
        node_id: id("a"),
        proof: proof(&connection, b"secret", "a"),
        successions: Vec::new(),
    })
    .await;
    assert!(matches!(node.hear().await, FromRelay::Registered { .. }));
    assert_eq!(of(&running.relay.stats().refused, "realm"), 4);
}

/// What the sender of 100 KB in packets of 1,000 bytes is told, and that it is told no more.
async fn told_of(limit: Limit, config: RelayConfig) -> RelayStats {
    let running = running(config);
    let mut a = Node::registered(&running, "a").await;
    let _b = Node::registered(&running, "b").await;
    let circuit = a.circuit_to("b").await;
    let started = Instant::now();
    for _ in 0..100 {
        a.send_packet(circuit, vec![0; 1000]).await;
    }
    assert_eq!(a.hear().await, FromRelay::Dropped { circuit, limit });
    let all = || {
        let stats = running.relay.stats();
        stats.forwarded_packets + stats.dropped.iter().map(|(_, n)| n).sum::<u64>()
    };
    until("every packet is counted", || all() == 100).await;
    a.say(request("1", "nobody")).await;
    let mut more = 0;
    while a.hear().await == (FromRelay::Dropped { circuit, limit }) {
        more += 1;
    }
    assert!(more <= started.elapsed().as_secs(), "told {more} times more");
    running.relay.stats()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_packet_that_is_too_long_is_dropped() {
    let stats = told_of(Limit::PacketSize, RelayConfig { max_packet: 999, ..RelayConfig::default() }).await;
    assert_eq!(of(&stats.dropped, "packet_size"), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_beyond_the_bandwidth_is_dropped() {
    let stats = told_of(Limit::Bandwidth, RelayConfig { bandwidth: 1, ..RelayConfig::default() }).await;
    assert_eq!(of(&stats.dropped, "bandwidth"), 100 - (64 << 10) / 1005);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_queue_has_no_room_for_is_dropped() {
    let stats = told_of(Limit::PacketQueue, RelayConfig { packet_queue: 1000, ..RelayConfig::default() }).await;
    assert_eq!(of(&stats.dropped, "packet_queue"), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_acknowledges_nothing_does_not_fill_the_relays_memory() {
    let config = RelayConfig { bandwidth: 1 << 30, packet_queue: 20_000, ..RelayConfig::default() };
    let running = running(config);
    let mut a = Node::registered(&running, "a").await;
    // A runtime of its own, so that it can be stopped like a process.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address = running.address;
    let mut b = runtime.spawn(async move { Node::open(&connect(address, "b").await).await }).await.unwrap();
    assert!(matches!(b.register("b").await, FromRelay::Registered { .. }));
    let circuit = a.circuit_to("b").await;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    runtime.spawn(async move { stopped.recv().is_ok() });
    let registration = lock(&running.relay.state).registrations.values().max_by_key(|r| r.generation).unwrap().clone();
    let mut most = 0;
    for _ in 0..2000 {
        a.send_packet(circuit, vec![0; 1000]).await;
        most = max(most, registration.queue - registration.connection.datagram_send_buffer_space());
    }
    let limit = Limit::PacketQueue;
    assert_eq!(a.hear().await, FromRelay::Dropped { circuit, limit });
    assert!((10_000..=20_000).contains(&most), "{most} bytes were queued");
    drop(stop);
    runtime.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_registrations_leave_the_tables_bounded() {
    let config = RelayConfig { max_registrations: 100, accept_rate: 1_000_000, ..unshared() };
    let running = running(config);
    let mut nodes = Vec::new();
    for n in 0..110 {
        let node = Node::open(&connect(running.address, "a").await).await;
        nodes.push((n, node));
    }
    let mut attempts = JoinSet::new();
    for (n, mut node) in nodes {
        attempts.spawn(async move {
            let mut registered = None;
            for attempt in 0..91 {
                match node.register(&format!("{n}-{attempt}")).await {
                    FromRelay::Registered { .. } => {
                        registered = Some(node);
                        break;
                    }
                    other => assert_eq!(other, refused(Refusal::Registrations)),
                }
                node = Node::open(&node.connection).await;
            }
            registered
        });
    }
    let mut registered = Vec::new();
    while let Some(node) = attempts.join_next().await {
        registered.extend(node.unwrap());
    }
    assert_eq!(registered.len(), 100);
    assert_eq!(running.relay.stats().registrations, 100);
    // Those that are there keep on asking under other names.
    let mut asking = JoinSet::new();
    for (n, mut node) in registered.into_iter().enumerate() {
        asking.spawn(async move {
            for attempt in 0..91 {
                node.send.finish().unwrap();
                node.end().await;
                // The name that it gives up takes a share for as long as it had it: milliseconds.
                let until = Instant::now() + PATIENCE;
                loop {
                    node = Node::open(&node.connection).await;
                    match node.register(&format!("{n}+{attempt}")).await {
                        FromRelay::Registered { .. } => break,
                        other => assert_eq!(other, refused(Refusal::Registrations)),
                    }
                    assert!(Instant::now() < until);
                }
            }
            node
        });
    }
    let mut kept = Vec::new();
    while let Some(node) = asking.join_next().await {
        kept.push(node.unwrap());
        assert!(running.relay.stats().registrations <= 100);
    }
    assert_eq!(running.relay.stats().registrations, 100);
    let state = lock(&running.relay.state);
    assert_eq!((state.registrations.len(), state.served.len()), (100, 100));
}

/// Four hostile keys at two addresses do anything at random, whose shares are more than half of everything. An honest node
/// on another address comes and goes, and always gets its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_honest_node_gets_its_share_whatever_hostile_ones_do() {
    let config = RelayConfig {
        max_registrations: 20,
        max_sessions: 20,
        max_sessions_per_node: 10,
        accept_rate: 500,
        key_share: 20,
        address_share: 30,
        grace: Duration::from_millis(200),
        ..RelayConfig::default()
    };
    let running = running(config);
    let mut anchor = Node::open(&connect_from(9, running.address, "anchor", transport()).await).await;
    assert!(matches!(anchor.register("anchor").await, FromRelay::Registered { .. }));
    let mut hostile = JoinSet::<()>::new();
    for n in 0..4u64 {
        let address = running.address;
        hostile.spawn(async move {
            let mut random = fastrand::Rng::with_seed(n);
            loop {
                misbehave(address, n, &mut random).await;
            }
        });
    }
    let relay = &running.relay;
    let refusals = || relay.stats().refused.iter().map(|(_, n)| n).sum::<u64>();
    until("they have begun", || refusals() > 100).await;
    let told = tokio::spawn(async move { while anchor.hear_or_end().await.is_ok() {} });
    let connection = connect_from(8, running.address, "honest", transport()).await;
    for round in 0..30 {
        let begun = Instant::now();
        let mut node = Node::open(&connection).await;
        assert!(matches!(node.register("honest").await, FromRelay::Registered { .. }), "round {round}");
        let circuits = [node.circuit_to("anchor").await, node.circuit_to("anchor").await];
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        node.say(FromNode::Disconnect { circuit: circuits[0], reason: Reason::Closed }).await;
        let stats = relay.stats();
        assert!(stats.registrations <= 20 && stats.circuits <= 20, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.send.finish().unwrap();
        node.end().await;
    }
    assert_eq!(hostile.len(), 4, "they went on");
    hostile.shutdown().await;
    connection.close(0u8.into(), b"");
    until("all are gone but the anchor", || relay.stats().registrations == 1).await;
    until("and all circuits", || relay.stats().circuits == 0).await;
    told.abort();
}

/// Does some of what a node may say, and some of what it may not, as several nodes with one key.
async fn misbehave(address: SocketAddr, n: u64, random: &mut fastrand::Rng) {
    let (host, key) = (2 + (n % 2) as u8, format!("hostile-{n}"));
    let mut nodes: Vec<Node> = Vec::new();
    for _ in 0..random.usize(1..60) {
        let name = format!("name {}", random.u8(..30));
        match random.u8(..8) {
            0..3 => {
                let mut node = Node::open(&connect_from(host, address, &key, transport()).await).await;
                let name = if random.u8(..4) == 0 { "anchor" } else { &name };
                if let FromRelay::Registered { .. } = node.register(name).await {
                    nodes.push(node);
                }
            }
            3 if !nodes.is_empty() => {
                let mut node = nodes.swap_remove(random.usize(..nodes.len()));
                // Gone is as good, here and below.
                let _ = node.send.finish();
            }
            _ if !nodes.is_empty() => {
                let at = random.usize(..nodes.len());
                let node = &mut nodes[at];
                let said = match random.u8(..10) {
                    0 => FromNode::Disconnect { circuit: random.u32(..60), reason: Reason::Closed },
                    1 => connect_as(&name),
                    2..6 => request("s", "anchor"),
                    _ => request("s", &name),
                };
                let _ = node.send.write_all(&said.encode()).await;
                let packet = Packet { circuit: random.u32(..30), form: Form::Whole, bytes: Bytes::from_static(b"x") };
                let _ = node.connection.send_datagram(packet.encode());
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_circuit_is_ended_and_a_used_one_is_not() {
    // What is used must not seem idle because this machine is busy.
    let idle_timeout = Duration::from_secs(1);
    let running = running(RelayConfig { idle_timeout, ..RelayConfig::default() });
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    // Before the relay opens them, which is when they have been used for the first time.
    let started = Instant::now();
    let [idle, used] = [a.circuit_to("b").await, a.circuit_to("b").await];
    let sending = async {
        loop {
            b.send_packet(used, "here").await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let ended = FromRelay::Disconnect { circuit: idle, reason: Reason::Idle };
    tokio::select! {
        heard = a.hear() => assert_eq!(heard, ended),
        () = sending => {}
    }
    assert!(started.elapsed() >= idle_timeout);
    assert_eq!(b.hear().await, ended);
    let ended = FromRelay::Disconnect { circuit: used, reason: Reason::Idle };
    assert_eq!((a.hear().await, b.hear().await), (ended.clone(), ended));
    assert_eq!(running.relay.stats().circuits, 0);
}

/// Connected so that the relay can write it no more than `window` bytes that it does not read.
async fn with_window(running: &Running, name: &str, window: u32) -> Node {
    let mut narrow = transport();
    narrow.stream_receive_window(window.into());
    Node::open(&connect_with(running.address, name, narrow).await).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_read_how_its_circuits_end_is_disconnected() {
    // Several circuits at a time: on a slow machine the relay could else wait for too long to write the first end before
    // there are too many.
    const AT_ONCE: usize = 8;
    let running = running(RelayConfig { idle_timeout: Duration::from_millis(20), ..unshared() });
    let mut silent = with_window(&running, "silent", 200).await;
    silent.say(connect_as("silent")).await;
    let mut a = Node::registered(&running, "a").await;
    let deadline = Instant::now() + PATIENCE;
    let (mut ended, mut refused) = (0, false);
    while !refused {
        a.say_bytes(&request("1", "silent").encode().repeat(AT_ONCE)).await;
        let mut left = AT_ONCE;
        while left > 0 {
            match a.hear().await {
                FromRelay::Opened { .. } => {}
                FromRelay::Disconnect { reason: Reason::Idle | Reason::Gone, .. } => {
                    (ended, left) = (ended + 1, left - 1)
                }
                FromRelay::NotOpened { error: Refusal::NotRegistered, .. } => (refused, left) = (true, left - 1),
                other => panic!("{other:?}"),
            }
        }
        assert!(Instant::now() < deadline);
    }
    assert!((MIN_NOTES..MIN_NOTES + 20 + AT_ONCE).contains(&ended), "{ended}");
    assert_eq!((running.relay.stats().unread, running.relay.stats().registrations), (1, 1));
    assert_eq!(silent.end().await, Some(TOO_SLOW.into()));
    assert!(silent.connection.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_another_node_disconnected_by_ending_circuits() {
    let running = running(RelayConfig::default());
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    let circuits = 3000;
    let mut all = Vec::new();
    for circuit in 0..circuits {
        all.extend_from_slice(&request("1", "b").encode());
        all.extend_from_slice(&FromNode::Disconnect { circuit, reason: Reason::Closed }.encode());
    }
    let mut answered = 0;
    let Node { send, receive, frames, .. } = &mut a;
    let (written, ()) = tokio::join!(send.write_all(&all), async {
        while answered < circuits {
            let chunk = timeout(PATIENCE, receive.read_chunk(usize::MAX, true)).await.unwrap().unwrap().unwrap();
            frames.push(chunk.bytes);
            while let Some(frame) = frames.next_frame().unwrap() {
                let expected = FromRelay::Opened { session_id: id("1"), circuit: answered };
                assert_eq!(FromRelay::decode(&frame), Ok(expected));
                answered += 1;
            }
        }
    });
    written.unwrap();
    for circuit in 0..circuits {
        assert_eq!(b.hear().await, FromRelay::Disconnect { circuit, reason: Reason::Closed });
    }
    assert_eq!(running.relay.stats().unread, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_reads_no_answers_has_nothing_more_done_and_goes_after_a_time() {
    let running = running(RelayConfig::default());
    let mut silent = with_window(&running, "silent", 200).await;
    silent.say(connect_as("silent")).await;
    let started = Instant::now();
    let request = request("1", "nobody").encode();
    // Until the relay reads no more: its window on the stream is what is left to fill.
    while let Ok(written) = timeout(Duration::from_secs(1), silent.send.write_all(&request)).await {
        written.unwrap();
    }
    assert!(of(&running.relay.stats().refused, "not_registered") < 2 * MIN_NOTES as u64);
    until("it is disconnected", || running.relay.stats().registrations == 0).await;
    assert!(started.elapsed() >= WRITE_TIMEOUT);
    assert_eq!(running.relay.stats().unread, 1);
    assert_eq!(silent.end().await, Some(TOO_SLOW.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_say_connect_is_let_go() {
    let running = running(RelayConfig::default());
    let connection = connect(running.address, "a").await;
    let mut node = Node::open(&connection).await;
    let started = Instant::now();
    node.say_bytes(&connect_as("a").encode()[..9]).await;
    assert_eq!(node.hear_or_end().await, Err(Some(TOO_SLOW.into())));
    assert!(started.elapsed() >= CONNECT_TIMEOUT - Duration::from_millis(100));
    assert!(lock(&running.relay.state).served.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_control_message_ends_the_stream_and_only_that() {
    let running = running(RelayConfig::default());
    let mut other = Node::registered(&running, "b").await;
    let connection = connect(running.address, "a").await;
    let connect = connect_as("a").encode();
    let request = request("1", "b").encode();
    let bad: [&[u8]; 8] = [
        b"GET / HTTP/1.1\r\n",
        // 1 MiB announced.
        &[VERSION, 0x56, 0, 0, 0, 16, 0, 0],
        &[VERSION, 0x56, 0, 0, 255, 255, 255, 255],
        &[VERSION, 0x56, 0, 0, 0, 0, 0, 1, 0xC0],
        &[VERSION, 0x56, 0, 0, 0, 0, 0, 1, 0x80],
        &[VERSION, 0x56, 0, 0, 0, 0, 0, 0],
        &[VERSION, 0xF2, 0, 0, 0, 0, 0, 0],
        &FromRelay::Opened { session_id: id("1"), circuit: 1 }.encode(),
    ];
    let mut said = 0;
    let mut ends = async |first: bool, bytes: &[u8]| {
        let mut node = Node::open(&connection).await;
        if !first {
            assert!(matches!(node.register("a").await, FromRelay::Registered { .. }));
        }
        node.say_bytes(bytes).await;
        // More than fits into any message, so that also the announced ones need not be waited for.
        let _ = node.send.write_all(&[0; 5000]).await;
        assert_eq!(node.hear_or_end().await, Ok(refused(Refusal::Malformed)), "{bytes:?}");
        assert_eq!(node.hear_or_end().await, Err(None), "{bytes:?}");
        said += 1;
    };
    for bytes in bad {
        ends(true, bytes).await;
        ends(false, bytes).await;
    }
    ends(true, &request).await;
    ends(false, &connect).await;
    assert_eq!(of(&running.relay.stats().refused, "malformed"), said);
    assert_eq!(other.request("a").await, Err(Refusal::NotRegistered));
    assert!(connection.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_has_one_control_stream_at_a_time() {
    let running = running(RelayConfig::default());
    let mut first = Node::registered(&running, "a").await;
    let mut second = Node::open(&first.connection).await;
    assert_eq!(second.hear().await, refused(Refusal::Malformed));
    assert_eq!(first.request("a").await, Err(Refusal::NotRegistered), "goes on");
    first.send.finish().unwrap();
    assert_eq!(first.hear_or_end().await, Err(None));
    let mut third = Node::open(&first.connection).await;
    assert!(matches!(third.register("a").await, FromRelay::Registered { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_that_are_garbage_do_no_harm() {
    let running = running(RelayConfig { bandwidth: 1 << 30, ..RelayConfig::default() });
    let mut a = Node::registered(&running, "a").await;
    let b = Node::registered(&running, "b").await;
    let circuit = a.circuit_to("b").await;
    let mut random = fastrand::Rng::with_seed(7);
    let (mut stray, mut passed) = (0, 0);
    for _ in 0..2000 {
        let mut datagram: Vec<u8> = (0..random.usize(0..40)).map(|_| random.u8(..)).collect();
        if random.bool() && datagram.len() > 4 {
            datagram[..4].copy_from_slice(&circuit.to_be_bytes());
            datagram[4] = random.u8(..6);
        }
        let datagram = Bytes::from(datagram);
        let legal = parse(datagram.clone())
            .is_some_and(|packet| packet.circuit == circuit && !matches!(packet.form, Form::RelayHalf(..)));
        a.send_packets([datagram.clone()]).await;
        if legal {
            passed += 1;
            assert_eq!(b.datagram().await, datagram, "as it came");
        } else if !is_padding(&datagram) {
            stray += 1;
        }
    }
    assert!(stray > 100 && passed > 100);
    until("every one is counted", || running.relay.stats().stray == stray).await;
    assert_eq!(running.relay.stats().forwarded_packets, passed);
    let half = Packet { circuit, form: Form::SenderHalf(Half::First, 1), bytes: vec![0; 751].into() };
    a.send_packets([half.encode()]).await;
    let limit = Limit::PacketSize;
    assert_eq!(a.hear().await, FromRelay::Dropped { circuit, limit }, "half of more than a packet");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_closed_ends_every_registration_and_takes_no_more() {
    let running = running(RelayConfig::default());
    let mut a = Node::registered(&running, "a").await;
    let mut b = Node::registered(&running, "b").await;
    a.circuit_to("b").await;
    running.relay.close();
    for node in [&mut a, &mut b] {
        assert_eq!(node.end().await, Some(NOT_A_RELAY.into()));
    }
    until("nothing is left", || running.relay.stats().registrations == 0).await;
    let mut late = Node::open(&a.connection).await;
    late.say(connect_as("a")).await;
    assert_eq!(late.hear_or_end().await, Err(Some(NOT_A_RELAY.into())));
}
