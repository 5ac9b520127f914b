//! A peer: its queue, its link, and the task that moves messages from the queue to the link.
//!
//! Callers hand messages over under a short lock: straight to the link when it is not busy and the queue is empty, else to
//! the queue. The task carries out what [`LinkState`](macula_peer_core::link_state::LinkState) decides, empties the queue and
//! sends again what a dead link left unacknowledged.

mod answers;
mod attempts;
mod space;
mod task;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;

use macula_peer_core::config::Delivery;
use macula_peer_core::counter::Counter;
use macula_peer_core::errors::{Failures, RequestError, SendError, UndeliveredReason};
use macula_peer_core::events::Event;
use macula_peer_core::knowledge::Knowledge;
use macula_peer_core::queue::{Queue, Queued};
use macula_peer_core::request_sender::RequestSender;
use macula_peer_core::stats::{PathStatus, PeerStats};
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Candidates, Dialect, Fingerprint, Path, PeerName, Target};
use macula_peer_wire::RawFrame;
use quinn::Connection;
use space::{Counts, Space};
use tokio::sync::Notify;

use crate::call::{Call, Cancel};
use crate::conn::LinkOwner;
use crate::link::{DIRECT_WRITES, Link, Partial, Written};
use crate::message::Envelope;
use crate::session::send::Session;
use crate::surroundings::Surroundings;

pub(crate) use task::run;

/// Calls that may wait for one peer at once, for a link or for an answer.
const MAX_WAITING: usize = 16_384;

/// What is kept of a message until it is acknowledged, beside its frame. Small messages would cost many times what they
/// count.
const KEPT_BESIDE: usize = 128;

pub(crate) struct Peer {
    pub(crate) name: PeerName,
    node: Arc<Surroundings>,
    host: Weak<dyn Host>,
    state: Mutex<State>,
    wake: Notify,
    /// Milliseconds of the node's clock at the last use.
    used: AtomicU64,
    counts: Arc<Counts>,
    counters: PeerCounters,
}

struct State {
    /// The link that callers write to: live and not suspect.
    link: Option<Arc<Link>>,
    queue: Queue<Job>,
    /// Messages in flight over a link of `macula-peer/1`, or that go on over the next.
    session: Session,
    known: Knowledge,
    /// A lookup has found new candidates.
    candidates_found: bool,
    /// The peer has begun connections that the task has not looked at.
    arrived: bool,
    /// Why other paths failed.
    failures: Failures,
    /// Messages of which a stream took only a part.
    partials: Vec<(Arc<Link>, Job, Partial)>,
    /// A caller has given up a call.
    cancelled: bool,
    /// A caller gives the link up.
    invalidated: bool,
    /// No longer in the pool: takes nothing new.
    retired: bool,
    /// The task has ended.
    ended: bool,
}

struct Job {
    message: Option<Envelope>,
    deadline: Option<Instant>,
    since: Instant,
    waiter: Waiter,
    /// What a request is asked as.
    request: RequestSender,
    /// What it takes up.
    space: Option<Space>,
}

/// The call that waits for the outcome of a message.
enum Waiter {
    /// Its sender has its `ok`.
    Accepted,
    Sender(Arc<Call<Result<(), SendError>>>),
    Requester(Arc<Call<Result<RawFrame, RequestError>>>),
}

/// A call that waits; dropping this does nothing, [`WaitingCall::cancel`] gives it up.
pub struct WaitingCall {
    /// Weak: the call may hold this very value.
    call: Weak<dyn Cancel>,
    peer: Option<Arc<Peer>>,
}

impl WaitingCall {
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

#[derive(Debug, Default)]
struct PeerCounters {
    pub(crate) sent: Counter,
    pub(crate) acknowledged: Counter,
    pub(crate) received: Counter,
    pub(crate) failed: Counter,
    pub(crate) dials: Counter,
}

/// The owner of a peer.
pub(crate) trait Host: Send + Sync {
    /// The peer of another name. `None`: the engine is stopping, or there are no others.
    fn peer(self: Arc<Self>, target: &Target<'_>) -> Option<Arc<Peer>>;

    /// Retires an idle peer, unless it was used meanwhile.
    fn forget(&self, peer: &Arc<Peer>);

    /// The task of a peer has ended.
    fn gone(&self, peer: &Arc<Peer>);

    /// A link to a peer is up.
    fn linked(&self) {}
}

impl LinkOwner for Peer {
    fn heard(&self) {
        Self::heard(self);
    }
}

/// The peer has left the pool: look it up again.
pub(crate) struct Retired;

/// What became of a message that a live link was given.
enum Given {
    /// `wake`: the task has something to go on with.
    Taken { wake: bool },
    /// The peer allows no further stream at present.
    NoCredit(Envelope),
    /// A stream took only a part.
    Partial(Arc<Link>, Box<Partial>),
    /// The link is dead, and the peer may have the message, which may not be sent twice.
    Dropped,
    /// The link is dead.
    Lost(Envelope),
}

impl Peer {
    pub(crate) fn new(name: PeerName, node: Arc<Surroundings>, host: Weak<dyn Host>) -> Arc<Self> {
        let known = match &name {
            PeerName::Endpoint(endpoint) | PeerName::Gateway(endpoint) => Knowledge::of(endpoint.clone()),
            PeerName::Node(_) => Knowledge::default(),
        };
        let state = State {
            link: None,
            queue: Queue::default(),
            session: Session::new(name.node().cloned(), node.config.delivery == Delivery::AtMostOnce),
            known,
            candidates_found: false,
            arrived: false,
            failures: Failures::default(),
            partials: Vec::new(),
            cancelled: false,
            invalidated: false,
            retired: false,
            ended: false,
        };
        let peer = Arc::new(Self {
            name,
            node,
            host,
            state: Mutex::new(state),
            wake: Notify::new(),
            used: AtomicU64::new(0),
            counts: Arc::default(),
            counters: PeerCounters::default(),
        });
        peer.touch(Instant::now());
        peer
    }

    /// Sends over the live link, or gives the message back if the caller has to wait.
    pub(crate) fn send_now(&self, message: Envelope, now: Instant) -> Result<(), Envelope> {
        self.touch(now);
        let mut state = lock(&self.state);
        let Some(link) = &state.link else { return Err(message) };
        if !self.has_room(&state, message.frame.len()) || !message.is_for(link.shown) {
            return Err(message);
        }
        if !state.queue.is_empty() || self.is_busy(link) {
            return self.accept(&mut state, message);
        }
        match self.give(state, message, now) {
            Given::Taken { wake } => {
                if wake {
                    self.wake.notify_one();
                }
                Ok(())
            }
            Given::NoCredit(message) => {
                let mut state = lock(&self.state);
                if state.link.is_none() {
                    return Err(message);
                }
                self.accept(&mut state, message)
            }
            Given::Partial(link, partial) => {
                let mut job = Job::accepted(None, partial.message.deadline);
                job.space = Some(Space::held(&self.counts, partial.message.frame.len()));
                lock(&self.state).partials.push((link, job, *partial));
                self.wake.notify_one();
                Ok(())
            }
            Given::Dropped => {
                self.undelivered(1, UndeliveredReason::LinkLost);
                Ok(())
            }
            Given::Lost(message) => Err(message),
        }
    }

    /// Whether callers leave the writing to the task: it writes many small messages at once.
    fn is_busy(&self, link: &Link) -> bool {
        link.dialect == Dialect::Macula && self.counts.held() >= DIRECT_WRITES
    }

    /// Gives a message to the live link. What the link takes is held until it is acknowledged.
    fn give(&self, mut state: MutexGuard<'_, State>, message: Envelope, now: Instant) -> Given {
        let Some(link) = &state.link else { return Given::Lost(message) };
        let size = message.frame.len();
        let was_idle = self.counts.hold(size);
        if link.dialect == Dialect::MaculaPeer1 {
            // Under the lock that the queue was looked at under: no message overtakes it.
            let wake = self.number(&mut state, message, now) || was_idle;
            return Given::Taken { wake };
        }
        let link = link.clone();
        drop(state);
        let given = match link.write(message, now) {
            Written::Done { wake } => {
                self.counters.sent.add(1);
                return Given::Taken { wake };
            }
            Written::NoCredit(message) => Given::NoCredit(message),
            Written::Partial(partial) => Given::Partial(link, partial),
            Written::Unproven(_) if self.node.config.delivery == Delivery::AtMostOnce => Given::Dropped,
            Written::Lost(message) | Written::Unproven(message) => Given::Lost(message),
        };
        self.counts.let_go(size);
        given
    }

    /// Queues a message whose sender waits.
    pub(crate) fn send(
        self: &Arc<Self>,
        message: Envelope,
        call: &Arc<Call<Result<(), SendError>>>,
    ) -> Result<WaitingCall, Retired> {
        let deadline = message.deadline;
        self.enqueue(message, deadline, Waiter::Sender(call.clone()), call.clone(), || {
            call.answer(Err(SendError::Overloaded));
        })
    }

    /// Queues a request.
    pub(crate) fn request(
        self: &Arc<Self>,
        message: Envelope,
        call: &Arc<Call<Result<RawFrame, RequestError>>>,
    ) -> Result<WaitingCall, Retired> {
        let deadline = message.deadline;
        self.enqueue(message, deadline, Waiter::Requester(call.clone()), call.clone(), || {
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

    /// Leaves the pool. The task sends messages in flight and ends.
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
            unacknowledged_bytes: self.counts.held() + self.counts.waiting(),
        }
    }

    fn enqueue(
        self: &Arc<Self>,
        message: Envelope,
        deadline: Option<Instant>,
        waiter: Waiter,
        call: Arc<dyn Cancel>,
        overloaded: impl FnOnce(),
    ) -> Result<WaitingCall, Retired> {
        self.touch(Instant::now());
        let mut state = lock(&self.state);
        if state.retired {
            return Err(Retired);
        }
        if !self.may_wait(&state, message.frame.len()) {
            drop(state);
            self.counters.failed.add(1);
            overloaded();
            return Ok(WaitingCall { call: Arc::downgrade(&call), peer: None });
        }
        self.push(
            &mut state,
            Job {
                message: Some(message),
                deadline,
                since: Instant::now(),
                waiter,
                request: self.new_request(),
                space: None,
            },
        );
        Ok(WaitingCall { call: Arc::downgrade(&call), peer: Some(self.clone()) })
    }

    /// A caller's candidates for this peer; the caller may accept only the holder of a key. Returns whether to look up
    /// the rest: then [`Peer::resolved`] follows, whatever the outcome.
    pub(crate) fn learn(&self, candidates: Candidates, key: Option<Fingerprint>) -> bool {
        let now = Instant::now();
        let mut state = lock(&self.state);
        state.known.learn(candidates);
        if state.known.knows_better() && state.link.as_ref().is_some_and(|link| link.path.is_relayed()) {
            self.wake.notify_one();
        }
        let fits = state.link.as_ref().is_some_and(|link| key.is_none() || key == link.shown);
        !fits && state.known.begin_lookup(now)
    }

    /// What was found by looking up, so far.
    pub(crate) fn found(&self, candidates: Candidates) {
        let mut state = lock(&self.state);
        state.candidates_found |= state.known.found(candidates);
        self.wake.notify_one();
    }

    /// No more will be found. `answered`: what was found is all that there is for now, and need not be looked up again.
    pub(crate) fn resolved(&self, answered: bool) {
        lock(&self.state).known.resolved(answered, Instant::now());
        self.wake.notify_one();
    }

    /// Whether the holder of this key is this peer, as far as is known.
    pub(crate) fn is_expected_to_have(&self, key: Fingerprint) -> bool {
        let sought = lock(&self.state).queue.sought().contains(&Some(key));
        sought || self.expected_key() == Some(key)
    }

    fn expected_key(&self) -> Option<Fingerprint> {
        let PeerName::Node(node) = &self.name else { return None };
        let shown = lock(&self.state).link.as_ref().and_then(|link| link.shown);
        shown.or_else(|| self.named_key()).or_else(|| self.node.keys.known_key(node))
    }

    /// The key that callers or a lookup name.
    fn named_key(&self) -> Option<Fingerprint> {
        lock(&self.state).known.key()
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
        let keys = state.waiting_keys();
        if keys.is_empty() { state.queue.sought().to_vec() } else { keys }
    }

    /// Takes over a message for another peer, or gives it back.
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

    fn new_request(&self) -> RequestSender {
        RequestSender::new(self.node.config.delivery == Delivery::AtMostOnce)
    }

    /// Gives a message to the session, whose link is live. Returns whether the task is to go on with it.
    fn number(&self, state: &mut State, message: Envelope, now: Instant) -> bool {
        state.queue.expect(message.deadline);
        let sent = state.session.send(message, now);
        self.counters.sent.add(sent.written.into());
        sent.wake
    }

    /// Takes a message for a live link that is busy or has no stream to spare just now.
    fn accept(&self, state: &mut State, message: Envelope) -> Result<(), Envelope> {
        if !state.queue.may_accept() || state.retired {
            return Err(message);
        }
        let deadline = message.deadline;
        self.push(state, Job::accepted(Some(message), deadline));
        Ok(())
    }

    /// Queues a job. The task need not be woken where it already waits for what lets it go on with the queue.
    fn push(&self, state: &mut State, mut job: Job) {
        job.space = Some(self.space(&job));
        if state.queue.push(job) {
            self.wake.notify_one();
        }
    }

    /// Twice the bound: as much may wait for room as there is room for.
    fn may_wait(&self, state: &State, size: usize) -> bool {
        let waiting = self.counts.waiting();
        let fits = waiting == 0 || waiting + size <= self.node.config.max_unacknowledged;
        fits && state.queue.len() + self.counts.asked() < MAX_WAITING
    }

    /// A frame always fits when nothing else is held, so that no configuration makes a peer mute.
    fn has_room(&self, state: &State, size: usize) -> bool {
        let held = self.counts.held() + state.session.len() * KEPT_BESIDE;
        held == 0 || held + size <= self.node.config.max_unacknowledged
    }

    fn space(&self, job: &Job) -> Space {
        let space = if job.is_accepted() { Space::held } else { Space::waiting };
        space(&self.counts, job.size())
    }

    fn undelivered(&self, count: u64, reason: UndeliveredReason) {
        if count > 0 {
            self.counters.failed.add(count);
            self.node.inbox.undelivered(Event::Undelivered { peer: self.name.clone(), count, reason }, count);
        }
    }

    fn touch(&self, now: Instant) {
        self.used.store(self.node.lifecycle.clock(now), Ordering::Relaxed);
    }
}

impl State {
    /// From now on callers wait for the next link.
    fn hide_link(&mut self) {
        self.link = None;
        self.queue.unpark();
    }

    /// For each message that no live link takes, the only key that may get it, if it names one. Without repetitions.
    fn waiting_keys(&self) -> Vec<Option<Fingerprint>> {
        self.queue.waiting_keys(self.link.is_some(), self.session.messages().map(|message| message.key))
    }

    /// The same, and the present race is for them.
    fn seek(&mut self) {
        self.queue.seek(self.link.is_some(), self.session.messages().map(|message| message.key));
    }
}

impl Queued for Job {
    fn is_accepted(&self) -> bool {
        matches!(self.waiter, Waiter::Accepted)
    }

    fn is_wanted(&self) -> bool {
        match &self.waiter {
            Waiter::Accepted => true,
            Waiter::Sender(call) => call.is_open(),
            Waiter::Requester(call) => call.is_open(),
        }
    }

    fn queued_at(&self) -> Instant {
        self.since
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    fn key(&self) -> Option<Fingerprint> {
        self.message.as_ref().and_then(|message| message.key)
    }
}

impl Job {
    fn accepted(message: Option<Envelope>, deadline: Option<Instant>) -> Self {
        Self {
            message,
            deadline,
            since: Instant::now(),
            waiter: Waiter::Accepted,
            request: RequestSender::new(false),
            space: None,
        }
    }

    fn size(&self) -> usize {
        self.message.as_ref().map_or(0, |message| message.frame.len())
    }

    fn answer_sent(self) {
        drop(self.space);
        if let Waiter::Sender(call) = self.waiter {
            call.answer(Ok(()));
        }
    }

    /// Answers the waiting caller, if there is one.
    fn fail(self, error: SendError) {
        drop(self.space);
        match self.waiter {
            Waiter::Accepted => {}
            Waiter::Sender(call) => call.answer(Err(error)),
            Waiter::Requester(call) if self.request.is_asked_again() => {
                call.answer(Err(RequestError::LinkLost));
            }
            Waiter::Requester(call) => call.answer(Err(error.into())),
        }
    }

    /// Whether the deadline had passed when the call was made.
    fn had_no_time(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= self.since)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::net::{SocketAddr, UdpSocket};
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::thread::sleep;
    use std::time::Duration;

    use macula_peer_core::errors::ConnectError;
    use macula_peer_core::types::{EndpointRef, Target};
    use macula_peer_wire::value::{Value, encode};
    use macula_peer_wire::{Limits, MessageType};

    use super::*;
    use crate::pool::Pool;
    use crate::relay::testing::PATIENCE;
    use crate::socket::{RefusalReason, SendRefusal};
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
            // Bound until the test is over, so that no other socket gets its packets.
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
        client.learn(&node, Candidates { endpoints, ..Candidates::default() });
        client.resolved(&node, true);
        let frame: bytes::Bytes = encode(MessageType::Publish, &Value::Map(vec![]), Limits::default()).unwrap().into();
        let message =
            Message { frame, kind: MessageType::Publish, deadline: Some(Instant::now() + PATIENCE), key: None };
        let (answer, answered) = mpsc::channel();
        client.send(&target, message.clone(), move |sent| answer.send(sent).unwrap());
        answered.recv_timeout(PATIENCE).unwrap().unwrap();
        let peer = Pool::peer(&client.node().pool, &target).unwrap();
        // Not suspect, which it may be for a moment on a slow machine: from then on this link is kept.
        until("it is acknowledged", || peer.stats().unacknowledged_bytes == 0 && lock(&peer.state).link.is_some());
        let connection = lock(&peer.state).link.clone().unwrap().connection.clone();
        cut.store(true, Ordering::Relaxed);
        client.send_now(&target, message, Instant::now()).map_err(drop).unwrap();
        let no_route = Some(ConnectError::NoRoute);
        until("a dial has failed", || {
            let destination = connection.remote_address();
            let _ = client.node().net.refusals.send(SendRefusal { destination, why: RefusalReason::NoRoute });
            peer.path().failures.direct == no_route
        });
        sleep(Duration::from_millis(50));
        assert_eq!(connection.close_reason(), None);
        for engine in [client, server] {
            engine.stop();
        }
    }
}
