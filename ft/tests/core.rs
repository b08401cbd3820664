//! Single steps of the protocol core that the simulator does not look at by themselves.

#![allow(clippy::unwrap_used, clippy::panic)]

use ft::audit::{Mismatch, Place};
use ft::config::{FtLimits, FtState};
use ft::core::arbitration::Answer;
use ft::core::backup::{self, BackupState, Compared, ToPrimary};
use ft::core::primary::{self, FromBackup, PrimaryState};
use ft::core::staging::Staging;
use ft::core::{Nanos, ms};
use ft::machine::{DiskChange, DiskIdentity, Identity};

const TIMEOUT: Nanos = ms(500);

fn armed_primary() -> PrimaryState {
    armed(PrimaryState::new(7, (&FtLimits::default()).into(), 1, 1))
}

fn armed(mut primary: PrimaryState) -> PrimaryState {
    assert!(primary.begin_first_checkpoint());
    let done = primary::Event::Checkpointed {
        bytes: 1,
        dirty_bytes: 1,
        anew: 0,
    };
    assert_eq!(primary.step(done, ms(1)), [primary::Action::Resume]);
    primary
}

/// Epoch 1 is acknowledged and not applied yet.
fn lagging_backup() -> BackupState {
    let mut backup = BackupState::new(7, TIMEOUT, 1 << 20, 1);
    let actions = backup.step(
        backup::Event::Staged {
            epoch: 1,
            bytes: 1,
            durable: false,
        },
        ms(1),
    );
    assert!(actions.contains(&backup::Action::Send(ToPrimary::Ack(1))));
    backup
}

fn armed_backup() -> BackupState {
    let mut backup = lagging_backup();
    assert!(backup.step(backup::Event::Applied { epoch: 1 }, ms(1)).is_empty());
    backup
}

/// Signs of life every 50 ms, with the stamp that `echo` gives; when the primary loses the backup.
fn lost_at(primary: &mut PrimaryState, echo: impl Fn(Nanos) -> Nanos) -> Option<Nanos> {
    (1..2_000).map(|n| ms(50 * n)).find(|now| {
        let now = *now;
        let (echo, message) = (echo(now), FromBackup::Heartbeat);
        primary.step(primary::Event::Peer { echo, message }, now);
        let tick = primary::Event::Tick {
            heard: now,
            running_bytes: 0,
            output: true,
        };
        primary
            .step(tick, now)
            .contains(&primary::Action::AskArbiter { expected: 7 })
    })
}

#[test]
fn a_backup_that_lives_but_reads_nothing_is_lost_some_time() {
    let lost = lost_at(&mut armed_primary(), |_| ms(2)).unwrap();
    assert!((ms(30_000)..ms(31_000)).contains(&lost), "{lost}");
    // Slow is not deaf.
    assert_eq!(
        lost_at(&mut armed_primary(), |now| now.saturating_sub(ms(25_000))),
        None
    );
}

#[test]
fn outputs_leave_within_the_lease_alone() {
    let mut primary = armed_primary();
    assert!(!primary.may_release(ms(2)));
    let heartbeat = |echo| primary::Event::Peer {
        echo,
        message: FromBackup::Heartbeat,
    };
    primary.step(heartbeat(ms(2)), ms(3));
    assert!(primary.may_release(ms(376)) && !primary.may_release(ms(378)));
    primary.step(primary::Event::PeerLost("closed".into()), ms(10));
    assert!(!primary.may_release(ms(11)));
}

#[test]
fn after_a_closed_connection_the_backup_asks_at_once_after_garbage_when_the_lease_is_over() {
    let ask = backup::Action::AskArbiter { expected: 7 };
    let (heard, reason) = (ms(100), "so".to_string());
    let mut backup = armed_backup();
    let event = backup::Event::PeerLost {
        heard,
        reason: reason.clone(),
    };
    assert!(backup.step(event, ms(101)).contains(&ask));

    let mut backup = armed_backup();
    for now in (50..=100).map(ms) {
        assert!(backup.step(backup::Event::Tick { heard: now }, now).is_empty());
    }
    let actions = backup.step(backup::Event::PeerBroken { heard, reason }, ms(101));
    assert_eq!(actions, [backup::Action::Disconnect]);
    assert_eq!(backup.status().state, FtState::WaitingForArbiter);
    let asks = |now: &Nanos| !backup.step(backup::Event::Tick { heard }, ms(*now)).is_empty();
    assert_eq!((102..1000).find(asks), Some(601));
}

/// A win of a backup that cannot become the VM would stop a primary that could go on.
#[test]
fn a_backup_asks_the_arbiter_once_it_can_become_the_vm() {
    let ask = backup::Action::AskArbiter { expected: 7 };
    let lost = || backup::Event::PeerLost {
        heard: ms(2),
        reason: "closed".into(),
    };
    let failed = || backup::Event::ApplyFailed("no space".into());
    let mut backup = lagging_backup();
    assert_eq!(backup.step(lost(), ms(2)), [backup::Action::Disconnect]);
    assert!(backup.step(backup::Event::Tick { heard: ms(2) }, ms(3)).is_empty());
    assert_eq!(backup.step(backup::Event::Applied { epoch: 1 }, ms(4)), [ask]);
    assert_eq!(
        backup.step(backup::Event::Arbiter(Answer::Won), ms(5)),
        [backup::Action::Activate(1)]
    );

    let mut backup = lagging_backup();
    backup.step(lost(), ms(2));
    let actions = backup.step(failed(), ms(3));
    assert_eq!(actions, [backup::Action::Farewell, backup::Action::Discard]);
    assert!(backup.step(backup::Event::Tick { heard: ms(2) }, ms(4)).is_empty());

    // Asked by the primary to take over, it says that it will not: the primary goes on without asking the arbiter.
    let mut backup = lagging_backup();
    let handover = backup::Event::Peer(backup::FromPrimary::Handover(1));
    assert!(backup.step(handover, ms(2)).is_empty());
    let said = backup.step(failed(), ms(3));
    assert!(matches!(said[0], backup::Action::Send(ToPrimary::Bye(_))), "{said:?}");
    assert_eq!(backup.status().state, FtState::Failed);
}

#[test]
fn a_primary_that_does_not_wait_for_acknowledgements_is_dropped() {
    let mut backup = lagging_backup();
    for epoch in 2..100 {
        // Never applied, and more than the backlog: no acknowledgement.
        let event = backup::Event::Staged {
            epoch,
            bytes: 2 << 20,
            durable: false,
        };
        if backup.step(event, ms(2)).contains(&backup::Action::Disconnect) {
            assert_eq!(epoch, 8);
            return assert!(backup.status().reason.unwrap().contains("acknowledged"));
        }
    }
    panic!("100 epochs staged");
}

#[test]
fn r5_an_epoch_that_must_be_on_disk_is_acknowledged_once_it_is_applied() {
    let mut backup = armed_backup();
    let mut staged = |epoch, durable| {
        backup.step(
            backup::Event::Staged {
                epoch,
                bytes: 1,
                durable,
            },
            ms(2),
        )
    };
    let (ack, apply) = (
        |epoch| backup::Action::Send(backup::ToPrimary::Ack(epoch)),
        backup::Action::Apply,
    );
    assert_eq!(staged(2, false), [apply(2), ack(2)]);
    assert_eq!(staged(3, true), [apply(3)]);
    // What follows waits, too: acknowledgements are of everything before.
    assert_eq!(staged(4, false), [apply(4)]);
    let mut applied = |epoch| backup.step(backup::Event::Applied { epoch }, ms(3));
    assert!(applied(2).is_empty());
    assert_eq!(applied(3), [ack(4)]);
    assert!(applied(4).is_empty());
}

#[test]
fn a_lower_bound_does_not_condemn_what_is_on_its_way() {
    let identity = Identity {
        vm_id: "vm".into(),
        vmm_version: "1".into(),
        config: "{}".into(),
        memory: vec![(0, 4096)],
        vcpus: 1,
        cpu_features: Vec::new(),
        tsc_khz: 1,
        disks: vec![DiskIdentity {
            id: "_disk0".into(),
            size: 1 << 20,
            readonly: false,
            shared: None,
        }],
        nics: 0,
    };
    let mut staging = Staging::new(&identity, 10_000);
    let write = |staging: &mut Staging| {
        let (offset, data) = (0, vec![0; 4_000]);
        staging.disk(1, 0, DiskChange::Write { offset, data })
    };
    write(&mut staging).unwrap();
    staging.set_log_limit(1_000);
    write(&mut staging).unwrap();
    assert!(write(&mut staging).is_err());
}

fn acknowledged(primary: &mut PrimaryState, epoch: u64, now: Nanos) -> Vec<primary::Action> {
    let (echo, message) = (now, FromBackup::Ack(epoch));
    primary.step(primary::Event::Peer { echo, message }, now)
}

#[test]
fn r3_a_handover_waits_for_shared_disks_and_r5_outputs_do_if_they_must() {
    for durable in [false, true] {
        let primary = PrimaryState::new(7, (&FtLimits::default()).into(), 1, 1);
        let mut primary = armed(primary.with_shared_disks(durable));
        let (write, release) = (primary::Action::Write, primary::Action::Release);
        let both = if durable {
            vec![write(1)]
        } else {
            vec![write(1), release(1)]
        };
        assert_eq!(acknowledged(&mut primary, 1, ms(2)), both);
        let later = primary.step(primary::Event::Written(1), ms(3));
        assert_eq!(later.contains(&release(1)), durable);
        assert_eq!(
            primary.step(primary::Event::Failover, ms(3)),
            [primary::Action::Checkpoint]
        );
        let (bytes, dirty_bytes) = (1, 1);
        primary.step(
            primary::Event::Checkpointed {
                bytes,
                dirty_bytes,
                anew: 0,
            },
            ms(4),
        );
        let offer = primary::Action::Send(primary::ToBackup::Handover(2));
        assert!(!acknowledged(&mut primary, 2, ms(5)).contains(&offer));
        assert!(primary.step(primary::Event::Written(2), ms(6)).contains(&offer));
    }
}

#[test]
fn r1_a_guest_stands_still_while_shared_disks_take_nothing() {
    let limits = (&FtLimits::default()).into();
    let mut primary = armed(PrimaryState::new(7, limits, 1, 1).with_shared_disks(false));
    acknowledged(&mut primary, 1, ms(2));
    primary.note_held(limits.max_lag);
    let tick = primary::Event::Tick {
        heard: ms(200),
        running_bytes: 0,
        output: true,
    };
    let actions = primary.step(tick, ms(200));
    assert!(actions.contains(&primary::Action::Checkpoint), "{actions:?}");
    let (bytes, dirty_bytes) = (1, 1);
    assert_eq!(
        primary.step(
            primary::Event::Checkpointed {
                bytes,
                dirty_bytes,
                anew: 0
            },
            ms(201)
        ),
        []
    );
    // Committed, but there is no room yet.
    assert!(!acknowledged(&mut primary, 2, ms(202)).contains(&primary::Action::Resume));
    primary.note_held(0);
    assert!(
        primary
            .step(primary::Event::Written(2), ms(203))
            .contains(&primary::Action::Resume)
    );
}

fn wrong(gpa: u64) -> Mismatch {
    Mismatch {
        place: Place::Page { gpa },
        found: 1,
        expected: 2,
    }
}

fn compared(wrong: Vec<Mismatch>, right: Vec<Place>, anew: bool) -> backup::Event {
    let what = "audit: a page".into();
    backup::Event::Compared(Compared {
        wrong,
        what,
        anew,
        right,
    })
}

fn staged(epoch: u64) -> backup::Event {
    backup::Event::Staged {
        epoch,
        bytes: 1,
        durable: false,
    }
}

/// A backup that knows of a wrong page, with epoch 2 staged and applied.
fn damaged_backup() -> BackupState {
    let mut backup = lagging_backup().with_repair(true);
    let ask = backup::Action::Send(ToPrimary::Mismatch(vec![wrong(4096)]));
    assert_eq!(
        backup.step(compared(vec![wrong(4096)], Vec::new(), false), ms(2)),
        [ask]
    );
    backup.step(backup::Event::Applied { epoch: 1 }, ms(2));
    assert_eq!(backup.step(staged(2), ms(3)), [backup::Action::Apply(2)]);
    // The same place again, in an epoch that was under way: known already.
    assert_eq!(backup.step(compared(vec![wrong(4096)], Vec::new(), false), ms(3)), []);
    assert_eq!(backup.step(backup::Event::Applied { epoch: 2 }, ms(3)), []);
    assert_eq!(backup.status().state, FtState::Syncing);
    backup
}

#[test]
fn r2_a_backup_that_is_known_to_be_wrong_acknowledges_once_it_is_mended() {
    let mut backup = damaged_backup();
    backup.step(staged(3), ms(4));
    let right = vec![wrong(4096).place];
    assert_eq!(backup.step(compared(Vec::new(), right, true), ms(4)), []);
    let ack = backup::Action::Send(ToPrimary::Ack(3));
    assert_eq!(backup.step(backup::Event::Applied { epoch: 3 }, ms(4)), [ack]);
    assert_eq!(
        (backup.status().state, backup.audit_counts()),
        (FtState::Protected, (1, 1))
    );
}

#[test]
fn r2_a_backup_that_is_known_to_be_wrong_never_asks_the_arbiter() {
    let mut backup = damaged_backup();
    let lost = backup::Event::PeerLost {
        heard: ms(3),
        reason: "closed".into(),
    };
    let end = [
        backup::Action::Disconnect,
        backup::Action::Farewell,
        backup::Action::Discard,
    ];
    assert_eq!(backup.step(lost, ms(4)), end);
    let status = backup.status();
    assert_eq!(status.state, FtState::Failed);
    assert_eq!(
        status.reason.unwrap(),
        "closed; the shadow cannot take over: audit: a page"
    );
}

#[test]
fn r2_an_epoch_that_mends_and_came_in_time_makes_the_takeover_possible() {
    let mut backup = damaged_backup();
    backup.step(staged(3), ms(4));
    let lost = backup::Event::PeerLost {
        heard: ms(4),
        reason: "closed".into(),
    };
    assert_eq!(backup.step(lost, ms(5)), [backup::Action::Disconnect]);
    backup.step(compared(Vec::new(), vec![wrong(4096).place], true), ms(6));
    let ask = backup::Action::AskArbiter { expected: 7 };
    assert_eq!(backup.step(backup::Event::Applied { epoch: 3 }, ms(6)), [ask]);
}

#[test]
fn r6_a_handover_to_a_backup_that_is_found_wrong_leaves_the_vm_where_it_is() {
    let mut backup = lagging_backup().with_repair(true);
    backup.step(backup::Event::Peer(backup::FromPrimary::Handover(1)), ms(2));
    backup.step(compared(vec![wrong(0)], Vec::new(), false), ms(2));
    let actions = backup.step(backup::Event::Applied { epoch: 1 }, ms(2));
    assert!(
        matches!(&actions[0], backup::Action::Send(ToPrimary::Bye(_))),
        "{actions:?}"
    );
    assert_eq!(backup.status().state, FtState::Failed);
}

#[test]
fn a_primary_ends_epochs_at_once_while_places_must_be_sent_anew() {
    let mut primary = armed_primary();
    let told = |message| primary::Event::Peer { echo: ms(1), message };
    // Epoch 1 is in flight: usually there would be no other.
    assert_eq!(primary.deadline(), None);
    let mismatch = FromBackup::Mismatch {
        places: 2,
        what: "audit: a page".into(),
    };
    assert_eq!(primary.step(told(mismatch), ms(2)), [primary::Action::Checkpoint]);
    assert_eq!(primary.status().state, FtState::Syncing);
    let checkpoint = |anew| primary::Event::Checkpointed {
        bytes: 1,
        dirty_bytes: 1,
        anew,
    };
    let actions = primary.step(checkpoint(1), ms(3));
    assert_eq!(actions, [primary::Action::Resume, primary::Action::Checkpoint]);
    assert_eq!(primary.step(checkpoint(1), ms(4)), [primary::Action::Resume]);
    // The first of them mends one place.
    primary.step(told(FromBackup::Ack(2)), ms(5));
    assert_eq!(primary.status().state, FtState::Syncing);
    primary.step(told(FromBackup::Ack(3)), ms(6));
    assert_eq!(
        (primary.status().state, primary.status().reason),
        (FtState::Protected, None)
    );
}
