//! Certificates, ALPN and trust.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use macula_peer_core::types::{Dialect, Fingerprint, Verify};
use macula_peer_core::x509;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};

use crate::error::{ListenError, PemError, TlsError};
use crate::identity::{Identity, certified_key};
use crate::pem;
use crate::renewal::{FromFiles, Renew};

/// What a connection speaks.
pub(crate) fn dialect_of(connection: &quinn::Connection) -> Option<Dialect> {
    let data = connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
    let chosen = data.protocol?;
    [Dialect::Macula, Dialect::MaculaPeer1].into_iter().find(|dialect| dialect.alpn().as_bytes() == chosen)
}

/// Where a listener's certificate comes from.
#[derive(Debug, Clone, Default)]
pub enum Certificate {
    /// The engine's [`Identity`].
    #[default]
    Identity,
    /// PEM files: a certificate chain and its private key.
    Files {
        /// The chain, leaf first.
        certificate: PathBuf,
        /// The key of the leaf, PKCS#8, PKCS#1 or SEC1.
        key: PathBuf,
    },
}

/// TLS for dialling.
pub(crate) fn client(identity: &Identity, trust: &Trust) -> Result<QuicClientConfig, TlsError> {
    client_config(identity, Verifier::new(trust, Over::Network), &BOTH)
}

/// TLS for listening, and the certificate, if it is renewed with its files.
pub(crate) fn server(
    identity: &Identity,
    certificate: &Certificate,
    trust: &Trust,
) -> Result<(QuicServerConfig, Option<Arc<dyn Renew>>), ListenError> {
    let (verifier, resumes) = (Verifier::new(trust, Over::Network), trust.renewed().is_none());
    match certificate {
        Certificate::Identity => Ok((server_config(identity.shown(), verifier, &BOTH, resumes)?, None)),
        Certificate::Files { certificate, key } => {
            let (files, paths) = (vec![certificate.clone(), key.clone()], (certificate.clone(), key.clone()));
            let shown = FromFiles::new(files, move || from_files(&paths.0, &paths.1))?;
            Ok((server_config(Arc::new(Renewed(shown.clone())), verifier, &BOTH, false)?, Some(shown)))
        }
    }
}

/// TLS for the side that begins a connection over a circuit.
pub(crate) fn circuit_client(identity: &Identity, trust: &Trust) -> Result<QuicClientConfig, TlsError> {
    client_config(identity, Verifier::new(trust, Over::Circuit), &[Dialect::MaculaPeer1])
}

/// TLS for the side that accepts a connection over a circuit.
pub(crate) fn circuit_server(identity: &Identity, trust: &Trust) -> Result<QuicServerConfig, TlsError> {
    let resumes = trust.renewed().is_none();
    server_config(identity.shown(), Verifier::new(trust, Over::Circuit), &[Dialect::MaculaPeer1], resumes)
}

/// The better dialect first. The server's order decides, the client's is for the reader of a packet trace.
const BOTH: [Dialect; 2] = [Dialect::MaculaPeer1, Dialect::Macula];

fn alpn(dialects: &[Dialect]) -> Vec<Vec<u8>> {
    dialects.iter().map(|dialect| dialect.alpn().into()).collect()
}

fn client_config(
    identity: &Identity,
    verifier: Arc<Verifier>,
    dialects: &[Dialect],
) -> Result<QuicClientConfig, TlsError> {
    let resumes = verifier.trust.renewed().is_none();
    let mut tls = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(identity.shown());
    tls.alpn_protocols = alpn(dialects);
    if !resumes {
        tls.resumption = Resumption::disabled();
    }
    Ok(QuicClientConfig::try_from(tls)?)
}

/// A resumed session neither shows nor checks a certificate, so sessions are resumed only where certificates do not
/// change.
fn server_config(
    shown: Arc<dyn ResolvesServerCert>,
    verifier: Arc<Verifier>,
    dialects: &[Dialect],
    resumes: bool,
) -> Result<QuicServerConfig, TlsError> {
    let mut tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(shown);
    tls.alpn_protocols = alpn(dialects);
    if !resumes {
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
    }
    Ok(QuicServerConfig::try_from(tls)?)
}

/// The last usable certificate of the files.
#[derive(Debug)]
struct Renewed(Arc<FromFiles<Arc<SingleCertAndKey>>>);

impl ResolvesServerCert for Renewed {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.latest().resolve(hello)
    }
}

fn from_files(certificate: &Path, key: &Path) -> Result<Arc<SingleCertAndKey>, ListenError> {
    let refused = |file: &Path| {
        let file = file.to_owned();
        move |why| ListenError::Certificate { file, why }
    };
    let read = |file| pem::read_path(file).map_err(PemError::File).map_err(refused(file));
    let (chain_pem, key_pem) = (read(certificate)?, read(key)?);
    let key_der = pem::key(&key_pem).map_err(refused(key))?;
    let chain = pem::certificates(&chain_pem).map_err(refused(certificate))?;
    pem::certified(chain, key_der).map_err(|why| match why {
        PemError::UnsupportedKey => refused(key)(why),
        _ => refused(certificate)(why),
    })
}

fn authorities(file: &Path) -> Result<Authorities, TlsError> {
    let pem = pem::read_path(file).map_err(TlsError::CaFile)?;
    let mut servers = RootCertStore::empty();
    for certificate in pem::certificates(&pem).map_err(|_| TlsError::NotACertificate)? {
        servers.add(certificate).map_err(|_| TlsError::NotACertificate)?;
    }
    if servers.is_empty() {
        return Err(TlsError::NotACertificate);
    }
    let servers = Arc::new(servers);
    let clients = WebPkiClientVerifier::builder_with_provider(servers.clone(), provider()).build();
    Ok(Authorities { servers, clients: clients.map_err(|_| TlsError::NotACertificate)? })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What a connection runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Network,
    /// The other end was found by its node id: it has no name that its certificate could be for. And it runs this
    /// library, so it shows one.
    Circuit,
}

/// Looks at what the other side shows, on either side.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    over: Over,
    algorithms: WebPkiSupportedAlgorithms,
}

/// What [`Verify`] says, ready for use.
#[derive(Debug, Clone)]
pub(crate) enum Trust {
    AnyKey,
    Keys(Vec<Fingerprint>),
    Authorities {
        /// The last usable contents of the file.
        latest: Arc<FromFiles<Authorities>>,
        any_name: bool,
    },
}

/// Certificates are for servers, for clients, or for both. Each of these verifies one use.
pub(crate) struct Authorities {
    servers: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Trust {
    pub(crate) fn new(verify: &Verify) -> Result<Self, TlsError> {
        Ok(match verify {
            Verify::FirstSeen | Verify::None => Self::AnyKey,
            Verify::Pin(keys) => Self::Keys(keys.clone()),
            Verify::CaFile(file) | Verify::CaFileAnyName(file) => {
                let path = file.clone();
                let latest = FromFiles::new(vec![file.clone()], move || authorities(&path))?;
                Self::Authorities { latest, any_name: matches!(verify, Verify::CaFileAnyName(_)) }
            }
        })
    }

    /// What changes with a file.
    pub(crate) fn renewed(&self) -> Option<Arc<dyn Renew>> {
        match self {
            Self::AnyKey | Self::Keys(_) => None,
            Self::Authorities { latest, .. } => Some(latest.clone()),
        }
    }
}

impl Verifier {
    fn new(trust: &Trust, over: Over) -> Arc<Self> {
        let algorithms = provider().signature_verification_algorithms;
        Arc::new(Self { trust: trust.clone(), over, algorithms })
    }

    /// Whether a handshake was signed with the key of a certificate. The rest of the certificate is not read.
    fn holds_key(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = x509::public_key(certificate).ok_or(CertificateError::BadEncoding)?;
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }

    fn is_pinned(keys: &[Fingerprint], certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match certified_key(certificate) {
            Some(key) if keys.contains(&key) => Ok(()),
            Some(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
            None => Err(CertificateError::BadEncoding.into()),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.trust {
            Trust::AnyKey => {}
            Trust::Keys(keys) => Self::is_pinned(keys, certificate)?,
            Trust::Authorities { latest, any_name } => {
                let servers = &latest.latest().servers;
                let parsed = ParsedCertificate::try_from(certificate)?;
                let algorithms = self.algorithms.all;
                verify_server_cert_signed_by_trust_anchor(&parsed, servers, intermediates, now, algorithms)?;
                if self.over == Over::Network && !any_name {
                    verify_server_name(&parsed, name)?;
                }
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.holds_key(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.over == Over::Circuit || !matches!(self.trust, Trust::AnyKey)
    }

    /// A node has one certificate and shows it whatever authorities the other side names.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match &self.trust {
            Trust::AnyKey => {}
            Trust::Keys(keys) => Self::is_pinned(keys, certificate)?,
            Trust::Authorities { latest, .. } => {
                return latest.latest().clients.verify_client_cert(certificate, intermediates, now);
            }
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.holds_key(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::Ipv4Addr;

    use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, ServerConfig};
    use rustls::pki_types::PrivateKeyDer;

    use super::*;
    use crate::identity::shown_key;
    use crate::identity::{realm_proof, realm_proof_is_valid};

    /// Both ends of one connection.
    struct Connected {
        client: Connection,
        server: Connection,
        _endpoints: [Endpoint; 2],
    }

    async fn connect(client: QuicClientConfig, server: QuicServerConfig) -> Result<Connected, ConnectionError> {
        let any_port = (Ipv4Addr::LOCALHOST, 0).into();
        let accepting = Endpoint::server(ServerConfig::with_crypto(Arc::new(server)), any_port).unwrap();
        let dialling = Endpoint::client(any_port).unwrap();
        let to = accepting.local_addr().unwrap();
        let client = dialling.connect_with(ClientConfig::new(Arc::new(client)), to, "no.such.name").unwrap();
        let (client, server) = tokio::join!(client, async { accepting.accept().await.unwrap().await });
        // The accepting side is the last to know whether the handshake succeeded.
        Ok(Connected { server: server?, client: client?, _endpoints: [accepting, dialling] })
    }

    fn circuit(from: &Identity, verify: &Verify) -> QuicClientConfig {
        circuit_client(from, &Trust::new(verify).unwrap()).unwrap()
    }

    fn at_circuit(to: &Identity, verify: &Verify) -> QuicServerConfig {
        circuit_server(to, &Trust::new(verify).unwrap()).unwrap()
    }

    fn pin(identity: &Identity) -> Verify {
        Verify::Pin(vec![identity.fingerprint()])
    }

    #[tokio::test]
    async fn over_a_circuit_both_show_a_key_and_no_name_is_looked_at() {
        let [a, b, c] = [(); 3].map(|()| Identity::generate().unwrap());
        for verify in [Verify::FirstSeen, Verify::None, pin(&b)] {
            let client = circuit(&a, &verify);
            let connected = connect(client, at_circuit(&b, &pin(&a))).await.unwrap();
            assert_eq!(dialect_of(&connected.client), Some(Dialect::MaculaPeer1));
            assert_eq!(shown_key(&connected.client), Some(b.fingerprint()));
            assert_eq!(shown_key(&connected.server), Some(a.fingerprint()));
        }
        let client = circuit(&a, &pin(&c));
        assert!(connect(client, at_circuit(&b, &Verify::None)).await.is_err());
        let client = circuit(&a, &Verify::None);
        assert!(connect(client, at_circuit(&b, &pin(&c))).await.is_err());
        // A client without a certificate, in every mode.
        let anonymous = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Verifier::new(&Trust::AnyKey, Over::Circuit));
        let mut anonymous = anonymous.with_no_client_auth();
        anonymous.alpn_protocols = alpn(&BOTH);
        let anonymous = QuicClientConfig::try_from(anonymous).unwrap();
        assert!(connect(anonymous, at_circuit(&b, &Verify::None)).await.is_err());
    }

    #[tokio::test]
    async fn over_a_circuit_a_signed_certificate_may_be_for_any_name() {
        let (mut params, key) = (rcgen::CertificateParams::default(), rcgen::KeyPair::generate().unwrap());
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let file = std::env::temp_dir().join(format!("macula-peer-ca-{}.pem", std::process::id()));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        let verify = Verify::CaFile(file.clone());
        let issuer = rcgen::Issuer::new(params, key);
        let [a, b] = ["a.example", "b.example"].map(|name| {
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = rcgen::CertificateParams::new([name.into()]).unwrap().signed_by(&key, &issuer).unwrap();
            Identity::new(PrivateKeyDer::from(key), vec![certificate.into()]).unwrap()
        });
        let unsigned = Identity::generate().unwrap();
        let both = |from, to| (circuit(from, &verify), at_circuit(to, &verify));
        let trust = Trust::new(&verify).unwrap();
        let over_network = (client(&a, &trust).unwrap(), server(&b, &Certificate::Identity, &trust).unwrap().0);
        let (signed, caller, called) = (both(&a, &b), both(&unsigned, &b), both(&a, &unsigned));
        std::fs::remove_file(file).unwrap();
        assert!(connect(signed.0, signed.1).await.is_ok());
        assert!(connect(caller.0, caller.1).await.is_err());
        assert!(connect(called.0, called.1).await.is_err());
        assert!(connect(over_network.0, over_network.1).await.is_err());
    }

    #[tokio::test]
    async fn a_proof_of_the_realm_is_for_one_connection_node_and_secret() {
        let [a, b] = [(); 2].map(|()| Identity::generate().unwrap());
        let connected = async || {
            let client = circuit(&a, &Verify::None);
            connect(client, at_circuit(&b, &Verify::None)).await.unwrap()
        };
        let (one, other) = (connected().await, connected().await);
        let proof = realm_proof(&one.client, b"secret", b"node").unwrap();
        assert!(realm_proof_is_valid(&one.server, b"secret", b"node", &proof));
        assert!(!realm_proof_is_valid(&one.server, b"other", b"node", &proof));
        assert!(!realm_proof_is_valid(&one.server, b"secret", b"edon", &proof));
        assert!(!realm_proof_is_valid(&other.server, b"secret", b"node", &proof));
        assert!(!realm_proof_is_valid(&one.server, b"secret", b"node", &proof[..31]));
        assert!(!realm_proof_is_valid(&one.server, b"secret", b"node", b""));
    }
}
