//! A TCP proxy between primary and backup that can delay, stall and cut, one way or both ways.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;

use crate::netns::Network;
use crate::pair::Side;

/// How one direction behaves.
#[derive(Default)]
pub struct Direction {
    /// Bytes are taken and kept: nothing goes on, nothing is closed.
    stalled: AtomicBool,
    /// Each piece is given on so many milliseconds late.
    delay_ms: AtomicU64,
    /// Bytes given on.
    passed: AtomicU64,
}

impl Direction {
    /// Holds the direction up, or lets it go on.
    pub fn stall(&self, on: bool) {
        self.stalled.store(on, Ordering::SeqCst);
    }

    /// Delays each piece.
    pub fn delay(&self, time: Duration) {
        self.delay_ms.store(time.as_millis() as u64, Ordering::SeqCst);
    }

    /// Bytes given on so far.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct Shared {
    /// From the side that connected (the primary) to the other.
    forward: Direction,
    back: Direction,
    open: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

/// The proxy; ends when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    /// Address to connect to, `tcp:HOST:PORT`.
    pub address: String,
}

impl Proxy {
    /// Listens on host `side` on `port`, and goes on to `to` (`tcp:HOST:PORT`) from there.
    pub fn start(network: &Arc<Network>, side: Side, port: u16, to: &str) -> Result<Self> {
        let to: SocketAddr = to.trim_start_matches("tcp:").parse()?;
        let at = format!("{}:{port}", Network::log_ip(side.name()));
        let listener = network.within(side.name(), || TcpListener::bind(&at))?;
        listener.set_nonblocking(true)?;
        let shared: Arc<Shared> = Arc::default();
        let (network, inner) = (network.clone(), shared.clone());
        let accept = move || {
            while !inner.ended.load(Ordering::SeqCst) {
                let Ok((here, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                // A backup that refuses closes the primary's connection as well.
                if let Ok(there) =
                    network.within(side.name(), || TcpStream::connect_timeout(&to, Duration::from_secs(5)))
                {
                    drop(join(&inner, here, there));
                }
            }
        };
        let listener = std::thread::Builder::new().name("proxy".into()).spawn(accept)?;
        Ok(Self {
            shared,
            listener: Some(listener),
            address: format!("tcp:{at}"),
        })
    }

    /// Primary to backup.
    pub fn forward(&self) -> &Direction {
        &self.shared.forward
    }

    /// Backup to primary.
    pub fn back(&self) -> &Direction {
        &self.shared.back
    }

    /// Closes every connection, both ways.
    pub fn cut(&self) {
        let mut open = self.shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in open.drain(..) {
            // Already closed is fine.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn join(shared: &Arc<Shared>, here: TcpStream, there: TcpStream) -> std::io::Result<()> {
    for stream in [&here, &there] {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        stream.set_write_timeout(Some(Duration::from_millis(20)))?;
        shared
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(stream.try_clone()?);
    }
    let pairs = [(here.try_clone()?, there.try_clone()?, true), (there, here, false)];
    for (from, to, forward) in pairs {
        let shared = shared.clone();
        let pump = move || pump(&shared, if forward { &shared.forward } else { &shared.back }, from, to);
        std::thread::Builder::new().name("proxy-pump".into()).spawn(pump)?;
    }
    Ok(())
}

fn timed_out(e: &std::io::Error) -> bool {
    matches!(
        e.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut | std::io::ErrorKind::Interrupted
    )
}

fn pump(shared: &Shared, direction: &Direction, mut from: TcpStream, mut to: TcpStream) {
    let mut buf = vec![0; 64 << 10];
    'stream: while !shared.ended.load(Ordering::SeqCst) {
        let n = match from.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if timed_out(&e) => continue,
            Err(_) => break,
        };
        std::thread::sleep(Duration::from_millis(direction.delay_ms.load(Ordering::SeqCst)));
        let mut done = 0;
        while done < n {
            if shared.ended.load(Ordering::SeqCst) {
                break 'stream;
            }
            if direction.stalled.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            match to.write(&buf[done..n]) {
                Ok(written) => done += written,
                Err(e) if timed_out(&e) => {}
                Err(_) => break 'stream,
            }
        }
        direction.passed.fetch_add(n as u64, Ordering::SeqCst);
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.cut();
        if let Some(thread) = self.listener.take() {
            drop(thread.join());
        }
    }
}
