//! What expensive frames of one sender cost the others: they are handed over one at a time, off the threads that move
//! packets, and their senders take turns.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{PATIENCE, engine, listener, message, number, request, send, until, wide};
use macula_peer::{Config, Engine, Event, Fingerprint, Handler, Inbound, Listen, Message, RequestError, Unhandled};
use macula_peer_wire::MessageType::{Ping, Pong, Publish};

/// More terms than are handed over at once, and less than 64 KiB.
const MANY: usize = 12_000;

/// Takes its time for what is much work, as decoding does, and answers pings.
#[derive(Default)]
struct Slow {
    took: Duration,
    working: AtomicUsize,
    most: AtomicUsize,
    handled: Mutex<Vec<(Option<Fingerprint>, u64)>>,
}

impl Handler for Slow {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        if message.kind == Ping {
            let _ = message.reply.expect("a request").reply(crate::common::frame(Pong, 0, 8));
            return Ok(());
        }
        if message.payload.len() > MANY {
            self.most.fetch_max(self.working.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            std::thread::sleep(self.took);
            self.working.fetch_sub(1, Ordering::Relaxed);
        }
        self.handled.lock().unwrap().push((message.key, number(&message.payload).unwrap()));
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

/// With one thread that moves packets.
fn slow(took: Duration) -> (Engine, Arc<Slow>, String) {
    let engine = engine(Config { workers: 1, ..Config::default() });
    let handler = Arc::new(Slow { took, ..Slow::default() });
    engine.set_handler(Some(handler.clone()));
    let port = engine.listen(Listen::default()).unwrap().port();
    (engine, handler, format!("127.0.0.1:{port}"))
}

#[test]
fn an_expensive_frame_delays_no_packets() {
    let (server, handler, address) = slow(Duration::from_millis(1500));
    let [sender, other] = [(); 2].map(|()| engine(Config::default()));
    let ping = || request(&other, &address, message(Ping, 0, PATIENCE)).map(drop);
    ping().unwrap();
    send(&sender, &address, wide(1, MANY)).unwrap();
    until("it is worked on", || handler.working.load(Ordering::Relaxed) == 1);
    let begun = Instant::now();
    for n in 0..20 {
        ping().unwrap();
        send(&other, &address, message(Publish, 100 + n, PATIENCE)).unwrap();
    }
    let took = begun.elapsed();
    assert_eq!(handler.working.load(Ordering::Relaxed), 1, "still, after {took:?}");
    until("all is handled", || handler.handled.lock().unwrap().len() == 21);
    let last = *handler.handled.lock().unwrap().last().unwrap();
    assert_eq!(last, (Some(sender.fingerprint()), 1), "small messages of others do not wait");
    until("it is acknowledged", || crate::common::owes_nothing(&sender));
    for engine in [sender, other, server] {
        engine.stop();
    }
}

#[test]
fn expensive_frames_are_decoded_one_at_a_time_and_senders_take_turns() {
    let (server, handler, address) = slow(Duration::from_millis(50));
    let [greedy, modest] = [(); 2].map(|()| engine(Config::default()));
    // As requests, so that each has its own stream and waits independently.
    let ask = |engine: &Engine, n| {
        let target = macula_peer::Target::Endpoint(macula_peer::EndpointRef::parse(&address).unwrap());
        let asked = Message { deadline: Some(Instant::now() + PATIENCE), ..wide(n, MANY) };
        engine.request(&target, asked, |_| {});
    };
    (0..30).for_each(|n| ask(&greedy, n));
    until("some are handled", || handler.handled.lock().unwrap().len() >= 3);
    let before = handler.handled.lock().unwrap().len();
    ask(&modest, 1000);
    let place = || handler.handled.lock().unwrap().iter().position(|&(_, n)| n == 1000);
    until("it is handled", || place().is_some());
    // The connection, the frame in progress, and one more of each sender.
    assert!(place().unwrap() <= before + 8, "{:?} after {before}", place());
    until("all are", || handler.handled.lock().unwrap().len() == 31);
    assert_eq!(handler.most.load(Ordering::Relaxed), 1);
    for engine in [greedy, modest, server] {
        engine.stop();
    }
}

#[test]
fn messages_of_one_sender_stay_in_order_whatever_they_cost() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    for n in 0..300 {
        let message = if n % 7 == 3 { wide(n, MANY) } else { message(Publish, n, PATIENCE) };
        send(&client, &address, message).unwrap();
    }
    until("all arrive", || inbox.len() == 300);
    assert_eq!(inbox.disorder(), None);
    until("all are acknowledged", || crate::common::owes_nothing(&client));
    assert_eq!(client.stats().undelivered, 0);
    client.stop();
    server.stop();
}

/// Answers become terms too. The caller keeps its timeout, and small answers do not wait.
#[test]
fn a_large_answer_waits_for_its_turn_within_the_callers_timeout() {
    let (client, handler, its_address) = slow(Duration::from_millis(1500));
    let (server, _, address) = listener(Config::default());
    server.set_handler(Some(Arc::new(Answers)));
    let ask = |n, within| request(&client, &address, message(Ping, n, within)).map(|answer| number(answer.payload()));
    assert!(matches!(ask(1, PATIENCE), Ok(Some(1))));
    let sender = engine(Config::default());
    send(&sender, &its_address, wide(2, MANY)).unwrap();
    until("it is worked on", || handler.working.load(Ordering::Relaxed) == 1);
    assert!(matches!(ask(1, Duration::from_millis(200)), Err(RequestError::Timeout)), "a large one");
    assert!(matches!(ask(0, PATIENCE), Ok(Some(0))), "a small one");
    assert_eq!(handler.working.load(Ordering::Relaxed), 1, "still");
    assert!(matches!(ask(1, PATIENCE), Ok(Some(1))));
    assert_eq!(handler.working.load(Ordering::Relaxed), 0);
    for engine in [sender, client, server] {
        engine.stop();
    }
}

/// Answers 1 with many terms.
struct Answers;

impl Handler for Answers {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        let asked = number(&message.payload).unwrap();
        let answer = if asked == 1 { wide(1, MANY).frame } else { crate::common::frame(Pong, asked, 8) };
        let _ = message.reply.expect("a request").reply(answer);
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}
