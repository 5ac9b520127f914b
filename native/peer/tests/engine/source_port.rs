//! A NAT or load balancer that keeps a dead mapping of the node's one port does not cut the node off for long.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::{endpoint, engine, listener, member_of, message, over, relay, send, send_to_node, until};
use macula_peer::{Candidates, Config, EndpointRef, Engine, HolePunching, SendError, Target};
use macula_peer_wire::MessageType::Publish;

/// Three dials fit in a short test.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

const TIMEOUT: Duration = Duration::from_secs(15);

/// Maps each client's port to its own socket, as a NAT does. A stranded mapping leads nowhere for ever, because every
/// packet from its port keeps it.
struct Mapper {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    mappings: Mutex<HashMap<SocketAddr, Mapping>>,
    swallow: AtomicBool,
    stop: AtomicBool,
}

struct Mapping {
    back: UdpSocket,
    stranded: bool,
}

impl Mapper {
    fn new(server: &str) -> Self {
        let server: SocketAddr = server.parse().unwrap();
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_nonblocking(true).unwrap();
        let address = front.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    if !shared.pass(&front, server) {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
            }
        });
        Self { address, shared, thread: Some(thread) }
    }

    fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// From now on the existing mappings lead nowhere.
    fn strand(&self) {
        self.shared.mappings.lock().unwrap().values_mut().for_each(|mapping| mapping.stranded = true);
    }

    fn swallow(&self, all: bool) {
        self.shared.swallow.store(all, Ordering::Relaxed);
    }

    fn clients(&self) -> usize {
        self.shared.mappings.lock().unwrap().len()
    }

    /// Where the server sees the client of this port.
    fn seen(&self, port: u16) -> Option<SocketAddr> {
        let mappings = self.shared.mappings.lock().unwrap();
        mappings.iter().find(|(client, _)| client.port() == port).map(|(_, mapping)| mapping.back.local_addr().unwrap())
    }
}

impl Shared {
    fn pass(&self, front: &UdpSocket, server: SocketAddr) -> bool {
        let (mut buffer, mut passed) = ([0; 65536], false);
        let swallowed = self.swallow.load(Ordering::Relaxed);
        while let Ok((len, client)) = front.recv_from(&mut buffer) {
            passed = true;
            let mut mappings = self.mappings.lock().unwrap();
            let mapping = mappings.entry(client).or_insert_with(|| {
                let back = UdpSocket::bind("127.0.0.1:0").unwrap();
                back.connect(server).unwrap();
                back.set_nonblocking(true).unwrap();
                Mapping { back, stranded: false }
            });
            if !(swallowed || mapping.stranded) {
                // A refused packet is a lost packet.
                let _ = mapping.back.send(&buffer[..len]);
            }
        }
        for (client, mapping) in &*self.mappings.lock().unwrap() {
            while let Ok(len) = mapping.back.recv(&mut buffer) {
                passed = true;
                if !(swallowed || mapping.stranded) {
                    front.send_to(&buffer[..len], client).unwrap();
                }
            }
        }
        passed
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn config() -> Config {
    Config { connect_timeout: CONNECT_TIMEOUT, hole_punching: HolePunching::Off, ..Config::default() }
}

/// Sends until a peer takes it.
fn send_on(send: impl Fn() -> Result<(), SendError>) {
    let begun = Instant::now();
    while let Err(error) = send() {
        assert!(begun.elapsed() < TIMEOUT, "{error:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn port(engine: &Engine) -> u16 {
    engine.local_address().unwrap().port()
}

#[test]
fn a_registration_behind_a_dead_mapping_is_made_over_another_port() {
    let (relay, address) = relay(0);
    let mapper = Mapper::new(&address);
    let (other, others) = member_of(config(), "other", &[&address]);
    let (node, arrived) = member_of(config(), "node", &[&mapper.endpoint()]);
    let (listener, beside, direct) = listener(Config::default());
    send(&node, &direct, message(Publish, 1, TIMEOUT)).unwrap();
    send_to_node(&node, "other", over(&[&mapper.endpoint()]), message(Publish, 1, TIMEOUT)).unwrap();
    until("both arrive", || others.len() == 1 && beside.len() == 1);

    mapper.strand();
    let begun = Instant::now();
    send_on(|| send_to_node(&node, "other", over(&[&mapper.endpoint()]), message(Publish, 2, TIMEOUT)));
    until("it arrives", || others.numbers() == [1, 2]);
    let healed = begun.elapsed();
    assert!(healed < Duration::from_secs(15), "{healed:?}");
    send_on(|| send_to_node(&other, "node", over(&[&address]), message(Publish, 3, TIMEOUT)));
    until("the node is reached", || arrived.numbers() == [3]);

    // No other destination is affected.
    send(&node, &direct, message(Publish, 2, TIMEOUT)).unwrap();
    until("it arrives", || beside.numbers() == [1, 2]);
    let seen = listener.stats().accepted.iter().map(|accepted| accepted.link.remote.port()).collect::<Vec<_>>();
    assert_eq!(seen, [port(&node)]);
    for engine in [node, other, listener, relay] {
        engine.stop();
    }
}

#[test]
fn an_endpoint_and_a_node_behind_a_dead_mapping_are_reached_from_another_port() {
    let (target, arrived, address) = listener(Config::default());
    let mapper = Mapper::new(&address);
    let by_endpoint = engine(config());
    let by_node_id = engine(config());
    let candidates = || Candidates { endpoints: vec![endpoint(&mapper.endpoint())], ..Candidates::default() };
    let send_both = |n| {
        send_on(|| send(&by_endpoint, &mapper.endpoint(), message(Publish, n, TIMEOUT)));
        send_on(|| send_to_node(&by_node_id, "target", candidates(), message(Publish, n + 1, TIMEOUT)));
    };
    send_both(1);
    until("they arrive", || arrived.numbers() == [1, 2]);
    mapper.strand();
    let begun = Instant::now();
    send_both(3);
    until("they arrive", || arrived.numbers() == [1, 2, 3, 4]);
    let healed = begun.elapsed();
    assert!(healed < Duration::from_secs(15), "{healed:?}");
    // The next link takes the port that works.
    let (before, text) = (mapper.clients(), mapper.endpoint());
    by_endpoint.invalidate(&Target::Endpoint(EndpointRef::parse(&text).unwrap()));
    send(&by_endpoint, &text, message(Publish, 5, TIMEOUT)).unwrap();
    until("it arrives", || arrived.numbers() == [1, 2, 3, 4, 5]);
    assert_eq!(mapper.clients(), before);
    for engine in [by_endpoint, by_node_id, target] {
        engine.stop();
    }
}

/// The destination is down, and callers do not wait longer because other ports are tried as well.
#[cfg(target_os = "linux")]
#[test]
fn a_closed_port_is_noticed_at_once_from_every_port() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sender = engine(Config { connect_timeout: Duration::from_secs(5), ..config() });
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(8) {
        let asked = Instant::now();
        send(&sender, &closed, message(Publish, 1, TIMEOUT)).unwrap_err();
        let waited = asked.elapsed();
        assert!(waited < Duration::from_secs(3), "{waited:?} after {:?}", begun.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
    sender.stop();
}

#[test]
fn a_registration_returns_to_the_usual_port_that_works_after_all() {
    let (relay, address) = relay(0);
    let mapper = Mapper::new(&address);
    let config = Config { connect_timeout: Duration::from_secs(3), ..config() };
    let (node, _) = member_of(config, "node", &[&mapper.endpoint()]);
    until("the NAT is known", || node.nat_profile().since.is_some());
    let usual = mapper.seen(port(&node)).unwrap();
    let address = || node.stats().registrations[0].address;
    assert_eq!(address(), Some(usual));

    // The network is away, until another port is tried.
    let before = mapper.clients();
    mapper.swallow(true);
    let _ = send_to_node(&node, "unknown", over(&[&mapper.endpoint()]), message(Publish, 1, Duration::from_millis(1)));
    until("another port is tried", || mapper.clients() > before);
    mapper.swallow(false);
    until("registered over that", || address().is_some_and(|address| address != usual));
    until("registered over the usual one", || address() == Some(usual));
    for engine in [node, relay] {
        engine.stop();
    }
}
