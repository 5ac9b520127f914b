//! The forwarder is a path with the configured delay and faults.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use common::Server;

const SOON: Duration = Duration::from_secs(5);

#[test]
fn every_direction_takes_the_delay() {
    let mut forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &echo(), "--delay-ms", "25"]);
    let client = client(&forwarder);
    let fastest = (0..5).map(|_| round_trip(&client)).min().unwrap();
    assert!((50..60).contains(&fastest.as_millis()), "{fastest:?}");
    assert_eq!(forwarder.command("delay 0"), "ok.");
    let fastest = (0..5).map(|_| round_trip(&client)).min().unwrap();
    assert!(fastest < Duration::from_millis(10), "{fastest:?}");
    assert_eq!(forwarder.count("passed"), 20);
}

#[test]
fn packets_in_flight_do_not_wait_for_each_other() {
    let forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &echo(), "--delay-ms", "50"]);
    let client = client(&forwarder);
    let start = Instant::now();
    for number in 0..100u8 {
        client.send(&[number]).unwrap();
    }
    for number in 0..100u8 {
        assert_eq!(receive(&client), [number]);
    }
    assert!(start.elapsed() < Duration::from_millis(1000), "{:?}", start.elapsed());
}

#[test]
fn every_client_gets_its_own_answers() {
    let forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &echo(), "--delay-ms", "1"]);
    let clients: Vec<_> = (0..20).map(|_| client(&forwarder)).collect();
    for (number, client) in (0u8..).zip(&clients) {
        client.send(&[number]).unwrap();
    }
    for (number, client) in (0u8..).zip(&clients) {
        assert_eq!(receive(client), [number]);
    }
}

#[test]
fn swallowed_packets_never_arrive() {
    let mut forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &echo()]);
    let client = client(&forwarder);
    assert_eq!(forwarder.command("swallow"), "ok.");
    client.send(b"swallowed").unwrap();
    until(&mut forwarder, "swallowed", 1);
    assert_eq!(forwarder.command("pass"), "ok.");
    client.send(b"passed").unwrap();
    assert_eq!(receive(&client), b"passed");
}

#[test]
fn the_loss_rate_is_about_the_configured_one() {
    const PACKETS: u64 = 1000;
    let mut forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &sink(), "--loss", "200"]);
    let client = client(&forwarder);
    for number in 0..PACKETS {
        client.send(b"x").unwrap();
        // Its socket has room for few.
        if number % 50 == 0 {
            until_counted(&mut forwarder, number + 1);
        }
    }
    until_counted(&mut forwarder, PACKETS);
    let lost = forwarder.count("lost");
    assert!((150..250).contains(&lost), "{lost}");
}

#[test]
fn a_server_that_comes_later_is_reached() {
    let address = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut forwarder = Server::start(env!("CARGO_BIN_EXE_forwarder"), &["--to", &address.to_string()]);
    let client = client(&forwarder);
    for _ in 0..3 {
        client.send(b"too early").unwrap();
    }
    until(&mut forwarder, "passed", 3);
    let server = UdpSocket::bind(address).unwrap();
    server.set_read_timeout(Some(SOON)).unwrap();
    client.send(b"in time").unwrap();
    let mut packet = [0; 64];
    loop {
        let (length, from) = server.recv_from(&mut packet).unwrap();
        if &packet[..length] == b"in time" {
            server.send_to(b"answer", from).unwrap();
            break;
        }
    }
    assert_eq!(receive(&client), b"answer");
}

fn round_trip(client: &UdpSocket) -> Duration {
    let start = Instant::now();
    client.send(b"x").unwrap();
    assert_eq!(receive(client), b"x");
    start.elapsed()
}

fn receive(client: &UdpSocket) -> Vec<u8> {
    let mut packet = [0; 64];
    let length = client.recv(&mut packet).unwrap();
    packet[..length].to_vec()
}

fn until(forwarder: &mut Server, name: &str, count: u64) {
    wait(|| forwarder.count(name) >= count);
}

fn until_counted(forwarder: &mut Server, packets: u64) {
    wait(|| forwarder.count("passed") + forwarder.count("lost") == packets);
}

fn wait(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn client(forwarder: &Server) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(forwarder.address).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client
}

/// Ends with the test's process.
fn echo() -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut packet = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            socket.send_to(&packet[..length], from).unwrap();
        }
    });
    address.to_string()
}

fn sink() -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || while socket.recv_from(&mut [0; 64]).is_ok() {});
    address.to_string()
}
