//! A request: a message on a stream of its own, and the frame that answers it.
//!
//! In `macula-peer/1` a request has an id. When its link dies it is asked again over the next one, and the peer, if it has
//! had it, sends the answer there (`macula_peer_core::requests`).

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use macula_peer_core::errors::{Rejection, RequestError};
use macula_peer_core::heavy::is_heavy;
use macula_peer_core::proto::codes::stream::{REQUEST_FORGOTTEN, WRONG_NODE};
use macula_peer_core::proto::session::{REQUEST, put_header};
use macula_peer_core::request_sender::{Lost, Named};
use macula_peer_core::types::{Dialect, NodeId, Sender};
use macula_peer_wire::{FrameError, HEADER_LEN, RawFrame};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};

use crate::call::Call;
use crate::deadline::deadline;
use crate::decoding::Decoding;
use crate::hello;
use crate::link::Link;
use crate::message::Envelope;
use crate::transfer::is_acknowledged;

/// A peer that takes this long to answer, and is otherwise silent, is probed: nothing else would show that answers do
/// not come through any more.
const PROBE_AFTER: Duration = Duration::from_secs(1);

/// The payload of the frame before a request: its id, and whether only a peer that knows it is to answer.
const NAMED_LEN: usize = 17;

/// The frame before a request.
fn name(Named { id, again }: Named) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER_LEN + NAMED_LEN);
    put_header(&mut frame, REQUEST, NAMED_LEN);
    frame.put_slice(&id);
    frame.put_u8(again.into());
    frame.freeze()
}

/// What a frame before a request says; `None`: it is none.
pub(crate) fn parse_name(payload: &[u8]) -> Option<Named> {
    let (id, rest) = payload.split_first_chunk()?;
    match rest {
        [again @ (0 | 1)] => Some(Named { id: *id, again: *again == 1 }),
        _ => None,
    }
}

/// How a request ended. The first two have answered the caller.
pub(crate) enum RequestEnd {
    Answered,
    Failed,
    /// The caller is gone.
    Cancelled,
    Lost(Lost),
}

enum Failure {
    Lost(Lost),
    LinkLost,
    Rejected(Rejection),
    Malformed(FrameError),
}

/// `target`: the node that it is for; `None`: any node at the other end. `named`: in `macula-peer/1`.
pub(crate) async fn run(
    link: Arc<Link>,
    target: Option<NodeId>,
    named: Option<Named>,
    call: Arc<Call<Result<RawFrame, RequestError>>>,
    message: Envelope,
    decoding: Arc<Decoding>,
) -> RequestEnd {
    let until = message.deadline;
    let _asked = Asked::new(&link);
    let answered = async {
        let frame = exchange(&link, target, named, message).await?;
        let turn = match is_heavy(frame.payload()) {
            true => decoding.turn(Sender::new(link.key(), link.remote())).await,
            false => None,
        };
        Ok((frame, turn))
    };
    let outcome = tokio::select! {
        outcome = answered => outcome,
        () = deadline(until) => {
            call.answer(Err(RequestError::Timeout));
            return RequestEnd::Failed;
        }
        () = call.cancelled() => return RequestEnd::Cancelled,
    };
    let error = match outcome {
        Ok((frame, None)) => {
            call.answer(Ok(frame));
            return RequestEnd::Answered;
        }
        Ok((frame, Some(turn))) => {
            tokio::task::spawn_blocking(move || {
                call.answer(Ok(frame));
                drop(turn);
            });
            return RequestEnd::Answered;
        }
        Err(Failure::Lost(how)) => return RequestEnd::Lost(how),
        Err(Failure::LinkLost) => RequestError::LinkLost,
        Err(Failure::Rejected(why)) => RequestError::Rejected(why),
        Err(Failure::Malformed(error)) => RequestError::Malformed(error),
    };
    call.answer(Err(error));
    RequestEnd::Failed
}

/// Counts a request as long as it runs.
struct Asked<'a>(&'a Link);

impl<'a> Asked<'a> {
    fn new(link: &'a Link) -> Self {
        link.asked.fetch_add(1, Ordering::Relaxed);
        Self(link)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a request is written to. A request that is given up in the middle resets it: quinn goes on to send a stream
/// that is dropped, and ends it as if it were complete.
struct Sending {
    send: SendStream,
    whole: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.whole {
            // Already closed is as good.
            let _ = self.send.reset(0u8.into());
        }
    }
}

async fn exchange(
    link: &Link,
    target: Option<NodeId>,
    named: Option<Named>,
    message: Envelope,
) -> Result<RawFrame, Failure> {
    let opened = tokio::select! {
        opened = link.connection.open_bi() => opened.ok(),
        () = link.silent() => None,
    };
    let (send, mut receive) = opened.ok_or(Failure::Lost(Lost::Unsent))?;
    let target = target.filter(|_| link.dialect == Dialect::MaculaPeer1);
    let address = target.as_ref().map(hello::addressed_to).unwrap_or_default();
    let name = named.map(self::name).unwrap_or_default();
    link.line_up(&send, message.frame.len());
    let mut sending = Sending { send, whole: false };
    let send = &mut sending.send;
    let mut chunks = [address, name, message.frame.clone()];
    tokio::select! {
        written = send.write_all_chunks(&mut chunks) => written.map_err(|error| match error {
            WriteError::Stopped(code) => refused(link, code).unwrap_or(Failure::LinkLost),
            _ => Failure::Lost(Lost::Unacknowledged),
        })?,
        () = link.silent() => return Err(Failure::Lost(Lost::Unacknowledged)),
    }
    send.finish().map_err(|_| Failure::Lost(Lost::Unacknowledged))?;
    sending.whole = true;
    tokio::select! {
        // An answer that has come counts, even if the link has died.
        biased;
        answer = answered(link, &sending.send, &mut receive) => answer,
        () = lost(link, &sending.send) => {
            let failure = link_lost(&sending.send);
            // Asked again over another link, it should not arrive over this one as well.
            sending.whole = false;
            Err(failure)
        }
    }
}

/// What the error of a stream of ours means, if the peer says why.
fn refused(link: &Link, code: VarInt) -> Option<Failure> {
    match link.dialect {
        Dialect::Macula => None,
        Dialect::MaculaPeer1 if code == WRONG_NODE.into() => Some(Failure::Lost(Lost::WrongNode)),
        Dialect::MaculaPeer1 if code == REQUEST_FORGOTTEN.into() => Some(Failure::LinkLost),
        Dialect::MaculaPeer1 => Rejection::of(code.into_inner()).map(Failure::Rejected),
    }
}

/// What is known of a request whose link is lost.
fn link_lost(send: &SendStream) -> Failure {
    Failure::Lost(if is_acknowledged(send) { Lost::Acknowledged } else { Lost::Unacknowledged })
}

/// Returns when the link is given up and the request can be asked over another.
async fn lost(link: &Link, send: &SendStream) {
    link.silent().await;
    if link.dialect == Dialect::Macula && is_acknowledged(send) {
        // It may still be answered.
        std::future::pending().await
    }
}

/// Waits for the answer, and says when the link is too silent meanwhile.
async fn answered(link: &Link, send: &SendStream, receive: &mut RecvStream) -> Result<RawFrame, Failure> {
    let mut answer = pin!(answer(link, send, receive));
    // Without anything that is owed, silence says nothing.
    let mut probed = false;
    loop {
        let heard = link.heard();
        let owes = probed || !is_acknowledged(send);
        let pause = if owes { link.patience() } else { link.patience().max(PROBE_AFTER) };
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = tokio::time::sleep(pause) => {}
        }
        if link.heard() != heard {
            probed = false;
        } else if !probed && is_acknowledged(send) {
            probed = link.probe();
        } else if link.is_dead() {
            // It was replaced, and nobody looks after it.
            return Err(link_lost(send));
        } else {
            link.doubted.notify_one();
        }
    }
}

async fn answer(link: &Link, send: &SendStream, receive: &mut RecvStream) -> Result<RawFrame, Failure> {
    let mut frames = link.reassembler();
    loop {
        match receive.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => frames.push(chunk.bytes),
            ended @ (Ok(None) | Err(ReadError::Reset(_))) => {
                if let Err(ReadError::Reset(code)) = ended
                    && let Some(failure) = refused(link, code)
                {
                    return Err(failure);
                }
                // There will be no answer. The original waits for its timeout all the same, and callers may rely on the
                // pause before they try again.
                link.connection.closed().await;
                return Err(Failure::LinkLost);
            }
            Err(_) => return Err(link_lost(send)),
        }
        if let Some(frame) = frames.next_frame().map_err(Failure::Malformed)? {
            return Ok(frame);
        }
    }
}
