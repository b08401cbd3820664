//! Snapshots and checkpoints: files of a snapshot's directory, and saved states as JSON and as postcard, loaded into fresh
//! devices, which then have to serve.

use std::io;
use std::sync::Arc;

use api::MemoryConfig;
use devices::bus::BusDevice;
use devices::interrupt::{InterruptLine, MsiSink};
use devices::ioapic::{Ioapic, IoapicRoutes};
use devices::{ged, rtc, serial};
use hypervisor::{ClockState, VcpuState};
use pci::root::PciRoot;
use vmm::memory::GuestRam;
use vmm::snapshot;
use vmm::state::{self, VmState};

use crate::bus::Bus;
use crate::driver::memory;
use crate::files::directory;
use crate::input::Input;
use crate::reach::reached;

const RAM: u64 = 2 << 20;

/// Interrupts and power requests end here.
struct Nowhere;

impl MsiSink for Nowhere {
    fn deliver(&self, _address: u64, _data: u32) -> io::Result<()> {
        Ok(())
    }
}

impl IoapicRoutes for Nowhere {
    fn pin_changed(&self, _pin: u8, _message: Option<(u64, u32)>) {}
}

impl ged::MachineSignals for Nowhere {
    fn shutdown(&self) {}
    fn reset(&self) {}
}

/// A machine without vCPUs.
struct Machine {
    ioapic: Arc<Ioapic>,
    serial: Arc<serial::Serial>,
    rtc: rtc::Rtc,
    ged: Arc<ged::Ged>,
    bus: Bus,
}

impl Machine {
    fn new() -> Self {
        let ioapic = Ioapic::new(Arc::new(Nowhere), Arc::new(Nowhere));
        let line = |pin| -> Arc<dyn InterruptLine> { ioapic.line(pin) };
        Self {
            serial: serial::Serial::new(line(4), Box::new(io::sink())),
            rtc: rtc::Rtc::default(),
            ged: ged::Ged::new(line(9), Arc::new(Nowhere)),
            bus: Bus::new(memory()),
            ioapic,
        }
    }

    fn root(&self) -> &PciRoot {
        &self.bus.root
    }

    /// As `DeviceManager::save`.
    fn state(&self) -> VmState {
        let vcpu = VcpuState {
            version: 1,
            cpuid: vec![Default::default(); 2],
            regs: Default::default(),
            sregs: Default::default(),
            xcrs: Default::default(),
            xsave: vec![0; 16],
            msrs: vec![Default::default(); 2],
            lapic: Default::default(),
            events: Default::default(),
            debugregs: Default::default(),
            mp_state: Default::default(),
            tsc: 1,
            host_tsc: 1,
            tsc_khz: 1,
        };
        VmState {
            version: state::VERSION,
            vcpus: vec![vcpu],
            clock: ClockState {
                data: Default::default(),
            },
            ioapic: self.ioapic.state(),
            serial: self.serial.state(),
            rtc: self.rtc.state(),
            ged: self.ged.state(),
            pci: self.root().state(),
            virtio: self.bus.states(),
            request: None,
            paused: false,
        }
    }

    /// As `DeviceManager::load`, but it goes on after an error, so that more is tried.
    fn load(&self, state: &VmState) -> bool {
        let loaded = [
            self.bus.load(&state.virtio),
            self.ioapic.set_state(&state.ioapic).is_ok(),
            self.serial.set_state(&state.serial).is_ok(),
            self.rtc.set_state(&state.rtc).is_ok(),
            self.ged.set_state(&state.ged).is_ok(),
            self.root().set_state(&state.pci).is_ok(),
        ];
        loaded.iter().all(|ok| *ok)
    }

    /// What a guest that goes on from there may do.
    fn go_on(&self) {
        let ports: [&dyn BusDevice; 4] = [self.ioapic.as_ref(), self.serial.as_ref(), &self.rtc, self.ged.as_ref()];
        for device in ports {
            for offset in (0..8).chain([0x10, 0x40]) {
                device.read(offset, &mut [0; 4]);
                device.write(offset, &[offset as u8, 1, 2, 3]);
            }
        }
        for pin in 0..24 {
            self.ioapic.set_level(pin, true);
            self.ioapic.end_of_interrupt(pin);
        }
        let _ = self.serial.enqueue_input(b"input");
        self.ged.power_button();
        self.bus.go_on();
    }
}

fn try_state(state: &VmState) {
    reached("state read");
    let machine = Machine::new();
    if machine.load(state) {
        reached("state loaded whole");
    }
    machine.go_on();
    // Both encodings carry the same.
    let bytes = postcard::to_stdvec(state).expect("a state that can be written");
    postcard::from_bytes::<VmState>(&bytes).expect("a state that can be read");
}

fn files(input: &mut Input<'_>) {
    let dir = directory();
    let write = |name: &str, data: &[u8]| std::fs::write(dir.join(name), data).expect("a file");
    let (kind, config, memory) = (input.u8(), input.u16().into(), input.u16().into());
    write("config.json", input.bytes(config));
    write("memory-ranges", input.bytes(memory));
    if kind & 1 == 0 {
        let file = std::fs::File::options()
            .write(true)
            .open(dir.join("memory-ranges"))
            .expect("a file");
        file.set_len(RAM).expect("a file of that length");
    }
    write("state.json", input.rest());
    if let Ok((config, state)) = snapshot::load(dir) {
        reached("snapshot read");
        if config.validate().is_ok() {
            try_state(&state);
        }
    }
    if kind & 2 == 0 {
        let ram = GuestRam::new(&MemoryConfig {
            size: RAM,
            ..Default::default()
        })
        .expect("RAM");
        match snapshot::load_memory(dir, &ram) {
            Ok(()) => {
                reached("memory loaded");
                assert_eq!(ram.size(), RAM);
            }
            Err(_) => assert!(kind & 1 != 0, "memory of the right size is refused"),
        }
    }
}

/// The target. The first byte chooses: files, JSON, postcard.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => files(&mut input),
        1 => {
            if let Ok(state) = serde_json::from_slice::<VmState>(input.rest()) {
                try_state(&state);
            }
        }
        _ => {
            if let Ok(state) = postcard::from_bytes::<VmState>(input.rest()) {
                try_state(&state);
            }
        }
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let machine = Machine::new();
    let fresh = machine.state();
    machine.bus.bring_up();
    let live = machine.state();
    let mut seeds = Vec::new();
    for state in [fresh, live] {
        let json = serde_json::to_vec(&state).expect("a state that can be written");
        let config = crate::api_requests::CONFIG.as_bytes();
        let mut head = vec![0, 0];
        head.extend((config.len() as u16).to_le_bytes());
        head.extend([4, 0]);
        seeds.push([&head[..], config, b"RAM!", &json].concat());
        seeds.push([&[1][..], &json].concat());
        seeds.push(
            [
                &[2][..],
                &postcard::to_stdvec(&state).expect("a state that can be written"),
            ]
            .concat(),
        );
    }
    seeds
}
