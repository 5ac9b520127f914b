//! The sender's half of a session of `macula-peer/1` (docs/protocol.md): which streams it needs, what is written to them,
//! and what became of the messages when streams, links and receivers come and go.
//!
//! Messages from some size on are numbered apart, in a channel of their own, so that they hold up no others. The owner of
//! a sender opens its streams, writes what it says and tells it what is read.

use std::time::{Duration, Instant};

use crate::errors::Rejection;
use crate::proto::session::{NO_RUN, Opening, Run};
use crate::queue::OWED_WITHOUT_DEADLINE;
use crate::session::{Next, Outgoing};
use crate::session_table::{KEEP, SessionId};
use crate::types::{Dialect, NodeId};

/// Messages from this size on are numbered apart. The same bound as for a frame that a 0.14.3 gateway can read at all.
const LARGE_MESSAGE: usize = 64 << 10;

/// So many bytes may be written twice rather than wait for a round trip: what two or three packets carry.
const LITTLE: usize = 3 << 10;

/// What is sent.
pub trait Owed {
    /// Bytes of its frame.
    fn size(&self) -> usize;
    fn deadline(&self) -> Option<Instant>;
}

/// The messages that a node owes to one peer.
#[derive(Debug)]
pub struct SessionSender<M> {
    id: SessionId,
    /// The node that it is for; `None`: any node at the other end.
    target: Option<NodeId>,
    /// Messages may not be written again to a receiver that was restarted.
    at_most_once: bool,
    channels: [Channel<M>; 2],
    /// The receiver's run when it last said something about this session.
    run: Run,
    /// The receiver has acknowledged something.
    acknowledged: bool,
    /// A link carries the session. One of `macula` never does.
    attached: bool,
    /// Since when the session has had no streams.
    detached: Option<Instant>,
}

#[derive(Debug)]
struct Channel<M> {
    owed: Outgoing<M>,
    stream: Option<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// The receiver has said where to go on, or need not be asked.
    resumed: bool,
    greeted: bool,
    /// The receiver keeps the session for so long after this stream has ended.
    kept: Duration,
}

/// What became of messages.
#[derive(Debug)]
pub struct Settled<M> {
    pub acknowledged: Vec<M>,
    /// Written to a receiver that was restarted, and may not be written again.
    pub lost: Vec<M>,
    /// Written to a receiver that has forgotten the session, and so whether it has them.
    pub forgotten: Vec<M>,
    /// The receiver cannot take them, or has waited too long for the rest of them.
    pub rejected: Vec<(M, Rejection)>,
}

/// How a stream ended before it was closed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    /// The receiver does not take the message that it expects next.
    Rejected(Rejection),
    /// It has forgotten the session.
    Forgotten,
    /// Anything else: the link carries the session no more.
    Broken,
}

/// What to write next.
#[derive(Debug)]
pub struct Write<'a, M> {
    /// To be said before the message.
    pub number: Option<u64>,
    /// For how many seconds the receiver should keep the session, to be said with the number.
    pub keep: Option<u32>,
    pub message: &'a M,
}

/// What was owed when a session ended.
#[derive(Debug)]
pub struct Taken<M> {
    /// In order.
    pub owed: Vec<M>,
    /// They may have arrived, and may not be sent again.
    pub lost: Vec<M>,
}

impl<M> Default for Settled<M> {
    fn default() -> Self {
        Self { acknowledged: Vec::new(), lost: Vec::new(), forgotten: Vec::new(), rejected: Vec::new() }
    }
}

impl<M> Default for Taken<M> {
    fn default() -> Self {
        Self { owed: Vec::new(), lost: Vec::new() }
    }
}

impl<M> Default for Channel<M> {
    fn default() -> Self {
        Self { owed: Outgoing::default(), stream: None }
    }
}

impl<M: Owed> SessionSender<M> {
    /// `id`: drawn at random, here and below.
    pub fn new(id: SessionId, target: Option<NodeId>, at_most_once: bool) -> Self {
        let channels = Default::default();
        Self { id, target, at_most_once, channels, run: NO_RUN, acknowledged: false, attached: false, detached: None }
    }

    /// Goes on over another link. [`SessionSender::open`] opens its streams.
    pub fn attach(&mut self, id: SessionId, now: Instant) {
        self.detach(now);
        self.attached = true;
        if !self.acknowledged && !self.channels.iter().any(|channel| channel.owed.may_have_arrived()) {
            // The receiver may know nothing of it, and would take higher numbers for a sign that it was restarted.
            self.renew(id);
        }
    }

    /// The same over a link of any dialect. One of `macula` carries no session: what was numbered goes over it one by one.
    pub fn link(&mut self, dialect: Dialect, id: SessionId, now: Instant) -> Taken<M> {
        match dialect {
            Dialect::MaculaPeer1 => {
                self.attach(id, now);
                Taken::default()
            }
            Dialect::Macula => self.take(id),
        }
    }

    /// The channel that needs a stream next. Without a link, none does.
    pub fn missing(&self) -> Option<usize> {
        self.channels.iter().take_while(|_| self.attached).position(|channel| channel.stream.is_none())
    }

    /// A stream was opened for a channel. Returns what opens it.
    pub fn open(&mut self, channel: usize, now: Instant) -> Opening<'_> {
        let at = &mut self.channels[channel];
        // To ask takes a round trip. Little is written at once: a receiver that has it drops it, and one that has met this
        // sender and forgotten the session takes nothing.
        let unsafe_to_repeat = self.at_most_once || (self.run == NO_RUN && at.may_be_forgotten(now));
        let asks = at.owed.may_have_arrived() && (unsafe_to_repeat || !at.owes_little());
        at.stream = Some(Stream { resumed: !asks, greeted: false, kept: KEEP });
        if self.missing().is_none() {
            self.detached = None;
        }
        let target = self.target.as_ref().map_or(&[][..], NodeId::as_bytes);
        Opening { id: self.id, channel, run: self.run, target }
    }

    /// The link is gone, or carries the session no more.
    pub fn detach(&mut self, now: Instant) {
        self.attached = false;
        self.detached.get_or_insert(now);
        self.channels.iter_mut().for_each(Channel::close);
    }

    /// Takes a message over, behind all others of its channel, which it returns.
    pub fn push(&mut self, message: M) -> usize {
        let channel = usize::from(message.size() >= LARGE_MESSAGE);
        self.channels[channel].owed.push(message);
        channel
    }

    /// Whether a channel owes something: nothing is said on a stream before it is needed.
    pub fn owes(&self, channel: usize) -> bool {
        !self.channels[channel].owed.is_empty()
    }

    /// How many messages of a channel are not written to its present stream.
    pub fn unwritten(&self, channel: usize) -> usize {
        self.channels[channel].owed.unwritten()
    }

    /// Whether messages may be written to a channel's stream: the receiver has said where to go on, or need not be asked.
    pub fn is_resumed(&self, channel: usize) -> bool {
        self.channels[channel].stream.as_ref().is_some_and(|stream| stream.resumed)
    }

    pub fn has_stream(&self, channel: usize) -> bool {
        self.channels[channel].stream.is_some()
    }

    /// The next message for a channel's stream, which counts as written from here on.
    pub fn write(&mut self, channel: usize, now: Instant) -> Option<Write<'_, M>> {
        let Channel { owed, stream } = &mut self.channels[channel];
        let stream = stream.as_mut().filter(|stream| stream.resumed)?;
        let Next { number, announce, message } = owed.write(now)?;
        let keep = stream.keep_longer(message, now);
        Some(Write { number: (announce || keep.is_some()).then_some(number), keep, message })
    }

    /// The receiver's first word on a stream.
    pub fn greeting(&mut self, channel: usize, known: bool, run: Run, expected: u64, now: Instant) -> Settled<M> {
        let mut settled = Settled::default();
        let Channel { owed, stream: Some(stream) } = &mut self.channels[channel] else { return settled };
        stream.greeted = true;
        let asked = !std::mem::replace(&mut stream.resumed, true);
        let met = std::mem::replace(&mut self.run, run);
        if known {
            settled.acknowledged.extend(owed.resume(expected));
        } else if self.at_most_once && asked {
            settled.lost = owed.give_up(|_, written| written.is_some());
        } else if met == NO_RUN && asked {
            // It never had the session, or has forgotten it: only time tells.
            let may_be_forgotten = |at: Instant| now.saturating_duration_since(at) >= KEEP;
            settled.forgotten = owed.give_up(|_, written| written.is_some_and(may_be_forgotten));
        }
        self.acknowledged |= !settled.acknowledged.is_empty();
        settled
    }

    /// Everything below `number` has arrived.
    pub fn expected(&mut self, channel: usize, number: u64) -> Settled<M> {
        let acknowledged: Vec<M> = self.channels[channel].owed.acknowledge(number).collect();
        self.acknowledged |= !acknowledged.is_empty();
        Settled { acknowledged, ..Settled::default() }
    }

    /// The receiver does not take a message. It has taken, or refused, everything before.
    pub fn refused(&mut self, channel: usize, number: u64, why: Rejection) -> Settled<M> {
        let mut settled = self.expected(channel, number);
        settled.rejected.extend(self.channels[channel].owed.refused(number).map(|message| (message, why)));
        settled
    }

    /// A stream has ended, and all that came on it was told. Returns whether the session goes on over this link, with
    /// another stream.
    pub fn ended(&mut self, channel: usize, end: StreamEnd, id: SessionId) -> (Settled<M>, bool) {
        let mut settled = Settled::default();
        let at = &mut self.channels[channel];
        let greeted = at.stream.as_ref().is_some_and(|stream| stream.greeted);
        match end {
            StreamEnd::Rejected(why) if greeted && at.owed.is_under_way() => {
                let rejected = if why == Rejection::TooSlow { at.owed.stalled() } else { at.owed.reject() };
                settled.rejected.extend(rejected.map(|message| (message, why)));
                at.close();
            }
            StreamEnd::Forgotten => {
                for channel in &mut self.channels {
                    settled.forgotten.append(&mut channel.owed.forgotten());
                    channel.close();
                }
                self.renew(id);
            }
            StreamEnd::Rejected(_) | StreamEnd::Broken => return (settled, false),
        }
        (settled, true)
    }

    /// Gives back the message that a stream took only a part of, if its time is over. The channel then needs another
    /// stream.
    pub fn abandon(&mut self, channel: usize, now: Instant) -> Option<M> {
        let at = &mut self.channels[channel];
        let over = |message: &M| message.deadline().is_some_and(|deadline| deadline <= now);
        let expired = at.owed.abandon(over)?;
        at.close();
        Some(expired)
    }

    /// Gives up messages whose deadline has passed, unless they are on their way. Returns them, and when to look again.
    pub fn expire(&mut self, now: Instant) -> (Vec<M>, Option<Instant>) {
        let owed_until = self.detached.map(|since| since + OWED_WITHOUT_DEADLINE);
        let until = |message: &M| message.deadline().or(owed_until);
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
    pub fn refuse(&mut self, mut refused: impl FnMut(&M) -> bool) -> Vec<M> {
        let channels = self.channels.iter_mut();
        channels.flat_map(|channel| channel.owed.give_up(|message, _| refused(message))).collect()
    }

    /// Ends the session and its streams. What is sent from now on belongs to a new session.
    pub fn take(&mut self, id: SessionId) -> Taken<M> {
        self.attached = false;
        let mut taken = Taken::default();
        for channel in &mut self.channels {
            channel.close();
            if self.at_most_once {
                taken.lost.append(&mut channel.owed.give_up(|_, written| written.is_some()));
            }
            taken.owed.append(&mut channel.owed.take());
        }
        self.renew(id);
        taken
    }

    /// Everything that is owed.
    pub fn messages(&self) -> impl Iterator<Item = &M> {
        self.channels.iter().flat_map(|channel| channel.owed.messages())
    }

    /// How many messages are owed.
    pub fn len(&self) -> usize {
        self.channels.iter().map(|channel| channel.owed.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.channels.iter().all(|channel| channel.owed.is_empty())
    }

    /// When the oldest message that is not acknowledged was first written.
    pub fn oldest(&self) -> Option<Instant> {
        self.channels.iter().filter_map(|channel| channel.owed.oldest()).min()
    }

    fn renew(&mut self, id: SessionId) {
        (self.id, self.run, self.acknowledged) = (id, NO_RUN, false);
        self.channels.iter_mut().for_each(|channel| channel.owed.renumber());
    }
}

impl<M: Owed> Channel<M> {
    fn owes_little(&self) -> bool {
        let mut most = LITTLE;
        self.owed.messages().all(|message| {
            let left = most.checked_sub(message.size());
            most = left.unwrap_or_default();
            left.is_some()
        })
    }

    /// Something was written so long ago that a receiver which has it may know nothing of the session any more.
    fn may_be_forgotten(&self, now: Instant) -> bool {
        self.owed.oldest().is_some_and(|written| now.saturating_duration_since(written) >= KEEP)
    }
}

impl<M> Channel<M> {
    /// The session goes on over another stream.
    fn close(&mut self) {
        self.owed.rewind();
        self.stream = None;
    }
}

impl Stream {
    /// The seconds to announce, where the message is owed for longer than its session is kept.
    fn keep_longer(&mut self, message: &impl Owed, now: Instant) -> Option<u32> {
        let owed_for = message.deadline()?.saturating_duration_since(now);
        if owed_for <= self.kept {
            return None;
        }
        // Twice as long, so that the next messages with the same timeout need not say so again.
        self.kept = owed_for * 2;
        Some(self.kept.as_secs().try_into().unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Envelope {
        size: usize,
        deadline: Option<Instant>,
    }

    impl Owed for Envelope {
        fn size(&self) -> usize {
            self.size
        }

        fn deadline(&self) -> Option<Instant> {
            self.deadline
        }
    }

    const RUN: Run = [7; 8];
    const MS: Duration = Duration::from_millis(1);

    fn envelope(size: usize) -> Envelope {
        Envelope { size, deadline: None }
    }

    fn until(deadline: Instant) -> Envelope {
        Envelope { size: 10, deadline: Some(deadline) }
    }

    fn sender(at_most_once: bool) -> SessionSender<Envelope> {
        SessionSender::new([0; 16], None, at_most_once)
    }

    /// Goes on over another link. Returns the ids that its streams are opened with.
    fn linked(sender: &mut SessionSender<Envelope>, n: u8, now: Instant) -> Vec<SessionId> {
        sender.attach([n; 16], now);
        let mut ids = Vec::new();
        while let Some(channel) = sender.missing() {
            ids.push(sender.open(channel, now).id);
        }
        ids
    }

    fn written(sender: &mut SessionSender<Envelope>, now: Instant) -> Vec<Option<u64>> {
        std::iter::from_fn(|| sender.write(0, now).map(|write| write.number)).collect()
    }

    #[test]
    fn a_session_is_another_one_until_the_receiver_may_know_it() {
        let (now, mut sender) = (Instant::now(), sender(false));
        assert_eq!(linked(&mut sender, 1, now), [[1; 16]; 2]);
        sender.push(envelope(10));
        assert_eq!(linked(&mut sender, 2, now), [[2; 16]; 2], "nothing was written");
        assert_eq!(written(&mut sender, now), [Some(0)]);
        assert_eq!(linked(&mut sender, 3, now), [[2; 16]; 2]);
        assert_eq!(written(&mut sender, now), [Some(0)], "little is written again at once");
        assert_eq!(sender.expected(0, 1).acknowledged.len(), 1);
        assert_eq!(linked(&mut sender, 4, now), [[2; 16]; 2], "the receiver knows it");
    }

    #[test]
    fn many_bytes_are_written_again_only_from_where_the_receiver_says() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        for _ in 0..3 {
            sender.push(envelope(LITTLE));
        }
        assert_eq!(written(&mut sender, now), [Some(0), None, None]);
        linked(&mut sender, 2, now);
        assert_eq!(written(&mut sender, now), [], "it asks");
        assert_eq!(sender.greeting(0, true, RUN, 2, now).acknowledged.len(), 2);
        assert_eq!(written(&mut sender, now), [Some(2)]);
    }

    #[test]
    fn a_message_that_a_restarted_receiver_may_have_had_is_lost_where_nothing_may_arrive_twice() {
        for (at_most_once, lost, again) in [(true, 1, vec![]), (false, 0, vec![Some(0)])] {
            let (now, mut sender) = (Instant::now(), sender(at_most_once));
            linked(&mut sender, 1, now);
            sender.push(envelope(2 * LITTLE));
            assert_eq!(written(&mut sender, now), [Some(0)]);
            linked(&mut sender, 2, now);
            let settled = sender.greeting(0, false, RUN, 0, now);
            assert_eq!((settled.lost.len(), written(&mut sender, now)), (lost, again));
        }
    }

    #[test]
    fn a_forgotten_session_is_followed_by_another_one() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        written(&mut sender, now);
        linked(&mut sender, 2, now);
        sender.push(envelope(10));
        let (settled, goes_on) = sender.ended(0, StreamEnd::Forgotten, [3; 16]);
        assert!(goes_on);
        assert_eq!(settled.forgotten.len(), 1, "it may have arrived");
        assert_eq!(sender.missing(), Some(0));
        assert_eq!(sender.open(0, now).id, [3; 16]);
        assert_eq!(written(&mut sender, now), [Some(0)]);
    }

    #[test]
    fn a_message_that_the_receiver_does_not_take_is_given_back_and_the_session_goes_on() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        for _ in 0..2 {
            sender.push(envelope(10));
        }
        written(&mut sender, now);
        let (_, goes_on) = sender.ended(0, StreamEnd::Rejected(Rejection::TooLarge), [2; 16]);
        assert!(!goes_on, "it has not greeted");
        sender.greeting(0, true, RUN, 0, now);
        let (settled, goes_on) = sender.ended(0, StreamEnd::Rejected(Rejection::TooLarge), [2; 16]);
        assert!(goes_on && settled.rejected.len() == 1);
        assert_eq!(sender.len(), 1);
        assert!(!sender.ended(0, StreamEnd::Broken, [2; 16]).1);
    }

    /// It asked for streams on a link of `macula`, where a burst then lost its link because it had used all.
    #[test]
    fn a_session_that_no_link_carries_needs_no_streams() {
        let (now, mut sender) = (Instant::now(), sender(false));
        assert_eq!(sender.missing(), None, "there was no link yet");
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        sender.take([2; 16]);
        assert_eq!(sender.missing(), None, "another dialect carries its messages");
        sender.attach([3; 16], now);
        assert_eq!(sender.missing(), Some(0));
        sender.detach(now);
        assert_eq!(sender.missing(), None, "the link is gone");
    }

    #[test]
    fn a_link_of_macula_gives_everything_back_and_one_of_macula_peer_1_carries_the_session_on() {
        let (now, mut sender) = (Instant::now(), sender(false));
        sender.push(envelope(10));
        assert_eq!(sender.link(Dialect::MaculaPeer1, [1; 16], now).owed.len(), 0);
        assert_eq!((sender.missing(), sender.len()), (Some(0), 1));
        assert_eq!(sender.link(Dialect::Macula, [2; 16], now).owed.len(), 1);
        assert_eq!((sender.missing(), sender.len()), (None, 0));
    }

    #[test]
    fn a_message_without_a_deadline_is_owed_for_a_minute_after_its_link_died() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        assert_eq!(sender.expire(now + 2 * OWED_WITHOUT_DEADLINE).0.len(), 0, "there is a link");
        sender.detach(now);
        let (expired, next) = sender.expire(now);
        assert_eq!((expired.len(), next), (0, Some(now + OWED_WITHOUT_DEADLINE)));
        assert_eq!(sender.expire(now + OWED_WITHOUT_DEADLINE).0.len(), 1);
    }

    #[test]
    fn the_receiver_is_told_to_keep_the_session_for_a_message_that_is_owed_for_longer() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        for deadline in [KEEP, 2 * KEEP, 3 * KEEP] {
            sender.push(Envelope { size: 10, deadline: Some(now + deadline) });
        }
        let keeps: Vec<_> = std::iter::from_fn(|| sender.write(0, now).map(|write| write.keep)).collect();
        assert_eq!(keeps, [None, Some(4 * KEEP.as_secs() as u32), None]);
    }

    #[test]
    fn messages_of_64_kib_and_more_are_numbered_apart() {
        let (now, mut sender) = (Instant::now(), sender(false));
        assert_eq!([10, (64 << 10) - 1, 64 << 10].map(|size| sender.push(envelope(size))), [0, 0, 1]);
        assert_eq!([0, 1].map(|channel| sender.unwritten(channel)), [2, 1]);
        assert_eq!((sender.len(), sender.messages().count()), (3, 3));
        assert!(sender.owes(0) && sender.owes(1) && !sender.is_empty());
        linked(&mut sender, 1, now);
        assert_eq!(sender.write(1, now).and_then(|write| write.number), Some(0));
        assert_eq!((sender.unwritten(0), sender.unwritten(1)), (2, 0));
        assert_eq!(sender.expected(1, 1).acknowledged.len(), 1);
        assert!(!sender.owes(1) && !sender.is_empty(), "the other channel still owes something");
    }

    #[test]
    fn the_oldest_message_is_the_first_written_of_both_channels() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        let later = now + Duration::from_secs(1);
        sender.push(envelope(10));
        sender.push(envelope(LARGE_MESSAGE));
        assert_eq!(sender.oldest(), None, "nothing was written");
        sender.write(1, now);
        sender.write(0, later);
        assert_eq!(sender.oldest(), Some(now));
        sender.expected(1, 1);
        assert_eq!(sender.oldest(), Some(later));
    }

    #[test]
    fn a_receiver_that_acknowledged_nothing_is_not_sent_the_same_session_again() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.greeting(0, false, RUN, 0, now);
        assert_eq!(linked(&mut sender, 2, now), [[2; 16]; 2], "its greeting acknowledged nothing");
        sender.expected(0, 0);
        assert_eq!(linked(&mut sender, 3, now), [[3; 16]; 2], "neither did its word on the stream");
        sender.push(envelope(2 * LITTLE));
        written(&mut sender, now);
        linked(&mut sender, 4, now);
        assert_eq!(sender.greeting(0, true, RUN, 1, now).acknowledged.len(), 1);
        assert_eq!(linked(&mut sender, 5, now), [[3; 16]; 2], "its greeting acknowledged a message");
    }

    #[test]
    fn nothing_is_repeated_before_the_receivers_word_where_nothing_may_arrive_twice() {
        let (now, mut sender) = (Instant::now(), sender(true));
        assert!(!sender.has_stream(0) && !sender.is_resumed(0));
        linked(&mut sender, 1, now);
        assert!(sender.has_stream(0) && sender.is_resumed(0), "nothing was written before");
        sender.push(envelope(10));
        assert_eq!(written(&mut sender, now), [Some(0)]);
        linked(&mut sender, 2, now);
        assert!(sender.has_stream(0) && !sender.is_resumed(0));
        assert_eq!(written(&mut sender, now), []);
        assert_eq!(sender.greeting(0, true, RUN, 0, now).lost.len(), 0, "the receiver knows the session");
        assert!(sender.is_resumed(0));
        assert_eq!(written(&mut sender, now), [Some(0)]);
        sender.detach(now);
        assert!(!sender.has_stream(0));
    }

    #[test]
    fn a_receiver_that_may_have_forgotten_an_old_message_is_asked_first() {
        for (greeted, after, again) in
            [(false, KEEP - MS, vec![Some(0)]), (false, KEEP, vec![]), (true, KEEP, vec![Some(0)])]
        {
            let (now, mut sender) = (Instant::now(), sender(false));
            linked(&mut sender, 1, now);
            if greeted {
                sender.greeting(0, false, RUN, 0, now);
            }
            sender.push(envelope(10));
            written(&mut sender, now);
            linked(&mut sender, 2, now + after);
            assert_eq!(written(&mut sender, now + after), again, "greeted: {greeted}, {after:?}");
        }
    }

    #[test]
    fn an_old_message_to_a_receiver_that_was_never_met_is_forgotten_unless_the_receiver_knows_the_session() {
        // Whether the receiver was met, when it greets, and how many messages are forgotten.
        for (met, after, forgotten) in [(false, KEEP - MS, 0), (false, KEEP, 1), (true, KEEP, 0)] {
            let (now, mut sender) = (Instant::now(), sender(false));
            linked(&mut sender, 1, now);
            if met {
                sender.greeting(0, false, RUN, 0, now);
            }
            sender.push(envelope(2 * LITTLE));
            written(&mut sender, now);
            linked(&mut sender, 2, now + after);
            let settled = sender.greeting(0, false, [8; 8], 0, now + after);
            assert_eq!(settled.forgotten.len(), forgotten, "met: {met}, {after:?}");
            assert_eq!(written(&mut sender, now + after).len(), 1 - forgotten, "the rest is written again");
        }
    }

    #[test]
    fn a_receiver_that_was_not_asked_makes_no_message_forgotten() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        written(&mut sender, now);
        linked(&mut sender, 2, now + KEEP - MS);
        assert_eq!(sender.greeting(0, false, RUN, 0, now + KEEP).forgotten.len(), 0);
        assert_eq!(written(&mut sender, now + KEEP), [Some(0)]);
    }

    #[test]
    fn a_message_that_stalls_is_written_again_and_given_back_the_second_time() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        for rejected in [0, 1] {
            assert_eq!(written(&mut sender, now), [Some(0)]);
            sender.greeting(0, true, RUN, 0, now);
            let (settled, goes_on) = sender.ended(0, StreamEnd::Rejected(Rejection::TooSlow), [2; 16]);
            assert!(goes_on);
            assert_eq!(settled.rejected.len(), rejected);
            assert_eq!(sender.missing(), Some(0));
            sender.open(0, now);
        }
        sender.greeting(0, true, RUN, 0, now);
        let (_, goes_on) = sender.ended(0, StreamEnd::Rejected(Rejection::TooLarge), [2; 16]);
        assert!(!goes_on, "no message was on its way");
    }

    #[test]
    fn a_refused_message_is_given_back_after_all_before_it_were_acknowledged() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        for _ in 0..3 {
            sender.push(envelope(10));
        }
        written(&mut sender, now);
        let settled = sender.refused(0, 1, Rejection::TooLarge);
        assert_eq!((settled.acknowledged.len(), settled.rejected.len(), sender.len()), (1, 1, 1));
    }

    #[test]
    fn an_expired_message_that_is_partly_written_is_given_back_and_its_stream_replaced() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(until(now + MS));
        written(&mut sender, now);
        assert!(sender.abandon(0, now).is_none(), "its deadline is not over");
        assert!(sender.has_stream(0));
        assert!(sender.abandon(0, now + MS).is_some());
        assert_eq!(sender.missing(), Some(0));
    }

    #[test]
    fn a_message_expires_at_its_deadline_unless_it_is_on_its_way() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        for deadline in [3, 1, 2] {
            sender.push(until(now + deadline * MS));
        }
        assert_eq!(sender.write(0, now).map(|write| write.number), Some(Some(0)));
        let (expired, next) = sender.expire(now + MS);
        assert_eq!((expired.len(), next), (1, Some(now + 2 * MS)));
        let (expired, next) = sender.expire(now + 3 * MS);
        assert_eq!((expired.len(), next), (1, None), "a deadline that has passed is no time to look again");
        assert_eq!(sender.len(), 1, "the first one is on its way");
    }

    #[test]
    fn a_message_without_a_deadline_does_not_expire_while_its_session_has_all_its_streams() {
        let (now, mut sender) = (Instant::now(), sender(false));
        linked(&mut sender, 1, now);
        sender.push(envelope(10));
        sender.detach(now);
        sender.detach(now + MS);
        assert_eq!(sender.expire(now).1, Some(now + OWED_WITHOUT_DEADLINE), "counted from when the link died");
        sender.attach([2; 16], now + MS);
        sender.open(0, now + MS);
        assert_eq!(sender.expire(now).1, Some(now + OWED_WITHOUT_DEADLINE), "it has only one of its streams");
        sender.open(1, now + MS);
        assert_eq!(sender.expire(now).1, None);
    }

    #[test]
    fn messages_that_may_not_go_over_the_next_link_are_given_back() {
        let (now, mut sender) = (Instant::now(), sender(false));
        for size in [1, 2, LARGE_MESSAGE] {
            sender.push(envelope(size));
        }
        sender.attach([1; 16], now);
        let refused = sender.refuse(|message| message.size != 1);
        assert_eq!(refused.iter().map(|message| message.size).collect::<Vec<_>>(), [2, LARGE_MESSAGE]);
        assert_eq!(sender.len(), 1);
    }

    #[test]
    fn a_session_that_ends_gives_everything_back_and_only_unwritten_messages_may_then_be_sent_again() {
        for (at_most_once, owed, lost) in [(true, vec![2], vec![1]), (false, vec![1, 2], vec![])] {
            let (now, mut sender) = (Instant::now(), sender(at_most_once));
            linked(&mut sender, 1, now);
            sender.push(envelope(1));
            written(&mut sender, now);
            sender.push(envelope(2));
            let taken = sender.take([2; 16]);
            let sizes = |messages: &[Envelope]| messages.iter().map(|message| message.size).collect::<Vec<_>>();
            assert_eq!((sizes(&taken.owed), sizes(&taken.lost)), (owed, lost));
            assert!(sender.is_empty());
            sender.attach([3; 16], now);
            sender.push(envelope(1));
            sender.open(0, now);
            assert_eq!(written(&mut sender, now), [Some(0)], "a new session");
        }
    }
}
