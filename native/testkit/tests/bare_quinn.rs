//! The yardstick sends and counts what it says.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::Server;

const BARE_QUINN: &str = env!("CARGO_BIN_EXE_bare_quinn");

#[test]
fn every_shape_arrives_whole() {
    let mut sink = Server::start(BARE_QUINN, &["sink"]);
    for shape in ["bi", "framed", "sync"] {
        for driver in ["plain", "yield"] {
            for senders in ["1", "7"] {
                assert_eq!(sink.command("reset"), "ok.");
                let options = ["--shape", shape, "--driver", driver, "--senders", senders, "--messages", "3000"];
                let report = run("source", &sink, &options);
                assert!(report.starts_with(&format!("#{{messages => 3000,senders => {senders},")), "{report}");
                assert_eq!(sink.count("frames"), 3000, "{shape} {driver} {senders}");
                assert_eq!(sink.count("bytes"), 3000 * 128);
                assert_eq!(sink.count("streams"), if shape == "framed" { 1 } else { 3000 });
                assert!(sink.count("last_ns") >= sink.count("first_ns"));
            }
        }
    }
}

#[test]
fn large_frames_arrive_whole() {
    let mut sink = Server::start(BARE_QUINN, &["sink", "--alpn", "macula"]);
    run("source", &sink, &["--size", "200000", "--messages", "50"]);
    run("source", &sink, &["--size", "200000", "--messages", "50", "--shape", "framed", "--senders", "3"]);
    assert_eq!(sink.count("frames"), 100);
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

fn run(command: &str, server: &Server, options: &[&str]) -> String {
    let address = server.address.to_string();
    let output = Command::new(BARE_QUINN).args([command, "--addr", &address]).args(options).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().into()
}
