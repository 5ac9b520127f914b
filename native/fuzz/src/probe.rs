//! Any payload as that of a `ping` or a `nat_probe`: nothing panics, and the requester can read the answer.
#![no_main]

use std::net::SocketAddr;
use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use macula_peer_core::proto::answers;
use macula_peer_wire::{Limits, MessageType, value};

fuzz_target!(|payload: &[u8]| {
    let limits = Limits { max_terms: 64, max_depth: 8, ..Limits::default() };
    let now = SystemTime::UNIX_EPOCH;
    let from = SocketAddr::from(([192, 0, 2, 1], 7));
    let answers = [
        (answers::pong(payload, now, limits), MessageType::Pong),
        (answers::nat_probe_reply(payload, from, now, limits), MessageType::NatProbeReply),
    ];
    for (answer, kind) in answers {
        let Some(frame) = answer else { continue };
        assert!(payload.len() <= answers::LIMITS.max_frame && frame.len() <= payload.len() + 256);
        let (read, _) = value::decode(&frame, Limits::default()).expect("it was written under closer limits");
        assert_eq!(read, kind);
    }
});
