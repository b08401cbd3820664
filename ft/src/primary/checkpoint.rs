//! One checkpoint: what is done while the guest stands still, and what after.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::controller::{BeginError, Controller};
use super::metrics::Checkpoint;
use super::session::lock;
use crate::core::primary::{Action, Event};
use crate::machine::{PAGE_SIZE, PageRun};
use crate::wire::frame::{self, EndMarker, Frame, OutFrame, encode};

/// Frames that a checkpoint carries along: an answer that the dying primary could not send leaves from the backup. More
/// than this is left to the guests' own retransmission.
const FRAME_CAP: usize = 128 << 10;

/// Bytes after which frames are written.
const BURST: u64 = 1 << 20;

pub(super) fn pages(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

impl Controller {
    /// Takes a checkpoint of the VM, which stands still since `begin`, lets it run on and sends the checkpoint.
    pub(super) fn checkpoint(&mut self, begin: Instant) -> Result<(), BeginError> {
        let session = self.session.clone();
        let machine = &session.machine;
        let cut = session.interposer.cut();
        let epoch_time = begin.saturating_duration_since(self.epoch_began);
        self.runs.clear();
        machine.harvest_dirty(&mut self.runs)?;
        let count = pages(&self.runs);
        let bytes = count as usize * PAGE_SIZE;
        if self.staging.len() < bytes {
            self.staging.resize(bytes, 0);
        }
        let mut at = 0;
        for run in &self.runs {
            let len = run.count as usize * PAGE_SIZE;
            machine.read_memory(run.gpa, &mut self.staging[at..at + len])?;
            at += len;
        }
        let state = machine.save_state()?;
        let inputs = session.log.inputs.swap(0, Ordering::Relaxed);
        let disk = session.log.disk.swap(0, Ordering::Relaxed);
        let taken = Instant::now();
        let lag = bytes as u64 + state.len() as u64 + cut.held + cut.logged;
        self.drive(Event::Checkpointed {
            bytes: lag,
            dirty_bytes: bytes as u64,
        });
        self.perform_first(&Action::Resume);
        let pause = begin.elapsed();
        {
            let mut metrics = lock(&session.metrics);
            metrics.checkpoint(
                cut.epoch,
                taken,
                Checkpoint {
                    epoch: epoch_time,
                    pause,
                    pages: count,
                },
            );
        }
        if lock(&session.core).sends() {
            let marker = EndMarker {
                epoch: cut.epoch,
                disk,
                inputs,
                state_len: state.len() as u64,
                ..Default::default()
            };
            self.send(marker, bytes, &state, taken, cut.logged)?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        mut marker: EndMarker,
        bytes: usize,
        state: &[u8],
        taken: Instant,
        logged: u64,
    ) -> io::Result<()> {
        let session = self.session.clone();
        let outbox = &session.outbox;
        let outputs = session.interposer.sealed_outputs(marker.epoch, FRAME_CAP);
        let (mut burst, count) = frame::outputs(marker.epoch, &outputs);
        marker.outputs = count;
        burst.extend(frame::state(marker.epoch, state));
        let mut sent = logged;
        let size = |burst: &[OutFrame<'_>]| burst.iter().map(|frame| frame.size() as u64).sum::<u64>();
        // A small epoch leaves in one write; the pages of a large one go out while the next are being encoded.
        let mut pages = |frame| {
            burst.push(frame);
            if size(&burst) >= BURST {
                sent += size(&burst);
                outbox.write_now(&burst)?;
                burst.clear();
            }
            Ok::<(), io::Error>(())
        };
        let staged = &mut self.staging[..bytes];
        let encoded = self
            .encoder
            .encode(marker.epoch, &self.runs, staged, false, &mut pages)?;
        (marker.pages, marker.zero_pages) = (encoded.pages, encoded.zero_pages);
        marker.age_ns = taken.elapsed().min(Duration::from_secs(3600)).as_nanos() as u64;
        burst.extend(encode(&Frame::End(marker)));
        let telling = {
            let mut metrics = lock(&session.metrics);
            metrics.sent(marker.epoch, sent + size(&burst));
            metrics.take_telling()
        };
        if let Some((bytes, took)) = telling {
            self.encoder.gain.note_link(bytes, took);
        }
        outbox.write_now(&burst)
    }
}
