//! Turns, for work that only a few may do at a time.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How long a task works before it waits for a turn, which lasts about as long.
pub const QUANTUM: Duration = Duration::from_micros(100);

/// A piece of work of a task, from when it began.
#[derive(Debug, Clone, Copy)]
pub struct Piece(Instant);

impl Piece {
    pub fn begin(now: Instant) -> Self {
        Self(now)
    }

    /// Whether it has taken as long as a piece may.
    pub fn is_over(self, now: Instant) -> bool {
        now.saturating_duration_since(self.0) >= QUANTUM
    }
}

/// How long a task has worked since others last went first. tokio runs a task until it waits, so one that always has
/// work must wait for a turn explicitly.
#[derive(Debug, Default)]
pub struct Spent(Duration);

impl Spent {
    /// A piece of work is done.
    pub fn add(&mut self, piece: Piece, now: Instant) {
        self.0 += now.saturating_duration_since(piece.0);
    }

    /// Others go first now.
    pub fn reset(&mut self) {
        self.0 = Duration::ZERO;
    }

    /// Whether others must go first now. If so, it counts as done.
    pub fn is_up(&mut self) -> bool {
        let is_up = self.0 >= QUANTUM;
        if is_up {
            self.reset();
        }
        is_up
    }
}

/// The waiting tasks, by sender: senders take turns, and the tasks of one sender go in order. So a sender with much
/// work delays the others by one piece of it each.
#[derive(Debug)]
pub struct Turns<S, W> {
    /// How many may work at a time.
    most: usize,
    working: usize,
    /// Senders that wait, in the order of their turns.
    senders: VecDeque<S>,
    waiting: HashMap<S, VecDeque<W>>,
}

impl<S: Copy + Eq + Hash, W> Turns<S, W> {
    pub fn new(most: usize) -> Self {
        Self { most, working: 0, senders: VecDeque::new(), waiting: HashMap::new() }
    }

    /// Begins at once, if fewer work than may.
    pub fn begin(&mut self) -> bool {
        let begins = self.working < self.most;
        self.working += usize::from(begins);
        begins
    }

    /// Waits for a turn.
    pub fn wait(&mut self, sender: S, waiter: W) {
        let of_sender = self.waiting.entry(sender).or_default();
        if of_sender.is_empty() {
            self.senders.push_back(sender);
        }
        of_sender.push_back(waiter);
    }

    /// A turn is over. Returns the next.
    pub fn end(&mut self) -> Option<W> {
        let next = self.next();
        if next.is_none() {
            self.working = self.working.saturating_sub(1);
        }
        next
    }

    fn next(&mut self) -> Option<W> {
        let sender = self.senders.pop_front()?;
        let of_sender = self.waiting.get_mut(&sender)?;
        let next = of_sender.pop_front();
        if of_sender.is_empty() {
            self.waiting.remove(&sender);
        } else {
            self.senders.push_back(sender);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_job_runs_at_a_time_and_senders_take_turns() {
        let mut turns = Turns::new(1);
        assert!(turns.begin());
        assert!(!turns.begin());
        for waiter in ["a1", "a2", "a3", "b1", "c1", "c2"] {
            turns.wait(waiter.as_bytes()[0], waiter);
        }
        let order: Vec<_> = std::iter::from_fn(|| turns.end()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "c2", "a3"]);
        assert!(turns.begin() && turns.waiting.is_empty() && turns.senders.is_empty());
        assert_eq!(turns.end(), None);
        assert!(turns.begin());
    }

    #[test]
    fn as_many_work_at_a_time_as_may() {
        let mut turns = Turns::new(2);
        assert!(turns.begin() && turns.begin() && !turns.begin());
        turns.wait(1, "a");
        assert_eq!((turns.end(), turns.begin()), (Some("a"), false), "its place is taken over");
        assert_eq!((turns.end(), turns.begin(), turns.begin()), (None, true, false));
        assert_eq!((turns.end(), turns.end()), (None, None));
        assert!(turns.begin() && turns.begin() && !turns.begin());
    }

    #[test]
    fn a_new_sender_waits_for_one_turn_of_each_other_sender() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut turns, mut due) = (Turns::new(1), Vec::new());
            assert!(turns.begin());
            for n in 0..300 {
                if random.bool() {
                    // One sender asks for nine turns of ten.
                    let sender = if random.u8(0..10) == 0 { random.u8(1..5) } else { 0 };
                    turns.wait(sender, (sender, n));
                    due.push((sender, n));
                } else if let Some((sender, n)) = turns.end() {
                    let first = due.iter().position(|&(other, _)| other == sender).unwrap();
                    assert_eq!(due.remove(first), (sender, n), "SEED={seed}: of one sender the first is the first");
                } else {
                    assert!(due.is_empty() && turns.begin(), "SEED={seed}");
                }
            }
            turns.wait(9, (9, 1000));
            let before = std::iter::from_fn(|| turns.end()).take_while(|&(sender, _)| sender != 9).count();
            assert!(before <= 5, "SEED={seed}: {before} turns of {} waiting", due.len());
        }
    }

    /// Tasks that always have work, in pieces of up to 90 µs, on one thread, and one that needs it now and then: it waits for
    /// less than a quantum and a piece of each of the tasks that may work at a time.
    #[test]
    fn a_task_with_little_to_do_waits_for_less_than_two_quanta_of_each_that_works() {
        let piece = |random: &mut fastrand::Rng| Duration::from_micros(random.u64(1..90));
        for seed in 0..50 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (most, others) = (random.usize(1..4), random.usize(4..20));
            let mut turns = Turns::new(most);
            // The tasks that have a turn, and how long they have worked in it.
            let mut ready: VecDeque<(usize, Spent)> = VecDeque::new();
            for other in 0..others {
                match turns.begin() {
                    true => ready.push_back((other, Spent::default())),
                    false => turns.wait(other, other),
                }
            }
            let start = Instant::now();
            let mut now = start;
            let mut longest = Duration::ZERO;
            for _ in 0..500 {
                // The light task is woken here, after those that are ready.
                let woken = now;
                for _ in 0..ready.len() {
                    let Some((other, mut spent)) = ready.pop_front() else { break };
                    let worked_from = now;
                    while !spent.is_up() {
                        let begun = Piece::begin(now);
                        now += piece(&mut random);
                        spent.add(begun, now);
                    }
                    assert!(now - worked_from < QUANTUM + Duration::from_micros(90), "SEED={seed}");
                    // It gives its turn back and waits for another one.
                    turns.wait(other, other);
                    ready.extend(turns.end().map(|next| (next, Spent::default())));
                }
                longest = longest.max(now - woken);
                now += Duration::from_micros(1);
            }
            assert_eq!(ready.len(), most, "SEED={seed}");
            assert!(longest < 2 * QUANTUM * most as u32, "SEED={seed}: {longest:?} with {most} at a time");
        }
    }

    #[test]
    fn a_piece_is_over_after_a_quantum() {
        let now = Instant::now();
        let piece = Piece::begin(now);
        assert!(!piece.is_over(now + QUANTUM / 2) && piece.is_over(now + QUANTUM));
        let mut spent = Spent::default();
        spent.add(piece, now + QUANTUM / 2);
        assert!(!spent.is_up());
        spent.add(piece, now + QUANTUM / 2);
        assert!(spent.is_up() && !spent.is_up(), "it begins from zero again");
        spent.add(piece, now + QUANTUM);
        spent.reset();
        assert!(!spent.is_up());
    }
}
