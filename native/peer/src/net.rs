//! The UDP socket, QUIC on it, and dialling over it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use io::ErrorKind;
use macula_peer_core::config::Config;
use macula_peer_core::errors::ConnectError;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, Path};
use quinn::ServerConfig;
use quinn::crypto::rustls::QuicClientConfig;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use crate::dial::{Dialer, SecondDials};
use crate::identity::Identity;
use crate::lifecycle::Lifecycle;
use crate::link::Link;
use crate::names::Resolver;
use crate::ports::Ports;
use crate::runtime::BatchingRuntime;
use crate::socket::{self, Current, Received, ReceivedBy, Refusals, Signals, Socket};

/// How often to try to get the old port back.
const PORT_AGAIN: Duration = Duration::from_secs(1);

/// What comes over the socket and is not QUIC's.
pub(crate) type ReceivedSignals = mpsc::Receiver<(ReceivedBy, Received)>;

pub(crate) struct Net {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    pub(crate) quic: quinn::Endpoint,
    pub(crate) refusals: Refusals,
    socket: Current,
    /// The task that publishes the socket's errors.
    errors: Mutex<AbortHandle>,
    signals: Signals,
    moves: watch::Sender<()>,
    /// Local ports beside the main socket's.
    pub(crate) ports: Arc<Ports>,
    second_dials: Arc<SecondDials>,
    resolver: Resolver,
    tls: Tls,
    /// QUIC's settings, for another socket too.
    endpoint: quinn::EndpointConfig,
    /// For the local gateway, where the main socket is bound to an address that cannot reach it.
    loopback: Mutex<Option<Loopback>>,
}

/// How to check the certificates of dialled peers.
pub(crate) struct Tls {
    pub(crate) peers: Arc<QuicClientConfig>,
    /// Of a gateway on this host: any process that may bind a port of this host could as well read this one's memory.
    pub(crate) gateway: Arc<QuicClientConfig>,
}

struct Loopback {
    quic: quinn::Endpoint,
    socket: Current,
    errors: AbortHandle,
}

impl Net {
    /// Binds the socket, and hands over what comes to it and is not QUIC's.
    pub(crate) fn bind(
        config: Arc<Config>,
        identity: &Identity,
        server: ServerConfig,
        tls: Tls,
        lifecycle: Arc<Lifecycle>,
    ) -> io::Result<(Arc<Self>, ReceivedSignals)> {
        let _inside = lifecycle.enter();
        let refusals = socket::refusals();
        let (signals, heard) = socket::signals();
        let reserved = config.reserved_port(config.ip);
        let socket = Socket::bind(config.ip, config.port, reserved, refusals.clone(), signals.clone(), Arc::default())?;
        let mut endpoint = identity.endpoint_config();
        // The first bits of a packet tell QUIC from signals on this socket.
        endpoint.grease_quic_bit(false);
        let batching = Arc::new(BatchingRuntime);
        // Each connection is admitted, or not, with settings of its own.
        let quic = quinn::Endpoint::new_with_abstract_socket(endpoint.clone(), Some(server), socket.clone(), batching)?;
        let errors = Mutex::new(lifecycle.spawn(socket.clone().watch_errors()));
        let net = Self {
            config,
            quic,
            refusals,
            socket: Current::new(socket),
            errors,
            signals,
            moves: watch::Sender::new(()),
            ports: Arc::default(),
            second_dials: Arc::default(),
            resolver: Resolver::new(),
            tls,
            endpoint,
            loopback: Mutex::default(),
            lifecycle: lifecycle.clone(),
        };
        Ok((Arc::new(net), heard))
    }

    /// A direct link to an endpoint, which need not be the peer's.
    pub(crate) async fn dial(&self, endpoint: Endpoint, until: Instant) -> Result<Link, ConnectError> {
        self.dialer().dial(endpoint, until).await
    }

    /// The same, to the local gateway.
    pub(crate) async fn dial_gateway(&self, endpoint: Endpoint, until: Instant) -> Result<Link, ConnectError> {
        let mut dialer = self.dialer();
        if endpoint.is_loopback() {
            dialer.tls = self.tls.gateway.clone();
            let loopback = endpoint.ip().unwrap_or(Ipv4Addr::LOCALHOST.into());
            if dialer.socket.get().reachable((loopback, endpoint.port()).into()).is_none() {
                (dialer.quic, dialer.socket) = self.loopback(loopback)?;
            }
        }
        dialer.dial(endpoint, until).await
    }

    /// A link to a relay, kept alive as one.
    pub(crate) async fn dial_relay(&self, relay: Endpoint, until: Instant) -> Result<Link, ConnectError> {
        Dialer { to_relay: true, ..self.dialer() }.dial(relay, until).await
    }

    /// A link on a path that was found.
    pub(crate) async fn dial_punched(&self, address: SocketAddr) -> Result<Link, ConnectError> {
        self.dialer().dial_punched(address).await
    }

    fn dialer(&self) -> Dialer {
        Dialer {
            to_relay: false,
            initial_round_trip: None,
            path: Path::Direct,
            quic: self.quic.clone(),
            socket: self.current_socket(),
            refusals: self.refusals.clone(),
            ports: self.ports.clone(),
            second_dials: self.second_dials.clone(),
            resolver: self.resolver.clone(),
            tls: self.tls.peers.clone(),
            config: self.config.clone(),
        }
    }

    /// QUIC on a socket at this address of the host, for a gateway that the main socket cannot reach.
    fn loopback(&self, ip: IpAddr) -> Result<(quinn::Endpoint, Current), ConnectError> {
        let mut loopback = lock(&self.loopback);
        if let Some(Loopback { quic, socket, .. }) = &*loopback {
            return Ok((quic.clone(), socket.clone()));
        }
        let _inside = self.lifecycle.enter();
        let open = || {
            // It gets no signals.
            let (signals, _) = socket::signals();
            let reserved = self.config.reserved_port(Some(ip));
            let socket = Socket::bind(Some(ip), 0, reserved, self.refusals.clone(), signals, Arc::default())?;
            let (config, batching) = (self.endpoint.clone(), Arc::new(BatchingRuntime));
            let quic = quinn::Endpoint::new_with_abstract_socket(config, None, socket.clone(), batching)?;
            Ok((quic, socket))
        };
        let (quic, socket) = open().map_err(|error: io::Error| {
            tracing::warn!(%error, %ip, "no socket to reach the local gateway from");
            ConnectError::OtherFamily
        })?;
        let errors = self.lifecycle.spawn(socket.clone().watch_errors());
        let socket = Current::new(socket);
        *loopback = Some(Loopback { quic: quic.clone(), socket: socket.clone(), errors });
        Ok((quic, socket))
    }

    /// The socket.
    pub(crate) fn socket(&self) -> Arc<Socket> {
        self.current_socket().get()
    }

    /// The same, for tasks that may hold it for long.
    pub(crate) fn current_socket(&self) -> Current {
        self.socket.clone()
    }

    /// Tells when [`Net::socket`] is another one from now on.
    pub(crate) fn moves(&self) -> watch::Receiver<()> {
        self.moves.subscribe()
    }

    /// Moves the endpoint, with its live links, to another local address.
    pub(crate) fn rebind(&self, ip: Option<IpAddr>, port: u16) -> io::Result<()> {
        let _inside = self.lifecycle.enter();
        let reserved = self.config.reserved_port(ip);
        let (refusals, signals) = (self.refusals.clone(), self.signals.clone());
        let addresses = self.socket().addresses().clone();
        let socket = Socket::bind(ip, port, reserved, refusals, signals, addresses)?;
        self.quic.rebind_abstract(socket.clone())?;
        let errors = self.lifecycle.spawn(socket.clone().watch_errors());
        self.socket.set(socket);
        std::mem::replace(&mut *lock(&self.errors), errors).abort();
        self.ports.clear();
        self.moves.send_replace(());
        Ok(())
    }

    /// Replaces the socket when it is broken, until the engine stops. Its port is kept if possible, because peers know
    /// it.
    pub(crate) async fn mend_socket(self: Arc<Self>) {
        let mut stopping = self.lifecycle.stopping();
        let mut moves = self.moves();
        let mut wanted = None;
        loop {
            let socket = self.socket();
            tokio::select! {
                () = socket.broken() => {}
                () = tokio::time::sleep(PORT_AGAIN), if wanted.is_some() => {}
                Ok(()) = moves.changed() => {
                    // It was moved meanwhile.
                    wanted = None;
                    continue;
                }
                // Also if it was said before this task first ran.
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            wanted = self.replace_socket(&socket, wanted);
            moves.mark_unchanged();
        }
    }

    /// Binds a socket instead of one that is broken or at the wrong port. Returns the port that is still wanted.
    fn replace_socket(&self, old: &Socket, wanted: Option<u16>) -> Option<u16> {
        if !std::ptr::eq(old, &*self.socket()) {
            // It was moved meanwhile.
            return None;
        }
        let (ip, port) = (old.local().ip(), wanted.unwrap_or(old.local().port()));
        let ip = (!ip.is_unspecified()).then_some(ip);
        let bound = match self.rebind(ip, port) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() != ErrorKind::AddrInUse => Err(error),
            // The old socket has it until quinn drops that.
            Err(_) if wanted.is_none() => self.rebind(ip, 0).map(|()| Some(port)),
            Err(_) => return wanted,
        };
        match bound {
            Ok(wanted) => {
                old.replaced();
                tracing::warn!(address = %self.socket().local(), "the socket failed and was replaced");
                wanted
            }
            Err(error) => {
                tracing::debug!(%error, "cannot replace the socket that failed");
                wanted
            }
        }
    }

    /// Forgets in time what is kept of addresses.
    pub(crate) fn expire(&self) {
        self.socket().addresses().expire();
    }

    /// Closes what does not end with the engine by itself.
    pub(crate) fn stop(&self) {
        lock(&self.errors).abort();
        if let Some(loopback) = &*lock(&self.loopback) {
            loopback.errors.abort();
        }
        self.ports.clear();
        self.second_dials.end();
    }

    /// Closes all connections.
    pub(crate) fn close(&self) {
        self.quic.close(0u8.into(), b"");
        if let Some(loopback) = lock(&self.loopback).take() {
            loopback.quic.close(0u8.into(), b"");
        }
    }
}
