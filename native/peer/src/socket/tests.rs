//! Over real sockets on loopback.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use macula_peer_core::proto::signal::Role;
use macula_peer_core::proto::signal::{Body, Key, MAX_LEN, Secret, Signal, Unverified};
use quinn::{Connection, Endpoint, EndpointConfig, TransportConfig};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::*;
use crate::relay::testing::{PATIENCE, client_config, server_config};
use crate::runtime::BatchingRuntime;

struct Side {
    socket: Arc<Socket>,
    quic: Endpoint,
    received: mpsc::Receiver<(ReceivedBy, Received)>,
}

fn side(server: bool) -> Side {
    let (signals, received) = signals();
    let socket = Socket::bind(Some(Ipv4Addr::LOCALHOST.into()), 0, None, refusals(), signals, Arc::default()).unwrap();
    let server = server.then(|| server_config(TransportConfig::default()));
    let mut config = EndpointConfig::default();
    config.grease_quic_bit(false);
    let quic = Endpoint::new_with_abstract_socket(config, server, socket.clone(), Arc::new(BatchingRuntime)).unwrap();
    Side { socket, quic, received }
}

async fn connected(from: &Side, to: &Side, at: SocketAddr) -> (Connection, Connection) {
    let connecting = from.quic.connect_with(client_config(TransportConfig::default()), at, "node").unwrap();
    let accepting = async { to.quic.accept().await.unwrap().await.unwrap() };
    let connections = async { tokio::join!(async { connecting.await.unwrap() }, accepting) };
    let (dialled, accepted) = timeout(PATIENCE, connections).await.unwrap();
    // For the rest of the test, as for the rest of a connection.
    std::mem::forget((from.socket.prove(at), to.socket.prove(accepted.remote_address())));
    (dialled, accepted)
}

/// Moves that many bytes from one side to the other, and checks that they are the same.
async fn moved(from: &Connection, to: &Connection, len: usize) {
    let sent: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let expected = sent.clone();
    let (from, to) = (from.clone(), to.clone());
    let sending = async move {
        let mut stream = from.open_uni().await.unwrap();
        stream.write_all(&sent).await.unwrap();
        stream.finish().unwrap();
        stream.stopped().await.unwrap();
    };
    let receiving = async move {
        let received = to.accept_uni().await.unwrap().read_to_end(len).await.unwrap();
        assert!(received == expected);
    };
    timeout(PATIENCE, async { tokio::join!(sending, receiving) }).await.unwrap();
}

fn ping(nonce: u64) -> Signal {
    Signal { id: 1, nonce, body: Body::Ping { sender: Role::Initiator } }
}

fn key() -> Key {
    Key::from(&Secret::from([1; 32]))
}

/// By the socket that it came by.
fn answer(socket: &Socket, via: ReceivedBy, received: &Received, answer: &[u8]) {
    match via {
        ReceivedBy::Main => socket.send_signal(received.from, answer),
        ReceivedBy::Extra(id) => socket.send_signal_by(id, received.from, answer),
    }
}

/// Answers every ping that is one, and lets nothing else pass.
async fn pong(socket: Arc<Socket>, mut received: mpsc::Receiver<(ReceivedBy, Received)>) {
    let key = key();
    while let Some((via, received)) = received.recv().await {
        let signal = Unverified::parse(received.bytes()).unwrap().verify(&key).unwrap();
        let pong = Signal { body: Body::Pong { sender: Role::Responder }, ..signal };
        answer(&socket, via, &received, &pong.encode(&key));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_at_full_speed_and_signals_share_a_socket() {
    const PINGS: u64 = 2000;
    let (mut client, server) = (side(false), side(true));
    let address = server.socket.local;
    let (dialled, accepted) = connected(&client, &server, address).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(pong(server.socket.clone(), server.received));
    let (rounds, mut round) = watch::channel(0);
    tasks.spawn(async move {
        loop {
            moved(&dialled, &accepted, 8 << 20).await;
            moved(&accepted, &dialled, 8 << 20).await;
            rounds.send_modify(|rounds| *rounds += 1);
        }
    });
    let key = key();
    let until = Instant::now() + PATIENCE;
    let mut missing: HashSet<u64> = (0..PINGS).collect();
    while !missing.is_empty() || *round.borrow_and_update() < 2 {
        assert!(Instant::now() < until, "{} pings are not answered", missing.len());
        for &nonce in missing.iter().take(64) {
            client.socket.send_signal(address, &ping(nonce).encode(&key));
        }
        // The kernel may have dropped some of either kind: those are sent again.
        while let Ok(Some((via, received))) = timeout(Duration::from_millis(20), client.received.recv()).await {
            assert_eq!((received.from, via), (address, ReceivedBy::Main));
            let pong = Unverified::parse(received.bytes()).unwrap().verify(&key).unwrap();
            assert_eq!(pong.body, Body::Pong { sender: Role::Responder });
            missing.remove(&pong.nonce);
        }
    }
    tasks.shutdown().await;
}

#[tokio::test]
async fn a_connection_is_dialled_over_an_extra_socket() {
    let (client, server) = (side(false), side(true));
    let extra = client.socket.open_beside().unwrap();
    let seen_at = extra.local_addr().unwrap();
    let id = client.socket.add_extra(extra, server.socket.local).unwrap();
    let (dialled, accepted) = connected(&client, &server, server.socket.local).await;
    assert_eq!(accepted.remote_address(), seen_at);
    moved(&dialled, &accepted, 8 << 20).await;
    moved(&accepted, &dialled, 8 << 20).await;

    client.socket.remove_extra(id);
    assert!(!client.socket.extras.any());
    // The server finds the client where it is now.
    moved(&dialled, &accepted, 1000).await;
    assert_eq!(accepted.remote_address(), client.socket.local);
}

#[tokio::test]
async fn a_connection_is_accepted_over_an_extra_socket_and_others_over_the_main_one() {
    let (client, other, server) = (side(false), side(false), side(true));
    let extra = server.socket.open_beside().unwrap();
    let address = extra.local_addr().unwrap();
    // A task waits on the main socket by now, and the extra one is read nevertheless. The peer's port is not known yet.
    let (beside, beside_accepted) = connected(&other, &server, server.socket.local).await;
    server.socket.add_extra(extra, (Ipv4Addr::LOCALHOST, 1).into()).unwrap();
    let (dialled, accepted) = connected(&client, &server, address).await;
    assert_eq!(dialled.remote_address(), address);
    tokio::join!(moved(&accepted, &dialled, 8 << 20), moved(&beside_accepted, &beside, 8 << 20));
    tokio::join!(moved(&dialled, &accepted, 8 << 20), moved(&beside, &beside_accepted, 8 << 20));
    assert_eq!((dialled.remote_address(), beside.remote_address()), (address, server.socket.local));
}

#[tokio::test]
async fn signals_by_an_extra_socket_are_answered_by_it() {
    let (mut client, mut server) = (side(false), side(false));
    // From here on a task waits, and must be told of the extra socket.
    client.socket.send_signal(server.socket.local, &ping(1).encode(&key()));
    assert!(timeout(PATIENCE, server.received.recv()).await.is_ok());
    let extra = server.socket.open_beside().unwrap();
    let address = extra.local_addr().unwrap();
    let id = server.socket.add_extra(extra, client.socket.local).unwrap();
    let (sent, key) = (ping(3).encode(&key()), key());
    client.socket.send_signal(address, &sent);
    let (via, received) = timeout(PATIENCE, server.received.recv()).await.unwrap().unwrap();
    assert_eq!((received.bytes(), received.from, via), (&*sent, client.socket.local, ReceivedBy::Extra(id)));
    answer(&server.socket, via, &received, &ping(4).encode(&key));
    let (via, answer) = timeout(PATIENCE, client.received.recv()).await.unwrap().unwrap();
    assert_eq!((answer.from, via), (address, ReceivedBy::Main));
}

/// An address without a listener.
#[cfg(target_os = "linux")]
fn closed_port() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_extra_socket_is_waited_for_after_an_icmp_error() {
    let (socket, closed) = (lone_socket(), closed_port());
    let id = socket.add_extra(socket.open_beside().unwrap(), closed).unwrap();
    let extra = socket.extras.get(id).unwrap();
    let transmit = Transmit { destination: closed, ecn: None, contents: &[7; 100], segment_size: None, src_ip: None };
    assert_eq!(socket.try_send(&transmit).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    report_icmp_errors(extra.io(), socket.local, true);
    socket.send_signal_by(id, closed, &[7; 100]);
    let until = Instant::now() + PATIENCE;
    while !extra.io().ready(Interest::WRITABLE).await.unwrap().is_write_closed() {
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(1)).await;
    }

    let mut room = socket.create_io_poller();
    let mut first = true;
    let waited = std::future::poll_fn(|cx| {
        let polled = room.as_mut().poll_writable(cx);
        assert!(!std::mem::take(&mut first) || polled.is_pending(), "a task that tries again at once would spin");
        polled
    });
    timeout(PATIENCE, waited).await.unwrap().unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_dial_hears_of_a_closed_port_after_another_by_the_same_extra_socket_ended() {
    let (socket, closed) = (lone_socket(), closed_port());
    let mut refused = socket.refusals.subscribe();
    let guard = socket.share(socket.open_beside().unwrap(), closed).unwrap();
    let mut first = Box::pin(guard.watch_errors());
    let mut second = Box::pin(guard.watch_errors());
    let both = async { tokio::join!(&mut first, &mut second) };
    assert!(timeout(Duration::from_millis(1), both).await.is_err());
    drop(first);
    socket.send_signal_by(guard.id, closed, &[7; 100]);
    let refused = async {
        tokio::select! {
            refused = refused.recv() => refused.unwrap(),
            never = second => match never {},
        }
    };
    assert_eq!(timeout(PATIENCE, refused).await.unwrap().destination, closed);
}

#[tokio::test]
async fn an_extra_socket_does_not_keep_a_main_socket_that_was_replaced() {
    let socket =
        Socket::bind(Some(Ipv4Addr::LOCALHOST.into()), 0, None, refusals(), signals().0, Arc::default()).unwrap();
    let guard = socket.share(socket.open_beside().unwrap(), (Ipv4Addr::LOCALHOST, 1).into()).unwrap();
    let address = socket.local;
    drop(socket);
    std::net::UdpSocket::bind(address).unwrap();
    assert_eq!(guard.heard(), 0);
}

#[tokio::test]
async fn an_extra_socket_hears_only_its_peer() {
    let mut side = side(true);
    let extra = side.socket.open_beside().unwrap();
    let address = extra.local_addr().unwrap();
    side.socket.add_extra(extra, (Ipv4Addr::LOCALHOST, 1).into()).unwrap();
    let signal = ping(1).encode(&key());
    let stranger = std::net::UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
    stranger.send_to(&signal, address).unwrap();
    stranger.send_to(&[0x40; 1200], address).unwrap();
    let peer = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    peer.send_to(&signal, address).unwrap();
    let (_, received) = timeout(PATIENCE, side.received.recv()).await.unwrap().unwrap();
    assert_eq!(received.from, peer.local_addr().unwrap());
    assert!(side.received.try_recv().is_err());
    assert!(side.socket.extras.towards(stranger.local_addr().unwrap()).is_none());
}

#[tokio::test]
async fn extra_sockets_and_their_routes_are_bounded() {
    let side = side(false);
    let peer = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let first = side.socket.open_beside().unwrap();
    let address = first.local_addr().unwrap();
    let first = side.socket.add_extra(first, peer(1)).unwrap();
    let mut others = Vec::new();
    while let Ok(id) = side.socket.add_extra(side.socket.open_beside().unwrap(), peer(2)) {
        others.push(id);
    }
    assert_eq!(others.len(), 63);

    // The peer is heard from many ports: the latest count, and QUIC is answered there by the socket that heard it.
    let senders: Vec<_> = (0..10).map(|_| std::net::UdpSocket::bind(peer(0)).unwrap()).collect();
    let routed = |sender: &std::net::UdpSocket| side.socket.extras.towards(sender.local_addr().unwrap()).is_some();
    for sender in &senders {
        let until = Instant::now() + PATIENCE;
        while !routed(sender) {
            assert!(Instant::now() < until);
            sender.send_to(&[0x40; 30], address).unwrap();
            sleep(Duration::from_millis(1)).await;
        }
    }
    assert_eq!(senders.iter().filter(|sender| routed(sender)).count(), 4);
    assert!(side.socket.extras.towards(peer(1)).is_none());

    side.socket.remove_extra(first);
    assert!(!senders.iter().any(routed));
    for id in others {
        side.socket.remove_extra(id);
    }
    assert!(side.socket.extras.towards(peer(2)).is_none());
}

#[tokio::test]
async fn a_burst_of_signals_that_the_kernel_joins_comes_apart_again() {
    let (client, mut server) = (side(false), side(false));
    // One system call, and with Linux' segmentation offload one buffer at the other end.
    let signals: Vec<_> = (0..8).map(|nonce| ping(nonce).encode(&key()).to_vec()).collect();
    let len = signals[0].len();
    let contents = signals.concat();
    client.socket.io.writable().await.unwrap();
    let at_once = client.socket.max_transmit_segments().min(signals.len());
    for contents in contents.chunks(at_once * len) {
        let destination = server.socket.local;
        let transmit = Transmit { destination, ecn: None, contents, segment_size: Some(len), src_ip: None };
        client.socket.try_send(&transmit).unwrap();
    }
    for signal in signals {
        let (_, received) = timeout(PATIENCE, server.received.recv()).await.unwrap().unwrap();
        assert_eq!(received.bytes(), signal);
    }
    assert!(len <= MAX_LEN);
}

/// Sends that many datagrams in one transmit, and waits until all have come.
async fn arrive(from: &Side, to: &mut Side, destination: SocketAddr, src_ip: Option<IpAddr>) {
    let signals: Vec<_> = (0..4).map(|nonce| ping(nonce).encode(&key()).to_vec()).collect();
    let (contents, len) = (signals.concat(), signals[0].len());
    from.socket.io.writable().await.unwrap();
    let ecn = Some(quinn::udp::EcnCodepoint::Ect0);
    let transmit = Transmit { destination, ecn, contents: &contents, segment_size: Some(len), src_ip };
    from.socket.try_send(&transmit).unwrap();
    for signal in signals {
        let (_, received) = timeout(PATIENCE, to.received.recv()).await.unwrap().unwrap();
        assert_eq!(received.bytes(), signal);
    }
}

#[tokio::test]
async fn a_source_address_that_is_gone_is_left_out() {
    let (client, mut server) = (side(false), side(true));
    let segments = client.socket.max_transmit_segments();
    // RFC 5737: no host's address, so not this host's.
    let gone = Some(Ipv4Addr::new(192, 0, 2, 1).into());
    let destination = server.socket.local;
    arrive(&client, &mut server, destination, gone).await;
    assert_eq!(client.socket.max_transmit_segments(), segments);
    assert!(!client.socket.sender.is_quirky(), "the destination has nothing to do with it");
}

#[tokio::test]
async fn the_errors_of_one_destination_cost_others_nothing() {
    let (client, mut server) = (side(false), side(true));
    let segments = client.socket.max_transmit_segments();
    let mut refused = client.socket.refusals.subscribe();
    client.socket.io.writable().await.unwrap();
    for nowhere in [(Ipv4Addr::LOCALHOST, 0), (Ipv4Addr::BROADCAST, 9)] {
        let destination = nowhere.into();
        let transmit = Transmit { destination, ecn: None, contents: &[0x40; 1200], segment_size: None, src_ip: None };
        client.socket.try_send(&transmit).unwrap();
        assert_eq!(timeout(PATIENCE, refused.recv()).await.unwrap().unwrap().destination, destination);
    }
    assert_eq!(client.socket.max_transmit_segments(), segments);
    let destination = server.socket.local;
    arrive(&client, &mut server, destination, None).await;
    assert!(!client.socket.sender.is_quirky());
}

/// The kernel returns EINVAL for that many segments, as for a device that cannot segment.
#[tokio::test]
async fn a_transmit_is_cut_here_where_the_kernel_does_not() {
    const SEGMENTS: u64 = 200;
    let (client, mut server) = (side(false), side(true));
    let segments = client.socket.max_transmit_segments();
    let signals: Vec<_> = (0..SEGMENTS).map(|nonce| ping(nonce).encode(&key()).to_vec()).collect();
    let (contents, size) = (signals.concat(), signals[0].len());
    client.socket.io.writable().await.unwrap();
    let destination = server.socket.local;
    for quirky in [false, true] {
        assert_eq!(client.socket.sender.is_quirky(), quirky);
        let transmit = Transmit { destination, ecn: None, contents: &contents, segment_size: Some(size), src_ip: None };
        client.socket.try_send(&transmit).unwrap();
        for signal in &signals {
            let (_, received) = timeout(PATIENCE, server.received.recv()).await.unwrap().unwrap();
            assert_eq!(received.bytes(), signal);
        }
    }
    assert_eq!(client.socket.max_transmit_segments(), segments);
}

#[tokio::test]
async fn a_lasting_error_neither_burns_a_core_nor_ends_the_endpoint() {
    let (client, server) = (side(false), side(true));
    let errors = Arc::new(AtomicUsize::new(0));
    let count = errors.clone();
    *lock(&server.socket.receiver.injected) = Some(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        // ENOMEM.
        io::ErrorKind::OutOfMemory.into()
    }));
    client.socket.send_signal(server.socket.local, &ping(1).encode(&key()));
    timeout(PATIENCE, server.socket.broken()).await.unwrap();
    let tries = errors.load(Ordering::Relaxed);
    assert!((2..60).contains(&tries), "{tries}");

    *lock(&server.socket.receiver.injected) = None;
    let (dialled, accepted) = connected(&client, &server, server.socket.local).await;
    moved(&dialled, &accepted, 1000).await;
}

#[tokio::test]
async fn a_broken_extra_socket_leaves_the_main_one_alone() {
    let (client, server) = (side(false), side(true));
    let extra = server.socket.open_beside().unwrap();
    let address = extra.local_addr().unwrap();
    let id = server.socket.add_extra(extra, (Ipv4Addr::LOCALHOST, 1).into()).unwrap();
    let extra = server.socket.extras.get(id).unwrap();
    *lock(&extra.receiver().injected) = Some(Box::new(|| io::ErrorKind::OutOfMemory.into()));
    client.socket.send_signal(address, &ping(1).encode(&key()));
    let (dialled, accepted) = connected(&client, &server, server.socket.local).await;
    moved(&dialled, &accepted, 1000).await;
}

/// What a driver's polls send, one after the other, until the outbox has taken and sent all of it.
#[cfg(target_os = "linux")]
async fn polled(socket: &Socket, transmits: &[Transmit<'_>]) {
    let mut outbox = Outbox::default();
    for transmit in transmits {
        while outbox.gather(|| socket.try_send(transmit)).is_err() {
            emptied(&mut outbox).await;
        }
    }
    emptied(&mut outbox).await;
}

#[cfg(target_os = "linux")]
async fn emptied(outbox: &mut Outbox) {
    let empty = std::future::poll_fn(|cx| {
        outbox.poll_flush(cx);
        if outbox.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    });
    timeout(PATIENCE, empty).await.unwrap();
}

/// A socket that no endpoint uses. It is not known to be writable until the runtime has waited once.
#[cfg(target_os = "linux")]
fn lone_socket() -> Arc<Socket> {
    Socket::bind(Some(Ipv4Addr::LOCALHOST.into()), 0, None, refusals(), signals().0, Arc::default()).unwrap()
}

/// Packets that an outbox keeps.
#[cfg(target_os = "linux")]
fn kept(destination: SocketAddr) -> Transmit<'static> {
    Transmit { destination, ecn: None, contents: &[7; 2800], segment_size: Some(1400), src_ip: None }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_outbox_lets_go_of_a_socket_that_was_replaced() {
    let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let transmit = kept(receiver.local_addr().unwrap());
    let old = lone_socket();
    let address = old.local;
    let mut outbox = Outbox::default();
    outbox.gather(|| old.try_send(&transmit)).unwrap();
    // It has to wait for room.
    emptied(&mut outbox).await;
    let gone = Arc::downgrade(&old);
    drop(old);
    assert!(gone.upgrade().is_none());
    std::net::UdpSocket::bind(address).unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn packets_for_a_full_socket_do_not_hold_up_the_one_that_replaced_it() {
    let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let transmit = kept(receiver.local_addr().unwrap());
    let (old, new) = (lone_socket(), lone_socket());
    let mut outbox = Outbox::default();
    outbox.gather(|| old.try_send(&transmit)).unwrap();
    // quinn tries again at once while the new socket says that it has room.
    outbox.gather(|| new.try_send(&transmit)).unwrap();
    emptied(&mut outbox).await;
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receiver.recv_from(&mut [0; 2800]).unwrap().1, new.local);
}

#[cfg(target_os = "linux")]
#[test]
fn an_outbox_waits_for_the_socket_that_is_full() {
    let (done, is_done) = std::sync::mpsc::channel();
    // A flush that spins never returns.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let transmit = kept(receiver.local_addr().unwrap());
            let mut outbox = Outbox::default();
            for _ in 0..2 {
                let socket = lone_socket();
                outbox.gather(|| socket.try_send(&transmit)).unwrap();
                emptied(&mut outbox).await;
            }
        });
        done.send(()).unwrap();
    });
    is_done.recv_timeout(PATIENCE).unwrap();
}

/// The sizes of the next receives that bring that many bytes, and the bytes.
#[cfg(target_os = "linux")]
fn received(socket: &std::net::UdpSocket, state: &UdpSocketState, len: usize) -> (Vec<usize>, Vec<u8>) {
    let (mut sizes, mut bytes) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 1 << 16];
    while bytes.len() < len {
        let mut meta = [RecvMeta::default()];
        let count = state.recv(socket.into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta).unwrap();
        assert_eq!(count, 1);
        sizes.push(meta[0].len);
        bytes.extend_from_slice(&buffer[..meta[0].len]);
    }
    (sizes, bytes)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn consecutive_packets_leave_in_as_few_sends_as_possible() {
    const SEGMENT: usize = 1400;
    let side = side(false);
    let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let state = UdpSocketState::new(UdpSockRef::from(&receiver)).unwrap();
    receiver.set_nonblocking(false).unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let (destination, bytes) = (receiver.local_addr().unwrap(), (0..200_000).map(|at| (at % 251) as u8));
    let bytes: Vec<u8> = bytes.collect();
    let transmits = |segments: usize, rest: usize| -> Vec<_> {
        let parts = bytes[..segments * SEGMENT + rest].chunks(10 * SEGMENT);
        let transmit =
            |contents| Transmit { destination, ecn: None, contents, segment_size: Some(SEGMENT), src_ip: None };
        parts.map(transmit).collect()
    };
    let cases: [(usize, usize, &[usize]); 5] = [
        // A new socket is not known to be writable: what was taken is kept, what was not comes again.
        (42, 700, &[40 * SEGMENT, 2 * SEGMENT + 700]),
        (42, 700, &[42 * SEGMENT + 700]),
        (46, 0, &[46 * SEGMENT]),
        (60, 0, &[46 * SEGMENT, 14 * SEGMENT]),
        (5, 1, &[5 * SEGMENT + 1]),
    ];
    for (segments, rest, sizes) in cases {
        polled(&side.socket, &transmits(segments, rest)).await;
        let len = segments * SEGMENT + rest;
        assert_eq!(received(&receiver, &state, len), (sizes.to_vec(), bytes[..len].to_vec()), "{segments} {rest}");
    }
}

/// Another destination, another size: neither is joined to what is there, and the order stays.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_packet_that_does_not_continue_a_batch_leaves_alone() {
    let side = side(false);
    let receivers = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let states = receivers.each_ref().map(|receiver| UdpSocketState::new(UdpSockRef::from(receiver)).unwrap());
    for receiver in &receivers {
        receiver.set_nonblocking(false).unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let bytes = vec![7; 20_000];
    let transmit = |to: usize, segment, len| Transmit {
        destination: receivers[to].local_addr().unwrap(),
        ecn: None,
        contents: &bytes[..len],
        segment_size: Some(segment),
        src_ip: None,
    };
    side.socket.io.writable().await.unwrap();
    let larger =
        [transmit(0, 1200, 12_000), transmit(0, 1400, 14_000), transmit(1, 1400, 2800), transmit(0, 1400, 1400)];
    polled(&side.socket, &larger).await;
    assert_eq!(received(&receivers[0], &states[0], 27_400).0, [12_000, 14_000, 1400]);
    assert_eq!(received(&receivers[1], &states[1], 2800).0, [2800]);
}
