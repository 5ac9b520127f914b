//! What the tests of relays share.
#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TransportConfig};
use tokio::task::JoinSet;

use super::packet::{Fit, Form, Packet, SplitBy, Splitter, parse};
use crate::identity::Identity;
use crate::runtime::BatchingRuntime;
use crate::tls::{self, Certificate, Verify};

/// Longer than anything here takes on a busy machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn transport() -> TransportConfig {
    TransportConfig::default()
}

pub(crate) fn client_config(transport: TransportConfig) -> ClientConfig {
    let mut config = ClientConfig::new(Arc::new(tls::client(&Identity::generate().unwrap(), &Verify::None).unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

pub(crate) fn server_config(transport: TransportConfig) -> ServerConfig {
    let identity = Identity::generate().unwrap();
    let tls = tls::server(&identity, &Certificate::Identity, &Verify::None).unwrap();
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    config
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

/// The node's ends of two connections to something that forwards each one's datagrams to the other.
pub(crate) async fn mesh(mtu: u16) -> ([Connection; 2], JoinSet<()>) {
    let transport = move || {
        let mut transport = transport();
        transport.initial_mtu(mtu).mtu_discovery_config(None);
        transport
    };
    let ([a, relay_a], [b, relay_b]) = (pair(&transport).await, pair(&transport).await);
    let mut tasks = JoinSet::new();
    tasks.spawn(forward(relay_a.clone(), relay_b.clone()));
    tasks.spawn(forward(relay_b, relay_a));
    ([a, b], tasks)
}

async fn forward(from: Connection, to: Connection) {
    let mut splitter = Splitter::default();
    while let Ok(datagram) = from.read_datagram().await {
        let Some(packet) = parse(datagram) else { continue };
        for datagram in relayed(&mut splitter, packet, &to) {
            // Without room the oldest is dropped, as a router would.
            let _ = to.send_datagram(datagram);
        }
    }
}

/// The packet as a relay passes it on.
pub(crate) fn relayed(splitter: &mut Splitter, packet: Packet, to: &Connection) -> Vec<Bytes> {
    let max = to.max_datagram_size().unwrap_or(0);
    match packet.form {
        Form::Whole => match splitter.fit(packet.circuit, &packet.bytes, max, SplitBy::Relay) {
            Fit::Whole(whole) => vec![whole],
            Fit::Halves(halves) => halves.into(),
            Fit::TooLarge => vec![],
        },
        _ => vec![packet.encode()],
    }
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
