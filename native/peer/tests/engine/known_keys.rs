//! Keys of nodes outlive restarts, and change by the word of the key before.

use rmpv::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::raw::{ASK_NODE, Stream, bin, connect_as, raw_frame, stranger};
use crate::common::{
    Inbox, PATIENCE, endpoint, engine, listener, member_of, message, node_id, over, owes_nothing, relay, send_to_node,
    until,
};
use macula_peer::{
    Candidates, Config, ConnectError, Engine, Event, Fingerprint, HolePunching, KnownKeysError, Refusal, Registration,
    RouteError, SendError, StartError, Target,
};
use macula_peer_testkit::quic::{self, tokio_runtime};
use macula_peer_wire::MessageType::Publish;
use quinn::{Connection, VarInt};

const ASK_SUCCESSION: u8 = 0xF6;

fn untrusted() -> Result<(), SendError> {
    Err(RouteError::Node(ConnectError::Untrusted).into())
}

fn at(address: &str) -> Candidates {
    Candidates { endpoints: vec![endpoint(address)], ..Candidates::default() }
}

fn send(engine: &Engine, address: &str, n: u64) -> Result<(), SendError> {
    let sent = send_to_node(engine, "target", at(address), message(Publish, n, PATIENCE));
    until("it is acknowledged", || owes_nothing(engine));
    sent
}

/// A directory that is gone after the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("known-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn keeping(file: &Path) -> Engine {
    engine(Config { known_keys_file: Some(file.to_owned()), ..Config::default() })
}

fn target(config: Config) -> (Engine, Arc<Inbox>, String) {
    listener(Config { node_id: Some(node_id("target")), ..config })
}

/// Its port and files are free afterwards.
fn ended(engine: Engine) {
    engine.stop();
    drop(engine);
}

// ---- the file ----

#[test]
fn after_a_restart_the_wrong_key_is_refused_until_the_name_is_forgotten_for_good() {
    let directory = Directory::new("restart");
    let file = directory.path("keys");
    let ((right, inbox, right_address), (wrong, stolen, wrong_address)) =
        (target(Config::default()), target(Config::default()));
    let sender = keeping(&file);
    send(&sender, &right_address, 0).unwrap();
    ended(sender);
    let sender = keeping(&file);
    assert_eq!(send(&sender, &wrong_address, 1), untrusted());
    send(&sender, &right_address, 2).unwrap();
    assert_eq!((inbox.numbers(), stolen.len()), (vec![0, 2], 0));
    sender.forget(&node_id("target"));
    ended(sender);
    let sender = keeping(&file);
    send(&sender, &wrong_address, 3).expect("it was forgotten");
    ended(sender);
    let sender = keeping(&file);
    assert_eq!(send(&sender, &right_address, 4), untrusted());
    // A call that names the key counts more, and lasts too.
    let named = macula_peer::Message { key: Some(right.fingerprint()), ..message(Publish, 5, PATIENCE) };
    send_to_node(&sender, "target", at(&right_address), named).unwrap();
    ended(sender);
    let sender = keeping(&file);
    assert_eq!(send(&sender, &wrong_address, 6), untrusted());
    assert_eq!(stolen.numbers(), [3]);
    for engine in [sender, right, wrong] {
        engine.stop();
    }
}

#[test]
fn an_end_that_was_not_written_completely_costs_no_other_name() {
    let directory = Directory::new("torn");
    let file = directory.path("keys");
    let ((right, inbox, right_address), (wrong, _, wrong_address)) =
        (target(Config::default()), target(Config::default()));
    let sender = keeping(&file);
    send(&sender, &right_address, 0).unwrap();
    ended(sender);
    let mut text = fs::read_to_string(&file).unwrap();
    text.push_str("746172676574 0000");
    fs::write(&file, &text).unwrap();
    let sender = keeping(&file);
    assert_eq!(send(&sender, &wrong_address, 1), untrusted());
    send(&sender, &right_address, 2).unwrap();
    assert_eq!(inbox.len(), 2);
    for engine in [sender, right, wrong] {
        engine.stop();
    }
}

#[test]
fn a_damaged_file_stops_the_start_and_is_left_alone() {
    let directory = Directory::new("bad");
    let file = directory.path("keys");
    let refused = || match Engine::start(Config { known_keys_file: Some(file.clone()), ..Config::default() }) {
        Err(StartError::KnownKeys(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("started"),
    };
    let first = keeping(&file);
    assert!(matches!(refused(), KnownKeysError::InUse));
    ended(first);
    let damaged = "macula-peer known keys 1\n61 -\nxyz\n62 -\n";
    fs::write(&file, damaged).unwrap();
    assert!(matches!(refused(), KnownKeysError::BadLine(3)));
    assert_eq!(fs::read_to_string(&file).unwrap(), damaged);
    fs::write(&file, "-----BEGIN PRIVATE KEY-----\n").unwrap();
    assert!(matches!(refused(), KnownKeysError::NotKnownKeys));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(matches!(refused(), KnownKeysError::File(_)));
    fs::remove_dir(&file).unwrap();
    ended(keeping(&file));
    let nowhere = Config { known_keys_file: Some(directory.path("nowhere/keys")), ..Config::default() };
    assert!(matches!(Engine::start(nowhere), Err(StartError::KnownKeys(KnownKeysError::File(_)))));
}

#[cfg(unix)]
#[test]
fn a_file_that_others_may_write_or_own_is_refused() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let directory = Directory::new("others");
    let file = directory.path("keys");
    let started = || Engine::start(Config { known_keys_file: Some(file.clone()), ..Config::default() });
    ended(keeping(&file));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    for mode in [0o620, 0o602, 0o604] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        match started() {
            Err(StartError::KnownKeys(KnownKeysError::InsecurePermissions { mode: named })) => assert_eq!(named, mode),
            other => panic!("{mode:o}: {:?}", other.err()),
        }
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    // Only root may give a file away.
    if chown(&file, Some(1001), None).is_ok() {
        assert!(matches!(started(), Err(StartError::KnownKeys(KnownKeysError::ForeignOwner { owner: 1001 }))));
    }
}

#[cfg(unix)]
#[test]
fn a_file_behind_a_link_stays_where_it_is() {
    use std::os::unix::fs::symlink;
    let directory = Directory::new("link");
    fs::create_dir(directory.path("real")).unwrap();
    ended(keeping(&directory.path("real/keys")));
    symlink("real/keys", directory.path("keys")).unwrap();
    let (right, _, address) = target(Config::default());
    let sender = keeping(&directory.path("keys"));
    send(&sender, &address, 0).unwrap();
    ended(sender);
    assert!(fs::symlink_metadata(directory.path("keys")).unwrap().is_symlink());
    let text = fs::read_to_string(directory.path("real/keys")).unwrap();
    assert_eq!(text.lines().nth(1).map(str::to_owned), Some(format!("746172676574 {}", right.fingerprint())));
    right.stop();
}

// ---- another key ----

/// A node with its own key in a file, and its old keys.
fn with_key(directory: &Directory, key: &str, previous: &[&str], port: u16) -> Config {
    Config {
        identity_file: Some(directory.path(key)),
        previous_identity_files: previous.iter().map(|name| directory.path(name)).collect(),
        port,
        hole_punching: HolePunching::Off,
        ..Config::default()
    }
}

#[test]
fn a_statement_by_the_old_key_lets_a_node_change_its_key() {
    let directory = Directory::new("change");
    let file = directory.path("keys");
    let (before, inbox, address) = target(with_key(&directory, "a", &[], 0));
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let (other, _, _) = target(with_key(&directory, "other", &[], 0));
    ended(other);
    let sender = keeping(&file);
    send(&sender, &address, 0).unwrap();
    assert_eq!(inbox.len(), 1);
    ended(before);
    // A client without the old key, or with a statement by another one.
    for previous in [&[][..], &["other"]] {
        let (stranger, stolen, _) = target(with_key(&directory, "stranger", previous, port));
        assert_eq!(send(&sender, &address, 1), untrusted());
        assert_eq!(stolen.len(), 0);
        ended(stranger);
    }
    let (after, inbox, _) = target(with_key(&directory, "b", &["other", "a"], port));
    send(&sender, &address, 2).unwrap();
    assert_eq!(inbox.numbers(), [2]);
    ended(after);
    // The old key has nothing to say any more, and the sender remembers that.
    ended(sender);
    let sender = keeping(&file);
    let (old, stolen, _) = target(with_key(&directory, "a", &[], port));
    assert_eq!(send(&sender, &address, 3), untrusted());
    ended(old);
    let (thief, _, _) = target(with_key(&directory, "stranger", &["a"], port));
    assert_eq!(send(&sender, &address, 4), untrusted());
    ended(thief);
    let (after, inbox, _) = target(with_key(&directory, "b", &[], port));
    send(&sender, &address, 5).expect("it need not be said again");
    assert_eq!((inbox.numbers(), stolen.len()), (vec![5], 0));
    ended(after);
    sender.stop();
}

/// A call that names the old key meant that one alone.
#[test]
fn a_call_that_names_the_old_key_does_not_reach_the_new_one() {
    let directory = Directory::new("named");
    let (before, _, address) = target(with_key(&directory, "a", &[], 0));
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let old = before.fingerprint();
    ended(before);
    let (after, inbox, _) = target(with_key(&directory, "b", &["a"], port));
    let sender = engine(Config::default());
    let named = macula_peer::Message { key: Some(old), ..message(Publish, 0, PATIENCE) };
    assert_eq!(send_to_node(&sender, "target", at(&address), named), untrusted());
    assert_eq!(inbox.len(), 0);
    for engine in [sender, after] {
        engine.stop();
    }
}

#[test]
fn a_statement_by_the_old_key_moves_a_name_at_a_relay() {
    let directory = Directory::new("relay");
    let (relay, address) = relay(0);
    let (before, inbox) = member_of(with_key(&directory, "a", &[], 0), "target", &[&address]);
    let sender = engine(Config { hole_punching: HolePunching::Off, ..Config::default() });
    let send = |n| send_to_node(&sender, "target", over(&[&address]), message(Publish, n, PATIENCE));
    send(0).unwrap();
    until("it arrives", || inbox.len() == 1 && owes_nothing(&sender));
    ended(before);
    let (stranger, events) = registering(with_key(&directory, "stranger", &[], 0), &address);
    until("it is refused", || refused(&events));
    ended(stranger);
    // The name is still kept for the old key.
    let (after, inbox) = member_of(with_key(&directory, "b", &["a"], 0), "target", &[&address]);
    send(1).unwrap();
    until("it arrives", || inbox.numbers() == [1]);
    let (old, events) = registering(with_key(&directory, "a", &[], 0), &address);
    until("it is refused", || refused(&events));
    for engine in [sender, old, after, relay] {
        engine.stop();
    }
}

fn registering(config: Config, relay: &str) -> (Engine, Arc<Inbox>) {
    let engine = engine(config);
    let events = Arc::new(Inbox::default());
    engine.set_handler(Some(events.clone()));
    engine.register(node_id("target"), vec![endpoint(relay)]);
    (engine, events)
}

fn refused(events: &Inbox) -> bool {
    let taken = Registration::Refused(Refusal::NodeIdTaken);
    let events = events.events.lock().unwrap();
    events.iter().any(|event| matches!(event, Event::Registration { state, .. } if *state == taken))
}

#[test]
fn a_node_shows_only_statements_by_its_own_keys() {
    let directory = Directory::new("asked");
    let (before, _, _) = target(with_key(&directory, "a", &[], 0));
    let old = before.fingerprint();
    ended(before);
    let (after, _, address) = target(with_key(&directory, "b", &["a"], 0));
    let other: Fingerprint = [7; 32].into();
    tokio_runtime(2).unwrap().block_on(async {
        let connection = stranger(&address).await;
        for (asked, wanted) in [(&old.as_bytes()[..], true), (other.as_bytes(), false), (b"", false), (&[0; 64], false)]
        {
            let mut stream = Stream::open(&connection).await;
            stream.say(raw_frame(ASK_SUCCESSION, asked)).await;
            stream.send.finish().unwrap();
            let answer = stream.bytes(100).await;
            match wanted {
                true => assert_eq!(answer.map(|statement| statement[8..10].to_vec()), Ok(vec![0, 91])),
                false => assert_eq!(answer, Err(Some(VarInt::from_u32(7)))),
            }
        }
    });
    let target = node_id("target");
    assert!(after.path(&Target::Node(&target)).link.is_none());
    after.stop();
}

/// The answer of a node to a request for the statement by its old key.
async fn word(address: &str, old: Fingerprint) -> Vec<u8> {
    let connection = stranger(address).await;
    let mut stream = Stream::open(&connection).await;
    stream.say(raw_frame(ASK_SUCCESSION, old.as_bytes())).await;
    stream.send.finish().unwrap();
    stream.receive.read_to_end(4096).await.unwrap()
}

/// Claims to be every node, and to have had every key, or does not answer that.
async fn claims_all(connection: Connection, statement: Option<Vec<u8>>) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        let statement = statement.clone();
        tokio::spawn(async move {
            let mut header = [0; 8];
            let answer = match (receive.read_exact(&mut header).await.map(|()| header[1]), statement) {
                (Ok(ASK_NODE), _) => vec![1],
                (Ok(ASK_SUCCESSION), Some(statement)) => statement,
                // Until the connection ends.
                _ => return drop(receive.received_reset().await),
            };
            let _ = send.write_all(&answer).await;
            let _ = send.finish();
        });
    }
}

#[test]
fn a_statement_is_useless_to_other_keys() {
    let directory = Directory::new("thief");
    let (before, _, address) = target(with_key(&directory, "a", &[], 0));
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let (sender, old) = (engine(Config::default()), before.fingerprint());
    send(&sender, &address, 0).unwrap();
    ended(before);
    let (after, _, _) = target(with_key(&directory, "b", &["a"], port));
    let runtime = tokio_runtime(2).unwrap();
    let statement = runtime.block_on(word(&address, old));
    ended(after);
    assert!(statement.len() > 100);
    let mut forged = statement.clone();
    *forged.last_mut().unwrap() ^= 1;

    let inside = runtime.enter();
    for statement in [Some(&statement), Some(&forged), Some(&vec![]), Some(&vec![7; 5000]), None] {
        let config = quic::server_config(&["macula-peer/1".into()], quic::transport(100, 3)).unwrap();
        let thief = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
        let (at, statement) = (thief.local_addr().unwrap().to_string(), statement.cloned());
        let serving = runtime.spawn(async move {
            while let Some(incoming) = thief.accept().await {
                tokio::spawn(claims_all(incoming.await.unwrap(), statement.clone()));
            }
        });
        assert_eq!(send(&sender, &at, 1), untrusted());
        serving.abort();
    }
    drop(inside);

    let (relay, address) = relay(0);
    let (before, _) = member_of(with_key(&directory, "a", &[], 0), "target", &[&address]);
    runtime.block_on(async {
        let connection = stranger(&address).await;
        for statements in [vec![], vec![bin(&statement)], vec![bin(&forged), bin("noise"), bin(&statement)]] {
            let mut control = Stream::control(&connection).await;
            let said = control.ask(connect_as("target", &[("successions", Value::Array(statements))])).await;
            assert_eq!(said.text("error").as_deref(), Some("node_id_taken"));
        }
    });
    for engine in [sender, before, relay] {
        engine.stop();
    }
}
