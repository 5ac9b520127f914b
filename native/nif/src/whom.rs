//! Whom a message is for: an endpoint, or `{node, NodeId, Ways}`.

use macula_peer::{Endpoint, EndpointError, EndpointRef, Engine, NodeId, Target, Ways};
use rustler::{Atom, Binary, Term};

use crate::atoms;
use crate::options::{self, InvalidOption};

/// Whom a message is for.
pub(crate) enum Whom<'a> {
    Endpoint(EndpointRef<'a>),
    Node(NodeId, Ways),
}

/// Why a term names nobody.
pub(crate) enum Misnamed<'a> {
    Endpoint(EndpointError),
    Node,
    Ways(InvalidOption<'a>),
}

/// What an endpoint's term says, kept while it is in use.
pub(crate) enum Text<'a> {
    Binary(Binary<'a>),
    String(Option<String>),
}

impl<'a> Text<'a> {
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

impl<'t> Whom<'t> {
    /// `text` is that of the term.
    pub(crate) fn read<'a>(term: Term<'a>, text: &'t Text<'a>) -> Result<Self, Misnamed<'a>> {
        if let Ok((_, name, ways)) = term.decode::<(Atom, Term<'_>, Term<'_>)>() {
            let node = node_id(name).ok_or(Misnamed::Node)?;
            return Ok(Self::Node(node, options::ways(ways).map_err(Misnamed::Ways)?));
        }
        text.endpoint().map(Self::Endpoint).map_err(Misnamed::Endpoint)
    }

    pub(crate) fn target(&self) -> Target<'_> {
        match self {
            Self::Endpoint(endpoint) => Target::Endpoint(endpoint.clone()),
            Self::Node(node, _) => Target::Node(node),
        }
    }

    /// What a caller has to do who waits: just that, or look up more ways to the node as well.
    pub(crate) fn wait(&self, engine: &Engine) -> Atom {
        match self {
            Self::Node(node, ways) if engine.learn(node, ways.clone()) => atoms::resolve(),
            _ => atoms::wait(),
        }
    }
}

pub(crate) fn node_id(term: Term<'_>) -> Option<NodeId> {
    NodeId::new(term.decode::<Binary<'_>>().ok()?.as_slice())
}

pub(crate) fn endpoint(term: Term<'_>) -> Option<Endpoint> {
    Text::of(term).endpoint().ok().map(|endpoint| endpoint.to_owned())
}
