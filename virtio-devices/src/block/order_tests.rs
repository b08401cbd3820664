//! What the device does while requests are under way, with a backend whose requests finish when the test says so.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tests::{DATA, QUEUE, SIZE, devices, image, one, options, request};
use super::*;
use crate::testing::{Driver, is_dirty};

/// A backend whose requests finish when the test says so.
struct Manual {
    event: EventFd,
    log: Arc<std::sync::Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    started: Vec<(u64, BlockOp)>,
    open: Vec<u64>,
    done: Vec<u64>,
    drained: usize,
}

impl BlockBackend for Manual {
    fn size(&self) -> u64 {
        SIZE
    }

    // SAFETY: asks less than the trait does: the iovecs are not looked into.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, _: &[libc::iovec]) -> std::io::Result<()> {
        let mut log = self.log.lock().unwrap();
        log.started.push((tag, op));
        log.open.push(tag);
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        let done = std::mem::take(&mut self.log.lock().unwrap().done);
        out.extend(done.into_iter().map(|tag| BlockCompletion { tag, result: Ok(0) }));
    }

    fn drain(&mut self) -> std::io::Result<()> {
        let mut log = self.log.lock().unwrap();
        let open = std::mem::take(&mut log.open);
        log.done.extend(open);
        log.drained += 1;
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

fn manual() -> (Block, Arc<std::sync::Mutex<Log>>, EventFd) {
    let log: Arc<std::sync::Mutex<Log>> = Arc::default();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let backend = Manual {
        event: event.try_clone().unwrap(),
        log: log.clone(),
    };
    (Block::new(options(false), Box::new(backend)), log, event)
}

#[test]
fn changes_that_overlap_wait_for_one_another() {
    let (block, log, _) = manual();
    let mut driver = Driver::start(block, 0);
    request(&mut driver, 0, 1, 0, &[(DATA, 4096, false)]);
    request(&mut driver, 1, 1, 8, &[(DATA, 4096, false)]);
    request(&mut driver, 2, 0, 0, &[(DATA, 4096, true)]);
    driver.notify(0);
    driver.wait_for("three requests", |_| log.lock().unwrap().started.len() == 3);
    assert_eq!(log.lock().unwrap().drained, 0);
    request(&mut driver, 3, 1, 15, &[(DATA, 512, false)]);
    driver.notify(0);
    driver.wait_for("the fourth", |_| log.lock().unwrap().started.len() == 4);
    assert_eq!(log.lock().unwrap().drained, 1);
    driver.wait_used(0, 3);
    assert_eq!(log.lock().unwrap().open.len(), 1);
}

#[test]
fn a_hold_and_a_reset_wait_for_requests_under_way() {
    let (block, log, event) = manual();
    let mut driver = Driver::start(block, 0);
    let under_way = |driver: &mut Driver<Block>| {
        request(driver, 0, 1, 0, &[(DATA, 4096, false)]);
        driver.notify(0);
        driver.wait_for("the request", |_| !log.lock().unwrap().open.is_empty());
    };
    under_way(&mut driver);
    let before = driver.machine.raised(1);
    driver.handle.pause();
    assert_eq!(driver.used(0).len(), 1);
    assert_eq!(driver.machine.raised(1), before + 1);
    driver.handle.resume();
    under_way(&mut driver);
    request(&mut driver, 1, 0, 64, &[(DATA + 0x10_0000, 4096, true)]);
    driver.notify(0);
    driver.wait_for("the read", |_| log.lock().unwrap().open.len() == 2);
    driver.bring_up(0);
    assert!(
        is_dirty(&driver.memory, DATA + 0x10_0000),
        "read into, though nobody was told"
    );
    assert!(log.lock().unwrap().open.is_empty());
    assert!(
        driver.used(0).is_empty(),
        "the request of the time before the reset is gone"
    );
    // Completion by event.
    under_way(&mut driver);
    let mut inner = log.lock().unwrap();
    inner.done = std::mem::take(&mut inner.open);
    drop(inner);
    event.write(1).unwrap();
    driver.wait_used(0, 1);
    // A failed device does not touch RAM any longer.
    under_way(&mut driver);
    driver.make_available(0, 9999);
    driver.notify(0);
    driver.wait_failed();
    assert!(log.lock().unwrap().open.is_empty());
}

#[test]
fn a_driver_that_repeats_a_head_has_no_more_under_way_than_the_queue_is_long() {
    let (block, log, event) = manual();
    let mut driver = Driver::start(block, 0);
    request(&mut driver, 0, 0, 0, &[(DATA, 512, true)]);
    for _ in 1..QUEUE {
        driver.make_available(0, 0);
    }
    driver.notify(0);
    let len = |log: &Arc<std::sync::Mutex<Log>>| log.lock().unwrap().open.len();
    driver.wait_for("a full queue", |_| len(&log) == usize::from(QUEUE));
    for _ in 0..5 {
        driver.make_available(0, 0);
    }
    driver.notify(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(len(&log), usize::from(QUEUE));
    let mut inner = log.lock().unwrap();
    let tag = inner.open.remove(0);
    inner.done.push(tag);
    drop(inner);
    event.write(1).unwrap();
    driver.wait_for("the next", |_| {
        log.lock().unwrap().started.len() == usize::from(QUEUE) + 1
    });
    assert!(!driver.handle.failed());
}

#[test]
fn the_backend_is_exchanged_with_requests_under_way() {
    let image = image();
    let [make, _] = devices(image.path(), false);
    let mut driver = Driver::start(make(), 0);
    let (_, log, event) = manual();
    for n in 0..8 {
        request(&mut driver, n, 1, 8 * n, &[(DATA, 4096, false)]);
    }
    driver.notify(0);
    let mut kept = None;
    driver.handle.exchange(|inner| {
        kept = Some(inner);
        Box::new(Manual {
            event,
            log: log.clone(),
        })
    });
    driver.wait_for("all requests", |_| {
        let log = &mut *log.lock().unwrap();
        log.done.append(&mut log.open);
        true
    });
    driver.handle.exchange(|_| kept.take().unwrap());
    let mut used = driver.used(0).len();
    driver.wait_for("all requests", |driver| {
        used += driver.used(0).len();
        used == 8
    });
    driver.put(DATA, b"after");
    assert_eq!(one(&mut driver, 1, 100, &[(DATA, 512, false)]).0, 0);
    let mut bytes = [0; 5];
    image.as_file().read_exact_at(&mut bytes, 51_200).unwrap();
    assert_eq!(&bytes, b"after");
}

#[test]
fn a_queue_that_was_not_looked_at_to_its_end_is_looked_at_after_a_hold() {
    let (block, log, _) = manual();
    let mut driver = Driver::start(block, 0);
    request(&mut driver, 0, 0, 0, &[(DATA, 512, true)]);
    for _ in 1..QUEUE {
        driver.make_available(0, 0);
    }
    driver.notify(0);
    driver.wait_for("a full queue", |_| log.lock().unwrap().open.len() == usize::from(QUEUE));
    driver.make_available(0, 0);
    driver.notify(0);
    driver.wait_for("a stalled queue", |driver| driver.handle.device.core().model.stalled);
    // The manual backend raises no event when it is drained.
    driver.handle.pause();
    driver.handle.resume();
    driver.wait_for("the last request", |_| {
        log.lock().unwrap().started.len() == usize::from(QUEUE) + 1
    });
}
