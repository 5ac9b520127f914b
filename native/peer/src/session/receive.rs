//! The receiver's half of a session.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use hashbrown::HashMap;
use macula_peer_wire::{MessageType, RawFrame};
use quinn::SendStream;
use tokio::time::timeout;

use super::{GREETING, NUMBER, NUMBER_LEN, OPEN_LEN, SessionId};
use crate::decide::session::Incoming;
use crate::error::ReplyError;
use crate::identity::Fingerprint;
use crate::link::{Write, lock, now_or_never, write_now};
use crate::listen::{Accepted, NOT_A_FRAME, Stream, WRITE_TIMEOUT};
use crate::message::{Event, ReplyTo, ReplyToken};
use crate::node::Node;

/// Sessions remembered in all, and of one key: a node has one for each name that it knows us by. One gives way to a new
/// one; its sender, should it come back, is told that its session is not known.
const MAX_SESSIONS: usize = 8192;
const MAX_SESSIONS_OF_KEY: usize = 64;

/// How long a session without a connection is remembered. A sender gives up what it owes after a minute and less.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Answers of one session that may wait for the asker to make room.
const MAX_WAITING_ANSWERS: usize = 256;

/// Frames handed over before the stream's task lets others run and says how far it is.
const BATCH: usize = 128;

/// The sessions of those who send to this node.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<HashMap<(Fingerprint, SessionId), Arc<Answers>>>);

/// One session, and the way back to its sender: over the connection that it was last heard on.
pub(crate) struct Answers {
    channels: [Mutex<Incoming>; 2],
    /// Weak: a session outlives its connections, whose memory is a hundred times its own.
    connection: Mutex<Weak<Accepted>>,
    waiting: AtomicUsize,
    /// Milliseconds of the node's clock at the last use.
    used: AtomicU64,
}

impl Sessions {
    /// The session of a sender, and whether it was known.
    fn open(&self, node: &Node, key: Fingerprint, id: SessionId, accepted: &Arc<Accepted>) -> (Arc<Answers>, bool) {
        let now = node.clock(Instant::now());
        let mut table = lock(&self.0);
        if let Some(session) = table.get(&(key, id)) {
            *lock(&session.connection) = Arc::downgrade(accepted);
            session.used.store(now, Ordering::Relaxed);
            return (session.clone(), true);
        }
        let stale = now.saturating_sub(FORGET_AFTER.as_millis() as u64);
        // A session that a stream is open for is held by its task.
        table.retain(|_, session| Arc::strong_count(session) > 1 || session.used.load(Ordering::Relaxed) >= stale);
        let of_key = table.keys().filter(|(other, _)| *other == key).count();
        if of_key >= MAX_SESSIONS_OF_KEY {
            forget_one(&mut table, |(other, _)| *other == key);
        } else if table.len() >= MAX_SESSIONS {
            forget_one(&mut table, |_| true);
        }
        let session = Arc::new(Answers {
            channels: Default::default(),
            connection: Mutex::new(Arc::downgrade(accepted)),
            waiting: AtomicUsize::new(0),
            used: AtomicU64::new(now),
        });
        table.insert((key, id), session.clone());
        (session, false)
    }

    /// Its sender has ended it.
    fn close(&self, key: Fingerprint, id: SessionId) {
        lock(&self.0).remove(&(key, id));
    }
}

/// The least recently used gives way, but none that a stream is open for while there is another: otherwise strangers
/// could have the sessions of others forgotten, and what was handed over handed over again.
fn forget_one(
    table: &mut HashMap<(Fingerprint, SessionId), Arc<Answers>>,
    of: impl Fn(&(Fingerprint, SessionId)) -> bool,
) {
    let least = table
        .iter()
        .filter(|(key, _)| of(key))
        .min_by_key(|(_, session)| (Arc::strong_count(session) > 1, session.used.load(Ordering::Relaxed)));
    if let Some(key) = least.map(|(key, _)| *key) {
        table.remove(&key);
    }
}

/// Reads a stream of a session to its end. `opening` is the payload of the frame that began it.
pub(crate) async fn receive(mut stream: Stream, mut send: SendStream, opening: Bytes) {
    let key = stream.accepted.key();
    let (Some(key), Some((id, channel))) = (key, parse_opening(&opening)) else {
        // Already closed is as good.
        let _ = stream.receive.stop(NOT_A_FRAME.into());
        return;
    };
    let node = stream.node.clone();
    let (session, known) = node.sessions.open(&node, key, id, &stream.accepted);
    let mut said = lock(&session.channels[channel]).expected();
    let mut word = BytesMut::with_capacity(GREETING);
    word.put_u8(known.into());
    word.put_u64(said);
    if !say(&mut stream, &mut send, word.freeze()).await {
        return;
    }
    let mut number = None;
    let mut restarted = !known;
    loop {
        for _ in 0..BATCH {
            let frame = match stream.frames.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => return stream.refuse(),
            };
            let Some(frame) = numbered(frame, &mut number) else {
                if let (true, Some(number @ 1..)) = (restarted, number) {
                    tracing::debug!(number, "a session goes on that is not known");
                    let peer = stream.accepted.remote();
                    node.event(Event::SessionRestarted { peer, key });
                }
                restarted = false;
                continue;
            };
            let Some(current) = number else { return stream.refuse() };
            number = current.checked_add(1);
            if number.is_none() {
                return stream.refuse();
            }
            hand_over(&stream, &session, channel, current, frame);
        }
        let expected = lock(&session.channels[channel]).expected();
        if expected != said {
            said = expected;
            if !say(&mut stream, &mut send, Bytes::copy_from_slice(&said.to_be_bytes())).await {
                return;
            }
        }
        if !stream.more().await {
            break;
        }
    }
    session.used.store(node.clock(Instant::now()), Ordering::Relaxed);
    if stream.finished {
        node.sessions.close(key, id);
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

fn parse_opening(payload: &[u8]) -> Option<(SessionId, usize)> {
    let (id, rest) = payload.split_first_chunk()?;
    match rest {
        [channel @ (0 | 1)] if payload.len() == OPEN_LEN => Some((*id, usize::from(*channel))),
        _ => None,
    }
}

/// A message; `None` for a frame that was about its number.
fn numbered(frame: RawFrame, number: &mut Option<u64>) -> Option<RawFrame> {
    if frame.type_id != NUMBER {
        return Some(frame);
    }
    *number = <[u8; NUMBER_LEN]>::try_from(&*frame.payload).ok().map(u64::from_be_bytes);
    None
}

/// Under the channel's lock, because an older stream of the session may still carry the same message.
fn hand_over(stream: &Stream, session: &Arc<Answers>, channel: usize, number: u64, frame: RawFrame) {
    let mut incoming = lock(&session.channels[channel]);
    if !incoming.accept(number) {
        return;
    }
    let answered = MessageType::from_id(frame.type_id).is_some_and(MessageType::is_answered);
    let reply = answered.then(|| ReplyToken::new(ReplyTo::Session(session.clone(), Arc::downgrade(&stream.node))));
    stream.hand_over(frame, reply);
}

impl Answers {
    /// Sends an answer on a stream of its own.
    pub(crate) fn answer(self: Arc<Self>, node: &Arc<Node>, frame: Bytes) -> Result<(), ReplyError> {
        let accepted = lock(&self.connection).upgrade().ok_or(ReplyError::Gone)?;
        let connection = accepted.connection().clone();
        if connection.close_reason().is_some() {
            return Err(ReplyError::Gone);
        }
        if let Some(Ok(mut send)) = now_or_never(connection.open_uni()) {
            // Dropped, the stream is finished.
            match write_now(&mut send, &frame) {
                Write::All => return Ok(()),
                Write::Failed => return Err(ReplyError::Gone),
                Write::Part(rest) => return self.wait(node, async move { send.write_chunk(rest).await.is_ok() }),
            }
        }
        self.wait(node, async move {
            let Ok(mut send) = connection.open_uni().await else { return false };
            send.write_chunk(frame).await.is_ok()
        })
    }

    fn wait(
        self: Arc<Self>,
        node: &Node,
        write: impl Future<Output = bool> + Send + 'static,
    ) -> Result<(), ReplyError> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING_ANSWERS {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(ReplyError::Gone);
        }
        node.spawn(async move {
            // Too slow, or gone: the answer is of no use.
            let _ = timeout(WRITE_TIMEOUT, write).await;
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(())
    }
}
