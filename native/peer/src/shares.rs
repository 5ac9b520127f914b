//! Shares that tasks have: each is given back when it is dropped.

use std::sync::{Arc, Mutex};

use crate::decide::shares::{Client, Counts, Exceeded, Limits};
use crate::link::lock;

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

    /// Gives the client so much, or nothing.
    pub(crate) fn take(&self, client: Client, amount: usize) -> Result<Held, Exceeded> {
        lock(&self.0).take(&client, amount)?;
        Ok(Held { counts: self.0.clone(), client, amount })
    }

    /// What all have together.
    pub(crate) fn total(&self) -> usize {
        lock(&self.0).total()
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
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let shares = Shares::new(Limits { total: 3, per_key: 2, per_address: 2 });
        let client = Client::new(None, [10, 0, 0, 1].into());
        let held = shares.take(client, 2).unwrap();
        assert_eq!(shares.take(client, 1).unwrap_err(), Exceeded::Address);
        assert_eq!(shares.total(), 2);
        drop(held);
        assert_eq!(shares.total(), 0);
        shares.take(client, 2).unwrap();
    }
}
