//! The kernel command line: `ip=192.168.100.2/24 gw=192.168.100.1 kv=0|1 poll=1 window=256`. Unknown words are left alone.

/// What the command line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Address and prefix length.
    pub ip: ([u8; 4], u8),
    /// Router.
    pub gateway: Option<[u8; 4]>,
    /// Serve the key-value store.
    pub kv: bool,
    /// Poll instead of waiting for interrupts.
    pub poll: bool,
    /// KiB of the buffers of streams, 16 to 4,096.
    pub window: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ip: ([192, 168, 100, 2], 24),
            gateway: None,
            kv: true,
            poll: false,
            window: 256,
        }
    }
}

fn address(text: &str) -> Option<[u8; 4]> {
    let mut out = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut out {
        *byte = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// Reads the command line; gives the first word that is known but wrong as error.
pub fn parse(line: &str) -> Result<Options, &str> {
    let mut options = Options::default();
    for word in line.split_ascii_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            continue;
        };
        match name {
            "ip" => {
                let (ip, prefix) = value.split_once('/').unwrap_or((value, "24"));
                let prefix = prefix.parse().ok().filter(|p| *p <= 32);
                options.ip = address(ip).zip(prefix).ok_or(word)?;
            }
            "gw" => options.gateway = Some(address(value).ok_or(word)?),
            "window" => {
                let kib = value.parse().ok().filter(|kib| (16..=4096).contains(kib));
                options.window = kib.ok_or(word)?;
            }
            "kv" | "poll" => {
                let on = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err(word),
                };
                *(if name == "kv" {
                    &mut options.kv
                } else {
                    &mut options.poll
                }) = on;
            }
            _ => {}
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(parse(""), Ok(Options::default()));
        let all = parse("console=ttyS0 ip=10.0.2.15/24  gw=10.0.2.2 kv=0 poll=1 window=2048 quiet");
        let expected = Options {
            ip: ([10, 0, 2, 15], 24),
            gateway: Some([10, 0, 2, 2]),
            kv: false,
            poll: true,
            window: 2048,
        };
        assert_eq!(all, Ok(expected));
        assert_eq!(parse("ip=1.2.3.4").map(|o| o.ip), Ok(([1, 2, 3, 4], 24)));
        for bad in [
            "ip=1.2.3",
            "ip=1.2.3.4.5",
            "ip=1.2.3.256",
            "ip=1.2.3.4/33",
            "ip=",
            "gw=x",
            "kv=2",
            "poll=",
            "window=15",
            "window=5000",
            "window=x",
        ] {
            assert_eq!(parse(bad), Err(bad));
        }
    }
}
