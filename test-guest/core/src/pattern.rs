//! The pattern stream: word `i` of seed `s` is splitmix64(s + i * golden gamma), little endian.

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Word `index` of the stream of `seed`.
#[inline]
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_mul(GAMMA));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A place in the stream.
#[derive(Debug, Clone)]
pub struct Pattern {
    seed: u64,
    /// Bytes before this place.
    pub position: u64,
}

impl Pattern {
    /// The start of the stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    fn byte(&self) -> u8 {
        (word(self.seed, self.position / 8) >> (8 * (self.position % 8))) as u8
    }

    /// Writes the next bytes of the stream into all of `out`.
    pub fn fill(&mut self, mut out: &mut [u8]) {
        while !self.position.is_multiple_of(8) {
            let Some((first, rest)) = out.split_first_mut() else {
                return;
            };
            *first = self.byte();
            self.position += 1;
            out = rest;
        }
        let (words, tail) = out.as_chunks_mut::<8>();
        let mut index = self.position / 8;
        for chunk in words {
            *chunk = word(self.seed, index).to_le_bytes();
            index += 1;
        }
        self.position = index * 8;
        for byte in tail {
            *byte = self.byte();
            self.position += 1;
        }
    }

    /// Compares `bytes` with the stream and moves past them; false at the first difference.
    pub fn check(&mut self, mut bytes: &[u8]) -> bool {
        while !self.position.is_multiple_of(8) {
            let Some((first, rest)) = bytes.split_first() else {
                return true;
            };
            if *first != self.byte() {
                return false;
            }
            self.position += 1;
            bytes = rest;
        }
        let (words, tail) = bytes.as_chunks::<8>();
        let start = self.position / 8;
        let mut difference = 0;
        for (index, chunk) in (start..).zip(words) {
            difference |= u64::from_le_bytes(*chunk) ^ word(self.seed, index);
        }
        if difference != 0 {
            return false;
        }
        self.position += 8 * words.len() as u64;
        for byte in tail {
            if *byte != self.byte() {
                return false;
            }
            self.position += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_splitmix64() {
        // The published first outputs of splitmix64 with state 1234567, whose first output has one gamma added.
        let published = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973];
        assert_eq!([1, 2].map(|i| word(1_234_567, i)), published);
    }

    #[test]
    fn any_cut_gives_the_same_stream() {
        let mut whole = [0; 1000];
        Pattern::new(7).fill(&mut whole);
        for step in 1..40 {
            let (mut writer, mut reader) = (Pattern::new(7), Pattern::new(7));
            let mut parts = [0; 1000];
            for chunk in parts.chunks_mut(step) {
                writer.fill(chunk);
                assert!(reader.check(chunk));
            }
            assert_eq!(parts, whole);
            assert_eq!(reader.position, 1000);
        }
    }

    #[test]
    fn every_wrong_byte_is_seen() {
        let mut good = [0; 100];
        Pattern::new(3).fill(&mut good);
        for skip in 0..9 {
            for at in skip..100 {
                let mut reader = Pattern::new(3);
                assert!(reader.check(&good[..skip]));
                let mut bad = good;
                bad[at] ^= 0x10;
                assert!(!reader.check(&bad[skip..]));
            }
        }
    }
}
