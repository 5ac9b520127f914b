//! This node at one relay: registered for ever or when a circuit is wanted, again when the relay was lost, and twice for a
//! moment when the relay is silent.

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::detection::Probed;
use macula_peer_core::errors::{CircuitError, ConnectError};
use macula_peer_core::liveness::Liveness;
use macula_peer_core::nat::Description;
use macula_peer_core::proto::control::Id;
use macula_peer_core::registration::{self, Action, Registrant, RegistrationState, RelayEvent};
use macula_peer_core::sync::lock;
use quinn::{ClientConfig, Connection, ServerConfig};
use tokio::sync::watch;
use tokio::time::timeout;

use super::registration::{Handle, IncomingCircuit, PunchSession, Registration, Serving, Successions, Terms, at};

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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegistrationStatus {
    pub(crate) state: RegistrationState,
    /// Since when the state is this.
    pub(crate) since: Instant,
    /// Circuits that exist, whoever opened them.
    pub(crate) circuits: usize,
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
        let (mut wants, mut circuits) = (self.wants.subscribe(), self.circuits.subscribe());
        let mut task = Task::new(&self);
        loop {
            let wanted = wants.borrow_and_update().at_relay(*circuits.borrow_and_update());
            match wanted {
                Some(wanted) => task.registrant.want(wanted, Instant::now()),
                None => task.registrant.stop(),
            }
            if task.carry_out().await == Next::End {
                return;
            }
            tokio::select! {
                () = task.step() => {}
                // The senders are here: waiting cannot fail.
                _ = wants.changed() => {}
                _ = circuits.changed() => {}
            }
        }
    }
}

impl Wants {
    /// `None`: nothing any more.
    fn at_relay(&self, circuits: usize) -> Option<registration::Wants> {
        let Self { standing, waiting, stop } = self;
        (!stop).then(|| registration::Wants { standing: standing.clone(), waiting: *waiting, circuits })
    }
}

type Asking = Pin<Box<dyn Future<Output = Result<Registration, CircuitError>> + Send>>;

/// Carries out what the registrant decides.
struct Task<'a> {
    client: &'a RelayClient,
    registrant: Registrant,
    dialling: Option<Dialling>,
    /// Dialled just now.
    dialled: Option<Connection>,
    asking: Option<Asking>,
    served: Option<Served>,
}

#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl<'a> Task<'a> {
    fn new(client: &'a RelayClient) -> Self {
        let registrant = Registrant::new(client.node_id.clone(), client.idle, Instant::now());
        Self { client, registrant, dialling: None, dialled: None, asking: None, served: None }
    }

    /// Waits for something to happen and tells the registrant.
    async fn step(&mut self) {
        tokio::select! {
            dialled = of(&mut self.dialling) => {
                self.dialling = None;
                self.dialled(dialled);
            }
            answer = of(&mut self.asking) => {
                self.asking = None;
                self.answered(answer);
            }
            event = served(&mut self.served) => self.heard_of(event),
            () = at(self.registrant.next_timeout()) => self.registrant.timeout(Instant::now()),
        }
    }

    fn dialled(&mut self, dialled: Result<Connection, ConnectError>) {
        let heard = self.served.as_ref().map_or(0, |served| (served.heard)());
        let result = dialled.map(|connection| self.dialled = Some(connection)).map_err(not_dialled);
        self.registrant.dialled(result, heard, fastrand::f64(), Instant::now());
    }

    fn answered(&mut self, answer: Result<Registration, CircuitError>) {
        let answer = answer.and_then(|registration| self.serve(registration));
        self.registrant.answered(answer, fastrand::f64(), Instant::now());
    }

    fn serve(&mut self, registration: Registration) -> Result<SocketAddr, CircuitError> {
        let (relay, seen_at, probes) = (registration.relay(), registration.address, registration.probes.clone());
        let served = Served::new(registration, self.client).map_err(|error| {
            tracing::warn!(%error, "no endpoint for circuits");
            CircuitError::RelayLost
        })?;
        self.served = Some(served);
        *lock(&self.client.address) = Some(relay);
        *lock(&self.client.probed) = probes.map(|probes| Probed { relay, seen_at, probes });
        Ok(seen_at)
    }

    fn heard_of(&mut self, event: ServedEvent) {
        match event {
            ServedEvent::Over(error) => self.registrant.lost(error, fastrand::f64(), Instant::now()),
            ServedEvent::Suspect(heard) => {
                tracing::debug!("relay is silent");
                self.registrant.suspected(heard);
            }
            ServedEvent::Cleared => self.registrant.cleared(),
            ServedEvent::Moved(address) => {
                if let Some(probed) = &mut *lock(&self.client.probed) {
                    probed.seen_at = address;
                }
                self.registrant.moved(address, Instant::now());
            }
        }
    }

    async fn carry_out(&mut self) -> Next {
        let (state, since) = self.registrant.state();
        *lock(&self.client.state) = (state.clone(), since);
        while let Some(action) = self.registrant.poll() {
            match action {
                Action::Dial => self.dialling = Some((self.client.dial)()),
                Action::StopDial => self.dialling = None,
                Action::Register(name) => self.asking = self.dialled.take().map(|dialled| self.ask(dialled, name)),
                Action::Leave => drop(self.leave()),
                Action::LeaveGently => {
                    if let Some(mut served) = self.leave() {
                        served.serving.finish().await;
                    }
                }
                Action::Use => {
                    if let Some(served) = &self.served {
                        self.client.phase.send_replace(Phase::Up(served.handle.clone()));
                    }
                }
                Action::Hold => drop(self.client.phase.send_replace(Phase::Waiting)),
                Action::Fail(error) => {
                    tracing::debug!(%error, "not registered");
                    self.client.phase.send_replace(Phase::Failed(error));
                }
                Action::Report(event) => (self.client.on_event)(event),
                Action::End => return Next::End,
            }
        }
        // It came too late.
        self.dialled = None;
        Next::GoOn
    }

    fn ask(&self, connection: Connection, name: Id) -> Asking {
        let Terms { realm_secret, successions, timeout: limit, .. } = &*self.client.terms;
        let (secret, successions, limit) = (realm_secret.clone(), successions(), *limit);
        Box::pin(async move {
            let registering = Registration::new(connection, name, secret.as_deref(), successions);
            timeout(limit, registering).await.unwrap_or(Err(CircuitError::RelayLost))
        })
    }

    fn leave(&mut self) -> Option<Served> {
        *lock(&self.client.probed) = None;
        self.served.take()
    }
}

/// A registration that exists.
struct Served {
    serving: Serving,
    handle: Handle,
    suspect: watch::Receiver<bool>,
    seen_at: watch::Receiver<SocketAddr>,
    /// Datagrams received over its connection.
    heard: Box<dyn Fn() -> u64 + Send + Sync>,
}

enum ServedEvent {
    Over(CircuitError),
    /// The relay is silent; so many datagrams had come.
    Suspect(u64),
    Cleared,
    Moved(SocketAddr),
}

impl Served {
    fn new(registration: Registration, client: &RelayClient) -> io::Result<Self> {
        let (serving, handle) = Serving::new(registration, client.terms.clone(), client.circuits.clone())?;
        let (suspect, seen_at, heard) = (serving.suspect(), serving.seen_at(), Box::new(serving.heard()));
        Ok(Self { serving, handle, suspect, seen_at, heard })
    }

    async fn next(&mut self) -> ServedEvent {
        tokio::select! {
            error = self.serving.run() => ServedEvent::Over(error),
            // The senders live in `serving`.
            Ok(()) = self.suspect.changed() => match *self.suspect.borrow_and_update() {
                true => ServedEvent::Suspect((self.heard)()),
                false => ServedEvent::Cleared,
            },
            Ok(()) = self.seen_at.changed() => ServedEvent::Moved(*self.seen_at.borrow_and_update()),
        }
    }
}

async fn of<T>(future: &mut Option<Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

async fn served(served: &mut Option<Served>) -> ServedEvent {
    match served {
        Some(served) => served.next().await,
        None => pending().await,
    }
}

fn not_dialled(error: ConnectError) -> CircuitError {
    match error {
        // Who speaks nothing of ours may yet be there.
        ConnectError::NoProtocol => CircuitError::NotARelay,
        error => CircuitError::Relay(error),
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
        *lock(&self.0.state) = (RegistrationState::Unused, Instant::now());
        *lock(&self.0.probed) = None;
        self.0.phase.send_replace(Phase::Ended);
    }
}

#[cfg(test)]
mod tests;
