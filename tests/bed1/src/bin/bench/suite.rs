//! The loads that are measured.

use bed1::loads::Options;

/// What of a load counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Progress of the guest's burner per second.
    Burned,
    /// Pages that the guest's dirtier wrote per second.
    Dirtied,
    /// Answers per second.
    Answers,
    /// Bytes per second.
    Bytes,
    /// Nothing is done.
    Idle,
}

/// A load.
pub struct Workload {
    /// For `--only`.
    pub name: &'static str,
    /// In words.
    pub what: String,
    /// What runs.
    pub loads: Options,
    /// What counts.
    pub metric: Metric,
}

/// Pages in a MiB.
const MIB: u64 = 256;

/// All loads.
pub fn all() -> Vec<Workload> {
    let none = || Options {
        counter: false,
        ..Options::none()
    };
    let load = |name, what: &str, metric, loads| Workload {
        name,
        what: what.into(),
        loads,
        metric,
    };
    let dirty = |name, mib_s: u64, set: u64| Workload {
        name,
        what: format!("memory dirtying, {mib_s} MiB/s in a working set of {set} MiB"),
        loads: Options {
            dirty: (mib_s * MIB, set * MIB),
            ..none()
        },
        metric: Metric::Dirtied,
    };
    vec![
        load("idle", "an idle guest", Metric::Idle, none()),
        load(
            "cpu",
            "computing, no memory",
            Metric::Burned,
            Options { burn: true, ..none() },
        ),
        dirty("dirty-10-1", 10, 1),
        dirty("dirty-40-64", 40, 64),
        dirty("dirty-100-256", 100, 256),
        dirty("dirty-400-64", 400, 64),
        dirty("dirty-400-256", 400, 256),
        load(
            "echo-1",
            "TCP request and response, one connection",
            Metric::Answers,
            Options { echo: 1, ..none() },
        ),
        load(
            "echo-32",
            "TCP request and response, 32 connections",
            Metric::Answers,
            Options { echo: 32, ..none() },
        ),
        load(
            "udp",
            "UDP ping each millisecond",
            Metric::Answers,
            Options { udp: true, ..none() },
        ),
        load(
            "cpu-udp",
            "computing, beside a UDP ping each millisecond",
            Metric::Burned,
            Options {
                burn: true,
                udp: true,
                ..none()
            },
        ),
        load(
            "bulk-out",
            "one TCP stream out",
            Metric::Bytes,
            Options { source: 1, ..none() },
        ),
        load(
            "bulk-in",
            "one TCP stream in",
            Metric::Bytes,
            Options { sink: 1, ..none() },
        ),
        load(
            "kv",
            "key-value PUT with flush, one connection",
            Metric::Answers,
            Options { kv: 1, ..none() },
        ),
        load(
            "kv-piped",
            "key-value PUT with flush, eight under way",
            Metric::Answers,
            Options { kv_piped: 1, ..none() },
        ),
    ]
}
