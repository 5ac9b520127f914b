//! Many nodes at one relay, to see what each costs it.
//!
//! `crowd --relay ADDR`; the commands are `register N` (until N are registered), `circuits N` (N more, with a packet
//! over each), `leave` and `quit`.

use std::fmt::Display;

use macula_peer_testkit::crowd::Crowd;
use macula_peer_testkit::quic::{self, Error};
use macula_peer_testkit::{control, options::Options};

fn main() -> Result<(), Error> {
    let options = Options::read(std::env::args().skip(1), &["--relay"])?;
    let runtime = quic::tokio_runtime(1)?;
    let mut crowd = runtime.block_on(async { Crowd::new(options.require("--relay")?) })?;
    control::serve(0, |command| match command.split_once(' ').unwrap_or((command, "")) {
        ("register", many) => {
            let many = many.parse().ok()?;
            Some(outcome(runtime.block_on(async { crowd.register(many).await.map(|()| crowd.connections().count()) })))
        }
        ("circuits", many) => {
            let many = many.parse().ok()?;
            Some(outcome(runtime.block_on(crowd.circuits(many))))
        }
        ("leave", "") => {
            runtime.block_on(crowd.leave());
            Some(control::OK.into())
        }
        _ => None,
    })?;
    Ok(())
}

fn outcome(outcome: Result<impl Display, Error>) -> String {
    match outcome {
        Ok(value) => format!("{{ok,{value}}}"),
        Err(error) => format!("{{error,{:?}}}", error.to_string()),
    }
}
