//! The life of a peer's link: when to look for one, which of several to keep, when to suspect it and when to give it up.
//!
//! ```text
//!              race                 link up                    silent
//! Unlinked ───────────▶ racing ───────────────▶ Linked ───────────────────▶ Suspect
//!    ▲  ▲                  │                    │  ▲  └ looks for a better    │  │
//!    │  │      legacy relay▼          invalidated  └────────── heard ─────────┘  │
//!    │  └──────────── PassedOn                  ▼                                │
//!    └────────────────────────────────────── Leaving            another link, or none to be had
//! ```
//!
//! Events come in as calls, [`Action`]s go out by [`LinkState::next_action`], and [`LinkState::next_timeout`] tells when to
//! call [`LinkState::poll`] if nothing happens. Links are ids: this knows no connections.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::errors::{ConnectError, Failures, PunchError, RouteError, SendError};
use crate::liveness::{Liveness, Seen};
use crate::proto::control::PunchFailure;
use crate::proto::control::Refusal;
use crate::race::{self, AttemptId, Ended, Outcome, Race, Tries};
use crate::retry::Backoff;
use crate::types::{Dialect, Endpoint, Fingerprint, Link, LinkId, Path};
use crate::upgrade::{Rank, Upgrade};

/// Pauses between races for messages that are owed while no call waits.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A peer that closes a link sooner than this, perhaps because of what it is sent, is not dialled again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// How long callers wait, within their deadlines, for a node that had a link and cannot be found. A relay that was
/// restarted is back within some seconds, and its nodes with it.
const AWAY: Duration = Duration::from_secs(30);

/// How long a legacy relay gets the messages for a node before other paths are tried again.
const PASSED_ON_FOR: Duration = Duration::from_secs(60);

/// How long a peer that is stopped may send what is on its way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How often acknowledgements are looked for while some are missing. Memory held meanwhile: what is sent in this time.
pub const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// A link that was replaced lives on for this long, and as long again while a request waits on it: answers to messages
/// that went over it are on their way.
pub const REPLACED_FOR: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// This node's key.
    pub own: Fingerprint,
    pub race: race::Setup,
}

/// What to carry out.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Begin or abort an attempt of the present race.
    Attempt(race::Action),
    /// Abort every attempt.
    StopRace,
    /// No attempt's link is of use any more, but dials go on until their handshakes are over. A 0.14.3 gateway handshakes in
    /// the process that reads: a dial that is broken off in the middle blocks that process for 5 s.
    FinishRace,
    /// Send over this link from now on, and let callers see it.
    Use(LinkId),
    /// Close a link that was offered and is not used.
    Close(LinkId),
    /// Callers do not see the link until it is shown again.
    Hide,
    Show,
    /// End the link. What it left unacknowledged goes over the next one.
    Retire,
    /// Let go of the link. What was asked over it may still be answered.
    Replace,
    /// Look again at the connections that the peer has begun, and tell [`LinkState::began`].
    LookAgain,
    /// Give everything that waits to this relay, until [`Action::StopPassingOn`].
    PassOn(Endpoint),
    StopPassingOn,
    /// No link was to be had. Calls from before `begun` fail with that, and later ones unless `later_stay` or they came with
    /// other candidates.
    Fail {
        error: SendError,
        begun: Instant,
        later_stay: bool,
    },
    /// No holder of another key was found. Parked calls from before `begun` fail.
    FailParked {
        begun: Instant,
    },
    /// What is known of paths that failed has changed.
    Failures(Failures),
    /// The peer is reached over another path than before.
    Path(Path),
}

/// What a peer's messages want.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demand {
    /// A call waits for a link.
    pub waited_for: bool,
    /// Something is owed: accepted, unacknowledged or not yet answered.
    pub owed: bool,
    /// Messages wait for the holder of another key than the link's.
    pub parked: bool,
    /// A call is among them.
    pub parked_waited_for: bool,
    /// Candidates are known that no race has tried.
    pub learned: bool,
    /// Some of them may be better than a relay.
    pub better: bool,
}

/// What to look for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Any link, or one beside the suspect.
    Link,
    /// A link to the holder of another key, beside the present one.
    OtherKey,
    /// A better path than a relay.
    Better,
    /// The race under way tries candidates that were learned since.
    MoreWays,
}

/// A link that can be had.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    pub link: Link,
    /// It shows a key that waiting messages name and the present link does not show.
    pub sought: bool,
}

#[derive(Debug)]
enum Mode {
    Unlinked {
        race: Option<Race>,
        /// When there was last a link.
        linked_until: Option<Instant>,
    },
    /// A legacy relay gets the messages.
    PassedOn {
        until: Instant,
        linked_until: Option<Instant>,
    },
    Linked {
        link: Link,
        since: Instant,
        search: Search,
    },
    /// The link is silent. It is hidden from callers until the peer is heard again.
    Suspect {
        link: Link,
        since: Instant,
        race: Option<Race>,
    },
    /// The link is given up once what went over it is acknowledged, and not later than this.
    Leaving {
        link: Link,
        since: Instant,
        until: Instant,
    },
}

/// What is looked for beside a link that works.
#[derive(Debug)]
enum Search {
    Nothing,
    /// A better path is looked for at this time.
    Planned(Instant),
    Better(Race),
    OtherKey(Race),
}

#[derive(Debug)]
pub struct LinkState {
    setup: Setup,
    mode: Mode,
    /// How many races there have been.
    races: u64,
    redial: Backoff,
    /// Messages that are only owed are worth a race from then on.
    redial_at: Option<Instant>,
    /// Calls too.
    hold_off: Option<Instant>,
    liveness: Liveness,
    upgrade: Upgrade,
    /// Why there is no link, while the peer is away.
    failure: Option<SendError>,
    /// Since the last link, only a node with another key was found.
    untrusted: bool,
    failures: Failures,
    told: Option<(Path, Failures)>,
    drain_until: Option<Instant>,
    actions: VecDeque<Action>,
}

impl LinkState {
    pub fn new(setup: Setup, now: Instant) -> Self {
        Self {
            setup,
            mode: Mode::Unlinked { race: None, linked_until: None },
            races: 0,
            redial: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            redial_at: None,
            hold_off: None,
            liveness: Liveness::new(now),
            upgrade: Upgrade::new(now),
            failure: None,
            untrusted: false,
            failures: Failures::default(),
            told: None,
            drain_until: None,
            actions: VecDeque::new(),
        }
    }

    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The link, suspect or not.
    pub fn link(&self) -> Option<&Link> {
        match &self.mode {
            Mode::Linked { link, .. } | Mode::Suspect { link, .. } | Mode::Leaving { link, .. } => Some(link),
            Mode::Unlinked { .. } | Mode::PassedOn { .. } => None,
        }
    }

    /// Whether there is a link that messages may be sent over.
    pub fn is_usable(&self) -> bool {
        matches!(self.mode, Mode::Linked { .. })
    }

    pub fn is_suspect(&self) -> bool {
        matches!(self.mode, Mode::Suspect { .. })
    }

    pub fn is_leaving(&self) -> bool {
        matches!(self.mode, Mode::Leaving { .. })
    }

    pub fn is_racing(&self) -> bool {
        self.race().is_some()
    }

    /// Whether the present race is for the holder of another key than the link's.
    fn is_racing_for_key(&self) -> bool {
        matches!(self.mode, Mode::Linked { search: Search::OtherKey(_), .. })
    }

    /// How long the peer may be silent because it was recently.
    pub fn expected_silence(&mut self, now: Instant) -> Duration {
        self.liveness.expected_silence(now)
    }

    /// Time has passed. `unacknowledged`: something that went over the link is not acknowledged. `draw` is uniform in 0..1,
    /// here and below.
    pub fn poll(&mut self, unacknowledged: bool, now: Instant, draw: f64) {
        match &mut self.mode {
            Mode::Leaving { until, .. } if !unacknowledged || *until <= now => {
                self.redial_at = None;
                self.unlink(Action::Replace, now);
            }
            Mode::PassedOn { until, .. } if *until <= now => self.stop_passing_on(),
            _ => {}
        }
        self.poll_race(now, draw);
    }

    /// What to look for now. Pass it to [`LinkState::search`].
    pub fn wants(&self, demand: &Demand, now: Instant) -> Option<Want> {
        let held_off = self.hold_off.is_some_and(|until| until > now);
        let redial = self.redial_at.is_none_or(|at| at <= now);
        match &self.mode {
            Mode::Unlinked { race: Some(_), .. } | Mode::Suspect { race: Some(_), .. } => {
                demand.learned.then_some(Want::MoreWays)
            }
            // A call is worth a race now. What is only owed waits for its turn.
            Mode::Unlinked { .. } | Mode::Suspect { .. } => {
                (!held_off && (demand.waited_for || (demand.owed && redial))).then_some(Want::Link)
            }
            Mode::Linked { search: Search::OtherKey(_), .. } => demand.learned.then_some(Want::MoreWays),
            Mode::Linked { .. } if demand.parked && !held_off && (demand.parked_waited_for || redial) => {
                Some(Want::OtherKey)
            }
            Mode::Linked { link, search, .. } => {
                let is_due = matches!(search, Search::Planned(at) if *at <= now);
                (link.path.is_relayed() && (is_due || demand.better)).then_some(Want::Better)
            }
            Mode::PassedOn { .. } | Mode::Leaving { .. } => None,
        }
    }

    /// Looks for what is wanted. `began`: connections of the peer that may be of use. `relay`: the one that carries the link.
    pub fn search(&mut self, want: Want, began: &[Offer], tries: &Tries, relay: Option<Endpoint>, now: Instant) {
        match want {
            Want::MoreWays => {
                if let Some(race) = self.race_mut() {
                    race.add(tries, now);
                }
                self.take_race_actions();
            }
            Want::Link => {
                self.redial_at = None;
                self.begin_race(now);
                self.adopt(began, now);
                if let Some(race) = self.race_mut() {
                    race.add(tries, now);
                }
                self.take_race_actions();
            }
            Want::OtherKey => {
                self.redial_at = None;
                // A race for a better link tries direct paths only.
                self.stop_race();
                let race = self.new_race(now);
                if let Mode::Linked { search, .. } = &mut self.mode {
                    *search = Search::OtherKey(race);
                }
                self.adopt(began, now);
                if let Some(race) = self.race_mut() {
                    race.add(&Tries { bound: true, ..tries.clone() }, now);
                }
                self.take_race_actions();
            }
            Want::Better => self.look_for_better(tries, relay, now),
        }
    }

    /// The peer has begun connections, and one may be better than the link.
    pub fn began(&mut self, began: &[Offer], now: Instant) {
        // Without either, no message wants a link.
        if self.link().is_some() || self.is_racing() {
            self.adopt(began, now);
            self.take_race_actions();
        }
    }

    /// An attempt came to a link, which is used or closed. If the present link is suspect, [`LinkState::heard`] comes first:
    /// a peer that is back answers on both links, and the old one has everything that is on its way.
    pub fn linked(&mut self, id: AttemptId, offer: Offer, now: Instant) {
        let is_current = self.race_mut().is_some_and(|race| race.ended(id, Ended::Linked, now));
        self.take_failures();
        if !is_current || !self.prefers(&offer) {
            return self.actions.push_back(Action::Close(offer.link.id));
        }
        self.link_up(offer.link, now);
    }

    /// An attempt has failed.
    pub fn failed(&mut self, id: AttemptId, how: Ended, now: Instant) {
        if let Some(race) = self.race_mut() {
            race.ended(id, how, now);
        }
        self.take_failures();
    }

    /// How many packets have come over the link. `owed_since`: when the oldest message left that is not acknowledged.
    pub fn heard(&mut self, packets: u64, owed_since: Option<Instant>, patience: Duration, now: Instant) {
        if owed_since.is_none() && !self.is_suspect() {
            return;
        }
        match self.liveness.look(packets, owed_since, patience, now) {
            Seen::Heard => self.trust_again(),
            Seen::Silent(silence) => self.suspect(packets, silence, now),
            Seen::Nothing => {}
        }
    }

    /// The peer may be gone: callers wait until it is heard again, or for another link. `packets` have come over this one.
    pub fn suspect(&mut self, packets: u64, silence: Duration, now: Instant) {
        match &self.mode {
            Mode::Linked { link, since, .. } => {
                let (link, since) = (*link, *since);
                self.stop_race();
                self.liveness.suspect(packets, silence, now);
                self.mode = Mode::Suspect { link, since, race: None };
                self.actions.push_back(Action::Hide);
            }
            Mode::Leaving { .. } => {
                self.redial_at = None;
                self.unlink(Action::Retire, now);
            }
            _ => {}
        }
    }

    /// A caller gives the link up. `patience`: how long what went over it may still be acknowledged.
    pub fn invalidate(&mut self, patience: Duration, now: Instant) {
        match &self.mode {
            Mode::Linked { link, since, .. } => {
                let (link, since) = (*link, *since);
                self.stop_race();
                self.mode = Mode::Leaving { link, since, until: now + patience };
                self.actions.push_back(Action::Hide);
            }
            Mode::Suspect { .. } => {
                self.stop_race();
                self.redial_at = None;
                self.unlink(Action::Retire, now);
            }
            Mode::Unlinked { .. } | Mode::PassedOn { .. } | Mode::Leaving { .. } => {}
        }
    }

    /// The link has ended, or carries the session no more.
    pub fn link_died(&mut self, now: Instant, draw: f64) {
        let since = match &self.mode {
            Mode::Linked { since, .. } | Mode::Suspect { since, .. } | Mode::Leaving { since, .. } => *since,
            Mode::Unlinked { .. } | Mode::PassedOn { .. } => return,
        };
        self.redial_at = None;
        if now.saturating_duration_since(since) < SHORT_LIFE {
            self.hold_off = Some(now + self.redial.pause(draw));
        } else {
            self.redial.reset();
        }
        // A race for a better link goes on for any link.
        self.stop_race();
        self.actions.retain(|action| !matches!(action, Action::Path(_)));
        self.unlink(Action::Retire, now);
    }

    /// An address or a NAT of one of the two has changed.
    pub fn network_changed(&mut self, now: Instant, draw: f64) {
        self.upgrade.changed(now, draw);
        if let Mode::Linked { search: search @ Search::Planned(_), .. } = &mut self.mode {
            *search = Search::Planned(self.upgrade.next());
        }
    }

    /// A lookup has found new candidates, or the legacy relay takes no more messages.
    pub fn stop_passing_on(&mut self) {
        if let Mode::PassedOn { linked_until, .. } = self.mode {
            self.mode = Mode::Unlinked { race: None, linked_until };
            self.actions.push_back(Action::StopPassingOn);
        }
    }

    /// Whether the engine, which is stopping, waits no longer for this peer.
    pub fn is_drained(&mut self, is_quiet: bool, now: Instant) -> bool {
        let until = *self.drain_until.get_or_insert(now + DRAIN_TIMEOUT);
        is_quiet || until <= now
    }

    /// When to poll if nothing happens. A time that is past waits for demand.
    pub fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let redial = self.redial_at.max(self.hold_off).filter(|&at| at > now);
        let mode = match &self.mode {
            Mode::Leaving { until, .. } | Mode::PassedOn { until, .. } => Some(*until),
            Mode::Linked { search: Search::Planned(at), .. } => Some(*at),
            _ => None,
        };
        let race = self.race().and_then(Race::next_timeout);
        [redial, mode, race, self.drain_until].into_iter().flatten().min()
    }

    /// Whether only a node with another key is where this one should be.
    pub fn meets_another_key(&self) -> bool {
        let racing = match &self.mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => race.as_ref().and_then(Race::failure),
            // A race beside a link that works only looks for a better path.
            _ => None,
        };
        self.untrusted || racing.is_some_and(is_untrusted)
    }

    /// What a call whose deadline passes without a link is told. `relays`: whether any relay is known.
    pub fn why_not_reached(&self, relays: bool) -> SendError {
        match &self.failure {
            Some(failure) => failure.clone(),
            None if !self.setup.race.to_node => ConnectError::TimedOut.into(),
            None if self.meets_another_key() => RouteError::Node(ConnectError::Untrusted).into(),
            None if !relays => RouteError::NoRelay.into(),
            None => RouteError::Relay(ConnectError::TimedOut).into(),
        }
    }

    fn look_for_better(&mut self, tries: &Tries, relay: Option<Endpoint>, now: Instant) {
        let begins = !self.is_racing();
        self.begin_race(now);
        let Some(race) = self.race_mut() else { return };
        race.add(tries, now);
        race.keep_direct();
        if let (true, Some(relay)) = (begins, relay) {
            race.punch(relay, now);
        }
        self.take_race_actions();
    }

    fn adopt(&mut self, began: &[Offer], now: Instant) {
        for offer in began {
            if self.link().is_some_and(|link| link.id == offer.link.id) || !self.prefers(offer) {
                continue;
            }
            self.begin_race(now);
            if let Some(race) = self.race_mut() {
                race.adopt(offer.link.id, now);
            }
        }
    }

    /// Whether a link is better than the present one. Both nodes have to come to the same result, or each would let go of
    /// the connection that the other one keeps.
    fn prefers(&self, offer: &Offer) -> bool {
        let present = match &self.mode {
            Mode::Linked { link, .. } | Mode::Leaving { link, .. } => link,
            Mode::Unlinked { .. } | Mode::PassedOn { .. } | Mode::Suspect { .. } => return true,
        };
        let Some(shown) = offer.link.shown else { return true };
        let rank = |link: &Link| {
            let dialler = if link.dialled { self.setup.own } else { shown };
            Rank { relayed: link.path.is_relayed(), dialler }
        };
        offer.sought || rank(&offer.link) < rank(present)
    }

    fn link_up(&mut self, link: Link, now: Instant) {
        let before = match &self.mode {
            Mode::Suspect { .. } => Some(Action::Retire),
            Mode::Linked { .. } | Mode::Leaving { .. } => Some(Action::Replace),
            Mode::Unlinked { .. } | Mode::PassedOn { .. } => None,
        };
        // Direct paths are still tried while a relay carries the messages.
        let mut race = self.take_race();
        match &mut race {
            Some(race) if link.path.is_relayed() => race.keep_direct(),
            Some(_) => {
                race = None;
                self.drop_attempts(Action::StopRace);
            }
            None => {}
        }
        if matches!(self.mode, Mode::PassedOn { .. }) {
            self.actions.push_back(Action::StopPassingOn);
        }
        self.actions.extend(before);
        self.liveness.linked(now);
        (self.failure, self.untrusted) = (None, false);
        if !link.path.is_relayed() {
            self.upgrade = Upgrade::new(now);
            self.set_failures(Failures::default());
        }
        let search = race.map_or(Search::Nothing, Search::Better);
        self.mode = Mode::Linked { link, since: now, search };
        self.actions.push_back(Action::Use(link.id));
        self.plan_upgrade();
        self.tell_path();
        self.take_race_actions();
    }

    /// The link is gone. How it is let go of is the action's.
    fn unlink(&mut self, how: Action, now: Instant) {
        if self.link().is_some() {
            self.mode = Mode::Unlinked { race: None, linked_until: Some(now) };
            self.actions.push_back(how);
        }
    }

    fn trust_again(&mut self) {
        let Mode::Suspect { link, since, race } = &mut self.mode else { return };
        let (link, since, raced) = (*link, *since, race.is_some());
        if raced {
            let finishes = link.dialect == Dialect::Macula;
            self.drop_attempts(if finishes { Action::FinishRace } else { Action::StopRace });
        }
        self.mode = Mode::Linked { link, since, search: Search::Nothing };
        // The race that ended may have waited for a connection of the peer's.
        self.actions.extend([Action::Show, Action::LookAgain]);
        self.plan_upgrade();
    }

    fn poll_race(&mut self, now: Instant, draw: f64) {
        let Some(race) = self.race_mut() else { return };
        let (begun, outcome) = (race.begun(), race.poll(now));
        self.take_race_actions();
        let Some(outcome) = outcome else { return };
        self.take_failures();
        let mode = match &self.mode {
            Mode::Linked { search: Search::OtherKey(_), .. } => Want::OtherKey,
            Mode::Linked { .. } => Want::Better,
            _ => Want::Link,
        };
        if self.take_race().is_some_and(|race| race.leaves_out()) && self.link().is_some() {
            // The peer may keep one of those that were left out.
            self.actions.push_back(Action::LookAgain);
        }
        match (mode, outcome) {
            (Want::OtherKey, _) => {
                self.redial_at = Some(now + self.redial.pause(draw));
                self.actions.push_back(Action::FailParked { begun });
                self.plan_upgrade();
            }
            (Want::Better, _) => self.not_better(now, draw),
            (_, Outcome::Lost(error)) => self.race_lost(error, begun, now, draw),
            (_, Outcome::LegacyRelay(relay)) => {
                self.unlink(Action::Retire, now);
                if let Mode::Unlinked { linked_until, .. } = self.mode {
                    self.mode = Mode::PassedOn { until: now + PASSED_ON_FOR, linked_until };
                    self.actions.push_back(Action::PassOn(relay));
                }
            }
        }
    }

    fn race_lost(&mut self, error: SendError, begun: Instant, now: Instant, draw: f64) {
        self.untrusted = is_untrusted(&error);
        self.redial_at = Some(now + self.redial.pause(draw));
        // A name that does not resolve, or a missing route on this host, says nothing about the peer.
        let is_ours = matches!(self.direct_failure(&error), Some(ConnectError::Unresolved | ConnectError::NoRoute));
        if self.is_suspect() && !is_ours {
            // Silent on the old link and not to be had on a new one: what is unacknowledged keeps its deadlines.
            self.unlink(Action::Retire, now);
        }
        if self.is_away(&error, now) {
            // It was there a moment ago. It is about to register again, perhaps at a relay that was restarted too, or
            // this host's own interface is down.
            self.hold_off = self.redial_at;
            self.failure = Some(error);
            return;
        }
        // Silence says nothing about a call that came later: it gets a race of its own.
        let later_stay = matches!(error, SendError::Connect(ConnectError::TimedOut));
        self.actions.push_back(Action::Fail { error, begun, later_stay });
    }

    /// Whether a peer that was linked until recently cannot be found, or cannot be sent anything.
    fn is_away(&self, error: &SendError, now: Instant) -> bool {
        let unregistered =
            matches!(error, SendError::Route(RouteError::Relay(_) | RouteError::Setup(Refusal::NotRegistered)));
        let absent = unregistered || self.direct_failure(error) == Some(ConnectError::NoRoute);
        let recently = match &self.mode {
            Mode::Unlinked { linked_until, .. } | Mode::PassedOn { linked_until, .. } => {
                linked_until.is_some_and(|until| now.saturating_duration_since(until) < AWAY)
            }
            _ => true,
        };
        absent && recently
    }

    /// Why the peer's own address could not be dialled, if no relay was tried after that.
    fn direct_failure(&self, error: &SendError) -> Option<ConnectError> {
        match error {
            SendError::Connect(failure) => Some(failure.clone()),
            SendError::Route(RouteError::NoRelay) => self.failures.direct.clone(),
            _ => None,
        }
    }

    /// Better paths have been tried, in vain.
    fn not_better(&mut self, now: Instant, draw: f64) {
        let punch = self.failures.hole_punch.as_ref().map(PunchError::failure);
        // An endpoint may be reached later whatever the NATs are.
        let dialled = self.failures.direct.is_some();
        let counts = |failure: &PunchFailure| *failure == PunchFailure::Interrupted || !dialled;
        let failure = punch.filter(counts).unwrap_or(PunchFailure::TimedOut);
        self.upgrade.failed(failure, now, draw);
        self.plan_upgrade();
        self.tell_path();
    }

    fn plan_upgrade(&mut self) {
        let next = self.upgrade.next();
        if let Mode::Linked { link, search, .. } = &mut self.mode
            && matches!(search, Search::Nothing | Search::Planned(_))
        {
            *search = if link.path.is_relayed() { Search::Planned(next) } else { Search::Nothing };
        }
    }

    /// Says how the peer is reached, if that is news.
    fn tell_path(&mut self) {
        let Some(path) = self.link().map(|link| link.path) else { return };
        let news = (path, self.failures.clone());
        // A peer that is known by its address has but one path.
        if self.setup.race.to_node && self.told.as_ref() != Some(&news) {
            self.told = Some(news);
            self.actions.push_back(Action::Path(path));
        }
    }

    fn take_failures(&mut self) {
        // Why no other holder of a key was found says nothing about the link's path.
        if self.is_racing_for_key() {
            return;
        }
        let mut failures = self.failures.clone();
        if let Some(race) = self.race_mut() {
            race.take_failures(&mut failures);
        }
        self.set_failures(failures);
    }

    fn set_failures(&mut self, failures: Failures) {
        if failures != self.failures {
            self.failures = failures.clone();
            self.actions.push_back(Action::Failures(failures));
        }
    }

    fn race(&self) -> Option<&Race> {
        match &self.mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => race.as_ref(),
            Mode::Linked { search: Search::Better(race) | Search::OtherKey(race), .. } => Some(race),
            Mode::Linked { .. } | Mode::PassedOn { .. } | Mode::Leaving { .. } => None,
        }
    }

    fn race_mut(&mut self) -> Option<&mut Race> {
        match &mut self.mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => race.as_mut(),
            Mode::Linked { search: Search::Better(race) | Search::OtherKey(race), .. } => Some(race),
            Mode::Linked { .. } | Mode::PassedOn { .. } | Mode::Leaving { .. } => None,
        }
    }

    fn new_race(&mut self, now: Instant) -> Race {
        self.races += 1;
        Race::new(self.races, self.setup.race, now)
    }

    /// Begins a race unless there is one. A link that is leaving needs none.
    fn begin_race(&mut self, now: Instant) {
        if self.is_racing() {
            return;
        }
        let new = self.new_race(now);
        match &mut self.mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => *race = Some(new),
            Mode::Linked { search, .. } => *search = Search::Better(new),
            Mode::PassedOn { .. } | Mode::Leaving { .. } => {}
        }
    }

    fn take_race(&mut self) -> Option<Race> {
        match &mut self.mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => race.take(),
            Mode::Linked { search, .. } => match std::mem::replace(search, Search::Nothing) {
                Search::Better(race) | Search::OtherKey(race) => Some(race),
                Search::Nothing | Search::Planned(_) => None,
            },
            Mode::PassedOn { .. } | Mode::Leaving { .. } => None,
        }
    }

    fn stop_race(&mut self) {
        if self.take_race().is_some() {
            self.drop_attempts(Action::StopRace);
        }
    }

    /// Attempts that were not begun yet need not be.
    fn drop_attempts(&mut self, how: Action) {
        self.actions.retain(|action| !matches!(action, Action::Attempt(_)));
        self.actions.push_back(how);
    }

    fn take_race_actions(&mut self) {
        let Self { mode, actions, .. } = self;
        let race = match mode {
            Mode::Unlinked { race, .. } | Mode::Suspect { race, .. } => race.as_mut(),
            Mode::Linked { search: Search::Better(race) | Search::OtherKey(race), .. } => Some(race),
            Mode::Linked { .. } | Mode::PassedOn { .. } | Mode::Leaving { .. } => None,
        };
        if let Some(race) = race {
            actions.extend(std::iter::from_fn(|| race.next_action()).map(Action::Attempt));
        }
    }
}

fn is_untrusted(failure: &SendError) -> bool {
    use ConnectError::Untrusted;
    matches!(failure, SendError::Connect(Untrusted) | SendError::Route(RouteError::Node(Untrusted)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::net::SocketAddr;

    use super::*;
    use crate::errors::CircuitError;
    use crate::race::Attempt;
    use crate::types::{Candidates, EndpointRef};

    const PATIENCE: Duration = Duration::from_millis(500);
    const TIMEOUT: Duration = Duration::from_secs(5);

    /// The middle one: others are less or greater.
    const OWN: u8 = 5;

    fn at(text: &str) -> Endpoint {
        EndpointRef::parse(text).unwrap().to_owned()
    }

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    fn relayed() -> Path {
        Path::Relay(SocketAddr::from(([10, 0, 0, 1], 1)))
    }

    fn owed() -> Demand {
        Demand { owed: true, ..Demand::default() }
    }

    fn call() -> Demand {
        Demand { waited_for: true, ..owed() }
    }

    fn unregistered() -> SendError {
        RouteError::Setup(Refusal::NotRegistered).into()
    }

    /// A link's life in virtual time, with what a race begins.
    struct Life {
        start: Instant,
        ms: u64,
        state: LinkState,
        attempts: Vec<(AttemptId, Attempt)>,
        /// What else was to be carried out.
        done: Vec<Action>,
        tries: Tries,
        ids: u64,
    }

    impl Life {
        fn new() -> Self {
            Self::to(true)
        }

        fn to(to_node: bool) -> Self {
            let start = Instant::now();
            let setup = Setup { own: key(OWN), race: race::Setup { to_node, connect_timeout: TIMEOUT } };
            let candidates = Candidates { endpoints: vec![at("peer:1")], ..Candidates::default() };
            let own_relays = if to_node { vec![at("relay:1")] } else { vec![] };
            Self {
                start,
                ms: 0,
                state: LinkState::new(setup, start),
                attempts: Vec::new(),
                done: Vec::new(),
                tries: Tries { candidates, own_relays, ..Tries::default() },
                ids: 0,
            }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.ms)
        }

        fn after(&mut self, ms: u64) -> &mut Self {
            self.ms += ms;
            self.state.poll(true, self.now(), 1.0);
            self.take();
            self
        }

        fn take(&mut self) {
            while let Some(action) = self.state.next_action() {
                match action {
                    Action::Attempt(race::Action::Begin { id, attempt, .. }) => self.attempts.push((id, attempt)),
                    Action::Attempt(race::Action::Abort(id)) => self.attempts.retain(|(known, _)| *known != id),
                    Action::StopRace | Action::FinishRace => {
                        self.attempts.clear();
                        self.done.push(action);
                    }
                    action => self.done.push(action),
                }
            }
        }

        /// What was done since the last call.
        fn done(&mut self) -> Vec<Action> {
            std::mem::take(&mut self.done)
        }

        fn wants(&self, demand: Demand) -> Option<Want> {
            self.state.wants(&demand, self.now())
        }

        fn search(&mut self, want: Want) {
            self.search_with(want, &[]);
        }

        fn search_with(&mut self, want: Want, began: &[Offer]) {
            self.state.search(want, began, &self.tries, Some(at("relay:1")), self.now());
            self.take();
            self.after(0);
        }

        fn link(&mut self, path: Path, dialled: bool, shown: u8) -> Link {
            self.ids += 1;
            let id = LinkId::new(self.ids);
            Link { id, path, dialect: Dialect::MaculaPeer1, dialled, shown: Some(key(shown)) }
        }

        /// The attempt comes to this link.
        fn comes_to(&mut self, attempt: Attempt, link: Link, sought: bool) -> Vec<Action> {
            self.done();
            let index = self.attempts.iter().position(|(_, begun)| *begun == attempt).unwrap();
            let (id, _) = self.attempts.remove(index);
            self.state.linked(id, Offer { link, sought }, self.now());
            self.take();
            self.done()
        }

        fn fails(&mut self, attempt: Attempt, how: Ended) -> Vec<Action> {
            self.done();
            let index = self.attempts.iter().position(|(_, begun)| *begun == attempt).unwrap();
            let (id, _) = self.attempts.remove(index);
            self.state.failed(id, how, self.now());
            self.after(0);
            self.done()
        }

        /// A link by this path is up, as it was dialled, and has lasted.
        fn linked_by(path: Path) -> (Self, Link) {
            let mut life = Self::new();
            life.search(Want::Link);
            life.after(50);
            let attempt = if path.is_relayed() { Attempt::Circuit(at("relay:1")) } else { Attempt::Dial(at("peer:1")) };
            let link = life.link(path, true, 9);
            life.comes_to(attempt, link, false);
            life.after(2000).done();
            (life, link)
        }

        fn under_way(&self) -> Vec<Attempt> {
            self.attempts.iter().map(|(_, attempt)| attempt.clone()).collect()
        }

        /// Every attempt under way fails.
        fn loses(&mut self, dial: ConnectError, circuit: CircuitError) -> Vec<Action> {
            let mut done = Vec::new();
            while let Some((_, attempt)) = self.attempts.first().cloned() {
                let how = match attempt {
                    Attempt::Dial(_) => Ended::NotDialled(dial.clone()),
                    Attempt::Circuit(_) => Ended::NoCircuit(circuit.clone()),
                    Attempt::Punch(_) => Ended::NotPunched(PunchFailure::TimedOut.into()),
                    Attempt::Adopt(_) => Ended::NotAdopted,
                };
                done.extend(self.fails(attempt, how));
            }
            done
        }

        fn suspect(&mut self) {
            self.state.suspect(0, PATIENCE, self.now());
            self.take();
        }

        fn heard(&mut self, packets: u64) {
            self.state.heard(packets, Some(self.start), PATIENCE, self.now());
            self.take();
        }
    }

    fn dial() -> Attempt {
        Attempt::Dial(at("peer:1"))
    }

    fn circuit() -> Attempt {
        Attempt::Circuit(at("relay:1"))
    }

    fn punch() -> Attempt {
        Attempt::Punch(at("relay:1"))
    }

    fn is_fail(action: &Action) -> bool {
        matches!(action, Action::Fail { .. })
    }

    /// The peer dialled so often that a race took no more of its connections, and then kept the last one: each node had a
    /// connection of its own for ever.
    #[test]
    fn a_connection_that_a_race_left_out_is_looked_at_when_the_race_is_over() {
        for (began, looks) in [(8, false), (9, true)] {
            let (mut life, _) = Life::linked_by(relayed());
            let offers: Vec<Offer> =
                (0..began).map(|_| Offer { link: life.link(Path::Direct, false, 9), sought: false }).collect();
            life.state.began(&offers, life.now());
            life.take();
            let done = life.loses(ConnectError::TimedOut, CircuitError::RelayLost);
            assert_eq!(done.contains(&Action::LookAgain), looks, "{began} connections");
        }
    }

    #[test]
    fn a_race_begins_for_what_is_wanted_and_ends_with_a_link() {
        let mut life = Life::new();
        assert_eq!(life.wants(Demand::default()), None);
        assert_eq!(life.wants(owed()), Some(Want::Link));
        life.search(Want::Link);
        assert!(life.state.is_racing());
        assert_eq!(life.under_way(), [dial()]);
        assert_eq!(life.wants(call()), None, "one race at a time");
        assert_eq!(life.state.next_timeout(life.now()), Some(life.start + Duration::from_millis(50)));
        let link = life.link(Path::Direct, true, 9);
        assert_eq!(
            life.comes_to(dial(), link, false),
            [Action::StopRace, Action::Use(link.id), Action::Path(Path::Direct)]
        );
        assert_eq!(life.state.link(), Some(&link));
        assert!(life.state.is_usable() && !life.state.is_racing() && !life.state.is_leaving());
        assert_eq!(life.wants(call()), None);
        assert_eq!(life.state.next_timeout(life.now()), None);
    }

    #[test]
    fn candidates_that_are_learned_join_the_race() {
        let mut life = Life::new();
        life.search(Want::Link);
        assert_eq!(life.wants(Demand { learned: true, ..call() }), Some(Want::MoreWays));
        life.tries.candidates.endpoints.push(at("other:1"));
        life.search(Want::MoreWays);
        assert_eq!(life.under_way(), [dial(), Attempt::Dial(at("other:1"))]);
    }

    #[test]
    fn a_call_gets_a_race_at_once_and_what_is_only_owed_waits_for_its_turn() {
        let mut life = Life::to(false);
        life.search(Want::Link);
        let done = life.loses(ConnectError::Refused, CircuitError::NotRegistered);
        let refused = SendError::from(ConnectError::Refused);
        assert_eq!(done[1], Action::Fail { error: refused, begun: life.start, later_stay: false });
        assert_eq!(life.wants(call()), Some(Want::Link));
        assert_eq!(life.wants(owed()), None);
        assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + FIRST_PAUSE));
        life.after(99);
        assert_eq!(life.wants(owed()), None);
        life.after(1);
        assert_eq!(life.wants(owed()), Some(Want::Link));
        assert_eq!(life.state.next_timeout(life.now()), None, "a time that is past waits for demand");
    }

    #[test]
    fn pauses_between_races_grow_to_a_second_and_are_short_again_after_a_link_that_lasted() {
        let mut life = Life::to(false);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            life.search(Want::Link);
            life.loses(ConnectError::Refused, CircuitError::NotRegistered);
            let pause = life.state.next_timeout(life.now()).unwrap() - life.now();
            pauses.push(pause.as_millis());
            life.after(1000);
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        life.search(Want::Link);
        let link = life.link(Path::Direct, true, 9);
        life.comes_to(dial(), link, false);
        life.after(1000);
        life.state.link_died(life.now(), 1.0);
        life.after(0);
        assert_eq!(life.wants(owed()), Some(Want::Link), "no pause after a link that lasted");
        life.search(Want::Link);
        life.loses(ConnectError::Refused, CircuitError::NotRegistered);
        assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + FIRST_PAUSE));
    }

    #[test]
    fn silence_leaves_later_calls_a_race_of_their_own() {
        let mut life = Life::to(false);
        life.search(Want::Link);
        let done = life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(done.iter().any(|action| matches!(action, Action::Fail { later_stay: true, .. })));
    }

    #[test]
    fn a_peer_that_closes_a_young_link_is_not_dialled_again_at_once() {
        let mut life = Life::new();
        life.search(Want::Link);
        let link = life.link(Path::Direct, true, 9);
        life.comes_to(dial(), link, false);
        life.after(999);
        life.state.link_died(life.now(), 1.0);
        life.after(0);
        assert_eq!(life.done(), [Action::Retire]);
        assert_eq!(life.wants(call()), None, "not even for a call");
        assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + FIRST_PAUSE));
        life.after(100);
        assert_eq!(life.wants(call()), Some(Want::Link));
    }

    #[test]
    fn a_silent_link_is_hidden_and_shown_again_when_the_peer_is_heard() {
        let (mut life, link) = Life::linked_by(Path::Direct);
        life.heard(1);
        for _ in 0..5 {
            assert_eq!(life.done(), []);
            // A later look would count as this host's own pause.
            life.after(100).heard(1);
        }
        assert_eq!(life.done(), [Action::Hide]);
        assert!(life.state.is_suspect() && !life.state.is_usable());
        assert_eq!(life.state.link(), Some(&link));
        assert_eq!(life.wants(owed()), Some(Want::Link));
        life.search(Want::Link);
        assert_eq!(life.under_way(), [dial()]);
        life.after(10).heard(2);
        assert_eq!(life.done(), [Action::StopRace, Action::Show, Action::LookAgain]);
        assert!(life.state.is_usable() && !life.state.is_racing());
    }

    #[test]
    fn a_suspect_that_owes_nothing_any_more_is_trusted_again_and_may_be_silent_for_longer() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.heard(1);
        assert_eq!(life.state.expected_silence(life.now()), Duration::ZERO);
        life.suspect();
        life.after(400);
        life.state.heard(2, None, PATIENCE, life.now());
        assert!(life.state.is_usable());
        assert!(life.state.expected_silence(life.now()) > PATIENCE);
    }

    #[test]
    fn a_link_that_owes_nothing_may_be_silent() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.after(5000);
        life.state.heard(0, None, PATIENCE, life.now());
        assert!(life.state.is_usable());
    }

    #[test]
    fn dials_to_a_legacy_gateway_go_on_when_the_link_is_trusted_again() {
        let mut life = Life::to(false);
        life.search(Want::Link);
        let link = Link { dialect: Dialect::Macula, ..life.link(Path::Direct, true, 9) };
        life.comes_to(dial(), link, false);
        life.suspect();
        life.search(Want::Link);
        life.done();
        life.heard(1);
        assert_eq!(life.done(), [Action::FinishRace, Action::Show, Action::LookAgain]);
    }

    #[test]
    fn another_link_replaces_the_suspect_whatever_it_shows() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.suspect();
        life.search(Want::Link);
        life.after(50);
        let worse = life.link(relayed(), true, 9);
        let done = life.comes_to(circuit(), worse, false);
        assert_eq!(done, [Action::Retire, Action::Use(worse.id), Action::Path(relayed())]);
        assert_eq!(life.under_way(), [dial(), punch()], "direct paths are still tried");
    }

    #[test]
    fn a_suspect_is_given_up_when_the_peer_cannot_be_reached_and_kept_when_this_host_is_at_fault() {
        for (error, stays) in
            [(ConnectError::NoRoute, true), (ConnectError::Unresolved, true), (ConnectError::Refused, false)]
        {
            let mut life = Life::to(false);
            life.search(Want::Link);
            let link = life.link(Path::Direct, true, 9);
            life.comes_to(dial(), link, false);
            life.after(2000);
            life.suspect();
            life.search(Want::Link);
            let done = life.loses(error.clone(), CircuitError::NotRegistered);
            assert_eq!(life.state.is_suspect(), stays, "{error}");
            assert_eq!(done.contains(&Action::Retire), !stays, "{error}");
        }
    }

    #[test]
    fn calls_wait_for_a_node_that_was_linked_and_is_away() {
        let (mut life, _) = Life::linked_by(relayed());
        life.state.link_died(life.now(), 1.0);
        life.after(0).search(Want::Link);
        let done = life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(!done.iter().any(is_fail), "{done:?}");
        assert_eq!(life.state.why_not_reached(true), unregistered());
        assert_eq!(life.wants(call()), None, "held off");
        life.after(100);
        assert_eq!(life.wants(call()), Some(Want::Link));
        life.after(AWAY.as_millis() as u64 - 100).search(Want::Link);
        let done = life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(done.iter().any(is_fail), "it was away for too long");
    }

    #[test]
    fn calls_to_a_node_that_never_had_a_link_fail_at_once() {
        let mut life = Life::new();
        life.search(Want::Link);
        life.after(50);
        let done = life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(done.contains(&Action::Fail { error: unregistered(), begun: life.start, later_stay: false }));
        assert_eq!(life.wants(call()), Some(Want::Link));
    }

    #[test]
    fn a_peer_is_away_while_this_host_has_no_route_to_it() {
        let mut life = Life::to(false);
        life.search(Want::Link);
        let link = life.link(Path::Direct, true, 9);
        life.comes_to(dial(), link, false);
        life.after(2000);
        life.state.link_died(life.now(), 1.0);
        life.search(Want::Link);
        let done = life.loses(ConnectError::NoRoute, CircuitError::NotRegistered);
        assert!(!done.iter().any(is_fail));
        assert_eq!(life.state.why_not_reached(false), ConnectError::NoRoute.into());
        let (mut node, _) = Life::linked_by(Path::Direct);
        node.tries.own_relays.clear();
        node.state.link_died(node.now(), 1.0);
        node.after(0).search(Want::Link);
        let done = node.loses(ConnectError::NoRoute, CircuitError::NotRegistered);
        assert!(!done.iter().any(is_fail), "a node without a relay: {done:?}");
    }

    #[test]
    fn both_nodes_keep_the_direct_connection_and_of_two_the_one_that_the_smaller_key_dialled() {
        // Path and dialler of the present link and of the offered one, the peer's key, and whether the link is replaced.
        let cases = [
            ((relayed(), true), (Path::Direct, true), 9, true),
            ((Path::Direct, true), (relayed(), true), 9, false),
            ((Path::Direct, true), (Path::Direct, false), 9, false),
            ((Path::Direct, true), (Path::Direct, false), 1, true),
            ((Path::Direct, false), (Path::Direct, true), 9, true),
            ((Path::Direct, false), (Path::Direct, true), 1, false),
            ((Path::Direct, true), (Path::Direct, true), 1, false),
            ((relayed(), false), (Path::HolePunch, false), 1, true),
        ];
        for ((path, dialled), (other_path, other_dialled), shown, replaced) in cases {
            let mut life = Life::new();
            life.search(Want::Link);
            let link = life.link(path, dialled, shown);
            life.comes_to(dial(), link, false);
            life.done();
            let other = life.link(other_path, other_dialled, shown);
            life.state.began(&[Offer { link: other, sought: false }], life.now());
            life.after(0);
            let adopts = Attempt::Adopt(other.id);
            assert_eq!(life.under_way().contains(&adopts), replaced, "{link:?} {other:?}");
            if replaced {
                let done = life.comes_to(adopts, other, false);
                assert!(done.contains(&Action::Replace) && done.contains(&Action::Use(other.id)), "{done:?}");
            }
        }
    }

    #[test]
    fn the_link_itself_is_not_adopted_again() {
        let (mut life, link) = Life::linked_by(relayed());
        let before = life.under_way();
        life.state.began(&[Offer { link: Link { path: Path::Direct, ..link }, sought: true }], life.now());
        life.after(0);
        assert_eq!(life.under_way(), before);
    }

    #[test]
    fn a_connection_that_the_peer_began_is_of_use_only_where_a_link_is_wanted() {
        let mut life = Life::new();
        let link = life.link(Path::Direct, false, 9);
        life.state.began(&[Offer { link, sought: false }], life.now());
        life.after(0);
        assert_eq!(life.under_way(), []);
        life.search_with(Want::Link, &[Offer { link, sought: false }]);
        assert_eq!(life.under_way(), [Attempt::Adopt(link.id), dial()]);
        let done = life.comes_to(Attempt::Adopt(link.id), link, false);
        assert!(done.contains(&Action::StopRace) && done.contains(&Action::Use(link.id)));
    }

    #[test]
    fn attempts_that_were_not_begun_are_dropped_when_a_link_is_up() {
        let mut life = Life::new();
        let link = life.link(Path::Direct, false, 9);
        life.state.search(Want::Link, &[Offer { link, sought: false }], &life.tries, None, life.now());
        let Some(Action::Attempt(race::Action::Begin { id, attempt: Attempt::Adopt(_), .. })) =
            life.state.next_action()
        else {
            panic!("adopted first")
        };
        life.state.linked(id, Offer { link, sought: false }, life.now());
        let rest: Vec<_> = std::iter::from_fn(|| life.state.next_action()).collect();
        assert!(
            !rest.iter().any(|action| matches!(action, Action::Attempt(_))),
            "no dial for a link that is up: {rest:?}"
        );
    }

    #[test]
    fn over_a_relay_better_paths_are_looked_for_at_once_and_with_growing_pauses() {
        let mut life = Life::new();
        life.search(Want::Link);
        life.after(50);
        let link = life.link(relayed(), true, 9);
        life.comes_to(circuit(), link, false);
        assert_eq!(life.under_way(), [dial(), punch()]);
        let done = life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(life.state.is_usable());
        assert!(done.contains(&Action::Path(relayed())), "it says what has failed");
        let mut pauses = Vec::new();
        for _ in 0..3 {
            assert_eq!(life.wants(owed()), None);
            let next = life.state.next_timeout(life.now()).unwrap();
            pauses.push((next - life.now()).as_secs());
            life.after((next - life.now()).as_millis() as u64);
            assert_eq!(life.wants(owed()), Some(Want::Better));
            life.search(Want::Better);
            assert_eq!(life.under_way(), [dial(), punch()], "no circuit beside the one that there is");
            life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        }
        assert_eq!(pauses, [1, 2, 4]);
        let next = life.state.next_timeout(life.now()).unwrap();
        life.state.network_changed(life.now(), 1.0);
        assert!(life.state.next_timeout(life.now()).unwrap() < next);
    }

    #[test]
    fn better_candidates_that_are_learned_are_tried_at_once_over_a_relay_and_not_over_a_direct_link() {
        let (mut life, _) = Life::linked_by(relayed());
        let better = Demand { better: true, learned: true, ..Demand::default() };
        assert_eq!(life.wants(better), Some(Want::Better));
        let (direct, _) = Life::linked_by(Path::Direct);
        assert_eq!(direct.wants(better), None);
        life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        life.tries.candidates.endpoints.push(at("new:1"));
        life.search(Want::Better);
        let link = life.link(Path::Direct, true, 9);
        let done = life.comes_to(Attempt::Dial(at("new:1")), link, false);
        assert!(done.contains(&Action::Replace) && done.contains(&Action::Use(link.id)));
        assert!(done.contains(&Action::Failures(Failures::default())), "what failed before says nothing now");
        assert_eq!(life.state.next_timeout(life.now()), None);
    }

    #[test]
    fn nats_that_are_hopeless_are_not_tried_soon_where_no_address_is_known() {
        let mut life = Life::new();
        life.tries.candidates.endpoints.clear();
        life.search(Want::Link);
        let link = life.link(relayed(), true, 9);
        life.comes_to(circuit(), link, false);
        life.fails(punch(), Ended::NotPunched(PunchFailure::BothHard.into()));
        let pause = life.state.next_timeout(life.now()).unwrap() - life.now();
        assert!(pause > Duration::from_secs(60), "{pause:?}");
    }

    #[test]
    fn an_invalidated_link_is_left_once_everything_is_acknowledged_or_its_time_is_over() {
        for acknowledged in [true, false] {
            let (mut life, _) = Life::linked_by(Path::Direct);
            life.state.invalidate(PATIENCE, life.now());
            life.after(499);
            assert_eq!(life.done(), [Action::Hide]);
            assert!(life.state.is_leaving() && !life.state.is_usable());
            assert_eq!(life.wants(call()), None);
            assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + Duration::from_millis(1)));
            if acknowledged {
                life.state.poll(false, life.now(), 1.0);
                life.take();
            } else {
                life.after(1);
            }
            assert_eq!(life.done(), [Action::Replace]);
            assert_eq!(life.wants(call()), Some(Want::Link));
        }
    }

    #[test]
    fn an_invalidated_link_that_is_silent_goes_at_once() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.suspect();
        life.state.invalidate(PATIENCE, life.now());
        life.take();
        assert_eq!(life.done(), [Action::Hide, Action::Retire]);
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.state.invalidate(PATIENCE, life.now());
        life.suspect();
        assert_eq!(life.done(), [Action::Hide, Action::Retire]);
        assert_eq!(life.wants(owed()), Some(Want::Link));
    }

    #[test]
    fn messages_for_another_key_get_a_race_of_their_own_beside_the_link() {
        let (mut life, link) = Life::linked_by(relayed());
        let parked = Demand { parked: true, ..Demand::default() };
        assert_eq!(life.wants(parked), Some(Want::OtherKey), "also instead of looking for a better path");
        life.search(Want::OtherKey);
        assert!(life.state.is_racing_for_key() && life.state.is_usable());
        life.after(50);
        assert_eq!(life.under_way(), [dial(), punch(), circuit()]);
        assert_eq!(life.wants(Demand { learned: true, ..parked }), Some(Want::MoreWays));
        // A worse path than the link's: only here is the key that they name.
        let other = life.link(relayed(), false, 3);
        let done = life.comes_to(circuit(), other, true);
        assert!(done.contains(&Action::Replace) && done.contains(&Action::Use(other.id)), "{done:?}");
        assert_ne!(life.state.link(), Some(&link));
    }

    #[test]
    fn parked_messages_fail_with_their_race_and_the_link_goes_on() {
        let (mut life, link) = Life::linked_by(Path::Direct);
        let begun = life.now();
        life.search(Want::OtherKey);
        life.after(50);
        let done = life.loses(ConnectError::Untrusted, CircuitError::NotRegistered);
        assert!(done.contains(&Action::FailParked { begun }));
        assert!(!done.iter().any(|action| matches!(action, Action::Failures(_))), "they say nothing about the link");
        assert_eq!(life.state.link(), Some(&link));
        let parked = Demand { parked: true, ..Demand::default() };
        assert_eq!(life.wants(parked), None);
        assert_eq!(life.wants(Demand { parked_waited_for: true, ..parked }), Some(Want::OtherKey));
        life.after(100);
        assert_eq!(life.wants(parked), Some(Want::OtherKey));
    }

    #[test]
    fn a_legacy_relay_gets_the_messages_for_a_minute_or_until_a_path_is_found() {
        for found in [true, false] {
            let mut life = Life::new();
            life.tries.candidates.endpoints.clear();
            life.search(Want::Link);
            let done = life.fails(circuit(), Ended::NoCircuit(CircuitError::NotARelay));
            assert_eq!(done, [Action::PassOn(at("relay:1"))]);
            assert_eq!(life.wants(call()), None);
            assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + PASSED_ON_FOR));
            if found {
                life.state.stop_passing_on();
                life.take();
            } else {
                life.after(59_999);
                assert_eq!(life.done(), []);
                life.after(1);
            }
            assert_eq!(life.done(), [Action::StopPassingOn]);
            assert_eq!(life.wants(call()), Some(Want::Link));
        }
    }

    #[test]
    fn a_legacy_relay_that_takes_no_more_is_given_up() {
        let mut life = Life::new();
        life.tries.candidates.endpoints.clear();
        life.search(Want::Link);
        life.fails(circuit(), Ended::NoCircuit(CircuitError::NotARelay));
        life.state.stop_passing_on();
        assert_eq!(life.state.next_action(), Some(Action::StopPassingOn));
        assert_eq!(life.wants(call()), Some(Want::Link));
    }

    /// It could read them, so that the race for the key goes on until its lookup ends.
    #[test]
    fn a_legacy_relay_ends_no_race_for_a_key() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        life.tries.candidates.endpoints.clear();
        life.tries.resolving = Some(life.now() + TIMEOUT);
        life.search(Want::OtherKey);
        life.fails(circuit(), Ended::NoCircuit(CircuitError::NotARelay));
        life.after(1000);
        assert!(life.state.is_racing_for_key());
        life.after(4000);
        assert!(!life.state.is_racing_for_key());
    }

    #[test]
    fn an_attempt_that_was_interrupted_is_repeated_soon_though_an_address_is_known() {
        let (mut life, _) = Life::linked_by(relayed());
        for _ in 0..4 {
            life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
            life.after(8000);
            life.search(Want::Better);
        }
        life.fails(dial(), Ended::NotDialled(ConnectError::TimedOut));
        life.fails(punch(), Ended::NotPunched(PunchFailure::Interrupted.into()));
        assert_eq!(life.state.next_timeout(life.now()), Some(life.now() + Duration::from_secs(1)));
    }

    #[test]
    fn a_link_that_carries_no_session_has_died_before_its_path_is_told() {
        let mut life = Life::new();
        life.search(Want::Link);
        let link = life.link(Path::Direct, true, 9);
        let (id, _) = life.attempts[0].clone();
        life.state.linked(id, Offer { link, sought: false }, life.now());
        assert_eq!(life.state.next_action(), Some(Action::StopRace));
        assert_eq!(life.state.next_action(), Some(Action::Use(link.id)));
        life.state.link_died(life.now(), 1.0);
        assert_eq!(life.state.next_action(), Some(Action::Retire));
        assert_eq!(life.state.next_action(), None);
    }

    #[test]
    fn a_link_that_comes_too_late_is_closed() {
        let (mut life, _) = Life::linked_by(relayed());
        let (id, _) = life.attempts[0].clone();
        life.state.link_died(life.now(), 1.0);
        life.after(100).done();
        life.tries.own_relays.clear();
        life.search(Want::Link);
        life.done();
        let late = life.link(Path::Direct, true, 9);
        life.state.linked(id, Offer { link: late, sought: false }, life.now());
        life.take();
        assert_eq!(life.done(), [Action::Close(late.id)]);
    }

    #[test]
    fn a_call_without_a_link_is_told_what_is_known() {
        assert_eq!(Life::to(false).state.why_not_reached(true), ConnectError::TimedOut.into());
        let mut life = Life::new();
        life.search(Want::Link);
        life.after(50);
        life.loses(ConnectError::Refused, CircuitError::NotRegistered);
        assert!(!life.state.meets_another_key());
        let mut life = Life::new();
        assert_eq!(life.state.why_not_reached(false), RouteError::NoRelay.into());
        assert_eq!(life.state.why_not_reached(true), RouteError::Relay(ConnectError::TimedOut).into());
        life.search(Want::Link);
        life.after(50);
        let untrusted: SendError = RouteError::Node(ConnectError::Untrusted).into();
        life.fails(dial(), Ended::NotDialled(ConnectError::Untrusted));
        assert!(life.state.meets_another_key());
        assert_eq!(life.state.why_not_reached(true), untrusted);
        life.loses(ConnectError::TimedOut, CircuitError::NotRegistered);
        assert!(life.state.meets_another_key(), "also after the race");
        life.search(Want::Link);
        let link = life.link(Path::Direct, true, 9);
        life.comes_to(dial(), link, false);
        assert!(!life.state.meets_another_key());
    }

    #[test]
    fn how_a_node_is_reached_is_told_when_it_changes() {
        let (mut life, link) = Life::linked_by(Path::Direct);
        let again = life.link(Path::Direct, false, 1);
        life.state.began(&[Offer { link: again, sought: false }], life.now());
        life.after(0);
        let done = life.comes_to(Attempt::Adopt(again.id), again, false);
        assert!(!done.iter().any(|action| matches!(action, Action::Path(_))), "{link:?} {done:?}");
        let mut address = Life::to(false);
        address.search(Want::Link);
        let link = address.link(Path::Direct, true, 9);
        let done = address.comes_to(dial(), link, false);
        assert!(!done.iter().any(|action| matches!(action, Action::Path(_))), "it has but one");
    }

    #[test]
    fn a_stopping_engine_waits_for_a_peer_until_it_is_quiet_and_at_most_a_second() {
        let (mut life, _) = Life::linked_by(Path::Direct);
        let start = life.now();
        assert!(life.state.is_drained(true, start));
        assert!(!life.state.is_drained(false, start));
        assert_eq!(life.state.next_timeout(start), Some(start + DRAIN_TIMEOUT));
        assert!(!life.state.is_drained(false, start + DRAIN_TIMEOUT - Duration::from_millis(1)));
        assert!(life.state.is_drained(false, start + DRAIN_TIMEOUT));
    }
}
