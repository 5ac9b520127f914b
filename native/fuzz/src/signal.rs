//! Any bytes as a signal: nothing panics, nothing is verified that was not made with the key, and what was made with it
//! can be said again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use macula_peer_core::proto::signal::{Key, SECRET_LEN, Secret, Unverified};
use ring::hmac;

fuzz_target!(|bytes: &[u8]| {
    let secret = Secret::from([7; SECRET_LEN]);
    let key = Key::from(&secret);
    if let Some(unverified) = Unverified::parse(bytes) {
        assert_eq!(unverified.verify(&key), None);
    }
    // The same bytes, signed by a holder of the secret.
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), bytes);
    let made = [bytes, &mac.as_ref()[..16]].concat();
    if let Some(signal) = Unverified::parse(&made).and_then(|made| made.verify(&key)) {
        let again = signal.encode(&key);
        assert_eq!(Unverified::parse(&again).expect("just made").verify(&key), Some(signal));
    }
});
