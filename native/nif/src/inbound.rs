//! What arrives: one message each to the handler process.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};

use macula_peer::{
    Dialect, Event, Failures, Fallback, Handler, Inbound, NotTaken, Path, PeerName, Registration, ReplyToken, Unhandled,
};
use macula_peer_wire::{Limits, PayloadError, decode_payload};
use rustler::{Atom, Encoder, Env, LocalPid, NewBinary, OwnedEnv, Resource, ResourceArc, Term};

use crate::atoms;
use crate::decode::Terms;
use crate::errors::{Reason, Why, binary, bytes_term};
use crate::nat;

/// Payloads from this size on are copied once, as a whole, and the binaries in them refer to the copy.
const SHARED_PAYLOAD: usize = 16 << 10;

thread_local! {
    /// Making an environment costs as much as a small message.
    static ENV: RefCell<OwnedEnv> = RefCell::new(OwnedEnv::new());
}

/// The process that gets what arrives.
pub(crate) struct Process {
    pub(crate) pid: LocalPid,
    pub(crate) limits: Limits,
}

impl Handler for Process {
    fn message(&self, inbound: Inbound) -> Result<(), Unhandled> {
        let Inbound { kind, payload, from, path, dialect, key, reply } = inbound;
        send(&self.pid, |env| {
            let message = decode(env, &payload, self.limits)?;
            let reply = match reply {
                Some(token) => ResourceArc::new(Token(token)).encode(env),
                None => atoms::none().encode(env),
            };
            let dialect = self::dialect(dialect);
            let key = match key {
                Some(key) => bytes_term(env, key.as_bytes()),
                None => atoms::undefined().encode(env),
            };
            let fields: [(Atom, Term<'_>); 7] = [
                (atoms::type_(), atoms::name_of(kind).encode(env)),
                (atoms::message(), message),
                (atoms::from(), address(env, from)),
                (atoms::path(), self::path(path).encode(env)),
                (atoms::dialect(), dialect.encode(env)),
                (atoms::key(), key),
                (atoms::reply_to(), reply),
            ];
            Ok((atoms::macula_peer_message(), map(env, &fields)).encode(env))
        })
    }

    fn event(&self, event: Event) -> bool {
        send(&self.pid, |env| Ok((atoms::macula_peer_event(), map(env, &fields(env, &event))).encode(env))).is_ok()
    }
}

/// The process `macula_gateway`, where it runs and listens nowhere that this library knows of.
pub(crate) struct Cast {
    pub(crate) limits: Limits,
}

impl Fallback for Cast {
    /// `gen_server:cast(macula_gateway, {route_message, Type, Msg, Stream, {ok, {Ip, Port}}})`. It may act on the message,
    /// but an answer on this stream, which is no quicer stream, is an error to the one who tries; the sender is told that
    /// there will be none.
    fn message(&self, inbound: Inbound) -> Result<(), NotTaken> {
        let Some(gateway) = ENV.with_borrow(|own| own.run(|env| env.whereis_pid(atoms::macula_gateway()))) else {
            return Err(NotTaken::Absent(Box::new(inbound)));
        };
        let sent = send(&gateway, |env| {
            let message = decode(env, &inbound.payload, self.limits)?;
            let from = (atoms::ok(), address(env, inbound.from));
            let route = (atoms::route_message(), atoms::name_of(inbound.kind), message, env.make_ref(), from);
            Ok((atoms::gen_cast(), route).encode(env))
        });
        match sent {
            Ok(()) => Ok(()),
            Err(Unhandled::Malformed(error)) => Err(NotTaken::Malformed(error)),
            Err(_) => Err(NotTaken::Absent(Box::new(inbound))),
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

/// Why paths could not be had.
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

fn decode<'a>(env: Env<'a>, payload: &[u8], limits: Limits) -> Result<Term<'a>, PayloadError> {
    let shared = (payload.len() >= SHARED_PAYLOAD).then(|| NewBinary::from_slice(env, payload).into());
    decode_payload(payload, limits, &mut Terms::new(env, shared))
}

fn send(to: &LocalPid, build: impl for<'a> FnOnce(Env<'a>) -> Result<Term<'a>, Unhandled>) -> Result<(), Unhandled> {
    ENV.with_borrow_mut(|own| {
        let built = own.run(|env| build(env).map(|message| own.save(message)));
        match built {
            Ok(message) => own.send_and_clear(to, |env| message.load(env)).map_err(|_| Unhandled::NoHandler),
            Err(error) => {
                own.clear();
                Err(error)
            }
        }
    })
}

/// The way to answer a message, as an Erlang term.
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

/// A map of fields whose names differ.
pub(crate) fn map<'a>(env: Env<'a>, fields: &[(Atom, Term<'a>)]) -> Term<'a> {
    let (names, values): (Vec<_>, Vec<_>) = fields.iter().map(|(name, value)| (name.to_term(env), *value)).unzip();
    Term::map_from_term_arrays(env, &names, &values).unwrap_or_else(|_| Term::map_new(env))
}
