//! How long a link may be silent while its peer owes an acknowledgement. After that it is suspect: a new link is tried beside
//! it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A peer that was silent for this long may have been restarted. A false alarm costs a handshake.
const DOUBT_AFTER: Duration = Duration::from_millis(500);

/// The same in round trips. A lost packet is asked for after three round trips and the peer's delay (RFC 9002, section
/// 6.2), and repeated one later; the question may be lost too.
const ROUND_TRIPS: u32 = 6;

/// The same where the peer has not confirmed the handshake, which it does as soon as it has our last part of it. Until
/// then it reads nothing, and if that part was lost it takes several round trips, and more the more was lost before.
const UNCONFIRMED_HALF_ROUND_TRIPS: u32 = 3;

/// Beyond this, the round trips are those of the path only if it was never faster. A host that stood still for seconds
/// makes QUIC's estimate long for minutes, and a peer that then died would be noticed as late. As long as the longest
/// silence that is expected of a slow peer (`liveness.rs`).
const LONGEST: Duration = Duration::from_secs(3);

/// The slowest path: two geostationary satellites, with queues. A first measurement beyond it is that of a host that stood
/// still.
const SLOWEST_ROUND_TRIP: Duration = Duration::from_millis(1500);

/// What is known of one link.
#[derive(Debug)]
pub struct Patience {
    /// Milliseconds for which the peer may be silent because it was recently.
    expected: AtomicU64,
    /// Microseconds that a round trip took at best.
    shortest: AtomicU64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { expected: AtomicU64::new(0), shortest: AtomicU64::new(u64::MAX) }
    }
}

impl Patience {
    /// The peer was silent for long recently and was there nevertheless.
    pub fn expect_silence(&self, expected: Duration) {
        self.expected.store(expected.as_millis() as u64, Ordering::Relaxed);
    }

    /// A round trip was measured.
    pub fn measured(&self, round_trip: Duration) {
        let measured = round_trip.as_micros() as u64;
        // As a rule nothing is written: this is called for each packet.
        if measured < self.shortest.load(Ordering::Relaxed) {
            self.shortest.fetch_min(measured, Ordering::Relaxed);
        }
    }

    /// How long the peer may be silent. `round_trip`: as it is estimated now. `confirmed`: the peer is known to read what is
    /// written.
    pub fn at(&self, round_trip: Duration, confirmed: bool) -> Duration {
        self.measured(round_trip);
        let shortest = Duration::from_micros(self.shortest.load(Ordering::Relaxed));
        let longest = LONGEST.max(shortest.min(SLOWEST_ROUND_TRIP) * ROUND_TRIPS);
        let answered = match confirmed {
            true => round_trip * ROUND_TRIPS,
            false => round_trip * UNCONFIRMED_HALF_ROUND_TRIPS / 2,
        };
        let expected = Duration::from_millis(self.expected.load(Ordering::Relaxed));
        DOUBT_AFTER.max(expected).max(answered.min(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_link_may_be_silent_for_six_of_its_round_trips_and_half_a_second() {
        let patience = Patience::default();
        assert_eq!(patience.at(ms(20), true), ms(500));
        assert_eq!(patience.at(ms(200), true), ms(1200));
        assert_eq!(patience.at(ms(500), true), ms(3000));
        assert_eq!(patience.at(ms(500), false), ms(750));
        patience.expect_silence(ms(900));
        assert_eq!(patience.at(ms(20), true), ms(900));
    }

    /// A host that stood still for some seconds left a round trip of 1.5 s behind, and a peer that then died was noticed
    /// after nine seconds.
    #[test]
    fn a_host_that_stood_still_makes_no_peer_die_unnoticed() {
        let patience = Patience::default();
        patience.at(ms(20), true);
        assert_eq!(patience.at(ms(1500), true), ms(3000));
        assert_eq!(patience.at(ms(8000), true), ms(3000));
        assert_eq!(patience.at(ms(30), true), ms(500));
    }

    #[test]
    fn a_path_that_was_never_faster_has_the_time_that_it_takes() {
        let patience = Patience::default();
        assert_eq!(patience.at(ms(1500), true), ms(9000));
        assert_eq!(patience.at(ms(1400), true), ms(8400));
        assert_eq!(patience.at(ms(1500), true), ms(8400));
    }

    /// Its first round trip took seconds, and the estimate does not know better for long.
    #[test]
    fn a_host_that_stood_still_during_the_handshake_is_no_slow_path() {
        let patience = Patience::default();
        assert_eq!(patience.at(ms(5000), true), ms(9000));
        patience.measured(ms(20));
        assert_eq!(patience.at(ms(4378), true), ms(3000));
    }
}
