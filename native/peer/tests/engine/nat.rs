//! Nodes find out what their NATs do, and the relays that help them cannot be misused.
//!
//! There is no NAT on loopback: nodes behind real ones are in the Common Test suites.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crate::common::raw::{Stream, connect_as, eventually, stranger};
use crate::common::{
    Forwarder, Inbox, PATIENCE, endpoint, engine, member, member_of, message, node_id, over, send_to_node, until,
};
use macula_peer::{Allocation, Config, Engine, Event, Filtering, Listen, Mapping, NatProfile, RelayConfig};
use macula_peer_testkit::quic::tokio_runtime;
use macula_peer_wire::MessageType::Publish;
use ring::hmac;

const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

fn relay_at(ip: Ipv4Addr, config: RelayConfig) -> (Engine, String) {
    let engine = engine(Config { ip: Some(ip.into()), ..Config::default() });
    let port = engine.listen(Listen { relay: Some(config), ..Listen::default() }).unwrap().port();
    (engine, format!("{ip}:{port}"))
}

fn relay() -> (Engine, String) {
    relay_at(Ipv4Addr::LOCALHOST, RelayConfig::default())
}

/// A node that looks for direct paths, and so finds out what its NAT is like.
fn finder(name: &str, relays: &[&str]) -> (Engine, Arc<Inbox>) {
    member_of(Config::default(), name, relays)
}

fn no_nat() -> NatProfile {
    NatProfile {
        mapping: Some(Mapping::EndpointIndependent),
        filtering: Some(Filtering::EndpointIndependent),
        allocation: Some(Allocation::Preserving),
    }
}

#[test]
fn a_node_behind_no_nat_finds_that_out_within_a_second() {
    let ((one, first), (other, second)) = (relay(), relay_at(SECOND, RelayConfig::default()));
    let begun = (Instant::now(), SystemTime::now());
    let (node, inbox) = finder("node", &[&first, &second]);
    until("found out", || node.nat_profile().profile == no_nat());
    assert!(begun.0.elapsed() < Duration::from_secs(1), "{:?}", begun.0.elapsed());
    let status = node.nat_profile();
    let port = node.local_address().unwrap().port();
    assert_eq!(status.observed, Some((Ipv4Addr::LOCALHOST, port).into()));
    assert!(status.since.unwrap() >= begun.1);
    for address in &status.local {
        assert!(address.port() == port && !address.ip().is_loopback(), "{address}");
    }
    until("told", || inbox.events.lock().unwrap().contains(&Event::Nat(node.nat_profile())));
    for engine in [node, one, other] {
        engine.stop();
    }
}

#[test]
fn a_relay_with_a_second_address_tells_as_much_as_two_relays() {
    let (relay, address) =
        relay_at(Ipv4Addr::LOCALHOST, RelayConfig { probe_ip: Some(SECOND.into()), ..RelayConfig::default() });
    let (node, _) = finder("node", &[&address]);
    until("found out", || node.nat_profile().profile == no_nat());
    for engine in [node, relay] {
        engine.stop();
    }
}

/// Nothing needs it.
#[test]
fn a_node_without_hole_punching_sends_no_probes_and_knows_its_address() {
    let (relay, address) =
        relay_at(Ipv4Addr::LOCALHOST, RelayConfig { probe_ip: Some(SECOND.into()), ..RelayConfig::default() });
    let (node, _) = member("node", &[&address]);
    until("known", || node.nat_profile().since.is_some());
    let status = node.nat_profile();
    assert_eq!(status.profile, NatProfile::default());
    assert_eq!(status.observed, node.stats().registrations[0].address);
    for engine in [node, relay] {
        engine.stop();
    }
}

#[test]
fn one_relay_at_one_address_cannot_tell_everything() {
    let (relay, address) = relay();
    let (node, _) = finder("node", &[&address]);
    until("found out", || node.nat_profile().since.is_some());
    let expected = NatProfile { mapping: None, filtering: Some(Filtering::HostDependent), ..no_nat() };
    assert_eq!(node.nat_profile().profile, expected);
    for engine in [node, relay] {
        engine.stop();
    }
}

#[test]
fn a_node_looks_again_when_it_registers_elsewhere() {
    let ((one, first), (other, second)) = (relay(), relay_at(SECOND, RelayConfig::default()));
    let (node, _) = finder("node", &[&first]);
    until("found out in part", || node.nat_profile().since.is_some());
    let before = node.nat_profile();
    assert_eq!(before.profile.mapping, None);
    node.register(node_id("node"), vec![endpoint(&first), endpoint(&second)]);
    until("found out", || node.nat_profile().profile == no_nat());
    assert!(node.nat_profile().since > before.since);
    for engine in [node, one, other] {
        engine.stop();
    }
}

#[test]
fn a_node_that_moves_is_told_where_it_is_seen_and_looks_again() {
    let (relay, address) = relay();
    let (node, inbox) = finder("node", &[&address]);
    until("found out", || node.nat_profile().since.is_some());
    // Its socket moves, and the connection to the relay with it.
    let port = node.listen(Listen { port: Some(free_port()), ..Listen::default() }).unwrap().port();
    let here: SocketAddr = (Ipv4Addr::LOCALHOST, port).into();
    until("looked again", || node.nat_profile().observed == Some(here));
    until("told", || {
        let events = inbox.events.lock().unwrap();
        events.iter().any(|event| matches!(event, Event::Nat(status) if status.observed == Some(here)))
    });
    until("the registration knows", || node.stats().registrations[0].address == Some(here));
    for engine in [node, relay] {
        engine.stop();
    }
}

/// The others would hear of it with the next keep-alive, 15 s later.
#[test]
fn relays_that_hear_nothing_of_a_node_know_when_it_has_moved() {
    let ((busy, first), (quiet, second)) = (relay(), relay());
    let forwarders = [&first, &second].map(|relay| Forwarder::new(relay.parse().unwrap(), 0, 0.0, Duration::ZERO));
    let [busy_address, quiet_address] = forwarders.each_ref().map(|forwarder| forwarder.address.to_string());
    let (node, _) = member("node", &[&busy_address, &quiet_address]);
    let (other, inbox) = member("other", &[&first]);
    let addresses = || {
        let mut all: Vec<_> = node.stats().registrations.into_iter().map(|r| (r.relay, r.address)).collect();
        all.sort_by_key(|(relay, _)| *relay == endpoint(&quiet_address));
        all.into_iter().filter_map(|(_, address)| address).collect::<Vec<_>>()
    };
    let before = addresses();
    let moved = Instant::now();
    forwarders.iter().for_each(Forwarder::move_away);
    until("both know", || {
        let n = inbox.len() as u64;
        send_to_node(&node, "other", over(&[&busy_address]), message(Publish, n, PATIENCE)).unwrap();
        let now = addresses();
        now.len() == 2 && now.iter().zip(&before).all(|(now, before)| now != before)
    });
    let took = moved.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    drop(forwarders);
    for engine in [node, other, busy, quiet] {
        engine.stop();
    }
}

fn free_port() -> u16 {
    UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn lost_probes_are_repeated() {
    let (relay, address) = relay();
    let forgetful = Forgetful::new(address.parse().unwrap());
    let (node, _) = finder("node", &[&forgetful.address.to_string()]);
    // To a node that knows the forwarder for the relay, the other port is at the same address.
    until("found out", || node.nat_profile().profile.mapping == Some(Mapping::PortDependent));
    assert!(forgetful.forgotten.load(Ordering::Relaxed) > 1);
    for engine in [node, relay] {
        engine.stop();
    }
}

/// In front of a relay: loses every signal, in both directions, the first time that it comes.
struct Forgetful {
    address: SocketAddr,
    forgotten: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Forgetful {
    fn new(relay: SocketAddr) -> Self {
        let [front, back] = [0; 2].map(|port| UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
        for socket in [&front, &back] {
            socket.set_nonblocking(true).unwrap();
        }
        let (address, forgotten, stop) = (front.local_addr().unwrap(), Arc::default(), Arc::default());
        let flags: (Arc<AtomicUsize>, Arc<AtomicBool>) = (Arc::clone(&forgotten), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (forgotten, stop) = flags;
            let (mut client, mut known, mut buffer) = (None, HashSet::new(), [0; 65536]);
            while !stop.load(Ordering::Relaxed) {
                let mut forgets = |packet: &[u8]| packet[0] == 0x08 && known.insert(packet.to_vec());
                while let Ok((len, from)) = front.recv_from(&mut buffer) {
                    // Other sockets of the node send requests too; this filter is for one socket.
                    let node = *client.get_or_insert(from);
                    if forgets(&buffer[..len]) {
                        forgotten.fetch_add(1, Ordering::Relaxed);
                    } else if from == node {
                        back.send_to(&buffer[..len], relay).unwrap();
                    }
                }
                while let Ok((len, _)) = back.recv_from(&mut buffer) {
                    if forgets(&buffer[..len]) {
                        forgotten.fetch_add(1, Ordering::Relaxed);
                    } else if let Some(client) = client {
                        front.send_to(&buffer[..len], client).unwrap();
                    }
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self { address, forgotten, stop, thread: Some(thread) }
    }
}

impl Drop for Forgetful {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

// ---- what a relay answers, and what not ----

const SAME: u8 = 0;
const OTHER_PORT: u8 = 1;
const OTHER_ADDRESS: u8 = 2;

struct Requester {
    _control: Stream,
    _connection: quinn::Connection,
    /// At the same IP address as the connection.
    socket: UdpSocket,
    relay: SocketAddr,
    second: SocketAddr,
    id: Vec<u8>,
    key: hmac::Key,
}

async fn requester(relay: &str, name: &str) -> Requester {
    let connection = stranger(relay).await;
    let mut control = Stream::control(&connection).await;
    let said = control.ask(connect_as(name, &[])).await;
    let relay: SocketAddr = relay.parse().unwrap();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Requester {
        _control: control,
        _connection: connection,
        socket,
        relay,
        second: (relay.ip(), said.uint("probe_port").unwrap().try_into().unwrap()).into(),
        id: said.bytes("probe_id").unwrap().to_vec(),
        key: hmac::Key::new(hmac::HMAC_SHA256, said.bytes("probe_secret").unwrap()),
    }
}

impl Requester {
    fn request(&self, nonce: u64, from: u8, to_port: u16) -> Vec<u8> {
        let mut request = vec![0x08, 1];
        request.extend_from_slice(&self.id);
        request.extend_from_slice(&nonce.to_be_bytes());
        request.push(from);
        request.extend_from_slice(&to_port.to_be_bytes());
        request.resize(36, 0);
        let mac = hmac::sign(&self.key, &request);
        request.extend_from_slice(&mac.as_ref()[..16]);
        request
    }

    /// Where it came from, the nonce, and the address in it.
    fn answer(&self, by: &UdpSocket) -> (SocketAddr, u64, SocketAddr) {
        let mut buffer = [0; 100];
        let (len, from) = by.recv_from(&mut buffer).expect("an answer in time");
        let (signed, mac) = buffer[..len].split_at(len - 16);
        assert_eq!(&hmac::sign(&self.key, signed).as_ref()[..16], mac);
        assert_eq!((len, &signed[..2], &signed[2..10]), (52, &[0x08, 2][..], &self.id[..]));
        let number = |bytes: &[u8]| bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&signed[18..34]).unwrap()).to_canonical();
        (from, number(&signed[10..18]), (ip, number(&signed[34..36]) as u16).into())
    }
}

#[test]
fn a_relay_answers_from_both_ports_and_to_a_second_port_of_the_node() {
    let (relay, address) = relay();
    tokio_runtime(2).unwrap().block_on(async {
        let requester = requester(&address, "node").await;
        let me = requester.socket.local_addr().unwrap();
        for (to, other, from) in [
            (requester.relay, SAME, requester.relay),
            (requester.relay, OTHER_PORT, requester.second),
            (requester.second, SAME, requester.second),
            (requester.second, OTHER_PORT, requester.relay),
        ] {
            requester.socket.send_to(&requester.request(1, other, 0), to).unwrap();
            assert_eq!(requester.answer(&requester.socket), (from, 1, me));
        }
        // It has no other address.
        requester.socket.send_to(&requester.request(7, OTHER_ADDRESS, 0), requester.relay).unwrap();
        requester.socket.send_to(&requester.request(7, 3, 0), requester.relay).unwrap();
        requester.socket.send_to(&requester.request(8, SAME, 0), requester.relay).unwrap();
        assert_eq!(requester.answer(&requester.socket), (requester.relay, 8, me));
        let another = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        another.set_read_timeout(Some(PATIENCE)).unwrap();
        let port = another.local_addr().unwrap().port();
        requester.socket.send_to(&requester.request(2, OTHER_PORT, port), requester.relay).unwrap();
        assert_eq!(requester.answer(&another), (requester.second, 2, me));
    });
    relay.stop();
}

#[test]
fn a_relay_answers_from_its_other_address_wherever_it_is_bound() {
    for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        let config = RelayConfig { probe_ip: Some(SECOND.into()), ..RelayConfig::default() };
        let (relay, address) = relay_at(ip, config);
        tokio_runtime(2).unwrap().block_on(async {
            let requester = requester(&address.replace("0.0.0.0", "127.0.0.1"), "node").await;
            let me = requester.socket.local_addr().unwrap();
            let third = SocketAddr::from((SECOND, requester.second.port()));
            for (to, other, from) in [
                (requester.relay, OTHER_PORT, requester.second),
                (requester.relay, OTHER_ADDRESS, third),
                (requester.second, OTHER_ADDRESS, third),
                (third, SAME, third),
            ] {
                requester.socket.send_to(&requester.request(1, other, 0), to).unwrap();
                assert_eq!(requester.answer(&requester.socket), (from, 1, me));
            }
        });
        relay.stop();
    }
}

#[test]
fn a_relay_answers_only_its_nodes_at_their_addresses_and_within_limits() {
    let (relay, address) = relay();
    tokio_runtime(2).unwrap().block_on(async {
        let requester = requester(&address, "node").await;
        let good = requester.request(1, SAME, 0);
        // Not the node's address: not answered there, and not anywhere.
        let [(elsewhere, same_port), (third, third_port)] = [0; 2].map(|_| same_port_at_both());
        elsewhere.send_to(&good, requester.relay).unwrap();
        let to_third = requester.request(2, SAME, third.local_addr().unwrap().port());
        elsewhere.send_to(&to_third, requester.relay).unwrap();
        // A server's port, which needs privileges.
        let server = (512..1024).find_map(|port| UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).ok());
        let port = server.as_ref().map_or(53, |server| server.local_addr().unwrap().port());
        requester.socket.send_to(&requester.request(3, SAME, port), requester.relay).unwrap();
        // No secret, another node's secret, and a malformed request.
        let mut forged = good.clone();
        forged[51] ^= 1;
        requester.socket.send_to(&forged, requester.relay).unwrap();
        let mut stranger = good.clone();
        stranger[2] ^= 1;
        requester.socket.send_to(&stranger, requester.relay).unwrap();
        requester.socket.send_to(&good[..51], requester.relay).unwrap();
        // All of them from both ports.
        for bad in [&forged, &stranger] {
            requester.socket.send_to(bad, requester.second).unwrap();
        }
        elsewhere.send_to(&good, requester.second).unwrap();
        requester.socket.send_to(&requester.request(4, SAME, 0), requester.relay).unwrap();
        assert_eq!(requester.answer(&requester.socket).1, 4, "the first that is answered");
        for silent in [&elsewhere, &third, &same_port, &third_port].into_iter().chain(&server) {
            silent.set_nonblocking(true).unwrap();
            assert!(silent.recv_from(&mut [0; 100]).is_err());
        }

        // The maximum at once, at both ports together, and new requests meanwhile.
        requester.socket.set_nonblocking(true).unwrap();
        let (begun, mut answered, mut asked) = (Instant::now(), 0, 0);
        while asked < 1000 {
            for to in [requester.relay, requester.second] {
                requester.socket.send_to(&good, to).unwrap();
                asked += 1;
            }
            std::thread::sleep(Duration::from_micros(200));
            while requester.socket.recv_from(&mut [0; 100]).is_ok() {
                answered += 1;
            }
        }
        requester.socket.set_nonblocking(false).unwrap();
        requester.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        while requester.socket.recv_from(&mut [0; 100]).is_ok() {
            answered += 1;
        }
        let most = 200 + 20 * (begun.elapsed().as_secs() + 1);
        assert!((150..=most).contains(&answered), "{answered}");
    });
    relay.stop();
}

/// At the second address, and at the first.
fn same_port_at_both() -> (UdpSocket, UdpSocket) {
    let pair = || {
        let one = UdpSocket::bind((SECOND, 0)).ok()?;
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, one.local_addr().ok()?.port())).ok()?;
        Some((one, other))
    };
    (0..100).find_map(|_| pair()).unwrap()
}

#[test]
fn a_secret_is_good_as_long_as_the_registration() {
    let (relay, address) = relay();
    tokio_runtime(2).unwrap().block_on(async {
        let (gone, here) = (requester(&address, "gone").await, requester(&address, "here").await);
        assert_ne!(gone.id, here.id);
        gone._connection.close(0u8.into(), b"");
        eventually("gone", || relay.stats().relay.unwrap().registrations == 1).await;
        gone.socket.send_to(&gone.request(1, SAME, 0), gone.relay).unwrap();
        gone.socket.send_to(&gone.request(2, SAME, 0), gone.second).unwrap();
        // One after the other to each port: what is answered after them shows that they were not.
        for to in [here.relay, here.second] {
            here.socket.send_to(&here.request(3, SAME, 0), to).unwrap();
            assert_eq!(here.answer(&here.socket).1, 3);
        }
        gone.socket.set_nonblocking(true).unwrap();
        assert!(gone.socket.recv_from(&mut [0; 100]).is_err());

        // A node that is no longer a relay answers no one.
        assert!(relay.close());
        here.socket.send_to(&here.request(4, SAME, 0), here.relay).unwrap();
        here.socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(here.socket.recv_from(&mut [0; 100]).is_err());
        // And its second port is free again.
        eventually("free", || UdpSocket::bind((IpAddr::from(Ipv4Addr::LOCALHOST), here.second.port())).is_ok()).await;
    });
    relay.stop();
}

#[test]
fn the_second_socket_is_where_it_is_asked_to_be() {
    let port = free_port();
    let taken = UdpSocket::bind((SECOND, port)).unwrap();
    let config = RelayConfig { probe_port: port, probe_ip: Some(SECOND.into()), ..RelayConfig::default() };
    let node = engine(Config::default());
    let listen = Listen { relay: Some(config), ..Listen::default() };
    assert!(matches!(node.listen(listen.clone()), Err(macula_peer::ListenError::Bind(_))));
    drop(taken);
    let bound = node.listen(listen).unwrap();
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&format!("127.0.0.1:{}", bound.port())).await;
        let said = Stream::control(&connection).await.ask(connect_as("node", &[])).await;
        assert_eq!((said.text("probe_ip"), said.uint("probe_port")), (Some(SECOND.to_string()), Some(port.into())));
    });
    assert!(UdpSocket::bind((SECOND, port)).is_err());
    node.stop();
}

#[test]
fn a_relay_that_listens_again_has_its_ports_again() {
    let relay = engine(Config::default());
    let probe_port = free_port();
    let listen = || {
        let config = RelayConfig { probe_port, ..RelayConfig::default() };
        relay.listen(Listen { relay: Some(config), ..Listen::default() }).unwrap().port()
    };
    let address = format!("127.0.0.1:{}", listen());
    let (node, _) = finder("node", &[&address]);
    for _ in 0..20 {
        assert!(relay.close());
        listen();
    }
    until("registered again", || relay.stats().relay.unwrap().registrations == 1);
    for engine in [node, relay] {
        engine.stop();
    }
}
