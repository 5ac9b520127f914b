//! Between nodes that run this library: in order and exactly once, over whatever sequence of links.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Forwarder, Inbox, engine, frame, listener, message, number, send, until};
use macula_peer::{Config, EndpointRef, Event, Listen, Message, ReplyError, SendError, Target, UndeliveredReason};
use macula_peer_wire::Limits;
use macula_peer_wire::MessageType::{Publish, Store};

const TIMEOUT: Duration = Duration::from_secs(60);

/// From this size on messages are numbered apart.
const LARGE: usize = 64 << 10;

fn numbered(inbox: &Inbox, large: bool) -> Vec<u64> {
    let messages = inbox.messages.lock().unwrap();
    messages.iter().filter(|m| (m.payload.len() >= LARGE) == large).filter_map(|m| number(&m.payload)).collect()
}

fn of_size(n: u64, size: usize) -> Message {
    Message { frame: frame(Publish, n, size), kind: Publish, deadline: Some(Instant::now() + TIMEOUT), key: None }
}

#[test]
fn messages_arrive_in_order_and_once_while_the_path_comes_and_goes() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.02, Duration::from_millis(2));
    let client = engine(Config { connect_timeout: Duration::from_secs(1), ..Config::default() });
    let endpoint = forwarder.address.to_string();
    let total = 20_000;
    let sender = std::thread::spawn({
        let endpoint = endpoint.clone();
        move || {
            for n in 0..total {
                let size = if n % 500 == 0 { LARGE } else { 64 };
                send(&client, &endpoint, of_size(n, size)).unwrap();
                if n % 50 == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            client
        }
    });
    for _ in 0..3 {
        let begun = inbox.len();
        until("some arrive", || inbox.len() > begun + 500);
        forwarder.swallow(true);
        std::thread::sleep(Duration::from_millis(900));
        forwarder.swallow(false);
    }
    let client = sender.join().unwrap();
    until("all arrive", || inbox.len() >= total as usize);
    until("all acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    assert!(client.stats().peers[0].dials > 1, "the link was never replaced");
    let small: Vec<u64> = (0..total).filter(|n| n % 500 != 0).collect();
    let large: Vec<u64> = (0..total).filter(|n| n % 500 == 0).collect();
    assert_eq!(numbered(&inbox, false), small);
    assert_eq!(numbered(&inbox, true), large);
    client.stop();
    server.stop();
}

#[test]
fn small_messages_do_not_wait_behind_large_ones() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::from_millis(20));
    let client = engine(Config::default());
    let endpoint = forwarder.address.to_string();
    send(&client, &endpoint, of_size(0, 64)).unwrap();
    send(&client, &endpoint, of_size(1, 8 << 20)).unwrap();
    for n in 2..100 {
        send(&client, &endpoint, of_size(n, 64)).unwrap();
    }
    until("the small ones arrive", || numbered(&inbox, false).len() == 99);
    assert_eq!(numbered(&inbox, true), [], "the large one takes several round trips");
    until("the large one arrives", || numbered(&inbox, true) == [1]);
    client.stop();
    server.stop();
}

#[test]
fn over_its_bound_callers_wait_and_are_told_that_it_is_overloaded() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config { max_unacknowledged: 100_000, ..Config::default() });
    send(&client, &endpoint, of_size(0, 64)).unwrap();
    until("acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    forwarder.swallow(true);
    for n in 1..=9 {
        send(&client, &endpoint, of_size(n, 10_000)).unwrap();
    }
    let deadline = Some(Instant::now() + Duration::from_millis(200));
    let begun = Instant::now();
    let refused = send(&client, &endpoint, Message { deadline, ..of_size(10, 10_000) });
    assert_eq!(refused, Err(SendError::Overloaded));
    assert!(begun.elapsed() >= Duration::from_millis(200), "it waited for room");
    let waiting = std::thread::spawn({
        let endpoint = endpoint.clone();
        move || {
            let sent = send(&client, &endpoint, of_size(11, 10_000));
            (client, sent)
        }
    });
    forwarder.swallow(false);
    let (client, sent) = waiting.join().unwrap();
    assert_eq!(sent, Ok(()), "acknowledgements made room");
    until("all arrive", || inbox.len() == 11);
    assert_eq!(numbered(&inbox, false), (0..=9).chain([11]).collect::<Vec<_>>());
    client.stop();
    server.stop();
}

#[test]
fn a_batch_that_comes_at_once_is_handed_over_to_its_end() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    let target = Target::Endpoint(EndpointRef::parse(&address).unwrap());
    // More frames than the receiver takes in one go, as the first of a link; nothing comes after them.
    for n in 0..1000 {
        client.send(&target, of_size(n, 1), |sent| sent.unwrap());
    }
    until("all arrive", || inbox.len() == 1000);
    until("all acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    assert_eq!(client.stats().peers[0].dials, 1, "the receiver was found silent");
    client.stop();
    server.stop();
}

#[test]
fn a_message_that_the_receiver_does_not_take_is_reported_and_holds_up_nothing() {
    let limits = Limits { max_frame: 20_000, ..Limits::default() };
    let (server, inbox, address) = listener(Config { limits, ..Config::default() });
    let client = engine(Config::default());
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    for n in 0..30 {
        let size = if n % 10 == 5 { 30_000 } else { 64 };
        send(&client, &address, of_size(n, size)).unwrap();
    }
    send(&client, &address, of_size(30, LARGE)).unwrap();
    until("all that fit arrive", || inbox.len() == 27);
    until("the others are reported", || client.stats().undelivered == 4);
    assert_eq!(numbered(&inbox, false), (0..30).filter(|n| n % 10 != 5).collect::<Vec<_>>());
    assert_eq!(client.stats().peers[0].unacknowledged_bytes, 0);
    assert_eq!(client.stats().peers[0].dials, 1);
    for event in events.events.lock().unwrap().iter() {
        assert!(matches!(event, Event::Undelivered { reason: UndeliveredReason::Rejected, .. }), "{event:?}");
    }
    client.stop();
    server.stop();
}

#[test]
fn a_receiver_that_was_restarted_says_so() {
    let (server, _, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let client = engine(Config::default());
    for n in 0..10 {
        send(&client, &address.to_string(), message(Publish, n, TIMEOUT)).unwrap();
    }
    until("acknowledged", || client.stats().peers[0].acknowledged == 10);
    server.stop();
    drop(server);
    let server = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(Inbox::default());
    server.set_handler(Some(inbox.clone()));
    server.listen(Listen::default()).unwrap();
    for n in 10..20 {
        send(&client, &address.to_string(), message(Publish, n, TIMEOUT)).unwrap();
    }
    until("all arrive", || inbox.len() >= 10);
    assert_eq!(inbox.numbers(), (10..20).collect::<Vec<_>>());
    let restarted = |event: &&Event| matches!(event, Event::SessionRestarted { .. });
    assert_eq!(inbox.events.lock().unwrap().iter().filter(restarted).count(), 1);
    client.stop();
    server.stop();
}

#[test]
fn a_kept_token_does_not_keep_the_port() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    let store = Message { kind: Store, ..of_size(1, 64) };
    let store = Message { frame: frame(Store, 1, 64), ..store };
    send(&client, &address, store).unwrap();
    until("it arrives", || inbox.len() == 1);
    let token = inbox.messages.lock().unwrap().pop().unwrap().reply.expect("a store is answered");
    server.stop();
    drop(server);
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let again = engine(Config { port, ..Config::default() });
    assert_eq!(token.reply(frame(Store, 1, 64)), Err(ReplyError::Gone));
    client.stop();
    again.stop();
}
