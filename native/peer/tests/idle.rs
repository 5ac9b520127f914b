//! An idle engine costs no processor time. Alone in its process, whose time it measures.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use common::{engine, listener, message, send, until};
use macula_peer::Config;
use macula_peer_wire::MessageType::{Ping, Publish};

/// User and system time of this process, in ticks of 10 ms.
fn processor_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// A peer whose dial had failed, and that no caller used any more, kept its task spinning.
#[test]
fn a_dead_peer_and_a_quiet_link_cost_no_processor_time() {
    let (server, inbox, endpoint) = listener(Config::default());
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, Duration::from_secs(5))).unwrap();
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    assert!(send(&client, &closed, message(Ping, 0, Duration::from_secs(5))).is_err());
    until("all is quiet", || inbox.len() == 1 && common::owes_nothing(&client));
    // Longer than every pause between dials, and what is spent in it.
    let (before, begun) = (processor_ticks(), Instant::now());
    while begun.elapsed() < Duration::from_secs(2) {
        std::thread::park_timeout(Duration::from_secs(2));
    }
    let spent = processor_ticks() - before;
    assert!(spent < 50, "{spent}0 ms of processor time in two idle seconds");
    client.stop();
    server.stop();
}
