//! Any datagrams as those of circuits: nothing panics, what is joined has at most the bytes of its halves, and a packet that
//! was cut is itself again.
#![no_main]

use std::time::Instant;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use macula_peer_core::proto::packet::{Fit, Joiner, SplitBy, Splitter, parse};

fuzz_target!(|input: &[u8]| {
    let (now, mut joiner) = (Instant::now(), Joiner::default());
    // Each datagram is as long as the byte before it says.
    let (mut rest, mut received) = (input, 0);
    while let Some((&len, bytes)) = rest.split_first() {
        let (datagram, behind) = bytes.split_at(bytes.len().min(len.into()));
        received += datagram.len();
        if let Some(packet) = parse(Bytes::copy_from_slice(datagram))
            && let Some((_, joined)) = joiner.push(packet, now)
        {
            assert!(joined.len() <= received);
        }
        rest = behind;
    }
    if input.is_empty() {
        // QUIC has no empty packets.
        return;
    }
    let (mut joiner, mut splitter) = (Joiner::default(), Splitter::default());
    let max = 16 + input.len() / 2;
    let datagrams = match splitter.fit(7, input, max, SplitBy::Sender) {
        Fit::Whole(datagram) => vec![datagram],
        Fit::Halves(halves) => halves.into(),
        Fit::TooLarge => return,
    };
    let joined = datagrams.into_iter().filter_map(|datagram| {
        assert!(datagram.len() <= max);
        joiner.push(parse(datagram).expect("just made"), now)
    });
    assert_eq!(joined.collect::<Vec<_>>(), [(7, Bytes::copy_from_slice(input))]);
});
