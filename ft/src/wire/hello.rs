//! The handshake: the primary says who it is and what it runs; the backup takes it or refuses.

use serde::{Deserialize, Serialize};

use crate::config::{FtAudit, FtDurability, FtLimits};
use crate::copies::CopyClaim;
use crate::machine::{DiskIdentity, Identity, Refusal};
use crate::reprotect::Reprotect;

/// First frame of the primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The primary's name in the arbiter.
    pub node: String,
    /// What it runs.
    pub identity: Identity,
    /// Present generation in the arbiter.
    pub generation: u64,
    /// Its arbiter, as `KIND:...`.
    pub arbiter: String,
    /// The store of that arbiter: the backup's must have the same id.
    pub store: String,
    /// A mark that it left in the arbiter: the backup must find it there.
    pub token: String,
    /// Its limits.
    pub limits: FtLimits,
    /// What flushes survive.
    pub durability: FtDurability,
    /// How the VM finds its next backup by itself, if it is to.
    pub reprotect: Option<Reprotect>,
    /// What becomes of a shadow that differs.
    pub audit: FtAudit,
}

/// The backup's answer when it takes the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The backup's name in the arbiter.
    pub node: String,
    /// What its copies of the disks are, in the order of the disks.
    pub copies: Vec<CopyClaim>,
}

/// Two hosts' TSC frequencies may differ by one part in so many: the kernel measures them anew at each boot.
const TSC_TOLERANCE: u32 = 1000;

/// Names every difference that forbids the pairing. `ours` is the shadow's identity.
pub fn compare(offered: &Identity, ours: &Identity) -> Result<(), Refusal> {
    let mut found: Vec<(&str, String)> = Vec::new();
    let mut differ = |code, what: &str, primary: String, backup: String| {
        if primary != backup {
            found.push((code, format!("{what} is {primary} on the primary and {backup} here")));
        }
    };
    let size = |i: &Identity| i.memory.iter().map(|(_, size)| size).sum::<u64>();
    differ(
        "version_mismatch",
        "the VMM version",
        offered.vmm_version.clone(),
        ours.vmm_version.clone(),
    );
    differ(
        "memory_size_mismatch",
        "memory size",
        bytes(size(offered)),
        bytes(size(ours)),
    );
    if size(offered) == size(ours) {
        differ("memory_layout_mismatch", "memory layout", layout(offered), layout(ours));
    }
    differ(
        "vcpus_mismatch",
        "the vCPU count",
        offered.vcpus.to_string(),
        ours.vcpus.to_string(),
    );
    if offered.tsc_khz.abs_diff(ours.tsc_khz) > offered.tsc_khz / TSC_TOLERANCE {
        differ(
            "tsc_mismatch",
            "the TSC frequency",
            khz(offered.tsc_khz),
            khz(ours.tsc_khz),
        );
    }
    let (primary, backup) = features(offered, ours);
    differ("cpu_features_mismatch", "CPU feature word set", primary, backup);
    differ(
        "nics_mismatch",
        "the number of network devices",
        offered.nics.to_string(),
        ours.nics.to_string(),
    );
    differ(
        "disks_mismatch",
        "the number of disks",
        offered.disks.len().to_string(),
        ours.disks.len().to_string(),
    );
    for (theirs, mine) in offered.disks.iter().zip(&ours.disks) {
        differ("disks_mismatch", "a disk's id", theirs.id.clone(), mine.id.clone());
        differ(
            "disk_size_mismatch",
            &format!("size of disk {}", theirs.id),
            bytes(theirs.size),
            bytes(mine.size),
        );
        let access = |disk: &DiskIdentity| {
            let access = match disk {
                DiskIdentity { readonly: true, .. } => "read-only",
                DiskIdentity { shared: Some(_), .. } => "shared",
                _ => "replicated",
            };
            access.to_string()
        };
        differ(
            "disks_mismatch",
            &format!("disk {}", theirs.id),
            access(theirs),
            access(mine),
        );
    }
    let Some((code, _)) = found.first() else { return Ok(()) };
    let code = code.to_string();
    let sentences: Vec<String> = found.into_iter().map(|(_, sentence)| sentence).collect();
    let message = format!("{}; both hosts must offer the VM the same", sentences.join("; "));
    Err(Refusal { code, message })
}

fn bytes(n: u64) -> String {
    if n.is_multiple_of(1 << 20) {
        format!("{} MiB", n >> 20)
    } else {
        format!("{n} bytes")
    }
}

fn khz(n: u32) -> String {
    format!("{n} kHz")
}

fn layout(identity: &Identity) -> String {
    let regions: Vec<String> = identity
        .memory
        .iter()
        .map(|(gpa, size)| format!("{gpa:#x}+{size:#x}"))
        .collect();
    regions.join(" ")
}

/// The feature words that differ, of both sides.
fn features(offered: &Identity, ours: &Identity) -> (String, String) {
    let only = |a: &Identity, b: &Identity| {
        let words = a.cpu_features.iter().filter(|word| !b.cpu_features.contains(word));
        let words: Vec<String> = words.map(|(name, value)| format!("{name} = {value:#x}")).collect();
        if words.is_empty() {
            "without more".to_string()
        } else {
            words.join(", ")
        }
    };
    (only(offered, ours), only(ours, offered))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            vm_id: "vm".into(),
            vmm_version: "1".into(),
            config: "{}".into(),
            memory: vec![(0, 64 << 20)],
            vcpus: 2,
            cpu_features: vec![("leaf 1 ecx".into(), 1), ("leaf 7 ebx".into(), 2)],
            tsc_khz: 1000,
            disks: vec![DiskIdentity {
                id: "_disk0".into(),
                size: 1 << 20,
                readonly: false,
                shared: None,
            }],
            nics: 1,
        }
    }

    #[test]
    fn equal_identities_pair_whatever_their_paths() {
        assert_eq!(
            compare(
                &identity(),
                &Identity {
                    config: "{\"x\":1}".into(),
                    ..identity()
                }
            ),
            Ok(())
        );
    }

    #[test]
    fn each_difference_is_named() {
        let mut other = identity();
        other.vmm_version = "2".into();
        other.memory = vec![(0, 32 << 20)];
        other.vcpus = 1;
        other.tsc_khz = 2000;
        other.cpu_features[1].1 = 3;
        other.nics = 2;
        other.disks[0].size = 2 << 20;
        let refusal = compare(&identity(), &other).unwrap_err();
        assert_eq!(refusal.code, "version_mismatch");
        for part in [
            "the VMM version is 1 on the primary and 2 here",
            "memory size is 64 MiB on the primary and 32 MiB here",
            "the vCPU count is 2 on the primary and 1 here",
            "the TSC frequency is 1000 kHz on the primary and 2000 kHz here",
            "leaf 7 ebx = 0x2 on the primary and leaf 7 ebx = 0x3 here",
            "size of disk _disk0 is 1 MiB on the primary and 2 MiB here",
            "the number of network devices is 1 on the primary and 2 here",
        ] {
            assert!(refusal.message.contains(part), "{part}: {}", refusal.message);
        }
    }

    #[test]
    fn the_code_names_the_only_difference() {
        let cases: [(&str, fn(&mut Identity)); 5] = [
            ("memory_size_mismatch", |i| i.memory[0].1 = 1 << 20),
            ("memory_layout_mismatch", |i| i.memory[0].0 = 4096),
            ("vcpus_mismatch", |i| i.vcpus = 9),
            ("cpu_features_mismatch", |i| drop(i.cpu_features.pop())),
            ("disk_size_mismatch", |i| i.disks[0].size = 512),
        ];
        for (code, change) in cases {
            let mut other = identity();
            change(&mut other);
            assert_eq!(compare(&identity(), &other).unwrap_err().code, code);
        }
    }
}
