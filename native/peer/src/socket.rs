//! The UDP socket: quinn's, plus ICMP errors, signals, and extra sockets.
//!
//! A plain unconnected UDP socket never learns that a port is closed, so a dial to it would last until the handshake
//! times out. With `IP_RECVERR` Linux queues each ICMP error with the destination that it is about. This has two
//! consequences that this module handles: the error also surfaces, once, from the next send or receive for any
//! destination, where it must have no effect; and it leaves tokio's write readiness set for good, where a full socket
//! would spin.

use std::convert::Infallible;
use std::fmt;
use std::future::pending;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use macula_peer_core::sending::Fault;
use macula_peer_core::sync::lock;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use socket2::{Domain, Protocol, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::broadcast;

use crate::addresses::{Addresses, Proof};

use self::demux::demux;
pub(crate) use self::demux::{Received, ReceivedBy, Signals, signals};
pub(crate) use self::extras::ExtraId;
use self::extras::{AddExtraError, Extra, Extras};
pub(crate) use self::outbox::Outbox;
use self::receive::Receiver;
use self::send::{Outcome, PacketSender};

mod demux;
mod extras;
mod outbox;
mod receive;
mod send;

/// How long a writer waits for room when readiness cannot be told any more. A socket buffer of 200 KB drains in 2 ms at
/// 1 Gbit/s.
const FULL_SOCKET_PAUSE: Duration = Duration::from_millis(1);

/// How long receivers from sockets beside the main one wait after an error: an error that lasts must not burn a core.
pub(crate) const AFTER_ERROR: Duration = Duration::from_millis(10);

/// Socket buffers: the kernel's default of 208 KB holds 150 full packets, less than one burst of a fast sender.
const SOCKET_BUFFER: usize = 4 << 20;

/// Room for unread refusals. A reader that lags behind misses some and finds out by timeout.
const REFUSALS: usize = 256;

/// Destinations that nothing can be sent to.
pub(crate) type Refusals = broadcast::Sender<SendRefusal>;

/// A destination that nothing can be sent to at present.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SendRefusal {
    pub(crate) destination: SocketAddr,
    pub(crate) why: RefusalReason,
}

/// Why nothing can be sent there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RefusalReason {
    /// ICMP said that no socket listens there.
    Unreachable,
    /// This host has no route, or no address to send from. That says nothing about the destination.
    NoRoute,
}

pub(crate) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    sender: PacketSender,
    receiver: Receiver,
    /// Another socket has replaced it.
    replaced: AtomicBool,
    local: SocketAddr,
    full: AtomicBool,
    refusals: Refusals,
    signals: Signals,
    addresses: Arc<Addresses>,
    extras: Extras,
    /// A port that is left alone.
    reserved: Option<u16>,
    this: Weak<Self>,
}

impl Socket {
    /// Binds a port (0: any but the reserved one) of an address, or of every address of both families. Must be called
    /// inside the runtime.
    pub(crate) fn bind(
        ip: Option<IpAddr>,
        port: u16,
        reserved: Option<u16>,
        refusals: Refusals,
        signals: Signals,
        addresses: Arc<Addresses>,
    ) -> io::Result<Arc<Self>> {
        let socket = match ip {
            Some(ip) => open((ip, port).into(), reserved)?,
            None => open((Ipv6Addr::UNSPECIFIED, port).into(), reserved).or_else(|error| match error.kind() {
                io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
                _ => open((Ipv4Addr::UNSPECIFIED, port).into(), reserved),
            })?,
        };
        enlarge_buffers(socket2::SockRef::from(&socket));
        let local = socket.local_addr()?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        report_icmp_errors(&socket, local, true);
        let io = UdpSocket::from_std(socket)?;
        Ok(Arc::new_cyclic(|this| Self {
            io,
            state,
            sender: PacketSender::default(),
            receiver: Receiver::default(),
            replaced: AtomicBool::new(false),
            local,
            full: AtomicBool::new(false),
            refusals,
            signals,
            addresses,
            extras: Extras::default(),
            reserved,
            this: this.clone(),
        }))
    }

    /// Another socket with the same address, on any port. Must be called inside the runtime.
    pub(crate) fn open_beside(&self) -> io::Result<UdpSocket> {
        UdpSocket::from_std(open((self.local.ip(), 0).into(), self.reserved)?)
    }

    /// From now on QUIC's packets to `peer` leave by `socket`, and what the peer sends to that is heard. It must be one of
    /// [`Socket::open_beside`].
    pub(crate) fn add_extra(&self, socket: UdpSocket, peer: SocketAddr) -> Result<ExtraId, AddExtraError> {
        self.extras.add(socket, peer)
    }

    /// As [`Socket::add_extra`], until the guard is dropped.
    pub(crate) fn share(&self, socket: UdpSocket, peer: SocketAddr) -> Result<ExtraGuard, AddExtraError> {
        let id = self.add_extra(socket, peer)?;
        Ok(ExtraGuard { socket: self.this.clone(), id })
    }

    /// Closes an extra socket.
    pub(crate) fn remove_extra(&self, id: ExtraId) {
        self.extras.remove(id);
    }

    /// Sends a signal from the main socket, unless there is no room for it.
    pub(crate) fn send_signal(&self, to: SocketAddr, signal: &[u8]) {
        self.send_signal_from(None, to, signal);
    }

    /// Sends a signal from one of the host's addresses.
    pub(crate) fn send_signal_from(&self, source: Option<IpAddr>, to: SocketAddr, signal: &[u8]) {
        let Some(destination) = self.reachable(to) else { return };
        let transmit = Transmit { destination, ecn: None, contents: signal, segment_size: None, src_ip: source };
        // A lost signal is sent again while its sender waits for an answer. Without tokio's readiness, which a new
        // socket does not have yet.
        let _ = self.send(&transmit);
    }

    /// Sends a signal from an extra socket.
    pub(crate) fn send_signal_by(&self, id: ExtraId, to: SocketAddr, signal: &[u8]) {
        let (Some(extra), Some(destination)) = (self.extras.get(id), self.reachable(to)) else { return };
        let transmit = Transmit { destination, ecn: None, contents: signal, segment_size: None, src_ip: None };
        // As above.
        let _ = extra.send_now(&self.sender, &transmit);
    }

    /// From now on QUIC's packets to an address leave by this extra socket.
    pub(crate) fn route(&self, address: SocketAddr, id: ExtraId) {
        self.extras.route(address, id);
    }

    /// From now on QUIC may send to an address what it likes, until this is dropped.
    pub(crate) fn prove(&self, address: SocketAddr) -> Proof {
        self.addresses.prove(address)
    }

    /// What is known of the addresses that QUIC sends to.
    pub(crate) fn addresses(&self) -> &Arc<Addresses> {
        &self.addresses
    }

    /// Packets to an address go without an ECN mark for a moment, because marked ones are not answered.
    pub(crate) fn try_unmarked(&self, to: SocketAddr) {
        self.sender.change(|quirks, now| quirks.try_unmarked(to, now));
    }

    /// Packets to an address got through unmarked, so later ones go unmarked as well.
    pub(crate) fn stay_unmarked(&self, to: SocketAddr) {
        self.sender.change(|quirks, now| quirks.do_not_mark(to, now));
    }

    /// Publishes refused destinations, as long as the socket lives.
    pub(crate) async fn watch_errors(self: Arc<Self>) {
        watch_errors(&self.io, &self.refusals).await;
    }

    /// Waits until it is broken: from then on another one is needed.
    pub(crate) async fn broken(&self) {
        self.receiver.broken().await;
    }

    /// From now on nothing can be received.
    #[cfg(test)]
    pub(crate) fn break_it(&self) {
        *lock(&self.receiver.injected) = Some(Box::new(|| io::ErrorKind::OutOfMemory.into()));
    }

    /// Another socket has replaced it, and wants its port. quinn drops this one as soon as it polls it.
    pub(crate) fn replaced(&self) {
        self.replaced.store(true, Ordering::Relaxed);
        self.extras.wake();
    }

    /// The address in the family that this socket sends with: IPv4 is mapped on a socket of both families. `None` if
    /// the socket cannot reach it.
    pub(crate) fn reachable(&self, address: SocketAddr) -> Option<SocketAddr> {
        reachable_from(self.local, address)
    }

    /// Where it is bound.
    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    fn poll_recv_any(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if self.extras.are_first()
            && let Poll::Ready(received) = self.extras.poll_recv(cx, bufs, meta, &self.signals)
        {
            return Poll::Ready(Ok(received));
        }
        match self.poll_recv_main(cx, bufs, meta) {
            Poll::Ready(received) => Poll::Ready(received),
            Poll::Pending => self.extras.poll_recv(cx, bufs, meta, &self.signals).map(Ok),
        }
    }

    fn poll_recv_main(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.receiver.poll(&self.io, &self.state, cx, bufs, meta))?;
        for (buffer, meta) in bufs.iter_mut().zip(meta.iter_mut()).take(received) {
            demux(buffer, meta, ReceivedBy::Main, &self.signals);
        }
        Poll::Ready(Ok(received))
    }

    /// Fails only if the socket is full.
    fn send_now(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.io.try_io(Interest::WRITABLE, || self.send(transmit));
        self.note_full(&sent);
        sent
    }

    fn note_full(&self, sent: &io::Result<()>) {
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.full.store(true, Ordering::Relaxed);
        }
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let outcome = self.sender.send(&self.io, &self.state, transmit)?;
        if outcome == Outcome::Lost(Fault::Broken) {
            self.receiver.is_broken();
        }
        self.note(transmit.destination, outcome);
        Ok(())
    }

    /// Tells the dials of a destination that it cannot be reached.
    fn note(&self, destination: SocketAddr, outcome: Outcome) {
        if outcome == Outcome::Refused {
            // Without a receiver there are no dials.
            let _ = self.refusals.send(SendRefusal { destination, why: RefusalReason::NoRoute });
        }
    }
}

/// The socket in use, which a move replaces. A task that waits holds this instead of the socket, because a replaced socket
/// keeps its port bound until the last reference to it is gone.
#[derive(Clone)]
pub(crate) struct Current(Arc<Mutex<Arc<Socket>>>);

impl Current {
    pub(crate) fn new(socket: Arc<Socket>) -> Self {
        Self(Arc::new(Mutex::new(socket)))
    }

    pub(crate) fn get(&self) -> Arc<Socket> {
        lock(&self.0).clone()
    }

    pub(crate) fn set(&self, socket: Arc<Socket>) {
        // The old one is dropped when this is unlocked.
        let _old = std::mem::replace(&mut *lock(&self.0), socket);
    }
}

/// An extra socket that QUIC uses, until this is dropped.
pub(crate) struct ExtraGuard {
    /// A link holds its guard as long as it lives. After a rebind that must not keep the old socket's port bound.
    socket: Weak<Socket>,
    pub(crate) id: ExtraId,
}

impl ExtraGuard {
    /// Counts the datagrams that it receives.
    pub(crate) fn heard(&self) -> u64 {
        let extra = self.socket.upgrade().and_then(|socket| socket.extras.get(self.id));
        extra.map_or(0, |extra| extra.heard())
    }

    /// Has closed ports noticed at once, until this is dropped.
    pub(crate) async fn watch_errors(&self) -> Infallible {
        let Some(socket) = self.socket.upgrade() else { return pending().await };
        let Some(extra) = socket.extras.get(self.id) else { return pending().await };
        let (local, refusals) = (socket.local, socket.refusals.clone());
        drop(socket);
        let _reporting = Reporting::new(&extra, local);
        watch_errors(extra.io(), &refusals).await;
        pending().await
    }

    /// From now on QUIC's packets to an address leave by the main socket.
    pub(crate) fn unroute(&self, address: SocketAddr) {
        if let Some(socket) = self.socket.upgrade() {
            socket.extras.unroute(address, self.id);
        }
    }
}

/// Has the kernel queue ICMP errors about packets from an extra socket, until the last of these is dropped: two dials may
/// share the socket. A socket with unread errors always looks writable to tokio.
struct Reporting<'a>(&'a Extra, SocketAddr);

impl<'a> Reporting<'a> {
    fn new(extra: &'a Extra, local: SocketAddr) -> Self {
        let mut watchers = lock(&extra.watchers);
        if *watchers == 0 {
            report_icmp_errors(extra.io(), local, true);
        }
        *watchers += 1;
        Self(extra, local)
    }
}

impl Drop for Reporting<'_> {
    fn drop(&mut self) {
        let mut watchers = lock(&self.0.watchers);
        *watchers -= 1;
        if *watchers == 0 {
            report_icmp_errors(self.0.io(), self.1, false);
            icmp_refused(self.0.io());
        }
    }
}

impl Drop for ExtraGuard {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.upgrade() {
            socket.remove_extra(self.id);
        }
    }
}

/// Publishes refused destinations.
async fn watch_errors(io: &UdpSocket, refusals: &Refusals) {
    while io.ready(Interest::ERROR).await.is_ok() {
        // WouldBlock tells tokio that the queue was read to its end.
        let _ = io.try_io(Interest::ERROR, || -> io::Result<()> {
            for destination in icmp_refused(io) {
                tracing::debug!(%destination, "port unreachable");
                // Without a receiver there are no dials.
                let _ = refusals.send(SendRefusal { destination, why: RefusalReason::Unreachable });
            }
            Err(io::ErrorKind::WouldBlock.into())
        });
    }
}

/// Returns when nothing can be sent to `address`.
pub(crate) async fn refused(refusals: &mut broadcast::Receiver<SendRefusal>, address: SocketAddr) -> RefusalReason {
    loop {
        match refusals.recv().await {
            Ok(refused) if refused.destination == address => return refused.why,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

pub(crate) fn reachable_from(local: SocketAddr, address: SocketAddr) -> Option<SocketAddr> {
    match (local, address) {
        // A socket at one IPv6 address has no IPv4 address to send from.
        (SocketAddr::V6(v6), SocketAddr::V4(v4)) => {
            let both = v6.ip().is_unspecified() || v6.ip().to_ipv4_mapped().is_some();
            both.then(|| (v4.ip().to_ipv6_mapped(), v4.port()).into())
        }
        (SocketAddr::V4(_), SocketAddr::V6(v6)) => v6.ip().to_ipv4_mapped().map(|ip| (ip, v6.port()).into()),
        _ => Some(address),
    }
}

/// A socket at an address, for both families if that is every IPv6 address. The system does not choose the reserved port
/// for it.
pub(crate) fn open(address: SocketAddr, reserved: Option<u16>) -> io::Result<std::net::UdpSocket> {
    let socket = open_any(address)?;
    if address.port() == 0 && Some(socket.local_addr()?.port()) == reserved {
        // As long as the first one has it, another does not get it.
        return open_any(address);
    }
    Ok(socket)
}

fn open_any(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn enlarge_buffers(socket: socket2::SockRef<'_>) {
    // Best effort: the kernel caps what an unprivileged process asks for.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
}

#[cfg(target_os = "linux")]
fn report_icmp_errors(socket: &impl std::os::fd::AsFd, local: SocketAddr, on: bool) {
    use nix::sys::socket::{setsockopt, sockopt};
    // A socket of both families needs both: each family keeps its own switch.
    let v4 = setsockopt(socket, sockopt::Ipv4RecvErr, &on);
    let v6 = if local.is_ipv6() { setsockopt(socket, sockopt::Ipv6RecvErr, &on) } else { Ok(()) };
    if let Err(error) = v4.and(v6) {
        tracing::warn!(%error, "closed ports will only be noticed by timeout");
    }
}

/// The destinations of all queued "connection refused" errors; empties the error queue.
#[cfg(target_os = "linux")]
fn icmp_refused(socket: &UdpSocket) -> Vec<SocketAddr> {
    use nix::errno::Errno;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
    use std::os::fd::AsRawFd;

    let mut refused = Vec::new();
    // Room for the error and the address of the router that reported it, in either family.
    let mut control = vec![0u8; 256];
    let mut payload = [0u8; 64];
    loop {
        let mut parts = [IoSliceMut::new(&mut payload)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags);
        let message = match message {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(_) => return refused,
        };
        let unreachable = message.cmsgs().is_ok_and(|mut all| {
            all.any(|control| match control {
                ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                    error.ee_errno == Errno::ECONNREFUSED as u32
                }
                _ => false,
            })
        });
        let destination = message.address.as_ref().and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip(), a.port()))))
        });
        if let (true, Some(destination)) = (unreachable, destination) {
            refused.push(destination);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn report_icmp_errors<S>(_: &S, _: SocketAddr, _: bool) {}

#[cfg(not(target_os = "linux"))]
fn icmp_refused(_: &UdpSocket) -> Vec<SocketAddr> {
    Vec::new()
}

pub(crate) fn refusals() -> Refusals {
    broadcast::channel(REFUSALS).0
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if !self.addresses.may_send(transmit.destination, transmit.contents.len()) {
            tracing::trace!(to = %transmit.destination, "too much for an unproven address");
            // Lost, as if by the network.
            return Ok(());
        }
        let sent = match self.extras.towards(transmit.destination) {
            Some(extra) => {
                self.extras.send(&extra, &self.sender, transmit).map(|sent| self.note(transmit.destination, sent))
            }
            None => return outbox::send(self, transmit),
        };
        self.note_full(&sent);
        sent
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if self.replaced.load(Ordering::Relaxed) {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        let received = ready!(self.poll_recv_any(cx, bufs, meta))?;
        for meta in &meta[..received] {
            self.addresses.received(meta.addr, meta.len);
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.local).finish()
    }
}

/// Waits for room on the socket, for one connection.
struct Writable {
    socket: Arc<Socket>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.waiting.is_none() && !this.socket.full.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let socket = &this.socket;
        let waiting = this.waiting.get_or_insert_with(|| Box::pin(room(socket.clone())));
        ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        Poll::Ready(Ok(()))
    }
}

async fn room(socket: Arc<Socket>) {
    match socket.extras.full() {
        Some(extra) => writable(extra.io()).await,
        None => writable(&socket.io).await,
    }
    socket.full.store(false, Ordering::Relaxed);
}

async fn writable(io: &UdpSocket) {
    let ready = io.ready(Interest::WRITABLE).await;
    // After an ICMP error tokio says so for good.
    if ready.is_ok_and(|ready| ready.is_write_closed()) {
        tokio::time::sleep(FULL_SOCKET_PAUSE).await;
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
