use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::testing::{BUFFERS, Driver, EVENT_IDX, is_dirty, write_desc};

struct Stream(UnixStream);

impl ConsoleBackend for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.0.as_raw_fd())
    }
}

fn pair() -> (Console, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Console::new(Box::new(Stream(ours))), theirs)
}

#[test]
fn bytes_go_both_ways() {
    let (console, mut host) = pair();
    let mut driver = Driver::start(console, EVENT_IDX);
    driver.put(BUFFERS, b"hello, ");
    driver.put(BUFFERS + 0x1000, b"world");
    driver.add(TX, &[(BUFFERS, 7, false), (BUFFERS + 0x1000, 5, false)]);
    driver.notify(TX);
    assert_eq!(driver.wait_used(TX, 1), [(0, 0)]);
    let mut got = [0; 12];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello, world");

    // Input that comes before there are buffers waits for them.
    host.write_all(b"early").unwrap();
    driver.add(RX, &[(BUFFERS + 0x2000, 3, true)]);
    driver.add(RX, &[(BUFFERS + 0x3000, 64, true)]);
    driver.notify(RX);
    assert_eq!(driver.wait_used(RX, 2), [(0, 3), (1, 2)]);
    assert_eq!(driver.get(BUFFERS + 0x2000, 3), b"ear");
    assert!(is_dirty(&driver.memory, BUFFERS + 0x3000));
    // And buffers wait for input.
    driver.add(RX, &[(BUFFERS + 0x2000, 64, true)]);
    driver.notify(RX);
    let before = driver.machine.raised(1);
    host.write_all(b"late").unwrap();
    driver.machine.wait(1, before);
    assert_eq!(driver.wait_used(RX, 1), [(2, 4)]);
}

#[test]
fn a_held_device_takes_nothing_and_costs_nothing() {
    let (console, mut host) = pair();
    let mut driver = Driver::start(console, 0);
    driver.handle.pause();
    driver.add(RX, &[(BUFFERS, 64, true)]);
    driver.notify(RX);
    host.write_all(b"x").unwrap();
    let cpu = || {
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let thread = driver.handle.device.thread.lock().unwrap();
        let thread = std::os::unix::thread::JoinHandleExt::as_pthread_t(thread.as_ref().unwrap());
        // SAFETY: the thread lives as long as the device.
        assert_eq!(unsafe { libc::pthread_getcpuclockid(thread, &mut clock) }, 0);
        // SAFETY: `time` is valid.
        assert_eq!(unsafe { libc::clock_gettime(clock, &mut time) }, 0);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let before = cpu();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(cpu() - before < 20_000_000, "the worker spins");
    assert!(driver.used(RX).is_empty());
    driver.handle.resume();
    assert_eq!(driver.wait_used(RX, 1), [(0, 1)]);
    // At the end of the input, which stays readable, it must not spin either.
    drop(host);
    driver.add(RX, &[(BUFFERS, 64, true)]);
    driver.notify(RX);
    let cpu_idle = {
        let thread = driver.handle.device.thread.lock().unwrap();
        let thread = std::os::unix::thread::JoinHandleExt::as_pthread_t(thread.as_ref().unwrap());
        move || {
            let mut clock = 0;
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the thread lives as long as the device.
            unsafe { libc::pthread_getcpuclockid(thread, &mut clock) };
            // SAFETY: `time` is valid.
            unsafe { libc::clock_gettime(clock, &mut time) };
            time.tv_sec * 1_000_000_000 + time.tv_nsec
        }
    };
    let before = cpu_idle();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(cpu_idle() - before < 20_000_000, "the worker spins at the end of input");
}

#[test]
fn the_backend_is_exchanged_under_way_and_comes_back() {
    let (console, mut host) = pair();
    let mut driver = Driver::start(console, 0);
    let (ours, mut other) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut kept = None;
    driver.handle.exchange(|inner| {
        kept = Some(inner);
        Box::new(Stream(ours))
    });
    driver.add(RX, &[(BUFFERS, 8, true)]);
    driver.notify(RX);
    host.write_all(b"not now").unwrap();
    other.write_all(b"other").unwrap();
    assert_eq!(driver.wait_used(RX, 1), [(0, 5)]);
    driver.handle.exchange(|_| kept.take().unwrap());
    driver.add(RX, &[(BUFFERS, 8, true)]);
    driver.notify(RX);
    assert_eq!(driver.wait_used(RX, 1), [(1, 7)]);
    assert_eq!(driver.get(BUFFERS, 7), b"not now");
}

#[test]
fn state_moves_to_another_device() {
    let (console, _host) = pair();
    let mut driver = Driver::start(console, 0);
    driver.add(RX, &[(BUFFERS, 8, true)]);
    driver.notify(RX);
    let (console, mut host) = pair();
    let mut driver = driver.migrate(console);
    host.write_all(b"moved").unwrap();
    assert_eq!(driver.wait_used(RX, 1), [(0, 5)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_descriptor_table_fails_the_device_at_most(
        descs in prop::collection::vec(
            (0..0x120_0000u64, prop_oneof![Just(0u32), 0..0x4000u32, any::<u32>()], 0..8u16, 0..20u16), 16),
        heads in prop::collection::vec((0..2usize, 0..20u16), 1..20),
    ) {
        let (console, mut host) = pair();
        host.set_nonblocking(true).unwrap();
        let mut driver = Driver::start(console, 0);
        host.write_all(b"some input").unwrap();
        for (i, desc) in descs.iter().enumerate() {
            for queue in 0..2 {
                write_desc(&driver.memory, driver.queues[queue].desc, i as u16, *desc);
            }
        }
        for (queue, head) in heads {
            driver.make_available(queue, head);
            driver.notify(queue);
            let mut sink = vec![0; 1 << 16];
            while host.read(&mut sink).is_ok_and(|n| n > 0) {}
        }
        let drain = std::thread::spawn(move || {
            host.set_nonblocking(false).unwrap();
            let mut all = Vec::new();
            let _ = host.read_to_end(&mut all);
            all
        });
        driver.bring_up(0);
        driver.put(BUFFERS, b"still there");
        driver.add(TX, &[(BUFFERS, 11, false)]);
        driver.notify(TX);
        prop_assert_eq!(driver.wait_used(TX, 1), [(0, 0)]);
        drop(driver);
        prop_assert!(drain.join().unwrap().ends_with(b"still there"));
    }
}
