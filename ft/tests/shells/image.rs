//! A disk's image in a file, beside the fake VM's bytes, with what FT remembers of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ft::copies::{CopyClaim, DiskHistory, SessionId, ShadowCopy, Sidecar};
use ft::machine::{DiskChange, Identity};

/// Disk 0 of a VM that runs.
pub struct Image {
    pub path: PathBuf,
    file: File,
    pub history: DiskHistory,
}

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn write(file: &File, change: &DiskChange) {
    match change {
        DiskChange::Write { offset, data } => file.write_all_at(data, *offset).unwrap(),
        DiskChange::Zero { offset, len, .. } => file.write_all_at(&vec![0; *len as usize], *offset).unwrap(),
        DiskChange::Flush | DiskChange::Check { .. } => {}
    }
}

impl Image {
    /// A new image of an ordinary VM.
    pub fn new(path: &Path, identity: &Identity, content: &[u8]) -> Self {
        std::fs::write(path, content).unwrap();
        Self::with(path, identity, Sidecar::open(path).unwrap())
    }

    fn with(path: &Path, identity: &Identity, sidecar: Option<Sidecar>) -> Self {
        let disk = &identity.disks[0];
        Self {
            path: path.into(),
            file: open(path),
            history: DiskHistory::new(&identity.vm_id, &disk.id, disk.size, sidecar),
        }
    }

    pub fn change(&self, change: &DiskChange) {
        let (offset, len) = change.range();
        self.history.mark(offset, len);
        write(&self.file, change);
    }

    pub fn close(&self) {
        self.history.close();
    }
}

/// Disk 0 of a shadow.
pub struct ShadowImage {
    path: PathBuf,
    file: File,
    copy: ShadowCopy,
}

impl ShadowImage {
    /// Its content is put into `bytes`.
    pub fn open(path: &Path, identity: &Identity, bytes: &mut Vec<u8>) -> Self {
        let disk = &identity.disks[0];
        let file = open(path);
        // Even the same size would be a change.
        if file.metadata().unwrap().len() != disk.size {
            file.set_len(disk.size).unwrap();
        }
        *bytes = std::fs::read(path).unwrap();
        Self {
            path: path.into(),
            copy: ShadowCopy::open(path, &identity.vm_id, &disk.id, disk.size),
            file,
        }
    }

    pub fn claim(&mut self) -> CopyClaim {
        self.copy.claim()
    }

    pub fn doubt(&mut self, offset: u64, len: u64) {
        self.copy.doubt(offset, len);
    }

    pub fn synced(&mut self, session: &SessionId) {
        self.copy.synced(session);
    }

    pub fn change(&mut self, change: &DiskChange) {
        let (offset, len) = change.range();
        self.copy.before_write(offset, len);
        write(&self.file, change);
    }

    pub fn close(&mut self) {
        self.copy.close();
    }

    /// The VM runs on it now.
    pub fn take_over(self, identity: &Identity) -> Image {
        let session = self.copy.session().cloned().unwrap();
        let image = Image::with(&self.path, identity, self.copy.into_sidecar());
        image.history.took_over(&session);
        image
    }
}
