//! A caller that waits: answered exactly once, or not at all if it is gone.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use macula_peer_core::errors::{RequestError, SendError};

/// What a call is answered with when everything that could have answered it is gone.
pub(crate) trait Abandoned {
    fn abandoned() -> Self;
}

impl<T> Abandoned for Result<T, SendError> {
    fn abandoned() -> Self {
        Err(SendError::Stopped)
    }
}

impl<T> Abandoned for Result<T, RequestError> {
    fn abandoned() -> Self {
        Err(SendError::Stopped.into())
    }
}

type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// Returns the result to one waiting caller. The first answer goes out, later ones go nowhere; if it is dropped
/// unanswered, the caller learns that the engine stopped, so that neither a panic nor a shutdown leaves a caller
/// waiting.
pub(crate) struct Call<T: Abandoned> {
    reply: Mutex<Option<Reply<T>>>,
    ended: Notify,
}

impl<T: Abandoned> Call<T> {
    pub(crate) fn new(reply: impl FnOnce(T) + Send + 'static) -> Arc<Self> {
        Arc::new(Self { reply: Mutex::new(Some(Box::new(reply))), ended: Notify::new() })
    }

    pub(crate) fn answer(&self, answer: T) {
        if let Some(reply) = self.take() {
            reply(answer);
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.reply.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Returns once the caller has cancelled.
    pub(crate) async fn cancelled(&self) {
        self.ended.notified().await;
    }

    fn take(&self) -> Option<Reply<T>> {
        self.reply.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Something that its caller can cancel.
pub(crate) trait Cancel: Send + Sync {
    /// The caller has cancelled; nothing is answered from here on.
    fn cancel(&self);
}

impl<T: Abandoned> Cancel for Call<T> {
    fn cancel(&self) {
        drop(self.take());
        self.ended.notify_one();
    }
}

impl<T: Abandoned> Drop for Call<T> {
    fn drop(&mut self) {
        self.answer(T::abandoned());
    }
}
