//! What every part speaks of.

mod candidates;
mod dialect;
mod endpoint;
mod fingerprint;
mod link;
mod peer;
mod relay_config;
mod secret;
mod sender;
mod verify;

pub use candidates::Candidates;
pub use dialect::Dialect;
pub use endpoint::{Endpoint, EndpointError, EndpointRef, Target, canonical};
pub use fingerprint::{Fingerprint, NotAFingerprint};
pub use link::{Link, LinkId};
pub use peer::{NodeId, Path, PeerName};
pub use relay_config::RelayConfig;
pub use secret::Secret;
pub use sender::Sender;
pub use verify::Verify;
