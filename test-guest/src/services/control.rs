//! The control service: requests by line, one after the other.

use alloc::format;
use alloc::string::String;

use guest_core::control::{Request, parse};
use smoltcp::socket::tcp::Socket;

use super::connection::Flow;
use super::store::{Line, Lines, Output};
use super::{Context, Power};
use crate::{apic, cpu, smp, time, work};

/// The client.
#[derive(Default)]
pub struct Control {
    lines: Lines,
    output: Output,
    broken: bool,
    random: Random,
    /// To be done when the answer has been received.
    power: Option<Power>,
}

/// A request for random bytes, and how far it is.
#[derive(Default, PartialEq, Eq)]
enum Random {
    #[default]
    None,
    /// The device is busy with another's.
    Wanted(usize, String),
    /// The device has been asked.
    Asked(usize, String),
}

fn status(context: &Context) -> String {
    use core::sync::atomic::Ordering::Relaxed;
    let (zero, one) = (cpu::counters(0), cpu::counters(1));
    let ticks = zero.timer.load(Relaxed) + one.timer.load(Relaxed);
    let irqs = ticks + zero.other.load(Relaxed) + one.other.load(Relaxed);
    let progress = work::progress();
    let (puts, batches, keys, slots) = match &context.store {
        Ok(store) => (store.puts, store.batches, store.keys(), store.slots()),
        Err(_) => (0, 0, 0, 0),
    };
    let mode = if context.interrupts { "irq" } else { "poll" };
    format!(
        "{{\"vcpus\":{},\"uptime_us\":{},\"ticks\":{ticks},\"burn\":{},\"dirtied\":{},\"dirty_errors\":{},\
         \"rx\":{},\"tx\":{},\"irqs\":{irqs},\"mode\":\"{mode}\",\"kv_puts\":{puts},\"kv_batches\":{batches},\
         \"kv_keys\":{keys},\"kv_slots\":{slots},\"arena_pages\":{},\"apic\":\"{}\",\"tsc_source\":\"{}\"}}\n",
        context.processors,
        context.clock.micros(),
        progress.burned,
        progress.dirtied,
        progress.errors,
        context.frames.0,
        context.frames.1,
        context.arena_pages,
        apic::mode(),
        context.clock.source,
    )
}

impl Control {
    /// Random bytes have come; whoever has asked takes them.
    pub fn random(&mut self, text: &str) {
        if let Random::Asked(count, have) = &mut self.random {
            let left = 2 * *count - have.len();
            have.push_str(&text[..text.len().min(left)]);
            if have.len() < 2 * *count {
                self.random = Random::Wanted(*count, core::mem::take(have));
            } else {
                self.output.push(have.as_bytes());
                self.output.push(b"\n");
                self.random = Random::None;
            }
        }
    }

    /// Asks the device, if it is free.
    fn ask(&mut self, context: &mut Context) {
        if let (Random::Wanted(count, have), Some(rng)) = (&mut self.random, &mut context.rng)
            && rng.ask(*count - have.len() / 2)
        {
            self.random = Random::Asked(*count, core::mem::take(have));
        }
    }

    fn request(&mut self, request: Request, context: &mut Context) {
        let ok = String::from("OK\n");
        let answer = match request {
            Request::Status => status(context),
            Request::Dirty { rate, pages } => {
                work::dirty(rate, pages);
                smp::wake();
                ok
            }
            Request::Burn(on) => {
                work::burn(on);
                smp::wake();
                ok
            }
            Request::Clock => time::clocks(context.clock, context.kvm_clock.as_ref()) + "\n",
            Request::Rng(_) if context.rng.is_none() => String::from("ERR there is no virtio-rng\n"),
            Request::Rng(count) => {
                self.random = Random::Wanted(count, String::new());
                self.ask(context);
                return;
            }
            Request::Count => {
                context.count += 1;
                format!("{}\n", context.count)
            }
            Request::PowerOff if context.platform.sleep.is_none() => {
                String::from("ERR ACPI names no way to power off\n")
            }
            Request::Reboot if context.platform.reset.is_none() => String::from("ERR ACPI names no way to reset\n"),
            Request::PowerOff => {
                self.power = Some(Power::Off);
                ok
            }
            Request::Reboot => {
                self.power = Some(Power::Reset);
                ok
            }
        };
        self.output.push(answer.as_bytes());
    }

    pub fn step(&mut self, socket: &mut Socket<'_>, context: &mut Context) -> Flow {
        let mut worked = self.lines.fill(socket);
        self.ask(context);
        while !self.broken && self.random == Random::None && self.power.is_none() && !self.output.is_full() {
            match self.lines.next() {
                Line::Whole(len) => {
                    match parse(self.lines.line(len)) {
                        Ok(request) => self.request(request, context),
                        Err(reason) => self.output.push(format!("ERR {reason}\n").as_bytes()),
                    }
                    self.lines.done(len);
                    worked = true;
                }
                Line::Missing => break,
                Line::TooLong => {
                    self.output.push(b"ERR line too long\n");
                    self.broken = true;
                }
            }
        }
        worked |= self.output.send(socket);
        if self.power.is_some() && self.output.is_empty() && (socket.send_queue() == 0 || !socket.may_send()) {
            context.power = self.power.take();
        }
        let nothing_comes = self.broken || (!socket.may_recv() && matches!(self.lines.next(), Line::Missing));
        if nothing_comes && self.output.is_empty() && self.random == Random::None && self.power.is_none() {
            return Flow::Over;
        }
        worked.into()
    }
}
