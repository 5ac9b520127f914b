//! What serving accepted connections needs, and one accepted connection: what it carries, and the answers to it.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Instant, SystemTime};

use macula_peer_core::config::{self, Config};
use macula_peer_core::errors::Rejection;
use macula_peer_core::proto::answers;
use macula_peer_core::requests::{Asked, Ended, RequestId, Requests};
use macula_peer_core::shares;
use macula_peer_core::sync::lock;
use macula_peer_core::types::{Dialect, Fingerprint, Sender};
use macula_peer_core::weights::Owner;
use macula_peer_wire::{MessageType, RawFrame};
use quinn::{Connection, SendStream};
use tokio::sync::{Notify, watch};

use crate::admission::Admissions;
use crate::conn::{AcceptedTable, Conn, LinkOwner};
use crate::expected::Expected;
use crate::frame_memory::FrameMemory;
use crate::inbound::{Asking, Inbound, ReplyTo, ReplyToken, Route};
use crate::inbox::Inbox;
use crate::keys::Keys;
use crate::lifecycle::Lifecycle;
use crate::net::Net;
use crate::places::{Place, Places};
use crate::relay::role::Role;
use crate::server_config::{Admission, first_streams};
use crate::session::receive::Sessions;
use crate::shares::Unread;
use crate::turns::Queue;

/// Frames that are much work and wait for their turn, from which on a connection may begin no more streams: one that is
/// read to its end gives its credit back, whether its frame was handed over or not.
const WAITING_FRAMES: usize = 16;

/// So many connections of one address have a full window each, and as many streams as are allowed. Of more each has less,
/// down to the least.
pub(crate) const FULL_CONNECTIONS: u32 = 32;

/// What the tasks of accepted connections share.
pub(crate) struct Server {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) admissions: Arc<Admissions>,
    /// This node as a relay.
    pub(crate) role: Arc<Role>,
    pub(crate) accepted: Arc<AcceptedTable>,
    pub(crate) places: Arc<Places>,
    /// For frames above some kilobytes that are arriving.
    pub(crate) arriving: Arc<FrameMemory>,
    pub(crate) sessions: Arc<Sessions>,
    /// Those that this node was asked.
    pub(crate) requests: Arc<Mutex<Requests<Route>>>,
    pub(crate) unread: Unread,
    /// Who may connect, while this node listens.
    pub(crate) listening: watch::Sender<Option<Admission>>,
    /// Addresses that nodes are about to connect from, whether this one listens or not.
    pub(crate) expected: Arc<Expected>,
    /// How nodes are let in that come by ways of which a relay knows.
    pub(crate) known_paths: Admission,
    /// For handshakes to begin.
    pub(crate) handshakes: Arc<Queue<shares::Network>>,
    /// For those who have used up their time.
    pub(crate) busy: Arc<Queue<Sender>>,
    /// Told who has connected.
    pub(crate) arrived: Box<dyn Fn(Fingerprint) + Send + Sync>,
}

/// What a server uses of the node.
pub(crate) struct Parts {
    pub(crate) config: Arc<Config>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) net: Arc<Net>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) admissions: Arc<Admissions>,
    pub(crate) role: Arc<Role>,
    pub(crate) accepted: Arc<AcceptedTable>,
    pub(crate) expected: Arc<Expected>,
    pub(crate) known_paths: Admission,
}

impl Server {
    /// `elsewhere` finds another connection with the holder of a key, `arrived` is told who has connected.
    pub(crate) fn new(
        parts: Parts,
        elsewhere: impl Fn(Fingerprint) -> Option<Connection> + Send + Sync + 'static,
        arrived: impl Fn(Fingerprint) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let Parts { config, lifecycle, net, keys, inbox, admissions, role, accepted, expected, known_paths } = parts;
        let unread = Unread::new(config.limits.max_frame);
        Arc::new(Self {
            places: Places::new(&config::Shares::default().limits(config.max_accepted)),
            arriving: FrameMemory::new(&config),
            sessions: Sessions::new(config.max_known_sessions, lifecycle.clone(), unread.clone(), elsewhere),
            requests: Arc::new(Mutex::new(Requests::new(config.max_known_requests))),
            unread,
            listening: watch::Sender::new(None),
            handshakes: Queue::new(1),
            busy: Queue::new(config.workers.max(1)),
            arrived: Box::new(arrived),
            config,
            lifecycle,
            net,
            keys,
            inbox,
            admissions,
            role,
            accepted,
            expected,
            known_paths,
        })
    }

    /// Forgets in time the requests of others, also where no more come.
    pub(crate) async fn expire(&self) {
        // Unlocked in between, for those who wait.
        while lock(&self.requests).expire(Instant::now()) {
            tokio::task::yield_now().await;
        }
    }

    /// How often there was no room, by what for.
    pub(crate) fn refused(&self) -> Vec<(&'static str, u64)> {
        let made_room = lock(&self.requests).made_room();
        let records = [
            ("sessions", self.sessions.over()),
            ("requests", made_room.requests),
            ("kept_answers", made_room.answers),
            ("frame_memory", self.arriving.waited()),
        ];
        self.places.refused().chain(records).collect()
    }
}

/// One accepted connection.
pub(crate) struct Accepted {
    pub(crate) conn: Arc<Conn>,
    /// `None` if we began the connection.
    pub(crate) place: Option<Arc<Place>>,
    /// The peer whose link this is, if we began the connection.
    owner: Option<Weak<dyn LinkOwner>>,
    /// Held by the one frame that waits for memory.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// Frames that are much work and wait for their turn.
    pub(crate) heavy: AtomicUsize,
    /// One of them waits no more.
    pub(crate) heavy_done: Notify,
    /// Only `FIRST_STREAMS` are allowed so far.
    few_streams: AtomicBool,
}

impl Accepted {
    /// `place`: if its other end began the connection. `owner`: the peer, if we did.
    pub(crate) fn new(conn: Arc<Conn>, place: Option<Arc<Place>>, owner: Option<Weak<dyn LinkOwner>>) -> Self {
        let few_streams = AtomicBool::new(conn.dialect == Dialect::MaculaPeer1);
        let (turn, heavy, heavy_done) = (tokio::sync::Mutex::default(), AtomicUsize::new(0), Notify::new());
        Self { conn, place, owner, turn, heavy, heavy_done, few_streams }
    }

    /// Hands over a message, or a request unless it was handed over before. `None`: it should have been and is not known.
    pub(crate) fn take(
        &self,
        server: &Arc<Server>,
        request: Option<(RequestId, bool)>,
        frame: RawFrame,
        route: Option<Route>,
    ) -> Option<Result<(), Rejection>> {
        match (request, route) {
            (None, route) => {
                Some(self.hand_over(server, frame, route.map(|route| ReplyToken::new(ReplyTo::Stream(route)))))
            }
            (Some(request), Some(route)) => self.asked(server, request, frame, route),
            // The requester has given up, or asks again on another link.
            (Some(_), None) => Some(Ok(())),
        }
    }

    /// Hands a request over, unless it was before. `None`: it should have been and is not known.
    fn asked(
        &self,
        server: &Arc<Server>,
        (id, again): (RequestId, bool),
        frame: RawFrame,
        route: Route,
    ) -> Option<Result<(), Rejection>> {
        let key = self.key()?;
        let requests = &server.requests;
        let requester = Owner { key, network: self.remote().ip().into() };
        let asked = lock(requests).ask(requester, id, again, route.clone(), Instant::now());
        match asked {
            Asked::New => {
                let asking = Asking { requests: requests.clone(), key, id };
                let taken = self.hand_over(server, frame, Some(ReplyToken::new(ReplyTo::Request(asking, route))));
                if taken.is_err() {
                    // It was not handed over, and is not the next time either.
                    lock(requests).forget(key, id);
                }
                return Some(taken);
            }
            Asked::Waits => {}
            // The stream's task is this one.
            Asked::Answered(answer) => drop(route.send(Some(answer))),
            Asked::Over(Ended::Unanswered) => drop(route.send(None)),
            Asked::Over(Ended::Forgotten) => return None,
        }
        Some(Ok(()))
    }

    /// Whether this node answers such a frame by itself, which relays do.
    pub(crate) fn is_probe(&self, server: &Server, type_id: u8) -> bool {
        type_id == MessageType::NatProbe.id() && !self.path.is_relayed() && server.role.relay().is_some()
    }

    /// Hands a frame to the handler.
    pub(crate) fn hand_over(
        &self,
        server: &Arc<Server>,
        frame: RawFrame,
        reply: Option<ReplyToken>,
    ) -> Result<(), Rejection> {
        let Conn { dialect, path, .. } = *self.conn;
        let (from, key) = (self.remote(), self.key());
        self.received.add(1);
        if let Some(peer) = self.owner.as_ref().and_then(Weak::upgrade) {
            peer.heard();
        }
        self.allow_streams(&server.config);
        if let Some(key) = key.filter(|_| self.is_heard_again()) {
            (server.arrived)(key);
        }
        if self.is_probe(server, frame.type_id())
            && let Some(token) = &reply
        {
            let answer = answers::nat_probe_reply(frame.payload(), from, SystemTime::now(), server.config.limits);
            let answer = answer.ok_or_else(|| server.inbox.malformed())?;
            // The requester may be gone.
            let _ = token.reply(answer);
            return Ok(());
        }
        server.inbox.deliver(frame, |kind, payload| Inbound { kind, payload, from, dialect, key, path, reply })
    }

    pub(crate) fn has_many_waiting(&self) -> bool {
        self.heavy.load(Ordering::Relaxed) >= WAITING_FRAMES
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.owner.is_some()
    }

    /// Waits until the answer to a request has arrived.
    pub(crate) async fn arrives(&self, server: &Server, request: RequestId, mut send: SendStream) {
        if send.finish().is_ok() && matches!(send.stopped().await, Ok(None)) {
            self.arrived(server, request);
        }
    }

    /// The peer has the answer to a request.
    pub(crate) fn arrived(&self, server: &Server, request: RequestId) {
        if let Some(key) = self.key() {
            lock(&server.requests).forget(key, request);
        }
    }

    /// From its first message on, the other end may have many streams at once.
    fn allow_streams(&self, config: &Config) {
        if self.few_streams.load(Ordering::Relaxed) && self.few_streams.swap(false, Ordering::Relaxed) {
            let streams = self
                .place
                .as_ref()
                .map_or(config.max_streams, |place| place.share(config.max_streams, FULL_CONNECTIONS));
            self.connection.set_max_concurrent_bi_streams(streams.max(first_streams(config)).into());
        }
    }
}

impl Deref for Accepted {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.conn
    }
}
