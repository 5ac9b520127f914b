//! Files with this node's key, or the keys it trusts: no other user may write them, or read the secret ones.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;

/// Why a file cannot be relied on.
#[derive(Debug)]
pub(crate) enum NotPrivate {
    Unknown(io::Error),
    /// With these permission bits.
    Permissions(u32),
    /// It belongs to this user.
    Owner(u32),
}

/// A new file that only this user can access.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    options().create_new(true).open(path)
}

/// The options to open a file for writing; if it is created, only this user can access it.
pub(crate) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// The directory that a file is in.
pub(crate) fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a new name in a directory survive a power cut.
pub(crate) fn sync_directory(directory: &Path) {
    // Not everywhere can directories be opened.
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
}

/// Looks at the open file, so that it cannot be exchanged for another one afterwards.
#[cfg(unix)]
pub(crate) fn check(file: &File) -> Result<(), NotPrivate> {
    use nix::sys::statvfs::{FsFlags, fstatvfs};
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata().map_err(NotPrivate::Unknown)?;
    let us = nix::unistd::geteuid().as_raw();
    let is_read_only = || fstatvfs(file).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_RDONLY));
    is_private(metadata.mode() & 0o777, metadata.uid(), us, is_read_only)
}

#[cfg(not(unix))]
pub(crate) fn check(_: &File) -> Result<(), NotPrivate> {
    Ok(())
}

/// Whether only this user and root can write the file; others may read it.
#[cfg(unix)]
pub(crate) fn check_unaltered(file: &File) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata()?;
    is_unaltered(metadata.mode() & 0o777, metadata.uid(), nix::unistd::geteuid().as_raw())
        .map_err(|why| io::Error::new(ErrorKind::PermissionDenied, why))
}

#[cfg(not(unix))]
pub(crate) fn check_unaltered(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn is_unaltered(mode: u32, owner: u32, us: u32) -> Result<(), String> {
    if owner != us && owner != 0 {
        return Err(format!("it belongs to user {owner}, neither root nor the user of this node"));
    }
    if mode & 0o022 == 0 { Ok(()) } else { Err(format!("others than its owner may write it: mode {mode:o}")) }
}

/// Whether only this user and root can read and write the file.
///
/// A group may read what this process cannot change: Kubernetes gives the files of a secret to root and the pod's group,
/// and mounts them read-only.
#[cfg(unix)]
fn is_private(mode: u32, owner: u32, us: u32, is_read_only: impl Fn() -> bool) -> Result<(), NotPrivate> {
    if owner != us && owner != 0 {
        return Err(NotPrivate::Owner(owner));
    }
    let forbidden = if owner != us || is_read_only() { 0o026 } else { 0o066 };
    if mode & forbidden == 0 { Ok(()) } else { Err(NotPrivate::Permissions(mode)) }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn files_that_other_users_may_write_are_refused() {
        for (mode, owner, us, unaltered) in [
            (0o644, 0, 1000, true),
            (0o444, 1000, 1000, true),
            (0o600, 0, 0, true),
            (0o664, 0, 1000, false),
            (0o646, 1000, 1000, false),
            (0o644, 1001, 1000, false),
            (0o644, 1001, 0, false),
        ] {
            assert_eq!(is_unaltered(mode, owner, us).is_ok(), unaltered, "{mode:o} of {owner} for {us}");
        }
    }

    #[test]
    fn a_group_reads_only_what_this_process_cannot_change() {
        const ROOT: u32 = 0;
        const US: u32 = 1000;
        const OTHER: u32 = 1001;
        for (mode, owner, us, read_only, private) in [
            (0o600, US, US, false, true),
            (0o400, US, US, false, true),
            (0o440, US, US, false, false),
            (0o440, US, US, true, true),
            // A secret with `fsGroup`; the same for a container that runs as root.
            (0o440, ROOT, US, false, true),
            (0o640, ROOT, US, false, true),
            (0o440, ROOT, ROOT, true, true),
            (0o440, ROOT, ROOT, false, false),
            // And without `fsGroup`: by default Kubernetes lets every user read.
            (0o644, ROOT, US, true, false),
            (0o444, ROOT, ROOT, true, false),
            (0o460, ROOT, US, true, false),
            (0o420, ROOT, US, true, false),
            (0o402, ROOT, US, true, false),
            (0o400, OTHER, US, true, false),
            (0o440, OTHER, US, true, false),
            (0o600, OTHER, ROOT, false, false),
        ] {
            let judged = is_private(mode, owner, us, || read_only);
            assert_eq!(judged.is_ok(), private, "{mode:o} of {owner} for {us}: {judged:?}");
            let foreign = matches!(judged, Err(NotPrivate::Owner(OTHER)));
            assert_eq!(foreign, owner == OTHER);
        }
    }
}
