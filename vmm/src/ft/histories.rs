//! What is remembered of the disks of this VMM's VM from session to session, so that only what differs is copied again.
//!
//! * [`MarkedBlock`]: between a disk's backend and whatever FT puts around it, marks changes in the disk's
//!   [`DiskHistory`]. It is put in when a session begins or a VM was taken over, and stays while the VM runs, until FT is
//!   disabled: a VM that has had no FT has none (R7).
//! * [`Histories`]: those of all disks; [`Kept`]: where they are kept between sessions.
//!
//! Lock order: `kept`, then `wraps`, then a device's lock, then a history's.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, Weak};

use api::VmConfig;
use ft::copies::{DiskHistory, SessionId, Sidecar, path_of};
use virtio_devices::backend::{BlockBackend, BlockCompletion, BlockOp};

use super::backends::Slot;
use super::blocks::{changed_range, total};
use crate::devices::Disk;
use crate::interrupts::lock;
use crate::vm::Vm;

/// The histories of the VM that runs here, if there are any.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<Option<(Weak<Vm>, Arc<Histories>)>>>);

impl Kept {
    /// Those of `vm`; new ones, if it has none. `shared`: ids of disks that are not copied.
    pub fn of(&self, vm: &Arc<Vm>, shared: &[String]) -> Arc<Histories> {
        let mut kept = lock(&self.0);
        match &*kept {
            Some((of, histories)) if of.ptr_eq(&Arc::downgrade(vm)) => histories.clone(),
            _ => {
                let sidecar = |disk: &Disk| {
                    if is_copied(disk, shared) {
                        sidecar_of(disk)
                    } else {
                        None
                    }
                };
                let sidecars = vm.devices().disks().iter().map(sidecar).collect();
                let histories = Arc::new(Histories::new(vm, sidecars, shared));
                *kept = Some((Arc::downgrade(vm), histories.clone()));
                histories
            }
        }
    }

    /// Keeps those of a VM that was taken over.
    pub fn put(&self, vm: &Arc<Vm>, histories: Arc<Histories>) {
        *lock(&self.0) = Some((Arc::downgrade(vm), histories));
    }

    /// FT was disabled, or the VM ended: nothing is remembered, nothing is in the way of its disks any more.
    pub fn forget(&self) {
        if let Some((vm, histories)) = lock(&self.0).take()
            && let Some(vm) = vm.upgrade()
        {
            histories.unwrap(&vm);
        }
    }
}

/// Whether both hosts have a copy of the disk.
fn is_copied(disk: &Disk, shared: &[String]) -> bool {
    !disk.readonly && !disk.is_shared() && !shared.contains(&disk.id)
}

fn sidecar_of(disk: &Disk) -> Option<Sidecar> {
    // What a killed process had of a qcow2 image's tables is lost: its file proves nothing.
    disk.image().ok()?.raw()?;
    Sidecar::open(&disk.path).unwrap_or_else(|e| {
        let path = path_of(&disk.path);
        log::warn!(
            "ft: {}: {e}: if the backup takes over, all of this disk will have to be copied back",
            path.display()
        );
        None
    })
}

/// Removes what is said of the images of a VM that is made without FT: from now on they are nobody's copies.
pub fn forget_copies(config: &VmConfig) -> Result<(), String> {
    for disk in config.disks.iter().flatten().filter(|disk| !disk.readonly) {
        let Some(image) = &disk.path else { continue };
        let path = path_of(image);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(format!(
                    "{}: {e}: it says that the image is the copy of a protected VM's disk, which it will not be any \
                     more; remove it first",
                    path.display()
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The histories of a VM's disks.
pub struct Histories {
    /// By index of the disk; none for those that are not copied.
    disks: Vec<Option<Arc<DiskHistory>>>,
    wraps: Mutex<Vec<Option<Slot<dyn BlockBackend>>>>,
}

impl Histories {
    /// With the sidecars of its images, where there are any. `shared`: ids of disks that are not copied.
    pub fn new(vm: &Vm, sidecars: Vec<Option<Sidecar>>, shared: &[String]) -> Self {
        let history = |(disk, sidecar): (&Disk, Option<Sidecar>)| {
            let known = is_copied(disk, shared) && disk.size <= ft::copies::MAX_SIZE;
            known.then(|| Arc::new(DiskHistory::new(vm.uuid(), &disk.id, disk.size, sidecar)))
        };
        Self {
            disks: vm.devices().disks().iter().zip(sidecars).map(history).collect(),
            wraps: Mutex::default(),
        }
    }

    /// That of a disk.
    pub fn disk(&self, disk: u16) -> Option<&Arc<DiskHistory>> {
        self.disks.get(usize::from(disk))?.as_ref()
    }

    /// All there are.
    pub fn all(&self) -> impl Iterator<Item = &Arc<DiskHistory>> {
        self.disks.iter().flatten()
    }

    /// Marks the changes of all disks from now on. Their backends must not have any other of FT's wrappers.
    pub fn wrap(&self, vm: &Vm) {
        let mut wraps = lock(&self.wraps);
        if !wraps.is_empty() {
            return;
        }
        for (disk, history) in vm.devices().disks().iter().zip(&self.disks) {
            let mut slot = None;
            if let Some(history) = history {
                disk.exchange(|inner| {
                    let (wrapper, s) = MarkedBlock::wrap(inner, history.clone());
                    slot = Some(s);
                    Box::new(wrapper)
                });
            }
            wraps.push(slot);
        }
    }

    fn unwrap(&self, vm: &Vm) {
        for (disk, slot) in vm.devices().disks().iter().zip(lock(&self.wraps).drain(..)) {
            if let Some(slot) = slot {
                disk.exchange(|wrapper| slot.take().unwrap_or(wrapper));
            }
        }
    }

    /// A session begins. The VM must stand still.
    pub fn begin(&self, session: &SessionId) {
        self.all().for_each(|history| history.begin(session));
    }

    /// A session is over, the VM goes on here. It must stand still.
    pub fn go_alone(&self) {
        self.all().for_each(|history| history.go_alone());
    }
}

/// Marks changes in a disk's history before they are started.
struct MarkedBlock {
    inner: Slot<dyn BlockBackend>,
    size: u64,
    event_fd: RawFd,
    history: Arc<DiskHistory>,
    started: HashMap<u64, (u64, u64)>,
}

impl MarkedBlock {
    fn wrap(inner: Box<dyn BlockBackend>, history: Arc<DiskHistory>) -> (Self, Slot<dyn BlockBackend>) {
        let (size, event_fd) = (inner.size(), inner.event_fd());
        let slot = Slot::new(inner);
        let wrapper = Self {
            inner: slot.clone(),
            size,
            event_fd,
            history,
            started: HashMap::new(),
        };
        (wrapper, slot)
    }
}

impl BlockBackend for MarkedBlock {
    fn size(&self) -> u64 {
        self.size
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        let range = changed_range(op, total(iovecs));
        if let Some((offset, len)) = range {
            self.history.mark(offset, len);
            self.started.insert(tag, (offset, len));
        }
        // SAFETY: the caller's promise about the iovecs is passed on unchanged.
        let started = self
            .inner
            .with(|inner| unsafe { inner.submit(tag, op, iovecs) })
            .and_then(|started| started);
        if started.is_err()
            && let Some((offset, len)) = self.started.remove(&tag)
        {
            self.history.mark_failed(offset, len);
        }
        started
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        let first = out.len();
        let _ = self.inner.with(|inner| inner.completions(out));
        for completion in &out[first..] {
            if let (Some((offset, len)), true) = (self.started.remove(&completion.tag), completion.result.is_err()) {
                self.history.mark_failed(offset, len);
            }
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        self.inner.with(|inner| inner.drain())?
    }

    fn event_fd(&self) -> RawFd {
        self.event_fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Marks must be there when a request starts; the first request fails at its completion, the second at its start.
    struct Checked {
        history: Arc<DiskHistory>,
        failed: Vec<u64>,
    }

    impl BlockBackend for Checked {
        fn size(&self) -> u64 {
            4 * ft::copies::BLOCK
        }

        // SAFETY: asks less than the trait does: the iovecs are not looked into.
        unsafe fn submit(&mut self, tag: u64, op: BlockOp, _iovecs: &[libc::iovec]) -> io::Result<()> {
            if let Some((offset, _)) = changed_range(op, 1) {
                assert!(self.history.is_changed(offset / ft::copies::BLOCK));
            }
            self.failed.push(tag);
            if tag == 2 {
                Err(io::ErrorKind::Other.into())
            } else {
                Ok(())
            }
        }

        fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
            out.extend(self.failed.drain(..).map(|tag| BlockCompletion {
                tag,
                result: if tag == 1 {
                    Err(io::ErrorKind::Other.into())
                } else {
                    Ok(0)
                },
            }));
        }

        fn drain(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn event_fd(&self) -> RawFd {
            -1
        }
    }

    #[test]
    fn r3_changes_are_marked_before_they_start_and_for_good_when_they_fail() {
        let block = ft::copies::BLOCK;
        let history = DiskHistory::new("vm", "_disk0", 4 * block, None).keeping(std::time::Duration::ZERO);
        let history = Arc::new(history);
        let session = SessionId {
            name: "primary-1".into(),
            generation: 0,
        };
        history.begin(&session);
        let inner = Checked {
            history: history.clone(),
            failed: Vec::new(),
        };
        let (mut disk, _slot) = MarkedBlock::wrap(Box::new(inner), history.clone());
        let zero = |at: u64| BlockOp::WriteZeroes {
            offset: at * block,
            len: 512,
            unmap: false,
        };
        for (tag, op) in [(1, zero(0)), (2, zero(1)), (3, zero(2)), (4, BlockOp::Flush)] {
            // SAFETY: there are no iovecs.
            let started = unsafe { disk.submit(tag, op, &[]) };
            assert_eq!(started.is_err(), tag == 2);
        }
        disk.completions(&mut Vec::new());
        assert!((0..3).all(|block| history.is_changed(block)) && !history.is_changed(3));
        (2..6).for_each(|epoch| history.confirm(epoch, epoch + 1));
        assert!(history.is_changed(0) && history.is_changed(1) && !history.is_changed(2));
    }

    #[test]
    fn r3_an_ordinary_boot_removes_what_is_said_of_its_images() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a", "a.ft", "b", "b.ft", "c"] {
            std::fs::write(at(name), name).unwrap();
        }
        let config: VmConfig = serde_json::from_value(serde_json::json!({
            "payload": {"kernel": "/k"},
            "disks": [{"path": at("a")}, {"path": at("b"), "readonly": true}, {"path": at("c")}],
        }))
        .unwrap();
        forget_copies(&config).unwrap();
        assert!(!at("a.ft").exists() && at("b.ft").exists() && at("a").exists());
        std::fs::create_dir(at("c.ft")).unwrap();
        let e = forget_copies(&config).unwrap_err();
        assert!(e.contains("c.ft") && e.contains("remove it first"), "{e}");
    }
}
