//! Access control: lists that change while the node runs, and the callback.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{
    Inbox, PATIENCE, endpoint, engine, listener, member, message, node_id, over, send, send_to_node, until,
};
use macula_peer::{
    Access, AccessList, AdmissionAnswer, AdmissionCallback, AdmissionQuestion, Admit, Candidates, Config, ConnectError,
    Engine, Event, Fingerprint, HolePunching, Kick, Listen, NotAdmitted, Refusal, Registration, RelayConfig, SendError,
    Target,
};
use macula_peer_wire::MessageType;

const TIMEOUT: Duration = Duration::from_secs(5);

fn denies(deny: AccessList) -> Access {
    Access { deny, ..Access::default() }
}

fn denies_key(engine: &Engine) -> Access {
    denies(AccessList { keys: Some(vec![engine.fingerprint()]), ..AccessList::default() })
}

fn denies_network(network: &str) -> Access {
    denies(AccessList { networks: Some(vec![network.parse().unwrap()]), ..AccessList::default() })
}

fn store(n: u64) -> macula_peer::Message {
    message(MessageType::Store, n, TIMEOUT)
}

fn refused(engine: &Engine, reason: &str) -> u64 {
    engine.stats().admission.refused.iter().find(|(name, _)| *name == reason).unwrap().1
}

fn nothing_is_linked(engine: &Engine) -> bool {
    engine.stats().peers.iter().all(|peer| peer.link.is_none())
}

/// Answers as it is told, or keeps the questions.
#[derive(Default)]
struct Decider {
    /// `None`: keeps them.
    answer: Mutex<Option<Result<(), NotAdmitted>>>,
    kept: Mutex<Vec<AdmissionAnswer>>,
    asked: Mutex<Vec<AdmissionQuestion>>,
    /// A node with this key is let in all the same.
    allowed: Mutex<Option<Fingerprint>>,
}

impl Admit for Decider {
    fn ask(&self, question: &AdmissionQuestion, answer: AdmissionAnswer) {
        self.asked.lock().unwrap().push(question.clone());
        let allowed = question.key.is_some() && question.key == *self.allowed.lock().unwrap();
        match if allowed { Some(Ok(())) } else { *self.answer.lock().unwrap() } {
            Some(decided) => answer.give(decided),
            None => self.kept.lock().unwrap().push(answer),
        }
    }
}

impl Decider {
    fn new(answer: Option<Result<(), NotAdmitted>>) -> Arc<Self> {
        Arc::new(Self { answer: Mutex::new(answer), ..Self::default() })
    }

    fn set(&self, answer: Option<Result<(), NotAdmitted>>) {
        *self.answer.lock().unwrap() = answer;
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn asking(decider: &Arc<Decider>, timeout: Duration, good_for: Duration) -> Option<AdmissionCallback> {
    Some(AdmissionCallback { admit: decider.clone(), timeout, good_for })
}

/// A node that listens with a callback.
fn guarded(decider: &Arc<Decider>, good_for: Duration) -> (Engine, Arc<Inbox>, String) {
    let (server, inbox) = (engine(Config::default()), Arc::new(Inbox::default()));
    server.set_handler(Some(inbox.clone()));
    let admission = asking(decider, Duration::from_millis(300), good_for);
    let port = server.listen(Listen { admission, ..Listen::default() }).unwrap().port();
    (server, inbox, format!("127.0.0.1:{port}"))
}

fn not_trusted() -> Result<(), SendError> {
    Err(SendError::Connect(ConnectError::NotTrusted))
}

// ---- lists ----

#[test]
fn a_denied_key_is_refused_and_its_connections_end() {
    let (server, inbox, at) = listener(Config::default());
    let [honest, other] = [engine(Config::default()), engine(Config::default())];
    for (n, client) in [(1, &honest), (2, &other)] {
        assert_eq!(send(client, &at, store(n)), Ok(()));
    }
    until("both arrived", || inbox.len() == 2);
    server.set_access(denies_key(&other));
    until("its link is gone", || nothing_is_linked(&other));
    assert_eq!(send(&other, &at, store(3)), not_trusted());
    assert_eq!(send(&honest, &at, store(4)), Ok(()));
    until("the honest one goes on", || inbox.numbers() == [1, 2, 4]);
    assert!(refused(&server, "key") >= 2 && server.stats().accepted.len() == 1);
    server.set_access(Access::default());
    assert_eq!(send(&other, &at, store(5)), Ok(()));
    until("it is back", || inbox.numbers() == [1, 2, 4, 5]);
}

#[test]
fn only_allowed_keys_are_let_in() {
    let (server, inbox, at) = listener(Config::default());
    let [honest, other] = [engine(Config::default()), engine(Config::default())];
    let keys = Some(vec![honest.fingerprint()]);
    server.set_access(Access { allow: AccessList { keys, ..AccessList::default() }, ..Access::default() });
    assert_eq!(send(&other, &at, store(1)), not_trusted());
    assert_eq!(send(&honest, &at, store(2)), Ok(()));
    until("it arrived", || inbox.numbers() == [2]);
}

#[test]
fn a_denied_network_is_refused_before_a_handshake_and_its_connections_end() {
    let (server, inbox, at) = listener(Config::default());
    let quick = || engine(Config { connect_timeout: Duration::from_millis(500), ..Config::default() });
    let [one, other] = [quick(), quick()];
    assert_eq!(send(&one, &at, store(1)), Ok(()));
    until("it arrived", || inbox.len() == 1);
    server.set_access(denies_network("127.0.0.0/8"));
    until("its link is gone", || nothing_is_linked(&one));
    let before = refused(&server, "network");
    assert_eq!(send(&other, &at, store(2)), Err(SendError::Connect(ConnectError::Refused)));
    assert!(refused(&server, "network") > before);
    server.set_access(denies_network("10.0.0.0/8"));
    assert_eq!(send(&other, &at, store(3)), Ok(()));
}

/// A denied node still gets messages from this node, but this node takes none from it.
#[test]
fn a_denied_node_gets_messages_but_none_are_taken_from_it() {
    let (a, from_b) = (engine(Config::default()), Arc::new(Inbox::default()));
    a.set_handler(Some(from_b.clone()));
    let (b, inbox, at) = listener(Config::default());
    let there = || Candidates { endpoints: vec![endpoint(&at)], ..Candidates::default() };
    let back = || Candidates { key: Some(a.fingerprint()), ..Candidates::default() };
    let quick = |n| message(MessageType::Store, n, Duration::from_millis(500));
    assert_eq!(send_to_node(&a, "b", there(), store(1)), Ok(()));
    until("it arrived", || inbox.len() == 1);
    assert_eq!(send_to_node(&b, "a", back(), quick(2)), Ok(()));
    until("it came back", || from_b.numbers() == [2]);
    a.set_access(denies_key(&b));
    until("the link is gone", || nothing_is_linked(&b));
    assert_eq!(send_to_node(&a, "b", there(), store(3)), Ok(()));
    until("it arrived", || inbox.numbers() == [1, 3]);
    assert!(send_to_node(&b, "a", back(), quick(4)).is_err());
    assert_eq!(from_b.numbers(), [2]);
    // The next link of one that may come again is used at once.
    a.set_access(Access::default());
    a.invalidate(&Target::Node(&node_id("b")));
    until("the link is gone", || nothing_is_linked(&b) && b.stats().accepted.is_empty());
    assert_eq!(send_to_node(&a, "b", there(), store(5)), Ok(()));
    until("it arrived", || inbox.numbers() == [1, 3, 5]);
    assert_eq!(send_to_node(&b, "a", back(), store(6)), Ok(()));
    until("it came back", || from_b.numbers() == [2, 6]);
}

/// The address is the relay's.
#[test]
fn a_node_behind_a_relay_is_checked_by_its_key_and_not_by_its_network() {
    let (_relay, at) = relay(None);
    let (target, inbox) = member("target", &[&at]);
    let sender = engine(Config { hole_punching: HolePunching::Off, ..Config::default() });
    let quick = |n| message(MessageType::Store, n, Duration::from_millis(500));
    target.set_access(denies_network("127.0.0.0/8"));
    assert_eq!(send_to_node(&sender, "target", over(&[&at]), store(1)), Ok(()));
    until("it arrived", || inbox.numbers() == [1]);
    target.set_access(denies_key(&sender));
    until("the link is gone", || nothing_is_linked(&sender));
    assert!(send_to_node(&sender, "target", over(&[&at]), quick(2)).is_err());
    assert_eq!(inbox.numbers(), [1]);
    assert!(refused(&target, "key") >= 2);
}

// ---- the callback ----

#[test]
fn a_callback_decides_once_for_equal_questions() {
    let decider = Decider::new(Some(Err(NotAdmitted::Callback)));
    let (server, inbox, at) = guarded(&decider, Duration::from_secs(60));
    let [denied, allowed] = [engine(Config::default()), engine(Config::default())];
    for n in 0..3 {
        assert_eq!(send(&denied, &at, store(n)), not_trusted());
    }
    decider.set(Some(Ok(())));
    assert_eq!(send(&denied, &at, store(3)), not_trusted(), "the answer is remembered");
    assert_eq!(send(&allowed, &at, store(4)), Ok(()));
    until("it arrived", || inbox.numbers() == [4]);
    let questions = decider.asked.lock().unwrap().clone();
    let keys: Vec<_> = questions.iter().map(|question| question.key.unwrap()).collect();
    assert_eq!(keys, [denied.fingerprint(), allowed.fingerprint()]);
    assert!(questions.iter().all(|question| question.address.ip() == IpAddr::from([127, 0, 0, 1])));
    assert!(questions.iter().all(|question| question.node_id.is_none()));
    let stats = server.stats().admission;
    assert_eq!((stats.asked, stats.remembered, refused(&server, "callback")), (2, 3, 4));
}

#[test]
fn a_callback_that_hangs_lets_no_node_in_and_delays_no_other() {
    let decider = Decider::new(Some(Ok(())));
    let (server, inbox, at) = guarded(&decider, Duration::from_secs(60));
    let quick = || engine(Config { connect_timeout: Duration::from_millis(1500), ..Config::default() });
    let [honest, stranger] = [quick(), quick()];
    assert_eq!(send(&honest, &at, store(0)), Ok(()));
    decider.set(None);
    let begun = Instant::now();
    let waiting = {
        let at = at.clone();
        std::thread::spawn(move || (send(&stranger, &at, store(99)), stranger))
    };
    let mut slowest = Duration::ZERO;
    for n in 1.. {
        let sent = Instant::now();
        assert_eq!(send(&honest, &at, store(n)), Ok(()));
        until("it arrived", || inbox.len() as u64 == n + 1);
        slowest = slowest.max(sent.elapsed());
        if begun.elapsed() > Duration::from_millis(1000) {
            break;
        }
    }
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    let (sent, stranger) = waiting.join().unwrap();
    assert!(matches!(sent, Err(SendError::Connect(_))), "{sent:?}");
    assert!(refused(&server, "timeout") >= 1);
    // It was not denied, so it is asked about again.
    decider.kept.lock().unwrap().clear();
    decider.set(Some(Ok(())));
    assert_eq!(send(&stranger, &at, store(100)), Ok(()));
}

#[test]
fn a_dropped_question_is_a_refusal() {
    struct Dropper(AtomicUsize);
    impl Admit for Dropper {
        fn ask(&self, _: &AdmissionQuestion, _: AdmissionAnswer) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (server, dropper) = (engine(Config::default()), Arc::new(Dropper(AtomicUsize::new(0))));
    let admission = AdmissionCallback { admit: dropper.clone(), timeout: PATIENCE, good_for: PATIENCE };
    let port = server.listen(Listen { admission: Some(admission), ..Listen::default() }).unwrap().port();
    let client = engine(Config { connect_timeout: Duration::from_millis(500), ..Config::default() });
    let sent = send(&client, &format!("127.0.0.1:{port}"), store(1));
    assert_eq!(sent, Err(SendError::Connect(ConnectError::Refused)));
    assert!(dropper.0.load(Ordering::Relaxed) >= 1 && refused(&server, "crash") >= 1);
}

/// While questions about many keys at one address are pending, a node at another address registers without delay.
#[test]
fn strangers_at_one_address_have_a_share_of_the_questions() {
    let decider = Decider::new(None);
    let honest = engine(Config { ip: Some([127, 0, 0, 2].into()), ..Config::default() });
    *decider.allowed.lock().unwrap() = Some(honest.fingerprint());
    let (server, at) = relay(asking(&decider, PATIENCE, PATIENCE));
    let clients: Vec<_> = (0..72)
        .map(|_| {
            let client = engine(Config { workers: 1, connect_timeout: Duration::from_secs(2), ..Config::default() });
            let target = macula_peer::EndpointRef::parse(&at).unwrap();
            client.send(&macula_peer::Target::Endpoint(target), store(1), drop);
            client
        })
        .collect();
    until("some are refused", || refused(&server, "busy") >= 1);
    assert_eq!(decider.asked(), 64);
    let begun = Instant::now();
    honest.register(node_id("honest"), vec![endpoint(&at)]);
    until("registered", || server.stats().relay.unwrap().registrations == 1);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(clients);
}

// ---- relays ----

fn states(inbox: &Inbox) -> Vec<Registration> {
    let state = |event: &Event| match event {
        Event::Registration { state, .. } => Some(*state),
        _ => None,
    };
    inbox.events.lock().unwrap().iter().filter_map(state).collect()
}

#[track_caller]
fn hears(inbox: &Inbox, refusal: Refusal) {
    until("it is told", || states(inbox).contains(&Registration::Refused(refusal)));
}

fn relay(admission: Option<AdmissionCallback>) -> (Engine, String) {
    let engine = engine(Config::default());
    let listen = Listen { relay: Some(RelayConfig::default()), admission, ..Listen::default() };
    let port = engine.listen(listen).unwrap().port();
    (engine, format!("127.0.0.1:{port}"))
}

#[test]
fn a_relay_asks_about_each_name_and_tells_the_node() {
    let decider = Decider::new(Some(Ok(())));
    let (relay, at) = relay(asking(&decider, PATIENCE, PATIENCE));
    let _first = member("first", &[&at]);
    let asked: Vec<_> = decider.asked.lock().unwrap().iter().map(|question| question.node_id.clone()).collect();
    assert_eq!(asked, [None, Some(node_id("first"))]);
    // The connection is let in, the name is not.
    let (second, inbox) = (engine(Config::default()), Arc::new(Inbox::default()));
    second.set_handler(Some(inbox.clone()));
    assert_eq!(send(&second, &at, store(1)), Ok(()));
    decider.set(Some(Err(NotAdmitted::Callback)));
    second.register(node_id("second"), vec![endpoint(&at)]);
    hears(&inbox, Refusal::Denied);
    assert_eq!(relay.stats().relay.unwrap().registrations, 1);
}

#[test]
fn a_node_id_that_is_denied_leaves_and_is_told() {
    let (relay, at) = relay(None);
    let [(_a, of_a), (_b, of_b)] = ["a", "b"].map(|name| member(name, &[&at]));
    relay.set_access(denies(AccessList { node_ids: Some(vec![node_id("a")]), ..AccessList::default() }));
    assert_eq!(relay.stats().relay.unwrap().registrations, 1, "at once");
    hears(&of_a, Refusal::Denied);
    assert_eq!(states(&of_b), [Registration::Registered]);
    assert!(refused(&relay, "node_id") >= 1);
}

#[test]
fn a_node_whose_key_is_denied_is_told_so_and_its_connection_ends() {
    let (relay, at) = relay(None);
    let (node, inbox) = member("a", &[&at]);
    relay.set_access(denies_key(&node));
    hears(&inbox, Refusal::Denied);
    until("its connection is closed", || relay.stats().accepted.is_empty());
}

#[test]
fn a_kicked_node_is_told_and_not_registered_again_at_once() {
    let (relay, at) = relay(None);
    let [(a, of_a), (b, of_b)] = ["a", "b"].map(|name| member(name, &[&at]));
    assert!(relay.kick(&Kick::NodeId(node_id("a"))));
    assert!(relay.kick(&Kick::Key(b.fingerprint())));
    assert!(!relay.kick(&Kick::NodeId(node_id("a"))), "it has gone");
    assert_eq!(relay.stats().relay.unwrap().registrations, 0, "at once");
    hears(&of_a, Refusal::Kicked);
    hears(&of_b, Refusal::Kicked);
    // A client that does not wait by itself.
    a.unregister();
    a.register(node_id("a"), vec![endpoint(&at)]);
    let refusals = || states(&of_a).iter().filter(|state| matches!(state, Registration::Refused(_))).count();
    until("refused again", || refusals() == 2);
    assert_eq!(refused(&relay, "kicked"), 3);
}

#[test]
fn a_relays_nodes_are_listed_in_parts_with_what_they_sent() {
    let (relay, at) = relay(None);
    let nodes = ["a", "b", "c"].map(|name| member(name, &[&at]));
    assert_eq!(send_to_node(&nodes[0].0, "b", over(&[&at]), store(1)), Ok(()));
    until("it arrived", || nodes[1].1.len() == 1);
    let (first, next) = relay.relay_nodes(0, 2).unwrap();
    let (rest, end) = relay.relay_nodes(next.unwrap(), 2).unwrap();
    let listed: Vec<_> = first.iter().chain(&rest).collect();
    let names: Vec<_> = listed.iter().map(|node| node.node_id.as_bytes()).collect();
    assert_eq!((names, end), (vec![&b"a"[..], b"b", b"c"], None));
    for (listed, (node, _)) in listed.iter().zip(&nodes) {
        assert_eq!(listed.key, node.fingerprint());
        assert!(listed.address.ip() == IpAddr::from([127, 0, 0, 1]) && listed.since.elapsed() < PATIENCE);
    }
    let [a, b, c] = [listed[0], listed[1], listed[2]];
    assert_eq!([a.circuits, b.circuits, c.circuits], [1, 1, 0]);
    assert_eq!((&a.peers, &b.peers), (&vec![b.node_id.clone()], &vec![a.node_id.clone()]));
    assert!(a.sent.packets > 0 && a.sent.bytes > 64 && b.received.packets > 0 && b.sent.packets > 0);
    assert_eq!((c.sent, c.received), Default::default());
    let (client, _, _) = listener(Config::default());
    assert!(client.relay_nodes(0, 10).is_none(), "it is no relay");
}
