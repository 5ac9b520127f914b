//! Waiting for a time that may not be set.

use std::time::Instant;

use tokio::time::sleep_until;

/// Waits until a time, if there is one.
pub(crate) async fn deadline(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
