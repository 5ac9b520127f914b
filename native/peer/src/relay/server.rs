//! The relay's side of control streams and circuits.
//!
//! A node registers over a control stream; the stream's task lives as long as the registration. The same task reads the
//! connection's datagrams and passes them on. Only connections of registered nodes are ever sent anything: there is no
//! address in the protocol that a node could have packets sent to.
//!
//! Locks, in this order: the relay's state, a registration's legs, a circuit's traffic. A packet takes the last two, one
//! after the other; the state is for control messages only.

use std::cmp::{max, min};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::slice;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use macula_peer_core::admission::Kick;
use macula_peer_core::coordinate::{Coordinator, Execute, Party, Refused};
use macula_peer_core::counter::Counter;
use macula_peer_core::proto::codes::connection::DENIED;
use macula_peer_core::proto::codes::stream::{NOT_A_RELAY, TOO_SLOW};
use macula_peer_core::proto::control::{
    ControlError, FromNode, FromRelay, Id, LIMITS, Limit, PROOF_LEN, PunchFailure, Reason, Refusal,
};
use macula_peer_core::proto::packet::{Fit, Form, SplitBy, Splitter, is_padding, parse};
use macula_peer_core::proto::signal::Secret;
use macula_peer_core::relay::{Book, Ended, Generation, Notices, Opened, Registered, Traffic};
use macula_peer_core::stats::{Passed, RelayNode, RelayStats};
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Fingerprint, NodeId, RelayConfig};
use macula_peer_wire::{FrameError, Reassembler};
use quinn::{Connection, RecvStream, SendDatagramError, SendStream};
use ring::rand::SystemRandom;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::coop::consume_budget;
use tokio::task::yield_now;
use tokio::time::{sleep, sleep_until, timeout};

use super::responder::{self, Responder};
use crate::addresses::Remote;
use crate::admission::{Admissions, NotAdmitted};
use crate::identity::realm_proof_is_valid;
use crate::places::Place;
use crate::succession;
use crate::transfer::write_now;

/// Who opens a control stream and does not say `connect` is let go after this long. It can come in the same packet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a node may take to make room on its control stream: as long, for both are a matter of a round trip.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages that may wait to be written to a node: the end of every circuit that it may have, of both directions, twice over,
/// and this many answers at the least.
const MIN_NOTES: usize = 64;

/// How often a node's address is looked at. The node waits for it before it finds out what its NAT is like now; of 10,000
/// nodes it takes some hundredths of a processor.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The same while it claims to be at an address that it has not proved.
const LOOK_SOON: Duration = Duration::from_millis(100);

/// How often a packet without room lets others run, among them the task that sends what fills the queue.
const YIELDS: usize = 3;

/// What quinn's queue takes for a datagram beside its bytes: a `Bytes`.
const DATAGRAM_OVERHEAD: usize = size_of::<Bytes>();

/// How long a node that has to leave may take to hear why.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Registrations that are looked at under the lock of the relay's state.
const PAGE: usize = 256;

/// Nodes at the other ends of a node's circuits that are named.
const MAX_PEERS_NAMED: usize = 32;

/// A relay. Its tasks are those that call [`Relay::serve`].
pub(crate) struct Relay {
    config: RelayConfig,
    responder: Arc<Responder>,
    admissions: Arc<Admissions>,
    state: Mutex<State>,
    counters: Counters,
}

struct State {
    book: Book,
    coordinator: Coordinator,
    registrations: BTreeMap<Generation, Arc<Registration>>,
    /// The connections that have a control stream.
    served: HashSet<usize>,
    closed: bool,
}

#[derive(Default)]
struct Counters {
    forwarded_packets: Counter,
    forwarded_bytes: Counter,
    /// In the order of the types.
    refused: [Counter; Refusal::ALL.len()],
    dropped: [Counter; Limit::ALL.len()],
    stray: Counter,
    unread: Counter,
    punches: Counter,
    punched: Counter,
}

/// Who opens a control stream.
pub(crate) struct Opener {
    pub(crate) connection: Connection,
    pub(crate) remote: Arc<Remote>,
    pub(crate) owner: Fingerprint,
    /// Among the accepted connections.
    pub(crate) place: Option<Arc<Place>>,
}

/// One registered node.
struct Registration {
    generation: Generation,
    node_id: Id,
    owner: Fingerprint,
    connection: Connection,
    since: Instant,
    /// Where it has proved to be: others are told of no other address.
    remote: Arc<Remote>,
    /// Its circuits.
    legs: Mutex<HashMap<u32, Leg>>,
    sent: PassedOn,
    received: PassedOn,
    /// What it is to be told.
    notes: mpsc::Sender<FromRelay>,
    end: watch::Sender<Option<End>>,
    /// The size of the connection's queue of outgoing datagrams.
    queue: usize,
}

/// Counts datagrams.
#[derive(Default)]
struct PassedOn {
    packets: Counter,
    bytes: Counter,
}

impl PassedOn {
    fn add(&self, bytes: usize) {
        self.packets.add(1);
        self.bytes.add(bytes as u64);
    }

    fn get(&self) -> Passed {
        Passed { packets: self.packets.get(), bytes: self.bytes.get() }
    }
}

/// One end of a circuit.
struct Leg {
    other: Weak<Registration>,
    traffic: Arc<Mutex<Traffic>>,
    notices: Notices,
}

/// Why a control stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The connection or the stream ended.
    Left,
    /// The node is to be told why it is not registered.
    Refused(Refusal),
    /// The node has been told why it is registered no longer.
    Told,
    /// The node is to be told why it is registered no longer, and its connection ends with that.
    Leave(Refusal),
    /// The node does not say who it is, or does not read what it is told.
    Slow,
    /// The relay is closed.
    Closed,
}

impl End {
    /// The error that the stream is reset with, unless it ends in peace.
    fn code(self) -> Option<u8> {
        match self {
            Self::Left | Self::Refused(_) | Self::Told | Self::Leave(_) => None,
            Self::Slow => Some(TOO_SLOW),
            Self::Closed => Some(NOT_A_RELAY),
        }
    }
}

impl Relay {
    pub(crate) fn new(config: RelayConfig, responder: Arc<Responder>, admissions: Arc<Admissions>) -> Arc<Self> {
        let state = State {
            book: Book::new(&config, Instant::now()),
            coordinator: Coordinator::default(),
            registrations: BTreeMap::new(),
            served: HashSet::new(),
            closed: false,
        };
        let state = Mutex::new(state);
        Arc::new(Self { config, responder, admissions, state, counters: Counters::default() })
    }

    /// Serves a control stream whose opener has been read, and what came behind that into `frames`, until the registration
    /// ends. Dropped, it ends the registration too.
    pub(crate) async fn serve(
        self: Arc<Self>,
        opener: Opener,
        mut send: SendStream,
        receive: RecvStream,
        frames: Reassembler,
    ) {
        let connection = opener.connection.clone();
        let address = opener.remote.address(&connection);
        let mut control = Control { receive, frames };
        let end = self.run(opener, &mut send, &mut control).await;
        tracing::debug!(%address, ?end, "control stream ended");
        if let End::Refused(error) = end {
            self.count(error);
            // Without waiting: it is the first that is written on this stream.
            write_now(&mut send, &FromRelay::Refused { error }.encode());
        }
        if let End::Leave(error) = end {
            self.count(error);
            // It has heard everything when it acknowledges the end. Already closed is as good.
            let _ = send.finish();
            let _ = timeout(LEAVE_TIMEOUT, send.stopped()).await;
            return connection.close(DENIED.into(), error.name().as_bytes());
        }
        // Already closed is as good, here and below. What is not reset is finished when it is dropped.
        if let Some(code) = end.code() {
            let _ = send.reset(code.into());
        }
        let _ = control.receive.stop(end.code().unwrap_or(0).into());
    }

    /// Ends every registration, and takes no more.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for registration in state.registrations.values() {
            registration.end(End::Closed);
        }
    }

    /// Answers probes.
    pub(crate) fn responder(&self) -> &Arc<Responder> {
        &self.responder
    }

    /// Nodes from a number on, and the number from which on there may be more.
    pub(crate) fn nodes(&self, from: u64, most: usize) -> (Vec<RelayNode>, Option<u64>) {
        let (mut nodes, mut next) = (Vec::new(), Some(from));
        while let Some(from) = next
            && nodes.len() < most
        {
            let page;
            (page, next) = self.page(from, PAGE.min(most - nodes.len()));
            nodes.extend(page.iter().filter_map(|registration| registration.describe()));
        }
        (nodes, next)
    }

    /// The lock is held for one page at a time.
    fn page(&self, from: u64, most: usize) -> (Vec<Arc<Registration>>, Option<u64>) {
        let state = lock(&self.state);
        let registrations = state.registrations.range(Generation(from)..);
        let page: Vec<_> = registrations.take(most).map(|(_, registration)| registration.clone()).collect();
        let next = page.last().filter(|_| page.len() == most).map(|last| last.generation.0 + 1);
        (page, next)
    }

    /// Makes those leave whom the lists deny. Returns their connections, which end when they have heard why.
    pub(crate) fn enforce_access(&self) -> HashSet<usize> {
        self.dismiss(|registration| {
            let Registration { owner, node_id, .. } = registration;
            self.admissions.judge_registration(*owner, registration.address(), node_id.as_bytes()).err()
        })
    }

    /// Makes somebody leave. Returns its connections, as above.
    pub(crate) fn kick(&self, whom: &Kick) -> HashSet<usize> {
        self.dismiss(|registration| {
            let kicked = match whom {
                Kick::Key(key) => registration.owner == *key,
                Kick::NodeId(node_id) => registration.node_id.as_bytes() == node_id.as_bytes(),
            };
            kicked.then_some(NotAdmitted::Kicked)
        })
    }

    fn dismiss(&self, reason: impl Fn(&Registration) -> Option<NotAdmitted>) -> HashSet<usize> {
        let (mut connections, mut next) = (HashSet::new(), Some(0));
        while let Some(from) = next {
            let page;
            (page, next) = self.page(from, PAGE);
            for registration in page {
                let Some(reason) = reason(&registration) else { continue };
                let state = &mut *lock(&self.state);
                if state.registrations.contains_key(&registration.generation) {
                    state.forget(&registration);
                    registration.end(End::Leave(reason.into()));
                    self.admissions.count(reason);
                    connections.insert(registration.connection.stable_id());
                }
            }
        }
        connections
    }

    pub(crate) fn stats(&self) -> RelayStats {
        let (registrations, circuits) = {
            let state = lock(&self.state);
            (state.book.registrations(), state.book.circuits())
        };
        let counters = &self.counters;
        let refused = Refusal::ALL.iter().zip(&counters.refused).map(|(refusal, n)| (refusal.name(), n.get()));
        let dropped = Limit::ALL.iter().zip(&counters.dropped).map(|(limit, n)| (limit.name(), n.get()));
        RelayStats {
            registrations,
            circuits,
            forwarded_packets: counters.forwarded_packets.get(),
            forwarded_bytes: counters.forwarded_bytes.get(),
            refused: refused.collect(),
            dropped: dropped.collect(),
            stray: counters.stray.get(),
            unread: counters.unread.get(),
            punches: counters.punches.get(),
            punched: counters.punched.get(),
        }
    }

    async fn run(self: &Arc<Self>, opener: Opener, send: &mut SendStream, control: &mut Control) -> End {
        let Opener { connection, remote, owner, place } = opener;
        let Some(_stream) = OneStream::take(self, &connection) else { return End::Refused(Refusal::Malformed) };
        let (node_id, proof, successions) = match timeout(CONNECT_TIMEOUT, control.next()).await {
            Ok(Ok(FromNode::Connect { node_id, proof, successions })) => (node_id, proof, successions),
            Ok(Ok(_) | Err(NextError::Frame(_) | NextError::Message(_))) => return End::Refused(Refusal::Malformed),
            Ok(Err(NextError::Ended)) => return End::Left,
            Err(_) => return End::Slow,
        };
        if !self.admits(&connection, &node_id, proof) {
            return End::Refused(Refusal::Realm);
        }
        let address = remote.address(&connection);
        if let Err(reason) = self.admissions.admit_registration(owner, address, node_id.as_bytes()).await {
            return End::Refused(reason.into());
        }
        self.hand_on(&node_id, owner, &successions);
        let (entry, notes) = match self.register(connection, remote, node_id, owner) {
            Ok(registered) => registered,
            Err(end) => return end,
        };
        let registration = &entry.registration;
        // Registrations have a limit of their own.
        let _aside = place.map(|place| place.set_aside(&registration.connection));
        let mut ended = registration.end.subscribe();
        let mut telling = pin!(tell(notes, send));
        let end = tokio::select! {
            end = self.hear(registration, control) => end,
            end = &mut telling => end,
            () = self.forward(registration) => End::Left,
            never = self.end_idle(registration) => match never {},
            never = watch_address(registration) => match never {},
            // An error would mean that the registration, which is here, is gone.
            Ok(end) = ended.wait_for(Option::is_some) => end.unwrap_or(End::Left),
        };
        if end == End::Slow {
            self.counters.unread.add(1);
        }
        if let End::Leave(error) = end {
            registration.note(FromRelay::Refused { error });
            // Not to be told is as good as not to read it.
            let _ = timeout(LEAVE_TIMEOUT, telling).await;
        }
        end
    }

    fn count(&self, error: Refusal) {
        // `Unknown` has no counter and is never said.
        if let Some(counter) = self.counters.refused.get(error as usize) {
            counter.add(1);
        }
    }

    /// Whether the node need not prove that it knows the realm's secret, or does.
    fn admits(&self, connection: &Connection, node_id: &Id, proof: Option<[u8; PROOF_LEN]>) -> bool {
        let Some(secret) = &self.config.realm_secret else { return true };
        proof.is_some_and(|proof| realm_proof_is_valid(connection, secret.as_bytes(), node_id.as_bytes(), &proof))
    }

    /// A node that has another key than before keeps its name, if the key before says so.
    fn hand_on(&self, node_id: &Id, to: Fingerprint, successions: &[Bytes]) {
        let Some(from) = lock(&self.state).book.owner(node_id).filter(|owner| *owner != to) else { return };
        // One signature is verified, whatever a stranger sends.
        let statement = successions.iter().find(|statement| succession::signer(statement) == Some(from));
        if statement.is_some_and(|statement| succession::is_valid(statement, from, to, SystemTime::now())) {
            lock(&self.state).book.hand_on(node_id, from, to);
        }
    }

    fn register(
        self: &Arc<Self>,
        connection: Connection,
        remote: Arc<Remote>,
        node_id: Id,
        owner: Fingerprint,
    ) -> Result<(Entry, mpsc::Receiver<FromRelay>), End> {
        let state = &mut *lock(&self.state);
        if state.closed {
            return Err(End::Closed);
        }
        let now = Instant::now();
        let address = remote.address(&connection);
        // Under the lock: who changes the lists from now on finds the registration.
        let admitted = self.admissions.judge_registration(owner, address, node_id.as_bytes());
        admitted.map_err(|reason| End::Refused(reason.into()))?;
        let registered = state.book.register(node_id.clone(), owner, address.ip(), now);
        let Registered { generation, replaced } = registered.map_err(End::Refused)?;
        if let Some((generation, circuits)) = replaced {
            state.coordinator.end(generation);
            if let Some(old) = state.registrations.remove(&generation) {
                lock(&old.legs).clear();
                // Two nodes with one key must learn that each is the other's reason.
                old.note(FromRelay::Refused { error: Refusal::TakenOver });
            }
            state.ended(&circuits, Reason::Gone);
        }
        let (notes, waiting) = mpsc::channel(max(MIN_NOTES, self.config.max_sessions_per_node.saturating_mul(4)));
        let queue = connection.datagram_send_buffer_space();
        let (legs, end) = (Mutex::default(), watch::Sender::new(None));
        let (probes, place) = self.responder.admit(connection.clone(), remote.clone()).unzip();
        let (sent, received) = Default::default();
        let registration = Registration {
            generation,
            node_id,
            owner,
            connection,
            remote,
            since: now,
            legs,
            sent,
            received,
            notes,
            end,
            queue,
        };
        let registration = Arc::new(registration);
        state.coordinator.join(generation, now);
        registration.note(FromRelay::Registered { address, probes });
        state.registrations.insert(generation, registration.clone());
        Ok((Entry { relay: self.clone(), registration, _place: place }, waiting))
    }

    /// Does what the node asks for, until it is gone.
    async fn hear(&self, registration: &Arc<Registration>, control: &mut Control) -> End {
        loop {
            consume_budget().await;
            match control.next().await {
                Ok(FromNode::RelayRequest { session_id, target_id }) => {
                    // Room for the answer first: a node that does not read has no more done for it.
                    let Ok(answer) = registration.notes.reserve().await else { return End::Left };
                    self.open(registration, session_id, &target_id, answer);
                }
                Ok(FromNode::Disconnect { circuit, .. }) => self.close_circuit(registration, circuit).await,
                Ok(FromNode::Describe { profile, candidates }) => {
                    lock(&self.state).coordinator.describe(registration.generation, profile, &candidates);
                }
                Ok(FromNode::PunchRequest { session_id, target_id }) => {
                    let Ok(answer) = registration.notes.reserve().await else { return End::Left };
                    self.coordinate(registration, session_id, &target_id, answer);
                }
                Ok(FromNode::PunchExecute { session_id, ports }) => self.execute(registration, &session_id, &ports),
                Ok(FromNode::PunchResult { session_id, result }) => self.punched(registration, session_id, result),
                Err(NextError::Ended) => return End::Left,
                Ok(FromNode::Connect { .. }) | Err(NextError::Frame(_) | NextError::Message(_)) => {
                    let error = Refusal::Malformed;
                    self.count(error);
                    // It is the last that is told, and ends the task once it is written.
                    let _ = registration.notes.send(FromRelay::Refused { error }).await;
                    return pending().await;
                }
            }
        }
    }

    fn open(
        &self,
        registration: &Arc<Registration>,
        session_id: Id,
        target_id: &Id,
        answer: mpsc::Permit<'_, FromRelay>,
    ) {
        let state = &mut *lock(&self.state);
        let opened = state.book.open(registration.generation, target_id);
        let opened = opened.and_then(|Opened { circuit, target }| {
            // Every registration of the book is in the table.
            let target = state.registrations.get(&target).ok_or(Refusal::NotRegistered)?;
            let traffic = Arc::new(Mutex::new(Traffic::new(&self.config, Instant::now())));
            for (end, other) in [(registration, target), (target, registration)] {
                let (other, traffic) = (Arc::downgrade(other), traffic.clone());
                lock(&end.legs).insert(circuit, Leg { other, traffic, notices: Notices::default() });
            }
            Ok(circuit)
        });
        // Under the lock, so that nothing about the circuit is said before.
        answer.send(match opened {
            Ok(circuit) => FromRelay::Opened { session_id, circuit },
            Err(error) => {
                self.count(error);
                FromRelay::NotOpened { session_id, error }
            }
        });
    }

    /// Brings two nodes together, so that they find a direct path.
    fn coordinate(
        &self,
        registration: &Registration,
        session_id: Id,
        target_id: &Id,
        answer: mpsc::Permit<'_, FromRelay>,
    ) {
        let state = &mut *lock(&self.state);
        let target =
            state.book.find(registration.generation, target_id).and_then(|target| state.registrations.get(&target));
        let target = target.ok_or(Refused::NotRegistered);
        let told = target.and_then(|target| {
            let room = target.room_for_other_nodes().ok_or(Refused::SessionsPerNode)?;
            let secret = Secret::generate(&SystemRandom::new()).ok_or(Refused::Sessions)?;
            let parties = [registration.party(), target.party()];
            let [from, to] = &parties;
            let told = state.coordinator.request(from, to, session_id.clone(), *secret.as_bytes(), Instant::now())?;
            Ok((told, room))
        });
        match told {
            Ok(([ours, theirs], room)) => {
                self.counters.punches.add(1);
                room.send(FromRelay::PunchCoordinate(Box::new(theirs.into())));
                answer.send(FromRelay::PunchCoordinate(Box::new(ours.into())));
            }
            Err(refused) => {
                let error = refused.into();
                self.count(error);
                answer.send(FromRelay::NotPunched { session_id, error });
            }
        }
    }

    fn execute(&self, registration: &Registration, session_id: &Id, ports: &[u16]) {
        let state = &mut *lock(&self.state);
        let execute = state.coordinator.execute(registration.generation, session_id, ports, Instant::now());
        if let Some(Execute { to, session, ports }) = execute
            && let Some(room) = state.registrations.get(&to).and_then(|to| to.room_for_other_nodes())
        {
            room.send(FromRelay::PunchExecute { session_id: session, ports });
        }
    }

    fn punched(&self, registration: &Registration, session_id: Id, result: Result<(), PunchFailure>) {
        let state = &mut *lock(&self.state);
        let other = state.coordinator.result(registration.generation, &session_id, result.is_ok(), Instant::now());
        let Some(other) = other else { return };
        if result.is_ok() {
            self.counters.punched.add(1);
        }
        if let Some(room) = state.registrations.get(&other).and_then(|other| other.room_for_other_nodes()) {
            room.send(FromRelay::PunchResult { session_id, result });
        }
    }

    /// Who ends a circuit waits until the other side can be told. Otherwise a node could have another one take more than
    /// it reads, and be disconnected for it, by opening and closing circuits.
    async fn close_circuit(&self, registration: &Registration, circuit: u32) {
        let leg = lock(&registration.legs).get(&circuit).map(|leg| leg.other.clone());
        let Some(other) = leg.and_then(|other| other.upgrade()) else { return };
        let room = other.notes.reserve().await;
        let state = &mut *lock(&self.state);
        if state.book.close(registration.generation, circuit).is_some() {
            lock(&registration.legs).remove(&circuit);
            lock(&other.legs).remove(&circuit);
            if let Ok(room) = room {
                room.send(FromRelay::Disconnect { circuit, reason: Reason::Closed });
            }
        }
    }

    /// Passes the node's packets on, until the connection ends.
    async fn forward(&self, registration: &Registration) {
        let mut splitter = Splitter::default();
        while let Ok(datagram) = registration.connection.read_datagram().await {
            // Under a flood others get their turn too; quinn alone would not see to that. The same in `hear`.
            consume_budget().await;
            if is_padding(&datagram) {
                continue;
            }
            match self.pass(registration, &mut splitter, datagram).await {
                Ok(()) => {}
                Err(NotPassed::Stray) => drop(self.counters.stray.add(1)),
                Err(NotPassed::Limit(circuit, limit)) => {
                    self.counters.dropped[limit as usize].add(1);
                    registration.notice(circuit, limit);
                }
            }
        }
    }

    async fn pass(&self, from: &Registration, splitter: &mut Splitter, datagram: Bytes) -> Result<(), NotPassed> {
        let packet = parse(datagram.clone()).ok_or(NotPassed::Stray)?;
        let circuit = packet.circuit;
        let (to, traffic) = from.leg(circuit).ok_or(NotPassed::Stray)?;
        let exceeded = |limit| NotPassed::Limit(circuit, limit);
        let longest = match packet.form {
            Form::Whole => self.config.max_packet,
            Form::SenderHalf(..) => self.config.max_packet.div_ceil(2),
            // Only relays do that.
            Form::RelayHalf(..) => return Err(NotPassed::Stray),
        };
        if packet.bytes.len() > longest {
            return Err(exceeded(Limit::PacketSize));
        }
        if !lock(&traffic).pass(datagram.len(), Instant::now()) {
            return Err(exceeded(Limit::Bandwidth));
        }
        // `None`: the node takes no datagrams.
        let fits = to.connection.max_datagram_size().unwrap_or(0);
        let datagrams = match packet.form {
            _ if datagram.len() <= fits => Fit::Whole(datagram),
            Form::Whole => splitter.fit(circuit, &packet.bytes, fits, SplitBy::Relay),
            _ => Fit::TooLarge,
        };
        let datagrams = match &datagrams {
            Fit::Whole(datagram) => slice::from_ref(datagram),
            Fit::Halves(halves) => halves,
            Fit::TooLarge => return Err(exceeded(Limit::PacketSize)),
        };
        let len: usize = datagrams.iter().map(|datagram| datagram.len() + DATAGRAM_OVERHEAD).sum();
        let mut yields = 0;
        while !to.has_room(len, self.config.packet_queue) {
            if yields == YIELDS {
                return Err(exceeded(Limit::PacketQueue));
            }
            yields += 1;
            yield_now().await;
        }
        for datagram in datagrams {
            match to.connection.send_datagram(datagram.clone()) {
                Ok(()) => {
                    self.counters.forwarded_packets.add(1);
                    self.counters.forwarded_bytes.add(datagram.len() as u64);
                    from.sent.add(datagram.len());
                    to.received.add(datagram.len());
                }
                // It is about to be said that the circuit has ended.
                Err(SendDatagramError::ConnectionLost(_)) => return Ok(()),
                // The way has become narrower just now.
                Err(_) => return Err(exceeded(Limit::PacketSize)),
            }
        }
        Ok(())
    }

    /// Ends the node's circuits that nothing comes on. Each of the two nodes' tasks does this, whichever is first.
    async fn end_idle(&self, registration: &Registration) -> Infallible {
        loop {
            let now = Instant::now();
            let mut next = now + self.config.idle_timeout;
            let mut idle = Vec::new();
            for (&circuit, leg) in &*lock(&registration.legs) {
                let until = lock(&leg.traffic).used() + self.config.idle_timeout;
                if until <= now {
                    idle.push(circuit);
                } else {
                    next = min(next, until);
                }
            }
            if !idle.is_empty() {
                let state = &mut *lock(&self.state);
                let close = |circuit| state.book.close(registration.generation, circuit);
                let ended: Vec<_> = idle.into_iter().filter_map(close).collect();
                state.ended(&ended, Reason::Idle);
            }
            sleep_until(next.into()).await;
        }
    }
}

/// Tells the node when it is seen at another address.
async fn watch_address(registration: &Registration) -> Infallible {
    let mut told = registration.address();
    loop {
        sleep(if registration.asks_for_proof() { LOOK_SOON } else { LOOK_EVERY }).await;
        let address = registration.address();
        // A node that has no room for it now is told later.
        if address != told && registration.notes.try_send(FromRelay::Registered { address, probes: None }).is_ok() {
            told = address;
        }
    }
}

/// Writes to the node what it is to be told, until it is told that it is refused, or does not read.
async fn tell(mut notes: mpsc::Receiver<FromRelay>, send: &mut SendStream) -> End {
    // The registration, which is there, has the other end.
    while let Some(message) = notes.recv().await {
        match timeout(WRITE_TIMEOUT, send.write_chunk(message.encode())).await {
            Ok(Ok(())) if matches!(message, FromRelay::Refused { .. }) => return End::Told,
            Ok(Ok(())) => {}
            Ok(Err(_)) => return End::Left,
            Err(_) => return End::Slow,
        }
    }
    End::Left
}

impl State {
    /// The registration has ended, if it had not before.
    fn forget(&mut self, registration: &Registration) {
        let generation = registration.generation;
        self.registrations.remove(&generation);
        self.coordinator.end(generation);
        lock(&registration.legs).clear();
        let circuits = self.book.end(generation, Instant::now());
        self.ended(&circuits, Reason::Gone);
    }

    /// Circuits are off the book: whoever still has an end of one hears of it.
    fn ended(&self, circuits: &[Ended], reason: Reason) {
        for &Ended { circuit, ends } in circuits {
            for registration in ends.iter().filter_map(|end| self.registrations.get(end)) {
                lock(&registration.legs).remove(&circuit);
                registration.note(FromRelay::Disconnect { circuit, reason });
            }
        }
    }
}

impl Registration {
    fn party(&self) -> Party {
        Party {
            node: self.generation,
            id: self.node_id.clone(),
            key: self.owner,
            seen: self.address(),
            round_trip: self.connection.rtt(),
        }
    }

    fn describe(&self) -> Option<RelayNode> {
        let (circuits, others) = {
            let legs = lock(&self.legs);
            let others: Vec<_> = legs.values().take(MAX_PEERS_NAMED).filter_map(|leg| leg.other.upgrade()).collect();
            (legs.len(), others)
        };
        Some(RelayNode {
            node_id: NodeId::new(self.node_id.as_bytes())?,
            key: self.owner,
            address: self.address(),
            since: self.since,
            circuits,
            peers: others.iter().filter_map(|other| NodeId::new(other.node_id.as_bytes())).collect(),
            sent: self.sent.get(),
            received: self.received.get(),
        })
    }

    /// Where the node has proved to be.
    fn address(&self) -> SocketAddr {
        self.remote.address(&self.connection)
    }

    /// Has the node prove the address that its packets come from now, if it has not. A path is known to be validated when
    /// something that was sent on it is acknowledged, and it may be long until there is anything to send: an empty datagram
    /// says nothing and is acknowledged.
    fn asks_for_proof(&self) -> bool {
        let is_claimed = self.remote.is_claimed(&self.connection);
        if is_claimed && self.connection.datagram_send_buffer_space() == self.queue {
            // A node that takes no datagrams proves it with what it is told next.
            let _ = self.connection.send_datagram(Bytes::new());
        }
        is_claimed
    }

    /// The other end of a circuit, and what passes.
    fn leg(&self, circuit: u32) -> Option<(Arc<Registration>, Arc<Mutex<Traffic>>)> {
        let legs = lock(&self.legs);
        let leg = legs.get(&circuit)?;
        Some((leg.other.upgrade()?, leg.traffic.clone()))
    }

    /// Whether so many bytes may be queued for the node, of the `most` that may wait.
    fn has_room(&self, len: usize, most: usize) -> bool {
        let space = self.connection.datagram_send_buffer_space();
        let waiting = self.queue.saturating_sub(space);
        len <= space && waiting + len <= most
    }

    /// Has the node told, who must hear it or go.
    fn note(&self, message: FromRelay) {
        if let Err(TrySendError::Full(_)) = self.notes.try_send(message) {
            self.end(End::Slow);
        }
    }

    /// Room for what another node has it told, which may as well be lost. Half of all is kept for what it must hear:
    /// otherwise that other one could have it disconnected by saying more than it reads.
    fn room_for_other_nodes(&self) -> Option<mpsc::Permit<'_, FromRelay>> {
        self.notes.try_reserve().ok().filter(|_| self.notes.capacity() >= self.notes.max_capacity() / 2)
    }

    /// Has the node told that packets are dropped, as long as that is not too much.
    fn notice(&self, circuit: u32, limit: Limit) {
        let due = lock(&self.legs).get_mut(&circuit).is_some_and(|leg| leg.notices.due(limit, Instant::now()));
        if due {
            let _ = self.notes.try_send(FromRelay::Dropped { circuit, limit });
        }
    }

    /// Only the first reason counts.
    fn end(&self, why: End) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(why);
            first
        });
    }
}

impl From<NotAdmitted> for Refusal {
    fn from(reason: NotAdmitted) -> Self {
        match reason {
            NotAdmitted::Kicked => Self::Kicked,
            reason if reason.is_undecided() => Self::Undecided,
            _ => Self::Denied,
        }
    }
}

/// Why a packet was not passed on.
enum NotPassed {
    /// It is none, or not of one of the node's circuits.
    Stray,
    Limit(u32, Limit),
}

/// The one control stream of a connection.
struct OneStream {
    relay: Arc<Relay>,
    connection: usize,
}

impl OneStream {
    fn take(relay: &Arc<Relay>, connection: &Connection) -> Option<Self> {
        let connection = connection.stable_id();
        lock(&relay.state).served.insert(connection).then(|| Self { relay: relay.clone(), connection })
    }
}

impl Drop for OneStream {
    fn drop(&mut self) {
        lock(&self.relay.state).served.remove(&self.connection);
    }
}

/// A registration in the relay's tables, as long as it is served.
struct Entry {
    relay: Arc<Relay>,
    registration: Arc<Registration>,
    _place: Option<responder::Place>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.relay.state).forget(&self.registration);
    }
}

/// The node's half of a control stream.
struct Control {
    receive: RecvStream,
    frames: Reassembler,
}

#[derive(Debug, thiserror::Error)]
enum NextError {
    #[error("the stream ended")]
    Ended,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Message(#[from] ControlError),
}

impl Control {
    async fn next(&mut self) -> Result<FromNode, NextError> {
        loop {
            if let Some(frame) = self.frames.next_frame()? {
                return Ok(FromNode::decode(&frame)?);
            }
            // The reassembler may have been made for longer frames.
            if self.frames.buffered() >= LIMITS.max_frame {
                return Err(ControlError::TooLarge(self.frames.buffered()).into());
            }
            match self.receive.read_chunk(LIMITS.max_frame, true).await {
                Ok(Some(chunk)) => self.frames.push(chunk.bytes),
                Ok(None) | Err(_) => return Err(NextError::Ended),
            }
        }
    }
}

#[cfg(test)]
mod tests;
