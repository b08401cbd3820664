//! How often each cluster of an image is used: looked at, and if need be counted anew, before an image is written.
//!
//! The library trusts an image's refcounts, so they must be right: a cluster that is in use but not counted would be given
//! away a second time. They can be wrong because the process that wrote the image died (the library writes tables that
//! use a cluster before it writes that the cluster is used), or because somebody made them so. So the L1 and L2 tables
//! are gone through, and new refcounts are made where the old ones differ. What is wrong with the tables themselves (a
//! cluster that is used twice, or beyond the end of the file) cannot be put right here; such an image is not opened for
//! writing.
//!
//! New refcounts go behind everything that is in use; only then the header names them. So this can be interrupted at any
//! time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{Header, Refusal, set_refcount_table};

/// Clusters of an image file at most, for their counts are held in memory: 8 TiB of clusters of 64 KiB.
const MAX_CLUSTERS: u64 = 1 << 27;

/// Offset in L1 and L2 entries.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;

/// A cluster that only one may use. Compressed ones share theirs.
const EXCLUSIVE: u16 = 1 << 15;

struct Counts {
    cluster_bits: u32,
    counts: Vec<u16>,
}

impl Counts {
    fn get(&mut self, offset: u64) -> Result<&mut u16, Refusal> {
        let index = usize::try_from(offset >> self.cluster_bits).ok();
        let count = index.and_then(|index| self.counts.get_mut(index));
        count.ok_or(Refusal::Damaged("a cluster is beyond the end of the file"))
    }

    fn exclusive(&mut self, offset: u64, len: u64) -> Result<(), Refusal> {
        let cluster = 1u64 << self.cluster_bits;
        if !offset.is_multiple_of(cluster) {
            return Err(Refusal::Damaged("a table's entry is not at a cluster's start"));
        }
        for at in (offset..offset.saturating_add(len)).step_by(cluster as usize) {
            match self.get(at)? {
                count @ 0 => *count = EXCLUSIVE,
                _ => return Err(Refusal::Damaged("a cluster is used twice")),
            }
        }
        Ok(())
    }

    /// The bytes of a compressed cluster, which end in the middle of something.
    fn shared(&mut self, start: u64, end: u64) -> Result<(), Refusal> {
        for cluster in start >> self.cluster_bits..=(end - 1) >> self.cluster_bits {
            match self.get(cluster << self.cluster_bits)? {
                count if *count < EXCLUSIVE - 1 => *count += 1,
                _ => return Err(Refusal::Damaged("a cluster is used twice")),
            }
        }
        Ok(())
    }

    fn l2(&mut self, entries: &[u8]) -> Result<(), Refusal> {
        for entry in entries.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes)) {
            if entry & COMPRESSED != 0 && entry & COPIED == 0 {
                let bits = 62 - (self.cluster_bits - 8);
                let offset = entry & ((1 << bits) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> bits;
                self.shared(offset, (offset & !511) + (sectors + 1) * 512)?;
            } else if entry & (COMPRESSED | L2_RESERVED) != 0 {
                return Err(Refusal::Damaged("an entry of an L2 table"));
            } else if entry & OFFSET != 0 {
                self.exclusive(entry & OFFSET, 1)?;
            }
        }
        Ok(())
    }
}

/// Finds out how often each cluster is used, but for those of the refcounts.
fn count(file: &File, header: &Header) -> Result<Counts, Refusal> {
    let cluster = header.cluster();
    let clusters = file.metadata()?.len().div_ceil(cluster);
    if clusters > MAX_CLUSTERS {
        return Err(Refusal::TooLong);
    }
    let mut counts = Counts {
        cluster_bits: header.cluster_bits,
        counts: vec![0; clusters as usize],
    };
    counts.exclusive(0, cluster)?;
    let mut l1 = vec![0; header.l1_entries * 8];
    counts.exclusive(header.l1_offset, l1.len() as u64)?;
    read(file, &mut l1, header.l1_offset)?;
    let mut l2 = vec![0; cluster as usize];
    for entry in l1.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes)) {
        if entry & L1_RESERVED != 0 {
            return Err(Refusal::Damaged("an entry of its L1 table"));
        }
        let offset = entry & OFFSET;
        if offset != 0 {
            counts.exclusive(offset, 1)?;
            read(file, &mut l2, offset)?;
            counts.l2(&l2)?;
        }
    }
    Ok(counts)
}

/// Whether the image's refcounts are these.
fn are_right(file: &File, header: &Header, mut counts: Counts) -> Result<bool, Refusal> {
    let cluster = header.cluster();
    let mut table = vec![0; (header.refcount_table_clusters << header.cluster_bits) as usize];
    counts.exclusive(header.refcount_table_offset, table.len() as u64)?;
    read(file, &mut table, header.refcount_table_offset)?;
    let blocks: Vec<u64> = table
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_be_bytes(*bytes))
        .collect();
    for block in blocks.iter().filter(|offset| **offset != 0) {
        counts.exclusive(*block, 1)?;
    }
    let per_block = header.counts_per_block();
    let mut block = vec![0; cluster as usize];
    let mut expected = counts.counts.chunks(per_block);
    for offset in blocks {
        let expected = expected.next().unwrap_or_default();
        if offset == 0 {
            if expected.iter().any(|count| *count != 0) {
                return Ok(false);
            }
            continue;
        }
        read(file, &mut block, offset)?;
        let mut right = (0..per_block).zip(expected.iter().chain(std::iter::repeat(&0)));
        if !right.all(|(i, count)| decode(&block, i, header.refcount_order) == u64::from(used(*count))) {
            return Ok(false);
        }
    }
    Ok(expected.flatten().all(|count| *count == 0))
}

/// The refcount that belongs to an entry of [`Counts`].
fn used(count: u16) -> u16 {
    if count == EXCLUSIVE { 1 } else { count }
}

fn read(file: &File, buf: &mut [u8], offset: u64) -> Result<(), Refusal> {
    file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Refusal::Damaged("a table is beyond the end of the file"),
        _ => e.into(),
    })
}

/// Puts `count` at `index` into a refcount block that is zero there.
fn encode(block: &mut [u8], index: usize, count: u16, order: u32) {
    match order {
        0..=2 => block[index << order >> 3] |= (count as u8) << ((index << order) & 7),
        _ => {
            // Big endian: the last bytes of the entry.
            let bytes = 1 << (order - 3);
            let end = (index + 1) * bytes;
            let value = count.to_be_bytes();
            let n = value.len().min(bytes);
            block[end - n..end].copy_from_slice(&value[2 - n..]);
        }
    }
}

/// The opposite of [`encode`].
fn decode(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => u64::from(block[index << order >> 3] >> ((index << order) & 7)) & ((1 << (1 << order)) - 1),
        _ => {
            let bytes = 1 << (order - 3);
            let value = &block[index * bytes..][..bytes];
            value.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Sees to it that the image's refcounts are right. Whether they were. What was changed is durable when this returns.
pub(super) fn make_right(file: &File, header: &Header) -> Result<bool, Refusal> {
    // Read twice rather than held twice.
    if !header.dirty && matches!(are_right(file, header, count(file, header)?), Ok(true)) {
        return Ok(true);
    }
    rebuild(file, header, count(file, header)?)?;
    Ok(false)
}

fn rebuild(file: &File, header: &Header, counts: Counts) -> Result<(), Refusal> {
    let mut counts = counts.counts;
    counts.truncate(counts.iter().rposition(|count| *count != 0).map_or(0, |last| last + 1));
    counts.iter_mut().for_each(|count| *count = used(*count));
    let (cluster, order) = (header.cluster(), header.refcount_order);
    let most = counts.iter().copied().max().unwrap_or(0);
    if order < 4 && u32::from(most) >> (1 << order) != 0 {
        return Err(Refusal::Damaged("a cluster is used more often than can be counted"));
    }
    // The blocks and the table count themselves.
    let per_block = header.counts_per_block();
    let first = counts.len();
    let (mut blocks, mut table) = (0, 0);
    loop {
        let all = first + blocks + table;
        let needed = all.div_ceil(per_block);
        let table_needed = (needed * 8).div_ceil(cluster as usize);
        if (needed, table_needed) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, table_needed);
    }
    counts.resize(first + blocks + table, 1);
    let at = |index: usize| (first + index) as u64 * cluster;
    let mut entries = vec![0; table * cluster as usize];
    for (index, part) in counts.chunks(per_block).enumerate() {
        let mut block = vec![0; cluster as usize];
        for (i, count) in part.iter().enumerate() {
            encode(&mut block, i, *count, order);
        }
        file.write_all_at(&block, at(index))?;
        entries[index * 8..][..8].copy_from_slice(&at(index).to_be_bytes());
    }
    file.write_all_at(&entries, at(blocks))?;
    file.sync_data()?;
    set_refcount_table(file, at(blocks), table as u32)?;
    Ok(file.sync_data()?)
}
