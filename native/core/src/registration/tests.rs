#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use fastrand::Rng;

use super::*;
use crate::admission::KICKED_FOR;
use crate::errors::ConnectError;

const IDLE: Duration = Duration::from_secs(60);
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(45);
const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4433);

fn id(name: &str) -> Id {
    Id::new(name.as_bytes().to_vec()).unwrap()
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn standing(name: &str) -> Wants {
    Wants { standing: Some(id(name)), ..Wants::default() }
}

/// What happens in the simulation.
#[derive(Debug, Clone)]
enum Event {
    /// The dial or request of this number reaches the relay.
    Arrives(usize, u64),
    /// It has had no answer for too long.
    Expires(usize, u64),
    /// The connection of this number shows no life.
    Silent(usize, u64),
    /// And has shown none for so long that it is given up.
    Dead(usize, u64),
    Heard(usize, u64),
    Lost(usize, u64, CircuitError),
    Fault(Fault),
    /// So many callers wait for a circuit.
    Callers(usize),
}

#[derive(Debug, Clone)]
enum Fault {
    /// The relay restarts, and is away for this long. It closes its connections, or dies without a word.
    Restart {
        away: Duration,
        closes: bool,
    },
    /// No packet passes for this long.
    Cut(Duration),
    Kick,
    Refuse(Duration, Refusal),
    /// A second node with this node's key begins, and ends after this long.
    Twin(Duration),
    /// The end of one of the above.
    Mend(Mend),
}

#[derive(Debug, Clone)]
enum Mend {
    Up,
    Reachable,
    Accepts,
    TwinEnds,
}

struct Node {
    machine: Registrant,
    /// Dials and requests that are under way, at most one.
    pending: Option<u64>,
    dials: Vec<Duration>,
    /// The connection that the registration uses.
    registered: Option<u64>,
    suspect: bool,
    heard: u64,
    usable: bool,
    /// Whether the last report was that it is registered.
    reported: bool,
    ended: bool,
}

impl Node {
    fn new(now: Instant) -> Self {
        Self {
            machine: Registrant::new(id("own"), IDLE, now),
            pending: None,
            dials: Vec::new(),
            registered: None,
            suspect: false,
            heard: 0,
            usable: false,
            reported: false,
            ended: false,
        }
    }
}

/// A relay, a node, and at times a second one with the same key.
struct World {
    start: Instant,
    now: Instant,
    rng: Rng,
    numbers: u64,
    queue: BTreeMap<(Instant, u64), Event>,
    nodes: Vec<Node>,
    up: bool,
    reachable: bool,
    refuses: Option<Refusal>,
    kicked_until: Instant,
    /// The relay's book: which node, over which connection.
    book: Option<(usize, u64)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: start,
            rng: Rng::with_seed(seed),
            numbers: 0,
            queue: BTreeMap::new(),
            nodes: vec![Node::new(start)],
            up: true,
            reachable: true,
            refuses: None,
            kicked_until: start,
            book: None,
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn after(&mut self, delay: Duration, event: Event) {
        let number = self.number();
        self.queue.insert((self.now + delay, number), event);
    }

    fn want(&mut self, node: usize, wants: Wants) {
        self.nodes[node].machine.want(wants, self.now);
        self.carry_out(node);
    }

    fn run_until(&mut self, end: Instant) {
        loop {
            let event = self.queue.first_key_value().map(|((at, _), _)| *at);
            let timers = self.nodes.iter().filter(|node| !node.ended).map(|node| node.machine.next_timeout());
            let next = timers.flatten().chain(event).min().filter(|next| *next <= end);
            let Some(next) = next else { break };
            self.now = self.now.max(next);
            if event == Some(next) {
                let ((_, _), event) = self.queue.pop_first().unwrap();
                self.happen(event);
            }
            for node in 0..self.nodes.len() {
                if !self.nodes[node].ended {
                    self.nodes[node].machine.timeout(self.now);
                    self.carry_out(node);
                }
            }
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        let (now, draw) = (self.now, self.rng.f64());
        match event {
            Event::Arrives(at, number) if self.nodes[at].pending == Some(number) => self.arrives(at, number),
            Event::Expires(at, number) if self.nodes[at].pending == Some(number) => {
                self.nodes[at].pending = None;
                self.settle(at, Err(CircuitError::Relay(ConnectError::TimedOut)));
            }
            Event::Silent(at, connection) if self.is_cut(at, connection) => {
                let node = &mut self.nodes[at];
                node.suspect = true;
                node.machine.suspected(node.heard);
            }
            Event::Heard(at, connection) if self.lives(at, connection) => {
                let node = &mut self.nodes[at];
                node.heard += 1;
                node.suspect = false;
                node.machine.cleared();
            }
            Event::Dead(at, connection) if self.is_cut(at, connection) => {
                self.nodes[at].machine.lost(CircuitError::RelayLost, draw, now);
            }
            Event::Lost(at, connection, error) if self.nodes[at].registered == Some(connection) => {
                self.nodes[at].machine.lost(error, draw, now);
            }
            Event::Callers(waiting) => {
                let wants = Wants { waiting, ..standing("name") };
                self.nodes[0].machine.want(wants, now);
            }
            Event::Fault(fault) => self.fault(fault),
            _ => {}
        }
        for node in 0..self.nodes.len() {
            self.carry_out(node);
        }
    }

    /// Whether the relay answers over the connection that a node is registered over.
    fn lives(&self, at: usize, connection: u64) -> bool {
        self.nodes[at].registered == Some(connection) && self.reachable && self.book == Some((at, connection))
    }

    fn is_cut(&self, at: usize, connection: u64) -> bool {
        self.nodes[at].registered == Some(connection) && !self.lives(at, connection)
    }

    /// A dial or a request reaches the relay, if there is one.
    fn arrives(&mut self, at: usize, number: u64) {
        if !self.reachable {
            return;
        }
        self.nodes[at].pending = None;
        if !self.up {
            return self.settle(at, Err(CircuitError::Relay(ConnectError::Unreachable)));
        }
        self.settle(at, Ok(number));
    }

    fn settle(&mut self, at: usize, result: Result<u64, CircuitError>) {
        let (now, draw) = (self.now, self.rng.f64());
        let asks = matches!(self.nodes[at].machine.mode, Mode::Asking(_));
        let node = &mut self.nodes[at];
        match result {
            Ok(number) if asks => {
                let answer = self.register(at, number);
                self.nodes[at].machine.answered(answer, draw, now);
            }
            Err(_) if asks => node.machine.answered(Err(CircuitError::RelayLost), draw, now),
            result => node.machine.dialled(result.map(drop), node.heard, draw, now),
        }
    }

    fn register(&mut self, at: usize, connection: u64) -> Result<SocketAddr, CircuitError> {
        if self.now < self.kicked_until {
            return Err(CircuitError::Refused(Refusal::Kicked));
        }
        if let Some(refusal) = self.refuses {
            return Err(CircuitError::Refused(refusal));
        }
        if let Some((before, old)) = self.book.replace((at, connection)) {
            self.after(ms(20), Event::Lost(before, old, CircuitError::Refused(Refusal::TakenOver)));
        }
        self.nodes[at].registered = Some(connection);
        self.nodes[at].suspect = false;
        Ok(ADDRESS)
    }

    fn carry_out(&mut self, at: usize) {
        while let Some(action) = self.nodes[at].machine.poll() {
            assert!(!self.nodes[at].ended, "{action:?} after the end");
            match action {
                Action::Dial | Action::Register(_) => self.reach(at, action),
                Action::StopDial => self.nodes[at].pending = None,
                Action::Leave | Action::LeaveGently => {
                    let connection = self.nodes[at].registered.take().expect("it is registered");
                    if self.book == Some((at, connection)) && self.up && self.reachable {
                        self.book = None;
                    }
                }
                Action::Use => self.nodes[at].usable = true,
                Action::Hold | Action::Fail(_) => self.nodes[at].usable = false,
                Action::Report(report) => self.report(at, &report),
                Action::End => self.nodes[at].ended = true,
            }
        }
    }

    fn reach(&mut self, at: usize, action: Action) {
        let (number, delay) = (self.number(), ms(self.rng.u64(10..60)));
        let elapsed = self.now - self.start;
        let node = &mut self.nodes[at];
        assert_eq!(node.pending.replace(number), None, "one at a time");
        if action == Action::Dial {
            node.dials.push(elapsed);
        } else {
            assert_eq!(node.registered, None, "never two registrations");
        }
        self.after(delay, Event::Arrives(at, number));
        self.after(DIAL_TIMEOUT, Event::Expires(at, number));
    }

    fn report(&mut self, at: usize, report: &RelayEvent) {
        let before = self.nodes[at].reported;
        let after = match report {
            RelayEvent::Registered { .. } => {
                assert!(!before, "registered twice");
                true
            }
            RelayEvent::Lost | RelayEvent::Ended => {
                assert!(before, "{report:?} without a registration");
                false
            }
            RelayEvent::Refused(_) => false,
            RelayEvent::Disputed | RelayEvent::Moved { .. } | RelayEvent::Dropped { .. } => before,
        };
        self.nodes[at].reported = after;
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Restart { away, closes } => {
                self.up = false;
                if let Some((at, connection)) = self.book.take() {
                    if closes && self.reachable {
                        self.after(ms(10), Event::Lost(at, connection, CircuitError::RelayLost));
                    } else {
                        self.silence(at, connection);
                    }
                }
                self.after(away, Event::Fault(Fault::Mend(Mend::Up)));
            }
            Fault::Cut(time) => {
                self.reachable = false;
                for at in 0..self.nodes.len() {
                    if let Some(connection) = self.nodes[at].registered {
                        self.silence(at, connection);
                    }
                }
                self.after(time, Event::Fault(Fault::Mend(Mend::Reachable)));
            }
            Fault::Kick => {
                if let Some((at, connection)) = self.book.take() {
                    self.kicked_until = self.now + KICKED_FOR;
                    self.after(ms(10), Event::Lost(at, connection, CircuitError::Refused(Refusal::Kicked)));
                }
            }
            Fault::Refuse(time, refusal) => {
                self.refuses = Some(refusal);
                self.after(time, Event::Fault(Fault::Mend(Mend::Accepts)));
            }
            Fault::Twin(time) => {
                if self.nodes.len() == 1 {
                    self.nodes.push(Node::new(self.now));
                    self.want(1, standing("name"));
                    self.after(time, Event::Fault(Fault::Mend(Mend::TwinEnds)));
                }
            }
            Fault::Mend(mend) => self.mend(&mend),
        }
    }

    fn silence(&mut self, at: usize, connection: u64) {
        let noticed = ms(self.rng.u64(500..2500));
        self.after(noticed, Event::Silent(at, connection));
        self.after(CONNECTION_TIMEOUT, Event::Dead(at, connection));
    }

    fn mend(&mut self, mend: &Mend) {
        match mend {
            Mend::Up => self.up = true,
            Mend::Accepts => self.refuses = None,
            Mend::TwinEnds => self.nodes[1].machine.stop(),
            Mend::Reachable => {
                self.reachable = true;
                for at in 0..self.nodes.len() {
                    if let Some(connection) = self.nodes[at].registered {
                        // A connection that the relay has forgotten or replaced ends by what it is told, or by silence.
                        self.after(ms(100), Event::Heard(at, connection));
                        self.after(CONNECTION_TIMEOUT, Event::Dead(at, connection));
                    }
                }
            }
        }
    }

    fn assert_registered(&self, seed: u64) {
        let node = &self.nodes[0];
        let book = node.registered.map(|connection| (0, connection));
        assert!(node.registered.is_some() && node.usable && self.book == book, "SEED={seed}: {:?}", node.machine);
        assert!(matches!(node.machine.state().0, RegistrationState::Registered { .. }), "SEED={seed}");
    }
}

fn a_fault(rng: &mut Rng, twin: bool) -> Fault {
    let time = ms(rng.u64(100..20_000));
    match rng.u8(0..if twin { 6 } else { 5 }) {
        0 => Fault::Restart { away: time / 4, closes: true },
        1 => Fault::Restart { away: time / 4, closes: false },
        2 => Fault::Cut(time),
        3 => Fault::Kick,
        4 => Fault::Refuse(time, Refusal::Registrations),
        _ => Fault::Twin(time * 10),
    }
}

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..count,
    }
}

/// Faults in random order, also several at once, and callers that come and go.
fn faults(seed: u64, twin: bool) -> World {
    let mut world = World::new(seed);
    world.want(0, standing("name"));
    let (mut at, mut last) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..world.rng.u32(1..10) {
        at += ms(world.rng.u64(0..40_000));
        let fault = a_fault(&mut world.rng, twin);
        last = last.max(match &fault {
            Fault::Restart { away, .. } => at + *away,
            Fault::Cut(time) | Fault::Refuse(time, _) | Fault::Twin(time) => at + *time,
            Fault::Kick => at + KICKED_FOR,
            Fault::Mend(_) => at,
        });
        world.after(at, Event::Fault(fault));
        let waiting = world.rng.usize(0..3);
        let late = ms(world.rng.u64(0..5000));
        world.after(at + late, Event::Callers(waiting));
    }
    let end = world.start + last.max(at + secs(5));
    world.run_until(end);
    world
}

#[test]
fn a_node_is_registered_again_within_a_minute_after_the_last_fault() {
    for seed in seeds(3000) {
        let mut world = faults(seed, false);
        // A node that was kicked waits for up to a minute. Then come the dial and the request.
        world.run_until(world.now + secs(60) + 2 * DIAL_TIMEOUT);
        world.assert_registered(seed);
    }
}

#[test]
fn a_node_has_its_name_back_within_six_minutes_after_a_second_one_with_its_key_has_ended() {
    for seed in seeds(1000) {
        let mut world = faults(seed, true);
        world.run_until(world.now + secs(360));
        world.assert_registered(seed);
        assert!(world.nodes.iter().skip(1).all(|twin| twin.ended && twin.registered.is_none()), "SEED={seed}");
    }
}

#[test]
fn dials_are_few_whatever_happens() {
    for seed in seeds(1000) {
        let world = faults(seed, true);
        for node in &world.nodes {
            let most = node.dials.iter().map(|begun| {
                let later = node.dials.iter().filter(|dial| **dial >= *begun && **dial < *begun + secs(60));
                later.count()
            });
            // While callers wait, or beside a silent connection: pauses of half a second to a second, after a few short ones.
            assert!(most.max().unwrap_or(0) <= 100, "SEED={seed}");
        }
    }
}

#[test]
fn a_relay_that_stays_away_is_dialled_ever_more_rarely() {
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.up = false;
        world.want(0, standing("name"));
        world.run_until(world.start + secs(3600));
        let dials = &world.nodes[0].dials;
        let pauses: Vec<_> = dials.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for (n, pause) in pauses.iter().enumerate() {
            let whole = (ms(100) * (1 << n.min(10))).min(secs(10));
            assert!(*pause >= whole / 2 && *pause <= whole + ms(60), "SEED={seed}: pause {n} of {pause:?}");
        }
        assert!(dials.len() <= 8 + 3600 / 5, "SEED={seed}");
        world.up = true;
        world.run_until(world.now + secs(11));
        world.assert_registered(seed);
    }
}

#[test]
fn a_relay_that_refuses_is_not_asked_again_at_once_even_if_callers_wait() {
    let mut world = World::new(1);
    world.refuses = Some(Refusal::Registrations);
    world.want(0, standing("name"));
    for n in 0..60 {
        world.after(secs(n), Event::Callers(n as usize % 3));
    }
    world.run_until(world.start + secs(60));
    let dials = &world.nodes[0].dials;
    assert!(dials.len() >= 6 && dials.windows(2).all(|pair| pair[1] - pair[0] >= secs(5)), "{dials:?}");
}

#[test]
fn a_node_that_was_kicked_comes_back_when_it_may() {
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.want(0, standing("name"));
        world.after(secs(5), Event::Fault(Fault::Kick));
        world.run_until(world.start + secs(90));
        world.assert_registered(seed);
        let dials = &world.nodes[0].dials;
        assert!(dials.len() == 2 && dials[1] >= secs(5) + KICKED_FOR, "SEED={seed}: {dials:?}");
    }
}

#[test]
fn a_registration_that_lasted_is_made_again_after_the_first_pause() {
    let mut world = World::new(1);
    world.want(0, standing("name"));
    for _ in 1..20 {
        world.after(secs(10), Event::Fault(Fault::Restart { away: ms(1), closes: true }));
        world.run_until(world.now + secs(10) + ms(300));
        world.assert_registered(1);
    }
    assert_eq!(world.nodes[0].dials.len(), 20);
}

#[test]
fn callers_shorten_the_pause_to_a_second() {
    let mut world = World::new(1);
    world.up = false;
    world.want(0, standing("name"));
    world.run_until(world.start + secs(60));
    let begun = |world: &World| *world.nodes[0].dials.last().unwrap();
    let before = begun(&world);
    // The next dial fails too, so callers wait from its beginning on.
    world.want(0, Wants { waiting: 1, ..standing("name") });
    world.run_until(world.now + ms(1100));
    assert!(begun(&world) > before);
    let before = begun(&world);
    world.up = true;
    world.run_until(world.now + ms(1200));
    world.assert_registered(1);
    let pause = begun(&world) - before;
    assert!(pause >= secs(1) && pause <= ms(1060), "{pause:?}");
}

#[test]
fn callers_that_come_early_in_a_pause_wait_for_the_rest_of_a_second() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    for _ in 0..7 {
        machine.dialled(Err(CircuitError::NotARelay), 0, 1.0, now);
        machine.timeout(now + secs(10));
    }
    machine.dialled(Err(CircuitError::NotARelay), 0, 1.0, now);
    assert_eq!(machine.next_timeout(), Some(now + secs(10)));
    machine.want(Wants { waiting: 1, ..standing("name") }, now + ms(400));
    assert_eq!(machine.next_timeout(), Some(now + LONGEST_PAUSE_WANTED));
}

#[test]
fn a_node_that_is_wanted_no_longer_stops_dialling() {
    let mut world = World::new(1);
    world.up = false;
    world.want(0, Wants { waiting: 1, ..Wants::default() });
    world.run_until(world.start + secs(10));
    world.want(0, Wants::default());
    let dials = world.nodes[0].dials.len();
    world.run_until(world.now + secs(10) + IDLE);
    assert!(world.nodes[0].ended && world.nodes[0].dials.len() <= dials + 1);
}

#[test]
fn a_refused_registration_is_not_reported_as_lost_too() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    machine.dialled(Ok(()), 0, 0.5, now);
    machine.answered(Ok(ADDRESS), 0.5, now);
    while machine.poll().is_some() {}
    machine.lost(CircuitError::Refused(Refusal::Kicked), 0.5, now);
    let reports = std::iter::from_fn(|| machine.poll()).filter(|action| matches!(action, Action::Report(_)));
    assert_eq!(reports.collect::<Vec<_>>(), [Action::Report(RelayEvent::Refused(Refusal::Kicked))]);
}

#[test]
fn a_registration_on_demand_ends_when_it_is_not_used() {
    let mut world = World::new(1);
    world.want(0, Wants { waiting: 1, ..Wants::default() });
    world.run_until(world.start + secs(1));
    world.assert_registered(1);
    world.want(0, Wants { circuits: 1, ..Wants::default() });
    world.run_until(world.now + 2 * IDLE);
    world.assert_registered(1);
    world.want(0, Wants::default());
    world.run_until(world.now + IDLE - ms(1));
    world.assert_registered(1);
    world.run_until(world.now + ms(1));
    assert!(world.nodes[0].ended && world.book.is_none());
}

#[test]
fn a_node_that_needs_no_registration_does_not_dial() {
    let mut world = World::new(1);
    world.want(0, Wants { circuits: 1, ..Wants::default() });
    world.run_until(world.start + IDLE);
    assert!(world.nodes[0].ended && world.nodes[0].dials.is_empty());
}

#[test]
fn a_registration_follows_the_standing_name() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    let actions = |machine: &mut Registrant| std::iter::from_fn(|| machine.poll()).collect::<Vec<_>>();
    machine.want(Wants { waiting: 1, ..Wants::default() }, now);
    machine.dialled(Ok(()), 0, 0.5, now);
    assert_eq!(actions(&mut machine), [Action::Dial, Action::Register(id("own"))]);
    // Named while the relay is asked.
    machine.want(standing("first"), now);
    machine.answered(Ok(ADDRESS), 0.5, now);
    assert!(actions(&mut machine).ends_with(&[Action::Leave, Action::Report(RelayEvent::Ended), Action::Dial]));
    machine.dialled(Ok(()), 0, 0.5, now);
    machine.answered(Ok(ADDRESS), 0.5, now);
    assert_eq!(actions(&mut machine)[0], Action::Register(id("first")));
    machine.want(standing("second"), now);
    machine.dialled(Ok(()), 0, 0.5, now);
    assert_eq!(actions(&mut machine).last(), Some(&Action::Register(id("second"))));
}

#[test]
fn a_relay_that_was_silent_for_a_moment_is_kept() {
    let mut world = World::new(1);
    world.want(0, standing("name"));
    world.run_until(world.start + secs(1));
    let connection = world.nodes[0].registered;
    world.fault(Fault::Cut(secs(3)));
    world.run_until(world.now + ms(2900));
    assert!(!world.nodes[0].usable && world.nodes[0].dials.len() > 1, "another connection is tried meanwhile");
    world.run_until(world.now + secs(60));
    world.assert_registered(1);
    assert_eq!(world.nodes[0].registered, connection);
}

#[test]
fn callers_that_wait_for_a_silent_relay_are_told_why_each_dial_fails() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    machine.dialled(Ok(()), 0, 0.5, now);
    machine.answered(Ok(ADDRESS), 0.5, now);
    while machine.poll().is_some() {}
    machine.suspected(7);
    assert_eq!([machine.poll(), machine.poll()], [Some(Action::Hold), Some(Action::Dial)]);
    let error = CircuitError::Relay(ConnectError::TimedOut);
    machine.dialled(Err(error.clone()), 7, 1.0, now);
    assert_eq!(machine.poll(), Some(Action::Fail(error)));
    assert_eq!(machine.next_timeout(), Some(now + FIRST_PAUSE_SILENT));
    machine.timeout(now + FIRST_PAUSE_SILENT);
    assert_eq!(machine.poll(), Some(Action::Dial));
    // Heard meanwhile: the new connection is not used, whatever came of it.
    machine.dialled(Ok(()), 8, 1.0, now + secs(1));
    assert_eq!((machine.poll(), machine.next_timeout()), (None, None));
    machine.cleared();
    assert_eq!([machine.poll(), machine.poll()], [Some(Action::StopDial), Some(Action::Use)]);
}

#[test]
fn a_refusal_is_reported_once_and_a_second_takeover_is_a_dispute() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    let (mut refused, mut disputed) = (0, 0);
    machine.want(standing("name"), now);
    for _ in 0..4 {
        machine.dialled(Ok(()), 0, 0.5, now);
        machine.answered(Err(CircuitError::Refused(Refusal::TakenOver)), 0.5, now);
        while let Some(action) = machine.poll() {
            refused += u32::from(action == Action::Report(RelayEvent::Refused(Refusal::TakenOver)));
            disputed += u32::from(action == Action::Report(RelayEvent::Disputed));
        }
        machine.timeout(machine.next_timeout().unwrap());
    }
    assert_eq!((refused, disputed), (1, 1));
}

/// A connection whose relay answers as long as `answers` says, looked at as the watch asks.
fn watched(answers: impl Fn(Duration) -> bool, keep_alive: Duration, time: Duration) -> Vec<(Duration, bool)> {
    let start = Instant::now();
    let (mut watch, mut liveness) = (Watch::new(Counted::default(), start), Liveness::new(start));
    let (mut counted, mut changes, mut asks_at) = (Counted::default(), vec![(Duration::ZERO, false)], keep_alive);
    loop {
        let now = watch.look_at() - start;
        if now > time {
            return changes;
        }
        while asks_at <= now {
            counted.asked += 1;
            counted.heard += u64::from(answers(asks_at));
            // QUIC repeats what is not acknowledged.
            asks_at += if answers(asks_at) { keep_alive } else { ms(200) };
        }
        let look = watch.look(&mut liveness, counted, ms(20), start + now);
        if look.suspect != changes[changes.len() - 1].1 {
            changes.push((now, look.suspect));
        }
    }
}

#[test]
fn an_idle_relay_that_dies_is_suspect_soon_after_its_next_keep_alive() {
    let changes = watched(|at| at < secs(40), secs(15), secs(120));
    let (at, suspect) = changes[1];
    assert!(suspect && at > secs(45) && at < secs(45) + 2 * LOOK_QUIET_EVERY, "{changes:?}");
    assert_eq!(changes.len(), 2);
}

#[test]
fn a_relay_that_answers_is_never_suspect() {
    assert_eq!(watched(|_| true, secs(15), secs(600)).len(), 1);
    assert_eq!(watched(|_| true, ms(50), secs(60)).len(), 1);
}

#[test]
fn a_relay_that_sleeps_most_of_the_time_is_suspected_a_few_times_and_not_each_time() {
    let changes = watched(|at| at.as_millis() % 1000 < 50, ms(50), secs(60));
    let suspected = changes.iter().filter(|(_, suspect)| *suspect).count();
    assert!((1..=6).contains(&suspected), "{changes:?}");
}

#[test]
fn a_busy_relay_that_dies_is_suspect_within_a_second() {
    let changes = watched(|at| at < secs(40), ms(50), secs(60));
    let (at, suspect) = changes[1];
    assert!(suspect && at >= secs(40) + SILENCE && at < secs(41), "{changes:?}");
}

#[test]
fn a_distant_relay_may_take_two_round_trips() {
    let start = Instant::now();
    let (mut watch, mut liveness) = (Watch::new(Counted::default(), start), Liveness::new(start));
    let asked = Counted { asked: 1, heard: 0 };
    let mut suspect_at = None;
    for n in 0..50 {
        let now = start + ms(100 * n);
        if watch.look(&mut liveness, asked, secs(1), now).suspect {
            suspect_at.get_or_insert(100 * n);
        }
    }
    assert_eq!(suspect_at, Some(2000));
}

/// A node that is registered under its standing name.
fn registered(now: Instant) -> Registrant {
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    machine.dialled(Ok(()), 0, 0.5, now);
    machine.answered(Ok(ADDRESS), 0.5, now);
    actions(&mut machine);
    machine
}

fn actions(machine: &mut Registrant) -> Vec<Action> {
    std::iter::from_fn(|| machine.poll()).collect()
}

#[test]
fn a_relay_that_is_not_used_is_dropped_after_the_idle_time_whatever_circuits_come_and_go() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    assert_eq!((machine.next_timeout(), machine.state()), (Some(now + IDLE), (&RegistrationState::Unused, now)));
    machine.want(Wants { circuits: 1, ..Wants::default() }, now + secs(1));
    assert_eq!(machine.next_timeout(), Some(now + IDLE), "a circuit that exists needs no registration");
    machine.timeout(now + IDLE - ms(1));
    assert_eq!(actions(&mut machine), []);
    machine.timeout(now + IDLE);
    assert_eq!((actions(&mut machine), machine.next_timeout()), (vec![Action::End], None));
}

#[test]
fn the_state_tells_since_when_it_is_what_it_is() {
    let start = Instant::now();
    let at = |s| start + secs(s);
    let mut machine = Registrant::new(id("own"), IDLE, start);
    machine.want(standing("name"), at(1));
    assert_eq!(machine.state(), (&RegistrationState::Connecting, at(1)));
    let error = CircuitError::NotARelay;
    machine.dialled(Err(error.clone()), 0, 1.0, at(2));
    assert_eq!(machine.state(), (&RegistrationState::Down(error.clone()), at(2)));
    machine.timeout(at(3));
    assert_eq!(machine.state(), (&RegistrationState::Down(error.clone()), at(2)), "until it is known to be up");
    machine.dialled(Err(error.clone()), 0, 1.0, at(4));
    assert_eq!(machine.state(), (&RegistrationState::Down(error), at(2)), "no news");
    machine.timeout(at(5));
    machine.dialled(Ok(()), 0, 1.0, at(6));
    machine.answered(Ok(ADDRESS), 1.0, at(7));
    assert_eq!(machine.state(), (&RegistrationState::Registered { address: ADDRESS }, at(7)));
}

#[test]
fn a_registered_node_that_stops_leaves_gently_and_ends_once() {
    let mut machine = registered(Instant::now());
    machine.stop();
    let ended = Action::Report(RelayEvent::Ended);
    assert_eq!(actions(&mut machine), [Action::StopDial, Action::Hold, Action::LeaveGently, ended, Action::End]);
    machine.stop();
    assert_eq!(actions(&mut machine), []);
}

#[test]
fn a_node_that_stops_while_it_dials_has_no_registration_to_leave() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    machine.stop();
    assert_eq!(actions(&mut machine), [Action::Dial, Action::End]);
}

#[test]
fn a_new_address_is_reported_once_and_only_of_a_registered_node() {
    let now = Instant::now();
    let moved = SocketAddr::from(([10, 0, 0, 1], 1));
    let mut machine = registered(now);
    machine.moved(ADDRESS, now + secs(1));
    assert_eq!(actions(&mut machine), [], "it is the same");
    machine.moved(moved, now + secs(2));
    assert_eq!(actions(&mut machine), [Action::Report(RelayEvent::Moved { address: moved })]);
    assert_eq!(machine.state(), (&RegistrationState::Registered { address: moved }, now + secs(2)));
    machine.lost(CircuitError::RelayLost, 0.5, now + secs(3));
    actions(&mut machine);
    machine.moved(ADDRESS, now + secs(4));
    assert_eq!(actions(&mut machine), []);
    assert_eq!(machine.state().0, &RegistrationState::Down(CircuitError::RelayLost));
}

#[test]
fn a_lost_registration_is_reported_and_made_again() {
    let now = Instant::now();
    let mut machine = registered(now);
    machine.lost(CircuitError::RelayLost, 1.0, now + secs(2));
    let lost = Action::Report(RelayEvent::Lost);
    let failed = Action::Fail(CircuitError::RelayLost);
    assert_eq!(actions(&mut machine), [Action::StopDial, Action::Hold, Action::Leave, lost, failed]);
    machine.timeout(machine.next_timeout().unwrap());
    assert_eq!(actions(&mut machine), [Action::Dial]);
}

#[test]
fn a_pause_is_shortened_by_callers_alone_and_not_where_the_relay_refuses() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(standing("name"), now);
    for _ in 0..8 {
        machine.timeout(machine.next_timeout().unwrap_or(now));
        machine.dialled(Err(CircuitError::NotARelay), 0, 1.0, now);
    }
    machine.want(standing("other"), now);
    machine.want(Wants { circuits: 1, ..standing("other") }, now);
    assert_eq!(machine.next_timeout(), Some(now + secs(10)), "no caller waits");
    machine.timeout(now + secs(10));
    machine.dialled(Err(CircuitError::Refused(Refusal::Registrations)), 0, 1.0, now);
    machine.want(Wants { waiting: 1, ..standing("other") }, now);
    assert_eq!(machine.next_timeout(), Some(now + secs(10)));
}

#[test]
fn callers_that_wait_keep_the_pauses_below_a_second() {
    let now = Instant::now();
    let mut machine = Registrant::new(id("own"), IDLE, now);
    machine.want(Wants { waiting: 1, ..Wants::default() }, now);
    for _ in 0..8 {
        machine.timeout(machine.next_timeout().unwrap_or(now));
        machine.dialled(Err(CircuitError::NotARelay), 0, 1.0, now);
    }
    assert_eq!(machine.next_timeout(), Some(now + LONGEST_PAUSE_WANTED));
}

#[test]
fn a_registration_is_idle_from_the_answer_on_where_its_callers_have_gone() {
    let now = Instant::now();
    for (wants, idle_at) in [
        (Wants::default(), Some(now + IDLE)),
        (Wants { circuits: 1, ..Wants::default() }, None),
        (Wants { waiting: 1, ..Wants::default() }, None),
    ] {
        let mut machine = Registrant::new(id("own"), IDLE, now - secs(5));
        machine.want(Wants { waiting: 2, ..Wants::default() }, now - secs(5));
        machine.dialled(Ok(()), 0, 0.5, now - secs(1));
        machine.want(wants.clone(), now - secs(1));
        machine.answered(Ok(ADDRESS), 0.5, now);
        assert_eq!(machine.next_timeout(), idle_at, "{wants:?}");
    }
}

#[test]
fn a_registration_is_idle_from_when_nothing_uses_it() {
    let now = Instant::now();
    let mut machine = registered(now);
    let waiting = Wants { waiting: 1, ..Wants::default() };
    let circuits = |circuits| Wants { circuits, ..Wants::default() };
    for (wants, used) in [(waiting, true), (circuits(1), true), (circuits(0), false), (circuits(2), true)] {
        machine.want(wants.clone(), now + secs(1));
        assert_eq!(machine.next_timeout(), (!used).then_some(now + secs(1) + IDLE), "{wants:?}");
    }
}

#[test]
fn a_dial_beside_a_silent_connection_does_not_end_a_registration_that_is_idle() {
    let now = Instant::now();
    let mut machine = registered(now);
    machine.want(Wants::default(), now);
    machine.suspected(0);
    machine.dialled(Err(CircuitError::NotARelay), 0, 1.0, now);
    actions(&mut machine);
    assert_eq!(machine.next_timeout(), Some(now + FIRST_PAUSE_SILENT));
    machine.timeout(now + FIRST_PAUSE_SILENT);
    assert_eq!(actions(&mut machine), [Action::Dial]);
    machine.timeout(now + IDLE);
    assert!(actions(&mut machine).ends_with(&[Action::End]));
}

#[test]
fn a_relay_that_answers_another_connection_while_it_is_silent_gets_a_new_registration() {
    let now = Instant::now();
    let mut machine = registered(now);
    machine.suspected(7);
    machine.suspected(8);
    assert_eq!(actions(&mut machine), [Action::Hold, Action::Dial], "one dial");
    machine.dialled(Ok(()), 7, 1.0, now + secs(1));
    let lost = Action::Report(RelayEvent::Lost);
    let register = Action::Register(id("name"));
    assert_eq!(actions(&mut machine), [Action::StopDial, Action::Hold, Action::Leave, lost, register]);
    assert_eq!(machine.state(), (&RegistrationState::Connecting, now + secs(1)));
    machine.cleared();
    assert_eq!(actions(&mut machine), [], "the old connection is gone");
}

#[test]
fn a_relay_that_is_not_suspect_cannot_be_cleared() {
    let mut machine = registered(Instant::now());
    machine.cleared();
    assert_eq!(actions(&mut machine), []);
}

#[test]
fn a_relay_that_is_asked_is_looked_at_soon_and_a_quiet_one_rarely() {
    let start = Instant::now();
    let (mut watch, mut liveness) = (Watch::new(Counted::default(), start), Liveness::new(start));
    assert_eq!(watch.look_at(), start + LOOK_QUIET_EVERY);
    watch.asked(start);
    assert_eq!(watch.look_at(), start + LOOK_EVERY);
    watch.asked(start + secs(1));
    assert_eq!(watch.look_at(), start + LOOK_EVERY, "no later than before");
    let (now, round_trip) = (start + LOOK_EVERY, ms(100));
    let asked = Counted { asked: 1, heard: 0 };
    let look = watch.look(&mut liveness, asked, round_trip, now);
    assert_eq!((look, watch.look_at()), (Look { quiet: false, pad: false, suspect: false }, now + LOOK_EVERY));
    let look = watch.look(&mut liveness, asked, round_trip, now + ms(200));
    assert_eq!(look, Look { quiet: false, pad: true, suspect: false }, "the answer is late");
    let now = now + ms(300);
    let answered = Counted { asked: 1, heard: 1 };
    watch.look(&mut liveness, answered, round_trip, now);
    let look = watch.look(&mut liveness, answered, round_trip, now + SILENCE);
    assert_eq!(look, Look { quiet: true, pad: false, suspect: false });
    assert_eq!(watch.look_at(), now + SILENCE + LOOK_QUIET_EVERY);
}
