//! Where the serial port's and the virtio console's output goes, and where their input comes from.
//!
//! Both stand on a [`ConsoleBackend`], so that FT holds the output of either in the same way.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use api::{ConsoleConfig, ConsoleMode};
use devices::gate::Gate;
use devices::serial::Serial;
use sandbox::ThreadKind;
use virtio_devices::backend::ConsoleBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupts::lock;

enum Output {
    Null,
    Stdout,
    File(File),
}

/// A console's two ends on this host.
pub struct HostConsole {
    output: Output,
    input: Option<File>,
}

impl HostConsole {
    /// Discards output, has no input.
    pub fn null() -> Self {
        Self {
            output: Output::Null,
            input: None,
        }
    }

    /// Opens what `config` says; `None` when the console is off.
    pub fn open(config: &ConsoleConfig) -> io::Result<Option<Self>> {
        let (output, input) = match config.mode {
            ConsoleMode::Off => return Ok(None),
            ConsoleMode::Null => (Output::Null, None),
            ConsoleMode::Tty => (Output::Stdout, Some(stdin()?)),
            ConsoleMode::File => {
                let path = config
                    .file
                    .as_ref()
                    .ok_or_else(|| io::Error::other("mode File needs a `file`"))?;
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
                let file = file.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
                (Output::File(file), None)
            }
            ref mode => return Err(io::Error::other(format!("console mode {mode:?} is not supported"))),
        };
        Ok(Some(Self { output, input }))
    }
}

/// A second descriptor of standard input, so that closing it leaves the process's own alone.
fn stdin() -> io::Result<File> {
    use std::os::fd::AsFd;
    Ok(io::stdin().as_fd().try_clone_to_owned()?.into())
}

impl ConsoleBackend for HostConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.output {
            Output::Null => Ok(()),
            Output::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Output::File(file) => file.write_all(bytes),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(input) = &mut self.input else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        if !readable(&[input.as_raw_fd()], 0)?[0] {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        io::Read::read(input, buf)
    }

    fn poll_fd(&self) -> Option<RawFd> {
        self.input.as_ref().map(|f| f.as_raw_fd())
    }
}

/// Waits up to `timeout_ms` (-1: for ever) and tells which descriptors are readable, or at their end.
fn readable(fds: &[RawFd], timeout_ms: i32) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: `polls` is a valid array of its length for the time of the call.
    let n = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    if n < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
        return Ok(vec![false; fds.len()]);
    }
    Ok(polls.iter().map(|p| p.revents != 0).collect())
}

/// The backend behind the serial port; shared between the port's output and the thread that brings its input.
pub type SharedConsole = Arc<Mutex<Box<dyn ConsoleBackend>>>;

/// The serial port's output.
pub struct SerialOutput(pub SharedConsole);

impl Write for SerialOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(buf)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread that brings the serial port's input. Ends when dropped.
pub struct SerialInput {
    stop: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl SerialInput {
    /// Starts the thread when the console has an input.
    pub fn start(console: &SharedConsole, serial: Arc<Serial>, gate: Arc<Gate>) -> io::Result<Option<Self>> {
        let Some(fd) = lock(console).poll_fd() else {
            return Ok(None);
        };
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let (stopped, console) = (stop.try_clone()?, console.clone());
        let thread = sandbox::spawn(ThreadKind::SerialInput, "serial-input", move || {
            serial_input(fd, &stopped, &console, &serial, &gate);
        })?;
        Ok(Some(Self {
            stop,
            thread: Some(thread),
        }))
    }
}

impl Drop for SerialInput {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serial_input(fd: RawFd, stop: &EventFd, console: &SharedConsole, serial: &Serial, gate: &Gate) {
    let mut buf = [0u8; 16];
    loop {
        match readable(&[stop.as_raw_fd(), fd], -1) {
            Ok(ready) if ready[0] => return,
            Ok(ready) if !ready[1] => continue,
            Ok(_) => {}
            Err(e) => return log::error!("serial input: {e}"),
        }
        let n = lock(console).read(&mut buf);
        match n {
            Ok(0) => return,
            Ok(n) => gate.pass(|| {
                if let Err(e) = serial.enqueue_input(&buf[..n]) {
                    log::warn!("serial input is lost: {e}");
                }
            }),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return log::error!("serial input: {e}"),
        }
    }
}
