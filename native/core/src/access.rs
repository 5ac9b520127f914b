//! Access control: lists of keys, node ids and networks that it allows or denies.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use bytes::Bytes;
use thiserror::Error;

use crate::types::{Fingerprint, NodeId};

/// An address prefix, such as `192.0.2.0/24` or `2001:db8::/32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    first: IpAddr,
    len: u8,
}

/// The text or the prefix is no network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a network")]
pub struct NotANetwork;

impl Network {
    /// All addresses that share the first `len` bits of `first`, which must have no others set.
    pub fn new(first: IpAddr, len: u8) -> Result<Self, NotANetwork> {
        let (first, len) = match (first, first.to_canonical()) {
            // IPv4-mapped: the prefix is counted from the beginning of the IPv6 address.
            (IpAddr::V6(_), IpAddr::V4(v4)) if (96..=128).contains(&len) => (IpAddr::V4(v4), len - 96),
            _ => (first, len),
        };
        let is_prefix = match first {
            IpAddr::V4(ip) => len <= 32 && ip.to_bits() & host_bits_v4(len) == 0,
            IpAddr::V6(ip) => len <= 128 && ip.to_bits() & host_bits_v6(len) == 0,
        };
        if is_prefix { Ok(Self { first, len }) } else { Err(NotANetwork) }
    }
}

/// One address.
impl From<IpAddr> for Network {
    fn from(ip: IpAddr) -> Self {
        let first = ip.to_canonical();
        Self { first, len: if first.is_ipv4() { 32 } else { 128 } }
    }
}

impl FromStr for Network {
    type Err = NotANetwork;

    /// `Address/Bits`, or an address alone.
    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let ip = |text: &str| text.parse::<IpAddr>().map_err(|_| NotANetwork);
        match text.split_once('/') {
            Some((first, len)) => Self::new(ip(first)?, len.parse().map_err(|_| NotANetwork)?),
            None => ip(text).map(Self::from),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.len)
    }
}

/// The bits of an address behind its prefix.
fn host_bits_v4(len: u8) -> u32 {
    u32::MAX.checked_shr(len.into()).unwrap_or(0)
}

fn host_bits_v6(len: u8) -> u128 {
    u128::MAX.checked_shr(len.into()).unwrap_or(0)
}

/// One side of [`Access`]. `None`: it says nothing about this kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessList {
    /// Nodes that have shown one of these keys.
    pub keys: Option<Vec<Fingerprint>>,
    /// Nodes that register here under one of these node ids, if this node is a relay.
    pub node_ids: Option<Vec<NodeId>>,
    /// Clients that connect straight from an address in one of these.
    pub networks: Option<Vec<Network>>,
}

/// Which nodes may connect to this one. What one is denied for counts more than what it is allowed for; where a list of a kind is
/// allowed, nothing else of that kind is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// The only ones that may come.
    pub allow: AccessList,
    /// Nodes that are refused.
    pub deny: AccessList,
}

/// [`Access`], ready to be looked up in.
#[derive(Debug, Default)]
pub struct Rules {
    keys: Kind<HashSet<Fingerprint>>,
    node_ids: Kind<HashSet<Bytes>>,
    networks: Kind<Networks>,
}

impl Rules {
    pub fn new(access: &Access) -> Self {
        let Access { allow, deny } = access;
        Self {
            keys: Kind::new(&allow.keys, &deny.keys, |key| *key),
            node_ids: Kind::new(&allow.node_ids, &deny.node_ids, NodeId::to_bytes),
            networks: Kind::new(&allow.networks, &deny.networks, |network| *network),
        }
    }

    /// `None`: none was shown.
    pub fn permit_key(&self, key: Option<&Fingerprint>) -> bool {
        self.keys.permits(|set| key.is_some_and(|key| set.contains(key)))
    }

    pub fn permit_node_id(&self, node_id: &[u8]) -> bool {
        self.node_ids.permits(|set| set.contains(node_id))
    }

    pub fn permit_address(&self, ip: IpAddr) -> bool {
        self.networks.permits(|networks| networks.contain(ip))
    }

    /// Whether a node may be refused because of the key that it shows.
    pub fn select_by_key(&self) -> bool {
        self.keys.allow.is_some() || !self.keys.deny.is_empty()
    }
}

/// Both lists of one kind.
#[derive(Debug, Default)]
struct Kind<S> {
    allow: Option<S>,
    deny: S,
}

impl<S> Kind<S> {
    fn new<T, E>(allow: &Option<Vec<T>>, deny: &Option<Vec<T>>, entry: impl Fn(&T) -> E) -> Self
    where
        S: FromIterator<E>,
    {
        let allow = allow.as_ref().map(|list| list.iter().map(&entry).collect());
        Self { allow, deny: deny.iter().flatten().map(entry).collect() }
    }

    fn permits(&self, lists: impl Fn(&S) -> bool) -> bool {
        !lists(&self.deny) && self.allow.as_ref().is_none_or(lists)
    }
}

/// Networks as ranges of addresses, which are sorted and do not touch.
#[derive(Debug, Default)]
struct Networks {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl FromIterator<Network> for Networks {
    fn from_iter<I: IntoIterator<Item = Network>>(networks: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for Network { first, len } in networks {
            match first {
                IpAddr::V4(ip) => v4.push((ip.to_bits(), ip.to_bits() | host_bits_v4(len))),
                IpAddr::V6(ip) => v6.push((ip.to_bits(), ip.to_bits() | host_bits_v6(len))),
            }
        }
        Self { v4: disjoint(v4), v6: disjoint(v6) }
    }
}

impl Networks {
    fn contain(&self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(ip) => contains(&self.v4, ip.to_bits()),
            IpAddr::V6(ip) => contains(&self.v6, ip.to_bits()),
        }
    }
}

/// Prefixes contain each other or have nothing in common, so one that begins within another lies within it.
fn disjoint<T: Ord + Copy>(mut ranges: Vec<(T, T)>) -> Vec<(T, T)> {
    // The longest prefix of those with one first address comes first.
    ranges.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    ranges.dedup_by(|later, kept| later.0 <= kept.1);
    ranges
}

fn contains<T: Ord>(ranges: &[(T, T)], address: T) -> bool {
    let begun = ranges.partition_point(|(first, _)| *first <= address);
    // The last that begins no later.
    ranges[..begun].last().is_some_and(|(_, last)| address <= *last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    fn networks(texts: &[&str]) -> Option<Vec<Network>> {
        Some(texts.iter().map(|text| network(text)).collect())
    }

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    fn deny(deny: AccessList) -> Rules {
        Rules::new(&Access { deny, ..Access::default() })
    }

    fn allow(allow: AccessList) -> Rules {
        Rules::new(&Access { allow, ..Access::default() })
    }

    fn permitted(rules: &Rules, addresses: &[&str]) -> Vec<bool> {
        addresses.iter().map(|ip| rules.permit_address(ip.parse().unwrap())).collect()
    }

    #[test]
    fn a_network_is_a_prefix_with_nothing_behind_it() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::1", "::1/128"),
            ("::/0", "::/0"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:10.0.0.1", "10.0.0.1/32"),
        ] {
            assert_eq!(network(text).to_string(), shown);
        }
        for wrong in [
            "",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "10.0.0.0/",
            "/8",
            "10.0.0.0/-1",
            "2001:db8::/129",
            "2001:db8::1/64",
            "host",
        ] {
            assert_eq!(wrong.parse::<Network>(), Err(NotANetwork), "{wrong}");
        }
    }

    #[test]
    fn nothing_is_refused_without_lists() {
        let rules = Rules::default();
        assert!(rules.permit_key(None) && rules.permit_key(Some(&key(1))) && !rules.select_by_key());
        assert!(rules.permit_node_id(b"a"));
        assert_eq!(permitted(&rules, &["10.0.0.1", "::1"]), [true, true]);
    }

    #[test]
    fn only_denied_clients_are_refused() {
        let rules = deny(AccessList {
            keys: Some(vec![key(1)]),
            node_ids: Some(vec![NodeId::new(b"a").unwrap()]),
            networks: networks(&["10.0.0.0/8", "2001:db8::/32"]),
        });
        assert!(!rules.permit_key(Some(&key(1))) && rules.permit_key(Some(&key(2))) && rules.permit_key(None));
        assert!(rules.select_by_key());
        assert!(!rules.permit_node_id(b"a") && rules.permit_node_id(b"b"));
        let addresses = ["10.255.255.255", "::ffff:10.0.0.1", "11.0.0.0", "9.255.255.255", "2001:db8::1", "2001:db9::"];
        assert_eq!(permitted(&rules, &addresses), [false, false, true, true, false, true]);
    }

    #[test]
    fn an_allow_list_refuses_the_rest_of_its_kind() {
        let rules = allow(AccessList { keys: Some(vec![key(1)]), ..AccessList::default() });
        assert!(rules.permit_key(Some(&key(1))) && !rules.permit_key(Some(&key(2))) && !rules.permit_key(None));
        assert!(rules.permit_node_id(b"a") && rules.select_by_key());
        assert_eq!(permitted(&rules, &["10.0.0.1"]), [true]);
        let none = allow(AccessList { keys: Some(vec![]), node_ids: Some(vec![]), networks: Some(vec![]) });
        assert!(!none.permit_key(Some(&key(1))) && !none.permit_node_id(b"a"));
        assert_eq!(permitted(&none, &["10.0.0.1", "::1"]), [false, false]);
    }

    #[test]
    fn all_of_one_family_are_not_all_of_the_other() {
        let addresses = ["10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1"];
        let of = |text| deny(AccessList { networks: networks(&[text]), ..AccessList::default() });
        assert_eq!(permitted(&of("0.0.0.0/0"), &addresses), [false, false, true]);
        assert_eq!(permitted(&of("::/0"), &addresses), [true, true, false]);
    }

    fn any_network() -> impl Strategy<Value = Network> {
        let v4 = (any::<u32>(), 0..=32u8).prop_map(|(ip, len)| {
            let ip = (ip & 0x0300_000f) & !host_bits_v4(len);
            Network::new(IpAddr::V4(ip.into()), len).unwrap()
        });
        let v6 = (any::<u128>(), 0..=128u8).prop_map(|(ip, len)| {
            let ip = (ip & 0x3 << 126 | ip & 0xf) & !host_bits_v6(len);
            Network::new(IpAddr::V6(ip.into()), len).unwrap()
        });
        prop_oneof![v4, v6]
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|ip| IpAddr::V4((ip & 0x0300_000f).into())),
            any::<u128>().prop_map(|ip| IpAddr::V6((ip & 0x3 << 126 | ip & 0xf).into())),
        ]
    }

    fn is_in(network: &Network, ip: IpAddr) -> bool {
        let shares = |width: u8, a: u128, b: u128| network.len == 0 || (a ^ b) >> (width - network.len) == 0;
        match (network.first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => shares(32, first.to_bits().into(), ip.to_bits().into()),
            (IpAddr::V6(first), IpAddr::V6(ip)) => shares(128, first.to_bits(), ip.to_bits()),
            _ => false,
        }
    }

    proptest! {
        /// However networks lie within each other, an address is looked up as if each were compared with it.
        #[test]
        fn an_address_is_found_in_many_networks(
            allow in option::of(vec(any_network(), 0..20)),
            deny in vec(any_network(), 0..20),
            addresses in vec(any_address(), 1..50),
        ) {
            let lists = |networks| AccessList { networks, ..AccessList::default() };
            let rules = Rules::new(&Access { allow: lists(allow.clone()), deny: lists(Some(deny.clone())) });
            for ip in addresses {
                let any = |networks: &Vec<Network>| networks.iter().any(|network| is_in(network, ip));
                let expected = !any(&deny) && allow.as_ref().is_none_or(any);
                prop_assert_eq!(rules.permit_address(ip), expected, "{}", ip);
            }
        }

        #[test]
        fn a_network_reads_as_it_is_shown(network in any_network()) {
            prop_assert_eq!(network.to_string().parse(), Ok(network));
        }
    }
}
