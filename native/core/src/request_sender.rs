//! The requester's half of a request: what the peer knows it by, and whether it is asked again when its link is lost.

use crate::requests::RequestId;
use crate::types::Dialect;

/// One request, over whichever links it is asked.
#[derive(Debug, Clone, Copy)]
pub struct RequestSender {
    at_most_once: bool,
    /// Since it was asked over a link of `macula-peer/1`.
    named: Option<Named>,
}

/// What the peer knows a request by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    pub id: RequestId,
    /// Only a peer that has had it may answer: it was acknowledged, or may be handed over only once.
    pub again: bool,
}

/// How it was asked over one link, without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The link was lost before anything was written.
    Unsent,
    /// The link was lost, and nothing says that the peer has the request. It may have it.
    Unacknowledged,
    /// The link was lost, and the peer has the request.
    Acknowledged,
    /// The peer says that the request is for another node.
    WrongNode,
}

impl RequestSender {
    pub fn new(at_most_once: bool) -> Self {
        Self { at_most_once, named: None }
    }

    /// Whether it was asked over a link of `macula-peer/1`.
    pub fn is_named(&self) -> bool {
        self.named.is_some()
    }

    /// Whether only a peer that has had it may answer.
    pub fn is_asked_again(&self) -> bool {
        self.named.is_some_and(|named| named.again)
    }

    /// It is asked over a link. `id`: what it is called if it has no name yet. `None`: it cannot be asked there, because the
    /// peer is another one than before.
    pub fn ask(&mut self, dialect: Dialect, id: RequestId) -> Option<Option<Named>> {
        match dialect {
            Dialect::MaculaPeer1 => Some(Some(*self.named.get_or_insert(Named { id, again: false }))),
            Dialect::Macula => (!self.is_asked_again()).then_some(None),
        }
    }

    /// It has no answer, and the link is of no use to it any more. Whether it is asked again.
    pub fn lost(&mut self, how: Lost, dialect: Dialect) -> bool {
        let may_have_it = match (how, dialect) {
            (Lost::Unsent | Lost::WrongNode, _) => return true,
            (Lost::Unacknowledged, _) => self.at_most_once,
            // Only a peer that knows it by name can be asked for the answer.
            (Lost::Acknowledged, Dialect::Macula) => return false,
            (Lost::Acknowledged, Dialect::MaculaPeer1) => true,
        };
        match &mut self.named {
            Some(named) => {
                named.again |= may_have_it;
                true
            }
            None => !may_have_it,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RequestId = [7; 16];

    fn asked(at_most_once: bool, dialect: Dialect) -> RequestSender {
        let mut request = RequestSender::new(at_most_once);
        assert!(request.ask(dialect, ID).is_some());
        request
    }

    #[test]
    fn a_request_that_the_peer_has_is_asked_of_it_alone() {
        let mut request = asked(false, Dialect::MaculaPeer1);
        assert!(request.lost(Lost::Acknowledged, Dialect::MaculaPeer1));
        assert_eq!(request.ask(Dialect::MaculaPeer1, [8; 16]), Some(Some(Named { id: ID, again: true })));
        assert_eq!(request.ask(Dialect::Macula, ID), None, "the peer is another one");
    }

    #[test]
    fn a_request_that_the_peer_may_have_is_asked_again_unless_it_may_arrive_only_once() {
        let mut request = asked(false, Dialect::MaculaPeer1);
        assert!(request.lost(Lost::Unacknowledged, Dialect::MaculaPeer1) && !request.is_asked_again());
        let mut request = asked(true, Dialect::MaculaPeer1);
        assert!(request.lost(Lost::Unacknowledged, Dialect::MaculaPeer1) && request.is_asked_again());
    }

    #[test]
    fn a_gateway_is_asked_again_only_if_it_cannot_have_the_request_or_may_have_it_twice() {
        for (at_most_once, how, again) in [
            (false, Lost::Unacknowledged, true),
            (true, Lost::Unacknowledged, false),
            (true, Lost::Unsent, true),
            (false, Lost::Acknowledged, false),
        ] {
            let mut request = asked(at_most_once, Dialect::Macula);
            assert_eq!(request.lost(how, Dialect::Macula), again, "{how:?}");
        }
    }
}
