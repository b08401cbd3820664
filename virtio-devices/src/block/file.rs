//! Raw images: files and block devices of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use super::image::{DiskImage, DiskOptions};
use super::lock;
use super::pool::Pool;
use super::uring::Uring;
use crate::Error;
use crate::backend::{BlockBackend, BlockOp};

/// An open raw disk.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    /// The same file for direct I/O; requests that are not aligned for that take `file`. The kernel keeps the two
    /// coherent: direct I/O writes back and drops the cached pages in its way.
    pub(super) direct: Option<File>,
    alignment: usize,
    size: u64,
    block_size: u32,
}

/// A file that was opened and locked.
pub(super) struct OpenFile {
    pub(super) file: File,
    /// The same, past the page cache, when that was asked for.
    pub(super) direct: Option<File>,
}

fn error(options: &DiskOptions, what: &'static str) -> impl FnOnce(io::Error) -> Error {
    let what = format!("disk {}: {what}", options.path.display());
    move |source| Error::Backend { what, source }
}

/// Opens a disk's file and locks it: for writing it can be open once, for reading often, on all hosts that share the
/// locks of its file system.
pub(super) fn open_locked(options: &DiskOptions) -> Result<OpenFile, Error> {
    let error = |what| error(options, what);
    let flags = |flags: i32| {
        let mut open = File::options();
        open.read(true).write(!options.readonly).custom_flags(flags);
        open
    };
    let file = flags(0).open(&options.path).map_err(error("cannot be opened"))?;
    let kind = file.metadata().map_err(error("cannot be looked at"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device");
        return Err(error("cannot be used")(source));
    }
    if !options.shared {
        lock::take(&file, options.readonly).map_err(error("is in use by another process"))?;
    }
    let direct = if options.direct {
        let direct = flags(libc::O_DIRECT).open(&options.path);
        Some(direct.map_err(error("cannot be opened for direct I/O (direct=on)"))?)
    } else {
        None
    };
    Ok(OpenFile { file, direct })
}

/// Opens and locks a raw disk.
pub(super) fn open_raw(options: &DiskOptions) -> Result<DiskFile, Error> {
    let OpenFile { file, direct } = open_locked(options)?;
    let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(error(options, "has no size"))?;
    let kind = file
        .metadata()
        .map_err(error(options, "cannot be looked at"))?
        .file_type();
    let block_size = if kind.is_block_device() {
        sector_size(&file).map_err(error(options, "has no sector size"))?
    } else {
        512
    };
    let alignment = direct_alignment(&file, block_size);
    Ok(DiskFile {
        file,
        direct,
        alignment,
        size,
        block_size,
    })
}

fn sector_size(file: &File) -> io::Result<u32> {
    const BLKSSZGET: libc::Ioctl = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes an int.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size.clamp(512, 4096) as u32)
}

/// What direct I/O on this file must be aligned to, in memory and on the disk.
fn direct_alignment(file: &File, block_size: u32) -> usize {
    // SAFETY: all-zero bytes are a valid statx.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; statx(2) fills the struct.
    let result = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_DIOALIGN, &mut stat) };
    let told = stat.stx_dio_mem_align.max(stat.stx_dio_offset_align);
    if result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0 && told > 0 {
        return told as usize;
    }
    // A page suits everybody.
    4096.max(block_size as usize)
}

impl DiskFile {
    /// The descriptor for a read or write: the direct one when everything is aligned for it.
    pub(super) fn fd(&self, offset: u64, iovecs: &[libc::iovec]) -> RawFd {
        let aligned = |n: usize| n.is_multiple_of(self.alignment);
        match &self.direct {
            Some(direct)
                if aligned(offset as usize)
                    && iovecs
                        .iter()
                        .all(|v| aligned(v.iov_base as usize) && aligned(v.iov_len)) =>
            {
                direct.as_raw_fd()
            }
            _ => self.file.as_raw_fd(),
        }
    }

    pub(super) fn plain_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Moves all bytes but the first `done`, in as many calls as it takes. Returns the bytes in all.
    ///
    /// # Safety
    /// The iovecs must be mapped, for reads writable.
    pub(super) unsafe fn transfer(
        &self,
        offset: u64,
        iovecs: &[libc::iovec],
        mut done: usize,
        write: bool,
    ) -> io::Result<u32> {
        let total: usize = iovecs.iter().map(|v| v.iov_len).sum();
        let fd = if done == 0 {
            self.fd(offset, iovecs)
        } else {
            self.plain_fd()
        };
        let mut rest = Vec::with_capacity(iovecs.len());
        while done < total {
            rest.clear();
            let mut skip = done;
            for v in iovecs {
                if skip < v.iov_len {
                    rest.push(libc::iovec {
                        // SAFETY: `skip` is within the piece.
                        iov_base: unsafe { v.iov_base.cast::<u8>().add(skip) }.cast(),
                        iov_len: v.iov_len - skip,
                    });
                }
                skip = skip.saturating_sub(v.iov_len);
            }
            let at = (offset + done as u64) as libc::off_t;
            let count = rest.len() as libc::c_int;
            // SAFETY: the caller vouches for the pieces.
            let n = unsafe {
                if write {
                    libc::pwritev(fd, rest.as_ptr(), count, at)
                } else {
                    libc::preadv(fd, rest.as_ptr(), count, at)
                }
            };
            match n {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if n < 0 => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
                n => done += n as usize,
            }
        }
        Ok(total as u32)
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: plain fallocate(2).
        if unsafe { libc::fallocate(self.plain_fd(), mode, offset as libc::off_t, len as libc::off_t) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    /// Zeroes on a disk that has no faster way.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<u32> {
        let zeroes = vec![0; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..n as usize], offset + done)?;
            done += n;
        }
        Ok(0)
    }
}

impl DiskImage for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn raw(&self) -> Option<&File> {
        Some(&self.file)
    }

    // SAFETY: asks what the trait does: until this returns the iovecs are mapped, for reads writable.
    unsafe fn perform(&self, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<u32> {
        match op {
            // SAFETY: passed on.
            BlockOp::Read { offset } => unsafe { self.transfer(offset, iovecs, 0, false) },
            // SAFETY: passed on.
            BlockOp::Write { offset } => unsafe { self.transfer(offset, iovecs, 0, true) },
            BlockOp::Flush => self.file.sync_data().map(|()| 0),
            BlockOp::Discard { offset, len } => match self.fallocate(punch_hole(), offset, len) {
                // A disk that cannot discard keeps its content, which is allowed.
                Err(e) if is_unsupported(&e) => Ok(0),
                result => result.map(|()| 0),
            },
            BlockOp::WriteZeroes { offset, len, unmap } => match self.fallocate(zero_mode(unmap), offset, len) {
                // What is wrong with the disk itself is found here too.
                Err(_) => self.write_zeroes(offset, len),
                Ok(()) => Ok(0),
            },
        }
    }

    fn backend(self: Arc<Self>, queue_size: u16, threads: bool) -> Result<Box<dyn BlockBackend>, Error> {
        if !threads {
            match Uring::new(self.clone(), queue_size) {
                Ok(uring) => return Ok(Box::new(uring)),
                Err(e) => log::info!("no io_uring ({e}): the disk is served by threads"),
            }
        }
        Ok(Box::new(Pool::new(self)?))
    }
}

/// Mode of fallocate(2) that gives a range back.
pub(super) fn punch_hole() -> i32 {
    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
}

/// Mode of fallocate(2) that makes a range zero.
pub(super) fn zero_mode(unmap: bool) -> i32 {
    if unmap {
        punch_hole()
    } else {
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
    }
}

/// The file system does not know the call or the mode.
pub(super) fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}
