//! Requests of the control service: one line of text each.

/// Most bytes that RNG gives.
pub const RNG_MAX: usize = 64;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Counters as JSON.
    Status,
    /// Sets the memory dirtier.
    Dirty {
        /// Pages written per second; 0 is off.
        rate: u64,
        /// Pages of the working set.
        pages: u64,
    },
    /// Sets the burner.
    Burn(bool),
    /// Clocks as JSON.
    Clock,
    /// Random bytes.
    Rng(usize),
    /// Raises the counter.
    Count,
    /// Powers off.
    PowerOff,
    /// Resets.
    Reboot,
}

/// Reads a request line without its end; the error says what is wrong.
pub fn parse(line: &[u8]) -> Result<Request, &'static str> {
    let line = core::str::from_utf8(line).map_err(|_| "not text")?;
    let mut words = line.split_ascii_whitespace();
    let verb = words.next().ok_or("empty line")?;
    let request = match verb {
        "STATUS" => Request::Status,
        "DIRTY" => Request::Dirty {
            rate: number(words.next())?,
            pages: number(words.next())?,
        },
        "BURN" => match words.next() {
            Some("0") => Request::Burn(false),
            Some("1") => Request::Burn(true),
            _ => return Err("BURN takes 0 or 1"),
        },
        "CLOCK" => Request::Clock,
        "RNG" => match number(words.next())? {
            n @ 1..=64 => Request::Rng(n as usize),
            _ => return Err("RNG takes 1 to 64"),
        },
        "COUNT" => Request::Count,
        "POWEROFF" => Request::PowerOff,
        "REBOOT" => Request::Reboot,
        _ => return Err("unknown request"),
    };
    match words.next() {
        None => Ok(request),
        Some(_) => Err("too many words"),
    }
}

fn number(word: Option<&str>) -> Result<u64, &'static str> {
    word.ok_or("a number is missing")?.parse().map_err(|_| "not a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        assert_eq!(parse(b"STATUS"), Ok(Request::Status));
        assert_eq!(parse(b"DIRTY 1000 64\r"), Ok(Request::Dirty { rate: 1000, pages: 64 }));
        assert_eq!(parse(b" BURN 1 "), Ok(Request::Burn(true)));
        assert_eq!(parse(b"RNG 64"), Ok(Request::Rng(64)));
        for bad in [
            &b""[..],
            b"status",
            b"DIRTY 1",
            b"DIRTY 1 2 3",
            b"BURN 2",
            b"BURN",
            b"RNG 0",
            b"RNG 65",
            b"RNG -1",
            b"\xff",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
