//! Faults of nested hosts with a protected Debian guest: what must happen, what happened, figures.
//!
//! Each case boots a bed of its own. In all of them the clients' sessions must live through it, and no acknowledged write
//! may be lost, unless a case says otherwise.

use anyhow::{Result, bail, ensure};
use bed1::table::{Case, Outcome};

use crate::client::Report;
use crate::protected::Protected;

/// All cases.
pub fn all() -> Vec<Case<()>> {
    let case = |name, must, run| Case { name, must, run };
    vec![
        case("primary-killed", "the backup goes on", primary_killed),
        case("primary-host-off", "the backup goes on", primary_host_off),
        case(
            "primary-stopped",
            "the backup goes on; the woken primary stops and sends nothing more",
            primary_stopped,
        ),
        case(
            "shared-disk",
            "the host of the primary goes off: the backup goes on with the disk that both reach; its file system is clean",
            shared_disk,
        ),
        case(
            "backup-stopped",
            "the primary goes on; the woken backup stops; a new one protects the guest again",
            backup_stopped,
        ),
        case(
            "backup-host-off",
            "the primary goes on, and is protected again by itself when the host is back",
            backup_host_off,
        ),
        case("link-cut", "one side goes on, the other stops", link_cut),
        case(
            "backup-disk-full",
            "the primary goes on without a backup and says why",
            backup_disk_full,
        ),
        case(
            "both-hosts-off-disk",
            "disk-of-both: each copy alone has every acknowledged write",
            |()| both_hosts_off("disk-of-both"),
        ),
        case(
            "both-hosts-off-memory",
            "memory-of-both: the primary's copy has every acknowledged write; the backup's may lack some",
            |()| both_hosts_off("memory-of-both"),
        ),
    ]
}

/// Sessions with a protected guest.
fn protected(client: &'static str) -> Result<Protected> {
    let mut guest = Protected::start("faults", 2)?;
    guest.client_on(client);
    guest.protect()?;
    guest.sessions(10)?;
    Ok(guest)
}

/// The sessions go on, then end; nothing acknowledged is lost.
fn end(mut guest: Protected, happened: &str) -> Outcome {
    guest.progress(10)?;
    let report = guest.end_sessions()?;
    guest.bed.passed();
    Ok((happened.into(), figures(&report)))
}

/// Of sessions whose end was checked.
fn figures(report: &Report) -> Vec<(&'static str, f64)> {
    let gaps = report.sessions().map(|(_, session)| session.max_gap_ms as f64);
    vec![
        ("gap_ms", gaps.into_iter().fold(0.0, f64::max)),
        ("redis_writes", report.redis.answered as f64),
        ("synced_lines", report.ssh.answered as f64),
        ("lost", 0.0),
    ]
}

fn primary_killed(_: &()) -> Outcome {
    let mut guest = protected("b")?;
    guest.kill_primary()?;
    guest.wait_state("b", "solo")?;
    end(guest, "backup solo")
}

fn primary_host_off(_: &()) -> Outcome {
    let mut guest = protected("b")?;
    guest.cut_primary()?;
    guest.wait_state("b", "solo")?;
    end(guest, "backup solo")
}

fn primary_stopped(_: &()) -> Outcome {
    let mut guest = protected("b")?;
    guest.run("a", "kill -STOP $(</run/p.pid)")?;
    guest.wait_state("b", "solo")?;
    guest.progress(10)?;
    guest.run("a", "kill -CONT $(</run/p.pid)")?;
    guest.wait_state("p", "stopped")?;
    end(guest, "backup solo, woken primary stopped")
}

fn shared_disk(_: &()) -> Outcome {
    let mut guest = Protected::start_shared("faults")?;
    guest.receive("/dev/bed/lun")?;
    guest.enable(3000, "--shared-disk _disk0")?;
    guest.sessions(10)?;
    guest.cut_primary()?;
    guest.wait_state("b", "solo")?;
    guest.progress(10)?;
    let report = guest.finish_sessions()?;
    let figures = figures(&report);
    guest.finish(&report)?;
    Ok(("backup solo; file system clean, every line there".into(), figures))
}

fn backup_stopped(_: &()) -> Outcome {
    let mut guest = protected("a")?;
    guest.run("b", "kill -STOP $(</run/b.pid)")?;
    guest.wait_state("p", "solo")?;
    guest.progress(10)?;
    guest.run("b", "kill -CONT $(</run/b.pid)")?;
    guest.wait_state("b", "stopped")?;
    guest.run("b", "kill $(</run/b.pid); wait_for 30 'the end of b' ended b")?;
    guest.idle_backup()?;
    guest.protect()?;
    end(guest, "primary solo, woken backup stopped; protected again")
}

fn backup_host_off(_: &()) -> Outcome {
    let mut guest = Protected::start("faults", 2)?;
    guest.client_on("a");
    guest.receive("/dev/bed/backup")?;
    guest.enable(3000, "--auto-reprotect")?;
    guest.sessions(10)?;
    guest.bed.host("b").cut()?;
    guest.wait_state("p", "solo")?;
    guest.progress(10)?;
    guest.bed.restart("b")?;
    guest.idle_backup()?;
    guest.receive("/dev/bed/backup")?;
    guest.wait_state("p", "protected")?;
    end(guest, "primary solo; protected by itself by the same host")
}

fn link_cut(_: &()) -> Outcome {
    let mut guest = protected("b")?;
    let (a, b) = ("a", "b");
    for host in [a, b] {
        guest.run(host, "ip link set eth0 down")?;
    }
    let decided = "decided() { case $(ft_state NAME) in solo | stopped) ;; *) false ;; esac; }
         wait_for 600 'a decision at NAME' decided; ft_state NAME";
    let one = guest.run(a, &decided.replace("NAME", "p"))?;
    let other = guest.run(b, &decided.replace("NAME", "b"))?;
    let happened = match (one.trim(), other.trim()) {
        ("solo", "stopped") => "primary solo, backup stopped",
        ("stopped", "solo") => "backup solo, primary stopped",
        states => bail!("primary and backup are {states:?}"),
    };
    for host in [a, b] {
        guest.run(host, "ip link set eth0 up")?;
    }
    end(guest, happened)
}

fn backup_disk_full(_: &()) -> Outcome {
    let mut guest = Protected::start("faults", 2)?;
    guest.run("b", "mount -t tmpfs -o size=500m small /mnt")?;
    guest.receive("/mnt/backup.img")?;
    guest.enable(3000, "")?;
    guest.sessions(10)?;
    guest.run("b", "! dd if=/dev/zero of=/mnt/filler bs=4k 2>/dev/null")?;
    guest.wait_state("p", "failed")?;
    let reason = guest.run("a", "remote p ft info --json | jq -r .reason")?;
    ensure!(reason.contains("os error 28"), "the reason does not say so: {reason}");
    end(guest, &format!("primary failed and runs on; `{}`", reason.trim()))
}

fn both_hosts_off(durability: &str) -> Outcome {
    let mut guest = Protected::start("faults", 2)?;
    guest.receive("/dev/bed/backup")?;
    guest.enable(60_000, &format!("--durability {durability}"))?;
    guest.sessions(20)?;
    let acknowledged = guest.cut_both()?;
    let primary = guest.recover("a", "primary", acknowledged)?;
    ensure!(primary.lost() == 0, "the primary's copy: {primary:?}");
    let backup = guest.recover("b", "backup", acknowledged);
    let lost = |copy: &crate::protected::Recovered| copy.lost() as f64;
    let mut figures = vec![
        ("redis_writes", acknowledged[0] as f64),
        ("synced_lines", acknowledged[2] as f64),
        ("lost_primary", lost(&primary)),
    ];
    let happened = match backup {
        Ok(backup) => {
            ensure!(
                durability == "memory-of-both" || backup.lost() == 0,
                "the backup's copy: {backup:?}"
            );
            figures.push(("lost_backup", lost(&backup)));
            "both copies boot".into()
        }
        Err(e) if durability == "memory-of-both" => {
            let what = format!("{e:#}").lines().next().unwrap_or_default().to_string();
            format!("the backup's copy is of no use alone: {what}")
        }
        Err(e) => return Err(e),
    };
    guest.bed.passed();
    Ok((happened, figures))
}
