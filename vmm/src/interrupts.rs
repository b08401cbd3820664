//! Interrupt routing: GSIs, irqfds and MSI messages.
//!
//! GSIs 0 to 23 are the pins of the userspace IOAPIC; the kernel gets their messages so that it reports the guest's
//! end-of-interrupt. GSIs from 24 on belong to MSI-X vectors, each with an irqfd. One table, behind one mutex; it is
//! taken last, no other lock is taken while it is held.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::interrupt::MsiSink;
use hypervisor::{IoEventAddress, MsiMessage, MsiRoute, Vm};
use pci::{MsiVectors, NotifyRegistrar};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First GSI after the IOAPIC's pins.
const FIRST_MSI_GSI: u32 = 24;
/// KVM's routing table ends here (KVM_MAX_IRQ_ROUTES).
const GSI_LIMIT: u32 = 4096;

/// Takes a mutex whose data stays valid even when a holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn other(e: hypervisor::Error) -> io::Error {
    io::Error::other(e.to_string())
}

struct Table {
    routes: BTreeMap<u32, MsiMessage>,
    next_gsi: u32,
}

/// The VM's interrupt router.
pub struct Router {
    vm: Arc<dyn Vm>,
    table: Mutex<Table>,
}

impl Router {
    /// An empty table.
    pub fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            table: Mutex::new(Table {
                routes: BTreeMap::new(),
                next_gsi: FIRST_MSI_GSI,
            }),
        })
    }

    fn update(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut table = lock(&self.table);
        let before = match message {
            Some(message) => table.routes.insert(gsi, message),
            None => table.routes.remove(&gsi),
        };
        if before == message {
            return Ok(());
        }
        let routes: Vec<MsiRoute> = table
            .routes
            .iter()
            .map(|(gsi, message)| MsiRoute {
                gsi: *gsi,
                message: *message,
            })
            .collect();
        self.vm.set_msi_routes(&routes).map_err(other)
    }

    /// Makes the irqfds of a function with `count` MSI-X vectors.
    pub fn vectors(self: &Arc<Self>, count: u16) -> io::Result<Arc<Vectors>> {
        let first = {
            let mut table = lock(&self.table);
            let first = table.next_gsi;
            if first + u32::from(count) > GSI_LIMIT {
                return Err(io::Error::other("no interrupt routes left: too many devices"));
            }
            table.next_gsi += u32::from(count);
            first
        };
        let mut vectors = Vec::with_capacity(usize::from(count));
        for gsi in first..first + u32::from(count) {
            let fd = EventFd::new(EFD_NONBLOCK)?;
            self.vm.register_irqfd(&fd, gsi).map_err(other)?;
            vectors.push(Vector { fd, gsi });
        }
        Ok(Arc::new(Vectors {
            router: self.clone(),
            vectors,
        }))
    }
}

impl MsiSink for Router {
    fn deliver(&self, address: u64, data: u32) -> io::Result<()> {
        self.vm.signal_msi(MsiMessage { address, data }).map_err(other)
    }
}

impl devices::ioapic::IoapicRoutes for Router {
    fn pin_changed(&self, pin: u8, message: Option<(u64, u32)>) {
        let message = message.map(|(address, data)| MsiMessage { address, data });
        if let Err(e) = self.update(u32::from(pin), message) {
            log::error!("interrupt route of IOAPIC pin {pin}: {e}");
        }
    }
}

struct Vector {
    fd: EventFd,
    gsi: u32,
}

/// MSI-X vectors of one PCI function.
pub struct Vectors {
    router: Arc<Router>,
    vectors: Vec<Vector>,
}

impl Vectors {
    fn get(&self, vector: u16) -> io::Result<&Vector> {
        self.vectors
            .get(usize::from(vector))
            .ok_or_else(|| io::Error::other(format!("no MSI-X vector {vector}")))
    }
}

impl MsiVectors for Vectors {
    fn set_route(&self, vector: u16, message: Option<(u64, u32)>) -> io::Result<()> {
        let message = message.map(|(address, data)| MsiMessage { address, data });
        self.router.update(self.get(vector)?.gsi, message)
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        self.get(vector)?.fd.write(1)
    }
}

/// ioeventfds for queue notifications.
pub struct Notifier(pub Arc<dyn Vm>);

impl NotifyRegistrar for Notifier {
    fn register(&self, addr: u64, fd: &EventFd) -> io::Result<()> {
        self.0
            .register_ioevent(fd, IoEventAddress::Mmio(addr), None)
            .map_err(other)
    }

    fn unregister(&self, addr: u64, fd: &EventFd) -> io::Result<()> {
        self.0
            .unregister_ioevent(fd, IoEventAddress::Mmio(addr), None)
            .map_err(other)
    }
}
