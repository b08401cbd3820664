//! `cloud-hypervisor` as a process. These tests need /dev/kvm (their names say so) and fail without it.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::{Client, ClientError, VmState};

/// A running VMM; killed when dropped.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cloud-hypervisor"));
    command.stdin(Stdio::null());
    command
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Vmm {
    fn start(command: &mut Command, socket: &Path) -> (Self, Client) {
        let vmm = Self(command.arg("--api-socket").arg(socket).spawn().unwrap());
        let client = Client::new(socket).with_timeout(Duration::from_secs(10));
        wait_until("the API", || client.ping().is_ok());
        (vmm, client)
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill(2) on a child that was not waited for yet.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    /// Exit status of a process that is about to end.
    fn end(mut self) -> Option<i32> {
        let mut status = None;
        wait_until("the end of the VMM", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

/// A PVH kernel that does nothing: cli; hlt; jmp to itself.
fn idle_kernel(dir: &Path) -> PathBuf {
    const ENTRY: u32 = 0x10_0000;
    const CODE: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
    let mut elf = Vec::new();
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let put = |elf: &mut Vec<u8>, bytes: &[&[u8]]| bytes.iter().for_each(|b| elf.extend_from_slice(b));
    let u64s = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    // Type EXEC, machine x86-64, version 1, entry, program headers at 64, no sections; sizes and counts.
    put(
        &mut elf,
        &[&[2, 0, 62, 0, 1, 0, 0, 0], &u64s(&[u64::from(ENTRY), 64, 0]), &[0; 4]],
    );
    put(&mut elf, &[&[64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]]);
    let (code_at, note_at) = (0x1000u64, 0x1100u64);
    let (entry, code_len, note_len) = (u64::from(ENTRY), CODE.len() as u64, 20u64);
    // A segment to load, readable and executable; and the note with the 32-bit entry.
    put(
        &mut elf,
        &[
            &[1, 0, 0, 0, 5, 0, 0, 0],
            &u64s(&[code_at, entry, entry, code_len, code_len, 0x1000]),
        ],
    );
    put(
        &mut elf,
        &[
            &[4, 0, 0, 0, 4, 0, 0, 0],
            &u64s(&[note_at, 0, 0, note_len, note_len, 4]),
        ],
    );
    elf.resize(code_at as usize, 0);
    elf.extend_from_slice(CODE);
    elf.resize(note_at as usize, 0);
    put(
        &mut elf,
        &[&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0], b"Xen\0", &ENTRY.to_le_bytes()],
    );
    let path = dir.join("kernel");
    std::fs::write(&path, elf).unwrap();
    path
}

#[test]
fn kvm_the_api_serves_until_a_signal_and_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let (vmm, client) = Vmm::start(&mut command(), &socket);
        assert_eq!(client.info().unwrap_err().api().map(|e| e.status), Some(404));
        let second = command().arg("--api-socket").arg(&socket).output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&second.stderr).contains("another VMM listens there"));
        vmm.signal(signal);
        assert_eq!(vmm.end(), Some(0));
        assert!(!socket.exists());
    }
}

#[test]
fn kvm_a_killed_vmm_leaves_a_socket_that_the_next_one_replaces() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let (vmm, client) = Vmm::start(&mut command(), &socket);
    vmm.signal(libc::SIGKILL);
    assert_eq!(vmm.end(), None);
    assert!(matches!(client.ping(), Err(ClientError::Refused(_))));
    let (vmm, client) = Vmm::start(&mut command(), &socket);
    client.put("vmm.shutdown").unwrap();
    assert_eq!(vmm.end(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn kvm_a_vm_lives_by_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let events = dir.path().join("events");
    let mut command = command();
    command.arg("--event-monitor").arg(format!("path={}", events.display()));
    let (vmm, client) = Vmm::start(&mut command, &socket);
    let config = serde_json::json!({
        "payload": {"kernel": idle_kernel(dir.path())}, "memory": {"size": 64 << 20}, "console": {"mode": "Off"},
    });
    client.put_json("vm.create", &config).unwrap();
    assert_eq!(client.info().unwrap().state, VmState::Created);
    client.put("vm.boot").unwrap();
    assert_eq!(client.info().unwrap().state, VmState::Running);
    client.put("vm.pause").unwrap();
    assert_eq!(client.info().unwrap().state, VmState::Paused);
    let snapshot = format!("file://{}", dir.path().join("snapshot").display());
    client.snapshot(&snapshot).unwrap();
    client.put("vm.resume").unwrap();
    client.put("vm.reboot").unwrap();
    let printed = client.info().unwrap().config;
    client.put("vm.delete").unwrap();
    // What vm.info printed is a configuration that vm.create takes.
    client.create(&printed).unwrap();
    assert_eq!(client.info().unwrap().config, printed);
    client.put("vm.delete").unwrap();
    let restore = api::RestoreConfig {
        source_url: snapshot,
        resume: true,
        ..Default::default()
    };
    client.restore(&restore).unwrap();
    assert_eq!(client.info().unwrap().state, VmState::Running);
    client.put("vmm.shutdown").unwrap();
    assert_eq!(vmm.end(), Some(0));
    let events = std::fs::read_to_string(events).unwrap();
    for event in [
        "starting",
        "created",
        "booted",
        "paused",
        "snapshotted",
        "resumed",
        "deleted",
        "restored",
        "shutdown",
    ] {
        assert!(events.contains(&format!("\"event\": \"{event}\"")), "{event}: {events}");
    }
}

fn modes(terminal: &OwnedFd) -> libc::tcflag_t {
    // SAFETY: termios is plain data, valid when zero, and valid for the time of the call.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut settings), 0);
        settings.c_lflag
    }
}

#[test]
fn kvm_the_terminal_is_raw_while_a_console_is_on_it_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut outer, mut inner) = (-1, -1);
    // SAFETY: both descriptors are valid for the time of the call; the rest may be null.
    let made = unsafe {
        let null = std::ptr::null_mut();
        libc::openpty(&mut outer, &mut inner, null, std::ptr::null(), std::ptr::null())
    };
    assert_eq!(made, 0);
    // SAFETY: both were just made, and nobody else owns them.
    let (_outer, inner) = unsafe { (OwnedFd::from_raw_fd(outer), OwnedFd::from_raw_fd(inner)) };
    assert_ne!(modes(&inner) & libc::ICANON, 0);
    let mut command = command();
    command
        .arg("--kernel")
        .arg(idle_kernel(dir.path()))
        .args(["--serial", "tty", "--console", "off"]);
    command
        .stdin(File::from(inner.try_clone().unwrap()))
        .stdout(File::from(inner.try_clone().unwrap()));
    // SAFETY: only system calls between fork and exec; standard input is the terminal then.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let (vmm, _client) = Vmm::start(&mut command, &dir.path().join("s"));
    wait_until("raw mode", || modes(&inner) & libc::ICANON == 0);
    vmm.signal(libc::SIGTERM);
    assert_eq!(vmm.end(), Some(0));
    assert_ne!(modes(&inner) & libc::ICANON, 0);
}

#[test]
fn kvm_a_vm_that_cannot_boot_ends_the_vmm_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let output = command()
        .args(["--kernel", "/no/kernel", "--console", "off", "--api-socket"])
        .arg(&socket)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let reason = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        reason.contains("the VM cannot be booted") && reason.contains("/no/kernel"),
        "{reason}"
    );
    assert!(!socket.exists());
}
