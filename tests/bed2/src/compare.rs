//! Figures of the Debian guest on our VMM beside QEMU's: same host, kernel, disk, network and guest size, in one run,
//! in alternation. The figures of nested, emulated machines say little; their ratios say how the two VMMs compare.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::bed::{Bed, Spec};
use crate::figures::{self, Spread};
use crate::host::Host;

/// Hang guard of one guest's life.
const LIFE: Duration = Duration::from_secs(900);

/// Repetitions of one guest's life.
const MAX_LOST: u32 = 2;

/// The figures: name in the script's output, what it is, whether less is better.
const FIGURES: [(&str, &str, bool); 7] = [
    ("boot_ms", "boot to ssh port, ms", true),
    ("read_iops", "disk, 4 KiB random reads/s", false),
    ("write_iops", "disk, 4 KiB random writes/s", false),
    ("read_mib", "disk, sequential read MiB/s", false),
    ("write_mib", "disk, sequential write MiB/s", false),
    ("to_guest_mbit", "network to the guest, Mbit/s", false),
    ("from_guest_mbit", "network from the guest, Mbit/s", false),
];

/// Options of `scripts/bed2 compare`.
#[derive(Args)]
pub struct Options {
    /// Runs of each VMM, in alternation
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4)]
    pub seconds: u32,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What both guests have in common; then what is measured in them.
const COMMON: &str = r#"
    disk=/dev/bed/guest
    ip link del tap0 2>/dev/null
    tap tap0
    start=${EPOCHREALTIME/./}
"#;
const OURS: &str = r#"
    cloud-hypervisor --cpus boot=$CPUS --memory size=512M --kernel /images/guest/vmlinuz --initramfs /images/guest/initrd \
        --cmdline "$GUEST_CMDLINE" --disk path=$disk --net tap=tap0,mac=52:54:00:00:00:02 \
        --serial file=$LOGS/compare-ours.log --console off --log-file $LOGS/a-ours.log 3>&- &
"#;
const QEMU: &str = r#"
    qemu-system-x86_64 -accel kvm -machine q35 -cpu host -smp $CPUS -m 512 -nodefaults -no-reboot -display none \
        -serial file:$LOGS/compare-qemu.log -kernel /images/guest/vmlinuz -initrd /images/guest/initrd \
        -append "$GUEST_CMDLINE" -drive if=none,id=disk,format=raw,file=$disk,cache=writeback \
        -device virtio-blk-pci,drive=disk -netdev tap,id=net,ifname=tap0,script=no,downscript=no \
        -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:02 -device virtio-rng-pci 3>&- &
"#;
const MEASURE: &str = r#"
    vmm=$!
    wait_for 400 'the ssh port' open_port 22
    echo boot_ms $(( (${EPOCHREALTIME/./} - start) / 1000 ))
    wait_for 60 ssh ssh guest true
    sleep 5 # the rest of the services
    disk_test() {
      ssh guest "fio --name=x --filename=/root/fio --size=128M --direct=1 --ioengine=libaio --iodepth=16 --runtime=$TIME \
        --time_based --output-format=json $1" | jq -r ".jobs[0].$2"
    }
    ssh guest 'dd if=/dev/zero of=/root/fio bs=1M count=128 conv=fsync 2>/dev/null'
    echo read_iops $(disk_test '--rw=randread --bs=4k' read.iops)
    echo write_iops $(disk_test '--rw=randwrite --bs=4k' write.iops)
    echo read_mib $(disk_test '--rw=read --bs=1M' 'read.bw / 1024')
    echo write_mib $(disk_test '--rw=write --bs=1M' 'write.bw / 1024')
    net_test() { iperf3 -J -t $TIME -c 192.168.100.2 $1 | jq -r '.end.sum_received.bits_per_second / 1e6'; }
    wait_for 60 iperf3 open_port 5201
    sleep 1
    echo to_guest_mbit $(net_test)
    echo from_guest_mbit $(net_test -R)
    ssh guest poweroff
    gone() { ! kill -0 $vmm; }
    wait_for 120 power-off gone
"#;

/// Measures and prints.
pub fn run(options: &Options) -> Result<()> {
    let (mut ours, mut qemu) = (Vec::new(), Vec::new());
    for round in 1..=options.runs {
        let one = |vmm: &str, start: &str, figures: &mut Vec<Vec<f64>>| {
            eprintln!("bed 2: round {round} of {}: {vmm}", options.runs);
            guest_life(options, start).map(|found| figures.push(found))
        };
        // In turns, so that neither always finds the machine as the other left it.
        if round % 2 == 1 {
            one("our VMM", OURS, &mut ours)?;
            one("QEMU", QEMU, &mut qemu)?;
        } else {
            one("QEMU", QEMU, &mut qemu)?;
            one("our VMM", OURS, &mut ours)?;
        }
    }
    let mut rows = Vec::new();
    for (i, (name, what, less)) in FIGURES.into_iter().enumerate() {
        let (a, b) = (Spread::nth(&ours, i), Spread::nth(&qemu, i));
        // Above 1: our VMM is better.
        let ratio = if less { b.median / a.median } else { a.median / b.median };
        rows.push((name, what, a, b, ratio));
    }
    if options.json {
        let figures: Vec<_> = rows
            .iter()
            .map(|(name, _, a, b, ratio)| json!({"name": name, "ours": a, "qemu": b, "ratio": ratio}))
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"runs": options.runs, "figures": figures}))?
        );
    } else {
        let head = "median (least - most)";
        println!("{head:32} {:>26} {:>26} {:>16}", "ours", "QEMU", "ours is better x");
        for (_, what, a, b, ratio) in rows {
            println!("{what:32} {:>26} {:>26} {ratio:16.2}", a.cell(1), b.cell(1));
        }
    }
    Ok(())
}

/// One guest's life on a fresh host; repeated when the emulated host crashes or hangs.
fn guest_life(options: &Options, start: &str) -> Result<Vec<f64>> {
    let once = || -> Result<Vec<f64>> {
        let mut bed = Bed::start(Spec::new("compare", 1).guest_disk(0, "guest")?)?;
        let figures = measure(bed.host("a"), options, start)?;
        bed.power_off()?;
        bed.passed();
        Ok(figures)
    };
    for _ in 0..MAX_LOST {
        match once() {
            Ok(figures) => return Ok(figures),
            Err(e) => eprintln!("bed 2: this run does not count, once more: {e:#}"),
        }
    }
    once()
}

fn measure(host: &mut Host, options: &Options, start: &str) -> Result<Vec<f64>> {
    let head = format!("CPUS={} TIME={}", options.cpus, options.seconds);
    let text = host.run(&format!("{head}\n{COMMON}{start}{MEASURE}"), LIFE)?;
    figures::read(&text, FIGURES.iter().map(|(name, ..)| *name))
}
