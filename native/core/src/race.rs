//! The race for a link: it tries all candidates of a peer at once. The first link that is up carries the messages, and a better one
//! replaces it.
//!
//! Direct dials get a short head start over relays, and relays over each other. A relay is asked for a circuit and for its
//! help with a punch at the same time. The race decides what to begin, what to abort and which failure to report. Its
//! owner carries out its [`Action`]s and tells it how each attempt [`Ended`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::errors::{CircuitError, ConnectError, Failures, PunchError, RouteError, SendError};
use crate::proto::control::Refusal;
use crate::types::{Candidates, Endpoint, Fingerprint, LinkId};

/// What a direct dial has before relays are asked too. On most paths it is up by then, and relays have no work.
const HEAD_START: Duration = Duration::from_millis(50);

/// What a relay has before the next one is asked too. One that does not know the node says so at once.
const RELAY_STAGGER: Duration = Duration::from_millis(200);

/// What lookups have before a legacy relay gets the messages. Any candidate that they find is better.
const LEGACY_RELAY_AFTER: Duration = Duration::from_millis(200);

/// Connections begun by the peer that a race waits for. A peer that begins more of them wants none.
const MAX_ADOPTING: usize = 8;

/// Names an attempt among all of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttemptId {
    race: u64,
    attempt: u32,
}

/// One attempt to get a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// Dial an address.
    Dial(Endpoint),
    /// Ask a relay for a circuit, and connect over it.
    Circuit(Endpoint),
    /// Pass the NATs with the help of a relay.
    Punch(Endpoint),
    /// Wait until a connection that the peer began allows streams.
    Adopt(LinkId),
}

/// What to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Begin an attempt, and report how it ended. It ends at `until`, except for a punch, which has a longer time.
    Begin {
        id: AttemptId,
        attempt: Attempt,
        /// The key that the peer has, where a call or a lookup names it.
        key: Option<Fingerprint>,
        until: Instant,
    },
    /// Abort an attempt. A link that it comes to all the same is closed.
    Abort(AttemptId),
}

/// How an attempt ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// With a link.
    Linked,
    NotDialled(ConnectError),
    NoCircuit(CircuitError),
    NotPunched(PunchError),
    NotAdopted,
    /// The task that carried it out panicked.
    Crashed,
}

/// How the race ended without a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to try.
    Lost(SendError),
    /// A relay that speaks only `macula` may pass the messages on.
    LegacyRelay(Endpoint),
}

/// How a race is set up.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Whether the peer is named by a node id. Otherwise only its address is dialled.
    pub to_node: bool,
    /// How long a dial and a circuit may take.
    pub connect_timeout: Duration,
}

/// What a race may try.
#[derive(Debug, Clone, Default)]
pub struct Tries {
    /// What callers and lookups know.
    pub candidates: Candidates,
    /// This node's own relays, which may know the peer too.
    pub own_relays: Vec<Endpoint>,
    /// Until when a lookup may find more.
    pub resolving: Option<Instant>,
    /// The node id is bound to a key, so no legacy relay gets its messages.
    pub bound: bool,
}

/// The attempts to reach one peer.
#[derive(Debug)]
pub struct Race {
    number: u64,
    setup: Setup,
    begun: Instant,
    attempts: Vec<(AttemptId, Attempt)>,
    begun_attempts: u32,
    /// Relays that may help to punch when the present one does not.
    helpers: VecDeque<Endpoint>,
    /// Connections that the peer began, failed ones included. At most `MAX_ADOPTING`.
    adopting: Vec<LinkId>,
    /// There were more of them.
    left_out: bool,
    /// Relays to ask, and when.
    waiting: VecDeque<(Instant, Endpoint)>,
    /// Every candidate that was taken into the race.
    taken: Candidates,
    bound: bool,
    resolving: Option<Instant>,
    failure: Option<SendError>,
    /// Since they were last taken.
    failures: Failures,
    legacy_relay: Option<Endpoint>,
    actions: VecDeque<Action>,
}

impl Race {
    /// `number`: unique among the races of a peer.
    pub fn new(number: u64, setup: Setup, now: Instant) -> Self {
        Self {
            number,
            setup,
            begun: now,
            attempts: Vec::new(),
            begun_attempts: 0,
            helpers: VecDeque::new(),
            adopting: Vec::new(),
            left_out: false,
            waiting: VecDeque::new(),
            taken: Candidates::default(),
            bound: false,
            resolving: None,
            failure: None,
            failures: Failures::default(),
            legacy_relay: None,
            actions: VecDeque::new(),
        }
    }

    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Tries these too, except those that it has tried.
    pub fn add(&mut self, tries: &Tries, now: Instant) {
        let Tries { candidates, own_relays, resolving, bound } = tries;
        (self.resolving, self.bound) = (*resolving, *bound);
        (self.taken.key, self.taken.hole_punch) = (candidates.key, candidates.hole_punch);
        for endpoint in take_new(candidates.endpoints.iter(), &mut self.taken.endpoints) {
            self.begin(Attempt::Dial(endpoint), now);
        }
        if !self.setup.to_node {
            return;
        }
        let dials = self.attempts.iter().any(|(_, attempt)| matches!(attempt, Attempt::Dial(_)));
        let head_start = if dials { HEAD_START } else { Duration::ZERO };
        let mut at = self.waiting.back().map_or(now + head_start, |(last, _)| *last + RELAY_STAGGER);
        for relay in take_new(candidates.relays.iter().chain(own_relays), &mut self.taken.relays) {
            self.waiting.push_back((at, relay));
            at += RELAY_STAGGER;
        }
        for relay in take_new(candidates.last_resorts.iter(), &mut self.taken.last_resorts) {
            if !self.taken.relays.contains(&relay) {
                self.waiting.push_back((at, relay));
            }
        }
    }

    /// Waits for a connection that the peer began to allow streams, unless it does so already.
    pub fn adopt(&mut self, connection: LinkId, now: Instant) {
        if self.adopting.contains(&connection) {
            return;
        }
        if self.adopting.len() >= MAX_ADOPTING {
            self.left_out = true;
            return;
        }
        self.adopting.push(connection);
        self.begin(Attempt::Adopt(connection), now);
    }

    /// Whether the peer began more connections than the race waits for.
    pub fn leaves_out(&self) -> bool {
        self.left_out
    }

    /// From now on only direct links are of use.
    pub fn keep_direct(&mut self) {
        self.abort(|attempt| matches!(attempt, Attempt::Circuit(_)));
        self.waiting.clear();
        self.resolving = None;
    }

    /// Looks for a direct path through NATs with the help of a relay.
    pub fn punch(&mut self, relay: Endpoint, now: Instant) {
        if !self.setup.to_node {
            return;
        }
        if self.taken.hole_punch == Some(false) {
            self.failures.hole_punch = Some(PunchError::Skipped);
            return;
        }
        if self.attempts.iter().any(|(_, attempt)| matches!(attempt, Attempt::Punch(_))) {
            // Two punches at once would disturb each other.
            return self.helpers.push_back(relay);
        }
        self.begin(Attempt::Punch(relay), now);
    }

    /// An attempt has ended. Returns whether it was one of this race.
    pub fn ended(&mut self, id: AttemptId, how: Ended, now: Instant) -> bool {
        let Some(index) = self.attempts.iter().position(|(known, _)| *known == id) else { return false };
        let (_, attempt) = self.attempts.swap_remove(index);
        match (attempt, how) {
            (_, Ended::NotDialled(error)) => self.not_dialled(error),
            (Attempt::Circuit(relay), Ended::NoCircuit(error)) => self.no_circuit(error, relay, now),
            (_, Ended::NotPunched(error)) => self.not_punched(error, now),
            (Attempt::Punch(_), Ended::Crashed) => self.punch_on(now),
            _ => {}
        }
        true
    }

    /// Goes on. Returns how the race ended, if nothing is left to try.
    pub fn poll(&mut self, now: Instant) -> Option<Outcome> {
        // A relay whose turn it is, or the next one where nothing else is under way.
        while self.waiting.front().is_some_and(|(at, _)| *at <= now || self.attempts.is_empty()) {
            if let Some((_, relay)) = self.waiting.pop_front() {
                self.punch(relay.clone(), now);
                self.begin(Attempt::Circuit(relay), now);
            }
        }
        self.resolving = self.resolving.filter(|until| *until > now);
        let passes_on = self.legacy_relay_at().is_some_and(|at| at <= now);
        let is_over = self.attempts.is_empty() && (self.resolving.is_none() || passes_on);
        is_over.then(|| self.outcome())
    }

    /// When to poll again if nothing happens.
    pub fn next_timeout(&self) -> Option<Instant> {
        let passes_on = self.legacy_relay_at().filter(|_| self.attempts.is_empty());
        [self.waiting.front().map(|(at, _)| *at), self.resolving, passes_on].into_iter().flatten().min()
    }

    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The error to report if there is no other outcome.
    pub fn failure(&self) -> Option<&SendError> {
        self.failure.as_ref()
    }

    /// Adds the failures since the last call.
    pub fn take_failures(&mut self, into: &mut Failures) {
        into.merge(std::mem::take(&mut self.failures));
    }

    fn begin(&mut self, attempt: Attempt, now: Instant) {
        let id = AttemptId { race: self.number, attempt: self.begun_attempts };
        self.begun_attempts += 1;
        self.attempts.push((id, attempt.clone()));
        let until = now + self.setup.connect_timeout;
        self.actions.push_back(Action::Begin { id, attempt, key: self.taken.key, until });
    }

    fn abort(&mut self, which: impl Fn(&Attempt) -> bool) {
        for (id, _) in self.attempts.extract_if(.., |(_, attempt)| which(attempt)) {
            self.actions.push_back(Action::Abort(id));
        }
    }

    fn not_dialled(&mut self, error: ConnectError) {
        self.failures.direct = Some(error.clone());
        match error {
            error if !self.setup.to_node => self.failure = Some(error.into()),
            ConnectError::Untrusted | ConnectError::WrongNode => self.failed(RouteError::Node(error)),
            // That an endpoint leads nowhere says nothing about the node.
            _ => {}
        }
    }

    fn not_punched(&mut self, error: PunchError, now: Instant) {
        match error {
            // The other node has asked, and its connection will come.
            PunchError::Refused(Refusal::InProgress) => return,
            PunchError::Refused(_) | PunchError::Relay(_) => self.punch_on(now),
            _ => self.helpers.clear(),
        }
        self.failures.hole_punch = Some(error);
    }

    /// The relay does not help. The next one may.
    fn punch_on(&mut self, now: Instant) {
        if let Some(relay) = self.helpers.pop_front() {
            self.punch(relay, now);
        }
    }

    fn no_circuit(&mut self, error: CircuitError, relay: Endpoint, now: Instant) {
        if let Some((at, _)) = self.waiting.front_mut() {
            *at = now;
        }
        if !matches!(error, CircuitError::Refused(_) | CircuitError::Ended(_) | CircuitError::Inner(_)) {
            // It will not help to punch either.
            self.helpers.retain(|helper| *helper != relay);
            let before = self.attempts.len();
            self.abort(|attempt| *attempt == Attempt::Punch(relay.clone()));
            if self.attempts.len() < before {
                self.punch_on(now);
            }
        }
        let error = match error {
            CircuitError::NotARelay => {
                self.legacy_relay.get_or_insert(relay);
                return;
            }
            CircuitError::Relay(error) => RouteError::Relay(error),
            CircuitError::RelayLost | CircuitError::Ended(_) | CircuitError::Stopped => {
                RouteError::Relay(ConnectError::TimedOut)
            }
            CircuitError::Refused(refusal) => RouteError::Setup(refusal),
            CircuitError::NotRegistered => RouteError::Setup(Refusal::NotRegistered),
            CircuitError::Inner(error) => RouteError::Node(error),
        };
        self.failures.relay = Some(error.clone());
        self.failed(error);
    }

    fn failed(&mut self, error: RouteError) {
        let known = match &self.failure {
            Some(SendError::Route(known)) => rank(known),
            _ => 0,
        };
        if rank(&error) >= known {
            self.failure = Some(error.into());
        }
    }

    /// When a legacy relay gets the messages, if there is one. Messages for the holder of a key go to no relay that could
    /// read them.
    fn legacy_relay_at(&self) -> Option<Instant> {
        let keyed = self.bound || self.taken.key.is_some();
        self.legacy_relay.as_ref().filter(|_| !keyed).map(|_| self.begun + LEGACY_RELAY_AFTER)
    }

    fn outcome(&mut self) -> Outcome {
        if let (Some(_), Some(relay)) = (self.legacy_relay_at(), self.legacy_relay.take()) {
            return Outcome::LegacyRelay(relay);
        }
        Outcome::Lost(self.failure.take().unwrap_or(RouteError::NoRelay.into()))
    }
}

/// Of several failures, the one of the highest rank is reported: it says most about the node.
fn rank(error: &RouteError) -> u8 {
    match error {
        RouteError::NoRelay => 1,
        // It says something about the path, not the node.
        RouteError::Node(ConnectError::WrongNode) => 2,
        RouteError::Relay(_) => 3,
        RouteError::Setup(Refusal::NotRegistered) => 4,
        RouteError::Setup(_) => 5,
        RouteError::Node(ConnectError::Untrusted) => 7,
        RouteError::Node(_) => 6,
    }
}

fn take_new<'a>(candidates: impl Iterator<Item = &'a Endpoint>, taken: &mut Vec<Endpoint>) -> Vec<Endpoint> {
    let before = taken.len();
    for candidate in candidates {
        if !taken.contains(candidate) {
            taken.push(candidate.clone());
        }
    }
    taken[before..].to_vec()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::proto::control::PunchFailure;
    use crate::types::EndpointRef;

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn at(text: &str) -> Endpoint {
        EndpointRef::parse(text).unwrap().to_owned()
    }

    fn all(texts: &[&str]) -> Vec<Endpoint> {
        texts.iter().map(|text| at(text)).collect()
    }

    struct Run {
        start: Instant,
        race: Race,
        begun: Vec<(AttemptId, Attempt)>,
    }

    impl Run {
        fn new(candidates: Candidates, own_relays: &[&str]) -> Self {
            let start = Instant::now();
            let mut race = Race::new(0, Setup { to_node: true, connect_timeout: TIMEOUT }, start);
            race.add(&Tries { candidates, own_relays: all(own_relays), ..Tries::default() }, start);
            Self { start, race, begun: Vec::new() }
        }

        fn poll(&mut self, ms: u64) -> Option<Outcome> {
            let outcome = self.race.poll(self.at(ms));
            while let Some(action) = self.race.next_action() {
                match action {
                    Action::Begin { id, attempt, .. } => self.begun.push((id, attempt)),
                    Action::Abort(id) => self.begun.retain(|(known, _)| *known != id),
                }
            }
            outcome
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn ended(&mut self, attempt: Attempt, how: Ended, ms: u64) {
            let index = self.begun.iter().position(|(_, begun)| *begun == attempt).unwrap();
            let (id, _) = self.begun.remove(index);
            assert!(self.race.ended(id, how, self.at(ms)));
        }

        fn under_way(&self) -> Vec<Attempt> {
            self.begun.iter().map(|(_, attempt)| attempt.clone()).collect()
        }
    }

    fn endpoints(texts: &[&str]) -> Candidates {
        Candidates { endpoints: all(texts), ..Candidates::default() }
    }

    #[test]
    fn relays_are_asked_after_the_head_start_of_a_dial_and_one_after_the_other() {
        let mut run = Run::new(endpoints(&["peer:1"]), &["one:1", "two:1"]);
        assert_eq!(run.poll(0), None);
        assert_eq!(run.under_way(), [Attempt::Dial(at("peer:1"))]);
        assert_eq!(run.race.next_timeout(), Some(run.at(50)));
        assert_eq!(run.poll(50), None);
        let first = [Attempt::Punch(at("one:1")), Attempt::Circuit(at("one:1"))];
        assert_eq!(run.under_way()[1..], first);
        assert_eq!(run.race.next_timeout(), Some(run.at(250)));
        assert_eq!(run.poll(250), None);
        assert_eq!(run.under_way()[3..], [Attempt::Circuit(at("two:1"))], "one punch at a time");
        assert_eq!(run.race.next_timeout(), None);
    }

    #[test]
    fn without_a_dial_the_first_relay_is_asked_at_once_and_the_next_when_it_has_failed() {
        let mut run = Run::new(Candidates::default(), &["one:1", "two:1"]);
        run.poll(0);
        assert_eq!(run.under_way().len(), 2);
        run.ended(Attempt::Circuit(at("one:1")), Ended::NoCircuit(CircuitError::NotRegistered), 10);
        assert_eq!(run.poll(10), None);
        assert_eq!(run.under_way(), [Attempt::Punch(at("two:1")), Attempt::Circuit(at("two:1"))]);
    }

    #[test]
    fn a_relay_that_callers_and_settings_name_is_asked_once() {
        let candidates =
            Candidates { relays: all(&["one:1", "one:1"]), last_resorts: all(&["one:1"]), ..Candidates::default() };
        let mut run = Run::new(candidates, &["one:1"]);
        run.poll(1000);
        assert_eq!(run.under_way(), [Attempt::Punch(at("one:1")), Attempt::Circuit(at("one:1"))]);
    }

    #[test]
    fn the_failure_that_says_most_about_the_node_is_reported() {
        let mut run = Run::new(endpoints(&["peer:1"]), &["one:1", "two:1"]);
        run.poll(0);
        run.ended(Attempt::Dial(at("peer:1")), Ended::NotDialled(ConnectError::Refused), 1);
        run.poll(500);
        run.ended(Attempt::Circuit(at("two:1")), Ended::NoCircuit(CircuitError::Inner(ConnectError::Untrusted)), 500);
        run.ended(Attempt::Circuit(at("one:1")), Ended::NoCircuit(CircuitError::NotRegistered), 500);
        run.poll(500);
        run.ended(Attempt::Punch(at("two:1")), Ended::NotPunched(PunchError::Failed(PunchFailure::BothHard)), 500);
        let untrusted: SendError = RouteError::Node(ConnectError::Untrusted).into();
        assert_eq!(run.poll(500), Some(Outcome::Lost(untrusted)));
        let mut failures = Failures::default();
        run.race.take_failures(&mut failures);
        assert_eq!(failures.direct, Some(ConnectError::Refused));
        assert_eq!(failures.relay, Some(RouteError::Setup(Refusal::NotRegistered)));
    }

    #[test]
    fn without_any_candidate_no_relay_is_known() {
        assert_eq!(Run::new(Candidates::default(), &[]).poll(0), Some(Outcome::Lost(RouteError::NoRelay.into())));
    }

    #[test]
    fn a_race_waits_for_what_a_lookup_may_find() {
        let mut run = Run::new(Candidates::default(), &[]);
        let resolving = Some(run.at(300));
        run.race.add(&Tries { resolving, ..Tries::default() }, run.start);
        assert_eq!(run.poll(0), None);
        assert_eq!(run.race.next_timeout(), resolving);
        run.race.add(&Tries { candidates: endpoints(&["peer:1"]), resolving, ..Tries::default() }, run.start);
        assert_eq!(run.poll(300), None);
        assert_eq!(run.under_way(), [Attempt::Dial(at("peer:1"))]);
        run.ended(Attempt::Dial(at("peer:1")), Ended::NotDialled(ConnectError::TimedOut), 400);
        assert_eq!(run.poll(400), Some(Outcome::Lost(RouteError::NoRelay.into())));
    }

    #[test]
    fn a_race_without_candidates_ends_with_its_lookup() {
        let mut run = Run::new(Candidates::default(), &[]);
        run.race.add(&Tries { resolving: Some(run.at(300)), ..Tries::default() }, run.start);
        assert_eq!(run.poll(299), None);
        assert_eq!(run.poll(300), Some(Outcome::Lost(RouteError::NoRelay.into())));
    }

    #[test]
    fn a_node_with_the_wrong_key_at_an_endpoint_is_reported_while_relays_are_asked_and_when_none_helps() {
        for error in [ConnectError::Untrusted, ConnectError::WrongNode] {
            let mut run = Run::new(endpoints(&["peer:1"]), &[]);
            run.race.add(&Tries { resolving: Some(run.at(300)), ..Tries::default() }, run.start);
            run.poll(0);
            assert_eq!(run.race.failure(), None);
            run.ended(Attempt::Dial(at("peer:1")), Ended::NotDialled(error.clone()), 1);
            let expected = SendError::from(RouteError::Node(error));
            assert_eq!(run.race.failure(), Some(&expected));
            assert_eq!(run.poll(300), Some(Outcome::Lost(expected)));
        }
    }

    #[test]
    fn a_peer_that_is_named_by_its_address_is_only_dialled_and_told_why_that_failed() {
        let start = Instant::now();
        let mut race = Race::new(0, Setup { to_node: false, connect_timeout: TIMEOUT }, start);
        race.add(&Tries { candidates: endpoints(&["peer:1"]), own_relays: all(&["one:1"]), ..Tries::default() }, start);
        assert_eq!(race.poll(start + HEAD_START), None);
        let Some(Action::Begin { id, attempt: Attempt::Dial(_), .. }) = race.next_action() else { panic!("no dial") };
        assert_eq!(race.next_action(), None, "no relay is asked");
        race.ended(id, Ended::NotDialled(ConnectError::Refused), start);
        assert_eq!(race.poll(start), Some(Outcome::Lost(ConnectError::Refused.into())));
    }

    #[test]
    fn a_legacy_relay_gets_messages_only_when_nothing_better_is_found_in_time() {
        let mut run = Run::new(Candidates::default(), &["old:1"]);
        let resolving = Some(run.at(5000));
        run.race.add(&Tries { resolving, ..Tries::default() }, run.start);
        run.poll(0);
        run.ended(Attempt::Circuit(at("old:1")), Ended::NoCircuit(CircuitError::NotARelay), 1);
        assert_eq!(run.poll(1), None);
        assert_eq!(run.race.next_timeout(), Some(run.at(200)));
        assert_eq!(run.under_way(), [], "it does not help to punch");
        assert_eq!(run.poll(200), Some(Outcome::LegacyRelay(at("old:1"))));
    }

    #[test]
    fn a_legacy_relay_gets_no_messages_for_the_holder_of_a_key() {
        for bound in [false, true] {
            let key = (!bound).then(|| [1; 32].into());
            let mut run = Run::new(Candidates::default(), &["old:1"]);
            let candidates = Candidates { key, ..Candidates::default() };
            run.race.add(&Tries { candidates, own_relays: all(&["old:1"]), bound, ..Tries::default() }, run.start);
            run.poll(0);
            run.ended(Attempt::Circuit(at("old:1")), Ended::NoCircuit(CircuitError::NotARelay), 1);
            assert_eq!(run.poll(1), Some(Outcome::Lost(RouteError::NoRelay.into())));
        }
    }

    #[test]
    fn the_next_relay_helps_to_punch_where_one_cannot_and_none_where_the_nats_are_hopeless() {
        for (error, goes_on) in [
            (PunchError::Refused(Refusal::NotRegistered), true),
            (PunchError::Relay(ConnectError::TimedOut), true),
            (PunchError::Failed(PunchFailure::BothHard), false),
            (PunchError::Failed(PunchFailure::TimedOut), false),
        ] {
            let mut run = Run::new(Candidates::default(), &["one:1", "two:1"]);
            run.poll(0);
            run.poll(200);
            run.ended(Attempt::Punch(at("one:1")), Ended::NotPunched(error), 300);
            run.poll(300);
            assert_eq!(run.under_way().contains(&Attempt::Punch(at("two:1"))), goes_on);
        }
    }

    #[test]
    fn a_punch_that_panics_leaves_the_next_relay_its_turn() {
        let mut run = Run::new(Candidates::default(), &["one:1", "two:1"]);
        run.poll(0);
        run.poll(200);
        run.ended(Attempt::Punch(at("one:1")), Ended::Crashed, 300);
        run.poll(300);
        assert!(run.under_way().contains(&Attempt::Punch(at("two:1"))));
    }

    #[test]
    fn no_relay_is_asked_to_help_while_the_other_node_punches() {
        let mut run = Run::new(Candidates::default(), &["one:1", "two:1"]);
        run.poll(200);
        run.ended(Attempt::Punch(at("one:1")), Ended::NotPunched(PunchError::Refused(Refusal::InProgress)), 210);
        run.ended(Attempt::Circuit(at("one:1")), Ended::NoCircuit(CircuitError::NotRegistered), 220);
        assert_eq!(run.poll(220), None);
        assert_eq!(run.under_way(), [Attempt::Circuit(at("two:1"))]);
    }

    #[test]
    fn a_punch_that_the_other_node_has_begun_is_no_failure() {
        let mut run = Run::new(Candidates::default(), &["one:1"]);
        run.poll(0);
        run.ended(Attempt::Punch(at("one:1")), Ended::NotPunched(PunchError::Refused(Refusal::InProgress)), 10);
        let mut failures = Failures::default();
        run.race.take_failures(&mut failures);
        assert_eq!(failures, Failures::default());
    }

    #[test]
    fn relays_that_are_learned_wait_behind_the_others() {
        let mut run = Run::new(endpoints(&["peer:1"]), &["one:1"]);
        let relays = all(&["two:1"]);
        run.race
            .add(&Tries { candidates: Candidates { relays, ..endpoints(&["peer:1"]) }, ..Tries::default() }, run.start);
        run.poll(50);
        assert_eq!(run.race.next_timeout(), Some(run.at(250)));
    }

    #[test]
    fn a_punch_that_is_not_wanted_is_skipped() {
        let mut run = Run::new(Candidates { hole_punch: Some(false), ..Candidates::default() }, &["one:1"]);
        run.poll(0);
        assert_eq!(run.under_way(), [Attempt::Circuit(at("one:1"))]);
        let mut failures = Failures::default();
        run.race.take_failures(&mut failures);
        assert_eq!(failures.hole_punch, Some(PunchError::Skipped));
    }

    #[test]
    fn beside_a_relayed_link_only_direct_paths_are_still_tried() {
        let mut run = Run::new(endpoints(&["peer:1"]), &["one:1", "two:1"]);
        run.poll(50);
        run.ended(Attempt::Circuit(at("one:1")), Ended::Linked, 60);
        run.race.keep_direct();
        assert_eq!(run.poll(1000), None);
        assert_eq!(run.under_way(), [Attempt::Dial(at("peer:1")), Attempt::Punch(at("one:1"))]);
    }

    /// A holder of the key may begin as many connections as it likes, and each makes the race look at all of them.
    #[test]
    fn each_connection_that_the_peer_begins_is_waited_for_once_and_few_at_once() {
        let mut run = Run::new(Candidates::default(), &[]);
        for n in [0, 0].into_iter().chain(0..MAX_ADOPTING as u64).chain([0]) {
            run.race.adopt(LinkId::new(n), run.start);
        }
        assert!(!run.race.leaves_out());
        for n in 0..2 * MAX_ADOPTING as u64 {
            run.race.adopt(LinkId::new(n), run.start);
        }
        assert!(run.race.leaves_out());
        run.poll(0);
        assert_eq!(run.under_way().len(), MAX_ADOPTING);
        run.ended(Attempt::Adopt(LinkId::new(0)), Ended::NotAdopted, 1);
        run.race.adopt(LinkId::new(0), run.start);
        run.race.adopt(LinkId::new(100), run.start);
        run.poll(1);
        assert_eq!(run.under_way().len(), MAX_ADOPTING - 1, "a failed one counts");
    }

    /// A punch may take longer than a dial. What was begun while the race waited for one had no time left.
    #[test]
    fn each_attempt_has_its_own_time_however_long_the_race_has_lasted() {
        let mut run = Run::new(Candidates::default(), &["one:1"]);
        run.poll(0);
        let later = run.at(8000);
        run.race.adopt(LinkId::new(1), later);
        run.race.add(&Tries { candidates: endpoints(&["peer:1"]), ..Tries::default() }, later);
        run.race.poll(later);
        let until = |action: &Action| matches!(action, Action::Begin { until, .. } if *until == later + TIMEOUT);
        let actions: Vec<Action> = std::iter::from_fn(|| run.race.next_action()).collect();
        assert_eq!(actions.iter().filter(|action| until(action)).count(), 2, "{actions:?}");
    }

    #[test]
    fn an_attempt_of_an_earlier_race_changes_nothing() {
        let mut run = Run::new(endpoints(&["peer:1"]), &[]);
        run.poll(0);
        let (id, _) = run.begun[0].clone();
        let mut next = Race::new(1, Setup { to_node: true, connect_timeout: TIMEOUT }, run.start);
        next.add(&Tries { candidates: endpoints(&["peer:1"]), ..Tries::default() }, run.start);
        assert!(!next.ended(id, Ended::NotDialled(ConnectError::Refused), run.start));
        assert_eq!(next.poll(run.start), None);
    }
}
