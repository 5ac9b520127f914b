//! All circuits over one connection to one relay: a QUIC endpoint whose socket is that connection's datagrams.
//!
//! A circuit looks like an address to the endpoint. QUIC within QUIC: the inner connections are encrypted between the two
//! nodes, and recover and control congestion by themselves; the outer connection carries their packets as datagrams that
//! it never repeats.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Instant;
use std::{fmt, mem};

use bytes::Bytes;
use macula_peer_core::proto::packet::{Fit, Joiner, SplitBy, Splitter, parse};
use macula_peer_core::sync::{lock, now_or_never};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Connection, Endpoint, EndpointConfig, SendDatagramError, ServerConfig, UdpPoller, VarInt};
use tokio::sync::Notify;

use crate::runtime::BatchingRuntime;

/// Where circuits seem to be: the first 64 bits of a local address (RFC 4193) that is never on any wire.
const PREFIX: [u16; 4] = [0xfd6d, 0x6163, 0x756c, 0x6100];
const PORT: u16 = 1;

/// What came and was not handed on yet, with what it costs to keep an entry. A receive buffer like a socket's, for the
/// time that the endpoint's task takes to run: 1 MiB is 8 ms at 1 Gbit/s.
const MAX_QUEUED: usize = 1 << 20;
const ENTRY_COST: usize = size_of::<(SocketAddr, Bytes)>();

/// What the inner connections of a lost relay end with; nobody but this side reads it.
const LOST: VarInt = VarInt::from_u32(0);

/// The circuits of one connection to a relay.
#[derive(Debug)]
pub(crate) struct Circuits {
    endpoint: Endpoint,
    socket: Arc<Socket>,
}

impl Circuits {
    /// The circuits, and the future that carries their packets. It ends with the outer connection, and all inner
    /// connections end with it, also when it is dropped. Must be called inside the runtime.
    ///
    /// The transport settings of inner connections are whoever's who makes them; but their packets stay at 1,200 bytes
    /// unless an `initial_mtu` says otherwise, because the socket says that it may fragment.
    pub(crate) fn new(
        outer: Connection,
        server: Option<ServerConfig>,
    ) -> io::Result<(Self, impl Future<Output = ()> + Send + use<>)> {
        let socket = Arc::new(Socket {
            outer,
            sending: Mutex::default(),
            parked: Notify::new(),
            told: AtomicBool::new(false),
            sent: Notify::new(),
            receiving: Mutex::default(),
        });
        let mut config = EndpointConfig::default();
        // The packets are within an encrypted connection: there is nobody to keep from looking at the bit.
        config.grease_quic_bit(false);
        let server = server.map(Self::server);
        let endpoint = Endpoint::new_with_abstract_socket(config, server, socket.clone(), Arc::new(BatchingRuntime))?;
        let end = End { endpoint: endpoint.clone(), socket: socket.clone() };
        Ok((Self { endpoint, socket }, carry(end)))
    }

    /// Settings as they must be for inner connections.
    pub(crate) fn server(mut server: ServerConfig) -> ServerConfig {
        // A circuit is one connection's way; who has another one makes another connection.
        server.migration(false);
        server
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The peer's address on a circuit, as the endpoint sees it.
    pub(crate) fn address(circuit: u32) -> SocketAddr {
        let [a, b, c, d] = PREFIX;
        let [high, low] = [(circuit >> 16) as u16, circuit as u16];
        (Ipv6Addr::new(a, b, c, d, 0, 0, high, low), PORT).into()
    }

    /// The other way round.
    pub(crate) fn circuit(address: SocketAddr) -> Option<u32> {
        let SocketAddr::V6(address) = address else { return None };
        match address.ip().segments() {
            [a, b, c, d, 0, 0, high, low] if [a, b, c, d] == PREFIX => Some(u32::from(high) << 16 | u32::from(low)),
            _ => None,
        }
    }

    /// Returns when a packet is given to the outer connection, once per [`Self::tell_again`].
    pub(crate) async fn sent(&self) {
        self.socket.sent.notified().await;
    }

    pub(crate) fn tell_again(&self) {
        self.socket.told.store(false, Ordering::Relaxed);
    }
}

/// Carries packets both ways until the outer connection ends.
async fn carry(end: End) {
    let socket = &end.socket;
    tokio::select! {
        () = socket.receive() => {}
        () = socket.send_parked() => {}
    }
}

/// Ends all inner connections when it is dropped. Without that they would only notice by their own silence.
struct End {
    endpoint: Endpoint,
    socket: Arc<Socket>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.socket.end();
        self.endpoint.close(LOST, b"relay lost");
    }
}

/// The endpoint's socket. Its locks are taken inside quinn's of an inner connection or endpoint, and quinn's of the outer
/// connection inside them; never the other way round.
struct Socket {
    outer: Connection,
    sending: Mutex<Sending>,
    /// Something was parked.
    parked: Notify,
    /// `sent` has told that something was sent; that is not wanted for every packet.
    told: AtomicBool,
    sent: Notify,
    receiving: Mutex<Receiving>,
}

#[derive(Default)]
struct Sending {
    splitter: Splitter,
    /// Datagrams of the one packet that the outer connection had no room for. Nothing else is sent until they are.
    parked: VecDeque<Bytes>,
    ended: bool,
    /// Connections that wait for room, by the number of their poller.
    writers: HashMap<u64, Waker>,
    pollers: u64,
}

#[derive(Default)]
struct Receiving {
    queue: VecDeque<(SocketAddr, Bytes)>,
    /// What the queue holds and costs.
    bytes: usize,
    reader: Option<Waker>,
}

impl Socket {
    async fn receive(&self) {
        let mut joiner = Joiner::default();
        while let Ok(datagram) = self.outer.read_datagram().await {
            let packet = parse(datagram).and_then(|packet| joiner.push(packet, Instant::now()));
            if let Some((circuit, packet)) = packet {
                self.received(Circuits::address(circuit), packet);
            }
        }
    }

    fn received(&self, from: SocketAddr, packet: Bytes) {
        let mut receiving = lock(&self.receiving);
        let cost = packet.len() + ENTRY_COST;
        // The newest gives way, as in a socket: what came first is what the sender waits for.
        if receiving.bytes + cost > MAX_QUEUED {
            return;
        }
        receiving.bytes += cost;
        receiving.queue.push_back((from, packet));
        let reader = receiving.reader.take();
        drop(receiving);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Sends the packet, or parks it, or drops it if it can never be sent.
    fn send(&self, circuit: u32, packet: &[u8]) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        if sending.ended {
            return Ok(());
        }
        if !sending.parked.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let Some(max) = self.outer.max_datagram_size() else { return Ok(()) };
        match sending.splitter.fit(circuit, packet, max, SplitBy::Sender) {
            Fit::Whole(datagram) => self.send_or_park(&mut sending, datagram),
            Fit::Halves(halves) => halves.into_iter().for_each(|half| self.send_or_park(&mut sending, half)),
            Fit::TooLarge => tracing::debug!(len = packet.len(), max, "packet does not fit a circuit"),
        }
        Ok(())
    }

    /// `send_datagram` would drop the oldest where there is no room.
    fn send_or_park(&self, sending: &mut Sending, datagram: Bytes) {
        let sent = sending.parked.is_empty().then(|| now_or_never(self.outer.send_datagram_wait(datagram.clone())));
        if sent.flatten().is_none() {
            sending.parked.push_back(datagram);
            self.parked.notify_one();
        }
    }

    async fn send_parked(&self) {
        loop {
            self.parked.notified().await;
            while let Some(datagram) = self.first_parked() {
                match self.outer.send_datagram_wait(datagram).await {
                    // Too large: the way to the relay has become narrower meanwhile.
                    Ok(()) | Err(SendDatagramError::TooLarge) => self.unpark(),
                    Err(error) => {
                        tracing::debug!(%error, "the relay takes no packets");
                        return;
                    }
                }
            }
        }
    }

    fn first_parked(&self) -> Option<Bytes> {
        lock(&self.sending).parked.front().cloned()
    }

    fn unpark(&self) {
        let mut sending = lock(&self.sending);
        sending.parked.pop_front();
        let writers = if sending.parked.is_empty() { mem::take(&mut sending.writers) } else { HashMap::new() };
        drop(sending);
        writers.into_values().for_each(Waker::wake);
    }

    fn end(&self) {
        let mut sending = lock(&self.sending);
        sending.ended = true;
        sending.parked.clear();
        let writers = mem::take(&mut sending.writers);
        drop(sending);
        writers.into_values().for_each(Waker::wake);
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let mut sending = lock(&self.sending);
        let id = sending.pollers;
        sending.pollers += 1;
        drop(sending);
        Box::pin(Writable { socket: self, id })
    }

    /// Only ever refuses for a moment: any other error would end the inner connection, or all of them.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(circuit) = Circuits::circuit(transmit.destination) else { return Ok(()) };
        self.send(circuit, transmit.contents)?;
        if !self.told.load(Ordering::Relaxed) && !self.told.swap(true, Ordering::Relaxed) {
            self.sent.notify_one();
        }
        Ok(())
    }

    /// Never an error, which would end the endpoint with all its connections. They are told of the outer connection's
    /// end by [`End`].
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut receiving = lock(&self.receiving);
        let mut received = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let (addr, packet, buf) = loop {
                let Some((addr, packet)) = receiving.queue.pop_front() else {
                    if received == 0 {
                        receiving.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    return Poll::Ready(Ok(received));
                };
                receiving.bytes -= packet.len() + ENTRY_COST;
                // A longer one is not QUIC's between nodes of ours: see `Circuits::new`.
                if let Some(buf) = buf.get_mut(..packet.len()) {
                    break (addr, packet, buf);
                }
            };
            buf.copy_from_slice(&packet);
            *meta = RecvMeta { addr, len: packet.len(), stride: packet.len(), ecn: None, dst_ip: None };
            received += 1;
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let [a, b, c, d] = PREFIX;
        Ok((Ipv6Addr::new(a, b, c, d, 1, 0, 0, 0), PORT).into())
    }

    /// Keeps quinn from looking for the largest packet: one that fits today may be split tomorrow.
    fn may_fragment(&self) -> bool {
        true
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.outer.remote_address()).finish()
    }
}

/// Waits until nothing is parked, for one connection.
#[derive(Debug)]
struct Writable {
    socket: Arc<Socket>,
    id: u64,
}

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut sending = lock(&self.socket.sending);
        if sending.parked.is_empty() {
            return Poll::Ready(Ok(()));
        }
        sending.writers.insert(self.id, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        lock(&self.socket.sending).writers.remove(&self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;
    use crate::relay::testing::{PATIENCE, client_config, echo, pair, server_config, transport};

    /// Two nodes' circuits over one outer connection: what a relay does with the numbers is left out.
    struct Both {
        dialled: Circuits,
        accepted: Circuits,
        outer: [Connection; 2],
        tasks: JoinSet<()>,
    }

    async fn both(mtu: u16, buffer: usize) -> Both {
        let outer = pair(&|| {
            let mut transport = transport();
            transport.initial_mtu(mtu).mtu_discovery_config(None).datagram_send_buffer_size(buffer);
            transport
        })
        .await;
        let mut tasks = JoinSet::new();
        let (dialled, driver) = Circuits::new(outer[0].clone(), None).unwrap();
        tasks.spawn(driver);
        let (accepted, driver) = Circuits::new(outer[1].clone(), Some(server_config(transport()))).unwrap();
        tasks.spawn(driver);
        let endpoint = accepted.endpoint().clone();
        tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Some(incoming) = endpoint.accept().await {
                serving.spawn(async move { echo(incoming.await.unwrap()).await });
            }
        });
        Both { dialled, accepted, outer, tasks }
    }

    async fn connect(circuits: &Circuits, circuit: u32) -> Connection {
        let address = Circuits::address(circuit);
        let connecting = circuits.endpoint().connect_with(client_config(transport()), address, "node").unwrap();
        timeout(PATIENCE, connecting).await.unwrap().unwrap()
    }

    async fn echoed(connection: &Connection, bytes: Vec<u8>) {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        let sent = bytes.clone();
        let writing = async move {
            send.write_all(&bytes).await.unwrap();
            send.finish().unwrap();
        };
        let (_, came) =
            timeout(PATIENCE, async { tokio::join!(writing, receive.read_to_end(usize::MAX)) }).await.unwrap();
        assert!(came.unwrap() == sent, "came back different");
    }

    fn random(len: usize) -> Vec<u8> {
        (0..len).map(|_| fastrand::u8(..)).collect()
    }

    #[test]
    fn addresses_are_circuits_and_back() {
        for circuit in [0, 1, 0xffff, 0x1_0000, u32::MAX] {
            assert_eq!(Circuits::circuit(Circuits::address(circuit)), Some(circuit));
        }
        for other in ["127.0.0.1:1", "[::1]:1", "[fd6d:6163:756c:6100:1::]:1"] {
            assert_eq!(Circuits::circuit(other.parse().unwrap()), None, "{other}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn ten_megabytes_come_back_intact_whole_or_split_with_room_or_without() {
        // 1,200 bytes outside leave less than 1,200 inside. A buffer of 4,000 bytes is full all the time.
        for (mtu, buffer) in [(1452, 1 << 20), (1200, 1 << 20), (1452, 4000), (1200, 4000)] {
            let both = both(mtu, buffer).await;
            let split = both.outer[0].max_datagram_size().unwrap() < 1205;
            assert_eq!(split, mtu == 1200);
            echoed(&connect(&both.dialled, 7).await, random(10 << 20)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_the_outer_connection_has_no_room_for_waits_and_is_not_dropped() {
        let both = both(1452, 4000).await;
        let mut connections = Vec::new();
        for circuit in 0..5 {
            connections.push(connect(&both.dialled, circuit).await);
        }
        let mut echoes = JoinSet::new();
        for connection in connections.clone() {
            echoes.spawn(async move { echoed(&connection, random(1 << 20)).await });
        }
        echoes.join_all().await;
        let made: u64 = connections.iter().map(|connection| connection.stats().udp_tx.datagrams).sum();
        let sent = both.outer[0].stats().frame_tx.datagram;
        // What was made last may not have left yet.
        assert!(made > 4000 && made <= sent + 10, "{made} packets made, {sent} sent");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_inner_connections_end_at_once_with_the_outer_one() {
        let mut both = both(1452, 1 << 20).await;
        let connections = [connect(&both.dialled, 1).await, connect(&both.dialled, 2).await];
        echoed(&connections[0], random(1000)).await;
        both.outer[0].close(0u8.into(), b"");
        for connection in connections {
            timeout(Duration::from_secs(1), connection.closed()).await.unwrap();
        }
        drop(both.dialled);
        drop(both.accepted);
        while let Some(ended) = timeout(PATIENCE, both.tasks.join_next()).await.unwrap() {
            ended.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_aborted_driver_ends_all_inner_connections() {
        let mut both = both(1452, 1 << 20).await;
        let connection = connect(&both.dialled, 1).await;
        both.tasks.shutdown().await;
        timeout(Duration::from_secs(1), connection.closed()).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn garbage_and_a_peer_that_is_not_there_hurt_nobody() {
        let both = both(1452, 1 << 20).await;
        let connection = connect(&both.dialled, 1).await;
        for garbage in
            [random(3), random(40), vec![0, 0, 0, 1, 0, 0x40], vec![0, 0, 0, 9, 1, 0, 0, 1], [0; 1300].into()]
        {
            both.outer[0].send_datagram(garbage.clone().into()).unwrap();
            both.outer[1].send_datagram(garbage.into()).unwrap();
        }
        echoed(&connection, random(1000)).await;
    }

    #[tokio::test]
    async fn the_receive_queue_is_bounded_and_the_newest_gives_way() {
        let [outer, _other] = pair(&transport).await;
        let (circuits, _driver) = Circuits::new(outer, None).unwrap();
        // The endpoint's task does not run while this does not wait.
        for n in 0..2000u32 {
            let mut packet = vec![0; 1200];
            packet[..4].copy_from_slice(&n.to_be_bytes());
            circuits.socket.received(Circuits::address(n), packet.into());
        }
        let mut receiving = lock(&circuits.socket.receiving);
        assert!(receiving.bytes <= MAX_QUEUED && receiving.bytes > MAX_QUEUED - 2000);
        assert_eq!(receiving.queue.pop_front().unwrap().1[..4], 0u32.to_be_bytes());
        receiving.queue.clear();
    }
}
