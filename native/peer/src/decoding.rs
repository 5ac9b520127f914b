//! Where frames that are much work become terms: one at a time, and off the threads that move packets.
//!
//! What is little work is done where it arrives, and never waits for this.

use std::sync::Arc;

use macula_peer_wire::count_terms;
use tokio::task::spawn_blocking;

use crate::backlog::{Backlog, Sender};
use crate::turns::{Queue, Turn};

/// A payload of more terms is much work: it takes about a millisecond, in which a thread moves no packets. So is one of
/// more bytes.
pub(crate) const MANY_TERMS: usize = 10_000;
const MANY_BYTES: usize = 256 << 10;

/// Whether what to make of a payload is much work.
pub(crate) fn is_heavy(payload: &[u8]) -> bool {
    // Fewer bytes are fewer terms.
    payload.len() > MANY_TERMS && (payload.len() >= MANY_BYTES || count_terms(payload, MANY_TERMS) > MANY_TERMS)
}

/// The one place for such work.
#[derive(Debug)]
pub(crate) struct Decoding {
    turns: Arc<Queue<Sender>>,
    backlog: Arc<Backlog>,
}

impl Decoding {
    pub(crate) fn new(backlog: Arc<Backlog>) -> Arc<Self> {
        Arc::new(Self { turns: Queue::new(1), backlog })
    }

    /// Waits for a turn. Whoever waits reads nothing more meanwhile from where the frame came, so those who wait are as
    /// many as there are streams and callers.
    pub(crate) async fn turn(&self, sender: Sender) -> Option<Turn<Sender>> {
        self.turns.turn(sender).await
    }

    /// Does a sender's work when it has a turn. It goes on also if nobody waits for it any more. `None`: the engine is
    /// stopping, or the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        sender: Sender,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let turn = self.turn(sender).await?;
        let (done, turn) = spawn_blocking(move || (work(), turn)).await.ok()?;
        // What could not be finished here is still much work for those who do.
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

    fn sender(n: u8) -> Sender {
        Sender::Key([n; 32].into())
    }

    #[test]
    fn work_is_measured_in_terms_and_in_bytes() {
        let array = |n: u32, item: &[u8]| [&[0xDD][..], &n.to_be_bytes(), &item.repeat(n as usize)].concat();
        assert!(!is_heavy(&array(9_999, &[0x80])));
        assert!(is_heavy(&array(10_000, &[0x80])));
        let binary = |len: u32| [&[0xC6][..], &len.to_be_bytes(), &vec![0; len as usize]].concat();
        assert!(!is_heavy(&binary(200_000)));
        assert!(is_heavy(&binary(300_000)));
        assert!(!is_heavy(&[]));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_works_at_a_time_and_who_gives_up_holds_up_nobody() {
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
        // A turn that was given to somebody who was gone by then is not lost either.
        assert!(timeout(Duration::from_secs(10), decoding.turn(sender(4))).await.is_ok());
    }

    #[tokio::test]
    async fn what_waits_to_be_finished_is_waited_for() {
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
