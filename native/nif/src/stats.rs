//! What is counted, as a map.

use macula_peer::{
    AcceptedStats, GatewayStats, LinkStats, PathStatus, PeerName, PeerStats, RegistrationStats, RelayStats, Stats,
};
use rustler::{Atom, Encoder, Env, Term};

use crate::admission;
use crate::atoms;
use crate::errors::{binary, bytes_term};
use crate::inbound::{self, address, dialect};
use crate::non_scheduler::map;

pub(crate) fn term<'a>(env: Env<'a>, stats: &Stats) -> Term<'a> {
    let peers: Vec<_> = stats.peers.iter().map(|each| peer(env, each)).collect();
    let accepted: Vec<_> = stats.accepted.iter().map(|each| self::accepted(env, each)).collect();
    let total = stats.hits + stats.misses;
    let hit_rate = if total == 0 { 0.0 } else { stats.hits as f64 / total as f64 };
    // The keys of the original's pool.
    let pool = [
        (atoms::hits(), stats.hits.encode(env)),
        (atoms::misses(), stats.misses.encode(env)),
        (atoms::evictions(), stats.evictions.encode(env)),
        (atoms::total(), total.encode(env)),
        (atoms::hit_rate(), hit_rate.encode(env)),
        (atoms::pool_size(), stats.peers.len().encode(env)),
    ];
    let registrations: Vec<_> = stats.registrations.iter().map(|each| registration(env, each)).collect();
    let mut fields = vec![
        (atoms::peers(), peers.encode(env)),
        (atoms::accepted(), accepted.encode(env)),
        (atoms::pool(), map(env, &pool)),
        (atoms::verify_none_links(), stats.unverified.encode(env)),
        (atoms::undelivered(), stats.undelivered.encode(env)),
        (atoms::unhandled(), stats.unhandled.encode(env)),
        (atoms::malformed(), stats.malformed.encode(env)),
        (atoms::refused(), counted(env, &stats.refused)),
        (atoms::admission(), admission::stats(env, &stats.admission)),
        (atoms::sessions(), stats.sessions.encode(env)),
        (atoms::registrations(), registrations.encode(env)),
    ];
    if let Some(stats) = &stats.relay {
        fields.push((atoms::relay(), relay(env, stats)));
    }
    if let Some(stats) = &stats.gateway {
        fields.push((atoms::gateway(), gateway(env, stats)));
    }
    map(env, &fields)
}

/// Counters by their names.
fn counted<'a>(env: Env<'a>, counters: &[(&'static str, u64)]) -> Term<'a> {
    let fields: Vec<_> = counters.iter().map(|(name, n)| (atoms::named(env, name), n.encode(env))).collect();
    map(env, &fields)
}

fn gateway<'a>(env: Env<'a>, stats: &GatewayStats) -> Term<'a> {
    let fields = [
        (atoms::endpoint(), binary(env, &stats.endpoint.to_string())),
        (atoms::handed_over(), stats.handed_over.encode(env)),
        (atoms::answered(), stats.answered.encode(env)),
        (atoms::fallen_back(), stats.fallen_back.encode(env)),
    ];
    map(env, &fields)
}

fn registration<'a>(env: Env<'a>, stats: &RegistrationStats) -> Term<'a> {
    let (state, reason) = inbound::registration(env, stats.state);
    let seen_at = match stats.address {
        Some(seen_at) => address(env, seen_at),
        None => atoms::undefined().encode(env),
    };
    let fields = [
        (atoms::relay(), binary(env, &stats.relay.to_string())),
        (atoms::state(), state.encode(env)),
        (atoms::reason(), reason.encode(env)),
        (atoms::address(), seen_at),
        (atoms::circuits(), stats.circuits.encode(env)),
    ];
    map(env, &fields)
}

fn relay<'a>(env: Env<'a>, stats: &RelayStats) -> Term<'a> {
    let fields = [
        (atoms::registrations(), stats.registrations.encode(env)),
        (atoms::circuits(), stats.circuits.encode(env)),
        (atoms::forwarded_packets(), stats.forwarded_packets.encode(env)),
        (atoms::forwarded_bytes(), stats.forwarded_bytes.encode(env)),
        (atoms::refused(), counted(env, &stats.refused)),
        (atoms::dropped(), counted(env, &stats.dropped)),
        (atoms::stray(), stats.stray.encode(env)),
        (atoms::unread(), stats.unread.encode(env)),
        (atoms::punches(), stats.punches.encode(env)),
        (atoms::punched(), stats.punched.encode(env)),
    ];
    map(env, &fields)
}

fn peer<'a>(env: Env<'a>, stats: &PeerStats) -> Term<'a> {
    let name = match &stats.name {
        PeerName::Endpoint(endpoint) | PeerName::Gateway(endpoint) => {
            (atoms::endpoint(), binary(env, &endpoint.to_string()))
        }
        PeerName::Node(node) => (atoms::node_id(), bytes_term(env, node.as_bytes())),
    };
    let path = stats.link.map_or_else(atoms::none, |link| inbound::path(link.path));
    let mut fields = vec![
        name,
        (atoms::path(), path.encode(env)),
        (atoms::sent(), stats.sent.encode(env)),
        (atoms::acknowledged(), stats.acknowledged.encode(env)),
        (atoms::received(), stats.received.encode(env)),
        (atoms::failed(), stats.failed.encode(env)),
        (atoms::dials(), stats.dials.encode(env)),
        (atoms::unacknowledged_bytes(), stats.unacknowledged_bytes.encode(env)),
    ];
    if let Some(live) = &stats.link {
        fields.extend(link(env, live));
    }
    map(env, &fields)
}

/// How a peer is reached.
pub(crate) fn path<'a>(env: Env<'a>, status: &PathStatus) -> Term<'a> {
    let path = status.link.map_or_else(atoms::none, |link| inbound::path(link.path));
    let mut fields =
        vec![(atoms::path(), path.encode(env)), (atoms::failed(), inbound::failures(env, &status.failures))];
    if let Some(live) = &status.link {
        fields.extend(link(env, live));
    }
    map(env, &fields)
}

fn accepted<'a>(env: Env<'a>, stats: &AcceptedStats) -> Term<'a> {
    let mut fields = link(env, &stats.link).to_vec();
    fields.push((atoms::path(), inbound::path(stats.link.path).encode(env)));
    fields.push((atoms::received(), stats.received.encode(env)));
    map(env, &fields)
}

fn link<'a>(env: Env<'a>, link: &LinkStats) -> [(Atom, Term<'a>); 3] {
    [
        (atoms::dialect(), dialect(link.dialect).encode(env)),
        (atoms::address(), address(env, link.remote)),
        (atoms::round_trip_us(), (link.round_trip.as_micros() as u64).encode(env)),
    ]
}
