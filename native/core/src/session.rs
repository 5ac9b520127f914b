//! The numbering of messages: what makes delivery in order and exactly once across links (docs/protocol.md).

use std::collections::VecDeque;
use std::time::Instant;

/// The sender's side of one channel.
///
/// Messages are numbered when they are first written and kept until they are acknowledged. The written ones come first.
#[derive(Debug)]
pub struct Outgoing<M> {
    next: u64,
    owed: VecDeque<Owed<M>>,
    /// How many of `owed` are written to the present stream.
    written: usize,
    /// The number that the receiver gives to the next message on the present stream, once it was told one.
    announced: Option<u64>,
    /// The first number that no stream before the present one has carried.
    fresh: u64,
}

#[derive(Debug)]
struct Owed<M> {
    message: M,
    /// Its number, and when it was first written, to whichever stream.
    written: Option<(u64, Instant)>,
    /// The receiver has given up waiting for the rest of it once.
    stalled: bool,
}

/// What to write next.
#[derive(Debug, PartialEq, Eq)]
pub struct Next<'a, M> {
    pub number: u64,
    /// The receiver would give it another number.
    pub announce: bool,
    pub message: &'a M,
}

impl<M> Default for Outgoing<M> {
    fn default() -> Self {
        Self { next: 0, owed: VecDeque::new(), written: 0, announced: None, fresh: 0 }
    }
}

impl<M> Outgoing<M> {
    /// Takes a message over, behind all others.
    pub fn push(&mut self, message: M) {
        self.owed.push_back(Owed { message, written: None, stalled: false });
    }

    /// The next message to write, which counts as written from here on.
    pub fn write(&mut self, now: Instant) -> Option<Next<'_, M>> {
        let owed = self.owed.get_mut(self.written)?;
        self.written += 1;
        let (number, _) = *owed.written.get_or_insert((self.next, now));
        self.next = self.next.max(number + 1);
        let announce = self.announced != Some(number);
        self.announced = Some(number + 1);
        Some(Next { number, announce, message: &owed.message })
    }

    /// Everything below `expected` has arrived. Gives back what that lets go of.
    pub fn acknowledge(&mut self, expected: u64) -> impl Iterator<Item = M> {
        // A receiver cannot have what was never written.
        let arrived = self.owed.iter().take(self.written).take_while(|owed| owed.is_below(expected)).count();
        self.written -= arrived;
        self.owed.drain(..arrived).map(|owed| owed.message)
    }

    /// The present stream is gone: everything is written again, on the next one.
    pub fn rewind(&mut self) {
        self.written = 0;
        self.announced = None;
        self.fresh = self.next;
    }

    /// The receiver has forgotten the session and takes nothing from the present stream. Gives back what was written
    /// before, and so may have arrived. The rest counts as never written, and numbers start from 0 again.
    pub fn forgotten(&mut self) -> Vec<M> {
        let before = |owed: &Owed<M>| owed.is_below(self.fresh);
        let arrived = self.owed.iter().take_while(|owed| before(owed)).count();
        let may_have_arrived = self.owed.drain(..arrived).map(|owed| owed.message).collect();
        self.owed.iter_mut().for_each(|owed| owed.written = None);
        (self.next, self.written, self.announced, self.fresh) = (0, 0, None, 0);
        may_have_arrived
    }

    /// Whether the receiver may have something of what comes next: it should be asked first.
    pub fn may_have_arrived(&self) -> bool {
        self.owed.front().is_some_and(|owed| owed.written.is_some())
    }

    /// The receiver's first word on a new stream: nothing below `expected` need be written.
    pub fn resume(&mut self, expected: u64) -> impl Iterator<Item = M> {
        let arrived = self.owed.iter().take_while(|owed| owed.is_below(expected)).count();
        self.written = self.written.saturating_sub(arrived);
        self.owed.drain(..arrived).map(|owed| owed.message)
    }

    /// Gives back what `gone` says is no longer owed. `gone` gets each message, and when it was first written.
    pub fn give_up(&mut self, mut gone: impl FnMut(&M, Option<Instant>) -> bool) -> Vec<M> {
        let mut given_up = Vec::new();
        let mut kept = VecDeque::with_capacity(self.owed.len());
        for (index, owed) in std::mem::take(&mut self.owed).into_iter().enumerate() {
            // What is written to the present stream is on its way, and no longer ours to take back.
            if index >= self.written && gone(&owed.message, owed.written.map(|(_, at)| at)) {
                given_up.push(owed.message);
            } else {
                kept.push_back(owed);
            }
        }
        self.owed = kept;
        given_up
    }

    /// The receiver does not take the message that it expects next, if that is on its way.
    pub fn reject(&mut self) -> Option<M> {
        self.written = self.written.checked_sub(1)?;
        self.owed.pop_front().map(|owed| owed.message)
    }

    /// The receiver does not take the message of this number, below which everything is acknowledged, and goes on behind
    /// it.
    pub fn refused(&mut self, number: u64) -> Option<M> {
        let (first, _) = self.owed.front()?.written?;
        if first == number { self.reject() } else { None }
    }

    /// The receiver has given up waiting for the rest of the message that it expects next. A path or a host may have
    /// stalled for so long, so the message gets a second try. Gives it back when that has ended the same way.
    pub fn stalled(&mut self) -> Option<M> {
        let first = self.owed.front_mut().filter(|_| self.written > 0)?;
        if std::mem::replace(&mut first.stalled, true) { self.reject() } else { None }
    }

    /// Gives back a message whose time is `over`, if it is the only one on its way.
    pub fn abandon(&mut self, over: impl FnOnce(&M) -> bool) -> Option<M> {
        let only = self.owed.front().filter(|_| self.written == 1)?;
        if over(&only.message) { self.reject() } else { None }
    }

    /// Ends it; gives back everything that is owed.
    pub fn take(&mut self) -> Vec<M> {
        std::mem::take(self).owed.into_iter().map(|owed| owed.message).collect()
    }

    /// Numbers from 0 again, for a receiver that knows of nothing. To be called while nothing of what is owed was written.
    pub fn renumber(&mut self) {
        (self.next, self.fresh) = (0, 0);
    }

    /// Whether something is written to the present stream and not acknowledged.
    pub fn is_under_way(&self) -> bool {
        self.written > 0
    }

    /// Everything that is owed.
    pub fn messages(&self) -> impl Iterator<Item = &M> {
        self.owed.iter().map(|owed| &owed.message)
    }

    pub fn len(&self) -> usize {
        self.owed.len()
    }

    pub fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    /// How many are not written to the present stream.
    pub fn unwritten(&self) -> usize {
        self.owed.len() - self.written
    }

    /// Of all that is owed, when the oldest was first written.
    pub fn oldest(&self) -> Option<Instant> {
        self.owed.front().and_then(|owed| owed.written).map(|(_, at)| at)
    }
}

impl<M> Owed<M> {
    fn is_below(&self, expected: u64) -> bool {
        self.written.is_some_and(|(number, _)| number < expected)
    }
}

/// The receiver's side of one channel.
#[derive(Debug, Default)]
pub struct Incoming {
    expected: u64,
    /// The lowest and the highest number that was refused, as long as the sender may not know.
    refused: Option<(u64, u64)>,
}

/// What to do with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Hand it over. If that fails, call [`Incoming::refuse`].
    New,
    /// It was handed over.
    Repeated,
    /// It was handed over or refused. A handler that cannot take it now could not take it then either: refuse it again.
    Doubtful,
}

impl Incoming {
    /// What a message of this number would be.
    pub fn arrival(&self, number: u64) -> Arrival {
        match self.refused {
            // The highest number would have no successor, so no message has it.
            _ if number >= self.expected && number < u64::MAX => Arrival::New,
            Some((lowest, highest)) if (lowest..=highest).contains(&number) => Arrival::Doubtful,
            _ => Arrival::Repeated,
        }
    }

    /// A message of this number has come.
    pub fn accept(&mut self, number: u64) -> Arrival {
        let arrival = self.arrival(number);
        if arrival == Arrival::New {
            self.expected = number + 1;
        }
        arrival
    }

    /// The message of this number, the last one that was new, cannot be taken.
    pub fn refuse(&mut self, number: u64) {
        let (lowest, _) = *self.refused.get_or_insert((number, number));
        self.refused = Some((lowest, number));
    }

    /// A stream begins with this number: the sender knows what became of everything below.
    pub fn begin(&mut self, number: u64) {
        self.refused = self.refused.filter(|(_, highest)| *highest >= number);
        if let Some((lowest, _)) = &mut self.refused {
            *lowest = number.max(*lowest);
        }
    }

    /// Everything below has been handed over or given up, or was refused, which has been said on this stream. `next` is
    /// the number that comes next on it, 0 if it has not begun.
    ///
    /// What was refused on a stream that ended may be unknown to the sender. It is expected until it comes again, and is
    /// refused again.
    pub fn expected(&self, next: u64) -> u64 {
        match self.refused {
            Some((lowest, highest)) if next <= highest => self.expected.min(next.max(lowest)),
            _ => self.expected,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A stream of what was written, as the receiver sees it.
    #[derive(Default)]
    struct Stream {
        sent: VecDeque<(Option<u64>, u64)>,
        counter: u64,
        begun: bool,
        said: VecDeque<Word>,
    }

    enum Word {
        Expected(u64),
        Refused(u64),
    }

    /// Which messages the receiver cannot take.
    fn is_refused(message: u64) -> bool {
        message % 7 == 3
    }

    struct Run {
        random: fastrand::Rng,
        outgoing: Outgoing<u64>,
        incoming: Incoming,
        /// The present stream last; older ones still carry what was sent over them.
        streams: Vec<Stream>,
        arrived: Vec<u64>,
        given_up: Vec<u64>,
        refused: Vec<u64>,
        let_go: usize,
    }

    impl Run {
        fn step(&mut self) {
            match self.random.u8(0..100) {
                0..30 => self.write(),
                30..60 => self.receive(),
                60..84 => self.hear(),
                84..90 => self.reconnect(),
                90..92 => {
                    let random = &mut self.random;
                    let gone = self.outgoing.give_up(|_, written| written.is_none() && random.u8(0..10) == 0);
                    self.given_up.extend(gone);
                }
                92..94 => {
                    // The first word on a stream that did not wait for it.
                    let expected = self.random.u64(0..=self.incoming.expected(0));
                    self.let_go += self.outgoing.resume(expected).count();
                }
                _ => {}
            }
        }

        fn write(&mut self) {
            if let Some(Next { number, announce, message }) = self.outgoing.write(Instant::now()) {
                self.streams.last_mut().unwrap().sent.push_back((announce.then_some(number), *message));
            }
        }

        /// Streams are read side by side.
        fn receive(&mut self) {
            let index = self.random.usize(0..self.streams.len());
            let stream = &mut self.streams[index];
            if let Some((announce, message)) = stream.sent.pop_front() {
                stream.counter = announce.unwrap_or(stream.counter);
                if announce.is_some() && !std::mem::replace(&mut stream.begun, true) {
                    self.incoming.begin(stream.counter);
                }
                let refuses = is_refused(message);
                match self.incoming.accept(stream.counter) {
                    Arrival::New if refuses => {
                        self.incoming.refuse(stream.counter);
                        stream.said.push_back(Word::Refused(stream.counter));
                    }
                    Arrival::New => self.arrived.push(message),
                    Arrival::Doubtful if refuses => stream.said.push_back(Word::Refused(stream.counter)),
                    Arrival::Doubtful | Arrival::Repeated => {}
                }
                stream.counter += 1;
                stream.said.push_back(Word::Expected(self.incoming.expected(stream.counter)));
            }
        }

        /// What the receiver has said on the present stream is heard in order.
        fn hear(&mut self) {
            match self.streams.last_mut().unwrap().said.pop_front() {
                Some(Word::Expected(expected)) => self.let_go += self.outgoing.acknowledge(expected).count(),
                Some(Word::Refused(number)) => {
                    self.let_go += self.outgoing.acknowledge(number).count();
                    self.refused.extend(self.outgoing.refused(number));
                }
                None => {}
            }
        }

        fn reconnect(&mut self) {
            let old = self.streams.last_mut().unwrap();
            if self.random.bool() {
                // What had not arrived is lost with the link; otherwise it still comes, late.
                old.sent.clear();
            }
            self.streams.push(Stream::default());
            self.outgoing.rewind();
            // A sender that owes little does not ask. The receiver says it nevertheless, later.
            if self.outgoing.may_have_arrived() && self.random.bool() {
                self.let_go += self.outgoing.resume(self.incoming.expected(0)).count();
            }
        }
    }

    #[test]
    fn every_message_arrives_once_and_in_order_over_any_sequence_of_links() {
        let alone: Option<u64> = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        for seed in alone.map_or(0..2000, |seed| seed..seed + 1) {
            let mut run = Run {
                random: fastrand::Rng::with_seed(seed),
                outgoing: Outgoing::default(),
                incoming: Incoming::default(),
                streams: vec![Stream::default()],
                arrived: Vec::new(),
                given_up: Vec::new(),
                refused: Vec::new(),
                let_go: 0,
            };
            let total = 200;
            for message in 0..total {
                run.outgoing.push(message);
                for _ in 0..run.random.u8(0..8) {
                    run.step();
                }
            }
            run.reconnect();
            while run.outgoing.unwritten() > 0 {
                run.write();
            }
            while run.streams.iter().any(|stream| !stream.sent.is_empty()) {
                run.receive();
            }
            while !run.streams.last().unwrap().said.is_empty() {
                run.hear();
            }
            assert!(run.outgoing.is_empty(), "SEED={seed}: something is owed for ever");
            let (refused, expected): (Vec<u64>, Vec<u64>) =
                (0..total).filter(|n| !run.given_up.contains(n)).partition(|&n| is_refused(n));
            assert_eq!(run.arrived, expected, "SEED={seed}");
            assert_eq!(run.refused, refused, "SEED={seed}: what was refused is known to be, once and in order");
            assert_eq!(run.let_go, expected.len(), "SEED={seed}: what arrived is let go of once");
        }
    }

    #[test]
    fn a_receiver_that_claims_too_much_gets_nothing_dropped_that_was_not_written() {
        let mut outgoing = Outgoing::default();
        outgoing.push('a');
        outgoing.push('b');
        outgoing.write(Instant::now());
        assert_eq!(outgoing.acknowledge(u64::MAX).collect::<Vec<_>>(), ['a']);
        assert_eq!(outgoing.resume(u64::MAX).count(), 0);
        assert_eq!(outgoing.write(Instant::now()).unwrap().message, &'b');
    }

    #[test]
    fn no_message_has_the_highest_number() {
        let mut incoming = Incoming::default();
        assert_eq!(incoming.accept(u64::MAX - 1), Arrival::New);
        assert_eq!(incoming.accept(u64::MAX), Arrival::Repeated);
        assert_eq!(incoming.accept(0), Arrival::Repeated, "it does not begin again");
        assert_eq!(incoming.expected(u64::MAX), u64::MAX);
    }

    #[test]
    fn messages_are_kept_in_order_until_they_are_acknowledged_or_taken() {
        let mut outgoing = Outgoing::default();
        let (now, later) = (Instant::now(), Instant::now() + std::time::Duration::from_secs(1));
        assert_eq!((outgoing.len(), outgoing.oldest(), outgoing.is_under_way()), (0, None, false));
        ['a', 'b', 'c'].into_iter().for_each(|message| outgoing.push(message));
        assert_eq!((outgoing.len(), outgoing.oldest(), outgoing.is_under_way()), (3, None, false));
        outgoing.write(now);
        outgoing.write(later);
        assert!(!outgoing.is_empty());
        assert_eq!((outgoing.len(), outgoing.oldest(), outgoing.is_under_way()), (3, Some(now), true));
        outgoing.acknowledge(1).for_each(drop);
        assert_eq!((outgoing.len(), outgoing.oldest(), outgoing.unwritten()), (2, Some(later), 1));
        outgoing.rewind();
        assert_eq!((outgoing.oldest(), outgoing.is_under_way()), (Some(later), false), "it was written before");
        assert_eq!(outgoing.messages().collect::<Vec<_>>(), [&'b', &'c']);
        assert_eq!(outgoing.take(), ['b', 'c']);
        assert!(outgoing.is_empty());
    }

    #[test]
    fn a_session_that_is_numbered_again_starts_from_0_and_nothing_in_it_may_have_arrived() {
        let mut outgoing = Outgoing::default();
        outgoing.push('a');
        outgoing.write(Instant::now());
        outgoing.acknowledge(1).for_each(drop);
        outgoing.rewind();
        outgoing.renumber();
        outgoing.push('b');
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 0, announce: true, message: &'b' }));
        assert_eq!(outgoing.forgotten(), []);
    }

    #[test]
    fn only_the_first_message_on_its_way_can_be_refused() {
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.refused(0), None);
        outgoing.push('a');
        outgoing.push('b');
        assert_eq!(outgoing.refused(0), None, "it was never written");
        outgoing.write(Instant::now());
        outgoing.rewind();
        assert_eq!(outgoing.refused(0), None, "it is not written to this stream");
        outgoing.write(Instant::now());
        outgoing.write(Instant::now());
        assert_eq!(outgoing.refused(1), None, "another message comes first");
        assert_eq!(outgoing.refused(0), Some('a'));
        assert_eq!(outgoing.refused(1), Some('b'));
    }

    #[test]
    fn a_message_that_may_have_arrived_is_refused_again_until_the_sender_knows() {
        let mut incoming = Incoming::default();
        for number in 0..4 {
            assert_eq!(incoming.accept(number), Arrival::New);
        }
        incoming.refuse(1);
        incoming.refuse(3);
        assert_eq!([0, 1, 2, 3].map(|number| incoming.arrival(number)), {
            use Arrival::{Doubtful, Repeated};
            [Repeated, Doubtful, Doubtful, Doubtful]
        });
        assert_eq!([0, 1, 2, 3, 4].map(|next| incoming.expected(next)), [1, 1, 2, 3, 4]);
        incoming.accept(4);
        assert_eq!(incoming.expected(4), 5, "all that was refused has been said on this stream");
        incoming.begin(2);
        assert_eq!([1, 2, 3].map(|number| incoming.arrival(number)), {
            use Arrival::{Doubtful, Repeated};
            [Repeated, Doubtful, Doubtful]
        });
        incoming.begin(4);
        assert_eq!([2, 3].map(|number| incoming.arrival(number)), [Arrival::Repeated; 2]);
        assert_eq!(incoming.expected(0), 5);
    }

    #[test]
    fn a_new_stream_goes_on_where_the_receiver_says() {
        let mut outgoing = Outgoing::default();
        ['a', 'b', 'c'].into_iter().for_each(|message| outgoing.push(message));
        assert!(!outgoing.may_have_arrived());
        outgoing.write(Instant::now());
        outgoing.write(Instant::now());
        outgoing.rewind();
        assert!(outgoing.may_have_arrived());
        assert_eq!(outgoing.resume(1).collect::<Vec<_>>(), ['a']);
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 1, announce: true, message: &'b' }));
        // It may say so after something was written.
        outgoing.write(Instant::now());
        assert_eq!(outgoing.resume(2).collect::<Vec<_>>(), ['b']);
        assert_eq!((outgoing.unwritten(), outgoing.is_under_way()), (0, true));
    }

    #[test]
    fn messages_on_their_way_are_not_given_up() {
        let mut outgoing = Outgoing::default();
        outgoing.push(1);
        outgoing.push(2);
        outgoing.write(Instant::now());
        assert_eq!(outgoing.give_up(|_, _| true), [2]);
        outgoing.rewind();
        assert_eq!(outgoing.give_up(|_, written| written.is_some()), [1]);
    }

    #[test]
    fn messages_that_a_forgetful_receiver_may_have_are_given_back_and_the_rest_is_numbered_from_0() {
        let mut outgoing = Outgoing::default();
        ['a', 'b', 'c'].into_iter().for_each(|message| outgoing.push(message));
        outgoing.write(Instant::now());
        outgoing.write(Instant::now());
        outgoing.acknowledge(1).for_each(drop);
        outgoing.rewind();
        // Over a new stream: what may have arrived, and what was never written before.
        outgoing.write(Instant::now());
        outgoing.write(Instant::now());
        outgoing.push('d');
        assert_eq!(outgoing.forgotten(), ['b']);
        assert!(!outgoing.may_have_arrived());
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 0, announce: true, message: &'c' }));
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 1, announce: false, message: &'d' }));
    }

    #[test]
    fn a_message_that_was_never_written_takes_no_number() {
        let mut outgoing = Outgoing::default();
        outgoing.push('a');
        outgoing.push('b');
        assert_eq!(outgoing.give_up(|&message, _| message == 'a'), ['a']);
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 0, announce: true, message: &'b' }));
    }

    #[test]
    fn a_message_that_stalls_has_a_second_try_and_no_third() {
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.stalled(), None);
        outgoing.push('a');
        assert_eq!(outgoing.stalled(), None, "it was not on its way");
        outgoing.push('b');
        for given_up in [None, Some('a'), None, Some('b')] {
            outgoing.write(Instant::now());
            assert_eq!(outgoing.stalled(), given_up);
            outgoing.rewind();
        }
        assert!(outgoing.is_empty());
    }

    #[test]
    fn an_expired_message_is_abandoned_when_it_alone_is_on_its_way() {
        let mut outgoing = Outgoing::default();
        outgoing.push('a');
        outgoing.push('b');
        assert_eq!(outgoing.abandon(|_| true), None, "not on its way");
        outgoing.write(Instant::now());
        assert_eq!(outgoing.abandon(|_| false), None);
        outgoing.write(Instant::now());
        assert_eq!(outgoing.abandon(|_| true), None, "what is before it would be written again");
        outgoing.acknowledge(1).for_each(drop);
        assert_eq!(outgoing.abandon(|_| true), Some('b'));
        outgoing.rewind();
        outgoing.push('c');
        assert_eq!(outgoing.write(Instant::now()), Some(Next { number: 2, announce: true, message: &'c' }));
    }

    #[test]
    fn the_first_message_on_its_way_is_the_one_that_is_rejected() {
        let mut outgoing = Outgoing::default();
        outgoing.push('a');
        assert_eq!(outgoing.reject(), None);
        outgoing.push('b');
        outgoing.write(Instant::now());
        outgoing.write(Instant::now());
        outgoing.acknowledge(1).for_each(drop);
        assert_eq!(outgoing.reject(), Some('b'));
        assert_eq!((outgoing.unwritten(), outgoing.is_empty()), (0, true));
    }
}
