//! What this node finds out about the NAT that it is behind, by asking its relays.
//!
//! Three rounds of questions: where relays see the main socket; where they see new sockets, of which the first asks at all
//! of their addresses and the others at one; and whether the last of these hears of addresses that it has sent nothing to.
//! `macula_peer_core::nat` says what the answers mean.

use std::cmp::Reverse;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use std::{io, mem};

use macula_peer_core::config::{Config, HolePunching};
use macula_peer_core::coordinate::is_local;
use macula_peer_core::events::{Event, NatStatus};
use macula_peer_core::nat::{Description, NatProfile, Observations, Unsolicited};
use macula_peer_core::proto::signal::{AnswerFrom, Body, Key, MAX_LEN, Signal, Unverified};
use macula_peer_core::punch::MAX_CANDIDATES;
use macula_peer_core::retry::Backoff;
use macula_peer_core::shares::Bucket;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, canonical};
use tokio::net::UdpSocket;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use crate::inbox::Inbox;
use crate::lifecycle::Lifecycle;
use crate::net::Net;
use crate::relay::client::Probed;
use crate::relay::clients::Clients;
use crate::socket::{AFTER_ERROR, Received, Socket};

/// A node registers at all its relays at once, and they answer within a round trip of each other, or a lost packet later.
const SETTLE: Duration = Duration::from_millis(500);

/// Between two looks: registrations that come and go must not cost more than a few packets a second.
const PAUSE: Duration = Duration::from_secs(2);

/// Looks, and times that relays are told again what they know, because a relay says that this node has moved or registers it:
/// after so many at once, one in so long. A relay may say so all the time.
const AT_ONCE: u64 = 8;
const EACH_IN: Duration = Duration::from_secs(15);

/// Relays that do not answer at all are asked again after this long, and ever longer: most likely their packets are filtered on
/// the way, and that rarely changes.
const RETRY: Duration = Duration::from_secs(10);
const LONGEST_RETRY: Duration = Duration::from_secs(600);

/// More relays tell nothing new.
const MAX_RELAYS: usize = 3;

/// New sockets whose ports are compared: with four steps between them, one may be out of line.
const NEW_SOCKETS: usize = 4;

/// How long the first answers may take: three times a long round trip.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Later rounds take as many times the longest round trip of the first, for what is lost and sent again, and no less than
/// a busy relay may need.
const ROUND_TRIPS: u32 = 5;
const LEAST_PATIENCE: Duration = Duration::from_millis(150);

/// What is not answered is asked again after this share of a round's time, and once more after twice as much.
const AGAIN: u32 = 4;
const TRIES: u32 = 3;

/// Answers that may wait to be looked at: more than are ever asked for at once.
const WAITING: usize = 64;

/// A host's addresses beyond these are not told: each costs a peer packets.
const MAX_LOCAL: usize = 16;

/// The node's side of it.
#[derive(Default)]
pub(crate) struct Nat {
    wanted: Notify,
    /// A relay sees this node elsewhere.
    moved: Notify,
    found: Mutex<Found>,
    /// Gets what comes to the main socket while somebody asks.
    listening: Mutex<Option<mpsc::Sender<Heard>>>,
    /// The host's addresses could not be listed.
    is_blind: AtomicBool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Found {
    profile: NatProfile,
    observed: Option<SocketAddr>,
    since: Option<SystemTime>,
}

impl Nat {
    /// Something has changed: it is to be found out anew.
    pub(crate) fn look(&self) {
        self.wanted.notify_one();
    }

    /// A relay sees this node at another address: it is to be found out anew, and the other relays are to see it too.
    pub(crate) fn moved(&self) {
        self.moved.notify_one();
        self.look();
    }

    /// An answer of a relay, perhaps, has come to the main socket.
    pub(crate) fn hear(&self, received: &Received) {
        if let Some(listening) = &*lock(&self.listening) {
            // Lost, it is asked for again.
            let _ = listening.try_send(Heard { by: MAIN, from: received.from, received: *received });
        }
    }

    pub(crate) fn status(&self, net: &Net) -> NatStatus {
        let Found { profile, observed, since } = lock(&self.found).clone();
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

/// What finds it out.
pub(crate) struct Detection {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) nat: Arc<Nat>,
    pub(crate) description: watch::Sender<Option<Description>>,
}

/// Finds it out whenever that is wanted, until the engine stops.
pub(crate) async fn run(node: Arc<Detection>) {
    let mut stopping = node.lifecycle.stopping();
    let look = async {
        let (mut answered, mut pace, mut retry) = (true, Pace::new(), Backoff::new(RETRY, LONGEST_RETRY));
        loop {
            tokio::select! {
                () = node.nat.wanted.notified() => {
                    settle(&node).await;
                    pace.wait().await;
                }
                () = sleep(retry.pause(1.0)), if !answered => {}
            }
            answered = look(&node).await;
            if answered {
                retry.reset();
            }
            sleep(PAUSE).await;
        }
    };
    // Other relays see a new address with the next packet: told again what they know, they get one now and not with the next
    // keep-alive. And a direct path that was not to be had may be there now.
    let tell = async {
        let mut pace = Pace::new();
        loop {
            node.nat.moved.notified().await;
            pace.wait().await;
            node.description.send_modify(|_| ());
        }
    };
    tokio::select! {
        never = look => never,
        never = tell => never,
        // Also if it was said before this task first ran.
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

/// How often something may happen that others cause.
struct Pace(Bucket);

impl Pace {
    fn new() -> Self {
        // A token is a second.
        Self(Bucket::new(1, AT_ONCE * EACH_IN.as_secs(), Instant::now()))
    }

    async fn wait(&mut self) {
        while !self.0.take(EACH_IN.as_secs(), Instant::now()) {
            sleep(PAUSE).await;
        }
    }
}

/// Waits for the relays that are being dialled: two tell more than one.
async fn settle(node: &Detection) {
    let more = async {
        while node.clients.is_registering() {
            node.nat.wanted.notified().await;
        }
    };
    let _ = timeout(SETTLE, more).await;
}

/// The port that the NAT gives to a new socket: a contiguous one gives the next ones to those that follow.
pub(crate) async fn sample(node: &Detection, relay: &Endpoint) -> Option<SocketAddr> {
    let probed = node.clients.probed_relay(relay)?;
    let mut asking = Asking::new(node, vec![probed]);
    let by = asking.open().ok()?;
    let probe = asking.probe(by, 0, At::Relay, None)?;
    asking.ask(&mut [probe], FIRST_PATIENCE / 2).await.first()?.map(|answer| answer.seen)
}

/// False if no relay answered.
async fn look(node: &Detection) -> bool {
    let (elsewhere, usual) =
        node.clients.probed().into_iter().partition(|probed| node.net.ports.is_elsewhere(probed.relay));
    try_usual_port(node, elsewhere).await;
    // The others do not see the main socket's mapping, and what it sends them does not arrive.
    let relays = chosen(usual, &node.net.socket());
    if node.config.hole_punching == HolePunching::Off {
        // What the NAT is like is for direct paths alone.
        node.description.send_if_modified(|known| known.replace(Description::default()).is_none());
        if let Some(probed) = relays.first() {
            let profile = NatProfile::default();
            found(node, Found { profile, observed: Some(probed.seen_at), since: Some(SystemTime::now()) });
        }
        return true;
    }
    if relays.is_empty() {
        // Relays that answer no probes: nobody is to wait for what they tell.
        if node.description.borrow().is_none() {
            describe(node, NatProfile::default());
        }
        return true;
    }
    let new = find_out(node, relays).await;
    describe(node, new.as_ref().map_or_else(NatProfile::default, |found| found.profile));
    let Some(new) = new else { return false };
    found(node, new);
    true
}

fn found(node: &Detection, found: Found) {
    let news = {
        let mut known = lock(&node.nat.found);
        let news = (known.profile, known.observed) != (found.profile, found.observed);
        *known = found;
        news
    };
    if news {
        node.inbox.event(Event::Nat(node.nat.status(&node.net)));
    }
}

/// Checks whether relays that answered only packets from another port of this node now answer the usual one. If so,
/// packets to them leave by it again, and they see this node there with the next packet.
async fn try_usual_port(node: &Detection, mut relays: Vec<Probed>) {
    let due = node.net.ports.to_check(relays.iter().map(|probed| probed.relay));
    relays.retain(|probed| due.contains(&probed.relay));
    if relays.is_empty() {
        return;
    }
    let mut asking = Asking::new(node, relays);
    let all = 0..asking.relays.len();
    let mut probes: Vec<_> = all.filter_map(|relay| asking.probe(MAIN, relay, At::Relay, None)).collect();
    let answers = asking.ask(&mut probes, FIRST_PATIENCE).await;
    for (probe, _) in probes.iter().zip(answers).filter(|(_, answer)| answer.is_some()) {
        node.net.ports.return_to_usual(probe.to);
        // This sends the profile again, so the relay gets a packet now.
        node.description.send_modify(|_| ());
    }
}

/// Has the relays told what others need to know.
fn describe(node: &Detection, profile: NatProfile) {
    let candidates = node
        .nat
        .local_addresses(interfaces(), &node.net.socket())
        .into_iter()
        .filter(|to| is_local(*to))
        .take(MAX_CANDIDATES);
    let description = Some(Description { profile, candidates: candidates.collect() });
    node.description.send_if_modified(|known| mem::replace(known, description.clone()) != description);
}

/// Those that tell the most: of one family, IPv4 if there are any, and at different addresses.
fn chosen(mut relays: Vec<Probed>, socket: &Socket) -> Vec<Probed> {
    relays.retain(|probed| socket.reachable(probed.relay).is_some());
    let v4 = relays.iter().any(|probed| probed.relay.is_ipv4());
    relays.retain(|probed| probed.relay.is_ipv4() == v4);
    // The same ones in the same order each time.
    relays.sort_by_key(|probed| probed.relay);
    let mut seen: Vec<IpAddr> = Vec::new();
    relays.sort_by_cached_key(|probed| {
        let again = seen.contains(&probed.relay.ip());
        seen.push(probed.relay.ip());
        again
    });
    relays.truncate(MAX_RELAYS);
    relays
}

/// `None`: no relay answers.
async fn find_out(node: &Detection, relays: Vec<Probed>) -> Option<Found> {
    let mut asking = Asking::new(node, relays);

    let mut main = Vec::new();
    for relay in 0..asking.relays.len() {
        main.extend(At::ALL.into_iter().filter_map(|at| asking.probe(MAIN, relay, at, None)));
    }
    let answers = asking.ask(&mut main, FIRST_PATIENCE).await;
    let observations = observed(&asking, &main, &answers);
    let answered = |n: &usize| answers[*n].is_some();
    // The relay that is asked by all new sockets: the quickest of those that answer.
    let first = (0..main.len()).filter(|n| main[*n].at == At::Relay).filter(answered);
    let first = first.min_by_key(|n| answers[*n].map(|answer| answer.after))?;
    let seen = answers[first]?.seen;
    let longest = answers.iter().flatten().map(|answer| answer.after).max()?;
    let patience = (longest * ROUND_TRIPS).clamp(LEAST_PATIENCE, FIRST_PATIENCE);
    let first = main[first].relay;
    let answering: Vec<_> = (0..main.len()).filter(answered).map(|n| (main[n].relay, main[n].at)).collect();

    let mut new = Vec::new();
    for n in 0..NEW_SOCKETS {
        let by = asking.open().map_err(|error| tracing::debug!(%error, "no socket to ask with")).ok()?;
        match n {
            0 => new.extend(answering.iter().filter_map(|&(relay, at)| asking.probe(by, relay, at, None))),
            _ => new.extend(asking.probe(by, first, At::Relay, None)),
        }
    }
    let answers = asking.ask(&mut new, patience).await;
    let mut observations_new = observed(&asking, &new, &answers);

    // The last one has asked nobody else.
    if let (Some(last), Some(Some(answer))) = (new.last(), answers.last()) {
        for (from, came) in unsolicited(&mut asking, &answering, last, answer.seen, patience).await {
            observations_new.answered(from, came);
        }
    }

    let profile = observations_new.profile();
    // That of the socket that counts, if it is known.
    let mapping = observations.profile().mapping.or(profile.mapping);
    Some(Found { profile: NatProfile { mapping, ..profile }, observed: Some(seen), since: Some(SystemTime::now()) })
}

/// Whether a socket hears of where it has sent nothing. It has asked `known`, and is seen at `seen`.
async fn unsolicited(
    asking: &mut Asking<'_>,
    answering: &[(usize, At)],
    known: &Probe,
    seen: SocketAddr,
    patience: Duration,
) -> Vec<(Unsolicited, bool)> {
    let mut probes = Vec::new();
    for &(relay, at) in answering {
        probes.extend(match (relay == known.relay, at) {
            (true, At::Relay) => None,
            (true, elsewhere) => asking.probe(known.by, relay, At::Relay, Some(Elsewhere::From(elsewhere))),
            // Only to that address does a relay answer.
            (false, At::Relay) if asking.relays[relay].seen_at.ip() == seen.ip() => {
                let new = NonZeroU16::new(seen.port()).map(|port| Elsewhere::To(known.by, port));
                new.and_then(|new| asking.probe(MAIN, relay, At::Relay, Some(new)))
            }
            (false, _) => None,
        });
    }
    let heard = asking.ask(&mut probes, patience).await;
    let meant = probes.iter().map(|probe| match probe.answer.1.ip() == known.to.ip() {
        true => Unsolicited::OtherPort,
        false => Unsolicited::OtherAddress,
    });
    meant.zip(heard).map(|(from, heard)| (from, heard.is_some())).collect()
}

fn observed(asking: &Asking<'_>, probes: &[Probe], answers: &[Option<Answer>]) -> Observations {
    let mut observations = Observations::default();
    for (probe, answer) in probes.iter().zip(answers) {
        if let Some(answer) = answer {
            observations.mapped(asking.local_port(probe.by), probe.to, answer.seen);
        }
    }
    observations
}

/// The number of the main socket among those that ask.
const MAIN: usize = 0;

/// Sockets that ask relays, until it is dropped.
struct Asking<'a> {
    node: &'a Detection,
    socket: Arc<Socket>,
    relays: Vec<Probed>,
    keys: Vec<Key>,
    /// The first one is number 1.
    new: Vec<Arc<UdpSocket>>,
    hearing: JoinSet<()>,
    heard: mpsc::Receiver<Heard>,
    hear: mpsc::Sender<Heard>,
}

/// Where a relay answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Where this node is registered.
    Relay,
    OtherPort,
    OtherAddress,
}

impl At {
    const ALL: [Self; 3] = [Self::Relay, Self::OtherPort, Self::OtherAddress];

    /// `None`: the relay has no such address.
    fn of(self, probed: &Probed) -> Option<SocketAddr> {
        match self {
            Self::Relay => Some(probed.relay),
            Self::OtherPort => Some(probed.other_port()),
            Self::OtherAddress => probed.other_address(),
        }
    }
}

/// Where an answer is to come from or go to, if not back the way that the question took.
#[derive(Debug, Clone, Copy)]
enum Elsewhere {
    /// From there.
    From(At),
    /// To the new socket of this number, which has this port outside.
    To(usize, NonZeroU16),
}

/// A question.
struct Probe {
    by: usize,
    relay: usize,
    at: At,
    to: SocketAddr,
    signal: Signal,
    /// By which socket the answer comes, and from where.
    answer: (usize, SocketAddr),
    sent: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Answer {
    seen: SocketAddr,
    /// Since the question was first asked.
    after: Duration,
}

/// Something that came to one of the sockets.
struct Heard {
    by: usize,
    from: SocketAddr,
    received: Received,
}

impl<'a> Asking<'a> {
    fn new(node: &'a Detection, relays: Vec<Probed>) -> Self {
        let (hear, heard) = mpsc::channel(WAITING);
        let keys = relays.iter().map(|probed| Key::from(&probed.probes.secret)).collect();
        Self { node, socket: node.net.socket(), relays, keys, new: Vec::new(), hearing: JoinSet::new(), heard, hear }
    }

    /// Another socket; its number.
    fn open(&mut self) -> io::Result<usize> {
        let socket = Arc::new(self.socket.open_beside()?);
        self.new.push(socket.clone());
        let by = self.new.len();
        self.hearing.spawn(listen(by, socket, self.hear.clone()));
        Ok(by)
    }

    fn local_port(&self, by: usize) -> u16 {
        match by.checked_sub(1).and_then(|at| self.new.get(at)) {
            Some(socket) => socket.local_addr().map_or(0, |address| address.port()),
            None => self.socket.local().port(),
        }
    }

    fn probe(&self, by: usize, relay: usize, at: At, elsewhere: Option<Elsewhere>) -> Option<Probe> {
        let probed = &self.relays[relay];
        let to = at.of(probed)?;
        let (from, to_port, answer) = match elsewhere {
            None => (AnswerFrom::Same, None, (by, to)),
            Some(Elsewhere::From(elsewhere)) => {
                let from = match elsewhere {
                    At::Relay => AnswerFrom::Same,
                    At::OtherPort => AnswerFrom::OtherPort,
                    At::OtherAddress => AnswerFrom::OtherAddress,
                };
                (from, None, (by, elsewhere.of(probed)?))
            }
            Some(Elsewhere::To(socket, port)) => (AnswerFrom::Same, Some(port), (socket, to)),
        };
        let body = Body::ProbeRequest { from, to_port };
        let signal = Signal { id: probed.probes.id, nonce: fastrand::u64(..), body };
        Some(Probe { by, relay, at, to, signal, answer, sent: None })
    }

    /// Asks everything, in this order, and waits until all is answered, for so long at most.
    async fn ask(&mut self, probes: &mut [Probe], patience: Duration) -> Vec<Option<Answer>> {
        let by_main = probes.iter().any(|probe| probe.answer.0 == MAIN);
        let _listening = by_main.then(|| Listening::new(&self.node.nat, self.hear.clone()));
        let mut answers = vec![None; probes.len()];
        let begun = Instant::now();
        let again = patience / AGAIN;
        let mut tries = 0;
        while answers.iter().any(Option::is_none) {
            let due = begun + if tries < TRIES { again * tries } else { patience };
            tokio::select! {
                // What has come is looked at before it is asked for again.
                biased;
                // `hear` is here, too.
                Some(heard) = self.heard.recv() => {
                    if let Some((at, answer)) = self.answer(probes, &heard) {
                        answers[at].get_or_insert(answer);
                    }
                }
                () = sleep_until(due.into()) => {
                    if tries == TRIES {
                        break;
                    }
                    tries += 1;
                    for (probe, _) in probes.iter_mut().zip(&answers).filter(|(_, answer)| answer.is_none()) {
                        probe.sent.get_or_insert_with(Instant::now);
                        self.send(probe).await;
                    }
                }
            }
        }
        answers
    }

    /// Whether it may be sent. A relay is where it is registered at; what else it names may be somebody else's, until it answers.
    fn may_send(&self, probe: &Probe) -> bool {
        let addresses = self.socket.addresses();
        match probe.at {
            At::Relay | At::OtherPort => addresses.may_signal(probe.to),
            At::OtherAddress => addresses.may_signal_unheard(probe.to),
        }
    }

    async fn send(&self, probe: &Probe) {
        if !self.may_send(probe) {
            return;
        }
        let signal = probe.signal.encode(&self.keys[probe.relay]);
        match (probe.by.checked_sub(1).and_then(|at| self.new.get(at)), self.socket.reachable(probe.to)) {
            // What cannot be sent is not answered.
            (Some(socket), Some(to)) => drop(socket.send_to(&signal, to).await),
            _ => self.socket.send_signal(probe.to, &signal),
        }
    }

    fn answer(&self, probes: &[Probe], heard: &Heard) -> Option<(usize, Answer)> {
        let unverified = Unverified::parse(heard.received.bytes())?;
        let asked = |probe: &Probe| probe.signal.nonce == unverified.nonce();
        let at = probes.iter().position(asked)?;
        let probe = &probes[at];
        let signal = unverified.verify(&self.keys[probe.relay])?;
        let Body::ProbeReply { observed } = signal.body else { return None };
        if signal.id != probe.signal.id || (heard.by, heard.from) != probe.answer {
            return None;
        }
        // Whoever answers has the question.
        self.socket.addresses().heard(probe.to);
        Some((at, Answer { seen: observed, after: probe.sent?.elapsed() }))
    }
}

async fn listen(by: usize, socket: Arc<UdpSocket>, hear: mpsc::Sender<Heard>) {
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

/// Somebody listens to what comes to the main socket.
struct Listening<'a>(&'a Nat);

impl<'a> Listening<'a> {
    fn new(nat: &'a Nat, hear: mpsc::Sender<Heard>) -> Self {
        *lock(&nat.listening) = Some(hear);
        Self(nat)
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        *lock(&self.0.listening) = None;
    }
}

/// Those of the host's addresses at which others in its networks may reach the main socket.
fn local_addresses(interfaces: Vec<IpAddr>, socket: &Socket) -> Vec<SocketAddr> {
    let bound = socket.local();
    let of_socket = |ip: &IpAddr| bound.ip().is_unspecified() || *ip == canonical(bound).ip();
    let reachable = |ip: &IpAddr| socket.reachable((*ip, bound.port()).into()).is_some();
    let mut ips: Vec<IpAddr> =
        interfaces.into_iter().filter(|ip| of_socket(ip) && reachable(ip) && is_told(ip)).collect();
    // Where two networks are in reach, the one of the older family is more often behind the NAT that is to be passed.
    ips.sort_by_key(|ip| (Reverse(ip.is_ipv4()), *ip));
    ips.dedup();
    ips.truncate(MAX_LOCAL);
    ips.into_iter().map(|ip| (ip, bound.port()).into()).collect()
}

/// Loopback and link-local addresses mean something else to everybody.
fn is_told(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified()),
    }
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
        assert!(all.iter().all(|address| address.port() == port && is_told(&address.ip())));
        assert!(all.is_sorted_by_key(|address| address.is_ipv6()) && all.len() <= MAX_LOCAL);
        for one in all {
            let (only, port) = local(Some(one.ip()));
            assert_eq!(only, [SocketAddr::new(one.ip(), port)]);
        }
        assert_eq!(local(Some([127, 0, 0, 1].into())).0, []);
    }
}
