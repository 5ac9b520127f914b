//! What to do about a packet that the kernel did not send.
//!
//! An error of `sendmsg` can be about this packet's destination, about an option of the packet (segmentation offload, a
//! source address, an ECN mark), or about another packet: ICMP errors of a socket surface in any later call. Nothing
//! here outlives the packet, so one destination's error cannot change how the next packet is sent.

use std::io;

/// How often one packet is tried. QUIC can handle a lost packet.
const MAX_TRIES: u8 = 12;

/// An error that could be an ICMP error about another packet is this packet's if it comes as often as that in a row:
/// the kernel reports each ICMP error once.
const CONFIRMED: u8 = 3;

/// What a packet asks of the kernel beyond being sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asks {
    /// To be cut into several packets.
    pub segments: bool,
    /// To leave from a certain address of this host.
    pub source: bool,
    /// To carry an ECN mark.
    pub ecn: bool,
}

impl Asks {
    const fn and(self, other: Self) -> Self {
        Self {
            segments: self.segments && other.segments,
            source: self.source && other.source,
            ecn: self.ecn && other.ecn,
        }
    }
}

/// What a packet that was refused is tried without, the likeliest cause first: an address that has been removed, then a
/// device that cannot segment, then a kernel that does not know the mark.
const WITHOUT: [Asks; 4] = [
    Asks { segments: true, source: false, ecn: true },
    Asks { segments: false, source: true, ecn: true },
    Asks { segments: false, source: false, ecn: true },
    Asks { segments: false, source: false, ecn: false },
];

/// What an error of `sendmsg` may be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Another packet: ICMP said that its port is closed.
    Others,
    /// An option of the packet, or the destination: `EINVAL`, `EIO`.
    Unsupported,
    /// The destination, or an ICMP error about another packet: no route, or a forbidden one.
    NoRoute,
    /// The size of the packet, or an ICMP error about another packet.
    TooLarge,
    /// This host: no memory, or a full device queue.
    Local,
    /// The socket, which is no longer usable.
    Broken,
}

impl Fault {
    pub fn of(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused | Kind::Interrupted => Self::Others,
            // A destination that may not be sent to is a route of type `prohibit`, or the host's firewall.
            Kind::NetworkUnreachable | Kind::HostUnreachable | Kind::AddrNotAvailable | Kind::PermissionDenied => {
                Self::NoRoute
            }
            Kind::InvalidInput => Self::Unsupported,
            Kind::BrokenPipe | Kind::NotConnected => Self::Broken,
            _ => Self::of_number(error.raw_os_error()),
        }
    }

    #[cfg(unix)]
    fn of_number(number: Option<i32>) -> Self {
        use nix::errno::Errno;
        match number.map(Errno::from_raw) {
            Some(Errno::EIO) => Self::Unsupported,
            Some(Errno::EMSGSIZE) => Self::TooLarge,
            Some(Errno::EBADF | Errno::ENOTSOCK | Errno::ESHUTDOWN) => Self::Broken,
            // Other ICMP errors, as Linux translates them.
            Some(Errno::EPROTO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EHOSTDOWN) => Self::Others,
            _ => Self::Local,
        }
    }

    #[cfg(not(unix))]
    fn of_number(_: Option<i32>) -> Self {
        Self::Local
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try again, asking for this much.
    Try(Asks),
    /// Nothing can be sent there.
    Refused,
    /// Lost, like a packet that the network lost.
    Lost,
}

/// One packet that is being sent.
#[derive(Debug)]
pub struct SendAttempt {
    asked: Asks,
    asks: Asks,
    /// The next of `WITHOUT`.
    rung: usize,
    tries: u8,
    last: Option<Fault>,
    in_a_row: u8,
}

impl SendAttempt {
    pub fn new(asked: Asks) -> Self {
        Self { asked, asks: asked, rung: 0, tries: 0, last: None, in_a_row: 0 }
    }

    pub fn failed(&mut self, fault: Fault) -> Next {
        self.tries += 1;
        self.in_a_row = if self.last.replace(fault) == Some(fault) { self.in_a_row + 1 } else { 1 };
        if self.tries >= MAX_TRIES {
            return Next::Lost;
        }
        match fault {
            Fault::Local | Fault::Broken => Next::Lost,
            Fault::Others => Next::Try(self.asks),
            Fault::TooLarge if self.in_a_row >= CONFIRMED => Next::Lost,
            Fault::NoRoute if self.in_a_row >= CONFIRMED => Next::Refused,
            // A route may be one for packets from another source.
            Fault::NoRoute if self.in_a_row + 1 == CONFIRMED => {
                self.asks.source = false;
                Next::Try(self.asks)
            }
            Fault::TooLarge | Fault::NoRoute => Next::Try(self.asks),
            Fault::Unsupported => self.less().map_or(Next::Refused, Next::Try),
        }
    }

    /// The same packet with fewer options.
    fn less(&mut self) -> Option<Asks> {
        while let Some(without) = WITHOUT.get(self.rung) {
            self.rung += 1;
            let asks = self.asked.and(*without);
            // A step that takes nothing away from what was tried last would try the same again.
            if asks != self.asked && asks != self.asks {
                self.asks = asks;
                return Some(asks);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Asks = Asks { segments: true, source: true, ecn: true };
    const NOTHING: Asks = Asks { segments: false, source: false, ecn: false };

    /// What becomes of a packet where the kernel returns this.
    fn sent(asked: Asks, mut kernel: impl FnMut(Asks) -> Result<(), Fault>) -> (Result<Asks, Next>, usize) {
        let (mut attempt, mut asks, mut tries) = (SendAttempt::new(asked), asked, 0);
        loop {
            tries += 1;
            match kernel(asks).map_err(|fault| attempt.failed(fault)) {
                Ok(()) => return (Ok(asks), tries),
                Err(Next::Try(less)) => asks = less,
                Err(over) => return (Err(over), tries),
            }
        }
    }

    #[test]
    fn a_packet_goes_without_the_one_thing_that_is_refused() {
        let without = |refused: fn(Asks) -> bool| {
            sent(ALL, |asks| if refused(asks) { Err(Fault::Unsupported) } else { Ok(()) }).0
        };
        assert_eq!(without(|asks| asks.source), Ok(Asks { source: false, ..ALL }));
        assert_eq!(without(|asks| asks.segments), Ok(Asks { segments: false, ..ALL }));
        assert_eq!(without(|asks| asks.segments || asks.source), Ok(Asks { ecn: true, ..NOTHING }));
        assert_eq!(without(|asks| asks.ecn), Ok(NOTHING));
    }

    #[test]
    fn a_destination_that_takes_nothing_refuses() {
        for (asked, tries) in [(ALL, 5), (Asks { ecn: true, ..NOTHING }, 2), (NOTHING, 1)] {
            assert_eq!(sent(asked, |_| Err(Fault::Unsupported)), (Err(Next::Refused), tries), "{asked:?}");
            assert_eq!(sent(asked, |_| Err(Fault::NoRoute)), (Err(Next::Refused), 3), "{asked:?}");
        }
    }

    #[test]
    fn icmp_errors_of_others_refuse_no_destination() {
        for fault in [Fault::Others, Fault::NoRoute, Fault::TooLarge] {
            for times in 0..CONFIRMED - 1 {
                let mut left = times;
                let kernel = |_| {
                    if left > 0 {
                        left -= 1;
                        Err(fault)
                    } else {
                        Ok(())
                    }
                };
                assert!(sent(ALL, kernel).0.is_ok(), "{fault:?} {times}");
            }
        }
        // Of two destinations in turn, without end.
        let mut turn = [Fault::Others, Fault::NoRoute].into_iter().cycle();
        assert_eq!(sent(ALL, |_| turn.next().map_or(Ok(()), Err)).0, Err(Next::Lost));
    }

    #[test]
    fn a_route_for_another_source_is_found() {
        let kernel = |asks: Asks| if asks.source { Err(Fault::NoRoute) } else { Ok(()) };
        assert_eq!(sent(ALL, kernel).0, Ok(Asks { source: false, ..ALL }));
    }

    #[test]
    fn a_lack_of_resources_on_this_host_is_a_lost_packet() {
        assert_eq!(sent(ALL, |_| Err(Fault::Local)), (Err(Next::Lost), 1));
        assert_eq!(sent(ALL, |_| Err(Fault::TooLarge)), (Err(Next::Lost), 3));
    }
}
