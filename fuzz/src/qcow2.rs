//! qcow2 images: any bytes opened as one, then read and written as a device would.
//!
//! What was written must be read again, also after the image was closed and opened anew. A panic in the library that
//! reads the format becomes an error by design and is no finding; it is counted.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use virtio_devices::backend::BlockOp;
use virtio_devices::block::{DiskImage, DiskOptions, Format, open};

use crate::files::directory;
use crate::input::Input;
use crate::reach::reached;

/// Larger disks are read and written at their beginning and end alone.
const MODEL: u64 = 1 << 20;

fn image(path: &Path, readonly: bool, backing_files: bool) -> Option<Arc<dyn DiskImage>> {
    let options = DiskOptions {
        path: path.into(),
        format: Format::Qcow2,
        readonly,
        direct: false,
        backing_files,
        shared: false,
    };
    open(&options).ok()
}

/// Part of the disk as it must be: `None` where that is not known.
struct Model {
    start: u64,
    bytes: Vec<Option<u8>>,
}

impl Model {
    fn set(&mut self, offset: u64, len: u64, value: Option<u8>) {
        let from = offset.clamp(self.start, self.end()) - self.start;
        let to = (offset + len).clamp(self.start, self.end()) - self.start;
        self.bytes[from as usize..to as usize].fill(value);
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn check(&mut self, image: &dyn DiskImage) {
        let mut bytes = vec![0; self.bytes.len()];
        if image.read_at(self.start, &mut bytes).is_err() {
            return;
        }
        for (at, (found, expected)) in bytes.iter().zip(&mut self.bytes).enumerate() {
            if let Some(expected) = expected {
                assert_eq!(found, expected, "byte {at} from {} on is another one", self.start);
            }
            *expected = Some(*found);
        }
    }
}

fn work(image: &dyn DiskImage, readonly: bool, input: &mut Input<'_>) -> Vec<Model> {
    let size = image.size();
    let len = size.min(MODEL / 2);
    let mut models: Vec<Model> = [0, size - len]
        .map(|start| Model {
            start,
            bytes: vec![None; len as usize],
        })
        .into();
    for model in &mut models {
        model.check(image);
    }
    for _ in 0..32 {
        if input.is_empty() || size == 0 {
            break;
        }
        let (step, value) = (input.u8(), input.u8());
        let at = input.number();
        let offset = if step & 1 == 0 { at % size } else { size - 1 - at % size } / 512 * 512;
        let len = (512 * u64::from(input.u16() & 0xff)).min((size - offset) / 512 * 512);
        let (done, value) = match step >> 1 & 7 {
            0 | 1 => {
                let mut back = vec![0; len as usize];
                reached("qcow2 read");
                let _ = image.read_at(offset, &mut back);
                continue;
            }
            2..=4 => (image.write_at(offset, &vec![value; len as usize]).is_ok(), value),
            5 => (image.write_zeroes(offset, len, value & 1 != 0).is_ok(), 0),
            6 if len > 0 => {
                // SAFETY: there are no pieces.
                (
                    unsafe { image.perform(BlockOp::Discard { offset, len }, &[]) }.is_ok(),
                    0,
                )
            }
            _ => {
                let _ = image.flush();
                continue;
            }
        };
        if readonly {
            // Zeroes where zeroes are already is no change; the models tell.
            assert!(
                !done || len == 0 || step >> 1 & 7 >= 5,
                "an image opened for reading was written"
            );
            continue;
        }
        if done {
            reached("qcow2 changed");
        }
        for model in &mut models {
            // A failed change may be there in part. A discard may leave what was there.
            let known = done && step >> 1 & 7 != 6;
            model.set(offset, len, known.then_some(value));
        }
    }
    models
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let readonly = flags & 1 != 0;
    let grow = u64::from(input.u8()) << 10;
    let steps = input.bytes(64);
    let path = directory().join("image");
    let bytes = input.rest();
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).expect("a file");
    if flags & 2 != 0 {
        let file = File::options().write(true).open(&path).expect("a file");
        file.set_len(bytes.len() as u64 + grow).expect("a longer file");
    }
    let Some(opened) = image(&path, readonly, flags & 4 != 0) else {
        return;
    };
    reached("qcow2 opened");
    if !readonly {
        reached("qcow2 opened for writing");
    }
    let mut models = work(opened.as_ref(), readonly, &mut Input::new(steps));
    for model in &mut models {
        model.check(opened.as_ref());
    }
    let flushed = opened.flush().is_ok();
    drop(opened);
    // Closed and opened again it has the same content.
    let Some(again) = image(&path, true, flags & 4 != 0) else {
        return;
    };
    if flushed {
        reached("qcow2 opened again");
        for model in &mut models {
            model.check(again.as_ref());
        }
    }
}

/// A small image of version 3: clusters of 512 bytes, so that all of it fits into an input. `l2`: the entries of its first
/// L2 table; their clusters are numbered from 5 on.
fn small(size: u64, l2: &[u64], clusters: usize) -> Vec<u8> {
    const CLUSTER: usize = 512;
    let mut image = vec![0; (5 + clusters) * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &9u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    let l1_entries = size.div_ceil(64 * CLUSTER as u64) as u32;
    put(36, &l1_entries.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    // Refcount table, refcounts of 16 bits, L1 table, L2 table, data.
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..5 + clusters {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    put(3 * CLUSTER, &(1 << 63 | 4 * CLUSTER as u64).to_be_bytes());
    for (i, entry) in l2.iter().enumerate() {
        put(4 * CLUSTER + 8 * i, &entry.to_be_bytes());
    }
    for cluster in 0..clusters {
        put((5 + cluster) * CLUSTER, &[cluster as u8 + 1; CLUSTER]);
    }
    image
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut steps = [0; 64];
    for (i, step) in steps.chunks_exact_mut(7).enumerate() {
        step.copy_from_slice(&[
            4 + 2 * (i as u8 % 5),
            0x5a,
            1,
            (i as u8).wrapping_mul(0x40),
            4 * i as u8,
            3,
            0,
        ]);
    }
    let data = |cluster: u64| 1 << 63 | 512 * cluster;
    // Data, a hole, zeroes, zeroes with their cluster; a compressed cluster; a backing file, which is the image itself.
    let plain = small(40_000, &[data(5), 0, 1, data(6) | 1, data(7)], 3);
    let packed = small(32_768, &[1 << 62 | 5 * 512, data(6)], 2);
    let mut backed = small(32_768, &[data(5)], 1);
    backed[8..16].copy_from_slice(&200u64.to_be_bytes());
    backed[16..20].copy_from_slice(&5u32.to_be_bytes());
    backed[104..112].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 5]);
    backed[112..117].copy_from_slice(b"qcow2");
    backed[200..205].copy_from_slice(b"image");
    let mut dirty = plain.clone();
    dirty[79] = 1;
    let mut seeds = Vec::new();
    for (flags, image) in [
        (0u8, &plain),
        (2, &plain),
        (1, &plain),
        (0, &packed),
        (1, &packed),
        (5, &backed),
        (0, &dirty),
    ] {
        seeds.push([&[flags, 8][..], &steps, image].concat());
    }
    seeds
}
