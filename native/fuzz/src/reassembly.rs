//! A stream in pieces yields the frames and the error that it yields in one piece, read from the
//! front with [`Header::parse`].
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use macula_peer_wire::{FrameError, HEADER_LEN, Header, Limits, Reassembler};

/// Small enough for inputs to go beyond it.
const LIMITS: Limits = Limits { max_frame: 256, max_depth: 64, max_terms: 256 };

fuzz_target!(|input: &[u8]| -> Corpus {
    // The first bytes say how the rest is cut: a count, then that many lengths of pieces.
    let Some((&cuts, rest)) = input.split_first() else {
        return Corpus::Reject;
    };
    let Some((lens, stream)) = rest.split_at_checked(cuts.into()) else {
        return Corpus::Reject;
    };
    let drain_each_time = cuts % 2 == 0;

    let mut seen = Vec::new();
    let mut end = Ok(());
    let mut reassembler = Reassembler::new(LIMITS);
    for chunk in chunks(Bytes::copy_from_slice(stream), lens) {
        reassembler.push(chunk);
        if drain_each_time {
            end = drain(&mut reassembler, &mut seen);
        }
    }
    if !drain_each_time {
        end = drain(&mut reassembler, &mut seen);
    }
    assert_eq!((seen, end, reassembler.buffered()), whole(stream));
    Corpus::Keep
});

fn chunks(mut stream: Bytes, lens: &[u8]) -> Vec<Bytes> {
    let mut chunks: Vec<_> = lens.iter().map(|&len| stream.split_to(stream.len().min(len.into()))).collect();
    chunks.push(stream);
    chunks
}

fn drain(reassembler: &mut Reassembler, seen: &mut Vec<Bytes>) -> Result<(), FrameError> {
    while let Some(frame) = reassembler.next_frame()? {
        seen.push(frame.into_bytes());
    }
    Ok(())
}

/// The frames at the front of `stream`, the error after them, and the bytes that are left.
fn whole(mut stream: &[u8]) -> (Vec<Bytes>, Result<(), FrameError>, usize) {
    let mut frames = Vec::new();
    loop {
        let header = match Header::parse(stream, LIMITS) {
            Ok(header) => header,
            Err(FrameError::InvalidHeader) => return (frames, Ok(()), stream.len()),
            Err(error) => return (frames, Err(error), stream.len()),
        };
        let Some(frame) = stream.get(..HEADER_LEN + header.payload_len) else {
            return (frames, Ok(()), stream.len());
        };
        stream = &stream[frame.len()..];
        frames.push(Bytes::copy_from_slice(frame));
    }
}
