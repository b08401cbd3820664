//! A device's thread: waits for notifications and for the backend, and serves them.
//!
//! All descriptors are watched for edges, so that an event that nobody takes (a paused device, a receive queue without
//! buffers) does not come again and again. In turn whoever leaves something undone must remember it: the model does,
//! or sets `full_pass`. The eventfds are never read; each write is an edge.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};

use sandbox::ThreadKind;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use crate::Error;
use crate::model::{Model, Ready};
use crate::transport::Device;
use crate::transport::common::Core;

const WAKE: u64 = 1 << 32;
const BACKEND: u64 = WAKE + 1;

fn backend_event(writable: bool) -> EpollEvent {
    let mut events = EventSet::IN | EventSet::EDGE_TRIGGERED;
    if writable {
        events |= EventSet::OUT;
    }
    EpollEvent::new(events, BACKEND)
}

impl<M: Model> Device<M> {
    /// Watches the notifications and the backend.
    pub(crate) fn watch_all(&self) -> Result<(), Error> {
        let add = |fd: RawFd, token| {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            self.epoll.ctl(ControlOperation::Add, fd, event).map_err(Error::Worker)
        };
        add(self.wake.as_raw_fd(), WAKE)?;
        for (i, event) in self.queue_events.iter().enumerate() {
            add(event.as_raw_fd(), i as u64)?;
        }
        self.watch(&mut self.core());
        Ok(())
    }

    /// Starts the thread. It ends when the core's `stop` is set.
    pub(crate) fn start_worker(self: &Arc<Self>) -> Result<(), Error> {
        let device = self.clone();
        let name = format!("virtio{}", self.id);
        let thread = sandbox::spawn(ThreadKind::Virtio, name, move || run(&device)).map_err(Error::Worker)?;
        *crate::lock(&self.thread) = Some(thread);
        Ok(())
    }

    /// Stops watching the backend's descriptor, before it may be closed.
    pub(crate) fn unwatch(&self, core: &mut Core<M>) {
        if let Some((fd, _)) = core.watched.take() {
            // Fails for one that cannot be watched (see below).
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Watches the descriptor that the model names now; an event comes at once when it is ready already.
    pub(crate) fn watch(&self, core: &mut Core<M>) {
        let now = core.model.poll();
        if core.watched == now {
            return;
        }
        let operation = match (core.watched, now) {
            (Some((before, _)), Some((fd, _))) if before == fd => ControlOperation::Modify,
            _ => {
                self.unwatch(core);
                ControlOperation::Add
            }
        };
        core.watched = now;
        if let Some((fd, writable)) = now
            && let Err(e) = self.epoll.ctl(operation, fd, backend_event(writable))
            // Regular files cannot be watched: they are always ready, and the models try on every notification.
            && e.raw_os_error() != Some(libc::EPERM)
        {
            log::error!("{}: cannot watch the backend: {e}", self.id);
        }
    }
}

/// What a round of the worker came to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// Something was looked at.
    Served,
    /// There was nothing to do, and the round did not wait for it.
    Idle,
    /// The worker must end.
    End,
}

fn run<M: Model>(device: &Device<M>) {
    let mut ready = Ready::default();
    while round(device, &mut ready, true) != Round::End {}
}

/// Takes what has come, and serves once. With `wait` it sleeps when there is nothing to do.
pub(crate) fn round<M: Model>(device: &Device<M>, ready: &mut Ready, wait: bool) -> Round {
    let mut events = [EpollEvent::default(); 8];
    let timeout = if wait && ready.is_empty() { -1 } else { 0 };
    let count = match device.epoll.wait(timeout, &mut events) {
        Ok(count) => count,
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return Round::Served,
        Err(e) => {
            log::error!("{}: the worker ends: {e}", device.id);
            return Round::End;
        }
    };
    if !wait && count == 0 && ready.is_empty() {
        return Round::Idle;
    }
    for event in &events[..count] {
        match event.data() {
            WAKE => {}
            BACKEND => {
                ready.readable |= event
                    .event_set()
                    .intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                ready.writable |= event.event_set().intersects(EventSet::OUT | EventSet::ERROR);
            }
            queue => ready.set_queue(queue as usize, true),
        }
    }
    let mut core = device.core_for_worker();
    while core.holds > 0 && !core.stop {
        core = device.released.wait(core).unwrap_or_else(PoisonError::into_inner);
    }
    if core.stop {
        return Round::End;
    }
    core.serve(
        &device.id,
        &device.memory,
        &device.interrupts,
        &device.contenders,
        ready,
    );
    device.watch(&mut core);
    Round::Served
}
