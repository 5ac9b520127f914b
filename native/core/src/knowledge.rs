//! A peer's candidates: from callers, and from lookups.

use std::time::Instant;

use crate::lookup::Lookup;
use crate::types::{Candidates, Endpoint, Fingerprint};

#[derive(Debug, Default)]
pub struct Knowledge {
    /// What callers say.
    said: Candidates,
    lookup: Lookup,
    /// There are candidates that no race has tried.
    learned: bool,
    /// Some of these may be better than a relay.
    better: bool,
}

impl Knowledge {
    /// A peer that is named by its address.
    pub fn of(endpoint: Endpoint) -> Self {
        Self { said: Candidates { endpoints: vec![endpoint], ..Candidates::default() }, ..Self::default() }
    }

    /// A caller says how the peer is reached.
    pub fn learn(&mut self, candidates: Candidates) {
        self.better |= self.said.learn(candidates);
        self.learned = true;
    }

    /// Whether to look up the rest now. If so, the caller starts, and calls [`Knowledge::resolved`] whatever the
    /// outcome.
    pub fn begin_lookup(&mut self, now: Instant) -> bool {
        self.lookup.begin(now)
    }

    /// A lookup has found candidates. Returns whether any of them was unknown.
    pub fn found(&mut self, candidates: Candidates) -> bool {
        let known = self.candidates();
        let endpoints = has_new(&candidates.endpoints, &known.endpoints);
        let relays =
            has_new(&candidates.relays, &known.relays) || has_new(&candidates.last_resorts, &known.last_resorts);
        self.lookup.found(candidates);
        self.better |= endpoints;
        self.learned = true;
        endpoints || relays
    }

    /// The lookup finds no more. `answered`: what it has found is all that there is for now.
    pub fn resolved(&mut self, answered: bool, now: Instant) {
        self.lookup.ended(answered, now);
        self.learned = true;
    }

    /// All candidates of the peer. Those from callers come first.
    pub fn candidates(&self) -> Candidates {
        self.said.and(&self.lookup.candidates())
    }

    /// The key that callers or a lookup name.
    pub fn key(&self) -> Option<Fingerprint> {
        self.said.key.or(self.lookup.key())
    }

    /// Until when a lookup may find more.
    pub fn resolving(&self, now: Instant) -> Option<Instant> {
        self.lookup.until(now)
    }

    pub fn has_learned(&self) -> bool {
        self.learned
    }

    pub fn knows_better(&self) -> bool {
        self.better
    }

    /// A race tries everything that is known.
    pub fn tried(&mut self) {
        (self.learned, self.better) = (false, false);
    }
}

fn has_new(candidates: &[Endpoint], known: &[Endpoint]) -> bool {
    candidates.iter().any(|candidate| !known.contains(candidate))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::types::EndpointRef;

    fn endpoints(text: &str) -> Candidates {
        Candidates { endpoints: vec![EndpointRef::parse(text).unwrap().to_owned()], ..Candidates::default() }
    }

    #[test]
    fn candidates_that_were_tried_are_not_news_until_another_is_known() {
        let mut known = Knowledge::default();
        known.learn(endpoints("one:1"));
        assert!(known.has_learned() && known.knows_better());
        known.tried();
        known.learn(endpoints("one:1"));
        assert!(known.has_learned() && !known.knows_better());
        assert!(known.found(endpoints("two:1")) && known.knows_better());
        assert!(!known.found(endpoints("one:1")));
    }

    #[test]
    fn candidates_from_callers_come_first() {
        let mut known = Knowledge::default();
        known.found(endpoints("found:1"));
        known.learn(endpoints("said:1"));
        let candidates: Vec<_> = known.candidates().endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(candidates, ["said:1", "found:1"]);
    }

    #[test]
    fn a_new_relay_is_news_but_no_better_path() {
        let mut known = Knowledge::default();
        let Candidates { endpoints: relays, .. } = endpoints("relay:1");
        assert!(known.found(Candidates { relays, ..Candidates::default() }));
        assert!(!known.knows_better());
    }
}
