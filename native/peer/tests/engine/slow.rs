//! Slow paths: slow messages still arrive, and do not delay the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Forwarder, Inbox, engine, frame, listener, number, request, send, until};
use macula_peer::{Config, Engine, Event, Handler, Inbound, Message, UndeliveredReason, Unhandled};
use macula_peer_wire::MessageType::{self, Ping, Pong, Publish, RpcReply, RpcRequest};

/// Bytes a second.
const RATE: usize = 150_000;

/// More than passes within [`STALL`].
const LARGE: usize = 500_000;

/// How long a frame may go without growing.
const STALL: Duration = Duration::from_millis(2500);

const TIMEOUT: Duration = Duration::from_secs(15);

/// A client, a listener behind a slow path, and its endpoint.
struct Net {
    client: Engine,
    server: Engine,
    inbox: Arc<Inbox>,
    path: Forwarder,
    endpoint: String,
}

impl Net {
    fn new() -> Self {
        let config = Config { frame_timeout: STALL, ..Config::default() };
        let (server, inbox, address) = listener(config.clone());
        let path = Forwarder::new(address.parse().unwrap(), 1, 0.0, Duration::from_millis(5));
        let endpoint = path.address.to_string();
        let net = Self { client: engine(config), server, inbox, path, endpoint };
        net.send(0, 64, TIMEOUT);
        until("connected", || net.inbox.len() == 1);
        net.path.throttle(RATE);
        net
    }

    fn send(&self, n: u64, size: usize, timeout: Duration) {
        send(&self.client, &self.endpoint, of(Publish, n, size, timeout)).unwrap();
    }

    fn has(&self, n: u64) -> bool {
        self.inbox.numbers().contains(&n)
    }

    fn dials(&self) -> u64 {
        self.client.stats().peers[0].dials
    }

    fn stop(self) {
        self.client.stop();
        self.server.stop();
    }
}

fn of(kind: MessageType, n: u64, size: usize, timeout: Duration) -> Message {
    Message { frame: frame(kind, n, size), kind, deadline: Some(Instant::now() + timeout), key: None }
}

#[test]
fn a_large_message_arrives_over_a_slow_path_and_holds_up_no_small_one() {
    let net = Net::new();
    net.send(1, LARGE, TIMEOUT);
    let mut longest = Duration::ZERO;
    for n in 2.. {
        let begun = Instant::now();
        net.send(n, 1000, TIMEOUT);
        until("a small one arrives", || net.has(n));
        longest = longest.max(begun.elapsed());
        if net.has(1) {
            break;
        }
    }
    until("all is acknowledged", || crate::common::owes_nothing(&net.client));
    assert!(longest < Duration::from_secs(2), "one took {longest:?}");
    assert_eq!((net.dials(), net.server.stats().malformed, net.client.stats().undelivered), (1, 0, 0));
    net.stop();
}

/// Answers messages with as many bytes as [`LARGE`], or with few.
struct Answering;

impl Handler for Answering {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        let Some(token) = message.reply else { return Ok(()) };
        let answer = match message.kind {
            Ping => frame(Pong, 1, 8),
            _ => frame(RpcReply, 2, LARGE),
        };
        token.reply(answer).unwrap();
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

#[test]
fn large_requests_and_answers_arrive_over_a_slow_path() {
    let net = Net::new();
    net.server.set_handler(Some(Arc::new(Answering)));
    let answer = request(&net.client, &net.endpoint, of(Ping, 1, LARGE, TIMEOUT)).unwrap();
    assert_eq!(number(answer.payload()), Some(1), "the request was large");
    let answer = request(&net.client, &net.endpoint, of(RpcRequest, 1, 8, TIMEOUT)).unwrap();
    assert_eq!(answer.payload().len(), frame(RpcReply, 2, LARGE).len() - 8, "the answer was large");
    // To a message that was sent without waiting.
    let answers = Arc::new(Inbox::default());
    net.client.set_handler(Some(answers.clone()));
    send(&net.client, &net.endpoint, of(RpcRequest, 3, 8, TIMEOUT)).unwrap();
    until("the answer comes", || answers.numbers() == [2]);
    assert_eq!((net.dials(), net.server.stats().malformed, net.client.stats().malformed), (1, 0, 0));
    net.stop();
}

#[test]
fn a_message_too_slow_for_its_deadline_expires_and_makes_room() {
    let net = Net::new();
    let events = Arc::new(Inbox::default());
    net.client.set_handler(Some(events.clone()));
    // Part of the last one has not left when its time is over.
    let begun = Instant::now();
    net.send(1, 6_000_000, Duration::from_secs(1));
    net.send(2, 100_000, TIMEOUT);
    until("the second one arrives", || net.has(2));
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    assert!(!net.has(1));
    let reported = events
        .events
        .lock()
        .unwrap()
        .iter()
        .any(|event| matches!(event, Event::Undelivered { count: 1, reason: UndeliveredReason::Expired, .. }));
    assert!(reported);
    until("nothing more is owed", || crate::common::owes_nothing(&net.client));
    assert_eq!((net.dials(), net.client.stats().undelivered), (1, 1));
    net.stop();
}

/// Like a host that has a tenth of the processor time that it needs, or sleeps.
#[test]
fn a_peer_that_stalls_repeatedly_is_redialled_once() {
    let net = Net::new();
    net.path.throttle(usize::MAX);
    let standing_still = AtomicBool::new(true);
    let n = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..8 {
                net.path.hold(true);
                std::thread::sleep(Duration::from_millis(900));
                net.path.hold(false);
                std::thread::sleep(Duration::from_millis(100));
            }
            standing_still.store(false, Ordering::Relaxed);
        });
        let mut n = 1;
        while standing_still.load(Ordering::Relaxed) {
            // Waits as long as the peer is suspect.
            net.send(n, 100, TIMEOUT);
            n += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
        n
    });
    until("all arrive", || net.inbox.len() as u64 == n);
    assert_eq!(net.inbox.disorder(), None);
    assert!(net.dials() <= 4, "{} dials", net.dials());
    net.stop();
}
