//! The connections to the local gateway: whether it is running, and which connection a message takes.

use std::time::{Duration, Instant};

/// How long after a failed dial the gateway is not dialled again. A gateway that starts gets messages within a second,
/// and an absent one costs one dial a second, however many messages arrive.
const ABSENT_FOR: Duration = Duration::from_secs(1);

/// Calls in flight on one connection, whose answers take as long as a procedure runs. A 0.14.3 gateway allows 100
/// streams; the others are for messages that are answered at once or not at all.
const MAX_SLOW: usize = 32;

/// Connections to the gateway at once. It accepts one after the other, and a BEAM is unlikely to answer more than 256
/// concurrent procedures in time.
const MAX_LINES: usize = 8;

/// Whether the gateway is running, as far as is known.
#[derive(Debug, Default)]
pub struct Presence {
    absent_until: Option<Instant>,
}

impl Presence {
    pub fn is_absent(&self, now: Instant) -> bool {
        self.absent_until.is_some_and(|until| until > now)
    }

    pub fn missed(&mut self, now: Instant) {
        self.absent_until = Some(now + ABSENT_FOR);
    }

    pub fn found(&mut self) {
        self.absent_until = None;
    }
}

/// Which connection a message takes.
#[derive(Debug, PartialEq, Eq)]
pub enum PoolSlot {
    Present(usize),
    New,
}

/// `slow` is the number of slow messages in flight on each connection, without this one.
pub fn line(slow: &[usize], is_slow: bool) -> PoolSlot {
    let first = match is_slow {
        // One connection is enough for all messages that are answered at once.
        false => slow.first().map(|_| 0),
        true => slow.iter().position(|&waiting| waiting < MAX_SLOW),
    };
    match first {
        Some(index) => PoolSlot::Present(index),
        None if slow.len() < MAX_LINES => PoolSlot::New,
        // One of the waiting messages loses its answer.
        None => (0..slow.len()).min_by_key(|&index| slow[index]).map_or(PoolSlot::New, PoolSlot::Present),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_gateway_is_dialled_again_a_second_later() {
        let (mut presence, now) = (Presence::default(), Instant::now());
        assert!(!presence.is_absent(now));
        presence.missed(now);
        assert!(presence.is_absent(now + Duration::from_millis(999)));
        assert!(!presence.is_absent(now + ABSENT_FOR));
        presence.missed(now);
        presence.found();
        assert!(!presence.is_absent(now));
    }

    #[test]
    fn slow_calls_are_spread_over_connections() {
        let mut slow = Vec::new();
        for n in 0..MAX_LINES * MAX_SLOW {
            match line(&slow, true) {
                PoolSlot::New => slow.push(1),
                PoolSlot::Present(index) => slow[index] += 1,
            }
            assert_eq!(slow.len(), n / MAX_SLOW + 1);
        }
        assert_eq!(slow, [MAX_SLOW; MAX_LINES]);
        assert_eq!(line(&slow, true), PoolSlot::Present(0), "no more connections than that");
        slow[5] -= 1;
        assert_eq!(line(&slow, true), PoolSlot::Present(5));
    }

    #[test]
    fn fast_messages_take_the_first_connection() {
        assert_eq!(line(&[], false), PoolSlot::New);
        assert_eq!(line(&[MAX_SLOW, 0], false), PoolSlot::Present(0));
    }
}
