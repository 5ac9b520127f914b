//! What is known of the NAT that this node is behind, as a map.

use std::time::UNIX_EPOCH;

use macula_peer::{Allocation, Filtering, Mapping, NatStatus};
use rustler::{Atom, Encoder, Env, Term};

use crate::atoms;
use crate::inbound::address;
use crate::non_scheduler::map;

pub(crate) fn term<'a>(env: Env<'a>, status: &NatStatus) -> Term<'a> {
    map(env, &fields(env, status))
}

pub(crate) fn fields<'a>(env: Env<'a>, status: &NatStatus) -> Vec<(Atom, Term<'a>)> {
    let policy =
        |name: Option<&'static str>| name.map_or_else(atoms::unknown, |name| atoms::named(env, name)).encode(env);
    let reflexive = match status.observed {
        Some(observed) => address(env, observed),
        None => atoms::undefined().encode(env),
    };
    let local: Vec<_> = status.local.iter().map(|&local| address(env, local)).collect();
    let detected_at = match status.since.and_then(|since| since.duration_since(UNIX_EPOCH).ok()) {
        Some(since) => (since.as_millis() as u64).encode(env),
        None => atoms::undefined().encode(env),
    };
    vec![
        (atoms::mapping_policy(), policy(status.profile.mapping.map(Mapping::name))),
        (atoms::filtering_policy(), policy(status.profile.filtering.map(Filtering::name))),
        (atoms::allocation_policy(), policy(status.profile.allocation.map(Allocation::name))),
        (atoms::reflexive_address(), reflexive),
        (atoms::local_addresses(), local.encode(env)),
        (atoms::detected_at(), detected_at),
    ]
}
