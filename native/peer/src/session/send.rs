//! The sender's half of a session of `macula-peer/1` (docs/protocol.md): messages are numbered, kept until the receiver
//! has them, and written again to the next link when one dies.
//!
//! Callers write from their own threads, without waiting, as long as little is unacknowledged and the stream takes what it
//! gets. The rest is left to the peer's task, which writes many small messages at once.

use std::pin::pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use macula_peer_core::errors::Rejection;
use macula_peer_core::proto::codes::stream::{SESSION_FORGOTTEN, WRONG_NODE};
use macula_peer_core::proto::session::{MAX_OPEN_LEN, NO_RUN, Opening, Run, Word, Words, put_number};
use macula_peer_core::session::{Next, Outgoing};
use macula_peer_core::session_table::{KEEP, SessionId};
use macula_peer_core::sync::now_or_never;
use macula_peer_core::types::NodeId;
use macula_peer_wire::HEADER_LEN;
use quinn::{ReadError, RecvStream, SendStream, WriteError};

use crate::link::{DIRECT_WRITES, Link};
use crate::message::Letter;

/// Messages from this size on are numbered apart, so that they hold up no others. The same bound as for a frame that a
/// 0.14.3 gateway can read at all.
const LARGE_MESSAGE: usize = 64 << 10;

/// The task writes pieces of this size. quinn looks through the pieces of a stream one by one, which many small ones make
/// slow.
const PIECE: usize = 32 << 10;

/// As much may be written twice rather than wait: what two or three packets carry.
const LITTLE: usize = 3 << 10;

/// How long a message without a deadline is owed after its link died.
const OWED_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Session {
    id: SessionId,
    /// The node that it is for; `None`: whoever is at the other end.
    target: Option<NodeId>,
    /// Messages may not be written again to a receiver that was restarted.
    at_most_once: bool,
    channels: [Channel; 2],
    /// The receiver's run when it last said something about this session.
    run: Run,
    /// The receiver has acknowledged something.
    acknowledged: bool,
    /// Since when there is no link.
    detached: Option<Instant>,
}

#[derive(Default)]
struct Channel {
    owed: Outgoing<Letter>,
    stream: Option<Stream>,
}

struct Stream {
    send: SendStream,
    receive: RecvStream,
    /// What is still to be written before anything else.
    rest: Bytes,
    /// Bytes of messages written and not acknowledged.
    in_flight: usize,
    /// The receiver has said where to go on, or need not be asked.
    resumed: bool,
    /// Why the receiver reads no further. Its last acknowledgement says what it has.
    stopped: Option<Rejection>,
    /// It has said its last words.
    ended: bool,
    /// It does not know the session any more.
    forgotten: bool,
    words: Words,
    /// The receiver keeps the session for so long after this stream has ended.
    kept: Duration,
}

/// What became of messages since the last look.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) written: u64,
    pub(crate) acknowledged: u64,
    pub(crate) acknowledged_bytes: usize,
    /// Written to a receiver that was restarted, and may not be written again.
    pub(crate) lost: Vec<Letter>,
    /// Written to a receiver that has forgotten the session, and so whether it has them.
    pub(crate) forgotten: Vec<Letter>,
    /// The receiver cannot take them, or has waited too long for the rest of them.
    pub(crate) rejected: Vec<(Letter, Rejection)>,
    /// Their time was over before they were written completely.
    pub(crate) expired: Vec<Letter>,
    /// A channel needs another stream: [`Session::reopen`].
    pub(crate) closed: bool,
    /// The link carries the session no more.
    pub(crate) broken: bool,
    /// The receiver says that it is not the node.
    pub(crate) wrong_node: bool,
}

/// What became of one message at once.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sent {
    /// It was written, as far as the stream took it.
    pub(crate) written: bool,
    /// The peer's task has something to go on with.
    pub(crate) wake: bool,
}

/// What was owed when a session ended.
#[derive(Default)]
pub(crate) struct Taken {
    /// In order.
    pub(crate) owed: Vec<Letter>,
    /// May have arrived, and may not be sent again.
    pub(crate) lost: Vec<Letter>,
}

impl Session {
    pub(crate) fn new(target: Option<NodeId>, at_most_once: bool) -> Self {
        Self {
            id: new_id(),
            target,
            at_most_once,
            channels: Default::default(),
            run: NO_RUN,
            acknowledged: false,
            detached: None,
        }
    }

    /// Goes on over a link. False if it has no streams to spare.
    pub(crate) fn attach(&mut self, link: &Link) -> bool {
        self.detach(Instant::now());
        if !self.acknowledged && !self.channels.iter().any(|channel| channel.owed.may_have_arrived()) {
            // The receiver may know of nothing. It would take higher numbers for a sign that it was restarted.
            self.renew();
        }
        let attached = self.reopen(link);
        if attached {
            self.detached = None;
        }
        attached
    }

    /// Opens the streams that are missing. False if the link has none to spare.
    pub(crate) fn reopen(&mut self, link: &Link) -> bool {
        let now = Instant::now();
        for (number, channel) in self.channels.iter_mut().enumerate() {
            if channel.stream.is_some() {
                continue;
            }
            let Some((send, receive)) = link.open_now() else { return false };
            // To ask takes a round trip. Little is written at once: who has it drops it, and who has met this sender and
            // has forgotten the session takes nothing.
            let unsafe_to_repeat = self.at_most_once || (self.run == NO_RUN && channel.may_be_forgotten(now));
            let ask = channel.owed.may_have_arrived() && (unsafe_to_repeat || !channel.owes_little());
            let target = self.target.as_ref().map_or(&[][..], NodeId::as_bytes);
            channel.stream = Some(Stream {
                send,
                receive,
                rest: Opening { id: self.id, channel: number, run: self.run, target }.frame(),
                in_flight: 0,
                resumed: !ask,
                stopped: None,
                ended: false,
                forgotten: false,
                words: Words::default(),
                kept: KEEP,
            });
        }
        true
    }

    /// The link is gone, or carries the session no more.
    pub(crate) fn detach(&mut self, now: Instant) {
        self.detached.get_or_insert(now);
        for channel in &mut self.channels {
            channel.close();
        }
    }

    /// Takes a message over and writes what the stream takes of it.
    pub(crate) fn send(&mut self, message: Letter, now: Instant) -> Sent {
        let channel = self.channel(&message);
        channel.owed.push(message);
        let Some(stream) = channel.stream.as_mut() else { return Sent::default() };
        let first = channel.owed.unwritten() == 1;
        if !first || !stream.resumed || !stream.is_clear() {
            // Whoever was first has woken the task.
            return Sent { written: false, wake: first };
        }
        stream.write_one(&mut channel.owed, now)
    }

    /// Reads acknowledgements and writes what there is. Ready when there is something to tell; wakes the task of `cx`
    /// when there is more to do.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<Progress> {
        let mut progress = Progress::default();
        let mut forgotten = false;
        for channel in &mut self.channels {
            let Some(stream) = &mut channel.stream else { continue };
            let mut greeted = Greeted { run: &mut self.run, at_most_once: self.at_most_once, now };
            let alive = stream.poll_words(cx, &mut channel.owed, &mut greeted, &mut progress)
                && stream.poll_write(cx, &mut channel.owed, now, &mut progress);
            if alive {
                // The receiver cannot have it completely, because a part of it is still here.
                let over = |message: &Letter| message.deadline.is_some_and(|deadline| deadline <= now);
                let expired = if stream.rest.is_empty() { None } else { channel.owed.abandon(over) };
                progress.closed |= expired.is_some();
                if expired.is_some() {
                    channel.close();
                }
                progress.expired.extend(expired);
                continue;
            }
            let why = stream.ended_because().filter(|_| channel.owed.is_under_way());
            let rejected = match why {
                Some(why @ Rejection::TooSlow) => channel.owed.stalled().zip(Some(why)),
                Some(why) => channel.owed.reject().zip(Some(why)),
                None if stream.is_forgotten() => {
                    forgotten = true;
                    continue;
                }
                None => {
                    progress.broken = true;
                    continue;
                }
            };
            progress.rejected.extend(rejected);
            progress.closed = true;
            channel.close();
        }
        if forgotten {
            self.forgotten(&mut progress);
        }
        self.acknowledged |= progress.acknowledged > 0;
        match progress.is_news() {
            true => Poll::Ready(progress),
            false => Poll::Pending,
        }
    }

    /// The receiver has forgotten the session. What it may have of it is not sent again; the rest goes on in another one.
    fn forgotten(&mut self, progress: &mut Progress) {
        for channel in &mut self.channels {
            progress.forgotten.append(&mut channel.owed.forgotten());
            channel.close();
        }
        self.renew();
        progress.closed = true;
    }

    /// Gives up what is not on its way and whose time is over. Returns it, and when to look again.
    pub(crate) fn expire(&mut self, now: Instant) -> (Vec<Letter>, Option<Instant>) {
        let owed_until = self.detached.map(|since| since + OWED_WITHOUT_DEADLINE);
        let until = |message: &Letter| message.deadline.or(owed_until);
        let mut expired = Vec::new();
        let mut next: Option<Instant> = None;
        for channel in &mut self.channels {
            expired.extend(channel.owed.give_up(|message, _| until(message).is_some_and(|until| until <= now)));
            let times = channel.owed.messages().filter_map(until).filter(|&until| until > now);
            next = times.chain(next).min();
        }
        (expired, next)
    }

    /// Gives up what may not go over the next link.
    pub(crate) fn refuse(&mut self, mut refused: impl FnMut(&Letter) -> bool) -> Vec<Letter> {
        let channels = self.channels.iter_mut();
        channels.flat_map(|channel| channel.owed.give_up(|message, _| refused(message))).collect()
    }

    /// Ends the session; what is sent from now on is another one's.
    pub(crate) fn take(&mut self) -> Taken {
        let mut taken = Taken::default();
        for channel in &mut self.channels {
            // Finishing a stream tells the receiver to forget the session.
            if let Some(mut stream) = channel.stream.take() {
                let _ = stream.send.finish();
            }
            channel.owed.rewind();
            if self.at_most_once {
                taken.lost.append(&mut channel.owed.give_up(|_, written| written.is_some()));
            }
            taken.owed.append(&mut channel.owed.take());
        }
        self.renew();
        taken
    }

    /// Everything that is owed.
    pub(crate) fn messages(&self) -> impl Iterator<Item = &Letter> {
        self.channels.iter().flat_map(|channel| channel.owed.messages())
    }

    /// How many messages are owed.
    pub(crate) fn len(&self) -> usize {
        self.channels.iter().map(|channel| channel.owed.len()).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.channels.iter().all(|channel| channel.owed.is_empty())
    }

    /// When the oldest message that is not acknowledged was first written.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.channels.iter().filter_map(|channel| channel.owed.oldest()).min()
    }

    fn channel(&mut self, message: &Letter) -> &mut Channel {
        &mut self.channels[usize::from(message.frame.len() >= LARGE_MESSAGE)]
    }

    fn renew(&mut self) {
        (self.id, self.run, self.acknowledged) = (new_id(), NO_RUN, false);
        for channel in &mut self.channels {
            channel.owed.renumber();
        }
    }
}

fn new_id() -> SessionId {
    let mut id = SessionId::default();
    fastrand::fill(&mut id);
    id
}

impl Channel {
    fn owes_little(&self) -> bool {
        let mut most = LITTLE;
        self.owed.messages().all(|message| {
            let left = most.checked_sub(message.frame.len());
            most = left.unwrap_or_default();
            left.is_some()
        })
    }

    /// Something was written so long ago that a receiver which has it may know nothing of the session any more.
    fn may_be_forgotten(&self, now: Instant) -> bool {
        self.owed.oldest().is_some_and(|written| now.saturating_duration_since(written) >= KEEP)
    }

    /// The session goes on over another stream.
    fn close(&mut self) {
        self.owed.rewind();
        if let Some(mut stream) = self.stream.take() {
            // Dropped, it would be finished, and the session ended with it. A connection that is gone is as good.
            let _ = stream.send.reset(0u8.into());
        }
    }
}

impl Stream {
    fn is_clear(&self) -> bool {
        self.stopped.is_none() && self.rest.len() <= HEADER_LEN + MAX_OPEN_LEN && self.in_flight < DIRECT_WRITES
    }

    /// Writes the next message without waiting.
    fn write_one(&mut self, owed: &mut Outgoing<Letter>, now: Instant) -> Sent {
        let Some(Next { number, announce, message }) = owed.write(now) else { return Sent::default() };
        let frame = message.frame.clone();
        self.in_flight += frame.len();
        let keep = keep_longer(&mut self.kept, message, now);
        if self.rest.is_empty() && !announce && keep.is_none() {
            self.rest = frame;
        } else {
            let mut piece = BytesMut::from(std::mem::take(&mut self.rest));
            say_number(&mut piece, number, announce, keep);
            piece.extend_from_slice(&frame);
            self.rest = piece.freeze();
        }
        // An error comes again when the task writes.
        let all = matches!(now_or_never(self.write_rest()), Some(Ok(())));
        Sent { written: true, wake: !all }
    }

    /// Writes until the stream takes no more. False if it is gone.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        owed: &mut Outgoing<Letter>,
        now: Instant,
        progress: &mut Progress,
    ) -> bool {
        // Nothing is said on a stream before it is needed.
        while self.stopped.is_none()
            && !owed.is_empty()
            && (!self.rest.is_empty() || (self.resumed && owed.unwritten() > 0))
        {
            if self.resumed && self.rest.len() < PIECE {
                self.fill(owed, now, progress);
            }
            let written = pin!(self.write_rest()).poll(cx);
            match written {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(WriteError::Stopped(code))) if Rejection::of(code.into_inner()).is_some() => {
                    self.stopped = Rejection::of(code.into_inner())
                }
                Poll::Ready(Err(error)) => {
                    progress.wrong_node |= matches!(error, WriteError::Stopped(code) if code == WRONG_NODE.into());
                    self.forgotten |= matches!(error, WriteError::Stopped(code) if code == SESSION_FORGOTTEN.into());
                    return false;
                }
                Poll::Pending => return true,
            }
        }
        true
    }

    /// Why the receiver has ended the stream, if it was for the message that it expects next.
    fn ended_because(&self) -> Option<Rejection> {
        let stopped = || now_or_never(self.send.stopped())?.ok()?.and_then(|code| Rejection::of(code.into_inner()));
        let why = self.stopped.or_else(stopped);
        why.filter(|_| self.words.greeted() && self.ended)
    }

    fn is_forgotten(&self) -> bool {
        self.forgotten
            || matches!(now_or_never(self.send.stopped()), Some(Ok(Some(code))) if code == SESSION_FORGOTTEN.into())
    }

    /// Puts messages into one piece. A large one that is alone is not copied.
    fn fill(&mut self, owed: &mut Outgoing<Letter>, now: Instant, progress: &mut Progress) {
        if owed.unwritten() == 0 {
            return;
        }
        let mut piece = BytesMut::from(std::mem::take(&mut self.rest));
        while piece.len() < PIECE {
            let Some(Next { number, announce, message }) = owed.write(now) else { break };
            progress.written += 1;
            self.in_flight += message.frame.len();
            say_number(&mut piece, number, announce, keep_longer(&mut self.kept, message, now));
            if piece.is_empty() && message.frame.len() >= PIECE {
                self.rest = message.frame.clone();
                return;
            }
            piece.extend_from_slice(&message.frame);
        }
        self.rest = piece.freeze();
    }

    async fn write_rest(&mut self) -> Result<(), WriteError> {
        while !self.rest.is_empty() {
            // What is not taken stays in `rest`, also when this future is dropped.
            self.send.write_chunks(std::slice::from_mut(&mut self.rest)).await?;
        }
        Ok(())
    }

    /// Reads what the receiver says. False if it says no more.
    fn poll_words(
        &mut self,
        cx: &mut Context<'_>,
        owed: &mut Outgoing<Letter>,
        greeted: &mut Greeted<'_>,
        progress: &mut Progress,
    ) -> bool {
        loop {
            match pin!(self.receive.read_chunk(usize::MAX, true)).poll(cx) {
                Poll::Pending => return true,
                Poll::Ready(Ok(Some(chunk))) => self.words.push(&chunk.bytes),
                Poll::Ready(Ok(None)) => {
                    self.ended = true;
                    return false;
                }
                Poll::Ready(Err(error)) => {
                    progress.wrong_node |= matches!(error, ReadError::Reset(code) if code == WRONG_NODE.into());
                    self.forgotten |= matches!(error, ReadError::Reset(code) if code == SESSION_FORGOTTEN.into());
                    return false;
                }
            }
            let mut expected = None;
            while let Some(word) = self.words.next_word() {
                match word {
                    Word::Greeting { known, run, expected } => {
                        self.greeting(known, run, expected, owed, greeted, progress);
                    }
                    // The last one says it all.
                    Word::Expected(number) => expected = Some(number),
                    Word::Refused(error, number) => {
                        let why = Rejection::of(error.into()).unwrap_or(Rejection::Unread);
                        self.refused(number, why, owed, progress);
                    }
                }
            }
            if let Some(expected) = expected {
                self.arrived(owed.acknowledge(expected), progress);
            }
        }
    }

    /// The receiver does not take a message. It has taken, or refused, everything before.
    fn refused(&mut self, number: u64, why: Rejection, owed: &mut Outgoing<Letter>, progress: &mut Progress) {
        self.arrived(owed.acknowledge(number), progress);
        if let Some(message) = owed.refused(number) {
            self.in_flight = self.in_flight.saturating_sub(message.frame.len());
            progress.rejected.push((message, why));
        }
    }

    fn greeting(
        &mut self,
        known: bool,
        run: Run,
        expected: u64,
        owed: &mut Outgoing<Letter>,
        Greeted { run: met, at_most_once, now }: &mut Greeted<'_>,
        progress: &mut Progress,
    ) {
        let asked = !std::mem::replace(&mut self.resumed, true);
        let met = std::mem::replace(*met, run);
        if known {
            let arrived = owed.resume(expected);
            self.arrived(arrived, progress);
        } else if *at_most_once && asked {
            progress.lost.extend(owed.give_up(|_, written| written.is_some()));
        } else if met == NO_RUN && asked {
            // It never had the session, or has forgotten it: only time tells.
            let may_be_forgotten = |at: Instant| now.saturating_duration_since(at) >= KEEP;
            progress.forgotten.extend(owed.give_up(|_, written| written.is_some_and(may_be_forgotten)));
        }
    }

    fn arrived(&mut self, messages: impl Iterator<Item = Letter>, progress: &mut Progress) {
        for message in messages {
            let size = message.frame.len();
            progress.acknowledged += 1;
            progress.acknowledged_bytes += size;
            self.in_flight = self.in_flight.saturating_sub(size);
        }
    }
}

/// What the first word on a stream is about.
struct Greeted<'a> {
    /// The session's.
    run: &'a mut Run,
    at_most_once: bool,
    now: Instant,
}

impl Progress {
    fn is_news(&self) -> bool {
        let given_up = [&self.lost, &self.forgotten].iter().any(|messages| !messages.is_empty());
        let settled = self.acknowledged > 0 || given_up || !self.rejected.is_empty();
        settled || self.written > 0 || self.closed || self.broken
    }
}

/// The seconds to announce, where the message is owed for longer than its session is kept.
fn keep_longer(kept: &mut Duration, message: &Letter, now: Instant) -> Option<u32> {
    let owed_for = message.deadline?.saturating_duration_since(now);
    if owed_for <= *kept {
        return None;
    }
    // Twice as long, so that the next messages with the same timeout need not say so again.
    *kept = owed_for * 2;
    Some(kept.as_secs().try_into().unwrap_or(u32::MAX))
}

fn say_number(piece: &mut BytesMut, number: u64, announce: bool, keep: Option<u32>) {
    if announce || keep.is_some() {
        put_number(piece, number, keep);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::future::poll_fn;
    use std::sync::Arc;

    use macula_peer_core::types::{Dialect, Path};
    use macula_peer_wire::{Limits, MessageType};
    use quinn::Connection;
    use tokio::time::timeout;

    use super::*;
    use crate::addresses::Remote;
    use crate::conn::Conn;
    use crate::message::Message;
    use crate::relay::testing::{PATIENCE, pair, transport};

    fn letter(byte: u8) -> Letter {
        let frame = vec![1, MessageType::Publish.id(), 0, 0, 0, 0, 0, 1, byte].into();
        Message { frame, kind: MessageType::Publish, deadline: None, key: None }.into()
    }

    async fn progress(session: &mut Session) -> Progress {
        let news = poll_fn(|cx| session.poll(cx, Instant::now()));
        timeout(PATIENCE, news).await.expect("there is news in time")
    }

    /// The next stream that is not reset, and what opens the session on it.
    async fn opened(connection: &Connection, session: &mut Session) -> (SendStream, RecvStream, Vec<u8>) {
        let accept = async {
            loop {
                let (send, mut receive) = connection.accept_bi().await.unwrap();
                let mut opening = vec![0; HEADER_LEN + 25];
                if receive.read_exact(&mut opening).await.is_ok() {
                    return (send, receive, opening);
                }
            }
        };
        tokio::select! {
            opened = timeout(PATIENCE, accept) => opened.expect("opened in time"),
            // Writes what there is.
            _ = poll_fn(|cx| session.poll(cx, Instant::now())) => panic!("it does not wait for what is said"),
        }
    }

    /// Its first word was lost with the link, so the sender cannot ask for the run that it met. Only time tells whether a
    /// receiver that does not know the session never had it or has forgotten it.
    #[tokio::test]
    async fn what_was_written_too_long_ago_to_a_receiver_that_was_never_heard_is_not_written_again() {
        let [dialled, accepted] = pair(&transport).await;
        let (path, limits) = (Path::Direct, Limits::default());
        let remote = Remote::fixed(dialled.remote_address());
        let conn = Conn::new(dialled, Dialect::MaculaPeer1, path, remote);
        let link = Link::new(conn, Arc::default(), limits, PATIENCE);
        let mut session = Session::new(None, false);
        assert!(session.attach(&link));
        let now = Instant::now();
        assert!(session.send(letter(0), now - KEEP).written);
        assert!(session.send(letter(1), now).written);
        // The next link is another pair of streams.
        assert!(session.attach(&link));
        let (mut send, mut receive, opening) = opened(&accepted, &mut session).await;
        assert_eq!(opening[HEADER_LEN + 17..], NO_RUN);
        send.write_all(&[vec![0], vec![7; 8], vec![0; 8]].concat()).await.unwrap();
        let Progress { forgotten, .. } = progress(&mut session).await;
        assert_eq!(forgotten.iter().map(|letter| letter.frame[8]).collect::<Vec<_>>(), [0]);
        // The number, and the message.
        let mut written = [0; 16 + 9];
        timeout(PATIENCE, receive.read_exact(&mut written)).await.unwrap().unwrap();
        assert_eq!(written[24], 1, "{written:?}");
    }
}
