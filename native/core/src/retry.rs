//! When to dial again, and when to register again.

use std::time::Duration;

/// A pause that doubles from `first` to `longest`, each drawn between half and the whole of it, so that many nodes that
/// lost the same peer do not come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, first, longest }
    }

    /// The next pause; `draw` is uniform in 0..1.
    pub fn pause(&mut self, draw: f64) -> Duration {
        let pause = self.next.mul_f64(0.5 + draw / 2.0);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A relay that restarts is back within a second. One that stays away is dialled every ten seconds by each of its
/// nodes. With ten thousand nodes that is a thousand dials per second, which a relay that comes back can handle.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A registration that lasted less than this does not count: the pauses go on growing.
const LASTING: Duration = Duration::from_secs(1);

/// A relay does not register a node that it has just made leave (`KICKED_FOR`).
const LONGEST_PAUSE_KICKED: Duration = Duration::from_secs(60);

/// Two nodes with one key would take a registration from each other for ever. A node that is replaced has stopped by the first
/// of these.
const FIRST_PAUSE_TAKEN_OVER: Duration = Duration::from_secs(5);
const LONGEST_PAUSE_TAKEN_OVER: Duration = Duration::from_secs(300);

/// A registration that lasted this long is undisputed: of two nodes with one key, the other never waits that long.
const UNDISPUTED: Duration = Duration::from_secs(600);

/// The second time that a registration is taken over, the other node is there to stay.
const DISPUTED: u32 = 2;

/// When to register again at a relay.
#[derive(Debug)]
pub struct Registering {
    lost: Backoff,
    taken_over: Backoff,
    takeovers: u32,
}

impl Default for Registering {
    fn default() -> Self {
        Self {
            lost: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            taken_over: Backoff::new(FIRST_PAUSE_TAKEN_OVER, LONGEST_PAUSE_TAKEN_OVER),
            takeovers: 0,
        }
    }
}

impl Registering {
    /// A registration has lasted this long.
    pub fn lasted(&mut self, time: Duration) {
        if time >= LASTING {
            self.lost.reset();
        }
        if time >= UNDISPUTED {
            self.taken_over.reset();
            self.takeovers = 0;
        }
    }

    /// The pause before the next attempt; `draw` is uniform in 0..1.
    pub fn pause(&mut self, draw: f64) -> Duration {
        self.lost.pause(draw)
    }

    /// The same where the relay refuses the node: its answer will not change soon.
    pub fn pause_refused(draw: f64) -> Duration {
        Backoff::new(LONGEST_PAUSE, LONGEST_PAUSE).pause(draw)
    }

    /// The same where the relay has made the node leave.
    pub fn pause_kicked(draw: f64) -> Duration {
        Backoff::new(LONGEST_PAUSE_KICKED, LONGEST_PAUSE_KICKED).pause(draw)
    }

    /// The same where another connection with this node's key has taken the registration over, and whether it has just
    /// become clear that two nodes have the key. The latter is true once.
    pub fn pause_taken_over(&mut self, draw: f64) -> (Duration, bool) {
        self.takeovers = self.takeovers.saturating_add(1);
        (self.taken_over.pause(draw), self.takeovers == DISPUTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::KICKED_FOR;

    #[test]
    fn a_kicked_node_waits_until_it_may_return() {
        for draw in [0.0, 0.5, 1.0] {
            assert!(Registering::pause_kicked(draw) >= KICKED_FOR);
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        assert_eq!([0; 4].map(|_| backoff.pause(1.0)), [ms(100), ms(200), ms(350), ms(350)]);
        assert_eq!(backoff.pause(0.0), ms(175));
        backoff.reset();
        assert_eq!(backoff.pause(0.0), ms(50));
    }

    /// Two nodes with one key at one relay: how long each registration lasts, and when both have said that there are two.
    fn disputed(hours: u64) -> (Vec<Duration>, [Option<Duration>; 2]) {
        let (mut nodes, mut said) = ([Registering::default(), Registering::default()], [None; 2]);
        let (mut now, mut since, mut lasted, mut turn) = (Duration::ZERO, [Duration::ZERO; 2], Vec::new(), 0);
        while now < Duration::from_secs(hours * 3600) {
            // The node whose turn it is registers, and takes the registration from the other.
            let other = 1 - turn;
            if now > Duration::ZERO {
                lasted.push(now - since[other]);
                nodes[other].lasted(now - since[other]);
                let (pause, disputed) = nodes[other].pause_taken_over(0.5);
                if disputed {
                    assert_eq!(said[other], None, "once");
                    said[other] = Some(now);
                }
                since[turn] = now;
                now += pause;
            } else {
                now += Duration::from_secs(1);
            }
            turn = other;
        }
        (lasted, said)
    }

    #[test]
    fn two_nodes_with_one_key_alternate_with_growing_pauses_and_report_it_once() {
        let (lasted, said) = disputed(24);
        let within = |time: u64| {
            lasted
                .iter()
                .scan(Duration::ZERO, |sum, lasted| {
                    *sum += *lasted;
                    Some(*sum)
                })
                .filter(|at| *at < Duration::from_secs(time))
                .count()
        };
        assert!(within(15) <= 4, "{lasted:?}");
        assert!(within(3600) < 40, "{}", within(3600));
        assert!(lasted.len() < 24 * 20, "{}", lasted.len());
        let soon = Duration::from_secs(30);
        assert!(said.iter().all(|said| said.is_some_and(|said| said < soon)), "{said:?}");
    }

    #[test]
    fn a_node_that_is_alone_again_starts_with_short_pauses() {
        let mut node = Registering::default();
        let first = node.pause_taken_over(1.0);
        assert_eq!(first, (FIRST_PAUSE_TAKEN_OVER, false));
        assert_eq!(node.pause_taken_over(1.0), (2 * FIRST_PAUSE_TAKEN_OVER, true));
        node.lasted(LONGEST_PAUSE_TAKEN_OVER);
        assert_eq!(node.pause_taken_over(1.0), (4 * FIRST_PAUSE_TAKEN_OVER, false));
        node.lasted(UNDISPUTED);
        assert_eq!(node.pause_taken_over(1.0), first);
    }

    #[test]
    fn a_short_registration_does_not_reset_the_pauses() {
        let mut node = Registering::default();
        assert_eq!(node.pause(1.0), FIRST_PAUSE);
        node.lasted(LASTING / 2);
        assert_eq!(node.pause(1.0), 2 * FIRST_PAUSE);
        node.lasted(LASTING);
        assert_eq!(node.pause(1.0), FIRST_PAUSE);
    }
}
