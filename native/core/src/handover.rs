//! Handing messages over to the local gateway: whether it is there, and over which of several connections.

use std::time::{Duration, Instant};

/// How long a gateway that was not there is not looked for again. One that starts gets messages a second later at the
/// most, and one that is not there costs a dial a second, however many messages arrive.
const ABSENT_FOR: Duration = Duration::from_secs(1);

/// Messages of one connection whose answer takes as long as somebody's procedure. A 0.14.3 gateway allows 100 streams; the
/// others are for messages that are answered at once, or not at all.
const MAX_SLOW: usize = 32;

/// Connections to the gateway at once. It makes one after the other, and 256 procedures that run are more than one BEAM
/// is likely to answer for within their time.
const MAX_LINES: usize = 8;

/// Whether the gateway is there, as far as is known.
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
pub enum Line {
    Present(usize),
    New,
}

/// `slow`: the messages of each connection that wait for their slow answer, this one not counted.
pub fn line(slow: &[usize], is_slow: bool) -> Line {
    let first = match is_slow {
        // One connection is enough for all that is answered soon.
        false => slow.first().map(|_| 0),
        true => slow.iter().position(|&waiting| waiting < MAX_SLOW),
    };
    match first {
        Some(index) => Line::Present(index),
        None if slow.len() < MAX_LINES => Line::New,
        // One of those that wait loses its answer.
        None => (0..slow.len()).min_by_key(|&index| slow[index]).map_or(Line::New, Line::Present),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_that_was_not_there_is_looked_for_again_a_second_later_or_when_it_was_found() {
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
    fn slow_answers_take_another_connection_where_one_has_enough_of_them() {
        let mut slow = Vec::new();
        for n in 0..MAX_LINES * MAX_SLOW {
            match line(&slow, true) {
                Line::New => slow.push(1),
                Line::Present(index) => slow[index] += 1,
            }
            assert_eq!(slow.len(), n / MAX_SLOW + 1);
        }
        assert_eq!(slow, [MAX_SLOW; MAX_LINES]);
        assert_eq!(line(&slow, true), Line::Present(0), "no more connections than that");
        slow[5] -= 1;
        assert_eq!(line(&slow, true), Line::Present(5));
    }

    #[test]
    fn all_others_take_the_first() {
        assert_eq!(line(&[], false), Line::New);
        assert_eq!(line(&[MAX_SLOW, 0], false), Line::Present(0));
    }
}
