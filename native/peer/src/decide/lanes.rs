//! Which stream a message to a 0.14.3 gateway takes.
//!
//! Every new stream costs such a gateway about 2 KB for ever, so lone messages share a few streams, the lanes. It takes
//! each receive chunk for exactly one frame, so a lane may carry a frame only when the one before has long been read:
//! its arrival is proven, and it has been quiet for a round trip and the longest delay of an acknowledgement. Messages in
//! a burst take a fresh stream each.

use std::time::{Duration, Instant};

/// Messages closer together than this are a burst. A real gateway merged 0.2 % of messages that were 2 ms apart on one
/// stream, and none at 5 ms.
const BURST_GAP: Duration = Duration::from_millis(3);

/// The longest delay of an acknowledgement (RFC 9000, `max_ack_delay`, default 25 ms).
const ACK_DELAY: Duration = Duration::from_millis(25);

/// Lanes per link: a message every 10 ms over a round trip of 100 ms, with the time it takes to prove its arrival,
/// needs 26.
const MAX_LANES: usize = 32;

/// A frame must come in one chunk, that is in one packet: 1,200 bytes at the least, less headers.
const MAX_FRAME: usize = 1000;

/// Streams of type `S` that are kept for lone messages.
#[derive(Debug)]
pub(crate) struct Lanes<S> {
    lanes: Vec<Lane<S>>,
    last_message: Option<Instant>,
}

#[derive(Debug)]
struct Lane<S> {
    stream: S,
    written: Instant,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
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
    pub(crate) fn choose(
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
        let ready = |lane: &Lane<S>| now.saturating_duration_since(lane.written) >= quiet;
        // The first that will do, so that lanes beyond the need are left alone.
        match self.lanes.iter().position(|lane| ready(lane) && arrived(&lane.stream)) {
            Some(index) => Choice::Lane(index),
            None if self.lanes.len() < MAX_LANES => Choice::Open,
            None => Choice::Once,
        }
    }

    /// The stream of a chosen lane, which now takes a message.
    pub(crate) fn take(&mut self, index: usize, now: Instant) -> &mut S {
        self.lanes[index].written = now;
        &mut self.lanes[index].stream
    }

    /// A fresh stream took a frame and stays.
    pub(crate) fn opened(&mut self, stream: S, now: Instant) {
        self.lanes.push(Lane { stream, written: now });
    }

    /// Takes a lane out of use.
    pub(crate) fn remove(&mut self, is_it: impl Fn(&S) -> bool) -> Option<S> {
        let index = self.lanes.iter().position(|lane| is_it(&lane.stream))?;
        Some(self.lanes.swap_remove(index).stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a message at each of `times` (ms); an earlier one has arrived `arrival` ms after it was written. Returns
    /// lanes and single streams opened, and the shortest time between two messages on one lane.
    fn run(times: impl Iterator<Item = u64>, round_trip: u64, arrival: u64) -> (usize, usize, Option<u64>) {
        let start = Instant::now();
        let mut lanes = Lanes::default();
        let (mut opened, mut once, mut shortest) = (0, 0, None::<u64>);
        for ms in times {
            let now = start + Duration::from_millis(ms);
            let arrived = |written: &u64| ms >= written + arrival;
            match lanes.choose(now, 128, || Duration::from_millis(round_trip), arrived) {
                Choice::Once => once += 1,
                Choice::Open => {
                    lanes.opened(ms, now);
                    opened += 1;
                }
                Choice::Lane(index) => {
                    let gap = ms - std::mem::replace(lanes.take(index, now), ms);
                    shortest = Some(shortest.map_or(gap, |s| s.min(gap)));
                }
            }
        }
        (opened, once, shortest)
    }

    #[test]
    fn lone_messages_share_a_few_lanes_and_never_meet_on_one() {
        let (opened, once, shortest) = run((0..3000).map(|n| n * 10), 1, 27);
        assert!(opened < 6 && once == 0, "{opened} {once}");
        assert!(shortest.is_some_and(|gap| gap >= 26), "{shortest:?}");
    }

    #[test]
    fn a_long_path_needs_more_lanes_and_still_less_than_the_limit() {
        let (opened, once, _) = run((0..3000).map(|n| n * 10), 100, 250);
        assert!(opened <= 26 && once == 0, "{opened} {once}");
    }

    #[test]
    fn a_burst_takes_fresh_streams() {
        let (opened, once, _) = run((0..500).map(|_| 7), 1, 27);
        assert_eq!((opened, once), (1, 499));
    }

    #[test]
    fn a_lane_whose_last_message_is_not_proven_is_not_used() {
        let (opened, once, shortest) = run((0..100).map(|n| n * 1000), 1, u64::MAX / 2000);
        assert_eq!((opened, once, shortest), (MAX_LANES, 100 - MAX_LANES, None));
    }
}
