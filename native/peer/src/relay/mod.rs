//! Connections between nodes through a relay: QUIC within the datagrams of the connections to it.

mod packet;
