//! What non-scheduler threads may do: those of the runtime, where messages, events and answers become terms. Only this
//! module may use the functions concerned; `clippy.toml` bans them elsewhere.
//!
//! Allowed on any thread:
//! - building atoms, numbers, binaries, lists, tuples, references and resources in an environment of its own;
//! - building a map of at most [`FLAT`] keys from arrays ([`flat_map`]), which is a tuple of keys and one of values;
//! - looking up a registered name, sending with [`NonScheduler::send`], dropping resources.
//!
//! Not allowed:
//! - building a larger map. `enif_make_map_from_arrays` crashes the VM above 128 keys off the schedulers
//!   (erlang/otp#8208), and above 32 keys it accepts duplicates on any thread and makes a broken map
//!   (erlang/otp#10975). Adding keys one by one is safe, but takes 140 times the memory of the payload. Erlang code
//!   makes such maps instead: [`crate::decode`] leaves them unfinished.
//! - the external term format, which builds maps too;
//! - sending from a scheduler without its environment, and monitoring from elsewhere.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::{io, thread};

use rustler::env::SavedTerm;
use rustler::thread::is_scheduler_thread;
use rustler::{Atom, Env, LocalPid, OwnedEnv, Term};

/// Maps of up to this many keys are flat: they have no tree.
pub(crate) const FLAT: usize = 32;

thread_local! {
    /// Making an environment costs as much as a small message.
    static ENV: RefCell<OwnedEnv> = RefCell::new(OwnedEnv::new());
}

type Job = Box<dyn FnOnce(NonScheduler) + Send>;

/// The thread that sends for schedulers, which may not. Lives as long as the library, which is never unmapped.
static SENDER_THREAD: OnceLock<mpsc::Sender<Job>> = OnceLock::new();

/// Proof that the current thread is not a scheduler. Not `Send`.
pub(crate) struct NonScheduler(PhantomData<*const ()>);

/// The receiver is dead.
pub(crate) struct Dead;

impl NonScheduler {
    /// `None` on a scheduler.
    pub(crate) fn here() -> Option<Self> {
        (!is_scheduler_thread()).then_some(Self(PhantomData))
    }

    /// Sends the message that `build` makes, to the process that it names.
    #[expect(clippy::disallowed_methods, reason = "self proves that this is not a scheduler")]
    pub(crate) fn send<E: From<Dead>>(
        &self,
        build: impl for<'a> FnOnce(Env<'a>) -> Result<(LocalPid, Term<'a>), E>,
    ) -> Result<(), E> {
        ENV.with_borrow_mut(|own| {
            let built = own.run(|env| build(env).map(|(to, message)| (to, own.save(message))));
            match built {
                Ok((to, message)) => own.send_and_clear(&to, |env| message.load(env)).map_err(|_| Dead.into()),
                Err(error) => {
                    own.clear();
                    Err(error)
                }
            }
        })
    }

    /// Sends from an environment that already has terms in it.
    #[expect(clippy::disallowed_methods, reason = "self proves that this is not a scheduler")]
    pub(crate) fn send_from(
        &self,
        mut own: OwnedEnv,
        to: &LocalPid,
        build: impl for<'a> FnOnce(Env<'a>) -> Term<'a>,
    ) -> Result<(), Dead> {
        own.send_and_clear(to, build).map_err(|_| Dead)
    }

    /// The process with a registered name.
    #[expect(clippy::disallowed_methods, reason = "self proves that this is not a scheduler")]
    pub(crate) fn whereis(&self, name: Atom) -> Option<LocalPid> {
        ENV.with_borrow(|own| own.run(|env| env.whereis_pid(name)))
    }
}

/// A term that outlives the NIF call it was passed to, so that messages can contain it.
pub(crate) struct KeptTerm(Mutex<(OwnedEnv, SavedTerm)>);

impl KeptTerm {
    /// Must be called in a NIF.
    #[expect(clippy::disallowed_methods, reason = "copies a term")]
    pub(crate) fn new(term: Term<'_>) -> Self {
        let own = OwnedEnv::new();
        let saved = own.save(term);
        Self(Mutex::new((own, saved)))
    }

    /// Copies the term. It may contain any map: copying does not rebuild maps.
    #[expect(clippy::disallowed_methods, reason = "copies a term")]
    pub(crate) fn copy_to<'a>(&self, env: Env<'a>) -> Term<'a> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, saved) = &*kept;
        own.run(|own| saved.load(own).in_env(env))
    }
}

/// Starts the thread that [`anywhere`] uses on schedulers, unless it is running. Never called concurrently.
pub(crate) fn start_sender_thread() -> io::Result<()> {
    if SENDER_THREAD.get().is_some() {
        return Ok(());
    }
    let (sender, jobs) = mpsc::channel::<Job>();
    thread::Builder::new().name("macula_peer_nif".into()).spawn(move || {
        for job in jobs {
            // A job that panics must not end the thread. The answer it owed is dropped with it.
            let _ = catch_unwind(AssertUnwindSafe(|| job(NonScheduler(PhantomData))));
        }
    })?;
    // It cannot be set already: starts are serialized.
    let _ = SENDER_THREAD.set(sender);
    Ok(())
}

/// Runs a job now, or soon on the sender thread if this is a scheduler. Before the first engine starts that thread does
/// not exist, and no caller waits for a job.
pub(crate) fn anywhere(job: impl FnOnce(NonScheduler) + Send + 'static) {
    match (NonScheduler::here(), SENDER_THREAD.get()) {
        (Some(here), _) => job(here),
        // The thread never ends.
        (None, Some(sender)) => drop(sender.send(Box::new(job))),
        (None, None) => {}
    }
}

/// A map of at most [`FLAT`] keys. `None` if there are more, or if two are equal.
#[expect(clippy::disallowed_methods, reason = "the map is flat")]
pub(crate) fn flat_map<'a>(env: Env<'a>, keys: &[Term<'a>], values: &[Term<'a>]) -> Option<Term<'a>> {
    if keys.len() > FLAT {
        return None;
    }
    Term::map_from_term_arrays(env, keys, values).ok()
}

/// A map of a few fields with distinct names.
pub(crate) fn map<'a>(env: Env<'a>, fields: &[(Atom, Term<'a>)]) -> Term<'a> {
    debug_assert!(fields.len() <= FLAT, "more fields than any thread may make a map of");
    let (names, values): (Vec<_>, Vec<_>) = fields.iter().map(|(name, value)| (name.to_term(env), *value)).unzip();
    flat_map(env, &names, &values).unwrap_or_else(|| Term::map_new(env))
}
