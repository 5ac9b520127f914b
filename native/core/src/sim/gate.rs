//! NATs and firewalls.

use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;

use crate::nat::{Allocation, Filtering, Mapping};

const SECOND: u64 = 1_000_000;

/// What is between a node and the internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::sim) enum Kind {
    /// Nothing.
    Open,
    FullCone,
    AddressRestricted,
    PortRestricted,
    SymmetricRandom,
    SymmetricSequential,
    /// A port-restricted NAT at home, and another at the carrier.
    CarrierGrade,
    /// No NAT, and nothing is let in that was not asked for.
    Firewall,
    /// No NAT, and no UDP but with relays.
    Blocked,
}

impl Kind {
    pub(in crate::sim) const ALL: [Self; 9] = [
        Self::Open,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::SymmetricRandom,
        Self::SymmetricSequential,
        Self::CarrierGrade,
        Self::Firewall,
        Self::Blocked,
    ];

    /// Those that always meet each other.
    pub(in crate::sim) const EASY: [Self; 6] =
        [Self::Open, Self::FullCone, Self::AddressRestricted, Self::PortRestricted, Self::CarrierGrade, Self::Firewall];

    /// Whether several nodes can be behind one.
    pub(in crate::sim) fn has_network(self) -> bool {
        !matches!(self, Self::Open | Self::Firewall | Self::Blocked)
    }
}

/// A NAT, or a firewall without one, between two networks.
pub(in crate::sim) struct Gate {
    pub(in crate::sim) inner: usize,
    pub(in crate::sim) outer: usize,
    /// Its own address outside. A firewall has none.
    pub(in crate::sim) ip: Option<IpAddr>,
    pub(in crate::sim) mapping: Mapping,
    pub(in crate::sim) filtering: Filtering,
    pub(in crate::sim) allocation: Allocation,
    pub(in crate::sim) hairpin: bool,
    /// Whether up to three ports are taken by others before each one.
    pub(in crate::sim) shared: bool,
    /// Whether only relays can be sent to.
    pub(in crate::sim) only_relays: bool,
    /// In which a mapping, and what it lets in, is forgotten.
    pub(in crate::sim) timeout: u64,
    pub(in crate::sim) last: u16,
    pub(in crate::sim) random: fastrand::Rng,
    outside: HashMap<Key, SocketAddr>,
    entries: HashMap<SocketAddr, Entry>,
}

/// What has one mapping.
type Key = (SocketAddr, Option<IpAddr>, Option<u16>);

struct Entry {
    key: Key,
    used: u64,
    /// Whom the socket has sent to, and when.
    sent: HashMap<SocketAddr, u64>,
}

impl Gate {
    pub(in crate::sim) fn new(
        kind: Kind,
        inner: usize,
        outer: usize,
        ip: Option<IpAddr>,
        random: &mut fastrand::Rng,
    ) -> Self {
        let mut random = random.fork();
        let mapping = match kind {
            Kind::SymmetricRandom | Kind::SymmetricSequential => Mapping::PortDependent,
            _ => Mapping::EndpointIndependent,
        };
        let filtering = match kind {
            Kind::Open | Kind::FullCone => Filtering::EndpointIndependent,
            Kind::AddressRestricted => Filtering::HostDependent,
            _ => Filtering::PortDependent,
        };
        let allocation = match kind {
            Kind::SymmetricRandom => Allocation::Random,
            Kind::SymmetricSequential => Allocation::Contiguous([1, 1, 1, 2, -1][random.usize(..5)]),
            _ if ip.is_none() => Allocation::Preserving,
            _ => [Allocation::Preserving, Allocation::Contiguous(1), Allocation::Random][random.usize(..3)],
        };
        Self {
            inner,
            outer,
            ip,
            mapping,
            filtering,
            allocation,
            hairpin: random.bool(),
            shared: false,
            only_relays: kind == Kind::Blocked,
            timeout: random.u64(30..120) * SECOND,
            last: random.u16(1024..),
            random,
            outside: HashMap::new(),
            entries: HashMap::new(),
        }
    }

    /// The address outside of a packet from inside. `None`: it does not pass.
    pub(in crate::sim) fn out(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        to_relay: bool,
        now: u64,
    ) -> Option<SocketAddr> {
        if (self.only_relays && !to_relay) || (self.ip == Some(to.ip()) && !self.hairpin) {
            return None;
        }
        let key = match self.mapping {
            Mapping::EndpointIndependent => (from, None, None),
            Mapping::HostDependent => (from, Some(to.ip()), None),
            Mapping::PortDependent => (from, Some(to.ip()), Some(to.port())),
        };
        let known = self.outside.get(&key).copied().filter(|outside| self.is_used(outside, now));
        let outside = match (known, self.ip) {
            (Some(outside), _) => outside,
            (None, None) => from,
            (None, Some(ip)) => SocketAddr::new(ip, self.allocate(ip, from.port(), now)),
        };
        if known.is_none() {
            self.outside.insert(key, outside);
            if let Some(old) = self.entries.insert(outside, Entry { key, used: now, sent: HashMap::new() })
                && old.key != key
            {
                self.outside.remove(&old.key);
            }
        }
        let entry = self.entries.get_mut(&outside)?;
        entry.used = now;
        entry.sent.insert(to, now);
        Some(outside)
    }

    /// The address inside for a packet from outside. `None`: it does not pass.
    pub(in crate::sim) fn into(&mut self, from: SocketAddr, to: SocketAddr, now: u64) -> Option<SocketAddr> {
        if self.ip.is_none() && self.filtering == Filtering::EndpointIndependent {
            return Some(to);
        }
        let entry = self.entries.get(&to).filter(|_| self.is_used(&to, now))?;
        let fresh = |sent: &u64| sent + self.timeout > now;
        let passes = match self.filtering {
            Filtering::EndpointIndependent => true,
            Filtering::HostDependent => entry.sent.iter().any(|(to, sent)| to.ip() == from.ip() && fresh(sent)),
            Filtering::PortDependent => entry.sent.get(&from).is_some_and(fresh),
        };
        passes.then_some(entry.key.0)
    }

    /// It was restarted.
    pub(in crate::sim) fn forget(&mut self) {
        self.outside.clear();
        self.entries.clear();
    }

    fn is_used(&self, outside: &SocketAddr, now: u64) -> bool {
        self.entries.get(outside).is_some_and(|entry| entry.used + self.timeout > now)
    }

    fn allocate(&mut self, ip: IpAddr, wanted: u16, now: u64) -> u16 {
        if self.allocation == Allocation::Preserving && !self.is_used(&SocketAddr::new(ip, wanted), now) {
            return wanted;
        }
        let mut taken = if self.shared { self.random.u32(..=3) } else { 0 };
        loop {
            let port = match self.allocation {
                Allocation::Contiguous(step) => {
                    let next = i32::from(self.last) + i32::from(step);
                    (1024 + (next - 1024).rem_euclid(64_512)) as u16
                }
                _ => self.random.u16(1024..),
            };
            self.last = port;
            if self.is_used(&SocketAddr::new(ip, port), now) {
                continue;
            }
            if taken == 0 {
                return port;
            }
            taken -= 1;
        }
    }
}
