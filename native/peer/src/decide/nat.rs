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

impl Mapping {
    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndpointIndependent => "ei",
            Self::HostDependent => "hd",
            Self::PortDependent => "pd",
        }
    }

    pub(crate) fn from_name(name: &[u8]) -> Option<Self> {
        [Self::EndpointIndependent, Self::HostDependent, Self::PortDependent]
            .into_iter()
            .find(|known| known.name().as_bytes() == name)
    }
}

impl Filtering {
    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndpointIndependent => "ei",
            Self::HostDependent => "hd",
            Self::PortDependent => "pd",
        }
    }

    pub(crate) fn from_name(name: &[u8]) -> Option<Self> {
        [Self::EndpointIndependent, Self::HostDependent, Self::PortDependent]
            .into_iter()
            .find(|known| known.name().as_bytes() == name)
    }
}

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
    pub(crate) fn step(self) -> Option<i16> {
        match self {
            Self::Contiguous(step) => Some(step),
            Self::Preserving | Self::Random => None,
        }
    }

    /// A contiguous one of which no step is said, or none that can be, has one of 1.
    pub(crate) fn from_name(name: &[u8], step: Option<i16>) -> Option<Self> {
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
    pub(crate) fn is_hard(&self) -> bool {
        matches!(self.mapping, Some(Mapping::HostDependent | Mapping::PortDependent))
    }

    /// As `is_hard`, and the next ports can be told from the last one.
    pub(crate) fn is_sequential(&self) -> bool {
        self.is_hard() && matches!(self.allocation, Some(Allocation::Contiguous(_)))
    }

    /// The ports that the next new mappings get, the likeliest first, if the last one got `last`. None, if the NAT is not
    /// sequential.
    pub(crate) fn predict(&self, last: u16) -> Vec<u16> {
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
pub(crate) enum Unsolicited {
    /// From a port that the socket has never sent to, of an address that it has sent to.
    OtherPort,
    /// From an address that the socket has never sent to.
    OtherAddress,
}

/// What probes of relays have shown. Those of one address family: what is behind the other tells nothing of this one.
#[derive(Debug, Default)]
pub(crate) struct Observations {
    /// In the order in which the probes left.
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
    /// which the probes left.
    pub(crate) fn mapped(&mut self, local_port: u16, to: SocketAddr, seen: SocketAddr) {
        let first = self.mapped.first().is_none_or(|first| first.to.is_ipv4() == to.is_ipv4());
        if first && self.mapped.len() < MAX_OBSERVATIONS {
            self.mapped.push(Mapped { local_port, to, seen });
        }
    }

    /// Whether an answer that was asked for from elsewhere came through. One of several is enough.
    pub(crate) fn answered(&mut self, from: Unsolicited, came: bool) {
        let known = match from {
            Unsolicited::OtherPort => &mut self.other_port,
            Unsolicited::OtherAddress => &mut self.other_address,
        };
        *known = Some(came || known.unwrap_or(false));
    }

    /// What follows from all of that.
    pub(crate) fn profile(&self) -> NatProfile {
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
        let ports: Vec<i32> = new.iter().filter(|one| !preserved(*one)).map(|one| i32::from(one.seen.port())).collect();
        let steps: Vec<i16> = ports.windows(2).map(|pair| step(pair[0], pair[1])).collect();
        let most = if steps.len() > 1 { NEAR } else { VERY_NEAR };
        if steps.is_empty() {
            return None;
        }
        for direction in [1, -1] {
            let fits = |step: &&i16| step.signum() == direction && near(**step, most);
            let fitting = steps.iter().filter(fits);
            // One may be out of line where there are enough others: somebody behind the same NAT took many.
            if fitting.clone().count() + usize::from(steps.len() >= 4) >= steps.len()
                && let Some(least) = fitting.min_by_key(|step| step.unsigned_abs())
            {
                return Some(Allocation::Contiguous(*least));
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

fn near(step: i16, most: i32) -> bool {
    step != 0 && i32::from(step).abs() <= most
}
