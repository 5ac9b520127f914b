//! One error type per operation. What each becomes in Erlang is one table in the NIF crate.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::private::NotPrivate;

/// Why the engine did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The runtime's threads could not be made.
    #[error("runtime: {0}")]
    Runtime(io::Error),
    /// The socket could not be bound.
    #[error("socket: {0}")]
    Bind(io::Error),
    /// The port is the local gateway's.
    #[error("port {0} is the local gateway's")]
    GatewayPort(u16),
    /// The node's key cannot be read or made.
    #[error("identity: {0}")]
    Identity(#[from] IdentityError),
    /// An earlier key of the node cannot be read.
    #[error("previous identity {}: {why}", file.display())]
    PreviousIdentity {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: IdentityError,
    },
    /// Keys that names are bound to cannot be read or written.
    #[error("known keys: {0}")]
    KnownKeys(#[from] KnownKeysError),
    /// Peers could not be verified.
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
}

/// Why a node has no key.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file can be neither read nor made, or has nothing that can be used.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// Others than the owner may read or write the file.
    #[error("others may read or write it: mode {mode:o}")]
    InsecurePermissions {
        /// The permission bits.
        mode: u32,
    },
    /// The file belongs to a user other than root and the user of this process.
    #[error("it belongs to user {owner}")]
    ForeignOwner {
        /// The owner's user id.
        owner: u32,
    },
    /// A key without a certificate must be in PKCS#8.
    #[error("a key without a certificate, and not in PKCS#8")]
    NotPkcs8,
    /// No key or certificate could be made.
    #[error("not made: {0}")]
    NotMade(#[from] rcgen::Error),
}

impl From<NotPrivate> for IdentityError {
    fn from(why: NotPrivate) -> Self {
        match why {
            NotPrivate::Unknown(error) => PemError::File(error).into(),
            NotPrivate::Permissions(mode) => Self::InsecurePermissions { mode },
            NotPrivate::Owner(owner) => Self::ForeignOwner { owner },
        }
    }
}

/// Why the file of known keys cannot be used.
#[derive(Debug, Error)]
pub enum KnownKeysError {
    /// It can be neither read nor made.
    #[error(transparent)]
    File(#[from] io::Error),
    /// Others than the owner may read or write it.
    #[error("others may read or write it: mode {mode:o}")]
    InsecurePermissions {
        /// The permission bits.
        mode: u32,
    },
    /// It belongs to a user other than root and the user of this process.
    #[error("it belongs to user {owner}")]
    ForeignOwner {
        /// The owner's user id.
        owner: u32,
    },
    /// Another engine keeps its keys there.
    #[error("another node uses it")]
    InUse,
    /// It is another kind of file, or of another version.
    #[error("it is no file of known keys")]
    NotKnownKeys,
    /// A line in the middle of it cannot be read.
    #[error("line {0} cannot be read")]
    BadLine(usize),
}

impl From<NotPrivate> for KnownKeysError {
    fn from(why: NotPrivate) -> Self {
        match why {
            NotPrivate::Unknown(error) => Self::File(error),
            NotPrivate::Permissions(mode) => Self::InsecurePermissions { mode },
            NotPrivate::Owner(owner) => Self::ForeignOwner { owner },
        }
    }
}

/// Why a file with a key or certificates cannot be used.
#[derive(Debug, Error)]
pub enum PemError {
    /// It can be neither read nor made.
    #[error(transparent)]
    File(#[from] io::Error),
    /// It has no private key.
    #[error("it has no private key in PEM format")]
    NoKey,
    /// Its key is encrypted.
    #[error("its private key is encrypted: decrypt it with `openssl pkey`")]
    EncryptedKey,
    /// Its key is of a kind that TLS cannot use here, or damaged.
    #[error("its private key is damaged, or is not ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 bits or more")]
    UnsupportedKey,
    /// It has no certificate.
    #[error("it has no certificate in PEM format")]
    NoCertificate,
    /// A certificate cannot be read.
    #[error("a certificate in it cannot be read: {0}")]
    BadCertificate(String),
    /// Its certificate is of X.509 version 1 or 2.
    #[error(
        "its certificate is of X.509 version 1, which `openssl x509 -req` makes unless it gets extensions; TLS needs \
         version 3: `openssl req -x509 -new -key KEYFILE -subj /CN=NAME -addext subjectAltName=DNS:NAME -days 365 \
         -out CERTFILE` makes one (docs/security.md)"
    )]
    OldCertificate,
    /// The key is for another certificate than the first.
    #[error("its certificates are out of order: the key's own must come first, and then each one's issuer")]
    OutOfOrder,
    /// The key has no certificate in the file.
    #[error("its certificate is for another private key")]
    OtherKey,
}

/// Why there is no TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The file of the certificate authorities cannot be read.
    #[error("certificate authorities: {0}")]
    CaFile(io::Error),
    /// The file of the certificate authorities has something else in it.
    #[error("certificate authorities: no certificate")]
    NotACertificate,
    /// The TLS library refused its own defaults.
    #[error(transparent)]
    Library(#[from] rustls::Error),
    /// The TLS library lacks what QUIC begins with.
    #[error(transparent)]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// Why the engine does not listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// It listens already; `close` first.
    #[error("already listening")]
    AlreadyListening,
    /// The port could not be bound.
    #[error("socket: {0}")]
    Bind(io::Error),
    /// The port is the local gateway's.
    #[error("port {0} is the local gateway's")]
    GatewayPort(u16),
    /// Certificate or key cannot be read or do not fit together.
    #[error("{}: {why}", file.display())]
    Certificate {
        /// The file that has the fault.
        file: PathBuf,
        /// What it is.
        why: PemError,
    },
    /// The client could not be verified.
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
}
