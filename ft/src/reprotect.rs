//! Automatic re-protection: which host is asked to be the next backup, and when.
//!
//! * [`Reprotect`]: the list of hosts, as the operator gave it and as it goes from primary to backup in `hello`, so that
//!   whoever runs the VM later knows it too;
//! * [`Policy`]: all that is needed to ask one of them; [`Retry`]: whose turn it is. Neither does I/O nor has a clock:
//!   the VMM's supervisor asks [`Retry::next`], tries, and tells what became of it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::{FtEnableConfig, FtTls};
use crate::transport::{Address, TransportError};

/// Most hosts in the list, the first backup among them.
pub const MAX_SPARES: usize = 16;

/// Longest address in bytes.
pub const MAX_ADDRESS: usize = 255;

/// Pause after the first round of all hosts; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause between two rounds.
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// Protection that held for so long was sound: the next search begins at once.
const SOUND: Duration = Duration::from_secs(60);

/// The same failure of the same host is told again after so long.
const TOLD_AGAIN: Duration = Duration::from_secs(600);

/// A list of spares that cannot be used.
#[derive(Debug, Error)]
pub enum SparesError {
    /// Nobody would use them.
    #[error("spares are given, but automatic re-protection is off: set `auto_reprotect` (`--auto-reprotect`) too")]
    Unused,
    /// More than [`MAX_SPARES`].
    #[error("{0} hosts are named as peer and spares, at most {MAX_SPARES} can be")]
    TooMany(usize),
    /// Longer than [`MAX_ADDRESS`].
    #[error("the address of a spare has {0} bytes, at most {MAX_ADDRESS} are allowed")]
    TooLong(usize),
    /// No address.
    #[error("spare: {0}")]
    Address(#[from] TransportError),
}

/// The hosts that can be this VM's backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reprotect {
    /// Their addresses, in the order in which they are tried.
    pub spares: Vec<String>,
    /// The address of the backup that is told this.
    pub peer: String,
}

impl Reprotect {
    /// What `config` asks for.
    pub(crate) fn new(config: &FtEnableConfig) -> Result<Option<Self>, SparesError> {
        if !config.auto_reprotect {
            return if config.spares.is_empty() {
                Ok(None)
            } else {
                Err(SparesError::Unused)
            };
        }
        let mut spares: Vec<String> = Vec::new();
        for address in config.spares.iter().chain([&config.peer]) {
            if !spares.contains(address) {
                spares.push(address.clone());
            }
        }
        let peer = config.peer.clone();
        let this = Self { spares, peer };
        this.check()?;
        if config.tls.is_some()
            && let Some(unix) = this.spares.iter().find(|address| address.starts_with("unix:"))
        {
            return Err(TransportError::TlsNeedsTcp(unix.clone()).into());
        }
        Ok(Some(this))
    }

    /// Checks number, lengths and form, of the operator's list as of a peer's.
    pub fn check(&self) -> Result<(), SparesError> {
        if self.spares.len() > MAX_SPARES {
            return Err(SparesError::TooMany(self.spares.len()));
        }
        for address in self.spares.iter().chain([&self.peer]) {
            if address.len() > MAX_ADDRESS {
                return Err(SparesError::TooLong(address.len()));
            }
            Address::parse(address)?;
        }
        Ok(())
    }
}

/// How a VM that runs alone is protected again.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The request that is made of each host; `spares` is the whole list, `peer` the backup of last time.
    config: FtEnableConfig,
    /// This host's own addresses.
    own: Vec<String>,
}

impl Policy {
    /// Of the primary that was enabled by `config`, if that asks for it.
    pub fn of_primary(config: &FtEnableConfig) -> Result<Option<Self>, SparesError> {
        Ok(Reprotect::new(config)?.map(|reprotect| Self {
            config: FtEnableConfig {
                spares: reprotect.spares,
                ..config.clone()
            },
            own: Vec::new(),
        }))
    }

    /// Of a backup that took over. `config`: as the primary's, but with what is this host's own matter: TLS, `insecure`.
    pub(crate) fn of_backup(reprotect: Reprotect, listened: [String; 2], config: FtEnableConfig) -> Self {
        let [one, two] = listened;
        Self {
            config: FtEnableConfig {
                peer: reprotect.peer.clone(),
                auto_reprotect: true,
                spares: reprotect.spares,
                ..config
            },
            own: vec![reprotect.peer, one, two],
        }
    }

    /// The request to the host at `address`.
    pub fn request(&self, address: &str) -> FtEnableConfig {
        // A name that was given for the first backup's certificate is that one's alone.
        let named = |tls: &FtTls| FtTls {
            dir: tls.dir.clone(),
            peer: tls.peer.clone().filter(|_| address == self.config.peer),
        };
        FtEnableConfig {
            peer: address.to_string(),
            tls: self.config.tls.as_ref().map(named),
            ..self.config.clone()
        }
    }

    /// All hosts that are named, this one too.
    pub fn spares(&self) -> &[String] {
        &self.config.spares
    }

    /// The search by this policy.
    pub fn retry(&self) -> Retry {
        let others = self.config.spares.iter().filter(|address| !self.own.contains(address));
        Retry {
            hosts: others.map(|address| Host::new(address)).collect(),
            turn: 0,
            pause: Duration::ZERO,
            due: None,
            protected: None,
            trying: false,
            attempts: 0,
            last_error: None,
        }
    }
}

#[derive(Debug)]
struct Host {
    address: String,
    /// The failure that was told last, and when.
    told: Option<(String, Instant)>,
}

impl Host {
    fn new(address: &str) -> Self {
        let address = address.to_string();
        Self { address, told: None }
    }
}

/// The search for a new backup.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct FtReprotection {
    /// Attempts since the VM runs alone.
    pub attempts: u64,
    /// The host that is being asked now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trying: Option<String>,
    /// Seconds until the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_in_s: Option<f64>,
    /// Why the last attempt failed, or why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Ask this host; then [`Retry::failed`] or [`Retry::accepted`].
    Try(String),
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing at all: no other host is named.
    Never,
}

/// Whose turn it is. Bounded: it holds one line for each host.
#[derive(Debug)]
pub struct Retry {
    hosts: Vec<Host>,
    turn: usize,
    /// The next pause.
    pause: Duration,
    /// When the search goes on; `None` while there is a backup.
    due: Option<Instant>,
    protected: Option<Instant>,
    trying: bool,
    attempts: u64,
    last_error: Option<String>,
}

impl Retry {
    /// The VM is protected.
    pub fn protected(&mut self, now: Instant) {
        self.protected.get_or_insert(now);
        self.accepted();
    }

    /// The VM runs alone. The search begins if it is not under way; `lost`, the backup of before, is asked last.
    pub fn alone(&mut self, lost: Option<&str>, now: Instant) {
        if self.due.is_some() {
            return;
        }
        if self.protected.take().is_some_and(|since| now - since >= SOUND) {
            self.pause = Duration::ZERO;
        }
        self.attempts = 0;
        self.last_error = None;
        self.turn = 0;
        for host in &mut self.hosts {
            host.told = None;
        }
        if let Some(at) = self.hosts.iter().position(|host| Some(host.address.as_str()) == lost) {
            self.hosts.rotate_left(at + 1);
        }
        self.rest(now);
    }

    fn rest(&mut self, now: Instant) {
        self.due = Some(now + self.pause);
        self.pause = (2 * self.pause).clamp(FIRST_PAUSE, LAST_PAUSE);
    }

    /// The next step of the search.
    pub fn next(&mut self, now: Instant) -> Next {
        let Some(host) = self.hosts.get(self.turn) else {
            self.last_error = Some("no other host is named as a spare".into());
            return Next::Never;
        };
        match self.due {
            Some(due) if due <= now => {
                self.attempts += 1;
                self.trying = true;
                Next::Try(host.address.clone())
            }
            Some(due) => Next::Wait(due - now),
            None => Next::Never,
        }
    }

    /// The host whose turn it was did not become the backup. Whether that is news.
    pub fn failed(&mut self, reason: &str, now: Instant) -> bool {
        self.trying = false;
        let Some(host) = self.hosts.get_mut(self.turn) else {
            return false;
        };
        self.last_error = Some(format!("{}: {reason}", host.address));
        let same = |(told, at): &(String, Instant)| told == reason && now - *at < TOLD_AGAIN;
        let news = !host.told.as_ref().is_some_and(same);
        if news {
            host.told = Some((reason.to_string(), now));
        }
        self.turn += 1;
        if self.turn == self.hosts.len() {
            self.turn = 0;
            self.rest(now);
        }
        news
    }

    /// The host whose turn it was is the backup now.
    pub fn accepted(&mut self) {
        self.trying = false;
        self.due = None;
    }

    /// The number of attempts of this search.
    pub fn attempts(&self) -> u64 {
        self.attempts
    }

    /// For `ft info`.
    pub fn report(&self, now: Instant) -> FtReprotection {
        let trying = self.hosts.get(self.turn).filter(|_| self.trying);
        let waits = self.due.filter(|_| !self.trying && !self.hosts.is_empty());
        FtReprotection {
            attempts: self.attempts,
            trying: trying.map(|host| host.address.clone()),
            next_in_s: waits.map(|due| due.saturating_duration_since(now).as_secs_f64()),
            last_error: self.last_error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(peer: &str, spares: &[&str]) -> FtEnableConfig {
        FtEnableConfig {
            peer: format!("tcp:{peer}:1"),
            arbiter: None,
            insecure: true,
            tls: None,
            durability: Default::default(),
            shared_disks: Vec::new(),
            audit: Default::default(),
            limits: Default::default(),
            auto_reprotect: true,
            spares: spares.iter().map(|host| format!("tcp:{host}:1")).collect(),
        }
    }

    fn retry(peer: &str, spares: &[&str]) -> Retry {
        Policy::of_primary(&config(peer, spares)).unwrap().unwrap().retry()
    }

    fn tries(retry: &mut Retry, now: Instant) -> Vec<String> {
        let mut tried = Vec::new();
        while let Next::Try(address) = retry.next(now) {
            retry.failed("refused", now);
            tried.push(address.replace("tcp:", "").replace(":1", ""));
        }
        tried
    }

    #[test]
    fn the_lost_backup_is_asked_last() {
        let now = Instant::now();
        let mut one = retry("b", &["c", "d"]);
        one.alone(Some("tcp:b:1"), now);
        assert_eq!(tries(&mut one, now), ["c", "d", "b"]);
        // Named by the operator, it keeps its place, and those behind it come first.
        let mut two = retry("b", &["a", "b", "c"]);
        two.alone(Some("tcp:b:1"), now);
        assert_eq!(tries(&mut two, now), ["c", "a", "b"]);
        let mut three = retry("b", &[]);
        three.alone(Some("tcp:b:1"), now);
        assert_eq!(tries(&mut three, now), ["b"]);
    }

    #[test]
    fn rounds_are_further_and_further_apart_up_to_a_minute() {
        let mut now = Instant::now();
        let mut retry = retry("b", &["c"]);
        retry.alone(None, now);
        let mut pauses = Vec::new();
        for round in 1..=1000 {
            assert_eq!(tries(&mut retry, now), ["c", "b"]);
            let Next::Wait(pause) = retry.next(now) else { panic!() };
            assert_eq!(retry.report(now).next_in_s, Some(pause.as_secs_f64()));
            assert_eq!(retry.attempts(), 2 * round);
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(pauses[8..].iter().all(|pause| *pause == 60));
    }

    #[test]
    fn a_backup_that_does_not_hold_slows_the_search_down_a_sound_one_does_not() {
        let mut now = Instant::now();
        let mut retry = retry("b", &[]);
        retry.protected(now);
        retry.alone(Some("tcp:b:1"), now);
        let mut waits = Vec::new();
        for held in [0, 0, 59, 60, 0] {
            let Next::Try(_) = retry.next(now) else { panic!() };
            retry.accepted();
            assert_eq!(retry.next(now), Next::Never);
            retry.protected(now);
            now += Duration::from_secs(held);
            retry.alone(Some("tcp:b:1"), now);
            let wait = match retry.next(now) {
                Next::Wait(wait) => wait,
                _ => Duration::ZERO,
            };
            waits.push(wait.as_secs());
            now += wait;
        }
        assert_eq!(waits, [1, 2, 4, 0, 1]);
    }

    #[test]
    fn the_same_failure_is_news_once_in_ten_minutes() {
        let mut now = Instant::now();
        let mut retry = retry("b", &[]);
        retry.alone(None, now);
        assert!(retry.failed("refused", now) && !retry.failed("refused", now));
        assert!(retry.failed("busy", now) && retry.failed("refused", now));
        now += Duration::from_secs(599);
        assert!(!retry.failed("refused", now));
        now += Duration::from_secs(1);
        assert!(retry.failed("refused", now));
        assert_eq!(retry.report(now).last_error.unwrap(), "tcp:b:1: refused");
    }

    #[test]
    fn a_backup_that_took_over_does_not_ask_itself_and_knows_all_others() {
        let hello = Reprotect::new(&config("b", &["c", "a"])).unwrap().unwrap();
        let listened = ["tcp:0.0.0.0:1".to_string(), "tcp:b:1".to_string()];
        let own = config("x", &[]);
        let policy = Policy::of_backup(hello, listened.clone(), own);
        let now = Instant::now();
        let mut search = policy.retry();
        search.alone(None, now);
        assert_eq!(tries(&mut search, now), ["c", "a"]);
        let request = policy.request("tcp:c:1");
        assert_eq!(request.spares, ["tcp:c:1", "tcp:a:1", "tcp:b:1"]);
        assert!(request.auto_reprotect);
        // Alone in the list, it has nobody to ask.
        let hello = Reprotect::new(&config("b", &[])).unwrap().unwrap();
        let mut search = Policy::of_backup(hello, listened, config("x", &[])).retry();
        search.alone(None, now);
        assert_eq!(search.next(now), Next::Never);
        assert!(search.report(now).last_error.is_some() && search.report(now).next_in_s.is_none());
    }

    #[test]
    fn the_name_of_a_certificate_is_the_first_backups() {
        let tls = FtTls {
            dir: "/certs".into(),
            peer: Some("first".into()),
        };
        let config = FtEnableConfig {
            tls: Some(tls),
            ..config("b", &["c"])
        };
        let policy = Policy::of_primary(&config).unwrap().unwrap();
        let name = |address: &str| policy.request(address).tls.unwrap().peer;
        assert_eq!((name("tcp:b:1").as_deref(), name("tcp:c:1")), (Some("first"), None));
        let mut unix = config;
        unix.spares.push("unix:/x".into());
        assert!(Policy::of_primary(&unix).is_err());
    }

    #[test]
    fn lists_that_cannot_be_used_are_refused() {
        let off = FtEnableConfig {
            auto_reprotect: false,
            ..config("b", &["c"])
        };
        assert!(matches!(Policy::of_primary(&off), Err(SparesError::Unused)));
        let names: Vec<String> = (0..16).map(|n| format!("h{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert!(Policy::of_primary(&config("h3", &names)).is_ok());
        assert!(matches!(
            Policy::of_primary(&config("other", &names)),
            Err(SparesError::TooMany(17))
        ));
        assert!(matches!(
            Policy::of_primary(&config("b", &[&"x".repeat(250)])),
            Err(SparesError::TooLong(256))
        ));
        let mut bad = config("b", &[]);
        bad.spares.push("nowhere".into());
        assert!(matches!(Policy::of_primary(&bad), Err(SparesError::Address(_))));
    }
}
