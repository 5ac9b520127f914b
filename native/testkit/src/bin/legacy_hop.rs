//! Passes streams on in the dialect `macula` only, which two nodes of this library would not speak with each other.
//!
//! `legacy_hop --to ADDR`: what comes over a stream goes to ADDR over a stream, and back; the commands are `send FILE`,
//! which sends what a file holds to ADDR and says how long the answer was, `{ok,Bytes}`, `answer FILE`, from which on every
//! stream is answered with what the file holds instead, and `quit`.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use macula_peer_testkit::quic::{self, Error};
use macula_peer_testkit::{control, options::Options};
use quinn::{Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TokioRuntime};

/// How long to wait for an answer.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long it may take until all of what is sent has arrived.
const ARRIVES: Duration = Duration::from_secs(10);

type Answer = Arc<Mutex<Option<Bytes>>>;

fn main() -> Result<(), Error> {
    let options = Options::read(std::env::args().skip(1), &["--to"])?;
    let to: SocketAddr = options.require("--to")?;
    let runtime = quic::tokio_runtime(2)?;
    let endpoint = runtime.block_on(async { endpoint() })?;
    let answer = Answer::default();
    runtime.spawn(accept(endpoint.clone(), to, answer.clone()));
    control::serve(endpoint.local_addr()?.port(), |command| match command.split_once(' ')? {
        ("send", file) => Some(match runtime.block_on(send(&endpoint, to, file.as_ref())) {
            Ok(bytes) => format!("{{ok,{bytes}}}"),
            Err(error) => format!("{{error,{:?}}}", error.to_string()),
        }),
        ("answer", file) => {
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::fs::read(file).ok()?.into());
            Some(control::OK.into())
        }
        _ => None,
    })?;
    runtime.shutdown_background();
    Ok(())
}

fn endpoint() -> Result<Endpoint, Error> {
    let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let server = quic::server_config(&["macula".into()], quic::transport(100, 3))?;
    let mut endpoint = Endpoint::new(EndpointConfig::default(), Some(server), socket, Arc::new(TokioRuntime))?;
    endpoint.set_default_client_config(quic::client_config("macula", quic::transport(100, 3))?);
    Ok(endpoint)
}

async fn send(endpoint: &Endpoint, to: SocketAddr, file: &Path) -> Result<usize, Error> {
    let connection = endpoint.connect(to, "localhost")?.await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&std::fs::read(file)?).await?;
    send.finish()?;
    // Large ones take longer than the answer is waited for.
    let _ = tokio::time::timeout(ARRIVES, send.stopped()).await;
    let answer = tokio::time::timeout(PATIENCE, receive.read_to_end(usize::MAX)).await;
    Ok(answer.map_or(Ok(Vec::new()), |read| read)?.len())
}

async fn accept(endpoint: Endpoint, to: SocketAddr, answer: Answer) {
    while let Some(incoming) = endpoint.accept().await {
        let (endpoint, answer) = (endpoint.clone(), answer.clone());
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let Ok(connecting) = endpoint.connect(to, "localhost") else { return };
            let Ok(onward) = connecting.await else { return };
            while let Ok(stream) = connection.accept_bi().await {
                tokio::spawn(pass(stream, onward.clone(), answer.clone()));
            }
        });
    }
}

async fn pass((mut send, mut receive): (SendStream, RecvStream), onward: Connection, answer: Answer) {
    let fixed = answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(answer) = fixed {
        // The question counts as there when its first bytes are.
        let _ = receive.read_chunk(usize::MAX, true).await;
        let _ = send.write_all(&answer).await;
        let _ = send.finish();
        let _ = receive.read_to_end(usize::MAX).await;
        return;
    }
    let Ok((there, back)) = onward.open_bi().await else { return };
    tokio::join!(copy(receive, there), copy(back, send));
}

/// Copies one to its end, and then ends the other.
async fn copy(mut from: RecvStream, mut to: SendStream) {
    loop {
        let stopped = to.stopped();
        let chunk = tokio::select! {
            chunk = from.read_chunk(usize::MAX, true) => chunk,
            _ = stopped => {
                // Already closed is as good.
                let _ = from.stop(0u8.into());
                return;
            }
        };
        let Ok(Some(chunk)) = chunk else { break };
        if to.write_chunk(chunk.bytes).await.is_err() {
            break;
        }
    }
    // Already closed is as good.
    let _ = to.finish();
}
