//! Carries out what `macula_peer_core::detection` decides: finds out what the NAT in front of this node does, by asking its
//! relays.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};
use std::{io, mem};

use macula_peer_core::config::Config;
use macula_peer_core::detection::{self, Action, At, Detector, Found, Probe, Relays, Round, Turn};
use macula_peer_core::events::{Event, NatStatus};
use macula_peer_core::nat::{Description, NatProfile};
use macula_peer_core::proto::signal::MAX_LEN;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, canonical};
use tokio::net::UdpSocket;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use crate::inbox::Inbox;
use crate::lifecycle::Lifecycle;
use crate::net::Net;
use crate::relay::clients::Clients;
use crate::socket::{AFTER_ERROR, Received, Socket};

/// Answers that may wait: more than are ever asked for at once.
const WAITING: usize = 64;

/// What the rest of the node knows of the detection, and reports to it.
#[derive(Default)]
pub(crate) struct Nat {
    wanted: Notify,
    /// A relay sees this node elsewhere.
    moved: Notify,
    known: Mutex<Known>,
    /// Gets what comes to the main socket while an answer is expected there.
    listening: Mutex<Option<mpsc::Sender<Heard>>>,
    /// The host's addresses could not be listed.
    is_blind: AtomicBool,
}

#[derive(Debug, Clone, Default)]
struct Known {
    profile: NatProfile,
    observed: Option<SocketAddr>,
    since: Option<SystemTime>,
}

impl Nat {
    /// Something has changed, so another look is due.
    pub(crate) fn look(&self) {
        self.wanted.notify_one();
    }

    /// A relay sees this node at another address, so another look is due, and the other relays should see it too.
    pub(crate) fn moved(&self) {
        self.moved.notify_one();
    }

    /// Something that may be a relay's answer has come to the main socket.
    pub(crate) fn hear(&self, received: &Received) {
        if let Some(listening) = &*lock(&self.listening) {
            // Lost, it is asked for again.
            let _ = listening.try_send(Heard { by: detection::Socket::Main, from: received.from, received: *received });
        }
    }

    pub(crate) fn status(&self, net: &Net) -> NatStatus {
        let Known { profile, observed, since } = lock(&self.known).clone();
        let local = local_addresses(interfaces().unwrap_or_default(), &net.socket());
        NatStatus { profile, observed, local, since }
    }

    /// The addresses of the interfaces, if the system lists them. If it does not, that is logged once.
    fn local_addresses(&self, interfaces: io::Result<Vec<IpAddr>>, socket: &Socket) -> Vec<SocketAddr> {
        let interfaces = interfaces.unwrap_or_else(|error| {
            if !self.is_blind.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    %error,
                    "this host's addresses cannot be listed, so nodes behind the same NAT will be reached through relays only. \
                     If systemd's RestrictAddressFamilies is set for this service, it lacks AF_NETLINK"
                );
            }
            Vec::new()
        });
        local_addresses(interfaces, socket)
    }
}

/// What the detection uses of the node.
pub(crate) struct Detection {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) nat: Arc<Nat>,
    pub(crate) description: watch::Sender<Option<Description>>,
}

/// Runs until the engine stops.
pub(crate) async fn run(node: Arc<Detection>) {
    let mut stopping = node.lifecycle.stopping();
    tokio::select! {
        never = detect(&node) => match never {},
        // Also if it was said before this task first ran.
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

async fn detect(node: &Detection) -> Infallible {
    let mut detector = Detector::new(node.config.hole_punching, Instant::now());
    let mut sockets = Sockets::new(node.net.socket());
    let registering = || node.clients.is_registering();
    loop {
        while let Some(action) = detector.poll() {
            carry_out(node, &mut detector, &mut sockets, action).await;
        }
        let listening = detector.is_heard_by_main().then(|| sockets.hear.clone());
        *lock(&node.nat.listening) = listening;
        tokio::select! {
            Some(heard) = sockets.heard.recv() => hear(&mut detector, &heard),
            () = node.nat.moved.notified() => detector.moved(registering(), Instant::now()),
            () = node.nat.wanted.notified() => detector.wanted(registering(), Instant::now()),
            () = wait_until(detector.next_timeout()) => {
                // Nothing is asked again whose answer has come.
                for _ in 0..WAITING {
                    let Ok(heard) = sockets.heard.try_recv() else { break };
                    hear(&mut detector, &heard);
                }
                detector.timeout(registering(), Instant::now());
            }
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn hear(detector: &mut Detector, heard: &Heard) {
    detector.received(heard.by, heard.from, heard.received.bytes(), Instant::now());
}

async fn carry_out(node: &Detection, detector: &mut Detector, sockets: &mut Sockets, action: Action) {
    match action {
        Action::Begin => {
            *sockets = Sockets::new(node.net.socket());
            let main_port = sockets.main.local().port();
            detector.begin(relays(node, &sockets.main), main_port, fastrand::u64(..), Instant::now());
        }
        Action::Open(count) => {
            let ports = sockets.open(count);
            detector.opened(&ports, Instant::now());
        }
        Action::Send(probe) => sockets.send(&probe).await,
        Action::Heard(address) => sockets.main.addresses().heard(address),
        Action::Close => sockets.close(),
        Action::ReturnToUsual(relay) => node.net.ports.return_to_usual(relay),
        Action::Describe(profile) => describe(node, profile),
        Action::DescribeNothing => {
            node.description.send_if_modified(|known| known.replace(Description::default()).is_none());
        }
        Action::TellAgain => node.description.send_modify(|_| ()),
        Action::Found { found, news } => {
            let Found { profile, observed } = found;
            *lock(&node.nat.known) = Known { profile, observed: Some(observed), since: Some(SystemTime::now()) };
            if news {
                node.inbox.event(Event::Nat(node.nat.status(&node.net)));
            }
        }
    }
}

/// Relays that do not see the main socket's mapping do not get what it sends.
fn relays(node: &Detection, main: &Socket) -> Relays {
    let (mut to_check, mut usual): (Vec<_>, Vec<_>) =
        node.clients.probed().into_iter().partition(|probed| node.net.ports.is_elsewhere(probed.relay));
    let due = node.net.ports.to_check(to_check.iter().map(|probed| probed.relay));
    to_check.retain(|probed| due.contains(&probed.relay));
    usual.retain(|probed| main.reachable(probed.relay).is_some());
    Relays { usual, to_check }
}

/// Has the relays told what others need to know.
fn describe(node: &Detection, profile: NatProfile) {
    let candidates = detection::candidates(node.nat.local_addresses(interfaces(), &node.net.socket()));
    let description = Some(Description { profile, candidates });
    node.description.send_if_modified(|known| mem::replace(known, description.clone()) != description);
}

/// Where a relay sees a new socket.
pub(crate) async fn sample(node: &Detection, relay: &Endpoint) -> Option<SocketAddr> {
    let mut round = Round::sample(node.clients.probed_relay(relay)?, fastrand::u64(..), Instant::now());
    let mut sockets = Sockets::new(node.net.socket());
    if sockets.open(1).is_empty() {
        return None;
    }
    loop {
        match round.poll(Instant::now()) {
            Turn::Ask(probes) => {
                for probe in probes {
                    sockets.send(&probe).await;
                }
            }
            Turn::Wait(until) => tokio::select! {
                // What has come is looked at before it is asked for again.
                biased;
                Some(Heard { by, from, received }) = sockets.heard.recv() => {
                    if let Some(asked) = round.received(by, from, received.bytes(), Instant::now()) {
                        sockets.main.addresses().heard(asked);
                    }
                }
                () = sleep_until(until.into()) => {}
            },
            Turn::Over => return round.sampled(),
        }
    }
}

/// Sockets that ask relays.
struct Sockets {
    main: Arc<Socket>,
    new: Vec<Arc<UdpSocket>>,
    hearing: JoinSet<()>,
    heard: mpsc::Receiver<Heard>,
    hear: mpsc::Sender<Heard>,
}

/// Something that came to one of the sockets.
struct Heard {
    by: detection::Socket,
    from: SocketAddr,
    received: Received,
}

impl Sockets {
    fn new(main: Arc<Socket>) -> Self {
        let (hear, heard) = mpsc::channel(WAITING);
        Self { main, new: Vec::new(), hearing: JoinSet::new(), heard, hear }
    }

    /// Opens so many, or as many as the system allows. Returns their local ports.
    fn open(&mut self, count: usize) -> Vec<u16> {
        let opened = (0..count).map_while(|n| {
            let open = self.main.open_beside().and_then(|socket| Ok((socket.local_addr()?.port(), Arc::new(socket))));
            let (port, socket) = open.map_err(|error| tracing::debug!(%error, "no socket to ask with")).ok()?;
            self.new.push(socket.clone());
            self.hearing.spawn(listen(detection::Socket::New(n), socket, self.hear.clone()));
            Some(port)
        });
        opened.collect()
    }

    fn close(&mut self) {
        self.hearing.abort_all();
        self.new.clear();
    }

    async fn send(&self, probe: &Probe) {
        if !self.may_send(probe) {
            return;
        }
        let signal = probe.encode();
        match (probe.by, self.main.reachable(probe.to)) {
            (detection::Socket::Main, _) => self.main.send_signal(probe.to, &signal),
            (detection::Socket::New(n), Some(to)) => {
                if let Some(socket) = self.new.get(n) {
                    // What cannot be sent is not answered.
                    let _ = socket.send_to(&signal, to).await;
                }
            }
            (detection::Socket::New(_), None) => {}
        }
    }

    /// A relay is where this node is registered. The other address that it names may be that of a stranger, until it answers.
    fn may_send(&self, probe: &Probe) -> bool {
        let addresses = self.main.addresses();
        match probe.at {
            At::Relay | At::OtherPort => addresses.may_signal(probe.to),
            At::OtherAddress => addresses.may_signal_unheard(probe.to),
        }
    }
}

async fn listen(by: detection::Socket, socket: Arc<UdpSocket>, hear: mpsc::Sender<Heard>) {
    // One byte more than what is looked at.
    let mut buffer = [0; MAX_LEN + 1];
    loop {
        // An error is about one datagram.
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            sleep(AFTER_ERROR).await;
            continue;
        };
        if let Some(received) = Received::new(&buffer[..len], from, None) {
            // Lost, it is asked for again.
            let _ = hear.try_send(Heard { by, from: canonical(from), received });
        }
    }
}

fn local_addresses(interfaces: Vec<IpAddr>, socket: &Socket) -> Vec<SocketAddr> {
    detection::local_addresses(interfaces, socket.local(), |address| socket.reachable(address).is_some())
}

#[cfg(unix)]
fn interfaces() -> io::Result<Vec<IpAddr>> {
    use nix::net::if_::InterfaceFlags;
    let all = nix::ifaddrs::getifaddrs()?;
    let up = all.filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING));
    let ips = up.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    Ok(ips.collect())
}

#[cfg(not(unix))]
fn interfaces() -> io::Result<Vec<IpAddr>> {
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;
    use crate::{Config, EndpointRef, Engine, Listen, NodeId, RelayConfig};

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn the_port_of_a_new_socket_is_told() {
        let relay = Engine::start(Config::default()).unwrap();
        let listen = Listen { relay: Some(RelayConfig::default()), ..Listen::default() };
        let address = format!("127.0.0.1:{}", relay.listen(listen).unwrap().port());
        let node = Engine::start(Config::default()).unwrap();
        let endpoint = EndpointRef::parse(&address).unwrap().to_owned();
        node.register(NodeId::new(b"node").unwrap(), vec![endpoint.clone()]);
        let until = Instant::now() + PATIENCE;
        while node.nat_profile().since.is_none() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(2));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let sampled = || runtime.block_on(sample(&node.node().detection, &endpoint));
        let (one, two) = (sampled().unwrap(), sampled().unwrap());
        assert!(one.ip().is_loopback() && one != two && one.port() != node.local_address().unwrap().port());
        relay.stop();
        assert_eq!(sampled(), None);
        node.stop();
    }

    #[tokio::test]
    async fn addresses_that_the_system_does_not_tell_are_missed_once() {
        let (signals, _) = crate::socket::signals();
        let socket = Socket::bind(None, 0, None, crate::socket::refusals(), signals, Arc::default()).unwrap();
        let nat = Nat::default();
        let told = || Ok(vec![[192, 0, 2, 7].into()]);
        let at = SocketAddr::new([192, 0, 2, 7].into(), socket.local().port());
        assert_eq!(nat.local_addresses(told(), &socket), [at]);
        assert!(!nat.is_blind.load(Ordering::Relaxed));
        for _ in 0..2 {
            let refused = Err(io::ErrorKind::Unsupported.into());
            assert_eq!(nat.local_addresses(refused, &socket), []);
            assert!(nat.is_blind.load(Ordering::Relaxed));
        }
        assert_eq!(nat.local_addresses(told(), &socket), [at]);
    }

    #[tokio::test]
    async fn a_socket_is_reached_at_what_it_is_bound_to() {
        let local = |ip: Option<IpAddr>| {
            let (signals, _) = crate::socket::signals();
            let socket = Socket::bind(ip, 0, None, crate::socket::refusals(), signals, Arc::default()).unwrap();
            (local_addresses(interfaces().unwrap(), &socket), socket.local().port())
        };
        let (all, port) = local(None);
        assert!(all.iter().all(|address| address.port() == port && !address.ip().is_loopback()));
        for one in all {
            let (only, port) = local(Some(one.ip()));
            assert_eq!(only, [SocketAddr::new(one.ip(), port)]);
        }
        assert_eq!(local(Some([127, 0, 0, 1].into())).0, []);
    }
}
