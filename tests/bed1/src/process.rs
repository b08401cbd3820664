//! One VMM process of the bed, and the client that speaks to it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cleanup::{self, Registered};
use crate::http;

/// A running `cloud-hypervisor`; killed when dropped.
pub struct Vmm {
    /// Its name in messages: `a1`, `b2` ...
    pub name: String,
    child: Child,
    registered: Option<Registered>,
    socket: PathBuf,
    ch_remote: PathBuf,
    log: PathBuf,
}

/// Where the binaries are: beside this program (a test's program is one directory deeper).
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let dir = me.ancestors().skip(1).take(3).find(|dir| dir.join(name).is_file());
    let profile = if cfg!(debug_assertions) { "" } else { " --release" };
    let dir =
        dir.with_context(|| format!("{name} is not built: run `cargo build{profile} --workspace --bins` first"))?;
    Ok(dir.join(name))
}

/// What a process uses of its host.
#[derive(Debug, Clone, Copy)]
pub struct Resources {
    /// Open files.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// See [`Vmm::memory_mib`].
    pub memory_mib: f64,
}

impl Vmm {
    /// Starts a VMM, the program `program`, in namespace `ns` with further `args`; its files go to `dir`.
    pub fn start(program: &Path, name: &str, ns: &str, dir: &Path, args: &[String]) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            bail!("/dev/kvm is missing: this needs a machine with KVM");
        }
        let socket = dir.join(format!("{name}.sock"));
        let log = dir.join(format!("{name}.log"));
        let stderr = File::create(dir.join(format!("{name}.err")))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", ns]).arg(program);
        command
            .arg("--api-socket")
            .arg(&socket)
            .arg("--log-file")
            .arg(&log)
            .arg("-v")
            .args(args);
        command
            .arg("--event-monitor")
            .arg(format!("path={}", dir.join(format!("{name}.events")).display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let ch_remote = binary("ch-remote")?;
        let (child, registered) = cleanup::spawn(&mut command)?;
        let mut this = Self {
            name: name.into(),
            child,
            registered: Some(registered),
            socket,
            ch_remote,
            log,
        };
        this.wait_for("the API socket", Duration::from_secs(20), |vmm| {
            Ok(vmm.get("vmm.ping").is_ok())
        })?;
        Ok(this)
    }

    /// Runs `ch-remote` against this VMM and returns what it printed.
    pub fn remote(&self, args: &[&str]) -> Result<String> {
        let mut command = self.ch_remote(args);
        let (child, _registered) = cleanup::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let output = child.wait_with_output().context("wait for ch-remote")?;
        if !output.status.success() {
            bail!(
                "{}: ch-remote {}: {}",
                self.name,
                args.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ch-remote` so that what it prints goes to this program's standard error.
    pub fn remote_shown(&self, args: &[&str]) -> Result<()> {
        let mut command = self.ch_remote(args);
        let (mut child, _registered) = cleanup::spawn(command.stdout(std::io::stderr()))?;
        let status = child.wait().context("wait for ch-remote")?;
        ensure!(status.success(), "{}: ch-remote {} failed", self.name, args.join(" "));
        Ok(())
    }

    fn ch_remote(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.ch_remote);
        command
            .arg("--api-socket")
            .arg(&self.socket)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// GET of an endpoint, as JSON.
    pub fn get(&self, endpoint: &str) -> Result<Value> {
        let answer = http::call(&self.socket, "GET", endpoint, None)?;
        if answer.status != 200 {
            bail!(
                "{}: GET {endpoint}: status {}: {}",
                self.name,
                answer.status,
                answer.body
            );
        }
        serde_json::from_str(&answer.body).with_context(|| format!("{}: GET {endpoint}", self.name))
    }

    /// A request as it is, for tests of errors.
    pub fn call(&self, method: &str, endpoint: &str, body: Option<&str>) -> Result<http::Answer> {
        http::call(&self.socket, method, endpoint, body)
    }

    /// What `vm.ft-info` answers.
    pub fn ft_info(&self) -> Result<Value> {
        self.get("vm.ft-info")
    }

    /// FT's state, for example `protected`.
    pub fn ft_state(&self) -> Result<String> {
        Ok(self.ft_info()?["state"].as_str().unwrap_or_default().to_string())
    }

    /// The VM's state, for example `Running`.
    pub fn vm_state(&self) -> Result<String> {
        Ok(self.get("vm.info")?["state"].as_str().unwrap_or_default().to_string())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it uses of the host. Threads that come and go are not counted: the kernel's for io_uring, the API's workers.
    pub fn resources(&self) -> Result<Resources> {
        let of = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", self.pid()));
        let stays = |task: &std::fs::DirEntry| {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            !name.starts_with("iou-") && !name.starts_with("api-worker")
        };
        Ok(Resources {
            fds: of("fd")?.count(),
            threads: of("task")?.flatten().filter(stays).count(),
            memory_mib: self.memory_mib()?,
        })
    }

    /// On which of the host's CPUs a thread may run, for example `0-3`.
    pub fn cpus_of_thread(&self, name: &str) -> Result<String> {
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))?.flatten() {
            if std::fs::read_to_string(task.path().join("comm"))?.trim() == name {
                let status = std::fs::read_to_string(task.path().join("status"))?;
                let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
                return Ok(cpus.context("no Cpus_allowed_list")?.trim().into());
            }
        }
        bail!("no thread {name}")
    }

    /// MiB that it has in memory beyond guest RAM, whose mapping is its largest.
    pub fn memory_mib(&self) -> Result<f64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?;
        let kib = |line: &str, key: &str| -> Option<u64> {
            let rest = line.strip_prefix(key)?.trim();
            rest.strip_suffix("kB")?.trim().parse().ok()
        };
        let (mut size, mut largest, mut of_largest, mut all) = (0, 0, 0, 0);
        for line in maps.lines() {
            size = kib(line, "Size:").unwrap_or(size);
            if let Some(resident) = kib(line, "Rss:") {
                all += resident;
                if size > largest {
                    (largest, of_largest) = (size, resident);
                }
            }
        }
        Ok((all - of_largest) as f64 / 1024.0)
    }

    /// Flips a bit in the middle of guest RAM, as broken memory would. RAM is the largest mapping.
    pub fn flip_ram_bit(&self) -> Result<()> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        let ranges = maps.lines().filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        let (start, end) = ranges.max_by_key(|(start, end)| end - start).context("no mappings")?;
        let middle = start + (end - start) / 2;
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", self.pid()))?;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, middle)?;
        Ok(memory.write_all_at(&[byte[0] ^ 4], middle)?)
    }

    /// Path of its API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Path of its event log.
    pub fn events(&self) -> PathBuf {
        self.log.with_extension("events")
    }

    /// Tells whether the process has ended.
    pub fn ended(&mut self) -> Result<bool> {
        let ended = self.child.try_wait()?.is_some();
        if ended {
            self.registered = None;
        }
        Ok(ended)
    }

    /// Waits for the end of the process; true: it ended without an error.
    pub fn wait_end(&mut self, limit: Duration) -> Result<bool> {
        let start = Instant::now();
        while !self.ended()? {
            if start.elapsed() > limit {
                bail!(
                    "{} did not end within {} s: {}",
                    self.name,
                    limit.as_secs(),
                    self.tail()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(self.child.wait()?.success())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill(2) on our own child, which was not waited for yet.
        if unsafe { libc::kill(self.child.id() as i32, signal) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// SIGKILL, and waits for the end. The moment at which the signal was sent is returned.
    pub fn kill(&mut self) -> Result<Instant> {
        let moment = Instant::now();
        self.child.kill()?;
        self.child.wait()?;
        self.registered = None;
        Ok(moment)
    }

    /// Polls until `ready` says so.
    pub fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !ready(self)? {
            if self.ended()? {
                bail!("{} ended while waiting for {what}: {}", self.name, self.tail());
            }
            if start.elapsed() > limit {
                bail!(
                    "{}: {what} did not come within {} s: {}",
                    self.name,
                    limit.as_secs(),
                    self.tail()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for an FT state.
    pub fn wait_ft_state(&mut self, state: &str, limit: Duration) -> Result<()> {
        let wait = self.wait_for(&format!("FT state {state}"), limit, |vmm| Ok(vmm.ft_state()? == state));
        wait.with_context(|| {
            format!(
                "{}: FT info: {:?}",
                self.name,
                self.ft_info().ok().map(|i| i.to_string())
            )
        })
    }

    /// The end of its log, for error messages.
    pub fn tail(&self) -> String {
        let text = |p: &Path| String::from_utf8_lossy(&std::fs::read(p).unwrap_or_default()).into_owned();
        let all = format!("{}\n{}", text(&self.log), text(&self.log.with_extension("err")));
        let lines: Vec<&str> = all.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
