//! Both sides with an arbiter in etcd (Debian's package `etcd-server`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ft::arbiter::Arbiter;
use ft::config::FtState;

use crate::bed::{Bed, eventually};
use crate::cluster::{Cluster, PATIENCE};
use crate::fake::{FakeVm, identity};
use crate::normal::busy_guest;

/// A bed whose backup has this arbiter, or the one that the primary names.
fn bed(arbiter: Option<String>) -> Bed {
    let mut bed = Bed::new(FakeVm::new(identity("vm")));
    bed.backup_with(|config| config.arbiter = arbiter);
    bed
}

fn protect(bed: &mut Bed, arbiter: String) {
    let mut config = bed.config();
    config.arbiter = Some(arbiter);
    bed.primary = Some(bed.try_enable(config).unwrap());
    bed.wait_primary(FtState::Protected);
    bed.wait_backup(FtState::Protected);
}

/// Both are told, and one goes on.
fn decided(bed: &Bed, cluster: &Cluster) {
    let end = std::time::Instant::now() + PATIENCE;
    let states = loop {
        let states = (bed.primary().info().state, bed.backup().info().state);
        let open = |state| {
            matches!(
                state,
                FtState::WaitingForArbiter | FtState::Protected | FtState::TakingOver
            )
        };
        if !open(states.0) && !open(states.1) {
            break states;
        }
        assert!(std::time::Instant::now() < end, "{states:?}");
        std::thread::sleep(Duration::from_millis(5));
    };
    let register = cluster.arbiter().read("vm").unwrap();
    assert_eq!(register.generation, 1);
    let winner = register.winner.unwrap();
    match states {
        (FtState::Solo, FtState::Stopped) => assert!(winner.starts_with("primary-"), "{winner}"),
        (FtState::Stopped, FtState::Solo) => assert!(winner.starts_with("backup-"), "{winner}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn etcd_lets_exactly_one_go_on() {
    let cluster = Cluster::start(1);
    let mut bed = bed(None);
    protect(&mut bed, cluster.description());
    assert_eq!(bed.backup().info().arbiter, Some(cluster.description()));
    let quit = Arc::new(AtomicBool::new(false));
    let guest = busy_guest(&bed.vm, &quit);
    eventually("epochs", || bed.primary().info().epochs_total >= 10);
    bed.relay.cut();
    decided(&bed, &cluster);
    quit.store(true, Ordering::SeqCst);
    guest.join().unwrap();
}

#[test]
fn etcd_that_is_silent_holds_both_until_it_answers() {
    let cluster = Cluster::start(1);
    let mut bed = bed(None);
    protect(&mut bed, cluster.description());
    cluster.freeze(0);
    bed.relay.cut();
    bed.wait_primary(FtState::WaitingForArbiter);
    bed.wait_backup(FtState::WaitingForArbiter);
    eventually("the reason", || {
        let reason = bed.primary().info().reason;
        reason.is_some_and(|reason| reason.contains("no answer within 5 s"))
    });
    assert_eq!(bed.backup().info().state, FtState::WaitingForArbiter);
    assert!(bed.host.live().is_none());
    cluster.thaw(0);
    decided(&bed, &cluster);
}

#[test]
fn another_etcd_on_the_backup_is_found_out_before_anything_begins() {
    let (ours, theirs) = (Cluster::start(1), Cluster::start(1));
    let bed = bed(Some(theirs.description()));
    let mut config = bed.config();
    config.arbiter = Some(ours.description());
    let error = bed.try_enable(config).err().unwrap();
    assert_eq!(error.code(), "arbiter_mismatch", "{error}");
}
