//! The threads of a load: started together, paused at request boundaries, stopped together.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::meter::{Meter, Verdict};
use crate::wire::{Ender, Error, Wire};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct State {
    wanted: Wanted,
    /// Threads that work (neither idle in a pause nor ended).
    working: usize,
}

/// What the threads of one load share.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request would be held up by [`Gate::pass`] now: whoever has requests in flight finishes them first.
    pub fn closed(&self) -> bool {
        self.state().wanted != Wanted::Run
    }

    /// Called by a client between two requests, with nothing in flight: waits while the load is paused. False: stop.
    pub fn pass(&self, meter: &Meter) -> bool {
        let mut state = self.state();
        if state.wanted == Wanted::Pause {
            meter.expect_nothing();
            state.working -= 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Pause {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.working += 1;
            meter.expect_from_now();
        }
        state.wanted == Wanted::Run
    }

    /// Sleeps, but not beyond a change of what is wanted.
    pub fn sleep(&self, time: Duration) {
        let end = Instant::now() + time;
        let mut state = self.state();
        while state.wanted == Wanted::Run {
            let Some(rest) = end.checked_duration_since(Instant::now()).filter(|r| !r.is_zero()) else {
                return;
            };
            state = self
                .changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn want(&self, wanted: Wanted) {
        self.state().wanted = wanted;
        self.changed.notify_all();
    }

    fn ended(&self) {
        self.state().working -= 1;
        self.changed.notify_all();
    }
}

/// A load that runs. Dropping it ends its connections at once; [`Load::stop`] ends them well.
pub struct Load {
    name: String,
    gate: Arc<Gate>,
    meters: Vec<Arc<Meter>>,
    enders: Vec<Ender>,
    threads: Vec<JoinHandle<()>>,
}

type Work = dyn FnOnce(&Gate, &Meter) -> Result<(), Error> + Send;

/// One connection's work.
pub struct Client {
    work: Box<Work>,
    ender: Option<Ender>,
}

impl Client {
    /// `work` returns when [`Gate::pass`] says stop, or with what was wrong. It has `wire`, and may wait for it.
    pub fn new(
        wire: Wire,
        work: impl FnOnce(Wire, &Gate, &Meter) -> Result<(), Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let ender = Some(wire.ender()?);
        Ok(Self {
            work: Box::new(move |gate, meter| work(wire, gate, meter)),
            ender,
        })
    }

    /// The same without a connection: `work` never waits for long.
    pub fn unconnected(work: impl FnOnce(&Gate, &Meter) -> Result<(), Error> + Send + 'static) -> Self {
        Self {
            work: Box::new(work),
            ender: None,
        }
    }
}

impl Load {
    /// Starts one thread for each client.
    pub fn start(name: &str, clients: Vec<Client>) -> Self {
        let gate = Arc::new(Gate {
            state: Mutex::new(State {
                wanted: Wanted::Run,
                working: clients.len(),
            }),
            changed: Condvar::new(),
        });
        let mut this = Self {
            name: name.into(),
            gate,
            meters: Vec::new(),
            enders: Vec::new(),
            threads: Vec::new(),
        };
        for (index, Client { work, ender }) in clients.into_iter().enumerate() {
            this.enders.extend(ender);
            let meter: Arc<Meter> = Arc::default();
            this.meters.push(meter.clone());
            let gate = this.gate.clone();
            let full_name = format!("{name} connection {index}");
            let run = move || {
                // Counts the thread out also when its client panics.
                struct Ended(Arc<Gate>);
                impl Drop for Ended {
                    fn drop(&mut self) {
                        self.0.ended();
                    }
                }
                let _ended = Ended(gate.clone());
                meter.expect_from_now();
                if let Err(e) = work(&gate, &meter) {
                    meter.failure(format!("{full_name}: {e}"));
                }
                meter.expect_nothing();
            };
            match std::thread::Builder::new().name(format!("{name}-{index}")).spawn(run) {
                Ok(thread) => this.threads.push(thread),
                Err(e) => {
                    this.gate.ended();
                    this.meters[index].failure(format!("{name}: no thread: {e}"));
                }
            }
        }
        this
    }

    /// Name of the load.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until every connection is idle, with all its requests answered; connections stay open. False when that did
    /// not come within `limit`.
    pub fn pause(&self, limit: Duration) -> bool {
        self.gate.want(Wanted::Pause);
        let end = Instant::now() + limit;
        let mut state = self.gate.state();
        while state.working > 0 {
            let Some(rest) = end.checked_duration_since(Instant::now()).filter(|r| !r.is_zero()) else {
                return false;
            };
            state = self
                .gate
                .changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Goes on after a pause.
    pub fn resume(&self) {
        self.gate.want(Wanted::Run);
    }

    /// Waits until each connection had `more` further answers, or failed. False when that did not come within `limit`.
    pub fn wait_progress(&self, more: u64, limit: Duration) -> bool {
        let wanted: Vec<u64> = self.meters.iter().map(|m| m.answers() + more).collect();
        let end = Instant::now() + limit;
        loop {
            if self
                .meters
                .iter()
                .zip(&wanted)
                .all(|(meter, wanted)| meter.answers() >= *wanted || meter.failed())
            {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Of each connection the longest time between two answers that ended after `moment` or still goes on.
    pub fn longest_gaps_since(&self, moment: Instant) -> Vec<Duration> {
        self.meters.iter().map(|m| m.longest_gap_since(moment)).collect()
    }

    /// Latencies and gaps are measured anew from here.
    pub fn new_phase(&self) {
        self.meters.iter().for_each(|m| m.new_phase());
    }

    /// What was seen so far.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(&self.name, self.meters.iter().map(|m| &**m))
    }

    /// Stops at request boundaries and tells what was seen.
    pub fn stop(mut self) -> Verdict {
        self.join();
        self.verdict()
    }

    fn join(&mut self) {
        self.gate.want(Wanted::Stop);
        for (index, thread) in self.threads.drain(..).enumerate() {
            if thread.join().is_err() {
                self.meters[index].failure(format!("{}: its thread panicked", self.name));
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.enders.iter().for_each(Ender::end);
        self.join();
    }
}
