//! Nothing that was accepted is lost in silence: over lossy paths, dead links and restarts.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{Forwarder, Inbox, engine, listener, message, send, until};
use macula_peer::{Config, Delivery, Event, Listen, UndeliveredReason};
use macula_peer_wire::MessageType::{self, Publish, Store};

const TIMEOUT: Duration = Duration::from_secs(10);

fn counted(engine: &macula_peer::Engine) -> (u64, u64, usize) {
    let stats = engine.stats();
    let peer = &stats.peers[0];
    (peer.sent, peer.acknowledged, peer.unacknowledged_bytes)
}

/// Of an answered and an unanswered type: the two end differently on the stream.
fn every_message_arrives(loss: f64, delay: Duration, kind: MessageType) {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 42, loss, delay);
    let client = engine(Config::default());
    for n in 0..1000 {
        send(&client, &forwarder.address.to_string(), message(kind, n, TIMEOUT)).unwrap();
    }
    until("all arrive", || inbox.len() >= 1000);
    assert_eq!(inbox.numbers(), (0..1000).collect::<Vec<_>>(), "each once: the link never died");
    until("all acknowledged", || counted(&client) == (1000, 1000, 0));
    client.stop();
    server.stop();
}

#[test]
fn on_a_clean_path() {
    every_message_arrives(0.0, Duration::ZERO, Publish);
}

#[test]
fn on_a_path_that_loses_one_packet_in_twenty() {
    every_message_arrives(0.05, Duration::from_millis(5), Publish);
}

#[test]
fn of_an_answered_type_on_a_lossy_path() {
    every_message_arrives(0.05, Duration::from_millis(5), Store);
}

#[test]
fn a_silence_on_the_path_delays_and_loses_nothing() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, TIMEOUT)).unwrap();
    until("the link works", || inbox.len() == 1);
    forwarder.swallow(true);
    for n in 1..=20 {
        send(&client, &endpoint, message(Publish, n, TIMEOUT)).unwrap();
    }
    let begun = Instant::now();
    until("the silence is noticed", || client.stats().peers[0].dials > 1);
    assert!(begun.elapsed() < Duration::from_secs(5), "not after 16 s as in the original");
    forwarder.swallow(false);
    until("all arrive", || (0..=20).all(|n| inbox.numbers().contains(&n)));
    assert_eq!(client.stats().undelivered, 0);
    client.stop();
    server.stop();
}

#[test]
fn a_restarted_peer_costs_no_message() {
    let (server, _, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let forwarder = Forwarder::new(address, 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, TIMEOUT)).unwrap();
    // Killed: no goodbye reaches the client.
    forwarder.swallow(true);
    server.stop();
    drop(server);
    let server = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(Inbox::default());
    server.set_handler(Some(inbox.clone()));
    server.listen(Listen::default()).unwrap();
    forwarder.swallow(false);
    for n in 1..=100 {
        send(&client, &endpoint, message(Publish, n, TIMEOUT)).unwrap();
    }
    until("all arrive", || (1..=100).all(|n| inbox.numbers().contains(&n)));
    client.stop();
    server.stop();
}

#[test]
fn a_message_past_its_deadline_is_reported() {
    let (server, _, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config { connect_timeout: Duration::from_secs(1), ..Config::default() });
    let inbox = Arc::new(Inbox::default());
    client.set_handler(Some(inbox.clone()));
    send(&client, &endpoint, message(Publish, 0, TIMEOUT)).unwrap();
    until("acknowledged", || counted(&client).1 == 1);
    forwarder.swallow(true);
    for n in 1..=3 {
        send(&client, &endpoint, message(Publish, n, Duration::from_secs(2))).unwrap();
    }
    until("reported", || client.stats().undelivered == 3);
    until("nothing is held", || counted(&client).2 == 0);
    client.stop();
    server.stop();
    assert_eq!(reported(&inbox.events.lock().unwrap(), UndeliveredReason::Expired), 3);
}

fn reported(events: &[Event], expected: UndeliveredReason) -> u64 {
    let counts = events.iter().filter_map(|event| match event {
        Event::Undelivered { count, reason, .. } => {
            assert_eq!(*reason, expected);
            Some(count)
        }
        _ => None,
    });
    counts.sum()
}

#[test]
fn at_most_once_is_reported_and_not_sent_to_a_restarted_peer() {
    let (server, _, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let forwarder = Forwarder::new(address, 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config { delivery: Delivery::AtMostOnce, ..Config::default() });
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    send(&client, &endpoint, message(Publish, 0, TIMEOUT)).unwrap();
    until("acknowledged", || counted(&client).1 == 1);
    forwarder.swallow(true);
    for n in 1..=3 {
        send(&client, &endpoint, message(Publish, n, TIMEOUT)).unwrap();
    }
    server.stop();
    drop(server);
    let server = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(Inbox::default());
    server.set_handler(Some(inbox.clone()));
    server.listen(Listen::default()).unwrap();
    forwarder.swallow(false);
    until("reported", || client.stats().undelivered == 3);
    send(&client, &endpoint, message(Publish, 4, TIMEOUT)).unwrap();
    until("the next arrives", || inbox.len() == 1);
    assert_eq!(inbox.numbers(), [4]);
    client.stop();
    server.stop();
    assert_eq!(reported(&events.events.lock().unwrap(), UndeliveredReason::LinkLost), 3);
}

#[test]
fn accepted_messages_are_sent_before_the_engine_stops() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    for n in 0..2000 {
        send(&client, &address, message(Publish, n, TIMEOUT)).unwrap();
    }
    client.stop();
    until("all arrive", || inbox.len() == 2000);
    server.stop();
}

#[test]
fn a_stopped_engine_answers_waiting_calls() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let endpoint = silent.local_addr().unwrap().to_string();
    let client = Arc::new(engine(Config::default()));
    let waiting = std::thread::spawn({
        let client = client.clone();
        move || send(&client, &endpoint, message(Publish, 0, TIMEOUT))
    });
    until("it waits", || client.stats().peers.iter().any(|peer| peer.dials == 1));
    client.stop();
    assert!(waiting.join().unwrap().is_err());
}
