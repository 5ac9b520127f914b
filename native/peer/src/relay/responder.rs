//! A relay's side of probes: nodes ask at which address it sees a socket of theirs, and whether they hear of an address
//! that they have sent nothing to.
//!
//! Who asks must be registered. Answers are as long as requests, and go to the IP address that the node is registered
//! from, nowhere else: nobody can have a relay send to a third.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use quinn::Connection;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::control::Probes;
use crate::decide::relay::Bucket;
use crate::link::lock;
use crate::node::Node;
use crate::signal::{AnswerFrom, Body, Encoded, Key, MAX_LEN, Secret, Signal, Unverified};
use crate::socket::{Received, canonical, open, reachable_from};

/// What one node may ask per second, and at once. It asks some twenty times, and again what is lost, when it looks what its
/// NAT is like, and a few times for each peer that it looks for a way to.
const PROBES_PER_SECOND: u64 = 20;
const PROBES_AT_ONCE: u64 = 200;

/// The lowest port that a node may have answered: those below are servers', and no NAT gives them away.
const LOWEST_PORT: u16 = 1024;

/// The kernel joins as many datagrams of one sender.
const JOINED: usize = 64;

/// A relay's second socket, and who may ask.
pub(crate) struct Responder {
    io: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    /// What nodes are told, if not the address that they know.
    ip: Option<IpAddr>,
    /// One for each registration.
    asking: Mutex<HashMap<u64, Asking>>,
}

/// A node that is registered.
struct Asking {
    connection: Connection,
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
    /// Opens a port (0: any) of `ip`, or of the address that the main socket has. Must be called inside the runtime.
    pub(crate) fn bind(main: IpAddr, ip: Option<IpAddr>, port: u16) -> io::Result<Arc<Self>> {
        let io = UdpSocket::from_std(open((ip.unwrap_or(main), port).into())?)?;
        let state = UdpSocketState::new(UdpSockRef::from(&io))?;
        let local = io.local_addr()?;
        Ok(Arc::new(Self { io, state, local, ip, asking: Mutex::default() }))
    }

    /// Lets the node at the other end of a connection ask until the place is dropped. `None`: the system has no random
    /// numbers.
    pub(crate) fn admit(self: &Arc<Self>, connection: Connection) -> Option<(Probes, Place)> {
        let secret = Secret::generate()?;
        let rate = Bucket::new(PROBES_PER_SECOND, PROBES_AT_ONCE, Instant::now());
        let mut asking = lock(&self.asking);
        let id = std::iter::repeat_with(|| fastrand::u64(..)).find(|id| !asking.contains_key(id))?;
        asking.insert(id, Asking { connection, key: Key::from(&secret), rate });
        let place = Place { responder: Arc::downgrade(self), id };
        Some((Probes { id, secret, port: self.local.port(), ip: self.ip }, place))
    }

    /// Answers a request that came to the main socket of this node.
    pub(crate) fn answer_main(&self, node: &Node, received: &Received) {
        let Some(Answer { from, to, signal }) = self.answer(received) else { return };
        match from {
            AnswerFrom::Same => node.socket().send_signal_from(received.to, to, &signal),
            AnswerFrom::Other => self.send(self.other_source(received), to, &signal),
        }
    }

    /// Answers what comes to the second socket. Does not end.
    pub(crate) async fn answer_second(self: Arc<Self>, node: Weak<Node>) {
        let mut buffer = [0; JOINED * MAX_LEN];
        loop {
            let Some(meta) = self.receive(&mut buffer).await else { continue };
            let Some(node) = node.upgrade() else { return };
            for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                let Some(received) = Received::new(datagram, meta.addr, meta.dst_ip) else { continue };
                let Some(Answer { from, to, signal }) = self.answer(&received) else { continue };
                match from {
                    AnswerFrom::Same => self.send(received.to, to, &signal),
                    AnswerFrom::Other => node.socket().send_signal_from(self.other_source(&received), to, &signal),
                }
            }
        }
    }

    /// The other socket is at the same address, unless it was given one of its own.
    fn other_source(&self, received: &Received) -> Option<IpAddr> {
        received.to.filter(|_| self.ip.is_none())
    }

    fn answer(&self, received: &Received) -> Option<Answer> {
        let unverified = Unverified::parse(received.bytes())?;
        let mut asking = lock(&self.asking);
        let Asking { connection, key, rate } = asking.get_mut(&unverified.id())?;
        let Signal { id, nonce, body: Body::ProbeRequest { from, to_port } } = unverified.verify(key)? else {
            return None;
        };
        let registered = canonical(connection.remote_address()).ip();
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

    async fn receive(&self, buffer: &mut [u8]) -> Option<RecvMeta> {
        let mut meta = [RecvMeta::default()];
        // What goes wrong is about one datagram.
        self.io.readable().await.ok()?;
        let receive = || self.state.recv(UdpSockRef::from(&self.io), &mut [IoSliceMut::new(buffer)], &mut meta);
        self.io.try_io(Interest::READABLE, receive).ok()?;
        Some(meta[0])
    }

    fn send(&self, source: Option<IpAddr>, to: SocketAddr, signal: &[u8]) {
        let Some(destination) = reachable_from(self.local, to) else { return };
        let transmit = Transmit { destination, ecn: None, contents: signal, segment_size: None, src_ip: source };
        // Lost, it is asked for again.
        let _ = self.state.try_send(UdpSockRef::from(&self.io), &transmit);
    }
}
