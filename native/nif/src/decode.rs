//! From a frame to Erlang terms.
//!
//! This runs on the runtime's threads, which may not build every map ([`crate::non_scheduler`]). A map that they may
//! not build is left *unfinished*: the tuple `{map, [{Key, Value}]}`. Nothing from the network can look like that,
//! because MessagePack has no tuples. `macula_peer_finisher:finish/1` makes it a map, in a process.

use std::ops::Range;

use macula_peer_wire::{Build, Limits, PayloadError, decode_payload};
use rustler::{Binary, Encoder, Env, NewBinary, Term, TermType};

use crate::atoms;
use crate::encode::LIGHT_WORK;
use crate::non_scheduler::flat_map;

/// Binaries up to this size live on the process heap; larger ones refer to the payload, if that is a binary itself.
const HEAP_BINARY: usize = 64;

/// Payloads from this size on are copied once, as a whole, and the binaries in them refer to the copy.
const SHARED_PAYLOAD: usize = 16 << 10;

/// A payload as a term.
pub(crate) enum Decoded<'a> {
    Finished(Term<'a>),
    /// It contains an unfinished map, or is one.
    Unfinished(Term<'a>),
}

/// Decodes a payload that is not an Erlang binary.
pub(crate) fn payload<'a>(env: Env<'a>, payload: &[u8], limits: Limits) -> Result<Decoded<'a>, PayloadError> {
    let shared = (payload.len() >= SHARED_PAYLOAD).then(|| NewBinary::from_slice(env, payload).into());
    let mut terms = Terms::new(env, shared);
    let term = decode_payload(payload, limits, &mut terms)?;
    Ok(terms.decoded(term))
}

/// Builds terms. Makes no atom but `true`, `false` and `null`.
pub(crate) struct Terms<'a> {
    env: Env<'a>,
    /// The payload as an Erlang binary, for binaries within it to refer to.
    payload: Option<Binary<'a>>,
    empty_map: Option<Term<'a>>,
    unfinished: bool,
    /// Terms that may still be built.
    left: usize,
}

impl<'a> Terms<'a> {
    pub(crate) fn new(env: Env<'a>, payload: Option<Binary<'a>>) -> Self {
        Self { env, payload, empty_map: None, unfinished: false, left: usize::MAX }
    }

    /// Stops if there are too many terms for a normal scheduler.
    pub(crate) fn light(self) -> Self {
        Self { left: LIGHT_WORK, ..self }
    }

    /// The term that was built of a whole payload.
    pub(crate) fn decoded(self, term: Term<'a>) -> Decoded<'a> {
        if self.unfinished { Decoded::Unfinished(term) } else { Decoded::Finished(term) }
    }
}

impl<'a> Build for Terms<'a> {
    type Term = Term<'a>;

    fn goes_on(&mut self, values: usize) -> bool {
        let left = self.left.checked_sub(values);
        self.left = left.unwrap_or(0);
        left.is_some()
    }

    fn nil(&mut self) -> Term<'a> {
        atoms::null().to_term(self.env)
    }

    fn bool(&mut self, value: bool) -> Term<'a> {
        if value { atoms::true_() } else { atoms::false_() }.to_term(self.env)
    }

    fn uint(&mut self, value: u64) -> Term<'a> {
        value.encode(self.env)
    }

    fn int(&mut self, value: i64) -> Term<'a> {
        value.encode(self.env)
    }

    fn float(&mut self, value: f64) -> Term<'a> {
        value.encode(self.env)
    }

    fn bin(&mut self, range: Range<usize>, bytes: &[u8]) -> Term<'a> {
        let shared = self.payload.filter(|_| bytes.len() > HEAP_BINARY);
        match shared.and_then(|payload| payload.make_subbinary(range.start, range.len()).ok()) {
            Some(part) => part.to_term(self.env),
            None => NewBinary::from_slice(self.env, bytes).into(),
        }
    }

    fn str(&mut self, text: &str) -> Term<'a> {
        text.chars().rev().fold(Term::list_new_empty(self.env), |list, c| list.list_prepend(u32::from(c)))
    }

    fn array(&mut self, items: Vec<Term<'a>>) -> Term<'a> {
        items.encode(self.env)
    }

    fn map(&mut self, keys: Vec<Term<'a>>, values: Vec<Term<'a>>) -> Term<'a> {
        if keys.is_empty() {
            // One byte on the wire is 40 in memory.
            return *self.empty_map.get_or_insert_with(|| Term::map_new(self.env));
        }
        // Keys that are not finished cannot be compared.
        let comparable = !(self.unfinished && keys.iter().any(is_container));
        let flat = if comparable { flat_map(self.env, &keys, &values) } else { None };
        flat.unwrap_or_else(|| {
            self.unfinished = true;
            let pairs: Vec<_> = keys.into_iter().zip(values).collect();
            (atoms::map(), pairs).encode(self.env)
        })
    }
}

fn is_container(term: &Term<'_>) -> bool {
    matches!(term.get_type(), TermType::List | TermType::Map | TermType::Tuple)
}
