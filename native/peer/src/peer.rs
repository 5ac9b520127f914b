//! A peer: its queue, its link, and the task that keeps the one moving over the other.
//!
//! Callers hand messages over under a short lock: straight to the link when it is not busy and nothing is queued before
//! them, else to the queue. The task looks for paths, empties the queue, notices silence and sends again what a dead link left
//! unacknowledged.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use macula_peer_core::errors::{
    ConnectError, Failures, PunchError, Rejection, RequestError, RouteError, SendError, UndeliveredReason,
};
use macula_peer_core::growth::Growth;
use macula_peer_core::liveness::{Liveness, Seen};
use macula_peer_core::lookup::Lookup;
use macula_peer_core::proto::control::Refusal;
use macula_peer_core::punch::Failure;
use macula_peer_core::retry::Backoff;
use macula_peer_core::types::{Dialect, Endpoint, Fingerprint, Path, PeerName, Target, Ways};
use macula_peer_core::upgrade::{Rank, Upgrade};
use macula_peer_wire::RawFrame;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use crate::backlog::Sender;
use crate::call::{Call, Cancel};
use crate::config::Delivery;
use crate::counters::PeerCounters;
use crate::decoding::is_heavy;
use crate::event::Event;
use crate::inbound::Inbound;
use crate::link::{Answered, DIRECT_WRITES, Link, Partial, Swept, Written};
use crate::listen::serve_link;
use crate::message::Letter;
use crate::node::Node;
use crate::race::{self, Race};
use crate::relay::registration::Description;
use crate::session::send::{Progress, Session, Taken};
use crate::socket::{Refused, Why, refused};
use crate::stats::{PathStatus, PeerStats};
use crate::sync::{deadline, lock};
use crate::transport::MAX_ANSWERING;
use crate::{request, transfer};

/// Messages that are accepted for a live link while it is busy or has no stream to spare: some milliseconds of a fast
/// sender.
const MAX_ACCEPTED: usize = 1024;

/// Calls that may wait for one peer at once, for a link or for an answer.
const MAX_WAITING: usize = 16_384;

/// What is kept of a message until it is acknowledged, beside its frame. Small messages would cost many times what they
/// count.
const KEPT_BESIDE: usize = 128;

/// How often acknowledgements are looked for while some are missing. Memory held meanwhile: what is sent in this time.
const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// Pauses between dials for messages that are owed, when nobody waits.
const REDIAL_FIRST_PAUSE: Duration = Duration::from_millis(100);
const REDIAL_LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A peer that hangs up sooner than this, perhaps because of what it is sent, is not dialled again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// How long callers wait, within their deadlines, for a node that had a link and is not to be found. A relay that was
/// restarted is back within some seconds, and its nodes with it.
const AWAY: Duration = Duration::from_secs(30);

/// A link that was replaced lives on for this long, and as long again while a request waits on it: answers to messages
/// that went over it are on their way.
const REPLACED_FOR: Duration = Duration::from_secs(1);

/// How long a relay that speaks only `macula` gets the messages for a node, before other ways are tried again.
const STAND_IN_FOR: Duration = Duration::from_secs(60);

/// Answers beyond [`LARGE_ANSWER`] that are read at once.
const LARGE_ANSWERS: usize = 4;
const LARGE_ANSWER: usize = 256 << 10;

/// How long a message without a deadline is owed after its link died.
const OWED_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

/// When a connection is closed, a 0.14.3 gateway drops what it has acknowledged but not read. This is how long it gets
/// to read.
const READ_WITHIN: Duration = Duration::from_millis(100);

/// How long a stopping engine waits for what is on its way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) struct Peer {
    pub(crate) name: PeerName,
    node: Arc<Node>,
    state: Mutex<State>,
    wake: Notify,
    /// Milliseconds of the node's clock at the last use.
    used: AtomicU64,
    /// Bytes accepted and not acknowledged.
    held: AtomicUsize,
    /// Bytes of calls that wait.
    waiting: AtomicUsize,
    /// Requests that wait for their answer.
    asked: AtomicUsize,
    counters: PeerCounters,
}

struct State {
    /// The link that callers write to: live and not in doubt.
    link: Option<Arc<Link>>,
    /// What is accepted, then those who wait.
    queue: VecDeque<Job>,
    /// Messages for another key than the live link's, in the order of the queue. Empty where callers see no link.
    parked: VecDeque<Job>,
    /// Of the messages that the present race began for, the only keys that may get them, and `None` if there was one that
    /// names none. Their callers may give up before a link is up, which the next call finds.
    sought: Vec<Option<Fingerprint>>,
    /// What is on its way over a link of `macula-peer/1`, or is to go on over the next.
    session: Session,
    /// How the peer can be reached, as callers say.
    ways: Ways,
    /// And what was found by looking up.
    lookup: Lookup,
    /// There are ways that were not tried.
    learned: bool,
    /// Of these, some may be better than a relay.
    better: bool,
    /// The peer has begun connections that were not looked at.
    arrived: bool,
    /// Why paths could not be had.
    failures: Failures,
    /// Who gets the messages instead, and until when: a relay that speaks only `macula`.
    stand_in: Option<(Arc<Peer>, Instant)>,
    partials: Vec<(Arc<Link>, Job, Partial)>,
    /// When the queue is to be looked through for deadlines.
    expiry: Option<Instant>,
    cancelled: bool,
    /// Somebody wants the link closed.
    invalidated: bool,
    /// No longer in the pool: takes nothing new.
    retired: bool,
    /// Nobody looks after it any more.
    ended: bool,
}

struct Job {
    message: Option<Letter>,
    deadline: Option<Instant>,
    since: Instant,
    who: Who,
    /// A request that was asked over a link of `macula-peer/1`.
    named: Option<request::Named>,
}

/// Whom a message is owed to.
enum Who {
    /// Its sender has its `ok`.
    Accepted,
    Sender(Arc<Call<Result<(), SendError>>>),
    Requester(Arc<Call<Result<RawFrame, RequestError>>>),
}

/// A call that waits; dropping this does nothing, [`Waiting::cancel`] gives it up.
pub struct Waiting {
    /// Weak: the call's way back may hold this very value.
    call: Weak<dyn Cancel>,
    peer: Option<Arc<Peer>>,
}

impl Waiting {
    /// Gives the call up: nothing is answered any more, and what was not sent is not sent.
    pub fn cancel(&self) {
        if let Some(call) = self.call.upgrade() {
            call.cancel();
        }
        if let Some(peer) = &self.peer {
            lock(&peer.state).cancelled = true;
            peer.wake.notify_one();
        }
    }
}

/// The peer has left the pool: look it up again.
pub(crate) struct Retired;

impl Peer {
    pub(crate) fn new(name: PeerName, node: Arc<Node>) -> Arc<Self> {
        let mut ways = Ways::default();
        if let PeerName::Endpoint(endpoint) | PeerName::Gateway(endpoint) = &name {
            ways.endpoints.push(endpoint.clone());
        }
        let state = State {
            link: None,
            queue: VecDeque::new(),
            parked: VecDeque::new(),
            sought: Vec::new(),
            session: Session::new(name.node().cloned(), node.config.delivery == Delivery::AtMostOnce),
            ways,
            lookup: Lookup::default(),
            learned: false,
            better: false,
            arrived: false,
            failures: Failures::default(),
            stand_in: None,
            partials: Vec::new(),
            expiry: None,
            cancelled: false,
            invalidated: false,
            retired: false,
            ended: false,
        };
        let peer = Arc::new(Self {
            name,
            node,
            state: Mutex::new(state),
            wake: Notify::new(),
            used: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            counters: PeerCounters::default(),
        });
        peer.touch(Instant::now());
        peer
    }

    /// Sends over the live link, or gives the message back if the caller has to wait.
    pub(crate) fn send_now(&self, message: Letter, now: Instant) -> Result<(), Letter> {
        self.touch(now);
        let size = message.frame.len();
        let link = {
            let mut state = lock(&self.state);
            let Some(link) = &state.link else { return Err(message) };
            if !self.has_room(&state, size) || !message.is_for(link.shown) {
                return Err(message);
            }
            let busy = link.dialect == Dialect::Macula && self.held.load(Ordering::Relaxed) >= DIRECT_WRITES;
            if busy || !state.queue.is_empty() {
                return self.accept(&mut state, message);
            }
            if link.dialect == Dialect::MaculaPeer1 {
                let was_idle = self.held.fetch_add(size, Ordering::Relaxed) == 0;
                if self.number(&mut state, message, now) || was_idle {
                    self.wake.notify_one();
                }
                return Ok(());
            }
            link.clone()
        };
        self.held.fetch_add(size, Ordering::Relaxed);
        match link.write(message, now) {
            Written::Done { wake } => {
                self.counters.sent.add(1);
                if wake {
                    self.wake.notify_one();
                }
                Ok(())
            }
            Written::NoCredit(message) => {
                self.held.fetch_sub(size, Ordering::Relaxed);
                let mut state = lock(&self.state);
                if state.link.is_none() {
                    return Err(message);
                }
                self.accept(&mut state, message)
            }
            Written::Partial(partial) => {
                self.held.fetch_sub(size, Ordering::Relaxed);
                let job = Job::accepted(None, partial.message.deadline);
                lock(&self.state).partials.push((link, job, *partial));
                self.wake.notify_one();
                Ok(())
            }
            Written::Unproven(_) if self.node.config.delivery == Delivery::AtMostOnce => {
                self.held.fetch_sub(size, Ordering::Relaxed);
                self.undelivered(1, UndeliveredReason::LinkLost);
                Ok(())
            }
            Written::Lost(message) | Written::Unproven(message) => {
                self.held.fetch_sub(size, Ordering::Relaxed);
                Err(message)
            }
        }
    }

    /// Queues a message whose sender waits.
    pub(crate) fn send(
        self: &Arc<Self>,
        message: Letter,
        call: &Arc<Call<Result<(), SendError>>>,
    ) -> Result<Waiting, Retired> {
        let deadline = message.deadline;
        self.enqueue(message, deadline, Who::Sender(call.clone()), call.clone(), || {
            call.answer(Err(SendError::Overloaded));
        })
    }

    /// Queues a request.
    pub(crate) fn request(
        self: &Arc<Self>,
        message: Letter,
        call: &Arc<Call<Result<RawFrame, RequestError>>>,
    ) -> Result<Waiting, Retired> {
        let deadline = message.deadline;
        self.enqueue(message, deadline, Who::Requester(call.clone()), call.clone(), || {
            call.answer(Err(SendError::Overloaded.into()));
        })
    }

    /// Gives up the link, if there is one. From now on callers wait for the next.
    pub(crate) fn invalidate(&self) {
        let mut state = lock(&self.state);
        state.hide_link();
        state.invalidated = true;
        self.wake.notify_one();
    }

    /// Leaves the pool. The task sends what is on its way and ends.
    pub(crate) fn retire(&self) {
        lock(&self.state).retired = true;
        self.wake.notify_one();
    }

    /// Comes back to the pool. False if the task has ended.
    pub(crate) fn come_back(&self) -> bool {
        let mut state = lock(&self.state);
        if !state.ended {
            state.retired = false;
        }
        !state.ended
    }

    pub(crate) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn is_linked(&self) -> bool {
        lock(&self.state).link.is_some()
    }

    pub(crate) fn path(&self) -> PathStatus {
        let state = lock(&self.state);
        let (link, failures) = (state.link.clone(), state.failures.clone());
        drop(state);
        PathStatus { link: link.map(|link| link.stats()), failures }
    }

    pub(crate) fn stats(&self) -> PeerStats {
        let link = lock(&self.state).link.clone().map(|link| link.stats());
        let counters = &self.counters;
        PeerStats {
            name: self.name.clone(),
            link,
            sent: counters.sent.get(),
            acknowledged: counters.acknowledged.get(),
            received: counters.received.get(),
            failed: counters.failed.get(),
            dials: counters.dials.get(),
            unacknowledged_bytes: self.held.load(Ordering::Relaxed) + self.waiting.load(Ordering::Relaxed),
        }
    }

    fn enqueue(
        self: &Arc<Self>,
        message: Letter,
        deadline: Option<Instant>,
        who: Who,
        call: Arc<dyn Cancel>,
        overloaded: impl FnOnce(),
    ) -> Result<Waiting, Retired> {
        self.touch(Instant::now());
        let mut state = lock(&self.state);
        if state.retired {
            return Err(Retired);
        }
        if !self.may_wait(&state, message.frame.len()) {
            drop(state);
            self.counters.failed.add(1);
            overloaded();
            return Ok(Waiting { call: Arc::downgrade(&call), peer: None });
        }
        self.push(&mut state, Job { message: Some(message), deadline, since: Instant::now(), who, named: None });
        Ok(Waiting { call: Arc::downgrade(&call), peer: Some(self.clone()) })
    }

    /// What a caller knows of the ways to this peer, who may want the holder of a key alone. Returns whether the rest should
    /// be looked up: then [`Peer::resolved`] is to be called, whatever comes of it.
    pub(crate) fn learn(&self, ways: Ways, key: Option<Fingerprint>) -> bool {
        let now = Instant::now();
        let mut state = lock(&self.state);
        state.better |= state.ways.learn(ways);
        state.learned = true;
        if state.better && state.link.as_ref().is_some_and(|link| link.path.is_relayed()) {
            self.wake.notify_one();
        }
        let fits = state.link.as_ref().is_some_and(|link| key.is_none() || key == link.shown);
        !fits && state.lookup.begin(now)
    }

    /// What was found by looking up, so far.
    pub(crate) fn found(&self, ways: Ways) {
        let mut state = lock(&self.state);
        let known = state.known();
        let endpoints = has_new(&ways.endpoints, &known.endpoints);
        if endpoints || has_new(&ways.relays, &known.relays) || has_new(&ways.last_resorts, &known.last_resorts) {
            // The next message goes this way, if it can.
            state.stand_in = None;
        }
        state.lookup.found(ways);
        state.better |= endpoints;
        state.learned = true;
        self.wake.notify_one();
    }

    /// No more will be found. `answered`: what was found is all that there is for now, and need not be looked up again.
    pub(crate) fn resolved(&self, answered: bool) {
        let mut state = lock(&self.state);
        state.lookup.ended(answered, Instant::now());
        state.learned = true;
        self.wake.notify_one();
    }

    /// Whether whoever has this key is this peer, as far as is known.
    pub(crate) fn is_expected_to_have(&self, key: Fingerprint) -> bool {
        let sought = lock(&self.state).sought.contains(&Some(key));
        sought || self.expected_key() == Some(key)
    }

    fn expected_key(&self) -> Option<Fingerprint> {
        let PeerName::Node(node) = &self.name else { return None };
        let shown = lock(&self.state).link.as_ref().and_then(|link| link.shown);
        shown.or_else(|| self.named_key()).or_else(|| self.node.known_key(node))
    }

    /// The key that callers or a lookup name.
    fn named_key(&self) -> Option<Fingerprint> {
        let state = lock(&self.state);
        state.ways.key.or(state.lookup.key())
    }

    /// The link, if the peer has shown this key.
    pub(crate) fn link_with(&self, key: Fingerprint) -> Option<(Path, Connection)> {
        let state = lock(&self.state);
        let link = state.link.as_ref().filter(|link| link.shown == Some(key))?;
        Some((link.path, link.connection.clone()))
    }

    /// The peer has begun a connection.
    pub(crate) fn arrived(&self) {
        lock(&self.state).arrived = true;
        self.wake.notify_one();
    }

    /// A message has come on a link of this peer's.
    pub(crate) fn heard(&self) {
        self.touch(Instant::now());
        self.counters.received.add(1);
    }

    /// For each message that waits for a link, the only key that may get it, if it names one. Without repetitions.
    pub(crate) fn keys_of_waiting(&self) -> Vec<Option<Fingerprint>> {
        let state = lock(&self.state);
        let keys = state.keys_of_waiting();
        if keys.is_empty() { state.sought.clone() } else { keys }
    }

    /// Takes over a message for somebody else, or gives it back.
    fn adopt(&self, job: Job) -> Result<(), Box<Job>> {
        self.touch(Instant::now());
        let mut state = lock(&self.state);
        if state.retired {
            return Err(Box::new(job));
        }
        if job.is_accepted() || self.may_wait(&state, job.size()) {
            self.push(&mut state, job);
            return Ok(());
        }
        drop(state);
        self.counters.failed.add(1);
        job.fail(SendError::Overloaded);
        Ok(())
    }

    /// Gives a message to the session, whose link is live. Returns whether the task is to go on with it.
    fn number(&self, state: &mut State, message: Letter, now: Instant) -> bool {
        state.expiry = earliest(state.expiry, message.deadline);
        let sent = state.session.send(message, now);
        self.counters.sent.add(sent.written.into());
        sent.wake
    }

    /// Takes a message for a live link that is busy or has no stream to spare just now.
    fn accept(&self, state: &mut State, message: Letter) -> Result<(), Letter> {
        // It would take the room that somebody waits for.
        let waited_for = state.queue.back().is_some_and(|job| !job.is_accepted());
        if waited_for || state.queue.len() >= MAX_ACCEPTED || state.retired {
            return Err(message);
        }
        let deadline = message.deadline;
        self.push(state, Job::accepted(Some(message), deadline));
        Ok(())
    }

    /// Queues a job. The task need not be woken where it already waits for what lets it go on with the queue.
    fn push(&self, state: &mut State, job: Job) {
        self.hold(&job);
        let expiry = earliest(state.expiry, job.deadline);
        if state.queue.is_empty() || state.expiry != expiry || !job.is_accepted() {
            state.expiry = expiry;
            self.wake.notify_one();
        }
        match job.is_accepted() {
            // Behind a call that waits for room, it would keep the room that it has for as long as the call waits.
            true => state.queue.insert(state.first_waiting(), job),
            false => state.queue.push_back(job),
        }
    }

    /// Those who wait for room are as much again as what there is room for.
    fn may_wait(&self, state: &State, size: usize) -> bool {
        let waiting = self.waiting.load(Ordering::Relaxed);
        let fits = waiting == 0 || waiting + size <= self.node.config.max_unacknowledged;
        fits && state.queue.len() + state.parked.len() + self.asked.load(Ordering::Relaxed) < MAX_WAITING
    }

    /// A frame always fits when nothing else is held, so that no configuration makes a peer mute.
    fn has_room(&self, state: &State, size: usize) -> bool {
        let held = self.held.load(Ordering::Relaxed) + state.session.len() * KEPT_BESIDE;
        held == 0 || held + size <= self.node.config.max_unacknowledged
    }

    fn hold(&self, job: &Job) {
        let bytes = if job.is_accepted() { &self.held } else { &self.waiting };
        bytes.fetch_add(job.size(), Ordering::Relaxed);
    }

    fn let_go(&self, job: &Job) {
        let bytes = if job.is_accepted() { &self.held } else { &self.waiting };
        bytes.fetch_sub(job.size(), Ordering::Relaxed);
    }

    fn undelivered(&self, count: u64, reason: UndeliveredReason) {
        if count > 0 {
            self.counters.failed.add(count);
            self.node.undelivered(Event::Undelivered { peer: self.name.clone(), count, reason }, count);
        }
    }

    fn touch(&self, now: Instant) {
        self.used.store(self.node.clock(now), Ordering::Relaxed);
    }
}

fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut distinct = Vec::new();
    for one in all {
        if !distinct.contains(&one) {
            distinct.push(one);
        }
    }
    distinct
}

fn has_new(ways: &[Endpoint], known: &[Endpoint]) -> bool {
    ways.iter().any(|way| !known.contains(way))
}

impl State {
    /// Every way to the peer. What its callers say comes first.
    fn known(&self) -> Ways {
        self.ways.and(&self.lookup.ways())
    }

    fn first_waiting(&self) -> usize {
        // As a rule nothing waits, and the search would cost each message that is queued.
        match self.queue.back() {
            Some(last) if !last.is_accepted() => self.queue.partition_point(Job::is_accepted),
            _ => self.queue.len(),
        }
    }

    /// From now on callers wait for the next link.
    fn hide_link(&mut self) {
        self.link = None;
        // Any link is of use to somebody again.
        while let Some(job) = self.parked.pop_back() {
            self.put_back(job);
        }
    }

    /// For each message that no live link takes, the only key that may get it, if it names one. Without repetitions.
    fn keys_of_waiting(&self) -> Vec<Option<Fingerprint>> {
        if self.link.is_some() {
            let keys = distinct(self.keys_of_parked().into_iter().chain(self.sought.iter().copied()));
            if !keys.is_empty() {
                return keys;
            }
        }
        let queued = self.queue.iter().filter_map(|job| job.message.as_ref());
        distinct(queued.chain(self.session.messages()).map(|message| message.key))
    }

    fn keys_of_parked(&self) -> Vec<Option<Fingerprint>> {
        distinct(self.parked.iter().filter_map(|job| job.message.as_ref()).map(|message| message.key))
    }

    /// Whether there is a link, and one that shows this key is sought beside it.
    fn seeks(&self, key: Fingerprint) -> bool {
        let sought = || self.keys_of_parked().into_iter().chain(self.sought.iter().copied());
        self.link.is_some() && sought().any(|sought| sought == Some(key))
    }

    /// Puts a job back that was next.
    fn put_back(&mut self, job: Job) {
        self.expiry = earliest(self.expiry, job.deadline);
        match job.is_accepted() {
            true => self.queue.push_front(job),
            false => self.queue.insert(self.first_waiting(), job),
        }
    }
}

impl Job {
    fn accepted(message: Option<Letter>, deadline: Option<Instant>) -> Self {
        Self { message, deadline, since: Instant::now(), who: Who::Accepted, named: None }
    }

    fn size(&self) -> usize {
        self.message.as_ref().map_or(0, |message| message.frame.len())
    }

    fn answer_sent(self) {
        if let Who::Sender(call) = self.who {
            call.answer(Ok(()));
        }
    }

    /// Tells who waits, if somebody does.
    fn fail(self, error: SendError) {
        match self.who {
            Who::Accepted => {}
            Who::Sender(call) => call.answer(Err(error)),
            Who::Requester(call) if self.named.is_some_and(|named| named.again) => {
                call.answer(Err(RequestError::LinkLost));
            }
            Who::Requester(call) => call.answer(Err(error.into())),
        }
    }

    fn is_wanted(&self) -> bool {
        match &self.who {
            Who::Accepted => true,
            Who::Sender(call) => call.is_open(),
            Who::Requester(call) => call.is_open(),
        }
    }

    fn is_accepted(&self) -> bool {
        matches!(self.who, Who::Accepted)
    }

    fn is_over(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether the deadline had passed when the call was made.
    fn had_no_time(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= self.since)
    }
}

/// Leaves nobody waiting for a task that is gone, however it ended.
struct Ended(Arc<Peer>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.node.gone(&self.0);
        let (queue, partials) = {
            let mut state = lock(&self.0.state);
            (state.retired, state.ended) = (true, true);
            state.hide_link();
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.partials))
        };
        drop((queue, partials));
    }
}

/// The peer's task.
struct Task {
    peer: Arc<Peer>,
    /// The ways that are tried, beside the link if there is one.
    race: Option<Race>,
    redial: Backoff,
    redial_at: Option<Instant>,
    /// Nobody is worth a dial before this time.
    hold_off: Option<Instant>,
    /// The live link; callers see it too unless it is in doubt.
    link: Option<Arc<Link>>,
    link_since: Instant,
    /// When there was last a link, if there is none.
    linked_until: Option<Instant>,
    /// Why there is none.
    failure: Option<SendError>,
    /// Since the last link, only a node with another key was found.
    untrusted: bool,
    in_doubt: bool,
    /// The link is given up, and until when what went over it may still be acknowledged.
    leaving: Option<Instant>,
    liveness: Liveness,
    /// When the oldest unacknowledged message was written.
    oldest: Option<Instant>,
    /// When the peer will have read what it has acknowledged.
    read_by: Option<Instant>,
    swept_at: Instant,
    out_of_credit: bool,
    answers_until: Option<Instant>,
    /// When a better path than the present one is looked for, and the pauses between.
    upgrade_at: Option<Instant>,
    upgrade: Upgrade,
    /// This node's NAT or address, which decide what can be tried.
    description: watch::Receiver<Option<Description>>,
    /// What was last said of the path.
    told: Option<(Path, Failures)>,
    writers: JoinSet<WriteOutcome>,
    /// How many of them write what was accepted.
    accepted_writes: usize,
    requests: JoinSet<RequestOutcome>,
    /// Tasks that read answers, and that end links which have been replaced.
    helpers: JoinSet<()>,
    /// Answers that are much work to hand over.
    heavy_answers: JoinSet<()>,
    refusals: broadcast::Receiver<Refused>,
    drain_until: Option<Instant>,
}

struct WriteOutcome {
    link: Arc<Link>,
    job: Job,
    message: Letter,
    result: Result<(SendStream, RecvStream), WriteFailure>,
}

enum WriteFailure {
    Expired,
    Rejected,
    Lost,
    Cancelled,
}

struct RequestOutcome {
    job: Job,
    connection: usize,
    end: request::End,
}

/// Looks after the peer until it leaves the pool.
pub(crate) async fn run(peer: Arc<Peer>) {
    let _ended = Ended(peer.clone());
    let now = Instant::now();
    let refusals = peer.node.refusals.subscribe();
    let description = peer.node.description.subscribe();
    let task = Task {
        peer,
        race: None,
        redial: Backoff::new(REDIAL_FIRST_PAUSE, REDIAL_LONGEST_PAUSE),
        redial_at: None,
        hold_off: None,
        link: None,
        link_since: now,
        linked_until: None,
        failure: None,
        untrusted: false,
        in_doubt: false,
        leaving: None,
        liveness: Liveness::new(now),
        oldest: None,
        read_by: None,
        swept_at: now,
        out_of_credit: false,
        answers_until: None,
        upgrade_at: None,
        upgrade: Upgrade::new(now),
        description,
        told: None,
        writers: JoinSet::new(),
        accepted_writes: 0,
        requests: JoinSet::new(),
        helpers: JoinSet::new(),
        heavy_answers: JoinSet::new(),
        refusals,
        drain_until: None,
    };
    task.run().await;
}

impl Task {
    async fn run(mut self) {
        let peer = self.peer.clone();
        let mut stopping = peer.node.stopping();
        loop {
            let now = Instant::now();
            self.look_after(now);
            if self.is_done(now) {
                break self.end();
            }
            let next = self.next_look(now);
            let link = self.link.clone();
            let remote = link.as_ref().filter(|link| !link.path.is_relayed());
            let remote = remote.map(|link| link.connection.remote_address());
            tokio::select! {
                () = peer.wake.notified() => {}
                progress = session_progress(&peer, link.is_some()) => self.session_progressed(progress),
                progress = raced(&mut self.race) => self.race_progressed(progress),
                _ = closed(link.as_deref()) => self.link_died(),
                stream = credit(link.as_deref(), self.out_of_credit) => self.credit_came(stream),
                frames = answers(link.as_deref()), if self.heavy_answers.len() < LARGE_ANSWERS => self.answers_came(frames),
                Some(_) = self.heavy_answers.join_next() => {}
                Some(Ok(outcome)) = self.writers.join_next() => self.write_ended(outcome),
                Some(Ok(outcome)) = self.requests.join_next() => self.request_ended(outcome),
                Some(_) = self.helpers.join_next() => {}
                _ = unreachable(&mut self.refusals, remote) => self.doubt(Duration::ZERO),
                silence = doubted(link.as_deref()) => self.doubt(silence),
                // The sender is the node's.
                Ok(()) = self.description.changed() => self.network_changed(),
                _ = stopping.changed() => peer.retire(),
                () = sleep_until(next.into()) => {}
            }
        }
    }

    /// Everything that time or the callers may have changed.
    fn look_after(&mut self, now: Instant) {
        self.answer_expired(now);
        self.start_partials();
        self.begin_leaving(now);
        // A link that is trusted again, or has room again, goes on with the queue.
        if now >= self.swept_at + SWEEP_EVERY {
            self.sweep(now);
        }
        self.leave(now);
        self.flush();
        if let (Some(link), true) = (&self.link, self.answers_until.is_none_or(|until| until <= now)) {
            self.answers_until = link.expire_answers(now);
        }
        self.pass_on(now);
        self.look_at_arrived(now);
        if self.wants_dial(now) {
            self.begin_race(now);
        } else if self.wants_other_key(now) {
            self.look_for_key(now);
        } else if self.race.as_ref().is_some_and(|race| race.for_key) {
            // It tries every way, those that may be better too.
        } else if self.upgrade_at.is_some_and(|at| at <= now) || self.knows_better() {
            self.look_for_better(now);
        }
    }

    fn next_look(&self, now: Instant) -> Instant {
        let state = lock(&self.peer.state);
        let idle = self.node().instant(self.peer.last_used()) + self.node().config.idle_timeout;
        // Past, it waits for whatever is not over yet.
        let mut next = if idle > now { idle } else { now + self.node().config.idle_timeout };
        let unproven = self.in_doubt || (self.link.is_some() && self.peer.held.load(Ordering::Relaxed) > 0);
        let sweep = unproven.then(|| self.swept_at + SWEEP_EVERY);
        // Past, it waits for somebody to want the peer.
        let redial = self.redial_at.max(self.hold_off).filter(|&at| at > now);
        let leaves = state.retired || self.node().is_stopping();
        let read_by = self.read_by.filter(|&at| leaves && at > now);
        let times =
            [read_by, state.expiry, sweep, redial, self.leaving, self.upgrade_at, self.answers_until, self.drain_until];
        for time in times.into_iter().flatten() {
            next = next.min(time);
        }
        next
    }

    /// Calls and messages whose time is over, or whose callers are gone.
    fn answer_expired(&mut self, now: Instant) {
        let (mut gone, mut parked) = (Vec::new(), Vec::new());
        let given_up;
        {
            let mut state = lock(&self.peer.state);
            let due = state.expiry.is_some_and(|expiry| expiry <= now);
            if !due && !state.cancelled {
                return;
            }
            state.cancelled = false;
            (given_up, state.expiry) = state.session.expire(now);
            let state = &mut *state;
            for (jobs, gone) in [(&mut state.queue, &mut gone), (&mut state.parked, &mut parked)] {
                for job in std::mem::take(jobs) {
                    if job.is_over(now) || !job.is_wanted() {
                        gone.push(job);
                    } else {
                        state.expiry = earliest(state.expiry, job.deadline);
                        jobs.push_back(job);
                    }
                }
            }
        }
        parked.into_iter().for_each(|job| self.not_for_this_peer(job));
        let linked = self.link.is_some() && !self.in_doubt;
        let mut expired = 0;
        self.give_up(given_up, self.why_late());
        for job in gone {
            self.peer.let_go(&job);
            let error = match () {
                () if job.had_no_time() => SendError::Timeout,
                () if linked && !self.peer.has_room(&lock(&self.peer.state), job.size()) => SendError::Overloaded,
                () if linked => SendError::NoRoom,
                () => self.not_reached(),
            };
            match job.who {
                Who::Accepted => expired += 1,
                Who::Sender(call) => self.fail(|| call.answer(Err(error))),
                Who::Requester(call) if linked || job.named.is_some() => {
                    self.fail(|| call.answer(Err(RequestError::Timeout)));
                }
                Who::Requester(call) => self.fail(|| call.answer(Err(error.into()))),
            }
        }
        self.undelivered(expired, self.why_late());
    }

    /// Why a message that was accepted was not delivered in time.
    fn why_late(&self) -> UndeliveredReason {
        if self.meets_another_key() { UndeliveredReason::Untrusted } else { UndeliveredReason::Expired }
    }

    /// Whether only a node with another key is where this one should be.
    fn meets_another_key(&self) -> bool {
        // A race beside a link that works only looks for a better path.
        let race = self.race.as_ref().filter(|_| self.link.is_none() || self.in_doubt);
        self.untrusted || race.is_some_and(|race| is_untrusted(race.failure()))
    }

    fn not_reached(&self) -> SendError {
        match (&self.peer.name, &self.failure) {
            (_, Some(failure)) => failure.clone(),
            (PeerName::Endpoint(_) | PeerName::Gateway(_), None) => ConnectError::TimedOut.into(),
            (PeerName::Node(_), None) if self.meets_another_key() => RouteError::Node(ConnectError::Untrusted).into(),
            (PeerName::Node(_), None) if !self.has_relays() => RouteError::NoRelay.into(),
            (PeerName::Node(_), None) => RouteError::Relay(ConnectError::TimedOut).into(),
        }
    }

    fn has_relays(&self) -> bool {
        let ways = lock(&self.peer.state).known();
        let known = !ways.relays.is_empty() || !ways.last_resorts.is_empty();
        known || !self.node().config.relays.is_empty() || !self.node().clients.standing().is_empty()
    }

    /// Gives the link up if somebody wants that. Callers do not see it any more.
    fn begin_leaving(&mut self, now: Instant) {
        if !std::mem::take(&mut lock(&self.peer.state).invalidated) {
            return;
        }
        let Some(link) = &self.link else { return };
        lock(&self.peer.state).hide_link();
        self.leaving.get_or_insert(now + link.patience());
        // A race for a better link goes on for any link.
        self.race = None;
    }

    /// Ends a link that is given up. What went over it is about to be acknowledged, and otherwise would have to go over
    /// another, and to a 0.14.3 gateway twice.
    fn leave(&mut self, now: Instant) {
        let Some(until) = self.leaving else { return };
        // Callers may have written since it was last looked.
        self.sweep(now);
        let owing = self.oldest.is_some() || !self.writers.is_empty();
        if owing && !self.in_doubt && now < until {
            return;
        }
        self.redial_at = None;
        match self.in_doubt {
            true => self.retire_link(),
            false => self.replace_link(),
        }
    }

    fn start_partials(&mut self) {
        let partials = std::mem::take(&mut lock(&self.peer.state).partials);
        for (link, job, partial) in partials {
            self.hold(partial.message.frame.len());
            self.write(link, job, partial);
        }
    }

    /// Gives the queue to the link, as far as it takes it.
    fn flush(&mut self) {
        self.out_of_credit = false;
        let Some(link) = self.link.clone().filter(|_| !self.in_doubt && self.leaving.is_none()) else { return };
        loop {
            let mut state = lock(&self.peer.state);
            let Some(mut job) = state.queue.pop_front() else { return };
            if !job.is_wanted() {
                self.peer.let_go(&job);
                continue;
            }
            if matches!(job.who, Who::Sender(_)) && !self.peer.has_room(&state, job.size()) {
                // Acknowledgements make room, and wake this task.
                state.queue.push_front(job);
                return;
            }
            let Some(message) = job.message.take() else { continue };
            let size = message.frame.len();
            if !message.is_for(link.shown) {
                job.message = Some(message);
                self.park(state, job);
                continue;
            }
            if let Who::Requester(call) = &job.who {
                drop(state);
                let target = self.peer.name.node().cloned();
                let named = match link.dialect {
                    Dialect::MaculaPeer1 => Some(*job.named.get_or_insert_with(request::Named::new)),
                    Dialect::Macula if job.named.is_some_and(|named| named.again) => {
                        // The peer is another one than before.
                        job.message = Some(message);
                        self.peer.let_go(&job);
                        self.fail(|| call.answer(Err(RequestError::LinkLost)));
                        continue;
                    }
                    Dialect::Macula => None,
                };
                let decoding = self.node().decoding.clone();
                let exchange = request::run(link.clone(), target, named, call.clone(), message.clone(), decoding);
                job.message = Some(message);
                self.peer.counters.sent.add(1);
                self.peer.asked.fetch_add(1, Ordering::Relaxed);
                let connection = link.connection.stable_id();
                self.requests.spawn(async move { RequestOutcome { job, connection, end: exchange.await } });
                continue;
            }
            if link.dialect == Dialect::MaculaPeer1 {
                // Under the lock that it was taken from the queue under: nobody overtakes it.
                self.admit(&job, size);
                // What the stream does not take is written when this task next looks at the session.
                let _ = self.peer.number(&mut state, message, Instant::now());
                drop(state);
                job.answer_sent();
                continue;
            }
            drop(state);
            match link.write(message, Instant::now()) {
                Written::Done { .. } => {
                    self.admit(&job, size);
                    self.sent(job);
                }
                Written::Partial(partial) => {
                    self.admit(&job, size);
                    self.write(link.clone(), job, *partial);
                }
                Written::NoCredit(message) => {
                    job.message = Some(message);
                    lock(&self.peer.state).put_back(job);
                    self.out_of_credit = true;
                    return;
                }
                Written::Unproven(_) if self.node().config.delivery == Delivery::AtMostOnce => {
                    self.admit(&job, size);
                    self.let_go(size);
                    self.not_delivered(job, UndeliveredReason::LinkLost, SendError::LinkLost);
                    return;
                }
                Written::Lost(message) | Written::Unproven(message) => {
                    job.message = Some(message);
                    lock(&self.peer.state).put_back(job);
                    return;
                }
            }
        }
    }

    /// Keeps a job that the link's peer may not get until somebody else is found, if it is for a node.
    fn park(&self, mut state: MutexGuard<'_, State>, mut job: Job) {
        let PeerName::Node(_) = self.peer.name else {
            drop(state);
            return self.not_for_this_peer(job);
        };
        if job.is_accepted() {
            job.deadline.get_or_insert(Instant::now() + OWED_WITHOUT_DEADLINE);
            state.expiry = earliest(state.expiry, job.deadline);
        }
        state.parked.push_back(job);
    }

    fn write(&mut self, link: Arc<Link>, job: Job, partial: Partial) {
        self.accepted_writes += usize::from(job.is_accepted());
        self.writers.spawn(write_rest(link, job, partial));
    }

    fn sweep(&mut self, now: Instant) {
        self.swept_at = now;
        let Some(link) = self.link.clone() else { return };
        match link.dialect {
            Dialect::MaculaPeer1 => self.oldest = lock(&self.peer.state).session.oldest(),
            Dialect::Macula => {
                let swept = link.sweep(now);
                self.oldest = swept.oldest;
                if swept.acknowledged > 0 {
                    self.read_by = Some(now + READ_WITHIN);
                }
                self.account(swept);
            }
        }
        if self.oldest.is_none() && !self.in_doubt {
            return;
        }
        match self.liveness.look(link.heard(), self.oldest, link.patience(), now) {
            Seen::Heard if self.in_doubt => self.trust_again(),
            Seen::Silent(silence) => self.doubt(silence),
            Seen::Heard | Seen::Nothing => {}
        }
        link.expect_silence(self.liveness.expected_silence(now));
    }

    fn account(&self, swept: Swept) {
        self.peer.counters.acknowledged.add(swept.acknowledged);
        self.let_go(swept.acknowledged_bytes);
        for message in &swept.rejected {
            self.let_go(message.frame.len());
        }
        self.undelivered(swept.rejected.len() as u64, UndeliveredReason::Rejected(Rejection::Unread));
    }

    /// The peer may be gone: callers wait until it is heard of again, on this link or a new one.
    fn doubt(&mut self, silence: Duration) {
        let Some(link) = self.link.as_ref().filter(|_| !self.in_doubt) else { return };
        tracing::debug!(peer = %self.peer.name, "silent, trying a new link");
        self.in_doubt = true;
        self.liveness.suspect(link.heard(), silence, Instant::now());
        // A race for a better link goes on for any link, and none for a better one alone begins.
        self.race = None;
        self.upgrade_at = None;
        lock(&self.peer.state).hide_link();
    }

    fn trust_again(&mut self) {
        self.in_doubt = false;
        lock(&self.peer.state).sought.clear();
        let race = self.race.take();
        if let (Some(race), Some(Dialect::Macula)) = (race, self.link.as_ref().map(|link| link.dialect)) {
            self.helpers.spawn(race.finish());
        }
        if self.leaving.is_none() {
            lock(&self.peer.state).link = self.link.clone();
        }
        self.plan_upgrade();
    }

    fn wants_dial(&mut self, now: Instant) -> bool {
        let linked = self.link.is_some() && !self.in_doubt;
        if linked || self.hold_off.is_some_and(|until| until > now) {
            return false;
        }
        let mut state = lock(&self.peer.state);
        if let Some(race) = &mut self.race {
            if std::mem::take(&mut state.learned) {
                state.better = false;
                race.add(&state.known(), state.lookup.until(now), now);
            }
            return false;
        }
        // Somebody who waits is worth a dial now; what is only owed waits for its turn.
        let waited_for = state.queue.iter().any(|job| !job.is_accepted() && !job.is_over(now));
        let owed = !state.queue.is_empty() || !state.session.is_empty() || !self.requests.is_empty();
        let owed = owed || self.oldest.is_some();
        waited_for || (owed && self.redial_at.is_none_or(|at| at <= now))
    }

    /// Whether messages wait for another key than the live link's, and whoever may have it is not being looked for.
    fn wants_other_key(&mut self, now: Instant) -> bool {
        let mut state = lock(&self.peer.state);
        if state.parked.is_empty() || self.hold_off.is_some_and(|until| until > now) {
            return false;
        }
        if let Some(race) = self.race.as_mut().filter(|race| race.for_key) {
            if std::mem::take(&mut state.learned) {
                race.add(&state.known(), state.lookup.until(now), now);
            }
            return false;
        }
        let waited_for = state.parked.iter().any(|job| !job.is_accepted() && !job.is_over(now));
        waited_for || self.redial_at.is_none_or(|at| at <= now)
    }

    /// Tries every way for the holder of a key that messages name. The others go on over the link.
    fn look_for_key(&mut self, now: Instant) {
        // One for a better link tries the direct ways alone.
        self.race = None;
        self.upgrade_at = None;
        self.begin_race(now);
    }

    fn begin_race(&mut self, now: Instant) {
        self.redial_at = None;
        {
            let mut state = lock(&self.peer.state);
            state.sought = state.keys_of_waiting();
        }
        self.adopt(now);
        let mut state = lock(&self.peer.state);
        let for_key = !state.parked.is_empty();
        if !for_key && self.link.is_some() && !self.in_doubt {
            return;
        }
        self.peer.counters.dials.add(1);
        let (node, name) = (self.node().clone(), self.peer.name.clone());
        let race = self.race.get_or_insert_with(|| Race::new(node, name, now));
        race.for_key = for_key;
        (state.learned, state.better) = (false, false);
        race.add(&state.known(), state.lookup.until(now), now);
    }

    /// The peer has begun connections: one may be better than the link.
    fn look_at_arrived(&mut self, now: Instant) {
        let arrived = std::mem::take(&mut lock(&self.peer.state).arrived);
        // Without either, nobody wants a link.
        if arrived && (self.link.is_some() || self.race.is_some()) {
            self.adopt(now);
        }
    }

    /// Uses connections that the peer has begun.
    fn adopt(&mut self, now: Instant) {
        let PeerName::Node(_) = self.peer.name else { return };
        let named = self.peer.named_key();
        let sought = match &self.link {
            Some(_) if !self.in_doubt => lock(&self.peer.state).keys_of_parked(),
            _ => lock(&self.peer.state).keys_of_waiting(),
        };
        for key in distinct(sought.into_iter().flatten().chain(self.peer.expected_key())) {
            for accepted in self.node().accepted_from(key) {
                let present = self.link.as_ref().map(|link| link.connection.stable_id());
                if present == Some(accepted.connection().stable_id()) || !self.prefers(accepted.path, false, Some(key))
                {
                    continue;
                }
                match self.node().adopt_now(&self.peer.name, &accepted, named) {
                    Some(link) => {
                        self.race_progressed(race::Progress::Link(Arc::new(link)));
                        // Nothing else may wake this task before a call that waits has expired.
                        self.flush();
                    }
                    None => {
                        let (node, name) = (self.node().clone(), self.peer.name.clone());
                        self.race.get_or_insert_with(|| Race::new(node, name, now)).adopt(accepted, named);
                    }
                }
            }
        }
    }

    /// Whether such a link is better than the present one. Both nodes have to come to the same end, or each would let go
    /// of the connection that the other one keeps.
    fn prefers(&self, path: Path, dialled: bool, shown: Option<Fingerprint>) -> bool {
        let Some(present) = self.link.as_ref().filter(|_| !self.in_doubt) else { return true };
        let Some(shown) = shown else { return true };
        if lock(&self.peer.state).seeks(shown) {
            return true;
        }
        let own = self.node().identity.fingerprint();
        let worth =
            |path: Path, dialled| Rank { relayed: path.is_relayed(), dialler: if dialled { own } else { shown } };
        worth(path, dialled) < worth(present.path, present.is_dialled())
    }

    /// On a relayed path: tries the direct ones again.
    fn look_for_better(&mut self, now: Instant) {
        // It is planned anew when the race is over, or another link is up.
        self.upgrade_at = None;
        let Some(Path::Relay(relay)) = self.link.as_ref().map(|link| link.path) else { return };
        let mut state = lock(&self.peer.state);
        (state.learned, state.better) = (false, false);
        let Ways { endpoints, key, hole_punch, .. } = state.known();
        drop(state);
        let (node, name) = (self.node().clone(), self.peer.name.clone());
        let punches = self.race.is_none();
        let race = self.race.get_or_insert_with(|| Race::new(node.clone(), name, now));
        race.add(&Ways { endpoints, key, hole_punch, ..Ways::default() }, None, now);
        race.keep_direct();
        if let (true, Some(relay)) = (punches, node.clients.relay_at(relay)) {
            race.punch(relay);
        }
    }

    fn network_changed(&mut self) {
        self.upgrade.changed(Instant::now(), fastrand::f64());
        if self.upgrade_at.is_some() {
            self.plan_upgrade();
        }
    }

    fn knows_better(&self) -> bool {
        let relayed = self.link.as_ref().is_some_and(|link| link.path.is_relayed());
        relayed && !self.in_doubt && lock(&self.peer.state).better
    }

    fn plan_upgrade(&mut self) {
        let relayed = self.link.as_ref().is_some_and(|link| link.path.is_relayed());
        self.upgrade_at = (relayed && self.race.is_none()).then(|| self.upgrade.next());
    }

    /// The better paths have been tried, in vain.
    fn not_better(&mut self) {
        let now = Instant::now();
        let state = lock(&self.peer.state);
        let punch = state.failures.hole_punch.as_ref().map(PunchError::failure);
        // An endpoint may be reached later whatever the NATs are.
        let counts = |failure: &Failure| *failure == Failure::Interrupted || state.known().endpoints.is_empty();
        let failure = punch.filter(counts).unwrap_or(Failure::TimedOut);
        drop(state);
        self.upgrade.failed(failure, now, fastrand::f64());
        self.plan_upgrade();
    }

    /// Says how the peer is reached, if that is news.
    fn tell_path(&mut self) {
        // A peer that is known by its address has but one path.
        let PeerName::Node(_) = self.peer.name else { return };
        let Some(path) = self.link.as_ref().map(|link| link.path) else { return };
        let failures = lock(&self.peer.state).failures.clone();
        if self.told.as_ref().is_none_or(|told| (&told.0, &told.1) != (&path, &failures)) {
            self.told = Some((path, failures.clone()));
            self.node().event(Event::Path { peer: self.peer.name.clone(), path, failures });
        }
    }

    fn race_progressed(&mut self, progress: race::Progress) {
        let now = Instant::now();
        let begun = self.race.as_ref().map_or(now, |race| race.begun);
        if self.in_doubt {
            // A peer that is back answers on both links. The old one has everything that is on its way.
            self.sweep(now);
            if !self.in_doubt {
                return drop_link(progress);
            }
        }
        // Why nobody else has the key that messages name says nothing of the link's path.
        let for_key = self.race.as_ref().is_some_and(|race| race.for_key);
        if let Some(race) = self.race.as_mut().filter(|_| !for_key) {
            race.take_failures(&mut lock(&self.peer.state).failures);
        }
        match progress {
            race::Progress::Link(link) if !self.takes(&link) => link.close(),
            race::Progress::Link(link) => {
                match (&mut self.race, link.path) {
                    (Some(race), Path::Relay(_)) => race.keep_direct(),
                    _ => self.race = None,
                }
                self.link_up(link);
            }
            race::Progress::Lost(error) => {
                self.race = None;
                // Looking for something better while there is a link, it has not lost anything.
                if for_key {
                    self.no_other_key(begun);
                } else if self.link.is_none() || self.in_doubt {
                    self.race_lost(error, begun);
                } else {
                    self.not_better();
                    self.tell_path();
                }
            }
            race::Progress::StandIn(relay) => {
                self.race = None;
                if self.link.is_none() || self.in_doubt {
                    self.retire_link();
                    let Some(peer) = self.node().peer(&Target::Endpoint(relay.as_ref())) else {
                        return self.race_lost(SendError::Stopped, begun);
                    };
                    let until = Instant::now() + STAND_IN_FOR;
                    lock(&self.peer.state).stand_in = Some((peer, until));
                }
            }
        }
    }

    fn takes(&self, link: &Link) -> bool {
        self.prefers(link.path, link.is_dialled(), link.shown)
    }

    /// Gives everything that waits to the one who stands in.
    fn pass_on(&mut self, now: Instant) {
        let (stand_in, jobs, lost) = {
            let mut state = lock(&self.peer.state);
            let Some((peer, until)) = state.stand_in.clone() else { return };
            if until <= now {
                state.stand_in = None;
                return;
            }
            let Taken { owed, lost } = state.session.take();
            let owed = owed.into_iter().map(|message| {
                let deadline = message.deadline.unwrap_or(now + OWED_WITHOUT_DEADLINE);
                Job::accepted(Some(message), Some(deadline))
            });
            (peer, owed.chain(std::mem::take(&mut state.queue)).collect::<Vec<_>>(), lost)
        };
        self.give_up(lost, UndeliveredReason::LinkLost);
        for job in jobs {
            self.peer.let_go(&job);
            if let Err(job) = stand_in.adopt(job) {
                // It has left the pool.
                let mut state = lock(&self.peer.state);
                state.stand_in = None;
                self.peer.push(&mut state, *job);
            }
        }
    }

    fn link_up(&mut self, link: Arc<Link>) {
        tracing::debug!(peer = %self.peer.name, dialect = link.dialect.alpn(), path = ?link.path, "link up");
        match &self.peer.name {
            PeerName::Gateway(_) => self.node().gateway_found(),
            _ => self.node().counted_unverified(link.dialect),
        }
        match &self.link {
            Some(_) if self.in_doubt => self.retire_link(),
            Some(_) => self.replace_link(),
            None => {}
        }
        // What was refused before says nothing about this link.
        self.refusals = self.node().refusals.subscribe();
        let now = Instant::now();
        self.link_since = now;
        self.liveness.linked(now);
        link.expect_silence(self.liveness.expected_silence(now));
        (self.failure, self.untrusted) = (None, false);
        self.answers_until = None;
        self.peer.touch(now);
        self.link = Some(link.clone());
        let mut state = lock(&self.peer.state);
        let refused = state.session.refuse(|message| !message.is_for(link.shown));
        let taken = match link.dialect {
            Dialect::MaculaPeer1 => Taken::default(),
            // The peer is another one than before: what was numbered goes the other way.
            Dialect::Macula => state.session.take(),
        };
        state.sought.clear();
        let attached = link.dialect == Dialect::Macula || state.session.attach(&link);
        if attached {
            state.link = Some(link.clone());
        }
        drop(state);
        self.give_up(refused, UndeliveredReason::Untrusted);
        self.give_up(taken.lost, UndeliveredReason::LinkLost);
        self.owe(taken.owed);
        if !attached {
            // As if it had died at once.
            return self.link_died();
        }
        if link.dialect == Dialect::MaculaPeer1 && link.is_dialled() {
            self.helpers.spawn(read_answers(self.peer.clone(), link.clone()));
            if let PeerName::Node(_) = self.peer.name {
                self.helpers.spawn(serve_link(self.node().clone(), Arc::downgrade(&self.peer), link));
                // Its key may not have been known before.
                self.peer.arrived();
            }
        }
        if !self.link.as_ref().is_some_and(|link| link.path.is_relayed()) {
            self.upgrade = Upgrade::new(now);
            lock(&self.peer.state).failures = Failures::default();
        }
        self.plan_upgrade();
        self.tell_path();
    }

    fn race_lost(&mut self, error: SendError, begun: Instant) {
        tracing::debug!(peer = %self.peer.name, %error, "no link");
        self.untrusted = is_untrusted(Some(&error));
        self.redial_at = Some(Instant::now() + self.redial.pause(fastrand::f64()));
        // A name that does not resolve, or a missing route on this host, says nothing about the peer.
        let is_ours = matches!(self.direct_failure(&error), Some(ConnectError::Unresolved | ConnectError::NoRoute));
        if self.in_doubt && !is_ours {
            // Silent on the old link and not to be had on a new one: what is unacknowledged keeps its deadlines.
            self.retire_link();
        }
        // Silence says nothing about a call that came later, nor does any failure if it came with other ways: it gets a dial
        // of its own.
        let silent = matches!(error, SendError::Connect(ConnectError::TimedOut));
        if self.is_away(&error) {
            // It was there a moment ago. It is about to register again, perhaps at a relay that was restarted too, or
            // this host's own interface is down.
            self.hold_off = self.redial_at;
            self.failure = Some(error);
            return;
        }
        let mut failed = Vec::new();
        {
            let mut state = lock(&self.peer.state);
            let again = silent || state.learned;
            for job in std::mem::take(&mut state.queue) {
                if job.is_accepted() || (again && job.since > begun) {
                    state.queue.push_back(job);
                } else {
                    failed.push(job);
                }
            }
        }
        for job in failed {
            self.peer.let_go(&job);
            self.fail(|| job.fail(error.clone()));
        }
    }

    /// Nobody was found who has a key that messages name and the link does not show.
    fn no_other_key(&mut self, begun: Instant) {
        self.redial_at = Some(Instant::now() + self.redial.pause(fastrand::f64()));
        let parked = std::mem::take(&mut lock(&self.peer.state).parked);
        // A call that came later may name another key, or have come with other ways.
        let (stay, failed): (VecDeque<_>, VecDeque<_>) =
            parked.into_iter().partition(|job| job.is_accepted() || job.since > begun);
        {
            let mut state = lock(&self.peer.state);
            state.parked = stay;
            state.sought.clear();
        }
        failed.into_iter().for_each(|job| self.not_for_this_peer(job));
        self.plan_upgrade();
    }

    /// Whether a peer that was linked until recently cannot be found, or cannot be sent anything.
    fn is_away(&self, error: &SendError) -> bool {
        let unregistered =
            matches!(error, SendError::Route(RouteError::Relay(_) | RouteError::Setup(Refusal::NotRegistered)));
        let absent = unregistered || self.direct_failure(error) == Some(ConnectError::NoRoute);
        absent && (self.link.is_some() || self.linked_until.is_some_and(|until| until.elapsed() < AWAY))
    }

    /// Why the peer's own address could not be dialled, if no relay was tried after that.
    fn direct_failure(&self, error: &SendError) -> Option<ConnectError> {
        match error {
            SendError::Connect(failure) => Some(failure.clone()),
            SendError::Route(RouteError::NoRelay) => lock(&self.peer.state).failures.direct.clone(),
            _ => None,
        }
    }

    fn session_progressed(&mut self, progress: Progress) {
        let Progress {
            written,
            acknowledged,
            acknowledged_bytes,
            lost,
            forgotten,
            rejected,
            expired,
            closed,
            mut broken,
            wrong_node,
        } = progress;
        self.peer.counters.sent.add(written);
        self.peer.counters.acknowledged.add(acknowledged);
        self.let_go(acknowledged_bytes);
        self.give_up(lost, UndeliveredReason::LinkLost);
        self.give_up(forgotten, UndeliveredReason::SessionLost);
        for same in rejected.chunk_by(|(_, why), (_, other)| why == other) {
            let messages = same.iter().map(|(message, _)| message.clone()).collect();
            self.give_up(messages, UndeliveredReason::Rejected(same[0].1));
        }
        self.give_up(expired, UndeliveredReason::Expired);
        if let Some(link) = &self.link {
            let mut state = lock(&self.peer.state);
            broken |= closed && !state.session.reopen(link);
            // Nothing may be on its way any more, and then nobody sweeps.
            self.oldest = state.session.oldest();
        }
        if wrong_node {
            self.wrong_node();
        } else if broken {
            self.link_died();
        }
    }

    /// The node at the other end of the link says that it is another one, at least by now. What was for this one takes
    /// another path.
    fn wrong_node(&mut self) {
        if let (PeerName::Node(node), Some(shown)) = (&self.peer.name, self.link.as_ref().and_then(|link| link.shown)) {
            self.node().disown(node, shown);
        }
        self.link_died();
    }

    fn link_died(&mut self) {
        tracing::debug!(peer = %self.peer.name, "link died");
        let now = Instant::now();
        self.redial_at = None;
        if now.saturating_duration_since(self.link_since) < SHORT_LIFE {
            self.hold_off = Some(now + self.redial.pause(fastrand::f64()));
        } else {
            self.redial.reset();
        }
        // A race for a better link goes on for any link.
        self.race = None;
        self.retire_link();
    }

    /// Ends the link, if there is one; what it left unacknowledged goes to the front of the queue, or stays with the
    /// session.
    fn retire_link(&mut self) {
        let Some(link) = self.unlink() else { return };
        link.mark_silent();
        let (swept, unacknowledged) = link.die();
        self.account(swept);
        self.owe(unacknowledged);
        match link.dialect {
            Dialect::MaculaPeer1 => link.close(),
            Dialect::Macula => drop(self.helpers.spawn(link.close_when_read())),
        }
    }

    /// Lets go of the link for a better one; what was asked over it may still be answered.
    fn replace_link(&mut self) {
        let Some(link) = self.unlink() else { return };
        let (swept, unacknowledged) = link.die();
        self.account(swept);
        self.owe(unacknowledged);
        self.helpers.spawn(async move {
            tokio::time::sleep(REPLACED_FOR).await;
            while link.is_asked() {
                tokio::time::sleep(REPLACED_FOR).await;
            }
            link.close();
        });
    }

    fn unlink(&mut self) -> Option<Arc<Link>> {
        (self.in_doubt, self.leaving) = (false, None);
        self.oldest = None;
        self.out_of_credit = false;
        self.upgrade_at = None;
        let mut state = lock(&self.peer.state);
        let now = Instant::now();
        state.hide_link();
        state.session.detach(now);
        // What is owed without a deadline has one from now on, and what was on its way may be over.
        for job in state.queue.iter_mut().take_while(|job| job.is_accepted()) {
            job.deadline.get_or_insert(now + OWED_WITHOUT_DEADLINE);
        }
        state.expiry = Some(now);
        drop(state);
        if self.link.is_some() {
            self.linked_until = Some(now);
        }
        self.link.take()
    }

    fn owe(&mut self, messages: Vec<Letter>) {
        let now = Instant::now();
        let (mut expired, mut lost) = (0, 0);
        let once = self.node().config.delivery == Delivery::AtMostOnce;
        let mut state = lock(&self.peer.state);
        for message in messages.into_iter().rev() {
            let deadline = message.deadline.unwrap_or(now + OWED_WITHOUT_DEADLINE);
            if once || deadline <= now {
                if once {
                    lost += 1
                } else {
                    expired += 1
                }
                self.let_go(message.frame.len());
                continue;
            }
            state.expiry = earliest(state.expiry, Some(deadline));
            state.queue.push_front(Job::accepted(Some(message), Some(deadline)));
        }
        drop(state);
        self.undelivered(expired, self.why_late());
        self.undelivered(lost, UndeliveredReason::LinkLost);
    }

    /// Messages of the session.
    fn give_up(&self, messages: Vec<Letter>, reason: UndeliveredReason) {
        self.let_go(messages.iter().map(|message| message.frame.len()).sum());
        self.undelivered(messages.len() as u64, reason);
    }

    fn credit_came(&mut self, stream: Option<(SendStream, RecvStream)>) {
        self.out_of_credit = false;
        if let (Some(link), Some(stream)) = (&self.link, stream) {
            link.put_spare(stream);
        }
    }

    fn answers_came(&mut self, answers: Vec<Answered>) {
        let Some(link) = &self.link else { return };
        for Answered { frame, asker } in answers {
            self.peer.counters.received.add(1);
            match asker {
                Some(asker) => self.node().gateway_answered(&asker, frame),
                None if is_heavy(frame.payload()) => {
                    self.heavy_answers.spawn(hand_over_heavy(self.peer.clone(), link.clone(), frame));
                }
                // It is counted.
                None => drop(hand_over(&self.peer, link, frame)),
            }
        }
    }

    fn write_ended(&mut self, outcome: WriteOutcome) {
        let WriteOutcome { link, job, message, result } = outcome;
        self.accepted_writes -= usize::from(job.is_accepted());
        let size = message.frame.len();
        match result {
            Ok((send, receive)) => match link.written(message, send, receive) {
                Written::Unproven(_) if self.node().config.delivery == Delivery::AtMostOnce => {
                    self.let_go(size);
                    self.not_delivered(job, UndeliveredReason::LinkLost, SendError::LinkLost);
                }
                Written::Lost(message) | Written::Unproven(message) => self.write_lost(job, message),
                _ => self.sent(job),
            },
            Err(WriteFailure::Lost) => self.write_lost(job, message),
            Err(WriteFailure::Cancelled) => self.let_go(size),
            Err(failure) => {
                self.let_go(size);
                let (reason, error) = match failure {
                    WriteFailure::Expired => (UndeliveredReason::Expired, SendError::NoRoom),
                    _ => (UndeliveredReason::Rejected(Rejection::Unread), SendError::LinkLost),
                };
                self.not_delivered(job, reason, error);
            }
        }
    }

    fn not_delivered(&self, job: Job, reason: UndeliveredReason, error: SendError) {
        match job.who {
            Who::Sender(call) => self.fail(|| call.answer(Err(error))),
            _ => self.undelivered(1, reason),
        }
    }

    /// A part of it may have arrived, but no receiver makes anything of a part: sending it again is no second delivery.
    fn write_lost(&mut self, mut job: Job, message: Letter) {
        job.message = Some(message);
        if job.is_accepted() && job.deadline.is_none() {
            job.deadline = Some(Instant::now() + OWED_WITHOUT_DEADLINE);
        }
        self.requeue(job);
    }

    fn requeue(&self, job: Job) {
        let mut state = lock(&self.peer.state);
        if !job.is_accepted() {
            self.let_go(job.size());
            self.peer.hold(&job);
        }
        state.put_back(job);
    }

    fn ask_again(&self, job: Job) {
        lock(&self.peer.state).put_back(job);
    }

    fn request_ended(&mut self, RequestOutcome { mut job, connection, end }: RequestOutcome) {
        self.peer.asked.fetch_sub(1, Ordering::Relaxed);
        match end {
            request::End::Answered => {
                self.peer.counters.acknowledged.add(1);
                self.peer.counters.received.add(1);
                self.peer.let_go(&job);
            }
            request::End::Failed => {
                self.peer.counters.failed.add(1);
                self.peer.let_go(&job);
            }
            request::End::Cancelled => self.peer.let_go(&job),
            request::End::Unsent => self.ask_again(job),
            request::End::WrongNode => {
                self.ask_again(job);
                if self.link.as_ref().is_some_and(|link| link.connection.stable_id() == connection) {
                    self.wrong_node();
                }
            }
            request::End::Unacknowledged => match (self.node().config.delivery, &job.who, &mut job.named) {
                (Delivery::AtMostOnce, Who::Requester(call), None) => {
                    self.peer.let_go(&job);
                    self.fail(|| call.answer(Err(RequestError::LinkLost)));
                }
                (Delivery::AtMostOnce, _, Some(named)) => {
                    named.again = true;
                    self.ask_again(job);
                }
                _ => self.ask_again(job),
            },
            request::End::Acknowledged => {
                if let Some(named) = &mut job.named {
                    named.again = true;
                }
                self.ask_again(job);
            }
        }
    }

    fn not_for_this_peer(&self, job: Job) {
        self.peer.let_go(&job);
        let error = || match self.peer.name {
            PeerName::Endpoint(_) | PeerName::Gateway(_) => SendError::from(ConnectError::Untrusted),
            PeerName::Node(_) => RouteError::Node(ConnectError::Untrusted).into(),
        };
        match job.who {
            Who::Accepted => self.undelivered(1, UndeliveredReason::Untrusted),
            Who::Sender(call) => self.fail(|| call.answer(Err(error()))),
            Who::Requester(call) => self.fail(|| call.answer(Err(error().into()))),
        }
    }

    fn sent(&self, job: Job) {
        self.peer.counters.sent.add(1);
        job.answer_sent();
    }

    /// A call that waited is accepted.
    fn admit(&self, job: &Job, size: usize) {
        if !job.is_accepted() {
            self.peer.waiting.fetch_sub(size, Ordering::Relaxed);
            self.hold(size);
        }
    }

    fn fail(&self, answer: impl FnOnce()) {
        self.peer.counters.failed.add(1);
        answer();
    }

    fn undelivered(&self, count: u64, reason: UndeliveredReason) {
        self.peer.undelivered(count, reason);
    }

    fn hold(&self, size: usize) {
        self.peer.held.fetch_add(size, Ordering::Relaxed);
    }

    fn let_go(&self, size: usize) {
        self.peer.held.fetch_sub(size, Ordering::Relaxed);
    }

    /// Whether the task has nothing more to do, for good.
    fn is_done(&mut self, now: Instant) -> bool {
        if self.node().is_stopping() {
            let until = *self.drain_until.get_or_insert(now + DRAIN_TIMEOUT);
            return self.is_quiet(&lock(&self.peer.state)) || now >= until;
        }
        let idle = self.node().config.idle_timeout;
        let mut state = lock(&self.peer.state);
        // Evicted, it keeps the deadlines of what it has.
        if !state.retired && self.is_quiet(&state) && now >= self.node().instant(self.peer.last_used()) + idle {
            drop(state);
            // Retires the peer unless somebody has used it meanwhile.
            self.node().forget(&self.peer);
            state = lock(&self.peer.state);
        }
        state.ended = state.retired && self.is_quiet(&state);
        state.ended
    }

    fn is_quiet(&self, state: &State) -> bool {
        let queued = state.queue.is_empty() && state.parked.is_empty() && state.partials.is_empty();
        let read = self.read_by.is_none_or(|at| at <= Instant::now());
        queued
            && read
            && self.oldest.is_none()
            && self.writers.is_empty()
            && self.requests.is_empty()
            && self.swept_clean()
    }

    /// `oldest` is as of the last sweep; callers may have written since.
    fn swept_clean(&self) -> bool {
        self.peer.held.load(Ordering::Relaxed) == 0
    }

    fn end(mut self) {
        self.writers.abort_all();
        self.requests.abort_all();
        let left = self.link.take().map_or(0, |link| {
            let (swept, left) = link.die();
            self.account(swept);
            link.close();
            left.len()
        });
        let mut state = lock(&self.peer.state);
        (state.retired, state.ended) = (true, true);
        state.hide_link();
        let queue = std::mem::take(&mut state.queue);
        let partials = std::mem::take(&mut state.partials);
        let Taken { owed, lost } = state.session.take();
        drop(state);
        let queued = queue.iter().filter(|job| job.is_accepted()).count();
        let accepted = queued + partials.len() + self.accepted_writes + owed.len() + lost.len();
        self.undelivered((left + accepted) as u64, UndeliveredReason::Stopped);
    }

    fn node(&self) -> &Arc<Node> {
        &self.peer.node
    }
}

fn drop_link(progress: race::Progress) {
    if let race::Progress::Link(link) = progress {
        link.close();
    }
}

async fn raced(race: &mut Option<Race>) -> race::Progress {
    match race {
        Some(race) => race.next().await,
        None => std::future::pending().await,
    }
}

async fn session_progress(peer: &Peer, linked: bool) -> Progress {
    match linked {
        true => poll_fn(|cx| lock(&peer.state).session.poll(cx, Instant::now())).await,
        false => std::future::pending().await,
    }
}

/// Reads the answers to messages that were sent without waiting, as long as the link lives.
async fn read_answers(peer: Arc<Peer>, link: Arc<Link>) {
    link.connection.set_max_concurrent_uni_streams(MAX_ANSWERING.into());
    let large = Arc::new(Semaphore::new(LARGE_ANSWERS));
    let mut streams = JoinSet::new();
    loop {
        let receive = tokio::select! {
            Some(_) = streams.join_next() => continue,
            stream = link.connection.accept_uni() => match stream {
                Ok(receive) => receive,
                Err(_) => return,
            },
        };
        streams.spawn(read_answer(peer.clone(), link.clone(), receive, large.clone()));
    }
}

/// Reads until the stream ends, carries something that is not a frame, or makes no more progress.
async fn read_answer(peer: Arc<Peer>, link: Arc<Link>, mut receive: RecvStream, large: Arc<Semaphore>) {
    let mut frames = link.reassembler();
    let mut permit = None;
    let mut growth = Growth::default();
    let without_growth = peer.node.config.frame_timeout;
    while let Some(Ok(Some(chunk))) = transfer::read(&mut receive, usize::MAX, &mut growth, without_growth).await {
        peer.node.room(Sender::new(link.key(), link.remote())).await;
        frames.push(chunk.bytes);
        loop {
            match frames.next_frame() {
                Ok(Some(frame)) => {
                    growth = Growth::default();
                    peer.counters.received.add(1);
                    if is_heavy(frame.payload()) {
                        hand_over_heavy(peer.clone(), link.clone(), frame).await;
                        continue;
                    }
                    // It is counted.
                    let _ = hand_over(&peer, &link, frame);
                }
                Ok(None) => break,
                Err(_) => {
                    peer.node.counters.malformed.add(1);
                    return;
                }
            }
        }
        if frames.buffered() <= LARGE_ANSWER {
            permit = None;
        } else if permit.is_none() {
            permit = large.acquire().await.ok();
        }
    }
}

fn hand_over(peer: &Peer, link: &Link, frame: RawFrame) -> Result<(), Rejection> {
    let (from, dialect, path, key) = (link.remote(), link.dialect, link.path, link.key());
    let inbound = |kind, payload| Inbound { kind, payload, from, path, key, dialect, reply: None };
    match &peer.name {
        // Nobody asked for it.
        PeerName::Gateway(_) => {
            tracing::debug!("the gateway says something by itself");
            Ok(())
        }
        // Its answer to this very node: it is not told what it said.
        name if peer.node.is_gateway(name, link) => peer.node.deliver_here(frame, inbound),
        _ => peer.node.deliver(frame, inbound),
    }
}

async fn hand_over_heavy(peer: Arc<Peer>, link: Arc<Link>, frame: RawFrame) {
    let decoding = peer.node.decoding.clone();
    let sender = Sender::new(link.key(), link.remote());
    // It is counted.
    let _ = decoding.run(sender, move || hand_over(&peer, &link, frame)).await;
}

/// A request found that the link has been silent for this long.
async fn doubted(link: Option<&Link>) -> Duration {
    let Some(link) = link else { return std::future::pending().await };
    link.doubted.notified().await;
    link.patience()
}

async fn closed(link: Option<&Link>) -> ConnectionError {
    match link {
        Some(link) => link.connection.closed().await,
        None => std::future::pending().await,
    }
}

async fn credit(link: Option<&Link>, wanted: bool) -> Option<(SendStream, RecvStream)> {
    match link {
        Some(link) if wanted => link.connection.open_bi().await.ok(),
        _ => std::future::pending().await,
    }
}

async fn answers(link: Option<&Link>) -> Vec<Answered> {
    let Some(link) = link else { return std::future::pending().await };
    poll_fn(|cx| match link.poll_answers(cx) {
        frames if frames.is_empty() => Poll::Pending,
        frames => Poll::Ready(frames),
    })
    .await
}

async fn unreachable(refusals: &mut broadcast::Receiver<Refused>, remote: Option<SocketAddr>) -> Why {
    match remote {
        Some(remote) => refused(refusals, remote).await,
        None => std::future::pending().await,
    }
}

/// Writes the rest of a frame that a stream took only a part of.
async fn write_rest(link: Arc<Link>, job: Job, partial: Partial) -> WriteOutcome {
    let Partial { message, mut send, receive, rest } = partial;
    let result = tokio::select! {
        written = send.write_chunk(rest) => match written {
            Ok(()) => Ok(()),
            Err(quinn::WriteError::Stopped(_)) => Err(WriteFailure::Rejected),
            Err(_) => Err(WriteFailure::Lost),
        },
        () = link.dead() => Err(WriteFailure::Lost),
        () = deadline(job.deadline) => Err(WriteFailure::Expired),
        () = cancelled(&job.who) => Err(WriteFailure::Cancelled),
    };
    if result.is_err() {
        // A dropped stream would be finished, and the part taken for the whole.
        let _ = send.reset(0u8.into());
    }
    WriteOutcome { link, job, message, result: result.map(|()| (send, receive)) }
}

async fn cancelled(who: &Who) {
    match who {
        Who::Sender(call) => call.cancelled().await,
        Who::Accepted | Who::Requester(_) => std::future::pending().await,
    }
}

fn is_untrusted(failure: Option<&SendError>) -> bool {
    use ConnectError::Untrusted;
    matches!(failure, Some(SendError::Connect(Untrusted) | SendError::Route(RouteError::Node(Untrusted))))
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::net::UdpSocket;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::thread::sleep;

    use macula_peer_core::types::EndpointRef;
    use macula_peer_wire::value::{Value, encode};
    use macula_peer_wire::{Limits, MessageType};

    use super::*;
    use crate::relay::testing::PATIENCE;
    use crate::{Config, Engine, Listen, Message, NodeId};

    #[track_caller]
    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            sleep(Duration::from_millis(2));
        }
    }

    /// Forwards one client's packets to a server until it is cut.
    fn forwarder(server: SocketAddr, cut: Arc<AtomicBool>) -> SocketAddr {
        let [front, back] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        back.connect(server).unwrap();
        for socket in [&front, &back] {
            socket.set_nonblocking(true).unwrap();
        }
        let address = front.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut buffer, mut client) = ([0; 2048], None);
            while !cut.load(Ordering::Relaxed) {
                while let Ok((n, from)) = front.recv_from(&mut buffer) {
                    // Not what asks for the NAT.
                    if buffer[0] >= 0x40 {
                        client = Some(from);
                        let _ = back.send(&buffer[..n]);
                    }
                }
                while let (Some(client), Ok(n)) = (client, back.recv(&mut buffer)) {
                    let _ = front.send_to(&buffer[..n], client);
                }
                sleep(Duration::from_micros(200));
            }
            // Bound until the test is over, so that nobody else gets its packets.
            sleep(PATIENCE);
        });
        address
    }

    /// One packet that this host could not send is reason for a dial, and that fails for the same reason.
    #[test]
    fn a_link_to_a_node_without_a_relay_outlives_a_short_loss_of_the_route() {
        let [server, client] = [(); 2].map(|()| Engine::start(Config::default()).unwrap());
        let port = server.listen(Listen::default()).unwrap().port();
        let cut = Arc::new(AtomicBool::new(false));
        let address = forwarder(([127, 0, 0, 1], port).into(), cut.clone());
        let node = NodeId::new(b"near").unwrap();
        let target = Target::Node(&node);
        let endpoints = vec![EndpointRef::parse(&address.to_string()).unwrap().to_owned()];
        client.learn(&node, Ways { endpoints, ..Ways::default() });
        client.resolved(&node, true);
        let frame: bytes::Bytes = encode(MessageType::Publish, &Value::Map(vec![]), Limits::default()).unwrap().into();
        let message =
            Message { frame, kind: MessageType::Publish, deadline: Some(Instant::now() + PATIENCE), key: None };
        let (answer, answered) = mpsc::channel();
        client.send(&target, message.clone(), move |sent| answer.send(sent).unwrap());
        answered.recv_timeout(PATIENCE).unwrap().unwrap();
        let peer = client.node().peer(&target).unwrap();
        // Not in doubt, which it may be for a moment on a slow machine: from then on this link is kept.
        until("it is acknowledged", || peer.stats().unacknowledged_bytes == 0 && lock(&peer.state).link.is_some());
        let connection = lock(&peer.state).link.clone().unwrap().connection.clone();
        cut.store(true, Ordering::Relaxed);
        client.send_now(&target, message, Instant::now()).map_err(drop).unwrap();
        let no_route = Some(ConnectError::NoRoute);
        until("a dial has failed", || {
            let destination = connection.remote_address();
            let _ = client.node().refusals.send(Refused { destination, why: Why::NoRoute });
            peer.path().failures.direct == no_route
        });
        sleep(Duration::from_millis(50));
        assert_eq!(connection.close_reason(), None);
        for engine in [client, server] {
            engine.stop();
        }
    }
}
