//! The receiver's half of a session.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use macula_peer_core::counter::Counter;
use macula_peer_core::errors::{Rejection, ReplyError};
use macula_peer_core::events::Event;
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::proto::codes::stream::{MALFORMED, SESSION_FORGOTTEN, TOO_MANY_SESSIONS, TOO_SLOW};
use macula_peer_core::proto::session::{NUMBER, Opening, Record, Run, parse_number};
use macula_peer_core::session::Arrival;
use macula_peer_core::session_receiver::{Channel, Greeting, met};
use macula_peer_core::session_table::{Opened, Refused, SessionKey, SessionTable};
use macula_peer_core::shares::Client;
use macula_peer_core::sync::{lock, now_or_never};
use macula_peer_core::turns::{Piece, Spent};
use macula_peer_core::types::{Fingerprint, Sender};
use macula_peer_wire::{MessageType, RawFrame};
use quinn::{Connection, SendStream, VarInt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::hello;
use crate::inbound::{AnswerSession, ReplyTo, ReplyToken};
use crate::lifecycle::Lifecycle;
use crate::shares::Unread;
use crate::streams::{IncomingStream, REPLY_TIMEOUT};
use crate::transfer::{self, Write, write_now};

/// How often a sender that waits for room here is told that this node lives: less than half of the time after which it
/// would doubt that.
const STILL_HERE: Duration = Duration::from_millis(200);

/// Frames handed over before the stream's task lets others run and acknowledges them.
const BATCH: usize = 128;

/// The clock is read after this many messages, or after one with as many bytes as these.
const TIMED: usize = 8;
const TIMED_BYTES: usize = 256;

/// Connections of a session that answers may go over. Of more, which only a sender on a path that keeps breaking has, the
/// last ones count.
const MAX_CONNECTIONS: usize = 4;

/// The sessions of the nodes that send to this one.
pub(crate) struct Sessions {
    table: Mutex<SessionTable<Arc<Answers>>>,
    run: Run,
    /// How often there were too many: streams that were refused, and sessions that were forgotten.
    over: Counter,
    back: Arc<Back>,
}

/// What answers need to reach the sender.
struct Back {
    lifecycle: Arc<Lifecycle>,
    unread: Unread,
    /// Another connection with the holder of a key.
    elsewhere: Box<dyn Fn(Fingerprint) -> Option<Connection> + Send + Sync>,
}

/// One session, and how to reach its sender: over the connection that it was last heard on, or another one with the
/// sender, which may have dropped that one while it waited for its answer.
pub(crate) struct Answers {
    sender: Client,
    channels: [Mutex<Channel>; 2],
    /// One stream of a channel hands over at a time: an older one may still carry the same messages.
    turns: [Semaphore; 2],
    /// The connections of its open streams, with their number, the last one opened last.
    connections: Mutex<Vec<(Connection, usize)>>,
    /// Seconds for which its sender may owe something once it has no connection.
    keep: AtomicU32,
    back: Arc<Back>,
}

/// A session, as long as one of its streams is open.
struct Open {
    sessions: Arc<Sessions>,
    key: SessionKey,
    session: Arc<Answers>,
    connection: usize,
}

fn new_run() -> Run {
    fastrand::u64(1..).to_be_bytes()
}

impl Sessions {
    /// With room for `most` sessions. `elsewhere` finds another connection with the holder of a key.
    pub(crate) fn new(
        most: usize,
        lifecycle: Arc<Lifecycle>,
        unread: Unread,
        elsewhere: impl Fn(Fingerprint) -> Option<Connection> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let back = Arc::new(Back { lifecycle, unread, elsewhere: Box::new(elsewhere) });
        Arc::new(Self { table: Mutex::new(SessionTable::new(most)), run: new_run(), over: Counter::default(), back })
    }

    fn clock(&self) -> u64 {
        self.back.lifecycle.clock(Instant::now())
    }

    fn open(
        self: &Arc<Self>,
        (key, id): SessionKey,
        stream: &IncomingStream,
        run: Run,
    ) -> Result<(Open, Opened<Arc<Answers>>), Refused> {
        let connection = &stream.accepted.connection;
        let met = met(run, self.run);
        let network = stream.accepted.remote().ip().into();
        let now = self.clock();
        let opened = lock(&self.table).open((key, id), network, met, now, || {
            Arc::new(Answers {
                sender: stream.accepted.client(),
                channels: Default::default(),
                turns: [Semaphore::new(1), Semaphore::new(1)],
                connections: Mutex::default(),
                keep: AtomicU32::new(0),
                back: self.back.clone(),
            })
        });
        let too_many = match &opened {
            Ok(opened) => opened.took_room,
            Err(why) => *why == Refused::TooMany,
        };
        if too_many && self.over.add(1) == 0 {
            tracing::warn!(%key, from = %stream.accepted.remote(), "too many sessions");
        }
        let opened = opened?;
        let session = opened.session.clone();
        session.streams_on(connection);
        Ok((Open { sessions: self.clone(), key: (key, id), session, connection: connection.stable_id() }, opened))
    }

    /// How many are remembered.
    pub(crate) fn len(&self) -> usize {
        lock(&self.table).count()
    }

    /// How often there were too many.
    pub(crate) fn over(&self) -> u64 {
        self.over.get()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.session.no_stream_on(self.connection);
        let keep = Duration::from_secs(self.session.keep.load(Ordering::Relaxed).into());
        lock(&self.sessions.table).close(self.key, keep, self.sessions.clock());
    }
}

/// Reads a stream of a session to its end. `opening` is the payload of the frame that began it.
pub(crate) async fn receive(mut stream: IncomingStream, mut send: SendStream, opening: Bytes) {
    let key = stream.accepted.key();
    let (Some(key), Some(Opening { id, channel, run, target })) = (key, Opening::parse(&opening)) else {
        // It may be closed already, which has the same effect.
        let _ = stream.receive.stop(MALFORMED.into());
        return;
    };
    let (server, sender) = (stream.server.clone(), Sender::Key(key));
    if !server.keys.serves(target) {
        return hello::refuse(&mut stream.receive, &mut send);
    }
    let busy = server.busy.late_turn(sender, 1).await;
    let (open, known) = match server.sessions.open((key, id), &stream, run) {
        Ok((open, Opened { known, restarted, .. })) => {
            if restarted {
                server.inbox.event(Event::SessionRestarted { peer: stream.accepted.remote(), key });
            }
            (open, known)
        }
        Err(why) => {
            let code: VarInt = match why {
                Refused::Forgotten => SESSION_FORGOTTEN.into(),
                Refused::TooMany => TOO_MANY_SESSIONS.into(),
            };
            // It may be closed already, which has the same effect.
            let _ = (stream.receive.stop(code), send.reset(code));
            return;
        }
    };
    drop(busy);
    let Greeting { known, expected } = lock(&open.session.channels[channel]).greet(known, run);
    let greeting = Record::Greeting { known, run: server.sessions.run, expected };
    if !say(&mut stream, &mut send, greeting.bytes()).await {
        return;
    }
    let mut said = expected;
    let mut number = None;
    let mut words = BytesMut::new();
    let mut spent = Spent::default();
    loop {
        let behind = spent.is_up();
        let mut ready = pin!(async {
            server.inbox.room(sender).await;
            open.session.turn(channel).await
        });
        let turn = loop {
            if let Ok(turn) = timeout(STILL_HERE, &mut ready).await {
                break turn;
            }
            if !say(&mut stream, &mut send, Record::Expected(said).bytes()).await {
                return;
            }
        };
        // Not before: a task that has a turn must go on, and an acknowledgement may take long to write.
        let busy = if behind { server.busy.late_turn(sender, 1).await } else { None };
        // Its id may be another one by now, and this one another node's.
        if !server.keys.serves(target) {
            return hello::refuse(&mut stream.receive, &mut send);
        }
        let piece = Piece::begin(Instant::now());
        let batch = read_batch(&mut stream, &open, channel, &mut number, &mut words);
        spent.add(piece, Instant::now());
        drop(busy);
        let next = if let Batch::Heavy(heavy, _) = &batch { Some(*heavy) } else { number };
        let expected = open.session.expected(channel, next);
        if expected != said {
            said = expected;
            Record::Expected(said).put(&mut words);
        }
        if !words.is_empty() && !say(&mut stream, &mut send, words.split().freeze()).await {
            return;
        }
        match batch {
            // The sender learns which one it was: the message that is expected next.
            Batch::Refused(why) => return stream.refuse(why),
            Batch::Full => drop(turn),
            Batch::Last => {
                drop(turn);
                let mut more = pin!(stream.more());
                let more = poll_fn(|cx| {
                    let polled = more.as_mut().poll(cx);
                    if polled.is_pending() {
                        // Others go on meanwhile.
                        spent.reset();
                    }
                    polled
                });
                if !more.await {
                    break;
                }
            }
            Batch::Heavy(heavy, frame) => {
                let mut taken = pin!(take_heavy(&stream, turn, heavy, frame));
                let taken = loop {
                    match timeout(STILL_HERE, &mut taken).await {
                        Ok(taken) => break taken,
                        Err(_) if say(&mut stream, &mut send, Record::Expected(said).bytes()).await => {}
                        Err(_) => return,
                    }
                };
                match taken {
                    Some(Ok(())) => {}
                    Some(Err(why)) => Record::Refused(why.code(), heavy).put(&mut words),
                    // What follows it must not be handed over before.
                    None => return,
                }
            }
        }
    }
    if stream.finished {
        lock(&server.sessions.table).end(&open.key);
    }
}

enum Batch {
    /// There may be more.
    Full,
    /// There is no more until bytes come.
    Last,
    /// The message of this number comes next, and is much work.
    Heavy(u64, RawFrame),
    /// What comes next cannot be read.
    Refused(Rejection),
}

/// Hands over some of what is there. `words`: what to tell the sender of it.
fn read_batch(
    stream: &mut IncomingStream,
    open: &Open,
    channel: usize,
    number: &mut Option<u64>,
    words: &mut BytesMut,
) -> Batch {
    let (piece, mut untimed) = (Piece::begin(Instant::now()), 0);
    for _ in 0..BATCH {
        if untimed >= TIMED {
            untimed = 0;
            if piece.is_over(Instant::now()) {
                break;
            }
        }
        if stream.server.inbox.is_crowded(Sender::Key(open.key.0)) {
            break;
        }
        let frame = match stream.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => return Batch::Last,
            Err(error) => return Batch::Refused(Rejection::from(&error)),
        };
        untimed += 1 + frame.payload().len() / TIMED_BYTES;
        if frame.type_id() == NUMBER {
            let Some((said, keep)) = parse_number(frame.payload()) else {
                return Batch::Refused(Rejection::Malformed);
            };
            if number.is_none() {
                open.session.begins(channel, said);
            }
            *number = Some(said);
            open.session.keep.fetch_max(keep, Ordering::Relaxed);
            continue;
        }
        let Some(current) = *number else { return Batch::Refused(Rejection::Malformed) };
        *number = current.checked_add(1);
        if number.is_none() {
            return Batch::Refused(Rejection::Malformed);
        }
        if is_heavy(frame.payload()) {
            return Batch::Heavy(current, frame);
        }
        if let Err(why) = hand_over(stream, &open.session, channel, current, frame) {
            Record::Refused(why.code(), current).put(words);
        }
    }
    Batch::Full
}

/// Small words on a stream of their own: one that takes none for so long has a sender that reads none of them. What has
/// come of its messages is let go.
async fn say(stream: &mut IncomingStream, send: &mut SendStream, word: Bytes) -> bool {
    match timeout(stream.server.config.frame_timeout, send.write_chunk(word)).await {
        Ok(written) => written.is_ok(),
        Err(_) => {
            stream.too_slow();
            false
        }
    }
}

/// Under the channel's lock, because an older stream of the session may still carry the same message.
fn hand_over(
    stream: &IncomingStream,
    session: &Arc<Answers>,
    channel: usize,
    number: u64,
    frame: RawFrame,
) -> Result<(), Rejection> {
    let mut incoming = lock(&session.channels[channel]);
    match incoming.accept(number) {
        Arrival::New => {}
        Arrival::Repeated => return Ok(()),
        Arrival::Doubtful => return stream.server.inbox.can_take(&frame),
    }
    let reply = session.reply_to(&frame);
    let taken = stream.accepted.hand_over(&stream.server, frame, reply);
    if taken.is_err() {
        incoming.refuse(number);
    }
    taken
}

/// Hands over an expensive message. It counts as arrived when that is done, and until then no other stream of the
/// channel goes on, even if this one ends. `None`: it was not done.
fn take_heavy(
    stream: &IncomingStream,
    turn: Turn,
    number: u64,
    frame: RawFrame,
) -> impl Future<Output = Option<Result<(), Rejection>>> + use<> {
    let (server, accepted) = (stream.server.clone(), stream.accepted.clone());
    let decoding = server.inbox.decoding.clone();
    let sender = accepted.sender();
    let hand_over = move || {
        let Turn { session, channel } = &turn;
        let arrival = lock(&session.channels[*channel]).arrival(number);
        match arrival {
            Arrival::New => {}
            Arrival::Repeated => return Ok(()),
            Arrival::Doubtful => return server.inbox.can_take(&frame),
        }
        let reply = session.reply_to(&frame);
        let taken = accepted.hand_over(&server, frame, reply);
        let mut incoming = lock(&session.channels[*channel]);
        incoming.accept(number);
        if taken.is_err() {
            incoming.refuse(number);
        }
        taken
    };
    async move { decoding.run(sender, hand_over).await }
}

/// The permission to hand over messages of a channel.
struct Turn {
    session: Arc<Answers>,
    channel: usize,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.session.turns[self.channel].add_permits(1);
    }
}

impl Answers {
    async fn turn(self: &Arc<Self>, channel: usize) -> Turn {
        if let Ok(permit) = self.turns[channel].acquire().await {
            permit.forget();
        }
        Turn { session: self.clone(), channel }
    }

    fn reply_to(self: &Arc<Self>, frame: &RawFrame) -> Option<ReplyToken> {
        let answered = MessageType::from_id(frame.type_id()).is_some_and(MessageType::is_answered);
        answered.then(|| {
            let session: Weak<dyn AnswerSession> = Arc::downgrade(self) as _;
            ReplyToken::new(ReplyTo::Session(session))
        })
    }

    /// A stream of a channel begins with this number.
    fn begins(&self, channel: usize, number: u64) {
        lock(&self.channels[channel]).begin(number);
    }

    /// What may be said on a stream on which this number comes next.
    fn expected(&self, channel: usize, next: Option<u64>) -> u64 {
        lock(&self.channels[channel]).expected(next)
    }

    fn streams_on(&self, connection: &Connection) {
        let mut connections = lock(&self.connections);
        let known = connections.iter().position(|(known, _)| known.stable_id() == connection.stable_id());
        let streams = known.map_or(0, |index| connections.remove(index).1);
        if connections.len() >= MAX_CONNECTIONS {
            connections.remove(0);
        }
        connections.push((connection.clone(), streams + 1));
    }

    fn no_stream_on(&self, connection: usize) {
        let mut connections = lock(&self.connections);
        let Some(index) = connections.iter().position(|(known, _)| known.stable_id() == connection) else { return };
        connections[index].1 -= 1;
        if connections[index].1 == 0 {
            connections.remove(index);
        }
    }

    /// For the requester to make room.
    fn wait(&self, len: usize, write: impl Future<Output = ()> + Send + 'static) -> Result<(), ReplyError> {
        let Back { lifecycle, unread, .. } = &*self.back;
        let waiting = unread.begin(self.sender, len).ok_or(ReplyError::Gone)?;
        let mut stopping = lifecycle.stopping();
        lifecycle.spawn(async move {
            let _waiting = waiting;
            tokio::select! {
                () = write => {}
                // It may not be for as long that the engine waits for its tasks.
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
        });
        Ok(())
    }
}

impl AnswerSession for Answers {
    fn answer(&self, frame: Bytes) -> Result<(), ReplyError> {
        let connections = lock(&self.connections);
        let mut latest_first = connections.iter().rev().map(|(connection, _)| connection);
        let live = latest_first.find(|connection| connection.close_reason().is_none()).cloned();
        drop(connections);
        let with_sender = || (self.back.elsewhere)(self.sender.key()?);
        let connection = live.or_else(with_sender).ok_or(ReplyError::Gone)?;
        if let Some(Ok(mut send)) = now_or_never(connection.open_uni()) {
            // Dropped, the stream is finished.
            match write_now(&mut send, &frame) {
                Write::All => return Ok(()),
                Write::Failed => return Err(ReplyError::Gone),
                Write::Part(rest) => return self.wait(rest.len(), write_rest(send, rest)),
            }
        }
        self.wait(frame.len(), async move {
            // Those before it go on, or are given up.
            if let Ok(Ok(send)) = timeout(REPLY_TIMEOUT, connection.open_uni()).await {
                write_rest(send, frame).await;
            }
        })
    }
}

/// An answer is of no use to a peer that is gone or does not read.
async fn write_rest(mut send: SendStream, rest: Bytes) {
    if !transfer::write(&mut send, rest).await {
        // It may be closed already, which has the same effect.
        let _ = send.reset(TOO_SLOW.into());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use macula_peer_core::proto::session::{NO_RUN, put_number};
    use tokio::task::spawn_blocking;
    use tokio::time::sleep;

    use super::*;
    use crate::relay::testing::{PATIENCE, client_config, endpoint, transport};
    use crate::{Config, Engine, Listen};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_session_is_kept_for_as_long_as_its_sender_asks() {
        let keep: u32 = 7200;
        let engine = Engine::start(Config::default()).unwrap();
        let port = engine.listen(Listen::default()).unwrap().port();
        let connecting = endpoint(None).connect_with(client_config(transport()), ([127, 0, 0, 1], port).into(), "node");
        let connection = connecting.unwrap().await.unwrap();
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        let opening = Opening { id: [1; 16], channel: 0, run: NO_RUN, target: &[] };
        let mut piece = BytesMut::from(opening.frame());
        put_number(&mut piece, 0, Some(keep));
        piece.extend_from_slice(&[1, MessageType::Publish.id(), 0, 0, 0, 0, 0, 1, 0x80]);
        send.write_all(&piece).await.unwrap();
        // The first word, and that the message has arrived.
        timeout(PATIENCE, receive.read_exact(&mut [0; 17 + 9])).await.unwrap().unwrap();
        let node = engine.node().clone();
        let closed_after = node.server.sessions.clock();
        connection.close(0u8.into(), b"");
        let until = Instant::now() + PATIENCE;
        let forgotten_at = loop {
            if let [forgotten_at] = lock(&node.server.sessions.table).forgotten_at()[..] {
                break forgotten_at;
            }
            assert!(Instant::now() < until, "it is still open");
            sleep(Duration::from_millis(2)).await;
        };
        assert!(forgotten_at >= closed_after + u64::from(keep) * 1000, "{forgotten_at} after {closed_after}");
        drop(node);
        spawn_blocking(move || engine.stop()).await.unwrap();
    }
}
