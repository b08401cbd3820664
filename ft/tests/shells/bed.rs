//! Two sides, an arbiter that can be taken away from each, and a network that can be cut, stalled or damaged.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ft::config::*;
use ft::{Backup, EventSink, Primary};

use crate::fake::{FakeVm, lock};
use crate::host::{FakeHost, HostRef};

/// A relay in front of the backup.
pub struct Relay {
    pub address: String,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    stalled: Arc<AtomicBool>,
    /// Bytes to the backup after which one bit is flipped; negative: never.
    pub damage: Arc<AtomicI64>,
    pub relayed: Arc<AtomicU64>,
    quit: Arc<AtomicBool>,
}

impl Relay {
    pub fn new(target: &str) -> Self {
        let target = target.strip_prefix("tcp:").unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let relay = Self {
            address,
            sockets: Arc::default(),
            stalled: Arc::default(),
            damage: Arc::new(AtomicI64::new(-1)),
            relayed: Arc::default(),
            quit: Arc::default(),
        };
        listener.set_nonblocking(true).unwrap();
        let (sockets, stalled, quit) = (relay.sockets.clone(), relay.stalled.clone(), relay.quit.clone());
        let (damage, relayed) = (relay.damage.clone(), relay.relayed.clone());
        std::thread::spawn(move || {
            while !quit.load(Ordering::SeqCst) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                near.set_nonblocking(false).unwrap();
                let Ok(far) = TcpStream::connect(&target) else { continue };
                lock(&sockets).extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut to, damaging) in [
                    (near.try_clone().unwrap(), far.try_clone().unwrap(), true),
                    (far, near, false),
                ] {
                    to.set_nodelay(true).unwrap();
                    let (stalled, damage, relayed) = (stalled.clone(), damage.clone(), relayed.clone());
                    std::thread::spawn(move || {
                        let mut buf = vec![0; 64 << 10];
                        while let Ok(n) = from.read(&mut buf) {
                            if n == 0 {
                                break;
                            }
                            while stalled.load(Ordering::SeqCst) {
                                std::thread::sleep(Duration::from_millis(1));
                            }
                            if damaging {
                                relayed.fetch_add(n as u64, Ordering::SeqCst);
                                let left = damage.load(Ordering::SeqCst);
                                if left >= 0 {
                                    if left < n as i64 {
                                        buf[left as usize] ^= 0x10;
                                    }
                                    damage.store((left - n as i64).max(-1), Ordering::SeqCst);
                                }
                            }
                            if to.write_all(&buf[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                        let _ = from.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        relay
    }

    pub fn cut(&self) {
        for socket in lock(&self.sockets).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::SeqCst);
        self.stall(false);
        self.cut();
    }
}

/// Side, state and reason of each event.
pub type Seen = Arc<Mutex<Vec<(String, String, String)>>>;

pub fn sink(name: &str, seen: &Seen) -> EventSink {
    let (name, seen) = (name.to_string(), seen.clone());
    Arc::new(move |event| {
        let reason = event.properties.iter().find(|(key, _)| key == "reason");
        let reason = reason.map(|(_, reason)| reason.clone()).unwrap_or_default();
        lock(&seen).push((name.clone(), event.event.to_string(), reason));
    })
}

pub struct Bed {
    pub dir: tempfile::TempDir,
    pub vm: Arc<FakeVm>,
    pub host: Arc<FakeHost>,
    pub backup: Option<Backup>,
    pub relay: Relay,
    pub primary: Option<Primary>,
    pub events: Seen,
}

pub fn limits() -> FtLimits {
    FtLimits {
        max_epoch_ms: 20,
        min_epoch_us: 200,
        heartbeat_ms: 20,
        heartbeat_timeout_ms: 300,
        ..FtLimits::default()
    }
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "never came: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Bed {
    pub fn new(vm: Arc<FakeVm>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        for side in ["p", "b"] {
            symlink("store", dir.path().join(side)).unwrap();
        }
        let host = FakeHost::new();
        let events: Seen = Arc::default();
        let backup = receive(&host, &dir, &events, |_| ());
        let relay = Relay::new(&backup.address());
        Self {
            dir,
            vm,
            host,
            backup: Some(backup),
            relay,
            primary: None,
            events,
        }
    }

    fn arbiter(&self, side: &str) -> PathBuf {
        self.dir.path().join(side)
    }

    /// The arbiter is out of reach for a side, or within reach again.
    pub fn arbiter_reachable(&self, side: &str, reachable: bool) {
        let path = self.arbiter(side);
        if reachable {
            symlink("store", path).unwrap()
        } else {
            std::fs::remove_file(path).unwrap()
        }
    }

    pub fn config(&self) -> FtEnableConfig {
        FtEnableConfig {
            peer: self.relay.address.clone(),
            arbiter: Some(format!("file:{}", self.arbiter("p").display())),
            insecure: false,
            tls: None,
            durability: FtDurability::default(),
            shared_disks: Vec::new(),
            audit: FtAudit::default(),
            limits: limits(),
            auto_reprotect: false,
            spares: Vec::new(),
        }
    }

    pub fn try_enable(&self, config: FtEnableConfig) -> Result<Primary, ft::Error> {
        ft::enable(self.vm.clone(), config, sink("primary", &self.events))
    }

    pub fn enable(&mut self) {
        self.enable_with(|_| ());
    }

    fn enable_with(&mut self, change: impl FnOnce(&mut FtEnableConfig)) {
        let mut config = self.config();
        change(&mut config);
        self.primary = Some(self.try_enable(config).unwrap());
    }

    pub fn protect(&mut self) {
        self.protect_with(|_| ());
    }

    pub fn protect_with(&mut self, change: impl FnOnce(&mut FtEnableConfig)) {
        self.enable_with(change);
        eventually("protection", || self.primary().info().state == FtState::Protected);
        eventually("protection", || self.backup().info().state == FtState::Protected);
    }

    pub fn primary(&self) -> &Primary {
        self.primary.as_ref().unwrap()
    }

    pub fn backup(&self) -> &Backup {
        self.backup.as_ref().unwrap()
    }

    pub fn new_backup(&mut self) {
        self.backup_with(|_| ());
    }

    /// A new backup of another configuration.
    pub fn backup_with(&mut self, change: impl FnOnce(&mut FtReceiveConfig)) {
        if let Some(backup) = self.backup.take() {
            backup.shutdown();
        }
        let backup = receive(&self.host, &self.dir, &self.events, change);
        if backup.address().starts_with("tcp:") {
            self.relay = Relay::new(&backup.address());
        }
        self.backup = Some(backup);
    }

    /// The two sides hear nothing more of each other: at once, or by silence.
    pub fn part(&self, silently: bool) {
        if silently {
            self.relay.stall(true)
        } else {
            self.relay.cut()
        }
    }

    pub fn wait_primary(&self, state: FtState) {
        eventually(&format!("primary {state:?}"), || self.primary().info().state == state);
    }

    pub fn wait_backup(&self, state: FtState) {
        eventually(&format!("backup {state:?}"), || self.backup().info().state == state);
    }

    /// The VM on the backup is what the primary's was at the end of the epoch that it reports.
    pub fn check_takeover(&self) -> Arc<FakeVm> {
        let live = self.host.live().unwrap();
        let committed = self.backup().info().committed as usize;
        let history = lock(&self.vm.history);
        assert!(
            live.contents() == history[committed - 1],
            "state differs from checkpoint {committed}"
        );
        live
    }
}

fn receive(
    host: &Arc<FakeHost>,
    dir: &tempfile::TempDir,
    events: &Seen,
    change: impl FnOnce(&mut FtReceiveConfig),
) -> Backup {
    let mut config = FtReceiveConfig {
        listen: "tcp:127.0.0.1:0".into(),
        arbiter: Some(format!("file:{}", dir.path().join("b").display())),
        disks: Vec::new(),
        net: Vec::new(),
        serial: None,
        console: None,
        insecure: false,
        tls: None,
    };
    change(&mut config);
    ft::receive(Arc::new(HostRef(host.clone())), config, sink("backup", events)).unwrap()
}
