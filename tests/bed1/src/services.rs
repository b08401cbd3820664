//! Every service of the guest, checked once; the same checks for our VMM and for QEMU.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use load::control::Control;
use load::dial::Dial;
use load::kv::{self, SharedModel};
use load::{CONTROL_PORT, ECHO_PORT, KV_PORT, Load, SINK_PORT, SOURCE_PORT, bulk, echo, udp};

use crate::loads::check_disk;
use crate::netns::guest;

/// Hang guard of each step.
const LIMIT: Duration = Duration::from_secs(60);

fn end(load: Load, answers: u64) -> Result<()> {
    let name = load.name().to_string();
    ensure!(
        load.wait_progress(answers, LIMIT),
        "{name}: fewer than {answers} answers within {} s",
        LIMIT.as_secs()
    );
    let verdict = load.stop();
    ensure!(verdict.good(), "{name}: {:?}", verdict.failures);
    Ok(())
}

/// Asks for each service and checks each answer. `model` is the store's (which may hold records from before a reboot).
pub fn check_all(dial: &dyn Dial, vcpus: u32, disk: &Path, model: &SharedModel, seed: u64) -> Result<()> {
    streams(dial, seed).context("streams")?;
    store(dial, disk, model, seed).context("key-value store")?;
    control(dial, vcpus).context("control")
}

/// Echo over TCP and UDP, sink, source.
fn streams(dial: &dyn Dial, seed: u64) -> Result<()> {
    let many = echo::Options {
        connections: 8,
        size: 16..3000,
        seed,
        ..Default::default()
    };
    end(echo::start(dial, guest(ECHO_PORT), &many)?, 20)?;
    let big = echo::Options {
        size: 20_000..60_000,
        seed,
        ..Default::default()
    };
    end(echo::start(dial, guest(ECHO_PORT), &big)?, 5)?;
    let (load, counts) = udp::start(dial, guest(ECHO_PORT), 1000, Duration::from_millis(1))?;
    end(load, 20)?;
    let lost = counts.lost.load(std::sync::atomic::Ordering::Relaxed);
    ensure!(lost <= 1, "{lost} datagrams were lost");
    end(bulk::sink(dial, guest(SINK_PORT), 2, 0, seed)?, 10)?;
    end(bulk::source(dial, guest(SOURCE_PORT), 2, 0, seed)?, 10)?;
    for length in [1, 1460, 65_537, 1 << 20] {
        bulk::receive_whole(dial, guest(SOURCE_PORT), seed ^ length, length)?;
    }
    bulk::send_wrong_byte(dial, guest(SINK_PORT), seed)?;
    Ok(())
}

fn store(dial: &dyn Dial, disk: &Path, model: &SharedModel, seed: u64) -> Result<()> {
    let at = guest(KV_PORT);
    kv::check_all(dial, at, model).context("records from before")?;
    let before = puts(dial)?;
    let acknowledged = kv::lock(model).acknowledged();
    let one = kv::Options {
        connections: 2,
        seed,
        ..Default::default()
    };
    let piped = kv::Options {
        connections: 2,
        depth: 16,
        seed: seed + 1,
        ..Default::default()
    };
    let loads = [kv::start(dial, at, model, &one)?, kv::start(dial, at, model, &piped)?];
    for load in loads {
        end(load, 200)?;
    }
    kv::check_all(dial, at, model)?;
    check_disk(model, disk)?;
    let (after, now) = (puts(dial)?, kv::lock(model).acknowledged());
    ensure!(
        after - before == now - acknowledged,
        "STAT counts {} PUTs, clients {}",
        after - before,
        now - acknowledged
    );
    let (long_key, long_value) = ("k".repeat(33), "v".repeat(401));
    for wrong in [
        "PUT",
        "PUT onlykey",
        "GET",
        "NONSENSE 1 2",
        &format!("PUT {long_key} v"),
        &format!("PUT k {long_value}"),
    ] {
        let answer = kv::ask(dial, at, wrong)?;
        ensure!(answer.starts_with("ERR"), "{wrong:.40} was answered by {answer}");
    }
    let none = kv::ask(dial, at, "GET neverput")?;
    ensure!(none == "NONE", "GET of an unknown key was answered by {none}");
    Ok(())
}

/// The store's own count of PUTs.
fn puts(dial: &dyn Dial) -> Result<u64> {
    let line = kv::ask(dial, guest(KV_PORT), "STAT")?;
    let word = line.split_whitespace().find_map(|word| word.strip_prefix("puts="));
    word.and_then(|w| w.parse().ok())
        .with_context(|| format!("STAT was answered by {line}"))
}

fn control(dial: &dyn Dial, vcpus: u32) -> Result<()> {
    let mut control = Control::open(dial, guest(CONTROL_PORT))?;
    let status = control.status()?;
    ensure!(
        status.vcpus == vcpus,
        "the guest has {} vCPUs, not {vcpus}",
        status.vcpus
    );
    let first = control.count()?;
    ensure!(control.count()? == first + 1, "COUNT does not rise by one");
    clocks(&mut control)?;
    let (one, two) = (control.rng(64)?, control.rng(64)?);
    let hex = |s: &str| s.len() == 128 && s.bytes().all(|b| b.is_ascii_hexdigit());
    ensure!(hex(&one) && hex(&two) && one != two, "RNG 64 gave {one} and {two}");
    ensure!(control.ask("NONSENSE").is_err(), "an unknown command was accepted");
    control.burn(true)?;
    control.dirty(2000, 500)?;
    let start = Instant::now();
    loop {
        let now = control.status()?;
        ensure!(now.dirty_errors == 0, "{} pages with a wrong value", now.dirty_errors);
        // Beyond the working set each write also checks an old value.
        if now.dirtied > status.dirtied + 1000 && now.burn > status.burn {
            break;
        }
        if start.elapsed() > LIMIT {
            bail!("burner or dirtier do not work: {status:?}, then {now:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    control.burn(false)?;
    control.dirty(0, 0)?;
    Ok(())
}

/// The clocks move on, and not backwards.
fn clocks(control: &mut Control) -> Result<()> {
    let one = control.clock()?;
    std::thread::sleep(Duration::from_millis(50));
    let two = control.clock()?;
    ensure!(two.tsc > one.tsc, "the TSC went from {} to {}", one.tsc, two.tsc);
    if let (Some(one), Some(two)) = (one.kvmclock_ns, two.kvmclock_ns) {
        ensure!(
            two >= one + 50_000_000,
            "kvmclock went from {one} to {two} ns in more than 50 ms"
        );
    }
    ensure!(
        two.rtc >= one.rtc && one.rtc.len() == 19,
        "the RTC went from {} to {}",
        one.rtc,
        two.rtc
    );
    Ok(())
}
