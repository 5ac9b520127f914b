//! What comes over the socket and is not QUIC's.

use std::cmp::min;
use std::net::{IpAddr, SocketAddr};

use macula_peer_core::proto::signal::{FIRST_BYTE, MAX_LEN};
use macula_peer_core::types::canonical;
use quinn::udp::RecvMeta;
use tokio::sync::mpsc;

use super::extras::ExtraId;

/// Room for unread signals. A node that looks for a path to this one sends some hundred within a second; signals beyond
/// that are dropped, and sent again.
const WAITING: usize = 1024;

/// QUIC's packets have one of these bits set (RFC 9443).
const QUIC_BITS: u8 = 0xC0;

/// Where signals go.
pub(crate) type Signals = mpsc::Sender<(ReceivedBy, Received)>;

/// A datagram of the form of a signal, from any sender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    bytes: [u8; MAX_LEN],
    len: usize,
    /// The source address, IPv4 written as IPv4.
    pub(crate) from: SocketAddr,
    /// The local address that it came to, if the system tells.
    pub(crate) to: Option<IpAddr>,
}

/// Which socket a signal came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReceivedBy {
    Main,
    Extra(ExtraId),
}

impl Received {
    /// `None` if it is not a signal.
    pub(crate) fn new(bytes: &[u8], from: SocketAddr, to: Option<IpAddr>) -> Option<Self> {
        if bytes.first() != Some(&FIRST_BYTE) || bytes.len() > MAX_LEN {
            return None;
        }
        let mut copy = [0; MAX_LEN];
        copy[..bytes.len()].copy_from_slice(bytes);
        Some(Self { bytes: copy, len: bytes.len(), from: canonical(from), to })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

pub(crate) fn signals() -> (Signals, mpsc::Receiver<(ReceivedBy, Received)>) {
    mpsc::channel(WAITING)
}

/// Takes out of one receive buffer what is not QUIC's, and hands on what may be signals. The kernel may have put several
/// datagrams into it, all of one length but the last.
pub(super) fn demux(buffer: &mut [u8], meta: &mut RecvMeta, via: ReceivedBy, signals: &Signals) {
    if meta.addr.port() == 0 {
        // No answer can be sent there.
        meta.len = 0;
    }
    // Elsewhere than on Linux there is no stride to an empty datagram.
    let stride = meta.stride.max(1);
    let Some(first) = (0..meta.len).step_by(stride).find(|&at| !is_quic(buffer[at])) else { return };
    let mut kept = first;
    for start in (first..meta.len).step_by(stride) {
        let datagram = start..min(start + stride, meta.len);
        if is_quic(buffer[start]) {
            let len = datagram.len();
            buffer.copy_within(datagram, kept);
            kept += len;
        } else if let Ok(place) = signals.try_reserve()
            && let Some(received) = Received::new(&buffer[datagram], meta.addr, meta.dst_ip)
        {
            place.send((via, received));
        }
    }
    meta.len = kept;
}

fn is_quic(first: u8) -> bool {
    first & QUIC_BITS != 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn meta(len: usize, stride: usize) -> RecvMeta {
        let mut meta = RecvMeta::default();
        (meta.addr, meta.len, meta.stride) = ("[::ffff:192.0.2.1]:7".parse().unwrap(), len, stride);
        meta
    }

    fn sifted(buffer: &mut [u8], stride: usize) -> (Vec<u8>, Vec<Received>) {
        let (signals, mut waiting) = signals();
        let mut meta = meta(buffer.len(), stride);
        demux(buffer, &mut meta, ReceivedBy::Main, &signals);
        assert_eq!(meta.stride, stride);
        (
            buffer[..meta.len].to_vec(),
            std::iter::from_fn(|| waiting.try_recv().ok().map(|(_, received)| received)).collect(),
        )
    }

    #[test]
    fn quic_and_signals_in_one_buffer_are_separated() {
        let quic = |number: u8, len: usize| [&[0x40, number][..], &vec![number; len - 2]].concat();
        let signal = |number: u8, len: usize| [&[FIRST_BYTE, number][..], &vec![number; len - 2]].concat();
        let datagrams = [quic(1, 50), signal(2, 50), quic(3, 50), signal(4, 50), signal(5, 50), quic(6, 20)];
        let (left, found) = sifted(&mut datagrams.concat(), 50);
        assert_eq!(left, [quic(1, 50), quic(3, 50), quic(6, 20)].concat());
        let found: Vec<_> = found.iter().map(|signal| (signal.bytes().to_vec(), signal.from)).collect();
        let from = "192.0.2.1:7".parse().unwrap();
        assert_eq!(found, [2, 4, 5].map(|number| (signal(number, 50), from)));

        let (left, found) = sifted(&mut signal(1, 20), 20);
        assert_eq!((left.len(), found.len()), (0, 1));
        let (left, found) = sifted(&mut [], 0);
        assert_eq!((left.len(), found.len()), (0, 0));
    }

    #[test]
    fn other_packets_are_dropped() {
        for mut stranger in [vec![0; 20], vec![0x3F; 1200], vec![FIRST_BYTE; MAX_LEN + 1]] {
            let len = stranger.len();
            let (left, found) = sifted(&mut stranger, len);
            assert_eq!((left.len(), found.len()), (0, 0));
        }
    }

    #[test]
    fn packets_without_a_return_address_are_dropped() {
        let (signals, mut waiting) = signals();
        for first in [FIRST_BYTE, 0x40] {
            let mut datagram = [first; 20];
            let mut meta = meta(datagram.len(), datagram.len());
            meta.addr.set_port(0);
            demux(&mut datagram, &mut meta, ReceivedBy::Main, &signals);
            assert_eq!(meta.len, 0);
        }
        assert!(waiting.try_recv().is_err());
    }

    #[test]
    fn signals_that_are_not_read_are_dropped() {
        let (signals, mut waiting) = signals();
        for number in 0..WAITING + 10 {
            let mut signal = [&[FIRST_BYTE][..], &number.to_be_bytes()].concat();
            let mut meta = meta(signal.len(), signal.len());
            demux(&mut signal, &mut meta, ReceivedBy::Main, &signals);
            assert_eq!(meta.len, 0);
        }
        let kept: Vec<_> = std::iter::from_fn(|| waiting.try_recv().ok().map(|(_, received)| received)).collect();
        assert_eq!(kept.len(), WAITING);
        assert_eq!(kept[WAITING - 1].bytes()[1..], (WAITING - 1).to_be_bytes());
    }

    proptest! {
        #[test]
        fn every_datagram_is_where_it_belongs(firsts in vec(any::<u8>(), 1..64), stride in 1..60usize, last in 1..60usize) {
            let last = last.min(stride);
            let datagrams: Vec<_> = firsts.iter().enumerate().map(|(at, &first)| {
                let mut datagram = vec![at as u8; if at + 1 == firsts.len() { last } else { stride }];
                datagram[0] = first;
                datagram
            }).collect();
            let (left, found) = sifted(&mut datagrams.concat(), stride);
            let quic: Vec<_> = datagrams.iter().filter(|datagram| datagram[0] >= 0x40).cloned().collect();
            prop_assert_eq!(left, quic.concat());
            let is_signal = |datagram: &&Vec<u8>| datagram[0] == FIRST_BYTE && datagram.len() <= MAX_LEN;
            let signals: Vec<_> = datagrams.iter().filter(is_signal).cloned().collect();
            prop_assert_eq!(found.iter().map(|found| found.bytes().to_vec()).collect::<Vec<_>>(), signals);
        }
    }
}
