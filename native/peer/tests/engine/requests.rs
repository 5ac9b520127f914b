//! Requests, answers, deadlines and cancellation.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::common::raw::macula_server;
use crate::common::{
    Forwarder, PATIENCE, endpoint, engine, frame, listener, message, node_id, number, request, send, until,
};
use macula_peer::{
    Candidates, Config, ConnectError, Delivery, EndpointRef, Engine, Event, Handler, Inbound, Listen, ListenError,
    Message, ReplyError, RequestError, SendError, Target, Unhandled,
};
use macula_peer_wire::MessageType::{Ping, Pong, Publish};
use macula_peer_wire::RawFrame;

const SECOND: Duration = Duration::from_secs(1);
/// Less than a dial that is not answered takes.
const DIAL: Duration = Duration::from_secs(4);

/// Answers every message with its own number, twice.
struct Echo {
    second_refused: AtomicBool,
}

impl Handler for Echo {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        let token = message.reply.expect("a request can be answered");
        let answer = frame(Pong, number(&message.payload).unwrap(), 1 << 20);
        assert_eq!(token.reply(answer.clone()), Ok(()));
        let second = token.reply(answer) == Err(ReplyError::AlreadyReplied);
        self.second_refused.store(second, Ordering::Relaxed);
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

#[test]
fn a_request_gets_its_answer_in_however_many_chunks() {
    let server = engine(Config::default());
    let echo = Arc::new(Echo { second_refused: AtomicBool::new(false) });
    server.set_handler(Some(echo.clone()));
    let endpoint = format!("127.0.0.1:{}", server.listen(Listen::default()).unwrap().port());
    let client = engine(Config::default());
    for n in 0..5 {
        let answer = request(&client, &endpoint, message(Ping, n, 10 * SECOND)).unwrap();
        assert_eq!((answer.type_id(), number(answer.payload())), (Pong.id(), Some(n)));
        assert!(answer.payload().len() > 1 << 20);
    }
    assert!(echo.second_refused.load(Ordering::Relaxed));
    client.stop();
    server.stop();
}

#[test]
fn without_an_answer_the_deadline_is_kept_and_nothing_is_held() {
    let (server, inbox, endpoint) = listener(Config::default());
    let client = engine(Config::default());
    let begun = Instant::now();
    assert_eq!(request(&client, &endpoint, message(Ping, 0, SECOND / 4)), Err(RequestError::Timeout));
    assert!((SECOND / 4..DIAL).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    until("nothing is held", || {
        let peer = &client.stats().peers[0];
        (peer.unacknowledged_bytes, peer.failed) == (0, 1)
    });
    let token = inbox.messages.lock().unwrap().remove(0).reply.unwrap();
    // The requester has stopped reading, which the listener learns with the next packet.
    until("the token is void", || token.reply(frame(Pong, 0, 1)) != Ok(()));
    client.stop();
    server.stop();
}

#[test]
fn a_closed_port_fails_fast_and_a_silent_one_at_the_deadline() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let client = engine(Config::default());
    let begun = Instant::now();
    assert_eq!(send(&client, &closed, message(Ping, 0, 10 * SECOND)), Err(ConnectError::Unreachable.into()));
    assert!(begun.elapsed() < DIAL);
    let begun = Instant::now();
    let silent = silent.local_addr().unwrap().to_string();
    assert_eq!(send(&client, &silent, message(Ping, 0, SECOND / 2)), Err(ConnectError::TimedOut.into()));
    assert!((SECOND / 2..DIAL).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(send(&client, &silent, message(Ping, 0, Duration::ZERO)), Err(SendError::Timeout));
    client.stop();
}

#[test]
fn an_icmp_error_of_one_destination_does_not_hurt_another() {
    let (server, inbox, endpoint) = listener(Config::default());
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, SECOND)).unwrap();
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for n in 1..=200 {
        assert!(send(&client, &closed, message(Ping, n, SECOND)).is_err());
        send(&client, &endpoint, message(Publish, n, SECOND)).unwrap();
    }
    until("all arrive", || inbox.len() == 201);
    assert_eq!(client.stats().peers.iter().map(|peer| peer.dials).max(), Some(200));
    client.stop();
    server.stop();
}

#[test]
fn a_cancelled_call_is_neither_answered_nor_sent() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let client = engine(Config::default());
    let text = address.to_string();
    let endpoint = Target::Endpoint(EndpointRef::parse(&text).unwrap());
    let answered = Arc::new(AtomicBool::new(false));
    let note = answered.clone();
    let call =
        client.send(&endpoint, message(Publish, 1, 10 * SECOND), move |_| note.store(true, Ordering::Relaxed)).unwrap();
    until("dialling", || client.stats().peers[0].dials == 1);
    call.cancel();
    until("let go", || client.stats().peers[0].unacknowledged_bytes == 0);
    drop(silent);
    let server = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(crate::common::Inbox::default());
    server.set_handler(Some(inbox.clone()));
    server.listen(Listen::default()).unwrap();
    send(&client, &text, message(Publish, 2, 10 * SECOND)).unwrap();
    until("the next one arrives", || inbox.len() == 1);
    assert_eq!(inbox.numbers(), [2]);
    assert!(!answered.load(Ordering::Relaxed));
    client.stop();
    server.stop();
}

#[test]
fn a_name_is_looked_up_and_both_families_are_tried() {
    let (server, inbox, endpoint) = listener(Config::default());
    let port = endpoint.rsplit_once(':').unwrap().1;
    let client: Engine = engine(Config::default());
    send(&client, &format!("localhost:{port}"), message(Publish, 0, 5 * SECOND)).unwrap();
    until("arrived", || inbox.len() == 1);
    let nowhere = send(&client, "no-such-name.invalid:1", message(Publish, 0, 5 * SECOND));
    assert_eq!(nowhere, Err(ConnectError::Unresolved.into()));
    client.stop();
    server.stop();
}

/// The requested port and no other, though the socket that will be replaced holds it.
#[test]
fn a_listener_gets_the_port_that_it_asks_for_or_an_error() {
    let server = engine(Config::default());
    let port = server.local_address().unwrap().port();
    let ip = Some(Ipv4Addr::LOCALHOST.into());
    let taken = server.listen(Listen { ip, port: Some(port), ..Listen::default() });
    let Err(ListenError::Bind(error)) = taken else { panic!("{taken:?}") };
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    let bound = server.listen(Listen { ip, ..Listen::default() }).unwrap();
    assert_eq!((Some(bound.ip()), bound == server.local_address().unwrap()), (ip, true));
    server.stop();
}

/// Asks a node that may be reached at these endpoints, without waiting.
fn ask(engine: &Engine, endpoints: &[SocketAddr], asked: Message) -> mpsc::Receiver<Result<RawFrame, RequestError>> {
    let node = node_id("asked");
    let endpoints = endpoints.iter().map(|address| endpoint(&address.to_string())).collect();
    let look_up = engine.learn(&node, Candidates { endpoints, ..Candidates::default() });
    let (answer, answered) = mpsc::channel();
    // The receiver may be gone.
    engine.request(&Target::Node(&node), asked, move |reply| drop(answer.send(reply)));
    if look_up {
        engine.resolved(&node, true);
    }
    answered
}

/// Over the path that the questions took nothing comes back, as after the loss of the address that was asked.
fn answers_come_over_the_next_link(delivery: Delivery, answered_late: bool) {
    let (server, inbox, address) = listener(Config::default());
    let server_at = address.parse().unwrap();
    let [first, second] = [(); 2].map(|()| Forwarder::new(server_at, 0, 0.0, Duration::ZERO));
    let client = engine(Config { delivery, ..Config::default() });
    let answer = ask(&client, &[first.address], message(Ping, 1, PATIENCE));
    until("asked", || inbox.len() == 1);
    let other = ask(&client, &[second.address], message(Ping, 2, PATIENCE));
    until("asked twice", || inbox.len() == 2);
    // Both are acknowledged by then.
    std::thread::sleep(SECOND / 20);
    first.swallow(true);
    if answered_late {
        let at = || client.stats().peers[0].link.as_ref().map(|link| link.remote);
        until("there is another link", || at() == Some(second.address));
        // They are asked again by then.
        std::thread::sleep(SECOND / 20);
    }
    for inbound in std::mem::take(&mut *inbox.messages.lock().unwrap()) {
        let answer = frame(Pong, number(&inbound.payload).unwrap(), if answered_late { 100 } else { 1 << 20 });
        // The connection that it came on may be gone.
        let _ = inbound.reply.unwrap().reply(answer);
    }
    for (asked, answer) in [(1, answer), (2, other)] {
        let answer = answer.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!((answer.type_id(), number(answer.payload())), (Pong.id(), Some(asked)));
    }
    assert_eq!(inbox.len(), 0, "handed over again");
    client.stop();
    server.stop();
}

#[test]
fn a_lost_answer_comes_over_the_next_link() {
    answers_come_over_the_next_link(Delivery::AtLeastOnce, false);
}

#[test]
fn a_request_is_handed_over_once_and_answered_over_the_next_link() {
    answers_come_over_the_next_link(Delivery::AtMostOnce, true);
}

/// The process that had the question is gone, and its successor gets it no second time.
#[test]
fn a_request_to_a_restarted_node_fails_and_is_not_repeated() {
    let (server, inbox, address) = listener(Config::default());
    let address: SocketAddr = address.parse().unwrap();
    let client = engine(Config::default());
    let answered = ask(&client, &[address], message(Ping, 1, PATIENCE));
    until("asked", || inbox.len() == 1);
    std::thread::sleep(SECOND / 20);
    server.stop();
    // Its port is free when it is dropped.
    drop((server, inbox));
    let successor = engine(Config { port: address.port(), ..Config::default() });
    let inbox = Arc::new(crate::common::Inbox::default());
    successor.set_handler(Some(inbox.clone()));
    successor.listen(Listen::default()).unwrap();
    let begun = Instant::now();
    assert_eq!(answered.recv_timeout(PATIENCE).unwrap(), Err(RequestError::LinkLost));
    assert!(begun.elapsed() < 8 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(inbox.len(), 0);
    client.stop();
    successor.stop();
}

/// Messages to a peer that hangs up soon after every handshake must not become a storm of handshakes.
#[test]
fn a_peer_that_hangs_up_is_dialled_with_growing_pauses() {
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = accepted.clone();
    let (_runtime, address) = macula_server(100, move |connection| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(SECOND / 50).await;
            connection.close(1u8.into(), b"go away");
        }
    });
    let client = engine(Config::default());
    let begun = Instant::now();
    while begun.elapsed() < 2 * SECOND {
        // Delivered or not: the handshakes are what is counted.
        let _ = send(&client, &address.to_string(), message(Publish, 0, SECOND));
        std::thread::sleep(SECOND / 200);
    }
    let accepted = accepted.load(Ordering::Relaxed);
    assert!((1..20).contains(&accepted), "{accepted} connections in two seconds");
    client.stop();
}
