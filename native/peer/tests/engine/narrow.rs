//! Circuits over paths with a small MTU, and over paths whose MTU drops while they are in use.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::common::{Forwarder, Inbox, engine, frame, member, over, relay, send_to_node, until};
use macula_peer::{Config, Engine, Message};
use macula_peer_wire::MessageType::Publish;

/// A UDP packet of IPv6 on a link of 1,280 bytes, the smallest that there is: 40 bytes of header, 8 of UDP's.
const NARROW: usize = 1280 - 48;

/// After this a link is suspect.
const SILENCE: Duration = Duration::from_millis(500);

/// Sender and target, each behind a path of its own to the relay.
struct Net {
    relay: Engine,
    paths: [Forwarder; 2],
    sender: Arc<Engine>,
    target: Engine,
    inbox: Arc<Inbox>,
}

impl Net {
    fn new(widest: [usize; 2]) -> Self {
        let (relay, address) = relay(0);
        let paths = widest.map(|widest| {
            let path = Forwarder::new(address.parse().unwrap(), 0, 0.0, Duration::ZERO);
            path.narrow(widest);
            path
        });
        let (target, inbox) = member("target", &[&paths[1].address.to_string()]);
        Self { relay, paths, sender: Arc::new(engine(Config::default())), target, inbox }
    }

    /// Sends numbered messages, slowly enough that some are still to be sent when the first have arrived.
    fn send(&self, total: u64) -> std::thread::JoinHandle<()> {
        let (sender, candidates) = (self.sender.clone(), over(&[&self.paths[0].address.to_string()]));
        std::thread::spawn(move || {
            for n in 0..total {
                let deadline = Some(Instant::now() + crate::common::PATIENCE);
                let message = Message { frame: frame(Publish, n, 1000), kind: Publish, deadline, key: None };
                send_to_node(&sender, "target", candidates.clone(), message).unwrap();
                if n % 10 == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        })
    }

    fn all_arrive_once_and_in_order(&self, total: u64) {
        until("all arrive", || self.inbox.len() as u64 >= total);
        assert_eq!((self.inbox.disorder(), self.inbox.len() as u64), (None, total));
    }

    /// Packets that were too wide for a leg.
    fn lost(&self, leg: usize) -> usize {
        self.paths[leg].too_wide.load(Ordering::Relaxed)
    }

    fn stop(self) {
        for engine in [&*self.sender, &self.target, &self.relay] {
            engine.stop();
        }
    }
}

#[test]
fn a_circuit_works_where_a_leg_carries_only_small_packets() {
    for widest in [[NARROW, usize::MAX], [usize::MAX, NARROW], [NARROW, NARROW]] {
        let net = Net::new(widest);
        let sending = net.send(500);
        net.all_arrive_once_and_in_order(500);
        sending.join().unwrap();
        net.stop();
    }
}

#[test]
fn a_circuit_goes_on_when_a_leg_becomes_narrow() {
    for leg in 0..2 {
        let net = Net::new([usize::MAX; 2]);
        let sending = net.send(4000);
        until("some have arrived", || net.inbox.len() > 1000);
        net.paths[leg].narrow(NARROW);
        net.all_arrive_once_and_in_order(4000);
        sending.join().unwrap();
        assert!(net.lost(leg) > 0, "it was in use");
        net.stop();
    }
}

/// Nothing else is in flight that would show which packets are lost.
#[test]
fn a_lone_large_message_arrives_after_a_leg_has_become_narrow() {
    for leg in 0..2 {
        let net = Net::new([usize::MAX; 2]);
        let candidates = over(&[&net.paths[0].address.to_string()]);
        net.send(500).join().unwrap();
        net.all_arrive_once_and_in_order(500);
        net.paths[leg].narrow(NARROW);
        let deadline = Some(Instant::now() + crate::common::PATIENCE);
        let begun = Instant::now();
        let message = Message { frame: frame(Publish, 500, 30_000), kind: Publish, deadline, key: None };
        send_to_node(&net.sender, "target", candidates, message).unwrap();
        net.all_arrive_once_and_in_order(501);
        assert!(begun.elapsed() < 10 * SILENCE, "{:?}", begun.elapsed());
        assert!(net.lost(leg) > 0, "it does not fit");
        net.stop();
    }
}
