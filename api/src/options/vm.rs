//! The options that describe a VM: `--cpus`, `--memory`, `--disk`, `--net`, `--rng`, `--serial`, `--console`,
//! `--landlock-rules`.
//!
//! They only read; [`crate::VmConfig::validate`] checks the whole.

use super::{ByteSize, OptionError, Options};
use crate::config::{
    ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, LandlockConfig, MemoryConfig, NetConfig, RngConfig,
};

impl CpusConfig {
    /// `--cpus boot=2,max=2`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[&str] = &["boot", "max", "topology", "affinity", "core_scheduling"];
        let mut options = Options::parse("--cpus", KEYS, text)?;
        let mut cpus = Self::default();
        options.set("boot", &mut cpus.boot_vcpus)?;
        cpus.max_vcpus = options.take("max")?.unwrap_or(cpus.boot_vcpus);
        options.set_some("topology", &mut cpus.topology)?;
        options.set_some("affinity", &mut cpus.affinity)?;
        options.set("core_scheduling", &mut cpus.core_scheduling)?;
        Ok(cpus)
    }
}

impl MemoryConfig {
    /// `--memory size=1G,shared=on`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[&str] = &[
            "size",
            "mergeable",
            "shared",
            "hugepages",
            "hugepage_size",
            "prefault",
            "thp",
        ];
        let mut options = Options::parse("--memory", KEYS, text)?;
        let mut memory = Self::default();
        if let Some(ByteSize(size)) = options.take("size")? {
            memory.size = size;
        }
        options.set("mergeable", &mut memory.mergeable)?;
        options.set("shared", &mut memory.shared)?;
        options.set("hugepages", &mut memory.hugepages)?;
        memory.hugepage_size = options.take("hugepage_size")?.map(|ByteSize(size)| size);
        options.set("prefault", &mut memory.prefault)?;
        options.set("thp", &mut memory.thp)?;
        Ok(memory)
    }
}

impl DiskConfig {
    /// `--disk path=/a.img,readonly=on`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[&str] = &[
            "path",
            "readonly",
            "direct",
            "serial",
            "id",
            "num_queues",
            "queue_size",
            "image_type",
            "backing_files",
        ];
        let mut options = Options::parse("--disk", KEYS, text)?;
        let mut disk = Self {
            path: Some(options.need("path")?),
            ..Self::default()
        };
        options.set("readonly", &mut disk.readonly)?;
        options.set("direct", &mut disk.direct)?;
        options.set_some("serial", &mut disk.serial)?;
        options.set_some("id", &mut disk.id)?;
        options.set("num_queues", &mut disk.num_queues)?;
        options.set("queue_size", &mut disk.queue_size)?;
        options.set_some("image_type", &mut disk.image_type)?;
        options.set("backing_files", &mut disk.backing_files)?;
        Ok(disk)
    }
}

impl NetConfig {
    /// `--net tap=tap0,mac=52:54:00:12:34:56`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[&str] = &[
            "tap",
            "ip",
            "mask",
            "mac",
            "host_mac",
            "mtu",
            "id",
            "num_queues",
            "queue_size",
            "offload_tso",
            "offload_ufo",
            "offload_csum",
        ];
        let mut options = Options::parse("--net", KEYS, text)?;
        let mut net = Self::default();
        options.set_some("tap", &mut net.tap)?;
        options.set_some("ip", &mut net.ip)?;
        options.set_some("mask", &mut net.mask)?;
        options.set_some("mac", &mut net.mac)?;
        options.set_some("host_mac", &mut net.host_mac)?;
        options.set_some("mtu", &mut net.mtu)?;
        options.set_some("id", &mut net.id)?;
        options.set("num_queues", &mut net.num_queues)?;
        options.set("queue_size", &mut net.queue_size)?;
        options.set("offload_tso", &mut net.offload_tso)?;
        options.set("offload_ufo", &mut net.offload_ufo)?;
        options.set("offload_csum", &mut net.offload_csum)?;
        Ok(net)
    }
}

impl LandlockConfig {
    /// `--landlock-rules path=/srv/snapshots,access=rw`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Options::parse("--landlock-rules", &["path", "access"], text)?;
        Ok(Self {
            path: options.need("path")?,
            access: options.need("access")?,
        })
    }
}

impl RngConfig {
    /// `--rng src=/dev/urandom`
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Options::parse("--rng", &["src", "id"], text)?;
        let mut rng = Self::default();
        options.set("src", &mut rng.src)?;
        options.set_some("id", &mut rng.id)?;
        Ok(rng)
    }
}

impl ConsoleConfig {
    /// `off`, `null`, `tty` or `file=PATH`, for `option` `--serial` or `--console`.
    pub fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        const EXPECTED: &str = "off, null, tty or file=PATH";
        let error = |reason: String| OptionError { option, reason };
        let (mode, file) = match text {
            "off" => (ConsoleMode::Off, None),
            "null" => (ConsoleMode::Null, None),
            "tty" => (ConsoleMode::Tty, None),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => (ConsoleMode::File, Some(path.trim_matches('"').into())),
                _ => return Err(error(format!("{text:?} is not supported; supported: {EXPECTED}"))),
            },
        };
        Ok(Self {
            mode,
            file,
            ..Self::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_usual_options() {
        let cpus = CpusConfig::parse("boot=2").unwrap();
        assert_eq!((cpus.boot_vcpus, cpus.max_vcpus), (2, 2));
        let memory = MemoryConfig::parse("size=1G,hugepages=on,hugepage_size=2M,thp=off").unwrap();
        assert_eq!(
            (memory.size, memory.hugepage_size, memory.thp),
            (1 << 30, Some(2 << 20), false)
        );
        let disk = DiskConfig::parse("path=/a,readonly=on,serial=x").unwrap();
        assert_eq!(disk.path.as_deref(), Some(std::path::Path::new("/a")));
        assert!(disk.readonly && !disk.direct);
        let disk = DiskConfig::parse("path=/a,image_type=Qcow2,backing_files=on").unwrap();
        assert!(disk.image_type == Some(crate::config::ImageType::Qcow2) && disk.backing_files);
        let unknown = DiskConfig::parse("path=/a,image_type=vhdx").unwrap_err().to_string();
        assert!(unknown.contains("raw or qcow2"), "{unknown}");
        let net = NetConfig::parse("tap=t0,mac=52:54:00:12:34:56,ip=10.0.0.1,mask=255.0.0.0").unwrap();
        assert_eq!(net.mac.unwrap().to_string(), "52:54:00:12:34:56");
        assert_eq!(
            ConsoleConfig::parse("--serial", "file=/x,y")
                .unwrap()
                .file
                .unwrap()
                .to_str(),
            Some("/x,y")
        );
    }

    #[test]
    fn what_is_not_offered_is_named() {
        let reason = DiskConfig::parse("path=/a,vhost_user=on").unwrap_err().to_string();
        assert!(
            reason.contains("--disk") && reason.contains("\"vhost_user\"") && reason.contains("readonly"),
            "{reason}"
        );
        let reason = ConsoleConfig::parse("--console", "pty").unwrap_err().to_string();
        assert_eq!(
            reason,
            "--console: \"pty\" is not supported; supported: off, null, tty or file=PATH"
        );
        assert!(
            DiskConfig::parse("readonly=on")
                .unwrap_err()
                .to_string()
                .contains("path= is missing")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_them_panic(text in "([a-z_]{1,12}=[a-zA-Z0-9:/.\\[\\]\"]{0,12},?){0,4}|.{0,40}") {
            let _ = CpusConfig::parse(&text);
            let _ = MemoryConfig::parse(&text);
            let _ = DiskConfig::parse(&text);
            let _ = NetConfig::parse(&text);
            let _ = RngConfig::parse(&text);
            let _ = ConsoleConfig::parse("--serial", &text);
        }
    }
}
