//! The receiver's half of a session of `macula-peer/1` (docs/protocol.md): which run of this node the sender knows, and what
//! was handed over on each channel.

use crate::proto::session::{NO_RUN, Run};
use crate::session::{Arrival, Incoming};
use crate::session_table::Met;

/// Whether the run that a sender names is the receiver's `own`.
pub fn met(run: Run, own: Run) -> Met {
    match run {
        NO_RUN => Met::Nobody,
        run if run == own => Met::ThisRun,
        _ => Met::AnotherRun,
    }
}

/// One channel of a session.
#[derive(Debug, Default)]
pub struct Channel {
    /// `None` until its first stream.
    incoming: Option<Incoming>,
}

/// What a sender is told first on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    pub known: bool,
    pub expected: u64,
}

impl Channel {
    /// A stream was opened. `known`: the session was there. `run`: the one that the sender has met.
    pub fn greet(&mut self, known: bool, run: Run) -> Greeting {
        // The other channel may have made the session, which says nothing of what the run before had of this one.
        let known = known && (self.incoming.is_some() || run != NO_RUN);
        Greeting { known, expected: self.incoming().expected(0) }
    }

    /// A stream begins with this number.
    pub fn begin(&mut self, number: u64) {
        self.incoming().begin(number);
    }

    /// What a message of this number would be.
    pub fn arrival(&mut self, number: u64) -> Arrival {
        self.incoming().arrival(number)
    }

    /// A message of this number has come.
    pub fn accept(&mut self, number: u64) -> Arrival {
        self.incoming().accept(number)
    }

    /// The message of this number, the last one that was new, cannot be taken.
    pub fn refuse(&mut self, number: u64) {
        self.incoming().refuse(number);
    }

    /// What may be said on a stream on which this number comes next. `None`: it has not begun.
    pub fn expected(&mut self, next: Option<u64>) -> u64 {
        self.incoming().expected(next.unwrap_or(0))
    }

    fn incoming(&mut self) -> &mut Incoming {
        self.incoming.get_or_insert_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_has_met_nobody_this_run_or_another_one() {
        let (own, other) = ([1; 8], [2; 8]);
        assert_eq!([NO_RUN, own, other].map(|run| met(run, own)), [Met::Nobody, Met::ThisRun, Met::AnotherRun]);
    }

    #[test]
    fn a_channel_is_known_if_it_has_begun_or_its_sender_was_greeted() {
        let run = [1; 8];
        assert!(!Channel::default().greet(true, NO_RUN).known, "the other channel made the session");
        assert!(Channel::default().greet(true, run).known);
        let mut channel = Channel::default();
        channel.greet(false, NO_RUN);
        assert_eq!(channel.accept(0), Arrival::New);
        assert_eq!(channel.greet(true, NO_RUN), Greeting { known: true, expected: 1 });
        assert!(!channel.greet(false, run).known);
    }
}
