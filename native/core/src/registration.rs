//! A node's side of its registration at one relay: when to dial, when to register again, and what callers that want a
//! circuit are told meanwhile. Registered for as long as the node has a standing name there, or while circuits are wanted.
//!
//! Every input may add actions, which [`Registrant::poll`] hands out in order. At most one dial is under way, and at most
//! one registration exists.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::errors::CircuitError;
use crate::liveness::{Liveness, Seen};
use crate::proto::control::{Id, Limit, Refusal};
use crate::retry::{Backoff, Registering};
use crate::unanswered::{Counted, SILENCE, Unanswered};

/// How long an endpoint that is no relay is taken for none. A gateway need not be asked again for each node.
pub const NOT_A_RELAY_FOR: Duration = Duration::from_secs(60);

/// Between dials while the relay is silent.
const FIRST_PAUSE_SILENT: Duration = Duration::from_millis(100);

/// The longest pause while a caller waits, the same as for peers.
const LONGEST_PAUSE_WANTED: Duration = Duration::from_secs(1);

/// How often to look at a relay that owes something: a fifth of what counts as silence. And how often at one that owes
/// nothing, for the sake of its keep-alives.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
pub const LOOK_QUIET_EVERY: Duration = Duration::from_secs(2);

/// What becomes of a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayEvent {
    /// The node is registered, and the relay sees it at this address.
    Registered { address: SocketAddr },
    /// It is still registered, and seen at this address from now on.
    Moved { address: SocketAddr },
    /// It is no longer registered. It tries again if it is wanted.
    Lost,
    /// It is no longer registered, because this node wants no registration or one under another name.
    Ended,
    /// The relay refuses the node, or does so now. Reported once until the state changes.
    Refused(Refusal),
    /// Another node has this node's key, and both register. Reported once as long as that goes on.
    Disputed,
    /// The relay dropped packets of a circuit.
    Dropped { circuit: u32, limit: Limit },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationState {
    /// Not wanted.
    Unused,
    /// Wanted, and no attempt has ended yet.
    Connecting,
    Registered {
        /// What the relay sees the node at.
        address: SocketAddr,
    },
    /// Tried again at long intervals.
    Refused(Refusal),
    /// Tried again.
    Down(CircuitError),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Dial the relay, and hand the result to `dialled`.
    Dial,
    /// Give up the dial that is under way.
    StopDial,
    /// Register under this name over the connection that was just dialled, and hand the result to `answered`.
    Register(Id),
    /// End the registration and its connection.
    Leave,
    /// The same, and tell the other nodes of its circuits first.
    LeaveGently,
    /// Callers may use the registration.
    Use,
    /// Callers wait.
    Hold,
    /// The last attempt failed: callers that wait for it are told why.
    Fail(CircuitError),
    Report(RelayEvent),
    /// The node uses this relay no longer. Nothing follows.
    End,
}

/// What the node wants of the relay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wants {
    /// The name to keep registered.
    pub standing: Option<Id>,
    /// Callers that wait for a circuit.
    pub waiting: usize,
    /// Circuits that exist, opened by either side.
    pub circuits: usize,
}

impl Wants {
    fn registration(&self) -> bool {
        self.standing.is_some() || self.waiting > 0
    }
}

#[derive(Debug)]
enum Mode {
    /// No registration is wanted, since then.
    Unused(Instant),
    Dialling,
    /// The relay was asked to register the node under this name.
    Asking(Id),
    Registered(Standing),
    Pausing(Pause),
    Ended,
}

#[derive(Debug)]
struct Standing {
    name: Id,
    since: Instant,
    unused_since: Option<Instant>,
    suspect: Option<Suspect>,
}

/// The relay is silent, so another connection is dialled beside the old one.
#[derive(Debug)]
struct Suspect {
    /// Datagrams received over the old connection when it became suspect.
    heard: u64,
    backoff: Backoff,
    /// `None` while a dial is under way, or came too late.
    dial_at: Option<Instant>,
}

#[derive(Debug)]
struct Pause {
    begun: Instant,
    until: Instant,
    /// Whether it is shorter while a caller waits. It is not where the relay's answer will not change soon.
    hurries: bool,
}

/// This node at one relay.
#[derive(Debug)]
pub struct Registrant {
    /// The name to register as without a standing one.
    name: Id,
    /// How long to keep a registration that is not used.
    idle: Duration,
    wants: Wants,
    mode: Mode,
    state: RegistrationState,
    since: Instant,
    registering: Registering,
    actions: VecDeque<Action>,
}

impl Registrant {
    pub fn new(name: Id, idle: Duration, now: Instant) -> Self {
        Self {
            name,
            idle,
            wants: Wants::default(),
            mode: Mode::Unused(now),
            state: RegistrationState::Unused,
            since: now,
            registering: Registering::default(),
            actions: VecDeque::new(),
        }
    }

    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The state, and since when it is this.
    pub fn state(&self) -> (&RegistrationState, Instant) {
        (&self.state, self.since)
    }

    /// When to call [`Registrant::timeout`] at the latest.
    pub fn next_timeout(&self) -> Option<Instant> {
        match &self.mode {
            Mode::Unused(since) => Some(*since + self.idle),
            Mode::Pausing(pause) => Some(pause.until),
            Mode::Registered(standing) => {
                let unused = standing.unused_since.map(|since| since + self.idle);
                let dial = standing.suspect.as_ref().and_then(|suspect| suspect.dial_at);
                unused.into_iter().chain(dial).min()
            }
            Mode::Dialling | Mode::Asking(_) | Mode::Ended => None,
        }
    }

    pub fn timeout(&mut self, now: Instant) {
        if self.next_timeout().is_none_or(|at| now < at) {
            return;
        }
        match &mut self.mode {
            Mode::Unused(_) => self.end(),
            Mode::Pausing(_) => self.begin(now),
            Mode::Registered(standing) => {
                if standing.unused_since.is_some_and(|since| now >= since + self.idle) {
                    return self.leave_for_good();
                }
                if let Some(suspect) = &mut standing.suspect {
                    suspect.dial_at = None;
                    self.actions.push_back(Action::Dial);
                }
            }
            Mode::Dialling | Mode::Asking(_) | Mode::Ended => {}
        }
    }

    pub fn want(&mut self, wants: Wants, now: Instant) {
        if self.wants == wants {
            return;
        }
        self.wants = wants;
        match &mut self.mode {
            Mode::Unused(_) if self.wants.registration() => self.begin(now),
            Mode::Pausing(pause) if pause.hurries && self.wants.waiting > 0 => {
                pause.until = pause.until.min(now.max(pause.begun + LONGEST_PAUSE_WANTED));
            }
            Mode::Registered(standing) => {
                if self.wants.standing.as_ref().is_some_and(|name| *name != standing.name) {
                    return self.rename(now);
                }
                let used = self.wants.registration() || self.wants.circuits > 0;
                standing.unused_since = if used { None } else { standing.unused_since.or(Some(now)) };
            }
            _ => {}
        }
    }

    /// The node ends, or wants nothing of this relay.
    pub fn stop(&mut self) {
        match self.mode {
            Mode::Registered(_) => self.leave_for_good(),
            Mode::Ended => {}
            _ => self.end(),
        }
    }

    /// The dial has ended. `heard`: datagrams received over the registration's connection, if there is one.
    pub fn dialled(&mut self, result: Result<(), CircuitError>, heard: u64, draw: f64, now: Instant) {
        match (&mut self.mode, result) {
            (Mode::Dialling, Ok(())) => self.ask(),
            (Mode::Dialling, Err(error)) => self.failed(error, draw, now),
            (Mode::Registered(Standing { suspect: Some(suspect), .. }), result) => match result {
                // The next look clears the old connection, which stays.
                _ if heard != suspect.heard => {}
                Ok(()) => self.replace(now),
                Err(error) => {
                    suspect.dial_at = Some(now + suspect.backoff.pause(draw));
                    // Callers that begin to wait now wait for the next attempt.
                    self.actions.push_back(Action::Fail(error));
                }
            },
            _ => {}
        }
    }

    /// What the relay says to the request to register: what it sees the node at.
    pub fn answered(&mut self, result: Result<SocketAddr, CircuitError>, draw: f64, now: Instant) {
        let Mode::Asking(name) = &self.mode else { return };
        let (name, address) = match result {
            Ok(address) => (name.clone(), address),
            Err(error) => return self.failed(error, draw, now),
        };
        let used = self.wants.registration() || self.wants.circuits > 0;
        let unused_since = (!used).then_some(now);
        self.mode = Mode::Registered(Standing { name, since: now, unused_since, suspect: None });
        self.set_state(RegistrationState::Registered { address }, now);
        self.actions.extend([Action::Report(RelayEvent::Registered { address }), Action::Use]);
        self.rename_if_wanted(now);
    }

    /// The relay sees the node at another address.
    pub fn moved(&mut self, address: SocketAddr, now: Instant) {
        if matches!(self.mode, Mode::Registered(_)) && self.set_state(RegistrationState::Registered { address }, now) {
            self.actions.push_back(Action::Report(RelayEvent::Moved { address }));
        }
    }

    /// The registration's connection has become suspect.
    pub fn suspected(&mut self, heard: u64) {
        if let Mode::Registered(Standing { suspect: suspect @ None, .. }) = &mut self.mode {
            let backoff = Backoff::new(FIRST_PAUSE_SILENT, LONGEST_PAUSE_WANTED);
            *suspect = Some(Suspect { heard, backoff, dial_at: None });
            self.actions.extend([Action::Hold, Action::Dial]);
        }
    }

    /// The relay was heard again.
    pub fn cleared(&mut self) {
        if let Mode::Registered(standing) = &mut self.mode
            && standing.suspect.take().is_some()
        {
            self.actions.extend([Action::StopDial, Action::Use]);
        }
    }

    /// The registration has ended.
    pub fn lost(&mut self, error: CircuitError, draw: f64, now: Instant) {
        let Mode::Registered(standing) = &self.mode else { return };
        self.registering.lasted(now.saturating_duration_since(standing.since));
        self.actions.extend([Action::StopDial, Action::Hold, Action::Leave]);
        // A refusal is reported as such.
        if !matches!(error, CircuitError::Refused(_)) {
            self.actions.push_back(Action::Report(RelayEvent::Lost));
        }
        self.failed(error, draw, now);
    }

    /// Dials, if a registration is still wanted.
    fn begin(&mut self, now: Instant) {
        if !self.wants.registration() {
            self.mode = Mode::Unused(now);
            return;
        }
        // What is known to be wrong stays so until it is known to be right.
        if self.state == RegistrationState::Unused {
            self.set_state(RegistrationState::Connecting, now);
        }
        self.mode = Mode::Dialling;
        self.actions.push_back(Action::Dial);
    }

    fn ask(&mut self) {
        let name = self.wants.standing.as_ref().unwrap_or(&self.name).clone();
        self.actions.push_back(Action::Register(name.clone()));
        self.mode = Mode::Asking(name);
    }

    /// The relay was silent and answered another connection.
    fn replace(&mut self, now: Instant) {
        self.leave(Action::Leave, RelayEvent::Lost, now);
        self.set_state(RegistrationState::Connecting, now);
        self.ask();
    }

    fn rename_if_wanted(&mut self, now: Instant) {
        if let (Mode::Registered(standing), Some(name)) = (&self.mode, &self.wants.standing)
            && standing.name != *name
        {
            self.rename(now);
        }
    }

    fn rename(&mut self, now: Instant) {
        self.leave(Action::Leave, RelayEvent::Ended, now);
        self.set_state(RegistrationState::Connecting, now);
        self.begin(now);
    }

    fn leave(&mut self, action: Action, report: RelayEvent, now: Instant) {
        if let Mode::Registered(standing) = &self.mode {
            self.registering.lasted(now.saturating_duration_since(standing.since));
        }
        self.actions.extend([Action::StopDial, Action::Hold, action, Action::Report(report)]);
    }

    fn leave_for_good(&mut self) {
        let ended = Action::Report(RelayEvent::Ended);
        self.actions.extend([Action::StopDial, Action::Hold, Action::LeaveGently, ended]);
        self.end();
    }

    fn end(&mut self) {
        self.mode = Mode::Ended;
        self.actions.push_back(Action::End);
    }

    fn failed(&mut self, error: CircuitError, draw: f64, now: Instant) {
        let state = match &error {
            CircuitError::Refused(refusal) => RegistrationState::Refused(*refusal),
            other => RegistrationState::Down(other.clone()),
        };
        if let (true, CircuitError::Refused(refusal)) = (self.set_state(state, now), &error) {
            self.actions.push_back(Action::Report(RelayEvent::Refused(*refusal)));
        }
        let (pause, hurries) = match error {
            CircuitError::Refused(Refusal::TakenOver) => {
                let (pause, disputed) = self.registering.pause_taken_over(draw);
                if disputed {
                    self.actions.push_back(Action::Report(RelayEvent::Disputed));
                }
                (pause, false)
            }
            CircuitError::Refused(Refusal::Kicked) => (Registering::pause_kicked(draw), false),
            CircuitError::Refused(_) => (Registering::pause_refused(draw), false),
            _ if self.wants.waiting > 0 => (self.registering.pause(draw).min(LONGEST_PAUSE_WANTED), true),
            _ => (self.registering.pause(draw), true),
        };
        self.actions.push_back(Action::Fail(error));
        self.mode = Mode::Pausing(Pause { begun: now, until: now + pause, hurries });
    }

    /// Whether that is news.
    fn set_state(&mut self, new: RegistrationState, now: Instant) -> bool {
        let news = self.state != new;
        if news {
            (self.state, self.since) = (new, now);
        }
        news
    }
}

/// Watches a relay's connection for silence, by looking at its counters from time to time.
#[derive(Debug)]
pub struct Watch {
    unanswered: Unanswered,
    suspect: bool,
    look_at: Instant,
}

/// What to do after a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Nothing is under way, so what may have been lost can be said again.
    pub quiet: bool,
    /// Send padding: a NAT may have given this node another address, to which the relay answers no more than three times
    /// what came from it (RFC 9000, 8.1).
    pub pad: bool,
    /// Whether the relay is suspect.
    pub suspect: bool,
}

impl Watch {
    pub fn new(counted: Counted, now: Instant) -> Self {
        Self { unanswered: Unanswered::new(counted), suspect: false, look_at: now + LOOK_QUIET_EVERY }
    }

    pub fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Something was sent, which the relay should answer.
    pub fn asked(&mut self, now: Instant) {
        self.look_at = self.look_at.min(now + LOOK_EVERY);
    }

    /// `liveness` is the relay's, over all its connections.
    pub fn look(&mut self, liveness: &mut Liveness, counted: Counted, round_trip: Duration, now: Instant) -> Look {
        let soon = self.unanswered.look(counted, now);
        self.look_at = now + if soon { LOOK_EVERY } else { LOOK_QUIET_EVERY };
        let patience = SILENCE.max(round_trip * 2).max(liveness.expected_silence(now));
        match liveness.look(counted.heard, self.unanswered.since(), patience, now) {
            Seen::Heard => self.suspect = false,
            Seen::Silent(silence) if !self.suspect => {
                liveness.suspect(counted.heard, silence, now);
                self.suspect = true;
            }
            Seen::Silent(_) | Seen::Nothing => {}
        }
        Look { quiet: !soon, pad: self.unanswered.is_late(now, round_trip), suspect: self.suspect }
    }
}

#[cfg(test)]
mod tests;
