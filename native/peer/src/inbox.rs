//! Incoming messages and events: which receiver gets a message, and what the handler is told.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::counter::Counter;
use macula_peer_core::errors::{Rejection, UndeliveredReason};
use macula_peer_core::events::{Event, Registration};
use macula_peer_core::reports::Reports;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Endpoint, PeerName, Sender};
use macula_peer_wire::{Limits, MessageType, RawFrame, check_payload};
use tokio::time::timeout;

use crate::backlog::Backlog;
use crate::decoding::Decoding;
use crate::inbound::{Fallback, Handler, Inbound, NotTaken, Unhandled};
use crate::lifecycle::Lifecycle;

/// How long events wait for the first handler: that of the settings is set after the engine has started.
const EARLY: Duration = Duration::from_secs(1);
const MAX_EARLY: usize = 64;

/// The receivers that come before the handler.
pub(crate) trait Forward: Send + Sync {
    /// Whether it gets messages. `handled`: there is a handler.
    fn is_wanted(&self, handled: bool) -> bool;

    /// Whether it is at the other end of a link to a peer.
    fn is(&self, name: &PeerName, remote: SocketAddr) -> bool;

    /// Hands a message over.
    fn take(&self, inbox: &Arc<Inbox>, frame: Bytes, inbound: Inbound) -> Result<(), Rejection>;

    /// Whether too many messages wait for it.
    fn is_crowded(&self) -> bool;

    /// Waits until they are fewer.
    fn room(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

pub(crate) struct Inbox {
    limits: Limits,
    handler: RwLock<Option<Arc<dyn Handler>>>,
    fallback: RwLock<Option<Arc<dyn Fallback>>>,
    forward: Option<Box<dyn Forward>>,
    pub(crate) backlog: Arc<Backlog>,
    pub(crate) decoding: Arc<Decoding>,
    /// What was logged because no handler took it.
    reports: Mutex<Reports<Report>>,
    /// Events from the start, before the handler is set.
    early: Mutex<Option<Vec<Event>>>,
    lifecycle: Arc<Lifecycle>,
    undelivered: Counter,
    unhandled: Counter,
    malformed: Counter,
}

/// Messages that were not delivered to a peer, not handled here, or not readable.
pub(crate) struct InboxCounts {
    pub(crate) undelivered: u64,
    pub(crate) unhandled: u64,
    pub(crate) malformed: u64,
}

impl Inbox {
    pub(crate) fn new(limits: Limits, forward: Option<Box<dyn Forward>>, lifecycle: Arc<Lifecycle>) -> Arc<Self> {
        let backlog = Arc::<Backlog>::default();
        Arc::new(Self {
            limits,
            handler: RwLock::default(),
            fallback: RwLock::default(),
            forward,
            decoding: Decoding::new(backlog.clone()),
            backlog,
            reports: Mutex::default(),
            early: Mutex::new(Some(Vec::new())),
            lifecycle,
            undelivered: Counter::default(),
            unhandled: Counter::default(),
            malformed: Counter::default(),
        })
    }

    /// Logs early events if there is no handler by then.
    pub(crate) async fn end_early(self: Arc<Self>) {
        let mut stopping = self.lifecycle.stopping();
        let _ = timeout(EARLY, stopping.wait_for(|stopping| *stopping)).await;
        self.tell_early();
    }

    pub(crate) fn set_handler(self: &Arc<Self>, handler: Option<Arc<dyn Handler>>) {
        let is_set = handler.is_some();
        *self.handler.write().unwrap_or_else(PoisonError::into_inner) = handler;
        if is_set && lock(&self.early).is_some() {
            // All events come from the engine's threads, or some would overtake others before they reach the handler.
            let inbox = self.clone();
            self.lifecycle.spawn(async move { inbox.tell_early() });
        }
    }

    fn tell_early(&self) {
        // Locked, so that newer events do not overtake these.
        let mut early = lock(&self.early);
        early.take().into_iter().flatten().for_each(|event| self.tell_or_log(event));
    }

    pub(crate) fn set_fallback(&self, fallback: Option<Arc<dyn Fallback>>) {
        *self.fallback.write().unwrap_or_else(PoisonError::into_inner) = fallback;
    }

    /// Hands a frame to the local gateway or to the handler, in the order of the calls. An error: this node cannot
    /// take such a message, and counts it. A missing handler is no error.
    pub(crate) fn deliver(
        self: &Arc<Self>,
        frame: RawFrame,
        inbound: impl FnOnce(MessageType, Bytes) -> Inbound,
    ) -> Result<(), Rejection> {
        let wanted = self.forward.as_deref().filter(|forward| forward.is_wanted(self.has_handler()));
        let Some(forward) = wanted else { return self.deliver_here(frame, inbound) };
        let Some(kind) = MessageType::from_id(frame.type_id()) else { return Err(self.malformed()) };
        let whole = frame.bytes().clone();
        forward.take(self, whole, inbound(kind, frame.into_payload()))
    }

    /// Hands a frame to the handler.
    pub(crate) fn deliver_here(
        &self,
        frame: RawFrame,
        inbound: impl FnOnce(MessageType, Bytes) -> Inbound,
    ) -> Result<(), Rejection> {
        match MessageType::from_id(frame.type_id()) {
            Some(kind) => match self.to_handler(inbound(kind, frame.into_payload())) {
                Err(Unhandled::Malformed(error)) => Err(Rejection::from(&error)),
                Ok(()) | Err(_) => Ok(()),
            },
            None => Err(self.malformed()),
        }
    }

    /// Whether a message like this can be handed over. Messages that were not are found again by this.
    pub(crate) fn can_take(&self, frame: &RawFrame) -> Result<(), Rejection> {
        if MessageType::from_id(frame.type_id()).is_none() {
            return Err(Rejection::Malformed);
        }
        let for_gateway = self.forward.as_ref().is_some_and(|gateway| gateway.is_wanted(self.has_handler()));
        match check_payload(frame.payload(), self.limits).map_err(|error| Rejection::from(&error)) {
            // What a gateway makes of it is not known here.
            Err(Rejection::Malformed) if for_gateway => Ok(()),
            checked => checked,
        }
    }

    /// Hands a message to the handler. What is not taken is counted.
    pub(crate) fn to_handler(&self, message: Inbound) -> Result<(), Unhandled> {
        let handled = match self.handler() {
            Some(handler) => handler.message(message),
            None => Err(Unhandled::NoHandler),
        };
        handled.inspect_err(|why| self.not_handled(why))
    }

    /// Hands a message that the local gateway did not take to the fallback, which comes before the handler then.
    pub(crate) fn to_fallback(&self, message: Inbound) -> Result<(), NotTaken> {
        let fallback = self.fallback.read().unwrap_or_else(PoisonError::into_inner).clone();
        match fallback {
            Some(fallback) => fallback.message(message),
            None => Err(NotTaken::Absent(Box::new(message))),
        }
    }

    pub(crate) fn not_handled(&self, why: &Unhandled) {
        match why {
            Unhandled::Malformed(error) => {
                let _ = self.malformed();
                tracing::debug!(%error, "payload not read");
            }
            Unhandled::NoHandler | Unhandled::TooMany => {
                if self.unhandled.add(1) == 0 {
                    tracing::warn!(%why, "messages arrive and no handler takes them");
                }
            }
        }
    }

    /// Counts a message that cannot be read.
    pub(crate) fn malformed(&self) -> Rejection {
        self.malformed.add(1);
        Rejection::Malformed
    }

    /// Whether the local gateway, if there is one, is at the other end of a link.
    pub(crate) fn is_gateway(&self, name: &PeerName, remote: SocketAddr) -> bool {
        self.forward.as_ref().is_some_and(|gateway| gateway.is(name, remote))
    }

    /// Whether too many messages wait: for the local gateway, or from this sender for the handler.
    pub(crate) fn is_crowded(&self, sender: Sender) -> bool {
        self.backlog.is_full(sender) || self.forward.as_ref().is_some_and(|gateway| gateway.is_crowded())
    }

    /// Waits until they are fewer: nothing is read that could not be handed over.
    pub(crate) async fn room(&self, sender: Sender) {
        self.backlog.room(sender).await;
        if let Some(gateway) = self.forward.as_ref().filter(|gateway| gateway.is_crowded()) {
            gateway.room().await;
        }
    }

    pub(crate) fn undelivered(&self, event: Event, count: u64) {
        self.undelivered.add(count);
        self.event(event);
    }

    pub(crate) fn event(&self, event: Event) {
        match &mut *lock(&self.early) {
            Some(early) if early.len() < MAX_EARLY => return early.push(event),
            Some(_) => return self.log(Report::of(&event)),
            None => {}
        }
        self.tell_or_log(event);
    }

    fn tell_or_log(&self, event: Event) {
        let report = Report::of(&event);
        if !self.tell(event) {
            self.log(report);
        }
    }

    fn log(&self, report: Option<(Report, u64)>) {
        if let Some((report, times)) = report
            && let Some(times) = lock(&self.reports).happened(report.clone(), times, Instant::now())
        {
            report.log(times);
        }
    }

    /// Tells only the handler. Returns whether there was one.
    pub(crate) fn tell(&self, event: Event) -> bool {
        tracing::debug!(?event);
        self.handler().is_some_and(|handler| handler.event(event))
    }

    pub(crate) fn counts(&self) -> InboxCounts {
        InboxCounts {
            undelivered: self.undelivered.get(),
            unhandled: self.unhandled.get(),
            malformed: self.malformed.get(),
        }
    }

    fn has_handler(&self) -> bool {
        self.handler.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn handler(&self) -> Option<Arc<dyn Handler>> {
        self.handler.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What to log of an event that no handler takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Report {
    Undelivered(PeerName, UndeliveredReason),
    NotRegistered(Endpoint, Registration),
}

impl Report {
    /// With how many times it happened.
    fn of(event: &Event) -> Option<(Self, u64)> {
        match event {
            Event::Undelivered { peer, count, reason } => Some((Self::Undelivered(peer.clone(), *reason), *count)),
            Event::Registration { relay, state: state @ (Registration::Lost | Registration::Refused(_)) } => {
                Some((Self::NotRegistered(relay.clone(), *state), 1))
            }
            _ => None,
        }
    }

    fn log(&self, times: u64) {
        match self {
            Self::Undelivered(peer, reason) => {
                tracing::warn!(%peer, %reason, count = times, "accepted messages were not delivered, and no handler takes the event");
            }
            Self::NotRegistered(relay, Registration::Refused(refusal)) => {
                let reason = refusal.name();
                tracing::warn!(%relay, reason, times, "the relay refuses the registration, and no handler takes the event");
            }
            Self::NotRegistered(relay, _) => {
                tracing::warn!(%relay, times, "the registration at the relay was lost, and no handler takes the event");
            }
        }
    }
}
