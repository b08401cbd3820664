//! The network of bed 1: four network namespaces on one machine.
//!
//! `c` (the client) holds a bridge with the client's address; `a`, `b` and `s` (the spare one) are the hosts, each with a
//! bridge of its own that joins a tap (the VM's) and a veth to the client's bridge. Further veths join the hosts directly,
//! each with each: the log channel.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use load::dial::{Dial, Local};

use crate::cleanup::{self, Registered};

/// Address of the client, on the VM's network.
pub const CLIENT_IP: &str = "192.168.100.1";
/// Address of the guest.
pub const GUEST_IP: &str = "192.168.100.2";
/// Address of host a on the log channel's network.
pub const A_LOG_IP: &str = "10.99.0.1";
/// Address of host b on the log channel's network.
pub const B_LOG_IP: &str = "10.99.0.2";
/// Address of host s on the log channel's network.
pub const S_LOG_IP: &str = "10.99.0.3";
/// The VM's tap on each host.
pub const TAP: &str = "tap0";

const HOSTS: [&str; 3] = ["a", "b", "s"];
const SIDES: [&str; 4] = ["a", "b", "s", "c"];

/// Runs a command that changes the machine; its output is part of the error when it fails.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = cleanup::creating(|| Command::new(program).args(args).output());
    let output = output.with_context(|| format!("start {program}"))?;
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

/// Sets the most that the kernel buffers for a TCP connection, in the namespace of the calling thread.
fn set_buffers(receive: u32, send: u32) -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/tcp_rmem", format!("4096 131072 {receive}"))?;
    std::fs::write("/proc/sys/net/ipv4/tcp_wmem", format!("4096 65536 {send}"))
}

/// TCP's congestion control in the namespace of the calling thread, whatever this machine's is: Linux's own default, or Reno
/// where a namespace may not have that (tcp_allowed_congestion_control), which every namespace may have.
fn set_congestion_control() -> io::Result<()> {
    let set = |name| std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", name);
    set("cubic").or_else(|_| set("reno"))
}

/// The namespaces; removed when dropped, and with them every tap, bridge and veth.
pub struct Network {
    tag: String,
    registered: Vec<Registered>,
}

impl Network {
    /// Builds the network; names carry this process's id, so that several beds can stand side by side.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut this = Self {
            tag: cleanup::name(COUNT.fetch_add(1, Ordering::Relaxed)),
            registered: Vec::new(),
        };
        for side in SIDES {
            this.registered.push(Registered::namespace(&this.ns(side)));
            ip(&format!("netns add {}", this.ns(side)))?;
            ip(&format!("-n {} link set lo up", this.ns(side)))?;
            this.within(side, set_congestion_control)
                .context("congestion control")?;
            ip(&format!(
                "-n {} link add br0 type bridge forward_delay 0",
                this.ns(side)
            ))?;
            ip(&format!("-n {} link set br0 up", this.ns(side)))?;
        }
        ip(&format!("-n {} addr add {CLIENT_IP}/24 dev br0", this.ns("c")))?;
        for side in HOSTS {
            let (ns, client) = (this.ns(side), this.ns("c"));
            ip(&format!(
                "link add up0 netns {ns} type veth peer name to-{side} netns {client}"
            ))?;
            ip(&format!("-n {client} link set to-{side} master br0 up"))?;
            ip(&format!("-n {ns} link set up0 master br0 up"))?;
            ip(&format!("-n {ns} tuntap add {TAP} mode tap vnet_hdr"))?;
            ip(&format!("-n {ns} link set {TAP} master br0 up"))?;
        }
        this.join(("a", "log0", "/24"), ("b", "log0", "/24"))?;
        this.join(("a", "log1", "/32"), ("s", "log0", "/32"))?;
        this.join(("b", "log1", "/32"), ("s", "log1", "/32"))?;
        // Little, so that a stream that stands still shows at once.
        this.within("c", || set_buffers(256 << 10, 256 << 10))
            .context("socket buffers of the client")?;
        Ok(this)
    }

    /// A veth for the log channel between two hosts. What is no whole network needs a route to the other.
    fn join(&self, one: (&str, &str, &str), two: (&str, &str, &str)) -> Result<()> {
        let (near, far) = (self.ns(one.0), self.ns(two.0));
        ip(&format!(
            "link add {} netns {near} type veth peer name {} netns {far}",
            one.1, two.1
        ))?;
        for ((side, link, mask), other) in [(one, two.0), (two, one.0)] {
            let (ns, own, other) = (self.ns(side), Self::log_ip(side), Self::log_ip(other));
            ip(&format!("-n {ns} addr add {own}{mask} dev {link}"))?;
            ip(&format!("-n {ns} link set {link} up"))?;
            if mask == "/32" {
                ip(&format!("-n {ns} route add {other}/32 dev {link} src {own}"))?;
            }
        }
        Ok(())
    }

    /// The client buffers as much as Linux does by itself: for streams that are to be fast.
    pub fn usual_buffers(&self) -> io::Result<()> {
        self.within("c", || set_buffers(6 << 20, 4 << 20))
    }

    /// Name of the namespace of side `a`, `b`, `s` or `c` (client).
    pub fn ns(&self, side: &str) -> String {
        format!("{}{side}", self.tag)
    }

    /// Does something, for example opens a socket, inside the namespace of a side.
    pub fn within<T: Send>(&self, side: &str, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let ns = File::open(format!("/run/netns/{}", self.ns(side)))?;
        let inside = || {
            // SAFETY: setns(2) moves this one short-lived thread into the namespace that `ns` keeps open.
            if unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            f()
        };
        let panicked = || io::Error::other("the thread inside the namespace panicked");
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap_or_else(|_| Err(panicked())))
    }

    /// Address of a host on the log channel's network.
    pub fn log_ip(side: &str) -> &'static str {
        match side {
            "a" => A_LOG_IP,
            "b" => B_LOG_IP,
            _ => S_LOG_IP,
        }
    }

    /// Takes the link of the log channel between a and b down or up again, at one side.
    pub fn set_log_link(&self, side: &str, up: bool) -> Result<()> {
        ip(&format!(
            "-n {} link set log0 {}",
            self.ns(side),
            if up { "up" } else { "down" }
        ))
    }
}

impl Dial for Network {
    fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.within("c", || Local.tcp(to))
    }

    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        self.within("c", || Local.udp(to))
    }
}

/// Address of a service of the guest.
pub fn guest(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 168, 100, 2], port))
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in SIDES {
            cleanup::creating(|| cleanup::delete_namespace(&self.ns(side)));
        }
        self.registered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_address_is_the_one_that_the_command_line_gives() {
        assert_eq!(guest(7).ip().to_string(), GUEST_IP);
    }
}
