//! The guest under QEMU with COLO, QEMU's own fault tolerance: both QEMUs run the guest, a third part compares what the
//! two send, and where that differs the secondary is made the primary's copy again (docs/COLO-FT.txt of QEMU's sources,
//! whose arrangement of filters this is). The guest has no disk: replication of disks is not set up.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::netns::{A_LOG_IP, B_LOG_IP};
use crate::pair::{Bed, Side};
use crate::qemu::{Qemu, Spec};

/// Hang guard of what QEMU is asked, and of its first copy.
const LIMIT: Duration = Duration::from_secs(60);

/// COLO is broken on q35 in the versions that have it; pc is what its users take.
const MACHINE: [&str; 6] = ["-machine", "pc", "-accel", "kvm", "-cpu", "host"];

/// Where a program that was unpacked somewhere finds the firmware.
const FIRMWARE: [&str; 2] = ["-L", "/usr/share/seabios"];

/// QEMU's monitor (QMP: a line of JSON for each command, answer and event).
struct Monitor {
    reader: BufReader<UnixStream>,
    /// Times that the VM was stopped.
    stops: u64,
}

impl Monitor {
    fn open(path: &Path) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => return Err(e).with_context(|| path.display().to_string()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut this = Self {
            reader: BufReader::new(stream),
            stops: 0,
        };
        this.line()?;
        this.ask("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// A command; its answer.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let mut line = self.line()?;
            if let Some(error) = line.get("error") {
                bail!("QEMU, {command}: {error}");
            }
            if line.get("return").is_some() {
                return Ok(line["return"].take());
            }
            self.stops += u64::from(line["event"] == "STOP");
        }
    }
}

fn spec<'a>(program: &'a Path, side: Side, args: &[&str]) -> Spec<'a> {
    Spec {
        program,
        side,
        machine: &MACHINE,
        disk: false,
        args: FIRMWARE.iter().chain(args).map(|arg| (*arg).to_string()).collect(),
    }
}

/// The guest on host a, without COLO.
pub fn alone(bed: &Bed, program: &Path) -> Result<Qemu> {
    let mut qemu = Qemu::start(bed, &spec(program, Side::A, &[]))?;
    qemu.wait_ready(1)?;
    Ok(qemu)
}

/// The guest on hosts a and b.
pub struct Colo {
    primary: Qemu,
    secondary: Qemu,
    monitor: Monitor,
}

impl Colo {
    /// Boots the guest on host a and waits until host b runs it too.
    pub fn boot(bed: &Bed, program: &Path) -> Result<Self> {
        let listen =
            |id: &str, host: &str, port: u32| format!("socket,id={id},host={host},port={port},server=on,wait=off");
        let connect = |id: &str, host: &str, port: u32| format!("socket,id={id},host={host},port={port}");
        let filter = |what: &str| format!("{what},vnet_hdr_support=on");
        let monitor = |side: Side| bed.dir.join(format!("qemu-{}.qmp", side.name()));
        let qmp = |side: Side| format!("unix:{},server=on,wait=off", monitor(side).display());
        let options = |chardevs: Vec<String>, objects: Vec<String>| -> Vec<String> {
            let chardevs = chardevs.into_iter().map(|value| ("-chardev", value));
            let objects = objects.into_iter().map(|value| ("-object", value));
            chardevs
                .chain(objects)
                .flat_map(|(option, value)| [option.to_string(), value])
                .collect()
        };
        let primary = options(
            vec![
                listen("mirror0", A_LOG_IP, 9003),
                listen("compare1", A_LOG_IP, 9004),
                listen("compare0", "127.0.0.1", 9001),
                connect("compare0-0", "127.0.0.1", 9001),
                listen("compare_out", "127.0.0.1", 9005),
                connect("compare_out0", "127.0.0.1", 9005),
            ],
            vec![
                filter("filter-mirror,id=m0,netdev=net0,queue=tx,outdev=mirror0"),
                filter("filter-redirector,netdev=net0,id=redire0,queue=rx,indev=compare_out"),
                filter("filter-redirector,netdev=net0,id=redire1,queue=rx,outdev=compare0"),
                "iothread,id=iothread1".into(),
                filter(
                    "colo-compare,id=comp0,primary_in=compare0-0,secondary_in=compare1,outdev=compare_out0,\
                     iothread=iothread1",
                ),
            ],
        );
        let secondary = options(
            vec![connect("red0", A_LOG_IP, 9003), connect("red1", A_LOG_IP, 9004)],
            vec![
                filter("filter-redirector,id=f1,netdev=net0,queue=tx,indev=red0"),
                filter("filter-redirector,id=f2,netdev=net0,queue=rx,outdev=red1"),
                filter("filter-rewriter,id=rew0,netdev=net0,queue=all"),
            ],
        );
        let incoming = format!("tcp:{B_LOG_IP}:9998");
        let start = |side, args: &[String], more: &[&str]| {
            let qmp = qmp(side);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            Qemu::start(bed, &spec(program, side, &[&args[..], &["-qmp", &qmp], more].concat()))
        };
        let mut first = start(Side::A, &primary, &[])?;
        first.wait_ready(1)?;
        let mut this = Self {
            monitor: Monitor::open(&monitor(Side::A))?,
            secondary: start(Side::B, &secondary, &["-incoming", &incoming])?,
            primary: first,
        };
        let mut other = Monitor::open(&monitor(Side::B)).with_context(|| this.secondary.errors())?;
        for monitor in [&mut this.monitor, &mut other] {
            let colo = json!({"capabilities": [{"capability": "x-colo", "state": true}]});
            monitor.ask("migrate-set-capabilities", colo)?;
        }
        // As fast as it goes.
        this.monitor
            .ask("migrate-set-parameters", json!({"max-bandwidth": 10_000_000_000_u64}))?;
        this.monitor.ask("migrate", json!({"uri": incoming}))?;
        let end = Instant::now() + LIMIT;
        while this.state()? != "colo" {
            let state = this.state()?;
            if Instant::now() > end || ["failed", "completed"].contains(&state.as_str()) {
                bail!(
                    "QEMU does not get into COLO (its migration is {state}): {}{}; Debian 12's QEMU 7.2 does, 10.0 does not",
                    this.primary.errors(),
                    this.secondary.errors()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(this)
    }

    fn state(&mut self) -> Result<String> {
        let info = self.monitor.ask("query-migrate", json!({}))?;
        Ok(info["status"].as_str().unwrap_or_default().to_string())
    }

    /// The primary's process.
    pub fn pid(&self) -> u32 {
        self.primary.pid()
    }

    /// Checkpoints so far; an error when COLO has ended.
    pub fn checkpoints(&mut self) -> Result<u64> {
        let state = self.state()?;
        if state != "colo" {
            bail!(
                "COLO ended ({state}): {}{}",
                self.primary.errors(),
                self.secondary.errors()
            );
        }
        Ok(self.monitor.stops)
    }
}
