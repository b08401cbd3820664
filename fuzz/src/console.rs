//! The console device: bytes both ways between a hostile driver and a terminal that the fuzzer writes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_devices::Console;
use virtio_devices::backend::ConsoleBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{BUFFERS, Driver, memory};
use crate::input::Input;
use crate::reach::reached;

/// Bytes of input that wait at most.
const WAITING: usize = 1 << 16;

#[derive(Default)]
struct Bytes {
    typed: VecDeque<u8>,
    shown: u64,
    /// 1: the input has ended; 2: it fails; 4: output fails.
    mood: u8,
}

/// Shared with the target.
pub struct Terminal {
    bytes: Mutex<Bytes>,
    event: EventFd,
}

impl Terminal {
    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn type_in(&self, text: &[u8]) {
        let mut bytes = self.bytes();
        if bytes.typed.len() < WAITING {
            bytes.typed.extend(text);
        }
        drop(bytes);
        self.event.write(1).expect("an event that can be counted");
    }
}

struct Screen(Arc<Terminal>);

impl ConsoleBackend for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut terminal = self.0.bytes();
        if terminal.mood & 4 != 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        terminal.shown += bytes.len() as u64;
        reached("console output");
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        assert!(!buf.is_empty(), "a read of nothing looks like the end of the input");
        let mut terminal = self.0.bytes();
        if terminal.mood & 2 != 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if terminal.mood & 1 != 0 {
            return Ok(0);
        }
        let n = buf.len().min(terminal.typed.len());
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in buf.iter_mut().zip(terminal.typed.drain(..n)) {
            *to = from;
        }
        reached("console input");
        Ok(n)
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.0.event.as_raw_fd())
    }
}

/// A console and its terminal.
pub fn device() -> (Console, Arc<Terminal>) {
    let terminal = Arc::new(Terminal {
        bytes: Mutex::default(),
        event: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
    });
    (Console::new(Box::new(Screen(terminal.clone()))), terminal)
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (console, terminal) = device();
    let mut driver = Driver::new(console, memory());
    driver.run(&mut input, &mut |driver, input| match input.u8() % 8 {
        0 => terminal.bytes().mood = input.u8() & 7,
        1 | 2 => {
            let n = input.u8().into();
            terminal.type_in(input.bytes(n));
        }
        3 => driver.handle.exchange(|backend| backend),
        4 | 5 => {
            let len = input.u16().into();
            driver.add(
                0,
                &[(BUFFERS, len, true), (BUFFERS + 0x8000, 16, true)],
                input.u8() & 1 != 0,
            );
            driver.notify(0);
        }
        _ => {
            let len = input.u16().into();
            driver.add(
                1,
                &[(BUFFERS, len, false), (BUFFERS + 0x3000, 16, false)],
                input.u8() & 1 != 0,
            );
            driver.notify(1);
        }
    });
    // Whatever happened, a reset makes it a good device again.
    *terminal.bytes() = Bytes::default();
    driver.bring_up(0);
    driver.add(1, &[(BUFFERS, 60, false)], false);
    driver.notify(1);
    assert!(
        terminal.bytes().shown == 60 && driver.used(1) == 1,
        "a reset device does not show"
    );
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let start = [1, 0, 0, 0, 0];
    let output = [0, 6, 200, 0, 0, 0, 6, 0xff, 0xff, 1];
    let input = [
        0, 1, 3, b'a', b'b', b'c', 0, 4, 2, 0, 0, 0, 4, 100, 0, 1, 0, 1, 2, b'x', b'y',
    ];
    vec![
        [&start[..], &output, &input].concat(),
        [&start[..], &input, &[17, 3], &output, &[0, 0, 1], &input].concat(),
    ]
}
