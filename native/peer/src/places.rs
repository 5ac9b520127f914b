//! The places that accepted connections have: each is given back when it is dropped.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use macula_peer_core::counter::Counter;
use macula_peer_core::places::{self, ExceededLimit, PlaceDecision, PlaceLimits};
use macula_peer_core::proto::codes::connection::OVER_LIMIT;
use macula_peer_core::sync::lock;
use macula_peer_core::types::Fingerprint;
use quinn::Connection;

/// The places of a node.
pub(crate) struct Places {
    taken: Mutex<places::Places>,
    /// In the order of the limits.
    refused: [Counter; ExceededLimit::ALL.len()],
}

/// The place of one connection.
pub(crate) struct Place {
    places: Arc<Places>,
    address: IpAddr,
    has: Mutex<Has>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    /// A place, and a part in the handshakes.
    Handshake,
    /// A place, which counts for the key if there is one.
    Place(Option<Fingerprint>),
    /// None: it counts elsewhere.
    Aside(Option<Fingerprint>),
    /// None any more.
    Nothing,
}

/// What happens to a new client.
pub(crate) enum Arrived {
    Placed(Place),
    Prove,
    Refused,
}

impl Places {
    pub(crate) fn new(limits: &PlaceLimits) -> Arc<Self> {
        let taken = Mutex::new(places::Places::new(limits, Instant::now()));
        Arc::new(Self { taken, refused: Default::default() })
    }

    /// From now on these limits hold.
    pub(crate) fn limit(&self, limits: &PlaceLimits) {
        lock(&self.taken).limit(limits, Instant::now());
    }

    /// A client wants to connect.
    pub(crate) fn arrive(self: &Arc<Self>, address: IpAddr, proven: bool) -> Arrived {
        let arrival = lock(&self.taken).arrive(address, proven, Instant::now());
        match arrival {
            PlaceDecision::Placed => Arrived::Placed(self.place(address, Has::Handshake)),
            PlaceDecision::Prove => Arrived::Prove,
            PlaceDecision::Refused(over) => {
                self.count(over);
                Arrived::Refused
            }
        }
    }

    /// A place for a connection that did not have to arrive: it came over a circuit, or was expected.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let entered = lock(&self.taken).enter(address);
        entered.map_err(|over| self.count(over)).ok()?;
        Some(self.place(address, Has::Place(None)))
    }

    fn place(self: &Arc<Self>, address: IpAddr, has: Has) -> Place {
        Place { places: self.clone(), address, has: Mutex::new(has) }
    }

    fn count(&self, over: ExceededLimit) {
        // Every limit has a counter.
        if self.refused[over as usize].add(1) == 0 {
            tracing::warn!(limit = over.name(), "a connection is refused");
        }
    }

    /// How many connections each limit has refused.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ExceededLimit::ALL.iter().zip(&self.refused).map(|(over, count)| (over.name(), count.get()))
    }
}

impl Place {
    /// The handshake is over.
    pub(crate) fn connected(&self) {
        let mut has = lock(&self.has);
        if *has == Has::Handshake {
            lock(&self.places.taken).handshake_over();
            *has = Has::Place(None);
        }
    }

    /// The connection has shown its key. False if the key has too many: the connection has been closed then.
    pub(crate) fn show(&self, connection: &Connection, key: Fingerprint) -> bool {
        self.connected();
        let mut has = lock(&self.has);
        let shown = lock(&self.places.taken).show(key, self.address);
        match shown {
            Ok(()) => *has = Has::Place(Some(key)),
            Err(over) => self.refuse(connection, over),
        }
        shown.is_ok()
    }

    /// What this connection may have of something of which `full` connections of one address may have `all` each.
    pub(crate) fn share(&self, all: u32, full: u32) -> u32 {
        let connections = lock(&self.places.taken).of_address(self.address);
        let connections = u32::try_from(connections).unwrap_or(u32::MAX).max(full);
        // No more than `all`, which fits.
        (u64::from(all) * u64::from(full) / u64::from(connections)) as u32
    }

    /// Gives it back, although there may still be references to the connection.
    pub(crate) fn leave(&self) {
        self.connected();
        if let Has::Place(key) = std::mem::replace(&mut *lock(&self.has), Has::Nothing) {
            lock(&self.places.taken).leave(key, self.address);
        }
    }

    fn refuse(&self, connection: &Connection, over: ExceededLimit) {
        self.places.count(over);
        connection.close(OVER_LIMIT.into(), over.name().as_bytes());
    }

    /// As long as this is kept the connection counts elsewhere. When there is no place for it afterwards it is closed.
    pub(crate) fn set_aside(self: &Arc<Self>, connection: &Connection) -> SetAside {
        let mut has = lock(&self.has);
        if let Has::Place(key) = *has {
            lock(&self.places.taken).leave(key, self.address);
            *has = Has::Aside(key);
        }
        drop(has);
        SetAside { place: self.clone(), connection: connection.clone() }
    }

    fn take_again(&self) -> Result<(), ExceededLimit> {
        let mut has = lock(&self.has);
        let Has::Aside(key) = *has else { return Ok(()) };
        let mut taken = lock(&self.places.taken);
        taken.enter(self.address)?;
        if let Some(key) = key
            && let Err(over) = taken.show(key, self.address)
        {
            taken.leave(None, self.address);
            return Err(over);
        }
        *has = Has::Place(key);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A connection that counts elsewhere.
pub(crate) struct SetAside {
    place: Arc<Place>,
    connection: Connection,
}

impl Drop for SetAside {
    fn drop(&mut self) {
        if self.connection.close_reason().is_none()
            && let Err(over) = self.place.take_again()
        {
            self.place.refuse(&self.connection, over);
        }
    }
}
