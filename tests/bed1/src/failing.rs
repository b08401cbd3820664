//! A disk that gives I/O errors when it is told to: one file in a file system of this process (FUSE), in front of a real file.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

/// Name of the file.
const NAME: &str = "disk.img";

const FILE: INodeNo = INodeNo(2);

/// Nothing is remembered by the kernel.
const TTL: Duration = Duration::ZERO;

/// What fails from now on.
#[derive(Debug, Default)]
pub struct Faults {
    /// Writing.
    pub writes: AtomicBool,
    /// Flushing.
    pub flushes: AtomicBool,
}

/// The file system; unmounted when dropped, or with the bed's directory in which it is.
pub struct FailingDisk {
    /// Switches.
    pub faults: Arc<Faults>,
    _session: BackgroundSession,
}

impl FailingDisk {
    /// Mounts it at `folder`, which is made; the content is in `behind`, which is made too.
    pub fn mount(folder: &Path, behind: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(behind)?;
        let faults = Arc::<Faults>::default();
        let disk = Disk {
            file,
            faults: faults.clone(),
        };
        let session = fuser::spawn_mount(disk, folder, &Config::default())
            .with_context(|| format!("mount a FUSE file system at {}", folder.display()))?;
        Ok(Self {
            faults,
            _session: session,
        })
    }
}

struct Disk {
    file: File,
    faults: Arc<Faults>,
}

impl Disk {
    fn attributes(&self, node: INodeNo) -> Result<FileAttr, Errno> {
        let facts = self.file.metadata()?;
        let (kind, perm) = match node {
            INodeNo::ROOT => (FileType::Directory, 0o755),
            FILE => (FileType::RegularFile, 0o600),
            _ => return Err(Errno::ENOENT),
        };
        let modified = facts.modified().unwrap_or(UNIX_EPOCH);
        Ok(FileAttr {
            ino: node,
            size: facts.len(),
            blocks: facts.blocks(),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

/// An I/O error, if that is what is wanted.
fn may(fails: &AtomicBool) -> io::Result<()> {
    match fails.load(Ordering::SeqCst) {
        true => Err(io::Error::from_raw_os_error(libc::EIO)),
        false => Ok(()),
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = parent == INodeNo::ROOT && name == NAME;
        match self.attributes(if found { FILE } else { INodeNo(0) }) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(node) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    /// Only the size changes.
    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match size.map_or(Ok(()), |size| self.file.set_len(size)) {
            Ok(()) => self.getattr(request, node, handle, reply),
            Err(e) => reply.error(e.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size as usize];
        match self.file.read_at(&mut data, offset) {
            Ok(n) => reply.data(&data[..n]),
            Err(e) => reply.error(e.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = may(&self.faults.writes).and_then(|()| self.file.write_all_at(data, offset));
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(e.into()),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match may(&self.faults.flushes).and_then(|()| self.file.sync_data()) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e.into()),
        }
    }
}
