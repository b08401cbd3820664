//! Again and again, without leaks.

use std::net::TcpListener;
use std::sync::Arc;

use ft::Cancel;
use ft::config::{FtEnableConfig, FtState};
use ft::machine::Protected;

use crate::bed::{Bed, eventually};
use crate::fake::{FakeVm, identity, lock};

/// Threads of FT in this process, by their names; the other tests run beside this one in the same process, so it is
/// run in a process of its own.
fn count(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn cycles() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    let mut before = (0, 0);
    for cycle in 1..=20 {
        bed.protect();
        bed.vm.count_and_send();
        bed.vm.write_disk(cycle * 512, &[cycle as u8; 512]);
        eventually("output", || bed.vm.sent().len() as u64 == cycle);
        bed.arbiter_reachable("b", false);
        bed.relay.cut();
        bed.wait_primary(FtState::Solo);
        assert_eq!(bed.primary().info().generation, cycle);
        bed.primary.take().unwrap().shutdown();
        bed.arbiter_reachable("b", true);
        bed.wait_backup(FtState::Stopped);
        assert!(!*lock(&bed.vm.tracking) && lock(&bed.vm.interposer).is_none() && !bed.vm.is_paused());
        bed.new_backup();
        if cycle == 3 {
            before = (count("/proc/self/task"), count("/proc/self/fd"));
        }
    }
    eventually("all threads and descriptors gone", || {
        count("/proc/self/task") <= before.0 && count("/proc/self/fd") <= before.1
    });
    lock(&bed.vm.history).clear();
    // And the other way: the survivor of a takeover is protected by a new backup.
    for _ in 0..3 {
        bed.protect();
        bed.vm.count_and_send();
        bed.primary().failover().unwrap();
        bed.wait_backup(FtState::Solo);
        let live = bed.check_takeover();
        bed.primary.take().unwrap().shutdown();
        bed.vm = live;
        lock(&bed.vm.history).clear();
        lock(&bed.vm.wire).clear();
        bed.new_backup();
    }
}

/// Attempts that all come to nothing, each in its own way, as the search for a new backup makes them.
fn attempts() {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.protect();
    let other = FakeVm::new(identity("other"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("tcp:{}", gone.local_addr().unwrap())
    };
    let busy = bed.backup().address();
    let mute = format!("tcp:{}", silent.local_addr().unwrap());
    let mut before = (0, 0, 0);
    let counts = |bed: &Bed| {
        let store = bed.dir.path().join("store");
        (
            count("/proc/self/task"),
            count("/proc/self/fd"),
            count(store.to_str().unwrap()),
        )
    };
    for attempt in 1..=1000 {
        let cancel = Arc::new(Cancel::default());
        let ask = |peer: &str| {
            let config = FtEnableConfig {
                peer: peer.to_string(),
                ..bed.config()
            };
            let identity = other.identity().unwrap();
            ft::offer(identity, config, Arc::new(|_| ()), &cancel).err().unwrap()
        };
        match attempt % 3 {
            0 => assert_eq!(ask(&closed).code(), "ft_peer_unreachable"),
            1 => assert_eq!(ask(&busy).code(), "backup_busy"),
            _ => {
                // Ended by another thread, when the other side has the connection and says nothing.
                let ends = cancel.clone();
                let listener = silent.try_clone().unwrap();
                let ender = std::thread::spawn(move || {
                    let stream = listener.accept().unwrap();
                    ends.cancel();
                    stream
                });
                assert_eq!(ask(&mute).code(), "ft_handshake_failed");
                ender.join().unwrap();
                // Once ended, it stays so.
                assert_eq!(ask(&mute).code(), "ft_handshake_failed");
                silent.accept().unwrap();
            }
        }
        if attempt == 30 {
            before = counts(&bed);
        }
    }
    eventually("all threads, descriptors and marks gone", || {
        let now = counts(&bed);
        now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2
    });
    // The one that was there all the time noticed nothing.
    bed.vm.count_and_send();
    eventually("output", || bed.vm.sent() == [1]);
}

fn alone(name: &str, body: fn()) {
    if std::env::var_os("FT_CYCLES").is_some() {
        return body();
    }
    let exe = std::env::current_exe().unwrap();
    let status = std::process::Command::new(exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("FT_CYCLES", "1")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn twenty_losses_and_reprotections_leave_nothing_behind() {
    alone("cycles::twenty_losses_and_reprotections_leave_nothing_behind", cycles);
}

#[test]
fn a_thousand_attempts_leave_nothing_behind() {
    alone("cycles::a_thousand_attempts_leave_nothing_behind", attempts);
}
