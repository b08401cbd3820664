//! Client of the key-value store: PUTs of unique values, all remembered in a [`Model`], and GETs that check it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::meter::Meter;
use crate::model::Model;
use crate::pattern::{self, Rng};
use crate::runner::{Client, Gate, Load};
use crate::wire::{Error, Wire};

/// A model that several clients share.
pub type SharedModel = Arc<Mutex<Model>>;

/// Locks a model.
pub fn lock(model: &SharedModel) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the load looks.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections, each with a thread.
    pub connections: usize,
    /// PUTs under way on each connection.
    pub depth: usize,
    /// Keys of each connection; values are unique, keys are not.
    pub keys: u64,
    /// Every so many PUTs a GET (0: never). Its answer must be the newest acknowledged value.
    pub get_every: u64,
    /// Rest after each answer.
    pub interval: Duration,
    /// Tells this load's values from those of another on the same store, and seeds the random numbers.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 1,
            depth: 1,
            keys: 50,
            get_every: 8,
            interval: Duration::ZERO,
            seed: 1,
        }
    }
}

/// Connects and starts.
pub fn start(dial: &dyn Dial, to: SocketAddr, model: &SharedModel, options: &Options) -> Result<Load, Error> {
    let mut clients: Vec<Client> = Vec::new();
    for connection in 0..options.connections as u64 {
        let (model, options) = (model.clone(), options.clone());
        clients.push(Client::new(Wire::open(dial, to)?, move |wire, gate, meter| {
            let rng = Rng::new(options.seed ^ (connection << 40));
            Writer {
                wire,
                model,
                rng,
                options,
                connection,
                number: 0,
                under_way: VecDeque::new(),
            }
            .run(gate, meter)
        })?);
    }
    Ok(Load::start(
        if options.depth > 1 { "kv pipelined" } else { "kv" },
        clients,
    ))
}

/// Asks for every key that the model knows.
pub fn check_all(dial: &dyn Dial, to: SocketAddr, model: &SharedModel) -> Result<u64, Error> {
    let mut wire = Wire::open(dial, to)?;
    let keys: Vec<String> = lock(model).newest().map(|r| r.key.clone()).collect();
    for key in &keys {
        let answer = get(&mut wire, key)?;
        let answer = answer.as_ref().map(|(seq, value)| (*seq, value.as_str()));
        lock(model).check_get(key, answer).map_err(Error::Wrong)?;
    }
    Ok(keys.len() as u64)
}

/// One GET.
pub fn get(wire: &mut Wire, key: &str) -> Result<Option<(u64, String)>, Error> {
    wire.send(format!("GET {key}\n").as_bytes())?;
    parse_get(&wire.line()?)
}

/// One line, for answers that the loads do not ask for (STAT, errors).
pub fn ask(dial: &dyn Dial, to: SocketAddr, command: &str) -> Result<String, Error> {
    let mut wire = Wire::open(dial, to)?;
    wire.send(format!("{command}\n").as_bytes())?;
    wire.line()
}

fn parse_get(line: &str) -> Result<Option<(u64, String)>, Error> {
    if line == "NONE" {
        return Ok(None);
    }
    let mut words = line.splitn(3, ' ');
    match (words.next(), words.next().and_then(|w| w.parse().ok()), words.next()) {
        (Some("VALUE"), Some(seq), value) => Ok(Some((seq, value.unwrap_or_default().to_string()))),
        _ => Err(Error::Wrong(format!("kv: answer to GET: {line:?}"))),
    }
}

struct Put {
    key: String,
    value: String,
    sent: Instant,
}

struct Writer {
    wire: Wire,
    model: SharedModel,
    rng: Rng,
    options: Options,
    connection: u64,
    number: u64,
    under_way: VecDeque<Put>,
}

impl Writer {
    fn run(&mut self, gate: &Gate, meter: &Meter) -> Result<(), Error> {
        loop {
            if gate.closed() {
                while !self.under_way.is_empty() {
                    self.answer(meter)?;
                }
                if !gate.pass(meter) {
                    return Ok(());
                }
            }
            let mut lines = String::new();
            while self.under_way.len() < self.options.depth.max(1) {
                let put = self.next_put();
                lines.push_str(&format!("PUT {} {}\n", put.key, put.value));
                lock(&self.model).sent(&put.key, &put.value);
                self.under_way.push_back(put);
            }
            self.wire.send(lines.as_bytes())?;
            self.answer(meter)?;
            if self.options.get_every > 0
                && self.number.is_multiple_of(self.options.get_every)
                && self.under_way.is_empty()
            {
                self.get_one(meter)?;
            }
            if !self.options.interval.is_zero() {
                gate.sleep(self.options.interval);
            }
        }
    }

    fn next_put(&mut self) -> Put {
        let Options { keys, seed, .. } = self.options;
        let key = format!("s{seed:x}c{}k{}", self.connection, self.rng.within(0..keys.max(1)));
        let mut value = format!("s{seed:x}c{}n{}.", self.connection, self.number);
        let size = self.rng.within(0..300);
        (0..size / 16).for_each(|i| value.push_str(&format!("{:016x}", pattern::word(self.number, i))));
        self.number += 1;
        Put {
            key,
            value,
            sent: Instant::now(),
        }
    }

    fn answer(&mut self, meter: &Meter) -> Result<(), Error> {
        let line = self.wire.line()?;
        let Some(put) = self.under_way.pop_front() else {
            return Ok(());
        };
        let seq = line.strip_prefix("OK ").and_then(|w| w.parse().ok());
        let Some(seq) = seq else {
            return Err(Error::Wrong(format!("kv: PUT {}: {line:?}", put.key)));
        };
        lock(&self.model)
            .acknowledge(seq, &put.key, &put.value)
            .map_err(Error::Wrong)?;
        meter.answer(put.value.len() as u64, Some(put.sent.elapsed()));
        Ok(())
    }

    fn get_one(&mut self, meter: &Meter) -> Result<(), Error> {
        let key = format!(
            "s{:x}c{}k{}",
            self.options.seed,
            self.connection,
            self.rng.within(0..self.options.keys.max(1))
        );
        let sent = Instant::now();
        let answer = get(&mut self.wire, &key)?;
        let answer = answer.as_ref().map(|(seq, value)| (*seq, value.as_str()));
        lock(&self.model).check_get(&key, answer).map_err(Error::Wrong)?;
        meter.answer(0, Some(sent.elapsed()));
        Ok(())
    }
}
