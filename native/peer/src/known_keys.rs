//! The keys that names are bound to, and the file that they are kept in.
//!
//! Only a thread of its own waits for the disk. A task that binds a name tells it that there is something to write; it
//! takes all changes up to then, so there is no queue. What could not be written is written later, with the rest.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use macula_peer_core::known_keys::{self as format, Contents, Unreadable};
use macula_peer_core::sync::lock;
use macula_peer_core::trust::{Changes, TofuStore};
use macula_peer_core::types::{Fingerprint, NodeId};

use crate::error::KnownKeysError;
use crate::private;

/// Beyond twice what it was when it was last written whole, and this, the file is written whole again.
const SPARE: u64 = 1 << 20;

/// The largest file that is read: four times what one of this engine's can be.
const MAX_FILE: u64 = 64 << 20;

/// The pause after a fault of the disk.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// How long a stopping engine waits for the disk.
const STOPPING: Duration = Duration::from_secs(1);

/// A thread that writes a few lines needs little stack.
const STACK: usize = 256 << 10;

/// The keys that names are bound to.
pub(crate) struct KnownKeys {
    store: Arc<Mutex<TofuStore>>,
    keeper: Option<Keeper>,
}

/// The thread that writes the file.
struct Keeper {
    signal: Arc<Signal>,
    /// Hears of its end.
    ended: Mutex<mpsc::Receiver<()>>,
}

#[derive(Default)]
struct Signal {
    state: Mutex<Told>,
    changed: Condvar,
}

#[derive(Default)]
struct Told {
    /// There is something to write.
    unsaved: bool,
    stop: bool,
}

impl KnownKeys {
    /// Those of a file, which is made if it is not there, or of memory alone.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, KnownKeysError> {
        let Some(path) = file else { return Ok(Self { store: Arc::default(), keeper: None }) };
        let (file, known) = KeysFile::open(path)?;
        let store = Arc::new(Mutex::new(TofuStore::kept(known, Instant::now())));
        let (signal, (end, ended)) = (Arc::new(Signal::default()), mpsc::channel());
        let thread = std::thread::Builder::new().name("macula_peer_keys".into()).stack_size(STACK);
        thread.spawn({
            let (store, signal) = (store.clone(), signal.clone());
            move || {
                keep(file, &store, &signal);
                drop(end);
            }
        })?;
        Ok(Self { store, keeper: Some(Keeper { signal, ended: Mutex::new(ended) }) })
    }

    /// Looks at the bindings, or changes them.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut TofuStore) -> T) -> T {
        let mut store = lock(&self.store);
        let result = act(&mut store);
        let unsaved = store.is_unsaved();
        drop(store);
        if let (Some(keeper), true) = (&self.keeper, unsaved) {
            keeper.signal.tell(|told| told.unsaved = true);
        }
        result
    }

    /// Writes what is not written yet, if the disk takes it soon, and lets go of the file. Blocks.
    pub(crate) fn close(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.signal.tell(|told| told.stop = true);
            // Either way it ends.
            let _ = lock(&keeper.ended).recv_timeout(STOPPING);
        }
    }
}

impl Drop for KnownKeys {
    fn drop(&mut self) {
        self.close();
    }
}

impl Signal {
    fn tell(&self, what: impl FnOnce(&mut Told)) {
        what(&mut lock(&self.state));
        self.changed.notify_one();
    }

    /// Waits for something to write, or with `pause` for that time. Whether the engine stops.
    fn wait(&self, pause: Option<Duration>) -> bool {
        let state = lock(&self.state);
        let mut state = match pause {
            Some(pause) => {
                let waited = self.changed.wait_timeout_while(state, pause, |told| !told.stop);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let waited = self.changed.wait_while(state, |told| !told.unsaved && !told.stop);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
        };
        state.unsaved = false;
        state.stop
    }
}

/// Writes what changes until the engine stops.
fn keep(mut file: KeysFile, store: &Mutex<TofuStore>, signal: &Signal) {
    let mut pause = None;
    loop {
        let stop = signal.wait(pause);
        if file.is_long() {
            lock(store).save_all();
        }
        let unsaved = lock(store).take_unsaved();
        match file.save(unsaved) {
            Ok(()) => {
                if pause.take().is_some() {
                    tracing::warn!(file = %file.path.display(), "the known keys are written again");
                }
            }
            Err(error) => {
                // A part of it may be in the file, and another line must not follow that.
                lock(store).save_all();
                if stop {
                    // The last chance. Of two faults one is told.
                    let _ = file.save(lock(store).take_unsaved());
                }
                if pause.replace(RETRY_AFTER).is_none() {
                    let file = file.path.display();
                    tracing::warn!(%error, %file, "the known keys cannot be written and last as long as this engine; it is tried again");
                }
            }
        }
        if stop {
            return;
        }
    }
}

/// The file, which no other process writes.
struct KeysFile {
    path: PathBuf,
    file: File,
    len: u64,
    /// When it was last written whole.
    whole: u64,
    /// Released when this is dropped.
    _lock: File,
}

impl KeysFile {
    fn open(path: &Path) -> Result<(Self, Vec<(NodeId, Fingerprint)>), KnownKeysError> {
        // A file that is reached by a link is replaced where it is.
        let path = match fs::canonicalize(path) {
            Ok(path) => path,
            Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => path.to_owned(),
            Err(error) => return Err(error.into()),
        };
        let lock = lock_for(&path)?;
        if !path.exists() {
            let file = replace(&path, format::HEADER)?;
            let len = format::HEADER.len() as u64;
            return Ok((Self { path, file, len, whole: len, _lock: lock }, Vec::new()));
        }
        if !fs::metadata(&path)?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file").into());
        }
        let mut file = private::options().read(true).open(&path)?;
        private::check(&file)?;
        let mut text = Vec::new();
        (&mut file).take(MAX_FILE + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_FILE {
            return Err(KnownKeysError::NotKnownKeys);
        }
        let Contents { keys, len } = format::read(&text).map_err(|unreadable| match unreadable {
            Unreadable::Header => KnownKeysError::NotKnownKeys,
            Unreadable::Line(line) => KnownKeysError::BadLine(line),
        })?;
        let cut_off = text.len() - len;
        if cut_off > 0 {
            tracing::warn!(file = %path.display(), bytes = cut_off, "the end of the known keys was not written completely");
        }
        // Also tells now if it cannot be written.
        let text = format::whole(&keys);
        let file = replace(&path, &text)?;
        let len = text.len() as u64;
        Ok((Self { path, file, len, whole: len, _lock: lock }, keys))
    }

    fn is_long(&self) -> bool {
        self.len > 2 * self.whole + SPARE
    }

    /// On the disk when this returns.
    fn save(&mut self, changes: Changes) -> io::Result<()> {
        match changes {
            Changes::Some(changes) => {
                let mut lines = String::new();
                changes.iter().for_each(|(node, key)| format::put(&mut lines, node, key.as_ref()));
                if !lines.is_empty() {
                    self.file.write_all(lines.as_bytes())?;
                    self.file.sync_data()?;
                    self.len += lines.len() as u64;
                }
            }
            Changes::All(keys) => {
                let text = format::whole(&keys);
                self.file = replace(&self.path, &text)?;
                self.len = text.len() as u64;
                self.whole = self.len;
            }
        }
        Ok(())
    }
}

/// Only the process that has it writes the file. It is not the file itself, which is replaced.
fn lock_for(path: &Path) -> Result<File, KnownKeysError> {
    let file = private::options().create(true).open(beside(path, "lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(KnownKeysError::InUse),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Puts a file with this text in the place of what is there, or leaves that as it is. Returns the file, at its end.
fn replace(path: &Path, text: &str) -> io::Result<File> {
    let new = beside(path, "new");
    // One that a process left when it was killed.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = private::create(&new)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    private::sync_directory(private::directory(path));
    Ok(file)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(n: usize) -> NodeId {
        NodeId::new(format!("{n:0>200}").as_bytes()).unwrap()
    }

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    /// In a directory that is empty, and removed after the test.
    fn with_path(name: &str, test: impl FnOnce(&Path)) {
        let directory = std::env::temp_dir().join(format!("macula-peer-keys-{}-{name}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        test(&directory.join("keys"));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_file_that_has_become_long_is_written_whole() {
        with_path("long", |path| {
            let (mut file, _) = KeysFile::open(path).unwrap();
            let mut store = TofuStore::kept(Vec::new(), Instant::now());
            let mut writes = 0;
            while !file.is_long() {
                for n in 0..100 {
                    store.bind(node(n), key((writes % 2) as u8), Instant::now());
                }
                file.save(store.take_unsaved()).unwrap();
                writes += 1;
                assert!(writes < 1000);
            }
            assert_eq!(fs::metadata(path).unwrap().len(), file.len);
            let long = file.len;
            store.save_all();
            file.save(store.take_unsaved()).unwrap();
            assert!(file.len < long / 10 && !file.is_long());
            store.bind(node(100), key(9), Instant::now());
            file.save(store.take_unsaved()).unwrap();
            drop(file);
            let (_, known) = KeysFile::open(path).unwrap();
            assert_eq!((known.len(), known.last().cloned()), (101, Some((node(100), key(9)))));
        });
    }

    #[test]
    fn a_failing_disk_blocks_nothing_and_gets_everything_later() {
        with_path("fault", |path| {
            let (mut file, _) = KeysFile::open(path).unwrap();
            // It cannot be written.
            file.file = File::open(path).unwrap();
            let store = Mutex::new(TofuStore::kept(Vec::new(), Instant::now()));
            let signal = Signal::default();
            std::thread::scope(|scope| {
                scope.spawn(|| keep(file, &store, &signal));
                lock(&store).bind(node(1), key(1), Instant::now());
                signal.tell(|told| told.unsaved = true);
                let until = Instant::now() + Duration::from_secs(20);
                // After the fault everything must be written.
                while !lock(&store).is_unsaved() || lock(&signal.state).unsaved {
                    assert!(Instant::now() < until);
                    std::thread::yield_now();
                }
                let bound = Instant::now();
                lock(&store).bind(node(2), key(2), Instant::now());
                assert!(bound.elapsed() < Duration::from_secs(1));
                signal.tell(|told| told.stop = true);
            });
            let (_, known) = KeysFile::open(path).unwrap();
            assert_eq!(known, [(node(1), key(1)), (node(2), key(2))]);
        });
    }

    #[test]
    fn files_left_by_a_killed_process_are_harmless() {
        with_path("left", |path| {
            fs::write(beside(path, "new"), "half").unwrap();
            fs::write(beside(path, "lock"), "").unwrap();
            let (file, known) = KeysFile::open(path).unwrap();
            assert_eq!((known, beside(path, "new").exists()), (Vec::new(), false));
            assert!(matches!(KeysFile::open(path), Err(KnownKeysError::InUse)));
            drop(file);
            assert!(KeysFile::open(path).is_ok());
        });
    }
}
