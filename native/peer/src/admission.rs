//! Which nodes are let in: incoming connections, and registrations if this node is a relay.
//!
//! Lists ([`Access`]) are checked here; an [`Admit`] is asked about nodes that no list decides on, and its answers are
//! cached. Connections that are let in are kept in a table of guests, so that those that new lists deny can be found:
//! in parts, so that no task waits for the table.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use macula_peer_core::access::{Access, Rules};
use macula_peer_core::admission::{AnswerCache, Kick, Kicked, Subject};
use macula_peer_core::counter::Counter;
use macula_peer_core::proto::codes::connection::{DENIED, UNDECIDED};
use macula_peer_core::shares::{Client, Limits};
use macula_peer_core::stats::AdmissionStats;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Fingerprint, NodeId, Path};
use quinn::Connection;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::addresses::Remote;
use crate::shares::{Held, Shares};

/// Questions that wait for their answers: in total, about one key, and about one address. Beyond that no question is
/// asked.
const MAX_ASKED: Limits = Limits { total: 256, per_key: 32, per_address: 64 };

/// The callback keeps its own timeout. This is how much later the waiting tasks give up.
const LATE: Duration = Duration::from_millis(500);

/// Guests that are looked at under the lock of their table.
const PAGE: usize = 256;

/// Decides about nodes that no list decides on.
pub trait Admit: Send + Sync {
    /// Must not block. The answer may be given by any thread; dropped, it is [`NotAdmitted::Crash`].
    fn ask(&self, question: &AdmissionQuestion, answer: AdmissionAnswer);
}

/// The callback of a listener.
#[derive(Clone)]
pub struct AdmissionCallback {
    /// The callback.
    pub admit: Arc<dyn Admit>,
    /// How long it may take.
    pub timeout: Duration,
    /// How long its answers are good. Zero: for one question.
    pub good_for: Duration,
}

impl std::fmt::Debug for AdmissionCallback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { timeout, good_for, .. } = self;
        f.debug_struct("AdmissionCallback")
            .field("timeout", timeout)
            .field("good_for", good_for)
            .finish_non_exhaustive()
    }
}

/// A node that wants to come in.
#[derive(Debug, Clone)]
pub struct AdmissionQuestion {
    /// What it has shown. `None`: nothing, as clients of 0.14.3.
    pub key: Option<Fingerprint>,
    /// Where its packets come from: with [`Path::Relay`] the relay's address.
    pub address: SocketAddr,
    /// How they come.
    pub path: Path,
    /// What it wants to be registered as here. `None`: it has connected.
    pub node_id: Option<NodeId>,
}

impl AdmissionQuestion {
    fn subject(&self) -> Subject {
        Subject { key: self.key, ip: self.address.ip(), path: self.path, node_id: self.node_id.clone() }
    }

    fn client(&self) -> Client {
        Client::new(self.key, self.address.ip())
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident $name:literal,)*) => {
        /// Why a node is not let in.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
        pub enum NotAdmitted {
            $($(#[$doc])* #[error($name)] $variant,)*
        }

        impl NotAdmitted {
            /// Every reason.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// Its name in statistics.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// A list denies its network, or allows others only.
    Network "network",
    /// A list denies its key, or allows others only.
    Key "key",
    /// A list denies its node id, or allows others only.
    NodeId "node_id",
    /// It was told to leave a short time ago.
    Kicked "kicked",
    /// The callback denies it.
    Callback "callback",
    /// The callback did not answer in time.
    Timeout "timeout",
    /// The callback failed.
    Crash "crash",
    /// Too many questions wait for the callback.
    Busy "busy",
}

impl NotAdmitted {
    /// Whether the next attempt may well have another result.
    pub(crate) fn is_undecided(self) -> bool {
        matches!(self, Self::Timeout | Self::Crash | Self::Busy)
    }

    fn code(self) -> u8 {
        if self.is_undecided() { UNDECIDED } else { DENIED }
    }
}

/// The token that answers one question.
pub struct AdmissionAnswer {
    asked: Arc<CallbackQuestions>,
    subject: Option<Subject>,
    _held: Held,
}

impl AdmissionAnswer {
    /// Answers. `Ok`: it may come in.
    pub fn give(mut self, answer: Result<(), NotAdmitted>) {
        self.answer(answer);
    }

    fn answer(&mut self, answer: Result<(), NotAdmitted>) {
        let Some(subject) = self.subject.take() else { return };
        let mut state = lock(&self.asked.state);
        let waiting = state.waiting.remove(&subject);
        match answer {
            Ok(()) => state.answers.remember(subject, true, Instant::now()),
            Err(NotAdmitted::Callback) => state.answers.remember(subject, false, Instant::now()),
            // The next one may be answered.
            Err(_) => {}
        }
        drop(state);
        // Tasks that have given up meanwhile are not told.
        for waiting in waiting.into_iter().flatten() {
            let _ = waiting.send(answer);
        }
    }
}

impl Drop for AdmissionAnswer {
    fn drop(&mut self) {
        self.answer(Err(NotAdmitted::Crash));
    }
}

/// Questions to one callback.
struct CallbackQuestions {
    admission: AdmissionCallback,
    state: Mutex<State>,
    shares: Shares,
}

struct State {
    answers: AnswerCache,
    /// At most `MAX_ASKED`. Equal questions wait for one answer.
    waiting: HashMap<Subject, Vec<oneshot::Sender<Result<(), NotAdmitted>>>>,
}

impl CallbackQuestions {
    fn new(admission: AdmissionCallback) -> Arc<Self> {
        let state = State { answers: AnswerCache::new(admission.good_for), waiting: HashMap::new() };
        Arc::new(Self { admission, state: Mutex::new(state), shares: Shares::new(MAX_ASKED) })
    }
}

#[derive(Default)]
struct Counters {
    asked: Counter,
    remembered: Counter,
    /// In the order of the reasons.
    refused: [Counter; NotAdmitted::ALL.len()],
}

/// Lists, and what they were made from.
#[derive(Default)]
struct Lists {
    access: Access,
    rules: Rules,
}

/// Decides which nodes are let in.
#[derive(Default)]
pub(crate) struct Admissions {
    lists: RwLock<Arc<Lists>>,
    asked: RwLock<Option<Arc<CallbackQuestions>>>,
    kicked: Mutex<Kicked>,
    guests: Mutex<Guests>,
    counters: Counters,
}

#[derive(Default)]
struct Guests {
    table: BTreeMap<u64, Guest>,
    next: u64,
}

/// The other end of a connection whose messages are taken.
#[derive(Clone)]
struct Guest {
    key: Option<Fingerprint>,
    /// Where it has proved to be, if its packets come straight from there.
    direct: Option<Arc<Remote>>,
    connection: Connection,
}

/// A place in the table of guests, until this is dropped.
pub(crate) struct GuestEntry {
    admissions: Arc<Admissions>,
    id: u64,
}

impl Drop for GuestEntry {
    fn drop(&mut self) {
        lock(&self.admissions.guests).table.remove(&self.id);
    }
}

impl Admissions {
    pub(crate) fn new(access: Access) -> Arc<Self> {
        let admissions = Self::default();
        admissions.set_access(access);
        Arc::new(admissions)
    }

    pub(crate) fn access(&self) -> Access {
        self.lists().access.clone()
    }

    /// Guests that the new lists deny stay until [`Self::enforce`].
    pub(crate) fn set_access(&self, access: Access) {
        let lists = Arc::new(Lists { rules: Rules::new(&access), access });
        *self.lists.write().unwrap_or_else(PoisonError::into_inner) = lists;
    }

    /// Sets the callback.
    pub(crate) fn set_callback(&self, admission: Option<AdmissionCallback>) {
        *self.asked.write().unwrap_or_else(PoisonError::into_inner) = admission.map(CallbackQuestions::new);
    }

    fn lists(&self) -> Arc<Lists> {
        self.lists.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn asked(&self) -> Option<Arc<CallbackQuestions>> {
        self.asked.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a node may be refused because of the key that it will show.
    pub(crate) fn select_by_key(&self) -> bool {
        self.lists().rules.select_by_key() || self.asked().is_some()
    }

    /// Whether a handshake from an address may begin. Counts it if not.
    pub(crate) fn permit_address(&self, address: SocketAddr) -> bool {
        let permitted = self.lists().rules.permit_address(address.ip());
        if !permitted {
            self.count(NotAdmitted::Network);
        }
        permitted
    }

    /// Lets in a connection, or closes it. From here on it is a guest.
    pub(crate) async fn admit_connection(
        self: &Arc<Self>,
        connection: &Connection,
        key: Option<Fingerprint>,
        path: Path,
        remote: &Arc<Remote>,
    ) -> Option<GuestEntry> {
        let direct = (!path.is_relayed()).then(|| remote.clone());
        let guest = Guest { key, direct, connection: connection.clone() };
        // Before the lists are checked: a change of the lists then finds it.
        let place = self.enter(guest.clone());
        let address = remote.address(connection);
        let admitted = match self.lists().judge_guest(&guest) {
            Ok(()) => self.ask(AdmissionQuestion { key, address, path, node_id: None }).await,
            denied => denied,
        };
        match admitted {
            Ok(()) => Some(place),
            Err(reason) => {
                self.count(reason);
                guest.leave(reason);
                None
            }
        }
    }

    /// Whether the node at the other end of a link that this one began may send on it too. `None`: no.
    pub(crate) fn admit_link(
        self: &Arc<Self>,
        connection: &Connection,
        key: Option<Fingerprint>,
    ) -> Option<GuestEntry> {
        let guest = Guest { key, direct: None, connection: connection.clone() };
        let place = self.enter(guest.clone());
        match self.lists().judge_guest(&guest) {
            Ok(()) => Some(place),
            Err(reason) => {
                self.count(reason);
                None
            }
        }
    }

    /// Asks whether a node may be registered here; what the lists say comes first.
    pub(crate) async fn admit_registration(
        &self,
        key: Fingerprint,
        address: SocketAddr,
        node_id: &[u8],
    ) -> Result<(), NotAdmitted> {
        let question = AdmissionQuestion { key: Some(key), address, path: Path::Direct, node_id: NodeId::new(node_id) };
        match self.judge_registration(key, address, node_id) {
            Ok(()) => self.ask(question).await,
            denied => denied,
        }
        .inspect_err(|reason| self.count(*reason))
    }

    /// What the lists say of a registration.
    pub(crate) fn judge_registration(
        &self,
        key: Fingerprint,
        address: SocketAddr,
        node_id: &[u8],
    ) -> Result<(), NotAdmitted> {
        if lock(&self.kicked).hold(key, node_id, Instant::now()) {
            return Err(NotAdmitted::Kicked);
        }
        let rules = &self.lists().rules;
        match () {
            () if !rules.permit_address(address.ip()) => Err(NotAdmitted::Network),
            () if !rules.permit_key(Some(&key)) => Err(NotAdmitted::Key),
            () if !rules.permit_node_id(node_id) => Err(NotAdmitted::NodeId),
            () => Ok(()),
        }
    }

    /// Closes the connections that the lists deny, except those with these ids.
    pub(crate) fn enforce(&self, but: &HashSet<usize>) {
        let lists = self.lists();
        self.dismiss(but, |guest| lists.judge_guest(guest).err());
    }

    /// From now on a kicked node is not registered for a while, and the callback is asked about it again.
    pub(crate) fn kick(&self, target: &Kick) {
        lock(&self.kicked).add(target.clone(), Instant::now());
        if let Some(asked) = self.asked() {
            lock(&asked.state).answers.forget_all();
        }
    }

    /// Closes the connections with a key, but those with these ids. Returns whether there were any.
    pub(crate) fn dismiss_key(&self, key: Fingerprint, but: &HashSet<usize>) -> bool {
        self.dismiss(but, |guest| (guest.key == Some(key)).then_some(NotAdmitted::Kicked))
    }

    fn dismiss(&self, but: &HashSet<usize>, reason: impl Fn(&Guest) -> Option<NotAdmitted>) -> bool {
        let (mut next, mut any) = (0, false);
        loop {
            let page: Vec<_> = {
                let guests = lock(&self.guests);
                guests.table.range(next..).take(PAGE).map(|(id, guest)| (*id, guest.clone())).collect()
            };
            let Some((last, _)) = page.last() else { return any };
            next = last + 1;
            for (_, guest) in page.iter().filter(|(_, guest)| !but.contains(&guest.connection.stable_id())) {
                if let Some(reason) = reason(guest) {
                    any = true;
                    self.count(reason);
                    guest.leave(reason);
                }
            }
        }
    }

    fn enter(self: &Arc<Self>, guest: Guest) -> GuestEntry {
        let mut guests = lock(&self.guests);
        let id = guests.next;
        guests.next += 1;
        guests.table.insert(id, guest);
        GuestEntry { admissions: self.clone(), id }
    }

    async fn ask(&self, question: AdmissionQuestion) -> Result<(), NotAdmitted> {
        let Some(asked) = self.asked() else { return Ok(()) };
        let subject = question.subject();
        let (answer, answered) = oneshot::channel();
        let first = {
            let mut state = lock(&asked.state);
            if let Some(allowed) = state.answers.find(&subject, Instant::now()) {
                self.counters.remembered.add(1);
                return if allowed { Ok(()) } else { Err(NotAdmitted::Callback) };
            }
            match state.waiting.get_mut(&subject) {
                Some(waiting) => {
                    waiting.push(answer);
                    None
                }
                None => {
                    let held = asked.shares.take(question.client(), 1).map_err(|_| NotAdmitted::Busy)?;
                    state.waiting.insert(subject.clone(), vec![answer]);
                    Some(AdmissionAnswer { asked: asked.clone(), subject: Some(subject), _held: held })
                }
            }
        };
        if let Some(answer) = first {
            self.counters.asked.add(1);
            asked.admission.admit.ask(&question, answer);
        }
        match timeout(asked.admission.timeout + LATE, answered).await {
            Ok(answered) => answered.unwrap_or(Err(NotAdmitted::Crash)),
            Err(_) => Err(NotAdmitted::Timeout),
        }
    }

    pub(crate) fn count(&self, reason: NotAdmitted) {
        self.counters.refused[reason as usize].add(1);
    }

    pub(crate) fn stats(&self) -> AdmissionStats {
        let Counters { asked, remembered, refused } = &self.counters;
        let refused = NotAdmitted::ALL.iter().zip(refused).map(|(reason, n)| (reason.name(), n.get())).collect();
        AdmissionStats { asked: asked.get(), remembered: remembered.get(), refused }
    }
}

impl Lists {
    fn judge_guest(&self, guest: &Guest) -> Result<(), NotAdmitted> {
        let ip = guest.direct.as_ref().map(|remote| remote.address(&guest.connection).ip());
        match () {
            () if ip.is_some_and(|ip| !self.rules.permit_address(ip)) => Err(NotAdmitted::Network),
            () if !self.rules.permit_key(guest.key.as_ref()) => Err(NotAdmitted::Key),
            () => Ok(()),
        }
    }
}

impl Guest {
    fn leave(&self, reason: NotAdmitted) {
        self.connection.close(reason.code().into(), reason.name().as_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::IpAddr;

    use tokio::task::{JoinSet, yield_now};

    use super::*;

    /// Keeps the questions from one address, and allows all others.
    struct Stuck(IpAddr, Mutex<Vec<AdmissionAnswer>>);

    impl Admit for Stuck {
        fn ask(&self, question: &AdmissionQuestion, answer: AdmissionAnswer) {
            match question.address.ip() == self.0 {
                true => lock(&self.1).push(answer),
                false => answer.give(Ok(())),
            }
        }
    }

    const STRANGER: [u8; 4] = [10, 0, 0, 1];

    /// The key and the name of one of many.
    type MakeClient = fn(u32) -> (u32, u32);

    fn stuck() -> (Arc<Admissions>, Arc<Stuck>) {
        let (admissions, stuck) =
            (Admissions::new(Access::default()), Arc::new(Stuck(STRANGER.into(), Mutex::default())));
        let (timeout, good_for) = (Duration::from_secs(60), Duration::from_secs(60));
        admissions.set_callback(Some(AdmissionCallback { admit: stuck.clone(), timeout, good_for }));
        (admissions, stuck)
    }

    async fn register(admissions: Arc<Admissions>, key: u32, ip: [u8; 4], name: u32) -> Result<(), NotAdmitted> {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&key.to_be_bytes());
        admissions.admit_registration(bytes.into(), (ip, 1).into(), &name.to_be_bytes()).await
    }

    /// Starts this many registrations that wait for answers; returns how many were refused at once.
    async fn flood(admissions: &Arc<Admissions>, client: MakeClient) -> (JoinSet<()>, u64) {
        let mut waiting = JoinSet::new();
        for n in 0..400 {
            let (key, name) = client(n);
            let registering = register(admissions.clone(), key, STRANGER, name);
            waiting.spawn(async move {
                let _ = registering.await;
            });
        }
        for _ in 0..10 {
            yield_now().await;
        }
        (waiting, admissions.counters.refused[NotAdmitted::Busy as usize].get())
    }

    #[tokio::test]
    async fn one_address_and_one_key_leave_questions_to_others() {
        let floods: [(MakeClient, usize); 2] = [(|n| (n, n), 64), (|n| (1, n), 32)];
        for (client, most) in floods {
            let (admissions, stuck) = stuck();
            let (_waiting, refused) = flood(&admissions, client).await;
            assert_eq!((lock(&stuck.1).len(), refused), (most, 400 - most as u64));
            for n in 0..400 {
                assert_eq!(register(admissions.clone(), 1000 + n, [10, 0, 0, 2], n).await, Ok(()));
            }
        }
    }

    #[tokio::test]
    async fn equal_questions_wait_for_one_answer() {
        let (admissions, stuck) = stuck();
        let (waiting, refused) = flood(&admissions, |_| (1, 1)).await;
        assert_eq!((lock(&stuck.1).len(), refused), (1, 0));
        lock(&stuck.1).pop().unwrap().give(Ok(()));
        waiting.join_all().await;
        assert_eq!((admissions.stats().asked, register(admissions.clone(), 1, STRANGER, 1).await), (1, Ok(())));
    }

    /// The room is free again when the question is answered or dropped, not when its last waiting task gives up: the
    /// callback is still working on it.
    #[tokio::test]
    async fn a_client_that_gives_up_makes_no_room_for_more_questions() {
        let (admissions, stuck) = stuck();
        let (waiting, _) = flood(&admissions, |n| (n, n)).await;
        drop(waiting);
        yield_now().await;
        assert_eq!(register(admissions.clone(), 1000, STRANGER, 1).await, Err(NotAdmitted::Busy));
        lock(&stuck.1).clear();
        let registering = tokio::spawn(register(admissions.clone(), 1000, STRANGER, 1));
        while lock(&stuck.1).is_empty() {
            yield_now().await;
        }
        drop(registering);
    }
}
