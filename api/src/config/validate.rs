//! The checks of a configuration. All problems are found in one go and each names its field.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

use super::{
    ConsoleConfig, ConsoleMode, CoreSchedulingMode, DiskConfig, ImageType, LockGranularity, MAX_HOST_CPUS, NetConfig,
    Refused, VmConfig,
};

/// Parts of `VmConfig` that this VMM offers.
const SUPPORTED: &str = "cpus, memory, payload (kernel, cmdline, initramfs), disks, net, rng, serial, console, \
    landlock_enable, landlock_rules";
const SUPPORTED_CPUS: &str =
    "boot_vcpus, max_vcpus, topology (1 thread per core, 1 die per package, 1 package), affinity";
const SUPPORTED_MEMORY: &str = "size, mergeable, shared, hugepages, hugepage_size, prefault, thp";
const SUPPORTED_DISK: &str = "path, readonly, direct, queue_size, id, serial, image_type (Raw, Qcow2), \
    backing_files, disable_io_uring";
const SUPPORTED_NET: &str = "tap, ip, mask, mac, host_mac, mtu, queue_size, id, offload_tso, offload_ufo, offload_csum";
const SUPPORTED_CONSOLE: &str = "mode (Off, Null, Tty, File), file";
/// Most vCPUs of a VM: ids of the xAPIC.
const MAX_VCPUS: u8 = 254;
/// Longest serial number of a virtio block device.
const MAX_SERIAL: usize = 20;

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field, for example `disks[0].path`.
    pub field: String,
    /// What is wrong and what to do.
    pub reason: String,
}

/// A configuration that cannot be used, with all reasons.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct ConfigError {
    /// Never empty.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the VM configuration cannot be used: ")?;
        for (i, problem) in self.problems.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", problem.field, problem.reason)?;
        }
        Ok(())
    }
}

/// Collects problems under a path such as `disks[0].`.
struct Check<'a> {
    problems: &'a mut Vec<Problem>,
    path: String,
    supported: &'static str,
}

impl Check<'_> {
    fn problem(&mut self, field: &str, reason: impl Into<String>) {
        self.problems.push(Problem {
            field: format!("{}{field}", self.path),
            reason: reason.into(),
        });
    }

    fn require(&mut self, ok: bool, field: &str, reason: &str) {
        if !ok {
            self.problem(field, reason);
        }
    }

    /// `field` asks for something that is not offered, unless `neutral`.
    fn offered(&mut self, neutral: bool, field: &str) {
        if !neutral {
            let supported = self.supported;
            self.problem(field, format!("not supported by this VMM; supported here: {supported}"));
        }
    }

    fn all_neutral(&mut self, parts: &[(&str, &Refused)]) {
        for (field, part) in parts {
            self.offered(part.is_neutral(), field);
        }
    }

    fn all_off(&mut self, parts: &[(&str, bool)]) {
        for (field, on) in parts {
            self.offered(!on, field);
        }
    }
}

impl VmConfig {
    /// Checks everything that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let mut part = |path: String, supported, check: &mut dyn FnMut(&mut Check<'_>)| {
            check(&mut Check {
                problems: &mut problems,
                path,
                supported,
            });
        };
        part(String::new(), SUPPORTED, &mut |c| self.check_top(c));
        part("cpus.".into(), SUPPORTED_CPUS, &mut |c| self.check_cpus(c));
        part("memory.".into(), SUPPORTED_MEMORY, &mut |c| self.check_memory(c));
        part("payload.".into(), "kernel, cmdline, initramfs", &mut |c| {
            self.check_payload(c)
        });
        part("platform.".into(), "only its neutral values", &mut |c| {
            self.check_platform(c)
        });
        part("rng.".into(), "src, id", &mut |c| {
            c.require(
                !self.rng.src.as_os_str().is_empty(),
                "src",
                "must be a path, for example /dev/urandom",
            );
            c.offered(!self.rng.iommu, "iommu");
            c.offered(self.rng.pci_segment == 0, "pci_segment");
            c.offered(self.rng.pci_device_id.is_neutral(), "pci_device_id");
        });
        for (i, disk) in self.disks.iter().flatten().enumerate() {
            part(format!("disks[{i}]."), SUPPORTED_DISK, &mut |c| check_disk(disk, c));
        }
        for (i, net) in self.net.iter().flatten().enumerate() {
            part(format!("net[{i}]."), SUPPORTED_NET, &mut |c| check_net(net, c));
        }
        for (i, rule) in self.landlock_rules.iter().flatten().enumerate() {
            part(format!("landlock_rules[{i}]."), "path, access", &mut |c| {
                c.require(!rule.path.as_os_str().is_empty(), "path", "must be a path");
                let known = ["r", "w", "rw", "wr"].contains(&rule.access.as_str());
                c.require(known, "access", "must be r, w or rw");
                c.require(self.landlock_enable, "path", "has no effect without landlock_enable");
            });
        }
        part("serial.".into(), SUPPORTED_CONSOLE, &mut |c| {
            check_console(&self.serial, c)
        });
        part("console.".into(), SUPPORTED_CONSOLE, &mut |c| {
            check_console(&self.console, c)
        });
        part(String::new(), SUPPORTED, &mut |c| self.check_together(c));
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ConfigError { problems })
        }
    }

    fn check_top(&self, c: &mut Check<'_>) {
        c.all_neutral(&[
            ("rate_limit_groups", &self.rate_limit_groups),
            ("balloon", &self.balloon),
            ("fs", &self.fs),
            ("generic_vhost_user", &self.generic_vhost_user),
            ("pmem", &self.pmem),
            ("devices", &self.devices),
            ("user_devices", &self.user_devices),
            ("vdpa", &self.vdpa),
            ("vsock", &self.vsock),
            ("numa", &self.numa),
            ("rtc", &self.rtc),
            ("pci_segments", &self.pci_segments),
            ("tpm", &self.tpm),
            ("sgx_epc", &self.sgx_epc),
            ("preserved_fds", &self.preserved_fds),
        ]);
        c.all_off(&[
            ("iommu", self.iommu),
            ("watchdog", self.watchdog),
            ("pvpanic", self.pvpanic),
            ("gdb", self.gdb),
        ]);
        let debug_off = self.debug_console.as_ref().is_none_or(|d| d.mode == ConsoleMode::Off);
        c.offered(debug_off, "debug_console");
    }

    fn check_cpus(&self, c: &mut Check<'_>) {
        let cpus = &self.cpus;
        let count = format!("must be 1 to {MAX_VCPUS}");
        c.require((1..=MAX_VCPUS).contains(&cpus.boot_vcpus), "boot_vcpus", &count);
        c.require(
            cpus.max_vcpus >= cpus.boot_vcpus,
            "max_vcpus",
            "must not be less than boot_vcpus",
        );
        c.offered(cpus.max_phys_bits == super::cpus::DEFAULT_PHYS_BITS, "max_phys_bits");
        c.offered(cpus.nested, "nested");
        if let Some(t) = &cpus.topology {
            let parts = [t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages];
            let product: u64 = parts.into_iter().map(u64::from).product();
            c.require(
                product == u64::from(cpus.max_vcpus),
                "topology",
                "the product of its fields must be max_vcpus",
            );
            c.offered(t.threads_per_core == 1, "topology.threads_per_core");
            c.offered(t.dies_per_package == 1, "topology.dies_per_package");
            c.offered(t.packages == 1, "topology.packages");
        }
        c.offered(!cpus.kvm_hyperv, "kvm_hyperv");
        let affinity = cpus.affinity.as_deref().unwrap_or_default();
        for (i, a) in affinity.iter().enumerate() {
            c.require(
                a.vcpu < cpus.boot_vcpus && affinity[..i].iter().all(|other| other.vcpu != a.vcpu),
                "affinity",
                "each vcpu must be below boot_vcpus and named once",
            );
            c.require(
                !a.host_cpus.is_empty() && a.host_cpus.iter().all(|cpu| *cpu < MAX_HOST_CPUS),
                "affinity",
                "host_cpus must have at least one number, and none above 1023",
            );
        }
        c.offered(!cpus.features.amx, "features.amx");
        c.offered(cpus.core_scheduling != CoreSchedulingMode::Vcpu, "core_scheduling");
    }

    fn check_memory(&self, c: &mut Check<'_>) {
        let memory = &self.memory;
        let unit = if memory.hugepages {
            memory.hugepage_size.unwrap_or(2 << 20)
        } else {
            4 << 10
        };
        c.require(
            memory.size >= 2 << 20 && memory.size <= 8 << 40,
            "size",
            "must be 2 MiB to 8 TiB, in bytes (or set the sum of zones: not supported)",
        );
        if memory.hugepage_size.is_some() && !memory.hugepages {
            c.problem("hugepage_size", "needs hugepages to be on");
        } else if !unit.is_power_of_two() || unit < 4 << 10 {
            c.problem(
                "hugepage_size",
                "must be a power of two, in bytes (2 MiB and 1 GiB are usual)",
            );
        } else if !memory.size.is_multiple_of(unit) {
            c.problem("size", format!("must be a multiple of the page size, {unit} bytes"));
        }
        c.offered(memory.hotplug_size.unwrap_or(0) == 0, "hotplug_size");
        c.offered(memory.hotplugged_size.unwrap_or(0) == 0, "hotplugged_size");
        c.offered(!memory.reserve, "reserve");
        c.offered(memory.zones.is_neutral(), "zones");
    }

    fn check_payload(&self, c: &mut Check<'_>) {
        let Some(payload) = &self.payload else {
            c.problem("kernel", "missing: a PVH ELF vmlinux or a bzImage");
            return;
        };
        c.all_neutral(&[
            ("firmware", &payload.firmware),
            ("igvm", &payload.igvm),
            ("host_data", &payload.host_data),
        ]);
        let kernel = payload.kernel.as_ref().is_some_and(|k| !k.as_os_str().is_empty());
        c.require(kernel, "kernel", "missing: a PVH ELF vmlinux or a bzImage");
        let initramfs = payload.initramfs.as_ref().is_none_or(|i| !i.as_os_str().is_empty());
        c.require(initramfs, "initramfs", "must not be an empty path");
        let nul = payload.cmdline.as_ref().is_some_and(|text| text.contains('\0'));
        c.require(!nul, "cmdline", "must not contain a zero byte");
    }

    fn check_platform(&self, c: &mut Check<'_>) {
        let Some(p) = &self.platform else { return };
        c.offered(p.num_pci_segments == 1, "num_pci_segments");
        c.all_neutral(&[
            ("iommu_segments", &p.iommu_segments),
            ("system_serial_number", &p.system_serial_number),
            ("serial_number", &p.serial_number),
            ("system_uuid", &p.system_uuid),
            ("uuid", &p.uuid),
            ("oem_strings", &p.oem_strings),
            ("system_manufacturer", &p.system_manufacturer),
            ("system_product_name", &p.system_product_name),
            ("system_version", &p.system_version),
            ("system_family", &p.system_family),
            ("system_sku_number", &p.system_sku_number),
            ("chassis_asset_tag", &p.chassis_asset_tag),
        ]);
        c.all_off(&[("tdx", p.tdx), ("sev_snp", p.sev_snp), ("iommufd", p.iommufd)]);
    }

    /// What concerns several devices: ids, taps and the terminal can be had once.
    fn check_together(&self, c: &mut Check<'_>) {
        let mut seen = BTreeSet::new();
        for id in self.device_ids() {
            c.require(!id.is_empty(), "id", "a device id must not be empty");
            if !seen.insert(id) {
                c.problem("id", format!("{id:?} names two devices: ids must be unique"));
            }
        }
        let mut taps = BTreeSet::new();
        for tap in self
            .net
            .iter()
            .flatten()
            .filter_map(|n| n.tap.as_deref())
            .filter(|t| !t.is_empty())
        {
            if !taps.insert(tap) {
                c.problem(
                    "net",
                    format!("tap {tap:?} is named twice: each network device needs its own"),
                );
            }
        }
        let mut macs = BTreeSet::new();
        for mac in self.net.iter().flatten().filter_map(|n| n.mac) {
            if !macs.insert(mac.bytes()) {
                c.problem(
                    "net",
                    format!("MAC address {mac} is given twice: each network device needs its own"),
                );
            }
        }
        if self.serial.mode == ConsoleMode::Tty && self.console.mode == ConsoleMode::Tty {
            c.problem(
                "console.mode",
                "serial and console cannot both be Tty: set one of them to Off, Null or File",
            );
        }
        let file = |console: &ConsoleConfig| {
            (console.mode == ConsoleMode::File)
                .then(|| console.file.clone())
                .flatten()
        };
        if let (Some(serial), Some(console)) = (file(&self.serial), file(&self.console))
            && serial == console
        {
            c.problem("console.file", "serial and console need a file each");
        }
    }
}

fn check_disk(disk: &DiskConfig, c: &mut Check<'_>) {
    let path = disk.path.as_ref().is_some_and(|p| !p.as_os_str().is_empty());
    c.require(path, "path", "missing: an image file or a block device of the host");
    c.require(disk.num_queues == 1, "num_queues", "must be 1");
    check_queue_size(disk.queue_size, c);
    if let Some(serial) = &disk.serial {
        c.require(serial.len() <= MAX_SERIAL, "serial", "must not be longer than 20 bytes");
    }
    c.require(
        !matches!(disk.image_type, Some(ImageType::FixedVhd | ImageType::Vhdx)),
        "image_type",
        "only Raw and Qcow2 are supported: convert the image (qemu-img convert -O qcow2)",
    );
    c.require(
        !disk.backing_files || disk.image_type == Some(ImageType::Qcow2),
        "backing_files",
        "supported only with image_type Qcow2",
    );
    c.offered(disk.lock_granularity == LockGranularity::ByteRange, "lock_granularity");
    c.offered(disk.sparse, "sparse");
    c.offered(disk.pci_segment == 0, "pci_segment");
    c.all_neutral(&[
        ("vhost_socket", &disk.vhost_socket),
        ("rate_limit_group", &disk.rate_limit_group),
        ("rate_limiter_config", &disk.rate_limiter_config),
        ("pci_device_id", &disk.pci_device_id),
        ("queue_affinity", &disk.queue_affinity),
    ]);
    c.all_off(&[
        ("iommu", disk.iommu),
        ("vhost_user", disk.vhost_user),
        ("disable_aio", disk.disable_aio),
    ]);
}

fn check_net(net: &NetConfig, c: &mut Check<'_>) {
    c.require(
        net.num_queues == 2,
        "num_queues",
        "must be 2: one receive and one transmit queue",
    );
    check_queue_size(net.queue_size, c);
    if let Some(tap) = net.tap.as_deref() {
        let name = tap.len() < 16 && !tap.contains(['/', ':']) && !tap.chars().any(char::is_whitespace);
        c.require(name, "tap", "must be an interface name of up to 15 bytes");
    }
    for (field, mac) in [("mac", net.mac), ("host_mac", net.host_mac)] {
        c.require(
            !mac.is_some_and(|m| m.is_multicast()),
            field,
            "must not be a group (multicast) address",
        );
    }
    if let Some(mtu) = net.mtu {
        c.require((1280..=65535).contains(&mtu), "mtu", "must be 1280 to 65535");
    }
    if let (Some(ip), Some(mask)) = (net.ip, net.mask) {
        c.require(
            ip.is_ipv4() == mask.is_ipv4(),
            "mask",
            "must be of the same kind as ip (IPv4 or IPv6)",
        );
    }
    c.require(net.mask.is_none() || net.ip.is_some(), "mask", "needs ip");
    c.offered(net.pci_segment == 0, "pci_segment");
    c.all_neutral(&[
        ("vhost_socket", &net.vhost_socket),
        ("fds", &net.fds),
        ("rate_limiter_config", &net.rate_limiter_config),
        ("pci_device_id", &net.pci_device_id),
    ]);
    c.all_off(&[("iommu", net.iommu), ("vhost_user", net.vhost_user)]);
}

fn check_queue_size(size: u16, c: &mut Check<'_>) {
    let ok = size.is_power_of_two() && (16..=1024).contains(&size);
    c.require(ok, "queue_size", "must be a power of two, 16 to 1024");
}

fn check_console(console: &ConsoleConfig, c: &mut Check<'_>) {
    let mode = matches!(
        console.mode,
        ConsoleMode::Off | ConsoleMode::Null | ConsoleMode::Tty | ConsoleMode::File
    );
    c.offered(mode, "mode");
    if console.mode == ConsoleMode::File {
        let file = console.file.as_ref().is_some_and(|f| !f.as_os_str().is_empty());
        c.require(file, "file", "missing: mode File needs the path of the output file");
    }
    c.offered(!console.iommu, "iommu");
    c.offered(console.socket.is_neutral(), "socket");
    c.offered(console.pci_segment == 0, "pci_segment");
    c.offered(console.pci_device_id.is_neutral(), "pci_device_id");
}
