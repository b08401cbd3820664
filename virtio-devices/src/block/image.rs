//! A disk's image, opened once: the device's backend and whoever else reads or writes the disk's bytes share it.
//!
//! A format with tables of its own (where which byte lies) keeps them in memory, so a second opening of the same file
//! would see old ones, and two that write destroy it. Therefore FT's pre-copy reads, and its shadow writes, through the
//! image that the device has too.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::Error;
use crate::backend::{BlockBackend, BlockOp};

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
    use crate::block::{DiskOptions, open};

    #[test]
    fn what_is_written_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = open(&DiskOptions {
            path: file.path().into(),
            readonly: false,
            direct: false,
            queue_size: 1,
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
