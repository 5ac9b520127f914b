//! The sender's half of a session of `macula-peer/1` (docs/protocol.md): the streams that carry what core decides
//! (`core/src/session_sender.rs`).
//!
//! Callers write from their own threads, without waiting, as long as little is unacknowledged and the stream takes what it
//! gets. The rest is left to the peer's task, which writes many small messages at once.

use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use macula_peer_core::errors::Rejection;
use macula_peer_core::proto::codes::stream::{SESSION_FORGOTTEN, WRONG_NODE};
use macula_peer_core::proto::session::{MAX_OPEN_LEN, Record, Words, put_number};
use macula_peer_core::session_sender::{Owed, SessionSender, Settled, StreamEnd, Taken, Write};
use macula_peer_core::session_table::SessionId;
use macula_peer_core::sync::now_or_never;
use macula_peer_core::types::NodeId;
use macula_peer_wire::HEADER_LEN;
use quinn::{ReadError, RecvStream, SendStream, WriteError};

use crate::link::{DIRECT_WRITES, Link};
use crate::message::Envelope;

/// The task writes pieces of this size. quinn looks through the pieces of a stream one by one, which many small ones make
/// slow.
const PIECE: usize = 32 << 10;

pub(crate) struct Session {
    sender: SessionSender<Envelope>,
    /// One for each channel, while there is a link.
    streams: [Option<Stream>; 2],
}

struct Stream {
    channel: usize,
    send: SendStream,
    receive: RecvStream,
    /// What is still to be written before anything else.
    rest: Bytes,
    /// Bytes of messages written and not acknowledged.
    in_flight: usize,
    /// Why the receiver reads no further. Its last acknowledgement says what it has.
    stopped: Option<Rejection>,
    /// It has said its last words.
    ended: bool,
    /// It does not know the session any more.
    forgotten: bool,
    words: Words,
}

impl Owed for Envelope {
    fn size(&self) -> usize {
        self.frame.len()
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// What became of messages since the last look.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) written: u64,
    pub(crate) acknowledged: u64,
    pub(crate) acknowledged_bytes: usize,
    /// Written to a receiver that was restarted, and may not be written again.
    pub(crate) lost: Vec<Envelope>,
    /// Written to a receiver that has forgotten the session, and so whether it has them.
    pub(crate) forgotten: Vec<Envelope>,
    /// The receiver cannot take them, or has waited too long for the rest of them.
    pub(crate) rejected: Vec<(Envelope, Rejection)>,
    /// Their time was over before they were written completely.
    pub(crate) expired: Vec<Envelope>,
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

impl Session {
    pub(crate) fn new(target: Option<NodeId>, at_most_once: bool) -> Self {
        Self { sender: SessionSender::new(new_id(), target, at_most_once), streams: [None, None] }
    }

    /// Goes on over a link. Returns what goes over it without the session, and false if the link has no streams to spare.
    pub(crate) fn attach(&mut self, link: &Link) -> (Taken<Envelope>, bool) {
        let taken = self.sender.link(link.dialect, new_id(), Instant::now());
        self.reset_unused();
        (taken, self.reopen(link))
    }

    /// Opens the streams that are missing. False if the link has none to spare.
    pub(crate) fn reopen(&mut self, link: &Link) -> bool {
        let now = Instant::now();
        while let Some(channel) = self.sender.missing() {
            let Some((send, receive)) = link.open_now() else { return false };
            self.streams[channel] = Some(Stream {
                channel,
                send,
                receive,
                rest: self.sender.open(channel, now).frame(),
                in_flight: 0,
                stopped: None,
                ended: false,
                forgotten: false,
                words: Words::default(),
            });
        }
        true
    }

    /// The link is gone, or carries the session no more.
    pub(crate) fn detach(&mut self, now: Instant) {
        self.sender.detach(now);
        self.reset_unused();
    }

    /// Takes a message over and writes what the stream takes of it.
    pub(crate) fn send(&mut self, message: Envelope, now: Instant) -> Sent {
        let channel = self.sender.push(message);
        let Some(stream) = &mut self.streams[channel] else { return Sent::default() };
        let first = self.sender.unwritten(channel) == 1;
        if !first || !self.sender.is_resumed(channel) || !stream.is_clear() {
            // The first waiting message has woken the task.
            return Sent { written: false, wake: first };
        }
        stream.write_one(&mut self.sender, now)
    }

    /// Reads acknowledgements and writes what there is. Ready when there is something to tell; wakes the task of `cx`
    /// when there is more to do.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<Progress> {
        let mut progress = Progress::default();
        let mut ended = Vec::new();
        for stream in self.streams.iter_mut().flatten() {
            let alive = stream.poll_words(cx, &mut self.sender, now, &mut progress)
                && stream.poll_write(cx, &mut self.sender, now, &mut progress);
            if !alive {
                ended.push((stream.channel, stream.end()));
            } else if !stream.rest.is_empty() {
                // The receiver cannot have it completely, because a part of it is still here.
                progress.expired.extend(self.sender.abandon(stream.channel, now));
            }
        }
        for (channel, end) in ended {
            // It may have been closed with another one that ended.
            if self.sender.has_stream(channel) {
                let (settled, goes_on) = self.sender.ended(channel, end, new_id());
                progress.settle(settled);
                progress.broken |= !goes_on;
            }
        }
        progress.closed |= self.sender.missing().is_some();
        self.reset_unused();
        match progress.is_news() {
            true => Poll::Ready(progress),
            false => Poll::Pending,
        }
    }

    /// Gives up expired messages that are not in flight. Returns them, and when to look again.
    pub(crate) fn expire(&mut self, now: Instant) -> (Vec<Envelope>, Option<Instant>) {
        self.sender.expire(now)
    }

    /// Gives up what may not go over the next link.
    pub(crate) fn refuse(&mut self, refused: impl FnMut(&Envelope) -> bool) -> Vec<Envelope> {
        self.sender.refuse(refused)
    }

    /// Ends the session; what is sent from now on is another one's.
    pub(crate) fn take(&mut self) -> Taken<Envelope> {
        for mut stream in std::mem::take(&mut self.streams).into_iter().flatten() {
            // Finishing a stream tells the receiver to forget the session. A connection that is gone has done the same.
            let _ = stream.send.finish();
        }
        self.sender.take(new_id())
    }

    /// Everything that is owed.
    pub(crate) fn messages(&self) -> impl Iterator<Item = &Envelope> {
        self.sender.messages()
    }

    /// How many messages are owed.
    pub(crate) fn len(&self) -> usize {
        self.sender.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sender.is_empty()
    }

    /// When the oldest message that is not acknowledged was first written.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.sender.oldest()
    }

    /// Resets streams that the session goes on without.
    fn reset_unused(&mut self) {
        for (channel, stream) in self.streams.iter_mut().enumerate() {
            if let Some(mut stream) = stream.take_if(|_| !self.sender.has_stream(channel)) {
                // Dropped, it would be finished, and the session ended with it. This fails only where the connection is gone.
                let _ = stream.send.reset(0u8.into());
            }
        }
    }
}

fn new_id() -> SessionId {
    let mut id = SessionId::default();
    fastrand::fill(&mut id);
    id
}

impl Stream {
    fn is_clear(&self) -> bool {
        self.stopped.is_none() && self.rest.len() <= HEADER_LEN + MAX_OPEN_LEN && self.in_flight < DIRECT_WRITES
    }

    /// Writes the next message without waiting.
    fn write_one(&mut self, sender: &mut SessionSender<Envelope>, now: Instant) -> Sent {
        let Some(Write { number, keep, message }) = sender.write(self.channel, now) else { return Sent::default() };
        let frame = message.frame.clone();
        self.in_flight += frame.len();
        if self.rest.is_empty() && number.is_none() {
            self.rest = frame;
        } else {
            let mut piece = BytesMut::from(std::mem::take(&mut self.rest));
            say_number(&mut piece, number, keep);
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
        sender: &mut SessionSender<Envelope>,
        now: Instant,
        progress: &mut Progress,
    ) -> bool {
        let channel = self.channel;
        // Nothing is said on a stream before it is needed.
        while self.stopped.is_none()
            && sender.owes(channel)
            && (!self.rest.is_empty() || (sender.is_resumed(channel) && sender.unwritten(channel) > 0))
        {
            if self.rest.len() < PIECE {
                self.fill(sender, now, progress);
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

    /// How the stream has ended.
    fn end(&self) -> StreamEnd {
        match self.ended_because() {
            Some(why) => StreamEnd::Rejected(why),
            None if self.is_forgotten() => StreamEnd::Forgotten,
            None => StreamEnd::Broken,
        }
    }

    /// Why the receiver has ended the stream, if it was for the message that it expects next.
    fn ended_because(&self) -> Option<Rejection> {
        let stopped = || now_or_never(self.send.stopped())?.ok()?.and_then(|code| Rejection::of(code.into_inner()));
        self.stopped.or_else(stopped).filter(|_| self.ended)
    }

    fn is_forgotten(&self) -> bool {
        self.forgotten
            || matches!(now_or_never(self.send.stopped()), Some(Ok(Some(code))) if code == SESSION_FORGOTTEN.into())
    }

    /// Puts messages into one piece. A large one that is alone is not copied.
    fn fill(&mut self, sender: &mut SessionSender<Envelope>, now: Instant, progress: &mut Progress) {
        if !sender.is_resumed(self.channel) || sender.unwritten(self.channel) == 0 {
            return;
        }
        let mut piece = BytesMut::from(std::mem::take(&mut self.rest));
        while piece.len() < PIECE {
            let Some(Write { number, keep, message }) = sender.write(self.channel, now) else { break };
            progress.written += 1;
            self.in_flight += message.frame.len();
            say_number(&mut piece, number, keep);
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
        sender: &mut SessionSender<Envelope>,
        now: Instant,
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
                let settled = match word {
                    Record::Greeting { known, run, expected } => {
                        sender.greeting(self.channel, known, run, expected, now)
                    }
                    // The last one says it all.
                    Record::Expected(number) => {
                        expected = Some(number);
                        continue;
                    }
                    Record::Refused(error, number) => {
                        let why = Rejection::of(error.into()).unwrap_or(Rejection::Unread);
                        sender.refused(self.channel, number, why)
                    }
                };
                self.settle(settled, progress);
            }
            if let Some(expected) = expected {
                let settled = sender.expected(self.channel, expected);
                self.settle(settled, progress);
            }
        }
    }

    fn settle(&mut self, settled: Settled<Envelope>, progress: &mut Progress) {
        let rejected = settled.rejected.iter().map(|(message, _)| message);
        let landed: usize = settled.acknowledged.iter().chain(rejected).map(Owed::size).sum();
        self.in_flight = self.in_flight.saturating_sub(landed);
        progress.settle(settled);
    }
}

impl Progress {
    fn settle(&mut self, settled: Settled<Envelope>) {
        let Settled { acknowledged, mut lost, mut forgotten, mut rejected } = settled;
        self.acknowledged += acknowledged.len() as u64;
        self.acknowledged_bytes += acknowledged.iter().map(Owed::size).sum::<usize>();
        self.lost.append(&mut lost);
        self.forgotten.append(&mut forgotten);
        self.rejected.append(&mut rejected);
    }

    fn is_news(&self) -> bool {
        let given_up = [&self.lost, &self.forgotten, &self.expired].iter().any(|messages| !messages.is_empty());
        let settled = self.acknowledged > 0 || given_up || !self.rejected.is_empty();
        settled || self.written > 0 || self.closed || self.broken
    }
}

fn say_number(piece: &mut BytesMut, number: Option<u64>, keep: Option<u32>) {
    if let Some(number) = number {
        put_number(piece, number, keep);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::future::poll_fn;
    use std::sync::Arc;

    use macula_peer_core::proto::session::NO_RUN;
    use macula_peer_core::session_table::KEEP;
    use macula_peer_core::types::{Dialect, Path};
    use macula_peer_wire::{Limits, MessageType};
    use quinn::Connection;
    use tokio::time::timeout;

    use super::*;
    use crate::addresses::Remote;
    use crate::conn::Conn;
    use crate::message::Message;
    use crate::relay::testing::{PATIENCE, pair, transport};

    fn envelope(byte: u8) -> Envelope {
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

    /// It opened streams to a gateway whenever it was looked at, and gave up the link of a burst that had used all.
    #[test]
    fn a_session_beside_a_link_without_sessions_reports_nothing() {
        let mut session = Session::new(None, false);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(session.poll(&mut cx, Instant::now()).is_pending());
    }

    /// Its first word was lost with the link, so the sender cannot ask for the run that it met. Only time tells whether a
    /// receiver that does not know the session never had it or has forgotten it.
    #[tokio::test]
    async fn old_messages_to_a_receiver_never_heard_are_not_resent() {
        let [dialled, accepted] = pair(&transport).await;
        let (path, limits) = (Path::Direct, Limits::default());
        let remote = Remote::fixed(dialled.remote_address());
        let conn = Conn::new(dialled, Dialect::MaculaPeer1, path, remote);
        let link = Link::new(conn, Arc::default(), limits, PATIENCE);
        let mut session = Session::new(None, false);
        assert!(session.attach(&link).1);
        let now = Instant::now();
        assert!(session.send(envelope(0), now - KEEP).written);
        assert!(session.send(envelope(1), now).written);
        // The next link is another pair of streams.
        assert!(session.attach(&link).1);
        let (mut send, mut receive, opening) = opened(&accepted, &mut session).await;
        assert_eq!(opening[HEADER_LEN + 17..], NO_RUN);
        send.write_all(&[vec![0], vec![7; 8], vec![0; 8]].concat()).await.unwrap();
        let Progress { forgotten, .. } = progress(&mut session).await;
        assert_eq!(forgotten.iter().map(|envelope| envelope.frame[8]).collect::<Vec<_>>(), [0]);
        // The number, and the message.
        let mut written = [0; 16 + 9];
        timeout(PATIENCE, receive.read_exact(&mut written)).await.unwrap().unwrap();
        assert_eq!(written[24], 1, "{written:?}");
    }
}
