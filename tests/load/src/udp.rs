//! Echo over UDP: lost, late, doubled and changed datagrams are counted; only a changed one is a failure.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::dial::Dial;
use crate::pattern;
use crate::runner::{Client, Load};
use crate::wire::Error;

/// Counts of a UDP load.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams sent.
    pub sent: AtomicU64,
    /// Datagrams without an answer in time.
    pub lost: AtomicU64,
    /// Answers that came after their time was over, or twice.
    pub late: AtomicU64,
}

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts one socket that sends a datagram of `size` bytes (at least 16) in each `interval`.
pub fn start(dial: &dyn Dial, to: SocketAddr, size: usize, interval: Duration) -> Result<(Load, Arc<Counts>), Error> {
    let connect = |source| Error::Connect { to, source };
    let socket = dial.udp(to).map_err(connect)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(connect)?;
    let counts: Arc<Counts> = Arc::default();
    let shared = counts.clone();
    let client = Client::unconnected(move |gate, meter| {
        let mut number = 0u64;
        let mut answer = vec![0; 65536];
        while gate.pass(meter) {
            let message = datagram(number, size.max(16));
            let sent = Instant::now();
            // A port that does not answer yet, or a link that is down, is a lost datagram.
            let _ = socket.send(&message);
            shared.sent.fetch_add(1, Ordering::Relaxed);
            loop {
                match socket.recv(&mut answer) {
                    Ok(n) if answer[..n] == message => {
                        meter.answer(n as u64, Some(sent.elapsed()));
                        break;
                    }
                    Ok(n) => match earlier(&answer[..n], number) {
                        true => {
                            shared.late.fetch_add(1, Ordering::Relaxed);
                        }
                        false => return Err(Error::Wrong(format!("datagram {number} came back changed"))),
                    },
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => {
                        shared.lost.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                }
            }
            number += 1;
            gate.sleep(interval);
        }
        Ok(())
    });
    Ok((Load::start("udp", vec![client]), counts))
}

fn datagram(number: u64, size: usize) -> Vec<u8> {
    let mut message = vec![0; size];
    message[..8].copy_from_slice(&number.to_le_bytes());
    pattern::fill(!number, 0, &mut message[8..]);
    message
}

/// Whether this is an unchanged datagram sent before `number`.
fn earlier(answer: &[u8], number: u64) -> bool {
    answer.first_chunk::<8>().is_some_and(|head| {
        let theirs = u64::from_le_bytes(*head);
        theirs < number && *answer == datagram(theirs, answer.len())
    })
}
