//! What nodes and relays that mean no good can do to relays and nodes: little.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::raw::{
    self, Bridge, FakeRelay, Manner, Stream, bin, connect_as, dial, dial_with, disconnect, eventually, initials, map,
    packet, registered, stranger,
};
use common::{Inbox, PATIENCE, engine, frame, member, message, node_id, number, over, send_to_node, until};
use macula_peer::{
    Config, ConnectError, Engine, Event, Listen, Message, Registration, RelayConfig, RouteError, Secret, SendError,
    Ways,
};
use macula_peer_testkit::quic::{self, tokio_runtime};
use macula_peer_wire::MessageType::{Publish, RelayRequest, Reply};
use macula_peer_wire::value::Value;
use quinn::Connection;
use ring::hmac;

fn relay(config: RelayConfig) -> (Engine, String) {
    let engine = engine(Config::default());
    let port = engine.listen(Listen { relay: Some(config), ..Listen::default() }).unwrap().port();
    (engine, format!("127.0.0.1:{port}"))
}

fn generous() -> RelayConfig {
    RelayConfig { bandwidth: 1 << 30, ..RelayConfig::default() }
}

fn of(counts: &[(&'static str, u64)], name: &str) -> u64 {
    counts.iter().find(|(known, _)| *known == name).unwrap().1
}

fn refusals(relay: &Engine, name: &str) -> u64 {
    of(&relay.stats().relay.unwrap().refused, name)
}

fn in_order(inbox: &Inbox) -> Vec<u64> {
    inbox.messages.lock().unwrap().iter().filter_map(|message| number(&message.payload)).collect()
}

fn stop(engines: &[&Engine]) {
    engines.iter().for_each(|engine| engine.stop());
}

// ---- names ----

#[test]
fn a_second_key_takes_no_name_neither_while_its_owner_is_there_nor_right_after() {
    let (relay, address) = relay(RelayConfig::default());
    let runtime = tokio_runtime(2).unwrap();
    let (owner, _) = member("name", &[&address]);
    let claim = || {
        runtime.block_on(async {
            let mut control = Stream::control(&stranger(&address).await).await;
            let said = control.ask(connect_as("name", &[])).await;
            assert_eq!(said.text("address"), None);
            assert_eq!(control.frame().await, Err(None), "and that is all");
            said.text("error").unwrap()
        })
    };
    assert_eq!(claim(), "node_id_taken");
    owner.unregister();
    until("unregistered", || relay.stats().relay.unwrap().registrations == 0);
    assert_eq!(claim(), "node_id_taken");
    assert_eq!(refusals(&relay, "node_id_taken"), 2);
    owner.register(node_id("name"), vec![common::endpoint(&address)]);
    until("its owner is back", || relay.stats().relay.unwrap().registrations == 1);
    stop(&[&owner, &relay]);
}

/// With all names taken, those that nobody has at the moment give way. Who comes and goes with one name after the other
/// must not get at the name of a node that is restarting.
#[test]
fn a_flood_of_short_registrations_does_not_take_the_name_of_a_node_that_is_away() {
    let config = RelayConfig { max_registrations: 20, accept_rate: 10_000, ..RelayConfig::default() };
    let (relay, address) = relay(config);
    let runtime = tokio_runtime(2).unwrap();
    let (owner, _) = member("name", &[&address]);
    sleep(Duration::from_millis(500));
    owner.unregister();
    until("unregistered", || relay.stats().relay.unwrap().registrations == 0);
    runtime.block_on(async {
        let connection = stranger(&address).await;
        for n in 0..50 {
            let mut control = registered(&connection, &format!("flood {n}")).await;
            control.send.finish().unwrap();
            assert_eq!(control.frame().await, Err(None));
        }
        let mut control = Stream::control(&connection).await;
        assert_eq!(control.ask(connect_as("name", &[])).await.text("error").as_deref(), Some("node_id_taken"));
    });
    stop(&[&owner, &relay]);
}

fn proof(connection: &Connection, secret: &[u8], node_id: &str) -> (&'static str, Value) {
    let mut material = [0; 32];
    connection.export_keying_material(&mut material, b"EXPORTER-macula-peer-realm", node_id.as_bytes()).unwrap();
    ("proof", bin(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), &material)))
}

#[test]
fn a_proof_is_good_for_its_connection_and_its_name_alone() {
    let realm_secret = Some(Secret::new(b"realm".to_vec()));
    let (relay, address) = relay(RelayConfig { realm_secret, ..RelayConfig::default() });
    let to = address.parse().unwrap();
    tokio_runtime(2).unwrap().block_on(async {
        // One configuration: the second connection resumes the TLS session of the first.
        let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let key = quic::key().unwrap();
        endpoint.set_default_client_config(quic::client_config_with_key(raw::ALPN, raw::transport(), &key).unwrap());
        let first = endpoint.connect(to, "node").unwrap().await.unwrap();
        let good = proof(&first, b"realm", "name");
        let mut control = Stream::control(&first).await;
        let said = control.ask(connect_as("name", std::slice::from_ref(&good))).await;
        assert!(said.text("address").is_some(), "{said:?}");

        let second = endpoint.connect(to, "node").unwrap().await.unwrap();
        for (name, claim) in [
            ("name", vec![good]),
            ("name", vec![]),
            ("name", vec![proof(&second, b"other realm", "name")]),
            ("other", vec![proof(&second, b"realm", "name")]),
        ] {
            let said = Stream::control(&second).await.ask(connect_as(name, &claim)).await;
            assert_eq!(said.text("error").as_deref(), Some("realm"));
        }
        let said = Stream::control(&second).await.ask(connect_as("name", &[proof(&second, b"realm", "name")])).await;
        assert!(said.text("address").is_some(), "{said:?}");
    });
    assert_eq!(refusals(&relay, "realm"), 4);
    stop(&[&relay]);
}

// ---- circuits ----

#[test]
fn circuits_are_limited_in_all_and_for_each_node_and_only_their_ends_close_them() {
    let (relay, address) = relay(RelayConfig { max_sessions: 5, max_sessions_per_node: 3, ..RelayConfig::default() });
    tokio_runtime(2).unwrap().block_on(async {
        let mut nodes = Vec::new();
        for name in ["a", "b", "c", "d"] {
            let connection = stranger(&address).await;
            nodes.push((registered(&connection, name).await, connection));
        }
        let [(a, _), _, (c, _), _] = &mut nodes[..] else { panic!() };
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(a.circuit_to("b").await.unwrap());
        }
        let per_node = Err("sessions_per_node".to_owned());
        assert_eq!(a.circuit_to("c").await, per_node, "from one that has as many as it may");
        assert_eq!(c.circuit_to("b").await, per_node, "to one that has");
        c.circuit_to("d").await.unwrap();
        let last = c.circuit_to("d").await.unwrap();
        assert_eq!(c.circuit_to("d").await, Err("sessions".into()));
        assert_eq!(c.circuit_to("nobody").await, Err("not_registered".into()));

        // Not its own: nothing is closed.
        for circuit in &open {
            c.say(disconnect(*circuit)).await;
        }
        assert_eq!(c.circuit_to("d").await, Err("sessions".into()));
        c.say(disconnect(last)).await;
        c.circuit_to("d").await.expect("freed");
        a.say(disconnect(open[0])).await;
        a.circuit_to("b").await.expect("freed");
        assert_eq!(relay.stats().relay.unwrap().circuits, 5);
    });
    let refused = ["sessions", "sessions_per_node", "not_registered"].map(|name| refusals(&relay, name));
    assert_eq!(refused, [2, 2, 1]);
    stop(&[&relay]);
}

#[test]
fn a_relay_sends_nothing_to_an_address_that_somebody_names() {
    let (relay, address) = relay(generous());
    let bystander = UdpSocket::bind("127.0.0.1:0").unwrap();
    bystander.set_nonblocking(true).unwrap();
    let named = bystander.local_addr().unwrap();
    tokio_runtime(2).unwrap().block_on(async {
        let fields = |prefix: &str| -> Vec<(&'static str, Value)> {
            let mut fields =
                vec![("port", Value::Uint(named.port().into())), ("target_port", Value::Uint(named.port().into()))];
            for name in ["endpoint", "address", "target_endpoint", "relay_endpoint", "reply_to", "peer_endpoint"] {
                fields.push((name, bin(format!("{prefix}{named}"))));
            }
            for name in ["host", "ip", "target_host", "reflexive_ip"] {
                fields.push((name, bin(named.ip().to_string())));
            }
            fields
        };
        let victim = stranger(&address).await;
        let _victim = registered(&victim, "victim").await;
        let hostile = stranger(&address).await;
        let mut control = Stream::control(&hostile).await;
        let said = control.ask(connect_as(&named.to_string(), &fields(""))).await;
        assert!(said.text("address").is_some());
        for target in [named.to_string(), format!("https://{named}"), "127.0.0.1".into(), "\0".into()] {
            let more = [("session_id", bin("s")), ("target_id", bin(&target))];
            let said = control.ask(map(RelayRequest, &[&more[..], &fields("https://")].concat())).await;
            assert_eq!(said.text("error").as_deref(), Some("not_registered"), "{target}");
        }
        // Numbers of circuits that are not its own or do not exist, every form, and what is no packet at all.
        let first = initials(1).remove(0);
        let mut sent = 0;
        for circuit in (0..1000).chain([u32::MAX, 0x7F00_0001]) {
            for form in [0, 1, 2, 3, 4, 5, 255] {
                let mut datagram = packet(circuit, &first).to_vec();
                datagram[4] = form;
                hostile.send_datagram_wait(datagram.into()).await.unwrap();
                sent += 1;
            }
        }
        eventually("many of them arrive, as strays", || relay.stats().relay.unwrap().stray > sent / 2).await;

        // A circuit of its own, for packets that would be for somebody else if anything in them counted.
        let circuit = control.circuit_to("victim").await.unwrap();
        hostile.send_datagram_wait(packet(circuit, &first)).await.unwrap();
        let came = tokio::time::timeout(PATIENCE, victim.read_datagram()).await.unwrap().unwrap();
        assert_eq!(came, packet(circuit, &first));
        assert_eq!(victim.stats().frame_rx.datagram, 1, "nothing but what is for it");
    });
    assert_eq!(relay.stats().relay.unwrap().forwarded_packets, 1);
    let came = bystander.recv(&mut [0; 2000]);
    assert_eq!(came.unwrap_err().kind(), ErrorKind::WouldBlock);
    stop(&[&relay]);
}

/// RFC 9000, section 8.1: an address that somebody else writes on a first packet gets three times as much at the most.
#[test]
fn a_first_packet_with_somebody_elses_address_draws_three_times_its_size_at_most() {
    let (relay, address) = relay(generous());
    let bystander = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut sent = 0;
    for packet in initials(200) {
        sent += bystander.send_to(&packet, &address).unwrap();
    }
    let mut buffer = [0; 2000];
    bystander.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = bystander.recv(&mut buffer).expect("an answer");
    bystander.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    while let Ok(len) = bystander.recv(&mut buffer) {
        received += len;
    }
    assert!(received <= 3 * sent, "{received} bytes for {sent}");
    stop(&[&relay]);
}

// ---- circuits of a node ----

/// A circuit's packets need not be from whom the relay says.
#[test]
fn a_relay_that_leads_to_another_node_gets_no_message_there() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Misroute("impostor".into()));
    drop(inside);
    let (target, inbox) = member("target", &[&fake.address]);
    let (impostor, misled) = member("impostor", &[&fake.address]);
    let untrusted = Err(SendError::Route(RouteError::Node(ConnectError::Untrusted)));

    let sender = engine(Config::default());
    let pinned = Ways { key: Some(target.fingerprint()), ..over(&[&fake.address]) };
    assert_eq!(send_to_node(&sender, "target", pinned, message(Publish, 1, PATIENCE)), untrusted);
    assert_eq!(misled.len(), 0);

    // Known by what it showed first.
    let other = engine(Config::default());
    fake.set_manner(Manner::Misroute("target".into()));
    let ways = over(&[&fake.address]);
    send_to_node(&other, "target", ways.clone(), message(Publish, 2, PATIENCE)).unwrap();
    until("it arrives", || inbox.numbers() == [2]);
    fake.set_manner(Manner::Misroute("impostor".into()));
    for circuit in 0..3 {
        runtime.block_on(fake.say("target", &disconnect(circuit)));
    }
    until("the link is gone", || {
        // What is accepted while the link is dying goes nowhere else either.
        let sent = send_to_node(&other, "target", ways.clone(), message(Publish, 3, Duration::from_secs(3)));
        sent.is_err()
    });
    assert_eq!(misled.len(), 0);
    stop(&[&sender, &other, &target, &impostor]);
}

#[test]
fn a_relay_that_swallows_everything_is_not_the_last_one_asked() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    let (relay, address) = relay(generous());
    let (target, inbox) = member("target", &[&fake.address, &address]);
    let sender = engine(Config::default());
    let begun = Instant::now();
    let ways = over(&[&fake.address, &address]);
    send_to_node(&sender, "target", ways, message(Publish, 1, Duration::from_secs(4))).unwrap();
    until("it arrives", || inbox.numbers() == [1]);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    stop(&[&sender, &target, &relay]);
}

fn all_arrive_once_and_in_order(manner: Manner, total: u64) {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(manner);
    drop(inside);
    let (target, inbox) = member("target", &[&fake.address]);
    let sender = engine(Config::default());
    for n in 0..total {
        let message = Message { frame: frame(Publish, n, 1000), kind: Publish, deadline: None, key: None };
        let deadline = Some(Instant::now() + 2 * PATIENCE);
        send_to_node(&sender, "target", over(&[&fake.address]), Message { deadline, ..message }).unwrap();
        if n % 50 == 0 {
            sleep(Duration::from_millis(5));
        }
    }
    until("all arrive", || inbox.len() >= total as usize);
    assert_eq!(in_order(&inbox), (0..total).collect::<Vec<_>>());
    stop(&[&sender, &target]);
}

#[test]
fn messages_survive_a_relay_that_ends_circuits_at_random() {
    all_arrive_once_and_in_order(Manner::End, 3000);
}

#[test]
fn messages_arrive_once_though_a_relay_repeats_their_packets() {
    all_arrive_once_and_in_order(Manner::Replay, 3000);
}

/// 10,000 circuits that nobody opened, each with the first packet of a handshake.
#[test]
fn a_relay_that_invents_circuits_has_a_node_begin_few_connections_at_once() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    let (relay, address) = relay(generous());
    let (target, inbox) = member("target", &[&fake.address, &address]);
    let sender = engine(Config::default());
    let first = initials(10_000);
    let mut most = 0;
    runtime.block_on(async {
        let connection = fake.connection("target");
        for circuit in 0..10_000 {
            connection.send_datagram_wait(packet(circuit, &first[circuit as usize])).await.unwrap();
            if circuit % 100 == 0 {
                most = most.max(target.stats().registrations.iter().map(|relay| relay.circuits).max().unwrap());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    assert!((1..=64).contains(&most), "{most} at once");
    send_to_node(&sender, "target", over(&[&address]), message(Publish, 1, PATIENCE)).unwrap();
    until("others come through another relay", || inbox.numbers() == [1]);
    stop(&[&sender, &target, &relay]);
}

#[test]
fn a_relay_that_complains_all_the_time_is_reported_now_and_then() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    let (node, inbox) = member("node", &[&fake.address]);
    let complaint = |circuit: u64| {
        map(macula_peer_wire::MessageType::Cast, &[("limit", bin("bandwidth")), ("circuit", Value::Uint(circuit))])
    };
    let many: Vec<u8> = (0..10_000).flat_map(|n| complaint(n % 3)).collect();
    runtime.block_on(async {
        fake.say("node", &many).await;
        // Read after all that, it ends the registration.
        fake.say("node", &map(Reply, &[("error", bin("malformed"))])).await;
    });
    let ended = |event: &Event| matches!(event, Event::Registration { state: Registration::Refused(_), .. });
    until("the registration ends", || inbox.events.lock().unwrap().iter().any(ended));
    let complaints = |event: &&Event| matches!(event, Event::RelayLimit { .. });
    let reported = inbox.events.lock().unwrap().iter().filter(complaints).count();
    assert!(reported <= 10, "{reported} events");
    stop(&[&node]);
}

/// Many streams that say nothing, floods of messages, and garbage: all over circuits.
#[test]
fn a_node_is_there_for_others_while_one_floods_it_over_a_circuit() {
    let (relay, address) = relay(generous());
    let (target, inbox) = member("target", &[&address]);
    let sender = engine(Config::default());
    let runtime = tokio_runtime(2).unwrap();
    runtime.block_on(async {
        let key = quic::key().unwrap();
        let outer = dial(&address, &key).await;
        let mut control = registered(&outer, "hostile").await;
        let circuit = control.circuit_to("target").await.unwrap();
        let bridge = Bridge::new(outer.clone(), circuit).await;
        let mut transport = quic::transport(0, 0);
        transport.mtu_discovery_config(None);
        let inner = dial_with(&bridge.address.to_string(), &key, transport).await;
        let mut silent = Vec::new();
        // A message first: those who have shown that they need them get more streams.
        let mut first = Stream::open(&inner).await;
        first.say(frame(Publish, 1_000_000, 10)).await;
        until_more(&inner, &mut silent).await;
        let flood = tokio::spawn({
            let inner = inner.clone();
            async move {
                let messages: Vec<u8> = (0..1000).flat_map(|_| frame(Publish, 1_000_000, 10)).collect();
                while first.send.write_all(&messages).await.is_ok() && inner.close_reason().is_none() {}
            }
        });
        eventually("the flood arrives", || inbox.len() > 10_000).await;
        tokio::task::block_in_place(|| {
            for n in 0..100 {
                send_to_node(&sender, "target", over(&[&address]), message(Publish, n, PATIENCE)).unwrap();
            }
            until("others' messages arrive", || in_order(&inbox).iter().filter(|n| **n < 100).count() == 100);
        });
        assert!(inner.close_reason().is_none() && !flood.is_finished(), "the flood went on");
        flood.abort();
    });
    stop(&[&sender, &target, &relay]);
}

/// As many streams as there are to be had.
async fn until_more(connection: &Connection, streams: &mut Vec<Stream>) {
    while let Ok(Ok((send, receive))) = tokio::time::timeout(Duration::from_millis(500), connection.open_bi()).await {
        let mut stream = Stream::from((send, receive));
        // Half a header.
        stream.say([1, 0x10, 0]).await;
        streams.push(stream);
    }
    assert!(streams.len() >= 100, "{}", streams.len());
}

// ---- attempts by the thousand ----

/// A relay in a process of its own, whose memory is nobody else's.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod alone {
    use std::io::{BufRead, BufReader, Lines, Write};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use super::*;

    const CHILD: &str = "MACULA_PEER_RELAY_OF_ITS_OWN";

    /// Not a test: what [`Alone`] runs.
    #[test]
    #[ignore = "a process for another test"]
    fn a_relay_of_its_own() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let relay = engine(Config { keep_alive: Duration::from_secs(2), max_accepted: 500, ..Config::default() });
        let config = RelayConfig { accept_rate: 10_000, ..generous() };
        let port = relay.listen(Listen { relay: Some(config), ..Listen::default() }).unwrap().port();
        writeln!(std::io::stdout(), "\nsaid {port}").unwrap();
        for _asked in std::io::stdin().lines() {
            writeln!(std::io::stdout(), "said {}", resident()).unwrap();
        }
        relay.stop();
    }

    /// Bytes of memory in use, without what is freed and kept.
    fn resident() -> usize {
        unsafe extern "C" {
            safe fn malloc_trim(pad: usize) -> i32;
        }
        malloc_trim(0);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse::<usize>().unwrap() << 10
    }

    pub(super) struct Alone {
        process: Child,
        stdin: ChildStdin,
        stdout: Lines<BufReader<ChildStdout>>,
        pub(super) address: String,
    }

    impl Alone {
        pub(super) fn start() -> Self {
            let mut process = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "alone::a_relay_of_its_own", "--nocapture"])
                .env(CHILD, "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let (stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
            let mut alone = Self { process, stdin, stdout: BufReader::new(stdout).lines(), address: String::new() };
            alone.address = format!("127.0.0.1:{}", alone.hear());
            alone
        }

        pub(super) fn resident(&mut self) -> usize {
            writeln!(self.stdin).unwrap();
            self.hear()
        }

        fn hear(&mut self) -> usize {
            let said = self.stdout.find_map(|line| line.unwrap().strip_prefix("said ").map(str::to_owned));
            said.expect("it lives").parse().unwrap()
        }
    }

    impl Drop for Alone {
        fn drop(&mut self) {
            // Gone already is as good.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// What was begun and is left as it is.
#[derive(Default)]
struct Begun {
    endpoints: Vec<quinn::Endpoint>,
    connections: Vec<Connection>,
    streams: Vec<Stream>,
}

/// Begins things with a relay that come to nothing: some 1,000 for each of `times`.
async fn attempts(address: &str, times: usize) -> Begun {
    let mut begun = Begun::default();
    for packets in initials(500 * times).chunks(50) {
        // From many addresses.
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for packet in packets {
            // Refused, if the relay were gone: that shows elsewhere.
            let _ = socket.send_to(packet, address);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let key = quic::key().unwrap();
    let config = quic::client_config_with_key(raw::ALPN, raw::transport(), &key).unwrap();
    let to = address.parse().unwrap();
    for _ in 0..times {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        for _ in 0..150 {
            let connecting = endpoint.connect_with(config.clone(), to, "node").unwrap();
            // Given up on the way.
            let _ = tokio::time::timeout(Duration::from_micros(fastrand::u64(0..1500)), connecting).await;
        }
        for n in 0..60 {
            let connecting = endpoint.connect_with(config.clone(), to, "node").unwrap();
            // There may be too many already.
            let Ok(connection) = connecting.await else { continue };
            begin_streams(&connection, n, &mut begun.streams).await;
            begun.connections.push(connection);
        }
        begun.endpoints.push(endpoint);
    }
    begun
}

async fn begin_streams(connection: &Connection, n: u8, streams: &mut Vec<Stream>) {
    // A control stream that says no more, half a large frame, a session, half a session, half a message; or nothing.
    let bytes = match n % 6 {
        0 => return,
        1 => raw::raw_frame(raw::CONTROL, &[]),
        2 => [&[1, 0x10, 0, 0, 0, 1, 0, 0][..], &[0; 20_000]].concat(),
        3 => raw::raw_frame(raw::SESSION, &[&[n; 16][..], &[0]].concat()),
        4 => raw::raw_frame(raw::SESSION, &[n; 17])[..20].to_vec(),
        _ => frame(Publish, 1, 100)[..50].to_vec(),
    };
    for _ in 0..6 {
        let opened = tokio::time::timeout(Duration::from_millis(200), connection.open_bi()).await;
        let Ok(Ok((mut send, receive))) = opened else { return };
        // Gone is as good.
        let _ = send.write_all(&bytes).await;
        streams.push(Stream::from((send, receive)));
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn ten_thousand_attempts_leave_a_relay_serving_and_as_small_as_before() {
    const MIB: usize = 1 << 20;
    let mut relay = alone::Alone::start();
    let address = relay.address.clone();
    let (target, inbox) = member("target", &[&address]);
    let sender = engine(Config::default());
    let send = |n| send_to_node(&sender, "target", over(&[&address]), message(Publish, n, PATIENCE)).unwrap();
    send(0);
    let attack = |times| {
        let runtime = tokio_runtime(2).unwrap();
        let begun = runtime.block_on(attempts(&address, times));
        (runtime, begun)
    };
    // Like that of a process which is killed: nobody says goodbye.
    let end = |(runtime, begun): (tokio::runtime::Runtime, Begun)| {
        runtime.shutdown_background();
        drop(begun);
    };
    // What the first ones leave behind is what threads and tables need once.
    end(attack(1));
    sleep(Duration::from_secs(12));
    let baseline = relay.resident();

    let (mut sent, mut slowest) = (1, Duration::ZERO);
    let attacking = std::thread::scope(|scope| {
        let attacking = scope.spawn(|| attack(10));
        while !attacking.is_finished() {
            let begun = Instant::now();
            send(sent);
            sent += 1;
            until("a message arrives meanwhile", || inbox.len() as u64 >= sent);
            slowest = slowest.max(begun.elapsed());
            sleep(Duration::from_millis(20));
        }
        attacking.join().unwrap()
    });
    let most = relay.resident();
    assert!(sent > 50, "{sent} messages only");
    assert!(slowest < Duration::from_secs(5), "one took {slowest:?}");
    assert_eq!(in_order(&inbox), (0..sent).collect::<Vec<_>>());
    assert!(most > baseline && most - baseline < 512 * MIB, "{} MiB, {} before", most / MIB, baseline / MIB);

    end(attacking);
    // Who does not say goodbye is kept for 45 s.
    let deadline = Instant::now() + 4 * PATIENCE;
    loop {
        let now = relay.resident();
        if now < baseline + 8 * MIB {
            break;
        }
        let [now, most, baseline] = [now, most, baseline].map(|bytes| bytes / MIB);
        assert!(Instant::now() < deadline, "{now} MiB, {most} with all of them, {baseline} before");
        sleep(Duration::from_millis(100));
    }
    let (late, late_inbox) = member("late", &[&address]);
    send_to_node(&sender, "late", over(&[&address]), message(Publish, 7, PATIENCE)).unwrap();
    until("newcomers are served too", || late_inbox.numbers() == [7]);
    stop(&[&sender, &target, &late]);
}
