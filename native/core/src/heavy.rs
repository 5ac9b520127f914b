//! Which payloads are much work to decode.

use macula_peer_wire::count_terms;

/// A payload of more terms is much work: it takes about a millisecond, in which a thread moves no packets. So is one of
/// more bytes.
pub const MANY_TERMS: usize = 10_000;
const MANY_BYTES: usize = 256 << 10;

/// Whether what to make of a payload is much work.
pub fn is_heavy(payload: &[u8]) -> bool {
    // Fewer bytes are fewer terms.
    payload.len() > MANY_TERMS && (payload.len() >= MANY_BYTES || count_terms(payload, MANY_TERMS) > MANY_TERMS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_measured_in_terms_and_in_bytes() {
        let array = |n: u32, item: &[u8]| [&[0xDD][..], &n.to_be_bytes(), &item.repeat(n as usize)].concat();
        assert!(!is_heavy(&array(9_999, &[0x80])));
        assert!(is_heavy(&array(10_000, &[0x80])));
        let binary = |len: u32| [&[0xC6][..], &len.to_be_bytes(), &vec![0; len as usize]].concat();
        assert!(!is_heavy(&binary(200_000)));
        assert!(is_heavy(&binary(300_000)));
        assert!(!is_heavy(&[]));
    }
}
