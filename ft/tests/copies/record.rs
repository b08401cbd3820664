//! The sidecar: what is damaged, foreign or out of date is no proof.

use std::time::Duration;

use ft::copies::{BLOCK, BlockRun, CopyClaim, DiskHistory, SessionId, ShadowCopy, path_of};

use crate::{DISK, Host, SIZE, VM};

/// An image with a valid record of a killed backup.
fn left(dir: &tempfile::TempDir) -> Host {
    let host = Host::new(dir, "image");
    host.write(&(0, vec![7; 3 * BLOCK as usize]));
    let mut shadow = host.shadow();
    assert!(matches!(shadow.claim(), CopyClaim::Unknown(reason) if reason.contains("no record")));
    let id = SessionId {
        name: "primary-1".into(),
        generation: 3,
    };
    shadow.before_write(0, SIZE);
    shadow.synced(&id);
    shadow.before_write(BLOCK, 10);
    host.write(&(BLOCK, vec![8; 10]));
    drop(shadow);
    let CopyClaim::Known(claim) = host.shadow().claim() else {
        panic!("no claim")
    };
    assert_eq!(claim.session, id);
    assert!(claim.doubtful.is_empty() && claim.sample.len() == 41);
    host
}

fn unknown(host: &Host, reason: &str) {
    match host.shadow().claim() {
        CopyClaim::Unknown(found) => assert!(found.contains(reason), "{found}"),
        CopyClaim::Known(_) => panic!("a claim in spite of: {reason}"),
    }
    // Who does not believe a record removes it.
    assert!(matches!(host.shadow().claim(), CopyClaim::Unknown(reason) if reason.contains("no record")));
}

#[test]
fn r3_a_damaged_or_cut_record_is_no_proof() {
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    let path = path_of(&host.path);
    let good = std::fs::read(&path).unwrap();
    let entries = 4096..good.len();
    let places = (0..16).chain(16..200).chain(4080..4092).chain(entries);
    for at in places {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let claim = host.shadow().claim();
        // A bit of the unused rest of the header says nothing.
        let used = !(16..4080).contains(&at) || good[at..4080].iter().any(|b| *b != 0);
        assert_eq!(matches!(claim, CopyClaim::Unknown(_)), used, "bit in byte {at}");
    }
    for len in [1, 15, 100, 4095, 4096, good.len() - 1] {
        std::fs::write(&path, &good[..len]).unwrap();
        unknown(&host, "damaged");
    }
    std::fs::write(&path, [&good[..], &[0]].concat()).unwrap();
    unknown(&host, "damaged");
    std::fs::write(&path, good).unwrap();
    assert!(matches!(host.shadow().claim(), CopyClaim::Known(_)));
    std::fs::remove_file(&path).unwrap();
    unknown(&host, "no record");
}

#[test]
fn r3_a_record_of_something_else_is_no_proof() {
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    let good = std::fs::read(path_of(&host.path)).unwrap();
    let again = || std::fs::write(path_of(&host.path), &good).unwrap();
    let other = |vm, disk, size| ShadowCopy::open(&host.path, vm, disk, size).claim();
    for claim in [
        other("other", DISK, SIZE),
        other(VM, "_disk1", SIZE),
        other(VM, DISK, SIZE + 1),
    ] {
        assert!(matches!(claim, CopyClaim::Unknown(_)), "{claim:?}");
        again();
    }
    host.file.set_len(SIZE - 512).unwrap();
    unknown(&host, "size");
    host.file.set_len(SIZE).unwrap();
    again();
    // Another file in its place, the same bytes.
    let content = host.content();
    std::fs::rename(&host.path, dir.path().join("moved")).unwrap();
    std::fs::write(&host.path, content).unwrap();
    let host = Host::new(&dir, "image");
    unknown(&host, "another file");
}

#[test]
fn r3_an_image_that_was_changed_by_others_is_no_proof() {
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    std::thread::sleep(Duration::from_millis(1200));
    host.write(&(30 * BLOCK, vec![1]));
    unknown(&host, "changed after its VMM ended");
    // Sealed: any change counts, at once.
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    let seal = || {
        let mut shadow = host.shadow();
        assert!(matches!(shadow.claim(), CopyClaim::Known(_)));
        shadow.before_write(0, 1);
        shadow.close();
    };
    seal();
    assert!(matches!(host.shadow().claim(), CopyClaim::Known(_)));
    seal();
    // A clock tick of a file system is some milliseconds.
    std::thread::sleep(Duration::from_millis(20));
    host.write(&(30 * BLOCK, vec![1]));
    unknown(&host, "changed since its record was closed");
}

/// The host was booted meanwhile: what was sealed counts, what was open does not.
#[test]
fn r3_after_a_boot_only_a_sealed_record_is_a_proof() {
    for sealed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let host = left(&dir);
        if sealed {
            let mut shadow = host.shadow();
            shadow.claim();
            shadow.before_write(0, 1);
            shadow.close();
        }
        let path = path_of(&host.path);
        let mut bytes = std::fs::read(&path).unwrap();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let boot = boot.trim().as_bytes();
        let at = bytes.windows(boot.len()).position(|w| w == boot).unwrap();
        bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
        let end = 16 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let sum = crc32c::crc32c(&bytes[..end]);
        bytes[end..end + 4].copy_from_slice(&sum.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        match host.shadow().claim() {
            CopyClaim::Known(claim) => {
                assert!(sealed);
                // The write of the shadow that was sealed.
                assert_eq!(claim.doubtful, [BlockRun { first: 0, count: 1 }]);
            }
            CopyClaim::Unknown(reason) => assert!(!sealed && reason.contains("went down"), "{reason}"),
        }
    }
}

#[test]
fn r3_a_taken_over_disk_says_nothing_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    let history = DiskHistory::new(VM, DISK, SIZE, host.shadow().into_sidecar());
    let id = SessionId {
        name: "primary-1".into(),
        generation: 3,
    };
    history.took_over(&id);
    history.mark(0, 1);
    assert_eq!(history.divergence().unwrap().changed.len(), 1);
    unknown(&host, "no record");
    history.refute();
    assert!(history.divergence().is_none());
}

#[test]
fn r3_what_was_found_to_be_wrong_is_doubtful() {
    let dir = tempfile::tempdir().unwrap();
    let host = left(&dir);
    let mut shadow = host.shadow();
    shadow.claim();
    shadow.synced(&SessionId {
        name: "primary-2".into(),
        generation: 3,
    });
    shadow.before_write(0, 3 * BLOCK);
    shadow.doubt(7 * BLOCK + 5, BLOCK);
    drop(shadow);
    let CopyClaim::Known(claim) = host.shadow().claim() else {
        panic!("no claim")
    };
    assert_eq!(claim.doubtful, [BlockRun { first: 7, count: 2 }]);
}
