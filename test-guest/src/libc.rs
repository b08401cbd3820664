//! The memory functions that compiled code calls (`memcpy` and so on).

use core::arch::asm;

/// Copies upwards.
///
/// # Safety
/// Both ranges must be valid, and `to` must not lie within `from..from + len` beyond its start.
unsafe fn copy_up(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the ranges are the caller's; the direction flag is clear in compiled code.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies fewer than 16 bytes, all read before the first is written.
///
/// # Safety
/// Both ranges must be valid.
unsafe fn copy_short(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: every access lies within the first `len` bytes.
    unsafe {
        if len >= 8 {
            let head = from.cast::<u64>().read_unaligned();
            let tail = from.add(len - 8).cast::<u64>().read_unaligned();
            to.cast::<u64>().write_unaligned(head);
            to.add(len - 8).cast::<u64>().write_unaligned(tail);
        } else if len >= 4 {
            let head = from.cast::<u32>().read_unaligned();
            let tail = from.add(len - 4).cast::<u32>().read_unaligned();
            to.cast::<u32>().write_unaligned(head);
            to.add(len - 4).cast::<u32>().write_unaligned(tail);
        } else if len > 0 {
            let (first, middle, last) = (from.read(), from.add(len / 2).read(), from.add(len - 1).read());
            to.write(first);
            to.add(len / 2).write(middle);
            to.add(len - 1).write(last);
        }
    }
}

/// # Safety
/// As of C's memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: both ranges are the caller's, and they do not overlap.
    unsafe {
        if len < 16 {
            copy_short(to, from, len);
        } else if len <= 32 {
            let head = from.cast::<u128>().read_unaligned();
            let tail = from.add(len - 16).cast::<u128>().read_unaligned();
            to.cast::<u128>().write_unaligned(head);
            to.add(len - 16).cast::<u128>().write_unaligned(tail);
        } else {
            copy_up(to, from, len);
        }
    }
    to
}

/// # Safety
/// As of C's memmove.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: both ranges are the caller's; an overlap is copied from the end that is safe, whole words at a time.
    unsafe {
        if len < 16 {
            copy_short(to, from, len);
        } else if (to as usize).wrapping_sub(from as usize) >= len {
            copy_up(to, from, len);
        } else {
            let mut left = len;
            while left >= 8 {
                left -= 8;
                let word = from.add(left).cast::<u64>().read_volatile_unaligned();
                to.add(left).cast::<u64>().write_unaligned(word);
            }
            copy_short(to, from, left);
        }
    }
    to
}

/// A read that the compiler does not join with others into a call of the function that it is in.
trait Unaligned {
    /// # Safety
    /// The address must be valid for 8 bytes.
    unsafe fn read_volatile_unaligned(self) -> u64;
}

impl Unaligned for *const u64 {
    // SAFETY: asks what the trait does: 8 bytes from here can be read.
    #[inline]
    unsafe fn read_volatile_unaligned(self) -> u64 {
        let value;
        // SAFETY: the caller's promise; x86 allows any alignment.
        unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) self, options(nostack, preserves_flags, readonly)) };
        value
    }
}

/// # Safety
/// As of C's memset.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the range is the caller's.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") byte as u8,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// # Safety
/// As of C's memcmp.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut i = 0;
    // SAFETY: every access lies within the first `len` bytes of the caller's ranges.
    unsafe {
        while i + 8 <= len && a.add(i).cast::<u64>().read_unaligned() == b.add(i).cast::<u64>().read_unaligned() {
            i += 8;
        }
        while i < len {
            let (x, y) = (a.add(i).read(), b.add(i).read());
            if x != y {
                return i32::from(x) - i32::from(y);
            }
            i += 1;
        }
    }
    0
}

/// # Safety
/// As of C's bcmp.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise is the same.
    unsafe { memcmp(a, b, len) }
}

/// # Safety
/// As of C's strlen.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller's string ends with a NUL.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
