//! Direct paths through NATs: the attempts that this node takes part in.
//!
//! What is sent when is decided in `macula_peer_core::punch`; here are the sockets, the relay's word and the connection. Nothing is
//! sent to an address that a relay of this node's did not name, but for answers to what the other node has signed.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use macula_peer_core::config::{Config, HolePunching};
use macula_peer_core::coordinate::{DESCRIBED_WITHIN, is_local};
use macula_peer_core::errors::{CircuitError, ConnectError, PunchError};
use macula_peer_core::nat::Description;
use macula_peer_core::packet_budget::network;
use macula_peer_core::proto::control::{PunchFailure, Refusal};
use macula_peer_core::proto::signal::Role;
use macula_peer_core::proto::signal::{Body, Key, MAX_LEN, Secret, Signal, Unverified};
use macula_peer_core::punch::{self, Action, Punch, Setup, Strategy};
use macula_peer_core::shares::{Client, Limits};
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, Fingerprint, NodeId, PeerName, canonical};
use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use crate::descriptors;
use crate::expected::{EXPECTED_FOR, Expectation, Expected};
use crate::keys::{Keys, Said};
use crate::link::Link;
use crate::nat::{self, Detection};
use crate::net::Net;
use crate::relay::clients::Clients;
use crate::relay::registration::PunchSession;
use crate::shares::{Held, Shares};
use crate::socket::{AFTER_ERROR, ExtraGuard, Received, ReceivedBy, Socket};

/// Attempts that this node has begun and takes part in at once, and as many that others have begun: each is some hundred
/// packets in three seconds.
const MAX_SESSIONS: usize = 64;

/// Those that others have begun: names and keys cost nothing, so what one has begun must not keep others from it.
const ASKED: Limits = Limits { total: MAX_SESSIONS, per_key: 2, per_address: 8 };

/// Attempts with hundreds of sockets or packets at once, that this node has begun, and that others have. Many systems allow a
/// process 1,024 open files.
const MAX_HARD_SESSIONS: usize = 1;

/// After one of these that others have begun, how long the same network has to wait for the next one: attempts take 3 s at most,
/// so others have half of the time.
const HARD_AGAIN: Duration = Duration::from_secs(6);

/// Signals of one session that wait to be looked at.
const MAX_HEARD: usize = 64;

/// No relay of ours asks for a longer wait.
const LONGEST_DELAY: Duration = Duration::from_secs(3);

/// The first pause before a relay is asked again that waits for the other node to find out what NAT it is behind: a part of
/// what that takes. The next ones double, because a relay allows 16 questions at once and four a second, whoever is asked for.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A handshake on a path on which packets have just gone both ways. One that takes longer is better begun anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What the other node says.
/// What the other node is told.
/// The attempts that are being made.
pub(crate) struct Puncher {
    config: Arc<Config>,
    net: Arc<Net>,
    keys: Arc<Keys>,
    clients: Arc<Clients>,
    expected: Arc<Expected>,
    detection: Arc<Detection>,
    /// By the id in their signals. At most `MAX_SESSIONS` of each role.
    sessions: Mutex<HashMap<u64, Session>>,
    /// Of those that others have begun.
    asked: Shares,
    /// For those that this node has begun.
    hard: Arc<Semaphore>,
    /// For those that others have.
    hard_asked: Arc<Semaphore>,
    /// Networks that have had one of these a short time ago: no more than there may be in that time.
    hard_had: Mutex<Vec<(IpAddr, Instant)>>,
}

#[derive(Clone)]
struct Session {
    key: Key,
    /// The role of who sends the signals.
    peer: Role,
    heard: mpsc::Sender<Heard>,
}

struct Heard {
    via: HeardBy,
    from: SocketAddr,
    signal: punch::Signal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeardBy {
    Socket(ReceivedBy),
    /// A socket that QUIC does not use yet.
    Extra(u16),
}

impl Puncher {
    pub(crate) fn new(detection: Arc<Detection>, keys: Arc<Keys>, expected: Arc<Expected>) -> Arc<Self> {
        let hard = || Arc::new(Semaphore::new(MAX_HARD_SESSIONS));
        Arc::new(Self {
            config: detection.config.clone(),
            net: detection.net.clone(),
            keys,
            clients: detection.clients.clone(),
            expected,
            detection,
            sessions: Mutex::default(),
            asked: Shares::new(ASKED),
            hard: hard(),
            hard_asked: hard(),
            hard_had: Mutex::default(),
        })
    }

    /// A place among the attempts with hundreds of sockets or packets.
    fn hard(&self, role: Role, network: IpAddr) -> Option<OwnedSemaphorePermit> {
        if role == Role::Initiator {
            return self.hard.clone().try_acquire_owned().ok();
        }
        let mut had = lock(&self.hard_had);
        had.retain(|(_, at)| at.elapsed() < HARD_AGAIN);
        if had.iter().any(|(known, _)| *known == network) {
            return None;
        }
        let permit = self.hard_asked.clone().try_acquire_owned().ok()?;
        had.push((network, Instant::now()));
        Some(permit)
    }

    /// A signal came by a socket that QUIC uses too. What is not of a session is nothing.
    pub(crate) fn received(&self, via: ReceivedBy, received: &Received) {
        let Some(unverified) = Unverified::parse(received.bytes()) else { return };
        let session = lock(&self.sessions).get(&unverified.id()).cloned();
        if let Some(session) = session
            && let Some(signal) = session.verify(&unverified)
        {
            let via = HeardBy::Socket(via);
            // What is lost is sent again.
            let _ = session.heard.try_send(Heard { via, from: received.from, signal });
        }
    }
}

impl Session {
    fn verify(&self, unverified: &Unverified<'_>) -> Option<punch::Signal> {
        let Signal { nonce, body, .. } = unverified.verify(&self.key)?;
        match body {
            Body::Ping { sender } if sender == self.peer => Some(punch::Signal::Ping { nonce }),
            Body::Pong { sender } if sender == self.peer => Some(punch::Signal::Pong { nonce }),
            _ => None,
        }
    }
}

/// A session in the table, as long as it lasts.
struct Entry {
    puncher: Arc<Puncher>,
    id: u64,
    session: Session,
    /// If the other node has begun it.
    _share: Option<Held>,
}

impl Entry {
    fn new(
        puncher: &Arc<Puncher>,
        id: u64,
        key: Key,
        peer: Role,
        who: Client,
    ) -> Result<(Self, mpsc::Receiver<Heard>), PunchError> {
        let (heard, waiting) = mpsc::channel(MAX_HEARD);
        let session = Session { key, peer, heard };
        let share = match peer {
            Role::Initiator => Some(puncher.asked.take(who, 1).map_err(|_| PunchError::Failed(PunchFailure::Busy))?),
            Role::Responder => None,
        };
        let mut sessions = lock(&puncher.sessions);
        let begun = sessions.values().filter(|session| session.peer == Role::Responder).count();
        if sessions.contains_key(&id) || share.is_none() && begun >= MAX_SESSIONS {
            return Err(PunchError::Failed(PunchFailure::Busy));
        }
        sessions.insert(id, session.clone());
        drop(sessions);
        Ok((Self { puncher: puncher.clone(), id, session, _share: share }, waiting))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.puncher.sessions).remove(&self.id);
    }
}

/// A direct link to a node, with the help of a relay that both are registered at.
pub(crate) async fn initiate(
    puncher: Arc<Puncher>,
    relay: Endpoint,
    target: NodeId,
    key: Option<Fingerprint>,
) -> Result<Link, PunchError> {
    if puncher.config.hole_punching == HolePunching::Off {
        return Err(PunchError::Skipped);
    }
    let described = async { puncher.detection.description.subscribe().wait_for(Option::is_some).await.is_ok() };
    // Without it the attempt may be of the wrong kind, and still succeed.
    let _ = timeout(DESCRIBED_WITHIN, described).await;
    let session = ask(&puncher, &relay, &target).await?;
    let (peer, shown) = (session.coordinate.address, session.coordinate.key);
    let mut attempt = Attempt::new(&puncher, session, &relay).await?;
    let found = attempt.run().await.and_then(|found| found.ok_or(PunchError::Failed(PunchFailure::TimedOut)));
    attempt.session.tell_result(found.as_ref().map(drop).map_err(PunchError::failure));
    let (via, address) = found?;
    tracing::debug!(node = ?target, %peer, ?via, %address, "direct path found");
    let mut moves = attempt.moves.clone();
    let extra = attempt.keep(via, address);
    let connecting = puncher.net.dial_punched(address);
    let link = tokio::select! {
        connected = timeout(CONNECT_TIMEOUT, connecting) => connected.unwrap_or(Err(ConnectError::TimedOut)),
        // The path was the old socket's. The sender is the node's.
        Ok(()) = moves.changed() => return Err(PunchError::Failed(PunchFailure::Interrupted)),
    };
    let mut link = link.map_err(PunchError::Connect)?;
    link.extra = extra;
    if link.shown != Some(shown) {
        link.close();
        return Err(PunchError::Connect(ConnectError::Untrusted));
    }
    let admitted =
        timeout(CONNECT_TIMEOUT, puncher.keys.admit(&PeerName::Node(target), Said { key, registered: true }, link))
            .await;
    admitted.unwrap_or(Err(ConnectError::TimedOut)).map_err(PunchError::Connect)
}

async fn ask(puncher: &Arc<Puncher>, relay: &Endpoint, target: &NodeId) -> Result<PunchSession, PunchError> {
    let give_up = Instant::now() + DESCRIBED_WITHIN;
    let mut pause = ASK_AGAIN;
    loop {
        match puncher.clients.punch(relay, target).await {
            Err(CircuitError::Refused(Refusal::NotReady)) if Instant::now() < give_up => sleep(pause).await,
            asked => return Ok(asked?),
        }
        pause *= 2;
    }
}

/// Lets another node find a direct path to this one.
pub(crate) async fn respond(puncher: Arc<Puncher>, mut session: PunchSession, relay: Endpoint) {
    if puncher.config.hole_punching == HolePunching::Off {
        return session.tell_result(Err(PunchFailure::NotAllowed));
    }
    let mut attempt = match Attempt::new(&puncher, session, &relay).await {
        Ok(attempt) => attempt,
        Err(error) => return tracing::debug!(%error, "no attempt to find a direct path"),
    };
    let found = attempt.run().await;
    tracing::debug!(peer = ?attempt.session.coordinate.peer_id, ?found, "was looked for");
    match &found {
        // The initiator says it.
        Ok(_) => attempt.session.close(),
        Err(error) => attempt.session.tell_result(Err(error.failure())),
    }
    let expected = std::mem::take(&mut attempt.expected);
    drop(attempt);
    if !expected.is_empty() {
        // The connection may still be on its way.
        sleep(EXPECTED_FOR).await;
    }
}

/// What an attempt begins with.
struct Beginning {
    entry: Entry,
    heard: mpsc::Receiver<Heard>,
    punch: Punch,
    hard: Option<OwnedSemaphorePermit>,
}

/// One session on its way.
struct Attempt {
    puncher: Arc<Puncher>,
    socket: Arc<Socket>,
    session: PunchSession,
    entry: Entry,
    heard: mpsc::Receiver<Heard>,
    role: Role,
    punch: Punch,
    /// What `ReceivedBy::Extra` counts.
    sockets: Vec<Extra>,
    /// The tasks that listen at those which QUIC does not use yet.
    listening: JoinSet<Heard>,
    /// Addresses that the other node may connect from.
    expected: Vec<Expectation>,
    /// It has done so.
    connected: Arc<Notify>,
    /// Told when the socket is another one.
    moves: watch::Receiver<()>,
    _hard: Option<OwnedSemaphorePermit>,
}

enum Extra {
    Ours(Arc<UdpSocket>),
    /// QUIC uses it too.
    Shared(Arc<ExtraGuard>),
    Closed,
}

impl Attempt {
    /// Otherwise the other node is told why not.
    async fn new(puncher: &Arc<Puncher>, mut session: PunchSession, relay: &Endpoint) -> Result<Self, PunchError> {
        // Before the socket is looked at.
        let moves = puncher.net.moves();
        match Self::begin(puncher, &mut session, relay).await {
            Ok(Beginning { entry, heard, punch, hard }) => Ok(Self {
                puncher: puncher.clone(),
                socket: puncher.net.socket(),
                entry,
                heard,
                role: session.coordinate.role,
                punch,
                sockets: Vec::new(),
                listening: JoinSet::new(),
                expected: Vec::new(),
                connected: Arc::default(),
                moves,
                _hard: hard,
                session,
            }),
            Err(error) => {
                session.tell_result(Err(error.failure()));
                Err(error)
            }
        }
    }

    async fn begin(
        puncher: &Arc<Puncher>,
        session: &mut PunchSession,
        relay: &Endpoint,
    ) -> Result<Beginning, PunchError> {
        let coordinate = &session.coordinate;
        if !is_of_one(coordinate.address) {
            return Err(CircuitError::NotARelay.into());
        }
        let (role, theirs) = (coordinate.role, coordinate.profile);
        let id = signal_id(coordinate.session_id.as_bytes());
        let key = Key::from(&Secret::from(coordinate.secret));
        let ip = coordinate.address.ip();
        let (entry, heard) = Entry::new(puncher, id, key, other(role), Client::new(coordinate.key, ip))?;
        let Description { profile: ours, candidates: own } =
            puncher.detection.description.borrow().clone().unwrap_or_default();
        let allowed = puncher.config.hole_punching == HolePunching::On;
        let strategy = Strategy::choose(&ours, &theirs, allowed);
        let hard = match strategy {
            Strategy::BirthdayOpen | Strategy::BirthdayProbe => {
                Some(puncher.hard(role, network(ip)).ok_or(PunchError::Failed(PunchFailure::Busy))?)
            }
            _ => None,
        };
        if strategy.predicts(&ours)
            && let Some(last) = nat::sample(&puncher.detection, relay).await
        {
            session.tell_ports(ours.predict(last.port()));
        }
        let told = session.ports.try_recv().unwrap_or_default();
        let coordinate = &session.coordinate;
        let now = Instant::now();
        let candidates = coordinate.candidates.iter().filter(|to| is_local(**to) && !own.contains(to));
        let setup = Setup {
            role,
            ours,
            theirs,
            peer: coordinate.address,
            ports: told,
            candidates: candidates.copied().collect(),
            hard: allowed,
            begin: session.told + coordinate.delay.min(LONGEST_DELAY),
            seed: fastrand::u64(..),
        };
        Ok(Beginning { entry, heard, punch: Punch::new(setup, now), hard })
    }

    /// The path that was found. `None`: there is one, which is the initiator's choice.
    async fn run(&mut self) -> Result<Option<(punch::Via, SocketAddr)>, PunchError> {
        let mut met = false;
        let mut given_up = None;
        loop {
            while let Some(action) = self.punch.poll(Instant::now()) {
                match action {
                    Action::Open(count) => self.open(count),
                    Action::Send { via, to, signal } => self.send(via, to, signal),
                    Action::Proven { via, to } if self.role == Role::Initiator => return Ok(Some((via, to))),
                    Action::Proven { .. } => met = true,
                    Action::Over(_) if met => return Ok(None),
                    Action::Over(failure) => return Err(given_up.unwrap_or(failure).into()),
                }
            }
            // Without a path it would have been over.
            let Some(next) = self.punch.next(Instant::now()) else { return Ok(None) };
            tokio::select! {
                Some(heard) = self.heard.recv() => self.hear(heard),
                Some(Ok(heard)) = self.listening.join_next() => self.hear(heard),
                // None, here and below: the registration has ended. What is known of the session is enough.
                Some(ports) = self.session.ports.recv() => self.punch.learn_ports(&ports, Instant::now()),
                Some(result) = self.session.over.recv() => {
                    self.session.close();
                    met |= result.is_ok();
                    given_up = result.err();
                    self.punch.stop(Instant::now());
                }
                () = self.connected.notified() => {
                    met = true;
                    self.punch.stop(Instant::now());
                }
                // The sender is the node's.
                Ok(()) = self.moves.changed() => return Err(PunchError::Failed(PunchFailure::Interrupted)),
                () = sleep_until(next.into()) => {}
            }
        }
    }

    fn open(&mut self, count: u16) {
        let (limit, open) = (descriptors::limit(), descriptors::open());
        let allowed = macula_peer_core::descriptors::punching(count, limit, open);
        if allowed < count {
            tracing::debug!(count, allowed, limit, open, "fewer sockets than wanted: descriptors are short");
        }
        for _ in 0..allowed {
            match self.socket.open_beside() {
                Ok(socket) => {
                    // No more than were asked for.
                    let (index, socket) = (self.sockets.len() as u16, Arc::new(socket));
                    let peer = self.session.coordinate.address.ip();
                    self.listening.spawn(hear_first(socket.clone(), index, self.entry.session.clone(), peer));
                    self.sockets.push(Extra::Ours(socket));
                }
                // As many as there are will do, only less often.
                Err(error) => {
                    tracing::debug!(%error, opened = self.sockets.len(), "no more sockets");
                    break;
                }
            }
        }
        // No more than were asked for.
        self.punch.opened(self.sockets.len() as u16);
    }

    fn send(&mut self, via: punch::Via, to: SocketAddr, signal: punch::Signal) {
        if self.role == Role::Responder && matches!(signal, punch::Signal::Pong { .. }) {
            self.expect(via, to);
        }
        if !self.socket.addresses().may_signal(to) {
            return tracing::trace!(%to, "too much is sent there");
        }
        let (nonce, body) = match signal {
            punch::Signal::Ping { nonce } => (nonce, Body::Ping { sender: self.role }),
            punch::Signal::Pong { nonce } => (nonce, Body::Pong { sender: self.role }),
        };
        let encoded = Signal { id: self.entry.id, nonce, body }.encode(&self.entry.session.key);
        match via {
            punch::Via::Main => self.socket.send_signal(to, &encoded),
            punch::Via::Extra(index) => match self.sockets.get(usize::from(index)) {
                Some(Extra::Ours(socket)) => {
                    if let Some(to) = self.socket.reachable(to) {
                        // What is lost is sent again, or another one is. tokio does not know yet that there is room.
                        let _ = SockRef::from(&**socket).send_to(&encoded, &to.into());
                    }
                }
                Some(Extra::Shared(extra)) => self.socket.send_signal_by(extra.id, to, &encoded),
                Some(Extra::Closed) | None => {}
            },
        }
    }

    fn hear(&mut self, Heard { via, from, signal }: Heard) {
        let via = match via {
            HeardBy::Socket(ReceivedBy::Main) => punch::Via::Main,
            HeardBy::Socket(ReceivedBy::Extra(id)) => {
                let shared = |extra: &Extra| matches!(extra, Extra::Shared(guard) if guard.id == id);
                let Some(index) = self.sockets.iter().position(shared) else { return };
                // There are no more than were asked for.
                punch::Via::Extra(index as u16)
            }
            HeardBy::Extra(index) => {
                self.share(index, from);
                punch::Via::Extra(index)
            }
        };
        self.punch.received(via, from, signal, Instant::now());
    }

    /// From now on QUIC's packets may come by this socket.
    fn share(&mut self, index: u16, from: SocketAddr) {
        let Some(extra) = self.sockets.get_mut(usize::from(index)) else { return };
        let Extra::Ours(socket) = std::mem::replace(extra, Extra::Closed) else { return };
        // The task that listened there is over.
        let Some(socket) = Arc::into_inner(socket) else { return };
        match self.socket.share(socket, from) {
            Ok(guard) => *extra = Extra::Shared(Arc::new(guard)),
            Err(error) => tracing::debug!(%error, "no path over another socket"),
        }
    }

    /// The other node may connect from where it is answered.
    fn expect(&mut self, via: punch::Via, from: SocketAddr) {
        if self.expected.iter().any(|expected| expected.address == from) {
            return;
        }
        let extra = match via {
            punch::Via::Extra(index) => match self.sockets.get(usize::from(index)) {
                Some(Extra::Shared(extra)) => Some(extra.clone()),
                _ => return,
            },
            punch::Via::Main => None,
        };
        let (key, connected) = (self.session.coordinate.key, self.connected.clone());
        self.expected.extend(self.puncher.expected.expect(from, key, extra, connected));
    }

    /// Has QUIC's packets take the path that was proven, which need not be the one that was heard last. The other sockets are
    /// closed.
    fn keep(mut self, via: punch::Via, address: SocketAddr) -> Option<Arc<ExtraGuard>> {
        let kept = match via {
            punch::Via::Extra(index) => self.sockets.drain(..).nth(index.into()),
            punch::Via::Main => None,
        };
        let (socket, extra) = (
            self.socket.clone(),
            match kept {
                Some(Extra::Shared(extra)) => extra,
                _ => return None,
            },
        );
        // After the others, whose routes end with them.
        drop(self);
        socket.route(address, extra.id);
        Some(extra)
    }
}

/// Waits at a socket for a first signal of the other node. What comes from elsewhere, whatever is written on it, must not take
/// another's way.
async fn hear_first(socket: Arc<UdpSocket>, index: u16, session: Session, peer: IpAddr) -> Heard {
    let mut buffer = [0; MAX_LEN + 1];
    loop {
        // What ICMP says of one address ends nothing.
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            sleep(AFTER_ERROR).await;
            continue;
        };
        let from = canonical(from);
        let signal = Unverified::parse(&buffer[..len]).and_then(|unverified| session.verify(&unverified));
        if let Some(signal) = signal.filter(|_| from.ip() == peer) {
            return Heard { via: HeardBy::Extra(index), from, signal };
        }
    }
}

/// Whether an address can be one host's.
fn is_of_one(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let many = ip.is_multicast() || ip == IpAddr::from(Ipv4Addr::BROADCAST);
    !many && !ip.is_unspecified() && address.port() != 0
}

/// The session's id is 16 random bytes; whoever makes others gets in the way of no one but himself.
fn signal_id(session_id: &[u8]) -> u64 {
    let mut id = [0; 8];
    let len = session_id.len().min(id.len());
    id[..len].copy_from_slice(&session_id[..len]);
    u64::from_be_bytes(id)
}

fn other(role: Role) -> Role {
    match role {
        Role::Initiator => Role::Responder,
        Role::Responder => Role::Initiator,
    }
}
