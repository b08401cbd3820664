//! A qcow2 image's header: what there must be before the image is trusted to the library, and what is refused by name.
//!
//! Layout: <https://www.qemu.org/docs/master/interop/qcow2.html>. Everything in it is hostile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First bytes of an image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where the incompatible features are.
const INCOMPATIBLE_AT: u64 = 72;
/// Where the refcount table's offset and length in clusters are.
const REFCOUNT_TABLE_AT: u64 = 48;
/// Length of the header of version 2; version 3 is at least [`V3_LENGTH`] long.
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;

/// Refcounts may be wrong: the image was not closed.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Largest L1 table, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Why an image is not opened.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("it is no qcow2 image: say image_type=raw when it is a raw one")]
    NoMagic,
    #[error("it is a qcow2 image of version {0}, which is not known")]
    Version(u32),
    #[error("qcow2 version 2 can only be read: `qemu-img amend -o compat=1.1` makes it version 3")]
    OldVersion,
    #[error("it is encrypted, which is not supported: `qemu-img convert` decrypts it")]
    Encrypted,
    #[error("its data are in another file (external data file), which is not supported: `qemu-img convert` joins them")]
    DataFile,
    #[error("it is marked corrupt: `qemu-img check -r all` repairs it")]
    Corrupt,
    #[error("it was not closed when it was last written: open it for writing once, or use `qemu-img check -r all`")]
    Unclosed,
    #[error("its clusters are not compressed by zlib: `qemu-img convert -O qcow2` makes one that can be used")]
    Compression,
    #[error("it has extended L2 entries: `qemu-img convert -O qcow2 -o extended_l2=off` makes one that can be used")]
    ExtendedL2,
    #[error("it needs features that are not known (bits {0:#x})")]
    Features(u64),
    #[error(
        "it has internal snapshots, which would be lost: remove them with `qemu-img snapshot -d`, or use readonly=on"
    )]
    Snapshots,
    #[error("it has persistent bitmaps, which would be lost: remove them with `qemu-img bitmap --remove`")]
    Bitmaps,
    #[error("it has a backing file ({0}): backing_files=on allows that, for images that are trusted")]
    BackingFile(String),
    #[error("it does not say of which format its backing file is: `qemu-img rebase -u -b FILE -F FORMAT` does")]
    NoBackingFormat,
    #[error("its backing file has the format {0}, which is not supported: raw and qcow2 are")]
    BackingFormat(String),
    #[error("its backing file {0:?} is no path")]
    BackingName(String),
    #[error("it has more than {max} backing files", max = super::MAX_BACKING)]
    Depth,
    #[error("its file is longer than 2^27 clusters: use larger clusters, or a raw image")]
    TooLong,
    #[error("it is damaged: {0}: `qemu-img check -r all` may repair it")]
    Damaged(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Io(e) => e,
            other => Self::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// The header on the disk; a shorter one (version 2) ends before `incompatible`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fields {
    magic: [u8; 4],
    version: U32,
    backing_offset: U64,
    backing_length: U32,
    cluster_bits: U32,
    size: U64,
    encryption: U32,
    l1_entries: U32,
    l1_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshots: U32,
    snapshots_offset: U64,
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    length: U32,
}

/// The file below an image, as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    /// As in the header.
    pub(super) name: String,
    /// `raw`, `qcow2`, ...
    pub(super) format: Option<String>,
}

/// What the image's header says, checked.
#[derive(Debug, Clone)]
pub(super) struct Header {
    version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: usize,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
    /// Bits of a reference count, as a power of two.
    pub(super) refcount_order: u32,
    pub(super) dirty: bool,
    snapshots: bool,
    bitmaps: bool,
    pub(super) backing: Option<Backing>,
}

/// Reads up to `buf`'s length; what is beyond the end of the file stays zero.
fn read_at_most(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Header {
    /// Reads and checks the header.
    pub(super) fn read(file: &File) -> Result<Self, Refusal> {
        let mut fields = [0; size_of::<Fields>()];
        read_at_most(file, &mut fields, 0)?;
        let fields = Fields::read_from_bytes(&fields).map_err(|_| Refusal::Damaged("no header"))?;
        let version = fields.version.get();
        if fields.magic != MAGIC {
            return Err(Refusal::NoMagic);
        }
        let (incompatible, refcount_order, length) = match version {
            2 => (0, 4, V2_LENGTH),
            3 => (
                fields.incompatible.get(),
                fields.refcount_order.get(),
                fields.length.get() as usize,
            ),
            other => return Err(Refusal::Version(other)),
        };
        for (bit, refusal) in [
            (CORRUPT, Refusal::Corrupt),
            (DATA_FILE, Refusal::DataFile),
            (COMPRESSION, Refusal::Compression),
            (EXTENDED_L2, Refusal::ExtendedL2),
        ] {
            if incompatible & bit != 0 {
                return Err(refusal);
            }
        }
        if incompatible & !DIRTY != 0 {
            return Err(Refusal::Features(incompatible & !DIRTY));
        }
        if fields.encryption.get() != 0 {
            return Err(Refusal::Encrypted);
        }
        let cluster_bits = fields.cluster_bits.get();
        if !(9..=21).contains(&cluster_bits) {
            return Err(Refusal::Damaged("its cluster size"));
        }
        let cluster = 1u64 << cluster_bits;
        if refcount_order > 6 || (version == 3 && !(V3_LENGTH..=cluster as usize).contains(&length)) {
            return Err(Refusal::Damaged("its header"));
        }
        let (size, l1_entries) = (fields.size.get(), u64::from(fields.l1_entries.get()));
        // One L2 table has cluster / 8 entries of a cluster each.
        let covered = u128::from(l1_entries) << (2 * cluster_bits - 3);
        if l1_entries * 8 > MAX_L1_BYTES || covered < u128::from(size) || i64::try_from(size).is_err() {
            return Err(Refusal::Damaged("its L1 table does not fit its size"));
        }
        if u64::from(fields.refcount_table_clusters.get()) << cluster_bits > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(Refusal::Damaged("its refcount table is too long"));
        }
        let aligned = |offset: U64| offset.get().is_multiple_of(cluster) && offset.get() < 1 << 56;
        if !aligned(fields.l1_offset) || !aligned(fields.refcount_table_offset) {
            return Err(Refusal::Damaged("a table is not at a cluster's start"));
        }
        let mut header = Self {
            version,
            cluster_bits,
            size,
            l1_offset: fields.l1_offset.get(),
            l1_entries: l1_entries as usize,
            refcount_table_offset: fields.refcount_table_offset.get(),
            refcount_table_clusters: u64::from(fields.refcount_table_clusters.get()),
            refcount_order,
            dirty: incompatible & DIRTY != 0,
            snapshots: fields.snapshots.get() != 0,
            bitmaps: false,
            backing: None,
        };
        let mut format = None;
        if version == 3 {
            format = header.read_extensions(file, length as u64)?;
        }
        let (at, n) = (fields.backing_offset.get(), u64::from(fields.backing_length.get()));
        if at != 0 {
            if n > 1023 || at.checked_add(n).is_none_or(|end| end > cluster) {
                return Err(Refusal::Damaged("the name of its backing file"));
            }
            let mut name = vec![0; n as usize];
            read_at_most(file, &mut name, at)?;
            let name = String::from_utf8(name).map_err(|_| Refusal::Damaged("the name of its backing file"))?;
            header.backing = Some(Backing { name, format });
        }
        Ok(header)
    }

    /// Goes through the header's extensions; gives the format of the backing file.
    fn read_extensions(&mut self, file: &File, mut at: u64) -> Result<Option<String>, Refusal> {
        let (cluster, mut format) = (1u64 << self.cluster_bits, None);
        loop {
            if at + 8 > cluster {
                return Err(Refusal::Damaged("its header extensions"));
            }
            let mut head = [[0; 4]; 2];
            read_at_most(file, head.as_flattened_mut(), at)?;
            let [kind, len] = head.map(u32::from_be_bytes);
            at += 8;
            if u64::from(len) > cluster - at {
                return Err(Refusal::Damaged("its header extensions"));
            }
            match kind {
                EXTENSION_END => return Ok(format),
                EXTENSION_BITMAPS => self.bitmaps = true,
                EXTENSION_BACKING_FORMAT => {
                    let mut name = vec![0; len as usize];
                    read_at_most(file, &mut name, at)?;
                    format = Some(String::from_utf8_lossy(&name).into_owned());
                }
                _ => {}
            }
            at += u64::from(len).next_multiple_of(8);
        }
    }

    /// Whether the image can be written.
    pub(super) fn check_writable(&self) -> Result<(), Refusal> {
        match self {
            Self { version: 2, .. } => Err(Refusal::OldVersion),
            Self { snapshots: true, .. } => Err(Refusal::Snapshots),
            Self { bitmaps: true, .. } => Err(Refusal::Bitmaps),
            _ => Ok(()),
        }
    }

    /// Reference counts in a refcount block.
    pub(super) fn counts_per_block(&self) -> usize {
        8 << self.cluster_bits >> self.refcount_order
    }

    /// Cluster size in bytes.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

impl Backing {
    /// Where it is, when the image that names it is at `image`. Whether it is a qcow2 image, else it is a raw one.
    pub(super) fn locate(&self, image: &Path) -> Result<(PathBuf, bool), Refusal> {
        let qcow2 = match self.format.as_deref() {
            Some("qcow2") => true,
            Some("raw") => false,
            Some(other) => return Err(Refusal::BackingFormat(other.into())),
            // Looking at its bytes would let whoever wrote a raw one choose.
            None => return Err(Refusal::NoBackingFormat),
        };
        // QEMU takes what is before a colon as a protocol.
        let protocol = self.name.find(':').is_some_and(|at| !self.name[..at].contains('/'));
        if self.name.is_empty() || protocol || self.name.contains('\0') {
            return Err(Refusal::BackingName(self.name.clone()));
        }
        let dir = image.parent().unwrap_or(Path::new(""));
        Ok((dir.join(&self.name), qcow2))
    }
}

/// Sets or clears the mark that refcounts may be wrong; durable when this returns.
pub(super) fn set_dirty(file: &File, dirty: bool) -> io::Result<()> {
    let mut bits = [0; 8];
    file.read_exact_at(&mut bits, INCOMPATIBLE_AT)?;
    let mut bits = u64::from_be_bytes(bits);
    bits = if dirty { bits | DIRTY } else { bits & !DIRTY };
    file.write_all_at(&bits.to_be_bytes(), INCOMPATIBLE_AT)?;
    file.sync_data()
}

/// Puts another refcount table into the header. Offset and length lie within one sector.
pub(super) fn set_refcount_table(file: &File, offset: u64, clusters: u32) -> io::Result<()> {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&offset.to_be_bytes());
    bytes[8..].copy_from_slice(&clusters.to_be_bytes());
    file.write_all_at(&bytes, REFCOUNT_TABLE_AT)
}
