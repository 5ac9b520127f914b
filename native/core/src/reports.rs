//! What is logged because no handler takes the event: once for each subject, and then rarely, with the number since.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Subjects that are remembered. What happens to others meanwhile is not logged.
const MAX_SUBJECTS: usize = 256;

/// How often one subject is logged.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub struct Reports<T> {
    logged: HashMap<T, Logged>,
}

#[derive(Debug)]
struct Logged {
    at: Instant,
    /// What happened and was not logged.
    since: u64,
}

impl<T> Default for Reports<T> {
    fn default() -> Self {
        Self { logged: HashMap::new() }
    }
}

impl<T: Eq + Hash> Reports<T> {
    /// It has happened `times` more times. Returns the number since it was last logged, if it should be logged now.
    pub fn happened(&mut self, subject: T, times: u64, now: Instant) -> Option<u64> {
        if let Some(logged) = self.logged.get_mut(&subject) {
            logged.since += times;
            if now < logged.at + AGAIN_AFTER {
                return None;
            }
            let times = logged.since;
            *logged = Logged { at: now, since: 0 };
            return Some(times);
        }
        if self.logged.len() >= MAX_SUBJECTS {
            self.logged.retain(|_, logged| now < logged.at + AGAIN_AFTER);
        }
        if self.logged.len() >= MAX_SUBJECTS {
            return None;
        }
        self.logged.insert(subject, Logged { at: now, since: 0 });
        Some(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subject_is_logged_once_and_then_rarely_with_a_count() {
        let (start, mut reports) = (Instant::now(), Reports::default());
        assert_eq!(reports.happened("a", 3, start), Some(3));
        assert_eq!(reports.happened("b", 1, start), Some(1));
        for _ in 0..9 {
            assert_eq!(reports.happened("a", 1, start + AGAIN_AFTER / 2), None);
        }
        assert_eq!(reports.happened("a", 1, start + AGAIN_AFTER), Some(10));
        assert_eq!(reports.happened("a", 1, start + AGAIN_AFTER), None);
    }

    #[test]
    fn subjects_are_bounded_and_forgotten() {
        let (start, mut reports) = (Instant::now(), Reports::default());
        for n in 0..MAX_SUBJECTS {
            assert_eq!(reports.happened(n, 1, start), Some(1));
        }
        assert_eq!(reports.happened(MAX_SUBJECTS, 1, start), None);
        assert_eq!(reports.happened(MAX_SUBJECTS, 1, start + AGAIN_AFTER), Some(1));
        assert_eq!(reports.logged.len(), 1);
    }
}
