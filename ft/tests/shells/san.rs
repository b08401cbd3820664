//! A disk that both hosts see, with its lock.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use ft::machine::{DiskChange, MachineError, checksum};

use crate::fake::lock;

/// Its index among the disks of [`shared_identity`].
pub const DISK: u16 = 2;

#[derive(Default)]
pub struct Inner {
    pub bytes: Vec<u8>,
    /// What survives the loss of the host that writes.
    pub flushed: Vec<u8>,
    /// Who has the lock, and who wrote last.
    pub owner: Option<u64>,
    pub writers: Vec<u64>,
    /// Every write fails.
    pub broken: bool,
    /// Writes take until this is over.
    pub hangs: bool,
    pub flushes: usize,
}

#[derive(Default)]
pub struct San {
    inner: Mutex<Inner>,
    moved: Condvar,
}

impl San {
    pub fn new(size: u64) -> Self {
        let inner = Inner {
            bytes: vec![0xcc; size as usize],
            flushed: vec![0xcc; size as usize],
            ..Inner::default()
        };
        Self {
            inner: Mutex::new(inner),
            moved: Condvar::new(),
        }
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.inner().bytes.clone()
    }

    pub fn hang(&self, hangs: bool) {
        self.inner().hangs = hangs;
        self.moved.notify_all();
    }

    /// `who` must have the lock for what is more than a look (R4).
    pub fn carry_out(&self, who: u64, change: &DiskChange) -> Result<(), MachineError> {
        let (offset, len) = change.range();
        let range = offset as usize..(offset + len) as usize;
        let inner = &mut *self.inner();
        if let DiskChange::Check { crc, .. } = change {
            let same = checksum(&inner.bytes[range]) == *crc;
            return same.then_some(()).ok_or_else(|| MachineError("another disk".into()));
        }
        assert_eq!(inner.owner, Some(who), "R4: a write without the lock");
        if inner.broken {
            return Err(MachineError("the fabric is down".into()));
        }
        match change {
            DiskChange::Write { data, .. } => inner.bytes[range].copy_from_slice(data),
            DiskChange::Flush => {
                inner.flushes += 1;
                inner.flushed.clone_from(&inner.bytes);
            }
            _ => inner.bytes[range].fill(0),
        }
        inner.writers.push(who);
        Ok(())
    }

    /// A write that is stuck on its way, as those of a stopped process.
    pub fn wait(&self) {
        let mut inner = self.inner();
        while inner.hangs {
            inner = self.moved.wait_timeout(inner, Duration::from_secs(20)).unwrap().0;
        }
    }

    pub fn claim(&self, who: u64) -> Option<String> {
        let mut inner = self.inner();
        match inner.owner {
            Some(other) if other != who => Some(format!("host {other} has the lock of the shared disk")),
            _ => {
                inner.owner = Some(who);
                None
            }
        }
    }

    pub fn give_back(&self, who: u64) {
        let mut inner = self.inner();
        inner.owner = inner.owner.filter(|owner| *owner != who);
    }
}
