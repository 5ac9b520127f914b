//! Nodes that cannot be dialled are reached through relays.

use std::time::{Duration, Instant};

use crate::common::raw::{Said, bin, map};
use crate::common::{
    engine, frame, listener, member, message, node_id, over, relay, relay_of, request, send_to_node, until,
};
use macula_peer::{Candidates, Config, ConnectError, Event, Message, Path, RouteError, SendError};
use macula_peer_testkit::crowd::Crowd;
use macula_peer_testkit::quic::{node_config, transport};
use macula_peer_wire::MessageType::{self, NatProbe, Publish};
use quinn::{Connection, ConnectionError, Endpoint, TransportErrorCode};
use tokio::task::block_in_place;
use tokio::time::timeout;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A node without an engine.
async fn connect(address: &str) -> Result<Connection, ConnectionError> {
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = node_config(transport(0, 0)).unwrap();
    endpoint.connect_with(config, address.parse().unwrap(), "macula").unwrap().await
}

#[test]
fn a_node_is_reached_through_its_relay() {
    let (relay, address) = relay(0);
    let (target, inbox) = member("target", &[&address]);
    let sender = engine(Config::default());
    let begun = Instant::now();
    send_to_node(&sender, "target", over(&[&address]), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let arrived = &inbox.messages.lock().unwrap()[0];
    assert_eq!(arrived.key, Some(sender.fingerprint()), "the sender itself, not the relay");
    assert!(matches!(arrived.path, Path::Relay(_)));
    let stats = relay.stats().relay.unwrap();
    assert_eq!((stats.registrations, stats.circuits), (2, 1));
    for engine in [sender, target, relay] {
        engine.stop();
    }
}

#[test]
fn a_relay_answers_nat_probes_with_what_it_sees() {
    let (relay, address) = relay(0);
    let node = engine(Config::default());
    let frame = map(NatProbe, &[("node_id", bin("me")), ("local_port", 1.into())]);
    let deadline = Some(Instant::now() + TIMEOUT);
    let answer = request(&node, &address, Message { frame, kind: NatProbe, deadline, key: None }).unwrap();
    assert_eq!(MessageType::from_id(answer.type_id()), Some(MessageType::NatProbeReply));
    let answer = Said::of(&answer);
    assert_eq!(
        (answer.text("node_id").unwrap(), answer.text("reflexive_ip").unwrap()),
        ("me".into(), "127.0.0.1".into())
    );
    assert_eq!(answer.uint("reflexive_port"), Some(node.local_address().unwrap().port().into()));
    assert!(answer.uint("server_time").is_some());
    for engine in [node, relay] {
        engine.stop();
    }
}

#[test]
fn after_a_relay_without_the_node_the_next_relay_is_asked() {
    let ((first, first_address), (second, second_address)) = (relay(0), relay(0));
    let (target, inbox) = member("target", &[&second_address]);
    let sender = engine(Config::default());
    let relays = over(&[&first_address, &second_address]);
    send_to_node(&sender, "target", relays, message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    let unknown = send_to_node(&sender, "unknown", over(&[&first_address]), message(Publish, 1, TIMEOUT));
    let not_registered = macula_peer::Refusal::NotRegistered;
    assert_eq!(unknown, Err(SendError::Route(RouteError::Setup(not_registered))));
    assert_eq!(
        send_to_node(&sender, "nowhere", Candidates::default(), message(Publish, 1, TIMEOUT)),
        Err(SendError::Route(RouteError::NoRelay))
    );
    for engine in [sender, target, first, second] {
        engine.stop();
    }
}

#[test]
fn a_node_with_another_key_than_expected_gets_nothing() {
    let (relay, address) = relay(0);
    let (target, inbox) = member("target", &[&address]);
    let sender = engine(Config::default());
    let wrong = Candidates { key: Some([7; 32].into()), ..over(&[&address]) };
    let refused = send_to_node(&sender, "target", wrong, message(Publish, 1, TIMEOUT));
    assert_eq!(refused, Err(SendError::Route(RouteError::Node(ConnectError::Untrusted))));
    let right = Candidates { key: Some(target.fingerprint()), ..over(&[&address]) };
    send_to_node(&sender, "target", right, message(Publish, 2, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    assert_eq!(inbox.numbers(), [2]);
    for engine in [sender, target, relay] {
        engine.stop();
    }
}

#[test]
fn messages_survive_relays_that_are_killed_and_a_better_path() {
    let (mut relay, address) = relay(0);
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let (target, inbox) = member("target", &[&address]);
    let direct = format!("127.0.0.1:{}", target.listen(Default::default()).unwrap().port());
    let sender = std::sync::Arc::new(engine(Config::default()));
    let total = 30_000;
    let sending = std::thread::spawn({
        let (sender, candidates, mut better) = (sender.clone(), over(&[&address]), over(&[&address]));
        better.endpoints.push(crate::common::endpoint(&direct));
        move || {
            for n in 0..total {
                let message = Message { frame: frame(Publish, n, 100), kind: Publish, deadline: None, key: None };
                send_to_node(&sender, "target", candidates.clone(), message).unwrap();
                if n % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(10));
                }
                if n == total * 2 / 3 {
                    sender.learn(&node_id("target"), better.clone());
                }
            }
        }
    });
    for _ in 0..2 {
        let begun = inbox.len();
        until("some arrive", || inbox.len() > begun + 1000);
        relay.stop();
        drop(relay);
        relay = crate::common::relay(port).0;
    }
    sending.join().unwrap();
    until("all arrive", || inbox.len() >= total as usize);
    assert_eq!(inbox.disorder(), None);
    until("on the direct path", || {
        sender.stats().peers.iter().any(|peer| peer.link.is_some_and(|link| link.path == Path::Direct))
    });
    assert_eq!(inbox.messages.lock().unwrap().last().unwrap().path, Path::Direct);
    for engine in [&*sender, &target, &relay] {
        engine.stop();
    }
}

#[test]
fn messages_for_a_known_node_do_not_go_to_an_impostor_of_its_relay() {
    let (relay, address) = relay(0);
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let (target, inbox) = member("target", &[&address]);
    let sender = engine(Config::default());
    send_to_node(&sender, "target", over(&[&address]), message(Publish, 1, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    for engine in [relay, target] {
        engine.stop();
    }
    let impostor = engine(Config { port, ..Config::default() });
    let stolen = std::sync::Arc::new(crate::common::Inbox::default());
    impostor.set_handler(Some(stolen.clone()));
    impostor.listen(Default::default()).unwrap();
    let refused = send_to_node(&sender, "target", over(&[&address]), message(Publish, 2, Duration::from_secs(2)));
    assert!(matches!(refused, Err(SendError::Route(_))), "{refused:?}");
    send_to_node(&sender, "stranger", over(&[&address]), message(Publish, 3, TIMEOUT)).unwrap();
    until("messages for unknown nodes are passed on, as in the original", || stolen.len() == 1);
    assert_eq!(stolen.numbers(), [3]);
    for engine in [sender, impostor] {
        engine.stop();
    }
}

#[test]
fn a_key_named_by_the_caller_overrules_the_key_seen_first() {
    let (relay, address) = relay(0);
    let (first, first_inbox) = member("target", &[&address]);
    let sender = engine(Config { idle_timeout: Duration::from_millis(100), ..Config::default() });
    send_to_node(&sender, "target", over(&[&address]), message(Publish, 1, TIMEOUT)).unwrap();
    // What is not acknowledged by the first one would go to the second one.
    until("it arrives", || first_inbox.len() == 1 && crate::common::owes_nothing(&sender));
    first.stop();
    // The relay keeps the name for the first key; another relay knows nothing of it.
    let (other, other_address) = crate::common::relay(0);
    let (second, second_inbox) = member("target", &[&other_address]);
    let refused = send_to_node(&sender, "target", over(&[&other_address]), message(Publish, 2, TIMEOUT));
    assert_eq!(refused, Err(SendError::Route(RouteError::Node(ConnectError::Untrusted))));
    let named = Message { key: Some(second.fingerprint()), ..message(Publish, 3, TIMEOUT) };
    send_to_node(&sender, "target", over(&[&other_address]), named).unwrap();
    send_to_node(&sender, "target", over(&[&other_address]), message(Publish, 4, TIMEOUT)).unwrap();
    until("both arrive", || second_inbox.len() == 2);
    assert_eq!(second_inbox.numbers(), [3, 4]);
    for engine in [sender, second, relay, other] {
        engine.stop();
    }
}

/// The first link lives on for a moment: what is said on it must not end the session.
#[test]
fn a_session_goes_on_over_a_better_path_and_back() {
    let (relay, address) = relay(0);
    let (target, inbox) = member("target", &[&address]);
    let direct = format!("127.0.0.1:{}", target.listen(Default::default()).unwrap().port());
    let sender = engine(Config::default());
    let path = || sender.stats().peers[0].link.map(|link| link.path);
    let send = |n, candidates| send_to_node(&sender, "target", candidates, message(Publish, n, TIMEOUT)).unwrap();
    send(0, over(&[&address]));
    until("over the relay", || inbox.len() == 1);
    sender.learn(
        &node_id("target"),
        Candidates { endpoints: vec![crate::common::endpoint(&direct)], ..over(&[&address]) },
    );
    until("on the direct path", || path() == Some(Path::Direct));
    send(1, over(&[&address]));
    until("it arrives", || inbox.len() == 2);
    target.close();
    until("the direct path is gone", || path() != Some(Path::Direct));
    send(2, over(&[&address]));
    until("it arrives", || inbox.len() == 3);
    assert_eq!(inbox.disorder(), None);
    let restarted = |event: &Event| matches!(event, Event::SessionRestarted { .. });
    assert!(!inbox.events.lock().unwrap().iter().any(restarted), "the target has forgotten the session");
    for engine in [sender, target, relay] {
        engine.stop();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registered_nodes_take_no_place_of_other_connections() {
    let (relay, address) = relay_of(Config { max_accepted: 40, ..Config::default() });
    let mut crowd = Crowd::new(address.parse().unwrap()).unwrap();
    crowd.register(200).await.unwrap();
    assert_eq!(crowd.circuits(10).await.unwrap(), 10);
    let mut others = Vec::new();
    for _ in 0..40 {
        others.push(connect(&address).await.expect("there is room"));
    }
    let ConnectionError::ConnectionClosed(closed) = connect(&address).await.unwrap_err() else { panic!("not refused") };
    assert_eq!(closed.error_code, TransportErrorCode::CONNECTION_REFUSED);
    assert_eq!(crowd.connections().count(), 200);
    crowd.leave().await;
    until("they are gone", || relay.stats().relay.unwrap().registrations == 0);
    block_in_place(|| relay.stop());
}

/// quinn keeps memory for every stream that it allows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_gets_more_streams_when_it_sends_messages_not_when_it_registers() {
    let (relay, address) = relay(0);
    let mut crowd = Crowd::new(address.parse().unwrap()).unwrap();
    crowd.register(1).await.unwrap();
    let connection = crowd.connections().next().unwrap();
    let mut streams = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(200), connection.open_bi()).await {
        streams.push(stream.unwrap());
    }
    assert!(streams.len() < 64, "{}", streams.len());
    streams[0].0.write_all(&frame(Publish, 1, 10)).await.unwrap();
    while streams.len() < 200 {
        streams.push(timeout(crate::common::PATIENCE, connection.open_bi()).await.expect("in time").unwrap());
    }
    block_in_place(|| relay.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_relay_takes_packets_in() {
    let (relay, relay_address) = relay(0);
    let (listener, _, address) = listener(Config::default());
    assert!(connect(&relay_address).await.unwrap().max_datagram_size().is_some());
    assert!(connect(&address).await.unwrap().max_datagram_size().is_none());
    for engine in [relay, listener] {
        block_in_place(|| engine.stop());
    }
}
