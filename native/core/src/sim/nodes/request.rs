//! Requests and their answers.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use super::network::{MS, Time};
use super::node::WRONG_NODE;
use super::peer::{Envelope, Job};
use super::quic::{ConnId, Item, KeyId, Requested, StreamId};
use super::scenario::Step;
use super::world::{World, trace};
use crate::request_sender::{Lost, Named, RequestSender};
use crate::requests::{Asked, RequestId};
use crate::trust;
use crate::types::Dialect;
use crate::weights::Owner;

/// Of a stream, as the engine's.
const REQUEST_FORGOTTEN: u8 = 12;

/// A request that waits for a link.
#[derive(Debug, Clone)]
pub(super) struct Request {
    sender: RequestSender,
    /// Its caller is gone.
    pub(super) cancelled: Rc<Cell<bool>>,
}

/// A request that waits for its answer.
pub(super) struct Asking {
    job: Job,
    conn: ConnId,
    stream: StreamId,
    dialect: Dialect,
    acknowledged: bool,
}

impl Asking {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.job.envelope.deadline
    }

    pub(super) fn is_on(&self, conn: ConnId) -> bool {
        self.conn == conn
    }
}

impl Request {
    pub(super) fn new() -> Self {
        Self { sender: RequestSender::new(false), cancelled: Rc::default() }
    }
}

// Those who ask.
impl World {
    pub(super) fn request(&mut self, node: usize, peer: usize, envelope: Envelope) {
        let (at, request) = (self.clock(), Request::new());
        self.promises.requests[envelope.id as usize].cancelled = request.cancelled.clone();
        let asking = &mut self.nodes[node].peers[peer];
        asking.watch.calls += 1;
        asking.queue.push(Job { envelope, at, accepted: false, request: Some(request) });
        self.touch(node, peer);
    }

    /// Its caller has died.
    pub(super) fn cancel(&mut self, node: usize, peer: usize, request: u32) {
        let now = self.clock();
        self.promises.requests[request as usize].cancelled.set(true);
        let at = &mut self.nodes[node].peers[peer];
        at.queue.expect(Some(now));
        self.take_asking(node, peer, |asking| asking.job.envelope.id == request);
        self.touch(node, peer);
    }

    /// False if the link takes none at present.
    pub(super) fn ask_over(&mut self, node: usize, peer: usize, mut job: Job) -> Result<(), Job> {
        let at = &self.nodes[node].peers[peer];
        let (target, link, dialect) = (at.name, at.link, at.state.link().map(|link| link.dialect));
        let (Some(conn), Some(dialect)) = (link, dialect) else { return Err(job) };
        let id = self.new_session_id();
        let Some(request) = job.request.as_mut() else { return Err(job) };
        let Some(named) = request.sender.ask(dialect, id) else {
            self.request_failed(&job);
            return Ok(());
        };
        let Some(stream) = self.try_open_stream(conn) else { return Err(job) };
        let requested = Requested { number: job.envelope.id, target, named };
        self.write(conn, stream, Item::Request(Rc::new(requested)));
        let asking = Asking { job, conn, stream, dialect, acknowledged: false };
        self.nodes[node].peers[peer].asking.push(asking);
        Ok(())
    }

    pub(super) fn request_failed(&mut self, job: &Job) {
        self.request_ends(job.envelope.id, false);
    }

    /// Takes those that are over.
    fn take_asking(&mut self, node: usize, peer: usize, is_over: impl Fn(&Asking) -> bool) -> Vec<Asking> {
        let asking = &mut self.nodes[node].peers[peer].asking;
        let over: Vec<Asking> = asking.extract_if(.., |asking| is_over(asking)).collect();
        over.iter().for_each(|asking| self.reset_stream(asking.conn, asking.stream, 0));
        over
    }

    pub(super) fn expire_requests(&mut self, node: usize, peer: usize) {
        let now = self.clock();
        let over = self.take_asking(node, peer, |asking| asking.deadline().is_some_and(|deadline| deadline <= now));
        over.iter().for_each(|asking| self.request_failed(&asking.job));
    }

    pub(super) fn request_acknowledged(&mut self, node: usize, id: ConnId, stream: StreamId) {
        let asking = self.nodes[node].peers.iter_mut().flat_map(|peer| &mut peer.asking);
        asking
            .filter(|asking| (asking.conn, asking.stream) == (id, stream))
            .for_each(|asking| asking.acknowledged = true);
    }

    pub(super) fn reply_came(&mut self, node: usize, id: ConnId, stream: StreamId) {
        for peer in 0..self.nodes[node].peers.len() {
            let answered = self.take_asking(node, peer, |asking| (asking.conn, asking.stream) == (id, stream));
            answered.iter().for_each(|asking| self.request_ends(asking.job.envelope.id, true));
        }
    }

    /// The connection is gone, or given up as silent.
    pub(super) fn requests_lost(&mut self, node: usize, id: ConnId) {
        for peer in 0..self.nodes[node].peers.len() {
            for asking in self.take_asking(node, peer, |asking| asking.conn == id) {
                let how = if asking.acknowledged { Lost::Acknowledged } else { Lost::Unacknowledged };
                self.request_lost(node, peer, asking, how);
            }
        }
    }

    pub(super) fn request_refused(&mut self, node: usize, id: ConnId, stream: StreamId, code: u8) {
        for peer in 0..self.nodes[node].peers.len() {
            for asking in self.take_asking(node, peer, |asking| (asking.conn, asking.stream) == (id, stream)) {
                match code {
                    WRONG_NODE => {
                        self.request_lost(node, peer, asking, Lost::WrongNode);
                        if self.nodes[node].peers[peer].link == Some(id) {
                            self.wrong_node(node, peer);
                        }
                    }
                    _ => self.request_failed(&asking.job),
                }
            }
        }
    }

    fn request_lost(&mut self, node: usize, peer: usize, asking: Asking, how: Lost) {
        let Asking { mut job, dialect, .. } = asking;
        trace!(self, "request {} lost its link: {how:?}", job.envelope.id);
        let again = job.request.as_mut().is_some_and(|request| request.sender.lost(how, dialect));
        match again {
            true => self.nodes[node].peers[peer].queue.put_back(job),
            false => self.request_failed(&job),
        }
        self.touch(node, peer);
    }
}

// Those who are asked.
impl World {
    pub(super) fn request_came(&mut self, node: usize, id: ConnId, stream: StreamId, requested: &Requested) {
        self.heard_again(node, id);
        let (Some(shown), Some(Named { id: request, again })) =
            (self.conn(id).and_then(|conn| conn.shown), requested.named)
        else {
            return;
        };
        let (now, remote) = (self.clock(), self.remote_ip(id));
        let serving = &mut self.nodes[node];
        let (own, asked) = (&self.names[serving.name], self.names[requested.target].as_bytes());
        if trust::answer(Some(own), &self.keys[serving.key], asked).is_none() {
            return self.refuse_stream(id, stream, WRONG_NODE);
        }
        let owner = Owner { key: self.keys[shown], network: remote.into() };
        match serving.requests.ask(owner, request, again, (id, stream), now) {
            Asked::New => {
                let starts = serving.starts;
                self.request_arrived(node, starts, requested.number);
                let at = self.now + self.random.u64(..1500) * MS;
                self.plan(at, Step::Reply { node, starts, to: shown, id: request });
            }
            Asked::Waits => {}
            Asked::Answered(_) => self.write(id, stream, Item::Reply),
            Asked::Over(_) => self.refuse_stream(id, stream, REQUEST_FORGOTTEN),
        }
    }

    /// The handler answers.
    pub(super) fn reply(&mut self, node: usize, starts: u32, to: KeyId, id: RequestId) {
        if !self.nodes[node].up || self.nodes[node].starts != starts {
            return;
        }
        let answer = bytes::Bytes::from_static(b"answer");
        let route = self.nodes[node].requests.answered(self.keys[to], id, &answer);
        if let Some((conn, stream)) = route {
            self.write(conn, stream, Item::Reply);
        }
    }
}

/// What is watched of one request.
pub(super) struct Watched {
    pub(super) from: usize,
    pub(super) starts: u32,
    pub(super) to: usize,
    pub(super) sent: Time,
    pub(super) deadline: Time,
    pub(super) patience: Time,
    pub(super) cancelled: Rc<Cell<bool>>,
    /// Where it was handed over, as often as they were started.
    pub(super) arrived: Vec<(usize, u32)>,
    /// Whether with an answer.
    pub(super) ended: Option<bool>,
}
