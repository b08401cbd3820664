//! The `key=value,key=value` syntax of Cloud Hypervisor's command line.
//!
//! A value that holds a comma is put in double quotes (`path="/a,b"`) or, where it is a list, in brackets. Errors name
//! the option, the key and what is possible.
//!
//! * this file: the syntax; [`vm`]: the options that describe a VM; [`vmm`]: those of the VMM;
//! * `ft`: those of fault tolerance.

#[cfg(feature = "ft")]
pub mod ft;
pub mod value;
pub mod vm;
pub mod vmm;

use thiserror::Error;

pub use value::{ByteSize, OptionValue};

/// An option that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{option}: {reason}")]
pub struct OptionError {
    /// For example `--disk`.
    pub option: &'static str,
    /// What is wrong, and what is possible.
    pub reason: String,
}

/// An option's keys and values, to be taken one by one.
#[derive(Debug)]
pub struct Options {
    option: &'static str,
    supported: &'static [&'static str],
    pairs: Vec<(String, String)>,
}

impl Options {
    /// Splits `text`, the value of `option`, which may hold the keys of `supported`, each at most once.
    pub fn parse(option: &'static str, supported: &'static [&'static str], text: &str) -> Result<Self, OptionError> {
        let error = |reason: String| OptionError { option, reason };
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in split(text).map_err(error)? {
            let Some((key, value)) = part.split_once('=') else {
                let reason = format!("{part:?} is not key=value; keys: {}", supported.join(", "));
                return Err(error(reason));
            };
            if !supported.contains(&key) {
                let reason = format!("key {key:?} is not supported; supported: {}", supported.join(", "));
                return Err(error(reason));
            }
            if pairs.iter().any(|(other, _)| other == key) {
                return Err(error(format!("key {key:?} is given twice")));
            }
            pairs.push((key.into(), unquote(value)));
        }
        Ok(Self {
            option,
            supported,
            pairs,
        })
    }

    /// The value of `key`, if it is given.
    pub fn take<T: OptionValue>(&mut self, key: &'static str) -> Result<Option<T>, OptionError> {
        debug_assert!(self.supported.contains(&key));
        let Some(index) = self.pairs.iter().position(|(k, _)| k == key) else {
            return Ok(None);
        };
        let (_, value) = self.pairs.swap_remove(index);
        match T::parse(&value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(format!("{key}={value}: must be {}", T::EXPECTED))),
        }
    }

    /// Puts the value of `key` into `target`, if it is given.
    pub fn set<T: OptionValue>(&mut self, key: &'static str, target: &mut T) -> Result<(), OptionError> {
        if let Some(value) = self.take(key)? {
            *target = value;
        }
        Ok(())
    }

    /// Puts the value of `key` into `target`, if it is given.
    pub fn set_some<T: OptionValue>(&mut self, key: &'static str, target: &mut Option<T>) -> Result<(), OptionError> {
        if let Some(value) = self.take(key)? {
            *target = Some(value);
        }
        Ok(())
    }

    /// The value of `key`, which must be given.
    pub fn need<T: OptionValue>(&mut self, key: &'static str) -> Result<T, OptionError> {
        self.take(key)?
            .ok_or_else(|| self.error(format!("{key}= is missing; keys: {}", self.supported.join(", "))))
    }

    /// An error of this option.
    pub fn error(&self, reason: String) -> OptionError {
        OptionError {
            option: self.option,
            reason,
        }
    }
}

/// Splits at the commas that are neither in quotes nor in brackets.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut start, mut depth, mut quoted) = (0, 0u32, false);
    for (i, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => {
                depth = depth
                    .checked_sub(1)
                    .ok_or_else(|| format!("{text:?} has a ] too many"))?;
            }
            ',' if !quoted && depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(format!("{text:?} has a quote that does not end"));
    }
    if depth > 0 {
        return Err(format!("{text:?} has a [ that does not end"));
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.is_empty());
    Ok(parts)
}

fn unquote(value: &str) -> String {
    value.chars().filter(|c| *c != '"').collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEYS: &[&str] = &["path", "size", "on"];

    #[test]
    fn quotes_and_brackets_hold_commas() {
        let mut options = Options::parse("--x", KEYS, "path=\"/a,b\",size=[1,[2,3]],on=x").unwrap();
        assert_eq!(options.need::<String>("path").unwrap(), "/a,b");
        assert_eq!(options.need::<String>("size").unwrap(), "[1,[2,3]]");
        assert_eq!(options.take::<String>("on").unwrap().unwrap(), "x");
        assert_eq!(options.take::<String>("on").unwrap(), None);
    }

    #[test]
    fn errors_name_option_key_and_possibilities() {
        let reason = |text: &str| Options::parse("--x", KEYS, text).unwrap_err().to_string();
        assert_eq!(
            reason("pth=1"),
            "--x: key \"pth\" is not supported; supported: path, size, on"
        );
        assert_eq!(reason("path=1,path=2"), "--x: key \"path\" is given twice");
        assert_eq!(reason("path"), "--x: \"path\" is not key=value; keys: path, size, on");
        assert!(reason("path=\"a").contains("does not end"));
        assert!(reason("path=a]").contains("too many"));
        assert!(reason("path=[a").contains("does not end"));
        let mut options = Options::parse("--x", KEYS, "on=maybe").unwrap();
        let reason = options.take::<bool>("on").unwrap_err().to_string();
        assert_eq!(reason, "--x: on=maybe: must be on or off");
        assert!(
            options
                .need::<String>("path")
                .unwrap_err()
                .to_string()
                .contains("path= is missing")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,60}") {
            let _ = Options::parse("--x", KEYS, &text);
        }

        #[test]
        fn a_quoted_value_comes_back(value in "[a-z,=\\[\\]]{1,20}") {
            let mut options = Options::parse("--x", KEYS, &format!("size=1,path=\"{value}\"")).unwrap();
            prop_assert_eq!(options.need::<String>("path").unwrap(), value);
        }
    }
}
