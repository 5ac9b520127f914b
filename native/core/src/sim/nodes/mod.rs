//! Whole nodes in virtual time. What a node decides is the real code: races and the life of links, queues, sessions, trust,
//! relays' books, NAT detection and punches. The network and QUIC are models. Every run looks at the promises
//! ([`promises`]); docs/internals/simulation.md has the table of scenarios.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use self::network::SECOND;
use self::promises::Promises;
use self::scenario::{More, Theme};
use self::world::World;
use crate::sync::lock;

mod detection;
mod gateway;
mod network;
mod node;
mod peer;
mod promises;
mod punch;
mod quic;
mod registration;
mod relay;
mod request;
mod scenario;
mod world;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What there was in some runs.
#[derive(Debug, Default)]
struct Played {
    events: u64,
    /// How often a node found out something about its NAT, and how often it took it for stricter than it is.
    looks: u64,
    too_strict: u64,
}

/// Plays one run. An error says which promise it broke.
fn play(seed: u64, seconds: u64, traced: bool) -> Result<Played, String> {
    let theme = Theme::ALL[(seed % Theme::ALL.len() as u64) as usize];
    let mut world = World::new(seed, traced);
    let more = match seed / Theme::ALL.len() as u64 % 5 {
        3 => More::Requests,
        4 => More::Gateways,
        _ => More::Nothing,
    };
    world.populate(theme, more, seconds * SECOND);
    world.run(seconds * SECOND);
    world.check_all();
    match world.promises.broken {
        Some(broken) => Err(format!("{theme:?}: {broken}")),
        None => {
            let Promises { looks, too_strict, .. } = world.promises;
            Ok(Played { events: world.happened, looks, too_strict })
        }
    }
}

/// A lost packet and its repetition take several seconds there.
#[test]
fn a_slow_link_that_loses_packets_is_not_given_up() {
    let mut given_up = 0;
    for seed in 0..200 {
        let mut world = World::new(seed, false);
        world.populate_slow(120 * SECOND);
        world.run(120 * SECOND);
        assert_eq!(world.promises.broken, None, "seed {seed}");
        assert!(world.promises.has_arrived_all(), "seed {seed}");
        given_up += world.promises.given_up;
    }
    // Of some 13,000 messages.
    assert!(given_up <= 2, "{given_up} links");
}

/// `SEED=n` plays one run with a trace. `RUNS` and `SECONDS` say how many there are, and how long each is.
#[test]
fn nodes_keep_their_promises_whatever_happens() {
    let seconds = variable("SECONDS").unwrap_or(60);
    if let Some(seed) = variable("SEED") {
        let played = play(seed, seconds, true);
        assert!(played.is_ok(), "SEED={seed}: {played:?}");
        return;
    }
    let runs = variable("RUNS").unwrap_or(20_000);
    let first = variable("FIRST").unwrap_or(0);
    let (next, played, begun) = (AtomicU64::new(first), Mutex::new(Played::default()), Instant::now());
    let failures = std::thread::scope(|scope| {
        let play_some = || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + runs {
                    return None;
                }
                match play(seed, seconds, false) {
                    Ok(Played { events, looks, too_strict }) => {
                        let mut all = lock(&played);
                        all.events += events;
                        all.looks += looks;
                        all.too_strict += too_strict;
                    }
                    Err(broken) => {
                        // The other thread ends too.
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                        return Some(format!("SEED={seed}: {broken}"));
                    }
                }
            }
        };
        let threads = [(); 2].map(|()| scope.spawn(play_some));
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let played = lock(&played);
    println!("{runs} runs, {played:?}, {:?}", begun.elapsed());
    assert!(failures.is_empty(), "{failures:#?}");
    // An answer that comes unasked is lost three times.
    assert!(played.too_strict * 100 <= played.looks, "{played:?}");
}
