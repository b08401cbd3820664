//! The primary's side: which blocks of its disk may differ from the peer's copy.
//!
//! While a session runs, these are the blocks of epochs that the backup is not known to have applied. They are kept in two
//! maps: the newer one takes all that are changed; when all epochs of the older one are applied, it is dropped and the
//! newer one takes its place. After the session nothing is dropped any more. The same blocks are in the sidecar while the
//! session runs: should the backup take over, this disk differs from its in these blocks at most.

use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::bitmap::blocks_of;
use super::sidecar::{self, Record};
use super::{BlockMap, Divergence, SessionId, Side, Sidecar, lock};

/// Blocks stay in the maps so long at least: a block that is written again and again is marked once.
const KEEP: Duration = Duration::from_secs(1);

/// The history of one writable disk. Any thread may call it; its lock is held only for moments.
#[derive(Debug)]
pub struct DiskHistory {
    vm: String,
    disk: String,
    size: u64,
    keep: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The session, and which of its copies the peer has.
    session: Option<(SessionId, Side)>,
    /// The session runs.
    runs: bool,
    /// Blocks of epochs up to `boundary`.
    older: BlockMap,
    newer: BlockMap,
    boundary: u64,
    turned: Instant,
    /// A change failed here: it may be done on the other side.
    failed: BlockMap,
    sidecar: Option<Sidecar>,
}

impl Inner {
    fn changed(&self) -> BlockMap {
        let mut changed = self.older.clone();
        changed.join(&self.newer);
        changed.join(&self.failed);
        changed
    }

    fn bits(&self, word: usize) -> u32 {
        self.older.words()[word] | self.newer.words()[word] | self.failed.words()[word]
    }

    fn note(&mut self, what: impl FnOnce(&mut Sidecar) -> io::Result<()>) {
        sidecar::note(&mut self.sidecar, what);
    }

    fn clear(&mut self) {
        self.older.clear();
        self.newer.clear();
        self.failed.clear();
    }
}

impl DiskHistory {
    /// Of a disk of `size` bytes, of which nothing is known yet.
    pub fn new(vm: &str, disk: &str, size: u64, sidecar: Option<Sidecar>) -> Self {
        let map = BlockMap::new(size);
        Self {
            vm: vm.into(),
            disk: disk.into(),
            size,
            keep: KEEP,
            inner: Mutex::new(Inner {
                session: None,
                runs: false,
                older: map.clone(),
                newer: map.clone(),
                boundary: 0,
                turned: Instant::now(),
                failed: map,
                sidecar,
            }),
        }
    }

    /// Blocks stay so long, instead of a second, before they are forgotten: for tests.
    pub fn keeping(self, keep: Duration) -> Self {
        Self { keep, ..self }
    }

    /// A session begins: the backup has (or will have, once it has everything of pre-copy) this very content. The VM must
    /// stand still.
    pub fn begin(&self, session: &SessionId) {
        let mut inner = lock(&self.inner);
        inner.clear();
        inner.session = Some((session.clone(), Side::Backup));
        (inner.runs, inner.boundary, inner.turned) = (true, 0, Instant::now());
        let record = Record {
            vm: self.vm.clone(),
            disk: self.disk.clone(),
            size: self.size,
            session: session.clone(),
            side: Side::Primary,
        };
        let none = BlockMap::new(self.size);
        inner.note(|sidecar| sidecar.begin(record, &none));
    }

    /// This disk is that of the last committed epoch of a session which was taken over here. Before the VM runs.
    pub fn took_over(&self, session: &SessionId) {
        let mut inner = lock(&self.inner);
        inner.clear();
        inner.session = Some((session.clone(), Side::Primary));
        inner.runs = false;
        inner.note(Sidecar::invalidate);
    }

    /// A range is about to be changed. Call it before that.
    pub fn mark(&self, offset: u64, len: u64) {
        let mut inner = lock(&self.inner);
        let runs = inner.runs;
        if runs {
            inner.note(Sidecar::touch);
        }
        let mut words = Vec::new();
        for block in blocks_of(offset, len) {
            let word = (block / 32) as usize;
            if inner.newer.insert(block) && !inner.older.contains(block) && words.last() != Some(&word) {
                words.push(word);
            }
        }
        for word in words.into_iter().filter(|_| runs) {
            let bits = inner.bits(word);
            inner.note(|sidecar| sidecar.set(word, bits));
        }
    }

    /// A change of this range failed here.
    pub fn mark_failed(&self, offset: u64, len: u64) {
        self.mark(offset, len);
        let mut inner = lock(&self.inner);
        for block in blocks_of(offset, len) {
            inner.failed.insert(block);
        }
    }

    /// The backup has applied all epochs up to `applied`; `running` is the one that runs now, and what was marked up to now
    /// belongs to it or to earlier ones.
    pub fn confirm(&self, applied: u64, running: u64) {
        let mut inner = lock(&self.inner);
        if !inner.runs || applied < inner.boundary || inner.turned.elapsed() < self.keep {
            return;
        }
        let none = BlockMap::new(self.size);
        let newer = std::mem::replace(&mut inner.newer, none);
        let dropped = std::mem::replace(&mut inner.older, newer);
        (inner.boundary, inner.turned) = (running, Instant::now());
        for (word, bits) in dropped.words().iter().enumerate() {
            let left = inner.bits(word);
            if bits & !left != 0 {
                inner.note(|sidecar| sidecar.set(word, left));
            }
        }
    }

    /// The session is over and the VM goes on here. The VM must stand still.
    pub fn go_alone(&self) {
        let mut inner = lock(&self.inner);
        inner.runs = false;
        inner.note(Sidecar::invalidate);
    }

    /// The session is over and the VM will never run here again: what the sidecar says stays, for later boots too. The
    /// image is synced, which may take long.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        if std::mem::take(&mut inner.runs) {
            inner.note(Sidecar::seal);
        }
    }

    /// The peer's copy is not what it should be: nothing is known.
    pub fn refute(&self) {
        lock(&self.inner).session = None;
    }

    /// What is known.
    pub fn divergence(&self) -> Option<Divergence> {
        let inner = lock(&self.inner);
        let (session, peer) = inner.session.clone()?;
        Some(Divergence {
            session,
            peer,
            changed: inner.changed(),
        })
    }

    /// Whether a block may differ.
    pub fn is_changed(&self, block: u64) -> bool {
        let inner = lock(&self.inner);
        [&inner.older, &inner.newer, &inner.failed]
            .iter()
            .any(|map| map.contains(block))
    }
}
