//! What a configuration gets at creation: device ids and MAC addresses that the user did not give.
//!
//! Filled in once, so that they stay the same over boots, snapshots and failovers.

use std::collections::BTreeSet;
use std::io;

use super::{ConsoleMode, MacAddr, VmConfig};

impl VmConfig {
    /// Fills in ids as Cloud Hypervisor does (`_disk0`, `_net1`: one counter, in the order of creation: disks, then
    /// networks) and random MAC addresses. Ids that the user gave are not used again.
    pub fn fill_in(&mut self) -> io::Result<()> {
        let mut taken: BTreeSet<String> = self.device_ids().map(str::to_string).collect();
        let mut counter = 0u32;
        let mut next = |prefix: &str| loop {
            let id = format!("{prefix}{counter}");
            counter += 1;
            if taken.insert(id.clone()) {
                return id;
            }
        };
        for disk in self.disks.iter_mut().flatten() {
            disk.id.get_or_insert_with(|| next("_disk"));
        }
        for net in self.net.iter_mut().flatten() {
            net.id.get_or_insert_with(|| next("_net"));
            if net.mac.is_none() {
                net.mac = Some(MacAddr::random()?);
            }
            if net.tap.as_deref() == Some("") {
                net.tap = None;
            }
        }
        self.rng.id.get_or_insert_with(|| "_rng".into());
        if self.console.mode != ConsoleMode::Off {
            self.console.id.get_or_insert_with(|| "_console".into());
        }
        Ok(())
    }

    /// The ids that the configuration holds, of all devices.
    pub(super) fn device_ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().flatten().map(|d| &d.id);
        let nets = self.net.iter().flatten().map(|n| &n.id);
        disks
            .chain(nets)
            .chain([&self.rng.id, &self.console.id])
            .flatten()
            .map(String::as_str)
    }
}
