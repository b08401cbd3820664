//! The commands of fault tolerance.
//!
//! * [`certs`]: `ft make-certs`; [`enable`]: `ft enable` with its progress; [`info`]: `ft info` as a table; [`watch`]: `ft watch`.

pub mod certs;
mod enable;
mod info;
mod watch;

use std::path::Path;

use anyhow::{Context, Result, bail};
use api::Client;
use api::options::OptionValue;
use api::options::ft as options;
use ft::config::{FtLimitsPatch, FtReceiveConfig, FtTls};

use crate::args::{FtCommand, Receive, Tls};
use crate::output;

/// Does `command` on the VMM behind `client`.
pub fn run(client: &Client, command: &FtCommand, json: bool) -> Result<()> {
    match command {
        FtCommand::Receive(args) => {
            client.put_json("vm.ft-receive", &receive(args)?)?;
            finish(
                json,
                &format!(
                    "waiting for a primary at {}; `ch-remote ft info` tells the state",
                    args.listen
                ),
            );
        }
        FtCommand::Enable(args) => return enable::run(client, args, json),
        FtCommand::Disable => {
            client.put("vm.ft-disable")?;
            finish(json, "fault tolerance is off");
        }
        FtCommand::Failover => {
            client.put("vm.ft-failover")?;
            finish(
                json,
                "the backup takes over; `ch-remote ft info` on the backup tells when it runs the VM",
            );
        }
        FtCommand::Config { settings } => {
            let patch = options::limits(settings)?;
            if patch != FtLimitsPatch::default() {
                client.put_json("vm.ft-config", &patch)?;
            }
            let limits = client.ft_info()?.limits;
            if json {
                output::json(&limits);
            } else {
                info::limits(&limits);
            }
        }
        FtCommand::Info => {
            let info = client.ft_info()?;
            if json {
                output::json(&info);
            } else {
                info::table(&info);
            }
        }
        FtCommand::MakeCerts { .. } => {}
        FtCommand::Watch { interval } => return watch::run(client, *interval, json),
    }
    Ok(())
}

fn finish(json: bool, text: &str) {
    if json {
        output::done(true);
    } else {
        output::line(text);
    }
}

fn receive(args: &Receive) -> Result<FtReceiveConfig> {
    let mut config = FtReceiveConfig {
        listen: address(&args.listen)?,
        arbiter: args.arbiter.as_deref().map(arbiter).transpose()?,
        disks: args
            .disk
            .iter()
            .map(|text| options::disk(text))
            .collect::<Result<_, _>>()?,
        net: args
            .net
            .iter()
            .map(|text| options::net(text))
            .collect::<Result<_, _>>()?,
        serial: console("--serial", args.serial.as_deref())?,
        console: console("--console", args.console.as_deref())?,
        insecure: args.insecure,
        tls: tls(&args.tls)?,
    };
    for disk in &mut config.disks {
        disk.path = absolute(&disk.path)?.into();
    }
    Ok(config)
}

fn tls(args: &Tls) -> Result<Option<FtTls>> {
    let Some(dir) = &args.tls_dir else { return Ok(None) };
    Ok(Some(FtTls {
        dir: absolute(dir)?.into(),
        peer: args.tls_peer.clone(),
    }))
}

/// Checks `tcp:HOST:PORT` or `unix:PATH` before it goes to the VMM.
fn address(text: &str) -> Result<String> {
    let Some(options::Address(text)) = options::Address::parse(text) else {
        bail!("address {text:?}: must be {}", options::Address::EXPECTED);
    };
    match text.strip_prefix("unix:") {
        Some(path) => Ok(format!("unix:{}", absolute(Path::new(path))?)),
        None => Ok(text),
    }
}

/// An arbiter with its paths as the VMM, which may stand in another directory, will find them.
fn arbiter(text: &str) -> Result<String> {
    let description: ft::arbiter::Description = text.parse()?;
    let description = description
        .absolute()
        .with_context(|| format!("arbiter {text}: its paths"))?;
    Ok(description.to_string())
}

fn console(option: &'static str, text: Option<&str>) -> Result<Option<String>> {
    let Some(text) = text else { return Ok(None) };
    let text = options::console(option, text)?;
    match text.strip_prefix("file:") {
        Some(path) => Ok(Some(format!("file:{}", absolute(Path::new(path))?))),
        None => Ok(Some(text)),
    }
}

fn absolute(path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).with_context(|| format!("path {}", path.display()))?;
    absolute
        .into_os_string()
        .into_string()
        .ok()
        .with_context(|| format!("path {} is no UTF-8", path.display()))
}
