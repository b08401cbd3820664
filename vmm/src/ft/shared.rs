//! The interposer at a disk that both hosts see.
//!
//! [`SharedBlock`] stands between device and backend: changes are held and complete at once, reads see them (R1, R3).
//! Nothing else writes the disk but [`super::disks::carry_out`].

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use ft::interposer::Interposer;
use ft::machine::DiskChange;
use ft::overlay::Piece;
use virtio_devices::backend::{BlockBackend, BlockCompletion, BlockOp};

use super::backends::Slot;
use super::blocks::{copy_out, total};

/// A read under way of which some bytes are held.
struct Patch {
    offset: u64,
    iovecs: Vec<libc::iovec>,
    pieces: Vec<Piece>,
}

// SAFETY: the iovecs belong to no thread; their submitter promised that they stay valid until the completion.
unsafe impl Send for Patch {}

impl Patch {
    /// Puts the held bytes into the buffers.
    ///
    /// # Safety
    /// Every iovec must be mapped and writable.
    unsafe fn apply(&self) {
        for piece in &self.pieces {
            let mut skip = (piece.offset - self.offset) as usize;
            let mut done = 0;
            let len = piece.len as usize;
            for iovec in &self.iovecs {
                let n = iovec.iov_len.saturating_sub(skip).min(len - done);
                if n > 0 {
                    // SAFETY: `skip + n` is within the buffer, which the caller promises is writable; the held bytes
                    // are not guest memory, so the two do not overlap.
                    unsafe {
                        let to = iovec.iov_base.cast::<u8>().add(skip);
                        match piece.bytes() {
                            Some(bytes) => std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), to, n),
                            None => std::ptr::write_bytes(to, 0, n),
                        }
                    }
                    done += n;
                }
                skip = skip.saturating_sub(iovec.iov_len);
            }
        }
    }
}

/// Holds changes; reads see them over what is on the disk.
///
/// A read takes the held bytes when it is submitted: what leaves the interposer later is on the disk by then, or is newer
/// than the read and may be seen or not.
pub struct SharedBlock {
    inner: Slot<dyn BlockBackend>,
    size: u64,
    event_fd: RawFd,
    interposer: Arc<Interposer>,
    disk: u16,
    patches: HashMap<u64, Patch>,
    done: Vec<BlockCompletion>,
}

impl SharedBlock {
    /// Wraps `inner`, the backend of disk `disk`.
    pub fn wrap(
        inner: Box<dyn BlockBackend>,
        interposer: Arc<Interposer>,
        disk: u16,
    ) -> (Self, Slot<dyn BlockBackend>) {
        let (size, event_fd) = (inner.size(), inner.event_fd());
        let slot = Slot::new(inner);
        let wrapper = Self {
            inner: slot.clone(),
            size,
            event_fd,
            interposer,
            disk,
            patches: HashMap::new(),
            done: Vec::new(),
        };
        (wrapper, slot)
    }

    /// # Safety
    /// As for [`BlockBackend::submit`].
    unsafe fn read(&mut self, tag: u64, offset: u64, iovecs: &[libc::iovec]) -> io::Result<()> {
        let len = total(iovecs);
        let pieces = self.interposer.held_bytes(self.disk, offset, len);
        let held: u64 = pieces.iter().map(|piece| piece.len).sum();
        let patch = Patch {
            offset,
            iovecs: iovecs.to_vec(),
            pieces,
        };
        if held == len {
            // SAFETY: the caller's promise.
            unsafe { patch.apply() };
            let result = Ok(len as u32);
            self.done.push(BlockCompletion { tag, result });
            return Ok(());
        }
        self.inner
            // SAFETY: the caller's promise about the iovecs is passed on unchanged.
            .with(|inner| unsafe { inner.submit(tag, BlockOp::Read { offset }, iovecs) })??;
        if held > 0 {
            self.patches.insert(tag, patch);
        }
        Ok(())
    }
}

impl BlockBackend for SharedBlock {
    fn size(&self) -> u64 {
        self.size
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        let change = match op {
            // SAFETY: passed on.
            BlockOp::Read { offset } => return unsafe { self.read(tag, offset, iovecs) },
            BlockOp::Write { offset } => {
                // SAFETY: the caller promises that the iovecs stay valid until completion.
                let data = unsafe { copy_out(iovecs) };
                DiskChange::Write { offset, data }
            }
            // What a discarded range reads as must be known here.
            BlockOp::Discard { offset, len } => DiskChange::Zero {
                offset,
                len,
                unmap: true,
            },
            BlockOp::WriteZeroes { offset, len, unmap } => DiskChange::Zero { offset, len, unmap },
            BlockOp::Flush => DiskChange::Flush,
        };
        self.interposer.hold_disk(self.disk, change);
        let result = Ok(total(iovecs) as u32);
        self.done.push(BlockCompletion { tag, result });
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        let first = out.len();
        let _ = self.inner.with(|inner| inner.completions(out));
        for completion in &out[first..] {
            if let Some(patch) = self.patches.remove(&completion.tag)
                && completion.result.is_ok()
            {
                // SAFETY: the submitter keeps the buffers until this returns the completion.
                unsafe { patch.apply() };
            }
        }
        out.append(&mut self.done);
    }

    fn drain(&mut self) -> io::Result<()> {
        self.inner.with(|inner| inner.drain())?
    }

    fn event_fd(&self) -> RawFd {
        self.event_fd
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use virtio_devices::block::{DiskImage, DiskOptions, Format, open};

    use super::super::disks::carry_out;
    use super::*;

    struct Log;

    impl ft::interposer::LogSink for Log {
        fn input_frame(&self, _epoch: u64, _nic: u16, _data: &[u8]) -> u64 {
            0
        }

        fn disk_change(&self, _epoch: u64, _disk: u16, _change: DiskChange) -> u64 {
            0
        }
    }

    const SIZE: usize = 4096;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize),
        Flush,
        /// Submits a read; several may be under way.
        Read(usize, usize, usize),
        /// Looks at the reads.
        Complete,
        /// Ends the epoch, and carries out what is held of those before the last few.
        Commit(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = || (0..SIZE, 1..SIZE).prop_map(|(at, len)| (at, len.min(SIZE - at)));
        let step = prop_oneof![
            (place(), 1..=255u8).prop_map(|((at, len), value)| Step::Write(at, len, value)),
            place().prop_map(|(at, len)| Step::Zero(at, len)),
            Just(Step::Flush),
            (place(), 0..SIZE).prop_map(|((at, len), cut)| Step::Read(at, len, cut.min(len))),
            Just(Step::Complete),
            (0..3u64).prop_map(Step::Commit),
        ];
        prop::collection::vec(step, 1..40)
    }

    fn iovec(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }
    }

    /// The disk as the guest sees it, against an array; and as it lies there.
    struct Bench {
        disk: SharedBlock,
        interposer: Arc<Interposer>,
        image: Arc<dyn DiskImage>,
        model: Vec<u8>,
        /// The model at the end of each epoch.
        epochs: Vec<Vec<u8>>,
        /// Up to this epoch is carried out.
        written: usize,
        /// Tag, buffer, and what it must hold.
        reads: Vec<(u64, Vec<u8>, Vec<u8>)>,
        tags: u64,
        _file: tempfile::NamedTempFile,
    }

    impl Bench {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(SIZE as u64).unwrap();
            let options = DiskOptions {
                path: file.path().into(),
                readonly: false,
                direct: false,
                format: Format::Raw,
                backing_files: false,
                shared: true,
            };
            let image = open(&options).unwrap();
            let interposer = Interposer::new(1, 1 << 30, Arc::new(Log), Arc::new(|| ()));
            let backend = image.clone().backend(64, true).unwrap();
            let (disk, _) = SharedBlock::wrap(backend, interposer.clone(), 0);
            Self {
                disk,
                interposer,
                image,
                model: vec![0; SIZE],
                epochs: vec![vec![0; SIZE]],
                written: 0,
                reads: Vec::new(),
                tags: 0,
                _file: file,
            }
        }

        fn submit(&mut self, op: BlockOp, iovecs: &[libc::iovec]) -> u64 {
            self.tags += 1;
            // SAFETY: the buffers live in `reads` or the caller until the completion.
            unsafe { self.disk.submit(self.tags, op, iovecs) }.unwrap();
            self.tags
        }

        fn complete(&mut self) {
            self.disk.drain().unwrap();
            let mut done = Vec::new();
            self.disk.completions(&mut done);
            for completion in done {
                let len = completion.result.unwrap();
                if let Some(at) = self.reads.iter().position(|(tag, ..)| *tag == completion.tag) {
                    let (_, bytes, expected) = self.reads.remove(at);
                    assert_eq!((len as usize, &bytes), (expected.len(), &expected));
                }
            }
            assert!(self.reads.is_empty());
        }

        fn step(&mut self, step: &Step) {
            // A change may be seen or not by reads under way: they are looked at first.
            if !matches!(step, Step::Read(..) | Step::Commit(_)) {
                self.complete();
            }
            match *step {
                Step::Write(at, len, value) => {
                    self.model[at..at + len].fill(value);
                    let mut bytes = vec![value; len];
                    let (one, two) = bytes.split_at_mut(len / 2);
                    let op = BlockOp::Write { offset: at as u64 };
                    self.submit(op, &[iovec(one), iovec(two)]);
                }
                Step::Zero(at, len) => {
                    self.model[at..at + len].fill(0);
                    let (offset, len) = (at as u64, len as u64);
                    self.submit(BlockOp::Discard { offset, len }, &[]);
                }
                Step::Flush => drop(self.submit(BlockOp::Flush, &[])),
                Step::Read(at, len, cut) => {
                    let mut bytes = vec![0xee; len];
                    let (one, two) = bytes.split_at_mut(cut);
                    let iovecs = [iovec(one), iovec(two)];
                    let tag = self.submit(BlockOp::Read { offset: at as u64 }, &iovecs);
                    let expected = self.model[at..at + len].to_vec();
                    self.reads.push((tag, bytes, expected));
                }
                Step::Complete => {}
                Step::Commit(behind) => {
                    let ended = self.interposer.cut().epoch;
                    self.epochs.push(self.model.clone());
                    let until = ended.saturating_sub(behind).max(self.written as u64);
                    let changes = self.interposer.held_changes(until);
                    for held in &changes {
                        carry_out(self.image.as_ref(), &held.change).unwrap();
                    }
                    if let Some(last) = changes.last() {
                        self.interposer.written(last.number);
                    }
                    self.written = until as usize;
                }
            }
            let mut lies = vec![0; SIZE];
            self.image.read_at(0, &mut lies).unwrap();
            assert_eq!(
                lies, self.epochs[self.written],
                "the disk is not that of the last epoch written"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn r1_r3_a_shared_disk_gets_whole_epochs_and_the_guest_sees_its_own_changes(steps in steps()) {
            let mut bench = Bench::new();
            steps.iter().for_each(|step| bench.step(step));
            bench.complete();
            (0..2).for_each(|_| bench.step(&Step::Commit(0)));
            assert_eq!(bench.interposer.unwritten(), 0);
        }
    }

    #[test]
    fn r1_changes_of_a_stopped_side_are_dropped() {
        let mut bench = Bench::new();
        bench.step(&Step::Write(0, 100, 7));
        bench.interposer.close();
        bench.step(&Step::Write(200, 100, 8));
        assert_eq!(bench.interposer.held_changes(u64::MAX).len(), 1);
        bench.interposer.drop_changes();
        assert_eq!(bench.interposer.unwritten(), 0);
        assert!(bench.interposer.held_bytes(0, 0, SIZE as u64).is_empty());
    }

    #[test]
    fn r1_workers_wait_while_a_shared_disk_takes_nothing() {
        let bench = Bench::new();
        bench.interposer.set_bound(1000);
        let write = |n: usize| DiskChange::Write {
            offset: 0,
            data: vec![1; n],
        };
        bench.interposer.hold_disk(0, write(1000));
        bench.interposer.cut();
        bench.interposer.take_committed(1);
        let (interposer, waits) = (bench.interposer.clone(), Arc::new(Mutex::new(true)));
        let flag = waits.clone();
        let worker = std::thread::spawn(move || {
            interposer.hold_disk(0, write(1));
            *crate::interrupts::lock(&flag) = false;
        });
        std::thread::sleep(std::time::Duration::from_millis(30));
        // Committed, and not written: there is no room.
        assert!(*crate::interrupts::lock(&waits));
        let last = bench.interposer.held_changes(1).pop().unwrap();
        bench.interposer.written(last.number);
        worker.join().unwrap();
    }
}
