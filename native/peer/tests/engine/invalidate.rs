//! An invalidated link is closed, and no message is lost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::raw::macula_server;
use crate::common::{Forwarder, engine, frame, listener, message, number, request, send, until};
use macula_peer::{Config, Delivery, EndpointRef, Engine, Message, Target};
use macula_peer_wire::MessageType::{Ping, Publish};
use macula_peer_wire::{Limits, Reassembler};
use quinn::{RecvStream, SendStream};

const TIMEOUT: Duration = Duration::from_secs(20);

fn invalidate(engine: &Engine, endpoint: &str) {
    engine.invalidate(&Target::Endpoint(EndpointRef::parse(endpoint).unwrap()));
}

fn is_linked(engine: &Engine) -> bool {
    engine.stats().peers[0].link.is_some()
}

/// Speaks only `macula`: the numbers of what it got, and how many connections are open.
struct Gateway {
    runtime: tokio::runtime::Runtime,
    address: String,
    numbers: Arc<Mutex<Vec<u64>>>,
    open: Arc<AtomicUsize>,
}

/// One that answers a ping after so long.
fn gateway(answers_after: Duration) -> Gateway {
    let (numbers, open) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let (got, connections) = (numbers.clone(), open.clone());
    let (runtime, address) = macula_server(100, move |connection| {
        let (got, connections) = (got.clone(), connections.clone());
        async move {
            connections.fetch_add(1, Ordering::Relaxed);
            while let Ok((send, receive)) = connection.accept_bi().await {
                tokio::spawn(serve_stream(send, receive, got.clone(), answers_after));
            }
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    });
    Gateway { runtime, address: address.to_string(), numbers, open }
}

async fn serve_stream(
    mut send: SendStream,
    mut receive: RecvStream,
    got: Arc<Mutex<Vec<u64>>>,
    answers_after: Duration,
) {
    let mut frames = Reassembler::new(Limits::default());
    while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
        frames.push(chunk.bytes);
        while let Ok(Some(frame)) = frames.next_frame() {
            got.lock().unwrap().push(number(frame.payload()).unwrap());
            if frame.type_id() == Ping.id() {
                tokio::time::sleep(answers_after).await;
                let _ = send.write_all(&crate::common::frame(Ping, 7, 0)).await;
            }
        }
    }
}

/// Alternates a message of 3,000 bytes and a small one, which are sent differently.
fn send_and_invalidate(client: &Engine, endpoint: &str) {
    for n in 0..300 {
        let bytes = if n % 2 == 0 { 3000 } else { 10 };
        let deadline = Some(Instant::now() + TIMEOUT);
        send(client, endpoint, Message { frame: frame(Publish, n, bytes), kind: Publish, deadline, key: None })
            .unwrap();
        if n % 50 == 49 {
            invalidate(client, endpoint);
        }
    }
}

#[test]
fn in_a_session_each_message_arrives_once_and_in_order() {
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let (server, inbox, address) = listener(Config::default());
        let client = engine(Config { delivery, ..Config::default() });
        send_and_invalidate(&client, &address);
        until("all arrive", || inbox.len() >= 300);
        assert_eq!(inbox.disorder(), None);
        until("all acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
        invalidate(&client, &address);
        until("the connections end", || server.stats().accepted.is_empty());
        let stats = client.stats();
        assert_eq!((inbox.len(), stats.undelivered), (300, 0));
        assert!(stats.peers[0].dials >= 6, "{}", stats.peers[0].dials);
        client.stop();
        server.stop();
    }
}

/// At most once: what may have arrived would be lost, so this shows that what has arrived is waited for.
#[test]
fn a_gateway_gets_each_message_once() {
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let gateway = gateway(Duration::ZERO);
        let client = engine(Config { delivery, ..Config::default() });
        send_and_invalidate(&client, &gateway.address);
        until("all arrive", || gateway.numbers.lock().unwrap().len() >= 300);
        until("all acknowledged", || client.stats().peers[0].unacknowledged_bytes == 0);
        invalidate(&client, &gateway.address);
        until("the connections end", || gateway.open.load(Ordering::Relaxed) == 0);
        let mut numbers = std::mem::take(&mut *gateway.numbers.lock().unwrap());
        numbers.sort_unstable();
        assert_eq!(numbers, (0..300).collect::<Vec<_>>());
        assert_eq!(client.stats().undelivered, 0);
        client.stop();
        gateway.runtime.shutdown_background();
    }
}

#[test]
fn a_silent_link_is_given_up_within_its_patience() {
    let (server, inbox, address) = listener(Config::default());
    silent_link_is_given_up(&address, || inbox.numbers().contains(&1));
    server.stop();
}

#[test]
fn a_silent_link_to_a_gateway_is_given_up_within_its_patience() {
    let gateway = gateway(Duration::ZERO);
    silent_link_is_given_up(&gateway.address, || gateway.numbers.lock().unwrap().contains(&1));
    gateway.runtime.shutdown_background();
}

fn silent_link_is_given_up(address: &str, arrived: impl Fn() -> bool) {
    let forwarder = Forwarder::new(address.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, TIMEOUT)).unwrap();
    until("acknowledged", || client.stats().peers[0].acknowledged == 1);
    forwarder.swallow(true);
    send(&client, &endpoint, message(Publish, 1, TIMEOUT)).unwrap();
    invalidate(&client, &endpoint);
    assert!(!is_linked(&client), "at once, for callers");
    until("a new one is dialled", || client.stats().peers[0].dials == 2);
    forwarder.swallow(false);
    until("it arrives over the new one", arrived);
    assert_eq!(client.stats().undelivered, 0);
    client.stop();
}

#[test]
fn a_request_is_answered_over_its_own_link() {
    let gateway = gateway(Duration::from_millis(1500));
    let client = Arc::new(engine(Config::default()));
    let requester = {
        let (client, endpoint) = (client.clone(), gateway.address.clone());
        std::thread::spawn(move || request(&client, &endpoint, message(Ping, 5, TIMEOUT)))
    };
    until("asked", || *gateway.numbers.lock().unwrap() == [5]);
    invalidate(&client, &gateway.address);
    let answer = requester.join().unwrap().unwrap();
    assert_eq!(number(answer.payload()), Some(7));
    assert_eq!(*gateway.numbers.lock().unwrap(), [5], "asked once");
    client.stop();
    gateway.runtime.shutdown_background();
}

#[test]
fn invalidating_without_a_link_does_nothing() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    invalidate(&client, &address);
    assert!(client.stats().peers.is_empty());
    send(&client, &address, message(Publish, 0, TIMEOUT)).unwrap();
    invalidate(&client, &address);
    until("the link is gone", || server.stats().accepted.is_empty());
    invalidate(&client, &address);
    send(&client, &address, message(Publish, 1, TIMEOUT)).unwrap();
    until("both arrive", || inbox.numbers() == [0, 1]);
    client.stop();
    server.stop();
}
