//! Every atom that goes to Erlang, made once. None is ever made from what a peer sent.
#![expect(clippy::disallowed_methods, reason = "rustler::atoms! makes them when the library is loaded")]

use std::sync::OnceLock;

use macula_peer_wire::MessageType;
use rustler::{Atom, Env, NifResult};

rustler::atoms! {
    ok, error, wait, heavy, map, unfinished, undefined, infinity, null, true_ = "true", false_ = "false", none,
    not_started, already_started, released,

    invalid_header, unsupported_version, incomplete_payload, unknown_type, msgpack_decode_error, incomplete,
    not_just_binary, invalid_string, badarg, bad_ext, too_deep, too_large, too_many_terms, too_slow, frame_too_large,

    invalid_message, invalid_message_type, missing_field, not_a_map, not_encodable, invalid_timeout,
    tuple, pid, port, reference, function, bitstring, improper_list, integer_out_of_range, float, other,

    invalid_endpoint, invalid_format, invalid_port,
    connect_failed, transport_down, connection_refused, untrusted_peer, rejected_by_peer, wrong_node, no_application_protocol, handshake_failed,
    send_failed, overloaded, connection_closed, connection_shutdown, timeout,

    listen, already_listening, listen_failed, bad_certificate, start_failed, upgrading,
    already_replied, gone, invalid_token, invalid_option, invalid_node_id,

    resolve, unlinked, nat_connection_failed, no_relay_available, no_bootstrap_peers, relay_connect_failed,
    relay_setup_failed, node, node_id, endpoints, relays, last_resorts, relay, registration, registrations, state, limit,
    registered, connecting, lost, session_restarted, session_lost, sessions, handshake_rate, relay_limit, circuits, forwarded_packets, forwarded_bytes, dropped,
    stray, unread, punches, punched, max_registrations, max_sessions, max_sessions_per_node, key_share, address_share, bandwidth, packet_queue,
    max_packet, accept_rate, grace, probe_port, probe_ip,

    nat_profile, mapping_policy, filtering_policy, allocation_policy, reflexive_address, local_addresses, detected_at,
    unknown, hole_punch, hole_punching, on, off, plain, hole_punch_skipped, both_hard, not_allowed, busy, interrupted,

    verify_clients, first_seen, any_name, address_family_not_supported,
    insecure_permissions, foreign_owner, not_a_key, encrypted_key, unsupported_key, not_pkcs8, not_a_certificate,
    identity_file, previous_identity_files, known_keys_file, in_use, not_known_keys, bad_line,
    cacertfile, verify, pin, realm_secret,
    hidden, fingerprint,

    macula_peer_message, macula_peer_event, macula_peer_log, macula_peer_finish, type_ = "type", message, from, dialect, key, reply_to,
    macula, macula_peer_1 = "macula-peer/1",
    macula_gateway, route_message, gen_cast = "$gen_cast", gateway, gateway_port, auto, handed_over, answered, fallen_back,

    event, undelivered, peer, count, reason, expired, rejected, stopped,

    peers, accepted, pool, verify_none_links, unhandled, malformed, refused,
    endpoint, path, direct, address, round_trip_us, sent, acknowledged, received, failed, dials, unacknowledged_bytes,
    hits, misses, evictions, total, hit_rate, pool_size,

    access, allow, deny, keys, node_ids, networks, admission, admission_timeout, admission_cache, connection, kind,
    macula_peer_admission, macula_peer_admit, asked, remembered, not_found, not_a_relay, invalid_kick, nodes, next, since,
    packets, bytes,

    max_frame_size, max_nesting, max_terms, ip, idle_timeout, keep_alive, connect_timeout, delivery, at_least_once, at_most_once,
    max_unacknowledged, answer_timeout, workers, max_accepted, max_streams, max_known_sessions, max_known_requests,
    frame_memory, frame_timeout, certfile, keyfile,
}

/// The atom of one of the engine's own names: of a limit, for example.
pub(crate) fn named(env: Env<'_>, name: &'static str) -> Atom {
    // Fails only for names that are no atoms, of which the engine has none.
    Atom::from_str(env, name).unwrap_or_else(|_| other())
}

static TYPES: OnceLock<Vec<TypeAtoms>> = OnceLock::new();

/// A message type and the atoms that go with it.
pub(crate) struct TypeAtoms {
    name: Atom,
    pub(crate) kind: MessageType,
    /// Its required fields.
    pub(crate) fields: Vec<Atom>,
}

/// Makes the atoms of the message types; called once, when the library is loaded.
pub(crate) fn load(env: Env<'_>) -> bool {
    let names = MessageType::ALL.into_iter().map(|kind| (kind.name(), kind));
    // The alias is only ever read, so it comes last.
    let names = names.chain([("dht_store", MessageType::Store)]);
    let types: NifResult<Vec<_>> = names
        .map(|(name, kind)| {
            let fields = kind.required().fields.iter().map(|field| Atom::from_str(env, field));
            Ok(TypeAtoms { name: Atom::from_str(env, name)?, kind, fields: fields.collect::<NifResult<_>>()? })
        })
        .collect();
    types.is_ok_and(|types| TYPES.set(types).is_ok() || TYPES.get().is_some())
}

/// The message type that an atom names.
pub(crate) fn message_type(name: Atom) -> Option<&'static TypeAtoms> {
    types().iter().find(|each| each.name == name)
}

/// The atom that names a message type.
pub(crate) fn name_of(kind: MessageType) -> Atom {
    types().iter().find(|each| each.kind == kind).map_or_else(undefined, |each| each.name)
}

fn types() -> &'static [TypeAtoms] {
    TYPES.get().map_or(&[], Vec::as_slice)
}
