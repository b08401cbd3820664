//! Disks that the backup's host sees too.
//!
//! The guest's changes of them are held by the interposer. When the core allows it (their epochs are committed, the lease
//! holds), the `ft-disks` thread carries them out in the guest's order and flushes; then the mark tells the backup that
//! it need not keep them. It looks at the lease before each change (R4). While it is open who goes on, nothing is written,
//! and the locks are given back for the backup to take if it wins. When the VM goes on alone, the controller takes them
//! again and carries out the rest; when it stops, the rest is dropped.
//!
//! A change that fails is tried again until it works: the guest took it for done. Meanwhile the guest stands still at
//! `max_lag`, and `ft info` tells why.
//!
//! Locks: `writing` is held by whoever carries changes out; `may` for a moment. Both are taken before the core's lock.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::session::{Session, lock};
use crate::Error;
use crate::core::primary::{Event, PrimaryState};
use crate::machine::{DiskChange, Identity, MachineError, checksum};

/// Pause before a change is tried again, and before the lease is looked at again.
const PAUSE: Duration = Duration::from_millis(20);

/// Blocks that the backup compares at the first checkpoint, beside the first and the last, and their size in bytes.
const SAMPLES: u64 = 14;
const SAMPLE: u64 = 4096;

/// What a session knows of its shared disks.
pub(super) struct Disks {
    /// (index, size, id)
    shared: Vec<(u16, u64, String)>,
    /// The last epoch whose other outputs left.
    pub(super) released: AtomicU64,
    written: AtomicU64,
    /// Changes up to this epoch may be carried out.
    may: Mutex<u64>,
    /// `may` rose, or it is time to end.
    changed: Condvar,
    writing: Mutex<()>,
    /// The locks were given back.
    yielded: AtomicBool,
    trouble: Mutex<Option<String>>,
}

impl Disks {
    pub(super) fn new(identity: &Identity) -> Self {
        let disks = (0u16..).zip(&identity.disks);
        let shared = disks.filter(|(_, disk)| disk.shared.is_some());
        Self {
            shared: shared.map(|(i, disk)| (i, disk.size, disk.id.clone())).collect(),
            released: AtomicU64::new(0),
            written: AtomicU64::new(0),
            may: Mutex::new(0),
            changed: Condvar::new(),
            writing: Mutex::new(()),
            yielded: AtomicBool::new(false),
            trouble: Mutex::new(None),
        }
    }

    pub(super) fn any(&self) -> bool {
        !self.shared.is_empty()
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.shared.iter().map(|(.., id)| id.clone()).collect()
    }

    /// The last epoch whose changes are on the disks.
    pub(super) fn written(&self) -> u64 {
        if self.any() {
            self.written.load(Ordering::Acquire)
        } else {
            u64::MAX
        }
    }

    /// What keeps changes from their disks.
    pub(super) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    pub(super) fn may_write(&self, epoch: u64) {
        let mut may = lock(&self.may);
        *may = epoch.max(*may);
        self.changed.notify_all();
    }

    /// Lets the thread look again whether it is to end.
    pub(super) fn wake(&self) {
        drop(lock(&self.may));
        self.changed.notify_all();
    }

    fn pause(&self) {
        let may = lock(&self.may);
        drop(self.changed.wait_timeout(may, PAUSE));
    }

    fn name(&self, disk: u16) -> &str {
        let found = self.shared.iter().find(|(i, ..)| *i == disk);
        found.map_or("", |(.., id)| id)
    }

    /// Notes what is wrong, and logs it when it is new; `None`: nothing any more.
    fn note(&self, trouble: Option<String>) {
        let mut known = lock(&self.trouble);
        match &trouble {
            Some(trouble) if known.as_ref() != Some(trouble) => log::warn!("ft: {trouble}"),
            None if known.is_some() => log::info!("ft: shared disks can be written again"),
            _ => {}
        }
        *known = trouble;
    }
}

impl Session {
    /// The `ft-disks` thread.
    pub(super) fn write_disks(self: &Arc<Self>) {
        let over = || self.quit.load(Ordering::SeqCst) || lock(&self.core).is_over();
        loop {
            let mut may = lock(&self.disks.may);
            while *may <= self.disks.written() && !over() && !self.is_to_yield() {
                may = self.disks.changed.wait(may).unwrap_or_else(PoisonError::into_inner);
            }
            let until = *may;
            drop(may);
            if over() {
                return;
            }
            if self.is_to_yield() {
                self.yield_disks(PrimaryState::is_arbitrating);
            }
            if self.write(until, &|| lock(&self.core).may_release(self.clock.now())) {
                self.disks.written.store(until, Ordering::Release);
                self.mark();
                self.feed(Event::Written(until));
            } else {
                self.disks.pause();
            }
        }
    }

    /// Carries out the held changes of all epochs up to `until`, in order, and flushes, as long as it `may`. What was
    /// begun and not finished is begun anew the next time: held changes hide what lies on the disk.
    fn write(&self, until: u64, may: &dyn Fn() -> bool) -> bool {
        let _writing = lock(&self.disks.writing);
        let changes = self.interposer.held_changes(until);
        let mut unflushed = BTreeSet::new();
        for held in &changes {
            if !self.write_one(held.disk, &held.change, may) {
                return false;
            }
            match &*held.change {
                DiskChange::Flush => unflushed.remove(&held.disk),
                _ => unflushed.insert(held.disk),
            };
        }
        // What is only in this host's memory would be lost with it, and the backup is about to forget it (R3).
        let flushed = unflushed
            .into_iter()
            .all(|disk| self.write_one(disk, &DiskChange::Flush, may));
        if let (true, Some(last)) = (flushed, changes.last()) {
            self.interposer.written(last.number);
        }
        flushed
    }

    fn write_one(&self, disk: u16, change: &DiskChange, may: &dyn Fn() -> bool) -> bool {
        while may() {
            match self.machine.write_shared(disk, change) {
                Ok(()) => {
                    self.disks.note(None);
                    return true;
                }
                Err(e) => {
                    let id = self.disks.name(disk);
                    let trouble = format!(
                        "shared disk {id} cannot be written ({e}): the change is held and tried again, the guest waits \
                         at max_lag_mib"
                    );
                    self.disks.note(Some(trouble));
                    self.disks.pause();
                }
            }
        }
        false
    }

    /// Tells the backup with the next frame which epochs it need not keep: their outputs left, and their changes are on
    /// the shared disks.
    pub(super) fn mark(&self) {
        let released = self.disks.released.load(Ordering::Acquire);
        let mark = released.min(self.disks.written());
        self.outbox.mark.fetch_max(mark, Ordering::AcqRel);
    }

    /// The controller, when the VM goes on alone: everything that is held is carried out. The VM stands still.
    /// `false`: FT is shut down before it is done.
    pub(super) fn write_all(&self) -> bool {
        if !self.disks.any() {
            return true;
        }
        let goes_on = || !self.quit.load(Ordering::SeqCst);
        self.claim_disks(&goes_on);
        let done = self.write(u64::MAX, &goes_on);
        if !done {
            let bytes = self.interposer.unwritten();
            log::error!("ft: the VM ends here with {bytes} bytes that shared disks did not take");
        }
        self.disks.wake();
        done
    }

    /// Takes the locks back that were given to nobody. The core knows by now that the VM goes on here, so they are not
    /// given back again.
    fn claim_disks(&self, goes_on: &dyn Fn() -> bool) {
        let _writing = lock(&self.disks.writing);
        while self.disks.yielded.load(Ordering::SeqCst) && goes_on() {
            match self.machine.claim_disks() {
                Ok(None) => {
                    self.disks.yielded.store(false, Ordering::SeqCst);
                    self.disks.note(None);
                }
                Ok(Some(who)) => {
                    self.disks.note(Some(who));
                    self.disks.pause();
                }
                Err(e) => {
                    self.disks.note(Some(e.to_string()));
                    self.disks.pause();
                }
            }
        }
    }

    fn is_to_yield(&self) -> bool {
        !self.disks.yielded.load(Ordering::SeqCst) && lock(&self.core).is_arbitrating()
    }

    /// Nothing is being written, nor will be before this side has the right to go on: the backup may have the disks, if
    /// that still `holds`.
    pub(super) fn yield_disks(&self, holds: impl FnOnce(&PrimaryState) -> bool) {
        if self.disks.any() {
            let _writing = lock(&self.disks.writing);
            if holds(&lock(&self.core)) {
                self.disks.yielded.store(true, Ordering::SeqCst);
                self.machine.yield_disks();
            }
        }
    }

    /// This side lost the right to write: nothing that is held will be written, and nothing is under way any more.
    pub(super) fn give_disks_up(&self) {
        if self.disks.any() {
            let _writing = lock(&self.disks.writing);
            self.interposer.drop_changes();
            self.disks.yielded.store(true, Ordering::SeqCst);
            self.machine.yield_disks();
            self.disks.wake();
        }
    }

    /// See [`super::Primary::settle`].
    pub(super) fn settle(&self, patience: Duration) -> Result<(), Error> {
        let end = Instant::now() + patience;
        while self.interposer.unwritten() > 0 {
            if Instant::now() >= end {
                let bytes = self.interposer.unwritten();
                let why = self
                    .disks
                    .trouble()
                    .unwrap_or_else(|| "their epochs are not committed".into());
                let message = format!("{bytes} bytes wait for shared disks: {why}");
                return Err(Error::WrongState(message));
            }
            std::thread::sleep(PAUSE / 10);
        }
        Ok(())
    }

    /// Makes durable what the guest wrote to shared disks before it was protected.
    pub(super) fn flush_disks(&self) -> Result<(), MachineError> {
        let mut disks = self.disks.shared.iter();
        disks.try_for_each(|(disk, ..)| self.machine.write_shared(*disk, &DiskChange::Flush))
    }

    /// With the VM still and everything held from here on: what is on shared disks is what the backup must find there.
    /// Some blocks of it are compared, before the backup acknowledges the first epoch.
    pub(super) fn vouch_for_disks(&self) -> Result<(), MachineError> {
        self.flush_disks()?;
        let mut chance = self.clock.now();
        for (disk, size, _) in &self.disks.shared {
            let blocks = size.div_ceil(SAMPLE).max(1);
            let mut random = || {
                // Knuth's MMIX generator; its high bits are the good ones.
                chance = chance
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (chance >> 24) % blocks
            };
            let mut wanted: BTreeSet<u64> = (0..SAMPLES).map(|_| random()).collect();
            wanted.extend([0, blocks - 1]);
            for offset in wanted.into_iter().map(|block| block * SAMPLE) {
                let len = SAMPLE.min(size - offset);
                let mut bytes = vec![0; len as usize];
                self.machine.read_disk(*disk, offset, &mut bytes)?;
                let crc = checksum(&bytes);
                self.interposer.log_disk(*disk, DiskChange::Check { offset, len, crc });
            }
        }
        Ok(())
    }
}
