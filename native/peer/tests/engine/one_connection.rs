//! Two nodes that send to each other need one connection, whichever side began it.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    Forwarder, endpoint, listener, member, member_of, message, node_id, over, relay, send_to_node, until,
};
use macula_peer::{Candidates, Config, Engine, HolePunching, Path, Target};
use macula_peer_wire::MessageType::Publish;

const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn one_of_two_circuits_remains_when_both_begin_at_once() {
    let (relay, address) = relay(0);
    // The simulation of whole nodes plays the other thousands of orders in which this may happen.
    for round in 0..3 {
        let names = [format!("a{round}"), format!("b{round}")];
        let nodes = names.each_ref().map(|name| member(name, &[&address]));
        let [(a, a_inbox), (b, b_inbox)] = &nodes;
        thread::scope(|scope| {
            for (from, to) in [(a, &names[1]), (b, &names[0])] {
                let address = &address;
                scope.spawn(move || {
                    for n in 0..10 {
                        send_to_node(from, to, over(&[address]), message(Publish, n, TIMEOUT)).unwrap();
                    }
                });
            }
        });
        until("all arrived", || a_inbox.len() == 10 && b_inbox.len() == 10);
        assert_eq!((a_inbox.disorder(), b_inbox.disorder()), (None, None));
        until("one circuit remains", || relay.stats().relay.unwrap().circuits == 1);
        until("it is the link of both", || [a, b].into_iter().all(|node| node.stats().peers[0].link.is_some()));
        let begun = |node: &Engine| 1 - node.stats().accepted.len();
        assert_eq!(begun(a) + begun(b), 1, "one of them began it");
        for (from, to) in [(a, &names[1]), (b, &names[0])] {
            send_to_node(from, to, Candidates::default(), message(Publish, 10, TIMEOUT)).unwrap();
        }
        until("both use it", || a_inbox.len() == 11 && b_inbox.len() == 11);
        assert_eq!(relay.stats().relay.unwrap().circuits, 1);
        for (node, _) in &nodes {
            node.stop();
        }
    }
    relay.stop();
}

#[test]
fn a_node_that_can_be_dialled_answers_over_the_direct_connection() {
    let (relay, address) = relay(0);
    let (public, public_inbox, public_address) = listener(Config::default());
    public.register(node_id("public"), vec![endpoint(&address)]);
    let (hidden, hidden_inbox) = member("hidden", &[&address]);
    until("registered", || relay.stats().relay.unwrap().registrations == 2);

    // It knows the hidden node by its name over the relay alone.
    send_to_node(&public, "hidden", over(&[&address]), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || hidden_inbox.len() == 1);
    assert!(matches!(public.stats().peers[0].link.unwrap().path, Path::Relay(_)));

    let candidates = Candidates { endpoints: vec![endpoint(&public_address)], ..Candidates::default() };
    send_to_node(&hidden, "public", candidates, message(Publish, 2, TIMEOUT)).unwrap();
    until("it arrives", || public_inbox.len() == 1);
    until("both use the direct one", || {
        let path = |node: &Engine| node.stats().peers[0].link.as_ref().map(|link| link.path);
        [&public, &hidden].into_iter().all(|node| path(node) == Some(Path::Direct))
    });
    until("the circuit is gone", || relay.stats().relay.unwrap().circuits == 0);
    send_to_node(&public, "hidden", Candidates::default(), message(Publish, 3, TIMEOUT)).unwrap();
    until("it arrives", || hidden_inbox.len() == 2);
    assert_eq!(hidden_inbox.messages.lock().unwrap()[1].path, Path::Direct);
    for engine in [public, hidden, relay] {
        engine.stop();
    }
}

/// The node that began the connection sends nothing over it for long, while the other one does.
#[test]
fn a_connection_that_the_other_side_uses_is_not_idle() {
    let (relay, address) = relay(0);
    let short =
        || Config { idle_timeout: Duration::from_millis(300), hole_punching: HolePunching::Off, ..Config::default() };
    let ((a, a_inbox), (b, b_inbox)) = (member_of(short(), "a", &[&address]), member_of(short(), "b", &[&address]));
    send_to_node(&a, "b", over(&[&address]), message(Publish, 0, TIMEOUT)).unwrap();
    until("it arrives", || b_inbox.len() == 1);
    let send = |n| {
        send_to_node(&b, "a", over(&[&address]), message(Publish, n, TIMEOUT)).unwrap();
        until("it arrives", || a_inbox.len() as u64 == n + 1);
        thread::sleep(Duration::from_millis(30));
        n + 1
    };
    let mut n = send(0);
    let give_up = Instant::now() + TIMEOUT;
    while relay.stats().relay.unwrap().circuits != 1 {
        assert!(Instant::now() < give_up, "one circuit remains");
        n = send(n);
    }
    let dials = b.stats().peers[0].dials;
    // Ten times as long as an idle peer is kept.
    for _ in 0..100 {
        n = send(n);
    }
    assert_eq!(b.stats().peers[0].dials, dials, "no link was lost");
    assert_eq!(a_inbox.disorder(), None);
    let circuits = relay.stats().relay.unwrap().circuits;
    assert_eq!(circuits, 1);
    for engine in [a, b, relay] {
        engine.stop();
    }
}

fn at(address: &str) -> Candidates {
    Candidates { endpoints: vec![endpoint(address)], ..Candidates::default() }
}

fn path(node: &Engine) -> Option<Path> {
    node.stats().peers.first()?.link.as_ref().map(|link| link.path)
}

/// The node that had accepted the direct connection gave it up, because nothing came of what it sent, and never looked at it
/// again. The other node, which had sent nothing and noticed nothing, kept it. Each had a connection of its own for ever.
#[test]
fn a_connection_that_one_side_gave_up_is_taken_up_again_when_the_other_uses_it() {
    let (relay, relay_address) = relay(0);
    let (a, a_inbox) = member("a", &[&relay_address]);
    let (b, b_inbox, b_address) = listener(Config { hole_punching: HolePunching::Off, ..Config::default() });
    b.register(node_id("b"), vec![endpoint(&relay_address)]);
    let way = Forwarder::new(b_address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    send_to_node(&a, "b", at(&way.address.to_string()), message(Publish, 0, TIMEOUT)).unwrap();
    send_to_node(&b, "a", over(&[&relay_address]), message(Publish, 0, TIMEOUT)).unwrap();
    until("both use the direct one", || [&a, &b].into_iter().all(|node| path(node) == Some(Path::Direct)));
    until("the circuit is gone", || relay.stats().relay.unwrap().circuits == 0);
    until("all arrived", || a_inbox.len() == 1 && b_inbox.len() == 1);

    way.mute();
    send_to_node(&b, "a", over(&[&relay_address]), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives over the relay", || a_inbox.len() == 2);
    assert!(matches!(path(&b), Some(Path::Relay(_))));
    assert_eq!(path(&a), Some(Path::Direct), "it has noticed nothing");
    way.unmute();
    send_to_node(&a, "b", Candidates::default(), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || b_inbox.len() == 2);
    until("both use the direct one again", || path(&b) == Some(Path::Direct));
    until("the circuit is gone", || relay.stats().relay.unwrap().circuits == 0);
    assert_eq!((a_inbox.disorder(), b_inbox.disorder()), (None, None));
    for engine in [a, b, relay] {
        engine.stop();
    }
}

/// A node waited for a connection of the peer's to allow streams, because its own link was silent. The link was heard again,
/// and the connection forgotten, which the peer kept. Each had a connection of its own for ever.
#[test]
fn a_connection_that_was_waited_for_during_a_false_alarm_is_not_forgotten() {
    let node = |name: &str| {
        let (node, inbox, address) = listener(Config { hole_punching: HolePunching::Off, ..Config::default() });
        node.register(node_id(name), vec![]);
        (node, inbox, address)
    };
    let (b, b_inbox, b_address) = node("b");
    // Its connection is the one that both prefer.
    let (a, a_inbox, a_address) = loop {
        let a = node("a");
        if a.0.fingerprint() < b.fingerprint() {
            break a;
        }
        a.0.stop();
    };
    let to_a = Forwarder::new(a_address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let to_b = Forwarder::new(b_address.parse().unwrap(), 2, 0.0, Duration::from_secs(1));
    send_to_node(&b, "a", at(&to_a.address.to_string()), message(Publish, 0, TIMEOUT)).unwrap();
    until("acknowledged", || b.stats().peers[0].acknowledged == 1);

    to_a.mute();
    b.send_now(&Target::Node(&node_id("a")), message(Publish, 1, TIMEOUT), Instant::now()).map_err(drop).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| send_to_node(&a, "b", at(&to_b.address.to_string()), message(Publish, 0, TIMEOUT)).unwrap());
        until("it waits for the peer's connection", || path(&b).is_none() && b.stats().accepted.len() == 1);
        to_a.unmute();
        until("its own is heard again", || path(&b).is_some());
        assert!(b.stats().accepted.len() == 1 && path(&a).is_none(), "the peer's allows no streams yet");
    });
    until("all arrived", || a_inbox.len() == 2 && b_inbox.len() == 1);
    until("the other connection is gone", || a.stats().accepted.is_empty());
    send_to_node(&b, "a", Candidates::default(), message(Publish, 2, TIMEOUT)).unwrap();
    until("it arrives", || a_inbox.len() == 3);
    assert_eq!(b.stats().accepted.len(), 1);
    for engine in [a, b] {
        engine.stop();
    }
}
