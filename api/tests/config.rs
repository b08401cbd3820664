//! Cloud Hypervisor's configurations are understood; what is not offered is refused by name.
#![allow(clippy::unwrap_used)]

use api::VmConfig;
use serde_json::{Value, json};

/// What `vm.info` of Cloud Hypervisor looks like for a VM with one disk and one network device.
fn sample() -> Value {
    json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 2, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46,
            "affinity": null, "features": {"amx": false}, "nested": true, "core_scheduling": "Vm"
        },
        "memory": {
            "size": 1073741824u64, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null,
            "hotplugged_size": null, "shared": true, "hugepages": false, "hugepage_size": null, "prefault": false,
            "reserve": false, "zones": null, "thp": true
        },
        "payload": {
            "firmware": null, "kernel": "/boot/vmlinux", "cmdline": "console=hvc0 root=/dev/vda", "initramfs": null,
            "igvm": null, "host_data": null
        },
        "rate_limit_groups": null,
        "disks": [{
            "path": "/images/root.raw", "readonly": false, "direct": false, "iommu": false, "num_queues": 1,
            "queue_size": 128, "vhost_user": false, "vhost_socket": null, "rate_limit_group": null,
            "rate_limiter_config": null, "id": "_disk0", "disable_io_uring": false, "disable_aio": false,
            "pci_segment": 0, "pci_device_id": null, "serial": null, "queue_affinity": null,
            "backing_files": false, "sparse": true, "image_type": "Raw", "lock_granularity": "ByteRange"
        }],
        "net": [{
            "tap": "", "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "2e:89:a8:e4:b1:0f", "host_mac": null,
            "mtu": null, "iommu": false, "num_queues": 2, "queue_size": 256, "vhost_user": false,
            "vhost_socket": null, "vhost_mode": "Client", "id": "_net1", "fds": null, "rate_limiter_config": null,
            "pci_segment": 0, "pci_device_id": null, "offload_tso": true, "offload_ufo": true, "offload_csum": true
        }],
        "rng": {"src": "/dev/urandom", "iommu": false, "id": null, "pci_segment": 0, "pci_device_id": null},
        "balloon": null, "fs": null, "generic_vhost_user": null, "pmem": null,
        "serial": {"file": null, "mode": "Null", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Tty", "iommu": false, "socket": null},
        "debug_console": {"file": null, "mode": "Off", "iobase": 233},
        "devices": null, "user_devices": null, "vdpa": null, "vsock": null, "pvpanic": false, "iommu": false,
        "sgx_epc": null, "numa": null, "watchdog": false, "rtc": null, "gdb": false, "pci_segments": null,
        "platform": {
            "num_pci_segments": 1, "iommu_segments": null, "iommu_address_width_bits": 64, "serial_number": null,
            "uuid": null, "oem_strings": null, "tdx": false, "sev_snp": false, "iommufd": false, "vfio_p2p_dma": true
        },
        "tpm": null, "preserved_fds": null, "landlock_enable": false, "landlock_rules": null
    })
}

fn read(value: Value) -> VmConfig {
    let mut config: VmConfig = serde_json::from_value(value).unwrap();
    config.fill_in().unwrap();
    config
}

/// The sample with another value at `path`, a JSON pointer.
fn with(path: &str, value: Value) -> Value {
    let mut sample = sample();
    let (parent, field) = path.rsplit_once('/').unwrap();
    sample.pointer_mut(parent).unwrap()[field] = value;
    sample
}

#[test]
fn a_config_of_cloud_hypervisor_is_accepted() {
    let config = read(sample());
    config.validate().unwrap();
    assert_eq!(config.net.as_ref().unwrap()[0].tap, None);
    // And what we print is accepted again, unchanged.
    let printed = serde_json::to_value(&config).unwrap();
    assert_eq!(read(printed), config);
}

#[test]
fn what_is_printed_has_cloud_hypervisors_shape() {
    let printed = serde_json::to_value(read(sample())).unwrap();
    let mut expected = sample();
    // Filled in at creation; and fields that only some versions of Cloud Hypervisor print.
    expected["net"][0]["tap"] = Value::Null;
    expected["rng"]["id"] = "_rng".into();
    expected["console"]["id"] = "_console".into();
    for (parent, fields) in [
        ("", &["sgx_epc", "gdb", "preserved_fds"][..]),
        ("/payload", &["igvm", "host_data"]),
        ("/memory", &["reserve"]),
        ("/disks/0", &["disable_io_uring", "disable_aio", "pci_device_id"]),
        ("/net/0", &["pci_device_id"]),
        ("/rng", &["pci_device_id"]),
    ] {
        let object = expected.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        fields.iter().for_each(|field| drop(object.remove(*field)));
    }
    for (path, value) in flat("", &expected) {
        assert_eq!(printed.pointer(&path), Some(&value), "{path}");
    }
}

fn flat(path: &str, value: &Value) -> Vec<(String, Value)> {
    match value {
        Value::Object(members) => members
            .iter()
            .flat_map(|(k, v)| flat(&format!("{path}/{k}"), v))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .flat_map(|(i, v)| flat(&format!("{path}/{i}"), v))
            .collect(),
        _ => vec![(path.to_string(), value.clone())],
    }
}

#[test]
fn defaults_are_cloud_hypervisors() {
    let config = read(json!({"payload": {"kernel": "/k"}, "disks": [{"path": "/a"}], "net": [{}]}));
    config.validate().unwrap();
    let value = serde_json::to_value(&config).unwrap();
    assert_eq!(value["memory"]["size"], 512 << 20);
    assert_eq!(value["cpus"]["boot_vcpus"], 1);
    assert_eq!(value["serial"]["mode"], "Null");
    assert_eq!(value["console"]["mode"], "Tty");
    assert_eq!(value["rng"]["src"], "/dev/urandom");
    assert_eq!(value["disks"][0]["queue_size"], 128);
    assert_eq!(value["net"][0]["num_queues"], 2);
    assert_eq!(value["net"][0]["offload_tso"], true);
    assert_eq!(value["memory"]["thp"], true);
}

#[test]
fn landlock_rules_are_checked() {
    let mut sample = sample();
    sample["landlock_enable"] = json!(true);
    sample["landlock_rules"] = json!([{"path": "/srv", "access": "rw"}, {"path": "/etc/certs", "access": "r"}]);
    read(sample.clone()).validate().unwrap();
    let reason = |sample: &Value| read(sample.clone()).validate().unwrap_err().to_string();
    sample["landlock_rules"][1]["access"] = json!("x");
    assert!(reason(&sample).contains("landlock_rules[1].access"));
    sample["landlock_rules"][1]["access"] = json!("r");
    sample["landlock_enable"] = json!(false);
    assert!(reason(&sample).contains("landlock_enable"));
}

#[test]
fn everything_that_is_not_offered_is_refused_by_name() {
    let device = json!([{"path": "/x"}]);
    let cases = [
        ("/rate_limit_groups", json!([{"id": "g"}]), "rate_limit_groups"),
        ("/balloon", json!({"size": 1}), "balloon"),
        ("/fs", json!([{"tag": "t"}]), "fs"),
        ("/generic_vhost_user", json!([{"socket": "/s"}]), "generic_vhost_user"),
        ("/pmem", json!([{"file": "/f"}]), "pmem"),
        ("/debug_console", json!({"mode": "Tty", "iobase": 233}), "debug_console"),
        ("/devices", device.clone(), "devices"),
        ("/user_devices", device.clone(), "user_devices"),
        ("/vdpa", device, "vdpa"),
        ("/vsock", json!({"cid": 3, "socket": "/s"}), "vsock"),
        ("/numa", json!([{"guest_numa_id": 0}]), "numa"),
        ("/iommu", json!(true), "iommu"),
        ("/watchdog", json!(true), "watchdog"),
        ("/rtc", json!({"id": "x"}), "rtc"),
        ("/pvpanic", json!(true), "pvpanic"),
        ("/pci_segments", json!([{"pci_segment": 1}]), "pci_segments"),
        ("/tpm", json!({"socket": "/s"}), "tpm"),
        ("/sgx_epc", json!([{"id": "x"}]), "sgx_epc"),
        ("/gdb", json!(true), "gdb"),
        ("/preserved_fds", json!([5]), "preserved_fds"),
        ("/platform/num_pci_segments", json!(2), "platform.num_pci_segments"),
        ("/platform/iommu_segments", json!([1]), "platform.iommu_segments"),
        ("/platform/serial_number", json!("s"), "platform.serial_number"),
        (
            "/platform/system_serial_number",
            json!("s"),
            "platform.system_serial_number",
        ),
        ("/platform/uuid", json!("s"), "platform.uuid"),
        ("/platform/system_uuid", json!("s"), "platform.system_uuid"),
        ("/platform/oem_strings", json!(["s"]), "platform.oem_strings"),
        (
            "/platform/system_manufacturer",
            json!("s"),
            "platform.system_manufacturer",
        ),
        (
            "/platform/system_product_name",
            json!("s"),
            "platform.system_product_name",
        ),
        ("/platform/system_version", json!("s"), "platform.system_version"),
        ("/platform/system_family", json!("s"), "platform.system_family"),
        ("/platform/system_sku_number", json!("s"), "platform.system_sku_number"),
        ("/platform/chassis_asset_tag", json!("s"), "platform.chassis_asset_tag"),
        ("/platform/tdx", json!(true), "platform.tdx"),
        ("/platform/sev_snp", json!(true), "platform.sev_snp"),
        ("/platform/iommufd", json!(true), "platform.iommufd"),
        ("/cpus/kvm_hyperv", json!(true), "cpus.kvm_hyperv"),
        ("/cpus/max_phys_bits", json!(40), "cpus.max_phys_bits"),
        ("/cpus/nested", json!(false), "cpus.nested"),
        ("/cpus/features", json!({"amx": true}), "cpus.features.amx"),
        ("/cpus/core_scheduling", json!("Vcpu"), "cpus.core_scheduling"),
        (
            "/cpus/topology",
            json!({"threads_per_core": 2, "cores_per_die": 1, "dies_per_package": 1, "packages": 1}),
            "cpus.topology.threads_per_core",
        ),
        (
            "/cpus/topology",
            json!({"threads_per_core": 1, "cores_per_die": 1, "dies_per_package": 1, "packages": 2}),
            "cpus.topology.packages",
        ),
        ("/memory/hotplug_size", json!(1 << 30), "memory.hotplug_size"),
        ("/memory/hotplugged_size", json!(1 << 30), "memory.hotplugged_size"),
        ("/memory/reserve", json!(true), "memory.reserve"),
        ("/memory/zones", json!([{"id": "z", "size": 1}]), "memory.zones"),
        ("/payload/firmware", json!("/f"), "payload.firmware"),
        ("/payload/igvm", json!("/f"), "payload.igvm"),
        ("/payload/host_data", json!("x"), "payload.host_data"),
        ("/rng/iommu", json!(true), "rng.iommu"),
        ("/rng/pci_segment", json!(1), "rng.pci_segment"),
        ("/rng/pci_device_id", json!(1), "rng.pci_device_id"),
        ("/disks/0/iommu", json!(true), "disks[0].iommu"),
        ("/disks/0/vhost_user", json!(true), "disks[0].vhost_user"),
        ("/disks/0/vhost_socket", json!("/s"), "disks[0].vhost_socket"),
        (
            "/disks/0/rate_limiter_config",
            json!({"ops": {}}),
            "disks[0].rate_limiter_config",
        ),
        ("/disks/0/rate_limit_group", json!("g"), "disks[0].rate_limit_group"),
        ("/disks/0/pci_segment", json!(1), "disks[0].pci_segment"),
        ("/disks/0/pci_device_id", json!(3), "disks[0].pci_device_id"),
        (
            "/disks/0/queue_affinity",
            json!([{"queue_index": 0}]),
            "disks[0].queue_affinity",
        ),
        ("/disks/0/backing_files", json!(true), "disks[0].backing_files"),
        ("/disks/0/sparse", json!(false), "disks[0].sparse"),
        ("/disks/0/image_type", json!("Vhdx"), "disks[0].image_type"),
        ("/disks/0/image_type", json!("FixedVhd"), "disks[0].image_type"),
        ("/disks/0/lock_granularity", json!("Full"), "disks[0].lock_granularity"),
        ("/disks/0/disable_aio", json!(true), "disks[0].disable_aio"),
        ("/disks/0/num_queues", json!(2), "disks[0].num_queues"),
        ("/net/0/iommu", json!(true), "net[0].iommu"),
        ("/net/0/vhost_user", json!(true), "net[0].vhost_user"),
        ("/net/0/vhost_socket", json!("/s"), "net[0].vhost_socket"),
        ("/net/0/fds", json!([3]), "net[0].fds"),
        (
            "/net/0/rate_limiter_config",
            json!({"ops": {}}),
            "net[0].rate_limiter_config",
        ),
        ("/net/0/pci_segment", json!(1), "net[0].pci_segment"),
        ("/net/0/pci_device_id", json!(3), "net[0].pci_device_id"),
        ("/net/0/num_queues", json!(4), "net[0].num_queues"),
        ("/serial/mode", json!("Pty"), "serial.mode"),
        ("/serial/socket", json!("/s"), "serial.socket"),
        ("/serial/iommu", json!(true), "serial.iommu"),
        ("/console/mode", json!("Socket"), "console.mode"),
        ("/console/pci_segment", json!(1), "console.pci_segment"),
        ("/console/pci_device_id", json!(1), "console.pci_device_id"),
    ];
    for (path, value, field) in cases {
        let config = read(with(path, value));
        let problems = config.validate().expect_err(path).problems;
        let fields: Vec<&str> = problems.iter().map(|p| p.field.as_str()).collect();
        assert!(fields.contains(&field), "{path}: {problems:?}");
        let problem = problems.iter().find(|p| p.field == field).unwrap();
        let helps = ["supported", "must be"]
            .iter()
            .any(|word| problem.reason.contains(word));
        assert!(helps, "{path}: {}", problem.reason);
    }
}

#[test]
fn qcow2_disks_may_have_backing_files() {
    let mut config = read(with("/disks/0/image_type", json!("Qcow2")));
    config.validate().unwrap();
    config.disks.as_mut().unwrap()[0].backing_files = true;
    config.validate().unwrap();
}

#[test]
fn fields_that_nobody_knows_are_refused() {
    for path in [
        "/x",
        "/cpus/x",
        "/memory/x",
        "/payload/x",
        "/disks/0/x",
        "/net/0/x",
        "/rng/x",
        "/serial/x",
        "/platform/x",
    ] {
        let error = serde_json::from_value::<VmConfig>(with(path, json!(null)))
            .expect_err(path)
            .to_string();
        assert!(error.contains("unknown field `x`, expected"), "{path}: {error}");
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    for (path, value, field) in [
        ("/cpus/boot_vcpus", json!(0), "cpus.boot_vcpus"),
        ("/cpus/max_vcpus", json!(1), "cpus.max_vcpus"),
        (
            "/cpus/affinity",
            json!([{"vcpu": 2, "host_cpus": [1]}]),
            "cpus.affinity",
        ),
        ("/cpus/affinity", json!([{"vcpu": 0, "host_cpus": []}]), "cpus.affinity"),
        (
            "/cpus/affinity",
            json!([{"vcpu": 0, "host_cpus": [1024]}]),
            "cpus.affinity",
        ),
        (
            "/cpus/affinity",
            json!([{"vcpu": 1, "host_cpus": [0]}, {"vcpu": 1, "host_cpus": [1]}]),
            "cpus.affinity",
        ),
        ("/memory/size", json!(0), "memory.size"),
        ("/memory/size", json!((1u64 << 30) + 1), "memory.size"),
        ("/memory/size", json!(u64::MAX), "memory.size"),
        ("/memory/hugepage_size", json!(2 << 20), "memory.hugepage_size"),
        ("/payload/kernel", json!(null), "payload.kernel"),
        ("/payload", json!(null), "payload.kernel"),
        ("/payload/cmdline", json!("a\0b"), "payload.cmdline"),
        ("/disks/0/path", json!(null), "disks[0].path"),
        ("/disks/0/path", json!(""), "disks[0].path"),
        ("/disks/0/queue_size", json!(100), "disks[0].queue_size"),
        ("/disks/0/queue_size", json!(0), "disks[0].queue_size"),
        ("/disks/0/serial", json!("123456789012345678901"), "disks[0].serial"),
        ("/disks/0/id", json!("_net1"), "id"),
        ("/net/0/tap", json!("a-name-that-is-too-long"), "net[0].tap"),
        ("/net/0/mac", json!("01:00:5e:00:00:01"), "net[0].mac"),
        ("/net/0/mtu", json!(10), "net[0].mtu"),
        ("/net/0/mask", json!("ffff::"), "net[0].mask"),
        ("/serial/mode", json!("Tty"), "console.mode"),
        ("/serial/mode", json!("File"), "serial.file"),
        ("/rng/src", json!(""), "rng.src"),
    ] {
        let problems = read(with(path, value)).validate().expect_err(path).problems;
        assert!(problems.iter().any(|p| p.field == field), "{path}: {problems:?}");
    }
    for (path, value) in [
        ("/net/0/mac", json!("zz:00:00:00:00:00")),
        ("/net/0/mac", json!("00:00:00:00:00")),
        ("/net/0/ip", json!("300.1.1.1")),
        ("/cpus/boot_vcpus", json!(256)),
        ("/memory/size", json!(-1)),
        ("/serial/mode", json!("Modem")),
    ] {
        assert!(serde_json::from_value::<VmConfig>(with(path, value)).is_err(), "{path}");
    }
}

#[test]
fn ids_count_in_the_order_of_creation_and_macs_stay() {
    let mut config = read(json!({
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/a"}, {"path": "/b", "id": "data"}, {"path": "/c"}],
        "net": [{"id": "_net2"}, {}, {}]
    }));
    config.validate().unwrap();
    let disks: Vec<_> = config.disks.iter().flatten().map(|d| d.id.clone().unwrap()).collect();
    assert_eq!(disks, ["_disk0", "data", "_disk1"]);
    let nets: Vec<_> = config.net.iter().flatten().map(|n| n.id.clone().unwrap()).collect();
    assert_eq!(nets, ["_net2", "_net3", "_net4"]);
    let macs: Vec<_> = config.net.iter().flatten().map(|n| n.mac.unwrap()).collect();
    assert!(macs.iter().all(|m| m.bytes()[0] & 3 == 2), "{macs:?}");
    assert_ne!(macs[0], macs[1]);
    let before = config.clone();
    config.fill_in().unwrap();
    assert_eq!(before, config);
}
