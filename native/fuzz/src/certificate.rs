//! Any bytes as a certificate: nothing panics, and where webpki reads one the key is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use macula_peer_core::x509;
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;

fuzz_target!(|bytes: &[u8]| {
    let certificate = CertificateDer::from(bytes);
    let (version, key) = (x509::version(&certificate), x509::public_key(&certificate));
    if let Some(key) = &key {
        assert!(bytes.windows(key.len()).any(|part| part == key.as_ref()));
        assert!(version.is_none_or(|version| version > 0));
    }
    if let Ok(parsed) = ParsedCertificate::try_from(&certificate) {
        assert_eq!((key, version), (Some(parsed.subject_public_key_info()), Some(3)));
    }
});
