//! What FT does with disks' images, and with the locks of those that both hosts see.
//!
//! A shared disk is written by [`carry_out`] alone: on the primary for changes of committed epochs, on the backup after
//! [`claim`] (R1, R4).

use ft::machine::{DiskChange, Identity, MachineError, Refusal, SharedDisk, checksum};
use virtio_devices::block::{DiskImage, lock};

use super::protected::machine_error;
use super::shadow::refuse;
use crate::devices::Disk;
use crate::vm::Vm;

/// Carries a change out, on any disk, and waits for it.
pub(super) fn carry_out(image: &dyn DiskImage, change: &DiskChange) -> Result<(), MachineError> {
    let done = match change {
        DiskChange::Write { offset, data } => image.write_at(*offset, data),
        DiskChange::Zero { offset, len, unmap } => image.write_zeroes(*offset, *len, *unmap),
        DiskChange::Flush => image.flush(),
        DiskChange::Check { offset, len, crc } => return check(image, *offset, *len, *crc),
    };
    done.map_err(machine_error)
}

fn check(image: &dyn DiskImage, offset: u64, len: u64, crc: u32) -> Result<(), MachineError> {
    if let Some(file) = image.raw() {
        lock::forget_cache(file).map_err(machine_error)?;
    }
    let mut bytes = vec![0; len as usize];
    image.read_at(offset, &mut bytes).map_err(machine_error)?;
    if checksum(&bytes) == crc {
        return Ok(());
    }
    let what =
        "what this host sees is not what the primary sees: a shared disk must be the same file or device on both";
    Err(machine_error(format!(
        "{len} bytes at {offset} of a shared disk: {what}"
    )))
}

/// Why a disk of the VM cannot be shared.
pub(super) fn shareable(vm: &Vm, id: &str) -> Result<(), Refusal> {
    let disks = vm.devices().disks();
    let Some(disk) = disks.iter().find(|disk| disk.id == id) else {
        let known: Vec<&str> = disks.iter().map(|disk| disk.id.as_str()).collect();
        let message = format!("there is no disk {id} to be shared: the VM has {}", known.join(", "));
        return Err(refuse("ft_no_such_disk", message));
    };
    if disk.readonly {
        let message = format!("disk {id} is read-only: nobody writes it, so it need not be named as shared");
        return Err(refuse("ft_disk_not_shareable", message));
    }
    match disk.image() {
        Ok(image) if image.raw().is_some() => Ok(()),
        _ => {
            let message = format!("disk {id} is no raw image or block device: only those can be shared");
            Err(refuse("ft_disk_not_shareable", message))
        }
    }
}

/// Leaves a gap in the lock of a shared disk, by which the backup knows it.
pub(super) fn mark(disk: &Disk) -> Result<SharedDisk, MachineError> {
    let image = disk.image().map_err(machine_error)?;
    let range = lock::GAPS.end - lock::GAPS.start;
    let gap = lock::GAPS.start + uuid::Uuid::new_v4().as_u64_pair().1 % range;
    let failed = |e| machine_error(format!("the lock of disk {} is not this process's: {e}", disk.id));
    let marked = match image.raw() {
        Some(file) => lock::leave_gap(file, gap).map_err(failed)?,
        None => false,
    };
    Ok(SharedDisk {
        lock_gap: marked.then_some(gap),
    })
}

/// On the backup: the files at hand must be the primary's, as far as their locks tell.
pub(super) fn find_marks(vm: &Vm, offered: &Identity) -> Result<(), Refusal> {
    for (disk, theirs) in vm.devices().disks().iter().zip(&offered.disks) {
        let Some(shared) = theirs.shared else { continue };
        let seen = |gap| {
            let image = disk.image()?;
            image.raw().map_or(Ok(false), |file| lock::shows_gap(file, gap))
        };
        let (id, path) = (&disk.id, disk.path.display());
        let message = match shared.lock_gap.map(seen) {
            Some(Ok(true)) => continue,
            None => {
                log::warn!("ft: shared disk {id}: there is no lock that both hosts see; see the guide about fencing");
                continue;
            }
            Some(Ok(false)) => format!(
                "shared disk {id}: the primary's lock is not seen on {path}: it is another file, or the file system does \
                 not share locks between hosts"
            ),
            Some(Err(e)) => format!("shared disk {id}: the locks on {path} cannot be looked at: {e}"),
        };
        return Err(refuse("shared_disk_mismatch", message));
    }
    Ok(())
}

/// Gives the locks of shared disks back.
pub(super) fn give_back(vm: &Vm) {
    for disk in vm.devices().disks().iter().filter(|disk| disk.is_shared()) {
        let given = disk
            .image()
            .and_then(|image| image.raw().map_or(Ok(()), lock::give_back));
        if let Err(e) = given {
            log::warn!("ft: the lock of disk {} is not given back: {e}", disk.id);
        }
    }
}

/// Takes the locks of shared disks. `Some`: another process has one.
pub(super) fn claim(vm: &Vm) -> Result<Option<String>, MachineError> {
    for disk in vm.devices().disks().iter().filter(|disk| disk.is_shared()) {
        let image = disk.image().map_err(machine_error)?;
        let Some(file) = image.raw() else { continue };
        if !lock::try_take(file).map_err(machine_error)? {
            let (id, path) = (&disk.id, disk.path.display());
            return Ok(Some(format!(
                "another process has the lock of shared disk {id} ({path}), so it may still write: as a rule the VMM of \
                 the other host, which hangs; end that process, or switch its host off"
            )));
        }
        // The other host wrote it last.
        lock::forget_cache(file).map_err(machine_error)?;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use virtio_devices::block::{DiskOptions, Format, open};

    use super::*;

    #[test]
    fn a_shared_disk_that_is_another_one_is_found_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options = DiskOptions {
            path: file.path().into(),
            readonly: false,
            direct: false,
            format: Format::Raw,
            backing_files: false,
            shared: true,
        };
        let image = open(&options).unwrap();
        image.write_at(100, &[5; 50]).unwrap();
        let crc = checksum(&[[0; 50], [5; 50]].concat());
        let check = |offset, crc| DiskChange::Check { offset, len: 100, crc };
        carry_out(image.as_ref(), &check(50, crc)).unwrap();
        assert!(carry_out(image.as_ref(), &check(51, crc)).is_err());
        assert!(carry_out(image.as_ref(), &check(50, crc ^ 1)).is_err());
    }
}
