//! The backup's side: what its copy of a disk is, before and while it is made a copy of another session's.

use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::bitmap::blocks_of;
use super::sidecar::{self, Record};
use super::{BLOCK, BlockMap, BlockRun, CopyClaim, KnownCopy, SessionId, Side, Sidecar, bytes_of};

/// Runs of doubtful blocks in a claim.
const MAX_RUNS: usize = 8 << 10;

/// Blocks whose checksums are in a claim, at most; and how many of them that are not zero suffice.
const SAMPLE: (usize, usize) = (1024, 256);

/// A backup's copy of a disk.
#[derive(Debug)]
pub struct ShadowCopy {
    wanted: Record,
    /// What is known of it, and its doubtful blocks.
    known: Result<(Record, BlockMap), String>,
    /// It was not written yet.
    untouched: bool,
    sidecar: Option<Sidecar>,
}

impl ShadowCopy {
    /// Opens what there is to an image, and changes nothing.
    pub fn open(image: &Path, vm: &str, disk: &str, size: u64) -> Self {
        let wanted = Record {
            vm: vm.into(),
            disk: disk.into(),
            size,
            session: SessionId {
                name: String::new(),
                generation: 0,
            },
            side: Side::Backup,
        };
        let (sidecar, reason) = match Sidecar::open(image) {
            Ok(Some(sidecar)) => (Some(sidecar), String::new()),
            Ok(None) => (None, "there is no record of images of its kind or size".into()),
            Err(e) => {
                let path = super::path_of(image);
                log::warn!("ft: {}: {e}: the whole disk will have to be copied", path.display());
                (None, format!("its record cannot be opened: {e}"))
            }
        };
        Self {
            wanted,
            known: Err(reason),
            untouched: true,
            sidecar,
        }
    }

    fn note(&mut self, what: impl FnOnce(&mut Sidecar) -> io::Result<()>) {
        sidecar::note(&mut self.sidecar, what);
    }

    /// What it is, for the primary. This process must have locked the image. A record that is not believed is removed.
    pub fn claim(&mut self) -> CopyClaim {
        if let Some(sidecar) = &mut self.sidecar {
            self.known = sidecar.read(&self.wanted);
        }
        let sampled = match (&self.known, &self.sidecar) {
            (Ok((_, doubtful)), Some(sidecar)) => {
                sample(sidecar.image(), doubtful, self.wanted.size).map_err(|e| format!("it cannot be read: {e}"))
            }
            (Err(reason), _) => Err(reason.clone()),
            (Ok(_), None) => Err("there is no record of it".into()),
        };
        match (&self.known, sampled) {
            (Ok((record, doubtful)), Ok(sample)) => CopyClaim::Known(KnownCopy {
                session: record.session.clone(),
                side: record.side,
                doubtful: doubtful.coarse_runs(MAX_RUNS),
                sample,
            }),
            (_, sampled) => {
                let reason = sampled.err().unwrap_or_default();
                self.known = Err(reason.clone());
                self.note(Sidecar::invalidate);
                CopyClaim::Unknown(reason)
            }
        }
    }

    /// A range is about to be written. Call it before that.
    pub fn before_write(&mut self, offset: u64, len: u64) {
        if std::mem::take(&mut self.untouched) {
            if self.known.is_ok() {
                self.note(Sidecar::reopen);
            } else {
                self.note(Sidecar::invalidate);
            }
        }
        self.note(Sidecar::touch);
        // With a record of the session that runs, its own changes are no doubts.
        if self.wanted.session.name.is_empty() {
            self.doubt(offset, len);
        }
    }

    /// This range is not what it should be, or will not be.
    pub fn doubt(&mut self, offset: u64, len: u64) {
        let Ok((_, doubtful)) = &mut self.known else { return };
        let mut words: Vec<(usize, u32)> = Vec::new();
        for block in blocks_of(offset, len) {
            let word = (block / 32) as usize;
            if doubtful.insert(block) {
                words.retain(|(other, _)| *other != word);
                words.push((word, doubtful.words()[word]));
            }
        }
        self.note(|sidecar| words.iter().try_for_each(|(word, bits)| sidecar.set(*word, *bits)));
    }

    /// From now on it is the backup's copy of this session.
    pub fn synced(&mut self, session: &SessionId) {
        self.untouched = false;
        self.wanted.session = session.clone();
        let none = BlockMap::new(self.wanted.size);
        let record = self.wanted.clone();
        self.note(|sidecar| sidecar.begin(record, &none));
        self.known = Ok((self.wanted.clone(), none));
    }

    /// The session whose copy it is, if it is one of the session that runs.
    pub fn session(&self) -> Option<&SessionId> {
        Some(&self.wanted.session).filter(|session| !session.name.is_empty())
    }

    /// It will not be written any more; the image is synced. May take long.
    pub fn close(&mut self) {
        if self.known.is_ok() && !self.untouched {
            self.note(Sidecar::seal);
        }
    }

    /// It becomes the disk of a running VM: nothing is said of it any more.
    pub fn into_sidecar(mut self) -> Option<Sidecar> {
        self.note(Sidecar::invalidate);
        self.sidecar
    }
}

/// Checksums of some blocks that are not doubtful.
fn sample(image: &File, doubtful: &BlockMap, size: u64) -> io::Result<Vec<(u64, u32)>> {
    let blocks = doubtful.blocks();
    let (most, enough) = (SAMPLE.0.min(blocks as usize), SAMPLE.1);
    let mut sums = Vec::new();
    let (mut buf, mut told) = (vec![0; BLOCK as usize], 0);
    let mut seen = BlockMap::new(size);
    let random = std::collections::hash_map::RandomState::new();
    for n in 0..most as u64 {
        let block = if blocks <= SAMPLE.0 as u64 {
            n
        } else {
            let mut hasher = random.build_hasher();
            hasher.write_u64(n);
            hasher.finish() % blocks
        };
        if doubtful.contains(block) || !seen.insert(block) {
            continue;
        }
        let (offset, len) = bytes_of(BlockRun { first: block, count: 1 }, size);
        let buf = &mut buf[..len as usize];
        image.read_exact_at(buf, offset)?;
        sums.push((block, crc32c::crc32c(buf)));
        told += usize::from(buf.iter().any(|byte| *byte != 0));
        if told >= enough && blocks > SAMPLE.0 as u64 {
            break;
        }
    }
    Ok(sums)
}
