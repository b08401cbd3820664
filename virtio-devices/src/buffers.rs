//! The guest's buffers of one descriptor chain, resolved to this process's memory.

use std::io::{IoSlice, IoSliceMut};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::GuestMemory;

/// Pieces of guest RAM, in order. They stay valid as long as the [`GuestMemory`] they were resolved from, which is why
/// whoever keeps a `Buffers` keeps that too. The guest may change the bytes at any time; they are only ever copied.
#[derive(Default)]
pub(crate) struct Buffers {
    iovecs: Vec<libc::iovec>,
    /// Guest address of each piece.
    addresses: Vec<u64>,
    len: usize,
}

// SAFETY: the raw pointers point into guest RAM, which belongs to no thread.
unsafe impl Send for Buffers {}

/// One byte of guest RAM.
#[derive(Clone, Copy)]
pub(crate) struct GuestByte(u64);

impl GuestByte {
    /// Writes it; false when it is not in guest RAM.
    pub(crate) fn write(self, memory: &GuestMemory, value: u8) -> bool {
        use vm_memory::Bytes;
        memory.write_obj(value, GuestAddress(self.0)).is_ok()
    }
}

/// Tells the dirty log that `len` bytes at `address` were written through a raw pointer.
fn mark(memory: &GuestMemory, address: u64, len: usize) {
    let address = GuestAddress(address);
    if let Some(region) = memory.find_region(address) {
        region
            .bitmap()
            .mark_dirty((address.0 - region.start_addr().0) as usize, len);
    }
}

impl Buffers {
    pub(crate) fn clear(&mut self) {
        self.iovecs.clear();
        self.addresses.clear();
        self.len = 0;
    }

    /// Bytes in all pieces.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn pieces(&self) -> usize {
        self.iovecs.len()
    }

    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Adds guest RAM; false when a part of the range is not RAM. A range over several regions becomes several pieces.
    pub(crate) fn push(&mut self, memory: &GuestMemory, address: u64, len: usize) -> bool {
        let (mut address, mut rest) = (address, len);
        while rest > 0 {
            let Some(region) = memory.find_region(GuestAddress(address)) else {
                return false;
            };
            let offset = address - region.start_addr().0;
            let piece = rest.min((region.len() - offset) as usize);
            let Ok(base) = region.get_host_address(MemoryRegionAddress(offset)) else {
                return false;
            };
            self.iovecs.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: piece,
            });
            self.addresses.push(address);
            self.len += piece;
            rest -= piece;
            match address.checked_add(piece as u64) {
                Some(next) => address = next,
                None => return rest == 0,
            }
        }
        true
    }

    /// Copies bytes from `offset` on; returns how many there were.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.walk(offset, out.len(), |_, base, len| {
            // SAFETY: `base` points to `len` bytes of mapped guest RAM, `out` has room for them (walk stops there), and
            // the two do not overlap: guest RAM is reached through raw pointers only.
            unsafe { std::ptr::copy_nonoverlapping(base, out.as_mut_ptr().add(done), len) };
            done += len;
        });
        done
    }

    /// Copies bytes to `offset` and on, and marks the pages dirty; returns how many had room.
    pub(crate) fn write(&self, memory: &GuestMemory, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        self.walk(offset, data.len(), |address, base, len| {
            // SAFETY: as in `read`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(done), base, len) };
            mark(memory, address, len);
            done += len;
        });
        done
    }

    /// Marks the first `len` bytes dirty, after the kernel or a backend wrote them.
    pub(crate) fn mark_dirty(&self, memory: &GuestMemory, len: usize) {
        self.walk(0, len, |address, _, len| mark(memory, address, len));
    }

    fn walk(&self, offset: usize, len: usize, mut f: impl FnMut(u64, *mut u8, usize)) {
        let (mut skip, mut rest) = (offset, len);
        for (iovec, address) in self.iovecs.iter().zip(&self.addresses) {
            if rest == 0 {
                return;
            }
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let n = rest.min(iovec.iov_len - skip);
            // SAFETY: `skip` is less than the piece's length.
            let base = unsafe { iovec.iov_base.cast::<u8>().add(skip) };
            f(address + skip as u64, base, n);
            rest -= n;
            skip = 0;
        }
    }

    /// Forgets the first `n` bytes, of which there must be as many.
    pub(crate) fn drop_front(&mut self, n: usize) {
        let mut n = n.min(self.len);
        self.len -= n;
        let mut whole = 0;
        for (iovec, address) in self.iovecs.iter_mut().zip(&mut self.addresses) {
            if n < iovec.iov_len {
                // SAFETY: `n` is less than the piece's length.
                iovec.iov_base = unsafe { iovec.iov_base.cast::<u8>().add(n) }.cast();
                iovec.iov_len -= n;
                *address += n as u64;
                break;
            }
            n -= iovec.iov_len;
            whole += 1;
        }
        self.iovecs.drain(..whole);
        self.addresses.drain(..whole);
    }

    /// Takes the last byte away.
    pub(crate) fn pop_byte(&mut self) -> Option<GuestByte> {
        let (iovec, address) = (self.iovecs.last_mut()?, self.addresses.last()?);
        iovec.iov_len -= 1;
        self.len -= 1;
        let byte = GuestByte(address + iovec.iov_len as u64);
        if iovec.iov_len == 0 {
            self.iovecs.pop();
            self.addresses.pop();
        }
        Some(byte)
    }
}

/// Pieces as the standard library's slices, for a backend that reads them.
///
/// # Safety
/// The pieces must stay mapped for `'a`.
pub(crate) unsafe fn io_slices<'a>(iovecs: &[libc::iovec]) -> &'a [IoSlice<'a>] {
    // SAFETY: IoSlice is documented to be ABI compatible with iovec; the caller vouches for the memory. The guest may
    // change the bytes meanwhile, which backends only hand to the kernel or copy.
    unsafe { std::slice::from_raw_parts(iovecs.as_ptr().cast(), iovecs.len()) }
}

/// Pieces as the standard library's slices, for a backend that fills them.
///
/// # Safety
/// The pieces must stay mapped for `'a` and be used by nobody else in this process.
pub(crate) unsafe fn io_slices_mut<'a>(iovecs: &mut [libc::iovec]) -> &'a mut [IoSliceMut<'a>] {
    // SAFETY: as in `io_slices`.
    unsafe { std::slice::from_raw_parts_mut(iovecs.as_mut_ptr().cast(), iovecs.len()) }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestRegionMmap;
    use vm_memory::mmap::MmapRegion;

    use super::*;

    fn memory() -> GuestMemory {
        let region = |start| GuestRegionMmap::new(MmapRegion::new(0x4000).unwrap(), GuestAddress(start)).unwrap();
        GuestMemory::from_regions(vec![region(0), region(0x4000), region(0x10000)]).unwrap()
    }

    #[test]
    fn ranges_over_regions_and_holes() {
        let memory = memory();
        let mut buffers = Buffers::default();
        assert!(buffers.push(&memory, 0x3ffe, 4));
        assert_eq!((buffers.pieces(), buffers.len()), (2, 4));
        assert!(!buffers.push(&memory, 0x7fff, 2), "runs into a hole");
        assert!(!buffers.push(&memory, u64::MAX, 2));
        buffers.clear();
        assert!(buffers.push(&memory, 0x9000, 0), "nothing is nowhere");
    }

    #[test]
    fn reads_writes_and_cuts() {
        let memory = memory();
        let mut buffers = Buffers::default();
        assert!(buffers.push(&memory, 0x3ffe, 4) && buffers.push(&memory, 0x10000, 3));
        assert_eq!(buffers.write(&memory, 1, b"abcdefgh"), 6);
        let dirty = |address| {
            memory
                .find_region(GuestAddress(address))
                .unwrap()
                .bitmap()
                .dirty_at(address as usize & 0x3fff)
        };
        assert!(dirty(0x3fff) && dirty(0x4000) && dirty(0x10000) && !dirty(0x5000));
        buffers.drop_front(2);
        let mut out = [0; 8];
        assert_eq!(buffers.read(0, &mut out), 5);
        assert_eq!(&out[..5], b"bcdef");
        assert!(buffers.pop_byte().unwrap().write(&memory, b'x'));
        assert_eq!(buffers.len(), 4);
        use vm_memory::Bytes;
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10002)).unwrap(), b'x');
        buffers.drop_front(4);
        assert!(buffers.pop_byte().is_none() && buffers.pieces() == 0);
    }
}
