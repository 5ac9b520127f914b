//! What is counted, as a map.

use macula_peer::{AcceptedStats, LinkStats, PeerStats, Stats};
use rustler::{Atom, Encoder, Env, Term};

use crate::atoms;
use crate::errors::binary;
use crate::inbound::{address, dialect, map};

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
    let fields = [
        (atoms::peers(), peers.encode(env)),
        (atoms::accepted(), accepted.encode(env)),
        (atoms::pool(), map(env, &pool)),
        (atoms::verify_none_links(), stats.unverified.encode(env)),
        (atoms::undelivered(), stats.undelivered.encode(env)),
        (atoms::unhandled(), stats.unhandled.encode(env)),
        (atoms::malformed(), stats.malformed.encode(env)),
        (atoms::refused(), stats.refused.encode(env)),
    ];
    map(env, &fields)
}

fn peer<'a>(env: Env<'a>, stats: &PeerStats) -> Term<'a> {
    let path = if stats.link.is_some() { atoms::direct() } else { atoms::none() };
    let mut fields = vec![
        (atoms::endpoint(), binary(env, &stats.endpoint.to_string())),
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

fn accepted<'a>(env: Env<'a>, stats: &AcceptedStats) -> Term<'a> {
    let mut fields = link(env, &stats.link).to_vec();
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
