//! The client that runs on a host and holds sessions with the Debian guest, while its host is killed.
//!
//! Three sessions run side by side, each on one connection that must never break: redis (each write is flushed before
//! it is acknowledged), the TCP echo, and a shell over ssh that appends numbers to a file and flushes it. Each counts what
//! was acknowledged; every answer must be exactly the next one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A session that gets no answer for so long has failed: a hang guard, the emulated hosts are slow.
const SILENCE: Duration = Duration::from_secs(240);

/// What became of one session.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Session {
    /// Requests that were answered rightly.
    pub answered: u64,
    /// Longest time without an answer.
    pub max_gap_ms: u64,
    /// Middle round-trip time.
    pub median_us: u64,
    /// Why it ended early.
    pub error: Option<String>,
}

/// All sessions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Key-value writes.
    pub redis: Session,
    /// Echoes of 64 bytes.
    pub echo: Session,
    /// Lines appended and flushed in the shell.
    pub ssh: Session,
}

impl Report {
    /// The sessions with their names.
    pub fn sessions(&self) -> [(&'static str, &Session); 3] {
        [("redis", &self.redis), ("echo", &self.echo), ("ssh", &self.ssh)]
    }

    /// Fails unless every session lived to the end and made at least `least` requests.
    pub fn check(&self, least: u64) -> Result<()> {
        for (name, session) in self.sessions() {
            if let Some(error) = &session.error {
                bail!("the {name} session broke after {} answers: {error}", session.answered);
            }
            if session.answered < least {
                bail!("the {name} session got only {} answers", session.answered);
            }
        }
        Ok(())
    }
}

/// Answers so far in each of the three sessions.
#[derive(Default)]
pub struct Progress {
    /// Redis, echo, ssh.
    pub answered: [AtomicU64; 3],
    /// Set to end the sessions.
    pub stop: AtomicBool,
}

/// Holds the sessions with `guest` until `progress.stop`.
pub fn hold(guest: &str, progress: &Progress) -> Report {
    let Progress { answered, stop } = progress;
    std::thread::scope(|scope| {
        let redis = scope.spawn(|| measured(stop, &answered[0], || redis(guest)));
        let echo = scope.spawn(|| measured(stop, &answered[1], || echo(guest)));
        let ssh = scope.spawn(|| measured(stop, &answered[2], ssh));
        let join = |thread: std::thread::ScopedJoinHandle<'_, Session>| {
            thread.join().unwrap_or_else(|_| Session {
                error: Some("the client panicked".into()),
                ..Session::default()
            })
        };
        Report {
            redis: join(redis),
            echo: join(echo),
            ssh: join(ssh),
        }
    })
}

/// Checks, on a new connection, that the guest still has every write that was acknowledged.
pub fn verify(guest: &str, report: &Report) -> Result<()> {
    let mut redis = Redis::connect(guest)?;
    for number in 1..=report.redis.answered {
        let value = redis.ask(&["GET", &key(number)])?;
        if value != value_of(number) {
            bail!("redis lost acknowledged write {number}: it has {value:?}");
        }
    }
    let count: u64 = redis.ask(&["GET", "count"])?.parse().context("redis count")?;
    // One more may have been carried out whose answer the client did not wait for.
    if count < report.redis.answered || count > report.redis.answered + 1 {
        bail!("redis counted {count}, acknowledged were {}", report.redis.answered);
    }
    Ok(())
}

/// On a guest that was booted anew: how many of the first `acknowledged` writes are missing, and the last one in a row that
/// is there.
pub fn recovered(guest: &str, acknowledged: u64) -> Result<(u64, u64)> {
    let mut redis = Redis::connect(guest)?;
    let mut has = |number: u64| -> Result<bool> { Ok(redis.ask(&["GET", &key(number)])? == value_of(number)) };
    let (mut missing, mut last) = (0, 0);
    for number in 1..=acknowledged {
        missing += u64::from(!has(number)?);
    }
    while has(last + 1)? {
        last += 1;
    }
    Ok((missing, last))
}

/// Checks the file that the ssh session wrote: numbers from 1 without a gap, at least those acknowledged.
pub fn check_lines(text: &str, report: &Report) -> Result<()> {
    let mut count = 0;
    for line in text.lines() {
        count += 1;
        if line != count.to_string() {
            bail!("line {count} of the session's file is {line:?}");
        }
    }
    if count < report.ssh.answered {
        bail!(
            "the session's file has {count} lines, acknowledged were {}",
            report.ssh.answered
        );
    }
    Ok(())
}

/// Repeats `step(n)` for n = 1, 2, .. until `stop` or an error.
fn measured<S: FnMut(u64) -> Result<()>>(
    stop: &AtomicBool,
    answered: &AtomicU64,
    open: impl FnOnce() -> Result<S>,
) -> Session {
    let mut session = Session::default();
    let mut times = Vec::new();
    let work = || -> Result<()> {
        let mut step = open()?;
        while !stop.load(Ordering::Relaxed) {
            let start = Instant::now();
            step(session.answered + 1)?;
            session.answered += 1;
            answered.store(session.answered, Ordering::Relaxed);
            times.push(start.elapsed().as_micros() as u64);
        }
        Ok(())
    };
    if let Err(error) = work() {
        session.error = Some(format!("{error:#}"));
        // The others have nothing to wait for.
        stop.store(true, Ordering::Relaxed);
    }
    session.max_gap_ms = times.iter().max().copied().unwrap_or(0) / 1000;
    times.sort_unstable();
    session.median_us = times.get(times.len() / 2).copied().unwrap_or(0);
    session
}

fn connect(guest: &str, port: u16) -> Result<TcpStream> {
    let address = (guest, port)
        .to_socket_addrs()?
        .next()
        .with_context(|| format!("address {guest}"))?;
    let stream = TcpStream::connect_timeout(&address, SILENCE).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn key(number: u64) -> String {
    format!("key:{number}")
}

fn value_of(number: u64) -> String {
    format!("{:016x}", number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).repeat(8)
}

fn redis(guest: &str) -> Result<impl FnMut(u64) -> Result<()>> {
    let mut redis = Redis::connect(guest)?;
    redis.ask(&["FLUSHALL"])?;
    Ok(move |number: u64| {
        let answer = redis.ask(&["SET", &key(number), &value_of(number)])?;
        if answer != "OK" {
            bail!("SET {number}: {answer}");
        }
        // Counts each write exactly once, or the machine's past was changed.
        let count = redis.ask(&["INCR", "count"])?;
        if count != number.to_string() {
            bail!("count is {count} after {number} writes");
        }
        Ok(())
    })
}

fn echo(guest: &str) -> Result<impl FnMut(u64) -> Result<()>> {
    let mut stream = connect(guest, 7)?;
    Ok(move |number: u64| {
        let message = format!("{number:064}");
        stream.write_all(message.as_bytes())?;
        let mut answer = [0; 64];
        stream.read_exact(&mut answer)?;
        if answer != message.as_bytes() {
            bail!("echo {number}: {}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    })
}

fn ssh() -> Result<impl FnMut(u64) -> Result<()>> {
    // `sync FILE` is fsync(2); the answer is given after it.
    let script = "rm -f /root/lines; while read -r n; do echo $n >>/root/lines; sync /root/lines; echo $n; done";
    let mut child = Command::new("ssh")
        .args(["guest", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start ssh")?;
    let mut input = child.stdin.take().context("ssh's input")?;
    let mut output = BufReader::new(child.stdout.take().context("ssh's output")?);
    Ok(move |number: u64| {
        writeln!(input, "{number}")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        if line.trim_end() != number.to_string() {
            bail!("line {number}: the shell answered {line:?} ({:?})", child.try_wait());
        }
        Ok(())
    })
}

/// A connection to redis (RESP).
struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    fn connect(guest: &str) -> Result<Self> {
        Ok(Self {
            stream: BufReader::new(connect(guest, 6379)?),
        })
    }

    /// One command and its answer: a status, a number or a string.
    fn ask(&mut self, words: &[&str]) -> Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.stream.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        match line.split_at_checked(1) {
            Some(("+" | ":", rest)) => Ok(rest.to_string()),
            Some(("$", length)) if length.parse::<usize>().is_ok() => self.line(),
            // No such key.
            Some(("$", "-1")) => Ok(String::new()),
            _ => bail!("redis answered {line:?} to {}", words.join(" ")),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("redis closed the connection");
        }
        Ok(line.trim_end().to_string())
    }
}
