//! What the acknowledgements of packets prove about data whose stream stays open.
//!
//! QUIC tells an application that a stream's data arrived only once the stream is finished. A stream that is kept for
//! later messages is not, so the proof is taken from the packets, as the congestion controller sees them:
//!
//! - nothing is in flight any more, and nothing was lost since the last packet left: all that was sent has arrived;
//! - or a packet that left after the data did was acknowledged, no loss was declared since the data was written, and
//!   loss detection (RFC 9002, section 6.1.2: 9/8 of a round trip) has had its time to declare one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Acknowledgements remembered until loss detection has had its time. At one every 10 ms this covers 640 ms; the oldest
/// gives way, which only delays the proof.
const REMEMBERED: usize = 64;

/// Added to 9/8 of a round trip: timers are 1 ms coarse (RFC 9002's granularity) and fire late on a busy machine.
const SETTLING_MARGIN: Duration = Duration::from_millis(5);

/// A moment after which packets carry some data, or leave behind it. Not when the last packet before it left, because the
/// ack tracker is not told of every packet that leaves: probes of the path's MTU are acknowledged like others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(Instant);

#[derive(Debug, Default)]
pub struct AckTracker {
    last_sent: Option<Instant>,
    lost_since_sent: bool,
    last_loss: Option<Instant>,
    /// All that was sent up to here has arrived.
    drained: Option<Instant>,
    /// A packet sent up to `.0` was acknowledged at `.1`.
    acknowledged: VecDeque<(Instant, Instant)>,
    newest_acknowledged: Option<Instant>,
    /// As `drained`, unless a loss was declared since.
    settled: Option<Instant>,
}

impl Mark {
    /// `now` is read when the data is written.
    pub fn new(now: Instant) -> Self {
        Self(now)
    }
}

impl AckTracker {
    pub fn sent(&mut self, now: Instant) {
        self.last_sent = Some(now);
        self.lost_since_sent = false;
    }

    /// One packet, sent at `sent`, was acknowledged.
    pub fn acknowledged(&mut self, sent: Instant) {
        self.newest_acknowledged = self.newest_acknowledged.max(Some(sent));
    }

    /// The batch of acknowledgements is complete.
    pub fn acknowledgements_end(&mut self, now: Instant, in_flight: u64) {
        if in_flight == 0 && !self.lost_since_sent {
            self.drained = self.last_sent;
        }
        if let Some(sent) = self.newest_acknowledged.take() {
            if self.acknowledged.len() == REMEMBERED {
                self.acknowledged.pop_front();
            }
            self.acknowledged.push_back((sent, now));
        }
    }

    pub fn lost(&mut self, now: Instant) {
        self.last_loss = Some(now);
        self.lost_since_sent = true;
    }

    /// Whether data that was written at `mark`, and that nothing kept from leaving with the next packet, has arrived for
    /// certain.
    pub fn arrived(&mut self, mark: Mark, now: Instant, round_trip: Duration) -> bool {
        let settling = round_trip * 9 / 8 + SETTLING_MARGIN;
        while let Some(&(sent, at)) = self.acknowledged.front() {
            if now < at + settling {
                break;
            }
            self.settled = self.settled.max(Some(sent));
            self.acknowledged.pop_front();
        }
        let Mark(written) = mark;
        let undisturbed = self.last_loss <= Some(written);
        self.drained > Some(written) || (undisturbed && self.settled > Some(written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);

    fn clock() -> impl Fn(u64) -> Instant {
        let start = Instant::now();
        move |ms| start + Duration::from_millis(ms)
    }

    #[test]
    fn nothing_in_flight_proves_all_that_was_sent() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        let before = Mark::new(at(0));
        assert!(!ack_tracker.arrived(before, at(1), RTT));
        ack_tracker.sent(at(1));
        let after = Mark::new(at(2));
        ack_tracker.acknowledged(at(1));
        ack_tracker.acknowledgements_end(at(101), 0);
        assert!(ack_tracker.arrived(before, at(101), RTT));
        assert!(!ack_tracker.arrived(after, at(101), RTT), "written after the last packet left");
    }

    #[test]
    fn a_loss_is_no_arrival_though_nothing_is_in_flight() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        let mark = Mark::new(at(0));
        ack_tracker.sent(at(1));
        ack_tracker.lost(at(300));
        ack_tracker.acknowledgements_end(at(301), 0);
        assert!(!ack_tracker.arrived(mark, at(1000), RTT));
        ack_tracker.sent(at(302));
        ack_tracker.acknowledged(at(302));
        ack_tracker.acknowledgements_end(at(402), 0);
        assert!(ack_tracker.arrived(mark, at(402), RTT), "sent again and acknowledged");
    }

    #[test]
    fn with_packets_always_in_flight_a_later_acknowledgement_proves_after_loss_detection() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        let first = Mark::new(at(0));
        ack_tracker.sent(at(1));
        ack_tracker.sent(at(11));
        let late = Mark::new(at(12));
        for n in 2..30 {
            ack_tracker.sent(at(n * 10 + 1));
        }
        ack_tracker.acknowledged(at(11));
        ack_tracker.acknowledgements_end(at(111), 1000);
        assert!(!ack_tracker.arrived(first, at(112), RTT), "an earlier packet may yet be declared lost");
        // 9/8 of a round trip and 5 ms later.
        assert!(!ack_tracker.arrived(first, at(111 + 117), RTT), "nor has loss detection had its time");
        assert!(ack_tracker.arrived(first, at(111) + Duration::from_micros(117_500), RTT));
        assert!(!ack_tracker.arrived(late, at(400), RTT), "nothing sent since was acknowledged");
    }

    #[test]
    fn a_later_acknowledgement_does_not_put_off_what_an_earlier_one_proves() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        let mark = Mark::new(at(0));
        for n in 1..=30 {
            ack_tracker.sent(at(n * 10));
        }
        for n in 1..=2 {
            ack_tracker.acknowledged(at(n * 100));
            ack_tracker.acknowledgements_end(at(n * 100 + 100), 1000);
        }
        assert!(ack_tracker.arrived(mark, at(200 + 118), RTT));
    }

    #[test]
    fn acknowledgements_are_remembered_up_to_a_bound_and_the_oldest_gives_way() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        for n in 0..=REMEMBERED as u64 {
            ack_tracker.acknowledged(at(n));
            ack_tracker.acknowledgements_end(at(n), 1000);
        }
        assert_eq!(ack_tracker.acknowledged.len(), REMEMBERED);
        assert_eq!(ack_tracker.acknowledged.front(), Some(&(at(1), at(1))));
    }

    #[test]
    fn a_packet_that_left_at_the_same_moment_as_the_data_was_written_proves_nothing() {
        let at = clock();
        for in_flight in [0, 1000] {
            let mut ack_tracker = AckTracker::default();
            let mark = Mark::new(at(1));
            ack_tracker.sent(at(1));
            ack_tracker.acknowledged(at(1));
            ack_tracker.acknowledgements_end(at(101), in_flight);
            assert!(!ack_tracker.arrived(mark, at(1000), RTT), "{in_flight} bytes in flight");
        }
    }

    /// Probes of the path's MTU are not told as sent.
    #[test]
    fn a_packet_that_left_unseen_before_the_data_proves_nothing() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        ack_tracker.sent(at(1));
        ack_tracker.acknowledged(at(1));
        ack_tracker.acknowledgements_end(at(101), 0);
        let unseen = at(105);
        let mark = Mark::new(at(110));
        ack_tracker.sent(at(111));
        ack_tracker.acknowledged(unseen);
        ack_tracker.acknowledgements_end(at(205), 1000);
        assert!(!ack_tracker.arrived(mark, at(1000), RTT));
        ack_tracker.acknowledged(at(111));
        ack_tracker.acknowledgements_end(at(1001), 0);
        assert!(ack_tracker.arrived(mark, at(1001), RTT));
    }

    #[test]
    fn with_packets_always_in_flight_a_loss_takes_the_proof_away() {
        let at = clock();
        let mut ack_tracker = AckTracker::default();
        let mark = Mark::new(at(0));
        ack_tracker.sent(at(1));
        ack_tracker.sent(at(11));
        ack_tracker.acknowledged(at(11));
        ack_tracker.acknowledgements_end(at(111), 1000);
        ack_tracker.lost(at(150));
        assert!(!ack_tracker.arrived(mark, at(1000), RTT));
    }
}
