//! A message for a node goes to that node.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::common::raw::{
    ASK_NODE, FOR_NODE, FakeRelay, Manner, NUMBER, SESSION, Stream, eventually, raw_frame, stranger,
};
use crate::common::{
    Forwarder, Inbox, PATIENCE, endpoint, engine, frame, listener, member, message, node_id, over, owes_nothing, relay,
    send_to_node, until,
};
use macula_peer::{
    Candidates, Config, ConnectError, Engine, Event, Message, Path, RequestError, RouteError, SendError, Target,
    UndeliveredReason, Verify,
};
use macula_peer_testkit::quic::tokio_runtime;
use macula_peer_wire::MessageType::{Ping, Pong, Publish};
use macula_peer_wire::RawFrame;
use quinn::VarInt;

const SECOND: Duration = Duration::from_secs(1);

fn wrong_node() -> SendError {
    RouteError::Node(ConnectError::WrongNode).into()
}

fn untrusted() -> SendError {
    RouteError::Node(ConnectError::Untrusted).into()
}

/// A node that has this id and listens.
fn named(name: &str) -> (Engine, Arc<Inbox>, String) {
    listener(Config { node_id: Some(node_id(name)), ..Config::default() })
}

fn at(endpoints: &[&str]) -> Candidates {
    Candidates { endpoints: endpoints.iter().map(|address| endpoint(address)).collect(), ..Candidates::default() }
}

fn ask(engine: &Engine, name: &str, candidates: Candidates, message: Message) -> Result<RawFrame, RequestError> {
    let node = node_id(name);
    engine.learn(&node, candidates);
    engine.resolved(&node, true);
    let (answer, answered) = mpsc::channel();
    engine.request(&Target::Node(&node), message, move |reply| answer.send(reply).unwrap());
    answered.recv_timeout(PATIENCE).expect("a call is always answered")
}

fn path(engine: &Engine, name: &str) -> Option<Path> {
    engine.path(&Target::Node(&node_id(name))).link.map(|link| link.path)
}

fn undelivered(events: &Inbox) -> Vec<UndeliveredReason> {
    let events = events.events.lock().unwrap();
    let reasons = events.iter().filter_map(|event| match event {
        Event::Undelivered { reason, .. } => Some(*reason),
        _ => None,
    });
    reasons.collect()
}

/// Its port is free afterwards.
fn ended(engine: Engine) {
    engine.stop();
    drop(engine);
}

// ---- the wrong node ----

#[test]
fn an_endpoint_that_leads_back_to_the_sender_is_not_the_node() {
    let (relay, relay_address) = relay(0);
    let (target, inbox) = member("target", &[&relay_address]);
    for verify in [Verify::FirstSeen, Verify::None] {
        for name in [Some(node_id(&format!("{verify:?}"))), None] {
            let (sender, own_inbox, own) =
                listener(Config { verify: verify.clone(), node_id: name.clone(), ..Config::default() });
            let begun = Instant::now();
            let refused = send_to_node(&sender, "target", at(&[&own]), message(Publish, 0, PATIENCE));
            assert_eq!(refused, Err(wrong_node()));
            let refused = ask(&sender, "target", at(&[&own]), message(Ping, 0, PATIENCE)).unwrap_err();
            assert_eq!(refused, wrong_node().into());
            assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());
            let before = inbox.len();
            let candidates = Candidates { endpoints: at(&[&own]).endpoints, ..over(&[&relay_address]) };
            let sent = send_to_node(&sender, "target", candidates, message(Publish, 1, PATIENCE));
            assert_eq!(sent, Ok(()), "{verify:?} {name:?}");
            until("it arrives", || inbox.len() == before + 1);
            assert!(matches!(path(&sender, "target"), Some(Path::Relay(_))));
            assert_eq!((own_inbox.len(), sender.stats().accepted.len()), (0, 0));
            sender.stop();
        }
    }
    target.stop();
    relay.stop();
}

#[test]
fn a_node_with_another_id_gets_no_message_and_its_key_is_not_learnt() {
    let ((other, other_inbox, wrong), (target, inbox, right)) = (named("other"), named("target"));
    for verify in [Verify::FirstSeen, Verify::None] {
        let sender = engine(Config { verify, ..Config::default() });
        let before = inbox.len();
        for n in 0..2 {
            let refused = send_to_node(&sender, "target", at(&[&wrong]), message(Publish, n, PATIENCE));
            assert_eq!(refused, Err(wrong_node()));
            let refused = ask(&sender, "target", at(&[&wrong]), message(Ping, n, PATIENCE)).unwrap_err();
            assert_eq!(refused, wrong_node().into());
        }
        assert_eq!(sender.path(&Target::Node(&node_id("target"))).failures.direct, Some(ConnectError::WrongNode));
        send_to_node(&sender, "target", at(&[&wrong, &right]), message(Publish, 2, PATIENCE)).unwrap();
        until("it arrives", || inbox.len() == before + 1);
        sender.stop();
    }
    assert_eq!(other_inbox.len(), 0);
    other.stop();
    target.stop();
}

#[test]
fn after_a_relay_leads_to_a_wrong_node_the_next_relay_is_asked() {
    let runtime = tokio_runtime(2).unwrap();
    let inside = runtime.enter();
    let fake = FakeRelay::new(Manner::Misroute("other".into()));
    drop(inside);
    let (relay, address) = relay(0);
    let (other, other_inbox) = member("other", &[&fake.address]);
    let (target, inbox) = member("target", &[&fake.address, &address]);
    let sender = engine(Config::default());
    // The relay is believed until the node itself says that it is another one.
    send_to_node(&sender, "target", over(&[&fake.address]), message(Publish, 0, PATIENCE)).expect("accepted");
    let refused = ask(&sender, "target", over(&[&fake.address]), message(Ping, 1, PATIENCE)).unwrap_err();
    assert_eq!(refused, wrong_node().into());
    send_to_node(&sender, "target", over(&[&fake.address, &address]), message(Publish, 1, PATIENCE)).unwrap();
    until("both arrive", || inbox.len() == 2);
    assert_eq!((inbox.disorder(), other_inbox.len()), (None, 0));
    for engine in [sender, target, other, relay] {
        engine.stop();
    }
}

#[test]
fn a_node_that_takes_another_id_gets_nothing_more_for_the_old_one() {
    let ((first, first_inbox, first_address), (second, second_inbox, second_address)) = (named("old"), named("spare"));
    let sender = engine(Config::default());
    let candidates = || at(&[&first_address, &second_address]);
    let send = |n| send_to_node(&sender, "old", candidates(), message(Publish, n, PATIENCE)).unwrap();
    (0..10).for_each(send);
    until("they arrive", || first_inbox.len() == 10 && owes_nothing(&sender));
    first.register(node_id("new"), Vec::new());
    second.register(node_id("old"), Vec::new());
    (10..20).for_each(send);
    until("they arrive", || second_inbox.len() == 10 && owes_nothing(&sender));
    assert_eq!((first_inbox.numbers(), second_inbox.numbers()), ((0..10).collect(), (10..20).collect()));
    assert_eq!(second_inbox.disorder().map(|(wrong, rest)| (wrong, rest[0])), Some((0, 10)), "in order, from 10 on");
    send_to_node(&sender, "new", at(&[&first_address]), message(Publish, 20, PATIENCE)).unwrap();
    until("it arrives", || first_inbox.numbers().contains(&20));

    // The link stays where it is, and the node gives the name up again.
    second.register(node_id("spare"), Vec::new());
    first.register(node_id("old"), Vec::new());
    let answering = std::thread::spawn({
        let inbox = first_inbox.clone();
        move || {
            until("it is asked", || inbox.numbers().contains(&21));
            let asked = inbox.messages.lock().unwrap().pop().unwrap();
            asked.reply.unwrap().reply(frame(Pong, 21, 1)).unwrap();
        }
    });
    let answer = ask(&sender, "old", candidates(), message(Ping, 21, PATIENCE)).unwrap();
    assert_eq!(answer.type_id(), Pong.id());
    answering.join().unwrap();
    assert_eq!(second_inbox.len(), 10);
    for engine in [sender, first, second] {
        engine.stop();
    }
}

#[test]
fn a_node_without_an_id_serves_any_and_is_not_learnt() {
    let (first, first_inbox, address) = listener(Config::default());
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let again = |name: Option<&str>| listener(Config { port, node_id: name.map(node_id), ..Config::default() });
    let sender = engine(Config::default());
    let send = |n| send_to_node(&sender, "target", at(&[&address]), message(Publish, n, PATIENCE));
    send(0).unwrap();
    until("it arrives", || first_inbox.len() == 1 && owes_nothing(&sender));
    ended(first);
    until("the link is gone", || path(&sender, "target").is_none());
    // With another key, as a container has at each start.
    let (second, second_inbox, _) = again(None);
    send(1).unwrap();
    until("it arrives", || second_inbox.len() == 1 && owes_nothing(&sender));
    ended(second);
    until("the link is gone", || path(&sender, "target").is_none());
    // This one says that it is the node, and from now on no other is.
    let (target, inbox, _) = again(Some("target"));
    send(2).unwrap();
    until("it arrives", || inbox.len() == 1 && owes_nothing(&sender));
    ended(target);
    until("the link is gone", || path(&sender, "target").is_none());
    for name in [None, Some("target")] {
        let (impostor, stolen, _) = again(name);
        assert_eq!(send(3), Err(untrusted()));
        assert_eq!(stolen.len(), 0);
        ended(impostor);
    }
    sender.stop();
}

// ---- another key ----

#[test]
fn messages_to_a_node_that_comes_back_with_another_key_end_as_untrusted_until_it_is_forgotten() {
    let (target, inbox, address) = named("target");
    let forwarder = Forwarder::new(address.parse().unwrap(), 0, 0.0, Duration::ZERO);
    // The path that swallows packets is tried each time.
    let sender = engine(Config { connect_timeout: SECOND, ..Config::default() });
    let events = Arc::new(Inbox::default());
    sender.set_handler(Some(events.clone()));
    let before = at(&[&forwarder.address.to_string()]);
    send_to_node(&sender, "target", before, message(Publish, 0, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 1 && owes_nothing(&sender));
    // It does not say goodbye.
    forwarder.swallow(true);
    target.stop();
    let (successor, inbox, address) = named("target");
    let send = |n, timeout| send_to_node(&sender, "target", at(&[&address]), message(Publish, n, timeout));
    sender.learn(&node_id("target"), at(&[&address]));
    send(1, 2 * SECOND).expect("accepted, the link is not known to be dead");
    send(2, PATIENCE).expect("accepted as well");
    until("it is reported", || !undelivered(&events).is_empty());
    assert_eq!(undelivered(&events), [UndeliveredReason::Untrusted]);
    assert_eq!(send(3, PATIENCE), Err(untrusted()));
    assert_eq!(ask(&sender, "target", Candidates::default(), message(Ping, 4, PATIENCE)), Err(untrusted().into()));
    assert_eq!(inbox.len(), 0);

    sender.forget(&node_id("target"));
    until("what is still owed arrives", || inbox.numbers() == [2]);
    send(5, PATIENCE).unwrap();
    until("it arrives", || inbox.len() == 2);
    assert_eq!(sender.stats().undelivered, 1);
    sender.stop();
    successor.stop();
}

#[test]
fn forgetting_a_node_gives_up_the_link_to_it_and_no_message() {
    let (target, inbox, address) = named("target");
    let sender = engine(Config::default());
    sender.forget(&node_id("target"));
    for n in 0..50 {
        send_to_node(&sender, "target", at(&[&address]), message(Publish, n, PATIENCE)).unwrap();
        if n % 10 == 0 {
            sender.forget(&node_id("target"));
        }
    }
    until("all arrive", || inbox.len() == 50);
    assert_eq!(inbox.disorder(), None);
    assert!(sender.stats().peers[0].dials > 1);
    sender.stop();
    target.stop();
}

/// The wrong one claims to be the node.
#[test]
fn a_node_that_no_waiting_message_accepts_is_not_linked() {
    let ((impostor, stolen, wrong), (target, inbox, right)) = (named("target"), named("target"));
    let key = Some(target.fingerprint());
    let sender = engine(Config::default());
    let only = |n| Message { key, ..message(Publish, n, PATIENCE) };
    assert_eq!(send_to_node(&sender, "target", at(&[&wrong]), only(0)), Err(untrusted()));
    assert_eq!(path(&sender, "target"), None);
    send_to_node(&sender, "target", at(&[&wrong, &right]), only(1)).unwrap();
    until("it arrives", || inbox.len() == 1);
    send_to_node(&sender, "target", Candidates::default(), message(Publish, 2, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 2);
    assert_eq!(stolen.len(), 0);
    for engine in [sender, impostor, target] {
        engine.stop();
    }
}

/// As above, but a call that names no key has trusted the wrong one already.
#[test]
fn a_call_that_names_the_right_key_replaces_the_link_to_a_wrong_node() {
    let ((impostor, stolen, wrong), (target, inbox, right)) = (named("target"), named("target"));
    let sender = engine(Config::default());
    send_to_node(&sender, "target", at(&[&wrong]), message(Publish, 0, PATIENCE)).unwrap();
    until("it arrives", || stolen.len() == 1 && owes_nothing(&sender));
    let key = Some(target.fingerprint());
    send_to_node(&sender, "target", at(&[&right]), Message { key, ..message(Publish, 1, PATIENCE) }).unwrap();
    until("it arrives", || inbox.numbers() == [1]);
    // From now on the name is the right one's, with a new link too.
    send_to_node(&sender, "target", at(&[&wrong, &right]), message(Publish, 2, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 2 && owes_nothing(&sender));
    sender.invalidate(&Target::Node(&node_id("target")));
    send_to_node(&sender, "target", at(&[&wrong, &right]), message(Publish, 3, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 3);
    assert_eq!((inbox.disorder(), stolen.len()), (Some((0, vec![1, 2, 3])), 1));
    for engine in [sender, impostor, target] {
        engine.stop();
    }
}

/// A relayed path to the right one is better than a direct one to the wrong one.
#[test]
fn a_call_that_names_a_key_asks_relays_while_another_node_is_linked() {
    let (relay, relay_address) = relay(0);
    let ((impostor, stolen, wrong), (target, inbox)) = (named("target"), member("target", &[&relay_address]));
    let answering = std::thread::spawn({
        let inbox = inbox.clone();
        move || {
            until("it is asked", || inbox.len() == 1);
            let asked = inbox.messages.lock().unwrap().pop().unwrap();
            asked.reply.unwrap().reply(frame(Pong, 1, 1)).unwrap();
        }
    });
    let sender = engine(Config { hole_punching: macula_peer::HolePunching::Off, ..Config::default() });
    send_to_node(&sender, "target", at(&[&wrong]), message(Publish, 0, PATIENCE)).unwrap();
    until("it arrives", || stolen.len() == 1 && owes_nothing(&sender));
    let asked = Message { key: Some(target.fingerprint()), ..message(Ping, 1, PATIENCE) };
    assert_eq!(ask(&sender, "target", over(&[&relay_address]), asked).unwrap().type_id(), Pong.id());
    answering.join().unwrap();
    assert!(matches!(path(&sender, "target"), Some(Path::Relay(_))), "{:?}", path(&sender, "target"));
    send_to_node(&sender, "target", Candidates::default(), message(Publish, 2, PATIENCE)).unwrap();
    until("it arrives", || inbox.numbers() == [2]);
    assert_eq!(stolen.len(), 1);
    for engine in [sender, impostor, target, relay] {
        engine.stop();
    }
}

#[test]
fn messages_without_a_key_keep_the_link_while_another_key_is_looked_for() {
    let (target, inbox, address) = named("target");
    // Never answers.
    let nowhere = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let silent = nowhere.local_addr().unwrap().to_string();
    let sender = Arc::new(engine(Config::default()));
    send_to_node(&sender, "target", at(&[&address]), message(Publish, 0, PATIENCE)).unwrap();
    let link = sender.path(&Target::Node(&node_id("target"))).link;
    let begun = Instant::now();
    let looking = std::thread::spawn({
        let (sender, silent) = (sender.clone(), silent.clone());
        move || {
            let wanted = Message { key: Some([7; 32].into()), ..message(Publish, 99, SECOND) };
            send_to_node(&sender, "target", at(&[&silent]), wanted)
        }
    });
    until("it is looked for", || sender.stats().peers[0].dials == 2);
    for n in 1..50 {
        let node = node_id("target");
        let message = message(Publish, n, PATIENCE);
        assert!(sender.send_now(&Target::Node(&node), message, Instant::now()).is_ok(), "without waiting");
    }
    until("they arrive", || inbox.len() == 50);
    assert!(begun.elapsed() < SECOND);
    assert_eq!(looking.join().unwrap(), Err(untrusted()));
    assert!(begun.elapsed() >= SECOND, "{:?}", begun.elapsed());
    assert_eq!(inbox.disorder(), None);
    let stats = sender.path(&Target::Node(&node_id("target")));
    assert_eq!(stats.link.map(|link| link.remote), link.map(|link| link.remote));
    // The linked node is asked too, and has another key.
    let wanted = Message { key: Some([7; 32].into()), ..message(Ping, 99, SECOND) };
    assert_eq!(ask(&sender, "target", at(&[&address]), wanted), Err(untrusted().into()));
    for engine in [&*sender, &target] {
        engine.stop();
    }
}

/// The answer to the dial comes when the call is over.
#[test]
fn a_dial_whose_call_has_given_up_binds_no_name() {
    let ((impostor, stolen, wrong), (target, inbox, right)) = (named("target"), named("target"));
    let slow = Forwarder::new(wrong.parse().unwrap(), 0, 0.0, Duration::from_millis(100));
    let slow_address = slow.address.to_string();
    let sender = engine(Config::default());
    let key = Some(target.fingerprint());
    let brief = Message { key, ..message(Publish, 0, Duration::from_millis(50)) };
    assert!(send_to_node(&sender, "target", at(&[&slow_address]), brief).is_err());
    let status = || sender.path(&Target::Node(&node_id("target")));
    until("the wrong one was met", || status().failures.direct.is_some() || status().link.is_some());
    assert_eq!(status().failures.direct, Some(ConnectError::Untrusted));
    send_to_node(&sender, "target", at(&[&right]), message(Publish, 1, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 1);
    assert_eq!(stolen.len(), 0);
    for engine in [sender, impostor, target] {
        engine.stop();
    }
}

// ---- what a node says to others ----

#[test]
fn a_message_for_another_node_is_refused() {
    let wrong = Err(Some(VarInt::from_u32(7)));
    let ((server, inbox, address), (nameless, _, any)) = (named("me"), listener(Config::default()));
    let own = server.fingerprint();
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let answered = async |bytes: Vec<u8>, len: usize| {
            let mut stream = Stream::open(&connection).await;
            stream.say(bytes).await;
            stream.send.finish().unwrap();
            stream.bytes(len).await
        };
        let session = |name: &[u8]| raw_frame(SESSION, &[&[9; 16], &[0; 9][..], name].concat());
        let mut messages = frame(Publish, 1, 8).to_vec();
        messages.splice(0..0, raw_frame(NUMBER, &[0; 8]));
        for name in [&b"you"[..], b"m", b"mee", &[7; 32], &[b'm'; 255]] {
            assert_eq!(answered(raw_frame(ASK_NODE, name), 1).await, wrong);
            assert_eq!(answered([session(name), messages.clone()].concat(), 9).await, wrong);
            assert_eq!(answered([raw_frame(FOR_NODE, name), frame(Ping, 1, 8).to_vec()].concat(), 1).await, wrong);
        }
        assert_eq!(inbox.len(), 0);
        for name in [&b"me"[..], own.as_bytes()] {
            assert_eq!(answered(raw_frame(ASK_NODE, name), 1).await, Ok(vec![1]));
            assert_eq!(answered(session(name), 17).await.map(|word| word[9..].to_vec()), Ok(vec![0; 8]));
        }
        let mut stream = Stream::open(&connection).await;
        stream.say([raw_frame(FOR_NODE, b"me"), frame(Ping, 2, 8).to_vec()].concat()).await;
        eventually("it arrives", || inbox.numbers() == [2]).await;
        let connection = stranger(&any).await;
        let mut stream = Stream::open(&connection).await;
        stream.say(raw_frame(ASK_NODE, b"you")).await;
        assert_eq!(stream.bytes(1).await, Ok(vec![0]));
    });
    server.stop();
    nameless.stop();
}
