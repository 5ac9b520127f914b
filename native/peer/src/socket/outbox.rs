//! Joins what a connection's driver sends in one poll into as few sends as the kernel allows.
//!
//! quinn passes at most ten segments (14,520 bytes) to one send; the kernel takes 64 KB. That saves system calls, and
//! it matters to a 0.14.3 gateway: it takes what one receive brings for a whole frame, so it loses a frame that leaves
//! in two sends. Nothing waits here longer than the poll that produced it, unless the socket is full.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;

use quinn::udp::{EcnCodepoint, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use super::Socket;

/// The largest UDP payload over either IP version, with IPv6's header of 40 bytes and UDP's of 8.
const MAX_BYTES: usize = 65_535 - 40 - 8;

thread_local! {
    /// The outbox of the driver that this thread is polling.
    static OPEN: RefCell<Option<Outbox>> = const { RefCell::new(None) };
    /// The buffer of the last batch, for the next one.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What one driver has sent and the socket has not taken yet.
#[derive(Default)]
pub(crate) struct Outbox {
    batch: Option<(Arc<Socket>, Batch)>,
    grew: bool,
    /// Waits for room in the batch's socket.
    writable: Option<Pin<Box<dyn UdpPoller>>>,
}

/// Packets of one size to one destination; only the last may be shorter.
#[derive(Debug)]
struct Batch {
    destination: SocketAddr,
    ecn: Option<EcnCodepoint>,
    src_ip: Option<IpAddr>,
    segment: usize,
    packets: Vec<u8>,
}

impl Outbox {
    /// Polls a driver. What it sends is gathered here.
    pub(crate) fn gather<T>(&mut self, poll: impl FnOnce() -> T) -> T {
        /// Also when the driver panics.
        struct Opened<'a>(&'a mut Outbox);

        impl Drop for Opened<'_> {
            fn drop(&mut self) {
                *self.0 = OPEN.take().unwrap_or_default();
            }
        }

        self.grew = false;
        OPEN.set(Some(std::mem::take(self)));
        let _opened = Opened(self);
        poll()
    }

    /// Whether the last poll left something that the next one may add to.
    pub(crate) fn grew(&self) -> bool {
        self.grew && self.batch.is_some()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.batch.is_none()
    }

    /// Sends what is left. Wakes the task of `cx` when a full socket has room again.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) {
        if self.flush().is_ok() {
            return;
        }
        let Some((socket, _)) = &self.batch else { return };
        let writable = self.writable.get_or_insert_with(|| socket.clone().create_io_poller());
        if writable.as_mut().poll_writable(cx).is_ready() {
            // Trying again at once could keep this thread from ever polling the socket for readiness.
            cx.waker().wake_by_ref();
        }
    }

    /// Fails only if the socket is full.
    fn flush(&mut self) -> io::Result<()> {
        let Some((socket, batch)) = &self.batch else { return Ok(()) };
        socket.send_now(&batch.transmit())?;
        self.close();
        Ok(())
    }

    fn close(&mut self) {
        // It belongs to this socket and keeps it open. After a rebind the next batch has another one.
        self.writable = None;
        if let Some((_, Batch { mut packets, .. })) = self.batch.take() {
            packets.clear();
            SPARE.set(packets);
        }
    }

    /// Takes a transmit, or fails because the socket is full.
    fn send(&mut self, socket: &Socket, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut rest = transmit.contents;
        if let Some((to, batch)) = &mut self.batch {
            if !std::ptr::eq(Arc::as_ptr(to), socket) {
                // The endpoint was rebound. The caller waits for room in its own socket, not in the old one, so packets that
                // the old one has no room for are lost.
                if self.flush().is_err() {
                    self.close();
                }
            } else if !batch.is_continued_by(transmit) {
                self.flush()?;
            } else {
                let before = batch.packets.len();
                let full;
                (rest, full) = batch.add(rest, socket.max_transmit_segments());
                if !full {
                    self.grew = true;
                    return Ok(());
                }
                if let Err(error) = socket.send_now(&batch.transmit()) {
                    // It comes again, whole.
                    batch.packets.truncate(before);
                    return Err(error);
                }
                self.close();
                if rest.is_empty() {
                    return Ok(());
                }
            }
        }
        // The rest of a transmit is always kept: it must not fail when a part has been sent.
        if rest.len() < transmit.contents.len() || may_be_continued(transmit) {
            let Some(socket) = socket.this.upgrade() else { return Ok(()) };
            self.batch = Some((socket, Batch::new(transmit, rest)));
            self.grew = true;
            return Ok(());
        }
        socket.send_now(transmit)
    }
}

/// Sends a packet or several, or leaves them in the outbox of the driver that is being polled.
pub(super) fn send(socket: &Socket, transmit: &Transmit<'_>) -> io::Result<()> {
    OPEN.with_borrow_mut(|outbox| match outbox {
        Some(outbox) => outbox.send(socket, transmit),
        None => socket.send_now(transmit),
    })
}

/// Several packets, all of full size: quinn may have had more than it puts into one transmit.
fn may_be_continued(transmit: &Transmit<'_>) -> bool {
    let len = transmit.contents.len();
    transmit.segment_size.is_some_and(|segment| len > segment && len.is_multiple_of(segment))
}

impl Batch {
    fn new(transmit: &Transmit<'_>, contents: &[u8]) -> Self {
        let mut packets = SPARE.take();
        packets.extend_from_slice(contents);
        Self {
            destination: transmit.destination,
            ecn: transmit.ecn,
            src_ip: transmit.src_ip,
            segment: transmit.segment_size.unwrap_or(transmit.contents.len()),
            packets,
        }
    }

    fn is_continued_by(&self, transmit: &Transmit<'_>) -> bool {
        let same_size = match transmit.segment_size {
            Some(segment) => segment == self.segment,
            None => transmit.contents.len() <= self.segment,
        };
        same_size
            && self.packets.len().is_multiple_of(self.segment)
            && (self.destination, self.ecn, self.src_ip) == (transmit.destination, transmit.ecn, transmit.src_ip)
    }

    /// Adds as many packets as fit. Returns the rest, and whether nothing can be added any more.
    fn add<'a>(&mut self, contents: &'a [u8], max_segments: usize) -> (&'a [u8], bool) {
        let most = max_segments.min(MAX_BYTES / self.segment) * self.segment;
        let room = most.saturating_sub(self.packets.len());
        let (now, later) = contents.split_at(room.min(contents.len()));
        self.packets.extend_from_slice(now);
        (later, self.packets.len() >= most || !self.packets.len().is_multiple_of(self.segment))
    }

    fn transmit(&self) -> Transmit<'_> {
        Transmit {
            destination: self.destination,
            ecn: self.ecn,
            contents: &self.packets,
            segment_size: (self.packets.len() > self.segment).then_some(self.segment),
            src_ip: self.src_ip,
        }
    }
}
