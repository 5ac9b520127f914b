//! Packets from the kernel.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use macula_peer_core::faults::{FaultVerdict, Faults};
use macula_peer_core::sync::lock;
use quinn::udp::{RecvMeta, UdpSockRef, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

/// Receives from one socket. An error would end quinn's endpoint with all its connections, so none is returned while
/// the runtime runs: most are about one destination. Errors that last are waited out, or reported so that the socket is
/// replaced.
#[derive(Default)]
pub(super) struct Receiver {
    /// Whether the last thing that happened was an error.
    failing: AtomicBool,
    faults: Mutex<Faults>,
    pause: Mutex<Option<Pin<Box<Sleep>>>>,
    broken: Notify,
    #[cfg(test)]
    pub(super) injected: Mutex<Option<Box<dyn FnMut() -> io::Error + Send>>>,
}

impl Receiver {
    pub(super) fn poll(
        &self,
        io: &UdpSocket,
        state: &UdpSocketState,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.failing.load(Ordering::Relaxed) {
                ready!(self.poll_pause(cx));
            }
            ready!(io.poll_recv_ready(cx))?;
            match io.try_io(Interest::READABLE, || self.receive(io, state, bufs, meta)) {
                Ok(received) => {
                    self.works();
                    return Poll::Ready(Ok(received));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.works(),
                Err(error) => self.fails(&error),
            }
        }
    }

    /// Waits until the socket has failed for long.
    pub(super) async fn broken(&self) {
        self.broken.notified().await;
    }

    /// A packet could not be sent because of the socket.
    pub(super) fn is_broken(&self) {
        self.broken.notify_one();
    }

    fn receive(
        &self,
        io: &UdpSocket,
        state: &UdpSocketState,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(injected) = &mut *lock(&self.injected) {
            return Err(injected());
        }
        state.recv(UdpSockRef::from(io), bufs, meta)
    }

    fn works(&self) {
        if self.failing.load(Ordering::Relaxed) {
            self.failing.store(false, Ordering::Relaxed);
            lock(&self.faults).worked();
        }
    }

    fn fails(&self, error: &io::Error) {
        tracing::trace!(%error, "nothing received");
        let mut faults = lock(&self.faults);
        self.failing.store(true, Ordering::Relaxed);
        let pause = match faults.failed(Instant::now()) {
            FaultVerdict::Again => return,
            FaultVerdict::Pause(pause) => pause,
            FaultVerdict::Broken(pause) => {
                self.broken.notify_one();
                pause
            }
        };
        if faults.is_news() {
            tracing::warn!(%error, "receiving fails: trying again after pauses");
        }
        *lock(&self.pause) = Some(Box::pin(sleep(pause)));
    }

    fn poll_pause(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut pause = lock(&self.pause);
        if let Some(sleep) = &mut *pause {
            ready!(sleep.as_mut().poll(cx));
            *pause = None;
        }
        Poll::Ready(())
    }
}
