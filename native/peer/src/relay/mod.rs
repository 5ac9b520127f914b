//! Relays and circuits: how nodes that cannot reach each other do.

mod circuits;
mod client;
mod control;
mod packet;
mod registration;
#[cfg(test)]
mod testing;
