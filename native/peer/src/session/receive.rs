//! The receiver's half of a session.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hashbrown::HashMap;
use macula_peer_wire::{MessageType, RawFrame};
use quinn::{Connection, SendStream};
use tokio::time::timeout;

use super::{EXPECTED, MAX_OPEN_LEN, NUMBER, NUMBER_LEN, SessionId, WORD_LEN, put_word};
use crate::backlog::Sender;
use crate::decide::session::{Arrival, Incoming};
use crate::decide::shares::Client;
use crate::error::{Rejection, ReplyError};
use crate::hello;
use crate::identity::Fingerprint;
use crate::link::{Write, lock, now_or_never, write_now};
use crate::listen::{NOT_A_FRAME, REPLY_TIMEOUT, SLOW_FRAME, Stream};
use crate::message::{Event, ReplyTo, ReplyToken};
use crate::node::Node;
use crate::socket::canonical;
use crate::transfer;

/// Sessions remembered in all, and of one key: a node has one for each name that it knows us by. The least recently used
/// gives way; its sender, should it come back, is told that its session is not known.
const MAX_SESSIONS: usize = 8192;
const MAX_SESSIONS_OF_KEY: usize = 64;

/// How long a session without a connection is remembered. A sender gives up what it owes after a minute and less.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// How often a sender that waits for room here is told that this node lives: less than half of the time after which it
/// would doubt that.
const STILL_HERE: Duration = Duration::from_millis(200);

/// Frames handed over before the stream's task lets others run and says how far it is.
const BATCH: usize = 128;

/// The sessions of those who send to this node.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<HashMap<SessionKey, Arc<Answers>>>);

type SessionKey = (Fingerprint, SessionId);

/// One session, and the way back to its sender: over the connection that it was last heard on, or another one with the
/// sender, which may have let go of that one while it waited for its answer.
pub(crate) struct Answers {
    sender: Fingerprint,
    /// `None` until the first stream of the channel.
    channels: [Mutex<Option<Incoming>>; 2],
    /// The connections of its streams that are open, the last one opened last.
    connections: Mutex<Vec<Connection>>,
    /// The connection that it was made on.
    first: usize,
    restart_told: AtomicBool,
    /// Milliseconds of the node's clock at the last use.
    used: AtomicU64,
}

/// A session, as long as one of its streams is open.
struct Open {
    node: Arc<Node>,
    session: Arc<Answers>,
    connection: usize,
}

impl Sessions {
    /// The session of a sender.
    fn open(&self, node: &Arc<Node>, key: SessionKey, connection: &Connection) -> Open {
        let now = node.clock(Instant::now());
        let id = connection.stable_id();
        let mut table = lock(&self.0);
        if !table.contains_key(&key) {
            make_room(&mut table, key.0, now.saturating_sub(FORGET_AFTER.as_millis() as u64));
        }
        let session = table.entry(key).or_insert_with(|| {
            Arc::new(Answers {
                sender: key.0,
                channels: Default::default(),
                connections: Mutex::default(),
                first: id,
                restart_told: AtomicBool::new(false),
                used: AtomicU64::new(now),
            })
        });
        lock(&session.connections).push(connection.clone());
        Open { node: node.clone(), session: session.clone(), connection: id }
    }

    /// Its sender has ended it.
    fn close(&self, key: &SessionKey) {
        lock(&self.0).remove(key);
    }
}

/// Sessions with a stream are as many as there are streams, and stay.
fn make_room(table: &mut HashMap<SessionKey, Arc<Answers>>, key: Fingerprint, stale: u64) {
    table.retain(|_, session| session.is_open() || session.used.load(Ordering::Relaxed) >= stale);
    let of_key = table.keys().filter(|(other, _)| *other == key).count();
    if of_key >= MAX_SESSIONS_OF_KEY {
        forget_oldest(table, |(other, _)| *other == key);
    } else if table.len() >= MAX_SESSIONS {
        forget_oldest(table, |_| true);
    }
}

fn forget_oldest(table: &mut HashMap<SessionKey, Arc<Answers>>, of: impl Fn(&SessionKey) -> bool) {
    let closed = table.iter().filter(|(key, session)| of(key) && !session.is_open());
    let oldest = closed.min_by_key(|(_, session)| session.used.load(Ordering::Relaxed));
    if let Some(key) = oldest.map(|(key, _)| *key) {
        table.remove(&key);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.session.used.store(self.node.clock(Instant::now()), Ordering::Relaxed);
        let mut connections = lock(&self.session.connections);
        if let Some(index) = connections.iter().position(|connection| connection.stable_id() == self.connection) {
            connections.remove(index);
        }
    }
}

/// Reads a stream of a session to its end. `opening` is the payload of the frame that began it.
pub(crate) async fn receive(mut stream: Stream, mut send: SendStream, opening: Bytes) {
    let key = stream.accepted.key();
    let (Some(key), Some(Opening { id, channel, target })) = (key, parse_opening(&opening)) else {
        // Already closed is as good.
        let _ = stream.receive.stop(NOT_A_FRAME.into());
        return;
    };
    let (node, sender) = (stream.node.clone(), Sender::Key(key));
    if !node.serves(target) {
        return hello::refuse(&mut stream.receive, &mut send);
    }
    let open = node.sessions.open(&node, (key, id), stream.accepted.connection());
    let (known, mut said) = open.session.begin(channel);
    if !say(&mut stream, &mut send, word(known.into(), said)).await {
        return;
    }
    let mut number = None;
    let mut words = BytesMut::new();
    let mut may_be_restart = !known && open.is_first();
    loop {
        while timeout(STILL_HERE, node.room(sender)).await.is_err() {
            if !say(&mut stream, &mut send, word(EXPECTED, said)).await {
                return;
            }
        }
        // Its id may be another one by now, and this one another node's.
        if !node.serves(target) {
            return hello::refuse(&mut stream.receive, &mut send);
        }
        let batch = read_batch(&mut stream, &open, channel, &mut number, &mut may_be_restart, &mut words);
        let expected = open.session.expected(channel, number);
        if expected != said {
            said = expected;
            put_word(&mut words, EXPECTED, said);
        }
        if !words.is_empty() && !say(&mut stream, &mut send, words.split().freeze()).await {
            return;
        }
        match batch {
            // The sender learns which one it was: the one that is expected next.
            Batch::Refused(why) => return stream.refuse(why),
            Batch::Full => tokio::task::yield_now().await,
            Batch::Last if stream.more().await => {}
            Batch::Last => break,
        }
    }
    if stream.finished {
        node.sessions.close(&(key, id));
    }
}

enum Batch {
    /// There may be more.
    Full,
    /// There is no more until bytes come.
    Last,
    /// What comes next cannot be read.
    Refused(Rejection),
}

/// Hands over some of what is there. `words`: what is to be said of it.
fn read_batch(
    stream: &mut Stream,
    open: &Open,
    channel: usize,
    number: &mut Option<u64>,
    may_be_restart: &mut bool,
    words: &mut BytesMut,
) -> Batch {
    for _ in 0..BATCH {
        if open.node.is_crowded(Sender::Key(open.session.sender)) {
            break;
        }
        let frame = match stream.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => return Batch::Last,
            Err(error) => return Batch::Refused(Rejection::from(&error)),
        };
        let begins = number.is_none();
        let Some(frame) = numbered(frame, number) else {
            if let (true, Some(first)) = (begins, *number) {
                open.session.begins(channel, first);
            }
            if std::mem::take(may_be_restart) && number.is_some_and(|number| number > 0) {
                open.tell_restart(stream);
            }
            continue;
        };
        let Some(current) = *number else { return Batch::Refused(Rejection::Malformed) };
        *number = current.checked_add(1);
        if number.is_none() {
            return Batch::Refused(Rejection::Malformed);
        }
        if let Err(why) = hand_over(stream, &open.session, channel, current, frame) {
            put_word(words, why.code(), current);
        }
    }
    Batch::Full
}

impl Open {
    /// Whether the session was made on this connection.
    fn is_first(&self) -> bool {
        self.session.first == self.connection
    }

    fn tell_restart(&self, stream: &Stream) {
        let Some(key) = stream.accepted.key() else { return };
        if !self.session.restart_told.swap(true, Ordering::Relaxed) {
            self.node.event(Event::SessionRestarted { peer: stream.accepted.remote(), key });
        }
    }
}

/// Small words on a stream of their own: one that takes none for so long has a sender that reads none of them. What has
/// come of its messages is let go.
async fn say(stream: &mut Stream, send: &mut SendStream, word: Bytes) -> bool {
    match timeout(stream.node.config.frame_timeout, send.write_chunk(word)).await {
        Ok(written) => written.is_ok(),
        Err(_) => {
            stream.too_slow();
            false
        }
    }
}

fn word(about: u8, number: u64) -> Bytes {
    let mut word = BytesMut::with_capacity(WORD_LEN);
    put_word(&mut word, about, number);
    word.freeze()
}

struct Opening<'a> {
    id: SessionId,
    channel: usize,
    /// The id of the node that the session is for; empty, whichever this is.
    target: &'a [u8],
}

fn parse_opening(payload: &[u8]) -> Option<Opening<'_>> {
    let (id, rest) = payload.split_first_chunk()?;
    match rest {
        [channel @ (0 | 1), target @ ..] if payload.len() <= MAX_OPEN_LEN => {
            Some(Opening { id: *id, channel: usize::from(*channel), target })
        }
        _ => None,
    }
}

/// A message; `None` for a frame that was about its number.
fn numbered(frame: RawFrame, number: &mut Option<u64>) -> Option<RawFrame> {
    if frame.type_id() != NUMBER {
        return Some(frame);
    }
    *number = <[u8; NUMBER_LEN]>::try_from(frame.payload()).ok().map(u64::from_be_bytes);
    None
}

/// Under the channel's lock, because an older stream of the session may still carry the same message.
fn hand_over(
    stream: &Stream,
    session: &Arc<Answers>,
    channel: usize,
    number: u64,
    frame: RawFrame,
) -> Result<(), Rejection> {
    let mut incoming = lock(&session.channels[channel]);
    let incoming = incoming.get_or_insert_default();
    match incoming.accept(number) {
        Arrival::New => {}
        Arrival::Repeated => return Ok(()),
        Arrival::Doubtful => return stream.node.can_take(&frame),
    }
    let answered = MessageType::from_id(frame.type_id()).is_some_and(MessageType::is_answered);
    let reply =
        answered.then(|| ReplyToken::new(ReplyTo::Session(Arc::downgrade(session), Arc::downgrade(&stream.node))));
    let taken = stream.hand_over(frame, reply);
    if taken.is_err() {
        incoming.refuse(number);
    }
    taken
}

impl Answers {
    /// Begins a stream of a channel. Returns whether it is not the first, and the number expected.
    fn begin(&self, channel: usize) -> (bool, u64) {
        let mut incoming = lock(&self.channels[channel]);
        let known = incoming.is_some();
        (known, incoming.get_or_insert_default().expected(0))
    }

    /// A stream of a channel begins with this number.
    fn begins(&self, channel: usize, number: u64) {
        lock(&self.channels[channel]).get_or_insert_default().begin(number);
    }

    /// What may be said on a stream on which this number comes next.
    fn expected(&self, channel: usize, next: Option<u64>) -> u64 {
        lock(&self.channels[channel]).get_or_insert_default().expected(next.unwrap_or(0))
    }

    fn is_open(&self) -> bool {
        !lock(&self.connections).is_empty()
    }

    /// Sends an answer on a stream of its own.
    pub(crate) fn answer(self: Arc<Self>, node: &Arc<Node>, frame: Bytes) -> Result<(), ReplyError> {
        let connections = lock(&self.connections);
        let live = connections.iter().rev().find(|connection| connection.close_reason().is_none()).cloned();
        drop(connections);
        let connection = live.or_else(|| node.connection_with(self.sender)).ok_or(ReplyError::Gone)?;
        if let Some(Ok(mut send)) = now_or_never(connection.open_uni()) {
            // Dropped, the stream is finished.
            match write_now(&mut send, &frame) {
                Write::All => return Ok(()),
                Write::Failed => return Err(ReplyError::Gone),
                Write::Part(rest) => return self.wait(node, &connection, rest.len(), write_rest(send, rest)),
            }
        }
        self.wait(node, &connection.clone(), frame.len(), async move {
            // Those before it go on, or are given up.
            if let Ok(Ok(send)) = timeout(REPLY_TIMEOUT, connection.open_uni()).await {
                write_rest(send, frame).await;
            }
        })
    }

    /// For the asker to make room.
    fn wait(
        &self,
        node: &Node,
        connection: &Connection,
        len: usize,
        write: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ReplyError> {
        let asker = Client::new(self.sender, canonical(connection.remote_address()).ip());
        let waiting = node.unread.begin(asker, len).ok_or(ReplyError::Gone)?;
        let mut stopping = node.stopping();
        node.spawn(async move {
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

/// An answer is of no use to a peer that is gone or does not read.
async fn write_rest(mut send: SendStream, rest: Bytes) {
    if !transfer::write(&mut send, rest).await {
        // Already closed is as good.
        let _ = send.reset(SLOW_FRAME.into());
    }
}
