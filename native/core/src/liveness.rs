//! Whether a peer that owes an acknowledgement has fallen silent, which makes its link suspect.
//!
//! A peer that was killed sends nothing on its old connection, so another link is looked for soon. A host that is short
//! of processor time, or sleeps now and then, is silent as well but still there. After such a false alarm the peer may
//! be as silent for a while, so that it costs one dial and not one a second.

use std::time::{Duration, Instant};

/// A look that comes later than this is late because this host is busy. What came meanwhile was not read, so the time
/// beyond does not count as the peer's silence. Short, so that a few looks suspect a dead peer however busy the host
/// is.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// The longest silence that is expected. A longer one is an outage, not a habit: it is not remembered, and another link
/// is looked for each time.
const LONGEST_EXPECTED: Duration = Duration::from_secs(3);

/// False alarms of the present and of the last period of this length are remembered.
const PERIOD: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Liveness {
    /// Datagrams received over the link when last looked, and when they last became more.
    heard: u64,
    heard_at: Instant,
    looked_at: Instant,
    /// Since when the link has been silent, as long as it is suspect.
    silent_since: Option<Instant>,
    /// The longest silence that was a false alarm, in this period and in the last one.
    false_alarms: [Duration; 2],
    period_began: Instant,
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The peer was heard since the last look.
    Heard,
    /// It has been silent for this long, which is longer than it may be.
    Silent(Duration),
    /// Neither.
    Nothing,
}

impl Liveness {
    pub fn new(now: Instant) -> Self {
        Self {
            heard: 0,
            heard_at: now,
            looked_at: now,
            silent_since: None,
            false_alarms: [Duration::ZERO; 2],
            period_began: now,
        }
    }

    /// There is another link. What is known of the peer's slowness stays.
    pub fn linked(&mut self, now: Instant) {
        (self.heard, self.heard_at, self.silent_since) = (0, now, None);
    }

    /// Looks at how many datagrams have come. `owed_since`: when the oldest message left that is not acknowledged.
    pub fn look(&mut self, heard: u64, owed_since: Option<Instant>, patience: Duration, now: Instant) -> Seen {
        let late = now.saturating_duration_since(self.looked_at).saturating_sub(LONGEST_PAUSE);
        self.heard_at = now.min(self.heard_at + late);
        self.looked_at = now;
        if heard != self.heard {
            (self.heard, self.heard_at) = (heard, now);
            if let Some(since) = self.silent_since.take() {
                self.false_alarm(now.saturating_duration_since(since), now);
            }
            return Seen::Heard;
        }
        let silence = owed_since.map(|owed| now.saturating_duration_since(owed.max(self.heard_at)));
        silence.filter(|silence| *silence >= patience).map_or(Seen::Nothing, Seen::Silent)
    }

    /// The link is suspect, after such a silence. What was heard up to now does not clear it.
    pub fn suspect(&mut self, heard: u64, silence: Duration, now: Instant) {
        self.heard = heard;
        self.silent_since = Some(now.checked_sub(silence).unwrap_or(now));
    }

    /// How long the peer may be silent because it was recently: zero, or more than that silence.
    pub fn expected_silence(&mut self, now: Instant) -> Duration {
        self.turn(now);
        let [present, last] = self.false_alarms;
        let longest = present.max(last);
        (longest + longest / 2).min(LONGEST_EXPECTED)
    }

    fn false_alarm(&mut self, silence: Duration, now: Instant) {
        self.turn(now);
        if silence < LONGEST_EXPECTED {
            self.false_alarms[0] = self.false_alarms[0].max(silence);
        }
    }

    fn turn(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.period_began);
        if age >= PERIOD {
            let last = if age < 2 * PERIOD { self.false_alarms[0] } else { Duration::ZERO };
            (self.false_alarms, self.period_began) = ([Duration::ZERO, last], now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(500);
    const LOOK_EVERY: u64 = 10;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A peer that is looked at every 10 ms, and always owes an acknowledgement, in virtual time.
    struct Run {
        start: Instant,
        now: u64,
        heard: u64,
        owed_since: u64,
        liveness: Liveness,
        suspect: bool,
        alarms: u32,
    }

    impl Run {
        fn new() -> Self {
            let start = Instant::now();
            let liveness = Liveness::new(start);
            Self { start, now: 0, heard: 0, owed_since: 0, liveness, suspect: false, alarms: 0 }
        }

        /// For this long the peer sends something before each look, or nothing. Returns how long it took to become
        /// suspect.
        fn pass(&mut self, time: u64, speaks: bool) -> Option<u64> {
            let begun = self.now;
            let mut suspect_after = None;
            while self.now < begun + time {
                self.now += LOOK_EVERY;
                if speaks {
                    self.heard += 1;
                    self.owed_since = self.now;
                }
                let now = self.start + ms(self.now);
                let patience = PATIENCE.max(self.liveness.expected_silence(now));
                match self.liveness.look(self.heard, Some(self.start + ms(self.owed_since)), patience, now) {
                    Seen::Heard => self.suspect = false,
                    Seen::Silent(silence) if !self.suspect => {
                        self.liveness.suspect(self.heard, silence, now);
                        (self.suspect, suspect_after) = (true, Some(self.now - begun));
                        self.alarms += 1;
                    }
                    Seen::Silent(_) | Seen::Nothing => {}
                }
            }
            suspect_after
        }
    }

    #[test]
    fn a_peer_that_is_stopped_most_of_the_time_is_suspected_a_few_times_and_not_each_time() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut run = Run::new();
            while run.now < 60_000 {
                run.pass(random.u64(550..1500), false);
                run.pass(random.u64(20..200), true);
            }
            assert!((1..=4).contains(&run.alarms), "SEED={seed}: {} times", run.alarms);
        }
    }

    #[test]
    fn a_peer_that_dies_is_suspected_at_once_or_after_half_as_long_again_as_it_was_silent_lately() {
        let mut run = Run::new();
        run.pass(10_000, true);
        assert_eq!(run.pass(1000, false), Some(500));
        for _ in 0..10 {
            run.pass(100, true);
            assert_eq!(run.pass(900, false), None);
        }
        run.pass(100, true);
        let took = run.pass(5000, false).map(|took| took.div_ceil(100) * 100);
        assert_eq!(took, Some(1600), "it was silent for a second and a look");
    }

    #[test]
    fn false_alarms_are_forgotten() {
        let mut run = Run::new();
        run.pass(900, false);
        run.pass(61_000, true);
        assert_eq!(run.pass(5000, false), Some(500));
    }

    #[test]
    fn an_outage_is_no_habit() {
        let mut run = Run::new();
        run.pass(20_000, false);
        run.pass(1000, true);
        assert_eq!(run.pass(5000, false), Some(500));
    }

    #[test]
    fn time_in_which_nobody_looked_is_not_the_peers_silence() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        assert_eq!(liveness.look(0, Some(start), PATIENCE, start + ms(2000)), Seen::Nothing);
        assert_eq!(liveness.look(0, Some(start), PATIENCE, start + ms(2100)), Seen::Nothing);
        assert_eq!(liveness.look(0, Some(start), PATIENCE, start + ms(2450)), Seen::Nothing);
        assert_eq!(liveness.look(0, Some(start), PATIENCE, start + ms(2550)), Seen::Nothing);
        let mut now = 2550;
        while liveness.look(0, Some(start), PATIENCE, start + ms(now)) == Seen::Nothing {
            now += 50;
            assert!(now < 4000, "suspected in the end");
        }
    }

    #[test]
    fn who_owes_nothing_is_not_silent() {
        let start = Instant::now();
        let mut liveness = Liveness::new(start);
        for s in 0..100 {
            assert_eq!(liveness.look(0, None, PATIENCE, start + ms(s * 90)), Seen::Nothing);
        }
    }
}
