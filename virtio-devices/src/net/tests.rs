use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::testing::{BUFFERS, Driver, EVENT_IDX, clean, is_dirty, write_desc};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
pub(super) const HEADER: usize = VNET_HEADER_SIZE;
const CSUM_AND_TSO: u64 = feature::GUEST_CSUM | feature::GUEST_TSO4;

/// One end of a wire: a datagram is a frame.
struct Wire {
    socket: UnixDatagram,
    offloads: Arc<AtomicU64>,
}

fn fd_result(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

impl NetBackend for Wire {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        // SAFETY: IoSlice is an iovec.
        fd_result(unsafe { libc::writev(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len() as i32) })?;
        Ok(())
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        // SAFETY: IoSliceMut is an iovec.
        fd_result(unsafe { libc::readv(self.socket.as_raw_fd(), bufs.as_ptr().cast(), bufs.len() as i32) })
    }

    fn poll_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()> {
        self.offloads.store(u64::from(tun_flags) | 1 << 32, Relaxed);
        Ok(())
    }
}

pub(super) fn options() -> NetOptions {
    NetOptions {
        mac: MAC,
        mtu: Some(1400),
        queue_size: 64,
        checksum_offload: true,
        segmentation_offload: true,
    }
}

fn wire() -> (Net, UnixDatagram, Arc<AtomicU64>) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let offloads = Arc::new(AtomicU64::new(0));
    let backend = Wire {
        socket: ours,
        offloads: offloads.clone(),
    };
    (Net::new(options(), Box::new(backend)), theirs, offloads)
}

pub(super) fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(13).wrapping_add(seed))
        .collect()
}

#[test]
fn configuration_and_features() {
    let (net, _peer, offloads) = wire();
    let mut driver = Driver::start(net, CSUM_AND_TSO | feature::GUEST_ECN | feature::MRG_RXBUF);
    let config = driver.read(0x2000, 8).to_le_bytes();
    assert_eq!((&config[..6], config[6]), (&MAC[..], 1));
    assert_eq!(driver.read(0x200a, 2), 1400);
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN;
    assert_eq!(offloads.load(Relaxed) as u32, all);
    driver.bring_up(0);
    assert_eq!(offloads.load(Relaxed), 1 << 32);
    let net = &driver.handle.device.core().model;
    assert!(net.consistent(CSUM_AND_TSO) && !net.consistent(feature::GUEST_TSO4));
    assert!(!net.consistent(feature::HOST_TSO6) && !net.consistent(feature::CSUM | feature::HOST_ECN));
}

#[test]
fn frames_are_sent_in_order_from_any_number_of_pieces() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, EVENT_IDX);
    for round in 0..10u8 {
        for n in 0..4u64 {
            let data = frame(HEADER + 100, round * 4 + n as u8);
            driver.put(BUFFERS + 0x1000 * n, &data);
            let at = BUFFERS + 0x1000 * n;
            driver.add(TX, &[(at, 5, false), (at + 5, 7, false), (at + 12, 100, false)]);
        }
        driver.notify(TX);
        for n in 0..4 {
            let mut got = [0; 200];
            assert_eq!(peer.recv(&mut got).unwrap(), HEADER + 100);
            assert_eq!(&got[..HEADER + 100], &frame(HEADER + 100, round * 4 + n)[..]);
        }
        driver.wait_used(TX, 4);
    }
    let values = driver.handle.device.core().model.counters().values();
    assert_eq!((values["tx_frames"], values["tx_bytes"]), (40, 4000));
}

#[test]
fn frames_wait_in_the_queue_while_the_backend_takes_none() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, 0);
    let (fd, _) = driver.handle.device.core().model.poll().unwrap();
    let room: libc::c_int = 1;
    // SAFETY: SO_SNDBUF reads an int. The kernel makes of it the smallest that there can be.
    let set = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            std::ptr::from_ref(&room).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
    driver.put(BUFFERS, &frame(HEADER + 60, 1));
    for _ in 0..63 {
        driver.add(TX, &[(BUFFERS, 72, false)]);
    }
    driver.notify(TX);
    let mut used = 0;
    driver.wait_for("a full socket", |driver| {
        used += driver.used(TX).len();
        driver.handle.device.core().model.blocked
    });
    used += driver.used(TX).len();
    assert!((1..63).contains(&used), "{used}");
    // A state saved now has the rest of the frames in the queue.
    driver.handle.pause();
    assert_eq!(usize::from(driver.handle.state().transport.queues[TX].next_avail), used);
    driver.handle.resume();
    let reader = std::thread::spawn(move || {
        let mut got = [0; 100];
        for _ in 0..63 {
            assert_eq!(peer.recv(&mut got).unwrap(), 72);
        }
        peer
    });
    driver.wait_used(TX, 63 - used);
    reader.join().unwrap();
}

#[test]
fn frames_are_received_into_merged_buffers() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, EVENT_IDX | CSUM_AND_TSO | feature::MRG_RXBUF);
    for n in 0..20 {
        driver.add(RX, &[(BUFFERS + 0x1000 * n, 1000, true)]);
    }
    driver.notify(RX);
    driver.handle.pause();
    clean(&driver.memory);
    driver.handle.resume();
    let before = driver.machine.raised(1);
    peer.send(&frame(HEADER + 60, 3)).unwrap();
    driver.machine.wait(1, before);
    assert_eq!(driver.wait_used(RX, 1), [(0, 72)]);
    let got = driver.get(BUFFERS, 72);
    assert_eq!(got[..10], frame(10, 3)[..]);
    assert_eq!(got[10..12], 1u16.to_le_bytes());
    assert_eq!(got[12..], frame(72, 3)[12..]);
    assert!(is_dirty(&driver.memory, BUFFERS) && is_dirty(&driver.memory, driver.queues[RX].used));
    assert!(!is_dirty(&driver.memory, BUFFERS + 0x1000), "not used");
    // Over three buffers, which come together.
    peer.send(&frame(2500, 4)).unwrap();
    assert_eq!(driver.wait_used(RX, 3), [(1, 1000), (2, 1000), (3, 500)]);
    let mut got = Vec::new();
    for (n, len) in [(1, 1000), (2, 1000), (3, 500)] {
        got.extend(driver.get(BUFFERS + 0x1000 * n, len));
        assert!(is_dirty(&driver.memory, BUFFERS + 0x1000 * n));
    }
    assert_eq!(got[10..12], 3u16.to_le_bytes());
    assert_eq!(got[12..], frame(2500, 4)[12..]);
    driver.handle.pause();
    // Buffers in hand are given back to the queue.
    assert_eq!(driver.handle.state().transport.queues[RX].next_avail, 4);
    driver.handle.resume();
    peer.send(&frame(100, 5)).unwrap();
    assert_eq!(driver.wait_used(RX, 1), [(4, 100)]);
}

#[test]
fn a_frame_that_is_too_long_for_the_buffers_there_waits_for_more_also_over_a_move() {
    let (net, peer, _) = wire();
    let features = EVENT_IDX | CSUM_AND_TSO | feature::MRG_RXBUF;
    let mut driver = Driver::start(net, features);
    driver.add(RX, &[(BUFFERS, 1000, true)]);
    driver.add(RX, &[(BUFFERS + 0x1000, 1000, true)]);
    driver.notify(RX);
    peer.send(&frame(4500, 8)).unwrap();
    peer.send(&frame(100, 9)).unwrap();
    driver.wait_for("the frame", |driver| {
        driver.handle.device.core().model.receiver.waiting().is_some()
    });
    assert!(driver.used(RX).is_empty());
    assert!(is_dirty(&driver.memory, BUFFERS + 0x1000), "the frame went there first");
    let (net, other, _) = wire();
    let mut driver = driver.migrate(net);
    other.send(&frame(200, 10)).unwrap();
    for n in 2..6 {
        driver.add(RX, &[(BUFFERS + 0x1000 * n, 1000, true)]);
    }
    driver.notify(RX);
    assert_eq!(
        driver.wait_used(RX, 6),
        [(0, 1000), (1, 1000), (2, 1000), (3, 1000), (4, 500), (5, 200)]
    );
    let mut got: Vec<u8> = (0..4).flat_map(|n| driver.get(BUFFERS + 0x1000 * n, 1000)).collect();
    got.extend(driver.get(BUFFERS + 0x4000, 500));
    assert_eq!(got[10..12], 5u16.to_le_bytes());
    assert_eq!(got[12..], frame(4500, 8)[12..]);
    assert_eq!(driver.get(BUFFERS + 0x5000, 200)[12..], frame(200, 10)[12..]);
}

#[test]
fn without_merging_a_frame_fits_into_one_buffer_or_is_dropped() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, 0);
    for n in 0..4 {
        driver.add(
            RX,
            &[(BUFFERS + 0x1000 * n, 12, true), (BUFFERS + 0x1000 * n + 12, 600, true)],
        );
    }
    driver.notify(RX);
    peer.send(&frame(612, 1)).unwrap();
    peer.send(&frame(613, 2)).unwrap();
    peer.send(&[0; 5]).unwrap();
    peer.send(&frame(50, 3)).unwrap();
    assert_eq!(driver.wait_used(RX, 2), [(0, 612), (2, 50)]);
    assert_eq!(driver.get(BUFFERS + 0x1000, 50)[12..], frame(50, 3)[12..]);
    let values = driver.handle.device.core().model.counters().values();
    assert_eq!((values["rx_frames"], values["rx_dropped"]), (2, 2));
    assert!(!driver.handle.failed());
}

#[test]
fn a_frame_that_a_whole_queue_cannot_hold_is_dropped() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, CSUM_AND_TSO | feature::MRG_RXBUF);
    for n in 0..64 {
        driver.add(RX, &[(BUFFERS + 0x1000 * n, 20, true)]);
    }
    driver.notify(RX);
    peer.send(&frame(1281, 1)).unwrap();
    peer.send(&frame(1280, 2)).unwrap();
    assert_eq!(driver.wait_used(RX, 64).len(), 64);
    assert_eq!(driver.get(BUFFERS + 10, 2), 64u16.to_le_bytes());
}

#[test]
fn frames_stay_with_the_backend_until_there_are_buffers() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, EVENT_IDX | feature::MRG_RXBUF);
    for seed in 0..6 {
        peer.send(&frame(200, seed)).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    for n in 0..6 {
        driver.add(RX, &[(BUFFERS + 0x1000 * n, 2000, true)]);
        driver.notify(RX);
        assert_eq!(driver.wait_used(RX, 1), [(n as u32, 200)]);
    }
    for n in 0..6 {
        assert_eq!(driver.get(BUFFERS + 0x1000 * n, 200)[12..], frame(200, n as u8)[12..]);
    }
}

#[test]
fn malformed_frames_fail_the_device_and_long_ones_are_dropped() {
    let (net, _peer, _) = wire();
    let mut driver = Driver::start(net, 0);
    for chain in [
        vec![(BUFFERS, 11, false)],
        vec![(BUFFERS, 60, false), (BUFFERS, 60, true)],
        vec![(BUFFERS, 60, true)],
    ] {
        driver.add(TX, &chain);
        driver.notify(TX);
        driver.wait_failed();
        driver.bring_up(0);
    }
    for chain in [
        vec![(BUFFERS, 11, true)],
        vec![(BUFFERS, 60, false), (BUFFERS, 60, true)],
    ] {
        driver.add(RX, &chain);
        driver.notify(RX);
        driver.wait_failed();
        driver.bring_up(0);
    }
    driver.add(TX, &[(BUFFERS, MAX_FRAME_SIZE as u32 + 1, false)]);
    driver.notify(TX);
    driver.wait_used(TX, 1);
    let values = driver.handle.device.core().model.counters().values();
    assert_eq!((values["tx_frames"], values["tx_dropped"]), (0, 1));
}

#[test]
fn addresses_that_the_guest_spoke_of_are_announced_after_a_move() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, 0);
    let spoken = [LearnedAddress::V4([10, 1, 2, 3]), LearnedAddress::V6([0xfd; 16])];
    let frames = addresses::announcements(&MAC, &spoken);
    for (i, frame) in frames[1..].iter().enumerate() {
        let at = BUFFERS + 0x1000 * i as u64;
        driver.put(at, frame);
        driver.add(TX, &[(at, frame.len() as u32, false)]);
    }
    driver.notify(TX);
    driver.wait_used(TX, 2);
    drop(peer);
    let (net, peer, _) = wire();
    let driver = driver.migrate(net);
    driver.handle.pause();
    driver.handle.announce();
    for expected in frames {
        let mut got = [0; 200];
        let n = peer.recv(&mut got).unwrap();
        assert_eq!(got[..n], expected[..]);
    }
}

#[test]
fn hostile_states_are_refused() {
    let (net, _peer, _) = wire();
    let driver = Driver::start(net, 0);
    driver.handle.pause();
    let good = driver.handle.state();
    let changes: [fn(&mut NetState); 4] = [
        |net| net.version = 2,
        |net| net.mac[5] ^= 1,
        |net| net.waiting = Some(vec![0; HEADER - 1]),
        |net| net.waiting = Some(vec![0; MAX_FRAME_SIZE + 1]),
    ];
    for change in changes {
        let mut bad = good.clone();
        let DeviceState::Net(net) = &mut bad.device else {
            panic!()
        };
        change(net);
        assert!(driver.handle.set_state(&bad).is_err());
    }
    let mut bad = good.clone();
    bad.device = DeviceState::Rng(crate::rng::persist::RngState { version: 1 });
    assert!(driver.handle.set_state(&bad).unwrap_err().to_string().contains("rng"));
    driver.handle.set_state(&good).unwrap();
}

#[test]
fn queued_frames_can_be_dropped() {
    let (net, peer, _) = wire();
    let mut driver = Driver::start(net, 0);
    driver.handle.pause();
    for seed in 0..5 {
        peer.send(&frame(100, seed)).unwrap();
    }
    driver.handle.drop_queued();
    driver.add(RX, &[(BUFFERS, 2000, true)]);
    driver.notify(RX);
    driver.handle.resume();
    peer.send(&frame(50, 9)).unwrap();
    assert_eq!(driver.wait_used(RX, 1), [(0, 50)]);
}

/// Has frames of its own before those of another backend, as FT's replay.
struct Replay {
    inner: Box<dyn NetBackend>,
    frames: VecDeque<Vec<u8>>,
}

impl NetBackend for Replay {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.inner.transmit(frame)
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self.frames.pop_front() {
            Some(frame) => {
                let mut rest = &frame[..];
                for buf in bufs {
                    let n = rest.read(buf).unwrap();
                    if n == 0 {
                        break;
                    }
                }
                Ok(frame.len())
            }
            None => self.inner.receive(bufs),
        }
    }

    fn poll_fd(&self) -> RawFd {
        self.inner.poll_fd()
    }

    fn has_pending(&self) -> bool {
        !self.frames.is_empty()
    }

    fn set_offloads(&mut self, flags: u32) -> io::Result<()> {
        self.inner.set_offloads(flags)
    }
}

#[test]
fn an_exchanged_backend_gives_what_it_has_at_once() {
    for held in [true, false] {
        let (net, peer, offloads) = wire();
        let mut driver = Driver::start(net, CSUM_AND_TSO | feature::MRG_RXBUF);
        for n in 0..40 {
            driver.add(RX, &[(BUFFERS + 0x1000 * n, 2000, true)]);
        }
        driver.notify(RX);
        if held {
            driver.handle.pause();
        }
        peer.send(&frame(300, 100)).unwrap();
        if !held {
            driver.wait_used(RX, 1);
        }
        offloads.store(0, Relaxed);
        driver.handle.exchange(|inner| {
            let frames = (0..30).map(|seed| frame(200, seed)).collect();
            Box::new(Replay { inner, frames })
        });
        assert_eq!(offloads.load(Relaxed) as u32, libc::TUN_F_CSUM | libc::TUN_F_TSO4);
        let expected = if held {
            assert!(driver.used(RX).is_empty());
            driver.handle.resume();
            31
        } else {
            30
        };
        let used = driver.wait_used(RX, expected);
        assert!(
            used[..30].iter().all(|(_, len)| *len == 200),
            "replayed frames come first"
        );
    }
}

/// A backend without an end of frames.
struct Endless(EventFd);

impl NetBackend for Endless {
    fn transmit(&mut self, _: &[IoSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(60)
    }

    fn poll_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn set_offloads(&mut self, _: u32) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_busy_device_can_be_held() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    event.write(1).unwrap();
    let mut driver = Driver::start(Net::new(options(), Box::new(Endless(event))), 0);
    for n in 0..64 {
        driver.add(RX, &[(BUFFERS + 0x1000 * n, 1500, true)]);
    }
    driver.notify(RX);
    for _ in 0..200 {
        let mut used = Vec::new();
        driver.wait_for("frames", |driver| {
            used.extend(driver.used(RX));
            !used.is_empty()
        });
        driver.handle.pause();
        used.extend(driver.used(RX));
        for (head, _) in used {
            driver.make_available(RX, head as u16);
        }
        driver.handle.resume();
        driver.notify(RX);
    }
    assert!(!driver.handle.failed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_descriptor_table_fails_the_device_at_most(
        descs in prop::collection::vec(
            (0..0x120_0000u64, prop_oneof![Just(12u32), 0..0x4000u32, any::<u32>()], 0..8u16, 0..20u16), 16),
        heads in prop::collection::vec((0..2usize, 0..20u16), 1..40),
        merge in any::<bool>(),
        sizes in prop::collection::vec(1..3000usize, 0..8),
    ) {
        let (net, peer, _) = wire();
        peer.set_nonblocking(true).unwrap();
        let features = if merge { CSUM_AND_TSO | feature::MRG_RXBUF } else { 0 };
        let mut driver = Driver::start(net, features);
        for (i, desc) in descs.iter().enumerate() {
            for queue in 0..2 {
                write_desc(&driver.memory, driver.queues[queue].desc, i as u16, *desc);
            }
        }
        for size in sizes {
            peer.send(&frame(size, 0)).unwrap();
        }
        for (queue, head) in heads {
            driver.make_available(queue, head);
            driver.notify(queue);
        }
        driver.handle.pause();
        let state = driver.handle.state();
        driver.handle.set_state(&state).ok();
        driver.handle.resume();
        driver.bring_up(features);
        driver.handle.drop_queued();
        let mut sink = vec![0; 1 << 17];
        while peer.recv(&mut sink).is_ok() {}
        driver.add(RX, &[(BUFFERS, 2000, true)]);
        driver.notify(RX);
        peer.send(&frame(100, 7)).unwrap();
        prop_assert_eq!(driver.wait_used(RX, 1), [(0, 100)]);
        driver.add(TX, &[(BUFFERS, 100, false)]);
        driver.notify(TX);
        prop_assert_eq!(driver.wait_used(TX, 1), [(0, 0)]);
    }
}
