//! A circuit's packets as QUIC datagrams: the circuit's number, the form, and a packet or half of one.
//!
//! A packet that does not fit is cut in two, by its sender or, if only the path from the relay is too narrow, by the
//! relay. Each of the two numbers its own halves, so the form tells them apart.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes before a whole packet, and before half of one.
const WHOLE_HEADER: usize = 5;
const HALF_HEADER: usize = 7;

/// Halves that wait for their other half. Both leave together, so more than a few means loss; at 1,200 bytes each this
/// is 77 KB at most.
const MAX_PENDING: usize = 64;

/// How long a half waits. Halves that took the same path arrive within the jitter of one round trip, and QUIC has
/// declared lost what comes a second late.
const HALF_LIFETIME: Duration = Duration::from_secs(1);

/// Which side cut a packet in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitBy {
    Sender,
    Relay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    First,
    Second,
}

/// Whether a datagram carries a packet or half of one; with the number by which the halves find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Whole,
    SenderHalf(Half, u16),
    RelayHalf(Half, u16),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub circuit: u32,
    pub form: Form,
    pub bytes: Bytes,
}

/// As long as a challenge of the other side's address may be that is the answer to it: QUIC makes that 1,200 bytes long, and
/// an address that is not proven gets three times what came from it.
const PADDING_LEN: usize = 500;

/// The form of a datagram that carries nothing.
const PADDING: u8 = 5;

/// A datagram that carries nothing.
pub fn padding() -> Bytes {
    let mut datagram = BytesMut::zeroed(PADDING_LEN);
    datagram[WHOLE_HEADER - 1] = PADDING;
    datagram.freeze()
}

pub fn is_padding(datagram: &[u8]) -> bool {
    datagram.get(WHOLE_HEADER - 1) == Some(&PADDING)
}

impl Packet {
    pub fn encode(&self) -> Bytes {
        encode(self.circuit, self.form, &self.bytes)
    }
}

/// `None`: this is no circuit's datagram.
pub fn parse(mut datagram: Bytes) -> Option<Packet> {
    let (circuit, rest) = datagram.split_first_chunk()?;
    let (form, rest) = rest.split_first()?;
    let id = || rest.first_chunk().copied().map(u16::from_be_bytes);
    let (form, header) = match form {
        0 => (Form::Whole, WHOLE_HEADER),
        1 => (Form::SenderHalf(Half::First, id()?), HALF_HEADER),
        2 => (Form::SenderHalf(Half::Second, id()?), HALF_HEADER),
        3 => (Form::RelayHalf(Half::First, id()?), HALF_HEADER),
        4 => (Form::RelayHalf(Half::Second, id()?), HALF_HEADER),
        _ => return None,
    };
    let circuit = u32::from_be_bytes(*circuit);
    if datagram.len() == header {
        return None;
    }
    Some(Packet { circuit, form, bytes: datagram.split_off(header) })
}

fn encode(circuit: u32, form: Form, bytes: &[u8]) -> Bytes {
    let (tag, id) = match form {
        Form::Whole => (0, None),
        Form::SenderHalf(Half::First, id) => (1, Some(id)),
        Form::SenderHalf(Half::Second, id) => (2, Some(id)),
        Form::RelayHalf(Half::First, id) => (3, Some(id)),
        Form::RelayHalf(Half::Second, id) => (4, Some(id)),
    };
    let mut datagram = BytesMut::with_capacity(HALF_HEADER + bytes.len());
    datagram.put_u32(circuit);
    datagram.put_u8(tag);
    if let Some(id) = id {
        datagram.put_u16(id);
    }
    datagram.put_slice(bytes);
    datagram.freeze()
}

/// The datagrams that carry one packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Fit {
    Whole(Bytes),
    Halves([Bytes; 2]),
    /// Not even its halves fit.
    TooLarge,
}

/// Makes packets fit into the datagrams of one connection.
#[derive(Debug, Default)]
pub struct Splitter {
    next: u16,
}

impl Splitter {
    /// The datagrams, of at most `max` bytes each, that carry the packet.
    pub fn fit(&mut self, circuit: u32, packet: &[u8], max: usize, by: SplitBy) -> Fit {
        if WHOLE_HEADER + packet.len() <= max {
            return Fit::Whole(encode(circuit, Form::Whole, packet));
        }
        let (first, second) = packet.split_at(packet.len().div_ceil(2));
        if second.is_empty() || HALF_HEADER + first.len() > max {
            return Fit::TooLarge;
        }
        let id = self.next;
        self.next = id.wrapping_add(1);
        let half = |half, bytes| match by {
            SplitBy::Sender => encode(circuit, Form::SenderHalf(half, id), bytes),
            SplitBy::Relay => encode(circuit, Form::RelayHalf(half, id), bytes),
        };
        Fit::Halves([half(Half::First, first), half(Half::Second, second)])
    }
}

/// Puts the halves that come over one connection together again.
#[derive(Debug, Default)]
pub struct Joiner {
    /// Oldest first.
    pending: VecDeque<Pending>,
}

#[derive(Debug)]
struct Pending {
    key: Key,
    half: Half,
    bytes: Bytes,
    since: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    circuit: u32,
    by: SplitBy,
    id: u16,
}

impl Joiner {
    /// The circuit's packet, if it is complete with this.
    pub fn push(&mut self, packet: Packet, now: Instant) -> Option<(u32, Bytes)> {
        let Packet { circuit, form, bytes } = packet;
        let (key, half) = match form {
            Form::Whole => return Some((circuit, bytes)),
            Form::SenderHalf(half, id) => (Key { circuit, by: SplitBy::Sender, id }, half),
            Form::RelayHalf(half, id) => (Key { circuit, by: SplitBy::Relay, id }, half),
        };
        while self.pending.front().is_some_and(|oldest| now >= oldest.since + HALF_LIFETIME) {
            self.pending.pop_front();
        }
        // The other half came last, as a rule.
        let index = self.pending.iter().rposition(|pending| pending.key == key);
        let waiting = index.and_then(|index| self.pending.remove(index));
        match (waiting, half) {
            (Some(Pending { half: Half::First, bytes: first, .. }), Half::Second) => {
                Some((circuit, join(&first, &bytes)))
            }
            (Some(Pending { half: Half::Second, bytes: second, .. }), Half::First) => {
                Some((circuit, join(&bytes, &second)))
            }
            // The same half again: the other half of the earlier packet was lost, and the number has wrapped around.
            (Some(_) | None, half) => {
                if self.pending.len() == MAX_PENDING {
                    self.pending.pop_front();
                }
                self.pending.push_back(Pending { key, half, bytes, since: now });
                None
            }
        }
    }
}

fn join(first: &[u8], second: &[u8]) -> Bytes {
    [first, second].concat().into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn by() -> impl Strategy<Value = SplitBy> {
        prop_oneof![Just(SplitBy::Sender), Just(SplitBy::Relay)]
    }

    fn datagrams(fit: Fit) -> Vec<Bytes> {
        match fit {
            Fit::Whole(datagram) => vec![datagram],
            Fit::Halves(halves) => halves.into(),
            Fit::TooLarge => vec![],
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_protocol() {
        let mut splitter = Splitter { next: 0x0102 };
        let fit = splitter.fit(0x0a0b0c0d, b"xyz", 8, SplitBy::Sender);
        assert_eq!(fit, Fit::Whole(Bytes::from_static(b"\x0a\x0b\x0c\x0d\0xyz")));
        let fit = splitter.fit(0x0a0b0c0d, b"abcdefg", 11, SplitBy::Sender);
        let halves = [&b"\x0a\x0b\x0c\x0d\x01\x01\x02abcd"[..], b"\x0a\x0b\x0c\x0d\x02\x01\x02efg"];
        assert_eq!(fit, Fit::Halves(halves.map(Bytes::from_static)));
        let fit = splitter.fit(1, b"abcdefg", 11, SplitBy::Relay);
        let halves = [&b"\0\0\0\x01\x03\x01\x03abcd"[..], b"\0\0\0\x01\x04\x01\x03efg"];
        assert_eq!(fit, Fit::Halves(halves.map(Bytes::from_static)));
        assert_eq!(splitter.fit(1, b"abcdefg", 10, SplitBy::Relay), Fit::TooLarge);
    }

    #[test]
    fn an_empty_packet_is_invalid() {
        for datagram in
            [&b""[..], b"\0\0\0\x01", b"\0\0\0\x01\0", b"\0\0\0\x01\x01\0", b"\0\0\0\x01\x02\0\0", b"\0\0\0\x01\x05xyz"]
        {
            assert_eq!(parse(Bytes::from_static(datagram)), None, "{datagram:?}");
        }
    }

    #[test]
    fn a_half_waits_for_its_time_and_no_longer() {
        let start = Instant::now();
        let half = |half| Packet { circuit: 1, form: Form::SenderHalf(half, 7), bytes: Bytes::from_static(b"x") };
        let mut joiner = Joiner::default();
        assert_eq!(joiner.push(half(Half::First), start), None);
        assert!(joiner.push(half(Half::Second), start + HALF_LIFETIME - Duration::from_millis(1)).is_some());
        assert_eq!(joiner.push(half(Half::First), start), None);
        assert_eq!(joiner.push(half(Half::Second), start + HALF_LIFETIME), None);
    }

    #[test]
    fn lone_halves_are_replaced_by_newer_ones() {
        let now = Instant::now();
        let half = |half, id| Packet { circuit: 1, form: Form::RelayHalf(half, id), bytes: Bytes::from_static(b"x") };
        let mut joiner = Joiner::default();
        for id in 0..=MAX_PENDING as u16 {
            assert_eq!(joiner.push(half(Half::First, id), now), None);
        }
        assert_eq!(joiner.push(half(Half::Second, 1), now), Some((1, Bytes::from_static(b"xx"))));
        assert_eq!(joiner.push(half(Half::Second, 0), now), None, "evicted");
        assert!(joiner.pending.len() <= MAX_PENDING);
    }

    proptest! {
        #[test]
        fn garbage_is_no_packet_or_the_packet_that_it_encodes(datagrams in vec(vec(any::<u8>(), 0..40), 0..200)) {
            let mut joiner = Joiner::default();
            for datagram in datagrams {
                let datagram = Bytes::from(datagram);
                if let Some(packet) = parse(datagram.clone()) {
                    prop_assert_eq!(packet.encode(), datagram);
                    joiner.push(packet, Instant::now());
                }
                prop_assert!(joiner.pending.len() <= MAX_PENDING);
            }
        }

        #[test]
        fn datagrams_keep_to_their_size(packet in vec(any::<u8>(), 1..1500), max in 0usize..1600, by in by()) {
            let fit = Splitter::default().fit(1, &packet, max, by);
            if fit == Fit::TooLarge {
                prop_assert!(packet.len() > 2 * max.saturating_sub(HALF_HEADER) || packet.len() == 1);
            }
            for datagram in datagrams(fit) {
                prop_assert!(datagram.len() <= max);
            }
        }

        /// Packets of several circuits, cut by the sender or the relay, arrive in any order and some datagrams do not.
        #[test]
        fn packets_come_out_as_they_went_in_unless_part_of_one_was_lost(
            packets in vec((0u32..3, vec(any::<u8>(), 2..60), by()), 1..MAX_PENDING),
            order in vec(any::<prop::sample::Index>(), 2 * MAX_PENDING),
            lost in vec(prop::bool::weighted(0.2), 2 * MAX_PENDING),
        ) {
            let now = Instant::now();
            let (mut sender, mut relay) = (Splitter::default(), Splitter::default());
            let mut in_flight = Vec::new();
            let mut expected = Vec::new();
            let mut lost = lost.into_iter();
            for (circuit, packet, by) in packets {
                let splitter = if by == SplitBy::Sender { &mut sender } else { &mut relay };
                let parts = datagrams(splitter.fit(circuit, &packet, 40, by));
                prop_assert!(!parts.is_empty());
                let arriving: Vec<_> = parts.iter().filter(|_| !lost.next().unwrap()).cloned().collect();
                if arriving.len() == parts.len() {
                    expected.push((circuit, Bytes::from(packet)));
                }
                in_flight.extend(arriving);
            }
            let mut joiner = Joiner::default();
            let mut came = Vec::new();
            for index in order {
                if !in_flight.is_empty() {
                    let datagram = in_flight.swap_remove(index.index(in_flight.len()));
                    came.extend(joiner.push(parse(datagram).unwrap(), now));
                }
            }
            came.sort();
            expected.sort();
            prop_assert_eq!(came, expected);
        }
    }
}
