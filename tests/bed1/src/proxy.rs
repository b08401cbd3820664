//! A TCP proxy between primary and backup that can delay, slow down, stall, damage and cut, one way or both ways.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::netns::Network;
use crate::pair::{Bed, Host, Side};

/// Pieces of up to 64 KiB under way in a direction.
const UNDER_WAY: usize = 256;

/// What a lost segment costs a stream: the sender's retransmission timer.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// How one direction behaves.
#[derive(Default)]
pub struct Direction {
    /// Bytes are taken and kept: nothing goes on, nothing is closed.
    stalled: AtomicBool,
    /// Each piece is given on so many microseconds late.
    delay_us: AtomicU64,
    /// One piece of so many is late by a retransmission, and with it all that follow; 0: none.
    late_one_in: AtomicU64,
    /// Bytes per second; 0: no limit.
    rate: AtomicU64,
    /// One bit of the next piece is flipped.
    flip: AtomicBool,
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
        self.delay_us.store(time.as_micros() as u64, Ordering::SeqCst);
    }

    /// Makes one piece of `n` late, as a lost segment would; 0: none.
    pub fn late_one_in(&self, n: u64) {
        self.late_one_in.store(n, Ordering::SeqCst);
    }

    /// Limits the bytes per second; 0: no limit.
    pub fn rate(&self, bytes_per_s: u64) {
        self.rate.store(bytes_per_s, Ordering::SeqCst);
    }

    /// Flips one bit of what comes next.
    pub fn flip(&self) {
        self.flip.store(true, Ordering::SeqCst);
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

    /// On the way to `backup`, which is reached through it from now on.
    pub fn before(bed: &Bed, backup: &mut Host) -> Result<Self> {
        let proxy = Self::start(&bed.network, backup.side, 6500, &backup.peer)?;
        backup.peer.clone_from(&proxy.address);
        Ok(proxy)
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
        let direction: fn(&Shared) -> &Direction = if forward { |s| &s.forward } else { |s| &s.back };
        let (sender, pieces) = sync_channel(UNDER_WAY);
        let source = (shared.clone(), from.try_clone()?);
        let taken = move || take(&source.0, direction(&source.0), source.1, &sender);
        std::thread::Builder::new().name("proxy-take".into()).spawn(taken)?;
        let give = move || {
            give(&shared, direction(&shared), &pieces, &to);
            for end in [from, to] {
                let _ = end.shutdown(Shutdown::Both);
            }
        };
        std::thread::Builder::new().name("proxy-give".into()).spawn(give)?;
    }
    Ok(())
}

fn timed_out(e: &std::io::Error) -> bool {
    matches!(
        e.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut | std::io::ErrorKind::Interrupted
    )
}

/// Reads pieces and says when each is to go on.
fn take(shared: &Shared, direction: &Direction, mut from: TcpStream, pieces: &SyncSender<(Instant, Vec<u8>)>) {
    let mut buf = vec![0; 64 << 10];
    let mut count = 0;
    while !shared.ended.load(Ordering::SeqCst) {
        let n = match from.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if timed_out(&e) => continue,
            Err(_) => return,
        };
        count += 1;
        let mut due = Instant::now() + Duration::from_micros(direction.delay_us.load(Ordering::SeqCst));
        let late = direction.late_one_in.load(Ordering::SeqCst);
        if late > 0 && count % late == 0 {
            due += RETRANSMISSION;
        }
        if direction.flip.swap(false, Ordering::SeqCst) {
            buf[n / 2] ^= 0x10;
        }
        if pieces.send((due, buf[..n].to_vec())).is_err() {
            return;
        }
    }
}

/// Gives pieces on.
fn give(shared: &Shared, direction: &Direction, pieces: &Receiver<(Instant, Vec<u8>)>, mut to: &TcpStream) {
    let ended = || shared.ended.load(Ordering::SeqCst);
    while !ended() {
        let (due, piece) = match pieces.recv_timeout(Duration::from_millis(20)) {
            Ok(piece) => piece,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let mut done = 0;
        while done < piece.len() {
            if ended() {
                return;
            }
            if direction.stalled.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            match to.write(&piece[done..]) {
                Ok(written) => done += written,
                Err(e) if timed_out(&e) => {}
                Err(_) => return,
            }
        }
        direction.passed.fetch_add(piece.len() as u64, Ordering::SeqCst);
        let rate = direction.rate.load(Ordering::SeqCst);
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(piece.len() as f64 / rate as f64));
        }
    }
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
