//! The PCI bus with one virtio device of each kind: configuration space by ECAM and ports, BARs that the guest moves, the
//! transport's registers. The target is called `pci`.

use std::path::Path;
use std::sync::Arc;

use devices::bus::BusDevice;
use pci::root::{ECAM_SIZE, Ecam, PciRoot, Ports, RootState, Window};
use virtio_devices::{BAR_SIZE, Block, Console, GuestMemory, Net, Rng, VirtioState};

use crate::driver::{BAR, BUFFERS, Driver, Machine, memory};
use crate::input::Input;
use crate::reach::reached;

/// The bus and its devices.
pub struct Bus {
    /// The root complex.
    pub root: Arc<PciRoot>,
    net: Driver<Net>,
    block: Driver<Block>,
    console: Driver<Console>,
    rng: Driver<Rng>,
}

/// Does the same with each device.
macro_rules! each {
    ($bus:expr, $device:ident => $body:expr) => {{
        let $device = &$bus.net;
        $body;
        let $device = &$bus.block;
        $body;
        let $device = &$bus.console;
        $body;
        let $device = &$bus.rng;
        $body;
    }};
}

impl Bus {
    /// A bus at power-on.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let machine = Arc::new(Machine::default());
        let (net, _) = crate::net::device(&memory, 1);
        let (block, _, _) = crate::block::device(&memory, false);
        let (console, _) = crate::console::device();
        let rng = Rng::new(Path::new("/dev/urandom")).expect("random numbers");
        let net = Driver::on(net, memory.clone(), "_net0", BAR, &machine);
        let block = Driver::on(block, memory.clone(), "_disk0", BAR + BAR_SIZE, &machine);
        let console = Driver::on(console, memory.clone(), "__console", BAR + 2 * BAR_SIZE, &machine);
        let rng = Driver::on(rng, memory, "__rng", BAR + 3 * BAR_SIZE, &machine);
        let functions = vec![
            net.handle.pci(),
            block.handle.pci(),
            console.handle.pci(),
            rng.handle.pci(),
        ];
        Self {
            root: PciRoot::new(functions),
            net,
            block,
            console,
            rng,
        }
    }

    /// Drivers for all devices.
    pub fn bring_up(&self) {
        each!(self, device => device.start(1 << 29));
    }

    /// The states of all devices by id.
    pub fn states(&self) -> Vec<(String, VirtioState)> {
        let mut states = Vec::new();
        each!(self, device => {
            device.handle.pause();
            states.push((device.handle.id().to_string(), device.handle.state()));
            device.handle.resume();
        });
        states
    }

    /// Loads states; whether all were taken.
    pub fn load(&self, states: &[(String, VirtioState)]) -> bool {
        let mut states = states.iter();
        let mut whole = true;
        each!(self, device => {
            device.handle.pause();
            whole &= match states.next() {
                Some((id, state)) => id == device.handle.id() && device.handle.set_state(state).is_ok(),
                None => false,
            };
            device.handle.resume();
        });
        whole
    }

    /// Serves what there is to do, as after a state was loaded.
    pub fn go_on(&self) {
        each!(self, device => {
            device.handle.kick();
            device.handle.serve();
        });
    }

    fn serve(&self) {
        each!(self, device => device.handle.serve());
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = memory();
    let mut bus = Bus::new(memory);
    let (ecam, ports) = (Ecam(bus.root.clone()), Ports(bus.root.clone()));
    let window = Window {
        root: bus.root.clone(),
        base: 0,
    };
    if input.u8() & 1 == 0 {
        bus.bring_up();
    }
    while !input.is_empty() {
        let step = input.u8();
        let (len, value) = ([1usize, 2, 4, 8][usize::from(step >> 6)], input.array::<8>());
        match step % 12 {
            0..=2 => {
                let function = u64::from(input.u8() % 5) << 15;
                let offset = function | u64::from(input.u16() & 0xfff);
                ecam.write(offset, &value[..len]);
                ecam.read(offset, &mut [0; 8][..len]);
            }
            3 => {
                let offset = u64::from(input.u32()) % ECAM_SIZE;
                ecam.write(offset, &value[..len.min(4)]);
                ecam.read(offset, &mut [0; 8]);
            }
            4 => {
                ports.write(0, &(0x8000_0000 | u32::from(input.u16())).to_le_bytes());
                let offset = 4 + u64::from(input.u8() & 3);
                ports.write(offset, &value[..len.min(4)]);
                ports.read(offset, &mut [0; 4]);
                ports.read(0, &mut [0; 4]);
            }
            5 => ports.write(u64::from(input.u8() & 7), &value[..len.min(4)]),
            6 | 7 => {
                let at = BAR + u64::from(input.u8() & 3) * BAR_SIZE + u64::from(input.u16());
                window.write(at, &value[..len]);
                window.read(at, &mut [0; 8][..len]);
            }
            8 => {
                let at = input.u64();
                window.write(at, &value[..len]);
                window.read(at, &mut [0; 8][..len]);
            }
            9 => {
                bus.console.add(1, &[(BUFFERS, input.u16().into(), false)], false);
                bus.rng.add(0, &[(BUFFERS, input.u16().into(), true)], false);
                bus.go_on();
            }
            10 => {
                let state = bus.root.state();
                let mut bytes = postcard::to_stdvec(&state).expect("a state that can be written");
                bus.root.set_state(&state).expect("a state of the same bus");
                let at = usize::from(input.u16()) % bytes.len();
                bytes[at] = value[0];
                if let Ok(damaged) = postcard::from_bytes::<RootState>(&bytes) {
                    let _ = bus.root.set_state(&damaged);
                }
            }
            _ => {
                let states = bus.states();
                bus.load(&states);
                bus.root.remap();
            }
        }
        bus.serve();
    }
    // The reset button: every BAR is where it was, and every device has its queues.
    each!(bus, device => device.handle.reset().expect("a state of the same device"));
    bus.root.remap();
    for (i, queues) in [2u8, 1, 2, 1].into_iter().enumerate() {
        let mut count = [0; 2];
        window.read(BAR + i as u64 * BAR_SIZE + 0x12, &mut count);
        assert_eq!(count, [queues, 0], "device {i} is gone");
    }
    reached("pci reset");
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let address = |low: u8| [low, 0, 0, 0, 1, 0, 0, 0];
    let mut walk = vec![1];
    // Moves the BAR of function 1, reads through the window in its configuration space.
    for (step, value, function, offset) in [
        (0x80u8, address(0), 1u8, 0x14u16),
        (0x80, address(0xff), 1, 0x10),
        (0x40, address(6), 1, 4),
        (0x80, address(0), 2, 0x10),
    ] {
        walk.push(step);
        walk.extend(value);
        walk.push(function);
        walk.extend(offset.to_le_bytes());
    }
    let mut registers = vec![0];
    for (value, offset) in [(0u8, 0x14u16), (1, 0x14), (3, 0x14), (11, 0x14), (1, 0x3000)] {
        registers.push(6);
        registers.extend(address(value));
        registers.push(1);
        registers.extend(offset.to_le_bytes());
    }
    registers.extend([9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
    registers.extend([11, 0, 0, 0, 0, 0, 0, 0, 0, 10, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    vec![walk, registers]
}
