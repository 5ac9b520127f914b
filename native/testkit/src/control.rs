//! The control protocol of every server: `ready PORT` at the start, then one command a line on standard input, each
//! answered by one line that is an Erlang term and a full stop.
#![allow(clippy::print_stdout)]

use std::fmt::Display;
use std::io::{self, BufRead, Write};

/// The answer to a command that has nothing to tell.
pub const OK: &str = "ok";

/// Announces `port`, then hands each line to `answer` (`None`: no such command) until `quit` or the end of the input.
pub fn serve(port: u16, mut answer: impl FnMut(&str) -> Option<String>) -> io::Result<()> {
    say(format_args!("ready {port}"))?;
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            "quit" => break,
            command => say(format_args!("{}.", answer(command).unwrap_or_else(|| "{error,unknown_command}".into())))?,
        }
    }
    Ok(())
}

/// One line on standard output, flushed because the reader waits for it on a pipe.
pub fn say(line: impl Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// An Erlang map with atom keys; values are terms already.
pub fn term<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<_> = fields.into_iter().map(|(key, value)| format!("{key} => {value}")).collect();
    format!("#{{{}}}", fields.join(","))
}
