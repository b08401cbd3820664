//! What FT costs at least. An answer waits for the pause of a checkpoint and one round trip of the log channel; the bytes of
//! a stream go over the log channel once, and the pages that hold them are copied in pauses.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed1::netns::Network;
use load::stats::Summary;

/// Bytes that a small epoch sends, and that come back for it.
const THERE: usize = 24 << 10;
const BACK: usize = 64;

const ROUND_TRIPS: usize = 2000;

/// Bytes of one write of a stream, and of the memory that they come from and go to: more than processors cache.
const CHUNK: usize = 256 << 10;
const MEMORY: usize = 64 << 20;

/// Times that a stream is measured, and for how long.
const STREAMS: usize = 3;
const STREAM_TIME: Duration = Duration::from_millis(500);

const PAGE: usize = 4096;

/// Times that pages are copied.
const COPIES: usize = 500;

/// Two sockets on the log channel's network, of hosts a and b.
fn sockets(network: &Network) -> Result<(TcpStream, TcpStream)> {
    let listener = network.within("b", || TcpListener::bind((Network::log_ip("b"), 0)))?;
    let address = listener.local_addr()?;
    let a = network.within("a", || TcpStream::connect_timeout(&address, Duration::from_secs(5)))?;
    let (b, _) = listener.accept()?;
    for stream in [&a, &b] {
        stream.set_nodelay(true)?;
    }
    Ok((a, b))
}

/// What a thread returned, wherever it failed.
fn joined<T>(thread: JoinHandle<std::io::Result<T>>) -> Result<T> {
    let returned = thread.join().ok().context("the other side's thread panicked")?;
    returned.context("the other side")
}

/// Bytes per second from memory of one process to memory of another over the log channel's network: no checksums, nothing
/// compared, nothing else running.
pub fn carried(network: &Network) -> Result<Summary> {
    let mut rates = Vec::new();
    for _ in 0..STREAMS {
        let (mut from, mut to) = sockets(network)?;
        let reader = std::thread::spawn(move || {
            let mut memory = vec![1; MEMORY];
            let (mut total, begin) = (0, Instant::now());
            for chunk in std::iter::repeat_with(|| 0..MEMORY / CHUNK).flatten() {
                let n = to.read(&mut memory[chunk * CHUNK..][..CHUNK])?;
                if n == 0 {
                    break;
                }
                total += n;
            }
            Ok(total as f64 / begin.elapsed().as_secs_f64())
        });
        let (memory, begin) = (vec![7; MEMORY], Instant::now());
        for chunk in memory.chunks(CHUNK).cycle() {
            from.write_all(chunk)?;
            if begin.elapsed() > STREAM_TIME {
                break;
            }
        }
        drop(from);
        rates.push(joined(reader)?);
    }
    Ok(Summary::of(&rates))
}

/// Time to copy a page of RAM that another thread, the guest, has written since it was copied last, in ms: the mean of
/// `pages` that are copied together, for each of many copies.
pub fn copied(pages: usize) -> Result<Summary> {
    let ram = Arc::new(Mutex::new(vec![1; pages * PAGE]));
    let (written, next) = std::sync::mpsc::channel();
    let (again, turn) = std::sync::mpsc::channel::<()>();
    let guest = std::thread::spawn({
        let ram = ram.clone();
        move || {
            for n in 0..COPIES {
                ram.lock().unwrap_or_else(PoisonError::into_inner).fill(n as u8);
                if written.send(()).is_err() || turn.recv().is_err() {
                    break;
                }
            }
            Ok(())
        }
    });
    let mut stage = vec![1; pages * PAGE];
    let mut times = Vec::with_capacity(COPIES);
    for _ in 0..COPIES {
        next.recv().context("the writing thread has ended")?;
        let ram = ram.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        stage.copy_from_slice(&ram);
        std::hint::black_box(&stage);
        times.push(begin.elapsed().as_secs_f64() * 1e3 / pages as f64);
        drop(ram);
        // The last time nobody listens any more.
        let _ = again.send(());
    }
    joined(guest)?;
    Ok(Summary::of(&times))
}

/// Round trips of a small epoch's bytes over the log channel's network, in ms: two sockets and two threads, nothing else.
pub fn round_trips(network: &Network) -> Result<Summary> {
    let (mut stream, mut far) = sockets(network)?;
    let answers = std::thread::spawn(move || {
        let mut bytes = vec![0; THERE];
        for _ in 0..ROUND_TRIPS {
            far.read_exact(&mut bytes)?;
            far.write_all(&bytes[..BACK])?;
        }
        Ok(())
    });
    let (there, mut back) = (vec![7; THERE], [0; BACK]);
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let begin = Instant::now();
        stream.write_all(&there)?;
        stream.read_exact(&mut back)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    joined(answers)?;
    Ok(Summary::of(&times))
}
