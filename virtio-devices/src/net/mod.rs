//! The network device (virtio 1.3, 5.1): one receive and one transmit queue.
//!
//! * this file: the device and its transmit side; `receive`: the receive side; `addresses`: announcements after a
//!   move; [`tap`]: the backend; [`persist`]: saved state.

mod addresses;
pub mod persist;
mod receive;
pub mod tap;
#[cfg(test)]
mod tap_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::backend::{MAX_FRAME_SIZE, NetBackend, VNET_HEADER_SIZE};
use crate::buffers::io_slices;
use crate::handle::Handle;
use crate::model::{Io, Model, Ready, read_bytes};
use crate::ring::{Chain, QueueError};
use crate::{DeviceState, Error, GuestMemory};
use persist::{LearnedAddress, NetState, VERSION};
use receive::Receiver;

/// Number of queues.
pub const QUEUES: usize = 2;
const RX: usize = 0;
const TX: usize = 1;

/// Frames that are served before others may have the device.
const BATCH: usize = 64;

/// Feature bits (virtio 1.3, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
}

const STATUS_LINK_UP: u16 = 1;

/// How a network device is made.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU that the guest is told.
    pub mtu: Option<u16>,
    /// Largest size of each queue, a power of two.
    pub queue_size: u16,
    /// Offer checksum offload.
    pub checksum_offload: bool,
    /// Offer TCP segmentation offload; only together with checksum offload.
    pub segmentation_offload: bool,
}

/// Counts of a network device.
#[derive(Debug, Default)]
pub struct NetCounters {
    rx_bytes: AtomicU64,
    rx_frames: AtomicU64,
    rx_dropped: AtomicU64,
    tx_bytes: AtomicU64,
    tx_frames: AtomicU64,
    tx_dropped: AtomicU64,
}

/// The network device.
pub struct Net {
    options: NetOptions,
    backend: Option<Box<dyn NetBackend>>,
    features: u64,
    receiver: Receiver,
    sent: Chain,
    /// The backend takes no more frames for now; the chain is back in the queue.
    blocked: bool,
    learned: Vec<LearnedAddress>,
    counters: Arc<NetCounters>,
}

impl Net {
    /// A device on `backend`.
    pub fn new(options: NetOptions, backend: Box<dyn NetBackend>) -> Self {
        Self {
            options,
            backend: Some(backend),
            features: 0,
            receiver: Receiver::default(),
            sent: Chain::default(),
            blocked: false,
            learned: Vec::new(),
            counters: Arc::default(),
        }
    }

    /// The device's counts.
    pub fn counters(&self) -> Arc<NetCounters> {
        self.counters.clone()
    }

    fn set_offloads(&mut self) {
        let pairs = [
            (feature::GUEST_CSUM, libc::TUN_F_CSUM),
            (feature::GUEST_TSO4, libc::TUN_F_TSO4),
            (feature::GUEST_TSO6, libc::TUN_F_TSO6),
            (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
        ];
        let flags = pairs
            .iter()
            .filter(|(bit, _)| self.features & bit != 0)
            .fold(0, |flags, (_, flag)| flags | flag);
        if let Some(backend) = &mut self.backend
            && let Err(e) = backend.set_offloads(flags)
        {
            log::error!("network device {:02x?}: offloads {flags:#x}: {e}", self.options.mac);
        }
    }

    /// Sends up to a batch of frames. True when there may be more.
    fn transmit(&mut self, io: &mut Io<'_>) -> Result<bool, QueueError> {
        let Some(backend) = &mut self.backend else {
            return Ok(false);
        };
        io.rings[TX].disable_kicks(io.memory)?;
        self.blocked = false;
        let mut served = 0;
        let more = loop {
            if served == BATCH || (served > 0 && io.is_wanted()) {
                break true;
            }
            if !io.rings[TX].pop(io.memory, &mut self.sent)? {
                if io.rings[TX].enable_kicks(io.memory)? {
                    continue;
                }
                break false;
            }
            served += 1;
            let frame = &self.sent.readable;
            if self.sent.writable.pieces() > 0 {
                return Err(QueueError::Direction);
            }
            if frame.len() < VNET_HEADER_SIZE {
                return Err(QueueError::TooShort);
            }
            // SAFETY: the device keeps guest RAM mapped, and the slices are gone when `transmit` returns.
            let slices = unsafe { io_slices(frame.iovecs()) };
            let sent = if frame.len() > MAX_FRAME_SIZE {
                Err(io::ErrorKind::InvalidInput.into())
            } else {
                backend.transmit(slices)
            };
            match sent {
                Ok(()) => {
                    let mut head = [0; addresses::PEEK];
                    let len = frame.read(VNET_HEADER_SIZE, &mut head);
                    if let Some(address) = addresses::own_address(&head[..len], &self.options.mac) {
                        addresses::remember(&mut self.learned, address);
                    }
                    self.counters.tx_frames.fetch_add(1, Relaxed);
                    let bytes = frame.len() - VNET_HEADER_SIZE;
                    self.counters.tx_bytes.fetch_add(bytes as u64, Relaxed);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    io.rings[TX].put_back(1);
                    self.blocked = true;
                    break false;
                }
                // The host's interface is down, or the frame's header asks for what it cannot do: a lost frame.
                Err(_) => {
                    self.counters.tx_dropped.fetch_add(1, Relaxed);
                }
            }
            io.rings[TX].push_used(io.memory, self.sent.head, 0)?;
            // At once: TCP in the guest sends on as soon as it sees that earlier frames have left.
            io.finish(TX)?;
        };
        Ok(more)
    }
}

impl Model for Net {
    const TYPE: u16 = 1;
    const CLASS: [u8; 3] = [2, 0, 0];

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; QUEUES]
    }

    fn features(&self) -> u64 {
        let mut features = feature::MAC | feature::STATUS | feature::MRG_RXBUF;
        if self.options.mtu.is_some() {
            features |= feature::MTU;
        }
        if self.options.checksum_offload {
            features |= feature::CSUM | feature::GUEST_CSUM;
            if self.options.segmentation_offload {
                features |= feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
                features |= feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
            }
        }
        features
    }

    fn consistent(&self, accepted: u64) -> bool {
        // virtio 1.3, 5.1.3.1.
        let tso = |any: u64, ecn: u64, csum: u64| {
            (accepted & any == 0 || accepted & csum != 0) && (accepted & ecn == 0 || accepted & any != 0)
        };
        let (host, guest) = (
            feature::HOST_TSO4 | feature::HOST_TSO6,
            feature::GUEST_TSO4 | feature::GUEST_TSO6,
        );
        tso(host, feature::HOST_ECN, feature::CSUM) && tso(guest, feature::GUEST_ECN, feature::GUEST_CSUM)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.options.mac);
        config[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.options.mtu.unwrap_or(0).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        let guest_tso = features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
        let mtu = usize::from(self.options.mtu.unwrap_or(1500));
        let largest = if guest_tso {
            MAX_FRAME_SIZE
        } else {
            VNET_HEADER_SIZE + 18 + mtu
        };
        self.receiver.configure(features & feature::MRG_RXBUF != 0, largest);
        self.set_offloads();
    }

    fn reset(&mut self, _memory: &GuestMemory) {
        self.features = 0;
        self.blocked = false;
        self.receiver.reset();
    }

    fn serve(&mut self, io: &mut Io<'_>, ready: &mut Ready) -> Result<(), QueueError> {
        if ready.queue(TX) || ready.writable {
            ready.writable = false;
            let more = self.transmit(io)?;
            ready.set_queue(TX, more);
        }
        if ready.readable || ready.queue(RX) {
            let more = match &mut self.backend {
                Some(backend) => self.receiver.receive(backend.as_mut(), io, &self.counters)?,
                None => false,
            };
            ready.readable = more;
            ready.set_queue(RX, false);
        }
        Ok(())
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        self.receiver.put_back(io);
        Ok(())
    }

    fn poll(&self) -> Option<(RawFd, bool)> {
        self.backend.as_ref().map(|backend| (backend.poll_fd(), self.blocked))
    }

    fn close(&mut self) {
        self.backend = None;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(NetState {
            version: VERSION,
            mac: self.options.mac,
            waiting: self.receiver.waiting().map(<[u8]>::to_vec),
            learned: self.learned.clone(),
        })
    }

    fn set_state(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Net(state) = state else {
            return Err(state.wrong_kind());
        };
        if state.version != VERSION {
            return Err(Error::State(format!("network device, version {}", state.version)));
        }
        if state.mac != self.options.mac {
            return Err(Error::State("network device with another MAC address".into()));
        }
        self.learned.clear();
        for address in &state.learned {
            addresses::remember(&mut self.learned, *address);
        }
        self.receiver.set_waiting(state.waiting.as_deref())
    }
}

impl NetCounters {
    /// Values by name.
    pub fn values(&self) -> BTreeMap<String, u64> {
        let values = [
            ("rx_bytes", &self.rx_bytes),
            ("rx_frames", &self.rx_frames),
            ("rx_dropped", &self.rx_dropped),
            ("tx_bytes", &self.tx_bytes),
            ("tx_frames", &self.tx_frames),
            ("tx_dropped", &self.tx_dropped),
        ];
        values
            .map(|(name, value)| (name.to_string(), value.load(Relaxed)))
            .into()
    }
}

/// Frames that [`Handle::<Net>::drop_queued`] throws away at most: more than a tap's queue holds.
const MAX_DROPPED: usize = 10_000;

impl Handle<Net> {
    /// Puts the backend that `f` makes of the present one in its place.
    pub fn exchange(&self, f: impl FnOnce(Box<dyn NetBackend>) -> Box<dyn NetBackend>) {
        self.exchange_with(|net| {
            net.backend = net.backend.take().map(f);
            if net.features != 0 {
                net.set_offloads();
            }
        });
    }

    /// Tells switches and neighbours that the guest's addresses are here now.
    pub fn announce(&self) {
        let mut core = self.device.core();
        let net = &mut core.model;
        let Some(backend) = &mut net.backend else { return };
        for frame in addresses::announcements(&net.options.mac, &net.learned) {
            if let Err(e) = backend.transmit(&[io::IoSlice::new(&frame)]) {
                log::warn!("{}: the announcement of the guest's address is lost: {e}", self.id());
            }
        }
    }

    /// Throws away the frames that wait in the backend.
    pub fn drop_queued(&self) {
        let mut core = self.device.core();
        let Some(backend) = &mut core.model.backend else { return };
        let mut frame = vec![0; MAX_FRAME_SIZE];
        for _ in 0..MAX_DROPPED {
            if backend.receive(&mut [io::IoSliceMut::new(&mut frame)]).is_err() {
                return;
            }
        }
    }
}
