//! What the stand-ins and load generators have in common. Nothing here is ever shipped, and nothing here uses the
//! shipped crates: a stand-in is only worth something as an independent reading of the format.

pub mod control;
pub mod crowd;
pub mod frame;
pub mod options;
pub mod quic;
