//! A node's peers: carries out what the link's machine decides, with the real queue and the real session.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::network::{Event, MS, Time};
use super::node::{FORGOTTEN, Node, Said, Use, WRONG_NODE, link_id, refusal};
use super::quic::{Carrier, ConnId, Item, Opened, StreamId, Why};
use super::request::{Asking, Request};
use super::world::{World, trace};
use crate::drive::{self, Owner};
use crate::errors::{CircuitError, ConnectError, PunchError, SendError, UndeliveredReason};
use crate::knowledge::Knowledge;
use crate::link_state::{self, Action, Demand, LinkState, Offer, Setup, Want};
use crate::patience::Patience;
use crate::queue::{GivenUp, OWED_WITHOUT_DEADLINE, Queue, Queued};
use crate::race::{self, Attempt, AttemptId, Ended, Tries};
use crate::session_sender::{Owed, SessionSender, Settled, StreamEnd};
use crate::trust::{Answer, Verdict};
use crate::types::{Candidates, Dialect, Endpoint, EndpointRef, Fingerprint, Link};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_EVERY: Time = link_state::SWEEP_EVERY.as_micros() as Time;
const REPLACED_FOR: Time = link_state::REPLACED_FOR.as_micros() as Time;

/// Of a large message.
const PARTS: usize = 62;

/// A message on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Envelope {
    pub(super) id: u32,
    pub(super) deadline: Option<Instant>,
    pub(super) key: Option<Fingerprint>,
    pub(super) large: bool,
}

impl Peer {
    /// When the oldest message that is not acknowledged was written.
    fn oldest(&self) -> Option<Instant> {
        self.session.oldest().into_iter().chain(self.written.front().map(|written| written.at)).min()
    }

    fn why_late(&self) -> UndeliveredReason {
        if self.state.meets_another_key() { UndeliveredReason::Untrusted } else { UndeliveredReason::Expired }
    }

    /// How many messages it has.
    pub(super) fn owed(&self) -> usize {
        self.session.len() + self.written.len()
    }

    /// Whether a connection is about to be closed because there is a better one.
    pub(super) fn has_replaced(&self, conn: ConnId) -> bool {
        self.replaced.iter().any(|(replaced, _)| *replaced == conn)
    }
}

/// A message that a link or a session held.
fn owed(envelope: Envelope, now: Instant) -> Job {
    let deadline = Some(envelope.deadline.unwrap_or(now + OWED_WITHOUT_DEADLINE));
    Job { envelope: Envelope { deadline, ..envelope }, at: now, accepted: true, request: None }
}

impl Owed for Envelope {
    fn size(&self) -> usize {
        if self.large { PARTS * 1100 } else { 300 }
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

impl Envelope {
    fn is_for(&self, shown: Option<Fingerprint>) -> bool {
        self.key.is_none() || self.key == shown
    }
}

#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) envelope: Envelope,
    pub(super) at: Instant,
    /// Its sender has its `ok`.
    pub(super) accepted: bool,
    pub(super) request: Option<Request>,
}

impl Queued for Job {
    fn is_accepted(&self) -> bool {
        self.accepted
    }

    fn is_wanted(&self) -> bool {
        self.request.as_ref().is_none_or(|request| !request.cancelled.get())
    }

    fn queued_at(&self) -> Instant {
        self.at
    }

    fn deadline(&self) -> Option<Instant> {
        self.envelope.deadline
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.envelope.deadline = Some(deadline);
    }

    fn key(&self) -> Option<Fingerprint> {
        self.envelope.key
    }
}

pub(super) struct Peer {
    /// The number of its node id.
    pub(super) name: usize,
    pub(super) state: LinkState,
    pub(super) queue: Queue<Job>,
    /// Requests that wait for their answers.
    pub(super) asking: Vec<Asking>,
    pub(super) session: SessionSender<Envelope>,
    streams: [Option<Out>; 2],
    /// Whether it is a gateway, known by its address.
    gateway: Option<usize>,
    /// What went over a link of `macula`, oldest first.
    written: VecDeque<Written>,
    /// The peer that gets the messages instead.
    legacy_relay: Option<usize>,
    known: Knowledge,
    arrived: bool,
    trying: Vec<Trying>,
    /// The connection that messages go over, suspect or not.
    pub(super) link: Option<ConnId>,
    /// How long it may be silent.
    patience: Patience,
    /// Callers see it.
    pub(super) visible: bool,
    replaced: Vec<(ConnId, Time)>,
    swept_at: Time,
    dirty: bool,
    armed: Time,
    pub(super) watch: super::promises::Watch,
}

/// A message that has its stream for itself.
struct Written {
    envelope: Envelope,
    at: Instant,
    stream: StreamId,
    arrived: bool,
}

/// A stream of the session that goes out.
struct Out {
    conn: ConnId,
    stream: StreamId,
    /// What opens it, until it is needed.
    opening: Option<Rc<Opened>>,
}

/// An attempt on its way.
struct Trying {
    id: AttemptId,
    attempt: Attempt,
    key: Option<Fingerprint>,
    /// A punch has none.
    until: Option<Instant>,
    conn: Option<ConnId>,
    /// Where the other end was asked whether it has the node id.
    asking: Option<StreamId>,
    /// What the relay said of the key.
    punched: Option<Fingerprint>,
}

fn address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.ip().unwrap(), endpoint.port())
}

pub(super) fn endpoint(address: SocketAddr) -> Endpoint {
    EndpointRef::parse(&address.to_string()).unwrap().to_owned()
}

// What callers do.
impl World {
    /// The peer of this name, which is made if there is none.
    pub(super) fn peer(&mut self, node: usize, name: usize) -> usize {
        if let Some(known) = self.nodes[node].peers.iter().position(|peer| peer.name == name) {
            return known;
        }
        let own = self.keys[self.nodes[node].key];
        let gateway = self.gateways.iter().position(|gateway| gateway.name == name);
        let to_node = gateway.is_none();
        let setup = Setup { own, race: race::Setup { to_node, connect_timeout: CONNECT_TIMEOUT } };
        let (now, id) = (self.clock(), self.new_session_id());
        let target = to_node.then(|| self.names[name].clone());
        let address = gateway.map(|gateway| endpoint(self.gateway_address(gateway)));
        let made = Peer {
            name,
            state: LinkState::new(setup, now),
            queue: Queue::default(),
            asking: Vec::new(),
            session: SessionSender::new(id, target, false),
            streams: [None, None],
            gateway,
            written: VecDeque::new(),
            legacy_relay: None,
            known: address.map_or_else(Knowledge::default, Knowledge::of),
            arrived: false,
            trying: Vec::new(),
            link: None,
            patience: Patience::default(),
            visible: false,
            replaced: Vec::new(),
            swept_at: 0,
            dirty: false,
            armed: Time::MAX,
            watch: super::promises::Watch::default(),
        };
        self.nodes[node].peers.push(made);
        self.nodes[node].peers.len() - 1
    }

    /// What a caller knows. Whether the rest should be looked up.
    pub(super) fn learn_ways(&mut self, node: usize, peer: usize, candidates: Candidates) -> bool {
        let now = self.clock();
        let knowing = &mut self.nodes[node].peers[peer];
        knowing.known.learn(candidates);
        let looks_up = !knowing.visible && knowing.gateway.is_none() && knowing.known.begin_lookup(now);
        self.touch(node, peer);
        looks_up
    }

    /// What a lookup has found.
    pub(super) fn found_ways(&mut self, node: usize, peer: usize, candidates: Candidates, ended: bool) {
        let now = self.clock();
        let knowing = &mut self.nodes[node].peers[peer];
        if knowing.known.found(candidates) {
            knowing.state.stop_passing_on();
        }
        if ended {
            knowing.known.resolved(true, now);
        }
        self.touch(node, peer);
    }

    /// Sends a message: over the live link, or from the queue.
    pub(super) fn send(&mut self, node: usize, peer: usize, envelope: Envelope) {
        let at = self.clock();
        let sending = &mut self.nodes[node].peers[peer];
        let shown = sending.state.link().and_then(|link| link.shown);
        let fits = sending.visible && envelope.is_for(shown);
        let is_next = fits && sending.queue.is_empty();
        if is_next && self.give(node, peer, envelope) {
            self.accepted(node, envelope.id);
            return self.touch(node, peer);
        }
        let sending = &mut self.nodes[node].peers[peer];
        let accepted = fits && sending.visible && sending.queue.may_accept();
        sending.watch.calls += u64::from(!accepted);
        sending.queue.push(Job { envelope, at, accepted, request: None });
        if accepted {
            self.accepted(node, envelope.id);
        }
        self.touch(node, peer);
    }

    /// Gives a message to the link. False if it takes none at present.
    fn give(&mut self, node: usize, peer: usize, envelope: Envelope) -> bool {
        let now = self.clock();
        let at = &mut self.nodes[node].peers[peer];
        let Some(link) = at.state.link().copied() else { return false };
        at.queue.expect(envelope.deadline);
        if link.dialect == Dialect::MaculaPeer1 {
            at.session.push(envelope);
            return true;
        }
        let Some(conn) = at.link else { return false };
        let Some(stream) = self.try_open_stream(conn) else { return false };
        self.write(conn, stream, Item::Whole(envelope.id));
        self.nodes[node].peers[peer].written.push_back(Written { envelope, at: now, stream, arrived: false });
        true
    }

    pub(super) fn credit_came(&mut self, node: usize, id: ConnId) {
        for peer in 0..self.nodes[node].peers.len() {
            if self.nodes[node].peers[peer].link == Some(id) {
                self.touch(node, peer);
            }
        }
    }

    pub(super) fn whole_arrived(&mut self, node: usize, id: ConnId, stream: StreamId) {
        self.request_acknowledged(node, id, stream);
        for peer in self.nodes[node].peers.iter_mut().filter(|peer| peer.link == Some(id)) {
            peer.written
                .iter_mut()
                .filter(|written| written.stream == stream)
                .for_each(|written| written.arrived = true);
        }
    }

    pub(super) fn invalidate(&mut self, node: usize, peer: usize) {
        let (now, patience) = (self.clock(), self.patience(node, peer));
        self.nodes[node].peers[peer].state.invalidate(patience, now);
        self.touch(node, peer);
    }
}

// What happens to peers.
impl World {
    pub(super) fn touch(&mut self, node: usize, peer: usize) {
        if !std::mem::replace(&mut self.nodes[node].peers[peer].dirty, true) {
            self.dirty.push_back((node, peer));
        }
    }

    pub(super) fn peer_timer(&mut self, node: usize, peer: usize) {
        let (now, paused) = (self.now, self.hosts[self.nodes[node].host].paused_until);
        // Another event is the timer's.
        let Some(at) = self.nodes[node].peers.get_mut(peer).filter(|at| at.armed <= now) else { return };
        if paused > now {
            at.armed = paused;
            return self.at(paused, Event::Peer { node: node as u32, peer: peer as u32 });
        }
        at.armed = Time::MAX;
        self.touch(node, peer);
    }

    /// The key that the peer is expected to have.
    fn expected_key(&mut self, node: usize, peer: usize) -> Option<Fingerprint> {
        let now = self.clock();
        let Node { peers, tofu, .. } = &mut self.nodes[node];
        let peer = &peers[peer];
        if peer.gateway.is_some() {
            return None;
        }
        let shown = peer.state.link().filter(|_| peer.visible).and_then(|link| link.shown);
        shown.or_else(|| peer.known.key()).or_else(|| tofu.key_of(&self.names[peer.name], now))
    }

    pub(super) fn expects(&mut self, node: usize, peer: usize, key: Fingerprint) -> bool {
        self.nodes[node].peers[peer].queue.sought().contains(&Some(key)) || self.expected_key(node, peer) == Some(key)
    }

    pub(super) fn arrived(&mut self, node: usize, peer: usize) {
        self.nodes[node].peers[peer].arrived = true;
        self.touch(node, peer);
    }

    pub(super) fn keys_of_waiting(&self, node: usize, peer: usize) -> Vec<Option<Fingerprint>> {
        let Peer { queue, session, visible, .. } = &self.nodes[node].peers[peer];
        let keys = queue.waiting_keys(*visible, session.messages().map(|envelope| envelope.key));
        if keys.is_empty() { queue.sought().to_vec() } else { keys }
    }

    /// Nobody listens at the address of a link.
    pub(super) fn link_refused(&mut self, node: usize, id: ConnId) {
        let now = self.clock();
        let heard = self.conn(id).map_or(0, |conn| conn.heard);
        for peer in 0..self.nodes[node].peers.len() {
            let at = &mut self.nodes[node].peers[peer];
            if at.link == Some(id) {
                at.state.suspect(heard, Duration::ZERO, now);
                self.touch(node, peer);
            }
        }
    }

    pub(super) fn link_closed(&mut self, node: usize, id: ConnId) {
        for peer in 0..self.nodes[node].peers.len() {
            if self.nodes[node].peers[peer].link == Some(id) {
                self.link_died(node, peer);
            }
        }
    }

    fn link_died(&mut self, node: usize, peer: usize) {
        let (now, draw) = (self.clock(), self.random.f64());
        trace!(self, "node {node}: the link to {} died", self.nodes[node].peers[peer].name);
        self.watch_loss(node, peer);
        self.nodes[node].peers[peer].state.link_died(now, draw);
        self.touch(node, peer);
    }

    pub(super) fn peers_network_changed(&mut self, node: usize) {
        let now = self.clock();
        for peer in 0..self.nodes[node].peers.len() {
            let draw = self.random.f64();
            self.nodes[node].peers[peer].state.network_changed(now, draw);
            self.touch(node, peer);
        }
    }

    pub(super) fn patience(&mut self, node: usize, peer: usize) -> Duration {
        let now = self.clock();
        let Peer { link, state, patience, .. } = &mut self.nodes[node].peers[peer];
        patience.expect_silence(state.expected_silence(now));
        let link = *link;
        let conn = link.and_then(|link| self.conn(link));
        let (round_trip, shortest) = conn.map_or((None, 0), |conn| (conn.round_trip, conn.shortest));
        // Links are up once the peer has confirmed the handshake.
        let round_trip = Duration::from_micros(round_trip.unwrap_or(0));
        let shortest = Duration::from_micros(shortest);
        let patience = &self.nodes[node].peers[peer].patience;
        patience.measured(shortest);
        let patience = patience.at(round_trip, true);
        self.watch_patience(node, patience, shortest);
        patience
    }

    fn sweep(&mut self, node: usize, peer: usize) {
        let (now, patience) = (self.clock(), self.patience(node, peer));
        let sweeping = &mut self.nodes[node].peers[peer];
        sweeping.swept_at = self.now;
        let Some(link) = sweeping.link else { return };
        let arrived = sweeping.written.iter().take_while(|written| written.arrived).count();
        let arrived: Vec<Written> = sweeping.written.drain(..arrived).collect();
        arrived.iter().for_each(|written| self.acknowledged(node, written.envelope.id));
        let heard = self.conn(link).map_or(0, |conn| conn.heard);
        let sweeping = &mut self.nodes[node].peers[peer];
        let oldest = sweeping.oldest();
        sweeping.state.heard(heard, oldest, patience, now);
    }

    /// What the peer's task does when it is woken.
    pub(super) fn drive(&mut self, node: usize, peer: usize) {
        if self.nodes[node].peers.len() <= peer {
            return;
        }
        self.nodes[node].peers[peer].dirty = false;
        let now = self.clock();
        drive::look_after(&mut Driven { world: self, node, peer }, now);
        self.watch_race(node, peer);
        self.pump(node, peer);
        self.arm_peer(node, peer);
    }

    fn demand(&self, node: usize, peer: usize) -> Demand {
        let now = self.clock();
        let Peer { queue, session, known, written, asking, .. } = &self.nodes[node].peers[peer];
        Demand {
            waited_for: queue.is_waited_for(now),
            owed: !queue.is_empty() || !session.is_empty() || !written.is_empty() || !asking.is_empty(),
            parked: queue.has_parked(),
            parked_waited_for: queue.is_other_key_waited_for(now),
            learned: known.has_learned(),
            better: known.knows_better(),
        }
    }

    fn arm_peer(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let at = &self.nodes[node].peers[peer];
        let sweep = at.link.is_some() && (at.oldest().is_some() || at.state.is_suspect());
        let attempts = at.trying.iter().filter_map(|trying| trying.until);
        let attempts = attempts.chain(at.asking.iter().filter_map(Asking::deadline)).min();
        let times = [at.state.next_timeout(now), at.queue.expiry(), attempts];
        let mut next = times.into_iter().flatten().min().map_or(Time::MAX, |at| self.time(at));
        if sweep {
            next = next.min(at.swept_at + SWEEP_EVERY);
        }
        next = at.replaced.iter().map(|(_, until)| *until).fold(next, Time::min);
        if next == Time::MAX {
            return;
        }
        let next = next.max(self.now + MS);
        let at = &mut self.nodes[node].peers[peer];
        if next < at.armed {
            at.armed = next;
            self.at(next, Event::Peer { node: node as u32, peer: peer as u32 });
        }
    }

    /// Connections of the peer that may be of use.
    fn began(&mut self, node: usize, peer: usize) -> Vec<Offer> {
        if self.nodes[node].peers[peer].gateway.is_some() {
            return Vec::new();
        }
        let expected = self.expected_key(node, peer);
        let at = &self.nodes[node].peers[peer];
        let sought = match at.state.is_usable() {
            true => at.queue.parked_keys(),
            false => at.queue.waiting_keys(at.visible, at.session.messages().map(|envelope| envelope.key)),
        };
        let mut offers = Vec::new();
        for key in crate::queue::distinct(sought.into_iter().flatten().chain(expected)) {
            for conn in self.accepted_from(node, key) {
                offers.extend(self.link(node, conn).map(|link| self.offer(node, peer, link)));
            }
        }
        offers
    }

    fn offer(&self, node: usize, peer: usize, link: Link) -> Offer {
        let at = &self.nodes[node].peers[peer];
        let sought = at.visible && link.shown.is_some_and(|shown| at.queue.seeks(shown));
        Offer { link, sought }
    }

    fn search(&mut self, node: usize, peer: usize, want: Want) {
        let now = self.clock();
        let visible = self.nodes[node].peers[peer].visible;
        if matches!(want, Want::Link | Want::OtherKey) {
            let at = &mut self.nodes[node].peers[peer];
            let keys: Vec<_> = at.session.messages().map(|envelope| envelope.key).collect();
            at.queue.seek(visible, keys.into_iter());
        }
        let began = match want {
            Want::Link | Want::OtherKey => self.began(node, peer),
            Want::Better | Want::MoreWays => Vec::new(),
        };
        if want != Want::MoreWays {
            trace!(self, "node {node} looks for {want:?} to {}", self.nodes[node].peers[peer].name);
            self.watch_search(node, peer, want);
        }
        let own_relays: Vec<Endpoint> =
            self.nodes[node].relays.iter().map(|relay| endpoint(self.relay_address(*relay))).collect();
        let Node { peers, tofu, .. } = &mut self.nodes[node];
        let at = &mut peers[peer];
        let bound = tofu.key_of(&self.names[at.name], now).is_some();
        let relay = match at.state.link().map(|link| link.path) {
            Some(crate::types::Path::Relay(relay)) => Some(endpoint(relay)),
            _ => None,
        };
        let tries = Tries { candidates: at.known.candidates(), own_relays, resolving: at.known.resolving(now), bound };
        at.known.tried();
        at.state.search(want, &began, &tries, relay, now);
        drive::carry_out(&mut Driven { world: self, node, peer }, now);
        self.watch_race(node, peer);
    }

    fn carry_out(&mut self, node: usize, peer: usize, action: Action) {
        match action {
            Action::Attempt(race::Action::Begin { id, attempt, key, until }) => {
                self.begin_attempt(node, peer, id, attempt, key, until);
            }
            Action::Attempt(race::Action::Abort(id)) => self.abort_attempt(node, peer, id),
            Action::StopRace | Action::FinishRace => {
                let all: Vec<_> = self.nodes[node].peers[peer].trying.iter().map(|trying| trying.id).collect();
                all.into_iter().for_each(|id| self.abort_attempt(node, peer, id));
            }
            Action::Use(_) => self.use_link(node, peer),
            Action::Close(link) => {
                if let Some(conn) = self.conn_of(link) {
                    self.close_own(conn);
                }
            }
            Action::Hide => {
                trace!(self, "node {node} hides its link to {}", self.nodes[node].peers[peer].name);
                self.watch_doubt(node, peer);
                let at = &mut self.nodes[node].peers[peer];
                at.visible = false;
                at.queue.unpark();
            }
            Action::Show => {
                trace!(self, "node {node} shows its link to {}", self.nodes[node].peers[peer].name);
                let at = &mut self.nodes[node].peers[peer];
                at.visible = true;
                at.queue.found();
            }
            Action::LookAgain => self.arrived(node, peer),
            Action::Retire => self.let_go(node, peer, true),
            Action::Replace => self.let_go(node, peer, false),
            Action::PassOn(relay) => self.pass_on_to(node, peer, address(&relay)),
            Action::StopPassingOn => self.nodes[node].peers[peer].legacy_relay = None,
            Action::Fail { error, begun, later_stay } => self.fail_calls(node, peer, error, begun, later_stay),
            Action::FailParked { begun } => {
                let failed = self.nodes[node].peers[peer].queue.fail_parked(begun);
                failed.into_iter().for_each(|job| self.job_failed(node, &job, UndeliveredReason::Untrusted));
            }
            Action::Failures(failures) => trace!(self, "node {node}: {failures:?}"),
            Action::Path(path) => {
                trace!(self, "node {node} reaches {} by {path:?}", self.nodes[node].peers[peer].name)
            }
        }
    }

    /// The messages go to a gateway from now on.
    fn pass_on_to(&mut self, node: usize, peer: usize, relay: SocketAddr) {
        let gateway = (0..self.gateways.len()).find(|gateway| self.gateway_address(*gateway) == relay);
        trace!(self, "node {node} gives {relay} the messages for {}", self.nodes[node].peers[peer].name);
        match gateway.map(|gateway| self.gateways[gateway].name) {
            Some(name) => {
                self.promises.passed_on.insert((node, self.nodes[node].peers[peer].name));
                self.nodes[node].peers[peer].legacy_relay = Some(self.peer(node, name));
            }
            None => self.nodes[node].peers[peer].state.stop_passing_on(),
        }
    }

    /// Gives everything that waits to the legacy relay.
    fn pass_on(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let id = self.new_session_id();
        let at = &mut self.nodes[node].peers[peer];
        let Some(relay) = at.legacy_relay else { return };
        let owed = at.session.take(id).owed.into_iter().map(|envelope| owed(envelope, now));
        let jobs: Vec<Job> = owed.chain(at.queue.take()).collect();
        for job in jobs {
            let relay = &mut self.nodes[node].peers[relay];
            relay.watch.calls += u64::from(!job.accepted);
            relay.queue.push(job);
        }
        self.touch(node, relay);
    }

    fn conn_of(&self, link: crate::types::LinkId) -> Option<ConnId> {
        self.conns.iter().flatten().map(|conn| conn.id).find(|id| link_id(*id) == link)
    }

    /// A connection is its dialler's to close.
    fn close_own(&mut self, conn: ConnId) {
        if self.conn(conn).is_some_and(|conn| conn.client) {
            self.close(conn, 0);
        }
    }

    fn use_link(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let Some(link) = self.nodes[node].peers[peer].state.link().copied() else { return };
        let Some(conn) = self.conn_of(link.id).filter(|conn| self.conn(*conn).is_some_and(|conn| conn.is_open()))
        else {
            // It died meanwhile.
            return self.link_died(node, peer);
        };
        trace!(self, "node {node} uses {link:?} to {}", self.nodes[node].peers[peer].name);
        let id = self.new_session_id();
        let at = &mut self.nodes[node].peers[peer];
        (at.link, at.patience) = (Some(conn), Patience::default());
        at.queue.found();
        at.watch.up(self.now);
        let refused = at.session.refuse(|envelope| !envelope.is_for(link.shown));
        let taken = at.session.link(link.dialect, id, now);
        at.swept_at = self.now;
        for envelope in refused {
            self.undelivered(node, envelope.id, UndeliveredReason::Untrusted);
        }
        self.owe(node, peer, taken.owed);
        if !self.open_streams(node, peer) {
            // As if it had died at once.
            return self.link_died(node, peer);
        }
        self.nodes[node].peers[peer].visible = true;
        if link.dialled {
            self.allow_streams(conn);
            self.nodes[node].uses.insert(conn, Use::Link);
            // Its key may not have been known before.
            self.arrived(node, peer);
        }
    }

    /// False if the link has no stream to spare.
    fn open_streams(&mut self, node: usize, peer: usize) -> bool {
        let now = self.clock();
        let Some(conn) = self.nodes[node].peers[peer].link else { return true };
        while let Some(channel) = self.nodes[node].peers[peer].session.missing() {
            let Some(stream) = self.try_open_stream(conn) else { return false };
            let at = &mut self.nodes[node].peers[peer];
            let opening = at.session.open(channel, now);
            let opened = Opened { id: opening.id, channel, run: opening.run, target: at.name };
            at.streams[channel] = Some(Out { conn, stream, opening: Some(Rc::new(opened)) });
        }
        true
    }

    /// Opens the streams that the session wants, and writes what it owes.
    fn pump(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        if !self.open_streams(node, peer) {
            return self.link_died(node, peer);
        }
        for channel in 0..2 {
            let at = &mut self.nodes[node].peers[peer];
            let Some(out) = at.streams[channel].as_mut().filter(|_| at.session.owes(channel)) else { continue };
            let (conn, stream) = (out.conn, out.stream);
            if let Some(opening) = out.opening.take() {
                self.write(conn, stream, Item::Session(opening));
            }
            while let Some(write) = self.nodes[node].peers[peer].session.write(channel, now) {
                let (number, message) = (write.number, write.message.id);
                let parts = if write.message.large { PARTS - 1 } else { 0 };
                if let Some(number) = number {
                    self.write(conn, stream, Item::Number(number));
                }
                (0..parts).for_each(|_| self.write(conn, stream, Item::Part));
                self.write(conn, stream, Item::Message(message));
            }
        }
    }

    fn close_streams(&mut self, node: usize, peer: usize) {
        for out in std::mem::take(&mut self.nodes[node].peers[peer].streams).into_iter().flatten() {
            self.reset_stream(out.conn, out.stream, 0);
        }
    }

    fn let_go(&mut self, node: usize, peer: usize, retires: bool) {
        let now = self.clock();
        self.close_streams(node, peer);
        let at = &mut self.nodes[node].peers[peer];
        at.session.detach(now);
        at.queue.unpark();
        at.queue.detach(now);
        at.visible = false;
        let written = std::mem::take(&mut at.written);
        let Some(conn) = at.link.take() else { return };
        let (arrived, left): (Vec<Written>, Vec<Written>) = written.into_iter().partition(|written| written.arrived);
        arrived.iter().for_each(|written| self.acknowledged(node, written.envelope.id));
        left.iter().for_each(|written| self.reset_stream(conn, written.stream, 0));
        self.owe(node, peer, left.into_iter().map(|written| written.envelope).collect());
        if !retires || self.conn(conn).is_some_and(|conn| conn.dialect == Dialect::Macula) {
            // A gateway gets time to read, also where it is silent.
            self.nodes[node].peers[peer].replaced.push((conn, self.now + REPLACED_FOR));
            return;
        }
        self.requests_lost(node, conn);
        self.watch_given_up(conn);
        if let Some(heard) = self.conn(conn).filter(|conn| !conn.client).map(|conn| conn.heard) {
            self.nodes[node].given_up.entry(conn).or_default().mark(heard);
        }
        self.close_own(conn);
    }

    /// What a link or a session held goes to the front of the queue.
    fn owe(&mut self, node: usize, peer: usize, messages: Vec<Envelope>) {
        let now = self.clock();
        let at = &mut self.nodes[node].peers[peer];
        let (over, left): (Vec<Envelope>, Vec<Envelope>) =
            messages.into_iter().partition(|envelope| envelope.deadline.is_some_and(|deadline| deadline <= now));
        left.into_iter().rev().for_each(|envelope| at.queue.put_back(owed(envelope, now)));
        let late = at.why_late();
        over.into_iter().for_each(|envelope| self.undelivered(node, envelope.id, late));
    }

    fn end_replaced(&mut self, node: usize, peer: usize) {
        let now = self.now;
        let Peer { replaced, asking, .. } = &mut self.nodes[node].peers[peer];
        // As long again while a request waits on it.
        let asked = |conn: ConnId| asking.iter().any(|asking| asking.is_on(conn));
        replaced.iter_mut().filter(|(conn, until)| *until <= now && asked(*conn)).for_each(|(_, until)| {
            *until = now + REPLACED_FOR;
        });
        let over: Vec<(ConnId, Time)> = replaced.extract_if(.., |(_, until)| *until <= now).collect();
        over.into_iter().for_each(|(conn, _)| self.close_own(conn));
    }

    /// Gives the queue to the link.
    fn flush_queue(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        loop {
            let at = &mut self.nodes[node].peers[peer];
            if !at.visible || !at.state.is_usable() {
                return;
            }
            let shown = at.state.link().and_then(|link| link.shown);
            let Some(job) = at.queue.pop() else { return };
            if !job.is_wanted() {
                continue;
            }
            if !job.envelope.is_for(shown) {
                match at.gateway {
                    Some(_) => self.job_failed(node, &job, UndeliveredReason::Untrusted),
                    None => at.queue.park(job, now),
                }
                continue;
            }
            if job.request.is_some() {
                match self.ask_over(node, peer, job) {
                    Ok(()) => continue,
                    // The next stream that is allowed wakes the task.
                    Err(job) => return self.nodes[node].peers[peer].queue.put_back(job),
                }
            }
            if !self.give(node, peer, job.envelope) {
                // The next stream that is allowed wakes the task.
                return self.nodes[node].peers[peer].queue.put_back(job);
            }
            if !job.accepted {
                self.accepted(node, job.envelope.id);
            }
        }
    }

    fn expire(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        if self.nodes[node].peers[peer].queue.expiry().is_none_or(|expiry| expiry > now) {
            return;
        }
        let at = &mut self.nodes[node].peers[peer];
        let (expired, next) = at.session.expire(now);
        let GivenUp { queued, parked } = at.queue.give_up(next, now);
        let late = at.why_late();
        for envelope in expired {
            self.undelivered(node, envelope.id, late);
        }
        queued.into_iter().for_each(|job| self.job_failed(node, &job, late));
        parked.into_iter().for_each(|job| self.job_failed(node, &job, UndeliveredReason::Untrusted));
    }

    fn job_failed(&mut self, node: usize, job: &Job, why: UndeliveredReason) {
        if job.request.is_some() {
            return self.request_failed(job);
        }
        match job.accepted {
            true => self.undelivered(node, job.envelope.id, why),
            false => self.call_failed(node, job.envelope.id),
        }
    }

    fn fail_calls(&mut self, node: usize, peer: usize, error: SendError, begun: Instant, later_stay: bool) {
        trace!(self, "node {node} does not reach {}: {error}", self.nodes[node].peers[peer].name);
        let at = &mut self.nodes[node].peers[peer];
        let later_stay = later_stay || at.known.has_learned();
        let failed = at.queue.fail(begun, later_stay);
        failed.into_iter().for_each(|job| self.job_failed(node, &job, UndeliveredReason::Expired));
    }

    // The session's streams.

    pub(super) fn sender_hears(&mut self, node: usize, id: ConnId, stream: StreamId, item: &Item) {
        let now = self.clock();
        let Some((peer, channel)) = self.sender_of(node, id, stream) else { return };
        let session = &mut self.nodes[node].peers[peer].session;
        let settled = match item {
            Item::Greeting { known, run, expected } => session.greeting(channel, *known, *run, *expected, now),
            Item::Expected(expected) => session.expected(channel, *expected),
            _ => return,
        };
        self.settled(node, settled);
        self.touch(node, peer);
    }

    pub(super) fn sender_stream_ended(&mut self, node: usize, id: ConnId, stream: StreamId, code: u8) {
        let Some((peer, channel)) = self.sender_of(node, id, stream) else { return };
        let new = self.new_session_id();
        let at = &mut self.nodes[node].peers[peer];
        if code == WRONG_NODE {
            return self.wrong_node(node, peer);
        }
        let end = if code == FORGOTTEN { StreamEnd::Forgotten } else { StreamEnd::Broken };
        let (settled, goes_on) = at.session.ended(channel, end, new);
        self.settled(node, settled);
        if !goes_on {
            return self.link_died(node, peer);
        }
        for channel in 0..2 {
            let at = &mut self.nodes[node].peers[peer];
            if !at.session.has_stream(channel) {
                let out = at.streams[channel].take();
                if let Some(out) = out {
                    self.reset_stream(out.conn, out.stream, 0);
                }
            }
        }
        self.touch(node, peer);
    }

    /// What was for the node at the other end of the link takes another path.
    pub(super) fn wrong_node(&mut self, node: usize, peer: usize) {
        let at = &self.nodes[node].peers[peer];
        if let Some(shown) = at.state.link().and_then(|link| link.shown) {
            let name = self.names[at.name].clone();
            self.nodes[node].tofu.disown(&name, shown);
        }
        self.link_died(node, peer);
    }

    fn sender_of(&self, node: usize, id: ConnId, stream: StreamId) -> Option<(usize, usize)> {
        self.nodes[node].peers.iter().enumerate().find_map(|(peer, at)| {
            let channel = at
                .streams
                .iter()
                .position(|out| out.as_ref().is_some_and(|out| (out.conn, out.stream) == (id, stream)))?;
            Some((peer, channel))
        })
    }

    fn settled(&mut self, node: usize, settled: Settled<Envelope>) {
        let Settled { acknowledged, lost, forgotten, rejected } = settled;
        acknowledged.into_iter().for_each(|envelope| self.acknowledged(node, envelope.id));
        lost.into_iter().for_each(|envelope| self.undelivered(node, envelope.id, UndeliveredReason::LinkLost));
        forgotten.into_iter().for_each(|envelope| self.undelivered(node, envelope.id, UndeliveredReason::SessionLost));
        rejected
            .into_iter()
            .for_each(|(envelope, why)| self.undelivered(node, envelope.id, UndeliveredReason::Rejected(why)));
    }
}

// Attempts.
impl World {
    fn begin_attempt(
        &mut self,
        node: usize,
        peer: usize,
        id: AttemptId,
        attempt: Attempt,
        key: Option<Fingerprint>,
        until: Instant,
    ) {
        trace!(self, "node {node} tries {attempt:?}");
        let until = (!matches!(attempt, Attempt::Punch(_))).then_some(until);
        let trying = Trying { id, attempt: attempt.clone(), key, until, conn: None, asking: None, punched: None };
        self.nodes[node].peers[peer].trying.push(trying);
        match attempt {
            Attempt::Dial(endpoint) => {
                let to = address(&endpoint);
                let Node { host, key, port, timeouts, .. } = self.nodes[node];
                self.nodes[node].earned.insert(to);
                let conn = self.connect(host, key, Carrier::Udp { port, to }, None, timeouts);
                self.nodes[node].uses.insert(conn, Use::Attempt(peer, id));
                self.attempt_connects(node, peer, id, conn);
            }
            Attempt::Circuit(relay) => self.ask_relay(node, address(&relay), peer, id, false),
            Attempt::Punch(relay) => self.ask_relay(node, address(&relay), peer, id, true),
            Attempt::Adopt(link) => match self.conn_of(link) {
                Some(conn) => {
                    self.attempt_connects(node, peer, id, conn);
                    if self.conn(conn).is_some_and(|conn| conn.allowed) {
                        self.admit(node, peer, id, conn);
                    }
                }
                None => self.attempt_failed(node, peer, id, Ended::NotAdopted),
            },
        }
    }

    fn trying(&mut self, node: usize, peer: usize, id: AttemptId) -> Option<&mut Trying> {
        self.nodes[node].peers.get_mut(peer)?.trying.iter_mut().find(|trying| trying.id == id)
    }

    pub(super) fn attempt_connects(&mut self, node: usize, peer: usize, id: AttemptId, conn: ConnId) {
        match self.trying(node, peer, id) {
            Some(trying) => trying.conn = Some(conn),
            None => self.close_own(conn),
        }
    }

    /// A path was punched for an attempt, which ends with this connection.
    pub(super) fn attempt_ends_by(&mut self, node: usize, peer: usize, id: AttemptId, until: Time) {
        let until = self.instant(until);
        if let Some(trying) = self.trying(node, peer, id) {
            trying.until = Some(until);
            self.touch(node, peer);
        }
    }

    /// The relay says whose key the node that is punched to has.
    pub(super) fn attempt_punches(&mut self, node: usize, peer: usize, id: AttemptId, key: Fingerprint) {
        if let Some(trying) = self.trying(node, peer, id) {
            trying.punched = Some(key);
        }
    }

    fn abort_attempt(&mut self, node: usize, peer: usize, id: AttemptId) {
        let trying = &mut self.nodes[node].peers[peer].trying;
        let Some(place) = trying.iter().position(|trying| trying.id == id) else { return };
        let Trying { conn, attempt, .. } = trying.swap_remove(place);
        self.forget_asks(node, peer, id);
        if let Some(conn) = conn.filter(|_| !matches!(attempt, Attempt::Adopt(_))) {
            self.nodes[node].uses.remove(&conn);
            self.close_own(conn);
        }
    }

    pub(super) fn attempt_failed(&mut self, node: usize, peer: usize, id: AttemptId, how: Ended) {
        let now = self.clock();
        if self.trying(node, peer, id).is_none() {
            return;
        }
        let attempt = self.trying(node, peer, id).map(|trying| trying.attempt.clone());
        trace!(self, "node {node}: {attempt:?} came to {how:?}");
        self.abort_attempt(node, peer, id);
        drive::attempted(&mut Driven { world: self, node, peer }, id, Err(how), now);
        self.touch(node, peer);
    }

    /// There is a path, and no link over it.
    fn not_connected(&mut self, node: usize, peer: usize, id: AttemptId, error: ConnectError) {
        let Some(trying) = self.trying(node, peer, id) else { return };
        let how = match trying.attempt {
            Attempt::Dial(_) => Ended::NotDialled(error),
            Attempt::Circuit(_) => Ended::NoCircuit(CircuitError::Inner(error)),
            Attempt::Punch(_) => Ended::NotPunched(PunchError::Connect(error)),
            Attempt::Adopt(_) => Ended::NotAdopted,
        };
        self.attempt_failed(node, peer, id, how);
    }

    pub(super) fn attempt_closed(&mut self, node: usize, peer: usize, id: AttemptId, why: Why) {
        match why {
            Why::Unreachable => self.not_connected(node, peer, id, ConnectError::Unreachable),
            Why::Here => {}
            _ => self.not_connected(node, peer, id, ConnectError::TimedOut),
        }
    }

    fn end_attempts(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let late = |trying: &&Trying| trying.until.is_some_and(|until| until <= now);
        let late: Vec<AttemptId> =
            self.nodes[node].peers[peer].trying.iter().filter(late).map(|trying| trying.id).collect();
        for id in late {
            let asked = self.trying(node, peer, id).filter(|trying| trying.conn.is_none());
            match asked.map(|trying| &trying.attempt) {
                Some(Attempt::Circuit(_)) => {
                    let error = CircuitError::Relay(ConnectError::TimedOut);
                    self.attempt_failed(node, peer, id, Ended::NoCircuit(error));
                }
                Some(_) => self.not_connected(node, peer, id, ConnectError::TimedOut),
                None => {
                    self.not_allowed(node, peer, id);
                    self.not_connected(node, peer, id, ConnectError::TimedOut);
                }
            }
        }
    }

    /// The peer may allow streams later, and keep this one of several connections.
    fn not_allowed(&mut self, node: usize, peer: usize, id: AttemptId) {
        let adopting = self.trying(node, peer, id).filter(|trying| matches!(trying.attempt, Attempt::Adopt(_)));
        let Some(conn) = adopting.and_then(|trying| trying.conn) else { return };
        let heard = self.conn(conn).map_or(0, |conn| conn.heard);
        self.nodes[node].given_up.entry(conn).or_default().mark(heard);
    }

    /// The other end of a connection allows streams.
    pub(super) fn allowed(&mut self, node: usize, id: ConnId) {
        for peer in 0..self.nodes[node].peers.len() {
            let waits = |trying: &&Trying| trying.conn == Some(id) && trying.asking.is_none();
            let waiting = self.nodes[node].peers[peer].trying.iter().find(waits).map(|trying| trying.id);
            if let Some(attempt) = waiting {
                self.admit(node, peer, attempt, id);
            }
        }
    }

    /// A connection that the peer began has ended before it allowed streams.
    pub(super) fn adopted_closed(&mut self, node: usize, id: ConnId) {
        for peer in 0..self.nodes[node].peers.len() {
            let adopts = |trying: &&Trying| trying.conn == Some(id) && matches!(trying.attempt, Attempt::Adopt(_));
            let adopting = self.nodes[node].peers[peer].trying.iter().find(adopts).map(|trying| trying.id);
            if let Some(attempt) = adopting {
                self.attempt_failed(node, peer, attempt, Ended::NotAdopted);
            }
        }
    }

    fn said(&mut self, node: usize, peer: usize, id: AttemptId) -> Said {
        self.trying(node, peer, id).map_or(Said::default(), |trying| Said {
            key: trying.key,
            registered: matches!(trying.attempt, Attempt::Circuit(_) | Attempt::Punch(_)),
        })
    }

    /// Lets a connection carry messages for a peer if whoever is at the other end is that peer.
    fn admit(&mut self, node: usize, peer: usize, id: AttemptId, conn: ConnId) {
        if self.nodes[node].peers[peer].gateway.is_some() {
            return self.attempt_linked(node, peer, id, conn);
        }
        let said = self.said(node, peer, id);
        let shown = self.conn(conn).and_then(|conn| conn.shown).map(|key| self.keys[key]);
        let punched = self.trying(node, peer, id).and_then(|trying| trying.punched);
        if punched.is_some() && punched != shown {
            return self.not_connected(node, peer, id, ConnectError::Untrusted);
        }
        match self.judge(node, peer, conn, said) {
            Some(Verdict::Accept) => {
                self.learn_key(node, peer, conn, said, None);
                self.attempt_linked(node, peer, id, conn);
            }
            Some(Verdict::Ask) => {
                let stream = self.open_stream(conn);
                let name = self.nodes[node].peers[peer].name;
                self.write(conn, stream, Item::Ask(name));
                if let Some(trying) = self.trying(node, peer, id) {
                    trying.asking = Some(stream);
                }
            }
            Some(Verdict::Refuse(mismatch)) => self.not_connected(node, peer, id, refusal(mismatch)),
            None => self.not_connected(node, peer, id, ConnectError::TimedOut),
        }
    }

    /// The other end has said whether it has the node id.
    pub(super) fn asked(&mut self, node: usize, conn: ConnId, stream: StreamId, answer: Result<Answer, ()>) {
        for peer in 0..self.nodes[node].peers.len() {
            let asking = |trying: &&Trying| trying.conn == Some(conn) && trying.asking == Some(stream);
            let Some(id) = self.nodes[node].peers[peer].trying.iter().find(asking).map(|trying| trying.id) else {
                continue;
            };
            let said = self.said(node, peer, id);
            match answer {
                Ok(answer) => {
                    self.learn_key(node, peer, conn, said, Some(answer));
                    self.attempt_linked(node, peer, id, conn);
                }
                Err(()) => self.not_connected(node, peer, id, ConnectError::WrongNode),
            }
        }
    }

    fn attempt_linked(&mut self, node: usize, peer: usize, id: AttemptId, conn: ConnId) {
        let now = self.clock();
        let Some(link) = self.link(node, conn) else { return };
        let at = &mut self.nodes[node].peers[peer];
        if let Some(place) = at.trying.iter().position(|trying| trying.id == id) {
            at.trying.swap_remove(place);
            self.nodes[node].uses.remove(&conn);
        }
        drive::attempted(&mut Driven { world: self, node, peer }, id, Ok(link), now);
        self.touch(node, peer);
    }
}

/// A peer of a node's, as what drives it sees it.
struct Driven<'a> {
    world: &'a mut World,
    node: usize,
    peer: usize,
}

impl Driven<'_> {
    fn peer(&self) -> &Peer {
        &self.world.nodes[self.node].peers[self.peer]
    }
}

impl Owner for Driven<'_> {
    fn life(&mut self) -> &mut LinkState {
        &mut self.world.nodes[self.node].peers[self.peer].state
    }

    fn expire(&mut self, _now: Instant) {
        let Self { world, node, peer } = self;
        world.expire_requests(*node, *peer);
        world.expire(*node, *peer);
        world.end_attempts(*node, *peer);
        world.end_replaced(*node, *peer);
    }

    fn look_at_callers(&mut self, now: Instant) {
        let Self { world, node, peer } = self;
        if std::mem::take(&mut world.nodes[*node].peers[*peer].arrived) {
            let began = world.began(*node, *peer);
            world.nodes[*node].peers[*peer].state.began(&began, now);
        }
    }

    fn swept_at(&self) -> Instant {
        self.world.instant(self.peer().swept_at)
    }

    fn sweep(&mut self, _now: Instant) {
        self.world.sweep(self.node, self.peer);
    }

    fn is_unacknowledged(&self) -> bool {
        self.peer().oldest().is_some()
    }

    fn carry_out(&mut self, action: Action, _now: Instant) {
        self.world.carry_out(self.node, self.peer, action);
    }

    fn hand_on(&mut self, _now: Instant) {
        self.world.pass_on(self.node, self.peer);
        self.world.flush_queue(self.node, self.peer);
    }

    fn demand(&self, _now: Instant) -> Demand {
        self.world.demand(self.node, self.peer)
    }

    fn search(&mut self, want: Want, _now: Instant) {
        self.world.search(self.node, self.peer, want);
    }

    fn offer(&self, link: Link) -> Offer {
        self.world.offer(self.node, self.peer, link)
    }

    fn draw(&mut self) -> f64 {
        self.world.random.f64()
    }
}
