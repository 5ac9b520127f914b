//! Relays and circuits: how nodes that cannot reach each other do.

pub(crate) mod control;
