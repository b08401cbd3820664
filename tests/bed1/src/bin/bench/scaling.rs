//! How cost grows: the same loads with more vCPUs, RAM, disks, and with several protected VMs on one pair of hosts.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Args;
use crate::measure::{self, Outcome, Setup};
use crate::page;
use crate::suite::Workload;

/// Loads that are measured: one that waits for each commit, one that only writes memory.
const LOADS: [&str; 2] = ["kv", "dirty-10-1"];

/// Figures of which a curve is drawn.
const FIGURES: [&str; 8] = [
    "on / off",
    "added latency p50",
    "pause p50",
    "pause p99",
    "epochs",
    "log channel",
    "memory of FT on the primary",
    "time to protect",
];

/// One load along one axis.
pub struct Curve {
    axis: &'static str,
    load: &'static str,
    /// Value on the axis, and [`Outcome::json`]'s figures.
    points: Vec<(f64, Value)>,
}

/// All curves; each point is printed when it is there.
pub fn run(all: &[Workload], args: &Args) -> Result<Vec<Curve>> {
    let axes: [(&'static str, &[u32], &dyn Fn(&mut Setup, u32)); 3] = [
        ("vCPUs", &[1, 2, 4], &|s, n| s.vcpus = n),
        ("MiB of RAM", &[128, 512, 2048, 8192], &|s, n| s.memory = n.into()),
        ("disks", &[1, 2, 4], &|s, n| s.disks = n),
    ];
    let mut curves = Vec::new();
    for load in all.iter().filter(|load| LOADS.contains(&load.name)) {
        for (axis, values, change) in axes {
            let mut curve = Curve {
                axis,
                load: load.name,
                points: Vec::new(),
            };
            for value in values {
                let mut setup = args.setup.clone();
                change(&mut setup, *value);
                let outcome = measure::run(load, &setup).with_context(|| format!("{axis}: {value}"))?;
                println!("{axis}: {value}: {}\n{}", load.name, outcome.table());
                curve
                    .points
                    .push((f64::from(*value), Outcome::json(&outcome)["figures"].clone()));
            }
            curves.push(curve);
        }
        curves.push(pairs(load, args)?);
    }
    Ok(curves)
}

/// The same load in 1, 2, 4 and 8 VMs, each protected, at a time. They begin together and take the same time, so their
/// stretches with FT off and on fall together but for their boots.
fn pairs(load: &Workload, args: &Args) -> Result<Curve> {
    let mut curve = Curve {
        axis: "protected VMs",
        load: load.name,
        points: Vec::new(),
    };
    for count in [1u32, 2, 4, 8] {
        let files: Vec<_> = (0..count)
            .map(|_| tempfile::NamedTempFile::new())
            .collect::<Result<_, _>>()?;
        let start = |file: &tempfile::NamedTempFile| {
            let setup = &args.setup;
            Command::new(std::env::current_exe()?)
                .args(["--only", load.name, "--failovers", "0"])
                .args([
                    "--rounds",
                    &setup.rounds.to_string(),
                    "--seconds",
                    &setup.seconds.to_string(),
                ])
                .arg("--json")
                .arg(file.path())
                .stdout(Stdio::null())
                .spawn()
        };
        let children: Vec<Child> = files.iter().map(start).collect::<Result<_, _>>()?;
        for mut child in children {
            let status = child.wait()?;
            ensure!(status.success(), "{count} VMs: one bench of them: {status}");
        }
        let mut figures = Vec::new();
        for file in &files {
            let all: Value = serde_json::from_slice(&std::fs::read(file.path())?)?;
            figures.push(all["loads"][0]["figures"].clone());
        }
        let mean = mean(&figures);
        println!("protected VMs: {count}: {}", load.name);
        for name in FIGURES {
            println!(
                "  {name:28}  {:.2} {}",
                median(&mean, name),
                mean[name]["unit"].as_str().unwrap_or_default()
            );
        }
        curve.points.push((count.into(), mean));
    }
    Ok(curve)
}

fn median(figures: &Value, name: &str) -> f64 {
    figures[name]["median"].as_f64().unwrap_or(f64::NAN)
}

/// Each figure's mean over several VMs.
fn mean(all: &[Value]) -> Value {
    let names = all
        .first()
        .and_then(Value::as_object)
        .into_iter()
        .flat_map(|first| first.iter());
    let of = |name: &str, what: &str| all.iter().filter_map(|f| f[name][what].as_f64()).sum::<f64>() / all.len() as f64;
    names
        .map(|(name, figure)| {
            let value = json!({
                "unit": figure["unit"],
                "median": of(name, "median"),
                "min": of(name, "min"),
                "max": of(name, "max"),
            });
            (name.clone(), value)
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// For programs.
pub fn json(curves: &[Curve]) -> Value {
    let curve = |curve: &Curve| {
        let point = |(value, figures): &(f64, Value)| json!({"value": value, "figures": figures});
        json!({
            "axis": curve.axis,
            "load": curve.load,
            "points": curve.points.iter().map(point).collect::<Vec<_>>(),
        })
    };
    json!({"scaling": curves.iter().map(curve).collect::<Vec<_>>()})
}

/// For people.
pub fn html(curves: &[Curve]) -> String {
    let mut page = page::head();
    for curve in curves {
        page += &format!("<h2>{}: {}</h2>", curve.load, curve.axis);
        for figure in FIGURES {
            let points: Vec<(f64, f64)> = curve.points.iter().map(|(at, f)| (*at, median(f, figure))).collect();
            if points.iter().any(|(_, y)| y.is_finite()) {
                let unit = curve.points.first().and_then(|(_, f)| f[figure]["unit"].as_str());
                page += &page::curve(figure, curve.axis, unit.unwrap_or_default(), &points);
            }
        }
    }
    page + "</html>\n"
}
