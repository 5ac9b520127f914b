//! Any bytes as the opening of a session and as what its receiver says, in any pieces: nothing panics, what is read can be
//! said again, and a sender gives back each message once, in order, and none that was not written.
#![no_main]

use std::time::Instant;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use macula_peer_core::proto::session::{Opening, Record, Words, parse_number, put_number};
use macula_peer_core::session::Outgoing;
use macula_peer_wire::HEADER_LEN;

fuzz_target!(|input: &[u8]| {
    if let Some(opening) = Opening::parse(input) {
        let frame = opening.frame();
        assert_eq!(&frame[HEADER_LEN..], input);
    }
    if let Some((number, keep)) = parse_number(input) {
        let mut frame = BytesMut::new();
        put_number(&mut frame, number, (input.len() > 8).then_some(keep));
        assert_eq!(&frame[HEADER_LEN..], input);
    }
    let whole = read([input]);
    let mut said = BytesMut::new();
    for word in &whole {
        word.put(&mut said);
    }
    // Whether the receiver knew the session is more than one bit on the wire.
    assert_eq!(said.len(), if input.len() < 17 { 0 } else { 17 + (input.len() - 17) / 9 * 9 });
    let cut = input.first().map_or(0, |&byte| usize::from(byte) % input.len());
    assert_eq!(read([&input[..cut], &input[cut..]]), whole);

    let (mut outgoing, now) = (Outgoing::default(), Instant::now());
    let (mut pushed, mut written, mut let_go) = (0, 0, Vec::new());
    for word in whole {
        outgoing.push(pushed);
        outgoing.push(pushed + 1);
        outgoing.write(now);
        (pushed, written) = (pushed + 2, written + 1);
        match word {
            Record::Greeting { expected, .. } => let_go.extend(outgoing.resume(expected)),
            Record::Expected(expected) => let_go.extend(outgoing.acknowledge(expected)),
            Record::Refused(_, number) => {
                let_go.extend(outgoing.acknowledge(number));
                let_go.extend(outgoing.refused(number));
            }
        }
        assert!(let_go.len() <= written, "the rest has not left");
    }
    let_go.extend(outgoing.take());
    assert_eq!(let_go, (0..pushed).collect::<Vec<_>>());
});

fn read<const N: usize>(pieces: [&[u8]; N]) -> Vec<Record> {
    let mut words = Words::default();
    let mut all = Vec::new();
    for piece in pieces {
        words.push(piece);
        all.extend(std::iter::from_fn(|| words.next_word()));
    }
    all
}
