//! Any bytes as a signal: nothing panics, nothing is verified that was not made with the key, and what was made with it
//! can be said again.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/decide/nat.rs"]
mod nat;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/decide/punch.rs"]
mod punch;

#[allow(dead_code, unreachable_pub)]
#[path = "../../peer/src/signal.rs"]
mod signal;

/// Where the engine has them.
mod decide {
    pub(crate) use crate::punch;
}

use ring::hmac;
use signal::{Key, SECRET_LEN, Secret, Unverified};

fuzz_target!(|bytes: &[u8]| {
    let secret = Secret::from([7; SECRET_LEN]);
    let key = Key::from(&secret);
    if let Some(unverified) = Unverified::parse(bytes) {
        assert_eq!(unverified.verify(&key), None);
    }
    // The same bytes by somebody who knows the secret.
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), bytes);
    let made = [bytes, &mac.as_ref()[..16]].concat();
    if let Some(signal) = Unverified::parse(&made).and_then(|made| made.verify(&key)) {
        let again = signal.encode(&key);
        assert_eq!(Unverified::parse(&again).expect("just made").verify(&key), Some(signal));
    }
});
