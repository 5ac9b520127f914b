//! quinn's view of the tokio runtime.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

use crate::socket::Outbox;

/// How often a driver is polled in a row while it has more to send. quinn passes 20 packets to a socket in one poll, and
/// 45 full ones fill a send.
const MOST_POLLS: usize = 4;

/// A [`TokioRuntime`] whose connection drivers let all other ready tasks run first, and send their packets in as few
/// sends as possible.
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
        TokioRuntime.spawn(Box::pin(Driver { future, deferred: false, outbox: Outbox::default() }));
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

struct Driver {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    deferred: bool,
    outbox: Outbox,
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { future, deferred, outbox } = &mut *self;
        *deferred = !*deferred;
        if *deferred {
            // A task that wakes itself while it runs goes to the back of the queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut polled = Poll::Pending;
        for _ in 0..MOST_POLLS {
            polled = outbox.gather(|| future.as_mut().poll(cx));
            if polled.is_ready() || !outbox.grew() {
                break;
            }
        }
        outbox.poll_flush(cx);
        polled
    }
}
