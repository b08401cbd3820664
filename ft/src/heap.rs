//! What a session took of the process's heaps goes back to the host when the session is over.

/// Gives the host what is free in the heaps of all threads. They keep some of it else, and pieces between others' memory for
/// ever (malloc_trim(3)), a little more after each session. Takes some milliseconds at most.
pub(crate) fn give_back() {
    // SAFETY: malloc_trim(3) touches free memory alone, under the allocator's own locks, and may be called by any thread.
    unsafe { libc::malloc_trim(0) };
}
