//! The tap, in a network namespace of the test's own. Needs root and /dev/net/tun.

use std::io::Write;

use super::tap::{Tap, TapOptions};
use super::tests::{HEADER, MAC, frame, options};
use super::*;
use crate::testing::{BUFFERS, Driver};

/// Runs `f` in a network namespace of its own.
fn in_namespace(f: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        // SAFETY: unshare(2) changes this thread alone.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "needs root: {}", io::Error::last_os_error());
        f();
    })
    .join()
    .unwrap();
}

/// A packet socket on interface `name`.
fn packet_socket(name: &str) -> std::fs::File {
    use std::os::fd::FromRawFd;
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: system calls with valid arguments; the descriptor is owned by the file.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW,
            i32::from((libc::ETH_P_ALL as u16).to_be()),
        );
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(fd, std::ptr::from_ref(&address).cast(), len), 0);
        std::fs::File::from_raw_fd(fd)
    }
}

fn exists(name: &str) -> bool {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a NUL-terminated name.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

#[test]
fn a_tap_carries_frames_and_is_gone_when_it_is_closed_needs_root() {
    in_namespace(|| {
        let tap = Tap::open(&TapOptions {
            name: Some("testtap0".into()),
            ip: Some("10.9.8.1".parse().unwrap()),
            mask: Some("255.255.255.0".parse().unwrap()),
            host_mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: Some(1400),
        })
        .unwrap();
        assert_eq!(tap.name(), "testtap0");
        let again = Tap::open(&TapOptions {
            name: Some("testtap0".into()),
            ..TapOptions::default()
        });
        assert!(
            again.unwrap_err().to_string().contains("testtap0"),
            "a tap has one user"
        );
        let mut wire = packet_socket("testtap0");
        let mut driver = Driver::start(Net::new(options(), Box::new(tap)), feature::MRG_RXBUF);
        for n in 0..32 {
            driver.add(RX, &[(BUFFERS + 0x1000 * n, 2000, true)]);
        }
        driver.notify(RX);

        // Out: a request for the host's address by ARP, and the host's answer in.
        let mut request = vec![0; HEADER];
        request.extend(
            [0xff; 6]
                .iter()
                .chain(&MAC)
                .chain(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1])
                .chain(&MAC),
        );
        request.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
        let at = BUFFERS + 0x10_0000;
        driver.put(at, &request);
        driver.add(TX, &[(at, request.len() as u32, false)]);
        driver.notify(TX);
        driver.wait_used(TX, 1);
        let mut answer = None;
        driver.wait_for("the host's ARP answer", |driver| {
            for (head, len) in driver.used(RX) {
                let frame = driver.get(BUFFERS + 0x1000 * u64::from(head), len as usize);
                assert_eq!(frame[10..12], 1u16.to_le_bytes());
                if frame[HEADER + 12..HEADER + 14] == [8, 6] && frame[HEADER + 20..HEADER + 22] == [0, 2] {
                    answer = Some(frame);
                }
            }
            answer.is_some()
        });
        let answer = answer.unwrap();
        assert_eq!(answer[HEADER..HEADER + 6], MAC);
        assert_eq!(answer[HEADER + 22..HEADER + 28], [2, 0, 0, 0, 0, 1]);
        assert_eq!(
            driver.handle.device.core().model.learned,
            [LearnedAddress::V4([10, 9, 8, 2])]
        );

        // In: what a host program sends on the interface.
        let mut sent = MAC.to_vec();
        sent.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
        sent.extend(frame(100, 6));
        wire.write_all(&sent).unwrap();
        driver.wait_for("the frame", |driver| {
            driver
                .used(RX)
                .iter()
                .any(|(head, len)| driver.get(BUFFERS + 0x1000 * u64::from(*head), *len as usize)[HEADER..] == sent)
        });
        driver.handle.shutdown();
        assert!(!exists("testtap0"), "the tap outlives its device");
        drop(driver);
    });
}

#[test]
fn taps_get_names_and_bad_names_are_refused_needs_root() {
    in_namespace(|| {
        let first = Tap::open(&TapOptions::default()).unwrap();
        let second = Tap::open(&TapOptions {
            ip: Some("fd00::1".parse().unwrap()),
            ..TapOptions::default()
        })
        .unwrap();
        assert!(exists(first.name()) && exists(second.name()) && first.name() != second.name());
        for name in ["a name of more than fifteen bytes", "a/b", "nul\0"] {
            let options = TapOptions {
                name: Some(name.into()),
                ..TapOptions::default()
            };
            assert!(Tap::open(&options).is_err(), "{name}");
        }
    });
}
