//! The network device: frames both ways between a hostile driver and a network that the fuzzer writes.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_devices::backend::{MAX_FRAME_SIZE, NetBackend, VNET_HEADER_SIZE};
use virtio_devices::net::NetOptions;
use virtio_devices::{GuestMemory, Net};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{BUFFERS, Driver, in_ram, memory};
use crate::input::Input;
use crate::reach::reached;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Frames that wait at most.
const WAITING: usize = 64;

/// What the network does next.
#[derive(Default)]
pub struct Wire {
    arriving: VecDeque<Vec<u8>>,
    sent: u64,
    /// 1: takes no frame for now; 2: refuses frames; 4: has frames inside.
    mood: u8,
}

/// Shared with the target.
pub struct Network {
    wire: Mutex<Wire>,
    event: EventFd,
}

impl Network {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nudge(&self) {
        self.event.write(1).expect("an event that can be counted");
    }

    fn arrive(&self, frame: Vec<u8>) {
        let mut wire = self.wire();
        if wire.arriving.len() < WAITING {
            wire.arriving.push_back(frame);
        }
        drop(wire);
        self.nudge();
    }
}

struct Tap {
    network: Arc<Network>,
    memory: Arc<GuestMemory>,
    offloads: u32,
}

fn iovecs(lens: impl Iterator<Item = (*const u8, usize)>) -> Vec<libc::iovec> {
    let iovec = |(base, len): (*const u8, usize)| libc::iovec {
        iov_base: base.cast_mut().cast(),
        iov_len: len,
    };
    lens.map(iovec).collect()
}

impl NetBackend for Tap {
    fn transmit(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        let len: usize = frame.iter().map(|part| part.len()).sum();
        assert!(
            (VNET_HEADER_SIZE..=MAX_FRAME_SIZE).contains(&len),
            "a frame of {len} bytes"
        );
        let mut wire = self.network.wire();
        match wire.mood {
            mood if mood & 1 != 0 => return Err(io::ErrorKind::WouldBlock.into()),
            mood if mood & 2 != 0 => return Err(io::ErrorKind::InvalidInput.into()),
            _ => {}
        }
        // Reads every byte, as a tap does.
        let sum = frame
            .iter()
            .flat_map(|part| part.iter())
            .fold(0u64, |sum, byte| sum + u64::from(*byte));
        wire.sent += 1 + u64::from(sum == u64::MAX);
        reached("net transmit");
        Ok(())
    }

    fn receive(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut wire = self.network.wire();
        let Some(frame) = wire.arriving.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        // One piece may be the device's own, behind the guest's.
        let guest = iovecs(bufs.iter().map(|buf| (buf.as_ptr(), buf.len())));
        let own = guest.len().saturating_sub(1);
        assert!(in_ram(&self.memory, &guest[..own]), "a buffer out of guest RAM");
        let mut rest = &frame[..];
        for buf in bufs {
            let n = rest.len().min(buf.len());
            buf[..n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
        }
        reached("net receive");
        Ok(frame.len() - rest.len())
    }

    fn poll_fd(&self) -> RawFd {
        self.network.event.as_raw_fd()
    }

    fn has_pending(&self) -> bool {
        let wire = self.network.wire();
        wire.mood & 4 != 0 && !wire.arriving.is_empty()
    }

    fn set_offloads(&mut self, tun_flags: u32) -> io::Result<()> {
        self.offloads = tun_flags;
        Ok(())
    }
}

/// A network device and its network.
pub fn device(memory: &Arc<GuestMemory>, features: u8) -> (Net, Arc<Network>) {
    let network = Arc::new(Network {
        wire: Mutex::default(),
        event: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
    });
    let options = NetOptions {
        mac: MAC,
        mtu: (features & 1 != 0).then_some(1500),
        queue_size: 64,
        checksum_offload: features & 2 == 0,
        segmentation_offload: features & 4 == 0,
    };
    let tap = Tap {
        network: network.clone(),
        memory: memory.clone(),
        offloads: 0,
    };
    (Net::new(options, Box::new(tap)), network)
}

/// A frame that a guest's neighbour discovery or ARP could send, damaged by the fuzzer.
fn own_frame(input: &mut Input<'_>) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER_SIZE + 14 + 64];
    frame[VNET_HEADER_SIZE + 6..][..6].copy_from_slice(&MAC);
    let ethernet = VNET_HEADER_SIZE + 12;
    if input.u8() & 1 == 0 {
        frame[ethernet..][..8].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4]);
        frame[ethernet + 10..][..6].copy_from_slice(&MAC);
        frame[ethernet + 16..][..4].copy_from_slice(&input.array::<4>());
    } else {
        frame[ethernet..][..2].copy_from_slice(&[0x86, 0xdd]);
        frame[ethernet + 8] = 58;
        frame[ethernet + 42] = 135 + (input.u8() & 1);
        frame[ethernet + 10..][..4].copy_from_slice(&input.array::<4>());
    }
    let at = input.below(frame.len());
    frame[at] ^= input.u8() & 1;
    frame
}

/// What is particular to the network device.
pub fn special(driver: &mut Driver<Net>, input: &mut Input<'_>, network: &Network) {
    match input.u8() % 10 {
        0 => {
            network.wire().mood = input.u8() & 7;
            network.nudge();
        }
        1..=3 => {
            let len = match input.u8() % 4 {
                0 => input.below(20),
                1 | 2 => usize::from(input.u16()) % 2000,
                _ => input.u32() as usize % (MAX_FRAME_SIZE + 100),
            };
            network.arrive(vec![input.u8(); len]);
        }
        4..=6 => {
            // Buffers for received frames.
            for n in 0..=input.below(16) as u64 {
                let len = [64, 1526, 4096, 65_562][input.below(4)];
                driver.add(0, &[(BUFFERS + 0x800 * n, len, true)], false);
            }
            driver.notify(0);
        }
        7 => {
            let frame = own_frame(input);
            put(driver, &frame);
            let cut = input.below(frame.len()) as u32;
            let (first, second) = (
                (BUFFERS, cut, false),
                (BUFFERS + u64::from(cut), frame.len() as u32 - cut, false),
            );
            driver.add(1, &[first, second], input.u8() & 1 != 0);
            driver.notify(1);
        }
        8 => driver.handle.announce(),
        _ => match input.u8() & 1 {
            0 => driver.handle.drop_queued(),
            _ => driver.handle.exchange(|backend| backend),
        },
    }
}

fn put(driver: &Driver<Net>, frame: &[u8]) {
    use vm_memory::Bytes;
    let target = vm_memory::GuestAddress(BUFFERS);
    driver.memory.write_slice(frame, target).expect("buffers in RAM");
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = memory();
    let (net, network) = device(&memory, input.u8());
    let mut driver = Driver::new(net, memory);
    driver.run(&mut input, &mut |driver, input| special(driver, input, &network));
    // Whatever happened, a reset makes it a good device again.
    *network.wire() = Wire::default();
    driver.bring_up(0);
    driver.add(1, &[(BUFFERS, 60, false)], false);
    driver.notify(1);
    assert!(
        network.wire().sent == 1 && driver.used(1) == 1,
        "a reset device does not send"
    );
    driver.add(0, &[(BUFFERS, 1600, true)], false);
    driver.notify(0);
    network.arrive(vec![1; 100]);
    driver.handle.serve();
    assert_eq!(driver.used(0), 1, "a reset device does not receive");
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let receive = [0, 4, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 100, 0, 7, 8, 0];
    let long = [
        0, 1, 3, 0, 0xf0, 0, 0, 9, 0, 4, 15, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
    ];
    let send = [
        0, 7, 0, 192, 168, 0, 1, 5, 0, 20, 0, 0, 7, 1, 0, 1, 2, 3, 4, 70, 0, 30, 1, 0, 8,
    ];
    let blocked = [0, 0, 1, 0, 7, 0, 1, 2, 3, 4, 0, 0, 9, 0, 0, 0, 0];
    let mut seeds = Vec::new();
    for start in [[0u8, 1, 0xff, 0xff, 0xff, 0], [1, 0, 0x20, 0, 0, 0]] {
        seeds.push([&start[..], &receive, &send, &[17, 3], &blocked].concat());
        seeds.push([&start[..], &long, &[17, 3], &receive].concat());
    }
    seeds
}
