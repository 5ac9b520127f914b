//! A node's peers: carries out what the link's machine decides, with the real queue and the real session.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::network::{Event, MS, SECOND, Time};
use super::node::{FORGOTTEN, Node, Said, Use, WRONG_NODE, link_id, refusal};
use super::quic::{Carrier, ConnId, Item, Opened, StreamId, Why};
use super::world::{World, trace};
use crate::errors::{CircuitError, ConnectError, PunchError, SendError, UndeliveredReason};
use crate::knowledge::Knowledge;
use crate::link_state::{Action, Demand, LinkState, Offer, Setup, Want};
use crate::queue::{GivenUp, Queue, Queued};
use crate::race::{self, Attempt, AttemptId, Ended, Tries};
use crate::session_sender::{Owed, SessionSender, Settled, StreamEnd};
use crate::trust::{Answer, Verdict};
use crate::types::{Candidates, Endpoint, EndpointRef, Fingerprint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_EVERY: Time = 10 * MS;
const DOUBT_AFTER: Duration = Duration::from_millis(500);
/// A link that was replaced lives on for this long.
const REPLACED_FOR: Time = SECOND;

/// A message on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Envelope {
    pub(super) id: u32,
    pub(super) deadline: Option<Instant>,
    pub(super) key: Option<Fingerprint>,
}

impl Peer {
    /// Whether a connection is about to be closed because there is a better one.
    pub(super) fn has_replaced(&self, conn: ConnId) -> bool {
        self.replaced.iter().any(|(replaced, _)| *replaced == conn)
    }
}

impl Owed for Envelope {
    fn size(&self) -> usize {
        300
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

#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    envelope: Envelope,
    at: Instant,
    /// Its sender has its `ok`.
    accepted: bool,
}

impl Queued for Job {
    fn is_accepted(&self) -> bool {
        self.accepted
    }

    fn is_wanted(&self) -> bool {
        true
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
    queue: Queue<Job>,
    pub(super) session: SessionSender<Envelope>,
    streams: [Option<Out>; 2],
    known: Knowledge,
    arrived: bool,
    trying: Vec<Trying>,
    /// The connection that messages go over, suspect or not.
    pub(super) link: Option<ConnId>,
    /// Callers see it.
    pub(super) visible: bool,
    replaced: Vec<(ConnId, Time)>,
    swept_at: Time,
    dirty: bool,
    armed: Time,
    pub(super) watch: super::promises::Watch,
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
        let setup = Setup { own, race: race::Setup { to_node: true, connect_timeout: CONNECT_TIMEOUT } };
        let (now, id) = (self.clock(), self.new_session_id());
        let target = Some(self.names[name].clone());
        let made = Peer {
            name,
            state: LinkState::new(setup, now),
            queue: Queue::default(),
            session: SessionSender::new(id, target, false),
            streams: [None, None],
            known: Knowledge::default(),
            arrived: false,
            trying: Vec::new(),
            link: None,
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
        let looks_up = !knowing.visible && knowing.known.begin_lookup(now);
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
        let accepted = fits && (sending.queue.is_empty() || sending.queue.may_accept());
        if fits && sending.queue.is_empty() {
            sending.queue.expect(envelope.deadline);
            sending.session.push(envelope);
        } else {
            sending.watch.calls += u64::from(!accepted);
            sending.queue.push(Job { envelope, at, accepted });
        }
        if accepted {
            self.accepted(node, envelope.id);
        }
        self.touch(node, peer);
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
        let Peer { link, state, .. } = &mut self.nodes[node].peers[peer];
        let (link, expected) = (*link, state.expected_silence(now));
        let round_trip = link.and_then(|link| self.conn(link)).and_then(|conn| conn.round_trip).unwrap_or(0);
        DOUBT_AFTER.max(expected).max(Duration::from_micros(round_trip) * 6)
    }

    fn sweep(&mut self, node: usize, peer: usize) {
        let (now, patience) = (self.clock(), self.patience(node, peer));
        let Some(link) = self.nodes[node].peers[peer].link else { return };
        let heard = self.conn(link).map_or(0, |conn| conn.heard);
        let sweeping = &mut self.nodes[node].peers[peer];
        sweeping.swept_at = self.now;
        let oldest = sweeping.session.oldest();
        sweeping.state.heard(heard, oldest, patience, now);
    }

    /// What the peer's task does when it is woken.
    pub(super) fn drive(&mut self, node: usize, peer: usize) {
        if self.nodes[node].peers.len() <= peer {
            return;
        }
        self.nodes[node].peers[peer].dirty = false;
        self.expire(node, peer);
        self.end_attempts(node, peer);
        self.end_replaced(node, peer);
        let at = &self.nodes[node].peers[peer];
        if (at.session.oldest().is_some() || at.state.is_suspect()) && at.swept_at + SWEEP_EVERY <= self.now {
            self.sweep(node, peer);
        }
        let (now, draw) = (self.clock(), self.random.f64());
        if std::mem::take(&mut self.nodes[node].peers[peer].arrived) {
            let began = self.began(node, peer);
            self.nodes[node].peers[peer].state.began(&began, now);
        }
        let unacknowledged = self.nodes[node].peers[peer].session.oldest().is_some();
        self.nodes[node].peers[peer].state.poll(unacknowledged, now, draw);
        self.obey(node, peer);
        self.flush_queue(node, peer);
        let demand = self.demand(node, peer);
        if let Some(want) = self.nodes[node].peers[peer].state.wants(&demand, now) {
            self.search(node, peer, want);
            self.watch_race(node, peer);
            let (at, draw) = (&mut self.nodes[node].peers[peer], self.random.f64());
            let unacknowledged = at.session.oldest().is_some();
            at.state.poll(unacknowledged, now, draw);
            self.obey(node, peer);
            self.flush_queue(node, peer);
        }
        self.watch_race(node, peer);
        self.pump(node, peer);
        self.arm_peer(node, peer);
    }

    fn demand(&self, node: usize, peer: usize) -> Demand {
        let now = self.clock();
        let Peer { queue, session, known, .. } = &self.nodes[node].peers[peer];
        Demand {
            waited_for: queue.is_waited_for(now),
            owed: !queue.is_empty() || !session.is_empty(),
            parked: queue.has_parked(),
            parked_waited_for: queue.is_other_key_waited_for(now),
            learned: known.has_learned(),
            better: known.knows_better(),
        }
    }

    fn arm_peer(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let at = &self.nodes[node].peers[peer];
        let sweep = at.link.is_some() && (at.session.oldest().is_some() || at.state.is_suspect());
        let attempts = at.trying.iter().filter_map(|trying| trying.until).min();
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
        let expected = self.expected_key(node, peer);
        let at = &self.nodes[node].peers[peer];
        let sought = match at.state.is_usable() {
            true => at.queue.parked_keys(),
            false => at.queue.waiting_keys(at.visible, at.session.messages().map(|envelope| envelope.key)),
        };
        let mut offers = Vec::new();
        for key in crate::queue::distinct(sought.into_iter().flatten().chain(expected)) {
            for conn in self.accepted_from(node, key) {
                offers.extend(self.offer(node, peer, conn));
            }
        }
        offers
    }

    fn offer(&self, node: usize, peer: usize, conn: ConnId) -> Option<Offer> {
        let link = self.link(node, conn)?;
        let at = &self.nodes[node].peers[peer];
        let sought = at.visible && link.shown.is_some_and(|shown| at.queue.seeks(shown));
        Some(Offer { link, sought })
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
        self.obey(node, peer);
    }

    /// Carries out what the machine decided.
    fn obey(&mut self, node: usize, peer: usize) {
        while let Some(action) = self.nodes[node].peers[peer].state.next_action() {
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
                    // The race that ended may have waited for a connection of the peer's.
                    self.arrived(node, peer);
                }
                Action::Retire => self.let_go(node, peer, true),
                Action::Replace => self.let_go(node, peer, false),
                Action::PassOn(_) | Action::StopPassingOn => {}
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
        at.link = Some(conn);
        at.visible = true;
        at.queue.found();
        at.watch.up(self.now);
        let refused = at.session.refuse(|envelope| !envelope.is_for(link.shown));
        at.session.attach(id, now);
        at.swept_at = self.now;
        for envelope in refused {
            self.undelivered(node, envelope.id, UndeliveredReason::Untrusted);
        }
        self.open_streams(node, peer);
        if link.dialled {
            self.allow_streams(conn);
            self.nodes[node].uses.insert(conn, Use::Link);
            // Its key may not have been known before.
            self.arrived(node, peer);
        }
    }

    fn open_streams(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let Some(conn) = self.nodes[node].peers[peer].link else { return };
        while let Some(channel) = self.nodes[node].peers[peer].session.missing() {
            let stream = self.open_stream(conn);
            let at = &mut self.nodes[node].peers[peer];
            let opening = at.session.open(channel, now);
            let opened = Opened { id: opening.id, channel, run: opening.run, target: at.name };
            at.streams[channel] = Some(Out { conn, stream, opening: Some(Rc::new(opened)) });
        }
    }

    /// Writes what the session owes.
    fn pump(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        for channel in 0..2 {
            let at = &mut self.nodes[node].peers[peer];
            let Some(out) = at.streams[channel].as_mut().filter(|_| at.session.owes(channel)) else { continue };
            let (conn, stream) = (out.conn, out.stream);
            if let Some(opening) = out.opening.take() {
                self.write(conn, stream, Item::Session(opening));
            }
            while let Some(write) = self.nodes[node].peers[peer].session.write(channel, now) {
                let (number, message) = (write.number, write.message.id);
                if let Some(number) = number {
                    self.write(conn, stream, Item::Number(number));
                }
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
        let Some(conn) = at.link.take() else { return };
        if !retires {
            at.replaced.push((conn, self.now + REPLACED_FOR));
            return;
        }
        if let Some(heard) = self.conn(conn).filter(|conn| !conn.client).map(|conn| conn.heard) {
            self.nodes[node].silent.insert(conn, heard);
        }
        self.close_own(conn);
    }

    fn end_replaced(&mut self, node: usize, peer: usize) {
        let now = self.now;
        let over: Vec<ConnId> = {
            let replaced = &mut self.nodes[node].peers[peer].replaced;
            let over = replaced.iter().filter(|(_, until)| *until <= now).map(|(conn, _)| *conn).collect();
            replaced.retain(|(_, until)| *until > now);
            over
        };
        over.into_iter().for_each(|conn| self.close_own(conn));
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
            if !job.envelope.is_for(shown) {
                at.queue.park(job, now);
                continue;
            }
            at.session.push(job.envelope);
            at.queue.expect(job.envelope.deadline);
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
        let late = if at.state.meets_another_key() { UndeliveredReason::Untrusted } else { UndeliveredReason::Expired };
        for envelope in expired {
            self.undelivered(node, envelope.id, late);
        }
        queued.into_iter().for_each(|job| self.job_failed(node, &job, late));
        parked.into_iter().for_each(|job| self.job_failed(node, &job, UndeliveredReason::Untrusted));
    }

    fn job_failed(&mut self, node: usize, job: &Job, why: UndeliveredReason) {
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
        failed.into_iter().for_each(|job| self.call_failed(node, job.envelope.id));
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
            // What was for this node takes another path.
            if let Some(shown) = at.state.link().and_then(|link| link.shown) {
                let name = self.names[at.name].clone();
                self.nodes[node].tofu.disown(&name, shown);
            }
            return self.link_died(node, peer);
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
        self.open_streams(node, peer);
        self.touch(node, peer);
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
        self.nodes[node].peers[peer].state.failed(id, how, now);
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
                _ => self.not_connected(node, peer, id, ConnectError::TimedOut),
            }
        }
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

    fn said(&mut self, node: usize, peer: usize, id: AttemptId) -> Said {
        self.trying(node, peer, id).map_or(Said::default(), |trying| Said {
            key: trying.key,
            registered: matches!(trying.attempt, Attempt::Circuit(_) | Attempt::Punch(_)),
        })
    }

    /// Lets a connection carry messages for a peer if whoever is at the other end is that peer.
    fn admit(&mut self, node: usize, peer: usize, id: AttemptId, conn: ConnId) {
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
        let Some(offer) = self.offer(node, peer, conn) else { return };
        if self.nodes[node].peers[peer].state.is_suspect() {
            // A peer that is back answers on both links.
            self.sweep(node, peer);
            self.obey(node, peer);
        }
        let at = &mut self.nodes[node].peers[peer];
        // Sweeping may have ended the race.
        let place = at.trying.iter().position(|trying| trying.id == id);
        if let Some(place) = place {
            at.trying.swap_remove(place);
            self.nodes[node].uses.remove(&conn);
        }
        let at = &mut self.nodes[node].peers[peer];
        at.state.linked(id, offer, now);
        self.obey(node, peer);
        self.touch(node, peer);
    }
}
