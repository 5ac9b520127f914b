//! What nodes and relays that mean no good can do to relays and nodes: little.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use rmpv::Value;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::raw::{
    self, Bridge, FakeRelay, Manner, Stream, bin, connect_as, dial, dial_with, disconnect, eventually, initials, map,
    packet, registered, stranger,
};
use common::{ALL, Inbox, PATIENCE, engine, frame, member, message, node_id, number, over, send_to_node, until};
use macula_peer::{
    Candidates, Config, ConnectError, Engine, Event, Listen, Message, Registration, RelayConfig, RouteError, Secret,
    SendError,
};
use macula_peer_testkit::quic::{self, tokio_runtime};
use macula_peer_wire::MessageType::{NatProbe, Publish, RelayRequest, Reply};
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

/// Where the shares of keys and addresses are not what is looked at: all nodes are at one address.
fn unshared() -> RelayConfig {
    RelayConfig { key_share: 100, address_share: 100, ..RelayConfig::default() }
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
fn a_second_key_cannot_take_a_name_while_or_right_after_its_owner_has_it() {
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

/// With all names taken, those of absent nodes are evicted first. A node that registers one name after the other must
/// not get the name of a node that is restarting.
#[test]
fn a_flood_of_short_registrations_does_not_take_the_name_of_an_absent_node() {
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

/// A relay whose names are all taken, most of them by the same few nodes. None of these gets the name of a node that is
/// absent for a moment.
#[test]
fn filling_a_relay_does_not_take_the_name_of_an_absent_node() {
    let (relay, address) = relay(RelayConfig { max_registrations: 50, accept_rate: 10_000, ..RelayConfig::default() });
    let runtime = tokio_runtime(2).unwrap();
    let (owner, _) = member("name", &[&address]);
    sleep(Duration::from_millis(500));
    let (mut controls, mut refused) = (Vec::new(), Vec::new());
    let mut fill = async |ip: &str, key: &quic::Key| {
        for _ in 0..50 {
            let connection = raw::dial_from(ip, &address, key, raw::transport()).await;
            let mut control = Stream::control(&connection).await;
            let name = format!("hostile {}", controls.len());
            match control.ask(connect_as(&name, &[])).await.text("error") {
                None => controls.push((control, connection)),
                Some(error) => return refused.push(error),
            }
        }
    };
    runtime.block_on(async {
        let one = quic::key().unwrap();
        fill("127.0.0.2", &one).await;
        fill("127.0.0.3", &one).await;
        for ip in ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3", "127.0.0.4"] {
            fill(ip, &quic::key().unwrap()).await;
        }
    });
    let [key, address_full, all] = ["registrations_per_key", "registrations_per_address", "registrations"];
    assert_eq!(refused, [key, key, address_full, address_full, key, all, all]);
    owner.unregister();
    until("unregistered", || relay.stats().relay.unwrap().registrations == 49);
    runtime.block_on(async {
        let hostile = stranger(&address).await;
        for name in ["another", "name", "one more", "name"] {
            let said = Stream::control(&hostile).await.ask(connect_as(name, &[])).await.text("error");
            assert_eq!(said.as_deref(), Some(if name == "name" { "node_id_taken" } else { "registrations" }));
        }
    });
    let begun = Instant::now();
    owner.register(node_id("name"), vec![common::endpoint(&address)]);
    until("its owner is back", || relay.stats().relay.unwrap().registrations == 50);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    stop(&[&owner, &relay]);
}

/// A flood from the same address as the honest nodes', of what comes to nothing.
#[test]
fn a_flood_of_attempts_at_taken_names_keeps_no_node_from_registering() {
    let (relay, address) = relay(RelayConfig::default());
    let (owner, _) = member("taken", &[&address]);
    let runtime = tokio_runtime(2).unwrap();
    let flood = runtime.spawn({
        let address = address.clone();
        async move {
            let connection = stranger(&address).await;
            loop {
                let said = Stream::control(&connection).await.ask(connect_as("taken", &[])).await;
                let error = said.text("error").unwrap();
                assert!(["node_id_taken", "accept_rate_per_key"].contains(&error.as_str()), "{error}");
            }
        }
    });
    until("the flood has begun", || refusals(&relay, "accept_rate_per_key") > 100);
    let mut honest = Vec::new();
    for n in 0..5 {
        let begun = Instant::now();
        honest.push(member(&format!("honest {n}"), &[&address]).0);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    assert!(!flood.is_finished(), "it went on");
    flood.abort();
    assert_eq!(refusals(&relay, "accept_rate"), 0);
    honest.iter().for_each(Engine::stop);
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
    let (relay, address) = relay(RelayConfig { max_sessions: 5, max_sessions_per_node: 3, ..unshared() });
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
        assert_eq!(a.circuit_to("c").await, per_node, "from one that has opened as many as it may");
        assert_eq!(c.circuit_to("b").await, per_node, "to one that as many lead to as may");
        c.circuit_to("d").await.unwrap();
        let last = c.circuit_to("d").await.unwrap();
        assert_eq!(c.circuit_to("d").await, Err("sessions".into()));
        assert_eq!(c.circuit_to("unknown").await, Err("not_registered".into()));

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

/// One node, and then many names, keys and connections at one address, open as many circuits to a node as they get.
#[test]
fn a_flood_of_circuits_does_not_cut_off_a_node() {
    let (relay, address) = relay(generous());
    let (victim, inbox) = member("victim", &[&address]);
    let (other, other_inbox) = member("other", &[&address]);
    let runtime = tokio_runtime(2).unwrap();
    let mut held = Vec::new();
    let mut opened = Vec::new();
    runtime.block_on(async {
        for key in 0..3 {
            let shown = quic::key().unwrap();
            let mut of_key = 0;
            for n in 0..5 {
                let connection = raw::dial_from("127.0.0.2", &address, &shown, raw::transport()).await;
                let mut control = registered(&connection, &format!("hostile {key} {n}")).await;
                for _ in 0..30 {
                    match control.circuit_to("victim").await {
                        Ok(_) => of_key += 1,
                        Err(error) => {
                            let named = if opened.len() < 2 { "sessions_per_key" } else { "sessions_per_address" };
                            assert_eq!(error, named);
                            break;
                        }
                    }
                }
                held.push((control, connection));
            }
            opened.push(of_key);
        }
    });
    assert_eq!(opened, [5, 5, 0], "a quarter of twenty for each key, half for the address");
    let begun = Instant::now();
    let sender = engine(Config::default());
    send_to_node(&sender, "victim", over(&[&address]), message(Publish, 1, PATIENCE)).unwrap();
    send_to_node(&victim, "other", over(&[&address]), message(Publish, 2, PATIENCE)).unwrap();
    until("both arrive", || (inbox.numbers(), other_inbox.numbers()) == (vec![1], vec![2]));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    stop(&[&sender, &victim, &other, &relay]);
}

#[test]
fn a_relay_sends_nothing_to_an_address_named_in_a_request() {
    let (relay, address) = relay(generous());
    let bystander = UdpSocket::bind("127.0.0.1:0").unwrap();
    bystander.set_nonblocking(true).unwrap();
    let named = bystander.local_addr().unwrap();
    tokio_runtime(2).unwrap().block_on(async {
        let fields = |prefix: &str| -> Vec<(&'static str, Value)> {
            let mut fields = vec![("port", Value::from(named.port())), ("target_port", Value::from(named.port()))];
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

        // A circuit of its own, for packets that would belong to another one if their content mattered.
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

/// RFC 9000, section 8.1: an address that is forged on a first packet gets at most three times its size.
#[test]
fn a_forged_first_packet_draws_at_most_three_times_its_size() {
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

/// A circuit's packets need not come from the node that the relay names.
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
    let pinned = Candidates { key: Some(target.fingerprint()), ..over(&[&fake.address]) };
    assert_eq!(send_to_node(&sender, "target", pinned, message(Publish, 1, PATIENCE)), untrusted);
    assert_eq!(misled.len(), 0);

    // Known by what it showed first.
    let other = engine(Config::default());
    fake.set_manner(Manner::Misroute("target".into()));
    let candidates = over(&[&fake.address]);
    send_to_node(&other, "target", candidates.clone(), message(Publish, 2, PATIENCE)).unwrap();
    until("it arrives", || inbox.numbers() == [2]);
    fake.set_manner(Manner::Misroute("impostor".into()));
    for circuit in 0..3 {
        runtime.block_on(fake.say("target", &disconnect(circuit)));
    }
    until("the link is gone", || {
        // What is accepted while the link is dying goes nowhere else either.
        let sent = send_to_node(&other, "target", candidates.clone(), message(Publish, 3, Duration::from_secs(3)));
        sent.is_err()
    });
    assert_eq!(misled.len(), 0);
    stop(&[&sender, &other, &target, &impostor]);
}

#[test]
fn after_a_relay_that_drops_everything_the_next_relay_is_asked() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    let (relay, address) = relay(generous());
    let (target, inbox) = member("target", &[&fake.address, &address]);
    let sender = engine(Config::default());
    let begun = Instant::now();
    let candidates = over(&[&fake.address, &address]);
    send_to_node(&sender, "target", candidates, message(Publish, 1, Duration::from_secs(4))).unwrap();
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

/// 10,000 invented circuits, each with the first packet of a handshake.
#[test]
fn invented_circuits_start_few_connections_at_once() {
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
fn repeated_complaints_of_a_relay_are_rate_limited() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Swallow);
    drop(inside);
    let (node, inbox) = member("node", &[&fake.address]);
    let complaint = |circuit: u64| {
        map(macula_peer_wire::MessageType::Cast, &[("limit", bin("bandwidth")), ("circuit", Value::from(circuit))])
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
fn a_node_stays_reachable_while_one_floods_it_over_a_circuit() {
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
        // A message first: connections that have shown that they need streams get more.
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

/// As many streams as are allowed.
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

/// A relay in a process of its own, so that its memory can be measured.
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
        let port = relay.listen(Listen { relay: Some(config), shares: ALL, ..Listen::default() }).unwrap().port();
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

/// Attempts that are begun and left incomplete.
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
            // Given up before it was complete.
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
        3 => raw::opening(n.into(), 0),
        4 => raw::opening(n.into(), 0)[..20].to_vec(),
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

// ---- questions ----

fn probe() -> Bytes {
    map(NatProbe, &[("node_id", bin("n"))])
}

/// How long a relay takes to answer a question on a stream of its own.
async fn round_trip(connection: &Connection) -> Duration {
    let begun = Instant::now();
    let mut stream = Stream::open(connection).await;
    let said = stream.ask(probe()).await;
    assert!(said.text("reflexive_ip").is_some(), "{said:?}");
    begun.elapsed()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MIB: usize = 1 << 20;

/// A relay in a process of its own, and a node that asks it now and then.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
struct Beside {
    relay: alone::Alone,
    runtime: tokio::runtime::Runtime,
    honest: Connection,
    /// The relay's memory.
    before: usize,
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
impl Beside {
    fn start() -> Self {
        let mut relay = alone::Alone::start();
        let runtime = tokio_runtime(2).unwrap();
        let honest = runtime.block_on(async {
            let honest = stranger(&relay.address).await;
            round_trip(&honest).await;
            honest
        });
        let before = relay.resident();
        Self { relay, runtime, honest, before }
    }
}

/// 256 questions on each of 400 sessions, from nodes that allow no stream for an answer.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn connections_without_credit_for_answers_cost_a_relay_little() {
    let Beside { mut relay, runtime, honest, before } = Beside::start();
    let address = relay.address.clone();
    let questions = [raw::numbered(0), probe().repeat(256)].concat();
    let (mut held, mut connections) = (Vec::new(), Vec::new());
    let mut slowest = Duration::ZERO;
    runtime.block_on(async {
        for _ in 0..4 {
            let connection = dial_with(&address, &quic::key().unwrap(), quic::transport(0, 0)).await;
            // A message first: connections that have shown that they need streams get more.
            Stream::open(&connection).await.say(probe()).await;
            for n in 0..100 {
                let mut session = Stream::open(&connection).await;
                session.say(raw::opening(n, 0)).await;
                session.say(&questions).await;
                held.push(session);
            }
            slowest = slowest.max(round_trip(&honest).await);
            connections.push(connection);
        }
    });
    // Answers that are begun for them are held for long.
    let most = (0..15).map(|_| {
        sleep(Duration::from_millis(100));
        relay.resident()
    });
    let after = most.max().unwrap();
    assert!(after < before + 64 * MIB, "{} MiB, {} before", after / MIB, before / MIB);
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

/// 16 MB of empty maps each.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn a_relay_does_not_buffer_long_requests() {
    let Beside { mut relay, runtime, honest, before } = Beside::start();
    let address = relay.address.clone();
    let question = raw::raw_frame(NatProbe.id(), &vec![0x80; 16 * MIB - 8]);
    let slowest = runtime.block_on(async {
        let hostile = stranger(&address).await;
        for in_session in [false, true, false, true] {
            let mut stream = Stream::open(&hostile).await;
            if in_session {
                stream.say(raw::opening(7, 0)).await;
                stream.say(raw::numbered(0)).await;
            }
            let written = stream.send.write_all(&question).await;
            assert!(written.is_err(), "it is stopped before its end");
            assert_eq!(stream.stopped().await, Some(8u8.into()), "too large");
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            slowest = slowest.max(round_trip(&honest).await);
        }
        slowest
    });
    let after = relay.resident();
    assert!(after < before + 32 * MIB, "{} MiB, {} before", after / MIB, before / MIB);
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
}

/// More questions on one stream than answers may wait.
#[test]
fn a_relay_answers_each_request_of_a_stream_as_fast_as_it_is_read() {
    let (relay, address) = relay(RelayConfig::default());
    tokio_runtime(2).unwrap().block_on(async {
        let mut transport = raw::transport();
        transport.stream_receive_window(1000u32.into());
        let connection = dial_with(&address, &quic::key().unwrap(), transport).await;
        let mut stream = Stream::open(&connection).await;
        let all = probe().repeat(3000);
        let (mut send, asking) = (stream.send, connection.open_bi().await.unwrap().0);
        stream.send = asking;
        let asked = tokio::spawn(async move {
            send.write_all(&all).await.unwrap();
            send.finish().unwrap();
            send
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        for n in 0..3000 {
            assert!(stream.hear().await.text("reflexive_ip").is_some(), "{n}");
        }
        assert_eq!(stream.frame().await, Err(None), "and no more");
        asked.await.unwrap();
    });
    stop(&[&relay]);
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn ten_thousand_attempts_leave_a_relay_serving_and_as_small_as_before() {
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
    // Like the end of a killed process: no connection is closed.
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
    // A connection that ends without a close is kept for 45 s.
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
