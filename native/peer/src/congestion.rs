//! quinn's default congestion controller, with an observer. A controller is the only part of a connection that hears of
//! every packet and acknowledgement.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// Hears what happens to the packets of one path.
pub(crate) trait Observer: Send + Sync + 'static {
    /// Packets were sent.
    fn sent(&mut self, _now: Instant) {}

    /// One packet, sent at `sent`, was acknowledged. `shortest`: what a round trip took at best.
    fn acknowledged(&mut self, sent: Instant, shortest: Duration);

    /// The batch of acknowledgements is complete.
    fn acknowledgements_end(&mut self, _now: Instant, _in_flight: u64) {}

    /// Packets were lost.
    fn lost(&mut self, _now: Instant) {}

    /// What is added to the congestion window.
    fn extra_window(&self) -> u64 {
        0
    }

    /// The observer of a new path to the same host.
    fn next_path(&self) -> Self;
}

/// The controller of one path.
struct Observed<O> {
    inner: Box<dyn Controller>,
    observer: O,
}

/// A controller for the first path. `initial_window`: `None` is RFC 9002's.
pub(crate) fn observed<O: Observer>(
    observer: O,
    initial_window: Option<u64>,
    now: Instant,
    mtu: u16,
) -> Box<dyn Controller> {
    let mut config = CubicConfig::default();
    if let Some(window) = initial_window {
        config.initial_window(window);
    }
    Box::new(Observed { inner: Arc::new(config).build(now, mtu), observer })
}

impl<O: Observer> Controller for Observed<O> {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.observer.sent(now);
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.observer.acknowledged(sent, rtt.min());
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.observer.acknowledgements_end(now, in_flight);
        self.inner.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        // Without lost bytes it is the network's mark of congestion: nothing was lost.
        if lost_bytes > 0 {
            self.observer.lost(now);
        }
        self.inner.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.inner.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window() + self.observer.extra_window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone_box(), observer: self.observer.next_path() })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
