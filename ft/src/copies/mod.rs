//! What the two copies of a replicated disk have in common, so that only what differs is copied again (R3).
//!
//! A session's two disks are equal at its first checkpoint. From then on each side can say at any time in which blocks its
//! own disk may differ from the other's:
//!
//! * the primary writes its own disk at once, so it knows the blocks that were changed in epochs which the backup is not
//!   known to have applied, and goes on with that when it runs alone ([`history`]);
//! * the backup's disk has everything up to some epoch that it applied, and parts of later ones, which are among the
//!   primary's blocks;
//! * a backup that takes over at epoch k has exactly the disk of k; the old primary's differs from that in its own blocks
//!   only. From then on the new primary knows what it changes.
//!
//! What must outlive its process is in a file beside the image ([`sidecar`]). When the two meet again, the backup *claims*
//! what its copy is ([`CopyClaim`], in `accept`), and the primary copies its own changed blocks and those that the claim
//! calls doubtful ([`plan`]). Whatever does not fit exactly is no proof: everything is copied.

mod bitmap;
mod history;
mod shadow;
mod sidecar;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use bitmap::BlockMap;
pub use history::DiskHistory;
pub use shadow::ShadowCopy;
pub use sidecar::{Sidecar, path_of};

/// Size in bytes of a block of a disk; the last one of a disk may be shorter.
pub const BLOCK: u64 = 64 << 10;

/// Larger disks (in bytes) are always copied whole: what is kept of a disk takes memory, one bit for a block.
pub const MAX_SIZE: u64 = 64 << 40;

/// One pairing of a primary and a backup. Names are unique: no other session ever has this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionId {
    /// The primary's name in the arbiter.
    pub name: String,
    /// The generation in which it began.
    pub generation: u64,
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (generation {})", self.name, self.generation)
    }
}

/// Which of a session's two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// That of the VMM which ran the VM.
    Primary,
    /// That of the VMM which shadowed it.
    Backup,
}

/// Blocks that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRun {
    /// Number of the first block.
    pub first: u64,
    /// How many; not 0.
    pub count: u64,
}

/// What a backup says of its copy of a disk, before anything is copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyClaim {
    /// Nothing, and why.
    Unknown(String),
    /// It is a copy of a session's.
    Known(KnownCopy),
}

/// A copy whose history is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownCopy {
    /// The session.
    pub session: SessionId,
    /// Which of its copies.
    pub side: Side,
    /// Blocks in which it may differ from what the other side knows, ascending.
    pub doubtful: Vec<BlockRun>,
    /// CRC-32C of some other blocks as they are: a claim that is wrong in spite of everything shows by them.
    pub sample: Vec<(u64, u32)>,
}

/// What a primary knows about the copy of the peer that it had last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divergence {
    /// The session in which they were equal.
    pub session: SessionId,
    /// Which copy of it the peer has.
    pub peer: Side,
    /// Blocks of this side that may differ from it.
    pub changed: BlockMap,
}

/// The blocks that must be copied to a peer with this claim, or why all must be. `size`: of the disk, in bytes.
pub fn plan(known: Option<Divergence>, claim: Option<&CopyClaim>, size: u64) -> Result<BlockMap, String> {
    let claim = match claim {
        None => return Err("the backup says nothing of its copy".into()),
        Some(CopyClaim::Unknown(reason)) => return Err(format!("the backup's copy is unknown: {reason}")),
        Some(CopyClaim::Known(claim)) => claim,
    };
    let Some(known) = known else {
        return Err("this side knows no earlier copy of its disk".into());
    };
    if known.session != claim.session || known.peer != claim.side {
        return Err(format!(
            "the backup's copy is the {:?}'s of session {}, known here is the {:?}'s of session {}",
            claim.side, claim.session, known.peer, known.session
        ));
    }
    let mut blocks = known.changed;
    let mut from = 0;
    for run in &claim.doubtful {
        let end = run.first.checked_add(run.count).filter(|end| *end <= blocks.blocks());
        let (Some(end), true) = (end, run.count > 0 && run.first >= from) else {
            return Err("the backup's list of doubtful blocks does not fit the disk".into());
        };
        blocks.insert_run(*run);
        from = end;
    }
    if blocks.blocks() != size.div_ceil(BLOCK) {
        return Err("the size of the disk has changed".into());
    }
    Ok(blocks)
}

/// Bytes of a disk of `size` that belong to a run of its blocks: (offset, length).
pub fn bytes_of(run: BlockRun, size: u64) -> (u64, u64) {
    let offset = run.first.saturating_mul(BLOCK).min(size);
    let end = run.first.saturating_add(run.count).saturating_mul(BLOCK).min(size);
    (offset, end - offset)
}

/// A panic leaves nothing half done under these locks.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(claim: &KnownCopy) -> CopyClaim {
        CopyClaim::Known(claim.clone())
    }

    #[test]
    fn r3_only_the_very_session_and_side_is_a_proof() {
        let size = 10 * BLOCK + 1;
        let session = SessionId {
            name: "primary-1".into(),
            generation: 4,
        };
        let mut changed = BlockMap::new(size);
        changed.insert(3);
        let divergence = Divergence {
            session: session.clone(),
            peer: Side::Primary,
            changed,
        };
        let claim = KnownCopy {
            session: session.clone(),
            side: Side::Primary,
            doubtful: vec![BlockRun { first: 9, count: 2 }],
            sample: Vec::new(),
        };
        let plan = |claim: &CopyClaim| plan(Some(divergence.clone()), Some(claim), size);
        let runs = plan(&known(&claim)).unwrap().runs();
        assert_eq!(runs, [BlockRun { first: 3, count: 1 }, BlockRun { first: 9, count: 2 }]);
        assert_eq!(bytes_of(runs[1], size), (9 * BLOCK, BLOCK + 1));
        let wrong: [fn(&mut KnownCopy); 7] = [
            |c| c.session.name = "primary-2".into(),
            |c| c.session.generation = 5,
            |c| c.side = Side::Backup,
            |c| c.doubtful[0].count = 3,
            |c| c.doubtful[0].first = u64::MAX,
            |c| c.doubtful[0].count = 0,
            |c| c.doubtful.push(BlockRun { first: 1, count: 1 }),
        ];
        for change in wrong {
            let mut claim = claim.clone();
            change(&mut claim);
            plan(&known(&claim)).unwrap_err();
        }
        plan(&CopyClaim::Unknown("new".into())).unwrap_err();
        super::plan(None, Some(&known(&claim)), size).unwrap_err();
        super::plan(Some(divergence.clone()), None, size).unwrap_err();
        super::plan(Some(divergence.clone()), Some(&known(&claim)), size + BLOCK).unwrap_err();
    }
}
