//! Messages that need more work before the handler can have them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use macula_peer_core::heavy::MANY_TERMS;
use macula_peer_core::sync::lock;
use macula_peer_core::types::Sender;
use tokio::sync::Notify;

/// Payload bytes in the backlog from which on reading stops: for one sender, and for all together.
const SHARE: usize = 1 << 20;
const TOTAL: usize = 32 << 20;

/// The messages that were handed over but have not reached the handler yet, by sender. A handler that cannot take some
/// messages directly keeps the order by queueing the sender's later messages too while [`Backlog::holds`] says so. The
/// engine does not read on from a sender that has too much in here.
#[derive(Debug, Default)]
pub struct Backlog {
    /// Usually none, and then the lock is not taken.
    messages: AtomicUsize,
    held: Mutex<Held>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Held {
    bytes: usize,
    /// Messages that may be much work.
    heavy: usize,
    senders: HashMap<Sender, Share>,
}

#[derive(Debug, Default)]
struct Share {
    messages: usize,
    bytes: usize,
}

/// One message in the backlog, which it leaves when this is dropped.
#[derive(Debug)]
pub struct Ticket {
    backlog: Arc<Backlog>,
    sender: Sender,
    bytes: usize,
}

impl Backlog {
    /// Takes in a message with a payload of that many bytes.
    pub fn enter(self: &Arc<Self>, sender: Sender, bytes: usize) -> Ticket {
        let mut held = lock(&self.held);
        held.bytes += bytes;
        held.heavy += usize::from(bytes > MANY_TERMS);
        let share = held.senders.entry(sender).or_default();
        share.messages += 1;
        share.bytes += bytes;
        self.messages.fetch_add(1, Ordering::Relaxed);
        drop(held);
        Ticket { backlog: self.clone(), sender, bytes }
    }

    /// Whether an earlier message of this sender is in here.
    pub fn holds(&self, sender: Sender) -> bool {
        self.messages.load(Ordering::Relaxed) > 0 && lock(&self.held).senders.contains_key(&sender)
    }

    /// Whether no more should be read from this sender for now.
    pub(crate) fn is_full(&self, sender: Sender) -> bool {
        if self.messages.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let held = lock(&self.held);
        held.bytes >= TOTAL || held.senders.get(&sender).is_some_and(|share| share.bytes >= SHARE)
    }

    /// Waits until more may be read from this sender.
    pub(crate) async fn room(&self, sender: Sender) {
        self.until(|backlog| !backlog.is_full(sender)).await;
    }

    /// Waits until nothing in here is much work.
    pub(crate) async fn light(&self) {
        self.until(|backlog| backlog.messages.load(Ordering::Relaxed) == 0 || lock(&backlog.held).heavy == 0).await;
    }

    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        loop {
            let freed = self.freed.notified();
            if holds(self) {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut held = lock(&self.backlog.held);
        held.bytes -= self.bytes;
        held.heavy -= usize::from(self.bytes > MANY_TERMS);
        if let Some(share) = held.senders.get_mut(&self.sender) {
            share.messages -= 1;
            share.bytes -= self.bytes;
            if share.messages == 0 {
                held.senders.remove(&self.sender);
            }
        }
        self.backlog.messages.fetch_sub(1, Ordering::Relaxed);
        drop(held);
        self.backlog.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sender(n: u8) -> Sender {
        Sender::Key([n; 32].into())
    }

    #[test]
    fn a_sender_is_held_as_long_as_it_has_a_message_in_it() {
        let backlog = Arc::new(Backlog::default());
        let tickets = [backlog.enter(sender(1), 10), backlog.enter(sender(1), 0), backlog.enter(sender(2), 5)];
        let holds = |backlog: &Backlog| [1, 2, 3].map(|n| backlog.holds(sender(n)));
        assert_eq!(holds(&backlog), [true, true, false]);
        let [first, second, other] = tickets;
        drop(first);
        assert_eq!(holds(&backlog), [true, true, false]);
        drop(second);
        assert_eq!(holds(&backlog), [false, true, false]);
        drop(other);
        assert_eq!(holds(&backlog), [false; 3]);
        assert!(lock(&backlog.held).senders.is_empty());
        assert_eq!(lock(&backlog.held).bytes, 0);
    }

    #[test]
    fn one_sender_over_its_limit_delays_no_other() {
        let backlog = Arc::new(Backlog::default());
        let large = backlog.enter(sender(1), SHARE);
        assert!(backlog.is_full(sender(1)) && !backlog.is_full(sender(2)));
        let all: Vec<_> = (2..).map(|n| backlog.enter(sender(n), SHARE - 1)).take(TOTAL / SHARE).collect();
        assert!(backlog.is_full(sender(200)), "all of them together have too much");
        drop(all);
        assert!(backlog.is_full(sender(1)) && !backlog.is_full(sender(200)));
        drop(large);
        assert!(!backlog.is_full(sender(1)));
    }

    #[tokio::test]
    async fn a_sender_that_waits_goes_on_when_its_message_is_taken() {
        let backlog = Arc::new(Backlog::default());
        let large = backlog.enter(sender(1), SHARE);
        let waits = tokio::spawn({
            let backlog = backlog.clone();
            async move { backlog.room(sender(1)).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waits.is_finished());
        drop(large);
        assert!(tokio::time::timeout(Duration::from_secs(10), waits).await.is_ok());
    }
}
