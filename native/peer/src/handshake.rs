//! The handshake of a connection, and why one failed.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use macula_peer_core::errors::ConnectError;
use macula_peer_core::proto::codes::connection::{DENIED, OVER_LIMIT, UNDECIDED};
use quinn::{ConnectError as NotBegun, Connection, ConnectionError, TransportErrorCode};
use tokio::time::timeout;

use crate::socket::Current;

/// Some networks drop packets that carry an ECN mark (RFC 9000, section 13.4.2). A handshake that has not been answered for
/// this long goes on without: before quinn sends its first packet again, which it does after a second.
const ECN_PATIENCE: Duration = Duration::from_millis(500);

/// RFC 9001, section 4.8: TLS alerts are QUIC errors from 0x100 on.
const ALERTS: u64 = 0x100;
const NO_APPLICATION_PROTOCOL: u64 = ALERTS + 120;

/// Waits for a handshake, of a dialled or an accepted connection, and continues it without ECN if that may be the
/// obstacle. quinn itself stops marking when the first acknowledgement tells it that no mark has arrived.
pub(crate) async fn handshake(
    socket: &Current,
    remote: SocketAddr,
    connecting: impl Future<Output = Result<Connection, ConnectionError>>,
) -> Result<Connection, ConnectionError> {
    let mut connecting = pin!(connecting);
    if let Ok(done) = timeout(ECN_PATIENCE, &mut connecting).await {
        return done;
    }
    tracing::debug!(%remote, "not answered yet: going on without ECN");
    socket.get().try_unmarked(remote);
    let done = connecting.await;
    if done.is_ok() {
        socket.get().stay_unmarked(remote);
    }
    done
}

/// Why a handshake did not begin.
pub(crate) fn not_begun(error: NotBegun) -> ConnectError {
    match error {
        NotBegun::InvalidRemoteAddress(_) => ConnectError::Unreachable,
        other => ConnectError::Handshake(other.to_string()),
    }
}

/// Why a connection was not made, or ended.
pub(crate) fn not_connected(error: ConnectionError) -> ConnectError {
    let (code, untrusted) = match &error {
        ConnectionError::TimedOut => return ConnectError::TimedOut,
        ConnectionError::ConnectionClosed(close) => (close.error_code, ConnectError::NotTrusted),
        ConnectionError::TransportError(error) => (error.code, ConnectError::Untrusted),
        ConnectionError::ApplicationClosed(close) if close.error_code == DENIED.into() => {
            return ConnectError::NotTrusted;
        }
        // It may be admitted later.
        ConnectionError::ApplicationClosed(close)
            if [UNDECIDED, OVER_LIMIT].iter().any(|&code| close.error_code == code.into()) =>
        {
            return ConnectError::Refused;
        }
        other => return ConnectError::Handshake(other.to_string()),
    };
    match code {
        TransportErrorCode::CONNECTION_REFUSED => ConnectError::Refused,
        code if u64::from(code) == NO_APPLICATION_PROTOCOL => ConnectError::NoProtocol,
        code if is_about_certificate(code) => {
            tracing::debug!(%error, "not trusted");
            untrusted
        }
        _ => ConnectError::Handshake(error.to_string()),
    }
}

/// RFC 8446, section 6.2: from `bad_certificate` to `certificate_unknown`, `unknown_ca`, `access_denied`,
/// `decrypt_error` (a signature is wrong) and `certificate_required`.
fn is_about_certificate(code: TransportErrorCode) -> bool {
    matches!(u64::from(code).checked_sub(ALERTS), Some(42..=46 | 48 | 49 | 51 | 116))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::net::Ipv4Addr;
    use std::sync::Arc;

    use super::*;
    use crate::socket::{Socket, refusals, signals};

    #[tokio::test]
    async fn a_handshake_keeps_no_socket_that_was_replaced() {
        let bind = || Socket::bind(Some(Ipv4Addr::LOCALHOST.into()), 0, None, refusals(), signals().0, Arc::default());
        let (first, second) = (bind().unwrap(), bind().unwrap());
        let (old, remote, current) = (Arc::downgrade(&first), second.local(), Current::new(first));
        let mut waiting = pin!(handshake(&current, remote, std::future::pending()));
        // It has changed what the first one sends by then.
        assert!(timeout(2 * ECN_PATIENCE, &mut waiting).await.is_err());
        current.set(second);
        assert!(old.upgrade().is_none());
    }
}
