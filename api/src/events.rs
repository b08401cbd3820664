//! The event monitor: what happens in the VMM, as JSON objects on a file or pipe.
//!
//! Events are handed to a writer thread through a bounded queue, so that a reader that does not read never holds the VMM
//! up; events that find the queue full are dropped, and the next event that gets through tells how many.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use sandbox::ThreadKind;
use serde::Serialize;

/// Events that can wait for a slow reader.
const QUEUE: usize = 1024;
/// How long [`Events::flush`] waits.
const FLUSH: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

#[derive(Serialize)]
struct Event<'a> {
    timestamp: Timestamp,
    source: &'a str,
    event: &'a str,
    properties: Option<BTreeMap<&'a str, &'a str>>,
}

enum Message {
    Text(String),
    /// Everything before it is written when its sender is dropped.
    Flush(SyncSender<()>),
}

struct Sink {
    queue: SyncSender<Message>,
    dropped: AtomicU64,
}

/// Where events go. Clones share their destination.
#[derive(Clone)]
pub struct Events {
    start: Instant,
    sink: Option<Arc<Sink>>,
}

impl Default for Events {
    fn default() -> Self {
        Self::none()
    }
}

impl Events {
    /// Events go nowhere.
    pub fn none() -> Self {
        Self {
            start: Instant::now(),
            sink: None,
        }
    }

    /// Events are written to `file`. Their time stamps count from now.
    pub fn to_file(file: File) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE);
        sandbox::spawn(ThreadKind::EventMonitor, "event-monitor", move || {
            write_events(file, &messages);
        })?;
        let sink = Arc::new(Sink {
            queue,
            dropped: AtomicU64::new(0),
        });
        Ok(Self {
            start: Instant::now(),
            sink: Some(sink),
        })
    }

    /// Tells that `event` happened in `source` (`vm`, `vmm`, `ft`). Never blocks.
    pub fn emit(&self, source: &str, event: &str, properties: &[(&str, String)]) {
        let Some(sink) = &self.sink else { return };
        let dropped = sink.dropped.swap(0, Ordering::Relaxed);
        let dropped_text = dropped.to_string();
        let mut map: BTreeMap<&str, &str> = properties.iter().map(|(key, value)| (*key, value.as_str())).collect();
        if dropped > 0 {
            map.insert("events_dropped_before", &dropped_text);
        }
        let elapsed = self.start.elapsed();
        let event = Event {
            timestamp: Timestamp {
                secs: elapsed.as_secs(),
                nanos: elapsed.subsec_nanos(),
            },
            source,
            event,
            properties: Some(map).filter(|m| !m.is_empty()),
        };
        let Ok(mut text) = serde_json::to_string_pretty(&event) else {
            return;
        };
        text.push_str("\n\n");
        if sink.queue.try_send(Message::Text(text)).is_err() {
            sink.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }

    /// Waits a short time for the events so far to be written; before the process ends.
    pub fn flush(&self) {
        let Some(sink) = &self.sink else { return };
        let (written, wait) = sync_channel(0);
        if sink.queue.try_send(Message::Flush(written)).is_ok()
            && wait.recv_timeout(FLUSH) == Err(RecvTimeoutError::Timeout)
        {
            log::warn!("event monitor: its reader is slow, the last events are lost");
        }
    }
}

fn write_events(mut file: File, messages: &Receiver<Message>) {
    let mut failed = false;
    while let Ok(message) = messages.recv() {
        match message {
            Message::Text(_) if failed => {}
            Message::Text(text) => {
                if let Err(e) = file.write_all(text.as_bytes()) {
                    log::warn!("event monitor: {e}; no further events are written");
                    failed = true;
                }
            }
            Message::Flush(written) => drop(written),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn events_are_json_objects_with_an_empty_line_between() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let events = Events::to_file(File::create(&path).unwrap()).unwrap();
        events.emit("vm", "booted", &[]);
        events.clone().emit("ft", "protected", &[("epoch", "7".into())]);
        events.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let objects: Vec<serde_json::Value> = text
            .split_terminator("\n\n")
            .map(|object| serde_json::from_str(object).unwrap())
            .collect();
        assert_eq!(objects.len(), 2);
        assert!(
            text.starts_with("{\n  \"timestamp\": {\n    \"secs\": 0,\n    \"nanos\": "),
            "{text}"
        );
        assert_eq!(
            (&objects[0]["source"], &objects[0]["event"]),
            (&"vm".into(), &"booted".into())
        );
        assert!(objects[0]["properties"].is_null());
        assert_eq!(objects[1]["properties"]["epoch"], "7");
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nobody_up() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let events = Events::to_file(OwnedFd::from(writer).into()).unwrap();
        let start = Instant::now();
        for _ in 0..5 * QUEUE {
            events.emit("vm", "booted", &[]);
        }
        events.flush();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let read = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        // Once there is room again, the next event tells what was lost.
        std::thread::sleep(Duration::from_millis(200));
        events.emit("vm", "shutdown", &[]);
        drop(events);
        let text = read.join().unwrap().unwrap();
        assert!(text.contains("events_dropped_before"), "{}", text.len());
    }

    #[test]
    fn nowhere_is_fine() {
        Events::none().emit("vm", "booted", &[]);
        Events::default().flush();
    }
}
