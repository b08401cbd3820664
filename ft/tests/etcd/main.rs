//! The arbiter in etcd, against Debian's etcd (package `etcd-server`) on loopback.
//!
//! * [`cluster`]: etcd processes; [`tls`]: certificates; [`relay`]: loses answers.

#![allow(clippy::unwrap_used)]

mod cluster;
mod relay;
mod tls;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use cluster::{Cluster, eventually, open};
use ft::arbiter::{Arbiter, ArbiterError, EtcdArbiter, Register, Verdict};
use relay::Relay;
use tls::Pki;

/// The bound of a call, and some for a busy machine.
const BOUND: Duration = Duration::from_secs(8);

fn lost(winner: &str) -> Verdict {
    Verdict::Lost { winner: winner.into() }
}

fn register(generation: u64, winner: &str) -> Register {
    Register {
        generation,
        winner: Some(winner.into()),
    }
}

/// The reason of a refusal for ever.
fn refusal<T: std::fmt::Debug>(answer: Result<T, ArbiterError>) -> String {
    match answer {
        Err(e @ ArbiterError::Corrupt { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Won, lost, asked again; by arbiters that know nothing of one another.
fn one_winner(cluster: &Cluster) {
    let (a, b) = (cluster.arbiter(), cluster.arbiter());
    assert_eq!(a.store_id().unwrap(), b.store_id().unwrap());
    let nobody = Register {
        generation: 0,
        winner: None,
    };
    assert_eq!(a.read("vm").unwrap(), nobody);
    assert_eq!(a.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    assert_eq!(b.test_and_set("vm", 0, "b").unwrap(), lost("a"));
    assert_eq!(a.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    assert_eq!(cluster.arbiter().test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    assert_eq!(b.test_and_set("vm", 1, "b").unwrap(), Verdict::Won);
    assert_eq!(a.test_and_set("vm", 0, "c").unwrap(), lost("a"));
    assert_eq!(a.test_and_set("vm", 1, "a").unwrap(), lost("b"));
    assert_eq!(a.read("vm").unwrap(), register(2, "b"));
    assert_eq!(a.read("other").unwrap(), nobody);
    a.mark("vm", "token").unwrap();
    assert!(b.sees("vm", "token").unwrap());
    assert!(!b.sees("other", "token").unwrap());
    a.unmark("vm", "token");
    assert!(!b.sees("vm", "token").unwrap());
}

/// For each of `rounds` generations two nodes that ask at the same time.
fn races(cluster: &Cluster, rounds: u64) {
    let arbiters = [Arc::new(cluster.arbiter()), Arc::new(cluster.arbiter())];
    let barrier = Arc::new(Barrier::new(2));
    let racer = |n: usize| {
        let (arbiter, barrier) = (arbiters[n].clone(), barrier.clone());
        std::thread::spawn(move || {
            let node = format!("node-{n}");
            let mut winners = Vec::new();
            for generation in 0..rounds {
                barrier.wait();
                // An election under way is no answer; nobody may guess.
                let verdict = eventually("a verdict", || arbiter.test_and_set("race", generation, &node).ok());
                winners.push(match verdict {
                    Verdict::Won => node.clone(),
                    Verdict::Lost { winner } => {
                        assert_ne!(winner, node);
                        winner
                    }
                });
            }
            winners
        })
    };
    let [first, second] = [racer(0), racer(1)].map(|thread| thread.join().unwrap());
    assert_eq!(first, second);
    assert_eq!(cluster.arbiter().read("race").unwrap().generation, rounds);
}

#[test]
fn one_member_one_winner() {
    let cluster = Cluster::start(1);
    one_winner(&cluster);
    races(&cluster, 100);
}

#[test]
fn three_members_one_winner() {
    let cluster = Cluster::start(3);
    one_winner(&cluster);
    races(&cluster, 50);
}

#[test]
fn a_member_that_is_gone_or_silent_is_passed_over() {
    let mut cluster = Cluster::start(3);
    let arbiter = cluster.arbiter();
    assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    for n in 0..3 {
        cluster.stop(n);
        // Perhaps it was the leader: an election takes a while.
        let verdict = eventually("a verdict of two", || {
            cluster.arbiter().test_and_set("vm", n as u64 + 1, "a").ok()
        });
        assert_eq!(verdict, Verdict::Won);
        let begin = Instant::now();
        assert_eq!(arbiter.test_and_set("vm", n as u64 + 1, "b").unwrap(), lost("a"));
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
        cluster.restart(n);
        let alone = open(&format!("etcd:{}", cluster.endpoint(n)));
        eventually("the member's return", || alone.read("vm").ok());
    }
    // Silent: connections to it are accepted.
    cluster.freeze(0);
    eventually("an answer of two", || cluster.arbiter().read("vm").ok());
    let begin = Instant::now();
    assert_eq!(cluster.arbiter().read("vm").unwrap(), register(4, "a"));
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    cluster.thaw(0);
}

#[test]
fn without_a_majority_there_is_no_answer_and_later_the_right_one() {
    let mut cluster = Cluster::start(3);
    let arbiter = cluster.arbiter();
    assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    cluster.stop(1);
    cluster.stop(2);
    for node in ["a", "b"] {
        let begin = Instant::now();
        let error = arbiter.test_and_set("vm", 1, node).unwrap_err();
        assert!(matches!(error, ArbiterError::Store { .. }), "{error}");
        assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
    }
    let begin = Instant::now();
    arbiter.read("vm").unwrap_err();
    arbiter.unmark("vm", "token");
    assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
    cluster.restart(1);
    cluster.wait();
    // What was asked without an answer may have been done or not, but it has one winner.
    let verdicts = ["a", "b"].map(|node| eventually("a verdict", || arbiter.test_and_set("vm", 1, node).ok()));
    let winner = arbiter.read("vm").unwrap();
    assert_eq!(winner.generation, 2);
    match winner.winner.as_deref() {
        Some("a") => assert_eq!(verdicts, [Verdict::Won, lost("a")]),
        Some("b") => assert_eq!(verdicts, [lost("b"), Verdict::Won]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_members_silent_is_an_error_within_the_bound() {
    let cluster = Cluster::start(1);
    let arbiter = cluster.arbiter();
    arbiter.store_id().unwrap();
    cluster.freeze(0);
    let begin = Instant::now();
    let error = arbiter.test_and_set("vm", 0, "a").unwrap_err();
    assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
    assert!(error.to_string().contains("no answer within 5 s"), "{error}");
    assert_eq!(error.code(), "ft_arbiter_unreachable");
    cluster.thaw(0);
    assert_eq!(
        eventually("a verdict", || arbiter.test_and_set("vm", 0, "a").ok()),
        Verdict::Won
    );
}

#[test]
fn who_won_without_being_told_finds_out() {
    let cluster = Cluster::start(1);
    let relay = Relay::losing_answers_to(cluster.endpoint(0), "winner unlucky");
    let arbiter = open(&format!("etcd:{}", relay.endpoint));
    let before = arbiter.read("vm").unwrap();
    assert_eq!(before.generation, 0);
    let error = arbiter.test_and_set("vm", 0, "unlucky").unwrap_err();
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert!(relay.lost.load(Ordering::SeqCst));
    assert_eq!(arbiter.test_and_set("vm", 0, "other").unwrap(), lost("unlucky"));
    assert_eq!(
        cluster.arbiter().test_and_set("vm", 0, "unlucky").unwrap(),
        Verdict::Won
    );
    // Beside a member whose answers are lost, one that is well: the call itself finds out.
    let both = open(&format!("etcd:{}+{}", relay.endpoint, cluster.endpoint(0)));
    relay.lost.store(false, Ordering::SeqCst);
    assert_eq!(both.test_and_set("vm", 1, "unlucky").unwrap(), Verdict::Won);
    assert!(relay.lost.load(Ordering::SeqCst));
}

#[test]
fn tls_needs_the_right_authority_on_both_sides() {
    let (pki, strange) = (Pki::new(), Pki::new());
    let cluster = Cluster::start_with_tls(1, &pki);
    assert_eq!(cluster.arbiter().test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    let at = format!("etcd:{}", cluster.endpoint(0));
    let of = |pki: &Pki, name: &str| pki.path(name).display().to_string();
    let ca = of(&pki, "ca.pem");
    let identity = |pki: &Pki| format!("+cert={}+key={}", of(pki, "client.pem"), of(pki, "client.key"));
    for (what, parts) in [
        ("servers of a strange CA", strange.client()),
        ("clients of a strange CA", format!("+ca={ca}{}", identity(&strange))),
        ("clients without a certificate", format!("+ca={ca}")),
        ("clients without TLS", String::new()),
        ("a CA file that is none", format!("+ca={}", of(&pki, "server.key"))),
    ] {
        let begin = Instant::now();
        let error = open(&format!("{at}{parts}")).test_and_set("vm", 1, "b").unwrap_err();
        assert!(matches!(error, ArbiterError::Store { .. }), "{what}: {error}");
        assert!(begin.elapsed() < BOUND, "{what}: {:?}", begin.elapsed());
        println!("{what}: {error}");
    }
    let missing = ft::arbiter::open(&format!("{at}+ca=/no/such/ca.pem")).err().unwrap();
    assert!(missing.to_string().contains("file /no/such/ca.pem"), "{missing}");
    assert_eq!(cluster.arbiter().read("vm").unwrap(), register(1, "a"));
}

#[test]
fn a_store_that_went_back_is_never_won() {
    let mut cluster = Cluster::start(1);
    let backup = tempfile::tempdir().unwrap();
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let _ = std::fs::remove_dir_all(to);
        let status = std::process::Command::new("cp").arg("-r").args([from, to]).status();
        assert!(status.unwrap().success());
    };
    let first = cluster.arbiter();
    assert_eq!(first.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    cluster.stop(0);
    copy(cluster.data(0), &backup.path().join("data"));
    cluster.restart(0);
    cluster.wait();
    assert_eq!(first.test_and_set("vm", 1, "b").unwrap(), Verdict::Won);
    let (late, waiting): (EtcdArbiter, EtcdArbiter) = (cluster.arbiter(), cluster.arbiter());
    assert_eq!(late.read("vm").unwrap(), register(2, "b"));
    assert_eq!(waiting.read("vm").unwrap(), register(2, "b"));
    let early = cluster.arbiter();
    early.store_id().unwrap();

    cluster.stop(0);
    copy(&backup.path().join("data"), cluster.data(0));
    cluster.restart(0);
    cluster.wait();
    // By the revision.
    assert!(refusal(late.test_and_set("vm", 2, "a")).contains("revision"));
    assert!(refusal(early.read("vm")).contains("revision"));
    // By the generation, whatever was seen before.
    let fresh = cluster.arbiter();
    assert!(refusal(fresh.test_and_set("vm", 2, "a")).contains("generation of vm is 1, it was 2"));
    assert_eq!(fresh.read("vm").unwrap(), register(1, "a"));
    // By the history, when generation and revision have caught up.
    assert_eq!(fresh.test_and_set("vm", 1, "c").unwrap(), Verdict::Won);
    for n in 0..20 {
        cluster.tamper("/elsewhere", Some(&n.to_string()));
    }
    assert!(refusal(waiting.test_and_set("vm", 2, "a")).contains("generation 2 of vm is c's now, it was b's"));
    assert!(refusal(waiting.test_and_set("vm", 1, "b")).contains("it was b's"));
    assert_eq!(fresh.read("vm").unwrap(), register(2, "c"));
}

#[test]
fn a_store_that_was_emptied_exchanged_or_damaged_is_never_won() {
    let cluster = Cluster::start(1);
    let arbiter = cluster.arbiter();
    let id = arbiter.store_id().unwrap();
    cluster.tamper("/ft/store", None);
    assert!(refusal(arbiter.test_and_set("vm", 0, "a")).contains("emptied"));
    let other = cluster.arbiter();
    assert_ne!(other.store_id().unwrap(), id);
    assert!(refusal(arbiter.test_and_set("vm", 0, "a")).contains(&id));
    cluster.tamper("/ft/store", Some("x"));
    assert!(refusal(other.test_and_set("vm", 0, "a")).contains("/ft/store does not hold"));

    let place = |prefix: &str| open(&format!("{}+prefix={prefix}", cluster.description()));
    let key = |generation: u64| format!("/b/vm/gen/{generation:020}");
    assert_eq!(place("/b").test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    assert_ne!(place("/b").store_id().unwrap(), place("/c").store_id().unwrap());
    let text = "vm vm\ngeneration 1\nwinner b\ncrc32c 00000000\n";
    cluster.tamper(&key(1), Some(text));
    for arbiter in [place("/b"), place("/b")] {
        assert!(refusal(arbiter.test_and_set("vm", 0, "b")).contains("is not ours"));
        assert!(refusal(arbiter.read("vm")).contains("is not ours"));
    }
    // A gap.
    assert_eq!(place("/d").test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    assert_eq!(place("/d").test_and_set("vm", 1, "b").unwrap(), Verdict::Won);
    cluster.tamper("/d/vm/gen/00000000000000000001", None);
    assert!(refusal(place("/d").test_and_set("vm", 0, "c")).contains("missing"));
}

#[test]
fn another_cluster_at_the_same_address_is_refused() {
    let cluster = Cluster::start(1);
    let other = Cluster::start(1);
    // The first endpoint answers at first, the second one belongs to somebody else.
    let both = open(&format!("etcd:{}+{}", cluster.endpoint(0), other.endpoint(0)));
    let id = both.store_id().unwrap();
    assert_eq!(cluster.arbiter().store_id().unwrap(), id);
    drop(cluster);
    let error = refusal(both.test_and_set("vm", 0, "a"));
    assert!(error.contains("emptied or exchanged"), "{error}");
    assert_eq!(other.arbiter().read("vm").unwrap().generation, 0);
}

#[test]
fn bad_names_are_refused() {
    let arbiter = open("etcd:127.0.0.1:1");
    for bad in ["", "../x", "a/b", "a b"] {
        assert!(matches!(
            arbiter.test_and_set(bad, 0, "a"),
            Err(ArbiterError::BadName(_))
        ));
        assert!(matches!(
            arbiter.test_and_set("vm", 0, bad),
            Err(ArbiterError::BadName(_))
        ));
        assert!(matches!(arbiter.mark("vm", bad), Err(ArbiterError::BadName(_))));
    }
    let begin = Instant::now();
    let error = arbiter.test_and_set("vm", 0, "a").unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(3));
}
