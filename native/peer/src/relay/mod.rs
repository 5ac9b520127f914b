//! Relays and circuits: how nodes that cannot reach each other do.

#[allow(unreachable_pub)]
pub(crate) mod control;
