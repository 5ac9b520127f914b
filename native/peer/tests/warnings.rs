//! What an operator finds in the log where no handler of the application takes the event.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fmt::{Debug, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use common::{
    Forwarder, Inbox, endpoint, engine, listener, member, member_of, message, node_id, owes_nothing, relay, send, until,
};
use macula_peer::{Config, Event, Handler, Inbound, Refusal, Registration, Unhandled};
use macula_peer_wire::MessageType::Publish;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Metadata, Subscriber};

const TIMEOUT: Duration = Duration::from_secs(20);

/// What was logged, by all tests of this file.
static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Log;

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        LOGGED.lock().unwrap().push(line.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

fn log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Log).unwrap());
}

/// How often something was logged of a peer.
fn logged(what: &str, of: &str) -> usize {
    LOGGED.lock().unwrap().iter().filter(|line| line.contains(what) && line.contains(of)).count()
}

fn key_file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("macula-peer-{name}-{}.pem", std::process::id()))
}

fn registrations(inbox: &Inbox, wanted: Registration) -> usize {
    let events = inbox.events.lock().unwrap();
    events.iter().filter(|event| matches!(event, Event::Registration { state, .. } if *state == wanted)).count()
}

#[test]
fn two_nodes_with_one_key_change_rarely_and_say_what_is_wrong() {
    log();
    let file = key_file("twin");
    let config = || Config { identity_file: Some(file.clone()), ..Config::default() };
    let (relay, address) = relay(0);
    let (one, told_one) = member_of(config(), "twin", &[&address]);
    let (two, told_two) = member_of(config(), "twin", &[&address]);
    let begun = Instant::now();
    until("one of them says it", || logged("another node uses this identity", &address) > 0);
    let within = begun.elapsed();
    let taken_over = Registration::Refused(Refusal::TakenOver);
    let changes = registrations(&told_one, taken_over) + registrations(&told_two, taken_over);
    assert!(changes <= 4, "{changes} changes in {within:?}");
    // The relay has said why, and nothing else.
    assert_eq!(registrations(&told_one, Registration::Lost) + registrations(&told_two, Registration::Lost), 0);
    for engine in [one, two, relay] {
        engine.stop();
    }
    std::fs::remove_file(file).unwrap();
}

#[test]
fn a_registration_that_is_lost_or_refused_is_logged_once_where_no_handler_is_told() {
    log();
    let (relay, address) = relay(0);
    let (told, inbox) = member_of(Config::default(), "told", &[&address]);
    let untold = engine(Config::default());
    untold.register(node_id("untold"), vec![endpoint(&address)]);
    let refused = engine(Config::default());
    refused.register(node_id("told"), vec![endpoint(&address)]);
    until("it is refused", || logged("refuses the registration", &address) == 1);
    assert_eq!(logged("node_id_taken", &address), 1);
    until("both are registered", || relay.stats().relay.unwrap().registrations == 2);
    assert_eq!(logged("was lost", &address), 0);
    relay.stop();
    until("it is lost", || logged("was lost", &address) == 1);
    until("the handler is told", || registrations(&inbox, Registration::Lost) == 1);
    assert_eq!(logged("was lost", &address), 1, "the handler alone is told");
    for engine in [told, untold, refused] {
        engine.stop();
    }
}

/// The handler of the settings is set after the engine has started, and the node may be registered by then.
#[test]
fn a_handler_is_told_what_happened_just_before_it_was_set() {
    log();
    let (relay, address) = relay(0);
    let config = Config { node_id: Some(node_id("early")), relays: vec![endpoint(&address)], ..Config::default() };
    let node = engine(config);
    let inbox = Arc::new(Inbox::default());
    until("it is registered", || node.stats().registrations.iter().any(|r| r.state == Registration::Registered));
    node.set_handler(Some(inbox.clone()));
    until("the handler is told", || registrations(&inbox, Registration::Registered) == 1);
    for engine in [node, relay] {
        engine.stop();
    }
}

/// A handler whose process is gone.
struct Gone;

impl Handler for Gone {
    fn message(&self, _: Inbound) -> Result<(), Unhandled> {
        Err(Unhandled::NoHandler)
    }

    fn event(&self, _: Event) -> bool {
        false
    }
}

#[test]
fn events_from_before_the_handler_was_set_are_logged_if_it_refuses_them() {
    log();
    let (relay, address) = relay(0);
    let (owner, _) = member("taken", &[&address]);
    let config = Config { node_id: Some(node_id("taken")), relays: vec![endpoint(&address)], ..Config::default() };
    let node = engine(config);
    let refused = Registration::Refused(Refusal::NodeIdTaken);
    until("it is refused", || node.stats().registrations.iter().any(|registration| registration.state == refused));
    // The event follows.
    std::thread::sleep(Duration::from_millis(50));
    node.set_handler(Some(Arc::new(Gone)));
    until("it is logged", || logged("refuses the registration", &address) == 1);
    for engine in [owner, node, relay] {
        engine.stop();
    }
}

#[test]
fn undelivered_messages_are_logged_once_for_each_peer_where_no_handler_is_told() {
    log();
    let (target, _, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let address = forwarder.address.to_string();
    let sender = engine(Config { connect_timeout: Duration::from_millis(500), ..Config::default() });
    let lose = |n| {
        send(&sender, &address, message(Publish, n, TIMEOUT)).unwrap();
        until("it arrives", || owes_nothing(&sender));
        forwarder.swallow(true);
        send(&sender, &address, message(Publish, n + 1, Duration::from_millis(50))).unwrap();
        let before = sender.stats().undelivered;
        until("it is given up", || sender.stats().undelivered > before);
        forwarder.swallow(false);
    };
    lose(0);
    until("it is logged", || logged("were not delivered", &address) == 1);
    lose(2);
    assert_eq!(logged("were not delivered", &address), 1);
    // If there is a handler, it gets the event instead.
    let inbox = Arc::new(Inbox::default());
    sender.set_handler(Some(inbox.clone()));
    lose(4);
    until("it is told", || inbox.events.lock().unwrap().iter().any(|event| matches!(event, Event::Undelivered { .. })));
    for engine in [sender, target] {
        engine.stop();
    }
}
