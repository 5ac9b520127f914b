//! Earned addresses: which addresses the other ends of connections have proved.
//!
//! A connection's other end proves its address in the handshake, and proves another one by answering a challenge that
//! was sent there (RFC 9000, section 8.2). Until then it is a claim: quinn sends to a new address, and names it, from
//! the first packet on that came from there, and any client can put a third party's address on a packet. So only quinn
//! looks at `Connection::remote_address`, everything else at [`Remote`]; and what quinn sends to an address that is
//! only claimed is limited here.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use macula_peer_core::packet_budget::PacketBudget;
use macula_peer_core::patience::Patience;
use macula_peer_core::sync::lock;
use macula_peer_core::types::canonical;
use macula_peer_core::unproven::Unproven;
use quinn::Connection;
use quinn::congestion::{Controller, ControllerFactory};
use tokio::sync::Notify;

use crate::congestion::{Observer, observed};

/// What may be sent to addresses of which a node knows nothing but what others say, by QUIC and as signals.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// Addresses that are proven, or that this node dials, and how many connections have each.
    proven: RwLock<HashMap<SocketAddr, usize>>,
    unproven: Mutex<Unproven>,
    /// Whether there are unproven addresses: usually there are none, and no lookup is needed.
    any_unproven: AtomicBool,
    /// What signals may be sent.
    budget: Mutex<PacketBudget>,
}

impl Default for Addresses {
    fn default() -> Self {
        let budget = Mutex::new(PacketBudget::new(Instant::now()));
        Self { proven: RwLock::default(), unproven: Mutex::default(), any_unproven: AtomicBool::default(), budget }
    }
}

/// An address is proven until this is dropped.
#[derive(Debug)]
pub(crate) struct Proof {
    addresses: Arc<Addresses>,
    address: SocketAddr,
}

impl Addresses {
    pub(crate) fn prove(self: &Arc<Self>, address: SocketAddr) -> Proof {
        let address = canonical(address);
        *self.proven.write().unwrap_or_else(PoisonError::into_inner).entry(address).or_default() += 1;
        if self.any_unproven.load(Ordering::Relaxed) {
            self.change(|unproven| unproven.forget(address));
        }
        Proof { addresses: self.clone(), address }
    }

    /// Bytes came from an address.
    pub(crate) fn received(&self, from: SocketAddr, bytes: usize) {
        let from = canonical(from);
        if bytes > 0 && !self.is_proven(from) {
            self.change(|unproven| unproven.received(from, bytes, Instant::now()));
        }
    }

    /// Whether that many bytes may be sent to an address.
    pub(crate) fn may_send(&self, to: SocketAddr, bytes: usize) -> bool {
        if !self.any_unproven.load(Ordering::Relaxed) {
            return true;
        }
        let to = canonical(to);
        self.is_proven(to) || self.change(|unproven| unproven.take(to, bytes, Instant::now()))
    }

    /// Whether a signal may be sent to a relay, or to an address at which a relay sees a node.
    pub(crate) fn may_signal(&self, to: SocketAddr) -> bool {
        lock(&self.budget).take(to, Instant::now())
    }

    /// Whether a signal may be sent to an address that another node or relay has named.
    pub(crate) fn may_signal_unheard(&self, to: SocketAddr) -> bool {
        lock(&self.budget).take_unheard(to, Instant::now())
    }

    /// An answer has come from there that only the receiver of the request can make.
    pub(crate) fn heard(&self, from: SocketAddr) {
        lock(&self.budget).heard(from);
    }

    /// Forgets in time what came from unproven addresses, also where nothing more comes.
    pub(crate) fn expire(&self) {
        if self.any_unproven.load(Ordering::Relaxed) {
            self.change(|unproven| unproven.expire(Instant::now()));
        }
    }

    fn is_proven(&self, address: SocketAddr) -> bool {
        self.proven.read().unwrap_or_else(PoisonError::into_inner).contains_key(&address)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Unproven) -> T) -> T {
        let mut unproven = lock(&self.unproven);
        let changed = change(&mut unproven);
        self.any_unproven.store(!unproven.is_empty(), Ordering::Relaxed);
        changed
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        let mut proven = self.addresses.proven.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = proven.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                proven.remove(&self.address);
            }
        }
    }
}

/// Where the other end of a connection has proved to be.
///
/// quinn does not tell when it has validated a path, but it tells a path's congestion controller of acknowledgements only
/// from then on. Each path has a controller of its own, so the first acknowledgement that the newest of them hears of says
/// that the connection's present address is proven.
#[derive(Debug)]
pub(crate) struct Remote {
    known: Mutex<Known>,
    /// The number of the newest path.
    newest: AtomicU64,
    /// The number of the path that was last found to be validated.
    validated: AtomicU64,
    /// Told when another path is validated.
    changed: Notify,
    /// How long the other end may be silent, as its acknowledgements tell.
    pub(crate) patience: Patience,
}

#[derive(Debug)]
struct Known {
    /// The number of the path that has this address.
    path: u64,
    address: SocketAddr,
    /// `None`: the address is not this node's sockets' business.
    proof: Option<Proof>,
}

/// The path of the handshake, during which quinn takes packets from nowhere else.
const FIRST: u64 = 0;

/// No path: the handshake's gets the next number.
const NONE: u64 = FIRST.wrapping_sub(1);

impl Remote {
    /// The other end stays where it is, because this side has dialled it or the connection cannot move.
    pub(crate) fn fixed(address: SocketAddr) -> Arc<Self> {
        Arc::new(Self::new(address, FIRST))
    }

    /// A client begins a connection from there. Must become the controller factory of this connection, and of no other.
    pub(crate) fn following(address: SocketAddr) -> Arc<Self> {
        Arc::new(Self::new(address, NONE))
    }

    fn new(address: SocketAddr, newest: u64) -> Self {
        Self {
            known: Mutex::new(Known { path: FIRST, address: canonical(address), proof: None }),
            newest: AtomicU64::new(newest),
            validated: AtomicU64::new(FIRST),
            changed: Notify::new(),
            patience: Patience::default(),
        }
    }

    /// The handshake has succeeded: the client has read the server's first packets, so it is where they were sent.
    pub(crate) fn is_connected(&self, addresses: &Arc<Addresses>) {
        let mut known = lock(&self.known);
        known.proof = Some(addresses.prove(known.address));
    }

    /// The address that was proved last.
    pub(crate) fn address(&self, connection: &Connection) -> SocketAddr {
        let newest = self.newest.load(Ordering::SeqCst);
        let mut known = lock(&self.known);
        if known.path == newest || self.validated.load(Ordering::SeqCst) != newest {
            return known.address;
        }
        let address = canonical(connection.remote_address());
        // A newer path may have that address. One that is validated is left only for a newer one.
        if self.newest.load(Ordering::SeqCst) == newest {
            let proof = known.proof.take().map(|proof| proof.addresses.prove(address));
            *known = Known { path: newest, address, proof };
        }
        known.address
    }

    /// Whether the other end claims to be somewhere else by now.
    pub(crate) fn is_claimed(&self, connection: &Connection) -> bool {
        canonical(connection.remote_address()) != self.address(connection)
    }

    /// Waits until another address may be proven. For one task.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn next_path(&self) -> u64 {
        self.newest.fetch_add(1, Ordering::SeqCst).wrapping_add(1)
    }

    fn is_validated(&self, path: u64) {
        self.validated.store(path, Ordering::SeqCst);
        self.changed.notify_one();
    }
}

impl ControllerFactory for Remote {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let path = self.next_path();
        observed(Following { remote: self, path, validated: path == FIRST }, None, now, mtu)
    }
}

/// Learns from the first acknowledgement that a path is validated.
struct Following {
    remote: Arc<Remote>,
    path: u64,
    validated: bool,
}

impl Observer for Following {
    fn acknowledged(&mut self, _sent: Instant, shortest: Duration) {
        self.remote.patience.measured(shortest);
        if !self.validated {
            self.validated = true;
            self.remote.is_validated(self.path);
        }
    }

    fn next_path(&self) -> Self {
        let remote = self.remote.clone();
        let path = remote.next_path();
        Self { remote, path, validated: false }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{Ipv4Addr, UdpSocket};

    use quinn::{Endpoint, EndpointConfig};
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::relay::testing::{PATIENCE, client_config, endpoint, server_config, transport};
    use crate::runtime::BatchingRuntime;
    use crate::socket::{self, Socket};

    const LOCALHOST: std::net::IpAddr = std::net::IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A connection that `client` begins, as the server sees it, and where the server sees the client.
    async fn accepted(client: &Endpoint, addresses: &Arc<Addresses>) -> (Connection, Connection, Arc<Remote>) {
        let signals = socket::signals().0;
        let socket = Socket::bind(Some(LOCALHOST), 0, None, socket::refusals(), signals, addresses.clone()).unwrap();
        let to = socket.local();
        let config = Some(server_config(transport()));
        let runtime = Arc::new(BatchingRuntime);
        let server = Endpoint::new_with_abstract_socket(EndpointConfig::default(), config, socket, runtime).unwrap();
        let connecting = client.connect_with(client_config(transport()), to, "server").unwrap();
        let accepting = async {
            let incoming = server.accept().await.unwrap();
            let remote = Remote::following(incoming.remote_address());
            let mut transport = transport();
            transport.congestion_controller_factory(remote.clone());
            let config = Arc::new(server_config(transport));
            let connection = incoming.accept_with(config).unwrap().await.unwrap();
            remote.is_connected(addresses);
            (connection, remote)
        };
        let (dialled, (accepted, remote)) = tokio::join!(connecting, accepting);
        (dialled.unwrap(), accepted, remote)
    }

    #[tokio::test]
    async fn a_peer_that_moves_gets_everything_at_its_new_address() {
        let (client, addresses) = (endpoint(None), Arc::new(Addresses::default()));
        let (dialled, accepted, remote) = accepted(&client, &addresses).await;
        let before = client.local_addr().unwrap();
        assert_eq!(remote.address(&accepted), before);
        client.rebind(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
        let after = client.local_addr().unwrap();
        let (mut up, mut down) = (dialled.open_uni().await.unwrap(), accepted.open_uni().await.unwrap());
        let follow = async {
            while remote.address(&accepted) != after {
                // Enough for a challenge, and something that is acknowledged.
                up.write_all(&[0; 1000]).await.unwrap();
                down.write_all(&[0; 1]).await.unwrap();
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, follow).await.unwrap();
        assert!(addresses.is_proven(after) && !addresses.is_proven(before));
        let read = async {
            let mut stream = dialled.accept_uni().await.unwrap();
            let mut read = 0;
            while let Some(chunk) = stream.read_chunk(usize::MAX, true).await.unwrap() {
                read += chunk.bytes.len();
            }
            read
        };
        let write = async {
            down.write_all(&vec![0; 4 << 20]).await.unwrap();
            down.finish().unwrap();
        };
        let (read, ()) = timeout(PATIENCE, async { tokio::join!(read, write) }).await.unwrap();
        assert!(read >= 4 << 20);
        drop((accepted, remote));
        client.close(0u8.into(), b"");
    }

    #[test]
    fn an_address_is_proven_as_long_as_one_connection_has_it() {
        let addresses = Arc::new(Addresses::default());
        let address: SocketAddr = "20.0.0.1:7000".parse().unwrap();
        let mapped = "[::ffff:20.0.0.1]:7000".parse().unwrap();
        addresses.received(mapped, 10);
        assert!(addresses.may_send(address, 30) && !addresses.may_send(mapped, 1));
        let proofs = [mapped, address].map(|address| addresses.prove(address));
        assert!(addresses.may_send(mapped, 1 << 30));
        addresses.received(address, 10);
        assert!(!addresses.any_unproven.load(Ordering::Relaxed), "nothing is looked up");
        let [one, other] = proofs;
        drop(one);
        assert!(addresses.is_proven(address));
        drop(other);
        addresses.received(address, 10);
        assert!(!addresses.may_send(address, 31));
    }
}
