//! What a NAT does, as far as its nodes can tell: which port it gives, and whom it lets in (RFC 4787, sections 4 and 5).

use std::net::SocketAddr;

/// New ports of a contiguous allocator that are no further apart than this: others behind the same NAT take some of them.
/// Two ports that were drawn are so near with a probability of 1 in 1,000, three with 1 in 1,000,000.
const NEAR: i32 = 32;

/// As `NEAR`, where there are only two ports to judge by: 1 in 10,000.
const VERY_NEAR: i32 = 4;

/// Ports are predicted this far: what others behind the same NAT may take between the sample and the pings, at the few
/// new mappings a second of a home or an office.
const PREDICTED: i32 = 8;

/// Allocators begin again here after the highest port: those below are for servers.
const LOWEST: i32 = 1024;
const HIGHEST: i32 = 65_535;

/// Observations that are kept; the later ones are not looked at.
const MAX_OBSERVATIONS: usize = 64;

/// For which destinations a NAT keeps the port that it has given to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// For all.
    EndpointIndependent,
    /// For one address.
    HostDependent,
    /// For one address and port.
    PortDependent,
}

/// Whom a NAT or firewall lets send to a socket that has sent something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filtering {
    /// Everybody.
    EndpointIndependent,
    /// The addresses that the socket has sent to.
    HostDependent,
    /// The addresses and ports that the socket has sent to.
    PortDependent,
}

/// How a NAT chooses the port of a new mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Allocation {
    /// The socket's own.
    Preserving,
    /// One after the other, in this step.
    Contiguous(i16),
    /// Any.
    Random,
}

/// What is known of the NAT that a node is behind. A node that is behind none looks like one behind a NAT that keeps
/// ports and gives each socket one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NatProfile {
    /// `None`: unknown.
    pub mapping: Option<Mapping>,
    /// `None`: unknown.
    pub filtering: Option<Filtering>,
    /// `None`: unknown.
    pub allocation: Option<Allocation>,
}

/// What a mapping or a filter depends on, in the protocol's words and in the order of both types.
const DEPENDS_ON: [&str; 3] = ["ei", "hd", "pd"];

macro_rules! named {
    ($type:ident) => {
        impl $type {
            const ALL: [Self; DEPENDS_ON.len()] = [Self::EndpointIndependent, Self::HostDependent, Self::PortDependent];

            /// Its name in the protocol.
            pub fn name(self) -> &'static str {
                DEPENDS_ON[self as usize]
            }

            pub fn from_name(name: &[u8]) -> Option<Self> {
                Self::ALL.into_iter().find(|known| known.name().as_bytes() == name)
            }
        }
    };
}

named!(Mapping);
named!(Filtering);

impl Allocation {
    /// Its name in the protocol, which says the step apart.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preserving => "pp",
            Self::Contiguous(_) => "pc",
            Self::Random => "rd",
        }
    }

    /// In which a contiguous one goes on.
    pub fn step(self) -> Option<i16> {
        match self {
            Self::Contiguous(step) => Some(step),
            Self::Preserving | Self::Random => None,
        }
    }

    /// A contiguous one of which no step is said, or none that can be, has one of 1.
    pub fn from_name(name: &[u8], step: Option<i16>) -> Option<Self> {
        match name {
            b"pp" => Some(Self::Preserving),
            b"pc" => Some(Self::Contiguous(step.filter(|step| near(*step, NEAR)).unwrap_or(1))),
            b"rd" => Some(Self::Random),
            _ => None,
        }
    }
}

impl NatProfile {
    /// Whether nobody but who was sent to knows the port that a socket has for it.
    pub fn is_hard(&self) -> bool {
        matches!(self.mapping, Some(Mapping::HostDependent | Mapping::PortDependent))
    }

    /// As `is_hard`, and the next ports can be told from the last one.
    pub fn is_sequential(&self) -> bool {
        self.is_hard() && matches!(self.allocation, Some(Allocation::Contiguous(_)))
    }

    /// The ports that the next new mappings get, the likeliest first, if the last one got `last`. None, if the NAT is not
    /// sequential.
    pub fn predict(&self, last: u16) -> Vec<u16> {
        match self.allocation {
            Some(Allocation::Contiguous(step)) if self.is_hard() => {
                (1..=PREDICTED).map(|n| in_range(i32::from(last) + n * i32::from(step))).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Beyond either end of the ports it goes on at the other.
fn in_range(port: i32) -> u16 {
    // Within `LOWEST..=HIGHEST`, which fits.
    (LOWEST + (port - LOWEST).rem_euclid(HIGHEST - LOWEST + 1)) as u16
}

/// An answer that nobody was sent anything for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsolicited {
    /// From a port that the socket has never sent to, of an address that it has sent to.
    OtherPort,
    /// From an address that the socket has never sent to.
    OtherAddress,
}

/// What probes of relays have shown. Those of one address family: what is behind the other tells nothing of this one.
#[derive(Debug, Default)]
pub struct Observations {
    /// In the order in which the sockets first sent there.
    mapped: Vec<Mapped>,
    other_port: Option<bool>,
    other_address: Option<bool>,
}

#[derive(Debug)]
struct Mapped {
    local_port: u16,
    to: SocketAddr,
    seen: SocketAddr,
}

impl Observations {
    /// A relay has seen the socket of this port at `seen` when it was sent something at `to`. To be called in the order in
    /// which the sockets first sent there: a contiguous allocator gives its ports in that order.
    pub fn mapped(&mut self, local_port: u16, to: SocketAddr, seen: SocketAddr) {
        let first = self.mapped.first().is_none_or(|first| first.to.is_ipv4() == to.is_ipv4());
        if first && self.mapped.len() < MAX_OBSERVATIONS {
            self.mapped.push(Mapped { local_port, to, seen });
        }
    }

    /// Whether an answer that was asked for from elsewhere came through. One of several is enough.
    pub fn answered(&mut self, from: Unsolicited, came: bool) {
        let known = match from {
            Unsolicited::OtherPort => &mut self.other_port,
            Unsolicited::OtherAddress => &mut self.other_address,
        };
        *known = Some(came || known.unwrap_or(false));
    }

    /// What follows from all of that.
    pub fn profile(&self) -> NatProfile {
        let mapping = self.mapping();
        NatProfile { mapping, filtering: self.filtering(), allocation: self.allocation(mapping) }
    }

    /// With one relay that has two ports, nobody can tell a mapping for one address from one for all.
    fn mapping(&self) -> Option<Mapping> {
        let (mut ports_differ, mut ports_agree, mut hosts_differ, mut hosts_agree) = (false, false, false, false);
        for (n, one) in self.mapped.iter().enumerate() {
            for other in &self.mapped[..n] {
                if one.local_port != other.local_port || one.to == other.to {
                    continue;
                }
                let agree = one.seen == other.seen;
                if one.to.ip() == other.to.ip() {
                    ports_agree |= agree;
                    ports_differ |= !agree;
                } else {
                    hosts_agree |= agree;
                    hosts_differ |= !agree;
                }
            }
        }
        match () {
            () if ports_differ => Some(Mapping::PortDependent),
            // As likely as not it depends on the port too, and to those that are to find it that is the same.
            () if hosts_differ => Some(if ports_agree { Mapping::HostDependent } else { Mapping::PortDependent }),
            () if hosts_agree => Some(Mapping::EndpointIndependent),
            () => None,
        }
    }

    /// Of two that fit, the stricter.
    fn filtering(&self) -> Option<Filtering> {
        match (self.other_port, self.other_address) {
            (_, Some(true)) => Some(Filtering::EndpointIndependent),
            (Some(true), _) => Some(Filtering::HostDependent),
            (Some(false), _) => Some(Filtering::PortDependent),
            (None, _) => None,
        }
    }

    fn allocation(&self, mapping: Option<Mapping>) -> Option<Allocation> {
        let mut new: Vec<&Mapped> = Vec::new();
        for one in &self.mapped {
            if new.iter().all(|earlier| earlier.seen != one.seen) {
                new.push(one);
            }
        }
        let preserved = |one: &&Mapped| one.seen.port() == one.local_port;
        let kept = new.iter().copied().filter(preserved).count();
        // A hard one that keeps the port for the first destination has to choose another for the next.
        let hard = NatProfile { mapping, ..NatProfile::default() }.is_hard();
        if kept * 2 > new.len() && !(hard && kept < new.len()) {
            return Some(Allocation::Preserving);
        }
        let ports: Vec<i32> = new.iter().filter(|one| !preserved(one)).map(|one| i32::from(one.seen.port())).collect();
        let steps: Vec<i16> = ports.windows(2).map(|pair| step(pair[0], pair[1])).collect();
        let most = if steps.len() > 1 { NEAR } else { VERY_NEAR };
        if steps.is_empty() {
            return None;
        }
        for direction in [1, -1] {
            let fits = |step: &&i16| step.signum() == direction && near(**step, most);
            let fitting = steps.iter().filter(fits);
            // One may be out of line where there are enough others: somebody behind the same NAT took many.
            if fitting.clone().count() + usize::from(steps.len() >= 4) >= steps.len() {
                // Others took some of those between, so that the step itself may never be seen.
                let step = fitting.fold(0, |common, step| greatest_common_divisor(common, step.abs()));
                return Some(Allocation::Contiguous(direction * step));
            }
        }
        Some(Allocation::Random)
    }
}

/// The shorter way round from one port to another.
fn step(from: i32, to: i32) -> i16 {
    let ports = HIGHEST - LOWEST + 1;
    let ahead = (to - from).rem_euclid(ports);
    let step = if ahead > ports / 2 { ahead - ports } else { ahead };
    // At most half of the ports either way, which fits.
    step as i16
}

fn greatest_common_divisor(a: i16, b: i16) -> i16 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn near(step: i16, most: i32) -> bool {
    step != 0 && i32::from(step).abs() <= most
}

/// What others need to know of a node to find a direct path to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    pub profile: NatProfile,
    /// Its local addresses.
    pub candidates: Vec<SocketAddr>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const RELAYS: [&str; 3] = ["20.0.0.1:9443", "20.0.0.1:9444", "20.0.0.2:9443"];

    /// What one socket and several fresh ones find out: how each is seen at each relay, and whether an answer of another
    /// port came.
    fn profile(main: [u16; 3], fresh: &[(u16, u16)], other_port: bool) -> NatProfile {
        let mut observations = Observations::default();
        for (to, seen) in RELAYS.into_iter().zip(main) {
            observe(&mut observations, 5000, to, seen);
        }
        for (local, seen) in fresh {
            observe(&mut observations, *local, RELAYS[0], *seen);
        }
        observations.answered(Unsolicited::OtherPort, other_port);
        observations.profile()
    }

    fn observe(observations: &mut Observations, local: u16, to: &str, seen: u16) {
        observations.mapped(local, to.parse().unwrap(), ([9, 9, 9, 9], seen).into());
    }

    fn allocation(main: [u16; 3], fresh: &[(u16, u16)]) -> Option<Allocation> {
        profile(main, fresh, false).allocation
    }

    #[test]
    fn nothing_is_known_without_observations_and_little_with_one() {
        assert_eq!(Observations::default().profile(), NatProfile::default());
        let mut observations = Observations::default();
        observe(&mut observations, 5000, RELAYS[0], 7000);
        assert_eq!(observations.profile(), NatProfile::default());
        observations.answered(Unsolicited::OtherAddress, false);
        assert_eq!(observations.profile(), NatProfile::default(), "by its address or by its port?");
        observe(&mut observations, 5000, RELAYS[0], 7001);
        assert_eq!(observations.profile().mapping, None, "one destination, though it was given up and found again");
    }

    #[test]
    fn mappings_are_told_apart_by_two_relays_of_which_one_has_two_ports() {
        let mapping = |main| profile(main, &[], false).mapping;
        assert_eq!(mapping([7000, 7000, 7000]), Some(Mapping::EndpointIndependent));
        assert_eq!(mapping([7000, 7000, 7003]), Some(Mapping::HostDependent));
        assert_eq!(mapping([7000, 7003, 7009]), Some(Mapping::PortDependent));
    }

    #[test]
    fn with_fewer_relays_what_is_for_certain_is_said() {
        let seen = |all: &[(&str, u16)]| {
            let mut observations = Observations::default();
            for (to, seen) in all {
                observe(&mut observations, 5000, to, *seen);
            }
            observations.profile().mapping
        };
        let [first, other_port, second] = RELAYS;
        assert_eq!(seen(&[(first, 7000), (other_port, 7000)]), None);
        assert_eq!(seen(&[(first, 7000), (other_port, 7001)]), Some(Mapping::PortDependent));
        assert_eq!(seen(&[(first, 7000), (second, 7000)]), Some(Mapping::EndpointIndependent));
        assert_eq!(seen(&[(first, 7000), (second, 7001)]), Some(Mapping::PortDependent));
        assert_eq!(seen(&[(first, 7000), ("[2001:db8::1]:9443", 7001)]), None, "another family");
    }

    #[test]
    fn a_nat_that_shows_another_address_to_the_next_host_is_hard() {
        let mut observations = Observations::default();
        for (to, ip) in [(RELAYS[0], [9, 9, 9, 9]), (RELAYS[2], [9, 9, 9, 8])] {
            observations.mapped(5000, to.parse().unwrap(), (ip, 7000).into());
        }
        assert!(observations.profile().is_hard());
    }

    #[test]
    fn filtering_follows_from_whose_answers_come() {
        let filtering = |answers: &[(Unsolicited, bool)]| {
            let mut observations = Observations::default();
            answers.iter().for_each(|(from, came)| observations.answered(*from, *came));
            observations.profile().filtering
        };
        use Unsolicited::{OtherAddress, OtherPort};
        assert_eq!(filtering(&[(OtherPort, false)]), Some(Filtering::PortDependent));
        assert_eq!(filtering(&[(OtherPort, true)]), Some(Filtering::HostDependent), "at least");
        assert_eq!(filtering(&[(OtherPort, true), (OtherAddress, false)]), Some(Filtering::HostDependent));
        assert_eq!(filtering(&[(OtherPort, true), (OtherAddress, true)]), Some(Filtering::EndpointIndependent));
        assert_eq!(filtering(&[(OtherAddress, true)]), Some(Filtering::EndpointIndependent));
        assert_eq!(filtering(&[(OtherPort, true), (OtherPort, false)]), Some(Filtering::HostDependent), "one was lost");
    }

    #[test]
    fn allocations_are_told_apart_by_new_mappings() {
        use Allocation::{Contiguous, Preserving, Random};
        assert_eq!(allocation([5000; 3], &[]), Some(Preserving));
        assert_eq!(allocation([7000; 3], &[(5001, 5001), (5002, 5002)]), Some(Preserving), "one was taken");
        assert_eq!(allocation([7000; 3], &[(5001, 7001), (5002, 7002)]), Some(Contiguous(1)));
        assert_eq!(allocation([7000; 3], &[(5001, 6998), (5002, 6996)]), Some(Contiguous(-2)));
        assert_eq!(allocation([7000, 7001, 7002], &[]), Some(Contiguous(1)), "by its mappings alone");
        assert_eq!(allocation([7000; 3], &[(5001, 7001)]), Some(Contiguous(1)), "two that are very near");
        assert_eq!(allocation([7000; 3], &[(5001, 7020)]), Some(Random), "two that are not");
        assert_eq!(allocation([7000, 41_000, 9000], &[]), Some(Random));
        assert_eq!(allocation([7000, 7001, 9000], &[]), Some(Random));
    }

    #[test]
    fn a_contiguous_allocator_may_have_others_to_serve_and_begin_anew() {
        use Allocation::Contiguous;
        assert_eq!(allocation([7000, 7002, 7005], &[(5001, 7009), (5002, 7012)]), Some(Contiguous(1)));
        assert_eq!(allocation([7000, 6996, 6990], &[(5001, 6988), (5002, 6984)]), Some(Contiguous(-2)));
        assert_eq!(allocation([65_534, 65_535, 1024], &[(5001, 1025)]), Some(Contiguous(1)));
        assert_eq!(allocation([7000, 7001, 7400], &[(5001, 7401), (5002, 7402)]), Some(Contiguous(1)), "a burst");
    }

    #[test]
    fn a_hard_nat_that_keeps_the_first_port_is_judged_by_the_others() {
        use Allocation::{Contiguous, Random};
        assert_eq!(allocation([5000, 7000, 7001], &[(5001, 5001), (5002, 5002)]), Some(Contiguous(1)));
        assert_eq!(allocation([5000, 7000, 40_000], &[(5001, 5001), (5002, 5002)]), Some(Random));
        assert_eq!(allocation([5000, 7000, 7000], &[(5001, 5001), (5002, 5002)]), None, "one is not enough");
    }

    #[test]
    fn ports_are_predicted_of_sequential_nats_only_and_stay_ports() {
        let sequential = |step| profile([7000, (7000 + step) as u16, (7000 + 2 * step) as u16], &[], false);
        assert_eq!(sequential(1).predict(7002), [7003, 7004, 7005, 7006, 7007, 7008, 7009, 7010]);
        assert_eq!(sequential(2).predict(65_533)[..3], [65_535, 1025, 1027]);
        assert_eq!(sequential(-1).predict(1025)[..3], [1024, 65_535, 65_534]);
        assert!(profile([7000; 3], &[(5001, 7001), (5002, 7002)], false).predict(7002).is_empty(), "not needed");
        assert!(profile([7000, 9000, 40_000], &[], false).predict(40_000).is_empty());
    }

    #[test]
    fn names_come_back_and_others_are_refused() {
        for mapping in Mapping::ALL {
            assert_eq!(Mapping::from_name(mapping.name().as_bytes()), Some(mapping));
        }
        for filtering in Filtering::ALL {
            assert_eq!(Filtering::from_name(filtering.name().as_bytes()), Some(filtering));
        }
        for allocation in [Allocation::Preserving, Allocation::Contiguous(-3), Allocation::Random] {
            assert_eq!(Allocation::from_name(allocation.name().as_bytes(), allocation.step()), Some(allocation));
        }
        assert_eq!(
            (Mapping::from_name(b"pp"), Filtering::from_name(b""), Allocation::from_name(b"x", None)),
            (None, None, None)
        );
        for step in [None, Some(0), Some(1000), Some(i16::MIN)] {
            assert_eq!(Allocation::from_name(b"pc", step), Some(Allocation::Contiguous(1)), "{step:?}");
        }
    }

    #[test]
    fn the_observations_are_bounded() {
        let mut observations = Observations::default();
        for n in 0..2 * MAX_OBSERVATIONS as u16 {
            observe(&mut observations, 5000 + n, RELAYS[0], 7000 + n);
        }
        assert_eq!(observations.mapped.len(), MAX_OBSERVATIONS);
    }
}
