//! Messages arrive over paths that lose packets, and most of them soon.
#![allow(clippy::print_stdout)]

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Forwarder, PATIENCE, member, message, over, relay, send_to_node};
use macula_peer_wire::MessageType::Publish;

/// For each direction: a round trip of 400 ms, and a loss of one packet in ten. With twice the loss, one handshake in a
/// thousand takes more than 10 s and is given up.
const DELAY: Duration = Duration::from_millis(100);
const LOSS: f64 = 0.05;

/// Pairs of nodes at once. `RUNS` in the environment: as many, to measure.
const RUNS: u64 = 12;

/// Which packets are lost depends on how they interleave: the seeds do not make two runs the same. Without a loss it takes
/// 800 ms, and half of them may take as long as this on a busy machine.
const SOON: Duration = Duration::from_secs(4);

#[test]
fn a_first_message_arrives_through_a_relay_though_many_packets_are_lost() {
    let (relay, address) = relay(0);
    let runs = std::env::var("RUNS").map_or(RUNS, |runs| runs.parse().unwrap());
    let runs: Vec<_> = (0..runs)
        .map(|run| {
            let address = address.clone();
            thread::spawn(move || first_message(run, &address))
        })
        .collect();
    let mut took: Vec<_> = runs.into_iter().map(|run| run.join().unwrap()).collect();
    took.sort_unstable();
    let seconds: Vec<_> = took.iter().map(|(took, dials)| format!("{:.2} ({dials})", took.as_secs_f64())).collect();
    println!("seconds (dials): {}", seconds.join(", "));
    assert!(took[took.len() / 2].0 < SOON, "half of them late: {seconds:?}");
    relay.stop();
}

/// How long it took to arrive, and how often its sender began to look for a link.
fn first_message(run: u64, relay: &str) -> (Duration, u64) {
    let leg = |side| Forwarder::new(relay.parse().unwrap(), run * 2 + side, LOSS, DELAY);
    let (to_target, to_sender) = (leg(0), leg(1));
    let name = format!("target-{run}");
    let (target, inbox) = member(&name, &[&to_target.address.to_string()]);
    let relay = to_sender.address.to_string();
    let (sender, _) = member(&format!("sender-{run}"), &[&relay]);
    let begun = Instant::now();
    send_to_node(&sender, &name, over(&[&relay]), message(Publish, run, PATIENCE)).unwrap();
    while inbox.len() == 0 {
        assert!(begun.elapsed() < PATIENCE, "run {run}: not in time");
        thread::sleep(Duration::from_millis(5));
    }
    let took = begun.elapsed();
    let peers = sender.stats().peers;
    assert_eq!(peers[0].failed, 0, "run {run}");
    let dials = peers[0].dials;
    sender.stop();
    target.stop();
    assert_eq!(inbox.numbers(), [run], "it comes once");
    (took, dials)
}
