//! The fake gateway shows each behaviour that was measured on a real gateway.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::Server;
use macula_peer_testkit::frame::{self, Frame, bin, kind};
use macula_peer_testkit::quic;
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rmpv::ValueRef;
use tokio::time::{sleep, timeout};

const SOON: Duration = Duration::from_secs(30);
const LONG_ENOUGH: Duration = Duration::from_millis(300);

#[tokio::test]
async fn bytes_after_a_frame_in_its_chunk_are_dropped() {
    let (mut gateway, connection) = start(&[]).await;
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let two = [store(1), store(2)].concat();
    send.write_all(&two).await.unwrap();
    until(&mut gateway, "bytes", two.len() as u64).await;
    assert_eq!(gateway.count("received"), 1);
    assert_eq!(gateway.count("distinct"), 1);
    assert_eq!(gateway.count("extra_bytes"), store(2).len() as u64);
}

#[tokio::test]
async fn a_frame_in_two_chunks_is_lost() {
    let (mut gateway, connection) = start(&[]).await;
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let (head, tail) = (&store(1)[..5], &store(1)[5..]);
    send.write_all(head).await.unwrap();
    until(&mut gateway, "incomplete", 1).await;
    send.write_all(tail).await.unwrap();
    until(&mut gateway, "bytes", store(1).len() as u64).await;
    assert_eq!(gateway.count("received"), 0);
}

#[tokio::test]
async fn frames_apart_on_one_stream_all_arrive() {
    let (mut gateway, connection) = start(&[]).await;
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    for number in 0..20 {
        send.write_all(&store(number)).await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    until(&mut gateway, "distinct", 20).await;
    assert_eq!(gateway.count("streams"), 1);
}

#[tokio::test]
async fn a_frame_of_more_than_64_kilobytes_is_lost() {
    let (mut gateway, connection) = start(&[]).await;
    message(&connection, &frame::store_of_size(10_000).unwrap()).await;
    until(&mut gateway, "received", 1).await;
    message(&connection, &frame::store_of_size(100_000).unwrap()).await;
    until(&mut gateway, "bytes", 110_000).await;
    assert_eq!(gateway.count("received"), 1);
}

#[tokio::test]
async fn without_stop_sending_a_hundred_streams_use_up_the_credit() {
    let (mut gateway, connection) = start(&[]).await;
    let mut kept = Vec::new();
    for number in 0..100 {
        let (mut send, receive) = connection.open_bi().await.unwrap();
        send.write_all(&store(number)).await.unwrap();
        send.finish().unwrap();
        kept.push(receive);
    }
    until(&mut gateway, "received", 100).await;
    assert!(timeout(LONG_ENOUGH, connection.open_bi()).await.is_err());
    // quinn announces new credit only by the eighth of the limit.
    for mut receive in kept.drain(..20) {
        receive.stop(0u32.into()).unwrap();
    }
    timeout(SOON, connection.open_bi()).await.unwrap().unwrap();
}

#[tokio::test]
async fn finishing_and_stopping_gives_the_credit_back() {
    let (mut gateway, connection) = start(&[]).await;
    for number in 0..500 {
        timeout(SOON, message(&connection, &store(number))).await.unwrap();
    }
    until(&mut gateway, "distinct", 500).await;
    assert_eq!(gateway.count("received"), 500);
    assert_eq!(gateway.count("streams"), 500);
    assert!(gateway.command("stats").ends_with("types => #{store => 500}}."));
    assert_eq!(gateway.command("reset"), "ok.");
    assert_eq!(gateway.count("received"), 0);
}

#[tokio::test]
async fn three_unidirectional_streams_at_a_time() {
    let (mut gateway, connection) = start(&[]).await;
    let mut open = Vec::new();
    for number in 0..3 {
        let mut send = connection.open_uni().await.unwrap();
        send.write_all(&store(number)).await.unwrap();
        open.push(send);
    }
    until(&mut gateway, "received", 3).await;
    assert!(timeout(LONG_ENOUGH, connection.open_uni()).await.is_err());
    open[0].finish().unwrap();
    timeout(SOON, connection.open_uni()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_burst_of_connections_is_refused_in_part() {
    let mut gateway = Server::start(env!("CARGO_BIN_EXE_fake_gateway"), &["--handshake-ms", "20"]);
    let endpoint = endpoint();
    let connecting: Vec<_> = (0..8).map(|_| endpoint.connect(gateway.address, "localhost").unwrap()).collect();
    let (mut accepted, mut refused) = (Vec::new(), 0);
    for connecting in connecting {
        match timeout(SOON, connecting).await.unwrap() {
            Ok(connection) => accepted.push(connection),
            Err(ConnectionError::ConnectionClosed(close)) => {
                assert_eq!(close.error_code, quinn::TransportErrorCode::CONNECTION_REFUSED);
                refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((accepted.len(), refused), (4, 4));
    until(&mut gateway, "connections", 4).await;
    assert_eq!(gateway.count("refused"), 4);
    endpoint.connect(gateway.address, "localhost").unwrap().await.unwrap();
}

#[tokio::test]
async fn handshakes_come_one_after_the_other() {
    let gateway = Server::start(env!("CARGO_BIN_EXE_fake_gateway"), &["--handshake-ms", "50"]);
    let endpoint = endpoint();
    let start = Instant::now();
    let connecting: Vec<_> = (0..3).map(|_| endpoint.connect(gateway.address, "localhost").unwrap()).collect();
    for connecting in connecting {
        connecting.await.unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(150));
}

#[tokio::test]
async fn answers_come_on_the_same_stream_which_stays_open() {
    let (mut gateway, connection) = start(&[]).await;
    let local = connection.local_ip();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();

    ask(&mut send, kind::PING, &[("timestamp", ValueRef::from(-12_345))]).await;
    answer(&mut receive, kind::PONG, |pong| {
        assert_eq!(pong.int("timestamp"), Some(-12_345));
        assert!(pong.int("server_time").unwrap() > 1_600_000_000_000);
    })
    .await;

    ask(&mut send, kind::NAT_PROBE, &[("node_id", bin(&[9; 32])), ("local_port", ValueRef::from(1))]).await;
    answer(&mut receive, kind::NAT_PROBE_REPLY, |reply| {
        assert_eq!(reply.field("node_id"), Some(&bin(&[9; 32])));
        assert_eq!(reply.field("reflexive_ip"), Some(&bin(b"127.0.0.1")), "{local:?}");
        assert!(matches!(reply.int("reflexive_port"), Some(1..=65_535)));
    })
    .await;

    ask(&mut send, kind::FIND_NODE, &[]).await;
    answer(&mut receive, kind::FIND_NODE_REPLY, |reply| assert_eq!(reply.field("nodes"), Some(&ValueRef::from(""))))
        .await;
    ask(&mut send, kind::FIND_VALUE, &[]).await;
    answer(&mut receive, kind::FIND_VALUE_REPLY, |reply| assert!(reply.field("value").is_some())).await;
    ask(&mut send, kind::CALL, &[("call_id", bin(b"c1"))]).await;
    answer(&mut receive, kind::REPLY, |reply| assert_eq!(reply.field("call_id"), Some(&bin(b"c1")))).await;

    send.finish().unwrap();
    assert!(timeout(LONG_ENOUGH, receive.read_chunk(1, true)).await.is_err(), "its half must stay open");
    assert_eq!(gateway.count("received"), 5);
}

#[tokio::test]
async fn a_remote_call_is_answered_late() {
    let (_gateway, connection) = start(&["--rpc-delay-ms", "200"]).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let start = Instant::now();
    ask(&mut send, kind::RPC_REQUEST, &[("request_id", bin(b"r1"))]).await;
    ask_ping_meanwhile(&mut send, &mut receive).await;
    answer(&mut receive, kind::RPC_REPLY, |reply| {
        assert_eq!(reply.field("request_id"), Some(&bin(b"r1")));
        assert_eq!(reply.field("result"), Some(&bin(b"ok")));
        assert!(matches!(reply.field("from_node"), Some(ValueRef::Binary(_))));
    })
    .await;
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn silence_loses_packets_in_both_directions_until_it_ends() {
    let (mut gateway, connection) = start(&[]).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    assert_eq!(gateway.command("silence on"), "ok.");
    ask(&mut send, kind::PING, &[("timestamp", ValueRef::from(1))]).await;
    assert!(timeout(LONG_ENOUGH, receive.read_chunk(1, true)).await.is_err());
    assert!(timeout(LONG_ENOUGH, connect(&endpoint(), &gateway)).await.is_err());
    assert_eq!(gateway.count("received"), 0);
    assert_eq!(gateway.command("silence off"), "ok.");
    answer(&mut receive, kind::PONG, |_| ()).await;
}

// Two threads: one waits for the program's line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_hands_over_each_chunk_and_writes_what_it_is_told() {
    let (mut gateway, connection) = start(&["--mode", "listener"]).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let ping = frame::encode(kind::PING, &[("timestamp", ValueRef::from(7))]);
    send.write_all(&ping).await.unwrap();
    let line = gateway.line();
    let [word, stream, from, hex] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
    assert_eq!((word, hex), ("received", ping.iter().map(|byte| format!("{byte:02x}")).collect::<String>().as_str()));
    assert!(from.starts_with("127.0.0.1:"), "{from}");
    assert!(timeout(LONG_ENOUGH, receive.read_chunk(1, true)).await.is_err(), "it answers nothing by itself");

    assert_eq!(gateway.command(&format!("send {stream} 0a0B")), "ok.");
    let chunk = timeout(SOON, receive.read_chunk(9, true)).await.unwrap().unwrap().unwrap();
    assert_eq!(&chunk.bytes[..], &[0x0a, 0x0b]);

    send.finish().unwrap();
    receive.stop(0u32.into()).unwrap();
    let closed = Instant::now();
    while gateway.command(&format!("send {stream} 0a")) != "{error,closed}." {
        assert!(closed.elapsed() < SOON);
        sleep(Duration::from_millis(5)).await;
    }
    for wrong in ["send 0", "send 0 0", "send 0 0g", "send x 00"] {
        assert_eq!(gateway.command(wrong), "{error,unknown_command}.", "{wrong}");
    }
}

#[tokio::test]
async fn an_unknown_command_is_answered_too() {
    let (mut gateway, _connection) = start(&[]).await;
    assert_eq!(gateway.command("sing"), "{error,unknown_command}.");
}

async fn ask_ping_meanwhile(send: &mut SendStream, receive: &mut RecvStream) {
    // Apart from the request, or it would be lost with the rest of that chunk.
    sleep(Duration::from_millis(50)).await;
    ask(send, kind::PING, &[("timestamp", ValueRef::from(1))]).await;
    answer(receive, kind::PONG, |_| ()).await;
}

async fn ask(send: &mut SendStream, kind: u8, fields: &[(&str, ValueRef<'_>)]) {
    send.write_all(&frame::encode(kind, fields)).await.unwrap();
}

async fn answer(receive: &mut RecvStream, kind: u8, check: impl FnOnce(&Frame<'_>)) {
    let chunk = timeout(SOON, receive.read_chunk(65_536, true)).await.unwrap().unwrap().unwrap();
    let frame = frame::decode(&chunk.bytes).unwrap();
    assert_eq!((frame.kind, frame.extra), (kind, 0));
    check(&frame);
}

/// As a sender has to do it: one frame on a stream of its own, finished, and its other half stopped.
async fn message(connection: &Connection, frame: &[u8]) {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(frame).await.unwrap();
    send.finish().unwrap();
    receive.stop(0u32.into()).unwrap();
}

fn store(number: u64) -> Vec<u8> {
    frame::encode(kind::STORE, &[("n", ValueRef::from(number)), ("v", bin(b"value"))])
}

async fn until(gateway: &mut Server, name: &str, count: u64) {
    let start = Instant::now();
    while gateway.count(name) < count {
        assert!(start.elapsed() < SOON, "{name} never reached {count}: {}", gateway.command("stats"));
        sleep(Duration::from_millis(5)).await;
    }
}

async fn start(arguments: &[&str]) -> (Server, Connection) {
    let gateway = Server::start(env!("CARGO_BIN_EXE_fake_gateway"), arguments);
    let connection = connect(&endpoint(), &gateway).await;
    (gateway, connection)
}

async fn connect(endpoint: &Endpoint, gateway: &Server) -> Connection {
    endpoint.connect(gateway.address, "localhost").unwrap().await.unwrap()
}

fn endpoint() -> Endpoint {
    let mut endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    endpoint.set_default_client_config(quic::client_config("macula", quic::transport(0, 0)).unwrap());
    endpoint
}
