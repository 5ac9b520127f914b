//! What is allowed on threads that are not schedulers: the runtime's, where messages, events and answers become terms.
//! The rules are only here; `clippy.toml` bans the functions that would break them elsewhere.
//!
//! Allowed on any thread:
//! - building atoms, numbers, binaries, lists, tuples, references and resources in an environment of its own;
//! - building a map of at most [`FLAT`] keys from arrays ([`flat_map`]), which is a tuple of keys and one of values;
//! - looking up a registered name, sending with [`OffScheduler::send`], letting go of resources.
//!
//! Not allowed:
//! - building a larger map. `enif_make_map_from_arrays` crashes the VM above 128 keys off the schedulers
//!   (erlang/otp#8208), and above 32 keys it does not refuse repeated ones on any thread, which makes a broken map
//!   (erlang/otp#10975). Adding keys one by one is safe, and takes 140 times the memory of the payload. Erlang code makes
//!   such maps instead: [`crate::decode`] leaves them unfinished.
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

/// Maps of up to this many keys have no tree.
pub(crate) const FLAT: usize = 32;

thread_local! {
    /// Making an environment costs as much as a small message.
    static ENV: RefCell<OwnedEnv> = RefCell::new(OwnedEnv::new());
}

type Job = Box<dyn FnOnce(OffScheduler) + Send>;

/// Does what schedulers may not do. Lives as long as the library, which is never unmapped.
static COURIER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();

/// Proves that this thread is not a scheduler. Never leaves it.
pub(crate) struct OffScheduler(PhantomData<*const ()>);

/// The receiver is dead.
pub(crate) struct Dead;

impl OffScheduler {
    /// `None` on a scheduler.
    pub(crate) fn here() -> Option<Self> {
        (!is_scheduler_thread()).then_some(Self(PhantomData))
    }

    /// Sends the message that `build` makes, to the process that it names.
    #[expect(clippy::disallowed_methods, reason = "the token says that this is no scheduler")]
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

    /// The same from an environment that already has terms in it.
    #[expect(clippy::disallowed_methods, reason = "the token says that this is no scheduler")]
    pub(crate) fn send_from(
        &self,
        mut own: OwnedEnv,
        to: &LocalPid,
        build: impl for<'a> FnOnce(Env<'a>) -> Term<'a>,
    ) -> Result<(), Dead> {
        own.send_and_clear(to, build).map_err(|_| Dead)
    }

    /// The process with a registered name.
    #[expect(clippy::disallowed_methods, reason = "the token says that this is no scheduler")]
    pub(crate) fn whereis(&self, name: Atom) -> Option<LocalPid> {
        ENV.with_borrow(|own| own.run(|env| env.whereis_pid(name)))
    }
}

/// A term that outlives the call that it came in, to go along with messages.
pub(crate) struct Kept(Mutex<(OwnedEnv, SavedTerm)>);

impl Kept {
    /// In a NIF.
    #[expect(clippy::disallowed_methods, reason = "copies a term")]
    pub(crate) fn new(term: Term<'_>) -> Self {
        let own = OwnedEnv::new();
        let saved = own.save(term);
        Self(Mutex::new((own, saved)))
    }

    /// Copies the term, whatever it is: copying builds no map anew.
    #[expect(clippy::disallowed_methods, reason = "copies a term")]
    pub(crate) fn copy_to<'a>(&self, env: Env<'a>) -> Term<'a> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, saved) = &*kept;
        own.run(|own| saved.load(own).in_env(env))
    }
}

/// Makes the thread that [`anywhere`] needs on schedulers, if it is not there. Called by one start at a time.
pub(crate) fn start_courier() -> io::Result<()> {
    if COURIER.get().is_some() {
        return Ok(());
    }
    let (courier, jobs) = mpsc::channel::<Job>();
    thread::Builder::new().name("macula_peer_nif".into()).spawn(move || {
        for job in jobs {
            // A job that panics does not end the thread of the others. The answer that it owed is dropped with it.
            let _ = catch_unwind(AssertUnwindSafe(|| job(OffScheduler(PhantomData))));
        }
    })?;
    // Nobody else has set it: starts wait for each other.
    let _ = COURIER.set(courier);
    Ok(())
}

/// Does a job now, or soon if this is a scheduler. Before an engine first starts there is no thread for that, and no
/// caller that waits for it.
pub(crate) fn anywhere(job: impl FnOnce(OffScheduler) + Send + 'static) {
    match (OffScheduler::here(), COURIER.get()) {
        (Some(here), _) => job(here),
        // The thread never ends.
        (None, Some(courier)) => drop(courier.send(Box::new(job))),
        (None, None) => {}
    }
}

/// A map of at most [`FLAT`] keys. `None` if there are more, or a key comes twice.
#[expect(clippy::disallowed_methods, reason = "there are few enough keys")]
pub(crate) fn flat_map<'a>(env: Env<'a>, keys: &[Term<'a>], values: &[Term<'a>]) -> Option<Term<'a>> {
    if keys.len() > FLAT {
        return None;
    }
    Term::map_from_term_arrays(env, keys, values).ok()
}

/// A map of a few fields with different names.
pub(crate) fn map<'a>(env: Env<'a>, fields: &[(Atom, Term<'a>)]) -> Term<'a> {
    debug_assert!(fields.len() <= FLAT, "more fields than any thread may make a map of");
    let (names, values): (Vec<_>, Vec<_>) = fields.iter().map(|(name, value)| (name.to_term(env), *value)).unzip();
    flat_map(env, &names, &values).unwrap_or_else(|| Term::map_new(env))
}
