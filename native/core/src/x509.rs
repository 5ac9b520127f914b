//! The parts that matter of a certificate without an authority: its version and its public key.
//!
//! webpki reads only version 3 and refuses what RFC 5280 does not allow. A 0.14.3 gateway shows any certificate that
//! its operator has made, and only its key counts.

use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer};

const INTEGER: u8 = 0x02;
const SEQUENCE: u8 = 0x30;
/// `[0] EXPLICIT`, which only versions 2 and 3 have.
const VERSION: u8 = 0xA0;

/// The version: 1, 2 or 3. `None`: this is not a certificate.
pub fn version(certificate: &CertificateDer<'_>) -> Option<u8> {
    let (version, _) = to_be_signed(certificate)?;
    match version {
        None => Some(1),
        Some(version) => match expect(INTEGER, version)? {
            ([number], []) => number.checked_add(1),
            _ => None,
        },
    }
}

/// The SubjectPublicKeyInfo in DER. `None`: this is not a certificate.
pub fn public_key(certificate: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let (_, fields) = to_be_signed(certificate)?;
    let (_serial_number, fields) = expect(INTEGER, fields)?;
    let (_signature_algorithm, fields) = expect(SEQUENCE, fields)?;
    let (_issuer, fields) = expect(SEQUENCE, fields)?;
    let (_validity, fields) = expect(SEQUENCE, fields)?;
    let (_subject, fields) = expect(SEQUENCE, fields)?;
    let (_, rest) = expect(SEQUENCE, fields)?;
    Some(fields[..fields.len() - rest.len()].to_vec().into())
}

/// The version, where it is present, and the fields that follow it (RFC 5280, section 4.1).
fn to_be_signed<'a>(certificate: &'a CertificateDer<'_>) -> Option<(Option<&'a [u8]>, &'a [u8])> {
    let (certificate, []) = expect(SEQUENCE, certificate)? else { return None };
    let (fields, _signature) = expect(SEQUENCE, certificate)?;
    match expect(VERSION, fields) {
        Some((version, fields)) => Some((Some(version), fields)),
        None => Some((None, fields)),
    }
}

/// Splits the contents of an element with this tag from what follows it. Only DER's form of a length is accepted, so
/// that a key has one fingerprint.
fn expect(tag: u8, input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&found, input) = input.split_first()?;
    let (&first, input) = input.split_first()?;
    let (length, input) = match first {
        0..=0x7F => (usize::from(first), input),
        0x81..=0x83 => {
            let (digits, input) = input.split_at_checked(usize::from(first - 0x80))?;
            let length = digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit));
            let shortest = digits[0] != 0 && length >= 0x80;
            (shortest.then_some(length)?, input)
        }
        // Of indefinite length, or longer than any certificate.
        _ => return None,
    };
    if found == tag { input.split_at_checked(length) } else { None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use rustls::server::ParsedCertificate;
    use rustls_pki_types::pem::PemObject;

    use super::*;

    fn certificate() -> CertificateDer<'static> {
        rcgen::generate_simple_self_signed(["node.example".into()]).unwrap().cert.into()
    }

    #[test]
    fn the_key_is_the_one_that_webpki_finds() {
        let certificate = certificate();
        let expected = ParsedCertificate::try_from(&certificate).unwrap().subject_public_key_info();
        assert_eq!(public_key(&certificate), Some(expected));
        assert_eq!(version(&certificate), Some(3));
    }

    #[test]
    fn a_version_1_certificate_has_a_key() {
        let pem = include_bytes!("../../peer/tests/certificates/version1.pem");
        let certificate = CertificateDer::from_pem_slice(pem).unwrap();
        assert!(ParsedCertificate::try_from(&certificate).is_err());
        let key = rcgen::KeyPair::from_pem(include_str!("../../peer/tests/certificates/version1.key")).unwrap();
        assert_eq!(public_key(&certificate).unwrap().as_ref(), rcgen::PublicKeyData::subject_public_key_info(&key));
        assert_eq!(version(&certificate), Some(1));
    }

    #[test]
    fn a_certificate_that_webpki_refuses_has_a_key() {
        let mut params = rcgen::CertificateParams::new(["node.example".into()]).unwrap();
        let mut unknown = rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
        unknown.set_criticality(true);
        params.custom_extensions.push(unknown);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().into();
        assert!(ParsedCertificate::try_from(&certificate).is_err());
        assert_eq!(public_key(&certificate).unwrap().as_ref(), rcgen::PublicKeyData::subject_public_key_info(&key));
    }

    #[test]
    fn a_certificate_with_a_wrong_length_has_no_key() {
        let whole = certificate();
        for cut in 0..whole.len() {
            assert_eq!(public_key(&CertificateDer::from(&whole[..cut])), None, "{cut}");
        }
        assert_eq!(public_key(&CertificateDer::from([&whole[..], &[0]].concat())), None);
    }

    proptest! {
        #[test]
        fn what_is_altered_is_read_without_a_panic(at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut altered = certificate().to_vec();
            let at = at.index(altered.len());
            altered[at] = to;
            let altered = CertificateDer::from(altered);
            let _ = (public_key(&altered), version(&altered));
        }
    }
}
