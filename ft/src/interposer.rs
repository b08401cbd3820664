//! The interposer: holds the outputs of epochs that are not committed (R1) and logs inputs and disk changes (R3, R8).
//!
//! Device workers call [`Interposer::hold_frame`], [`Interposer::hold_console`], [`Interposer::log_frame`],
//! [`Interposer::log_disk`] and, for a shared disk, [`Interposer::hold_disk`], each for its own device in that device's
//! order. FT cuts the running epoch while the VM
//! stands still, and takes the outputs out again when their epoch is committed.
//!
//! Bounded lag: at the bound device workers wait here, so that the guest's devices stand still. They are let through
//! while a checkpoint is being taken ([`Interposer::begin_cut`]): the VM can only be paused when every worker reaches a
//! request boundary, and only a checkpoint can make room.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::{DiskChange, Output};
use crate::overlay::Piece;
use crate::shared::{HeldChange, HeldChanges};

/// Where logged entries go: to the backup, at once.
pub trait LogSink: Send + Sync {
    /// A frame that the guest is about to receive in `epoch`. Returns the bytes logged.
    fn input_frame(&self, epoch: u64, nic: u16, data: &[u8]) -> u64;
    /// A change of a disk in `epoch`. Returns the bytes logged.
    fn disk_change(&self, epoch: u64, disk: u16, change: DiskChange) -> u64;
}

/// Called when the running epoch gets its first output.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Bytes that an output costs beside its data.
const OVERHEAD: u64 = 64;

impl Output {
    /// Bytes that it counts for.
    fn size(&self) -> u64 {
        let (Self::Frame { data, .. } | Self::Console { data, .. }) = self;
        data.len() as u64 + OVERHEAD
    }
}

/// Outputs of one epoch, in order.
#[derive(Debug, Default)]
pub struct Held {
    /// The epoch.
    pub epoch: u64,
    /// Its outputs.
    pub outputs: Vec<Output>,
    /// When the first was held.
    pub since: Option<Instant>,
    bytes: u64,
}

/// What a cut gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutSizes {
    /// The epoch that ended.
    pub epoch: u64,
    /// Bytes of its held outputs.
    pub held: u64,
    /// Bytes logged in it.
    pub logged: u64,
    /// Number of held outputs.
    pub outputs: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Hold,
    /// Nothing is held or logged any longer; what still comes is dropped.
    Closed,
}

struct Inner {
    mode: Mode,
    running: Held,
    logged: u64,
    sealed: VecDeque<Held>,
    sealed_bytes: u64,
    /// Log bytes of epochs that were cut and are not committed.
    sealed_logged: VecDeque<(u64, u64)>,
    /// Changes of shared disks, of all epochs.
    shared: HeldChanges,
    bound: u64,
    cutting: bool,
}

impl Inner {
    fn bytes(&self) -> u64 {
        let logged: u64 = self.sealed_logged.iter().map(|(_, bytes)| bytes).sum();
        self.running.bytes + self.logged + self.sealed_bytes + logged + self.shared.bytes()
    }
}

/// Between the devices and their backends while FT is on.
pub struct Interposer {
    inner: Mutex<Inner>,
    room: Condvar,
    sink: Arc<dyn LogSink>,
    waker: Waker,
}

impl Interposer {
    /// `epoch` is the running epoch; `bound` the bytes held and logged at which device workers wait.
    pub fn new(epoch: u64, bound: u64, sink: Arc<dyn LogSink>, waker: Waker) -> Arc<Self> {
        let inner = Inner {
            mode: Mode::Hold,
            running: Held {
                epoch,
                ..Held::default()
            },
            logged: 0,
            sealed: VecDeque::new(),
            sealed_bytes: 0,
            sealed_logged: VecDeque::new(),
            shared: HeldChanges::default(),
            bound: bound.max(1),
            cutting: false,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            room: Condvar::new(),
            sink,
            waker,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admitted(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        while inner.mode == Mode::Hold && !inner.cutting && inner.bytes() >= inner.bound {
            inner = self.room.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner
    }

    fn hold(&self, output: Output, len: usize) {
        let mut inner = self.admitted();
        if inner.mode == Mode::Closed {
            return;
        }
        let running = &mut inner.running;
        running.bytes += len as u64 + OVERHEAD;
        // Console bytes come one by one from a serial port: those of one write burst make one output.
        match (running.outputs.last_mut(), output) {
            (Some(Output::Console { console: last, data }), Output::Console { console, data: more })
                if *last == console =>
            {
                data.extend_from_slice(&more);
                running.bytes -= OVERHEAD;
            }
            (_, output) => running.outputs.push(output),
        }
        let first = running.since.is_none();
        if first {
            running.since = Some(Instant::now());
        }
        drop(inner);
        if first {
            (self.waker)();
        }
    }

    /// Holds a transmitted frame (with its vnet header) until its epoch is committed.
    pub fn hold_frame(&self, nic: u16, data: Vec<u8>) {
        let len = data.len();
        self.hold(Output::Frame { nic, data }, len);
    }

    /// Holds console bytes.
    pub fn hold_console(&self, console: u16, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.hold(
                Output::Console {
                    console,
                    data: bytes.to_vec(),
                },
                bytes.len(),
            );
        }
    }

    /// Logs a received frame, before the guest sees it.
    pub fn log_frame(&self, nic: u16, data: &[u8]) {
        let mut inner = self.admitted();
        if inner.mode == Mode::Hold {
            // Under the lock: the entries of a device must be in the log in order, and the tag must be true.
            inner.logged += self.sink.input_frame(inner.running.epoch, nic, data);
        }
    }

    /// Logs a change of a replicated disk, in the order in which requests were started.
    pub fn log_disk(&self, disk: u16, change: DiskChange) {
        let mut inner = self.admitted();
        if inner.mode == Mode::Hold {
            inner.logged += self.sink.disk_change(inner.running.epoch, disk, change);
        }
    }

    /// Logs and holds a change of a shared disk: the guest may take it for done, and sees it in what it reads.
    pub fn hold_disk(&self, disk: u16, change: DiskChange) {
        let mut inner = self.admitted();
        if inner.mode == Mode::Hold {
            let epoch = inner.running.epoch;
            inner.logged += self.sink.disk_change(epoch, disk, change.clone());
            inner.shared.hold(epoch, disk, change);
        }
    }

    /// What is held of these bytes of a shared disk: newer than what is on it.
    pub fn held_bytes(&self, disk: u16, offset: u64, len: u64) -> Vec<Piece> {
        self.lock().shared.read(disk, offset, len)
    }

    /// The held changes of shared disks of all epochs up to `epoch`, in order. They stay held until
    /// [`Interposer::written`].
    pub fn held_changes(&self, epoch: u64) -> Vec<HeldChange> {
        self.lock().shared.until(epoch)
    }

    /// Held changes up to this number are on their disks.
    pub fn written(&self, number: u64) {
        self.lock().shared.written(number);
        self.room.notify_all();
    }

    /// This side will never write them.
    pub fn drop_changes(&self) {
        self.lock().shared.clear();
        self.room.notify_all();
    }

    /// Bytes of changes held for shared disks.
    pub fn unwritten(&self) -> u64 {
        self.lock().shared.bytes()
    }

    /// Before the VM is paused for a checkpoint: workers that wait for room are let through.
    pub fn begin_cut(&self) {
        self.lock().cutting = true;
        self.room.notify_all();
    }

    /// Ends the running epoch. The VM must stand still.
    pub fn cut(&self) -> CutSizes {
        let mut inner = self.lock();
        let next = Held {
            epoch: inner.running.epoch + 1,
            ..Held::default()
        };
        let ended = std::mem::replace(&mut inner.running, next);
        let logged = std::mem::take(&mut inner.logged);
        let sizes = CutSizes {
            epoch: ended.epoch,
            held: ended.bytes,
            logged,
            outputs: ended.outputs.len() as u64,
        };
        inner.sealed_bytes += ended.bytes;
        inner.sealed_logged.push_back((ended.epoch, logged));
        inner.sealed.push_back(ended);
        sizes
    }

    /// The VM runs again (or the pause failed): the bound holds again.
    pub fn end_cut(&self) {
        self.lock().cutting = false;
    }

    /// Copies outputs of an epoch that was cut, oldest first: console bytes always, frames as long as all of them
    /// together have at most `frame_cap` bytes.
    pub fn sealed_outputs(&self, epoch: u64, frame_cap: usize) -> Vec<Output> {
        let inner = self.lock();
        let Some(held) = inner.sealed.iter().find(|h| h.epoch == epoch) else {
            return Vec::new();
        };
        let mut frame_bytes = 0;
        let fits = |output: &&Output| match output {
            Output::Console { .. } => true,
            Output::Frame { data, .. } => {
                frame_bytes += data.len();
                frame_bytes <= frame_cap
            }
        };
        held.outputs.iter().filter(fits).cloned().collect()
    }

    /// Takes the outputs of all epochs up to `epoch`, oldest first.
    pub fn take_committed(&self, epoch: u64) -> Vec<Held> {
        let mut inner = self.lock();
        let mut taken = Vec::new();
        while inner.sealed.front().is_some_and(|held| held.epoch <= epoch) {
            taken.extend(inner.sealed.pop_front());
        }
        while inner.sealed_logged.front().is_some_and(|(e, _)| *e <= epoch) {
            inner.sealed_logged.pop_front();
        }
        inner.sealed_bytes -= taken.iter().map(|held| held.bytes).sum::<u64>();
        drop(inner);
        self.room.notify_all();
        taken
    }

    /// Takes outputs back that could not leave, in their order: those of epochs that were taken last.
    pub fn put_back(&self, held: Vec<Held>) {
        let mut inner = self.lock();
        if inner.mode == Mode::Closed {
            return;
        }
        for mut held in held.into_iter().rev() {
            held.bytes = held.outputs.iter().map(Output::size).sum();
            inner.sealed_bytes += held.bytes;
            inner.sealed.push_front(held);
        }
    }

    /// Takes everything that is held, the running epoch's outputs too, and ends holding and logging: the VM goes on
    /// alone, or stops. With the VM still, nothing can be missed in between. Changes of shared disks stay, to be written or
    /// dropped.
    pub fn close(&self) -> Vec<Held> {
        let mut inner = self.lock();
        inner.mode = Mode::Closed;
        let mut taken: Vec<Held> = inner.sealed.drain(..).collect();
        taken.push(std::mem::take(&mut inner.running));
        inner.sealed_bytes = 0;
        inner.sealed_logged.clear();
        inner.logged = 0;
        drop(inner);
        self.room.notify_all();
        taken
    }

    /// Lets waiting workers through for good, so that the VM can be paused; holding goes on.
    pub fn unblock(&self) {
        self.set_bound(u64::MAX);
    }

    /// Changes the bound.
    pub fn set_bound(&self, bound: u64) {
        self.lock().bound = bound.max(1);
        self.room.notify_all();
    }

    /// Bytes logged and held in the running epoch.
    pub fn running_bytes(&self) -> u64 {
        let inner = self.lock();
        inner.logged + inner.running.bytes
    }

    /// Whether the running epoch has outputs.
    pub fn has_output(&self) -> bool {
        !self.lock().running.outputs.is_empty()
    }

    /// Number of outputs held, and all bytes held and logged for epochs that are not committed.
    pub fn waiting(&self) -> (u64, u64) {
        let inner = self.lock();
        let sealed: usize = inner.sealed.iter().map(|held| held.outputs.len()).sum();
        ((sealed + inner.running.outputs.len()) as u64, inner.bytes())
    }
}

impl Held {
    /// How long the first output has been held.
    pub fn age(&self) -> Option<Duration> {
        self.since.map(|since| since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, usize)>>);

    impl LogSink for Log {
        fn input_frame(&self, epoch: u64, _nic: u16, data: &[u8]) -> u64 {
            self.0.lock().unwrap().push((epoch, data.len()));
            data.len() as u64
        }

        fn disk_change(&self, epoch: u64, _disk: u16, change: DiskChange) -> u64 {
            let DiskChange::Write { data, .. } = change else {
                return 0;
            };
            self.0.lock().unwrap().push((epoch, data.len()));
            data.len() as u64
        }
    }

    fn interposer(bound: u64) -> (Arc<Interposer>, Arc<Log>, Arc<AtomicUsize>) {
        let (log, wakes) = (Arc::new(Log::default()), Arc::new(AtomicUsize::new(0)));
        let counter = wakes.clone();
        let waker: Waker = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        (Interposer::new(1, bound, log.clone(), waker), log, wakes)
    }

    fn frame(n: u8) -> Output {
        Output::Frame { nic: 0, data: vec![n] }
    }

    #[test]
    fn outputs_come_out_by_epoch_and_in_order() {
        let (interposer, _, wakes) = interposer(1 << 20);
        interposer.hold_frame(0, vec![1]);
        interposer.hold_frame(0, vec![2]);
        assert_eq!(
            interposer.cut(),
            CutSizes {
                epoch: 1,
                held: 2 + 2 * OVERHEAD,
                logged: 0,
                outputs: 2
            }
        );
        interposer.hold_frame(0, vec![3]);
        interposer.cut();
        interposer.hold_frame(0, vec![4]);
        assert_eq!(wakes.load(Ordering::SeqCst), 3);
        assert!(interposer.take_committed(0).is_empty());
        let first = interposer.take_committed(1);
        assert_eq!((first.len(), &first[0].outputs), (1, &vec![frame(1), frame(2)]));
        assert_eq!(interposer.waiting().0, 2);
        let rest: Vec<Output> = interposer.close().into_iter().flat_map(|h| h.outputs).collect();
        assert_eq!(rest, [frame(3), frame(4)]);
        interposer.hold_frame(0, vec![5]);
        assert!(interposer.close().iter().all(|h| h.outputs.is_empty()));
    }

    #[test]
    fn log_entries_carry_the_running_epoch() {
        let (interposer, log, _) = interposer(1 << 20);
        interposer.log_frame(0, &[0; 3]);
        interposer.cut();
        interposer.log_disk(
            0,
            DiskChange::Write {
                offset: 0,
                data: vec![0; 5],
            },
        );
        assert_eq!(*log.0.lock().unwrap(), [(1, 3), (2, 5)]);
        assert_eq!(interposer.running_bytes(), 5);
    }

    #[test]
    fn a_copy_for_the_checkpoint_is_capped_for_frames_only() {
        let (interposer, _, _) = interposer(1 << 20);
        interposer.hold_frame(0, vec![0; 10]);
        interposer.hold_console(0, b"a");
        interposer.hold_console(0, b"b");
        interposer.hold_console(1, b"c");
        interposer.hold_frame(0, vec![0; 10]);
        interposer.cut();
        let copied = interposer.sealed_outputs(1, 15);
        assert_eq!(copied.len(), 3);
        assert_eq!(
            copied[1],
            Output::Console {
                console: 0,
                data: b"ab".to_vec()
            }
        );
        assert_eq!(interposer.take_committed(1)[0].outputs.len(), 4);
    }

    #[test]
    fn workers_wait_at_the_bound_until_a_commit_a_cut_or_the_end() {
        for way_out in 0..3 {
            let (interposer, _, _) = interposer(100);
            interposer.log_frame(0, &[0; 100]);
            let worker = {
                let interposer = interposer.clone();
                std::thread::spawn(move || interposer.hold_frame(0, vec![7]))
            };
            std::thread::sleep(Duration::from_millis(30));
            assert!(!worker.is_finished());
            match way_out {
                0 => interposer.begin_cut(),
                1 => {
                    interposer.cut();
                    interposer.take_committed(1);
                }
                _ => drop(interposer.close()),
            }
            worker.join().unwrap();
            assert_eq!(interposer.has_output(), way_out < 2);
        }
    }
}
