//! One VMM process of the bed, and the client that speaks to it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A running `cloud-hypervisor`; killed when dropped.
pub struct Vmm {
    /// Its name in messages: `a1`, `b2` ...
    pub name: String,
    child: Child,
    socket: PathBuf,
    ch_remote: PathBuf,
    log: PathBuf,
}

/// Where the binaries are: beside this program.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let dir = me.ancestors().skip(1).find(|dir| dir.join(name).is_file());
    let dir = dir.with_context(|| format!("{name} is not built: run `cargo build --release` first"))?;
    Ok(dir.join(name))
}

impl Vmm {
    /// Starts a VMM in namespace `ns` with further `args`; its files go to `dir`.
    pub fn start(name: &str, ns: &str, dir: &Path, args: &[String]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let log = dir.join(format!("{name}.log"));
        let stderr = File::create(dir.join(format!("{name}.err")))?;
        let child = Command::new("ip")
            .args(["netns", "exec", ns])
            .arg(binary("cloud-hypervisor")?)
            .arg("--api-socket")
            .arg(&socket)
            .arg("--log-file")
            .arg(&log)
            .arg("-v")
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("start cloud-hypervisor")?;
        let mut this = Self {
            name: name.into(),
            child,
            socket,
            ch_remote: binary("ch-remote")?,
            log,
        };
        this.wait_for("the API socket", Duration::from_secs(20), |vmm| {
            Ok(vmm.remote(&["ping"]).is_ok())
        })?;
        Ok(this)
    }

    /// Runs `ch-remote` against this VMM and returns what it printed.
    pub fn remote(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.ch_remote)
            .arg("--api-socket")
            .arg(&self.socket)
            .args(args)
            .output()
            .context("start ch-remote")?;
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

    /// `ch-remote ft info --json`.
    pub fn ft_info(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.remote(&["ft", "info", "--json"])?)?)
    }

    /// FT's state, for example `protected`.
    pub fn ft_state(&self) -> Result<String> {
        Ok(self.ft_info()?["state"].as_str().unwrap_or_default().to_string())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells whether the process has ended.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill(2) on our own child, which was not waited for yet.
        if unsafe { libc::kill(self.child.id() as i32, signal) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
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
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits for an FT state.
    pub fn wait_ft_state(&mut self, state: &str, limit: Duration) -> Result<()> {
        self.wait_for(&format!("FT state {state}"), limit, |vmm| Ok(vmm.ft_state()? == state))
    }

    /// The end of its log, for error messages.
    pub fn tail(&self) -> String {
        let text = |p: &Path| std::fs::read_to_string(p).unwrap_or_default();
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
