//! Certificates, ALPN and who is trusted.

use std::path::PathBuf;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::error::ListenError;

/// What a link speaks, chosen by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// macula 0.14.3.
    Macula,
    /// Between nodes that run this library.
    MaculaPeer1,
}

impl Dialect {
    /// The ALPN protocol id.
    pub fn alpn(self) -> &'static str {
        match self {
            Self::Macula => "macula",
            Self::MaculaPeer1 => "macula-peer/1",
        }
    }

    pub(crate) fn of(connection: &quinn::Connection) -> Option<Self> {
        let data = connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
        let chosen = data.protocol?;
        [Self::Macula, Self::MaculaPeer1].into_iter().find(|dialect| dialect.alpn().as_bytes() == chosen)
    }
}

/// Where a listener's certificate comes from.
#[derive(Debug, Clone, Default)]
pub enum Certificate {
    /// Self-signed, made when the listener starts, as macula's own gateways have it.
    #[default]
    Generated,
    /// PEM files: a certificate chain and its private key.
    Files {
        /// The chain, leaf first.
        certificate: PathBuf,
        /// The key of the leaf, PKCS#8, PKCS#1 or SEC1.
        key: PathBuf,
    },
}

/// The better dialect first. The server's order decides, the client's is for the reader of a packet trace.
fn alpn() -> Vec<Vec<u8>> {
    [Dialect::MaculaPeer1, Dialect::Macula].map(|dialect| dialect.alpn().into()).into()
}

/// TLS for dialling, without any check of the peer's certificate: the compatibility mode `verify => none` that macula
/// 0.14.3 needs, whose certificates are self-signed and bound to nothing.
pub(crate) fn unverified_client() -> Result<QuicClientConfig, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    tls.alpn_protocols = alpn();
    QuicClientConfig::try_from(tls).map_err(|_| rustls::Error::General("no initial cipher suite".into()))
}

pub(crate) fn server(certificate: &Certificate) -> Result<QuicServerConfig, ListenError> {
    let refused = |error: &dyn std::fmt::Display| ListenError::Certificate(error.to_string());
    let (chain, key) = match certificate {
        Certificate::Generated => generate().map_err(|e| refused(&e))?,
        Certificate::Files { certificate, key } => {
            let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
            (chain.map_err(|e| refused(&e))?, PrivateKeyDer::from_pem_file(key).map_err(|e| refused(&e))?)
        }
    };
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| refused(&e))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| refused(&e))?;
    tls.alpn_protocols = alpn();
    QuicServerConfig::try_from(tls).map_err(|e| refused(&e))
}

fn generate() -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), rcgen::Error> {
    let made = rcgen::generate_simple_self_signed(vec!["macula".into()])?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    Ok((vec![made.cert.into()], key.into()))
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    // The signatures are checked all the same: the peer must at least hold the key that it shows.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
