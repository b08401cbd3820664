//! Where a shadow's consoles go on the backup.

use std::path::PathBuf;

use api::{ConsoleConfig, ConsoleMode, VmConfig};
use ft::config::FtReceiveConfig;
use ft::machine::Refusal;

fn parse(text: &str, option: &str) -> Result<ConsoleConfig, Refusal> {
    let (mode, file) = match text {
        "off" => (ConsoleMode::Off, None),
        "null" => (ConsoleMode::Null, None),
        "tty" => (ConsoleMode::Tty, None),
        _ => match text.strip_prefix("file:").or_else(|| text.strip_prefix("file=")) {
            Some(path) => (ConsoleMode::File, Some(PathBuf::from(path))),
            None => {
                let message = format!("`ft receive --{option} {text}`: must be off, null, tty or file:PATH");
                return Err(Refusal {
                    code: "bad_console".into(),
                    message,
                });
            }
        },
    };
    Ok(ConsoleConfig {
        mode,
        file,
        ..Default::default()
    })
}

/// Applies the `serial` and `console` settings of `ft receive`.
pub fn override_consoles(config: &mut VmConfig, overrides: &FtReceiveConfig) -> Result<(), Refusal> {
    if let Some(text) = &overrides.serial {
        config.serial = parse(text, "serial")?;
    }
    if let Some(text) = &overrides.console {
        config.console = parse(text, "console")?;
    }
    Ok(())
}
