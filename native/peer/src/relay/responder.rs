//! A relay's side of probes: nodes ask at which address it sees a socket of theirs, and whether they hear of an address
//! that they have sent nothing to.
//!
//! Who asks must be registered. Answers are as long as requests, and go to the IP address that the node has proved
//! to be at, nowhere else: nobody can have a relay send to a third.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use macula_peer_core::proto::control::Probes;
use macula_peer_core::proto::signal::{AnswerFrom, Body, Encoded, Key, MAX_LEN, Secret, Signal, Unverified};
use macula_peer_core::shares::Bucket;
use macula_peer_core::sync::lock;
use quinn::Connection;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use ring::rand::SystemRandom;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::sleep;

use crate::addresses::Remote;
use crate::net::Net;
use crate::socket::{AFTER_ERROR, Received, open, reachable_from};

/// What one node may ask per second, and at once. It asks some twenty times, and again what is lost, when it looks what its
/// NAT is like, and a few times for each peer that it looks for a way to.
const PROBES_PER_SECOND: u64 = 20;
const PROBES_AT_ONCE: u64 = 200;

/// The lowest port that a node may have answered: those below are servers', and no NAT gives them away.
const LOWEST_PORT: u16 = 1024;

/// The kernel joins as many datagrams of one sender.
const JOINED: usize = 64;

/// A relay's other sockets, and who may ask.
pub(crate) struct Responder {
    /// At the address of the main socket.
    second: Beside,
    /// At the relay's other address. None, if the second is at every address.
    third: Option<Beside>,
    other_ip: Option<IpAddr>,
    /// One for each registration.
    asking: Mutex<HashMap<u64, Asking>>,
    /// The last field: dropped when the sockets are.
    _closed: Sender<Infallible>,
}

/// Tells when the sockets of a responder are closed.
pub(crate) struct Closed(Receiver<Infallible>);

impl Closed {
    /// Waits for it, for so long at most. Blocks.
    pub(crate) fn wait(&self, patience: Duration) {
        // Nothing is ever sent: the end of the sender is what is waited for.
        let _ = self.0.recv_timeout(patience);
    }
}

/// Where a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Main,
    Second,
    Third,
}

/// A node that is registered.
struct Asking {
    connection: Connection,
    remote: Arc<Remote>,
    key: Key,
    rate: Bucket,
}

/// A place among those who may ask.
pub(crate) struct Place {
    responder: Weak<Responder>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(responder) = self.responder.upgrade() {
            lock(&responder.asking).remove(&self.id);
        }
    }
}

/// What is to be sent.
struct Answer {
    from: AnswerFrom,
    to: SocketAddr,
    signal: Encoded,
}

impl Responder {
    /// Opens a port (0: any but the reserved one) of the address that the main socket has, and of `other_ip`. Must be called
    /// inside the runtime.
    pub(crate) fn bind(
        main: IpAddr,
        other_ip: Option<IpAddr>,
        port: u16,
        reserved: Option<u16>,
    ) -> io::Result<(Arc<Self>, Closed)> {
        let second = Beside::bind(main, port, reserved)?;
        let third = match other_ip {
            // Only whether the host has it.
            Some(ip) if main.is_unspecified() => Beside::bind(ip, 0, reserved).map(|_| None)?,
            Some(ip) => Some(Beside::bind(ip, second.local.port(), reserved)?),
            None => None,
        };
        let (sender, receiver) = channel();
        let responder = Self { second, third, other_ip, asking: Mutex::default(), _closed: sender };
        Ok((Arc::new(responder), Closed(receiver)))
    }

    /// Lets the node at the other end of a connection ask until the place is dropped. `None`: the system has no random
    /// numbers.
    pub(crate) fn admit(self: &Arc<Self>, connection: Connection, remote: Arc<Remote>) -> Option<(Probes, Place)> {
        let secret = Secret::generate(&SystemRandom::new())?;
        let rate = Bucket::new(PROBES_PER_SECOND, PROBES_AT_ONCE, Instant::now());
        let mut asking = lock(&self.asking);
        let id = std::iter::repeat_with(|| fastrand::u64(..)).find(|id| !asking.contains_key(id))?;
        asking.insert(id, Asking { connection, remote, key: Key::from(&secret), rate });
        let place = Place { responder: Arc::downgrade(self), id };
        Some((Probes { id, secret, port: self.second.local.port(), ip: self.other_ip }, place))
    }

    /// Answers a request that came to the main socket of this node.
    pub(crate) fn answer_main(&self, net: &Net, received: &Received) {
        self.answer(net, At::Main, received);
    }

    /// Answers what comes to the other sockets, until the engine is gone.
    pub(crate) async fn answer_others(self: Arc<Self>, net: Weak<Net>) {
        let third = async {
            match &self.third {
                Some(third) => self.answer_all(&net, third, At::Third).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.answer_all(&net, &self.second, At::Second) => {}
            () = third => {}
        }
    }

    async fn answer_all(&self, net: &Weak<Net>, socket: &Beside, at: At) {
        let mut buffer = [0; JOINED * MAX_LEN];
        loop {
            let Some(meta) = socket.receive(&mut buffer).await else { continue };
            let Some(net) = net.upgrade() else { return };
            for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                if let Some(received) = Received::new(datagram, meta.addr, meta.dst_ip) {
                    self.answer(&net, at, &received);
                }
            }
        }
    }

    fn answer(&self, net: &Net, at: At, received: &Received) {
        let Some(Answer { from, to, signal }) = self.make(received) else { return };
        // A socket at every address answers from the one that was asked, the others from their own.
        let source = received.to.filter(|_| self.second.local.ip().is_unspecified());
        let (socket, source) = match (from, at) {
            (AnswerFrom::Same, at) => (at, source),
            (AnswerFrom::OtherPort, At::Main) => (At::Second, source),
            (AnswerFrom::OtherPort, At::Second | At::Third) => (At::Main, source),
            (AnswerFrom::OtherAddress, _) if self.other_ip.is_none() => return,
            (AnswerFrom::OtherAddress, _) if self.third.is_some() => (At::Third, None),
            (AnswerFrom::OtherAddress, _) => (At::Second, self.other_ip),
        };
        match (socket, &self.third) {
            (At::Main, _) => net.socket().send_signal_from(source, to, &signal),
            (At::Third, Some(third)) => third.send(source, to, &signal),
            (At::Second | At::Third, _) => self.second.send(source, to, &signal),
        }
    }

    fn make(&self, received: &Received) -> Option<Answer> {
        let unverified = Unverified::parse(received.bytes())?;
        let mut asking = lock(&self.asking);
        let Asking { connection, remote, key, rate } = asking.get_mut(&unverified.id())?;
        let Signal { id, nonce, body: Body::ProbeRequest { from, to_port } } = unverified.verify(key)? else {
            return None;
        };
        let registered = remote.address(connection).ip();
        if received.from.ip() != registered || !rate.take(1, Instant::now()) {
            return None;
        }
        let port = match to_port.map(NonZeroU16::get) {
            Some(..LOWEST_PORT) => return None,
            Some(port) => port,
            None => received.from.port(),
        };
        let to = SocketAddr::new(registered, port);
        let signal = Signal { id, nonce, body: Body::ProbeReply { observed: received.from } }.encode(key);
        Some(Answer { from, to, signal })
    }
}

/// A socket beside the main one.
struct Beside {
    io: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
}

impl Beside {
    fn bind(ip: IpAddr, port: u16, reserved: Option<u16>) -> io::Result<Self> {
        let io = UdpSocket::from_std(open((ip, port).into(), reserved)?)?;
        let state = UdpSocketState::new(UdpSockRef::from(&io))?;
        let local = io.local_addr()?;
        Ok(Self { io, state, local })
    }

    async fn receive(&self, buffer: &mut [u8]) -> Option<RecvMeta> {
        let mut meta = [RecvMeta::default()];
        // What goes wrong is about one datagram.
        self.io.readable().await.ok()?;
        let receive = || self.state.recv(UdpSockRef::from(&self.io), &mut [IoSliceMut::new(buffer)], &mut meta);
        match self.io.try_io(Interest::READABLE, receive) {
            Ok(_) => Some(meta[0]),
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    sleep(AFTER_ERROR).await;
                }
                None
            }
        }
    }

    fn send(&self, source: Option<IpAddr>, to: SocketAddr, signal: &[u8]) {
        let Some(destination) = reachable_from(self.local, to) else { return };
        let transmit = Transmit { destination, ecn: None, contents: signal, segment_size: None, src_ip: source };
        // Lost, it is asked for again.
        let _ = self.state.try_send(UdpSockRef::from(&self.io), &transmit);
    }
}
