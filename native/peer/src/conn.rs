//! One QUIC connection with a node or a gateway, dialled or accepted. Links and accepted connections are made of it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use macula_peer_core::accepted::{self, GivenUp};
use macula_peer_core::counter::Counter;
use macula_peer_core::shares::Client;
use macula_peer_core::stats::{AcceptedStats, LinkStats};
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Dialect, Fingerprint, Path, Sender};
use quinn::Connection;

use crate::addresses::Remote;
use crate::identity::shown_key;
use crate::transport::MAX_ANSWERING;

pub(crate) struct Conn {
    pub(crate) connection: Connection,
    pub(crate) dialect: Dialect,
    pub(crate) path: Path,
    /// The key that its other end has shown.
    pub(crate) shown: Option<Fingerprint>,
    pub(crate) remote: Arc<Remote>,
    /// Messages that came over it.
    pub(crate) received: Counter,
    given_up: GivenUp,
}

impl Conn {
    pub(crate) fn new(connection: Connection, dialect: Dialect, path: Path, remote: Arc<Remote>) -> Arc<Self> {
        let shown = shown_key(&connection);
        let (received, given_up) = (Counter::default(), GivenUp::default());
        Arc::new(Self { connection, dialect, path, shown, remote, received, given_up })
    }

    /// The key of the sender at its other end. Only `macula-peer/1` binds messages to keys.
    pub(crate) fn key(&self) -> Option<Fingerprint> {
        self.shown.filter(|_| self.dialect == Dialect::MaculaPeer1)
    }

    /// Where its other end has proved to be, or the relay that it goes through.
    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote.address(&self.connection)
    }

    /// The client whose share it takes from.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.key(), self.remote().ip())
    }

    /// The sender of its messages.
    pub(crate) fn sender(&self) -> Sender {
        self.key().map_or_else(|| Sender::Address(self.remote()), Sender::Key)
    }

    /// Datagrams received so far.
    pub(crate) fn datagrams(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    /// Its other end may be gone: it was silent, or allowed no streams, for too long.
    pub(crate) fn mark_silent(&self) {
        self.given_up.mark(self.datagrams());
    }

    /// Whether it can serve as a link.
    pub(crate) fn is_live(&self) -> bool {
        self.connection.close_reason().is_none() && !self.given_up.is_silent(self.datagrams())
    }

    /// Whether a message that has come is the first since the connection was given up as silent.
    pub(crate) fn is_heard_again(&self) -> bool {
        self.given_up.is_heard_again()
    }

    /// For a link on it: answers to what is sent come on streams of their own.
    pub(crate) fn allow_answers(&self) {
        self.connection.set_max_concurrent_uni_streams(MAX_ANSWERING.into());
    }

    pub(crate) fn stats(&self) -> LinkStats {
        let Self { dialect, path, .. } = *self;
        LinkStats { dialect, path, remote: self.remote(), round_trip: self.connection.rtt() }
    }
}

/// The peer whose link a connection is.
pub(crate) trait LinkOwner: Send + Sync {
    /// A message has come from it.
    fn heard(&self);
}

/// The accepted connections that are served.
#[derive(Default)]
pub(crate) struct AcceptedTable(Mutex<Table>);

#[derive(Default)]
struct Table {
    all: HashMap<usize, Arc<Conn>>,
    of_key: HashMap<Fingerprint, HashMap<usize, Arc<Conn>>>,
}

impl AcceptedTable {
    pub(crate) fn insert(&self, conn: Arc<Conn>) {
        let id = conn.connection.stable_id();
        let mut table = lock(&self.0);
        if let Some(key) = conn.key() {
            table.of_key.entry(key).or_default().insert(id, conn.clone());
        }
        table.all.insert(id, conn);
    }

    pub(crate) fn remove(&self, conn: &Conn) {
        let id = conn.connection.stable_id();
        let mut table = lock(&self.0);
        table.all.remove(&id);
        if let Some(key) = conn.key()
            && let Some(of_key) = table.of_key.get_mut(&key)
        {
            of_key.remove(&id);
            if of_key.is_empty() {
                table.of_key.remove(&key);
            }
        }
    }

    /// Those that the holder of a key began and that can serve as a link.
    pub(crate) fn from(&self, key: Fingerprint) -> Vec<Arc<Conn>> {
        let all = {
            let table = lock(&self.0);
            table.of_key.get(&key).into_iter().flat_map(HashMap::values).cloned().collect()
        };
        accepted::usable(all, |conn: &Arc<Conn>| conn.is_live(), |conn| conn.path.is_relayed())
    }

    pub(crate) fn stats(&self) -> Vec<AcceptedStats> {
        // Each connection has a lock of its own, which its packets may hold.
        let all: Vec<_> = lock(&self.0).all.values().cloned().collect();
        all.iter().map(|conn| AcceptedStats { link: conn.stats(), received: conn.received.get() }).collect()
    }
}
