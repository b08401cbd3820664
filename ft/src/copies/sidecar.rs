//! The file beside an image that says what the image is: `IMAGE.ft`.
//!
//! | offset | content |
//! | --- | --- |
//! | 0 | magic `CHFTCOPY`, version u32, length u32, a postcard of [`Record`], CRC-32C of all before |
//! | 4080 | time of the last write to the image in ns since 1970, u64, and its CRC-32C |
//! | 4096 | for each 32 blocks of 64 KiB: the doubtful ones (u32, lowest bit first), CRC-32C of session, index and these bits |
//!
//! Integers are little endian. The file is written by write(2): what was written survives the process (not the host), in
//! the order of the calls. So whoever changes the image first marks the block here, then writes it.
//!
//! A record is believed only if everything fits ([`Sidecar::read`]): checksums, VM, disk, size, the image's inode and time of
//! birth, and
//!
//! * *open* (as a process that was killed leaves it): the host has not been booted since, for its page cache may hold
//!   what the disk does not; and nobody changed the image later than its VMM did (by its ctime);
//! * *sealed* (the image was synced, then the record): the image's times are the very same as then.
//!
//! There is none for images that are no regular files, for these have no such times.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{BlockMap, SessionId, Side};

const MAGIC: &[u8; 8] = b"CHFTCOPY";
const VERSION: u32 = 1;
const HEADER: usize = 4096;
const TOUCHED_AT: usize = 4080;

/// The time of the last write is noted this often at most.
const TOUCH: Duration = Duration::from_millis(100);

/// A write may reach the image so much later than it was noted.
const SLACK_NS: u64 = 1_000_000_000;

/// Whose copy the image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VM.
    pub vm: String,
    /// Device id of the disk.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The session.
    pub session: SessionId,
    /// Which of its copies.
    pub side: Side,
}

/// A file, as far as it must be the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Image {
    device: u64,
    inode: u64,
    /// In ns since 1970; tells files apart that had the same inode one after the other.
    born: u64,
}

/// (seconds, nanoseconds) of the last change of content, and of anything.
type Times = [(i64, i64); 2];

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    record: Record,
    boot: String,
    image: Image,
    sealed: Option<Times>,
}

/// The sidecar of an image that this process has open.
#[derive(Debug)]
pub struct Sidecar {
    file: File,
    path: PathBuf,
    /// The image, for reading.
    image: File,
    at: PathBuf,
    identity: Image,
    boot: String,
    header: Option<Header>,
    touched: Option<Instant>,
}

/// Path of an image's sidecar.
pub fn path_of(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".ft");
    path.into()
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().min(u128::from(u64::MAX)) as u64
}

fn times(image: &Metadata) -> Times {
    [(image.mtime(), image.mtime_nsec()), (image.ctime(), image.ctime_nsec())]
}

fn ns(time: (i64, i64)) -> u64 {
    (time.0.max(0) as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.1.max(0) as u64)
}

fn identity(image: &Metadata) -> io::Result<Image> {
    let born = image.created()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Image {
        device: image.dev(),
        inode: image.ino(),
        born: born.as_nanos().min(u128::from(u64::MAX)) as u64,
    })
}

fn entry(session: &SessionId, index: usize, bits: u32) -> [u8; 8] {
    let sum = crc32c::crc32c(session.name.as_bytes());
    let sum = crc32c::crc32c_append(sum, &session.generation.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &(index as u64).to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &bits.to_le_bytes());
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&bits.to_le_bytes());
    bytes[4..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn encode(header: &Header) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(header).map_err(io::Error::other)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    if bytes.len() > TOUCHED_AT {
        return Err(io::Error::other("the names in it are too long"));
    }
    bytes.resize(TOUCHED_AT, 0);
    Ok(bytes)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn decode(bytes: &[u8]) -> Result<Header, String> {
    if !bytes.starts_with(MAGIC) {
        return Err("there is no record of it".into());
    }
    let damaged = || "its record is damaged".to_string();
    let version = le32(bytes, 8).ok_or_else(damaged)?;
    if version != VERSION {
        return Err(format!("its record has version {version}, this VMM knows {VERSION}"));
    }
    let end = (le32(bytes, 12).ok_or_else(damaged)? as usize).saturating_add(16);
    if end > TOUCHED_AT - 4 || le32(bytes, end) != bytes.get(..end).map(crc32c::crc32c) {
        return Err(damaged());
    }
    postcard::from_bytes(&bytes[16..end]).map_err(|_| damaged())
}

/// Tries something with a sidecar, if there is one; when it fails there is none any more, and nothing is claimed later.
pub(super) fn note(slot: &mut Option<Sidecar>, what: impl FnOnce(&mut Sidecar) -> io::Result<()>) {
    let Some(sidecar) = slot else { return };
    if let Err(e) = what(sidecar) {
        log::warn!(
            "ft: {}: {e}: the whole disk will have to be copied",
            sidecar.path().display()
        );
        // When this fails too, the image's time of change will tell.
        let _ = sidecar.invalidate();
        *slot = None;
    }
}

impl Sidecar {
    /// Opens the sidecar of an image, or makes one that says nothing. `None`: images of this kind have none.
    pub fn open(image: &Path) -> io::Result<Option<Self>> {
        let facts = std::fs::metadata(image)?;
        if !facts.is_file() || facts.len() > super::MAX_SIZE {
            return Ok(None);
        }
        let opened = File::open(image)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let path = path_of(image);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other(format!("{} is no regular file", path.display())));
        }
        Ok(Some(Self {
            file,
            path,
            identity: identity(&opened.metadata()?)?,
            image: opened,
            at: image.into(),
            boot: boot.trim().into(),
            header: None,
            touched: None,
        }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the image is, and its doubtful blocks, if that is certain; else why not. This process must have locked the
    /// image: whoever had it before has done its last write then, and its last mark. `wanted` says which copies are
    /// of interest: session and side in it do not count.
    pub fn read(&mut self, wanted: &Record) -> Result<(Record, BlockMap), String> {
        let failed = |e: io::Error| format!("its record cannot be read: {e}");
        let facts = self.image.metadata().map_err(failed)?;
        let length = self.file.metadata().map_err(failed)?.len();
        if length == 0 {
            return Err("there is no record of it".into());
        }
        let mut bytes = [0; HEADER];
        self.file
            .read_exact_at(&mut bytes, 0)
            .map_err(|_| "its record is damaged".to_string())?;
        let header = decode(&bytes)?;
        let record = &header.record;
        if (&record.vm, &record.disk) != (&wanted.vm, &wanted.disk) {
            return Err("it is that of another VM or disk".into());
        }
        if record.size != wanted.size || facts.len() != wanted.size {
            return Err("its size has changed".into());
        }
        let found = &self.identity;
        // Exchanged since it was opened here, and before it was locked.
        let there = std::fs::metadata(&self.at).map_err(failed)?;
        if (there.dev(), there.ino()) != (found.device, found.inode) {
            return Err("the image was exchanged just now".into());
        }
        // A device may have another number after a boot.
        let device = header.boot != self.boot || found.device == header.image.device;
        if !device || (found.inode, found.born) != (header.image.inode, header.image.born) {
            return Err("the image is another file than that of the record".into());
        }
        match header.sealed {
            Some(sealed) if sealed == times(&facts) => {}
            Some(_) => return Err("the image was changed since its record was closed".into()),
            None if header.boot != self.boot => {
                return Err("its host went down while it was in use".into());
            }
            None => {
                let at = &bytes[TOUCHED_AT..TOUCHED_AT + 8];
                if le32(&bytes, TOUCHED_AT + 8) != Some(crc32c::crc32c(at)) {
                    return Err("its record is damaged".into());
                }
                let touched = u64::from_le_bytes(at.try_into().unwrap_or_default());
                let [_, changed] = times(&facts);
                if ns(changed) > touched.saturating_add(SLACK_NS) {
                    return Err("the image was changed after its VMM ended".into());
                }
            }
        }
        let mut blocks = BlockMap::new(wanted.size);
        let words = blocks.words().len();
        let mut entries = vec![0; words * 8];
        let whole = length == (HEADER + entries.len()) as u64;
        if !whole || self.file.read_exact_at(&mut entries, HEADER as u64).is_err() {
            return Err("its record is damaged".into());
        }
        for (index, bytes) in entries.chunks_exact(8).enumerate() {
            let bits = le32(bytes, 0).unwrap_or_default();
            if bytes != entry(&record.session, index, bits) {
                return Err("its record is damaged".into());
            }
            blocks.set_word(index, bits);
        }
        let record = record.clone();
        self.header = Some(header);
        Ok((record, blocks))
    }

    /// The image is a copy of a session's from now on, `blocks` are doubtful.
    pub fn begin(&mut self, record: Record, blocks: &BlockMap) -> io::Result<()> {
        self.invalidate()?;
        let mut entries = Vec::with_capacity(blocks.words().len() * 8);
        for (index, bits) in blocks.words().iter().enumerate() {
            entries.extend(entry(&record.session, index, *bits));
        }
        self.file.set_len((HEADER + entries.len()) as u64)?;
        self.file.write_all_at(&entries, HEADER as u64)?;
        self.open_header(Header {
            record,
            boot: self.boot.clone(),
            image: self.identity.clone(),
            sealed: None,
        })
    }

    /// A sealed or left record is an open one from now on, of this process.
    pub fn reopen(&mut self) -> io::Result<()> {
        match self.header.take() {
            Some(header) => self.open_header(Header {
                boot: self.boot.clone(),
                image: self.identity.clone(),
                sealed: None,
                ..header
            }),
            None => Ok(()),
        }
    }

    fn open_header(&mut self, header: Header) -> io::Result<()> {
        self.write_touched()?;
        self.file.write_all_at(&encode(&header)?, 0)?;
        self.header = Some(header);
        Ok(())
    }

    /// The image is about to be written. Cheap when this was said a moment ago.
    pub fn touch(&mut self) -> io::Result<()> {
        if self.header.is_none() || self.touched.is_some_and(|at| at.elapsed() < TOUCH) {
            return Ok(());
        }
        self.write_touched()
    }

    fn write_touched(&mut self) -> io::Result<()> {
        let at = now().to_le_bytes();
        let mut bytes = at.to_vec();
        bytes.extend(crc32c::crc32c(&at).to_le_bytes());
        self.file.write_all_at(&bytes, TOUCHED_AT as u64)?;
        self.touched = Some(Instant::now());
        Ok(())
    }

    /// These are the doubtful blocks of the 32 with this index now.
    pub fn set(&mut self, index: usize, bits: u32) -> io::Result<()> {
        let Some(header) = &self.header else { return Ok(()) };
        let at = (HEADER + index * 8) as u64;
        self.file.write_all_at(&entry(&header.record.session, index, bits), at)
    }

    /// The image, for reading.
    pub fn image(&self) -> &File {
        &self.image
    }

    /// Nothing is said of the image any more.
    pub fn invalidate(&mut self) -> io::Result<()> {
        self.header = None;
        self.file.set_len(0)
    }

    /// The image will not be written any more. It is synced, then the record is closed, which is then good for later
    /// boots of this host, too. May take long.
    pub fn seal(&mut self) -> io::Result<()> {
        let Some(header) = &self.header else { return Ok(()) };
        self.image.sync_all()?;
        self.file.sync_all()?;
        let header = Header {
            sealed: Some(times(&self.image.metadata()?)),
            ..header.clone()
        };
        self.file.write_all_at(&encode(&header)?, 0)?;
        self.file.sync_all()?;
        self.header = Some(header);
        Ok(())
    }
}
