//! Landlock in this very process, for restrictions stay. Without the usual harness, which would run other tests in it.

use std::fs;
use std::sync::mpsc::channel;

use sandbox::landlock::{Access, Rule, restrict};

fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    for name in ["read", "written", "other"] {
        fs::write(at(name), "x").expect("a file");
    }
    // A thread that is there before.
    let (ask, asked) = channel();
    let (answer, answered) = channel();
    std::thread::spawn(move || {
        for path in asked {
            let path: std::path::PathBuf = path;
            answer.send(fs::read(path).is_ok()).expect("somebody waits");
        }
    });
    let other_thread_reads = |name: &str| {
        ask.send(at(name)).expect("the thread lives");
        answered.recv().expect("the thread lives")
    };
    assert!(other_thread_reads("other"));
    let rules = [
        Rule::new(at("read"), Access::READ),
        Rule::new(at("written"), Access::READ_WRITE),
        Rule::new(dir.path(), Access::REMOVE),
        Rule::new("/proc/self", Access::READ),
    ];
    restrict(&rules).expect("Landlock");
    restrict(&rules).expect("the same again");

    assert!(other_thread_reads("read") && !other_thread_reads("other"));
    let thread = std::thread::spawn({
        let other = at("other");
        move || fs::read(other).is_ok()
    });
    assert!(!thread.join().expect("a new thread"));
    assert!(fs::read(at("read")).is_ok() && fs::write(at("read"), "y").is_err());
    fs::write(at("written"), "y").expect("a rule allows it");
    assert!(fs::read(at("other")).is_err() && fs::write(at("made"), "y").is_err());
    assert!(fs::read_dir(dir.path()).is_err());

    // A second set takes away what it does not name.
    restrict(&rules[1..]).expect("fewer rules");
    assert!(!other_thread_reads("read") && other_thread_reads("written"));
    fs::remove_file(at("other")).expect("a rule allows it");
    println!("landlock: all threads are restricted to the rules: ok");
}
