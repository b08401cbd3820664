use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::block::image::{Format, create};
use crate::block::tests::{DATA, QUEUE, SPAWNING, one, open, options as device, range, raw};
use crate::block::{Block, backing_files};
use crate::testing::Driver;

const SIZE: u64 = 8 << 20;

pub(super) fn options(path: &Path) -> DiskOptions {
    DiskOptions {
        format: Format::Qcow2,
        ..raw(path, false)
    }
}

fn qemu_img(args: &[&str]) -> String {
    let mut command = Command::new("qemu-img");
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawning = SPAWNING.write().unwrap();
    let child = command.spawn().expect("qemu-img (package qemu-utils)");
    drop(spawning);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// QEMU finds no error, no leak.
fn clean(path: &Path) {
    let found = qemu_img(&["check", "-f", "qcow2", text(path)]);
    assert!(found.contains("No errors were found"), "{found}");
}

/// QEMU reads `bytes` from the image.
fn reads_as(path: &Path, bytes: &[u8]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(path), text(file.path())]);
}

fn whole(image: &dyn DiskImage) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// An image made by `qemu-img create` with these options.
pub(super) fn made_by_qemu(dir: &TempDir, how: &str) -> PathBuf {
    let path = dir.path().join("made.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !how.is_empty() {
        args.extend(["-o", how]);
    }
    let size = SIZE.to_string();
    args.extend([text(&path), &size]);
    qemu_img(&args);
    path
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    // Near the edges of clusters, and anywhere.
    let at = || {
        prop_oneof![
            0..SIZE / 512,
            (0..SIZE / 65536).prop_map(|c| c * 128),
            Just(SIZE / 512 - 1)
        ]
    };
    let len = || prop_oneof![1..16u64, 100..400u64, Just(128u64)];
    let fit = |at: u64, len: u64| (at * 512, (len * 512).min(SIZE - at * 512));
    prop_oneof![
        6 => (at(), len(), 1..255u8).prop_map(move |(a, l, b)| Step::Write(fit(a, l).0, fit(a, l).1 as usize, b)),
        3 => (at(), len(), any::<bool>()).prop_map(move |(a, l, u)| Step::Zero(fit(a, l).0, fit(a, l).1, u)),
        1 => (at(), len()).prop_map(move |(a, l)| Step::Discard(fit(a, l).0, fit(a, l).1)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

fn discard(image: &dyn DiskImage, offset: u64, len: u64) {
    // SAFETY: there are no pieces.
    unsafe { image.perform(BlockOp::Discard { offset, len }, &[]) }.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_is_written_is_read_back_by_us_and_by_qemu(
        how in prop_oneof![
            Just(""), Just("cluster_size=512"), Just("cluster_size=2M"), Just("refcount_bits=1"),
            Just("refcount_bits=64,cluster_size=4k"), Just("preallocation=metadata"), Just("lazy_refcounts=on"),
        ],
        ours in any::<bool>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = if ours {
            let path = dir.path().join("ours.qcow2");
            create(&path, Format::Qcow2, SIZE).unwrap();
            clean(&path);
            path
        } else {
            made_by_qemu(&dir, how)
        };
        let mut model = vec![0u8; SIZE as usize];
        let mut image = open(&options(&path)).unwrap();
        prop_assert_eq!(image.size(), SIZE);
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    image.write_at(at, &vec![byte; len]).unwrap();
                    model[at as usize..][..len].fill(byte);
                }
                Step::Zero(at, len, unmap) => {
                    image.write_zeroes(at, len, unmap).unwrap();
                    model[at as usize..][..len as usize].fill(0);
                }
                Step::Discard(at, len) => {
                    discard(image.as_ref(), at, len);
                    model[at as usize..][..len as usize].fill(0);
                }
                Step::Flush => image.flush().unwrap(),
                Step::Reopen => {
                    drop(image);
                    image = open(&options(&path)).unwrap();
                }
            }
        }
        prop_assert!(whole(image.as_ref()) == model);
        drop(image);
        clean(&path);
        reads_as(&path, &model);
    }
}

/// What a killed process leaves: the file as it is while the image is open.
fn killed(path: &Path) -> PathBuf {
    let copy = path.with_extension("killed");
    std::fs::copy(path, &copy).unwrap();
    copy
}

#[test]
fn an_image_that_was_not_closed_gets_right_refcounts_and_loses_nothing_that_was_flushed() {
    for how in [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = made_by_qemu(&dir, how);
        let image = open(&options(&path)).unwrap();
        let mut model = vec![0u8; SIZE as usize];
        for round in 0..20usize {
            for i in 0..8usize {
                let at = (round * 677 + i * 1301) % (SIZE as usize / 4096) * 4096;
                image.write_at(at as u64, &[round as u8 + 1; 4096]).unwrap();
                model[at..at + 4096].fill(round as u8 + 1);
            }
            let at = round * 131_072;
            image.write_zeroes(at as u64, 65_536, true).unwrap();
            model[at..at + 65_536].fill(0);
            if round % 2 == 0 {
                image.flush().unwrap();
                let copy = killed(&path);
                assert!(Header::read(&File::open(&copy).unwrap()).unwrap().dirty);
                // Only for reading, nothing can be repaired.
                let readonly = DiskOptions {
                    readonly: true,
                    ..options(&copy)
                };
                assert!(open(&readonly).unwrap_err().to_string().contains("not closed"));
                let again = open(&options(&copy)).unwrap();
                assert!(whole(again.as_ref()) == model, "{how}");
                // New clusters are none that are in use.
                again.write_at(0, &vec![0x5a; 1 << 20]).unwrap();
                let mut after = model.clone();
                after[..1 << 20].fill(0x5a);
                drop(again);
                clean(&copy);
                reads_as(&copy, &after);
            } else {
                // Not flushed: some of it may be lost, but the image is whole.
                let copy = killed(&path);
                drop(open(&options(&copy)).unwrap());
                clean(&copy);
            }
        }
    }
}

#[test]
fn compressed_images_and_old_ones_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (source, path) = (dir.path().join("raw"), dir.path().join("made.qcow2"));
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 1000) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    for how in ["compat=1.1", "compat=0.10"] {
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", how, text(&source), text(&path)]);
        let readonly = DiskOptions {
            readonly: true,
            ..options(&path)
        };
        assert!(whole(open(&readonly).unwrap().as_ref()) == bytes);
    }
    assert!(open(&options(&path)).unwrap_err().to_string().contains("compat=1.1"));
    qemu_img(&["convert", "-c", "-O", "qcow2", text(&source), text(&path)]);
    let image = open(&options(&path)).unwrap();
    image.write_at(100_000, &[9; 70_000]).unwrap();
    image.flush().unwrap();
    let copy = killed(&path);
    drop(image);
    let mut bytes = bytes;
    bytes[100_000..170_000].fill(9);
    drop(open(&options(&copy)).unwrap());
    for path in [path, copy] {
        clean(&path);
        reads_as(&path, &bytes);
    }
}

#[test]
fn many_threads_change_one_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path, Format::Qcow2, SIZE).unwrap();
    let image = open(&options(&path)).unwrap();
    const THREADS: u64 = 8;
    // Each has every eighth sector, so that all change every cluster at once.
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let image = image.as_ref();
            scope.spawn(move || {
                let mut random = thread + 1;
                let mut model = vec![0u8; (SIZE / 512 / THREADS) as usize];
                for _ in 0..3000 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let sector = (random >> 33) % model.len() as u64 % 200;
                    let at = (sector * THREADS + thread) * 512;
                    let cell = &mut model[sector as usize];
                    match (random >> 20) % 8 {
                        0 => {
                            image.write_zeroes(at, 512, random & 1 == 0).unwrap();
                            *cell = 0;
                        }
                        1 | 2 => {
                            let mut back = [0xee; 512];
                            image.read_at(at, &mut back).unwrap();
                            assert_eq!(back, [*cell; 512]);
                        }
                        3 => image.flush().unwrap(),
                        _ => {
                            *cell = (random >> 40) as u8;
                            image.write_at(at, &[*cell; 512]).unwrap();
                        }
                    }
                }
                for (sector, byte) in model.iter().enumerate() {
                    let mut back = [0xee; 512];
                    image
                        .read_at((sector as u64 * THREADS + thread) * 512, &mut back)
                        .unwrap();
                    assert_eq!(back, [*byte; 512]);
                }
            });
        }
    });
    let bytes = whole(image.as_ref());
    drop(image);
    clean(&path);
    reads_as(&path, &bytes);
}

#[test]
fn a_device_on_an_image() {
    let dir = tempfile::tempdir().unwrap();
    for direct in [false, true] {
        let path = dir.path().join(format!("image-{direct}"));
        create(&path, Format::Qcow2, SIZE).unwrap();
        let image = open(&DiskOptions {
            direct,
            ..options(&path)
        })
        .unwrap();
        let block = Block::new(device(false), image.clone().backend(QUEUE, false).unwrap());
        let mut driver = Driver::start(block, 0);
        driver.put(DATA, &[7; 0x3000]);
        let pieces = [
            (DATA, 0x200, false),
            (DATA + 0x400, 0x1e00, false),
            (DATA + 0x2200, 0x600, false),
        ];
        assert_eq!(one(&mut driver, 1, 3, &pieces).0, 0);
        let zeroes = range(&driver, 5, 2, 1);
        assert_eq!(one(&mut driver, 13, 0, &zeroes).0, 0);
        assert_eq!(one(&mut driver, 4, 0, &[]).0, 0);
        assert_eq!(one(&mut driver, 0, 0, &[(DATA + 0x10_0000, 0x3000, true)]), (0, 0x3001));
        let mut model = vec![0u8; SIZE as usize];
        model[3 * 512..][..0x2600].fill(7);
        model[5 * 512..][..1024].fill(0);
        assert!(driver.get(DATA + 0x10_0000, 0x3000) == model[..0x3000]);
        assert!(whole(image.as_ref()) == model);
        drop((driver, image));
        clean(&path);
        reads_as(&path, &model);
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, what: &str| {
        let e = std::error::Error::source(&open(&options(path)).unwrap_err())
            .unwrap()
            .to_string();
        assert!(e.contains(what), "{e}");
    };
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [1; 4096]).unwrap();
    refused(&raw, "no qcow2 image");
    std::fs::write(&raw, []).unwrap();
    refused(&raw, "no qcow2 image");
    refused(&made_by_qemu(&dir, "compat=0.10"), "compat=1.1");
    refused(&made_by_qemu(&dir, "compression_type=zstd"), "zlib");
    refused(&made_by_qemu(&dir, "extended_l2=on"), "extended L2");
    let data = dir.path().join("data");
    refused(
        &made_by_qemu(&dir, &format!("data_file={}", text(&data))),
        "external data file",
    );
    let path = made_by_qemu(&dir, "");
    qemu_img(&["bitmap", "--add", text(&path), "b"]);
    refused(&path, "bitmaps");
    let path = made_by_qemu(&dir, "");
    qemu_img(&["snapshot", "-c", "s", text(&path)]);
    refused(&path, "snapshots");
    assert!(
        open(&DiskOptions {
            readonly: true,
            ..options(&path)
        })
        .is_ok()
    );
    for (at, byte, what) in [
        (79, 2, "corrupt"),
        (79, 0x80, "bits 0x80"),
        (35, 2, "encrypted"),
        (7, 9, "version 9"),
    ] {
        let path = made_by_qemu(&dir, "");
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(&[byte], at)
            .unwrap();
        refused(&path, what);
    }
    let first = open(&options(&made_by_qemu(&dir, ""))).unwrap();
    let e = open(&options(&dir.path().join("made.qcow2"))).unwrap_err().to_string();
    assert!(e.contains("in use"), "{e}");
    drop(first);
}

#[test]
fn backing_files_are_read_when_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let bytes: Vec<u8> = (0..SIZE / 2).map(|i| (i / 700) as u8 | 1).collect();
    std::fs::write(at("base"), &bytes).unwrap();
    let make = |name: &str, below: &str, format: &str| {
        let size = SIZE.to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            below,
            "-F",
            format,
            text(&at(name)),
            &size,
        ]);
    };
    make("middle", "base", "raw");
    make("top", "middle", "qcow2");
    assert_eq!(backing_files(&at("top"), Format::Qcow2), [at("middle"), at("base")]);
    let plain = options(&at("top"));
    let e = open(&plain).unwrap_err();
    assert!(
        std::error::Error::source(&e)
            .unwrap()
            .to_string()
            .contains("backing_files=on")
    );
    let allowed = DiskOptions {
        backing_files: true,
        ..plain
    };
    let image = open(&allowed).unwrap();
    let mut model = bytes.clone();
    model.resize(SIZE as usize, 0);
    assert!(whole(image.as_ref()) == model);
    image.write_at(1000, &[0; 100]).unwrap();
    image.write_zeroes(200_000, 300_000, true).unwrap();
    model[1000..1100].fill(0);
    model[200_000..500_000].fill(0);
    assert!(whole(image.as_ref()) == model);
    // What is below is locked for as long.
    assert!(open(&options(&at("middle"))).is_err() && open(&raw(&at("base"), false)).is_err());
    drop(image);
    clean(&at("top"));
    reads_as(&at("top"), &model);
    assert!(std::fs::read(at("base")).unwrap() == bytes);

    let refused = |what: &str| {
        let e = std::error::Error::source(&open(&allowed).unwrap_err())
            .unwrap()
            .to_string();
        assert!(e.contains(what), "{e}");
    };
    let rebase = |args: &[&str]| qemu_img(&[&["rebase", "-u"], args, &[text(&at("top"))]].concat());
    rebase(&["-b", "nbd:localhost:1", "-F", "raw"]);
    refused("no path");
    rebase(&["-b", "base", "-F", "vmdk"]);
    refused("vmdk");
    rebase(&["-b", "none", "-F", "raw"]);
    refused("none");
    // Itself: it is locked.
    rebase(&["-b", "top", "-F", "qcow2"]);
    refused("in use");
    let mut below = "middle".to_string();
    for n in 0..MAX_BACKING {
        let name = format!("n{n}");
        make(&name, &below, "qcow2");
        below = name;
    }
    rebase(&["-b", &below, "-F", "qcow2"]);
    refused("more than 10");
}
