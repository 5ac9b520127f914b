//! Reading and writing streams: at once, or as long as they make progress, however long that takes.

use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_core::growth::Growth;
use macula_peer_core::sync::now_or_never;
use quinn::{Chunk, ReadError, RecvStream, SendStream};
use tokio::time::{sleep, timeout};

/// How long an answer may be written without progress, before the peer counts as one that does not read.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the next bytes of something that must grow within `without_growth`. `None`: it does not.
pub(crate) async fn read(
    receive: &mut RecvStream,
    at_once: usize,
    growth: &mut Growth,
    without_growth: Duration,
) -> Option<Result<Option<Chunk>, ReadError>> {
    let left = growth.left(without_growth);
    let mut waiting = Waiting { growth, since: Instant::now(), came: 0 };
    tokio::select! {
        // The time may have passed because this host did not run the task.
        biased;
        chunk = receive.read_chunk(at_once, true) => {
            if let Ok(Some(chunk)) = &chunk {
                waiting.came = chunk.bytes.len();
            }
            Some(chunk)
        }
        () = sleep(left) => None,
    }
}

/// Writes all of `bytes`. False: the stream is gone, or is no longer read.
pub(crate) async fn write(send: &mut SendStream, bytes: Bytes) -> bool {
    let mut growth = Growth::default();
    let mut rest = [bytes];
    while !rest[0].is_empty() {
        let since = Instant::now();
        match timeout(growth.left(WRITE_TIMEOUT), send.write_chunks(&mut rest)).await {
            Ok(Ok(written)) => growth.waited(since.elapsed(), written.bytes),
            Ok(Err(_)) | Err(_) => return false,
        }
    }
    true
}

/// What became of an attempt to write at once.
pub(crate) enum Write {
    All,
    /// The rest waits for room.
    Part(Bytes),
    Failed,
}

/// Writes what the stream takes without waiting.
pub(crate) fn write_now(send: &mut SendStream, frame: &Bytes) -> Write {
    let mut rest = [frame.clone()];
    match now_or_never(send.write_chunks(&mut rest)) {
        Some(Ok(written)) if written.chunks == 1 => Write::All,
        Some(Err(_)) => Write::Failed,
        Some(Ok(_)) | None => {
            let [rest] = rest;
            Write::Part(rest)
        }
    }
}

/// Whether all data of a finished stream, including its end, is acknowledged: the transport has forgotten the stream.
/// Querying its priority is the cheapest way to find out; `stopped` would keep a waker for each.
pub(crate) fn is_acknowledged(send: &SendStream) -> bool {
    send.priority().is_err()
}

/// Also counts the time of a wait that is dropped.
struct Waiting<'a> {
    growth: &'a mut Growth,
    since: Instant,
    came: usize,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.growth.waited(self.since.elapsed(), self.came);
    }
}
