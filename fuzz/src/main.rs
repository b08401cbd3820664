//! The program that libFuzzer drives; `FUZZ_TARGET` names the target. With `FUZZ_SEEDS` it writes the target's seeds into
//! that directory and ends.

#![no_main]

use std::sync::OnceLock;

use fuzz::{TARGETS, Target, reach};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fn fail(reason: &str) -> ! {
    eprintln!("fuzz: {reason}");
    std::process::exit(2)
}

fn choose() {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        fail(&format!("FUZZ_TARGET must be one of {}", names.join(" ")));
    };
    if let Ok(dir) = std::env::var("FUZZ_SEEDS") {
        for (n, seed) in (target.seeds)().iter().enumerate() {
            if let Err(e) = std::fs::write(format!("{dir}/seed-{n}"), seed) {
                fail(&format!("{dir}: {e}"));
            }
        }
        std::process::exit(0);
    }
    TARGET.get_or_init(|| target);
    // A panic of the library that reads qcow2 images becomes an error, see `virtio-devices/src/block/qcow2`.
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.location().is_some_and(|at| at.file().contains("/imago-")) {
            reach::reached("qcow2 library panicked");
        } else {
            abort(panic);
        }
    }));
    extern "C" fn report() {
        reach::report();
    }
    // SAFETY: `report` may run at exit: it takes a lock that nobody holds then, and writes.
    unsafe { libc::atexit(report) };
}

fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(data);
    }
});
