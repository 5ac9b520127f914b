//! Local ports beside the usual one, for destinations that do not answer packets from it. `macula_peer_core::source_port` says when.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use macula_peer_core::source_port::{Failed, Kept, SourcePorts, silence};
use macula_peer_core::sync::lock;
use macula_peer_core::types::canonical;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::socket::{ExtraGuard, Socket};

/// How many destinations may have their own port at once. Each is an open file, and is read whenever something arrives.
const MAX_PORTS: usize = 32;

/// How often to check whether they are still of use.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// The ports in use.
#[derive(Default)]
pub(crate) struct Ports {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failing: SourcePorts,
    /// The ports of running dials. All together at most `MAX_PORTS`.
    trying: HashMap<SocketAddr, Weak<ExtraGuard>>,
    kept: HashMap<SocketAddr, (Kept, Arc<ExtraGuard>)>,
}

/// One dial. Its outcome is recorded when it is dropped.
pub(crate) struct Dial {
    ports: Arc<Ports>,
    to: SocketAddr,
    begun: Instant,
    silence: Duration,
    heard: bool,
    refused: bool,
    /// The port that it tries.
    another: Option<Arc<ExtraGuard>>,
}

impl Ports {
    /// Begins a dial that may take `longest`, by another port if it should. Must be called inside the runtime.
    pub(crate) fn dial(self: &Arc<Self>, socket: &Arc<Socket>, to: SocketAddr, longest: Duration) -> Dial {
        let (to, begun) = (canonical(to), Instant::now());
        let another = lock(&self.state).another(socket, to, begun);
        Dial { ports: self.clone(), to, begun, silence: silence(longest), heard: false, refused: false, another }
    }

    /// Whether packets to a destination leave by another port than the usual one.
    pub(crate) fn is_elsewhere(&self, to: SocketAddr) -> bool {
        lock(&self.state).kept.contains_key(&canonical(to))
    }

    /// Those of these destinations that are reached by another port and should be tried by the usual one now.
    pub(crate) fn to_check(&self, all: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
        let (state, now) = (&mut *lock(&self.state), Instant::now());
        all.filter(|to| state.kept.get_mut(&canonical(*to)).is_some_and(|(kept, _)| kept.check(now))).collect()
    }

    /// The destination answers the usual port again.
    pub(crate) fn return_to_usual(&self, to: SocketAddr) {
        let kept = lock(&self.state).kept.remove(&canonical(to));
        if let Some((_, port)) = kept {
            tracing::debug!(%to, "the usual port is answered again");
            port.unroute(to);
        }
    }

    /// The main socket was replaced, so the ports beside the old one are of no use.
    pub(crate) fn clear(&self) {
        *lock(&self.state) = State::default();
    }

    /// Closes ports at which nothing was heard for long. Returns whether the usual one should be tried for a
    /// destination.
    fn look(&self) -> bool {
        let (state, now) = (&mut *lock(&self.state), Instant::now());
        state.trying.retain(|_, port| port.strong_count() > 0);
        state.kept.retain(|_, (kept, port)| kept.is_used(port.heard(), now));
        state.kept.values_mut().fold(false, |any, (kept, _)| kept.make_due(now) | any)
    }
}

/// Closes ports that are of no use any more, until the engine stops.
/// `due` is called when the usual one should be tried for a destination.
pub(crate) async fn run(ports: Arc<Ports>, due: impl Fn(), mut stopping: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = sleep(LOOK_EVERY) => if ports.look() {
                due();
            },
            // Also if it was said before this task first ran.
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
    }
}

impl State {
    /// The port that the next dial tries.
    fn another(&mut self, socket: &Arc<Socket>, to: SocketAddr, now: Instant) -> Option<Arc<ExtraGuard>> {
        if !self.failing.another(to, now) {
            return None;
        }
        if let Some(port) = self.trying.get(&to).and_then(Weak::upgrade) {
            // Two connections to one destination share a port.
            return Some(port);
        }
        self.trying.retain(|_, port| port.strong_count() > 0);
        self.kept.remove(&to);
        if self.trying.len() + self.kept.len() >= MAX_PORTS {
            tracing::debug!(%to, "too many other ports are in use");
            return None;
        }
        match socket.open_beside().map_err(Into::into).and_then(|io| socket.share(io, to)) {
            Ok(port) => {
                tracing::debug!(%to, "not answered: another port is tried");
                let port = Arc::new(port);
                self.trying.insert(to, Arc::downgrade(&port));
                Some(port)
            }
            Err(error) => {
                tracing::debug!(%to, %error, "no other port");
                None
            }
        }
    }
}

impl Dial {
    /// Something came from the destination.
    pub(crate) fn heard(&mut self) {
        self.heard = true;
    }

    /// The system reported that the destination refuses.
    pub(crate) fn refused(&mut self) {
        self.refused = true;
    }

    /// The port that it tries, if that is not the usual one.
    pub(crate) fn another(&self) -> Option<Arc<ExtraGuard>> {
        self.another.clone()
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        let (state, now) = (&mut *lock(&self.ports.state), Instant::now());
        if self.heard {
            state.failing.heard(self.to);
            if let Some(port) = self.another.take() {
                state.keep(self.to, port, now);
            }
            return;
        }
        let how = match self.refused {
            true => Failed::Refused,
            false if now >= self.begun + self.silence => Failed::Silent,
            // Given up early.
            false => return,
        };
        state.failing.failed(self.to, how, self.another.is_some(), now);
    }
}

impl State {
    fn keep(&mut self, to: SocketAddr, port: Arc<ExtraGuard>, now: Instant) {
        // After a rebind it may be the port of a later dial.
        if self.trying.get(&to).is_some_and(|trying| Weak::as_ptr(trying) == Arc::as_ptr(&port)) {
            self.trying.remove(&to);
            tracing::info!(%to, "only packets from another local port are answered");
            self.kept.insert(to, (Kept::new(port.heard(), now), port));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::net::Ipv4Addr;

    use super::*;
    use crate::socket::{refusals, signals};

    const LONGEST: Duration = Duration::from_secs(10);

    fn dial_by_another(ports: &Arc<Ports>, socket: &Arc<Socket>, to: SocketAddr) -> Dial {
        for _ in 0..2 {
            lock(&ports.state).failing.failed(to, Failed::Silent, false, Instant::now());
        }
        let dial = ports.dial(socket, to, LONGEST);
        assert!(dial.another.is_some());
        dial
    }

    #[tokio::test]
    async fn a_dial_from_before_a_rebind_does_not_cost_a_later_one_its_port() {
        let bind = || {
            Socket::bind(Some(Ipv4Addr::LOCALHOST.into()), 0, None, refusals(), signals().0, Arc::default()).unwrap()
        };
        let (ports, old, new) = (Arc::new(Ports::default()), bind(), bind());
        let to = (Ipv4Addr::LOCALHOST, 1).into();
        let mut before = dial_by_another(&ports, &old, to);
        ports.clear();
        let mut after = dial_by_another(&ports, &new, to);
        before.heard();
        drop(before);
        assert!(!ports.is_elsewhere(to));
        after.heard();
        drop(after);
        assert!(ports.is_elsewhere(to));
    }
}
