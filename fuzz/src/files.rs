//! Files for the targets that read some.

use std::path::Path;
use std::sync::OnceLock;

use tempfile::TempDir;

/// The directory that this process writes its inputs into, in memory where that is possible.
pub fn directory() -> &'static Path {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let make = || {
        tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .expect("a directory")
    };
    DIR.get_or_init(make).path()
}
