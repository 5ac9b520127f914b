//! Signals: small authenticated datagrams that share the UDP socket with QUIC.
//!
//! A signal begins with a byte that no QUIC packet begins with, and ends with a code that only the two ends of it can make:
//! they share a secret, which a relay has given them over an authenticated connection. What is not verified says nothing
//! but which secret it claims.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::ops::Deref;

use ring::hmac;
use ring::rand::SecureRandom;
use subtle::ConstantTimeEq;

/// Which side of a punch a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It asked for the direct path, chooses it, and makes the connection.
    Initiator,
    Responder,
}

/// What every signal begins with. QUIC's packets have one of the two highest bits set.
pub const FIRST_BYTE: u8 = 0x08;

/// The longest signal.
pub const MAX_LEN: usize = HEADER_LEN + PROBE_LEN + MAC_LEN;

/// The first byte, the kind, the id and the nonce.
const HEADER_LEN: usize = 18;

/// 128 of HMAC-SHA256's 256 bits: an attacker that guesses has as many tries as packets arrive.
const MAC_LEN: usize = 16;

/// A request is as long as its answer, so that a relay amplifies nothing.
const PROBE_LEN: usize = 18;

const ROLE_LEN: usize = 1;

/// Length of a secret.
pub const SECRET_LEN: usize = 32;

/// What the two ends of signals share.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_LEN]);

impl Secret {
    /// A new one. `None`: the system has no random numbers.
    pub fn generate(random: &dyn SecureRandom) -> Option<Self> {
        let mut bytes = [0; SECRET_LEN];
        random.fill(&mut bytes).ok()?;
        Some(Self(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }
}

impl From<[u8; SECRET_LEN]> for Secret {
    fn from(bytes: [u8; SECRET_LEN]) -> Self {
        Self(bytes)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Makes and checks the codes.
#[derive(Debug, Clone)]
pub struct Key(hmac::Key);

impl From<&Secret> for Key {
    fn from(secret: &Secret) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()))
    }
}

impl Key {
    fn mac(&self, bytes: &[u8]) -> [u8; MAC_LEN] {
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&hmac::sign(&self.0, bytes).as_ref()[..MAC_LEN]);
        mac
    }
}

/// One signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal {
    /// Which secret it is made with.
    pub id: u64,
    /// An answer has the nonce of what it answers.
    pub nonce: u64,
    pub body: Body,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// A node asks a relay at which address it sees the sender.
    ProbeRequest {
        from: AnswerFrom,
        /// Where to send the answer, on the IP address that the node is registered from. `None`: where the request came
        /// from.
        to_port: Option<NonZeroU16>,
    },
    /// Where the request came from.
    ProbeReply { observed: SocketAddr },
    /// A node looks for a path to another one. Its role is included, so that a ping is not taken for the other's when
    /// it comes back.
    Ping { sender: Role },
    /// The answer to a ping.
    Pong { sender: Role },
}

/// From where the relay is to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerFrom {
    /// Where it got the request.
    Same,
    /// The other port.
    OtherPort,
    /// The other address, if it has one.
    OtherAddress,
}

impl AnswerFrom {
    const ALL: [Self; 3] = [Self::Same, Self::OtherPort, Self::OtherAddress];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalKind {
    ProbeRequest,
    ProbeReply,
    Ping,
    Pong,
}

impl SignalKind {
    fn from_number(number: u8) -> Option<Self> {
        [Self::ProbeRequest, Self::ProbeReply, Self::Ping, Self::Pong].into_iter().find(|kind| kind.number() == number)
    }

    fn number(self) -> u8 {
        match self {
            Self::ProbeRequest => 1,
            Self::ProbeReply => 2,
            Self::Ping => 3,
            Self::Pong => 4,
        }
    }

    fn body_len(self) -> usize {
        match self {
            Self::ProbeRequest | Self::ProbeReply => PROBE_LEN,
            Self::Ping | Self::Pong => ROLE_LEN,
        }
    }
}

/// The bytes of a signal.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    bytes: [u8; MAX_LEN],
    len: usize,
}

impl Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Signal {
    pub fn encode(&self, key: &Key) -> Encoded {
        let kind = self.body.kind();
        let signed = HEADER_LEN + kind.body_len();
        let mut bytes = [0; MAX_LEN];
        bytes[..2].copy_from_slice(&[FIRST_BYTE, kind.number()]);
        bytes[2..10].copy_from_slice(&self.id.to_be_bytes());
        bytes[10..18].copy_from_slice(&self.nonce.to_be_bytes());
        self.body.put(&mut bytes[HEADER_LEN..signed]);
        let mac = key.mac(&bytes[..signed]);
        bytes[signed..signed + MAC_LEN].copy_from_slice(&mac);
        Encoded { bytes, len: signed + MAC_LEN }
    }
}

/// What has the form of a signal.
#[derive(Debug, Clone, Copy)]
pub struct Unverified<'a> {
    kind: SignalKind,
    bytes: &'a [u8],
}

impl<'a> Unverified<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let &[FIRST_BYTE, kind, ..] = bytes else { return None };
        let kind = SignalKind::from_number(kind)?;
        (bytes.len() == HEADER_LEN + kind.body_len() + MAC_LEN).then_some(Self { kind, bytes })
    }

    pub fn kind(&self) -> SignalKind {
        self.kind
    }

    /// Which secret it claims to be made with.
    pub fn id(&self) -> u64 {
        self.number(2)
    }

    /// What it claims to answer.
    pub fn nonce(&self) -> u64 {
        self.number(10)
    }

    /// What it says, if it was made with this key.
    pub fn verify(&self, key: &Key) -> Option<Signal> {
        let (signed, mac) = self.bytes.split_at(self.bytes.len() - MAC_LEN);
        if !bool::from(key.mac(signed).ct_eq(mac)) {
            return None;
        }
        let body = Body::get(self.kind, &signed[HEADER_LEN..])?;
        Some(Signal { id: self.id(), nonce: self.nonce(), body })
    }

    fn number(&self, at: usize) -> u64 {
        self.bytes[at..at + 8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }
}

impl Body {
    fn kind(&self) -> SignalKind {
        match self {
            Self::ProbeRequest { .. } => SignalKind::ProbeRequest,
            Self::ProbeReply { .. } => SignalKind::ProbeReply,
            Self::Ping { .. } => SignalKind::Ping,
            Self::Pong { .. } => SignalKind::Pong,
        }
    }

    /// Into as many zeros as its kind has bytes.
    fn put(&self, to: &mut [u8]) {
        match *self {
            Self::ProbeRequest { from, to_port } => {
                to[0] = from as u8;
                to[1..3].copy_from_slice(&to_port.map_or(0, NonZeroU16::get).to_be_bytes());
            }
            Self::ProbeReply { observed } => {
                let ip = match observed.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                to[..16].copy_from_slice(&ip.octets());
                to[16..].copy_from_slice(&observed.port().to_be_bytes());
            }
            Self::Ping { sender } | Self::Pong { sender } => to[0] = sender as u8,
        }
    }

    /// `from` has the length of its kind.
    fn get(kind: SignalKind, from: &[u8]) -> Option<Self> {
        let port = |at: usize| u16::from_be_bytes([from[at], from[at + 1]]);
        let sender = || [Role::Initiator, Role::Responder].into_iter().find(|&role| role as u8 == from[0]);
        match kind {
            SignalKind::ProbeRequest => {
                let to_port = NonZeroU16::new(port(1));
                let from = AnswerFrom::ALL.into_iter().find(|&known| known as u8 == from[0])?;
                Some(Self::ProbeRequest { from, to_port })
            }
            SignalKind::ProbeReply => {
                let ip: [u8; 16] = from[..16].try_into().ok()?;
                Some(Self::ProbeReply { observed: (Ipv6Addr::from(ip).to_canonical(), port(16)).into() })
            }
            SignalKind::Ping => Some(Self::Ping { sender: sender()? }),
            SignalKind::Pong => Some(Self::Pong { sender: sender()? }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> Key {
        Key::from(&Secret::from([byte; SECRET_LEN]))
    }

    fn role() -> impl Strategy<Value = Role> {
        prop::sample::select(vec![Role::Initiator, Role::Responder])
    }

    fn body() -> impl Strategy<Value = Body> {
        let from = prop::sample::select(AnswerFrom::ALL.to_vec());
        let request =
            (from, any::<u16>()).prop_map(|(from, port)| Body::ProbeRequest { from, to_port: NonZeroU16::new(port) });
        let v4 = any::<([u8; 4], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port)));
        let v6 = any::<([u16; 8], u16)>().prop_map(|(ip, port)| (IpAddr::from(ip).to_canonical(), port).into());
        let reply = prop_oneof![v4, v6].prop_map(|observed| Body::ProbeReply { observed });
        let ping = role().prop_map(|sender| Body::Ping { sender });
        let pong = role().prop_map(|sender| Body::Pong { sender });
        prop_oneof![request, reply, ping, pong]
    }

    fn signal() -> impl Strategy<Value = Signal> {
        (any::<u64>(), any::<u64>(), body()).prop_map(|(id, nonce, body)| Signal { id, nonce, body })
    }

    proptest! {
        #[test]
        fn signals_come_back_as_they_were(signal in signal()) {
            let encoded = signal.encode(&key(1));
            let unverified = Unverified::parse(&encoded).unwrap();
            prop_assert_eq!((unverified.id(), unverified.kind()), (signal.id, signal.body.kind()));
            prop_assert_eq!(unverified.verify(&key(1)), Some(signal));
        }

        #[test]
        fn one_bit_more_or_less_and_another_key_are_refused(signal in signal(), bit in any::<prop::sample::Index>()) {
            let encoded = signal.encode(&key(1));
            prop_assert_eq!(Unverified::parse(&encoded).unwrap().verify(&key(2)), None);
            let mut changed = encoded.to_vec();
            let bit = bit.index(changed.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Unverified::parse(&changed).and_then(|signal| signal.verify(&key(1))), None);
        }

        #[test]
        fn any_bytes_are_refused(mut bytes in vec(any::<u8>(), 0..2 * MAX_LEN), kind in 0..6u8) {
            prop_assert!(Unverified::parse(&bytes).and_then(|signal| signal.verify(&key(1))).is_none());
            if let [first, second, ..] = &mut bytes[..] {
                (*first, *second) = (FIRST_BYTE, kind);
            }
            prop_assert!(Unverified::parse(&bytes).and_then(|signal| signal.verify(&key(1))).is_none());
        }

        #[test]
        fn with_the_key_any_content_decodes(mut bytes in vec(any::<u8>(), HEADER_LEN..=HEADER_LEN + PROBE_LEN), kind in 0..6u8) {
            (bytes[0], bytes[1]) = (FIRST_BYTE, kind);
            let mac = key(1).mac(&bytes);
            bytes.extend(mac);
            if let Some(signal) = Unverified::parse(&bytes).and_then(|signal| signal.verify(&key(1))) {
                let again = signal.encode(&key(1));
                prop_assert_eq!(Unverified::parse(&again).unwrap().verify(&key(1)), Some(signal));
            }
        }
    }

    #[test]
    fn an_answer_is_not_longer_than_what_it_answers_and_quic_never_looks_like_either() {
        let len = |body| Signal { id: 1, nonce: 2, body }.encode(&key(1)).len();
        let request = len(Body::ProbeRequest { from: AnswerFrom::Same, to_port: None });
        assert_eq!(request, len(Body::ProbeReply { observed: "[2001:db8::1]:1".parse().unwrap() }));
        let sender = Role::Initiator;
        assert_eq!(len(Body::Ping { sender }), len(Body::Pong { sender }));
        assert_eq!(FIRST_BYTE & 0xC0, 0);
        assert!(request <= MAX_LEN);
    }

    #[test]
    fn a_secret_is_not_to_be_seen() {
        use ring::rand::SystemRandom;

        let secret = Secret::generate(&SystemRandom::new()).unwrap();
        assert_ne!(secret, Secret::generate(&SystemRandom::new()).unwrap());
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!(!format!("{:?}", Key::from(&secret)).contains(&format!("{}", secret.as_bytes()[0])));
    }
}
