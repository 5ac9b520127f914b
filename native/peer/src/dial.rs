//! From an endpoint to a connection: lookup, both address families, retries.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use macula_peer_core::ack_tracker::AckTracker;
use macula_peer_core::config::Config;
use macula_peer_core::errors::ConnectError;
use macula_peer_core::retry::Backoff;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Dialect, Endpoint, Path};
use quinn::congestion::{Controller, ControllerFactory};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, TransportConfig};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout, timeout_at};

use crate::addresses::{Proof, Remote};
use crate::congestion::{Observer, observed};
use crate::conn::Conn;
use crate::handshake::{handshake, not_begun, not_connected};
use crate::link::Link;
use crate::names::Resolver;
use crate::ports::Ports;
use crate::socket::{Current, ExtraGuard, RefusalReason, Refusals, refused};
use crate::tls::dialect_of;
use crate::transport::{self, DIALLED_WINDOW, KNOWN_PATH_ROUND_TRIP, STREAM_WINDOW, set_idle_timeout};

/// RFC 8305, section 5: the recommended delay before the next address is tried beside the first.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// A 0.14.3 gateway handshakes one connection after the other, a few milliseconds each, and refuses what comes
/// meanwhile.
const REFUSED_FIRST_PAUSE: Duration = Duration::from_millis(20);
const REFUSED_LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The TLS name for a host that is not a name TLS knows. No certificate is for it (RFC 6761, section 6.4).
const NO_NAME: &str = "macula.invalid";

/// To a peer on this host there is no network that a first burst could flood. A 0.14.3 gateway, which is often there,
/// loses a frame that has to wait for the congestion window between two packets; this is 100 streams, its limit, with
/// frames of one packet.
const LOCAL_INITIAL_WINDOW: u64 = 128 << 10;

/// A handshake with a gateway on this host takes it some milliseconds.
const STOOD_STILL: Duration = Duration::from_millis(50);

/// How long a second dial is waited for then, before the first connection is used.
const SECOND_DIAL: Duration = Duration::from_secs(1);

/// What a dial needs of its surroundings.
pub(crate) struct Dialer {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) socket: Current,
    pub(crate) refusals: Refusals,
    pub(crate) ports: Arc<Ports>,
    pub(crate) second_dials: Arc<SecondDials>,
    pub(crate) resolver: Resolver,
    pub(crate) tls: Arc<QuicClientConfig>,
    pub(crate) config: Arc<Config>,
    /// For a registration.
    pub(crate) to_relay: bool,
    /// Until it is measured. `None`: nothing is known.
    pub(crate) initial_round_trip: Option<Duration>,
    /// How packets travel.
    pub(crate) path: Path,
}

/// Dials that go on after their callers have given up: a 0.14.3 gateway reads nothing for 5 s when a handshake is
/// broken off.
#[derive(Default)]
pub(crate) struct SecondDials(Mutex<JoinSet<()>>);

impl SecondDials {
    fn spawn(&self, dial: impl Future<Output = ()> + Send + 'static) {
        let mut dials = lock(&self.0);
        while dials.try_join_next().is_some() {}
        dials.spawn(dial);
    }

    /// Breaks all of them off.
    pub(crate) fn end(&self) {
        lock(&self.0).abort_all();
    }
}

impl Dialer {
    /// A link to the endpoint, or why there is none by the deadline.
    pub(crate) async fn dial(self, endpoint: Endpoint, deadline: Instant) -> Result<Link, ConnectError> {
        match timeout_at(deadline.into(), self.race(&endpoint)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ConnectError::TimedOut),
        }
    }

    /// Tries the addresses one after the other, each with a head start before the next; the first link wins.
    async fn race(self, endpoint: &Endpoint) -> Result<Link, ConnectError> {
        let mut addresses = self.resolve(endpoint).await?.into_iter();
        let name = tls_name(endpoint);
        let dialer = Arc::new(self);
        let mut attempts = JoinSet::new();
        let mut failure = ConnectError::Unresolved;
        loop {
            if let Some(address) = addresses.next() {
                attempts.spawn(dialer.clone().attempt(address, name.clone()));
            }
            let more = addresses.len() > 0;
            let next = Instant::now() + ATTEMPT_DELAY;
            tokio::select! {
                done = attempts.join_next() => match done {
                    Some(Ok(Ok(link))) => return Ok(link),
                    // An error from the network of one address counts more than this host's missing route to another.
                    Some(Ok(Err(ConnectError::NoRoute))) if failure != ConnectError::Unresolved => {}
                    Some(Ok(Err(error))) => failure = error,
                    Some(Err(_panicked)) => failure = ConnectError::Handshake("attempt failed".into()),
                    None if !more => return Err(failure),
                    None => {}
                },
                () = sleep_until(next.into()), if more => {}
            }
        }
    }

    /// The addresses of the host, families alternating, IPv6 first (RFC 8305, section 4).
    async fn resolve(&self, endpoint: &Endpoint) -> Result<Vec<SocketAddr>, ConnectError> {
        let port = endpoint.port();
        let found: Vec<SocketAddr> = match endpoint.ip() {
            Some(ip) => vec![(ip, port).into()],
            // RFC 6761, section 6.3: known without a lookup.
            None if endpoint.host() == "localhost" => {
                vec![(Ipv6Addr::LOCALHOST, port).into(), (Ipv4Addr::LOCALHOST, port).into()]
            }
            None => self.resolver.resolve(endpoint.host(), port).await.map_err(|_| ConnectError::Unresolved)?,
        };
        let (socket, is_known) = (self.socket.get(), !found.is_empty());
        let (v6, v4): (Vec<_>, Vec<_>) =
            found.into_iter().filter_map(|a| socket.reachable(a)).partition(|a| is_v6(a.ip()));
        let mut addresses = Vec::with_capacity(v6.len() + v4.len());
        let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
        loop {
            let (a, b) = (v6.next(), v4.next());
            if a.is_none() && b.is_none() {
                break;
            }
            addresses.extend(a.into_iter().chain(b));
        }
        match addresses.is_empty() {
            true if is_known => Err(ConnectError::OtherFamily),
            true => Err(ConnectError::Unresolved),
            false => Ok(addresses),
        }
    }

    /// A link on a path that was found.
    pub(crate) async fn dial_punched(mut self, address: SocketAddr) -> Result<Link, ConnectError> {
        let address = self.socket.get().reachable(address).ok_or(ConnectError::OtherFamily)?;
        self.initial_round_trip = Some(KNOWN_PATH_ROUND_TRIP);
        self.path = Path::HolePunch;
        self.connect(address, NO_NAME, &mut || ()).await
    }

    async fn attempt(self: Arc<Self>, address: SocketAddr, name: String) -> Result<Link, ConnectError> {
        let mut backoff = Backoff::new(REFUSED_FIRST_PAUSE, REFUSED_LONGEST_PAUSE);
        let give_up = Instant::now() + self.config.connect_timeout;
        let mut dial = self.ports.dial(&self.socket.get(), address, self.config.connect_timeout);
        let another = dial.another();
        loop {
            let mut heard = || dial.heard();
            let outcome = tokio::select! {
                outcome = self.connect(address, &name, &mut heard) => outcome,
                never = refusals_of(another.as_deref()) => match never {},
            };
            if outcome.as_ref().is_err_and(|error| *error == ConnectError::Unreachable) {
                dial.refused();
            }
            if let Ok(link) = &outcome
                && stood_still(link)
                && Instant::now() + SECOND_DIAL < give_up
            {
                let (tell, told) = oneshot::channel();
                let dial = self.clone().dial_again(address, name.clone(), give_up);
                self.second_dials.spawn(async move {
                    // If its caller has given up, the link is dropped and closed.
                    let _ = tell.send(dial.await);
                });
                if let Ok(Ok(Some(again))) = timeout(SECOND_DIAL, told).await {
                    link.close();
                    return Ok(again);
                }
            }
            let pause = backoff.pause(fastrand::f64());
            // Said before the dial's own time is over, or it would pass for silence.
            if !matches!(outcome, Err(ConnectError::Refused)) || Instant::now() + 2 * pause >= give_up {
                return outcome;
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn dial_again(self: Arc<Self>, address: SocketAddr, name: String, until: Instant) -> Option<Link> {
        timeout_at(until.into(), self.connect(address, &name, &mut || ())).await.ok()?.ok()
    }

    /// `heard` is called when something has come from there.
    async fn connect(
        &self,
        address: SocketAddr,
        name: &str,
        heard: &mut (impl FnMut() + Send),
    ) -> Result<Link, ConnectError> {
        let mut refusals = self.refusals.subscribe();
        let ack_tracker = Arc::new(Mutex::new(AckTracker::default()));
        let remote = Remote::fixed(address);
        let config = self.client_config(address, ack_tracker.clone(), remote.clone());
        let mut connecting = self.quic.connect_with(config, address, name).map_err(not_begun)?;
        let connecting = async {
            if !matches!(connecting.handshake_data().await.err(), Some(ConnectionError::TimedOut)) {
                heard();
            }
            connecting.await
        };
        let connection = tokio::select! {
            connection = handshake(&self.socket, address, connecting) => connection.map_err(not_connected)?,
            why = refused(&mut refusals, address) => return Err(match why {
                RefusalReason::Unreachable => ConnectError::Unreachable,
                RefusalReason::NoRoute => ConnectError::NoRoute,
            }),
        };
        let dialect = dialect_of(&connection).ok_or(ConnectError::NoProtocol)?;
        let Config { limits, answer_timeout, .. } = *self.config;
        let conn = Conn::new(connection, dialect, self.path, remote);
        let link = Link::new(conn, ack_tracker, limits, answer_timeout);
        if dialect == Dialect::MaculaPeer1 {
            // To us the handshake is over before the peer has seen our certificate. One that may refuse it allows
            // streams when it has not.
            link.put_spare(link.connection.open_bi().await.map_err(not_connected)?);
        }
        Ok(link)
    }

    fn client_config(
        &self,
        address: SocketAddr,
        ack_tracker: Arc<Mutex<AckTracker>>,
        remote: Arc<Remote>,
    ) -> ClientConfig {
        let initial_window = address.ip().to_canonical().is_loopback().then_some(LOCAL_INITIAL_WINDOW);
        let mut transport = TransportConfig::default();
        transport
            .keep_alive_interval(Some(self.config.keep_alive))
            // Raised when the peer's key is known.
            .max_concurrent_bidi_streams(0u8.into())
            .max_concurrent_uni_streams(0u8.into())
            .receive_window(DIALLED_WINDOW.into())
            .stream_receive_window(STREAM_WINDOW.into())
            .datagram_receive_buffer_size(None)
            .congestion_controller_factory(Arc::new(TrackedFactory {
                _proof: self.socket.get().prove(address),
                ack_tracker,
                remote,
                initial_window,
            }));
        set_idle_timeout(&mut transport, &self.config);
        if let Some(round_trip) = self.initial_round_trip {
            transport.initial_rtt(round_trip);
        }
        if self.to_relay {
            transport::to_relay(&mut transport);
        }
        let mut config = ClientConfig::new(self.tls.clone());
        config.transport_config(Arc::new(transport));
        config
    }
}

/// Whether a gateway on this host was stopped or busy during the handshake. quinn would pace the connection by that
/// round trip for a long time, and cut the first burst, and a frame in it, after ten packets.
fn stood_still(link: &Link) -> bool {
    link.dialect == Dialect::Macula && link.remote().ip().is_loopback() && link.connection.rtt() > STOOD_STILL
}

/// Publishes ICMP errors about packets that leave by another port.
async fn refusals_of(another: Option<&ExtraGuard>) -> Infallible {
    match another {
        Some(port) => port.watch_errors().await,
        None => std::future::pending().await,
    }
}

fn is_v6(ip: IpAddr) -> bool {
    ip.to_canonical().is_ipv6()
}

fn tls_name(endpoint: &Endpoint) -> String {
    let valid = rustls::pki_types::ServerName::try_from(endpoint.host()).is_ok();
    if valid { endpoint.host().into() } else { NO_NAME.into() }
}

/// quinn's default controller, with a [`AckTracker`] looking on.
struct TrackedFactory {
    /// As long as the connection lives, its packets may go where it was dialled.
    _proof: Proof,
    ack_tracker: Arc<Mutex<AckTracker>>,
    remote: Arc<Remote>,
    /// `None`: RFC 9002's.
    initial_window: Option<u64>,
}

impl ControllerFactory for TrackedFactory {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let observer = Tracking { ack_tracker: self.ack_tracker.clone(), remote: self.remote.clone(), odd: false };
        observed(observer, self.initial_window, now, mtu)
    }
}

struct Tracking {
    ack_tracker: Arc<Mutex<AckTracker>>,
    remote: Arc<Remote>,
    /// Changes with each acknowledgement. quinn's pacer looks at the round trip only when the window changes, and would
    /// otherwise cut a burst, and a frame in it, at what the round trip was guessed to be before the handshake.
    odd: bool,
}

impl Observer for Tracking {
    fn sent(&mut self, now: Instant) {
        lock(&self.ack_tracker).sent(now);
    }

    fn acknowledged(&mut self, sent: Instant, shortest: Duration) {
        self.remote.patience.measured(shortest);
        lock(&self.ack_tracker).acknowledged(sent);
    }

    fn acknowledgements_end(&mut self, now: Instant, in_flight: u64) {
        lock(&self.ack_tracker).acknowledgements_end(now, in_flight);
        self.odd = !self.odd;
    }

    fn lost(&mut self, now: Instant) {
        lock(&self.ack_tracker).lost(now);
    }

    fn extra_window(&self) -> u64 {
        self.odd.into()
    }

    fn next_path(&self) -> Self {
        Self { ack_tracker: self.ack_tracker.clone(), remote: self.remote.clone(), odd: self.odd }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn a_second_dial_ends_with_its_owner_or_by_itself() {
        let (dials, (tell, told)) = (SecondDials::default(), oneshot::channel());
        let (left, ends) = oneshot::channel::<()>();
        dials.spawn(async move {
            let _ = tell.send(());
        });
        dials.spawn(async move {
            let _left = left;
            std::future::pending().await
        });
        assert!(told.await.is_ok());
        dials.end();
        // Dropped unsent.
        assert!(ends.await.is_err());
    }
}
