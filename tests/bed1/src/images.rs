//! Disk images, seen from outside.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Runs `qemu-img` and returns what it says.
pub fn qemu_img(args: &[&str]) -> Result<String> {
    let output = Command::new("qemu-img").args(args).output();
    let output = output.context("qemu-img (package qemu-utils)")?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if !output.status.success() {
        bail!("qemu-img {}: {}: {text}", args.join(" "), output.status);
    }
    Ok(text)
}

/// Whether the file is a qcow2 image.
pub fn is_qcow2(disk: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    Ok(File::open(disk)?.read_at(&mut magic, 0)? == 4 && magic == *b"QFI\xfb")
}

fn format(disk: &Path) -> Result<&'static str> {
    Ok(if is_qcow2(disk)? { "qcow2" } else { "raw" })
}

/// What a guest sees of a disk, as far as its image was flushed, also while a VMM has it open.
pub fn open(disk: &Path) -> Result<File> {
    if !is_qcow2(disk)? {
        return Ok(File::open(disk)?);
    }
    // Of a copy: the image itself is locked.
    let (copy, raw) = (disk.with_extension("copy"), disk.with_extension("seen"));
    std::fs::copy(disk, &copy)?;
    let (from, to) = (copy.display().to_string(), raw.display().to_string());
    let converted = qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &from, &to]).and_then(|_| Ok(File::open(&raw)?));
    for file in [&copy, &raw] {
        drop(std::fs::remove_file(file));
    }
    converted
}

/// A guest sees the same of both disks. Neither may be open.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    let (a, b) = (one.display().to_string(), other.display().to_string());
    qemu_img(&["compare", "-f", format(one)?, "-F", format(other)?, &a, &b]).map(drop)
}

/// A qcow2 image without errors and leaks, which nobody has open.
pub fn check(disk: &Path) -> Result<()> {
    let found = qemu_img(&["check", "-f", "qcow2", &disk.display().to_string()])?;
    if !found.contains("No errors were found") {
        bail!("{found}");
    }
    Ok(())
}
