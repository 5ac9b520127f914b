//! The keys that nodes are known by: each name is bound to the key that it was first seen with.

use std::time::{Duration, Instant};

use hashbrown::HashMap;

use crate::identity::Fingerprint;
use crate::message::NodeId;

/// Names remembered; the one that was not seen for longest gives way.
const MAX_KNOWN: usize = 16_384;

/// How long a name that is not seen is remembered. A node that changes its key meanwhile is let in again.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Default)]
pub(crate) struct Known {
    keys: HashMap<NodeId, (Fingerprint, Instant)>,
}

impl Known {
    /// The key that a name is bound to.
    pub(crate) fn key_of(&mut self, node: &NodeId, now: Instant) -> Option<Fingerprint> {
        let (key, seen) = *self.keys.get(node)?;
        if seen + FORGET_AFTER <= now {
            self.keys.remove(node);
            return None;
        }
        Some(key)
    }

    /// The name was seen with a key, which it is bound to from now on.
    pub(crate) fn learn(&mut self, node: NodeId, key: Fingerprint, now: Instant) {
        if self.keys.len() >= MAX_KNOWN && !self.keys.contains_key(&node) {
            let oldest = self.keys.iter().min_by_key(|(_, (_, seen))| *seen).map(|(node, _)| node.clone());
            if let Some(oldest) = oldest {
                self.keys.remove(&oldest);
            }
        }
        self.keys.insert(node, (key, now));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(n: usize) -> NodeId {
        NodeId::new(n.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_name_is_bound_until_it_was_not_seen_for_a_day() {
        let (start, mut known) = (Instant::now(), Known::default());
        known.learn(node(1), [1; 32].into(), start);
        let almost = FORGET_AFTER - Duration::from_secs(1);
        assert_eq!(known.key_of(&node(1), start + almost), Some([1; 32].into()));
        assert_eq!(known.key_of(&node(1), start + FORGET_AFTER), None, "asked for, and not seen");
        known.learn(node(1), [1; 32].into(), start);
        known.learn(node(1), [1; 32].into(), start + almost);
        assert_eq!(known.key_of(&node(1), start + 2 * almost), Some([1; 32].into()), "seen since");
        assert_eq!(known.key_of(&node(1), start + almost + FORGET_AFTER), None);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_was_seen_last() {
        let (start, mut known) = (Instant::now(), Known::default());
        for n in 0..MAX_KNOWN {
            known.learn(node(n), [1; 32].into(), start + Duration::from_millis(n as u64));
        }
        known.learn(node(0), [1; 32].into(), start + Duration::from_secs(3600));
        known.learn(node(MAX_KNOWN), [2; 32].into(), start + Duration::from_secs(3601));
        assert_eq!(known.keys.len(), MAX_KNOWN);
        assert!(known.keys.contains_key(&node(0)));
        assert!(!known.keys.contains_key(&node(1)));
    }
}
