//! CPUID of each vCPU: what the hypervisor offers, with the topology of this VM (one socket, one thread per core).

use hypervisor::CpuIdEntry;

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf has subleaves.
const INDEXED: u32 = 1;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_TIMING: u32 = 0x4000_0010;
/// Frequency of KVM's local APIC timer in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Virtualization within the guest, Intel's and AMD's: not offered, for its state is in no checkpoint and no snapshot.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
/// Mirrors of CR4 bits, which are not features.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

fn find(entries: &[CpuIdEntry], function: u32, index: u32) -> Option<&CpuIdEntry> {
    entries
        .iter()
        .find(|e| e.function == function && (e.index == index || e.flags & INDEXED == 0))
}

fn entry(function: u32, index: u32, flags: u32, regs: [u32; 4]) -> CpuIdEntry {
    let [eax, ebx, ecx, edx] = regs;
    CpuIdEntry {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Guest physical address bits that the hypervisor offers; 36 when it does not say.
pub fn physical_bits(entries: &[CpuIdEntry]) -> u8 {
    find(entries, 0x8000_0008, 0)
        .map(|e| e.eax as u8)
        .filter(|b| (32..=57).contains(b))
        .unwrap_or(36)
}

fn is_amd(entries: &[CpuIdEntry]) -> bool {
    // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine.
    find(entries, 0, 0).is_some_and(|e| e.ebx == 0x6874_7541 || e.ebx == 0x6f67_7948)
}

/// The leaves of the vCPU with APIC id `apic_id` out of `vcpus`, from what the hypervisor supports. `tsc_khz`: the
/// guest's TSC frequency, told in leaf 0x4000_0010.
pub fn guest_cpuid(supported: &[CpuIdEntry], apic_id: u8, vcpus: u8, tsc_khz: Option<u32>) -> Vec<CpuIdEntry> {
    let id = u32::from(apic_id);
    let count = u32::from(vcpus.max(1));
    let slots = count.next_power_of_two();
    let shift = slots.trailing_zeros();
    let amd = is_amd(supported);
    let max_basic = find(supported, 0, 0).map_or(0, |e| e.eax);
    let mut leaves: Vec<CpuIdEntry> = supported
        .iter()
        .filter(|e| !matches!(e.function, 0xb | 0x1f | KVM_TIMING))
        .copied()
        .collect();
    for leaf in &mut leaves {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | slots.min(255) << 16 | id << 24;
                leaf.ecx &= !VMX;
                leaf.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
                leaf.edx = if count > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
            }
            4 if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { slots - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (slots - 1).min(63) << 26;
            }
            0x8000_0001 => leaf.ecx &= !SVM,
            0x8000_0008 if amd => leaf.ecx = (count - 1) | shift << 12,
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { slots - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => {
                leaf.eax = id;
                leaf.ebx = id & 0xff;
                leaf.ecx = 0;
            }
            KVM_SIGNATURE if tsc_khz.is_some() => leaf.eax = leaf.eax.max(KVM_TIMING),
            _ => {}
        }
    }
    for function in [0xb, 0x1f] {
        if max_basic >= function {
            // Level types: 1 = thread, 2 = core (Intel SDM 2A, CPUID).
            leaves.push(entry(function, 0, INDEXED, [0, 1, 1 << 8, id]));
            leaves.push(entry(function, 1, INDEXED, [shift, count, 2 << 8 | 1, id]));
            leaves.push(entry(function, 2, INDEXED, [0, 0, 2, id]));
        }
    }
    if let (Some(khz), Some(_)) = (tsc_khz, find(supported, KVM_SIGNATURE, 0)) {
        leaves.push(entry(KVM_TIMING, 0, 0, [khz, APIC_BUS_KHZ, 0, 0]));
    }
    leaves
}

/// Named words of the features that a guest may have found; two hosts whose words differ cannot take over each
/// other's VMs. Absent leaves are 0.
pub fn feature_words(entries: &[CpuIdEntry]) -> Vec<(String, u32)> {
    let leaf = |function, index| find(entries, function, index).copied().unwrap_or_default();
    let vendor = leaf(0, 0);
    let basic = leaf(1, 0);
    let seven = leaf(7, 0);
    let seven_1 = leaf(7, 1);
    let xsave = leaf(0xd, 0);
    let xsave_1 = leaf(0xd, 1);
    let extended = leaf(0x8000_0001, 0);
    let sizes = leaf(0x8000_0008, 0);
    [
        ("vendor.ebx", vendor.ebx),
        ("vendor.edx", vendor.edx),
        ("vendor.ecx", vendor.ecx),
        ("0x1.ecx", basic.ecx & !OSXSAVE),
        ("0x1.edx", basic.edx),
        ("0x7.0.ebx", seven.ebx),
        ("0x7.0.ecx", seven.ecx & !OSPKE),
        ("0x7.0.edx", seven.edx),
        ("0x7.1.eax", seven_1.eax),
        ("0x7.1.edx", seven_1.edx),
        ("0xd.0.eax", xsave.eax),
        ("0xd.0.edx", xsave.edx),
        ("0xd.1.eax", xsave_1.eax),
        ("0x4000_0001.eax", leaf(0x4000_0001, 0).eax),
        ("0x8000_0001.ecx", extended.ecx),
        ("0x8000_0001.edx", extended.edx),
        ("0x8000_0007.edx", leaf(0x8000_0007, 0).edx),
        ("0x8000_0008.eax", sizes.eax),
        ("0x8000_0008.ebx", sizes.ebx),
        ("0x8000_0021.eax", leaf(0x8000_0021, 0).eax),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<CpuIdEntry> {
        vec![
            entry(0, 0, 0, [0x1f, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(1, 0, 0, [0, 0x0700_0800, OSXSAVE | VMX, HTT]),
            entry(4, 3, INDEXED, [0x3 << 5 | 3, 0, 0, 0]),
            entry(0xb, 0, INDEXED, [1, 2, 0x100, 77]),
            entry(KVM_SIGNATURE, 0, 0, [0x4000_0001, 0, 0, 0]),
            entry(0x8000_0008, 0, 0, [0x3028, 0, 0xf00f, 0]),
            entry(0x8000_0001, 0, 0, [0, 0, SVM | 1, 0]),
        ]
    }

    #[test]
    fn topology_is_this_vms() {
        for vcpus in [1u8, 2, 3, 255] {
            let guest = guest_cpuid(&host(), vcpus - 1, vcpus, Some(3_000_000));
            let one = find(&guest, 1, 0).unwrap();
            assert_eq!(one.ebx >> 24, u32::from(vcpus - 1));
            assert_eq!(
                one.ecx & (HYPERVISOR | X2APIC | TSC_DEADLINE),
                HYPERVISOR | X2APIC | TSC_DEADLINE
            );
            assert_eq!(one.edx & HTT != 0, vcpus > 1);
            for function in [0xb, 0x1f] {
                assert_eq!(guest.iter().filter(|e| e.function == function).count(), 3);
                let cores = find(&guest, function, 1).unwrap();
                assert_eq!((cores.ebx, cores.edx), (u32::from(vcpus), u32::from(vcpus - 1)));
                assert!(1u32 << cores.eax >= u32::from(vcpus));
            }
            assert_eq!(find(&guest, 0x8000_0008, 0).unwrap().ecx & 0xff, u32::from(vcpus - 1));
            assert_eq!(find(&guest, KVM_TIMING, 0).unwrap().eax, 3_000_000);
            assert_eq!(find(&guest, KVM_SIGNATURE, 0).unwrap().eax, KVM_TIMING);
        }
        assert_eq!(physical_bits(&host()), 40);
    }

    #[test]
    fn a_guest_is_offered_no_virtualization_of_its_own() {
        let guest = guest_cpuid(&host(), 0, 1, None);
        assert_eq!(find(&guest, 1, 0).unwrap().ecx & (VMX | OSXSAVE), OSXSAVE);
        assert_eq!(find(&guest, 0x8000_0001, 0).unwrap().ecx, 1);
    }

    #[test]
    fn feature_words_ignore_the_vcpu_and_see_a_missing_feature() {
        let words = |id| feature_words(&guest_cpuid(&host(), id, 2, None));
        assert_eq!(words(0), words(1));
        let mut poorer = host();
        poorer[1].edx &= !HTT;
        poorer[5].eax = 0x3027;
        let other = feature_words(&guest_cpuid(&poorer, 0, 2, None));
        let differing: Vec<_> = words(0)
            .into_iter()
            .zip(other)
            .filter(|(a, b)| a != b)
            .map(|(a, _)| a.0)
            .collect();
        assert_eq!(differing, vec!["0x8000_0008.eax"]);
    }
}
