//! A socket that fails again and again: it must neither burn a core nor end the node.

use std::time::{Duration, Instant};

/// Up to this many errors in a row are read without a pause: ICMP errors about sent packets come in such bursts.
const AT_ONCE: u32 = 32;

/// Then there are pauses, which double.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A socket that has done nothing but fail for so long is replaced.
const BROKEN_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultVerdict {
    /// Try again.
    Again,
    /// Try again after a pause.
    Pause(Duration),
    /// The same, and a new socket is needed.
    Broken(Duration),
}

/// The errors since something last worked.
#[derive(Debug, Default)]
pub struct Faults {
    in_a_row: u32,
    since: Option<Instant>,
    pause: Duration,
}

impl Faults {
    pub fn failed(&mut self, now: Instant) -> FaultVerdict {
        self.in_a_row = self.in_a_row.saturating_add(1);
        let since = *self.since.get_or_insert(now);
        if self.in_a_row <= AT_ONCE {
            return FaultVerdict::Again;
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        match now >= since + BROKEN_AFTER {
            true => FaultVerdict::Broken(self.pause),
            false => FaultVerdict::Pause(self.pause),
        }
    }

    /// Whether this is the first pause since something worked.
    pub fn is_news(&self) -> bool {
        self.in_a_row == AT_ONCE + 1
    }

    pub fn worked(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lasting_error_costs_little_and_is_noticed() {
        let start = Instant::now();
        let (mut faults, mut now, mut tries, mut news) = (Faults::default(), start, 0, 0);
        loop {
            tries += 1;
            let verdict = faults.failed(now);
            news += usize::from(faults.is_news());
            match verdict {
                FaultVerdict::Again => {}
                FaultVerdict::Pause(pause) => now += pause,
                FaultVerdict::Broken(pause) => {
                    assert!(pause <= LONGEST_PAUSE);
                    break;
                }
            }
        }
        assert!(now < start + BROKEN_AFTER + LONGEST_PAUSE);
        assert!(tries < 50, "{tries}");
        assert_eq!(news, 1);
    }

    #[test]
    fn single_errors_are_ignored() {
        let now = Instant::now();
        let mut faults = Faults::default();
        for n in 0..10_000 {
            if n % AT_ONCE == 0 {
                faults.worked();
            }
            assert_eq!(faults.failed(now + BROKEN_AFTER * n), FaultVerdict::Again);
        }
    }
}
