//! The local gateway of macula: what arrives at this node is handed over to it.
//!
//! A gateway answers on the stream that a message came on, so a message goes to it over its own stream, frame
//! untouched, and the answers on it go to the sender. The connections are those of a [`Peer`]: pacing, suspicion and
//! what happens to messages whose connection dies are as for any 0.14.3 gateway.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use macula_peer_core::config::{Config, HandOver, LocalGateway};
use macula_peer_core::counter::Counter;
use macula_peer_core::errors::{Rejection, SendError};
use macula_peer_core::gateway_pool::{self, Presence};
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::lanes::LARGE_FRAME;
use macula_peer_core::proto::answers;
use macula_peer_core::stats::GatewayStats;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, PeerName, Target};
use macula_peer_wire::{Limits, MessageType, PayloadError, check_payload};
use tokio::sync::Notify;

use crate::call::Call;
use crate::inbound::{Inbound, NotTaken, Unhandled};
use crate::inbox::{Forward, Inbox};
use crate::lifecycle::Lifecycle;
use crate::message::{Envelope, Message, Requester};
use crate::peer::{Host, Peer};

/// How long a message may take to be taken by the gateway, and is sent again if its connection dies. As long as the
/// original's senders wait; one that is restarted by its supervisor is back before.
const WITHIN: Duration = Duration::from_secs(5);

/// How long the answer to a message that is looked up in tables, and not computed, is listened for.
const SOON: Duration = Duration::from_secs(5);

/// Messages that may wait for the gateway before less is read from their senders: as many as it takes in some
/// milliseconds.
const MAX_AHEAD: usize = 1024;

/// Makes a peer whose task runs. `None`: the engine is gone.
type Start = dyn Fn(PeerName, Weak<dyn Host>) -> Option<Arc<Peer>> + Send + Sync;

/// The gateway, and the messages in flight to it.
pub(crate) struct Gateway {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    start: Box<Start>,
    endpoint: Endpoint,
    when: HandOver,
    /// More than one where many slow answers are waited for.
    lines: Mutex<Vec<GatewayConnection>>,
    presence: Mutex<Presence>,
    /// Messages that were not taken yet.
    waiting: AtomicUsize,
    room: Notify,
    handed_over: Counter,
    answered: Arc<Counter>,
    fallen_back: Counter,
}

/// One connection, or several one after the other.
struct GatewayConnection {
    peer: Arc<Peer>,
    /// Slow answers that are waited for.
    slow: Arc<AtomicUsize>,
}

impl Gateway {
    pub(crate) fn new(
        gateway: &LocalGateway,
        config: Arc<Config>,
        lifecycle: Arc<Lifecycle>,
        start: impl Fn(PeerName, Weak<dyn Host>) -> Option<Arc<Peer>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            lifecycle,
            start: Box::new(start),
            endpoint: gateway.endpoint.clone(),
            when: gateway.when,
            config,
            lines: Mutex::default(),
            presence: Mutex::default(),
            waiting: AtomicUsize::new(0),
            room: Notify::new(),
            handed_over: Counter::default(),
            answered: Arc::default(),
            fallen_back: Counter::default(),
        }
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
    fn take_large(self: &Arc<Self>, inbox: &Arc<Inbox>, frame: Bytes, inbound: Inbound) -> Result<(), PayloadError> {
        match inbox.to_fallback(inbound) {
            Ok(()) => {
                self.fallen_back.add(1);
            }
            Err(NotTaken::Malformed(error)) => {
                inbox.not_handled(&Unhandled::Malformed(error.clone()));
                return Err(error);
            }
            // Another version may read it.
            Err(NotTaken::Absent(inbound)) => self.hand_over(inbox, frame, *inbound),
        }
        Ok(())
    }

    fn hand_over(self: &Arc<Self>, inbox: &Arc<Inbox>, frame: Bytes, mut inbound: Inbound) {
        let slow = matches!(inbound.kind, MessageType::RpcRequest | MessageType::Call);
        let token = inbound.reply.take().filter(|_| inbound.kind.is_answered());
        let slow = slow && token.is_some();
        let Some((peer, waiting)) = self.line(slow) else { return inbox.not_handled(&Unhandled::NoHandler) };
        let answer_timeout = self.config.answer_timeout;
        let patience = if slow { answer_timeout } else { answer_timeout.min(SOON) };
        let requester = token.map(|token| {
            Arc::new(Requester { token, patience, slow: slow.then_some(waiting), answered: self.answered.clone() })
        });
        let now = Instant::now();
        let message = Message { frame, kind: inbound.kind, deadline: Some(now + WITHIN), key: None };
        let Err(envelope) = peer.send_now(Envelope::handed_on(message, requester.clone()), now) else {
            self.handed_over.add(1);
            return;
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let (gateway, owner) = (self.clone(), inbox.clone());
        let call = Call::new(move |sent| gateway.settled(&owner, inbound, requester.as_deref(), sent));
        if peer.send(envelope.clone(), &call).is_ok() {
            return;
        }
        // It was not used for long, and is no longer among the lines.
        while let Some((peer, _)) = self.line(false) {
            if peer.send(envelope.clone(), &call).is_ok() {
                return;
            }
        }
        call.answer(Err(SendError::Stopped));
    }

    /// The peer for a message. `None`: the engine is stopping.
    fn line(self: &Arc<Self>, slow: bool) -> Option<(Arc<Peer>, Arc<AtomicUsize>)> {
        let mut lines = lock(&self.lines);
        if self.lifecycle.is_stopping() {
            return None;
        }
        let waiting: Vec<_> = lines.iter().map(|line| line.slow.load(Ordering::Relaxed)).collect();
        let index = match gateway_pool::line(&waiting, slow) {
            gateway_pool::PoolSlot::Present(index) => index,
            gateway_pool::PoolSlot::New => {
                let peer = (self.start)(PeerName::Gateway(self.endpoint.clone()), Arc::downgrade(self) as _)?;
                lines.push(GatewayConnection { peer, slow: Arc::default() });
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
        inbox: &Arc<Inbox>,
        mut inbound: Inbound,
        requester: Option<&Requester>,
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
                inbound.reply = requester.and_then(|requester| requester.token.hand_on());
                self.fall_back_later(inbox, inbound);
            }
            Err(SendError::Stopped) => inbox.not_handled(&Unhandled::NoHandler),
            Err(_) => inbox.not_handled(&Unhandled::TooMany),
        }
    }

    /// Its sender has been told that it was taken. If it cannot be, it is counted.
    fn fall_back_later(self: &Arc<Self>, inbox: &Arc<Inbox>, inbound: Inbound) {
        if !is_heavy(&inbound.payload) {
            return drop(self.fall_back(inbox, inbound));
        }
        let (gateway, owner, sender) = (self.clone(), inbox.clone(), inbound.sender());
        let decoding = inbox.decoding.clone();
        self.lifecycle.spawn(async move {
            decoding.run(sender, move || drop(gateway.fall_back(&owner, inbound))).await;
        });
    }

    fn fall_back(&self, inbox: &Inbox, inbound: Inbound) -> Result<(), PayloadError> {
        let taken = match inbox.to_fallback(inbound) {
            Ok(()) => Ok(()),
            Err(NotTaken::Malformed(error)) => {
                let why = Unhandled::Malformed(error);
                inbox.not_handled(&why);
                Err(why)
            }
            Err(NotTaken::Absent(inbound)) => inbox.to_handler(*inbound),
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

impl Forward for Arc<Gateway> {
    fn is_wanted(&self, handler: bool) -> bool {
        match self.when {
            HandOver::Always => true,
            HandOver::WithoutHandler => !handler,
        }
    }

    fn is(&self, name: &PeerName, remote: SocketAddr) -> bool {
        let is_there = match self.endpoint.ip() {
            Some(ip) => remote.ip() == ip,
            None => false,
        };
        let is_loopback = self.endpoint.is_loopback() && remote.ip().is_loopback();
        let is_called_so = matches!(name, PeerName::Endpoint(endpoint) if *endpoint == self.endpoint);
        is_called_so || (remote.port() == self.endpoint.port() && (is_there || is_loopback))
    }

    fn take(&self, inbox: &Arc<Inbox>, frame: Bytes, inbound: Inbound) -> Result<(), Rejection> {
        let limits = self.config.limits;
        // The gateway would build it, and on this host.
        let checked = check_payload(&inbound.payload, limits);
        if let Err(error @ (PayloadError::TooDeep { .. } | PayloadError::TooManyTerms { .. })) = checked {
            inbox.not_handled(&Unhandled::Malformed(error.clone()));
            return Err(Rejection::from(&error));
        }
        let taken = match inbound.kind {
            MessageType::Ping | MessageType::NatProbe => return answer(inbox, limits, &inbound),
            _ if lock(&self.presence).is_absent(Instant::now()) => self.fall_back(inbox, inbound),
            _ if frame.len() >= LARGE_FRAME => self.take_large(inbox, frame, inbound),
            _ => {
                self.hand_over(inbox, frame, inbound);
                Ok(())
            }
        };
        taken.map_err(|error| Rejection::from(&error))
    }

    fn room(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            loop {
                let freed = self.room.notified();
                if !self.is_crowded() {
                    return;
                }
                freed.await;
            }
        })
    }

    fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= MAX_AHEAD
    }
}

/// The gateway would say that the message came from this host.
fn answer(inbox: &Inbox, limits: Limits, inbound: &Inbound) -> Result<(), Rejection> {
    let Some(token) = &inbound.reply else { return Ok(()) };
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
        // The requester may be gone.
        Some(frame) => drop(token.reply(frame)),
        None => return Err(inbox.malformed()),
    }
    Ok(())
}

impl Host for Gateway {
    /// It passes messages on to none.
    fn peer(self: Arc<Self>, _: &Target<'_>) -> Option<Arc<Peer>> {
        None
    }

    fn forget(&self, peer: &Arc<Peer>) {
        let mut lines = lock(&self.lines);
        let idle = |line: &GatewayConnection| Arc::ptr_eq(&line.peer, peer) && line.slow.load(Ordering::Relaxed) == 0;
        if lines.iter().any(idle) {
            lines.retain(|line| !idle(line));
            peer.retire();
        }
    }

    fn gone(&self, peer: &Arc<Peer>) {
        lock(&self.lines).retain(|line| !Arc::ptr_eq(&line.peer, peer));
    }

    fn linked(&self) {
        lock(&self.presence).found();
    }
}
