//! Whether a running transfer still makes progress.
//!
//! A transfer takes as long as the path needs: 16 MiB at 400 kbit/s take more than five minutes. What counts is the
//! time spent waiting for the other side without enough progress. That also bounds how long a peer that sends a byte
//! now and then can hold memory here.

use std::time::Duration;

/// The bytes that must come within the time without growth. With the default of 30 s that is 550 bytes a second, so a
/// link of 400 kbit/s can carry ninety transfers at once. No more than a stream takes at once, or a single wait could
/// not yield it.
const STEP: usize = 16 << 10;

/// One running transfer.
#[derive(Debug, Default)]
pub struct Growth {
    /// Time spent waiting since it last grew by a step.
    waited: Duration,
    grown: usize,
}

impl Growth {
    /// A wait for the other side took `time` and yielded `bytes`.
    pub fn waited(&mut self, time: Duration, bytes: usize) {
        self.waited += time;
        self.grown += bytes;
        if self.grown >= STEP {
            *self = Self::default();
        }
    }

    /// How much longer to wait for the next bytes.
    pub fn left(&self, without_growth: Duration) -> Duration {
        without_growth.saturating_sub(self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    /// How long a transfer of `size` bytes goes on, and whether it is completed, where each of the pieces that `next`
    /// gives takes its time to come.
    fn transfer(size: usize, mut next: impl FnMut() -> (usize, Duration)) -> (Duration, bool) {
        let (mut growth, mut took, mut came) = (Growth::default(), Duration::ZERO, 0);
        while came < size {
            let (bytes, time) = next();
            if time > growth.left(TIMEOUT) {
                return (took + growth.left(TIMEOUT), false);
            }
            growth.waited(time, bytes);
            took += time;
            came += bytes;
        }
        (took, true)
    }

    #[test]
    fn a_slow_path_completes_any_frame_however_the_bytes_come() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            // From 2 KB a second on, in pieces as a stream gives them, with pauses of up to ten seconds.
            let rate = 2000 << random.u32(0..7);
            let (mut sent, mut paused) = (0.0, 0.0);
            let (took, completed) = transfer(2_000_000, || {
                let bytes = random.usize(1..=4096);
                sent += bytes as f64;
                let pause = if random.u8(0..100) == 0 { random.f64() * 10.0 } else { 0.0 };
                paused += pause;
                (bytes, Duration::from_secs_f64(bytes as f64 / f64::from(rate) + pause))
            });
            assert!(
                completed,
                "SEED={seed}: given up after {took:?}, {sent} bytes at {rate} a second, {paused} s paused"
            );
        }
    }

    #[test]
    fn a_sender_that_dribbles_is_given_up_whatever_its_pattern() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let rate = random.f64() * 500.0 + 1.0;
            let (took, completed) = transfer(2_000_000, || {
                let bytes = random.usize(1..=4096);
                (bytes, Duration::from_secs_f64(bytes as f64 / rate))
            });
            assert!(!completed && took <= 2 * TIMEOUT, "SEED={seed}: {took:?} at {rate} bytes a second");
        }
    }

    #[test]
    fn nothing_at_all_costs_the_timeout() {
        assert_eq!(transfer(1, || (1, Duration::MAX)), (TIMEOUT, false));
    }

    #[test]
    fn time_that_was_not_spent_waiting_does_not_count() {
        let mut growth = Growth::default();
        growth.waited(Duration::from_secs(29), 100);
        assert_eq!(growth.left(TIMEOUT), Duration::from_secs(1));
        // A minute later, in which no task read.
        assert_eq!(growth.left(TIMEOUT), Duration::from_secs(1));
        growth.waited(Duration::from_secs(1), STEP);
        assert_eq!(growth.left(TIMEOUT), TIMEOUT);
    }
}
