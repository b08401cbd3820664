use std::path::Path;

use proptest::prelude::*;

use super::common::status;
use super::*;
use crate::Rng;
use crate::testing::{BAR_ADDRESS, BUFFERS, Driver, EVENT_IDX, INDIRECT, INDIRECT_FLAG, NEXT, VERSION_1, WRITE};
use crate::testing::{memory, write_desc};

fn rng() -> Rng {
    Rng::new(Path::new("/dev/urandom")).unwrap()
}

#[test]
fn every_structure_is_found_by_its_capability() {
    let driver = Driver::idle(rng(), memory());
    let config = |at: u16, len: usize| {
        let mut bytes = [0; 4];
        driver.pci.config_read(at, &mut bytes[..len]);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(config(0, 4), 0x1044_1af4);
    let mut at = config(0x34, 1) as u16;
    let mut kinds = Vec::new();
    while at != 0 {
        if config(at, 1) == 9 {
            kinds.push(config(at + 3, 1));
            assert!(u64::from(config(at + 8, 4) + config(at + 12, 4)) <= BAR_SIZE);
            assert_eq!(config(at + 4, 1), 0);
        }
        at = config(at + 1, 1) as u16;
    }
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert_eq!(*driver.machine.registered.lock().unwrap(), [BAR_ADDRESS + NOTIFY]);
}

#[test]
fn features_are_accepted_only_with_version_1_and_only_offered_ones() {
    let driver = Driver::idle(rng(), memory());
    for (features, accepted) in [
        (0, false),
        (VERSION_1 | 1 << 40, false),
        (VERSION_1 | 1, false),
        (VERSION_1, true),
    ] {
        driver.write(0x14, 1, 0);
        for value in [1, 3] {
            driver.write(0x14, 1, value);
        }
        for word in 0..2 {
            driver.write(8, 4, word);
            driver.write(12, 4, features >> (32 * word) & 0xffff_ffff);
        }
        driver.write(0x14, 1, 11);
        assert_eq!(driver.status() & status::FEATURES_OK != 0, accepted, "{features:#x}");
        if !accepted {
            driver.write(0x14, 1, 15);
            assert_eq!(
                driver.status() & status::DRIVER_OK,
                0,
                "no DRIVER_OK without FEATURES_OK"
            );
        }
    }
    // Too late to change them.
    driver.write(8, 4, 0);
    driver.write(12, 4, EVENT_IDX);
    assert_eq!(driver.read(12, 4), 0);
}

#[test]
fn a_queue_that_cannot_be_fails_the_device() {
    for (offset, len, value) in [
        (0x18, 2, 3),
        (0x18, 2, 0x8000),
        (0x18, 2, 0),
        (0x20, 8, 0x1001),
        (0x20, 8, !0xf),
        (0x28, 8, 0x1000_0000),
        (0x28, 8, 0),
        (0x30, 8, 0xff_ffff_fffc),
    ] {
        let mut driver = Driver::idle(rng(), memory());
        for value in [1, 3] {
            driver.write(0x14, 1, value);
        }
        driver.write(8, 4, 1);
        driver.write(12, 4, 1);
        driver.write(0x14, 1, 11);
        let rings = [(0x20, 0x1_0000), (0x28, 0x1_8000), (0x30, 0x1_a000)];
        for (at, address) in rings {
            driver.write(at, 8, address);
        }
        driver.write(offset, len, value);
        driver.write(0x1c, 2, 1);
        driver.write(0x14, 1, 15);
        assert_ne!(driver.status() & status::NEEDS_RESET, 0, "{offset:#x} {value:#x}");
        driver.notify(0);
        driver.bring_up(0);
        driver.add(0, &[(BUFFERS, 4, true)]);
        driver.notify(0);
        assert_eq!(driver.wait_used(0, 1), [(0, 4)]);
    }
}

#[test]
fn malformed_chains_fail_the_device() {
    let table = BUFFERS + 0x8000;
    let direct = |descs: Vec<(u64, u32, u16, u16)>| (descs, Vec::new());
    let cases = [
        (
            "a loop",
            direct(vec![(BUFFERS, 8, NEXT | WRITE, 1), (BUFFERS, 8, NEXT | WRITE, 0)]),
        ),
        ("an index out of range", direct(vec![(BUFFERS, 8, NEXT | WRITE, 9999)])),
        ("an address out of RAM", direct(vec![(1 << 40, 8, WRITE, 0)])),
        (
            "a buffer over the end of RAM",
            direct(vec![(crate::testing::RAM - 4, 8, WRITE, 0)]),
        ),
        ("an address that wraps", direct(vec![(u64::MAX - 3, 8, WRITE, 0)])),
        ("nothing to write", direct(vec![(BUFFERS, 0, WRITE, 0)])),
        (
            "reading after writing",
            direct(vec![(BUFFERS, 8, NEXT | WRITE, 1), (BUFFERS, 8, 0, 0)]),
        ),
        (
            "a table of odd length",
            (vec![(table, 17, INDIRECT_FLAG, 0)], vec![(BUFFERS, 8, WRITE, 0)]),
        ),
        ("an empty table", (vec![(table, 0, INDIRECT_FLAG, 0)], vec![])),
        ("a table out of RAM", (vec![(1 << 40, 16, INDIRECT_FLAG, 0)], vec![])),
        (
            "a table in a table",
            (vec![(table, 16, INDIRECT_FLAG, 0)], vec![(table, 16, INDIRECT_FLAG, 0)]),
        ),
        (
            "a loop in a table",
            (vec![(table, 16, INDIRECT_FLAG, 0)], vec![(BUFFERS, 8, WRITE | NEXT, 0)]),
        ),
    ];
    let mut driver = Driver::start(rng(), INDIRECT);
    for (what, (descs, indirect)) in cases {
        for (i, desc) in descs.iter().enumerate() {
            write_desc(&driver.memory, driver.queues[0].desc, i as u16, *desc);
        }
        for (i, desc) in indirect.iter().enumerate() {
            write_desc(&driver.memory, table, i as u16, *desc);
        }
        let before = driver.machine.raised(0);
        driver.make_available(0, 0);
        driver.notify(0);
        driver.wait_for(what, |driver| driver.status() & status::NEEDS_RESET != 0);
        driver.machine.wait(0, before);
        assert!(driver.used(0).is_empty(), "{what}");
        driver.bring_up(INDIRECT);
    }
    // A head out of range, and an available index that runs ahead.
    driver.make_available(0, 5000);
    driver.notify(0);
    driver.wait_failed();
    driver.bring_up(INDIRECT);
    driver.put(driver.queues[0].avail + 2, &40_000u16.to_le_bytes());
    driver.notify(0);
    driver.wait_failed();
    driver.bring_up(INDIRECT);
    // And a good table.
    write_desc(&driver.memory, table, 0, (BUFFERS, 8, WRITE | NEXT, 1));
    write_desc(&driver.memory, table, 1, (BUFFERS + 64, 8, WRITE, 0));
    write_desc(&driver.memory, driver.queues[0].desc, 0, (table, 32, INDIRECT_FLAG, 0));
    driver.make_available(0, 0);
    driver.notify(0);
    assert_eq!(driver.wait_used(0, 1), [(0, 16)]);
}

#[test]
fn interrupts_are_suppressed_by_flag_and_by_event_index() {
    let mut driver = Driver::start(rng(), 0);
    let no_interrupt = driver.queues[0].avail;
    driver.put(no_interrupt, &1u16.to_le_bytes());
    driver.add(0, &[(BUFFERS, 4, true)]);
    driver.notify(0);
    driver.wait_used(0, 1);
    // Under the lock: the worker is done with its batch.
    driver.handle.pause();
    assert_eq!(driver.machine.raised(1), 0);
    driver.handle.resume();

    driver.bring_up(EVENT_IDX);
    let before = driver.machine.raised(1);
    driver.put(driver.queues[0].avail + 4 + 2 * 256, &2u16.to_le_bytes());
    for expected in [before, before, before + 1] {
        driver.add(0, &[(BUFFERS, 4, true)]);
        driver.notify(0);
        let at = driver.queues[0].used + 2;
        let want = u16::from_le_bytes(driver.get(driver.queues[0].avail + 2, 2).try_into().unwrap());
        driver.wait_for("the used index", |d| d.get(at, 2) == want.to_le_bytes());
        driver.handle.pause();
        assert_eq!(driver.machine.raised(1), expected);
        driver.handle.resume();
    }
}

#[test]
fn the_bar_moves_and_notifications_follow() {
    let driver = Driver::idle(rng(), memory());
    let to = 0x7_0000_0000u64;
    driver.pci.config_write(4, &[0, 0]);
    assert!(driver.machine.registered.lock().unwrap().is_empty());
    driver.pci.config_write(0x10, &(to as u32).to_le_bytes());
    driver.pci.config_write(0x14, &((to >> 32) as u32).to_le_bytes());
    driver.pci.config_write(4, &[6, 0]);
    assert_eq!(driver.pci.mapped_bars(), [(0, to, BAR_SIZE)]);
    assert_eq!(*driver.machine.registered.lock().unwrap(), [to + NOTIFY]);
    // Where nothing can be.
    driver.pci.config_write(0x10, &[0xff; 4]);
    driver.pci.config_write(0x14, &[0xff; 4]);
    driver.handle.reset().unwrap();
    assert_eq!(*driver.machine.registered.lock().unwrap(), [BAR_ADDRESS + NOTIFY]);
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_bar() {
    let driver = Driver::idle(rng(), memory());
    let mut at = [0];
    driver.pci.config_read(0x34, &mut at);
    let mut head = [0; 4];
    loop {
        driver.pci.config_read(u16::from(at[0]), &mut head);
        if head[0] == 9 && head[3] == 5 {
            break;
        }
        at[0] = head[1];
    }
    let window = u16::from(at[0]);
    driver.pci.config_write(window + 4, &[0]);
    driver.pci.config_write(window + 8, &0x14u32.to_le_bytes());
    driver.pci.config_write(window + 12, &1u32.to_le_bytes());
    driver.pci.config_write(window + 16, &[1]);
    assert_eq!(driver.status(), 1);
    let mut value = [0];
    driver.pci.config_read(window + 16, &mut value);
    assert_eq!(value, [1]);
    // Windows that lie badly do nothing.
    for (offset, len) in [(u32::MAX, 4u32), (0x7ffe, 4), (0, 3), (0, 0), (0, u32::MAX)] {
        driver.pci.config_write(window + 8, &offset.to_le_bytes());
        driver.pci.config_write(window + 12, &len.to_le_bytes());
        driver.pci.config_write(window + 16, &[0xff; 4]);
        driver.pci.config_read(window + 16, &mut [0; 4]);
    }
    assert_eq!(driver.status(), 1);
}

#[test]
fn isr_status_is_cleared_by_reading() {
    let mut driver = Driver::start(rng(), 0);
    driver.add(0, &[(BUFFERS, 4, true)]);
    driver.notify(0);
    driver.machine.wait(1, 0);
    assert_eq!(driver.read(ISR, 1), 1);
    assert_eq!(driver.read(ISR, 1), 0);
}

#[test]
fn states_of_other_devices_and_hostile_states_are_refused() {
    let driver = Driver::start(rng(), 0);
    driver.handle.pause();
    let good = driver.handle.state();
    let mut bad = good.clone();
    bad.transport.version = 9;
    assert!(driver.handle.set_state(&bad).is_err());
    let mut bad = good.clone();
    bad.transport.queues.push(bad.transport.queues[0].clone());
    assert!(driver.handle.set_state(&bad).is_err());
    let mut bad = good.clone();
    bad.transport.driver_features |= 1 << 50;
    assert!(driver.handle.set_state(&bad).is_err());
    for change in [
        |q: &mut persist::RingState| q.size = 3,
        |q: &mut persist::RingState| q.used = u64::MAX,
        |q: &mut persist::RingState| q.desc = 1,
    ] {
        let mut bad = good.clone();
        change(&mut bad.transport.queues[0]);
        assert!(driver.handle.set_state(&bad).is_err());
    }
    driver.handle.set_state(&good).unwrap();
    assert_eq!(driver.handle.state(), good);
}

#[test]
fn holds_add_up() {
    let mut driver = Driver::start(rng(), 0);
    driver.handle.pause();
    driver.handle.pause();
    driver.handle.resume();
    driver.add(0, &[(BUFFERS, 4, true)]);
    driver.notify(0);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(driver.used(0).is_empty());
    driver.handle.resume();
    driver.wait_used(0, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn odd_accesses_are_harmless(
        accesses in prop::collection::vec((any::<bool>(), any::<bool>(), 0..0x9000u64, 1..9usize, any::<u64>()), 1..200)
    ) {
        let mut driver = Driver::start(rng(), 0);
        for (config, write, offset, len, value) in accesses {
            let mut data = value.to_le_bytes();
            match (config, write) {
                (true, true) => driver.pci.config_write(offset as u16 & 0xfff, &data[..len]),
                (true, false) => driver.pci.config_read(offset as u16 & 0xfff, &mut data[..len]),
                (false, true) => driver.pci.bar_write(0, offset, &data[..len]),
                (false, false) => driver.pci.bar_read(0, offset, &mut data[..len]),
            }
        }
        driver.handle.reset().unwrap();
        driver.bring_up(0);
        driver.add(0, &[(BUFFERS, 4, true)]);
        driver.notify(0);
        prop_assert_eq!(driver.wait_used(0, 1), [(0, 4)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn any_saved_queue_is_refused_or_fails_the_device_at_most(
        size in any::<u16>(), desc in 0..0x200_0000u64, avail in 0..0x200_0000u64, used in 0..0x200_0000u64,
        indexes in any::<(u16, u16)>(), aligned in any::<bool>(), status in any::<u8>(), vector in any::<u16>(),
    ) {
        let mut driver = Driver::start(rng(), 0);
        driver.handle.pause();
        let mut state = driver.handle.state();
        let mask = if aligned { !0xf } else { !0 };
        state.transport.status = status;
        state.transport.queues[0] = persist::RingState {
            size: if aligned { 1 << (size % 10) } else { size },
            enabled: true,
            desc: desc & mask,
            avail: avail & mask,
            used: used & mask,
            vector,
            next_avail: indexes.0,
            next_used: indexes.1,
        };
        driver.handle.set_state(&state).ok();
        driver.handle.kick();
        driver.handle.resume();
        driver.notify(0);
        driver.handle.pause();
        driver.handle.resume();
        driver.bring_up(0);
        driver.add(0, &[(BUFFERS, 4, true)]);
        driver.notify(0);
        prop_assert_eq!(driver.wait_used(0, 1), [(0, 4)]);
    }
}
