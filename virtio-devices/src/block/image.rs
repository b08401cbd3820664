//! A disk's image, opened once: the device's backend and whoever else reads or writes the disk's bytes share it.
//!
//! A format with tables of its own (where which byte lies) keeps them in memory, so a second opening of the same file
//! would see old ones, and two that write destroy it. Therefore FT's pre-copy reads, and its shadow writes, through the
//! image that the device has too.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{file, qcow2};
use crate::Error;
use crate::backend::{BlockBackend, BlockOp};

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, nothing else. May be a block device.
    Raw,
    /// qcow2, version 3; for reading version 2, too.
    Qcow2,
}

/// How a disk is opened.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// The image, or a block device.
    pub path: PathBuf,
    /// What it is; never guessed from its content, which a guest may have written.
    pub format: Format,
    /// Only for reading.
    pub readonly: bool,
    /// Past the page cache of the host.
    pub direct: bool,
    /// The image may name other files to be read where it has no data (qcow2).
    pub backing_files: bool,
    /// Another host has it open and locked: it is not locked here until that one gives it up ([`super::lock`]).
    pub shared: bool,
}

/// Opens an image and locks it: for writing it can be open once, for reading often, on all hosts that share the locks
/// of its file system.
pub fn open(options: &DiskOptions) -> Result<Arc<dyn DiskImage>, Error> {
    Ok(match options.format {
        Format::Raw => Arc::new(file::open_raw(options)?),
        Format::Qcow2 => Arc::new(qcow2::open(options)?),
    })
}

/// Makes an image of `size` zero bytes that takes next to no space. `AlreadyExists`: there is a file.
pub fn create(path: &Path, format: Format, size: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let made = match format {
        Format::Raw => file.set_len(size),
        Format::Qcow2 => qcow2::create(file, size),
    };
    if made.is_err() {
        // Half an image would be taken for one later.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// The other files that an image reads from, as far as they can be found.
pub fn backing_files(path: &Path, format: Format) -> Vec<PathBuf> {
    match format {
        Format::Raw => Vec::new(),
        Format::Qcow2 => qcow2::backing_files(path),
    }
}

/// An opened disk image. Requests of several threads may be under way; the caller sees to it that those which overlap
/// and change something are not.
pub trait DiskImage: std::fmt::Debug + Send + Sync {
    /// Size in bytes that the guest sees.
    fn size(&self) -> u64;

    /// Logical block size in bytes.
    fn block_size(&self) -> u32;

    /// The file whose bytes are the disk's own, if there is nothing more to the image: such a disk two hosts can share.
    fn raw(&self) -> Option<&File> {
        None
    }

    /// Does one request, within the disk, and waits for it. Returns the bytes moved.
    ///
    /// # Safety
    /// Every iovec must be mapped, for reads writable, until this returns.
    unsafe fn perform(&self, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<u32>;

    /// A device's backend on this image, for up to `queue_size` requests. `threads`: with threads, whatever else the
    /// kernel has.
    fn backend(self: Arc<Self>, queue_size: u16, threads: bool) -> Result<Box<dyn BlockBackend>, Error>;
}

fn iovec(start: *const u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast_mut().cast(),
        iov_len: len,
    }
}

impl dyn DiskImage + '_ {
    /// Fills `buf` from `offset` on.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let iovec = iovec(buf.as_mut_ptr(), buf.len());
        // SAFETY: the piece is `buf`, borrowed for writing until the request is done.
        unsafe { self.perform(BlockOp::Read { offset }, &[iovec]) }.map(drop)
    }

    /// Writes all of `data` from `offset` on.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        // SAFETY: the piece is `data`, borrowed until the request is done; a write only reads it.
        unsafe { self.perform(BlockOp::Write { offset }, &[iovec(data.as_ptr(), data.len())]) }.map(drop)
    }

    /// Makes a range read as zeroes; with `unmap` its space may be given back.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: there are no pieces.
        unsafe { self.perform(BlockOp::WriteZeroes { offset, len, unmap }, &[]) }.map(drop)
    }

    /// Makes all writes that are done durable.
    pub fn flush(&self) -> io::Result<()> {
        // SAFETY: there are no pieces.
        unsafe { self.perform(BlockOp::Flush, &[]) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = open(&DiskOptions {
            path: file.path().into(),
            format: Format::Raw,
            readonly: false,
            direct: false,
            backing_files: false,
            shared: false,
        })
        .unwrap();
        assert_eq!(image.size(), 1 << 20);
        image.write_at(1000, &[7; 5000]).unwrap();
        for (offset, len, unmap) in [(2000, 100, false), (3000, 100, true), (0, 0, true)] {
            image.write_zeroes(offset, len, unmap).unwrap();
        }
        image.flush().unwrap();
        let mut back = [9; 6001];
        image.read_at(0, &mut back).unwrap();
        let zero = |at: usize| !(1000..6000).contains(&at) || (2000..2100).contains(&at) || (3000..3100).contains(&at);
        assert!(
            back.iter()
                .enumerate()
                .all(|(at, b)| *b == if zero(at) { 0 } else { 7 })
        );
        assert!(image.read_at((1 << 20) - 1, &mut [0; 2]).is_err());
    }
}
