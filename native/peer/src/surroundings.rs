//! What a peer needs of the rest of the node, and how links to it are made.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Instant;

use macula_peer_core::config::Config;
use macula_peer_core::errors::{CircuitError, ConnectError, PunchError};
use macula_peer_core::nat::Description;
use macula_peer_core::proto::control::PunchFailure;
use macula_peer_core::sync::now_or_never;
use macula_peer_core::types::{Dialect, Endpoint, Fingerprint, NodeId, Path, PeerName};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::watch;
use tokio::time::timeout_at;

use crate::addresses::Remote;
use crate::conn::{AcceptedTable, Conn, LinkOwner};
use crate::handshake::not_connected;
use crate::inbox::Inbox;
use crate::keys::{Keys, Said};
use crate::lifecycle::Lifecycle;
use crate::link::Link;
use crate::net::Net;

pub(crate) type Waits<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What other parts of the node do for a peer.
pub(crate) trait Others: Send + Sync {
    /// A connection to a node through a relay, and the relay's address.
    fn connect<'a>(
        &'a self,
        relay: &'a Endpoint,
        target: &'a NodeId,
    ) -> Waits<'a, Result<(Connection, SocketAddr), CircuitError>>;

    /// A direct link to a node, with the help of a relay that both are registered at.
    fn punch(
        &self,
        relay: Endpoint,
        target: NodeId,
        key: Option<Fingerprint>,
    ) -> Waits<'static, Result<Link, PunchError>>;

    /// The relay at an address, if this node uses it.
    fn relay_at(&self, relay: SocketAddr) -> Option<Endpoint>;

    /// Serves what the peer begins on a link that this node dialled, until the link ends.
    fn serve(&self, conn: Arc<Conn>, owner: Weak<dyn LinkOwner>) -> Waits<'static, ()>;
}

pub(crate) struct Surroundings {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) accepted: Arc<AcceptedTable>,
    /// What others need to know of this node to find a direct path to it. `None`: it does not know yet.
    pub(crate) description: watch::Sender<Option<Description>>,
    pub(crate) others: Weak<dyn Others>,
}

impl Surroundings {
    /// A direct link to an endpoint, if the node there is the peer.
    pub(crate) async fn dial(
        self: Arc<Self>,
        name: PeerName,
        endpoint: Endpoint,
        key: Option<Fingerprint>,
        until: Instant,
    ) -> Result<Link, ConnectError> {
        let link = match name {
            PeerName::Gateway(_) => self.net.dial_gateway(endpoint, until).await?,
            PeerName::Endpoint(_) | PeerName::Node(_) => self.net.dial(endpoint, until).await?,
        };
        match timeout_at(until.into(), self.keys.admit(&name, Said::by(key), link)).await {
            Ok(admitted) => admitted,
            Err(_) => Err(ConnectError::TimedOut),
        }
    }

    /// A link through a relay.
    pub(crate) async fn circuit(
        &self,
        relay: &Endpoint,
        target: &NodeId,
        key: Option<Fingerprint>,
    ) -> Result<Link, CircuitError> {
        let others = self.others.upgrade().ok_or(CircuitError::Stopped)?;
        let (connection, relay) = others.connect(relay, target).await?;
        drop(others);
        let Config { limits, answer_timeout, .. } = *self.config;
        let conn = Conn::new(connection, Dialect::MaculaPeer1, Path::Relay(relay), Remote::fixed(relay));
        let link = Link::new(conn, Arc::default(), limits, answer_timeout);
        let said = Said { key, registered: true };
        let link = self.keys.admit(&PeerName::Node(target.clone()), said, link).await.map_err(CircuitError::Inner)?;
        // As for a direct link: streams are allowed once our certificate was looked at.
        let stream = link.connection.open_bi().await.map_err(|error| CircuitError::Inner(not_connected(error)))?;
        link.put_spare(stream);
        Ok(link)
    }

    /// A direct link to a node through the NATs of both.
    pub(crate) async fn punch(
        self: Arc<Self>,
        relay: Endpoint,
        target: NodeId,
        key: Option<Fingerprint>,
    ) -> Result<Link, PunchError> {
        let punch = self.others.upgrade().map(|others| others.punch(relay, target, key));
        punch.ok_or(PunchError::Failed(PunchFailure::Interrupted))?.await
    }

    /// The relay at an address, if this node uses it.
    pub(crate) fn relay_at(&self, relay: SocketAddr) -> Option<Endpoint> {
        self.others.upgrade()?.relay_at(relay)
    }

    /// Serves what the peer begins on a link that this node dialled, until the link ends.
    pub(crate) async fn serve(self: Arc<Self>, conn: Arc<Conn>, owner: Weak<dyn LinkOwner>) {
        let serve = self.others.upgrade().map(|others| others.serve(conn, owner));
        if let Some(serve) = serve {
            serve.await;
        }
    }

    /// A link to a node over a connection that it began. It allows streams when it has accepted this node as the one it
    /// wanted.
    pub(crate) async fn adopt(
        self: Arc<Self>,
        name: PeerName,
        accepted: Arc<Conn>,
        key: Option<Fingerprint>,
    ) -> Result<Link, ConnectError> {
        let stream = accepted.connection.open_bi().await.map_err(not_connected)?;
        self.keys.admit(&name, Said::by(key), self.adopted(accepted, stream)).await
    }

    /// The same, if that is possible without waiting.
    pub(crate) fn adopt_now(&self, name: &PeerName, accepted: &Arc<Conn>, key: Option<Fingerprint>) -> Option<Link> {
        let stream = now_or_never(accepted.connection.open_bi())?.ok()?;
        self.keys.admit_now(name, Said::by(key), self.adopted(accepted.clone(), stream))
    }

    fn adopted(&self, accepted: Arc<Conn>, stream: (SendStream, RecvStream)) -> Link {
        let Config { limits, answer_timeout, .. } = *self.config;
        let link = Link::over(accepted, limits, answer_timeout);
        link.put_spare(stream);
        link
    }
}
