//! When to dial again.

use std::time::Duration;

/// A pause that doubles from `first` to `longest`, each drawn between half and the whole of it, so that many nodes that
/// lost the same peer do not come back in step.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, first, longest }
    }

    /// The next pause; `draw` is uniform in 0..1.
    pub(crate) fn pause(&mut self, draw: f64) -> Duration {
        let pause = self.next.mul_f64(0.5 + draw / 2.0);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        assert_eq!([0; 4].map(|_| backoff.pause(1.0)), [ms(100), ms(200), ms(350), ms(350)]);
        assert_eq!(backoff.pause(0.0), ms(175));
        backoff.reset();
        assert_eq!(backoff.pause(0.0), ms(50));
    }
}
