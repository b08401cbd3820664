//! The endpoints: from method, path and body to a [`Request`].

use serde::de::DeserializeOwned;

use crate::config::VmConfig;
use crate::service::{ApiError, Request};

/// In front of every endpoint's name.
pub const PREFIX: &str = "/api/v1/";

/// A method that endpoints use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Does something.
    Put,
}

impl Method {
    /// As in HTTP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// An endpoint that is served.
pub struct Endpoint {
    /// Its method.
    pub method: Method,
    /// Its path after [`PREFIX`].
    pub name: &'static str,
    read: fn(&[u8]) -> Result<Request, ApiError>,
}

const fn get(name: &'static str, read: fn(&[u8]) -> Result<Request, ApiError>) -> Endpoint {
    Endpoint {
        method: Method::Get,
        name,
        read,
    }
}

const fn put(name: &'static str, read: fn(&[u8]) -> Result<Request, ApiError>) -> Endpoint {
    Endpoint {
        method: Method::Put,
        name,
        read,
    }
}

/// Everything that is served.
pub const ENDPOINTS: &[Endpoint] = &[
    get("vmm.ping", |body| without_body(body, Request::VmmPing)),
    put("vmm.shutdown", |body| without_body(body, Request::VmmShutdown)),
    put("vm.create", |body| create(json(body)?)),
    put("vm.boot", |body| without_body(body, Request::VmBoot)),
    get("vm.info", |body| without_body(body, Request::VmInfo)),
    get("vm.counters", |body| without_body(body, Request::VmCounters)),
    put("vm.pause", |body| without_body(body, Request::VmPause)),
    put("vm.resume", |body| without_body(body, Request::VmResume)),
    put("vm.reboot", |body| without_body(body, Request::VmReboot)),
    put("vm.power-button", |body| without_body(body, Request::VmPowerButton)),
    put("vm.shutdown", |body| without_body(body, Request::VmShutdown)),
    put("vm.delete", |body| without_body(body, Request::VmDelete)),
    put("vm.snapshot", |body| Ok(Request::VmSnapshot(json(body)?))),
    put("vm.restore", |body| {
        let config: crate::RestoreConfig = json(body)?;
        config.validate()?;
        Ok(Request::VmRestore(config))
    }),
    #[cfg(feature = "ft")]
    put("vm.ft-receive", |body| Ok(Request::FtReceive(json(body)?))),
    #[cfg(feature = "ft")]
    put("vm.ft-enable", |body| Ok(Request::FtEnable(json(body)?))),
    #[cfg(feature = "ft")]
    put("vm.ft-disable", |body| without_body(body, Request::FtDisable)),
    #[cfg(feature = "ft")]
    put("vm.ft-failover", |body| without_body(body, Request::FtFailover)),
    #[cfg(feature = "ft")]
    put("vm.ft-config", |body| Ok(Request::FtConfig(json(body)?))),
    #[cfg(feature = "ft")]
    get("vm.ft-info", |body| without_body(body, Request::FtInfo)),
];

/// Endpoints of Cloud Hypervisor that are not served; all are PUT.
pub const NOT_OFFERED: &[&str] = &[
    "vm.resize",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.add-device",
    "vm.remove-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-pmem",
    "vm.add-net",
    "vm.add-vsock",
    "vm.add-vdpa",
    "vm.add-user-device",
    "vm.coredump",
    "vm.nmi",
    "vm.receive-migration",
    "vm.send-migration",
    #[cfg(not(feature = "ft"))]
    "vm.ft-receive",
    #[cfg(not(feature = "ft"))]
    "vm.ft-enable",
    #[cfg(not(feature = "ft"))]
    "vm.ft-disable",
    #[cfg(not(feature = "ft"))]
    "vm.ft-failover",
    #[cfg(not(feature = "ft"))]
    "vm.ft-config",
    #[cfg(not(feature = "ft"))]
    "vm.ft-info",
];

fn names() -> String {
    ENDPOINTS.iter().map(|e| e.name).collect::<Vec<_>>().join(", ")
}

/// Finds the endpoint and tells whether it takes this method, before any body is read.
pub fn find(method: &str, path: &str) -> Result<&'static Endpoint, ApiError> {
    let unknown = || {
        let message = format!(
            "there is no {path:?} here; this VMM serves, under {PREFIX}: {}",
            names()
        );
        ApiError::new(404, "unknown_endpoint", message)
    };
    let name = path.strip_prefix(PREFIX).ok_or_else(unknown)?;
    if NOT_OFFERED.contains(&name) {
        let message = format!("{name} is not supported by this VMM; supported here: {}", names());
        return Err(ApiError::new(501, "not_supported", message));
    }
    let endpoint = ENDPOINTS.iter().find(|e| e.name == name).ok_or_else(unknown)?;
    if endpoint.method.name() != method {
        let message = format!("{name} takes {}, not {method}", endpoint.method.name());
        return Err(ApiError::new(405, "wrong_method", message));
    }
    Ok(endpoint)
}

impl Endpoint {
    /// Reads the body.
    pub fn request(&self, body: &[u8]) -> Result<Request, ApiError> {
        (self.read)(body)
    }
}

fn without_body(body: &[u8], request: Request) -> Result<Request, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        Ok(request)
    } else {
        Err(ApiError::new(
            400,
            "bad_body",
            "this endpoint takes no body: send the request without one",
        ))
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let bad = |message: String| ApiError::new(400, "bad_body", message);
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(bad("this endpoint needs a JSON body".into()));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| match e.path().to_string().as_str() {
        "." => bad(format!("the body is not understood: {}", e.inner())),
        path => bad(format!("the body is not understood: {path}: {}", e.inner())),
    })?;
    reader
        .end()
        .map_err(|e| bad(format!("the body is not understood: {e}")))?;
    Ok(value)
}

fn create(mut config: VmConfig) -> Result<Request, ApiError> {
    config
        .fill_in()
        .map_err(|e| ApiError::new(500, "internal", format!("no random MAC address: {e}")))?;
    config
        .validate()
        .map_err(|e| ApiError::new(400, "bad_config", e.to_string()))?;
    Ok(Request::VmCreate(Box::new(config)))
}
