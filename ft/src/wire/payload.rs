//! Received bytes, in memory that is used again: fresh memory of a large frame costs a fault for each of its pages, more than
//! receiving it. Memory goes back to its [`Pool`] when a [`Payload`] is dropped, on whatever thread; the pool's lock is held
//! for a push or a pop alone.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that a pool keeps at most, beside what is in use.
const KEPT: usize = 16 << 20;

/// Less than this is not worth it, and must not take up memory for more.
const LEAST: usize = 32 << 10;

/// Memory that no payload uses now.
#[derive(Debug, Default, Clone)]
pub(super) struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

impl Pool {
    /// Room for `len` bytes, with any content.
    pub(super) fn take(&self, len: usize) -> Payload {
        if len < LEAST {
            return vec![0; len].into();
        }
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = bytes.get_or_insert_default();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        Payload {
            bytes: std::mem::take(bytes),
            range: 0..len,
            pool: Some(self.clone()),
        }
    }

    fn put(&self, bytes: Vec<u8>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.iter().map(Vec::capacity).sum::<usize>() + bytes.capacity() <= KEPT {
            all.push(bytes);
        }
    }
}

/// Bytes of a frame; as a slice it is these alone, whatever memory is around them.
#[derive(Default)]
pub struct Payload {
    bytes: Vec<u8>,
    range: Range<usize>,
    pool: Option<Pool>,
}

impl Payload {
    /// Leaves out the first `count` bytes, at most all.
    pub(super) fn skip(&mut self, count: usize) {
        self.range.start = self.range.end.min(self.range.start + count);
    }

    /// Room for `len` bytes with any content, from where this came from.
    pub(super) fn another(&self, len: usize) -> Self {
        match &self.pool {
            Some(pool) => pool.take(len),
            None => vec![0; len].into(),
        }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            range: 0..bytes.len(),
            bytes,
            pool: None,
        }
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.range.clone()]
    }
}

impl Clone for Payload {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Payload {}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_within_bounds() {
        let pool = Pool::default();
        let mut first = pool.take(2 * LEAST);
        first.fill(7);
        let memory = first.as_ptr();
        drop(first);
        let second = pool.take(LEAST);
        assert_eq!((second.as_ptr(), second.len()), (memory, LEAST));
        let mut third = pool.take(LEAST);
        assert_ne!(third.as_ptr(), memory);
        third.skip(LEAST - 2);
        third.copy_from_slice(&[1, 2]);
        assert_eq!(third.clone(), vec![1, 2].into());
        third.skip(3);
        assert_eq!(third.len(), 0);
        drop((second, third));
        assert_eq!(pool.0.lock().unwrap().len(), 2);
        drop(pool.take(KEPT + 1));
        drop(pool.take(1));
        assert_eq!(pool.0.lock().unwrap().len(), 1, "too large, and too small");
    }
}
