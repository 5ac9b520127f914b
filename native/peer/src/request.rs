//! A request: a message on a stream of its own, and the one frame that answers it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use macula_peer_wire::{FrameError, RawFrame};
use quinn::{ReadError, RecvStream, SendStream, WriteError};

use crate::call::Call;
use crate::error::RequestError;
use crate::link::{Link, is_acknowledged};
use crate::message::Letter;
use crate::node::LARGE_PAYLOAD;
use crate::peer::deadline;

/// How a request ended. The first two have answered the caller.
pub(crate) enum End {
    Answered,
    Failed,
    /// The caller is gone.
    Cancelled,
    /// The link died before anything was written.
    Unsent,
    /// The link died and nothing says that the peer has the request.
    Unacknowledged,
}

enum Failure {
    Unsent,
    Unacknowledged,
    LinkLost,
    Malformed(FrameError),
}

pub(crate) async fn run(link: Arc<Link>, call: Arc<Call<Result<RawFrame, RequestError>>>, message: Letter) -> End {
    let until = message.deadline;
    let _asked = Asked::new(&link);
    let outcome = tokio::select! {
        outcome = exchange(&link, message) => outcome,
        () = deadline(until) => {
            call.answer(Err(RequestError::Timeout));
            return End::Failed;
        }
        () = call.cancelled() => return End::Cancelled,
    };
    let error = match outcome {
        Ok(frame) => {
            if frame.payload().len() < LARGE_PAYLOAD {
                call.answer(Ok(frame));
            } else {
                tokio::task::spawn_blocking(move || call.answer(Ok(frame)));
            }
            return End::Answered;
        }
        Err(Failure::Unsent) => return End::Unsent,
        Err(Failure::Unacknowledged) => return End::Unacknowledged,
        Err(Failure::LinkLost) => RequestError::LinkLost,
        Err(Failure::Malformed(error)) => RequestError::Malformed(error),
    };
    call.answer(Err(error));
    End::Failed
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

async fn exchange(link: &Link, message: Letter) -> Result<RawFrame, Failure> {
    let (mut send, mut receive) = link.connection.open_bi().await.map_err(|_| Failure::Unsent)?;
    send.write_chunk(message.frame.clone()).await.map_err(|error| match error {
        // The peer has seen it and does not want it.
        WriteError::Stopped(_) => Failure::LinkLost,
        _ => Failure::Unacknowledged,
    })?;
    send.finish().map_err(|_| Failure::Unacknowledged)?;
    let mut answer = pin!(answer(link, &send, &mut receive));
    loop {
        let heard = link.heard();
        tokio::select! {
            answer = &mut answer => return answer,
            () = tokio::time::sleep(link.patience()) => {
                if !is_acknowledged(&send) && link.heard() == heard {
                    link.doubted.notify_one();
                }
            }
        }
    }
}

async fn answer(link: &Link, send: &SendStream, receive: &mut RecvStream) -> Result<RawFrame, Failure> {
    let mut frames = link.reassembler();
    loop {
        match receive.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => frames.push(chunk.bytes),
            // Nobody will answer. The original waits for its timeout all the same, and callers may rely on the pause
            // before they try again.
            Ok(None) | Err(ReadError::Reset(_)) => {
                link.connection.closed().await;
                return Err(Failure::LinkLost);
            }
            Err(_) if is_acknowledged(send) => return Err(Failure::LinkLost),
            Err(_) => return Err(Failure::Unacknowledged),
        }
        if let Some(frame) = frames.next_frame().map_err(Failure::Malformed)? {
            return Ok(frame);
        }
    }
}
