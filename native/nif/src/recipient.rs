//! The recipient of a message: an endpoint, or `{node, NodeId, Candidates}`, where `Candidates` may be `none`.

use macula_peer::{Candidates, Endpoint, EndpointError, EndpointRef, Engine, Fingerprint, NodeId, Target};
use rustler::{Atom, Binary, Encoder, Env, Term};

use crate::atoms;
use crate::errors::{Reason, error};
use crate::options::{self, InvalidOption};

pub(crate) enum Recipient<'a> {
    Endpoint(EndpointRef<'a>),
    /// Without candidates, a message goes over an existing link or not at all.
    Node(NodeId, Option<Candidates>),
}

/// What is wrong with a term that should name a recipient.
pub(crate) enum InvalidRecipient<'a> {
    Endpoint(EndpointError),
    Relay(EndpointError),
    Node,
    Candidates(InvalidOption<'a>),
}

impl InvalidRecipient<'_> {
    /// `{error, Reason}`; `term` is the invalid term.
    pub(crate) fn error<'a>(&self, env: Env<'a>, term: Term<'a>) -> Term<'a> {
        match self {
            Self::Endpoint(invalid) => error(env, invalid),
            Self::Relay(invalid) => {
                let why = (atoms::relay_connect_failed(), invalid.reason(env));
                (atoms::error(), (atoms::nat_connection_failed(), why)).encode(env)
            }
            Self::Node => (atoms::error(), (atoms::invalid_node_id(), name(term))).encode(env),
            Self::Candidates(invalid) => error(env, invalid),
        }
    }
}

/// The text of an endpoint's term, which an [`EndpointRef`] borrows from.
pub(crate) enum EndpointText<'a> {
    Binary(Binary<'a>),
    String(Option<String>),
}

impl<'a> EndpointText<'a> {
    pub(crate) fn of(term: Term<'a>) -> Self {
        match term.decode() {
            Ok(binary) => Self::Binary(binary),
            Err(_) => Self::String(options::text(term)),
        }
    }

    fn endpoint(&self) -> Result<EndpointRef<'_>, EndpointError> {
        let text = match self {
            Self::Binary(binary) => std::str::from_utf8(binary.as_slice()).ok(),
            Self::String(text) => text.as_deref(),
        };
        EndpointRef::parse(text.ok_or(EndpointError::Format)?)
    }
}

impl<'t> Recipient<'t> {
    /// `text` is the text of `term`.
    pub(crate) fn read<'a>(term: Term<'a>, text: &'t EndpointText<'a>) -> Result<Self, InvalidRecipient<'a>> {
        if let Ok((_, name, candidates)) = term.decode::<(Atom, Term<'_>, Term<'_>)>() {
            let node = node_id(name).ok_or(InvalidRecipient::Node)?;
            let candidates = if atoms::none() == candidates { None } else { Some(self::candidates(candidates)?) };
            return Ok(Self::Node(node, candidates));
        }
        text.endpoint().map(Self::Endpoint).map_err(InvalidRecipient::Endpoint)
    }

    pub(crate) fn target(&self) -> Target<'_> {
        match self {
            Self::Endpoint(endpoint) => Target::Endpoint(endpoint.clone()),
            Self::Node(node, _) => Target::Node(node),
        }
    }

    /// The only key that the caller allows.
    pub(crate) fn key(&self) -> Option<Fingerprint> {
        match self {
            Self::Node(_, Some(candidates)) => candidates.key,
            _ => None,
        }
    }

    /// Tells the engine which candidates the caller has for a node. Returns what the caller must do if the message
    /// cannot leave at once: `wait`, or `resolve` to start a lookup and wait; `None` if it must first call again with
    /// candidates.
    pub(crate) fn prepare(&self, engine: &Engine) -> Option<Atom> {
        match self {
            Self::Endpoint(_) => Some(atoms::wait()),
            Self::Node(_, candidates) if candidates.is_none() => None,
            // The key is for this message alone.
            Self::Node(node, candidates) => {
                let candidates = Candidates { key: None, ..candidates.clone().unwrap_or_default() };
                match engine.learn_for(node, candidates, self.key()) {
                    true => Some(atoms::resolve()),
                    false => Some(atoms::wait()),
                }
            }
        }
    }
}

/// What is in the place of a node's id.
fn name(term: Term<'_>) -> Term<'_> {
    term.decode::<(Term<'_>, Term<'_>, Term<'_>)>().map_or(term, |(_, name, _)| name)
}

/// A node's candidates, from a map or list of options.
pub(crate) fn candidates(options: Term<'_>) -> Result<Candidates, InvalidRecipient<'_>> {
    let (mut candidates, mut bad_endpoint) = (Candidates::default(), None);
    let read = options::each(options, |key, value| {
        match key {
            key if key == atoms::endpoints() => {
                candidates.endpoints = all(value, InvalidRecipient::Endpoint, &mut bad_endpoint)?
            }
            key if key == atoms::relays() => {
                candidates.relays = all(value, InvalidRecipient::Relay, &mut bad_endpoint)?
            }
            key if key == atoms::last_resorts() => {
                candidates.last_resorts = all(value, InvalidRecipient::Relay, &mut bad_endpoint)?
            }
            key if key == atoms::hole_punch() => candidates.hole_punch = Some(value.decode().ok()?),
            key if key == atoms::fingerprint() => candidates.key = Some(options::fingerprint(value)?),
            _ => return None,
        }
        Some(())
    });
    match (bad_endpoint, read) {
        (Some(invalid), _) => Err(invalid),
        (None, Err(invalid)) => Err(InvalidRecipient::Candidates(invalid)),
        (None, Ok(())) => Ok(candidates),
    }
}

/// The endpoints in a list. If one is not valid, `bad_endpoint` says why.
fn all<'a>(
    list: Term<'a>,
    by: fn(EndpointError) -> InvalidRecipient<'a>,
    bad_endpoint: &mut Option<InvalidRecipient<'a>>,
) -> Option<Vec<Endpoint>> {
    let endpoints: Result<_, _> = options::proper_list(list)?
        .map(|term| EndpointText::of(term).endpoint().map(|endpoint| endpoint.to_owned()))
        .collect();
    endpoints.map_err(|invalid| *bad_endpoint = Some(by(invalid))).ok()
}

pub(crate) fn node_id(term: Term<'_>) -> Option<NodeId> {
    NodeId::new(term.decode::<Binary<'_>>().ok()?.as_slice())
}

pub(crate) fn endpoint(term: Term<'_>) -> Option<Endpoint> {
    EndpointText::of(term).endpoint().ok().map(|endpoint| endpoint.to_owned())
}
