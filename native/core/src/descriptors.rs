//! How many of the process's descriptors the engine may take. They belong to the whole BEAM: the application's files
//! and sockets fail when none are left.

/// A lookup holds a descriptor or two while it asks a DNS server.
const LOOKUPS: (u64, u64) = (8, 128);

/// How many name lookups may run at once, where the process may have `limit` descriptors. `None`: no limit.
pub fn lookups(limit: Option<u64>) -> usize {
    let (least, most) = LOOKUPS;
    // At most 128.
    limit.map_or(most, |limit| (limit / 8).clamp(least, most)) as usize
}

/// How many sockets an attempt that wants `wanted` may open: at most a quarter of what is allowed, and half of what is
/// left. Fewer find a path less often.
pub fn punching(wanted: u16, limit: Option<u64>, open: Option<u64>) -> u16 {
    let Some(limit) = limit else { return wanted };
    let left = limit.saturating_sub(open.unwrap_or(limit / 2));
    // At most what is wanted.
    u64::from(wanted).min(limit / 4).min(left / 2) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punching_leaves_descriptors_to_the_application() {
        assert_eq!(punching(256, None, None), 256);
        assert_eq!(punching(256, Some(1 << 20), Some(5000)), 256);
        assert_eq!(punching(256, Some(1024), Some(50)), 256);
        assert_eq!(punching(256, Some(1024), Some(900)), 62);
        assert_eq!(punching(256, Some(256), Some(40)), 64);
        assert_eq!(punching(256, Some(141), Some(21)), 35);
        assert_eq!(punching(256, Some(100), Some(100)), 0);
        assert_eq!(punching(256, Some(100), Some(120)), 0, "the limit was lowered");
        assert_eq!(punching(256, Some(256), None), 64, "not known how many are open");
    }

    #[test]
    fn lookups_take_an_eighth() {
        assert_eq!([None, Some(16), Some(256), Some(1024), Some(1 << 20)].map(lookups), [128, 8, 32, 128, 128]);
    }
}
