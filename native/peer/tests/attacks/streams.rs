//! What a client that means no good can do to a listener: little.

use std::time::Duration;

use crate::common::{frame, listener, until};
use bytes::Bytes;
use macula_peer::Config;
use macula_peer_testkit::quic::{client_config, transport};
use macula_peer_wire::MessageType::Publish;
use quinn::{Connection, Endpoint, VarInt};
use tokio::task::block_in_place;

/// A quinn client without any of this project's manners.
async fn connect(address: &str, alpn: &str) -> Result<Connection, quinn::ConnectionError> {
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = client_config(alpn, transport(0, 0)).unwrap();
    endpoint.connect_with(config, address.parse().unwrap(), "macula").unwrap().await
}

async fn stopped(connection: &Connection, bytes: Bytes) -> Option<VarInt> {
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_chunk(bytes).await.unwrap();
    tokio::time::timeout(crate::common::PATIENCE, send.stopped()).await.expect("stopped in time").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_frame_stops_its_stream_and_no_other() {
    let (server, inbox, address) = listener(Config::default());
    let connection = connect(&address, "macula").await.unwrap();
    let not_a_frame = Some(VarInt::from_u32(2));
    assert_eq!(stopped(&connection, Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n")).await, not_a_frame);
    // 4 GiB announced.
    assert_eq!(stopped(&connection, Bytes::from_static(&[1, 0x42, 0, 0, 255, 255, 255, 255])).await, not_a_frame);
    assert_eq!(server.stats().malformed, 2);

    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let mut bytes = vec![1, 0x42, 0, 0, 0, 0, 0, 1, 0xC1];
    bytes.extend_from_slice(&[1, 0xFF, 0, 0, 0, 0, 0, 1, 0x80]);
    bytes.extend_from_slice(&frame(Publish, 7, 10));
    send.write_all(&bytes).await.unwrap();
    until("the good frame behind a bad payload and an unknown type arrives", || inbox.numbers() == [7]);
    assert_eq!(server.stats().malformed, 4);
    block_in_place(|| server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_is_never_completed_is_stopped() {
    let config = Config { frame_timeout: Duration::from_millis(200), ..Config::default() };
    let (server, _, address) = listener(config);
    let connection = connect(&address, "macula").await.unwrap();
    assert_eq!(stopped(&connection, frame(Publish, 1, 10).slice(..20)).await, Some(VarInt::from_u32(1)));
    block_in_place(|| server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_large_frames_begun_at_once_do_not_fill_the_memory() {
    let (server, inbox, address) = listener(Config::default());
    let connection = connect(&address, "macula").await.unwrap();
    let big = frame(Publish, 1, 8 << 20);
    let mut streams = Vec::new();
    // All but the last byte of each: quinn's flow control is all that the sender feels.
    for _ in 0..20 {
        let (mut send, receive) = connection.open_bi().await.unwrap();
        let part = big.slice(..big.len() - 1);
        streams.push((tokio::spawn(async move { send.write_chunk(part).await.map(|()| send) }), receive));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let complete = streams.iter().filter(|(writer, _)| writer.is_finished()).count();
    // One address has half of the memory of sixteen frames of 16 MiB.
    assert!(complete <= 16, "{complete} large frames gathered at once");
    assert_eq!(inbox.len(), 0);
    block_in_place(|| server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_may_be_cut_into_any_chunks() {
    let (server, inbox, address) = listener(Config::default());
    let connection = connect(&address, "macula").await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let bytes: Vec<u8> = (0..50).flat_map(|n| frame(Publish, n, 30)).collect();
    for chunk in bytes.chunks(7) {
        send.write_all(chunk).await.unwrap();
        tokio::task::yield_now().await;
    }
    until("all arrive", || inbox.numbers() == (0..50).collect::<Vec<_>>());

    let mut uni = connection.open_uni().await.unwrap();
    uni.write_all(&frame(Publish, 50, 30)).await.unwrap();
    until("the frame on a unidirectional stream too", || inbox.len() == 51);
    assert!(inbox.messages.lock().unwrap()[50].reply.is_none());
    block_in_place(|| server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_protocol_is_refused() {
    let (server, _, address) = listener(Config::default());
    let error = connect(&address, "h3").await.err().unwrap();
    let quinn::ConnectionError::ConnectionClosed(close) = error else { panic!("{error}") };
    assert_eq!(u64::from(close.error_code), 0x100 + 120, "no_application_protocol");
    block_in_place(|| server.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_limited() {
    let (server, _, address) = listener(Config { max_streams: 10, ..Config::default() });
    let connection = connect(&address, "macula").await.unwrap();
    let mut open = Vec::new();
    for _ in 0..10 {
        open.push(connection.open_bi().await.unwrap());
    }
    assert!(tokio::time::timeout(Duration::from_millis(200), connection.open_bi()).await.is_err());
    block_in_place(|| server.stop());
}
