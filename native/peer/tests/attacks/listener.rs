//! What strangers try to use up at a listener, and that others do not notice it.
#![allow(clippy::print_stderr)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::common::raw::{
    self, Stream, dial, dial_from, eventually, numbered, opening, opening_to, question, session, stranger, word,
};
use crate::common::{Forwarder, PATIENCE, attackers, engine, frame, listener, message, number, request, send, until};
use macula_peer::{Config, Engine, Event, Handler, Inbound, Listen, Message, Shares, Unhandled};
use macula_peer_testkit::quic::{self, tokio_runtime};
use macula_peer_wire::MessageType::{Ping, Pong, Publish};
use quinn::{Connection, VarInt};
use tokio::task::JoinSet;

const FORGOTTEN: Option<VarInt> = Some(VarInt::from_u32(12));
const TOO_MANY: Option<VarInt> = Some(VarInt::from_u32(14));

/// Answers pings, and keeps the numbers of other messages.
#[derive(Default)]
struct Server {
    numbers: Mutex<Vec<u64>>,
}

impl Handler for Server {
    fn message(&self, message: Inbound) -> Result<(), Unhandled> {
        match (message.kind, message.reply) {
            (Ping, Some(token)) => drop(token.reply(frame(Pong, 1, 8))),
            _ => self.numbers.lock().unwrap().extend(number(&message.payload)),
        }
        Ok(())
    }

    fn event(&self, _: Event) -> bool {
        true
    }
}

fn server(config: Config) -> (Engine, Arc<Server>, String) {
    let (engine, server) = (engine(config), Arc::new(Server::default()));
    engine.set_handler(Some(server.clone()));
    let port = engine.listen(Listen::default()).unwrap().port();
    (engine, server, format!("127.0.0.1:{port}"))
}

/// A node that sends numbered messages one after the other, and measures a request with each.
struct Honest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Engine, u64, Vec<Duration>)>,
}

impl Honest {
    fn start(address: &str) -> Self {
        let (stop, address) = (Arc::new(AtomicBool::new(false)), address.to_owned());
        let client = engine(Config::default());
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut sent, mut times) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                send(&client, &address, message(Publish, sent, PATIENCE)).unwrap();
                sent += 1;
                let asked = Instant::now();
                request(&client, &address, message(Ping, 0, PATIENCE)).unwrap();
                times.push(asked.elapsed());
                std::thread::sleep(Duration::from_millis(2));
            }
            (client, sent, times)
        });
        Self { stop, thread }
    }

    /// Every message has arrived once and in order. Returns how long 99 of 100 requests took at the most.
    fn finish(self, server: &Server) -> Duration {
        let times = self.times(server);
        times[times.len() * 99 / 100]
    }

    /// The same. Returns how long each request took, the shortest first.
    fn times(self, server: &Server) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        let (client, sent, mut times) = self.thread.join().unwrap();
        until("all arrive", || server.numbers.lock().unwrap().len() >= sent as usize);
        assert_eq!(*server.numbers.lock().unwrap(), (0..sent).collect::<Vec<_>>());
        client.stop();
        server.numbers.lock().unwrap().clear();
        times.sort_unstable();
        times
    }
}

/// How long 99 of 100 requests take at the most while nothing else happens.
fn quiet(server: &Server, address: &str) -> Duration {
    let honest = Honest::start(address);
    std::thread::sleep(Duration::from_millis(500));
    honest.finish(server)
}

fn report(what: &str, quiet: Duration, flooded: Duration) {
    eprintln!("{what}: 99 of 100 requests within {quiet:?} before, {flooded:?} meanwhile");
}

/// Opens sessions as fast as the receiver greets them; their streams are then reset.
async fn open_and_reset(connection: &Connection, ids: std::ops::Range<u64>) {
    let mut streams = JoinSet::new();
    for id in ids {
        let connection = connection.clone();
        streams.spawn(async move {
            let mut stream = Stream::open(&connection).await;
            stream.say(opening(id, 0)).await;
            let greeted = stream.greeting().await.is_ok();
            let _ = stream.send.reset(0u8.into());
            greeted
        });
        if streams.len() >= 64 {
            streams.join_next().await;
        }
    }
    streams.join_all().await;
}

/// Walks over all that were open made this quadratic, under a lock that every other sender needed.
#[test]
fn one_key_has_only_so_many_open_sessions_and_costs_others_no_time() {
    let attackers = attackers();
    let (engine, server, address) = server(Config::default());
    let before = quiet(&server, &address);
    let honest = Honest::start(&address);
    attackers.block_on(async {
        let key = quic::key().unwrap();
        let mut open = Vec::new();
        let mut refused = 0;
        for connection in 0..8 {
            let connection_of_key = dial(&address, &key).await;
            // Few streams are allowed before a message has come.
            Stream::open(&connection_of_key).await.ask(frame(Ping, 0, 8)).await;
            let mut opened = JoinSet::new();
            for id in 0..200 {
                let mut stream = Stream::open(&connection_of_key).await;
                opened.spawn(async move {
                    stream.say(opening(1000 * connection + id, 0)).await;
                    let greeted = stream.greeting().await;
                    (stream, greeted)
                });
            }
            for (stream, greeted) in opened.join_all().await {
                match greeted {
                    Ok(_) => open.push(stream),
                    Err(code) => {
                        assert_eq!(code, TOO_MANY);
                        refused += 1;
                    }
                }
            }
        }
        assert_eq!((open.len(), refused), (256, 1600 - 256));
        assert_eq!(refused_by(&engine, "sessions"), 1600 - 256);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            let mut floods = JoinSet::new();
            for n in 0..8 {
                let address = address.clone();
                floods.spawn(async move { open_and_reset(&stranger(&address).await, 1000 * n..1000 * n + 200).await });
            }
            floods.join_all().await;
        }
        drop(open);
    });
    let meanwhile = honest.finish(&server);
    report("open sessions", before, meanwhile);
    assert!(meanwhile < Duration::from_millis(250), "{meanwhile:?}");
    engine.stop();
}

/// Sends messages over `connections` connections, in a session each, as fast as they are taken.
async fn flood_messages(address: String, connections: u64) {
    let key = quic::key().unwrap();
    let messages = raw::map(Publish, &[("text", raw::bin("a flood"))]).repeat(1000);
    let mut floods = JoinSet::new();
    for id in 0..connections {
        let (connection, messages) = (dial(&address, &key).await, messages.clone());
        floods.spawn(async move {
            let (mut stream, ..) = session(&connection, id).await;
            stream.say(numbered(0)).await;
            // It ends with the server.
            while stream.send.write_all(&messages).await.is_ok() {}
        });
    }
    floods.join_all().await;
}

/// The median time of a request, without and with a flood: of three rounds the one in which the flood cost least,
/// because other work of the machine may add to it.
fn beside<F>(flood: impl Fn(String) -> F) -> (Duration, Duration)
where
    F: Future<Output = ()> + Send + 'static,
{
    let attackers = attackers();
    let rounds = (0..3).map(|_| {
        let (engine, server, address) = server(Config::default());
        let half = |times: Vec<Duration>| times[times.len() / 2];
        let honest = Honest::start(&address);
        std::thread::sleep(Duration::from_millis(500));
        let quiet = half(honest.times(&server));
        let flooding = attackers.spawn(flood(address.clone()));
        std::thread::sleep(Duration::from_millis(200));
        let honest = Honest::start(&address);
        std::thread::sleep(Duration::from_secs(1));
        let flooded = half(honest.times(&server));
        assert!(!flooding.is_finished());
        flooding.abort();
        engine.stop();
        eprintln!("half of the requests within {quiet:?} before, {flooded:?} meanwhile");
        (quiet, flooded)
    });
    rounds.min_by_key(|(_, flooded)| *flooded).unwrap()
}

/// Those with much to do used to have it done all at once, and half of the requests beside them took more than 16 ms.
#[test]
fn a_key_that_floods_messages_costs_others_little_time() {
    let (quiet, flooded) = beside(|address| flood_messages(address, 8));
    assert!(flooded < 8 * quiet + Duration::from_millis(10), "{quiet:?}, {flooded:?}");
}

/// Of a session that is no longer known everything that is owed arrives again.
#[test]
fn sessions_of_one_key_cost_no_other_sender_its_own() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 7, 0.0, Duration::ZERO);
    // Its links die soon when nothing comes.
    let client = engine(Config { keep_alive: Duration::from_millis(300), ..Config::default() });
    let through = forwarder.address.to_string();
    send(&client, &through, message(Publish, 0, PATIENCE)).unwrap();
    until("it arrives", || inbox.len() == 1);
    let runtime = tokio_runtime(2).unwrap();
    let (attacker, first_run) = runtime.block_on(async {
        let attacker = stranger(&address).await;
        let (mut stream, ..) = session(&attacker, u64::MAX).await;
        stream.say([numbered(0), frame(Publish, 1000, 8).to_vec()].concat()).await;
        assert_eq!(word(&mut stream).await, 1);
        stream.send.reset(0u8.into()).unwrap();
        let mut stream = Stream::open(&attacker).await;
        stream.say(opening(u64::MAX, 0)).await;
        let (known, run, expected) = stream.greeting().await.unwrap();
        assert_eq!((known, expected), (true, 1));
        stream.send.reset(0u8.into()).unwrap();
        (attacker, run)
    });
    // Everything of the honest one is without a connection from here on.
    forwarder.swallow(true);
    for n in 1..20 {
        send(&client, &through, message(Publish, n, PATIENCE)).unwrap();
    }
    until("the link is dead", || server.stats().accepted.len() == 1);
    runtime.block_on(async {
        let mut floods = JoinSet::new();
        for n in 0..8 {
            let attacker = attacker.clone();
            floods.spawn(async move { open_and_reset(&attacker, 3000 * n..3000 * (n + 1)).await });
        }
        floods.join_all().await;
        // Its own sessions were evicted, and it is told: nothing more is taken from it.
        let mut stream = Stream::open(&attacker).await;
        let again = [opening_to(u64::MAX, 0, first_run), numbered(0), frame(Publish, 1000, 8).to_vec()].concat();
        stream.say(again).await;
        assert_eq!((stream.greeting().await, stream.stopped().await), (Err(FORGOTTEN), FORGOTTEN));
    });
    forwarder.swallow(false);
    until("all arrive", || inbox.len() >= 21);
    let restarted = |event: &Event| matches!(event, Event::SessionRestarted { .. });
    assert!(!inbox.events.lock().unwrap().iter().any(restarted));
    assert_eq!(inbox.numbers(), (0..20).chain([1000]).collect::<Vec<_>>());
    client.stop();
    server.stop();
}

/// Keys cost nothing. What is known of a request decides whether its answer can still come when its link has died.
#[test]
fn requests_of_many_keys_at_one_address_cost_no_other_client_an_answer() {
    let (server, inbox, address) = listener(Config { max_known_requests: 64, ..Config::default() });
    tokio_runtime(2).unwrap().block_on(async {
        let ask = async |connection: &Connection, asked: Vec<u8>| {
            let mut stream = Stream::open(connection).await;
            stream.say(asked).await;
            stream.send.finish().unwrap();
            stream
        };
        let honest = quic::key().unwrap();
        let connection = dial(&address, &honest).await;
        let mut unanswered = vec![ask(&connection, question(1, false, Ping, 7)).await];
        eventually("it is asked", || inbox.len() == 1).await;
        for _ in 0..32 {
            let flood = dial_from("127.0.0.2", &address, &quic::key().unwrap(), raw::transport()).await;
            for id in 0..4 {
                unanswered.push(ask(&flood, question(id, false, Ping, 1000)).await);
            }
        }
        eventually("so are the others", || inbox.len() == 129).await;
        assert_eq!(refused_by(&server, "requests"), 129 - 64);
        connection.close(0u8.into(), b"");
        let token = inbox.messages.lock().unwrap().remove(0).reply.unwrap();
        // The connection may be gone, and the answer is kept.
        let _ = token.reply(frame(Pong, 7, 8));
        let mut again = ask(&dial(&address, &honest).await, question(1, true, Ping, 7)).await;
        let answer = again.frame().await.unwrap();
        assert_eq!((answer.type_id(), number(answer.payload())), (Pong.id(), Some(7)));
        assert_eq!(inbox.len(), 128, "it is not handed over again");
    });
    server.stop();
}

/// The connections of a flood that are still there.
fn alive(flood: &[Connection]) -> usize {
    flood.iter().filter(|connection| connection.close_reason().is_none()).count()
}

/// Connects with this key from one socket, as often as it is asked to.
async fn flood(to: &str, from: &str, keys: impl Fn() -> Arc<quic::Key>, times: usize) -> Vec<Connection> {
    let endpoint = quinn::Endpoint::client(format!("{from}:0").parse().unwrap()).unwrap();
    let mut connecting = JoinSet::new();
    let mut connected = Vec::new();
    for _ in 0..times {
        let config = quic::client_config_with_key(raw::ALPN, raw::transport(), &keys()).unwrap();
        let attempt = endpoint.connect_with(config, to.parse().unwrap(), "node").unwrap();
        connecting.spawn(attempt);
        if connecting.len() >= 50 {
            connected.extend(connecting.join_next().await.unwrap().unwrap().ok());
        }
    }
    connected.extend(connecting.join_all().await.into_iter().flatten());
    connected
}

/// A node at this address that has never been here before. How long it takes to be heard.
fn newcomer(to: &str, from: &str) -> Duration {
    let client = engine(Config { ip: Some(from.parse().unwrap()), ..Config::default() });
    let begun = Instant::now();
    send(&client, to, message(Ping, 0, PATIENCE)).unwrap();
    let answered = request(&client, to, message(Ping, 0, PATIENCE));
    let took = begun.elapsed();
    answered.unwrap();
    client.stop();
    took
}

fn refused_by(engine: &Engine, limit: &str) -> u64 {
    engine.stats().refused.into_iter().find(|(name, _)| *name == limit).unwrap().1
}

#[test]
fn one_key_has_its_share_of_the_connections_and_no_other_is_refused() {
    let attackers = attackers();
    let (engine, server, address) = server(Config::default());
    let before = quiet(&server, &address);
    let honest = Honest::start(&address);
    attackers.block_on(async {
        let key = Arc::new(quic::key().unwrap());
        let flood = flood(&address, "127.0.0.1", || key.clone(), 500).await;
        // A tenth of 1,024, beside the honest node. For the client, the handshake ends before the listener has checked
        // its key.
        eventually("only its share is left", || engine.stats().accepted.len() == 103 + 1).await;
        assert!(refused_by(&engine, "connections_per_key") > 0);
        let took = tokio::task::spawn_blocking({
            let address = address.clone();
            move || newcomer(&address, "127.0.0.1")
        });
        assert!(took.await.unwrap() < Duration::from_secs(1));
        // Places that are given back are free.
        drop(flood);
    });
    let meanwhile = honest.finish(&server);
    report("connections of one key", before, meanwhile);
    assert!(meanwhile < Duration::from_millis(250), "{meanwhile:?}");
    engine.stop();
}

/// Keys cost nothing.
#[test]
fn one_address_has_its_share_of_the_connections_and_others_still_get_in_when_all_are_taken() {
    let engine = engine(Config { max_accepted: 160, ..Config::default() });
    let shares = Shares { handshake_rate: 10_000, ..Shares::default() };
    let port = engine.listen(Listen { shares, ..Listen::default() }).unwrap().port();
    let server = Arc::new(Server::default());
    engine.set_handler(Some(server.clone()));
    let address = format!("127.0.0.1:{port}");
    let runtime = tokio_runtime(2).unwrap();
    let fresh = || Arc::new(quic::key().unwrap());
    let (one, two) = runtime.block_on(async {
        let one = flood(&address, "127.0.0.2", fresh, 200).await;
        assert_eq!((alive(&one), refused_by(&engine, "connections_per_address") > 0), (80, true));
        let two = flood(&address, "127.0.0.3", fresh, 200).await;
        assert_eq!((alive(&two), refused_by(&engine, "connections") > 0), (60, true), "some are kept for newcomers");
        (one, two)
    });
    for from in ["127.0.0.4", "127.0.0.5", "127.0.0.6"] {
        let took = newcomer(&address, from);
        assert!(took < Duration::from_secs(1), "{from}: {took:?}");
    }
    assert_eq!((alive(&one), alive(&two)), (80, 60));
    runtime.block_on(async { drop((one, two)) });
    engine.stop();
}

#[test]
fn one_address_has_its_share_of_the_handshakes() {
    let engine = engine(Config::default());
    let shares = Shares { handshake_rate: 100, ..Shares::default() };
    let port = engine.listen(Listen { shares, ..Listen::default() }).unwrap().port();
    engine.set_handler(Some(Arc::new(Server::default())));
    let address = format!("127.0.0.1:{port}");
    let runtime = tokio_runtime(2).unwrap();
    let flood = runtime.spawn({
        let address = address.clone();
        async move {
            let begun = Instant::now();
            let mut connected = 0;
            while begun.elapsed() < Duration::from_secs(2) {
                connected += flood(&address, "127.0.0.2", || Arc::new(quic::key().unwrap()), 100).await.len();
            }
            connected
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    for from in ["127.0.0.3", "127.0.0.4"] {
        let took = newcomer(&address, from);
        assert!(took < Duration::from_secs(1), "{from}: {took:?}");
    }
    let connected = runtime.block_on(flood).unwrap();
    // Two seconds' worth at once, and then 50 a second.
    assert!((100..300).contains(&connected), "{connected}");
    assert!(refused_by(&engine, "handshake_rate_per_address") > 0);
    engine.stop();
}

/// Connections cost nothing either: each had room for four of the largest frames, and for the beginnings of many more.
#[test]
fn one_key_gathers_its_share_of_frames_over_any_number_of_connections_and_others_send_theirs() {
    let (engine, server, address) = server(Config::default());
    let runtime = tokio_runtime(2).unwrap();
    let large = frame(Publish, 1, 8 << 20);
    let complete = Arc::new(AtomicUsize::new(0));
    let _streams = runtime.block_on(async {
        let (key, mut streams) = (quic::key().unwrap(), JoinSet::new());
        for _ in 0..4 {
            let connection = dial(&address, &key).await;
            for _ in 0..5 {
                let mut stream = Stream::open(&connection).await;
                let (bytes, complete) = (large.slice(..large.len() - 1), complete.clone());
                streams.spawn(async move {
                    // All but the last byte.
                    stream.send.write_chunk(bytes).await.unwrap();
                    complete.fetch_add(1, Ordering::Relaxed);
                    std::future::pending::<()>().await;
                });
            }
        }
        eventually("its share is used up", || complete.load(Ordering::Relaxed) >= 7).await;
        streams
    });
    let client = crate::common::engine(Config::default());
    let begun = Instant::now();
    for n in 0..3 {
        send(&client, &address, Message { frame: frame(Publish, n, 8 << 20), ..message(Publish, n, PATIENCE) })
            .unwrap();
    }
    until("they arrive", || server.numbers.lock().unwrap().len() == 3);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(complete.load(Ordering::Relaxed), 7, "of 64 MiB");
    client.stop();
    engine.stop();
}
