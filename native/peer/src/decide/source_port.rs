//! Which local port a dial leaves by.
//!
//! A NAT, a DNAT rule or a load balancer may keep a mapping of our port to a destination that is gone. Dialling again from the
//! same port keeps that mapping alive; from another port there is none yet.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Dials in a row of which nothing was heard, after which another port is tried.
const SILENT_DIALS: u32 = 2;

/// How long a dial waits at least before it counts as silent: QUIC has repeated its first packet by then.
const SILENCE: Duration = Duration::from_secs(2);

/// Destinations that are remembered. Each costs a silent dial, of which there are few at once.
const MAX_DESTINATIONS: usize = 1024;

/// How long a silent destination is remembered. A mapping that nothing refreshes is gone by then: Linux keeps an established one
/// for 120 s.
const FORGET_AFTER: Duration = Duration::from_secs(180);

/// How long another port is kept for a destination after something was last heard there.
const KEEP_UNHEARD: Duration = Duration::from_secs(300);

/// How often the usual port is tried beside another one that works. In between, the dead mapping can expire.
const CHECK_EVERY: Duration = Duration::from_secs(600);

/// The destinations that did not answer.
#[derive(Debug, Default)]
pub(crate) struct SourcePorts {
    silent: HashMap<SocketAddr, Silent>,
}

#[derive(Debug)]
struct Silent {
    dials: u32,
    last: Instant,
}

/// How long a dial must have waited for a first packet to count as silent, where it may take `longest` altogether.
pub(crate) fn silence(longest: Duration) -> Duration {
    SILENCE.min(longest / 2)
}

impl SourcePorts {
    /// Whether the next dial should leave by another port. While nothing answers, every second dial does: the destination may be
    /// down, and back any time.
    pub(crate) fn another(&self, to: SocketAddr, now: Instant) -> bool {
        let dials = self.silent.get(&to).filter(|silent| silent.is_remembered(now)).map_or(0, |silent| silent.dials);
        dials >= SILENT_DIALS && (dials - SILENT_DIALS).is_multiple_of(2)
    }

    /// Nothing was heard of a dial.
    pub(crate) fn silent(&mut self, to: SocketAddr, now: Instant) {
        self.silent.retain(|_, silent| silent.is_remembered(now));
        if self.silent.len() >= MAX_DESTINATIONS && !self.silent.contains_key(&to) {
            return;
        }
        let silent = self.silent.entry(to).or_insert(Silent { dials: 0, last: now });
        silent.dials = silent.dials.saturating_add(1);
        silent.last = now;
    }

    /// The destination answered.
    pub(crate) fn heard(&mut self, to: SocketAddr) {
        self.silent.remove(&to);
    }
}

impl Silent {
    fn is_remembered(&self, now: Instant) -> bool {
        now < self.last + FORGET_AFTER
    }
}

/// Another port that a destination answered at.
#[derive(Debug)]
pub(crate) struct Kept {
    /// What had been received there when it was last looked at.
    heard: u64,
    heard_at: Instant,
    /// When the usual port was last tried. `None`: a check is due.
    checked_at: Option<Instant>,
}

impl Kept {
    pub(crate) fn new(heard: u64, now: Instant) -> Self {
        Self { heard, heard_at: now, checked_at: None }
    }

    /// Whether it is still of use, now that so much was received there.
    pub(crate) fn is_used(&mut self, heard: u64, now: Instant) -> bool {
        if heard != self.heard {
            (self.heard, self.heard_at) = (heard, now);
        }
        now < self.heard_at + KEEP_UNHEARD
    }

    /// Whether the usual port should be tried now. That is then done.
    pub(crate) fn check(&mut self, now: Instant) -> bool {
        let due = self.checked_at.is_none();
        self.checked_at.get_or_insert(now);
        due
    }

    /// Whether the last such check was long ago. From then on one is due.
    pub(crate) fn make_due(&mut self, now: Instant) -> bool {
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

    #[test]
    fn after_two_silent_dials_every_second_one_leaves_by_another_port() {
        let mut ports = SourcePorts::default();
        let mut left = Vec::new();
        for n in 0..7 {
            left.push(ports.another(to(1), after(n)));
            assert!(!ports.another(to(2), after(n)), "only the silent destination moves");
            ports.silent(to(1), after(n));
        }
        assert_eq!(left, [false, false, true, false, true, false, true]);
    }

    #[test]
    fn an_answer_ends_it() {
        let mut ports = SourcePorts::default();
        for _ in 0..2 {
            ports.silent(to(1), after(0));
        }
        assert!(ports.another(to(1), after(0)));
        ports.heard(to(1));
        ports.silent(to(1), after(1));
        assert!(!ports.another(to(1), after(1)), "they must follow each other");
    }

    #[test]
    fn silence_is_forgotten_once_no_mapping_can_be_left() {
        let mut ports = SourcePorts::default();
        for _ in 0..2 {
            ports.silent(to(1), after(0));
        }
        let over = FORGET_AFTER.as_secs();
        assert!(ports.another(to(1), after(over - 1)));
        assert!(!ports.another(to(1), after(over)));
        ports.silent(to(1), after(over));
        assert!(!ports.another(to(1), after(over)), "counted from the start");
    }

    #[test]
    fn the_table_is_bounded_and_has_room_again_later() {
        let mut ports = SourcePorts::default();
        let filled = |ports: &mut SourcePorts, seconds| {
            for port in 1..=u16::try_from(MAX_DESTINATIONS).unwrap() + 1 {
                ports.silent(to(port), after(seconds));
                ports.silent(to(port), after(seconds));
            }
        };
        filled(&mut ports, 0);
        assert_eq!(ports.silent.len(), MAX_DESTINATIONS);
        let last = to(u16::try_from(MAX_DESTINATIONS).unwrap() + 1);
        assert!(!ports.another(last, after(0)));
        ports.silent(last, after(FORGET_AFTER.as_secs()));
        assert_eq!(ports.silent.len(), 1);
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
