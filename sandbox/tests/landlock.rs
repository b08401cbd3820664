//! Landlock in this very process, for restrictions stay. Without the usual harness, which would run other tests in it.

use std::fs;
use std::sync::mpsc::channel;

use sandbox::landlock::{Access, Error, Rule, check, restrict};
use seccompiler::{SeccompAction, SeccompFilter, TargetArch};

/// In a child for which the kernel has no Landlock.
fn a_kernel_without_it_is_told() {
    // SAFETY: this process has only one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let calls = [(libc::SYS_landlock_create_ruleset, Vec::new())].into();
        let no_such_call = SeccompAction::Errno(libc::ENOSYS as u32);
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, no_such_call, TargetArch::x86_64);
        let filter: seccompiler::BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
        seccompiler::apply_filter(&filter).expect("seccomp");
        let refused = matches!(check(), Err(Error::Unsupported));
        std::process::exit(i32::from(!refused));
    }
    let mut status = 0;
    // SAFETY: `status` is valid for the time of the call.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "it is not noticed that there is no Landlock");
}

fn main() {
    a_kernel_without_it_is_told();
    check().expect("this kernel has Landlock");
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
