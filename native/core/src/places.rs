//! The places of accepted connections: a limit in total, and shares of it for one key and for one address.
//!
//! A connection takes a place with its first packet, before anything is done for it, and counts for its key as well
//! once it has shown one. The last places are kept for addresses that have none, so a newcomer gets in however many
//! others are connected.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::shares::{Client, Counts, Exceeded, Limits, Rates};
use crate::types::Fingerprint;

/// With this many handshakes pending, validate addresses with Retry (RFC 9000, section 8.1.2). So a client that forges
/// source addresses takes few of their places.
const UNPROVEN_HANDSHAKES: usize = 64;

/// The part of the places that is kept for addresses without any.
const RESERVE: usize = 8;

/// Handshakes come in bursts, as when nodes come back after an outage.
const BURST: Duration = Duration::from_secs(2);

/// How many connections a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceLimits {
    pub connections: usize,
    /// Handshakes per second.
    pub handshake_rate: usize,
    /// In percent of both.
    pub key_share: u8,
    pub address_share: u8,
}

macro_rules! limits {
    ($($(#[$about:meta])* $variant:ident $name:literal,)*) => {
        /// The limit that does not allow a connection.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ExceededLimit { $($(#[$about])* $variant,)* }

        impl ExceededLimit {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

limits! {
    /// All places are taken, but those for addresses that have none.
    Connections "connections",
    ConnectionsPerKey "connections_per_key",
    ConnectionsPerAddress "connections_per_address",
    HandshakeRate "handshake_rate",
    HandshakeRatePerAddress "handshake_rate_per_address",
}

/// What to do with a new client.
#[derive(Debug, PartialEq, Eq)]
pub enum PlaceDecision {
    /// It has a place, in the handshake: [`Places::handshake_over`] ends that, [`Places::leave`] all.
    Placed,
    /// It is to prove its address.
    Prove,
    Refused(ExceededLimit),
}

#[derive(Debug)]
pub struct Places {
    /// For addresses without any.
    kept: usize,
    handshakes: usize,
    networks: Counts,
    keys: Counts,
    rates: Rates,
}

impl Places {
    pub fn new(limits: &PlaceLimits, now: Instant) -> Self {
        let (networks, keys) = counted(limits);
        Self {
            kept: kept(limits),
            handshakes: 0,
            networks: Counts::new(networks),
            keys: Counts::new(keys),
            rates: rates(limits, now),
        }
    }

    /// From now on these limits hold. Existing connections keep their places.
    pub fn limit(&mut self, limits: &PlaceLimits, now: Instant) {
        let (networks, keys) = counted(limits);
        self.kept = kept(limits);
        self.networks.limit(networks);
        self.keys.limit(keys);
        self.rates = rates(limits, now);
    }

    /// A client wants to connect. `proven`: its address has been validated.
    pub fn arrive(&mut self, address: IpAddr, proven: bool, now: Instant) -> PlaceDecision {
        if self.handshakes >= UNPROVEN_HANDSHAKES && !proven {
            return PlaceDecision::Prove;
        }
        if let Err(over) = self.has_room(address) {
            return PlaceDecision::Refused(over);
        }
        match self.rates.take(&Client::new(None, address), 1, now) {
            Ok(()) => {}
            Err(Exceeded::Address | Exceeded::Key) => {
                return PlaceDecision::Refused(ExceededLimit::HandshakeRatePerAddress);
            }
            Err(Exceeded::Total) => return PlaceDecision::Refused(ExceededLimit::HandshakeRate),
        }
        match self.enter(address) {
            Ok(()) => {
                self.handshakes += 1;
                PlaceDecision::Placed
            }
            Err(over) => PlaceDecision::Refused(over),
        }
    }

    /// A handshake is over, however it went.
    pub fn handshake_over(&mut self) {
        self.handshakes = self.handshakes.saturating_sub(1);
    }

    /// Takes a place for a connection whose handshake was, or is, bounded elsewhere.
    pub fn enter(&mut self, address: IpAddr) -> Result<(), ExceededLimit> {
        self.has_room(address)?;
        self.networks.take(&Client::new(None, address), 1).map_err(over_address)
    }

    fn has_room(&self, address: IpAddr) -> Result<(), ExceededLimit> {
        let client = Client::new(None, address);
        self.networks.allows(&client, 1).map_err(over_address)?;
        match self.networks.of_network(&client) > 0 && self.networks.left() <= self.kept {
            true => Err(ExceededLimit::Connections),
            false => Ok(()),
        }
    }

    /// A connection with a place has shown its key.
    pub fn show(&mut self, key: Fingerprint, address: IpAddr) -> Result<(), ExceededLimit> {
        self.keys.take(&Client::new(key, address), 1).map_err(|_| ExceededLimit::ConnectionsPerKey)
    }

    /// A connection gives its place back. `key`: the key that it has been counted for.
    pub fn leave(&mut self, key: Option<Fingerprint>, address: IpAddr) {
        self.networks.give_back(&Client::new(None, address), 1);
        if key.is_some() {
            self.keys.give_back(&Client::new(key, address), 1);
        }
    }

    /// How many connections an address has.
    pub fn of_address(&self, address: IpAddr) -> usize {
        self.networks.of_network(&Client::new(None, address))
    }
}

fn over_address(exceeded: Exceeded) -> ExceededLimit {
    match exceeded {
        Exceeded::Key | Exceeded::Address => ExceededLimit::ConnectionsPerAddress,
        Exceeded::Total => ExceededLimit::Connections,
    }
}

fn kept(limits: &PlaceLimits) -> usize {
    // Where one address may have all, none are kept for others.
    if limits.address_share < 100 { limits.connections / RESERVE } else { 0 }
}

/// Those of networks, which are all that there are, and those of keys.
fn counted(limits: &PlaceLimits) -> (Limits, Limits) {
    let networks = Limits::percent(limits.connections, 100, limits.address_share);
    let keys = Limits::percent(limits.connections, limits.key_share, 100);
    (networks, keys)
}

fn rates(limits: &PlaceLimits, now: Instant) -> Rates {
    Rates::new(Limits::percent(limits.handshake_rate, 100, limits.address_share), BURST, now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LIMITS: PlaceLimits = PlaceLimits { connections: 80, handshake_rate: 1000, key_share: 10, address_share: 50 };

    fn address(n: u8) -> IpAddr {
        [20, 0, 0, n].into()
    }

    /// One after the other, until one is refused.
    fn connect(places: &mut Places, from: u8, now: Instant) -> (usize, ExceededLimit) {
        for count in 0.. {
            match places.arrive(address(from), true, now) {
                PlaceDecision::Placed => places.handshake_over(),
                PlaceDecision::Refused(over) => return (count, over),
                PlaceDecision::Prove => panic!("it has proven its address"),
            }
        }
        unreachable!()
    }

    #[test]
    fn an_address_has_its_share_and_one_that_has_nothing_still_gets_in() {
        let now = Instant::now();
        let mut places = Places::new(&LIMITS, now);
        assert_eq!(connect(&mut places, 1, now), (40, ExceededLimit::ConnectionsPerAddress));
        assert_eq!(connect(&mut places, 2, now), (30, ExceededLimit::Connections));
        for new in 3..13 {
            assert_eq!(connect(&mut places, new, now), (1, ExceededLimit::Connections));
        }
        assert_eq!(connect(&mut places, 13, now), (0, ExceededLimit::Connections));
        places.leave(None, address(1));
        assert_eq!(connect(&mut places, 1, now), (0, ExceededLimit::Connections), "the last ones are for others");
        assert_eq!(connect(&mut places, 13, now), (1, ExceededLimit::Connections));
        assert_eq!(places.of_address(address(1)), 39);
    }

    #[test]
    fn a_key_has_its_share_wherever_it_comes_from() {
        let now = Instant::now();
        let (mut places, key) = (Places::new(&LIMITS, now), [1; 32].into());
        for from in 1..=8 {
            places.enter(address(from)).unwrap();
            places.show(key, address(from)).unwrap();
        }
        places.enter(address(9)).unwrap();
        assert_eq!(places.show(key, address(9)), Err(ExceededLimit::ConnectionsPerKey));
        places.leave(None, address(9));
        places.leave(Some(key), address(1));
        places.enter(address(9)).unwrap();
        assert_eq!(places.show(key, address(9)), Ok(()));
    }

    #[test]
    fn an_address_that_is_not_proven_takes_few_places() {
        let now = Instant::now();
        let mut places = Places::new(&PlaceLimits { connections: 1000, ..LIMITS }, now);
        let arrived: Vec<_> = (0..100).map(|_| places.arrive(address(1), false, now)).collect();
        assert!(arrived[..64].iter().all(|arrival| *arrival == PlaceDecision::Placed));
        assert!(arrived[64..].iter().all(|arrival| *arrival == PlaceDecision::Prove));
        assert_eq!(places.arrive(address(1), true, now), PlaceDecision::Placed);
        for _ in 0..2 {
            places.handshake_over();
        }
        assert_eq!(places.arrive(address(1), false, now), PlaceDecision::Placed);
    }

    #[test]
    fn handshakes_of_one_address_are_as_many_per_second_as_it_has_a_share_of() {
        let start = Instant::now();
        let mut places = Places::new(&PlaceLimits { connections: 1000, handshake_rate: 100, ..LIMITS }, start);
        let mut begin = |from, now| {
            let arrival = places.arrive(address(from), true, now);
            if arrival == PlaceDecision::Placed {
                places.handshake_over();
                places.leave(None, address(from));
            }
            arrival
        };
        for _ in 0..100 {
            assert_eq!(begin(1, start), PlaceDecision::Placed);
        }
        assert_eq!(begin(1, start), PlaceDecision::Refused(ExceededLimit::HandshakeRatePerAddress));
        assert_eq!(begin(2, start), PlaceDecision::Placed);
        assert_eq!(begin(1, start + Duration::from_millis(20)), PlaceDecision::Placed);
    }

    #[test]
    fn lowering_the_limit_takes_no_place_away() {
        let now = Instant::now();
        let mut places = Places::new(&LIMITS, now);
        assert_eq!(connect(&mut places, 1, now).0, 40);
        places.limit(&PlaceLimits { connections: 8, ..LIMITS }, now);
        assert_eq!(places.of_address(address(1)), 40);
        assert_eq!(connect(&mut places, 2, now), (0, ExceededLimit::Connections));
        (0..40).for_each(|_| places.leave(None, address(1)));
        assert_eq!(connect(&mut places, 2, now), (4, ExceededLimit::ConnectionsPerAddress));
    }
}
