//! The peers of this node, by name.

use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Instant;

use hashbrown::HashMap;
use macula_peer_core::config::Config;
use macula_peer_core::counter::Counter;
use macula_peer_core::eviction::{Usage, evicted, is_idle};
use macula_peer_core::stats::PeerStats;
use macula_peer_core::types::{Fingerprint, Path, PeerName, Target};
use quinn::Connection;

use crate::lifecycle::Lifecycle;
use crate::message::Envelope;
use crate::peer::{self, Host, Peer};
use crate::surroundings::Surroundings;

pub(crate) struct Pool {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    surroundings: Arc<Surroundings>,
    peers: RwLock<Peers>,
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) evictions: Counter,
}

#[derive(Default)]
struct Peers {
    /// At most `pool_size`.
    pool: HashMap<PeerName, Arc<Peer>>,
    /// Peers that have left the pool and still have something on its way, until it is over. They come back if they are
    /// wanted: another peer of the same name would overtake them.
    leaving: HashMap<PeerName, Arc<Peer>>,
}

impl Peers {
    /// The peer that leaves before there is room for another one.
    fn evicted(&self, size: usize) -> Option<Arc<Peer>> {
        let usage = |peer: &Peer| Usage { linked: peer.is_linked(), last_used: peer.last_used() };
        evicted(self.pool.values().map(|peer| (peer, usage(peer))), size).cloned()
    }

    fn leave(&mut self, peer: Arc<Peer>) {
        self.pool.remove(&peer.name);
        peer.retire();
        self.leaving.insert(peer.name.clone(), peer);
    }
}

impl Pool {
    pub(crate) fn new(config: Arc<Config>, lifecycle: Arc<Lifecycle>, surroundings: Arc<Surroundings>) -> Arc<Self> {
        Arc::new(Self {
            config,
            lifecycle,
            surroundings,
            peers: RwLock::default(),
            hits: Counter::default(),
            misses: Counter::default(),
            evictions: Counter::default(),
        })
    }

    /// Sends over the live link to a peer, if there is one with room.
    pub(crate) fn send_now(&self, target: &Target<'_>, message: Envelope, now: Instant) -> Result<(), Envelope> {
        // The table stays locked for reading meanwhile, which is cheaper than counting one more reference.
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let Some(peer) = peers.pool.get(target) else { return Err(message) };
        peer.send_now(message, now)?;
        self.hits.add(1);
        Ok(())
    }

    pub(crate) fn find(&self, target: &Target<'_>) -> Option<Arc<Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.get(target).cloned()
    }

    /// The peer of a name. Others leave if a new one needs room. `None` when the engine is stopping.
    pub(crate) fn peer(self: &Arc<Self>, target: &Target<'_>) -> Option<Arc<Peer>> {
        if let Some(peer) = self.find(target) {
            return Some(peer);
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if self.lifecycle.is_stopping() {
            return None;
        }
        if let Some(peer) = peers.pool.get(target) {
            return Some(peer.clone());
        }
        while let Some(evicted) = peers.evicted(self.config.pool_size) {
            self.evictions.add(1);
            peers.leave(evicted);
        }
        let left = peers.leaving.remove(target).filter(|peer| peer.come_back());
        let peer = left.unwrap_or_else(|| self.start(target.to_owned(), Arc::downgrade(self) as _));
        peers.pool.insert(peer.name.clone(), peer.clone());
        Some(peer)
    }

    /// A peer whose task runs.
    pub(crate) fn start(&self, name: PeerName, host: Weak<dyn Host>) -> Arc<Peer> {
        let peer = Peer::new(name, self.surroundings.clone(), host);
        self.lifecycle.spawn(peer::run(peer.clone()));
        peer
    }

    /// The connections of links to the holder of a key.
    pub(crate) fn links_with(&self, key: Fingerprint) -> Vec<(Path, Connection)> {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        peers.pool.values().filter_map(|peer| peer.link_with(key)).collect()
    }

    /// A node has connected: its peers can use the connection too.
    pub(crate) fn arrived(&self, key: Fingerprint) {
        for peer in self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.values() {
            if peer.is_expected_to_have(key) {
                peer.arrived();
            }
        }
    }

    /// From now on there are no peers: those that there are send what is on its way, and end. The engine is stopping.
    pub(crate) fn stop(&self) {
        let peers = {
            let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
            self.lifecycle.stop();
            std::mem::take(&mut *peers)
        };
        for peer in peers.pool.values().chain(peers.leaving.values()) {
            peer.retire();
        }
    }

    pub(crate) fn stats(&self) -> Vec<PeerStats> {
        // Each link has a lock of its own, which its packets may hold.
        let peers: Vec<_> = self.peers.read().unwrap_or_else(PoisonError::into_inner).pool.values().cloned().collect();
        peers.iter().map(|peer| peer.stats()).collect()
    }
}

impl Host for Pool {
    fn peer(self: Arc<Self>, target: &Target<'_>) -> Option<Arc<Peer>> {
        Pool::peer(&self, target)
    }

    /// Takes an idle peer out of the pool, unless it was used meanwhile.
    fn forget(&self, peer: &Arc<Peer>) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if !is_idle(self.lifecycle.instant(peer.last_used()), self.config.idle_timeout, Instant::now()) {
            return;
        }
        if peers.pool.get(&peer.name).is_some_and(|current| Arc::ptr_eq(current, peer)) {
            peers.leave(peer.clone());
        }
    }

    /// The task of a peer has ended.
    fn gone(&self, peer: &Arc<Peer>) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let Peers { pool, leaving } = &mut *peers;
        for table in [pool, leaving] {
            if table.get(&peer.name).is_some_and(|current| Arc::ptr_eq(current, peer)) {
                table.remove(&peer.name);
            }
        }
    }
}
