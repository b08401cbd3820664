//! The VM's shadow on the backup: [`ft::machine::ShadowHost`] and [`ft::machine::Shadow`].
//!
//! A shadow is a complete VM that was never started: RAM mapped, devices made, taps and disks open. Committed
//! checkpoints go straight into its RAM and disks; activation loads the last state and lets it run.

use std::sync::Arc;

use api::config::ImageType;
use api::{DiskConfig, VmConfig};
use ft::config::{FtImageType, FtReceiveConfig};
use ft::copies::{CopyClaim, SessionId, ShadowCopy};
use ft::machine::{
    DiskChange, DiskIdentity, Identity, Input, MachineError, Output, Protected, Refusal, Shadow, ShadowHost, Takeover,
};

use virtio_devices::block::DiskImage;

use super::backends::{ReplayNet, transmit_all};
use super::disks;
use super::histories::{Histories, Kept};
use super::protected::{ProtectedVm, identity, machine_error, no_disk};
use crate::state::VmState;
use crate::vm::{Holder, Vm, VmContext};

/// Called with the VM that a takeover made.
pub type Adopt = Arc<dyn Fn(Arc<Vm>) + Send + Sync>;

/// Builds shadows on this host.
pub struct VmShadowHost {
    /// What every VM of this VMM needs.
    pub context: VmContext,
    /// This host's paths and taps.
    pub overrides: FtReceiveConfig,
    /// Gets the VM at takeover.
    pub adopt: Adopt,
    /// Gets the histories of its disks.
    pub kept: Kept,
}

pub(super) fn refuse(code: &str, message: String) -> Refusal {
    Refusal {
        code: code.into(),
        message,
    }
}

fn prepare_disk(disk: &DiskConfig, offered: &DiskIdentity) -> Result<(), Refusal> {
    let Some(path) = disk.path.as_deref().filter(|path| !path.exists() && !offered.readonly) else {
        return Ok(());
    };
    crate::disks::create(disk, path, offered.size).map_err(|e| {
        let message = format!(
            "cannot make {} for disk {} on the backup: {e}",
            path.display(),
            offered.id
        );
        refuse("disk_create_failed", message)
    })
}

impl VmShadowHost {
    fn config(&self, offered: &Identity) -> Result<VmConfig, Refusal> {
        let mut config: VmConfig = serde_json::from_str(&offered.config).map_err(|e| {
            refuse(
                "config_not_understood",
                format!("the backup does not understand the VM's config: {e}"),
            )
        })?;
        for over in &self.overrides.disks {
            let disk = config
                .disks
                .iter_mut()
                .flatten()
                .find(|d| d.id.as_deref() == Some(over.id.as_str()));
            let disk = disk.ok_or_else(|| {
                refuse(
                    "no_such_disk",
                    format!("`ft receive --disk id={}`: the VM has no such disk", over.id),
                )
            })?;
            disk.path = Some(over.path.clone());
            if let Some(format) = over.image_type {
                disk.image_type = Some(match format {
                    FtImageType::Raw => ImageType::Raw,
                    FtImageType::Qcow2 => ImageType::Qcow2,
                });
                disk.backing_files &= format == FtImageType::Qcow2;
            }
        }
        for over in &self.overrides.net {
            let net = config
                .net
                .iter_mut()
                .flatten()
                .find(|n| n.id.as_deref() == Some(over.id.as_str()));
            let net = net.ok_or_else(|| {
                refuse(
                    "no_such_net",
                    format!("`ft receive --net id={}`: the VM has no such network device", over.id),
                )
            })?;
            net.tap = Some(over.tap.clone());
        }
        super::consoles::override_consoles(&mut config, &self.overrides)?;
        // The primary's own check is not ours to trust.
        config
            .validate()
            .map_err(|e| refuse("config_not_valid", e.to_string()))?;
        for (disk, offered) in config.disks.iter().flatten().zip(&offered.disks) {
            if offered.shared.is_none() {
                prepare_disk(disk, offered)?;
            }
        }
        Ok(config)
    }
}

impl ShadowHost for VmShadowHost {
    fn create_shadow(&self, offered: &Identity) -> Result<Box<dyn Shadow>, Refusal> {
        let config = self.config(offered)?;
        let failed =
            |e: &dyn std::fmt::Display| refuse("shadow_failed", format!("the backup cannot build the VM: {e}"));
        // Before the process is restricted to the files of the VM.
        let copies: Vec<Option<ShadowCopy>> = config
            .disks
            .iter()
            .flatten()
            .zip(&offered.disks)
            .map(|(disk, offered_disk)| {
                let raw = disk.image_type != Some(ImageType::Qcow2);
                let path = disk.path.as_ref().filter(|_| raw && offered_disk.is_replicated())?;
                let copy = ShadowCopy::open(path, &offered.vm_id, &offered_disk.id, offered_disk.size);
                Some(copy)
            })
            .collect();
        let shared = offered.disks.iter().filter(|disk| disk.shared.is_some());
        let shared: Vec<String> = shared.map(|disk| disk.id.clone()).collect();
        let vm = Vm::shadow(config, offered.vm_id.clone(), &self.context, &shared).map_err(|e| failed(&e))?;
        disks::find_marks(&vm, offered)?;
        let shared: Vec<_> = offered.disks.iter().map(|disk| disk.shared).collect();
        let mut identity = identity(&vm, &shared).map_err(|e| failed(&e))?;
        // Paths and taps differ by host; what counts is compared field by field.
        identity.config.clone_from(&offered.config);
        Ok(Box::new(VmShadow {
            vm,
            identity,
            copies,
            claimed: false,
            adopt: self.adopt.clone(),
            kept: self.kept.clone(),
        }))
    }
}

struct VmShadow {
    vm: Arc<Vm>,
    identity: Identity,
    /// What the disks are copies of; none for those that are not copied.
    copies: Vec<Option<ShadowCopy>>,
    /// The locks of shared disks were taken.
    claimed: bool,
    adopt: Adopt,
    kept: Kept,
}

/// Lets outputs of committed epochs leave, in order for each device.
fn send_held(vm: &Vm, outputs: Vec<Output>) {
    let devices = vm.devices();
    let mut frames: Vec<Vec<Vec<u8>>> = vec![Vec::new(); devices.nets().len()];
    let mut text: Vec<Vec<u8>> = vec![Vec::new(); devices.consoles().len()];
    for output in outputs {
        match output {
            Output::Frame { nic, data } => {
                if let Some(frames) = frames.get_mut(usize::from(nic)) {
                    frames.push(data.to_vec());
                }
            }
            Output::Console { console, data } => {
                if let Some(text) = text.get_mut(usize::from(console)) {
                    text.extend(data);
                }
            }
        }
    }
    for (net, frames) in devices
        .nets()
        .iter()
        .zip(frames)
        .filter(|(_, frames)| !frames.is_empty())
    {
        net.exchange(|mut inner| {
            transmit_all(inner.as_mut(), frames.iter().map(Vec::as_slice));
            inner
        });
    }
    for (console, text) in devices.consoles().iter().zip(text).filter(|(_, text)| !text.is_empty()) {
        console.exchange(|mut inner| {
            if let Err(e) = inner.write(&text) {
                log::warn!("ft: console output of the primary is lost: {e}");
            }
            inner
        });
    }
}

impl VmShadow {
    /// The disk's image, for a change or comparison of this range.
    fn image(&self, disk: u16, offset: u64, len: u64) -> Result<Arc<dyn DiskImage>, MachineError> {
        let index = usize::from(disk);
        let (Some(disk), Some(info)) = (self.vm.devices().disks().get(index), self.identity.disks.get(index)) else {
            return Err(no_disk(disk));
        };
        if info.readonly || offset.checked_add(len).is_none_or(|end| end > info.size) {
            let reason = if info.readonly { "is read-only" } else { "ends earlier" };
            return Err(machine_error(format!(
                "{}: {len} bytes at {offset}, but it {reason}",
                info.id
            )));
        }
        disk.image().map_err(machine_error)
    }
}

impl Shadow for VmShadow {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn claims(&mut self) -> Vec<CopyClaim> {
        let claim = |copy: &mut Option<ShadowCopy>| match copy {
            Some(copy) => copy.claim(),
            None => CopyClaim::Unknown("the disk is not copied".into()),
        };
        self.copies.iter_mut().map(claim).collect()
    }

    fn doubt(&mut self, disk: u16, offset: u64, len: u64) {
        if let Some(Some(copy)) = self.copies.get_mut(usize::from(disk)) {
            copy.doubt(offset, len);
        }
    }

    fn synced(&mut self, session: &SessionId) {
        self.copies.iter_mut().flatten().for_each(|copy| copy.synced(session));
    }

    fn write_memory(&mut self, gpa: u64, data: &[u8]) -> Result<(), MachineError> {
        self.vm.ram().write(gpa, data).map_err(machine_error)
    }

    fn read_memory(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        self.vm.ram().read(gpa, buf).map_err(machine_error)
    }

    fn read_disk(&self, disk: u16, offset: u64, buf: &mut [u8]) -> Result<(), MachineError> {
        let image = self.image(disk, offset, buf.len() as u64)?;
        image.read_at(offset, buf).map_err(machine_error)
    }

    fn apply_disk(&mut self, disk: u16, change: &DiskChange) -> Result<(), MachineError> {
        let (offset, len) = change.range();
        let image = self.image(disk, offset, len)?;
        let index = usize::from(disk);
        let shared = self.identity.disks.get(index).is_some_and(|d| d.shared.is_some());
        if shared && !self.claimed && !matches!(change, DiskChange::Check { .. }) {
            return Err(machine_error("a shared disk is the primary's until its lock is taken"));
        }
        if let (DiskChange::Write { .. } | DiskChange::Zero { .. }, Some(Some(copy))) =
            (change, self.copies.get_mut(index))
        {
            copy.before_write(offset, len);
        }
        disks::carry_out(image.as_ref(), change)
    }

    fn claim_disks(&mut self) -> Result<Option<String>, MachineError> {
        let who = disks::claim(&self.vm)?;
        self.claimed = who.is_none();
        Ok(who)
    }

    fn activate(self: Box<Self>, takeover: Takeover) -> Result<Arc<dyn Protected>, MachineError> {
        let state: VmState = postcard::from_bytes(&takeover.state).map_err(machine_error)?;
        let vm = self.vm;
        let elapsed = takeover.elapsed.as_nanos().min(u128::from(u64::MAX)) as u64;
        vm.set_state(&state, elapsed).map_err(machine_error)?;
        let mut frames: Vec<Vec<Vec<u8>>> = vec![Vec::new(); vm.devices().nets().len()];
        for Input::Frame { nic, data } in takeover.inputs {
            if let Some(frames) = frames.get_mut(usize::from(nic)) {
                frames.push(data.to_vec());
            }
        }
        for (net, frames) in vm.devices().nets().iter().zip(frames) {
            net.drop_queued();
            if !frames.is_empty() {
                net.exchange(|inner| Box::new(ReplayNet::new(inner, frames)));
            }
        }
        // All that can fail comes before the VM runs: after a failed activation the primary may go on (R4).
        let session = self.copies.iter().flatten().find_map(|copy| copy.session().cloned());
        let sidecars = self
            .copies
            .into_iter()
            .map(|copy| copy.and_then(ShadowCopy::into_sidecar));
        let histories = Arc::new(Histories::new(&vm, sidecars.collect(), &[]));
        let protected = ProtectedVm::new(vm.clone(), histories.clone(), &[]);
        if let Some(session) = session {
            histories.all().for_each(|history| history.took_over(&session));
            histories.wrap(&vm);
        }
        self.kept.put(&vm, histories);
        (self.adopt)(vm.clone());
        // Switches learn where the addresses are now before the first frame leaves; then comes what the primary may not
        // have sent; then the guest runs.
        vm.announce();
        send_held(&vm, takeover.outputs);
        // Paused by its owner there, it is paused here.
        if !state.paused {
            vm.resume(Holder::User).map_err(machine_error)?;
        }
        vm.announce_again();
        Ok(protected)
    }

    fn discard(mut self: Box<Self>, close_disks: bool) {
        self.vm.shutdown();
        if close_disks {
            self.copies.iter_mut().flatten().for_each(ShadowCopy::close);
        }
    }
}
