//! One registration at a relay: the control stream, and the circuits over the connection that it belongs to.

use std::collections::HashMap;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{io, mem};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use macula_peer_core::circuits::{self, Action};
use macula_peer_core::errors::CircuitError;
use macula_peer_core::liveness::Liveness;
use macula_peer_core::nat::Description;
use macula_peer_core::proto::codes::stream::NOT_A_RELAY;
use macula_peer_core::proto::control::{
    Coordinate, FromNode, FromRelay, Id, LIMITS, Limit, OPENER, Probes, PunchFailure, Reason,
};
use macula_peer_core::proto::packet::padding;
use macula_peer_core::registration::Watch;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Dialect, canonical};
use macula_peer_core::unanswered::Counted;
use macula_peer_wire::{Reassembler, VERSION};
use quinn::{
    ClientConfig, ConnectError, Connection, ConnectionError, Incoming, ReadError, RecvStream, SendStream, VarInt,
    WriteError,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use super::circuits::Circuits;
use crate::handshake::{not_begun, not_connected};
use crate::identity::realm_proof;
use crate::tls::dialect_of;

/// Requests for circuits that one relay is asked at once; the others wait for an answer to one of these.
const MAX_REQUESTS: usize = 64;

/// Connections that others may be beginning over circuits at once: a relay can invent as many as it likes. Who is not
/// heard tries again a second later.
const MAX_ARRIVING: usize = 64;

/// Unread port predictions of the other node: it sends one.
const MAX_TOLD: usize = 4;

/// With this many bytes waiting for the stream, say nothing more of punches: a relay that begins many and does not read
/// would otherwise fill this node's memory. The answers to those that may be under way at once fit.
const MAX_UNSENT: usize = 16 << 10;

/// An inner connection says in a last packet why it ends. The end of its circuit, which goes another way, must not
/// overtake it; that packet leaves with the next turn of the runtime.
const LINGER: Duration = Duration::from_millis(100);

/// The TLS name of the other node. Nothing checks it: who a node is, its certificate's key says.
const ANY_NAME: &str = "macula";

/// What a connection that is not wanted any more is closed with.
const CLOSED: VarInt = VarInt::from_u32(0);

/// What a node has to show at the moment.
pub(crate) type Successions = Box<dyn Fn() -> Vec<Bytes> + Send + Sync>;

/// How to register, and what comes over the registration.
pub(crate) struct Terms {
    /// What a node must know to be registered, if the relay asks.
    pub(crate) realm_secret: Option<Bytes>,
    /// The word of keys that the node had before: the relay may know its name by one of them.
    pub(crate) successions: Successions,
    /// For inner connections.
    pub(crate) client: ClientConfig,
    pub(crate) server: Option<quinn::ServerConfig>,
    /// How long the relay may take to answer.
    pub(crate) timeout: Duration,
    /// Called with each connection that another node begins over a circuit. It must not block.
    pub(crate) on_incoming: Box<dyn Fn(IncomingCircuit) + Send + Sync>,
    /// Called when the relay says that it dropped packets of a circuit. It must not block.
    pub(crate) on_dropped: Box<dyn Fn(u32, Limit) + Send + Sync>,
    /// Called when another node wants a direct path to this one. It must not block.
    pub(crate) on_punch: Box<dyn Fn(PunchSession) + Send + Sync>,
    /// What the relay is to know of this node.
    pub(crate) description: watch::Receiver<Option<Description>>,
    /// Of the relay, over all its registrations.
    pub(crate) liveness: Mutex<Liveness>,
}

/// An attempt to find a direct path to another node, of which a relay has told both.
#[derive(Debug)]
pub(crate) struct PunchSession {
    pub(crate) coordinate: Coordinate,
    /// When the relay's word came.
    pub(crate) told: Instant,
    /// Ports that the other node tells.
    pub(crate) ports: mpsc::Receiver<Vec<u16>>,
    /// How the other node's attempt went, once it is over.
    pub(crate) over: mpsc::Receiver<Result<(), PunchFailure>>,
    commands: mpsc::UnboundedSender<Command>,
    /// Whether the relay is still to be told how it went.
    open: bool,
}

impl PunchSession {
    /// Tells the other node which ports this node's NAT is about to give.
    pub(crate) fn tell_ports(&self, ports: Vec<u16>) {
        self.say(FromNode::PunchExecute { session_id: self.coordinate.session_id.clone(), ports });
    }

    /// Tells the relay, and so the other node, how it went, unless they know that it is over.
    pub(crate) fn tell_result(&mut self, result: Result<(), PunchFailure>) {
        if mem::replace(&mut self.open, false) {
            self.say(FromNode::PunchResult { session_id: self.coordinate.session_id.clone(), result });
        }
    }

    /// Nothing is to be told of it any more.
    pub(crate) fn close(&mut self) {
        self.open = false;
    }

    fn say(&self, message: FromNode) {
        // Fails if the registration has ended, and the session with it.
        let _ = self.commands.send(Command::Say(message));
    }
}

impl Drop for PunchSession {
    fn drop(&mut self) {
        // Until the relay knows, it lets neither node ask again, and the other node goes on.
        self.tell_result(Err(PunchFailure::Unwanted));
        let _ = self.commands.send(Command::PunchEnded(self.coordinate.session_id.clone()));
    }
}

/// A registered node's end of the connection to its relay.
pub(crate) struct Registration {
    /// What the relay sees the node at.
    pub(crate) address: SocketAddr,
    /// How to probe it, if it can be.
    pub(crate) probes: Option<Probes>,
    connection: Closing,
    send: SendStream,
    receive: RecvStream,
    frames: Reassembler,
}

impl Registration {
    /// Where the relay is.
    pub(crate) fn relay(&self) -> SocketAddr {
        canonical(self.connection.0.remote_address())
    }

    /// Registers the node over a connection to what should be a relay.
    pub(crate) async fn new(
        connection: Connection,
        node_id: Id,
        realm_secret: Option<&[u8]>,
        successions: Vec<Bytes>,
    ) -> Result<Self, CircuitError> {
        let connection = Closing(connection);
        if dialect_of(&connection.0) != Some(Dialect::MaculaPeer1) || connection.0.max_datagram_size().is_none() {
            return Err(CircuitError::NotARelay);
        }
        let proof = realm_secret.and_then(|secret| realm_proof(&connection.0, secret, node_id.as_bytes()));
        let (mut send, mut receive) = connection.0.open_bi().await.map_err(|_| CircuitError::RelayLost)?;
        let mut hello = BytesMut::new();
        hello.put_slice(&[VERSION, OPENER, 0, 0, 0, 0, 0, 0]);
        hello.put(FromNode::Connect { node_id, proof, successions }.encode());
        // That the stream was stopped also shows in what is read, with the reason.
        if let Err(WriteError::ConnectionLost(_)) = send.write_all(&hello).await {
            return Err(CircuitError::RelayLost);
        }
        let mut frames = Reassembler::new(LIMITS);
        loop {
            match next_message(&mut frames)? {
                Some(FromRelay::Registered { address, probes }) => {
                    return Ok(Self { address, probes, connection, send, receive, frames });
                }
                Some(FromRelay::Refused { error }) => return Err(CircuitError::Refused(error)),
                Some(_) => return Err(CircuitError::NotARelay),
                None => read_more(&mut receive, &mut frames).await?,
            }
        }
    }
}

/// A relay that does not keep to the protocol is none.
fn next_message(frames: &mut Reassembler) -> Result<Option<FromRelay>, CircuitError> {
    let malformed = |error: &dyn std::fmt::Display| {
        tracing::debug!(%error, "not a relay's message");
        CircuitError::NotARelay
    };
    let Some(frame) = frames.next_frame().map_err(|e| malformed(&e))? else { return Ok(None) };
    FromRelay::decode(&frame).map(Some).map_err(|e| malformed(&e))
}

async fn read_more(receive: &mut RecvStream, frames: &mut Reassembler) -> Result<(), CircuitError> {
    match receive.read_chunk(LIMITS.max_frame, true).await {
        Ok(Some(chunk)) => {
            frames.push(chunk.bytes);
            Ok(())
        }
        Err(ReadError::Reset(code)) if code == NOT_A_RELAY.into() => Err(CircuitError::NotARelay),
        Ok(None) | Err(_) => Err(CircuitError::RelayLost),
    }
}

/// Closes the connection when it is dropped: other handles to it may live on.
struct Closing(Connection);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close(CLOSED, b"");
    }
}

/// The task that serves a registration. Dropped, the connection to the relay and all inner connections end.
pub(crate) struct Serving {
    terms: Arc<Terms>,
    // In this order: the inner connections end before the outer one does.
    outer: Circuits,
    carrying: JoinSet<()>,
    connection: Closing,
    send: SendStream,
    receive: RecvStream,
    frames: Reassembler,
    /// Bytes of messages that the stream has not taken yet. One per request or circuit that ended.
    unsent: BytesMut,
    /// For those that make connections over circuits.
    handle: mpsc::UnboundedSender<Command>,
    commands: mpsc::UnboundedReceiver<Command>,
    circuits: circuits::Circuits,
    /// Callers that wait for an answer, at most `MAX_REQUESTS`.
    requests: HashMap<Id, Request>,
    /// Attempts at direct paths.
    punches: HashMap<Id, Other>,
    description: watch::Receiver<Option<Description>>,
    inner: HashMap<u32, Inner>,
    arriving: Arc<Semaphore>,
    /// Resolve to the circuits whose inner connections have ended.
    ended: JoinSet<(u32, usize)>,
    watch: Watch,
    suspect: watch::Sender<bool>,
    /// How many circuits there are.
    count: watch::Sender<usize>,
    /// What the relay sees the node at.
    seen_at: watch::Sender<SocketAddr>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.count.send_replace(0);
    }
}

/// Takes what the relay passes on from the other node of a punch.
struct Other {
    ports: mpsc::Sender<Vec<u16>>,
    over: mpsc::Sender<Result<(), PunchFailure>>,
}

#[derive(Debug)]
enum Command {
    Request {
        session_id: Id,
        target: Id,
        until: Instant,
        request: Request,
    },
    /// About a session.
    Say(FromNode),
    PunchEnded(Id),
    /// A connection is being made on the circuit that another node has opened.
    Accepting {
        circuit: u32,
        ended: oneshot::Sender<Reason>,
    },
    Carries {
        circuit: u32,
        connection: Connection,
    },
    /// No connection came of the circuit.
    Abandoned {
        circuit: u32,
    },
}

/// A caller that waits for the relay's answer.
#[derive(Debug)]
struct Request {
    answer: Answer,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Answer {
    Circuit(oneshot::Sender<Result<Opening, CircuitError>>),
    Punch(oneshot::Sender<Result<PunchSession, CircuitError>>),
}

impl Request {
    fn fail(self, error: CircuitError) {
        // Either fails if the caller no longer waits.
        match self.answer {
            Answer::Circuit(answer) => drop(answer.send(Err(error))),
            Answer::Punch(answer) => drop(answer.send(Err(error))),
        }
    }
}

/// The inner connection of a circuit.
enum Inner {
    /// It is being made, by a task that wants to know when the circuit ends.
    Opening(oneshot::Sender<Reason>),
    Live(Connection),
}

impl Serving {
    /// Must be called inside the runtime.
    pub(crate) fn new(
        registration: Registration,
        terms: Arc<Terms>,
        count: watch::Sender<usize>,
    ) -> io::Result<(Self, Handle)> {
        let Registration { address, connection, send, receive, frames, .. } = registration;
        let (outer, driver) = Circuits::new(connection.0.clone(), terms.server.clone())?;
        let mut carrying = JoinSet::new();
        carrying.spawn(driver);
        let (sender, commands) = mpsc::unbounded_channel();
        let handle = Handle {
            terms: terms.clone(),
            endpoint: outer.endpoint().clone(),
            commands: sender.clone(),
            permits: Arc::new(Semaphore::new(MAX_REQUESTS)),
        };
        let now = Instant::now();
        let watch = Watch::new(counted(&connection.0), now);
        lock(&terms.liveness).linked(now);
        let mut description = terms.description.clone();
        description.mark_changed();
        let serving = Self {
            terms,
            outer,
            carrying,
            connection,
            send,
            receive,
            frames,
            unsent: BytesMut::new(),
            handle: sender,
            commands,
            circuits: circuits::Circuits::new(address),
            requests: HashMap::new(),
            punches: HashMap::new(),
            description,
            inner: HashMap::new(),
            arriving: Arc::new(Semaphore::new(MAX_ARRIVING)),
            ended: JoinSet::new(),
            watch,
            suspect: watch::Sender::new(false),
            count,
            seen_at: watch::Sender::new(address),
        };
        Ok((serving, handle))
    }

    /// Counts what is heard of the relay.
    pub(crate) fn heard(&self) -> impl Fn() -> u64 + Send + Sync + use<> {
        let connection = self.connection.0.clone();
        move || connection.stats().udp_rx.datagrams
    }

    /// What the relay sees the node at.
    pub(crate) fn seen_at(&self) -> watch::Receiver<SocketAddr> {
        self.seen_at.subscribe()
    }

    /// Whether the relay has been silent too long.
    pub(crate) fn suspect(&self) -> watch::Receiver<bool> {
        self.suspect.subscribe()
    }

    /// Serves the registration until it ends; returns why. Dropped and called again, it goes on.
    pub(crate) async fn run(&mut self) -> CircuitError {
        loop {
            match self.deliver() {
                Ok(()) => {}
                Err(error) => return error,
            }
            // All of them: a relay that begins many punches would otherwise fill the queue.
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            let count = self.circuits.count();
            self.count.send_if_modified(|known| mem::replace(known, count) != count);
            tokio::select! {
                Some(command) = self.commands.recv() => self.obey(command),
                // The sender is the node's.
                // Once the relay has read what it was told before: only the latest matters.
                Ok(()) = self.description.changed(), if self.unsent.is_empty() => self.describe(),
                more = read_more(&mut self.receive, &mut self.frames) => if let Err(error) = more {
                    return error;
                },
                written = self.send.write(&self.unsent), if !self.unsent.is_empty() => match written {
                    Ok(written) => {
                        self.unsent.advance(written);
                        self.look_soon();
                    }
                    Err(_) => return CircuitError::RelayLost,
                },
                Some(incoming) = self.outer.endpoint().accept() => self.announce(incoming),
                Some(Ok((circuit, connection))) = self.ended.join_next() => self.inner_ended(circuit, connection),
                _ = self.carrying.join_next() => return CircuitError::RelayLost,
                () = self.outer.sent() => self.look_soon(),
                () = sleep_until(self.watch.look_at().into()) => self.look(),
                () = at(self.circuits.overdue()) => return CircuitError::RelayLost,
            }
        }
    }

    /// Ends the inner connections so that the other nodes hear of it.
    pub(crate) async fn finish(&mut self) {
        self.outer.endpoint().close(CLOSED, b"");
        if self.circuits.count() > 0 {
            sleep(LINGER).await;
        }
    }

    /// Takes what the relay has said.
    fn deliver(&mut self) -> Result<(), CircuitError> {
        while let Some(message) = next_message(&mut self.frames)? {
            self.circuits.told(message, Instant::now())?;
            self.carry_out();
        }
        Ok(())
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.circuits.poll() {
            match action {
                Action::Say(message) => self.say(message),
                Action::SayIfRead(message) => self.say_if_read(message),
                Action::Moved(address) => drop(self.seen_at.send_replace(address)),
                Action::Opened { session_id, circuit } => self.opened(&session_id, circuit),
                Action::NotOpened { session_id, error } | Action::NotPunched { session_id, error } => {
                    if let Some(request) = self.requests.remove(&session_id) {
                        request.fail(error);
                    }
                }
                Action::Ended { circuit, reason } => match self.inner.remove(&circuit) {
                    // Its own silence would tell it much later.
                    Some(Inner::Live(connection)) => connection.close(CLOSED, b"circuit ended"),
                    // Fails if the task has ended.
                    Some(Inner::Opening(ended)) => drop(ended.send(reason)),
                    None => {}
                },
                Action::Dropped { circuit, limit } => (self.terms.on_dropped)(circuit, limit),
                Action::Punch(coordinate) => self.punch(*coordinate),
                Action::Ports { session_id, ports } => {
                    if let Some(other) = self.punches.get(&session_id) {
                        // More than the attempt reads are of no use.
                        let _ = other.ports.try_send(ports);
                    }
                }
                Action::PunchOver { session_id, result } => {
                    if let Some(other) = self.punches.remove(&session_id) {
                        // The only one. It fails if the attempt is over.
                        let _ = other.over.try_send(result);
                    }
                }
            }
        }
    }

    fn describe(&mut self) {
        let description = self.description.borrow_and_update().clone();
        if let Some(Description { profile, candidates }) = description {
            self.say(FromNode::Describe { profile, candidates });
        }
    }

    fn opened(&mut self, session_id: &Id, circuit: u32) {
        let (ended, circuit_ended) = oneshot::channel();
        let opening = Opening { circuit, ended: circuit_ended, commands: Some(self.handle.clone()) };
        self.inner.insert(circuit, Inner::Opening(ended));
        // Dropped, because the caller no longer waits, it gives the circuit up by itself.
        if let Some(Request { answer: Answer::Circuit(answer), .. }) = self.requests.remove(session_id) {
            let _ = answer.send(Ok(opening));
        }
    }

    fn punch(&mut self, coordinate: Coordinate) {
        let session_id = coordinate.session_id.clone();
        let ((tell_ports, ports), (tell_over, over)) = (mpsc::channel(MAX_TOLD), mpsc::channel(1));
        self.punches.insert(session_id.clone(), Other { ports: tell_ports, over: tell_over });
        let commands = self.handle.clone();
        let session = PunchSession { told: Instant::now(), ports, over, commands, open: true, coordinate };
        match self.requests.remove(&session_id) {
            Some(Request { answer: Answer::Punch(answer), .. }) => drop(answer.send(Ok(session))),
            _ => (self.terms.on_punch)(session),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Request { session_id, target, until, request } => {
                match request.answer {
                    Answer::Circuit(_) => self.circuits.request(session_id.clone(), target, until),
                    Answer::Punch(_) => {
                        // The relay must know the latest description before it reads the request.
                        if self.description.has_changed().unwrap_or(false) {
                            self.describe();
                        }
                        self.circuits.request_punch(session_id.clone(), target, until);
                    }
                }
                self.requests.insert(session_id, request);
            }
            Command::Say(message) => self.say_if_read(message),
            Command::PunchEnded(session_id) => {
                self.circuits.punch_ended(&session_id);
                self.punches.remove(&session_id);
            }
            Command::Accepting { circuit, ended } => {
                // Dropped, `ended` refuses a second connection.
                if self.circuits.accepting(circuit) {
                    self.inner.insert(circuit, Inner::Opening(ended));
                }
            }
            Command::Carries { circuit, connection } => self.carries(circuit, connection),
            Command::Abandoned { circuit } => {
                if self.circuits.abandoned(circuit) {
                    self.inner.remove(&circuit);
                }
            }
        }
        self.carry_out();
    }

    fn carries(&mut self, circuit: u32, connection: Connection) {
        if !self.circuits.carries(circuit, connection.stable_id()) {
            return connection.close(CLOSED, b"circuit ended");
        }
        self.inner.insert(circuit, Inner::Live(connection.clone()));
        self.ended.spawn(async move {
            connection.closed().await;
            sleep(LINGER).await;
            (circuit, connection.stable_id())
        });
    }

    fn inner_ended(&mut self, circuit: u32, connection: usize) {
        if self.circuits.inner_ended(circuit, connection) {
            self.inner.remove(&circuit);
        }
        self.carry_out();
    }

    /// Another node begins a connection over a circuit.
    fn announce(&mut self, incoming: Incoming) {
        let circuit = Circuits::circuit(incoming.remote_address());
        let Some(circuit) = circuit.filter(|circuit| self.circuits.is_free(*circuit)) else {
            return incoming.refuse();
        };
        let Ok(permit) = self.arriving.clone().try_acquire_owned() else { return incoming.ignore() };
        let commands = self.handle.clone();
        let relay = canonical(self.connection.0.remote_address());
        (self.terms.on_incoming)(IncomingCircuit { relay, circuit, incoming, commands, _permit: permit });
    }

    fn say(&mut self, message: FromNode) {
        self.unsent.put(message.encode());
    }

    /// Says what may as well be lost.
    fn say_if_read(&mut self, message: FromNode) {
        if self.unsent.len() < MAX_UNSENT {
            self.say(message);
        }
    }

    fn look_soon(&mut self) {
        self.watch.asked(Instant::now());
    }

    fn look(&mut self) {
        let (connection, now) = (&self.connection.0, Instant::now());
        let look = self.watch.look(&mut lock(&self.terms.liveness), counted(connection), connection.rtt(), now);
        if look.quiet {
            self.outer.tell_again();
        }
        if look.pad && connection.datagram_send_buffer_space() >= padding().len() {
            // Lost, it comes again.
            let _ = connection.send_datagram(padding());
        }
        self.suspect.send_if_modified(|suspect| mem::replace(suspect, look.suspect) != look.suspect);
    }
}

/// Everything is counted that makes a packet one that must be acknowledged: QUIC probes a silent peer with whatever it has
/// to repeat.
fn counted(connection: &Connection) -> Counted {
    let stats = connection.stats();
    let sent = stats.frame_tx;
    let asked = [
        sent.ack_frequency,
        sent.crypto,
        sent.data_blocked,
        sent.datagram,
        sent.handshake_done.into(),
        sent.immediate_ack,
        sent.max_data,
        sent.max_stream_data,
        sent.max_streams_bidi,
        sent.max_streams_uni,
        sent.new_connection_id,
        sent.new_token,
        sent.path_challenge,
        sent.path_response,
        sent.ping,
        sent.reset_stream,
        sent.retire_connection_id,
        sent.stop_sending,
        sent.stream,
        sent.stream_data_blocked,
        sent.streams_blocked_bidi,
        sent.streams_blocked_uni,
    ];
    Counted { asked: asked.iter().sum(), heard: stats.udp_rx.datagrams }
}

pub(crate) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => pending().await,
    }
}

/// The way to open circuits at a registration, for many callers at once.
#[derive(Clone)]
pub(crate) struct Handle {
    terms: Arc<Terms>,
    endpoint: quinn::Endpoint,
    commands: mpsc::UnboundedSender<Command>,
    permits: Arc<Semaphore>,
}

impl Handle {
    /// Opens a circuit to the node.
    pub(crate) async fn open(&self, target: &Id) -> Result<Opening, CircuitError> {
        self.request(target, Answer::Circuit).await
    }

    /// Asks for a direct path to a node.
    pub(crate) async fn punch(&self, target: &Id) -> Result<PunchSession, CircuitError> {
        self.request(target, Answer::Punch).await
    }

    async fn request<T>(
        &self,
        target: &Id,
        answer: impl FnOnce(oneshot::Sender<Result<T, CircuitError>>) -> Answer,
    ) -> Result<T, CircuitError> {
        #[expect(clippy::expect_used, reason = "16 bytes are a good id, and the semaphore is never closed")]
        let (session_id, permit) = {
            let id = Id::new(fastrand::u128(..).to_be_bytes().to_vec()).expect("1 to 255 bytes");
            (id, self.permits.clone().acquire_owned().await.expect("never closed"))
        };
        let (sender, answered) = oneshot::channel();
        let request = Request { answer: answer(sender), _permit: permit };
        let until = Instant::now() + self.terms.timeout;
        let command = Command::Request { session_id, target: target.clone(), until, request };
        self.commands.send(command).map_err(|_| CircuitError::RelayLost)?;
        answered.await.unwrap_or(Err(CircuitError::RelayLost))
    }

    /// Makes a connection over the circuit.
    pub(crate) async fn connect(&self, mut circuit: Opening) -> Result<Connection, CircuitError> {
        let address = Circuits::address(circuit.circuit);
        let connecting = match self.endpoint.connect_with(self.terms.client.clone(), address, ANY_NAME) {
            Ok(connecting) => connecting,
            Err(ConnectError::EndpointStopping) => return Err(CircuitError::RelayLost),
            Err(error) => return Err(CircuitError::Inner(not_begun(error))),
        };
        tokio::select! {
            connected = connecting => match connected {
                Ok(connection) => {
                    circuit.carries(&connection);
                    Ok(connection)
                }
                // Only the end of the registration closes a connection that nobody has yet.
                Err(ConnectionError::LocallyClosed) => Err(CircuitError::RelayLost),
                Err(error) => Err(CircuitError::Inner(not_connected(error))),
            },
            ended = &mut circuit.ended => Err(ended.map_or(CircuitError::RelayLost, CircuitError::Ended)),
        }
    }
}

/// A circuit whose connection is being made. Dropped, the circuit is given up.
#[derive(Debug)]
pub(crate) struct Opening {
    circuit: u32,
    ended: oneshot::Receiver<Reason>,
    /// `None` once the circuit carries a connection.
    commands: Option<mpsc::UnboundedSender<Command>>,
}

impl Opening {
    fn carries(&mut self, connection: &Connection) {
        let command = Command::Carries { circuit: self.circuit, connection: connection.clone() };
        // Nobody there: the registration has ended, and all inner connections with it.
        let _ = self.commands.take().map(|commands| commands.send(command));
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        // Once ended, the number may be another circuit's.
        let ended = self.ended.try_recv() != Err(oneshot::error::TryRecvError::Empty);
        if let (Some(commands), false) = (self.commands.take(), ended) {
            // Nobody there: the circuit has ended with the registration.
            let _ = commands.send(Command::Abandoned { circuit: self.circuit });
        }
    }
}

/// A connection that another node begins over a circuit. Dropped, it is refused.
#[derive(Debug)]
pub(crate) struct IncomingCircuit {
    /// Where the relay is.
    pub(crate) relay: SocketAddr,
    circuit: u32,
    incoming: Incoming,
    commands: mpsc::UnboundedSender<Command>,
    _permit: OwnedSemaphorePermit,
}

impl IncomingCircuit {
    /// The connection, once its handshake is done. It ends at once when the relay says that the circuit has.
    pub(crate) async fn accept(self, config: &quinn::ServerConfig) -> Result<Connection, ConnectionError> {
        let Self { circuit, incoming, commands, _permit, .. } = self;
        let (ended, circuit_ended) = oneshot::channel();
        let opening = Command::Accepting { circuit, ended };
        commands.send(opening).map_err(|_| ConnectionError::LocallyClosed)?;
        let mut opening = Opening { circuit, ended: circuit_ended, commands: Some(commands) };
        let connecting = incoming.accept_with(Arc::new(Circuits::server(config.clone())))?;
        tokio::select! {
            connected = connecting => {
                let connection = connected?;
                opening.carries(&connection);
                Ok(connection)
            }
            _ = &mut opening.ended => Err(ConnectionError::LocallyClosed),
        }
    }
}
