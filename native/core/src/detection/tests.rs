#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use super::look::{LEAST_PATIENCE, MAX_RELAYS, NEW_SOCKETS};
use super::*;
use crate::nat::{Allocation, Filtering, Mapping};
use crate::proto::control::Probes;
use crate::proto::signal::{AnswerFrom, Body, Key, SECRET_LEN, Secret};

const MAIN_PORT: u16 = 5000;
const OTHER_PORT: u16 = 9444;

/// Where the NAT shows this node.
const OUTSIDE: [u8; 4] = [9, 9, 9, 9];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn secret(n: u8) -> Secret {
    Secret::from([n; SECRET_LEN])
}

fn relay_at(ip: IpAddr, n: u8) -> Probed {
    let probes = Probes { id: n.into(), secret: secret(n), port: OTHER_PORT, ip: None };
    Probed { relay: (ip, 9443).into(), seen_at: (OUTSIDE, MAIN_PORT).into(), probes }
}

fn relay(n: u8) -> Probed {
    relay_at([20, 0, 0, n].into(), n)
}

/// What the NAT in front of the node does.
#[derive(Debug, Clone, Copy)]
enum Nat {
    None,
    /// Each destination gets the next port, and is let in alone.
    Sequential,
    /// The same, but what is let in depends on the address only.
    SequentialOpen,
}

/// A detector in virtual time, with relays that answer after a round trip.
struct Run {
    start: Instant,
    now: Duration,
    detector: Detector,
    relays: Relays,
    registering: bool,
    round_trip: Duration,
    nat: Nat,
    /// Addresses that do not answer.
    deaf: Vec<SocketAddr>,
    /// How many sockets the system opens.
    sockets: usize,
    open: usize,
    mapped: BTreeMap<(u16, SocketAddr), SocketAddr>,
    /// Answers on their way.
    coming: Vec<(Duration, Socket, SocketAddr, Signal)>,
    sent: Vec<(u64, Probe)>,
    /// What else was done, and when.
    done: Vec<(u64, Done)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Begun,
    Opened(usize),
    Closed,
    Returned(SocketAddr),
    Described(NatProfile),
    DescribedNothing,
    ToldAgain,
    Found(Found, bool),
}

impl Run {
    fn new(usual: Vec<Probed>) -> Self {
        Self::with(HolePunching::On, usual)
    }

    fn with(hole_punching: HolePunching, usual: Vec<Probed>) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: Duration::ZERO,
            detector: Detector::new(hole_punching, start),
            relays: Relays { usual, to_check: Vec::new() },
            registering: false,
            round_trip: ms(20),
            nat: Nat::None,
            deaf: Vec::new(),
            sockets: NEW_SOCKETS,
            open: 0,
            mapped: BTreeMap::new(),
            coming: Vec::new(),
            sent: Vec::new(),
            done: Vec::new(),
        }
    }

    fn clock(&self) -> Instant {
        self.start + self.now
    }

    fn ms(&self) -> u64 {
        self.now.as_millis() as u64
    }

    fn look(&mut self) {
        self.detector.wanted(self.registering, self.clock());
        self.follow();
    }

    fn moved(&mut self) {
        self.detector.moved(self.registering, self.clock());
        self.follow();
    }

    fn follow(&mut self) {
        while let Some(action) = self.detector.poll() {
            let clock = self.clock();
            let done = match action {
                Action::Begin => {
                    self.detector.begin(self.relays.clone(), MAIN_PORT, 7, clock);
                    Done::Begun
                }
                Action::Open(count) => {
                    self.open = count.min(self.sockets);
                    let ports: Vec<u16> = (0..self.open as u16).map(|n| MAIN_PORT + 1 + n).collect();
                    self.detector.opened(&ports, clock);
                    Done::Opened(count)
                }
                Action::Send(probe) => {
                    self.answer(&probe);
                    self.sent.push((self.ms(), probe));
                    continue;
                }
                Action::Heard(_) => continue,
                Action::Close => {
                    self.open = 0;
                    Done::Closed
                }
                Action::ReturnToUsual(to) => Done::Returned(to),
                Action::Describe(profile) => Done::Described(profile),
                Action::DescribeNothing => Done::DescribedNothing,
                Action::TellAgain => Done::ToldAgain,
                Action::Found { found, news } => Done::Found(found, news),
            };
            self.done.push((self.ms(), done));
        }
    }

    /// What the relay, and the NAT, make of a question.
    fn answer(&mut self, probe: &Probe) {
        let Body::ProbeRequest { from, to_port } = probe.signal.body else { panic!("{probe:?}") };
        let local = match probe.by {
            Socket::Main => MAIN_PORT,
            Socket::New(n) => MAIN_PORT + 1 + n as u16,
        };
        let next = 7000 + self.mapped.len() as u16;
        let observed = match self.nat {
            Nat::None => (OUTSIDE, local).into(),
            Nat::Sequential | Nat::SequentialOpen => {
                *self.mapped.entry((local, probe.to)).or_insert_with(|| (OUTSIDE, next).into())
            }
        };
        let source = match from {
            AnswerFrom::Same => probe.to,
            AnswerFrom::OtherPort => SocketAddr::new(probe.to.ip(), OTHER_PORT),
            AnswerFrom::OtherAddress => SocketAddr::new([20, 0, 1, probe.signal.id as u8].into(), OTHER_PORT),
        };
        let elsewhere = from != AnswerFrom::Same || to_port.is_some();
        let passes = match self.nat {
            Nat::None => true,
            Nat::SequentialOpen => !elsewhere || source.ip() == probe.to.ip() && to_port.is_none(),
            Nat::Sequential => !elsewhere,
        };
        if self.deaf.contains(&probe.to) || !passes {
            return;
        }
        let by = match to_port.map(NonZeroU16::get) {
            Some(port) => Socket::New(usize::from(port - MAIN_PORT - 1)),
            None => probe.by,
        };
        let answer = Signal { body: Body::ProbeReply { observed }, ..probe.signal };
        self.coming.push((self.now + self.round_trip, by, source, answer));
    }

    /// Until then.
    fn run(&mut self, until: u64) {
        let until = ms(until);
        loop {
            let timeout = self.detector.next_timeout().map(|at| at.saturating_duration_since(self.start));
            let coming = self.coming.iter().map(|(at, ..)| *at).min();
            let Some(next) = timeout.into_iter().chain(coming).min().filter(|next| *next <= until) else { break };
            self.now = self.now.max(next);
            match self.coming.iter().position(|(at, ..)| *at <= self.now) {
                Some(place) => {
                    let (_, by, from, answer) = self.coming.remove(place);
                    self.detector.heard(by, from, answer, self.clock());
                }
                None => self.detector.timeout(self.registering, self.clock()),
            }
            self.follow();
        }
        self.now = until;
    }

    fn times(&self, what: impl Fn(&Done) -> bool) -> Vec<u64> {
        self.done.iter().filter(|(_, done)| what(done)).map(|(at, _)| *at).collect()
    }

    fn begun(&self) -> Vec<u64> {
        self.times(|done| *done == Done::Begun)
    }

    fn found(&self) -> Option<Found> {
        self.done.iter().rev().find_map(|(_, done)| match done {
            Done::Found(found, _) => Some(*found),
            _ => None,
        })
    }

    fn described(&self) -> Vec<NatProfile> {
        let described = self.done.iter().filter_map(|(_, done)| match done {
            Done::Described(profile) => Some(*profile),
            _ => None,
        });
        described.collect()
    }

    /// When each question was sent.
    fn tries(&self) -> Vec<Vec<u64>> {
        let mut tries: Vec<(u64, Vec<u64>)> = Vec::new();
        for (at, probe) in &self.sent {
            match tries.iter_mut().find(|(nonce, _)| *nonce == probe.signal.nonce) {
                Some((_, times)) => times.push(*at),
                None => tries.push((probe.signal.nonce, vec![*at])),
            }
        }
        tries.into_iter().map(|(_, times)| times).collect()
    }

    fn asked_by(&self, by: Socket) -> Vec<SocketAddr> {
        self.sent.iter().filter(|(_, probe)| probe.by == by).map(|(_, probe)| probe.to).collect()
    }
}

fn no_nat() -> NatProfile {
    NatProfile {
        mapping: Some(Mapping::EndpointIndependent),
        filtering: Some(Filtering::EndpointIndependent),
        allocation: Some(Allocation::Preserving),
    }
}

#[test]
fn three_rounds_find_out_that_there_is_no_nat() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.look();
    run.run(1000);
    let found = Found { profile: no_nat(), observed: (OUTSIDE, MAIN_PORT).into() };
    let done = [
        (0, Done::Begun),
        (20, Done::Opened(NEW_SOCKETS)),
        (60, Done::Closed),
        (60, Done::Described(no_nat())),
        (60, Done::Found(found, true)),
    ];
    assert_eq!(run.done, done);
    let [first, other, second, second_other] = [(1, 9443), (1, OTHER_PORT), (2, 9443), (2, OTHER_PORT)]
        .map(|(n, port)| SocketAddr::from(([20, 0, 0, n], port)));
    // For an answer from the second relay to the last socket.
    assert_eq!(run.asked_by(Socket::Main), [first, other, second, second_other, second]);
    assert_eq!(run.asked_by(Socket::New(0)), [first, other, second, second_other]);
    for n in 1..NEW_SOCKETS - 1 {
        assert_eq!(run.asked_by(Socket::New(n)), [first]);
    }
    // For an answer from the other port.
    assert_eq!(run.asked_by(Socket::New(NEW_SOCKETS - 1)), [first, first]);
    let (_, last) = run.sent.last().unwrap();
    let to_port = NonZeroU16::new(MAIN_PORT + NEW_SOCKETS as u16);
    assert_eq!(last.signal.body, Body::ProbeRequest { from: AnswerFrom::Same, to_port });
    assert!(run.tries().iter().all(|tries| tries.len() == 1));
}

#[test]
fn what_is_known_already_is_no_news() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.look();
    run.run(5000);
    run.look();
    run.run(10_000);
    let news = |done: &Done| matches!(done, Done::Found(_, true));
    assert_eq!((run.begun(), run.times(news)), (vec![0, 5000], vec![60]));
    run.nat = Nat::Sequential;
    run.look();
    run.run(15_000);
    assert_eq!(run.times(news).len(), 2);
}

#[test]
fn a_sequential_nat_is_known_by_its_mappings_and_by_what_does_not_come() {
    for (nat, filtering) in
        [(Nat::Sequential, Filtering::PortDependent), (Nat::SequentialOpen, Filtering::HostDependent)]
    {
        let mut run = Run::new(vec![relay(1), relay(2)]);
        run.nat = nat;
        run.look();
        run.run(5000);
        let (mapping, allocation) = (Some(Mapping::PortDependent), Some(Allocation::Contiguous(1)));
        let profile = NatProfile { mapping, filtering: Some(filtering), allocation };
        assert_eq!(run.found().unwrap().profile, profile);
    }
}

#[test]
fn an_unanswered_question_is_sent_three_times_and_others_are_not() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.deaf.push(([20, 0, 0, 1], OTHER_PORT).into());
    run.look();
    run.run(999);
    assert_eq!(run.tries(), [vec![0], vec![0, 250, 500], vec![0], vec![0]]);
    assert_eq!(run.done, [(0, Done::Begun)]);
    run.run(1000);
    assert_eq!(run.done.last(), Some(&(1000, Done::Opened(NEW_SOCKETS))));
    run.run(1500);
    assert_eq!(run.found().unwrap().profile, no_nat(), "by the other relay");
    assert!(!run.asked_by(Socket::New(0)).contains(&run.deaf[0]), "it does not answer");
}

#[test]
fn later_rounds_last_five_round_trips_within_bounds() {
    for (round_trip, patience) in [(10, LEAST_PATIENCE), (100, ms(500)), (400, FIRST_PATIENCE)] {
        let mut run = Run::new(vec![relay(1)]);
        run.nat = Nat::Sequential;
        run.round_trip = ms(round_trip);
        run.look();
        run.run(10_000);
        // An answer from the other port is filtered.
        let (closed, begun) = (run.times(|done| *done == Done::Closed)[0], 2 * round_trip);
        assert_eq!(u128::from(closed - begun), patience.as_millis());
        let patience = patience.as_millis() as u64;
        assert_eq!(run.tries().last().unwrap(), &[begun, begun + patience / 4, begun + patience / 2]);
    }
}

#[test]
fn an_answer_that_is_late_counts_for_nothing() {
    let mut run = Run::new(vec![relay(1)]);
    run.round_trip = ms(1001);
    run.look();
    run.run(1001);
    assert_eq!(run.described(), [NatProfile::default()]);
    run.run(3000);
    assert_eq!(run.found(), None);
    assert_eq!(run.begun(), [0]);
}

#[test]
fn an_answer_to_an_earlier_round_counts_for_nothing() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.deaf.push(([20, 0, 0, 2], 9443).into());
    run.deaf.push(([20, 0, 0, 2], OTHER_PORT).into());
    run.look();
    run.run(1010);
    let (_, late) = run.sent.iter().find(|(_, probe)| probe.to == run.deaf[0]).unwrap();
    let observed = (OUTSIDE, 60_000).into();
    let signal = Signal { body: Body::ProbeReply { observed }, ..late.signal };
    run.detector.heard(Socket::Main, late.to, signal, run.clock());
    assert!(run.detector.poll().is_none());
    run.run(2000);
    assert_eq!(run.found().unwrap().profile.mapping, None, "one relay cannot tell");
}

#[test]
fn only_the_answer_that_was_asked_for_counts() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.deaf.extend([1, 2].map(|n| SocketAddr::from(([20, 0, 0, n], 9443))));
    run.look();
    let (clock, asked) = (run.clock(), run.sent[0].1.clone());
    let answer =
        |observed: [u8; 4]| Signal { body: Body::ProbeReply { observed: (observed, 1).into() }, ..asked.signal };
    let (right, stranger) = (answer(OUTSIDE), ([6, 6, 6, 6], 9443).into());
    let wrong = [
        (Socket::New(0), asked.to, right),
        (Socket::Main, stranger, right),
        (Socket::Main, run.sent[2].1.to, right),
        (Socket::Main, asked.to, Signal { nonce: right.nonce ^ 1, ..right }),
        (Socket::Main, asked.to, Signal { id: 2, ..right }),
        (Socket::Main, asked.to, asked.signal),
    ];
    for (by, from, signal) in wrong {
        run.detector.heard(by, from, signal, clock);
        assert!(run.detector.poll().is_none(), "{by:?} {from} {signal:?}");
    }
    run.detector.heard(Socket::Main, asked.to, right, clock);
    assert!(matches!(run.detector.poll(), Some(Action::Heard(to)) if to == asked.to));
    // The first one counts.
    run.detector.heard(Socket::Main, asked.to, answer([6, 6, 6, 6]), clock);
    run.run(3000);
    assert_eq!(run.found().unwrap().observed, (OUTSIDE, 1).into());
}

#[test]
fn an_answer_that_another_key_has_signed_counts_for_nothing() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.deaf.push(([20, 0, 0, 1], 9443).into());
    run.look();
    let (clock, asked) = (run.clock(), run.sent[0].1.clone());
    let answer = Signal { body: Body::ProbeReply { observed: (OUTSIDE, 1).into() }, ..asked.signal };
    let [right, wrong] = [1, 2].map(|n| answer.encode(&Key::from(&secret(n))));
    let mut changed = right.to_vec();
    changed[20] ^= 1;
    for bytes in [&wrong[..], &changed, &right[1..], &[]] {
        run.detector.received(Socket::Main, asked.to, bytes, clock);
        assert!(run.detector.poll().is_none(), "{bytes:?}");
    }
    run.detector.received(Socket::Main, asked.to, &right, clock);
    assert!(matches!(run.detector.poll(), Some(Action::Heard(to)) if to == asked.to));
}

#[test]
fn a_question_is_signed_with_the_key_of_its_relay() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.look();
    for (_, probe) in &run.sent {
        let encoded = probe.encode();
        let n = probe.signal.id as u8;
        let request = crate::proto::signal::Unverified::parse(&encoded).unwrap();
        assert_eq!(request.verify(&Key::from(&secret(n))), Some(probe.signal));
        assert_eq!(probe.to.ip(), IpAddr::from([20, 0, 0, n]));
    }
}

#[test]
fn main_hears_answers_only_while_it_has_asked() {
    let mut run = Run::new(vec![relay(1)]);
    run.nat = Nat::Sequential;
    assert!(!run.detector.is_heard_by_main());
    run.look();
    assert!(run.detector.is_heard_by_main());
    run.run(20);
    assert!(!run.detector.is_heard_by_main(), "the new sockets ask");
    run.run(3000);
    assert!(!run.detector.is_heard_by_main());
}

#[test]
fn relays_of_one_family_are_asked_and_v4_goes_first() {
    let v6 = |n: u8| relay_at([0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()].into(), n);
    let mut run = Run::new(vec![v6(1), relay(2), v6(3)]);
    run.look();
    assert!(run.sent.iter().all(|(_, probe)| probe.to.ip() == IpAddr::from([20, 0, 0, 2])));
    let mut run = Run::new(vec![v6(1), v6(3)]);
    run.look();
    assert_eq!(run.asked_by(Socket::Main).len(), 4);
}

#[test]
fn a_second_address_of_a_relay_is_asked_if_it_is_of_the_same_family() {
    let second = |ip: IpAddr| {
        let mut relay = relay(1);
        relay.probes.ip = Some(ip);
        relay
    };
    let mut run = Run::new(vec![second([20, 0, 1, 1].into())]);
    run.look();
    run.run(1000);
    assert_eq!(run.found().unwrap().profile, no_nat(), "it tells as much as a second relay");
    assert!(run.sent.iter().any(|(_, probe)| probe.at == At::OtherAddress));
    for ip in [IpAddr::from([20, 0, 0, 1]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])] {
        let mut run = Run::new(vec![second(ip)]);
        run.look();
        assert!(run.sent.iter().all(|(_, probe)| probe.at != At::OtherAddress), "{ip}");
    }
}

#[test]
fn the_relays_that_tell_the_most_are_asked_in_the_same_order_each_time() {
    let beside = |n: u8, port: u16| {
        let mut relay = relay(n);
        relay.relay.set_port(port);
        relay
    };
    let all = vec![relay(4), beside(1, 9500), relay(3), relay(1), beside(3, 9500), relay(2)];
    let chosen = choose(all.clone());
    assert_eq!(chosen, [relay(1), relay(2), relay(3)]);
    assert_eq!(choose(all.into_iter().rev().collect()), chosen);
    assert_eq!(choose(vec![relay(2), beside(1, 9500), relay(1)]), [relay(1), relay(2), beside(1, 9500)]);
}

#[test]
fn a_relay_that_sees_another_address_is_not_asked_to_answer_there() {
    let mut elsewhere = relay(2);
    elsewhere.seen_at.set_ip([9, 9, 9, 8].into());
    let mut run = Run::new(vec![relay(1), elsewhere]);
    run.look();
    run.run(1000);
    assert_eq!(run.asked_by(Socket::Main).len(), 4, "in the first round");
    assert_eq!(run.found().unwrap().profile.filtering, Some(Filtering::HostDependent));
}

#[test]
fn relays_that_do_not_answer_are_asked_again_ever_more_rarely() {
    let mut run = Run::new(vec![relay(1)]);
    run.deaf.extend([9443, OTHER_PORT].map(|port| SocketAddr::from(([20, 0, 0, 1], port))));
    run.look();
    run.run(3600 * 1000);
    let begun = run.begun();
    let pauses: Vec<u64> = begun.windows(2).map(|two| (two[1] - two[0]) / 1000).collect();
    // Each after a look of 1 s and a pause of 2 s.
    assert_eq!(pauses[..8], [13, 23, 43, 83, 163, 323, 603, 603]);
    assert!(run.described().iter().all(|profile| *profile == NatProfile::default()));
    assert_eq!(
        run.times(|done| matches!(done, Done::Opened(_))),
        [] as [u64; 0],
        "the system opens no sockets for that"
    );
    let (deaf, now) = (std::mem::take(&mut run.deaf), run.ms());
    run.look();
    run.run(now + 3000);
    assert!(run.found().is_some());
    run.deaf = deaf;
    run.look();
    run.run(now + 3600 * 1000);
    let last = &run.begun()[begun.len() + 1..];
    assert_eq!(last[1] - last[0], 13_000, "from the beginning");
}

#[test]
fn a_relay_that_answers_only_at_another_port_tells_nothing() {
    let mut run = Run::new(vec![relay(1)]);
    run.deaf.push(([20, 0, 0, 1], 9443).into());
    run.look();
    run.run(1500);
    assert_eq!((run.found(), run.described()), (None, vec![NatProfile::default()]));
}

#[test]
fn where_the_system_opens_too_few_sockets_nothing_is_known() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.sockets = NEW_SOCKETS - 1;
    run.look();
    run.run(100);
    let done = [
        (0, Done::Begun),
        (20, Done::Opened(NEW_SOCKETS)),
        (20, Done::Closed),
        (20, Done::Described(NatProfile::default())),
    ];
    assert_eq!(run.done, done);
    run.sockets = NEW_SOCKETS;
    run.run(13_000);
    assert_eq!(run.found().unwrap().profile, no_nat(), "it tries again");
}

#[test]
fn a_look_waits_for_relays_that_are_about_to_register_the_node() {
    let mut run = Run::new(vec![relay(1)]);
    run.registering = true;
    run.look();
    run.run(499);
    assert_eq!(run.begun(), [] as [u64; 0]);
    run.run(500);
    assert_eq!(run.begun(), [500], "no longer");

    let mut run = Run::new(vec![relay(1)]);
    run.registering = true;
    run.look();
    run.run(100);
    run.look();
    run.run(200);
    run.registering = false;
    run.look();
    assert_eq!(run.begun(), [200], "all have answered");
}

#[test]
fn what_is_wanted_during_a_look_follows_once_after_a_pause() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    run.look();
    run.run(30);
    run.look();
    run.look();
    run.run(1000);
    run.look();
    run.run(20_000);
    assert_eq!(run.begun(), [0, 2060]);
}

#[test]
fn others_can_cause_a_look_and_a_packet_to_the_relays_only_so_often() {
    let mut run = Run::new(vec![relay(1), relay(2)]);
    for second in 0..600 {
        run.run(second * 1000);
        run.moved();
    }
    let told = run.times(|done| *done == Done::ToldAgain);
    assert_eq!(told[..8], [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]);
    for times in [run.begun(), told] {
        let seconds = |from: u64, to: u64| times.iter().filter(|at| (from..to).contains(&(**at / 1000))).count();
        assert!((8..=12).contains(&seconds(0, 60)), "{times:?}");
        assert!((18..=21).contains(&seconds(300, 600)), "{times:?}");
    }
}

#[test]
fn a_node_that_has_moved_tells_its_relays_and_looks() {
    let mut run = Run::new(vec![relay(1)]);
    run.moved();
    assert_eq!(run.done, [(0, Done::ToldAgain), (0, Done::Begun)]);
}

#[test]
fn a_node_that_looks_for_no_direct_paths_asks_nothing() {
    let mut run = Run::with(HolePunching::Off, vec![relay(2), relay(1)]);
    for at in [0, 5000] {
        run.run(at);
        run.look();
    }
    run.run(60_000);
    let found = Found { profile: NatProfile::default(), observed: relay(1).seen_at };
    let done = [
        (0, Done::Begun),
        (0, Done::DescribedNothing),
        (0, Done::Found(found, true)),
        (5000, Done::Begun),
        (5000, Done::Found(found, false)),
    ];
    assert_eq!(run.done, done);
    assert!(run.sent.is_empty());
}

#[test]
fn where_no_relay_can_be_asked_the_others_need_not_wait() {
    let mut run = Run::new(Vec::new());
    for at in [0, 5000] {
        run.run(at);
        run.look();
    }
    run.run(60_000);
    assert_eq!(run.described(), [NatProfile::default()], "once");
    assert_eq!((run.begun(), run.found()), (vec![0, 5000], None));
}

#[test]
fn relays_that_answer_the_usual_port_again_are_sent_to_from_there() {
    let mut run = Run::new(vec![relay(3)]);
    run.relays.to_check = vec![relay(1), relay(2)];
    run.deaf.push(relay(2).relay);
    run.look();
    run.run(999);
    assert_eq!(run.asked_by(Socket::Main), [relay(1), relay(2), relay(2), relay(2)].map(|relay| relay.relay));
    run.run(1000);
    let done = [(0, Done::Begun), (1000, Done::Returned(relay(1).relay)), (1000, Done::ToldAgain)];
    assert_eq!(run.done, done);
    run.run(2000);
    assert!(run.found().is_some(), "then it looks what the others see");

    let mut run = Run::new(Vec::new());
    run.relays.to_check = vec![relay(1)];
    run.deaf.push(relay(1).relay);
    run.look();
    run.run(2000);
    assert_eq!(run.done, [(0, Done::Begun), (1000, Done::Described(NatProfile::default()))]);
}

#[test]
fn what_is_asked_is_bounded() {
    let many = |from: u8| (from..from + 100).map(relay).collect();
    let mut run = Run::new(many(101));
    run.relays.to_check = many(1);
    run.look();
    assert_eq!(run.sent.len(), MAX_CHECKED);
    run.run(20);
    assert_eq!(run.sent.len(), MAX_CHECKED + 2 * MAX_RELAYS);
}

#[test]
fn a_sample_tells_where_a_new_socket_is_seen() {
    let start = Instant::now();
    let mut round = Round::sample(relay(1), 7, start);
    let mut asked = Vec::new();
    for at in (0..=500).step_by(5) {
        match round.poll(start + ms(at)) {
            Turn::Ask(probes) => asked.push((at, probes[0].clone())),
            Turn::Wait(until) => assert!(until > start + ms(at)),
            Turn::Over => assert_eq!(at, 500),
        }
    }
    assert_eq!(asked.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 125, 250]);
    assert_eq!(round.sampled(), None);
    let (_, probe) = &asked[0];
    assert_eq!((probe.by, probe.to), (Socket::New(0), relay(1).relay));
    let observed = (OUTSIDE, 7001).into();
    let answer = Signal { body: Body::ProbeReply { observed }, ..probe.signal };
    assert_eq!(round.received(Socket::New(0), probe.to, &answer.encode(&Key::from(&secret(2))), start), None);
    let bytes = answer.encode(&Key::from(&secret(1)));
    assert_eq!(round.received(Socket::New(0), probe.to, &bytes, start), Some(probe.to));
    assert!(matches!(round.poll(start), Turn::Over));
    assert_eq!(round.sampled(), Some(observed));
}

#[test]
fn the_hosts_addresses_are_those_of_the_socket_and_mean_the_same_to_others() {
    let ips: [IpAddr; 8] =
        ["192.168.0.7", "fd00::7", "127.0.0.1", "::1", "169.254.0.7", "fe80::7", "10.0.0.7", "192.168.0.7"]
            .map(|ip| ip.parse().unwrap());
    let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), MAIN_PORT);
    let all = [at("10.0.0.7"), at("192.168.0.7"), at("fd00::7")];
    assert_eq!(local_addresses(ips.to_vec(), at("::"), |_| true), all);
    assert_eq!(local_addresses(ips.to_vec(), at("0.0.0.0"), |to| to.is_ipv4()), all[..2]);
    assert_eq!(local_addresses(ips.to_vec(), at("::ffff:10.0.0.7"), |_| true), all[..1]);
    let many = (0..100).map(|n| IpAddr::from([10, 0, 0, n]));
    assert_eq!(local_addresses(many.collect(), at("::"), |_| true).len(), MAX_LOCAL);
}

#[test]
fn other_nodes_are_told_few_addresses_and_only_local_ones() {
    let at = |a: u8, n: u8| SocketAddr::from(([a, 0, 0, n], MAIN_PORT));
    assert_eq!(candidates(vec![at(20, 1), at(10, 1)]), [at(10, 1)]);
    assert_eq!(candidates((0..100).map(|n| at(10, n)).collect()).len(), MAX_CANDIDATES);
}
