//! In which order the owner of a peer's link does what is due. The owner carries out what [`LinkState`] decides, and moves
//! the queue over the link.

use std::time::Instant;

use crate::link_state::{Action, Demand, LinkState, Offer, SWEEP_EVERY, Want};
use crate::race::{AttemptId, Ended};
use crate::types::Link;

/// What drives one peer's link.
pub trait Owner {
    fn life(&mut self) -> &mut LinkState;
    /// Answers calls, and gives up messages, whose time is over.
    fn expire(&mut self, now: Instant);
    /// Tells the state what callers, and lookups for them, have asked for, and which connections the peer has begun.
    fn look_at_callers(&mut self, now: Instant);
    /// When [`Owner::sweep`] was last called.
    fn swept_at(&self) -> Instant;
    /// Looks for acknowledgements, and tells the state what was heard.
    fn sweep(&mut self, now: Instant);
    /// Whether something that went over the link is not acknowledged.
    fn is_unacknowledged(&self) -> bool;
    fn carry_out(&mut self, action: Action, now: Instant);
    /// Gives the queue to the link, or to a legacy relay.
    fn hand_on(&mut self, now: Instant);
    fn demand(&self, now: Instant) -> Demand;
    /// Tells the state what there is to try, by [`LinkState::search`], and carries out what follows ([`carry_out`]).
    fn search(&mut self, want: Want, now: Instant);
    /// What is offered with a link.
    fn offer(&self, link: Link) -> Offer;
    /// Uniform in 0..1.
    fn draw(&mut self) -> f64;
}

/// Everything that time or the callers may have changed.
pub fn look_after(owner: &mut impl Owner, now: Instant) {
    owner.expire(now);
    owner.look_at_callers(now);
    // Callers may have written since it was last looked.
    if now >= owner.swept_at() + SWEEP_EVERY || owner.life().is_leaving() {
        owner.sweep(now);
    }
    go_on(owner, now);
    let demand = owner.demand(now);
    if let Some(want) = owner.life().wants(&demand, now) {
        owner.search(want, now);
        go_on(owner, now);
    }
}

/// An attempt has ended.
pub fn attempted(owner: &mut impl Owner, id: AttemptId, attempted: Result<Link, Ended>, now: Instant) {
    if owner.life().is_suspect() {
        // A peer that is back answers on both links.
        owner.sweep(now);
    }
    match attempted {
        Ok(link) => {
            let offer = owner.offer(link);
            owner.life().linked(id, offer, now);
            carry_out(owner, now);
        }
        Err(how) => owner.life().failed(id, how, now),
    }
}

/// What was decided last goes on with the queue at once: nothing else may happen for long.
fn go_on(owner: &mut impl Owner, now: Instant) {
    let (unacknowledged, draw) = (owner.is_unacknowledged(), owner.draw());
    owner.life().poll(unacknowledged, now, draw);
    carry_out(owner, now);
    owner.hand_on(now);
}

/// Everything that was decided.
pub fn carry_out(owner: &mut impl Owner, now: Instant) {
    while let Some(action) = owner.life().next_action() {
        owner.carry_out(action, now);
    }
}
