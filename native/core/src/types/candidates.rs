//! How peers can be reached.

use super::{Endpoint, Fingerprint};

/// Endpoints and relays remembered for a peer, from callers and from each lookup; the oldest are dropped.
const MAX_REMEMBERED: usize = 16;

/// How a peer can be reached.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    /// Where it may be itself.
    pub endpoints: Vec<Endpoint>,
    /// Relays that may know it, the most likely first.
    pub relays: Vec<Endpoint>,
    /// Relays to ask when the others have been, all at once.
    pub last_resorts: Vec<Endpoint>,
    /// The peer's key, if it is known.
    pub key: Option<Fingerprint>,
    /// Whether to look for a direct path through NATs, if a call or a lookup has said so.
    pub hole_punch: Option<bool>,
}

impl Candidates {
    /// Puts what is known now before what was known. Returns whether direct paths may be had that could not before:
    /// there are new endpoints, or NATs may be passed now.
    pub fn learn(&mut self, new: Candidates) -> bool {
        let endpoints = new.endpoints.iter().any(|endpoint| !self.endpoints.contains(endpoint));
        let news = endpoints || (new.hole_punch == Some(true) && self.hole_punch == Some(false));
        merge(&mut self.endpoints, new.endpoints);
        merge(&mut self.relays, new.relays);
        merge(&mut self.last_resorts, new.last_resorts);
        self.key = new.key.or(self.key);
        self.hole_punch = new.hole_punch.or(self.hole_punch);
        news
    }

    /// These and others, which come behind.
    pub fn and(&self, others: &Self) -> Self {
        let mut all = self.clone();
        all.endpoints.extend(others.endpoints.iter().filter(|endpoint| !self.endpoints.contains(endpoint)).cloned());
        all.relays.extend(others.relays.iter().filter(|relay| !self.relays.contains(relay)).cloned());
        all.last_resorts.extend(others.last_resorts.iter().filter(|relay| !self.last_resorts.contains(relay)).cloned());
        all.key = self.key.or(others.key);
        all.hole_punch = self.hole_punch.or(others.hole_punch);
        all
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        let Self { endpoints, relays, last_resorts, key, hole_punch: _ } = self;
        endpoints.is_empty() && relays.is_empty() && last_resorts.is_empty() && key.is_none()
    }
}

fn merge(known: &mut Vec<Endpoint>, mut new: Vec<Endpoint>) {
    known.retain(|endpoint| !new.contains(endpoint));
    new.append(known);
    new.truncate(MAX_REMEMBERED);
    *known = new;
}
