//! A host that has no time for the engine: everything in this process stands still now and then. Alone in its file, because
//! other tests would stand still too.
#![cfg(unix)]

use std::process::{Child, Command, id};
use std::time::Duration;

use crate::common::{engine, listener, message, send, until};
use macula_peer::Config;
use macula_peer_wire::MessageType::Publish;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Longer than a peer may be silent.
const STALL: &str = "0.8";

fn stall() -> Child {
    let script = format!("kill -STOP {0}; sleep {STALL}; kill -CONT {0}", id());
    Command::new("sh").args(["-c", &script]).spawn().unwrap()
}

/// Packets that had arrived were not read yet, so the peer was taken for silent and redialled.
#[test]
fn a_peer_is_not_suspected_while_this_host_is_stalled() {
    let (server, inbox, address) = listener(Config::default());
    let client = engine(Config::default());
    let mut n = 0;
    for _ in 0..10 {
        let mut stalling = stall();
        while stalling.try_wait().unwrap().is_none() {
            send(&client, &address, message(Publish, n, TIMEOUT)).unwrap();
            n += 1;
        }
    }
    until("all arrive", || inbox.len() as u64 == n);
    assert_eq!(inbox.disorder(), None);
    assert_eq!(client.stats().peers[0].dials, 1);
    client.stop();
    server.stop();
}
