//! Pattern streams, and the random numbers that the clients use.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(mut z: u64) -> u64 {
    z ^= z >> 30;
    z = z.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z ^= z >> 27;
    z = z.wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Word `index` of the pattern stream of `seed`.
pub fn word(seed: u64, index: u64) -> u64 {
    mix(seed.wrapping_add(index.wrapping_mul(GOLDEN)))
}

/// Fills `buf` with the bytes of the pattern stream of `seed` from byte `offset` on.
pub fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let bytes = word(seed, at / 8).to_le_bytes();
        let skip = (at % 8) as usize;
        let n = rest.len().min(8 - skip);
        rest[..n].copy_from_slice(&bytes[skip..skip + n]);
        rest = &mut rest[n..];
        at += n as u64;
    }
}

/// Compares `buf` with the pattern stream of `seed` from byte `offset` on; the stream position of the first difference
/// is returned.
pub fn first_difference(seed: u64, offset: u64, buf: &[u8]) -> Option<u64> {
    let mut expected = [0u8; 4096];
    let mut at = offset;
    for chunk in buf.chunks(expected.len()) {
        let expected = &mut expected[..chunk.len()];
        fill(seed, at, expected);
        if let Some(i) = chunk.iter().zip(expected.iter()).position(|(a, b)| a != b) {
            return Some(at + i as u64);
        }
        at += chunk.len() as u64;
    }
    None
}

/// Small seeded generator of random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number in `range`, which must not be empty.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.next_u64() % (range.end - range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_those_of_the_contract() {
        // splitmix64's finalizer of 0 is 0; the second word of seed 0 is the first output of splitmix64 seeded with 0.
        assert_eq!(word(0, 0), 0);
        assert_eq!(word(0, 1), 0xE220_A839_7B1D_CDAF);
    }

    proptest! {
        #[test]
        fn a_stream_is_the_same_however_it_is_cut(seed: u64, start in 0u64..100_000, len in 1usize..9000, cut: prop::sample::Index) {
            let mut whole = vec![0; len];
            fill(seed, start, &mut whole);
            let cut = cut.index(len);
            let mut parts = vec![0; len];
            fill(seed, start, &mut parts[..cut]);
            fill(seed, start + cut as u64, &mut parts[cut..]);
            prop_assert_eq!(&whole, &parts);
            prop_assert_eq!(first_difference(seed, start, &whole), None);
            whole[cut] ^= 0x40;
            prop_assert_eq!(first_difference(seed, start, &whole), Some(start + cut as u64));
        }
    }
}
