//! `scripts/bed2`: runs a script on nested hosts, tries faults there, or compares our VMM with QEMU.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bed1::table::Table;
use bed2::bed::{Bed, Content, Disk, Spec};
use bed2::{bench, compare, faults, places};
use clap::{Args, Parser, Subcommand};

/// The nested test bed: real Linux with KVM under qemu (TCG).
#[derive(Parser)]
#[command(name = "scripts/bed2")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot one or two hosts and run SCRIPT (bash) on each of them as root
    ///
    /// BED_HOST is `a` or `b` there; /out is the results' folder, shared by the hosts; /images holds the guests;
    /// scripts/bed2.d/lib.sh lists the functions at hand (tap, vmm, remote, guest_up, cut_power ...). The exit status is
    /// host a's, or b's when a's power was cut.
    Run(Run),
    /// Faults of hosts and VMMs with a protected Debian guest: what must happen, what happened, figures
    Faults(Table),
    /// Boot time, disk and network of the Debian guest on our VMM beside QEMU's
    Compare(compare::Options),
    /// The Debian guest with FT off and on in turns: computing, compiling, redis, ping, disk, network
    Bench(bench::Options),
}

#[derive(Args)]
struct Run {
    /// Number of hosts; two are joined by one Ethernet
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// vCPUs of each host [default: 2, with two hosts 1]
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory of each host in MiB [default: 4096, with two hosts 3072]
    #[arg(long)]
    memory: Option<u32>,
    /// A disk /dev/bed/NAME on each host: a copy of FILE (default: the Debian guest's disk)
    #[arg(long, value_name = "NAME[=FILE]")]
    disk: Vec<String>,
    /// Folder for results, logs and disks; kept
    #[arg(long)]
    out: Option<PathBuf>,
    /// Seconds until it is given up
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// The script
    script: PathBuf,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run(options),
        Command::Faults(table) => table.run(&faults::all(), &()).map(|failed| i32::from(failed > 0)),
        Command::Compare(options) => compare::run(&options).map(|()| 0),
        Command::Bench(options) => bench::run(&options).map(|()| 0),
    };
    match result {
        Ok(status) => ExitCode::from(status.clamp(0, 255) as u8),
        Err(error) => {
            eprintln!("scripts/bed2: {error:#}");
            ExitCode::from(125)
        }
    }
}

/// A script on one host, and how much of its output was shown.
struct Script {
    host: String,
    running: Option<bed2::Running>,
    shown: u64,
    status: Option<i32>,
}

fn run(options: Run) -> Result<i32> {
    let mut spec = Spec::new("run", options.hosts.into());
    let script = std::fs::read_to_string(&options.script).with_context(|| options.script.display().to_string())?;
    for host in &mut spec.hosts {
        host.cpus = options.cpus.unwrap_or(host.cpus);
        host.memory = options.memory.unwrap_or(host.memory);
        for disk in &options.disk {
            let (name, file) = match disk.split_once('=') {
                Some((name, file)) => (name, PathBuf::from(file)),
                None => (disk.as_str(), places::images()?.join("guest/disk.img")),
            };
            host.disks.push(Disk {
                name: name.into(),
                content: Content::CopyOf(file),
                shared: false,
            });
        }
    }
    spec.out = options.out;
    let start = Instant::now();
    eprintln!("bed 2: booting {} host(s)", options.hosts);
    let mut bed = Bed::start(spec)?;
    eprintln!(
        "bed 2: up after {:.1} s; results in {}",
        start.elapsed().as_secs_f64(),
        bed.out().display()
    );
    std::fs::write(bed.out().join("script"), script)?;
    let quoted: Vec<String> = options
        .args
        .iter()
        .map(|arg| format!("'{}'", arg.replace('\'', r"'\''")))
        .collect();
    let command = format!("set -- {}\n. /out/script", quoted.join(" "));
    let mut scripts = Vec::new();
    for host in bed.hosts() {
        scripts.push(Script {
            host: host.name().into(),
            running: Some(host.spawn(&command)?),
            shown: 0,
            status: None,
        });
    }
    let end = Instant::now() + Duration::from_secs(options.limit);
    while scripts.iter().any(|script| script.running.is_some()) {
        if Instant::now() > end {
            bail!("not done after {} s: ended", options.limit);
        }
        std::thread::sleep(Duration::from_millis(50));
        let requests: Vec<String> = bed.hosts().iter().flat_map(|host| host.asked()).collect();
        for request in requests {
            let Some(name @ ("a" | "b")) = request.strip_prefix("cut ") else {
                eprintln!("bed 2: a script asked for what is not known: {request}");
                continue;
            };
            if usize::from(name == "b") < scripts.len() {
                bed.host(name).cut()?;
                eprintln!("bed 2: power of host {name} cut");
            }
        }
        for (script, host) in scripts.iter_mut().zip(bed.hosts()) {
            let ended = script.running.as_ref().is_none_or(|running| running.ended());
            script.show(host.out())?;
            if host.ended() {
                script.running = None;
            } else if ended && let Some(running) = script.running.take() {
                let output = running.wait(Duration::from_secs(1))?;
                script.show(host.out())?;
                eprint!("{}", output.err);
                script.status = Some(output.status);
            }
        }
    }
    bed.power_off()?;
    eprintln!("bed 2: done after {:.1} s", start.elapsed().as_secs_f64());
    let status = scripts.iter().find_map(|script| script.status);
    bed.passed();
    status.context("no host lived to the script's end")
}

impl Script {
    /// Prints what the script has written since the last time.
    fn show(&mut self, out: &std::path::Path) -> Result<()> {
        let Ok(mut file) = std::fs::File::open(out.join(format!("cmd-{}/1.out", self.host))) else {
            return Ok(()); // not begun
        };
        file.seek(SeekFrom::Start(self.shown))?;
        let mut text = Vec::new();
        self.shown += file.read_to_end(&mut text)? as u64;
        std::io::stdout().write_all(&text)?;
        Ok(())
    }
}
