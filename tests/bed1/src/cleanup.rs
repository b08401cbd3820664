//! Nothing is left behind: processes, namespaces and directories are registered before they exist, and removed by
//! their owners' drop, by a signal's handler thread, or by the next run when this one was killed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Something that must not outlive this program.
#[derive(Debug, Clone)]
enum Thing {
    Process(u32),
    Namespace(String),
    Directory(PathBuf),
}

static THINGS: Mutex<BTreeMap<u64, Thing>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);
/// Held for reading while something comes into being; a signal's handler takes it for writing and never gives it back.
static CREATING: RwLock<()> = RwLock::new(());
static INSTALL: Once = Once::new();

fn things() -> MutexGuard<'static, BTreeMap<u64, Thing>> {
    THINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a thing registered; dropping it only forgets the thing.
#[derive(Debug)]
pub struct Registered(u64);

impl Registered {
    fn new(thing: Thing) -> Self {
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        things().insert(key, thing);
        Self(key)
    }

    /// A network namespace that is about to be made.
    pub fn namespace(name: &str) -> Self {
        Self::new(Thing::Namespace(name.into()))
    }

    /// A directory that is about to be made.
    pub fn directory(path: &Path) -> Self {
        Self::new(Thing::Directory(path.into()))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        things().remove(&self.0);
    }
}

/// Runs `create` (or a removal) so that a signal's cleanup happens before or after it, not in its middle.
pub fn creating<T>(create: impl FnOnce() -> T) -> T {
    let _guard = CREATING.read().unwrap_or_else(PoisonError::into_inner);
    create()
}

/// Starts a process that is killed with this program, in a process group of its own (a terminal's Ctrl-C reaches this
/// program alone, which then cleans up).
///
/// The process also dies with the thread that starts it: start it from one that lives as long.
pub fn spawn(command: &mut Command) -> Result<(Child, Registered)> {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    let parent = std::process::id();
    // SAFETY: prctl(2), getppid(2) and _exit(2) are async-signal-safe and touch no memory of the parent.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            if libc::getppid() as u32 != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
    creating(|| {
        let child = command
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let registered = Registered::new(Thing::Process(child.id()));
        Ok((child, registered))
    })
}

/// Installs the handler of SIGINT, SIGTERM and SIGHUP (once), and removes what killed runs left behind.
pub fn install() -> Result<()> {
    let mut result = Ok(());
    INSTALL.call_once(|| result = install_once());
    result
}

fn install_once() -> Result<()> {
    sweep();
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signal handler")?;
    std::thread::Builder::new().name("cleanup".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let guard = CREATING.write().unwrap_or_else(PoisonError::into_inner);
            eprintln!("interrupted, cleaning up");
            remove_all();
            std::mem::forget(guard);
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

fn remove_all() {
    let all: Vec<Thing> = things().values().cloned().collect();
    for thing in &all {
        if let Thing::Process(pid) = thing {
            // SAFETY: kill(2) of our own child; its number is not given anew before it was waited for, which ends its
            // registration first.
            unsafe { libc::kill(*pid as i32, libc::SIGKILL) };
        }
    }
    for thing in &all {
        match thing {
            Thing::Process(pid) => wait_gone(*pid),
            Thing::Namespace(name) => delete_namespace(name),
            Thing::Directory(path) => delete_directory(path),
        }
    }
}

/// Waits until a killed child is a zombie or gone, so that the files and taps it held are free.
fn wait_gone(pid: u32) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = state
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim_start().chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Deletes a network namespace, when it is there.
pub fn delete_namespace(name: &str) {
    let quiet = Command::new("ip")
        .args(["netns", "del", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // Nothing to do about a failure here; the leftover test would show it.
    drop(quiet);
}

/// Deletes a directory, when it is there, and takes away first what is mounted in it.
pub fn delete_directory(path: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for point in points.filter(|point| Path::new(point).starts_with(path)) {
        drop(
            Command::new("umount")
                .args(["-l", point])
                .stderr(Stdio::null())
                .status(),
        );
    }
    drop(std::fs::remove_dir_all(path));
}

/// Name of the `index`-th namespace or directory of this process.
pub fn name(index: u64) -> String {
    format!("ftbed{}n{index}", std::process::id())
}

/// The process whose namespace or directory this is.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("ftbed")?.split_once('n')?.0.parse().ok()
}

/// Names in `dir` that a bed's process made; of a process that lives (`alive`) or not.
pub fn names_in(dir: &Path, alive: bool) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| owner(name).is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists() == alive))
        .collect()
}

fn sweep() {
    for name in names_in(Path::new("/run/netns"), false) {
        delete_namespace(&name);
    }
    let temp = std::env::temp_dir();
    for name in names_in(&temp, false) {
        if !temp.join(&name).join(KEEP).exists() {
            delete_directory(&temp.join(&name));
        }
    }
}

/// A file of this name keeps a directory from being swept.
pub const KEEP: &str = "kept-for-inspection";
