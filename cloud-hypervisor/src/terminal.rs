//! The terminal while a guest's console is on it: raw, so that every key reaches the guest.

use std::io::IsTerminal;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use api::{ApiError, ConsoleMode, Request, Response, VmmService};

/// The settings to go back to, while the terminal is raw.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// What ends a line on the terminal: raw mode does not return the carriage by itself.
pub fn line_end() -> &'static str {
    if SAVED.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        "\r\n"
    } else {
        "\n"
    }
}

fn set_raw() {
    let stdin = std::io::stdin();
    let fd = stdin.as_raw_fd();
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: plain system calls. A process in the background would be stopped by touching the terminal.
    let foreground = stdin.is_terminal() && unsafe { libc::tcgetpgrp(fd) == libc::getpgrp() };
    if saved.is_some() || !foreground {
        return;
    }
    // SAFETY: termios is plain data, valid when zero.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `settings` is valid for the time of the calls.
    unsafe {
        if libc::tcgetattr(fd, &mut settings) == 0 {
            let mut raw = settings;
            libc::cfmakeraw(&mut raw);
            if libc::tcsetattr(fd, libc::TCSANOW, &raw) == 0 {
                *saved = Some(settings);
            }
        }
    }
}

/// Gives the terminal back as it was. Idempotent.
pub fn restore() {
    if let Some(settings) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // SAFETY: `settings` is valid for the time of the call.
        unsafe { libc::tcsetattr(std::io::stdin().as_raw_fd(), libc::TCSANOW, &settings) };
    }
}

/// The VMM's service; makes the terminal raw while a VM has a console on it.
pub struct TerminalService(pub Arc<dyn VmmService>);

impl TerminalService {
    fn console_is_here(&self) -> bool {
        match self.0.call(Request::VmInfo) {
            Ok(Response::Info(info)) => [info.config.serial.mode, info.config.console.mode].contains(&ConsoleMode::Tty),
            _ => false,
        }
    }
}

impl VmmService for TerminalService {
    fn call(&self, request: Request) -> Result<Response, ApiError> {
        let starts = matches!(request, Request::VmBoot | Request::VmRestore(_));
        let ends = matches!(request, Request::VmShutdown | Request::VmDelete);
        let response = self.0.call(request)?;
        if starts && self.console_is_here() {
            set_raw();
        }
        if ends {
            restore();
        }
        Ok(response)
    }
}
