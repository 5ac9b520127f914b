//! The table of message types, against the contract written out a second time.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use macula_peer_wire::MessageType;

const IDS: &str = "connect 01, disconnect 02, ping 03, pong 04, publish 10, subscribe 11, \
    unsubscribe 12, pubsub_route 13, call 20, reply 21, cast 22, rpc_route 23, rpc_request 24, \
    rpc_reply 25, swim_ping 30, swim_ack 31, swim_ping_req 32, find_node 40, find_node_reply 41, \
    store 42, find_value 43, find_value_reply 44, nat_probe 50, nat_probe_reply 51, \
    punch_request 52, punch_coordinate 53, punch_execute 54, punch_result 55, relay_request 56, \
    relay_data 57, bridge_rpc 60, bridge_data 61";

const REQUIRED: &str = "connect version node_id realm_id capabilities · disconnect reason message · \
    ping timestamp · pong timestamp server_time · publish† topic payload qos retain message_id · \
    subscribe† topics qos · unsubscribe† topics · rpc_route† destination_node_id source_node_id \
    hop_count max_hops payload_type payload · pubsub_route† destination_node_id source_node_id \
    hop_count max_hops topic payload · nat_probe† node_id local_port · nat_probe_reply† node_id \
    reflexive_ip reflexive_port server_time · punch_request† session_id requester_id target_id · \
    punch_coordinate† session_id peer_id peer_host peer_ports punch_time role · punch_result† \
    session_id success · relay_request† session_id target_id · relay_data† session_id payload · \
    rpc_request† request_id procedure args from_node · rpc_reply† request_id from_node";

#[test]
fn ids_and_names() {
    let expected: Vec<_> = IDS
        .split(", ")
        .map(|entry| entry.split_once(' ').unwrap())
        .map(|(name, id)| (name, u8::from_str_radix(id, 16).unwrap()))
        .collect();
    let actual: Vec<_> = MessageType::ALL.map(|ty| (ty.name(), ty.id())).to_vec();
    assert_eq!(actual, expected);
    for (name, id) in expected {
        assert_eq!(MessageType::from_name(name), MessageType::from_id(id));
        assert_eq!(MessageType::from_id(id).map(MessageType::id), Some(id));
    }
    assert_eq!((0..=u8::MAX).filter_map(MessageType::from_id).count(), 32);
}

#[test]
fn required_fields() {
    let entries: Vec<(&str, bool, Vec<&str>)> = REQUIRED
        .split(" · ")
        .map(|entry| {
            let mut words = entry.split(' ');
            let name = words.next().unwrap();
            (name.trim_end_matches('†'), name.ends_with('†'), words.collect())
        })
        .collect();
    assert!(entries.iter().all(|(name, ..)| MessageType::from_name(name).is_some()));
    for ty in MessageType::ALL {
        let entry = entries.iter().find(|(name, ..)| *name == ty.name());
        let (binary_keys, fields) =
            entry.map_or((false, vec![]), |(_, binary_keys, fields)| (*binary_keys, fields.clone()));
        assert_eq!(ty.required().fields, fields, "{}", ty.name());
        assert_eq!(ty.required().binary_keys, binary_keys, "{}", ty.name());
    }
}

#[test]
fn dht_store_is_an_alias_and_unknown_names_are_refused() {
    assert_eq!(MessageType::from_name("dht_store"), Some(MessageType::Store));
    assert_eq!(MessageType::Store.name(), "store");
    for name in ["", "Ping", "ping ", "unknown"] {
        assert_eq!(MessageType::from_name(name), None);
    }
}

#[test]
fn answered_types() {
    let answered: Vec<_> = MessageType::ALL.into_iter().filter(|ty| ty.is_answered()).map(MessageType::name).collect();
    assert_eq!(answered, ["ping", "call", "rpc_request", "find_node", "store", "find_value", "nat_probe"]);
}
