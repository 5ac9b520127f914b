//! Sockets beside the main one: if packets reach a peer only from another port, that port belongs to one of these.
//!
//! To QUIC they are not there. What comes by one of them is received as if it had come by the main socket, and what goes to
//! an address that was heard by one of them leaves by it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};

use macula_peer_core::sync::lock;
use macula_peer_core::types::canonical;
use quinn::udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use thiserror::Error;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::demux::{ReceivedBy, Signals, demux};
use super::enlarge_buffers;
use super::receive::Receiver;
use super::send::{Outcome, PacketSender};

/// How many there may be: every one is looked at whenever something has come.
const MAX_EXTRAS: usize = 64;

/// Addresses of one peer that are remembered: its port changes when its NAT forgets it, and QUIC looks at the old one once
/// more then.
const ROUTES: usize = 4;

/// Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ExtraId(u64);

#[derive(Debug, Error)]
pub(crate) enum AddExtraError {
    #[error("{MAX_EXTRAS} extra sockets are in use")]
    TooMany,
    #[error(transparent)]
    Io(#[from] io::Error),
}

pub(super) struct Extra {
    id: ExtraId,
    io: UdpSocket,
    state: UdpSocketState,
    receiver: Receiver,
    /// The destination. Packets from others to this socket are dropped.
    peer: IpAddr,
    /// How often something came from there.
    heard: AtomicU64,
    /// How many read its ICMP errors.
    pub(super) watchers: Mutex<usize>,
}

pub(super) struct Extras {
    /// The length of the table, for readers that need not lock it.
    count: AtomicUsize,
    table: RwLock<Table>,
    /// Counts up: which socket is read first.
    turn: AtomicUsize,
    /// The socket that had no room for a packet.
    full: Mutex<Option<Arc<Extra>>>,
    /// Tasks that receive, which new sockets must wake.
    receiver: Mutex<Option<Waker>>,
}

#[derive(Default)]
struct Table {
    next_id: u64,
    /// With the addresses of the peer that were heard by it, the newest last.
    extras: Vec<(Arc<Extra>, VecDeque<SocketAddr>)>,
    routes: HashMap<SocketAddr, Arc<Extra>>,
}

impl Default for Extras {
    fn default() -> Self {
        Self {
            count: AtomicUsize::new(0),
            table: RwLock::default(),
            turn: AtomicUsize::new(0),
            full: Mutex::default(),
            receiver: Mutex::default(),
        }
    }
}

impl Extras {
    /// From now on what goes to `peer` leaves by `io`.
    pub(super) fn add(&self, io: UdpSocket, peer: SocketAddr) -> Result<ExtraId, AddExtraError> {
        let peer = canonical(peer);
        let state = UdpSocketState::new(UdpSockRef::from(&io))?;
        enlarge_buffers(socket2::SockRef::from(&io));
        let id = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            if table.extras.len() >= MAX_EXTRAS {
                return Err(AddExtraError::TooMany);
            }
            let id = ExtraId(table.next_id);
            table.next_id += 1;
            table.extras.push((
                Arc::new(Extra {
                    id,
                    io,
                    state,
                    receiver: Receiver::default(),
                    peer: peer.ip(),
                    heard: AtomicU64::new(0),
                    watchers: Mutex::default(),
                }),
                VecDeque::new(),
            ));
            table.route(peer, id);
            self.count.store(table.extras.len(), Ordering::Relaxed);
            id
        };
        self.wake();
        Ok(id)
    }

    /// Wakes the receiver.
    pub(super) fn wake(&self) {
        if let Some(receiver) = &*lock(&self.receiver) {
            receiver.wake_by_ref();
        }
    }

    pub(super) fn remove(&self, id: ExtraId) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.extras.retain(|(extra, _)| extra.id != id);
        table.routes.retain(|_, extra| extra.id != id);
        self.count.store(table.extras.len(), Ordering::Relaxed);
    }

    pub(super) fn route(&self, destination: SocketAddr, id: ExtraId) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).route(canonical(destination), id);
    }

    /// From now on packets to an address leave by the main socket, if they left by this one.
    pub(super) fn unroute(&self, destination: SocketAddr, id: ExtraId) {
        let destination = canonical(destination);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, routes)) = table.extras.iter_mut().find(|(extra, _)| extra.id == id) {
            routes.retain(|route| *route != destination);
        }
        if table.routes.get(&destination).is_some_and(|extra| extra.id == id) {
            table.routes.remove(&destination);
        }
    }

    /// Whether there are any: the only cost for a node that has none.
    pub(super) fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) != 0
    }

    pub(super) fn get(&self, id: ExtraId) -> Option<Arc<Extra>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.extras.iter().find(|(extra, _)| extra.id == id).map(|(extra, _)| extra.clone())
    }

    /// The socket for an address, if not the main socket.
    pub(super) fn towards(&self, destination: SocketAddr) -> Option<Arc<Extra>> {
        if !self.any() {
            return None;
        }
        self.table.read().unwrap_or_else(PoisonError::into_inner).routes.get(&canonical(destination)).cloned()
    }

    pub(super) fn send(
        &self,
        extra: &Arc<Extra>,
        sender: &PacketSender,
        transmit: &Transmit<'_>,
    ) -> io::Result<Outcome> {
        let sent = extra.io.try_io(Interest::WRITABLE, || extra.send_now(sender, transmit));
        if sent.is_err() {
            *lock(&self.full) = Some(extra.clone());
        }
        sent
    }

    /// The socket that last had no room, returned once.
    pub(super) fn full(&self) -> Option<Arc<Extra>> {
        lock(&self.full).take()
    }

    /// Whether they are read before the main socket. Neither may starve the other.
    pub(super) fn are_first(&self) -> bool {
        self.any() && self.turn.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
    }

    /// Receives from one of them. The waiting task is also woken when one is added.
    pub(super) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
        signals: &Signals,
    ) -> Poll<usize> {
        {
            let mut receiver = lock(&self.receiver);
            // Before the table is read: a task that adds a socket wakes the waiting ones afterwards.
            if !receiver.as_ref().is_some_and(|receiver| receiver.will_wake(cx.waker())) {
                *receiver = Some(cx.waker().clone());
            }
        }
        if !self.any() {
            return Poll::Pending;
        }
        let Poll::Ready((extra, received)) = self.poll_any(cx, bufs, meta) else { return Poll::Pending };
        for (buffer, meta) in bufs.iter_mut().zip(meta.iter_mut()).take(received) {
            self.take(&extra, buffer, meta, signals);
        }
        Poll::Ready(received)
    }

    fn poll_any(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<(Arc<Extra>, usize)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let first = self.turn.load(Ordering::Relaxed);
        for at in 0..table.extras.len() {
            let (extra, _) = &table.extras[(first.wrapping_add(at)) % table.extras.len()];
            if let Poll::Ready(received) = extra.poll_recv(cx, bufs, meta) {
                return Poll::Ready((extra.clone(), received));
            }
        }
        Poll::Pending
    }

    fn take(&self, extra: &Extra, buffer: &mut [u8], meta: &mut RecvMeta, signals: &Signals) {
        let from = canonical(meta.addr);
        if from.ip() != extra.peer {
            meta.len = 0;
            return;
        }
        extra.heard.fetch_add(1, Ordering::Relaxed);
        demux(buffer, meta, ReceivedBy::Extra(extra.id), signals);
        if meta.len == 0 {
            return;
        }
        let known = |table: &Table| table.routes.get(&from).is_some_and(|known| known.id == extra.id);
        if !known(&self.table.read().unwrap_or_else(PoisonError::into_inner)) {
            self.table.write().unwrap_or_else(PoisonError::into_inner).route(from, extra.id);
        }
    }
}

impl Table {
    fn route(&mut self, destination: SocketAddr, id: ExtraId) {
        for (_, routes) in &mut self.extras {
            routes.retain(|route| *route != destination);
        }
        // It may have been removed a moment ago.
        let Some((extra, routes)) = self.extras.iter_mut().find(|(extra, _)| extra.id == id) else { return };
        routes.push_back(destination);
        self.routes.insert(destination, extra.clone());
        if routes.len() > ROUTES
            && let Some(oldest) = routes.pop_front()
        {
            self.routes.remove(&oldest);
        }
    }
}

impl Extra {
    pub(super) fn send_now(&self, sender: &PacketSender, transmit: &Transmit<'_>) -> io::Result<Outcome> {
        sender.send(&self.io, &self.state, transmit)
    }

    pub(super) fn io(&self) -> &UdpSocket {
        &self.io
    }

    /// Counts the datagrams from its peer.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<usize> {
        if let Poll::Ready(Ok(received)) = self.receiver.poll(&self.io, &self.state, cx, bufs, meta) {
            return Poll::Ready(received);
        }
        Poll::Pending
    }
}
