//! Earned addresses: what is sent to an address that a node has forged, named or claimed without having it.
//!
//! Bystanders are sockets of the test at their own addresses: whatever they receive was sent to an uninvolved host.
//! Here their addresses are also the source of the forged packets.
#![allow(clippy::print_stderr)]

use rmpv::Value;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::common::raw::{
    self, ALPN, FakeRelay, Manner, Nat, Punch, Said, Stream, bin, connect_as, describe, eventually, map, nat,
    punch_request, punch_result, registered, transport,
};
use crate::common::{PATIENCE, member_of, message, relay, send_to_node, until};
use bytes::Bytes;
use macula_peer::{Candidates, Config, Engine, HolePunching};
use macula_peer_testkit::quic::{self, Key, tokio_runtime};
use macula_peer_wire::MessageType::{Cast, Connect, Publish, PunchCoordinate, PunchResult, Reply};
use macula_peer_wire::{Limits, Reassembler};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Connection, Endpoint, EndpointConfig, Runtime as _, TokioRuntime, UdpPoller};
use tokio::time::{sleep, timeout};

/// How much more than what was received may be sent to an unproven address.
const FACTOR: usize = 3;

/// Of a ping or a pong.
const SIGNAL_LEN: usize = 35;

/// A socket of quinn's that can write a bystander's address on what it sends.
struct Forger {
    own: Arc<dyn AsyncUdpSocket>,
    bystander: UdpSocket,
    /// How many of the next packets get the bystander's address as their source.
    next: AtomicUsize,
    /// Bytes that seemed to be.
    forged: AtomicUsize,
}

impl fmt::Debug for Forger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Forger").field(&self.bystander).finish()
    }
}

impl AsyncUdpSocket for Forger {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.own.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
            return self.own.try_send(transmit);
        }
        self.forged.fetch_add(transmit.contents.len(), Ordering::SeqCst);
        self.bystander.send_to(transmit.contents, transmit.destination).map(drop)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.own.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.own.local_addr()
    }
}

impl Forger {
    /// Sends from `own`, and seems to send from an address of `bystander`. Must be called inside a runtime.
    fn new(own: Ipv4Addr, bystander: Ipv4Addr) -> Arc<Self> {
        let own = TokioRuntime.wrap_udp_socket(UdpSocket::bind((own, 0)).unwrap()).unwrap();
        let bystander = UdpSocket::bind((bystander, 0)).unwrap();
        bystander.set_nonblocking(true).unwrap();
        Arc::new(Self { own, bystander, next: AtomicUsize::new(0), forged: AtomicUsize::new(0) })
    }

    async fn dial(self: &Arc<Self>, to: &str) -> Connection {
        let runtime = Arc::new(TokioRuntime);
        let endpoint =
            Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, self.clone(), runtime).unwrap();
        let mut transport = transport();
        // What is sent is what the test says.
        transport.mtu_discovery_config(None);
        let config = quic::client_config_with_key(ALPN, transport, &quic::key().unwrap()).unwrap();
        let connecting = endpoint.connect_with(config, to.parse().unwrap(), "relay").unwrap();
        timeout(PATIENCE, connecting).await.expect("connected in time").unwrap()
    }

    fn forge(&self, packets: usize) {
        self.next.store(packets, Ordering::SeqCst);
    }

    async fn has_forged(&self) {
        eventually("it is forged", || self.next.load(Ordering::SeqCst) == 0).await;
    }

    fn forged(&self) -> usize {
        self.forged.load(Ordering::SeqCst)
    }

    /// Bytes that have come to the bystander, once nothing more does.
    fn came(&self) -> usize {
        came(&self.bystander).iter().sum()
    }
}

/// The lengths of what has come to a bystander, once nothing more does.
fn came(bystander: &UdpSocket) -> Vec<usize> {
    let (mut came, mut last, mut buffer) = (Vec::new(), Instant::now(), [0; 2000]);
    while last.elapsed() < Duration::from_millis(400) {
        match bystander.recv(&mut buffer) {
            Ok(len) => {
                came.push(len);
                last = Instant::now();
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    came
}

fn strict() -> Nat {
    nat("ei", "pd", "pp")
}

fn stop(engines: &[&Engine]) {
    engines.iter().for_each(|engine| engine.stop());
}

/// Asks for a direct path until the target knows its NAT; what is said.
async fn coordinated(control: &mut Stream, session: &str, target: &str) -> Said {
    loop {
        control.say(punch_request(session, target)).await;
        let said = answer(control, session).await;
        if said.text("error").as_deref() != Some("not_ready") {
            return said;
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// What is said of a session.
async fn answer(control: &mut Stream, session: &str) -> Said {
    loop {
        let said = control.hear().await;
        let is_about = [PunchCoordinate.id(), PunchResult.id()].contains(&said.kind);
        if is_about && said.text("session_id").as_deref() == Some(session) {
            return said;
        }
    }
}

/// Before, three nodes sent 116 kB to it.
#[test]
fn a_forged_source_address_is_sent_nothing() {
    let (relay, address) = relay(0);
    let names = ["one", "two", "three"];
    let members = names.map(|name| member_of(Config::default(), name, &[&address]).0);
    let runtime = tokio_runtime(2).unwrap();
    runtime.block_on(async {
        let forger = Forger::new(Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9));
        let connection = forger.dial(&address).await;
        let mut control = registered(&connection, "attacker").await;
        control.say(describe(&strict(), &[])).await;
        for name in names {
            let said = coordinated(&mut control, name, name).await;
            assert_eq!(said.kind, PunchCoordinate.id(), "{said:?}");
            control.say(punch_result(name, false)).await;
        }
        let before = relay.stats().relay.unwrap().punches;
        let requests: Vec<u8> = names.iter().flat_map(|name| punch_request(&format!("to {name}"), name)).collect();
        forger.forge(1);
        control.say(requests).await;
        forger.has_forged().await;
        eventually("they are told", || relay.stats().relay.unwrap().punches == before + 3).await;
        // Until then the answers go to the requester.
        let (came, forged) = (tokio::task::block_in_place(|| forger.came()), forger.forged());
        assert!(came <= FACTOR * forged, "{came} bytes for {forged}");
    });
    let [one, two, three] = &members;
    stop(&[&relay, one, two, three]);
}

/// quinn answers each with 1,200 bytes, as it takes each for the first packet of a path.
#[test]
fn many_forged_packets_draw_at_most_three_times_their_size() {
    let (relay, address) = relay(0);
    let runtime = tokio_runtime(2).unwrap();
    runtime.block_on(async {
        let forger = Forger::new(Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9));
        let connection = forger.dial(&address).await;
        let mut control = registered(&connection, "attacker").await;
        for _ in 0..100 {
            forger.forge(1);
            connection.send_datagram(Bytes::from_static(b"forged")).unwrap();
            forger.has_forged().await;
            sleep(Duration::from_millis(2)).await;
            connection.send_datagram(Bytes::from_static(b"own")).unwrap();
            sleep(Duration::from_millis(2)).await;
        }
        let (came, forged) = (tokio::task::block_in_place(|| forger.came()), forger.forged());
        assert!(forged > 2000 && came <= FACTOR * forged, "{came} bytes for {forged}");
        // The connection is where it was.
        assert!(control.circuit_to("unknown").await.is_err());
        let said = control.circuit_to("attacker").await;
        assert_eq!(said, Err("not_registered".into()));
    });
    stop(&[&relay]);
}

/// A node that shares the address a relay sees learns local addresses, and has packets sent to those it names.
#[test]
fn forging_the_address_of_a_node_reveals_none_of_its_local_addresses() {
    let (relay, address) = relay(0);
    let runtime = tokio_runtime(2).unwrap();
    runtime.block_on(async {
        let victim = raw::stranger(&address).await;
        let mut victim = registered(&victim, "victim").await;
        victim.say(describe(&strict(), &["192.168.0.2:5000"])).await;
        let forger = Forger::new(Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::LOCALHOST);
        let connection = forger.dial(&address).await;
        let mut control = registered(&connection, "attacker").await;
        let targets = ["192.168.0.1:7001", "192.168.0.1:7002", "192.168.0.1:7003"];
        control.say(describe(&strict(), &targets)).await;
        forger.forge(1);
        control.say(punch_request("forged", "victim")).await;
        forger.has_forged().await;
        let told = answer(&mut victim, "forged").await;
        assert_eq!(told.text("peer_host").as_deref(), Some("127.0.0.2"));
        assert_eq!(told.texts("candidates"), Some(vec![]));
        // It is in flight to the bystander, and is repeated.
        connection.send_datagram(Bytes::from_static(b"own")).unwrap();
        assert_eq!(answer(&mut control, "forged").await.texts("candidates"), Some(vec![]));
        control.say(punch_result("forged", false)).await;

        // A neighbour does, and has named one port of each host.
        let neighbour = raw::stranger(&address).await;
        let mut neighbour = registered(&neighbour, "neighbour").await;
        neighbour.say(describe(&strict(), &targets)).await;
        let said = coordinated(&mut neighbour, "near", "victim").await;
        assert_eq!(said.texts("candidates"), Some(vec!["192.168.0.2:5000".into()]));
        let told = answer(&mut victim, "near").await;
        assert_eq!(told.texts("candidates"), Some(vec![targets[0].into()]));
    });
    stop(&[&relay]);
}

/// A relay of the test, and where it runs.
fn fake_relay() -> (tokio::runtime::Runtime, FakeRelay) {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    (runtime, fake)
}

fn seen_at(port: u64) -> Bytes {
    map(Reply, &[("address", bin(format!("127.0.0.1:{port}")))])
}

/// Before, it got a packet a second for ever, with hole punching off too.
#[test]
fn an_address_that_a_relay_names_as_its_second_gets_a_few_packets_until_it_answers() {
    const UNHEARD_PACKETS: usize = 6;
    for hole_punching in [HolePunching::On, HolePunching::Off] {
        let (runtime, fake) = fake_relay();
        let bystander = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 9), 0)).unwrap();
        bystander.set_nonblocking(true).unwrap();
        fake.set_welcome(vec![
            ("probe_id", bin([1; 8])),
            ("probe_secret", bin([2; 32])),
            ("probe_port", Value::from(bystander.local_addr().unwrap().port())),
            ("probe_ip", bin("127.0.0.9")),
        ]);
        let config = Config { hole_punching, ..Config::default() };
        let (node, _) = member_of(config, "node", &[&fake.address]);
        let begun = Instant::now();
        let mut packets = 0;
        for port in 2000.. {
            runtime.block_on(fake.say("node", &seen_at(port)));
            packets += came(&bystander).len();
            if begun.elapsed() > Duration::from_secs(5) {
                break;
            }
        }
        assert!(packets <= UNHEARD_PACKETS, "{packets}");
        assert!(hole_punching != HolePunching::Off || packets == 0, "nothing needs them");
        stop(&[&node]);
        drop(fake);
        runtime.shutdown_background();
    }
}

/// Registers any node, tells it repeatedly that it is seen elsewhere, and reads nothing. At the end it reads what the
/// node has sent.
async fn deaf_relay(endpoint: Endpoint, times: u64) -> usize {
    let connection = endpoint.accept().await.unwrap().await.unwrap();
    // Not every stream that is opened is needed.
    let mut stream = loop {
        let mut stream = Stream::from(connection.accept_bi().await.unwrap());
        if stream.frame().await.is_ok() {
            break stream;
        }
    };
    assert_eq!(stream.frame().await.unwrap().type_id(), Connect.id());
    for n in 0..times {
        stream.say(seen_at(2000 + n)).await;
        if n % 100 == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }
    sleep(Duration::from_millis(300)).await;
    let (mut frames, mut said) = (Reassembler::new(Limits::default()), 0);
    while let Ok(Ok(Some(chunk))) = timeout(Duration::from_secs(1), stream.receive.read_chunk(4096, true)).await {
        frames.push(chunk.bytes);
        while let Some(frame) = frames.next_frame().unwrap() {
            assert_eq!(frame.type_id(), Cast.id());
            said += 1;
        }
    }
    said
}

/// Before, each was a message to every relay, and what one does not read was kept.
#[test]
fn repeated_reports_that_a_node_has_moved_are_rate_limited() {
    const TIMES: u64 = 5000;
    const AT_ONCE: usize = 8;
    let (runtime, fake) = fake_relay();
    let inside = runtime.enter();
    let mut small = transport();
    // The first frames of the node, and little more.
    small.stream_receive_window(500u32.into());
    let config = quic::server_config(&[ALPN.into()], small).unwrap();
    let endpoint = Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let deaf = endpoint.local_addr().unwrap().to_string();
    drop(inside);
    let said = runtime.spawn(deaf_relay(endpoint.clone(), TIMES));
    let (node, _) = member_of(Config::default(), "node", &[&deaf, &fake.address]);
    let said = runtime.block_on(said).unwrap();
    // Two when it registers, and knows its NAT.
    assert!(said <= AT_ONCE + 4, "{said} to the relay that does not read");
    let others = fake.said(Cast).len();
    assert!(others <= AT_ONCE + 4, "{others} to another");
    assert_eq!(node.stats().registrations.len(), 2);
    stop(&[&node]);
    drop((endpoint, fake));
    runtime.shutdown_background();
}

async fn with_key(to: &str, own: Ipv4Addr, key: &Key) -> Connection {
    let endpoint = Endpoint::client((own, 0).into()).unwrap();
    let config = quic::client_config_with_key(ALPN, transport(), key).unwrap();
    let connecting = endpoint.connect_with(config, to.parse().unwrap(), "relay").unwrap();
    timeout(PATIENCE, connecting).await.expect("connected in time").unwrap()
}

/// Without the share, no other client could look for a path to the node while the flood lasted.
#[test]
fn one_key_with_many_names_leaves_room_at_a_node() {
    let (relay, address) = relay(0);
    let (victim, _) = member_of(Config::default(), "victim", &[&address]);
    let runtime = tokio_runtime(2).unwrap();
    runtime.block_on(async {
        // One key with many names, and many keys at one address.
        let (key, mut many) = (quic::key().unwrap(), Vec::new());
        let (here, there) = (Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3));
        for n in 0..16 {
            let connections =
                [with_key(&address, here, &key).await, with_key(&address, there, &quic::key().unwrap()).await];
            for (kind, connection) in connections.into_iter().enumerate() {
                let mut control = Stream::control(&connection).await;
                let said = control.ask(connect_as(&format!("{kind} {n}"), &[])).await;
                assert!(said.text("address").is_some(), "{said:?}");
                control.say(describe(&strict(), &[])).await;
                many.push((kind, control, connection));
            }
        }
        let mut got = [0, 0];
        for (n, (kind, control, _)) in many.iter_mut().enumerate() {
            let said = coordinated(control, &format!("s{n}"), "victim").await;
            got[*kind] += usize::from(said.kind == PunchCoordinate.id());
        }
        assert_eq!(got, [2, 8]);
        let honest = raw::stranger(&address).await;
        let mut honest = registered(&honest, "honest").await;
        honest.say(describe(&strict(), &[])).await;
        let said = coordinated(&mut honest, "honest", "victim").await;
        assert_eq!(said.kind, PunchCoordinate.id(), "{said:?}");
    });
    stop(&[&victim, &relay]);
}

/// The same where the relay lets it pass.
#[test]
fn a_node_keeps_places_for_other_keys_and_addresses() {
    let (runtime, fake) = fake_relay();
    let (node, _) = member_of(Config::default(), "node", &[&fake.address]);
    let bystander = |last| {
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, last), 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let hostile: Vec<_> = (0..12).map(|_| bystander(9)).collect();
    let coordinate = |key: [u8; 32], at: &UdpSocket| {
        let punch = Punch::new().coordinate(Punch::RESPONDER, at.local_addr().unwrap(), key, &strict());
        runtime.block_on(fake.say("node", &punch));
    };
    until("it is registered", || fake.knows("node"));
    // One key, and then many at that address.
    hostile[..4].iter().for_each(|at| coordinate([1; 32], at));
    hostile[4..].iter().zip(2..).for_each(|(at, key)| coordinate([key; 32], at));
    let honest = bystander(10);
    coordinate([99; 32], &honest);
    let begun = Instant::now();
    let mut buffer = [0; 100];
    until("the other node is pinged", || honest.recv(&mut buffer.clone()).is_ok_and(|len| len == SIGNAL_LEN));
    assert!(begun.elapsed() < Duration::from_secs(2));
    let pinged: Vec<bool> = hostile.iter().map(|at| at.recv(&mut buffer).is_ok()).collect();
    // Each attempt has a task of its own, so it may be any of them.
    let count = |pinged: &[bool]| pinged.iter().filter(|pinged| **pinged).count();
    assert_eq!((count(&pinged[..4]), count(&pinged)), (2, 8), "of one key, and of one address");
    stop(&[&node]);
    drop(fake);
    runtime.shutdown_background();
}

/// Messages go on while another node forges packets.
#[test]
fn honest_nodes_are_unaffected_by_a_forger() {
    let (relay, address) = relay(0);
    let (sender, _) =
        member_of(Config { hole_punching: HolePunching::Off, ..Config::default() }, "sender", &[&address]);
    let (receiver, inbox) =
        member_of(Config { hole_punching: HolePunching::Off, ..Config::default() }, "receiver", &[&address]);
    let candidates = || Candidates { relays: vec![crate::common::endpoint(&address)], ..Candidates::default() };
    let mut n = 0;
    let mut slowest = |times: usize| {
        let mut took: Vec<Duration> = (0..times)
            .map(|_| {
                let begun = Instant::now();
                send_to_node(&sender, "receiver", candidates(), message(Publish, n, PATIENCE)).unwrap();
                n += 1;
                until("it arrives", || inbox.len() as u64 == n);
                begun.elapsed()
            })
            .collect();
        took.sort_unstable();
        took[times * 99 / 100]
    };
    slowest(20);
    let quiet = slowest(200);
    let runtime = tokio_runtime(1).unwrap();
    let (connected, wait) = std::sync::mpsc::channel();
    let forging = runtime.spawn({
        let address = address.clone();
        async move {
            let forger = Forger::new(Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9));
            let connection = forger.dial(&address).await;
            let _control = registered(&connection, "attacker").await;
            connected.send(()).unwrap();
            loop {
                forger.forge(1);
                let _ = connection.send_datagram(Bytes::from_static(b"forged"));
                sleep(Duration::from_millis(1)).await;
                forger.forge(0);
                let _ = connection.send_datagram(Bytes::from_static(b"own"));
                sleep(Duration::from_millis(1)).await;
            }
        }
    });
    wait.recv_timeout(PATIENCE).unwrap();
    let beside = slowest(200);
    forging.abort();
    eprintln!("p99 of a message: {quiet:?}, and {beside:?} beside a forger");
    assert!(beside < Duration::from_secs(1), "{quiet:?}, {beside:?}");
    assert_eq!(inbox.disorder(), None);
    let begun = Instant::now();
    let (late, _) = member_of(Config::default(), "late", &[&address]);
    assert!(begun.elapsed() < Duration::from_secs(5));
    stop(&[&sender, &receiver, &late, &relay]);
}
