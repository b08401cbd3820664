//! The key-value store on its disk: recovery, group commit, reads.
//!
//! A PUT waits in `waiting`, is written with the batch that it belongs to, and is answered after the flush that follows
//! the batch's last write. PUTs that come meanwhile make the next batch. Records of a batch that lie side by side on
//! the disk go in one request.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use guest_core::kv::{Index, Key, Place, Record, SECTOR, decode, disk_header, disk_slots, encode};

use crate::time::Clock;
use crate::virtio::{Block, Done, Operation};

/// Most records of a batch.
const BATCH: usize = 256;
/// Most sectors of a write.
const WRITE_SECTORS: usize = 64;
/// Sectors of a read at recovery, and how many of those are under way.
const SCAN_SECTORS: u64 = 128;
const SCAN_DEPTH: u64 = 8;
/// How long the disk may take at boot, in microseconds.
const PATIENCE: u64 = 60_000_000;
/// Keys that the index has memory for.
const KEYS_MAX: u64 = 100_000;
/// Slots below which a store makes no sense.
const SLOTS_MIN: u64 = 4;

const TAG_WRITE: u64 = u64::MAX;
const TAG_FLUSH: u64 = u64::MAX - 1;

/// Who asked: a connection, which of those that it has been, and which of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Place of the connection.
    pub connection: usize,
    /// Counts the connections that this place has had.
    pub generation: u64,
    /// Counts its requests.
    pub ticket: u64,
}

/// An answer.
pub struct Answer {
    /// To whom.
    pub owner: Owner,
    /// A line.
    pub text: Vec<u8>,
}

struct Put {
    owner: Owner,
    key: Key,
    value: Box<[u8]>,
}

struct Written {
    owner: Owner,
    key: Key,
    place: Place,
}

struct Read {
    owner: Owner,
    key: Key,
    place: Place,
}

#[derive(PartialEq, Eq)]
enum Phase {
    Idle,
    /// So many writes are not answered yet.
    Writing(usize),
    Flushing,
}

/// The store.
pub struct Store {
    block: Block,
    slots: u64,
    index: Index,
    waiting: VecDeque<Put>,
    batch: Vec<Written>,
    batch_failed: bool,
    phase: Phase,
    /// Writes of the batch that the queue had no room for.
    unsent: VecDeque<(u64, Box<[u8]>)>,
    reads: Vec<Option<Read>>,
    unsent_reads: VecDeque<Read>,
    answers: Vec<Answer>,
    /// PUTs answered with OK.
    pub puts: u64,
    /// Batches.
    pub batches: u64,
}

fn wait(block: &mut Block, clock: &Clock) -> Done {
    let end = clock.micros() + PATIENCE;
    block.notify();
    loop {
        if let Some(done) = block.take() {
            return done;
        }
        assert!(clock.micros() < end, "the disk does not answer");
        core::hint::spin_loop();
    }
}

fn buffer(sectors: u64) -> Box<[u8]> {
    vec![0; sectors as usize * SECTOR].into_boxed_slice()
}

fn one(block: &mut Block, clock: &Clock, operation: Operation, sector: u64, data: Box<[u8]>) -> Option<Box<[u8]>> {
    block.submit(operation, sector, data, 0).ok()?;
    let done = wait(block, clock);
    done.ok.then_some(done.data)
}

fn line(owner: Owner, text: &str) -> Answer {
    Answer {
        owner,
        text: text.as_bytes().to_vec(),
    }
}

impl Store {
    /// Opens the store on a disk, or makes one if there is none. The error says why it cannot be used.
    pub fn open(mut block: Block, clock: &Clock) -> Result<Self, &'static str> {
        let slots = block.sectors.saturating_sub(1);
        if slots < SLOTS_MIN {
            return Err("the disk is too small");
        }
        let head = one(&mut block, clock, Operation::Read, 0, buffer(1)).ok_or("sector 0 cannot be read")?;
        match disk_slots(&head) {
            Some(found) if found == slots => {}
            Some(_) => return Err("the store on the disk was made for a disk of another size"),
            None if block.read_only => return Err("the disk is read-only"),
            None => {
                let mut sector = [0; SECTOR];
                disk_header(slots, &mut sector);
                one(&mut block, clock, Operation::Write, 0, Box::new(sector)).ok_or("sector 0 cannot be written")?;
                if block.can_flush {
                    one(&mut block, clock, Operation::Flush, 0, Box::new([])).ok_or("the disk cannot be flushed")?;
                }
            }
        }
        let mut store = Self {
            block,
            slots,
            index: Index::new(slots, KEYS_MAX),
            waiting: VecDeque::new(),
            batch: Vec::new(),
            batch_failed: false,
            phase: Phase::Idle,
            unsent: VecDeque::new(),
            reads: Vec::new(),
            unsent_reads: VecDeque::new(),
            answers: Vec::new(),
            puts: 0,
            batches: 0,
        };
        store.recover(clock)?;
        Ok(store)
    }

    /// Reads all slots, several requests at a time.
    fn recover(&mut self, clock: &Clock) -> Result<(), &'static str> {
        let (mut next, mut under_way) = (0, 0);
        while next < self.slots || under_way > 0 {
            while next < self.slots && under_way < SCAN_DEPTH {
                let count = SCAN_SECTORS.min(self.slots - next);
                let submitted = self.block.submit(Operation::Read, 1 + next, buffer(count), next);
                if submitted.is_err() {
                    break;
                }
                next += count;
                under_way += 1;
            }
            let done = wait(&mut self.block, clock);
            under_way -= 1;
            if !done.ok {
                return Err("the disk cannot be read");
            }
            for (slot, sector) in (done.tag..).zip(done.data.chunks_exact(SECTOR)) {
                if let Some(record) = decode(sector) {
                    self.index.found(record.key, record.seq, slot);
                }
            }
        }
        Ok(())
    }

    /// Number of slots.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// Number of keys.
    pub fn keys(&self) -> usize {
        self.index.keys()
    }

    /// The counters as a line.
    pub fn stat(&self) -> Vec<u8> {
        format!(
            "STAT puts={} next={} slots={}\n",
            self.puts,
            self.index.next_seq(),
            self.slots
        )
        .into_bytes()
    }

    /// Stores a value; the answer comes by [`Store::answers`].
    pub fn put(&mut self, owner: Owner, key: &[u8], value: &[u8]) {
        self.waiting.push_back(Put {
            owner,
            key: key.into(),
            value: value.into(),
        });
    }

    /// Asks for a value; the answer comes by [`Store::answers`].
    pub fn get(&mut self, owner: Owner, key: &[u8]) {
        match self.index.get(key) {
            Some(place) => self.read(Read {
                owner,
                key: key.into(),
                place,
            }),
            None => self.answers.push(line(owner, "NONE\n")),
        }
    }

    fn read(&mut self, read: Read) {
        let tag = self.reads.iter().position(Option::is_none).unwrap_or_else(|| {
            self.reads.push(None);
            self.reads.len() - 1
        });
        match self
            .block
            .submit(Operation::Read, 1 + read.place.slot, buffer(1), tag as u64)
        {
            Ok(()) => self.reads[tag] = Some(read),
            Err(_) => self.unsent_reads.push_back(read),
        }
    }

    fn read_done(&mut self, done: &Done) {
        let Some(read) = self.reads.get_mut(done.tag as usize).and_then(Option::take) else {
            return;
        };
        let record = decode(&done.data).filter(|r| done.ok && *r.key == *read.key && r.seq == read.place.seq);
        if let Some(record) = record {
            let mut text = format!("VALUE {} ", record.seq).into_bytes();
            text.extend_from_slice(record.value);
            text.push(b'\n');
            self.answers.push(Answer {
                owner: read.owner,
                text,
            });
            return;
        }
        // Meanwhile the key may have got a newer record, and its old slot another key's.
        match self.index.get(&read.key) {
            Some(place) if place != read.place && done.ok => self.read(Read { place, ..read }),
            _ if done.ok => self
                .answers
                .push(line(read.owner, "ERR the record on the disk is damaged\n")),
            _ => self.answers.push(line(read.owner, "ERR the disk cannot be read\n")),
        }
    }

    /// Makes a batch of what waits.
    fn begin(&mut self) {
        let mut run: Vec<u8> = Vec::new();
        let mut run_start = 0;
        while self.batch.len() < BATCH && self.index.has_room() {
            let Some(put) = self.waiting.pop_front() else { break };
            let Ok(place) = self.index.begin(&put.key) else {
                self.answers.push(line(put.owner, "ERR full\n"));
                continue;
            };
            let mut sector = [0; SECTOR];
            let record = Record {
                seq: place.seq,
                key: &put.key,
                value: &put.value,
            };
            encode(&record, &mut sector);
            let joins = place.slot == run_start + (run.len() / SECTOR) as u64 && run.len() < WRITE_SECTORS * SECTOR;
            if !run.is_empty() && !joins {
                self.unsent
                    .push_back((1 + run_start, core::mem::take(&mut run).into_boxed_slice()));
            }
            if run.is_empty() {
                run_start = place.slot;
            }
            run.extend_from_slice(&sector);
            self.batch.push(Written {
                owner: put.owner,
                key: put.key,
                place,
            });
        }
        if !run.is_empty() {
            self.unsent.push_back((1 + run_start, run.into_boxed_slice()));
        }
        if !self.batch.is_empty() {
            self.phase = Phase::Writing(self.unsent.len());
            self.batch_failed = false;
            self.batches += 1;
        }
    }

    fn send(&mut self) {
        while let Some((sector, data)) = self.unsent.pop_front() {
            if let Err(data) = self.block.submit(Operation::Write, sector, data, TAG_WRITE) {
                self.unsent.push_front((sector, data));
                return;
            }
        }
        while let Some(read) = self.unsent_reads.pop_front() {
            let before = self.unsent_reads.len();
            self.read(read);
            if self.unsent_reads.len() > before {
                return;
            }
        }
    }

    fn end(&mut self) {
        let ok = !self.batch_failed;
        for written in self.batch.drain(..) {
            self.index.end(&written.key, written.place, ok);
            let text = if ok {
                self.puts += 1;
                format!("OK {}\n", written.place.seq)
            } else {
                String::from("ERR the disk cannot be written\n")
            };
            self.answers.push(line(written.owner, &text));
        }
        self.phase = Phase::Idle;
    }

    /// Takes the disk's answers and goes on; true if there were any.
    pub fn step(&mut self) -> bool {
        let mut worked = false;
        while let Some(done) = self.block.take() {
            worked = true;
            match (done.tag, &mut self.phase) {
                (TAG_WRITE, Phase::Writing(left)) => {
                    self.batch_failed |= !done.ok;
                    *left -= 1;
                }
                (TAG_FLUSH, _) => {
                    self.batch_failed |= !done.ok;
                    self.end();
                }
                _ => self.read_done(&done),
            }
        }
        if self.phase == Phase::Writing(0) {
            let flush = self.block.can_flush && !self.batch_failed;
            if !flush {
                self.end();
            } else if self.block.submit(Operation::Flush, 0, Box::new([]), TAG_FLUSH).is_ok() {
                self.phase = Phase::Flushing;
            }
        }
        if self.phase == Phase::Idle && !self.waiting.is_empty() {
            self.begin();
        }
        self.send();
        self.block.notify();
        worked
    }

    /// The answers since the last call.
    pub fn answers(&mut self) -> impl Iterator<Item = Answer> + use<'_> {
        self.answers.drain(..)
    }

    /// See `Queue::listen`.
    pub fn listen(&self) -> bool {
        self.block.listen()
    }

    /// Requests have come back.
    pub fn has_used(&self) -> bool {
        self.block.has_used()
    }

    /// See `Queue::silence`.
    pub fn silence(&self) {
        self.block.silence();
    }
}
