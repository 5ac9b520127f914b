//! A node's word, signed with a key that it had before, that its names belong to another key from now on
//! (docs/protocol.md).

use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, Bytes};
use macula_peer_core::types::Fingerprint;
use rustls::SignatureScheme;
use rustls::crypto::ring;
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::sign::SigningKey;
use webpki::RawPublicKeyEntity;

/// What is signed begins with this. Nothing else that a node's key signs does: neither handshakes, which begin with spaces
/// (RFC 8446, section 4.4.3), nor certificates, which are DER.
const CONTEXT: &[u8] = b"macula-peer/1 key succession\0";

/// How long a statement holds: a thief of the new key cannot use it for much longer once the node has a third one.
const HOLDS_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

/// The longest statement: of an RSA key of 8192 bits.
pub(crate) const MAX_LEN: usize = 2560;

/// Those of TLS 1.3 (RFC 8446, section 4.2.3).
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
];

/// A statement that this node has made.
pub(crate) struct Signed {
    pub(crate) statement: Bytes,
    until: u64,
}

impl Signed {
    /// Whether half of its time is over.
    pub(crate) fn is_old(&self, now: SystemTime) -> bool {
        seconds(now + HOLDS_FOR / 2) > self.until
    }
}

/// The names of this key belong to the successor. `None`: the key cannot sign.
pub(crate) fn sign(key: &dyn SigningKey, successor: Fingerprint, now: SystemTime) -> Option<Signed> {
    let public = key.public_key()?;
    let until = seconds(now + HOLDS_FOR);
    let signer = key.choose_scheme(&SCHEMES)?;
    let signature = signer.sign(&signed(Fingerprint::of_public_key(&public), successor, until)).ok()?;
    let mut statement = Vec::new();
    statement.put_u64(until);
    statement.put_u16(u16::try_from(public.len()).ok()?);
    statement.put_slice(&public);
    statement.put_u16(signer.scheme().into());
    statement.put_slice(&signature);
    (statement.len() <= MAX_LEN).then(|| Signed { statement: statement.into(), until })
}

/// The key whose statement it claims to be. Says nothing about its validity.
pub(crate) fn signer(statement: &[u8]) -> Option<Fingerprint> {
    Some(Fingerprint::of_public_key(&Parts::of(statement)?.public))
}

/// Whether the holder of `predecessor` has said that its names belong to `successor`.
pub(crate) fn is_valid(statement: &[u8], predecessor: Fingerprint, successor: Fingerprint, now: SystemTime) -> bool {
    let Some(Parts { until, public, scheme, signature }) = Parts::of(statement) else { return false };
    if Fingerprint::of_public_key(&public) != predecessor || predecessor == successor || until <= seconds(now) {
        return false;
    }
    let known = ring::default_provider().signature_verification_algorithms.mapping;
    let Some((_, [algorithm, ..])) = known.iter().find(|(known, _)| *known == scheme && SCHEMES.contains(known)) else {
        return false;
    };
    let key = RawPublicKeyEntity::try_from(&public);
    let message = signed(predecessor, successor, until);
    key.is_ok_and(|key| key.verify_signature(*algorithm, &message, signature).is_ok())
}

struct Parts<'a> {
    until: u64,
    public: SubjectPublicKeyInfoDer<'a>,
    scheme: SignatureScheme,
    signature: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(mut statement: &'a [u8]) -> Option<Self> {
        if statement.len() > MAX_LEN {
            return None;
        }
        let until = statement.try_get_u64().ok()?;
        let len = statement.try_get_u16().ok()?;
        let (public, mut rest) = statement.split_at_checked(len.into())?;
        let scheme = rest.try_get_u16().ok()?.into();
        Some(Self { until, public: public.into(), scheme, signature: rest })
    }
}

fn signed(predecessor: Fingerprint, successor: Fingerprint, until: u64) -> Vec<u8> {
    [CONTEXT, predecessor.as_bytes(), successor.as_bytes(), &until.to_be_bytes()].concat()
}

/// Of the wall clock: two nodes have no other in common.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use proptest::prelude::*;
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm};
    use rustls::pki_types::PrivateKeyDer;

    use super::*;

    fn key(kind: &'static SignatureAlgorithm) -> (Arc<dyn SigningKey>, Fingerprint) {
        let key = PrivateKeyDer::from(KeyPair::generate_for(kind).unwrap());
        let key = ring::default_provider().key_provider.load_private_key(key).unwrap();
        let fingerprint = Fingerprint::of_public_key(&key.public_key().unwrap());
        (key, fingerprint)
    }

    fn successor() -> Fingerprint {
        [7; 32].into()
    }

    #[test]
    fn a_statement_holds_for_its_successor_alone_and_for_thirty_days() {
        let now = SystemTime::now();
        for kind in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let (key, predecessor) = key(kind);
            let Signed { statement, .. } = sign(&*key, successor(), now).unwrap();
            assert_eq!(signer(&statement), Some(predecessor));
            let valid = |predecessor, successor, days: u32| {
                let then = now + Duration::from_secs(24 * 3600) * days;
                is_valid(&statement, predecessor, successor, then)
            };
            assert!(valid(predecessor, successor(), 0) && valid(predecessor, successor(), 29));
            assert!(!valid(predecessor, successor(), 30), "too late");
            assert!(!valid(predecessor, [8; 32].into(), 0), "for another successor");
            assert!(!valid(successor(), successor(), 0), "of another key");
        }
    }

    #[test]
    fn a_statement_is_renewed_after_half_of_its_time() {
        let now = SystemTime::now();
        let signed = sign(&*key(&PKCS_ED25519).0, successor(), now).unwrap();
        let after = |days: u64| now + Duration::from_secs(days * 24 * 3600);
        assert_eq!([0, 14, 16, 40].map(|days| signed.is_old(after(days))), [false, false, true, true]);
    }

    #[test]
    fn a_signature_without_the_context_is_invalid() {
        let now = SystemTime::now();
        let (key, predecessor) = key(&PKCS_ED25519);
        let mut statement = sign(&*key, successor(), now).unwrap().statement.to_vec();
        let until = u64::from_be_bytes(statement[..8].try_into().unwrap());
        let message = signed(predecessor, successor(), until);
        let signature = key.choose_scheme(&SCHEMES).unwrap().sign(&message[CONTEXT.len()..]).unwrap();
        let at = statement.len() - signature.len();
        statement.splice(at.., signature);
        assert!(!is_valid(&statement, predecessor, successor(), now));
    }

    proptest! {
        #[test]
        fn altered_and_invented_statements_are_invalid(
            at in any::<prop::sample::Index>(), by in 1..=255u8, cut in any::<prop::sample::Index>(),
            noise in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let now = SystemTime::now();
            let (key, predecessor) = key(&PKCS_ED25519);
            let whole = sign(&*key, successor(), now).unwrap().statement.to_vec();
            let mut altered = whole.clone();
            let at = at.index(altered.len());
            altered[at] ^= by;
            prop_assert!(!is_valid(&altered, predecessor, successor(), now), "{at}");
            prop_assert!(!is_valid(&whole[..cut.index(whole.len())], predecessor, successor(), now));
            prop_assert!(!is_valid(&noise, predecessor, successor(), now));
            let _ = signer(&noise);
        }
    }
}
