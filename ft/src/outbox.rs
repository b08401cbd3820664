//! The writing side of a connection: one queue, one writer at a time.
//!
//! [`Outbox::post`] queues a frame for the sender thread; device workers use it, so that they never wait for the
//! network. [`Outbox::write_now`] writes from the calling thread, after everything that was queued before: the epoch
//! controller and the backup's acknowledgements use it, so that no thread has to be woken in between. Frames get their
//! numbers when they are written. A long write lets queued frames go first between its pieces.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::core::Nanos;
use crate::transport::Stream;
use crate::wire::frame::OutFrame;
use crate::wire::header;

/// A clock of this host, in the core's unit; never 0. It goes on while the host sleeps: a primary that wakes up must know
/// that its lease is over (R4), which the clock of `Instant` would not tell it.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Nanos);

fn boot_time() -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime(2) fills the timespec; every Linux of the last decade has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Default for Clock {
    fn default() -> Self {
        Self(boot_time())
    }
}

impl Clock {
    /// Now.
    pub fn now(&self) -> Nanos {
        boot_time().saturating_sub(self.0) + 1
    }
}

/// What the stamp field of sent frames holds.
#[derive(Debug)]
pub enum Stamp {
    /// Our clock (primary).
    Clock,
    /// The newest stamp that came (backup).
    Echo(AtomicU64),
}

struct Writer {
    stream: Stream,
    seq: u64,
    headers: Vec<[u8; header::SIZE]>,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<OutFrame<'static>>,
    bytes: u64,
    /// The sender thread waits.
    idle: bool,
    closing: bool,
    drained: bool,
}

/// Most bytes of one burst of [`Outbox::write_now`] before queued frames get their turn.
const BURST: usize = 1 << 20;

/// Most frames of one write.
const BURST_FRAMES: usize = 300;

/// See the module's description.
pub struct Outbox {
    queue: Mutex<Queue>,
    changed: Condvar,
    writer: Mutex<Writer>,
    stream: Stream,
    clock: Clock,
    /// Value of the stamp field.
    pub stamp: Stamp,
    /// Value of the mark field.
    pub mark: AtomicU64,
    bytes: AtomicU64,
    last_write: AtomicU64,
    closed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_all(stream: &mut Stream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut slices, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Outbox {
    /// Writes to `stream`, from frame number 0 on.
    pub fn new(stream: &Stream, clock: Clock, stamp: Stamp) -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            changed: Condvar::new(),
            writer: Mutex::new(Writer {
                stream: stream.try_clone()?,
                seq: 0,
                headers: Vec::new(),
            }),
            stream: stream.try_clone()?,
            clock,
            stamp,
            mark: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            last_write: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        })
    }

    /// Queues frames for the sender thread. After the connection's end they are dropped.
    pub fn post(&self, frames: impl IntoIterator<Item = OutFrame<'static>>) -> u64 {
        let mut queue = lock(&self.queue);
        let mut bytes = 0;
        for frame in frames {
            bytes += frame.size() as u64;
            if !self.closed.load(Ordering::Relaxed) {
                queue.frames.push_back(frame);
            }
        }
        queue.bytes += bytes;
        let wake = queue.idle;
        drop(queue);
        if wake {
            self.changed.notify_all();
        }
        bytes
    }

    fn take_queued(&self) -> VecDeque<OutFrame<'static>> {
        let mut queue = lock(&self.queue);
        queue.bytes = 0;
        std::mem::take(&mut queue.frames)
    }

    fn burst(&self, writer: &mut Writer, frames: &[&OutFrame<'_>]) -> io::Result<()> {
        let mark = self.mark.load(Ordering::Acquire);
        let now = self.clock.now();
        let stamp = match &self.stamp {
            Stamp::Clock => now,
            Stamp::Echo(stamp) => stamp.load(Ordering::Acquire),
        };
        let Writer { stream, seq, headers } = writer;
        headers.clear();
        for frame in frames {
            headers.push(frame.header(*seq, mark, stamp));
            *seq += 1;
        }
        let mut slices = Vec::with_capacity(3 * frames.len());
        let mut bytes = 0;
        for (frame, header) in frames.iter().zip(&*headers) {
            let (head, body) = frame.payload();
            slices.extend([IoSlice::new(header), IoSlice::new(head), IoSlice::new(body)]);
            bytes += frame.size() as u64;
        }
        write_all(stream, &mut slices)?;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.last_write.store(now, Ordering::Relaxed);
        Ok(())
    }

    fn bursts(&self, writer: &mut Writer, frames: &[&OutFrame<'_>], between: bool) -> io::Result<()> {
        let mut rest = frames;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |frame: &&&OutFrame<'_>| {
                bytes += frame.size();
                bytes <= BURST
            };
            let count = rest.iter().take(BURST_FRAMES).take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            self.burst(writer, now)?;
            rest = later;
            if between && !rest.is_empty() {
                self.pump(writer)?;
            }
        }
        Ok(())
    }

    fn pump(&self, writer: &mut Writer) -> io::Result<()> {
        loop {
            let queued = self.take_queued();
            if queued.is_empty() {
                return Ok(());
            }
            let frames: Vec<&OutFrame<'_>> = queued.iter().collect();
            self.bursts(writer, &frames, false)?;
        }
    }

    /// Writes frames, after those queued before. Blocks as long as the other side does not read.
    pub fn write_now(&self, frames: &[OutFrame<'_>]) -> io::Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let mut writer = lock(&self.writer);
        self.pump(&mut writer)?;
        let frames: Vec<&OutFrame<'_>> = frames.iter().collect();
        self.bursts(&mut writer, &frames, true)
    }

    /// The sender thread: writes what is queued until the connection ends. An error is that of the connection.
    pub fn run(&self) -> io::Result<()> {
        let result = loop {
            let mut queue = lock(&self.queue);
            while queue.frames.is_empty() && !queue.closing && !self.closed.load(Ordering::Acquire) {
                queue.idle = true;
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            queue.idle = false;
            let done = queue.frames.is_empty();
            drop(queue);
            if done || self.closed.load(Ordering::Acquire) {
                break Ok(());
            }
            if let Err(e) = self.pump(&mut lock(&self.writer)) {
                break Err(e);
            }
        };
        lock(&self.queue).drained = true;
        self.changed.notify_all();
        result
    }

    /// Ends the connection once everything queued is written (at most `patience` from now): the other side reads it
    /// all, then the end. What it sends meanwhile can still be read.
    pub fn finish(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut queue = lock(&self.queue);
        queue.closing = true;
        self.changed.notify_all();
        while !queue.drained && Instant::now() < end && !self.closed.load(Ordering::Acquire) {
            let left = end.saturating_duration_since(Instant::now());
            queue = self
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let drained = queue.drained;
        drop(queue);
        if drained {
            self.stream.shutdown_write()
        } else {
            self.close()
        }
    }

    /// Ends the connection at once; blocked writers return.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.stream.shutdown();
        lock(&self.queue).frames.clear();
        self.changed.notify_all();
    }

    /// Bytes written in all.
    pub fn bytes_written(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Bytes queued.
    pub fn bytes_queued(&self) -> u64 {
        lock(&self.queue).bytes
    }

    /// When something was last written.
    pub fn last_write(&self) -> Nanos {
        self.last_write.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::wire::frame::{Frame, encode, input_frame};
    use crate::wire::reader::{FrameReader, ReadError};

    fn pair() -> (Arc<Outbox>, FrameReader<UnixStream>) {
        let (a, b) = UnixStream::pair().unwrap();
        let outbox = Outbox::new(&Stream::Unix(a), Clock::default(), Stamp::Clock).unwrap();
        (Arc::new(outbox), FrameReader::new(b))
    }

    fn spawn(outbox: &Arc<Outbox>) -> std::thread::JoinHandle<io::Result<()>> {
        let outbox = outbox.clone();
        std::thread::spawn(move || outbox.run())
    }

    #[test]
    fn posted_frames_precede_those_written_later_and_all_are_numbered() {
        let (outbox, mut reader) = pair();
        outbox.post((0..1000).map(|n| input_frame(n, 0, &[0; 10])));
        let sender = spawn(&outbox);
        outbox.mark.store(7, Ordering::Release);
        outbox.write_now(&encode(&Frame::Ack(1000))).unwrap();
        outbox.post(encode(&Frame::Heartbeat));
        outbox.finish(Duration::from_secs(5));
        sender.join().unwrap().unwrap();
        for n in 0..1000 {
            let (_, frame) = reader.next(&mut || ()).unwrap();
            assert!(matches!(frame, Frame::Input { epoch, .. } if epoch == n));
        }
        let (envelope, frame) = reader.next(&mut || ()).unwrap();
        assert_eq!((frame, envelope.mark), (Frame::Ack(1000), 7));
        assert!(envelope.stamp > 0);
        assert_eq!(reader.next(&mut || ()).unwrap().1, Frame::Heartbeat);
        assert!(matches!(reader.next(&mut || ()), Err(ReadError::Closed)));
        assert!(outbox.bytes_written() > 50_000);
    }

    #[test]
    fn close_frees_a_blocked_writer() {
        let (outbox, reader) = pair();
        let writer = {
            let outbox = outbox.clone();
            std::thread::spawn(move || outbox.write_now(&[input_frame(0, 0, &vec![0; 4 << 20])]))
        };
        std::thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished());
        outbox.close();
        assert!(writer.join().unwrap().is_err());
        assert!(outbox.write_now(&encode(&Frame::Heartbeat)).is_err());
        drop(reader);
    }
}
