//! Kernel images: the loaders on guest RAM of 16 MiB.

use std::io::Cursor;

use arch::kernel::load;
use hypervisor::BootRegisters;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::input::Input;
use crate::reach::reached;

const RAM: usize = 16 << 20;

/// The target. Two bytes choose initramfs and command line, the rest is the image.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (initramfs, cmdline) = (input.u8(), usize::from(input.u8()));
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory for the guest");
    let mut initramfs = match initramfs {
        0 => None,
        n => Some(Cursor::new(vec![7u8; usize::from(n) << 12])),
    };
    let mut kernel = Cursor::new(input.rest().to_vec());
    let loaded = load(&memory, &mut kernel, initramfs.as_mut(), &"x".repeat(cmdline), 0xe_0000);
    let entry = match loaded {
        Ok(BootRegisters::Pvh { entry, .. }) => {
            reached("ELF loaded");
            entry
        }
        Ok(BootRegisters::Linux64 { entry, .. }) => {
            reached("bzImage loaded");
            entry
        }
        Err(_) => return,
    };
    assert!((0x10_0000..RAM as u64).contains(&entry), "an entry out of RAM");
}

fn put(file: &mut [u8], at: usize, data: &[u8]) {
    file[at..at + data.len()].copy_from_slice(data);
}

/// A PVH ELF of one segment and the entry note.
fn elf() -> Vec<u8> {
    let mut file = vec![0u8; 0x140];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    for (at, value) in [(16, 2u16), (18, 62), (52, 64), (54, 56), (56, 2)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 32, &64u64.to_le_bytes());
    // PT_LOAD: flags, offset, vaddr, paddr, sizes, alignment.
    put(&mut file, 64, &[1, 0, 0, 0, 5]);
    for (at, value) in [
        (8, 0x100u64),
        (16, 0x10_0000),
        (24, 0x10_0000),
        (32, 0x40),
        (40, 0x1000),
        (48, 0x1000),
    ] {
        put(&mut file, 64 + at, &value.to_le_bytes());
    }
    // PT_NOTE: Xen's XEN_ELFNOTE_PHYS32_ENTRY.
    put(&mut file, 120, &[4, 0, 0, 0, 4]);
    for (at, value) in [(8, 0xb0u64), (32, 20), (40, 20), (48, 4)] {
        put(&mut file, 120 + at, &value.to_le_bytes());
    }
    for (at, value) in [(0xb0, 4u32), (0xb4, 4), (0xb8, 18), (0xc0, 0x10_0000)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 0xbc, b"Xen\0");
    file
}

/// A bzImage of protocol 2.15 with a 64-bit entry.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0u8; 0x800];
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x201, &[0x66]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &200u32.to_le_bytes());
    put(&mut file, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut file, 0x260, &0x10_0000u32.to_le_bytes());
    file
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let image = |start: [u8; 2], image: Vec<u8>| [&start[..], &image].concat();
    vec![
        image([0, 10], elf()),
        image([2, 10], elf()),
        image([0, 10], bzimage()),
        image([1, 99], bzimage()),
    ]
}
