//! Values of options.

use std::net::IpAddr;
use std::path::PathBuf;

use super::split;
use crate::config::{CoreSchedulingMode, CpuAffinity, CpuTopology, ImageType, MAX_HOST_CPUS, MacAddr};

/// A type that an option's value can have.
pub trait OptionValue: Sized {
    /// What is possible, for errors: "must be ...".
    const EXPECTED: &'static str;
    /// Reads it.
    fn parse(text: &str) -> Option<Self>;
}

/// Bytes: `4096`, `512K`, `512M`, `1G`, `1T`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl OptionValue for ByteSize {
    const EXPECTED: &'static str = "a number of bytes, K, M, G or T, for example 512M or 4G";

    fn parse(text: &str) -> Option<Self> {
        let (digits, shift) = match text.char_indices().last()? {
            (i, 'K' | 'k') => (&text[..i], 10),
            (i, 'M' | 'm') => (&text[..i], 20),
            (i, 'G' | 'g') => (&text[..i], 30),
            (i, 'T' | 't') => (&text[..i], 40),
            _ => (text, 0),
        };
        let number = u64::parse(digits)?;
        number.checked_mul(1 << shift).map(Self)
    }
}

impl OptionValue for bool {
    const EXPECTED: &'static str = "on or off";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        }
    }
}

impl OptionValue for String {
    const EXPECTED: &'static str = "a text that is not empty";

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.into())
    }
}

impl OptionValue for PathBuf {
    const EXPECTED: &'static str = "a path";

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty() && !text.contains('\0')).then(|| text.into())
    }
}

macro_rules! number {
    ($($type:ty: $expected:literal),*) => {$(
        impl OptionValue for $type {
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Option<Self> {
                let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| text.parse().ok()).flatten()
            }
        }
    )*};
}

number! {
    u8: "a number from 0 to 255",
    u16: "a number from 0 to 65535",
    u32: "a number",
    u64: "a number"
}

impl OptionValue for MacAddr {
    const EXPECTED: &'static str = "a MAC address such as 52:54:00:12:34:56";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl OptionValue for IpAddr {
    const EXPECTED: &'static str = "an IPv4 or IPv6 address";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl OptionValue for CpuTopology {
    const EXPECTED: &'static str = "threads_per_core:cores_per_die:dies_per_package:packages, for example 1:2:1:1";

    fn parse(text: &str) -> Option<Self> {
        let numbers: Vec<u16> = text.split(':').map(u16::parse).collect::<Option<_>>()?;
        let [threads_per_core, cores_per_die, dies_per_package, packages] = *numbers.as_slice() else {
            return None;
        };
        Some(Self {
            threads_per_core,
            cores_per_die,
            dies_per_package,
            packages,
        })
    }
}

/// `[0@[0-3],1@[4,6]]`
impl OptionValue for Vec<CpuAffinity> {
    const EXPECTED: &'static str = "a list of VCPU@[CPUS] in brackets, for example [0@[0-3],1@[4,6]]";

    fn parse(text: &str) -> Option<Self> {
        let one = |part: &str| {
            let (vcpu, cpus) = part.split_once('@')?;
            Some(CpuAffinity {
                vcpu: u8::parse(vcpu)?,
                host_cpus: host_cpus(cpus)?,
            })
        };
        split(in_brackets(text)?).ok()?.into_iter().map(one).collect()
    }
}

fn in_brackets(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// `[0-3,6]`
fn host_cpus(text: &str) -> Option<Vec<u16>> {
    let mut cpus = Vec::new();
    for range in in_brackets(text)?.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (u16::parse(first)?, u16::parse(last)?);
        if first > last || last >= MAX_HOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

impl OptionValue for ImageType {
    const EXPECTED: &'static str = "raw or qcow2 (other formats are not supported: convert the image with qemu-img)";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

impl OptionValue for CoreSchedulingMode {
    const EXPECTED: &'static str = "vm or off";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "vm" => Some(Self::Vm),
            "off" => Some(Self::Off),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let size = |text| ByteSize::parse(text).map(|s| s.0);
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("1g"), Some(1 << 30));
        assert_eq!(size("4096"), Some(4096));
        for bad in ["", "M", "-1", "1.5G", "99999999999T", "1Ġ", "+1", "1MM"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn affinity() {
        let affinity = Vec::<CpuAffinity>::parse("[0@[0-2,5],1@[7]]").unwrap();
        assert_eq!((affinity[0].vcpu, &affinity[0].host_cpus[..]), (0, &[0, 1, 2, 5][..]));
        assert_eq!((affinity[1].vcpu, &affinity[1].host_cpus[..]), (1, &[7][..]));
        for bad in [
            "",
            "0@[1]",
            "[0@1]",
            "[0@[]]",
            "[0@[2-1]]",
            "[0@[1024]]",
            "[0@[0-65535]]",
            "[@[1]]",
            "[0@[1]",
        ] {
            assert_eq!(Vec::<CpuAffinity>::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn topology() {
        assert!(CpuTopology::parse("1:2:1:1").is_some());
        for bad in ["", "1:2:1", "1:2:1:1:1", "a:2:1:1", "1::1:1"] {
            assert_eq!(CpuTopology::parse(bad), None, "{bad}");
        }
    }
}
