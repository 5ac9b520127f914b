//! Two nodes that only know relays find a direct path.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{member_of, message, node_id, over, relay, send_to_node, until};
use macula_peer::{Candidates, Config, Engine, HolePunching, Path, PunchError, PunchFailure, Target};
use macula_peer_wire::MessageType::Publish;

const TIMEOUT: Duration = Duration::from_secs(20);

fn path(engine: &Engine, to: &str) -> Option<Path> {
    engine.path(&Target::Node(&node_id(to))).link.map(|link| link.path)
}

#[test]
fn a_relayed_path_becomes_a_direct_one() {
    let (relay, address) = relay(0);
    let ((a, _), (b, inbox)) =
        (member_of(Config::default(), "a", &[&address]), member_of(Config::default(), "b", &[&address]));
    send_to_node(&a, "b", over(&[&address]), message(Publish, 0, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    until("punched", || path(&a, "b") == Some(Path::HolePunch));
    send_to_node(&a, "b", over(&[&address]), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 2);
    assert_eq!(inbox.messages.lock().unwrap()[1].path, Path::HolePunch);
    until("the circuit is gone", || relay.stats().relay.unwrap().circuits == 0);
    let stats = relay.stats().relay.unwrap();
    assert_eq!((stats.punches, stats.punched), (1, 1));
    for engine in [a, b, relay] {
        engine.stop();
    }
}

#[test]
fn when_both_begin_at_once_one_connection_remains() {
    let (relay, address) = relay(0);
    for round in 0..2 {
        thread::scope(|scope| {
            for pair in 0..10 {
                let names = [format!("a{round}-{pair}"), format!("b{round}-{pair}")];
                let address = &address;
                scope.spawn(move || one_connection_remains(names, address));
            }
        });
        until("no circuit is left", || relay.stats().relay.unwrap().circuits == 0);
    }
    relay.stop();
}

fn one_connection_remains(names: [String; 2], relay: &str) {
    let nodes = names.each_ref().map(|name| member_of(Config::default(), name, &[relay]));
    let [(a, a_inbox), (b, b_inbox)] = &nodes;
    thread::scope(|scope| {
        for (from, to) in [(a, &names[1]), (b, &names[0])] {
            scope.spawn(move || {
                for n in 0..10 {
                    send_to_node(from, to, over(&[relay]), message(Publish, n, TIMEOUT)).unwrap();
                }
            });
        }
    });
    until("all arrived", || a_inbox.len() == 10 && b_inbox.len() == 10);
    assert_eq!((a_inbox.disorder(), b_inbox.disorder()), (None, None));
    until("both are on the direct path", || {
        path(a, &names[1]) == Some(Path::HolePunch) && path(b, &names[0]) == Some(Path::HolePunch)
    });
    until("one connection remains", || a.stats().accepted.len() + b.stats().accepted.len() == 1);
    for (node, _) in &nodes {
        node.stop();
    }
}

/// Callers may name a relay with every message. That is no reason to ask it again for what it has refused.
#[test]
fn a_hopeless_punch_is_tried_once_whatever_callers_say() {
    let (relay, address) = relay(0);
    let (v4, v6) = (address.clone(), address.replace("127.0.0.1", "[::1]"));
    let (a, _) = member_of(Config::default(), "a", &[&v4]);
    let (b, inbox) = member_of(Config::default(), "b", &[&v6]);
    let refused = || {
        let counts = relay.stats().relay.unwrap().refused;
        counts.iter().find(|(refusal, _)| *refusal == "address_family").map_or(0, |(_, count)| *count)
    };
    send_to_node(&a, "b", over(&[&v4]), message(Publish, 0, TIMEOUT)).unwrap();
    until("said", || a.path(&Target::Node(&node_id("b"))).failures.hole_punch.is_some());
    assert_eq!((path(&a, "b").is_some(), refused()), (true, 1));
    for n in 1..100 {
        a.learn(&node_id("b"), over(&[&v4]));
        send_to_node(&a, "b", over(&[&v4]), message(Publish, n, TIMEOUT)).unwrap();
        until("it arrives", || inbox.len() as u64 == n + 1);
    }
    assert_eq!(refused(), 1);
    // What was skipped until now is tried once more.
    a.learn(&node_id("b"), Candidates { hole_punch: Some(false), ..Candidates::default() });
    a.learn(&node_id("b"), Candidates { hole_punch: Some(true), ..Candidates::default() });
    until("asked once more", || refused() == 2);
    for engine in [a, b, relay] {
        engine.stop();
    }
}

/// It was found out by waiting for three seconds.
#[test]
fn a_refusal_by_the_other_node_is_known_at_once() {
    let (relay, address) = relay(0);
    let (a, _) = member_of(Config::default(), "a", &[&address]);
    let off = Config { hole_punching: HolePunching::Off, ..Config::default() };
    let (b, inbox) = member_of(off, "b", &[&address]);
    until("they know their NATs", || [&a, &b].iter().all(|node| node.nat_profile().since.is_some()));
    let begun = Instant::now();
    send_to_node(&a, "b", over(&[&address]), message(Publish, 0, TIMEOUT)).unwrap();
    let failed = || a.path(&Target::Node(&node_id("b"))).failures.hole_punch;
    until("it is told", || failed().is_some());
    // Without its word it would be `TimedOut`.
    assert_eq!(failed(), Some(PunchError::Failed(PunchFailure::NotAllowed)));
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
    until("it arrives", || inbox.len() == 1);
    assert_eq!(path(&a, "b").map(|path| matches!(path, Path::Relay(_))), Some(true));
    let stats = relay.stats().relay.unwrap();
    assert_eq!((stats.punches, stats.punched), (1, 0), "asked once");
    for engine in [a, b, relay] {
        engine.stop();
    }
}
