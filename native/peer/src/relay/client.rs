//! This node at one relay: registered for ever or when a circuit is wanted, again when the relay was lost, and twice for a
//! moment when the relay is silent.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::errors::{CircuitError, ConnectError};
use macula_peer_core::liveness::Liveness;
use macula_peer_core::proto::control::{Id, Limit, Probes, Refusal};
use macula_peer_core::retry::{Backoff, Registering};
use quinn::{ClientConfig, Connection, ServerConfig};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::registration::{
    Description, Handle, IncomingCircuit, PunchSession, Registration, Serving, Successions, Terms,
};
use crate::sync::lock;

/// Between dials while the relay is silent.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause while somebody waits: as for peers.
const LONGEST_PAUSE_WANTED: Duration = Duration::from_secs(1);

/// How often another circuit is asked for when one ends before there is a connection over it: the other node may just have
/// registered anew.
const MORE_CIRCUITS: usize = 2;

/// A connection to the relay, of any dialect, or why there is none. It must come to an end by itself.
pub(crate) type Dialling = Pin<Box<dyn Future<Output = Result<Connection, ConnectError>> + Send>>;

pub(crate) struct Settings {
    pub(crate) dial: Box<dyn Fn() -> Dialling + Send + Sync>,
    /// What the node registers as when it is not told otherwise: its configured id, or its fingerprint.
    pub(crate) node_id: Id,
    /// What the node must know if the relay asks.
    pub(crate) realm_secret: Option<Bytes>,
    /// The word of keys that the node had before.
    pub(crate) successions: Successions,
    /// TLS and transport of inner connections. Their packets are 1,200 bytes whatever the transport settings say of MTU
    /// discovery; `initial_mtu` must be left alone.
    pub(crate) client: ClientConfig,
    /// `None`: connections over circuits are refused.
    pub(crate) server: Option<ServerConfig>,
    /// How long a registration or a circuit may take.
    pub(crate) timeout: Duration,
    /// How long a registration that is made on demand is kept unused.
    pub(crate) idle: Duration,
    /// Called in the client's task, in order. Must not block.
    pub(crate) on_event: Arc<dyn Fn(RelayEvent) + Send + Sync>,
    /// Called in the client's task with each connection that another node begins over a circuit. Must not block.
    pub(crate) on_incoming: Box<dyn Fn(IncomingCircuit) + Send + Sync>,
    /// Called in the client's task when another node wants a direct path to this one. Must not block.
    pub(crate) on_punch: Box<dyn Fn(PunchSession) + Send + Sync>,
    /// What the relay is to know of this node.
    pub(crate) description: watch::Receiver<Option<Description>>,
}

/// What becomes of a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RelayEvent {
    /// The node is registered, and the relay sees it at this address.
    Registered { address: SocketAddr },
    /// It is still registered, and seen at this address from now on.
    Moved { address: SocketAddr },
    /// It is registered no longer; it is tried again if it is wanted.
    Lost,
    /// It is no longer registered, because this node wants no registration or one under another name.
    Ended,
    /// The relay refuses the node, or does so now. Reported once until the state changes.
    Refused(Refusal),
    /// Another node has this node's key, and both register. Reported once as long as that goes on.
    Disputed,
    /// The relay dropped packets of a circuit.
    Dropped { circuit: u32, limit: Limit },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegistrationStatus {
    pub(crate) state: RegistrationState,
    /// Since when the state is this.
    pub(crate) since: Instant,
    /// Circuits that exist, whoever opened them.
    pub(crate) circuits: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RegistrationState {
    /// Nobody wants it.
    Unused,
    /// Wanted, and not tried yet to the end.
    Connecting,
    Registered {
        /// What the relay sees the node at.
        address: SocketAddr,
    },
    /// Tried again at long intervals.
    Refused(Refusal),
    /// Tried again.
    Down(CircuitError),
}

/// A relay that can be probed.
#[derive(Debug, Clone)]
pub(crate) struct Probed {
    /// Where it is.
    pub(crate) relay: SocketAddr,
    /// What it sees this node at.
    pub(crate) seen_at: SocketAddr,
    pub(crate) probes: Probes,
}

impl Probed {
    /// Its other port.
    pub(crate) fn other_port(&self) -> SocketAddr {
        SocketAddr::new(self.relay.ip(), self.probes.port)
    }

    /// Its other address, if it has one that is of any use.
    pub(crate) fn other_address(&self) -> Option<SocketAddr> {
        let relay = self.relay.ip();
        let ip = self.probes.ip.filter(|&ip| ip.is_ipv4() == relay.is_ipv4() && ip != relay)?;
        Some(SocketAddr::new(ip, self.probes.port))
    }
}

/// This node at one relay.
pub(crate) struct RelayClient {
    dial: Box<dyn Fn() -> Dialling + Send + Sync>,
    node_id: Id,
    idle: Duration,
    on_event: Arc<dyn Fn(RelayEvent) + Send + Sync>,
    terms: Arc<Terms>,
    wants: watch::Sender<Wants>,
    phase: watch::Sender<Phase>,
    state: Mutex<(RegistrationState, Instant)>,
    /// Where the relay is.
    address: Mutex<Option<SocketAddr>>,
    /// While it is registered.
    probed: Mutex<Option<Probed>>,
    circuits: watch::Sender<usize>,
}

/// What is asked of the task.
#[derive(Debug, Default)]
struct Wants {
    standing: Option<Id>,
    /// Callers that wait for a circuit.
    waiting: usize,
    stop: bool,
}

impl Wants {
    fn registration(&self) -> bool {
        self.standing.is_some() || self.waiting > 0
    }
}

/// What callers wait for.
#[derive(Clone)]
enum Phase {
    /// There is no registration yet, or it is in doubt.
    Waiting,
    Up(Handle),
    /// The last attempt came to this.
    Failed(CircuitError),
    Ended,
}

/// Why a registration is served no longer.
enum Over {
    Lost(CircuitError),
    /// The relay was silent and answered to another connection.
    Replaced(Connection),
    /// Registered as somebody else, from now on.
    Renamed,
    Unused,
    Stopped,
}

impl RelayClient {
    pub(crate) fn new(settings: Settings) -> Arc<Self> {
        let Settings {
            dial,
            node_id,
            realm_secret,
            successions,
            client,
            server,
            timeout,
            idle,
            on_event,
            on_incoming,
            ..
        } = settings;
        let on_dropped = Box::new({
            let on_event = on_event.clone();
            move |circuit, limit| on_event(RelayEvent::Dropped { circuit, limit })
        });
        Arc::new(Self {
            dial,
            node_id,
            idle,
            on_event,
            terms: Arc::new(Terms {
                realm_secret,
                successions,
                client,
                server,
                timeout,
                on_incoming,
                on_dropped,
                on_punch: settings.on_punch,
                description: settings.description,
                liveness: Mutex::new(Liveness::new(Instant::now())),
            }),
            wants: watch::Sender::new(Wants::default()),
            phase: watch::Sender::new(Phase::Waiting),
            state: Mutex::new((RegistrationState::Unused, Instant::now())),
            address: Mutex::default(),
            probed: Mutex::default(),
            circuits: watch::Sender::new(0),
        })
    }

    /// Keeps the node registered under this id for ever, or, without one, only while circuits are wanted.
    pub(crate) fn set_standing(&self, node_id: Option<Id>) {
        self.wants.send_modify(|wants| wants.standing = node_id);
    }

    /// Ends the task, the registration, and all circuits.
    pub(crate) fn stop(&self) {
        self.wants.send_modify(|wants| wants.stop = true);
    }

    pub(crate) fn status(&self) -> RegistrationStatus {
        let (state, since) = lock(&self.state).clone();
        RegistrationStatus { state, since, circuits: *self.circuits.borrow() }
    }

    /// The relay, while this node is registered there, if it can be probed.
    pub(crate) fn probed(&self) -> Option<Probed> {
        lock(&self.probed).clone()
    }

    /// Where the relay is, or was when this node was last registered there.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        *lock(&self.address)
    }

    /// A connection to a node that is registered at the relay. It must be closed by who gets it: dropping it is not
    /// enough, because the client holds on to it as well.
    pub(crate) async fn connect(&self, target: &Id) -> Result<Connection, CircuitError> {
        let _waiting = Waiting::new(&self.wants);
        let mut phase = self.phase.subscribe();
        let mut late = CircuitError::Relay(ConnectError::TimedOut);
        let connect = async {
            let (mut fresh, mut ended) = (false, 0);
            loop {
                let handle = live(&mut phase, fresh).await?;
                let mut later = phase.clone();
                let connect = async {
                    late = CircuitError::RelayLost;
                    let circuit = handle.open(target).await?;
                    late = CircuitError::Inner(ConnectError::TimedOut);
                    handle.connect(circuit).await
                };
                let connected = tokio::select! {
                    connected = connect => connected,
                    // A relay that has become silent may be found to be down.
                    error = failed(&mut later) => Err(error),
                };
                match connected {
                    // The next registration will do as well; the phase changes when this one has ended.
                    Err(CircuitError::RelayLost) => changed(&mut phase).await?,
                    Err(CircuitError::Ended(_)) if ended < MORE_CIRCUITS => {
                        ended += 1;
                        continue;
                    }
                    connected => return connected,
                }
                fresh = true;
            }
        };
        timeout(self.terms.timeout, connect).await.unwrap_or(Err(late))
    }

    /// An attempt to find a direct path to a node that is registered at the relay.
    pub(crate) async fn punch(&self, target: &Id) -> Result<PunchSession, CircuitError> {
        let _waiting = Waiting::new(&self.wants);
        let punch = async {
            let handle = live(&mut self.phase.subscribe(), false).await?;
            handle.punch(target).await
        };
        timeout(self.terms.timeout, punch).await.unwrap_or(Err(CircuitError::Relay(ConnectError::TimedOut)))
    }

    /// Serves the client until it is stopped, or has been unused for long without a standing registration. Dropped, it
    /// ends all the same. To be run once.
    pub(crate) async fn run(self: Arc<Self>) {
        let _ended = Ended(self.clone());
        let mut registering = Registering::default();
        let mut dialled = None;
        while self.wanted().await {
            let Some(registered) = self.unless_stopped(self.register(dialled.take())).await else { return };
            let error = match registered {
                Ok(registration) => {
                    let begun = Instant::now();
                    let over = self.serve(registration).await;
                    registering.lasted(begun.elapsed());
                    match over {
                        Over::Lost(error) => error,
                        Over::Replaced(connection) => {
                            self.set_state(RegistrationState::Connecting);
                            dialled = Some(connection);
                            continue;
                        }
                        Over::Renamed => {
                            self.set_state(RegistrationState::Connecting);
                            continue;
                        }
                        Over::Unused | Over::Stopped => return,
                    }
                }
                Err(error) => error,
            };
            self.failed(&error);
            let draw = fastrand::f64();
            let paused = match error {
                // Nobody waits for what will not be different soon.
                CircuitError::Refused(Refusal::TakenOver) => {
                    let (pause, disputed) = registering.pause_taken_over(draw);
                    if disputed {
                        (self.on_event)(RelayEvent::Disputed);
                    }
                    self.unless_stopped(sleep(pause)).await
                }
                CircuitError::Refused(Refusal::Kicked) => {
                    self.unless_stopped(sleep(Registering::pause_kicked(draw))).await
                }
                CircuitError::Refused(_) => self.unless_stopped(sleep(Registering::pause_refused(draw))).await,
                _ => self.unless_stopped(self.pause(registering.pause(draw))).await,
            };
            if paused.is_none() {
                return;
            }
        }
    }

    /// Waits until a registration is wanted. False if the client is to end.
    async fn wanted(&self) -> bool {
        let mut wants = self.wants.subscribe();
        let wanted = timeout(self.idle, wants.wait_for(|wants| wants.stop || wants.registration())).await;
        // The sender is here: waiting cannot fail.
        matches!(wanted, Ok(Ok(wants)) if !wants.stop)
    }

    async fn unless_stopped<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut wants = self.wants.subscribe();
        tokio::select! {
            done = future => Some(done),
            _ = wants.wait_for(|wants| wants.stop) => None,
        }
    }

    async fn register(&self, dialled: Option<Connection>) -> Result<Registration, CircuitError> {
        // What is known to be wrong stays so until it is known to be right.
        if lock(&self.state).0 == RegistrationState::Unused {
            self.set_state(RegistrationState::Connecting);
        }
        let connection = match dialled {
            Some(connection) => connection,
            None => (self.dial)().await.map_err(not_dialled)?,
        };
        let node_id = self.wants.borrow().standing.clone().unwrap_or_else(|| self.node_id.clone());
        let Terms { realm_secret, successions, .. } = &*self.terms;
        let registering = Registration::new(connection, node_id, realm_secret.as_deref(), successions());
        timeout(self.terms.timeout, registering).await.unwrap_or(Err(CircuitError::RelayLost))
    }

    async fn serve(&self, registration: Registration) -> Over {
        let (address, node_id) = (registration.address, registration.node_id.clone());
        let relay = registration.relay();
        let probed = registration.probes.clone().map(|probes| Probed { relay, seen_at: address, probes });
        let (mut serving, handle) = match Serving::new(registration, self.terms.clone(), self.circuits.clone()) {
            Ok(serving) => serving,
            Err(error) => {
                tracing::warn!(%error, "no endpoint for circuits");
                return Over::Lost(CircuitError::RelayLost);
            }
        };
        self.set_state(RegistrationState::Registered { address });
        *lock(&self.address) = Some(relay);
        *lock(&self.probed) = probed;
        (self.on_event)(RelayEvent::Registered { address });
        let over = self.attend(&mut serving, handle, &node_id).await;
        *lock(&self.probed) = None;
        // Before the registration is gone: who waited at it looks for the next one from here on.
        self.phase.send_replace(Phase::Waiting);
        if matches!(over, Over::Unused | Over::Stopped) {
            serving.finish().await;
        }
        match over {
            // The refusal reports it.
            Over::Lost(CircuitError::Refused(_)) => {}
            Over::Lost(_) | Over::Replaced(_) => (self.on_event)(RelayEvent::Lost),
            Over::Renamed | Over::Unused | Over::Stopped => (self.on_event)(RelayEvent::Ended),
        }
        over
    }

    async fn attend(&self, serving: &mut Serving, handle: Handle, node_id: &Id) -> Over {
        self.phase.send_replace(Phase::Up(handle.clone()));
        let (mut doubt, mut seen_at, heard) = (serving.doubt(), serving.seen_at(), serving.heard());
        let mut wants = self.wants.subscribe();
        let renamed = |wants: &Wants| wants.standing.as_ref().is_some_and(|standing| standing != node_id);
        let mut serving = pin!(serving.run());
        let mut unused = pin!(self.unused());
        let mut beside = pin!(None);
        loop {
            tokio::select! {
                error = &mut serving => return Over::Lost(error),
                // The sender lives in `serving`.
                Ok(()) = doubt.changed() => match *doubt.borrow_and_update() {
                    true => {
                        tracing::debug!("relay is silent");
                        self.phase.send_replace(Phase::Waiting);
                        beside.set(Some(self.dial_beside(&heard)));
                    }
                    false => {
                        self.phase.send_replace(Phase::Up(handle.clone()));
                        beside.set(None);
                    }
                },
                // As above.
                Ok(()) = seen_at.changed() => {
                    let address = *seen_at.borrow_and_update();
                    self.moved(address);
                }
                connection = pending_if_none(beside.as_mut()) => return Over::Replaced(connection),
                () = &mut unused => return Over::Unused,
                wants = wants.wait_for(|wants| wants.stop || renamed(wants)) => {
                    let stopped = wants.is_ok_and(|wants| wants.stop);
                    return if stopped { Over::Stopped } else { Over::Renamed };
                }
            }
        }
    }

    fn moved(&self, address: SocketAddr) {
        self.set_state(RegistrationState::Registered { address });
        if let Some(probed) = &mut *lock(&self.probed) {
            probed.seen_at = address;
        }
        (self.on_event)(RelayEvent::Moved { address });
    }

    /// Dials until somebody answers, unless the relay is heard first over the old connection.
    async fn dial_beside(&self, heard: &(impl Fn() -> u64 + Send)) -> Connection {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE_WANTED);
        let before = heard();
        loop {
            let dialled = (self.dial)().await;
            if heard() != before {
                // The doubt is over with the next look, and this with it.
                return pending().await;
            }
            match dialled {
                Ok(connection) => return connection,
                // Who waits from now on waits for the next attempt.
                Err(error) => drop(self.phase.send_replace(Phase::Failed(not_dialled(error)))),
            }
            sleep(backoff.pause(fastrand::f64())).await;
        }
    }

    /// Returns when nobody has wanted anything for long.
    async fn unused(&self) {
        let mut wants = self.wants.subscribe();
        let mut circuits = self.circuits.subscribe();
        loop {
            let used = wants.borrow_and_update().registration() || *circuits.borrow_and_update() > 0;
            // The senders are here: waiting cannot fail.
            tokio::select! {
                () = sleep(self.idle), if !used => return,
                _ = wants.changed() => {}
                _ = circuits.changed() => {}
            }
        }
    }

    fn failed(&self, error: &CircuitError) {
        tracing::debug!(%error, "not registered");
        let state = match error {
            CircuitError::Refused(refusal) => RegistrationState::Refused(*refusal),
            other => RegistrationState::Down(other.clone()),
        };
        if let (true, CircuitError::Refused(refusal)) = (self.set_state(state), error) {
            (self.on_event)(RelayEvent::Refused(*refusal));
        }
        self.phase.send_replace(Phase::Failed(error.clone()));
    }

    /// Whether that is news.
    fn set_state(&self, new: RegistrationState) -> bool {
        let mut state = lock(&self.state);
        let news = state.0 != new;
        if news {
            *state = (new, Instant::now());
        }
        news
    }

    /// Sleeps, less long when somebody waits.
    async fn pause(&self, pause: Duration) {
        let begun = Instant::now();
        let mut wants = self.wants.subscribe();
        let wanted = async {
            // The sender is here: waiting cannot fail.
            let _ = wants.wait_for(|wants| wants.waiting > 0).await;
            sleep((begun + LONGEST_PAUSE_WANTED).saturating_duration_since(Instant::now())).await;
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = wanted => {}
        }
    }
}

fn not_dialled(error: ConnectError) -> CircuitError {
    match error {
        // Who speaks nothing of ours may yet be there.
        ConnectError::NoProtocol => CircuitError::NotARelay,
        error => CircuitError::Relay(error),
    }
}

async fn pending_if_none<F: Future>(future: Pin<&mut Option<F>>) -> F::Output {
    match future.as_pin_mut() {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// Waits for a registration, or for an attempt to make one to fail. What failed before does not count unless it is `fresh`.
async fn live(phase: &mut watch::Receiver<Phase>, mut fresh: bool) -> Result<Handle, CircuitError> {
    loop {
        match &*phase.borrow_and_update() {
            Phase::Up(handle) => return Ok(handle.clone()),
            // Will not be different soon.
            Phase::Failed(error @ CircuitError::Refused(_)) => return Err(error.clone()),
            Phase::Failed(error) if fresh => return Err(error.clone()),
            Phase::Ended => return Err(CircuitError::Stopped),
            Phase::Waiting | Phase::Failed(_) => {}
        }
        changed(phase).await?;
        fresh = true;
    }
}

/// Returns when the next attempt has failed.
async fn failed(phase: &mut watch::Receiver<Phase>) -> CircuitError {
    loop {
        if let Err(ended) = changed(phase).await {
            return ended;
        }
        match &*phase.borrow_and_update() {
            Phase::Failed(error) => return error.clone(),
            Phase::Ended => return CircuitError::Stopped,
            Phase::Waiting | Phase::Up(_) => {}
        }
    }
}

async fn changed(phase: &mut watch::Receiver<Phase>) -> Result<(), CircuitError> {
    phase.changed().await.map_err(|_| CircuitError::Stopped)
}

/// A caller that waits for a circuit.
struct Waiting<'a>(&'a watch::Sender<Wants>);

impl<'a> Waiting<'a> {
    fn new(wants: &'a watch::Sender<Wants>) -> Self {
        wants.send_modify(|wants| wants.waiting += 1);
        Self(wants)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|wants| wants.waiting -= 1);
    }
}

/// Tells everybody when the task has ended, also when it was aborted.
struct Ended(Arc<RelayClient>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.set_state(RegistrationState::Unused);
        *lock(&self.0.probed) = None;
        self.0.phase.send_replace(Phase::Ended);
    }
}

#[cfg(test)]
mod tests;
