//! Access control: the lists, the callback, and `kick`.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use macula_peer::{
    Access, AccessList, AdmissionAnswer, AdmissionCallback, AdmissionQuestion, AdmissionStats, Admit, Kick, Network,
    NotAdmitted, Passed, RelayNode,
};
use rustler::{Atom, Encoder, Env, ListIterator, Resource, ResourceArc, Term};

use crate::atoms;
use crate::errors::bytes_term;
use crate::inbound::{address, path};
use crate::non_scheduler::{KeptTerm, NonScheduler, map};
use crate::options::{InvalidOption, each, fingerprint, ip, proper_list, text};
use crate::recipient::node_id;

/// Entries of one list: reading them takes a tenth of a second.
const MOST_LISTED: usize = 100_000;

/// Nodes that are told at once.
pub(crate) const NODES_AT_ONCE: usize = 1000;

/// Asks the function `{Module, Function, Args}`, which the process `macula_peer_admission` calls.
struct Callback {
    function: KeptTerm,
    timeout: Duration,
}

impl Admit for Callback {
    fn ask(&self, question: &AdmissionQuestion, answer: AdmissionAnswer) {
        let here = NonScheduler::here();
        // Dropped, the answer is that the callback failed.
        let Some(here) = here else { return };
        let Some(process) = here.whereis(atoms::macula_peer_admission()) else { return };
        let token = ResourceArc::new(AnswerToken(Mutex::new(Some(answer))));
        let sent: Result<(), crate::non_scheduler::Dead> = here.send(|env| {
            let function = self.function.copy_to(env);
            let timeout = self.timeout.as_millis() as u64;
            let message = (atoms::macula_peer_admit(), token.clone(), function, asked(env, question), timeout);
            Ok((process, message.encode(env)))
        });
        // Gone meanwhile: the token is dropped.
        let _ = sent;
    }
}

fn asked<'a>(env: Env<'a>, question: &AdmissionQuestion) -> Term<'a> {
    let key = match &question.key {
        Some(key) => bytes_term(env, key.as_bytes()),
        None => atoms::undefined().encode(env),
    };
    let mut fields = vec![
        (atoms::key(), key),
        (atoms::address(), address(env, question.address)),
        (atoms::path(), path(question.path).encode(env)),
    ];
    match &question.node_id {
        Some(node_id) => {
            fields.push((atoms::kind(), atoms::registration().encode(env)));
            fields.push((atoms::node_id(), bytes_term(env, node_id.as_bytes())));
        }
        None => fields.push((atoms::kind(), atoms::connection().encode(env))),
    }
    map(env, &fields)
}

/// The token that answers one question, as an Erlang term.
pub(crate) struct AnswerToken(Mutex<Option<AdmissionAnswer>>);

#[rustler::resource_impl]
impl Resource for AnswerToken {}

impl AnswerToken {
    /// `allow`, `deny`, `timeout` or `crash`. Only the first answer counts.
    pub(crate) fn answer(&self, answer: Atom) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(open) = open {
            open.give(match answer {
                answer if answer == atoms::allow() => Ok(()),
                answer if answer == atoms::deny() => Err(NotAdmitted::Callback),
                answer if answer == atoms::timeout() => Err(NotAdmitted::Timeout),
                _ => Err(NotAdmitted::Crash),
            });
        }
    }
}

/// What a listener is told of its callback.
#[derive(Default)]
pub(crate) struct Options<'a> {
    pub(crate) function: Option<Term<'a>>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) good_for: Option<Duration>,
}

impl Options<'_> {
    pub(crate) fn admission(self) -> Option<AdmissionCallback> {
        let Self { function, timeout, good_for } = self;
        let timeout = timeout.unwrap_or(Duration::from_secs(1));
        let callback = Callback { function: KeptTerm::new(function?), timeout };
        let good_for = good_for.unwrap_or(Duration::from_secs(60));
        Some(AdmissionCallback { admit: std::sync::Arc::new(callback), timeout, good_for })
    }
}

/// `{Module, Function, Args}`.
pub(crate) fn function(value: Term<'_>) -> Option<Term<'_>> {
    let (_, _, args) = value.decode::<(Atom, Atom, Term<'_>)>().ok()?;
    proper_list(args)?;
    Some(value)
}

// ---- lists ----

/// `#{allow => Lists, deny => Lists}`.
pub(crate) fn access(value: Term<'_>) -> Result<Access, InvalidOption<'_>> {
    let (mut access, mut within) = (Access::default(), None);
    each(value, |key, value| {
        let side = match key {
            key if key == atoms::allow() => &mut access.allow,
            key if key == atoms::deny() => &mut access.deny,
            _ => return None,
        };
        if !value.is_map() {
            return None;
        }
        match lists(value) {
            Ok(lists) => *side = lists,
            Err(invalid) => within = Some(invalid),
        }
        Some(())
    })?;
    within.map_or(Ok(access), Err)
}

fn lists(value: Term<'_>) -> Result<AccessList, InvalidOption<'_>> {
    let mut lists = AccessList::default();
    each(value, |key, value| {
        match key {
            key if key == atoms::keys() => lists.keys = Some(all(value, fingerprint)?),
            key if key == atoms::node_ids() => lists.node_ids = Some(all(value, node_id)?),
            key if key == atoms::networks() => lists.networks = Some(all(value, network)?),
            _ => return None,
        }
        Some(())
    })?;
    Ok(lists)
}

fn all<'a, T>(list: Term<'a>, one: fn(Term<'a>) -> Option<T>) -> Option<Vec<T>> {
    let entries: ListIterator<'a> = proper_list(list)?;
    if list.list_length().ok()? > MOST_LISTED {
        return None;
    }
    entries.map(one).collect()
}

/// `"Address/Bits"`, an address as text, or `inet:ip_address()`.
fn network(value: Term<'_>) -> Option<Network> {
    match ip(value) {
        Some(ip) => Some(ip.into()),
        None => text(value)?.parse().ok(),
    }
}

pub(crate) fn access_term<'a>(env: Env<'a>, access: &Access) -> Term<'a> {
    map(env, &[(atoms::allow(), lists_term(env, &access.allow)), (atoms::deny(), lists_term(env, &access.deny))])
}

fn lists_term<'a>(env: Env<'a>, lists: &AccessList) -> Term<'a> {
    let AccessList { keys, node_ids, networks } = lists;
    let mut fields = Vec::new();
    if let Some(keys) = keys {
        let keys: Vec<_> = keys.iter().map(|key| bytes_term(env, key.as_bytes())).collect();
        fields.push((atoms::keys(), keys.encode(env)));
    }
    if let Some(node_ids) = node_ids {
        let node_ids: Vec<_> = node_ids.iter().map(|node_id| bytes_term(env, node_id.as_bytes())).collect();
        fields.push((atoms::node_ids(), node_ids.encode(env)));
    }
    if let Some(networks) = networks {
        let networks: Vec<_> = networks.iter().map(|network| bytes_term(env, network.to_string().as_bytes())).collect();
        fields.push((atoms::networks(), networks.encode(env)));
    }
    map(env, &fields)
}

/// `{key, Fingerprint}` or `{node_id, NodeId}`.
pub(crate) fn kick(value: Term<'_>) -> Option<Kick> {
    match value.decode::<(Atom, Term<'_>)>().ok()? {
        (what, key) if what == atoms::key() => fingerprint(key).map(Kick::Key),
        (what, name) if what == atoms::node_id() => node_id(name).map(Kick::NodeId),
        _ => None,
    }
}

// ---- insight ----

pub(crate) fn stats<'a>(env: Env<'a>, stats: &AdmissionStats) -> Term<'a> {
    let refused: Vec<_> = stats.refused.iter().map(|(reason, n)| (atoms::named(env, reason), n.encode(env))).collect();
    let fields = [
        (atoms::asked(), stats.asked.encode(env)),
        (atoms::remembered(), stats.remembered.encode(env)),
        (atoms::refused(), map(env, &refused)),
    ];
    map(env, &fields)
}

/// `#{nodes => [Node], next => From}`.
pub(crate) fn nodes<'a>(env: Env<'a>, nodes: &[RelayNode], next: Option<u64>) -> Term<'a> {
    let (now, since_epoch) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    let since = |then: Instant| since_epoch.saturating_sub(now.saturating_duration_since(then)).as_millis() as u64;
    let nodes: Vec<_> = nodes.iter().map(|node| self::node(env, node, since(node.since))).collect();
    let next = next.map_or_else(|| atoms::none().encode(env), |next| next.encode(env));
    map(env, &[(atoms::nodes(), nodes.encode(env)), (atoms::next(), next)])
}

fn node<'a>(env: Env<'a>, node: &RelayNode, since: u64) -> Term<'a> {
    let peers: Vec<_> = node.peers.iter().map(|peer| bytes_term(env, peer.as_bytes())).collect();
    let fields = [
        (atoms::node_id(), bytes_term(env, node.node_id.as_bytes())),
        (atoms::key(), bytes_term(env, node.key.as_bytes())),
        (atoms::address(), address(env, node.address)),
        (atoms::since(), since.encode(env)),
        (atoms::circuits(), node.circuits.encode(env)),
        (atoms::peers(), peers.encode(env)),
        (atoms::sent(), passed(env, node.sent)),
        (atoms::received(), passed(env, node.received)),
    ];
    map(env, &fields)
}

fn passed<'a>(env: Env<'a>, passed: Passed) -> Term<'a> {
    map(env, &[(atoms::packets(), passed.packets.encode(env)), (atoms::bytes(), passed.bytes.encode(env))])
}
