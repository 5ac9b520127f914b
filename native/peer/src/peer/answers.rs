//! Answers to messages that were sent without waiting.

use std::sync::Arc;

use macula_peer_core::errors::Rejection;
use macula_peer_core::growth::Growth;
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::types::{PeerName, Sender};
use macula_peer_wire::RawFrame;
use quinn::RecvStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Peer;
use crate::inbound::Inbound;
use crate::link::Link;
use crate::transfer;
use crate::transport::MAX_ANSWERING;

/// Of answers beyond [`LARGE_ANSWER`] only some are read at once.
pub(super) const LARGE_ANSWERS: usize = 4;
const LARGE_ANSWER: usize = 256 << 10;

/// Reads the answers to messages that were sent without waiting, as long as the link lives.
pub(super) async fn read_answers(peer: Arc<Peer>, link: Arc<Link>) {
    link.connection.set_max_concurrent_uni_streams(MAX_ANSWERING.into());
    let large = Arc::new(Semaphore::new(LARGE_ANSWERS));
    let mut streams = JoinSet::new();
    loop {
        let receive = tokio::select! {
            Some(_) = streams.join_next() => continue,
            stream = link.connection.accept_uni() => match stream {
                Ok(receive) => receive,
                Err(_) => return,
            },
        };
        streams.spawn(read_answer(peer.clone(), link.clone(), receive, large.clone()));
    }
}

/// Reads until the stream ends, carries something that is not a frame, or makes no more progress.
async fn read_answer(peer: Arc<Peer>, link: Arc<Link>, mut receive: RecvStream, large: Arc<Semaphore>) {
    let mut frames = link.reassembler();
    let mut permit = None;
    let mut growth = Growth::default();
    let without_growth = peer.node.config.frame_timeout;
    while let Some(Ok(Some(chunk))) = transfer::read(&mut receive, usize::MAX, &mut growth, without_growth).await {
        peer.node.inbox.room(Sender::new(link.key(), link.remote())).await;
        frames.push(chunk.bytes);
        loop {
            match frames.next_frame() {
                Ok(Some(frame)) => {
                    growth = Growth::default();
                    peer.counters.received.add(1);
                    if is_heavy(frame.payload()) {
                        hand_over_heavy(peer.clone(), link.clone(), frame).await;
                        continue;
                    }
                    // It is counted.
                    let _ = hand_over(&peer, &link, frame);
                }
                Ok(None) => break,
                Err(_) => {
                    peer.node.inbox.malformed();
                    return;
                }
            }
        }
        if frames.buffered() <= LARGE_ANSWER {
            permit = None;
        } else if permit.is_none() {
            permit = large.acquire().await.ok();
        }
    }
}

pub(super) fn hand_over(peer: &Peer, link: &Link, frame: RawFrame) -> Result<(), Rejection> {
    let (from, dialect, path, key) = (link.remote(), link.dialect, link.path, link.key());
    let inbound = |kind, payload| Inbound { kind, payload, from, path, key, dialect, reply: None };
    match &peer.name {
        // An unsolicited answer.
        PeerName::Gateway(_) => {
            tracing::debug!("an unsolicited message from the gateway");
            Ok(())
        }
        // Its answer to this very node: it is not told what it said.
        name if peer.node.inbox.is_gateway(name, link.remote()) => peer.node.inbox.deliver_here(frame, inbound),
        _ => peer.node.inbox.deliver(frame, inbound),
    }
}

pub(super) async fn hand_over_heavy(peer: Arc<Peer>, link: Arc<Link>, frame: RawFrame) {
    let decoding = peer.node.inbox.decoding.clone();
    let sender = Sender::new(link.key(), link.remote());
    // It is counted.
    let _ = decoding.run(sender, move || hand_over(&peer, &link, frame)).await;
}
