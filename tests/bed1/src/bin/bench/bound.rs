//! What an answer must wait for at least: the pause of a checkpoint, and one round trip of the log channel.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bed1::netns::Network;
use load::stats::Summary;

/// Bytes that a small epoch sends, and that come back for it.
const THERE: usize = 24 << 10;
const BACK: usize = 64;

const ROUND_TRIPS: usize = 2000;

/// Round trips of a small epoch's bytes over the log channel's network, in ms: two sockets and two threads, nothing else.
pub fn round_trips(network: &Network) -> Result<Summary> {
    let listener = network.within("b", || TcpListener::bind((Network::log_ip("b"), 0)))?;
    let address = listener.local_addr()?;
    let answers = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut bytes = vec![0; THERE];
        for _ in 0..ROUND_TRIPS {
            stream.read_exact(&mut bytes)?;
            stream.write_all(&bytes[..BACK])?;
        }
        Ok(())
    });
    let mut stream = network.within("a", || TcpStream::connect_timeout(&address, Duration::from_secs(5)))?;
    stream.set_nodelay(true)?;
    let (there, mut back) = (vec![7; THERE], [0; BACK]);
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let begin = Instant::now();
        stream.write_all(&there)?;
        stream.read_exact(&mut back)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    answers
        .join()
        .ok()
        .context("the answering thread panicked")?
        .context("the answering side")?;
    Ok(Summary::of(&times))
}
