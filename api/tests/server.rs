//! The server on a real socket: good, bad, slow and hostile clients.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use api::server::{ApiSocket, MAX_BODY, MAX_CONNECTIONS, Server, SocketError};
use api::{Client, ClientError, Request};
use common::{FakeVmm, bed};

const CONFIG: &str = r#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a"}],"net":[{"tap":"t0"}]}"#;

fn code(body: &str) -> String {
    let value: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{body:?}: {e}"));
    assert!(!value["message"].as_str().unwrap().is_empty());
    value["code"].as_str().unwrap().to_string()
}

#[test]
fn endpoints_answer_as_cloud_hypervisor_does() {
    let bed = bed();
    assert_eq!(bed.request("GET", "/api/v1/vmm.ping", "").0, 200);
    assert_eq!(bed.request("GET", "/api/v1/vm.info", "").0, 404);
    assert_eq!(bed.request("PUT", "/api/v1/vm.create", CONFIG), (204, String::new()));
    let (status, info) = bed.request("GET", "/api/v1/vm.info", "");
    assert_eq!(status, 200);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["config"]["disks"][0]["id"], "_disk0");
    assert_eq!(info["config"]["net"][0]["id"], "_net1");
    assert_eq!(info["state"], "Created");
    for name in [
        "vm.boot",
        "vm.pause",
        "vm.resume",
        "vm.power-button",
        "vm.shutdown",
        "vm.delete",
        "vmm.shutdown",
    ] {
        assert_eq!(
            bed.request("PUT", &format!("/api/v1/{name}"), ""),
            (204, String::new()),
            "{name}"
        );
    }
    assert_eq!(
        bed.request("PUT", "/api/v1/vm.snapshot", r#"{"destination_url":"file:///x"}"#)
            .0,
        204
    );
    assert_eq!(
        bed.request(
            "PUT",
            "/api/v1/vm.restore",
            r#"{"source_url":"file:///x","resume":true}"#
        )
        .0,
        204
    );
    let last = bed.vmm.requests.lock().unwrap().last().cloned();
    assert!(matches!(last, Some(Request::VmRestore(config)) if config.resume));
}

#[test]
fn wrong_requests_are_refused_with_a_code() {
    let bed = bed();
    for (method, path, body, status, expected) in [
        ("GET", "/", "", 404, "unknown_endpoint"),
        ("GET", "/api/v1/vm.infos", "", 404, "unknown_endpoint"),
        ("GET", "/api/v2/vm.info", "", 404, "unknown_endpoint"),
        ("PUT", "/api/v1/vmm.ping", "", 405, "wrong_method"),
        ("DELETE", "/api/v1/vm.delete", "", 405, "wrong_method"),
        ("GET", "/api/v1/vm.info?x=1", "", 400, "bad_query"),
        ("PUT", "/api/v1/vm.create", "", 400, "bad_body"),
        ("PUT", "/api/v1/vm.create", "{", 400, "bad_body"),
        ("PUT", "/api/v1/vm.create", "{}{}", 400, "bad_body"),
        ("PUT", "/api/v1/vm.create", "{}", 400, "bad_config"),
        ("PUT", "/api/v1/vm.create", "\u{0}", 400, "bad_body"),
        ("PUT", "/api/v1/vm.boot", "{}", 400, "bad_body"),
        (
            "PUT",
            "/api/v1/vm.restore",
            r#"{"source_url":"x","memory_restore_mode":"OnDemand"}"#,
            400,
            "unsupported",
        ),
        (
            "PUT",
            "/api/v1/vm.resize",
            r#"{"desired_vcpus":2}"#,
            501,
            "not_supported",
        ),
        ("PUT", "/api/v1/vm.add-disk", "", 501, "not_supported"),
        ("PUT", "/api/v1/vm.reboot", "", 500, "internal"),
    ] {
        let (got, answer) = bed.request(method, path, body);
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
        assert_eq!(code(&answer), expected, "{method} {path} {body}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(bed.request("PUT", "/api/v1/vm.create", &deep).0, 400);
    bed.ping();
}

#[test]
fn errors_in_a_config_name_their_field() {
    let bed = bed();
    let message = |body: &str| bed.request("PUT", "/api/v1/vm.create", body).1;
    let text = message(r#"{"disks":[{"path":"/a"},{"pth":"/b"}]}"#);
    assert!(
        text.contains("disks[1]") && text.contains("pth") && text.contains("readonly"),
        "{text}"
    );
    let text = message(r#"{"payload":{"kernel":"/k"},"memory":{"size":"1G"}}"#);
    assert!(text.contains("memory.size"), "{text}");
    let text = message(r#"{"payload":{"kernel":"/k"},"watchdog":true,"disks":[{"path":"/a","iommu":true}]}"#);
    assert!(
        text.contains("watchdog: not supported") && text.contains("disks[0].iommu: not supported"),
        "{text}"
    );
}

#[test]
fn garbage_gets_an_error_or_a_closed_connection() {
    let bed = bed();
    let long_head = format!("GET /api/v1/vmm.ping HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let many_headers = format!("GET /api/v1/vmm.ping HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(10_000));
    for bytes in [
        &b"\x00\xff\xfe garbage\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -5\r\n\r\n{}",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        long_head.as_bytes(),
        many_headers.as_bytes(),
        b"",
    ] {
        let answer = bed.raw(bytes);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{:?}",
            answer.get(..80)
        );
    }
    bed.ping();
    assert!(
        bed.vmm
            .requests
            .lock()
            .unwrap()
            .iter()
            .all(|r| matches!(r, Request::VmmPing))
    );
}

#[test]
fn a_body_can_be_too_long() {
    let bed = bed();
    let body = format!("{{\"x\":\"{}\"}}", "a".repeat(MAX_BODY));
    let (status, answer) = bed.request("PUT", "/api/v1/vm.create", &body);
    assert_eq!(status, 413);
    assert_eq!(code(&answer), "body_too_long");
    // A length that is only announced, and a chunked body that has none.
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{";
    assert!(bed.raw(head.as_bytes()).contains(" 413 "));
    let chunk = format!("100000\r\n{}\r\n", " ".repeat(1 << 20)).repeat(6);
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert!(bed.raw(format!("{head}{chunk}0\r\n\r\n").as_bytes()).contains(" 413 "));
    bed.ping();
}

#[test]
fn half_requests_hold_nobody_up() {
    let bed = bed();
    let mut half: Vec<_> = (0..60).map(|_| bed.connect()).collect();
    for (i, stream) in half.iter_mut().enumerate() {
        let text = match i % 3 {
            0 => "",
            1 => "GET /api/v1/vm",
            _ => "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"cpus\"",
        };
        stream.write_all(text.as_bytes()).unwrap();
    }
    let start = Instant::now();
    for _ in 0..20 {
        bed.ping();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn more_connections_than_slots_wait_for_their_turn() {
    let bed = bed();
    let idle: Vec<_> = (0..MAX_CONNECTIONS + 10).map(|_| bed.connect()).collect();
    let socket = bed.socket.clone();
    let waits = std::thread::spawn(move || Client::new(socket).ping());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waits.is_finished());
    drop(idle);
    waits.join().unwrap().unwrap();
}

#[test]
fn requests_are_served_in_parallel() {
    let bed = bed();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| assert_eq!(bed.request("PUT", "/api/v1/vm.boot", "").0, 204));
        }
        std::thread::sleep(Duration::from_millis(50));
        let ping = Instant::now();
        bed.ping();
        assert!(ping.elapsed() < Duration::from_millis(250), "{:?}", ping.elapsed());
    });
    assert!(start.elapsed() < Duration::from_millis(2500), "{:?}", start.elapsed());
}

#[test]
fn a_connection_serves_many_requests() {
    let bed = bed();
    let mut stream = bed.connect();
    for _ in 0..50 {
        stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut buf = [0; 4096];
        let n = stream.read(&mut buf).unwrap();
        assert!(buf[..n].starts_with(b"HTTP/1.1 200"));
    }
    // And several sent at once.
    let twice = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    assert_eq!(bed.raw(&twice).matches("HTTP/1.1 200").count(), 2);
}

#[test]
fn the_socket_file_is_private_and_goes_with_the_server() {
    let mut bed = bed();
    let mode = std::fs::metadata(&bed.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let _idle = bed.connect();
    let start = Instant::now();
    bed.server.stop();
    assert!(start.elapsed() < Duration::from_secs(4));
    assert!(!bed.socket.exists());
    assert!(matches!(Client::new(&bed.socket).ping(), Err(ClientError::NoSocket(_))));
}

#[test]
fn a_request_in_service_is_answered_before_the_end() {
    let mut bed = bed();
    let mut stream = bed.connect();
    stream
        .write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    while bed.vmm.requests.lock().unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    bed.server.stop();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}

#[test]
fn a_dead_socket_is_replaced_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = ApiSocket::bind(&path).unwrap();
    assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
    // Somebody else's socket at our path is not removed.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(socket);
    assert!(path.exists());
    drop(other);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(ApiSocket::bind(&file), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "x");
    let long = dir.path().join("a".repeat(200));
    assert!(matches!(ApiSocket::bind(&long), Err(SocketError::TooLong(_))));
    assert!(
        ApiSocket::bind(&dir.path().join("no/such/dir"))
            .unwrap_err()
            .to_string()
            .contains("no/such/dir")
    );
}

#[test]
fn a_listener_can_be_handed_over() {
    use std::os::fd::IntoRawFd;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let fd = UnixListener::bind(&path).unwrap().into_raw_fd();
    let server = Server::start(ApiSocket::from_fd(fd).unwrap(), std::sync::Arc::new(FakeVmm::default())).unwrap();
    Client::new(&path).ping().unwrap();
    drop(server);
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(
        ApiSocket::from_fd(a.into_raw_fd())
            .unwrap_err()
            .to_string()
            .contains("does not listen")
    );
}

#[test]
fn the_client_tells_what_went_wrong() {
    let bed = bed();
    let client = Client::new(&bed.socket);
    assert_eq!(client.ping().unwrap().version, "1");
    let error = client.info().unwrap_err();
    assert_eq!(
        error.api().map(|e| (e.status, e.code.as_str())),
        Some((404, "vm_not_created"))
    );
    client.create(&serde_json::from_str(CONFIG).unwrap()).unwrap();
    assert_eq!(client.info().unwrap().config.disks.unwrap().len(), 1);
    assert_eq!(client.counters().unwrap()["_disk0"]["read_bytes"], 5);
    let impatient = Client::new(&bed.socket).with_timeout(Duration::from_millis(50));
    assert!(matches!(impatient.put("vm.boot"), Err(ClientError::Timeout { .. })));
    let stale = bed.dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(matches!(Client::new(&stale).ping(), Err(ClientError::Refused(_))));
}

#[test]
fn the_client_bears_bad_servers() {
    fn answer(text: &'static [u8]) -> ClientError {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buf = [0; 1024];
            let _ = stream.read(&mut buf);
            let _ = stream.write_all(text);
        });
        let error = Client::new(&path)
            .with_timeout(Duration::from_secs(5))
            .ping()
            .unwrap_err();
        server.join().unwrap();
        error
    }
    assert!(matches!(answer(b""), ClientError::Broken { .. }));
    assert!(matches!(answer(b"SSH-2.0-x\r\n\r\n"), ClientError::BadAnswer { .. }));
    assert!(matches!(
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"),
        ClientError::Broken { .. }
    ));
    assert!(matches!(
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        ClientError::BadAnswer { .. }
    ));
    assert!(matches!(
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"),
        ClientError::BadAnswer { .. }
    ));
    assert!(matches!(
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
        ClientError::BadAnswer { .. }
    ));
    let error = answer(b"HTTP/1.1 500 Bad\r\nContent-Length: 4\r\n\r\noops");
    assert_eq!(error.api().map(|e| e.code.as_str()), Some("http_500"));
}
