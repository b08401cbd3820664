//! From a VM's configuration to the files that its VMM may touch.
//!
//! The rules hold from the moment when the VM is built ([`Landlock::restrict`], called by [`crate::vm::Vm::new`] before
//! anything of it is opened), for the whole process. What later requests name (a snapshot's directory, another
//! arbiter, certificates) needs a rule of the operator's.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use api::VmConfig;
use api::config::{ConsoleMode, LandlockConfig};
use sandbox::landlock::{Access, Error, Rule, check, restrict};

use crate::interrupts::lock;

/// What the resolver reads when a peer is given by name.
const RESOLVER: &[&str] = &[
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/gai.conf",
];

/// How a VMM restricts its access to files.
#[derive(Default)]
pub struct Landlock {
    /// Whatever VM it gets.
    always: bool,
    rules: Vec<LandlockConfig>,
    /// Rules for files that are in no VM's configuration.
    others: Mutex<Vec<Rule>>,
}

impl Landlock {
    /// With `always`, every VM of this VMM is restricted, with these rules beside its own; else those whose
    /// configuration says so. An error when the kernel cannot do what is asked.
    pub fn new(always: bool, rules: Vec<LandlockConfig>) -> Result<Self, Error> {
        if always {
            check()?;
        }
        Ok(Self {
            always,
            rules,
            others: Mutex::default(),
        })
    }

    /// Adds a file for the VMs to come.
    pub fn allow(&self, path: impl Into<PathBuf>, access: Access) {
        let rule = Rule::new(path, access);
        let mut others = lock(&self.others);
        if !others.contains(&rule) {
            others.push(rule);
        }
    }

    /// Restricts the process to the files of a VM, if that is asked for.
    pub fn restrict(&self, config: &VmConfig) -> Result<(), Error> {
        if !self.always && !config.landlock_enable {
            return Ok(());
        }
        let rules = self.rules(config)?;
        for rule in &rules {
            log::debug!("Landlock: {} {:?}", rule.path.display(), rule.access);
        }
        restrict(&rules)
    }

    fn rules(&self, config: &VmConfig) -> Result<Vec<Rule>, Error> {
        let mut rules: Vec<Rule> = Vec::new();
        // What is missing is found out, and better told, by whoever opens it.
        let mut add = |path: &Path, access| {
            if path.exists() {
                rules.push(Rule::new(path, access));
            }
        };
        if let Some(payload) = &config.payload {
            // Read again at each reset.
            for path in [&payload.kernel, &payload.initramfs].into_iter().flatten() {
                add(path, Access::READ);
            }
        }
        for disk in config.disks.iter().flatten() {
            if let Some(path) = &disk.path {
                let access = if disk.readonly {
                    Access::READ
                } else {
                    Access::READ_WRITE
                };
                add(path, access);
                for below in crate::disks::backing_files(disk) {
                    add(&below, Access::READ);
                }
            }
        }
        for console in [&config.serial, &config.console] {
            if let (ConsoleMode::File, Some(path)) = (&console.mode, &console.file) {
                make(path)?;
                add(path, Access::READ_WRITE);
            }
        }
        add(&config.rng.src, Access::READ);
        add(Path::new("/dev/urandom"), Access::READ);
        add(Path::new("/dev/kvm"), Access::READ_WRITE);
        if config.net.iter().flatten().next().is_some() {
            add(Path::new("/dev/net/tun"), Access::READ_WRITE);
        }
        add(Path::new("/proc/self"), Access::READ);
        for path in RESOLVER {
            add(Path::new(path), Access::READ);
        }
        for rule in self.rules.iter().chain(config.landlock_rules.iter().flatten()) {
            // Checked when the configuration was.
            let access = Access::parse(&rule.access).unwrap_or_default();
            rules.push(Rule::new(&rule.path, access));
        }
        rules.extend(lock(&self.others).iter().cloned());
        let mut once: Vec<Rule> = Vec::with_capacity(rules.len());
        for rule in rules {
            if !once.contains(&rule) {
                once.push(rule);
            }
        }
        Ok(once)
    }
}

/// Makes a console's file, so that there can be a rule for it alone.
fn make(path: &Path) -> Result<(), Error> {
    let made = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    made.map(drop).map_err(|source| Error::Path {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_the_files_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["k", "i", "a", "b"] {
            std::fs::write(at(name), "").unwrap();
        }
        let serial = at("serial");
        let config: VmConfig = serde_json::from_value(serde_json::json!({
            "payload": {"kernel": at("k"), "initramfs": at("i")},
            "disks": [{"path": at("a")}, {"path": at("b"), "readonly": true}, {"path": at("none")}],
            "net": [{"tap": "t"}],
            "serial": {"mode": "File", "file": serial},
            "landlock_enable": true,
            "landlock_rules": [{"path": "/snapshots", "access": "rw"}],
        }))
        .unwrap();
        let other = LandlockConfig {
            path: "/certs".into(),
            access: "r".into(),
        };
        let landlock = Landlock {
            rules: vec![other],
            ..Landlock::default()
        };
        landlock.allow("/run", Access::REMOVE);
        landlock.allow("/run", Access::REMOVE);
        let rules = landlock.rules(&config).unwrap();
        let expected = [
            (at("k"), Access::READ),
            (at("i"), Access::READ),
            (at("a"), Access::READ_WRITE),
            (at("b"), Access::READ),
            (serial.clone(), Access::READ_WRITE),
            ("/dev/urandom".into(), Access::READ),
            ("/proc/self".into(), Access::READ),
            ("/certs".into(), Access::READ),
            ("/snapshots".into(), Access::READ_WRITE),
            ("/run".into(), Access::REMOVE),
        ]
        .map(|(path, access)| Rule::new(path, access));
        // Not every machine has the others.
        let everywhere = |rule: &&Rule| {
            !["/etc", "/dev/kvm", "/dev/net"]
                .iter()
                .any(|at| rule.path.starts_with(at))
        };
        assert_eq!(rules.iter().filter(everywhere).cloned().collect::<Vec<_>>(), expected);
        assert!(serial.exists());
    }

    #[test]
    fn nothing_is_restricted_unless_asked_for() {
        let landlock = Landlock::new(false, Vec::new()).unwrap();
        landlock.restrict(&VmConfig::default()).unwrap();
        assert!(std::fs::read_dir("/").is_ok());
    }
}
