//! Re-protection after a failover or a loss: only what differs of a disk is copied again (R3).

use std::path::PathBuf;
use std::sync::Arc;

use ft::config::FtState;
use ft::copies::{BLOCK, path_of};

use crate::bed::{Bed, eventually};
use crate::fake::{FakeVm, identity, lock};
use crate::image::Image;

const BLOCKS: u64 = 40;

/// A bed whose VM has a disk of many blocks, in files `0` (the VM's) and `1` (the backup's).
fn bed() -> Bed {
    let mut identity = identity("vm");
    identity.disks[0].size = BLOCKS * BLOCK;
    let vm = FakeVm::new(identity);
    let bed = Bed::new(vm);
    let image = Image::new(&path(&bed, 0), &bed.vm.identity, &bed.vm.contents().disks[0]);
    *lock(&bed.vm.image) = Some(image);
    *lock(&bed.host.image) = Some(path(&bed, 1));
    for block in 0..BLOCKS {
        bed.vm.write_disk(block * BLOCK, &[block as u8 + 1; 5000]);
    }
    bed
}

fn path(bed: &Bed, n: u64) -> PathBuf {
    bed.dir.path().join(format!("image{n}"))
}

/// Bytes that pre-copy left out.
fn skipped(bed: &Bed) -> u64 {
    bed.primary().info().progress.disk_bytes_skipped
}

/// The VM that took over becomes the primary, the image of the old one is the new backup's.
fn exchange(bed: &mut Bed) {
    let live = bed.check_takeover();
    let old = lock(&bed.vm.image).as_ref().unwrap().path.clone();
    bed.primary.take().unwrap().shutdown();
    bed.vm = live;
    lock(&bed.vm.history).clear();
    *lock(&bed.host.image) = Some(old);
    bed.new_backup();
}

/// Whoever takes over next has the right disk, in memory and in its image.
fn hand_over(bed: &mut Bed) {
    bed.primary().failover().unwrap();
    bed.wait_backup(FtState::Solo);
    let live = bed.check_takeover();
    assert!(std::fs::read(path_of_image(&live)).unwrap() == live.contents().disks[0]);
}

fn path_of_image(vm: &Arc<FakeVm>) -> PathBuf {
    lock(&vm.image).as_ref().unwrap().path.clone()
}

#[test]
fn r3_after_planned_failovers_only_changed_blocks_are_copied() {
    let mut bed = bed();
    bed.protect();
    assert_eq!(skipped(&bed), 0);
    for round in 0..10 {
        bed.vm.write_disk(round * BLOCK + 7, &[0x80; 100]);
        bed.vm.zero_disk((round + 3) * BLOCK, 10);
        hand_over(&mut bed);
        exchange(&mut bed);
        // Changed while it ran alone.
        bed.vm.write_disk((20 + round) * BLOCK, &[0x90; 100]);
        bed.protect();
        let left = BLOCKS * BLOCK - skipped(&bed);
        assert!((BLOCK..=4 * BLOCK).contains(&left), "{left} bytes were copied");
    }
    hand_over(&mut bed);
}

#[test]
fn r3_a_lost_primarys_uncommitted_writes_are_undone_on_its_disk() {
    for round in 0..4 {
        let mut bed = bed();
        bed.protect();
        bed.arbiter_reachable("p", false);
        bed.relay.stall(true);
        // The backup will never know of these.
        for n in 0..6 {
            bed.vm.write_disk((n * 5 + round) * BLOCK, &[0xee; 3000]);
        }
        bed.wait_backup(FtState::Solo);
        bed.arbiter_reachable("p", true);
        bed.wait_primary(FtState::Stopped);
        bed.relay.stall(false);
        let (old, new) = (path(&bed, 0), path(&bed, 1));
        assert!(std::fs::read(old).unwrap() != std::fs::read(new).unwrap());
        exchange(&mut bed);
        bed.protect();
        let left = BLOCKS * BLOCK - skipped(&bed);
        assert!((6 * BLOCK..30 * BLOCK).contains(&left), "{left} bytes were copied");
        hand_over(&mut bed);
    }
}

#[test]
fn r3_a_backup_that_comes_back_gets_what_it_missed() {
    let mut bed = bed();
    bed.protect();
    for round in 0..4 {
        bed.vm.write_disk(round * BLOCK, &[0x70; 100]);
        bed.arbiter_reachable("b", false);
        bed.relay.cut();
        bed.wait_primary(FtState::Solo);
        bed.vm.write_disk((10 + round) * BLOCK, &[0x71; 100]);
        bed.primary.take().unwrap().shutdown();
        bed.arbiter_reachable("b", true);
        bed.wait_backup(FtState::Stopped);
        bed.new_backup();
        lock(&bed.vm.history).clear();
        bed.protect();
        let left = BLOCKS * BLOCK - skipped(&bed);
        assert!((BLOCK..=BLOCKS / 2 * BLOCK).contains(&left), "{left} bytes were copied");
    }
    hand_over(&mut bed);
}

/// The backup was lost while it was protecting, and both sides have ended their sessions.
fn lost_backup() -> Bed {
    let mut bed = bed();
    bed.protect();
    bed.arbiter_reachable("b", false);
    bed.relay.cut();
    bed.wait_primary(FtState::Solo);
    bed.primary.take().unwrap().shutdown();
    bed.arbiter_reachable("b", true);
    bed.wait_backup(FtState::Stopped);
    bed.backup.take().unwrap().shutdown();
    bed
}

/// Everything is copied, whatever the backup's image says.
fn all_is_copied(change: impl FnOnce(&Bed)) {
    let mut bed = lost_backup();
    change(&bed);
    bed.new_backup();
    lock(&bed.vm.history).clear();
    bed.protect();
    assert_eq!(skipped(&bed), 0);
    hand_over(&mut bed);
}

#[test]
fn r3_a_tampered_or_missing_record_means_all_is_copied() {
    all_is_copied(|bed| {
        let sidecar = path_of(&path(bed, 1));
        let mut bytes = std::fs::read(&sidecar).unwrap();
        bytes[4096] ^= 1;
        std::fs::write(sidecar, bytes).unwrap();
    });
    all_is_copied(|bed| std::fs::remove_file(path_of(&path(bed, 1))).unwrap());
    // Another image.
    all_is_copied(|bed| {
        std::fs::remove_file(path(bed, 1)).unwrap();
        std::fs::write(path(bed, 1), vec![1; (BLOCKS * BLOCK) as usize]).unwrap();
    });
}

/// A record that is believed though its image was changed: the sample finds it.
#[test]
fn r3_a_claim_that_is_wrong_is_found_by_its_sample() {
    let mut bed = lost_backup();
    // Its record is open again, and the change comes within the time that a write may take.
    let image = std::fs::File::options().write(true).open(path(&bed, 1)).unwrap();
    let mut copy = ft::copies::ShadowCopy::open(&path(&bed, 1), "vm", "_disk0", BLOCKS * BLOCK);
    copy.claim();
    copy.before_write(39 * BLOCK, 1);
    std::os::unix::fs::FileExt::write_all_at(&image, &[0xcc; 9], 33 * BLOCK).unwrap();
    drop(copy);
    bed.new_backup();
    lock(&bed.vm.history).clear();
    bed.protect();
    assert_eq!(skipped(&bed), 0);
    assert!(lock(&bed.events).iter().any(|(_, event, _)| event == "disk_copy"));
    hand_over(&mut bed);
}

/// What came of it is doubtful, and copied the next time.
#[test]
fn r3_a_copy_that_is_broken_off_keeps_its_proof() {
    let mut bed = bed();
    bed.protect();
    hand_over(&mut bed);
    exchange(&mut bed);
    bed.vm.write_disk(5 * BLOCK, &[0x42; 100]);
    let mut config = bed.config();
    config.limits.precopy_mib_s = 1;
    bed.primary = Some(bed.try_enable(config).unwrap());
    eventually("some of the disk", || bed.backup().info().progress.disk_bytes_sent > 0);
    bed.relay.cut();
    bed.wait_primary(FtState::Failed);
    eventually("listening", || bed.backup().info().state == FtState::Listening);
    bed.primary.take().unwrap().shutdown();
    bed.protect();
    assert!(skipped(&bed) >= (BLOCKS - 4) * BLOCK);
    hand_over(&mut bed);
}
