//! The log: one line per record with the time since start, level, thread and module.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

use crate::terminal;

struct Logger {
    start: Instant,
    file: Option<Mutex<File>>,
}

/// Starts logging to `file` (standard error when `None`), at the level that `verbose` times `-v` ask for.
pub fn init(file: Option<&Path>, verbose: u8) -> io::Result<()> {
    let open = |path: &Path| {
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.map_err(|e| io::Error::new(e.kind(), format!("--log-file {}: {e}", path.display())))
    };
    let file = file.map(open).transpose()?.map(Mutex::new);
    log::set_max_level(match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    log::set_boxed_logger(Box::new(Logger {
        start: Instant::now(),
        file,
    }))
    .map_err(io::Error::other)
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let thread = std::thread::current();
        let line = format!(
            "{:12.6} {:5} <{}> {}: {}",
            self.start.elapsed().as_secs_f64(),
            record.level(),
            thread.name().unwrap_or("?"),
            record.target(),
            record.args()
        );
        // A log that cannot be written has nowhere to complain.
        let _ = match &self.file {
            Some(file) => writeln!(file.lock().unwrap_or_else(PoisonError::into_inner), "{line}"),
            None => write!(io::stderr().lock(), "{line}{}", terminal::line_end()),
        };
    }

    fn flush(&self) {}
}
