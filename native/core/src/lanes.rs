//! Which stream a message to a 0.14.3 gateway takes.
//!
//! Every new stream costs such a gateway about 2 KB for ever, so lone messages share a few streams, the lanes. It takes
//! each receive chunk for exactly one frame, so a lane may carry a frame only when the one before has long been read:
//! its arrival is proven, and it has been quiet for a round trip and the longest delay of an acknowledgement, or, after the
//! first frame, for longer than the gateway may take to look at a new stream. Messages in a burst take a fresh stream each.

use std::time::{Duration, Instant};

/// Frames from this size on leave after all smaller ones. A 0.14.3 gateway reads none larger than this.
pub const LARGE_FRAME: usize = 64 << 10;

/// Messages closer together than this are a burst. A real gateway merged 0.2 % of messages that were 2 ms apart on one
/// stream, and none at 5 ms.
const BURST_GAP: Duration = Duration::from_millis(3);

/// The longest delay of an acknowledgement (RFC 9000, `max_ack_delay`, default 25 ms).
const ACK_DELAY: Duration = Duration::from_millis(25);

/// How long a fresh lane rests after its first message. The gateway has to look at a new stream before it takes each
/// chunk separately, and nothing shows when it has. One process does this and the handshakes, and a client that
/// vanishes during one blocks it for 5 s.
const FIRST_REST: Duration = Duration::from_secs(6);

/// Lanes per link: a message every 10 ms over a round trip of 100 ms, with the time it takes to prove its arrival,
/// needs 26.
const MAX_LANES: usize = 32;

/// A frame must come in one chunk, that is in one packet: 1,200 bytes at the least, less headers.
const MAX_FRAME: usize = 1000;

/// Streams of type `S` that are kept for lone messages.
#[derive(Debug)]
pub struct Lanes<S> {
    lanes: Vec<Lane<S>>,
    last_message: Option<Instant>,
}

#[derive(Debug)]
struct Lane<S> {
    stream: S,
    written: Instant,
    fresh: bool,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// A fresh stream, finished after the message.
    Once,
    /// A fresh stream that becomes a lane.
    Open,
    /// The lane with this index.
    Lane(usize),
}

impl<S> Default for Lanes<S> {
    fn default() -> Self {
        Self { lanes: Vec::new(), last_message: None }
    }
}

impl<S> Lanes<S> {
    /// Chooses for a message of `size` bytes. `arrived` tells whether a lane's last message is proven to have arrived.
    pub fn choose(
        &mut self,
        now: Instant,
        size: usize,
        round_trip: impl FnOnce() -> Duration,
        mut arrived: impl FnMut(&S) -> bool,
    ) -> Choice {
        let alone = self.last_message.is_none_or(|last| now.saturating_duration_since(last) >= BURST_GAP);
        self.last_message = Some(now);
        if !alone || size > MAX_FRAME {
            return Choice::Once;
        }
        let quiet = if self.lanes.is_empty() { Duration::ZERO } else { round_trip() + ACK_DELAY };
        let rest = |lane: &Lane<S>| if lane.fresh { quiet.max(FIRST_REST) } else { quiet };
        let ready = |lane: &Lane<S>| now.saturating_duration_since(lane.written) >= rest(lane);
        // The first that will do, so that lanes beyond the need are left alone.
        match self.lanes.iter().position(|lane| ready(lane) && arrived(&lane.stream)) {
            Some(index) => Choice::Lane(index),
            None if self.lanes.len() < MAX_LANES => Choice::Open,
            None => Choice::Once,
        }
    }

    /// The stream of a chosen lane, which now takes a message.
    pub fn take(&mut self, index: usize, now: Instant) -> &mut S {
        let lane = &mut self.lanes[index];
        (lane.written, lane.fresh) = (now, false);
        &mut lane.stream
    }

    /// A fresh stream took a frame and stays.
    pub fn opened(&mut self, stream: S, now: Instant) {
        self.lanes.push(Lane { stream, written: now, fresh: true });
    }

    /// Takes a lane out of use.
    pub fn remove(&mut self, is_it: impl Fn(&S) -> bool) -> Option<S> {
        let index = self.lanes.iter().position(|lane| is_it(&lane.stream))?;
        Some(self.lanes.swap_remove(index).stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came of some messages.
    #[derive(Default)]
    struct Run {
        opened: usize,
        /// Messages on a stream of their own, and when the last of them was.
        once: usize,
        last_once: u64,
        /// The shortest time between two messages on a lane, and between the first two.
        shortest: Option<u64>,
        shortest_first: Option<u64>,
    }

    /// Sends a message at each of `times` (ms); an earlier one has arrived `arrival` ms after it was written.
    fn run(times: impl Iterator<Item = u64>, round_trip: u64, arrival: u64) -> Run {
        let start = Instant::now();
        let mut lanes = Lanes::default();
        let mut run = Run::default();
        let earliest = |a: Option<u64>, b| Some(a.map_or(b, |a| a.min(b)));
        for ms in times {
            let now = start + Duration::from_millis(ms);
            let arrived = |&(written, _): &(u64, bool)| ms >= written + arrival;
            match lanes.choose(now, 128, || Duration::from_millis(round_trip), arrived) {
                Choice::Once => (run.once, run.last_once) = (run.once + 1, ms),
                Choice::Open => {
                    lanes.opened((ms, true), now);
                    run.opened += 1;
                }
                Choice::Lane(index) => {
                    let (written, first) = std::mem::replace(lanes.take(index, now), (ms, false));
                    run.shortest = earliest(run.shortest, ms - written);
                    if first {
                        run.shortest_first = earliest(run.shortest_first, ms - written);
                    }
                }
            }
        }
        run
    }

    #[test]
    fn lone_messages_share_a_few_lanes_and_never_meet_on_one() {
        let run = run((0..3000).map(|n| n * 10), 1, 27);
        assert!(run.opened == MAX_LANES && run.last_once < 6000, "{} {}", run.opened, run.last_once);
        assert!(run.shortest.is_some_and(|gap| gap >= 26), "{:?}", run.shortest);
    }

    /// The gateway may not have looked at the stream yet, and would take two messages for one.
    #[test]
    fn a_fresh_lane_rests() {
        assert_eq!(run((0..3000).map(|n| n * 10), 1, 27).shortest_first, Some(6000));
        // Few lone messages do not wait for it on streams of their own.
        let seldom = run((0..100).map(|n| n * 1000), 1, 27);
        assert_eq!((seldom.opened, seldom.once), (6, 0));
    }

    #[test]
    fn a_long_path_has_enough_lanes() {
        let run = run((0..3000).map(|n| n * 10), 100, 250);
        assert!(run.last_once < 6000, "{}", run.last_once);
    }

    #[test]
    fn a_burst_takes_fresh_streams() {
        let run = run((0..500).map(|_| 7), 1, 27);
        assert_eq!((run.opened, run.once), (1, 499));
    }

    #[test]
    fn a_lane_whose_last_message_is_not_proven_is_not_used() {
        let run = run((0..100).map(|n| n * 1000), 1, u64::MAX / 2000);
        assert_eq!((run.opened, run.once, run.shortest), (MAX_LANES, 100 - MAX_LANES, None));
    }
}
