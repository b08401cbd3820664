//! A backup's side over plain byte arrays: builds shadows, keeps the VMs that takeovers made.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ft::copies::{CopyClaim, SessionId};
use ft::machine::*;
use ft::wire::lines::LINE;

use crate::fake::{FakeVm, lock};
use crate::image::ShadowImage;
use crate::san::{DISK, San};

/// Builds shadows; keeps the VMs that takeovers made.
pub struct FakeHost {
    /// What its shadows are; `None`: what is offered.
    pub identity: Mutex<Option<Identity>>,
    /// Its disk's content before.
    pub old_disk: Mutex<u8>,
    /// The image of its disk, which has that content then.
    pub image: Mutex<Option<std::path::PathBuf>>,
    shadow: Mutex<Option<Arc<FakeVm>>>,
    pub live: Mutex<Vec<Arc<FakeVm>>>,
    pub discarded: Mutex<u32>,
    pub fail_activation: Mutex<bool>,
    pub fail_apply: Arc<Mutex<bool>>,
    /// The disk's eighth byte is not what is written there.
    pub stuck_disk: Mutex<bool>,
    pub slow_apply: Arc<Mutex<Duration>>,
    /// The disk that the primary sees too.
    pub san: Mutex<Option<Arc<San>>>,
    /// Disks that were flushed.
    pub flushes: Mutex<Vec<u16>>,
}

impl FakeHost {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            identity: Mutex::default(),
            old_disk: Mutex::new(0xdd),
            image: Mutex::default(),
            shadow: Mutex::default(),
            live: Mutex::default(),
            discarded: Mutex::default(),
            fail_activation: Mutex::default(),
            fail_apply: Arc::default(),
            stuck_disk: Mutex::default(),
            slow_apply: Arc::default(),
            san: Mutex::default(),
            flushes: Mutex::default(),
        })
    }

    /// The shadow that was built last, for what happens to it behind FT's back.
    pub fn shadow(&self) -> Arc<FakeVm> {
        lock(&self.shadow).clone().unwrap()
    }

    pub fn live(&self) -> Option<Arc<FakeVm>> {
        lock(&self.live).last().cloned()
    }
}

/// For tests that own the host in an `Arc`.
pub struct HostRef(pub Arc<FakeHost>);

impl ShadowHost for HostRef {
    fn create_shadow(&self, offered: &Identity) -> Result<Box<dyn Shadow>, Refusal> {
        let identity = lock(&self.0.identity).clone().unwrap_or_else(|| offered.clone());
        let vm = FakeVm::new(identity);
        lock(&vm.contents).disks[0].fill(*lock(&self.0.old_disk));
        *lock(&vm.san) = lock(&self.0.san).clone();
        let open = |path: &std::path::PathBuf| {
            let bytes = &mut lock(&vm.contents).disks[0];
            ShadowImage::open(path, &vm.identity, bytes)
        };
        let image = lock(&self.0.image).as_ref().map(open);
        *lock(&self.0.shadow) = Some(vm.clone());
        Ok(Box::new(FakeShadow {
            image,
            vm,
            host: self.0.clone(),
        }))
    }
}

struct FakeShadow {
    image: Option<ShadowImage>,
    vm: Arc<FakeVm>,
    host: Arc<FakeHost>,
}

impl Shadow for FakeShadow {
    fn identity(&self) -> Identity {
        self.vm.identity.clone()
    }

    fn claims(&mut self) -> Vec<CopyClaim> {
        self.image.iter_mut().map(ShadowImage::claim).collect()
    }

    fn doubt(&mut self, _disk: u16, offset: u64, len: u64) {
        self.image.iter_mut().for_each(|image| image.doubt(offset, len));
    }

    fn synced(&mut self, session: &SessionId) {
        self.image.iter_mut().for_each(|image| image.synced(session));
    }

    fn write_memory(&mut self, gpa: u64, data: &[u8]) -> Result<(), MachineError> {
        assert!(data.len().is_multiple_of(LINE) && gpa.is_multiple_of(LINE as u64));
        let at = self.vm.offset(gpa, data.len())?;
        lock(&self.vm.contents).ram[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        self.vm.read_memory(gpa, buf)
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        self.vm.read_disk(disk, offset, buf)
    }

    fn apply_disk(&mut self, disk: u16, change: &DiskChange) -> Result<(), MachineError> {
        std::thread::sleep(*lock(&self.host.slow_apply));
        if *lock(&self.host.fail_apply) {
            return Err(MachineError("the backup's disk is full".into()));
        }
        if let (DISK, Some(san)) = (disk, self.vm.san()) {
            return san.carry_out(self.vm.number, change);
        }
        if let Some(image) = &mut self.image {
            image.change(change);
        }
        let mut contents = lock(&self.vm.contents);
        let bytes = &mut contents.disks[usize::from(disk)];
        match change {
            DiskChange::Write { offset, data } => bytes[*offset as usize..][..data.len()].copy_from_slice(data),
            DiskChange::Zero { offset, len, .. } => bytes[*offset as usize..][..*len as usize].fill(0),
            DiskChange::Flush => self.host.flushes.lock().unwrap().push(disk),
            DiskChange::Check { .. } => return Err(MachineError(format!("disk {disk} is not shared"))),
        }
        if *lock(&self.host.stuck_disk) {
            bytes[7] = 0xee;
        }
        Ok(())
    }

    fn claim_disks(&mut self) -> Result<Option<String>, MachineError> {
        Ok(self.vm.san().and_then(|san| san.claim(self.vm.number)))
    }

    fn activate(self: Box<Self>, takeover: Takeover) -> Result<Arc<dyn Protected>, MachineError> {
        if let Some(san) = self.vm.san() {
            lock(&self.vm.contents).disks[usize::from(DISK)] = san.bytes();
        }
        if *lock(&self.host.fail_activation) {
            self.vm.yield_disks();
            return Err(MachineError("no more vCPUs on this host".into()));
        }
        lock(&self.vm.contents).counter = u64::from_le_bytes(takeover.state[..].try_into().unwrap());
        *lock(&self.vm.wire) = takeover.outputs;
        *lock(&self.vm.replayed) = takeover.inputs;
        assert!(takeover.elapsed < Duration::from_secs(60));
        *lock(&self.vm.image) = self.image.map(|image| image.take_over(&self.vm.identity));
        lock(&self.host.live).push(self.vm.clone());
        Ok(self.vm)
    }

    fn discard(mut self: Box<Self>, close_disks: bool) {
        if let (Some(image), true) = (&mut self.image, close_disks) {
            image.close();
        }
        *lock(&self.host.discarded) += 1;
    }
}
