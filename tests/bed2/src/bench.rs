//! What fault tolerance costs a Debian guest: the same guest and load with FT off and on, in turns, in one run. The figures of
//! nested, emulated machines say little; their ratios say what FT changes.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::figures::{self, Spread};
use crate::protected::Protected;

/// The figures: name in the script's output, what it is.
const FIGURES: [(&str, &str); 8] = [
    ("hashed", "computing: sha256 of 1 MiB, /s"),
    ("compiled", "compiling a C file of 200 functions (tcc), /s"),
    ("set_1", "redis SET with flush, 1 connection, /s"),
    ("set_8", "redis SET with flush, 8 connections, /s"),
    ("ping_ms", "ping, ms"),
    ("read_iops", "disk, 4 KiB random reads/s"),
    ("write_iops", "disk, 4 KiB random writes/s"),
    ("to_guest_mbit", "network to the guest, Mbit/s"),
];

/// Options of `scripts/bed2 bench`.
#[derive(Args)]
pub struct Options {
    /// Times that FT is off and on
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Limits of FT, as for `ch-remote ft enable`
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    limits: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Once, in the guest.
const PREPARE: &str = r#"
    ssh guest '
      dd if=/dev/zero of=/root/fio bs=1M count=64 conv=fsync 2>/dev/null
      for i in $(seq 200); do
        echo "int f$i(int a, int *b) { for (int i = 0; i < a; i++) b[i % 7] += a * i + $i; return b[a % 7]; }"
      done >/root/x.c
      systemctl start redis-server iperf3-server'
    wait_for 300 redis open_port 6379
    wait_for 300 iperf3 open_port 5201
"#;

/// From outside of the guest; it prints names and values. Loops are timed by the guest's clock, for a login takes long here.
const MEASURE: &str = r#"
    each_second() {
      ssh guest "n=0; start=\$(date +%s%N); end=\$((start + $TIME * 1000000000)); now=\$start
        while [ \$now -lt \$end ]; do $1; n=\$((n + 1)); now=\$(date +%s%N); done
        echo \$n \$((now - start))" | awk '{ printf "%.3f\n", $1 * 1e9 / $2 }'
    }
    disk_test() {
      ssh guest "fio --name=x --filename=/root/fio --size=64M --direct=1 --ioengine=libaio --iodepth=16 --runtime=$TIME \
        --time_based --output-format=json --rw=$1 --bs=4k" | jq -r ".jobs[0].$2.iops"
    }
    # As many as take about the time.
    redis_test() {
      local n=$1 rate
      while :; do
        rate=$(redis-benchmark -h 192.168.100.2 -t set -c $1 -n $n --csv | awk -F '"' '$2 == "SET" { print $4 }')
        awk -v n=$n -v rate=$rate -v time=$TIME 'BEGIN { exit n / rate < time / 2 }' && break
        n=$((n * 4))
      done
      echo $rate
    }
    echo hashed $(each_second 'head -c 1M /dev/zero | sha256sum >/dev/null')
    echo compiled $(each_second 'tcc -c -o /root/x.o /root/x.c')
    echo set_1 $(redis_test 1)
    echo set_8 $(redis_test 8)
    echo ping_ms $(ping -q -i 0.2 -c $((TIME * 5)) 192.168.100.2 | awk -F '[/=]' '/^rtt/ { print $6 }')
    echo read_iops $(disk_test randread read)
    echo write_iops $(disk_test randwrite write)
    echo to_guest_mbit $(iperf3 -J -t $TIME -c 192.168.100.2 | jq -r '.end.sum_received.bits_per_second / 1e6')
"#;

/// Measures and prints.
pub fn run(options: &Options) -> Result<()> {
    let mut guest = Protected::start("bench", 2)?;
    guest.run("a", PREPARE)?;
    guest.receive("/dev/bed/backup")?;
    let (mut off, mut on) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        eprintln!("bed 2: round {round} of {}", options.rounds);
        off.push(measure(&mut guest, options)?);
        guest.enable(5000, &options.limits.join(" "))?;
        on.push(measure(&mut guest, options)?);
        guest.run("a", "ft_is p protected")?;
        guest.disable()?;
    }
    guest.bed.passed();
    let rows = FIGURES.into_iter().enumerate().map(|(i, (name, what))| {
        let ratios: Vec<f64> = off.iter().zip(&on).map(|(off, on)| on[i] / off[i]).collect();
        (
            name,
            what,
            Spread::nth(&off, i),
            Spread::nth(&on, i),
            Spread::of(ratios),
        )
    });
    if options.json {
        let figures: Vec<_> = rows
            .map(|(name, what, off, on, ratio)| json!({"name": name, "what": what, "off": off, "on": on, "ratio": ratio}))
            .collect();
        println!(
            "{:#}",
            json!({"rounds": options.rounds, "limits": options.limits, "figures": figures})
        );
    } else {
        let head = "median (least - most)";
        println!("{head:46} {:>26} {:>26} {:>22}", "FT off", "FT on", "on / off");
        for (_, what, off, on, ratio) in rows {
            println!("{what:46} {:>26} {:>26} {:>22}", off.cell(1), on.cell(1), ratio.cell(2));
        }
    }
    Ok(())
}

fn measure(guest: &mut Protected, options: &Options) -> Result<Vec<f64>> {
    let text = guest.run("a", &format!("TIME={}\n{MEASURE}", options.seconds))?;
    figures::read(&text, FIGURES.iter().map(|(name, _)| *name))
}
