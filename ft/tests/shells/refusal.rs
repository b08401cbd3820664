//! Pairings that must not come about, and strangers at the door.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::time::Duration;

use ft::config::FtState;

use crate::bed::Bed;
use crate::fake::{FakeVm, identity, lock};

#[test]
fn a_backup_of_another_shape_refuses_by_name_and_goes_on_listening() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let mut other = identity("vm");
    other.vcpus = 4;
    other.memory.pop();
    other.disks[0].size = 4096;
    *lock(&bed.host.identity) = Some(other);
    let error = bed.try_enable(bed.config()).err().unwrap();
    assert_eq!((error.status(), error.code()), (409, "memory_size_mismatch"));
    let text = error.to_string();
    for part in [
        "the vCPU count is 2 on the primary and 4 here",
        "memory size",
        "size of disk _disk0",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!*lock(&bed.vm.tracking) && !bed.vm.is_paused());
    bed.wait_backup(FtState::Listening);
    assert_eq!(*lock(&bed.host.discarded), 1);
    *lock(&bed.host.identity) = None;
    bed.protect();
}

#[test]
fn a_second_primary_is_refused_without_harm_to_the_first() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    let other = FakeVm::new(identity("other"));
    let error = ft::enable(other, bed.config(), std::sync::Arc::new(|_| ()))
        .err()
        .unwrap();
    assert_eq!((error.status(), error.code()), (409, "backup_busy"));
    bed.vm.count_and_send();
    crate::bed::eventually("output", || bed.vm.sent() == [1]);
    assert_eq!(bed.primary().info().state, FtState::Protected);
}

#[test]
fn strangers_are_dropped_without_harm() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let address = bed.backup().address().strip_prefix("tcp:").unwrap().to_string();
    let knock = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&address).unwrap();
        let _ = stream.write_all(bytes);
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Closed without a word (a reset is as good).
        assert!(!matches!(stream.read(&mut [0; 1]), Ok(n) if n > 0));
    };
    knock(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n................................");
    knock(&[0xff; 4096]);
    bed.protect();
    knock(b"CHFT and then something that is not a header of the log channel");
    let silent = TcpStream::connect(&address).unwrap();
    bed.vm.count_and_send();
    crate::bed::eventually("output", || bed.vm.sent() == [1]);
    assert_eq!(bed.primary().info().state, FtState::Protected);
    drop(silent);
}

#[test]
fn different_stores_are_found_out_before_anything_begins() {
    let bed = Bed::new(FakeVm::new(identity("vm")));
    std::fs::create_dir(bed.dir.path().join("elsewhere")).unwrap();
    std::fs::remove_file(bed.dir.path().join("b")).unwrap();
    symlink("elsewhere", bed.dir.path().join("b")).unwrap();
    let error = bed.try_enable(bed.config()).err().unwrap();
    assert_eq!(error.code(), "arbiter_mismatch", "{error}");
    std::fs::remove_file(bed.dir.path().join("b")).unwrap();
    let error = bed.try_enable(bed.config()).err().unwrap();
    assert!(error.to_string().contains("arbiter"), "{error}");
    // Marks are gone again.
    let store = std::fs::read_dir(bed.dir.path().join("store")).unwrap();
    let files: Vec<_> = store.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["store.id"]);
}

#[test]
fn bad_requests_are_named() {
    let bed = Bed::new(FakeVm::new(identity("vm")));
    let code = |change: &dyn Fn(&mut ft::config::FtEnableConfig)| {
        let mut config = bed.config();
        change(&mut config);
        let error = bed.try_enable(config).err().unwrap();
        (error.status(), error.code().to_string())
    };
    assert_eq!(code(&|c| c.arbiter = None), (400, "ft_no_arbiter".into()));
    assert_eq!(
        code(&|c| c.arbiter = Some("zk:x".into())),
        (400, "ft_bad_arbiter".into())
    );
    assert_eq!(
        code(&|c| c.arbiter = Some("file:/no/such".into())),
        (502, "ft_arbiter_unreachable".into())
    );
    assert_eq!(code(&|c| c.peer = "b:1".into()), (400, "ft_bad_address".into()));
    assert_eq!(
        code(&|c| c.peer = "tcp:192.0.2.1:1".into()),
        (400, "ft_insecure".into())
    );
    assert_eq!(
        code(&|c| c.peer = "unix:/no/such".into()),
        (502, "ft_peer_unreachable".into())
    );
    assert_eq!(
        code(&|c| c.limits.heartbeat_timeout_ms = 1),
        (400, "ft_limit_out_of_range".into())
    );
    assert!(!*lock(&bed.vm.tracking));
}

#[test]
fn unix_sockets_carry_the_channel_too() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let listen = format!("unix:{}", bed.dir.path().join("channel").display());
    bed.backup_with(|config| config.listen.clone_from(&listen));
    let mut config = bed.config();
    config.peer = listen;
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    bed.vm.count_and_send();
    crate::bed::eventually("output", || bed.vm.sent() == [1]);
    bed.primary().failover().unwrap();
    bed.wait_backup(FtState::Solo);
    bed.check_takeover();
}
