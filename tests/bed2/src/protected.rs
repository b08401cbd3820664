//! A protected Debian guest whose primary is lost: what the fault tolerance tests of bed 2 have in common.
//!
//! Host names here: the primary VMM `p` runs on host `a`; the backup VMM `b` on the bed's last host; the client runs there
//! too. Each step is a method, in the order of a test.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bed::{Bed, Spec, check_file_system, file_in_image};
use crate::client::{Report, check_lines};
use crate::host::Running;

/// The guest's address.
const GUEST: &str = "192.168.100.2";
/// Hang guards: this machine may be busy with other things, and the guests run nested and emulated.
const BOOT: Duration = Duration::from_secs(300);
const STEP: Duration = Duration::from_secs(300);

/// The bed with its guest.
pub struct Protected {
    /// The hosts.
    pub bed: Bed,
    survivor: &'static str,
    sessions: Option<Running>,
}

impl Protected {
    /// Boots the hosts, the guest on the primary, and an idle VMM for the backup.
    pub fn start(name: &str, hosts: usize) -> Result<Self> {
        let spec = Spec::new(name, hosts).guest_disk(0, "primary")?;
        let mut this = Self {
            bed: Bed::start(spec.blank_disk(hosts - 1, "backup")?)?,
            survivor: if hosts == 2 { "b" } else { "a" },
            sessions: None,
        };
        this.bed.host("a").run(
            "tap tapp
             vmm p --cpus boot=1 --memory size=384M --kernel /images/guest/vmlinuz --initramfs /images/guest/initrd \
                 --cmdline \"$GUEST_CMDLINE\" --disk path=/dev/bed/primary --net tap=tapp,mac=52:54:00:00:00:02 \
                 --serial file=$LOGS/guest-p.log --console off --ft-arbiter file:/out/arbiter",
            STEP,
        )?;
        this.survivor().run("tap tapb; vmm b", STEP)?;
        this.bed.host("a").run("guest_up 280", BOOT)?;
        Ok(this)
    }

    /// Turns fault tolerance on and waits until the guest is protected.
    pub fn protect(&mut self) -> Result<()> {
        let peer = if self.survivor == "b" { "10.99.0.2" } else { "127.0.0.1" };
        self.survivor().run(
            &format!(
                "remote b ft receive tcp:{peer}:7000 --disk id=_disk0,path=/dev/bed/backup --net id=_net1,tap=tapb \
                     --serial file=$LOGS/guest-b.log --arbiter file:/out/arbiter --insecure"
            ),
            STEP,
        )?;
        let enable = format!("remote p ft enable --peer tcp:{peer}:7000 --insecure && ft_is p protected");
        self.bed.host("a").run(&enable, STEP)?;
        Ok(())
    }

    /// Begins the clients' sessions and waits until each has had `least` answers.
    pub fn sessions(&mut self, least: u64) -> Result<()> {
        let command = format!("bed2-client hold {GUEST} /out/stop --limit 600");
        self.sessions = Some(self.survivor().spawn(&command)?);
        self.progress(least)
    }

    /// Kills the primary VMM's process.
    pub fn kill_primary(&mut self) -> Result<()> {
        self.bed.host("a").run("kill -9 $(</run/p.pid)", STEP).map(|_| ())
    }

    /// Cuts the power of the primary's host.
    pub fn cut_primary(&mut self) -> Result<()> {
        self.bed.host("a").cut()
    }

    /// Waits until each session has had `more` further answers.
    pub fn progress(&mut self, more: u64) -> Result<()> {
        let sessions = self.sessions.as_ref().context("no sessions")?;
        let first = counts(sessions).unwrap_or_default();
        let start = Instant::now();
        loop {
            let now = counts(sessions).unwrap_or_default();
            if now.iter().zip(first).all(|(now, first)| *now >= first + more) {
                return Ok(());
            }
            if sessions.ended() || start.elapsed() > STEP {
                let report = std::fs::read_to_string(self.bed.out().join("stop.json")).unwrap_or_default();
                bail!("sessions stopped at {now:?} answers (redis, echo, ssh), were {first:?}: {report}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends the sessions and checks: none broke, no acknowledged write is lost, the survivor runs alone.
    pub fn finish_sessions(&mut self) -> Result<Report> {
        std::fs::write(self.bed.out().join("stop"), "")?;
        let sessions = self.sessions.take().context("no sessions")?;
        let output = sessions.wait(STEP)?;
        let text = std::fs::read_to_string(self.bed.out().join("stop.json")).context(output.err)?;
        let report: Report = serde_json::from_str(&text)?;
        report.check(1)?;
        let verify = format!("bed2-client verify {GUEST} /out/stop.json && ft_is b solo");
        self.survivor().run(&verify, STEP)?;
        Ok(report)
    }

    /// Powers the guest off by its button, then the hosts; checks the surviving disk.
    pub fn finish(mut self, report: &Report) -> Result<()> {
        let off = "remote b power-button; wait_for 240 'power-off of the guest' ended b";
        self.survivor().run(off, STEP)?;
        self.bed.power_off()?;
        let disk = self.bed.disk(self.survivor, "backup");
        check_file_system(&disk)?;
        check_lines(&file_in_image(&disk, "/root/lines")?, report)
    }

    fn survivor(&mut self) -> &mut crate::Host {
        self.bed.host(self.survivor)
    }
}

/// The last line of the client's output: answers in each session.
fn counts(sessions: &Running) -> Option<[u64; 3]> {
    let text = sessions.out();
    let whole = &text[..text.rfind('\n')?];
    let numbers: Vec<u64> = whole
        .lines()
        .last()?
        .split(' ')
        .filter_map(|n| n.parse().ok())
        .collect();
    numbers.try_into().ok()
}
