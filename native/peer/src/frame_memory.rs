//! Memory for frames that are arriving: limited in total, with a share for one key and for one address.
//!
//! A frame gets what it needs before it is read, or waits unread: two that had half of it each would wait for ever.

use std::cmp::max;
use std::sync::{Arc, Mutex};

use macula_peer_core::config::{Config, FRAME_KEY_SHARE, least_frame_memory};
use macula_peer_core::counter::Counter;
use macula_peer_core::shares::{Client, Counts, Limits};
use macula_peer_core::sync::lock;
use tokio::sync::Notify;

/// If nothing else is configured, there is room for as many of the largest frames, or of frames of this size.
const FRAMES: usize = 16;
const LEAST_FRAME: usize = 1 << 20;

pub(crate) struct FrameMemory {
    taken: Mutex<Counts>,
    room: Notify,
    /// Frames that had to wait for it.
    waited: Counter,
}

/// What one frame takes until this is dropped.
pub(crate) struct Reserved {
    memory: Arc<FrameMemory>,
    client: Client,
    bytes: usize,
}

impl FrameMemory {
    pub(crate) fn new(config: &Config) -> Arc<Self> {
        let max_frame = config.limits.max_frame;
        let total = config.frame_memory.unwrap_or(max(max_frame, LEAST_FRAME).saturating_mul(FRAMES));
        let limits = Limits::percent(total.max(least_frame_memory(max_frame)), FRAME_KEY_SHARE, 100);
        Arc::new(Self { taken: Mutex::new(Counts::new(limits)), room: Notify::new(), waited: Counter::default() })
    }

    /// Room for a frame, if there is any for this client. An address may have as much as is then left for others, so
    /// that some is always left.
    pub(crate) fn take(self: &Arc<Self>, client: Client, bytes: usize) -> Option<Reserved> {
        let mut taken = lock(&self.taken);
        let of_network = taken.of_network(&client);
        if of_network > 0 && of_network.saturating_add(bytes) > taken.left() {
            return None;
        }
        taken.take(&client, bytes).ok()?;
        Some(Reserved { memory: self.clone(), client, bytes })
    }

    /// The same, when there is. One frame of a connection waits at a time: all that wait are looked at when there is room.
    pub(crate) async fn wait(self: &Arc<Self>, client: Client, bytes: usize) -> Reserved {
        self.waited.add(1);
        loop {
            let room = self.room.notified();
            if let Some(reserved) = self.take(client, bytes) {
                return reserved;
            }
            room.await;
        }
    }

    /// Frames that had to wait.
    pub(crate) fn waited(&self) -> u64 {
        self.waited.get()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        lock(&self.memory.taken).give_back(&self.client, self.bytes);
        self.memory.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const FRAME: usize = 1 << 20;

    fn client(key: u8, from: u8) -> Client {
        Client::new(Some([key; 32].into()), [20, 0, 0, from].into())
    }

    fn memory(max_frame: usize, frame_memory: Option<usize>) -> Arc<FrameMemory> {
        let limits = macula_peer_wire::Limits { max_frame, ..Default::default() };
        FrameMemory::new(&Config { limits, frame_memory, ..Config::default() })
    }

    fn take_all(memory: &Arc<FrameMemory>, from: u8) -> Vec<Reserved> {
        (0..100).filter_map(|key| memory.take(client(key, from), FRAME)).collect()
    }

    #[test]
    fn a_key_and_an_address_have_their_shares_and_others_still_get_theirs() {
        let memory = memory(FRAME, None);
        let of_key: Vec<_> = (0..16).filter_map(|_| memory.take(client(1, 1), FRAME)).collect();
        assert_eq!(of_key.len(), 4);
        drop(of_key);
        let held: Vec<_> = (1..=3).map(|from| take_all(&memory, from)).collect();
        assert_eq!(held.iter().map(Vec::len).collect::<Vec<_>>(), [8, 4, 2]);
        assert!(memory.take(client(1, 4), FRAME).is_some());
        drop(held);
        assert_eq!(take_all(&memory, 4).len(), 8);
    }

    #[test]
    fn the_largest_frame_has_room_when_there_is_nothing_else() {
        for max_frame in [1, FRAME, FRAME + 1, 1 << 30] {
            for configured in [None, Some(1), Some(least_frame_memory(max_frame)), Some(usize::MAX)] {
                assert!(memory(max_frame, configured).take(client(1, 1), max_frame).is_some());
            }
        }
    }

    #[test]
    fn there_is_as_much_as_is_configured() {
        let memory = memory(FRAME, Some(40 * FRAME));
        let of_address = take_all(&memory, 1);
        let of_key: Vec<_> = (0..100).filter_map(|_| memory.take(client(200, 2), FRAME)).collect();
        assert_eq!((of_address.len(), of_key.len()), (20, 10));
    }

    #[tokio::test]
    async fn a_frame_that_waits_gets_what_another_one_gives_back() {
        let memory = memory(FRAME, None);
        let mut held = take_all(&memory, 1);
        let mut waits = Box::pin(memory.wait(client(101, 1), FRAME));
        assert!(timeout(Duration::from_millis(20), &mut waits).await.is_err());
        held.pop();
        assert!(timeout(Duration::from_secs(10), waits).await.is_ok());
        assert_eq!(memory.waited(), 1);
    }
}
