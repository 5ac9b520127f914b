//! Which client has the most of something, and which entry is evicted to make room for another.
//!
//! Keys are free, so an entry counts for the network that it came from as well as for its key. The network with the most
//! makes room, and within it the key with the most. So a client never loses an entry to one that has more.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use crate::shares::Network;
use crate::types::Fingerprint;

/// The client of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    pub key: Fingerprint,
    pub network: Network,
}

/// How much of something each holder has, and which one has the most.
#[derive(Debug)]
pub struct Weights<K> {
    /// Only clients that have something.
    weights: HashMap<K, usize>,
    order: BTreeSet<(usize, K)>,
}

impl<K> Default for Weights<K> {
    fn default() -> Self {
        Self { weights: HashMap::new(), order: BTreeSet::new() }
    }
}

impl<K: Copy + Eq + Hash + Ord> Weights<K> {
    pub fn of(&self, holder: &K) -> usize {
        self.weights.get(holder).copied().unwrap_or_default()
    }

    pub fn add(&mut self, holder: K, weight: usize) {
        self.set(holder, self.of(&holder) + weight);
    }

    pub fn remove(&mut self, holder: K, weight: usize) {
        self.set(holder, self.of(&holder).saturating_sub(weight));
    }

    fn set(&mut self, holder: K, weight: usize) {
        let before = self.weights.remove(&holder).unwrap_or_default();
        self.order.remove(&(before, holder));
        if weight > 0 {
            self.weights.insert(holder, weight);
            self.order.insert((weight, holder));
        }
    }

    #[cfg(test)]
    pub fn total(&self) -> usize {
        assert_eq!(self.weights.len(), self.order.len());
        self.order.iter().map(|(weight, holder)| self.of(holder).min(*weight)).sum()
    }

    /// The holder with the most. In a tie it is `rather`, if that is one of them.
    fn heaviest(&self, rather: K) -> Option<K> {
        let &(most, heaviest) = self.order.last()?;
        Some(if self.of(&rather) == most { rather } else { heaviest })
    }
}

/// Entries of each key at each network, in the order in which they are evicted.
#[derive(Debug)]
pub struct Queues<T> {
    networks: HashMap<Network, OfNetwork<T>>,
    weights: Weights<Network>,
}

#[derive(Debug)]
struct OfNetwork<T> {
    keys: HashMap<Fingerprint, BTreeSet<T>>,
    weights: Weights<Fingerprint>,
}

impl<T> Default for Queues<T> {
    fn default() -> Self {
        Self { networks: HashMap::new(), weights: Weights::default() }
    }
}

impl<T> Default for OfNetwork<T> {
    fn default() -> Self {
        Self { keys: HashMap::new(), weights: Weights::default() }
    }
}

impl<T: Copy + Ord> Queues<T> {
    /// An entry that is not there yet.
    pub fn insert(&mut self, owner: Owner, entry: T, weight: usize) {
        self.weights.add(owner.network, weight);
        let of_network = self.networks.entry(owner.network).or_default();
        of_network.weights.add(owner.key, weight);
        of_network.keys.entry(owner.key).or_default().insert(entry);
    }

    /// Removes an entry that is there, of the weight that it was inserted with.
    pub fn remove(&mut self, owner: Owner, entry: T, weight: usize) {
        self.weights.remove(owner.network, weight);
        let Some(of_network) = self.networks.get_mut(&owner.network) else { return };
        of_network.weights.remove(owner.key, weight);
        if let Some(of_key) = of_network.keys.get_mut(&owner.key) {
            of_key.remove(&entry);
            if of_key.is_empty() {
                of_network.keys.remove(&owner.key);
            }
        }
        if of_network.keys.is_empty() {
            self.networks.remove(&owner.network);
        }
    }

    /// The entry to evict: the first one of the client with the most. In a tie it is `rather`'s, if that is one of them.
    pub fn first_of_heaviest(&self, rather: Owner) -> Option<(Owner, T)> {
        let network = self.weights.heaviest(rather.network)?;
        let of_network = self.networks.get(&network)?;
        let key = of_network.weights.heaviest(rather.key)?;
        Some((Owner { key, network }, *of_network.keys.get(&key)?.first()?))
    }

    /// What all entries weigh together.
    #[cfg(test)]
    pub fn total(&self) -> usize {
        for (network, of_network) in &self.networks {
            assert_eq!(of_network.weights.total(), self.weights.of(network));
            assert!(of_network.keys.values().all(|entries| !entries.is_empty()));
        }
        self.weights.total()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn owner(key: u8, network: u8) -> Owner {
        Owner { key: [key; 32].into(), network: IpAddr::from([20, 0, 0, network]).into() }
    }

    #[test]
    fn the_first_one_of_the_heaviest_key_of_the_heaviest_network_makes_room() {
        let mut queues = Queues::default();
        let all = [(1, 1, 9, 50), (2, 1, 3, 30), (2, 1, 4, 30), (3, 2, 1, 70)];
        for (key, network, entry, weight) in all {
            queues.insert(owner(key, network), entry, weight);
        }
        let first = |queues: &Queues<_>| queues.first_of_heaviest(owner(9, 9));
        assert_eq!(first(&queues), Some((owner(2, 1), 3)));
        queues.remove(owner(2, 1), 3, 30);
        assert_eq!(first(&queues), Some((owner(1, 1), 9)));
        queues.remove(owner(1, 1), 9, 50);
        assert_eq!(first(&queues), Some((owner(3, 2), 1)));
        queues.remove(owner(3, 2), 1, 70);
        queues.remove(owner(2, 1), 4, 30);
        assert_eq!(first(&queues), None);
        assert!(queues.networks.is_empty() && queues.weights.weights.is_empty());
    }

    #[test]
    fn in_a_tie_the_client_that_needs_the_room_makes_it() {
        let mut queues = Queues::default();
        for (key, network) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
            queues.insert(owner(key, network), 0, 1);
        }
        for (key, network) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
            let rather = owner(key, network);
            assert_eq!(queues.first_of_heaviest(rather), Some((rather, 0)));
        }
    }

    proptest! {
        #[test]
        fn no_client_has_more_than_the_one_whose_entry_is_evicted(
            steps in vec((0..4_u8, 0..4_u8, 1..9_usize), 1..80), rather in (0..4_u8, 0..4_u8),
        ) {
            let (mut queues, mut model, rather) = (Queues::default(), BTreeMap::new(), owner(rather.0, rather.1));
            for (entry, (key, network, weight)) in steps.into_iter().enumerate() {
                let owner = owner(key, network);
                queues.insert(owner, entry, weight);
                model.insert(entry, (owner, weight));
            }
            while let Some((first, entry)) = queues.first_of_heaviest(rather) {
                let sum = |of: &dyn Fn(Owner) -> bool| -> usize {
                    model.values().filter(|(owner, _)| of(*owner)).map(|(_, weight)| weight).sum()
                };
                let of_network = |network| sum(&|owner| owner.network == network);
                for (other, _) in model.values() {
                    prop_assert!(of_network(other.network) <= of_network(first.network));
                    prop_assert!(other.network != first.network || sum(&|owner| owner == *other) <= sum(&|owner| owner == first));
                }
                prop_assert_eq!(model.iter().find(|(_, (owner, _))| *owner == first).unwrap().0, &entry);
                let (owner, weight) = model.remove(&entry).unwrap();
                queues.remove(owner, entry, weight);
            }
            prop_assert!(model.is_empty() && queues.networks.is_empty());
        }
    }
}
