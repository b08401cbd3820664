//! `ch-remote` against a server whose VMM is played by the test.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use api::server::{ApiSocket, Server};
use api::{ApiError, Request, Response, VmInfo, VmState, VmmPingResponse, VmmService};

/// What the played VMM answers to `vm.ft-info`, one after the other; the last one stays.
#[cfg(feature = "ft")]
type FtScript = Mutex<Vec<ft::config::FtInfo>>;

#[derive(Default)]
struct Played {
    requests: Mutex<Vec<Request>>,
    refuse: Mutex<Option<ApiError>>,
    #[cfg(feature = "ft")]
    ft: FtScript,
}

impl VmmService for Played {
    fn call(&self, request: Request) -> Result<Response, ApiError> {
        self.requests.lock().unwrap().push(request.clone());
        if let Some(error) = &*self.refuse.lock().unwrap() {
            return Err(error.clone());
        }
        Ok(match request {
            Request::VmmPing => Response::Ping(VmmPingResponse {
                build_version: "played".into(),
                version: "1.2".into(),
                pid: 7,
                features: Vec::new(),
            }),
            Request::VmInfo => Response::Info(Box::new(VmInfo {
                config: Default::default(),
                state: VmState::Running,
                memory_actual_size: None,
                device_tree: None,
            })),
            #[cfg(feature = "ft")]
            Request::FtInfo => {
                let mut script = self.ft.lock().unwrap();
                let info = if script.len() > 1 {
                    script.remove(0)
                } else {
                    script[0].clone()
                };
                Response::Ft(Box::new(info))
            }
            _ => Response::Empty,
        })
    }
}

struct Bed {
    dir: tempfile::TempDir,
    socket: PathBuf,
    vmm: Arc<Played>,
    _server: Server,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let vmm = Arc::new(Played::default());
    let server = Server::start(ApiSocket::bind(&socket).unwrap(), vmm.clone()).unwrap();
    Bed {
        dir,
        socket,
        vmm,
        _server: server,
    }
}

fn ch_remote() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ch-remote"));
    command.stdin(Stdio::null());
    command
}

impl Bed {
    fn run(&self, args: &[&str]) -> Output {
        ch_remote()
            .arg("--api-socket")
            .arg(&self.socket)
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    /// Must succeed; returns standard output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Must end with status 1; returns standard error.
    fn fails(&self, args: &[&str]) -> String {
        self.ends(args, 1)
    }

    fn ends(&self, args: &[&str], status: i32) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn last(&self) -> Request {
        self.vmm.requests.lock().unwrap().last().cloned().unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn commands_become_requests() {
    let bed = bed();
    for (command, request) in [
        ("boot", Request::VmBoot),
        ("pause", Request::VmPause),
        ("resume", Request::VmResume),
        ("reboot", Request::VmReboot),
        ("power-button", Request::VmPowerButton),
        ("shutdown", Request::VmShutdown),
        ("delete", Request::VmDelete),
        ("shutdown-vmm", Request::VmmShutdown),
    ] {
        assert_eq!(bed.ok(&[command]), "", "{command}");
        assert_eq!(bed.last(), request);
    }
    assert_eq!(bed.ok(&["pause", "--json"]), "{\"result\":\"done\"}\n");
    bed.ok(&["snapshot", "file:///x"]);
    assert!(matches!(bed.last(), Request::VmSnapshot(c) if c.destination_url == "file:///x"));
    bed.ok(&["restore", "source_url=file:///x,resume=on"]);
    assert!(matches!(bed.last(), Request::VmRestore(c) if c.resume));
    let ping: serde_json::Value = serde_json::from_str(&bed.ok(&["ping"])).unwrap();
    assert_eq!(ping["version"], "1.2");
    let info: serde_json::Value = serde_json::from_str(&bed.ok(&["info"])).unwrap();
    assert_eq!(info["state"], "Running");
}

#[test]
fn create_reads_a_file_or_standard_input() {
    let bed = bed();
    let config = r#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a"}]}"#;
    std::fs::write(bed.dir.path().join("vm.json"), config).unwrap();
    bed.ok(&["create", "vm.json"]);
    let is_ours = |request| matches!(request, Request::VmCreate(c) if c.disks.as_ref().unwrap()[0].id.is_some());
    assert!(is_ours(bed.last()));
    let mut child = ch_remote()
        .arg("--api-socket")
        .arg(&bed.socket)
        .arg("create")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(is_ours(bed.last()));
    assert!(bed.fails(&["create", "no.json"]).contains("no.json"));
    std::fs::write(
        bed.dir.path().join("vm.json"),
        r#"{"payload":{"kernel":"/k"},"watchdog":true}"#,
    )
    .unwrap();
    assert!(bed.fails(&["create", "vm.json"]).contains("watchdog: not supported"));
}

#[test]
fn errors_tell_what_to_do() {
    let bed = bed();
    *bed.vmm.refuse.lock().unwrap() = Some(ApiError::new(404, "vm_not_created", "there is no VM: create one"));
    assert_eq!(bed.fails(&["boot"]), "ch-remote: there is no VM: create one\n");
    let error: serde_json::Value = serde_json::from_str(&bed.fails(&["boot", "--json"])).unwrap();
    assert_eq!(error["code"], "vm_not_created");
    assert!(
        bed.ends(&["resize", "--cpus", "2"], 2)
            .contains("resize is not supported by this VMM; supported: ping")
    );
    assert!(bed.ends(&["bot"], 2).contains("there is no command \"bot\""));
    let no_socket = ch_remote()
        .args(["--api-socket", "/no/such/socket", "ping"])
        .output()
        .unwrap();
    assert_eq!(no_socket.status.code(), Some(1));
    assert!(text(&no_socket.stderr).contains("is the VMM running"));
    let no_option = ch_remote().arg("ping").output().unwrap();
    assert!(text(&no_option.stderr).contains("--api-socket PATH"));
    assert_eq!(
        ch_remote().args(["ping", "--nonsense"]).output().unwrap().status.code(),
        Some(2)
    );
}

#[cfg(feature = "ft")]
mod fault_tolerance {
    use ft::config::{FtInfo, FtLimits, FtRole, FtState};
    use ft::reprotect::FtReprotection;

    use super::*;

    fn info(state: FtState) -> FtInfo {
        FtInfo {
            state,
            role: FtRole::Primary,
            ..FtInfo::disabled()
        }
    }

    fn with_script(script: Vec<FtInfo>) -> Bed {
        let bed = bed();
        *bed.vmm.ft.lock().unwrap() = script;
        bed
    }

    #[test]
    fn enable_waits_until_protected() {
        let mut syncing = info(FtState::Syncing);
        syncing.progress.ram_bytes_total = 1 << 30;
        syncing.progress.ram_bytes_remaining = 512 << 20;
        syncing.progress.rate = 1e6;
        syncing.progress.seconds_left = 75.0;
        let bed = with_script(vec![syncing.clone(), syncing, info(FtState::Protected)]);
        let args = [
            "ft",
            "enable",
            "--peer",
            "tcp:127.0.0.1:7000",
            "--limits",
            "max_epoch_ms=40",
            "--arbiter",
            "file:a",
        ];
        let output = bed.run(&args);
        assert!(output.status.success());
        assert!(
            text(&output.stderr).contains("RAM  50 % of 1.0 GiB  976.6 KiB/s  1:15 left"),
            "{}",
            text(&output.stderr)
        );
        assert!(text(&output.stdout).starts_with("protected after"));
        let requests = bed.vmm.requests.lock().unwrap().clone();
        let Request::FtEnable(config) = &requests[0] else {
            panic!("{requests:?}")
        };
        assert_eq!(
            config.limits,
            FtLimits {
                max_epoch_ms: 40,
                ..FtLimits::default()
            }
        );
        let arbiter = config.arbiter.as_deref().unwrap();
        assert!(arbiter.starts_with("file:/") && arbiter.ends_with("/a"), "{arbiter}");
    }

    #[test]
    fn spares_are_a_list_and_enable_waits_while_they_are_tried() {
        let mut failed = info(FtState::Failed);
        failed.reason = Some("the backup's disk is full".into());
        failed.reprotection = Some(FtReprotection {
            attempts: 3,
            trying: Some("tcp:c:1".into()),
            ..FtReprotection::default()
        });
        let bed = with_script(vec![failed.clone(), failed, info(FtState::Protected)]);
        let enable = ["ft", "enable", "--peer", "tcp:b:1"];
        let spares = ["--auto-reprotect", "--spares", "tcp:c:1,unix:/d", "tcp:e:1"];
        let output = bed.run(&[&enable[..], &spares].concat());
        let told = text(&output.stderr);
        assert!(output.status.success(), "{told}");
        assert!(
            told.contains("failed: the backup's disk is full; 3 attempts, asking tcp:c:1"),
            "{told}"
        );
        let requests = bed.vmm.requests.lock().unwrap().clone();
        let Request::FtEnable(config) = &requests[0] else {
            panic!("{requests:?}")
        };
        assert!(config.auto_reprotect);
        assert_eq!(config.spares, ["tcp:c:1", "unix:/d", "tcp:e:1"]);
        let bad = bed.fails(&[&enable[..], &["--auto-reprotect", "--spares", "c:1"]].concat());
        assert!(bad.contains("c:1"), "{bad}");
        bed.ends(&[&enable[..], &["--spares", "tcp:c:1"]].concat(), 2);
    }

    #[test]
    fn an_arbiter_goes_to_the_vmm_with_absolute_paths() {
        let bed = with_script(vec![info(FtState::Protected)]);
        let enable = ["ft", "enable", "--peer", "tcp:127.0.0.1:7000", "--no-wait", "--arbiter"];
        bed.ok(&[&enable[..], &["etcd:a:2379+[::1]:2379+ca=ca.pem+prefix=/x"]].concat());
        let requests = bed.vmm.requests.lock().unwrap().clone();
        let Request::FtEnable(config) = &requests[0] else {
            panic!("{requests:?}")
        };
        let arbiter = config.arbiter.as_deref().unwrap();
        assert!(
            arbiter.starts_with("etcd:a:2379+[::1]:2379+ca=/") && arbiter.ends_with("/ca.pem+prefix=/x"),
            "{arbiter}"
        );
        for (bad, reason) in [
            ("zk:a:1", "kind `zk` is not known"),
            ("etcd:a", "`a` is neither HOST:PORT"),
            ("etcd:a:1+user=x", "`user` is not supported"),
        ] {
            let answer = bed.fails(&[&enable[..], &[bad]].concat());
            assert!(answer.contains(reason) && answer.contains("file:DIR"), "{answer}");
        }
    }

    #[test]
    fn enable_fails_with_the_reason() {
        let mut failed = info(FtState::Failed);
        failed.reason = Some("the backup has 1 vCPU, the VM 2".into());
        let bed = with_script(vec![info(FtState::Syncing), failed]);
        let reason = bed.fails(&["ft", "enable", "--peer", "tcp:127.0.0.1:7000"]);
        assert!(
            reason.contains("the VM is not protected: the backup has 1 vCPU, the VM 2"),
            "{reason}"
        );
        assert!(
            bed.fails(&["ft", "enable", "--peer", "127.0.0.1:7000"])
                .contains("must be tcp:HOST:PORT")
        );
    }

    #[test]
    fn enable_need_not_wait_and_speaks_json() {
        let bed = with_script(vec![info(FtState::Syncing)]);
        assert!(
            bed.ok(&["ft", "enable", "--peer", "tcp:h:1", "--no-wait"])
                .contains("has begun")
        );
        *bed.vmm.ft.lock().unwrap() = vec![info(FtState::Syncing), info(FtState::Protected)];
        let output = bed.run(&["ft", "enable", "--peer", "tcp:h:1", "--json"]);
        assert_eq!(text(&output.stderr), "");
        let json: FtInfo = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json.state, FtState::Protected);
    }

    #[test]
    fn receive_carries_what_differs_on_this_host() {
        let bed = bed();
        bed.ok(&[
            "ft",
            "receive",
            "tcp:0.0.0.0:7000",
            "--disk",
            "id=_disk0,path=b.img",
            "--net",
            "id=_net1,tap=tap9",
            "--serial",
            "file=s.log",
            "--console",
            "off",
            "--insecure",
        ]);
        let Request::FtReceive(config) = bed.last() else {
            panic!("no request")
        };
        assert_eq!(config.listen, "tcp:0.0.0.0:7000");
        assert_eq!(config.disks[0].path, bed.dir.path().join("b.img"));
        assert_eq!(config.net[0].tap, "tap9");
        assert_eq!(
            config.serial,
            Some(format!("file:{}", bed.dir.path().join("s.log").display()))
        );
        assert_eq!(config.console.as_deref(), Some("off"));
        assert!(config.insecure);
        assert!(
            bed.fails(&["ft", "receive", "tcp:h:1", "--disk", "path=b"])
                .contains("id= is missing")
        );
    }

    #[test]
    fn certificates_are_made_and_their_directory_goes_to_the_vmm() {
        let bed = bed();
        bed.ok(&["ft", "make-certs", "--out", "certs", "10.0.0.1", "b.example"]);
        let certs = bed.dir.path().join("certs");
        for file in [
            "ca.pem",
            "ca-key.pem",
            "10.0.0.1/ca.pem",
            "b.example/cert.pem",
            "b.example/key.pem",
        ] {
            assert!(certs.join(file).exists(), "{file}");
        }
        assert!(
            bed.fails(&["ft", "make-certs", "--out", "certs", "c"])
                .contains("File exists")
        );
        assert!(
            bed.fails(&["ft", "make-certs", "--out", "d", "a/b"])
                .contains("DNS name or an IP address")
        );
        let tls = ["--tls", "certs/b.example", "--tls-peer", "10.0.0.1"];
        bed.ok(&[&["ft", "receive", "tcp:0.0.0.0:7000"], &tls[..]].concat());
        let Request::FtReceive(config) = bed.last() else {
            panic!("no request")
        };
        let tls = config.tls.unwrap();
        assert_eq!(
            (tls.dir, tls.peer.as_deref()),
            (certs.join("b.example"), Some("10.0.0.1"))
        );
        assert!(
            bed.ends(&["ft", "receive", "tcp:h:1", "--tls-peer", "x"], 2)
                .contains("--tls")
        );
    }

    #[test]
    fn limits_are_changed_and_shown() {
        let bed = with_script(vec![info(FtState::Protected)]);
        let shown = bed.ok(&["ft", "config", "max_epoch_ms=20", "heartbeat_ms=10"]);
        assert!(shown.contains("max_epoch_ms"), "{shown}");
        let Request::FtConfig(patch) = bed.vmm.requests.lock().unwrap()[0].clone() else {
            panic!("no request")
        };
        assert_eq!(
            (patch.max_epoch_ms, patch.heartbeat_ms, patch.max_lag_mib),
            (Some(20), Some(10), None)
        );
        assert!(
            bed.fails(&["ft", "config", "epoch=1"])
                .contains("supported: max_epoch_ms")
        );
        for command in ["disable", "failover"] {
            bed.ok(&["ft", command]);
        }
        assert_eq!(bed.last(), Request::FtFailover);
    }

    #[test]
    fn info_is_a_table_or_json() {
        let mut protected = info(FtState::Protected);
        protected.epoch = 4711;
        protected.pause_ms.p99 = 1.25;
        let bed = with_script(vec![protected]);
        let table = bed.ok(&["ft", "info"]);
        for words in [
            "protected (the backup can take over",
            "4711",
            "1.250 ms",
            "memory-of-both",
            "held outputs",
            "lag",
        ] {
            assert!(table.contains(words), "{words}: {table}");
        }
        let json: FtInfo = serde_json::from_str(&bed.ok(&["ft", "info", "--json"])).unwrap();
        assert_eq!(json.epoch, 4711);
        *bed.vmm.ft.lock().unwrap() = vec![FtInfo::disabled()];
        assert!(bed.ok(&["ft", "info"]).contains("disabled (fault tolerance is off)"));
    }

    #[test]
    fn watch_prints_lines_and_changes_until_the_vmm_is_gone() {
        let mut solo = info(FtState::Solo);
        solo.reason = Some("the backup was lost".into());
        let bed = with_script(vec![info(FtState::Protected), info(FtState::Protected), solo]);
        let child = ch_remote()
            .arg("--api-socket")
            .arg(&bed.socket)
            .args(["ft", "watch", "--interval", "0.1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while bed.vmm.requests.lock().unwrap().len() < 6 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        drop(bed);
        let output = child.wait_with_output().unwrap();
        let lines = text(&output.stdout);
        assert!(
            lines.contains("state protected\n") && lines.contains("state solo: the backup was lost\n"),
            "{lines}"
        );
        assert!(lines.contains("committed") && lines.lines().count() >= 5, "{lines}");
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("the watching ends"));
    }
}
