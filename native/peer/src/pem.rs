//! Keys and certificates in PEM files.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use crate::error::PemError;
use crate::private;

/// The largest file that is read. The authorities that a system trusts take a quarter of a megabyte.
const MAX_FILE: u64 = 4 << 20;

/// Opens a regular file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Opening a FIFO would wait for a writer.
    let kind = fs::metadata(path)?.file_type();
    if kind.is_dir() {
        return Err(Errno::EISDIR.into());
    }
    if !kind.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

pub(crate) fn read(file: File) -> io::Result<Vec<u8>> {
    let mut pem = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut pem)?;
    if pem.len() as u64 > MAX_FILE {
        return Err(io::Error::new(ErrorKind::InvalidData, "larger than 4 MiB"));
    }
    Ok(pem)
}

/// The contents of a file with a key, a certificate, or trusted authorities.
pub(crate) fn read_path(path: &Path) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    private::check_unaltered(&file)?;
    read(file)
}

/// The first private key.
pub(crate) fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| match is_encrypted(pem) {
        true => PemError::EncryptedKey,
        false => PemError::NoKey,
    })
}

/// PKCS#8 has it in the label, the older formats in a header (RFC 1421, section 4.6.1.1).
fn is_encrypted(pem: &[u8]) -> bool {
    let has = |text: &[u8]| pem.windows(text.len()).any(|part| part == text);
    has(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || has(b"Proc-Type: 4,ENCRYPTED")
}

/// All certificates, in their order.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>();
    certificates.map_err(|error| PemError::BadCertificate(error.to_string()))
}

/// A chain, leaf first, with the key to its leaf.
pub(crate) fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<SingleCertAndKey>, PemError> {
    let provider = ring::default_provider();
    let signer = provider.key_provider.load_private_key(key).map_err(|_| PemError::UnsupportedKey)?;
    let leaf = chain.first().ok_or(PemError::NoCertificate)?;
    if x509::version(leaf).is_some_and(|version| version < 3) {
        return Err(PemError::OldCertificate);
    }
    // Peers that run this library have to be able to read it.
    ParsedCertificate::try_from(leaf).map_err(|error| PemError::BadCertificate(error.to_string()))?;
    let key = signer.public_key();
    match chain.iter().position(|certificate| x509::public_key(certificate) == key) {
        Some(0) => Ok(Arc::new(CertifiedKey::new(chain, signer).into())),
        Some(_) => Err(PemError::OutOfOrder),
        None => Err(PemError::OtherKey),
    }
}
use macula_peer_core::x509;
