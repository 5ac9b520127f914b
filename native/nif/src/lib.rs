//! The NIF of `macula_peer_connector`: Erlang terms to calls of the engine, answers to processes. It knows nothing of
//! QUIC.
//!
//! No function here waits. A function whose work is too much for a normal scheduler returns `heavy` there, and another
//! function does the work on a dirty one: `encode_frame`, `decode_dirty`.
#![forbid(unsafe_code)]

mod admission;
mod atoms;
mod calls;
mod decode;
mod encode;
mod errors;
mod inbound;
mod log;
mod nat;
mod non_scheduler;
mod options;
mod recipient;
mod stats;

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer::{Engine, Handler, Message, StartError};
use macula_peer_wire::{FrameError, Limits, MessageType, PayloadError, RawFrame};
use rustler::{Atom, Binary, Decoder, Encoder, Env, LocalPid, NifResult, Resource, ResourceArc, Term};

use crate::admission::AnswerToken;
use crate::calls::{Caller, InProgress, Query};
use crate::decode::{Decoded, Terms};
use crate::encode::{On, Refusal};
use crate::errors::{Reason, error};
use crate::inbound::{Cast, Finisher, MessageSender, Process, Receipt, Token};
use crate::recipient::{EndpointText, Recipient};

/// Longer timeouts than this are no timeout: 49 days, as in `receive`.
const LONGEST_TIMEOUT: u64 = u32::MAX as u64;

/// A lock and not a once-cell, so that the engine can be stopped and started again.
static ENGINE: RwLock<Option<Arc<Engine>>> = RwLock::new(None);

/// Held while the engine is started or stopped. Whether this library has been retired: it starts no engine any more.
static RETIRED: Mutex<bool> = Mutex::new(false);

/// The processes of the running engine.
static PROCESSES: Mutex<Option<Processes>> = Mutex::new(None);

/// Processes that end with the engine.
struct Processes {
    /// Finishes terms that the engine's threads may not make, and the supervisor of that process.
    finisher: ResourceArc<Finisher>,
    supervisor: LocalPid,
    /// Calls the handler, where that is a function. It ends when another handler takes its place.
    function: Option<LocalPid>,
}

rustler::init!("macula_peer_nif", load = load);

/// The library belongs to the application of the same version; another one is stale. The version is empty where the
/// application's file is not in the code path.
fn load(env: Env<'_>, version: Term<'_>) -> bool {
    log::install();
    // A retired library stays mapped, and may be loaded again.
    *RETIRED.lock().unwrap_or_else(PoisonError::into_inner) = false;
    let fits = |version: String| version.is_empty() || version == env!("CARGO_PKG_VERSION");
    options::text(version).is_some_and(fits) && atoms::load(env)
}

fn engine() -> Option<Arc<Engine>> {
    ENGINE.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn limits() -> Limits {
    engine().map_or_else(Limits::default, |engine| engine.config().limits)
}

// ---- life of the engine ----

/// Whether options are right: `settings` those of the engine, `listen` those of listening.
#[rustler::nif]
fn check<'a>(env: Env<'a>, what: Atom, options: Term<'a>) -> Term<'a> {
    let checked = match what {
        what if what == atoms::listen() => options::listen(options).map(drop),
        _ => options::config(options).map(drop),
    };
    match checked {
        Ok(()) => atoms::ok().encode(env),
        Err(invalid) => error(env, &invalid),
    }
}

/// Starts the engine with its finisher and the supervisor of that, its handler (as for `set_handler`) and what it listens to
/// (`undefined`: it does not), all of it or nothing.
#[rustler::nif(schedule = "DirtyIo")]
fn start<'a>(
    env: Env<'a>,
    options: Term<'a>,
    (supervisor, finisher): (LocalPid, ResourceArc<Finisher>),
    handler: Term<'a>,
    listen: Term<'a>,
) -> Term<'a> {
    let config = match options::config(options) {
        Ok(config) => config,
        Err(invalid) => return error(env, &invalid),
    };
    let listen = match listen.is_map().then(|| options::listen(listen)).transpose() {
        Ok(listen) => listen,
        Err(invalid) => return error(env, &invalid),
    };
    // Starting takes milliseconds, in which the callers' lock stays free.
    let retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
    if *retired {
        return (atoms::error(), (atoms::start_failed(), atoms::upgrading())).encode(env);
    }
    if engine().is_some() {
        return (atoms::error(), atoms::already_started()).encode(env);
    }
    if let Err(failed) = non_scheduler::start_sender_thread() {
        return error(env, &StartError::Runtime(failed));
    }
    let started = match Engine::start(config) {
        Ok(started) => started,
        Err(failed) => return error(env, &failed),
    };
    started.set_fallback(Some(Arc::new(Cast { sender: MessageSender::new(&started, finisher.clone()) })));
    let function = handle(&started, finisher.clone(), handler);
    if let Some(Err(failed)) = listen.map(|listen| started.listen(listen)) {
        started.stop();
        return error(env, &failed);
    }
    *PROCESSES.lock().unwrap_or_else(PoisonError::into_inner) = Some(Processes { finisher, supervisor, function });
    *ENGINE.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(started));
    atoms::ok().encode(env)
}

/// Stops the engine. Returns its processes.
#[rustler::nif(schedule = "DirtyIo")]
fn stop(env: Env<'_>) -> Term<'_> {
    let _one_at_a_time = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
    stop_engine(env)
}

/// Another library is about to take the place of this one, which stays mapped: an engine that a call started here
/// meanwhile would run, and keep its port, for as long as the BEAM.
#[rustler::nif(schedule = "DirtyIo")]
fn retire(env: Env<'_>) -> Term<'_> {
    let mut retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
    *retired = true;
    stop_engine(env)
}

fn stop_engine(env: Env<'_>) -> Term<'_> {
    let engine = ENGINE.write().unwrap_or_else(PoisonError::into_inner).take();
    match engine {
        Some(engine) => {
            engine.stop();
            let processes = PROCESSES.lock().unwrap_or_else(PoisonError::into_inner).take();
            processes.map_or_else(
                || atoms::not_started().encode(env),
                |Processes { supervisor, function, .. }| released(env, function, supervisor),
            )
        }
        None => atoms::not_started().encode(env),
    }
}

// ---- sending ----

/// A message in its frame, between the function that encoded it and the one that sends it.
struct Frame {
    kind: MessageType,
    bytes: Bytes,
}

#[rustler::resource_impl]
impl Resource for Frame {}

/// What a message is given as: `{Type, Message}`, or the frame that `encode_frame` made of it.
enum Content<'a> {
    Terms(Term<'a>, Term<'a>),
    Frame(ResourceArc<Frame>),
}

impl<'a> Decoder<'a> for Content<'a> {
    fn decode(term: Term<'a>) -> NifResult<Self> {
        match term.decode() {
            Ok((kind, message)) => Ok(Self::Terms(kind, message)),
            Err(_) => Ok(Self::Frame(term.decode()?)),
        }
    }
}

impl<'a> Content<'a> {
    /// `Refusal::Heavy`: too much work for a normal scheduler.
    fn encode(self, limits: Limits) -> Result<(MessageType, Bytes), Refusal<'a>> {
        match self {
            Self::Terms(kind, message) => encode::frame(kind, message, limits, On::Normal),
            Self::Frame(frame) => Ok((frame.kind, frame.bytes.clone())),
        }
    }
}

#[rustler::nif]
fn send<'a>(env: Env<'a>, tag: Term<'a>, to: Term<'a>, content: Content<'a>, timeout: Term<'a>) -> Term<'a> {
    submit(env, tag, to, content, timeout, send_message)
}

#[rustler::nif]
fn request<'a>(env: Env<'a>, tag: Term<'a>, to: Term<'a>, content: Content<'a>, timeout: Term<'a>) -> Term<'a> {
    submit(env, tag, to, content, timeout, send_request)
}

/// Encodes what is too much work for a normal scheduler.
#[rustler::nif(schedule = "DirtyCpu")]
fn encode_frame<'a>(env: Env<'a>, kind: Term<'a>, message: Term<'a>) -> Term<'a> {
    match encode::frame(kind, message, limits(), On::Dirty) {
        Ok((kind, bytes)) => (atoms::ok(), ResourceArc::new(Frame { kind, bytes })).encode(env),
        Err(refusal) => refused(env, &refusal),
    }
}

/// Validates and encodes, in the original's order: first the message, then the endpoint.
fn submit<'a>(
    env: Env<'a>,
    tag: Term<'a>,
    to: Term<'a>,
    content: Content<'a>,
    timeout: Term<'a>,
    send: impl FnOnce(Env<'a>, Term<'a>, &Engine, &Recipient<'_>, Message, Instant) -> Term<'a>,
) -> Term<'a> {
    // Locked for reading meanwhile, which is cheaper than counting one more reference; nothing here waits.
    let engine = ENGINE.read().unwrap_or_else(PoisonError::into_inner);
    let Some(engine) = &*engine else { return atoms::not_started().encode(env) };
    let (kind, frame) = match content.encode(engine.config().limits) {
        Ok(encoded) => encoded,
        Err(refusal) => return refused(env, &refusal),
    };
    let now = Instant::now();
    let Ok(deadline) = deadline(timeout, now) else {
        return (atoms::error(), (atoms::invalid_timeout(), timeout)).encode(env);
    };
    let text = EndpointText::of(to);
    match Recipient::read(to, &text) {
        Ok(recipient) => {
            let message = Message { frame, kind, deadline, key: recipient.key() };
            send(env, tag, engine, &recipient, message, now)
        }
        Err(invalid) => invalid.error(env, to),
    }
}

/// `heavy`, or the error.
fn refused<'a>(env: Env<'a>, refusal: &Refusal<'a>) -> Term<'a> {
    match refusal {
        Refusal::Heavy => atoms::heavy().encode(env),
        refusal => error(env, refusal),
    }
}

fn send_message<'a>(
    env: Env<'a>,
    tag: Term<'a>,
    engine: &Engine,
    recipient: &Recipient<'_>,
    message: Message,
    now: Instant,
) -> Term<'a> {
    let wait = recipient.prepare(engine);
    let message = match engine.send_now(&recipient.target(), message, now) {
        Ok(()) => return atoms::ok().encode(env),
        Err(message) => message,
    };
    let Some(wait) = wait else { return atoms::unlinked().encode(env) };
    let caller = Caller::new(env, tag);
    let call = InProgress::monitor(env, &caller.pid());
    let monitored = call.clone();
    let waiting = engine.send(&recipient.target(), message, move |sent| {
        drop(monitored);
        caller.answer(move |env| match sent {
            Ok(()) => atoms::ok().encode(env),
            Err(failed) => error(env, &failed),
        });
    });
    if let Some(waiting) = waiting {
        call.waiting(waiting);
    }
    wait.encode(env)
}

fn send_request<'a>(
    env: Env<'a>,
    tag: Term<'a>,
    engine: &Engine,
    recipient: &Recipient<'_>,
    message: Message,
    _: Instant,
) -> Term<'a> {
    let Some(wait) = recipient.prepare(engine) else { return atoms::unlinked().encode(env) };
    let caller = Caller::new(env, tag);
    let call = InProgress::monitor(env, &caller.pid());
    let monitored = call.clone();
    let limits = engine.config().limits;
    let waiting = engine.request(&recipient.target(), message, move |answer| {
        drop(monitored);
        caller.answer(move |env| match answer {
            Ok(frame) => decode_answer(env, &frame, limits),
            Err(failed) => error(env, &failed),
        });
    });
    if let Some(waiting) = waiting {
        call.waiting(waiting);
    }
    wait.encode(env)
}

/// `{ok, {Type, Message}}`, or `{unfinished, Type, Message}`.
fn decode_answer<'a>(env: Env<'a>, frame: &RawFrame, limits: Limits) -> Term<'a> {
    let Some(kind) = MessageType::from_id(frame.type_id()) else {
        return error(env, &FrameError::UnknownType(frame.type_id()));
    };
    match decode::payload(env, frame.payload(), limits) {
        Ok(message) => decoded(env, kind, message),
        Err(failed) => error(env, &FrameError::Payload(failed)),
    }
}

fn decoded<'a>(env: Env<'a>, kind: MessageType, message: Decoded<'a>) -> Term<'a> {
    let kind = atoms::name_of(kind);
    match message {
        Decoded::Finished(message) => (atoms::ok(), (kind, message)).encode(env),
        Decoded::Unfinished(message) => (atoms::unfinished(), kind, message).encode(env),
    }
}

/// `infinity` or a number of milliseconds.
fn deadline(timeout: Term<'_>, now: Instant) -> Result<Option<Instant>, ()> {
    if timeout.is_atom() {
        return if atoms::infinity() == timeout { Ok(None) } else { Err(()) };
    }
    match timeout.decode::<u64>() {
        Ok(ms) if ms <= LONGEST_TIMEOUT => Ok(Some(now + Duration::from_millis(ms))),
        _ => Err(()),
    }
}

/// The candidates that a lookup has found so far.
#[rustler::nif]
fn found<'a>(env: Env<'a>, node: Term<'a>, candidates: Term<'a>) -> Term<'a> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    let Some(node) = recipient::node_id(node) else {
        return (atoms::error(), (atoms::invalid_node_id(), node)).encode(env);
    };
    match recipient::candidates(candidates) {
        Ok(candidates) => {
            engine.found(&node, candidates);
            atoms::ok().encode(env)
        }
        Err(invalid) => invalid.error(env, candidates),
    }
}

/// A lookup for a node is over.
#[rustler::nif]
fn resolved<'a>(env: Env<'a>, node: Term<'a>, answered: bool) -> Term<'a> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    let Some(node) = recipient::node_id(node) else {
        return (atoms::error(), (atoms::invalid_node_id(), node)).encode(env);
    };
    engine.resolved(&node, answered);
    atoms::ok().encode(env)
}

/// Forgets which key a node has.
#[rustler::nif]
fn forget<'a>(env: Env<'a>, node: Term<'a>) -> Term<'a> {
    let Some(name) = recipient::node_id(node) else {
        return (atoms::error(), (atoms::invalid_node_id(), node)).encode(env);
    };
    match engine() {
        Some(engine) => {
            engine.forget(&name);
            atoms::ok().encode(env)
        }
        None => atoms::not_started().encode(env),
    }
}

// ---- registrations ----

#[rustler::nif]
fn register<'a>(env: Env<'a>, node: Term<'a>, relays: Term<'a>) -> Term<'a> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    let Some(node) = recipient::node_id(node) else {
        return (atoms::error(), (atoms::invalid_node_id(), node)).encode(env);
    };
    match options::endpoints(relays) {
        Some(relays) => {
            engine.register(node, relays);
            atoms::ok().encode(env)
        }
        None => (atoms::error(), (atoms::invalid_option(), (atoms::relays(), relays))).encode(env),
    }
}

#[rustler::nif]
fn unregister() -> Atom {
    match engine() {
        Some(engine) => {
            engine.unregister();
            atoms::ok()
        }
        None => atoms::not_started(),
    }
}

// ---- listening ----

#[rustler::nif(schedule = "DirtyIo")]
fn listen<'a>(env: Env<'a>, options: Term<'a>) -> Term<'a> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    let listen = match options::listen(options) {
        Ok(listen) => listen,
        Err(invalid) => return error(env, &invalid),
    };
    match engine.listen(listen) {
        Ok(address) => (atoms::ok(), inbound::address(env, address)).encode(env),
        Err(failed) => error(env, &failed),
    }
}

#[rustler::nif(schedule = "DirtyIo")]
fn close() -> Atom {
    match engine() {
        Some(engine) => {
            engine.close();
            atoms::ok()
        }
        None => atoms::not_started(),
    }
}

#[rustler::nif]
fn local_address(env: Env<'_>) -> Term<'_> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    match engine.local_address() {
        Ok(address) => (atoms::ok(), inbound::address(env, address)).encode(env),
        Err(_) => (atoms::error(), atoms::gone()).encode(env),
    }
}

#[rustler::nif]
fn identity(env: Env<'_>) -> Term<'_> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    let fingerprint = errors::bytes_term(env, engine.fingerprint().as_bytes());
    non_scheduler::map(env, &[(atoms::fingerprint(), fingerprint)])
}

/// A process, `{function, Pid}` with the process that calls a function, or `undefined`. Returns the process of the
/// previous function.
#[rustler::nif]
fn set_handler<'a>(env: Env<'a>, handler: Term<'a>) -> Term<'a> {
    // Locked until the end: a stop comes either before this, and then there is no engine, or after it, and ends this
    // handler.
    let engine = ENGINE.read().unwrap_or_else(PoisonError::into_inner);
    let mut processes = PROCESSES.lock().unwrap_or_else(PoisonError::into_inner);
    let (Some(engine), Some(processes)) = (&*engine, &mut *processes) else { return atoms::not_started().encode(env) };
    let function = handle(engine, processes.finisher.clone(), handler);
    let before = std::mem::replace(&mut processes.function, function);
    released(env, before, processes.supervisor)
}

/// Sets the handler. Returns its process, if it is a function.
fn handle(engine: &Engine, finisher: ResourceArc<Finisher>, handler: Term<'_>) -> Option<LocalPid> {
    let function = handler.decode::<(Atom, LocalPid)>().ok().map(|(_, pid)| pid);
    let process = function.or_else(|| handler.decode().ok());
    let sender = MessageSender::new(engine, finisher);
    engine.set_handler(process.map(|pid| Arc::new(Process { pid, sender }) as Arc<dyn Handler>));
    function
}

fn released(env: Env<'_>, function: Option<LocalPid>, supervisor: LocalPid) -> Term<'_> {
    let function = function.map_or_else(|| atoms::none().encode(env), |pid| pid.encode(env));
    (atoms::released(), function, supervisor).encode(env)
}

#[rustler::nif]
fn set_logger(logger: LocalPid) -> Atom {
    log::set_logger(logger);
    atoms::ok()
}

#[rustler::nif]
fn reply<'a>(env: Env<'a>, token: Term<'a>, content: Content<'a>) -> Term<'a> {
    match content.encode(limits()) {
        Ok((_, frame)) => answer(env, token, frame),
        Err(refusal) => refused(env, &refusal),
    }
}

fn answer<'a>(env: Env<'a>, token: Term<'a>, frame: Bytes) -> Term<'a> {
    let Ok(token) = token.decode::<ResourceArc<Token>>() else {
        return (atoms::error(), atoms::invalid_token()).encode(env);
    };
    match token.0.reply(frame) {
        Ok(()) => atoms::ok().encode(env),
        Err(failed) => error(env, &failed),
    }
}

/// A place for the process that finishes messages.
#[rustler::nif]
fn new_finisher() -> ResourceArc<Finisher> {
    Finisher::new()
}

/// From now on this process finishes messages.
#[rustler::nif]
fn set_finisher(finisher: ResourceArc<Finisher>, pid: LocalPid) -> Atom {
    finisher.set(pid);
    atoms::ok()
}

/// The finisher has sent a message on.
#[rustler::nif]
fn handed_over(receipt: ResourceArc<Receipt>) -> Atom {
    receipt.taken();
    atoms::ok()
}

/// Closes the link to a peer.
#[rustler::nif]
fn invalidate<'a>(env: Env<'a>, peer: Term<'a>) -> Term<'a> {
    let text = EndpointText::of(peer);
    match (Recipient::read(peer, &text), engine()) {
        (Ok(recipient), Some(engine)) => {
            engine.invalidate(&recipient.target());
            atoms::ok().encode(env)
        }
        (Err(invalid), _) => invalid.error(env, peer),
        (Ok(_), None) => atoms::not_started().encode(env),
    }
}

// ---- admission ----

/// Sets the lists of access control. Connections that they deny have ended when this returns.
#[rustler::nif(schedule = "DirtyIo")]
fn set_access<'a>(env: Env<'a>, access: Term<'a>) -> Term<'a> {
    let Some(engine) = engine() else { return atoms::not_started().encode(env) };
    match admission::access(access) {
        Ok(access) => {
            engine.set_access(access);
            atoms::ok().encode(env)
        }
        Err(invalid) => error(env, &invalid),
    }
}

/// As `stats`: the lists may be long.
#[rustler::nif]
fn access<'a>(env: Env<'a>, tag: Term<'a>) -> Atom {
    ask(env, tag, |engine| {
        let access = engine.access();
        move |env| admission::access_term(env, &access)
    })
}

/// As `stats`: there may be thousands of connections to look at.
#[rustler::nif]
fn kick<'a>(env: Env<'a>, tag: Term<'a>, target: Term<'a>) -> Term<'a> {
    let Some(kick) = admission::kick(target) else {
        return (atoms::error(), (atoms::invalid_kick(), target)).encode(env);
    };
    let waits = ask(env, tag, move |engine| {
        let kicked = engine.kick(&kick);
        move |env| if kicked { atoms::ok().encode(env) } else { (atoms::error(), atoms::not_found()).encode(env) }
    });
    waits.encode(env)
}

/// As `stats`.
#[rustler::nif]
fn relay_nodes<'a>(env: Env<'a>, tag: Term<'a>, from: u64) -> Atom {
    ask(env, tag, move |engine| {
        let nodes = engine.relay_nodes(from, admission::NODES_AT_ONCE);
        move |env| match nodes {
            Some((nodes, next)) => admission::nodes(env, &nodes, next),
            None => (atoms::error(), atoms::not_a_relay()).encode(env),
        }
    })
}

/// The callback has answered a question, or has not.
#[rustler::nif]
fn admitted(token: ResourceArc<AnswerToken>, answer: Atom) -> Atom {
    token.answer(answer);
    atoms::ok()
}

// ---- insight ----

/// Asks on a thread of the engine, which other dirty work does not delay: there may be thousands of connections to look
/// at. The answer comes as `{Tag, Stats}`.
#[rustler::nif]
fn stats<'a>(env: Env<'a>, tag: Term<'a>) -> Atom {
    ask(env, tag, |engine| {
        let stats = engine.stats();
        move |env| stats::term(env, &stats)
    })
}

/// As `stats`: a host may have many interfaces to look through.
#[rustler::nif]
fn nat_profile<'a>(env: Env<'a>, tag: Term<'a>) -> Atom {
    ask(env, tag, |engine| {
        let profile = engine.nat_profile();
        move |env| nat::term(env, &profile)
    })
}

fn ask<'a, T>(env: Env<'a>, tag: Term<'a>, read: impl FnOnce(&Engine) -> T + Send + 'static) -> Atom
where
    T: for<'b> FnOnce(Env<'b>) -> Term<'b> + Send + 'static,
{
    let Some(engine) = engine() else { return atoms::not_started() };
    let asking = Query::new(Caller::new(env, tag));
    let asked = engine.clone();
    engine.run(move || asking.answer(read(&asked)));
    atoms::wait()
}

#[rustler::nif]
fn path<'a>(env: Env<'a>, peer: Term<'a>) -> Term<'a> {
    let text = EndpointText::of(peer);
    match (Recipient::read(peer, &text), engine()) {
        (Ok(recipient), Some(engine)) => (atoms::ok(), stats::path(env, &engine.path(&recipient.target()))).encode(env),
        (Err(invalid), _) => invalid.error(env, peer),
        (Ok(_), None) => atoms::not_started().encode(env),
    }
}

// ---- wire ----

#[rustler::nif]
fn encode<'a>(env: Env<'a>, content: Content<'a>) -> Term<'a> {
    let frame = match content {
        // May be large, so it is not copied.
        Content::Frame(frame) => frame.make_binary(env, |frame| &frame.bytes).to_term(env),
        terms => match terms.encode(limits()) {
            Ok((_, frame)) => errors::bytes_term(env, &frame),
            Err(refusal) => return refused(env, &refusal),
        },
    };
    (atoms::ok(), frame).encode(env)
}

#[rustler::nif]
fn decode<'a>(env: Env<'a>, frame: Binary<'a>) -> Term<'a> {
    decode_frame(env, frame, Terms::light)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn decode_dirty<'a>(env: Env<'a>, frame: Binary<'a>) -> Term<'a> {
    decode_frame(env, frame, |terms| terms)
}

fn decode_frame<'a>(env: Env<'a>, frame: Binary<'a>, bounded: impl FnOnce(Terms<'a>) -> Terms<'a>) -> Term<'a> {
    let payload_starts = macula_peer_wire::HEADER_LEN.min(frame.len());
    let payload = frame.make_subbinary(payload_starts, frame.len() - payload_starts).ok();
    let mut terms = bounded(Terms::new(env, payload));
    match macula_peer_wire::decode(frame.as_slice(), limits(), &mut terms) {
        Ok((kind, message)) => decoded(env, kind, terms.decoded(message)),
        Err(FrameError::Payload(PayloadError::Stopped)) => atoms::heavy().encode(env),
        Err(failed) => (atoms::error(), failed.reason(env)).encode(env),
    }
}
