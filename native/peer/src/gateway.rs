//! The local gateway of macula: what arrives at this node is handed over to it.
//!
//! A gateway answers on the stream that a message came on, so a message goes to it over a stream of its own, frame
//! untouched, and what comes back there goes to the sender. The connections are those of a [`Peer`]: politeness, doubt and
//! what happens to messages whose connection dies are as for any 0.14.3 gateway.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use macula_peer_core::errors::{Rejection, SendError};
use macula_peer_core::handover::{self, Presence};
use macula_peer_core::lanes::LARGE_FRAME;
use macula_peer_core::proto::answers;
use macula_peer_core::types::{Endpoint, PeerName};
use macula_peer_wire::{MessageType, PayloadError, RawFrame, check_payload};
use tokio::sync::Notify;

use crate::call::Call;
use crate::config::{Config, HandOver, LocalGateway};
use crate::counters::Counter;
use crate::decoding::is_heavy;
use crate::inbound::{Inbound, NotTaken, Unhandled};
use crate::link::Link;
use crate::message::{Asker, Letter, Message};
use crate::node::Node;
use crate::peer::Peer;
use crate::stats::GatewayStats;
use crate::sync::lock;

/// How long a message may take to be taken by the gateway, and is sent again if its connection dies. As long as the
/// original's senders wait; one that is restarted by its supervisor is back before.
const WITHIN: Duration = Duration::from_secs(5);

/// How long the answer to a message that is looked up in tables, and not computed, is listened for.
const SOON: Duration = Duration::from_secs(5);

/// Messages that may wait for the gateway before less is read of those who send: some milliseconds of what it takes.
const MAX_AHEAD: usize = 1024;

/// The gateway, and the messages that are on their way to it.
pub(crate) struct Gateway {
    endpoint: Endpoint,
    when: HandOver,
    answer_timeout: Duration,
    /// More than one where many slow answers are waited for.
    lines: Mutex<Vec<Line>>,
    presence: Mutex<Presence>,
    /// Messages that were not taken yet.
    waiting: AtomicUsize,
    room: Notify,
    handed_over: Counter,
    answered: Counter,
    fallen_back: Counter,
}

/// One connection, or several one after the other.
struct Line {
    peer: Arc<Peer>,
    /// Slow answers that are waited for.
    slow: Arc<AtomicUsize>,
}

impl Gateway {
    pub(crate) fn new(gateway: &LocalGateway, config: &Config) -> Self {
        Self {
            endpoint: gateway.endpoint.clone(),
            when: gateway.when,
            answer_timeout: config.answer_timeout,
            lines: Mutex::default(),
            presence: Mutex::default(),
            waiting: AtomicUsize::new(0),
            room: Notify::new(),
            handed_over: Counter::default(),
            answered: Counter::default(),
            fallen_back: Counter::default(),
        }
    }

    /// Whether it gets what arrives.
    pub(crate) fn is_wanted(&self, handler: bool) -> bool {
        match self.when {
            HandOver::Always => true,
            HandOver::WithoutHandler => !handler,
        }
    }

    /// Whether a peer that was dialled is the gateway.
    pub(crate) fn is(&self, name: &PeerName, link: &Link) -> bool {
        let remote = link.remote();
        let is_there = match self.endpoint.ip() {
            Some(ip) => remote.ip() == ip,
            None => false,
        };
        let is_loopback = self.endpoint.is_loopback() && remote.ip().is_loopback();
        let is_called_so = matches!(name, PeerName::Endpoint(endpoint) if *endpoint == self.endpoint);
        is_called_so || (remote.port() == self.endpoint.port() && (is_there || is_loopback))
    }

    /// Hands a message over, unless it is one that this node answers itself.
    pub(crate) fn take(self: &Arc<Self>, node: &Arc<Node>, frame: Bytes, inbound: Inbound) -> Result<(), Rejection> {
        // The gateway would build it, and on this host.
        let checked = check_payload(&inbound.payload, node.config.limits);
        if let Err(error @ (PayloadError::TooDeep { .. } | PayloadError::TooManyTerms { .. })) = checked {
            node.not_handled(&Unhandled::Malformed(error.clone()));
            return Err(Rejection::from(&error));
        }
        let taken = match inbound.kind {
            MessageType::Ping | MessageType::NatProbe => return answer(node, &inbound),
            _ if lock(&self.presence).is_absent(Instant::now()) => self.fall_back(node, inbound),
            _ if frame.len() >= LARGE_FRAME => self.take_large(node, frame, inbound),
            _ => {
                self.hand_over(node, frame, inbound);
                Ok(())
            }
        };
        taken.map_err(|error| Rejection::from(&error))
    }

    /// Waits until there is room for more messages.
    pub(crate) async fn room(&self) {
        loop {
            let freed = self.room.notified();
            if !self.is_crowded() {
                return;
            }
            freed.await;
        }
    }

    pub(crate) fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= MAX_AHEAD
    }

    /// A connection to it is up.
    pub(crate) fn found(&self) {
        lock(&self.presence).found();
    }

    /// Its answer to a message.
    pub(crate) fn answered(&self, asker: &Asker, frame: RawFrame) {
        // Who asked may be gone.
        if asker.token.reply(frame.into_bytes()).is_ok() {
            self.answered.add(1);
        }
    }

    /// A connection that was not used for long.
    pub(crate) fn forget(&self, peer: &Arc<Peer>) {
        let mut lines = lock(&self.lines);
        let idle = |line: &Line| Arc::ptr_eq(&line.peer, peer) && line.slow.load(Ordering::Relaxed) == 0;
        if lines.iter().any(idle) {
            lines.retain(|line| !idle(line));
            peer.retire();
        }
    }

    /// The task of a connection has ended.
    pub(crate) fn gone(&self, peer: &Arc<Peer>) {
        lock(&self.lines).retain(|line| !Arc::ptr_eq(&line.peer, peer));
    }

    pub(crate) fn stats(&self) -> GatewayStats {
        GatewayStats {
            endpoint: self.endpoint.clone(),
            handed_over: self.handed_over.get(),
            answered: self.answered.get(),
            fallen_back: self.fallen_back.get(),
        }
    }

    /// A 0.14.3 gateway would lose it, and its transport say that it has arrived.
    fn take_large(self: &Arc<Self>, node: &Arc<Node>, frame: Bytes, inbound: Inbound) -> Result<(), PayloadError> {
        match node.to_fallback(inbound) {
            Ok(()) => {
                self.fallen_back.add(1);
            }
            Err(NotTaken::Malformed(error)) => {
                node.not_handled(&Unhandled::Malformed(error.clone()));
                return Err(error);
            }
            // Another version may read it.
            Err(NotTaken::Absent(inbound)) => self.hand_over(node, frame, *inbound),
        }
        Ok(())
    }

    fn hand_over(self: &Arc<Self>, node: &Arc<Node>, frame: Bytes, mut inbound: Inbound) {
        let slow = matches!(inbound.kind, MessageType::RpcRequest | MessageType::Call);
        let token = inbound.reply.take().filter(|_| inbound.kind.is_answered());
        let slow = slow && token.is_some();
        let Some((peer, waiting)) = self.line(node, slow) else { return node.not_handled(&Unhandled::NoHandler) };
        let patience = if slow { self.answer_timeout } else { self.answer_timeout.min(SOON) };
        let asker = token.map(|token| Arc::new(Asker { token, patience, slow: slow.then_some(waiting) }));
        let now = Instant::now();
        let message = Message { frame, kind: inbound.kind, deadline: Some(now + WITHIN), key: None };
        let Err(letter) = peer.send_now(Letter::handed_on(message, asker.clone()), now) else {
            self.handed_over.add(1);
            return;
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let (gateway, owner) = (self.clone(), node.clone());
        let call = Call::new(move |sent| gateway.settled(&owner, inbound, asker.as_deref(), sent));
        if peer.send(letter.clone(), &call).is_ok() {
            return;
        }
        // It was not used for long, and is no longer among the lines.
        while let Some((peer, _)) = self.line(node, false) {
            if peer.send(letter.clone(), &call).is_ok() {
                return;
            }
        }
        call.answer(Err(SendError::Stopped));
    }

    /// The peer for a message. `None`: the engine is stopping.
    fn line(&self, node: &Arc<Node>, slow: bool) -> Option<(Arc<Peer>, Arc<AtomicUsize>)> {
        let mut lines = lock(&self.lines);
        if node.is_stopping() {
            return None;
        }
        let waiting: Vec<_> = lines.iter().map(|line| line.slow.load(Ordering::Relaxed)).collect();
        let index = match handover::line(&waiting, slow) {
            handover::Line::Present(index) => index,
            handover::Line::New => {
                let peer = Peer::new(PeerName::Gateway(self.endpoint.clone()), node.clone());
                node.spawn(crate::peer::run(peer.clone()));
                lines.push(Line { peer, slow: Arc::default() });
                lines.len() - 1
            }
        };
        let line = &lines[index];
        if slow {
            line.slow.fetch_add(1, Ordering::Relaxed);
        }
        Some((line.peer.clone(), line.slow.clone()))
    }

    /// A message that had to wait was taken, or not.
    fn settled(
        self: &Arc<Self>,
        node: &Arc<Node>,
        mut inbound: Inbound,
        asker: Option<&Asker>,
        sent: Result<(), SendError>,
    ) {
        if self.waiting.fetch_sub(1, Ordering::Relaxed) == MAX_AHEAD {
            self.room.notify_waiters();
        }
        match sent {
            Ok(()) => {
                self.handed_over.add(1);
            }
            Err(SendError::Connect(error)) => {
                tracing::debug!(%error, gateway = %self.endpoint, "no gateway");
                lock(&self.presence).missed(Instant::now());
                inbound.reply = asker.and_then(|asker| asker.token.hand_on());
                self.fall_back_later(node, inbound);
            }
            Err(SendError::Stopped) => node.not_handled(&Unhandled::NoHandler),
            Err(_) => node.not_handled(&Unhandled::TooMany),
        }
    }

    /// Its sender has been told that it was taken. If it cannot be, it is counted.
    fn fall_back_later(self: &Arc<Self>, node: &Arc<Node>, inbound: Inbound) {
        if !is_heavy(&inbound.payload) {
            return drop(self.fall_back(node, inbound));
        }
        let (gateway, owner, sender) = (self.clone(), node.clone(), inbound.sender());
        let decoding = node.decoding.clone();
        node.spawn(async move {
            decoding.run(sender, move || drop(gateway.fall_back(&owner, inbound))).await;
        });
    }

    fn fall_back(&self, node: &Node, inbound: Inbound) -> Result<(), PayloadError> {
        let taken = match node.to_fallback(inbound) {
            Ok(()) => Ok(()),
            Err(NotTaken::Malformed(error)) => {
                let why = Unhandled::Malformed(error);
                node.not_handled(&why);
                Err(why)
            }
            Err(NotTaken::Absent(inbound)) => node.to_handler(*inbound),
        };
        match taken {
            Ok(()) => {
                self.fallen_back.add(1);
                Ok(())
            }
            Err(Unhandled::Malformed(error)) => Err(error),
            Err(_) => Ok(()),
        }
    }
}

/// The gateway would say that the message came from this host.
fn answer(node: &Node, inbound: &Inbound) -> Result<(), Rejection> {
    let Some(token) = &inbound.reply else { return Ok(()) };
    let limits = node.config.limits;
    let frame = match inbound.kind {
        MessageType::NatProbe if inbound.path.is_relayed() => {
            // Only the relay knows the sender's address.
            tracing::debug!("a nat_probe came through a relay");
            return Ok(());
        }
        MessageType::NatProbe => answers::nat_probe_reply(&inbound.payload, inbound.from, SystemTime::now(), limits),
        _ => answers::pong(&inbound.payload, SystemTime::now(), limits),
    };
    match frame {
        // Who asked may be gone.
        Some(frame) => drop(token.reply(frame)),
        None => return Err(node.malformed()),
    }
    Ok(())
}
