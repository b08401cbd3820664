//! Bulk streams of a known pattern. The guest checks each byte of a sink's stream; the client each of a source's. A byte
//! that is missing, repeated or changed shifts or breaks the pattern and is found.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::meter::Meter;
use crate::pattern;
use crate::runner::{Client, Gate, Load};
use crate::wire::{Error, Wire};

/// The guest reports its progress after so many bytes each.
pub const REPORT_STEP: u64 = 64 << 10;
/// Bytes whose report may be outstanding: more than TCP has under way, so it bounds nothing but the work at the end.
const WINDOW: u64 = 128 * REPORT_STEP;

/// Keeps a stream below a number of bytes per second.
struct Pace {
    bytes_per_s: u64,
    start: Instant,
    done: u64,
}

impl Pace {
    fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            start: Instant::now(),
            done: 0,
        }
    }

    fn after(&mut self, bytes: u64, gate: &Gate) {
        if self.bytes_per_s == 0 {
            return;
        }
        self.done += bytes;
        let due = Duration::from_secs_f64(self.done as f64 / self.bytes_per_s as f64);
        let ahead = due.saturating_sub(self.start.elapsed());
        if !ahead.is_zero() {
            gate.sleep(ahead);
        } else if self.start.elapsed() - due > Duration::from_secs(1) {
            // No burst to catch up after a gap.
            *self = Self::new(self.bytes_per_s);
        }
    }
}

/// Sends a pattern stream on each of `connections` connections, at most `bytes_per_s` on each (0: no limit).
pub fn sink(dial: &dyn Dial, to: SocketAddr, connections: usize, bytes_per_s: u64, seed: u64) -> Result<Load, Error> {
    let mut clients: Vec<Client> = Vec::new();
    for connection in 0..connections as u64 {
        let wire = Wire::open(dial, to)?;
        clients.push(Client::new(wire, move |mut wire, gate, meter| {
            let seed = seed.wrapping_add(connection.wrapping_mul(0x1_0001));
            wire.send(&seed.to_le_bytes())?;
            let mut pace = Pace::new(bytes_per_s);
            let (mut sent, mut checked) = (0, 0);
            let mut chunk = vec![0; REPORT_STEP as usize];
            loop {
                if gate.closed() {
                    // With everything sent also checked, this is a boundary: each byte arrived once and unchanged.
                    while checked < sent {
                        checked = report(&mut wire, checked, sent, meter)?;
                    }
                    if !gate.pass(meter) {
                        return Ok(());
                    }
                }
                pattern::fill(seed, sent, &mut chunk);
                wire.send(&chunk)?;
                sent += chunk.len() as u64;
                // Those that are there are taken at once: gaps between them are the guest's.
                while sent - checked >= WINDOW || checked < sent && wire.is_ready()? {
                    checked = report(&mut wire, checked, sent, meter)?;
                }
                pace.after(REPORT_STEP, gate);
            }
        })?);
    }
    Ok(Load::start("sink", clients))
}

/// Receives the guest's next count of checked bytes.
fn report(wire: &mut Wire, checked: u64, sent: u64, meter: &Meter) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    wire.receive(&mut bytes)?;
    let total = u64::from_le_bytes(bytes);
    if total == u64::MAX {
        return Err(Error::Wrong(format!(
            "the guest received a wrong byte between {checked} and {sent}"
        )));
    }
    if total <= checked || total > sent {
        return Err(Error::Wrong(format!(
            "the guest reports {total} bytes checked after {checked}, {sent} were sent"
        )));
    }
    meter.answer(total - checked, None);
    Ok(total)
}

/// Receives an endless pattern stream on each of `connections` connections, at most `bytes_per_s` on each (0: no limit).
pub fn source(dial: &dyn Dial, to: SocketAddr, connections: usize, bytes_per_s: u64, seed: u64) -> Result<Load, Error> {
    let mut clients: Vec<Client> = Vec::new();
    for connection in 0..connections as u64 {
        let wire = Wire::open(dial, to)?;
        clients.push(Client::new(wire, move |mut wire, gate, meter| {
            let seed = seed.wrapping_add(connection.wrapping_mul(0x1_0001));
            ask(&mut wire, seed, u64::MAX >> 1)?;
            let mut pace = Pace::new(bytes_per_s);
            let mut at = 0;
            let mut chunk = vec![0; REPORT_STEP as usize];
            while gate.pass(meter) {
                let n = wire.receive_some(&mut chunk)?;
                if n == 0 {
                    return Err(Error::Wrong(format!("the guest ended the stream at byte {at}")));
                }
                compare(seed, at, &chunk[..n])?;
                at += n as u64;
                meter.answer(n as u64, None);
                pace.after(n as u64, gate);
            }
            Ok(())
        })?);
    }
    Ok(Load::start("source", clients))
}

/// Receives a stream of exactly `length` bytes to its end.
pub fn receive_whole(dial: &dyn Dial, to: SocketAddr, seed: u64, length: u64) -> Result<(), Error> {
    let mut wire = Wire::open(dial, to)?;
    ask(&mut wire, seed, length)?;
    let mut at = 0;
    let mut chunk = vec![0; REPORT_STEP as usize];
    loop {
        let n = wire.receive_some(&mut chunk)?;
        if n == 0 {
            break;
        }
        compare(seed, at, &chunk[..n])?;
        at += n as u64;
    }
    if at == length {
        Ok(())
    } else {
        Err(Error::Wrong(format!("the stream ended after {at} of {length} bytes")))
    }
}

/// Sends a stream with one changed byte; right is when the guest finds it.
pub fn send_wrong_byte(dial: &dyn Dial, to: SocketAddr, seed: u64) -> Result<(), Error> {
    let mut wire = Wire::open(dial, to)?;
    let mut stream = vec![0; REPORT_STEP as usize + 78];
    pattern::fill(seed, 0, &mut stream);
    stream[REPORT_STEP as usize + 77] ^= 1;
    wire.send(&seed.to_le_bytes())?;
    wire.send(&stream)?;
    let mut answer = || {
        let mut bytes = [0; 8];
        wire.receive(&mut bytes).map(|()| u64::from_le_bytes(bytes))
    };
    let mut last = answer()?;
    if last == REPORT_STEP {
        last = answer()?;
    }
    if last == u64::MAX {
        Ok(())
    } else {
        Err(Error::Wrong("the guest did not find the wrong byte".into()))
    }
}

fn ask(wire: &mut Wire, seed: u64, length: u64) -> Result<(), Error> {
    wire.send(&[seed.to_le_bytes(), length.to_le_bytes()].concat())
}

fn compare(seed: u64, at: u64, bytes: &[u8]) -> Result<(), Error> {
    match pattern::first_difference(seed, at, bytes) {
        None => Ok(()),
        Some(wrong) => Err(Error::Wrong(format!(
            "byte {wrong} of the stream of seed {seed} is wrong"
        ))),
    }
}
