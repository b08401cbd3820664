//! The backend with threads that do one request each: for kernels without io_uring, and for images that are more than
//! their bytes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use sandbox::ThreadKind;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::image::DiskImage;
use crate::Error;
use crate::backend::{BlockBackend, BlockCompletion, BlockOp};
use crate::lock;

const THREADS: usize = 4;

struct Job {
    tag: u64,
    op: BlockOp,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the submitter promised that the buffers stay valid until the completion; they belong to no thread.
unsafe impl Send for Job {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    done: Vec<BlockCompletion>,
    /// Jobs that are not in `done` yet.
    under_way: usize,
    stop: bool,
}

struct Shared {
    disk: Arc<dyn DiskImage>,
    queue: Mutex<Queue>,
    work: Condvar,
    idle: Condvar,
    event: EventFd,
}

/// The backend. Ends its threads when dropped, after their work.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(disk: Arc<dyn DiskImage>) -> Result<Self, Error> {
        Self::start(disk).map_err(|source| Error::Backend {
            what: "disk threads".into(),
            source,
        })
    }

    fn start(disk: Arc<dyn DiskImage>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            disk,
            queue: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let shared = pool.shared.clone();
            let thread = sandbox::spawn(ThreadKind::DiskIo, "virtio-disk-io", move || work(&shared))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }
}

fn work(shared: &Shared) {
    let mut queue = lock(&shared.queue);
    loop {
        let Some(job) = queue.jobs.pop_front() else {
            if queue.stop {
                return;
            }
            queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queue);
        // SAFETY: the submitter's promise.
        let result = unsafe { shared.disk.perform(job.op, &job.iovecs) };
        queue = lock(&shared.queue);
        queue.done.push(BlockCompletion { tag: job.tag, result });
        queue.under_way -= 1;
        if queue.under_way == 0 {
            shared.idle.notify_all();
        }
        if let Err(e) = shared.event.write(1) {
            log::error!("disk thread: {e}");
        }
    }
}

impl BlockBackend for Pool {
    fn size(&self) -> u64 {
        self.shared.disk.size()
    }

    // SAFETY: asks what the trait does: until the request has ended the iovecs are mapped, for reads writable.
    unsafe fn submit(&mut self, tag: u64, op: BlockOp, iovecs: &[libc::iovec]) -> io::Result<()> {
        let mut queue = lock(&self.shared.queue);
        let iovecs = iovecs.to_vec();
        queue.jobs.push_back(Job { tag, op, iovecs });
        queue.under_way += 1;
        self.shared.work.notify_one();
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<BlockCompletion>) {
        out.append(&mut lock(&self.shared.queue).done);
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut queue = lock(&self.shared.queue);
        while queue.under_way > 0 {
            queue = self.shared.idle.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a disk thread panicked");
            }
        }
    }
}
