//! The streams of an accepted connection: what arrives on them, and the answers to it.
//!
//! Each connection is bounded: streams by QUIC's own limit, unread bytes by flow control, and an incomplete frame by
//! the time that it may go without growing. Connections, and memory for large frames, are bounded for each key and
//! address.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::errors::Rejection;
use macula_peer_core::growth::Growth;
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::proto::answers;
use macula_peer_core::proto::codes::stream::{MALFORMED, NOT_A_RELAY, REQUEST_FORGOTTEN, TOO_SLOW, WRONG_NODE};
use macula_peer_core::proto::session::{ASK_NODE, FOR_NODE, OPEN_CONTROL, OPEN_SESSION, REQUEST};
use macula_peer_core::request_sender::Named;
use macula_peer_core::requests::RequestId;
use macula_peer_core::sync::now_or_never;
use macula_peer_core::turns::{Piece, Spent};
use macula_peer_core::types::Dialect;
use macula_peer_wire::{FrameError, HEADER_LEN, Header, RawFrame, Reassembler};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::conn::Conn;
use crate::deadline::deadline;
use crate::frame_memory::Reserved;
use crate::inbound::{AnswerQueue, Route};
use crate::relay::server::Opener;
use crate::request;
use crate::server::{Accepted, Server};
use crate::transfer::{self, Write, is_acknowledged, write_now};
use crate::{hello, session};

/// A token that is kept longer than this answers nothing: the stream and its memory are let go.
pub(crate) const REPLY_TIMEOUT: Duration = Duration::from_secs(300);

/// How often a connection without new streams is searched for streams whose answer is no longer wanted: a sender
/// without credit opens none.
const RELEASE_EVERY: Duration = Duration::from_millis(20);

/// Answers of one stream that may wait to be written. Beyond that nothing more is read from a sender that does not read
/// them.
const MAX_WAITING_ANSWERS: usize = 64;

/// Bytes taken from a stream at once, more than a packet holds. While a stream waits, quinn may join all that has come to
/// one chunk: whole, it would be heard however many answers wait.
const READ_AT_ONCE: usize = 4 << 10;

/// Bytes read of a new stream before it gets a task, which goes by the answers that wait.
const READ_AT_FIRST: usize = 32 << 10;

/// More than a sender of this library listens on: some of them must be given up.
const MANY_ANSWERABLE: usize = 128;

/// Streams opened in one turn of a connection's loop. They may start work in tasks, which no turn bounds.
const ACCEPT_BATCH: usize = 16;

/// Serves what its other end begins on a connection, until that ends.
pub(crate) async fn serve(server: Arc<Server>, accepted: Arc<Accepted>) {
    let connection = accepted.connection.clone();
    let (is_ours, sender) = (accepted.is_ours(), accepted.sender());
    let (replies, mut replied) = mpsc::unbounded_channel();
    let mut release = tokio::time::interval(RELEASE_EVERY);
    release.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut serving = Serving {
        server: server.clone(),
        accepted,
        streams: JoinSet::new(),
        answerable: VecDeque::new(),
        answered: VecDeque::new(),
        next: 0,
        replies,
    };
    let mut behind = false;
    loop {
        let expiry = serving.answerable.front().map(|oldest| oldest.until);
        let crowded = server.inbox.is_crowded(sender);
        let waits = serving.accepted.has_many_waiting();
        tokio::select! {
            stream = connection.accept_bi(), if !crowded && !waits => match stream {
                Ok((send, receive)) => serving.begin(Some(send), receive),
                Err(_) => return,
            },
            // On a link of ours these are answers, which its peer reads.
            stream = connection.accept_uni(), if !is_ours && !crowded && !waits => match stream {
                Ok(receive) => serving.begin(None, receive),
                Err(_) => return,
            },
            Some((stream, frame)) = replied.recv() => serving.reply(stream, frame),
            Some(_) = serving.streams.join_next() => {}
            () = deadline(expiry) => { serving.answerable.pop_front(); }
            () = server.inbox.room(sender), if crowded => continue,
            () = serving.accepted.heavy_done.notified(), if waits => continue,
            _ = release.tick(), if !serving.answerable.is_empty() || !serving.answered.is_empty() => {
                serving.release_all_stopped();
                serving.release_arrived();
            }
            // Records the new address as proven, so that more than answers may be sent there.
            () = serving.accepted.remote.changed() => { serving.accepted.remote(); }
        }
        let _turn = if behind { server.busy.late_turn(sender, 1).await } else { None };
        behind = serving.begin_some(&connection);
    }
}

/// The state of the task of one accepted connection.
struct Serving {
    server: Arc<Server>,
    accepted: Arc<Accepted>,
    /// Streams that were not complete at once.
    streams: JoinSet<()>,
    /// Streams that carried their one message and may be answered, oldest first.
    answerable: VecDeque<Answerable>,
    /// The streams of requests whose answers are in flight.
    answered: VecDeque<(RequestId, SendStream)>,
    next: u64,
    replies: mpsc::UnboundedSender<(u64, Option<Bytes>)>,
}

struct Answerable {
    stream: u64,
    request: Option<RequestId>,
    send: SendStream,
    until: Instant,
}

impl Serving {
    /// What has come meanwhile costs no turn of the loop each. Returns whether there may be more.
    fn begin_some(&mut self, connection: &Connection) -> bool {
        let (piece, sender) = (Piece::begin(Instant::now()), self.accepted.sender());
        for _ in 0..ACCEPT_BATCH {
            if self.server.inbox.is_crowded(sender) || self.accepted.has_many_waiting() {
                return false;
            }
            let Some(Ok((send, receive))) = now_or_never(connection.accept_bi()) else { return false };
            self.begin(Some(send), receive);
            if piece.is_over(Instant::now()) {
                break;
            }
        }
        true
    }

    /// Reads a new stream as far as it goes without waiting: a whole message needs no task of its own.
    fn begin(&mut self, send: Option<SendStream>, receive: RecvStream) {
        self.release_stopped();
        self.release_arrived();
        let mut stream = IncomingStream {
            server: self.server.clone(),
            accepted: self.accepted.clone(),
            receive,
            frames: Reassembler::new(self.server.config.limits),
            reading: true,
            finished: false,
            request: None,
            growth: Growth::default(),
            reserved: None,
            gathered: false,
        };
        while stream.frames.buffered() < READ_AT_FIRST
            && let Some(chunk) = now_or_never(stream.receive.read_chunk(READ_AT_ONCE, true))
        {
            if !stream.took(chunk) {
                break;
            }
        }
        // That no answer is read is said in the same packet as the message, as a rule.
        let send = send.filter(|send| now_or_never(send.stopped()).is_none());
        if stream.reading {
            self.streams.spawn(stream.serve(send, None));
            return;
        }
        if stream.finished && stream.frames.is_empty() {
            // A stream that was opened and not needed.
            return;
        }
        let id = self.next;
        self.next += 1;
        let route = || send.as_ref().map(|_| Route::Connection(id, self.replies.clone()));
        match stream.deliver(route, || false) {
            Delivered::All | Delivered::Some => {}
            Delivered::Heavy(frame) => {
                self.streams.spawn(stream.serve(send, Some(frame)));
                return;
            }
            Delivered::Refused(why) if self.accepted.dialect == Dialect::MaculaPeer1 => return not_taken(send, why),
            // As a 0.14.3 gateway has it.
            Delivered::Refused(_) => {}
            Delivered::Opened(opening) => {
                self.streams.spawn(stream.opened(opening, send));
                return;
            }
            Delivered::ForAnother => return stream.end(send, WRONG_NODE),
            Delivered::Forgotten => return stream.end(send, REQUEST_FORGOTTEN),
        }
        if let Some(send) = send {
            let (request, until) = (stream.request.map(|(id, _)| id), Instant::now() + REPLY_TIMEOUT);
            self.answerable.push_back(Answerable { stream: id, request, send, until });
        }
    }

    /// Lets go of answers that the peer has.
    fn release_arrived(&mut self) {
        while let Some((request, send)) = self.answered.front() {
            if is_acknowledged(send) {
                self.accepted.arrived(&self.server, *request);
            } else if now_or_never(send.stopped()).is_none() {
                return;
            }
            self.answered.pop_front();
        }
    }

    /// Behind one that is still waited on, others may have been given up.
    fn release_all_stopped(&mut self) {
        self.answerable.retain(|entry| now_or_never(entry.send.stopped()).is_none());
    }

    /// Senders that listen for answers to many messages give up on the oldest first, and need its credit back.
    fn release_stopped(&mut self) {
        if self.answerable.len() >= MANY_ANSWERABLE && self.next.is_multiple_of(MANY_ANSWERABLE as u64 / 4) {
            self.release_all_stopped();
        }
        while let Some(oldest) = self.answerable.front() {
            if now_or_never(oldest.send.stopped()).is_none() {
                return;
            }
            self.answerable.pop_front();
        }
    }

    fn reply(&mut self, stream: u64, frame: Option<Bytes>) {
        let Ok(index) = self.answerable.binary_search_by_key(&stream, |entry| entry.stream) else { return };
        let Some(Answerable { mut send, request, .. }) = self.answerable.remove(index) else { return };
        let Some(frame) = frame else { return };
        // Dropped, the stream is finished.
        match (write_now(&mut send, &frame), request) {
            (Write::All, Some(request)) => {
                // Stopped is noticed when it is next looked at.
                let _ = send.finish();
                self.answered.push_back((request, send));
            }
            (Write::All | Write::Failed, _) => {}
            (Write::Part(rest), request) => {
                let Some(waiting) = self.server.unread.begin(self.accepted.client(), rest.len()) else {
                    // It may be closed already, which has the same effect.
                    let _ = send.reset(TOO_SLOW.into());
                    return;
                };
                let (server, accepted) = (self.server.clone(), self.accepted.clone());
                self.streams.spawn(async move {
                    let _waiting = waiting;
                    if !transfer::write(&mut send, rest).await {
                        // It may be closed already, which has the same effect.
                        let _ = send.reset(TOO_SLOW.into());
                    } else if let Some(request) = request {
                        accepted.arrives(&server, request, send).await;
                    }
                });
            }
        }
    }
}

/// One stream of an accepted connection.
pub(crate) struct IncomingStream {
    pub(crate) server: Arc<Server>,
    pub(crate) accepted: Arc<Accepted>,
    pub(crate) receive: RecvStream,
    pub(crate) frames: Reassembler,
    reading: bool,
    /// It has ended in order.
    pub(crate) finished: bool,
    /// The request that its message is, and whether only that is wanted which came of it before.
    request: Option<(RequestId, bool)>,
    /// Of the present frame, and the memory for a large one.
    growth: Growth,
    reserved: Option<Reserved>,
    /// It was for a frame that is complete.
    gathered: bool,
}

/// What was made of the frames of a stream.
enum Delivered {
    /// They were messages.
    All,
    /// Some were. More wait until answers to them are written.
    Some,
    /// They were messages up to this one, which is much work.
    Heavy(RawFrame),
    /// The first one was the engine's own: the rest is not messages.
    Opened(RawFrame),
    /// One of them was no message, or cannot be taken.
    Refused(Rejection),
    /// They are for a node with another id.
    ForAnother,
    /// The request that is asked again is not known.
    Forgotten,
}

impl IncomingStream {
    /// Reads the stream to its end, and writes the answers to what it carried. `heavy`: its first frame, if that is much
    /// work.
    async fn serve(mut self, mut send: Option<SendStream>, mut heavy: Option<RawFrame>) {
        let (replies, mut replied) = AnswerQueue::new(self.server.unread.clone(), self.accepted.client());
        // The end of this channel that lives here: gone when no further token will be made.
        let mut replies = send.is_some().then_some(replies);
        let (server, sender) = (self.server.clone(), self.accepted.sender());
        let mut answer_until = None;
        let mut spent = Spent::default();
        loop {
            let mut turn = None;
            if heavy.is_none() && spent.is_up() {
                turn = server.busy.late_turn(sender, 1).await;
            }
            let crowding = |waits: bool| waits && replied.len() >= MAX_WAITING_ANSWERS;
            let delivered = match heavy.take() {
                Some(frame) => self.deliver_heavy(frame, replies.clone().map(Route::Stream)).await,
                None => {
                    let piece = Piece::begin(Instant::now());
                    let delivered = self.deliver(|| replies.clone().map(Route::Stream), || crowding(replies.is_some()));
                    spent.add(piece, Instant::now());
                    delivered
                }
            };
            drop(turn);
            let paused = matches!(delivered, Delivered::Some);
            match delivered {
                Delivered::All | Delivered::Some => {}
                Delivered::Heavy(frame) => {
                    heavy = Some(frame);
                    continue;
                }
                Delivered::Opened(opening) => {
                    drop((replies, replied));
                    return self.opened(opening, send).await;
                }
                Delivered::Refused(why) if self.accepted.dialect == Dialect::MaculaPeer1 => {
                    return not_taken(send, why);
                }
                Delivered::Refused(_) => return,
                Delivered::ForAnother => return self.end(send, WRONG_NODE),
                Delivered::Forgotten => return self.end(send, REQUEST_FORGOTTEN),
            }
            if !self.reading && !paused {
                replies = None;
                answer_until.get_or_insert_with(|| Instant::now() + REPLY_TIMEOUT);
            }
            if !self.reading && send.is_none() {
                return;
            }
            if self.reading && !paused {
                self.pace().await;
            }
            let crowded = server.inbox.is_crowded(sender);
            let hears = self.reading && !paused && !crowded && !crowding(send.is_some());
            tokio::select! {
                () = server.inbox.room(sender), if self.reading && crowded => {}
                chunk = self.read(), if hears => match chunk {
                    Some(chunk) => {
                        self.took(chunk);
                    }
                    None => return self.too_slow(),
                },
                reply = replied.recv(), if send.is_some() => {
                    // None: every token is used or dropped, and no message comes any more.
                    let written = match (reply, &mut send) {
                        (Some((frame, _held)), Some(send)) => transfer::write(send, frame).await,
                        _ => false,
                    };
                    if !written {
                        send = None;
                    } else if let Some((request, _)) = self.request
                        && let Some(send) = send.take()
                    {
                        // It has one answer.
                        return self.accepted.arrives(&server, request, send).await;
                    }
                }
                () = is_stopped(&send) => send = None,
                () = deadline(answer_until) => return,
            }
            if send.is_none() {
                replies = None;
                replied.close();
                while replied.try_recv().is_ok() {}
            }
        }
    }

    /// Returns whether there may be more.
    fn took(&mut self, chunk: Result<Option<quinn::Chunk>, quinn::ReadError>) -> bool {
        match chunk {
            Ok(Some(chunk)) => self.frames.push(chunk.bytes),
            Ok(None) => (self.reading, self.finished) = (false, true),
            Err(_) => self.reading = false,
        }
        self.reading
    }

    /// The next whole frame.
    pub(crate) fn next_frame(&mut self) -> Result<Option<RawFrame>, FrameError> {
        if std::mem::take(&mut self.gathered) {
            self.reserved = None;
        }
        let frame = self.frames.next_frame();
        match &frame {
            Ok(Some(_)) => (self.growth, self.gathered) = (Growth::default(), true),
            // A question that is too long to be answered is not gathered.
            Ok(None) if !self.frames.is_empty() => self.check_announced()?,
            _ => {}
        }
        frame
    }

    fn check_announced(&self) -> Result<(), FrameError> {
        let (limits, max) = (answers::LIMITS, answers::LIMITS.max_frame);
        match self.frames.announced() {
            Some(Header { type_id, payload_len })
                if payload_len > limits.max_frame && self.accepted.is_probe(&self.server, type_id) =>
            {
                Err(FrameError::TooLarge { len: payload_len, max })
            }
            _ => Ok(()),
        }
    }

    /// Hands over every whole frame that is little work, until it is crowded.
    fn deliver(&mut self, route: impl Fn() -> Option<Route>, is_crowded: impl Fn() -> bool) -> Delivered {
        loop {
            if is_crowded() {
                return Delivered::Some;
            }
            let frame = match self.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Delivered::All,
                Err(error) => {
                    tracing::debug!(from = %self.accepted.remote(), %error, "not a frame");
                    self.refuse(Rejection::from(&error));
                    return Delivered::Refused(Rejection::from(&error));
                }
            };
            if self.accepted.dialect == Dialect::MaculaPeer1 {
                match frame.type_id() {
                    OPEN_SESSION | OPEN_CONTROL | ASK_NODE | hello::ASK_SUCCESSION => {
                        return Delivered::Opened(frame);
                    }
                    FOR_NODE if self.server.keys.serves(frame.payload()) => continue,
                    FOR_NODE => return Delivered::ForAnother,
                    REQUEST => match request::parse_name(frame.payload()) {
                        Some(Named { id, again }) => {
                            self.request = Some((id, again));
                            continue;
                        }
                        None => {
                            self.refuse(Rejection::Malformed);
                            return Delivered::Refused(Rejection::Malformed);
                        }
                    },
                    _ => {}
                }
            }
            if is_heavy(frame.payload()) {
                return Delivered::Heavy(frame);
            }
            match self.accepted.take(&self.server, self.request, frame, route()) {
                Some(taken) => {
                    if let Some(refused) = self.refused(taken) {
                        return refused;
                    }
                }
                None => return Delivered::Forgotten,
            }
        }
    }

    /// Hands over a frame that is much work.
    async fn deliver_heavy(&mut self, frame: RawFrame, route: Option<Route>) -> Delivered {
        let _waiting = WaitingFrame::new(&self.accepted);
        let (server, accepted, request) = (self.server.clone(), self.accepted.clone(), self.request);
        let take = move || accepted.take(&server, request, frame, route);
        let taken = self.server.inbox.decoding.run(self.accepted.sender(), take).await;
        self.reserved = None;
        match taken {
            Some(Some(taken)) => self.refused(taken).unwrap_or(Delivered::All),
            Some(None) => Delivered::Forgotten,
            None => Delivered::All,
        }
    }

    /// A sender of the dialect `macula` would not understand why the rest is not read.
    fn refused(&self, taken: Result<(), Rejection>) -> Option<Delivered> {
        match self.accepted.dialect {
            Dialect::Macula => None,
            Dialect::MaculaPeer1 => taken.err().map(Delivered::Refused),
        }
    }

    /// Reads a stream of the engine's own to its end.
    async fn opened(mut self, opening: RawFrame, send: Option<SendStream>) {
        let Some(mut send) = send else { return self.refuse(Rejection::Malformed) };
        if opening.type_id() == OPEN_SESSION {
            return session::receive::receive(self, send, opening.into_payload()).await;
        }
        if opening.type_id() == ASK_NODE {
            let answer = self.server.keys.answer(opening.payload());
            return hello::reply(self.receive, send, answer).await;
        }
        if opening.type_id() == hello::ASK_SUCCESSION {
            let statement = self.server.keys.identity.succession(opening.payload());
            return hello::show_succession(self.receive, send, statement).await;
        }
        if let (Some(relay), Some(key)) = (self.server.role.relay(), self.accepted.key()) {
            let Self { accepted, receive, frames, .. } = self;
            let Conn { connection, remote, .. } = &*accepted.conn;
            let (connection, remote, place) = (connection.clone(), remote.clone(), accepted.place.clone());
            let opener = Opener { connection, remote, owner: key, place };
            return relay.serve(opener, send, receive, frames).await;
        }
        // It may be closed already, which has the same effect.
        let _ = self.receive.stop(NOT_A_RELAY.into());
        let _ = send.reset(NOT_A_RELAY.into());
    }

    /// Ends both halves with an error.
    fn end(mut self, send: Option<SendStream>, code: u8) {
        // It may be closed already, which has the same effect.
        let _ = self.receive.stop(code.into());
        let _ = send.map(|mut send| send.reset(code.into()));
    }

    /// The stream carries nothing that can be read.
    pub(crate) fn refuse(&mut self, why: Rejection) {
        self.server.inbox.malformed();
        let error = match self.accepted.dialect {
            Dialect::Macula => MALFORMED,
            Dialect::MaculaPeer1 => why.code(),
        };
        // It may be closed already, which has the same effect.
        let _ = self.receive.stop(error.into());
    }

    /// Waits for more bytes of a stream of frames. False when there are none, or a frame does not grow.
    pub(crate) async fn more(&mut self) -> bool {
        if !self.reading {
            return false;
        }
        self.pace().await;
        match self.read().await {
            Some(chunk) => self.took(chunk),
            None => {
                self.too_slow();
                false
            }
        }
    }

    /// The next bytes. `None`: an incomplete frame does not grow.
    async fn read(&mut self) -> Option<Result<Option<quinn::Chunk>, quinn::ReadError>> {
        if self.frames.is_empty() {
            return Some(self.receive.read_chunk(READ_AT_ONCE, true).await);
        }
        let timeout = self.server.config.frame_timeout;
        transfer::read(&mut self.receive, READ_AT_ONCE, &mut self.growth, timeout).await
    }

    /// Waits until there is memory for a large frame that is arriving.
    async fn pace(&mut self) {
        if self.reserved.is_some() {
            return;
        }
        let announced = self.frames.announced().map(|header| HEADER_LEN + header.payload_len);
        let Some(bytes) = announced.filter(|bytes| *bytes > READ_AT_FIRST) else { return };
        let (memory, client) = (&self.server.arriving, self.accepted.client());
        self.reserved = match memory.take(client, bytes) {
            Some(reserved) => Some(reserved),
            None => {
                let _turn = self.accepted.turn.lock().await;
                Some(memory.wait(client, bytes).await)
            }
        };
    }

    pub(crate) fn too_slow(&mut self) {
        self.server.inbox.malformed();
        // It may be closed already, which has the same effect.
        let _ = self.receive.stop(TOO_SLOW.into());
    }
}

/// Counts a frame that is much work as long as it waits for its turn.
struct WaitingFrame<'a>(&'a Accepted);

impl<'a> WaitingFrame<'a> {
    fn new(accepted: &'a Accepted) -> Self {
        accepted.heavy.fetch_add(1, Ordering::Relaxed);
        Self(accepted)
    }
}

impl Drop for WaitingFrame<'_> {
    fn drop(&mut self) {
        self.0.heavy.fetch_sub(1, Ordering::Relaxed);
        self.0.heavy_done.notify_one();
    }
}

/// Tells the requester on a stream that there will be no answer.
fn not_taken(send: Option<SendStream>, why: Rejection) {
    if let Some(mut send) = send {
        // It may be closed already, which has the same effect.
        let _ = send.reset(why.code().into());
    }
}

async fn is_stopped(send: &Option<SendStream>) {
    match send {
        Some(send) => {
            let _ = send.stopped().await;
        }
        None => pending().await,
    }
}
