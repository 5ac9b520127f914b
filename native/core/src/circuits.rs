//! A node's side of what goes on over one registration: circuits and direct paths that the node asks its relay for, and
//! those that other nodes begin.
//!
//! Every input may add actions, which [`Circuits::poll`] hands out in order. Requests are known by their session's id,
//! circuits by their number, and connections over circuits by an id of the caller's.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use crate::errors::CircuitError;
use crate::proto::control::{Coordinate, FromNode, FromRelay, Id, Limit, PunchFailure, Reason, Refusal};
use crate::proto::signal::Role;
use crate::relay::Notices;

/// Attempts at a direct path that this node makes at once with the help of one relay, and the same number that other nodes
/// begin. A relay of ours allows as many. With more, the node spends more packets on behalf of a relay.
pub const MAX_PUNCHES: usize = 16;

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the relay.
    Say(FromNode),
    /// Tell the relay, unless it has not read what it was told before.
    SayIfRead(FromNode),
    /// The relay sees this node at another address.
    Moved(SocketAddr),
    /// The circuit that was asked for exists. A caller that no longer waits gives it up with [`Circuits::abandoned`].
    Opened {
        session_id: Id,
        circuit: u32,
    },
    NotOpened {
        session_id: Id,
        error: CircuitError,
    },
    /// The circuit has ended, and with it the connection over it or the attempt to make one.
    Ended {
        circuit: u32,
        reason: Reason,
    },
    /// The relay dropped packets of the circuit.
    Dropped {
        circuit: u32,
        limit: Limit,
    },
    /// Look for a direct path. An initiator asked for it, under the same session's id.
    Punch(Box<Coordinate>),
    NotPunched {
        session_id: Id,
        error: CircuitError,
    },
    /// The other node of a punch tells ports.
    Ports {
        session_id: Id,
        ports: Vec<u16>,
    },
    /// The other node's attempt is over.
    PunchOver {
        session_id: Id,
        result: Result<(), PunchFailure>,
    },
}

#[derive(Debug)]
pub struct Circuits {
    /// What the relay sees the node at.
    seen_at: SocketAddr,
    asked: HashMap<Id, Asked>,
    /// At most `MAX_PUNCHES` of each role.
    punches: HashMap<Id, Role>,
    circuits: HashMap<u32, Circuit>,
    actions: VecDeque<Action>,
}

/// A request that the relay has not answered.
#[derive(Debug)]
struct Asked {
    what: Wanted,
    until: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Circuit,
    Punch,
}

#[derive(Debug)]
struct Circuit {
    /// This node asked for it.
    ours: bool,
    /// `None`: the connection over it is being made.
    connection: Option<usize>,
    notices: Notices,
}

impl Circuits {
    pub fn new(seen_at: SocketAddr) -> Self {
        Self {
            seen_at,
            asked: HashMap::new(),
            punches: HashMap::new(),
            circuits: HashMap::new(),
            actions: VecDeque::new(),
        }
    }

    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// How many circuits there are.
    pub fn count(&self) -> usize {
        self.circuits.len()
    }

    /// Whether a connection over this circuit may begin: each carries one.
    pub fn is_free(&self, circuit: u32) -> bool {
        !self.circuits.contains_key(&circuit)
    }

    /// When the first request is overdue. A relay that acknowledges packets and answers no request is of no use, so the
    /// registration ends then.
    pub fn overdue(&self) -> Option<Instant> {
        self.asked.values().map(|asked| asked.until).min()
    }

    /// Asks for a circuit to a node. The relay must answer in time. The caller bounds how many requests there are.
    pub fn request(&mut self, session_id: Id, target_id: Id, until: Instant) {
        self.asked.insert(session_id.clone(), Asked { what: Wanted::Circuit, until });
        self.actions.push_back(Action::Say(FromNode::RelayRequest { session_id, target_id }));
    }

    /// Asks for a direct path to a node, as `request` does for a circuit.
    pub fn request_punch(&mut self, session_id: Id, target_id: Id, until: Instant) {
        self.asked.insert(session_id.clone(), Asked { what: Wanted::Punch, until });
        self.actions.push_back(Action::Say(FromNode::PunchRequest { session_id, target_id }));
    }

    /// The relay says something. An error ends the registration.
    pub fn told(&mut self, message: FromRelay, now: Instant) -> Result<(), CircuitError> {
        match message {
            FromRelay::Registered { address, .. } => self.moved(address),
            FromRelay::Refused { error } => return Err(CircuitError::Refused(error)),
            FromRelay::Opened { session_id, circuit } => return self.opened(session_id, circuit),
            FromRelay::NotOpened { session_id, error } => {
                if self.answered(&session_id, Wanted::Circuit) {
                    self.actions.push_back(Action::NotOpened { session_id, error: refused(error) });
                }
            }
            FromRelay::Disconnect { circuit, reason } => {
                if self.circuits.remove(&circuit).is_some() {
                    self.actions.push_back(Action::Ended { circuit, reason });
                }
            }
            FromRelay::Dropped { circuit, limit } => {
                // No more often than a relay of ours says it.
                if self.circuits.get_mut(&circuit).is_some_and(|known| known.notices.due(limit, now)) {
                    self.actions.push_back(Action::Dropped { circuit, limit });
                }
            }
            FromRelay::PunchCoordinate(coordinate) => self.coordinated(coordinate),
            FromRelay::PunchExecute { session_id, ports } => {
                if self.punches.contains_key(&session_id) {
                    self.actions.push_back(Action::Ports { session_id, ports });
                }
            }
            FromRelay::PunchResult { session_id, result } => {
                if self.punches.remove(&session_id).is_some() {
                    self.actions.push_back(Action::PunchOver { session_id, result });
                }
            }
            FromRelay::NotPunched { session_id, error } => {
                if self.answered(&session_id, Wanted::Punch) {
                    self.actions.push_back(Action::NotPunched { session_id, error: refused(error) });
                }
            }
        }
        Ok(())
    }

    /// A connection is being made over a circuit that another node opened. False if the circuit carries one already.
    pub fn accepting(&mut self, circuit: u32) -> bool {
        let free = self.is_free(circuit);
        if free {
            self.circuits.insert(circuit, Circuit::new(false));
        }
        free
    }

    /// A connection was made over the circuit. False if the circuit has ended meanwhile.
    pub fn carries(&mut self, circuit: u32, connection: usize) -> bool {
        let open = self.circuits.get_mut(&circuit);
        open.map(|open| open.connection = Some(connection)).is_some()
    }

    /// No connection was made over the circuit. Whether that ends the circuit: it may have ended before, and the number be
    /// another's.
    pub fn abandoned(&mut self, circuit: u32) -> bool {
        self.end(circuit, None)
    }

    /// The connection over the circuit has ended. The result is that of `abandoned`.
    pub fn inner_ended(&mut self, circuit: u32, connection: usize) -> bool {
        self.end(circuit, Some(connection))
    }

    /// This node's attempt at a direct path is over, and needs nothing more of the relay.
    pub fn punch_ended(&mut self, session_id: &Id) {
        self.punches.remove(session_id);
    }

    fn moved(&mut self, address: SocketAddr) {
        if self.seen_at != address {
            self.seen_at = address;
            self.actions.push_back(Action::Moved(address));
        }
    }

    fn opened(&mut self, session_id: Id, circuit: u32) -> Result<(), CircuitError> {
        // An answer to no request, or a number in use: the relay has lost its state.
        if !self.answered(&session_id, Wanted::Circuit) || !self.is_free(circuit) {
            return Err(CircuitError::NotARelay);
        }
        self.circuits.insert(circuit, Circuit::new(true));
        self.actions.push_back(Action::Opened { session_id, circuit });
        Ok(())
    }

    fn coordinated(&mut self, mut coordinate: Box<Coordinate>) {
        let asked = self.answered(&coordinate.session_id, Wanted::Punch);
        let session_id = coordinate.session_id.clone();
        if self.punches.contains_key(&session_id) {
            return;
        }
        let role = coordinate.role;
        if self.punches.values().filter(|other| **other == role).count() >= MAX_PUNCHES {
            if asked {
                let error = CircuitError::Refused(Refusal::RequestRate);
                self.actions.push_back(Action::NotPunched { session_id: session_id.clone(), error });
            }
            let result = Err(PunchFailure::Busy);
            return self.actions.push_back(Action::SayIfRead(FromNode::PunchResult { session_id, result }));
        }
        // No answer if it was not asked for: a relay that does not read must not make this node say more and more.
        if role == Role::Initiator && !asked {
            return;
        }
        // Seen from another address, a local one belongs to another network.
        if coordinate.address.ip() != self.seen_at.ip() {
            coordinate.candidates.clear();
        }
        self.punches.insert(session_id, role);
        self.actions.push_back(Action::Punch(coordinate));
    }

    /// Whether the relay was asked for this under that id. It was answered now.
    fn answered(&mut self, session_id: &Id, wanted: Wanted) -> bool {
        self.asked.get(session_id).is_some_and(|asked| asked.what == wanted) && self.asked.remove(session_id).is_some()
    }

    fn end(&mut self, circuit: u32, connection: Option<usize>) -> bool {
        let Some(known) = self.circuits.get(&circuit).filter(|known| known.connection == connection) else {
            return false;
        };
        // The node that accepted leaves this to the node that asked: both would say the same.
        if known.ours {
            self.actions.push_back(Action::Say(FromNode::Disconnect { circuit, reason: Reason::Closed }));
        }
        self.circuits.remove(&circuit).is_some()
    }
}

impl Circuit {
    fn new(ours: bool) -> Self {
        Self { ours, connection: None, notices: Notices::default() }
    }
}

fn refused(error: Refusal) -> CircuitError {
    match error {
        Refusal::NotRegistered => CircuitError::NotRegistered,
        other => CircuitError::Refused(other),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::nat::NatProfile;
    use crate::types::Fingerprint;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(name: &str) -> Id {
        Id::new(name.as_bytes().to_vec()).unwrap()
    }

    fn home() -> SocketAddr {
        "192.0.2.1:4000".parse().unwrap()
    }

    fn coordinate(session: &str, role: Role) -> FromRelay {
        FromRelay::PunchCoordinate(Box::new(Coordinate {
            session_id: id(session),
            role,
            peer_id: id("peer"),
            key: Fingerprint::from([7; 32]),
            address: SocketAddr::new(home().ip(), 5000),
            profile: NatProfile::default(),
            candidates: vec!["10.0.0.7:4000".parse().unwrap()],
            secret: [7; _],
            delay: SECOND,
        }))
    }

    fn disconnect(circuit: u32) -> FromRelay {
        FromRelay::Disconnect { circuit, reason: Reason::Gone }
    }

    /// A node at its relay.
    struct Run {
        circuits: Circuits,
        start: Instant,
    }

    impl Run {
        fn new() -> Self {
            Self { circuits: Circuits::new(home()), start: Instant::now() }
        }

        fn told(&mut self, message: FromRelay) -> Vec<Action> {
            self.circuits.told(message, self.start).unwrap();
            self.actions()
        }

        fn actions(&mut self) -> Vec<Action> {
            std::iter::from_fn(|| self.circuits.poll()).collect()
        }

        fn request(&mut self, session: &str) {
            self.circuits.request(id(session), id("target"), self.start + SECOND);
            let said = FromNode::RelayRequest { session_id: id(session), target_id: id("target") };
            assert_eq!(self.actions(), [Action::Say(said)]);
        }

        fn request_punch(&mut self, session: &str) {
            self.circuits.request_punch(id(session), id("target"), self.start + SECOND);
            let said = FromNode::PunchRequest { session_id: id(session), target_id: id("target") };
            assert_eq!(self.actions(), [Action::Say(said)]);
        }

        /// A circuit of this node's, or of another's.
        fn open(&mut self, circuit: u32, ours: bool) {
            if ours {
                self.request("open");
                self.told(FromRelay::Opened { session_id: id("open"), circuit });
            } else {
                assert!(self.circuits.accepting(circuit));
            }
        }
    }

    fn closed(circuit: u32) -> Action {
        Action::Say(FromNode::Disconnect { circuit, reason: Reason::Closed })
    }

    #[test]
    fn a_request_is_answered_once() {
        let mut run = Run::new();
        run.request("a");
        run.request("b");
        let opened = FromRelay::Opened { session_id: id("a"), circuit: 7 };
        assert_eq!(run.told(opened.clone()), [Action::Opened { session_id: id("a"), circuit: 7 }]);
        let refusal = |error| FromRelay::NotOpened { session_id: id("b"), error };
        let error = CircuitError::Refused(Refusal::Sessions);
        assert_eq!(run.told(refusal(Refusal::Sessions)), [Action::NotOpened { session_id: id("b"), error }]);
        assert_eq!(run.told(refusal(Refusal::Sessions)), []);
        assert_eq!(run.circuits.count(), 1);
        assert_eq!(run.circuits.told(opened, run.start), Err(CircuitError::NotARelay), "the relay has lost its state");
    }

    #[test]
    fn a_target_that_is_not_registered_has_an_error_of_its_own() {
        let mut run = Run::new();
        run.request("a");
        run.request_punch("b");
        let error = Refusal::NotRegistered;
        let told = run.told(FromRelay::NotOpened { session_id: id("a"), error });
        assert_eq!(told, [Action::NotOpened { session_id: id("a"), error: CircuitError::NotRegistered }]);
        let told = run.told(FromRelay::NotPunched { session_id: id("b"), error });
        assert_eq!(told, [Action::NotPunched { session_id: id("b"), error: CircuitError::NotRegistered }]);
    }

    #[test]
    fn an_answer_of_the_other_kind_answers_nothing() {
        let mut run = Run::new();
        run.request("a");
        run.request_punch("b");
        let error = Refusal::Sessions;
        assert_eq!(run.told(FromRelay::NotPunched { session_id: id("a"), error }), []);
        assert_eq!(run.told(FromRelay::NotOpened { session_id: id("b"), error }), []);
        assert_eq!(run.told(coordinate("a", Role::Initiator)), []);
        let opened = FromRelay::Opened { session_id: id("b"), circuit: 1 };
        assert_eq!(run.circuits.told(opened, run.start), Err(CircuitError::NotARelay));
    }

    #[test]
    fn a_relay_that_answers_no_request_is_given_up_at_the_first_deadline() {
        let mut run = Run::new();
        assert_eq!(run.circuits.overdue(), None);
        run.circuits.request(id("a"), id("target"), run.start + 3 * SECOND);
        run.circuits.request_punch(id("b"), id("target"), run.start + 2 * SECOND);
        run.actions();
        assert_eq!(run.circuits.overdue(), Some(run.start + 2 * SECOND));
        run.told(FromRelay::NotPunched { session_id: id("b"), error: Refusal::NotReady });
        assert_eq!(run.circuits.overdue(), Some(run.start + 3 * SECOND));
        run.told(FromRelay::Opened { session_id: id("a"), circuit: 1 });
        assert_eq!(run.circuits.overdue(), None);
    }

    #[test]
    fn a_number_in_use_is_not_given_to_another_circuit() {
        let mut run = Run::new();
        run.open(3, false);
        assert!(!run.circuits.accepting(3), "each carries one connection");
        assert!(!run.circuits.is_free(3) && run.circuits.is_free(4));
        run.request("a");
        let opened = FromRelay::Opened { session_id: id("a"), circuit: 3 };
        assert_eq!(run.circuits.told(opened, run.start), Err(CircuitError::NotARelay));
    }

    #[test]
    fn the_node_that_asked_for_a_circuit_ends_it() {
        for ours in [true, false] {
            for made in [true, false] {
                let mut run = Run::new();
                run.open(1, ours);
                let ended = if made {
                    assert!(run.circuits.carries(1, 50));
                    run.circuits.inner_ended(1, 50)
                } else {
                    run.circuits.abandoned(1)
                };
                assert!(ended && run.circuits.count() == 0);
                assert_eq!(run.actions(), if ours { vec![closed(1)] } else { vec![] }, "{ours} {made}");
            }
        }
    }

    #[test]
    fn the_end_of_an_earlier_circuit_does_not_end_the_one_that_has_its_number_now() {
        let mut run = Run::new();
        run.open(1, true);
        run.circuits.carries(1, 50);
        let ended = Action::Ended { circuit: 1, reason: Reason::Gone };
        assert_eq!(run.told(disconnect(1)), [ended]);
        assert_eq!(run.told(disconnect(1)), []);
        run.open(1, true);
        assert!(!run.circuits.inner_ended(1, 50));
        run.circuits.carries(1, 51);
        assert!(!run.circuits.inner_ended(1, 50) && !run.circuits.abandoned(1));
        assert_eq!((run.actions(), run.circuits.count()), (vec![], 1));
    }

    #[test]
    fn a_connection_over_a_circuit_that_has_ended_is_not_taken() {
        let mut run = Run::new();
        run.open(1, true);
        run.told(disconnect(1));
        assert!(!run.circuits.carries(1, 50));
        assert_eq!(run.circuits.count(), 0);
    }

    #[test]
    fn dropped_packets_are_reported_once_a_second_for_each_limit_and_circuit() {
        let mut run = Run::new();
        run.open(1, false);
        let dropped = |circuit, limit| FromRelay::Dropped { circuit, limit };
        let reported = |circuit, limit| [Action::Dropped { circuit, limit }];
        assert_eq!(run.told(dropped(1, Limit::Bandwidth)), reported(1, Limit::Bandwidth));
        assert_eq!(run.told(dropped(1, Limit::Bandwidth)), []);
        assert_eq!(run.told(dropped(1, Limit::PacketQueue)), reported(1, Limit::PacketQueue));
        assert_eq!(run.told(dropped(2, Limit::Bandwidth)), [], "no such circuit");
        run.start += 10 * SECOND;
        assert_eq!(run.told(dropped(1, Limit::Bandwidth)), reported(1, Limit::Bandwidth));
    }

    #[test]
    fn a_new_address_is_reported_once() {
        let mut run = Run::new();
        let registered = |address| FromRelay::Registered { address, probes: None };
        assert_eq!(run.told(registered(home())), []);
        let away = "198.51.100.1:4000".parse().unwrap();
        assert_eq!(run.told(registered(away)), [Action::Moved(away)]);
        assert_eq!(run.told(registered(away)), []);
    }

    #[test]
    fn local_addresses_count_only_in_the_same_network() {
        let mut run = Run::new();
        let candidates = |actions: &[Action]| match actions {
            [Action::Punch(coordinate)] => coordinate.candidates.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(candidates(&run.told(coordinate("a", Role::Responder))), 1);
        run.told(FromRelay::Registered { address: "198.51.100.1:4000".parse().unwrap(), probes: None });
        assert_eq!(candidates(&run.told(coordinate("b", Role::Responder))), 0);
    }

    #[test]
    fn an_initiator_that_asked_for_no_path_says_nothing() {
        let mut run = Run::new();
        assert_eq!(run.told(coordinate("a", Role::Initiator)), []);
        run.request_punch("a");
        assert!(matches!(run.told(coordinate("a", Role::Initiator))[..], [Action::Punch(_)]));
        assert_eq!(run.told(coordinate("a", Role::Responder)), [], "there is one already");
    }

    #[test]
    fn attempts_are_bounded_for_each_role() {
        let mut run = Run::new();
        for n in 0..MAX_PUNCHES {
            assert!(matches!(run.told(coordinate(&format!("r{n}"), Role::Responder))[..], [Action::Punch(_)]));
        }
        let busy = |session| {
            Action::SayIfRead(FromNode::PunchResult { session_id: id(session), result: Err(PunchFailure::Busy) })
        };
        assert_eq!(run.told(coordinate("more", Role::Responder)), [busy("more")]);
        run.request_punch("mine");
        assert!(matches!(run.told(coordinate("mine", Role::Initiator))[..], [Action::Punch(_)]));
        // One that is over makes room.
        run.circuits.punch_ended(&id("r0"));
        assert!(matches!(run.told(coordinate("more", Role::Responder))[..], [Action::Punch(_)]));
        assert_eq!(run.told(coordinate("even more", Role::Responder)), [busy("even more")]);
    }

    #[test]
    fn an_initiator_beyond_the_bound_is_answered() {
        let mut run = Run::new();
        for n in 0..MAX_PUNCHES {
            run.request_punch(&n.to_string());
            run.told(coordinate(&n.to_string(), Role::Initiator));
        }
        run.request_punch("more");
        let told = run.told(coordinate("more", Role::Initiator));
        assert!(matches!(&told[..], [Action::NotPunched { .. }, Action::SayIfRead(_)]), "{told:?}");
        assert_eq!(run.circuits.overdue(), None);
    }

    #[test]
    fn what_the_other_node_says_reaches_an_attempt_until_it_is_over() {
        let mut run = Run::new();
        let ports = || FromRelay::PunchExecute { session_id: id("a"), ports: vec![1, 2] };
        let over = |result| FromRelay::PunchResult { session_id: id("a"), result };
        assert_eq!((run.told(ports()), run.told(over(Ok(())))), (vec![], vec![]));
        run.told(coordinate("a", Role::Responder));
        assert_eq!(run.told(ports()), [Action::Ports { session_id: id("a"), ports: vec![1, 2] }]);
        let result = Err(PunchFailure::Busy);
        assert_eq!(run.told(over(result)), [Action::PunchOver { session_id: id("a"), result }]);
        assert_eq!((run.told(ports()), run.told(over(result))), (vec![], vec![]));
    }

    #[test]
    fn a_refusal_ends_the_registration() {
        let mut run = Run::new();
        let told = run.circuits.told(FromRelay::Refused { error: Refusal::Kicked }, run.start);
        assert_eq!(told, Err(CircuitError::Refused(Refusal::Kicked)));
    }
}
