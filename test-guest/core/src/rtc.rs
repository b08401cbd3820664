//! The registers of an MC146818 as date and time.

/// Date and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DateTime {
    /// Year with century.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 60.
    pub second: u8,
}

/// The registers that hold the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    /// Register 0.
    pub second: u8,
    /// Register 2.
    pub minute: u8,
    /// Register 4.
    pub hour: u8,
    /// Register 7.
    pub day: u8,
    /// Register 8.
    pub month: u8,
    /// Register 9.
    pub year: u8,
    /// Register 0x32.
    pub century: u8,
    /// Register 0xb: bit 1 24 hours, bit 2 binary.
    pub status_b: u8,
}

impl Registers {
    /// What they say; a century of zero is taken as the 21st.
    pub fn decode(&self) -> DateTime {
        let binary = self.status_b & 4 != 0;
        let number = |n: u8| if binary { n } else { (n >> 4) * 10 + (n & 0xf) };
        let hour = if self.status_b & 2 != 0 {
            number(self.hour)
        } else {
            number(self.hour & 0x7f) % 12 + if self.hour & 0x80 != 0 { 12 } else { 0 }
        };
        let century = match number(self.century) {
            0 => 20,
            n => u16::from(n),
        };
        DateTime {
            year: century * 100 + u16::from(number(self.year)),
            month: number(self.month),
            day: number(self.day),
            hour,
            minute: number(self.minute),
            second: number(self.second),
        }
    }
}

impl core::fmt::Display for DateTime {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = self;
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bcd_binary_and_twelve_hours() {
        let bcd = Registers {
            second: 0x56,
            minute: 0x34,
            hour: 0x12,
            day: 0x29,
            month: 0x02,
            year: 0x24,
            century: 0x20,
            status_b: 2,
        };
        assert_eq!(bcd.decode().to_string(), "2024-02-29 12:34:56");
        let binary = Registers {
            second: 56,
            minute: 34,
            hour: 23,
            day: 31,
            month: 12,
            year: 99,
            century: 19,
            status_b: 6,
        };
        assert_eq!(binary.decode().to_string(), "1999-12-31 23:34:56");
        assert_eq!(
            Registers {
                hour: 0x92,
                status_b: 0,
                ..bcd
            }
            .decode()
            .hour,
            12
        );
        assert_eq!(
            Registers {
                hour: 0x12,
                status_b: 0,
                ..bcd
            }
            .decode()
            .hour,
            0
        );
        assert_eq!(
            Registers {
                hour: 0x81,
                status_b: 0,
                ..bcd
            }
            .decode()
            .hour,
            13
        );
        assert_eq!(Registers { century: 0, ..bcd }.decode().year, 2024);
    }
}
