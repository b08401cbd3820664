//! Snapshots: a directory with `config.json`, `state.json` and `memory-ranges`.
//!
//! Files are written under temporary names and renamed when they are whole, `state.json` last: a directory without it
//! is no snapshot. Only their owner can read them, since they hold the guest's RAM. Everything read back is checked; a
//! damaged file gives an error.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
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

fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T, Error> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(io_error(&path))?;
    serde_json::from_reader(BufReader::new(file)).map_err(|e| Error::Format {
        path,
        reason: e.to_string(),
    })
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
    let path = dir.join(MEMORY);
    let file = File::open(&path).map_err(io_error(&path))?;
    Ok(ram.load(&file)?)
}
