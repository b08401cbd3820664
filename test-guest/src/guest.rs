//! The guest's life: finding devices, and the loop that serves.

use core::sync::atomic::Ordering;

use alloc::boxed::Box;
use alloc::vec::Vec;

use guest_core::acpi;
use guest_core::cmdline::{self, Options};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};

use crate::memory::{self, BootInfo, Physical};
use crate::services::{Context, Power, Services};
use crate::store::Store;
use crate::time::{Clock, KvmClock};
use crate::virtio::{self, Block, Net, Rng, Transport};
use crate::work::{self, Next, Worker};
use crate::{apic, cpu, log, pci, power, smp};

/// Frames taken in between two rounds of the services.
const BURST: usize = 128;
/// Longest sleep, in microseconds.
const NAP: u64 = 1_000_000;
/// Longest sleep where only the timer interrupts, in microseconds.
const SHORT_NAP: u64 = 500;
/// After a sleep shorter than this, in microseconds, the next request is likely to come soon as well: the guest then looks
/// at its queues for `LOOK` before it sleeps. A client that asks again at once finds it awake.
const SHORT_SLEEP: u64 = 200;
const LOOK: u64 = 100;
/// Time for the worker between two polls where there is one processor, in microseconds.
const WORK_SLICE: u64 = 100;
/// How long an interrupt may take to come, in microseconds.
const PATIENCE: u64 = 200_000;

/// The devices that were found.
#[derive(Default)]
struct Devices {
    net: Option<Net>,
    block: Option<Block>,
    rng: Option<Rng>,
}

fn find_devices(interrupt: Option<(u32, u8)>) -> Devices {
    let mut placer = pci::Placer::new();
    let mut devices = Devices::default();
    for function in pci::functions() {
        let Some(transport) = Transport::new(&function, &mut placer, interrupt) else {
            continue;
        };
        let (kind, at) = (transport.kind, function.location);
        let taken = match kind {
            virtio::NET if devices.net.is_none() => {
                devices.net = Net::new(transport, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
                devices.net.is_some()
            }
            virtio::BLOCK if devices.block.is_none() => {
                devices.block = Block::new(transport);
                devices.block.is_some()
            }
            virtio::RNG if devices.rng.is_none() => {
                devices.rng = Rng::new(transport);
                devices.rng.is_some()
            }
            _ => continue,
        };
        let what = ["", "net", "block", "", "rng"][usize::from(kind)];
        log!(
            "virtio-{what} at {at}{}",
            if taken { "" } else { " refused its set-up" }
        );
    }
    devices
}

/// A timer interrupt comes, also into `hlt`.
fn timer_works(clock: &Clock) -> bool {
    let counters = cpu::counters(0);
    let before = counters.timer.load(Ordering::Relaxed);
    apic::arm(100);
    let end = clock.micros() + PATIENCE;
    while counters.timer.load(Ordering::Relaxed) == before {
        if clock.micros() > end {
            return false;
        }
        core::hint::spin_loop();
    }
    counters.pending.store(0, Ordering::SeqCst);
    apic::arm(1000);
    cpu::idle(counters.pending);
    counters.timer.load(Ordering::Relaxed) > before + 1
}

/// A device interrupts: the source of random numbers is asked, for its answer is of no consequence.
fn device_works(rng: &mut Rng, clock: &Clock) -> bool {
    let counters = cpu::counters(0);
    let before = counters.other.load(Ordering::Relaxed);
    if rng.listen() || !rng.ask(1) {
        return false;
    }
    let end = clock.micros() + PATIENCE;
    while counters.other.load(Ordering::Relaxed) == before && clock.micros() < end {
        core::hint::spin_loop();
    }
    let came = counters.other.load(Ordering::Relaxed) != before;
    while rng.take().is_none() && clock.micros() < end {}
    came
}

/// How the first processor waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// For interrupts of devices and timer.
    Interrupts,
    /// In short naps by the timer.
    Naps,
    /// Not at all.
    Polling,
}

fn interface(options: &Options, net: &mut Net, now: Instant) -> Interface {
    let mut config = Config::new(EthernetAddress(net.mac).into());
    config.random_seed = cpu::tsc();
    let mut interface = Interface::new(config, net, now);
    let (ip, prefix) = options.ip;
    interface.update_ip_addrs(|addresses| {
        // There is room for one.
        let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(Ipv4Address::from(ip)), prefix));
    });
    if let Some(gateway) = options.gateway {
        // There is room for one.
        let _ = interface
            .routes_mut()
            .add_default_ipv4_route(Ipv4Address::from(gateway));
    }
    interface
}

fn options(info: &BootInfo) -> Options {
    match cmdline::parse(&info.cmdline) {
        Ok(options) => options,
        Err(word) => panic!("command line: {word} is not understood"),
    }
}

/// Everything, from ring 3's first steps on.
pub fn run() -> ! {
    let info = memory::init();
    let options = options(&info);
    let kvm_clock = KvmClock::new();
    let clock: &'static Clock = Box::leak(Box::new(Clock::new(kvm_clock.as_ref())));
    log!("{} MiB, TSC {} kHz by {}", info.ram >> 20, clock.khz(), clock.source);
    let platform = acpi::read(&Physical, info.rsdp);
    apic::init(clock);
    let own_id = apic::id();
    let timer = timer_works(clock);

    let interrupt = (timer && !options.poll).then_some((own_id, apic::VECTOR_DEVICE));
    let mut devices = find_devices(interrupt);
    let all_interrupt = devices.net.as_ref().is_none_or(|d| d.interrupts)
        && devices.block.as_ref().is_none_or(|d| d.interrupts)
        && devices
            .rng
            .as_mut()
            .is_none_or(|d| d.interrupts && device_works(d, clock));
    let waiting = match (options.poll, timer, all_interrupt) {
        (false, true, true) => Waiting::Interrupts,
        (false, true, false) => Waiting::Naps,
        _ => Waiting::Polling,
    };

    let arena: &'static [memory::Region] = Vec::leak(info.arena.clone());
    let mut worker = Some(Worker::new(arena));
    let mut processors = 1;
    let second = platform.processors.iter().copied().find(|id| *id != own_id);
    if let (Some(id), Some(work)) = (second, worker.take()) {
        match smp::start(id, work, clock, timer) {
            Ok(()) => processors = 2,
            Err(back) => worker = Some(back),
        }
    }
    let worker = if processors == 1 {
        Some(worker.unwrap_or_else(|| Worker::new(arena)))
    } else {
        None
    };
    let way = match waiting {
        Waiting::Interrupts => "interrupts",
        Waiting::Naps => "polling by the timer: devices do not interrupt",
        Waiting::Polling => "polling",
    };
    log!(
        "{processors} of {} processors, {}, {way}",
        platform.processors.len().max(1),
        apic::mode()
    );

    let store = match devices.block {
        Some(block) if options.kv => Store::open(block, clock),
        Some(_) => Err("the store is turned off"),
        None => Err("there is no disk"),
    };
    match &store {
        Ok(store) => log!("store: {} keys, {} slots", store.keys(), store.slots()),
        Err(reason) => log!("no store: {reason}"),
    }
    let Some(net) = devices.net else {
        panic!("there is no virtio-net")
    };
    let context = Context {
        clock,
        kvm_clock,
        store,
        rng: devices.rng,
        platform,
        processors,
        interrupts: waiting == Waiting::Interrupts,
        frames: (0, 0),
        arena_pages: work::arena_pages(arena),
        count: 0,
        power: None,
    };
    serve(&options, net, context, worker, waiting)
}

fn instant(clock: &Clock) -> Instant {
    Instant::from_micros(clock.micros() as i64)
}

/// Serves for ever.
fn serve(options: &Options, mut net: Net, mut context: Context, mut worker: Option<Worker>, waiting: Waiting) -> ! {
    let clock = context.clock;
    let mut interface = interface(options, &mut net, instant(clock));
    let mut sockets = SocketSet::new(Vec::new());
    let mut services = Services::new(&mut sockets, options.window << 10);
    services.step(&mut sockets, &mut context);
    let (ip, prefix) = options.ip;
    log!("address {}/{prefix}", Ipv4Address::from(ip));
    log!("ready");

    let pending = cpu::counters(0).pending;
    // When the timer will fire.
    let mut armed = 0;
    // The next request is likely to come soon.
    let mut eager = false;
    loop {
        pending.store(0, Ordering::SeqCst);
        let mut worked = poll(&mut interface, &mut net, &mut sockets, &mut services, &mut context);
        if let Some(request) = context.power.take() {
            end(request, &context);
        }
        let mut wake_at = clock.micros() + NAP;
        if let Some(worker) = &mut worker {
            match worker.step(clock, WORK_SLICE) {
                Next::Now => worked = true,
                Next::At(time) => wake_at = wake_at.min(time),
                Next::Never => {}
            }
        }
        if worked || waiting == Waiting::Polling {
            core::hint::spin_loop();
            continue;
        }
        let now = clock.micros();
        if let Some(at) = interface.poll_at(instant(clock), &sockets) {
            wake_at = wake_at.min(at.total_micros().max(0) as u64);
        }
        if eager && soon(clock, wake_at.min(now + LOOK), &net, &context) {
            continue;
        }
        if waiting == Waiting::Naps {
            wake_at = wake_at.min(now + SHORT_NAP);
        } else if listen(&mut net, &context) {
            continue;
        }
        if wake_at <= now {
            continue;
        }
        // A timer that fires earlier only costs a look.
        if armed <= now || armed > wake_at {
            apic::arm(wake_at - now);
            armed = wake_at;
        }
        cpu::idle(pending);
        eager = clock.micros() - now < SHORT_SLEEP;
        net.silence();
        if let Ok(store) = &context.store {
            store.silence();
        }
        if let Some(rng) = &context.rng {
            rng.silence();
        }
    }
}

/// Waits busily for something from the network or the disk, until `end`; true if something has come.
fn soon(clock: &Clock, end: u64, net: &Net, context: &Context) -> bool {
    loop {
        if net.has_used() || context.store.as_ref().is_ok_and(Store::has_used) {
            return true;
        }
        if clock.micros() >= end {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Asks all devices for interrupts; true if there is something to do already.
fn listen(net: &mut Net, context: &Context) -> bool {
    let mut more = net.listen();
    if let Ok(store) = &context.store {
        more |= store.listen();
    }
    if let Some(rng) = &context.rng {
        more |= rng.listen();
    }
    more
}

/// One round: frames in, services, frames out. True if anything was done.
fn poll(
    interface: &mut Interface,
    net: &mut Net,
    sockets: &mut SocketSet<'_>,
    services: &mut Services,
    context: &mut Context,
) -> bool {
    let now = instant(context.clock);
    interface.poll_maintenance(now);
    let mut worked = false;
    for _ in 0..BURST {
        match interface.poll_ingress_single(now, net, sockets) {
            PollIngressSingleResult::None => break,
            _ => worked = true,
        }
    }
    context.frames = (net.received, net.sent);
    worked |= services.step(sockets, context);
    let now = instant(context.clock);
    while interface.poll_egress(now, net, sockets) == PollResult::SocketStateChanged {
        worked = true;
    }
    net.notify();
    worked
}

fn end(request: Power, context: &Context) {
    match request {
        Power::Off => {
            log!("power-off");
            power::off(&context.platform, context.clock);
        }
        Power::Reset => {
            log!("reset");
            power::reset(&context.platform, context.clock);
        }
    }
    log!("the machine goes on");
}
