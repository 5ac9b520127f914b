//! What arrives: one message each to the handler process.
//!
//! A message that is not finished ([`crate::decode`]) goes to the process `macula_peer_finisher`, which finishes it and
//! sends it on. Later messages of the same sender take the same path until that is done, so that none overtakes
//! another.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use macula_peer::{
    Backlog, Dialect, Engine, Event, Failures, Fallback, Handler, Inbound, NotTaken, Path, PeerName, Registration,
    ReplyToken, Ticket, Unhandled,
};
use macula_peer_wire::Limits;
use rustler::{Atom, Encoder, Env, LocalPid, Resource, ResourceArc, Term};

use crate::atoms;
use crate::decode::{self, Decoded};
use crate::errors::{InnerReason, Reason, binary, bytes_term};
use crate::nat;
use crate::non_scheduler::{Dead, NonScheduler, map};

/// The process that gets what arrives.
pub(crate) struct Process {
    pub(crate) pid: LocalPid,
    pub(crate) sender: MessageSender,
}

impl Handler for Process {
    fn message(&self, mut inbound: Inbound) -> Result<(), Unhandled> {
        let reply = inbound.reply.take();
        self.sender.send(self.pid, &inbound, |env, message| {
            let reply = match reply {
                Some(token) => ResourceArc::new(Token(token)).encode(env),
                None => atoms::none().encode(env),
            };
            let key = match inbound.key {
                Some(key) => bytes_term(env, key.as_bytes()),
                None => atoms::undefined().encode(env),
            };
            let (tag, message) = match message {
                Some(message) => (atoms::macula_peer_message(), message),
                None => (atoms::message(), atoms::undefined().encode(env)),
            };
            let fields: [(Atom, Term<'_>); 7] = [
                (atoms::type_(), atoms::name_of(inbound.kind).encode(env)),
                (atoms::message(), message),
                (atoms::from(), address(env, inbound.from)),
                (atoms::path(), path(inbound.path).encode(env)),
                (atoms::dialect(), dialect(inbound.dialect).encode(env)),
                (atoms::key(), key),
                (atoms::reply_to(), reply),
            ];
            (tag, map(env, &fields)).encode(env)
        })
    }

    fn event(&self, event: Event) -> bool {
        let pid = self.pid;
        let tell = move |here: &NonScheduler| -> Result<(), Dead> {
            here.send(|env| {
                let fields = map(env, &fields(env, &event));
                Ok((pid, (atoms::macula_peer_event(), fields).encode(env)))
            })
        };
        // The engine tells of events on its own threads.
        NonScheduler::here().is_some_and(|here| tell(&here).is_ok())
    }
}

/// The process `macula_gateway`, where it runs and listens nowhere that this library knows of.
pub(crate) struct Cast {
    pub(crate) sender: MessageSender,
}

impl Fallback for Cast {
    /// `gen_server:cast(macula_gateway, {route_message, Type, Msg, Stream, {ok, {Ip, Port}}})`. The gateway may act on
    /// the message, but an attempt to answer on this stream, which is no quicer stream, is an error there. The sender
    /// is told that no answer will come.
    fn message(&self, inbound: Inbound) -> Result<(), NotTaken> {
        let gateway = NonScheduler::here().and_then(|here| here.whereis(atoms::macula_gateway()));
        let Some(gateway) = gateway else { return Err(NotTaken::Absent(Box::new(inbound))) };
        let sent = self.sender.send(gateway, &inbound, |env, message| {
            let (kind, stream) = (atoms::name_of(inbound.kind), env.make_ref());
            let from = (atoms::ok(), address(env, inbound.from));
            match message {
                Some(message) => (atoms::gen_cast(), (atoms::route_message(), kind, message, stream, from)).encode(env),
                None => (atoms::route_message(), kind, stream, from).encode(env),
            }
        });
        match sent {
            Ok(()) => Ok(()),
            Err(Unhandled::Malformed(error)) => Err(NotTaken::Malformed(error)),
            Err(_) => Err(NotTaken::Absent(Box::new(inbound))),
        }
    }
}

/// Sends messages to a process, with the help of the finisher for maps that this thread may not build.
#[derive(Clone)]
pub(crate) struct MessageSender {
    limits: Limits,
    backlog: Arc<Backlog>,
    finisher: ResourceArc<Finisher>,
}

/// Which process finishes messages. Its supervisor starts another one when it is killed, which takes its place here.
pub(crate) struct Finisher(Mutex<Option<LocalPid>>);

#[rustler::resource_impl]
impl Resource for Finisher {}

impl Finisher {
    pub(crate) fn new() -> ResourceArc<Self> {
        ResourceArc::new(Self(Mutex::new(None)))
    }

    pub(crate) fn set(&self, pid: LocalPid) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
    }

    fn pid(&self) -> Option<LocalPid> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MessageSender {
    pub(crate) fn new(engine: &Engine, finisher: ResourceArc<Finisher>) -> Self {
        Self { limits: engine.config().limits, backlog: engine.backlog(), finisher }
    }

    /// Sends what `whole` makes of the decoded message. Without a message `whole` returns what the finisher puts around
    /// it.
    fn send(
        &self,
        to: LocalPid,
        inbound: &Inbound,
        whole: impl for<'a> FnOnce(Env<'a>, Option<Term<'a>>) -> Term<'a>,
    ) -> Result<(), Unhandled> {
        let Some(here) = NonScheduler::here() else { return Err(Unhandled::NoHandler) };
        let sender = inbound.sender();
        let is_behind = self.backlog.holds(sender);
        let mut receipt = None;
        let sent = here.send(|env| {
            let message = match decode::payload(env, &inbound.payload, self.limits)? {
                Decoded::Finished(message) if !is_behind => return Ok((to, whole(env, Some(message)))),
                Decoded::Finished(message) | Decoded::Unfinished(message) => message,
            };
            let finisher = self.finisher.pid().ok_or(Unhandled::NoHandler)?;
            let ticket = self.backlog.enter(sender, inbound.payload.len());
            let receipt = receipt.insert(ResourceArc::new(Receipt(Mutex::new(Some(ticket)))));
            let whole = whole(env, None);
            Ok((finisher, (atoms::macula_peer_finish(), receipt.clone(), to, whole, message).encode(env)))
        });
        if let (Err(_), Some(receipt)) = (&sent, receipt) {
            // The caller counts it.
            receipt.take();
        }
        sent
    }
}

impl From<Dead> for Unhandled {
    fn from(_: Dead) -> Self {
        Self::NoHandler
    }
}

/// A message that the finisher has. It counts as unhandled unless the finisher reports that it was taken.
pub(crate) struct Receipt(Mutex<Option<Ticket>>);

#[rustler::resource_impl]
impl Resource for Receipt {}

impl Receipt {
    /// The message has left the finisher.
    pub(crate) fn taken(&self) {
        self.take();
    }

    fn take(&self) -> Option<Ticket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if self.take().is_some()
            && let Some(engine) = crate::engine()
        {
            engine.unhandled();
        }
    }
}

fn fields<'a>(env: Env<'a>, event: &Event) -> Vec<(Atom, Term<'a>)> {
    match event {
        Event::Undelivered { peer, count, reason } => vec![
            (atoms::event(), atoms::undelivered().encode(env)),
            (atoms::peer(), peer_name(env, peer)),
            (atoms::count(), count.encode(env)),
            (atoms::reason(), reason.reason(env)),
        ],
        Event::SessionRestarted { peer, key } => vec![
            (atoms::event(), atoms::session_restarted().encode(env)),
            (atoms::from(), address(env, *peer)),
            (atoms::key(), bytes_term(env, key.as_bytes())),
        ],
        Event::Registration { relay, state } => {
            let (state, reason) = registration(env, *state);
            vec![
                (atoms::event(), atoms::registration().encode(env)),
                (atoms::relay(), binary(env, &relay.to_string())),
                (atoms::state(), state.encode(env)),
                (atoms::reason(), reason.encode(env)),
            ]
        }
        Event::Nat(status) => {
            let mut fields = nat::fields(env, status);
            fields.push((atoms::event(), atoms::nat_profile().encode(env)));
            fields
        }
        Event::Path { peer, path, failures } => vec![
            (atoms::event(), atoms::path().encode(env)),
            (atoms::peer(), peer_name(env, peer)),
            (atoms::path(), self::path(*path).encode(env)),
            (atoms::failed(), self::failures(env, failures)),
        ],
        Event::RelayLimit { relay, limit } => vec![
            (atoms::event(), atoms::relay_limit().encode(env)),
            (atoms::relay(), binary(env, &relay.to_string())),
            (atoms::limit(), atoms::named(env, limit.name()).encode(env)),
        ],
    }
}

/// Why other paths failed.
pub(crate) fn failures<'a>(env: Env<'a>, failures: &Failures) -> Term<'a> {
    let Failures { direct, hole_punch, relay } = failures;
    let all = [
        (atoms::direct(), direct.as_ref().map(|error| error.why(env))),
        (atoms::hole_punch(), hole_punch.as_ref().map(|error| error.why(env))),
        (atoms::relay(), relay.as_ref().map(|error| error.why(env))),
    ];
    let failed: Vec<_> = all.into_iter().filter_map(|(path, why)| Some((path, why?))).collect();
    map(env, &failed)
}

/// Its endpoint, or `{node, NodeId}`.
fn peer_name<'a>(env: Env<'a>, peer: &PeerName) -> Term<'a> {
    match peer {
        PeerName::Endpoint(endpoint) => binary(env, &endpoint.to_string()),
        PeerName::Gateway(endpoint) => (atoms::gateway(), binary(env, &endpoint.to_string())).encode(env),
        PeerName::Node(node) => (atoms::node(), bytes_term(env, node.as_bytes())).encode(env),
    }
}

/// The state of a registration, and why the relay refuses it.
pub(crate) fn registration(env: Env<'_>, state: Registration) -> (Atom, Atom) {
    match state {
        Registration::Connecting => (atoms::connecting(), atoms::none()),
        Registration::Registered => (atoms::registered(), atoms::none()),
        Registration::Lost => (atoms::lost(), atoms::none()),
        Registration::Refused(refusal) => (atoms::refused(), atoms::named(env, refusal.name())),
    }
}

pub(crate) fn path(path: Path) -> Atom {
    match path {
        Path::Direct => atoms::direct(),
        Path::HolePunch => atoms::hole_punch(),
        Path::Relay(_) => atoms::relay(),
    }
}

/// The token that answers a message, as an Erlang term.
pub(crate) struct Token(pub(crate) ReplyToken);

#[rustler::resource_impl]
impl Resource for Token {}

pub(crate) fn dialect(dialect: Dialect) -> Atom {
    match dialect {
        Dialect::Macula => atoms::macula(),
        Dialect::MaculaPeer1 => atoms::macula_peer_1(),
    }
}

/// `{Ip, Port}` as in `inet`.
pub(crate) fn address(env: Env<'_>, address: SocketAddr) -> Term<'_> {
    let ip = match address.ip() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            (a, b, c, d).encode(env)
        }
        IpAddr::V6(ip) => {
            let [a, b, c, d, e, f, g, h] = ip.segments();
            rustler::types::tuple::make_tuple(env, &[a, b, c, d, e, f, g, h].map(|part| part.encode(env)))
        }
    };
    (ip, address.port()).encode(env)
}
