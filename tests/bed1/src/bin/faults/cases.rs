//! Faults of processes, log channel, arbiter and disk.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::failing::{FailingDisk, Faults};
use bed1::failover::{self, Takeover};
use bed1::loads::{self, Loads};
use bed1::netns::{TAP, run as command};
use bed1::pair::{Bed, Host, Options, Side};
use bed1::proxied::{LIMIT, Proxied};
use load::Verdict;

use crate::{Case, Counts, Outcome};

/// Silence that counts as death in these cases, in ms.
const TIMEOUT: u32 = 1000;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn options() -> Options {
    Options {
        heartbeat_timeout_ms: TIMEOUT,
        ..Options::default()
    }
}

fn pair() -> Result<Proxied> {
    Proxied::new(options())
}

/// All cases.
pub fn all() -> Vec<Case> {
    let case = |name, must, run| Case { name, must, run };
    vec![
        case("primary-killed", "the backup goes on, nothing is lost", primary_killed),
        case(
            "backup-killed",
            "the primary goes on, and can be protected again",
            backup_killed,
        ),
        case("primary-stopped-short", "protection goes on", |_| stopped_short(true)),
        case("backup-stopped-short", "protection goes on", |_| stopped_short(false)),
        case(
            "primary-stopped-long",
            "the backup goes on; the woken primary stops and sends nothing more",
            primary_stopped_long,
        ),
        case(
            "backup-stopped-long",
            "the primary goes on; the woken backup stops",
            backup_stopped_long,
        ),
        case("link-cut", "exactly one side goes on", |_| link(|p| p.proxy.cut())),
        case("link-silent", "exactly one side goes on", |_| {
            link(|p| {
                p.proxy.forward().stall(true);
                p.proxy.back().stall(true);
            })
        }),
        case("link-silent-to-backup", "exactly one side goes on", |_| {
            link(|p| p.proxy.forward().stall(true))
        }),
        case("link-silent-to-primary", "exactly one side goes on", |_| {
            link(|p| p.proxy.back().stall(true))
        }),
        case(
            "link-slow",
            "protection goes on over 50 ms delay, 10 Mbit/s, 1 % late by a retransmission",
            link_slow,
        ),
        case(
            "link-slow-all-loads",
            "the same with more than the link carries: the guest is slowed down",
            link_too_slow,
        ),
        case(
            "bit-flip-in-shadow-ram",
            "the audit names the page, the primary goes on unprotected",
            shadow_ram_flipped,
        ),
        case(
            "bit-flip-on-shadow-disk",
            "the audit names disk and place, the primary goes on unprotected",
            shadow_disk_flipped,
        ),
        case(
            "bit-flips-repaired",
            "with audit=repair both places are copied anew, then a takeover is exact",
            flips_repaired,
        ),
        case(
            "bit-flip-to-backup",
            "the damage is named, exactly one side goes on",
            |_| flipped(true),
        ),
        case(
            "bit-flip-to-primary",
            "the damage is named, exactly one side goes on",
            |_| flipped(false),
        ),
        case(
            "arbiter-gone-primary-killed",
            "the backup waits, and goes on when the arbiter is back",
            arbiter_gone,
        ),
        case(
            "arbiter-read-only-link-cut",
            "neither side goes on alone; exactly one does when the arbiter takes writes again",
            arbiter_read_only,
        ),
        case(
            "backup-disk-full",
            "the primary goes on unprotected and says why, nothing is lost",
            backup_disk_full,
        ),
        case(
            "backup-disk-write-error",
            "the primary goes on unprotected and says why, nothing is lost",
            backup_disk_write_error,
        ),
        case(
            "backup-disk-flush-error",
            "with disk-of-both: the primary goes on unprotected and says why, nothing is lost",
            backup_disk_flush_error,
        ),
        case(
            "backup-killed-in-precopy",
            "the VM runs on untouched and unprotected",
            backup_killed_in_precopy,
        ),
        case(
            "primary-killed-in-precopy",
            "the backup does not take over half a VM, and waits anew",
            primary_killed_in_precopy,
        ),
    ]
}

fn figures(takeover: &Takeover) -> Vec<(&'static str, f64)> {
    let mut figures = vec![("gap_ms", takeover.gap_ms)];
    figures.extend(takeover.detection_ms.map(|ms| ("detection_ms", ms)));
    figures.extend(takeover.activation_ms.map(|ms| ("activation_ms", ms)));
    figures
}

/// Stops the loads; every connection must have been kept.
fn finish(p: &mut Proxied) -> Result<String> {
    let verdicts: Vec<Verdict> = p.loads.drain()?;
    let (kept, all) = verdicts.iter().fold((0, 0), |(kept, all), v| {
        (kept + v.connections_kept, all + v.connections)
    });
    ensure!(kept == all, "only {kept} of {all} connections were kept");
    Ok(format!("{kept} of {all} connections kept"))
}

fn primary_killed(_: &Counts) -> Outcome {
    let mut p = pair()?;
    let takeover = failover::kill(&mut p.primary, &mut p.backup, &p.loads)?;
    p.loads.verify(&p.backup.disk)?;
    Ok((format!("backup solo, {}", finish(&mut p)?), figures(&takeover)))
}

fn backup_killed(_: &Counts) -> Outcome {
    let mut p = pair()?;
    let takeover = failover::kill(&mut p.backup, &mut p.primary, &p.loads)?;
    let (mut again, _) = failover::protect_again(&mut p.bed, &mut p.primary, Side::B)?;
    failover::kill(&mut p.primary, &mut again, &p.loads)?;
    p.loads.verify(&again.disk)?;
    let kept = finish(&mut p)?;
    Ok((
        format!("primary solo, protected again, then taken over, {kept}"),
        figures(&takeover),
    ))
}

fn stopped_short(primary: bool) -> Outcome {
    let mut p = pair()?;
    for _ in 0..5 {
        let vmm = if primary { &p.primary.vmm } else { &p.backup.vmm };
        vmm.signal(libc::SIGSTOP)?;
        std::thread::sleep(ms(u64::from(TIMEOUT) / 4));
        vmm.signal(libc::SIGCONT)?;
        p.still_protected()?;
    }
    Ok((format!("protected through 5 stops, {}", finish(&mut p)?), Vec::new()))
}

/// Frames that the VM of side a has sent so far.
fn frames_sent(p: &Proxied) -> Result<u64> {
    let ns = p.bed.network.ns("a");
    let shown = command("ip", &["-n", &ns, "-s", "-j", "link", "show", TAP])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["rx"]["packets"]
        .as_u64()
        .context("no count of frames")
}

fn primary_stopped_long(_: &Counts) -> Outcome {
    let mut p = pair()?;
    let moment = Instant::now();
    p.primary.vmm.signal(libc::SIGSTOP)?;
    p.backup.vmm.wait_ft_state("solo", LIMIT)?;
    let takeover = failover::after(moment, &mut p.backup, &p.loads)?;
    let before = frames_sent(&p)?;
    p.primary.vmm.signal(libc::SIGCONT)?;
    p.primary.vmm.wait_ft_state("stopped", LIMIT)?;
    ensure!(p.primary.vmm.vm_state()? != "Running", "R4: it says `stopped` and runs");
    std::thread::sleep(ms(500));
    let after = frames_sent(&p)?;
    ensure!(after == before, "R4: the woken primary sent {} frames", after - before);
    p.one_side_goes_on()?;
    Ok((
        format!(
            "backup solo, woken primary stopped without a frame, {}",
            finish(&mut p)?
        ),
        figures(&takeover),
    ))
}

fn backup_stopped_long(_: &Counts) -> Outcome {
    let mut p = pair()?;
    let moment = Instant::now();
    p.backup.vmm.signal(libc::SIGSTOP)?;
    p.primary.vmm.wait_ft_state("solo", LIMIT)?;
    let takeover = failover::after(moment, &mut p.primary, &p.loads)?;
    p.backup.vmm.signal(libc::SIGCONT)?;
    ensure!(!p.one_side_goes_on()?, "the woken backup runs the VM");
    let state = p.backup.vmm.ft_state()?;
    Ok((
        format!("primary solo, woken backup {state}, {}", finish(&mut p)?),
        figures(&takeover),
    ))
}

/// Who goes on since `moment`, what clients saw; then everything is checked.
fn one_goes_on(p: &mut Proxied, moment: Instant) -> Result<(&'static str, Takeover)> {
    let took_over = p.one_side_runs()?;
    let (who, survivor) = if took_over {
        ("backup", &mut p.backup)
    } else {
        ("primary", &mut p.primary)
    };
    let takeover = failover::after(moment, survivor, &p.loads)?;
    p.loads.verify(&survivor.disk)?;
    Ok((who, takeover))
}

fn link(fault: impl Fn(&Proxied)) -> Outcome {
    let mut p = pair()?;
    let moment = Instant::now();
    fault(&p);
    let (who, takeover) = one_goes_on(&mut p, moment)?;
    Ok((format!("{who} solo, {}", finish(&mut p)?), figures(&takeover)))
}

fn link_slow(_: &Counts) -> Outcome {
    // What the guest writes fits through the link.
    let (kv, echo, dirty) = (1, 2, (100, 50));
    over_slow_link(&loads::Options {
        kv,
        echo,
        dirty,
        ..loads::Options::none()
    })
}

fn link_too_slow(_: &Counts) -> Outcome {
    over_slow_link(&loads::Options::everything(1))
}

fn over_slow_link(load: &loads::Options) -> Outcome {
    let mut p = Proxied::prepared(options(), load, |_| Ok(()))?;
    for direction in [p.proxy.forward(), p.proxy.back()] {
        direction.delay(ms(50));
        direction.late_one_in(100);
        direction.rate(10_000_000 / 8);
    }
    let start = Instant::now();
    while start.elapsed() < ms(5000) {
        p.still_protected()?;
    }
    let info = p.primary.vmm.ft_info()?;
    let figure = |what: &str| info[what]["mean"].as_f64().unwrap_or_default();
    let figures = vec![
        ("added_latency_ms", figure("added_latency_ms")),
        ("epoch_ms", figure("epoch_ms")),
        ("run_percent", info["run_percent"].as_f64().unwrap_or_default()),
        (
            "audited_mib",
            info["audit"]["ram_bytes"].as_f64().unwrap_or_default() / (1 << 20) as f64,
        ),
    ];
    // Nothing that is under way is lost when the primary dies.
    failover::kill(&mut p.primary, &mut p.backup, &p.loads)?;
    p.loads.verify(&p.backup.disk)?;
    let seconds = start.elapsed().as_secs();
    Ok((
        format!("protected for {seconds} s, then taken over, {}", finish(&mut p)?),
        figures,
    ))
}

fn shadow_ram_flipped(_: &Counts) -> Outcome {
    let flip = |backup: &Host| {
        backup.vmm.flip_ram_bit()?;
        Ok("audit: the RAM page at 0x".to_string())
    };
    shadow_flipped("audit_mib_s=512", flip)
}

fn shadow_disk_flipped(_: &Counts) -> Outcome {
    let flip = |backup: &Host| {
        let chunk = backup.flip_disk_bit()? / 4096 * 4096;
        Ok(format!("audit: disk _disk0 at {chunk:#x}, 4096 bytes, is not"))
    };
    shadow_flipped("audit_disk_mib_s=512", flip)
}

/// `flip` tells what the reason must name.
fn shadow_flipped(rate: &str, flip: impl Fn(&Host) -> Result<String>) -> Outcome {
    let mut p = pair()?;
    p.primary.vmm.remote(&["ft", "config", rate])?;
    let named = flip(&p.backup)?;
    let moment = Instant::now();
    p.backup.vmm.wait_ft_state("failed", LIMIT)?;
    let found_ms = moment.elapsed().as_secs_f64() * 1e3;
    p.primary.vmm.wait_ft_state("failed", LIMIT)?;
    let reason = reason(&p.primary)?;
    ensure!(reason.contains(&named), "R6: the reason does not name it: {reason}");
    failover::after(moment, &mut p.primary, &p.loads)?;
    p.loads.verify(&p.primary.disk)?;
    Ok((
        format!("primary runs on, {}; `{reason}`", finish(&mut p)?),
        vec![("found_ms", found_ms)],
    ))
}

fn flips_repaired(_: &Counts) -> Outcome {
    let mut p = Proxied::new(Options {
        audit: "repair",
        limits: ["audit_mib_s=512", "audit_disk_mib_s=512"].map(String::from).to_vec(),
        ..options()
    })?;
    p.backup.vmm.flip_ram_bit()?;
    p.backup.flip_disk_bit()?;
    let moment = Instant::now();
    for host in [&mut p.primary, &mut p.backup] {
        host.vmm.wait_for("two repairs", LIMIT, |vmm| {
            let info = vmm.ft_info()?;
            Ok(info["audit"]["repairs"] == 2 && info["state"] == "protected")
        })?;
    }
    let mended_ms = moment.elapsed().as_secs_f64() * 1e3;
    let mut figures = vec![("mended_ms", mended_ms)];
    let takeover = failover::kill(&mut p.primary, &mut p.backup, &p.loads)?;
    p.loads.verify(&p.backup.disk)?;
    figures.push(("gap_ms", takeover.gap_ms));
    Ok((format!("mended, then backup solo, {}", finish(&mut p)?), figures))
}

fn flipped(forward: bool) -> Outcome {
    let mut p = pair()?;
    let moment = Instant::now();
    if forward { p.proxy.forward() } else { p.proxy.back() }.flip();
    let (who, takeover) = one_goes_on(&mut p, moment)?;
    let named = |host: &Host| {
        let log = std::fs::read_to_string(p.bed.dir.join(format!("{}.log", host.vmm.name))).unwrap_or_default();
        log.lines()
            .find(|line| line.contains("frame number"))
            .map(str::to_string)
    };
    let finder = if forward { &p.backup } else { &p.primary };
    let line = named(finder).context("R6: the damage is not named")?;
    let said = line.split("ft: ").last().unwrap_or(&line).to_string();
    Ok((format!("{who} solo, {}; `{said}`", finish(&mut p)?), figures(&takeover)))
}

/// Why protection ended, as the host tells.
fn reason(host: &Host) -> Result<String> {
    Ok(host.vmm.ft_info()?["reason"].as_str().unwrap_or_default().to_string())
}

fn answers(p: &Proxied) -> u64 {
    p.loads.verdicts().iter().map(|v| v.answers).sum()
}

/// With nobody allowed to go on, no client gets an answer.
fn silence(p: &Proxied) -> Result<()> {
    // What was released before may still arrive.
    std::thread::sleep(ms(300));
    let before = answers(p);
    std::thread::sleep(ms(1500));
    ensure!(
        answers(p) == before,
        "R4: {} answers came without the arbiter's",
        answers(p) - before
    );
    Ok(())
}

fn arbiter_gone(_: &Counts) -> Outcome {
    let mut p = pair()?;
    let (here, away) = (p.bed.dir.join("arbiter"), p.bed.dir.join("arbiter-away"));
    std::fs::rename(&here, &away)?;
    p.primary.vmm.kill()?;
    p.backup.vmm.wait_ft_state("waiting_for_arbiter", LIMIT)?;
    silence(&p)?;
    std::fs::rename(&away, &here)?;
    let moment = Instant::now();
    p.backup.vmm.wait_ft_state("solo", LIMIT)?;
    let takeover = failover::after(moment, &mut p.backup, &p.loads)?;
    p.loads.verify(&p.backup.disk)?;
    Ok((
        format!("backup waited, then solo, {}", finish(&mut p)?),
        vec![("gap_ms", takeover.gap_ms)],
    ))
}

/// A small file system of its own, unmounted at the end.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(at: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        command(
            "mount",
            &["-t", "tmpfs", "-o", options, "tmpfs", &at.display().to_string()],
        )?;
        Ok(Self(at.to_path_buf()))
    }

    fn remount(&self, options: &str) -> Result<()> {
        command(
            "mount",
            &["-o", &format!("remount,{options}"), &self.0.display().to_string()],
        )
        .map(drop)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // VMMs have the mount in their own mount namespaces: lazily.
        drop(command("umount", &["-l", &self.0.display().to_string()]));
    }
}

/// A pair with a part of its files on a small file system.
fn with_small(folder: &str, size: &str, after: impl FnOnce(&mut Bed) -> Result<()>) -> Result<(Proxied, Small)> {
    let mut mounted = None;
    let pair = Proxied::prepared(options(), &loads::Options::everything(1), |bed| {
        mounted = Some(Small::mount(&bed.dir.join(folder), &format!("size={size}"))?);
        after(bed)
    })?;
    Ok((pair, mounted.context("not mounted")?))
}

fn arbiter_read_only(_: &Counts) -> Outcome {
    let (mut p, small) = with_small("arbiter", "1m", |_| Ok(()))?;
    small.remount("ro")?;
    p.proxy.cut();
    p.primary.vmm.wait_ft_state("waiting_for_arbiter", LIMIT)?;
    p.backup.vmm.wait_ft_state("waiting_for_arbiter", LIMIT)?;
    silence(&p)?;
    let moment = Instant::now();
    small.remount("rw")?;
    let (who, takeover) = one_goes_on(&mut p, moment)?;
    Ok((
        format!("both waited, then {who} solo, {}", finish(&mut p)?),
        vec![("gap_ms", takeover.gap_ms)],
    ))
}

/// A pair whose backup's disk fails when it is told to, with this flush durability policy.
fn with_failing_disk(durability: &'static str) -> Result<(FailingDisk, Proxied)> {
    let mut mounted = None;
    let options = Options {
        durability,
        ..options()
    };
    let pair = Proxied::prepared(options, &loads::Options::everything(1), |bed| {
        let (folder, behind) = (bed.dir.join("failing"), bed.dir.join("behind.img"));
        mounted = Some(FailingDisk::mount(&folder, &behind)?);
        bed.move_disk(Side::B, "failing/disk.img")
    })?;
    Ok((mounted.context("not mounted")?, pair))
}

/// The backup's disk fails: the primary goes on, and says why.
fn backup_disk_fails(durability: &'static str, fault: impl Fn(&Faults) -> &AtomicBool) -> Outcome {
    // The disk outlives its user.
    let (disk, mut p) = with_failing_disk(durability)?;
    let moment = Instant::now();
    fault(&disk.faults).store(true, Ordering::SeqCst);
    p.primary.vmm.wait_ft_state("failed", LIMIT)?;
    let takeover = failover::after(moment, &mut p.primary, &p.loads)?;
    let reason = reason(&p.primary)?;
    ensure!(reason.contains("os error 5"), "the reason does not say so: {reason}");
    p.loads.verify(&p.primary.disk)?;
    Ok((
        format!("primary runs on, {}; `{reason}`", finish(&mut p)?),
        vec![("gap_ms", takeover.gap_ms)],
    ))
}

fn backup_disk_write_error(_: &Counts) -> Outcome {
    backup_disk_fails("memory-of-both", |faults| &faults.writes)
}

fn backup_disk_flush_error(_: &Counts) -> Outcome {
    backup_disk_fails("disk-of-both", |faults| &faults.flushes)
}

fn backup_disk_full(_: &Counts) -> Outcome {
    // The loads write all of the 16 MiB disk in time, and this is what there is left for it.
    let (mut p, small) = with_small("small", "64m", |bed| bed.move_disk(Side::B, "small/b.img"))?;
    let filler = File::create(small.0.join("filler"))?;
    let mut chunk = 64 << 10;
    while chunk >= 4 << 10 {
        if (&filler).write_all(&vec![1; chunk]).is_err() {
            chunk /= 2;
        }
    }
    let moment = Instant::now();
    p.primary.vmm.wait_ft_state("failed", LIMIT)?;
    failover::after(moment, &mut p.primary, &p.loads)?;
    let reason = reason(&p.primary)?;
    ensure!(
        reason.contains("No space") || reason.contains("os error 28"),
        "the reason does not say so: {reason}"
    );
    p.loads.verify(&p.primary.disk)?;
    Ok((format!("primary runs on, {}; `{reason}`", finish(&mut p)?), Vec::new()))
}

fn in_precopy(p: &mut Bed) -> Result<(Host, Host, Loads)> {
    let mut primary = p.boot(Side::A)?;
    let loads = Loads::start(p, &loads::model(p), &loads::Options::everything(1))?;
    let backup = p.backup(Side::B)?;
    let enable: Vec<String> = p.enable_args(&backup);
    let mut args: Vec<&str> = enable.iter().map(String::as_str).collect();
    args.extend(["--no-wait", "--limits", "precopy_mib_s=8"]);
    primary.vmm.remote(&args)?;
    primary.vmm.wait_ft_state("syncing", LIMIT)?;
    std::thread::sleep(ms(300));
    ensure!(primary.vmm.ft_state()? == "syncing", "pre-copy is over already");
    Ok((primary, backup, loads))
}

fn backup_killed_in_precopy(_: &Counts) -> Outcome {
    let mut bed = Bed::new(Options::default())?;
    let (mut primary, mut backup, mut loads) = in_precopy(&mut bed)?;
    backup.vmm.kill()?;
    primary.vmm.wait_ft_state("failed", LIMIT)?;
    loads.wait_progress(20)?;
    loads.verify(&primary.disk)?;
    ensure!(primary.vmm.vm_state()? == "Running");
    let mut again = bed.backup(Side::B)?;
    bed.protect(&mut primary, &mut again)?;
    Ok((
        "primary runs on, state failed; protected again afterwards".into(),
        Vec::new(),
    ))
}

fn primary_killed_in_precopy(_: &Counts) -> Outcome {
    let mut bed = Bed::new(Options::default())?;
    let (mut primary, mut backup, _loads) = in_precopy(&mut bed)?;
    primary.vmm.kill()?;
    backup.vmm.wait_ft_state("listening", LIMIT)?;
    ensure!(backup.vmm.vm_state().is_err(), "the backup has a VM");
    Ok(("backup listens again, without a VM".into(), Vec::new()))
}
