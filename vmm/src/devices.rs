//! All devices of a machine, on their buses.
//!
//! I/O ports: COM1, RTC, power registers, the 8042's reset line, PCI configuration. MMIO: IOAPIC, ECAM, the windows of
//! the BARs. virtio devices are PCI functions, in the order disks, networks, entropy source, console; their BARs lie in
//! the 64-bit window from the start, as firmware would place them.
//!
//! Everything is fixed once it is built. Lock order: the gate for outside events, then any one device's lock; no two
//! devices' locks are held together.

use std::collections::BTreeMap;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use api::{ConsoleConfig, DeviceNode, DeviceTree, DiskConfig, NetConfig, VmConfig, VmCounters};
use arch::layout;
use devices::bus::{self, Bus};
use devices::gate::Gate;
use devices::ged::{self, Ged, GedState, I8042};
use devices::ioapic::{self, Ioapic, IoapicState};
use devices::rtc::{self, Rtc, RtcState};
use devices::serial::{self, Serial, SerialState};
use pci::PciDevice;
use pci::root::{self, Ecam, PciRoot, Ports, RootState, Window};
use thiserror::Error;
use virtio_devices::backend::ConsoleBackend;
use virtio_devices::block::{self, BlockCounters, BlockOptions, DiskImage};
use virtio_devices::net::tap::{Tap, TapOptions};
use virtio_devices::net::{NetCounters, NetOptions};
use virtio_devices::{BAR_SIZE, Block, Console, Handle, Net, PciResources, Rng, VirtioState, vectors_for};

pub use devices::ged::MachineSignals;

use crate::console::{HostConsole, SerialInput, SerialOutput, SharedConsole};
use crate::interrupts::{Notifier, Router, lock};
use crate::memory::GuestRam;
use crate::state::VmState;

/// Errors of building devices or loading their state.
#[derive(Debug, Error)]
pub enum Error {
    /// A device on this host's side.
    #[error("device {id}: {source}")]
    Device {
        /// Device id.
        id: String,
        /// Why not.
        source: virtio_devices::Error,
    },
    /// A console's file or terminal.
    #[error("{what}: {source}")]
    Console {
        /// `serial` or `console`.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// No interrupt vectors or threads.
    #[error("device {id}: {source}")]
    Io {
        /// Device id.
        id: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A disk image of a format that is not offered, or not said.
    #[error(transparent)]
    Image(#[from] crate::disks::Error),
    /// Too many devices.
    #[error("{0} devices: a PCI bus has room for {max}", max = root::MAX_DEVICES - 1)]
    TooMany(usize),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// A saved state that does not fit this machine.
    #[error("saved state: {0}")]
    State(String),
}

fn state_error(e: impl std::fmt::Display) -> Error {
    Error::State(e.to_string())
}

/// A disk and what FT and the API want to know of it.
pub struct Disk {
    /// Device id.
    pub id: String,
    /// Path of the image.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// The guest cannot write it.
    pub readonly: bool,
    /// Another host sees the same file or device, and may become the one that writes it.
    shared: AtomicBool,
    /// Until the disk is closed.
    image: Mutex<Option<Arc<dyn DiskImage>>>,
    handle: Handle<Block>,
    counters: Arc<BlockCounters>,
}

impl Disk {
    /// Another host sees the same disk. Once so, always so.
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::SeqCst)
    }

    /// See [`Disk::is_shared`].
    pub fn set_shared(&self) {
        self.shared.store(true, Ordering::SeqCst);
    }

    /// The image, which the device has open too. It is closed, and its lock given back, when the device is shut down
    /// and nobody else keeps it.
    pub fn image(&self) -> io::Result<Arc<dyn DiskImage>> {
        let image = lock(&self.image).clone();
        image.ok_or_else(|| io::Error::other(format!("disk {} is closed", self.id)))
    }
}

impl Deref for Disk {
    type Target = Handle<Block>;

    fn deref(&self) -> &Handle<Block> {
        &self.handle
    }
}

/// A network device.
pub struct Nic {
    handle: Handle<Net>,
    counters: Arc<NetCounters>,
}

impl Deref for Nic {
    type Target = Handle<Net>;

    fn deref(&self) -> &Handle<Net> {
        &self.handle
    }
}

/// A console whose backend can be exchanged.
pub enum ConsoleDevice {
    /// COM1.
    Serial(SharedConsole),
    /// The virtio console.
    Virtio(Handle<Console>),
}

impl ConsoleDevice {
    /// Puts the backend that `f` makes of the present one in its place.
    pub fn exchange(&self, f: impl FnOnce(Box<dyn ConsoleBackend>) -> Box<dyn ConsoleBackend>) {
        match self {
            Self::Serial(console) => {
                let mut console = lock(console);
                let inner = std::mem::replace(&mut *console, Box::new(HostConsole::null()));
                *console = f(inner);
            }
            Self::Virtio(handle) => handle.exchange(f),
        }
    }
}

struct PowerOn {
    serial: SerialState,
    rtc: RtcState,
    ged: GedState,
    ioapic: IoapicState,
    pci: RootState,
}

/// All devices of one VM.
pub struct DeviceManager {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    ioapic: Arc<Ioapic>,
    serial: Arc<Serial>,
    rtc: Arc<Rtc>,
    ged: Arc<Ged>,
    root: Arc<PciRoot>,
    disks: Vec<Disk>,
    nets: Vec<Nic>,
    rng: Handle<Rng>,
    consoles: Vec<ConsoleDevice>,
    gate: Arc<Gate>,
    input: Mutex<Option<SerialInput>>,
    power_on: PowerOn,
}

/// Hands out what a PCI function needs.
struct Slots<'a> {
    next_bar: u64,
    router: &'a Arc<Router>,
    kvm: &'a Arc<dyn hypervisor::Vm>,
}

impl Slots<'_> {
    fn take(&mut self, id: &str, queues: usize) -> Result<PciResources, Error> {
        let vectors = self.router.vectors(vectors_for(queues));
        let vectors = vectors.map_err(|source| Error::Io { id: id.into(), source })?;
        let bar = self.next_bar;
        self.next_bar += BAR_SIZE;
        Ok(PciResources {
            bar,
            vectors,
            registrar: Arc::new(Notifier(self.kvm.clone())),
        })
    }
}

fn open_disk(config: &DiskConfig, ram: &GuestRam, slots: &mut Slots<'_>, shared: &[String]) -> Result<Disk, Error> {
    let id = config.id.clone().unwrap_or_default();
    let shared = shared.contains(&id);
    let failed = |source| Error::Device { id: id.clone(), source };
    let path = config.path.clone().unwrap_or_default();
    let image = block::open(&block::DiskOptions {
        shared,
        ..crate::disks::options(config)?
    })
    .map_err(failed)?;
    let backend = image.clone().backend(config.queue_size, config.disable_io_uring);
    let options = BlockOptions {
        readonly: config.readonly,
        serial: config.serial.clone().unwrap_or_else(|| id.clone()),
        queue_size: config.queue_size,
        block_size: image.block_size(),
    };
    let block = Block::new(options, backend.map_err(failed)?);
    let (size, counters) = (image.size(), block.counters());
    let resources = slots.take(&id, block::QUEUES)?;
    let handle = Handle::new(id.clone(), ram.memory().clone(), block, resources).map_err(failed)?;
    Ok(Disk {
        id,
        path,
        size,
        readonly: config.readonly,
        shared: AtomicBool::new(shared),
        image: Mutex::new(Some(image)),
        handle,
        counters,
    })
}

fn open_net(config: &NetConfig, ram: &GuestRam, slots: &mut Slots<'_>) -> Result<Nic, Error> {
    let id = config.id.clone().unwrap_or_default();
    let failed = |source| Error::Device { id: id.clone(), source };
    let tap = Tap::open(&TapOptions {
        name: config.tap.clone(),
        ip: config.ip,
        mask: config.mask,
        host_mac: config.host_mac.map(|m| m.bytes()),
        mtu: config.mtu,
    })
    .map_err(failed)?;
    let options = NetOptions {
        mac: config.mac.map(|m| m.bytes()).unwrap_or_default(),
        mtu: config.mtu,
        queue_size: config.queue_size,
        checksum_offload: config.offload_csum,
        segmentation_offload: config.offload_tso,
    };
    let net = Net::new(options, Box::new(tap));
    let counters = net.counters();
    let resources = slots.take(&id, virtio_devices::net::QUEUES)?;
    let handle = Handle::new(id.clone(), ram.memory().clone(), net, resources).map_err(failed)?;
    Ok(Nic { handle, counters })
}

fn open_console(config: &ConsoleConfig, what: &'static str) -> Result<Option<HostConsole>, Error> {
    HostConsole::open(config).map_err(|source| Error::Console { what, source })
}

impl DeviceManager {
    /// Builds all devices of `config`; they are held still until [`DeviceManager::resume`]. `shared_disks`: ids of disks
    /// that another host writes for the time being.
    pub fn new(
        config: &VmConfig,
        ram: &GuestRam,
        kvm: &Arc<dyn hypervisor::Vm>,
        router: &Arc<Router>,
        signals: Arc<dyn MachineSignals>,
        shared_disks: &[String],
    ) -> Result<Self, Error> {
        let ioapic = Ioapic::new(router.clone(), router.clone());
        let (window64, window64_len) = layout::pci64_window(ram.size());
        let mut slots = Slots {
            next_bar: window64,
            router,
            kvm,
        };

        let backend = open_console(&config.serial, "serial")?.unwrap_or_else(HostConsole::null);
        let shared: SharedConsole = Arc::new(Mutex::new(Box::new(backend)));
        let serial = Serial::new(ioapic.line(serial::IRQ), Box::new(SerialOutput(shared.clone())));
        let mut consoles = vec![ConsoleDevice::Serial(shared.clone())];

        let disks = config.disks.iter().flatten();
        let disks: Vec<Disk> = disks
            .map(|d| open_disk(d, ram, &mut slots, shared_disks))
            .collect::<Result<_, _>>()?;
        let nets = config.net.iter().flatten();
        let nets: Vec<Nic> = nets.map(|n| open_net(n, ram, &mut slots)).collect::<Result<_, _>>()?;

        let id = config.rng.id.clone().unwrap_or_else(|| "_rng".into());
        let failed = |source| Error::Device { id: id.clone(), source };
        let model = Rng::new(&config.rng.src).map_err(failed)?;
        let resources = slots.take(&id, virtio_devices::rng::QUEUES)?;
        let rng = Handle::new(id.clone(), ram.memory().clone(), model, resources).map_err(failed)?;

        if let Some(backend) = open_console(&config.console, "console")? {
            let id = config.console.id.clone().unwrap_or_else(|| "_console".into());
            let failed = |source| Error::Device { id: id.clone(), source };
            let resources = slots.take(&id, virtio_devices::console::QUEUES)?;
            let model = Console::new(Box::new(backend));
            let handle = Handle::new(id.clone(), ram.memory().clone(), model, resources).map_err(failed)?;
            consoles.push(ConsoleDevice::Virtio(handle));
        }

        let mut functions: Vec<Arc<dyn PciDevice>> = Vec::new();
        functions.extend(disks.iter().map(|d| d.pci()));
        functions.extend(nets.iter().map(|n| n.pci()));
        functions.push(rng.pci());
        functions.extend(consoles.iter().filter_map(|c| match c {
            ConsoleDevice::Virtio(handle) => Some(handle.pci()),
            ConsoleDevice::Serial(_) => None,
        }));
        if functions.len() >= root::MAX_DEVICES {
            return Err(Error::TooMany(functions.len()));
        }
        let root = PciRoot::new(functions);

        let (rtc, ged) = (
            Arc::new(Rtc::default()),
            Ged::new(ioapic.line(ged::IRQ), signals.clone()),
        );
        let mut pio = Bus::new();
        pio.insert(serial::PORT, serial::PORTS, serial.clone())?;
        pio.insert(rtc::PORT, rtc::PORTS, rtc.clone())?;
        pio.insert(ged::PORT, ged::PORTS, ged.clone())?;
        pio.insert(ged::I8042_PORT, 1, Arc::new(I8042(signals)))?;
        pio.insert(root::PORT, root::PORTS, Arc::new(Ports(root.clone())))?;
        let mut mmio = Bus::new();
        mmio.insert(ioapic::ADDRESS, ioapic::SIZE, ioapic.clone())?;
        mmio.insert(layout::ECAM_START, layout::ECAM_SIZE, Arc::new(Ecam(root.clone())))?;
        for (base, len) in [(layout::PCI32_START, layout::PCI32_SIZE), (window64, window64_len)] {
            let root = root.clone();
            mmio.insert(base, len, Arc::new(Window { root, base }))?;
        }

        let gate = Arc::new(Gate::default());
        let input = SerialInput::start(&shared, serial.clone(), gate.clone());
        let input = input.map_err(|source| Error::Console { what: "serial", source })?;
        let power_on = PowerOn {
            serial: serial.state(),
            rtc: rtc.state(),
            ged: ged.state(),
            ioapic: ioapic.state(),
            pci: root.state(),
        };
        let this = Self {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            ioapic,
            serial,
            rtc,
            ged,
            root,
            disks,
            nets,
            rng,
            consoles,
            gate,
            input: Mutex::new(input),
            power_on,
        };
        this.pause();
        Ok(this)
    }

    /// I/O ports.
    pub fn pio(&self) -> &Arc<Bus> {
        &self.pio
    }

    /// Memory-mapped devices.
    pub fn mmio(&self) -> &Arc<Bus> {
        &self.mmio
    }

    /// Interrupt controller.
    pub fn ioapic(&self) -> &Arc<Ioapic> {
        &self.ioapic
    }

    /// Disks, in order.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Network devices, in order.
    pub fn nets(&self) -> &[Nic] {
        &self.nets
    }

    /// 0: COM1; 1: the virtio console, when there is one.
    pub fn consoles(&self) -> &[ConsoleDevice] {
        &self.consoles
    }

    /// Calls `f` for every virtio device, in PCI order.
    fn each(&self, mut f: impl FnMut(&dyn AnyDevice)) {
        self.disks.iter().for_each(|d| f(&d.handle));
        self.nets.iter().for_each(|n| f(&n.handle));
        f(&self.rng);
        for console in &self.consoles {
            if let ConsoleDevice::Virtio(handle) = console {
                f(handle);
            }
        }
    }

    /// Holds all devices still: no outside event comes in, every request is complete. Once, until `resume`.
    pub fn pause(&self) {
        self.gate.close();
        self.each(|d| d.pause());
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.each(|d| d.resume());
        self.gate.open();
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.gate.pass(|| self.ged.power_button());
    }

    /// All devices as at power-on; only while they are held still.
    pub fn reset(&self) -> Result<(), Error> {
        let mut result = Ok(());
        self.each(|d| {
            if let Err(source) = d.reset() {
                result = Err(Error::Device {
                    id: d.id().into(),
                    source,
                });
            }
        });
        result?;
        let power_on = &self.power_on;
        self.serial.set_state(&power_on.serial).map_err(state_error)?;
        self.rtc.set_state(&power_on.rtc).map_err(state_error)?;
        self.ged.set_state(&power_on.ged).map_err(state_error)?;
        self.ioapic.set_state(&power_on.ioapic).map_err(state_error)?;
        self.root.set_state(&power_on.pci).map_err(state_error)
    }

    /// Adds the devices' part to a saved state; only while they are held still.
    pub fn save(&self, vcpus: Vec<hypervisor::VcpuState>, clock: hypervisor::ClockState) -> VmState {
        let mut virtio = Vec::new();
        self.each(|d| virtio.push((d.id().to_string(), d.state())));
        VmState {
            version: crate::state::VERSION,
            vcpus,
            clock,
            ioapic: self.ioapic.state(),
            serial: self.serial.state(),
            rtc: self.rtc.state(),
            ged: self.ged.state(),
            pci: self.root.state(),
            virtio,
            request: None,
            paused: false,
        }
    }

    /// Loads the devices' part of a saved state; only while they are held still.
    pub fn load(&self, state: &VmState) -> Result<(), Error> {
        let mut saved = state.virtio.iter();
        let mut result = Ok(());
        self.each(|d| {
            if result.is_err() {
                return;
            }
            result = match saved.next() {
                Some((id, saved)) if id == d.id() => {
                    let id = id.clone();
                    d.set_state(saved).map_err(|source| Error::Device { id, source })
                }
                Some((id, _)) => Err(Error::State(format!("device {id} where this VM has {}", d.id()))),
                None => Err(Error::State(format!("no device {}", d.id()))),
            };
        });
        result?;
        if let Some((id, _)) = saved.next() {
            return Err(Error::State(format!("this VM has no device {id}")));
        }
        self.ioapic.set_state(&state.ioapic).map_err(state_error)?;
        self.serial.set_state(&state.serial).map_err(state_error)?;
        self.rtc.set_state(&state.rtc).map_err(state_error)?;
        self.ged.set_state(&state.ged).map_err(state_error)?;
        self.root.set_state(&state.pci).map_err(state_error)
    }

    /// Serves all queues once and raises all interrupts, as soon as the devices go on: what was on its way when a
    /// state was taken is not part of it. After `load`, when the vCPUs have their states.
    pub fn kick(&self) {
        self.each(|d| d.kick());
    }

    /// The devices, for `vm.info`.
    pub fn tree(&self) -> DeviceTree {
        let mut tree = BTreeMap::new();
        let mut slot = 0;
        self.each(|d| {
            slot += 1;
            let node = DeviceNode {
                id: d.id().into(),
                pci_bdf: Some(format!("0000:00:{slot:02x}.0")),
                ..Default::default()
            };
            tree.insert(node.id.clone(), node);
        });
        let serial = DeviceNode {
            id: "__serial".into(),
            ..Default::default()
        };
        tree.insert(serial.id.clone(), serial);
        tree
    }

    /// Figures of disks and networks.
    pub fn counters(&self) -> VmCounters {
        let disks = self.disks.iter().map(|d| (d.id.clone(), d.counters.values()));
        let nets = self
            .nets
            .iter()
            .map(|n| (n.handle.id().to_string(), n.counters.values()));
        disks.chain(nets).collect()
    }

    /// Makes everything that the guest wrote durable, and image files whole for whoever copies them; only while the
    /// devices are held still.
    pub fn flush_disks(&self) -> Result<(), Error> {
        for disk in self.disks.iter().filter(|disk| !disk.readonly) {
            let flushed = disk.image().and_then(|image| image.flush());
            let id = disk.id.clone();
            flushed.map_err(|source| Error::Io { id, source })?;
        }
        Ok(())
    }

    /// Ends all device threads and closes all backends. Idempotent. Not from a vCPU's thread.
    pub fn shutdown(&self) {
        self.gate.open();
        drop(lock(&self.input).take());
        self.each(|d| d.shutdown());
        self.disks.iter().for_each(|d| *lock(&d.image) = None);
    }
}

/// A virtio device of any type.
trait AnyDevice {
    fn id(&self) -> &str;
    fn pause(&self);
    fn resume(&self);
    fn kick(&self);
    fn reset(&self) -> Result<(), virtio_devices::Error>;
    fn state(&self) -> VirtioState;
    fn set_state(&self, state: &VirtioState) -> Result<(), virtio_devices::Error>;
    fn shutdown(&self);
}

impl<M: virtio_devices::model::Model> AnyDevice for Handle<M> {
    fn id(&self) -> &str {
        Handle::id(self)
    }

    fn pause(&self) {
        Handle::pause(self);
    }

    fn resume(&self) {
        Handle::resume(self);
    }

    fn kick(&self) {
        Handle::kick(self);
    }

    fn reset(&self) -> Result<(), virtio_devices::Error> {
        Handle::reset(self)
    }

    fn state(&self) -> VirtioState {
        Handle::state(self)
    }

    fn set_state(&self, state: &VirtioState) -> Result<(), virtio_devices::Error> {
        Handle::set_state(self, state)
    }

    fn shutdown(&self) {
        Handle::shutdown(self);
    }
}
