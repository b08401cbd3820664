//! Locks of disk images: open file description locks (fcntl(2)), which last until the file is closed, and which other
//! hosts see too where the file system shares its locks (NFS, cluster file systems; not those of block devices).
//!
//! A disk that is opened for writing is locked whole, from its first byte to the end of all offsets. Whoever must find
//! out whether a file on another host is the same one is told of one byte, far beyond every disk's end, which that lock
//! leaves out ([`leave_gap`], [`shows_gap`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

/// Where gaps may lie: beyond every disk, and within what NFS and the kernel take for an offset.
pub const GAPS: std::ops::Range<u64> = 1 << 60..1 << 61;

/// `len` 0: to the end of all offsets.
fn flock(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid flock: the whole file, no process.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = kind as libc::c_short;
    flock.l_whence = libc::SEEK_SET as libc::c_short;
    (flock.l_start, flock.l_len) = (start as libc::off_t, len as libc::off_t);
    flock
}

fn set(file: &File, kind: libc::c_int, start: u64, len: u64) -> io::Result<()> {
    let flock = flock(kind, start, len);
    // SAFETY: F_OFD_SETLK reads a flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &flock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Somebody else has a lock in the way.
fn is_taken(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Locks the whole file. A file system without locks is borne, and the log says so.
pub(super) fn take(file: &File, readonly: bool) -> io::Result<()> {
    match set(file, if readonly { libc::F_RDLCK } else { libc::F_WRLCK }, 0, 0) {
        Err(e) if !is_taken(&e) => {
            log::warn!("the disk image is not locked: {e}");
            Ok(())
        }
        result => result,
    }
}

/// Locks the whole file for writing; `false`: another process has it.
pub fn try_take(file: &File) -> io::Result<bool> {
    match take(file, false) {
        Ok(()) => Ok(true),
        Err(e) if is_taken(&e) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives every lock of this opening back. The file stays open.
pub fn give_back(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK, 0, 0)
}

/// Locks the whole file but for the byte at `gap`, which was locked whole. `false`: there are no locks that other hosts
/// could see.
pub fn leave_gap(file: &File, gap: u64) -> io::Result<bool> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(false);
    }
    match set(file, libc::F_WRLCK, 0, 0) {
        Ok(()) => set(file, libc::F_UNLCK, gap, 1).map(|()| true),
        Err(e) if is_taken(&e) => Err(e),
        Err(_) => Ok(false),
    }
}

/// Whether another opening's lock, on any host, leaves out just the byte at `gap`.
pub fn shows_gap(file: &File, gap: u64) -> io::Result<bool> {
    let locked = |at: u64| {
        let mut flock = flock(libc::F_WRLCK, at, 1);
        // SAFETY: F_OFD_GETLK reads and writes a flock.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut flock) } {
            0 => Ok(flock.l_type != libc::F_UNLCK as libc::c_short),
            _ => Err(io::Error::last_os_error()),
        }
    };
    Ok(locked(0)? && locked(gap - 1)? && !locked(gap)? && locked(gap + 1)?)
}

/// Forgets what of the file this host's page cache holds, so that reads see what other hosts wrote. Bytes that were
/// written here and are not on the disk stay.
pub fn forget_cache(file: &File) -> io::Result<()> {
    // SAFETY: plain posix_fadvise(2).
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r4_one_opening_at_a_time_has_the_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, two) = (open(), open());
        assert!(try_take(&one).unwrap() && try_take(&one).unwrap());
        assert!(!try_take(&two).unwrap());
        give_back(&two).unwrap();
        assert!(!try_take(&two).unwrap());
        give_back(&one).unwrap();
        assert!(try_take(&two).unwrap());
        drop(two);
        assert!(try_take(&one).unwrap());
    }

    #[test]
    fn a_gap_is_seen_in_the_same_file_alone() {
        let [file, other] = [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap());
        let open = |file: &tempfile::NamedTempFile| File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, two) = (open(&file), open(&file));
        let gap = GAPS.start + 12_345;
        assert!(!shows_gap(&two, gap).unwrap());
        assert!(try_take(&one).unwrap());
        assert!(!shows_gap(&two, gap).unwrap());
        assert!(leave_gap(&one, gap).unwrap());
        assert!(shows_gap(&two, gap).unwrap());
        assert!(!shows_gap(&two, gap + 1).unwrap() && !shows_gap(&open(&other), gap).unwrap());
        assert!(!try_take(&two).unwrap());
        // A second one takes the place of the first.
        assert!(leave_gap(&one, gap + 10).unwrap());
        assert!(shows_gap(&two, gap + 10).unwrap() && !shows_gap(&two, gap).unwrap());
        give_back(&one).unwrap();
        assert!(try_take(&two).unwrap());
        assert!(leave_gap(&one, gap).is_err());
    }
}
