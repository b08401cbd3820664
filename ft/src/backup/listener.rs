//! Accepts connections. Each gets a thread that reads its hello; what is no primary is dropped without harm to a session
//! at work, and a primary that comes while there is a session is refused.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use sandbox::ThreadKind;

use super::{Shared, admission};
use crate::primary::session::lock;
use crate::transport::Listener;

/// Connections that are being read or served at a time.
const MAX_GREETINGS: usize = 8;

/// The thread's body; returns when the backup is over, with all sessions ended.
pub(super) fn run(shared: &Arc<Shared>, listener: &Listener, woken: &UnixStream) {
    let greeting = Arc::new(AtomicUsize::new(0));
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    while !shared.quits() && lock(&shared.slot).over.is_none() {
        threads.retain(|thread| !thread.is_finished());
        if !wait(listener, woken) {
            continue;
        }
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                if e.kind() != std::io::ErrorKind::WouldBlock {
                    log::warn!("ft: listener: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(50));
                }
                continue;
            }
        };
        if greeting.load(Ordering::SeqCst) >= MAX_GREETINGS {
            log::warn!("ft: connection of {peer} dropped: too many at a time");
            continue;
        }
        greeting.fetch_add(1, Ordering::SeqCst);
        let (shared, count) = (shared.clone(), greeting.clone());
        let started = sandbox::spawn(ThreadKind::FtAdmission, "ft-receiver", move || {
            admission::greet(&shared, stream, &peer);
            count.fetch_sub(1, Ordering::SeqCst);
        });
        match started {
            Ok(thread) => threads.push(thread),
            Err(e) => {
                greeting.fetch_sub(1, Ordering::SeqCst);
                log::warn!("ft: connection dropped: cannot start a thread: {e}");
            }
        }
    }
    for thread in threads {
        if thread.join().is_err() {
            log::error!("ft: a session of the backup panicked");
        }
    }
}

/// Waits for a connection or a word of the session; whether there is a connection.
fn wait(listener: &Listener, mut woken: &UnixStream) -> bool {
    let fd = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [fd(listener.as_raw_fd()), fd(woken.as_raw_fd())];
    // SAFETY: `fds` is two valid pollfds, whose descriptors their owners keep open.
    if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } <= 0 {
        return false;
    }
    if fds[1].revents != 0 {
        let _ = woken.read(&mut [0; 64]);
    }
    fds[0].revents != 0
}
