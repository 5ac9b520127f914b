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
use crate::proto::control::Refusal;
use crate::punch::Failure;
use crate::race::{self, AttemptId, Ended, Outcome, Race, Tries};
use crate::retry::Backoff;
use crate::types::{Dialect, Endpoint, Fingerprint, Link, LinkId, Path, Ways};
use crate::upgrade::{Rank, Upgrade};

/// Pauses between races for messages that are owed while no call waits.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A peer that closes a link sooner than this, perhaps because of what it is sent, is not dialled again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// How long callers wait, within their deadlines, for a node that had a link and cannot be found. A relay that was
/// restarted is back within some seconds, and its nodes with it.
const AWAY: Duration = Duration::from_secs(30);

/// How long a legacy relay gets the messages for a node before other ways are tried again.
const PASSED_ON_FOR: Duration = Duration::from_secs(60);

/// How long a peer that is stopped may send what is on its way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

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
    /// Give everything that waits to this relay, until [`Action::StopPassingOn`].
    PassOn(Endpoint),
    StopPassingOn,
    /// No link was to be had. Calls from before `begun` fail with that, and later ones unless `later_stay` or they came with
    /// other ways.
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
    /// The peer is reached in another way than before.
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
    /// Ways are known that no race has tried.
    pub learned: bool,
    /// Some of them may be better than a relay.
    pub better: bool,
    /// Something that went over the link is not acknowledged.
    pub unacknowledged: bool,
}

/// What to look for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Any link, or another one than the suspect.
    Link,
    /// A link to the holder of another key, beside the present one.
    OtherKey,
    /// A better path than a relay.
    Better,
    /// The race under way tries ways that were learned since.
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
    pub fn is_racing_for_key(&self) -> bool {
        matches!(self.mode, Mode::Linked { search: Search::OtherKey(_), .. })
    }

    /// How long the peer may be silent because it was recently.
    pub fn expected_silence(&mut self, now: Instant) -> Duration {
        self.liveness.expected_silence(now)
    }

    /// Time has passed, or demand changed. `draw` is uniform in 0..1, here and below.
    pub fn poll(&mut self, demand: &Demand, now: Instant, draw: f64) {
        match &mut self.mode {
            Mode::Leaving { until, .. } if !demand.unacknowledged || *until <= now => {
                self.redial_at = None;
                self.unlink(Action::Replace, now);
            }
            Mode::PassedOn { until, .. } if *until <= now => self.stop_passing_on(),
            _ => {}
        }
        self.poll_race(now, draw);
    }

    /// What to look for now: [`LinkState::search`] is to be called with it.
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
                // A race for a better link tries direct ways only.
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

    /// The link is to be given up. `patience`: how long what went over it may still be acknowledged.
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

    /// A lookup has found ways that were unknown: a legacy relay is not needed if they lead to the peer.
    pub fn ways_found(&mut self) {
        self.stop_passing_on();
    }

    /// The legacy relay takes no more.
    pub fn not_passed_on(&mut self) {
        self.stop_passing_on();
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
        let ways = Ways { relays: vec![], last_resorts: vec![], ..tries.ways.clone() };
        race.add(&Tries { ways, bound: tries.bound, ..Tries::default() }, now);
        race.keep_direct();
        if let (true, Some(relay)) = (begins, relay) {
            race.punch(relay);
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
                race.adopt(offer.link.id);
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
        // Direct ways are tried on while a relay carries the messages.
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

    fn stop_passing_on(&mut self) {
        if let Mode::PassedOn { linked_until, .. } = self.mode {
            self.mode = Mode::Unlinked { race: None, linked_until };
            self.actions.push_back(Action::StopPassingOn);
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
        self.actions.push_back(Action::Show);
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
        self.take_race();
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
        let counts = |failure: &Failure| *failure == Failure::Interrupted || !dialled;
        let failure = punch.filter(counts).unwrap_or(Failure::TimedOut);
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
