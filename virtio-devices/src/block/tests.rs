use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::RwLock;

use proptest::prelude::*;

use super::file::{DiskFile, open_raw};
use super::uring::Uring;
use super::*;
use crate::testing::{BUFFERS, Driver, EVENT_IDX, clean, is_dirty, write_desc};

pub(super) const SIZE: u64 = 4 << 20;
pub(super) const QUEUE: u16 = 64;
const HEADER: u64 = BUFFERS;
pub(super) const DATA: u64 = BUFFERS + 0x1_0000;
const STATUS: u64 = BUFFERS + 0x8000;

pub(super) fn options(readonly: bool) -> BlockOptions {
    BlockOptions {
        readonly,
        serial: "a serial number of more than twenty bytes".into(),
        queue_size: QUEUE,
        block_size: 512,
    }
}

/// Held while a child process is made: until it is another program, it keeps the images of all tests open and locked.
pub(super) static SPAWNING: RwLock<()> = RwLock::new(());

/// Opens an image, which was closed before if it was open.
pub(super) fn open(options: &DiskOptions) -> Result<Arc<dyn DiskImage>, Error> {
    let _settled = SPAWNING.read().unwrap();
    super::image::open(options)
}

pub(super) fn raw(path: &Path, readonly: bool) -> DiskOptions {
    DiskOptions {
        path: path.into(),
        format: Format::Raw,
        readonly,
        direct: false,
        backing_files: false,
        shared: false,
    }
}

fn disk(path: &Path, readonly: bool, direct: bool) -> Arc<DiskFile> {
    let options = DiskOptions {
        direct,
        ..raw(path, readonly)
    };
    let _settled = SPAWNING.read().unwrap();
    Arc::new(open_raw(&options).unwrap())
}

pub(super) fn image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    image
}

/// A device on each kind of backend.
pub(super) fn devices(path: &Path, readonly: bool) -> [Box<dyn Fn() -> Block>; 2] {
    let path = path.to_path_buf();
    let other = path.clone();
    [
        Box::new(move || {
            let file = disk(&path, readonly, false);
            Block::new(options(readonly), Box::new(Uring::new(file, QUEUE).unwrap()))
        }),
        Box::new(move || {
            let file = disk(&other, readonly, false);
            Block::new(options(readonly), file.backend(QUEUE, true).unwrap())
        }),
    ]
}

/// Puts a request of `kind` into the queue: header and status byte of their own, by number `n`.
pub(super) fn request(driver: &mut Driver<Block>, n: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.put(HEADER + 16 * n, &header);
    driver.put(STATUS + n, &[0xee]);
    let mut chain = vec![(HEADER + 16 * n, 16, false)];
    chain.extend_from_slice(data);
    chain.push((STATUS + n, 1, true));
    driver.add(0, &chain);
}

/// Does one request; its status and the used length.
pub(super) fn one(driver: &mut Driver<Block>, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    request(driver, 0, kind, sector, data);
    driver.notify(0);
    let used = driver.wait_used(0, 1);
    (driver.get(STATUS, 1)[0], used[0].1)
}

pub(super) fn range(driver: &Driver<Block>, sector: u64, sectors: u32, flags: u32) -> [(u64, u32, bool); 1] {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sectors.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    driver.put(DATA, &bytes);
    [(DATA, 16, false)]
}

#[test]
fn writes_reads_flush_and_id() {
    let image = image();
    for make in devices(image.path(), false) {
        let mut driver = Driver::start(make(), EVENT_IDX);
        assert_eq!(driver.read(0x2000, 8), SIZE / 512);
        let pattern: Vec<u8> = (0..0x3000u32).map(|i| (i * 7) as u8).collect();
        driver.put(DATA, &pattern);
        let pieces = [
            (DATA, 0x1000, false),
            (DATA + 0x1000, 0x200, false),
            (DATA + 0x1200, 0x1e00, false),
        ];
        assert_eq!(one(&mut driver, 1, 3, &pieces), (0, 1));
        assert_eq!(one(&mut driver, 4, 0, &[]), (0, 1));
        clean(&driver.memory);
        let (a, b) = (DATA + 0x10_0000, DATA + 0x20_0000);
        assert_eq!(
            one(&mut driver, 0, 3, &[(a, 0x2a00, true), (b, 0x600, true)]),
            (0, 0x3001)
        );
        assert_eq!([driver.get(a, 0x2a00), driver.get(b, 0x600)].concat(), pattern);
        // Pages that the kernel wrote are in the dirty log, their neighbours are not.
        for page in [a, a + 0x1000, a + 0x2000, b, STATUS] {
            assert!(is_dirty(&driver.memory, page), "{page:#x}");
        }
        assert!(!is_dirty(&driver.memory, a + 0x3000) && !is_dirty(&driver.memory, DATA));
        assert_eq!(one(&mut driver, 8, 0, &[(a, 20, true)]), (0, 21));
        assert_eq!(driver.get(a, 20), b"a serial number of m");
        let values = driver.handle.device.core().model.counters().values();
        assert_eq!(
            (values["write_bytes"], values["read_bytes"], values["read_ops"]),
            (0x3000, 0x3000, 1)
        );
    }
}

#[test]
fn requests_that_cannot_be_are_answered_with_an_error() {
    let image = image();
    for make in devices(image.path(), false) {
        let mut driver = Driver::start(make(), 0);
        let data = [(DATA, 512, true)];
        let out = [(DATA, 512, false)];
        assert_eq!(one(&mut driver, 0, SIZE / 512, &data).0, 1, "past the end");
        assert_eq!(one(&mut driver, 0, u64::MAX / 512, &data).0, 1, "far past the end");
        assert_eq!(one(&mut driver, 1, u64::MAX, &out).0, 1);
        assert_eq!(one(&mut driver, 1, 0, &[(DATA, 100, false)]).0, 1, "half a sector");
        assert_eq!(one(&mut driver, 0, 0, &[]).0, 0, "nothing to read is read");
        assert_eq!(one(&mut driver, 99, 0, &[]).0, 2, "unknown");
        assert_eq!(one(&mut driver, 8, 0, &[(DATA, 19, true)]).0, 1, "no room for the id");
        assert_eq!(one(&mut driver, 11, 0, &[(DATA, 15, false)]).0, 1, "half a range");
        let flags = range(&driver, 0, 1, 2);
        assert_eq!(one(&mut driver, 11, 0, &flags).0, 2, "unknown flag");
        let long = range(&driver, 0, u32::MAX, 0);
        assert_eq!(one(&mut driver, 13, 0, &long).0, 1, "too long");
        assert!(!driver.handle.failed());
        // No place for the status byte.
        driver.add(0, &[(HEADER, 16, false)]);
        driver.notify(0);
        driver.wait_failed();
    }
}

#[test]
fn a_read_only_disk_is_only_read() {
    let image = image();
    image.as_file().write_all_at(b"fixed", 512).unwrap();
    for make in devices(image.path(), true) {
        let mut driver = Driver::start(make(), 0);
        assert_eq!(driver.handle.device.core().offered() & feature::RO, feature::RO);
        assert_eq!(one(&mut driver, 1, 1, &[(DATA, 512, false)]).0, 1);
        let zero = range(&driver, 1, 1, 0);
        assert_eq!(one(&mut driver, 13, 0, &zero).0, 1);
        assert_eq!(one(&mut driver, 4, 0, &[]).0, 0);
        assert_eq!(one(&mut driver, 0, 1, &[(DATA, 512, true)]).0, 0);
        assert_eq!(driver.get(DATA, 5), b"fixed");
    }
}

#[test]
fn discard_and_write_zeroes() {
    let image = image();
    for make in devices(image.path(), false) {
        image.as_file().write_all_at(&vec![0xaa; 1 << 20], 0).unwrap();
        let blocks = image.as_file().metadata().unwrap().blocks();
        let mut driver = Driver::start(make(), 0);
        let check = |at: u64, value: u8| {
            let mut bytes = [0; 512];
            image.as_file().read_exact_at(&mut bytes, at).unwrap();
            assert_eq!(bytes, [value; 512], "at {at}");
        };
        let unmap = range(&driver, 8, 512, 1);
        assert_eq!(one(&mut driver, 13, 0, &unmap).0, 0);
        let keep = range(&driver, 1024, 8, 0);
        assert_eq!(one(&mut driver, 13, 0, &keep).0, 0);
        let discard = range(&driver, 1200, 512, 0);
        assert_eq!(one(&mut driver, 11, 0, &discard).0, 0);
        for (sector, value) in [
            (7, 0xaa),
            (8, 0),
            (519, 0),
            (520, 0xaa),
            (1023, 0xaa),
            (1024, 0),
            (1032, 0xaa),
        ] {
            check(sector * 512, value);
        }
        assert!(image.as_file().metadata().unwrap().blocks() < blocks);
    }
    let file = disk(image.path(), false, false);
    image.as_file().write_all_at(&[1; 4096], 0).unwrap();
    file.write_zeroes(512, 2 << 20).unwrap();
    let mut bytes = [9; 1024];
    image.as_file().read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..512] == [1; 512] && bytes[512..] == [0; 512]);
}

#[test]
fn many_requests_at_once_and_a_hold_in_their_midst() {
    let image = image();
    for make in devices(image.path(), false) {
        let mut driver = Driver::start(make(), EVENT_IDX);
        for round in 0..20u8 {
            for n in 0..20u64 {
                driver.put(
                    DATA + 0x1000 * n,
                    &[round.wrapping_mul(31).wrapping_add(n as u8); 0x1000],
                );
                request(&mut driver, n, 1, 8 * n, &[(DATA + 0x1000 * n, 0x1000, false)]);
            }
            driver.notify(0);
            driver.handle.pause();
            // Whatever was started is in the used ring; and nothing more happens.
            let used = driver.used(0).len();
            assert!(!driver.handle.device.core().model.under_way());
            driver.handle.resume();
            driver.wait_used(0, 20 - used);
            for n in 0..20u64 {
                let mut byte = [0];
                image.as_file().read_exact_at(&mut byte, 0x1000 * n + 77).unwrap();
                assert_eq!(byte[0], round.wrapping_mul(31).wrapping_add(n as u8));
                assert_eq!(driver.get(STATUS + n, 1), [0]);
            }
        }
    }
}

#[test]
fn direct_io_takes_aligned_and_other_requests() {
    let image = image();
    let file = disk(image.path(), false, true);
    assert!(file.direct.is_some());
    let mut driver = Driver::start(Block::new(options(false), file.backend(QUEUE, false).unwrap()), 0);
    for (address, sector, len) in [(DATA, 0, 0x2000u32), (DATA + 7, 16, 0x1000), (DATA + 512, 3, 512)] {
        let pattern: Vec<u8> = (0..len).map(|i| (i ^ sector as u32) as u8).collect();
        driver.put(address, &pattern);
        assert_eq!(one(&mut driver, 1, sector, &[(address, len, false)]).0, 0);
        let back = DATA + 0x10_0000 + address % 0x1000;
        assert_eq!(one(&mut driver, 0, sector, &[(back, len, true)]).0, 0);
        assert_eq!(driver.get(back, len as usize), pattern);
    }
}

#[test]
fn an_image_is_opened_once_for_writing() {
    let image = image();
    let options = |readonly| raw(image.path(), readonly);
    let first = open(&options(false)).unwrap();
    for readonly in [false, true] {
        let e = open(&options(readonly)).unwrap_err().to_string();
        assert!(
            e.contains("in use") && e.contains(image.path().to_str().unwrap()),
            "{e}"
        );
    }
    drop(first);
    let _readers = (open(&options(true)).unwrap(), open(&options(true)).unwrap());
    assert!(open(&options(false)).is_err());
    let directory = DiskOptions {
        path: "/tmp".into(),
        ..options(true)
    };
    assert!(open(&directory).is_err());
}

#[test]
fn a_disk_that_shrank_gives_errors() {
    let image = image();
    for make in devices(image.path(), false) {
        image.as_file().set_len(SIZE).unwrap();
        let mut driver = Driver::start(make(), 0);
        image.as_file().set_len(SIZE / 2).unwrap();
        assert_eq!(one(&mut driver, 0, SIZE / 512 - 1, &[(DATA, 512, true)]).0, 1);
        assert_eq!(one(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0);
    }
}

#[test]
fn state_moves_to_another_device_and_only_to_an_equal_one() {
    let image = image();
    let [make, _] = devices(image.path(), false);
    let mut driver = Driver::start(make(), EVENT_IDX);
    driver.put(DATA, &[5; 512]);
    assert_eq!(one(&mut driver, 1, 9, &[(DATA, 512, false)]).0, 0);
    // A request that was made available while the device was held: the other one finds it.
    driver.handle.pause();
    request(&mut driver, 0, 0, 9, &[(DATA + 0x1000, 512, true)]);
    driver.notify(0);
    let other = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(image.path(), other.path()).unwrap();
    let [make, _] = devices(other.path(), false);
    let mut driver = driver.migrate(make());
    assert_eq!(driver.wait_used(0, 1).len(), 1);
    assert_eq!(driver.get(DATA + 0x1000, 512), [5; 512]);
    driver.handle.pause();
    let mut state = driver.handle.state();
    let DeviceState::Block(block) = &mut state.device else {
        panic!()
    };
    block.size += 512;
    assert!(
        driver
            .handle
            .set_state(&state)
            .unwrap_err()
            .to_string()
            .contains("bytes")
    );
}

#[test]
fn a_file_that_is_no_disk_is_refused_by_name() {
    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(b"short").unwrap();
    let file = disk(text.path(), true, false);
    assert_eq!(Block::new(options(true), file.backend(QUEUE, false).unwrap()).size, 0);
    let missing = open(&raw(Path::new("/nonexistent/disk"), true));
    assert!(missing.unwrap_err().to_string().contains("/nonexistent/disk"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_descriptor_table_fails_the_device_at_most(
        descs in prop::collection::vec(
            (0..0x120_0000u64, prop_oneof![Just(1u32), Just(16), Just(512), 0..0x4000u32, any::<u32>()],
             0..8u16, 0..20u16), 16),
        headers in prop::collection::vec((0..14u32, 0..SIZE / 256), 8),
        heads in prop::collection::vec(0..20u16, 1..40),
        pool in any::<bool>(),
    ) {
        let image = image();
        let make = &devices(image.path(), false)[usize::from(pool)];
        let mut driver = Driver::start(make(), 0);
        for (i, (kind, sector)) in headers.iter().enumerate() {
            let at = BUFFERS + 16 * i as u64;
            driver.put(at, &u64::from(*kind).to_le_bytes());
            driver.put(at + 8, &sector.to_le_bytes());
        }
        for (i, desc) in descs.iter().enumerate() {
            // Half of them are readable headers, so that requests get far.
            let desc = if i % 2 == 0 { (BUFFERS + 8 * i as u64, 16, desc.2 & !2, desc.3) } else { *desc };
            write_desc(&driver.memory, driver.queues[0].desc, i as u16, desc);
        }
        for head in heads {
            driver.make_available(0, head);
            driver.notify(0);
        }
        driver.handle.pause();
        let state = driver.handle.state();
        driver.handle.set_state(&state).ok();
        driver.handle.resume();
        driver.bring_up(0);
        driver.put(DATA, b"fine");
        prop_assert_eq!(one(&mut driver, 1, 0, &[(DATA, 512, false)]).0, 0);
        let mut bytes = [0; 4];
        image.as_file().read_exact_at(&mut bytes, 0).unwrap();
        prop_assert_eq!(&bytes, b"fine");
        prop_assert_eq!(image.as_file().metadata().unwrap().len(), SIZE);
    }
}
