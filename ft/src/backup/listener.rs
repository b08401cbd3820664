//! Accepts connections. Each gets a thread that reads its hello; what is no primary is dropped without harm to a session
//! at work, and a primary that comes while there is a session is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::{Shared, admission};
use crate::primary::session::lock;
use crate::transport::Listener;

/// Connections that are being read or served at a time.
const MAX_GREETINGS: usize = 8;

/// How often it looks whether it is to end.
const LOOK_MS: i32 = 100;

/// The thread's body; returns when the backup is over, with all sessions ended.
pub(super) fn run(shared: &Arc<Shared>, listener: &Listener) {
    let greeting = Arc::new(AtomicUsize::new(0));
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    while !shared.quits() && lock(&shared.slot).over.is_none() {
        threads.retain(|thread| !thread.is_finished());
        if !readable(listener) {
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
        let started = std::thread::Builder::new().name("ft-receiver".into()).spawn(move || {
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

fn readable(listener: &Listener) -> bool {
    let mut fd = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `fd` is one valid pollfd, and the listener keeps its descriptor open.
    unsafe { libc::poll(&mut fd, 1, LOOK_MS) > 0 }
}
