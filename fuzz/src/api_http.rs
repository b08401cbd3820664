//! The API's HTTP: bytes on the socket of the real server.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api::server::{ApiSocket, Server};
use api::{ApiError, Request, Response, VmmService};

use crate::reach::reached;

/// A request or its answer must be over by then.
const PATIENCE: Duration = Duration::from_secs(10);

/// A VMM without a VM.
struct Empty;

impl VmmService for Empty {
    fn call(&self, request: Request) -> Result<Response, ApiError> {
        reached("request served");
        match request {
            Request::VmCreate(_) | Request::VmmShutdown => Ok(Response::Empty),
            _ => Err(ApiError::new(404, "vm_not_created", "there is no VM")),
        }
    }
}

struct Running {
    _server: Server,
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn server() -> &'static Running {
    static SERVER: OnceLock<Running> = OnceLock::new();
    SERVER.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api");
        let socket = ApiSocket::bind(&path).expect("a socket");
        Running {
            _server: Server::start(socket, Arc::new(Empty)).expect("a server"),
            _dir: dir,
            path,
        }
    })
}

/// The target.
pub fn run(data: &[u8]) {
    let mut stream = UnixStream::connect(&server().path).expect("a server that accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream.set_write_timeout(Some(PATIENCE)).expect("a time-out");
    // It may hang up in the midst of it.
    let sent = stream.write_all(data).and_then(|()| stream.shutdown(Shutdown::Write));
    if let Err(e) = sent {
        assert!(
            matches!(
                e.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected
            ),
            "{e}"
        );
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "no end of the answer"),
    }
    if let Some(status) = answer.get(9..12) {
        assert!(answer.starts_with(b"HTTP/1."), "no HTTP answer");
        assert_ne!(
            status,
            b"500",
            "the server failed: {}",
            String::from_utf8_lossy(&answer)
        );
        reached("HTTP answer");
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let config = crate::api_requests::CONFIG;
    let put = |path: &str, body: &str| {
        format!(
            "PUT /api/v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let ping = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";
    [
        ping.to_string(),
        format!("{ping}{ping}"),
        put("vm.create", config),
        put("vm.boot", ""),
        put("vm.boot?x=1", ""),
        format!(
            "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n{:x}\r\n{config}\r\n0\r\n\r\n",
            config.len()
        ),
        "GET /api/v1/vm.info HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".to_string(),
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n{".to_string(),
    ]
    .map(String::into_bytes)
    .into()
}
