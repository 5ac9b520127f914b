//! Endpoints: `host:port` in the spellings that macula accepts.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use hashbrown::Equivalent;
use thiserror::Error;

use crate::types::{NodeId, PeerName};

/// The address of a peer: a host (name, IPv4 or IPv6 literal) and a port, normalized so that two spellings of one
/// address are one peer: no scheme, no brackets, lower case, IPv6 in its canonical form.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    host: Box<str>,
    port: u16,
}

/// An [`Endpoint`] that borrows the caller's text, to look a peer up without an allocation.
#[derive(Clone)]
pub struct EndpointRef<'a> {
    host: Cow<'a, str>,
    port: u16,
}

/// The target of a message, borrowed from the caller.
#[derive(Clone)]
pub enum Target<'a> {
    /// Any node at an address.
    Endpoint(EndpointRef<'a>),
    /// A node, wherever it is: its name.
    Node(&'a NodeId),
}

/// Why a text is not an endpoint. The two cases are the original's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum EndpointError {
    /// There is no `host:port` in it.
    #[error("not of the form host:port")]
    Format,
    /// The port is not a number from 1 to 65,535.
    #[error("port is not a number from 1 to 65535")]
    Port,
}

impl<'a> EndpointRef<'a> {
    /// Reads `host:port`, `https://host:port` or `http://host:port`. The port is what follows the last colon, so
    /// `::1:9443` is port 9443 of `::1`; `[::1]:9443` is the same endpoint.
    pub fn parse(text: &'a str) -> Result<Self, EndpointError> {
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let (host, port) = rest.rsplit_once(':').ok_or(EndpointError::Format)?;
        let port = parse_port(port)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(literal) => literal.parse::<Ipv6Addr>().map(|_| literal).map_err(|_| EndpointError::Format)?,
            None => host,
        };
        if host.is_empty() {
            return Err(EndpointError::Format);
        }
        // A second colon is an IPv6 literal or a mistake such as `host:port:extra`, of which the original says that
        // its port is wrong.
        let host = if host.contains(':') {
            Cow::Owned(host.parse::<Ipv6Addr>().map_err(|_| EndpointError::Port)?.to_string())
        } else if host.bytes().any(|b| b.is_ascii_uppercase()) {
            Cow::Owned(host.to_ascii_lowercase())
        } else {
            Cow::Borrowed(host)
        };
        Ok(Self { host, port })
    }

    /// The endpoint on its own.
    pub fn to_owned(&self) -> Endpoint {
        Endpoint { host: self.host.as_ref().into(), port: self.port }
    }
}

fn parse_port(text: &str) -> Result<u16, EndpointError> {
    // `str::parse` takes a leading plus sign, the original does too; it takes no minus sign, space or slash.
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(EndpointError::Port),
    }
}

impl Endpoint {
    /// The same, to look it up with.
    pub fn as_ref(&self) -> EndpointRef<'_> {
        EndpointRef { host: Cow::Borrowed(&self.host), port: self.port }
    }

    /// Host name or IP literal, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the host is this one by its name or address alone.
    pub fn is_loopback(&self) -> bool {
        self.host() == "localhost" || self.ip().is_some_and(|ip| ip.to_canonical().is_loopback())
    }

    /// The host as an IP address, if it is a literal.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Hash for Endpoint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&*self.host, self.port).hash(state);
    }
}

impl Hash for EndpointRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.host.as_ref(), self.port).hash(state);
    }
}

impl Hash for Target<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Endpoint(endpoint) => endpoint.hash(state),
            Self::Node(node) => node.as_bytes().hash(state),
        }
    }
}

impl Equivalent<PeerName> for Target<'_> {
    fn equivalent(&self, key: &PeerName) -> bool {
        match (self, key) {
            (Self::Endpoint(endpoint), PeerName::Endpoint(key)) => endpoint.equivalent(key),
            (Self::Node(node), PeerName::Node(key)) => *node == key,
            _ => false,
        }
    }
}

impl Target<'_> {
    /// The name on its own.
    pub fn to_owned(&self) -> PeerName {
        match self {
            Self::Endpoint(endpoint) => PeerName::Endpoint(endpoint.to_owned()),
            Self::Node(node) => PeerName::Node((*node).clone()),
        }
    }
}

impl Equivalent<Endpoint> for EndpointRef<'_> {
    fn equivalent(&self, key: &Endpoint) -> bool {
        self.port == key.port && *self.host == *key.host
    }
}

/// The address as the outside writes it: an IPv4 address that came over a socket of both families is IPv4 again.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn spellings_of_one_address_are_one_endpoint() {
        let spellings = ["https://[::1]:9443", "::1:9443", "[0:0:0:0:0:0:0:1]:9443", "http://::1:9443"];
        for text in spellings {
            assert_eq!(EndpointRef::parse(text).unwrap().to_owned().to_string(), "[::1]:9443", "{text}");
        }
        assert_eq!(EndpointRef::parse("HTTPS://a:1").err(), Some(EndpointError::Port));
        assert_eq!(EndpointRef::parse("Node.Example:9443").unwrap().to_owned().to_string(), "node.example:9443");
    }

    #[test]
    fn a_borrowed_endpoint_finds_the_owned_one() {
        let mut map = hashbrown::HashMap::new();
        map.insert(EndpointRef::parse("Host:1").unwrap().to_owned(), 7);
        assert_eq!(map.get(&EndpointRef::parse("hOST:1").unwrap()), Some(&7));
        assert_eq!(map.get(&EndpointRef::parse("host:2").unwrap()), None);
    }

    #[test]
    fn mistakes_get_the_original_terms() {
        for text in ["", "10.0.0.1", ":1", "[::1:9443", "[nonsense]:1"] {
            let expected = if text == "[::1:9443" { EndpointError::Port } else { EndpointError::Format };
            assert_eq!(EndpointRef::parse(text).err(), Some(expected), "{text}");
        }
        for port in ["abc", "", "0", "-1", "65536", "99999", "1/", "1 "] {
            let text = format!("host:{port}");
            assert_eq!(EndpointRef::parse(&text).err(), Some(EndpointError::Port), "{text}");
        }
        assert_eq!(EndpointRef::parse("host:1:extra").err(), Some(EndpointError::Port));
        assert_eq!(EndpointRef::parse("host:1:2").err(), Some(EndpointError::Port));
    }
}
