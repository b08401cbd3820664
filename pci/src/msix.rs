//! MSI-X (PCI Local Bus 3.0, 6.8.2): the vector table, the pending bits, and the message control word.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::MsiVectors;

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Size in bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// One vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Message address, low half.
    pub address_low: u32,
    /// Message address, high half.
    pub address_high: u32,
    /// Message data.
    pub data: u32,
    /// Bit 0: masked.
    pub control: u32,
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Format of this struct: 1.
    pub version: u32,
    /// Message control word.
    pub control: u16,
    /// The table.
    pub entries: Vec<Entry>,
    /// Vectors that were raised while masked.
    pub pending: Vec<bool>,
}

/// A saved state of another shape.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("MSI-X state of version {version} with {entries} vectors")]
pub struct StateError {
    version: u32,
    entries: usize,
}

/// MSI-X of one function. Its owner locks it.
pub struct MsixConfig {
    control: u16,
    entries: Vec<Entry>,
    pending: Vec<bool>,
    vectors: Arc<dyn MsiVectors>,
}

impl MsixConfig {
    /// All vectors masked, MSI-X off. `count`: 1 to 2,048.
    pub fn new(count: u16, vectors: Arc<dyn MsiVectors>) -> Self {
        let entry = Entry {
            address_low: 0,
            address_high: 0,
            data: 0,
            control: VECTOR_MASKED,
        };
        let n = usize::from(count);
        Self {
            control: count.saturating_sub(1) & 0x7ff,
            entries: vec![entry; n],
            pending: vec![false; n],
            vectors,
        }
    }

    /// Body of the capability (after id and next pointer) and its write mask, for a table and pending bits in `bar`.
    pub fn capability(&self, bar: u8, table_offset: u32, pba_offset: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&self.control.to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pba_offset | u32::from(bar)).to_le_bytes());
        (body, [0, 0xc0])
    }

    /// MSI-X is on.
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    fn live(&self, vector: usize) -> bool {
        self.enabled()
            && self.control & CONTROL_FUNCTION_MASK == 0
            && self.entries.get(vector).is_some_and(|e| e.control & VECTOR_MASKED == 0)
    }

    /// Brings a vector's route up to date and delivers it when it was waiting.
    fn refresh(&mut self, vector: usize) {
        let live = self.live(vector);
        let Some(entry) = self.entries.get(vector) else { return };
        let address = u64::from(entry.address_high) << 32 | u64::from(entry.address_low);
        let route = live.then_some((address, entry.data));
        if let Err(e) = self.vectors.set_route(vector as u16, route) {
            log::error!("MSI-X vector {vector}: {e}");
        }
        if live && std::mem::take(&mut self.pending[vector]) {
            self.trigger(vector as u16);
        }
    }

    /// The guest wrote the message control word.
    pub fn set_control(&mut self, control: u16) {
        let changeable = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
        let new = self.control & !changeable | control & changeable;
        if new != self.control {
            self.control = new;
            for vector in 0..self.entries.len() {
                self.refresh(vector);
            }
        }
    }

    /// Raises a vector; while it is masked it becomes pending.
    pub fn trigger(&mut self, vector: u16) {
        let index = usize::from(vector);
        if self.live(index) {
            if let Err(e) = self.vectors.trigger(vector) {
                log::error!("MSI-X vector {vector}: {e}");
            }
        } else if let (true, Some(pending)) = (self.enabled(), self.pending.get_mut(index)) {
            *pending = true;
        }
    }

    /// Reads the table: 4 or 8 bytes, aligned; anything else reads as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (i, chunk) in data.chunks_exact_mut(4).enumerate() {
            let at = offset + 4 * i as u64;
            if let Some(e) = self.entries.get((at / ENTRY_SIZE) as usize) {
                let word = [e.address_low, e.address_high, e.data, e.control][(at % ENTRY_SIZE / 4) as usize];
                chunk.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Writes the table: 4 or 8 bytes, aligned; anything else is dropped.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (i, chunk) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i as u64;
            let vector = (at / ENTRY_SIZE) as usize;
            let word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            let Some(e) = self.entries.get_mut(vector) else { return };
            match at % ENTRY_SIZE / 4 {
                0 => e.address_low = word & !3,
                1 => e.address_high = word,
                2 => e.data = word,
                _ => e.control = word & VECTOR_MASKED,
            }
            self.refresh(vector);
        }
    }

    /// Reads the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(i).saturating_mul(8);
            *byte = (0..8).fold(0, |b, bit| {
                b | u8::from(self.pending.get(first.saturating_add(bit)) == Some(&true)) << bit
            });
        }
    }

    /// Saved state.
    pub fn state(&self) -> MsixState {
        let (entries, pending) = (self.entries.clone(), self.pending.clone());
        MsixState {
            version: 1,
            control: self.control,
            entries,
            pending,
        }
    }

    /// Loads a saved state.
    pub fn set_state(&mut self, state: &MsixState) -> Result<(), StateError> {
        let n = self.entries.len();
        if state.version != 1 || state.entries.len() != n || state.pending.len() != n {
            return Err(StateError {
                version: state.version,
                entries: state.entries.len(),
            });
        }
        let fixed = !(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        self.control = self.control & fixed | state.control & !fixed;
        self.entries.clone_from(&state.entries);
        self.pending.clone_from(&state.pending);
        for vector in 0..n {
            self.refresh(vector);
        }
        Ok(())
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.control &= !(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        let n = self.entries.len();
        self.entries = vec![
            Entry {
                address_low: 0,
                address_high: 0,
                data: 0,
                control: VECTOR_MASKED
            };
            n
        ];
        self.pending = vec![false; n];
        for vector in 0..n {
            self.refresh(vector);
        }
    }

    /// Raises every vector that has a route. After a restore, so that no interrupt that was on its way when the state
    /// was taken is lost; drivers bear a spurious one.
    pub fn trigger_all(&mut self) {
        for vector in 0..self.entries.len() {
            if self.live(vector) {
                self.trigger(vector as u16);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u16, Option<(u64, u32)>)>>, Mutex<Vec<u16>>);

    impl MsiVectors for Recorder {
        fn set_route(&self, vector: u16, message: Option<(u64, u32)>) -> std::io::Result<()> {
            self.0.lock().unwrap().push((vector, message));
            Ok(())
        }

        fn trigger(&self, vector: u16) -> std::io::Result<()> {
            self.1.lock().unwrap().push(vector);
            Ok(())
        }
    }

    #[test]
    fn a_masked_vector_waits_and_is_delivered_when_it_is_unmasked() {
        let recorder = Arc::new(Recorder::default());
        let mut msix = MsixConfig::new(2, recorder.clone());
        msix.trigger(1);
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(16, &0xfee0_0000u32.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix.trigger(1);
        let mut pba = [0; 8];
        msix.read_pba(0, &mut pba);
        assert_eq!(pba[0], 2);
        assert!(recorder.1.lock().unwrap().is_empty());
        msix.write_table(28, &0u32.to_le_bytes());
        assert_eq!(*recorder.1.lock().unwrap(), vec![1]);
        assert_eq!(recorder.0.lock().unwrap().last(), Some(&(1, Some((0xfee0_0000, 0x41)))));
        let state = msix.state();
        let mut other = MsixConfig::new(2, recorder.clone());
        other.set_state(&state).unwrap();
        assert_eq!(other.state(), state);
        assert!(MsixConfig::new(3, recorder).set_state(&state).is_err());
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let mut msix = MsixConfig::new(3, Arc::new(Recorder::default()));
        for offset in (0..80).chain([u64::MAX - 8, u64::MAX / 2]) {
            for size in 0..=9 {
                let mut data = vec![0xff; size];
                msix.write_table(offset, &data);
                msix.read_table(offset, &mut data);
                msix.read_pba(offset, &mut data);
            }
        }
        msix.trigger(700);
    }
}
