//! The yardstick sends and counts what it says.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::Server;
use macula_peer_testkit::{frame, quic};

const PATIENCE: Duration = Duration::from_secs(20);

const BARE_QUINN: &str = env!("CARGO_BIN_EXE_bare_quinn");

#[test]
fn every_shape_arrives_whole() {
    let mut sink = Server::start(BARE_QUINN, &["sink"]);
    for shape in ["bi", "framed", "sync", "framed-sync"] {
        for driver in ["plain", "yield"] {
            for senders in ["1", "7"] {
                assert_eq!(sink.command("reset"), "ok.");
                let options = ["--shape", shape, "--driver", driver, "--senders", senders, "--messages", "3000"];
                let report = run("source", &sink, &options);
                assert!(report.starts_with(&format!("#{{messages => 3000,senders => {senders},")), "{report}");
                counts(&mut sink, "frames", 3000);
                assert_eq!(sink.count("bytes"), 3000 * 128);
                assert_eq!(sink.count("streams"), if shape.starts_with("framed") { 1 } else { 3000 });
                assert!(sink.count("last_ns") >= sink.count("first_ns"));
            }
        }
    }
}

#[test]
fn frames_that_are_written_together_arrive_whole() {
    let mut sink = Server::start(BARE_QUINN, &["sink"]);
    for shape in ["framed", "framed-sync"] {
        assert_eq!(sink.command("reset"), "ok.");
        run("source", &sink, &["--shape", shape, "--coalesce", "16", "--senders", "3", "--messages", "1001"]);
        counts(&mut sink, "frames", 1001);
        assert_eq!(sink.count("bytes"), 1001 * 128);
    }
}

/// As in docs/protocol.md.
#[tokio::test]
async fn a_session_is_greeted_and_acknowledged() {
    let mut sink = Server::start(BARE_QUINN, &["sink"]);
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let config = quic::client_config("macula-peer/1", quic::transport(0, 0)).unwrap();
    let connection = endpoint.connect_with(config, sink.address, "localhost").unwrap().await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let opening = [&[1, 0xF0, 0, 0, 0, 0, 0, 25][..], &[7; 16], &[0], &[0; 8]].concat();
    let keep_for = 600u32.to_be_bytes();
    let number = [&[1, 0xF1, 0, 0, 0, 0, 0, 12][..], &40u64.to_be_bytes(), &keep_for].concat();
    let frame = frame::store_of_size(128).unwrap();
    // Byte by byte: what is about the session is cut into pieces as well.
    for byte in [opening, number].concat() {
        send.write_all(&[byte]).await.unwrap();
    }
    send.write_all(&frame.repeat(2)).await.unwrap();
    let mut greeting = [1; 17];
    receive.read_exact(&mut greeting).await.unwrap();
    assert_eq!(greeting, [0; 17]);
    let mut expected = [1; 9];
    while expected != [0, 0, 0, 0, 0, 0, 0, 0, 42] {
        receive.read_exact(&mut expected).await.unwrap();
        assert_eq!(expected[0], 0, "{expected:?}");
    }
    assert_eq!((sink.count("frames"), sink.count("streams")), (2, 1));
}

#[test]
fn large_frames_arrive_whole() {
    let mut sink = Server::start(BARE_QUINN, &["sink", "--alpn", "macula"]);
    run("source", &sink, &["--size", "200000", "--messages", "50"]);
    run("source", &sink, &["--size", "200000", "--messages", "50", "--shape", "framed", "--senders", "3"]);
    counts(&mut sink, "frames", 100);
}

#[test]
fn requests_are_answered() {
    let mut echo = Server::start(BARE_QUINN, &["echo"]);
    let report = run("request", &echo, &["--alpn", "macula-peer/1", "--messages", "500", "--senders", "3"]);
    assert!(report.contains("call_p99_ns => "), "{report}");
    run("request", &echo, &["--size", "50000", "--messages", "20"]);
    assert_eq!(echo.count("frames"), 520);
}

#[test]
fn a_wrong_command_line_fails() {
    for arguments in [&["source"][..], &["sink", "--shape", "bi"], &["source", "--addr", "127.0.0.1:1", "--size", "3"]]
    {
        assert!(!Command::new(BARE_QUINN).args(arguments).output().unwrap().status.success(), "{arguments:?}");
    }
}

/// What has arrived is counted when it is read.
#[track_caller]
fn counts(server: &mut Server, what: &str, expected: u64) {
    let until = Instant::now() + PATIENCE;
    while server.count(what) != expected {
        assert!(Instant::now() < until, "{what}: {} instead of {expected}", server.count(what));
        sleep(Duration::from_millis(2));
    }
}

fn run(command: &str, server: &Server, options: &[&str]) -> String {
    let address = server.address.to_string();
    let output = Command::new(BARE_QUINN).args([command, "--addr", &address]).args(options).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().into()
}
