//! Echo over TCP: numbered messages of a known pattern, one at a time on each connection, every byte compared.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::pattern::{self, Rng};
use crate::runner::{Client, Load};
use crate::wire::{Error, Wire};

/// How the echo load looks.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections, each with a thread.
    pub connections: usize,
    /// Sizes of messages: random between these, at least 16 bytes.
    pub size: std::ops::Range<u64>,
    /// Rest between an answer and the next message.
    pub interval: Duration,
    /// Seed of sizes and contents.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 1,
            size: 16..512,
            interval: Duration::ZERO,
            seed: 1,
        }
    }
}

/// Connects and starts.
pub fn start(dial: &dyn Dial, to: SocketAddr, options: &Options) -> Result<Load, Error> {
    let mut clients: Vec<Client> = Vec::new();
    for connection in 0..options.connections as u64 {
        let wire = Wire::open(dial, to)?;
        let options = options.clone();
        clients.push(Client::new(wire, move |mut wire, gate, meter| {
            let mut rng = Rng::new(options.seed ^ (connection << 32));
            let mut number = 0u64;
            let mut answer = Vec::new();
            while gate.pass(meter) {
                let message = message(connection, number, rng.within(options.size.clone()).max(16) as usize);
                let sent = Instant::now();
                wire.send(&message)?;
                answer.resize(message.len(), 0);
                wire.receive(&mut answer)?;
                if let Some(at) = message.iter().zip(&answer).position(|(a, b)| a != b) {
                    return Err(Error::Wrong(format!(
                        "message {number} of {} bytes came back with byte {at} changed from {:#04x} to {:#04x}",
                        message.len(),
                        message[at],
                        answer[at]
                    )));
                }
                meter.answer(message.len() as u64, Some(sent.elapsed()));
                number += 1;
                if !options.interval.is_zero() {
                    gate.sleep(options.interval);
                }
            }
            Ok(())
        })?);
    }
    Ok(Load::start("echo", clients))
}

fn message(connection: u64, number: u64, size: usize) -> Vec<u8> {
    let mut message = vec![0; size];
    message[..8].copy_from_slice(&connection.to_le_bytes());
    message[8..16].copy_from_slice(&number.to_le_bytes());
    pattern::fill(connection ^ number.rotate_left(17), 0, &mut message[16..]);
    message
}
