//! Between an arbiter and a member: lets a request through and loses its answer.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub struct Relay {
    pub endpoint: String,
    /// Whether anything was lost.
    pub lost: Arc<AtomicBool>,
}

impl Relay {
    /// In front of `target`: once a request holds `word`, nothing comes back on its connection.
    pub fn losing_answers_to(target: String, word: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let lost = Arc::new(AtomicBool::new(false));
        let seen = lost.clone();
        // Both kinds of threads end with the test's process; none holds anything but sockets.
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(&target)) else {
                    return;
                };
                let deaf = Arc::new(AtomicBool::new(false));
                let (from, to, mute) = (near.try_clone().unwrap(), far.try_clone().unwrap(), deaf.clone());
                let seen = seen.clone();
                std::thread::spawn(move || {
                    pump(from, to, |bytes| {
                        if bytes.windows(word.len()).any(|part| part == word.as_bytes()) {
                            mute.store(true, Ordering::SeqCst);
                            seen.store(true, Ordering::SeqCst);
                        }
                        true
                    })
                });
                std::thread::spawn(move || pump(far, near, |_| !deaf.load(Ordering::SeqCst)));
            }
        });
        Self { endpoint, lost }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, passes: impl Fn(&[u8]) -> bool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 || (passes(&buffer[..n]) && to.write_all(&buffer[..n]).is_err()) {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
