//! `ft info` as a table.

use ft::config::{FtInfo, FtLimits, FtRole, FtStat, FtState};
use ft::reprotect::FtReprotection;

use crate::output::line;

/// What a state means for whoever reads it.
fn meaning(state: FtState) -> &'static str {
    match state {
        FtState::Disabled => "fault tolerance is off",
        FtState::Listening => "waits for a primary",
        FtState::Syncing => "RAM and disks are being copied, not protected until then",
        FtState::Protected => "the backup can take over at any time",
        FtState::Solo => "the VM runs here without a backup: protect it again with `ft enable`",
        FtState::TakingOver => "the VM is being activated here",
        FtState::WaitingForArbiter => "the peer is lost and the arbiter does not answer: nothing goes on without it",
        FtState::Stopped => "the VM does not run here any longer",
        FtState::Failed => "fault tolerance failed",
    }
}

/// Bytes as people read them.
pub fn bytes(n: f64) -> String {
    let (value, unit) = match n {
        n if n < 1024.0 => return format!("{n:.0} B"),
        n if n < 1024.0 * 1024.0 => (n / 1024.0, "KiB"),
        n if n < 1024.0 * 1024.0 * 1024.0 => (n / 1024.0 / 1024.0, "MiB"),
        n => (n / 1024.0 / 1024.0 / 1024.0, "GiB"),
    };
    format!("{value:.1} {unit}")
}

fn row(name: &str, value: &str) {
    line(&format!("{name:<22} {value}"));
}

fn stat(name: &str, stat: &FtStat, show: impl Fn(f64) -> String) {
    line(&format!(
        "{name:<22} {:>14} {:>14} {:>14} {:>14}",
        show(stat.last),
        show(stat.mean),
        show(stat.p50),
        show(stat.p99)
    ));
}

/// Prints everything of `info`.
pub fn table(info: &FtInfo) {
    row("state", &format!("{} ({})", info.state.name(), meaning(info.state)));
    row("role", info.role.name());
    for (name, value) in [
        ("reason", &info.reason),
        ("peer", &info.peer),
        ("transport", &info.transport),
        ("arbiter", &info.arbiter),
    ] {
        if let Some(value) = value {
            row(name, value);
        }
    }
    if info.role == FtRole::None {
        return;
    }
    row("auto-reprotect", if info.auto_reprotect { "on" } else { "off" });
    if !info.spares.is_empty() {
        row("spares", &info.spares.join(" "));
    }
    if let Some(reprotection) = &info.reprotection {
        row("re-protection", &search(reprotection));
    }
    row("generation", &info.generation.to_string());
    row("epoch", &info.epoch.to_string());
    row("committed", &info.committed.to_string());
    row("epochs in all", &info.epochs_total.to_string());
    row("flush durability", info.durability.name());
    if !info.shared_disks.is_empty() {
        row("shared disks", &info.shared_disks.join(", "));
    }
    if info.state == FtState::Syncing {
        let p = &info.progress;
        let left = |left: u64, total: u64| format!("{} of {} left", bytes(left as f64), bytes(total as f64));
        row("RAM", &left(p.ram_bytes_remaining, p.ram_bytes_total));
        row("disks", &left(p.disk_bytes_remaining, p.disk_bytes_total));
        row("disks, left out", &bytes(p.disk_bytes_skipped as f64));
        row("rate", &format!("{}/s, {:.0} s left", bytes(p.rate), p.seconds_left));
    }
    line(&format!(
        "{:<22} {:>14} {:>14} {:>14} {:>14}",
        "", "last", "mean", "p50", "p99"
    ));
    let ms = |n: f64| format!("{n:.3} ms");
    let count = |n: f64| format!("{n:.0}");
    stat("epoch length", &info.epoch_ms, ms);
    stat("pause", &info.pause_ms, ms);
    stat("commit time", &info.commit_ms, ms);
    stat("added latency", &info.added_latency_ms, ms);
    stat("dirty pages", &info.dirty_pages, count);
    stat("bytes per epoch", &info.epoch_bytes, bytes);
    stat("held outputs", &info.held_outputs, count);
    row("outputs waiting", &info.outputs_waiting.to_string());
    let sent = if info.role == FtRole::Backup {
        "bytes received"
    } else {
        "bytes sent"
    };
    row(sent, &bytes(info.bytes_sent as f64));
    let audited = |compared: u64, rounds: u64| match info.role {
        FtRole::Backup => bytes(compared as f64),
        _ => format!("{}, {rounds} times all of it", bytes(compared as f64)),
    };
    row("RAM audited", &audited(info.audit.ram_bytes, info.audit.ram_rounds));
    row("disks audited", &audited(info.audit.disk_bytes, info.audit.disk_rounds));
    let (differed, anew) = (info.audit.mismatches, info.audit.repairs);
    row(
        "audit",
        &format!(
            "{}, {differed} places differed, {anew} copied anew",
            info.audit.policy.name()
        ),
    );
    row("lag", &bytes(info.lag_bytes as f64));
    row("guest may run", &format!("{} % of the time", info.run_percent));
    for (name, value) in [
        ("loss detected in", info.detection_ms),
        ("activated in", info.activation_ms),
    ] {
        if let Some(value) = value {
            row(name, &ms(value));
        }
    }
    limits(&info.limits);
}

/// How the search for a new backup goes.
pub fn search(reprotection: &FtReprotection) -> String {
    let mut text = format!("{} attempts", reprotection.attempts);
    if let Some(peer) = &reprotection.trying {
        text += &format!(", asking {peer}");
    }
    if let Some(seconds) = reprotection.next_in_s {
        text += &format!(", next one in {seconds:.0} s");
    }
    if let Some(error) = &reprotection.last_error {
        text += &format!("; {error}");
    }
    text
}

/// Prints the limits in force.
pub fn limits(limits: &FtLimits) {
    row("max_epoch_ms", &format!("{} ms", limits.max_epoch_ms));
    row("min_epoch_us", &format!("{} us", limits.min_epoch_us));
    row("max_epoch_mib", &format!("{} MiB", limits.max_epoch_mib));
    row("overhead_percent", &format!("{} %", limits.overhead_percent));
    row("max_lag_mib", &format!("{} MiB", limits.max_lag_mib));
    row("heartbeat_ms", &format!("{} ms", limits.heartbeat_ms));
    row("heartbeat_timeout_ms", &format!("{} ms", limits.heartbeat_timeout_ms));
    let rate = |rate: u32, none: &str| match rate {
        0 => format!("0 ({none})"),
        rate => format!("{rate} MiB/s"),
    };
    row("precopy_mib_s", &rate(limits.precopy_mib_s, "no limit"));
    row("audit_mib_s", &rate(limits.audit_mib_s, "none"));
    row("audit_disk_mib_s", &rate(limits.audit_disk_mib_s, "none"));
    row("delta_cache_mib", &format!("{} MiB", limits.delta_cache_mib));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_named_as_in_json() {
        for state in [
            FtState::Disabled,
            FtState::Listening,
            FtState::Syncing,
            FtState::Protected,
            FtState::Solo,
            FtState::TakingOver,
            FtState::WaitingForArbiter,
            FtState::Stopped,
            FtState::Failed,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        for role in [FtRole::None, FtRole::Primary, FtRole::Backup] {
            assert_eq!(serde_json::to_value(role).unwrap(), role.name());
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1536.0), "1.5 KiB");
        assert_eq!(bytes((3u64 << 30) as f64), "3.0 GiB");
    }
}
