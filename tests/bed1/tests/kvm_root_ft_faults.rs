//! Faults of the log channel, the arbiter and the primary's process. Needs /dev/kvm and root.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Options, Side};
use bed1::process::Vmm;
use bed1::proxied::{LIMIT, Proxied};
use load::pattern;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn loads(bed: &Bed) -> Result<Loads> {
    Loads::start(bed, &loads::model(bed), &loads::Options::everything(1))
}

fn proxied() -> Result<Proxied> {
    Proxied::new(Options::default())
}

#[test]
fn kvm_root_cut_both_ways_leaves_one_side() -> Result<()> {
    for _ in 0..3 {
        let mut pair = proxied()?;
        std::thread::sleep(ms(200));
        pair.proxy.cut();
        pair.one_side_goes_on()?;
    }
    Ok(())
}

#[test]
fn kvm_root_r6_a_flipped_bit_in_the_shadows_ram_is_found() -> Result<()> {
    let mut pair = proxied()?;
    pair.primary.vmm.remote(&["ft", "config", "audit_mib_s=512"])?;
    pair.backup.vmm.flip_ram_bit()?;
    pair.primary.vmm.wait_ft_state("failed", LIMIT)?;
    let reason = pair.primary.vmm.ft_info()?["reason"].to_string();
    ensure!(reason.contains("audit: the RAM page at 0x"), "{reason}");
    pair.loads.wait_progress(5)?;
    let disk = pair.primary.disk.clone();
    pair.loads.verify(&disk).map(drop)
}

#[test]
fn kvm_root_r6_a_flipped_bit_on_the_shadows_disk_is_found() -> Result<()> {
    let mut pair = proxied()?;
    pair.primary.vmm.remote(&["ft", "config", "audit_disk_mib_s=512"])?;
    let rounds = |pair: &Proxied| Ok::<_, anyhow::Error>(pair.primary.vmm.ft_info()?["audit"]["disk_rounds"].as_u64());
    let before = rounds(&pair)?;
    while rounds(&pair)? < before.map(|n| n + 2) {
        pair.still_protected()?;
    }
    let at = pair.backup.flip_disk_bit()?;
    pair.primary.vmm.wait_ft_state("failed", LIMIT)?;
    let reason = pair.primary.vmm.ft_info()?["reason"].to_string();
    let chunk = at / 4096 * 4096;
    ensure!(
        reason.contains(&format!("audit: disk _disk0 at {chunk:#x}, 4096 bytes, is not")),
        "{reason}"
    );
    pair.loads.wait_progress(5)?;
    let disk = pair.primary.disk.clone();
    pair.loads.verify(&disk).map(drop)
}

#[test]
fn kvm_root_r6_flipped_bits_are_repaired_and_the_takeover_is_exact() -> Result<()> {
    let mut pair = Proxied::new(Options {
        audit: "repair",
        limits: ["audit_mib_s=512", "audit_disk_mib_s=512"].map(String::from).to_vec(),
        ..Options::default()
    })?;
    let repairs = |vmm: &mut Vmm, number: u64| {
        vmm.wait_for("a repair", LIMIT, |vmm| {
            let info = vmm.ft_info()?;
            Ok(info["audit"]["repairs"] == number && info["state"] == "protected")
        })
    };
    // One after the other: of two that are found at once an event names the first.
    pair.backup.vmm.flip_ram_bit()?;
    repairs(&mut pair.primary.vmm, 1)?;
    pair.backup.flip_disk_bit()?;
    for host in [&mut pair.primary, &mut pair.backup] {
        repairs(&mut host.vmm, 2)?;
        let events = std::fs::read_to_string(host.vmm.events())?;
        for named in ["audit: the RAM page at 0x", "audit: disk _disk0 at 0x"] {
            ensure!(events.contains(named), "{}: `{named}` is in no event", host.vmm.name);
        }
    }
    pair.loads.wait_progress(20)?;
    failover::kill(&mut pair.primary, &mut pair.backup, &pair.loads)?;
    let disk = pair.backup.disk.clone();
    pair.loads.verify(&disk)?;
    let last = |disk| Ok::<_, std::io::Error>(std::fs::read(disk)?.pop());
    ensure!(
        last(&pair.backup.disk)? == last(&pair.primary.disk)?,
        "the flipped bit is still on the disk"
    );
    Ok(())
}

#[test]
fn kvm_root_silence_both_ways_leaves_one_side() -> Result<()> {
    let mut pair = proxied()?;
    pair.proxy.forward().stall(true);
    pair.proxy.back().stall(true);
    pair.one_side_goes_on().map(drop)
}

#[test]
fn kvm_root_silence_towards_the_backup_leaves_one_side() -> Result<()> {
    let mut pair = proxied()?;
    pair.proxy.forward().stall(true);
    pair.one_side_goes_on().map(drop)
}

#[test]
fn kvm_root_silence_towards_the_primary_leaves_one_side() -> Result<()> {
    let mut pair = proxied()?;
    pair.proxy.back().stall(true);
    pair.one_side_goes_on().map(drop)
}

/// A link that goes down closes nothing: only silence tells.
#[test]
fn kvm_root_dead_link_leaves_one_side() -> Result<()> {
    let mut pair = proxied()?;
    pair.bed.network.set_log_link("b", false)?;
    pair.one_side_goes_on()?;
    pair.bed.network.set_log_link("b", true)?;
    // The link's return changes nothing.
    std::thread::sleep(ms(1000));
    pair.one_side_goes_on().map(drop)
}

#[test]
fn kvm_root_short_stalls_and_delays_are_borne() -> Result<()> {
    let mut pair = proxied()?;
    for _ in 0..3 {
        pair.proxy.forward().stall(true);
        std::thread::sleep(ms(150));
        pair.proxy.forward().stall(false);
        pair.proxy.back().stall(true);
        std::thread::sleep(ms(150));
        pair.proxy.back().stall(false);
        pair.loads.wait_progress(5)?;
    }
    pair.proxy.forward().delay(ms(5));
    pair.proxy.back().delay(ms(20));
    pair.loads.wait_progress(20)?;
    pair.still_protected()?;
    // Nothing that was delayed is lost when the primary dies in the middle of it.
    failover::kill(&mut pair.primary, &mut pair.backup, &pair.loads)?;
    pair.loads.verify(&pair.backup.disk).map(drop)
}

/// Whatever else connects to the log port cannot disturb.
#[test]
fn kvm_root_garbage_on_the_log_port_does_not_disturb() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = loads(&bed)?;
    let mut backup = bed.backup(Side::B)?;
    let at: SocketAddr = backup.peer.trim_start_matches("tcp:").parse()?;
    let network = bed.network.clone();
    let connect = || network.within("a", || TcpStream::connect_timeout(&at, Duration::from_secs(5)));
    let garbage = |seed: u64, size: usize| {
        let mut bytes = vec![0; size];
        pattern::fill(seed, 0, &mut bytes);
        bytes
    };
    let mut half_open = Vec::new();
    for seed in 0..8 {
        if half_open.len() < 5 {
            half_open.push(connect()?);
        }
        let mut stream = connect()?;
        // The backup may close before all is sent.
        let _ = stream.write_all(&garbage(seed, 1 << (2 * seed)));
        let mut stream = connect()?;
        let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
    }
    ensure!(!backup.vmm.ended()?, "garbage ended the backup: {}", backup.vmm.tail());
    // Connections that say nothing keep a primary out for a while at most; those that spoke are gone by now.
    std::thread::sleep(ms(200));
    bed.protect(&mut primary, &mut backup)
        .context("with half-open connections at the backup")?;
    for seed in 10..18 {
        // A protected backup need not listen.
        if let Ok(mut stream) = connect() {
            let _ = stream.write_all(&garbage(seed, 1 << seed));
            half_open.push(stream);
        }
    }
    loads.wait_progress(20)?;
    ensure!(primary.vmm.ft_state()? == "protected" && backup.vmm.ft_state()? == "protected");
    failover::kill(&mut primary, &mut backup, &loads)?;
    loads.verify(&backup.disk).map(drop)
}

/// However many connections say nothing: after a while they are dropped, and the primary comes in.
#[test]
fn kvm_root_half_open_connections_do_not_keep_the_primary_out() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        ..Options::default()
    })?;
    let mut primary = bed.boot(Side::A)?;
    let loads = loads(&bed)?;
    let mut backup = bed.backup(Side::B)?;
    let at: SocketAddr = backup.peer.trim_start_matches("tcp:").parse()?;
    let connect = || {
        bed.network
            .within("a", || TcpStream::connect_timeout(&at, Duration::from_secs(5)))
    };
    let half_open: Vec<_> = (0..40).map(|_| connect()).collect();
    ensure!(half_open.iter().all(Result::is_ok), "the backup does not listen");
    let start = std::time::Instant::now();
    while let Err(e) = bed.protect(&mut primary, &mut backup) {
        loads.check()?;
        ensure!(start.elapsed() < LIMIT, "the primary does not come in: {e:#}");
        std::thread::sleep(ms(200));
    }
    loads.wait_progress(20)
}

fn answers(loads: &Loads) -> u64 {
    loads.verdicts().iter().map(|v| v.answers).sum()
}

/// Without the arbiter's answer neither side goes on alone (R4); with it the one that waited does.
fn arbiter_away(kill_primary: bool) -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = loads(&bed)?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    let (here, away) = (bed.dir.join("arbiter"), bed.dir.join("arbiter-away"));
    std::fs::rename(&here, &away)?;
    let (victim, mut survivor) = if kill_primary {
        (&mut primary, backup)
    } else {
        (&mut backup, primary)
    };
    let moment = victim.vmm.kill()?;
    survivor.vmm.wait_ft_state("waiting_for_arbiter", LIMIT)?;
    // What was released before may still arrive.
    std::thread::sleep(ms(300));
    let before = answers(&loads);
    std::thread::sleep(ms(1500));
    ensure!(
        answers(&loads) == before,
        "{} answers came without the arbiter's",
        answers(&loads) - before
    );
    ensure!(survivor.vmm.ft_state()? == "waiting_for_arbiter");
    std::fs::rename(&away, &here)?;
    survivor.vmm.wait_ft_state("solo", LIMIT)?;
    failover::after(moment, &mut survivor, &loads)?;
    loads.verify(&survivor.disk).map(drop)
}

#[test]
fn kvm_root_backup_waits_for_the_arbiter() -> Result<()> {
    arbiter_away(true)
}

#[test]
fn kvm_root_primary_waits_for_the_arbiter_and_releases_nothing() -> Result<()> {
    arbiter_away(false)
}

/// A primary that stood still while the backup took over must stop when it wakes up, not go on.
#[test]
fn kvm_root_stopped_primary_does_not_come_back() -> Result<()> {
    let mut bed = Bed::new(Options::default())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = loads(&bed)?;
    let mut backup = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut backup)?;
    let moment = std::time::Instant::now();
    primary.vmm.signal(libc::SIGSTOP)?;
    backup.vmm.wait_ft_state("solo", LIMIT)?;
    failover::after(moment, &mut backup, &loads)?;
    std::thread::sleep(ms(1000));
    primary.vmm.signal(libc::SIGCONT)?;
    primary.vmm.wait_ft_state("stopped", LIMIT)?;
    ensure!(primary.vmm.vm_state()? != "Running", "the VM runs on both sides");
    let reason = primary.vmm.ft_info()?["reason"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    ensure!(!reason.is_empty(), "the loser does not say why it stopped");
    loads.wait_progress(50)?;
    loads.verify(&backup.disk)?;
    loads.stop().map(drop)
}
