//! Cached answers about nodes that want to come in.

use std::hash::{Hash, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use hashlink::LruCache;

use crate::types::{Fingerprint, NodeId, Path};

/// Answers remembered, of each kind: a flood of denied strangers does not evict allowed nodes.
const MAX_REMEMBERED: usize = 16_384;

/// How long a node that was told to leave is not registered again.
pub const KICKED_FOR: Duration = Duration::from_secs(30);

/// Of more the least recently kicked may come back.
const MAX_KICKED: usize = 1024;

/// What an answer is about. The port is left out, because it is another one each time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Subject {
    pub key: Option<Fingerprint>,
    pub ip: IpAddr,
    pub path: Path,
    /// `None`: it is about a connection.
    pub node_id: Option<NodeId>,
}

/// Answers that are still good.
#[derive(Debug)]
pub struct AnswerCache {
    good_for: Duration,
    allowed: LruCache<Subject, Instant, RandomState>,
    denied: LruCache<Subject, Instant, RandomState>,
}

impl AnswerCache {
    pub fn new(good_for: Duration) -> Self {
        let cache = || LruCache::with_hasher(MAX_REMEMBERED, RandomState::new());
        Self { good_for, allowed: cache(), denied: cache() }
    }

    /// Whether the subject is allowed, if that is known.
    pub fn find(&mut self, subject: &Subject, now: Instant) -> Option<bool> {
        for (answers, allowed) in [(&mut self.allowed, true), (&mut self.denied, false)] {
            if let Some(until) = answers.get(subject).copied() {
                if now < until {
                    return Some(allowed);
                }
                answers.remove(subject);
            }
        }
        None
    }

    pub fn remember(&mut self, subject: Subject, allowed: bool, now: Instant) {
        if self.good_for.is_zero() {
            return;
        }
        let (same, other) = match allowed {
            true => (&mut self.allowed, &mut self.denied),
            false => (&mut self.denied, &mut self.allowed),
        };
        other.remove(&subject);
        same.insert(subject, now + self.good_for);
    }

    pub fn forget_all(&mut self) {
        self.allowed.clear();
        self.denied.clear();
    }
}

/// Which nodes to disconnect.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Kick {
    /// All nodes with this key.
    Key(Fingerprint),
    /// The node that is registered under this node id.
    NodeId(NodeId),
}

/// Nodes that were kicked a short time ago.
#[derive(Debug)]
pub struct Kicked(LruCache<Kick, Instant, RandomState>);

impl Default for Kicked {
    fn default() -> Self {
        Self(LruCache::with_hasher(MAX_KICKED, RandomState::new()))
    }
}

impl Kicked {
    pub fn add(&mut self, target: Kick, now: Instant) {
        self.0.insert(target, now + KICKED_FOR);
    }

    /// Whether a registration must wait.
    pub fn hold(&mut self, key: Fingerprint, node_id: &[u8], now: Instant) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let target = [Some(Kick::Key(key)), NodeId::new(node_id).map(Kick::NodeId)];
        target.into_iter().flatten().any(|target| self.holds(&target, now))
    }

    fn holds(&mut self, target: &Kick, now: Instant) -> bool {
        match self.0.get(target) {
            Some(until) if now < *until => true,
            Some(_) => {
                self.0.remove(target);
                false
            }
            None => false,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn subject(n: u32) -> Subject {
        Subject { key: Some([7; 32].into()), ip: IpAddr::V4(n.into()), path: Path::Direct, node_id: None }
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name.as_bytes()).unwrap()
    }

    #[test]
    fn an_answer_holds_for_its_time_and_its_question() {
        let (start, mut answers) = (Instant::now(), AnswerCache::new(Duration::from_secs(1)));
        let [allowed, denied] = [subject(1), subject(2)];
        answers.remember(allowed.clone(), true, start);
        answers.remember(denied.clone(), false, start);
        let almost = start + Duration::from_millis(999);
        assert_eq!([&allowed, &denied].map(|subject| answers.find(subject, almost)), [Some(true), Some(false)]);
        for other in [
            Subject { key: None, ..allowed.clone() },
            Subject { node_id: Some(node("a")), ..allowed.clone() },
            Subject { path: Path::HolePunch, ..allowed.clone() },
        ] {
            assert_eq!(answers.find(&other, start), None, "{other:?}");
        }
        let over = start + Duration::from_secs(1);
        assert_eq!([&allowed, &denied].map(|subject| answers.find(subject, over)), [None, None]);
        assert_eq!(answers.allowed.len() + answers.denied.len(), 0);
    }

    #[test]
    fn the_last_answer_counts() {
        let (now, mut answers) = (Instant::now(), AnswerCache::new(Duration::from_secs(1)));
        for allowed in [true, false, true] {
            answers.remember(subject(1), allowed, now);
            assert_eq!(answers.find(&subject(1), now), Some(allowed));
        }
        answers.forget_all();
        assert_eq!(answers.find(&subject(1), now), None);
    }

    #[test]
    fn no_answer_is_remembered_for_no_time() {
        let (now, mut answers) = (Instant::now(), AnswerCache::new(Duration::ZERO));
        answers.remember(subject(1), true, now);
        assert_eq!((answers.find(&subject(1), now), answers.allowed.len()), (None, 0));
    }

    #[test]
    fn a_flood_of_denied_clients_evicts_no_allowed_one() {
        let (now, mut answers) = (Instant::now(), AnswerCache::new(Duration::from_secs(1)));
        answers.remember(subject(0), true, now);
        for n in 1..MAX_REMEMBERED as u32 + 10 {
            answers.remember(subject(n), false, now);
        }
        assert_eq!(answers.find(&subject(0), now), Some(true));
        assert_eq!(answers.denied.len(), MAX_REMEMBERED);
    }

    #[test]
    fn a_kicked_node_waits_by_key_and_by_node_id() {
        let (start, mut kicked) = (Instant::now(), Kicked::default());
        let [one, other] = [[1; 32].into(), [2; 32].into()];
        kicked.add(Kick::Key(one), start);
        kicked.add(Kick::NodeId(node("a")), start);
        let almost = start + KICKED_FOR - Duration::from_millis(1);
        let mut hold = |key, name: &str, now| kicked.hold(key, name.as_bytes(), now);
        assert!(hold(one, "b", almost) && hold(other, "a", almost) && !hold(other, "b", almost));
        assert!(!hold(one, "a", start + KICKED_FOR), "both have waited");
        assert!(kicked.0.is_empty(), "they are forgotten when they come");
        for n in 0..MAX_KICKED + 10 {
            kicked.add(Kick::NodeId(node(&n.to_string())), start);
        }
        assert_eq!(kicked.0.len(), MAX_KICKED);
    }
}
