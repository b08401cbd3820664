//! The bed's network and proxy by themselves, without a guest. Needs root.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::pair::{Bed, Options, Side};
use bed1::proxy::Proxy;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// An echo server on host b for one connection at a time.
fn server(bed: &Bed, port: u16) -> Result<()> {
    let listener = bed.network.within("b", || TcpListener::bind(("10.99.0.2", port)))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut buf = [0; 1000];
            while let Ok(n @ 1..) = stream.read(&mut buf) {
                if stream.write_all(&buf[..n]).is_err() {
                    break;
                }
            }
        }
    });
    Ok(())
}

fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    if &answer == b"hello" {
        Ok(())
    } else {
        Err(ErrorKind::InvalidData.into())
    }
}

#[test]
fn root_proxy_passes_stalls_delays_and_cuts() -> Result<()> {
    let bed = Bed::new(Options::default())?;
    server(&bed, 6000)?;
    let proxy = Proxy::start(&bed.network, Side::B, 6500, "tcp:10.99.0.2:6000")?;
    let at: SocketAddr = proxy.address.trim_start_matches("tcp:").parse()?;
    let mut stream = bed
        .network
        .within("a", || TcpStream::connect_timeout(&at, Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    ask(&mut stream).context("straight")?;

    for direction in [proxy.forward(), proxy.back()] {
        direction.stall(true);
        stream.write_all(b"hello")?;
        stream.set_read_timeout(Some(ms(200)))?;
        let mut answer = [0; 5];
        let silent = stream.read(&mut answer);
        ensure!(
            silent.is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
            "an answer came through a stalled proxy"
        );
        direction.stall(false);
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.read_exact(&mut answer).context("after the stall")?;
    }
    proxy.forward().delay(ms(60));
    let start = Instant::now();
    ask(&mut stream)?;
    ensure!(start.elapsed() >= ms(60), "the delay was not kept");
    // Bytes are counted after they were passed on, so the last count may come after the answer.
    let counted = || proxy.forward().passed() == 20 && proxy.back().passed() == 20;
    let guard = Instant::now();
    while !counted() && guard.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(ms(1));
    }
    ensure!(counted(), "the proxy counted other bytes than went through it");
    proxy.cut();
    ensure!(ask(&mut stream).is_err(), "the connection survived its cut");
    Ok(())
}

#[test]
fn root_dead_link_is_silent() -> Result<()> {
    let bed = Bed::new(Options::default())?;
    server(&bed, 6000)?;
    let at = SocketAddr::from(([10, 99, 0, 2], 6000));
    let mut stream = bed
        .network
        .within("a", || TcpStream::connect_timeout(&at, Duration::from_secs(5)))?;
    ask(&mut stream)?;
    bed.network.set_log_link("b", false)?;
    stream.set_read_timeout(Some(ms(300)))?;
    ensure!(
        ask(&mut stream).is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
        "the dead link is not silent"
    );
    bed.network.set_log_link("b", true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).context("after the link's return")
}

#[test]
fn root_bed_removes_its_namespaces_and_files() -> Result<()> {
    let bed = Bed::new(Options::default())?;
    let dir = bed.dir.clone();
    let namespaces = ["a", "b", "c"].map(|side| format!("/run/netns/{}", bed.network.ns(side)));
    ensure!(
        dir.is_dir() && namespaces.iter().all(|ns| Path::new(ns).exists()),
        "the bed is not there"
    );
    drop(bed);
    ensure!(
        !dir.exists() && !namespaces.iter().any(|ns| Path::new(ns).exists()),
        "the bed left something"
    );
    Ok(())
}
