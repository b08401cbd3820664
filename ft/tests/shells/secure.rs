//! The log channel over TLS: certificates on both sides, no way around it.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use ft::config::{FtEnableConfig, FtState, FtTls};
use ft::machine::Output;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::bed::{Bed, eventually};
use crate::fake::{FakeVm, identity};

/// An authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    Authority { pem, issuer }
}

/// A directory with a certificate for `name`, signed by `signer`, that trusts `trusted`.
fn host(dir: &Path, name: &str, signer: &Authority, trusted: &Authority) -> FtTls {
    std::fs::create_dir_all(dir).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_string()]).unwrap();
    let certificate = params.signed_by(&key, &signer.issuer).unwrap();
    std::fs::write(dir.join("ca.pem"), &trusted.pem).unwrap();
    std::fs::write(dir.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    std::fs::set_permissions(dir.join("key.pem"), Permissions::from_mode(0o600)).unwrap();
    FtTls {
        dir: dir.to_path_buf(),
        peer: None,
    }
}

/// A bed whose backup takes only TLS, and the primary's side of it.
fn bed(backup_peer: Option<&str>) -> (Bed, Authority, FtTls) {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let ca = authority();
    let mut backup = host(&bed.dir.path().join("tls-b"), "127.0.0.1", &ca, &ca);
    backup.peer = backup_peer.map(str::to_string);
    let primary = host(&bed.dir.path().join("tls-p"), "primary.test", &ca, &ca);
    bed.backup_with(|config| config.tls = Some(backup));
    (bed, ca, primary)
}

fn with(bed: &Bed, tls: Option<FtTls>) -> FtEnableConfig {
    FtEnableConfig { tls, ..bed.config() }
}

#[test]
fn a_vm_is_protected_and_taken_over_through_tls() {
    let (mut bed, _ca, tls) = bed(Some("primary.test"));
    bed.primary = Some(bed.try_enable(with(&bed, Some(tls))).unwrap());
    eventually("protection", || bed.primary().info().state == FtState::Protected);
    for info in [bed.primary().info(), bed.backup().info()] {
        let transport = info.transport.unwrap();
        assert!(transport.starts_with("TLS 1.3, TLS13_"), "{transport}");
    }
    // More than all buffers on the way take at once.
    for n in 0..300u32 {
        bed.vm.write_ram(0, &vec![n as u8; 64 * 4096]);
        bed.vm.print(&"x".repeat(20_000));
    }
    eventually("all output", || {
        let wire = crate::fake::lock(&bed.vm.wire);
        let bytes = |o: &Output| {
            if let Output::Console { data, .. } = o {
                data.len()
            } else {
                0
            }
        };
        wire.iter().map(bytes).sum::<usize>() == 300 * 20_000
    });
    bed.relay.cut();
    bed.arbiter_reachable("p", false);
    bed.wait_backup(FtState::Solo);
    bed.check_takeover();
    bed.arbiter_reachable("p", true);
    bed.wait_primary(FtState::Stopped);
}

#[test]
fn a_backup_that_was_told_to_use_tls_takes_nothing_else() {
    let (bed, _ca, _tls) = bed(None);
    let error = bed.try_enable(with(&bed, None)).err().unwrap();
    assert_eq!(error.code(), "ft_handshake_failed", "{error}");
    let address = bed.backup().address().strip_prefix("tcp:").unwrap().to_string();
    let mut plain = TcpStream::connect(address).unwrap();
    plain
        .write_all(b"CHFT and the rest of a header of the log channel, and more")
        .unwrap();
    // At most a TLS alert.
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    assert_eq!(bed.backup().info().state, FtState::Listening);
}

#[test]
fn certificates_of_strangers_and_for_other_names_are_refused() {
    let (bed, ca, tls) = bed(Some("primary.test"));
    let stranger = authority();
    let dir = bed.dir.path();
    let cases = [
        // (directory, name, signed by, trusts, name wanted of the backup)
        ("signed-by-a-stranger", "primary.test", &stranger, &ca, None),
        ("trusts-a-stranger", "primary.test", &ca, &stranger, None),
        ("has-another-name", "somebody.test", &ca, &ca, None),
        ("wants-another-name", "primary.test", &ca, &ca, Some("other.test")),
    ];
    for (what, name, signer, trusted, wanted) in cases {
        let mut tls = host(&dir.join(what), name, signer, trusted);
        tls.peer = wanted.map(str::to_string);
        let error = bed.try_enable(with(&bed, Some(tls))).err().unwrap();
        assert!(
            ["ft_tls_failed", "ft_handshake_failed"].contains(&error.code()),
            "{what}: {error}"
        );
        assert_eq!(bed.backup().info().state, FtState::Listening, "{what}");
    }
    // After all that the right one is taken.
    drop(bed.try_enable(with(&bed, Some(tls))).unwrap());
}

#[test]
fn a_primary_that_was_told_to_use_tls_speaks_nothing_else() {
    let bed = Bed::new(FakeVm::new(identity("vm")));
    let ca = authority();
    let tls = host(&bed.dir.path().join("tls"), "primary.test", &ca, &ca);
    let error = bed.try_enable(with(&bed, Some(tls))).err().unwrap();
    assert_eq!((error.status(), error.code()), (502, "ft_tls_failed"), "{error}");
}

#[test]
fn unusable_files_are_named_before_anything_begins() {
    let bed = Bed::new(FakeVm::new(identity("vm")));
    let ca = authority();
    let dir = bed.dir.path().join("tls");
    let tls = host(&dir, "primary.test", &ca, &ca);
    let refused = |words: &str| {
        let error = bed.try_enable(with(&bed, Some(tls.clone()))).err().unwrap();
        assert_eq!((error.status(), error.code()), (400, "ft_tls_unusable"), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    std::fs::set_permissions(dir.join("key.pem"), Permissions::from_mode(0o644)).unwrap();
    refused("key.pem: others can read it");
    std::fs::set_permissions(dir.join("key.pem"), Permissions::from_mode(0o600)).unwrap();
    std::fs::write(dir.join("cert.pem"), "nothing").unwrap();
    refused("cert.pem: has no certificate");
    std::fs::remove_file(dir.join("ca.pem")).unwrap();
    refused("ca.pem");
    let unix = FtEnableConfig {
        peer: "unix:/nowhere".into(),
        ..with(&bed, Some(tls.clone()))
    };
    let error = bed.try_enable(unix).err().unwrap();
    assert!(error.to_string().contains("a Unix socket needs none"), "{error}");
}

#[test]
fn a_silent_connection_does_not_keep_its_place() {
    let (bed, _ca, tls) = bed(None);
    let address = bed.backup().address().strip_prefix("tcp:").unwrap().to_string();
    let mut slow: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let drip = {
        let done = done.clone();
        std::thread::spawn(move || {
            // The beginning of a TLS record, a byte at a time.
            for byte in [22u8, 3, 1, 1, 0].into_iter().chain(std::iter::repeat(1)) {
                if done.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                for stream in &mut slow {
                    let _ = stream.write_all(&[byte]);
                }
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        })
    };
    eventually("a place for the primary", || {
        bed.try_enable(with(&bed, Some(tls.clone()))).is_ok()
    });
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    drip.join().unwrap();
}
