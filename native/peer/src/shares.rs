//! Shares that tasks have: each is given back when it is dropped.

use std::sync::{Arc, Mutex};

use macula_peer_core::shares::{Client, Counts, Exceeded, Limits};
use macula_peer_core::sync::lock;

/// What clients may have at the same time, of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Shares(Arc<Mutex<Counts>>);

/// What one client has, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    counts: Arc<Mutex<Counts>>,
    client: Client,
    amount: usize,
}

impl Shares {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Arc::new(Mutex::new(Counts::new(limits))))
    }

    /// Gives the client that amount, or nothing.
    pub(crate) fn take(&self, client: Client, amount: usize) -> Result<Held, Exceeded> {
        lock(&self.0).take(&client, amount)?;
        Ok(Held { counts: self.0.clone(), client, amount })
    }
}

/// Answers that their requesters have not made room for yet: an requester that reads nothing has a share of the memory.
#[derive(Debug, Clone)]
pub(crate) struct Unread {
    shares: Shares,
    per_key: usize,
}

impl Unread {
    /// What all requesters have together, as a multiple of what one key has.
    const KEYS: usize = 8;

    /// What one key has at the least.
    const LEAST: usize = 64 << 20;

    /// What an answer with a task of its own counts as at the least: of the shortest ones 256 wait for one key.
    const COST: usize = 256 << 10;

    /// What an answer in a queue counts as at the least.
    const COST_QUEUED: usize = 1 << 10;

    pub(crate) fn new(longest: usize) -> Self {
        let per_key = longest.max(Self::LEAST);
        let total = per_key.saturating_mul(Self::KEYS);
        Self { shares: Shares::new(Limits { total, per_key, per_address: total / 2 }), per_key }
    }

    /// Room for that many bytes, as long as it is held. `None`: the requester, or all together, have too many.
    pub(crate) fn begin(&self, requester: Client, bytes: usize) -> Option<Held> {
        self.hold(requester, bytes.max(Self::COST))
    }

    /// The same for an answer that waits in a queue, behind others.
    pub(crate) fn queue(&self, requester: Client, bytes: usize) -> Option<Held> {
        self.hold(requester, bytes.max(Self::COST_QUEUED))
    }

    fn hold(&self, requester: Client, bytes: usize) -> Option<Held> {
        self.shares.take(requester, bytes.min(self.per_key)).ok()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.counts).give_back(&self.client, self.amount);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use macula_peer_core::types::Fingerprint;

    use super::*;

    #[test]
    fn dropping_a_share_returns_it() {
        let shares = Shares::new(Limits { total: 3, per_key: 2, per_address: 2 });
        let client = Client::new(None, [10, 0, 0, 1].into());
        let held = shares.take(client, 2).unwrap();
        assert_eq!(shares.take(client, 1).unwrap_err(), Exceeded::Address);
        drop(held);
        shares.take(client, 2).unwrap();
    }

    #[test]
    fn a_requester_that_reads_nothing_leaves_room_for_the_answers_of_others() {
        let unread = Unread::new(1 << 10);
        let ask = |key: u8, host: u8, bytes| {
            let requester = Client::new(Fingerprint::from([key; 32]), [10, 0, 0, host].into());
            std::iter::from_fn(|| unread.begin(requester, bytes)).take(10_000).collect::<Vec<_>>()
        };
        let short = ask(1, 1, 100);
        assert_eq!((short.len(), ask(1, 2, 100).len()), (256, 0), "the same key elsewhere");
        let many: Vec<_> = (2..10).map(|key| ask(key, 1, 100)).collect();
        assert_eq!(many.iter().map(Vec::len).sum::<usize>(), 3 * 256, "half of all for one address");
        assert_eq!(ask(20, 2, usize::MAX).len(), 1, "a long one");
        let others: Vec<_> = (30..80).map(|n| ask(n, n, 100)).collect();
        assert_eq!(others.iter().map(Vec::len).sum::<usize>(), 4 * 256, "what is left of all");
        drop((short, others));
        assert_eq!(ask(1, 1, 100).len(), 256);
    }
}
