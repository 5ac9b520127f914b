//! The sessions that a receiver knows: how many may be open, how long the others are kept, and which one makes room.
//!
//! Keys are free, so an address is bounded as well as each key. A session with an open stream is never forgotten. When the
//! table is full, it evicts a closed session of the sender with the most: the address with the most closed sessions, and
//! of its keys the one with the most. So a sender never loses a session to one that has more.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::shares::Network;
use crate::types::Fingerprint;
use crate::weights::{Owner, Queues, Weights};

/// One key may have this part of all sessions open at once. A sender has one for each name that it knows the receiver by.
const KEYS: usize = 64;

/// How long a session is kept after its last stream has ended, unless its sender asks for longer. Most messages are given
/// up sooner.
pub const KEEP: Duration = Duration::from_secs(600);

/// The most that a sender may ask for.
pub const MAX_KEEP: Duration = Duration::from_secs(24 * 3600);

/// Sessions forgotten at most when another is opened, so that no one waits for thousands.
const FORGOTTEN_AT_ONCE: usize = 16;

pub type SessionId = [u8; 16];

/// The sender, and the id that it has drawn.
pub type SessionKey = (Fingerprint, SessionId);

/// What a sender says of the receiver when it opens a stream of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Met {
    /// Nothing: it was never greeted.
    Nobody,
    /// This receiver, in its present run.
    ThisRun,
    /// The receiver before it was restarted, or another receiver.
    AnotherRun,
}

/// A session that was opened.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened<S> {
    pub session: S,
    /// It was there, and its sender has not met another run since.
    pub known: bool,
    /// The sender goes on with a session that it had with the run before this one.
    pub restarted: bool,
    /// Another one was forgotten for it.
    pub took_room: bool,
}

/// Why a session was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// This run knew it and has forgotten it.
    Forgotten,
    /// Its key, its address or all together have too many open.
    TooMany,
}

/// Times are milliseconds of one clock.
#[derive(Debug)]
pub struct SessionTable<S> {
    most: usize,
    most_open_of_key: usize,
    sessions: HashMap<SessionKey, Entry<S>>,
    open: usize,
    open_of_key: Weights<Fingerprint>,
    open_of_network: Weights<Network>,
    closed: Closed,
}

#[derive(Debug)]
struct Entry<S> {
    session: S,
    streams: usize,
    /// Where it was opened.
    network: Network,
    /// When it is forgotten, if it is closed.
    forget_at: u64,
    /// Its sender has ended it.
    ended: bool,
}

impl<S> SessionTable<S> {
    /// With room for so many.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            most_open_of_key: (most / KEYS).max(1),
            sessions: HashMap::new(),
            open: 0,
            open_of_key: Weights::default(),
            open_of_network: Weights::default(),
            closed: Closed::default(),
        }
    }

    /// Ends with [`SessionTable::close`].
    pub fn open(
        &mut self,
        key: SessionKey,
        network: Network,
        met: Met,
        now: u64,
        make: impl FnOnce() -> S,
    ) -> Result<Opened<S>, Refused>
    where
        S: Clone,
    {
        self.forget_old(now);
        let known = self.sessions.get(&key);
        if known.is_none() && met == Met::ThisRun {
            return Err(Refused::Forgotten);
        }
        if known.is_none_or(|entry| entry.streams == 0) {
            if !self.has_room_for(key.0, network) {
                return Err(Refused::TooMany);
            }
            self.open += 1;
            self.open_of_key.add(key.0, 1);
            self.open_of_network.add(network, 1);
        }
        if let Some(entry) = self.sessions.get_mut(&key) {
            if entry.streams == 0 {
                self.closed.remove(key, entry.network, entry.forget_at);
                entry.network = network;
            }
            entry.streams += 1;
            let known = met != Met::AnotherRun;
            return Ok(Opened { session: entry.session.clone(), known, restarted: false, took_room: false });
        }
        let makes_room = match self.sessions.len() >= self.most {
            true => self.closed.take_from_heaviest(Owner { key: key.0, network }),
            false => None,
        };
        if let Some(heaviest) = &makes_room {
            self.sessions.remove(heaviest);
        }
        let session = make();
        let entry = Entry { session: session.clone(), streams: 1, network, forget_at: 0, ended: false };
        self.sessions.insert(key, entry);
        Ok(Opened { session, known: false, restarted: met == Met::AnotherRun, took_room: makes_room.is_some() })
    }

    /// A network may have as many open as there would still be room for: so many can never leave no room for others.
    fn has_room_for(&self, key: Fingerprint, network: Network) -> bool {
        self.open_of_key.of(&key) < self.most_open_of_key && self.open_of_network.of(&network) < self.most - self.open
    }

    /// Its sender has ended it: it is forgotten with its last stream.
    pub fn end(&mut self, key: &SessionKey) {
        if let Some(entry) = self.sessions.get_mut(key) {
            entry.ended = true;
        }
    }

    /// A stream has ended. `keep`: for how long its sender wants it to be kept.
    pub fn close(&mut self, key: SessionKey, keep: Duration, now: u64) {
        let Some(entry) = self.sessions.get_mut(&key) else { return };
        entry.streams = entry.streams.saturating_sub(1);
        if entry.streams > 0 {
            return;
        }
        self.open -= 1;
        self.open_of_key.remove(key.0, 1);
        self.open_of_network.remove(entry.network, 1);
        if entry.ended {
            self.sessions.remove(&key);
        } else {
            entry.forget_at = now + keep.clamp(KEEP, MAX_KEEP).as_millis() as u64;
            self.closed.insert(key, entry.network, entry.forget_at);
        }
    }

    fn forget_old(&mut self, now: u64) {
        for _ in 0..FORGOTTEN_AT_ONCE {
            let Some(&(forget_at, key)) = self.closed.order.first() else { return };
            if forget_at > now {
                return;
            }
            if let Some(entry) = self.sessions.remove(&key) {
                self.closed.remove(key, entry.network, forget_at);
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.sessions.len()
    }

    /// When the closed ones are forgotten.
    pub fn forgotten_at(&self) -> Vec<u64> {
        self.closed.order.iter().map(|(forget_at, _)| *forget_at).collect()
    }
}

/// The closed sessions.
#[derive(Debug, Default)]
struct Closed {
    /// By when they are forgotten.
    order: BTreeSet<(u64, SessionKey)>,
    queues: Queues<(u64, SessionId)>,
}

impl Closed {
    fn insert(&mut self, (key, id): SessionKey, network: Network, forget_at: u64) {
        self.order.insert((forget_at, (key, id)));
        self.queues.insert(Owner { key, network }, (forget_at, id), 1);
    }

    fn remove(&mut self, (key, id): SessionKey, network: Network, forget_at: u64) {
        self.order.remove(&(forget_at, (key, id)));
        self.queues.remove(Owner { key, network }, (forget_at, id), 1);
    }

    /// Of the sender with the most, the session that would be forgotten first.
    fn take_from_heaviest(&mut self, needs_room: Owner) -> Option<SessionKey> {
        let (Owner { key, network }, (forget_at, id)) = self.queues.first_of_heaviest(needs_room)?;
        self.remove((key, id), network, forget_at);
        Some((key, id))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::IpAddr;

    use super::*;

    const MINUTE: u64 = 60_000;

    fn network(n: u8) -> Network {
        Network::from(IpAddr::from([20, 0, 0, n]))
    }

    fn session(key: u16, id: u32) -> SessionKey {
        let (mut fingerprint, mut session) = ([0; 32], [0; 16]);
        fingerprint[..2].copy_from_slice(&key.to_be_bytes());
        session[..4].copy_from_slice(&id.to_be_bytes());
        (fingerprint.into(), session)
    }

    fn open(table: &mut SessionTable<u32>, key: SessionKey, from: u8, met: Met, now: u64) -> Result<bool, Refused> {
        table.open(key, network(from), met, now, || 0).map(|opened| opened.known)
    }

    fn open_and_close(table: &mut SessionTable<u32>, key: SessionKey, from: u8, now: u64) {
        open(table, key, from, Met::Nobody, now).unwrap();
        table.close(key, KEEP, now);
    }

    #[test]
    fn a_session_is_known_for_ten_minutes_and_then_said_to_be_forgotten() {
        let (mut table, key) = (SessionTable::new(1000), session(1, 1));
        assert_eq!(open(&mut table, key, 1, Met::Nobody, 0), Ok(false));
        assert_eq!(open(&mut table, key, 1, Met::Nobody, 0), Ok(true), "its other channel");
        table.close(key, KEEP, MINUTE);
        table.close(key, KEEP, 2 * MINUTE);
        assert_eq!(open(&mut table, key, 2, Met::ThisRun, 12 * MINUTE - 1), Ok(true), "from elsewhere, too");
        table.close(key, KEEP, 12 * MINUTE);
        assert_eq!(open(&mut table, key, 1, Met::ThisRun, 22 * MINUTE), Err(Refused::Forgotten));
        assert_eq!(table.count(), 0);
    }

    #[test]
    fn a_session_is_kept_as_long_as_its_sender_may_owe_something_and_a_day_at_most() {
        let (mut table, [long, short]) = (SessionTable::new(1000), [session(1, 1), session(1, 2)]);
        for key in [long, short] {
            open(&mut table, key, 1, Met::Nobody, 0).unwrap();
        }
        table.close(long, Duration::from_secs(3600 * 1000), 0);
        table.close(short, Duration::from_secs(1), 0);
        let now = 23 * 60 * MINUTE;
        assert_eq!(open(&mut table, short, 1, Met::ThisRun, now), Err(Refused::Forgotten));
        assert_eq!(open(&mut table, long, 1, Met::ThisRun, now), Ok(true));
        table.close(long, KEEP, now);
        assert_eq!(open(&mut table, long, 1, Met::ThisRun, now + 24 * 60 * MINUTE), Err(Refused::Forgotten));
    }

    #[test]
    fn only_a_session_opened_for_another_run_was_restarted() {
        let mut table = SessionTable::new(1000);
        let mut opened = |key, met| table.open(key, network(1), met, 0, || ()).unwrap();
        let (one, other) = (session(1, 1), session(1, 2));
        let state = |opened: Opened<()>| (opened.known, opened.restarted);
        assert_eq!(state(opened(one, Met::Nobody)), (false, false));
        assert_eq!(state(opened(other, Met::AnotherRun)), (false, true));
        // Its other stream was begun before the first was greeted.
        assert_eq!(state(opened(other, Met::AnotherRun)), (false, false));
        assert_eq!(state(opened(other, Met::ThisRun)), (true, false));
    }

    #[test]
    fn closed_sessions_tell_when_they_are_forgotten() {
        let mut table = SessionTable::new(1000);
        for (id, now) in [(1, 3), (2, 2), (3, 2)] {
            open_and_close(&mut table, session(1, id), 1, now);
        }
        open(&mut table, session(1, 4), 1, Met::Nobody, 3).unwrap();
        let keep = KEEP.as_millis() as u64;
        assert_eq!(table.forgotten_at(), [keep + 2, keep + 2, keep + 3]);
    }

    #[test]
    fn an_ended_session_is_forgotten_with_its_last_stream() {
        let (mut table, key) = (SessionTable::new(1000), session(1, 1));
        for _ in 0..2 {
            open(&mut table, key, 1, Met::Nobody, 0).unwrap();
        }
        table.end(&key);
        table.close(key, KEEP, 0);
        assert_eq!(table.count(), 1);
        table.close(key, KEEP, 0);
        assert_eq!((table.count(), table.open, table.closed.order.len()), (0, 0, 0));
    }

    #[test]
    fn one_key_and_one_address_have_only_so_many_open_and_others_still_open_theirs() {
        let mut table = SessionTable::new(2000);
        let of_one_key = (0..3000).filter(|&id| open(&mut table, session(0, id), 1, Met::Nobody, 0).is_ok()).count();
        assert_eq!(of_one_key, 2000 / KEYS);
        let more = (1..3000).filter(|&key| open(&mut table, session(key, 0), 1, Met::Nobody, 0).is_ok()).count();
        assert_eq!(of_one_key + more, 1000, "an address has half");
        for from in 2..=5 {
            let key = 10_000 + 1000 * u16::from(from);
            for n in 0..2000 {
                let _ = open(&mut table, session(key + n % 100, n.into()), from, Met::Nobody, 0);
            }
        }
        assert_eq!(open(&mut table, session(9999, 0), 6, Met::Nobody, 0), Ok(false), "there is still room");
        assert!(table.count() <= 2000);
    }

    #[test]
    fn the_sender_with_the_most_sessions_makes_room() {
        let mut table = SessionTable::new(100);
        let honest = [session(1, 1), session(2, 1)];
        open_and_close(&mut table, honest[0], 1, 0);
        // At the same address as the flood.
        open_and_close(&mut table, honest[1], 9, 0);
        for id in 0..5000 {
            open_and_close(&mut table, session(100 + (id % 20) as u16, id), 9, 1);
        }
        assert_eq!(table.count(), 100);
        assert!(table.open(session(3, 1), network(3), Met::Nobody, 1, || 0).unwrap().took_room);
        for (key, from) in honest.into_iter().zip([1, 9]) {
            assert_eq!(open(&mut table, key, from, Met::ThisRun, 2), Ok(true));
        }
        let newest = session(100 + (4999 % 20) as u16, 4999);
        assert_eq!(open(&mut table, newest, 9, Met::ThisRun, 2), Ok(true), "the oldest go first");
    }

    #[test]
    fn the_counts_match_the_sessions_after_any_sequence() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut table = SessionTable { most_open_of_key: 8, ..SessionTable::new(30) };
            let mut streams = Vec::new();
            let mut now = 0;
            for _ in 0..400 {
                now += random.u64(0..MINUTE);
                let key = session(random.u16(0..6), random.u32(0..12));
                match random.u8(0..10) {
                    0..6 => {
                        let met = [Met::Nobody, Met::ThisRun, Met::AnotherRun][random.usize(0..3)];
                        if open(&mut table, key, random.u8(0..4), met, now).is_ok() {
                            streams.push(key);
                        }
                    }
                    6 => table.end(&key),
                    _ if streams.is_empty() => {}
                    _ => {
                        let key = streams.swap_remove(random.usize(0..streams.len()));
                        table.close(key, Duration::from_secs(random.u64(0..100_000)), now);
                    }
                }
                assert!(table.count() <= 30, "SEED={seed}");
                for key in &streams {
                    let of_key = streams.iter().filter(|other| *other == key).count();
                    assert_eq!(table.sessions[key].streams, of_key, "SEED={seed}: no open one is forgotten");
                }
                let open = table.sessions.values().filter(|entry| entry.streams > 0).count();
                assert_eq!((table.open, table.count() - open), (open, table.closed.order.len()), "SEED={seed}");
                assert_eq!(table.open_of_key.total(), open, "SEED={seed}");
                assert_eq!(table.open_of_network.total(), open, "SEED={seed}");
                assert_eq!(table.closed.queues.total(), table.count() - open, "SEED={seed}");
            }
        }
    }
}
