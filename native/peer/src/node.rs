//! What everything in an engine shares.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hashbrown::HashMap;
use macula_peer_core::access::Access;
use macula_peer_core::admission::Kick;
use macula_peer_core::errors::{CircuitError, ConnectError, Rejection, UndeliveredReason};
use macula_peer_core::proto::signal::{Kind, Unverified};
use macula_peer_core::reports::Reports;
use macula_peer_core::requests::Requests;
use macula_peer_core::shares;
use macula_peer_core::trust::{self, Answer, Facts, Mismatch, Verdict};
use macula_peer_core::types::{Dialect, Endpoint, Fingerprint, NodeId, Path, PeerName, RelayConfig, Target};
use macula_peer_wire::{MessageType, RawFrame, check_payload};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, RecvStream, SendStream};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{timeout, timeout_at};

use crate::admission::Admissions;
use crate::backlog::{Backlog, Sender};
use crate::config::{Config, Shares};
use crate::counters::NodeCounters;
use crate::decoding::Decoding;
use crate::dial::{Dialer, SecondDials};
use crate::event::{Event, Registration};
use crate::expected::Expected;
use crate::frame_memory::FrameMemory;
use crate::gateway::Gateway;
use crate::handshake::not_connected;
use crate::identity::Identity;
use crate::inbound::{Fallback, Handler, Inbound, NotTaken, Route, Unhandled};
use crate::known_keys::KnownKeys;
use crate::lifecycle::Lifecycle;
use crate::link::Link;
use crate::listen::{Accepted, AcceptedTable, Admission};
use crate::message::{Asker, Letter};
use crate::names::Resolver;
use crate::nat::Nat;
use crate::peer::{self, Peer};
use crate::places::Places;
use crate::ports::Ports;
use crate::punch::Puncher;
use crate::relay::clients::Clients;
use crate::relay::registration::Description;
use crate::relay::responder::{Closed, Responder};
use crate::relay::server::Relay;
use crate::runtime::BatchingRuntime;
use crate::session::receive::Sessions;
use crate::shares::Unread;
use crate::socket::{self, Current, Received, Refusals, Signals, Socket, Via};
use crate::stats::Stats;
use crate::sync::{lock, now_or_never};
use crate::tls::Verify;
use crate::turns::Queue;
use crate::{hello, succession};

/// How long events wait for the first handler: the one of the settings is set once the engine has started.
const EARLY: Duration = Duration::from_secs(1);
const MAX_EARLY: usize = 64;

/// How often the tables are looked through for what is too old.
const EXPIRE_EVERY: Duration = Duration::from_secs(30);

/// How long a node that shows another key than its name's may take to show the word of that key: then it is refused, and
/// the dial's time is not over yet.
const SUCCESSION_WITHIN: Duration = Duration::from_secs(2);

/// The tasks of a relay that has been closed let go of its ports as soon as they run.
const PORTS_FREE: Duration = Duration::from_secs(1);

/// How often to try to get the old port back.
const PORT_AGAIN: Duration = Duration::from_secs(1);

pub(crate) struct Node {
    pub(crate) config: Arc<Config>,
    pub(crate) identity: Identity,
    pub(crate) quic: quinn::Endpoint,
    pub(crate) refusals: Refusals,
    pub(crate) counters: NodeCounters,
    pub(crate) admissions: Arc<Admissions>,
    pub(crate) accepted: Mutex<AcceptedTable>,
    pub(crate) places: Arc<Places>,
    /// For frames above some kilobytes that are arriving.
    pub(crate) arriving: Arc<FrameMemory>,
    pub(crate) sessions: Arc<Sessions>,
    /// Those that this node was asked.
    pub(crate) requests: Arc<Mutex<Requests<Route>>>,
    pub(crate) unread: Unread,
    pub(crate) clients: Clients,
    /// Who may connect, while this node listens.
    pub(crate) listening: watch::Sender<Option<Admission>>,
    /// Addresses that nodes are about to connect from, whether this one listens or not.
    pub(crate) expected: Arc<Expected>,
    pub(crate) puncher: Puncher,
    /// Local ports beside the main socket's.
    pub(crate) ports: Arc<Ports>,
    second_dials: Arc<SecondDials>,
    /// What others need to know of this node to find a direct path to it. `None`: it does not know yet.
    pub(crate) description: watch::Sender<Option<Description>>,
    pub(crate) nat: Nat,
    resolver: Resolver,
    relay: RwLock<Option<ServingRelay>>,
    /// Of the relay that this node is, or was before.
    relay_closed: Mutex<Option<Closed>>,
    pub(crate) known: KnownKeys,
    tls: Arc<QuicClientConfig>,
    /// For a gateway on this host.
    gateway_tls: Arc<QuicClientConfig>,
    gateway: Option<Arc<Gateway>>,
    pub(crate) backlog: Arc<Backlog>,
    pub(crate) decoding: Arc<Decoding>,
    /// For handshakes to begin.
    pub(crate) handshakes: Arc<Queue<shares::Network>>,
    /// For those who have used up their time.
    pub(crate) busy: Arc<Queue<Sender>>,
    fallback: RwLock<Option<Arc<dyn Fallback>>>,
    socket: Mutex<BoundSocket>,
    /// For the local gateway, where the main socket is bound to an address that cannot reach it.
    loopback: Mutex<Option<(quinn::Endpoint, BoundSocket)>>,
    moves: watch::Sender<()>,
    signals: Signals,
    peers: RwLock<Peers>,
    handler: RwLock<Option<Arc<dyn Handler>>>,
    /// What was logged because no handler took it.
    reports: Mutex<Reports<Report>>,
    /// Events from the start, before the handler is set.
    early: Mutex<Option<Vec<Event>>>,
    pub(crate) lifecycle: Arc<Lifecycle>,
}

/// Who this node is, and whom it knows.
pub(crate) struct Keys {
    pub(crate) identity: Identity,
    pub(crate) known: KnownKeys,
}

/// The one socket, and QUIC on it.
pub(crate) struct Network {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) socket: Arc<Socket>,
    pub(crate) refusals: Refusals,
    pub(crate) signals: Signals,
}

#[derive(Default)]
struct Peers {
    /// At most `pool_size`.
    pool: HashMap<PeerName, Arc<Peer>>,
    /// Peers that have left the pool and still have something on its way, until it is over. They come back if they are
    /// wanted: another peer of the same name would overtake them.
    leaving: HashMap<PeerName, Arc<Peer>>,
}

impl Peers {
    fn leave(&mut self, peer: Arc<Peer>) {
        self.pool.remove(&peer.name);
        peer.retire();
        self.leaving.insert(peer.name.clone(), peer);
    }
}

/// What others say of the node that a link should lead to.
#[derive(Clone, Copy)]
pub(crate) struct Said {
    /// Its key, where it is known.
    pub(crate) key: Option<Fingerprint>,
    /// A relay says that the node at the other end is registered under the name.
    pub(crate) registered: bool,
}

impl Said {
    fn by(key: Option<Fingerprint>) -> Self {
        Self { key, registered: false }
    }
}

/// Another connection with the holder of a key.
fn elsewhere(node: &Weak<Node>) -> impl Fn(Fingerprint) -> Option<Connection> + Send + Sync + use<> {
    let node = node.clone();
    move |key| node.upgrade()?.connection_with(key)
}

struct ServingRelay {
    relay: Arc<Relay>,
    /// The task of its other sockets.
    answering: AbortHandle,
}

struct BoundSocket {
    socket: Current,
    errors: AbortHandle,
}

impl Node {
    pub(crate) fn new(
        config: Arc<Config>,
        keys: Keys,
        network: Network,
        tls: QuicClientConfig,
        gateway_tls: QuicClientConfig,
        clients: Clients,
        runtime: Handle,
    ) -> Arc<Self> {
        let Keys { identity, known } = keys;
        let Network { quic, socket, refusals, signals } = network;
        let lifecycle = Arc::new(Lifecycle::new(runtime));
        let errors = lifecycle.spawn(socket.clone().watch_errors());
        let admissions = Admissions::new(config.access.clone());
        let backlog = Arc::<Backlog>::default();
        let gateway = config.gateway.as_ref().map(|gateway| Arc::new(Gateway::new(gateway, &config)));
        let unread = Unread::new(config.limits.max_frame);
        let busy = Queue::new(config.workers.max(1));
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            sessions: Sessions::new(config.max_known_sessions, lifecycle.clone(), unread.clone(), elsewhere(this)),
            identity,
            quic,
            refusals,
            counters: NodeCounters::default(),
            admissions,
            accepted: Mutex::default(),
            arriving: FrameMemory::new(&config),
            places: Places::new(&Shares::default().limits(config.max_accepted)),
            requests: Arc::new(Mutex::new(Requests::new(config.max_known_requests))),
            config,
            unread,
            clients,
            listening: watch::Sender::new(None),
            expected: Arc::default(),
            puncher: Puncher::default(),
            ports: Arc::default(),
            second_dials: Arc::default(),
            description: watch::Sender::new(None),
            nat: Nat::default(),
            resolver: Resolver::new(),
            relay: RwLock::default(),
            relay_closed: Mutex::default(),
            known,
            tls: Arc::new(tls),
            gateway_tls: Arc::new(gateway_tls),
            gateway,
            decoding: Decoding::new(backlog.clone()),
            handshakes: Queue::new(1),
            busy,
            backlog,
            fallback: RwLock::default(),
            socket: Mutex::new(BoundSocket { socket: Current::new(socket), errors }),
            loopback: Mutex::default(),
            moves: watch::Sender::new(()),
            signals,
            peers: RwLock::default(),
            handler: RwLock::default(),
            reports: Mutex::default(),
            early: Mutex::new(Some(Vec::new())),
            lifecycle,
        })
    }

    /// Sends over the live link to a peer, if there is one with room.
    pub(crate) fn send_now(&self, target: &Target<'_>, message: Letter, now: Instant) -> Result<(), Letter> {
        // The table stays locked for reading meanwhile, which is cheaper than counting one more reference.
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let Some(peer) = peers.pool.get(target) else { return Err(message) };
        peer.send_now(message, now)?;
        self.counters.hits.add(1);
        Ok(())
    }

    pub(crate) fn find(&self, target: &Target<'_>) -> Option<Arc<Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.get(target).cloned()
    }

    /// The peer of a name. Makes room for a new one by letting the least recently used one go. `None` when the
    /// engine is stopping.
    pub(crate) fn peer(self: &Arc<Self>, target: &Target<'_>) -> Option<Arc<Peer>> {
        if let Some(peer) = self.find(target) {
            return Some(peer);
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_stopping() {
            return None;
        }
        if let Some(peer) = peers.pool.get(target) {
            return Some(peer.clone());
        }
        while peers.pool.len() >= self.config.pool_size.max(1) {
            // Addresses that nobody was reached at do not cost anybody a link.
            let oldest = peers.pool.values().min_by_key(|peer| (peer.is_linked(), peer.last_used()));
            if let Some(evicted) = oldest.cloned() {
                self.counters.evictions.add(1);
                peers.leave(evicted);
            }
        }
        let left = peers.leaving.remove(target).filter(|peer| peer.come_back());
        let peer = left.unwrap_or_else(|| {
            let peer = Peer::new(target.to_owned(), self.clone());
            self.spawn(peer::run(peer.clone()));
            peer
        });
        peers.pool.insert(peer.name.clone(), peer.clone());
        Some(peer)
    }

    /// Takes an idle peer out of the pool, unless it was used meanwhile.
    pub(crate) fn forget(&self, peer: &Arc<Peer>) {
        if let (PeerName::Gateway(_), Some(gateway)) = (&peer.name, &self.gateway) {
            return gateway.forget(peer);
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if self.instant(peer.last_used()) + self.config.idle_timeout > Instant::now() {
            return;
        }
        if peers.pool.get(&peer.name).is_some_and(|current| Arc::ptr_eq(current, peer)) {
            peers.leave(peer.clone());
        }
    }

    /// The task of a peer has ended.
    pub(crate) fn gone(&self, peer: &Arc<Peer>) {
        if let (PeerName::Gateway(_), Some(gateway)) = (&peer.name, &self.gateway) {
            return gateway.gone(peer);
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let Peers { pool, leaving } = &mut *peers;
        for table in [pool, leaving] {
            if table.get(&peer.name).is_some_and(|current| Arc::ptr_eq(current, peer)) {
                table.remove(&peer.name);
            }
        }
    }

    /// A direct link to an endpoint, if whoever is there is the peer.
    pub(crate) async fn dial(
        self: Arc<Self>,
        name: PeerName,
        endpoint: Endpoint,
        key: Option<Fingerprint>,
        until: Instant,
    ) -> Result<Link, ConnectError> {
        let mut dialer = self.dialer();
        if let (PeerName::Gateway(_), true) = (&name, endpoint.is_loopback()) {
            // Whoever may bind a port of this host could as well read this process's memory.
            dialer.tls = self.gateway_tls.clone();
            let loopback = endpoint.ip().unwrap_or(Ipv4Addr::LOCALHOST.into());
            if dialer.socket.get().reachable((loopback, endpoint.port()).into()).is_none() {
                (dialer.quic, dialer.socket) = self.loopback(loopback)?;
            }
        }
        let link = dialer.dial(endpoint, until).await?;
        match timeout_at(until.into(), self.admit(&name, Said::by(key), link)).await {
            Ok(admitted) => admitted,
            Err(_) => Err(ConnectError::TimedOut),
        }
    }

    /// A link through a relay.
    pub(crate) async fn circuit(
        self: &Arc<Self>,
        relay: &Endpoint,
        target: &NodeId,
        key: Option<Fingerprint>,
    ) -> Result<Link, CircuitError> {
        let (connection, relay) = self.clients.connect(self, relay, target).await?;
        let Config { limits, answer_timeout, .. } = *self.config;
        let witness = Arc::default();
        let path = Path::Relay(relay);
        let link = Link::new(connection, Dialect::MaculaPeer1, path, witness, limits, answer_timeout);
        let said = Said { key, registered: true };
        let link = self.admit(&PeerName::Node(target.clone()), said, link).await.map_err(CircuitError::Inner)?;
        // As for a direct link: streams are allowed once our certificate was looked at.
        let stream = link.connection.open_bi().await.map_err(|error| CircuitError::Inner(not_connected(error)))?;
        link.put_spare(stream);
        Ok(link)
    }

    /// Connections that the holder of a key began, direct ones first.
    pub(crate) fn accepted_from(&self, key: Fingerprint) -> Vec<Arc<Accepted>> {
        let mut found = lock(&self.accepted).of_key(&key);
        found.retain(|accepted| accepted.is_live());
        found.sort_by_key(|accepted| accepted.path.is_relayed());
        found
    }

    /// A connection with the holder of a key, whoever began it: a direct one, if there is one.
    pub(crate) fn connection_with(&self, key: Fingerprint) -> Option<Connection> {
        let accepted: Vec<_> = self.accepted_from(key);
        if let Some(direct) = accepted.first().filter(|accepted| !accepted.path.is_relayed()) {
            return Some(direct.connection().clone());
        }
        let accepted = accepted.into_iter().map(|accepted| (accepted.path, accepted.connection().clone()));
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let linked = peers.pool.values().filter_map(|peer| peer.link_with(key));
        let live = |connection: &Connection| connection.close_reason().is_none();
        let found = accepted.chain(linked).filter(|(_, connection)| live(connection));
        found.min_by_key(|(path, _)| path.is_relayed()).map(|(_, connection)| connection)
    }

    /// Somebody has connected: peers that are who it is can use the connection too.
    pub(crate) fn arrived(&self, key: Fingerprint) {
        for peer in self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.values() {
            if peer.is_expected_to_have(key) {
                peer.arrived();
            }
        }
    }

    /// A link to a node over a connection that it began. It allows streams when it has taken us for whom it wanted.
    pub(crate) async fn adopt(
        self: Arc<Self>,
        name: PeerName,
        accepted: Arc<Accepted>,
        key: Option<Fingerprint>,
    ) -> Result<Link, ConnectError> {
        let stream = accepted.connection().open_bi().await.map_err(not_connected)?;
        self.admit(&name, Said::by(key), self.adopted(accepted, stream)).await
    }

    /// The same, if it can be had at once.
    pub(crate) fn adopt_now(
        &self,
        name: &PeerName,
        accepted: &Arc<Accepted>,
        key: Option<Fingerprint>,
    ) -> Option<Link> {
        let stream = now_or_never(accepted.connection().open_bi())?.ok()?;
        let link = self.adopted(accepted.clone(), stream);
        if self.judge(name, Said::by(key), &link) != Ok(Verdict::Accept) {
            return None;
        }
        self.learn(name.node()?, Said::by(key), &link, None);
        Some(link)
    }

    fn adopted(&self, accepted: Arc<Accepted>, stream: (SendStream, RecvStream)) -> Link {
        let Config { limits, answer_timeout, .. } = *self.config;
        let connection = accepted.connection().clone();
        let link = Link::new(connection, Dialect::MaculaPeer1, accepted.path, Arc::default(), limits, answer_timeout);
        accepted.allow_answers();
        let link = link.over(accepted);
        link.put_spare(stream);
        link
    }

    /// A connection to a relay, kept alive as one.
    pub(crate) async fn dial_relay(&self, relay: Endpoint, until: Instant) -> Result<Connection, ConnectError> {
        let link = Dialer { to_relay: true, ..self.dialer() }.dial(relay, until).await?;
        self.counted_unverified(link.dialect);
        Ok(link.into_connection())
    }

    /// Lets a link carry messages for a peer if whoever is at the other end is that peer.
    pub(crate) async fn admit(&self, name: &PeerName, said: Said, link: Link) -> Result<Link, ConnectError> {
        if let PeerName::Node(node) = name {
            self.follow(node, said, &link).await;
        }
        let answered = match (name, self.judge(name, said, &link)) {
            (_, Err(error)) => Err(error),
            (PeerName::Node(node), Ok(Verdict::Ask)) => hello::ask(&link.connection, node).await.map(Some),
            (_, Ok(_)) => Ok(None),
        };
        match answered {
            Ok(answer) => {
                if let PeerName::Node(node) = name {
                    self.learn(node, said, &link, answer);
                }
                Ok(link)
            }
            Err(error) => {
                tracing::debug!(peer = %name, %error, at = %link.remote(), "not the peer");
                link.close();
                Err(error)
            }
        }
    }

    /// Binds a name to the key that a link shows if the key that it is bound to says so.
    async fn follow(&self, node: &NodeId, said: Said, link: &Link) {
        let (Some(shown), Dialect::MaculaPeer1) = (link.shown, link.dialect) else { return };
        let Verdict::Refuse(Mismatch::Bound(known)) = self.facts(node, said, link, |facts| facts.judge()) else {
            return;
        };
        let asked = timeout(SUCCESSION_WITHIN, hello::ask_succession(&link.connection, known)).await;
        let Ok(Some(statement)) = asked else { return };
        if succession::is_valid(&statement, known, shown, SystemTime::now())
            && self.known.with(|names| names.hand_on(node, known, shown, Instant::now()))
        {
            tracing::warn!(?node, before = %known, now = %shown, "a node has another key, as the one before says");
        }
    }

    /// Whether a link may carry messages for a peer, as far as the key tells.
    fn judge(&self, name: &PeerName, said: Said, link: &Link) -> Result<Verdict, ConnectError> {
        let node = match name {
            PeerName::Node(node) => node,
            PeerName::Endpoint(_) => return Ok(Verdict::Accept),
            PeerName::Gateway(_) if link.dialect == Dialect::Macula => return Ok(Verdict::Accept),
            PeerName::Gateway(endpoint) => {
                // Two engines that took each other for gateways would hand messages on for ever.
                tracing::warn!(%endpoint, "a node of this library listens where the local gateway should");
                return Err(ConnectError::NoProtocol);
            }
        };
        match self.facts(node, said, link, |facts| facts.judge()) {
            Verdict::Refuse(Mismatch::Ourselves) => Err(ConnectError::WrongNode),
            Verdict::Refuse(Mismatch::Named) => Err(ConnectError::Untrusted),
            Verdict::Refuse(Mismatch::Bound(known)) => {
                self.tell_mismatch(node, known, link.shown);
                Err(ConnectError::Untrusted)
            }
            verdict => Ok(verdict),
        }
    }

    /// Remembers the key of a node that was reached. `answer`: to whether it has the node id, if it was asked.
    fn learn(&self, node: &NodeId, said: Said, link: &Link, answer: Option<Answer>) {
        let (Some(shown), Dialect::MaculaPeer1) = (link.shown, link.dialect) else { return };
        // Without an answer, the key is the one that the name is bound to, or a relay vouched for it.
        if answer.is_none_or(|answer| self.facts(node, said, link, |facts| facts.binds(answer))) {
            self.known.with(|known| known.bind(node.clone(), shown, Instant::now()));
        }
    }

    fn facts<T>(&self, node: &NodeId, said: Said, link: &Link, decide: impl FnOnce(&Facts<'_>) -> T) -> T {
        let waiting = self.find(&Target::Node(node)).map_or_else(Vec::new, |peer| peer.keys_of_waiting());
        let now = Instant::now();
        let (bound, disowned) = self.known.with(|known| (known.key_of(node, now), known.is_disowned(node, link.shown)));
        decide(&Facts {
            own: self.identity.fingerprint(),
            shown: link.shown,
            dialect: link.dialect,
            named: said.key,
            registered: said.registered,
            bound,
            disowned,
            enforced: self.enforces_bindings(),
            waiting: &waiting,
        })
    }

    fn tell_mismatch(&self, node: &NodeId, known: Fingerprint, shown: Option<Fingerprint>) {
        if self.known.with(|known| known.is_first_mismatch(node)) {
            tracing::warn!(
                ?node, %known, ?shown,
                "a node shows another key than before and gets no messages. If it lost its key in a restart, set \
                 identity_file on that node, so that it keeps its key from now on, and call \
                 macula_peer_node:forget(NodeId) on this node to accept the new one.",
            );
        }
    }

    fn enforces_bindings(&self) -> bool {
        !matches!(self.config.verify, Verify::None)
    }

    /// The key that a node id is bound to, unless bindings are not enforced.
    pub(crate) fn known_key(&self, node: &NodeId) -> Option<Fingerprint> {
        if !self.enforces_bindings() {
            return None;
        }
        self.known.with(|known| known.key_of(node, Instant::now()))
    }

    /// The node with this key says that it does not have the node id.
    pub(crate) fn disown(&self, node: &NodeId, key: Fingerprint) {
        self.known.with(|known| known.disown(node, key));
    }

    /// The next node that has this id may have any key.
    pub(crate) fn forget_key(&self, node: &NodeId) {
        self.known.with(|known| known.forget(node));
        if let Some(peer) = self.find(&Target::Node(node)) {
            peer.invalidate();
        }
    }

    /// What this node says when it is asked whether it has a node id. `None`: it has another one.
    pub(crate) fn answer(&self, asked: &[u8]) -> Option<Answer> {
        self.clients.with_name(|registered| {
            let own = registered.or(self.config.node_id.as_ref());
            trust::answer(own, &self.identity.fingerprint(), asked)
        })
    }

    /// Whether a message for this node id is for this node. Empty: for any node.
    pub(crate) fn serves(&self, target: &[u8]) -> bool {
        target.is_empty() || self.answer(target).is_some()
    }

    /// This node as a relay, if it is one.
    pub(crate) fn relay(&self) -> Option<Arc<Relay>> {
        let serving = self.relay.read().unwrap_or_else(PoisonError::into_inner);
        serving.as_ref().map(|serving| serving.relay.clone())
    }

    /// From now on this node is such a relay. Waits a moment where it has just been another one.
    pub(crate) fn become_relay(self: &Arc<Self>, config: RelayConfig) -> std::io::Result<()> {
        self.be_no_relay();
        let bind = || {
            let _inside = self.lifecycle.enter();
            let reserved = self.config.reserved_port(None);
            Responder::bind(self.socket().local().ip(), config.probe_ip, config.probe_port, reserved)
        };
        let before = lock(&self.relay_closed).take();
        let (responder, closed) = match (bind(), before) {
            (Err(error), Some(before)) if error.kind() == ErrorKind::AddrInUse => {
                before.wait(PORTS_FREE);
                bind()?
            }
            (bound, _) => bound?,
        };
        *lock(&self.relay_closed) = Some(closed);
        let answering = self.spawn(responder.clone().answer_others(Arc::downgrade(self)));
        self.set_relay(Some(ServingRelay { relay: Relay::new(config, responder, self.admissions.clone()), answering }));
        Ok(())
    }

    /// From now on this node is no relay.
    pub(crate) fn be_no_relay(&self) {
        self.set_relay(None);
    }

    fn set_relay(&self, relay: Option<ServingRelay>) {
        let before = std::mem::replace(&mut *self.relay.write().unwrap_or_else(PoisonError::into_inner), relay);
        if let Some(ServingRelay { relay, answering }) = before {
            relay.close();
            answering.abort();
        }
    }

    /// Sets which nodes may connect to this one. Those that are connected and may not be have to go.
    pub(crate) fn set_access(&self, access: Access) {
        self.admissions.set_access(access);
        // Nodes that are registered here are told why they have to go, and their connections end with that.
        let told = self.relay().map_or_else(HashSet::default, |relay| relay.enforce_access());
        self.admissions.enforce(&told);
    }

    /// Makes somebody leave. Returns whether it was here.
    pub(crate) fn kick(&self, whom: &Kick) -> bool {
        self.admissions.kick(whom);
        let told = self.relay().map_or_else(HashSet::default, |relay| relay.kick(whom));
        let closed = matches!(whom, Kick::Key(key) if self.admissions.dismiss_key(*key, &told));
        closed || !told.is_empty()
    }

    pub(crate) fn dialer(&self) -> Dialer {
        Dialer {
            to_relay: false,
            initial_round_trip: None,
            quic: self.quic.clone(),
            socket: self.current_socket(),
            refusals: self.refusals.clone(),
            ports: self.ports.clone(),
            second_dials: self.second_dials.clone(),
            resolver: self.resolver.clone(),
            tls: self.tls.clone(),
            config: self.config.clone(),
        }
    }

    /// QUIC on a socket at this address of the host, for a gateway that the main socket cannot reach.
    fn loopback(&self, ip: IpAddr) -> Result<(quinn::Endpoint, Current), ConnectError> {
        let mut loopback = lock(&self.loopback);
        if let Some((quic, bound)) = &*loopback {
            return Ok((quic.clone(), bound.socket.clone()));
        }
        let _inside = self.lifecycle.enter();
        let open = || {
            // It gets no signals.
            let (signals, _) = socket::signals();
            let reserved = self.config.reserved_port(Some(ip));
            let socket = Socket::bind(Some(ip), 0, reserved, self.refusals.clone(), signals, Arc::default())?;
            let mut config = self.identity.endpoint_config();
            // As on the main socket: the first bits of a packet tell QUIC from signals.
            config.grease_quic_bit(false);
            let batching = Arc::new(BatchingRuntime);
            let quic = quinn::Endpoint::new_with_abstract_socket(config, None, socket.clone(), batching)?;
            Ok((quic, socket))
        };
        let (quic, socket) = open().map_err(|error: std::io::Error| {
            tracing::warn!(%error, %ip, "no socket to reach the local gateway from");
            ConnectError::OtherFamily
        })?;
        let errors = self.spawn(socket.clone().watch_errors());
        let socket = Current::new(socket);
        *loopback = Some((quic.clone(), BoundSocket { socket: socket.clone(), errors }));
        Ok((quic, socket))
    }

    /// The one socket.
    pub(crate) fn socket(&self) -> Arc<Socket> {
        self.current_socket().get()
    }

    /// The same, for tasks that may hold it for long.
    pub(crate) fn current_socket(&self) -> Current {
        lock(&self.socket).socket.clone()
    }

    /// Tells when [`Node::socket`] is another one from now on.
    pub(crate) fn moves(&self) -> watch::Receiver<()> {
        self.moves.subscribe()
    }

    /// Hands out what comes over the socket and is not QUIC's, until the engine stops.
    pub(crate) async fn hear_signals(self: Arc<Self>, mut signals: mpsc::Receiver<(Via, Received)>) {
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                Some((via, received)) = signals.recv() => self.hear(via, &received),
                // Also if it was said before this task first ran.
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    fn hear(&self, via: Via, received: &Received) {
        match Unverified::parse(received.bytes()).map(|signal| signal.kind()) {
            Some(Kind::ProbeRequest) if via == Via::Main => {
                if let Some(relay) = self.relay() {
                    relay.responder().answer_main(self, received);
                }
            }
            Some(Kind::ProbeReply) if via == Via::Main => self.nat.hear(received),
            Some(Kind::Ping | Kind::Pong) => self.puncher.received(via, received),
            _ => {}
        }
    }

    /// Moves the endpoint, with its live links, to another local address.
    pub(crate) fn rebind(&self, ip: Option<IpAddr>, port: u16) -> std::io::Result<()> {
        let _inside = self.lifecycle.enter();
        let reserved = self.config.reserved_port(ip);
        let (refusals, signals) = (self.refusals.clone(), self.signals.clone());
        let addresses = self.socket().addresses().clone();
        let socket = Socket::bind(ip, port, reserved, refusals, signals, addresses)?;
        self.quic.rebind_abstract(socket.clone())?;
        let errors = self.spawn(socket.clone().watch_errors());
        let mut bound = lock(&self.socket);
        bound.socket.set(socket);
        std::mem::replace(&mut bound.errors, errors).abort();
        drop(bound);
        self.ports.clear();
        self.moves.send_replace(());
        self.nat.look();
        Ok(())
    }

    /// Replaces the socket when it is broken, until the engine stops. Its port is kept if possible, because peers know
    /// it.
    pub(crate) async fn mend_socket(self: Arc<Self>) {
        let mut stopping = self.stopping();
        let mut moves = self.moves();
        let mut wanted = None;
        loop {
            let socket = self.socket();
            tokio::select! {
                () = socket.broken() => {}
                () = tokio::time::sleep(PORT_AGAIN), if wanted.is_some() => {}
                Ok(()) = moves.changed() => {
                    // Somebody has moved it meanwhile.
                    wanted = None;
                    continue;
                }
                // Also if it was said before this task first ran.
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            wanted = self.replace_socket(&socket, wanted);
            moves.mark_unchanged();
        }
    }

    /// Binds a socket instead of one that is broken or at the wrong port. Returns the port that is still wanted.
    fn replace_socket(&self, old: &Socket, wanted: Option<u16>) -> Option<u16> {
        if !std::ptr::eq(old, &*self.socket()) {
            // Somebody has moved it meanwhile.
            return None;
        }
        let (ip, port) = (old.local().ip(), wanted.unwrap_or(old.local().port()));
        let ip = (!ip.is_unspecified()).then_some(ip);
        let bound = match self.rebind(ip, port) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() != ErrorKind::AddrInUse => Err(error),
            // The old socket has it until quinn drops that.
            Err(_) if wanted.is_none() => self.rebind(ip, 0).map(|()| Some(port)),
            Err(_) => return wanted,
        };
        match bound {
            Ok(wanted) => {
                old.replaced();
                tracing::warn!(address = %self.socket().local(), "the socket failed and was replaced");
                wanted
            }
            Err(error) => {
                tracing::debug!(%error, "cannot replace the socket that failed");
                wanted
            }
        }
    }

    /// Forgets in time what is kept of strangers, also where no more come.
    pub(crate) async fn expire(self: Arc<Self>) {
        let mut stopping = self.stopping();
        while timeout(EXPIRE_EVERY, stopping.wait_for(|stopping| *stopping)).await.is_err() {
            // Unlocked in between, for those who wait.
            while lock(&self.requests).expire(Instant::now()) {
                tokio::task::yield_now().await;
            }
            self.socket().addresses().expire();
        }
    }

    /// Logs early events if there is no handler by then.
    pub(crate) async fn end_early(self: Arc<Self>) {
        let mut stopping = self.stopping();
        let _ = timeout(EARLY, stopping.wait_for(|stopping| *stopping)).await;
        self.tell_early();
    }

    /// Runs a task for as long as the engine runs.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.lifecycle.spawn(task)
    }

    pub(crate) fn set_handler(self: &Arc<Self>, handler: Option<Arc<dyn Handler>>) {
        let is_set = handler.is_some();
        *self.handler.write().unwrap_or_else(PoisonError::into_inner) = handler;
        if is_set && lock(&self.early).is_some() {
            // All events come from the engine's threads, or some would overtake others on their way to the handler.
            let node = self.clone();
            self.spawn(async move { node.tell_early() });
        }
    }

    fn tell_early(&self) {
        // Locked, so that newer events do not overtake these.
        let mut early = lock(&self.early);
        early.take().into_iter().flatten().for_each(|event| self.tell_or_log(event));
    }

    pub(crate) fn set_fallback(&self, fallback: Option<Arc<dyn Fallback>>) {
        *self.fallback.write().unwrap_or_else(PoisonError::into_inner) = fallback;
    }

    /// Hands a frame to the local gateway or to the handler, in the order of the calls. An error: nobody here can take
    /// such a message, and it is counted. That nobody is there is none.
    pub(crate) fn deliver(
        self: &Arc<Self>,
        frame: RawFrame,
        inbound: impl FnOnce(MessageType, Bytes) -> Inbound,
    ) -> Result<(), Rejection> {
        let wanted = |gateway: &&Arc<Gateway>| gateway.is_wanted(self.has_handler());
        let Some(gateway) = self.gateway.as_ref().filter(wanted) else { return self.deliver_here(frame, inbound) };
        let Some(kind) = MessageType::from_id(frame.type_id()) else { return Err(self.malformed()) };
        let whole = frame.bytes().clone();
        gateway.take(self, whole, inbound(kind, frame.into_payload()))
    }

    /// Hands a frame to the handler.
    pub(crate) fn deliver_here(
        &self,
        frame: RawFrame,
        inbound: impl FnOnce(MessageType, Bytes) -> Inbound,
    ) -> Result<(), Rejection> {
        match MessageType::from_id(frame.type_id()) {
            Some(kind) => match self.to_handler(inbound(kind, frame.into_payload())) {
                Err(Unhandled::Malformed(error)) => Err(Rejection::from(&error)),
                Ok(()) | Err(_) => Ok(()),
            },
            None => Err(self.malformed()),
        }
    }

    /// Whether a message like this can be handed over. Those that were not are found again by this.
    pub(crate) fn can_take(&self, frame: &RawFrame) -> Result<(), Rejection> {
        if MessageType::from_id(frame.type_id()).is_none() {
            return Err(Rejection::Malformed);
        }
        let for_gateway = self.gateway.as_ref().is_some_and(|gateway| gateway.is_wanted(self.has_handler()));
        match check_payload(frame.payload(), self.config.limits).map_err(|error| Rejection::from(&error)) {
            // What a gateway makes of it is not known here.
            Err(Rejection::Malformed) if for_gateway => Ok(()),
            checked => checked,
        }
    }

    /// Hands a message to the handler. What is not taken is counted.
    pub(crate) fn to_handler(&self, message: Inbound) -> Result<(), Unhandled> {
        let handled = match self.handler() {
            Some(handler) => handler.message(message),
            None => Err(Unhandled::NoHandler),
        };
        handled.inspect_err(|why| self.not_handled(why))
    }

    /// Hands a message that the local gateway did not take to the one who comes before the handler then.
    pub(crate) fn to_fallback(&self, message: Inbound) -> Result<(), NotTaken> {
        let fallback = self.fallback.read().unwrap_or_else(PoisonError::into_inner).clone();
        match fallback {
            Some(fallback) => fallback.message(message),
            None => Err(NotTaken::Absent(Box::new(message))),
        }
    }

    pub(crate) fn not_handled(&self, why: &Unhandled) {
        match why {
            Unhandled::Malformed(error) => {
                let _ = self.malformed();
                tracing::debug!(%error, "payload not read");
            }
            Unhandled::NoHandler | Unhandled::TooMany => {
                if self.counters.unhandled.add(1) == 0 {
                    tracing::warn!(%why, "messages arrive and nobody handles them");
                }
            }
        }
    }

    /// Counts a message that cannot be read.
    pub(crate) fn malformed(&self) -> Rejection {
        self.counters.malformed.add(1);
        Rejection::Malformed
    }

    /// Whether the local gateway, if there is one, is at the other end of a link.
    pub(crate) fn is_gateway(&self, name: &PeerName, link: &Link) -> bool {
        self.gateway.as_ref().is_some_and(|gateway| gateway.is(name, link))
    }

    /// A link to the local gateway is up.
    pub(crate) fn gateway_found(&self) {
        if let Some(gateway) = &self.gateway {
            gateway.found();
        }
    }

    /// The local gateway has answered a message that was handed over.
    pub(crate) fn gateway_answered(&self, asker: &Asker, frame: RawFrame) {
        if let Some(gateway) = &self.gateway {
            gateway.answered(asker, frame);
        }
    }

    /// Whether too many messages wait: for the local gateway, or from this sender for the handler.
    pub(crate) fn is_crowded(&self, sender: Sender) -> bool {
        self.backlog.is_full(sender) || self.gateway.as_ref().is_some_and(|gateway| gateway.is_crowded())
    }

    /// Waits until they are fewer: nothing is read that could not be handed over.
    pub(crate) async fn room(&self, sender: Sender) {
        self.backlog.room(sender).await;
        if let Some(gateway) = &self.gateway {
            gateway.room().await;
        }
    }

    pub(crate) fn undelivered(&self, event: Event, count: u64) {
        self.counters.undelivered.add(count);
        self.event(event);
    }

    pub(crate) fn event(&self, event: Event) {
        match &mut *lock(&self.early) {
            Some(early) if early.len() < MAX_EARLY => return early.push(event),
            Some(_) => return self.log(Report::of(&event)),
            None => {}
        }
        self.tell_or_log(event);
    }

    fn tell_or_log(&self, event: Event) {
        let report = Report::of(&event);
        if !self.tell(event) {
            self.log(report);
        }
    }

    fn log(&self, report: Option<(Report, u64)>) {
        if let Some((report, times)) = report
            && let Some(times) = lock(&self.reports).happened(report.clone(), times, Instant::now())
        {
            report.log(times);
        }
    }

    /// Tells only the handler. Returns whether there was one.
    pub(crate) fn tell(&self, event: Event) -> bool {
        tracing::debug!(?event);
        self.handler().is_some_and(|handler| handler.event(event))
    }

    /// Counts a new link if its peer may be anybody.
    pub(crate) fn counted_unverified(&self, dialect: Dialect) {
        if self.config.verify.leaves_open(dialect) && self.counters.unverified.add(1) == 0 {
            tracing::warn!("a peer's certificate is not verified, and it may be anybody; statistics count such links");
        }
    }

    /// Milliseconds since the start: what fits an atomic.
    pub(crate) fn clock(&self, now: Instant) -> u64 {
        self.lifecycle.clock(now)
    }

    pub(crate) fn instant(&self, clock: u64) -> Instant {
        self.lifecycle.instant(clock)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.lifecycle.is_stopping()
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.lifecycle.stopping()
    }

    /// Ends every task; peers have their time to send what is on its way.
    pub(crate) async fn stop(self: &Arc<Self>) {
        let peers = {
            let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
            self.lifecycle.stop();
            std::mem::take(&mut *peers)
        };
        self.clients.stop();
        self.be_no_relay();
        for peer in peers.pool.values().chain(peers.leaving.values()) {
            peer.retire();
        }
        drop(peers);
        lock(&self.socket).errors.abort();
        self.ports.clear();
        self.second_dials.end();
        let loopback = lock(&self.loopback).take();
        if let Some((_, bound)) = &loopback {
            bound.errors.abort();
        }
        self.lifecycle.ended().await;
        self.set_handler(None);
        for quic in loopback.iter().map(|(quic, _)| quic).chain([&self.quic]) {
            quic.close(0u8.into(), b"");
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.counters;
        // Looked at without the tables' locks: each link has a lock of its own, which its packets may hold.
        let peers: Vec<_> = self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.values().cloned().collect();
        let accepted = lock(&self.accepted).all();
        let made_room = lock(&self.requests).made_room();
        let records = [
            ("sessions", self.sessions.over()),
            ("requests", made_room.requests),
            ("kept_answers", made_room.answers),
            ("frame_memory", self.arriving.waited()),
        ];
        Stats {
            peers: peers.iter().map(|peer| peer.stats()).collect(),
            accepted: accepted.iter().map(|accepted| accepted.stats()).collect(),
            hits: counters.hits.get(),
            misses: counters.misses.get(),
            evictions: counters.evictions.get(),
            unverified: counters.unverified.get(),
            undelivered: counters.undelivered.get(),
            unhandled: counters.unhandled.get(),
            malformed: counters.malformed.get(),
            refused: self.places.refused().chain(records).collect(),
            admission: self.admissions.stats(),
            sessions: self.sessions.len(),
            registrations: self.clients.stats(),
            relay: self.relay().map(|relay| relay.stats()),
            gateway: self.gateway.as_ref().map(|gateway| gateway.stats()),
        }
    }

    fn has_handler(&self) -> bool {
        self.handler.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn handler(&self) -> Option<Arc<dyn Handler>> {
        self.handler.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What to log of an event that no handler takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Report {
    Undelivered(PeerName, UndeliveredReason),
    NotRegistered(Endpoint, Registration),
}

impl Report {
    /// With how many times it happened.
    fn of(event: &Event) -> Option<(Self, u64)> {
        match event {
            Event::Undelivered { peer, count, reason } => Some((Self::Undelivered(peer.clone(), *reason), *count)),
            Event::Registration { relay, state: state @ (Registration::Lost | Registration::Refused(_)) } => {
                Some((Self::NotRegistered(relay.clone(), *state), 1))
            }
            _ => None,
        }
    }

    fn log(&self, times: u64) {
        match self {
            Self::Undelivered(peer, reason) => {
                tracing::warn!(%peer, %reason, count = times, "accepted messages were not delivered, and no handler takes the event");
            }
            Self::NotRegistered(relay, Registration::Refused(refusal)) => {
                let reason = refusal.name();
                tracing::warn!(%relay, reason, times, "the relay refuses the registration, and no handler takes the event");
            }
            Self::NotRegistered(relay, _) => {
                tracing::warn!(%relay, times, "the registration at the relay was lost, and no handler takes the event");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::thread::{self, ThreadId};

    use macula_peer_core::types::EndpointRef;

    use super::*;
    use crate::relay::testing::{PATIENCE, client_config, endpoint, transport};
    use crate::{Engine, Listen};

    /// The counts of the events, and the threads that told them.
    #[derive(Default)]
    struct Told(Mutex<Vec<(u64, ThreadId)>>);

    impl Handler for Told {
        fn message(&self, _: Inbound) -> Result<(), Unhandled> {
            Ok(())
        }

        fn event(&self, event: Event) -> bool {
            if let Event::Undelivered { count, .. } = event {
                lock(&self.0).push((count, thread::current().id()));
            }
            true
        }
    }

    #[test]
    fn early_events_are_told_first_and_by_the_engine() {
        let engine = Engine::start(Config::default()).unwrap();
        let (node, told) = (engine.node().clone(), Arc::new(Told::default()));
        let (peer, reason) = (PeerName::Node(NodeId::new(b"peer").unwrap()), UndeliveredReason::LinkLost);
        let event = move |count| Event::Undelivered { peer: peer.clone(), count, reason };
        (0..10).for_each(|count| node.event(event(count)));
        engine.set_handler(Some(told.clone()));
        node.event(event(10));
        let later = node.clone();
        node.spawn(async move { (11..20).for_each(|count| later.event(event(count))) });
        let until = Instant::now() + PATIENCE;
        while lock(&told.0).len() < 20 {
            assert!(Instant::now() < until, "{:?}", told.0);
            thread::sleep(Duration::from_millis(2));
        }
        let told = lock(&told.0).clone();
        assert_eq!(told.iter().map(|(count, _)| *count).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
        assert!(told[..10].iter().all(|(_, thread)| *thread != thread::current().id()), "{told:?}");
        drop(node);
        engine.stop();
    }

    /// Also while handshakes wait for an answer, which takes longer than the test if none comes.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_socket_that_fails_is_replaced_at_its_port() {
        let config = Config { connect_timeout: 10 * PATIENCE, ..Config::default() };
        let engine = Engine::start(config).unwrap();
        let port = engine.listen(Listen::default()).unwrap().port();
        let to = ([127, 0, 0, 1], port).into();
        let (dialler, config) = (endpoint(None), client_config(transport()));
        let before = dialler.connect_with(config.clone(), to, "node").unwrap().await.unwrap();
        let node = engine.node().clone();
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let endpoint = EndpointRef::parse(&silent.local_addr().unwrap().to_string()).unwrap().to_owned();
        let dial = node.dialer().dial(endpoint, Instant::now() + 10 * PATIENCE);
        let dialling = node.spawn(async move { drop(dial.await) });
        silent.set_read_timeout(Some(PATIENCE)).unwrap();
        silent.recv(&mut [0; 2048]).unwrap();
        node.socket().break_it();
        let old = Arc::downgrade(&node.socket());
        let until = Instant::now() + PATIENCE;
        let connected = loop {
            let connecting = dialler.connect_with(config.clone(), to, "node").unwrap();
            if let Ok(Ok(connection)) = timeout(Duration::from_secs(1), connecting).await {
                break connection;
            }
            assert!(Instant::now() < until, "{:?}", node.socket());
        };
        assert!(old.upgrade().is_none() && !dialling.is_finished());
        dialling.abort();
        assert_eq!(engine.local_address().unwrap().port(), port);
        assert_eq!(before.close_reason(), None);
        drop((node, before, connected));
        tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
    }
}
