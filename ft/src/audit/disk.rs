//! The audit of disks, on the primary.
//!
//! Reading a disk may take long, so a thread of its own does it, chunk after chunk through all replicated disks. A batch
//! of chunks is chosen while the VM stands still for a checkpoint ([`DiskAudit::turn`]), when no request is under way.
//! From then on every logged change that overlaps it is noted ([`DiskAudit::changed`]). At the first checkpoint at which
//! all of it is read, the chunks that were not touched are as they were read: their checksums go with that epoch.
//!
//! Locks: `state` is taken last, with the interposer's lock held ([`DiskAudit::changed`]) or none, and never while a disk
//! is being read.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::ChunkSum;
use crate::machine::{DiskChange, Identity, Protected};
use crate::primary::session::lock;

/// Bytes of a disk that are compared at a time. Small: what lies beside a block that the guest writes all the time is to
/// be compared as well.
pub const CHUNK: u64 = 4096;

/// Most chunks that go with an epoch: the backup reads them before it goes on.
pub const MAX_CHUNKS: usize = 256;

/// Some consecutive chunks of one disk.
#[derive(Debug)]
struct Batch {
    disk: u16,
    offset: u64,
    len: u64,
    /// Chunks that were changed since the batch was chosen.
    touched: [bool; MAX_CHUNKS],
    /// Their checksums, once all are read. `None`: was touched before it was read, or could not be read.
    sums: Option<Vec<Option<u32>>>,
    /// The last disk ends here.
    last: bool,
}

impl Batch {
    /// (offset, length) of each chunk.
    fn chunks(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (offset, end) = (self.offset, self.offset + self.len);
        let starts = (offset..end).step_by(CHUNK as usize);
        starts.map(move |start| (start, CHUNK.min(end - start)))
    }

    fn touch(&mut self, offset: u64, len: u64) {
        let (from, to) = (offset.max(self.offset), (offset + len).min(self.offset + self.len));
        if from < to {
            let (first, last) = ((from - self.offset) / CHUNK, (to - 1 - self.offset) / CHUNK);
            self.touched[first as usize..=last as usize].fill(true);
        }
    }

    fn settled(&self) -> Vec<ChunkSum> {
        let sums = self.sums.iter().flatten().zip(self.touched).zip(self.chunks());
        let intact = sums.filter_map(|((crc, touched), (offset, len))| {
            crc.filter(|_| !touched).map(|crc| ChunkSum {
                disk: self.disk,
                offset,
                len: len as u32,
                crc,
            })
        });
        intact.collect()
    }
}

#[derive(Debug)]
struct State {
    /// Next chunk: place in `disks`, offset.
    next: (usize, u64),
    /// When the rate was last looked at.
    last: Instant,
    /// Bytes that are due.
    due: f64,
    batch: Option<Batch>,
    rounds: u64,
    closed: bool,
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct DiskAudit {
    /// Index and size of the replicated disks.
    disks: Vec<(u16, u64)>,
    state: Mutex<State>,
    /// Wakes the thread.
    chosen: Condvar,
}

impl DiskAudit {
    pub(crate) fn new(identity: &Identity) -> Self {
        let disks = (0..).zip(&identity.disks);
        let replicated = disks.filter(|(_, disk)| disk.is_replicated() && disk.size > 0);
        Self {
            disks: replicated.map(|(index, disk)| (index, disk.size)).collect(),
            state: Mutex::new(State {
                next: (0, 0),
                last: Instant::now(),
                due: 0.0,
                batch: None,
                rounds: 0,
                closed: false,
            }),
            chosen: Condvar::new(),
        }
    }

    /// A change was logged. Called in the order of the log.
    pub(crate) fn changed(&self, disk: u16, change: &DiskChange) {
        let (offset, len) = change.range();
        if len == 0 {
            return;
        }
        if let Some(batch) = lock(&self.state).batch.as_mut().filter(|batch| batch.disk == disk) {
            batch.touch(offset, len);
        }
    }

    /// At a checkpoint, while the VM stands still: the checksums that are true now, and as many new chunks as `mib_s` (MiB
    /// per second) allows.
    pub(crate) fn turn(&self, mib_s: u32) -> Vec<ChunkSum> {
        let mut state = lock(&self.state);
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(state.last).as_secs_f64();
        state.last = now;
        let rate = f64::from(mib_s) * (1 << 20) as f64;
        let most = (MAX_CHUNKS as u64 * CHUNK) as f64;
        state.due = if mib_s == 0 {
            0.0
        } else {
            (state.due + elapsed * rate).min(most)
        };
        let settled = match &state.batch {
            Some(Batch { sums: None, .. }) => return Vec::new(),
            Some(batch) => {
                let (settled, last) = (batch.settled(), batch.last);
                state.rounds += u64::from(last);
                settled
            }
            None => Vec::new(),
        };
        state.batch = self.choose(&mut state);
        if state.batch.is_some() {
            self.chosen.notify_all();
        }
        settled
    }

    fn choose(&self, state: &mut State) -> Option<Batch> {
        let (at, offset) = state.next;
        let (disk, size) = *self.disks.get(at)?;
        let len = ((state.due / CHUNK as f64) as u64 * CHUNK).min(size - offset);
        if len == 0 {
            return None;
        }
        state.due -= len as f64;
        state.next = if offset + len < size {
            (at, offset + len)
        } else {
            ((at + 1) % self.disks.len(), 0)
        };
        Some(Batch {
            disk,
            offset,
            len,
            touched: [false; MAX_CHUNKS],
            sums: None,
            last: state.next == (0, 0),
        })
    }

    /// The thread's body: reads what was chosen until [`DiskAudit::close`].
    pub(crate) fn run(&self, machine: &dyn Protected) {
        let mut buffer = vec![0; CHUNK as usize];
        loop {
            let (disk, chunks) = {
                let mut state = lock(&self.state);
                loop {
                    match &state.batch {
                        _ if state.closed => return,
                        Some(batch) if batch.sums.is_none() => break (batch.disk, batch.chunks()),
                        _ => state = self.chosen.wait(state).unwrap_or_else(PoisonError::into_inner),
                    }
                }
            };
            let sums = (0..).zip(chunks).map(|(i, (offset, len))| {
                let state = lock(&self.state);
                if state.closed || state.batch.as_ref().is_none_or(|batch| batch.touched[i]) {
                    return None;
                }
                drop(state);
                let bytes = &mut buffer[..len as usize];
                match machine.read_disk(disk, offset, bytes) {
                    Ok(()) => Some(crc32c::crc32c(bytes)),
                    Err(e) => {
                        log::warn!("ft: audit: disk {disk} of the primary cannot be read at {offset:#x}: {e}");
                        None
                    }
                }
            });
            let sums = sums.collect();
            // Only [`DiskAudit::turn`] takes a batch away, and only one that is read.
            if let Some(batch) = &mut lock(&self.state).batch {
                batch.sums = Some(sums);
            }
        }
    }

    /// The thread is to end.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.chosen.notify_all();
    }

    /// How often all disks were gone through.
    pub(crate) fn rounds(&self) -> u64 {
        lock(&self.state).rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::DiskIdentity;

    /// Disks of so many bytes; `None`: read-only.
    fn audit(sizes: &[Option<u64>]) -> DiskAudit {
        let disk = |size: &Option<u64>| DiskIdentity {
            id: "d".into(),
            size: size.unwrap_or(CHUNK),
            readonly: size.is_none(),
            shared: None,
        };
        DiskAudit::new(&Identity {
            vm_id: "vm".into(),
            vmm_version: String::new(),
            config: String::new(),
            memory: Vec::new(),
            vcpus: 1,
            cpu_features: Vec::new(),
            tsc_khz: 0,
            disks: sizes.iter().map(disk).collect(),
            nics: 0,
        })
    }

    /// Everything that may be chosen is.
    fn turn(audit: &DiskAudit) -> Vec<ChunkSum> {
        lock(&audit.state).due = 1e9;
        audit.turn(1)
    }

    /// The thread's work; the checksum of a chunk is its number.
    fn read(audit: &DiskAudit) {
        let mut state = lock(&audit.state);
        let batch = state.batch.as_mut().unwrap();
        batch.sums = Some(
            batch
                .chunks()
                .map(|(offset, _)| Some((offset / CHUNK) as u32))
                .collect(),
        );
    }

    fn zero(offset: u64, len: u64) -> DiskChange {
        DiskChange::Zero {
            offset,
            len,
            unmap: false,
        }
    }

    #[test]
    fn all_replicated_disks_are_gone_through_in_turn_to_their_last_byte() {
        let long = (MAX_CHUNKS as u64 + 1) * CHUNK + 512;
        let audit = audit(&[None, Some(long), Some(CHUNK)]);
        let mut seen = Vec::new();
        assert_eq!(turn(&audit), []);
        for _ in 0..4 {
            read(&audit);
            seen.extend(
                turn(&audit)
                    .iter()
                    .map(|sum| (sum.disk, sum.offset, u64::from(sum.len))),
            );
        }
        let mut expected: Vec<_> = (0..MAX_CHUNKS as u64 + 1).map(|n| (1, n * CHUNK, CHUNK)).collect();
        expected.extend([(1, long - 512, 512), (2, 0, CHUNK)]);
        expected.extend((0..MAX_CHUNKS as u64).map(|n| (1, n * CHUNK, CHUNK)));
        assert_eq!(seen, expected);
        assert_eq!(audit.rounds(), 1);
    }

    #[test]
    fn a_chunk_that_was_touched_before_the_epoch_ends_is_not_compared() {
        let audit = audit(&[Some(8 * CHUNK)]);
        // Before anything is chosen: of no interest.
        audit.changed(0, &zero(0, 8 * CHUNK));
        turn(&audit);
        audit.changed(0, &zero(CHUNK, 1));
        read(&audit);
        // Chosen and read, with the checkpoint still to come.
        audit.changed(0, &zero(4 * CHUNK - 1, CHUNK + 1));
        audit.changed(1, &zero(0, CHUNK));
        audit.changed(0, &DiskChange::Flush);
        let data = vec![0; 1];
        audit.changed(
            0,
            &DiskChange::Write {
                offset: 8 * CHUNK - 1,
                data,
            },
        );
        let left: Vec<u32> = turn(&audit).iter().map(|sum| sum.crc).collect();
        assert_eq!(left, [0, 2, 5, 6]);
    }

    #[test]
    fn a_batch_that_takes_long_to_read_is_watched_through_all_epochs() {
        let audit = audit(&[Some(2 * CHUNK)]);
        turn(&audit);
        audit.changed(0, &zero(0, 1));
        for _ in 0..3 {
            assert_eq!(turn(&audit), []);
        }
        read(&audit);
        let settled = turn(&audit);
        assert_eq!((settled.len(), settled[0].offset), (1, CHUNK));
    }

    #[test]
    fn nothing_is_chosen_at_rate_zero_or_without_disks() {
        let idle = audit(&[Some(CHUNK)]);
        lock(&idle.state).due = 1e9;
        assert_eq!(idle.turn(0), []);
        assert!(lock(&idle.state).batch.is_none());
        let none = audit(&[None]);
        assert_eq!(turn(&none), []);
        assert!(lock(&none.state).batch.is_none());
    }
}
