//! A server with a VMM that only remembers, for tests.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::server::{ApiSocket, Server};
use api::{ApiError, Request, Response, VmConfig, VmInfo, VmState, VmmPingResponse, VmmService};

/// Remembers the VM's configuration and all requests.
#[derive(Default)]
pub struct FakeVmm {
    config: Mutex<Option<VmConfig>>,
    pub requests: Mutex<Vec<Request>>,
}

impl VmmService for FakeVmm {
    fn call(&self, request: Request) -> Result<Response, ApiError> {
        self.requests.lock().unwrap().push(request.clone());
        let mut config = self.config.lock().unwrap();
        match request {
            Request::VmmPing => Ok(Response::Ping(VmmPingResponse {
                build_version: "fake".into(),
                version: "1".into(),
                pid: 1,
                features: Vec::new(),
            })),
            Request::VmCreate(new) => {
                *config = Some(*new);
                Ok(Response::Empty)
            }
            Request::VmInfo => match &*config {
                Some(config) => Ok(Response::Info(Box::new(VmInfo {
                    config: config.clone(),
                    state: VmState::Created,
                    memory_actual_size: Some(config.memory.size),
                    device_tree: None,
                }))),
                None => Err(ApiError::new(404, "vm_not_created", "there is no VM")),
            },
            Request::VmCounters => {
                let counters = BTreeMap::from([("read_bytes".to_string(), 5)]);
                Ok(Response::Counters(BTreeMap::from([("_disk0".to_string(), counters)])))
            }
            Request::VmBoot => {
                drop(config);
                std::thread::sleep(Duration::from_millis(300));
                Ok(Response::Empty)
            }
            Request::VmReboot => {
                drop(config);
                panic!("this request is made to fail")
            }
            #[cfg(feature = "ft")]
            Request::FtInfo => Ok(Response::Ft(Box::new(ft::config::FtInfo::disabled()))),
            _ => Ok(Response::Empty),
        }
    }
}

/// A served [`FakeVmm`].
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub vmm: Arc<FakeVmm>,
    pub server: Server,
}

pub fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let vmm = Arc::new(FakeVmm::default());
    let server = Server::start(ApiSocket::bind(&socket).unwrap(), vmm.clone()).unwrap();
    Bed {
        dir,
        socket,
        vmm,
        server,
    }
}

impl Bed {
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends `bytes` on a connection of its own and returns everything that comes back.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may close before it has read everything.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One request; returns status and body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let answer = self.raw(format!("{head}{body}").as_bytes());
        let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, body.to_string())
    }

    pub fn ping(&self) {
        let (status, body) = self.request("GET", "/api/v1/vmm.ping", "");
        assert_eq!(status, 200, "{body}");
    }
}
