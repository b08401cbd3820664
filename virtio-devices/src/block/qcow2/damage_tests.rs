//! Damaged images, which somebody may have made on purpose.

use std::path::Path;

use tempfile::TempDir;

use super::tests::{made_by_qemu, options};
use crate::block::tests::open;

/// A header and tables with some of everything.
fn rich(dir: &TempDir) -> Vec<u8> {
    let path = made_by_qemu(dir, "cluster_size=512,refcount_bits=16");
    let image = open(&options(&path)).unwrap();
    image.write_at(0, &[1; 30_000]).unwrap();
    image.write_zeroes(4096, 8192, false).unwrap();
    image.write_at(5 << 20, &[2; 3000]).unwrap();
    drop(image);
    std::fs::read(path).unwrap()
}

fn survives(path: &Path, bytes: &[u8]) -> bool {
    std::fs::write(path, bytes).unwrap();
    let image = match open(&options(path)) {
        Ok(image) => image,
        Err(e) => {
            let e = std::error::Error::source(&e).unwrap().to_string();
            assert!(!e.contains("panicked"), "{e}");
            return false;
        }
    };
    let mut results = Vec::new();
    let mut buf = vec![0; 40_000.min(image.size() as usize)];
    results.push(image.read_at(0, &mut buf));
    for at in [0, 6000, 1 << 20, 5 << 20] {
        if at + 4096 <= image.size() {
            results.push(image.write_at(at, &[3; 4096]));
            results.push(image.write_zeroes(at + 100, 2000, at == 0));
            results.push(image.read_at(at, &mut buf[..4096.min(image.size() as usize)]));
        }
    }
    results.push(image.flush());
    for e in results.into_iter().filter_map(Result::err) {
        assert!(!e.to_string().contains("panicked"), "{e}");
    }
    true
}

#[test]
fn damaged_images_give_errors_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = rich(&dir);
    let path = dir.path().join("damaged");
    let (mut opened, mut random) = (0, 1u64);
    let mut next = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) as usize % below
    };
    // Every bit of the header, without the names of features.
    for bit in 0..112 * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        opened += usize::from(survives(&path, &damaged));
    }
    // Bits and bytes of everything else: tables are a good part of so small an image. Half of them with the mark of an
    // image that was not closed, so that refcounts are made anew.
    for round in 0..1500 {
        let mut damaged = bytes.clone();
        damaged[79] ^= round as u8 & 1;
        for _ in 0..=next(4) {
            let at = next(damaged.len());
            damaged[at] = [damaged[at] ^ 1 << next(8), next(256) as u8, 0xff, 0][next(4)];
        }
        if next(4) == 0 {
            damaged.truncate(next(bytes.len()));
        }
        opened += usize::from(survives(&path, &damaged));
    }
    assert!(opened > 300, "{opened}");
}
