//! The CMOS real-time clock (MC146818) at ports 0x70 and 0x71: the host's time of day in UTC, and 128 bytes of memory.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bus::BusDevice;
use crate::lock;

/// First I/O port.
pub const PORT: u64 = 0x70;
/// Number of I/O ports.
pub const PORTS: u64 = 2;

const MEMORY: usize = 128;

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Format of this struct: 1.
    pub version: u32,
    /// Selected byte.
    pub index: u8,
    /// The memory, 128 bytes.
    pub memory: Vec<u8>,
}

/// A saved state of another shape.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("RTC state of version {version} with {len} bytes")]
pub struct StateError {
    version: u32,
    len: usize,
}

/// The clock.
pub struct Rtc {
    state: Mutex<RtcState>,
}

/// (year, month 1-12, day 1-31) of a day number since 1970-01-01 (proleptic Gregorian calendar).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn bcd(n: i64) -> u8 {
    ((n / 10 % 10) << 4 | n % 10) as u8
}

fn time_byte(index: u8, now: i64) -> Option<u8> {
    let (days, seconds) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    Some(match index {
        0x00 => bcd(seconds % 60),
        0x02 => bcd(seconds / 60 % 60),
        0x04 => bcd(seconds / 3600),
        0x06 => ((days + 4).rem_euclid(7) + 1) as u8,
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x32 => bcd(year / 100),
        // Status A: 32.768 kHz base, no update in progress. B: 24 hours, BCD. C: no interrupts. D: battery good.
        0x0a => 0x26,
        0x0b => 0x02,
        0x0c => 0x00,
        0x0d => 0x80,
        _ => return None,
    })
}

impl Default for Rtc {
    fn default() -> Self {
        Self {
            state: Mutex::new(RtcState {
                version: 1,
                index: 0,
                memory: vec![0; MEMORY],
            }),
        }
    }
}

impl Rtc {
    /// Saved state.
    pub fn state(&self) -> RtcState {
        lock(&self.state).clone()
    }

    /// Loads a saved state.
    pub fn set_state(&self, saved: &RtcState) -> Result<(), StateError> {
        if saved.version != 1 || saved.memory.len() != MEMORY || usize::from(saved.index) >= MEMORY {
            return Err(StateError {
                version: saved.version,
                len: saved.memory.len(),
            });
        }
        *lock(&self.state) = saved.clone();
        Ok(())
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let state = lock(&self.state);
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs() as i64);
            *byte = time_byte(state.index, now).unwrap_or(state.memory[usize::from(state.index)]);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        match (offset, data.first()) {
            (0, Some(byte)) => state.index = byte & 0x7f,
            (1, Some(byte)) => {
                let index = usize::from(state.index);
                state.memory[index] = *byte;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |now| [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00].map(|i| time_byte(i, now).unwrap());
        assert_eq!(at(0), [0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00]);
        assert_eq!(at(951_827_696), [0x20, 0x00, 0x02, 0x29, 0x12, 0x34, 0x56]);
        assert_eq!(at(4_102_444_799), [0x20, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    }
}
