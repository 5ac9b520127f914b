//! Whether this node is a relay, and who must leave it.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use macula_peer_core::access::Access;
use macula_peer_core::admission::Kick;
use macula_peer_core::config::Config;
use macula_peer_core::sync::lock;
use macula_peer_core::types::RelayConfig;
use tokio::task::AbortHandle;

use super::responder::{Closed, Responder};
use super::server::Relay;
use crate::admission::Admissions;
use crate::lifecycle::Lifecycle;
use crate::net::Net;

/// The tasks of a relay that has been closed let go of its ports as soon as they run.
const PORTS_FREE: Duration = Duration::from_secs(1);

pub(crate) struct Role {
    config: Arc<Config>,
    lifecycle: Arc<Lifecycle>,
    net: Arc<Net>,
    admissions: Arc<Admissions>,
    relay: RwLock<Option<ServingRelay>>,
    /// Of the relay that this node is, or was before.
    closed: Mutex<Option<Closed>>,
}

struct ServingRelay {
    relay: Arc<Relay>,
    /// The task of its other sockets.
    answering: AbortHandle,
}

impl Role {
    pub(crate) fn new(
        config: Arc<Config>,
        lifecycle: Arc<Lifecycle>,
        net: Arc<Net>,
        admissions: Arc<Admissions>,
    ) -> Arc<Self> {
        let (relay, closed) = (RwLock::default(), Mutex::default());
        Arc::new(Self { config, lifecycle, net, admissions, relay, closed })
    }

    /// This node as a relay, if it is one.
    pub(crate) fn relay(&self) -> Option<Arc<Relay>> {
        let serving = self.relay.read().unwrap_or_else(PoisonError::into_inner);
        serving.as_ref().map(|serving| serving.relay.clone())
    }

    /// Makes this node a relay with these settings. Waits a moment if it has just stopped being another one.
    pub(crate) fn become_relay(&self, config: RelayConfig) -> io::Result<()> {
        self.be_no_relay();
        let bind = || {
            let _inside = self.lifecycle.enter();
            let reserved = self.config.reserved_port(None);
            Responder::bind(self.net.socket().local().ip(), config.probe_ip, config.probe_port, reserved)
        };
        let before = lock(&self.closed).take();
        let (responder, closed) = match (bind(), before) {
            (Err(error), Some(before)) if error.kind() == ErrorKind::AddrInUse => {
                before.wait(PORTS_FREE);
                bind()?
            }
            (bound, _) => bound?,
        };
        *lock(&self.closed) = Some(closed);
        let answering = self.lifecycle.spawn(responder.clone().answer_others(Arc::downgrade(&self.net)));
        self.set_relay(Some(ServingRelay { relay: Relay::new(config, responder, self.admissions.clone()), answering }));
        Ok(())
    }

    /// From now on this node is no relay.
    pub(crate) fn be_no_relay(&self) {
        self.set_relay(None);
    }

    fn set_relay(&self, relay: Option<ServingRelay>) {
        let before = std::mem::replace(&mut *self.relay.write().unwrap_or_else(PoisonError::into_inner), relay);
        if let Some(ServingRelay { relay, answering }) = before {
            relay.close();
            answering.abort();
        }
    }

    /// Sets which nodes may connect to this one. Those that are connected and may not be have to go.
    pub(crate) fn set_access(&self, access: Access) {
        self.admissions.set_access(access);
        // Nodes that are registered here are told why they have to go, and their connections end with that.
        let told = self.relay().map_or_else(HashSet::default, |relay| relay.enforce_access());
        self.admissions.enforce(&told);
    }

    /// Makes somebody leave. Returns whether it was here.
    pub(crate) fn kick(&self, whom: &Kick) -> bool {
        self.admissions.kick(whom);
        let told = self.relay().map_or_else(HashSet::default, |relay| relay.kick(whom));
        let closed = matches!(whom, Kick::Key(key) if self.admissions.dismiss_key(*key, &told));
        closed || !told.is_empty()
    }
}
