//! Callers that wait: one tagged message each, and a monitor that cancels the call when the caller dies.

use std::sync::{Mutex, PoisonError};

use macula_peer::Waiting;
use rustler::env::SavedTerm;
use rustler::{Encoder, Env, LocalPid, Monitor, OwnedEnv, Resource, ResourceArc, Term};

/// The name of the runtime's threads. Messages may be sent from them, but not in the same way from a scheduler.
const RUNTIME_THREAD: &str = "macula_peer";

/// Whether this is a thread of the runtime, and no scheduler.
pub(crate) fn on_runtime_thread() -> bool {
    std::thread::current().name() == Some(RUNTIME_THREAD)
}

/// Where one answer goes: `{Tag, Answer}` to the process that called.
pub(crate) struct Caller {
    pid: LocalPid,
    env: OwnedEnv,
    tag: SavedTerm,
}

impl Caller {
    pub(crate) fn new(env: Env<'_>, tag: Term<'_>) -> Self {
        let own = OwnedEnv::new();
        let tag = own.save(tag);
        Self { pid: env.pid(), env: own, tag }
    }

    pub(crate) fn pid(&self) -> LocalPid {
        self.pid
    }

    /// Sends the answer that `answer` builds.
    pub(crate) fn answer(self, answer: impl for<'a> FnOnce(Env<'a>) -> Term<'a> + Send + 'static) {
        if on_runtime_thread() {
            return self.send(answer);
        }
        // Answered while the call was being made, or while the engine stops: this may be a scheduler.
        std::thread::spawn(move || self.send(answer));
    }

    fn send(mut self, answer: impl for<'a> FnOnce(Env<'a>) -> Term<'a>) {
        let tag = self.tag;
        // The caller may be dead: nobody is left to tell.
        let _ = self.env.send_and_clear(&self.pid, |env| (tag.load(env), answer(env)).encode(env));
    }
}

/// A call in progress, as long as it is: monitors its caller.
pub(crate) struct InProgress(Mutex<State>);

enum State {
    Calling,
    Waiting(Waiting),
    CallerDied,
}

#[rustler::resource_impl]
impl Resource for InProgress {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _: Env<'a>, _: LocalPid, _: Monitor) {
        let state = std::mem::replace(&mut *self.lock(), State::CallerDied);
        if let State::Waiting(waiting) = state {
            waiting.cancel();
        }
    }
}

impl InProgress {
    /// Monitors the caller. The monitor ends when the last reference to the result does.
    pub(crate) fn monitor(env: Env<'_>, pid: &LocalPid) -> ResourceArc<Self> {
        let call = ResourceArc::new(Self(Mutex::new(State::Calling)));
        // The caller is running this very function, so it is alive.
        let _ = env.monitor(&call, pid);
        call
    }

    /// The call is queued.
    pub(crate) fn waiting(&self, waiting: Waiting) {
        let mut state = self.lock();
        match *state {
            State::CallerDied => waiting.cancel(),
            _ => *state = State::Waiting(waiting),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
