//! A blocking client of the API.
//!
//! One connection per request: a VMM that restarts, or another one at the same path, is no special case.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::VmConfig;
use crate::server::endpoints::{Method, PREFIX};
use crate::service::{ApiError, ErrorBody, RestoreConfig, VmCounters, VmInfo, VmSnapshotConfig, VmmPingResponse};

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// How long a VMM may take to answer a question (GET), unless another time is set.
const QUERY_TIME: Duration = Duration::from_secs(30);
/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is no such socket.
    #[error("there is no API socket {0}: is the VMM running, and with --api-socket {0}?")]
    NoSocket(PathBuf),
    /// The socket's VMM is gone.
    #[error("nobody listens at {0}: the VMM that made this socket has ended; start it again")]
    Refused(PathBuf),
    /// The socket cannot be used.
    #[error("API socket {path}: {source}{}", connect_hint(.source))]
    Connect {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM took too long.
    #[error("the VMM did not answer {name} within {} s: it may be busy; ask again with `ch-remote info`", .after.as_secs())]
    Timeout {
        /// The endpoint.
        name: String,
        /// The limit.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to the VMM broke during {name}: {source}; did the VMM end? its log tells more")]
    Broken {
        /// The endpoint.
        name: String,
        /// How.
        source: io::Error,
    },
    /// What came is no answer of this API.
    #[error("the answer to {name} is not understood: {reason}; is this the API socket of a VMM?")]
    BadAnswer {
        /// The endpoint.
        name: String,
        /// Why.
        reason: String,
    },
    /// The VMM refused the request.
    #[error("{}", .0.message)]
    Api(ApiError),
}

fn connect_hint(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::PermissionDenied => "; only the user that started the VMM (and root) can use its socket",
        _ => "",
    }
}

impl ClientError {
    /// The API's error, when it is one.
    pub fn api(&self) -> Option<&ApiError> {
        match self {
            Self::Api(e) => Some(e),
            _ => None,
        }
    }
}

/// Speaks to one VMM.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Option<Duration>,
}

impl Client {
    /// For the VMM at socket `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            timeout: None,
        }
    }

    /// How long the VMM may be silent during a request. Unless set: 30 seconds for a GET, for ever for a PUT, which may
    /// have much to do (a snapshot of a large VM).
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `vmm.ping`
    pub fn ping(&self) -> Result<VmmPingResponse, ClientError> {
        self.get("vmm.ping")
    }

    /// `vm.info`
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.get("vm.info")
    }

    /// `vm.counters`
    pub fn counters(&self) -> Result<VmCounters, ClientError> {
        self.get("vm.counters")
    }

    /// `vm.create`
    pub fn create(&self, config: &VmConfig) -> Result<(), ClientError> {
        self.put_json("vm.create", config)
    }

    /// `vm.snapshot`
    pub fn snapshot(&self, destination_url: &str) -> Result<(), ClientError> {
        self.put_json(
            "vm.snapshot",
            &VmSnapshotConfig {
                destination_url: destination_url.into(),
            },
        )
    }

    /// `vm.restore`
    pub fn restore(&self, config: &RestoreConfig) -> Result<(), ClientError> {
        self.put_json("vm.restore", config)
    }

    /// `vm.ft-info`
    #[cfg(feature = "ft")]
    pub fn ft_info(&self) -> Result<ft::config::FtInfo, ClientError> {
        self.get("vm.ft-info")
    }

    /// A GET endpoint's answer.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T, ClientError> {
        let body = self.request(Method::Get, name, None)?;
        serde_json::from_slice(&body).map_err(|e| ClientError::BadAnswer {
            name: name.into(),
            reason: e.to_string(),
        })
    }

    /// A PUT endpoint that takes no body.
    pub fn put(&self, name: &str) -> Result<(), ClientError> {
        self.request(Method::Put, name, None).map(drop)
    }

    /// A PUT endpoint that takes a JSON body.
    pub fn put_json<T: Serialize>(&self, name: &str, body: &T) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| ClientError::BadAnswer {
            name: name.into(),
            reason: format!("request: {e}"),
        })?;
        self.request(Method::Put, name, Some(&body)).map(drop)
    }

    /// Any endpoint: returns the body of a good answer.
    pub fn request(&self, method: Method, name: &str, body: Option<&[u8]>) -> Result<Vec<u8>, ClientError> {
        let timeout = self.timeout.or((method == Method::Get).then_some(QUERY_TIME));
        let mut stream = self.connect(timeout)?;
        let mut message = format!("{} {PREFIX}{name} HTTP/1.1\r\nHost: localhost\r\n", method.name());
        if let Some(body) = body {
            message.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ));
        }
        message.push_str("Connection: close\r\n\r\n");
        let sent = stream
            .write_all(message.as_bytes())
            .and_then(|()| stream.write_all(body.unwrap_or_default()))
            .map_err(|e| self.broken(name, e));
        // A server that refuses a long body early answers, and then closes: its answer says why.
        match (sent, self.read_answer(&mut stream, name)) {
            (_, Ok(answer)) => answer,
            (Err(e), Err(_)) | (Ok(()), Err(e)) => Err(e),
        }
    }

    fn connect(&self, timeout: Option<Duration>) -> Result<UnixStream, ClientError> {
        let path = || self.path.clone();
        let stream = UnixStream::connect(&self.path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path()),
            io::ErrorKind::ConnectionRefused => ClientError::Refused(path()),
            _ => ClientError::Connect { path: path(), source },
        })?;
        stream
            .set_read_timeout(timeout)
            .and_then(|()| stream.set_write_timeout(timeout))
            .map_err(|source| ClientError::Connect { path: path(), source })?;
        Ok(stream)
    }

    fn broken(&self, name: &str, source: io::Error) -> ClientError {
        match (source.kind(), self.timeout.or(Some(QUERY_TIME))) {
            (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(after)) => ClientError::Timeout {
                name: name.into(),
                after,
            },
            _ => ClientError::Broken {
                name: name.into(),
                source,
            },
        }
    }

    /// The outer error: no answer came; the inner one: the answer is an error.
    fn read_answer(&self, stream: &mut UnixStream, name: &str) -> Result<Result<Vec<u8>, ClientError>, ClientError> {
        let bad = |reason: &str| ClientError::BadAnswer {
            name: name.into(),
            reason: reason.into(),
        };
        let mut bytes = Vec::new();
        let mut chunk = [0u8; 16 << 10];
        let mut read = |bytes: &mut Vec<u8>| match stream.read(&mut chunk) {
            Ok(n) => {
                bytes.extend_from_slice(&chunk[..n]);
                Ok(n)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(usize::MAX),
            Err(e) => Err(self.broken(name, e)),
        };
        let head = loop {
            if let Some(head) = Head::parse(&bytes).map_err(|reason| bad(&reason))? {
                // 100 Continue and its like come before the answer.
                if (100..200).contains(&head.status) {
                    bytes.drain(..head.len);
                    continue;
                }
                break head;
            }
            if bytes.len() > MAX_HEAD {
                return Err(bad("its head is too long"));
            }
            if read(&mut bytes)? == 0 {
                let source = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(self.broken(name, source));
            }
        };
        let mut body = bytes.split_off(head.len);
        let length = if head.status == 204 {
            Some(0)
        } else {
            head.content_length
        };
        if length.is_some_and(|length| length > MAX_ANSWER) {
            return Err(bad("it is too long"));
        }
        while length.is_none_or(|length| body.len() < length) {
            if body.len() > MAX_ANSWER {
                return Err(bad("it is too long"));
            }
            match (read(&mut body)?, length) {
                (0, None) => break,
                (0, Some(_)) => return Err(self.broken(name, io::ErrorKind::UnexpectedEof.into())),
                _ => {}
            }
        }
        body.truncate(length.unwrap_or(usize::MAX));
        if (200..300).contains(&head.status) {
            return Ok(Ok(body));
        }
        Ok(Err(ClientError::Api(error_of(head.status, &body))))
    }
}

fn error_of(status: u16, body: &[u8]) -> ApiError {
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { code, message }) => ApiError { status, code, message },
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let message = format!("the VMM answered with status {status}: {}", text.trim());
            ApiError {
                status,
                code: format!("http_{status}"),
                message,
            }
        }
    }
}

struct Head {
    len: usize,
    status: u16,
    content_length: Option<usize>,
}

impl Head {
    /// `None` while it is not complete.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, String> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let len = match response.parse(bytes).map_err(|e| format!("no HTTP answer: {e}"))? {
            httparse::Status::Partial => return Ok(None),
            httparse::Status::Complete(len) => len,
        };
        let mut content_length = None;
        for header in response.headers.iter() {
            if header.name.eq_ignore_ascii_case("content-length") {
                let text = std::str::from_utf8(header.value)
                    .ok()
                    .and_then(|text| text.trim().parse().ok());
                content_length = Some(text.ok_or("its Content-Length is no number")?);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err("it has a transfer encoding, which this API does not use".into());
            }
        }
        Ok(Some(Self {
            len,
            status: response.code.unwrap_or(0),
            content_length,
        }))
    }
}
