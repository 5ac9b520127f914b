#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use macula_peer_core::proto::control::{LIMITS, Limit, Refusal};
use macula_peer_core::types::{Fingerprint, RelayConfig, Secret};
use macula_peer_testkit::quic;
use macula_peer_wire::Reassembler;
use quinn::crypto::rustls::HandshakeData;
use quinn::{ConnectionError, Endpoint};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::super::server::{Opener, Relay};
use super::super::testing::{Forwarder, PATIENCE, client_config, echo, endpoint, responder, server_config, transport};
use super::*;
use crate::addresses::Remote;
use crate::handshake::not_connected;
use crate::transport::{RELAY_KEEP_ALIVE, to_relay};

/// Within this, silence must have been noticed: about a second, on a machine that has other things to do. An idle timeout
/// would notice after 45 s.
const NOTICED: Duration = Duration::from_secs(4);

/// How long a dial to nobody takes.
const DIAL_TIMEOUT: Duration = Duration::from_millis(300);

/// A relay with a runtime of its own, so that it can be killed: nobody is told anything.
struct Running {
    address: SocketAddr,
    relay: Arc<Relay>,
    runtime: Option<Runtime>,
}

impl Running {
    fn new(config: RelayConfig) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), config)
    }

    fn at(address: SocketAddr, config: RelayConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let entered = runtime.enter();
        let relay = Relay::new(config, responder(), Arc::default());
        let endpoint = Endpoint::server(server_config(transport()), address).unwrap();
        drop(entered);
        let address = endpoint.local_addr().unwrap();
        runtime.spawn(serve_all(relay.clone(), endpoint));
        Self { address, relay, runtime: Some(runtime) }
    }

    fn kill(mut self) {
        tokio::task::block_in_place(|| self.runtime.take().unwrap().shutdown_timeout(PATIENCE));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Who a node is, it says with the name that it asks for.
async fn serve_all(relay: Arc<Relay>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let relay = relay.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let data = connection.handshake_data().unwrap().downcast::<HandshakeData>().unwrap();
            let mut owner = [0; 32];
            owner.iter_mut().zip(data.server_name.unwrap().bytes()).for_each(|(to, from)| *to = from);
            let Ok((send, mut receive)) = connection.accept_bi().await else { return };
            let mut frames = Reassembler::new(LIMITS);
            while frames.next_frame().unwrap().is_none() {
                frames.push(receive.read_chunk(usize::MAX, true).await.unwrap().unwrap().bytes);
            }
            let remote = Remote::fixed(connection.remote_address());
            let owner = Fingerprint::from(owner);
            let opener = Opener { connection: connection.clone(), remote, owner, place: None };
            relay.serve(opener, send, receive, frames).await;
            connection.closed().await;
        });
    }
}

/// A node that echoes what comes over circuits.
struct Node {
    client: Arc<RelayClient>,
    events: Arc<Mutex<Vec<RelayEvent>>>,
    task: tokio::task::JoinHandle<()>,
    dials: Arc<AtomicUsize>,
    /// How connections over circuits ended that others began.
    ended: Arc<Mutex<Vec<ConnectionError>>>,
}

struct Options {
    owner: &'static str,
    mtu: u16,
    secret: Option<Bytes>,
    idle: Duration,
    timeout: Duration,
    /// Where the second dial and those after it go to.
    later: Option<SocketAddr>,
    keep_alive: Duration,
    /// Where the last connection goes that another node began.
    accepted: Option<Arc<Mutex<Option<Connection>>>>,
}

impl Default for Options {
    fn default() -> Self {
        let timeout = Duration::from_secs(5);
        Self {
            owner: "owner",
            mtu: 1452,
            secret: None,
            idle: PATIENCE,
            timeout,
            later: None,
            keep_alive: RELAY_KEEP_ALIVE,
            accepted: None,
        }
    }
}

fn id(name: &str) -> Id {
    Id::new(name.as_bytes().to_vec()).unwrap()
}

fn node(name: &str, relay: SocketAddr, options: Options) -> Node {
    let Options { owner, mtu, secret, idle, timeout: patience, later, keep_alive, accepted } = options;
    let quic = endpoint(None);
    let dials = Arc::new(AtomicUsize::new(0));
    let dial = {
        let dials = dials.clone();
        move || {
            let first = dials.fetch_add(1, Ordering::Relaxed) == 0;
            let address = if first { relay } else { later.unwrap_or(relay) };
            let mut transport = transport();
            to_relay(&mut transport);
            transport.initial_mtu(mtu).mtu_discovery_config(None).keep_alive_interval(Some(keep_alive));
            let connecting = quic.connect_with(client_config(transport), address, owner).unwrap();
            Box::pin(async move {
                match timeout(DIAL_TIMEOUT, connecting).await {
                    Ok(connected) => connected.map_err(not_connected),
                    Err(_) => Err(ConnectError::TimedOut),
                }
            }) as Dialling
        }
    };
    let ended = Arc::new(Mutex::new(Vec::new()));
    let on_incoming = {
        let (serving, ended) = (Mutex::new(JoinSet::new()), ended.clone());
        move |incoming: IncomingCircuit| {
            let (ended, accepted) = (ended.clone(), accepted.clone());
            lock(&serving).spawn(async move {
                if let Ok(connection) = incoming.accept(&server_config(transport())).await {
                    if let Some(accepted) = accepted {
                        *lock(&accepted) = Some(connection.clone());
                    }
                    echo(connection.clone()).await;
                    let reason = connection.closed().await;
                    lock(&ended).push(reason);
                }
            });
        }
    };
    let events = Arc::new(Mutex::new(Vec::new()));
    let on_event = {
        let events = events.clone();
        move |event| lock(&events).push(event)
    };
    let client = RelayClient::new(Settings {
        dial: Box::new(dial),
        node_id: id(name),
        realm_secret: secret,
        successions: Box::new(Vec::new),
        client: client_config(transport()),
        server: Some(server_config(transport())),
        timeout: patience,
        idle,
        on_event: Arc::new(on_event),
        on_incoming: Box::new(on_incoming),
        on_punch: Box::new(|_| {}),
        description: watch::channel(Default::default()).1,
    });
    let task = tokio::spawn(client.clone().run());
    Node { client, events, task, dials, ended }
}

/// A node that is registered for ever.
async fn standing(name: &str, relay: SocketAddr, options: Options) -> Node {
    let node = node(name, relay, options);
    node.client.set_standing(Some(id(name)));
    until("registered", || node.is_registered()).await;
    node
}

impl Node {
    fn is_registered(&self) -> bool {
        matches!(self.client.status().state, RegistrationState::Registered { .. })
    }

    fn events(&self) -> Vec<RelayEvent> {
        lock(&self.events).clone()
    }

    fn registrations(&self) -> usize {
        self.events().iter().filter(|event| matches!(event, RelayEvent::Registered { .. })).count()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < PATIENCE, "not in time: {what} ({place})");
            sleep(Duration::from_millis(2)).await;
        }
    }
}

async fn echoed(connection: &Connection, bytes: Vec<u8>) {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let sent = bytes.clone();
    let writing = async move {
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
    };
    let (_, came) = timeout(PATIENCE, async { tokio::join!(writing, receive.read_to_end(usize::MAX)) }).await.unwrap();
    assert!(came.unwrap() == sent, "came back different");
}

fn random(len: usize) -> Vec<u8> {
    (0..len).map(|_| fastrand::u8(..)).collect()
}

/// As much as the machine gives.
fn unlimited() -> RelayConfig {
    let bandwidth = 1 << 40;
    RelayConfig {
        bandwidth,
        packet_queue: 1 << 20,
        max_sessions_per_node: 100,
        max_sessions: 100,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_carries_a_connection_and_is_freed_with_it() {
    let relay = Running::new(RelayConfig::default());
    let b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", relay.address, Options::default()).await;
    let RegistrationState::Registered { address } = a.client.status().state else { panic!("registered before") };
    assert!(address.ip().is_loopback());
    assert_eq!(a.events(), [RelayEvent::Registered { address }]);
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(1000)).await;
    echoed(&connection, random(0)).await;
    until("both count the circuit", || [&a, &b].iter().all(|node| node.client.status().circuits == 1)).await;
    assert_eq!(relay.relay.stats().circuits, 1);
    connection.close(0u8.into(), b"");
    until("the circuit is freed", || relay.relay.stats().circuits == 0).await;
    until("both forget the circuit", || [&a, &b].iter().all(|node| node.client.status().circuits == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_megabytes_come_back_intact_over_wide_and_narrow_ways() {
    for (mtu_a, mtu_b) in [(1452, 1452), (1200, 1452), (1452, 1200), (1200, 1200)] {
        let relay = Running::new(unlimited());
        let _b = standing("b", relay.address, Options { mtu: mtu_b, ..Options::default() }).await;
        let a = node("a", relay.address, Options { mtu: mtu_a, ..Options::default() });
        let connection = a.client.connect(&id("b")).await.unwrap();
        echoed(&connection, random(10 << 20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_circuits_at_once() {
    let relay = Running::new(unlimited());
    let _b = standing("b", relay.address, Options::default()).await;
    let a = node("a", relay.address, Options::default());
    let mut calls = JoinSet::new();
    for _ in 0..20 {
        let client = a.client.clone();
        calls.spawn(async move {
            let connection = client.connect(&id("b")).await.unwrap();
            echoed(&connection, random(100_000)).await;
            connection
        });
    }
    let connections = calls.join_all().await;
    assert_eq!(relay.relay.stats().circuits, 20);
    assert_eq!(a.dials.load(Ordering::Relaxed), 1, "all over one connection");
    connections.iter().for_each(|connection| connection.close(0u8.into(), b""));
    until("all circuits are freed", || relay.relay.stats().circuits == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_says_why_there_is_no_circuit() {
    let relay = Running::new(RelayConfig { max_sessions_per_node: 1, ..Default::default() });
    let a = node("a", relay.address, Options::default());
    assert_eq!(a.client.connect(&id("b")).await.err(), Some(CircuitError::NotRegistered));
    let _b = standing("b", relay.address, Options::default()).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    let refused = a.client.connect(&id("b")).await.err();
    assert_eq!(refused, Some(CircuitError::Refused(Refusal::SessionsPerNode)));
    echoed(&connection, random(1000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_node_is_told_why_and_does_not_ask_again_at_once() {
    let relay = Running::new(RelayConfig::default());
    let _a = standing("a", relay.address, Options::default()).await;
    let other = node("a", relay.address, Options { owner: "other", ..Options::default() });
    let refused = CircuitError::Refused(Refusal::NodeIdTaken);
    assert_eq!(other.client.connect(&id("a")).await.err(), Some(refused.clone()));
    other.client.set_standing(Some(id("a")));
    let begun = Instant::now();
    assert_eq!(other.client.connect(&id("a")).await.err(), Some(refused));
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(other.client.status().state, RegistrationState::Refused(Refusal::NodeIdTaken));
    assert_eq!(other.events(), [RelayEvent::Refused(Refusal::NodeIdTaken)]);
    assert_eq!(other.dials.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_registration_is_taken_over_knows_it() {
    let relay = Running::new(RelayConfig::default());
    let one = standing("a", relay.address, Options::default()).await;
    let _two = standing("a", relay.address, Options::default()).await;
    let taken_over = RelayEvent::Refused(Refusal::TakenOver);
    until("it is told", || one.events().len() == 2).await;
    assert!(matches!(&one.events()[..], [RelayEvent::Registered { .. }, told] if *told == taken_over));
    let refused = Some(CircuitError::Refused(Refusal::TakenOver));
    assert_eq!(one.client.connect(&id("b")).await.err(), refused, "callers know why");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_proves_that_it_knows_the_realms_secret() {
    let relay = Running::new(RelayConfig { realm_secret: Some(Secret::new(b"secret".to_vec())), ..Default::default() });
    for secret in [None, Some(Bytes::from_static(b"guess"))] {
        let stranger = node("a", relay.address, Options { secret, ..Options::default() });
        assert_eq!(stranger.client.connect(&id("b")).await.err(), Some(CircuitError::Refused(Refusal::Realm)));
    }
    standing("a", relay.address, Options { secret: Some(Bytes::from_static(b"secret")), ..Options::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_no_relay_is_found_out() {
    // The first stops and resets a control stream with error 4, as the protocol has it; the second speaks macula only.
    let node_server = endpoint(Some(server_config(transport())));
    let macula = endpoint(Some(quic::server_config(&["macula".into()], transport()).unwrap()));
    let addresses = [&node_server, &macula].map(|endpoint| endpoint.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(incoming) = node_server.accept().await {
            let connection = incoming.await.unwrap();
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            receive.stop(4u8.into()).unwrap();
            send.reset(4u8.into()).unwrap();
            connection.closed().await;
        }
    });
    tasks.spawn(async move {
        while let Some(incoming) = macula.accept().await {
            incoming.await.unwrap().closed().await;
        }
    });
    for address in addresses {
        let a = node("a", address, Options::default());
        assert_eq!(a.client.connect(&id("b")).await.err(), Some(CircuitError::NotARelay));
        assert_eq!(a.client.status().state, RegistrationState::Down(CircuitError::NotARelay));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_relay_that_restarts_is_registered_at_again() {
    let relay = Running::new(RelayConfig::default());
    let address = relay.address;
    let a = standing("a", address, Options::default()).await;
    let b = standing("b", address, Options::default()).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(1000)).await;
    relay.kill();
    let relay = Running::at(address, RelayConfig::default());
    // Something is unanswered from here on.
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(b"lost").await.unwrap();
    let begun = Instant::now();
    timeout(NOTICED, connection.closed()).await.expect("the inner connection ends");
    until("a is registered again", || a.registrations() == 2).await;
    assert!(begun.elapsed() < NOTICED);
    assert!(matches!(a.events()[..], [RelayEvent::Registered { .. }, RelayEvent::Lost, RelayEvent::Registered { .. }]));
    // b has heard nothing, and finds out by its next keep-alive or because it has something to say.
    assert_eq!(b.client.connect(&id("a")).await.map(|_| ()).err(), None);
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(1000)).await;
    drop(relay);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_closes_is_registered_at_again_within_a_second() {
    let relay = Running::new(RelayConfig::default());
    let address = relay.address;
    let a = standing("a", address, Options::default()).await;
    relay.relay.close();
    until("lost", || a.events().contains(&RelayEvent::Lost)).await;
    relay.kill();
    let _relay = Running::at(address, RelayConfig::default());
    until("registered again", || a.registrations() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_relay_is_left_for_one_that_answers() {
    let relay = Running::new(RelayConfig::default());
    let forwarder = Forwarder::new(relay.address).await;
    let _b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", forwarder.address, Options { later: Some(relay.address), ..Options::default() }).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(1000)).await;
    assert_eq!(a.client.address(), Some(forwarder.address));
    forwarder.swallow(true);
    let begun = Instant::now();
    // A caller does not notice more than a pause.
    let next = a.client.connect(&id("b")).await.unwrap();
    assert!(begun.elapsed() < NOTICED);
    timeout(NOTICED, connection.closed()).await.expect("the inner connection ends");
    echoed(&next, random(1000)).await;
    assert_eq!(a.registrations(), 2);
    assert_eq!(a.client.address(), Some(relay.address), "where it is now");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inner_packets_notice_a_silent_relay() {
    let relay = Running::new(RelayConfig::default());
    let forwarder = Forwarder::new(relay.address).await;
    let _b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", forwarder.address, Options { later: Some(relay.address), ..Options::default() }).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(10)).await;
    forwarder.swallow(true);
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(b"lost").await.unwrap();
    timeout(NOTICED, connection.closed()).await.expect("the inner connection ends");
    until("registered again", || a.registrations() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_node_notices_a_silent_relay_by_its_keep_alives() {
    let relay = Running::new(RelayConfig::default());
    let forwarder = Forwarder::new(relay.address).await;
    let options = Options { later: Some(relay.address), keep_alive: Duration::from_millis(100), ..Options::default() };
    let a = standing("a", forwarder.address, options).await;
    forwarder.swallow(true);
    until("registered again", || a.registrations() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_told_when_a_silent_relay_cannot_be_reached_anew() {
    let relay = Running::new(RelayConfig::default());
    let forwarder = Forwarder::new(relay.address).await;
    let a = standing("a", forwarder.address, Options::default()).await;
    forwarder.swallow(true);
    let begun = Instant::now();
    let error = a.client.connect(&id("b")).await.err();
    assert_eq!(error, Some(CircuitError::Relay(ConnectError::TimedOut)));
    assert!(begun.elapsed() < NOTICED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_was_silent_for_a_moment_is_kept() {
    let relay = Running::new(RelayConfig::default());
    let forwarder = Forwarder::new(relay.address).await;
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let _b = standing("b", relay.address, Options::default()).await;
    let later = nobody.local_addr().ok();
    let a = standing("a", forwarder.address, Options { later, ..Options::default() }).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    echoed(&connection, random(10)).await;
    forwarder.swallow(true);
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(b"late").await.unwrap();
    send.finish().unwrap();
    until("a dials beside", || a.dials.load(Ordering::Relaxed) > 1).await;
    forwarder.swallow(false);
    assert_eq!(timeout(PATIENCE, receive.read_to_end(100)).await.unwrap().unwrap(), b"late");
    echoed(&a.client.connect(&id("b")).await.unwrap(), random(1000)).await;
    assert_eq!(a.registrations(), 1);
    assert!(connection.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_that_the_relay_ends_takes_its_connection_along() {
    let relay = Running::new(RelayConfig::default());
    let b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", relay.address, Options::default()).await;
    let accepted = b.client.connect(&id("a")).await.unwrap();
    let dialled = a.client.connect(&id("b")).await.unwrap();
    echoed(&dialled, random(1000)).await;
    // Aborted, it says nothing to the other nodes.
    b.task.abort();
    timeout(NOTICED, dialled.closed()).await.expect("ended by the relay");
    timeout(NOTICED, accepted.closed()).await.expect("ended with the task");
    until("a forgets both circuits", || a.client.status().circuits == 0).await;
    assert_eq!(a.registrations(), 1);
    assert_eq!(b.client.connect(&id("a")).await.err(), Some(CircuitError::Stopped));
    assert_eq!(b.client.status().state, RegistrationState::Unused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_ends_a_connection_is_heard_before_its_circuit_ends() {
    let relay = Running::new(RelayConfig::default());
    let b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", relay.address, Options::default()).await;
    for (from, to, name) in [(&a, &b, "b"), (&b, &a, "a")] {
        let connection = from.client.connect(&id(name)).await.unwrap();
        echoed(&connection, random(10)).await;
        connection.close(7u8.into(), b"reason");
        until("the other side has ended", || !lock(&to.ended).is_empty()).await;
        let ended = lock(&to.ended)[0].clone();
        assert!(
            matches!(&ended, ConnectionError::ApplicationClosed(close) if close.error_code == 7u8.into()),
            "{ended}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_that_nobody_waits_for_any_more_is_given_up() {
    let relay = Running::new(RelayConfig::default());
    // Registered, and never answering over circuits.
    let connecting = endpoint(None).connect_with(client_config(transport()), relay.address, "deaf").unwrap();
    let _deaf = Registration::new(connecting.await.unwrap(), id("deaf"), None, Vec::new()).await.unwrap();
    let a = node("a", relay.address, Options::default());
    for patience in [0, 1, 3, 10, 50, 100] {
        let connected = timeout(Duration::from_millis(patience), a.client.connect(&id("deaf"))).await;
        assert!(!matches!(connected, Ok(Ok(_))));
    }
    until("all circuits are freed", || relay.relay.stats().circuits == 0 && a.client.status().circuits == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_on_demand_ends_when_it_is_not_used() {
    let relay = Running::new(RelayConfig::default());
    let b = standing("b", relay.address, Options::default()).await;
    let idle = Duration::from_millis(200);
    let mut a = node("a", relay.address, Options { idle, ..Options::default() });
    let connection = a.client.connect(&id("b")).await.unwrap();
    assert!(timeout(idle * 3, &mut a.task).await.is_err(), "used by its circuit");
    connection.close(0u8.into(), b"");
    timeout(PATIENCE, &mut a.task).await.unwrap().unwrap();
    until("a is not registered any more", || relay.relay.stats().registrations == 1).await;
    assert_eq!(a.client.connect(&id("b")).await.err(), Some(CircuitError::Stopped));
    assert!(b.is_registered());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standing_registration_stays_and_may_change_its_name() {
    let relay = Running::new(RelayConfig::default());
    let idle = Duration::from_millis(50);
    let a = standing("a", relay.address, Options { idle, ..Options::default() }).await;
    let b = standing("b", relay.address, Options::default()).await;
    assert_eq!(b.client.connect(&id("c")).await.err(), Some(CircuitError::NotRegistered));
    a.client.set_standing(Some(id("c")));
    until("registered by another name", || a.registrations() == 2).await;
    echoed(&b.client.connect(&id("c")).await.unwrap(), random(100)).await;
    assert_eq!(b.client.connect(&id("a")).await.err(), Some(CircuitError::NotRegistered));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_hears_that_the_relay_drops_its_packets() {
    let relay = Running::new(RelayConfig { bandwidth: 10_000, ..RelayConfig::default() });
    let _b = standing("b", relay.address, Options::default()).await;
    let a = standing("a", relay.address, Options::default()).await;
    let connection = a.client.connect(&id("b")).await.unwrap();
    let mut send = connection.open_uni().await.unwrap();
    let _ = timeout(Duration::from_millis(500), send.write_all(&random(1 << 20))).await;
    let dropped = |event: &RelayEvent| matches!(event, RelayEvent::Dropped { limit: Limit::Bandwidth, .. });
    until("told of it", || a.events().iter().any(dropped)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_an_error() {
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let a = node("a", nobody.local_addr().unwrap(), Options::default());
    let down = CircuitError::Relay(ConnectError::TimedOut);
    assert_eq!(a.client.connect(&id("b")).await.err(), Some(down.clone()));
    assert_eq!(a.client.status().state, RegistrationState::Down(down));
    assert_eq!(a.events(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_client_leaves_no_task_and_tells_the_other_nodes() {
    let relay = Running::new(RelayConfig::default());
    let b = standing("b", relay.address, Options::default()).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    {
        let mut a = standing("a", relay.address, Options::default()).await;
        let mut connections = Vec::new();
        for _ in 0..3 {
            let connection = a.client.connect(&id("b")).await.unwrap();
            echoed(&connection, random(1000)).await;
            connections.push(connection);
        }
        assert!(metrics.num_alive_tasks() > before + 3);
        a.client.stop();
        timeout(PATIENCE, &mut a.task).await.unwrap().unwrap();
        for connection in connections {
            assert!(connection.close_reason().is_some());
        }
        until("b has forgotten the circuits", || b.client.status().circuits == 0).await;
    }
    until("all tasks have ended", || metrics.num_alive_tasks() <= before).await;
}

/// `cargo test --release -p macula-peer --lib -- --ignored --nocapture relay::client::tests::measure`
#[ignore = "a measurement"]
#[allow(clippy::print_stdout)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn measure() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 200;
    for mtu in [1452, 1200] {
        let relay = Running::new(unlimited());
        let accepted = Arc::new(Mutex::new(None));
        let b =
            standing("b", relay.address, Options { mtu, accepted: Some(accepted.clone()), ..Options::default() }).await;
        let a = standing("a", relay.address, Options { mtu, ..Options::default() }).await;
        let begun = Instant::now();
        let connection = a.client.connect(&id("b")).await.unwrap();
        let connected = begun.elapsed();
        let begun = Instant::now();
        for _ in 0..1000 {
            echoed(&connection, vec![1; 100]).await;
        }
        let echo = begun.elapsed() / 1000;
        let other = lock(&accepted).take().unwrap();
        let begun = Instant::now();
        let mut send = connection.open_uni().await.unwrap();
        let writing = tokio::spawn(async move {
            let chunk = Bytes::from(vec![7; CHUNK]);
            for _ in 0..CHUNKS {
                send.write_chunk(chunk.clone()).await.unwrap();
            }
            send.finish().unwrap();
        });
        let mut receive: quinn::RecvStream = other.accept_uni().await.unwrap();
        let mut got = 0;
        while let Some(chunk) = receive.read_chunk(usize::MAX, true).await.unwrap() {
            got += chunk.bytes.len();
        }
        writing.await.unwrap();
        assert_eq!(got, CHUNK * CHUNKS);
        let rate = got as f64 / begun.elapsed().as_secs_f64() / 1e6;
        let path = connection.stats().path;
        println!("mtu {mtu}: circuit and handshake {connected:?}, echo {echo:?}, one stream {rate:.0} MB/s");
        println!(
            "  lost {} of {}, b knows {} circuit",
            path.lost_packets,
            path.sent_packets,
            b.client.status().circuits
        );
    }
}
