//! One error type per operation. What each becomes in Erlang is one table in the NIF crate.

use std::io;
use std::path::PathBuf;

use macula_peer_core::proto::control::Refusal;
use macula_peer_wire::FrameError;
use thiserror::Error;

use crate::private::NotPrivate;

/// Why no link to a peer could be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// The name has no address in a family that this host speaks.
    #[error("name does not resolve")]
    Unresolved,
    /// It has addresses, all of the other family than the address that the engine's socket is bound to.
    #[error("address family not supported by the socket")]
    OtherFamily,
    /// Nobody listens there: ICMP port unreachable.
    #[error("nobody listens there")]
    Unreachable,
    /// This host has no route there, or no address to send from.
    #[error("no route")]
    NoRoute,
    /// No answer within the time for a dial.
    #[error("no answer")]
    TimedOut,
    /// The peer is there and refuses connections, also after retries.
    #[error("the peer refuses connections")]
    Refused,
    /// The peer speaks neither `macula` nor `macula-peer/1`.
    #[error("no protocol in common")]
    NoProtocol,
    /// We do not trust the peer's certificate.
    #[error("the peer is not trusted")]
    Untrusted,
    /// The peer does not trust ours.
    #[error("not trusted by the peer")]
    NotTrusted,
    /// The path leads to a node with another id, or back to this one.
    #[error("another node is there")]
    WrongNode,
    /// The handshake failed for another reason.
    #[error("handshake failed: {0}")]
    Handshake(String),
}

/// Why there is no path to a node.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RouteError {
    /// No endpoint led to it, if one was known, and there is no relay to ask.
    #[error("no relay is known")]
    NoRelay,
    /// No relay could be reached.
    #[error("relay not reached: {0}")]
    Relay(ConnectError),
    /// A relay was reached and gave no circuit.
    #[error("no circuit: {0:?}")]
    Setup(Refusal),
    /// The node was reached and there is no link to it all the same: it is not the one that was expected, for example.
    #[error("node reached, not connected: {0}")]
    Node(ConnectError),
}

/// Why a message was not sent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SendError {
    /// There was no link and none could be made.
    #[error("not connected: {0}")]
    Connect(#[from] ConnectError),
    /// There was no link to a node and no path to it.
    #[error("no path: {0}")]
    Route(#[from] RouteError),
    /// The deadline passed before there was a link to send on; nothing was sent.
    #[error("deadline passed before a link was up")]
    Timeout,
    /// The deadline passed while the link had no room for the message.
    #[error("deadline passed before the link had room")]
    NoRoom,
    /// Too much is queued for the peer, and nothing gave room within the deadline.
    #[error("too much queued for this peer")]
    Overloaded,
    /// The link broke and the message may not be sent twice.
    #[error("link lost while sending")]
    LinkLost,
    /// The engine was stopped first.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// No answer before the deadline.
    #[error("no answer before the deadline")]
    Timeout,
    /// The link broke after the peer had the request: asking again might do the work twice.
    #[error("link lost while waiting for the answer")]
    LinkLost,
    /// The peer does not take it.
    #[error("rejected by the peer: {0}")]
    Rejected(Rejection),
    /// What came back is not a frame.
    #[error("answer is not a frame: {0}")]
    Malformed(#[from] FrameError),
}

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
    /// The node's key cannot be had.
    #[error("identity: {0}")]
    Identity(#[from] IdentityError),
    /// A key that the node had before cannot be had.
    #[error("previous identity {}: {why}", file.display())]
    PreviousIdentity {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: IdentityError,
    },
    /// Keys that names are bound to cannot be had, or not be kept.
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
    /// The file belongs to a user other than root and the one that this process runs as.
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
    /// It belongs to a user other than root and the one that this process runs as.
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
    /// Who connects could not be verified.
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
}

/// Why an answer was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReplyError {
    /// This message was answered before.
    #[error("already answered")]
    AlreadyReplied,
    /// Who asked is gone or has given up.
    #[error("nobody waits for the answer any more")]
    Gone,
}

/// Why a message that was accepted did not arrive, as far as can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum UndeliveredReason {
    /// Its deadline passed while no link would take or acknowledge it.
    #[error("deadline passed")]
    Expired,
    /// The link died before it was acknowledged, and it may not be sent twice.
    #[error("link lost")]
    LinkLost,
    /// It was on its way when its link died, and the peer no longer knew the session when there was a link again: whether it
    /// has arrived cannot be known, and sent again it might arrive twice.
    #[error("session lost")]
    SessionLost,
    /// The peer does not take it.
    #[error("rejected by the peer: {0}")]
    Rejected(Rejection),
    /// The peer that was to get it has another key now.
    #[error("the peer is not trusted")]
    Untrusted,
    /// The engine stopped first.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a peer does not take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum Rejection {
    /// Its frame is longer than the peer's limit.
    #[error("the frame is too large")]
    TooLarge,
    /// More containers are inside one another than the peer's limit.
    #[error("its containers are nested too deep")]
    TooDeep,
    /// It has more terms than the peer's limit.
    #[error("it has too many terms")]
    TooManyTerms,
    /// It is no message to the peer.
    #[error("the peer cannot read it")]
    Malformed,
    /// It made no progress for longer than the peer waits.
    #[error("it came too slowly")]
    TooSlow,
    /// The peer stopped reading it and did not say why.
    #[error("the peer stopped reading it")]
    Unread,
}
