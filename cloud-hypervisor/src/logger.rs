//! The log: one line per record with the time since start, level, thread and module.
//!
//! What a guest or a peer does can cause a line, again and again. So that none of them fills the disk, each module has a
//! bounded number of lines; what is left out is counted and told.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::terminal;

/// Lines that a module may write at once.
const BURST: f64 = 1000.0;
/// Lines that it may write in each second afterwards.
const LINES_PER_S: f64 = 10.0;

/// What a module may still write.
struct Budget {
    lines: f64,
    /// Seconds since the start, when `lines` was right.
    at: f64,
    left_out: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            lines: BURST,
            at: 0.0,
            left_out: 0,
        }
    }
}

impl Budget {
    /// Takes a line at `now`; gives the number of those that were left out before it. `None`: this one is, too.
    fn take(&mut self, now: f64) -> Option<u64> {
        self.lines = (self.lines + (now - self.at).max(0.0) * LINES_PER_S).min(BURST);
        self.at = self.at.max(now);
        if self.lines < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.left_out))
    }
}

struct Logger {
    start: Instant,
    file: Option<Mutex<File>>,
    /// By module: as many as the program has.
    budgets: Mutex<HashMap<String, Budget>>,
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
        budgets: Mutex::default(),
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
        let now = self.start.elapsed().as_secs_f64();
        // Who asks for details gets them all.
        let left_out = if record.level() <= Level::Info {
            let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
            let budget = budgets.entry(record.target().to_string()).or_default();
            let Some(left_out) = budget.take(now) else { return };
            left_out
        } else {
            0
        };
        let left_out = match left_out {
            0 => String::new(),
            n => format!(" ({n} lines of this module before it were left out)"),
        };
        let thread = std::thread::current();
        let line = format!(
            "{now:12.6} {:5} <{}> {}: {}{left_out}",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_says_too_much_is_cut_short_and_told_so() {
        let mut budget = Budget::default();
        let written = (0..5000).filter(|_| budget.take(1.0).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!((budget.take(1.0625), budget.take(1.25)), (None, Some(4001)));
        // A clock that stands still, and a long rest.
        assert_eq!((budget.take(1.25), budget.take(1.25)), (Some(0), None));
        assert_eq!(budget.take(1e6), Some(1));
        let written = (0..5000).filter(|_| budget.take(1e6).is_some()).count();
        assert_eq!(written, BURST as usize - 1);
    }
}
