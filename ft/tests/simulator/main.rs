//! The protocol core under a deterministic simulator.
//!
//! One seed is one world: primaries and backups (the very state machines of `ft::core`, with a model of their shells), a
//! guest that computes, writes and flushes its disk, sends and receives, connections, an arbiter, operators, and faults
//! ([`faults`]). When a side goes on alone it gets a new backup, in some worlds, while the loser may still be about.
//! Checked are R1 to R6 and R8, and that exactly one side goes on, in time, wherever one can ([`checks`]).
//!
//! `FT_SIM_SEEDS=n` sets the number of seeds, `FT_SIM_FROM=s` the first; `FT_SIM_SEED=s` runs one and prints what happens.

#![allow(clippy::unwrap_used)]

mod audit;
mod backup;
mod checks;
mod faults;
mod guest;
mod primary;
mod san;
mod session;
mod stream;
mod world;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Bug, World};

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// How often what happened.
type Counts = BTreeMap<&'static str, u64>;

/// One world; a panic is a violation, too.
fn run(seed: u64, bug: Option<Bug>) -> Result<Counts, String> {
    let world = || {
        let mut world = World::new(seed, bug, false);
        world.run().map(|()| world.counts)
    };
    std::panic::catch_unwind(world).unwrap_or_else(|_| Err("panic".into()))
}

/// Runs seeds on all processors: what happened in them, or the first failure.
fn run_all(seeds: Range<u64>, bug: Option<Bug>) -> Result<Counts, (u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let first = Mutex::new(None::<(u64, String)>);
    let all = Mutex::new(Counts::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut sum = Counts::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || first.lock().unwrap().is_some() {
                break;
            }
            match run(seed, bug) {
                Ok(counts) => counts.iter().for_each(|(what, n)| *sum.entry(what).or_default() += n),
                Err(violation) => {
                    let mut first = first.lock().unwrap();
                    if first.as_ref().is_none_or(|(other, _)| seed < *other) {
                        *first = Some((seed, violation));
                    }
                }
            }
        }
        let mut all = all.lock().unwrap();
        sum.iter().for_each(|(what, n)| *all.entry(what).or_default() += n);
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    match first.into_inner().unwrap() {
        Some(failure) => Err(failure),
        None => Ok(all.into_inner().unwrap()),
    }
}

#[test]
fn all_seeds_keep_the_rules() {
    if let Some(seed) = number("FT_SIM_SEED") {
        let mut world = World::new(seed, None, true);
        let result = world.run();
        eprintln!("{}", world.trace.join("\n"));
        assert_eq!(result, Ok(()));
        return;
    }
    let from = number("FT_SIM_FROM").unwrap_or(0);
    let seeds = number("FT_SIM_SEEDS").unwrap_or(20_000);
    match run_all(from..from + seeds, None) {
        Ok(counts) => eprintln!("{seeds} seeds from {from}: {counts:#?}"),
        Err((seed, violation)) => panic!(
            "seed {seed}: {violation}\nreplay: FT_SIM_SEED={seed} cargo test -p ft --test simulator all_seeds -- --nocapture"
        ),
    }
}

/// The faults must really happen, and lead to every kind of end.
#[test]
fn the_seeds_reach_every_kind_of_end() {
    let mut reached = BTreeMap::new();
    for seed in 0..600 {
        let mut world = World::new(seed, None, false);
        world.run().unwrap();
        let (p, b) = world.ends();
        *reached.entry(format!("primary {p:?}")).or_insert(0) += 1;
        *reached.entry(format!("backup {b:?}")).or_insert(0) += 1;
        for (what, count) in &world.counts {
            *reached.entry(what.to_string()).or_insert(0) += count;
        }
    }
    eprintln!("{reached:#?}");
    for end in [
        "primary Solo",
        "primary Stopped",
        "primary Disabled",
        "primary Failed",
        "primary Protected",
        "backup Solo",
        "backup Stopped",
        "backup Disabled",
        "backup Failed",
        "commits",
        "outputs again",
        "inputs again",
        "handovers",
        "sessions after the first",
        "flushes that outsiders learnt of",
        "damaged frames found",
        "outputs taken back",
        "epochs on the shared disk",
        "changes of the shared disk again",
        "stopped while writes are under way",
        "waits for the lock",
        "nobody could go on",
        "fault: crash in a step",
        "fault: power cut",
        "fault: partition",
        "fault: stopped process",
        "fault: clock jump",
        "fault: flipped bit",
        "fault: lost frame",
        "fault: frame twice",
        "fault: frame late",
        "fault: slow disk",
        "fault: full disk",
        "fault: flipped shadow",
        "flips found",
        "flips mended",
        "takeovers with a flip that nobody knew of",
    ] {
        assert!(reached.get(end).is_some_and(|n| *n >= 5), "{end}: {reached:?}");
    }
}

/// The checker must catch what it is there for.
#[test]
fn injected_bugs_are_caught() {
    let bugs: [(Bug, &[&str]); 25] = [
        (Bug::ReleaseBeforeCommit, &["R1"]),
        (Bug::AckBeforeWhole, &["R2"]),
        // Of a backup that is to have flushes on disk, too.
        (Bug::ActivateBeforeApplied, &["R3", "R5"]),
        (Bug::DiskOutOfOrder, &["R3", "R5"]),
        (Bug::SoloWithoutAnswer, &["R4"]),
        // With a shared disk it waits for the lock of a primary that lives on.
        (Bug::LiveWithoutAsking, &["R4", "liveness"]),
        (Bug::ReleaseWithoutLease, &["R4"]),
        (Bug::InputsOutOfOrder, &["R8"]),
        (Bug::LoseCommittedOutputs, &["R1"]),
        (Bug::NeverAsk, &["liveness"]),
        (Bug::ReleaseWithoutLook, &["R4"]),
        // What a damaged frame does depends on the frame.
        (Bug::UseDamaged, &["R2", "R3", "R5", "R6", "R8"]),
        (Bug::AckBeforeDurable, &["R5"]),
        (Bug::FlushIsForgotten, &["R5"]),
        (Bug::Impatient, &["R4"]),
        (Bug::StaleGeneration, &["liveness"]),
        (Bug::WrongGeneration, &["liveness"]),
        // What is not held is not ordered either.
        (Bug::WriteBeforeCommit, &["R1", "R5"]),
        (Bug::ForgetSharedWrites, &["R3"]),
        (Bug::MarkBeforeFlush, &["R3", "R5"]),
        (Bug::FirstWithoutFlush, &["R3"]),
        (Bug::TakeWithoutLock, &["R4"]),
        (Bug::DamageIsForgotten, &["R6"]),
        (Bug::RepairIsForgotten, &["liveness"]),
        (Bug::AckDamaged, &["R2"]),
    ];
    for (bug, rules) in bugs {
        let Err((seed, violation)) = run_all(0..3_000, Some(bug)) else {
            panic!("{bug:?} was not caught");
        };
        eprintln!("{bug:?}: seed {seed}: {violation}");
        assert!(
            rules.iter().any(|rule| violation.starts_with(rule)),
            "{bug:?}: {violation}"
        );
    }
}
