//! Whose turn it is where only so many work at a time.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Those who wait, by sender: senders take turns, and of one sender the first to come is the first. So one that has much
/// to do holds up the others by one piece of work each.
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

    /// A turn is over. Returns who is next.
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
    fn one_works_at_a_time_and_senders_take_turns() {
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
    fn whoever_comes_waits_for_one_turn_of_each_other_sender() {
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
}
