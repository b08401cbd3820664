//! The protocol core under a deterministic simulator.
//!
//! One seed is one world: a primary and a backup (the very state machines of `ft::core`, with a model of their shells), a
//! guest that computes, writes its disk, sends and receives, two streams between them, an arbiter, and faults: crashes,
//! lost connections, partitions in one or both directions, stopped processes, an arbiter that is slow, unreachable or
//! whose answers are lost, disks and activations that fail, and operators who disable, hand over and change limits.
//! Checked are R1, R2, R3, R4 and R8, and that the VM goes on where it should ([`world`], [`checks`]).
//!
//! `FT_SIM_SEEDS=n` sets the number of seeds, `FT_SIM_SEED=s` runs one and prints what happens.

#![allow(clippy::unwrap_used)]

mod backup;
mod checks;
mod faults;
mod guest;
mod primary;
mod session;
mod stream;
mod world;

use world::{Bug, World};

fn seeds() -> u64 {
    std::env::var("FT_SIM_SEEDS")
        .ok()
        .map_or(20_000, |n| n.parse().expect("FT_SIM_SEEDS is a number"))
}

/// Runs seeds on both processors; the first failure, if any.
fn first_failure(seeds: std::ops::Range<u64>, bug: Option<Bug>) -> Option<(u64, String)> {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let failure = std::sync::Mutex::new(None::<(u64, String)>);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= seeds.end || failure.lock().unwrap().is_some() {
                        return;
                    }
                    if let Err(violation) = World::new(seed, bug, false).run() {
                        let mut failure = failure.lock().unwrap();
                        if failure.as_ref().is_none_or(|(other, _)| seed < *other) {
                            *failure = Some((seed, violation));
                        }
                    }
                }
            });
        }
    });
    failure.into_inner().unwrap()
}

#[test]
fn all_seeds_keep_the_rules() {
    if let Ok(seed) = std::env::var("FT_SIM_SEED") {
        let seed = seed.parse().expect("FT_SIM_SEED is a number");
        let mut world = World::new(seed, None, true);
        let result = world.run();
        eprintln!("{}", world.trace.join("\n"));
        assert_eq!(result, Ok(()));
        return;
    }
    if let Some((seed, violation)) = first_failure(0..seeds(), None) {
        panic!(
            "seed {seed}: {violation}\nreplay: FT_SIM_SEED={seed} cargo test -p ft --test simulator all_seeds -- --nocapture"
        );
    }
}

/// The faults must really happen, and lead to every kind of end.
#[test]
fn the_seeds_reach_every_kind_of_end() {
    let mut reached = std::collections::BTreeMap::new();
    for seed in 0..600 {
        let mut world = World::new(seed, None, false);
        world.run().unwrap();
        let (p, b) = world.ends();
        *reached.entry(format!("primary {p:?}")).or_insert(0) += 1;
        *reached.entry(format!("backup {b:?}")).or_insert(0) += 1;
        for (what, count) in world.counters() {
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
    ] {
        assert!(reached.get(end).is_some_and(|n| *n >= 5), "{end}: {reached:?}");
    }
}

/// The checker must catch what it is there for.
#[test]
fn injected_bugs_are_caught() {
    for (bug, rule) in [
        (Bug::ReleaseBeforeCommit, "R1"),
        (Bug::AckBeforeWhole, "R2"),
        (Bug::ActivateBeforeApplied, "R3"),
        (Bug::DiskOutOfOrder, "R3"),
        (Bug::SoloWithoutAnswer, "R4"),
        (Bug::LiveWithoutAsking, "R4"),
        (Bug::ReleaseWithoutLease, "R4"),
        (Bug::InputsOutOfOrder, "R8"),
        (Bug::LoseCommittedOutputs, "R1"),
        (Bug::NeverAsk, "liveness"),
        (Bug::ReleaseWithoutLook, "R4"),
        (Bug::UseDamaged, "R"),
        (Bug::AckBeforeDurable, "R5"),
        (Bug::FlushIsForgotten, "R5"),
        (Bug::Impatient, "R4"),
        (Bug::StaleGeneration, "liveness"),
    ] {
        let caught = first_failure(0..3_000, Some(bug));
        let (seed, violation) = caught.unwrap_or_else(|| panic!("{bug:?} was not caught"));
        eprintln!("{bug:?}: seed {seed}: {violation}");
        assert!(violation.contains(rule), "{bug:?}: {violation}");
    }
}
