//! Between nodes that run this library: in order and exactly once, over any sequence of links.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::raw::{map, raw_frame};
use crate::common::{
    Forwarder, Inbox, deep, endpoint, engine, frame, listener, member, message, number, over, relay, request, send,
    send_to_node, until, wide,
};
use macula_peer::{
    Config, Delivery, EndpointRef, Engine, Event, Listen, Message, Path, Rejection, ReplyError, RequestError,
    SendError, Target, UndeliveredReason,
};
use macula_peer_wire::Limits;
use macula_peer_wire::MessageType::{Ping, Pong, Publish, Store};

const TIMEOUT: Duration = Duration::from_secs(60);

const TOO_LARGE: UndeliveredReason = UndeliveredReason::Rejected(Rejection::TooLarge);

/// From this size on messages are numbered apart.
const LARGE: usize = 64 << 10;

fn numbered(inbox: &Inbox, large: bool) -> Vec<u64> {
    let messages = inbox.messages.lock().unwrap();
    messages.iter().filter(|m| (m.payload.len() >= LARGE) == large).filter_map(|m| number(&m.payload)).collect()
}

/// How many messages came over each connection. If this host starved one of the two, the other may have begun to
/// redial, which is fine; a message that had to go over another connection is an error.
fn over_each(server: &Engine) -> Vec<u64> {
    server.stats().accepted.iter().map(|accepted| accepted.received).filter(|received| *received > 0).collect()
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
fn above_the_bound_callers_wait_and_then_get_overloaded() {
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

/// Only their frames were counted, a tenth of what they cost.
#[test]
fn tiny_messages_are_bounded_by_what_is_kept_of_them() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config { max_unacknowledged: 100_000, ..Config::default() });
    send(&client, &endpoint, of_size(0, 64)).unwrap();
    until("acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    forwarder.swallow(true);
    let tiny = map(Publish, &[]);
    let target = Target::Endpoint(EndpointRef::parse(&endpoint).unwrap());
    let message = || Message { frame: tiny.clone(), kind: Publish, deadline: None, key: None };
    let accepted = (0..10_000).take_while(|_| client.send_now(&target, message(), Instant::now()).is_ok()).count();
    assert!((500..1000).contains(&accepted), "{accepted} in 100,000 bytes");
    forwarder.swallow(false);
    until("all arrive", || inbox.len() == accepted + 1);
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
    assert_eq!(over_each(&server), [1000], "the receiver was found silent");
    client.stop();
    server.stop();
}

#[test]
fn a_message_that_the_receiver_refuses_is_reported_and_delays_nothing() {
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
    until("the rest is acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    assert_eq!(over_each(&server), [27]);
    for event in events.events.lock().unwrap().iter() {
        assert!(matches!(event, Event::Undelivered { reason: TOO_LARGE, .. }), "{event:?}");
    }
    client.stop();
    server.stop();
}

/// Before, it was acknowledged like any other.
#[test]
fn a_message_that_is_too_deep_or_has_too_many_terms_is_reported_and_the_session_goes_on() {
    let limits = Limits { max_depth: 8, max_terms: 1000, ..Limits::default() };
    let (server, inbox, address) = listener(Config { limits, ..Config::default() });
    let client = engine(Config::default());
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    let unknown = raw_frame(0x7F, &[0xC0]);
    for n in (0..60).step_by(6) {
        for message in [
            message(Publish, n, TIMEOUT),
            deep(n + 1, 8),
            deep(n + 2, 9),
            wide(n + 3, 1000),
            wide(n + 4, 1001),
            Message { frame: unknown.clone().into(), ..message(Publish, n + 5, TIMEOUT) },
        ] {
            send(&client, &address, message).unwrap();
        }
    }
    until("all that can be taken arrive", || inbox.len() == 30);
    assert_eq!(numbered(&inbox, false), (0..60).filter(|n| [0, 1, 3].contains(&(n % 6))).collect::<Vec<_>>());
    until("the others are reported", || client.stats().undelivered == 30);
    for why in [Rejection::TooDeep, Rejection::TooManyTerms, Rejection::Malformed] {
        assert_eq!(undelivered(&events, UndeliveredReason::Rejected(why)), 10, "{why:?}");
    }
    until("nothing is held", || client.stats().peers[0].unacknowledged_bytes == 0);
    assert_eq!(over_each(&server), [60], "over one connection");
    assert_eq!((client.stats().peers[0].failed, server.stats().malformed), (30, 30));
    client.stop();
    server.stop();
}

#[test]
fn a_request_that_cannot_be_taken_fails_at_once_and_says_why() {
    let limits = Limits { max_depth: 8, max_terms: 1000, max_frame: 20_000 };
    let (server, inbox, address) = listener(Config { limits, ..Config::default() });
    let client = engine(Config::default());
    let begun = Instant::now();
    let unknown = Message { frame: raw_frame(0x7F, &[0xC0]).into(), ..message(Ping, 0, TIMEOUT) };
    for (asked, why) in [
        (deep(1, 9), Rejection::TooDeep),
        (wide(2, 1001), Rejection::TooManyTerms),
        (of_size(3, 30_000), Rejection::TooLarge),
        (of_size(4, 4 << 20), Rejection::TooLarge),
        (unknown, Rejection::Malformed),
    ] {
        let answer = request(&client, &address, asked);
        assert!(matches!(answer, Err(RequestError::Rejected(said)) if said == why), "{answer:?} {why:?}");
    }
    assert!(begun.elapsed() < TIMEOUT / 6, "{:?}", begun.elapsed());
    assert_eq!(inbox.len(), 0);
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

fn restarts(inbox: &Inbox) -> usize {
    let restarted = |event: &&Event| matches!(event, Event::SessionRestarted { .. });
    inbox.events.lock().unwrap().iter().filter(restarted).count()
}

fn undelivered(inbox: &Inbox, expected: UndeliveredReason) -> u64 {
    let events = inbox.events.lock().unwrap();
    let counts = events.iter().filter_map(|event| match event {
        Event::Undelivered { count, reason, .. } if *reason == expected => Some(count),
        _ => None,
    });
    counts.sum()
}

fn path(engine: &Engine) -> Option<Path> {
    engine.stats().peers.first().and_then(|peer| peer.link.as_ref().map(|link| link.path))
}

/// The streams that were dropped with the old path were finished, and the receiver took that for the session's end.
#[test]
fn a_path_that_is_replaced_does_not_end_the_session() {
    let (relay, relay_address) = relay(0);
    let (target, inbox) = member("target", &[&relay_address]);
    let direct = target.listen(Listen::default()).unwrap().port();
    let forwarder = Forwarder::new(([127, 0, 0, 1], direct).into(), 7, 0.0, Duration::ZERO);
    let sender = engine(Config::default());
    let send = |n, candidates| send_to_node(&sender, "target", candidates, message(Publish, n, TIMEOUT)).unwrap();
    send(0, over(&[&relay_address]));
    until("it arrives", || inbox.len() == 1);
    let mut candidates = over(&[&relay_address]);
    candidates.endpoints.push(endpoint(&forwarder.address.to_string()));
    sender.learn(&crate::common::node_id("target"), candidates.clone());
    until("on the direct path", || path(&sender) == Some(Path::Direct));
    send(1, candidates.clone());
    until("it arrives", || inbox.len() == 2);
    forwarder.swallow(true);
    send(2, candidates.clone());
    until("on another path", || inbox.len() == 3);
    send(3, candidates.clone());
    until("it arrives", || inbox.len() == 4);
    assert_eq!(numbered(&inbox, false), [0, 1, 2, 3]);
    assert_eq!(restarts(&inbox), 0);
    for engine in [sender, target, relay] {
        engine.stop();
    }
}

/// What was read at once beyond a batch waited for the next bytes.
#[test]
fn many_tiny_messages_do_not_wait_for_the_next_one() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    send(&client, &address, of_size(0, 64)).unwrap();
    until("it arrives", || inbox.len() == 1);
    let tiny = map(Publish, &[]);
    for _ in 0..20_000 {
        let deadline = Some(Instant::now() + TIMEOUT);
        send(&client, &address, Message { frame: tiny.clone(), kind: Publish, deadline, key: None }).unwrap();
    }
    until("all arrive", || inbox.len() == 20_001);
    assert_eq!(over_each(&server), [20_001], "the receiver was never taken for silent");
    client.stop();
    server.stop();
}

/// A busy stream has the beginning of some frame buffered at all times.
#[test]
fn a_busy_stream_is_not_taken_for_a_slow_one() {
    let (server, inbox, address) = listener(Config { frame_timeout: Duration::from_millis(300), ..Config::default() });
    let client = engine(Config::default());
    let (begun, mut n) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_millis(1500) {
        send(&client, &address, of_size(n, 1000 + (n % 7) as usize)).unwrap();
        n += 1;
    }
    until("all arrive", || inbox.len() == n as usize);
    assert_eq!((over_each(&server), server.stats().malformed), (vec![n], 0));
    client.stop();
    server.stop();
}

/// The first channel made the session known, and so the second one's messages passed for messages to the same receiver.
#[test]
fn at_most_once_holds_for_large_messages_too_when_the_receiver_was_restarted() {
    let (server, _, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let forwarder = Forwarder::new(address, 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config { delivery: Delivery::AtMostOnce, ..Config::default() });
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    send(&client, &endpoint, of_size(0, 64)).unwrap();
    send(&client, &endpoint, of_size(1, LARGE)).unwrap();
    until("acknowledged", || client.stats().peers[0].acknowledged == 2);
    forwarder.swallow(true);
    send(&client, &endpoint, of_size(2, 64)).unwrap();
    send(&client, &endpoint, of_size(3, LARGE)).unwrap();
    server.stop();
    drop(server);
    let server = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(Inbox::default());
    server.set_handler(Some(inbox.clone()));
    server.listen(Listen::default()).unwrap();
    forwarder.swallow(false);
    until("both are settled", || inbox.len() + client.stats().undelivered as usize == 2);
    send(&client, &endpoint, of_size(4, 64)).unwrap();
    send(&client, &endpoint, of_size(5, LARGE)).unwrap();
    until("the next ones arrive", || inbox.numbers().ends_with(&[4, 5]));
    assert_eq!(inbox.numbers(), [4, 5]);
    assert_eq!(undelivered(&events, UndeliveredReason::LinkLost), 2);
    assert_eq!(restarts(&inbox), 1, "said once, not for each channel");
    client.stop();
    server.stop();
}

#[test]
fn a_listener_that_allows_one_stream_is_sent_to_all_the_same() {
    let (server, inbox, address) = listener(Config { max_streams: 1, ..Config::default() });
    let client = engine(Config::default());
    send(&client, &address, of_size(0, 64)).unwrap();
    send(&client, &address, of_size(1, LARGE)).unwrap();
    until("both arrive", || inbox.numbers() == [0, 1]);
    client.stop();
    server.stop();
}

/// What was accepted behind a call that waited for room took that room, and waited for the call.
#[test]
fn smaller_messages_do_not_starve_one_that_waits_for_room() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = Arc::new(engine(Config { max_unacknowledged: 100_000, ..Config::default() }));
    send(&client, &endpoint, of_size(0, 64)).unwrap();
    until("acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
    forwarder.swallow(true);
    send(&client, &endpoint, of_size(1, 40_000)).unwrap();
    let sending = |n, size| {
        let (client, endpoint) = (client.clone(), endpoint.clone());
        std::thread::spawn(move || send(&client, &endpoint, of_size(n, size)))
    };
    let mut sent = vec![sending(2, 90_000)];
    until("it waits for room", || client.stats().peers[0].unacknowledged_bytes > 130_000);
    for n in 3..8 {
        sent.push(sending(n, 1_800));
        std::thread::sleep(Duration::from_millis(5));
    }
    for n in 8..40 {
        sent.push(sending(n, 1_000));
    }
    std::thread::sleep(Duration::from_millis(50));
    forwarder.swallow(false);
    until("all are answered", || sent.iter().all(|sender| sender.is_finished()));
    let accepted = sent.into_iter().map(|sender| sender.join().unwrap()).filter(Result::is_ok).count();
    until("all arrive", || inbox.len() == accepted + 2);
    assert!(inbox.numbers().contains(&2));
    client.stop();
    server.stop();
}

/// What had been queued while the link was suspect waited for another event.
#[test]
fn a_call_made_while_the_link_is_suspect_goes_out_when_it_is_heard_again() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = Arc::new(engine(Config::default()));
    for round in 0..2 {
        send(&client, &endpoint, of_size(round, 64)).unwrap();
        until("nothing is in flight", || client.stats().peers[0].unacknowledged_bytes == 0);
        forwarder.swallow(true);
        let calling = |n, asks| {
            let (client, endpoint) = (client.clone(), endpoint.clone());
            std::thread::spawn(move || match asks {
                true => drop(request(&client, &endpoint, message(Ping, n, Duration::from_secs(3)))),
                false => send(&client, &endpoint, of_size(n, 64)).unwrap(),
            })
        };
        let asked = calling(100, true);
        until("suspect", || client.stats().peers[0].link.is_none());
        let sent = calling(200, false);
        std::thread::sleep(Duration::from_millis(100));
        forwarder.swallow(false);
        let begun = Instant::now();
        until("it is sent", || sent.is_finished());
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        asked.join().unwrap();
        until("it arrives", || inbox.numbers().iter().filter(|&&n| n == 200).count() == round as usize + 1);
    }
    client.stop();
    server.stop();
}

/// The task went by what it had seen before the last acknowledgement.
#[test]
fn an_engine_with_nothing_in_flight_stops_at_once() {
    let (server, _, address) = listener(Config::default());
    for _ in 0..5 {
        let client = engine(Config::default());
        send(&client, &address, of_size(0, 64)).unwrap();
        // Long enough for the task to look while something is in flight.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(50) {
            send(&client, &address, of_size(1, 64)).unwrap();
        }
        while client.stats().peers[0].unacknowledged_bytes > 0 {
            std::thread::yield_now();
        }
        let begun = Instant::now();
        client.stop();
        assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
    }
    server.stop();
}

#[test]
fn answers_without_stream_credit_do_not_keep_the_engine_from_stopping() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    for n in 0..200 {
        send(&client, &endpoint, message(Store, n, TIMEOUT)).unwrap();
    }
    until("all arrive", || inbox.len() == 200);
    forwarder.swallow(true);
    for message in inbox.messages.lock().unwrap().iter() {
        assert_eq!(message.reply.as_ref().unwrap().reply(frame(Pong, 0, 64)), Ok(()));
    }
    let begun = Instant::now();
    server.stop();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    client.stop();
}

#[test]
fn an_unused_relayed_path_leaves_no_circuit() {
    let (relay, relay_address) = relay(0);
    let (target, inbox) = member("target", &[&relay_address]);
    let direct = endpoint(&format!("127.0.0.1:{}", target.listen(Listen::default()).unwrap().port()));
    let (other, _, other_address) = listener(Config::default());
    let sender = engine(Config { pool_size: 1, ..Config::default() });
    send_to_node(&sender, "target", over(&[&relay_address]), message(Publish, 0, TIMEOUT)).unwrap();
    until("it arrives", || inbox.len() == 1);
    assert_eq!(relay.stats().relay.unwrap().circuits, 1);
    let mut candidates = over(&[&relay_address]);
    candidates.endpoints.push(direct);
    sender.learn(&crate::common::node_id("target"), candidates);
    until("on the direct path", || path(&sender) == Some(Path::Direct));
    // While the path that was replaced is still there.
    send(&sender, &other_address, of_size(0, 64)).unwrap();
    until("the circuit ends", || relay.stats().relay.unwrap().circuits == 0);
    for engine in [sender, target, relay, other] {
        engine.stop();
    }
}

#[test]
fn messages_that_expired_before_they_arrived_are_not_taken_for_a_restart() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    // It makes a link that carries no message yet.
    assert!(request(&client, &endpoint, message(Ping, 0, Duration::from_millis(300))).is_err());
    forwarder.swallow(true);
    for n in 1..4 {
        send(&client, &endpoint, message(Publish, n, Duration::from_millis(900))).unwrap();
    }
    until("given up", || client.stats().undelivered == 3);
    forwarder.swallow(false);
    send(&client, &endpoint, of_size(4, 64)).unwrap();
    until("the next one arrives", || inbox.numbers().contains(&4));
    assert_eq!(inbox.numbers(), [0, 4]);
    assert_eq!(restarts(&inbox), 0);
    client.stop();
    server.stop();
}

/// It was sent again and again, and nothing passed it.
#[test]
fn a_message_that_the_receiver_cannot_take_is_reported_and_holds_up_no_other() {
    let limits = Limits { max_frame: 200_000, ..Limits::default() };
    let (server, inbox, address) = listener(Config { limits, ..Config::default() });
    let client = engine(Config::default());
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    let sizes = [64, LARGE, 300_000, 64, LARGE, LARGE];
    for (n, size) in sizes.into_iter().enumerate() {
        send(&client, &address, of_size(n as u64, size)).unwrap();
    }
    until("all others arrive", || inbox.len() == 5);
    assert_eq!((numbered(&inbox, false), numbered(&inbox, true)), (vec![0, 3], vec![1, 4, 5]));
    until("it is reported", || undelivered(&events, TOO_LARGE) == 1);
    assert_eq!(client.stats().undelivered, 1);
    until("nothing is held", || client.stats().peers[0].unacknowledged_bytes == 0);
    client.stop();
    server.stop();
}
