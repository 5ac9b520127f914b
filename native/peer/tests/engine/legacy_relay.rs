//! A relay that speaks only `macula` (a legacy relay) gets a node's messages itself.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::raw::macula_server;
use crate::common::{
    Forwarder, Inbox, endpoint, engine, frame, listener, message, node_id, number, over, send_to_node, until,
};
use macula_peer::{Candidates, Config, Delivery, Event, Message, PeerName, SendError, UndeliveredReason, Verify};
use macula_peer_wire::MessageType::Publish;
use macula_peer_wire::{Limits, Reassembler};
use quinn::Connection;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A gateway that allows `streams` streams: its runtime, its endpoint, and the numbers of the messages it got.
fn gateway(streams: u32) -> (tokio::runtime::Runtime, String, Arc<Mutex<Vec<u64>>>) {
    let numbers = Arc::new(Mutex::new(Vec::new()));
    let got = numbers.clone();
    let (runtime, address) = macula_server(streams, move |connection| serve(connection, got.clone()));
    (runtime, address.to_string(), numbers)
}

async fn serve(connection: Connection, got: Arc<Mutex<Vec<u64>>>) {
    while let Ok((_send, mut receive)) = connection.accept_bi().await {
        let got = got.clone();
        tokio::spawn(async move {
            let mut frames = Reassembler::new(Limits::default());
            while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
                frames.push(chunk.bytes);
                while let Ok(Some(frame)) = frames.next_frame() {
                    got.lock().unwrap().push(number(frame.payload()).unwrap());
                }
            }
        });
    }
}

/// Passing such a message on could deliver it twice.
#[test]
fn at_most_once_holds_when_messages_move_to_a_legacy_relay() {
    let (server, inbox, direct) = listener(Config::default());
    let forwarder = Forwarder::new(direct.parse().unwrap(), 1, 0.0, Duration::ZERO);
    let (gateway, gateway_address, passed_on) = gateway(100);
    let sender = engine(Config {
        delivery: Delivery::AtMostOnce,
        connect_timeout: Duration::from_secs(1),
        // Messages for a node whose key is known go to no other node.
        verify: Verify::None,
        ..Config::default()
    });
    let events = Arc::new(Inbox::default());
    sender.set_handler(Some(events.clone()));
    let candidates =
        Candidates { endpoints: vec![endpoint(&forwarder.address.to_string())], ..over(&[&gateway_address]) };
    let send = |n| send_to_node(&sender, "target", candidates.clone(), message(Publish, n, TIMEOUT));
    send(0).unwrap();
    until("acknowledged", || sender.stats().peers[0].unacknowledged_bytes == 0 && inbox.len() == 1);
    forwarder.swallow(true);
    send(1).unwrap();
    until("the silence is noticed", || sender.stats().peers[0].link.is_none());
    send(2).unwrap();
    until("passed on", || passed_on.lock().unwrap().contains(&2));
    let peer = PeerName::Node(node_id("target"));
    let lost = Event::Undelivered { peer, count: 1, reason: UndeliveredReason::LinkLost };
    let mut events = std::mem::take(&mut *events.events.lock().unwrap());
    events.retain(|event| !matches!(event, Event::Path { .. }));
    assert_eq!(events, [lost]);
    assert_eq!(*passed_on.lock().unwrap(), [2]);
    sender.stop();
    server.stop();
    gateway.shutdown_background();
}

/// The relay took the waiting messages, which made room for more to wait.
#[test]
fn a_legacy_relay_holds_no_more_than_any_peer() {
    let (gateway, address, _) = gateway(0);
    let sender = engine(Config { max_unacknowledged: 50_000, ..Config::default() });
    let call = |n| {
        let deadline = Some(Instant::now() + Duration::from_secs(2));
        let message = Message { frame: frame(Publish, n, 10_000), kind: Publish, deadline, key: None };
        send_to_node(&sender, "target", over(&[&address]), message)
    };
    let call = &call;
    let held = || sender.stats().peers.iter().map(|peer| peer.unacknowledged_bytes).max();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let first = scope.spawn(move || call(0));
        until("the call waits at the legacy relay", || sender.stats().peers.len() == 2);
        let calls: Vec<_> = (1..20).map(|n| scope.spawn(move || call(n))).collect();
        until("some are refused", || calls.iter().any(|call| call.is_finished()));
        assert!(held() <= Some(50_000), "{:?}", held());
        [first].into_iter().chain(calls).map(|call| call.join().unwrap()).collect()
    });
    let refused = outcomes.iter().filter(|&outcome| *outcome == Err(SendError::Overloaded)).count();
    assert!((1..20).contains(&refused), "{outcomes:?}");
    until("nothing is held", || held() == Some(0));
    sender.stop();
    gateway.shutdown_background();
}
