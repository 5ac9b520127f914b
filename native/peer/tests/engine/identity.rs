//! Keys, and how they are trusted.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use crate::common::{Forwarder, Inbox, PATIENCE, engine, frame, listener, message, request, send, until};
use macula_peer::{
    Certificate, Config, ConnectError, Dialect, Engine, Event, Fingerprint, Identity, IdentityError, Listen,
    ListenError, NotAFingerprint, PemError, RequestError, SendError, StartError, TlsError, UndeliveredReason, Verify,
    shown_key,
};
use macula_peer_testkit::quic::{client_config, server_config, tokio_runtime, transport};
use macula_peer_wire::MessageType::{Ping, Publish};
use quinn::ConnectionError;
use quinn::crypto::rustls::QuicServerConfig;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PublicKeyData};
use ring::digest::{SHA256, digest};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};

const SECOND: Duration = Duration::from_secs(1);

// ---- the file ----

#[cfg(unix)]
#[test]
fn a_file_is_made_for_its_owner_alone_and_read_again() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new("made");
    let path = directory.path("key.pem");
    let made = Identity::load_or_create(&path).unwrap().fingerprint();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(directory.names(), ["key.pem"]);
    assert_eq!(Identity::load_or_create(&path).unwrap().fingerprint(), made);
    assert_ne!(Identity::load_or_create(&directory.path("other.pem")).unwrap().fingerprint(), made);

    let engine = engine(Config { identity_file: Some(path), ..Config::default() });
    assert_eq!(engine.fingerprint(), made);
    engine.stop();
}

#[cfg(unix)]
#[test]
fn a_file_that_others_may_read_or_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new("permissions");
    let path = directory.path("key.pem");
    Identity::load_or_create(&path).unwrap();
    for (mode, secure) in [(0o640, false), (0o620, false), (0o604, false), (0o602, false), (0o400, true)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        match Identity::load_or_create(&path) {
            Ok(_) => assert!(secure, "{mode:o}"),
            Err(IdentityError::InsecurePermissions { mode: named }) => assert_eq!((secure, named), (false, mode)),
            Err(other) => panic!("{mode:o}: {other}"),
        }
    }
}

/// A user that may write them decides which keys this node trusts, or which key it has.
#[cfg(unix)]
#[test]
fn certificates_and_authorities_that_others_may_write_are_refused() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let directory = Directory::new("unaltered");
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["node".to_owned()]).unwrap().self_signed(&key).unwrap();
    let pem = directory.private("all.pem", &(key.serialize_pem() + &certificate.pem()));
    let engine = engine(Config::default());
    let listens = || {
        let files = Certificate::Files { certificate: pem.clone(), key: pem.clone() };
        let shown = engine.listen(Listen { certificate: files, ..Listen::default() });
        engine.close();
        let trusted = engine.listen(Listen { verify: Some(Verify::CaFile(pem.clone())), ..Listen::default() });
        engine.close();
        match (shown, trusted) {
            (Ok(_), Ok(_)) => true,
            (
                Err(ListenError::Certificate { why: PemError::File(_), .. }),
                Err(ListenError::Tls(TlsError::CaFile(_))),
            ) => false,
            other => panic!("{other:?}"),
        }
    };
    for (mode, accepted) in [(0o644, true), (0o664, false), (0o646, false), (0o600, true)] {
        fs::set_permissions(&pem, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(listens(), accepted, "{mode:o}");
    }
    // Only root may give a file away.
    if chown(&pem, Some(1001), None).is_ok() {
        assert!(!listens());
        let file = directory.path("key.pem");
        Identity::load_or_create(&file).unwrap();
        chown(&file, Some(1001), None).unwrap();
        let refused = Identity::load_or_create(&file);
        assert!(matches!(refused, Err(IdentityError::ForeignOwner { owner: 1001 })), "{refused:?}");
    }
    engine.stop();
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    use nix::sys::stat::Mode;
    let directory = Directory::new("irregular");
    assert_eq!(file_error(&directory.0), ErrorKind::IsADirectory);
    let fifo = directory.path("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    assert_eq!(file_error(&fifo), ErrorKind::InvalidInput);
    let engine = engine(Config::default());
    for file in [&directory.0, &fifo] {
        let certificate = Certificate::Files { certificate: file.clone(), key: file.clone() };
        let refused = engine.listen(Listen { certificate, ..Listen::default() }).unwrap_err();
        assert!(matches!(&refused, ListenError::Certificate { file: named, .. } if named == file), "{refused}");
        let refused = engine.listen(Listen { verify: Some(Verify::CaFile(file.clone())), ..Listen::default() });
        assert!(matches!(refused, Err(ListenError::Tls(TlsError::CaFile(_)))));
    }
    engine.stop();
}

/// As Kubernetes mounts a secret, and exchanges it.
#[cfg(unix)]
#[test]
fn a_file_may_be_reached_by_links() {
    use std::os::unix::fs::symlink;
    let directory = Directory::new("links");
    fs::create_dir(directory.path("..2026_11_28")).unwrap();
    let made = Identity::load_or_create(&directory.path("..2026_11_28/tls.key")).unwrap().fingerprint();
    symlink("..2026_11_28", directory.path("..data")).unwrap();
    symlink("..data/tls.key", directory.path("tls.key")).unwrap();
    assert_eq!(Identity::load_or_create(&directory.path("tls.key")).unwrap().fingerprint(), made);
    // One that leads nowhere is no place for a new key.
    symlink("..data/other.key", directory.path("other.key")).unwrap();
    assert_eq!(file_error(&directory.path("other.key")), ErrorKind::NotFound);
    assert_eq!(fs::read_dir(directory.path("..data")).unwrap().count(), 1);
}

#[test]
fn a_file_without_a_key_is_refused_and_left_alone() {
    let directory = Directory::new("garbage");
    let ca = Authority::new("a node");
    let (stranger, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let not_its_own = key.serialize_pem() + &ca.signed("127.0.0.1", &stranger);
    let cut_off = key.serialize_pem() + "-----BEGIN CERTIFICATE-----\nMIIB";
    let nonsense = key.serialize_pem() + "-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n";
    for (text, is_key) in
        [("", false), ("nonsense", false), (&ca.pem, false), (&not_its_own, true), (&cut_off, true), (&nonsense, true)]
    {
        let path = directory.private("key.pem", text);
        match (pem_error(&path), is_key) {
            (PemError::NoKey, false) | (PemError::BadCertificate(_) | PemError::OtherKey, true) => {}
            (other, _) => panic!("{text}: {other:?}"),
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    assert_eq!(file_error(&directory.path("nowhere/key.pem")), ErrorKind::NotFound);
    let path = directory.private("key.pem", "");
    let started = Engine::start(Config { identity_file: Some(path), ..Config::default() });
    assert!(matches!(started, Err(StartError::Identity(IdentityError::Pem(PemError::NoKey)))));
}

#[test]
fn keys_of_other_kinds_are_read() {
    let directory = Directory::new("kinds");
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let path = directory.private("key.pem", &key.serialize_pem());
        let alone = Identity::load_or_create(&path).unwrap().fingerprint();
        let path = directory.private("key.pem", &(Authority::new("ca").signed("node", &key) + &key.serialize_pem()));
        assert_eq!(Identity::load_or_create(&path).unwrap().fingerprint(), alone);
    }
    // In the older format for elliptic curves, a certificate must come with it.
    let sec1 = "-----BEGIN EC PRIVATE KEY-----\n\
        MHcCAQEEIAXguKgGHvKrRiw53rhCthViyQ4DU/YRE3dcZY0lsVoYoAoGCCqGSM49\n\
        AwEHoUQDQgAEG5PbdUsnsCuQXVq93WXRfKM9EKjhdL4+JJAdunbsMSOvO85KFylc\n\
        lIHusB+E8jsMpeFgM1glAbn5t6MchHfkMg==\n-----END EC PRIVATE KEY-----\n";
    let path = directory.private("sec1.pem", sec1);
    assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::NotPkcs8)));
}

#[test]
fn a_key_that_tls_cannot_use_is_named() {
    let directory = Directory::new("unusable");
    let nonsense = "-----BEGIN PRIVATE KEY-----\nbm9uc2Vuc2U=\n-----END PRIVATE KEY-----\n";
    for pem in [include_str!("../certificates/p521.key"), include_str!("../certificates/rsa1024.key"), nonsense] {
        let error = pem_error(&directory.private("key.pem", pem));
        assert!(matches!(error, PemError::UnsupportedKey), "{error:?}");
    }
    for pem in [include_str!("../certificates/encrypted.pkcs8.key"), include_str!("../certificates/encrypted.sec1.key")]
    {
        let error = pem_error(&directory.private("key.pem", pem));
        assert!(matches!(error, PemError::EncryptedKey), "{error:?}");
    }
    let version_1 =
        [include_str!("../certificates/version1.key"), include_str!("../certificates/version1.pem")].concat();
    assert!(matches!(pem_error(&directory.private("key.pem", &version_1)), PemError::OldCertificate));
}

#[test]
fn a_certificate_that_cannot_be_shown_is_named() {
    let directory = Directory::new("unshown");
    let engine = engine(Config::default());
    let (ca, key) = (Authority::new("ca"), KeyPair::generate().unwrap());
    let below = ca.below("below");
    let leaf = below.signed("node", &key);
    let key_pem = key.serialize_pem();
    let shown = |certificate: &str, key: &str| {
        let (certificate, key) = (directory.private("cert.pem", certificate), directory.private("key.pem", key));
        let listened =
            engine.listen(Listen { certificate: Certificate::Files { certificate, key }, ..Listen::default() });
        engine.close();
        listened.map(drop).map_err(|error| match error {
            ListenError::Certificate { file, why } => (file.file_name().unwrap().to_str().unwrap().to_owned(), why),
            other => panic!("{other}"),
        })
    };
    let rsa = [include_str!("../certificates/rsa2048.pem"), include_str!("../certificates/rsa2048.key")];
    for (certificate, key) in [
        (leaf.clone() + &below.pem, key_pem.clone()),
        // Any text around them, and the ends of lines of another system.
        ((leaf.clone() + &below.pem).replace('\n', "\r\n"), key_pem.replace('\n', "\r\n")),
        ("subject=node\n".to_owned() + &leaf, key_pem.clone() + &leaf),
        // TLS 1.3 lets the others come in any order.
        (leaf.clone() + &ca.pem + &below.pem, key_pem.clone()),
        (rsa[0].to_owned(), rsa[1].to_owned()),
    ] {
        shown(&certificate, &key).unwrap();
    }
    let old = include_str!("../certificates/version1.pem");
    let old_key = include_str!("../certificates/version1.key");
    for (certificate, key, file, expected) in [
        (below.pem.clone() + &leaf, &*key_pem, "cert.pem", PemError::OutOfOrder),
        (ca.pem.clone(), &key_pem, "cert.pem", PemError::OtherKey),
        (String::new(), &key_pem, "cert.pem", PemError::NoCertificate),
        (key_pem.clone(), &key_pem, "cert.pem", PemError::NoCertificate),
        (old.to_owned(), old_key, "cert.pem", PemError::OldCertificate),
        (leaf.clone(), "", "key.pem", PemError::NoKey),
        (leaf.clone(), &leaf, "key.pem", PemError::NoKey),
        (leaf.clone(), include_str!("../certificates/encrypted.pkcs8.key"), "key.pem", PemError::EncryptedKey),
        (leaf.clone(), include_str!("../certificates/p521.key"), "key.pem", PemError::UnsupportedKey),
    ] {
        let (named, why) = shown(&certificate, key).unwrap_err();
        assert_eq!((&*named, why.to_string()), (file, expected.to_string()));
    }
    engine.stop();
}

#[test]
fn two_starts_at_once_end_with_one_key() {
    let directory = Directory::new("race");
    for round in 0..20 {
        let path = directory.path(&format!("{round}.pem"));
        let barrier = Arc::new(Barrier::new(8));
        let starts: Vec<_> = (0..8)
            .map(|_| {
                let (path, barrier) = (path.clone(), barrier.clone());
                std::thread::spawn(move || {
                    barrier.wait();
                    Identity::load_or_create(&path).unwrap().fingerprint()
                })
            })
            .collect();
        let keys: Vec<_> = starts.into_iter().map(|start| start.join().unwrap()).collect();
        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    }
    assert_eq!(directory.names().len(), 20, "nothing is left behind");
}

#[test]
fn a_fingerprint_is_64_hexadecimal_digits() {
    let fingerprint = Identity::generate().unwrap().fingerprint();
    let text = fingerprint.to_string();
    assert_eq!(text.len(), 64);
    assert_eq!(text.parse(), Ok(fingerprint));
    assert_eq!(text.to_uppercase().parse(), Ok(fingerprint));
    assert_eq!(Fingerprint::from(*fingerprint.as_bytes()), fingerprint);
    for wrong in ["", &text[1..], &format!("{text}0"), &format!("+{}", &text[1..]), &format!("{}é", &text[2..])] {
        assert_eq!(wrong.parse::<Fingerprint>(), Err(NotAFingerprint), "{wrong}");
    }
}

/// The goodbye is lost, as when the process is killed: the next packet for it is answered by the new process.
#[test]
fn a_restarted_node_resets_the_connections_of_the_process_before() {
    let directory = Directory::new("reset");
    let config = || Config { identity_file: Some(directory.path("key.pem")), ..Config::default() };
    let (before, _, address) = listener(config());
    let address: SocketAddr = address.parse().unwrap();
    let forwarder = Forwarder::new(address, 0, 0.0, Duration::ZERO);
    let runtime = tokio_runtime(1).unwrap();
    let (client, connection) = runtime.block_on(connect(forwarder.address, "macula"));
    forwarder.swallow(true);
    before.stop();
    drop(before);
    let after = engine(Config { port: address.port(), ..config() });
    forwarder.swallow(false);
    let ended = runtime.block_on(async {
        let mut stream = connection.open_bi().await.unwrap().0;
        stream.write_all(&frame(Ping, 1, 100)).await.unwrap();
        tokio::time::timeout(PATIENCE, connection.closed()).await.expect("a reset")
    });
    assert_eq!(ended, ConnectionError::Reset);
    drop(client);
    after.stop();
}

// ---- both sides know the other's key ----

#[test]
fn both_sides_know_each_others_key_on_every_link() {
    let (server, inbox, endpoint) = listener(Config::default());
    let client = engine(Config { idle_timeout: SECOND / 10, ..Config::default() });
    for n in 0..2 {
        // The second link resumes the TLS session of the first.
        send(&client, &endpoint, message(Publish, n, PATIENCE)).unwrap();
        until("it arrives", || inbox.len() == n as usize + 1);
        until("the link is closed", || server.stats().accepted.is_empty());
    }
    for message in inbox.messages.lock().unwrap().iter() {
        assert_eq!((message.dialect, message.key), (Dialect::MaculaPeer1, Some(client.fingerprint())));
    }
    assert_eq!(client.stats().unverified, 0);
    client.stop();
    server.stop();
}

#[test]
fn a_client_without_a_certificate_may_only_speak_macula() {
    let (server, inbox, endpoint) = listener(Config::default());
    let runtime = tokio_runtime(1).unwrap();
    runtime.block_on(async {
        let (_client, ours) = connect(endpoint.parse().unwrap(), "macula-peer/1").await;
        let ended = tokio::time::timeout(PATIENCE, ours.closed()).await.unwrap();
        assert!(matches!(ended, ConnectionError::ApplicationClosed(close) if close.error_code == 5u8.into()));
        let (_client, theirs) = connect(endpoint.parse().unwrap(), "macula").await;
        say(&theirs).await;
        until("it arrives", || inbox.len() == 1);
    });
    let message = inbox.messages.lock().unwrap().remove(0);
    assert_eq!((message.dialect, message.key), (Dialect::Macula, None));
    server.stop();
}

#[test]
fn links_to_unverified_peers_are_counted() {
    let gateway = Gateway::macula();
    let (server, _, endpoint) = listener(Config::default());
    let pin = Verify::Pin(vec![server.fingerprint(), gateway.fingerprint()]);
    for (verify, of_gateway, of_ours) in [(Verify::FirstSeen, 1, 0), (Verify::None, 1, 1), (pin, 0, 0)] {
        let client = trusting(verify.clone());
        send(&client, &gateway.endpoint, message(Publish, 0, PATIENCE)).unwrap();
        assert_eq!(client.stats().unverified, of_gateway, "{verify:?}");
        send(&client, &endpoint, message(Publish, 0, PATIENCE)).unwrap();
        assert_eq!(client.stats().unverified, of_gateway + of_ours, "{verify:?}");
        client.stop();
    }
    server.stop();
}

// ---- keys of dialled peers ----

#[test]
fn only_a_pinned_peer_is_dialled() {
    let (server, inbox, endpoint) = listener(Config::default());
    let other = Identity::generate().unwrap().fingerprint();
    arrives(&trusting(Verify::Pin(vec![other, server.fingerprint()])), &endpoint, &inbox);
    fails(&trusting(Verify::Pin(vec![other])), &endpoint, &ConnectError::Untrusted);
    fails(&trusting(Verify::Pin(vec![])), &endpoint, &ConnectError::Untrusted);
    assert_eq!(inbox.len(), 2);
    server.stop();
}

#[test]
fn only_a_pinned_gateway_is_dialled() {
    let gateway = Gateway::macula();
    let client = trusting(Verify::Pin(vec![gateway.fingerprint()]));
    send(&client, &gateway.endpoint, message(Publish, 0, PATIENCE)).unwrap();
    client.stop();
    fails(&trusting(Verify::Pin(vec![client.fingerprint()])), &gateway.endpoint, &ConnectError::Untrusted);
}

/// msquic shows an X.509 version 1 certificate as any other.
#[test]
fn a_gateway_with_a_version_1_certificate_is_dialled() {
    let chain = CertificateDer::pem_slice_iter(include_bytes!("../certificates/version1.pem"));
    let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("../certificates/version1.key")).unwrap();
    let signer = default_provider().key_provider.load_private_key(key).unwrap();
    let pinned = <[u8; 32]>::try_from(digest(&SHA256, &signer.public_key().unwrap()).as_ref()).unwrap().into();
    // rustls takes another path for certificates that it can read.
    let shown = SingleCertAndKey::from(CertifiedKey::new(chain, signer));
    let mut tls = rustls::ServerConfig::builder_with_provider(default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(shown));
    tls.alpn_protocols = vec!["macula".into()];
    let tls = QuicServerConfig::try_from(tls).unwrap();
    let gateway = Gateway::start(quinn::ServerConfig::with_crypto(Arc::new(tls)));
    for verify in [Verify::FirstSeen, Verify::None, Verify::Pin(vec![pinned])] {
        let client = trusting(verify);
        send(&client, &gateway.endpoint, message(Publish, 0, PATIENCE)).unwrap();
        client.stop();
    }
    let other = trusting(Verify::Pin(vec![Identity::generate().unwrap().fingerprint()]));
    fails(&other, &gateway.endpoint, &ConnectError::Untrusted);
    let directory = Directory::new("version_1");
    let ca = trusting(Verify::CaFile(directory.private("ca.pem", &Authority::new("ca").pem)));
    fails(&ca, &gateway.endpoint, &ConnectError::Untrusted);
}

#[test]
fn only_a_peer_with_a_signed_certificate_is_dialled() {
    let directory = Directory::new("dialled");
    let (ca, namesake) = (Authority::new("ca"), Authority::new("ca"));
    let stranger = Authority::new("stranger");
    let trusting = |authority: &Authority| trusting(Verify::CaFile(directory.private("ca.pem", &authority.pem)));
    // The chain over an intermediate authority, which the node shows itself.
    let below = ca.below("below");
    let key = KeyPair::generate().unwrap();
    let chain = below.signed("127.0.0.1", &key) + &below.pem + &key.serialize_pem();
    for pem in [ca.node("127.0.0.1"), chain] {
        let file = directory.private("node.pem", &pem);
        let (server, inbox, endpoint) = listener(Config { identity_file: Some(file), ..Config::default() });
        arrives(&trusting(&ca), &endpoint, &inbox);
        fails(&trusting(&stranger), &endpoint, &ConnectError::Untrusted);
        fails(&trusting(&namesake), &endpoint, &ConnectError::Untrusted);
        let by_name = endpoint.replace("127.0.0.1", "localhost");
        fails(&trusting(&ca), &by_name, &ConnectError::Untrusted);
        server.stop();
    }
    let file = directory.private("node.pem", &ca.node("localhost"));
    let (server, inbox, endpoint) = listener(Config { identity_file: Some(file), ..Config::default() });
    arrives(&trusting(&ca), &endpoint.replace("127.0.0.1", "localhost"), &inbox);
    fails(&trusting(&ca), &endpoint, &ConnectError::Untrusted);
    server.stop();
    let (server, _, endpoint) = listener(Config::default());
    fails(&trusting(&ca), &endpoint, &ConnectError::Untrusted);
    server.stop();
}

// ---- keys of clients ----

#[test]
fn only_pinned_clients_are_let_in() {
    let (friend, stranger) = (engine(Config::default()), engine(Config::default()));
    let (server, inbox, endpoint) = admitting(Config::default(), Verify::Pin(vec![friend.fingerprint()]));
    arrives(&friend, &endpoint, &inbox);
    fails(&stranger, &endpoint, &ConnectError::NotTrusted);
    no_unknown_client_is_let_in(&endpoint);
    // Another listener of the same engine may let others in.
    assert!(server.close());
    let port = server.listen(Listen::default()).unwrap().port();
    assert!(endpoint.ends_with(&port.to_string()));
    arrives(&engine(Config::default()), &endpoint, &inbox);
    server.stop();
}

#[test]
fn only_clients_with_a_signed_certificate_are_let_in() {
    let directory = Directory::new("let_in");
    let (ca, namesake) = (Authority::new("ca"), Authority::new("ca"));
    let signed = |name: &str, pem: &str| {
        engine(Config { identity_file: Some(directory.private(name, pem)), ..Config::default() })
    };
    let verify = Verify::CaFile(directory.private("ca.pem", &ca.pem));
    // The engine's own mode is the listener's too.
    let file = directory.private("server.pem", &ca.node("127.0.0.1"));
    let (server, inbox, endpoint) = listener(Config { identity_file: Some(file), verify, ..Config::default() });
    arrives(&signed("client.pem", &ca.node("any.name")), &endpoint, &inbox);
    fails(&signed("namesake.pem", &namesake.node("any.name")), &endpoint, &ConnectError::NotTrusted);
    fails(&engine(Config::default()), &endpoint, &ConnectError::NotTrusted);
    no_unknown_client_is_let_in(&endpoint);
    server.stop();
}

#[test]
fn a_listener_may_show_a_certificate_of_its_own() {
    let directory = Directory::new("of_its_own");
    let ca = Authority::new("ca");
    let key = KeyPair::generate().unwrap();
    let server = engine(Config::default());
    let certificate = Certificate::Files {
        certificate: directory.private("cert.pem", &ca.signed("127.0.0.1", &key)),
        key: directory.private("key.pem", &key.serialize_pem()),
    };
    let port = server.listen(Listen { certificate, ..Listen::default() }).unwrap().port();
    let inbox = Arc::new(Inbox::default());
    server.set_handler(Some(inbox.clone()));
    let endpoint = format!("127.0.0.1:{port}");
    arrives(&trusting(Verify::CaFile(directory.private("ca.pem", &ca.pem))), &endpoint, &inbox);
    fails(&trusting(Verify::Pin(vec![server.fingerprint()])), &endpoint, &ConnectError::Untrusted);
    server.stop();
}

/// New connections see the renewed certificate; existing ones go on. Kubernetes replaces both files at once, through a
/// link.
#[cfg(unix)]
#[test]
fn a_renewed_certificate_is_shown_to_new_connections() {
    let directory = Directory::new("renewed");
    let pair = || {
        let key = KeyPair::generate().unwrap();
        let fingerprint = <[u8; 32]>::try_from(digest(&SHA256, &key.subject_public_key_info()).as_ref()).unwrap();
        (Authority::new("ca").signed("127.0.0.1", &key), key.serialize_pem(), Fingerprint::from(fingerprint))
    };
    let files = ["..data/cert.pem", "..data/key.pem"].map(|name| directory.path(name));
    let write = |version: &str, (certificate, key, _): &(String, String, Fingerprint)| {
        fs::create_dir(directory.path(version)).unwrap();
        directory.private(&format!("{version}/cert.pem"), certificate);
        directory.private(&format!("{version}/key.pem"), key);
        std::os::unix::fs::symlink(version, directory.path("..data_tmp")).unwrap();
        fs::rename(directory.path("..data_tmp"), directory.path("..data")).unwrap();
    };
    let (old, new, half) = (pair(), pair(), pair());
    write("..1", &old);
    let (server, inbox) = (engine(Config::default()), Arc::new(Inbox::default()));
    server.set_handler(Some(inbox.clone()));
    let certificate = Certificate::Files { certificate: files[0].clone(), key: files[1].clone() };
    let port = server.listen(Listen { certificate, ..Listen::default() }).unwrap().port();
    let endpoint = format!("127.0.0.1:{port}");
    let shows = |fingerprint| {
        let client = trusting(Verify::Pin(vec![fingerprint]));
        let sent = send(&client, &endpoint, message(Publish, 0, PATIENCE));
        client.stop();
        sent == Ok(())
    };
    // One that resumes its session if it can, and then sees no certificate.
    let runtime = tokio_runtime(1).unwrap();
    let config = client_config("macula", transport(100, 3)).unwrap();
    let again = runtime.block_on(async { quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap() });
    let shown_again = || {
        runtime.block_on(async {
            let address = endpoint.parse().unwrap();
            let connection = again.connect_with(config.clone(), address, "any").unwrap().await.unwrap();
            say(&connection).await;
            let shown = shown_key(&connection);
            tokio::time::sleep(SECOND / 10).await;
            connection.close(0u8.into(), b"");
            shown
        })
    };
    assert_eq!(shown_again(), Some(old.2));
    let before = trusting(Verify::Pin(vec![old.2]));
    send(&before, &endpoint, message(Publish, 0, PATIENCE)).unwrap();
    assert!(!shows(new.2));

    write("..2", &new);
    until("the new one is shown", || shows(new.2));
    assert!(!shows(old.2));
    send(&before, &endpoint, message(Publish, 0, PATIENCE)).expect("the old link is there");
    assert_eq!(before.stats().peers[0].dials, 1);
    assert_eq!(shown_again(), Some(new.2));

    // One file of two: the earlier certificate stays.
    fs::write(&files[0], &half.0).unwrap();
    std::thread::sleep(3 * SECOND);
    assert!(shows(new.2) && !shows(half.2));
    fs::write(&files[1], &half.1[..half.1.len() / 2]).unwrap();
    std::thread::sleep(3 * SECOND);
    assert!(shows(new.2));
    write("..3", &half);
    until("both are right", || shows(half.2));
    before.stop();
    server.stop();
}

#[test]
fn renewed_authorities_count_for_new_connections() {
    let directory = Directory::new("renewed_authorities");
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let trust = |authority: &Authority| Verify::CaFile(directory.private("ca.pem", &authority.pem));
    let node = |name: &str, authority: &Authority| {
        let file = directory.private(name, &authority.node("127.0.0.1"));
        engine(Config { identity_file: Some(file), idle_timeout: SECOND / 10, ..Config::default() })
    };
    let (of_old, of_new) = (node("old.pem", &old), node("new.pem", &new));
    let (server, inbox, endpoint) = admitting(Config::default(), trust(&old));
    let reaches = |client: &Engine, endpoint: &str| {
        let sent = send(client, endpoint, message(Publish, 0, PATIENCE));
        until("its link is closed", || client.stats().peers.is_empty());
        sent == Ok(())
    };
    assert!(reaches(&of_old, &endpoint) && !reaches(&of_new, &endpoint));
    let port = of_new.listen(Listen::default()).unwrap().port();
    let to_new = format!("127.0.0.1:{port}");
    let dialler = engine(Config { verify: trust(&old), idle_timeout: SECOND / 10, ..Config::default() });
    assert!(!reaches(&dialler, &to_new));
    trust(&new);
    until("the new authority counts", || reaches(&of_new, &endpoint));
    assert!(!reaches(&of_old, &endpoint));
    until("it counts when dialling", || reaches(&dialler, &to_new));
    assert!(inbox.len() >= 2);
    [of_old, of_new, dialler, server].iter().for_each(Engine::stop);
}

#[test]
fn authorities_that_cannot_be_read_are_named() {
    let directory = Directory::new("authorities");
    let start = |file: &Path| Engine::start(Config { verify: Verify::CaFile(file.into()), ..Config::default() });
    let missing = directory.path("missing.pem");
    assert!(matches!(start(&missing), Err(StartError::Tls(TlsError::CaFile(e))) if e.kind() == ErrorKind::NotFound));
    let server = engine(Config::default());
    for text in ["", "nonsense", &KeyPair::generate().unwrap().serialize_pem()] {
        let file = directory.private("ca.pem", text);
        assert!(matches!(start(&file), Err(StartError::Tls(TlsError::NotACertificate))), "{text}");
        let refused = server.listen(Listen { verify: Some(Verify::CaFile(file)), ..Listen::default() });
        assert!(matches!(refused, Err(ListenError::Tls(TlsError::NotACertificate))), "{text}");
    }
    server.listen(Listen::default()).unwrap();
    server.stop();
}

// ---- what a sender sees ----

/// It had a link, and the peer has changed its mind since.
#[test]
fn a_message_to_a_peer_that_no_longer_trusts_us_is_reported() {
    let (server, inbox, address) = listener(Config::default());
    let forwarder = Forwarder::new(address.parse().unwrap(), 0, 0.0, Duration::ZERO);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    let events = Arc::new(Inbox::default());
    client.set_handler(Some(events.clone()));
    send(&client, &endpoint, message(Publish, 0, PATIENCE)).unwrap();
    until("the link works", || inbox.len() == 1);
    forwarder.swallow(true);
    send(&client, &endpoint, message(Publish, 1, 3 * SECOND)).expect("accepted");
    server.close();
    server.listen(Listen { verify: Some(Verify::Pin(vec![])), ..Listen::default() }).unwrap();
    until("the silence is noticed", || client.stats().peers[0].dials > 1);
    forwarder.swallow(false);
    // The last word of the old link may be heard a moment before it is understood.
    let accepted = match send(&client, &endpoint, message(Publish, 2, 3 * SECOND)) {
        Ok(()) => 2,
        refused => {
            assert_eq!(refused, Err(ConnectError::NotTrusted.into()));
            1
        }
    };
    until("it is reported", || client.stats().undelivered == accepted);
    for reported in events.events.lock().unwrap().iter() {
        assert!(matches!(reported, Event::Undelivered { reason: UndeliveredReason::Expired, .. }));
    }
    assert_eq!(inbox.len(), 1);
    client.stop();
    server.stop();
}

/// Not as our listener does it: this one allows streams before it has seen the certificate.
#[test]
fn a_peer_that_refuses_us_late_costs_neither_an_answer_nor_a_storm() {
    let authority = Authority::new("an unknown authority");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate.der().clone()).unwrap();
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), default_provider().into()).build().unwrap();
    let made = rcgen::generate_simple_self_signed(["peer".into()]).unwrap();
    let mut tls = rustls::ServerConfig::builder_with_provider(default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![made.cert.into()], PrivateKeyDer::from(made.signing_key))
        .unwrap();
    tls.alpn_protocols = vec!["macula-peer/1".into()];
    let tls = QuicServerConfig::try_from(tls).unwrap();
    let peer = Gateway::start(quinn::ServerConfig::with_crypto(Arc::new(tls)));
    // Long enough for the link to be used before the refusal comes.
    let forwarder = Forwarder::new(peer.endpoint.parse().unwrap(), 0, 0.0, SECOND / 50);
    let endpoint = forwarder.address.to_string();
    let client = engine(Config::default());
    send(&client, &endpoint, message(Publish, 0, SECOND)).expect("accepted");
    let begun = Instant::now();
    let answer = request(&client, &endpoint, message(Ping, 1, 2 * SECOND));
    assert!(matches!(answer, Err(RequestError::Send(SendError::Connect(_)) | RequestError::Timeout)), "{answer:?}");
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
    until("it is reported", || client.stats().undelivered == 1);
    let dials = client.stats().peers[0].dials;
    assert!((2..30).contains(&dials), "{dials}");
    client.stop();
}

// ---- common ----

fn pem_error(path: &Path) -> PemError {
    match Identity::load_or_create(path) {
        Err(IdentityError::Pem(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("there is a key"),
    }
}

fn file_error(path: &Path) -> ErrorKind {
    match pem_error(path) {
        PemError::File(error) => error.kind(),
        other => panic!("{other}"),
    }
}

/// A directory of this test's own, as long as it runs.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("identity-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file with this text, for its owner alone.
    fn private(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        #[cfg(unix)]
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    }

    fn names(&self) -> Vec<String> {
        fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What cannot be removed is left behind.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A certificate authority.
struct Authority {
    pem: String,
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let (params, key) = (Self::params(name), KeyPair::generate().unwrap());
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), certificate, issuer: Issuer::new(params, key) }
    }

    /// An authority that this one vouches for.
    fn below(&self, name: &str) -> Self {
        let (params, key) = (Self::params(name), KeyPair::generate().unwrap());
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self { pem: certificate.pem(), certificate, issuer: Issuer::new(params, key) }
    }

    /// A key and its certificate.
    fn node(&self, name: &str) -> String {
        let key = KeyPair::generate().unwrap();
        key.serialize_pem() + &self.signed(name, &key)
    }

    fn signed(&self, name: &str, key: &KeyPair) -> String {
        CertificateParams::new([name.to_owned()]).unwrap().signed_by(key, &self.issuer).unwrap().pem()
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }
}

/// A bare quinn server that lets in clients by its settings, and reads nothing.
struct Gateway {
    endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl Gateway {
    fn macula() -> Self {
        Self::start(server_config(&["macula".into()], transport(100, 3)).unwrap())
    }

    fn start(config: quinn::ServerConfig) -> Self {
        let runtime = tokio_runtime(1).unwrap();
        let quic = runtime.block_on(async { quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap() });
        let endpoint = quic.local_addr().unwrap().to_string();
        runtime.spawn(async move {
            let mut connections = Vec::new();
            while let Some(incoming) = quic.accept().await {
                connections.extend(incoming.await.ok());
            }
        });
        Self { endpoint, _runtime: runtime }
    }

    fn fingerprint(&self) -> Fingerprint {
        tokio_runtime(1).unwrap().block_on(async {
            let (_client, connection) = connect(self.endpoint.parse().unwrap(), "macula").await;
            shown_key(&connection).unwrap()
        })
    }
}

/// A connection that shows no certificate and checks none.
async fn connect(to: SocketAddr, alpn: &str) -> (quinn::Endpoint, quinn::Connection) {
    let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = client_config(alpn, transport(100, 3)).unwrap();
    let connection = client.connect_with(config, to, "any").unwrap().await.unwrap();
    (client, connection)
}

async fn say(connection: &quinn::Connection) {
    let mut stream = connection.open_bi().await.unwrap().0;
    stream.write_all(&frame(Publish, 1, 10)).await.unwrap();
    stream.finish().unwrap();
}

fn trusting(verify: Verify) -> Engine {
    engine(Config { verify, ..Config::default() })
}

/// A listener that lets others in than its engine would.
fn admitting(config: Config, verify: Verify) -> (Engine, Arc<Inbox>, String) {
    let engine = engine(config);
    let inbox = Arc::new(Inbox::default());
    engine.set_handler(Some(inbox.clone()));
    let port = engine.listen(Listen { verify: Some(verify), ..Listen::default() }).unwrap().port();
    (engine, inbox, format!("127.0.0.1:{port}"))
}

#[track_caller]
fn arrives(client: &Engine, endpoint: &str, inbox: &Inbox) {
    let before = inbox.len();
    for n in 0..2 {
        send(client, endpoint, message(Publish, n, PATIENCE)).unwrap();
    }
    until("it arrives", || inbox.len() == before + 2);
    client.stop();
}

/// Every kind of call gets the reason, at once.
#[track_caller]
fn fails(client: &Engine, endpoint: &str, error: &ConnectError) {
    let begun = Instant::now();
    for n in 0..3 {
        let sent = send(client, endpoint, message(Publish, n, PATIENCE));
        assert_eq!(sent, Err(error.clone().into()));
        let asked = request(client, endpoint, message(Ping, n, PATIENCE));
        assert_eq!(asked, Err(SendError::from(error.clone()).into()));
    }
    assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());
    assert_eq!(client.stats().undelivered, 0);
    client.stop();
}

/// A client without a certificate gets no message through, in any dialect.
#[track_caller]
fn no_unknown_client_is_let_in(endpoint: &str) {
    let runtime = tokio_runtime(1).unwrap();
    for alpn in ["macula", "macula-peer/1"] {
        let ended = runtime.block_on(async {
            let (_client, connection) = connect(endpoint.parse().unwrap(), alpn).await;
            tokio::time::timeout(PATIENCE, connection.closed()).await.unwrap()
        });
        // RFC 8446: certificate_required.
        let refused = matches!(&ended, ConnectionError::ConnectionClosed(c) if u64::from(c.error_code) == 0x100 + 116);
        assert!(refused, "{alpn}: {ended:?}");
    }
}
