//! Arithmetic of split virtqueues (virtio 1.2, 2.7): indices run freely through 16 bits.

/// Bytes of the descriptor table of a queue of `size`.
pub const fn descriptors_len(size: u16) -> usize {
    16 * size as usize
}

/// Bytes of the available ring: flags, index, ring, used_event.
pub const fn available_len(size: u16) -> usize {
    6 + 2 * size as usize
}

/// Bytes of the used ring: flags, index, ring, avail_event.
pub const fn used_len(size: u16) -> usize {
    6 + 8 * size as usize
}

/// The slot of free-running index `index` in a ring of `size` (a power of two).
pub const fn slot(index: u16, size: u16) -> usize {
    (index & (size - 1)) as usize
}

/// The other side wants to be told (2.7.7.1): its `event` index was passed when the index went from `old` to `new`.
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The largest queue size that is a power of two and neither more than the device's nor than ours.
pub const fn queue_size(device: u16, wanted: u16) -> u16 {
    let most = if device < wanted { device } else { wanted };
    if most == 0 { 0 } else { 1 << (15 - most.leading_zeros()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_as_in_the_specification() {
        // By counting: is `event` among the indices old .. new - 1?
        for old in [0u16, 5, 0xfffe, 0xffff] {
            for step in 0..6u16 {
                let new = old.wrapping_add(step);
                for ahead in 0..8u16 {
                    let event = old.wrapping_sub(1).wrapping_add(ahead);
                    let passed = (0..step).any(|i| old.wrapping_add(i) == event);
                    assert_eq!(need_event(event, new, old), passed, "{old} {new} {event}");
                }
            }
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(
            [0, 1, 2, 3, 100, 256, 1024].map(|n| queue_size(n, 256)),
            [0, 1, 2, 2, 64, 256, 256]
        );
        assert_eq!((descriptors_len(4), available_len(4), used_len(4)), (64, 14, 38));
        assert_eq!(slot(0xffff, 256), 255);
        assert_eq!(slot(256, 256), 0);
    }
}
