//! etcd processes on loopback, with files in a temporary directory. They end with the value that started them, also when
//! a test panics.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use ft::arbiter::{Arbiter, Description, EtcdArbiter};

use crate::tls::Pki;

/// Patience with a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A port that nobody listens at, below those that the kernel gives to outgoing connections.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 20_000 + (std::process::id() % 1_000) as u16 * 10;
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

struct Member {
    command: Vec<String>,
    log: PathBuf,
    data: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Member {
    fn start(&mut self) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new("etcd")
            .args(&self.command)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                panic!("there is no etcd: install the Debian package etcd-server (scripts/deps test does)")
            }
            Err(e) => panic!("etcd does not start: {e}"),
        };
        self.child = Some(child);
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn signal(&self, signal: i32) {
        let pid = self.child.as_ref().unwrap().id() as i32;
        // SAFETY: kill(2) takes no pointer, and the process is a child of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }
}

pub struct Cluster {
    members: Vec<Member>,
    options: String,
    _dir: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.stop();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(&member.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(8)..].join("\n");
                eprintln!("etcd at port {}:\n{tail}", member.port);
            }
        }
    }
}

impl Cluster {
    /// `size` members that answer.
    pub fn start(size: usize) -> Self {
        Self::launch(size, None)
    }

    /// Clients must have a certificate of `pki`'s CA.
    pub fn start_with_tls(size: usize, pki: &Pki) -> Self {
        Self::launch(size, Some(pki))
    }

    fn launch(size: usize, pki: Option<&Pki>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let scheme = if pki.is_some() { "https" } else { "http" };
        let ports: Vec<(u16, u16)> = (0..size).map(|_| (free_port(), free_port())).collect();
        let peers: Vec<String> = ports
            .iter()
            .enumerate()
            .map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{peer}"))
            .collect();
        let member = |n: usize, (port, peer): (u16, u16)| {
            let data = dir.path().join(format!("m{n}"));
            let mut command: Vec<String> = [
                ("name", format!("m{n}")),
                ("data-dir", data.display().to_string()),
                ("listen-client-urls", format!("{scheme}://127.0.0.1:{port}")),
                ("advertise-client-urls", format!("{scheme}://127.0.0.1:{port}")),
                ("listen-peer-urls", format!("http://127.0.0.1:{peer}")),
                ("initial-advertise-peer-urls", format!("http://127.0.0.1:{peer}")),
                ("initial-cluster", peers.join(",")),
                ("initial-cluster-state", "new".into()),
            ]
            .into_iter()
            .map(|(key, value)| format!("--{key}={value}"))
            .collect();
            if let Some(pki) = pki {
                let path = |name: &str| pki.path(name).display().to_string();
                command.push(format!("--cert-file={}", path("server.pem")));
                command.push(format!("--key-file={}", path("server.key")));
                command.push(format!("--trusted-ca-file={}", path("ca.pem")));
                command.push("--client-cert-auth".into());
            }
            Member {
                command,
                log: dir.path().join(format!("m{n}.log")),
                data,
                port,
                child: None,
            }
        };
        let members = ports
            .into_iter()
            .enumerate()
            .map(|(n, ports)| member(n, ports))
            .collect();
        let mut cluster = Self {
            members,
            options: pki.map(Pki::client).unwrap_or_default(),
            _dir: dir,
        };
        for member in &mut cluster.members {
            member.start();
        }
        cluster.wait();
        cluster
    }

    /// Until a majority answers.
    pub fn wait(&self) {
        let arbiter = self.arbiter();
        eventually("an answer of the cluster", || arbiter.read("nobody").ok());
    }

    pub fn stop(&mut self, n: usize) {
        self.members[n].stop();
    }

    pub fn restart(&mut self, n: usize) {
        self.members[n].start();
    }

    /// Stands still: connections are taken by the kernel, and nobody answers.
    pub fn freeze(&self, n: usize) {
        self.members[n].signal(libc::SIGSTOP);
    }

    pub fn thaw(&self, n: usize) {
        self.members[n].signal(libc::SIGCONT);
    }

    pub fn data(&self, n: usize) -> &Path {
        &self.members[n].data
    }

    pub fn endpoint(&self, n: usize) -> String {
        format!("127.0.0.1:{}", self.members[n].port)
    }

    pub fn description(&self) -> String {
        let endpoints: Vec<String> = (0..self.members.len()).map(|n| self.endpoint(n)).collect();
        format!("etcd:{}{}", endpoints.join("+"), self.options)
    }

    pub fn arbiter(&self) -> EtcdArbiter {
        open(&self.description())
    }

    /// Changes the content of a key behind everybody's back; `None` removes it.
    pub fn tamper(&self, key: &str, value: Option<&str>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let url = format!("http://{}", self.endpoint(0));
            let mut client = etcd_client::Client::connect([url], None).await.unwrap();
            match value {
                Some(value) => drop(client.put(key, value, None).await.unwrap()),
                None => drop(client.delete(key, None).await.unwrap()),
            }
        });
    }
}

pub fn open(description: &str) -> EtcdArbiter {
    let Description::Etcd(cluster) = description.parse().unwrap() else {
        panic!("{description} is no etcd")
    };
    EtcdArbiter::open(cluster).unwrap()
}
