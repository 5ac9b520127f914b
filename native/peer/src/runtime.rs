//! quinn's view of the tokio runtime.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

/// A [`TokioRuntime`] whose connection drivers let everything else that is ready run first.
///
/// tokio runs a task that was just woken before all others. For a connection driver that means one packet per written
/// message; at the back of the queue it finds many messages and fills packets, which makes a stream per message about
/// four times as fast.
#[derive(Debug)]
pub(crate) struct BatchingRuntime;

impl Runtime for BatchingRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(Box::pin(Deferred { future, deferred: false }));
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

struct Deferred {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    deferred: bool,
}

impl Future for Deferred {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.deferred = !self.deferred;
        if self.deferred {
            // A task that wakes itself while it runs goes to the back of the queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.future.as_mut().poll(cx)
    }
}
