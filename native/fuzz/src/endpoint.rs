//! Any text as an endpoint: nothing panics, and what is read is read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/endpoint.rs"]
mod endpoint;

/// Names, without what else a message has.
mod message {
    use crate::endpoint::Endpoint;

    #[derive(Clone, PartialEq)]
    pub(crate) struct NodeId(Vec<u8>);

    impl NodeId {
        pub(crate) fn as_bytes(&self) -> &[u8] {
            &self.0
        }
    }

    pub(crate) enum PeerName {
        Endpoint(Endpoint),
        Node(NodeId),
    }
}

use endpoint::EndpointRef;

fuzz_target!(|text: &str| {
    let Ok(read) = EndpointRef::parse(text) else { return };
    let endpoint = read.to_owned();
    assert!(endpoint.port() > 0 && !endpoint.host().is_empty());
    let said = endpoint.to_string();
    assert_eq!(EndpointRef::parse(&said).expect("just said").to_owned(), endpoint, "{said}");
    let _ = (endpoint.ip(), endpoint.is_loopback());
});
