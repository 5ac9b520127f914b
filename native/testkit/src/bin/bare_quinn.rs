//! The yardstick: what quinn alone can do in each shape, without any of the product around it.
//!
//! - `bare_quinn sink [--bind ADDR] [--alpn NAME]... [--streams N] [--workers N]` counts frames, however they arrive;
//!   the commands are `stats`, `reset` and `quit`. At the default of 256 streams a stream per message is bound by the
//!   round trip that gives the credit back, so compare only with what has the same limit. A session (docs/protocol.md)
//!   gets the acknowledgements that it waits for; its opening and its numbers are not counted as frames.
//! - `bare_quinn echo`, with the same options and commands, returns the frame of each bidirectional stream.
//! - `bare_quinn source --addr ADDR [--shape bi|framed|sync|framed-sync] [--senders N] [--messages M] [--size BYTES]
//!   [--coalesce N] [--driver plain|yield] [--alpn NAME] [--workers N]` sends and reports. The framed shapes write all
//!   frames to one stream, in batches of `--coalesce`; a call is then one batch.
//! - `bare_quinn request --addr ADDR [--senders N] [--messages M] [--size BYTES] [--driver plain|yield] [--alpn NAME]
//!   [--workers N]` asks an echo and reports.

use std::collections::VecDeque;
use std::future::Future;
use std::net::{SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use macula_peer_testkit::frame::{self, HEADER};
use macula_peer_testkit::quic::{self, Error, poll_now};
use macula_peer_testkit::{control, options::Options};
use quinn::{Connection, Endpoint, EndpointConfig, RecvStream, Runtime, SendStream, TokioRuntime, WriteError};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("sink") => serve(arguments, sink),
        Some("echo") => serve(arguments, echo),
        Some("source") => source(Load::read(arguments, &["--shape", "--coalesce"])?),
        Some("request") => request(Load::read(arguments, &[])?),
        _ => Err("expected one of sink, echo, source, request".into()),
    }
}

/// Runs one task per connection until told to quit.
fn serve<F>(arguments: impl Iterator<Item = String>, task: fn(Connection, Arc<Counters>) -> F) -> Result<(), Error>
where
    F: Future<Output = ()> + Send + 'static,
{
    let options = Options::read(arguments, &["--bind", "--alpn", "--streams", "--workers"])?;
    let bind: SocketAddr = options.get("--bind", ([127, 0, 0, 1], 0).into())?;
    let alpn = options.all("--alpn", &["macula-peer/1", "macula"]);
    let streams = options.get("--streams", 256)?;
    let config = quic::server_config(&alpn, quic::transport(streams, streams))?;
    let runtime = quic::tokio_runtime(options.get("--workers", 1)?)?;
    let endpoint = runtime.block_on(async {
        let socket = UdpSocket::bind(bind)?;
        Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(quic::YieldingRuntime))
    })?;
    let counters = Arc::new(Counters::new());
    runtime.spawn(accept(endpoint.clone(), counters.clone(), task));
    control::serve(endpoint.local_addr()?.port(), |command| match command {
        "stats" => Some(counters.term()),
        "reset" => {
            counters.reset();
            Some(control::OK.into())
        }
        _ => None,
    })?;
    runtime.shutdown_background();
    Ok(())
}

async fn accept<F>(endpoint: Endpoint, counters: Arc<Counters>, task: fn(Connection, Arc<Counters>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    while let Some(incoming) = endpoint.accept().await {
        let counters = counters.clone();
        tokio::spawn(async move {
            if let Ok(connection) = incoming.await {
                counters.connections.fetch_add(1, Ordering::Relaxed);
                task(connection, counters).await;
            }
        });
    }
}

async fn sink(connection: Connection, counters: Arc<Counters>) {
    let unidirectional = connection.clone();
    let counters_too = counters.clone();
    tokio::spawn(async move {
        while let Ok(receive) = unidirectional.accept_uni().await {
            count(None, receive, &counters_too);
        }
    });
    while let Ok((send, receive)) = connection.accept_bi().await {
        count(Some(send), receive, &counters);
    }
}

/// A message alone on its stream is complete when the stream is accepted, and a task for it would cost more than it.
fn count(send: Option<SendStream>, mut receive: RecvStream, counters: &Arc<Counters>) {
    counters.streams.fetch_add(1, Ordering::Relaxed);
    let mut progress = Progress::default();
    loop {
        match poll_now(pin!(count_some(&mut receive, &mut progress, counters))) {
            Poll::Ready(true) => {}
            Poll::Ready(false) => return,
            Poll::Pending => break,
        }
    }
    let counters = counters.clone();
    tokio::spawn(async move { count_to_end(send, receive, progress, &counters).await });
}

async fn count_to_end(
    mut send: Option<SendStream>,
    mut receive: RecvStream,
    mut progress: Progress,
    counters: &Counters,
) {
    let mut said = None;
    loop {
        if let (Some(send), Some(word)) = (&mut send, progress.acknowledgement(&mut said))
            && send.write_all(&word).await.is_err()
        {
            return;
        }
        if !count_some(&mut receive, &mut progress, counters).await {
            return;
        }
    }
}

/// Counts what has come. False when that was all.
async fn count_some(receive: &mut RecvStream, progress: &mut Progress, counters: &Counters) -> bool {
    let mut chunks = [const { Bytes::new() }; 32];
    let Ok(Some(read)) = receive.read_chunks(&mut chunks).await else { return false };
    let (mut frames, mut bytes) = (0, 0);
    for chunk in &chunks[..read] {
        frames += progress.advance(chunk);
        bytes += chunk.len();
    }
    counters.add(frames, bytes);
    true
}

async fn echo(connection: Connection, counters: Arc<Counters>) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        counters.streams.fetch_add(1, Ordering::Relaxed);
        let mut request = Request::default();
        let unfinished = poll_now(pin!(return_frame(&mut send, &mut receive, &mut request, &counters))).is_pending();
        if unfinished {
            let counters = counters.clone();
            tokio::spawn(async move { return_frame(&mut send, &mut receive, &mut request, &counters).await });
        }
    }
}

#[derive(Default)]
struct Request {
    progress: Progress,
    bytes: Vec<u8>,
    complete: bool,
    written: usize,
}

/// Keeps its state in `request`, so that one poll can be thrown away and the rest done in a task.
async fn return_frame(
    send: &mut SendStream,
    receive: &mut RecvStream,
    request: &mut Request,
    counters: &Counters,
) -> Result<(), Error> {
    while !request.complete {
        let chunk = receive.read_chunk(usize::MAX, true).await?.ok_or("no whole frame")?;
        request.bytes.extend_from_slice(&chunk.bytes);
        request.complete = request.progress.advance(&chunk.bytes) > 0;
        counters.add(request.complete.into(), chunk.bytes.len());
    }
    while request.written < request.bytes.len() {
        request.written += send.write(&request.bytes[request.written..]).await?;
    }
    Ok(send.finish()?)
}

/// How far into a frame a stream is.
#[derive(Default)]
struct Progress {
    header: [u8; HEADER],
    have: usize,
    missing: usize,
    /// The stream is one of a session.
    session: bool,
    /// The number of the session's next message.
    number: u64,
}

impl Progress {
    /// How many frames end in `bytes`, without those about the session.
    fn advance(&mut self, mut bytes: &[u8]) -> u64 {
        let mut frames = 0;
        while !bytes.is_empty() {
            if self.have < HEADER {
                let taken = bytes.len().min(HEADER - self.have);
                self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
                self.have += taken;
                bytes = &bytes[taken..];
                if self.have < HEADER {
                    break;
                }
                self.missing = frame::payload_length(&self.header);
            }
            let taken = bytes.len().min(self.missing);
            let kind = self.header[1];
            if kind == SESSION_NUMBER {
                // How long to keep the session may follow the number.
                let read = frame::payload_length(&self.header) - self.missing;
                let of_number = bytes[..taken].iter().take(NUMBER_LEN.saturating_sub(read));
                self.number = of_number.fold(self.number, |number, &byte| number << 8 | u64::from(byte));
            }
            self.missing -= taken;
            bytes = &bytes[taken..];
            if self.missing == 0 {
                self.have = 0;
                match kind {
                    SESSION => self.session = true,
                    SESSION_NUMBER => {}
                    _ => (frames, self.number) = (frames + 1, self.number + 1),
                }
            }
        }
        frames
    }

    /// What to tell the sender of a session, if anything is new since `said`.
    fn acknowledgement(&self, said: &mut Option<u64>) -> Option<Vec<u8>> {
        const UNKNOWN_AND_EXPECTS_0: [u8; 17] = [0; 17];
        const EXPECTED: u8 = 0;
        if !self.session || *said == Some(self.number) {
            return None;
        }
        let first = said.replace(self.number).is_none();
        let greeting = if first { &UNKNOWN_AND_EXPECTS_0[..] } else { &[] };
        Some([greeting, &[EXPECTED], &self.number.to_be_bytes()].concat())
    }
}

/// Type ids of the frames that are about a session.
const SESSION: u8 = 0xF0;
const SESSION_NUMBER: u8 = 0xF1;
const NUMBER_LEN: usize = 8;

struct Counters {
    start: Instant,
    connections: AtomicU64,
    streams: AtomicU64,
    frames: AtomicU64,
    bytes: AtomicU64,
    first_ns: AtomicU64,
    last_ns: AtomicU64,
}

impl Counters {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            connections: AtomicU64::new(0),
            streams: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            first_ns: AtomicU64::new(0),
            last_ns: AtomicU64::new(0),
        }
    }

    fn add(&self, frames: u64, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if frames > 0 {
            let now = self.start.elapsed().as_nanos() as u64;
            if self.frames.fetch_add(frames, Ordering::Relaxed) == 0 {
                self.first_ns.store(now, Ordering::Relaxed);
            }
            self.last_ns.store(now, Ordering::Relaxed);
        }
    }

    fn term(&self) -> String {
        control::term(self.fields().map(|(name, counter)| (name, counter.load(Ordering::Relaxed).to_string())))
    }

    fn reset(&self) {
        for (_, counter) in self.fields() {
            counter.store(0, Ordering::Relaxed);
        }
    }

    fn fields(&self) -> [(&'static str, &AtomicU64); 6] {
        [
            ("frames", &self.frames),
            ("bytes", &self.bytes),
            ("connections", &self.connections),
            ("streams", &self.streams),
            ("first_ns", &self.first_ns),
            ("last_ns", &self.last_ns),
        ]
    }
}

/// The task of a load generator.
struct Load {
    address: SocketAddr,
    shape: String,
    senders: usize,
    messages: usize,
    frame: Bytes,
    /// How many frames are written at a time.
    coalesce: usize,
    yielding: bool,
    alpn: String,
    workers: usize,
}

impl Load {
    fn read(arguments: impl Iterator<Item = String>, more: &[&str]) -> Result<Self, Error> {
        let common = ["--addr", "--senders", "--messages", "--size", "--driver", "--alpn", "--workers"];
        let options = Options::read(arguments, &[&common, more].concat())?;
        Ok(Self {
            address: options.require("--addr")?,
            shape: options.get("--shape", "bi".into())?,
            senders: options.get("--senders", 1usize)?.max(1),
            messages: options.get("--messages", 100_000)?,
            frame: frame::store_of_size(options.get("--size", 128)?)?.into(),
            coalesce: options.get("--coalesce", 1usize)?.max(1),
            yielding: match options.get("--driver", String::from("yield"))?.as_str() {
                "yield" => true,
                "plain" => false,
                other => return Err(format!("no such driver: {other}").into()),
            },
            alpn: options.get("--alpn", "macula".into())?,
            workers: options.get("--workers", 1)?,
        })
    }

    async fn connect(&self, transport: quinn::TransportConfig) -> Result<Connection, Error> {
        let local: SocketAddr = match self.address {
            SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            SocketAddr::V6(_) => ([0u16; 8], 0).into(),
        };
        let runtime: Arc<dyn Runtime> =
            if self.yielding { Arc::new(quic::YieldingRuntime) } else { Arc::new(TokioRuntime) };
        let endpoint = Endpoint::new(EndpointConfig::default(), None, UdpSocket::bind(local)?, runtime)?;
        let config = quic::client_config(&self.alpn, transport)?;
        Ok(endpoint.connect_with(config, self.address, "localhost")?.await?)
    }

    /// How many messages each sender sends.
    fn shares(&self) -> impl Iterator<Item = usize> + use<> {
        let (share, rest) = (self.messages / self.senders, self.messages % self.senders);
        (0..self.senders).map(move |sender| share + usize::from(sender < rest))
    }

    /// What a sender writes to a stream that takes frame after frame.
    fn writes(&self, share: usize) -> impl Iterator<Item = Bytes> + Send + use<> {
        let batch = Bytes::from(self.frame.repeat(self.coalesce));
        let rest = batch.slice(..self.frame.len() * (share % self.coalesce));
        let whole = std::iter::repeat_n(batch, share / self.coalesce);
        whole.chain((!rest.is_empty()).then_some(rest))
    }

    fn report(&self, elapsed: Duration, mut calls: Vec<u64>) -> Result<(), Error> {
        calls.sort_unstable();
        let percentile = |percent| calls.get(calls.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0);
        let line = control::term([
            ("messages", self.messages.to_string()),
            ("senders", self.senders.to_string()),
            ("elapsed_us", elapsed.as_micros().to_string()),
            ("per_second", ((self.messages as f64 / elapsed.as_secs_f64()) as u64).to_string()),
            ("call_p50_ns", percentile(50).to_string()),
            ("call_p99_ns", percentile(99).to_string()),
        ]);
        Ok(control::say(format_args!("{line}."))?)
    }
}

fn source(load: Load) -> Result<(), Error> {
    const FRAMED_SEND_WINDOW: u64 = 128 * 1024;
    let runtime = quic::tokio_runtime(load.workers)?;
    let mut transport = quic::transport(0, 0);
    if load.shape.starts_with("framed") {
        // quinn scans its send buffer linearly.
        transport.send_window(FRAMED_SEND_WINDOW);
    }
    let connection = runtime.block_on(async { load.connect(transport).await })?;
    let start = Instant::now();
    let calls = match load.shape.as_str() {
        "bi" => runtime
            .block_on(each_in_a_task(&load, |share| a_stream_each(connection.clone(), load.frame.clone(), share))),
        "framed" => runtime.block_on(framed(&load, &connection)),
        "sync" => in_threads(&load, |share| a_stream_each_sync(&load, &connection, runtime.handle(), share)),
        "framed-sync" => framed_sync(&load, &connection, runtime.handle()),
        other => Err(format!("no such shape: {other}").into()),
    }?;
    load.report(start.elapsed(), calls)?;
    // It ends without closing: a peer that is told that a connection is closed drops what has arrived and was not read.
    std::mem::forget(connection);
    Ok(())
}

async fn a_stream_each(connection: Connection, frame: Bytes, share: usize) -> Result<Vec<u64>, Error> {
    let mut clock = Clock::new(share);
    let mut recent = Recent::default();
    for _ in 0..share {
        let (mut send, receive) = connection.open_bi().await?;
        send.write_chunk(frame.clone()).await?;
        send.finish()?;
        drop(receive);
        clock.lap();
        recent.push(send);
    }
    recent.acknowledged().await?;
    Ok(clock.laps)
}

async fn framed(load: &Load, connection: &Connection) -> Result<Vec<u64>, Error> {
    let (send, _receive) = connection.open_bi().await?;
    let stream = Arc::new(Shared { stream: Mutex::new(send), freed: Notify::new() });
    let calls = each_in_a_task(load, |share| {
        let (stream, writes) = (stream.clone(), load.writes(share));
        async move {
            let mut clock = Clock::new(share);
            for frames in writes {
                stream.write(frames).await?;
                clock.lap();
            }
            Ok(clock.laps)
        }
    })
    .await?;
    let mut stream = stream.stream.lock().await;
    stream.finish()?;
    stream.stopped().await?;
    Ok(calls)
}

struct Shared {
    stream: Mutex<SendStream>,
    freed: Notify,
}

impl Shared {
    /// Takes the lock out of turn: in turn, senders that have queued up once would hand it round for ever, one
    /// message and one task switch each.
    async fn write(&self, frame: Bytes) -> Result<(), WriteError> {
        let mut stream = loop {
            let freed = self.freed.notified();
            match self.stream.try_lock() {
                Ok(stream) => break stream,
                Err(_) => freed.await,
            }
        };
        let written = stream.write_chunk(frame).await;
        drop(stream);
        self.freed.notify_waiters();
        written
    }
}

/// The shape of calls that must not wait: everything is tried on the caller's own thread.
fn in_threads(load: &Load, sender: impl Fn(usize) -> Result<Vec<u64>, Error> + Send + Copy) -> Result<Vec<u64>, Error> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = load.shares().map(|share| scope.spawn(move || sender(share))).collect();
        let mut calls = Vec::with_capacity(load.messages);
        for thread in threads {
            calls.extend(thread.join().map_err(|_| "a sender panicked")??);
        }
        Ok(calls)
    })
}

fn a_stream_each_sync(load: &Load, connection: &Connection, handle: &Handle, share: usize) -> Result<Vec<u64>, Error> {
    let mut clock = Clock::new(share);
    let mut recent = Recent::default();
    for _ in 0..share {
        let (mut send, receive) = now_or_block(handle, connection.open_bi())?;
        now_or_block(handle, send.write_chunk(load.frame.clone()))?;
        send.finish()?;
        drop(receive);
        clock.lap();
        recent.push(send);
    }
    handle.block_on(recent.acknowledged())?;
    Ok(clock.laps)
}

fn framed_sync(load: &Load, connection: &Connection, handle: &Handle) -> Result<Vec<u64>, Error> {
    let (send, _receive) = handle.block_on(connection.open_bi())?;
    let stream = std::sync::Mutex::new(send);
    let calls = in_threads(load, |share| {
        let mut clock = Clock::new(share);
        for frames in load.writes(share) {
            let mut stream = stream.lock().map_err(|_| "a sender panicked")?;
            now_or_block(handle, stream.write_chunk(frames))?;
            drop(stream);
            clock.lap();
        }
        Ok(clock.laps)
    })?;
    let mut stream = stream.into_inner().map_err(|_| "a sender panicked")?;
    stream.finish()?;
    handle.block_on(stream.stopped())?;
    Ok(calls)
}

fn now_or_block<F: Future>(handle: &Handle, future: F) -> F::Output {
    let mut future = pin!(future);
    match poll_now(future.as_mut()) {
        Poll::Ready(output) => output,
        Poll::Pending => handle.block_on(future),
    }
}

fn request(load: Load) -> Result<(), Error> {
    let runtime = quic::tokio_runtime(load.workers)?;
    let connection = runtime.block_on(async { load.connect(quic::transport(0, 0)).await })?;
    let start = Instant::now();
    let calls = runtime.block_on(each_in_a_task(&load, |share| ask(connection.clone(), load.frame.clone(), share)))?;
    load.report(start.elapsed(), calls)
}

async fn ask(connection: Connection, frame: Bytes, share: usize) -> Result<Vec<u64>, Error> {
    let mut clock = Clock::new(share);
    for _ in 0..share {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_chunk(frame.clone()).await?;
        send.finish()?;
        let mut left = frame.len();
        while let Some(chunk) = receive.read_chunk(left.max(1), true).await? {
            left = left.checked_sub(chunk.bytes.len()).ok_or("answer too long")?;
        }
        if left > 0 {
            return Err("answer too short".into());
        }
        clock.lap();
    }
    Ok(clock.laps)
}

/// Runs `sender` once per sender as tasks of the runtime's workers, and gathers what their calls took.
async fn each_in_a_task<F>(load: &Load, sender: impl Fn(usize) -> F) -> Result<Vec<u64>, Error>
where
    F: Future<Output = Result<Vec<u64>, Error>> + Send + 'static,
{
    let mut tasks: JoinSet<_> = load.shares().map(sender).collect();
    let mut calls = Vec::with_capacity(load.messages);
    while let Some(done) = tasks.join_next().await {
        calls.extend(done??);
    }
    Ok(calls)
}

/// Measures back to back: the end of one call is the beginning of the next, for one look at the clock a call.
struct Clock {
    last: Instant,
    laps: Vec<u64>,
}

impl Clock {
    fn new(laps: usize) -> Self {
        Self { last: Instant::now(), laps: Vec::with_capacity(laps) }
    }

    fn lap(&mut self) {
        let now = Instant::now();
        self.laps.push((now - self.last).as_nanos() as u64);
        self.last = now;
    }
}

/// The streams that may not have been acknowledged yet: more than a server usually lets be open at a time.
#[derive(Default)]
struct Recent(VecDeque<SendStream>);

impl Recent {
    fn push(&mut self, stream: SendStream) {
        const MOST_OPEN: usize = 1024;
        if self.0.len() == MOST_OPEN {
            self.0.pop_front();
        }
        self.0.push_back(stream);
    }

    async fn acknowledged(self) -> Result<(), Error> {
        for stream in self.0 {
            stream.stopped().await?;
        }
        Ok(())
    }
}
