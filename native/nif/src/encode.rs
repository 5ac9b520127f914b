//! From Erlang terms to a frame, in one walk and without a tree in between.
//!
//! The rules are those of the original's MessagePack library as macula 0.14.3 uses it; the vectors pin them.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};
use hashbrown::HashMap;
use macula_peer_wire::{EncodeError, FrameWriter, Limits, MessageType};
use rustler::schedule::consume_timeslice;
use rustler::sys::ErlNifTerm;
use rustler::{Atom, Binary, Encoder, Env, ListIterator, MapIterator, Term, TermType};

use crate::atoms::{self, TypeAtoms};

/// The work that a normal scheduler does on one message; larger messages go to a dirty one. A unit is one term, some 30
/// ns, so this is well below a millisecond.
pub(crate) const LIGHT_WORK: usize = 20_000;

/// Bytes copied for one unit of work. Copying a megabyte takes about a millisecond, most of it for new pages of memory.
const COPIED_PER_UNIT: usize = 64;

/// Code points of a string for one unit of work.
const CHARACTERS_PER_UNIT: usize = 4;

/// Names of atoms that are remembered per thread: more than the keys of any application's messages.
const MAX_NAMES: usize = 4096;

/// Frames up to this size are copied out of the thread's buffer, larger ones take it with them.
const COPIED_FRAME: usize = 4096;

/// One part of an arena: an unacknowledged frame keeps at most this much memory from being used again.
const ARENA_SIZE: usize = 64 << 10;

/// Why a message is not encoded.
pub(crate) enum Refusal<'a> {
    /// Not one of macula's message types.
    Type(Term<'a>),
    /// A required field is not there.
    Missing(Atom),
    /// The message is no map.
    NotAMap,
    /// The field's key or value has no MessagePack form.
    NotEncodable { field: Term<'a>, kind: Atom },
    /// The frame would be larger than this.
    TooLarge(usize),
    /// Containers are nested deeper than this.
    TooDeep(usize),
    /// There are more terms than this.
    TooManyTerms(usize),
    /// It is too much work for a normal scheduler.
    Heavy,
}

/// Where a message is encoded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    /// On a normal scheduler, which gets the work reported.
    Normal,
    Dirty,
}

/// A frame that is being encoded, and the work that may still go into it.
struct Walk<'w> {
    writer: FrameWriter<'w>,
    work: usize,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// Where small frames lie until they are acknowledged: two allocations less for each.
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    /// Names of atoms that were encoded before, by their terms, which never change: asking for a name costs as much as
    /// all the rest of a field.
    static NAMES: RefCell<HashMap<ErlNifTerm, Box<[u8]>>> = RefCell::new(HashMap::new());
}

/// Encodes a message.
pub(crate) fn frame<'a>(
    kind: Term<'a>,
    message: Term<'a>,
    limits: Limits,
    on: On,
) -> Result<(MessageType, Bytes), Refusal<'a>> {
    let known = Atom::from_term(kind).ok().and_then(atoms::message_type).ok_or(Refusal::Type(kind))?;
    let kind = known.kind;
    let fields = MapIterator::new(message).ok_or(Refusal::NotAMap)?;
    BUFFER.with_borrow_mut(|buffer| {
        let budget = if on == On::Normal { LIGHT_WORK } else { usize::MAX };
        let mut walk = Walk { writer: FrameWriter::new(buffer, kind, limits), work: budget };
        let mut field = message;
        let mut missing = known.fields.len();
        let mut visit = |key| {
            field = key;
            missing -= usize::from(known.fields.iter().any(|field| *field == key));
        };
        let walked = walk.fields(message, fields, &mut visit);
        let worked = budget - walk.work;
        if on == On::Normal && worked >= LIGHT_WORK / 100 {
            consume_timeslice(message.get_env(), (worked * 100 / LIGHT_WORK) as i32);
        }
        if missing > 0 {
            // Said before anything else that is wrong, as in the original.
            check_required(known, message)?;
        }
        walked.map_err(|failure| failure.refusal(field))?;
        walk.writer.finish().map_err(|error| Failure::Limit(error).refusal(field))?;
        Ok((kind, if buffer.len() <= COPIED_FRAME { copy(buffer) } else { std::mem::take(buffer).into() }))
    })
}

/// The frame in a part of the thread's arena.
fn copy(frame: &[u8]) -> Bytes {
    ARENA.with_borrow_mut(|arena| {
        if arena.capacity() < frame.len() {
            arena.reserve(ARENA_SIZE);
        }
        arena.extend_from_slice(frame);
        arena.split().freeze()
    })
}

/// The original takes atom keys; for some types also binary ones, if the first field is spelled so.
fn check_required<'a>(known: &TypeAtoms, message: Term<'a>) -> Result<(), Refusal<'a>> {
    let Some(first) = known.fields.first() else { return Ok(()) };
    let required = known.kind.required();
    let has_atom = |field: &Atom| message.map_get(*field).is_ok();
    let has_binary = |name: &str| message.map_get(BinaryKey(name)).is_ok();
    let binary = required.binary_keys && !has_atom(first) && has_binary(required.fields[0]);
    let mut both = known.fields.iter().zip(required.fields);
    match both.find(|(field, name)| if binary { !has_binary(name) } else { !has_atom(field) }) {
        Some((missing, _)) => Err(Refusal::Missing(*missing)),
        None => Ok(()),
    }
}

struct BinaryKey<'k>(&'k str);

impl Encoder for BinaryKey<'_> {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        rustler::NewBinary::from_slice(env, self.0.as_bytes()).into()
    }
}

enum Failure {
    Heavy,
    Kind(Atom),
    Limit(EncodeError),
}

impl Failure {
    fn refusal(self, field: Term<'_>) -> Refusal<'_> {
        match self {
            Self::Heavy => Refusal::Heavy,
            Self::Kind(kind) => Refusal::NotEncodable { field, kind },
            Self::Limit(EncodeError::TooLarge { max }) => Refusal::TooLarge(max),
            Self::Limit(EncodeError::TooDeep { max }) => Refusal::TooDeep(max),
            Self::Limit(EncodeError::TooManyTerms { max }) => Refusal::TooManyTerms(max),
            Self::Limit(EncodeError::NotFinite) => Refusal::NotEncodable { field, kind: atoms::float() },
        }
    }
}

impl From<EncodeError> for Failure {
    fn from(error: EncodeError) -> Self {
        Self::Limit(error)
    }
}

impl Walk<'_> {
    /// The top map; `visit` is told each key before it is written.
    fn fields<'a>(
        &mut self,
        message: Term<'a>,
        fields: MapIterator<'a>,
        visit: &mut impl FnMut(Term<'a>),
    ) -> Result<(), Failure> {
        self.writer.map(message.map_size().map_err(|_| Failure::Kind(atoms::other()))?)?;
        for (key, value) in fields {
            visit(key);
            self.term(key)?;
            self.term(value)?;
        }
        self.writer.end();
        Ok(())
    }

    fn spend(&mut self, units: usize) -> Result<(), Failure> {
        self.work = self.work.checked_sub(units).ok_or(Failure::Heavy)?;
        Ok(())
    }

    fn term<'a>(&mut self, term: Term<'a>) -> Result<(), Failure> {
        match self.begin(term)? {
            None => Ok(()),
            Some(container) => self.elements(container),
        }
    }

    /// Keeps open containers on the heap: a dirty scheduler's stack is too small for the depth that messages may have.
    fn elements<'a>(&mut self, container: Open<'a>) -> Result<(), Failure> {
        let mut open = vec![container];
        while let Some(innermost) = open.last_mut() {
            match innermost.next() {
                Some(term) => open.extend(self.begin(term)?),
                None => {
                    self.writer.end();
                    open.pop();
                }
            }
        }
        Ok(())
    }

    /// Writes a term, or the part of a container before its first element.
    #[inline]
    fn begin<'a>(&mut self, term: Term<'a>) -> Result<Option<Open<'a>>, Failure> {
        self.spend(1)?;
        match term.get_type() {
            TermType::Binary => self.binary(term)?,
            TermType::Integer => self.integer(term)?,
            TermType::Atom => self.atom(term)?,
            TermType::List => return self.list(term),
            TermType::Map => return self.map(term).map(Some),
            TermType::Float => self.writer.float(term.decode().map_err(|_| Failure::Kind(atoms::float()))?)?,
            TermType::Tuple => return Err(Failure::Kind(atoms::tuple())),
            TermType::Pid => return Err(Failure::Kind(atoms::pid())),
            TermType::Port => return Err(Failure::Kind(atoms::port())),
            TermType::Ref => return Err(Failure::Kind(atoms::reference())),
            TermType::Fun => return Err(Failure::Kind(atoms::function())),
            TermType::Unknown => return Err(Failure::Kind(atoms::other())),
        }
        Ok(None)
    }

    fn binary(&mut self, term: Term<'_>) -> Result<(), Failure> {
        let binary = Binary::from_term(term).map_err(|_| Failure::Kind(atoms::bitstring()))?;
        self.spend(binary.len() / COPIED_PER_UNIT)?;
        Ok(self.writer.bin(binary.as_slice())?)
    }

    fn integer(&mut self, term: Term<'_>) -> Result<(), Failure> {
        if let Ok(small) = term.decode::<i64>() {
            return Ok(self.writer.int(small)?);
        }
        match term.decode::<u64>() {
            Ok(large) => Ok(self.writer.uint(large)?),
            Err(_) => Err(Failure::Kind(atoms::integer_out_of_range())),
        }
    }

    fn atom(&mut self, term: Term<'_>) -> Result<(), Failure> {
        let Ok(atom) = Atom::from_term(term) else { return Err(Failure::Kind(atoms::other())) };
        if atom == atoms::null() {
            return Ok(self.writer.nil()?);
        }
        if atom == atoms::true_() || atom == atoms::false_() {
            return Ok(self.writer.bool(atom == atoms::true_())?);
        }
        NAMES.with_borrow_mut(|names| {
            if let Some(name) = names.get(&atom.as_c_arg()) {
                return Ok(self.writer.bin(name)?);
            }
            if names.len() == MAX_NAMES {
                names.clear();
            }
            let name = names.entry(atom.as_c_arg()).or_insert(name_of(term)?);
            Ok(self.writer.bin(name)?)
        })
    }

    /// `None`: it was a text.
    fn list<'a>(&mut self, term: Term<'a>) -> Result<Option<Open<'a>>, Failure> {
        if let Some(text) = self.as_text(term)? {
            self.writer.str(&text)?;
            return Ok(None);
        }
        let improper = || Failure::Kind(atoms::improper_list());
        let mut length = 0;
        let mut rest = term;
        while let Ok((_, tail)) = rest.list_get_cell() {
            length += 1;
            // Each element is at least a unit, and a long list takes time to count.
            if length > self.work {
                return Err(Failure::Heavy);
            }
            rest = tail;
        }
        if !rest.is_empty_list() {
            return Err(improper());
        }
        self.writer.array(length)?;
        Ok(Some(Open::List(term.into_list_iterator().map_err(|_| improper())?)))
    }

    /// The text of a list whose elements are all Unicode code points, the empty list being the empty text.
    fn as_text(&mut self, term: Term<'_>) -> Result<Option<String>, Failure> {
        let mut text = String::new();
        let mut rest = term;
        let mut characters = 0usize;
        while let Ok((head, tail)) = rest.list_get_cell() {
            let code_point = head.decode::<u32>().ok().filter(|_| head.get_type() == TermType::Integer);
            let Some(c) = code_point.and_then(char::from_u32) else { return Ok(None) };
            text.push(c);
            // Text that will not fit is not gathered.
            if text.len() > self.writer.room() {
                self.writer.str(&text)?;
            }
            characters += 1;
            if characters.is_multiple_of(CHARACTERS_PER_UNIT) {
                self.spend(1)?;
            }
            rest = tail;
        }
        if rest.is_empty_list() { Ok(Some(text)) } else { Err(Failure::Kind(atoms::improper_list())) }
    }

    fn map<'a>(&mut self, term: Term<'a>) -> Result<Open<'a>, Failure> {
        let (Ok(size), Some(pairs)) = (term.map_size(), MapIterator::new(term)) else {
            return Err(Failure::Kind(atoms::other()));
        };
        self.writer.map(size)?;
        Ok(Open::Map(Box::new(pairs), None))
    }
}

/// A container that is being written.
enum Open<'a> {
    List(ListIterator<'a>),
    /// The value of the last key comes next.
    Map(Box<MapIterator<'a>>, Option<Term<'a>>),
}

impl<'a> Open<'a> {
    fn next(&mut self) -> Option<Term<'a>> {
        match self {
            Self::List(elements) => elements.next(),
            Self::Map(pairs, value) => value.take().or_else(|| {
                let (key, of_key) = pairs.next()?;
                *value = Some(of_key);
                Some(key)
            }),
        }
    }
}

fn name_of(term: Term<'_>) -> Result<Box<[u8]>, Failure> {
    if let Ok(name) = term.atom_to_string() {
        return Ok(name.into_bytes().into());
    }
    // Up to OTP 25 a NIF gets names in Latin-1 only; the external term format has them in UTF-8: version 131, then
    // SMALL_ATOM_UTF8_EXT (119) with one byte of length, or ATOM_UTF8_EXT (118) with two.
    #[expect(clippy::disallowed_methods, reason = "messages are encoded on schedulers only")]
    let external = term.to_binary();
    match external.as_slice() {
        [131, 119, _, name @ ..] | [131, 118, _, _, name @ ..] => Ok(name.into()),
        _ => Err(Failure::Kind(atoms::other())),
    }
}
