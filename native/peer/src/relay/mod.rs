//! Relays and circuits: how nodes that cannot reach each other do.

mod circuits;
pub(crate) mod client;
pub(crate) mod clients;
pub(crate) mod registration;
pub(crate) mod responder;
pub(crate) mod role;
pub(crate) mod server;
#[cfg(test)]
pub(crate) mod testing;
