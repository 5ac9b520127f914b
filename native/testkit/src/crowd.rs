//! Many nodes at one relay (docs/protocol.md), each no more than a connection and its control stream.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, SendStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::frame::{self, Frame, HEADER, bin, kind};
use crate::quic::{self, Error};

/// Sockets that the nodes share.
const ENDPOINTS: usize = 4;

/// Nodes that register at once: less than what makes a listener have addresses proven.
const AT_ONCE: usize = 32;

/// As nodes of the library do.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Longer than any answer takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The frame that opens a control stream.
const OPENER: [u8; 8] = [1, 0xF2, 0, 0, 0, 0, 0, 0];

/// The nodes of a relay.
pub struct Crowd {
    relay: SocketAddr,
    endpoints: Vec<Endpoint>,
    config: ClientConfig,
    nodes: Vec<Node>,
}

struct Node {
    name: String,
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
}

impl Crowd {
    /// Starts without nodes. Must be called inside a runtime.
    pub fn new(relay: SocketAddr) -> Result<Self, Error> {
        let mut transport = quic::transport(0, 0);
        transport.keep_alive_interval(Some(KEEP_ALIVE));
        let endpoints = (0..ENDPOINTS).map(|_| {
            let socket = UdpSocket::bind((relay.ip(), 0))?;
            Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(quic::YieldingRuntime))
        });
        let config = quic::node_config(transport)?;
        Ok(Self { relay, endpoints: endpoints.collect::<Result<_, _>>()?, config, nodes: Vec::new() })
    }

    /// Registers nodes until `count` are registered.
    pub async fn register(&mut self, many: usize) -> Result<(), Error> {
        let mut registering = JoinSet::new();
        for number in self.nodes.len()..many {
            if registering.len() >= AT_ONCE {
                self.nodes.extend(registering.join_next().await.transpose()?.transpose()?);
            }
            let endpoint = self.endpoints[number % ENDPOINTS].clone();
            registering.spawn(register(endpoint, self.config.clone(), self.relay, number));
        }
        while let Some(registered) = registering.join_next().await {
            self.nodes.push(registered??);
        }
        Ok(())
    }

    /// Opens `count` circuits, each from one node to its neighbour, and passes a packet over every one. Returns how
    /// many packets arrived.
    pub async fn circuits(&mut self, many: usize) -> Result<usize, Error> {
        let mut arrived = 0;
        for number in 0..many {
            let pairs = self.nodes.len() / 2;
            let pair = self.nodes.chunks_exact_mut(2).nth(number % pairs.max(1)).ok_or("no two nodes")?;
            let [from, to] = pair else { return Err("no two nodes".into()) };
            let circuit = from.request(&to.name).await?;
            let packet = [&circuit.to_be_bytes()[..], &[0], b"packet"].concat();
            from.connection.send_datagram(packet.clone().into())?;
            let came = timeout(PATIENCE, to.connection.read_datagram()).await??;
            arrived += usize::from(came == packet);
        }
        Ok(arrived)
    }

    /// Circuits that the relay has not ended.
    pub fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.nodes.iter().map(|node| &node.connection).filter(|connection| connection.close_reason().is_none())
    }

    /// All nodes are gone when this returns, as far as they can say.
    pub async fn leave(&mut self) {
        self.nodes.clear();
        for endpoint in &self.endpoints {
            endpoint.close(0u8.into(), b"");
            endpoint.wait_idle().await;
        }
    }
}

async fn register(endpoint: Endpoint, config: ClientConfig, relay: SocketAddr, number: usize) -> Result<Node, Error> {
    let connection = endpoint.connect_with(config, relay, "relay")?.await?;
    let (mut send, receive) = connection.open_bi().await?;
    let name = format!("node {number}");
    // Fields that a relay does not look at are left out.
    let connect = [("version", 1.into()), ("node_id", bin(name.as_bytes()))];
    send.write_all(&[&OPENER[..], &frame::encode(kind::CONNECT, &connect)].concat()).await?;
    let mut node = Node { name, connection, send, receive };
    node.answer(|answer| answer.field("address").map(drop)).await?;
    Ok(node)
}

impl Node {
    /// The number of a new circuit.
    async fn request(&mut self, target: &str) -> Result<u32, Error> {
        let request = [("session_id", bin(b"s")), ("target_id", bin(target.as_bytes()))];
        self.send.write_all(&frame::encode(kind::RELAY_REQUEST, &request)).await?;
        self.answer(|answer| u32::try_from(answer.int("circuit")?).ok()).await
    }

    /// What the relay's next message says, if it is what is expected.
    async fn answer<T>(&mut self, read: impl Fn(&Frame<'_>) -> Option<T>) -> Result<T, Error> {
        let mut bytes = vec![0; HEADER];
        timeout(PATIENCE, self.receive.read_exact(&mut bytes)).await??;
        let header = bytes.first_chunk().ok_or("no header")?;
        bytes.resize(HEADER + frame::payload_length(header), 0);
        timeout(PATIENCE, self.receive.read_exact(&mut bytes[HEADER..])).await??;
        let answer = frame::decode(&bytes).map_err(|fault| format!("the relay's answer: {fault:?}"))?;
        read(&answer).ok_or_else(|| format!("the relay's answer: {answer:?}").into())
    }
}
