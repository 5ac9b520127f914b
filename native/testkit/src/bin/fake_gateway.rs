//! Behaves towards a sender as an unmodified macula 0.14.3 gateway does, with its faults, and counts what it got.
//!
//! `fake_gateway [--bind ADDR] [--backlog N] [--handshake-ms MS] [--first-look-ms MS] [--rpc-delay-ms MS] [--mode
//! gateway|listener]`; the commands are `stats`, `reset`, `silence on`, `silence off` and `quit`. It ends without
//! closing its connections, as a killed process would.
//!
//! It looks at a new stream `--first-look-ms` after the first bytes came (default 1), and what a connection carried that is
//! closed by then is lost. With 0 it looks at once: each receive from the socket, which is what one send of a sender on
//! this host brought, is a chunk of its own. The real one is sometimes as fast as that.
//!
//! As a `listener` it answers nothing by itself, and serves its parent process as quicer serves macula: each receive
//! chunk is a line `received STREAM ADDRESS HEX`, which may come before the answer to a command, and `send STREAM HEX`
//! writes to a stream.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::{Pin, pin};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use macula_peer_testkit::frame::{self, Fault, Frame, bin, kind};
use macula_peer_testkit::{control, options::Options, quic};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, Connection, Endpoint, Incoming, ReadError, RecvStream, Runtime, SendStream,
    UdpPoller,
};
use rmpv::ValueRef;
use tokio::sync::mpsc;

fn main() -> Result<(), quic::Error> {
    const OPTIONS: [&str; 6] = ["--bind", "--backlog", "--handshake-ms", "--first-look-ms", "--rpc-delay-ms", "--mode"];
    let options = Options::read(std::env::args().skip(1), &OPTIONS)?;
    let bind: SocketAddr = options.get("--bind", ([127, 0, 0, 1], 0).into())?;
    let gateway = Arc::new(Gateway {
        backlog: options.get("--backlog", 4)?,
        handshake: Duration::from_millis(options.get("--handshake-ms", 2)?),
        first_look: Duration::from_millis(options.get("--first-look-ms", 1)?),
        rpc_delay: Duration::from_millis(options.get("--rpc-delay-ms", 2000)?),
        mode: options.get("--mode", Mode::Gateway)?,
        streams: Streams::default(),
        pending: AtomicUsize::new(0),
        silent: Arc::default(),
        counters: Mutex::default(),
    });
    let runtime = quic::tokio_runtime(1)?;
    let endpoint = runtime.block_on(async { listen(bind, &gateway) })?;
    runtime.spawn(accept(endpoint.clone(), gateway.clone()));
    control::serve(endpoint.local_addr()?.port(), |command| gateway.command(command))?;
    runtime.shutdown_background();
    Ok(())
}

fn listen(bind: SocketAddr, gateway: &Gateway) -> Result<Endpoint, quic::Error> {
    const STREAM_WINDOW: u32 = 64 * 1024;
    let mut transport = quic::transport(100, 3);
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements.ack_eliciting_threshold(0u32.into());
    // A stream's credit goes back once its reset is acknowledged. A sender out of credit has nothing to send along with
    // that, and would take its whole acknowledgement delay over it each time, which the gateway is not seen to cause.
    transport.stream_receive_window(STREAM_WINDOW.into()).ack_frequency_config(Some(acknowledgements));
    let server = quic::server_config(&["macula".into()], transport)?;
    // Drivers that yield let a burst of packets gather into one receive chunk, as MsQuic's worker does.
    let runtime = Arc::new(quic::YieldingRuntime);
    let socket = Arc::new(GatewaySocket {
        socket: runtime.wrap_udp_socket(UdpSocket::bind(bind)?)?,
        silent: gateway.silent.clone(),
        one_at_a_time: gateway.first_look.is_zero(),
        turns: AtomicUsize::new(0),
    });
    Ok(Endpoint::new_with_abstract_socket(quinn::EndpointConfig::default(), Some(server), socket, runtime)?)
}

async fn accept(endpoint: Endpoint, gateway: Arc<Gateway>) {
    let (queue, queued) = mpsc::unbounded_channel();
    tokio::spawn(handshake(queued, gateway.clone()));
    while let Some(incoming) = endpoint.accept().await {
        if gateway.pending.load(Ordering::Relaxed) >= gateway.backlog {
            gateway.counters().refused += 1;
            incoming.refuse();
            continue;
        }
        gateway.pending.fetch_add(1, Ordering::Relaxed);
        if queue.send(incoming).is_err() {
            return;
        }
    }
}

/// One connection after the other.
async fn handshake(mut queued: mpsc::UnboundedReceiver<Incoming>, gateway: Arc<Gateway>) {
    const GIVE_UP: Duration = Duration::from_secs(10);
    while let Some(incoming) = queued.recv().await {
        tokio::time::sleep(gateway.handshake).await;
        let connection = match incoming.accept() {
            Ok(connecting) => tokio::time::timeout(GIVE_UP, connecting).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        gateway.pending.fetch_sub(1, Ordering::Relaxed);
        if let Some(connection) = connection {
            gateway.counters().connections += 1;
            tokio::spawn(accept_unidirectional(connection.clone(), gateway.clone()));
            tokio::spawn(accept_bidirectional(connection, gateway.clone()));
        }
    }
}

async fn accept_bidirectional(connection: Connection, gateway: Arc<Gateway>) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        gateway.counters().streams += 1;
        tokio::spawn(serve(send, receive, connection.clone(), gateway.clone()));
    }
}

async fn accept_unidirectional(connection: Connection, gateway: Arc<Gateway>) {
    while let Ok(mut receive) = connection.accept_uni().await {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            gateway.first_look().await;
            while let Ok(Some(chunk)) = receive_chunk(&mut receive).await {
                gateway.counters().chunk(&chunk);
            }
        });
    }
}

/// Lives until the peer has finished its half and stopped ours: before that the stream's credit stays used.
async fn serve(send: SendStream, mut receive: RecvStream, connection: Connection, gateway: Arc<Gateway>) {
    let peer = connection.remote_address();
    let (answered, mut answers) = mpsc::unbounded_channel();
    let stream = gateway.streams.add(answered.clone());
    let mut stopped = pin!(send.stopped());
    gateway.first_look().await;
    if connection.close_reason().is_some() {
        gateway.counters().unread += 1;
        return;
    }
    let mut send = Some(send);
    let mut receiving = true;
    while receiving || send.is_some() {
        tokio::select! {
            chunk = receive_chunk(&mut receive), if receiving => match chunk {
                Ok(Some(chunk)) => {
                    if let Some((delay, answer)) = gateway.receive(&chunk, stream.number, peer) {
                        tokio::spawn(answer_after(delay, answer, answered.clone()));
                    }
                }
                Ok(None) | Err(_) => receiving = false,
            },
            _ = &mut stopped, if send.is_some() => send = None,
            Some(answer) = answers.recv() => if let Some(send) = &mut send {
                // A peer that has stopped the stream by now misses its answer, as it would with the gateway.
                let _ = send.write_all(&answer).await;
            },
        }
    }
}

async fn answer_after(delay: Duration, answer: Vec<u8>, answered: mpsc::UnboundedSender<Vec<u8>>) {
    // Even a sleep of nothing would last until the timer's next tick.
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    // The stream can be gone by now.
    let _ = answered.send(answer);
}

/// Everything contiguous that is there when the reader wakes, which is what MsQuic indicates at once.
async fn receive_chunk(receive: &mut RecvStream) -> Result<Option<Bytes>, ReadError> {
    const LARGEST: usize = 64 * 1024;
    let Some(first) = receive.read_chunk(LARGEST, true).await? else { return Ok(None) };
    let mut all = BytesMut::from(first.bytes);
    while all.len() < LARGEST
        && let Poll::Ready(Ok(Some(next))) = quic::poll_now(pin!(receive.read_chunk(LARGEST - all.len(), true)))
    {
        all.extend_from_slice(&next.bytes);
    }
    Ok(Some(all.freeze()))
}

struct Gateway {
    backlog: usize,
    handshake: Duration,
    first_look: Duration,
    rpc_delay: Duration,
    mode: Mode,
    streams: Streams,
    pending: AtomicUsize,
    silent: Arc<AtomicBool>,
    counters: Mutex<Counters>,
}

/// Whether the program answers, or its parent process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Gateway,
    Listener,
}

impl FromStr for Mode {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "gateway" => Ok(Self::Gateway),
            "listener" => Ok(Self::Listener),
            _ => Err(()),
        }
    }
}

impl Gateway {
    fn command(&self, command: &str) -> Option<String> {
        match command {
            "stats" => return Some(self.counters().term()),
            "reset" => *self.counters() = Counters::default(),
            "silence on" => self.silent.store(true, Ordering::Relaxed),
            "silence off" => self.silent.store(false, Ordering::Relaxed),
            _ => {
                let (number, bytes) = command.strip_prefix("send ")?.split_once(' ')?;
                if !self.streams.send(number.parse().ok()?, unhex(bytes)?) {
                    return Some("{error,closed}".into());
                }
            }
        }
        Some(control::OK.into())
    }

    fn receive(&self, chunk: &[u8], stream: u64, peer: SocketAddr) -> Option<(Duration, Vec<u8>)> {
        let frame = self.counters().chunk(chunk);
        if self.mode == Mode::Listener {
            // Without a reader the error has no recipient.
            let _ = control::say(format_args!("received {stream} {peer} {}", hex(chunk)));
            return None;
        }
        self.answer(&frame?, peer)
    }

    async fn first_look(&self) {
        // Even a sleep of nothing would last until the timer's next tick.
        if !self.first_look.is_zero() {
            tokio::time::sleep(self.first_look).await;
        }
    }

    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, frame: &Frame<'_>, peer: SocketAddr) -> Option<(Duration, Vec<u8>)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let echo = |key| match frame.field(key) {
            Some(ValueRef::Binary(bytes)) => bin(bytes),
            _ => bin(b""),
        };
        let answer = match frame.kind {
            kind::PING => {
                let timestamp = match frame.field("timestamp") {
                    Some(&ValueRef::Integer(timestamp)) => timestamp,
                    _ => now.into(),
                };
                frame::encode(kind::PONG, &[("timestamp", ValueRef::Integer(timestamp)), ("server_time", now.into())])
            }
            kind::NAT_PROBE => frame::encode(
                kind::NAT_PROBE_REPLY,
                &[
                    ("node_id", echo("node_id")),
                    ("reflexive_ip", bin(peer.ip().to_canonical().to_string().as_bytes())),
                    ("reflexive_port", peer.port().into()),
                    ("server_time", now.into()),
                ],
            ),
            kind::RPC_REQUEST => {
                let fields =
                    [("request_id", echo("request_id")), ("from_node", bin(b"fake_gateway")), ("result", bin(b"ok"))];
                return Some((self.rpc_delay, frame::encode(kind::RPC_REPLY, &fields)));
            }
            kind::FIND_VALUE => frame::encode(kind::FIND_VALUE_REPLY, &[("value", bin(b"value"))]),
            // The empty list, which the original writes as the empty string.
            kind::FIND_NODE => frame::encode(kind::FIND_NODE_REPLY, &[("nodes", "".into())]),
            kind::CALL => frame::encode(kind::REPLY, &[("call_id", echo("call_id")), ("result", bin(b"ok"))]),
            _ => return None,
        };
        Some((Duration::ZERO, answer))
    }
}

/// Streams that can be written to, by number.
#[derive(Default)]
struct Streams {
    next: AtomicU64,
    open: Mutex<HashMap<u64, mpsc::UnboundedSender<Vec<u8>>>>,
}

impl Streams {
    /// Until the result is dropped.
    fn add(&self, answers: mpsc::UnboundedSender<Vec<u8>>) -> OpenStream<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open().insert(number, answers);
        OpenStream { number, streams: self }
    }

    fn send(&self, number: u64, bytes: Vec<u8>) -> bool {
        self.open().get(&number).is_some_and(|answers| answers.send(bytes).is_ok())
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, mpsc::UnboundedSender<Vec<u8>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct OpenStream<'a> {
    number: u64,
    streams: &'a Streams,
}

impl Drop for OpenStream<'_> {
    fn drop(&mut self) {
        self.streams.open().remove(&self.number);
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|&byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)] as char).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let bytes = pairs.iter().map(|&[high, low]| Some((digit(high)? << 4 | digit(low)?) as u8)).collect();
    if rest.is_empty() { bytes } else { None }
}

#[derive(Default)]
struct Counters {
    connections: u64,
    refused: u64,
    streams: u64,
    received: u64,
    incomplete: u64,
    invalid: u64,
    /// Streams whose connection was closed before the gateway looked at them.
    unread: u64,
    extra_bytes: u64,
    bytes: u64,
    types: BTreeMap<&'static str, u64>,
    distinct: HashSet<i128>,
}

impl Counters {
    /// One chunk is one frame, whatever follows the frame in it.
    fn chunk<'a>(&mut self, chunk: &'a [u8]) -> Option<Frame<'a>> {
        const MOST_DISTINCT: usize = 1 << 20;
        self.bytes += chunk.len() as u64;
        match frame::decode(chunk) {
            Ok(frame) => {
                self.received += 1;
                self.extra_bytes += frame.extra as u64;
                *self.types.entry(frame::type_name(frame.kind).unwrap_or_default()).or_default() += 1;
                if let Some(number) = frame.int("n")
                    && self.distinct.len() < MOST_DISTINCT
                {
                    self.distinct.insert(number);
                }
                return Some(frame);
            }
            Err(Fault::Incomplete) => self.incomplete += 1,
            Err(Fault::Invalid) => self.invalid += 1,
        }
        None
    }

    fn term(&self) -> String {
        control::term([
            ("connections", self.connections.to_string()),
            ("refused", self.refused.to_string()),
            ("streams", self.streams.to_string()),
            ("received", self.received.to_string()),
            ("distinct", self.distinct.len().to_string()),
            ("incomplete", self.incomplete.to_string()),
            ("invalid", self.invalid.to_string()),
            ("unread", self.unread.to_string()),
            ("extra_bytes", self.extra_bytes.to_string()),
            ("bytes", self.bytes.to_string()),
            ("types", control::term(self.types.iter().map(|(name, count)| (*name, count.to_string())))),
        ])
    }
}

/// A socket that can play dead while it stays bound, and that can delay the next receive until all tasks have looked at
/// what the last one brought.
#[derive(Debug)]
struct GatewaySocket {
    socket: Arc<dyn AsyncUdpSocket>,
    silent: Arc<AtomicBool>,
    one_at_a_time: bool,
    /// How many more turns the other tasks get.
    turns: AtomicUsize,
}

impl AsyncUdpSocket for GatewaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.silent.load(Ordering::Relaxed) { Ok(()) } else { self.socket.try_send(transmit) }
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // A packet passes through its connection's driver, the stream's task and what these wake.
        const TURNS: usize = 16;
        let most = if self.one_at_a_time { 1 } else { buffers.len() };
        let turns = self.turns.load(Ordering::Relaxed);
        if turns > 0 {
            self.turns.store(turns - 1, Ordering::Relaxed);
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            let count = ready!(self.socket.poll_recv(context, &mut buffers[..most], &mut meta[..most]))?;
            if !self.silent.load(Ordering::Relaxed) {
                self.turns.store(if self.one_at_a_time { TURNS } else { 0 }, Ordering::Relaxed);
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
