//! Payloads that are maps with binaries as keys and texts, as macula's are. serde and rmp-serde read and write the values;
//! serde's derive would write keys and texts as strings.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};

use bytes::{Bytes, BytesMut};
use macula_peer_wire::{Limits, MessageType, PayloadError, check_payload};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, SeqAccess, Visitor};
use serde::ser::Serialize;

use super::session::put_header;

/// The most elements of a list.
pub(crate) const MAX_LISTED: usize = 16;

/// A missing field is read from this, so that an `Option` becomes `None` and every other type is an error.
const NIL: &[u8] = &[0xC0];

/// The field is missing where it must be, or is not what it must be.
#[derive(Debug)]
pub(crate) struct BadField(pub(crate) &'static str);

/// The keys of a map, and the MessagePack of their values. Keys that are not binaries are left out.
pub(crate) struct Map<'a>(Vec<(&'a [u8], &'a [u8])>);

impl<'a> Map<'a> {
    /// `None`: the payload is not a map.
    pub(crate) fn split(payload: &'a [u8], limits: Limits) -> Result<Option<Self>, PayloadError> {
        check_payload(payload, limits)?;
        Ok(Self::pairs(payload))
    }

    fn pairs(mut payload: &'a [u8]) -> Option<Self> {
        let len = rmp::decode::read_map_len(&mut payload).ok()?;
        let mut pairs = Vec::new();
        for _ in 0..len {
            let (key, value) = (split_value(&mut payload)?, split_value(&mut payload)?);
            if let Ok(Bin(key)) = rmp_serde::from_slice(key) {
                pairs.push((key, value));
            }
        }
        Some(Self(pairs))
    }

    /// The MessagePack of a value. Of equal keys the last counts, as everywhere in macula.
    pub(crate) fn raw(&self, key: &str) -> Option<&'a [u8]> {
        self.0.iter().rfind(|(name, _)| *name == key.as_bytes()).map(|(_, value)| *value)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.raw(key).is_some()
    }

    /// No field may be nil.
    pub(crate) fn value<T: Deserialize<'a>>(&self, key: &'static str) -> Result<T, BadField> {
        match self.raw(key) {
            Some(NIL) => Err(BadField(key)),
            value => rmp_serde::from_slice(value.unwrap_or(NIL)).map_err(|_| BadField(key)),
        }
    }

    pub(crate) fn bin<T: Binary<'a>>(&self, key: &'static str) -> Result<T, BadField> {
        self.value(key).map(|Bin(value)| value)
    }

    pub(crate) fn optional_bin<T: Binary<'a>>(&self, key: &'static str) -> Result<Option<T>, BadField> {
        if self.has(key) { self.bin(key).map(Some) } else { Ok(None) }
    }

    pub(crate) fn list<T: Deserialize<'a>>(&self, key: &'static str) -> Result<Vec<T>, BadField> {
        self.value(key).map(|List(elements)| elements)
    }

    pub(crate) fn bins<T: Binary<'a>>(&self, key: &'static str) -> Result<Vec<T>, BadField> {
        Ok(self.list(key)?.into_iter().map(|Bin(element)| element).collect())
    }
}

/// Cuts the first value off.
fn split_value<'a>(payload: &mut &'a [u8]) -> Option<&'a [u8]> {
    let all = *payload;
    IgnoredAny::deserialize(&mut rmp_serde::Deserializer::new(&mut *payload)).ok()?;
    all.get(..all.len() - payload.len())
}

/// A map while it is written.
#[derive(Default)]
pub(crate) struct MapWriter {
    len: u32,
    pairs: Vec<u8>,
}

impl MapWriter {
    pub(crate) fn value(self, key: &str, value: &(impl Serialize + ?Sized)) -> Self {
        self.raw(key, &msgpack(value))
    }

    pub(crate) fn bin<'a>(self, key: &str, value: &impl Binary<'a>) -> Self {
        self.value(key, serde_bytes::Bytes::new(&value.to_binary()))
    }

    /// `None` is left out.
    pub(crate) fn optional_bin<'a>(self, key: &str, value: Option<&impl Binary<'a>>) -> Self {
        match value {
            Some(value) => self.bin(key, value),
            None => self,
        }
    }

    pub(crate) fn bins<'a>(self, key: &str, values: &[impl Binary<'a>]) -> Self {
        let values = values.iter().map(|value| serde_bytes::ByteBuf::from(value.to_binary()));
        self.value(key, &values.collect::<Vec<_>>())
    }

    /// A value that is MessagePack already.
    pub(crate) fn raw(mut self, key: &str, value: &[u8]) -> Self {
        self.len += 1;
        self.pairs.extend(msgpack(serde_bytes::Bytes::new(key.as_bytes())));
        self.pairs.extend_from_slice(value);
        self
    }

    #[expect(clippy::expect_used, reason = "a vector takes all")]
    pub(crate) fn frame(self, kind: MessageType) -> Bytes {
        let mut map = Vec::new();
        rmp::encode::write_map_len(&mut map, self.len).expect("a length can be written");
        let mut frame = BytesMut::new();
        put_header(&mut frame, kind.id(), map.len() + self.pairs.len());
        frame.extend_from_slice(&map);
        frame.extend_from_slice(&self.pairs);
        frame.freeze()
    }
}

#[expect(clippy::expect_used, reason = "a vector takes all, and no value is of unknown length")]
fn msgpack(value: &(impl Serialize + ?Sized)) -> Vec<u8> {
    rmp_serde::to_vec(value).expect("a value can be written")
}

/// What is a binary on the wire, macula's form of text.
pub(crate) trait Binary<'a>: Sized {
    fn to_binary(&self) -> Cow<'_, [u8]>;

    fn from_binary(bytes: &'a [u8]) -> Option<Self>;
}

impl<'a> Binary<'a> for &'a [u8] {
    fn to_binary(&self) -> Cow<'_, [u8]> {
        (*self).into()
    }

    fn from_binary(bytes: &'a [u8]) -> Option<Self> {
        Some(bytes)
    }
}

impl Binary<'_> for Bytes {
    fn to_binary(&self) -> Cow<'_, [u8]> {
        (&**self).into()
    }

    fn from_binary(bytes: &[u8]) -> Option<Self> {
        Some(Self::copy_from_slice(bytes))
    }
}

impl<const LEN: usize> Binary<'_> for [u8; LEN] {
    fn to_binary(&self) -> Cow<'_, [u8]> {
        self.into()
    }

    fn from_binary(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok()
    }
}

macro_rules! text {
    ($($type:ty),*) => {$(
        impl Binary<'_> for $type {
            fn to_binary(&self) -> Cow<'_, [u8]> {
                self.to_string().into_bytes().into()
            }

            fn from_binary(bytes: &[u8]) -> Option<Self> {
                str::from_utf8(bytes).ok()?.parse().ok()
            }
        }
    )*};
}

text!(IpAddr, SocketAddr);

struct Bin<T>(T);

impl<'de, T: Binary<'de>> Deserialize<'de> for Bin<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<T>(PhantomData<T>);

        impl<'de, T: Binary<'de>> Visitor<'de> for Read<T> {
            type Value = Bin<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a binary")
            }

            fn visit_borrowed_bytes<E: Error>(self, bytes: &'de [u8]) -> Result<Bin<T>, E> {
                T::from_binary(bytes).map(Bin).ok_or_else(|| E::custom("a binary with another content"))
            }
        }

        deserializer.deserialize_any(Read(PhantomData))
    }
}

/// Elements, at most [`MAX_LISTED`].
struct List<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Read<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_LISTED} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<List<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(element) = elements.next_element()? {
                    if list.len() == MAX_LISTED {
                        return Err(A::Error::invalid_length(MAX_LISTED + 1, &self));
                    }
                    list.push(element);
                }
                Ok(List(list))
            }
        }

        // A requested sequence might be a binary too.
        deserializer.deserialize_any(Read(PhantomData))
    }
}
