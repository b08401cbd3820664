//! The table: what each kind of thread asks of the kernel.
//!
//! Groups of calls first, then the rows. A group says what it is for; a row is the sum of its groups. An ioctl is known
//! by its lower 16 bits, type and number: the size of the argument differs between versions of an interface.

use libc::c_long;

use crate::threads::ThreadKind;

/// When a system call is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// Whatever its arguments.
    Always,
    /// When the lower half of an argument, masked, has this value.
    Masked {
        /// Which argument, from 0.
        argument: u8,
        /// Bits that count.
        mask: u64,
        /// What they must be.
        value: u64,
    },
    /// When its first argument is this process.
    OwnProcess,
}

/// A system call that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: c_long,
    /// When.
    pub only: Only,
}

pub(crate) const fn call(number: c_long) -> Call {
    Call {
        number,
        only: Only::Always,
    }
}

const fn masked(number: c_long, argument: u8, mask: u64, value: u64) -> Call {
    Call {
        number,
        only: Only::Masked { argument, mask, value },
    }
}

const fn ioctl(code: u64) -> Call {
    masked(libc::SYS_ioctl, 1, 0xffff, code & 0xffff)
}

/// An ioctl of KVM by its number.
const fn kvm(number: u64) -> Call {
    ioctl(0xae00 | number)
}

const fn prctl(option: libc::c_int) -> Call {
    masked(libc::SYS_prctl, 0, 0xffff_ffff, option as u64)
}

const fn socket(family: libc::c_int) -> Call {
    masked(libc::SYS_socket, 0, 0xffff_ffff, family as u64)
}

/// Every thread: memory, locks, clocks, its own start, panic and end, reading and writing what is open, the log.
const EVERY: &[Call] = &[
    call(libc::SYS_read),
    call(libc::SYS_write),
    call(libc::SYS_readv),
    call(libc::SYS_writev),
    call(libc::SYS_close),
    call(libc::SYS_dup),
    masked(libc::SYS_fcntl, 1, 0xffff_ffff, libc::F_DUPFD_CLOEXEC as u64),
    masked(libc::SYS_fcntl, 1, 0xffff_ffff, libc::F_GETFD as u64),
    masked(libc::SYS_fcntl, 1, 0xffff_ffff, libc::F_GETFL as u64),
    masked(libc::SYS_fcntl, 1, 0xffff_ffff, libc::F_SETFL as u64),
    call(libc::SYS_futex),
    masked(libc::SYS_mmap, 2, libc::PROT_EXEC as u64, 0),
    masked(libc::SYS_mprotect, 2, libc::PROT_EXEC as u64, 0),
    call(libc::SYS_munmap),
    call(libc::SYS_mremap),
    call(libc::SYS_madvise),
    call(libc::SYS_brk),
    call(libc::SYS_getrandom),
    call(libc::SYS_clock_gettime),
    call(libc::SYS_clock_getres),
    call(libc::SYS_clock_nanosleep),
    call(libc::SYS_nanosleep),
    call(libc::SYS_gettimeofday),
    call(libc::SYS_time),
    // Asked, not set.
    masked(libc::SYS_prlimit64, 2, 0xffff_ffff, 0),
    call(libc::SYS_restart_syscall),
    call(libc::SYS_sched_yield),
    call(libc::SYS_sched_getaffinity),
    call(libc::SYS_getpid),
    call(libc::SYS_gettid),
    call(libc::SYS_rt_sigprocmask),
    call(libc::SYS_rt_sigaction),
    call(libc::SYS_rt_sigreturn),
    call(libc::SYS_sigaltstack),
    Call {
        number: libc::SYS_tgkill,
        only: Only::OwnProcess,
    },
    call(libc::SYS_set_robust_list),
    call(libc::SYS_rseq),
    call(libc::SYS_membarrier),
    prctl(libc::PR_SET_NAME),
    prctl(libc::PR_SET_VMA),
    prctl(libc::PR_SET_TIMERSLACK),
    prctl(libc::PR_SET_NO_NEW_PRIVS),
    // Takes rights away, see `crate::landlock`.
    call(libc::SYS_landlock_restrict_self),
    // A signal's handler may run on any thread and wakes the one that waits for signals.
    call(libc::SYS_sendto),
    // A panic gives the terminal back; TIOCSTI, which would type into it, is not here.
    ioctl(libc::TCGETS),
    ioctl(libc::TCSETS),
    call(libc::SYS_exit),
    call(libc::SYS_exit_group),
];

/// Starting threads, no processes. The arguments of clone3 cannot be looked at, so the spawner's second filter says that
/// there is no such call, and the C library goes on with clone.
const START_THREADS: &[Call] = &[
    call(libc::SYS_clone3),
    masked(libc::SYS_clone, 0, THREAD_FLAGS, THREAD_FLAGS),
];

const THREAD_FLAGS: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;

/// Waiting for descriptors.
const WAIT: &[Call] = &[
    call(libc::SYS_epoll_create1),
    call(libc::SYS_eventfd2),
    call(libc::SYS_epoll_wait),
    call(libc::SYS_epoll_pwait),
    call(libc::SYS_epoll_ctl),
    call(libc::SYS_poll),
    call(libc::SYS_ppoll),
];

/// Working on connections that are open.
const STREAM: &[Call] = &[
    call(libc::SYS_recvfrom),
    call(libc::SYS_recvmsg),
    call(libc::SYS_sendmsg),
    call(libc::SYS_shutdown),
    call(libc::SYS_getsockopt),
    call(libc::SYS_setsockopt),
    call(libc::SYS_getsockname),
    call(libc::SYS_getpeername),
    ioctl(libc::FIONBIO),
    call(libc::SYS_poll),
    call(libc::SYS_ppoll),
];

/// Accepting connections.
const ACCEPT: &[Call] = &[call(libc::SYS_accept4)];

/// Removing the API socket's file, if it is still the same.
const API_SOCKET: &[Call] = &[
    call(libc::SYS_statx),
    call(libc::SYS_lstat),
    call(libc::SYS_newfstatat),
    call(libc::SYS_unlink),
];

/// Taking a narrower filter.
const NARROW: &[Call] = &[call(libc::SYS_seccomp)];

/// Making connections, and what they need: names of hosts.
const CONNECT: &[Call] = &[
    socket(libc::AF_UNIX),
    socket(libc::AF_INET),
    socket(libc::AF_INET6),
    socket(libc::AF_NETLINK),
    call(libc::SYS_socketpair),
    call(libc::SYS_connect),
    call(libc::SYS_bind),
    call(libc::SYS_listen),
    call(libc::SYS_sendmmsg),
    ioctl(libc::FIONREAD),
    // The resolver loads its plug-ins.
    call(libc::SYS_mmap),
    call(libc::SYS_mprotect),
    call(libc::SYS_uname),
    call(libc::SYS_getuid),
    call(libc::SYS_geteuid),
];

/// Files by name.
const FILES: &[Call] = &[
    call(libc::SYS_open),
    call(libc::SYS_openat),
    call(libc::SYS_stat),
    call(libc::SYS_lstat),
    call(libc::SYS_newfstatat),
    call(libc::SYS_access),
    call(libc::SYS_faccessat),
    call(libc::SYS_faccessat2),
    call(libc::SYS_readlink),
    call(libc::SYS_readlinkat),
    call(libc::SYS_getcwd),
    call(libc::SYS_getdents64),
    call(libc::SYS_mkdir),
    call(libc::SYS_mkdirat),
    call(libc::SYS_rmdir),
    call(libc::SYS_unlink),
    call(libc::SYS_unlinkat),
    call(libc::SYS_rename),
    call(libc::SYS_renameat),
    call(libc::SYS_renameat2),
    call(libc::SYS_link),
    call(libc::SYS_linkat),
    call(libc::SYS_statfs),
];

/// Files that are open, disks above all.
const FILE_IO: &[Call] = &[
    call(libc::SYS_lseek),
    call(libc::SYS_fstat),
    call(libc::SYS_statx),
    call(libc::SYS_fstatfs),
    call(libc::SYS_pread64),
    call(libc::SYS_pwrite64),
    call(libc::SYS_preadv),
    call(libc::SYS_pwritev),
    call(libc::SYS_preadv2),
    call(libc::SYS_pwritev2),
    call(libc::SYS_fsync),
    call(libc::SYS_fdatasync),
    call(libc::SYS_sync_file_range),
    call(libc::SYS_fallocate),
    call(libc::SYS_ftruncate),
    call(libc::SYS_fadvise64),
    call(libc::SYS_copy_file_range),
    call(libc::SYS_sendfile),
    call(libc::SYS_io_uring_enter),
];

/// Locks of disks that are open: a handover, and the end of FT, pass them on.
const DISK_LOCKS: &[Call] = &[masked(libc::SYS_fcntl, 1, 0xffff_ffff, libc::F_OFD_SETLK as u64)];

/// Restricting the process's files. Its threads are found in /proc and told by a signal.
const LANDLOCK: &[Call] = &[
    call(libc::SYS_landlock_create_ruleset),
    call(libc::SYS_landlock_add_rule),
];

/// Making files: disks are locked, files get their modes.
const FILE_SETUP: &[Call] = &[
    call(libc::SYS_fchmod),
    call(libc::SYS_flock),
    call(libc::SYS_fcntl),
    call(libc::SYS_io_uring_setup),
    call(libc::SYS_io_uring_register),
    ioctl(BLKSSZGET),
    ioctl(BLKGETSIZE64),
];

const BLKSSZGET: u64 = 0x1268;
const BLKGETSIZE64: u64 = 0x1272;

/// Making taps.
const TAP_SETUP: &[Call] = &[
    socket(libc::AF_INET),
    socket(libc::AF_INET6),
    ioctl(libc::TUNSETIFF),
    ioctl(libc::TUNSETVNETHDRSZ),
    ioctl(libc::TUNSETOFFLOAD),
    ioctl(libc::SIOCGIFFLAGS),
    ioctl(libc::SIOCSIFFLAGS),
    ioctl(libc::SIOCGIFINDEX),
    ioctl(libc::SIOCSIFHWADDR),
    ioctl(libc::SIOCSIFMTU),
    ioctl(libc::SIOCSIFADDR),
    ioctl(libc::SIOCSIFNETMASK),
];

/// What a device does on the thread that happens to need it: a driver's or the VMM's wish to reset, hold or go on.
const DEVICE: &[Call] = &[
    call(libc::SYS_epoll_ctl),
    call(libc::SYS_io_uring_enter),
    call(libc::SYS_poll),
    ioctl(libc::TUNSETOFFLOAD),
    kvm(KVM_SIGNAL_MSI),
    kvm(KVM_SET_GSI_ROUTING),
    kvm(KVM_IRQFD),
    kvm(KVM_IOEVENTFD),
];

const KVM_SET_GSI_ROUTING: u64 = 0x6a;
const KVM_IRQFD: u64 = 0x76;
const KVM_IOEVENTFD: u64 = 0x79;
const KVM_SIGNAL_MSI: u64 = 0xa5;

/// Running a vCPU. First, so that the filter decides it at once.
const RUN: &[Call] = &[kvm(0x80)];

/// Reading a vCPU's state, on its own thread before a checkpoint and after a triple fault; emptying full dirty rings.
const VCPU_STATE: &[Call] = &[
    // Its own.
    masked(libc::SYS_sched_setaffinity, 0, 0xffff_ffff, 0),
    LOWER,
    // Registers, segment registers, MSRs, local APIC.
    kvm(0x81),
    kvm(0x83),
    kvm(0x88),
    kvm(0x8e),
    // MP state, events, debug registers, TSC frequency, XSAVE, XCRs, XSAVE2.
    kvm(0x98),
    kvm(0x9f),
    kvm(0xa1),
    kvm(0xa3),
    kvm(0xa4),
    kvm(0xa6),
    kvm(0xcf),
    // Attributes: the TSC offset.
    kvm(0xe2),
    kvm(0xe3),
    // Dirty rings.
    kvm(0xc7),
];

/// All of KVM, for those who make virtual machines, load states or harvest dirty pages.
const KVM: &[Call] = &[masked(libc::SYS_ioctl, 1, 0xff00, 0xae00)];

/// Making a virtual machine's parts.
const MACHINE_SETUP: &[Call] = &[
    call(libc::SYS_memfd_create),
    call(libc::SYS_sysinfo),
    call(libc::SYS_dup3),
];

/// The terminal that a guest's console is put on.
const TERMINAL: &[Call] = &[ioctl(libc::TIOCGPGRP), call(libc::SYS_getpgrp)];

/// Asking an arbiter in etcd: connections, certificates. Names are looked up on a thread of the library's own, which has
/// this thread's filter.
const ASK_ETCD: &[&[Call]] = &[WAIT, STREAM, CONNECT, FILES, START_THREADS];

/// Taking real-time priority, and giving it to a vCPU's thread.
const HURRY: &[Call] = &[
    masked(libc::SYS_sched_setscheduler, 1, 0xffff_ffff, libc::SCHED_FIFO as u64),
    LOWER,
];

/// Giving it back.
const LOWER: Call = masked(libc::SYS_sched_setscheduler, 1, 0xffff_ffff, libc::SCHED_OTHER as u64);

/// Groups of whoever builds, resets, restores or ends virtual machines.
const MACHINE: &[&[Call]] = &[
    EVERY,
    WAIT,
    FILES,
    FILE_IO,
    FILE_SETUP,
    LANDLOCK,
    TAP_SETUP,
    DEVICE,
    KVM,
    MACHINE_SETUP,
];

/// The row of a kind: all calls that its threads may make.
pub fn calls(kind: ThreadKind) -> Vec<Call> {
    use ThreadKind as Kind;
    let groups: Vec<&[Call]> = match kind {
        Kind::Main | Kind::ApiWorker => [MACHINE, ASK_ETCD, &[TERMINAL]].concat(),
        Kind::Spawner => {
            let others = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Spawner);
            let mut all = [RUN, START_THREADS, NARROW].concat();
            for call in others.flat_map(calls) {
                if !all.contains(&call) {
                    all.push(call);
                }
            }
            return all;
        }
        // The end of a VM ends FT's connection.
        Kind::Control => [MACHINE, &[STREAM]].concat(),
        Kind::ApiServer => vec![EVERY, WAIT, STREAM, ACCEPT, API_SOCKET],
        Kind::EventMonitor | Kind::FtThrottle => vec![EVERY],
        Kind::Signals => vec![EVERY, WAIT, STREAM],
        Kind::SerialInput => vec![EVERY, WAIT, DEVICE],
        Kind::Vcpu => vec![RUN, EVERY, VCPU_STATE, DEVICE],
        Kind::Virtio => vec![EVERY, WAIT, FILE_IO, DEVICE],
        Kind::DiskIo | Kind::FtAudit => vec![EVERY, FILE_IO],
        Kind::Announce => vec![EVERY, DEVICE],
        Kind::FtControl => vec![EVERY, STREAM, FILE_IO, DISK_LOCKS, DEVICE, KVM, HURRY],
        // Any of them may release outputs: frames and console bytes, which are written to what is open.
        Kind::FtReceiver | Kind::FtSender | Kind::FtPulse => vec![EVERY, STREAM, DISK_LOCKS],
        Kind::FtDisks => vec![EVERY, STREAM, FILE_IO, DISK_LOCKS],
        Kind::FtArbiter => [ASK_ETCD, &[EVERY, FILE_IO]].concat(),
        Kind::FtListen => vec![EVERY, STREAM, ACCEPT],
        Kind::FtAdmission => [MACHINE, ASK_ETCD, &[NARROW]].concat(),
        Kind::FtBackup => vec![EVERY, STREAM, FILE_IO],
        Kind::FtApplier => [MACHINE, &[STREAM]].concat(),
        // Makes the handshake, which asks the arbiter; opens the disks of the VM that is to be protected.
        Kind::FtSupervisor => [ASK_ETCD, &[EVERY, FILE_IO]].concat(),
    };
    groups.concat()
}
