//! The process's file descriptors.

/// Above this limit they are not counted: a process that may have that many has some left.
const WORTH_COUNTING: u64 = 1 << 16;

/// How many the process may have. `None`: no limit, or not known.
pub(crate) fn limit() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
        (soft != RLIM_INFINITY && soft <= WORTH_COUNTING).then_some(soft)
    }
    #[cfg(not(unix))]
    None
}

/// How many it has, from a directory of the kernel. `None`: not known.
pub(crate) fn open() -> Option<u64> {
    // One of them is the directory.
    std::fs::read_dir("/dev/fd").ok().map(|all| all.count() as u64)
}
