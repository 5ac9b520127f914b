//! Whose key a node id may have.
//!
//! A node id belongs to the key that has proved to serve it: the node with this key said that it has the id when it was
//! asked, or is registered under it at the relay that led there. A node without an id serves any, which proves nothing.
//! Our own key is never a peer's.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hashlink::LruCache;

use crate::errors::ConnectError;
use crate::types::{Dialect, Fingerprint, NodeId, PeerName};

/// Names remembered. The one that was not seen for longest is evicted.
const MAX_NAMES: usize = 16_384;

/// How long a name that is not seen is remembered, unless the keys are kept in a file. After that another key is accepted.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Keys that say they do not serve a name, one for each name: they are asked again, whatever a relay says. The oldest is
/// evicted, which costs messages a detour.
const MAX_DISOWNED: usize = 1024;

/// Trust on first use: the keys that names are bound to.
#[derive(Debug)]
pub struct TofuStore {
    /// The one that was not seen for longest comes first.
    names: LruCache<NodeId, Binding>,
    disowned: LruCache<NodeId, Fingerprint>,
    unsaved: Option<Unsaved>,
}

#[derive(Debug)]
struct Binding {
    key: Fingerprint,
    seen: Instant,
    /// It was logged that the node shows another key now.
    mismatch_told: bool,
}

/// What is not in the file yet.
#[derive(Debug)]
enum Unsaved {
    /// The bindings of these names. At most [`MAX_NAMES`].
    Names(HashSet<NodeId>),
    All,
}

/// What to write to the file of keys.
#[derive(Debug, PartialEq, Eq)]
pub enum Changes {
    /// Keys of names, in any order; `None`: the name is bound no more.
    Some(Vec<(NodeId, Option<Fingerprint>)>),
    /// These bindings and no others, the one that was not seen for longest first.
    All(Vec<(NodeId, Fingerprint)>),
}

impl Default for TofuStore {
    /// One that lasts as long as the engine.
    fn default() -> Self {
        Self { names: LruCache::new(MAX_NAMES), disowned: LruCache::new(MAX_DISOWNED), unsaved: None }
    }
}

impl TofuStore {
    /// One that is kept in a file, where these bindings are from, the one that was not seen for longest first.
    pub fn kept(known: Vec<(NodeId, Fingerprint)>, now: Instant) -> Self {
        let mut store = Self::default();
        known.into_iter().for_each(|(node, key)| store.bind(node, key, now));
        store.unsaved = Some(Unsaved::Names(HashSet::new()));
        store
    }

    /// The key that a name is bound to.
    pub fn key_of(&mut self, node: &NodeId, now: Instant) -> Option<Fingerprint> {
        let Binding { key, seen, .. } = *self.names.peek(node)?;
        // What is kept outlives the node's outages, and the time in which this engine does not run is not known.
        if self.unsaved.is_none() && seen + FORGET_AFTER <= now {
            self.names.remove(node);
            return None;
        }
        Some(key)
    }

    /// The key has proved to serve the name, which is bound to it from now on.
    pub fn bind(&mut self, node: NodeId, key: Fingerprint, now: Instant) {
        self.disowned.remove(&node);
        let before = self.names.remove(&node);
        if before.is_none() && self.names.len() >= MAX_NAMES {
            // It is not empty.
            if let Some((oldest, _)) = self.names.remove_lru() {
                self.changed(&oldest);
            }
        }
        let same = before.filter(|before| before.key == key);
        if same.is_none() {
            self.changed(&node);
        }
        let mismatch_told = same.is_some_and(|before| before.mismatch_told);
        self.names.insert(node, Binding { key, seen: now, mismatch_told });
    }

    /// The holder of the key `from` has said that the name belongs to `to` from now on. Returns whether the name was bound
    /// to `from`.
    pub fn hand_on(&mut self, node: &NodeId, from: Fingerprint, to: Fingerprint, now: Instant) -> bool {
        let bound = self.names.peek(node).is_some_and(|binding| binding.key == from);
        if bound {
            self.bind(node.clone(), to, now);
        }
        bound
    }

    /// The holder of the key says that it does not serve the name.
    pub fn disown(&mut self, node: &NodeId, key: Fingerprint) {
        if self.names.peek(node).is_some_and(|binding| binding.key == key) {
            self.forget(node);
        }
        self.disowned.insert(node.clone(), key);
    }

    /// Whether the holder of the key was the last to say that.
    pub fn is_disowned(&self, node: &NodeId, key: Option<Fingerprint>) -> bool {
        key.is_some() && self.disowned.peek(node) == key.as_ref()
    }

    /// The next key that proves to serve the name may have it.
    pub fn forget(&mut self, node: &NodeId) {
        if self.names.remove(node).is_some() {
            self.changed(node);
        }
    }

    /// Whether it is news that the node shows another key than the name's.
    pub fn is_first_mismatch(&mut self, node: &NodeId) -> bool {
        self.names.peek_mut(node).is_some_and(|binding| !std::mem::replace(&mut binding.mismatch_told, true))
    }

    /// Whether there is something to write to the file.
    pub fn is_unsaved(&self) -> bool {
        match &self.unsaved {
            None => false,
            Some(Unsaved::Names(names)) => !names.is_empty(),
            Some(Unsaved::All) => true,
        }
    }

    /// What the file lacks. The caller writes it, and the file then has it.
    pub fn take_unsaved(&mut self) -> Changes {
        match self.unsaved.replace(Unsaved::Names(HashSet::new())) {
            Some(Unsaved::All) => {
                Changes::All(self.names.iter().map(|(node, binding)| (node.clone(), binding.key)).collect())
            }
            Some(Unsaved::Names(names)) => {
                let key = |node: &NodeId| self.names.peek(node).map(|binding| binding.key);
                Changes::Some(names.into_iter().map(|node| (node.clone(), key(&node))).collect())
            }
            None => Changes::Some(Vec::new()),
        }
    }

    /// The next [`Changes`] rewrite the file from the start: it may have lost something, or become too long.
    pub fn save_all(&mut self) {
        self.unsaved = self.unsaved.take().map(|_| Unsaved::All);
    }

    fn changed(&mut self, node: &NodeId) {
        if let Some(Unsaved::Names(names)) = &mut self.unsaved {
            names.insert(node.clone());
            if names.len() > MAX_NAMES {
                self.unsaved = Some(Unsaved::All);
            }
        }
    }
}

/// What is known when a link to a node is up.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// This node's key.
    pub own: Fingerprint,
    /// The key that the other end has shown.
    pub shown: Option<Fingerprint>,
    pub dialect: Dialect,
    /// The key that a lookup or the caller names.
    pub named: Option<Fingerprint>,
    /// The relay that led there says that the node registered under the name has this key.
    pub registered: bool,
    /// The key that the name is bound to.
    pub bound: Option<Fingerprint>,
    /// The node with the key that was shown has said before that it does not have the id.
    pub disowned: bool,
    /// Whether the binding is enforced.
    pub enforced: bool,
    /// For each message that waits for a link, the only key that may get it, if it names one.
    pub waiting: &'a [Option<Fingerprint>],
}

/// Whether a link may carry messages for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    /// Only if the node there, when asked for the id, does not say that it has another.
    Ask,
    Refuse(Mismatch),
}

/// Why the key that was shown is not the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// The link leads back to this node.
    Ourselves,
    /// The name is bound to another key.
    Bound(Fingerprint),
    /// Callers, or a lookup, name other keys.
    Named,
}

impl Mismatch {
    /// What callers learn.
    pub fn error(self) -> ConnectError {
        match self {
            Self::Ourselves => ConnectError::WrongNode,
            Self::Bound(_) | Self::Named => ConnectError::Untrusted,
        }
    }
}

/// What comes next before a link carries messages for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Admit,
    /// Ask the node there for the id.
    Ask,
    /// The name is bound to this key: ask the node there for its word that the shown one succeeds it.
    AskSuccession(Fingerprint),
    Refuse(Mismatch),
}

/// Whether a link may carry messages for a peer that has no node id. `None`: it has one, and the key decides.
pub fn without_node_id(name: &PeerName, dialect: Dialect) -> Option<Result<(), ConnectError>> {
    match (name, dialect) {
        (PeerName::Node(_), _) => None,
        (PeerName::Endpoint(_), _) | (PeerName::Gateway(_), Dialect::Macula) => Some(Ok(())),
        // Two engines that took each other for gateways would hand messages on for ever.
        (PeerName::Gateway(_), Dialect::MaculaPeer1) => Some(Err(ConnectError::NoProtocol)),
    }
}

impl Facts<'_> {
    pub fn judge(&self) -> Verdict {
        if self.shown == Some(self.own) {
            return Verdict::Refuse(Mismatch::Ourselves);
        }
        // A caller that names exactly this key overrides what was looked up or seen first.
        if !self.is_asked_for() {
            if self.named.is_some_and(|named| Some(named) != self.shown) {
                return Verdict::Refuse(Mismatch::Named);
            }
            let bound = self.bound.filter(|bound| self.enforced && self.named.is_none() && Some(*bound) != self.shown);
            if let Some(bound) = bound {
                return Verdict::Refuse(Mismatch::Bound(bound));
            }
            if !self.waiting.is_empty() && self.waiting.iter().all(Option::is_some) {
                // No waiting caller could use it, and another path may lead to the key that they name.
                return Verdict::Refuse(Mismatch::Named);
            }
        }
        match self.dialect {
            // It has no node ids: the node there is believed, and proves nothing.
            Dialect::Macula => Verdict::Accept,
            Dialect::MaculaPeer1 if self.shown.is_some() && self.shown == self.bound => Verdict::Accept,
            Dialect::MaculaPeer1 if self.registered && !self.disowned => Verdict::Accept,
            Dialect::MaculaPeer1 => Verdict::Ask,
        }
    }

    /// What comes next before the link carries messages. `predecessor_asked`: the key that the name is bound to has been
    /// asked whether it has a successor.
    pub fn step(&self, predecessor_asked: bool) -> Step {
        match self.judge() {
            Verdict::Accept => Step::Admit,
            Verdict::Ask => Step::Ask,
            Verdict::Refuse(Mismatch::Bound(known)) if !predecessor_asked && self.proves_key() => {
                Step::AskSuccession(known)
            }
            Verdict::Refuse(why) => Step::Refuse(why),
        }
    }

    /// Whether the name is bound to the key that was shown, once the link is admitted. `answer`: what the node said if it
    /// was asked. If it was not, the name is bound to the key already, or a relay vouches for it.
    pub fn learns(&self, answer: Option<Answer>) -> bool {
        self.proves_key() && answer.is_none_or(|answer| self.binds(answer))
    }

    /// Only `macula-peer/1` binds messages to keys.
    fn proves_key(&self) -> bool {
        self.shown.is_some() && self.dialect == Dialect::MaculaPeer1
    }

    fn binds(&self, answer: Answer) -> bool {
        let vouched_for = self.is_asked_for() || (self.named.is_some() && self.named == self.shown);
        answer == Answer::HasIt || vouched_for
    }

    fn is_asked_for(&self) -> bool {
        self.shown.is_some() && self.waiting.contains(&self.shown)
    }
}

/// The answer of a node that is asked whether it has a node id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    HasIt,
    /// It has none at all, and serves any.
    HasNone,
}

/// What this node says when it is asked for a node id. `None`: it has another id.
pub fn answer(own: Option<&NodeId>, key: &Fingerprint, asked: &[u8]) -> Option<Answer> {
    match own {
        Some(own) if own.as_bytes() == asked => Some(Answer::HasIt),
        // A node without an id registers as its fingerprint, which cannot be another node's name.
        _ if key.as_bytes() == asked => Some(Answer::HasIt),
        Some(_) => None,
        None => Some(Answer::HasNone),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(n: usize) -> NodeId {
        NodeId::new(n.to_string().as_bytes()).unwrap()
    }

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    #[test]
    fn a_name_is_bound_until_it_was_not_seen_for_a_day() {
        let (start, mut store) = (Instant::now(), TofuStore::default());
        store.bind(node(1), key(1), start);
        let day = Duration::from_secs(86_400);
        let almost = day - Duration::from_secs(1);
        assert_eq!(store.key_of(&node(1), start + almost), Some(key(1)));
        assert_eq!(store.key_of(&node(1), start + day), None, "asked for, and not seen");
        store.bind(node(1), key(1), start);
        store.bind(node(1), key(1), start + almost);
        assert_eq!(store.key_of(&node(1), start + 2 * almost), Some(key(1)), "seen since");
        assert_eq!(store.key_of(&node(1), start + almost + day), None);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_the_names_that_were_seen_last() {
        let (start, mut store) = (Instant::now(), TofuStore::default());
        for n in 0..MAX_NAMES {
            store.bind(node(n), key(1), start + Duration::from_millis(n as u64));
        }
        store.bind(node(0), key(1), start + Duration::from_secs(3600));
        store.bind(node(MAX_NAMES), key(2), start + Duration::from_secs(3601));
        assert_eq!(store.names.len(), MAX_NAMES);
        assert!(store.names.contains_key(&node(0)));
        assert!(!store.names.contains_key(&node(1)));
    }

    #[test]
    fn a_kept_name_is_bound_until_it_is_given_up_forgotten_or_handed_on() {
        let start = Instant::now();
        let mut store = TofuStore::kept((1..=3).map(|n| (node(n), key(1))).collect(), start);
        let later = start + 400 * FORGET_AFTER;
        assert_eq!(store.key_of(&node(1), later), Some(key(1)));
        store.disown(&node(1), key(1));
        store.forget(&node(2));
        assert!(!store.hand_on(&node(3), key(2), key(3), later), "another key's word counts for nothing");
        assert!(store.hand_on(&node(3), key(1), key(2), later));
        assert!(!store.hand_on(&node(4), key(1), key(2), later), "it is bound to none");
        assert_eq!([1, 2, 3, 4].map(|n| store.key_of(&node(n), later)), [None, None, Some(key(2)), None]);
    }

    #[test]
    fn only_changes_are_written_and_everything_after_a_fault() {
        let (now, mut store) =
            (Instant::now(), TofuStore::kept(vec![(node(1), key(1)), (node(2), key(2))], Instant::now()));
        store.bind(node(1), key(1), now);
        assert!(!store.is_unsaved(), "it was known");
        store.bind(node(2), key(3), now);
        store.bind(node(3), key(3), now);
        store.forget(&node(3));
        store.forget(&node(4));
        let Changes::Some(mut changes) = store.take_unsaved() else { panic!("all") };
        changes.sort();
        assert_eq!(changes, [(node(2), Some(key(3))), (node(3), None)]);
        assert_eq!((store.is_unsaved(), store.take_unsaved()), (false, Changes::Some(Vec::new())));
        store.save_all();
        assert!(store.is_unsaved());
        store.bind(node(1), key(4), now);
        assert_eq!(store.take_unsaved(), Changes::All(vec![(node(2), key(3)), (node(1), key(4))]));
        assert!(!store.is_unsaved());
        for n in 0..3 * MAX_NAMES {
            store.bind(node(n), key(1), now);
        }
        assert!(matches!(store.take_unsaved(), Changes::All(all) if all.len() == MAX_NAMES));
        let mut in_memory = TofuStore::default();
        in_memory.bind(node(1), key(1), now);
        in_memory.save_all();
        assert!(!in_memory.is_unsaved());
    }

    #[test]
    fn a_file_is_written_from_the_start_when_more_names_have_changed_than_are_kept() {
        let now = Instant::now();
        for (names, all) in [(MAX_NAMES, false), (MAX_NAMES + 1, true)] {
            let mut store = TofuStore::kept(Vec::new(), now);
            (0..names).for_each(|n| store.bind(node(n), key(1), now));
            assert_eq!(matches!(store.take_unsaved(), Changes::All(_)), all, "{names}");
        }
    }

    #[test]
    fn a_name_is_given_up_by_its_key_alone_and_forgotten_by_itself() {
        let (now, mut store) = (Instant::now(), TofuStore::default());
        for n in [1, 2] {
            store.bind(node(n), key(1), now);
        }
        store.disown(&node(1), key(2));
        assert_eq!(store.key_of(&node(1), now), Some(key(1)), "another key says nothing about it");
        store.disown(&node(1), key(1));
        assert_eq!((store.key_of(&node(1), now), store.key_of(&node(2), now)), (None, Some(key(1))));
        store.forget(&node(2));
        assert_eq!(store.key_of(&node(2), now), None);
    }

    #[test]
    fn another_key_is_news_once_for_each_binding() {
        let (now, mut store) = (Instant::now(), TofuStore::default());
        assert!(!store.is_first_mismatch(&node(1)), "it is bound to none");
        store.bind(node(1), key(1), now);
        store.bind(node(2), key(1), now);
        let news = [1, 1, 2, 2].map(|n| store.is_first_mismatch(&node(n)));
        assert_eq!(news, [true, false, true, false]);
        store.bind(node(1), key(1), now);
        assert!(!store.is_first_mismatch(&node(1)), "it is the same binding");
        store.bind(node(1), key(2), now);
        assert!(store.is_first_mismatch(&node(1)));
    }

    #[test]
    fn a_key_that_disowns_a_name_is_asked_until_it_has_it_again() {
        let (now, mut store) = (Instant::now(), TofuStore::default());
        store.disown(&node(1), key(1));
        let disowned = |store: &TofuStore, key| store.is_disowned(&node(1), key);
        assert!(disowned(&store, Some(key(1))) && !disowned(&store, Some(key(2))) && !disowned(&store, None));
        store.bind(node(1), key(1), now);
        assert!(!disowned(&store, Some(key(1))));
        for n in 0..10 * MAX_DISOWNED {
            store.disown(&node(n), key(1));
        }
        assert!(store.disowned.len() <= MAX_DISOWNED);
    }

    const OWN: u8 = 0;

    /// Every combination of facts with this node's key and two others.
    fn all(check: impl Fn(&Facts<'_>)) {
        let keys = [None, Some(key(OWN)), Some(key(1)), Some(key(2))];
        let mut waiting: Vec<Vec<Option<Fingerprint>>> = vec![vec![]];
        waiting.extend(keys.map(|one| vec![one]));
        waiting.extend(keys.iter().flat_map(|one| keys.map(|other| vec![*one, other])));
        for shown in keys {
            for named in keys {
                for bound in keys {
                    for enforced in [false, true] {
                        for dialect in [Dialect::Macula, Dialect::MaculaPeer1] {
                            for waiting in &waiting {
                                let own = key(OWN);
                                for (registered, disowned) in [(false, false), (true, false), (true, true)] {
                                    check(&Facts {
                                        own,
                                        shown,
                                        dialect,
                                        named,
                                        registered,
                                        bound,
                                        disowned,
                                        enforced,
                                        waiting,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn our_own_key_is_never_a_peers() {
        all(|facts| {
            let refused = facts.judge() == Verdict::Refuse(Mismatch::Ourselves);
            assert_eq!(refused, facts.shown == Some(facts.own), "{facts:?}");
        });
    }

    #[test]
    fn a_caller_knows_better_than_a_lookup_and_that_better_than_what_was_seen_first() {
        all(|facts| {
            if facts.shown == Some(facts.own) {
                return;
            }
            let Facts { shown, named, bound, enforced, waiting, .. } = *facts;
            let expected = match () {
                () if shown.is_some() && waiting.contains(&shown) => None,
                () if named.is_some() && named != shown => Some(Mismatch::Named),
                () if named.is_none() && enforced && bound.is_some() && bound != shown => {
                    Some(Mismatch::Bound(bound.unwrap()))
                }
                () if !waiting.is_empty() && !waiting.contains(&None) => Some(Mismatch::Named),
                () => None,
            };
            match (facts.judge(), expected) {
                (Verdict::Refuse(mismatch), Some(expected)) => assert_eq!(mismatch, expected, "{facts:?}"),
                (Verdict::Accept | Verdict::Ask, None) => {}
                wrong => panic!("{wrong:?}: {facts:?}"),
            }
        });
    }

    #[test]
    fn only_the_key_that_has_proved_to_serve_the_name_need_not_prove_it() {
        all(|facts| {
            let bound = facts.bound.is_some() && facts.bound == facts.shown;
            let proved = facts.dialect == Dialect::MaculaPeer1 && (bound || (facts.registered && !facts.disowned));
            match facts.judge() {
                Verdict::Accept => assert!(proved || facts.dialect == Dialect::Macula, "{facts:?}"),
                Verdict::Ask => assert!(!proved && facts.dialect == Dialect::MaculaPeer1, "{facts:?}"),
                Verdict::Refuse(_) => {}
            }
        });
    }

    #[test]
    fn a_name_is_bound_by_the_nodes_word_or_by_a_caller_that_names_the_key_and_not_by_a_node_without_an_id() {
        all(|facts| {
            assert!(facts.binds(Answer::HasIt));
            let vouched_for =
                facts.shown.is_some() && (facts.named == facts.shown || facts.waiting.contains(&facts.shown));
            assert_eq!(facts.binds(Answer::HasNone), vouched_for, "{facts:?}");
        });
    }

    #[test]
    fn a_node_has_its_id_and_no_other_and_one_without_serves_any() {
        let (own, own_key) = (node(1), key(7));
        assert_eq!(answer(Some(&own), &own_key, b"1"), Some(Answer::HasIt));
        assert_eq!(answer(Some(&own), &own_key, b"2"), None);
        assert_eq!(answer(Some(&own), &own_key, &[7; 32]), Some(Answer::HasIt));
        assert_eq!(answer(None, &own_key, b"1"), Some(Answer::HasNone));
        assert_eq!(answer(None, &own_key, &[7; 32]), Some(Answer::HasIt));
        assert_eq!(answer(Some(&own), &own_key, &[8; 32]), None);
    }

    /// A link to a node whose name is bound to key 1.
    fn facts(shown: Option<u8>) -> Facts<'static> {
        Facts {
            own: key(9),
            shown: shown.map(key),
            dialect: Dialect::MaculaPeer1,
            named: None,
            registered: false,
            bound: Some(key(1)),
            disowned: false,
            enforced: true,
            waiting: &[],
        }
    }

    #[test]
    fn a_node_with_another_key_is_asked_once_for_the_word_of_the_one_before() {
        assert_eq!(facts(Some(1)).step(false), Step::Admit);
        assert_eq!(facts(Some(2)).step(false), Step::AskSuccession(key(1)));
        assert_eq!(facts(Some(2)).step(true), Step::Refuse(Mismatch::Bound(key(1))));
        // Without a key, or in a dialect that binds nothing to it, there is nothing to hand a name on to.
        assert_eq!(facts(None).step(false), Step::Refuse(Mismatch::Bound(key(1))));
        let macula = Facts { dialect: Dialect::Macula, ..facts(Some(2)) };
        assert_eq!(macula.step(false), Step::Refuse(Mismatch::Bound(key(1))));
        assert_eq!(Mismatch::Bound(key(1)).error(), ConnectError::Untrusted);
        assert_eq!(facts(Some(9)).step(false), Step::Refuse(Mismatch::Ourselves));
        assert_eq!(Mismatch::Ourselves.error(), ConnectError::WrongNode);
    }

    #[test]
    fn a_name_is_bound_to_a_key_that_serves_it_and_to_none_of_a_dialect_without_keys() {
        let unbound = Facts { bound: None, ..facts(Some(2)) };
        assert_eq!(unbound.step(false), Step::Ask);
        assert!(unbound.learns(Some(Answer::HasIt)) && !unbound.learns(Some(Answer::HasNone)));
        let vouched_for = Facts { registered: true, ..unbound };
        assert_eq!(vouched_for.step(false), Step::Admit);
        assert!(vouched_for.learns(None));
        let macula = Facts { dialect: Dialect::Macula, ..unbound };
        assert_eq!(macula.step(false), Step::Admit);
        assert!(!macula.learns(None));
    }

    #[test]
    fn only_a_gateway_is_taken_for_the_local_one() {
        let endpoint = crate::types::EndpointRef::parse("127.0.0.1:9443").unwrap().to_owned();
        let [gateway, plain] = [PeerName::Gateway(endpoint.clone()), PeerName::Endpoint(endpoint)];
        assert_eq!(without_node_id(&gateway, Dialect::Macula), Some(Ok(())));
        assert_eq!(without_node_id(&gateway, Dialect::MaculaPeer1), Some(Err(ConnectError::NoProtocol)));
        assert_eq!(without_node_id(&plain, Dialect::MaculaPeer1), Some(Ok(())));
        assert_eq!(without_node_id(&PeerName::Node(node(1)), Dialect::Macula), None);
    }
}
