//! Passes UDP packets on after a delay, as a long path does, and loses some if it is told to.
//!
//! `forwarder --to ADDR [--bind ADDR] [--delay-ms MS] [--loss PERMILLE]`; the delay is that of one direction. The
//! commands are `stats`, `delay MS`, `loss PERMILLE`, `swallow`, `pass` and `quit`. The server sees each client at an
//! address of its own.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use macula_peer_testkit::quic::{self, Error};
use macula_peer_testkit::{control, options::Options};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

const LARGEST_PACKET: usize = 65_536;

fn main() -> Result<(), Error> {
    let options = Options::read(std::env::args().skip(1), &["--to", "--bind", "--delay-ms", "--loss"])?;
    let server: SocketAddr = options.require("--to")?;
    let bind: SocketAddr = options.get("--bind", ([127, 0, 0, 1], 0).into())?;
    let path = Arc::new(Path {
        delay_ms: options.get("--delay-ms", 0)?.into(),
        loss: options.get("--loss", 0)?.into(),
        ..Path::default()
    });
    let runtime = quic::tokio_runtime(1)?;
    let front = Arc::new(runtime.block_on(UdpSocket::bind(bind))?);
    let port = front.local_addr()?.port();
    runtime.spawn(serve(front, server, path.clone()));
    control::serve(port, |command| path.command(command))?;
    runtime.shutdown_background();
    Ok(())
}

async fn serve(front: Arc<UdpSocket>, server: SocketAddr, path: Arc<Path>) -> io::Result<()> {
    const MOST_CLIENTS: usize = 1024;
    let mut clients: HashMap<SocketAddr, Line> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut packet = vec![0; LARGEST_PACKET];
    loop {
        let (length, client) = front.recv_from(&mut packet).await?;
        if !clients.contains_key(&client) && clients.len() < MOST_CLIENTS {
            let back = Arc::new(connected(server).await?);
            let (outward, held) = line();
            tasks.spawn(deliver(held, back.clone(), None));
            let (homeward, held) = line();
            tasks.spawn(deliver(held, front.clone(), Some(client)));
            tasks.spawn(answers(back, homeward, path.clone()));
            clients.insert(client, outward);
        }
        if let Some(outward) = clients.get(&client) {
            path.admit(&packet[..length], outward);
        }
    }
}

async fn connected(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    Ok(socket)
}

async fn answers(back: Arc<UdpSocket>, homeward: Line, path: Arc<Path>) {
    let mut packet = vec![0; LARGEST_PACKET];
    loop {
        // An error is the system's report that no socket listens there; one may later.
        if let Ok(length) = back.recv(&mut packet).await {
            path.admit(&packet[..length], &homeward);
        }
    }
}

type Line = mpsc::Sender<(Instant, Vec<u8>)>;

fn line() -> (Line, mpsc::Receiver<(Instant, Vec<u8>)>) {
    const MOST_HELD: usize = 16_384;
    mpsc::channel(MOST_HELD)
}

/// In the order of their coming, also when the delay was shortened meanwhile.
async fn deliver(mut held: mpsc::Receiver<(Instant, Vec<u8>)>, socket: Arc<UdpSocket>, to: Option<SocketAddr>) {
    while let Some((due, packet)) = held.recv().await {
        sleep_until(due).await;
        // The first error can be the report about an earlier packet. What is refused again is lost, as on any path.
        for _ in 0..2 {
            let sent = match to {
                Some(client) => socket.send_to(&packet, client).await,
                None => socket.send(&packet).await,
            };
            if sent.is_ok() {
                break;
            }
        }
    }
}

#[derive(Default)]
struct Path {
    delay_ms: AtomicU64,
    loss: AtomicU64,
    swallowing: AtomicBool,
    passed: AtomicU64,
    lost: AtomicU64,
    swallowed: AtomicU64,
    dice: AtomicU64,
}

impl Path {
    fn admit(&self, packet: &[u8], line: &Line) {
        let counter = if self.swallowing.load(Ordering::Relaxed) {
            &self.swallowed
        } else if self.unlucky() || line.try_send((self.due(), packet.into())).is_err() {
            &self.lost
        } else {
            &self.passed
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn due(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.delay_ms.load(Ordering::Relaxed))
    }

    /// SplitMix64: the same losses in every run.
    fn unlucky(&self) -> bool {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut mixed = self.dice.fetch_add(STEP, Ordering::Relaxed);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % 1000 < self.loss.load(Ordering::Relaxed)
    }

    fn command(&self, command: &str) -> Option<String> {
        match command.split_once(' ').unwrap_or((command, "")) {
            ("stats", "") => return Some(self.term()),
            ("delay", value) => self.delay_ms.store(value.parse().ok()?, Ordering::Relaxed),
            ("loss", value) => self.loss.store(value.parse().ok()?, Ordering::Relaxed),
            ("swallow", "") => self.swallowing.store(true, Ordering::Relaxed),
            ("pass", "") => self.swallowing.store(false, Ordering::Relaxed),
            _ => return None,
        }
        Some(control::OK.into())
    }

    fn term(&self) -> String {
        let counters = [("passed", &self.passed), ("lost", &self.lost), ("swallowed", &self.swallowed)];
        control::term(counters.map(|(name, counter)| (name, counter.load(Ordering::Relaxed).to_string())))
    }
}
