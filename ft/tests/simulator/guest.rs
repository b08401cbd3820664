//! A guest that is small enough to be compared whole.

use ft::machine::PAGE_SIZE;

pub const PAGES: usize = 4;
pub const BLOCKS: usize = 4;
pub const BLOCK: u64 = 512;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guest {
    pub ram: [u64; PAGES],
    pub disk: [u64; BLOCKS],
    /// The shared disk as the guest sees it.
    pub shared: [u64; BLOCKS],
    /// Depends on everything that ever happened in it.
    pub state: u64,
}

impl Guest {
    pub fn mix(&mut self, value: u64) {
        self.state = (self.state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}

pub fn page(value: u64) -> Vec<u8> {
    let mut data = vec![0; PAGE_SIZE];
    data[..8].copy_from_slice(&value.to_le_bytes());
    data
}

pub fn number(data: &[u8]) -> u64 {
    u64::from_le_bytes(data[..8].try_into().unwrap())
}
