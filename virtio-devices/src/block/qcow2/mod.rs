//! qcow2 images, by the library imago.
//!
//! * this file: an opened image; [`header`]: what is refused; [`refcounts`]: what must be right before it is written.
//!
//! Requests share the lock of the library's image; what frees clusters takes it alone, since another request may be about
//! to use them. A panic in the library becomes an I/O error, and the image gives only errors from then on.
//!
//! An image that is open for writing is marked dirty: for others, should this process die. What was flushed is then whole
//! but for refcounts, which whoever opens it next must count anew, as this module and QEMU do.

#[cfg(test)]
mod damage_tests;
mod header;
mod refcounts;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, StorageOpenOptions,
};

use super::file::{OpenFile, open_locked};
use super::image::{DiskImage, DiskOptions};
use super::pool::Pool;
use crate::Error;
use crate::backend::{BlockBackend, BlockOp};
use header::{Header, Refusal, set_dirty};

/// Backing files below an image at most.
pub(super) const MAX_BACKING: usize = 10;

/// An opened image.
pub(super) struct Qcow2Image {
    image: RwLock<FormatAccess<Storage>>,
    /// Has the lock.
    file: File,
    path: PathBuf,
    size: u64,
    readonly: bool,
    /// The library panicked.
    failed: AtomicBool,
}

impl std::fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Image").field("path", &self.path).finish()
    }
}

/// Opens and locks an image.
pub(super) fn open(options: &DiskOptions) -> Result<Qcow2Image, Error> {
    let failed = |source| Error::Backend {
        what: format!("disk {}: the image cannot be used", options.path.display()),
        source,
    };
    let opened = open_locked(options)?;
    catch(|| open_image(options, opened)).map_err(failed)
}

/// Turns a panic into an error.
fn catch<T>(f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err(io::Error::other("the qcow2 library panicked")))
}

fn open_image(options: &DiskOptions, opened: OpenFile) -> io::Result<Qcow2Image> {
    let OpenFile { file, direct } = opened;
    if !file.metadata()?.is_file() {
        let what = "a qcow2 image must be a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let writable = !options.readonly;
    let header = Header::read(&file)?;
    if writable {
        header.check_writable()?;
        if !refcounts::make_right(&file, &header)? {
            log::info!("{}: the image's refcounts were counted anew", options.path.display());
        }
        if header.dirty {
            set_dirty(&file, false)?;
        }
    }
    let io = match direct {
        Some(direct) => direct,
        None => file.try_clone()?,
    };
    let image = layer(&options.path, &header, io, options, 0)?;
    if writable {
        set_dirty(&file, true)?;
    }
    Ok(Qcow2Image {
        image: RwLock::new(image),
        file,
        path: options.path.clone(),
        size: header.size,
        readonly: options.readonly,
        failed: AtomicBool::new(false),
    })
}

/// The image at `path`, opened as `io`, on its backing files.
fn layer(
    path: &Path,
    header: &Header,
    io: File,
    options: &DiskOptions,
    depth: usize,
) -> io::Result<FormatAccess<Storage>> {
    let writable = depth == 0 && !options.readonly;
    if header.dirty && !writable {
        return Err(Refusal::Unclosed.into());
    }
    let backing = match &header.backing {
        None => None,
        Some(backing) if !options.backing_files => return Err(Refusal::BackingFile(backing.name.clone()).into()),
        Some(_) if depth == MAX_BACKING => return Err(Refusal::Depth.into()),
        Some(backing) => {
            let (below, qcow2) = backing.locate(path)?;
            let opened = open_below(&below, qcow2, options, depth + 1);
            Some(opened.map_err(|e| io::Error::new(e.kind(), format!("backing file {}: {e}", below.display())))?)
        }
    };
    let storage = Storage::from_open_file(io, StorageOpenOptions::new().write(writable).direct(options.direct))?;
    let builder = Qcow2::<Storage>::builder(storage).write(writable);
    let image = builder
        .backing(backing)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

/// Opens a file below an image. It is read through the host's page cache, whatever the image itself does.
fn open_below(path: &Path, qcow2: bool, options: &DiskOptions, depth: usize) -> io::Result<FormatAccess<Storage>> {
    let below = DiskOptions {
        path: path.into(),
        readonly: true,
        direct: false,
        ..options.clone()
    };
    let OpenFile { file, .. } = open_locked(&below).map_err(io::Error::other)?;
    if qcow2 {
        return layer(path, &Header::read(&file)?, file, &below, depth);
    }
    let storage = Storage::from_open_file(file, StorageOpenOptions::new())?;
    Ok(FormatAccess::new(Raw::open_image(storage, false)?))
}

/// The files below the image at `path`, as far as they can be found.
pub(super) fn backing_files(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    while found.len() < MAX_BACKING {
        let image = found.last().map_or(path, PathBuf::as_path);
        let header = File::open(image).ok().and_then(|file| Header::read(&file).ok());
        let below = header.and_then(|header| header.backing?.locate(image).ok());
        let Some((below, qcow2)) = below else { break };
        found.push(below);
        if !qcow2 {
            break;
        }
    }
    found
}

/// Makes an image in an empty file that takes no space.
pub(super) fn create(file: File, size: u64) -> io::Result<()> {
    let synced = file.try_clone()?;
    let storage = Storage::from_open_file(file, StorageOpenOptions::new().write(true))?;
    catch(|| Qcow2::<Storage>::create_builder(storage).size(size).create())?;
    synced.sync_all()
}

impl Qcow2Image {
    fn request(&self, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<u32> {
        let bytes = iovecs.iter().map(|v| v.iov_len).sum::<usize>() as u32;
        let pieces = iovecs.iter().filter(|v| v.iov_len > 0);
        match op {
            BlockOp::Read { offset } => {
                // SAFETY: IoSliceMut has the layout of an iovec, and the caller of `perform` vouches for the pieces.
                // Guest memory among them may change under the library, which copies it or hands it to the kernel.
                let piece = |v: &libc::iovec| unsafe { std::mem::transmute::<libc::iovec, IoSliceMut<'_>>(*v) };
                let pieces: IoVectorMut<'_> = pieces.map(piece).collect::<Vec<_>>().into();
                self.shared().readv(pieces, offset)?;
                Ok(bytes)
            }
            BlockOp::Write { offset } => {
                // SAFETY: as above.
                let piece = |v: &libc::iovec| unsafe { std::mem::transmute::<libc::iovec, IoSlice<'_>>(*v) };
                let pieces: IoVector<'_> = pieces.map(piece).collect::<Vec<_>>().into();
                self.shared().writev(pieces, offset)?;
                Ok(bytes)
            }
            BlockOp::Flush => {
                self.shared().flush()?;
                // Not the library's `sync`: that keeps all others from the file meanwhile.
                self.file.sync_data().map(|()| 0)
            }
            BlockOp::Discard { offset, len } => self.zero(offset, len, true).map(|()| 0),
            BlockOp::WriteZeroes { offset, len, unmap } => self.zero(offset, len, unmap).map(|()| 0),
        }
    }

    fn shared(&self) -> std::sync::RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a range zero that is not so already.
    fn zero(&self, mut offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        // Alone: clusters are given back, and whole clusters are looked at although a part of them was meant.
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        while offset < end {
            let (mapping, len) = image.get_mapping(offset, end - offset)?;
            let zero = matches!(mapping, Mapping::Zero { .. });
            match len {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ if zero => {}
                _ if unmap => image.discard_to_zero(offset, len)?,
                _ => image.write_zeroes(offset, len)?,
            }
            offset += len;
        }
        Ok(())
    }

    /// Writes everything back and says that the image is closed.
    fn close(&mut self) -> io::Result<()> {
        self.request(BlockOp::Flush, &[])?;
        set_dirty(&self.file, false)
    }
}

impl DiskImage for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        512
    }

    // SAFETY: asks what the trait does: until this returns the iovecs are mapped, for reads writable.
    unsafe fn perform(&self, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<u32> {
        if self.failed.load(Relaxed) {
            return Err(io::Error::other("the qcow2 library panicked before"));
        }
        let mut returned = false;
        let result = catch(|| {
            let result = self.request(op, iovecs);
            returned = true;
            result
        });
        if !returned {
            self.failed.store(true, Relaxed);
            log::error!("{}: the qcow2 library panicked: the disk fails", self.path.display());
        }
        result
    }

    fn backend(self: Arc<Self>, _queue_size: u16, _threads: bool) -> Result<Box<dyn BlockBackend>, Error> {
        Ok(Box::new(Pool::new(self)?))
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if self.readonly || self.failed.load(Relaxed) {
            return;
        }
        // What cannot be written back is lost as by a power cut; the mark stays.
        if let Err(e) = catch(|| self.close()) {
            log::error!("{}: the image is not closed cleanly: {e}", self.path.display());
        }
    }
}
