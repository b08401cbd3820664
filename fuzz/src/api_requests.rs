//! The API: every endpoint's body through the server's own way from bytes to a valid request.

use api::Request;
use api::config::VmConfig;
use api::server::endpoints::{ENDPOINTS, PREFIX, find};

use crate::input::Input;
use crate::reach::reached;

/// What a valid configuration says must survive being written and read (`vm.info`, snapshots, FT's hello).
fn check_config(config: &VmConfig) {
    let json = serde_json::to_string(config).expect("a configuration that can be written");
    let back: VmConfig = serde_json::from_str(&json).expect("a configuration that can be read");
    assert_eq!(&back, config);
    back.validate().expect("a configuration that stays valid");
}

fn check(request: Request) {
    match request {
        Request::VmCreate(config) => {
            reached("config valid");
            check_config(&config);
        }
        Request::VmSnapshot(request) => {
            let _ = vmm::snapshot::directory(&request.destination_url);
        }
        Request::VmRestore(request) => {
            reached("restore valid");
            let _ = vmm::snapshot::directory(&request.source_url);
        }
        Request::FtReceive(config) => {
            reached("ft-receive read");
            let _ = ft::transport::Address::parse(&config.listen);
        }
        Request::FtEnable(config) => {
            reached("ft-enable read");
            let _ = ft::transport::Address::parse(&config.peer);
            let _ = config.limits.validate();
        }
        Request::FtConfig(patch) => {
            reached("ft-config read");
            let _ = patch.apply(&ft::config::FtLimits::default()).validate();
        }
        _ => {}
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = usize::from(input.u8());
    if let Some(endpoint) = ENDPOINTS.get(choice) {
        match endpoint.request(input.rest()) {
            Ok(request) => check(request),
            Err(e) => assert!((400..500).contains(&e.status) && !e.message.is_empty(), "{e:?}"),
        }
        return;
    }
    let n = input.u8().into();
    let method = if choice & 1 == 0 { "PUT" } else { "GET" };
    let path = String::from_utf8_lossy(input.bytes(n)).into_owned();
    let path = if choice & 2 == 0 {
        format!("{PREFIX}{path}")
    } else {
        path
    };
    if let Ok(endpoint) = find(method, &path)
        && let Ok(request) = endpoint.request(input.rest())
    {
        check(request);
    }
}

/// A configuration with every part that is offered.
pub const CONFIG: &str = r#"{"payload":{"kernel":"/k","initramfs":"/i","cmdline":"console=ttyS0"},
"cpus":{"boot_vcpus":2,"max_vcpus":2},"memory":{"size":536870912,"shared":true,"hugepages":false,"prefault":true},
"disks":[{"path":"/a","id":"one","readonly":true,"direct":true,"num_queues":1,"queue_size":128},{"path":"/b"}],
"net":[{"tap":"tap0","mac":"52:54:00:00:00:01","num_queues":2,"queue_size":256,"mtu":1500,"id":"n"}],
"rng":{"src":"/dev/urandom"},"serial":{"mode":"File","file":"/s"},"console":{"mode":"Off"},
"landlock_enable":true,"landlock_rules":[{"path":"/x","access":"rw"}]}"#;

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let limits = r#"{"max_epoch_ms":100,"max_lag_mib":64,"heartbeat_ms":50,"heartbeat_timeout_ms":500}"#;
    let tls = r#"{"dir":"/c","peer":"b"}"#;
    let bodies = [
        ("vm.create", CONFIG.to_string()),
        ("vm.create", r#"{"payload":{"kernel":"/k"}}"#.into()),
        ("vm.snapshot", r#"{"destination_url":"file:///s"}"#.into()),
        (
            "vm.restore",
            r#"{"source_url":"file:///s","prefault":true,"memory_restore_mode":"Copy","resume":true}"#.into(),
        ),
        (
            "vm.ft-receive",
            format!(
                r#"{{"listen":"tcp:0.0.0.0:7000","arbiter":"file:/a","tls":{tls},"disks":[{{"id":"d","path":"/d"}}],"net":[{{"id":"n","tap":"t"}}]}}"#
            ),
        ),
        (
            "vm.ft-enable",
            format!(
                r#"{{"peer":"tcp:[::1]:7000","arbiter":"etcd:a:2379+b:2379+prefix=/p","limits":{limits},"insecure":true}}"#
            ),
        ),
        ("vm.ft-config", limits.to_string()),
        ("vm.boot", String::new()),
        ("vm.ft-info", " ".into()),
    ];
    let index = |name: &str| {
        ENDPOINTS
            .iter()
            .position(|e| e.name == name)
            .expect("an endpoint that is served") as u8
    };
    let mut seeds: Vec<Vec<u8>> = bodies
        .iter()
        .map(|(name, body)| [&[index(name)][..], body.as_bytes()].concat())
        .collect();
    seeds.push([&[254, 9][..], b"vm.create", CONFIG.as_bytes()].concat());
    seeds.push([&[255, 16][..], b"/api/v1/vmm.ping"].concat());
    seeds
}
