//! The engine: the runtime, the socket, the peers and the listener, behind calls that do not wait.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use macula_peer_core::access::Access;
use macula_peer_core::admission::Kick;
use macula_peer_core::config::{Config, Shares};
use macula_peer_core::errors::{RequestError, SendError};
use macula_peer_core::events::NatStatus;
use macula_peer_core::stats::{PathStatus, RelayNode, Stats};
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Candidates, Endpoint, Fingerprint, NodeId, RelayConfig, Target, Verify};
use macula_peer_wire::RawFrame;
use tokio::runtime::Runtime;

use crate::admission::AdmissionCallback;
use crate::backlog::Backlog;
use crate::call::{Abandoned, Call};
use crate::error::{ListenError, StartError};
use crate::inbound::{Fallback, Handler, Unhandled};
use crate::message::{Envelope, Message};
use crate::node::{Node, Secrets};
use crate::peer::{Peer, Retired, WaitingCall};
use crate::renewal::{self, Renew};
use crate::server_config::Admission;
use crate::tls::{self, Certificate, Trust};

/// Threads that work on large payloads; when all are busy, others wait. Idle ones end after ten seconds.
const BLOCKING_THREADS: usize = 64;

/// When the peers' time is over, tasks are dropped.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(200);

/// A running engine. Dropping it without [`Engine::stop`] loses messages in flight.
pub struct Engine {
    node: Arc<Node>,
    runtime: Mutex<Option<Runtime>>,
    listener: Mutex<()>,
}

/// Where to listen.
#[derive(Debug, Clone, Default)]
pub struct Listen {
    /// The local address; `None`: that of the engine's socket.
    pub ip: Option<IpAddr>,
    /// The port. `None`, like 0: the port of the engine's socket, or any with another address. Live links move to it.
    pub port: Option<u16>,
    /// The certificate for clients.
    pub certificate: Certificate,
    /// Which clients may connect; `None`: as for dialled peers, unless [`Config::verify_clients`] is false.
    pub verify: Option<Verify>,
    /// Whether to be a relay for others, and what to give them.
    pub relay: Option<RelayConfig>,
    /// The callback for nodes that no list decides on; `None`: they are let in.
    pub admission: Option<AdmissionCallback>,
    /// How much of the listener one stranger may have.
    pub shares: Shares,
}

/// Where the system gives a process no more threads, tokio panics, or waits for ever for a worker that never runs.
fn threads_can_be_had(count: usize) -> std::io::Result<()> {
    let gate = Mutex::new(());
    std::thread::scope(|scope| {
        // All of them run at once, until this is dropped.
        let _closed = lock(&gate);
        for _ in 0..count {
            std::thread::Builder::new().spawn_scoped(scope, || drop(lock(&gate)))?;
        }
        Ok(())
    })
}

impl Engine {
    /// Starts the runtime and binds the socket.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let reserved = config.reserved_port(config.ip);
        if config.port != 0 && reserved == Some(config.port) {
            return Err(StartError::GatewayPort(config.port));
        }
        // Errors in the files are returned before a thread is started.
        let secrets = Secrets::load(&config)?;
        let workers = config.workers.max(1);
        // And one for work that must not block a worker.
        threads_can_be_had(workers + 1).map_err(StartError::Runtime)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("macula_peer")
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        let renewed = secrets.renewed();
        let node = Node::start(Arc::new(config), secrets, runtime.handle().clone())?;
        keep_renewing(&node, [renewed]);
        if let Some(name) = node.config.node_id.clone() {
            node.clients.register(Some(name), node.config.relays.clone());
        }
        Ok(Self { node, runtime: Mutex::new(Some(runtime)), listener: Mutex::default() })
    }

    /// What this node is known by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.node.keys.identity.fingerprint()
    }

    /// The settings it was started with.
    pub fn config(&self) -> &Config {
        &self.node.config
    }

    /// Sends over a live link, without waiting. Gives the message back if there is no such link, or no room.
    ///
    /// `Ok` means accepted: the message will arrive, or be counted and reported as undelivered.
    ///
    /// `now` is the caller's clock, read once for all that a call needs it for.
    pub fn send_now(&self, target: &Target<'_>, message: Message, now: Instant) -> Result<(), Message> {
        self.node.pool.send_now(target, message.into(), now).map_err(Envelope::into_message)
    }

    /// Sends as soon as there is a link with room. `reply` is called once, from any thread, unless the call is
    /// cancelled.
    pub fn send(
        &self,
        target: &Target<'_>,
        message: Message,
        reply: impl FnOnce(Result<(), SendError>) + Send + 'static,
    ) -> Option<WaitingCall> {
        let call = Call::new(reply);
        self.enqueue(target, &call, |peer| peer.send(message.clone().into(), &call))
    }

    /// Sends a request and waits for the frame that answers it. `reply` as in [`Engine::send`].
    pub fn request(
        &self,
        target: &Target<'_>,
        message: Message,
        reply: impl FnOnce(Result<RawFrame, RequestError>) + Send + 'static,
    ) -> Option<WaitingCall> {
        let call = Call::new(reply);
        self.enqueue(target, &call, |peer| peer.request(message.clone().into(), &call))
    }

    /// Closes the link to a peer, if there is one and this engine began it. Unacknowledged messages go over the next
    /// link, which is dialled when there is something to send.
    pub fn invalidate(&self, target: &Target<'_>) {
        if let Some(peer) = self.node.pool.find(target) {
            peer.invalidate();
        }
    }

    /// Forgets which key a node has: the next key that proves to serve this id is the node's. A link to it closes as by
    /// [`Engine::invalidate`].
    pub fn forget(&self, node: &NodeId) {
        self.node.forget_key(node);
    }

    /// Adds a node's candidates, before a message is sent to it. Returns true if the caller should look up more: then
    /// it must call [`Engine::resolved`], whatever the outcome.
    pub fn learn(&self, node: &NodeId, candidates: Candidates) -> bool {
        self.learn_for(node, candidates, None)
    }

    /// The same, before something is sent to the holder of a key alone.
    pub fn learn_for(&self, node: &NodeId, candidates: Candidates, key: Option<Fingerprint>) -> bool {
        self.node.pool.peer(&Target::Node(node)).is_some_and(|peer| peer.learn(candidates, key))
    }

    /// Adds candidates that a lookup has found; more may follow. They hold until the next lookup.
    pub fn found(&self, node: &NodeId, candidates: Candidates) {
        if let Some(peer) = self.node.pool.find(&Target::Node(node)) {
            peer.found(candidates);
        }
    }

    /// Ends the lookup of a node. With `answered` the result holds for a minute, even if nothing was found; without it
    /// the resolver could not be asked, and the next call may try again.
    pub fn resolved(&self, node: &NodeId, answered: bool) {
        if let Some(peer) = self.node.pool.find(&Target::Node(node)) {
            peer.resolved(answered);
        }
    }

    /// Keeps this node registered under a name at these relays, and no others, from now on. Until
    /// [`Engine::unregister`] it refuses messages for a node with another name.
    pub fn register(&self, name: NodeId, relays: Vec<Endpoint>) {
        self.node.clients.register(Some(name), relays);
    }

    /// Ends all standing registrations.
    pub fn unregister(&self) {
        self.node.clients.register(None, Vec::new());
    }

    /// Accepts connections.
    pub fn listen(&self, listen: Listen) -> Result<SocketAddr, ListenError> {
        // Locked, so that two do not listen at once.
        let _one = lock(&self.listener);
        if self.node.server.listening.borrow().is_some() {
            return Err(ListenError::AlreadyListening);
        }
        let ports = [listen.port, listen.relay.as_ref().map(|relay| relay.probe_port)];
        if let Some(port) = self.node.config.reserved_port(listen.ip)
            && ports.contains(&Some(port))
        {
            return Err(ListenError::GatewayPort(port));
        }
        let verify = listen.verify.as_ref().unwrap_or(match self.node.config.verify_clients {
            true => &self.node.config.verify,
            false => &Verify::FirstSeen,
        });
        let trust = Trust::new(verify)?;
        let (tls, certificate) = tls::server(&self.node.keys.identity, &listen.certificate, &trust)?;
        let admission = Admission::new(tls, verify.is_strict(), listen.relay.is_some(), &self.node.config);
        let bound = self.node.net.quic.local_addr().map_err(ListenError::Bind)?;
        let asked = listen.port.filter(|&port| port != 0);
        let moves = asked.is_some_and(|port| port != bound.port()) || listen.ip.is_some_and(|ip| ip != bound.ip());
        if moves {
            let ip = listen.ip.or(self.node.config.ip);
            self.node.net.rebind(ip, asked.unwrap_or(0)).map_err(ListenError::Bind)?;
        }
        match listen.relay {
            Some(relay) => self.node.role.become_relay(relay).map_err(ListenError::Bind)?,
            None => self.node.role.be_no_relay(),
        }
        self.node.server.admissions.set_callback(listen.admission);
        self.node.server.places.limit(&listen.shares.limits(self.node.config.max_accepted));
        self.node.server.listening.send_replace(Some(admission));
        keep_renewing(&self.node, [certificate, trust.renewed()]);
        self.node.net.quic.local_addr().map_err(ListenError::Bind)
    }

    /// Stops accepting and ends the accepted connections; false if it did not listen.
    pub fn close(&self) -> bool {
        let _one = lock(&self.listener);
        self.node.role.be_no_relay();
        self.node.server.admissions.set_callback(None);
        self.node.server.listening.send_replace(None).is_some()
    }

    /// Sets which nodes may connect to this one. When this returns, connected nodes that are no longer allowed are
    /// gone: their connections are closed. It may take some milliseconds.
    pub fn set_access(&self, access: Access) {
        self.node.role.set_access(access);
    }

    /// Which nodes may connect to this one.
    pub fn access(&self) -> Access {
        self.node.server.admissions.access()
    }

    /// Disconnects a node: ends its registrations here, which it is told, and its connections. It is not registered
    /// again for 30 s. False if it was not connected.
    pub fn kick(&self, target: &Kick) -> bool {
        self.node.role.kick(target)
    }

    /// Nodes that are registered here, in the order in which they were, from a number on; and the number from which on there
    /// may be more. `None`: this node is no relay.
    pub fn relay_nodes(&self, from: u64, most: usize) -> Option<(Vec<RelayNode>, Option<u64>)> {
        Some(self.node.role.relay()?.nodes(from, most))
    }

    /// The address of the engine's socket.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.node.net.quic.local_addr()
    }

    /// Sets the receiver of messages and events.
    pub fn set_handler(&self, handler: Option<Arc<dyn Handler>>) {
        self.node.inbox.set_handler(handler);
    }

    /// Sets what gets messages that the local gateway does not take, before the handler does.
    pub fn set_fallback(&self, fallback: Option<Arc<dyn Fallback>>) {
        self.node.inbox.set_fallback(fallback);
    }

    /// Messages that were handed to the handler and have not reached it yet.
    pub fn backlog(&self) -> Arc<Backlog> {
        self.node.inbox.backlog.clone()
    }

    /// Counts a message that was handed to the handler and did not reach it after all.
    pub fn unhandled(&self) {
        self.node.inbox.not_handled(&Unhandled::NoHandler);
    }

    /// Runs a job on a thread of the runtime, where it may take its time. Drops it if the engine is stopping.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.node.lifecycle.spawn(async move { tokio::task::block_in_place(job) });
    }

    /// How a peer is reached, and why not by better paths. Nothing, of one that nothing was sent to.
    pub fn path(&self, target: &Target<'_>) -> PathStatus {
        self.node.pool.find(target).map_or_else(PathStatus::default, |peer| peer.path())
    }

    /// What is known of the NAT that this node is behind, and where it is seen at.
    pub fn nat_profile(&self) -> NatStatus {
        self.node.detection.nat.status(&self.node.net)
    }

    /// Everything that is counted.
    pub fn stats(&self) -> Stats {
        self.node.stats()
    }

    /// Sends messages in flight, for at most a second, answers every waiting call and ends all threads. Blocks; must
    /// not be called on a thread of the runtime.
    pub fn stop(&self) {
        let Some(runtime) = lock(&self.runtime).take() else { return };
        runtime.block_on(async {
            self.node.stop().await;
            // Closes the accepted connections.
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, self.node.net.quic.wait_idle()).await;
        });
        runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
        self.node.keys.close();
    }

    #[cfg(test)]
    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    fn enqueue<T: Abandoned>(
        &self,
        target: &Target<'_>,
        call: &Arc<Call<T>>,
        enqueue: impl Fn(&Arc<Peer>) -> Result<WaitingCall, Retired>,
    ) -> Option<WaitingCall> {
        loop {
            let Some(peer) = self.node.pool.peer(target) else {
                call.answer(T::abandoned());
                return None;
            };
            let counter = if peer.is_linked() { &self.node.pool.hits } else { &self.node.pool.misses };
            // A peer that has just left the pool is out of the table before it says so.
            if let Ok(waiting) = enqueue(&peer) {
                counter.add(1);
                return Some(waiting);
            }
        }
    }
}

/// Until the engine stops, or what is made from the files is no longer used.
fn keep_renewing<const N: usize>(node: &Node, renewed: [Option<Arc<dyn Renew>>; N]) {
    let renewed: Vec<_> = renewed.iter().flatten().map(Arc::downgrade).collect();
    if !renewed.is_empty() {
        node.lifecycle.spawn(renewal::keep(renewed, node.lifecycle.stopping()));
    }
}
