use std::path::Path;

use super::*;
use crate::testing::{BUFFERS, Driver, EVENT_IDX, is_dirty};

fn driver(features: u64) -> Driver<Rng> {
    Driver::start(Rng::new(Path::new("/dev/urandom")).unwrap(), features)
}

#[test]
fn buffers_are_filled_with_different_bytes() {
    let mut driver = driver(EVENT_IDX);
    let before = driver.machine.raised(1);
    driver.add(0, &[(BUFFERS, 32, true), (BUFFERS + 0x1000, 32, true)]);
    driver.notify(0);
    driver.machine.wait(1, before);
    assert_eq!(driver.wait_used(0, 1), [(0, 64)]);
    let (a, b) = (driver.get(BUFFERS, 32), driver.get(BUFFERS + 0x1000, 32));
    assert!(a != b && a != [0; 32]);
    assert!(is_dirty(&driver.memory, BUFFERS + 0x1000));
    // More than the device gives at once.
    driver.add(0, &[(BUFFERS, 1 << 20, true)]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0, 1), [(2, MAX_BYTES as u32)]);
}

#[test]
fn a_buffer_of_the_wrong_direction_fails_the_device_until_its_reset() {
    let mut driver = driver(0);
    driver.add(0, &[(BUFFERS, 32, false)]);
    driver.notify(0);
    driver.wait_failed();
    driver.machine.wait(0, 0);
    driver.bring_up(0);
    driver.add(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0, 1), [(0, 8)]);
}

#[test]
fn a_source_that_is_not_there_is_named() {
    let e = Rng::new(Path::new("/nonexistent/rng")).err().unwrap();
    assert!(e.to_string().contains("/nonexistent/rng"), "{e}");
}
