//! Stock Linux guests on the VMM, on real KVM. These need qemu-system-x86_64 and the images of `scripts/images`.

use std::time::Duration;

use bed2::bed::check_file_system;
use bed2::{Bed, Host, Spec};

/// Hang guard of a step: guests run nested and emulated.
const STEP: Duration = Duration::from_secs(300);

fn run(host: &mut Host, command: &str) -> String {
    host.run(command, STEP).expect("the command inside the nested host")
}

/// A line of `NAME VALUE` in a command's output.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
}

/// The kernel as bzImage and as PVH ELF; a snapshot comes back in another process, with its RAM and its connection.
#[test]
fn busybox_boots_both_ways_and_comes_back_from_a_snapshot() {
    let mut bed = Bed::start(Spec::new("quick-guest", 1)).unwrap();
    let host = bed.host("a");
    for kernel in ["vmlinux", "vmlinuz"] {
        run(
            host,
            &format!(
                "ip link del tap0 2>/dev/null; tap tap0
                 vmm q --cpus boot=1 --memory size=256M --kernel /images/guest/{kernel} --initramfs /images/quick/initrd \
                     --cmdline \"$QUICK_CMDLINE\" --net tap=tap0,mac=52:54:00:00:00:02 \
                     --serial file=$LOGS/quick-{kernel}.log --console off
                 wait_for 120 \"{kernel} to boot\" open_port 7
                 [ \"$(echo hello | timeout 10 nc -N 192.168.100.2 7)\" = hello ] || fail echo
                 wait_for 30 'the last line of the boot' grep -q 'quick: ready, 1 vCPUs' $LOGS/quick-{kernel}.log"
            ),
        );
        if kernel == "vmlinux" {
            run(host, "remote q power-button; wait_for 30 power-off ended q");
        }
    }
    run(
        host,
        "quick 'echo kept >/tmp/file'
         remote q pause; mkdir /tmp/snapshot; remote q snapshot file:///tmp/snapshot; remote q shutdown-vmm
         wait_for 30 'the end of the first VMM' ended q
         cloud-hypervisor --api-socket /run/r.sock --log-file $LOGS/a-r.log -v --restore source_url=file:///tmp/snapshot \
             >$LOGS/a-r.out 2>&1 3>&- & echo $! >/run/r.pid
         wait_for 30 'the restored VMM' remote r info
         remote r resume
         wait_for 30 'the restored guest' open_port 7
         [ \"$(quick 'cat /tmp/file')\" = kept ] || fail 'the guest forgot'
         remote r power-button; wait_for 30 power-off ended r",
    );
    bed.passed();
}

/// The Debian guest: two processors, disk, network, random numbers, clock, serial console; reboot, power button.
#[test]
fn debian_boots_to_ssh_reboots_and_powers_off() {
    let mut bed = Bed::start(Spec::new("debian-guest", 1).guest_disk(0, "guest").unwrap()).unwrap();
    let host = bed.host("a");
    run(
        host,
        "tap tap0
         vmm d --cpus boot=2 --memory size=512M --kernel /images/guest/vmlinuz --initramfs /images/guest/initrd \
             --cmdline \"$GUEST_CMDLINE\" --disk path=/dev/bed/guest --net tap=tap0,mac=52:54:00:00:00:02 \
             --serial file=$LOGS/debian.log --console off
         guest_up 280",
    );
    let seen = run(
        host,
        r#"ssh guest '
            echo cpus $(nproc)
            echo memory $(awk "/MemTotal/ { print \$2 }" /proc/meminfo)
            echo pci $(lspci -n | grep -c 1af4:)
            echo random $(head -c 8 /dev/hwrng | od -An -tx1 | wc -w)
            echo failed $(systemctl --failed --no-legend | wc -l)
            echo clock $(( $(date +%s) ))
            echo disk $(blockdev --getsize64 /dev/vda)
            echo boot $(cat /proc/sys/kernel/random/boot_id)
            dd if=/dev/urandom of=/root/file bs=1M count=8 conv=fsync 2>/dev/null; echo sum $(md5sum </root/file | cut -c1-32)'
           echo now $(date +%s)
           echo size $(blockdev --getsize64 /dev/bed/guest)"#,
    );
    assert_eq!(value(&seen, "cpus"), "2");
    let memory: u64 = value(&seen, "memory").parse().unwrap();
    assert!((440_000..=524_288).contains(&memory), "{memory} KiB of 512 MiB");
    assert_eq!(value(&seen, "pci"), "3", "network, disk, random numbers");
    assert_eq!(value(&seen, "random"), "8");
    assert_eq!(value(&seen, "failed"), "0");
    assert_eq!(value(&seen, "disk"), value(&seen, "size"));
    let clock = |name| value(&seen, name).parse::<i64>().unwrap();
    assert!((clock("clock") - clock("now")).abs() < 60, "{seen}");

    let again = run(
        host,
        r#"ssh guest reboot
           old=BOOT
           is_down() { ! open_port 22; }
           wait_for 120 'the guest to go down' is_down
           guest_up 280
           [ "$(ssh guest cat /proc/sys/kernel/random/boot_id)" != "$old" ] || fail 'it did not reboot'
           ssh guest 'echo cpus $(nproc); echo sum $(md5sum </root/file | cut -c1-32)'
           remote d power-button
           wait_for 120 power-off ended d"#
            .replace("BOOT", value(&seen, "boot"))
            .as_str(),
    );
    assert_eq!(value(&again, "cpus"), "2");
    assert_eq!(value(&again, "sum"), value(&seen, "sum"));
    bed.power_off().unwrap();
    check_file_system(&bed.disk("a", "guest").unwrap()).unwrap();
    let serial = std::fs::read_to_string(bed.out().join("logs/debian.log")).unwrap();
    assert!(
        serial.contains("guest login:"),
        "the serial console shows no login:\n{serial}"
    );
    bed.passed();
}
