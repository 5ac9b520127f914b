//! Carries out the attempts of a race, each in a task.

use std::sync::Arc;
use std::time::Instant;

use macula_peer_core::errors::{CircuitError, ConnectError};
use macula_peer_core::race::{Attempt, AttemptId, Ended};
use macula_peer_core::types::{Fingerprint, PeerName};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::timeout_at;

use crate::conn::Conn;
use crate::link::Link;
use crate::surroundings::Surroundings;

type Attempted = Result<Link, Ended>;

/// The running attempts. Dropping them aborts all.
#[derive(Default)]
pub(super) struct Attempts {
    tasks: JoinSet<(AttemptId, Attempted)>,
    handles: Vec<(AttemptId, AbortHandle)>,
}

impl Attempts {
    /// Begins to dial, to ask for a circuit or to punch.
    pub(super) fn begin(
        &mut self,
        node: &Arc<Surroundings>,
        name: &PeerName,
        id: AttemptId,
        attempt: Attempt,
        key: Option<Fingerprint>,
        until: Instant,
    ) {
        let node = node.clone();
        match (attempt, name) {
            (Attempt::Dial(endpoint), _) => {
                let dial = node.dial(name.clone(), endpoint, key, until);
                self.spawn(id, async move { dial.await.map_err(Ended::NotDialled) });
            }
            (Attempt::Circuit(relay), PeerName::Node(target)) => {
                let target = target.clone();
                self.spawn(id, async move {
                    match timeout_at(until.into(), node.circuit(&relay, &target, key)).await {
                        Ok(circuit) => circuit.map_err(Ended::NoCircuit),
                        Err(_) => Err(Ended::NoCircuit(CircuitError::Relay(ConnectError::TimedOut))),
                    }
                });
            }
            (Attempt::Punch(relay), PeerName::Node(target)) => {
                let punch = node.punch(relay, target.clone(), key);
                self.spawn(id, async move { punch.await.map_err(Ended::NotPunched) });
            }
            // Only a node is reached by relays, and connections are adopted by `adopt`.
            (Attempt::Circuit(_) | Attempt::Punch(_) | Attempt::Adopt(_), _) => {}
        }
    }

    /// Waits until a connection that the peer began allows streams.
    pub(super) fn adopt(
        &mut self,
        node: &Arc<Surroundings>,
        name: &PeerName,
        id: AttemptId,
        accepted: Arc<Conn>,
        key: Option<Fingerprint>,
        until: Instant,
    ) {
        let adopted = node.clone().adopt(name.clone(), accepted.clone(), key);
        self.spawn(id, async move {
            let Ok(adopted) = timeout_at(until.into(), adopted).await else {
                // The peer may allow streams later, and keep this one of several connections.
                accepted.mark_silent();
                return Err(Ended::NotAdopted);
            };
            adopted.map_err(|_| Ended::NotAdopted)
        });
    }

    pub(super) fn abort(&mut self, id: AttemptId) {
        for (_, handle) in self.handles.extract_if(.., |(known, _)| *known == id) {
            handle.abort();
        }
    }

    /// How the next attempt ended. Pending for ever if none is running. Cancel safe.
    pub(super) async fn next(&mut self) -> (AttemptId, Attempted) {
        loop {
            let ended = match self.tasks.join_next().await {
                Some(Ok((id, attempted))) => Some((id, attempted)),
                Some(Err(error)) => self.id_of(&error).map(|id| (id, Err(Ended::Crashed))),
                None => std::future::pending().await,
            };
            if let Some((id, attempted)) = ended {
                self.handles.retain(|(known, _)| *known != id);
                return (id, attempted);
            }
        }
    }

    /// Waits for the first link, which no caller wants any more.
    pub(super) async fn finish(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Ok((_, Ok(link))) = ended {
                return Arc::new(link).close_when_read().await;
            }
        }
    }

    fn spawn(&mut self, id: AttemptId, attempt: impl Future<Output = Attempted> + Send + 'static) {
        let handle = self.tasks.spawn(async move { (id, attempt.await) });
        self.handles.push((id, handle));
    }

    /// Of an attempt that panicked. One that was aborted is known no more.
    fn id_of(&self, error: &JoinError) -> Option<AttemptId> {
        self.handles.iter().find(|(_, handle)| handle.id() == error.id()).map(|(id, _)| *id)
    }
}
