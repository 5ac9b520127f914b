//! Which host names are looked up, and which wait.
//!
//! The system's resolver blocks a thread for each name, for ten seconds or more if a DNS server is dead, and cannot be
//! interrupted. So one lookup of a name serves all callers that ask meanwhile, a failure holds for a moment, and names
//! that hung the last time share a few of the threads. That leaves the rest to others, and some threads to names that
//! are known to resolve.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// A lookup that failed after as long as this hung: an answer, even a negative one, takes milliseconds.
const SLOW: Duration = Duration::from_secs(2);

/// How long a failure holds. One that cost a thread for long holds for longer.
const FAILED_FOR: Duration = Duration::from_secs(1);
const HUNG_FOR: Duration = Duration::from_secs(5);

/// How long the outcome of a lookup is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);

/// Names that are remembered, waiting or looked up. Lookups of others fail while all of these are in use.
const MAX_NAMES: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameStatus {
    /// To be looked up now.
    Start,
    /// Its turn comes later.
    Wait,
    /// It is being looked up, or is already waiting.
    Join,
    /// It has just failed, or there are too many.
    Failed,
}

/// How the last lookup went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Good,
    Unknown,
    Hung,
}

#[derive(Debug)]
struct Name {
    class: Class,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Waiting,
    Running { since: Instant },
    Over { at: Instant, failed: bool },
}

#[derive(Debug)]
pub struct Names {
    /// How many lookups may run at once.
    limit: usize,
    running: usize,
    /// How many of these hung the last time.
    hung: usize,
    names: HashMap<Box<str>, Name>,
    /// By class. One that has left the table, or waits no more, is passed over.
    waiting: [VecDeque<Box<str>>; 3],
}

impl Names {
    pub fn new(limit: usize) -> Self {
        Self { limit, running: 0, hung: 0, names: HashMap::new(), waiting: Default::default() }
    }

    pub fn ask(&mut self, name: &str, now: Instant) -> NameStatus {
        let class = match self.names.get(name) {
            Some(Name { stage: Stage::Waiting | Stage::Running { .. }, .. }) => return NameStatus::Join,
            Some(Name { stage: Stage::Over { at, failed: true }, class }) if now < *at + lasts(*class) => {
                return NameStatus::Failed;
            }
            Some(Name { stage: Stage::Over { at, .. }, class }) if now < *at + REMEMBERED => *class,
            _ => Class::Unknown,
        };
        if !self.names.contains_key(name) && !self.make_room(now) {
            return NameStatus::Failed;
        }
        let starts = self.may_run(class);
        let stage = if starts { self.start(class, now) } else { Stage::Waiting };
        if !starts {
            self.waiting[class as usize].push_back(name.into());
        }
        self.names.insert(name.into(), Name { class, stage });
        if starts { NameStatus::Start } else { NameStatus::Wait }
    }

    /// A lookup is over.
    pub fn done(&mut self, name: &str, found: bool, now: Instant) {
        let Some(Name { class, stage }) = self.names.get_mut(name) else { return };
        let Stage::Running { since } = *stage else { return };
        self.running -= 1;
        self.hung -= usize::from(*class == Class::Hung);
        *class = match found {
            true => Class::Good,
            false if now >= since + SLOW => Class::Hung,
            // One that has resolved before is not known to hang.
            false if *class == Class::Good => Class::Good,
            false => Class::Unknown,
        };
        *stage = Stage::Over { at: now, failed: !found };
    }

    /// The next name to look up, if one may start. Names that are not `wanted` any more are forgotten.
    pub fn next(&mut self, now: Instant, wanted: impl Fn(&str) -> bool) -> Option<Box<str>> {
        for class in [Class::Good, Class::Unknown, Class::Hung] {
            while self.may_run(class) {
                let Some(name) = self.waiting[class as usize].pop_front() else { break };
                if wanted(&name) {
                    let stage = self.start(class, now);
                    self.names.insert(name.clone(), Name { class, stage });
                    return Some(name);
                }
                self.names.remove(&name);
            }
        }
        None
    }

    fn may_run(&self, class: Class) -> bool {
        match class {
            Class::Good => self.running < self.limit,
            Class::Unknown => self.running < self.limit - self.limit / 4,
            Class::Hung => self.hung < self.limit / 4 && self.running < self.limit - self.limit / 4,
        }
    }

    fn start(&mut self, class: Class, now: Instant) -> Stage {
        self.running += 1;
        self.hung += usize::from(class == Class::Hung);
        Stage::Running { since: now }
    }

    fn make_room(&mut self, now: Instant) -> bool {
        if self.names.len() >= MAX_NAMES {
            self.names.retain(|_, name| match name.stage {
                Stage::Over { at, .. } => now < at + HUNG_FOR,
                Stage::Waiting | Stage::Running { .. } => true,
            });
        }
        self.names.len() < MAX_NAMES
    }
}

fn lasts(class: Class) -> Duration {
    if class == Class::Hung { HUNG_FOR } else { FAILED_FOR }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 16;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn bad(n: usize) -> String {
        format!("bad{n}")
    }

    /// Every name that may be looked up now.
    fn started(names: &mut Names, now: Instant) -> Vec<Box<str>> {
        std::iter::from_fn(|| names.next(now, |_| true)).collect()
    }

    #[test]
    fn a_name_is_looked_up_once_for_all_callers() {
        let now = Instant::now();
        let mut names = Names::new(LIMIT);
        assert_eq!([0; 3].map(|_| names.ask("a", now)), [NameStatus::Start, NameStatus::Join, NameStatus::Join]);
        names.done("a", true, now + ms(1));
        assert_eq!(names.ask("a", now + ms(1)), NameStatus::Start, "an answer is not kept");
    }

    #[test]
    fn a_failure_holds_for_a_moment_and_longer_if_it_took_long() {
        for (took, holds) in [(ms(10), FAILED_FOR), (ms(10_000), HUNG_FOR)] {
            let start = Instant::now();
            let mut names = Names::new(LIMIT);
            names.ask("a", start);
            let end = start + took;
            names.done("a", false, end);
            assert_eq!(names.ask("a", end + holds - ms(1)), NameStatus::Failed);
            assert_eq!(names.ask("a", end + holds), NameStatus::Start);
        }
    }

    #[test]
    fn names_that_hang_leave_threads_to_others() {
        let start = Instant::now();
        let mut names = Names::new(LIMIT);
        names.ask("good", start);
        names.done("good", true, start);
        let asked: Vec<_> = (0..100).map(|n| names.ask(&bad(n), start)).collect();
        assert_eq!(asked.iter().filter(|ask| **ask == NameStatus::Start).count(), LIMIT - LIMIT / 4);
        assert_eq!(names.ask("good", start), NameStatus::Start, "is known to resolve");
        // All lookups hang, and are requested again and again.
        let mut now = start;
        for _ in 0..20 {
            now += ms(10_000);
            (0..100).for_each(|n| names.done(&bad(n), false, now));
            started(&mut names, now);
        }
        now += HUNG_FOR;
        (0..100).for_each(|n| names.done(&bad(n), false, now));
        now += HUNG_FOR;
        let asked: Vec<_> = (0..100).map(|n| names.ask(&bad(n), now)).collect();
        assert_eq!(asked.iter().filter(|ask| **ask == NameStatus::Start).count(), LIMIT / 4);
        assert_eq!(names.ask("new", now), NameStatus::Start);
    }

    #[test]
    fn a_waiting_lookup_has_its_turn_unless_it_is_cancelled() {
        let now = Instant::now();
        let mut names = Names::new(4);
        assert_eq!(
            [1, 2, 3, 4, 5].map(|n| names.ask(&bad(n), now)).map(|ask| ask == NameStatus::Start),
            [true, true, true, false, false]
        );
        assert!(started(&mut names, now).is_empty());
        names.done(&bad(1), true, now);
        assert_eq!(names.next(now, |name| name != bad(4)).as_deref(), Some(&*bad(5)));
        assert_eq!(names.ask(&bad(4), now), NameStatus::Wait);
        names.done(&bad(2), true, now);
        assert_eq!(started(&mut names, now), [bad(4).into_boxed_str()]);
        assert_eq!(names.running, 3);
    }

    #[test]
    fn the_number_of_remembered_names_is_bounded() {
        let now = Instant::now();
        let mut names = Names::new(LIMIT);
        (0..2 * MAX_NAMES).for_each(|n| {
            names.ask(&bad(n), now);
        });
        assert_eq!(names.names.len(), MAX_NAMES);
        assert_eq!(names.ask("one more", now), NameStatus::Failed);
        names.done(&bad(0), false, now);
        assert_eq!(names.ask("one more", now + HUNG_FOR), NameStatus::Start);
    }
}
