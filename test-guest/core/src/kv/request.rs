//! Requests: one line of text each.

use super::{KEY_MAX, VALUE_MAX};

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// Stores `value` under `key`.
    Put {
        /// 1 to 32 bytes.
        key: &'a [u8],
        /// 0 to 400 bytes.
        value: &'a [u8],
    },
    /// Asks for the value of a key.
    Get(&'a [u8]),
    /// Asks for the counters.
    Stat,
}

fn key(bytes: &[u8]) -> Result<&[u8], &'static str> {
    match bytes.len() {
        1..=KEY_MAX if bytes.iter().all(u8::is_ascii_graphic) => Ok(bytes),
        1..=KEY_MAX => Err("key is not printable ASCII"),
        _ => Err("key must have 1 to 32 bytes"),
    }
}

fn value(bytes: &[u8]) -> Result<&[u8], &'static str> {
    match bytes.len() {
        0..=VALUE_MAX if bytes.iter().all(u8::is_ascii_graphic) => Ok(bytes),
        0..=VALUE_MAX => Err("value is not printable ASCII without space"),
        _ => Err("value must have 0 to 400 bytes"),
    }
}

/// Reads a request line without its end; the error says what is wrong.
pub fn parse(line: &[u8]) -> Result<Request<'_>, &'static str> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = line.splitn(3, |b| *b == b' ');
    match (words.next(), words.next(), words.next()) {
        (Some(b"PUT"), Some(k), Some(v)) => Ok(Request::Put {
            key: key(k)?,
            value: value(v)?,
        }),
        (Some(b"PUT"), ..) => Err("PUT takes a key and a value"),
        (Some(b"GET"), Some(k), None) => Ok(Request::Get(key(k)?)),
        (Some(b"GET"), ..) => Err("GET takes a key"),
        (Some(b"STAT"), None, None) => Ok(Request::Stat),
        _ => Err("unknown request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        assert_eq!(parse(b"PUT k v\r"), Ok(Request::Put { key: b"k", value: b"v" }));
        assert_eq!(parse(b"PUT k "), Ok(Request::Put { key: b"k", value: b"" }));
        assert_eq!(parse(b"GET k"), Ok(Request::Get(b"k")));
        assert_eq!(parse(b"STAT"), Ok(Request::Stat));
        let line = [&b"PUT "[..], &[b'k'; 32], b" ", &[b'v'; 400]].concat();
        assert!(parse(&line).is_ok());
        let long_key = [&b"GET "[..], &[b'k'; 33]].concat();
        let long_value = [&b"PUT k "[..], &[b'v'; 401]].concat();
        for bad in [
            &b""[..],
            b"PUT",
            b"PUT k",
            b"PUT  v",
            b"GET",
            b"GET ",
            b"GET a b",
            b"PUT k v w",
            b"PUT \x80 v",
            b"STAT x",
            b"put k v",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse(&long_key).is_err() && parse(&long_value).is_err());
    }
}
