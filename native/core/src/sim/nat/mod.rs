//! NATs and firewalls of every kind in virtual time: what a node finds out about its NAT, what a relay tells it, and what the
//! two sides of a punch send is the real code; the network is not. Packets are delayed, reordered and lost. A failing seed
//! is printed, and `SEED=n` runs it alone. Whole nodes are in [`super::nodes`].
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use self::world::{Ended, World};
use super::gate::Kind;
use crate::nat::{Allocation, Filtering, Mapping, NatProfile};
use crate::proto::control::PunchFailure;

mod world;

/// Of each pair of kinds.
const SEEDS: u64 = 200;

const SECOND: u64 = 1_000_000;

/// When nodes have found out what NAT they are behind.
const READY: u64 = 4 * SECOND;

fn seeds(all: u64) -> Range<u64> {
    let alone: Option<u64> = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    alone.map_or(0..all, |seed| seed..seed + 1)
}

/// What is promised of a pair of kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Promise {
    Always,
    /// Nine times of ten.
    Mostly,
    /// No strategy, which is said at once.
    Hopeless,
    /// Tried in vain.
    Never,
}

fn promise(one: Kind, other: Kind) -> Promise {
    use Kind::*;
    match (one, other) {
        (Blocked, _) | (_, Blocked) => Promise::Never,
        (SymmetricRandom, SymmetricRandom | SymmetricSequential) | (SymmetricSequential, SymmetricRandom) => {
            Promise::Hopeless
        }
        (SymmetricSequential, SymmetricSequential) => Promise::Mostly,
        (SymmetricRandom | SymmetricSequential, PortRestricted | Firewall | CarrierGrade) => Promise::Mostly,
        (PortRestricted | Firewall | CarrierGrade, SymmetricRandom | SymmetricSequential) => Promise::Mostly,
        _ => Promise::Always,
    }
}

#[test]
fn every_pair_of_kinds_meets_directly_if_it_can() {
    for one in Kind::ALL {
        for other in Kind::ALL {
            let promise = promise(one, other);
            let (mut direct, mut all) = (0, 0);
            for seed in seeds(SEEDS) {
                // Not the same luck for every pair.
                let mut world = World::new(seed * 100 + one as u64 * 10 + other as u64, 2);
                let [a, b] = [one, other].map(|kind| world.node(kind, &[0, 1]));
                world.attempt_at(READY, a, b);
                world.run(READY + 6 * SECOND);
                world.check(|| format!("SEED={seed} {one:?} to {other:?}"));
                let attempts = world.attempts(a);
                assert_eq!(attempts.len(), 1, "SEED={seed} {one:?} to {other:?}");
                let (ended, took) = attempts[0];
                let said = match ended {
                    Ended::Direct => world.connected_with(a, b) == [true, true],
                    Ended::Failed(failure) => (failure == PunchFailure::BothHard) == (promise == Promise::Hopeless),
                    Ended::Refused(_) => false,
                };
                assert!(said, "SEED={seed} {one:?} to {other:?}: {ended:?} after {took} us");
                // Until both begin, and the session's time.
                assert!(took < 4 * SECOND, "SEED={seed} {one:?} to {other:?}: {ended:?} after {took} us");
                direct += u64::from(ended == Ended::Direct);
                all += 1;
                if promise == Promise::Always {
                    assert_eq!(ended, Ended::Direct, "SEED={seed} {one:?} to {other:?}");
                }
                if promise == Promise::Hopeless {
                    assert!(took < 3 * SECOND, "SEED={seed} {one:?} to {other:?}: said after {took} us");
                }
            }
            let share = direct as f64 / all as f64;
            match promise {
                Promise::Always => assert_eq!(direct, all),
                Promise::Mostly => assert!(all == 1 || share >= 0.9, "{one:?} to {other:?}: {share}"),
                Promise::Hopeless | Promise::Never => assert_eq!(direct, 0, "{one:?} to {other:?}"),
            }
        }
    }
}

#[test]
fn a_node_finds_out_what_nat_it_is_behind() {
    use Filtering as F;
    use Mapping as M;
    for kind in Kind::ALL {
        // With one relay nobody can tell a mapping for one address from one for all.
        for relays in [&[0, 1][..], &[0][..]] {
            let one = relays.len() == 1;
            for seed in seeds(SEEDS) {
                let mut world = World::new(seed, 2);
                world.lossless();
                let node = world.node(kind, relays);
                world.run(READY);
                let independent = (!one).then_some(M::EndpointIndependent);
                let NatProfile { mapping, filtering, allocation } = world.profile(node);
                let said = (mapping, filtering);
                let expected = match kind {
                    // Only a second relay can answer from an address that was not asked.
                    Kind::Open | Kind::FullCone if !one => (independent, Some(F::EndpointIndependent)),
                    Kind::Open | Kind::FullCone | Kind::AddressRestricted => (independent, Some(F::HostDependent)),
                    Kind::PortRestricted | Kind::CarrierGrade | Kind::Firewall | Kind::Blocked => {
                        (independent, Some(F::PortDependent))
                    }
                    Kind::SymmetricRandom | Kind::SymmetricSequential => {
                        (Some(M::PortDependent), Some(F::PortDependent))
                    }
                };
                assert_eq!(said, expected, "SEED={seed} {kind:?} with {relays:?}");
                let fits = match kind {
                    Kind::SymmetricSequential => {
                        matches!(allocation, Some(Allocation::Contiguous(step)) if step == world.step(node))
                    }
                    Kind::SymmetricRandom => allocation == Some(Allocation::Random),
                    Kind::Open | Kind::Firewall | Kind::Blocked => allocation == Some(Allocation::Preserving),
                    _ => allocation.is_some(),
                };
                assert!(fits, "SEED={seed} {kind:?} with {relays:?}: {allocation:?}");
            }
        }
    }
}

#[test]
fn a_sequential_nat_is_passed_though_others_behind_it_take_ports() {
    let peers = [Kind::PortRestricted, Kind::Firewall, Kind::CarrierGrade];
    let mut direct = 0;
    for seed in seeds(SEEDS) {
        let mut world = World::new(seed, 2);
        let a = world.node(Kind::SymmetricSequential, &[0, 1]);
        let kind = world.any(&peers);
        let b = world.node(kind, &[0, 1]);
        world.share(a);
        let (a, b) = if seed % 2 == 0 { (a, b) } else { (b, a) };
        world.attempt_at(READY, a, b);
        world.run(READY + 6 * SECOND);
        world.check(|| format!("SEED={seed} {kind:?}"));
        direct += u64::from(world.attempts(a)[0].0 == Ended::Direct);
    }
    let all = seeds(SEEDS).count() as u64;
    assert!(all == 1 || direct * 10 >= all * 9, "{direct} of {all}");
}

#[test]
fn nodes_in_one_network_meet_there_whatever_nat_they_are_behind() {
    for kind in Kind::ALL.into_iter().filter(|kind| kind.has_network()) {
        for seed in seeds(SEEDS) {
            let mut world = World::new(seed, 2);
            let network = world.network(kind);
            let [a, b] = [(); 2].map(|()| world.node_in(network, kind, &[0, 1]));
            world.attempt_at(READY, a, b);
            world.run(READY + 6 * SECOND);
            world.check(|| format!("SEED={seed} {kind:?}"));
            assert_eq!(world.attempts(a)[0].0, Ended::Direct, "SEED={seed} {kind:?}");
            assert!(world.meet_locally(a, b), "SEED={seed} {kind:?}");
        }
    }
}

#[test]
fn homes_behind_one_carrier_meet_if_it_sends_back_what_they_send_to_each_other() {
    for hairpin in [true, false] {
        for seed in seeds(SEEDS) {
            let mut world = World::new(seed, 2);
            let carrier = world.carrier(hairpin);
            let [a, b] = [(); 2].map(|()| {
                let network = world.home(carrier, Kind::PortRestricted);
                world.node_in(network, Kind::CarrierGrade, &[0, 1])
            });
            world.attempt_at(READY, a, b);
            world.run(READY + 6 * SECOND);
            world.check(|| format!("SEED={seed} hairpin: {hairpin}"));
            let expected = if hairpin { Ended::Direct } else { Ended::Failed(PunchFailure::TimedOut) };
            assert_eq!(world.attempts(a)[0].0, expected, "SEED={seed} hairpin: {hairpin}");
        }
    }
}

#[test]
fn a_hostile_peer_gets_nobody_to_send_to_a_bystander() {
    for seed in seeds(SEEDS) {
        let mut world = World::new(seed, 2);
        let kind = world.any(&Kind::ALL);
        let network = world.network(kind);
        let victim = world.node_in(network, kind, &[0, 1]);
        // One that is seen at the same address may name local ones.
        let near = kind.has_network() && seed % 2 == 0;
        let hostile = if near { world.node_in(network, kind, &[0, 1]) } else { world.node(Kind::Open, &[0, 1]) };
        world.turn_hostile(hostile);
        world.attempt_at(READY, hostile, victim);
        world.attempt_at(READY + 10 * SECOND, victim, hostile);
        world.run(READY + 20 * SECOND);
        // What was sent, to whom and how often, is looked at in every run.
        world.check(|| format!("SEED={seed} {kind:?}"));
        let (bystanders, most) = world.disturbed();
        assert!(bystanders <= 4 && most <= 8, "SEED={seed} {kind:?}: {bystanders} were sent {most} packets at most");
    }
}

#[test]
fn many_nodes_of_all_kinds_meet_at_many_relays() {
    let (mut failures, mut all) = (0, 0);
    for seed in seeds(12) {
        let mut world = World::new(seed, 0);
        let relays = world.up_to(19) as usize + 1;
        let nodes = if seed == 0 { 1000 } else { world.up_to(300) as usize + 2 };
        let pairs = world.populate(relays, nodes);
        world.run(READY + 40 * SECOND);
        world.check(|| format!("SEED={seed}"));
        for (a, b) in pairs {
            let [kind, other] = [a, b].map(|node| world.kind(node));
            let promise = promise(kind, other);
            let connected = world.connected_with(a, b);
            assert_eq!(connected[0], connected[1], "SEED={seed} {kind:?} to {other:?}");
            match promise {
                Promise::Always => assert!(connected[0], "SEED={seed} {kind:?} to {other:?}"),
                Promise::Hopeless | Promise::Never => assert!(!connected[0], "SEED={seed} {kind:?} {other:?}"),
                Promise::Mostly => {
                    all += 1;
                    failures += u32::from(!connected[0]);
                }
            }
        }
        assert_eq!(world.sessions_at_relays(), 0, "SEED={seed}");
    }
    // Each pair tries once, and one run has too few of them.
    assert!(all < 100 || failures * 10 <= all, "{failures} of {all} failed");
}
