//! Two nodes that send to each other need one connection, whichever side began it.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{endpoint, listener, member, member_of, message, node_id, over, relay, send_to_node, until};
use macula_peer::{Candidates, Config, Engine, HolePunching, Path};
use macula_peer_wire::MessageType::Publish;

const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn one_of_two_circuits_remains_when_both_begin_at_once() {
    let (relay, address) = relay(0);
    for round in 0..20 {
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
        until("it is good for both", || a_inbox.len() == 11 && b_inbox.len() == 11);
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
