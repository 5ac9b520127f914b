//! Which local port a dial leaves by.
//!
//! A NAT, a DNAT rule or a load balancer may keep a mapping of our port to a destination that is gone. Dialling again from the
//! same port keeps that mapping alive; from another port there is none yet.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Silent dials in a row after which another port is tried.
const SILENT_DIALS: u32 = 2;

/// How long a dial waits at least before it counts as silent: QUIC has repeated its first packet by then.
const SILENCE: Duration = Duration::from_secs(2);

/// For how long a destination must have refused every dial. The mapping may lead to another host that refuses, but most
/// often a service is restarting.
const REFUSED_FOR: Duration = Duration::from_secs(5);

/// Destinations that are remembered. Each costs a dial that failed.
const MAX_DESTINATIONS: usize = 1024;

/// How long a failure is remembered. A mapping that is not refreshed is gone by then: Linux keeps an established one
/// for 120 s.
const FORGET_AFTER: Duration = Duration::from_secs(180);

/// How long another port is kept for a destination after something was last heard there.
const KEEP_UNHEARD: Duration = Duration::from_secs(300);

/// How often the usual port is tried beside another one that works. In between, the dead mapping can expire.
const CHECK_EVERY: Duration = Duration::from_secs(600);

/// How a dial failed that got no packet back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failed {
    /// Nothing came.
    Silent,
    /// ICMP, or the system, reported that no socket is there.
    Refused,
}

/// The destinations that did not answer.
#[derive(Debug, Default)]
pub struct SourcePorts {
    failing: HashMap<SocketAddr, Failing>,
}

/// Since the destination was last heard.
#[derive(Debug)]
struct Failing {
    since: Instant,
    last: Instant,
    silent: u32,
    /// The last dial left by another port.
    by_another: bool,
}

/// How long a dial must have waited for a first packet to count as silent, where it may take `longest` altogether.
pub fn silence(longest: Duration) -> Duration {
    SILENCE.min(longest / 2)
}

impl SourcePorts {
    /// Whether the next dial should leave by another port. While nothing answers, every second dial does: the
    /// destination may be down, and come back at any time.
    pub fn another(&self, to: SocketAddr, now: Instant) -> bool {
        let failing = self.failing.get(&to).filter(|failing| failing.is_remembered(now));
        failing.is_some_and(|failing| {
            let refused = failing.last >= failing.since + REFUSED_FOR;
            !failing.by_another && (failing.silent >= SILENT_DIALS || refused)
        })
    }

    /// A dial has failed, which left by another port or by the usual one.
    pub fn failed(&mut self, to: SocketAddr, how: Failed, by_another: bool, now: Instant) {
        self.failing.retain(|_, failing| failing.is_remembered(now));
        if self.failing.len() >= MAX_DESTINATIONS && !self.failing.contains_key(&to) {
            return;
        }
        let failing = self.failing.entry(to).or_insert(Failing { since: now, last: now, silent: 0, by_another });
        failing.silent = failing.silent.saturating_add((how == Failed::Silent).into());
        (failing.last, failing.by_another) = (now, by_another);
    }

    /// The destination answered.
    pub fn heard(&mut self, to: SocketAddr) {
        self.failing.remove(&to);
    }
}

impl Failing {
    fn is_remembered(&self, now: Instant) -> bool {
        now < self.last + FORGET_AFTER
    }
}

/// Another port that a destination answered at.
#[derive(Debug)]
pub struct Kept {
    /// What had been received there when it was last looked at.
    heard: u64,
    heard_at: Instant,
    /// When the usual port was last tried. `None`: a check is due.
    checked_at: Option<Instant>,
}

impl Kept {
    pub fn new(heard: u64, now: Instant) -> Self {
        Self { heard, heard_at: now, checked_at: None }
    }

    /// Whether it is still of use, now that `heard` datagrams have come there.
    pub fn is_used(&mut self, heard: u64, now: Instant) -> bool {
        if heard != self.heard {
            (self.heard, self.heard_at) = (heard, now);
        }
        now < self.heard_at + KEEP_UNHEARD
    }

    /// Whether the usual port should be tried now. The caller then does so.
    pub fn check(&mut self, now: Instant) -> bool {
        let due = self.checked_at.is_none();
        self.checked_at.get_or_insert(now);
        due
    }

    /// Whether the last such check was long ago. From then on one is due.
    pub fn make_due(&mut self, now: Instant) -> bool {
        let due = self.checked_at.is_some_and(|checked| now >= checked + CHECK_EVERY);
        if due {
            self.checked_at = None;
        }
        due
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn to(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    fn after(seconds: u64) -> Instant {
        // The same for the whole test.
        use std::sync::LazyLock;
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        *START + Duration::from_secs(seconds)
    }

    /// Dials `count` times, at this interval in seconds, without any answer; returns which dials left by another port.
    fn dialled(ports: &mut SourcePorts, how: Failed, count: u64, every: u64) -> Vec<bool> {
        let mut left = Vec::new();
        for n in 0..count {
            let another = ports.another(to(1), after(n * every));
            ports.failed(to(1), how, another, after(n * every));
            assert!(!ports.another(to(2), after(n * every)), "only this destination moves");
            left.push(another);
        }
        left
    }

    #[test]
    fn after_two_silent_dials_every_second_one_leaves_by_another_port() {
        let left = dialled(&mut SourcePorts::default(), Failed::Silent, 7, 5);
        assert_eq!(left, [false, false, true, false, true, false, true]);
    }

    #[test]
    fn a_destination_that_keeps_refusing_is_dialled_from_another_port_too() {
        let left = dialled(&mut SourcePorts::default(), Failed::Refused, 10, 1);
        assert_eq!(left, [false, false, false, false, false, false, true, false, true, false]);
        let rarely = dialled(&mut SourcePorts::default(), Failed::Refused, 4, 60);
        assert_eq!(rarely, [false, false, true, false]);
    }

    #[test]
    fn an_answer_ends_the_search_for_another_port() {
        for how in [Failed::Silent, Failed::Refused] {
            let mut ports = SourcePorts::default();
            dialled(&mut ports, how, 2, 10);
            assert!(ports.another(to(1), after(10)));
            ports.heard(to(1));
            ports.failed(to(1), how, false, after(11));
            assert!(!ports.another(to(1), after(11)), "they must follow each other");
        }
    }

    #[test]
    fn failures_are_forgotten_once_no_mapping_can_be_left() {
        let mut ports = SourcePorts::default();
        dialled(&mut ports, Failed::Silent, 2, 0);
        let over = FORGET_AFTER.as_secs();
        assert!(ports.another(to(1), after(over - 1)));
        assert!(!ports.another(to(1), after(over)));
        ports.failed(to(1), Failed::Silent, false, after(over));
        assert!(!ports.another(to(1), after(over)), "counted from the start");
    }

    #[test]
    fn the_table_is_bounded_and_has_room_again_later() {
        let mut ports = SourcePorts::default();
        let last = u16::try_from(MAX_DESTINATIONS).unwrap() + 1;
        for port in 1..=last {
            ports.failed(to(port), Failed::Silent, false, after(0));
            ports.failed(to(port), Failed::Silent, false, after(0));
        }
        assert_eq!(ports.failing.len(), MAX_DESTINATIONS);
        assert!(!ports.another(to(last), after(0)));
        ports.failed(to(last), Failed::Silent, false, after(FORGET_AFTER.as_secs()));
        assert_eq!(ports.failing.len(), 1);
    }

    #[test]
    fn a_dial_that_may_take_little_is_silent_sooner() {
        assert_eq!(silence(Duration::from_secs(5)), SILENCE);
        assert_eq!(silence(Duration::from_secs(1)), Duration::from_millis(500));
    }

    #[test]
    fn a_port_is_kept_while_something_is_heard_there() {
        let mut kept = Kept::new(7, after(0));
        let keep = KEEP_UNHEARD.as_secs();
        assert!(kept.is_used(7, after(keep - 1)));
        assert!(kept.is_used(8, after(keep - 1)));
        assert!(kept.is_used(8, after(2 * keep - 2)));
        assert!(!kept.is_used(8, after(2 * keep - 1)));
    }

    #[test]
    fn the_usual_port_is_tried_at_once_and_then_rarely() {
        let mut kept = Kept::new(0, after(0));
        let every = CHECK_EVERY.as_secs();
        assert!(!kept.make_due(after(every)), "there was none yet");
        assert!(kept.check(after(0)));
        assert!(!kept.check(after(1)) && !kept.make_due(after(every - 1)));
        assert!(kept.make_due(after(every)) && !kept.make_due(after(every)), "said once");
        assert!(kept.check(after(every)) && !kept.check(after(every)));
    }
}
