//! Relays and circuits: how nodes that cannot reach each other do.

mod circuits;
mod control;
mod packet;
#[cfg(test)]
mod testing;
