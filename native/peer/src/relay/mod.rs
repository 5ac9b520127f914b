//! Relays and circuits: how nodes that cannot reach each other do.

mod circuits;
pub(crate) mod client;
pub(crate) mod control;
mod packet;
pub(crate) mod registration;
#[cfg(test)]
mod testing;
