//! Connections that behave as QUIC's do, as far as decisions depend on it: a handshake of two flights, streams in order,
//! datagrams, acknowledgements, retransmission after a loss or a timeout that doubles, keep-alives, idle timeouts, closes,
//! stateless resets, and servers that follow their clients to another address. Packets carry frames, no bytes.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use super::network::{Body, Event, HostId, MS, SECOND, Time};
use super::world::World;
use crate::proto::control::{FromNode, FromRelay};
use crate::request_sender::Named;
use crate::trust::Answer;
use crate::types::Dialect;

/// Before a round trip is measured (RFC 9002, 6.2.2), and where both sides know that packets pass.
const INITIAL_RTT: Time = 333 * MS;
pub(super) const KNOWN_PATH_RTT: Time = 100 * MS;

/// How long an acknowledgement may be put off.
const MAX_ACK_DELAY: Time = 25 * MS;

const PACKET_THRESHOLD: u64 = 3;

/// Bytes of frames in one packet.
const MAX_PACKET: u64 = 1200;

/// A handshake that is not complete by then ends.
const HANDSHAKE_TIMEOUT: Time = 10 * SECOND;

/// How long a connection that was closed answers with its close.
const CLOSING: Time = SECOND;

/// Names a connection's end, among all that there ever are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnId {
    pub(super) place: u32,
    pub(super) number: u32,
}

/// A key, by its number.
pub(super) type KeyId = usize;

pub(super) type StreamId = u32;

#[derive(Debug, Clone)]
pub(super) struct QuicPacket {
    /// `None`: the client does not know the server's end yet.
    pub(super) to: Option<ConnId>,
    pub(super) from: ConnId,
    pub(super) content: Content,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    Frames {
        number: u64,
        len: u16,
        frames: Rc<[Frame]>,
    },
    /// The largest number that came, and which of the 127 below it.
    Ack {
        largest: u64,
        seen: u128,
    },
    Close(u32),
    /// Of a server that has forgotten the connection and has this key.
    Reset(KeyId),
}

impl QuicPacket {
    pub(super) fn len(&self) -> u64 {
        match &self.content {
            Content::Frames { len, .. } => u64::from(*len) + 40,
            _ => 50,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Frame {
    ClientHello,
    /// The server's flight: its key, what it speaks, and how many streams it allows at once.
    ServerFlight {
        key: KeyId,
        dialect: Dialect,
        streams: u32,
    },
    /// The client's, with its key.
    Finished(KeyId),
    /// The handshake is confirmed, and streams are allowed.
    Allow,
    /// Another stream is allowed.
    Credit,
    Data {
        stream: StreamId,
        at: u32,
        item: Item,
    },
    Reset {
        stream: StreamId,
        code: u8,
    },
    Stop {
        stream: StreamId,
        code: u8,
    },
    Ping,
    /// A packet of a circuit. It is not sent again.
    Datagram {
        circuit: u32,
        packet: Rc<QuicPacket>,
    },
}

/// What a stream carries.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// Opens a stream of a session.
    Session(Rc<Opened>),
    Number(u64),
    Message(u32),
    /// A message that has its stream for itself, as in the dialect `macula`.
    Whole(u32),
    /// A part of a large message, whose last part is the message.
    Part,
    /// A request, on a stream of its own, and its answer.
    Request(Rc<Requested>),
    Reply,
    Greeting {
        known: bool,
        run: crate::proto::session::Run,
        expected: u64,
    },
    Expected(u64),
    /// Asks for the node id of this number.
    Ask(usize),
    Answer(Answer),
    FromNode(Rc<FromNode>),
    FromRelay(Rc<FromRelay>),
}

#[derive(Debug)]
pub(super) struct Requested {
    pub(super) number: u32,
    /// The name that it is for, and what it is called where that has a meaning.
    pub(super) target: usize,
    pub(super) named: Option<Named>,
}

/// What opens a stream of a session.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) id: crate::session_table::SessionId,
    pub(super) channel: usize,
    pub(super) run: crate::proto::session::Run,
    pub(super) target: usize,
}

impl Frame {
    fn len(&self) -> u64 {
        match self {
            Self::ClientHello | Self::ServerFlight { .. } => 1160,
            Self::Finished(_) => 700,
            Self::Data { item: Item::Part, .. } => 1100,
            Self::Data { item: Item::Message(_) | Item::Whole(_) | Item::Request(_) | Item::Reply, .. } => 300,
            Self::Data { .. } => 60,
            Self::Datagram { packet, .. } => packet.len().min(1160),
            Self::Allow | Self::Credit | Self::Reset { .. } | Self::Stop { .. } | Self::Ping => 10,
        }
    }

    fn whole_stream(&self) -> Option<StreamId> {
        match self {
            Self::Data { stream, item: Item::Whole(_) | Item::Request(_), .. } => Some(*stream),
            _ => None,
        }
    }

    fn is_reliable(&self) -> bool {
        !matches!(self, Self::Ping | Self::Datagram { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Handshaking,
    Open,
    Closed(Why),
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// This end closed it.
    Here,
    /// The other end did.
    There(u32),
    TimedOut,
    Reset,
    /// Nobody listens there, as ICMP says.
    Unreachable,
    /// The circuit or the registration that carried it ended.
    Carrier,
}

/// What carries a connection's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    Udp { port: u16, to: SocketAddr },
    Circuit { outer: ConnId, circuit: u32 },
}

/// The host that accepts a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Serves {
    pub(super) key: KeyId,
    pub(super) timeouts: Timeouts,
    pub(super) dialect: Dialect,
    /// How many streams it allows at once.
    pub(super) streams: u32,
}

impl Serves {
    /// A node, or a relay.
    pub(super) fn peer1(key: KeyId, timeouts: Timeouts) -> Self {
        Self { key, timeouts, dialect: Dialect::MaculaPeer1, streams: u32::MAX }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// 0: none are sent.
    pub(super) keep_alive: Time,
    pub(super) idle: Time,
}

struct Sent {
    number: u64,
    at: Time,
    frames: Rc<[Frame]>,
}

#[derive(Default)]
struct Stream {
    id: StreamId,
    sent: u32,
    received: u32,
    early: Vec<(u32, Item)>,
}

pub(super) struct Conn {
    pub(super) id: ConnId,
    pub(super) host: HostId,
    pub(super) client: bool,
    pub(super) carrier: Carrier,
    pub(super) state: State,
    /// The other end.
    pub(super) other: Option<ConnId>,
    /// The key that the other end has shown.
    pub(super) shown: Option<KeyId>,
    /// The other end allows streams.
    pub(super) allowed: bool,
    pub(super) dialect: Dialect,
    /// How many more of them.
    streams_left: u32,
    /// Packets that came.
    pub(super) heard: u64,
    /// Packets that must be acknowledged.
    pub(super) asked: u64,
    pub(super) round_trip: Option<Time>,
    /// The shortest that was measured.
    pub(super) shortest: Time,
    key: KeyId,
    initial_rtt: Time,
    variation: Time,
    timeouts: Timeouts,
    next_number: u64,
    sent: VecDeque<Sent>,
    backoff: u32,
    last_asked: Time,
    largest: Option<u64>,
    seen: u128,
    outbox: VecDeque<Frame>,
    queued: bool,
    streams: Vec<Stream>,
    next_stream: StreamId,
    idle_at: Time,
    keep_at: Time,
    /// When the earliest event for its timers comes.
    armed: Time,
}

/// What a connection tells who uses it.
#[derive(Debug)]
pub(super) enum Notice {
    /// The handshake is complete at this end.
    Open,
    /// The other end allows streams.
    Allowed,
    /// It allows another one.
    Credit,
    /// All that was written to a stream with one message or request has arrived.
    Acknowledged(StreamId),
    Closed(Why),
    Item(StreamId, Item),
    WasReset(StreamId, u8),
    WasStopped(StreamId, u8),
}

impl Conn {
    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    fn timeout(&self) -> Time {
        let base = match self.round_trip {
            Some(round_trip) => round_trip + (4 * self.variation).max(MS) + MAX_ACK_DELAY,
            None => 3 * self.initial_rtt,
        };
        base << self.backoff.min(10)
    }

    fn next_timer(&self) -> Time {
        let repeat = if self.sent.is_empty() { Time::MAX } else { self.last_asked + self.timeout() };
        self.idle_at.min(self.keep_at).min(repeat)
    }

    fn measure(&mut self, sample: Time) {
        self.shortest = self.shortest.min(sample);
        match self.round_trip {
            None => (self.round_trip, self.variation) = (Some(sample), sample / 2),
            Some(known) => {
                self.variation = (3 * self.variation + known.abs_diff(sample)) / 4;
                self.round_trip = Some((7 * known + sample) / 8);
            }
        }
    }

    /// Whether the packet of this number is new.
    fn note(&mut self, number: u64) -> bool {
        match self.largest {
            None => (self.largest, self.seen) = (Some(number), 1),
            Some(largest) if number > largest => {
                self.seen = if number - largest < 128 { self.seen << (number - largest) | 1 } else { 1 };
                self.largest = Some(number);
            }
            Some(largest) => {
                let bit = largest - number;
                if bit >= 128 || self.seen >> bit & 1 == 1 {
                    return false;
                }
                self.seen |= 1 << bit;
            }
        }
        true
    }

    fn stream(&mut self, id: StreamId) -> &mut Stream {
        let place = self.streams.iter().position(|stream| stream.id == id).unwrap_or_else(|| {
            self.streams.push(Stream { id, ..Stream::default() });
            self.streams.len() - 1
        });
        &mut self.streams[place]
    }

    /// The frames of packets that count as lost go out again. Returns streams whose only message has arrived.
    fn acknowledged(&mut self, largest: u64, seen: u128, now: Time) -> Vec<StreamId> {
        let (mut newest, mut whole) = (None, Vec::new());
        self.sent.retain(|sent| {
            let arrived =
                sent.number <= largest && largest - sent.number < 128 && seen >> (largest - sent.number) & 1 == 1;
            if arrived {
                newest = newest.max(Some((sent.number, sent.at)));
                whole.extend(sent.frames.iter().filter_map(Frame::whole_stream));
            }
            !arrived
        });
        let Some((number, at)) = newest else { return whole };
        if number == largest {
            self.measure(now - at);
        }
        self.backoff = 0;
        let patience = self.round_trip.unwrap_or(self.initial_rtt) * 9 / 8;
        let outbox = &mut self.outbox;
        self.sent.retain(|sent| {
            let lost = sent.number + PACKET_THRESHOLD <= largest || (sent.number < largest && sent.at + patience < at);
            if lost {
                outbox.extend(sent.frames.iter().filter(|frame| frame.is_reliable()).cloned());
            }
            !lost
        });
        whole
    }
}

// For those who use connections.
impl World {
    pub(super) fn conn(&self, id: ConnId) -> Option<&Conn> {
        self.conns.get(id.place as usize)?.as_ref().filter(|conn| conn.id == id)
    }

    pub(super) fn conn_mut(&mut self, id: ConnId) -> Option<&mut Conn> {
        self.conns.get_mut(id.place as usize)?.as_mut().filter(|conn| conn.id == id)
    }

    pub(super) fn connect(
        &mut self,
        host: HostId,
        key: KeyId,
        carrier: Carrier,
        rtt: Option<Time>,
        timeouts: Timeouts,
    ) -> ConnId {
        let id = self.new_conn(host, Serves::peer1(key, timeouts), carrier, true, rtt);
        self.queue(id, Frame::ClientHello);
        id
    }

    pub(super) fn open_stream(&mut self, id: ConnId) -> StreamId {
        let Some(conn) = self.conn_mut(id) else { return 0 };
        conn.next_stream += 2;
        conn.next_stream
    }

    /// `None`: the other end allows no more at present.
    pub(super) fn try_open_stream(&mut self, id: ConnId) -> Option<StreamId> {
        let conn = self.conn_mut(id)?;
        conn.streams_left = conn.streams_left.checked_sub(1)?;
        Some(self.open_stream(id))
    }

    /// A stream of the other end's has ended, and it may open another.
    pub(super) fn give_credit(&mut self, id: ConnId) {
        self.queue(id, Frame::Credit);
    }

    pub(super) fn write(&mut self, id: ConnId, stream: StreamId, item: Item) {
        let Some(conn) = self.conn_mut(id) else { return };
        let sending = conn.stream(stream);
        let at = sending.sent;
        sending.sent += 1;
        self.queue(id, Frame::Data { stream, at, item });
    }

    /// What was written and is still here is not sent.
    pub(super) fn reset_stream(&mut self, id: ConnId, stream: StreamId, code: u8) {
        let Some(conn) = self.conn_mut(id) else { return };
        conn.outbox.retain(|frame| !matches!(frame, Frame::Data { stream: of, .. } if *of == stream));
        self.queue(id, Frame::Reset { stream, code });
    }

    pub(super) fn stop_stream(&mut self, id: ConnId, stream: StreamId, code: u8) {
        self.queue(id, Frame::Stop { stream, code });
    }

    pub(super) fn allow_streams(&mut self, id: ConnId) {
        self.queue(id, Frame::Allow);
    }

    pub(super) fn close(&mut self, id: ConnId, code: u32) {
        if self.conn(id).is_none_or(|conn| matches!(conn.state, State::Closed(_))) {
            return;
        }
        self.flush(id);
        self.send_content(id, Content::Close(code));
        self.end(id, Why::Here);
    }

    /// As if the process had ended.
    pub(super) fn drop_conn(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(id.place as usize)
            && conn.as_ref().is_some_and(|conn| conn.id == id)
        {
            if let Some(Conn { client: false, host, other: Some(other), .. }) = conn.take() {
                self.initials.remove(&(host, other));
            }
            self.free_conns.push(id.place);
        }
    }

    pub(super) fn end(&mut self, id: ConnId, why: Why) {
        let closing = self.now + CLOSING;
        let Some(conn) = self.conn_mut(id) else { return };
        if matches!(conn.state, State::Closed(_)) {
            return;
        }
        conn.state = State::Closed(why);
        (conn.sent, conn.outbox, conn.streams) = (VecDeque::new(), VecDeque::new(), Vec::new());
        (conn.idle_at, conn.keep_at) = (closing, Time::MAX);
        self.notices.push_back((id, Notice::Closed(why)));
        self.arm(id);
    }
}

// The protocol.
impl World {
    fn new_conn(&mut self, host: HostId, server: Serves, carrier: Carrier, client: bool, rtt: Option<Time>) -> ConnId {
        let Serves { key, timeouts, .. } = server;
        self.next_conn += 1;
        let place = self.free_conns.pop().unwrap_or(self.conns.len() as u32);
        let id = ConnId { place, number: self.next_conn };
        let conn = Conn {
            id,
            host,
            client,
            carrier,
            state: State::Handshaking,
            other: None,
            shown: None,
            allowed: false,
            dialect: server.dialect,
            streams_left: server.streams,
            heard: 0,
            asked: 0,
            round_trip: None,
            shortest: Time::MAX,
            key,
            initial_rtt: rtt.unwrap_or(INITIAL_RTT),
            variation: 0,
            timeouts,
            next_number: 0,
            sent: VecDeque::new(),
            backoff: 0,
            last_asked: 0,
            largest: None,
            seen: 0,
            outbox: VecDeque::new(),
            queued: false,
            streams: Vec::new(),
            next_stream: u32::from(client),
            idle_at: self.now + HANDSHAKE_TIMEOUT,
            keep_at: Time::MAX,
            armed: Time::MAX,
        };
        match self.conns.get_mut(place as usize) {
            Some(free) => *free = Some(conn),
            None => self.conns.push(Some(conn)),
        }
        self.arm(id);
        id
    }

    fn queue(&mut self, id: ConnId, frame: Frame) {
        let Some(conn) = self.conn_mut(id).filter(|conn| !matches!(conn.state, State::Closed(_))) else { return };
        conn.outbox.push_back(frame);
        if !std::mem::replace(&mut conn.queued, true) {
            self.unflushed.push(id);
        }
    }

    /// A packet of an inner connection leaves over the outer one.
    pub(super) fn send_datagram(&mut self, outer: ConnId, circuit: u32, packet: Rc<QuicPacket>) {
        self.queue(outer, Frame::Datagram { circuit, packet });
    }

    /// Puts what is queued into packets.
    pub(super) fn flush(&mut self, id: ConnId) {
        loop {
            let now = self.now;
            let Some(conn) = self.conn_mut(id) else { return };
            conn.queued = false;
            if conn.outbox.is_empty() {
                break;
            }
            let (mut len, mut count) = (0, 0);
            for frame in &conn.outbox {
                if count > 0 && len + frame.len() > MAX_PACKET {
                    break;
                }
                len += frame.len();
                count += 1;
            }
            let frames: Rc<[Frame]> = conn.outbox.drain(..count).collect();
            let number = conn.next_number;
            conn.next_number += 1;
            conn.asked += 1;
            conn.sent.push_back(Sent { number, at: now, frames: frames.clone() });
            conn.last_asked = now;
            if conn.timeouts.keep_alive > 0 && conn.is_open() {
                conn.keep_at = now + conn.timeouts.keep_alive;
            }
            self.send_content(id, Content::Frames { number, len: len as u16, frames });
        }
        self.arm(id);
    }

    fn send_content(&mut self, id: ConnId, content: Content) {
        let Some(conn) = self.conn(id) else { return };
        let packet = QuicPacket { to: conn.other, from: id, content };
        match conn.carrier {
            Carrier::Udp { port, to } => {
                let host = conn.host;
                self.transmit(host, port, to, Body::Quic(packet));
            }
            Carrier::Circuit { outer, circuit } => {
                if let super::network::Is::Node(node) = self.hosts[conn.host].is {
                    self.look_soon(node, outer);
                }
                self.send_datagram(outer, circuit, Rc::new(packet));
            }
        }
    }

    fn arm(&mut self, id: ConnId) {
        let Some(conn) = self.conn_mut(id) else { return };
        let next = conn.next_timer();
        if next < conn.armed {
            conn.armed = next;
            self.at(next, Event::Conn(id));
        }
    }

    pub(super) fn conn_timer(&mut self, id: ConnId) {
        let now = self.now;
        // Another event is the timer's.
        let Some(host) = self.conn(id).filter(|conn| conn.armed <= now).map(|conn| conn.host) else { return };
        let paused = self.hosts[host].paused_until;
        let Some(conn) = self.conn_mut(id) else { return };
        if paused > now {
            conn.armed = paused;
            return self.at(paused, Event::Conn(id));
        }
        conn.armed = Time::MAX;
        if conn.idle_at <= now {
            match conn.state {
                State::Closed(_) => self.drop_conn(id),
                _ => self.end(id, Why::TimedOut),
            }
            return;
        }
        let mut pings = false;
        if let Some(sent) = conn.sent.front()
            && conn.last_asked + conn.timeout() <= now
        {
            // The oldest goes out again; the acknowledgement tells whether the others are lost.
            pings = !sent.frames.iter().any(Frame::is_reliable);
            let lost = conn.sent.pop_front();
            conn.outbox
                .extend(lost.iter().flat_map(|lost| lost.frames.iter()).filter(|frame| frame.is_reliable()).cloned());
            conn.backoff += 1;
        }
        if conn.keep_at <= now || pings {
            conn.outbox.push_back(Frame::Ping);
            conn.keep_at = if conn.timeouts.keep_alive > 0 { now + conn.timeouts.keep_alive } else { Time::MAX };
        }
        self.flush(id);
    }

    /// A packet has come to a host. `None`: to a socket that serves QUIC there.
    pub(super) fn quic_packet(&mut self, host: HostId, carrier: Carrier, packet: QuicPacket) {
        let QuicPacket { to, from, content } = packet;
        let id = match to.or_else(|| self.initials.get(&(host, from)).copied()) {
            Some(id) => id,
            None => match self.accepts(host, carrier, &content) {
                Some(server) => {
                    let rtt = matches!(carrier, Carrier::Circuit { .. }).then_some(KNOWN_PATH_RTT);
                    let id = self.new_conn(host, server, carrier, false, rtt);
                    self.conn_mut(id).unwrap().other = Some(from);
                    self.initials.insert((host, from), id);
                    id
                }
                None => return,
            },
        };
        let now = self.now;
        let Some(conn) = self.conn_mut(id).filter(|conn| conn.host == host) else {
            if !matches!(content, Content::Reset(_) | Content::Close(_)) {
                self.reset_stateless(host, carrier, from);
            }
            return;
        };
        if let State::Closed(why) = conn.state {
            if why == Why::Here && matches!(content, Content::Frames { .. }) {
                self.send_content(id, Content::Close(0));
            }
            return;
        }
        if let Content::Reset(key) = content {
            if conn.shown == Some(key) {
                self.end(id, Why::Reset);
            }
            return;
        }
        if *conn.other.get_or_insert(from) != from {
            return;
        }
        if let (State::Handshaking, Content::Frames { frames, .. }) = (conn.state, &content)
            && !frames
                .iter()
                .any(|frame| matches!(frame, Frame::ClientHello | Frame::ServerFlight { .. } | Frame::Finished(_)))
        {
            // Its keys are not known yet.
            return;
        }
        conn.heard += 1;
        if conn.is_open() {
            conn.idle_at = now + conn.timeouts.idle;
        }
        match content {
            Content::Frames { number, frames, .. } => {
                let newest = conn.largest.is_none_or(|largest| number > largest);
                let new = conn.note(number);
                if newest && !conn.client && conn.carrier != carrier {
                    // The client's address is another one now.
                    conn.carrier = carrier;
                    self.prove(id);
                }
                let conn = self.conn(id).unwrap();
                let ack = Content::Ack { largest: conn.largest.unwrap_or(0), seen: conn.seen };
                self.send_content(id, ack);
                if new {
                    frames.iter().for_each(|frame| self.take_frame(id, frame));
                }
            }
            Content::Ack { largest, seen } => {
                let whole = conn.acknowledged(largest, seen, now);
                self.notices.extend(whole.into_iter().map(|stream| (id, Notice::Acknowledged(stream))));
                self.flush(id);
            }
            Content::Close(code) => self.end(id, Why::There(code)),
            Content::Reset(_) => {}
        }
    }

    fn reset_stateless(&mut self, host: HostId, carrier: Carrier, to: ConnId) {
        let Some(key) = self.key_of_host(host) else { return };
        let packet = QuicPacket { to: Some(to), from: to, content: Content::Reset(key) };
        if let Carrier::Udp { port, to } = carrier {
            self.earn(host, to);
            self.transmit(host, port, to, Body::Quic(packet));
        }
    }

    fn take_frame(&mut self, id: ConnId, frame: &Frame) {
        let now = self.now;
        let Some(conn) = self.conn_mut(id).filter(|conn| !matches!(conn.state, State::Closed(_))) else { return };
        let key = conn.key;
        match frame {
            Frame::ClientHello if conn.state == State::Handshaking => {
                let (dialect, streams) = (conn.dialect, conn.streams_left);
                self.queue(id, Frame::ServerFlight { key, dialect, streams });
            }
            Frame::ClientHello => {}
            Frame::ServerFlight { key: shown, .. } | Frame::Finished(shown) => {
                if conn.state == State::Handshaking {
                    if let Frame::ServerFlight { dialect, streams, .. } = frame {
                        (conn.dialect, conn.streams_left) = (*dialect, *streams);
                    }
                    conn.shown = Some(*shown);
                    conn.state = State::Open;
                    conn.idle_at = now + conn.timeouts.idle;
                    if conn.timeouts.keep_alive > 0 {
                        conn.keep_at = now + conn.timeouts.keep_alive;
                    }
                    if conn.client {
                        self.queue(id, Frame::Finished(key));
                    }
                    self.notices.push_back((id, Notice::Open));
                }
            }
            Frame::Allow => {
                if !std::mem::replace(&mut conn.allowed, true) {
                    self.notices.push_back((id, Notice::Allowed));
                }
            }
            Frame::Credit => {
                conn.streams_left += 1;
                self.notices.push_back((id, Notice::Credit));
            }
            Frame::Data { stream, at, item } => {
                let stream = *stream;
                let reading = conn.stream(stream);
                if *at < reading.received || reading.early.iter().any(|(early, _)| early == at) {
                    return;
                }
                reading.early.push((*at, item.clone()));
                let mut ready = Vec::new();
                while let Some(next) = reading.early.iter().position(|(early, _)| *early == reading.received) {
                    ready.push(reading.early.swap_remove(next).1);
                    reading.received += 1;
                }
                self.notices.extend(ready.into_iter().map(|item| (id, Notice::Item(stream, item))));
            }
            Frame::Reset { stream, code } => self.notices.push_back((id, Notice::WasReset(*stream, *code))),
            Frame::Stop { stream, code } => self.notices.push_back((id, Notice::WasStopped(*stream, *code))),
            Frame::Ping => {}
            Frame::Datagram { circuit, packet } => self.datagram(id, *circuit, packet),
        }
    }
}
