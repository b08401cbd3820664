//! Snapshots: a directory with `config.json`, `state.json` and `memory-ranges`.
//!
//! Files are written under temporary names and renamed when they are whole, `state.json` last: a directory without it
//! is no snapshot. Only their owner can read them, since they hold the guest's RAM. Everything read back is checked; a
//! damaged file gives an error.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::VmConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::memory::{self, GuestRam};
use crate::state::VmState;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";
/// Longest JSON file that is read, in bytes: as many times a saved state as 254 vCPUs can have.
const MAX_JSON: u64 = 64 << 20;

/// Errors of snapshots.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a `file://` URL of a directory.
    #[error("snapshot URL {0:?}: must be file:///absolute/directory")]
    Url(String),
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: not a valid snapshot file: {reason}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}

/// The directory that a `file://` URL names.
pub fn directory(url: &str) -> Result<PathBuf, Error> {
    let path = url
        .strip_prefix("file://")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute());
    path.ok_or_else(|| Error::Url(url.into()))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io {
        path: path.into(),
        source,
    }
}

fn write_whole(dir: &Path, name: &str, write: impl FnOnce(&File) -> Result<(), Error>) -> Result<(), Error> {
    let (path, part) = (dir.join(name), dir.join(format!("{name}.part")));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)
        .map_err(io_error(&part))?;
    write(&file)?;
    file.sync_all().map_err(io_error(&part))?;
    fs::rename(&part, &path).map_err(io_error(&path))
}

fn write_json<T: Serialize>(dir: &Path, name: &str, value: &T) -> Result<(), Error> {
    write_whole(dir, name, |file| {
        let path = dir.join(name);
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, value).map_err(|e| Error::Format {
            path: path.clone(),
            reason: e.to_string(),
        })?;
        out.flush().map_err(io_error(&path))
    })
}

/// Opens a regular file; anything else (a pipe, a device) could make the reader wait, or never end.
fn open(path: &Path) -> Result<File, Error> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(io_error(path))?;
    if file.metadata().map_err(io_error(path))?.is_file() {
        Ok(file)
    } else {
        Err(Error::Format {
            path: path.into(),
            reason: "it is no regular file".into(),
        })
    }
}

fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T, Error> {
    let path = dir.join(name);
    let file = open(&path)?;
    let format = |reason| Error::Format {
        path: path.clone(),
        reason,
    };
    if file.metadata().map_err(io_error(&path))?.len() > MAX_JSON {
        return Err(format(format!("it is longer than {} MiB", MAX_JSON >> 20)));
    }
    // It may grow meanwhile.
    let reader = BufReader::new(file.take(MAX_JSON));
    serde_json::from_reader(reader).map_err(|e| format(e.to_string()))
}

/// Writes a snapshot of a paused VM into `dir`, which is made when it does not exist.
pub fn save(dir: &Path, config: &VmConfig, state: &VmState, ram: &GuestRam) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(io_error(dir))?;
    if dir.join(STATE).exists() {
        let source = io::Error::new(io::ErrorKind::AlreadyExists, "the directory already holds a snapshot");
        return Err(Error::Io {
            path: dir.into(),
            source,
        });
    }
    write_json(dir, CONFIG, config)?;
    write_whole(dir, MEMORY, |file| Ok(ram.save(file)?))?;
    write_json(dir, STATE, state)
}

/// Reads the configuration and the state of a snapshot.
pub fn load(dir: &Path) -> Result<(VmConfig, VmState), Error> {
    Ok((read_json(dir, CONFIG)?, read_json(dir, STATE)?))
}

/// Reads the RAM of a snapshot.
pub fn load_memory(dir: &Path, ram: &GuestRam) -> Result<(), Error> {
    Ok(ram.load(&open(&dir.join(MEMORY))?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_would_never_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join(CONFIG);
        let refusal = || load(dir.path()).unwrap_err().to_string();
        // A pipe without a writer: opening it would wait.
        let made = std::process::Command::new("mkfifo").arg(&config).status().unwrap();
        assert!(made.success());
        assert!(refusal().contains("no regular file"), "{}", refusal());
        fs::remove_file(&config).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
        assert!(refusal().contains("no regular file"), "{}", refusal());
        fs::remove_file(&config).unwrap();
        File::create(&config).unwrap().set_len(MAX_JSON + 1).unwrap();
        assert!(refusal().contains("longer than"), "{}", refusal());
        fs::write(&config, "{").unwrap();
        assert!(refusal().contains("config.json"), "{}", refusal());
    }
}
