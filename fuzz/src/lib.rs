//! Fuzz targets: everything that a guest, a peer or a file can hand to the VMM.
//!
//! * this file: the list of targets; one module each: [`log_channel`], [`api_requests`], [`api_http`], [`net`], [`block`],
//!   [`console`], [`bus`] (PCI), [`qcow2`], [`snapshot`], [`kernel`];
//! * [`driver`]: the hostile driver of the virtio targets; [`input`]: takes the fuzzer's bytes apart; [`files`]; [`reach`]: counts how
//!   far inputs get;
//! * `main.rs`: the program that libFuzzer drives (`scripts/fuzz`); `tests/replay.rs`: `cargo test` on the same functions.
//!
//! A target panics when a rule is broken: that is a finding. Whatever an input holds is no reason for one.

pub mod api_http;
pub mod api_requests;
pub mod block;
pub mod bus;
pub mod console;
pub mod driver;
pub mod files;
pub mod input;
pub mod kernel;
pub mod log_channel;
pub mod net;
pub mod qcow2;
pub mod reach;
pub mod snapshot;

/// A fuzz target.
pub struct Target {
    /// Its name for `scripts/fuzz`.
    pub name: &'static str,
    /// Tries one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Places ([`reach::reached`]) that seeds and their neighbours must reach.
    pub reaches: &'static [&'static str],
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "log-channel",
        run: log_channel::run,
        seeds: log_channel::seeds,
        reaches: &[
            "frame read as it came",
            "frame decoded",
            "epoch whole",
            "epoch applied",
            "takeover",
            "outputs released",
        ],
    },
    Target {
        name: "api-requests",
        run: api_requests::run,
        seeds: api_requests::seeds,
        reaches: &[
            "config valid",
            "restore valid",
            "ft-receive read",
            "ft-enable read",
            "ft-config read",
        ],
    },
    Target {
        name: "api-http",
        run: api_http::run,
        seeds: api_http::seeds,
        reaches: &["request served", "HTTP answer"],
    },
    Target {
        name: "net",
        run: net::run,
        seeds: net::seeds,
        reaches: &["net transmit", "net receive", "live to the end", "state loaded"],
    },
    Target {
        name: "block",
        run: block::run,
        seeds: block::seeds,
        reaches: &[
            "block read",
            "block write",
            "block flush",
            "block discard or zeroes",
            "live to the end",
            "state loaded",
        ],
    },
    Target {
        name: "console",
        run: console::run,
        seeds: console::seeds,
        reaches: &["console output", "console input", "live to the end", "state loaded"],
    },
    Target {
        name: "pci",
        run: bus::run,
        seeds: bus::seeds,
        reaches: &["pci reset", "interrupt"],
    },
    Target {
        name: "qcow2",
        run: qcow2::run,
        seeds: qcow2::seeds,
        reaches: &[
            "qcow2 opened for writing",
            "qcow2 read",
            "qcow2 changed",
            "qcow2 opened again",
        ],
    },
    Target {
        name: "snapshot",
        run: snapshot::run,
        seeds: snapshot::seeds,
        reaches: &["snapshot read", "memory loaded", "state read", "state loaded whole"],
    },
    Target {
        name: "kernel",
        run: kernel::run,
        seeds: kernel::seeds,
        reaches: &["ELF loaded", "bzImage loaded"],
    },
];
