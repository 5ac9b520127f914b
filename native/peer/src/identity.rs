//! Who a node is: its key, the certificate that shows it, and what is derived from it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use quinn::{Connection, EndpointConfig};
use quinn_proto::HashedConnectionIdGenerator;
use rcgen::{CertificateParams, KeyPair};
use ring::{digest, hmac};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use thiserror::Error;

use crate::error::IdentityError;
use crate::tls::Dialect;

/// The name in a certificate that we sign ourselves; macula's own have it too. Nothing checks it.
const OWN_NAME: &str = "macula";

/// What keys are derived for. Each label stands for one key, and a new purpose needs a new one.
const RESET_LABEL: &[u8] = b"macula-peer stateless reset";
const CONNECTION_ID_LABEL: &[u8] = b"macula-peer connection ids";

/// RFC 8446, section 7.5: keying material that only the two ends of one connection have.
const REALM_EXPORTER: &[u8] = b"EXPORTER-macula-peer-realm";

/// What a node is known by: the SHA-256 of its public key's SubjectPublicKeyInfo in DER.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

/// A text is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not 64 hexadecimal digits")]
pub struct NotAFingerprint;

impl Fingerprint {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Of the key that the other side of a connection has shown, and holds. `None`: it has shown none.
    pub fn of_connection(connection: &Connection) -> Option<Self> {
        let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Self::of_certificate(chain.first()?)
    }

    /// Of the sender of what comes over a connection. Only `macula-peer/1` binds messages to keys.
    pub(crate) fn of_sender(connection: &Connection, dialect: Dialect) -> Option<Self> {
        match dialect {
            Dialect::MaculaPeer1 => Self::of_connection(connection),
            Dialect::Macula => None,
        }
    }

    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = ParsedCertificate::try_from(certificate).ok()?;
        Some(Self::of_public_key(&certificate.subject_public_key_info()))
    }

    fn of_public_key(public_key_info: &[u8]) -> Self {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest::digest(&digest::SHA256, public_key_info).as_ref());
        Self(fingerprint)
    }
}

impl From<[u8; 32]> for Fingerprint {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Self, NotAFingerprint> {
        // `from_str_radix` would take a sign.
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(NotAFingerprint);
        }
        let mut fingerprint = [0; 32];
        for (byte, at) in fingerprint.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| NotAFingerprint)?;
        }
        Ok(Self(fingerprint))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node's key with the certificate chain that shows it.
pub struct Identity {
    shown: Arc<SingleCertAndKey>,
    fingerprint: Fingerprint,
    /// Other keys are derived with this one.
    secret: hmac::Key,
}

impl Identity {
    /// A new key, for as long as the engine runs.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::new(PrivateKeyDer::from(KeyPair::generate()?), Vec::new())
    }

    /// The key in a PEM file, which is made if it is not there. Certificates in the file are shown as the key's chain,
    /// leaf first; without one the key signs its own, at every start.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match File::open(path) {
            Ok(file) => Self::load(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path)?;
                // Perhaps another process was first, and it is its key.
                Self::load(File::open(path)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Of this node's key.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// For rustls.
    pub(crate) fn shown(&self) -> Arc<SingleCertAndKey> {
        self.shown.clone()
    }

    /// QUIC's settings that outlive the process with the key: what comes for a connection of a process before is
    /// recognized and reset at once.
    pub(crate) fn endpoint_config(&self) -> EndpointConfig {
        let reset_key = hmac::Key::new(hmac::HMAC_SHA256, self.derived(RESET_LABEL).as_ref());
        let mut endpoint = EndpointConfig::new(Arc::new(reset_key));
        let mut id_key = [0; 8];
        id_key.copy_from_slice(&self.derived(CONNECTION_ID_LABEL).as_ref()[..8]);
        let id_key = u64::from_be_bytes(id_key);
        // Packets whose connection id no generator with this key has made are not answered with a reset.
        endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
        endpoint
    }

    fn load(mut file: File) -> Result<Self, IdentityError> {
        check_permissions(&file)?;
        let mut pem = Vec::new();
        file.read_to_end(&mut pem)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| IdentityError::NotAKey)?;
        let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>();
        Self::new(key, chain.map_err(|error| IdentityError::Certificate(error.to_string()))?)
    }

    /// Without a chain the key signs its own certificate.
    pub(crate) fn new(
        key: PrivateKeyDer<'static>,
        mut chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let provider = rustls::crypto::ring::default_provider();
        let secret = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
        let signer = provider.key_provider.load_private_key(key.clone_key()).map_err(|_| IdentityError::NotAKey)?;
        if chain.is_empty() {
            chain.push(self_signed(&key)?);
        }
        let refused = |error: rustls::Error| IdentityError::Certificate(error.to_string());
        let public_key = ParsedCertificate::try_from(&chain[0]).map_err(refused)?.subject_public_key_info();
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(refused)?;
        Ok(Self { shown: Arc::new(certified.into()), fingerprint: Fingerprint::of_public_key(&public_key), secret })
    }

    fn derived(&self, label: &[u8]) -> hmac::Tag {
        hmac::sign(&self.secret, label)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.fingerprint).finish()
    }
}

fn self_signed(key: &PrivateKeyDer<'_>) -> Result<CertificateDer<'static>, IdentityError> {
    let PrivateKeyDer::Pkcs8(key) = key else { return Err(IdentityError::NotPkcs8) };
    let key = KeyPair::try_from(key)?;
    Ok(CertificateParams::new([OWN_NAME.to_owned()])?.self_signed(&key)?.into())
}

/// Puts a new key at `path` unless one is there by then. It is never there in part, nor for others to read.
fn create(path: &Path) -> Result<(), IdentityError> {
    let key = KeyPair::generate()?.serialize_pem();
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = directory.join(format!(".{:x}-{:016x}.new", std::process::id(), fastrand::u64(..)));
    let mut file = private().open(&temporary)?;
    let placed = file.write_all(key.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| {
        // Unlike a renaming, a link does not replace what is there.
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    });
    // Left behind, it is in nobody's way.
    let _ = fs::remove_file(&temporary);
    placed?;
    // A node that lost its key to a power cut would be another one. Not everywhere can directories be opened.
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
    Ok(())
}

/// A new file for nobody else.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

#[cfg(unix)]
fn check_permissions(file: &File) -> Result<(), IdentityError> {
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata()?.permissions()) & 0o777;
    if mode & 0o066 == 0 { Ok(()) } else { Err(IdentityError::InsecurePermissions { mode }) }
}

#[cfg(not(unix))]
fn check_permissions(_: &File) -> Result<(), IdentityError> {
    Ok(())
}

/// What a node shows a relay to be let into a realm: that it has the realm's secret, on this connection and as this
/// node. `None`: the connection has no keys yet.
pub(crate) fn realm_proof(connection: &Connection, secret: &[u8], node_id: &[u8]) -> Option<[u8; 32]> {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), &realm_material(connection, node_id)?);
    let mut proof = [0; 32];
    proof.copy_from_slice(tag.as_ref());
    Some(proof)
}

/// Takes the same time wherever the proof is wrong.
pub(crate) fn realm_proof_is_valid(connection: &Connection, secret: &[u8], node_id: &[u8], proof: &[u8]) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    realm_material(connection, node_id).is_some_and(|material| hmac::verify(&key, &material, proof).is_ok())
}

fn realm_material(connection: &Connection, node_id: &[u8]) -> Option<[u8; 32]> {
    let mut material = [0; 32];
    connection.export_keying_material(&mut material, REALM_EXPORTER, node_id).ok()?;
    Some(material)
}
