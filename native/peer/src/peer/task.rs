//! The peer's task: carries out what [`LinkState`] decides, and moves messages over the link.

use std::future::poll_fn;
use std::mem::take;
use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard};
use std::task::Poll;
use std::time::{Duration, Instant};

use macula_peer_core::config::Delivery;
use macula_peer_core::drive::{self, Owner};
use macula_peer_core::errors::{ConnectError, Rejection, RequestError, RouteError, SendError, UndeliveredReason};
use macula_peer_core::events::Event;
use macula_peer_core::eviction;
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::link_state::{self, Action, Demand, LinkState, Offer, REPLACED_FOR, SWEEP_EVERY, Want};
use macula_peer_core::nat::Description;
use macula_peer_core::queue::{GivenUp, OWED_WITHOUT_DEADLINE, Queued, distinct};
use macula_peer_core::race::{self, Attempt, AttemptId, Ended, Tries};
use macula_peer_core::request_sender::Lost;
use macula_peer_core::session_sender::Taken;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{self, Dialect, LinkId, Path, PeerName, Target};
use quinn::{ConnectionError, RecvStream, SendStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::answers::{LARGE_ANSWERS, hand_over, hand_over_heavy, read_answers};
use super::attempts::Attempts;
use super::space::Space;
use super::{Given, Job, Peer, State, Waiter};
use crate::conn::Conn;
use crate::deadline::deadline;
use crate::link::{Answered, Link, Partial, Swept, Written, link_id};
use crate::message::Envelope;
use crate::request;
use crate::session::send::Progress;
use crate::socket::{RefusalReason, SendRefusal, refused};
use crate::surroundings::Surroundings;

/// When a connection is closed, a 0.14.3 gateway drops what it has acknowledged but not read. This is how long it gets
/// to read.
const READ_WITHIN: Duration = Duration::from_millis(100);

/// Answers every call that still waits when the task is gone, however it ended.
struct LeavePool(Arc<Peer>);

impl Drop for LeavePool {
    fn drop(&mut self) {
        if let Some(host) = self.0.host.upgrade() {
            host.gone(&self.0);
        }
        let (queue, partials) = {
            let mut state = lock(&self.0.state);
            (state.retired, state.ended) = (true, true);
            state.hide_link();
            (state.queue.take(), std::mem::take(&mut state.partials))
        };
        drop((queue, partials));
    }
}

/// The peer's task.
struct Task {
    peer: Arc<Peer>,
    life: LinkState,
    /// The link that `life` speaks of. Callers see it too unless it is suspect or leaving.
    link: Option<Arc<Link>>,
    /// A link that `life` is about to use or to close.
    offered: Option<Arc<Link>>,
    attempts: Attempts,
    /// Connections that the peer began, as they were last offered to `life`.
    began: Vec<Arc<Conn>>,
    /// It gets the messages instead.
    legacy_relay: Option<Arc<Peer>>,
    /// When the oldest unacknowledged message was written.
    oldest: Option<Instant>,
    /// When the peer will have read what it has acknowledged.
    read_by: Option<Instant>,
    swept_at: Instant,
    out_of_credit: bool,
    answers_until: Option<Instant>,
    /// This node's NAT or address, which decide what can be tried.
    description: watch::Receiver<Option<Description>>,
    writers: JoinSet<WriteOutcome>,
    /// How many of them write what was accepted.
    accepted_writes: usize,
    requests: JoinSet<RequestOutcome>,
    /// Tasks that read answers, and that end links which have been replaced.
    helpers: JoinSet<()>,
    /// Answers that are much work to hand over.
    heavy_answers: JoinSet<()>,
    refusals: broadcast::Receiver<SendRefusal>,
}

struct WriteOutcome {
    link: Arc<Link>,
    job: Job,
    message: Envelope,
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
    link: Arc<Link>,
    end: request::RequestEnd,
    _asked: Space,
}

/// Looks after the peer until it leaves the pool.
pub(crate) async fn run(peer: Arc<Peer>) {
    let _leaves = LeavePool(peer.clone());
    let now = Instant::now();
    let refusals = peer.node.net.refusals.subscribe();
    let description = peer.node.description.subscribe();
    let race = race::Setup { to_node: peer.name.node().is_some(), connect_timeout: peer.node.config.connect_timeout };
    let own = peer.node.keys.identity.fingerprint();
    let task = Task {
        peer,
        life: LinkState::new(link_state::Setup { own, race }, now),
        link: None,
        offered: None,
        attempts: Attempts::default(),
        began: Vec::new(),
        legacy_relay: None,
        oldest: None,
        read_by: None,
        swept_at: now,
        out_of_credit: false,
        answers_until: None,
        description,
        writers: JoinSet::new(),
        accepted_writes: 0,
        requests: JoinSet::new(),
        helpers: JoinSet::new(),
        heavy_answers: JoinSet::new(),
        refusals,
    };
    task.run().await;
}

impl Task {
    async fn run(mut self) {
        let peer = self.peer.clone();
        let mut stopping = peer.node.lifecycle.stopping();
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
                (id, attempted) = self.attempts.next() => self.attempted(id, attempted),
                _ = closed(link.as_deref()) => self.link_died(),
                stream = credit(link.as_deref(), self.out_of_credit) => self.credit_came(stream),
                frames = answers(link.as_deref()), if self.heavy_answers.len() < LARGE_ANSWERS => self.answers_came(frames),
                Some(_) = self.heavy_answers.join_next() => {}
                Some(Ok(outcome)) = self.writers.join_next() => self.write_ended(outcome),
                Some(Ok(outcome)) = self.requests.join_next() => self.request_ended(outcome),
                Some(_) = self.helpers.join_next() => {}
                _ = unreachable(&mut self.refusals, remote) => self.suspect(Duration::ZERO),
                silence = doubted(link.as_deref()) => self.suspect(silence),
                // The sender is the node's.
                Ok(()) = self.description.changed() => self.life.network_changed(Instant::now(), fastrand::f64()),
                _ = stopping.changed() => peer.retire(),
                () = sleep_until(next.into()) => {}
            }
        }
    }

    /// Everything that time or the callers may have changed.
    fn look_after(&mut self, now: Instant) {
        drive::look_after(self, now);
        if let (Some(link), true) = (&self.link, self.answers_until.is_none_or(|until| until <= now)) {
            self.answers_until = link.expire_answers(now);
        }
    }

    /// Connections that the peer has begun and that may carry its messages.
    fn offers(&mut self) -> Vec<Offer> {
        self.began.clear();
        let PeerName::Node(_) = self.peer.name else { return Vec::new() };
        let sought = {
            let state = lock(&self.peer.state);
            if self.life.is_usable() { state.queue.parked_keys() } else { state.waiting_keys() }
        };
        let mut offers = Vec::new();
        for key in distinct(sought.into_iter().flatten().chain(self.peer.expected_key())) {
            for accepted in self.node().accepted.from(key) {
                let id = link_id(&accepted.connection);
                let dialect = Dialect::MaculaPeer1;
                let link = types::Link { id, path: accepted.path, dialect, dialled: false, shown: Some(key) };
                offers.push(self.offer(link));
                self.began.push(accepted);
            }
        }
        offers
    }

    /// Uses a connection that the peer began: at once, if it allows streams.
    fn adopt(&mut self, id: AttemptId, connection: LinkId, until: Instant) {
        let accepted = self.began.iter().find(|accepted| link_id(&accepted.connection) == connection).cloned();
        let Some(accepted) = accepted else { return self.attempted(id, Err(Ended::NotAdopted)) };
        let key = self.peer.named_key();
        match self.node().adopt_now(&self.peer.name, &accepted, key) {
            Some(link) => self.attempted(id, Ok(link)),
            None => self.attempts.adopt(&self.peer.node, &self.peer.name, id, accepted, key, until),
        }
    }

    fn attempted(&mut self, id: AttemptId, attempted: Result<Link, Ended>) {
        let attempted = attempted.map(|link| {
            let about = link.about();
            self.offered = Some(Arc::new(link));
            about
        });
        drive::attempted(self, id, attempted, Instant::now());
    }

    fn next_look(&self, now: Instant) -> Instant {
        let state = lock(&self.peer.state);
        let idle = self.node().lifecycle.instant(self.peer.last_used()) + self.node().config.idle_timeout;
        // If that is past, something still keeps the peer: look again later.
        let idle = if idle > now { idle } else { now + self.node().config.idle_timeout };
        let unproven = self.life.is_suspect() || (self.link.is_some() && self.peer.counts.held() > 0);
        let sweep = unproven.then(|| self.swept_at + SWEEP_EVERY);
        let leaves = state.retired || self.node().lifecycle.is_stopping();
        let read_by = self.read_by.filter(|&at| leaves && at > now);
        let times = [read_by, state.queue.expiry(), sweep, self.answers_until, self.life.next_timeout(now)];
        times.into_iter().flatten().fold(idle, Instant::min)
    }

    /// Calls and messages that have expired, or whose callers are gone.
    fn answer_expired(&mut self, now: Instant) {
        let (given_up, GivenUp { queued, parked }) = {
            let mut state = lock(&self.peer.state);
            let due = state.queue.expiry().is_some_and(|expiry| expiry <= now);
            if !take(&mut state.cancelled) && !due {
                return;
            }
            let (given_up, others) = state.session.expire(now);
            (given_up, state.queue.give_up(others, now))
        };
        parked.into_iter().for_each(|job| self.not_for_this_peer(job));
        self.give_up(given_up, self.why_late());
        let linked = self.life.is_usable() || self.life.is_leaving();
        let mut expired = 0;
        for mut job in queued {
            // A caller that gets its answer may use it at once.
            job.space = None;
            let error = match () {
                () if job.had_no_time() => SendError::Timeout,
                () if linked && !self.peer.has_room(&lock(&self.peer.state), job.size()) => SendError::Overloaded,
                () if linked => SendError::NoRoom,
                () => self.life.why_not_reached(self.has_relays()),
            };
            match job.waiter {
                Waiter::Accepted => expired += 1,
                Waiter::Sender(call) => self.fail(|| call.answer(Err(error))),
                Waiter::Requester(call) if linked || job.request.is_named() => {
                    self.fail(|| call.answer(Err(RequestError::Timeout)));
                }
                Waiter::Requester(call) => self.fail(|| call.answer(Err(error.into()))),
            }
        }
        self.undelivered(expired, self.why_late());
    }

    /// Why a message that was accepted was not delivered in time.
    fn why_late(&self) -> UndeliveredReason {
        if self.life.meets_another_key() { UndeliveredReason::Untrusted } else { UndeliveredReason::Expired }
    }

    fn has_relays(&self) -> bool {
        let candidates = lock(&self.peer.state).known.candidates();
        let known = !candidates.relays.is_empty() || !candidates.last_resorts.is_empty();
        known || !self.node().config.relays.is_empty() || !self.node().keys.standing.relays().is_empty()
    }

    fn start_partials(&mut self) {
        let partials = std::mem::take(&mut lock(&self.peer.state).partials);
        for (link, job, partial) in partials {
            self.write(link, job, partial);
        }
    }

    /// Gives the queue to the link, as far as it takes it.
    fn flush(&mut self) {
        self.out_of_credit = false;
        let Some(link) = self.link.clone().filter(|_| self.life.is_usable()) else { return };
        loop {
            let mut state = lock(&self.peer.state);
            let Some(mut job) = state.queue.pop() else { return };
            if !job.is_wanted() {
                continue;
            }
            if matches!(job.waiter, Waiter::Sender(_)) && !self.peer.has_room(&state, job.size()) {
                // Acknowledgements make room, and wake this task.
                state.queue.put_back(job);
                return;
            }
            if !job.message.as_ref().is_some_and(|message| message.is_for(link.shown)) {
                self.park(state, job);
                continue;
            }
            if let Waiter::Requester(_) = &job.waiter {
                drop(state);
                self.ask(&link, job);
                continue;
            }
            job.space = None;
            let Some(message) = job.message.take() else { continue };
            match self.peer.give(state, message, Instant::now()) {
                // What the stream does not take is written when this task next looks at the session.
                Given::Taken { .. } => job.answer_sent(),
                Given::Partial(link, partial) => {
                    job.space = Some(Space::held(&self.peer.counts, partial.message.frame.len()));
                    self.write(link, job, *partial);
                }
                Given::NoCredit(message) => {
                    self.requeue(job, message);
                    self.out_of_credit = true;
                    return;
                }
                Given::Dropped => {
                    return self.not_delivered(job, UndeliveredReason::LinkLost, SendError::LinkLost);
                }
                Given::Lost(message) => return self.requeue(job, message),
            }
        }
    }

    /// Sends a request, and waits for its answer in a task.
    fn ask(&mut self, link: &Arc<Link>, mut job: Job) {
        let (Waiter::Requester(call), Some(message)) = (&job.waiter, job.message.clone()) else { return };
        let Some(named) = job.request.ask(link.dialect, fastrand::u128(..).to_be_bytes()) else {
            let call = call.clone();
            job.space = None;
            return self.fail(|| call.answer(Err(RequestError::LinkLost)));
        };
        let target = self.peer.name.node().cloned();
        let decoding = self.node().inbox.decoding.clone();
        let exchange = request::run(link.clone(), target, named, call.clone(), message, decoding);
        self.peer.counters.sent.add(1);
        let asked = Space::asked(&self.peer.counts);
        let link = link.clone();
        self.requests.spawn(async move { RequestOutcome { job, link, end: exchange.await, _asked: asked } });
    }

    /// Keeps a job that the link's peer may not get until another holder of its key is found, if it is for a node.
    fn park(&self, mut state: MutexGuard<'_, State>, job: Job) {
        match self.peer.name {
            PeerName::Node(_) => state.queue.park(job, Instant::now()),
            PeerName::Endpoint(_) | PeerName::Gateway(_) => {
                drop(state);
                self.not_for_this_peer(job);
            }
        }
    }

    fn write(&mut self, link: Arc<Link>, job: Job, partial: Partial) {
        self.accepted_writes += usize::from(job.is_accepted());
        self.writers.spawn(write_rest(link, job, partial));
    }

    fn account(&self, swept: Swept) {
        self.peer.counters.acknowledged.add(swept.acknowledged);
        self.peer.counts.let_go(swept.acknowledged_bytes);
        self.give_up(swept.rejected, UndeliveredReason::Rejected(Rejection::Unread));
    }

    /// The peer may be gone.
    fn suspect(&mut self, silence: Duration) {
        if let Some(link) = &self.link {
            self.life.suspect(link.heard(), silence, Instant::now());
        }
    }

    /// Gives everything that waits to the legacy relay.
    fn pass_on(&mut self, now: Instant) {
        let Some(relay) = self.legacy_relay.clone() else { return };
        let (jobs, lost) = {
            let mut state = lock(&self.peer.state);
            let Taken { owed, lost } = state.session.take();
            let owed = owed.into_iter().map(|message| {
                let deadline = message.deadline.unwrap_or(now + OWED_WITHOUT_DEADLINE);
                self.owed(message, deadline)
            });
            (owed.chain(state.queue.take()).collect::<Vec<_>>(), lost)
        };
        self.give_up(lost, UndeliveredReason::LinkLost);
        for job in jobs {
            if let Err(job) = relay.adopt(job) {
                // It has left the pool.
                self.life.stop_passing_on();
                self.peer.push(&mut lock(&self.peer.state), *job);
            }
        }
    }

    /// Sends over the link that was offered.
    fn use_link(&mut self, now: Instant) {
        let Some(link) = self.offered.take() else { return };
        tracing::debug!(peer = %self.peer.name, dialect = link.dialect.alpn(), path = ?link.path, "link up");
        match &self.peer.name {
            PeerName::Gateway(_) => self.peer.host.upgrade().into_iter().for_each(|host| host.linked()),
            _ => self.node().keys.counted_unverified(link.dialect),
        }
        // What was refused before says nothing about this link.
        self.refusals = self.node().net.refusals.subscribe();
        link.expect_silence(self.life.expected_silence(now));
        self.answers_until = None;
        self.peer.touch(now);
        self.link = Some(link.clone());
        let mut state = lock(&self.peer.state);
        let refused = state.session.refuse(|message| !message.is_for(link.shown));
        let (taken, attached) = state.session.attach(&link);
        state.queue.found();
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
                let owner = Arc::downgrade(&self.peer) as _;
                self.helpers.spawn(self.node().clone().serve(link.conn.clone(), owner));
                // Its key may not have been known before.
                self.peer.arrived();
            }
        }
    }

    fn fail_waiting(&mut self, error: SendError, begun: Instant, later_stay: bool) {
        tracing::debug!(peer = %self.peer.name, %error, "no link");
        let failed = {
            let mut state = lock(&self.peer.state);
            let later_stay = later_stay || state.known.has_learned();
            state.queue.fail(begun, later_stay)
        };
        for job in failed {
            self.fail(|| job.fail(error.clone()));
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
        self.peer.counts.let_go(acknowledged_bytes);
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
            // With nothing in flight any more, no sweep would find that out.
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
            self.node().keys.disown(node, shown);
        }
        self.link_died();
    }

    fn link_died(&mut self) {
        tracing::debug!(peer = %self.peer.name, "link died");
        self.life.link_died(Instant::now(), fastrand::f64());
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
        self.oldest = None;
        self.out_of_credit = false;
        let now = Instant::now();
        let mut state = lock(&self.peer.state);
        state.hide_link();
        state.session.detach(now);
        state.queue.detach(now);
        self.link.take()
    }

    fn owe(&mut self, messages: Vec<Envelope>) {
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
                self.peer.counts.let_go(message.frame.len());
                continue;
            }
            state.queue.put_back(self.owed(message, deadline));
        }
        drop(state);
        self.undelivered(expired, self.why_late());
        self.undelivered(lost, UndeliveredReason::LinkLost);
    }

    /// A message that a link or a session held.
    fn owed(&self, message: Envelope, deadline: Instant) -> Job {
        let space = Space::taken_back(&self.peer.counts, message.frame.len());
        Job { space: Some(space), ..Job::accepted(Some(message), Some(deadline)) }
    }

    /// Messages that a link or a session held.
    fn give_up(&self, messages: Vec<Envelope>, reason: UndeliveredReason) {
        self.peer.counts.let_go(messages.iter().map(|message| message.frame.len()).sum());
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
        for Answered { frame, requester } in answers {
            self.peer.counters.received.add(1);
            match requester {
                Some(requester) => requester.answer(frame),
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
        match result {
            Ok((send, receive)) => match link.written(message, send, receive) {
                Written::Unproven(_) if self.node().config.delivery == Delivery::AtMostOnce => {
                    self.not_delivered(job, UndeliveredReason::LinkLost, SendError::LinkLost);
                }
                Written::Lost(message) | Written::Unproven(message) => self.write_lost(job, message),
                _ => self.sent(job),
            },
            Err(WriteFailure::Lost) => self.write_lost(job, message),
            Err(WriteFailure::Cancelled) => {}
            Err(WriteFailure::Expired) => {
                self.not_delivered(job, UndeliveredReason::Expired, SendError::NoRoom);
            }
            Err(WriteFailure::Rejected) => {
                self.not_delivered(job, UndeliveredReason::Rejected(Rejection::Unread), SendError::LinkLost);
            }
        }
    }

    fn not_delivered(&self, job: Job, reason: UndeliveredReason, error: SendError) {
        drop(job.space);
        match job.waiter {
            Waiter::Sender(call) => self.fail(|| call.answer(Err(error))),
            _ => self.undelivered(1, reason),
        }
    }

    /// A part of it may have arrived, but no receiver makes anything of a part: sending it again is no second delivery.
    fn write_lost(&mut self, mut job: Job, message: Envelope) {
        if job.is_accepted() && job.deadline.is_none() {
            job.deadline = Some(Instant::now() + OWED_WITHOUT_DEADLINE);
        }
        self.requeue(job, message);
    }

    /// Puts a job back that was next, with its message.
    fn requeue(&self, mut job: Job, message: Envelope) {
        job.message = Some(message);
        job.space = Some(self.peer.space(&job));
        lock(&self.peer.state).queue.put_back(job);
    }

    fn ask_again(&self, job: Job) {
        lock(&self.peer.state).queue.put_back(job);
    }

    fn request_ended(&mut self, RequestOutcome { mut job, link, end, _asked }: RequestOutcome) {
        match end {
            request::RequestEnd::Answered => {
                self.peer.counters.acknowledged.add(1);
                self.peer.counters.received.add(1);
            }
            request::RequestEnd::Failed => {
                self.peer.counters.failed.add(1);
            }
            request::RequestEnd::Cancelled => {}
            request::RequestEnd::Lost(how) => {
                if job.request.lost(how, link.dialect) {
                    self.ask_again(job);
                } else if let Waiter::Requester(call) = &job.waiter {
                    job.space = None;
                    self.fail(|| call.answer(Err(RequestError::LinkLost)));
                }
                if how == Lost::WrongNode && self.link.as_ref().is_some_and(|present| Arc::ptr_eq(present, &link)) {
                    self.wrong_node();
                }
            }
        }
    }

    fn not_for_this_peer(&self, job: Job) {
        drop(job.space);
        let error = || match self.peer.name {
            PeerName::Endpoint(_) | PeerName::Gateway(_) => SendError::from(ConnectError::Untrusted),
            PeerName::Node(_) => RouteError::Node(ConnectError::Untrusted).into(),
        };
        match job.waiter {
            Waiter::Accepted => self.undelivered(1, UndeliveredReason::Untrusted),
            Waiter::Sender(call) => self.fail(|| call.answer(Err(error()))),
            Waiter::Requester(call) => self.fail(|| call.answer(Err(error().into()))),
        }
    }

    /// A stream has all of it, and the link holds it.
    fn sent(&self, mut job: Job) {
        if let Some(space) = job.space.take() {
            space.hand_on();
        }
        self.peer.counters.sent.add(1);
        job.answer_sent();
    }

    fn fail(&self, answer: impl FnOnce()) {
        self.peer.counters.failed.add(1);
        answer();
    }

    fn undelivered(&self, count: u64, reason: UndeliveredReason) {
        self.peer.undelivered(count, reason);
    }

    /// Whether the task has nothing more to do, for good.
    fn is_done(&mut self, now: Instant) -> bool {
        if self.node().lifecycle.is_stopping() {
            let is_quiet = self.is_quiet(&lock(&self.peer.state));
            return self.life.is_drained(is_quiet, now);
        }
        let used = self.node().lifecycle.instant(self.peer.last_used());
        let is_idle = eviction::is_idle(used, self.node().config.idle_timeout, now);
        let mut state = lock(&self.peer.state);
        // Evicted, it keeps the deadlines of what it has.
        if !state.retired && self.is_quiet(&state) && is_idle {
            drop(state);
            // Retires the peer unless it was used meanwhile.
            if let Some(host) = self.peer.host.upgrade() {
                host.forget(&self.peer);
            }
            state = lock(&self.peer.state);
        }
        state.ended = state.retired && self.is_quiet(&state);
        state.ended
    }

    fn is_quiet(&self, state: &State) -> bool {
        let queued = state.queue.is_empty() && !state.queue.has_parked() && state.partials.is_empty();
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
        self.peer.counts.held() == 0
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
        let queue = state.queue.take();
        let partials = std::mem::take(&mut state.partials);
        let Taken { owed, lost } = state.session.take();
        drop(state);
        let queued = queue.iter().filter(|job| job.is_accepted()).count();
        let accepted = queued + partials.len() + self.accepted_writes + owed.len() + lost.len();
        self.undelivered((left + accepted) as u64, UndeliveredReason::Stopped);
    }

    fn node(&self) -> &Arc<Surroundings> {
        &self.peer.node
    }
}

impl Owner for Task {
    fn life(&mut self) -> &mut LinkState {
        &mut self.life
    }

    fn expire(&mut self, now: Instant) {
        self.answer_expired(now);
        self.start_partials();
    }

    fn look_at_callers(&mut self, now: Instant) {
        let (invalidated, candidates_found, arrived) = {
            let mut state = lock(&self.peer.state);
            let State { invalidated, candidates_found, arrived, .. } = &mut *state;
            (take(invalidated), take(candidates_found), take(arrived))
        };
        if let (true, Some(link)) = (invalidated, &self.link) {
            self.life.invalidate(link.patience(), now);
        }
        if candidates_found {
            self.life.stop_passing_on();
        }
        if arrived {
            let offers = self.offers();
            self.life.began(&offers, now);
        }
    }

    fn swept_at(&self) -> Instant {
        self.swept_at
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
        self.life.heard(link.heard(), self.oldest, link.patience(), now);
        link.expect_silence(self.life.expected_silence(now));
    }

    fn is_unacknowledged(&self) -> bool {
        self.oldest.is_some() || !self.writers.is_empty()
    }

    fn carry_out(&mut self, action: Action, now: Instant) {
        match action {
            Action::Attempt(race::Action::Begin { id, attempt: Attempt::Adopt(connection), until, .. }) => {
                self.adopt(id, connection, until);
            }
            Action::Attempt(race::Action::Begin { id, attempt, key, until }) => {
                let Peer { node, name, .. } = &*self.peer;
                self.attempts.begin(node, name, id, attempt, key, until);
            }
            Action::Attempt(race::Action::Abort(id)) => self.attempts.abort(id),
            Action::StopRace => self.attempts = Attempts::default(),
            Action::FinishRace => drop(self.helpers.spawn(take(&mut self.attempts).finish())),
            Action::Use(_) => self.use_link(now),
            Action::Close(_) => {
                if let Some(link) = self.offered.take() {
                    link.close();
                }
            }
            Action::Hide => {
                tracing::debug!(peer = %self.peer.name, "the link is hidden from callers");
                lock(&self.peer.state).hide_link();
            }
            Action::Show => {
                let mut state = lock(&self.peer.state);
                state.queue.found();
                state.link = self.link.clone();
            }
            Action::LookAgain => self.peer.arrived(),
            Action::Retire => self.retire_link(),
            Action::Replace => self.replace_link(),
            Action::PassOn(relay) => {
                let host = self.peer.host.upgrade();
                self.legacy_relay = host.and_then(|host| host.peer(&Target::Endpoint(relay.as_ref())));
                if self.legacy_relay.is_none() {
                    self.life.stop_passing_on();
                }
            }
            Action::StopPassingOn => self.legacy_relay = None,
            Action::Fail { error, begun, later_stay } => self.fail_waiting(error, begun, later_stay),
            Action::FailParked { begun } => {
                let failed = lock(&self.peer.state).queue.fail_parked(begun);
                failed.into_iter().for_each(|job| self.not_for_this_peer(job));
            }
            Action::Failures(failures) => lock(&self.peer.state).failures = failures,
            Action::Path(path) => {
                let (peer, failures) = (self.peer.name.clone(), lock(&self.peer.state).failures.clone());
                self.node().inbox.event(Event::Path { peer, path, failures });
            }
        }
    }

    fn hand_on(&mut self, now: Instant) {
        self.pass_on(now);
        self.flush();
    }

    fn demand(&self, now: Instant) -> Demand {
        let state = lock(&self.peer.state);
        let owed = !state.queue.is_empty() || !state.session.is_empty();
        Demand {
            waited_for: state.queue.is_waited_for(now),
            owed: owed || !self.requests.is_empty() || self.oldest.is_some(),
            parked: state.queue.has_parked(),
            parked_waited_for: state.queue.is_other_key_waited_for(now),
            learned: state.known.has_learned(),
            better: state.known.knows_better(),
        }
    }

    fn search(&mut self, want: Want, now: Instant) {
        if matches!(want, Want::Link | Want::OtherKey) {
            lock(&self.peer.state).seek();
        }
        let offers = if matches!(want, Want::Link | Want::OtherKey) { self.offers() } else { Vec::new() };
        let node = self.node();
        let bound = self.peer.name.node().is_some_and(|name| node.keys.known_key(name).is_some());
        let mut own_relays = node.keys.standing.relays();
        own_relays.extend_from_slice(&node.config.relays);
        let relay = match self.life.link().map(|link| link.path) {
            Some(Path::Relay(relay)) => node.relay_at(relay),
            _ => None,
        };
        let tries = {
            let mut state = lock(&self.peer.state);
            state.known.tried();
            Tries { candidates: state.known.candidates(), own_relays, resolving: state.known.resolving(now), bound }
        };
        self.life.search(want, &offers, &tries, relay, now);
        drive::carry_out(self, now);
        if matches!(want, Want::Link | Want::OtherKey) && self.life.is_racing() {
            self.peer.counters.dials.add(1);
        }
    }

    fn offer(&self, link: types::Link) -> Offer {
        let state = lock(&self.peer.state);
        let sought = state.link.is_some() && link.shown.is_some_and(|shown| state.queue.seeks(shown));
        Offer { link, sought }
    }

    fn draw(&mut self) -> f64 {
        fastrand::f64()
    }
}

async fn session_progress(peer: &Peer, linked: bool) -> Progress {
    match linked {
        true => poll_fn(|cx| lock(&peer.state).session.poll(cx, Instant::now())).await,
        false => std::future::pending().await,
    }
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

async fn unreachable(refusals: &mut broadcast::Receiver<SendRefusal>, remote: Option<SocketAddr>) -> RefusalReason {
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
        () = cancelled(&job.waiter) => Err(WriteFailure::Cancelled),
    };
    if result.is_err() {
        // A dropped stream would be finished, and the part taken for the whole.
        let _ = send.reset(0u8.into());
    }
    WriteOutcome { link, job, message, result: result.map(|()| (send, receive)) }
}

async fn cancelled(waiter: &Waiter) {
    match waiter {
        Waiter::Sender(call) => call.cancelled().await,
        Waiter::Accepted | Waiter::Requester(_) => std::future::pending().await,
    }
}
