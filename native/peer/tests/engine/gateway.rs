//! Messages are handed over to the gateway of this host, and its answers go to the senders.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::raw::{macula_server_at, raw_frame};
use crate::common::{Forwarder, Inbox, endpoint, engine, frame, message, number, request, send, until};
use macula_peer::{Config, Delivery, EndpointRef, Engine, HandOver, Listen, LocalGateway, Message, StartError, Target};
use macula_peer_testkit::quic::{client_config, server_config, tokio_runtime, transport};
use macula_peer_wire::MessageType::{Cast, FindValue, FindValueReply, Publish, RpcReply, Store};
use macula_peer_wire::{Limits, RawFrame, Reassembler};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A gateway that reads `streams` streams at a time, and answers requests with the same bytes.
struct Gateway {
    runtime: Runtime,
    address: SocketAddr,
    got: Arc<Mutex<Vec<RawFrame>>>,
    reads: Arc<Semaphore>,
}

impl Gateway {
    fn new(reads: usize) -> Self {
        Self::at(([127, 0, 0, 1], 0).into(), reads)
    }

    fn at(address: SocketAddr, reads: usize) -> Self {
        let (got, reads) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(reads)));
        let (shared, permits) = (got.clone(), reads.clone());
        let (runtime, address) =
            macula_server_at(address, 100, move |connection| serve(connection, shared.clone(), permits.clone()));
        Self { runtime, address, got, reads }
    }

    /// Killed and started again: it knows nothing of its connections.
    fn restart(self, reads: usize) -> Self {
        self.runtime.shutdown_timeout(TIMEOUT);
        Self::at(self.address, reads)
    }

    fn count(&self) -> usize {
        self.got.lock().unwrap().len()
    }
}

async fn serve(connection: Connection, got: Arc<Mutex<Vec<RawFrame>>>, reads: Arc<Semaphore>) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        tokio::spawn(serve_stream(send, receive, got.clone(), reads.clone()));
    }
}

async fn serve_stream(
    mut send: SendStream,
    mut receive: RecvStream,
    got: Arc<Mutex<Vec<RawFrame>>>,
    reads: Arc<Semaphore>,
) {
    let mut frames = Reassembler::new(Limits::default());
    loop {
        drop(reads.acquire().await.unwrap());
        let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await else { break };
        frames.push(chunk.bytes);
        while let Ok(Some(frame)) = frames.next_frame() {
            if frame.type_id() == FindValue.id() {
                // Nothing may read it.
                let _ = send.write_all(&raw_frame(FindValueReply.id(), frame.payload())).await;
            }
            got.lock().unwrap().push(frame);
        }
    }
    // As the original, it never finishes its half.
    let _ = send.stopped().await;
}

/// A node that listens, with this gateway and no handler.
fn node(gateway: SocketAddr) -> (Engine, String) {
    let engine = engine(Config { gateway: Some(always(gateway)), ..Config::default() });
    let port = engine.listen(Listen::default()).unwrap().port();
    (engine, format!("127.0.0.1:{port}"))
}

fn always(gateway: SocketAddr) -> LocalGateway {
    LocalGateway { endpoint: endpoint(&gateway.to_string()), when: HandOver::Always }
}

/// A connection as the original's.
fn macula(runtime: &Runtime, to: &str) -> Connection {
    runtime.block_on(async {
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = client_config("macula", transport(0, 0)).unwrap();
        endpoint.connect_with(config, to.parse().unwrap(), "node").unwrap().await.unwrap()
    })
}

/// Not even what no MessagePack is in is looked at.
#[test]
fn an_original_peer_is_answered_on_its_stream_and_no_byte_is_changed() {
    let gateway = Gateway::new(100);
    let (node, address) = node(gateway.address);
    let connection = macula(&gateway.runtime, &address);
    let mut question = raw_frame(FindValue.id(), &[0xC1, 1, 2, 3]);
    // Bytes of the header that are not checked.
    (question[2], question[3]) = (0x55, 0xAA);
    let answer = gateway.runtime.block_on(async {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&question).await.unwrap();
        let mut answer = vec![0; question.len()];
        receive.read_exact(&mut answer).await.unwrap();
        answer
    });
    assert_eq!(answer, raw_frame(FindValueReply.id(), &[0xC1, 1, 2, 3]));
    assert_eq!(gateway.got.lock().unwrap()[0].bytes(), &question);
    let counted = || node.stats().gateway.map(|stats| (stats.handed_over, stats.answered, stats.fallen_back));
    // The answer may be here before it is counted.
    until("it is counted", || counted() == Some((1, 1, 0)));
    node.stop();
    gateway.runtime.shutdown_background();
}

/// A peer that has stopped reading needs no answer, and the gateway is not asked for one.
#[test]
fn a_peer_that_reads_no_answer_holds_no_gateway_stream() {
    let gateway = Gateway::new(100);
    let (node, address) = node(gateway.address);
    let connection = macula(&gateway.runtime, &address);
    for n in 0..300 {
        gateway.runtime.block_on(async {
            let (mut send, receive) = connection.open_bi().await.unwrap();
            drop(receive);
            send.write_chunk(frame(FindValue, n, 64)).await.unwrap();
            send.finish().unwrap();
        });
    }
    until("all arrive", || gateway.count() == 300);
    // Some are read before it is known.
    assert!(node.stats().gateway.unwrap().answered < 30);
    node.stop();
    gateway.runtime.shutdown_background();
}

/// Messages beyond what the gateway takes stay with their senders.
#[test]
fn a_slow_gateway_slows_its_senders() {
    const MESSAGES: u64 = 40_000;
    const SIZE: usize = 1000;
    let gateway = Gateway::new(0);
    let (node, address) = node(gateway.address);
    let client = engine(Config::default());
    for n in 0..MESSAGES {
        let deadline = Some(Instant::now() + Duration::from_secs(60));
        send(&client, &address, Message { frame: frame(Cast, n, SIZE), kind: Cast, deadline, key: None }).unwrap();
    }
    let received = || node.stats().accepted.iter().map(|accepted| accepted.received).sum::<u64>();
    until("the gateway is full", || received() > 1000);
    // Longer than it takes to suspect a link.
    let begun = Instant::now();
    until("no more is read", || settled(&received) && begun.elapsed() > Duration::from_millis(1500));
    assert_eq!(client.stats().peers[0].dials, 1);
    assert!(received() < 8000, "{}", received());
    gateway.reads.add_permits(Semaphore::MAX_PERMITS / 2);
    until("all arrive", || gateway.count() as u64 == MESSAGES);
    let mut numbers: Vec<_> = gateway.got.lock().unwrap().iter().filter_map(|frame| number(frame.payload())).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..MESSAGES).collect::<Vec<_>>());
    let stats = node.stats();
    assert_eq!((stats.unhandled, stats.undelivered), (0, 0));
    client.stop();
    node.stop();
    gateway.runtime.shutdown_background();
}

/// Whether a counter stays the same for a moment in which much would be read.
fn settled(count: &impl Fn() -> u64) -> bool {
    let before = count();
    std::thread::sleep(Duration::from_millis(100));
    count() == before
}

/// Beside the gateway a handler gets what it does not take, and what is its own.
#[test]
fn the_handler_gets_messages_while_the_gateway_is_absent() {
    let absent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (node, address) = node(absent);
    let inbox = Arc::new(Inbox::default());
    node.set_handler(Some(inbox.clone()));
    let client = engine(Config::default());
    for n in 0..500 {
        send(&client, &address, message(Store, n, TIMEOUT)).unwrap();
    }
    until("all arrive", || inbox.len() == 500);
    assert_eq!(inbox.numbers(), (0..500).collect::<Vec<_>>());
    // The token comes with it.
    let answering = inbox.clone();
    let asked = std::thread::scope(|scope| {
        let asking = scope.spawn(|| request(&client, &address, message(FindValue, 7, TIMEOUT)));
        until("asked", || answering.len() == 501);
        let question = answering.messages.lock().unwrap().pop().unwrap();
        question.reply.unwrap().reply(frame(FindValueReply, 8, 0)).unwrap();
        asking.join().unwrap()
    });
    assert_eq!(number(asked.unwrap().payload()), Some(8));
    client.stop();
    node.stop();
}

/// A gateway hears the answers to what this node sent for it.
#[test]
fn a_late_answer_is_handed_over() {
    let gateway = Gateway::new(100);
    let (node, _) = node(gateway.address);
    let other = engine(Config::default());
    let inbox = Arc::new(Inbox::default());
    other.set_handler(Some(inbox.clone()));
    let port = other.listen(Listen::default()).unwrap().port();
    send(&node, &format!("127.0.0.1:{port}"), message(Store, 1, TIMEOUT)).unwrap();
    until("arrived", || inbox.len() == 1);
    let question = inbox.messages.lock().unwrap().pop().unwrap();
    question.reply.unwrap().reply(frame(RpcReply, 2, 0)).unwrap();
    until("handed over", || gateway.count() == 1);
    assert_eq!(gateway.got.lock().unwrap()[0].bytes(), &frame(RpcReply, 2, 0));
    other.stop();
    node.stop();
    gateway.runtime.shutdown_background();
}

/// The engine stops while messages wait for a gateway that takes none: no sender waits for ever, and the messages are
/// counted.
#[test]
fn an_engine_that_stops_leaves_nothing_uncounted() {
    let gateway = Gateway::new(0);
    let (node, address) = node(gateway.address);
    let client = engine(Config::default());
    for n in 0..900 {
        send(&client, &address, message(Publish, n, TIMEOUT)).unwrap();
    }
    let received = || node.stats().accepted.iter().map(|accepted| accepted.received).sum::<u64>();
    until("they wait", || received() == 900);
    node.stop();
    until("all are counted", || node.stats().gateway.unwrap().handed_over + node.stats().unhandled == 900);
    // What the gateway's transport has taken has arrived, as far as can be known; the others have not.
    assert!(node.stats().unhandled + node.stats().undelivered > 700);
    client.stop();
    gateway.runtime.shutdown_background();
}

#[test]
fn an_engine_does_not_start_at_the_gateways_port() {
    let gateway = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = Config { port: gateway.port(), gateway: Some(always(gateway)), ..Config::default() };
    let refused =
        |config| matches!(Engine::start(config), Err(StartError::GatewayPort(port)) if port == gateway.port());
    assert!(refused(config.clone()));
    // On another host it is another port.
    let elsewhere =
        LocalGateway { endpoint: endpoint(&format!("192.0.2.1:{}", gateway.port())), when: HandOver::Always };
    assert!(!refused(Config { gateway: Some(elsewhere), ..config }));
}

/// A gateway loses a frame of which it has only the first packet. Without acknowledgements no more leaves than the
/// congestion window lets go at first, so a frame that is cut by its end stays so.
#[test]
fn a_first_burst_on_this_host_is_not_cut_by_the_congestion_window() {
    const BURST: u64 = 90;
    let gateway = Gateway::new(100);
    let forwarder = Forwarder::new(gateway.address, 0, 0.0, Duration::ZERO);
    let client = engine(Config::default());
    let address = forwarder.address.to_string();
    send(&client, &address, message(Cast, 0, TIMEOUT)).unwrap();
    until("there is a link", || gateway.count() == 1 && crate::common::owes_nothing(&client));
    forwarder.mute();
    for n in 1..=BURST {
        let message = Message { frame: frame(Cast, n, 1000), ..message(Cast, n, TIMEOUT) };
        send(&client, &address, message).unwrap();
    }
    until("all of it has left", || {
        let got = gateway.got.lock().unwrap();
        let numbers: HashSet<_> = got.iter().filter_map(|frame| number(frame.payload())).collect();
        (0..=BURST).all(|n| numbers.contains(&n))
    });
    client.stop();
    gateway.runtime.shutdown_background();
}

/// The old connection, which no packet ends, stays open after the link is given up.
#[test]
fn a_request_to_a_gateway_that_is_restarted_is_asked_again() {
    let gateway = Gateway::new(100);
    let forwarder = Forwarder::new(gateway.address, 0, 0.0, Duration::ZERO);
    let address = forwarder.address.to_string();
    let client = engine(Config::default());
    send(&client, &address, message(Cast, 0, TIMEOUT)).unwrap();
    until("there is a link", || gateway.count() == 1 && crate::common::owes_nothing(&client));
    forwarder.swallow(true);
    let gateway = std::thread::scope(|scope| {
        let asking = scope.spawn(|| request(&client, &address, message(FindValue, 7, Duration::from_secs(8))));
        until("it is asked", || client.stats().peers[0].sent == 2);
        let gateway = gateway.restart(100);
        forwarder.swallow(false);
        assert_eq!(number(asking.join().unwrap().unwrap().payload()), Some(7));
        gateway
    });
    client.stop();
    gateway.runtime.shutdown_background();
}

/// More than the gateway's transport takes before the gateway reads.
const HUGE: usize = 4 << 20;

#[test]
fn a_message_half_sent_to_a_restarted_gateway_goes_over_the_new_link() {
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let gateway = Gateway::new(100);
        let forwarder = Forwarder::new(gateway.address, 0, 0.0, Duration::ZERO);
        let address = forwarder.address.to_string();
        let client = engine(Config { delivery, ..Config::default() });
        send(&client, &address, message(Cast, 0, TIMEOUT)).unwrap();
        until("there is a link", || gateway.count() == 1 && crate::common::owes_nothing(&client));
        forwarder.swallow(true);
        let half = Message { frame: frame(Cast, 1, HUGE), ..message(Cast, 1, Duration::from_secs(8)) };
        send(&client, &address, half).unwrap();
        send(&client, &address, message(Cast, 2, Duration::from_secs(8))).unwrap();
        let gateway = gateway.restart(100);
        forwarder.swallow(false);
        let arrived = || gateway.got.lock().unwrap().iter().filter(|frame| frame.payload().len() > HUGE).count();
        until("it arrives or is given up", || arrived() > 0 || crate::common::owes_nothing(&client));
        assert_eq!(arrived(), 1);
        client.stop();
        gateway.runtime.shutdown_background();
    }
}

/// The link is live for a while after that.
#[test]
fn a_message_half_sent_over_a_replaced_link_is_not_delivered_twice() {
    let gateway = Gateway::new(0);
    let client = engine(Config { delivery: Delivery::AtMostOnce, ..Config::default() });
    let address = gateway.address.to_string();
    send(&client, &address, message(Cast, 0, TIMEOUT)).unwrap();
    until("there is a link", || crate::common::owes_nothing(&client));
    send(&client, &address, Message { frame: frame(Cast, 1, HUGE), ..message(Cast, 1, TIMEOUT) }).unwrap();
    client.invalidate(&Target::Endpoint(EndpointRef::parse(&address).unwrap()));
    // The link is given up after 500 ms, and closed after another second.
    std::thread::sleep(Duration::from_millis(900));
    gateway.reads.add_permits(Semaphore::MAX_PERMITS / 2);
    until("it arrives", || gateway.count() > 1 && crate::common::owes_nothing(&client));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((gateway.count(), client.stats().undelivered), (2, 0));
    client.stop();
    gateway.runtime.shutdown_background();
}

/// After a slow handshake the gateway is dialled a second time, in the hope of a better round trip.
#[test]
fn a_second_dial_that_hangs_does_not_cost_the_first_connection() {
    let (got, reads) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(100)));
    let shared = got.clone();
    let runtime = tokio_runtime(1).unwrap();
    let address = runtime.block_on(async {
        let server = server_config(&["macula".into()], transport(100, 3)).unwrap();
        let endpoint = Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = endpoint.local_addr().unwrap();
        tokio::spawn(async move {
            let first = endpoint.accept().await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
            tokio::spawn(serve(first.await.unwrap(), shared, reads));
            // Dropped, they would be refused.
            let mut held = Vec::new();
            while let Some(incoming) = endpoint.accept().await {
                held.push(incoming);
            }
        });
        address
    });
    let client = engine(Config { connect_timeout: Duration::from_secs(4), ..Config::default() });
    send(&client, &address.to_string(), message(Cast, 0, TIMEOUT)).unwrap();
    until("it arrives", || got.lock().unwrap().len() == 1);
    client.stop();
    runtime.shutdown_background();
}
