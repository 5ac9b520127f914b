//! What a run is about: who there is, what goes wrong and when, and who sends what to whom.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::network::{Cut, Event, Is, MS, SECOND, Time, Weather};
use super::peer::{Envelope, endpoint};
use super::quic::KeyId;
use super::world::{World, trace};
use crate::requests::RequestId;
use crate::sim::gate::Kind;
use crate::types::{Candidates, Endpoint};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Theme {
    #[default]
    Calm,
    Loss,
    Restarts,
    LostKeys,
    Relays,
    Moves,
    Pauses,
    Cuts,
    SlowUplinks,
    WrongEndpoints,
    LyingRelays,
    Everything,
}

impl Theme {
    pub(super) const ALL: [Self; 12] = [
        Self::Calm,
        Self::Loss,
        Self::Restarts,
        Self::LostKeys,
        Self::Relays,
        Self::Moves,
        Self::Pauses,
        Self::Cuts,
        Self::SlowUplinks,
        Self::WrongEndpoints,
        Self::LyingRelays,
        Self::Everything,
    ];

    /// Whether all packets arrive, and hosts, NATs and relays stay as they are.
    pub(super) fn is_smooth(self) -> bool {
        matches!(self, Self::Calm | Self::WrongEndpoints | Self::LyingRelays)
    }
}

/// What there is beside nodes and relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum More {
    #[default]
    Nothing,
    /// Requests, and large messages.
    Requests,
    Gateways,
}

pub(super) struct Scenario {
    pub(super) theme: Theme,
    more: More,
    /// Whether attempts with hundreds of sockets and packets are made.
    pub(super) hard: bool,
    /// Nobody of the run.
    pub(super) bystander: IpAddr,
    /// From then on nothing goes wrong.
    pub(super) quiet_at: Time,
    steps: Vec<Step>,
    /// Addresses where the wrong node is, or none.
    wrong: Vec<SocketAddr>,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            theme: Theme::Calm,
            more: More::Nothing,
            hard: false,
            bystander: IpAddr::V4(Ipv4Addr::new(9, 9, 9, 9)),
            quiet_at: 0,
            steps: Vec::new(),
            wrong: Vec::new(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Step {
    Ask {
        from: usize,
        to: usize,
        deadline: Time,
        /// When the caller dies.
        dies: Option<Time>,
    },
    Cancel {
        from: usize,
        starts: u32,
        to: usize,
        number: u32,
    },
    Reply {
        node: usize,
        starts: u32,
        to: KeyId,
        id: RequestId,
    },
    Send {
        from: usize,
        /// The number of a name.
        to: usize,
        deadline: Option<Time>,
        key: bool,
    },
    Found {
        node: usize,
        starts: u32,
        to: usize,
    },
    Stop {
        node: usize,
        keeps_key: bool,
    },
    Start(usize),
    RestartRelay {
        relay: usize,
        keeps_key: bool,
    },
    RestartGateway(usize),
    Move(usize),
    Pause {
        host: usize,
        time: Time,
    },
    Mute {
        host: usize,
        time: Time,
    },
    Deafen {
        host: usize,
        time: Time,
    },
    Cut {
        from: usize,
        to: usize,
        time: Time,
    },
    Weather(Weather),
    Uplink {
        host: usize,
        rate: u64,
    },
    /// A NAT forgets all that it knows.
    Forget(usize),
    Invalidate {
        from: usize,
        to: usize,
    },
}

/// Nodes that only a gateway leads to. The last ones get messages in the quiet end alone.
const BEHIND_GATEWAY: usize = 3;

impl World {
    /// Draws a run of so long.
    pub(super) fn populate(&mut self, theme: Theme, more: More, length: Time) {
        (self.scenario.theme, self.scenario.more) = (theme, more);
        self.scenario.quiet_at = length / 2 - 5 * SECOND;
        self.scenario.hard = self.random.u8(..16) == 0;
        self.weather = Weather { loss: 0, jitter: self.random.u64(0..5) * MS };
        let relays = self.random.usize(1..=3);
        for _ in 0..relays {
            let relay = self.add_relay();
            self.at(SECOND, Event::Relay(relay as u32));
        }
        self.make_nodes(relays);
        if more == More::Gateways {
            let streams = [2, 8, 100][self.random.usize(..3)];
            self.add_gateway(BEHIND_GATEWAY, streams);
        }
        self.make_wrong_endpoints();
        self.make_faults();
        self.make_traffic(length);
    }

    /// Two nodes with a satellite between them that loses packets: a round trip takes 1.5 s.
    pub(super) fn populate_slow(&mut self, length: Time) {
        self.scenario.quiet_at = length;
        let relay = self.add_relay();
        self.at(SECOND, Event::Relay(relay as u32));
        for node in 0..2 {
            self.add_node(Kind::Open, None, vec![relay]);
            let host = self.nodes[node].host;
            self.hosts[host].delay = 750 * MS;
        }
        self.weather = Weather { loss: 30_000, jitter: 50 * MS };
        let mut at = 5 * SECOND;
        while at < length - 20 * SECOND {
            let step = Step::Send { from: 0, to: 1, deadline: None, key: false };
            self.plan(at, step);
            at += self.random.u64(100..3000) * MS;
        }
    }

    fn make_nodes(&mut self, relays: usize) {
        let nodes = self.random.usize(2..=5);
        for _ in 0..nodes {
            let mut at: Vec<usize> = (0..self.random.usize(1..=2)).map(|_| self.random.usize(..relays)).collect();
            at.sort_unstable();
            at.dedup();
            let neighbour = (!self.nodes.is_empty()).then(|| self.random.usize(..self.nodes.len()));
            let shared = neighbour.filter(|node| self.nodes[*node].kind.has_network() && self.random.u8(..6) == 0);
            match shared {
                Some(neighbour) => {
                    let (kind, host) = (self.nodes[neighbour].kind, self.nodes[neighbour].host);
                    let network = self.hosts[host].network;
                    self.add_node(kind, Some(network), at);
                }
                None => {
                    let kind = match self.random.u8(..3) {
                        0 => Kind::Open,
                        _ => Kind::ALL[self.random.usize(..Kind::ALL.len())],
                    };
                    self.add_node(kind, None, at);
                }
            }
        }
    }

    fn make_wrong_endpoints(&mut self) {
        for is in [Is::Closed, Is::Silent] {
            let ip = self.public_ip();
            self.add_host(is, super::network::INTERNET, ip);
            self.scenario.wrong.push(SocketAddr::new(ip, 7000));
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].kind == Kind::Open {
                let address = self.address_of(node);
                self.scenario.wrong.push(address);
            }
        }
        self.scenario.wrong.push(self.relay_address(0));
    }

    fn address_of(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.hosts[self.nodes[node].host].ip, self.nodes[node].port)
    }

    pub(super) fn plan(&mut self, at: Time, step: Step) {
        self.scenario.steps.push(step);
        let step = self.scenario.steps.len() as u32 - 1;
        self.at(at, Event::Step(step));
    }

    fn when(&mut self) -> Time {
        self.random.u64(2 * SECOND..self.scenario.quiet_at)
    }

    fn make_faults(&mut self) {
        use Theme::*;
        let theme = self.scenario.theme;
        let has = |one: Theme| theme == one || theme == Everything;
        let quiet = self.scenario.quiet_at;
        let node = |world: &mut Self| world.random.usize(..world.nodes.len());
        if has(Loss) {
            for _ in 0..4 {
                let (at, loss, jitter) = (self.when(), self.random.u32(..300_000), self.random.u64(..100) * MS);
                self.plan(at, Step::Weather(Weather { loss, jitter }));
            }
        }
        if has(Restarts) || has(LostKeys) {
            for _ in 0..self.random.usize(1..=3) {
                let (at, node, down) = (self.when(), node(self), self.random.u64(..8) * SECOND / 2);
                let keeps_key = theme != LostKeys && (theme == Restarts || self.random.bool());
                self.plan(at, Step::Stop { node, keeps_key });
                self.plan((at + down).min(quiet), Step::Start(node));
            }
        }
        if has(Relays) {
            for _ in 0..self.random.usize(1..=3) {
                let (at, relay) = (self.when(), self.random.usize(..self.relays.len()));
                let host = self.relays[relay].host;
                let time = self.random.u64(..10) * SECOND;
                let step = match self.random.u8(..3) {
                    0 => Step::Pause { host, time: time.min(quiet - at) },
                    n => Step::RestartRelay { relay, keeps_key: n == 1 },
                };
                self.plan(at, step);
            }
        }
        if has(Relays) && !self.gateways.is_empty() {
            let (at, gateway) = (self.when(), self.random.usize(..self.gateways.len()));
            let (host, time) = (self.gateways[gateway].host, self.random.u64(..10) * SECOND);
            let step = match self.random.bool() {
                true => Step::Pause { host, time: time.min(quiet - at) },
                false => Step::RestartGateway(gateway),
            };
            self.plan(at, step);
        }
        if has(Moves) {
            for _ in 0..self.random.usize(1..=3) {
                let (at, node) = (self.when(), node(self));
                let step = if self.random.bool() { Step::Move(node) } else { Step::Forget(node) };
                self.plan(at, step);
            }
        }
        if has(Pauses) {
            for _ in 0..self.random.usize(1..=4) {
                let (at, node) = (self.when(), node(self));
                let (host, time) = (self.nodes[node].host, self.random.u64(1..80) * 100 * MS);
                self.plan(at, Step::Pause { host, time: time.min(quiet - at) });
            }
        }
        if has(Cuts) {
            for _ in 0..self.random.usize(1..=4) {
                let at = self.when();
                let (host, from, to) = (self.random.usize(..self.hosts.len()), node(self), node(self));
                let (from, to) = (self.nodes[from].host, self.nodes[to].host);
                let time = (self.random.u64(1..200) * 100 * MS).min(quiet - at);
                let step = match self.random.u8(..4) {
                    0 => Step::Mute { host, time },
                    1 => Step::Deafen { host, time },
                    _ => Step::Cut { from, to, time },
                };
                self.plan(at, step);
            }
        }
        if has(SlowUplinks) {
            for _ in 0..2 {
                let (at, node) = (self.when(), node(self));
                let (host, rate) = (self.nodes[node].host, self.random.u64(4..60) * 1000);
                self.plan(at, Step::Uplink { host, rate });
                self.plan(quiet, Step::Uplink { host, rate: 0 });
            }
        }
        if theme == LyingRelays {
            let liar = self.random.usize(..self.relays.len());
            self.relays[liar].lies.misleads = self.random.bool();
            self.relays[liar].lies.misnames = !self.relays[liar].lies.misleads || self.random.bool();
        }
        self.plan(quiet, Step::Weather(Weather { loss: 0, jitter: 2 * MS }));
    }

    fn make_traffic(&mut self, length: Time) {
        let mut pairs = Vec::new();
        for _ in 0..self.random.usize(1..=self.nodes.len() + 1) {
            let (from, to) = (self.random.usize(..self.nodes.len()), self.random.usize(..self.nodes.len()));
            if from != to && !pairs.contains(&(from, to)) {
                pairs.push((from, to));
                // Both at once.
                if self.random.u8(..3) == 0 && !pairs.contains(&(to, from)) {
                    pairs.push((to, from));
                }
            }
        }
        for gateway in 0..self.gateways.len() {
            let (own, behind) = (self.gateways[gateway].name, self.gateways[gateway].behind());
            for to in [own, behind.start] {
                let from = self.random.usize(..self.nodes.len());
                pairs.push((from, to));
            }
            for to in behind.skip(1) {
                let from = self.random.usize(..self.nodes.len());
                let step = Step::Send { from, to, deadline: Some(5 * SECOND), key: false };
                let at = length - 9 * SECOND + self.random.u64(..SECOND);
                self.plan(at, step);
            }
        }
        let together = SECOND + self.random.u64(..SECOND);
        for (from, to) in pairs {
            self.plan_send(together, from, to);
            let mut at = together;
            while at < length - 10 * SECOND {
                at += self.random.u64(20..6000) * MS;
                for _ in 0..[1, 1, 1, 2, 12][self.random.usize(..5)] {
                    let later = at + self.random.u64(..20) * MS;
                    self.plan_send(later, from, to);
                }
                if self.random.u8(..60) == 0 && at < self.scenario.quiet_at {
                    self.plan(at, Step::Invalidate { from, to });
                }
            }
            if self.scenario.more == More::Requests && to < self.nodes.len() {
                self.plan_requests(length, from, to);
            }
            // In the quiet end.
            for n in 0..3 {
                let step = Step::Send { from, to, deadline: Some(5 * SECOND), key: false };
                self.plan(length - (9 - 2 * n) * SECOND, step);
            }
        }
    }

    fn plan_requests(&mut self, length: Time, from: usize, to: usize) {
        let mut at = SECOND;
        while at < length - 10 * SECOND {
            at += self.random.u64(20..8000) * MS;
            for _ in 0..[1, 1, 3][self.random.usize(..3)] {
                let deadline = self.random.u64(1..100) * 100 * MS;
                let dies = (self.random.u8(..8) == 0).then(|| self.random.u64(..deadline));
                self.plan(at, Step::Ask { from, to, deadline, dies });
            }
        }
        for n in 0..2 {
            let step = Step::Ask { from, to, deadline: 6 * SECOND, dies: None };
            self.plan(length - (9 - n) * SECOND, step);
        }
    }

    fn plan_send(&mut self, at: Time, from: usize, to: usize) {
        let deadline = (self.random.u8(..4) > 0).then(|| self.random.u64(1..100) * 100 * MS);
        let key = self.random.u8(..16) == 0;
        self.plan(at, Step::Send { from, to, deadline, key });
    }

    pub(super) fn step(&mut self, step: usize) {
        let step = self.scenario.steps[step].clone();
        let now = self.now;
        if !matches!(step, Step::Send { .. } | Step::Ask { .. } | Step::Reply { .. }) {
            trace!(self, "{step:?}");
        }
        match step {
            Step::Ask { from, to, deadline, dies } => self.caller_asks(from, to, deadline, dies),
            Step::Cancel { from, starts, to, number } => {
                if self.nodes[from].up && self.nodes[from].starts == starts {
                    let peer = self.peer(from, to);
                    self.cancel(from, peer, number);
                }
            }
            Step::Reply { node, starts, to, id } => self.reply(node, starts, to, id),
            Step::Send { from, to, deadline, key } => self.caller_sends(from, to, deadline, key),
            Step::Found { node, starts, to } => self.lookup_ends(node, starts, to),
            Step::Stop { node, keeps_key } if self.nodes[node].up => {
                self.stop_node(node);
                if !keeps_key {
                    self.nodes[node].key = self.new_key();
                    self.promises.lost_keys.push(node);
                }
            }
            Step::Start(node) if !self.nodes[node].up => self.start_node(node),
            Step::Stop { .. } | Step::Start(_) => {}
            Step::RestartRelay { relay, keeps_key } => self.restart_relay(relay, keeps_key),
            Step::RestartGateway(gateway) => self.restart_gateway(gateway),
            Step::Move(node) => self.move_node(node),
            Step::Pause { host, time } => self.hosts[host].paused_until = self.hosts[host].paused_until.max(now + time),
            Step::Mute { host, time } => self.hosts[host].mute_until = self.hosts[host].mute_until.max(now + time),
            Step::Deafen { host, time } => self.hosts[host].deaf_until = self.hosts[host].deaf_until.max(now + time),
            Step::Cut { from, to, time } => {
                let from = self.hosts[from].ip;
                self.cuts.push(Cut { from, to, until: now + time });
            }
            Step::Weather(weather) => self.weather = weather,
            Step::Uplink { host, rate } => self.hosts[host].uplink = rate,
            Step::Forget(node) => {
                let network = self.hosts[self.nodes[node].host].network;
                if let Some(gate) = self.uplinks[network] {
                    self.promises.disturbed = now;
                    self.gates[gate].forget();
                }
            }
            Step::Invalidate { from, to } => {
                if let Some(peer) = self.nodes[from].peers.iter().position(|peer| peer.name == to) {
                    self.invalidate(from, peer);
                }
            }
        }
    }

    /// A node of its own network moves to another address there.
    fn move_node(&mut self, node: usize) {
        let host = self.nodes[node].host;
        let network = self.hosts[host].network;
        let ip = self.ip_in(network, self.nodes[node].kind);
        self.move_host(host, ip);
        self.promises.disturbed = self.now;
        if self.nodes[node].up {
            self.interrupt_punches(node);
            self.look_at_nat(node);
        }
    }

    fn is_calling(&self, from: usize) -> bool {
        self.nodes[from].up && self.hosts[self.nodes[from].host].paused_until <= self.now
    }

    /// The peer that a caller names, and how long its link may be silent.
    fn peer_of_caller(&mut self, from: usize, to: usize) -> (usize, Time) {
        let peer = self.peer(from, to);
        let candidates = self.ways_to(to, 0);
        if self.learn_ways(from, peer, candidates) {
            let starts = self.nodes[from].starts;
            let at = self.now + self.random.u64(1..800) * MS;
            self.plan(at, Step::Found { node: from, starts, to });
        }
        (peer, self.patience(from, peer).as_micros() as Time)
    }

    fn caller_asks(&mut self, from: usize, to: usize, deadline: Time, dies: Option<Time>) {
        if !self.is_calling(from) {
            return;
        }
        let (peer, patience) = self.peer_of_caller(from, to);
        let until = self.now + deadline;
        let id = self.new_request(from, to, until, patience);
        trace!(self, "request {id}: node {from} asks node {to}, for {deadline:?}");
        if let Some(dies) = dies {
            let starts = self.nodes[from].starts;
            self.plan(self.now + dies, Step::Cancel { from, starts, to, number: id });
        }
        let envelope = Envelope { id, deadline: Some(self.instant(until)), key: None, large: false };
        self.request(from, peer, envelope);
    }

    fn caller_sends(&mut self, from: usize, to: usize, deadline: Option<Time>, key: bool) {
        if !self.is_calling(from) {
            return;
        }
        // Gateways have no keys that count.
        let key = self.nodes.get(to).filter(|_| key).map(|node| self.keys[node.key]);
        let (peer, patience) = self.peer_of_caller(from, to);
        let until = deadline.map(|deadline| self.now + deadline);
        // Slow uplinks would carry nothing else for long.
        let large =
            self.scenario.more == More::Requests && self.now < self.scenario.quiet_at && self.random.u8(..16) == 0;
        let id = self.new_message(from, to, (key, large), until, patience);
        trace!(self, "message {id}: node {from} sends to node {to}, for {deadline:?}");
        let envelope = Envelope { id, deadline: until.map(|until| self.instant(until)), key, large };
        self.send(from, peer, envelope);
    }

    /// What callers and lookups say. The relays of a node are known; its address may be a wrong one.
    fn ways_to(&mut self, to: usize, lookup: u8) -> Candidates {
        if to >= self.nodes.len() {
            return self.ways_to_gateway(to, lookup);
        }
        let mut relays: Vec<Endpoint> =
            self.nodes[to].relays.iter().map(|relay| endpoint(self.relay_address(*relay))).collect();
        if !self.gateways.is_empty() && self.random.u8(..3) == 0 {
            relays.push(endpoint(self.gateway_address(0)));
        }
        let mut endpoints = Vec::new();
        let wrong = matches!(self.scenario.theme, Theme::WrongEndpoints | Theme::Everything);
        if wrong && self.random.u8(..4) == 0 {
            endpoints.push(self.scenario.wrong[self.random.usize(..self.scenario.wrong.len())]);
        }
        if self.is_public(self.nodes[to].host) && self.random.u8(..3) < lookup + 1 {
            endpoints.push(self.address_of(to));
        }
        Candidates { endpoints: endpoints.into_iter().map(endpoint).collect(), relays, ..Candidates::default() }
    }

    /// A gateway is known by its address. That it leads to others is what lookups know, and some callers.
    fn ways_to_gateway(&mut self, to: usize, lookup: u8) -> Candidates {
        let known = lookup > 0 || self.random.bool();
        let gateway = self.gateway_of(to).filter(|gateway| known && self.gateways[*gateway].name != to);
        let relays = gateway.map(|gateway| endpoint(self.gateway_address(gateway))).into_iter().collect();
        Candidates { relays, ..Candidates::default() }
    }

    fn lookup_ends(&mut self, node: usize, starts: u32, to: usize) {
        if !self.nodes[node].up || self.nodes[node].starts != starts {
            return;
        }
        let peer = self.peer(node, to);
        let candidates = self.ways_to(to, 1);
        self.found_ways(node, peer, candidates, true);
    }
}
