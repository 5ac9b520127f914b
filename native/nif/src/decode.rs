//! From a frame to Erlang terms.

use std::ops::Range;

use macula_peer_wire::Build;
use rustler::{Binary, Encoder, Env, NewBinary, Term};

use crate::atoms;

/// Binaries up to this size live on the process heap; larger ones refer to the payload, if that is a binary itself.
const HEAP_BINARY: usize = 64;

/// Builds terms. Makes no atom but `true`, `false` and `null`.
pub(crate) struct Terms<'a> {
    env: Env<'a>,
    /// The payload as an Erlang binary, for binaries within it to refer to.
    payload: Option<Binary<'a>>,
}

impl<'a> Terms<'a> {
    pub(crate) fn new(env: Env<'a>, payload: Option<Binary<'a>>) -> Self {
        Self { env, payload }
    }
}

impl<'a> Build for Terms<'a> {
    type Term = Term<'a>;

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
        if let Ok(map) = Term::map_from_term_arrays(self.env, &keys, &values) {
            return map;
        }
        // A key came twice: the last one wins, as in the original.
        let pairs = keys.into_iter().zip(values);
        pairs.fold(Term::map_new(self.env), |map, (key, value)| map.map_put(key, value).unwrap_or(map))
    }
}
