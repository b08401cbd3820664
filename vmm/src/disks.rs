//! Disk images: which format one has, and how it is opened and made.
//!
//! The format is what the configuration says, never what the image's bytes say: a guest can write those of a raw image,
//! and a qcow2 header there could make the next VMM read other files of the host. An image without a stated format is
//! raw; one that begins like another format is refused until it is said what it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use api::config::ImageType;
use api::{DiskConfig, VmConfig};
use thiserror::Error;
use virtio_devices::block::{self, DiskOptions, Format};

/// Why a disk's format is not used.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration says nothing, and the image looks like another format than raw.
    #[error("disk {id}: {} begins like a {looks} image: {hint}", path.display())]
    Unsaid {
        /// Device id.
        id: String,
        /// Path of the image.
        path: PathBuf,
        /// What it looks like.
        looks: &'static str,
        /// What to do.
        hint: String,
    },
    /// A format that is not offered.
    #[error("disk {id}: image_type {format:?} is not supported: convert the image with `qemu-img convert -O qcow2`")]
    NotOffered {
        /// Device id.
        id: String,
        /// The format.
        format: ImageType,
    },
}

/// The format of a disk image that is none of raw, by its first bytes.
fn foreign_format(path: &Path) -> Option<&'static str> {
    let mut head = [0; 8];
    let n = File::open(path).and_then(|mut f| f.read(&mut head)).unwrap_or(0);
    match &head[..n] {
        [b'Q', b'F', b'I', 0xfb, ..] => Some("qcow2"),
        b"vhdxfile" => Some("VHDX"),
        b"conectix" => Some("VHD"),
        [b'K', b'D', b'M', b'V', ..] => Some("VMDK"),
        _ => None,
    }
}

fn format(disk: &DiskConfig) -> Result<Format, Error> {
    let id = || disk.id.clone().unwrap_or_default();
    let path = disk.path.clone().unwrap_or_default();
    match disk.image_type {
        Some(ImageType::Raw) => Ok(Format::Raw),
        Some(ImageType::Qcow2) => Ok(Format::Qcow2),
        Some(format @ (ImageType::FixedVhd | ImageType::Vhdx)) => Err(Error::NotOffered { id: id(), format }),
        None | Some(ImageType::Unknown) => match foreign_format(&path) {
            None => Ok(Format::Raw),
            Some(looks) => {
                let is = match looks {
                    "qcow2" => "say image_type=qcow2 when it is one",
                    _ => "convert it with `qemu-img convert -O qcow2`",
                };
                let hint = format!("{is}, or image_type=raw when the guest itself is to see it so");
                let id = id();
                Err(Error::Unsaid { id, path, looks, hint })
            }
        },
    }
}

/// How the disk is opened.
pub fn options(disk: &DiskConfig) -> Result<DiskOptions, Error> {
    Ok(DiskOptions {
        path: disk.path.clone().unwrap_or_default(),
        format: format(disk)?,
        readonly: disk.readonly,
        direct: disk.direct,
        backing_files: disk.backing_files,
        shared: false,
    })
}

/// Makes a disk's image at `path`, which must not exist: `size` bytes, all zero, in the format of the configuration.
pub fn create(disk: &DiskConfig, path: &Path, size: u64) -> io::Result<()> {
    block::create(path, format(disk).map_err(io::Error::other)?, size)
}

/// The other files that a disk's image reads from.
pub fn backing_files(disk: &DiskConfig) -> Vec<PathBuf> {
    match (&disk.path, format(disk)) {
        (Some(path), Ok(format)) if disk.backing_files => block::backing_files(path, format),
        _ => Vec::new(),
    }
}

/// Writes the formats that were found into the configuration of a VM whose disks are open. So a raw image stays one, in
/// snapshots and on a backup, whatever the guest writes into it.
pub fn keep_formats(config: &mut VmConfig) {
    for disk in config.disks.iter_mut().flatten() {
        if matches!(disk.image_type, None | Some(ImageType::Unknown)) {
            disk.image_type = Some(ImageType::Raw);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_said_or_it_is_raw() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut disk = DiskConfig {
            path: Some(file.path().into()),
            id: Some("d".into()),
            ..DiskConfig::default()
        };
        assert_eq!(format(&disk).unwrap(), Format::Raw);
        std::fs::write(file.path(), b"QFI\xfb\0\0\0\x03").unwrap();
        for unsaid in [None, Some(ImageType::Unknown)] {
            disk.image_type = unsaid;
            let e = format(&disk).unwrap_err().to_string();
            assert!(e.contains("image_type=qcow2") && e.contains("image_type=raw"), "{e}");
        }
        for (said, format) in [(ImageType::Raw, Format::Raw), (ImageType::Qcow2, Format::Qcow2)] {
            disk.image_type = Some(said);
            assert_eq!(options(&disk).unwrap().format, format);
        }
        disk.image_type = Some(ImageType::Vhdx);
        assert!(format(&disk).unwrap_err().to_string().contains("Vhdx"));
    }

    #[test]
    fn what_was_found_to_be_raw_stays_so() {
        let with = |image_type| DiskConfig {
            image_type,
            ..DiskConfig::default()
        };
        let disks = [None, Some(ImageType::Unknown), Some(ImageType::Qcow2)].map(with);
        let mut config = VmConfig {
            disks: Some(disks.into()),
            ..VmConfig::default()
        };
        keep_formats(&mut config);
        let kept: Vec<_> = config
            .disks
            .into_iter()
            .flatten()
            .filter_map(|d| d.image_type)
            .collect();
        assert_eq!(kept, [ImageType::Raw, ImageType::Raw, ImageType::Qcow2]);
    }
}
