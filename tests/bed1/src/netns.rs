//! The network of bed 1: three network namespaces on one machine.
//!
//! `client` holds a bridge with the client's address; `a` and `b` are the two hosts, each with a bridge of its own that
//! joins a tap (the VM's) and a veth to the client's bridge. A second veth joins `a` and `b` directly: the log channel.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Address of the client, on the VM's network.
pub const CLIENT_IP: &str = "192.168.100.1";
/// Address of the guest.
pub const GUEST_IP: &str = "192.168.100.2";
/// Address of host b on the log channel's network.
pub const B_LOG_IP: &str = "10.99.0.2";
/// The VM's tap on either host.
pub const TAP: &str = "tap0";

/// Runs a command; its output is part of the error when it fails.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn ip(args: &str) -> Result<()> {
    run("ip", &args.split_whitespace().collect::<Vec<_>>()).map(|_| ())
}

/// The namespaces; removed when dropped, and with them every tap, bridge and veth.
pub struct Network {
    tag: String,
}

impl Network {
    /// Builds the network; names carry this process's id, so that several beds can stand side by side.
    pub fn new() -> Result<Self> {
        let this = Self {
            tag: format!("ft{}", std::process::id()),
        };
        for side in ["c", "a", "b"] {
            // An earlier process of the same number may have been killed.
            let _ = run("ip", &["netns", "del", &this.ns(side)]);
            ip(&format!("netns add {}", this.ns(side)))?;
            ip(&format!("-n {} link set lo up", this.ns(side)))?;
            ip(&format!(
                "-n {} link add br0 type bridge forward_delay 0",
                this.ns(side)
            ))?;
            ip(&format!("-n {} link set br0 up", this.ns(side)))?;
        }
        ip(&format!("-n {} addr add {CLIENT_IP}/24 dev br0", this.ns("c")))?;
        for side in ["a", "b"] {
            let (ns, client) = (this.ns(side), this.ns("c"));
            ip(&format!(
                "link add up0 netns {ns} type veth peer name to-{side} netns {client}"
            ))?;
            ip(&format!("-n {client} link set to-{side} master br0 up"))?;
            ip(&format!("-n {ns} link set up0 master br0 up"))?;
            ip(&format!("-n {ns} tuntap add {TAP} mode tap vnet_hdr"))?;
            ip(&format!("-n {ns} link set {TAP} master br0 up"))?;
        }
        let (a, b) = (this.ns("a"), this.ns("b"));
        ip(&format!("link add log0 netns {a} type veth peer name log0 netns {b}"))?;
        ip(&format!("-n {a} addr add 10.99.0.1/24 dev log0"))?;
        ip(&format!("-n {b} addr add {B_LOG_IP}/24 dev log0"))?;
        ip(&format!("-n {a} link set log0 up"))?;
        ip(&format!("-n {b} link set log0 up"))?;
        Ok(this)
    }

    /// Name of the namespace of side `a`, `b` or `c` (client).
    pub fn ns(&self, side: &str) -> String {
        format!("{}{side}", self.tag)
    }

    /// Starts a thread inside the client's namespace.
    pub fn client_thread<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Result<std::thread::JoinHandle<Result<T>>> {
        let path = format!("/run/netns/{}", self.ns("c"));
        Ok(std::thread::Builder::new().name(name.into()).spawn(move || {
            let ns = File::open(&path).with_context(|| path.clone())?;
            // SAFETY: setns(2) moves this one thread into the namespace that `ns` keeps open.
            if unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error()).context("enter the client's network namespace");
            }
            Ok(f())
        })?)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in ["a", "b", "c"] {
            let _ = run("ip", &["netns", "del", &self.ns(side)]);
        }
    }
}
