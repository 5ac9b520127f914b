//! Callers that wait: one tagged message each, and a monitor that cancels the call when the caller dies.

use std::sync::{Mutex, PoisonError};

use macula_peer::WaitingCall;
use rustler::env::SavedTerm;
use rustler::{Encoder, Env, LocalPid, Monitor, OwnedEnv, Resource, ResourceArc, Term};

use crate::atoms;
use crate::non_scheduler::anywhere;

/// Where one answer goes: `{Tag, Answer}` to the process that called.
pub(crate) struct Caller {
    pid: LocalPid,
    env: OwnedEnv,
    tag: SavedTerm,
}

impl Caller {
    #[expect(clippy::disallowed_methods, reason = "copies a reference")]
    pub(crate) fn new(env: Env<'_>, tag: Term<'_>) -> Self {
        let own = OwnedEnv::new();
        let tag = own.save(tag);
        Self { pid: env.pid(), env: own, tag }
    }

    pub(crate) fn pid(&self) -> LocalPid {
        self.pid
    }

    /// Sends the answer that `answer` builds. This may run on a scheduler: while the call is being made, or the engine
    /// stops.
    pub(crate) fn answer(self, answer: impl for<'a> FnOnce(Env<'a>) -> Term<'a> + Send + 'static) {
        anywhere(move |here| {
            let Self { pid, env, tag } = self;
            // The caller may be dead.
            let _ = here.send_from(env, &pid, |env| (tag.load(env), answer(env)).encode(env));
        });
    }
}

/// A caller that asks for what the engine can tell at once. If this is dropped unanswered, the caller learns that there
/// is no engine.
pub(crate) struct Query(Option<Caller>);

impl Query {
    pub(crate) fn new(caller: Caller) -> Self {
        Self(Some(caller))
    }

    pub(crate) fn answer(mut self, answer: impl for<'a> FnOnce(Env<'a>) -> Term<'a> + Send + 'static) {
        if let Some(caller) = self.0.take() {
            caller.answer(answer);
        }
    }
}

impl Drop for Query {
    fn drop(&mut self) {
        if let Some(caller) = self.0.take() {
            caller.answer(|env| atoms::not_started().encode(env));
        }
    }
}

/// A call in progress, as long as it is: monitors its caller.
pub(crate) struct InProgress(Mutex<State>);

enum State {
    Calling,
    Waiting(WaitingCall),
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
        #[expect(clippy::disallowed_methods, reason = "the caller is in a NIF")]
        let _ = env.monitor(&call, pid);
        call
    }

    /// The call is queued.
    pub(crate) fn waiting(&self, waiting: WaitingCall) {
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
