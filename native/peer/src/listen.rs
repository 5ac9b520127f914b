//! Accepted connections: what arrives, and the answers to it.
//!
//! Each connection is bounded: streams by QUIC's own limit, unread bytes by flow control, and a frame that was begun by the
//! time that it may go without growing. Connections, and memory for large frames, are bounded for each key and address.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use macula_peer_core::errors::Rejection;
use macula_peer_core::growth::Growth;
use macula_peer_core::proto::answers;
use macula_peer_core::proto::codes::connection::{NO_CERTIFICATE, OVER_LIMIT, UNEXPECTED};
use macula_peer_core::proto::codes::stream::{MALFORMED, NOT_A_RELAY, REQUEST_FORGOTTEN, TOO_SLOW, WRONG_NODE};
use macula_peer_core::proto::session::{ASK_NODE, FOR_NODE, OPEN_CONTROL, OPEN_SESSION, REQUEST};
use macula_peer_core::requests::{Asked, Ended, RequestId};
use macula_peer_core::shares::Client;
use macula_peer_core::types::{Dialect, Fingerprint, Path, canonical};
use macula_peer_core::weights::Owner;
use macula_peer_wire::{FrameError, HEADER_LEN, Header, MessageType, RawFrame, Reassembler};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AckFrequencyConfig, Connection, Incoming, RecvStream, SendStream, ServerConfig, TransportConfig};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinSet, yield_now};
use tokio::time::{MissedTickBehavior, timeout};

use crate::addresses::Remote;
use crate::backlog::Sender;
use crate::config::Config;
use crate::counters::Counter;
use crate::decoding::is_heavy;
use crate::expected::Caller;
use crate::frame_memory::Reserved;
use crate::handshake::handshake;
use crate::identity::{sender_key, shown_key};
use crate::inbound::{AnswerQueue, Asking, Inbound, ReplyTo, ReplyToken, Route};
use crate::link::Link;
use crate::node::Node;
use crate::peer::Peer;
use crate::places::{Arrived, Place};
use crate::relay::server::Opener;
use crate::request::Named;
use crate::stats::{AcceptedStats, LinkStats};
use crate::sync::{deadline, lock, now_or_never};
use crate::tls::dialect_of;
use crate::transfer::{self, Write, is_acknowledged, write_now};
use crate::transport::{
    CONNECTION_WINDOW, HANDSHAKE_TIMEOUT, KNOWN_PATH_ROUND_TRIP, MAX_ANSWERING, RELAY_IDLE_TIMEOUT,
    RELAY_RECEIVE_BUFFER, STREAM_WINDOW, idle_timeout,
};
use crate::turns::QUANTUM;
use crate::{hello, session};

/// Frames that are much work and wait for their turn, from which on a connection may begin no more streams: one that is
/// read to its end gives its credit back, whether its frame was handed over or not.
const WAITING_FRAMES: usize = 16;

/// So many connections of one address have such a window each, and as many streams as are allowed. Of more each one has less,
/// down to the least.
const FULL_CONNECTIONS: u32 = 32;
const LEAST_WINDOW: u32 = 128 << 10;

/// A token that is kept longer than this answers nothing: the stream and its memory are let go.
pub(crate) const REPLY_TIMEOUT: Duration = Duration::from_secs(300);

/// How often a connection on which nothing begins is looked through for streams whose answer nobody wants any more: a
/// sender without credit begins nothing.
const RELEASE_EVERY: Duration = Duration::from_millis(20);

/// Answers of one stream that may wait to be written. Beyond that nothing more is read from who does not read them.
const MAX_WAITING_ANSWERS: usize = 64;

/// Bytes taken from a stream at once, more than a packet holds. While a stream waits, quinn may join all that has come to
/// one chunk: whole, it would be heard however many answers wait.
const READ_AT_ONCE: usize = 4 << 10;

/// Bytes read of a new stream before it gets a task, which goes by the answers that wait.
const READ_AT_FIRST: usize = 32 << 10;

/// More than a sender of this library listens on: some of them must be given up.
const MANY_ANSWERABLE: usize = 128;

/// Streams begun in one turn of a connection's loop. What they are for may be the work of tasks, which no turn bounds.
const ACCEPT_BATCH: usize = 16;

/// Streams that a new connection may open before it is known what it speaks and needs them for. quinn keeps memory for
/// each, and a registration at a relay needs no more.
const FIRST_STREAMS: u32 = 32;

/// What is allowed in our dialect however little is configured: a session has two streams, a relay's node one more, and
/// somebody may ask something.
const LEAST_STREAMS: u32 = 4;

/// Streams that a sender may open and needs no answer on. As a 0.14.3 gateway has it.
const ONE_WAY_STREAMS: u8 = 3;

/// How often others go first before a handshake begins. A message and its answer take about as many tasks, one after the
/// other, and no more than one or two handshakes are to begin meanwhile.
const STEPS: usize = 8;

/// One accepted connection.
pub(crate) struct Accepted {
    connection: Connection,
    remote: Arc<Remote>,
    dialect: Dialect,
    pub(crate) path: Path,
    key: Option<Fingerprint>,
    /// `None` if we began the connection.
    place: Option<Arc<Place>>,
    /// The peer whose link this is, if we began the connection.
    owner: Weak<Peer>,
    received: Counter,
    /// Held by the one frame that waits for memory.
    turn: tokio::sync::Mutex<()>,
    /// Frames that are much work and wait for their turn.
    heavy: AtomicUsize,
    /// One of them waits no more.
    heavy_done: Notify,
    /// Datagrams received when it was last found to be silent.
    silent_at: AtomicU64,
    /// Only [`FIRST_STREAMS`] are allowed so far.
    few_streams: AtomicBool,
}

/// How a listener lets others in.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) config: Arc<ServerConfig>,
    transport: Transport,
    /// The same where not everybody is let in.
    strict: Arc<ServerConfig>,
    strict_transport: Transport,
}

impl Admission {
    /// `strict`: not everybody is let in. Streams are then allowed to those who are, which is how they know. `relay`:
    /// packets of circuits are taken.
    pub(crate) fn new(tls: QuicServerConfig, strict: bool, relay: bool, config: &Config) -> Self {
        Self::with_transport(tls, strict, |strict| {
            let mut transport = Transport::new(strict, config);
            if relay {
                transport.datagrams = Some(RELAY_RECEIVE_BUFFER);
                // Nodes probe at their own pace, whatever this one's is for others.
                transport.idle_timeout = RELAY_IDLE_TIMEOUT.max(transport.idle_timeout);
            }
            transport
        })
    }

    /// For connections over circuits, and on paths that both nodes have made.
    pub(crate) fn over_known_ways(tls: QuicServerConfig, strict: bool, config: &Config) -> Self {
        Self::with_transport(tls, strict, |strict| Transport {
            initial_round_trip: Some(KNOWN_PATH_ROUND_TRIP),
            ..Transport::new(strict, config)
        })
    }

    fn with_transport(tls: QuicServerConfig, strict: bool, transport: impl Fn(bool) -> Transport) -> Self {
        let tls = Arc::new(tls);
        let server = |transport: &Transport| {
            let mut server = ServerConfig::with_crypto(tls.clone());
            server.transport_config(Arc::new(transport.config()));
            Arc::new(server)
        };
        let (transport, strict_transport) = (transport(strict), transport(true));
        Self { config: server(&transport), transport, strict: server(&strict_transport), strict_transport }
    }

    /// For who connects now and is followed.
    fn following(&self, node: &Node, remote: &Arc<Remote>) -> Arc<ServerConfig> {
        let (config, transport) = match node.admissions.select_by_key() {
            true => (&self.strict, &self.strict_transport),
            false => (&self.config, &self.transport),
        };
        let mut transport = transport.config();
        transport.congestion_controller_factory(remote.clone());
        let mut server = ServerConfig::clone(config);
        server.transport_config(Arc::new(transport));
        Arc::new(server)
    }

    /// For who connects now.
    pub(crate) fn config_for(&self, node: &Node) -> Arc<ServerConfig> {
        if node.admissions.select_by_key() { self.strict.clone() } else { self.config.clone() }
    }

    fn let_in(connection: &Connection, dialect: Dialect, config: &Config) {
        let streams = match dialect {
            Dialect::Macula => config.max_streams,
            Dialect::MaculaPeer1 => first_streams(config),
        };
        connection.set_max_concurrent_bi_streams(streams.into());
        connection.set_max_concurrent_uni_streams(ONE_WAY_STREAMS.into());
    }
}

fn first_streams(config: &Config) -> u32 {
    config.max_streams.clamp(LEAST_STREAMS, FIRST_STREAMS)
}

/// The transport settings of accepted connections.
#[derive(Debug, Clone, Copy)]
struct Transport {
    two_way_streams: u32,
    one_way_streams: u8,
    idle_timeout: Duration,
    /// Until it is measured. `None`: nothing is known.
    initial_round_trip: Option<Duration>,
    /// Bytes of datagrams that wait to be read. `None`: none are taken.
    datagrams: Option<usize>,
}

impl Transport {
    fn new(strict: bool, config: &Config) -> Self {
        let (two_way_streams, one_way_streams) = if strict { (0, 0) } else { (first_streams(config), ONE_WAY_STREAMS) };
        let idle_timeout = idle_timeout(config);
        Self { two_way_streams, one_way_streams, idle_timeout, initial_round_trip: None, datagrams: None }
    }

    fn config(&self) -> TransportConfig {
        // The credit of a stream comes back when our half of it is acknowledged as closed. A sender that has run out of
        // credit has nothing to send its acknowledgements with and would delay them by 25 ms, so it is asked not to.
        let mut acknowledgements = AckFrequencyConfig::default();
        acknowledgements.ack_eliciting_threshold(0u8.into());
        let mut transport = TransportConfig::default();
        transport
            .ack_frequency_config(Some(acknowledgements))
            .max_concurrent_bidi_streams(self.two_way_streams.into())
            .max_concurrent_uni_streams(self.one_way_streams.into())
            .receive_window(CONNECTION_WINDOW.into())
            .stream_receive_window(STREAM_WINDOW.into())
            .datagram_receive_buffer_size(self.datagrams)
            // A time beyond QUIC's 2^62 ms means none.
            .max_idle_timeout(self.idle_timeout.try_into().ok());
        if let Some(round_trip) = self.initial_round_trip {
            transport.initial_rtt(round_trip);
        }
        transport
    }
}

/// The listener, and the connections that it has accepted.
struct Listener {
    admission: watch::Receiver<Option<Admission>>,
    connections: JoinSet<()>,
}

impl Listener {
    /// Whom the listener admits now. Connections of an earlier listener end first.
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
pub(crate) async fn accept(node: Arc<Node>) {
    let mut listener = Listener { admission: node.listening.subscribe(), connections: JoinSet::new() };
    let mut expected = JoinSet::new();
    let mut stopping = node.stopping();
    let mut spent = Duration::ZERO;
    loop {
        if spent >= QUANTUM {
            spent = Duration::ZERO;
            yield_now().await;
        }
        tokio::select! {
            incoming = node.quic.accept() => match incoming {
                Some(incoming) => {
                    let begun = Instant::now();
                    let admission = listener.admission();
                    let callers = node.expected.at(canonical(incoming.remote_address()));
                    match (callers, admission) {
                        (None, None) => incoming.ignore(),
                        _ if !node.admissions.permit_address(incoming.remote_address()) => incoming.refuse(),
                        (Some(callers), _) if expected.len() < node.config.max_accepted => {
                            expected.spawn(accept_expected(node.clone(), callers, incoming));
                        }
                        (_, Some(admission)) => admit(&node, &admission, incoming, &mut listener.connections),
                        (_, None) => incoming.ignore(),
                    }
                    spent += begun.elapsed();
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

fn admit(node: &Arc<Node>, admission: &Admission, incoming: Incoming, connections: &mut JoinSet<()>) {
    let address = canonical(incoming.remote_address()).ip();
    match node.places.arrive(address, incoming.remote_address_validated()) {
        Arrived::Placed(place) => {
            connections.spawn(accept_one(node.clone(), admission.clone(), incoming, place));
        }
        // Fails only for an address that has been proven.
        Arrived::Prove => drop(incoming.retry()),
        Arrived::Refused => incoming.refuse(),
    }
}

async fn accept_one(node: Arc<Node>, admission: Admission, incoming: Incoming, place: Place) {
    let Some((connection, remote)) = accept_with(&node, &admission, incoming).await else { return };
    serve(node, connection, Path::Direct, remote, place).await;
}

/// Accepts with these settings, although it may have come while another listener was there. Where its other end is, too.
async fn accept_with(node: &Node, admission: &Admission, incoming: Incoming) -> Option<(Connection, Arc<Remote>)> {
    let address = incoming.remote_address();
    let (socket, remote) = (node.current_socket(), Remote::following(address));
    // The keys are made here, which takes as long as some twenty messages, and no packet comes in meanwhile.
    let turn =
        timeout(HANDSHAKE_TIMEOUT, node.handshakes.late_turn(canonical(address).ip().into(), STEPS)).await.ok()?;
    let connecting = incoming.accept_with(admission.following(node, &remote)).ok()?;
    drop(turn);
    let connected = timeout(HANDSHAKE_TIMEOUT, handshake(&socket, address, connecting)).await.ok()?;
    let connection = connected.inspect_err(|error| tracing::debug!(%error, "not accepted")).ok()?;
    remote.is_connected(socket.get().addresses());
    Some((connection, remote))
}

/// A connection on a path that both nodes have made.
async fn accept_expected(node: Arc<Node>, callers: Vec<Caller>, incoming: Incoming) {
    let admission = node.clients.admission().clone();
    let Some((connection, remote)) = accept_with(&node, &admission, incoming).await else { return };
    let shown = shown_key(&connection);
    let mut meant = callers.into_iter().filter(|caller| Some(caller.key) == shown);
    let Some(Caller { extra: _extra, connected, .. }) = meant.next() else {
        tracing::warn!(from = %remote.address(&connection), "another node than the expected one");
        return connection.close(UNEXPECTED.into(), b"unexpected key");
    };
    connected.notify_one();
    // Of several attempts, each has reached its end.
    meant.for_each(|caller| caller.connected.notify_one());
    let Some(place) = node.places.enter(remote.address(&connection).ip()) else {
        return connection.close(OVER_LIMIT.into(), b"connections");
    };
    serve(node, connection, Path::HolePunch, remote, place).await;
}

/// Serves a connection to its end.
pub(crate) async fn serve(node: Arc<Node>, connection: Connection, path: Path, remote: Arc<Remote>, place: Place) {
    place.connected();
    let Some(dialect) = dialect_of(&connection) else { return };
    let key = sender_key(&connection, dialect);
    if dialect == Dialect::MaculaPeer1 && key.is_none() {
        return connection.close(NO_CERTIFICATE.into(), b"no certificate");
    }
    if key.is_some_and(|key| !place.show(&connection, key)) {
        return;
    }
    let Some(_admitted) = node.admissions.admit_connection(&connection, key, path, &remote).await else { return };
    Admission::let_in(&connection, dialect, &node.config);
    let window = place.share(CONNECTION_WINDOW, FULL_CONNECTIONS);
    if window < CONNECTION_WINDOW {
        connection.set_receive_window(window.max(LEAST_WINDOW).into());
    }
    let accepted =
        Accepted { place: Some(Arc::new(place)), ..Accepted::new(connection, remote, dialect, path, key, Weak::new()) };
    let accepted = Arc::new(accepted);
    let _entry = Entry::new(node.clone(), accepted.clone());
    serve_streams(node, accepted).await;
}

/// Serves what the peer begins on a link that we dialled: so two nodes need one connection.
pub(crate) async fn serve_link(node: Arc<Node>, peer: Weak<Peer>, link: Arc<Link>) {
    let Some(_place) = node.admissions.admit_link(&link.connection, link.shown) else { return };
    link.connection.set_max_concurrent_bi_streams(first_streams(&node.config).into());
    let Link { connection, dialect, path, shown, .. } = &*link;
    let remote = Remote::fixed(link.remote());
    let accepted = Accepted::new(connection.clone(), remote, *dialect, *path, *shown, peer);
    drop(link);
    serve_streams(node, Arc::new(accepted)).await;
}

async fn serve_streams(node: Arc<Node>, accepted: Arc<Accepted>) {
    let connection = accepted.connection.clone();
    let (is_ours, sender) = (accepted.is_ours(), accepted.sender());
    let (replies, mut replied) = mpsc::unbounded_channel();
    let mut release = tokio::time::interval(RELEASE_EVERY);
    release.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut serving = Serving {
        node: node.clone(),
        accepted,
        streams: JoinSet::new(),
        answerable: VecDeque::new(),
        answered: VecDeque::new(),
        next: 0,
        replies,
    };
    let mut behind = false;
    loop {
        let expiry = serving.answerable.front().map(|oldest| oldest.until);
        let crowded = node.is_crowded(sender);
        let waits = serving.accepted.has_many_waiting();
        tokio::select! {
            stream = connection.accept_bi(), if !crowded && !waits => match stream {
                Ok((send, receive)) => serving.begin(Some(send), receive),
                Err(_) => return,
            },
            // On a link of ours these are answers, which its peer reads.
            stream = connection.accept_uni(), if !is_ours && !crowded && !waits => match stream {
                Ok(receive) => serving.begin(None, receive),
                Err(_) => return,
            },
            Some((stream, frame)) = replied.recv() => serving.reply(stream, frame),
            Some(_) = serving.streams.join_next() => {}
            () = deadline(expiry) => { serving.answerable.pop_front(); }
            () = node.room(sender), if crowded => continue,
            () = serving.accepted.heavy_done.notified(), if waits => continue,
            _ = release.tick(), if !serving.answerable.is_empty() || !serving.answered.is_empty() => {
                serving.release_all_stopped();
                serving.release_arrived();
            }
            // From now on more than an answer may be sent there, whether anybody asks where it is or not.
            () = serving.accepted.remote.changed() => { serving.accepted.remote(); }
        }
        let _turn = if behind { node.busy.late_turn(sender, 1).await } else { None };
        behind = serving.begin_some(&connection);
    }
}

/// The state of the task of one accepted connection.
struct Serving {
    node: Arc<Node>,
    accepted: Arc<Accepted>,
    /// Streams that were not complete at once.
    streams: JoinSet<()>,
    /// Streams that carried their one message and may be answered, oldest first.
    answerable: VecDeque<Answerable>,
    /// The streams of requests whose answers are on their way.
    answered: VecDeque<(RequestId, SendStream)>,
    next: u64,
    replies: mpsc::UnboundedSender<(u64, Option<Bytes>)>,
}

struct Answerable {
    stream: u64,
    request: Option<RequestId>,
    send: SendStream,
    until: Instant,
}

impl Serving {
    /// What has come meanwhile costs no turn of the loop each. Returns whether there may be more.
    fn begin_some(&mut self, connection: &Connection) -> bool {
        let (begun, sender) = (Instant::now(), self.accepted.sender());
        for _ in 0..ACCEPT_BATCH {
            if self.node.is_crowded(sender) || self.accepted.has_many_waiting() {
                return false;
            }
            let Some(Ok((send, receive))) = now_or_never(connection.accept_bi()) else { return false };
            self.begin(Some(send), receive);
            if begun.elapsed() >= QUANTUM {
                break;
            }
        }
        true
    }

    /// Reads a new stream as far as it goes without waiting: a whole message needs no task of its own.
    fn begin(&mut self, send: Option<SendStream>, receive: RecvStream) {
        self.release_stopped();
        self.release_arrived();
        let mut stream = Stream {
            node: self.node.clone(),
            accepted: self.accepted.clone(),
            receive,
            frames: Reassembler::new(self.node.config.limits),
            reading: true,
            finished: false,
            request: None,
            growth: Growth::default(),
            reserved: None,
            gathered: false,
        };
        while stream.frames.buffered() < READ_AT_FIRST
            && let Some(chunk) = now_or_never(stream.receive.read_chunk(READ_AT_ONCE, true))
        {
            if !stream.took(chunk) {
                break;
            }
        }
        // That no answer is read is said in the same packet as the message, as a rule.
        let send = send.filter(|send| now_or_never(send.stopped()).is_none());
        if stream.reading {
            self.streams.spawn(stream.serve(send, None));
            return;
        }
        if stream.finished && stream.frames.is_empty() {
            // A stream that was opened and not needed.
            return;
        }
        let id = self.next;
        self.next += 1;
        let route = || send.as_ref().map(|_| Route::Connection(id, self.replies.clone()));
        match stream.deliver(route, || false) {
            Delivered::All | Delivered::Some => {}
            Delivered::Heavy(frame) => {
                self.streams.spawn(stream.serve(send, Some(frame)));
                return;
            }
            Delivered::Refused(why) if self.accepted.dialect == Dialect::MaculaPeer1 => return not_taken(send, why),
            // As a 0.14.3 gateway has it.
            Delivered::Refused(_) => {}
            Delivered::Opened(opening) => {
                self.streams.spawn(stream.opened(opening, send));
                return;
            }
            Delivered::ForAnother => return stream.end(send, WRONG_NODE),
            Delivered::Forgotten => return stream.end(send, REQUEST_FORGOTTEN),
        }
        if let Some(send) = send {
            let (request, until) = (stream.request.map(|(id, _)| id), Instant::now() + REPLY_TIMEOUT);
            self.answerable.push_back(Answerable { stream: id, request, send, until });
        }
    }

    /// Lets go of answers that the peer has.
    fn release_arrived(&mut self) {
        while let Some((request, send)) = self.answered.front() {
            if is_acknowledged(send) {
                self.accepted.arrived(&self.node, *request);
            } else if now_or_never(send.stopped()).is_none() {
                return;
            }
            self.answered.pop_front();
        }
    }

    /// Behind one that is still waited on, others may have been given up.
    fn release_all_stopped(&mut self) {
        self.answerable.retain(|entry| now_or_never(entry.send.stopped()).is_none());
    }

    /// Senders that listen for answers to many messages give up on the oldest first, and need its credit back.
    fn release_stopped(&mut self) {
        if self.answerable.len() >= MANY_ANSWERABLE && self.next.is_multiple_of(MANY_ANSWERABLE as u64 / 4) {
            self.release_all_stopped();
        }
        while let Some(oldest) = self.answerable.front() {
            if now_or_never(oldest.send.stopped()).is_none() {
                return;
            }
            self.answerable.pop_front();
        }
    }

    fn reply(&mut self, stream: u64, frame: Option<Bytes>) {
        let Ok(index) = self.answerable.binary_search_by_key(&stream, |entry| entry.stream) else { return };
        let Some(Answerable { mut send, request, .. }) = self.answerable.remove(index) else { return };
        let Some(frame) = frame else { return };
        // Dropped, the stream is finished.
        match (write_now(&mut send, &frame), request) {
            (Write::All, Some(request)) => {
                // Stopped is noticed when it is next looked at.
                let _ = send.finish();
                self.answered.push_back((request, send));
            }
            (Write::All | Write::Failed, _) => {}
            (Write::Part(rest), request) => {
                let Some(waiting) = self.node.unread.begin(self.accepted.client(), rest.len()) else {
                    // Already closed is as good.
                    let _ = send.reset(TOO_SLOW.into());
                    return;
                };
                let (node, accepted) = (self.node.clone(), self.accepted.clone());
                self.streams.spawn(async move {
                    let _waiting = waiting;
                    if !transfer::write(&mut send, rest).await {
                        // Already closed is as good.
                        let _ = send.reset(TOO_SLOW.into());
                    } else if let Some(request) = request {
                        accepted.arrives(&node, request, send).await;
                    }
                });
            }
        }
    }
}

/// The accepted connections that are served.
#[derive(Default)]
pub(crate) struct AcceptedTable {
    all: HashMap<usize, Arc<Accepted>>,
    of_key: HashMap<Fingerprint, HashMap<usize, Arc<Accepted>>>,
}

impl AcceptedTable {
    fn insert(&mut self, id: usize, accepted: Arc<Accepted>) {
        if let Some(key) = accepted.key {
            self.of_key.entry(key).or_default().insert(id, accepted.clone());
        }
        self.all.insert(id, accepted);
    }

    fn remove(&mut self, id: usize) -> Option<Arc<Accepted>> {
        let accepted = self.all.remove(&id)?;
        if let Some(key) = accepted.key
            && let Some(of_key) = self.of_key.get_mut(&key)
        {
            of_key.remove(&id);
            if of_key.is_empty() {
                self.of_key.remove(&key);
            }
        }
        Some(accepted)
    }

    /// Those that the holder of a key began.
    pub(crate) fn of_key(&self, key: &Fingerprint) -> Vec<Arc<Accepted>> {
        self.of_key.get(key).into_iter().flat_map(HashMap::values).cloned().collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Accepted>> {
        self.all.values().cloned().collect()
    }
}

/// The accepted connection in the node's table, as long as it is served.
struct Entry {
    node: Arc<Node>,
    id: usize,
}

impl Entry {
    fn new(node: Arc<Node>, accepted: Arc<Accepted>) -> Self {
        let id = accepted.connection.stable_id();
        let key = accepted.key;
        lock(&node.accepted).insert(id, accepted);
        if let Some(key) = key {
            node.arrived(key);
        }
        Self { node, id }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let accepted = lock(&self.node.accepted).remove(self.id);
        if let Some(accepted) = accepted {
            // Others hold on to it, who do not serve it.
            accepted.connection.close(0u8.into(), b"");
            accepted.place.iter().for_each(|place| place.leave());
        }
    }
}

/// One stream of an accepted connection.
pub(crate) struct Stream {
    pub(crate) node: Arc<Node>,
    pub(crate) accepted: Arc<Accepted>,
    pub(crate) receive: RecvStream,
    pub(crate) frames: Reassembler,
    reading: bool,
    /// It has ended in order.
    pub(crate) finished: bool,
    /// The request that its message is, and whether only that is wanted which came of it before.
    request: Option<(RequestId, bool)>,
    /// Of the present frame, and the memory for a large one.
    growth: Growth,
    reserved: Option<Reserved>,
    /// It was for a frame that is complete.
    gathered: bool,
}

/// What was made of the frames of a stream.
enum Delivered {
    /// They were messages.
    All,
    /// Some were. More wait until answers to them are written.
    Some,
    /// They were messages up to this one, which is much work.
    Heavy(RawFrame),
    /// The first one was the engine's own: the rest is not messages.
    Opened(RawFrame),
    /// One of them was no message, or cannot be taken.
    Refused(Rejection),
    /// They are for a node with another id.
    ForAnother,
    /// The request that is asked again is not known.
    Forgotten,
}

impl Stream {
    /// Reads the stream to its end, and writes the answers to what it carried. `heavy`: its first frame, if that is much
    /// work.
    async fn serve(mut self, mut send: Option<SendStream>, mut heavy: Option<RawFrame>) {
        let (replies, mut replied) = AnswerQueue::new(self.node.unread.clone(), self.accepted.client());
        // The end of this channel that lives here: gone when no further token is to be made.
        let mut replies = send.is_some().then_some(replies);
        let (node, sender) = (self.node.clone(), self.accepted.sender());
        let mut answer_until = None;
        let mut spent = Duration::ZERO;
        loop {
            let mut turn = None;
            if spent >= QUANTUM && heavy.is_none() {
                spent = Duration::ZERO;
                turn = node.busy.late_turn(sender, 1).await;
            }
            let crowding = |waits: bool| waits && replied.len() >= MAX_WAITING_ANSWERS;
            let delivered = match heavy.take() {
                Some(frame) => self.deliver_heavy(frame, replies.clone().map(Route::Stream)).await,
                None => {
                    let begun = Instant::now();
                    let delivered = self.deliver(|| replies.clone().map(Route::Stream), || crowding(replies.is_some()));
                    spent += begun.elapsed();
                    delivered
                }
            };
            drop(turn);
            let paused = matches!(delivered, Delivered::Some);
            match delivered {
                Delivered::All | Delivered::Some => {}
                Delivered::Heavy(frame) => {
                    heavy = Some(frame);
                    continue;
                }
                Delivered::Opened(opening) => {
                    drop((replies, replied));
                    return self.opened(opening, send).await;
                }
                Delivered::Refused(why) if self.accepted.dialect == Dialect::MaculaPeer1 => {
                    return not_taken(send, why);
                }
                Delivered::Refused(_) => return,
                Delivered::ForAnother => return self.end(send, WRONG_NODE),
                Delivered::Forgotten => return self.end(send, REQUEST_FORGOTTEN),
            }
            if !self.reading && !paused {
                replies = None;
                answer_until.get_or_insert_with(|| Instant::now() + REPLY_TIMEOUT);
            }
            if !self.reading && send.is_none() {
                return;
            }
            if self.reading && !paused {
                self.pace().await;
            }
            let crowded = node.is_crowded(sender);
            let hears = self.reading && !paused && !crowded && !crowding(send.is_some());
            tokio::select! {
                () = node.room(sender), if self.reading && crowded => {}
                chunk = self.read(), if hears => match chunk {
                    Some(chunk) => {
                        self.took(chunk);
                    }
                    None => return self.too_slow(),
                },
                reply = replied.recv(), if send.is_some() => {
                    // None: every token is used or dropped, and no message comes any more.
                    let written = match (reply, &mut send) {
                        (Some((frame, _held)), Some(send)) => transfer::write(send, frame).await,
                        _ => false,
                    };
                    if !written {
                        send = None;
                    } else if let Some((request, _)) = self.request
                        && let Some(send) = send.take()
                    {
                        // It has one answer.
                        return self.accepted.arrives(&node, request, send).await;
                    }
                }
                () = is_stopped(&send) => send = None,
                () = deadline(answer_until) => return,
            }
            if send.is_none() {
                replies = None;
                replied.close();
                while replied.try_recv().is_ok() {}
            }
        }
    }

    /// Returns whether there may be more.
    fn took(&mut self, chunk: Result<Option<quinn::Chunk>, quinn::ReadError>) -> bool {
        match chunk {
            Ok(Some(chunk)) => self.frames.push(chunk.bytes),
            Ok(None) => (self.reading, self.finished) = (false, true),
            Err(_) => self.reading = false,
        }
        self.reading
    }

    /// The next whole frame.
    pub(crate) fn next_frame(&mut self) -> Result<Option<RawFrame>, FrameError> {
        if std::mem::take(&mut self.gathered) {
            self.reserved = None;
        }
        let frame = self.frames.next_frame();
        match &frame {
            Ok(Some(_)) => (self.growth, self.gathered) = (Growth::default(), true),
            // A question that is too long to be answered is not gathered.
            Ok(None) if !self.frames.is_empty() => self.check_announced()?,
            _ => {}
        }
        frame
    }

    fn check_announced(&self) -> Result<(), FrameError> {
        let (limits, max) = (answers::LIMITS, answers::LIMITS.max_frame);
        match self.frames.announced() {
            Some(Header { type_id, payload_len })
                if payload_len > limits.max_frame && self.accepted.is_probe(&self.node, type_id) =>
            {
                Err(FrameError::TooLarge { len: payload_len, max })
            }
            _ => Ok(()),
        }
    }

    /// Hands over every whole frame that is little work, until it is crowded.
    fn deliver(&mut self, route: impl Fn() -> Option<Route>, is_crowded: impl Fn() -> bool) -> Delivered {
        loop {
            if is_crowded() {
                return Delivered::Some;
            }
            let frame = match self.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Delivered::All,
                Err(error) => {
                    tracing::debug!(from = %self.accepted.remote(), %error, "not a frame");
                    self.refuse(Rejection::from(&error));
                    return Delivered::Refused(Rejection::from(&error));
                }
            };
            if self.accepted.dialect == Dialect::MaculaPeer1 {
                match frame.type_id() {
                    OPEN_SESSION | OPEN_CONTROL | ASK_NODE | hello::ASK_SUCCESSION => {
                        return Delivered::Opened(frame);
                    }
                    FOR_NODE if self.node.serves(frame.payload()) => continue,
                    FOR_NODE => return Delivered::ForAnother,
                    REQUEST => match Named::parse(frame.payload()) {
                        Some(request) => {
                            self.request = Some(request);
                            continue;
                        }
                        None => {
                            self.refuse(Rejection::Malformed);
                            return Delivered::Refused(Rejection::Malformed);
                        }
                    },
                    _ => {}
                }
            }
            if is_heavy(frame.payload()) {
                return Delivered::Heavy(frame);
            }
            match self.accepted.take(&self.node, self.request, frame, route()) {
                Some(taken) => {
                    if let Some(refused) = self.refused(taken) {
                        return refused;
                    }
                }
                None => return Delivered::Forgotten,
            }
        }
    }

    /// Hands over a frame that is much work.
    async fn deliver_heavy(&mut self, frame: RawFrame, route: Option<Route>) -> Delivered {
        let _waiting = WaitingFrame::new(&self.accepted);
        let (node, accepted, request) = (self.node.clone(), self.accepted.clone(), self.request);
        let take = move || accepted.take(&node, request, frame, route);
        let taken = self.node.decoding.run(self.accepted.sender(), take).await;
        self.reserved = None;
        match taken {
            Some(Some(taken)) => self.refused(taken).unwrap_or(Delivered::All),
            Some(None) => Delivered::Forgotten,
            None => Delivered::All,
        }
    }

    /// In `macula` nobody would understand why the rest is not read.
    fn refused(&self, taken: Result<(), Rejection>) -> Option<Delivered> {
        match self.accepted.dialect {
            Dialect::Macula => None,
            Dialect::MaculaPeer1 => taken.err().map(Delivered::Refused),
        }
    }

    /// Reads a stream of the engine's own to its end.
    async fn opened(mut self, opening: RawFrame, send: Option<SendStream>) {
        let Some(mut send) = send else { return self.refuse(Rejection::Malformed) };
        if opening.type_id() == OPEN_SESSION {
            return session::receive::receive(self, send, opening.into_payload()).await;
        }
        if opening.type_id() == ASK_NODE {
            let answer = self.node.answer(opening.payload());
            return hello::reply(self.receive, send, answer).await;
        }
        if opening.type_id() == hello::ASK_SUCCESSION {
            let statement = self.node.identity.succession(opening.payload());
            return hello::show_succession(self.receive, send, statement).await;
        }
        if let (Some(relay), Some(key)) = (self.node.relay(), self.accepted.key) {
            let Self { accepted, receive, frames, .. } = self;
            let (connection, remote, place) =
                (accepted.connection.clone(), accepted.remote.clone(), accepted.place.clone());
            let opener = Opener { connection, remote, owner: key, place };
            return relay.serve(opener, send, receive, frames).await;
        }
        // Already closed is as good.
        let _ = self.receive.stop(NOT_A_RELAY.into());
        let _ = send.reset(NOT_A_RELAY.into());
    }

    /// Ends both halves with an error.
    fn end(mut self, send: Option<SendStream>, code: u8) {
        // Already closed is as good.
        let _ = self.receive.stop(code.into());
        let _ = send.map(|mut send| send.reset(code.into()));
    }

    /// The stream carries nothing that can be read.
    pub(crate) fn refuse(&mut self, why: Rejection) {
        self.node.counters.malformed.add(1);
        let error = match self.accepted.dialect {
            Dialect::Macula => MALFORMED,
            Dialect::MaculaPeer1 => why.code(),
        };
        // Already closed is as good.
        let _ = self.receive.stop(error.into());
    }

    /// Waits for more bytes of a stream of frames. False when there are none, or a frame does not grow.
    pub(crate) async fn more(&mut self) -> bool {
        if !self.reading {
            return false;
        }
        self.pace().await;
        match self.read().await {
            Some(chunk) => self.took(chunk),
            None => {
                self.too_slow();
                false
            }
        }
    }

    /// The next bytes. `None`: an incomplete frame does not grow.
    async fn read(&mut self) -> Option<Result<Option<quinn::Chunk>, quinn::ReadError>> {
        if self.frames.is_empty() {
            return Some(self.receive.read_chunk(READ_AT_ONCE, true).await);
        }
        let timeout = self.node.config.frame_timeout;
        transfer::read(&mut self.receive, READ_AT_ONCE, &mut self.growth, timeout).await
    }

    /// Waits until there is memory for a large frame that is arriving.
    async fn pace(&mut self) {
        if self.reserved.is_some() {
            return;
        }
        let announced = self.frames.announced().map(|header| HEADER_LEN + header.payload_len);
        let Some(bytes) = announced.filter(|bytes| *bytes > READ_AT_FIRST) else { return };
        let (memory, client) = (&self.node.arriving, self.accepted.client());
        self.reserved = match memory.take(client, bytes) {
            Some(reserved) => Some(reserved),
            None => {
                let _turn = self.accepted.turn.lock().await;
                Some(memory.wait(client, bytes).await)
            }
        };
    }

    pub(crate) fn too_slow(&mut self) {
        self.node.counters.malformed.add(1);
        // Already closed is as good.
        let _ = self.receive.stop(TOO_SLOW.into());
    }
}

/// Counts a frame that is much work as long as it waits for its turn.
struct WaitingFrame<'a>(&'a Accepted);

impl<'a> WaitingFrame<'a> {
    fn new(accepted: &'a Accepted) -> Self {
        accepted.heavy.fetch_add(1, Ordering::Relaxed);
        Self(accepted)
    }
}

impl Drop for WaitingFrame<'_> {
    fn drop(&mut self) {
        self.0.heavy.fetch_sub(1, Ordering::Relaxed);
        self.0.heavy_done.notify_one();
    }
}

/// Tells who waits for an answer on a stream that there will be none.
fn not_taken(send: Option<SendStream>, why: Rejection) {
    if let Some(mut send) = send {
        // Already closed is as good.
        let _ = send.reset(why.code().into());
    }
}

async fn is_stopped(send: &Option<SendStream>) {
    match send {
        Some(send) => {
            let _ = send.stopped().await;
        }
        None => pending().await,
    }
}

impl Accepted {
    fn new(
        connection: Connection,
        remote: Arc<Remote>,
        dialect: Dialect,
        path: Path,
        key: Option<Fingerprint>,
        owner: Weak<Peer>,
    ) -> Self {
        Self {
            connection,
            remote,
            dialect,
            path,
            key,
            place: None,
            owner,
            received: Counter::default(),
            turn: tokio::sync::Mutex::default(),
            heavy: AtomicUsize::new(0),
            heavy_done: Notify::new(),
            silent_at: AtomicU64::new(u64::MAX),
            few_streams: AtomicBool::new(dialect == Dialect::MaculaPeer1),
        }
    }

    /// Hands over a message, or a request unless it was handed over before. `None`: it should have been and is not known.
    fn take(
        &self,
        node: &Arc<Node>,
        request: Option<(RequestId, bool)>,
        frame: RawFrame,
        route: Option<Route>,
    ) -> Option<Result<(), Rejection>> {
        match (request, route) {
            (None, route) => {
                Some(self.hand_over(node, frame, route.map(|route| ReplyToken::new(ReplyTo::Stream(route)))))
            }
            (Some(request), Some(route)) => self.asked(node, request, frame, route),
            // Who asked has given up, or asks again on another link.
            (Some(_), None) => Some(Ok(())),
        }
    }

    /// Hands a request over, unless it was before. `None`: it should have been and is not known.
    fn asked(
        &self,
        node: &Arc<Node>,
        (id, again): (RequestId, bool),
        frame: RawFrame,
        route: Route,
    ) -> Option<Result<(), Rejection>> {
        let key = self.key?;
        let requests = &node.requests;
        let asker = Owner { key, network: self.remote().ip().into() };
        let asked = lock(requests).ask(asker, id, again, route.clone(), Instant::now());
        match asked {
            Asked::New => {
                let asking = Asking { requests: requests.clone(), key, id };
                let taken = self.hand_over(node, frame, Some(ReplyToken::new(ReplyTo::Request(asking, route))));
                if taken.is_err() {
                    // It was not handed over, and is not the next time either.
                    lock(requests).forget(key, id);
                }
                return Some(taken);
            }
            Asked::Waits => {}
            // The stream's task is this one.
            Asked::Answered(answer) => drop(route.send(Some(answer))),
            Asked::Over(Ended::Unanswered) => drop(route.send(None)),
            Asked::Over(Ended::Forgotten) => return None,
        }
        Some(Ok(()))
    }

    /// Whether this node answers such a frame by itself: as a relay it does.
    fn is_probe(&self, node: &Node, type_id: u8) -> bool {
        type_id == MessageType::NatProbe.id() && !self.path.is_relayed() && node.relay().is_some()
    }

    /// Hands a frame to the handler.
    pub(crate) fn hand_over(
        &self,
        node: &Arc<Node>,
        frame: RawFrame,
        reply: Option<ReplyToken>,
    ) -> Result<(), Rejection> {
        let Self { dialect, key, path, .. } = *self;
        let from = self.remote();
        self.received.add(1);
        if let Some(peer) = self.owner.upgrade() {
            peer.heard();
        }
        self.allow_streams(&node.config);
        if let Some(key) = key.filter(|_| self.is_heard_again()) {
            node.arrived(key);
        }
        if self.is_probe(node, frame.type_id())
            && let Some(token) = &reply
        {
            let answer = answers::nat_probe_reply(frame.payload(), from, SystemTime::now(), node.config.limits);
            let answer = answer.ok_or_else(|| node.malformed())?;
            // Who asked may be gone.
            let _ = token.reply(answer);
            return Ok(());
        }
        node.deliver(frame, |kind, payload| Inbound { kind, payload, from, dialect, key, path, reply })
    }

    fn has_many_waiting(&self) -> bool {
        self.heavy.load(Ordering::Relaxed) >= WAITING_FRAMES
    }

    fn is_ours(&self) -> bool {
        !Weak::ptr_eq(&self.owner, &Weak::new())
    }

    /// Nothing has come for so long that the peer may be gone.
    pub(crate) fn mark_silent(&self) {
        self.silent_at.store(self.heard(), Ordering::Relaxed);
    }

    /// Whether it can serve as a link.
    pub(crate) fn is_live(&self) -> bool {
        self.connection.close_reason().is_none() && self.silent_at.load(Ordering::Relaxed) != self.heard()
    }

    /// Whether a message has come for the first time since the connection was given up as silent. The other node may keep
    /// this one of several connections.
    fn is_heard_again(&self) -> bool {
        let silent = |at: u64| at != u64::MAX;
        silent(self.silent_at.load(Ordering::Relaxed)) && silent(self.silent_at.swap(u64::MAX, Ordering::Relaxed))
    }

    fn heard(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    /// Waits until the answer to a request has arrived.
    async fn arrives(&self, node: &Node, request: RequestId, mut send: SendStream) {
        if send.finish().is_ok() && matches!(send.stopped().await, Ok(None)) {
            self.arrived(node, request);
        }
    }

    /// The peer has the answer to a request.
    fn arrived(&self, node: &Node, request: RequestId) {
        if let Some(key) = self.key {
            lock(&node.requests).forget(key, request);
        }
    }

    /// For a link on it: answers to what is sent come on streams of their own.
    pub(crate) fn allow_answers(&self) {
        self.connection.set_max_concurrent_uni_streams(MAX_ANSWERING.into());
    }

    /// Whoever sends messages may send many at once.
    fn allow_streams(&self, config: &Config) {
        if self.few_streams.load(Ordering::Relaxed) && self.few_streams.swap(false, Ordering::Relaxed) {
            let streams = self
                .place
                .as_ref()
                .map_or(config.max_streams, |place| place.share(config.max_streams, FULL_CONNECTIONS));
            self.connection.set_max_concurrent_bi_streams(streams.max(first_streams(config)).into());
        }
    }

    pub(crate) fn stats(&self) -> AcceptedStats {
        AcceptedStats {
            link: LinkStats {
                dialect: self.dialect,
                path: self.path,
                remote: self.remote(),
                round_trip: self.connection.rtt(),
            },
            received: self.received.get(),
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn key(&self) -> Option<Fingerprint> {
        self.key
    }

    /// Whose share it takes from.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.key, self.remote().ip())
    }

    /// Whose messages it carries.
    pub(crate) fn sender(&self) -> Sender {
        self.key.map_or_else(|| Sender::Address(self.remote()), Sender::Key)
    }

    /// Where its other end has proved to be, or the relay that it goes through.
    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote.address(&self.connection)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::identity::Identity;
    use crate::tls::{Trust, Verify, circuit_server};

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
