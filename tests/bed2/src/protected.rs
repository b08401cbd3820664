//! A protected Debian guest that loses a side: what the fault tolerance tests of bed 2 have in common.
//!
//! Host names here: the primary VMM `p` runs on host `a`; the backup VMM `b` on the bed's last host; the client runs there
//! too, unless it is told otherwise. Each step is a method, in the order of a test.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bed::{Bed, Spec, check_file_system, file_in_image};
use crate::client::{Report, check_lines};
use crate::host::Running;

/// The guest's address.
const GUEST: &str = "192.168.100.2";
/// Hang guards: this machine may be busy with other things, and the guests run nested and emulated.
const BOOT: Duration = Duration::from_secs(600);
const STEP: Duration = Duration::from_secs(900);

/// The bed with its guest.
pub struct Protected {
    /// The hosts.
    pub bed: Bed,
    survivor: &'static str,
    client: &'static str,
    /// The disk that the survivor has at the end.
    disk: &'static str,
    sessions: Option<Running>,
}

/// The guest, but for its disk.
const GUEST_VMM: &str = "--cpus boot=1 --memory size=384M --kernel /images/guest/vmlinuz --initramfs /images/guest/initrd \
     --cmdline \"$GUEST_CMDLINE\" --console off";

impl Protected {
    /// Boots the hosts, the guest on the primary, and an idle VMM for the backup. Each of the two has a disk of its own.
    pub fn start(name: &str, hosts: usize) -> Result<Self> {
        let spec = Spec::new(name, hosts).guest_disk(0, "primary")?;
        let spec = spec.blank_disk(hosts - 1, "backup")?;
        Self::boot(spec, "path=/dev/bed/primary", "backup")
    }

    /// The same with one disk, `/dev/bed/lun`, that both of two hosts reach.
    pub fn start_shared(name: &str) -> Result<Self> {
        let spec = Spec::new(name, 2).shared_guest_disk("lun")?;
        Self::boot(spec, "path=/dev/bed/lun,direct=on", "lun")
    }

    fn boot(mut spec: Spec, primary_disk: &str, disk: &'static str) -> Result<Self> {
        let survivor = if spec.hosts.len() == 2 { "b" } else { "a" };
        // Of two vCPUs of a host, one found the guest's per-CPU data in its kernel's place now and then (a stale translation of
        // the emulator), and the host crashed.
        spec.hosts.iter_mut().for_each(|host| host.cpus = 1);
        let mut this = Self {
            bed: Bed::start(spec)?,
            survivor,
            client: survivor,
            disk,
            sessions: None,
        };
        let p = format!(
            "tap tapp
             vmm p {GUEST_VMM} --disk {primary_disk} --net tap=tapp,mac=52:54:00:00:00:02 \
                 --serial file=$LOGS/guest-p.log --ft-arbiter file:/out/arbiter"
        );
        this.bed.host("a").run(&p, STEP)?;
        this.idle_backup()?;
        this.bed.host("a").run("guest_up 580", BOOT)?;
        Ok(this)
    }

    /// Starts the backup's VMM; again, when its host was off.
    pub fn idle_backup(&mut self) -> Result<()> {
        self.survivor()
            .run("[ -d /sys/class/net/tapb ] || tap tapb; vmm b", STEP)
            .map(drop)
    }

    fn peer(&self) -> String {
        let host = if self.survivor == "b" { "10.99.0.2" } else { "127.0.0.1" };
        format!("tcp:{host}:7000")
    }

    /// Lets the backup's VMM wait for a primary, with this file or device for its disk.
    pub fn receive(&mut self, disk: &str) -> Result<()> {
        let command = format!(
            "remote b ft receive {} --disk id=_disk0,path={disk} --net id=_net1,tap=tapb --serial file=$LOGS/guest-b.log \
                 --arbiter file:/out/arbiter --insecure",
            self.peer()
        );
        self.survivor().run(&command, STEP).map(drop)
    }

    /// Turns fault tolerance on and waits until the guest is protected.
    pub fn protect(&mut self) -> Result<()> {
        self.receive("/dev/bed/backup")?;
        self.enable(3000, "")
    }

    /// The same for a backup that waits already, with further options of `ft enable`. `silence`: milliseconds that count as
    /// death; longer than the product's default, for this machine may be busy. A killed process is noticed by its closed
    /// connection.
    pub fn enable(&mut self, silence: u32, options: &str) -> Result<()> {
        let command = format!(
            "remote p ft enable --peer {} --insecure --limits heartbeat_timeout_ms={silence} {options} && ft_is p protected",
            self.peer()
        );
        self.bed.host("a").run(&command, STEP).map(drop)
    }

    /// Ends protection; the backup waits for a primary again.
    pub fn disable(&mut self) -> Result<()> {
        self.run("a", "remote p ft disable")?;
        self.wait_state("p", "disabled")?;
        self.wait_state("b", "listening")
    }

    /// The clients will run on this host.
    pub fn client_on(&mut self, host: &'static str) {
        self.client = host;
    }

    /// Begins the clients' sessions and waits until each has had `least` answers.
    pub fn sessions(&mut self, least: u64) -> Result<()> {
        let command = format!("bed2-client hold {GUEST} /out/stop --limit 1800");
        self.sessions = Some(self.bed.host(self.client).spawn(&command)?);
        self.progress(least)
    }

    /// Runs a command on a host of the bed.
    pub fn run(&mut self, host: &str, command: &str) -> Result<String> {
        self.bed.host(host).run(command, STEP)
    }

    /// Waits until FT of a VMM (`p` or `b`) has this state.
    pub fn wait_state(&mut self, vmm: &str, state: &str) -> Result<()> {
        let host = if vmm == "p" { "a" } else { self.survivor };
        self.run(
            host,
            &format!("wait_for 600 'state {state} of {vmm}' ft_is {vmm} {state}"),
        )
        .map(drop)
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

    /// Cuts the power of both hosts of a protected guest at once. Answers (redis, echo, ssh) that the clients had told of by then.
    pub fn cut_both(&mut self) -> Result<[u64; 3]> {
        // Otherwise one of the copies is an old one.
        self.run("a", "ft_is p protected")?;
        for host in self.bed.hosts() {
            host.cut()?;
        }
        let sessions = self.sessions.take().context("no sessions")?;
        counts(&sessions).context("the clients had told of no answers")
    }

    /// Boots a host again, and the guest from the copy of its disk there; what is left there of acknowledged writes.
    pub fn recover(&mut self, host: &'static str, disk: &str, acknowledged: [u64; 3]) -> Result<Recovered> {
        self.bed.restart(host)?;
        let boot = format!(
            "tap tapr
             vmm r {GUEST_VMM} --disk path=/dev/bed/{disk} --net tap=tapr,mac=52:54:00:00:00:02 \
                 --serial file=$LOGS/guest-r-{host}.log
             guest_up 580"
        );
        self.run(host, &boot)?;
        let [redis, _, ssh] = acknowledged;
        // Where all is slow, the service may have been given up too early. A line that was not acknowledged may have left the
        // file longer, but without its content (ext4 writes an append to a block that it has already after the file's size).
        let found = format!(
            "ssh guest systemctl start redis-server
             wait_for 300 redis open_port 6379
             bed2-client recovered {GUEST} {redis} && \
             ssh guest 'wc -l </root/lines; head -n $(wc -l </root/lines) /root/lines | tail -n 1'"
        );
        let found = self.run(host, &found)?;
        self.bed.host(host).cut()?;
        let numbers: Vec<u64> = found.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [missing, last, lines, line] = numbers[..] else {
            bail!("host {host}: what was recovered is told as {found:?}");
        };
        anyhow::ensure!(
            lines == line,
            "host {host}: line {lines} of the session's file is {line}"
        );
        Ok(Recovered {
            redis_lost: missing,
            redis_last: last,
            lines_lost: ssh.saturating_sub(lines),
            lines,
        })
    }

    /// Ends the sessions and checks: none broke, no acknowledged write is lost, the survivor runs alone.
    pub fn finish_sessions(&mut self) -> Result<Report> {
        let report = self.end_sessions()?;
        self.survivor().run("ft_is b solo", STEP)?;
        Ok(report)
    }

    /// Ends the sessions and checks: none broke, no acknowledged write is lost.
    pub fn end_sessions(&mut self) -> Result<Report> {
        std::fs::write(self.bed.out().join("stop"), "")?;
        let sessions = self.sessions.take().context("no sessions")?;
        let output = sessions.wait(STEP)?;
        let text = std::fs::read_to_string(self.bed.out().join("stop.json")).context(output.err)?;
        let report: Report = serde_json::from_str(&text)?;
        report.check(1)?;
        let verify = format!("bed2-client verify {GUEST} /out/stop.json");
        self.run(self.client, &verify)?;
        Ok(report)
    }

    /// Powers the guest off by its button, then the hosts; checks the surviving disk.
    pub fn finish(mut self, report: &Report) -> Result<()> {
        let off = "remote b power-button; wait_for 240 'power-off of the guest' ended b";
        self.survivor().run(off, STEP)?;
        self.bed.power_off()?;
        let disk = self.bed.disk(self.survivor, self.disk)?;
        check_file_system(&disk)?;
        check_lines(&file_in_image(&disk, "/root/lines")?, report)?;
        self.bed.passed();
        Ok(())
    }

    fn survivor(&mut self) -> &mut crate::Host {
        self.bed.host(self.survivor)
    }
}

/// What a copy of the guest's disk holds after power cuts.
#[derive(Debug)]
pub struct Recovered {
    /// Acknowledged writes of redis that are not there.
    pub redis_lost: u64,
    /// The last write of redis that is there.
    pub redis_last: u64,
    /// Acknowledged lines of the shell that are not there.
    pub lines_lost: u64,
    /// Lines that are there.
    pub lines: u64,
}

impl Recovered {
    /// Acknowledged writes that are not there.
    pub fn lost(&self) -> u64 {
        self.redis_lost + self.lines_lost
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
