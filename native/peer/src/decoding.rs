//! Where frames that are much work become terms: one at a time, and off the threads that move packets.
//!
//! What is little work is done where it arrives, and never waits for this.

use std::sync::Arc;

use macula_peer_core::types::Sender;
use tokio::task::spawn_blocking;

use crate::backlog::Backlog;
use crate::turns::{Queue, Turn};

/// Only one frame is decoded at a time.
#[derive(Debug)]
pub(crate) struct Decoding {
    turns: Arc<Queue<Sender>>,
    backlog: Arc<Backlog>,
}

impl Decoding {
    pub(crate) fn new(backlog: Arc<Backlog>) -> Arc<Self> {
        Arc::new(Self { turns: Queue::new(1), backlog })
    }

    /// Waits for a turn. A waiting task does not read on from the stream of its frame, so there are at most as many
    /// waiting tasks as streams and callers.
    pub(crate) async fn turn(&self, sender: Sender) -> Option<Turn<Sender>> {
        self.turns.turn(sender).await
    }

    /// Does a sender's work when it has a turn. The work goes on even if its caller has given up. `None`: the engine is
    /// stopping, or the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        sender: Sender,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let turn = self.turn(sender).await?;
        let (done, turn) = spawn_blocking(move || (work(), turn)).await.ok()?;
        // A frame that could not be finished here is still much work for the process that finishes it.
        self.backlog.light().await;
        drop(turn);
        Some(done)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use macula_peer_core::heavy::MANY_TERMS;

    fn sender(n: u8) -> Sender {
        Sender::Key([n; 32].into())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_job_runs_at_a_time_and_a_cancelled_one_delays_no_other() {
        let decoding = Decoding::new(Arc::default());
        let first = decoding.turn(sender(1)).await.unwrap();
        let wait = |n| {
            let decoding = decoding.clone();
            tokio::spawn(async move { decoding.run(sender(n), move || n).await })
        };
        let waiting = [1, 1, 2, 3].map(wait);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(waiting.iter().all(|task| !task.is_finished()));
        waiting[2].abort();
        drop(first);
        let mut done = Vec::new();
        for task in waiting {
            done.extend(timeout(Duration::from_secs(10), task).await.unwrap().ok().flatten());
        }
        assert_eq!(done, [1, 1, 3]);
        // A turn that was given to a task that was gone by then is not lost either.
        assert!(timeout(Duration::from_secs(10), decoding.turn(sender(4))).await.is_ok());
    }

    #[tokio::test]
    async fn unfinished_frames_are_waited_for() {
        let backlog = Arc::new(Backlog::default());
        let decoding = Decoding::new(backlog.clone());
        let (small, large) = (backlog.enter(sender(1), 100), backlog.enter(sender(1), MANY_TERMS + 1));
        let next = tokio::spawn({
            let decoding = decoding.clone();
            async move { decoding.run(sender(1), || ()).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!next.is_finished());
        drop(large);
        assert_eq!(timeout(Duration::from_secs(10), next).await.unwrap().unwrap(), Some(()));
        drop(small);
    }
}
