//! What hostile nodes and relays can do to nodes that look for direct paths, and make them do to others.
//!
//! Bystanders are sockets of the test at their own addresses: whatever they receive was sent to an uninvolved host.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use rmpv::Value;
use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::raw::{
    self, FakeRelay, Manner, Nat, Punch, Stream, bin, describe, eventually, nat, punch_execute, punch_over,
    punch_request, punch_result, raw_frame, registered, stranger,
};
use common::{
    Inbox, PATIENCE, endpoint, engine, listener, member_of, message, node_id, over, relay, send, send_to_node, until,
};
use macula_peer::{
    Candidates, Config, Engine, Filtering, HolePunching, Listen, Mapping, Path, PunchError, PunchFailure, Registration,
    Target,
};
use macula_peer_testkit::quic::{self, Key, tokio_runtime};
use macula_peer_wire::MessageType::{Publish, PunchCoordinate, PunchRequest, PunchResult};
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, TokioRuntime};
use rcgen::PublicKeyData;
use ring::{digest, hmac};
use tokio::runtime::Runtime;
use tokio::time::timeout;

const TIMEOUT: Duration = Duration::from_secs(20);

/// Of a ping or a pong.
const SIGNAL_LEN: usize = 35;

/// What a node sends at most to one address and port in one session.
const MAX_PER_PAIR: usize = 80;

/// As often as a relay allows.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// The test that counts open files runs alone.
static FILES: RwLock<()> = RwLock::new(());

fn among_others() -> RwLockReadGuard<'static, ()> {
    FILES.read().unwrap_or_else(PoisonError::into_inner)
}

/// Sockets of one address, and what came there.
struct Bystander {
    ports: Vec<u16>,
    came: Arc<Mutex<Vec<(Instant, SocketAddr, usize)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bystander {
    fn new(ip: Ipv4Addr, sockets: usize) -> Self {
        let sockets: Vec<_> = (0..sockets).map(|_| UdpSocket::bind((ip, 0)).unwrap()).collect();
        let ports = sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
        let (came, stop): (Arc<Mutex<Vec<_>>>, Arc<AtomicBool>) = Default::default();
        let thread = thread::spawn({
            let (came, stop) = (came.clone(), stop.clone());
            sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
            move || {
                let mut buffer = [0; 2000];
                while !stop.load(Ordering::Relaxed) {
                    for socket in &sockets {
                        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                            came.lock().unwrap().push((Instant::now(), from, len));
                        }
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self { ports, came, stop, thread: Some(thread) }
    }

    fn count(&self) -> usize {
        self.came.lock().unwrap().len()
    }

    fn senders(&self) -> usize {
        self.came.lock().unwrap().iter().map(|(_, from, _)| from).collect::<HashSet<_>>().len()
    }

    /// From the first to the last that came.
    fn lasted(&self) -> Duration {
        let came = self.came.lock().unwrap();
        came.last().unwrap().0 - came[0].0
    }

    /// Waits until something has come, and nothing more does.
    fn quiet(&self) {
        let since_last = || self.came.lock().unwrap().last().map(|(at, ..)| at.elapsed());
        until("it is over", || since_last().is_some_and(|since| since > Duration::from_millis(500)));
    }

    fn longest(&self) -> usize {
        self.came.lock().unwrap().iter().map(|(_, _, len)| *len).max().unwrap_or(0)
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn unknown() -> Nat {
    nat("", "", "")
}

fn strict() -> Nat {
    nat("ei", "pd", "pp")
}

fn random() -> Nat {
    nat("pd", "pd", "rd")
}

fn refused(relay: &Engine, name: &str) -> u64 {
    relay.stats().relay.unwrap().refused.iter().find(|(known, _)| *known == name).unwrap().1
}

fn path(engine: &Engine, to: &str) -> Option<Path> {
    engine.path(&Target::Node(&node_id(to))).link.map(|link| link.path)
}

/// Ends a thread of the test, also when the test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn stop(engines: &[&Engine]) {
    engines.iter().for_each(|engine| engine.stop());
}

// ---- nodes ----

#[test]
fn a_node_can_name_only_ports_of_its_own_address_and_those_get_little() {
    let _among = among_others();
    let (relay, address) = relay(0);
    let (victim, _) = member_of(Config::default(), "victim", &[&address]);
    let [elsewhere, described, named] = [2, 1, 1].map(|last| Bystander::new(Ipv4Addr::new(127, 0, 0, last), 1));
    let runtime = tokio_runtime(2).unwrap();
    let control = runtime.block_on(async {
        let connection = stranger(&address).await;
        let mut control = registered(&connection, "hostile").await;
        let candidates = [
            format!("127.0.0.2:{}", elsewhere.ports[0]),
            format!("127.0.0.1:{}", described.ports[0]),
            "8.8.8.8:53".into(),
        ];
        control.say(describe(&unknown(), &candidates.each_ref().map(String::as_str))).await;
        told_of(&mut control, "s", "victim").await;
        control.say(punch_result("s", false)).await;

        let said = control.ask(punch_request("t", "victim")).await;
        assert_eq!(said.kind, PunchCoordinate.id(), "{said:?}");
        let mut ports = vec![53, 443, elsewhere.ports[0], named.ports[0]];
        ports.extend(30_000..30_012);
        for _ in 0..10 {
            control.say(punch_execute("t", &ports)).await;
        }
        let again = control.ask(punch_request("u", "victim")).await;
        assert_eq!(again.text("error").as_deref(), Some("in_progress"));
        (control, connection)
    });
    named.quiet();
    assert!((10..=MAX_PER_PAIR).contains(&named.count()), "{}", named.count());
    assert_eq!((named.longest(), described.count(), elsewhere.count()), (SIGNAL_LEN, 0, 0));
    drop(control);
    stop(&[&victim, &relay]);
}

/// Asks until the target knows its NAT.
async fn told_of(control: &mut Stream, session: &str, target: &str) {
    loop {
        let said = control.ask(punch_request(session, target)).await;
        match said.text("error").as_deref() {
            Some("not_ready") => tokio::time::sleep(ASK_AGAIN).await,
            None => return,
            Some(error) => panic!("{error}"),
        }
    }
}

/// Only an address that cannot belong to another host from the other node's view is passed on.
#[test]
fn a_relay_passes_on_no_address_that_a_node_claims_to_have_in_public() {
    let _among = among_others();
    let (relay, address) = relay(0);
    tokio_runtime(2).unwrap().block_on(async {
        let (one, other) = (stranger(&address).await, stranger(&address).await);
        let (mut hostile, mut honest) = (registered(&one, "hostile").await, registered(&other, "honest").await);
        let named = ["8.8.8.8:5353", "127.0.0.1:5000", "192.168.0.7:53", "224.0.0.251:5353", "192.168.0.7:5000"];
        hostile.say(describe(&unknown(), &named)).await;
        told_of_candidates(&mut honest, "hostile", &["192.168.0.7:5000"]).await;
        drop((hostile, one));
    });
    stop(&[&relay]);
}

async fn told_of_candidates(control: &mut Stream, target: &str, expected: &[&str]) {
    let mut said = control.ask(punch_request("s", target)).await;
    while said.text("error").as_deref() == Some("not_ready") {
        tokio::time::sleep(ASK_AGAIN).await;
        said = control.ask(punch_request("s", target)).await;
    }
    assert_eq!(said.texts("candidates").unwrap(), expected);
}

#[test]
fn a_flood_of_punch_requests_disturbs_no_other_node() {
    let _among = among_others();
    let (relay, address) = relay(0);
    let names: Vec<_> = (0..8).map(|n| format!("victim {n}")).collect();
    let victims: Vec<_> = names.iter().map(|name| member_of(Config::default(), name, &[&address])).collect();
    // Each question counts, also one that is answered with not_ready.
    until("all are described", || victims.iter().all(|(victim, _)| victim.nat_profile().since.is_some()));
    let bystander = Bystander::new(Ipv4Addr::LOCALHOST, 1);
    let (a, _) = member_of(Config::default(), "a", &[&address]);
    let (b, inbox) = member_of(Config::default(), "b", &[&address]);
    let done = AtomicBool::new(false);
    let begun = Instant::now();
    let asked = thread::scope(|scope| {
        let flood = scope.spawn(|| {
            tokio_runtime(1).unwrap().block_on(async {
                let connection = stranger(&address).await;
                let mut control = registered(&connection, "hostile").await;
                let mut asked = 0u64;
                while !done.load(Ordering::Relaxed) {
                    let target = &names[asked as usize % names.len()];
                    let session = asked.to_string();
                    let said = control.ask(punch_request(&session, target)).await;
                    assert!([PunchCoordinate.id(), PunchResult.id()].contains(&said.kind), "{said:?}");
                    control.say(punch_execute(&session, &bystander.ports)).await;
                    // Said, nothing more is sent.
                    if asked != 0 {
                        control.say(punch_result(&session, false)).await;
                    }
                    asked += 1;
                }
                asked
            })
        });
        let ending = Done(&done);
        // Meanwhile others meet, and talk.
        for n in 0..100 {
            send_to_node(&a, "b", over(&[&address]), message(Publish, n, TIMEOUT)).unwrap();
        }
        until("all arrived", || inbox.len() == 100);
        until("punched", || path(&a, "b") == Some(Path::HolePunch));
        until("for some seconds", || begun.elapsed() > Duration::from_secs(4));
        drop(ending);
        flood.join().unwrap()
    });
    assert_eq!(inbox.disorder(), None);
    let (seconds, punches) = (begun.elapsed().as_secs() + 1, relay.stats().relay.unwrap().punches);
    // A burst of 16, 4 a second, and the request of the others.
    assert!(asked > 200 && (17..=17 + 4 * seconds).contains(&punches), "{asked} asked, {punches} made");
    assert!(refused(&relay, "request_rate") > 100);
    bystander.quiet();
    assert!(bystander.count() as u64 <= MAX_PER_PAIR as u64 * punches, "{}", bystander.count());
    for (victim, _) in &victims {
        let state = victim.stats().registrations[0].state;
        assert_eq!(state, Registration::Registered);
        victim.stop();
    }
    stop(&[&a, &b, &relay]);
}

/// What others have a node told is no reason to let go of it.
#[test]
fn a_node_is_not_disconnected_because_of_messages_from_another() {
    let _among = among_others();
    let (relay, address) = relay(0);
    tokio_runtime(2).unwrap().block_on(async {
        let (one, other) = (stranger(&address).await, stranger(&address).await);
        let mut target = registered(&other, "target").await;
        target.say(describe(&unknown(), &[])).await;
        let mut hostile = registered(&one, "hostile").await;
        told_of(&mut hostile, "first", "target").await;
        let mut flood = punch_result("first", false).to_vec();
        for n in 0..15 {
            let session = n.to_string();
            flood.extend_from_slice(&punch_request(&session, "target"));
            for port in 0..16 {
                flood.extend_from_slice(&punch_execute(&session, &[5000 + port]));
            }
            flood.extend_from_slice(&punch_result(&session, false));
        }
        // At once: the relay has no time to write what it tells in between.
        hostile.say(flood).await;
        for _ in 0..15 {
            hostile.hear().await;
        }
        hostile.circuit_to("target").await.expect("it is still registered");
        drop((target, one, other));
    });
    assert_eq!(relay.stats().relay.unwrap().unread, 0);
    stop(&[&relay]);
}

// ---- relays ----

/// A relay of the test, and where it runs.
fn fake_relay() -> (Runtime, FakeRelay) {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    (runtime, fake)
}

/// "victim" at that relay, which others may dial too.
fn listening_at_fake(fake: &FakeRelay) -> (Engine, Arc<Inbox>, String) {
    let (victim, inbox, address) = listener(Config::default());
    victim.register(node_id("victim"), vec![endpoint(&fake.address)]);
    until("registered", || fake.knows("victim"));
    (victim, inbox, address)
}

/// A node at a relay of the test alone.
fn at_fake(fake: &FakeRelay, config: Config, name: &str) -> (Engine, Arc<Inbox>) {
    member_of(config, name, &[&fake.address])
}

#[test]
fn a_relay_that_names_a_bystander_again_and_again_makes_no_flood() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (victim, inbox, address) = listening_at_fake(&fake);
    let honest = engine(Config::default());
    let bystander = Bystander::new(Ipv4Addr::new(127, 0, 0, 3), 17);
    let named: SocketAddr = (Ipv4Addr::new(127, 0, 0, 3), bystander.ports[0]).into();
    let (begun, mut sessions, mut sent) = (Instant::now(), 0, 0);
    while begun.elapsed() < Duration::from_secs(8) {
        runtime.block_on(async {
            let punch = Punch::new();
            fake.say("victim", &punch.coordinate(Punch::RESPONDER, named, [7; 32], &unknown())).await;
            fake.say("victim", &punch_execute(punch.session, &bystander.ports[1..])).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        });
        sessions += 1;
        if sessions % 10 == 0 {
            send(&honest, &address, message(Publish, sent, TIMEOUT)).unwrap();
            sent += 1;
        }
    }
    until("others are heard", || inbox.len() as u64 == sent);
    assert_eq!(inbox.disorder(), None);
    bystander.quiet();
    // As `macula_peer_core::packet_budget` has it.
    let most = 2048 + 50 * (begun.elapsed().as_secs() as usize + 1);
    assert!((2048..=most).contains(&bystander.count()), "{} in {sessions} sessions", bystander.count());
    assert_eq!(bystander.longest(), SIGNAL_LEN);

    // The remaining budget does not keep other nodes from meeting.
    let peer = Peer::new();
    runtime.block_on(peer.meets(&fake, "victim", Punch::RESPONDER));
    assert_eq!(peer.hears().0, Punch::PING);
    stop(&[&honest, &victim]);
}

#[test]
fn an_address_of_no_host_is_sent_nothing_and_the_relay_is_told() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (node, _) = at_fake(&fake, Config::default(), "node");
    thread::scope(|scope| {
        scope.spawn(|| send_to_node(&node, "peer", over(&[&fake.address]), message(Publish, 0, TIMEOUT)));
        until("asked", || !fake.said(PunchRequest).is_empty());
        let session = fake.said(PunchRequest)[0].bytes("session_id").unwrap().to_vec();
        let punch = Punch::asked(&session);
        let nowhere = "224.0.0.251:5353".parse().unwrap();
        runtime.block_on(fake.say("node", &punch.coordinate(Punch::INITIATOR, nowhere, [7; 32], &unknown())));
        until("given up", || !fake.said(PunchResult).is_empty());
        let said = &fake.said(PunchResult)[0];
        assert_eq!((said.bytes("session_id"), said.bool("success")), (Some(&session[..]), Some(false)));
        node.stop();
    });
}

#[test]
fn a_node_with_hole_punching_off_sends_nothing() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let off = Config { hole_punching: HolePunching::Off, ..Config::default() };
    let nodes = [at_fake(&fake, off, "off"), at_fake(&fake, Config::default(), "on")];
    let bystanders =
        [4, 5].map(|last| (Ipv4Addr::new(127, 0, 0, last), Bystander::new(Ipv4Addr::new(127, 0, 0, last), 1)));
    runtime.block_on(async {
        for (name, (ip, bystander)) in ["off", "on"].into_iter().zip(&bystanders) {
            let named = (*ip, bystander.ports[0]).into();
            fake.say(name, &Punch::new().coordinate(Punch::RESPONDER, named, [7; 32], &unknown())).await;
        }
    });
    let [(_, off), (_, on)] = &bystanders;
    on.quiet();
    assert_eq!(off.count(), 0);
    until("both have said how it went", || fake.said(PunchResult).len() == 2);
    let mut said: Vec<_> = fake.said(PunchResult).iter().map(|said| said.text("error").unwrap()).collect();
    said.sort();
    assert_eq!(said, ["not_allowed", "timeout"]);
    nodes.iter().for_each(|(node, _)| node.stop());
}

fn how_it_went(engine: &Engine, to: &str) -> Option<PunchError> {
    engine.path(&Target::Node(&node_id(to))).failures.hole_punch
}

/// The session that a node asks for, and where it sends its pings.
fn begun(runtime: &Runtime, fake: &FakeRelay, node: &str, last: u8) -> (Vec<u8>, Bystander) {
    until("asked", || !fake.said(PunchRequest).is_empty());
    let session = fake.said(PunchRequest)[0].bytes("session_id").unwrap().to_vec();
    let ip = Ipv4Addr::new(127, 0, 0, last);
    let bystander = Bystander::new(ip, 1);
    let named = (ip, bystander.ports[0]).into();
    runtime.block_on(fake.say(node, &Punch::asked(&session).coordinate(Punch::INITIATOR, named, [7; 32], &unknown())));
    until("begun", || bystander.count() > 0);
    (session, bystander)
}

#[test]
fn a_stop_by_the_other_node_ends_an_attempt_at_once() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (victim, _) = at_fake(&fake, Config::default(), "victim");
    for (last, error) in [(11, None), (12, Some("not_allowed")), (13, Some("full_moon"))] {
        let (ip, punch) = (Ipv4Addr::new(127, 0, 0, last), Punch::new());
        let bystander = Bystander::new(ip, 1);
        let named = (ip, bystander.ports[0]).into();
        runtime.block_on(fake.say("victim", &punch.coordinate(Punch::RESPONDER, named, [7; 32], &unknown())));
        until("begun", || bystander.count() > 0);
        // Of another session.
        runtime.block_on(fake.say("victim", &punch_over("other", error)));
        let before = bystander.count();
        until("it goes on", || bystander.count() > before + 5);
        runtime.block_on(fake.say("victim", &punch_over(punch.session, error)));
        bystander.quiet();
        assert!(bystander.lasted() < Duration::from_millis(2500), "not to its end: {:?}", bystander.lasted());
    }
    // The other node knows.
    assert!(fake.said(PunchResult).is_empty());
    stop(&[&victim]);
}

#[test]
fn the_initiator_is_told_why() {
    let _among = among_others();
    let told = [
        ("not_allowed", PunchError::Failed(PunchFailure::NotAllowed)),
        ("busy", PunchError::Failed(PunchFailure::Busy)),
        ("both_hard", PunchError::Failed(PunchFailure::BothHard)),
        ("interrupted", PunchError::Failed(PunchFailure::Interrupted)),
        ("full_moon", PunchError::Failed(PunchFailure::Unknown)),
    ];
    for (error, expected) in told {
        let (runtime, fake) = fake_relay();
        let (node, _) = at_fake(&fake, Config::default(), "node");
        thread::scope(|scope| {
            scope.spawn(|| send_to_node(&node, "peer", over(&[&fake.address]), message(Publish, 0, TIMEOUT)));
            let (session, bystander) = begun(&runtime, &fake, "node", 14);
            runtime.block_on(fake.say("node", &punch_over(&session, Some(error))));
            bystander.quiet();
            assert!(bystander.lasted() < Duration::from_millis(2500), "not to its end: {:?}", bystander.lasted());
            until("it is told", || how_it_went(&node, "peer") == Some(expected.clone()));
            node.stop();
        });
    }
}

#[test]
fn an_attempt_ends_when_the_socket_moves_and_the_next_one_is_soon() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    fake.set_manner(Manner::Misroute("b".into()));
    let (a, _) = at_fake(&fake, Config::default(), "a");
    let (b, inbox) = at_fake(&fake, Config::default(), "b");
    send_to_node(&a, "b", over(&[&fake.address]), message(Publish, 0, TIMEOUT)).unwrap();
    let (_, _bystander) = begun(&runtime, &fake, "a", 15);
    until("relayed", || path(&a, "b").is_some());
    let moved = Instant::now();
    a.listen(Listen { port: Some(free_port()), ..Listen::default() }).unwrap();
    until("the other node is told", || !fake.said(PunchResult).is_empty());
    assert_eq!(fake.said(PunchResult)[0].text("error").as_deref(), Some("interrupted"));
    until("said", || how_it_went(&a, "b") == Some(PunchError::Failed(PunchFailure::Interrupted)));
    until("asked again", || fake.said(PunchRequest).len() == 2);
    assert!(moved.elapsed() < Duration::from_millis(2500), "the attempt went on for {:?}", moved.elapsed());
    until("it arrives", || inbox.len() == 1);
    stop(&[&a, &b]);
}

fn free_port() -> u16 {
    UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port()
}

/// The other end of a session: the relay is the test's too.
struct Peer {
    punch: Punch,
    socket: UdpSocket,
    key: Key,
}

impl Peer {
    fn new() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { punch: Punch::new(), socket, key: quic::key().unwrap() }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// Has the node told of this peer. `role` is the node's.
    async fn meets(&self, fake: &FakeRelay, node: &str, role: u8) {
        let spki = self.key.signing_key.subject_public_key_info();
        let key = digest::digest(&digest::SHA256, &spki).as_ref().try_into().unwrap();
        fake.say(node, &self.punch.coordinate(role, self.address(), key, &unknown())).await;
    }

    /// The next signal of the node, as a responder.
    fn hears(&self) -> (u8, u64) {
        let mut buffer = [0; 2000];
        loop {
            let (len, _) = self.socket.recv_from(&mut buffer).expect("a signal in time");
            if buffer[0] == 0x08 {
                return self.punch.read(&buffer[..len], Punch::RESPONDER).expect("an authentic one");
            }
        }
    }

    /// The pongs that come until the answer to a last ping does.
    fn pongs(&self, to: SocketAddr, last: u64) -> Vec<u64> {
        self.socket.send_to(&self.punch.signal(Punch::PING, Punch::INITIATOR, last), to).unwrap();
        let mut pongs = Vec::new();
        loop {
            match self.hears() {
                (Punch::PONG, nonce) if nonce == last => return pongs,
                (Punch::PONG, nonce) => pongs.push(nonce),
                _ => {}
            }
        }
    }

    /// Pings until it gets a pong, as a node that is about to connect does.
    fn is_heard(&self, to: SocketAddr) {
        assert_eq!(self.pongs(to, fastrand::u64(..)), []);
    }

    /// QUIC on the same socket. Must be called inside a runtime.
    fn quic(&self) -> Endpoint {
        let socket = self.socket.try_clone().unwrap();
        Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime)).unwrap()
    }
}

/// The connection, or `None` without an answer for a while.
async fn connects(quic: &Endpoint, to: SocketAddr, key: &Key) -> Option<Connection> {
    let config = quic::client_config_with_key(raw::ALPN, quic::transport(0, 0), key).unwrap();
    let connecting = quic.connect_with(config, to, "node").unwrap();
    timeout(Duration::from_millis(500), connecting).await.ok().map(Result::unwrap)
}

fn local(engine: &Engine) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, engine.local_address().unwrap().port()).into()
}

#[test]
fn a_ping_gets_one_pong_and_other_packets_get_none() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (victim, inbox, address) = listening_at_fake(&fake);
    let (to, peer, thief) = (local(&victim), Peer::new(), Bystander::new(Ipv4Addr::LOCALHOST, 1));
    // From another address, which the session does not know.
    let replay = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 6), 0)).unwrap();
    replay.set_nonblocking(true).unwrap();
    let honest = engine(Config::default());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let talking = scope.spawn(|| {
            let mut n = 0;
            while !done.load(Ordering::Relaxed) {
                send(&honest, &address, message(Publish, n, TIMEOUT)).unwrap();
                n += 1;
                thread::sleep(Duration::from_millis(1));
            }
            n
        });
        let ending = Done(&done);
        runtime.block_on(peer.meets(&fake, "victim", Punch::RESPONDER));
        let mut own = [0; 100];
        let (len, _) = peer.socket.recv_from(&mut own).unwrap();
        assert_eq!(peer.punch.read(&own[..len], Punch::RESPONDER).unwrap().0, Punch::PING);

        let ping = |nonce| peer.punch.signal(Punch::PING, Punch::INITIATOR, nonce);
        let mut worthless = vec![own[..len].to_vec(), peer.punch.signal(Punch::PONG, Punch::INITIATOR, 4)];
        worthless.push(peer.punch.signal(Punch::PING, Punch::RESPONDER, 5));
        worthless.push(Punch::new().signal(Punch::PING, Punch::INITIATOR, 6));
        for bit in [0, 9, 79, 143, 150, 279] {
            let mut forged = ping(7);
            forged[bit / 8] ^= 1 << (bit % 8);
            worthless.push(forged);
        }
        worthless.push([&ping(8)[..], &[0]].concat());
        worthless.push(ping(9)[..34].to_vec());
        for signal in &worthless {
            peer.socket.send_to(signal, to).unwrap();
        }
        for n in 0..20_000u32 {
            let garbage: Vec<u8> =
                [0x08, (n % 6) as u8].into_iter().chain((0..n % 80).map(|_| fastrand::u8(..))).collect();
            replay.send_to(&garbage, to).unwrap();
        }
        // What it has no room for is lost; pings are repeated.
        let first = loop {
            let nonce = fastrand::u64(..);
            peer.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            peer.socket.send_to(&ping(nonce), to).unwrap();
            let mut buffer = [0; 100];
            let mut heard = std::iter::from_fn(|| peer.socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec()));
            let pong = heard
                .find_map(|bytes| peer.punch.read(&bytes, Punch::RESPONDER).filter(|(kind, _)| *kind == Punch::PONG));
            if let Some((_, answered)) = pong {
                assert_eq!(answered, nonce);
                break nonce;
            }
        };
        peer.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(peer.pongs(to, 10), [], "one for each");
        for _ in 0..20 {
            for socket in [&peer.socket, &replay] {
                socket.send_to(&ping(first), to).unwrap();
            }
        }
        assert_eq!(peer.pongs(to, 11), [], "none for what was there before");
        let came = replay.recv_from(&mut [0; 100]).map_err(|error| error.kind());
        assert_eq!(came, Err(ErrorKind::WouldBlock), "nothing to a node that has kept it");

        // The session is over once nothing comes any more.
        peer.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        while peer.socket.recv(&mut own).is_ok() {}
        for nonce in 100..120 {
            peer.socket.send_to(&ping(nonce), to).unwrap();
        }
        assert!(peer.socket.recv(&mut own).is_err(), "it is dead");
        drop(ending);
        let n = talking.join().unwrap();
        until("all arrived", || inbox.len() as u64 == n);
    });
    assert_eq!((inbox.disorder(), thief.count()), (None, 0));
    assert_eq!(honest.stats().peers[0].dials, 1, "over one connection");
    stop(&[&honest, &victim]);
}

#[test]
fn only_the_expected_node_gets_in_where_and_when_it_is_expected() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (victim, inbox) = at_fake(&fake, Config::default(), "victim");
    let (to, peer, mute) = (local(&victim), Peer::new(), Peer::new());
    for one in [&mute, &peer] {
        runtime.block_on(one.meets(&fake, "victim", Punch::RESPONDER));
        assert_eq!(one.hears().0, Punch::PING);
    }
    peer.is_heard(to);
    let heard = Instant::now();
    runtime.block_on(async {
        let elsewhere = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(connects(&elsewhere, to, &peer.key).await.is_none(), "not from there");
        assert!(connects(&mute.quic(), to, &mute.key).await.is_none(), "it has not said that it is there");
        let quic = peer.quic();
        let other = connects(&quic, to, &quic::key().unwrap()).await.expect("a connection at first");
        let closed = timeout(PATIENCE, other.closed()).await.unwrap();
        let unexpected = |close: &quinn::ApplicationClose| close.error_code == 6u32.into();
        assert!(matches!(&closed, ConnectionError::ApplicationClosed(close) if unexpected(close)), "{closed}");

        let expected = connects(&quic, to, &peer.key).await.expect("a connection");
        let mut stream = Stream::open(&expected).await;
        stream.say(raw_frame(Publish.id(), &common::frame(Publish, 0, 8)[8..])).await;
        stream.send.finish().unwrap();
        eventually("it arrives", || inbox.len() == 1).await;
        assert_eq!(inbox.messages.lock().unwrap()[0].path, Path::HolePunch);

        let until = Instant::now() + PATIENCE;
        while connects(&quic, to, &peer.key).await.is_some() {
            assert!(Instant::now() < until, "for ever");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(heard.elapsed() > Duration::from_secs(9), "{:?}", heard.elapsed());
        assert!(expected.close_reason().is_none(), "an existing connection stays");
    });
    victim.stop();
}

/// The relay may not hear of it, or say nothing.
#[test]
fn no_signals_are_sent_once_the_connection_is_up() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (victim, _) = at_fake(&fake, Config::default(), "victim");
    let (to, peer, elsewhere) = (local(&victim), Peer::new(), Bystander::new(Ipv4Addr::LOCALHOST, 1));
    runtime.block_on(async {
        peer.meets(&fake, "victim", Punch::RESPONDER).await;
        fake.say("victim", &punch_execute(peer.punch.session, &elsewhere.ports)).await;
    });
    until("looked for", || elsewhere.count() > 0);
    peer.is_heard(to);
    let connection = runtime.block_on(async { connects(&peer.quic(), to, &peer.key).await.expect("a connection") });
    elsewhere.quiet();
    assert!(elsewhere.lasted() < Duration::from_millis(2500), "not to its end: {:?}", elsewhere.lasted());
    assert!(connection.close_reason().is_none());
    // It was a success, of which the initiator has to tell.
    assert!(fake.said(PunchResult).is_empty());
    stop(&[&victim]);
}

/// Passes on what goes to and comes from a relay of the test, but for probes: those it answers as it likes.
struct Liar {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    probes: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    /// The node will take its NAT for one that lets in only addresses it has sent to, and if `random` for one that
    /// gives each destination another port.
    fn new(fake: &FakeRelay, random: bool) -> Self {
        let [front, second, back] = [(); 3].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        for socket in [&front, &second, &back] {
            socket.set_nonblocking(true).unwrap();
        }
        let (address, second_port) = (front.local_addr().unwrap(), second.local_addr().unwrap().port());
        let (id, secret) = ([1; 8], [2; 32]);
        fake.set_welcome(vec![
            ("probe_id", bin(id)),
            ("probe_secret", bin(secret)),
            ("probe_port", Value::from(second_port)),
        ]);
        let relay: SocketAddr = fake.address.parse().unwrap();
        let (stop, probes): (Arc<AtomicBool>, Arc<AtomicUsize>) = Default::default();
        let thread = thread::spawn({
            let (stop, probes) = (stop.clone(), probes.clone());
            move || {
                let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
                let (mut node, mut buffer) = (None, [0; 65536]);
                while !stop.load(Ordering::Relaxed) {
                    for by in [&front, &second] {
                        while let Ok((len, from)) = by.recv_from(&mut buffer) {
                            let probe = buffer[0] == 0x08;
                            if !probe {
                                node = Some(from);
                                back.send_to(&buffer[..len], relay).unwrap();
                            } else if buffer[18..21] == [0; 3] {
                                probes.fetch_add(1, Ordering::Relaxed);
                                let known = std::ptr::eq(by, &front) && node == Some(from) || !random;
                                let port = if known { from.port() } else { fastrand::u16(1024..) };
                                let mut reply = [&[0x08, 2][..], &buffer[2..18]].concat();
                                reply.extend_from_slice(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
                                reply.extend_from_slice(&port.to_be_bytes());
                                let mac = hmac::sign(&key, &reply);
                                reply.extend_from_slice(&mac.as_ref()[..16]);
                                by.send_to(&reply, from).unwrap();
                            }
                        }
                    }
                    while let Ok((len, _)) = back.recv_from(&mut buffer) {
                        front.send_to(&buffer[..len], node.unwrap()).unwrap();
                    }
                    thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Self { address, stop, probes, thread: Some(thread) }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A node that takes its NAT for what it is told.
fn deceived(fake: &FakeRelay, random: bool, hole_punching: HolePunching, name: &str) -> (Engine, Liar) {
    let liar = Liar::new(fake, random);
    let config = Config { hole_punching, ..Config::default() };
    let (node, _) = member_of(config, name, &[&liar.address.to_string()]);
    until("deceived", || {
        let profile = node.nat_profile().profile;
        match random {
            true => profile.mapping == Some(Mapping::PortDependent),
            false => profile.filtering == Some(Filtering::PortDependent),
        }
    });
    assert!(liar.probes.load(Ordering::Relaxed) > 0);
    (node, liar)
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A relay has the node told of a bystander, as if that were a node behind such a NAT.
fn told(runtime: &Runtime, fake: &FakeRelay, node: &str, ip: Ipv4Addr, port: u16, nat: &Nat) {
    let punch = Punch::new();
    runtime.block_on(fake.say(node, &punch.coordinate(Punch::RESPONDER, (ip, port).into(), [7; 32], nat)));
}

#[test]
fn hundreds_of_sockets_are_opened_only_where_allowed_and_all_are_closed() {
    let _alone = FILES.write().unwrap_or_else(PoisonError::into_inner);
    let (runtime, fake) = fake_relay();
    let (on, _liar) = deceived(&fake, true, HolePunching::On, "on");
    let (plain, _other_liar) = deceived(&fake, true, HolePunching::Plain, "plain");
    let ips = [7, 8, 9].map(|last| Ipv4Addr::new(127, 0, 0, last));
    let bystanders = ips.map(|ip| Bystander::new(ip, 1));
    let before = open_files();
    let mut rounds = 0;
    // One after the other: at once, the second is told that there is none.
    while rounds < 2 {
        // No node at an address gets two in a row.
        for (name, n) in [("on", rounds), ("plain", 2)] {
            told(&runtime, &fake, name, ips[n], bystanders[n].ports[0], &strict());
            told(&runtime, &fake, name, ips[n], bystanders[n].ports[0], &strict());
        }
        until("opened", || open_files() >= before + 256);
        bystanders[rounds].quiet();
        until("closed", || open_files() <= before);
        assert_eq!((bystanders[rounds].count(), bystanders[rounds].senders()), (512, 256));
        rounds += 1;
        let busy = fake.said(PunchResult).iter().filter(|said| said.text("error").as_deref() == Some("busy")).count();
        assert_eq!(busy, rounds, "the second is told");
    }
    assert_eq!(bystanders[2].count(), 0);
    stop(&[&on, &plain]);
}

#[test]
fn ports_are_predicted_only_where_allowed_and_for_a_bounded_time() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    let (on, _liar) = deceived(&fake, false, HolePunching::On, "on");
    let (plain, _other_liar) = deceived(&fake, false, HolePunching::Plain, "plain");
    let ips = [9, 10].map(|last| Ipv4Addr::new(127, 0, 0, last));
    // Of 64,512 ports, so that each guess hits with a probability of 3 %.
    let bystanders = ips.map(|ip| Bystander::new(ip, 2000));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        for (name, (ip, bystander)) in ["on", "plain"].into_iter().zip(ips.into_iter().zip(&bystanders)) {
            told(&runtime, &fake, name, ip, bystander.ports[0], &random());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bystanders[0].quiet();
    // A burst of 2,048 and 50 a second; without the limit there would be three times as many. The probability of twice
    // the expected hits is less than 10^-10.
    let sent = 2048.0 + 50.0 * begun.elapsed().as_secs_f64();
    let hits = bystanders[0].count();
    assert!((8..=(2.0 * sent * 2000.0 / 64_512.0) as usize).contains(&hits), "{hits}");
    assert_eq!((bystanders[0].senders(), bystanders[1].count()), (1, 0));
    stop(&[&on, &plain]);
}

/// A NAT in front of a node, made by the test. It lets in every address until it is told to let in no new one.
struct Gate {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Gate {
    fn new(node: SocketAddr) -> Self {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        front.set_nonblocking(true).unwrap();
        let address = front.local_addr().unwrap();
        let (closed, stop): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let thread = thread::spawn({
            let (closed, stop) = (closed.clone(), stop.clone());
            move || {
                let (mut inside, mut buffer): (HashMap<SocketAddr, UdpSocket>, _) = (HashMap::new(), [0; 65536]);
                while !stop.load(Ordering::Relaxed) {
                    while let Ok((len, from)) = front.recv_from(&mut buffer) {
                        if !inside.contains_key(&from) && !closed.load(Ordering::Relaxed) {
                            let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                            back.connect(node).unwrap();
                            back.set_nonblocking(true).unwrap();
                            inside.insert(from, back);
                        }
                        // A refused packet is a lost packet, here and below.
                        let _ = inside.get(&from).map(|back| back.send(&buffer[..len]));
                    }
                    for (to, back) in &inside {
                        while let Ok(len) = back.recv(&mut buffer) {
                            let _ = front.send_to(&buffer[..len], to);
                        }
                    }
                    thread::sleep(Duration::from_micros(500));
                }
            }
        });
        Self { address, closed, stop, thread: Some(thread) }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Such a path ends with the socket that it led through, and neither side is told.
#[test]
fn when_the_socket_moves_a_link_over_an_extra_socket_falls_back_to_the_relay() {
    let _among = among_others();
    let (runtime, fake) = fake_relay();
    fake.set_manner(Manner::Misroute("target".into()));
    let (sender, _liar) = deceived(&fake, true, HolePunching::On, "sender");
    let (target, _other_liar) = deceived(&fake, false, HolePunching::On, "target");
    let inbox = Arc::new(Inbox::default());
    target.set_handler(Some(inbox.clone()));
    let (gate, absent) = (Gate::new(local(&target)), Bystander::new(Ipv4Addr::LOCALHOST, 1));
    let send = |n| send_to_node(&sender, "target", Candidates::default(), message(Publish, n, TIMEOUT)).unwrap();
    send(0);
    until("asked", || !fake.said(PunchRequest).is_empty());
    let punch = Punch::asked(fake.said(PunchRequest)[0].bytes("session_id").unwrap());
    let keys = [&sender, &target].map(|node| *node.fingerprint().as_bytes());
    runtime.block_on(async {
        // It does not guess ports, which may be of other tests, nor find the main socket.
        let absent = (Ipv4Addr::LOCALHOST, absent.ports[0]).into();
        fake.say("target", &punch.coordinate(Punch::RESPONDER, absent, keys[0], &unknown())).await;
        fake.say("sender", &punch.coordinate(Punch::INITIATOR, gate.address, keys[1], &strict())).await;
    });
    until("punched", || path(&sender, "target") == Some(Path::HolePunch));
    gate.close();
    send(1);
    until("they arrive", || inbox.len() == 2);
    assert_eq!(inbox.messages.lock().unwrap()[1].path, Path::HolePunch);

    let moved = Instant::now();
    sender.listen(Listen { port: Some(free_port()), ..Listen::default() }).unwrap();
    for n in 2..50 {
        send(n);
        thread::sleep(Duration::from_millis(10));
    }
    until("all arrive", || inbox.len() == 50);
    assert!(moved.elapsed() < Duration::from_secs(5), "{:?}", moved.elapsed());
    assert_eq!(inbox.disorder(), None);
    assert!(matches!(path(&sender, "target"), Some(Path::Relay(_))), "{:?}", path(&sender, "target"));
    stop(&[&sender, &target]);
}
