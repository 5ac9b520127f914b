//! Packets to the kernel, and the errors that it returns.
//!
//! quinn-udp would answer the first `EINVAL` by giving up segmentation offload, and ECN for IPv4, for as long as the
//! socket lives. But Linux also returns `EINVAL` for a blackhole route, a source address that has been removed, and
//! port 0, which any stranger can send from. So on Linux its state never sees an error: this module makes the system
//! call, and attributes an error to its packet alone (`macula_peer_core::sending`).

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Instant;

use macula_peer_core::quirks::Quirks;
use macula_peer_core::sending::{Asks, Fault, Next, SendAttempt};
use quinn::udp::{Transmit, UdpSocketState};
use tokio::net::UdpSocket;

/// What became of a packet that the socket had room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Sent,
    /// Lost, as if by the network.
    Lost(Fault),
    /// Nothing can be sent there.
    Refused,
}

/// What all sockets of a node know about their destinations.
#[derive(Default)]
pub(super) struct PacketSender {
    /// Whether there are quirks to look at: most nodes have none.
    quirky: AtomicBool,
    quirks: RwLock<Quirks>,
}

impl PacketSender {
    /// Sends a transmit. The only error is that there is no room (`WouldBlock`).
    pub(super) fn send(&self, io: &UdpSocket, state: &UdpSocketState, transmit: &Transmit<'_>) -> io::Result<Outcome> {
        if transmit.destination.port() == 0 {
            return Ok(Outcome::Refused);
        }
        let mut transmit = Transmit { ..*transmit };
        if self.quirky.load(Ordering::Relaxed) {
            let (segmented, marked) = self.known(transmit.destination);
            if !marked {
                transmit.ecn = None;
            }
            if !segmented && asks(&transmit).segments {
                return self.send_cut(io, state, &transmit);
            }
        }
        match system_send(io, state, &transmit) {
            Ok(()) => Ok(Outcome::Sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) => self.send_refused(io, state, &transmit, error),
        }
    }

    /// Tries a transmit that was refused with less.
    #[cold]
    fn send_refused(
        &self,
        io: &UdpSocket,
        state: &UdpSocketState,
        transmit: &Transmit<'_>,
        mut error: io::Error,
    ) -> io::Result<Outcome> {
        let asked = asks(transmit);
        let mut attempt = SendAttempt::new(asked);
        loop {
            let fault = Fault::of(&error);
            let less = match attempt.failed(fault) {
                Next::Try(less) => less,
                Next::Refused => {
                    tracing::debug!(destination = %transmit.destination, %error, "nothing can be sent there");
                    return Ok(Outcome::Refused);
                }
                Next::Lost => {
                    tracing::debug!(destination = %transmit.destination, %error, "packet not sent");
                    return Ok(Outcome::Lost(fault));
                }
            };
            let transmit = Transmit {
                ecn: transmit.ecn.filter(|_| less.ecn),
                src_ip: transmit.src_ip.filter(|_| less.source),
                ..*transmit
            };
            let first = match transmit.segment_size {
                Some(size) if asked.segments && !less.segments => {
                    Transmit { contents: &transmit.contents[..size], segment_size: None, ..transmit }
                }
                _ => Transmit { ..transmit },
            };
            match system_send(io, state, &first) {
                Ok(()) => {
                    self.learn(transmit.destination, asked, less);
                    let rest = Transmit { contents: &transmit.contents[first.contents.len()..], ..transmit };
                    return if rest.contents.is_empty() { Ok(Outcome::Sent) } else { self.send_rest(io, state, &rest) };
                }
                Err(again) if again.kind() == io::ErrorKind::WouldBlock => return Err(again),
                Err(again) => error = again,
            }
        }
    }

    /// Sends the segments of a transmit one by one.
    fn send_cut(&self, io: &UdpSocket, state: &UdpSocketState, transmit: &Transmit<'_>) -> io::Result<Outcome> {
        let first = transmit.segment_size.unwrap_or(transmit.contents.len());
        let one = Transmit { contents: &transmit.contents[..first], segment_size: None, ..*transmit };
        match self.send(io, state, &one)? {
            Outcome::Sent => {
                self.send_rest(io, state, &Transmit { contents: &transmit.contents[first..], ..*transmit })
            }
            failed => Ok(failed),
        }
    }

    /// The segments after the first. A transmit must not be sent again when a part of it was, so segments without room
    /// are lost.
    fn send_rest(&self, io: &UdpSocket, state: &UdpSocketState, rest: &Transmit<'_>) -> io::Result<Outcome> {
        let size = rest.segment_size.unwrap_or(rest.contents.len()).max(1);
        for contents in rest.contents.chunks(size) {
            match self.send(io, state, &Transmit { contents, segment_size: None, ..*rest }) {
                Ok(Outcome::Sent) => {}
                Ok(failed) => return Ok(failed),
                Err(_full) => return Ok(Outcome::Lost(Fault::Local)),
            }
        }
        Ok(Outcome::Sent)
    }

    fn known(&self, to: SocketAddr) -> (bool, bool) {
        let (quirks, now) = (self.quirks.read().unwrap_or_else(PoisonError::into_inner), Instant::now());
        (quirks.is_segmented(to, now), quirks.is_marked(to, now))
    }

    fn learn(&self, to: SocketAddr, asked: Asks, less: Asks) {
        if asked.segments && !less.segments {
            tracing::info!(destination = %to, "packets to this destination cannot be segmented by the device");
            self.change(|quirks, now| quirks.do_not_segment(to, now));
        }
        if asked.ecn && !less.ecn {
            self.change(|quirks, now| quirks.do_not_mark(to, now));
        }
    }

    /// Whether packets to any destination do without something.
    #[cfg(test)]
    pub(super) fn is_quirky(&self) -> bool {
        self.quirky.load(Ordering::Relaxed)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Quirks, Instant)) {
        let mut quirks = self.quirks.write().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        quirks.expire(now);
        change(&mut quirks, now);
        self.quirky.store(!quirks.is_empty(), Ordering::Relaxed);
    }
}

fn asks(transmit: &Transmit<'_>) -> Asks {
    Asks {
        segments: transmit.segment_size.is_some_and(|size| size < transmit.contents.len()),
        source: transmit.src_ip.is_some(),
        ecn: transmit.ecn.is_some(),
    }
}

#[cfg(target_os = "linux")]
fn system_send(io: &UdpSocket, _: &UdpSocketState, transmit: &Transmit<'_>) -> io::Result<()> {
    use std::io::IoSlice;
    use std::net::IpAddr;
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;
    use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
    use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

    let mark = transmit.ecn.map_or(0, |ecn| ecn as u8);
    let wide_mark = i32::from(mark);
    let size = transmit.segment_size.filter(|&size| size < transmit.contents.len()).and_then(|s| u16::try_from(s).ok());
    // The address's family, as the socket writes it, says which of the two applies.
    let (mut source_v4, mut source_v6) = (None, None);
    match transmit.src_ip {
        Some(IpAddr::V4(ip)) => {
            let ipi_spec_dst = in_addr { s_addr: u32::from_ne_bytes(ip.octets()) };
            source_v4 = Some(in_pktinfo { ipi_ifindex: 0, ipi_spec_dst, ipi_addr: in_addr { s_addr: 0 } });
        }
        Some(IpAddr::V6(ip)) => {
            source_v6 = Some(in6_pktinfo { ipi6_ifindex: 0, ipi6_addr: in6_addr { s6_addr: ip.octets() } });
        }
        None => {}
    }
    let marked = match (transmit.ecn, transmit.destination.ip().to_canonical()) {
        (None, _) => None,
        (Some(_), IpAddr::V4(_)) => Some(ControlMessage::Ipv4Tos(&mark)),
        (Some(_), IpAddr::V6(_)) => Some(ControlMessage::Ipv6TClass(&wide_mark)),
    };
    let from = source_v4.as_ref().map(ControlMessage::Ipv4PacketInfo);
    let from = from.or_else(|| source_v6.as_ref().map(ControlMessage::Ipv6PacketInfo));
    let segmented = size.as_ref().map(ControlMessage::UdpGsoSegments);
    let mut all = [ControlMessage::Ipv4Tos(&mark); 3];
    let mut count = 0;
    for control in [marked, from, segmented].into_iter().flatten() {
        all[count] = control;
        count += 1;
    }
    let (contents, destination) = ([IoSlice::new(transmit.contents)], SockaddrStorage::from(transmit.destination));
    loop {
        match sendmsg(io.as_raw_fd(), &contents, &all[..count], MsgFlags::empty(), Some(&destination)) {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Other systems have no segmentation offload that quinn-udp could give up.
#[cfg(not(target_os = "linux"))]
fn system_send(io: &UdpSocket, state: &UdpSocketState, transmit: &Transmit<'_>) -> io::Result<()> {
    state.try_send(quinn::udp::UdpSockRef::from(io), transmit)
}
