//! The network: hosts behind gates, and packets that are delayed, lost, reordered, queued at slow uplinks or cut off.

use std::cmp::Ordering;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::quic::{ConnId, QuicPacket};
use super::world::World;
use crate::proto::signal::{self, Role};
use crate::punch::Signal;
use crate::sim::gate::{Gate, Kind};

/// Microseconds since the run began.
pub(super) type Time = u64;

pub(super) const MS: Time = 1000;
pub(super) const SECOND: Time = 1000 * MS;

/// The network that all others are behind.
pub(super) const INTERNET: usize = 0;

/// Within one network, and back from a NAT's own address.
const LOCAL_DELAY: Time = MS / 2;

/// What a slow uplink queues before it drops.
const LONGEST_QUEUE: Time = 300 * MS;

pub(super) type HostId = usize;

/// What a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Is {
    Node(usize),
    Relay(usize),
    Gateway(usize),
    /// Refuses every port: ICMP port unreachable.
    Closed,
    /// Swallows what it gets.
    Silent,
}

pub(super) struct Host {
    pub(super) is: Is,
    pub(super) network: usize,
    pub(super) ip: IpAddr,
    /// Of what it sends over the internet.
    pub(super) delay: Time,
    /// Bytes in a second. 0: as many as there are.
    pub(super) uplink: u64,
    uplink_free: Time,
    /// Packets and timers wait until then.
    pub(super) paused_until: Time,
    /// Nothing leaves before this time, nothing comes.
    pub(super) mute_until: Time,
    pub(super) deaf_until: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Host(HostId),
    Gate(usize),
}

#[derive(Debug, Clone)]
pub(super) struct Packet {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) body: Body,
}

#[derive(Debug, Clone)]
pub(super) enum Body {
    Quic(QuicPacket),
    /// Asks a relay where it sees a socket, or is its answer. Only the two can make it.
    Probe(signal::Signal),
    /// Only the two ends of a punch can make it.
    Signal {
        session: u64,
        by: Role,
        signal: Signal,
    },
    /// Nobody listens at this address.
    Unreachable(SocketAddr),
}

impl Body {
    fn len(&self) -> u64 {
        match self {
            Self::Quic(packet) => packet.len(),
            _ => 60,
        }
    }
}

/// What happens at a time.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    Arrive { network: u32, packet: u32 },
    Conn(ConnId),
    Peer { node: u32, peer: u32 },
    Node(u32),
    Relay(u32),
    Step(u32),
}

pub(super) struct Scheduled {
    pub(super) at: Time,
    pub(super) number: u64,
    pub(super) event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest, for a heap.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// A table whose places are used again.
pub(super) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, value: T) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = Some(value);
            return place;
        }
        self.places.push(Some(value));
        self.places.len() as u32 - 1
    }

    pub(super) fn remove(&mut self, place: u32) -> Option<T> {
        let value = self.places.get_mut(place as usize)?.take();
        if value.is_some() {
            self.free.push(place);
        }
        value
    }
}

/// How bad the network is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Weather {
    /// Of a million packets.
    pub(super) loss: u32,
    pub(super) jitter: Time,
}

impl World {
    pub(super) fn at(&mut self, at: Time, event: Event) {
        self.scheduled += 1;
        self.events.push(Scheduled { at: at.max(self.now), number: self.scheduled, event });
    }

    pub(super) fn add_host(&mut self, is: Is, network: usize, ip: IpAddr) -> HostId {
        let delay = self.random.u64(2 * MS..60 * MS);
        let host = self.hosts.len();
        self.owners.insert((network, ip), Owner::Host(host));
        self.hosts.push(Host {
            is,
            network,
            ip,
            delay,
            uplink: 0,
            uplink_free: 0,
            paused_until: 0,
            mute_until: 0,
            deaf_until: 0,
        });
        host
    }

    pub(super) fn public_ip(&mut self) -> IpAddr {
        self.next_ip += 1;
        IpAddr::V4(Ipv4Addr::from(0x1400_0000 + self.next_ip))
    }

    /// The same ones in every network.
    pub(super) fn inner_ip(&self, network: usize, [a, b]: [u8; 2]) -> IpAddr {
        let free = |n: &u8| !self.owners.contains_key(&(network, IpAddr::from([a, b, 0, *n])));
        IpAddr::from([a, b, 0, (2..).find(free).unwrap()])
    }

    /// What is behind a gate of this kind.
    pub(super) fn network(&mut self, kind: Kind) -> usize {
        match kind {
            Kind::Open => INTERNET,
            Kind::CarrierGrade => {
                let ip = self.public_ip();
                let carrier = self.behind(Kind::PortRestricted, INTERNET, Some(ip));
                let ip = self.inner_ip(carrier, [100, 64]);
                self.behind(Kind::PortRestricted, carrier, Some(ip))
            }
            Kind::Firewall | Kind::Blocked => self.behind(kind, INTERNET, None),
            _ => {
                let ip = self.public_ip();
                self.behind(kind, INTERNET, Some(ip))
            }
        }
    }

    /// An address for a host in a network behind a gate of this kind.
    pub(super) fn ip_in(&mut self, network: usize, kind: Kind) -> IpAddr {
        match kind {
            Kind::Open => self.public_ip(),
            // The way to a firewall's node is through it.
            Kind::Firewall | Kind::Blocked => {
                let (ip, gate) = (self.public_ip(), self.uplinks[network].unwrap());
                self.owners.insert((INTERNET, ip), Owner::Gate(gate));
                ip
            }
            _ => self.inner_ip(network, [192, 168]),
        }
    }

    fn behind(&mut self, kind: Kind, outer: usize, ip: Option<IpAddr>) -> usize {
        let (network, gate) = (self.uplinks.len(), self.gates.len());
        self.uplinks.push(Some(gate));
        let mut made = Gate::new(kind, network, outer, ip, &mut self.random);
        made.timeout = self.random.u64(10..=180) * SECOND;
        self.gates.push(made);
        if let Some(ip) = ip {
            self.owners.insert((outer, ip), Owner::Gate(gate));
        }
        network
    }

    /// A host sends a packet by one of its ports.
    pub(super) fn transmit(&mut self, host: HostId, port: u16, to: SocketAddr, body: Body) {
        let from = SocketAddr::new(self.hosts[host].ip, port);
        self.transmit_from(host, from, to, body);
    }

    /// It may have several addresses.
    pub(super) fn transmit_from(&mut self, host: HostId, mut from: SocketAddr, to: SocketAddr, body: Body) {
        self.account(host, to, &body);
        let sender = &mut self.hosts[host];
        if sender.mute_until > self.now {
            return;
        }
        let mut left = self.now;
        if let Some(takes) = (body.len() * SECOND).checked_div(sender.uplink) {
            let free = sender.uplink_free.max(self.now);
            if free > self.now + LONGEST_QUEUE {
                return;
            }
            left = free + takes;
            sender.uplink_free = left;
        }
        let mut network = sender.network;
        loop {
            if self.owners.contains_key(&(network, to.ip())) {
                break;
            }
            // A packet that no gate leads on is lost.
            let Some(gate) = self.uplinks[network] else { return };
            let to_relay = self.relay_ips.contains(&to.ip());
            let gate = &mut self.gates[gate];
            let Some(outside) = gate.out(from, to, to_relay, self.now) else { return };
            (from, network) = (outside, gate.outer);
        }
        self.carry(host, network, left, Packet { from, to, body });
    }

    fn carry(&mut self, sender: HostId, network: usize, left: Time, packet: Packet) {
        let far = network == INTERNET && packet.from.ip() != packet.to.ip();
        let delay = match far {
            true => {
                if self.random.u32(..1_000_000) < self.weather.loss {
                    return;
                }
                self.hosts[sender].delay + self.random.u64(0..=self.weather.jitter)
            }
            false => LOCAL_DELAY,
        };
        let packet = self.packets.insert(packet);
        self.at(left + delay, Event::Arrive { network: network as u32, packet });
    }

    /// A packet has come to the network where its address is.
    pub(super) fn arrive(&mut self, network: usize, packet: Packet) {
        let Packet { from, mut to, body } = packet;
        let mut network = network;
        let host = loop {
            match self.owners.get(&(network, to.ip())) {
                Some(&Owner::Gate(gate)) => {
                    let gate = &mut self.gates[gate];
                    let from_relay = self.relay_ips.contains(&from.ip());
                    let inside = gate.into(from, to, self.now).filter(|_| from_relay || !gate.only_relays);
                    let Some(inside) = inside else { return };
                    (to, network) = (inside, gate.inner);
                }
                Some(&Owner::Host(host)) => break host,
                None => return,
            }
        };
        let receiver = &self.hosts[host];
        if receiver.deaf_until > self.now || self.cuts.iter().any(|cut| cut.cuts(from.ip(), host, self.now)) {
            return;
        }
        if receiver.paused_until > self.now {
            let until = receiver.paused_until;
            let network = network as u32;
            let packet = self.packets.insert(Packet { from, to, body });
            return self.at(until, Event::Arrive { network, packet });
        }
        match receiver.is {
            Is::Node(node) => self.at_node(node, Packet { from, to, body }),
            Is::Relay(relay) => self.at_relay(relay, Packet { from, to, body }),
            Is::Gateway(gateway) => self.at_gateway(gateway, Packet { from, to, body }),
            Is::Closed if !matches!(body, Body::Unreachable(_)) => self.refuse(host, to, from),
            Is::Closed | Is::Silent => {}
        }
    }

    /// Nobody listens at this port.
    pub(super) fn refuse(&mut self, host: HostId, at: SocketAddr, from: SocketAddr) {
        self.earn(host, from);
        self.transmit(host, at.port(), from, Body::Unreachable(at));
    }
}

/// Packets of one address do not reach a host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) from: IpAddr,
    pub(super) to: HostId,
    pub(super) until: Time,
}

impl Cut {
    fn cuts(&self, from: IpAddr, to: HostId, now: Time) -> bool {
        self.until > now && (self.from, self.to) == (from, to)
    }
}
