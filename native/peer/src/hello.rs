//! Whether the node at the other end of a connection has a node id, or had another key before (docs/protocol.md).

use bytes::{Bytes, BytesMut};
use macula_peer_core::errors::ConnectError;
use macula_peer_core::proto::codes::stream::WRONG_NODE;
use macula_peer_core::proto::session::{ASK_NODE, FOR_NODE, put_header};
use macula_peer_core::trust::Answer;
use macula_peer_core::types::{Fingerprint, NodeId};
use macula_peer_wire::HEADER_LEN;
use quinn::{Connection, ReadError, ReadExactError, RecvStream, SendStream, WriteError};

use crate::handshake::not_connected;
use crate::succession;

/// The type id of the frame that asks for the word of an old key.
pub(crate) const ASK_SUCCESSION: u8 = 0xF6;

/// The answer's single byte.
const HAS_NONE: u8 = 0;
const HAS_IT: u8 = 1;

/// Asks the node at the other end. It has to answer before anything for this node id goes to it.
pub(crate) async fn ask(connection: &Connection, node: &NodeId) -> Result<Answer, ConnectError> {
    let (mut send, mut receive) = connection.open_bi().await.map_err(not_connected)?;
    match send.write_chunk(frame(ASK_NODE, node.as_bytes())).await {
        Ok(()) => {}
        Err(WriteError::ConnectionLost(lost)) => return Err(not_connected(lost)),
        // The reason comes on the other half.
        Err(_) => {}
    }
    // It may be stopped already, which has the same effect.
    let _ = send.finish();
    let mut answer = [0];
    match (receive.read_exact(&mut answer).await, answer) {
        (Ok(()), [HAS_IT]) => Ok(Answer::HasIt),
        (Ok(()), [HAS_NONE]) => Ok(Answer::HasNone),
        (Err(ReadExactError::ReadError(ReadError::Reset(code))), _) if code == WRONG_NODE.into() => {
            Err(ConnectError::WrongNode)
        }
        (Err(ReadExactError::ReadError(ReadError::ConnectionLost(lost))), _) => Err(not_connected(lost)),
        (Ok(()) | Err(_), _) => Err(ConnectError::Handshake("the answer cannot be read".into())),
    }
}

/// Answers a node that asks. `None`: this node has another id.
pub(crate) async fn reply(mut receive: RecvStream, mut send: SendStream, answer: Option<Answer>) {
    let answer = match answer {
        Some(Answer::HasIt) => HAS_IT,
        Some(Answer::HasNone) => HAS_NONE,
        None => return refuse(&mut receive, &mut send),
    };
    // The peer may be gone. Dropping the stream finishes it.
    let _ = send.write_chunk(Bytes::copy_from_slice(&[answer])).await;
}

/// Asks the node at the other end for the word of a key that it had before. `None`: it has none to show.
pub(crate) async fn ask_succession(connection: &Connection, predecessor: Fingerprint) -> Option<Vec<u8>> {
    let (mut send, mut receive) = connection.open_bi().await.ok()?;
    send.write_chunk(frame(ASK_SUCCESSION, predecessor.as_bytes())).await.ok()?;
    // It may be stopped already, which has the same effect.
    let _ = send.finish();
    receive.read_to_end(succession::MAX_LEN).await.ok()
}

/// Answers a node that asks. `None`: this node never had that key.
pub(crate) async fn show_succession(mut receive: RecvStream, mut send: SendStream, statement: Option<Bytes>) {
    let Some(statement) = statement else { return refuse(&mut receive, &mut send) };
    // The peer may be gone. Dropping the stream finishes it.
    let _ = send.write_chunk(statement).await;
}

/// What comes on the stream is for another node.
pub(crate) fn refuse(receive: &mut RecvStream, send: &mut SendStream) {
    // It may be closed already, which has the same effect.
    let _ = receive.stop(WRONG_NODE.into());
    let _ = send.reset(WRONG_NODE.into());
}

/// The frame before a message that is for the node with this id alone.
pub(crate) fn addressed_to(node: &NodeId) -> Bytes {
    frame(FOR_NODE, node.as_bytes())
}

/// A question that every node with this key says yes to.
pub(crate) fn question(key: &Fingerprint) -> Bytes {
    frame(ASK_NODE, key.as_bytes())
}

fn frame(type_id: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER_LEN + payload.len());
    put_header(&mut frame, type_id, payload.len());
    frame.extend_from_slice(payload);
    frame.freeze()
}
