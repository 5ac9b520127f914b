//! What a peer's messages take up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Default)]
pub(super) struct Counts {
    /// Bytes accepted and not acknowledged.
    held: AtomicUsize,
    /// Bytes of calls that wait.
    waiting: AtomicUsize,
    /// Requests that wait for their answer.
    asked: AtomicUsize,
}

/// A share of a count, which ends when this is dropped.
pub(super) struct Space {
    counts: Arc<Counts>,
    of: fn(&Counts) -> &AtomicUsize,
    amount: usize,
}

impl Counts {
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Holds bytes without a guard, for a link or a session: its acknowledgements let go of many messages at once. Returns
    /// whether nothing was held before.
    pub(super) fn hold(&self, bytes: usize) -> bool {
        self.held.fetch_add(bytes, Ordering::Relaxed) == 0
    }

    pub(super) fn let_go(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Space {
    pub(super) fn held(counts: &Arc<Counts>, bytes: usize) -> Self {
        Self::new(counts, |counts| &counts.held, bytes)
    }

    pub(super) fn waiting(counts: &Arc<Counts>, bytes: usize) -> Self {
        Self::new(counts, |counts| &counts.waiting, bytes)
    }

    pub(super) fn asked(counts: &Arc<Counts>) -> Self {
        Self::new(counts, |counts| &counts.asked, 1)
    }

    /// Of bytes that a link or a session held until now.
    pub(super) fn taken_back(counts: &Arc<Counts>, bytes: usize) -> Self {
        Self { counts: counts.clone(), of: |counts| &counts.held, amount: bytes }
    }

    /// A link or a session holds the bytes from now on.
    pub(super) fn hand_on(mut self) {
        self.amount = 0;
    }

    fn new(counts: &Arc<Counts>, of: fn(&Counts) -> &AtomicUsize, amount: usize) -> Self {
        of(counts).fetch_add(amount, Ordering::Relaxed);
        Self { counts: counts.clone(), of, amount }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        (self.of)(&self.counts).fetch_sub(self.amount, Ordering::Relaxed);
    }
}
