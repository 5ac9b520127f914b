//! Values that are made from files, and made again when those change: certificates are renewed while a node runs.

use std::fmt::{self, Debug, Display};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use macula_peer_core::sync::lock;
use ring::digest::{Context, Digest, SHA256};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::pem;

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

type Make<T> = dyn Fn() -> Result<T, String> + Send + Sync;

/// A value made from the last usable contents of files.
pub(crate) struct FromFiles<T> {
    files: Vec<PathBuf>,
    make: Box<Make<T>>,
    latest: RwLock<Arc<T>>,
    /// The contents that were last read, usable or not.
    seen: Mutex<Vec<u8>>,
}

impl<T> FromFiles<T> {
    pub(crate) fn new<E: Display>(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, E> {
        // Read before the value is made, so that what is written in between is noticed.
        let seen = digest(&files).as_ref().to_vec();
        let latest = RwLock::new(Arc::new(make()?));
        let make = Box::new(move || make().map_err(|error| error.to_string()));
        Ok(Arc::new(Self { files, make, latest, seen: Mutex::new(seen) }))
    }

    pub(crate) fn latest(&self) -> Arc<T> {
        self.latest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Leaves out the value, which may be a key.
impl<T> Debug for FromFiles<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FromFiles").field(&self.files).finish()
    }
}

/// Whatever the value is.
pub(crate) trait Renew: Send + Sync {
    /// Looks at the files. Blocks.
    fn look(&self);
}

impl<T: Send + Sync> Renew for FromFiles<T> {
    fn look(&self) {
        let now = digest(&self.files);
        {
            let mut seen = lock(&self.seen);
            if *seen == now.as_ref() {
                return;
            }
            *seen = now.as_ref().to_vec();
        }
        match (self.make)() {
            Ok(value) => *self.latest.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value),
            // Perhaps only one of two files has been replaced so far.
            Err(error) => tracing::warn!("the changed files cannot be used, and the earlier ones stay in use: {error}"),
        }
    }
}

/// A digest of the contents of files, and of which cannot be read.
fn digest(files: &[PathBuf]) -> Digest {
    let mut all = Context::new(&SHA256);
    for file in files {
        match pem::read_path(file) {
            Ok(content) => {
                all.update(&(content.len() as u64).to_be_bytes());
                all.update(&content);
            }
            Err(_) => all.update(&u64::MAX.to_be_bytes()),
        }
    }
    all.finish()
}

/// Watches files as long as what is made from them is used.
pub(crate) async fn keep(renewed: Vec<Weak<dyn Renew>>, mut stopping: watch::Receiver<bool>) {
    while renewed.iter().any(|each| each.strong_count() > 0) {
        tokio::select! {
            () = sleep(LOOK_EVERY) => {}
            // Also if it was said before this task first ran.
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let live: Vec<_> = renewed.iter().filter_map(Weak::upgrade).collect();
        let look = tokio::task::spawn_blocking(move || live.iter().for_each(|each| each.look()));
        tokio::select! {
            _ = look => {}
            // The file system may hang.
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_value_follows_its_files_and_a_bad_version_is_tried_once() {
        let directory = std::env::temp_dir().join(format!("macula-peer-renewal-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let files = ["a", "b"].map(|name| directory.join(name));
        let write = |texts: [&str; 2]| {
            files.iter().zip(texts).for_each(|(file, text)| fs::write(file, text).unwrap());
        };
        write(["1", "1"]);
        let tries = Arc::new(AtomicUsize::new(0));
        let (read, counted) = (files.clone(), tries.clone());
        let value = FromFiles::new(files.to_vec(), move || {
            counted.fetch_add(1, Ordering::Relaxed);
            let [a, b] = [0, 1].map(|n| fs::read_to_string(&read[n]).unwrap_or_default());
            if a == b { Ok(a) } else { Err("not a pair") }
        });
        let value = value.unwrap();
        let look = |expected: &str, tried| {
            for _ in 0..3 {
                value.look();
            }
            assert_eq!((&**value.latest(), tries.load(Ordering::Relaxed)), (expected, tried));
        };
        look("1", 1);
        // Written again, it is the same.
        write(["1", "1"]);
        look("1", 1);
        write(["2", "1"]);
        look("1", 2);
        write(["2", "2"]);
        look("2", 3);
        // What moves from one file to the other is a change.
        write(["22", ""]);
        look("2", 4);
        fs::remove_file(&files[0]).unwrap();
        fs::remove_file(&files[1]).unwrap();
        look("", 5);
        fs::remove_dir_all(directory).unwrap();
        assert!(FromFiles::new(files.to_vec(), || Err::<(), _>("nothing there")).is_err());
    }
}
