//! Accepts connections, and serves them as long as they may be here.

use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::time::Instant;

use macula_peer_core::proto::codes::connection::{NO_CERTIFICATE, OVER_LIMIT, UNEXPECTED};
use macula_peer_core::turns::{Piece, Spent};
use macula_peer_core::types::{Dialect, Path, canonical};
use quinn::Incoming;
use tokio::sync::watch;
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;

use crate::addresses::Remote;
use crate::conn::{Conn, LinkOwner};
use crate::expected::ExpectedNode;
use crate::handshake::handshake;
use crate::places::{Arrived, Place};
use crate::relay::registration::IncomingCircuit;
use crate::server::{Accepted, FULL_CONNECTIONS, Server};
use crate::server_config::{Admission, first_streams};
use crate::streams;
use crate::tls::dialect_of;
use crate::transport::{CONNECTION_WINDOW, HANDSHAKE_TIMEOUT};

/// The least window of a connection, where one address has many.
const LEAST_WINDOW: u32 = 128 << 10;

/// How often others go first before a handshake begins. A message and its answer take about as many tasks, one after the
/// other, and no more than one or two handshakes are to begin meanwhile.
const STEPS: usize = 8;

/// The listener, and the connections that it has accepted.
struct Listener {
    admission: watch::Receiver<Option<Admission>>,
    connections: JoinSet<()>,
}

impl Listener {
    /// How the listener admits connections now. Those of an earlier listener end first.
    fn admission(&mut self) -> Option<Admission> {
        let admission = self.admission.borrow_and_update();
        if admission.has_changed() {
            self.connections.abort_all();
        }
        admission.clone()
    }

    /// Ends the connections of a listener with it.
    async fn keep(&mut self) -> Infallible {
        loop {
            tokio::select! {
                // The sender is the node's.
                Ok(()) = self.admission.changed() => self.connections.abort_all(),
                Some(_) = self.connections.join_next() => {}
            }
        }
    }
}

/// Accepts connections as long as the engine runs. Those of a listener end with it.
pub(crate) async fn accept(server: Arc<Server>) {
    let mut listener = Listener { admission: server.listening.subscribe(), connections: JoinSet::new() };
    let mut expected = JoinSet::new();
    let mut stopping = server.lifecycle.stopping();
    let mut spent = Spent::default();
    loop {
        if spent.is_up() {
            yield_now().await;
        }
        tokio::select! {
            incoming = server.net.quic.accept() => match incoming {
                Some(incoming) => {
                    let piece = Piece::begin(Instant::now());
                    let admission = listener.admission();
                    let callers = server.expected.at(canonical(incoming.remote_address()));
                    match (callers, admission) {
                        (None, None) => incoming.ignore(),
                        _ if !server.admissions.permit_address(incoming.remote_address()) => incoming.refuse(),
                        (Some(callers), _) if expected.len() < server.config.max_accepted => {
                            expected.spawn(accept_expected(server.clone(), callers, incoming));
                        }
                        (_, Some(admission)) => admit(&server, &admission, incoming, &mut listener.connections),
                        (_, None) => incoming.ignore(),
                    }
                    spent.add(piece, Instant::now());
                }
                None => return,
            },
            never = listener.keep() => match never {},
            Some(_) = expected.join_next() => {}
            // Also if it was said before this task first ran.
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
    }
}

fn admit(server: &Arc<Server>, admission: &Admission, incoming: Incoming, connections: &mut JoinSet<()>) {
    let address = canonical(incoming.remote_address()).ip();
    match server.places.arrive(address, incoming.remote_address_validated()) {
        Arrived::Placed(place) => {
            connections.spawn(accept_one(server.clone(), admission.clone(), incoming, place));
        }
        // Fails only for an address that has been proven.
        Arrived::Prove => drop(incoming.retry()),
        Arrived::Refused => incoming.refuse(),
    }
}

async fn accept_one(server: Arc<Server>, admission: Admission, incoming: Incoming, place: Place) {
    let Some(conn) = accept_with(&server, &admission, incoming, Path::Direct).await else { return };
    serve(server, conn, place).await;
}

/// Accepts with these settings, although it may have come while another listener was there.
async fn accept_with(server: &Server, admission: &Admission, incoming: Incoming, path: Path) -> Option<Arc<Conn>> {
    let address = incoming.remote_address();
    let (socket, remote) = (server.net.current_socket(), Remote::following(address));
    // The keys are made here, which takes as long as some twenty messages, and no packet comes in meanwhile.
    let turn =
        timeout(HANDSHAKE_TIMEOUT, server.handshakes.late_turn(canonical(address).ip().into(), STEPS)).await.ok()?;
    let connecting =
        incoming.accept_with(admission.following(server.admissions.select_by_key(), remote.clone())).ok()?;
    drop(turn);
    let connected = timeout(HANDSHAKE_TIMEOUT, handshake(&socket, address, connecting)).await.ok()?;
    let connection = connected.inspect_err(|error| tracing::debug!(%error, "not accepted")).ok()?;
    remote.is_connected(socket.get().addresses());
    let dialect = dialect_of(&connection)?;
    Some(Conn::new(connection, dialect, path, remote))
}

/// A connection on a path that both nodes have made.
async fn accept_expected(server: Arc<Server>, callers: Vec<ExpectedNode>, incoming: Incoming) {
    let admission = server.known_paths.clone();
    let Some(conn) = accept_with(&server, &admission, incoming, Path::HolePunch).await else { return };
    let mut meant = callers.into_iter().filter(|caller| Some(caller.key) == conn.shown);
    let Some(ExpectedNode { extra: _extra, connected, .. }) = meant.next() else {
        tracing::warn!(from = %conn.remote(), "another node than the expected one");
        return conn.connection.close(UNEXPECTED.into(), b"unexpected key");
    };
    connected.notify_one();
    // Of several attempts, each has reached its end.
    meant.for_each(|caller| caller.connected.notify_one());
    let Some(place) = server.places.enter(conn.remote().ip()) else {
        return conn.connection.close(OVER_LIMIT.into(), b"connections");
    };
    serve(server, conn, place).await;
}

/// Serves a connection to its end.
async fn serve(server: Arc<Server>, conn: Arc<Conn>, place: Place) {
    place.connected();
    let (Conn { connection, dialect, path, remote, .. }, key) = (&*conn, conn.key());
    if *dialect == Dialect::MaculaPeer1 && key.is_none() {
        return connection.close(NO_CERTIFICATE.into(), b"no certificate");
    }
    if key.is_some_and(|key| !place.show(connection, key)) {
        return;
    }
    let Some(_admitted) = server.admissions.admit_connection(connection, key, *path, remote).await else { return };
    Admission::let_in(connection, *dialect, &server.config);
    let window = place.share(CONNECTION_WINDOW, FULL_CONNECTIONS);
    if window < CONNECTION_WINDOW {
        connection.set_receive_window(window.max(LEAST_WINDOW).into());
    }
    let accepted = Arc::new(Accepted::new(conn, Some(Arc::new(place)), None));
    let _entry = Entry::new(server.clone(), accepted.clone());
    streams::serve(server, accepted).await;
}

/// Serves what the peer begins on a link that we dialled: so two nodes need one connection.
pub(crate) async fn serve_link(server: Arc<Server>, peer: Weak<dyn LinkOwner>, conn: Arc<Conn>) {
    let Some(_place) = server.admissions.admit_link(&conn.connection, conn.shown) else { return };
    conn.connection.set_max_concurrent_bi_streams(first_streams(&server.config).into());
    let accepted = Accepted::new(conn, None, Some(peer));
    streams::serve(server, Arc::new(accepted)).await;
}

/// Accepts a connection that comes over a circuit, and serves it.
pub(crate) async fn accept_circuit(server: Arc<Server>, incoming: IncomingCircuit, place: Place) {
    let relay = incoming.relay;
    // It cannot move. Its acknowledgements tell how long it may be silent.
    let remote = Remote::following(relay);
    let config = server.known_paths.following(server.admissions.select_by_key(), remote.clone());
    if let Ok(Ok(connection)) = timeout(HANDSHAKE_TIMEOUT, incoming.accept(&config)).await {
        let Some(dialect) = dialect_of(&connection) else { return };
        let conn = Conn::new(connection, dialect, Path::Relay(relay), remote);
        serve(server, conn, place).await;
    }
}

/// The accepted connection in the table, as long as it is served.
struct Entry {
    server: Arc<Server>,
    accepted: Arc<Accepted>,
}

impl Entry {
    fn new(server: Arc<Server>, accepted: Arc<Accepted>) -> Self {
        server.accepted.insert(accepted.conn.clone());
        if let Some(key) = accepted.key() {
            (server.arrived)(key);
        }
        Self { server, accepted }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.server.accepted.remove(&self.accepted.conn);
        // Others hold a reference to it and do not serve it.
        self.accepted.connection.close(0u8.into(), b"");
        self.accepted.place.iter().for_each(|place| place.leave());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::future::pending;

    use super::*;
    use crate::identity::Identity;
    use crate::tls::{Trust, circuit_server};
    use macula_peer_core::config::Config;
    use macula_peer_core::sync::now_or_never;
    use macula_peer_core::types::Verify;

    /// The task used to notice a new listener only after it had accepted for it, and then ended what it had accepted.
    #[tokio::test]
    async fn a_connection_that_comes_while_the_listener_begins_is_kept_and_ends_with_it() {
        let identity = Identity::generate().unwrap();
        let tls = circuit_server(&identity, &Trust::new(&Verify::FirstSeen).unwrap()).unwrap();
        let admission = Admission::new(tls, false, false, &Config::default());
        let listening = watch::Sender::new(None);
        let mut listener = Listener { admission: listening.subscribe(), connections: JoinSet::new() };
        assert!(listener.admission().is_none());
        for _ in 0..2 {
            listening.send_replace(Some(admission.clone()));
            assert!(listener.admission().is_some());
            let alive = Arc::new(());
            let held = alive.clone();
            listener.connections.spawn(async move {
                pending::<()>().await;
                drop(held);
            });
            assert!(now_or_never(listener.keep()).is_none());
            tokio::task::yield_now().await;
            assert_eq!(Arc::strong_count(&alive), 2, "its listener is there");
            listening.send_replace(None);
            assert!(listener.admission().is_none());
            while listener.connections.join_next().await.is_some() {}
            assert_eq!(Arc::strong_count(&alive), 1);
        }
    }
}
