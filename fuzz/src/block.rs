//! The block device: requests of a hostile driver on a disk in memory, which holds the device to its promises.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use virtio_devices::backend::{BlockBackend, BlockCompletion, BlockOp};
use virtio_devices::block::BlockOptions;
use virtio_devices::{Block, GuestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{BUFFERS, Driver, address, in_ram, memory};
use crate::input::Input;
use crate::reach::reached;

const SIZE: usize = 1 << 20;
const QUEUE: u16 = 64;

struct Waiting {
    tag: u64,
    op: BlockOp,
    iovecs: Vec<libc::iovec>,
}

/// A disk in memory that finishes requests when the fuzzer wants.
struct MemoryDisk {
    data: Vec<u8>,
    memory: Arc<GuestMemory>,
    waiting: Vec<Waiting>,
    done: Vec<BlockCompletion>,
    event: EventFd,
    mood: Arc<AtomicU8>,
    served: Arc<AtomicU64>,
}

// SAFETY: the iovecs point into guest RAM, which belongs to no thread.
unsafe impl Send for MemoryDisk {}

fn changed(waiting: &Waiting) -> Option<(u64, u64)> {
    let len: usize = waiting.iovecs.iter().map(|iovec| iovec.iov_len).sum();
    match waiting.op {
        BlockOp::Write { offset } => Some((offset, offset + len as u64)),
        BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len, .. } => Some((offset, offset + len)),
        BlockOp::Read { .. } | BlockOp::Flush => None,
    }
}

impl MemoryDisk {
    fn perform(&mut self, request: &Waiting) -> io::Result<u32> {
        self.served.fetch_add(1, Relaxed);
        if self.mood.load(Relaxed) & 4 != 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match request.op {
            BlockOp::Read { offset } | BlockOp::Write { offset } => {
                let read = matches!(request.op, BlockOp::Read { .. });
                reached(if read { "block read" } else { "block write" });
                let mut at = offset as usize;
                for iovec in &request.iovecs {
                    let disk = self.data[at..at + iovec.iov_len].as_mut_ptr();
                    let guest = iovec.iov_base.cast::<u8>();
                    let (from, to) = if read { (disk, guest) } else { (guest, disk) };
                    // SAFETY: both have `iov_len` bytes: the disk by the slice, the guest's by `submit`'s check.
                    unsafe { std::ptr::copy(from, to, iovec.iov_len) };
                    at += iovec.iov_len;
                }
                Ok((at - offset as usize) as u32)
            }
            BlockOp::Flush => {
                reached("block flush");
                Ok(0)
            }
            BlockOp::Discard { offset, len } | BlockOp::WriteZeroes { offset, len, .. } => {
                reached("block discard or zeroes");
                self.data[offset as usize..][..len as usize].fill(0);
                Ok(0)
            }
        }
    }

    fn finish(&mut self, count: usize) {
        for _ in 0..count {
            if self.waiting.is_empty() {
                return;
            }
            // The newest first, or the oldest.
            let index = if self.mood.load(Relaxed) & 2 != 0 {
                self.waiting.len() - 1
            } else {
                0
            };
            let request = self.waiting.remove(index);
            let result = self.perform(&request);
            self.done.push(BlockCompletion {
                tag: request.tag,
                result,
            });
            self.event.write(1).expect("an event that can be counted");
        }
    }
}

impl BlockBackend for MemoryDisk {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        assert!(in_ram(&self.memory, iovecs), "a buffer out of guest RAM");
        assert!(
            self.waiting.iter().all(|other| other.tag != tag),
            "two requests with one tag"
        );
        let request = Waiting {
            tag,
            op,
            iovecs: iovecs.to_vec(),
        };
        let len: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        if let BlockOp::Read { offset } | BlockOp::Write { offset } = op {
            assert!(
                offset as usize + len <= SIZE && len.is_multiple_of(512),
                "past the end of the disk"
            );
        }
        if let Some((start, end)) = changed(&request) {
            assert!(end <= SIZE as u64, "past the end of the disk");
            // R3: changes that overlap are one after the other.
            let overlaps = self
                .waiting
                .iter()
                .filter_map(changed)
                .any(|(s, e)| s < end && start < e);
            assert!(!overlaps, "changes that overlap are under way together");
        }
        if self.mood.load(Relaxed) & 8 != 0 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.waiting.push(request);
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        // Some moods leave requests under way for as long as they last.
        let count = if self.mood.load(Relaxed) & 1 != 0 {
            0
        } else {
            usize::MAX
        };
        self.finish(count);
        out.append(&mut self.done);
    }

    fn drain(&mut self) -> io::Result<()> {
        self.finish(usize::MAX);
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// A block device on a disk in memory; its mood (1: requests stay under way, 2: the newest first, 4: errors, 8: refused),
/// and how many requests reached the disk.
pub fn device(memory: &Arc<GuestMemory>, readonly: bool) -> (Block, Arc<AtomicU8>, Arc<AtomicU64>) {
    let (mood, served) = (Arc::<AtomicU8>::default(), Arc::<AtomicU64>::default());
    let disk = MemoryDisk {
        data: vec![0; SIZE],
        memory: memory.clone(),
        waiting: Vec::new(),
        done: Vec::new(),
        event: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
        mood: mood.clone(),
        served: served.clone(),
    };
    let options = BlockOptions {
        readonly,
        serial: "fuzz".into(),
        queue_size: QUEUE,
        block_size: 512,
    };
    (Block::new(options, Box::new(disk)), mood, served)
}

/// A request with header, data and status byte in their places.
pub fn request(driver: &mut Driver<Block>, input: &mut Input<'_>) {
    let kind = match input.u8() % 8 {
        0 | 1 => 0u32,
        2 | 3 => 1,
        4 => 4,
        5 => 8,
        6 => 11 + 2 * u32::from(input.u8() & 1),
        _ => input.u32(),
    };
    let sector = input.number();
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let at = BUFFERS + 0x100 * input.below(16) as u64;
    put(driver, at, &header);
    let mut pieces = vec![(at, 16, false)];
    if matches!(kind, 11 | 13) {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&u64::from(input.u16()).to_le_bytes());
        range[8..12].copy_from_slice(&u32::from(input.u16()).to_le_bytes());
        range[12] = input.u8() & 3;
        put(driver, at + 32, &range);
        pieces.push((at + 32, 16, false));
    } else {
        for _ in 0..input.below(4) {
            let (address, len) = (address(input), 512 * u32::from(input.u8() % 9));
            pieces.push((address, len, kind != 1));
        }
    }
    pieces.push((at + 64, 1, true));
    driver.add(0, &pieces, input.u8() & 1 != 0);
}

fn put(driver: &Driver<Block>, address: u64, bytes: &[u8]) {
    use vm_memory::Bytes;
    let target = vm_memory::GuestAddress(address);
    driver.memory.write_slice(bytes, target).expect("buffers in RAM");
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = memory();
    let (block, mood, served) = device(&memory, input.u8() & 7 == 7);
    let mut driver = Driver::new(block, memory);
    driver.run(&mut input, &mut |driver, input| match input.u8() % 8 {
        0 => mood.store(input.u8() & 0xf, Relaxed),
        1 => driver.handle.exchange(|backend| backend),
        _ => request(driver, input),
    });
    // Whatever happened, a reset makes it a good device again.
    mood.store(0, Relaxed);
    driver.bring_up(0);
    let before = served.load(Relaxed);
    put(&driver, BUFFERS, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.add(0, &[(BUFFERS, 16, false), (BUFFERS + 64, 1, true)], false);
    driver.notify(0);
    assert!(
        served.load(Relaxed) > before && driver.used(0) == 1,
        "a reset device does not serve"
    );
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    // Write, read, flush, zeroes, id; each with a notification.
    let mut all = vec![0, 1, 0, 0, 0, 0];
    for kind in [2, 0, 4, 6, 5] {
        all.extend([0, 2, kind, 0, 8, 1, 2, 0, 0, 8, 2, 0, 16, 1, 1, 8, 0, 0]);
    }
    let mut late = vec![0, 3, 0, 0, 0, 0, 0, 0, 3];
    for _ in 0..6 {
        late.extend([0, 2, 2, 0, 8, 1, 2, 0, 0, 8, 2, 0, 16, 1, 1, 8, 0, 0]);
    }
    late.extend([17, 3, 17, 2, 8, 0]);
    vec![all, late, vec![0, 0xff, 14, 0, 0x14, 0, 0, 1]]
}
