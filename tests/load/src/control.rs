//! The guest's control service.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::dial::Dial;
use crate::runner::{Client, Load};
use crate::wire::{Error, Wire};

/// Answer to STATUS; fields that the guest does not send are their defaults.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// vCPUs at work.
    pub vcpus: u32,
    /// Microseconds since boot.
    pub uptime_us: u64,
    /// Progress of the CPU burner.
    pub burn: u64,
    /// Pages written by the dirtier.
    pub dirtied: u64,
    /// Pages whose old value was not the expected one.
    pub dirty_errors: u64,
    /// Frames received.
    pub rx: u64,
    /// Frames sent.
    pub tx: u64,
    /// Interrupts taken.
    pub irqs: u64,
    /// `irq` or `poll`.
    pub mode: String,
    /// PUTs served.
    pub kv_puts: u64,
}

/// Answer to CLOCK.
#[derive(Debug, Clone, Deserialize)]
pub struct Clock {
    /// Time stamp counter.
    pub tsc: u64,
    /// Its frequency.
    pub tsc_khz: u64,
    /// kvmclock, where there is one.
    pub kvmclock_ns: Option<u64>,
    /// Real-time clock.
    pub rtc: String,
}

/// A connection to the control service.
pub struct Control(Wire);

fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T, Error> {
    serde_json::from_str(line).map_err(|e| Error::Wrong(format!("control: {line:?}: {e}")))
}

impl Control {
    /// Connects.
    pub fn open(dial: &dyn Dial, to: SocketAddr) -> Result<Self, Error> {
        Wire::open(dial, to).map(Self)
    }

    /// Sends a command and returns the line that answers it.
    pub fn ask(&mut self, command: &str) -> Result<String, Error> {
        self.0.send(format!("{command}\n").as_bytes())?;
        let line = self.0.line()?;
        if line.starts_with("ERR") {
            Err(Error::Wrong(format!("control: {command}: {line}")))
        } else {
            Ok(line)
        }
    }

    /// Where the guest stands.
    pub fn status(&mut self) -> Result<Status, Error> {
        parse(&self.ask("STATUS")?)
    }

    /// Starts (or with 0 ends) the memory dirtier.
    pub fn dirty(&mut self, pages_per_s: u64, working_set_pages: u64) -> Result<(), Error> {
        self.ask(&format!("DIRTY {pages_per_s} {working_set_pages}"))
            .map(|_| ())
    }

    /// Starts or ends the CPU burner.
    pub fn burn(&mut self, on: bool) -> Result<(), Error> {
        self.ask(if on { "BURN 1" } else { "BURN 0" }).map(|_| ())
    }

    /// The guest's clocks.
    pub fn clock(&mut self) -> Result<Clock, Error> {
        parse(&self.ask("CLOCK")?)
    }

    /// Raises the counter by one and returns it.
    pub fn count(&mut self) -> Result<u64, Error> {
        let line = self.ask("COUNT")?;
        let number = line.split_whitespace().next_back().and_then(|word| word.parse().ok());
        number.ok_or_else(|| Error::Wrong(format!("control: COUNT: {line:?}")))
    }

    /// Random bytes from the guest's virtio-rng, in hex.
    pub fn rng(&mut self, bytes: usize) -> Result<String, Error> {
        self.ask(&format!("RNG {bytes}"))
    }

    /// Ends the guest. The connection is of no use afterwards; a guest that ends before its answer arrives is fine.
    pub fn power_off(mut self) -> Result<(), Error> {
        self.leave("POWEROFF")
    }

    /// Boots the guest again.
    pub fn reboot(mut self) -> Result<(), Error> {
        self.leave("REBOOT")
    }

    fn leave(&mut self, command: &str) -> Result<(), Error> {
        match self.ask(command) {
            Ok(_) | Err(Error::Closed { .. } | Error::Broken { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Counts again and again on one connection: each answer must be one more than the last. The counter lives in the guest's
/// RAM alone, so a takeover point that is off by one request shows.
pub fn counter(dial: &dyn Dial, to: SocketAddr, interval: Duration) -> Result<Load, Error> {
    let client = Client::new(Wire::open(dial, to)?, move |wire, gate, meter| {
        let mut control = Control(wire);
        let mut last = None;
        while gate.pass(meter) {
            let sent = Instant::now();
            let count = control.count()?;
            if let Some(last) = last.filter(|last| count != last + 1) {
                return Err(Error::Wrong(format!("the counter went from {last} to {count}")));
            }
            last = Some(count);
            meter.answer(8, Some(sent.elapsed()));
            gate.sleep(interval);
        }
        Ok(())
    })?;
    Ok(Load::start("counter", vec![client]))
}
