//! All ways to a peer at once: the first link that is up carries the messages, a better one replaces it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use macula_peer_core::errors::{CircuitError, ConnectError, Failures, PunchError, RouteError, SendError};
use macula_peer_core::proto::control::Refusal;
use macula_peer_core::types::{Endpoint, Fingerprint, NodeId, PeerName, Ways};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout_at;

use crate::link::Link;
use crate::listen::Accepted;
use crate::node::Node;
use crate::punch;
use crate::sync::deadline;

/// What a direct dial has before relays are asked too. On most paths it is up by then, and relays have no work.
const HEAD_START: Duration = Duration::from_millis(50);

/// What a relay has before the next one is asked too. One that does not know the node says so at once.
const RELAY_STAGGER: Duration = Duration::from_millis(200);

/// What lookups have before who may only pass messages on gets them. That is worse than any way that may be found.
const STAND_IN_AFTER: Duration = Duration::from_millis(200);

/// Connections that the peer began and that are waited for. One that begins many wants none.
const MAX_ADOPTING: usize = 8;

/// How a race goes on.
pub(crate) enum Progress {
    /// A link is up.
    Link(Arc<Link>),
    /// There is none, and no way is left to try.
    Lost(SendError),
    /// No link, but somebody who may pass messages on: a relay that speaks only `macula`.
    StandIn(Endpoint),
}

/// The ways that are tried now.
pub(crate) struct Race {
    node: Arc<Node>,
    name: PeerName,
    pub(crate) begun: Instant,
    /// There is a link, and only one of the holder of a key that messages name is of use.
    pub(crate) for_key: bool,
    until: Instant,
    direct: JoinSet<Result<Link, ConnectError>>,
    relayed: JoinSet<Result<Link, (CircuitError, Endpoint)>>,
    punched: JoinSet<Result<Link, PunchError>>,
    /// The relay that helps to punch, and those that may if it does not.
    punching: Option<(Endpoint, AbortHandle)>,
    helpers: VecDeque<Endpoint>,
    /// Connections that the peer began.
    accepted: JoinSet<Option<Link>>,
    /// Which ones, those that came to nothing too. At most `MAX_ADOPTING`.
    adopting: Vec<usize>,
    /// Relays to be asked, and when.
    waiting: VecDeque<(Instant, Endpoint)>,
    /// Every way that was taken into the race.
    taken: Ways,
    /// More ways may come until then.
    resolving: Option<Instant>,
    failure: Option<SendError>,
    /// Since they were last taken.
    failures: Failures,
    stand_in: Option<Endpoint>,
}

impl Race {
    /// Completes dials whose link no caller wants any more. A 0.14.3 gateway handshakes in the process that reads: a dial
    /// that is broken off in the middle blocks that process for 5 s.
    pub(crate) async fn finish(mut self) {
        if let Progress::Link(link) = self.next().await {
            link.close_when_read().await;
        }
    }

    pub(crate) fn new(node: Arc<Node>, name: PeerName, now: Instant) -> Self {
        let until = now + node.config.connect_timeout;
        Self {
            node,
            name,
            begun: now,
            for_key: false,
            until,
            direct: JoinSet::new(),
            relayed: JoinSet::new(),
            punched: JoinSet::new(),
            punching: None,
            helpers: VecDeque::new(),
            accepted: JoinSet::new(),
            adopting: Vec::new(),
            waiting: VecDeque::new(),
            taken: Ways::default(),
            resolving: None,
            failure: None,
            failures: Failures::default(),
            stand_in: None,
        }
    }

    /// Tries these ways too, except those that it has tried. `resolving`: more may come until then.
    pub(crate) fn add(&mut self, ways: &Ways, resolving: Option<Instant>, now: Instant) {
        self.resolving = resolving;
        self.taken.key = ways.key;
        self.taken.hole_punch = ways.hole_punch;
        for endpoint in new_ones(&ways.endpoints, &mut self.taken.endpoints) {
            let dial = self.node.clone().dial(self.name.clone(), endpoint, ways.key, self.until);
            self.direct.spawn(dial);
        }
        let PeerName::Node(_) = self.name else { return };
        let head_start = if self.direct.is_empty() { Duration::ZERO } else { HEAD_START };
        let mut at = self.waiting.back().map_or(now + head_start, |(last, _)| *last + RELAY_STAGGER);
        let mut relays = ways.relays.clone();
        relays.append(&mut self.node.clients.standing());
        relays.extend_from_slice(&self.node.config.relays);
        for relay in new_ones(&relays, &mut self.taken.relays) {
            self.waiting.push_back((at, relay));
            at += RELAY_STAGGER;
        }
        for relay in new_ones(&ways.last_resorts, &mut self.taken.last_resorts) {
            if !self.taken.relays.contains(&relay) {
                self.waiting.push_back((at, relay));
            }
        }
    }

    /// Waits for a connection that the peer began to be of use, unless it does so already.
    pub(crate) fn adopt(&mut self, accepted: Arc<Accepted>, key: Option<Fingerprint>) {
        let id = accepted.connection().stable_id();
        if self.adopting.len() >= MAX_ADOPTING || self.adopting.contains(&id) {
            return;
        }
        self.adopting.push(id);
        let adopted = self.node.clone().adopt(self.name.clone(), accepted, key);
        let until = self.until;
        self.accepted.spawn(async move { timeout_at(until.into(), adopted).await.ok()?.ok() });
    }

    /// Only direct links are of use any more.
    pub(crate) fn keep_direct(&mut self) {
        self.for_key = false;
        self.relayed.abort_all();
        self.waiting.clear();
        self.resolving = None;
    }

    /// What happens next. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Progress {
        loop {
            let mut stand_in = None;
            if self.direct.is_empty() && self.relayed.is_empty() && self.accepted.is_empty() && self.punched.is_empty()
            {
                stand_in = self.stand_in_at();
                // Nothing else is under way: the next relay need not wait.
                match (self.waiting.pop_front(), self.resolving) {
                    (Some((_, relay)), _) => self.ask(relay),
                    (None, Some(_)) if stand_in.is_none_or(|at| at > Instant::now()) => {}
                    (None, _) => return self.lost(),
                }
            }
            let next = self.waiting.front().map(|(at, _)| *at);
            tokio::select! {
                Some(dialled) = self.direct.join_next() => match dialled {
                    Ok(Ok(link)) => return Progress::Link(Arc::new(link)),
                    Ok(Err(error)) => self.not_direct(error),
                    Err(_panicked_or_aborted) => {}
                },
                Some(adopted) = self.accepted.join_next() => {
                    // None, or a panic: there are other ways, or none.
                    if let Ok(Some(link)) = adopted {
                        return Progress::Link(Arc::new(link));
                    }
                }
                Some(punched) = self.punched.join_next() => match punched {
                    Ok(Ok(link)) => return Progress::Link(Arc::new(link)),
                    Ok(Err(error)) => self.not_punched(error),
                    Err(_panicked_or_aborted) => self.punch_on(),
                },
                Some(asked) = self.relayed.join_next() => match asked {
                    Ok(Ok(link)) => return Progress::Link(Arc::new(link)),
                    Ok(Err((error, relay))) => self.no_circuit(error, relay),
                    Err(_panicked_or_aborted) => {}
                },
                () = deadline(next) => {
                    if let Some((_, relay)) = self.waiting.pop_front() {
                        self.ask(relay);
                    }
                }
                () = deadline(self.resolving) => self.resolving = None,
                () = deadline(stand_in) => {}
            }
        }
    }

    fn ask(&mut self, relay: Endpoint) {
        let PeerName::Node(target) = &self.name else { return };
        let circuit = circuit(self.node.clone(), relay.clone(), target.clone(), self.taken.key);
        let until = self.until;
        self.punch(relay.clone());
        self.relayed.spawn(async move {
            match timeout_at(until.into(), circuit).await {
                Ok(outcome) => outcome.map_err(|error| (error, relay)),
                Err(_) => Err((CircuitError::Relay(ConnectError::TimedOut), relay)),
            }
        });
    }

    /// Looks for a direct path through NATs with the help of a relay.
    pub(crate) fn punch(&mut self, relay: Endpoint) {
        let PeerName::Node(target) = &self.name else { return };
        if self.taken.hole_punch == Some(false) {
            self.failures.hole_punch = Some(PunchError::Skipped);
            return;
        }
        if self.punching.is_some() {
            // Two attempts at once would be in each other's way.
            return self.helpers.push_back(relay);
        }
        let punch = punch::initiate(self.node.clone(), relay.clone(), target.clone(), self.taken.key);
        self.punching = Some((relay, self.punched.spawn(punch)));
    }

    fn not_punched(&mut self, error: PunchError) {
        tracing::debug!(peer = %self.name, %error, "no direct path");
        match error {
            // The other node has asked, and its connection will be there.
            PunchError::Refused(Refusal::InProgress) => return,
            PunchError::Refused(_) | PunchError::Relay(_) => self.punch_on(),
            _ => self.helpers.clear(),
        }
        self.failures.hole_punch = Some(error);
    }

    /// The relay does not help. The next one may.
    fn punch_on(&mut self) {
        self.punching = None;
        if let Some(relay) = self.helpers.pop_front() {
            self.punch(relay);
        }
    }

    /// The error to report if there is no other outcome.
    pub(crate) fn failure(&self) -> Option<&SendError> {
        self.failure.as_ref()
    }

    /// Those since the last call.
    pub(crate) fn take_failures(&mut self, into: &mut Failures) {
        into.merge(std::mem::take(&mut self.failures));
    }

    fn not_direct(&mut self, error: ConnectError) {
        self.failures.direct = Some(error.clone());
        match (&self.name, error) {
            (PeerName::Endpoint(_) | PeerName::Gateway(_), error) => self.failure = Some(error.into()),
            (PeerName::Node(_), error @ (ConnectError::Untrusted | ConnectError::WrongNode)) => {
                self.failed(RouteError::Node(error));
            }
            // That an endpoint leads nowhere says nothing of the node.
            (PeerName::Node(_), _) => {}
        }
    }

    fn no_circuit(&mut self, error: CircuitError, relay: Endpoint) {
        tracing::debug!(peer = %self.name, %relay, %error, "no circuit");
        if let Some((at, _)) = self.waiting.front_mut() {
            *at = Instant::now();
        }
        if !matches!(error, CircuitError::Refused(_) | CircuitError::Ended(_) | CircuitError::Inner(_)) {
            // It will not help to punch either.
            self.helpers.retain(|helps| *helps != relay);
            if let Some((_, punch)) = self.punching.as_ref().filter(|(helps, _)| *helps == relay) {
                punch.abort();
            }
        }
        let error = match error {
            CircuitError::NotARelay => {
                self.stand_in.get_or_insert(relay);
                return;
            }
            CircuitError::Relay(error) => RouteError::Relay(error),
            CircuitError::RelayLost | CircuitError::Ended(_) | CircuitError::Stopped => {
                RouteError::Relay(ConnectError::TimedOut)
            }
            CircuitError::Refused(refusal) => RouteError::Setup(refusal),
            CircuitError::NotRegistered => RouteError::Setup(Refusal::NotRegistered),
            CircuitError::Inner(error) => RouteError::Node(error),
        };
        self.failures.relay = Some(error.clone());
        self.failed(error);
    }

    fn failed(&mut self, error: RouteError) {
        let known = match &self.failure {
            Some(SendError::Route(known)) => weight(known),
            _ => 0,
        };
        if weight(&error) >= known {
            self.failure = Some(error.into());
        }
    }

    /// What is meant for the holder of a key is given to nobody else.
    fn is_known(&self) -> bool {
        let PeerName::Node(node) = &self.name else { return false };
        self.for_key || self.taken.key.is_some() || self.node.known_key(node).is_some()
    }

    /// When the messages go to who stands in, if somebody does.
    fn stand_in_at(&self) -> Option<Instant> {
        self.stand_in.as_ref().filter(|_| !self.is_known()).map(|_| self.begun + STAND_IN_AFTER)
    }

    fn lost(&mut self) -> Progress {
        if let (Some(relay), false) = (self.stand_in.take(), self.is_known()) {
            return Progress::StandIn(relay);
        }
        Progress::Lost(self.failure.take().unwrap_or(RouteError::NoRelay.into()))
    }
}

/// Of several failures, the one that says most is told.
fn weight(error: &RouteError) -> u8 {
    match error {
        RouteError::NoRelay => 1,
        // It says something about the path, not the node.
        RouteError::Node(ConnectError::WrongNode) => 2,
        RouteError::Relay(_) => 3,
        RouteError::Setup(Refusal::NotRegistered) => 4,
        RouteError::Setup(_) => 5,
        RouteError::Node(ConnectError::Untrusted) => 7,
        RouteError::Node(_) => 6,
    }
}

fn new_ones(ways: &[Endpoint], taken: &mut Vec<Endpoint>) -> Vec<Endpoint> {
    let new: Vec<_> = ways.iter().filter(|way| !taken.contains(way)).cloned().collect();
    taken.extend(new.iter().cloned());
    new
}

async fn circuit(
    node: Arc<Node>,
    relay: Endpoint,
    target: NodeId,
    key: Option<Fingerprint>,
) -> Result<Link, CircuitError> {
    node.circuit(&relay, &target, key).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::relay::testing::{PATIENCE, client_config, endpoint, transport};
    use crate::sync::lock;
    use crate::{Config, Engine, Listen};

    /// Whoever knows it may begin as many connections as he likes, and each makes the peer's task look at all of them.
    #[tokio::test(flavor = "multi_thread")]
    async fn each_connection_that_the_peer_begins_is_waited_for_once_and_few_at_once() {
        let engine = Engine::start(Config::default()).unwrap();
        let port = engine.listen(Listen::default()).unwrap().port();
        let (dialler, config) = (endpoint(None), client_config(transport()));
        let mut connections = Vec::new();
        for _ in 0..2 * MAX_ADOPTING {
            let connecting = dialler.connect_with(config.clone(), ([127, 0, 0, 1], port).into(), "node").unwrap();
            connections.push(connecting.await.unwrap());
        }
        let node = engine.node().clone();
        let until = Instant::now() + PATIENCE;
        while lock(&node.accepted).all().len() < connections.len() {
            assert!(Instant::now() < until);
            tokio::task::yield_now().await;
        }
        let accepted = lock(&node.accepted).all();
        let mut race = Race::new(node.clone(), PeerName::Node(NodeId::new(b"peer").unwrap()), Instant::now());
        for _ in 0..2 {
            race.adopt(accepted[0].clone(), None);
        }
        assert_eq!(race.accepted.len(), 1);
        accepted.into_iter().for_each(|accepted| race.adopt(accepted, None));
        assert_eq!(race.accepted.len(), MAX_ADOPTING);
        drop((race, node, connections));
        tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
    }
}
