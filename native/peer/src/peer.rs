//! A peer: its queue, its link, and the task that keeps the one moving over the other.
//!
//! Callers hand messages over under a short lock: straight to the link when nothing is queued before them, else to the
//! queue. The task dials, empties the queue, notices silence and sends again what a dead link left unacknowledged.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use macula_peer_wire::RawFrame;
use quinn::{ConnectionError, RecvStream, SendStream};
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use crate::call::{Call, Cancel};
use crate::config::Delivery;
use crate::decide::retry::Backoff;
use crate::dial::refused;
use crate::endpoint::Endpoint;
use crate::error::{ConnectError, RequestError, SendError, UndeliveredReason};
use crate::link::{Link, Partial, Swept, Written, lock};
use crate::message::{Event, Inbound, Message};
use crate::node::Node;
use crate::request;
use crate::socket::canonical;
use crate::stats::{LinkStats, PeerCounters, PeerStats};

/// Messages that are accepted for a live link while it has no stream to spare: some milliseconds of a fast sender.
const MAX_ACCEPTED: usize = 1024;

/// Calls that may wait for one peer at once.
const MAX_WAITING: usize = 16_384;

/// How often acknowledgements are looked for while some are missing. Memory held meanwhile: what is sent in this time.
const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// A peer that has acknowledged nothing and sent nothing for this long, while something is unacknowledged, may have been
/// restarted: a new link is tried beside the old one. Four probe timeouts (RFC 9002) on a path of 100 ms; a false alarm
/// costs a handshake.
pub(crate) const DOUBT_AFTER: Duration = Duration::from_millis(500);

/// Pauses between dials for messages that are owed, when nobody waits.
const REDIAL_FIRST_PAUSE: Duration = Duration::from_millis(100);
const REDIAL_LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A peer that hangs up sooner than this, perhaps because of what it is sent, is not dialled again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// How long a message without a deadline is owed after its link died.
const OWED_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

/// How long a stopping engine waits for what is on its way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) struct Peer {
    pub(crate) endpoint: Endpoint,
    node: Arc<Node>,
    state: Mutex<State>,
    wake: Notify,
    /// Milliseconds of the node's clock at the last use.
    used: AtomicU64,
    /// Bytes queued or unacknowledged.
    held: AtomicUsize,
    counters: PeerCounters,
}

#[derive(Default)]
struct State {
    /// The link that callers write to: live and not in doubt.
    link: Option<Arc<Link>>,
    queue: VecDeque<Job>,
    partials: Vec<(Arc<Link>, Job, Partial)>,
    /// When the queue is to be looked through for deadlines.
    expiry: Option<Instant>,
    cancelled: bool,
    /// No longer in the pool: takes nothing new.
    retired: bool,
}

struct Job {
    message: Option<Message>,
    deadline: Option<Instant>,
    since: Instant,
    who: Who,
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
    pub(crate) fn new(endpoint: Endpoint, node: Arc<Node>) -> Arc<Self> {
        let peer = Arc::new(Self {
            endpoint,
            node,
            state: Mutex::default(),
            wake: Notify::new(),
            used: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            counters: PeerCounters::default(),
        });
        peer.touch(Instant::now());
        peer
    }

    /// Sends over the live link, or gives the message back if the caller has to wait.
    pub(crate) fn send_now(&self, message: Message, now: Instant) -> Result<(), Message> {
        self.touch(now);
        let size = message.frame.len();
        let link = {
            let mut state = lock(&self.state);
            let Some(link) = &state.link else { return Err(message) };
            if !self.has_room(size) {
                return Err(message);
            }
            if !state.queue.is_empty() {
                return self.accept(&mut state, message);
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
                lock(&self.state).partials.push((link, job, partial));
                self.wake.notify_one();
                Ok(())
            }
            Written::Lost(message) => {
                self.held.fetch_sub(size, Ordering::Relaxed);
                Err(message)
            }
        }
    }

    /// Queues a message whose sender waits.
    pub(crate) fn send(
        self: &Arc<Self>,
        message: Message,
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
        message: Message,
        call: &Arc<Call<Result<RawFrame, RequestError>>>,
    ) -> Result<Waiting, Retired> {
        let deadline = message.deadline;
        self.enqueue(message, deadline, Who::Requester(call.clone()), call.clone(), || {
            call.answer(Err(SendError::Overloaded.into()));
        })
    }

    /// Leaves the pool. The task sends what is on its way and ends.
    pub(crate) fn retire(&self) {
        lock(&self.state).retired = true;
        self.wake.notify_one();
    }

    pub(crate) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn is_linked(&self) -> bool {
        lock(&self.state).link.is_some()
    }

    pub(crate) fn stats(&self) -> PeerStats {
        let link = lock(&self.state).link.clone().map(|link| LinkStats {
            dialect: link.dialect,
            remote: canonical(link.connection.remote_address()),
            round_trip: link.connection.rtt(),
        });
        let counters = &self.counters;
        PeerStats {
            endpoint: self.endpoint.clone(),
            link,
            sent: counters.sent.get(),
            acknowledged: counters.acknowledged.get(),
            received: counters.received.get(),
            failed: counters.failed.get(),
            dials: counters.dials.get(),
            unacknowledged_bytes: self.held.load(Ordering::Relaxed),
        }
    }

    fn enqueue(
        self: &Arc<Self>,
        message: Message,
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
        if state.queue.len() >= MAX_WAITING || !self.has_room(message.frame.len()) {
            drop(state);
            self.counters.failed.add(1);
            overloaded();
            return Ok(Waiting { call: Arc::downgrade(&call), peer: None });
        }
        self.push(&mut state, Job { message: Some(message), deadline, since: Instant::now(), who });
        Ok(Waiting { call: Arc::downgrade(&call), peer: Some(self.clone()) })
    }

    /// Takes a message for a live link that has no stream to spare just now.
    fn accept(&self, state: &mut State, message: Message) -> Result<(), Message> {
        if state.queue.len() >= MAX_ACCEPTED || state.retired {
            return Err(message);
        }
        let deadline = message.deadline;
        self.push(state, Job::accepted(Some(message), deadline));
        Ok(())
    }

    /// Queues a job. The task need not be woken where it already waits for what lets it go on with the queue.
    fn push(&self, state: &mut State, job: Job) {
        self.held.fetch_add(job.size(), Ordering::Relaxed);
        let expiry = earliest(state.expiry, job.deadline);
        if state.queue.is_empty() || state.expiry != expiry || !job.is_accepted() {
            state.expiry = expiry;
            self.wake.notify_one();
        }
        state.queue.push_back(job);
    }

    /// A frame always fits when nothing else is held, so that no configuration makes a peer mute.
    fn has_room(&self, size: usize) -> bool {
        let held = self.held.load(Ordering::Relaxed);
        held == 0 || held + size <= self.node.config.max_unacknowledged
    }

    fn touch(&self, now: Instant) {
        self.used.store(self.node.clock(now), Ordering::Relaxed);
    }
}

impl Job {
    fn accepted(message: Option<Message>, deadline: Option<Instant>) -> Self {
        Self { message, deadline, since: Instant::now(), who: Who::Accepted }
    }

    fn size(&self) -> usize {
        self.message.as_ref().map_or(0, |message| message.frame.len())
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

type Dial = Pin<Box<dyn Future<Output = Result<Link, ConnectError>> + Send>>;

/// The peer's task.
struct Task {
    peer: Arc<Peer>,
    dial: Option<(Instant, Dial)>,
    redial: Backoff,
    redial_at: Option<Instant>,
    /// Nobody is worth a dial before this time.
    hold_off: Option<Instant>,
    /// The live link; callers see it too unless it is in doubt.
    link: Option<Arc<Link>>,
    link_since: Instant,
    in_doubt: bool,
    /// Datagrams received over the link when last looked, and when they last became more.
    heard: (u64, Instant),
    /// When the oldest unacknowledged message was written.
    oldest: Option<Instant>,
    swept_at: Instant,
    out_of_credit: bool,
    answers_until: Option<Instant>,
    writers: JoinSet<WriteOutcome>,
    requests: JoinSet<RequestOutcome>,
    refusals: broadcast::Receiver<SocketAddr>,
    drain_until: Option<Instant>,
}

struct WriteOutcome {
    link: Arc<Link>,
    job: Job,
    message: Message,
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
    end: request::End,
}

/// Looks after the peer until it leaves the pool.
pub(crate) async fn run(peer: Arc<Peer>) {
    let now = Instant::now();
    let refusals = peer.node.refusals.subscribe();
    let task = Task {
        peer,
        dial: None,
        redial: Backoff::new(REDIAL_FIRST_PAUSE, REDIAL_LONGEST_PAUSE),
        redial_at: None,
        hold_off: None,
        link: None,
        link_since: now,
        in_doubt: false,
        heard: (0, now),
        oldest: None,
        swept_at: now,
        out_of_credit: false,
        answers_until: None,
        writers: JoinSet::new(),
        requests: JoinSet::new(),
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
            let remote = link.as_ref().map(|link| link.connection.remote_address());
            tokio::select! {
                () = peer.wake.notified() => {}
                (result, begun) = dialled(&mut self.dial) => self.dial_ended(result, begun),
                _ = closed(link.as_deref()) => self.link_died(),
                stream = credit(link.as_deref(), self.out_of_credit) => self.credit_came(stream),
                frames = answers(link.as_deref()) => self.answers_came(frames),
                Some(Ok(outcome)) = self.writers.join_next() => self.write_ended(outcome),
                Some(Ok(outcome)) = self.requests.join_next() => self.request_ended(outcome),
                () = unreachable(&mut self.refusals, remote) => self.doubt(),
                () = doubted(link.as_deref()) => self.doubt(),
                _ = stopping.changed() => peer.retire(),
                () = sleep_until(next.into()) => {}
            }
        }
    }

    /// Everything that time or the callers may have changed.
    fn look_after(&mut self, now: Instant) {
        self.answer_expired(now);
        self.start_partials();
        self.flush();
        if now >= self.swept_at + SWEEP_EVERY {
            self.sweep(now);
        }
        if let (Some(link), true) = (&self.link, self.answers_until.is_none_or(|until| until <= now)) {
            self.answers_until = link.expire_answers(now);
        }
        if self.wants_dial(now) {
            self.begin_dial(now);
        }
    }

    fn next_look(&self, now: Instant) -> Instant {
        let state = lock(&self.peer.state);
        let idle = self.node().instant(self.peer.last_used()) + self.node().config.idle_timeout;
        let mut next = idle.max(now + SWEEP_EVERY);
        let unproven = self.in_doubt || (self.link.is_some() && self.peer.held.load(Ordering::Relaxed) > 0);
        let sweep = unproven.then(|| self.swept_at + SWEEP_EVERY);
        // Past, it waits for somebody to want the peer.
        let redial = self.redial_at.max(self.hold_off).filter(|&at| at > now);
        let times = [state.expiry, sweep, redial, self.answers_until, self.drain_until];
        for time in times.into_iter().flatten() {
            next = next.min(time);
        }
        next
    }

    /// Calls and messages whose time is over, or whose callers are gone.
    fn answer_expired(&mut self, now: Instant) {
        let mut gone = Vec::new();
        {
            let mut state = lock(&self.peer.state);
            let due = state.expiry.is_some_and(|expiry| expiry <= now);
            if !due && !state.cancelled {
                return;
            }
            state.cancelled = false;
            state.expiry = None;
            for job in std::mem::take(&mut state.queue) {
                if job.is_over(now) || !job.is_wanted() {
                    gone.push(job);
                } else {
                    state.expiry = earliest(state.expiry, job.deadline);
                    state.queue.push_back(job);
                }
            }
        }
        let linked = self.link.is_some() && !self.in_doubt;
        let mut expired = 0;
        for job in gone {
            self.let_go(job.size());
            let error = match () {
                () if job.had_no_time() => SendError::Timeout,
                () if linked => SendError::NoRoom,
                () => SendError::Connect(ConnectError::TimedOut),
            };
            match job.who {
                Who::Accepted => expired += 1,
                Who::Sender(call) => self.fail(|| call.answer(Err(error))),
                Who::Requester(call) if linked => self.fail(|| call.answer(Err(RequestError::Timeout))),
                Who::Requester(call) => self.fail(|| call.answer(Err(error.into()))),
            }
        }
        self.undelivered(expired, UndeliveredReason::Expired);
    }

    fn start_partials(&mut self) {
        let partials = std::mem::take(&mut lock(&self.peer.state).partials);
        for (link, job, partial) in partials {
            self.hold(partial.message.frame.len());
            self.writers.spawn(write_rest(link, job, partial));
        }
    }

    /// Gives the queue to the link, as far as it takes it.
    fn flush(&mut self) {
        self.out_of_credit = false;
        let Some(link) = self.link.clone().filter(|_| !self.in_doubt) else { return };
        loop {
            let Some(mut job) = lock(&self.peer.state).queue.pop_front() else { return };
            let Some(message) = job.message.take() else { continue };
            let size = message.frame.len();
            if !job.is_wanted() {
                self.let_go(size);
                continue;
            }
            if let Who::Requester(call) = &job.who {
                let exchange = request::run(link.clone(), call.clone(), message.clone());
                job.message = Some(message);
                self.peer.counters.sent.add(1);
                self.requests.spawn(async move { RequestOutcome { end: exchange.await, job } });
                continue;
            }
            match link.write(message, Instant::now()) {
                Written::Done { .. } => self.sent(job),
                Written::Partial(partial) => {
                    self.writers.spawn(write_rest(link.clone(), job, partial));
                }
                Written::NoCredit(message) => {
                    job.message = Some(message);
                    lock(&self.peer.state).queue.push_front(job);
                    self.out_of_credit = true;
                    return;
                }
                Written::Lost(message) => {
                    job.message = Some(message);
                    lock(&self.peer.state).queue.push_front(job);
                    return;
                }
            }
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.swept_at = now;
        let Some(link) = self.link.clone() else { return };
        let swept = link.sweep(now);
        self.oldest = swept.oldest;
        self.account(swept);
        if self.oldest.is_none() && !self.in_doubt {
            return;
        }
        let datagrams = link.heard();
        if datagrams != self.heard.0 {
            self.heard = (datagrams, now);
            if self.in_doubt {
                self.trust_again();
            }
        } else if self.oldest.is_some_and(|oldest| now >= oldest.max(self.heard.1) + DOUBT_AFTER) {
            self.doubt();
        }
    }

    fn account(&self, swept: Swept) {
        self.peer.counters.acknowledged.add(swept.acknowledged);
        self.let_go(swept.acknowledged_bytes);
        for message in &swept.rejected {
            self.let_go(message.frame.len());
        }
        self.undelivered(swept.rejected.len() as u64, UndeliveredReason::Rejected);
    }

    /// The peer may be gone: callers wait until it is heard of again, on this link or a new one.
    fn doubt(&mut self) {
        let Some(link) = self.link.as_ref().filter(|_| !self.in_doubt) else { return };
        tracing::debug!(peer = %self.peer.endpoint, "silent, trying a new link");
        self.in_doubt = true;
        self.heard = (link.heard(), Instant::now());
        lock(&self.peer.state).link = None;
    }

    fn trust_again(&mut self) {
        self.in_doubt = false;
        self.dial = None;
        lock(&self.peer.state).link = self.link.clone();
    }

    fn wants_dial(&self, now: Instant) -> bool {
        let linked = self.link.is_some() && !self.in_doubt;
        if self.dial.is_some() || linked || self.hold_off.is_some_and(|until| until > now) {
            return false;
        }
        let state = lock(&self.peer.state);
        // Somebody who waits is worth a dial now; what is only owed waits for its turn.
        let waited_for = state.queue.iter().any(|job| !job.is_accepted() && !job.is_over(now));
        let owed = !state.queue.is_empty() || self.oldest.is_some() || !self.requests.is_empty();
        waited_for || (owed && self.redial_at.is_none_or(|at| at <= now))
    }

    fn begin_dial(&mut self, now: Instant) {
        self.peer.counters.dials.add(1);
        self.redial_at = None;
        let deadline = now + self.node().config.connect_timeout;
        let dial = self.node().dialer().dial(self.peer.endpoint.clone(), deadline);
        self.dial = Some((now, Box::pin(dial)));
    }

    fn dial_ended(&mut self, result: Result<Link, ConnectError>, begun: Instant) {
        self.dial = None;
        match result {
            Ok(link) => self.link_up(Arc::new(link)),
            Err(error) => self.dial_failed(error, begun),
        }
    }

    fn link_up(&mut self, link: Arc<Link>) {
        tracing::debug!(peer = %self.peer.endpoint, dialect = link.dialect.alpn(), "link up");
        self.node().counted_unverified(link.dialect);
        self.retire_link();
        // What was refused before says nothing about this link.
        self.refusals = self.node().refusals.subscribe();
        self.heard = (0, Instant::now());
        self.answers_until = None;
        self.peer.touch(Instant::now());
        self.link_since = Instant::now();
        self.link = Some(link.clone());
        lock(&self.peer.state).link = Some(link);
    }

    fn dial_failed(&mut self, error: ConnectError, begun: Instant) {
        tracing::debug!(peer = %self.peer.endpoint, %error, "dial failed");
        self.redial_at = Some(Instant::now() + self.redial.pause(fastrand::f64()));
        if self.in_doubt && matches!(error, ConnectError::Unreachable | ConnectError::TimedOut) {
            // Silent on the old link and not to be had on a new one: what is unacknowledged keeps its deadlines.
            self.retire_link();
        }
        // Silence says nothing about a call that came later: it gets a dial of its own.
        let silent = error == ConnectError::TimedOut;
        let mut failed = Vec::new();
        {
            let mut state = lock(&self.peer.state);
            for job in std::mem::take(&mut state.queue) {
                if job.is_accepted() || (silent && job.since > begun) {
                    state.queue.push_back(job);
                } else {
                    failed.push(job);
                }
            }
        }
        for job in failed {
            self.let_go(job.size());
            match job.who {
                Who::Accepted => {}
                Who::Sender(call) => self.fail(|| call.answer(Err(error.clone().into()))),
                Who::Requester(call) => self.fail(|| call.answer(Err(SendError::from(error.clone()).into()))),
            }
        }
    }

    fn link_died(&mut self) {
        tracing::debug!(peer = %self.peer.endpoint, "link died");
        let now = Instant::now();
        self.redial_at = None;
        if now.saturating_duration_since(self.link_since) < SHORT_LIFE {
            self.hold_off = Some(now + self.redial.pause(fastrand::f64()));
        } else {
            self.redial.reset();
        }
        self.retire_link();
    }

    /// Ends the link, if there is one; what it left unacknowledged goes to the front of the queue.
    fn retire_link(&mut self) {
        self.in_doubt = false;
        self.oldest = None;
        self.out_of_credit = false;
        lock(&self.peer.state).link = None;
        let Some(link) = self.link.take() else { return };
        let (swept, unacknowledged) = link.die();
        self.account(swept);
        link.connection.close(0u8.into(), b"");
        self.owe(unacknowledged);
    }

    fn owe(&mut self, messages: Vec<Message>) {
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
        self.undelivered(expired, UndeliveredReason::Expired);
        self.undelivered(lost, UndeliveredReason::LinkLost);
    }

    fn credit_came(&mut self, stream: Option<(SendStream, RecvStream)>) {
        self.out_of_credit = false;
        if let (Some(link), Some(stream)) = (&self.link, stream) {
            link.put_spare(stream);
        }
    }

    fn answers_came(&mut self, frames: Vec<RawFrame>) {
        let Some(link) = &self.link else { return };
        for frame in frames {
            self.peer.counters.received.add(1);
            let from = canonical(link.connection.remote_address());
            self.peer.node.deliver(frame, |kind, payload| Inbound {
                kind,
                payload,
                from,
                dialect: link.dialect,
                key: link.key,
                reply: None,
            });
        }
    }

    fn write_ended(&mut self, outcome: WriteOutcome) {
        let WriteOutcome { link, mut job, message, result } = outcome;
        let size = message.frame.len();
        match result {
            Ok((send, receive)) => match link.written(message, send, receive) {
                Written::Lost(message) => self.write_lost(job, message),
                _ => self.sent(job),
            },
            Err(WriteFailure::Lost) => self.write_lost(job, message),
            Err(WriteFailure::Cancelled) => self.let_go(size),
            Err(failure) => {
                self.let_go(size);
                let (reason, error) = match failure {
                    WriteFailure::Expired => (UndeliveredReason::Expired, SendError::NoRoom),
                    _ => (UndeliveredReason::Rejected, SendError::LinkLost),
                };
                job.message = None;
                match job.who {
                    Who::Sender(call) => self.fail(|| call.answer(Err(error))),
                    _ => self.undelivered(1, reason),
                }
            }
        }
    }

    /// A part of it may have arrived, but no receiver makes anything of a part: sending it again is no second delivery.
    fn write_lost(&mut self, mut job: Job, message: Message) {
        job.message = Some(message);
        if job.is_accepted() && job.deadline.is_none() {
            job.deadline = Some(Instant::now() + OWED_WITHOUT_DEADLINE);
        }
        self.requeue(job);
    }

    fn requeue(&self, job: Job) {
        let mut state = lock(&self.peer.state);
        state.expiry = earliest(state.expiry, job.deadline);
        state.queue.push_front(job);
    }

    fn request_ended(&mut self, RequestOutcome { job, end }: RequestOutcome) {
        match end {
            request::End::Answered => {
                self.peer.counters.acknowledged.add(1);
                self.peer.counters.received.add(1);
                self.let_go(job.size());
            }
            request::End::Failed => {
                self.peer.counters.failed.add(1);
                self.let_go(job.size());
            }
            request::End::Cancelled => self.let_go(job.size()),
            request::End::Unsent => self.requeue(job),
            request::End::Unacknowledged => match (self.node().config.delivery, &job.who) {
                (Delivery::AtMostOnce, Who::Requester(call)) => {
                    self.let_go(job.size());
                    self.fail(|| call.answer(Err(RequestError::LinkLost)));
                }
                _ => self.requeue(job),
            },
        }
    }

    fn sent(&self, job: Job) {
        self.peer.counters.sent.add(1);
        if let Who::Sender(call) = job.who {
            call.answer(Ok(()));
        }
    }

    fn fail(&self, answer: impl FnOnce()) {
        self.peer.counters.failed.add(1);
        answer();
    }

    fn undelivered(&self, count: u64, reason: UndeliveredReason) {
        if count > 0 {
            self.peer.counters.failed.add(count);
            self.node().undelivered(Event::Undelivered { peer: self.peer.endpoint.clone(), count, reason }, count);
        }
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
            return self.is_quiet() || now >= until;
        }
        // Evicted, it keeps the deadlines of what it has.
        if lock(&self.peer.state).retired {
            return self.is_quiet();
        }
        let idle = self.node().config.idle_timeout;
        if self.is_quiet() && now >= self.node().instant(self.peer.last_used()) + idle {
            self.node().forget(&self.peer);
        }
        // Forgetting retires the peer unless somebody has used it meanwhile.
        lock(&self.peer.state).retired && self.is_quiet()
    }

    fn is_quiet(&self) -> bool {
        let state = lock(&self.peer.state);
        let queued = state.queue.is_empty() && state.partials.is_empty();
        queued && self.oldest.is_none() && self.writers.is_empty() && self.requests.is_empty() && self.swept_clean()
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
            link.connection.close(0u8.into(), b"");
            left.len()
        });
        let mut state = lock(&self.peer.state);
        state.link = None;
        let queue = std::mem::take(&mut state.queue);
        let partials = std::mem::take(&mut state.partials);
        drop(state);
        let accepted = queue.iter().filter(|job| job.is_accepted()).count() + partials.len();
        self.undelivered((left + accepted) as u64, UndeliveredReason::Stopped);
    }

    fn node(&self) -> &Arc<Node> {
        &self.peer.node
    }
}

async fn dialled(dial: &mut Option<(Instant, Dial)>) -> (Result<Link, ConnectError>, Instant) {
    match dial {
        Some((begun, dial)) => (dial.await, *begun),
        None => std::future::pending().await,
    }
}

async fn doubted(link: Option<&Link>) {
    match link {
        Some(link) => link.doubted.notified().await,
        None => std::future::pending().await,
    }
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

async fn answers(link: Option<&Link>) -> Vec<RawFrame> {
    let Some(link) = link else { return std::future::pending().await };
    poll_fn(|cx| match link.poll_answers(cx) {
        frames if frames.is_empty() => Poll::Pending,
        frames => Poll::Ready(frames),
    })
    .await
}

async fn unreachable(refusals: &mut broadcast::Receiver<SocketAddr>, remote: Option<SocketAddr>) {
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

pub(crate) async fn deadline(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
