//! The clients against a stand-in of the guest's services: right services pass, and each kind of fault is found.

// The whole file is a test; clippy only exempts functions marked as one.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use load::dial::Local;
use load::kv::SharedModel;
use load::model::{DISK_MAGIC, Model, Record, SECTOR};
use load::{bulk, control, echo, kv, pattern, udp};

const LIMIT: Duration = Duration::from_secs(20);

fn serve(service: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let service = Arc::new(service);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let service = service.clone();
            std::thread::spawn(move || service(stream));
        }
    });
    at
}

/// Echo; `fault` may change, drop or double bytes of a chunk, given the bytes seen before on this connection.
fn echo_server(fault: impl Fn(u64, &mut Vec<u8>) + Send + Sync + 'static) -> SocketAddr {
    serve(move |mut stream| {
        let (mut seen, mut buf) = (0, [0; 4096]);
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            let mut chunk = buf[..n].to_vec();
            fault(seen, &mut chunk);
            seen += n as u64;
            if stream.write_all(&chunk).is_err() {
                return;
            }
        }
    })
}

#[test]
fn echo_passes_pauses_and_goes_on() {
    let at = echo_server(|_, _| {});
    let options = echo::Options {
        connections: 5,
        size: 16..3000,
        ..Default::default()
    };
    let load = echo::start(&Local, at, &options).unwrap();
    assert!(load.wait_progress(50, LIMIT));
    assert!(load.pause(LIMIT));
    let before = load.verdict().answers;
    std::thread::sleep(Duration::from_millis(30));
    let moment = Instant::now();
    assert_eq!(load.verdict().answers, before);
    load.resume();
    assert!(load.wait_progress(50, LIMIT));
    let gaps = load.longest_gaps_since(moment);
    assert!(gaps.iter().all(|gap| *gap < Duration::from_secs(5)), "{gaps:?}");
    let verdict = load.stop();
    assert!(verdict.good(), "{verdict:?}");
    assert_eq!((verdict.connections, verdict.connections_kept), (5, 5));
    assert_eq!(verdict.latency_ms.count, verdict.answers);
}

#[test]
fn echo_finds_a_changed_byte_and_a_closed_connection() {
    let at = echo_server(|seen, chunk| {
        if seen > 5000 {
            let last = chunk.len() - 1;
            chunk[last] ^= 8;
        }
    });
    let load = echo::start(&Local, at, &echo::Options::default()).unwrap();
    assert!(load.wait_progress(100_000, LIMIT));
    let verdict = load.stop();
    assert!(verdict.failures[0].contains("changed"), "{verdict:?}");

    let at = serve(|mut stream| {
        let _ = stream.read(&mut [0; 8]);
    });
    let load = echo::start(&Local, at, &echo::Options::default()).unwrap();
    assert!(load.wait_progress(1, LIMIT));
    assert_eq!(load.stop().connections_kept, 0);
}

fn sink_server(drop_byte_at: Option<usize>) -> SocketAddr {
    serve(move |mut stream| {
        let mut seed = [0; 8];
        stream.read_exact(&mut seed).unwrap();
        let seed = u64::from_le_bytes(seed);
        let (mut at, mut reported, mut buf) = (0u64, 0u64, vec![0; 10_000]);
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            let mut chunk = buf[..n].to_vec();
            if let Some(i) = drop_byte_at.filter(|i| (at..at + n as u64).contains(&(*i as u64))) {
                chunk.remove(i - at as usize);
            }
            if pattern::first_difference(seed, at, &chunk).is_some() {
                let _ = stream.write_all(&u64::MAX.to_le_bytes());
                // Closing with unread bytes would reset the connection and could overtake the answer.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
                return;
            }
            at += n as u64;
            while at - reported >= bulk::REPORT_STEP {
                reported += bulk::REPORT_STEP;
                stream.write_all(&reported.to_le_bytes()).unwrap();
            }
        }
    })
}

#[test]
fn sink_passes_and_finds_a_missing_byte() {
    let load = bulk::sink(&Local, sink_server(None), 2, 20 << 20, 7).unwrap();
    assert!(load.wait_progress(20, LIMIT));
    assert!(load.pause(LIMIT));
    load.resume();
    assert!(load.wait_progress(5, LIMIT));
    let verdict = load.stop();
    assert!(
        verdict.good() && verdict.bytes.is_multiple_of(bulk::REPORT_STEP),
        "{verdict:?}"
    );
    bulk::send_wrong_byte(&Local, sink_server(None), 3).unwrap();

    let load = bulk::sink(&Local, sink_server(Some(200_000)), 1, 0, 7).unwrap();
    assert!(load.wait_progress(1_000_000, LIMIT));
    assert!(load.stop().failures[0].contains("wrong byte"));
}

fn source_server(repeat_at: Option<u64>) -> SocketAddr {
    serve(move |mut stream| {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let seed = u64::from_le_bytes(head[..8].try_into().unwrap());
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        let mut at = 0;
        while at < length {
            let mut chunk = vec![0; (length - at).min(5000) as usize];
            pattern::fill(seed, at, &mut chunk);
            if stream.write_all(&chunk).is_err() {
                return;
            }
            if repeat_at.is_some_and(|r| (at..at + 5000).contains(&r)) {
                let _ = stream.write_all(&chunk);
            }
            at += chunk.len() as u64;
        }
    })
}

#[test]
fn source_passes_and_finds_a_repeated_piece_and_an_early_end() {
    let at = source_server(None);
    bulk::receive_whole(&Local, at, 99, 123_457).unwrap();
    let load = bulk::source(&Local, at, 2, 20 << 20, 5).unwrap();
    assert!(load.wait_progress(30, LIMIT));
    assert!(load.stop().good());
    assert!(bulk::receive_whole(&Local, source_server(Some(50_000)), 99, 123_457).is_err());
    let short = serve(|mut stream| {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let mut part = [0; 100];
        pattern::fill(u64::from_le_bytes(head[..8].try_into().unwrap()), 0, &mut part);
        stream.write_all(&part).unwrap();
    });
    let wrong = bulk::receive_whole(&Local, short, 1, 101).unwrap_err().to_string();
    assert!(wrong.contains("100 of 101"), "{wrong}");
}

#[derive(Default)]
struct Store {
    next: u64,
    live: HashMap<String, (u64, String)>,
    disk: Vec<u8>,
}

const SLOTS: u64 = 256;

impl Store {
    fn put(&mut self, key: &str, value: &str, forget: bool) -> u64 {
        loop {
            self.next += 1;
            let slot = self.next % SLOTS;
            if !self.live.values().any(|(seq, _)| seq % SLOTS == slot) {
                break;
            }
        }
        let seq = self.next;
        if !forget {
            let at = (1 + seq % SLOTS) as usize * SECTOR;
            let record = Record {
                seq,
                key: key.into(),
                value: value.into(),
            };
            self.disk[at..at + SECTOR].copy_from_slice(&record.encode());
            self.live.insert(key.into(), (seq, value.into()));
        }
        seq
    }
}

/// The store; `forget` tells which PUTs are acknowledged and not kept.
fn kv_server(forget: fn(u64) -> bool) -> (SocketAddr, Arc<Mutex<Store>>) {
    let mut disk = vec![0; (SLOTS as usize + 1) * SECTOR];
    disk[..8].copy_from_slice(DISK_MAGIC);
    disk[8..16].copy_from_slice(&SLOTS.to_le_bytes());
    let store = Arc::new(Mutex::new(Store {
        disk,
        ..Default::default()
    }));
    let shared = store.clone();
    let at = serve(move |stream| {
        let mut out = stream.try_clone().unwrap();
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let words: Vec<&str> = line.split(' ').collect();
            let mut store = shared.lock().unwrap();
            let forgotten = forget(store.next);
            let answer = match words[..] {
                ["PUT", key, value] => format!("OK {}\n", store.put(key, value, forgotten)),
                ["GET", key] => match store.live.get(key) {
                    Some((seq, value)) => format!("VALUE {seq} {value}\n"),
                    None => "NONE\n".into(),
                },
                _ => "ERR what\n".into(),
            };
            drop(store);
            if out.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    (at, store)
}

#[test]
fn kv_passes_and_the_disk_equals_the_model() {
    let (at, store) = kv_server(|_| false);
    let model: SharedModel = Arc::new(Mutex::new(Model::new(SLOTS)));
    let one = kv::Options {
        connections: 2,
        keys: 20,
        ..Default::default()
    };
    let piped = kv::Options {
        connections: 2,
        depth: 8,
        keys: 20,
        seed: 2,
        ..Default::default()
    };
    let loads = [
        kv::start(&Local, at, &model, &one).unwrap(),
        kv::start(&Local, at, &model, &piped).unwrap(),
    ];
    for load in &loads {
        assert!(load.wait_progress(300, LIMIT));
        assert!(load.pause(LIMIT));
    }
    assert_eq!(kv::lock(&model).unacknowledged(), 0);
    assert_eq!(kv::check_all(&Local, at, &model).unwrap(), 80);
    let report = kv::lock(&model)
        .check_disk(&mut std::io::Cursor::new(store.lock().unwrap().disk.clone()))
        .unwrap();
    assert_eq!((report.acknowledged, report.unacknowledged), (SLOTS, 0));
    for load in loads {
        load.resume();
        assert!(load.stop().good());
    }
    assert!(kv::ask(&Local, at, "NONSENSE").unwrap().starts_with("ERR"));
}

#[test]
fn kv_finds_a_forgotten_put() {
    let (at, store) = kv_server(|next| next == 700);
    let model: SharedModel = Arc::new(Mutex::new(Model::new(SLOTS)));
    let load = kv::start(
        &Local,
        at,
        &model,
        &kv::Options {
            get_every: 0,
            ..Default::default()
        },
    )
    .unwrap();
    assert!(load.wait_progress(710, LIMIT));
    load.stop();
    let found = kv::lock(&model).check_disk(&mut std::io::Cursor::new(store.lock().unwrap().disk.clone()));
    assert!(found.unwrap_err().to_string().contains("acknowledged was seq 701"));
}

#[test]
fn counter_passes_and_finds_a_step_back() {
    let count = Arc::new(AtomicU64::new(0));
    let at = serve(move |stream| {
        let mut out = stream.try_clone().unwrap();
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let answer = match line.as_str() {
                "COUNT" => count.fetch_add(1, Ordering::SeqCst).to_string(),
                "STATUS" => r#"{"vcpus":2,"uptime_us":5,"mode":"irq","dirty_errors":0,"new":1}"#.into(),
                "BACK" => count.fetch_sub(2, Ordering::SeqCst).to_string(),
                _ => "ERR unknown".to_string(),
            };
            if out.write_all(format!("{answer}\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    let mut control = control::Control::open(&Local, at).unwrap();
    assert_eq!(control.status().unwrap().vcpus, 2);
    assert!(control.burn(true).is_err());
    let load = control::counter(&Local, at, Duration::from_millis(1)).unwrap();
    assert!(load.wait_progress(20, LIMIT));
    assert_eq!(load.verdict().failed, 0);
    control.ask("BACK").unwrap();
    assert!(load.wait_progress(20, LIMIT));
    assert!(load.stop().failures[0].contains("the counter went from"));
}

#[test]
fn udp_counts_lost_datagrams() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut buf, mut number) = ([0; 2048], 0);
        while let Ok((n, from)) = socket.recv_from(&mut buf) {
            number += 1;
            if number != 5 {
                let _ = socket.send_to(&buf[..n], from);
            }
        }
    });
    let (load, counts) = udp::start(&Local, at, 100, Duration::from_millis(1)).unwrap();
    assert!(load.wait_progress(20, LIMIT));
    let verdict = load.stop();
    assert!(verdict.good(), "{verdict:?}");
    assert_eq!(counts.lost.load(Ordering::Relaxed), 1);
}

#[test]
fn a_dropped_load_does_not_wait_for_answers() {
    let at = serve(|mut stream| {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let start = Instant::now();
    let load = echo::start(&Local, at, &echo::Options::default()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(load);
    assert!(start.elapsed() < load::wire::SILENCE_LIMIT / 2);
}
