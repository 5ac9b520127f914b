//! What the engine's tests share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

pub mod raw;

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer::{
    Candidates, Config, Endpoint, EndpointRef, Engine, Event, Handler, HolePunching, Inbound, Listen, Message, NodeId,
    Registration, RelayConfig, SendError, Shares, Target, Unhandled,
};
use macula_peer_testkit::frame::of_map;
use macula_peer_testkit::quic::tokio_runtime;
use macula_peer_wire::{Limits, MessageType, RawFrame, check_payload};
use rmpv::{Value, ValueRef};
use tokio::runtime::Runtime;

/// Longer than anything here takes on a busy machine; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// All nodes here have one address, and many have one key.
pub const ALL: Shares = Shares { key: 100, address: 100, handshake_rate: 100_000 };

/// Gathers what arrives.
#[derive(Default)]
pub struct Inbox {
    pub messages: Mutex<Vec<Inbound>>,
    pub events: Mutex<Vec<Event>>,
    /// What it decodes.
    pub limits: Limits,
}

impl Handler for Inbox {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        check_payload(&message.payload, self.limits)?;
        self.messages.lock().unwrap().push(message);
        Ok(())
    }

    fn event(&self, event: Event) -> bool {
        self.events.lock().unwrap().push(event);
        true
    }
}

impl Inbox {
    pub fn len(&self) -> usize {
        self.messages.lock().unwrap().len()
    }

    /// The numbers under `n` in what arrived, sorted.
    pub fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<_> = self.messages.lock().unwrap().iter().filter_map(|m| number(&m.payload)).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Where the numbers under `n` first do not count up from 0, and what follows.
    pub fn disorder(&self) -> Option<(usize, Vec<u64>)> {
        let messages = self.messages.lock().unwrap();
        let arrived: Vec<_> = messages.iter().filter_map(|m| number(&m.payload)).collect();
        let wrong = (0..).zip(&arrived).position(|(expected, &number)| number != expected)?;
        Some((wrong, arrived.into_iter().skip(wrong).take(10).collect()))
    }
}

pub fn number(payload: &[u8]) -> Option<u64> {
    let ValueRef::Map(fields) = rmpv::decode::read_value_ref(&mut &*payload).ok()? else { return None };
    fields.iter().find(|(key, _)| *key == ValueRef::Binary(b"n"))?.1.as_u64()
}

pub fn engine(config: Config) -> Engine {
    Engine::start(config).unwrap()
}

/// An engine that listens on loopback, what it got, and how to reach it.
pub fn listener(config: Config) -> (Engine, Arc<Inbox>, String) {
    let inbox = Arc::new(Inbox { limits: config.limits, ..Inbox::default() });
    let engine = engine(config);
    engine.set_handler(Some(inbox.clone()));
    let port = engine.listen(Listen::default()).unwrap().port();
    (engine, inbox, format!("127.0.0.1:{port}"))
}

pub fn frame(kind: MessageType, n: u64, size: usize) -> Bytes {
    of_map(
        kind.id(),
        vec![
            (Value::Binary(b"n".to_vec()), n.into()),
            (Value::Binary(b"payload".to_vec()), Value::Binary(vec![7; size])),
        ],
    )
    .into()
}

pub fn message(kind: MessageType, n: u64, timeout: Duration) -> Message {
    Message { frame: frame(kind, n, 64), kind, deadline: Some(Instant::now() + timeout), key: None }
}

/// A message whose containers are nested this deep.
pub fn deep(n: u64, depth: usize) -> Message {
    let nested = (2..depth).fold(Value::Array(vec![]), |inner, _| Value::Array(vec![inner]));
    of_fields(vec![(Value::Binary(b"n".to_vec()), Value::from(n)), (Value::Binary(b"nested".to_vec()), nested)])
}

/// A message of this many terms.
pub fn wide(n: u64, terms: usize) -> Message {
    let items = Value::Array(vec![Value::Map(vec![]); terms - 5]);
    of_fields(vec![(Value::Binary(b"n".to_vec()), Value::from(n)), (Value::Binary(b"wide".to_vec()), items)])
}

fn of_fields(fields: Vec<(Value, Value)>) -> Message {
    let frame = of_map(MessageType::Publish.id(), fields).into();
    Message { frame, kind: MessageType::Publish, deadline: Some(Instant::now() + PATIENCE), key: None }
}

/// Sends as the NIF does: at once if possible, else waiting.
pub fn send(engine: &Engine, endpoint: &str, message: Message) -> Result<(), SendError> {
    let endpoint = Target::Endpoint(EndpointRef::parse(endpoint).unwrap());
    let Err(message) = engine.send_now(&endpoint, message, Instant::now()) else { return Ok(()) };
    let (answer, answered) = mpsc::channel();
    engine.send(&endpoint, message, move |sent| answer.send(sent).unwrap());
    answered.recv_timeout(PATIENCE).expect("a call is always answered")
}

pub fn request(engine: &Engine, endpoint: &str, message: Message) -> Result<RawFrame, macula_peer::RequestError> {
    let endpoint = Target::Endpoint(EndpointRef::parse(endpoint).unwrap());
    let (answer, answered) = mpsc::channel();
    engine.request(&endpoint, message, move |reply| answer.send(reply).unwrap());
    answered.recv_timeout(PATIENCE).expect("a call is always answered")
}

/// All that was sent is acknowledged.
pub fn owes_nothing(engine: &Engine) -> bool {
    engine.stats().peers.iter().all(|peer| peer.unacknowledged_bytes == 0)
}

#[track_caller]
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A UDP forwarder in front of one server, for one client: loses packets by a seed or by their size, delays, or swallows
/// everything.
pub struct Forwarder {
    pub address: SocketAddr,
    swallow: Arc<AtomicBool>,
    mute: Arc<AtomicBool>,
    widest: Arc<AtomicUsize>,
    rate: Arc<AtomicUsize>,
    hold: Arc<AtomicBool>,
    moves: Arc<AtomicBool>,
    /// Packets that were too wide.
    pub too_wide: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    pub fn new(server: SocketAddr, seed: u64, loss: f64, delay: Duration) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut back = UdpSocket::bind("127.0.0.1:0").unwrap();
        back.connect(server).unwrap();
        for socket in [&front, &back] {
            socket.set_nonblocking(true).unwrap();
        }
        let address = front.local_addr().unwrap();
        let (swallow, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let widest = Arc::new(AtomicUsize::new(usize::MAX));
        let too_wide = Arc::new(AtomicUsize::new(0));
        let rate = Arc::new(AtomicUsize::new(usize::MAX));
        let (moves, mute) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let flags = (swallow.clone(), mute.clone(), widest.clone(), too_wide.clone(), moves.clone(), stop.clone());
        let hold = Arc::new(AtomicBool::new(false));
        let (set_rate, held) = (rate.clone(), hold.clone());
        let thread = std::thread::spawn(move || {
            let (swallow, mute, widest, too_wide, moves, stop) = flags;
            let mut directions = [Direction::default(), Direction::default()];
            let mut random = fastrand::Rng::with_seed(seed);
            let mut client = None;
            let mut queue: VecDeque<(Instant, bool, Vec<u8>)> = VecDeque::new();
            let mut buffer = [0; 65536];
            while !stop.load(Ordering::Relaxed) {
                let mut idle = true;
                if moves.swap(false, Ordering::Relaxed) {
                    // The old one stays bound meanwhile, so this is another port.
                    let new = UdpSocket::bind("127.0.0.1:0").unwrap();
                    new.connect(server).unwrap();
                    new.set_nonblocking(true).unwrap();
                    back = new;
                }
                while let Ok((n, from)) = front.recv_from(&mut buffer) {
                    idle = false;
                    // The client's other sockets ask what its NAT is like, and get no answer.
                    if buffer[0] < 0x40 {
                        continue;
                    }
                    client = Some(from);
                    if let Some(out) = directions[0].pass(n, set_rate.load(Ordering::Relaxed)) {
                        queue.push_back((out + delay, true, buffer[..n].to_vec()));
                    }
                }
                while let Ok(n) = back.recv(&mut buffer) {
                    idle = false;
                    if let Some(out) = directions[1].pass(n, set_rate.load(Ordering::Relaxed)) {
                        queue.push_back((out + delay, false, buffer[..n].to_vec()));
                    }
                }
                // Each direction has its own queue: a slow one does not delay the other.
                let due = |queue: &VecDeque<(Instant, bool, Vec<u8>)>| {
                    let due = queue.iter().position(|(due, ..)| *due <= Instant::now());
                    due.filter(|_| !held.load(Ordering::Relaxed))
                };
                while let Some(next) = due(&queue) {
                    let (_, to_server, packet) = queue.remove(next).unwrap();
                    if packet.len() > widest.load(Ordering::Relaxed) {
                        too_wide.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let muted = !to_server && mute.load(Ordering::Relaxed);
                    if muted || swallow.load(Ordering::Relaxed) || random.f64() < loss {
                        continue;
                    }
                    // A refused packet is a lost packet.
                    let _ = match (to_server, client) {
                        (true, _) => back.send(&packet),
                        (false, Some(client)) => front.send_to(&packet, client),
                        (false, None) => Ok(0),
                    };
                }
                if idle {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Self { address, swallow, mute, widest, rate, hold, moves, too_wide, stop, thread: Some(thread) }
    }

    /// Holds back what returns until it is released, like a host that is stopped.
    pub fn hold(&self, all: bool) {
        self.hold.store(all, Ordering::Relaxed);
    }

    /// From now on, limits each direction to `rate` bytes a second, behind a queue of [`QUEUE`].
    pub fn throttle(&self, bytes_per_second: usize) {
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    pub fn swallow(&self, all: bool) {
        self.swallow.store(all, Ordering::Relaxed);
    }

    /// From now on nothing comes from the server.
    pub fn mute(&self) {
        self.mute.store(true, Ordering::Relaxed);
    }

    /// What the server sends comes again.
    pub fn unmute(&self) {
        self.mute.store(false, Ordering::Relaxed);
    }

    /// From now on the server sees the client at another address.
    pub fn move_away(&self) {
        self.moves.store(true, Ordering::Relaxed);
    }

    /// From now on, silently drops longer packets, as where ICMP is filtered.
    pub fn narrow(&self, widest: usize) {
        self.widest.store(widest, Ordering::Relaxed);
    }
}

/// Packets that wait longer before a slow path are dropped: the buffer of a home router.
const QUEUE: Duration = Duration::from_millis(300);

/// One direction of a slow path.
#[derive(Default)]
struct Direction {
    busy_until: Option<Instant>,
}

impl Direction {
    /// When a packet has passed, if there is room for it.
    fn pass(&mut self, len: usize, rate: usize) -> Option<Instant> {
        let now = Instant::now();
        if rate == usize::MAX {
            return Some(now);
        }
        let begins = self.busy_until.map_or(now, |busy| busy.max(now));
        let ends = begins + Duration::from_secs_f64(len as f64 / rate as f64);
        let fits = begins <= now + QUEUE;
        fits.then(|| {
            self.busy_until = Some(ends);
            ends
        })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A relay on loopback that gives everything, and its endpoint.
pub fn relay(port: u16) -> (Engine, String) {
    relay_of(Config { port, ..Config::default() })
}

pub fn relay_of(config: Config) -> (Engine, String) {
    let engine = engine(config);
    let generous = RelayConfig { bandwidth: 1 << 30, accept_rate: 10_000, ..RelayConfig::default() };
    let listen = Listen { relay: Some(generous), shares: ALL, ..Listen::default() };
    let port = engine.listen(listen).unwrap().port();
    (engine, format!("127.0.0.1:{port}"))
}

/// A runtime for attackers, on a processor that this thread, and what it starts from now on, keeps off: attackers come from
/// other hosts, so what their own work costs must not count. Everywhere but on Linux, and on one processor, it does.
pub fn attackers() -> Runtime {
    keep_to(1);
    let runtime = tokio_runtime(2).unwrap();
    keep_to(0);
    runtime
}

#[cfg(target_os = "linux")]
fn keep_to(processor: usize) {
    let mut set = nix::sched::CpuSet::new();
    set.set(processor).unwrap();
    // It fails where there is no such processor.
    let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set);
}

#[cfg(not(target_os = "linux"))]
fn keep_to(_processor: usize) {}

pub fn node_id(name: &str) -> NodeId {
    NodeId::new(name.as_bytes()).unwrap()
}

pub fn endpoint(text: &str) -> Endpoint {
    EndpointRef::parse(text).unwrap().to_owned()
}

/// A node that is registered at relays and gathers what arrives, over these alone.
pub fn member(name: &str, relays: &[&str]) -> (Engine, Arc<Inbox>) {
    member_of(Config { hole_punching: HolePunching::Off, ..Config::default() }, name, relays)
}

/// The same, with other settings.
pub fn member_of(config: Config, name: &str, relays: &[&str]) -> (Engine, Arc<Inbox>) {
    let engine = engine(config);
    let inbox = Arc::new(Inbox::default());
    engine.set_handler(Some(inbox.clone()));
    engine.register(node_id(name), relays.iter().map(|relay| endpoint(relay)).collect());
    let registered =
        |engine: &Engine| engine.stats().registrations.iter().filter(|r| r.state == Registration::Registered).count();
    until("registered", || registered(&engine) == relays.len());
    (engine, inbox)
}

/// Sends to a node as the NIF does.
pub fn send_to_node(engine: &Engine, name: &str, candidates: Candidates, message: Message) -> Result<(), SendError> {
    let node = node_id(name);
    let target = Target::Node(&node);
    let Err(message) = engine.send_now(&target, message, Instant::now()) else { return Ok(()) };
    let look_up = engine.learn(&node, candidates);
    let (answer, answered) = mpsc::channel();
    engine.send(&target, message, move |sent| answer.send(sent).unwrap());
    if look_up {
        engine.resolved(&node, true);
    }
    answered.recv_timeout(PATIENCE).expect("a call is always answered")
}

pub fn over(relays: &[&str]) -> Candidates {
    Candidates { relays: relays.iter().map(|relay| endpoint(relay)).collect(), ..Candidates::default() }
}
