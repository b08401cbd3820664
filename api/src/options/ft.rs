//! The options of fault tolerance: `--ft-receive`, `--disk` and `--net` of a backup, limits as `key=value`.

use ft::config::{FtDiskOverride, FtImageType, FtLimitsPatch, FtNetOverride, FtReceiveConfig, FtTls};

use super::{OptionError, OptionValue, Options};
use crate::config::{ConsoleConfig, ConsoleMode, ImageType};

/// Limits that can be set: members of [`ft::config::FtLimits`].
pub const LIMITS: &[&str] = &[
    "max_epoch_ms",
    "min_epoch_us",
    "max_epoch_mib",
    "overhead_percent",
    "max_lag_mib",
    "heartbeat_ms",
    "heartbeat_timeout_ms",
    "precopy_mib_s",
    "audit_mib_s",
    "audit_disk_mib_s",
    "delta_cache_mib",
];

/// `--ft-receive listen=tcp:HOST:PORT,arbiter=ARBITER,tls=DIR,tls_peer=NAME,insecure=on`
pub fn receive(text: &str) -> Result<FtReceiveConfig, OptionError> {
    let mut options = Options::parse(
        "--ft-receive",
        &["listen", "arbiter", "tls", "tls_peer", "insecure"],
        text,
    )?;
    let tls = match (options.take("tls")?, options.take("tls_peer")?) {
        (Some(dir), peer) => Some(FtTls { dir, peer }),
        (None, None) => None,
        (None, Some::<String>(_)) => {
            return Err(OptionError {
                option: "--ft-receive",
                reason: "tls_peer is given without tls".into(),
            });
        }
    };
    Ok(FtReceiveConfig {
        listen: options.need("listen")?,
        arbiter: options.take("arbiter")?,
        insecure: options.take("insecure")?.unwrap_or(false),
        tls,
        disks: Vec::new(),
        net: Vec::new(),
        serial: None,
        console: None,
    })
}

/// `--disk id=_disk0,path=/b.img,image_type=qcow2`
pub fn disk(text: &str) -> Result<FtDiskOverride, OptionError> {
    let mut options = Options::parse("--disk (of a backup)", &["id", "path", "image_type"], text)?;
    Ok(FtDiskOverride {
        id: options.need("id")?,
        path: options.need("path")?,
        image_type: options.take("image_type")?.map(|format| match format {
            ImageType::Qcow2 => FtImageType::Qcow2,
            _ => FtImageType::Raw,
        }),
    })
}

/// `--net id=_net1,tap=tap1`
pub fn net(text: &str) -> Result<FtNetOverride, OptionError> {
    let mut options = Options::parse("--net (of a backup)", &["id", "tap"], text)?;
    Ok(FtNetOverride {
        id: options.need("id")?,
        tap: options.need("tap")?,
    })
}

/// A console of a backup, `off`, `null`, `tty` or `file=PATH` (also `file:PATH`), as FT's configuration has it.
pub fn console(option: &'static str, text: &str) -> Result<String, OptionError> {
    let text = match text.strip_prefix("file:") {
        Some(path) => format!("file={path}"),
        None => text.into(),
    };
    let console = ConsoleConfig::parse(option, &text)?;
    Ok(match (console.mode, console.file) {
        (ConsoleMode::File, Some(path)) => format!("file:{}", path.display()),
        _ => text,
    })
}

/// `max_epoch_ms=50` ...: a change of these limits only.
pub fn limits<S: AsRef<str>>(settings: &[S]) -> Result<FtLimitsPatch, OptionError> {
    let settings: Vec<&str> = settings.iter().map(AsRef::as_ref).collect();
    let mut options = Options::parse("limits", LIMITS, &settings.join(","))?;
    Ok(FtLimitsPatch {
        max_epoch_ms: options.take("max_epoch_ms")?,
        min_epoch_us: options.take("min_epoch_us")?,
        max_epoch_mib: options.take("max_epoch_mib")?,
        overhead_percent: options.take("overhead_percent")?,
        max_lag_mib: options.take("max_lag_mib")?,
        heartbeat_ms: options.take("heartbeat_ms")?,
        heartbeat_timeout_ms: options.take("heartbeat_timeout_ms")?,
        precopy_mib_s: options.take("precopy_mib_s")?,
        audit_mib_s: options.take("audit_mib_s")?,
        audit_disk_mib_s: options.take("audit_disk_mib_s")?,
        delta_cache_mib: options.take("delta_cache_mib")?,
    })
}

/// `tcp:HOST:PORT` or `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(pub String);

impl OptionValue for Address {
    const EXPECTED: &'static str = "tcp:HOST:PORT or unix:PATH";

    fn parse(text: &str) -> Option<Self> {
        let valid = if let Some(path) = text.strip_prefix("unix:") {
            !path.is_empty()
        } else {
            let (host, port) = text.strip_prefix("tcp:")?.rsplit_once(':')?;
            !host.is_empty() && u16::parse(port).is_some_and(|port| port > 0)
        };
        valid.then(|| Self(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_an_object_of_what_changes() {
        let patch = limits(&["max_epoch_ms=50,heartbeat_ms=20", "max_lag_mib=9"]).unwrap();
        let json = serde_json::to_value(&patch).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"max_epoch_ms": 50, "heartbeat_ms": 20, "max_lag_mib": 9})
        );
        let reason = limits(&["epoch=5"]).unwrap_err().to_string();
        assert!(
            reason.contains("\"epoch\"") && reason.contains("max_epoch_ms"),
            "{reason}"
        );
        assert!(limits(&["max_lag_mib=9", "max_lag_mib=9"]).is_err());
        assert!(limits(&["max_lag_mib=-9"]).is_err());
    }

    #[test]
    fn the_names_of_limits_are_those_of_the_type() {
        let serde_json::Value::Object(object) = serde_json::to_value(ft::config::FtLimits::default()).unwrap() else {
            panic!("no object")
        };
        let mut names: Vec<&str> = object.keys().map(String::as_str).collect();
        let mut ours = LIMITS.to_vec();
        names.sort_unstable();
        ours.sort_unstable();
        assert_eq!(names, ours);
    }

    #[test]
    fn a_backup() {
        let config = receive("listen=tcp:[::]:7000,insecure=on").unwrap();
        assert_eq!((config.listen.as_str(), config.insecure), ("tcp:[::]:7000", true));
        let config = receive("listen=unix:/a,arbiter=etcd:a:1+[::1]:2+ca=/c,insecure=on").unwrap();
        assert_eq!(config.arbiter.as_deref(), Some("etcd:a:1+[::1]:2+ca=/c"));
        assert_eq!(disk("id=_disk0,path=/b").unwrap().id, "_disk0");
        let format = |text| disk(text).map(|disk| disk.image_type);
        assert_eq!(format("id=_disk0,path=/b").unwrap(), None);
        assert_eq!(
            format("id=_disk0,path=/b,image_type=qcow2").unwrap(),
            Some(FtImageType::Qcow2)
        );
        assert!(format("id=_disk0,path=/b,image_type=vhdx").is_err());
        assert!(disk("id=_disk0").is_err());
        assert!(
            disk("id=_disk0,path=/b,readonly=on")
                .unwrap_err()
                .to_string()
                .contains("readonly")
        );
        assert_eq!(net("id=_net1,tap=t").unwrap().tap, "t");
        assert_eq!(console("--serial", "file=/x").unwrap(), "file:/x");
        assert_eq!(console("--serial", "off").unwrap(), "off");
        assert!(console("--serial", "pty").is_err());
    }

    #[test]
    fn addresses() {
        for good in ["tcp:host:1", "tcp:[::1]:7000", "unix:/a"] {
            assert!(Address::parse(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:0",
            "tcp:host:99999",
            "host:1",
            "unix:",
        ] {
            assert_eq!(Address::parse(bad), None, "{bad}");
        }
    }
}
