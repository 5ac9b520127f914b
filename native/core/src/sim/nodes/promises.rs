//! What is promised, and looked at in every run.

use std::time::Duration;

use hashbrown::{HashMap, HashSet};

use super::network::{INTERNET, MS, SECOND, Time};
use super::peer::Peer;
use super::quic::{Carrier, ConnId};
use super::request::Watched;
use super::scenario::Theme;
use super::world::{World, trace};
use crate::errors::UndeliveredReason;
use crate::link_state::Want;
use crate::sim::gate::Kind;
use crate::types::{Dialect, Fingerprint};

/// The least pause between two races for messages that nobody waits for, and after a link that was short-lived.
const LEAST_PAUSE: Time = 50 * MS;
const SHORT_LIFE: Time = SECOND;

/// How much later than at its deadline a call may end: timers are 1 ms coarse.
const LATE: Time = 10 * MS;

/// How long after the last fault everything works again, and how long a message then takes at most.
pub(super) const RECOVERED_AFTER: Time = 20 * SECOND;
pub(super) const ARRIVES_WITHIN: Time = 3 * SECOND;

/// How long a link may be silent at most, unless its path is slow.
const LONGEST_SILENCE: Duration = Duration::from_secs(3);

/// How long two nodes may take to let go of one of two connections.
const SETTLES_WITHIN: Time = 3 * SECOND;

#[derive(Default)]
pub(super) struct Promises {
    pub(super) broken: Option<String>,
    pub(super) messages: Vec<Message>,
    pub(super) requests: Vec<Watched>,
    /// For each sender and receiver, as often as they were started, and for large messages apart, the order of the last
    /// message that arrived.
    orders: HashMap<[usize; 5], u64>,
    /// For each sender, as often as it was started, the key with which a name first got a message.
    bound: HashMap<(usize, u32, usize), Fingerprint>,
    accepted: u64,
    /// Links that were given up though both ends had them.
    pub(super) given_up: usize,
    /// When a host last moved, or a NAT forgot its mappings.
    pub(super) disturbed: Time,
    /// How often nodes found out something about their NAT, and how often they took it for stricter than it is.
    pub(super) looks: u64,
    pub(super) too_strict: u64,
    /// Nodes that have lost their key.
    pub(super) lost_keys: Vec<usize>,
    /// Which node has given the messages for which to a gateway.
    pub(super) passed_on: HashSet<(usize, usize)>,
}

pub(super) struct Message {
    pub(super) from: usize,
    starts: u32,
    to: usize,
    key: Option<Fingerprint>,
    large: bool,
    sent: Time,
    deadline: Option<Time>,
    order: u64,
    state: State,
    /// How long the link that it was given to may be silent before another is looked for.
    patience: Time,
    /// The receivers that it arrived at, as often as they were started.
    arrived: Vec<(usize, u32)>,
    arrived_at: Option<Time>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A call waits.
    Waits,
    Accepted,
    Acknowledged,
    Failed,
    Undelivered(UndeliveredReason),
    SenderGone,
}

/// What is watched of one peer's link.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watch {
    /// Calls that have waited, at all and at the last race.
    pub(super) calls: u64,
    raced_for: u64,
    up_at: Time,
    /// No race begins before this time.
    not_before: Time,
    /// A race begins before this time only for a new call.
    calls_only: Time,
    races: u64,
    racing: bool,
    causes: u64,
}

impl Promises {
    /// But for calls that failed.
    pub(super) fn has_arrived_all(&self) -> bool {
        self.messages.iter().all(|message| message.state == State::Failed || !message.arrived.is_empty())
    }
}

impl Watch {
    pub(super) fn up(&mut self, now: Time) {
        self.up_at = now;
        (self.not_before, self.calls_only) = (0, 0);
    }
}

impl World {
    pub(super) fn new_message(
        &mut self,
        from: usize,
        to: usize,
        (key, large): (Option<Fingerprint>, bool),
        deadline: Option<Time>,
        patience: Time,
    ) -> u32 {
        let starts = self.nodes[from].starts;
        self.promises.messages.push(Message {
            from,
            starts,
            to,
            key,
            large,
            sent: self.now,
            deadline,
            order: 0,
            state: State::Waits,
            patience,
            arrived: Vec::new(),
            arrived_at: None,
        });
        self.promises.messages.len() as u32 - 1
    }

    /// The sender has its `ok`.
    pub(super) fn accepted(&mut self, node: usize, message: u32) {
        self.promises.accepted += 1;
        let order = self.promises.accepted;
        self.call_ends(node, message);
        let message = &mut self.promises.messages[message as usize];
        (message.state, message.order) = (State::Accepted, order);
    }

    pub(super) fn call_failed(&mut self, node: usize, message: u32) {
        self.call_ends(node, message);
        let message = &mut self.promises.messages[message as usize];
        message.state = State::Failed;
        if !message.arrived.is_empty() {
            self.breaks("a call failed whose message arrived".to_owned());
        }
    }

    pub(super) fn new_request(&mut self, from: usize, to: usize, deadline: Time, patience: Time) -> u32 {
        let (starts, sent) = (self.nodes[from].starts, self.now);
        let (cancelled, arrived, ended) = (std::rc::Rc::default(), Vec::new(), None);
        let watched = Watched { from, starts, to, sent, deadline, patience, cancelled, arrived, ended };
        self.promises.requests.push(watched);
        self.promises.requests.len() as u32 - 1
    }

    /// A request is handed over at a node, or at a gateway, in this run of it.
    pub(super) fn request_arrived(&mut self, at: usize, starts: u32, id: u32) {
        trace!(self, "request {id} arrives at {at}");
        let nodes = self.nodes.len();
        let request = &mut self.promises.requests[id as usize];
        let again = request.arrived.contains(&(at, starts));
        let wrong = at < nodes && self.nodes[at].name != request.to;
        request.arrived.push((at, starts));
        if again && at < nodes {
            self.breaks(format!("request {id} is handed over twice"));
        } else if wrong {
            self.breaks(format!("request {id} arrives at node {at}, which it is not for"));
        }
    }

    /// Its caller is told. Without an answer, why.
    pub(super) fn request_ends(&mut self, id: u32, answered: bool) {
        trace!(self, "request {id} ends, answered: {answered}");
        let now = self.now;
        let Watched { from, deadline, .. } = self.promises.requests[id as usize];
        let latest = deadline.max(self.hosts[self.nodes[from].host].paused_until) + LATE;
        let request = &mut self.promises.requests[id as usize];
        if request.cancelled.get() {
            return;
        }
        let (before, arrived) = (request.ended.replace(answered), !request.arrived.is_empty());
        if before.is_some() {
            self.breaks(format!("request {id} ended twice"));
        } else if now > latest {
            self.breaks(format!("request {id} ended after its deadline"));
        } else if answered && !arrived {
            self.breaks(format!("request {id} is answered and was not handed over"));
        }
    }

    fn check_requests(&mut self) {
        let (end, settled_by) = (self.now, self.scenario.quiet_at + RECOVERED_AFTER);
        for id in 0..self.promises.requests.len() {
            let Watched { from, starts, to, sent, deadline, patience, ref cancelled, ended, .. } =
                self.promises.requests[id];
            let lives = self.nodes[from].up && self.nodes[from].starts == starts && !cancelled.get();
            let has_time = deadline >= sent + ARRIVES_WITHIN + patience;
            let what = match ended {
                None if lives && deadline + LATE < end => "has not ended",
                Some(false) if sent > settled_by && has_time && self.is_reachable(from, to) => {
                    "has no answer, though all was quiet"
                }
                _ => continue,
            };
            return self.breaks(format!("request {id} of node {from} to {to} {what}"));
        }
    }

    fn call_ends(&mut self, node: usize, message: u32) {
        let Message { state, deadline, .. } = self.promises.messages[message as usize];
        if state != State::Waits {
            return self.breaks(format!("message {message} was answered twice: {state:?}"));
        }
        let latest = deadline.map(|deadline| deadline.max(self.hosts[self.nodes[node].host].paused_until) + LATE);
        if latest.is_some_and(|latest| latest < self.now) {
            self.breaks(format!("the call of message {message} ended after its deadline"));
        }
    }

    pub(super) fn acknowledged(&mut self, _node: usize, message: u32) {
        let acknowledged = &mut self.promises.messages[message as usize];
        if acknowledged.arrived.is_empty() {
            return self.breaks(format!("message {message} is acknowledged and has not arrived"));
        }
        acknowledged.state = State::Acknowledged;
    }

    pub(super) fn undelivered(&mut self, _node: usize, message: u32, why: UndeliveredReason) {
        trace!(self, "message {message} is undelivered: {why}");
        let undelivered = &mut self.promises.messages[message as usize];
        if undelivered.state != State::Accepted {
            let state = undelivered.state;
            return self.breaks(format!("message {message} is reported as undelivered and was {state:?}"));
        }
        undelivered.state = State::Undelivered(why);
    }

    pub(super) fn promises_of_stopped(&mut self, node: usize) {
        for message in &mut self.promises.messages {
            if message.from == node && matches!(message.state, State::Waits | State::Accepted) {
                message.state = State::SenderGone;
            }
        }
    }

    /// Whether a caller has named this key for a node id, which counts more than what was seen first.
    fn names_key(&self, (from, starts, to): (usize, u32, usize), key: Fingerprint) -> bool {
        let same = |message: &&Message| (message.from, message.starts, message.to) == (from, starts, to);
        self.promises.messages.iter().filter(same).any(|message| message.key == Some(key))
    }

    /// A gateway has read a message: its own, or one for a node that it may know.
    pub(super) fn delivered_to_gateway(&mut self, gateway: usize, id: u32) {
        let (now, nodes) = (self.now, self.nodes.len());
        let is_its_own = self.gateway_of(self.promises.messages[id as usize].to) == Some(gateway);
        let message = &mut self.promises.messages[id as usize];
        let is_passed_on = message.to < nodes && message.key.is_none();
        let elsewhere = message.arrived.iter().any(|(at, _)| *at < nodes);
        let again = !message.arrived.is_empty();
        message.arrived.push((nodes + gateway, 0));
        message.arrived_at.get_or_insert(now);
        trace!(self, "message {id} arrives at gateway {gateway}");
        if !is_its_own && !is_passed_on {
            self.breaks(format!("message {id} arrives at gateway {gateway}, which it is not for"));
        } else if elsewhere {
            self.breaks(format!("message {id} arrives at a node and at a gateway"));
        } else if again && self.scenario.theme == Theme::Calm {
            self.breaks(format!("message {id} arrives at gateway {gateway} twice, though nothing went wrong"));
        }
    }

    pub(super) fn delivered(&mut self, node: usize, id: u32) {
        let (starts, key) = (self.nodes[node].starts, self.keys[self.nodes[node].key]);
        let now = self.now;
        let message = &mut self.promises.messages[id as usize];
        let (from, order) = (message.from, message.order);
        let pair = [from, message.starts as usize, node, starts as usize, usize::from(message.large)];
        let wrong = self.nodes[node].name != message.to || message.key.is_some_and(|wanted| wanted != key);
        let again = message.arrived.contains(&(node, starts));
        message.arrived.push((node, starts));
        message.arrived_at.get_or_insert(now);
        let keyed = message.key.is_some();
        trace!(self, "message {id} arrives at node {node}");
        if wrong {
            return self.breaks(format!("message {id} arrives at node {node}, which it is not for"));
        }
        let sender = (from, self.promises.messages[id as usize].starts, self.nodes[node].name);
        let bound = *self.promises.bound.entry(sender).or_insert(key);
        if bound != key && !self.names_key(sender, key) {
            return self.breaks(format!("message {id} arrives at a node that has lost its key"));
        }
        if again {
            return self.breaks(format!("message {id} arrives twice"));
        }
        let nodes = self.nodes.len();
        if self.promises.messages[id as usize].arrived.iter().any(|(at, _)| *at >= nodes) {
            return self.breaks(format!("message {id} arrives at a node and at a gateway"));
        }
        if !keyed {
            let last = self.promises.orders.insert(pair, order).unwrap_or(0);
            if last > order {
                self.breaks(format!("message {id} arrives after a later one"));
            }
        }
    }
}

// Links.
impl World {
    pub(super) fn watch_search(&mut self, node: usize, peer: usize, want: Want) {
        let now = self.now;
        let at = &mut self.nodes[node].peers[peer];
        if want != Want::Link {
            return;
        }
        let visible = at.visible;
        let watch = &mut at.watch;
        let new_call = watch.calls > watch.raced_for;
        watch.raced_for = watch.calls;
        watch.races += 1;
        let watch = *watch;
        if visible {
            self.breaks(format!("node {node} looks for a link and has one that works"));
        } else if now < watch.not_before || (now < watch.calls_only && !new_call) {
            self.breaks(format!("node {node} looks for a link again without a pause: {watch:?}"));
        } else if watch.races > 1 + watch.causes + watch.calls {
            self.breaks(format!("node {node} looks for a link more often than there is reason for: {watch:?}"));
        }
    }

    pub(super) fn watch_loss(&mut self, node: usize, peer: usize) {
        let now = self.now;
        let link = self.nodes[node].peers[peer].link.and_then(|link| self.conn(link));
        if link.is_some_and(|link| link.is_open() && link.dialect == Dialect::Macula) {
            self.breaks(format!("node {node} gives up a link to a gateway that works"));
        }
        let watch = &mut self.nodes[node].peers[peer].watch;
        watch.causes += 1;
        if now < watch.up_at + SHORT_LIFE {
            watch.not_before = now + LEAST_PAUSE;
        }
    }

    /// A silent peer is noticed in time, also where a host stood still. `shortest`: what a round trip took at best.
    pub(super) fn watch_patience(&mut self, node: usize, patience: Duration, shortest: Duration) {
        if patience > LONGEST_SILENCE.max(shortest * 6) {
            self.breaks(format!("node {node} lets a peer be silent for {patience:?}, and is {shortest:?} away"));
        }
    }

    pub(super) fn watch_given_up(&mut self, link: ConnId) {
        let other = self.conn(link).filter(|conn| conn.is_open()).and_then(|conn| conn.other);
        let both = other.and_then(|other| self.conn(other)).is_some_and(|other| other.is_open());
        self.promises.given_up += usize::from(both);
    }

    pub(super) fn watch_doubt(&mut self, node: usize, peer: usize) {
        self.nodes[node].peers[peer].watch.causes += 1;
    }

    /// Notices races that failed.
    pub(super) fn watch_race(&mut self, node: usize, peer: usize) {
        let now = self.now;
        let at = &mut self.nodes[node].peers[peer];
        let racing = at.state.is_racing() && !at.visible;
        if std::mem::replace(&mut at.watch.racing, racing) && !racing && !at.visible {
            at.watch.causes += 1;
            at.watch.calls_only = now + LEAST_PAUSE;
        }
    }
}

// At the end.
impl World {
    pub(super) fn check_all(&mut self) {
        if self.promises.broken.is_none() {
            self.check_messages();
            self.check_requests();
            self.check_connections();
            self.check_paths();
            self.check_detection();
            self.check_tables();
        }
    }

    /// Whether two nodes can be expected to reach each other once all is quiet.
    fn is_reachable(&self, from: usize, to: usize) -> bool {
        let lost = |node: &usize| self.promises.lost_keys.contains(node);
        !lost(&from) && !lost(&to) && self.scenario.theme != Theme::LyingRelays
    }

    /// Whether the messages go to a gateway whose word that it allows another stream may have been lost while a host heard
    /// nothing. It is repeated after pauses that double (RFC 9002, section 6.2.1), and only then the link goes on.
    fn may_lack_streams(&self, from: usize, to: usize) -> bool {
        let cut = matches!(self.scenario.theme, Theme::Cuts | Theme::Everything);
        cut && (to >= self.nodes.len() || self.promises.passed_on.contains(&(from, to)))
    }

    fn check_messages(&mut self) {
        let end = self.now;
        let settled_by = self.scenario.quiet_at + RECOVERED_AFTER;
        for id in 0..self.promises.messages.len() {
            let message = &self.promises.messages[id];
            let reachable = self.is_reachable(message.from, message.to);
            let in_time = reachable && !self.may_lack_streams(message.from, message.to);
            let arrived = !message.arrived.is_empty();
            let within = ARRIVES_WITHIN + message.patience;
            let owed_until = message.deadline.unwrap_or(message.sent.max(settled_by)) + within;
            let has_time = message.deadline.is_none_or(|deadline| deadline >= message.sent + within);
            let what = match message.state {
                State::Waits if message.deadline.is_some_and(|deadline| deadline + LATE < end) => "was not answered",
                State::Accepted if !arrived && owed_until < end && (reachable || message.deadline.is_some()) => {
                    "is lost without a word"
                }
                State::Accepted if arrived && owed_until < end && reachable => "has arrived, which is not known",
                State::Failed | State::Undelivered(_)
                    if message.sent > settled_by && in_time && message.key.is_none() && has_time =>
                {
                    "was not delivered, though all was quiet"
                }
                State::Acknowledged if message.sent > settled_by && in_time => {
                    let took = message.arrived_at.unwrap_or(end) - message.sent;
                    if took <= within { continue } else { "took too long" }
                }
                _ => continue,
            };
            let Message { from, to, state, .. } = *message;
            let what = format!("message {id} of node {from} to {to} {what}: {state:?}");
            return self.breaks(what);
        }
    }

    /// The connections between each two nodes, of which one remains.
    fn check_connections(&mut self) {
        for a in 0..self.nodes.len() {
            for b in 0..a {
                let mut between = self.connections(a, b);
                if between.len() > 1 {
                    // One may just have been found to be better.
                    self.run(self.now + SETTLES_WITHIN);
                    between = self.connections(a, b);
                }
                let links: Vec<Option<ConnId>> =
                    [(a, b), (b, a)].into_iter().filter_map(|(a, b)| self.link_of(a, b)).collect();
                if between.len() > 1 {
                    return self.breaks(format!("nodes {a} and {b} have {} connections: {between:?}", between.len()));
                }
                for link in links {
                    let there = |id: &ConnId| between.iter().any(|(client, server)| client == id || server == id);
                    if !link.as_ref().is_none_or(there) {
                        return self.breaks(format!("a link of nodes {a} and {b} leads nowhere"));
                    }
                }
            }
        }
    }

    /// Nodes whose NATs can be passed are linked directly where nothing went wrong.
    fn check_paths(&mut self) {
        if self.scenario.theme != Theme::Calm {
            return;
        }
        for a in 0..self.nodes.len() {
            for b in 0..self.nodes.len() {
                let easy = [a, b].iter().all(|node| Kind::EASY.contains(&self.nodes[*node].kind));
                let [one, other] = [a, b].map(|node| self.hosts[self.nodes[node].host].network);
                if easy && (one == INTERNET || one != other) && self.is_direct(a, b) == Some(false) {
                    return self.breaks(format!("the link of node {a} to {b} goes through a relay"));
                }
            }
        }
    }

    /// Connections with both ends open, but for those that attempts make.
    fn connections(&self, a: usize, b: usize) -> Vec<(ConnId, ConnId)> {
        let hosts = [self.nodes[a].host, self.nodes[b].host];
        let mut between = Vec::new();
        for conn in
            self.conns.iter().flatten().filter(|conn| conn.client && conn.is_open() && hosts.contains(&conn.host))
        {
            let Some(other) = conn.other.and_then(|other| self.conn(other)) else { continue };
            let used = self.nodes[if conn.host == hosts[0] { a } else { b }].uses.get(&conn.id);
            let trying = matches!(used, Some(super::node::Use::Attempt(..)));
            let replaced = |node: usize| self.nodes[node].peers.iter().any(|peer| peer.has_replaced(conn.id));
            let trying = trying || replaced(a) || replaced(b);
            if other.is_open() && hosts.contains(&other.host) && other.host != conn.host && !trying {
                between.push((conn.id, other.id));
            }
        }
        between
    }

    fn link_of(&self, node: usize, to: usize) -> Option<Option<ConnId>> {
        let peer = self.nodes[node].peers.iter().find(|peer| peer.name == self.nodes[to].name)?;
        Some(peer.link)
    }

    /// Whether the link of a node to another is direct. `None`: there is none.
    fn is_direct(&self, node: usize, to: usize) -> Option<bool> {
        let link = self.link_of(node, to)??;
        Some(matches!(self.conn(link)?.carrier, Carrier::Udp { .. }))
    }

    fn check_tables(&mut self) {
        for relay in 0..self.relays.len() {
            if !self.relays[relay].agrees() {
                return self.breaks(format!("the tables of relay {relay} disagree"));
            }
            let (registrations, circuits) = (self.relays[relay].registrations(), self.relays[relay].circuits());
            let nodes = self.nodes.len();
            let later = self.clock() + Duration::from_secs(60);
            let punches = self.relays[relay].punches_left(later);
            if registrations > nodes || circuits > nodes * nodes || punches > 0 {
                return self.breaks(format!(
                    "relay {relay} has {registrations} registrations, {circuits} circuits and {punches} punches"
                ));
            }
        }
        for node in 0..self.nodes.len() {
            let sessions = self.nodes[node].sessions();
            let most = 64 * self.nodes.len();
            let owed: usize = self.nodes[node].peers.iter().map(Peer::owed).sum();
            let waiting = self.promises.messages.len();
            if sessions > most || owed > waiting {
                return self.breaks(format!("node {node} knows {sessions} sessions and owes {owed} messages"));
            }
        }
    }
}
