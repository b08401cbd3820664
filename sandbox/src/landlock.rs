//! Which files the process may touch from now on.
//!
//! The kernel restricts one thread at a time, and those that it starts later. A VM may come when there are threads
//! already (a request of the API, a primary), so every thread is told by a signal to restrict itself; what they have
//! open stays open. Restrictions can only grow: a second set of rules leaves what both allow.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use landlock::{ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr};
use thiserror::Error;

/// The newest rights that are handled; an older kernel handles those that it knows.
const RIGHTS: ABI = ABI::V5;

/// How long a thread may take to restrict itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// Reading files and directories.
    pub read: bool,
    /// Writing to files and devices; making and removing files in directories.
    pub write: bool,
    /// Removing files in a directory, nothing else of it.
    pub remove: bool,
}

impl Access {
    /// Reading.
    pub const READ: Self = Self {
        read: true,
        write: false,
        remove: false,
    };
    /// Reading and writing.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
        remove: false,
    };
    /// Removing.
    pub const REMOVE: Self = Self {
        read: false,
        write: false,
        remove: true,
    };

    /// Parses `r`, `w` or `rw`.
    pub fn parse(text: &str) -> Option<Self> {
        let (read, write) = match text {
            "r" => (true, false),
            "w" => (false, true),
            "rw" | "wr" => (true, true),
            _ => return None,
        };
        let remove = false;
        Some(Self { read, write, remove })
    }

    fn rights(self, directory: bool) -> BitFlags<AccessFs> {
        let mut rights = BitFlags::empty();
        if self.read {
            rights |= AccessFs::ReadFile | AccessFs::ReadDir;
        }
        if self.write {
            rights |= AccessFs::from_write(RIGHTS);
        }
        if self.remove {
            rights |= AccessFs::RemoveFile;
        }
        if directory {
            rights
        } else {
            rights & AccessFs::from_file(RIGHTS)
        }
    }
}

/// A file, or a directory with all that is in it, and what may be done there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Which.
    pub path: PathBuf,
    /// What.
    pub access: Access,
}

impl Rule {
    /// A rule.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        let path = path.into();
        Self { path, access }
    }
}

/// Why files are not restricted.
#[derive(Debug, Error)]
pub enum Error {
    /// No Landlock.
    #[error("this kernel has no Landlock, or it is not switched on (boot parameter lsm=): run without --landlock")]
    Unsupported,
    /// A path of a rule.
    #[error("Landlock rule for {path}: {source}")]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses the rules.
    #[error("Landlock rules: {0}")]
    Rules(#[from] landlock::RulesetError),
    /// The kernel refuses to restrict a thread.
    #[error("a thread cannot be restricted by Landlock: {0}")]
    Restrict(io::Error),
    /// A thread does not do it.
    #[error("thread {0} did not restrict itself by Landlock in time: end this VMM")]
    Stuck(String),
}

/// Whether the kernel can do it.
pub fn check() -> Result<(), Error> {
    ruleset(&[]).map(drop)
}

fn ruleset(rules: &[Rule]) -> Result<OwnedFd, Error> {
    let mut created = Ruleset::default().handle_access(AccessFs::from_all(RIGHTS))?.create()?;
    for Rule { path, access } in rules {
        let error = |source| Error::Path {
            path: path.clone(),
            source,
        };
        let rights = access.rights(fs::metadata(path).map_err(error)?.is_dir());
        let opened = PathFd::new(path).map_err(|e| error(io::Error::other(e)))?;
        created = created.add_rule(PathBeneath::new(opened, rights))?;
    }
    Option::<OwnedFd>::from(created).ok_or(Error::Unsupported)
}

/// The rules that hold now. Locked while threads are told.
static RULES: Mutex<Vec<Rule>> = Mutex::new(Vec::new());

/// What the signal's handler uses.
static RULESET: AtomicI32 = AtomicI32::new(-1);
static DONE: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicI32 = AtomicI32::new(0);

/// From now on no thread of this process touches any other file than those of `rules`. Every path must exist.
pub fn restrict(rules: &[Rule]) -> Result<(), Error> {
    let mut held = RULES.lock().unwrap_or_else(PoisonError::into_inner);
    // The kernel stacks up to 16 sets; the same one again (a VM that boots again) adds nothing.
    if held[..] == *rules {
        return Ok(());
    }
    let fd = ruleset(rules)?;
    RULESET.store(fd.as_raw_fd(), Ordering::SeqCst);
    FAILED.store(0, Ordering::SeqCst);
    install_handler();
    restrict_self();
    let result = tell_others();
    RULESET.store(-1, Ordering::SeqCst);
    result?;
    match FAILED.load(Ordering::SeqCst) {
        0 => {}
        errno => return Err(Error::Restrict(io::Error::from_raw_os_error(errno))),
    }
    *held = rules.to_vec();
    Ok(())
}

fn signal() -> libc::c_int {
    // The first one gets vCPUs out of the guest.
    libc::SIGRTMIN() + 1
}

fn install_handler() {
    // SAFETY: an all-zero sigaction is valid; the handler makes two system calls and uses atomics, nothing else.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal(), &action, std::ptr::null_mut());
    }
}

extern "C" fn on_signal(_: libc::c_int) {
    // SAFETY: the address of this thread's errno is valid.
    let errno = unsafe { *libc::__errno_location() };
    restrict_self();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    DONE.fetch_add(1, Ordering::SeqCst);
}

fn restrict_self() {
    let fd = RULESET.load(Ordering::SeqCst);
    // SAFETY: plain system calls, which take any number as descriptor.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::syscall(libc::SYS_landlock_restrict_self, fd, 0) != 0
    };
    if failed {
        // SAFETY: the address of this thread's errno is valid.
        FAILED.store(unsafe { *libc::__errno_location() }, Ordering::SeqCst);
    }
}

/// Tells all other threads, and those that they start meanwhile, until there is none that was not told.
fn tell_others() -> Result<(), Error> {
    // SAFETY: gettid(2) cannot fail.
    let me = unsafe { libc::gettid() };
    let mut told = HashSet::from([me]);
    loop {
        let new: Vec<i32> = tasks()?.into_iter().filter(|task| told.insert(*task)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for task in new {
            tell(task)?;
        }
    }
}

fn tasks() -> Result<Vec<i32>, Error> {
    let path = Path::new("/proc/self/task");
    let error = |source| Error::Path {
        path: path.into(),
        source,
    };
    let mut tasks = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        tasks.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(tasks)
}

fn name_of(task: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/self/task/{task}/comm")).ok()?;
    Some(name.trim_end().to_string())
}

fn tell(task: i32) -> Result<(), Error> {
    // Gone; or one of the kernel's own, for io_uring (it works with the rights of whoever asked) and for KVM.
    let Some(name) = name_of(task) else { return Ok(()) };
    if name.starts_with("iou-") || name.starts_with("kvm-") {
        return Ok(());
    }
    let before = DONE.load(Ordering::SeqCst);
    // SAFETY: plain system call; the handler is installed.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), task, signal()) };
    if sent != 0 {
        return Ok(());
    }
    let end = Instant::now() + PATIENCE;
    while DONE.load(Ordering::SeqCst) == before {
        if name_of(task).is_none() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(Error::Stuck(name));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_not_there_is_named() {
        let error = ruleset(&[Rule::new("/nonexistent/disk", Access::READ)]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
    }

    #[test]
    fn accesses() {
        assert_eq!(Access::parse("r"), Some(Access::READ));
        assert_eq!(Access::parse("rw"), Some(Access::READ_WRITE));
        assert_eq!(Access::parse("x"), None);
        assert!(!Access::READ_WRITE.rights(false).contains(AccessFs::MakeReg));
        assert!(Access::READ_WRITE.rights(true).contains(AccessFs::MakeReg));
        assert_eq!(Access::REMOVE.rights(true), AccessFs::RemoveFile);
    }
}
