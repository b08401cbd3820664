//! The targets without a fuzzer, for `cargo test`: seeds, the inputs that once were findings, and neighbours of both.
//!
//! A failure keeps its input in `findings/` and says how to run it again. `FUZZ_MUTATIONS` is the number of neighbours for
//! each target.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use fuzz::{TARGETS, Target, reach};

/// Neighbours that are tried of each target's inputs.
const MUTATIONS: u64 = 300;

/// splitmix64: the same neighbours in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn here() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

fn regressions(target: &Target) -> Vec<Vec<u8>> {
    let Ok(files) = fs::read_dir(here().join("regressions").join(target.name)) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn neighbour(random: &mut Random, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut input = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(4) {
        let (at, value) = (random.below(input.len()), random.next() as u8);
        match random.below(6) {
            0 => input.truncate(at),
            1 => input.insert(at.min(input.len()), value),
            2 => {
                let other = &inputs[random.below(inputs.len())];
                input.extend_from_slice(&other[random.below(other.len())..]);
            }
            3 if at < input.len() => input[at] ^= 1 << (value & 7),
            4 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            _ if at < input.len() => input[at] = value,
            _ => {}
        }
    }
    input
}

fn try_one(target: &Target, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_ok() {
        return;
    }
    let dir = here().join("findings").join(target.name);
    let file = dir.join(format!("replay-{:08x}", crc32c::crc32c(input)));
    fs::create_dir_all(&dir).and_then(|()| fs::write(&file, input)).unwrap();
    let shown = file
        .strip_prefix(here().parent().unwrap_or(Path::new("/")))
        .unwrap()
        .display()
        .to_string();
    panic!("a finding: scripts/fuzz --replay {} {shown}", target.name);
}

#[test]
fn seeds_regressions_and_their_neighbours_break_no_rule_and_get_far() {
    let count = std::env::var("FUZZ_MUTATIONS").map_or(MUTATIONS, |n| n.parse().unwrap());
    for target in TARGETS {
        let before = reach::counts();
        let mut inputs = (target.seeds)();
        inputs.extend(regressions(target));
        inputs.push(vec![0]);
        for input in &inputs {
            try_one(target, input);
        }
        let mut random = Random(1);
        for _ in 0..count {
            try_one(target, &neighbour(&mut random, &inputs));
        }
        let after = reach::counts();
        for place in target.reaches {
            assert!(
                after.get(place) > before.get(place),
                "{}: {place} is not reached",
                target.name
            );
        }
    }
}
