//! What the fake gateway and the load generators share. Nothing here is shipped, and nothing here uses the shipped
//! crates: the fake gateway must be an independent implementation of the format.

pub mod control;
pub mod crowd;
pub mod frame;
pub mod options;
pub mod quic;
