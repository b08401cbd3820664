//! Nothing is left behind: by a bed, by an interrupted demo, by enabling and disabling FT. Needs /dev/kvm and root.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::cleanup::names_in;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Options, Side};
use bed1::process::binary;

/// Command lines of processes that work for the bed of `owner`.
fn processes_of(owner: u32) -> Vec<String> {
    let tag = format!("ftbed{owner}n");
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&tag)).collect()
}

/// Namespaces and directories of the bed of `owner`.
fn names_of(owner: u32) -> Vec<String> {
    let tag = format!("ftbed{owner}n");
    let places = [Path::new("/run/netns").to_path_buf(), std::env::temp_dir()];
    let all = places
        .iter()
        .flat_map(|dir| [names_in(dir, true), names_in(dir, false)].concat());
    all.filter(|name| name.starts_with(&tag)).collect()
}

fn nothing_left(owner: u32) -> Result<()> {
    let (names, processes) = (names_of(owner), processes_of(owner));
    ensure!(
        names.is_empty() && processes.is_empty(),
        "left behind: {names:?} {processes:?}"
    );
    Ok(())
}

#[test]
fn kvm_root_a_bed_leaves_nothing() -> Result<()> {
    let me = std::process::id();
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    ensure!(
        !names_of(me).is_empty() && !processes_of(me).is_empty(),
        "the check does not see a bed"
    );
    drop((primary, backup, bed));
    nothing_left(me)
}

fn demo() -> Result<Child> {
    let mut command = Command::new(binary("demo")?);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("start the demo")
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > Duration::from_secs(60) {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the demo did not end within 60 s of its signal");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: kill(2) on our own child, which was not waited for yet.
    unsafe { libc::kill(child.id() as i32, signal) };
}

/// The signals fall into building the network, booting, protecting, load.
#[test]
fn kvm_root_an_interrupted_demo_leaves_nothing() -> Result<()> {
    for (after_ms, kind) in [
        (30, libc::SIGINT),
        (120, libc::SIGTERM),
        (300, libc::SIGINT),
        (1500, libc::SIGTERM),
        (4500, libc::SIGINT),
    ] {
        let mut child = demo()?;
        std::thread::sleep(Duration::from_millis(after_ms));
        signal(&child, kind);
        let status = wait(&mut child)?;
        ensure!(
            !status.success(),
            "the demo ended well in spite of signal {kind} after {after_ms} ms"
        );
        nothing_left(child.id()).with_context(|| format!("signal {kind} after {after_ms} ms"))?;
    }
    Ok(())
}

/// A demo that was killed outright takes its VMMs with it; the next run removes the rest.
#[test]
fn kvm_root_a_killed_demo_is_swept_by_the_next_run() -> Result<()> {
    let mut killed = demo()?;
    std::thread::sleep(Duration::from_millis(1500));
    killed.kill()?;
    killed.wait()?;
    let start = Instant::now();
    while !processes_of(killed.id()).is_empty() {
        ensure!(
            start.elapsed() < Duration::from_secs(10),
            "VMMs outlive a killed demo: {:?}",
            processes_of(killed.id())
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut next = demo()?;
    std::thread::sleep(Duration::from_millis(700));
    signal(&next, libc::SIGTERM);
    wait(&mut next)?;
    nothing_left(killed.id())?;
    nothing_left(next.id())
}

/// Files, threads and memory of both VMMs are as much after ten rounds of protection as after two, and memory is little:
/// what a protection had is given back to the host.
#[test]
fn kvm_root_enable_and_disable_leak_nothing() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(1))?;
    let mut backup = bed.start(Side::B, &[])?;
    let mut counts = Vec::new();
    for round in 0..10 {
        bed.receive_at(&mut backup, &format!("tcp:10.99.0.2:{}", 6100 + round))?;
        bed.protect(&mut primary, &mut backup)?;
        loads.wait_progress(5)?;
        primary.vmm.remote(&["ft", "disable"])?;
        // Refused when the dismissal by the primary has already ended it.
        let _ = backup.vmm.remote(&["ft", "disable"]);
        primary.vmm.wait_ft_state("disabled", Duration::from_secs(10))?;
        backup.vmm.wait_ft_state("disabled", Duration::from_secs(10))?;
        std::thread::sleep(Duration::from_millis(200));
        counts.push([primary.vmm.resources()?, backup.vmm.resources()?]);
    }
    // A worker that is started when it is first needed is no leak; one more in each round is.
    for (first, last) in counts[1].iter().zip(&counts[9]) {
        let flat = last.fds <= first.fds + 3 && last.threads <= first.threads + 3;
        let small = last.memory_mib <= first.memory_mib + 8.0 && last.memory_mib <= 64.0;
        ensure!(flat && small, "[primary, backup] by round: {counts:?}");
    }
    loads.stop().map(drop)
}
