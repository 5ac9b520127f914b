//! Makes the parts of a node, and hands each what it uses of the others.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use macula_peer_core::config::Config;
use macula_peer_core::errors::{CircuitError, PunchError};
use macula_peer_core::proto::signal::{SignalKind, Unverified};
use macula_peer_core::stats::Stats;
use macula_peer_core::types::{Endpoint, Fingerprint, NodeId, Target};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ServerConfig};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::admission::Admissions;
use crate::conn::{AcceptedTable, Conn, LinkOwner};
use crate::error::StartError;
use crate::expected::Expected;
use crate::gateway::Gateway;
use crate::identity::{Identity, PreviousKey};
use crate::inbox::Inbox;
use crate::keys::Keys;
use crate::known_keys::KnownKeys;
use crate::lifecycle::Lifecycle;
use crate::link::Link;
use crate::nat::{self, Detection, Nat};
use crate::net::{Net, ReceivedSignals, Tls};
use crate::pool::Pool;
use crate::punch::{self, Puncher};
use crate::relay::clients::{CircuitTls, Clients, Handles, Hooks};
use crate::relay::role::Role;
use crate::renewal::Renew;
use crate::server::{Parts, Server};
use crate::server_config::Admission;
use crate::socket::{Received, ReceivedBy};
use crate::surroundings::{Others, Surroundings, Waits};
use crate::tls::{self, Trust};
use crate::{listen, ports};

/// How often the tables are looked through for what is too old.
const EXPIRE_EVERY: Duration = Duration::from_secs(30);

pub(crate) struct Node {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) server: Arc<Server>,
    pub(crate) role: Arc<Role>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) detection: Arc<Detection>,
    puncher: Arc<Puncher>,
    gateway: Option<Arc<Gateway>>,
}

/// The contents of the files: this node's key, the keys of others, and which keys are trusted.
pub(crate) struct Secrets {
    identity: Identity,
    known: KnownKeys,
    trust: Trust,
    tls: Tls,
    circuits: QuicClientConfig,
    /// How nodes are admitted that come over paths that a relay knows.
    known_paths: Admission,
}

impl Secrets {
    pub(crate) fn load(config: &Config) -> Result<Self, StartError> {
        let identity = match &config.identity_file {
            Some(path) => Identity::load_or_create(path)?,
            None => Identity::generate()?,
        };
        let previous = |file: &PathBuf| {
            PreviousKey::load(file).map_err(|why| StartError::PreviousIdentity { file: file.clone(), why })
        };
        let previous: Vec<_> = config.previous_identity_files.iter().map(previous).collect::<Result<_, _>>()?;
        let identity = identity.after(previous);
        let known = KnownKeys::open(config.known_keys_file.as_deref())?;
        let trust = Trust::new(&config.verify)?;
        let peers = Arc::new(tls::client(&identity, &trust)?);
        let gateway = Arc::new(tls::client(&identity, &Trust::AnyKey)?);
        let circuits = tls::circuit_client(&identity, &trust)?;
        let circuit_server = tls::circuit_server(&identity, &trust)?;
        let known_paths = Admission::over_known_paths(circuit_server, config.verify.is_strict(), config);
        Ok(Self { identity, known, trust, tls: Tls { peers, gateway }, circuits, known_paths })
    }

    /// What is read from files and may change while the engine runs.
    pub(crate) fn renewed(&self) -> Option<Arc<dyn Renew>> {
        self.trust.renewed()
    }
}

/// What a node is made of.
struct Basis {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    net: Arc<Net>,
    identity: Identity,
    known: KnownKeys,
    known_paths: Admission,
    circuits: CircuitTls,
}

impl Node {
    /// Binds the socket and starts the tasks.
    pub(crate) fn start(config: Arc<Config>, secrets: Secrets, runtime: Handle) -> Result<Arc<Self>, StartError> {
        let Secrets { identity, known, tls, circuits, known_paths, .. } = secrets;
        let lifecycle = Arc::new(Lifecycle::new(runtime));
        let server = ServerConfig::clone(&known_paths.config);
        let bound = Net::bind(config.clone(), &identity, server.clone(), tls, lifecycle.clone());
        let (net, heard) = bound.map_err(StartError::Bind)?;
        let circuits = CircuitTls { client: circuits, server };
        let basis = Basis { config, lifecycle, net, identity, known, known_paths, circuits };
        let node = Arc::new_cyclic(|this| Self::wire(basis, this));
        node.start_tasks(heard);
        Ok(node)
    }

    fn wire(basis: Basis, this: &Weak<Self>) -> Self {
        let Basis { config, lifecycle, net, identity, known, known_paths, circuits } = basis;
        let keys = Arc::new(Keys::new(identity, known, config.clone(), waiting(this.clone())));
        let description = watch::Sender::new(None);
        let gateway = config.gateway.as_ref().map(|gateway| {
            let node = this.clone();
            let start = move |name, host| Some(node.upgrade()?.pool.start(name, host));
            Arc::new(Gateway::new(gateway, config.clone(), lifecycle.clone(), start))
        });
        let forward = gateway.clone().map(|gateway| Box::new(gateway) as _);
        let inbox = Inbox::new(config.limits, forward, lifecycle.clone());
        let accepted = Arc::<AcceptedTable>::default();
        let surroundings = Arc::new(Surroundings {
            config: config.clone(),
            lifecycle: lifecycle.clone(),
            net: net.clone(),
            keys: keys.clone(),
            inbox: inbox.clone(),
            accepted: accepted.clone(),
            description: description.clone(),
            others: this.clone(),
        });
        let pool = Pool::new(config.clone(), lifecycle.clone(), surroundings);
        let handles = Handles {
            config: config.clone(),
            lifecycle: lifecycle.clone(),
            net: net.clone(),
            keys: keys.clone(),
            inbox: inbox.clone(),
            description: description.subscribe(),
        };
        let clients = Clients::new(handles, circuits, hooks(this));
        let detection = Arc::new(Detection {
            config: config.clone(),
            lifecycle: lifecycle.clone(),
            net: net.clone(),
            inbox: inbox.clone(),
            clients: clients.clone(),
            nat: Arc::new(Nat::default()),
            description,
        });
        let admissions = Admissions::new(config.access.clone());
        let role = Role::new(config.clone(), lifecycle.clone(), net.clone(), admissions.clone());
        let elsewhere = elsewhere(accepted.clone(), Arc::downgrade(&pool));
        let arrived = arrived(Arc::downgrade(&pool));
        let expected = Arc::<Expected>::default();
        let parts = Parts {
            config: config.clone(),
            lifecycle: lifecycle.clone(),
            net: net.clone(),
            keys: keys.clone(),
            inbox: inbox.clone(),
            admissions,
            role: role.clone(),
            accepted,
            expected: expected.clone(),
            known_paths,
        };
        let server = Server::new(parts, elsewhere, arrived);
        let puncher = Puncher::new(detection.clone(), keys.clone(), expected);
        Self { config, lifecycle, net, keys, inbox, pool, server, role, clients, detection, puncher, gateway }
    }

    /// Tasks that run as long as the engine does.
    fn start_tasks(self: &Arc<Self>, heard: ReceivedSignals) {
        let Self { lifecycle, net, inbox, server, detection, .. } = &**self;
        let nat = detection.nat.clone();
        lifecycle.spawn(self.clone().hear_signals(heard));
        lifecycle.spawn(nat::run(detection.clone()));
        lifecycle.spawn(net.clone().mend_socket());
        lifecycle.spawn(look_when_moved(net.moves(), nat.clone(), lifecycle.stopping()));
        lifecycle.spawn(ports::run(net.ports.clone(), move || nat.look(), lifecycle.stopping()));
        lifecycle.spawn(inbox.clone().end_early());
        lifecycle.spawn(expire(server.clone(), net.clone(), lifecycle.stopping()));
        lifecycle.spawn(listen::accept(server.clone()));
    }

    /// The next node that has this id may have any key.
    pub(crate) fn forget_key(&self, node: &NodeId) {
        self.keys.forget(node);
        if let Some(peer) = self.pool.find(&Target::Node(node)) {
            peer.invalidate();
        }
    }

    /// Hands out what comes over the socket and is not QUIC's, until the engine stops.
    async fn hear_signals(self: Arc<Self>, mut signals: ReceivedSignals) {
        let mut stopping = self.lifecycle.stopping();
        loop {
            tokio::select! {
                Some((via, received)) = signals.recv() => self.hear(via, &received),
                // Also if it was said before this task first ran.
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    fn hear(&self, via: ReceivedBy, received: &Received) {
        match Unverified::parse(received.bytes()).map(|signal| signal.kind()) {
            Some(SignalKind::ProbeRequest) if via == ReceivedBy::Main => {
                if let Some(relay) = self.role.relay() {
                    relay.responder().answer_main(&self.net, received);
                }
            }
            Some(SignalKind::ProbeReply) if via == ReceivedBy::Main => self.detection.nat.hear(received),
            Some(SignalKind::Ping | SignalKind::Pong) => self.puncher.received(via, received),
            _ => {}
        }
    }

    /// Ends every task; peers have their time to send messages in flight.
    pub(crate) async fn stop(&self) {
        self.pool.stop();
        self.clients.stop();
        self.role.be_no_relay();
        self.net.stop();
        self.lifecycle.ended().await;
        self.inbox.set_handler(None);
        self.net.close();
    }

    pub(crate) fn stats(&self) -> Stats {
        let (pool, inbox) = (&self.pool, self.inbox.counts());
        Stats {
            peers: pool.stats(),
            accepted: self.server.accepted.stats(),
            hits: pool.hits.get(),
            misses: pool.misses.get(),
            evictions: pool.evictions.get(),
            unverified: self.keys.unverified(),
            undelivered: inbox.undelivered,
            unhandled: inbox.unhandled,
            malformed: inbox.malformed,
            refused: self.server.refused(),
            admission: self.server.admissions.stats(),
            sessions: self.server.sessions.len(),
            registrations: self.clients.stats(),
            relay: self.role.relay().map(|relay| relay.stats()),
            gateway: self.gateway.as_ref().map(|gateway| gateway.stats()),
        }
    }
}

impl Others for Node {
    fn connect<'a>(
        &'a self,
        relay: &'a Endpoint,
        target: &'a NodeId,
    ) -> Waits<'a, Result<(Connection, SocketAddr), CircuitError>> {
        Box::pin(self.clients.connect(relay, target))
    }

    fn punch(
        &self,
        relay: Endpoint,
        target: NodeId,
        key: Option<Fingerprint>,
    ) -> Waits<'static, Result<Link, PunchError>> {
        Box::pin(punch::initiate(self.puncher.clone(), relay, target, key))
    }

    fn relay_at(&self, relay: SocketAddr) -> Option<Endpoint> {
        self.clients.relay_at(relay)
    }

    fn serve(&self, conn: Arc<Conn>, owner: Weak<dyn LinkOwner>) -> Waits<'static, ()> {
        Box::pin(listen::serve_link(self.server.clone(), owner, conn))
    }
}

/// For each message that waits for a link to a node, the only key that may get it, if it names one.
fn waiting(node: Weak<Node>) -> impl Fn(&NodeId) -> Vec<Option<Fingerprint>> + Send + Sync {
    move |name| {
        let peer = node.upgrade().and_then(|node| node.pool.find(&Target::Node(name)));
        peer.map_or_else(Vec::new, |peer| peer.keys_of_waiting())
    }
}

/// A connection with the holder of a key, a direct one if there is one.
fn elsewhere(
    accepted: Arc<AcceptedTable>,
    pool: Weak<Pool>,
) -> impl Fn(Fingerprint) -> Option<Connection> + Send + Sync {
    move |key| {
        let accepted = accepted.from(key);
        if let Some(direct) = accepted.first().filter(|conn| !conn.path.is_relayed()) {
            return Some(direct.connection.clone());
        }
        let accepted = accepted.into_iter().map(|conn| (conn.path, conn.connection.clone()));
        let linked = pool.upgrade().map_or_else(Vec::new, |pool| pool.links_with(key));
        let live = |connection: &Connection| connection.close_reason().is_none();
        let found = accepted.chain(linked).filter(|(_, connection)| live(connection));
        found.min_by_key(|(path, _)| path.is_relayed()).map(|(_, connection)| connection)
    }
}

/// Tells the peers of a node that it has connected.
fn arrived(pool: Weak<Pool>) -> impl Fn(Fingerprint) + Send + Sync {
    move |key| {
        if let Some(pool) = pool.upgrade() {
            pool.arrived(key);
        }
    }
}

fn hooks(node: &Weak<Node>) -> Hooks {
    let [registered, moved, punch, circuit] = [(); 4].map(|()| node.clone());
    Hooks {
        registered: Box::new(move || registered.upgrade().into_iter().for_each(|node| node.detection.nat.look())),
        moved: Box::new(move || moved.upgrade().into_iter().for_each(|node| node.detection.nat.moved())),
        punch: Box::new(move |session, relay| {
            let Some(node) = punch.upgrade() else { return };
            let mut stopping = node.lifecycle.stopping();
            let puncher = node.puncher.clone();
            node.lifecycle.spawn(async move {
                tokio::select! {
                    () = punch::respond(puncher, session, relay) => {}
                    _ = stopping.wait_for(|stopping| *stopping) => {}
                }
            });
        }),
        circuit: Box::new(move |incoming| {
            let Some(node) = circuit.upgrade() else { return };
            let Some(place) = node.server.places.enter(incoming.relay.ip()) else { return };
            node.lifecycle.spawn(listen::accept_circuit(node.server.clone(), incoming, place));
        }),
    }
}

/// Has the NAT examined again: another socket has other mappings.
async fn look_when_moved(mut moves: watch::Receiver<()>, nat: Arc<Nat>, mut stopping: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            Ok(()) = moves.changed() => nat.look(),
            // Also if it was said before this task first ran.
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
    }
}

/// Forgets in time what is kept of strangers, also where no more come.
async fn expire(server: Arc<Server>, net: Arc<Net>, mut stopping: watch::Receiver<bool>) {
    while timeout(EXPIRE_EVERY, stopping.wait_for(|stopping| *stopping)).await.is_err() {
        server.expire().await;
        net.expire();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Mutex;
    use std::thread::{self, ThreadId};

    use macula_peer_core::types::EndpointRef;

    use super::*;
    use crate::inbound::{Handler, Inbound, Unhandled};
    use crate::relay::testing::{PATIENCE, client_config, endpoint, transport};
    use crate::{Engine, Listen};
    use macula_peer_core::errors::UndeliveredReason;
    use macula_peer_core::events::Event;
    use macula_peer_core::sync::lock;
    use macula_peer_core::types::PeerName;
    use std::time::Instant;

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
        (0..10).for_each(|count| node.inbox.event(event(count)));
        engine.set_handler(Some(told.clone()));
        node.inbox.event(event(10));
        let later = node.clone();
        node.lifecycle.spawn(async move { (11..20).for_each(|count| later.inbox.event(event(count))) });
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
        let net = node.net.clone();
        let dialling =
            node.lifecycle.spawn(async move { drop(net.dial(endpoint, Instant::now() + 10 * PATIENCE).await) });
        silent.set_read_timeout(Some(PATIENCE)).unwrap();
        silent.recv(&mut [0; 2048]).unwrap();
        node.net.socket().break_it();
        let old = Arc::downgrade(&node.net.socket());
        let until = Instant::now() + PATIENCE;
        let connected = loop {
            let connecting = dialler.connect_with(config.clone(), to, "node").unwrap();
            if let Ok(Ok(connection)) = timeout(Duration::from_secs(1), connecting).await {
                break connection;
            }
            assert!(Instant::now() < until, "{:?}", node.net.socket());
        };
        assert!(old.upgrade().is_none() && !dialling.is_finished());
        dialling.abort();
        assert_eq!(engine.local_address().unwrap().port(), port);
        assert_eq!(before.close_reason(), None);
        drop((node, before, connected));
        tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
    }
}
