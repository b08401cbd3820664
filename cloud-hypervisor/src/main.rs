//! `cloud-hypervisor`: the virtual machine monitor.
//!
//! * [`args`]: the command line; [`logger`]: the log; [`terminal`]: raw mode while a guest's console is on it;
//! * this file: start, wait, clean end.

mod args;
mod logger;
mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use api::options::vmm::PathOrFd;
use api::server::Server;
use api::{Events, Request, VmmService};
use sandbox::ThreadKind;
use sandbox::landlock::Access;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::landlock::Landlock;
use vmm::{Vmm, VmmOptions};

use args::{Args, Start};
use terminal::TerminalService;

/// Exit status for a wrong command line.
const USAGE: u8 = 2;

/// Allocations from this size on, in bytes, are mapped by themselves and go back to the kernel when they are freed.
const MAPPED_ALONE: libc::c_int = 1 << 20;

/// As much freed memory, in bytes, each thread's heap may keep for the next time: fresh memory costs faults.
const KEPT: libc::c_int = 4 << 20;

fn main() -> ExitCode {
    keep_no_large_memory();
    let (args, start) = match Args::from_command_line().and_then(|args| args.start().map(|start| (args, start))) {
        Ok(args) => args,
        Err(e) => return failed(&e, USAGE),
    };
    let result = run(&args, start);
    terminal::restore();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => failed(&e, 1),
    }
}

/// Keeps the allocator from holding on to large memory that is freed.
///
/// glibc raises its threshold for mappings, up to 32 MiB, with each mapping that is freed; from then on such memory comes
/// from heaps of the threads and stays in them, so that each end of a protection leaves more behind (mallopt(3),
/// `M_MMAP_THRESHOLD`). A threshold that is set stays; and then only 128 KiB of freed memory are kept, unless that is set too
/// (`M_TRIM_THRESHOLD`).
fn keep_no_large_memory() {
    for (what, bytes) in [(libc::M_MMAP_THRESHOLD, MAPPED_ALONE), (libc::M_TRIM_THRESHOLD, KEPT)] {
        // SAFETY: mallopt(3) takes two integers and keeps no pointer; no other thread runs yet.
        if unsafe { libc::mallopt(what, bytes) } == 0 {
            eprintln!("cloud-hypervisor: the allocator takes no threshold: freed memory may stay with the process");
        }
    }
}

fn failed(e: &anyhow::Error, status: u8) -> ExitCode {
    eprintln!("cloud-hypervisor: {e:#}");
    if status == USAGE {
        eprintln!("cloud-hypervisor --help tells what is possible");
    }
    ExitCode::from(status)
}

fn run(args: &Args, start: Start) -> Result<()> {
    logger::init(args.log_file.as_deref(), args.verbose)?;
    let panicked = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        log::error!("{info}");
        panicked(info);
    }));
    // Before there are other threads.
    sandbox::confine(args.seccomp).context("--seccomp")?;
    let events = match args.event_monitor()? {
        Some(monitor) => Events::to_file(monitor.open_output().context("--event-monitor")?)?,
        None => Events::none(),
    };
    let landlock = Landlock::new(args.landlock, args.landlock_rules()?).context("--landlock")?;
    if let Some(PathOrFd::Path(path)) = args.api_socket()? {
        // Its file is removed at the end.
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        landlock.allow(dir.unwrap_or(Path::new(".")), Access::REMOVE);
    }
    let socket = args.api_socket()?.map(|at| at.api_socket()).transpose()?;
    // From here on signals are no sudden end, so that the socket's file does not stay behind.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signal handlers")?;
    let vmm = Vmm::new(VmmOptions {
        events: events.clone(),
        ft_arbiter: args.arbiter(),
        landlock,
    })?;
    events.emit("vmm", "starting", &[("pid", std::process::id().to_string())]);
    watch_signals(signals, vmm.clone())?;
    let service: Arc<dyn VmmService> = Arc::new(TerminalService(vmm.clone()));
    let server = socket
        .map(|socket| Server::start(socket, service.clone()))
        .transpose()
        .context("API server")?;
    let started = begin(service.as_ref(), start);
    if started.is_ok() {
        vmm.wait_exit();
    }
    log::info!("the VMM shuts down");
    // The server first: no request comes while the VM is being taken down.
    drop(server);
    vmm.close();
    events.emit("vmm", "shutdown", &[]);
    events.flush();
    started
}

fn begin(service: &dyn VmmService, start: Start) -> Result<()> {
    let (what, requests) = match start {
        Start::Wait => return Ok(()),
        Start::Boot(config) => (
            "the VM cannot be booted",
            vec![Request::VmCreate(config), Request::VmBoot],
        ),
        Start::Restore(config) => ("the VM cannot be restored", vec![Request::VmRestore(config)]),
        #[cfg(feature = "ft")]
        Start::Receive(config) => ("this VMM cannot be a backup", vec![Request::FtReceive(config)]),
    };
    for request in requests {
        service.call(request).context(what)?;
    }
    Ok(())
}

/// A first signal asks for a clean end; a second one does not wait for it.
fn watch_signals(mut signals: Signals, vmm: Arc<Vmm>) -> Result<()> {
    let watch = move || {
        for (count, signal) in signals.forever().enumerate() {
            if count > 0 {
                terminal::restore();
                log::error!("second signal: the VMM ends at once");
                std::process::exit(1);
            }
            log::info!("signal {signal}: the VMM shuts down");
            vmm.request_exit();
        }
    };
    sandbox::spawn(ThreadKind::Signals, "signals", watch)?;
    Ok(())
}
