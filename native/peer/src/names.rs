//! Looks host names up.
//!
//! This asks the system's resolver rather than a DNS server: it knows `/etc/hosts`, `nsswitch.conf`, search domains,
//! mDNS and what a VPN has set up, so a name that works for everything else on this host works here. It blocks, so it
//! has its own threads; `macula_peer_core::names` shares them out. An asynchronous resolver would need no threads, but it is
//! some twenty crates, and knows only a part of this.

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use macula_peer_core::descriptors;
use macula_peer_core::names::{NameStatus, Names};
use macula_peer_core::sync::lock;
use thiserror::Error;
use tokio::sync::watch;

/// The default of macOS for all threads but the first: enough for its resolver, and for glibc's, which needs less.
const STACK: usize = 512 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the name does not resolve")]
pub(crate) struct Unresolved;

type Found = Result<Vec<SocketAddr>, Unresolved>;
type Resolve = dyn Fn(&str) -> Found + Send + Sync;

/// Threads that hang are left behind when it is dropped: nothing can interrupt the system's resolver.
#[derive(Clone)]
pub(crate) struct Resolver {
    shared: Arc<Mutex<Shared>>,
    lookup: Arc<Resolve>,
}

struct Shared {
    names: Names,
    /// The waiting calls, by name.
    answers: HashMap<Box<str>, watch::Sender<Option<Found>>>,
}

impl Resolver {
    pub(crate) fn new() -> Self {
        Self::with(descriptors::lookups(crate::descriptors::limit()), ask_system)
    }

    fn with(limit: usize, lookup: impl Fn(&str) -> Found + Send + Sync + 'static) -> Self {
        let shared = Shared { names: Names::new(limit), answers: HashMap::new() };
        Self { shared: Arc::new(Mutex::new(shared)), lookup: Arc::new(lookup) }
    }

    /// The addresses of a host, with this port. May take as long as the system's resolver does.
    pub(crate) async fn resolve(&self, host: &str, port: u16) -> Found {
        let mut answer = self.ask(host)?;
        // The sender stays until there is an answer.
        let found = answer.wait_for(Option::is_some).await.map_err(|_| Unresolved)?;
        let mut found = found.clone().unwrap_or(Err(Unresolved))?;
        found.iter_mut().for_each(|address| address.set_port(port));
        Ok(found)
    }

    fn ask(&self, host: &str) -> Result<watch::Receiver<Option<Found>>, Unresolved> {
        let mut shared = lock(&self.shared);
        let ask = shared.names.ask(host, Instant::now());
        if ask == NameStatus::Failed {
            return Err(Unresolved);
        }
        let answers = shared.answers.entry(host.into()).or_insert_with(|| watch::Sender::new(None));
        let answer = answers.subscribe();
        drop(shared);
        if ask == NameStatus::Start && !self.start(host.into()) {
            return Err(Unresolved);
        }
        Ok(answer)
    }

    /// Looks up this name, and then others, on a new thread. False if the thread cannot be started.
    fn start(&self, first: Box<str>) -> bool {
        let (resolver, name) = (self.clone(), first.clone());
        let thread = std::thread::Builder::new().name("macula_peer_dns".into()).stack_size(STACK);
        let started = thread.spawn(move || {
            let mut next = Some(name);
            while let Some(name) = next {
                let found = (resolver.lookup)(&name);
                next = resolver.finish(&name, found);
            }
        });
        if let Err(error) = &started {
            tracing::warn!(%error, "no thread for a name lookup");
            let mut shared = lock(&self.shared);
            shared.names.done(&first, false, Instant::now());
            shared.answer(&first, Err(Unresolved));
        }
        started.is_ok()
    }

    /// Answers the waiting calls. Returns the next name for the thread, if there is one.
    fn finish(&self, name: &str, found: Found) -> Option<Box<str>> {
        let now = Instant::now();
        let mut shared = lock(&self.shared);
        let Shared { names, answers } = &mut *shared;
        names.done(name, found.is_ok(), now);
        let next = names.next(now, |name| answers.get(name).is_some_and(|answer| !answer.is_closed()));
        answers.retain(|_, answer| !answer.is_closed());
        shared.answer(name, found);
        next
    }
}

impl Shared {
    fn answer(&mut self, name: &str, found: Found) {
        if let Some(answer) = self.answers.remove(name) {
            answer.send_replace(Some(found));
        }
    }
}

fn ask_system(host: &str) -> Found {
    let found: Vec<_> = (host, 0).to_socket_addrs().map_err(|_| Unresolved)?.collect();
    if found.is_empty() { Err(Unresolved) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn eighty_names_that_hang_keep_no_other_waiting() {
        let (release, hangs) = mpsc::channel::<()>();
        let hangs = Mutex::new(hangs);
        let resolver = Resolver::with(128, move |name| match name.starts_with("bad") {
            true => {
                // Until the sender is gone.
                let _ = lock(&hangs).recv();
                Err(Unresolved)
            }
            false => Ok(vec![([192, 0, 2, 1], 0).into()]),
        });
        let mut hanging = JoinSet::new();
        for n in 0..80 {
            let resolver = resolver.clone();
            hanging.spawn(async move { resolver.resolve(&format!("bad{n}"), 1).await });
        }
        while lock(&resolver.shared).answers.len() < 80 {
            tokio::task::yield_now().await;
        }
        let found = timeout(PATIENCE, resolver.resolve("good", 7)).await.unwrap();
        assert_eq!(found, Ok(vec![([192, 0, 2, 1], 7).into()]));
        drop(release);
        while let Some(done) = hanging.join_next().await {
            assert_eq!(done.unwrap(), Err(Unresolved));
        }
        assert!(lock(&resolver.shared).answers.is_empty());
    }

    #[tokio::test]
    async fn one_lookup_serves_all_callers() {
        static LOOKUPS: AtomicUsize = AtomicUsize::new(0);
        let resolver = Resolver::with(4, |_| {
            LOOKUPS.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(50));
            Ok(vec![([192, 0, 2, 1], 0).into()])
        });
        let asked: Vec<_> = (0..20).map(|_| resolver.ask("name").unwrap()).collect();
        for mut answer in asked {
            assert!(timeout(PATIENCE, answer.wait_for(Option::is_some)).await.unwrap().unwrap().is_some());
        }
        assert_eq!(LOOKUPS.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn waiting_lookups_have_their_turn() {
        let resolver = Resolver::with(2, |_| Ok(vec![([192, 0, 2, 1], 0).into()]));
        let mut all = JoinSet::new();
        for n in 0..100 {
            let resolver = resolver.clone();
            all.spawn(async move { resolver.resolve(&format!("name{n}"), 1).await });
        }
        while let Some(done) = timeout(PATIENCE, all.join_next()).await.unwrap() {
            assert!(done.unwrap().is_ok());
        }
    }

    #[test]
    fn the_hosts_file_counts() {
        assert!(ask_system("localhost").is_ok());
        assert_eq!(ask_system("no.such.name.invalid"), Err(Unresolved));
    }
}
