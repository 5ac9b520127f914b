//! Options from Erlang: a map with atom keys. What is not known or not valid is named in the error.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use macula_peer::{
    Certificate, Config, Delivery, Endpoint, Fingerprint, HandOver, HolePunching, Listen, LocalGateway, MAX_RELAYS,
    RelayConfig, Secret, Verify,
};
use macula_peer_wire::MAX_DEPTH_CEILING;
use rustler::{Atom, Binary, Encoder, Env, ListIterator, MapIterator, Term};

use crate::admission;
use crate::atoms;
use crate::errors::Reason;
use crate::recipient::{endpoint, node_id};

/// The largest values accepted. Above them a setting would not take effect, or could end the node: quinn keeps memory
/// for every stream that a connection may open (585 KB at this limit), a frame is gathered in memory, and each worker
/// is a thread.
const MOST_BYTES: usize = 1 << 30;
const MOST_TERMS: usize = 10_000_000;
const MOST_PEERS: usize = 1_000_000;
const MOST_STREAMS: usize = 4096;
const MOST_WORKERS: usize = 256;

/// As much as without the setting, with the largest frames that can be set.
const MOST_FRAME_MEMORY: usize = MOST_BYTES.saturating_mul(16);

/// With fewer, the share of one key would be too small for one that sends and asks honestly.
const LEAST_KNOWN: usize = 1024;

/// The longest `admission_timeout`: a client that waits longer has given up.
const LONGEST_ADMISSION: Duration = Duration::from_secs(60);

/// Each may make a relay verify a signature.
const MOST_PREVIOUS: usize = 4;

/// An option that is unknown or has a wrong value: `{invalid_option, {Key, Value}}`.
pub(crate) struct InvalidOption<'a> {
    pub(crate) key: Term<'a>,
    pub(crate) value: Term<'a>,
}

impl Reason for InvalidOption<'_> {
    fn reason<'a>(&self, env: Env<'a>) -> Term<'a> {
        (atoms::invalid_option(), (self.key.in_env(env), self.value.in_env(env))).encode(env)
    }
}

/// The engine's settings. Times are in milliseconds, sizes in bytes.
pub(crate) fn config(options: Term<'_>) -> Result<Config, InvalidOption<'_>> {
    let mut config = Config::default();
    each(options, |key, value| set(&mut config, key, value))?;
    match config.frame_memory {
        Some(bytes) if bytes < config.least_frame_memory() => {
            let env = options.get_env();
            Err(InvalidOption { key: atoms::frame_memory().encode(env), value: bytes.encode(env) })
        }
        _ => Ok(config),
    }
}

/// Where to listen, and under which node id.
pub(crate) fn listen(options: Term<'_>) -> Result<Listen, InvalidOption<'_>> {
    let mut listen = Listen::default();
    let (mut certificate, mut key, mut in_relay) = (None, None, None);
    let mut admission = admission::Options::default();
    each(options, |name, value| {
        match name {
            name if name == atoms::port() => listen.port = Some(port(value)?),
            name if name == atoms::ip() => listen.ip = Some(ip(value)?),
            name if name == atoms::certfile() => certificate = Some(path(value)?),
            name if name == atoms::keyfile() => key = Some(path(value)?),
            name if name == atoms::verify() => listen.verify = Some(verify(value)?),
            name if name == atoms::key_share() => listen.shares.key = percent(value)?,
            name if name == atoms::address_share() => listen.shares.address = percent(value)?,
            name if name == atoms::handshake_rate() => listen.shares.handshake_rate = up_to(MOST_PEERS, value)?,
            name if name == atoms::relay() => match relay(value) {
                Ok(relay) => listen.relay = Some(relay),
                Err(invalid) => in_relay = Some(invalid),
            },
            name if name == atoms::admission() => admission.function = Some(admission::function(value)?),
            name if name == atoms::admission_timeout() => {
                admission.timeout = Some(time(value).filter(|time| *time <= LONGEST_ADMISSION)?);
            }
            name if name == atoms::admission_cache() => admission.good_for = Some(pause(value)?),
            _ => return None,
        }
        Some(())
    })?;
    if let Some(invalid) = in_relay {
        return Err(invalid);
    }
    listen.admission = admission.admission();
    match (certificate, key) {
        (Some(certificate), Some(key)) => listen.certificate = Certificate::Files { certificate, key },
        (None, None) => {}
        (certificate, _) => {
            // A certificate without its key, or a key without its certificate: the error names the missing one.
            let env = options.get_env();
            let missing = if certificate.is_none() { atoms::certfile() } else { atoms::keyfile() };
            return Err(InvalidOption { key: missing.encode(env), value: atoms::undefined().encode(env) });
        }
    }
    Ok(listen)
}

pub(crate) fn each<'a>(
    options: Term<'a>,
    mut set: impl FnMut(Atom, Term<'a>) -> Option<()>,
) -> Result<(), InvalidOption<'a>> {
    let all = MapIterator::new(options).ok_or(InvalidOption { key: options, value: options })?;
    for (key, value) in all {
        let known = Atom::from_term(key).ok().and_then(|name| set(name, value));
        known.ok_or_else(|| InvalidOption { key, value: presentable(key, value) })?;
    }
    Ok(())
}

/// Errors are logged, and a mistyped secret is a secret still.
fn presentable<'a>(key: Term<'a>, value: Term<'a>) -> Term<'a> {
    if atoms::realm_secret() == key { atoms::hidden().encode(key.get_env()) } else { value }
}

fn set(config: &mut Config, key: Atom, value: Term<'_>) -> Option<()> {
    match key {
        key if key == atoms::ip() => config.ip = Some(ip(value)?),
        key if key == atoms::port() => config.port = port(value)?,
        key if key == atoms::max_frame_size() => config.limits.max_frame = up_to(MOST_BYTES, value)?,
        key if key == atoms::max_nesting() => config.limits.max_depth = up_to(MAX_DEPTH_CEILING, value)?,
        key if key == atoms::max_terms() => config.limits.max_terms = up_to(MOST_TERMS, value)?,
        key if key == atoms::pool_size() => config.pool_size = up_to(MOST_PEERS, value)?,
        key if key == atoms::idle_timeout() => config.idle_timeout = time(value)?,
        key if key == atoms::keep_alive() => config.keep_alive = time(value)?,
        key if key == atoms::connect_timeout() => config.connect_timeout = time(value)?,
        key if key == atoms::answer_timeout() => config.answer_timeout = time(value)?,
        key if key == atoms::frame_timeout() => config.frame_timeout = time(value)?,
        key if key == atoms::max_unacknowledged() => config.max_unacknowledged = positive(value)?,
        key if key == atoms::workers() => config.workers = up_to(MOST_WORKERS, value)?,
        key if key == atoms::max_accepted() => config.max_accepted = up_to(MOST_PEERS, value)?,
        key if key == atoms::max_streams() => config.max_streams = u32::try_from(up_to(MOST_STREAMS, value)?).ok()?,
        key if key == atoms::max_known_sessions() => config.max_known_sessions = known(value)?,
        key if key == atoms::max_known_requests() => config.max_known_requests = known(value)?,
        key if key == atoms::frame_memory() => config.frame_memory = Some(up_to(MOST_FRAME_MEMORY, value)?),
        key if key == atoms::delivery() => {
            config.delivery = match Atom::from_term(value).ok()? {
                value if value == atoms::at_least_once() => Delivery::AtLeastOnce,
                value if value == atoms::at_most_once() => Delivery::AtMostOnce,
                _ => return None,
            }
        }
        key if key == atoms::identity_file() => config.identity_file = Some(path(value)?),
        key if key == atoms::previous_identity_files() => {
            let files: Vec<_> = proper_list(value)?.map(path).collect::<Option<_>>()?;
            config.previous_identity_files = Some(files).filter(|files| files.len() <= MOST_PREVIOUS)?;
        }
        key if key == atoms::known_keys_file() => config.known_keys_file = Some(path(value)?),
        key if key == atoms::verify() => config.verify = verify(value)?,
        key if key == atoms::access() => config.access = admission::access(value).ok()?,
        key if key == atoms::verify_clients() => config.verify_clients = value.decode().ok()?,
        key if key == atoms::realm_secret() => config.realm_secret = Some(secret(value)?),
        key if key == atoms::node_id() => config.node_id = Some(node_id(value)?),
        key if key == atoms::relays() => config.relays = endpoints(value)?,
        key if key == atoms::gateway() => config.gateway = gateway(value)?,
        key if key == atoms::hole_punching() => {
            config.hole_punching = match Atom::from_term(value).ok()? {
                value if value == atoms::on() => HolePunching::On,
                value if value == atoms::plain() => HolePunching::Plain,
                value if value == atoms::off() => HolePunching::Off,
                _ => return None,
            }
        }
        _ => return None,
    }
    Some(())
}

/// `none`, an endpoint, or `{auto, Endpoint}`.
fn gateway(value: Term<'_>) -> Option<Option<LocalGateway>> {
    if atoms::none() == value {
        return Some(None);
    }
    let (when, endpoint) = match value.decode::<(Atom, Term<'_>)>() {
        Ok((auto, endpoint)) if auto == atoms::auto() => (HandOver::WithoutHandler, endpoint),
        _ => (HandOver::Always, value),
    };
    Some(Some(LocalGateway { endpoint: self::endpoint(endpoint)?, when }))
}

/// A node's packets are of this size (RFC 9000, section 14); a relay that takes only smaller ones carries nothing.
const SMALLEST_PACKET: usize = 1200;

/// No UDP packet is larger.
const LARGEST_PACKET: usize = 65_535;

/// What a relay gives.
fn relay(value: Term<'_>) -> Result<RelayConfig, InvalidOption<'_>> {
    let mut config = RelayConfig::default();
    let set = |key: Atom, value: Term<'_>| {
        match key {
            key if key == atoms::max_registrations() => config.max_registrations = up_to(MOST_PEERS, value)?,
            key if key == atoms::max_sessions() => config.max_sessions = up_to(MOST_PEERS, value)?,
            key if key == atoms::max_sessions_per_node() => config.max_sessions_per_node = up_to(MOST_PEERS, value)?,
            key if key == atoms::key_share() => config.key_share = percent(value)?,
            key if key == atoms::address_share() => config.address_share = percent(value)?,
            key if key == atoms::bandwidth() => config.bandwidth = positive(value)? as u64,
            key if key == atoms::packet_queue() => config.packet_queue = up_to(MOST_BYTES, value)?,
            key if key == atoms::max_packet() => {
                config.max_packet = up_to(LARGEST_PACKET, value).filter(|&bytes| bytes >= SMALLEST_PACKET)?;
            }
            key if key == atoms::accept_rate() => config.accept_rate = positive(value)? as u64,
            key if key == atoms::idle_timeout() => config.idle_timeout = time(value)?,
            key if key == atoms::grace() => config.grace = pause(value)?,
            key if key == atoms::realm_secret() => config.realm_secret = Some(secret(value)?),
            key if key == atoms::probe_port() => config.probe_port = port(value)?,
            key if key == atoms::probe_ip() => config.probe_ip = Some(ip(value)?),
            _ => return None,
        }
        Some(())
    };
    each(value, set)?;
    Ok(config)
}

pub(crate) fn endpoints(value: Term<'_>) -> Option<Vec<Endpoint>> {
    let endpoints: Vec<_> = proper_list(value)?.map(endpoint).collect::<Option<_>>()?;
    // More than an engine uses at once.
    Some(endpoints).filter(|endpoints| endpoints.len() <= MAX_RELAYS)
}

/// `first_seen`, `none`, `{pin, Fingerprints}`, `{cacertfile, File}` or `{cacertfile, File, any_name}`.
fn verify(value: Term<'_>) -> Option<Verify> {
    if let Ok(mode) = Atom::from_term(value) {
        return match mode {
            mode if mode == atoms::first_seen() => Some(Verify::FirstSeen),
            mode if mode == atoms::none() => Some(Verify::None),
            _ => None,
        };
    }
    if let Ok((mode, file, any_name)) = value.decode::<(Atom, Term<'_>, Atom)>() {
        let is_known = mode == atoms::cacertfile() && any_name == atoms::any_name();
        return is_known.then(|| path(file)).flatten().map(Verify::CaFileAnyName);
    }
    match value.decode::<(Atom, Term<'_>)>().ok()? {
        (mode, keys) if mode == atoms::pin() => {
            Some(Verify::Pin(proper_list(keys)?.map(fingerprint).collect::<Option<_>>()?))
        }
        (mode, file) if mode == atoms::cacertfile() => Some(Verify::CaFile(path(file)?)),
        _ => None,
    }
}

/// 32 bytes, or 64 hexadecimal digits.
pub(crate) fn fingerprint(value: Term<'_>) -> Option<Fingerprint> {
    if let Ok(bytes) = value.decode::<Binary<'_>>()
        && let Ok(bytes) = <[u8; 32]>::try_from(bytes.as_slice())
    {
        return Some(bytes.into());
    }
    text(value)?.parse().ok()
}

fn secret(value: Term<'_>) -> Option<Secret> {
    let bytes = value.decode::<Binary<'_>>().ok().filter(|bytes| !bytes.is_empty())?;
    Some(Secret::new(bytes.as_slice().into()))
}

fn positive(value: Term<'_>) -> Option<usize> {
    value.decode::<usize>().ok().filter(|&n| n > 0)
}

fn up_to(most: usize, value: Term<'_>) -> Option<usize> {
    positive(value).filter(|&n| n <= most)
}

fn known(value: Term<'_>) -> Option<usize> {
    up_to(MOST_PEERS, value).filter(|&n| n >= LEAST_KNOWN)
}

fn percent(value: Term<'_>) -> Option<u8> {
    up_to(100, value)?.try_into().ok()
}

fn time(value: Term<'_>) -> Option<Duration> {
    pause(value).filter(|time| !time.is_zero())
}

/// A time, or none.
fn pause(value: Term<'_>) -> Option<Duration> {
    // A day is beyond every sensible value, and keeps sums of times far from their limits.
    value.decode::<u64>().ok().filter(|ms| (0..=86_400_000).contains(ms)).map(Duration::from_millis)
}

fn port(value: Term<'_>) -> Option<u16> {
    narrow(value)
}

/// rustler's own decoders of `u8` and `u16` cut off what is too large for them.
fn narrow<T: TryFrom<u32>>(value: Term<'_>) -> Option<T> {
    T::try_from(value.decode::<u32>().ok()?).ok()
}

/// `inet:ip_address()`.
pub(crate) fn ip(value: Term<'_>) -> Option<IpAddr> {
    let parts = rustler::types::tuple::get_tuple(value).ok()?;
    if let [a, b, c, d] = parts[..] {
        return Some([narrow(a)?, narrow(b)?, narrow(c)?, narrow(d)?].into());
    }
    let parts: Vec<u16> = parts.into_iter().map(narrow).collect::<Option<_>>()?;
    <[u16; 8]>::try_from(parts).ok().map(IpAddr::from)
}

fn path(value: Term<'_>) -> Option<PathBuf> {
    text(value).map(PathBuf::from)
}

/// rustler's iterator panics where an improper list ends.
pub(crate) fn proper_list(value: Term<'_>) -> Option<ListIterator<'_>> {
    value.list_length().ok()?;
    value.into_list_iterator().ok()
}

/// A binary in UTF-8 or a string.
pub(crate) fn text(value: Term<'_>) -> Option<String> {
    if let Ok(text) = value.decode::<String>() {
        return Some(text);
    }
    let mut text = String::new();
    for c in proper_list(value)? {
        text.push(char::from_u32(c.decode().ok()?)?);
    }
    Some(text)
}
