//! A link: one live QUIC connection to a peer, and what is on its way over it.
//!
//! Callers write to it from their own threads, without waiting: quinn's futures are polled once. What cannot be done at
//! once goes to the peer's task, and so does everything while the link is busy.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::ack_tracker::{AckTracker, Mark};
use macula_peer_core::lanes::{Choice, LARGE_FRAME, Lanes};
use macula_peer_core::sync::{lock, now_or_never};
use macula_peer_core::types::{self, Dialect, LinkId};
use macula_peer_wire::{Limits, RawFrame, Reassembler};
use quinn::{Connection, ConnectionStats, RecvStream, SendStream, StreamId};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::conn::Conn;
use crate::hello;
use crate::message::{Envelope, Requester};
use crate::socket::ExtraGuard;
use crate::transfer::{Write, is_acknowledged, write_now};

/// Callers write themselves while fewer bytes than this, about two packets, are unacknowledged: a lone message leaves at
/// once. Beyond that the peer's task writes for all of them. The connection's lock is then taken by one thread beside the
/// driver, which holds it while it encrypts. Callers that took it too spent more time on waking each other than on their
/// messages: with 64 KiB here for `macula-peer/1`, and no limit for `macula`, one process sent half as many a second.
pub(crate) const DIRECT_WRITES: usize = 2 << 10;

/// Receive halves that wait for an answer to a message sent without waiting, lanes not counted. A 0.14.3 gateway allows
/// 100 streams; the rest is for sending. The one that would be given up first gives way.
const MAX_ANSWERS: usize = 48;

/// A stream that is finished and still not acknowledged after this long is asked whether the peer stopped it.
const ASK_AFTER: Duration = Duration::from_secs(1);

/// A lane whose last message is not proven to have arrived after this long, and a round trip, is finished: the end of a
/// stream is acknowledged by itself. Nothing may have left since that would have told; well before the link is doubted.
const LANE_PATIENCE: Duration = Duration::from_millis(150);

/// Priorities of small streams to a 0.14.3 gateway; those of large ones lie below. When they are used up they begin again,
/// and for a moment newer frames leave before older ones.
const PRIORITIES: u32 = 1 << 30;

/// How long a connection that was given up is kept until a stopped 0.14.3 gateway is heard again, and how long the
/// gateway then has to read what it has acknowledged: one message takes it far less than a millisecond.
const HEARD_WITHIN: Duration = Duration::from_secs(30);
const READ_WITHIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Messages looked at in one go of a sweep, so that the callers are not kept from the lock.
const SWEEP_BATCH: usize = 256;

pub(crate) struct Link {
    pub(crate) conn: Arc<Conn>,
    /// Requests that wait for their answer.
    pub(crate) asked: AtomicUsize,
    /// What had been heard when the peer was last asked for a sign of life.
    probed: AtomicU64,
    /// Streams that have been put in line.
    lined_up: AtomicU32,
    ack_tracker: Arc<Mutex<AckTracker>>,
    limits: Limits,
    answer_timeout: Duration,
    /// Somebody on this link has reason to believe that the peer is gone.
    pub(crate) doubted: Notify,
    /// Set by [`Link::die`]: what a stream has taken a part of goes over another link.
    dead: watch::Sender<bool>,
    /// Set by [`Link::mark_silent`]: a request that is not acknowledged goes over another link.
    silent: watch::Sender<bool>,
    out: Mutex<Out>,
    begun_by: BegunBy,
    /// The socket that it needs beside the main one.
    pub(crate) extra: Option<Arc<ExtraGuard>>,
}

/// Whose the connection is.
enum BegunBy {
    /// Ours: we end it too.
    Us,
    /// The peer's.
    Peer,
    /// It serves something else.
    HandedOn,
}

#[derive(Default)]
struct Out {
    dead: bool,
    unacknowledged: VecDeque<Unacknowledged>,
    lanes: Lanes<Lane>,
    answers: VecDeque<Answer>,
    /// A stream that was waited for and not needed any more.
    spare: Option<(SendStream, RecvStream)>,
}

/// A stream that is kept for lone messages.
#[derive(Clone)]
struct Lane {
    send: Arc<Mutex<SendStream>>,
    stream: StreamId,
    /// Taken after the last message was written. A packet that had left by then may have carried the message or not; the
    /// proof needs one that leaves later.
    mark: Mark,
    /// Until when an answer to what it carried is listened for.
    answer_until: Option<Instant>,
}

struct Unacknowledged {
    message: Envelope,
    written: Instant,
    proof: Proof,
}

/// What tells that a message has arrived.
enum Proof {
    /// Its finished stream is acknowledged.
    Finished(SendStream),
    /// The packets since then are, or the lane was finished and is acknowledged.
    Lane(Lane),
}

struct Answer {
    stream: RecvStream,
    frames: Reassembler,
    /// `None`: as long as its lane.
    until: Option<Instant>,
    /// Who alone gets it.
    requester: Option<Arc<Requester>>,
}

/// A frame that came in answer to a message sent without waiting.
pub(crate) struct Answered {
    pub(crate) frame: RawFrame,
    pub(crate) requester: Option<Arc<Requester>>,
}

/// How an attempt to write at once ended.
pub(crate) enum Written {
    /// All of it is with the transport. `wake`: the peer's task has something new to look after.
    Done { wake: bool },
    /// The peer allows no further stream at present.
    NoCredit(Envelope),
    /// A stream was opened and took only a part, or nothing yet. Rare, and large: all results would be as large.
    Partial(Box<Partial>),
    /// The link is dead.
    Lost(Envelope),
    /// The link is dead, and the peer may have all of the message.
    Unproven(Envelope),
}

/// A message of which a stream has taken a part.
pub(crate) struct Partial {
    pub(crate) message: Envelope,
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    pub(crate) rest: Bytes,
}

/// What a sweep found.
#[derive(Default)]
pub(crate) struct Swept {
    pub(crate) acknowledged: u64,
    pub(crate) acknowledged_bytes: usize,
    pub(crate) rejected: Vec<Envelope>,
    /// When the oldest message that is still not acknowledged was written.
    pub(crate) oldest: Option<Instant>,
}

pub(crate) fn link_id(connection: &Connection) -> LinkId {
    LinkId::new(connection.stable_id() as u64)
}

impl Link {
    /// A link over a connection that this node began.
    pub(crate) fn new(
        conn: Arc<Conn>,
        ack_tracker: Arc<Mutex<AckTracker>>,
        limits: Limits,
        answer_timeout: Duration,
    ) -> Self {
        Self {
            conn,
            asked: AtomicUsize::new(0),
            probed: AtomicU64::new(u64::MAX),
            lined_up: AtomicU32::new(0),
            ack_tracker,
            limits,
            answer_timeout,
            doubted: Notify::new(),
            dead: watch::Sender::new(false),
            silent: watch::Sender::new(false),
            out: Mutex::default(),
            begun_by: BegunBy::Us,
            extra: None,
        }
    }

    /// A link over a connection that the peer began.
    pub(crate) fn over(conn: Arc<Conn>, limits: Limits, answer_timeout: Duration) -> Self {
        conn.allow_answers();
        let mut link = Self::new(conn, Arc::default(), limits, answer_timeout);
        link.begun_by = BegunBy::Peer;
        link
    }

    /// The connection, to be used for something else.
    pub(crate) fn into_connection(mut self) -> Connection {
        self.begun_by = BegunBy::HandedOn;
        self.connection.clone()
    }

    pub(crate) fn is_dialled(&self) -> bool {
        matches!(self.begun_by, BegunBy::Us)
    }

    /// What decisions depend on.
    pub(crate) fn about(&self) -> types::Link {
        let Conn { dialect, path, shown, .. } = *self.conn;
        types::Link { id: link_id(&self.connection), path, dialect, dialled: self.is_dialled(), shown }
    }

    /// Ends the connection if it is ours.
    pub(crate) fn close(&self) {
        if self.is_dialled() {
            self.connection.close(0u8.into(), b"");
        }
    }

    /// Ends the connection to a 0.14.3 gateway, which drops what it has acknowledged but not read when a connection is
    /// closed. A gateway that was stopped or busy gets time to read once it is heard again.
    pub(crate) async fn close_when_read(self: Arc<Self>) {
        let before = self.heard();
        let heard = async {
            while self.heard() == before && self.connection.close_reason().is_none() {
                sleep(LOOK_EVERY).await;
            }
        };
        // One that stays silent is gone, and has read what it will.
        let _ = timeout(HEARD_WITHIN, heard).await;
        sleep(READ_WITHIN).await;
        self.close();
    }

    /// Its peer has been silent for too long. The connection may stay open for a while, but nobody takes it for a link any
    /// more, and no request waits on it for an acknowledgement.
    pub(crate) fn mark_silent(&self) {
        self.silent.send_replace(true);
        if matches!(self.begun_by, BegunBy::Peer) {
            self.conn.mark_silent();
        }
    }

    /// Returns when the link is given up because of its peer's silence.
    pub(crate) async fn silent(&self) {
        raised(&self.silent).await;
    }

    /// Whether it is given up or replaced.
    pub(crate) fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }

    /// Asks for a sign of life, unless the peer has not been heard since it was last asked. False if it cannot be asked.
    pub(crate) fn probe(&self) -> bool {
        let heard = self.heard();
        if self.probed.load(Ordering::Relaxed) == heard {
            return true;
        }
        let (Some(key), Some((mut send, _receive))) = (self.key(), self.open_now()) else { return false };
        self.probed.store(heard, Ordering::Relaxed);
        // The acknowledgement is sign enough. Dropped, the stream is finished.
        matches!(write_now(&mut send, &hello::question(&key)), Write::All)
    }

    /// Returns when the link is dead: given up or replaced, whether the connection is closed yet or not.
    pub(crate) async fn dead(&self) {
        raised(&self.dead).await;
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) > 0
    }

    /// Writes a message to a 0.14.3 gateway at once, if the transport takes it.
    pub(crate) fn write(&self, message: Envelope, now: Instant) -> Written {
        let mut out = self.out();
        if out.dead {
            return Written::Lost(message);
        }
        if message.requester().is_some() {
            return self.write_once(out, message, now);
        }
        let arrived = |lane: &Lane| self.packets_arrived(lane.mark, now, self.connection.rtt());
        match out.lanes.choose(now, message.frame.len(), || self.connection.rtt(), arrived) {
            Choice::Once => self.write_once(out, message, now),
            Choice::Open => self.open_lane(out, message, now),
            Choice::Lane(index) => self.write_lane(out, index, message, now),
        }
    }

    /// Sets the priority of a stream before a frame of `len` bytes is written to it.
    ///
    /// Streams take turns, packet by packet, so that no message waits for a large one. A 0.14.3 gateway loses a frame
    /// whose packets come between those of another, so there they leave one after the other.
    pub(crate) fn line_up(&self, send: &SendStream, len: usize) {
        if self.dialect == Dialect::MaculaPeer1 {
            return;
        }
        let small = (self.lined_up.fetch_add(1, Ordering::Relaxed) % PRIORITIES) as i32;
        let behind = if len >= LARGE_FRAME { PRIORITIES as i32 } else { 0 };
        // This fails only for a closed stream, and then the write reports it.
        let _ = send.set_priority(-small - behind);
    }

    /// Takes over a message whose stream has now taken all of it.
    pub(crate) fn written(&self, message: Envelope, mut send: SendStream, receive: RecvStream) -> Written {
        if self.out().dead {
            // A dropped stream would be finished.
            let _ = send.reset(0u8.into());
            return Written::Unproven(message);
        }
        self.finish(message, send, receive, Instant::now())
    }

    /// For one frame that is read from this link.
    pub(crate) fn reassembler(&self) -> Reassembler {
        Reassembler::new(self.limits)
    }

    /// How long the peer may be silent while it owes an acknowledgement.
    pub(crate) fn patience(&self) -> Duration {
        self.remote.patience.at(self.connection.rtt(), self.is_confirmed(&self.connection.stats()))
    }

    /// The peer was silent for long recently and was there nevertheless.
    pub(crate) fn expect_silence(&self, expected: Duration) {
        self.remote.patience.expect_silence(expected);
    }

    /// Datagrams received so far, or none as long as they may all be from a peer that still waits for the handshake's
    /// last part.
    pub(crate) fn heard(&self) -> u64 {
        let stats = self.connection.stats();
        if self.is_confirmed(&stats) { stats.udp_rx.datagrams } else { 0 }
    }

    /// Whether the peer is known to read what is written. Of a 0.14.3 gateway that is taken for granted: it handshakes
    /// one connection after the other, and more of them would not make it faster.
    fn is_confirmed(&self, stats: &ConnectionStats) -> bool {
        let heard = stats.frame_rx.handshake_done > 0 || stats.frame_rx.stream > 0;
        heard || !self.is_dialled() || self.dialect == Dialect::Macula
    }

    /// A stream that was waited for: the next message takes it.
    pub(crate) fn put_spare(&self, stream: (SendStream, RecvStream)) {
        self.out().spare = Some(stream);
    }

    /// A stream to the peer, if there is one to be had at once.
    pub(crate) fn open_now(&self) -> Option<(SendStream, RecvStream)> {
        self.out().spare.take().or_else(|| now_or_never(self.connection.open_bi())?.ok())
    }

    /// Lets go of what was acknowledged. Lanes are looked at in any order, finished streams from the oldest on up to
    /// the first that is not.
    pub(crate) fn sweep(&self, now: Instant) -> Swept {
        let mut swept = Swept::default();
        loop {
            let mut batch: VecDeque<_> = {
                let mut out = self.out();
                let n = out.unacknowledged.len().min(SWEEP_BATCH);
                out.unacknowledged.drain(..n).collect()
            };
            let before = batch.len();
            let round_trip = self.connection.rtt();
            batch.retain_mut(|entry| {
                if self.has_arrived(entry, now, round_trip) {
                    swept.acknowledged += 1;
                    swept.acknowledged_bytes += entry.message.frame.len();
                    return false;
                }
                let age = now.saturating_duration_since(entry.written);
                if let Proof::Lane(lane) = &entry.proof
                    && age > LANE_PATIENCE + round_trip
                {
                    drop(self.out().end_lane(lane.stream));
                }
                if age > ASK_AFTER && is_stopped(&entry.proof) {
                    swept.rejected.push(entry.message.clone());
                    return false;
                }
                true
            });
            let stuck = !batch.is_empty();
            let mut out = self.out();
            while let Some(entry) = batch.pop_back() {
                out.unacknowledged.push_front(entry);
            }
            if stuck || before < SWEEP_BATCH {
                swept.oldest = out.unacknowledged.front().map(|entry| entry.written);
                return swept;
            }
        }
    }

    /// Ends the link and gives back what was not acknowledged, oldest first.
    pub(crate) fn die(&self) -> (Swept, Vec<Envelope>) {
        let swept = self.sweep(Instant::now());
        let mut out = self.out();
        out.dead = true;
        self.dead.send_replace(true);
        out.answers.clear();
        out.spare = None;
        let rest = out.unacknowledged.drain(..).map(|entry| {
            if let Proof::Finished(mut send) = entry.proof {
                // It is sent over another link, or reported: it should not arrive over this one as well.
                let _ = send.reset(0u8.into());
            }
            entry.message
        });
        (swept, rest.collect())
    }

    /// Reads the answers to messages that were sent without waiting. Wakes the task of `cx` when there are more.
    pub(crate) fn poll_answers(&self, cx: &mut Context<'_>) -> Vec<Answered> {
        let mut frames = Vec::new();
        let mut out = self.out();
        out.answers.retain_mut(|answer| answer.poll(cx, &mut frames));
        frames
    }

    /// Stops listening for answers whose time is over. Returns when the next one's is.
    pub(crate) fn expire_answers(&self, now: Instant) -> Option<Instant> {
        let mut out = self.out();
        out.answers.retain(|answer| answer.until.is_none_or(|until| until > now));
        out.answers.iter().filter_map(|answer| answer.until).min()
    }

    /// Writes without the lock, so that senders on several schedulers do not wait for each other.
    fn write_once(&self, mut out: MutexGuard<'_, Out>, message: Envelope, now: Instant) -> Written {
        let spare = out.spare.take().map(Ok);
        drop(out);
        let opened = spare.or_else(|| now_or_never(self.connection.open_bi()));
        let (mut send, receive) = match opened {
            Some(Ok(stream)) => stream,
            Some(Err(_)) => return Written::Lost(message),
            None => return Written::NoCredit(message),
        };
        self.line_up(&send, message.frame.len());
        match write_now(&mut send, &message.frame) {
            Write::All => self.finish(message, send, receive, now),
            Write::Part(rest) => Written::Partial(Box::new(Partial { message, send, receive, rest })),
            Write::Failed => Written::Lost(message),
        }
    }

    fn open_lane(&self, mut out: MutexGuard<'_, Out>, message: Envelope, now: Instant) -> Written {
        let opened = now_or_never(self.connection.open_bi()).or_else(|| out.spare.take().map(Ok));
        let (mut send, receive) = match opened {
            Some(Ok(stream)) => stream,
            Some(Err(_)) => return Written::Lost(message),
            None => return Written::NoCredit(message),
        };
        self.line_up(&send, message.frame.len());
        match write_now(&mut send, &message.frame) {
            Write::All => {}
            Write::Part(rest) => return Written::Partial(Box::new(Partial { message, send, receive, rest })),
            Write::Failed => return Written::Lost(message),
        }
        let mark = Mark::new(Instant::now());
        let answer_until = message.listens_for(self.answer_timeout).map(|time| now + time);
        let lane = Lane { stream: send.id(), send: Arc::new(Mutex::new(send)), mark, answer_until };
        out.lanes.opened(lane.clone(), now);
        out.answers.push_back(Answer { stream: receive, frames: self.reassembler(), until: None, requester: None });
        out.remember(message, Proof::Lane(lane), now);
        Written::Done { wake: true }
    }

    fn write_lane(&self, mut out: MutexGuard<'_, Out>, index: usize, message: Envelope, now: Instant) -> Written {
        let lane = out.lanes.take(index, now);
        self.line_up(&lock(&lane.send), message.frame.len());
        if !matches!(write_now(&mut lock(&lane.send), &message.frame), Write::All) {
            // The peer stopped the lane, or allows it no more bytes. Of a frame that was begun there a gateway makes
            // nothing; it goes out whole on a stream of its own.
            let stream = lane.stream;
            drop(out.end_lane(stream));
            return self.write_once(out, message, now);
        }
        lane.mark = Mark::new(Instant::now());
        if let Some(time) = message.listens_for(self.answer_timeout) {
            lane.answer_until = Some(now + time);
        }
        let proof = Proof::Lane(lane.clone());
        let wake = out.remember(message, proof, now);
        Written::Done { wake }
    }

    fn finish(&self, message: Envelope, mut send: SendStream, receive: RecvStream, now: Instant) -> Written {
        if send.finish().is_err() {
            return Written::Lost(message);
        }
        let mut out = self.out();
        if out.dead {
            return Written::Unproven(message);
        }
        let mut wake = false;
        let (mut unheard, mut unread) = (None, None);
        if let Some(time) = message.listens_for(self.answer_timeout) {
            wake = true;
            let (until, requester) = (Some(now + time), message.requester().cloned());
            unheard = out.listen(Answer { stream: receive, frames: self.reassembler(), until, requester });
        } else {
            unread = Some(receive);
        }
        wake |= out.remember(message, Proof::Finished(send), now);
        drop(out);
        // Dropping a receive half sends STOP_SENDING, without which a gateway, that never finishes its own half, gives
        // the stream's credit never back.
        drop((unheard, unread));
        Written::Done { wake }
    }

    fn has_arrived(&self, entry: &Unacknowledged, now: Instant, round_trip: Duration) -> bool {
        match &entry.proof {
            Proof::Finished(send) => is_acknowledged(send),
            Proof::Lane(lane) => self.packets_arrived(lane.mark, now, round_trip) || is_acknowledged(&lock(&lane.send)),
        }
    }

    fn packets_arrived(&self, mark: Mark, now: Instant, round_trip: Duration) -> bool {
        lock(&self.ack_tracker).arrived(mark, now, round_trip)
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        lock(&self.out)
    }
}

impl Deref for Link {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.conn
    }
}

impl Drop for Link {
    /// Over a relay others hold on to the connection too, and nobody else ends it.
    fn drop(&mut self) {
        self.close();
    }
}

impl Out {
    /// Finishes a lane. Its receive half, which holds the stream's credit, is let go or listens for what answers may
    /// still come; what is returned is to be dropped without the lock.
    fn end_lane(&mut self, stream: StreamId) -> Option<Answer> {
        let lane = self.lanes.remove(|lane| lane.stream == stream)?;
        // Stopped by the peer is as good as finished.
        let _ = lock(&lane.send).finish();
        let index = self.answers.iter().position(|answer| answer.stream.id() == stream)?;
        let mut answer = self.answers.remove(index)?;
        answer.until = Some(lane.answer_until?);
        self.listen(answer)
    }

    /// Listens for an answer for a time; the one that would be given up first gives way.
    fn listen(&mut self, answer: Answer) -> Option<Answer> {
        self.answers.push_back(answer);
        let timed = || (0..).zip(&self.answers).filter_map(|(index, answer)| Some((answer.until?, index)));
        if timed().count() <= MAX_ANSWERS {
            return None;
        }
        let first = timed().min().map(|(_, index)| index);
        first.and_then(|index| self.answers.remove(index))
    }

    /// Keeps a message until it is acknowledged. Returns whether it is the only one.
    fn remember(&mut self, message: Envelope, proof: Proof, written: Instant) -> bool {
        self.unacknowledged.push_back(Unacknowledged { message, written, proof });
        self.unacknowledged.len() == 1
    }
}

impl Answer {
    /// Reads what is there; false when nothing more will come.
    fn poll(&mut self, cx: &mut Context<'_>, frames: &mut Vec<Answered>) -> bool {
        loop {
            match pin!(self.stream.read_chunk(usize::MAX, true)).poll(cx) {
                Poll::Pending => return true,
                Poll::Ready(Ok(Some(chunk))) => self.frames.push(chunk.bytes),
                Poll::Ready(Ok(None) | Err(_)) => return false,
            }
            loop {
                match self.frames.next_frame() {
                    Ok(Some(frame)) => {
                        let requester = self.requester.take();
                        let is_all = requester.is_some();
                        frames.push(Answered { frame, requester });
                        if is_all {
                            return false;
                        }
                    }
                    Ok(None) => break,
                    Err(_) => return false,
                }
            }
        }
    }
}

fn is_stopped(proof: &Proof) -> bool {
    match proof {
        Proof::Finished(send) => matches!(now_or_never(send.stopped()), Some(Ok(Some(_)))),
        Proof::Lane(lane) => matches!(now_or_never(lock(&lane.send).stopped()), Some(Ok(Some(_)))),
    }
}

async fn raised(flag: &watch::Sender<bool>) {
    // The sender is the link's own.
    let _ = flag.subscribe().wait_for(|raised| *raised).await;
}
