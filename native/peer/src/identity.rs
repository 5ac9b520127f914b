//! A node's identity: its key, the certificate that shows it, and what is derived from it.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use macula_peer_core::sync::lock;
use macula_peer_core::types::Fingerprint;
use macula_peer_core::x509;
use quinn::{Connection, EndpointConfig};
use quinn_proto::HashedConnectionIdGenerator;
use rcgen::{CertificateParams, KeyPair};
use ring::hmac;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{SigningKey, SingleCertAndKey};

use crate::error::{IdentityError, PemError};
use crate::{pem, private, succession};

/// The name in a certificate that we sign ourselves; macula's own have it too. Nothing checks it.
const OWN_NAME: &str = "macula";

/// What keys are derived for. Each label stands for one key, and a new purpose needs a new one.
const RESET_LABEL: &[u8] = b"macula-peer stateless reset";
const CONNECTION_ID_LABEL: &[u8] = b"macula-peer connection ids";

/// How long another process may take to put its key into the same directory.
const PLACING_TIMEOUT: Duration = Duration::from_secs(5);
const PLACING_PAUSE: Duration = Duration::from_millis(10);

/// RFC 8446, section 7.5: keying material that only the two ends of one connection have.
const REALM_EXPORTER: &[u8] = b"EXPORTER-macula-peer-realm";

/// The key that the other side of a connection has shown, and holds. `None`: it has shown none.
pub fn shown_key(connection: &Connection) -> Option<Fingerprint> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    certified_key(chain.first()?)
}

/// The key that a certificate is for. `None`: it cannot be read.
pub(crate) fn certified_key(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    Some(Fingerprint::of_public_key(&x509::public_key(certificate)?))
}

/// A node's key with the certificate chain that shows it.
pub struct Identity {
    shown: Arc<SingleCertAndKey>,
    fingerprint: Fingerprint,
    /// Other keys are derived with this one.
    secret: hmac::Key,
    previous: Vec<PreviousKey>,
}

/// A key that this node had before, which says to others that its names belong to the present one.
pub(crate) struct PreviousKey {
    key: Arc<dyn SigningKey>,
    fingerprint: Fingerprint,
    /// The last statement that it has signed.
    signed: Mutex<Option<succession::Signed>>,
}

impl PreviousKey {
    /// From a PEM file, which may have certificates too.
    pub(crate) fn load(path: &Path) -> Result<Self, IdentityError> {
        let file = pem::open(path).map_err(PemError::File)?;
        private::check(&file)?;
        let key = pem::key(&pem::read(file).map_err(PemError::File)?)?;
        let key = default_provider().key_provider.load_private_key(key).map_err(|_| PemError::UnsupportedKey)?;
        let public = key.public_key().ok_or(PemError::UnsupportedKey)?;
        let fingerprint = Fingerprint::of_public_key(&public);
        Ok(Self { key, fingerprint, signed: Mutex::default() })
    }

    /// Renewed after half of its time: a node may run for longer than a statement holds.
    fn statement(&self, successor: Fingerprint, now: SystemTime) -> Option<Bytes> {
        let mut signed = lock(&self.signed);
        if signed.as_ref().is_none_or(|signed| signed.is_old(now)) {
            *signed = succession::sign(&*self.key, successor, now);
        }
        signed.as_ref().map(|signed| signed.statement.clone())
    }
}

impl Identity {
    /// A new key, for as long as the engine runs.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::new(PrivateKeyDer::from(KeyPair::generate()?), Vec::new())
    }

    /// The key in a PEM file, which is made if it is not there. Certificates in the file are shown as the key's chain,
    /// leaf first; without one the key signs its own, at every start.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match pem::open(path) {
            Ok(file) => Self::load(file),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                create(path)?;
                // Perhaps another process was first, and it is its key.
                Self::load(pem::open(path).map_err(PemError::File)?)
            }
            Err(error) => Err(PemError::File(error).into()),
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
        // Packets whose connection id was not made with this key are not answered with a reset.
        endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
        endpoint
    }

    /// The same node, which had these keys before, in the order in which others are told.
    pub(crate) fn after(self, previous: Vec<PreviousKey>) -> Self {
        Self { previous, ..self }
    }

    /// The word of a key that this node had before: its names belong to the present key. `None`: it never had that key.
    pub(crate) fn succession(&self, of: &[u8]) -> Option<Bytes> {
        let previous = self.previous.iter().find(|previous| previous.fingerprint.as_bytes() == of)?;
        previous.statement(self.fingerprint, SystemTime::now())
    }

    /// Those of all the keys.
    pub(crate) fn successions(&self) -> Vec<Bytes> {
        let now = SystemTime::now();
        self.previous.iter().filter_map(|previous| previous.statement(self.fingerprint, now)).collect()
    }

    fn load(file: File) -> Result<Self, IdentityError> {
        private::check(&file)?;
        let pem = pem::read(file).map_err(PemError::File)?;
        Self::new(pem::key(&pem)?, pem::certificates(&pem)?)
    }

    /// Without a chain the key signs its own certificate.
    pub(crate) fn new(
        key: PrivateKeyDer<'static>,
        mut chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
        if chain.is_empty() {
            chain.push(self_signed(&key)?);
        }
        let fingerprint = certified_key(&chain[0]);
        let shown = pem::certified(chain, key)?;
        // Certified, it has a key.
        let fingerprint = fingerprint.ok_or(PemError::OtherKey)?;
        Ok(Self { shown, fingerprint, secret, previous: Vec::new() })
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
    // Read by the library that shows it, which knows fewer kinds of keys.
    rustls::crypto::ring::sign::any_supported_type(key).map_err(|_| PemError::UnsupportedKey)?;
    let PrivateKeyDer::Pkcs8(key) = key else { return Err(IdentityError::NotPkcs8) };
    let key = KeyPair::try_from(key)?;
    Ok(CertificateParams::new([OWN_NAME.to_owned()])?.self_signed(&key)?.into())
}

/// Puts a new key at `path` unless one is there by then. It is never there in part, nor for others to read.
fn create(path: &Path) -> Result<(), IdentityError> {
    let key = KeyPair::generate()?.serialize_pem();
    let directory = private::directory(path);
    let temporary = directory.join(format!(".{:x}-{:016x}.new", std::process::id(), fastrand::u64(..)));
    let mut file = private::create(&temporary).map_err(PemError::File)?;
    let placed = (|| {
        file.write_all(key.as_bytes()).and_then(|()| file.sync_all()).map_err(PemError::File)?;
        // Some file systems give every file the same mode or owner.
        private::check(&file)?;
        place(&temporary, path, directory).map_err(PemError::File)?;
        Ok::<_, IdentityError>(())
    })();
    // After a rename it is gone. If it is left behind, it does no harm.
    let _ = fs::remove_file(&temporary);
    placed?;
    // A node that lost its key to a power cut would be another one.
    private::sync_directory(directory);
    Ok(())
}

/// Gives a complete file its name. Does not replace an existing file of that name.
fn place(temporary: &Path, path: &Path, directory: &Path) -> io::Result<()> {
    // Unlike a rename, a link does not replace an existing file.
    match fs::hard_link(temporary, path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        // SMB, FUSE, exFAT and 9p have no links, and report that by different errors.
        Err(_) => place_without_links(temporary, path, directory),
    }
}

/// Does it by a rename, which would replace an existing file, so one process at a time: a lock on the directory leaves
/// nothing behind, even if its holder dies.
fn place_without_links(temporary: &Path, path: &Path, directory: &Path) -> io::Result<()> {
    let directory = File::open(directory)?;
    let give_up = Instant::now() + PLACING_TIMEOUT;
    loop {
        match directory.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => std::thread::sleep(PLACING_PAUSE),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(ErrorKind::WouldBlock, "another process holds a lock on its directory"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => fs::rename(temporary, path),
        Err(error) => Err(error),
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn without_links_two_starts_at_once_end_with_one_key() {
        let directory = std::env::temp_dir().join(format!("macula-peer-no-links-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for round in 0..20 {
            let path = &directory.join(format!("{round}.pem"));
            let barrier = &Barrier::new(8);
            let found: Vec<_> = std::thread::scope(|scope| {
                let start = |n| {
                    let (temporary, directory) = (directory.join(format!(".{n}.new")), &directory);
                    scope.spawn(move || {
                        fs::write(&temporary, format!("key {n}")).unwrap();
                        barrier.wait();
                        place_without_links(&temporary, path, directory).unwrap();
                        let _ = fs::remove_file(&temporary);
                        fs::read_to_string(path).unwrap()
                    })
                };
                let starts: Vec<_> = (0..8).map(start).collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            });
            assert!(found.iter().all(|key| *key == found[0]), "{found:?}");
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 20, "nothing is left behind");
        fs::remove_dir_all(directory).unwrap();
    }
}
