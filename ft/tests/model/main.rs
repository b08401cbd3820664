//! Failover and arbiter, exhaustively, within small bounds.
//!
//! Every order of events is tried: messages arrive at any time or never (which is what a partition is, in each
//! direction), steps of the clock come in between, the arbiter answers late or not, and what [`Budget`] allows goes
//! wrong. The state machines are those of production. What must hold in every state that can be reached: the rules R1,
//! R2 and R4, and that exactly one side goes on, in time, if from then on nothing more goes wrong ([`Pair::heals`]).
//!
//! `FT_MODEL=large` raises the bounds (minutes, and some GiB).

#![allow(clippy::unwrap_used)]

mod pair;

use std::time::Instant;

use pair::{Budget, Pair, Step};
use stateright::{Checker, Model, Property};

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
            Property::sometimes("the primary stops", |_, pair: &Pair| pair.halted && pair.live),
        ]
    }
}

/// Steps of the clock within which everything is decided: two timeouts, and the longest pause between two questions.
const HEALED: u64 = 2 * pair::TIMEOUT + 40;

fn check(what: &str, bounds: Bounds) {
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker = bounds.checker().threads(threads).spawn_bfs().join();
    let (states, took) = (checker.unique_state_count(), began.elapsed());
    eprintln!(
        "{what}: {states} states, {} steps, depth {}, {took:.1?}",
        checker.state_count(),
        checker.max_depth()
    );
    for (property, path) in checker.discoveries() {
        if !property.starts_with("the ") || property == "the rules hold" {
            let last = path.last_state().clone();
            panic!("{what}: {property}: {:#?}\n{last:#?}", path.into_actions());
        }
    }
    for name in ["the backup takes over", "the primary goes on alone"] {
        assert!(checker.discovery(name).is_some(), "{what}: never {name}");
    }
}

fn large() -> bool {
    std::env::var("FT_MODEL").is_ok_and(|size| size == "large")
}

#[test]
fn crashes_partitions_and_an_arbiter_that_loses_answers() {
    let budget = Budget {
        crashes: 1,
        unanswered: 1,
        ..Budget::default()
    };
    check(
        "crash",
        Bounds {
            epochs: if large() { 3 } else { 2 },
            in_flight: if large() { 2 } else { 1 },
            steps: if large() { 13 } else { 11 },
            budget,
        },
    );
}
