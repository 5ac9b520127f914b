//! The tasks of an engine, its clock, and its end.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use macula_peer_core::sync::lock;
use tokio::runtime::{EnterGuard, Handle};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

pub(crate) struct Lifecycle {
    tasks: Mutex<JoinSet<()>>,
    runtime: Handle,
    stopping: watch::Sender<bool>,
    started: Instant,
}

impl Lifecycle {
    pub(crate) fn new(runtime: Handle) -> Self {
        Self { tasks: Mutex::default(), runtime, stopping: watch::Sender::new(false), started: Instant::now() }
    }

    /// Runs a task for as long as the engine runs.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime)
    }

    /// For a caller that is not on a thread of the runtime and opens sockets.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.runtime.enter()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// From now on the engine is stopping: tasks come to their end.
    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Waits for the end of every task.
    pub(crate) async fn ended(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        while tasks.join_next().await.is_some() {}
    }

    /// Milliseconds since the start: what fits an atomic.
    pub(crate) fn clock(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64
    }

    pub(crate) fn instant(&self, clock: u64) -> Instant {
        self.started + Duration::from_millis(clock)
    }
}
