//! The relays that this node uses: one [`RelayClient`] each, made when it is first needed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hashbrown::HashMap;
use macula_peer_core::config::Config;
use macula_peer_core::detection::Probed;
use macula_peer_core::errors::{CircuitError, ConnectError};
use macula_peer_core::events::{Event, Registration};
use macula_peer_core::nat::Description;
use macula_peer_core::proto::control::{Id, MAX_SUCCESSIONS_LEN};
use macula_peer_core::registration::{NOT_A_RELAY_FOR, RegistrationState, RelayEvent};
use macula_peer_core::stats::RegistrationStats;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, NodeId};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ServerConfig, TransportConfig};
use tokio::sync::watch;

use super::client::{RelayClient, Settings};
use super::registration::{IncomingCircuit, PunchSession};
use crate::inbox::Inbox;
use crate::keys::Keys;
use crate::lifecycle::Lifecycle;
use crate::net::Net;
use crate::transport::{DIALLED_WINDOW, KNOWN_PATH_ROUND_TRIP, STREAM_WINDOW, set_idle_timeout};

/// Relays used at once, standing ones included. Each is a connection of some 40 KB. Those that callers name and that are
/// not used go by themselves.
pub const MAX_RELAYS: usize = 64;

/// How long a registration that nobody asked for is kept after its last circuit.
const UNUSED_FOR: Duration = Duration::from_secs(60);

/// What the clients use of the node.
pub(crate) struct Handles {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) description: watch::Receiver<Option<Description>>,
}

/// For connections over circuits.
pub(crate) struct CircuitTls {
    pub(crate) client: QuicClientConfig,
    pub(crate) server: ServerConfig,
}

/// What else is to be done when something comes from a relay.
pub(crate) struct Hooks {
    /// This node is registered, so its NAT can be examined.
    pub(crate) registered: Box<dyn Fn() + Send + Sync>,
    /// A relay sees this node at another address.
    pub(crate) moved: Box<dyn Fn() + Send + Sync>,
    /// Another node looks for a direct path to this one.
    pub(crate) punch: Box<dyn Fn(PunchSession, Endpoint) + Send + Sync>,
    /// Another node connects over a circuit.
    pub(crate) circuit: Box<dyn Fn(IncomingCircuit) + Send + Sync>,
}

pub(crate) struct Clients {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    net: Arc<Net>,
    keys: Arc<Keys>,
    inbox: Arc<Inbox>,
    description: watch::Receiver<Option<Description>>,
    hooks: Hooks,
    table: RwLock<HashMap<Endpoint, Arc<RelayClient>>>,
    /// Endpoints that turned out to be no relays, and when.
    not_relays: Mutex<HashMap<Endpoint, Instant>>,
    /// TLS for connections over circuits.
    client: ClientConfig,
    /// How others that come over circuits are let in.
    server: ServerConfig,
}

impl Clients {
    pub(crate) fn new(handles: Handles, tls: CircuitTls, hooks: Hooks) -> Arc<Self> {
        let Handles { config, lifecycle, net, keys, inbox, description } = handles;
        let mut transport = TransportConfig::default();
        transport
            .initial_rtt(KNOWN_PATH_ROUND_TRIP)
            .keep_alive_interval(Some(config.keep_alive))
            .receive_window(DIALLED_WINDOW.into())
            .stream_receive_window(STREAM_WINDOW.into())
            .datagram_receive_buffer_size(None)
            // Raised when it is known who the peer is.
            .max_concurrent_bidi_streams(0u8.into())
            .max_concurrent_uni_streams(0u8.into());
        set_idle_timeout(&mut transport, &config);
        let mut client = ClientConfig::new(Arc::new(tls.client));
        client.transport_config(Arc::new(transport));
        let (table, not_relays, server) = (RwLock::default(), Mutex::default(), tls.server);
        Arc::new(Self { config, lifecycle, net, keys, inbox, description, hooks, table, not_relays, client, server })
    }

    /// A connection to a node through a relay, and the relay's address.
    pub(crate) async fn connect(
        self: &Arc<Self>,
        relay: &Endpoint,
        target: &NodeId,
    ) -> Result<(Connection, SocketAddr), CircuitError> {
        // A name of a node is a valid id.
        let Some(target) = Id::new(target.to_bytes()) else { return Err(CircuitError::NotRegistered) };
        let asked = lock(&self.not_relays).get(relay).copied();
        if asked.is_some_and(|asked| asked.elapsed() < NOT_A_RELAY_FOR) {
            return Err(CircuitError::NotARelay);
        }
        loop {
            let client = self.client(relay, None).ok_or(CircuitError::Stopped)?;
            match client.connect(&target).await {
                // It had just ended, unused, and is out of the table by now.
                Err(CircuitError::Stopped) if !self.lifecycle.is_stopping() => tokio::task::yield_now().await,
                Err(CircuitError::NotARelay) => {
                    self.remember_not(relay);
                    return Err(CircuitError::NotARelay);
                }
                Err(error) => return Err(error),
                Ok(connection) => return Ok((connection, client.address().ok_or(CircuitError::RelayLost)?)),
            }
        }
    }

    /// An attempt to find a direct path to a node, of which a relay has told it.
    pub(crate) async fn punch(
        self: &Arc<Self>,
        relay: &Endpoint,
        target: &NodeId,
    ) -> Result<PunchSession, CircuitError> {
        let Some(target) = Id::new(target.to_bytes()) else { return Err(CircuitError::NotRegistered) };
        let client = self.client(relay, None).ok_or(CircuitError::Stopped)?;
        client.punch(&target).await
    }

    /// The relay at an address, if this node uses it.
    pub(crate) fn relay_at(&self, relay: SocketAddr) -> Option<Endpoint> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut at = table.iter().filter(|(_, client)| client.address() == Some(relay));
        at.next().map(|(endpoint, _)| endpoint.clone())
    }

    fn remember_not(&self, relay: &Endpoint) {
        let mut not_relays = lock(&self.not_relays);
        not_relays.retain(|_, asked| asked.elapsed() < NOT_A_RELAY_FOR);
        if not_relays.len() < MAX_RELAYS {
            not_relays.insert(relay.clone(), Instant::now());
        }
    }

    /// Keeps this node registered at these relays, and no others.
    pub(crate) fn register(self: &Arc<Self>, name: Option<NodeId>, relays: Vec<Endpoint>) {
        let id = name.as_ref().and_then(|name| Id::new(name.to_bytes()));
        let before = self.keys.standing.replace(name.map(|name| (name, relays.clone())));
        for relay in before.iter().filter(|relay| !relays.contains(relay)) {
            let removed = self.table.write().unwrap_or_else(PoisonError::into_inner).remove(relay);
            if let Some(client) = removed {
                client.stop();
            }
        }
        for relay in &relays {
            self.client(relay, id.clone());
        }
    }

    pub(crate) fn stats(&self) -> Vec<RegistrationStats> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let stats = table.iter().map(|(relay, client)| {
            let status = client.status();
            let (state, address) = match status.state {
                RegistrationState::Unused | RegistrationState::Connecting => (Registration::Connecting, None),
                RegistrationState::Registered { address } => (Registration::Registered, Some(address)),
                RegistrationState::Refused(refusal) => (Registration::Refused(refusal), None),
                RegistrationState::Down(_) => (Registration::Lost, None),
            };
            let (relay, circuits, since) = (relay.clone(), status.circuits, status.since);
            RegistrationStats { relay, state, address, circuits, since }
        });
        stats.collect()
    }

    /// The relays that this node is registered at and that can be probed.
    pub(crate) fn probed(&self) -> Vec<Probed> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.values().filter_map(|client| client.probed()).collect()
    }

    /// As [`Clients::probed`], one of them.
    pub(crate) fn probed_relay(&self, relay: &Endpoint) -> Option<Probed> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(relay)?.probed()
    }

    /// Whether it is not known yet of some relays whether they register this node.
    pub(crate) fn is_registering(&self) -> bool {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.values().any(|client| client.status().state == RegistrationState::Connecting)
    }

    /// Ends all registrations.
    pub(crate) fn stop(&self) {
        for client in self.table.read().unwrap_or_else(PoisonError::into_inner).values() {
            client.stop();
        }
    }

    /// The client for a relay. `None` when the engine is stopping, or when there are too many.
    fn client(self: &Arc<Self>, relay: &Endpoint, standing: Option<Id>) -> Option<Arc<RelayClient>> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let found = table.get(relay).cloned();
        let client = match found {
            Some(client) => client,
            None if self.lifecycle.is_stopping() || table.len() >= MAX_RELAYS => return None,
            None => {
                let client = self.start(relay);
                table.insert(relay.clone(), client.clone());
                client
            }
        };
        if standing.is_some() {
            client.set_standing(standing);
        }
        Some(client)
    }

    fn start(self: &Arc<Self>, relay: &Endpoint) -> Arc<RelayClient> {
        let weak = Arc::downgrade(self);
        let own = Bytes::copy_from_slice(self.keys.identity.fingerprint().as_bytes());
        let name = self.keys.standing.with_name(|name| name.map(NodeId::to_bytes));
        let settings = Settings {
            dial: Box::new(dialling(weak.clone(), relay.clone())),
            // A fingerprint and a name are valid ids.
            node_id: Id::new(name.unwrap_or_else(|| own.clone())).unwrap_or_else(|| unreachable!()),
            realm_secret: self.config.realm_secret.as_ref().map(|secret| Bytes::copy_from_slice(secret.as_bytes())),
            successions: Box::new(successions(weak.clone())),
            client: self.client.clone(),
            server: Some(self.server.clone()),
            timeout: self.config.connect_timeout,
            idle: UNUSED_FOR,
            on_event: Arc::new(telling(weak.clone(), relay.clone())),
            on_incoming: Box::new(accepting(weak.clone())),
            on_punch: Box::new(punching(weak, relay.clone())),
            description: self.description.clone(),
        };
        let client = RelayClient::new(settings);
        let (served, clients, relay) = (client.clone(), self.clone(), relay.clone());
        self.lifecycle.spawn(async move {
            served.clone().run().await;
            let mut table = clients.table.write().unwrap_or_else(PoisonError::into_inner);
            if table.get(&relay).is_some_and(|current| Arc::ptr_eq(current, &served)) {
                table.remove(&relay);
            }
        });
        client
    }
}

/// As many as a message takes.
fn successions(clients: Weak<Clients>) -> impl Fn() -> Vec<Bytes> + Send + Sync {
    move || {
        let mut len = 0;
        let fits = |statement: &Bytes| {
            len += statement.len();
            len <= MAX_SUCCESSIONS_LEN
        };
        clients
            .upgrade()
            .map_or_else(Vec::new, |clients| clients.keys.identity.successions().into_iter().take_while(fits).collect())
    }
}

fn dialling(clients: Weak<Clients>, relay: Endpoint) -> impl Fn() -> super::client::Dialling + Send + Sync {
    move || {
        let (clients, relay) = (clients.clone(), relay.clone());
        Box::pin(async move {
            let clients = clients.upgrade().ok_or(ConnectError::Unreachable)?;
            let until = Instant::now() + clients.config.connect_timeout;
            let link = clients.net.dial_relay(relay, until).await?;
            clients.keys.counted_unverified(link.dialect);
            Ok(link.into_connection())
        })
    }
}

fn telling(clients: Weak<Clients>, relay: Endpoint) -> impl Fn(RelayEvent) + Send + Sync {
    move |event| {
        let Some(clients) = clients.upgrade() else { return };
        let relay = relay.clone();
        match event {
            RelayEvent::Moved { .. } => (clients.hooks.moved)(),
            RelayEvent::Registered { .. } => (clients.hooks.registered)(),
            _ => {}
        }
        clients.inbox.event(match event {
            RelayEvent::Moved { .. } => return,
            RelayEvent::Ended => {
                clients.inbox.tell(Event::Registration { relay, state: Registration::Lost });
                return;
            }
            RelayEvent::Disputed => {
                return tracing::warn!(
                    %relay,
                    "another node uses this identity, and the two take the registration at the relay from each other. Each \
                     node needs an identity_file of its own, which must not be copied with a machine. If there is no such \
                     node, this one names the relay by two endpoints"
                );
            }
            RelayEvent::Registered { .. } => Event::Registration { relay, state: Registration::Registered },
            RelayEvent::Lost => Event::Registration { relay, state: Registration::Lost },
            RelayEvent::Refused(refusal) => Event::Registration { relay, state: Registration::Refused(refusal) },
            RelayEvent::Dropped { limit, .. } => Event::RelayLimit { relay, limit },
        });
    }
}

fn punching(clients: Weak<Clients>, relay: Endpoint) -> impl Fn(PunchSession) + Send + Sync {
    move |session| {
        if let Some(clients) = clients.upgrade() {
            (clients.hooks.punch)(session, relay.clone());
        }
    }
}

fn accepting(clients: Weak<Clients>) -> impl Fn(IncomingCircuit) + Send + Sync {
    move |incoming| {
        if let Some(clients) = clients.upgrade() {
            (clients.hooks.circuit)(incoming);
        }
    }
}
