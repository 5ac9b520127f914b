//! The only table from Rust's errors to Erlang's terms. Where the original has a term, it is kept.

use std::io;

use macula_peer::{
    ConnectError, EndpointError, IdentityError, KnownKeysError, ListenError, PemError, PunchError, PunchFailure,
    Rejection, ReplyError, RequestError, RouteError, SendError, StartError, TlsError, UndeliveredReason,
};
use macula_peer_wire::{FrameError, PayloadError};
use nix::errno::Errno;
use rustler::{Atom, Encoder, Env, NewBinary, Term};

use crate::atoms;
use crate::encode::Refusal;

/// An error that has a term.
pub(crate) trait Reason {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a>;
}

/// `{error, Reason}`.
pub(crate) fn error<'a>(env: Env<'a>, reason: &impl Reason) -> Term<'a> {
    (atoms::error(), reason.reason(env)).encode(env)
}

impl Reason for EndpointError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::Format => atoms::invalid_format(),
            Self::Port => atoms::invalid_port(),
        };
        (atoms::invalid_endpoint(), why).encode(env)
    }
}

impl Reason for ConnectError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        (atoms::connect_failed(), self.why(env)).encode(env)
    }
}

/// What is wrapped differently where it is told.
pub(crate) trait InnerReason {
    fn why<'a>(&self, env: Env<'a>) -> Term<'a>;
}

impl InnerReason for ConnectError {
    fn why<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Unresolved | Self::Unreachable | Self::NoRoute | Self::TimedOut => {
                atoms::transport_down().encode(env)
            }
            Self::OtherFamily => atoms::address_family_not_supported().encode(env),
            Self::Refused => atoms::connection_refused().encode(env),
            Self::NoProtocol => atoms::no_application_protocol().encode(env),
            Self::Untrusted => atoms::untrusted_peer().encode(env),
            Self::NotTrusted => atoms::rejected_by_peer().encode(env),
            Self::WrongNode => atoms::wrong_node().encode(env),
            Self::Handshake(text) => (atoms::handshake_failed(), binary(env, text)).encode(env),
        }
    }
}

impl Reason for RouteError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        (atoms::nat_connection_failed(), self.why(env)).encode(env)
    }
}

impl InnerReason for RouteError {
    fn why<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            // Whether other relays were meant is known to Erlang.
            Self::NoRelay => (atoms::no_relay_available(), atoms::no_bootstrap_peers()).encode(env),
            Self::Relay(error) => (atoms::relay_connect_failed(), error.why(env)).encode(env),
            Self::Setup(refusal) => (atoms::relay_setup_failed(), atoms::named(env, refusal.name())).encode(env),
            Self::Node(error) => error.reason(env),
        }
    }
}

impl InnerReason for PunchError {
    fn why<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Skipped => atoms::hole_punch_skipped().encode(env),
            Self::Failed(failure) => match failure {
                PunchFailure::BothHard => atoms::both_hard(),
                PunchFailure::NotAllowed => atoms::not_allowed(),
                PunchFailure::Busy => atoms::busy(),
                PunchFailure::Interrupted => atoms::interrupted(),
                PunchFailure::TimedOut | PunchFailure::Unwanted | PunchFailure::Unknown => atoms::timeout(),
            }
            .encode(env),
            Self::Relay(error) => (atoms::relay_connect_failed(), error.why(env)).encode(env),
            Self::Refused(refusal) => (atoms::relay_setup_failed(), atoms::named(env, refusal.name())).encode(env),
            Self::Connect(error) => error.reason(env),
        }
    }
}

impl Reason for SendError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::Connect(error) => return error.reason(env),
            Self::Route(error) => return error.reason(env),
            Self::Timeout => return atoms::timeout().encode(env),
            Self::NoRoom => atoms::timeout(),
            Self::Overloaded => atoms::overloaded(),
            Self::LinkLost => atoms::connection_closed(),
            Self::Stopped => atoms::connection_shutdown(),
        };
        (atoms::send_failed(), why).encode(env)
    }
}

impl Reason for RequestError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Send(error) => error.reason(env),
            Self::Timeout => atoms::timeout().encode(env),
            Self::LinkLost => atoms::connection_closed().encode(env),
            Self::Rejected(why) => (atoms::rejected(), why.why(env)).encode(env),
            Self::Malformed(error) => error.reason(env),
        }
    }
}

impl Reason for FrameError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::InvalidHeader => atoms::invalid_header().encode(env),
            Self::UnsupportedVersion(version) => (atoms::unsupported_version(), version).encode(env),
            Self::TooLarge { len, max } => (atoms::frame_too_large(), len, max).encode(env),
            Self::IncompletePayload => atoms::incomplete_payload().encode(env),
            Self::UnknownType(id) => (atoms::unknown_type(), id).encode(env),
            Self::Payload(error) => (atoms::msgpack_decode_error(), error.reason(env)).encode(env),
        }
    }
}

impl Reason for PayloadError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Incomplete => atoms::incomplete().encode(env),
            Self::TrailingBytes => atoms::not_just_binary().encode(env),
            Self::InvalidString(bytes) => (atoms::invalid_string(), bytes_term(env, bytes)).encode(env),
            Self::Extension(marker) => (atoms::badarg(), (atoms::bad_ext(), marker)).encode(env),
            Self::Reserved => (atoms::badarg(), 0xC1).encode(env),
            Self::Stopped => atoms::heavy().encode(env),
            Self::TooDeep { max } => (atoms::too_deep(), max).encode(env),
            Self::TooManyTerms { max } => (atoms::too_many_terms(), max).encode(env),
        }
    }
}

impl Reason for Refusal<'_> {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::Type(term) => return (atoms::invalid_message_type(), term.in_env(env)).encode(env),
            Self::Missing(field) => (atoms::missing_field(), *field).encode(env),
            Self::NotAMap => atoms::not_a_map().encode(env),
            Self::NotEncodable { field, kind } => (atoms::not_encodable(), field.in_env(env), *kind).encode(env),
            Self::TooLarge(max) => (atoms::too_large(), max).encode(env),
            Self::TooDeep(max) => (atoms::too_deep(), max).encode(env),
            Self::TooManyTerms(max) => (atoms::too_many_terms(), max).encode(env),
            Self::Heavy => return atoms::heavy().encode(env),
        };
        (atoms::invalid_message(), why).encode(env)
    }
}

impl Reason for StartError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::Bind(error) => posix(env, error),
            Self::GatewayPort(port) => (atoms::gateway_port(), port).encode(env),
            Self::Runtime(error) => posix(env, error),
            Self::Identity(error) => (atoms::identity_file(), error.reason(env)).encode(env),
            Self::PreviousIdentity { file, why } => {
                let why = (binary(env, &file.to_string_lossy()), why.reason(env));
                (atoms::previous_identity_files(), why).encode(env)
            }
            Self::KnownKeys(error) => (atoms::known_keys_file(), error.reason(env)).encode(env),
            Self::Tls(error) => error.reason(env),
        };
        (atoms::start_failed(), why).encode(env)
    }
}

impl Reason for IdentityError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Pem(PemError::File(error)) => posix(env, error),
            Self::Pem(PemError::NoKey) => atoms::not_a_key().encode(env),
            Self::Pem(PemError::EncryptedKey) => atoms::encrypted_key().encode(env),
            Self::Pem(PemError::UnsupportedKey) => atoms::unsupported_key().encode(env),
            Self::Pem(error) => (atoms::bad_certificate(), binary(env, &error.to_string())).encode(env),
            Self::InsecurePermissions { .. } => atoms::insecure_permissions().encode(env),
            Self::ForeignOwner { owner } => (atoms::foreign_owner(), owner).encode(env),
            Self::NotPkcs8 => atoms::not_pkcs8().encode(env),
            Self::NotMade(_) => binary(env, &self.to_string()),
        }
    }
}

impl Reason for KnownKeysError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::File(error) => posix(env, error),
            Self::InsecurePermissions { .. } => atoms::insecure_permissions().encode(env),
            Self::ForeignOwner { owner } => (atoms::foreign_owner(), owner).encode(env),
            Self::InUse => atoms::in_use().encode(env),
            Self::NotKnownKeys => atoms::not_known_keys().encode(env),
            Self::BadLine(line) => (atoms::bad_line(), line).encode(env),
        }
    }
}

impl Reason for TlsError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        let why = match self {
            Self::CaFile(error) => posix(env, error),
            Self::NotACertificate => atoms::not_a_certificate().encode(env),
            Self::Library(_) | Self::Cipher(_) => return binary(env, &self.to_string()),
        };
        (atoms::cacertfile(), why).encode(env)
    }
}

impl Reason for ListenError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::AlreadyListening => atoms::already_listening().encode(env),
            Self::Bind(error) => (atoms::listen_failed(), posix(env, error)).encode(env),
            Self::GatewayPort(port) => (atoms::listen_failed(), (atoms::gateway_port(), port)).encode(env),
            Self::Certificate { .. } => (atoms::bad_certificate(), binary(env, &self.to_string())).encode(env),
            Self::Tls(error) => (atoms::listen_failed(), error.reason(env)).encode(env),
        }
    }
}

impl Reason for ReplyError {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::AlreadyReplied => atoms::already_replied(),
            Self::Gone => atoms::gone(),
        }
        .encode(env)
    }
}

impl Reason for UndeliveredReason {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::Rejected(why) => return (atoms::rejected(), why.why(env)).encode(env),
            Self::Expired => atoms::expired(),
            Self::LinkLost => atoms::connection_closed(),
            Self::SessionLost => atoms::session_lost(),
            Self::Untrusted => atoms::untrusted_peer(),
            Self::Stopped => atoms::stopped(),
        }
        .encode(env)
    }
}

impl InnerReason for Rejection {
    fn why<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self {
            Self::TooLarge => atoms::too_large(),
            Self::TooDeep => atoms::too_deep(),
            Self::TooManyTerms => atoms::too_many_terms(),
            Self::Malformed => atoms::malformed(),
            Self::TooSlow => atoms::too_slow(),
            Self::Unread => atoms::unread(),
        }
        .encode(env)
    }
}

/// The name of an error of the operating system, as in `inet:posix()`; its text where it has no name.
fn posix<'a>(env: Env<'a>, error: &io::Error) -> Term<'a> {
    let named = error.raw_os_error().map(Errno::from_raw).filter(|&errno| errno != Errno::UnknownErrno);
    // Names come from a table of constants, so the number of atoms is bounded.
    let atom = named.and_then(|errno| Atom::from_str(env, &format!("{errno:?}").to_lowercase()).ok());
    atom.map_or_else(|| binary(env, &error.to_string()), |atom| atom.encode(env))
}

pub(crate) fn binary<'a>(env: Env<'a>, text: &str) -> Term<'a> {
    bytes_term(env, text.as_bytes())
}

pub(crate) fn bytes_term<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    NewBinary::from_slice(env, bytes).into()
}
