//! Turns at work that would delay others if all of it were done at once.
//!
//! tokio runs tasks in the order in which they are woken, and each for as long as it does not wait. So one that has little to
//! do waits for all that those with much to do have ready. Here they work for a short time, and one after the other.

use std::hash::Hash;
use std::sync::{Arc, Mutex};

use macula_peer_core::sync::lock;
use macula_peer_core::turns::Turns;
use tokio::sync::oneshot;
use tokio::task::yield_now;

/// The tasks that wait for a turn.
#[derive(Debug)]
pub(crate) struct Queue<S: Copy + Eq + Hash>(Mutex<Turns<S, oneshot::Sender<Turn<S>>>>);

/// The permission to work, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<S: Copy + Eq + Hash>(Option<Arc<Queue<S>>>);

impl<S: Copy + Eq + Hash> Queue<S> {
    /// `most` work at a time.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Turns::new(most))))
    }

    /// Waits for a turn. `None` is not expected: a turn that is dropped is passed on.
    pub(crate) async fn turn(self: &Arc<Self>, sender: S) -> Option<Turn<S>> {
        let told = {
            let mut turns = lock(&self.0);
            if turns.begin() {
                return Some(Turn(Some(self.clone())));
            }
            let (tell, told) = oneshot::channel();
            turns.wait(sender, tell);
            told
        };
        told.await.ok()
    }

    /// Like [`Self::turn`], but lets all ready tasks go first, `times` times. The turn is held meanwhile, so of all
    /// waiting tasks only `most` are ready themselves.
    pub(crate) async fn late_turn(self: &Arc<Self>, sender: S, times: usize) -> Option<Turn<S>> {
        let turn = self.turn(sender).await;
        for _ in 0..times {
            yield_now().await;
        }
        turn
    }
}

impl<S: Copy + Eq + Hash> Drop for Turn<S> {
    fn drop(&mut self) {
        let Some(queue) = self.0.take() else { return };
        while let Some(next) = { lock(&queue.0).end() } {
            match next.send(Self(Some(queue.clone()))) {
                Ok(()) => return,
                // That task has given up. Its turn is dropped without passing it on again.
                Err(mut unwanted) => drop(unwanted.0.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    /// Work that is done while a message passes through this many tasks, beside others that always have more to do.
    async fn work_beside(tasks: usize, others: usize) -> usize {
        let (queue, work) = (Queue::new(1), Arc::new(AtomicUsize::new(0)));
        let mut busy = JoinSet::new();
        for sender in 0..others {
            let (queue, work) = (queue.clone(), work.clone());
            busy.spawn(async move {
                loop {
                    let turn = queue.late_turn(sender, 1).await;
                    work.fetch_add(1, Ordering::Relaxed);
                    drop(turn);
                }
            });
        }
        while work.load(Ordering::Relaxed) < 100 {
            yield_now().await;
        }
        let (first, mut last) = oneshot::channel();
        for _ in 0..tasks {
            let (tell, told) = oneshot::channel();
            tokio::spawn(async move {
                last.await.unwrap();
                tell.send(())
            });
            last = told;
        }
        let before = work.load(Ordering::Relaxed);
        first.send(()).unwrap();
        timeout(Duration::from_secs(10), last).await.unwrap().unwrap();
        work.load(Ordering::Relaxed) - before
    }

    #[tokio::test]
    async fn ready_work_waits_for_a_few_turns_however_many_are_busy() {
        for others in [1, 8, 100] {
            let work = work_beside(6, others).await;
            assert!(work <= 4, "{work} turns of {others}");
        }
    }
}
