use std::io::Cursor;

use proptest::prelude::*;

use super::*;

type Memory = vm_memory::GuestMemoryMmap<()>;

const RAM: u64 = 64 << 20;

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

/// A PVH ELF: one segment of `body` at `paddr`, and the entry note.
fn elf(paddr: u64, body: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 0x100];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, data: &[u8]| file[at..at + data.len()].copy_from_slice(data);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(64 + 8, &0x100u64.to_le_bytes());
    put(64 + 24, &paddr.to_le_bytes());
    put(64 + 32, &(body.len() as u64).to_le_bytes());
    put(64 + 40, &(body.len() as u64 + 0x1000).to_le_bytes());
    put(120, &4u32.to_le_bytes());
    put(120 + 8, &0xb0u64.to_le_bytes());
    put(120 + 32, &20u64.to_le_bytes());
    put(0xb0, &4u32.to_le_bytes());
    put(0xb4, &4u32.to_le_bytes());
    put(0xb8, &18u32.to_le_bytes());
    put(0xbc, b"Xen\0");
    put(0xc0, &(paddr as u32).to_le_bytes());
    file.extend_from_slice(body);
    file
}

fn bzimage() -> Vec<u8> {
    let mut file = vec![0u8; 0x2000];
    let mut put = |at: usize, data: &[u8]| file[at..at + data.len()].copy_from_slice(data);
    put(0x1f1, &[1]);
    put(0x201, &[0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &100u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x400, b"kernel");
    file
}

fn boot(memory: &Memory, kernel: Vec<u8>, initramfs: Option<Vec<u8>>, cmdline: &str) -> Result<BootRegisters, Error> {
    let mut initramfs = initramfs.map(Cursor::new);
    load(memory, &mut Cursor::new(kernel), initramfs.as_mut(), cmdline, 0xe_0000)
}

fn bytes(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    memory.read_slice(&mut data, GuestAddress(at)).unwrap();
    data
}

#[test]
fn pvh_start_info_names_everything() {
    let memory = memory();
    let regs = boot(&memory, elf(0x10_0000, b"code"), Some(vec![7; 5000]), "a=b").unwrap();
    assert_eq!(
        regs,
        BootRegisters::Pvh {
            entry: 0x10_0000,
            start_info: START_INFO
        }
    );
    assert_eq!(bytes(&memory, 0x10_0000, 4), b"code");
    let info = bytes(&memory, START_INFO, 56);
    assert_eq!((u32_at(&info, 0), u32_at(&info, 12)), (0x336e_c578, 1));
    assert_eq!(bytes(&memory, u64_at(&info, 24), 4), b"a=b\0");
    assert_eq!(u64_at(&info, 32), 0xe_0000);
    let module = bytes(&memory, u64_at(&info, 16), 32);
    assert_eq!(u64_at(&module, 8), 5000);
    assert_eq!(bytes(&memory, u64_at(&module, 0), 5000), vec![7; 5000]);
    let map = bytes(&memory, u64_at(&info, 40), 24 * u32_at(&info, 48) as usize);
    let ram: u64 = map
        .chunks(24)
        .filter(|e| u32_at(e, 16) == E820_RAM)
        .map(|e| u64_at(e, 8))
        .sum();
    assert_eq!(ram, RAM - (layout::EXTENDED_START - layout::CONVENTIONAL_END));
}

#[test]
fn bzimage_gets_a_zero_page_and_long_mode() {
    let memory = memory();
    let regs = boot(&memory, bzimage(), Some(vec![9; 100]), "quiet").unwrap();
    assert!(matches!(
        regs,
        BootRegisters::Linux64 {
            entry: 0x20_0200,
            gdt_size: 48,
            ..
        }
    ));
    assert_eq!(bytes(&memory, BZIMAGE_START, 6), b"kernel");
    let zero_page = bytes(&memory, ZERO_PAGE, 4096);
    assert_eq!(&zero_page[0x202..0x206], b"HdrS");
    assert_eq!(u64_at(&zero_page, 0x70), 0xe_0000);
    assert_eq!(bytes(&memory, u32_at(&zero_page, 0x218).into(), 100), vec![9; 100]);
    assert_eq!(u64_at(&bytes(&memory, PAGE_DIRECTORIES + 4096 + 8, 8), 0), 0x4020_0083);
}

#[test]
fn refusals_say_why() {
    let m = memory();
    assert!(matches!(boot(&m, b"#!/bin/sh".to_vec(), None, ""), Err(Error::Unknown)));
    assert!(matches!(boot(&m, Vec::new(), None, ""), Err(Error::Unknown)));
    assert!(matches!(boot(&m, elf(0x1000, b"x"), None, ""), Err(Error::Image(_))));
    assert!(matches!(
        boot(&m, elf(RAM, b"x"), None, ""),
        Err(Error::TooLarge { .. })
    ));
    assert!(matches!(
        boot(&m, elf(0x10_0000, b"x"), None, &"x".repeat(2048)),
        Err(Error::Cmdline { .. })
    ));
    assert!(matches!(
        boot(&m, elf(0x10_0000, b"x"), None, "a\0b"),
        Err(Error::CmdlineNul)
    ));
    assert!(matches!(
        boot(&m, bzimage(), None, &"x".repeat(101)),
        Err(Error::Cmdline { max: 100, .. })
    ));
    assert!(matches!(
        boot(&m, elf(0x10_0000, b"x"), Some(vec![0; RAM as usize]), ""),
        Err(Error::TooLarge { .. })
    ));
    let mut no_note = elf(0x10_0000, b"x");
    no_note[0xb8] = 1;
    assert!(matches!(boot(&m, no_note, None, ""), Err(Error::NoPvh)));
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(matches!(boot(&m, old, None, ""), Err(Error::No64BitEntry(0x20f))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_images_never_panic(
        which: bool,
        damage in prop::collection::vec((0usize..0x280, any::<u8>()), 1..12),
        keep in 0usize..0x2100,
    ) {
        let mut image = if which { elf(0x10_0000, &[0x90; 64]) } else { bzimage() };
        for (at, value) in damage {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        image.truncate(keep.max(1));
        let _ = boot(&memory(), image, None, "x");
    }
}
