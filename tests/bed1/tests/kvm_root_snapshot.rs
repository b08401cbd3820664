//! Snapshot, and restore in another process: connections go on. Needs /dev/kvm and root.

use std::fs::OpenOptions;

use anyhow::{Result, ensure};
use bed1::loads::{self, Loads};
use bed1::pair::{Bed, Options, Side};

#[test]
fn kvm_root_connections_live_through_snapshot_and_restore_in_another_process() -> Result<()> {
    for (vcpus, image_type) in [(1, "raw"), (2, "raw"), (2, "qcow2")] {
        let mut bed = Bed::new(Options {
            vcpus,
            image_types: [image_type; 2],
            ..Options::default()
        })?;
        let mut host = bed.boot(Side::A)?;
        let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(7))?;
        for round in 0..2 {
            let url = format!("file://{}", bed.dir.join(format!("snapshot{round}")).display());
            host.vmm.remote(&["pause"])?;
            host.vmm.remote(&["snapshot", &url])?;
            host.vmm.kill()?;
            host = bed.start(Side::A, &[])?;
            host.vmm.remote(&["restore", &format!("source_url={url}")])?;
            ensure!(host.vmm.vm_state()? == "Paused", "a restored VM waits for resume");
            host.vmm.remote(&["resume"])?;
            loads.wait_progress(20)?;
        }
        loads.verify(&host.disk)?;
        loads.stop()?;
    }
    Ok(())
}

#[test]
fn kvm_root_damaged_snapshots_are_refused_by_name() -> Result<()> {
    let mut bed = Bed::new(Options {
        vcpus: 1,
        ..Options::default()
    })?;
    let host = bed.boot(Side::A)?;
    let dir = bed.dir.join("snapshot");
    let url = format!("file://{}", dir.display());
    let refused = host.vmm.remote(&["snapshot", &url]);
    ensure!(refused.is_err(), "a running VM was snapshotted");
    host.vmm.remote(&["pause"])?;
    host.vmm.remote(&["snapshot", &url])?;
    drop(host);
    for (file, cut, named) in [
        ("memory-ranges", 4096, "memory"),
        ("state.json", 100, "state.json"),
        ("config.json", 10, "config.json"),
    ] {
        let (path, spare) = (dir.join(file), dir.join("spare"));
        std::fs::copy(&path, &spare)?;
        let open = OpenOptions::new().write(true).open(&path)?;
        open.set_len(open.metadata()?.len() - cut)?;
        let mut host = bed.start(Side::A, &[])?;
        let error = host.vmm.remote(&["restore", &format!("source_url={url}")]).err();
        let error = error.map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains(named), "{file} was cut, and restore says: {error:?}");
        ensure!(!host.vmm.ended()?, "the VMM ended at a damaged snapshot");
        std::fs::rename(&spare, &path)?;
        host.vmm.remote(&["restore", &format!("source_url={url}")])?;
        host.vmm.remote(&["resume"])?;
    }
    Ok(())
}
