//! Any text as an endpoint: nothing panics, and what is read is read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use macula_peer_core::types::EndpointRef;

fuzz_target!(|text: &str| {
    let Ok(read) = EndpointRef::parse(text) else { return };
    let endpoint = read.to_owned();
    assert!(endpoint.port() > 0 && !endpoint.host().is_empty());
    let said = endpoint.to_string();
    assert_eq!(EndpointRef::parse(&said).expect("just said").to_owned(), endpoint, "{said}");
    let _ = (endpoint.ip(), endpoint.is_loopback());
});
