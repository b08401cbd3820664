//! The command line of `cloud-hypervisor`: what is refused before anything is touched.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cloud-hypervisor"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Must be refused as a wrong command line; returns standard error.
fn refused(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn help_and_version() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for option in [
        "--api-socket",
        "--cpus",
        "--memory",
        "--disk",
        "--net",
        "--event-monitor",
        "--restore",
    ] {
        assert!(help.contains(option), "{option}");
    }
    assert!(!help.contains("--vsock"));
    for flag in ["--version", "-V"] {
        let version = run(&[flag]);
        assert!(
            version.status.success() && version.stdout.starts_with(b"cloud-hypervisor "),
            "{flag}"
        );
    }
}

#[test]
fn options_of_cloud_hypervisor_that_are_not_offered_are_named() {
    for option in [
        "--fs",
        "--vsock",
        "--device",
        "--firmware",
        "--balloon",
        "--pmem",
        "--watchdog",
        "--platform",
    ] {
        let reason = refused(&["--kernel", "/k", option, "tag=x,socket=/s"]);
        assert!(
            reason.contains(&format!("{option} is not supported")) && reason.contains("--kernel"),
            "{reason}"
        );
    }
    assert!(refused(&["--nonsense"]).contains("--nonsense"));
}

#[test]
fn wrong_values_are_named() {
    for (args, words) in [
        (&["--cpus", "boot=0"][..], "cpus.boot_vcpus"),
        (&["--cpus", "cores=2"], "\"cores\" is not supported; supported: boot"),
        (&["--memory", "size=much"], "size=much: must be a number of bytes"),
        (&["--disk", "path=/a,vhost_user=on"], "\"vhost_user\" is not supported"),
        (&["--net", "mac=zz"], "mac=zz: must be a MAC address"),
        (&["--serial", "pty"], "--serial: \"pty\" is not supported"),
        (&["--serial", "tty"], "serial and console cannot both be Tty"),
    ] {
        let mut all = vec!["--kernel", "/k"];
        all.extend(args);
        let reason = refused(&all);
        assert!(reason.contains(words), "{args:?}: {reason}");
    }
    assert!(refused(&[]).contains("nothing to do"));
    assert!(refused(&["--restore", "resume=on"]).contains("source_url= is missing"));
}
