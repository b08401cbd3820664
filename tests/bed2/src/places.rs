//! Where programs, images and the hosts' own files are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The folders of one bed.
pub struct Places {
    /// Images, read-only.
    pub images: PathBuf,
    /// The project's programs, read-only.
    pub programs: PathBuf,
    /// Results, logs, disks.
    pub out: PathBuf,
    /// Unix sockets, whose paths must be short; build folders may be deep.
    pub sockets: PathBuf,
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The images of `scripts/images`; an error when they were not built.
pub fn images() -> Result<PathBuf> {
    let dir = std::env::var_os("FT_IMAGES").map_or_else(|| repository().join("images"), PathBuf::from);
    for file in [
        "host/vmlinux",
        "host/initrd",
        "host/root.img",
        "guest/disk.img",
        "quick/initrd",
    ] {
        if !dir.join(file).is_file() {
            bail!("{} is missing: run scripts/images build", dir.join(file).display());
        }
    }
    Ok(dir.canonicalize()?)
}

/// The folder with the project's programs: `FT_BIN_DIR`, or where this program was built.
pub fn programs() -> Result<PathBuf> {
    let names = ["cloud-hypervisor", "ch-remote", "bed2-client"];
    let complete = |dir: &Path| names.iter().all(|name| dir.join(name).is_file());
    if let Some(dir) = std::env::var_os("FT_BIN_DIR").map(PathBuf::from) {
        if !complete(&dir) {
            bail!(
                "FT_BIN_DIR={}: not all of {} are there",
                dir.display(),
                names.join(", ")
            );
        }
        return Ok(dir.canonicalize()?);
    }
    let me = std::env::current_exe()?;
    let dir = me.ancestors().skip(1).find(|dir| complete(dir));
    Ok(dir
        .with_context(|| {
            format!(
                "{}: not built: run `cargo build --release --bins` first",
                names.join(", ")
            )
        })?
        .to_path_buf())
}

/// Fails with the name of the Debian package when a program that the bed needs is not installed.
pub fn require(program: &str, package: &str) -> Result<()> {
    Command::new(program)
        .arg(if program == "debugfs" { "-V" } else { "--version" })
        .output()
        .with_context(|| format!("{program} is not installed: apt-get install {package}"))?;
    Ok(())
}
