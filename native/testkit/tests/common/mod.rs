//! A server under test and how to talk to it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

pub(crate) struct Server {
    child: Child,
    output: BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
}

impl Server {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Self {
        let mut child =
            Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let ready = line(&mut output);
        let port: u16 = ready.strip_prefix("ready ").unwrap().parse().unwrap();
        Self { child, output, address: ([127, 0, 0, 1], port).into() }
    }

    pub(crate) fn command(&mut self, command: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{command}").unwrap();
        line(&mut self.output)
    }

    #[allow(dead_code, reason = "not every test awaits lines")]
    pub(crate) fn line(&mut self) -> String {
        line(&mut self.output)
    }

    pub(crate) fn count(&mut self, name: &str) -> u64 {
        let stats = self.command("stats");
        let mut fields = stats.trim_start_matches("#{").split(',').filter_map(|field| field.split_once(" => "));
        fields.find(|(key, _)| *key == name).unwrap().1.trim_end_matches("}.").parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

fn line(output: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    line.trim_end().into()
}
