//! One checkpoint: what is done while the guest stands still, and what after.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::controller::{BeginError, Controller};
use super::metrics::Checkpoint;
use super::session::lock;
use super::stage::pages;
use crate::audit::PageSum;
use crate::core::primary::{Action, Event};
use crate::machine::{MachineError, PAGE_SIZE, PageRun};
use crate::wire::frame::{self, EndMarker, Frame, OutFrame, encode};
use crate::wire::pages::push_page;

/// Frames that a checkpoint carries along: an answer that the dying primary could not send leaves from the backup. More
/// than this is a stream, whose retransmission finds out by what follows.
const FRAME_CAP: usize = 32 << 10;

/// Bytes after which frames are written.
const BURST: u64 = 1 << 20;

/// Pages that are worth a pass of their own while the guest runs: copying fewer takes no longer than such a pass costs.
const AHEAD: f64 = 128.0;

/// With more pages written than this, most are not hot ones, and comparing them takes longer than it saves.
const MOST_COMPARED: u64 = 4096;

/// Pages that may be hot. Each is compared or copied in every pause (0.1 to 0.4 us).
const HOT_PAGES: usize = 1024;

/// The same while epochs are short: with a fault for each page (10 us and more) in each of them a stream, whose buffers have
/// some megabytes, would get nothing else done.
const HOT_PAGES_IN_SHORT: usize = 4096;

/// Longest epoch that is short.
const SHORT: Duration = Duration::from_millis(20);

/// Passes of that kind.
const MAX_PASSES: u32 = 4;

impl Controller {
    /// Copies what the guest has written so far while it runs on, for as long as that leaves less for the pause.
    pub(super) fn copy_ahead(&mut self) -> Result<(), MachineError> {
        self.stage.clear();
        let began = self.epoch_began;
        self.copy_passes(began, self.dirty_rate * began.elapsed().as_secs_f64())
    }

    /// The same, beside what is staged; `expected` pages were written since `began`.
    pub(super) fn copy_passes(&mut self, mut began: Instant, mut expected: f64) -> Result<(), MachineError> {
        for _ in 0..MAX_PASSES {
            if expected < AHEAD {
                break;
            }
            let harvested = Instant::now();
            let written = self.copy_written(false)? as f64;
            let rate = written / harvested.saturating_duration_since(began).as_secs_f64().max(1e-6);
            expected = rate * harvested.elapsed().as_secs_f64();
            began = harvested;
            // The guest writes about as fast as its pages are copied: another pass would find as much.
            if expected > written / 2.0 {
                break;
            }
        }
        Ok(())
    }

    /// Copies the pages written since the last call; their number. Hot pages are copied in the pause alone, and only if
    /// they were changed.
    fn copy_written(&mut self, hot: bool) -> Result<u64, MachineError> {
        let session = self.session.clone();
        let machine = &session.machine;
        self.runs.clear();
        machine.harvest_dirty(hot, &mut self.runs)?;
        let written = pages(&self.runs);
        let runs = if hot && written <= MOST_COMPARED {
            self.leave_out_same()?;
            &self.changed
        } else {
            self.same = 0;
            &self.runs
        };
        self.stage.copy(runs, |gpa, to| machine.read_memory(gpa, to))?;
        Ok(written)
    }

    /// Finds out which of the pages in `runs` are to be copied: not those that are as they were sent last. With the VM
    /// still. A page that is staged already is copied again, whatever it was sent as.
    fn leave_out_same(&mut self) -> Result<(), MachineError> {
        let machine = &self.session.machine;
        let sent = &mut self.encoder.sent;
        let mut page = [0; PAGE_SIZE];
        self.changed.clear();
        self.same = 0;
        for gpa in self.runs.iter().flat_map(PageRun::addresses) {
            if sent.may_be_same(gpa) && !self.stage.contains(gpa) {
                machine.read_memory(gpa, &mut page)?;
                if sent.is_same(gpa, &page) {
                    self.same += 1;
                    continue;
                }
            }
            push_page(&mut self.changed, gpa);
        }
        Ok(())
    }

    /// The audit's sums of pages that were not written in the epoch that ends. One that is as it was sent may have been
    /// something else when it was summed.
    fn settle_audit(&mut self) -> Vec<PageSum> {
        let (stage, runs) = (&self.stage, &self.runs);
        self.auditor.settle(|gpa| {
            let at = runs.partition_point(|run| run.end() <= gpa);
            stage.contains(gpa) || runs.get(at).is_some_and(|run| run.gpa <= gpa)
        })
    }

    /// Takes a checkpoint of the VM, which stands still since `begin`, lets it run on and sends the checkpoint.
    pub(super) fn checkpoint(&mut self, begin: Instant) -> Result<(), BeginError> {
        let session = self.session.clone();
        let machine = &session.machine;
        let anew = self.send_anew()?;
        let cut = session.interposer.cut();
        let epoch_time = begin.saturating_duration_since(self.epoch_began);
        let sent = &mut self.encoder.sent;
        let most_hot = match sent.is_on() {
            // Whether a hot page was written is found out by comparing it.
            false => 0,
            true if epoch_time < SHORT => HOT_PAGES_IN_SHORT,
            true => HOT_PAGES,
        };
        let hot = machine.hot_pages(most_hot, &sent.take_cold())?;
        self.copy_written(true)?;
        let count = self.stage.pages() + self.same;
        let bytes = count as usize * PAGE_SIZE;
        self.dirty_rate = count.saturating_sub(hot) as f64 / epoch_time.as_secs_f64().max(1e-4);
        let state = machine.save_state()?;
        let inputs = session.log.inputs.swap(0, Ordering::Relaxed);
        let disk = session.log.disk.swap(0, Ordering::Relaxed);
        let (audit_mib_s, audit_disk_mib_s) = {
            let limits = lock(&session.limits);
            (limits.audit_mib_s, limits.audit_disk_mib_s)
        };
        let mut chunks = session.log.audit.turn(audit_disk_mib_s);
        let taken = Instant::now();
        let lag = bytes as u64 + self.state_len + cut.held + cut.logged;
        self.drive(Event::Checkpointed {
            bytes: lag,
            dirty_bytes: bytes as u64,
            anew: anew.places(),
        });
        self.perform_first(&Action::Resume);
        session.confirm(cut.epoch + 1);
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
        let mut sums = self.settle_audit();
        let places = anew.places();
        if places > 0 {
            (sums, chunks) = (anew.pages, anew.chunks);
        }
        if lock(&session.core).sends() {
            let state = state()?;
            self.state_len = state.len() as u64;
            let marker = EndMarker {
                epoch: cut.epoch,
                disk,
                inputs,
                audited: sums.len() as u64,
                audited_chunks: chunks.len() as u64,
                anew: places > 0,
                state_len: self.state_len,
                ..Default::default()
            };
            let mut frames = frame::audit(cut.epoch, &sums);
            if !chunks.is_empty() {
                frames.push(frame::disk_audit(cut.epoch, &chunks));
            }
            frames.extend(frame::state(cut.epoch, &state));
            self.send(marker, frames, taken, cut.logged)?;
            let rounds = self.auditor.rounds();
            let mut metrics = lock(&session.metrics);
            metrics.audited(&sums, &chunks, rounds);
            metrics.sent_anew(places);
            drop(metrics);
            self.auditor.look(machine.as_ref(), audit_mib_s)?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        mut marker: EndMarker,
        frames: Vec<OutFrame<'_>>,
        taken: Instant,
        logged: u64,
    ) -> io::Result<()> {
        let session = self.session.clone();
        let outbox = &session.outbox;
        let outputs = session.interposer.sealed_outputs(marker.epoch, FRAME_CAP);
        let (mut burst, count) = frame::outputs(marker.epoch, &outputs);
        marker.outputs = count;
        burst.extend(frames);
        let mut sent = logged;
        let size = |burst: &[OutFrame<'_>]| burst.iter().map(|frame| frame.size() as u64).sum::<u64>();
        // A small epoch leaves in one write; the pages of a large one go out while the next are being encoded.
        let mut write = |frame| {
            burst.push(frame);
            if size(&burst) >= BURST {
                sent += size(&burst);
                outbox.write_now(&burst)?;
                burst.clear();
            }
            Ok::<(), io::Error>(())
        };
        let (runs, content) = self.stage.content();
        let encoded = self.encoder.encode(marker.epoch, runs, content, false, &mut write)?;
        (marker.pages, marker.zero_pages, marker.line_pages) = (encoded.pages, encoded.zero_pages, encoded.line_pages);
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
