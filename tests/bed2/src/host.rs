//! One nested host: a qemu process. Commands go to it through a virtio-serial port and files of the shared folder (see
//! `scripts/bed2.d/init`), so they need no network and their output survives a power cut.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bed::{Content, HostSpec};
use crate::places::Places;

/// A nested host; its process is killed when dropped.
pub struct Host {
    name: String,
    qemu: Child,
    port: UnixStream,
    heard: Arc<Heard>,
    out: PathBuf,
    commands: u32,
}

/// How often a host that does not answer is looked at for a crash.
const CRASH_CHECK: Duration = Duration::from_secs(2);

/// What a host said on its port.
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
    console: PathBuf,
}

#[derive(Default)]
struct State {
    ready: bool,
    gone: bool,
    status: HashMap<u32, i32>,
    asked: Vec<String>,
}

/// Result of a command on a host.
#[derive(Debug)]
pub struct Output {
    /// Exit status.
    pub status: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A command that runs on a host.
pub struct Running {
    id: u32,
    text: String,
    files: PathBuf,
    host: String,
    heard: Arc<Heard>,
}

impl Host {
    /// Starts the process; its disks are there ([`make_disks`]). `joined`: with a network interface to the other host.
    pub(crate) fn start(name: &str, spec: &HostSpec, joined: bool, places: &Places) -> Result<Self> {
        let out = &places.out;
        let control = places.sockets.join(name);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(arguments(name, spec, joined, places));
        let log = File::create(out.join(format!("logs/{name}-qemu.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A Ctrl-C in the terminal is for this program alone; qemu ends when its parent thread does.
        // SAFETY: setpgid(2) and prctl(2) are async-signal-safe and touch only the new process.
        unsafe {
            command.pre_exec(|| {
                libc::setpgid(0, 0);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut qemu = command.spawn().context("start qemu-system-x86_64")?;
        let port = match connect(&control, &mut qemu) {
            Ok(port) => port,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let log = fs::read_to_string(out.join(format!("logs/{name}-qemu.log"))).unwrap_or_default();
                return Err(error.context(format!("host {name}: {}", log.trim())));
            }
        };
        let heard = Arc::new(Heard {
            state: Mutex::default(),
            changed: Condvar::new(),
            console: places.out.join(format!("logs/{name}-console.log")),
        });
        let (reader, listener) = (port.try_clone()?, heard.clone());
        std::thread::Builder::new()
            .name(format!("host-{name}"))
            .spawn(move || listener.listen(reader))?;
        Ok(Self {
            name: name.into(),
            qemu,
            port,
            heard,
            out: out.clone(),
            commands: 0,
        })
    }

    /// `a` or `b`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bed's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Waits until the host takes commands.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let ready = self.heard.wait(limit, |state| state.ready.then_some(()));
        ready.with_context(|| {
            format!(
                "host {} did not boot within {} s: {}",
                self.name,
                limit.as_secs(),
                self.tail()
            )
        })
    }

    /// Starts a command (bash; `scripts/bed2.d/lib.sh` is read first).
    pub fn spawn(&mut self, command: &str) -> Result<Running> {
        self.commands += 1;
        let id = self.commands;
        let files = self.out.join(format!("cmd-{}/{id}", self.name));
        fs::write(&files, format!("{command}\n"))?;
        writeln!(self.port, "{id}").with_context(|| format!("host {} takes no commands", self.name))?;
        Ok(Running {
            id,
            text: command.lines().next().unwrap_or_default().to_string(),
            files,
            host: self.name.clone(),
            heard: self.heard.clone(),
        })
    }

    /// Runs a command; an error when it fails or takes longer than `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.spawn(command)?.wait(limit)?;
        if output.status != 0 {
            bail!(
                "host {}: `{}` ended with {}:\n{}{}",
                self.name,
                command.trim(),
                output.status,
                output.out,
                output.err
            );
        }
        Ok(output.out)
    }

    /// Cuts the power: ends the qemu process at once.
    pub fn cut(&mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// The lines that commands on the host wrote to the port (`cut b`, say) since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.heard.lock().asked)
    }

    /// Tells whether the process has ended.
    pub fn ended(&mut self) -> bool {
        !matches!(self.qemu.try_wait(), Ok(None))
    }

    /// Powers off and waits for the end; nothing when it has ended already.
    pub fn power_off(&mut self) -> Result<()> {
        if self.ended() {
            return Ok(());
        }
        self.run("sync", Duration::from_secs(60))?;
        writeln!(self.port, "off")?;
        let start = Instant::now();
        while !self.ended() {
            if start.elapsed() > Duration::from_secs(30) {
                bail!("host {} did not power off: {}", self.name, self.tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The end of its console.
    fn tail(&self) -> String {
        let text = self.heard.console();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Running {
    /// Tells whether it has ended, or its host has.
    pub fn ended(&self) -> bool {
        let state = self.heard.lock();
        state.status.contains_key(&self.id) || state.gone || self.heard.crashed()
    }

    /// Waits for its end.
    pub fn wait(self, limit: Duration) -> Result<Output> {
        let status = self.heard.wait(limit, |state| state.status.get(&self.id).copied());
        let output = Output {
            status: status.as_ref().copied().unwrap_or(-1),
            out: self.out(),
            err: fs::read_to_string(self.files.with_extension("err")).unwrap_or_default(),
        };
        status.with_context(|| {
            format!(
                "host {}: `{}` did not end within {} s; so far:\n{}{}",
                self.host,
                self.text,
                limit.as_secs(),
                output.out,
                output.err
            )
        })?;
        Ok(output)
    }

    /// What it has printed so far.
    pub fn out(&self) -> String {
        fs::read_to_string(self.files.with_extension("out")).unwrap_or_default()
    }
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// The host's kernel gave up, and may hang instead of ending; or one of its processors does not answer the others.
    fn crashed(&self) -> bool {
        let console = self.console();
        console.contains("Kernel panic - not syncing") || console.lines().any(stuck)
    }

    /// Reads the port until the host is gone.
    fn listen(&self, port: UnixStream) {
        for line in BufReader::new(port).lines() {
            let Ok(line) = line else { break };
            let mut state = self.lock();
            let numbers = line.split_once(' ').map(|(id, status)| (id.parse(), status.parse()));
            match numbers {
                Some((Ok(id), Ok(status))) => {
                    state.status.insert(id, status);
                }
                _ if line == "ready" => state.ready = true,
                _ => state.asked.push(line),
            }
            self.changed.notify_all();
        }
        self.lock().gone = true;
        self.changed.notify_all();
    }

    fn wait<T>(&self, limit: Duration, mut get: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(value) = get(&state) {
                return Ok(value);
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.gone {
                bail!("the host is off");
            }
            if self.crashed() {
                bail!("the emulated host crashed or hangs: {}", self.console.display());
            }
            if left.is_zero() {
                bail!("no answer in time");
            }
            state = self
                .changed
                .wait_timeout(state, left.min(CRASH_CHECK))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Whether the kernel's watchdog tells of a processor that made no progress for longer than a busy machine explains.
fn stuck(line: &str) -> bool {
    let seconds = line
        .split_once("soft lockup")
        .and_then(|(_, rest)| rest.split_once("stuck for "))
        .and_then(|(_, rest)| rest.split_once("s!"))
        .and_then(|(seconds, _)| seconds.parse::<u32>().ok());
    seconds.is_some_and(|seconds| seconds >= 45)
}

fn connect(path: &Path, qemu: &mut Child) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(port) => return Ok(port),
            Err(_) if qemu.try_wait()?.is_some() => bail!("qemu ended at once"),
            Err(error) if start.elapsed() > Duration::from_secs(20) => return Err(error).context("qemu's port"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Makes the disks of a host as they are at the start.
pub(crate) fn make_disks(name: &str, spec: &HostSpec, places: &Places) -> Result<()> {
    for disk in &spec.disks {
        let file = disk.file(&places.out, name);
        // The first host's turn was before.
        if !(disk.shared && file.exists()) {
            make_disk(&disk.content, &file)?;
        }
    }
    Ok(())
}

fn make_disk(content: &Content, file: &Path) -> Result<()> {
    match content {
        Content::CopyOf(source) => {
            let status = Command::new("cp")
                .args(["--sparse=always", "--reflink=auto"])
                .args([source, file])
                .status()?;
            if !status.success() {
                bail!("cannot copy {} to {}", source.display(), file.display());
            }
        }
        Content::BlankLike(like) => {
            let size = fs::metadata(like).with_context(|| like.display().to_string())?.len();
            File::create(file)?.set_len(size)?;
        }
    }
    Ok(())
}

/// The options of one host's qemu.
fn arguments(name: &str, spec: &HostSpec, joined: bool, places: &Places) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| args.extend([format!("-{option}"), value]);
    let host = places.images.join("host");
    let (out, control) = (quoted(&places.out), quoted(&places.sockets.join(name)));
    add("machine", "q35".into());
    add("accel", "tcg,thread=multi,tb-size=512".into());
    // Five-level page tables make each nested walk longer.
    add("cpu", "max,+svm,+npt,-la57".into());
    add("smp", spec.cpus.to_string());
    add("m", spec.memory.to_string());
    add("display", "none".into());
    add("monitor", "none".into());
    add("serial", format!("file:{out}/logs/{name}-console.log"));
    add("kernel", host.join("vmlinux").display().to_string());
    add("initrd", host.join("initrd").display().to_string());
    add(
        "append",
        format!("console=ttyS0 loglevel=5 mitigations=off net.ifnames=0 tsc=reliable panic=-1 bed.host={name}"),
    );
    let mut disk = |name: &str, file: &Path, mode: &str, device: &str| {
        let file = quoted(file);
        add("drive", format!("if=none,id={name},format=raw,file={file},{mode}"));
        add(
            "device",
            format!("virtio-blk-pci,drive={name},serial={name},disable-legacy=on{device}"),
        );
    };
    disk("root", &host.join("root.img"), "readonly=on", "");
    for extra in &spec.disks {
        // What qemu has written survives qemu's end; the machine's own crash is not what is tested here.
        let (mode, device) = match extra.shared {
            true => ("cache=unsafe,discard=unmap,file.locking=off", ",share-rw=on"),
            false => ("cache=unsafe,discard=unmap", ""),
        };
        disk(&extra.name, &extra.file(&places.out, name), mode, device);
    }
    let shares = [
        ("bed", quoted(&crate::places::repository().join("scripts/bed2.d")), true),
        ("bin", quoted(&places.programs), true),
        ("images", quoted(&places.images), true),
        ("out", out.clone(), false),
    ];
    for (tag, path, readonly) in shares {
        let mode = if readonly { "on" } else { "off" };
        add(
            "fsdev",
            format!("local,id={tag},path={path},security_model=passthrough,multidevs=remap,readonly={mode}"),
        );
        add("device", format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
    }
    if joined {
        let peer = if name == "a" { "b" } else { "a" };
        let net = |side: &str| quoted(&places.sockets.join(format!("net-{side}")));
        add(
            "netdev",
            format!(
                "dgram,id=net0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                net(name),
                net(peer)
            ),
        );
        let number = if name == "a" { 1 } else { 2 };
        add(
            "device",
            format!("virtio-net-pci,netdev=net0,mac=52:54:00:be:d1:0{number}"),
        );
    }
    add("object", "rng-random,id=rng0,filename=/dev/urandom".into());
    add("device", "virtio-rng-pci,rng=rng0".into());
    add("device", "virtio-serial-pci".into());
    add("chardev", format!("socket,id=bed,path={control},server=on,wait=off"));
    add("device", "virtserialport,chardev=bed,name=bed".into());
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
    args
}

/// A path as a value in qemu's options.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_soft_lockup_is_told_from_a_short_one() {
        let line =
            |s: u32| format!("[  265.4] watchdog: BUG: soft lockup - CPU#1 stuck for {s}s! [qemu-system-x86:424]");
        assert!(stuck(&line(52)) && !stuck(&line(26)));
        assert!(!stuck("guest login: ") && !stuck("soft lockup - CPU#1 stuck for ever"));
    }
}
