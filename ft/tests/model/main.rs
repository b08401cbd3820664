//! Failover and arbiter, exhaustively, within small bounds.
//!
//! Every order of events is tried: messages arrive at any time or never (which is what a partition is, in each
//! direction), the clock goes on in between, the arbiter is asked and answers late, epochs are applied late, and what a
//! [`Budget`] allows goes wrong at any moment. The state machines are those of production. What must hold in every state
//! that can be reached: the rules R1, R2 and R4, and that exactly one side goes on, in time, if nothing more goes wrong
//! from then on and the arbiter answers ([`Pair::heals`]).
//!
//! `FT_MODEL=large` raises the bounds: minutes.

#![allow(clippy::unwrap_used)]

mod heal;
mod pair;
mod step;

use std::time::Instant;

use pair::Pair;
use stateright::{Checker, Expectation, Model, Property};
use step::{Budget, Step};

/// What is tried.
#[derive(Clone, Debug)]
struct Bounds {
    /// Epochs that the guest ends by itself, and how many of them may be in flight.
    epochs: u64,
    in_flight: usize,
    /// Steps of the clock.
    steps: u64,
    budget: Budget,
}

impl Model for Bounds {
    type State = Pair;
    type Action = Step;

    fn init_states(&self) -> Vec<Pair> {
        vec![Pair::new(self.in_flight, self.budget)]
    }

    fn actions(&self, pair: &Pair, steps: &mut Vec<Step>) {
        if pair.broken.is_none() {
            steps.extend(pair.steps(self.steps));
        }
    }

    fn next_state(&self, pair: &Pair, step: Step) -> Option<Pair> {
        let mut next = pair.clone();
        next.take(step, self.epochs);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the rules hold", |_, pair: &Pair| pair.broken.is_none()),
            Property::always("at most one runs the VM", |_, pair: &Pair| {
                !(pair.live && pair.up[pair::P] && pair.alone)
            }),
            Property::always("one goes on when faults end", |_, pair: &Pair| {
                pair.broken.is_some() || pair.clone().heals(HEALED)
            }),
            Property::sometimes("the backup takes over", |_, pair: &Pair| pair.live),
            Property::sometimes("the primary goes on alone", |_, pair: &Pair| pair.alone),
            Property::sometimes("the primary stops, and the backup runs the VM", |_, pair: &Pair| {
                pair.halted && pair.live
            }),
        ]
    }
}

/// Steps of the clock within which everything is decided: the longest silence, and a pause between two questions.
const HEALED: u64 = 15;

/// Last epoch, epochs in flight, steps of the clock: as much as takes half a minute with the build's optimization.
fn size() -> (u64, usize, u64) {
    match std::env::var("FT_MODEL") {
        Ok(size) if size == "large" => (3, 2, 6),
        _ if cfg!(debug_assertions) => (1, 1, 4),
        _ => (2, 1, 5),
    }
}

/// Tries everything with these faults.
fn check(what: &str, budget: Budget) {
    let (epochs, in_flight, steps) = size();
    let bounds = Bounds {
        epochs,
        in_flight,
        steps,
        budget,
    };
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Depth first: what waits to be looked at is a path, not a whole layer.
    let checker = bounds.checker().threads(threads).spawn_dfs().join();
    eprintln!(
        "{what}: {} states, {} steps, longest path {}, {:.1?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed()
    );
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation, found) {
            (Expectation::Sometimes, None) => panic!("{what}: never {}", property.name),
            (Expectation::Always, Some(path)) => {
                let last = path.last_state().clone();
                panic!("{what}: not {}: {last:#?}\n{:#?}", property.name, path.into_actions());
            }
            _ => {}
        }
    }
}

/// One of everything that can go wrong.
fn single() -> [(&'static str, Budget); 10] {
    let none = Budget::default();
    [
        ("crash", Budget { crashes: 1, ..none }),
        ("power cut", Budget { power_cuts: 1, ..none }),
        ("damaged frame", Budget { damages: 1, ..none }),
        ("broken connection", Budget { resets: 1, ..none }),
        ("arbiter without answer", Budget { unanswered: 1, ..none }),
        ("stopped process", Budget { stops: 1, ..none }),
        ("disk fails", Budget { disks: 1, ..none }),
        ("activation fails", Budget { activations: 1, ..none }),
        ("failover", Budget { failovers: 1, ..none }),
        ("disable", Budget { disables: 1, ..none }),
    ]
}

#[test]
fn no_order_of_events_breaks_a_rule_with_one_fault() {
    for (what, budget) in single() {
        check(what, budget);
    }
}

#[test]
fn no_order_of_events_breaks_a_rule_with_two_faults() {
    let none = Budget::default();
    let crash = Budget { crashes: 1, ..none };
    let failover = Budget { failovers: 1, ..none };
    let pairs = [
        ("crash, arbiter without answer", Budget { unanswered: 1, ..crash }),
        ("crash, disk fails", Budget { disks: 1, ..crash }),
        ("failover, crash", Budget { failovers: 1, ..crash }),
        ("failover, broken connection", Budget { resets: 1, ..failover }),
        ("failover, disk fails", Budget { disks: 1, ..failover }),
        (
            "failover, activation fails",
            Budget {
                activations: 1,
                ..failover
            },
        ),
        (
            "disable, failover",
            Budget {
                disables: 1,
                ..failover
            },
        ),
    ];
    for (what, budget) in pairs {
        check(what, budget);
    }
}
