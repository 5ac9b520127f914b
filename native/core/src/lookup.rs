//! When a node is looked up, and how long the results hold.

use std::time::{Duration, Instant};

use crate::types::{Candidates, Fingerprint};

/// How long to wait for more candidates after a lookup has started.
const AT_IT_FOR: Duration = Duration::from_secs(5);

/// How long an answer is good for, also that there is nothing: a node may have moved, but one that is nowhere to be found
/// costs a question a minute and not one for each message.
const ANSWERED_FOR: Duration = Duration::from_secs(60);

/// What looking up a node has come to.
#[derive(Debug, Default)]
pub struct Lookup {
    phase: Phase,
    /// The last answer, and what has come of the next.
    found: Candidates,
    finding: Candidates,
}

#[derive(Debug, Default, Clone, Copy)]
enum Phase {
    #[default]
    Unasked,
    AtIt {
        since: Instant,
    },
    Answered {
        at: Instant,
    },
}

impl Lookup {
    /// Whether to look up the node now. A caller that gets true must start.
    pub fn begin(&mut self, now: Instant) -> bool {
        let wanted = match self.phase {
            Phase::Unasked => true,
            Phase::AtIt { since } => since + AT_IT_FOR <= now,
            Phase::Answered { at } => at + ANSWERED_FOR <= now,
        };
        if wanted {
            (self.phase, self.finding) = (Phase::AtIt { since: now }, Candidates::default());
        }
        wanted
    }

    /// Something was found; more may come.
    pub fn found(&mut self, candidates: Candidates) {
        self.finding.learn(candidates);
    }

    /// The lookup is over. Its results replace the last ones; if the resolver could not be asked, those stay, and the
    /// next caller may start another lookup.
    pub fn ended(&mut self, answered: bool, now: Instant) {
        let finding = std::mem::take(&mut self.finding);
        if answered {
            (self.phase, self.found) = (Phase::Answered { at: now }, finding);
        } else {
            self.phase = Phase::Unasked;
        }
    }

    /// Until when more may come.
    pub fn until(&self, now: Instant) -> Option<Instant> {
        match self.phase {
            Phase::AtIt { since } => Some(since + AT_IT_FOR).filter(|&until| until > now),
            _ => None,
        }
    }

    /// The newest first. Until there is a result the last one holds: a resolver may be slow.
    pub fn candidates(&self) -> Candidates {
        self.finding.and(&self.found)
    }

    /// The node's key, if a server named it.
    pub fn key(&self) -> Option<Fingerprint> {
        self.finding.key.or(self.found.key)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::types::EndpointRef;

    fn candidates(endpoints: &[&str]) -> Candidates {
        let endpoints = endpoints.iter().map(|text| EndpointRef::parse(text).unwrap().to_owned()).collect();
        Candidates { endpoints, ..Candidates::default() }
    }

    fn known(lookup: &Lookup) -> Vec<String> {
        lookup.candidates().endpoints.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn one_looks_up_at_a_time_and_an_answer_holds_for_a_minute() {
        let start = Instant::now();
        let mut lookup = Lookup::default();
        assert_eq!(lookup.until(start), None);
        assert!(lookup.begin(start));
        assert!(!lookup.begin(start + AT_IT_FOR / 2));
        assert_eq!(lookup.until(start + AT_IT_FOR / 2), Some(start + AT_IT_FOR));
        // Nothing.
        let answered = start + AT_IT_FOR / 2;
        lookup.ended(true, answered);
        assert_eq!(lookup.until(answered), None);
        assert!(!lookup.begin(answered + ANSWERED_FOR - Duration::from_millis(1)));
        assert!(lookup.begin(answered + ANSWERED_FOR));
    }

    #[test]
    fn a_lookup_that_hangs_is_not_waited_for() {
        let start = Instant::now();
        let mut lookup = Lookup::default();
        assert!(lookup.begin(start));
        lookup.found(candidates(&["half:1"]));
        let later = start + AT_IT_FOR;
        assert_eq!(lookup.until(later), None);
        assert!(lookup.begin(later));
        assert_eq!(known(&lookup), [""; 0], "half an answer does not count");
    }

    #[test]
    fn a_result_holds_at_once_and_until_the_next_one() {
        let start = Instant::now();
        let mut lookup = Lookup::default();
        assert!(lookup.begin(start));
        lookup.found(candidates(&["old:1"]));
        lookup.found(candidates(&["both:1"]));
        assert_eq!(known(&lookup), ["both:1", "old:1"]);
        lookup.ended(true, start);
        assert_eq!(known(&lookup), ["both:1", "old:1"]);
        let later = start + ANSWERED_FOR;
        assert!(lookup.begin(later));
        assert_eq!(known(&lookup), ["both:1", "old:1"], "a resolver may be slow");
        lookup.found(candidates(&["new:1", "both:1"]));
        assert_eq!(known(&lookup), ["new:1", "both:1", "old:1"]);
        lookup.ended(true, later);
        assert_eq!(known(&lookup), ["new:1", "both:1"]);
        assert!(lookup.begin(later + ANSWERED_FOR));
        lookup.ended(true, later + ANSWERED_FOR);
        assert_eq!(known(&lookup), [""; 0]);
    }

    #[test]
    fn without_a_resolver_the_last_answer_stays_and_the_next_caller_tries() {
        let start = Instant::now();
        let mut lookup = Lookup::default();
        assert!(lookup.begin(start));
        lookup.found(candidates(&["a:1"]));
        lookup.ended(true, start);
        let later = start + ANSWERED_FOR;
        assert!(lookup.begin(later));
        lookup.ended(false, later);
        assert_eq!(known(&lookup), ["a:1"]);
        assert_eq!(lookup.until(later), None);
        assert!(lookup.begin(later));
    }
}
