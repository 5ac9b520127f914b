//! What this node is registered as, and where: as its user wants it.

use std::sync::Mutex;

use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, NodeId};

#[derive(Default)]
pub(crate) struct Standing(Mutex<Option<(NodeId, Vec<Endpoint>)>>);

impl Standing {
    /// Replaces it. Returns the relays from before.
    pub(crate) fn replace(&self, standing: Option<(NodeId, Vec<Endpoint>)>) -> Vec<Endpoint> {
        let before = std::mem::replace(&mut *lock(&self.0), standing);
        before.map_or_else(Vec::new, |(_, relays)| relays)
    }

    /// The relays that this node should be registered at.
    pub(crate) fn relays(&self) -> Vec<Endpoint> {
        lock(&self.0).as_ref().map_or_else(Vec::new, |(_, relays)| relays.clone())
    }

    /// What to do with the name that this node has at its standing relays.
    pub(crate) fn with_name<T>(&self, look: impl FnOnce(Option<&NodeId>) -> T) -> T {
        look(lock(&self.0).as_ref().map(|(name, _)| name))
    }
}
