//! Everything at once, by a seed: silences, small pools, links that idle, restarts, stops in the middle.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{
    Forwarder, Inbox, endpoint, engine, frame, listener, member, number, over, relay, send, send_to_node, until,
};
use macula_peer::{Config, Delivery, Engine, Event, Listen, Message, SendError};
use macula_peer_wire::MessageType::Publish;

const TIMEOUT: Duration = Duration::from_secs(60);
const SENDERS: u64 = 3;

/// A message's number also identifies its sender.
const SENDER: u64 = 1 << 32;

fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    seed.unwrap_or(7)
}

fn size(random: &mut fastrand::Rng) -> usize {
    match random.u8(0..100) {
        0..2 => random.usize(64 << 10..400 << 10),
        2..20 => random.usize(1000..20_000),
        _ => random.usize(0..200),
    }
}

fn send_some(client: &Engine, endpoints: &[String], seed: u64, total: u64) -> Vec<Vec<u64>> {
    let send_all = |sender: u64| {
        let mut random = fastrand::Rng::with_seed(seed ^ sender);
        let mut sent = vec![Vec::new(); endpoints.len()];
        for n in 0..total {
            let to = random.usize(..endpoints.len());
            let number = sender * SENDER + n;
            let deadline = random.bool().then(|| Instant::now() + TIMEOUT);
            let frame = frame(Publish, number, size(&mut random));
            match send(client, &endpoints[to], Message { frame, kind: Publish, deadline, key: None }) {
                Ok(()) => sent[to].push(number),
                Err(SendError::Connect(_) | SendError::Overloaded) => {}
                Err(error) => panic!("SEED={seed}: {error}"),
            }
            if random.u8(..20) == 0 {
                std::thread::sleep(Duration::from_millis(random.u64(0..20)));
            }
        }
        sent
    };
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS).map(|sender| scope.spawn(move || send_all(sender))).collect();
        let mut all = vec![Vec::new(); endpoints.len()];
        for sender in senders {
            for (all, sent) in all.iter_mut().zip(sender.join().unwrap()) {
                all.extend(sent);
            }
        }
        all
    })
}

/// By sender and channel, in the order of arrival.
fn arrived(inbox: &Inbox) -> HashMap<(u64, bool), Vec<u64>> {
    let mut arrived: HashMap<_, Vec<u64>> = HashMap::new();
    for message in inbox.messages.lock().unwrap().iter() {
        let number = number(&message.payload).unwrap();
        let large = message.payload.len() + 8 >= 64 << 10;
        arrived.entry((number / SENDER, large)).or_default().push(number);
    }
    arrived
}

fn stop(engine: &Engine, seed: u64) {
    let begun = Instant::now();
    engine.stop();
    assert!(begun.elapsed() < Duration::from_secs(3), "SEED={seed}: {:?} to stop", begun.elapsed());
}

/// Swallows now and then, until it is told to end.
fn disturb(forwarders: &[Forwarder], seed: u64, over: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(seed);
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(random.u64(10..600)));
        let forwarder = &forwarders[random.usize(..forwarders.len())];
        forwarder.swallow(true);
        std::thread::sleep(Duration::from_millis(random.u64(0..1500)));
        forwarder.swallow(false);
    }
}

fn in_order_and_once(client: Config, receivers: usize, total: u64) {
    let seed = seed();
    let servers: Vec<_> = (0..receivers).map(|_| listener(Config::default())).collect();
    let delay = Duration::from_millis(seed % 3);
    let forwarder = |address: &String| Forwarder::new(address.parse().unwrap(), seed, 0.02, delay);
    let forwarders: Vec<_> = servers.iter().map(|(_, _, address)| forwarder(address)).collect();
    let endpoints: Vec<_> = forwarders.iter().map(|forwarder| forwarder.address.to_string()).collect();
    let client = engine(client);
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    let over = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        scope.spawn(|| disturb(&forwarders, seed, &over));
        let sent = send_some(&client, &endpoints, seed, total);
        over.store(true, Ordering::Relaxed);
        sent
    });
    for ((_, inbox, _), sent) in servers.iter().zip(&sent) {
        let begun = Instant::now();
        while inbox.len() < sent.len() && begun.elapsed() < common::PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut expected: HashMap<_, Vec<u64>> = HashMap::new();
        for ((sender, large), arrived) in arrived(inbox) {
            let disorder = arrived.windows(2).find(|pair| pair[0] >= pair[1]);
            assert_eq!(disorder, None, "SEED={seed} sender {sender} large {large}");
            expected.entry(sender).or_default().extend(arrived);
        }
        let mut arrived: Vec<u64> = expected.into_values().flatten().collect();
        arrived.sort_unstable();
        let missing: Vec<_> = sent.iter().filter(|n| arrived.binary_search(n).is_err()).collect();
        assert!(missing.is_empty(), "SEED={seed}: {} missing: {missing:?} {:?}", missing.len(), client.stats());
        assert_eq!(arrived.len(), sent.len(), "SEED={seed}");
    }
    until("nothing is held", || common::owes_nothing(&client));
    // Links come and go, and that is told.
    events.events.lock().unwrap().retain(|event| !matches!(event, Event::Path { .. }));
    assert_eq!(*events.events.lock().unwrap(), [], "SEED={seed}: nothing is lost");
    for (_, inbox, _) in &servers {
        assert_eq!(*inbox.events.lock().unwrap(), [], "SEED={seed}: no node was restarted");
    }
    stop(&client, seed);
    for (server, ..) in &servers {
        stop(server, seed);
    }
}

/// A handshake whose packets were swallowed is soon repeated.
fn impatient() -> Config {
    Config { connect_timeout: Duration::from_secs(3), ..Config::default() }
}

#[test]
fn through_silences() {
    in_order_and_once(impatient(), 2, 2000);
}

#[test]
fn with_a_pool_that_is_too_small() {
    in_order_and_once(Config { pool_size: 1, ..impatient() }, 3, 1000);
}

#[test]
fn with_links_that_are_closed_when_they_are_idle_for_a_moment() {
    in_order_and_once(Config { idle_timeout: Duration::from_millis(5), ..impatient() }, 2, 1000);
}

#[test]
fn with_little_room() {
    in_order_and_once(Config { max_unacknowledged: 500_000, ..impatient() }, 2, 2000);
}

#[test]
fn a_stopping_engine_delivers_or_reports_each_message() {
    let seed = seed();
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), seed, 0.02, Duration::from_millis(1));
    let endpoint = forwarder.address.to_string();
    let client = Arc::new(engine(Config::default()));
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (client, endpoint) = (client.clone(), endpoint.clone());
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed ^ sender);
                let mut accepted = 0;
                loop {
                    let frame = frame(Publish, sender * SENDER + accepted, size(&mut random));
                    match send(&client, &endpoint, Message { frame, kind: Publish, deadline: None, key: None }) {
                        Ok(()) => accepted += 1,
                        Err(SendError::Stopped) => return accepted,
                        Err(error) => panic!("SEED={seed}: {error}"),
                    }
                }
            })
        })
        .collect();
    let mut random = fastrand::Rng::with_seed(seed);
    until("some arrive", || inbox.len() > 100);
    std::thread::sleep(Duration::from_millis(random.u64(0..300)));
    forwarder.swallow(random.bool());
    std::thread::sleep(Duration::from_millis(random.u64(0..800)));
    stop(&client, seed);
    let accepted: u64 = senders.into_iter().map(|sender| sender.join().unwrap()).sum();
    forwarder.swallow(false);
    std::thread::sleep(Duration::from_millis(200));
    let reported = client.stats().undelivered;
    let arrived = inbox.len() as u64;
    assert!(arrived <= accepted, "SEED={seed}: {arrived} of {accepted} arrived");
    assert!(arrived + reported >= accepted, "SEED={seed}: {accepted} accepted, {arrived} arrived, {reported} reported");
    stop(&server, seed);
}

/// What was sent and what arrived, sorted, and how much was reported, with a receiver that is killed again and again.
fn through_restarts(delivery: Delivery, seed: u64) -> (Vec<u64>, Vec<u64>, u64) {
    let (server, inbox, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let forwarder = Forwarder::new(address, seed, 0.01, Duration::from_millis(1));
    let endpoints = [forwarder.address.to_string()];
    let client = engine(Config { delivery, ..impatient() });
    let over = AtomicBool::new(false);
    let (server, sent) = std::thread::scope(|scope| {
        let restarting = scope.spawn(|| {
            let (mut server, mut random) = (server, fastrand::Rng::with_seed(seed));
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(random.u64(50..1000)));
                forwarder.swallow(random.bool());
                server.stop();
                drop(server);
                std::thread::sleep(Duration::from_millis(random.u64(0..300)));
                server = engine(Config { port: address.port(), ..Config::default() });
                server.set_handler(Some(inbox.clone()));
                server.listen(Listen::default()).unwrap();
                forwarder.swallow(false);
            }
            server
        });
        let sent = send_some(&client, &endpoints, seed, 1500);
        over.store(true, Ordering::Relaxed);
        (restarting.join().unwrap(), sent)
    });
    until("nothing is held", || common::owes_nothing(&client));
    let reported = client.stats().undelivered;
    stop(&client, seed);
    stop(&server, seed);
    let mut sent = sent.concat();
    sent.sort_unstable();
    (sent, inbox.numbers(), reported)
}

#[test]
fn no_message_is_lost_to_receivers_that_are_killed() {
    let seed = seed();
    let (sent, arrived, reported) = through_restarts(Delivery::AtLeastOnce, seed);
    // What the receiver had handed over and not acknowledged came twice; what it had read and not handed over, again.
    let missing: Vec<_> = sent.iter().filter(|n| arrived.binary_search(n).is_err()).collect();
    assert!(missing.is_empty(), "SEED={seed}: {missing:?}");
    assert_eq!(reported, 0, "SEED={seed}");
}

#[test]
fn at_most_once_holds_for_receivers_that_are_killed() {
    let seed = seed();
    let (sent, arrived, reported) = through_restarts(Delivery::AtMostOnce, seed);
    let twice: Vec<_> = arrived.windows(2).filter(|pair| pair[0] == pair[1]).collect();
    assert!(twice.is_empty(), "SEED={seed}: {twice:?}");
    let missing = sent.iter().filter(|n| arrived.binary_search(n).is_err()).count() as u64;
    assert!(missing <= reported, "SEED={seed}: {missing} missing, {reported} reported");
}

#[test]
fn engines_stop_in_the_middle_of_relayed_messages() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let (relay, address) = relay(0);
    let (target, inbox) = member("target", &[&address]);
    let mut candidates = over(&[&address]);
    if random.bool() {
        let port = target.listen(Listen::default()).unwrap().port();
        candidates.endpoints.push(endpoint(&format!("127.0.0.1:{port}")));
    }
    let sender = engine(Config::default());
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..SENDERS {
            let (sender, candidates, ended) = (&sender, &candidates, &ended);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed ^ number);
                while !ended.load(Ordering::Relaxed) {
                    let frame = frame(Publish, number, size(&mut random));
                    let deadline = Some(Instant::now() + Duration::from_secs(3));
                    let message = Message { frame, kind: Publish, deadline, key: None };
                    // Sent or refused: that it ends is what is asked.
                    let _ = send_to_node(sender, "target", candidates.clone(), message);
                }
            });
        }
        until("some arrive", || inbox.len() > 50);
        std::thread::sleep(Duration::from_millis(random.u64(0..500)));
        let mut engines = [&relay, &target, &sender];
        random.shuffle(&mut engines);
        for engine in engines {
            stop(engine, seed);
            std::thread::sleep(Duration::from_millis(random.u64(0..300)));
        }
        ended.store(true, Ordering::Relaxed);
    });
}
