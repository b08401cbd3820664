//! Choosing among named things on the command line of a test program.

use anyhow::{Result, bail};
use clap::Args;

/// `--only` and `--list`.
#[derive(Debug, Args)]
pub struct Only {
    /// Only these (see --list).
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Prints what there is.
    #[arg(long)]
    pub list: bool,
}

impl Only {
    /// An error when a name was given that is none of `names`; `what` they are.
    pub fn check<'a>(&self, what: &str, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        if let Some(unknown) = self.only.iter().find(|only| names.clone().all(|name| name != **only)) {
            bail!("there is no {what} `{unknown}`: see --list");
        }
        Ok(())
    }

    /// Whether no name was given.
    pub fn everything(&self) -> bool {
        self.only.is_empty()
    }

    /// Whether it is chosen.
    pub fn has(&self, name: &str) -> bool {
        self.everything() || self.only.iter().any(|only| only == name)
    }

    /// The same where only the `usual` ones are taken when no name was given.
    pub fn has_of(&self, usual: &[&str], name: &str) -> bool {
        self.has(name) && (!self.everything() || usual.contains(&name))
    }
}
