//! quinn configurations, and the runtime that makes its drivers batch.

use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

/// Any error before traffic flows.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A server with a fresh self-signed certificate; the first of `alpn` that the client offers is chosen.
pub fn server_config(alpn: &[String], transport: quinn::TransportConfig) -> Result<quinn::ServerConfig, Error> {
    let certified = key()?;
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())?;
    tls.alpn_protocols = alpn.iter().map(|name| name.clone().into_bytes()).collect();
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// A key, and the certificate that it signed for itself.
pub type Key = rcgen::CertifiedKey<rcgen::KeyPair>;

/// A fresh one.
pub fn key() -> Result<Key, Error> {
    Ok(rcgen::generate_simple_self_signed(["localhost".into()])?)
}

/// A client that accepts any certificate and shows none.
pub fn client_config(alpn: &str, transport: quinn::TransportConfig) -> Result<quinn::ClientConfig, Error> {
    client(alpn, transport, None)
}

/// A client that accepts any certificate and shows its own.
pub fn client_config_with_key(
    alpn: &str,
    transport: quinn::TransportConfig,
    key: &Key,
) -> Result<quinn::ClientConfig, Error> {
    client(alpn, transport, Some(key))
}

/// A client that accepts any certificate and shows a fresh one: a node that runs this project's library.
pub fn node_config(transport: quinn::TransportConfig) -> Result<quinn::ClientConfig, Error> {
    client_config_with_key("macula-peer/1", transport, &key()?)
}

fn client(alpn: &str, transport: quinn::TransportConfig, key: Option<&Key>) -> Result<quinn::ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)));
    let mut tls = match key {
        Some(key) => {
            let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
            builder.with_client_auth_cert(vec![key.cert.der().clone()], private.into())?
        }
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.into()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// Limits on what the other side may open, and an idle timeout of a minute.
pub fn transport(bidirectional: u32, unidirectional: u32) -> quinn::TransportConfig {
    const IDLE: Duration = Duration::from_secs(60);
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(bidirectional.into())
        .max_concurrent_uni_streams(unidirectional.into())
        .max_idle_timeout(IDLE.try_into().ok());
    transport
}

/// A runtime of `workers` threads.
pub fn tokio_runtime(workers: usize) -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()
}

/// Polls once without asking to be woken; safe for quinn's futures, which look at the state again on every poll.
pub fn poll_now<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
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

/// Tokio, except that quinn's drivers go to the back of the queue before each of their polls. Woken by a stream
/// write, a driver would otherwise run next and send one packet per message.
#[derive(Debug)]
pub struct YieldingRuntime;

impl Runtime for YieldingRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(YieldOnce { future, yielded: false });
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

struct YieldOnce {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    yielded: bool,
}

impl Future for YieldOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.yielded = !self.yielded;
        if self.yielded {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.future.as_mut().poll(context)
    }
}
