//! virtio 1.x devices over PCI.
//!
//! * [`backend`]: the narrow border between a device model and what serves it (tap, file, console). The FT interposer
//!   is a backend around another backend; with FT off it is not there (rule R7).
//!
//! One worker thread per device. A device's queues and backend are behind one mutex: its worker holds it while it
//! serves a batch, the VMM takes it to pause, save, or exchange the backend. A paused device's worker does nothing
//! until it is resumed, so pausing needs no thread to answer.

pub mod backend;

/// Guest RAM, with a bitmap of the pages that the VMM itself wrote (the hypervisor's dirty log does not see those).
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
