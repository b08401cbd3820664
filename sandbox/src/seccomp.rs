//! From the table to filters, and from filters to threads.

use std::collections::{BTreeMap, HashMap};
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error;

use crate::table::{Call, Only, call, calls};
use crate::threads::ThreadKind;

/// What happens at a system call that a thread's list does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// There are no filters.
    Off,
    /// The kernel ends the process.
    #[default]
    Kill,
    /// The kernel logs it and lets it pass: to find what is missing.
    Log,
}

/// Why there are no filters.
#[derive(Debug, Error)]
pub enum Error {
    /// The table makes no filter.
    #[error("the filter of {kind:?} cannot be made: {source}")]
    Compile {
        /// Whose.
        kind: ThreadKind,
        /// Why.
        source: seccompiler::BackendError,
    },
    /// The kernel does not take it.
    #[error("the kernel refuses it: {0} (does it have seccomp filters? --seccomp false goes on without)")]
    Apply(#[from] seccompiler::Error),
    /// No thread to be had.
    #[error("cannot start a thread: {0}")]
    Spawner(io::Error),
    /// There are filters already.
    #[error("this process has its filters already")]
    Twice,
}

/// The filters of all kinds.
///
/// Some calls fail by a second filter, they do not end the process, because the C library can do without. Its allocator
/// looks into /sys and /proc now and then, on any thread: opening a file fails where the row has no files by name. And it
/// tries clone3 before clone: the first thread and the spawner have no such call, nor has any thread that it starts.
pub struct Filters(HashMap<ThreadKind, Vec<BpfProgram>>);

impl Filters {
    /// Compiles the table; `None` when there are to be none.
    pub fn compile(mode: Mode) -> Result<Option<Self>, Error> {
        let violation = match mode {
            Mode::Off => return Ok(None),
            Mode::Kill => SeccompAction::KillProcess,
            Mode::Log => SeccompAction::Log,
        };
        let filter = |kind: ThreadKind| {
            let mut calls = calls(kind);
            let mut programs = Vec::new();
            let first = matches!(kind, ThreadKind::Main | ThreadKind::Spawner);
            let (refused, error) = match kind {
                _ if first => (call(libc::SYS_clone3), libc::ENOSYS),
                _ => (call(libc::SYS_openat), libc::EACCES),
            };
            if mode == Mode::Kill && (first || !calls.contains(&refused)) {
                let error = SeccompAction::Errno(error as u32);
                programs.push(compile(&[refused], SeccompAction::Allow, error));
                calls.push(refused);
            }
            // The last: it forbids to add filters.
            programs.push(compile(&calls, violation.clone(), SeccompAction::Allow));
            let programs: Result<_, _> = programs.into_iter().collect();
            Ok((kind, programs.map_err(|source| Error::Compile { kind, source })?))
        };
        let all: Result<_, Error> = ThreadKind::ALL.into_iter().map(filter).collect();
        Ok(Some(Self(all?)))
    }

    /// Filters the calling thread as one of `kind`.
    pub fn apply(&self, kind: ThreadKind) -> Result<(), Error> {
        for program in &self.0[&kind] {
            seccompiler::apply_filter(program)?;
        }
        Ok(())
    }
}

/// A filter that does `listed` with `calls` and `other` with all others.
fn compile(
    calls: &[Call],
    other: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let always = |number| calls.iter().any(|c| c.number == number && c.only == Only::Always);
    let mut done: Vec<&Call> = Vec::new();
    for call in calls {
        let conditions = rules.entry(call.number).or_default();
        // No conditions at all mean always.
        if always(call.number) || done.contains(&call) {
            continue;
        }
        done.push(call);
        let (argument, operator, value) = match call.only {
            Only::Always => continue,
            Only::Masked { argument, mask, value } => (argument, SeccompCmpOp::MaskedEq(mask), value),
            Only::OwnProcess => (0, SeccompCmpOp::Eq, u64::from(std::process::id())),
        };
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        conditions.push(SeccompRule::new(vec![condition])?);
    }
    SeccompFilter::new(rules, other, listed, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` under the filter of `kind` in a child; the signal that ended it, or 0.
    fn signal_of(kind: ThreadKind, mode: Mode, body: fn()) -> i32 {
        let filters = Filters::compile(mode).unwrap().unwrap();
        // SAFETY: the child makes only async-signal-safe calls: prctl and seccomp, those of `body`, and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let applied = filters.apply(kind).is_ok();
            body();
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::syscall(libc::SYS_exit_group, i32::from(!applied)) };
        }
        let mut status = 0;
        // SAFETY: `status` is valid for the time of the call.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        if libc::WIFSIGNALED(status) {
            return libc::WTERMSIG(status);
        }
        assert_eq!(libc::WEXITSTATUS(status), 0, "the filter was not applied");
        0
    }

    fn execute() {
        // SAFETY: the pointers are to NUL-terminated constants; the call fails where it is allowed.
        unsafe { libc::syscall(libc::SYS_execve, c"/nonexistent".as_ptr(), 0usize, 0usize) };
    }

    fn ptrace() {
        // SAFETY: the request does not exist, nothing is touched.
        unsafe { libc::syscall(libc::SYS_ptrace, 0xffff, 0, 0, 0) };
    }

    fn try_open() -> bool {
        // SAFETY: the path is a NUL-terminated constant.
        unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_RDONLY) >= 0 }
    }

    fn open() {
        if !try_open() {
            std::process::abort();
        }
    }

    fn cannot_open() {
        if try_open() {
            std::process::abort();
        }
    }

    fn unlink() {
        // SAFETY: the path is a NUL-terminated constant, and there is no such file.
        unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, c"/nonexistent".as_ptr(), 0) };
    }

    fn inject_key() {
        // SAFETY: TIOCSTI reads one byte; the descriptor is none.
        unsafe { libc::syscall(libc::SYS_ioctl, -1, libc::TIOCSTI, c"x".as_ptr()) };
    }

    fn run_vcpu() {
        // SAFETY: the descriptor is none.
        unsafe { libc::syscall(libc::SYS_ioctl, -1, 0xae80, 0) };
    }

    fn executable_memory() {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping that nobody uses.
        unsafe { libc::syscall(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0) };
    }

    fn start_process() {
        // SAFETY: the child, if there is one, ends at once.
        unsafe {
            if libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) == 0 {
                libc::syscall(libc::SYS_exit_group, 0);
            }
        }
    }

    fn kill_init() {
        // SAFETY: signal 0 only asks.
        unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
    }

    fn open_raw_socket() {
        // SAFETY: plain system call.
        unsafe { libc::syscall(libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0) };
    }

    #[test]
    fn a_forbidden_call_ends_the_process() {
        for kind in ThreadKind::ALL {
            for body in [execute, start_process, ptrace, kill_init, inject_key, open_raw_socket] {
                assert_eq!(signal_of(kind, Mode::Kill, body), libc::SIGSYS, "{kind:?}");
            }
            assert_eq!(signal_of(kind, Mode::Kill, || ()), 0, "{kind:?}");
        }
    }

    #[test]
    fn kinds_differ_in_what_they_may() {
        assert_eq!(signal_of(ThreadKind::ApiWorker, Mode::Kill, open), 0);
        assert_eq!(signal_of(ThreadKind::Vcpu, Mode::Kill, run_vcpu), 0);
        for kind in [
            ThreadKind::Vcpu,
            ThreadKind::Virtio,
            ThreadKind::ApiServer,
            ThreadKind::FtBackup,
        ] {
            assert_eq!(signal_of(kind, Mode::Kill, cannot_open), 0, "{kind:?}");
            assert_eq!(signal_of(kind, Mode::Kill, unlink), libc::SIGSYS, "{kind:?}");
            assert_eq!(signal_of(kind, Mode::Kill, executable_memory), libc::SIGSYS, "{kind:?}");
        }
        for kind in [ThreadKind::Virtio, ThreadKind::ApiServer, ThreadKind::FtBackup] {
            assert_eq!(signal_of(kind, Mode::Kill, run_vcpu), libc::SIGSYS, "{kind:?}");
        }
    }

    #[test]
    fn log_mode_lets_it_pass() {
        assert_eq!(signal_of(ThreadKind::Vcpu, Mode::Log, open), 0);
    }

    #[test]
    fn no_filters_when_off() {
        assert!(Filters::compile(Mode::Off).unwrap().is_none());
    }

    #[test]
    fn the_spawner_may_do_what_its_threads_may() {
        let spawner = calls(ThreadKind::Spawner);
        for kind in ThreadKind::ALL {
            let missing: Vec<_> = calls(kind).into_iter().filter(|call| !spawner.contains(call)).collect();
            assert!(missing.is_empty(), "{kind:?}: {missing:?}");
        }
    }
}
