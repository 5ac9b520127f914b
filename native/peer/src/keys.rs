//! This node's key and name, the keys of other nodes, and whether a link leads to the node that it should lead to.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use macula_peer_core::config::Config;
use macula_peer_core::counter::Counter;
use macula_peer_core::errors::ConnectError;
use macula_peer_core::trust::{self, Answer, Facts, Mismatch, Step};
use macula_peer_core::types::{Dialect, Fingerprint, NodeId, PeerName, Verify};
use tokio::time::timeout;

use crate::identity::Identity;
use crate::known_keys::KnownKeys;
use crate::link::Link;
use crate::standing::Standing;
use crate::{hello, succession};

/// How long a node that shows another key than its name's may take to show the word of that key: then it is refused, and
/// the dial's time is not over yet.
const SUCCESSION_WITHIN: Duration = Duration::from_secs(2);

/// What others say of the node that a link should lead to.
#[derive(Clone, Copy)]
pub(crate) struct Said {
    /// Its key, where it is known.
    pub(crate) key: Option<Fingerprint>,
    /// A relay says that the node at the other end is registered under the name.
    pub(crate) registered: bool,
}

impl Said {
    pub(crate) fn by(key: Option<Fingerprint>) -> Self {
        Self { key, registered: false }
    }
}

/// For each message that waits for a link to a node, the only key that may get it, if it names one.
type WaitingKeys = dyn Fn(&NodeId) -> Vec<Option<Fingerprint>> + Send + Sync;

pub(crate) struct Keys {
    pub(crate) identity: Identity,
    known: KnownKeys,
    config: Arc<Config>,
    pub(crate) standing: Standing,
    waiting: Box<WaitingKeys>,
    /// Links to unverified peers.
    unverified: Counter,
}

impl Keys {
    pub(crate) fn new(
        identity: Identity,
        known: KnownKeys,
        config: Arc<Config>,
        waiting: impl Fn(&NodeId) -> Vec<Option<Fingerprint>> + Send + Sync + 'static,
    ) -> Self {
        let (standing, waiting, unverified) = (Standing::default(), Box::new(waiting), Counter::default());
        Self { identity, known, config, standing, waiting, unverified }
    }

    /// Lets a link carry messages for a peer if the node at the other end is that peer.
    pub(crate) async fn admit(&self, name: &PeerName, said: Said, link: Link) -> Result<Link, ConnectError> {
        match self.introduce(name, said, &link).await {
            Ok(()) => Ok(link),
            Err(error) => {
                tracing::debug!(peer = %name, %error, at = %link.remote(), "not the peer");
                link.close();
                Err(error)
            }
        }
    }

    /// The same, if that is so without asking the node at the other end.
    pub(crate) fn admit_now(&self, name: &PeerName, said: Said, link: Link) -> Option<Link> {
        let node = name.node()?;
        if self.facts(node, said, &link, |facts| facts.step(true)) != Step::Admit {
            return None;
        }
        self.learn(node, said, &link, None);
        Some(link)
    }

    async fn introduce(&self, name: &PeerName, said: Said, link: &Link) -> Result<(), ConnectError> {
        let PeerName::Node(node) = name else {
            let judged = trust::without_node_id(name, link.dialect).unwrap_or(Ok(()));
            return judged.inspect_err(
                |_| tracing::warn!(%name, "a node of this library listens where the local gateway should"),
            );
        };
        let mut step = self.facts(node, said, link, |facts| facts.step(false));
        if let Step::AskSuccession(known) = step {
            self.follow(node, known, link).await;
            step = self.facts(node, said, link, |facts| facts.step(true));
        }
        let answer = match step {
            Step::Admit | Step::AskSuccession(_) => None,
            Step::Ask => Some(hello::ask(&link.connection, node).await?),
            Step::Refuse(why) => {
                if let Mismatch::Bound(known) = why {
                    self.tell_mismatch(node, known, link.shown);
                }
                return Err(why.error());
            }
        };
        self.learn(node, said, link, answer);
        Ok(())
    }

    /// Binds a name to the key that a link shows if the key that it is bound to says so.
    async fn follow(&self, node: &NodeId, known: Fingerprint, link: &Link) {
        let Some(shown) = link.shown else { return };
        let asked = timeout(SUCCESSION_WITHIN, hello::ask_succession(&link.connection, known)).await;
        let Ok(Some(statement)) = asked else { return };
        if succession::is_valid(&statement, known, shown, SystemTime::now())
            && self.known.with(|names| names.hand_on(node, known, shown, Instant::now()))
        {
            tracing::warn!(?node, before = %known, now = %shown, "a node has another key, as its old key has stated");
        }
    }

    /// Remembers the key of a node that was reached. `answer`: to whether it has the node id, if it was asked.
    fn learn(&self, node: &NodeId, said: Said, link: &Link, answer: Option<Answer>) {
        if let (Some(shown), true) = (link.shown, self.facts(node, said, link, |facts| facts.learns(answer))) {
            self.known.with(|known| known.bind(node.clone(), shown, Instant::now()));
        }
    }

    fn facts<T>(&self, node: &NodeId, said: Said, link: &Link, decide: impl FnOnce(&Facts<'_>) -> T) -> T {
        let waiting = (self.waiting)(node);
        let now = Instant::now();
        let (bound, disowned) = self.known.with(|known| (known.key_of(node, now), known.is_disowned(node, link.shown)));
        decide(&Facts {
            own: self.identity.fingerprint(),
            shown: link.shown,
            dialect: link.dialect,
            named: said.key,
            registered: said.registered,
            bound,
            disowned,
            enforced: self.enforces_bindings(),
            waiting: &waiting,
        })
    }

    fn tell_mismatch(&self, node: &NodeId, known: Fingerprint, shown: Option<Fingerprint>) {
        if self.known.with(|known| known.is_first_mismatch(node)) {
            tracing::warn!(
                ?node, %known, ?shown,
                "a node shows another key than before and gets no messages. If it lost its key in a restart, set \
                 identity_file on that node, so that it keeps its key from now on, and call \
                 macula_peer_node:forget(NodeId) on this node to accept the new one.",
            );
        }
    }

    fn enforces_bindings(&self) -> bool {
        !matches!(self.config.verify, Verify::None)
    }

    /// The key that a node id is bound to, unless bindings are not enforced.
    pub(crate) fn known_key(&self, node: &NodeId) -> Option<Fingerprint> {
        if !self.enforces_bindings() {
            return None;
        }
        self.known.with(|known| known.key_of(node, Instant::now()))
    }

    /// The node with this key says that it does not have the node id.
    pub(crate) fn disown(&self, node: &NodeId, key: Fingerprint) {
        self.known.with(|known| known.disown(node, key));
    }

    /// The next node that has this id may have any key.
    pub(crate) fn forget(&self, node: &NodeId) {
        self.known.with(|known| known.forget(node));
    }

    /// Writes what is not written yet. Blocks.
    pub(crate) fn close(&self) {
        self.known.close();
    }

    /// What this node says when it is asked whether it has a node id. `None`: it has another one.
    pub(crate) fn answer(&self, asked: &[u8]) -> Option<Answer> {
        self.standing.with_name(|registered| {
            let own = registered.or(self.config.node_id.as_ref());
            trust::answer(own, &self.identity.fingerprint(), asked)
        })
    }

    /// Whether a message for this node id is for this node. Empty: for any node.
    pub(crate) fn serves(&self, target: &[u8]) -> bool {
        target.is_empty() || self.answer(target).is_some()
    }

    /// Counts a new link if its peer is not verified.
    pub(crate) fn counted_unverified(&self, dialect: Dialect) {
        if self.config.verify.leaves_open(dialect) && self.unverified.add(1) == 0 {
            tracing::warn!(
                "a peer's certificate is not verified, so any node can pose as it; statistics count such links"
            );
        }
    }

    pub(crate) fn unverified(&self) -> u64 {
        self.unverified.get()
    }
}
