//! What senders and receivers of `macula-peer/1` that mean no good can do to each other: little.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::raw::{
    self, NUMBER, SESSION, Stream, connect_as, dial_with, eventually, numbered, opening, raw_frame, session, stranger,
    word, words,
};
use crate::common::{PATIENCE, deep, engine, frame, listener, message, number, send, until};
use bytes::Bytes;
use macula_peer::{
    Config, Event, Handler, Inbound, Listen, Message, Rejection, RelayConfig, SendError, UndeliveredReason, Unhandled,
};
use macula_peer_testkit::quic::{self, tokio_runtime};
use macula_peer_wire::MessageType::{Ping, Pong, Publish};
use macula_peer_wire::{Limits, RawFrame, Reassembler};
use quinn::{Connection, ReadError, VarInt};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

const SLOW: Option<VarInt> = Some(VarInt::from_u32(1));
const NOT_A_FRAME: Option<VarInt> = Some(VarInt::from_u32(2));
const FORGOTTEN: VarInt = VarInt::from_u32(12);
const TOO_SLOW: UndeliveredReason = UndeliveredReason::Rejected(Rejection::TooSlow);

// ---- senders ----

#[test]
fn numbers_may_jump_forwards_and_not_back_and_end_before_they_overflow() {
    let (server, inbox, address) = listener(Config::default());
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let (mut stream, ..) = session(&connection, 1).await;
        stream.say([numbered(5), frame(Publish, 0, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, 6);
        stream.say([numbered(3), frame(Publish, 1, 8).to_vec(), frame(Publish, 2, 8).to_vec()].concat()).await;
        stream.say([numbered(1 << 60), frame(Publish, 3, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, (1 << 60) + 1);
        stream.say([numbered(u64::MAX - 1), frame(Publish, 4, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, u64::MAX);
        stream.say(frame(Publish, 5, 8)).await;
        assert_eq!(stream.stopped().await, NOT_A_FRAME);

        let (mut stream, known, expected) = session(&connection, 1).await;
        assert_eq!((known, expected), (true, u64::MAX), "it did not begin again");
        stream.say([numbered(u64::MAX), frame(Publish, 6, 8).to_vec()].concat()).await;
        assert_eq!(stream.stopped().await, NOT_A_FRAME);

        let (mut stream, ..) = session(&connection, 2).await;
        stream.say([numbered(0), frame(Publish, 7, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, 1, "another session goes on");
    });
    assert_eq!(inbox.numbers(), [0, 3, 4, 7]);
    server.stop();
}

/// The link on which it was said may have died before the sender heard it.
#[test]
fn a_refusal_is_repeated_until_the_sender_acknowledges_it() {
    let limits = Limits { max_depth: 8, ..Limits::default() };
    let (server, inbox, address) = listener(Config { limits, ..Config::default() });
    let (good, bad) = (|n| frame(Publish, n, 8).to_vec(), deep(1, 9).frame.to_vec());
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        for expected in [0, 1] {
            let (mut stream, _, expects) = session(&connection, 1).await;
            assert_eq!(expects, expected);
            stream.say([numbered(0), good(0), bad.clone(), good(2)].concat()).await;
            // What was handed over may be said to be before, or with the rest.
            let mut said = words(&mut stream).await;
            if said == (0, 1) {
                said = words(&mut stream).await;
            }
            assert_eq!(said, (9, 1), "no acknowledgement before");
            while said != (0, 3) {
                said = words(&mut stream).await;
            }
            stream.send.reset(0u8.into()).unwrap();
        }
        // It goes on behind it, and so it knows.
        let (mut stream, _, expects) = session(&connection, 1).await;
        assert_eq!(expects, 1);
        stream.say([numbered(2), good(2), good(3)].concat()).await;
        while word(&mut stream).await != 4 {}
        stream.send.reset(0u8.into()).unwrap();
        assert_eq!(session(&connection, 1).await.2, 4);
    });
    assert_eq!((inbox.numbers(), server.stats().malformed), (vec![0, 2, 3], 1));
    server.stop();
}

#[test]
fn an_unknown_stream_is_stopped() {
    let (server, inbox, address) = listener(Config::default());
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let good = opening(1, 0);
        let openings = [
            raw_frame(SESSION, &good[8..32]),
            // A node id has at most 255 bytes.
            raw_frame(SESSION, &[&good[8..], &[0; 256]].concat()),
            raw_frame(SESSION, &[]),
            opening(1, 2),
            opening(1, 255),
            // Greeted, then a message without a number, and one whose number has seven bytes.
            [&good[..], &frame(Publish, 1, 8)].concat(),
            [&good[..], &raw_frame(NUMBER, &[0; 7]), &frame(Publish, 1, 8)].concat(),
            [&good[..], &numbered(0), &[9; 8]].concat(),
        ];
        for bytes in openings {
            let mut stream = Stream::open(&connection).await;
            stream.say(&bytes).await;
            assert_eq!(stream.stopped().await, NOT_A_FRAME, "{bytes:?}");
        }
        let mut uni = connection.open_uni().await.unwrap();
        uni.write_all(&good).await.unwrap();
        assert_eq!(timeout(PATIENCE, uni.stopped()).await.unwrap().unwrap(), NOT_A_FRAME);

        // No relay here.
        let mut control = Stream::control(&connection).await;
        let no_relay = Some(VarInt::from_u32(4));
        control.send.write_all(&connect_as("node", &[])).await.ok();
        assert_eq!((control.frame().await, control.stopped().await), (Err(no_relay), no_relay));
    });
    assert_eq!(inbox.len(), 0);
    server.stop();
}

#[test]
fn a_second_control_stream_is_refused_and_the_first_goes_on() {
    let server = engine(Config::default());
    let port = server.listen(Listen { relay: Some(RelayConfig::default()), ..Listen::default() }).unwrap().port();
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&format!("127.0.0.1:{port}")).await;
        let mut first = raw::registered(&connection, "node").await;
        for node_id in ["node", "other"] {
            let mut second = Stream::control(&connection).await;
            let said = second.ask(connect_as(node_id, &[])).await;
            assert_eq!(said.text("error").as_deref(), Some("malformed"));
        }
        assert_eq!(first.circuit_to("unknown").await, Err("not_registered".into()));
    });
    server.stop();
}

#[test]
fn a_client_without_a_certificate_gets_no_session() {
    let (server, inbox, address) = listener(Config::default());
    tokio_runtime(2).unwrap().block_on(async {
        let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = quic::client_config(raw::ALPN, raw::transport()).unwrap();
        let connection = client.connect_with(config, address.parse().unwrap(), "node").unwrap().await.unwrap();
        if let Ok((mut send, _receive)) = connection.open_bi().await {
            let _ = send.write_all(&[opening(1, 0), numbered(0), frame(Publish, 1, 8).to_vec()].concat()).await;
        }
        let closed = timeout(PATIENCE, connection.closed()).await.expect("closed");
        let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("{closed}") };
        assert_eq!(close.error_code, VarInt::from_u32(5));
    });
    assert_eq!(inbox.len(), 0);
    server.stop();
}

#[test]
fn a_listener_that_closes_ends_the_connections_of_sessions_too() {
    let (server, inbox, address) = listener(Config::default());
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let (mut stream, ..) = session(&connection, 1).await;
        stream.say([numbered(0), frame(Publish, 1, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, 1);
        assert!(server.close());
        timeout(PATIENCE, connection.closed()).await.expect("closed");
    });
    assert_eq!(inbox.len(), 1);
    server.stop();
}

#[test]
fn large_messages_of_many_sessions_do_not_fill_the_memory() {
    let (server, inbox, address) = listener(Config::default());
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let large = frame(Publish, 1, 8 << 20);
        let mut writers = JoinSet::new();
        let (complete, mut halves) = (Arc::new(AtomicUsize::new(0)), Vec::new());
        // What the others are not read of yet fits the connection's window.
        for id in 0..12 {
            let mut stream = Stream::open(&connection).await;
            halves.push(stream.receive);
            let bytes = Bytes::from([opening(id, 1), numbered(0), large[..large.len() - 1].to_vec()].concat());
            let complete = complete.clone();
            writers.spawn(async move {
                // All but the last byte.
                stream.send.write_chunk(bytes).await.unwrap();
                complete.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<()>().await;
            });
        }
        eventually("as many as may are gathered", || complete.load(Ordering::Relaxed) >= 7).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(complete.load(Ordering::Relaxed), 7, "of 64 MiB");
    });
    assert_eq!(inbox.len(), 0);
    server.stop();
}

/// Answers every message at once.
#[derive(Default)]
struct Echo(AtomicUsize);

impl Handler for Echo {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        self.0.fetch_add(1, Ordering::Relaxed);
        if let Some(token) = message.reply {
            let _ = token.reply(frame(Pong, 1, 64));
        }
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

#[test]
fn a_sender_that_reads_no_answers_is_not_read_on() {
    let server = engine(Config::default());
    let echo = Arc::new(Echo::default());
    server.set_handler(Some(echo.clone()));
    let address = format!("127.0.0.1:{}", server.listen(Listen::default()).unwrap().port());
    tokio_runtime(2).unwrap().block_on(async {
        let mut transport = raw::transport();
        transport.stream_receive_window((64u32 << 10).into());
        let connection = dial_with(&address, &quic::key().unwrap(), transport).await;
        let Stream { mut send, mut receive, .. } = Stream::open(&connection).await;
        let many: Vec<u8> = (0..1000).flat_map(|n| frame(Ping, n, 0)).collect();
        tokio::spawn(async move {
            for _ in 0..100 {
                send.write_all(&many).await.unwrap();
            }
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
        // 64 KiB hold some 700 answers.
        let heard = echo.0.load(Ordering::Relaxed);
        assert!((500..1000).contains(&heard), "{heard} requests");

        let other = stranger(&address).await;
        let mut stream = Stream::open(&other).await;
        stream.say(frame(Ping, 1, 0)).await;
        assert_eq!(stream.hear().await.kind, Pong.id(), "others are answered");

        receive.stop(0u8.into()).unwrap();
        eventually("it is read again once it stops the answers", || echo.0.load(Ordering::Relaxed) == 100_001).await;
    });
    server.stop();
}

/// Answers each ping with a little less than a megabyte.
#[derive(Default)]
struct Long {
    refused: AtomicUsize,
}

impl Handler for Long {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        if let Some(token) = message.reply {
            let refused = token.reply(frame(Pong, 1, (1 << 20) - 64)).is_err();
            self.refused.fetch_add(refused.into(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

/// Of one key 64 MiB wait, and those of others as well.
#[test]
fn unread_answers_take_the_share_of_their_requester() {
    const ASKED: usize = 100;
    const KEPT: usize = 64;
    let server = engine(Config::default());
    server.set_handler(Some(Arc::new(Long::default())));
    let address = format!("127.0.0.1:{}", server.listen(Listen::default()).unwrap().port());
    tokio_runtime(2).unwrap().block_on(async {
        // Each on a stream of its own.
        let mut transport = raw::transport();
        transport.stream_receive_window(0u32.into());
        let connection = dial_with(&address, &quic::key().unwrap(), transport).await;
        let (dropped, mut waiting) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
        for n in 0..ASKED {
            let mut stream = Stream::open(&connection).await;
            stream.say(frame(Ping, n as u64, 0)).await;
            let dropped = dropped.clone();
            waiting.spawn(async move {
                let answer = stream.receive.read_chunk(1, true).await;
                assert_eq!(answer.unwrap_err(), ReadError::Reset(SLOW.unwrap()));
                dropped.fetch_add(1, Ordering::Relaxed);
            });
        }
        eventually("those beyond its share are dropped", || dropped.load(Ordering::Relaxed) == ASKED - KEPT).await;

        // In a session.
        let mut transport = raw::transport();
        transport.max_concurrent_uni_streams(0u32.into());
        let connection = dial_with(&address, &quic::key().unwrap(), transport).await;
        let (mut asking, ..) = session(&connection, 1).await;
        asking.say([numbered(0), frame(Ping, 0, 0).repeat(ASKED)].concat()).await;
        while word(&mut asking).await < ASKED as u64 {}
        connection.set_max_concurrent_uni_streams((ASKED as u32).into());
        let mut answers = 0;
        loop {
            let patience = if answers < KEPT { PATIENCE } else { Duration::from_millis(300) };
            let Ok(answer) = timeout(patience, connection.accept_uni()).await else { break };
            timeout(PATIENCE, answer.unwrap().read_to_end(1 << 20)).await.expect("written in time").unwrap();
            answers += 1;
        }
        assert_eq!(answers, KEPT);
        assert_eq!(dropped.load(Ordering::Relaxed), ASKED - KEPT, "the others still wait");
    });
    server.stop();
}

/// A stream that carries several messages has a queue of answers. Each of them used to be as long as its count allowed.
#[test]
fn answers_queued_on_streams_take_the_share_of_their_requester() {
    const STREAMS: usize = 10;
    const EACH: usize = 10;
    const KEPT: usize = 64;
    let (server, long) = (engine(Config::default()), Arc::new(Long::default()));
    server.set_handler(Some(long.clone()));
    let address = format!("127.0.0.1:{}", server.listen(Listen::default()).unwrap().port());
    let refused = || long.refused.load(Ordering::Relaxed);
    tokio_runtime(2).unwrap().block_on(async {
        let mut transport = raw::transport();
        transport.stream_receive_window(0u32.into());
        let key = quic::key().unwrap();
        let connection = dial_with(&address, &key, transport).await;
        let mut streams = Vec::new();
        for n in 0..STREAMS as u64 {
            let mut stream = Stream::open(&connection).await;
            // Only a message that is not whole at once is read by a task of its stream.
            let asked = frame(Ping, n, 0).repeat(EACH);
            stream.say(&asked[..10]).await;
            stream.say(&asked[10..]).await;
            streams.push(stream);
        }
        eventually("what is beyond its share is refused", || refused() >= STREAMS * EACH - KEPT).await;
        drop(streams);
        connection.close(0u8.into(), b"");
        assert_eq!(refused(), STREAMS * EACH - KEPT);
        // The engine gives back what it drops, some time after it has heard that the connection closed.
        let connection = dial_with(&address, &key, raw::transport()).await;
        let begun = Instant::now();
        while !all_answered(&connection, EACH).await {
            assert!(begun.elapsed() < PATIENCE, "the share stays taken");
        }
    });
    server.stop();
}

/// Whether each of `count` requests on a stream of their own is answered. A refused one is never answered.
async fn all_answered(connection: &Connection, count: usize) -> bool {
    let mut stream = Stream::open(connection).await;
    stream.say(frame(Ping, 0, 0).repeat(count)).await;
    let answers = async {
        for _ in 0..count {
            stream.frame().await.expect("the stream goes on");
        }
    };
    timeout(PATIENCE / 4, answers).await.is_ok()
}

#[test]
fn a_sender_that_reads_no_acknowledgements_is_not_read_on() {
    let (server, inbox, address) = listener(Config { frame_timeout: Duration::from_millis(300), ..Config::default() });
    tokio_runtime(2).unwrap().block_on(async {
        let mut transport = raw::transport();
        transport.stream_receive_window(0u32.into());
        let connection = dial_with(&address, &quic::key().unwrap(), transport).await;
        let mut stream = Stream::open(&connection).await;
        stream.say([opening(1, 0), numbered(0), frame(Publish, 1, 8).to_vec()].concat()).await;
        assert_eq!(stream.stopped().await, SLOW);
    });
    assert_eq!(inbox.len(), 0);
    server.stop();
}

/// However often something of it comes.
#[test]
fn a_sender_that_dribbles_is_disconnected() {
    let (server, inbox, address) = listener(Config { frame_timeout: Duration::from_millis(400), ..Config::default() });
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        let begun = Instant::now();
        let mut dribbled = connection.open_bi().await.unwrap();
        let large = frame(Publish, 1, 100_000);
        for byte in large.chunks(1) {
            if dribbled.0.write_all(byte).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(begun.elapsed() < PATIENCE, "still listened to");
        }
        assert_eq!(timeout(PATIENCE, dribbled.0.stopped()).await.unwrap().unwrap(), SLOW);
    });
    assert_eq!((inbox.len(), server.stats().malformed), (0, 1));
    server.stop();
}

// ---- receivers ----

/// A server of quinn's, in a runtime of its own.
struct Receiver {
    address: String,
    connections: mpsc::UnboundedReceiver<Connection>,
    runtime: Runtime,
}

impl Receiver {
    fn new() -> Self {
        let runtime = tokio_runtime(2).unwrap();
        let _inside = runtime.enter();
        let config = quic::server_config(&[raw::ALPN.into()], raw::transport()).unwrap();
        let server = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = server.local_addr().unwrap().to_string();
        let (accepted, connections) = mpsc::unbounded_channel();
        runtime.spawn(async move {
            while let Some(incoming) = server.accept().await {
                if let Ok(connection) = incoming.await {
                    let _ = accepted.send(connection);
                }
            }
        });
        Self { address, connections, runtime }
    }

    /// The next one.
    fn connection(&mut self) -> Connection {
        let next = async { timeout(PATIENCE, self.connections.recv()).await };
        self.runtime.block_on(next).expect("dialled in time").unwrap()
    }
}

/// What to say when a session begins, and each time that something came.
#[derive(Clone, Copy)]
struct Lie {
    greeting: fn() -> Vec<u8>,
    word: fn(u64) -> Vec<u8>,
}

impl Receiver {
    /// Lies to every client. Returns the numbers in the messages that arrive.
    fn lie(&mut self, lie: Lie) -> Arc<Mutex<Vec<u64>>> {
        let (none, came) = (mpsc::unbounded_channel().1, Arc::new(Mutex::new(Vec::new())));
        let mut connections = std::mem::replace(&mut self.connections, none);
        let gathered = came.clone();
        self.runtime.spawn(async move {
            while let Some(connection) = connections.recv().await {
                tokio::spawn(lied_to(connection, lie, gathered.clone()));
            }
        });
        came
    }
}

async fn lied_to(connection: Connection, lie: Lie, came: Arc<Mutex<Vec<u64>>>) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        let came = came.clone();
        tokio::spawn(async move {
            let mut frames = Reassembler::new(Limits::default());
            while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
                frames.push(chunk.bytes);
                while let Some(frame) = frames.next_frame().unwrap() {
                    // The other end may have given the link up; here and below.
                    if frame.type_id() == SESSION {
                        let _ = send.write_all(&(lie.greeting)()).await;
                    } else if let Some(n) = number(frame.payload()) {
                        came.lock().unwrap().push(n);
                    }
                }
                let expected = came.lock().unwrap().len() as u64;
                let _ = send.write_all(&(lie.word)(expected)).await;
            }
        });
    }
}

/// A later word.
fn said(about: u8, number: u64) -> Vec<u8> {
    [&[about][..], &number.to_be_bytes()].concat()
}

fn greeting(known: u8, expected: u64) -> Vec<u8> {
    [&[known][..], &[7; 8], &expected.to_be_bytes()].concat()
}

#[test]
fn a_receiver_with_false_acknowledgements_harms_only_itself() {
    let (other, inbox, honest) = listener(Config::default());
    let lies = [
        // More than there is, also before anything came.
        Lie { greeting: || greeting(1, u64::MAX), word: |_| said(0, u64::MAX) },
        // Back and forth.
        Lie { greeting: || greeting(7, 1 << 40), word: |n| [n, 0, n + 1000, 1].map(|n| said(0, n)).concat() },
        // Greeted with some bytes more, which puts all words behind out of step.
        Lie { greeting: || [greeting(0, 0), vec![0; 8]].concat(), word: |n| said(0, n) },
        // What was not written yet, or was acknowledged, cannot be refused.
        Lie { greeting: || greeting(0, 0), word: |n| [said(9, n + 1000), said(0, n), said(9, 0)].concat() },
        // Words that never end where they should.
        Lie { greeting: || greeting(0, 0), word: |n| said(0, n)[..5].into() },
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        let mut receiver = Receiver::new();
        let client = engine(Config::default());
        let came = receiver.lie(lie);
        for n in 0..200 {
            send(&client, &receiver.address, message(Publish, n, PATIENCE)).unwrap();
        }
        until("all come", || came.lock().unwrap().len() >= 200);
        assert_eq!(*came.lock().unwrap(), (0..200).collect::<Vec<_>>(), "lie {index}");
        let peer = || client.stats().peers[0].clone();
        if index < 4 {
            until("nothing is owed", || peer().unacknowledged_bytes == 0);
            assert_eq!(peer().acknowledged, 200, "lie {index}: each counts once");
        }
        send(&client, &honest, message(Publish, index as u64, PATIENCE)).unwrap();
        until("others get theirs", || inbox.len() == index + 1);
        client.stop();
    }
    other.stop();
}

#[test]
fn a_receiver_that_acknowledges_nothing_costs_its_share_of_memory_and_no_more() {
    let (other, inbox, honest) = listener(Config::default());
    let mut receiver = Receiver::new();
    let client = engine(Config { max_unacknowledged: 100_000, ..Config::default() });
    let of_size = |n, timeout| Message {
        frame: frame(Publish, n, 10_000),
        kind: Publish,
        deadline: Some(Instant::now() + timeout),
        key: None,
    };
    let came = receiver.lie(Lie { greeting: || greeting(0, 0), word: |_| vec![] });
    let accepted = 9;
    for n in 0..accepted {
        send(&client, &receiver.address, of_size(n, PATIENCE)).unwrap();
    }
    let refused = send(&client, &receiver.address, of_size(100, Duration::from_millis(300)));
    assert!(matches!(refused, Err(SendError::Overloaded | SendError::NoRoom)), "{refused:?}");
    // Some of them twice: silence has other links tried, and their receiver does not know the session.
    until("they come", || came.lock().unwrap().len() >= accepted as usize);
    send(&client, &honest, message(Publish, 1, PATIENCE)).unwrap();
    until("others get theirs", || inbox.len() == 1);
    client.stop();
    other.stop();
}

#[test]
fn a_receiver_that_stops_every_stream_is_not_dialled_without_pause() {
    let mut receiver = Receiver::new();
    let client = engine(Config::default());
    let begun = Instant::now();
    let _ = send(&client, &receiver.address, message(Publish, 0, PATIENCE));
    let mut dials = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let next = async { timeout(Duration::from_millis(50), receiver.connections.recv()).await };
        if let Ok(Some(connection)) = receiver.runtime.block_on(next) {
            dials += 1;
            receiver.runtime.spawn(async move {
                while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                    let _ = (receive.stop(9u8.into()), send.reset(9u8.into()));
                }
            });
        }
    }
    assert!((2..15).contains(&dials), "{dials} in three seconds");
    client.stop();
}

/// Once may be the path's fault. If it happens to a message each time, the sender reports it, and does not send it for
/// ever.
#[test]
fn a_message_that_is_too_slow_for_its_receiver_is_tried_twice_on_the_same_connection() {
    let receiver = Receiver::new();
    let Receiver { address, mut connections, runtime } = receiver;
    let tries = Arc::new(AtomicUsize::new(0));
    let dialled = Arc::new(AtomicUsize::new(0));
    let counted = (tries.clone(), dialled.clone());
    runtime.spawn(async move {
        while let Some(connection) = connections.recv().await {
            counted.1.fetch_add(1, Ordering::Relaxed);
            let tries = counted.0.clone();
            tokio::spawn(async move {
                while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                    let tries = tries.clone();
                    tokio::spawn(async move {
                        // Greeted, then stopped with a last acknowledgement, like a session that does not go on.
                        let _ = receive.read_chunk(usize::MAX, true).await;
                        let _ = send.write_all(&greeting(1, 0)).await;
                        tries.fetch_add(1, Ordering::Relaxed);
                        let _ = (receive.stop(1u8.into()), send.finish());
                    });
                }
            });
        }
    });
    let client = engine(Config::default());
    let inbox = Arc::new(crate::common::Inbox::default());
    client.set_handler(Some(inbox.clone()));
    let endless = Message { deadline: None, ..message(Publish, 0, PATIENCE) };
    send(&client, &address, endless).unwrap();
    until("it is given up", || crate::common::owes_nothing(&client));
    let events = inbox.events.lock().unwrap();
    let rejected = |event: &Event| matches!(event, Event::Undelivered { count: 1, reason: TOO_SLOW, .. });
    assert!(events.iter().any(rejected), "{events:?}");
    assert_eq!((tries.load(Ordering::Relaxed), dialled.load(Ordering::Relaxed)), (2, 1));
    drop(events);
    client.stop();
}

#[test]
fn a_malformed_answer_is_not_read_on() {
    let mut receiver = Receiver::new();
    let client = engine(Config::default());
    send(&client, &receiver.address, message(Publish, 0, PATIENCE)).unwrap();
    let connection = receiver.connection();
    receiver.runtime.block_on(async {
        let mut answer = timeout(PATIENCE, connection.open_uni()).await.expect("answers are listened for").unwrap();
        answer.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let endless = async { while answer.write_all(&[7; 65536]).await.is_ok() {} };
        // Long before `frame_timeout`.
        timeout(Duration::from_secs(10), endless).await.expect("stopped");
    });
    client.stop();
}

#[test]
fn unsolicited_large_answers_do_not_fill_the_memory() {
    let mut receiver = Receiver::new();
    let client = engine(Config::default());
    send(&client, &receiver.address, message(Publish, 0, PATIENCE)).unwrap();
    let connection = receiver.connection();
    let large = frame(Publish, 1, 8 << 20);
    let complete = Arc::new(AtomicUsize::new(0));
    receiver.runtime.block_on(async {
        let mut writers = JoinSet::new();
        for _ in 0..20 {
            let mut send = timeout(PATIENCE, connection.open_uni()).await.expect("answers are listened for").unwrap();
            let (bytes, complete) = (large.slice(..large.len() - 1), complete.clone());
            writers.spawn(async move {
                // All but the last byte.
                send.write_chunk(bytes).await.unwrap();
                complete.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<()>().await;
            });
        }
        eventually("as many as may are gathered", || complete.load(Ordering::Relaxed) >= 4).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(complete.load(Ordering::Relaxed), 4);
    });
    client.stop();
}

/// Whether the message is there already cannot be known any more, and sent again it would arrive twice.
#[test]
fn a_forgotten_session_is_reported_and_the_rest_is_sent_again() {
    const RUN: [u8; 8] = [7; 8];
    let mut receiver = Receiver::new();
    let (client, inbox) = (engine(Config::default()), Arc::new(crate::common::Inbox::default()));
    client.set_handler(Some(inbox.clone()));
    let opened = |frame: RawFrame| {
        assert_eq!((frame.type_id(), frame.payload().len()), (SESSION, 25));
        let (session, run): ([u8; 16], [u8; 8]) =
            (frame.payload()[..16].try_into().unwrap(), frame.payload()[17..].try_into().unwrap());
        (session, run)
    };
    async fn next(stream: &mut Stream) -> RawFrame {
        stream.frame().await.expect("the stream goes on")
    }
    /// The next stream on which something is said, and its first frame.
    async fn accept(connection: &Connection) -> (Stream, RawFrame) {
        loop {
            let accepted = timeout(PATIENCE, connection.accept_bi()).await.expect("a stream in time");
            let mut stream = Stream::from(accepted.unwrap());
            if let Ok(frame) = stream.frame().await {
                return (stream, frame);
            }
        }
    }

    send(&client, &receiver.address, message(Publish, 0, PATIENCE)).unwrap();
    let connection = receiver.connection();
    let session = receiver.runtime.block_on(async {
        let (mut stream, opening) = accept(&connection).await;
        let (session, run) = opened(opening);
        assert_eq!(run, [0; 8], "it has met no peer");
        stream.say(greeting(0, 0)).await;
        assert_eq!(next(&mut stream).await.payload(), 0u64.to_be_bytes());
        assert_eq!(number(next(&mut stream).await.payload()), Some(0));
        stream.say(said(0, 1)).await;
        eventually("it is acknowledged", || client.stats().peers[0].acknowledged == 1).await;
        send(&client, &receiver.address, message(Publish, 1, PATIENCE)).unwrap();
        assert_eq!(number(next(&mut stream).await.payload()), Some(1));
        connection.close(0u8.into(), b"an outage");
        session
    });
    let hour = Duration::from_secs(3600);
    let connection = receiver.connection();
    receiver.runtime.block_on(async {
        let (mut stream, opening) = accept(&connection).await;
        assert_eq!(opened(opening), (session, RUN));
        // It goes after the others, and cannot have arrived before.
        send(&client, &receiver.address, message(Publish, 2, hour)).unwrap();
        let _ = (stream.receive.stop(FORGOTTEN), stream.send.reset(FORGOTTEN));

        let (mut stream, opening) = accept(&connection).await;
        let (another, run) = opened(opening);
        assert!(another != session && run == [0; 8]);
        stream.say(greeting(0, 0)).await;
        let numbered = next(&mut stream).await;
        let (first, keep) = numbered.payload().split_at(8);
        assert_eq!(first, 0u64.to_be_bytes());
        let keep = u32::from_be_bytes(keep.try_into().expect("how long it may be owed"));
        assert!(u64::from(keep) >= hour.as_secs() - 60, "{keep} s");
        assert_eq!(number(next(&mut stream).await.payload()), Some(2));
        stream.say(said(0, 1)).await;
    });
    until("nothing is owed", || crate::common::owes_nothing(&client));
    let lost =
        |event: &&Event| matches!(event, Event::Undelivered { count: 1, reason: UndeliveredReason::SessionLost, .. });
    assert_eq!(inbox.events.lock().unwrap().iter().filter(lost).count(), 1);
    assert_eq!(client.stats().undelivered, 1);
    client.stop();
}
