//! What the tests of relays share.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TransportConfig};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::responder::Responder;
use crate::identity::Identity;
use crate::runtime::BatchingRuntime;
use crate::tls::{self, Certificate, Trust};

/// Longer than anything here takes on a busy machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn transport() -> TransportConfig {
    TransportConfig::default()
}

pub(crate) fn client_config(transport: TransportConfig) -> ClientConfig {
    let mut config = ClientConfig::new(Arc::new(tls::client(&Identity::generate().unwrap(), &Trust::AnyKey).unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

pub(crate) fn server_config(transport: TransportConfig) -> ServerConfig {
    let identity = Identity::generate().unwrap();
    let (tls, _) = tls::server(&identity, &Certificate::Identity, &Trust::AnyKey).unwrap();
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    config
}

/// A relay's second socket. To be called inside a runtime.
pub(crate) fn responder() -> Arc<Responder> {
    Responder::bind(Ipv4Addr::LOCALHOST.into(), None, 0, None).unwrap().0
}

/// An endpoint on loopback.
pub(crate) fn endpoint(server: Option<ServerConfig>) -> Endpoint {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(BatchingRuntime)).unwrap()
}

/// The two sides of a connection over loopback, who dialled first.
pub(crate) async fn pair(transport: &(dyn Fn() -> TransportConfig + Sync)) -> [Connection; 2] {
    let server = endpoint(Some(server_config(transport())));
    let address = server.local_addr().unwrap();
    let connecting = endpoint(None).connect_with(client_config(transport()), address, "relay").unwrap();
    let (dialled, accepted) = tokio::join!(connecting, async { server.accept().await.unwrap().await });
    [dialled.unwrap(), accepted.unwrap()]
}

/// Sends back what comes on bidirectional streams, until the connection ends.
pub(crate) async fn echo(connection: Connection) {
    let mut streams = JoinSet::new();
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        streams.spawn(async move {
            while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
                if send.write_chunk(chunk.bytes).await.is_err() {
                    return;
                }
            }
            // Already closed is as good.
            let _ = send.finish();
            let _ = send.stopped().await;
        });
    }
}

/// Forwards UDP packets to a server, each client's from a socket of its own, until it is told to swallow them.
pub(crate) struct Forwarder {
    pub(crate) address: SocketAddr,
    swallow: Arc<AtomicBool>,
    _tasks: JoinSet<()>,
}

impl Forwarder {
    pub(crate) async fn new(server: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let address = front.local_addr().unwrap();
        let swallow = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        tasks.spawn(to_server(front, server, swallow.clone()));
        Self { address, swallow, _tasks: tasks }
    }

    pub(crate) fn swallow(&self, all: bool) {
        self.swallow.store(all, Ordering::Relaxed);
    }
}

async fn to_server(front: Arc<UdpSocket>, server: SocketAddr, swallow: Arc<AtomicBool>) {
    let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut backward = JoinSet::new();
    let mut buffer = vec![0; 65536];
    while let Ok((len, client)) = front.recv_from(&mut buffer).await {
        let back = match clients.get(&client) {
            Some(back) => back.clone(),
            None => {
                let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                back.connect(server).await.unwrap();
                backward.spawn(to_client(back.clone(), front.clone(), client, swallow.clone()));
                clients.insert(client, back.clone());
                back
            }
        };
        if !swallow.load(Ordering::Relaxed) {
            // A refused packet is a lost packet, here and below.
            let _ = back.send(&buffer[..len]).await;
        }
    }
}

async fn to_client(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr, swallow: Arc<AtomicBool>) {
    let mut buffer = vec![0; 65536];
    loop {
        let received = back.recv(&mut buffer).await;
        if let (Ok(len), false) = (received, swallow.load(Ordering::Relaxed)) {
            let _ = front.send_to(&buffer[..len], client).await;
        }
    }
}
