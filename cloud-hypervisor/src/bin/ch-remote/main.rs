//! `ch-remote`: controls a VMM through its API socket.
//!
//! * [`args`]: the command line; this file: the VM's commands; `ft`: those of fault tolerance;
//! * [`output`]: results and errors, for people or as JSON.

mod args;
#[cfg(feature = "ft")]
mod ft;
mod output;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::server::endpoints::Method;
use api::{Client, RestoreConfig};
use clap::{CommandFactory, Parser};
use serde_json::Value;

#[cfg(feature = "ft")]
use args::FtCommand;
use args::{Cli, Command};

/// Commands of Cloud Hypervisor's `ch-remote` that are not offered.
const NOT_OFFERED: &[&str] = &[
    "add-device",
    "add-disk",
    "add-fs",
    "add-generic-vhost-user",
    "add-net",
    "add-pmem",
    "add-user-device",
    "add-vdpa",
    "add-vsock",
    "coredump",
    "nmi",
    "receive-migration",
    "remove-device",
    "resize",
    "resize-disk",
    "resize-zone",
    "send-migration",
    #[cfg(not(feature = "ft"))]
    "ft",
];

/// Longest configuration that is read.
const MAX_CONFIG: u64 = 4 << 20;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            output::error(&e, cli.json);
            // As for any other mistake on the command line.
            ExitCode::from(if matches!(cli.command, Command::Other(_)) { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Command::Other(words) = &cli.command {
        return refuse(words);
    }
    #[cfg(feature = "ft")]
    if let Command::Ft(FtCommand::MakeCerts { out, hosts }) = &cli.command {
        return ft::certs::make(out, hosts, cli.json);
    }
    let Some(socket) = &cli.api_socket else {
        bail!("which VMM? give --api-socket PATH, the same as the VMM was started with");
    };
    let client = Client::new(socket);
    let put = |name: &str| client.put(name).map_err(anyhow::Error::from);
    match &cli.command {
        Command::Ping => return show(&client, "vmm.ping"),
        Command::Info => return show(&client, "vm.info"),
        Command::Counters => return show(&client, "vm.counters"),
        Command::Create { config } => {
            client.request(Method::Put, "vm.create", Some(&read_config(config)?))?;
        }
        Command::Boot => put("vm.boot")?,
        Command::Pause => put("vm.pause")?,
        Command::Resume => put("vm.resume")?,
        Command::Reboot => put("vm.reboot")?,
        Command::PowerButton => put("vm.power-button")?,
        Command::Shutdown => put("vm.shutdown")?,
        Command::Delete => put("vm.delete")?,
        Command::ShutdownVmm => put("vmm.shutdown")?,
        Command::Snapshot { url } => client.snapshot(url)?,
        Command::Restore { spec } => client.restore(&RestoreConfig::parse(spec)?)?,
        #[cfg(feature = "ft")]
        Command::Ft(command) => return ft::run(&client, command, cli.json),
        Command::Other(_) => {}
    }
    output::done(cli.json);
    Ok(())
}

/// Prints the JSON of a GET endpoint.
fn show(client: &Client, name: &str) -> Result<()> {
    output::json(&client.get::<Value>(name)?);
    Ok(())
}

fn read_config(path: &Path) -> Result<Vec<u8>> {
    let input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).with_context(|| format!("configuration {}", path.display()))?)
    };
    let mut text = Vec::new();
    input
        .take(MAX_CONFIG)
        .read_to_end(&mut text)
        .with_context(|| format!("configuration {}", path.display()))?;
    Ok(text)
}

fn refuse(words: &[String]) -> Result<()> {
    let name = words.first().map_or("", String::as_str);
    let command = Cli::command();
    let supported: Vec<&str> = command.get_subcommands().map(|c| c.get_name()).collect();
    let supported = supported.join(", ");
    if NOT_OFFERED.contains(&name) {
        bail!("{name} is not supported by this VMM; supported: {supported}");
    }
    bail!("there is no command {name:?}; commands: {supported}");
}
