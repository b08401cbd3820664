//! How an operator names an arbiter, taken apart: `file:DIR` or `etcd:HOST:PORT[+...]`.
//!
//! The parts of an etcd description are joined with `+`: neither a shell nor the `key=value,key=value` options take that
//! for theirs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::ArbiterError;

/// Where etcd's keys begin when the description does not say.
pub const DEFAULT_PREFIX: &str = "/ft";

const KEYS: &str = "ca=FILE, cert=FILE, key=FILE, prefix=/PATH";

/// An arbiter as an operator names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Description {
    /// `file:DIR`
    File(PathBuf),
    /// `etcd:HOST:PORT[+HOST:PORT...][+ca=FILE[+cert=FILE+key=FILE]][+prefix=/PATH]`
    Etcd(EtcdCluster),
}

/// An etcd cluster and the place in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdCluster {
    /// `HOST:PORT` of some or all members.
    pub endpoints: Vec<String>,
    /// How to talk TLS; `None`: plain.
    pub tls: Option<TlsFiles>,
    /// All keys begin with it.
    pub prefix: String,
}

/// PEM files for TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Who may sign the servers' certificates.
    pub ca: PathBuf,
    /// Our own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Description {
    /// The same arbiter for a process that stands in another directory.
    pub fn absolute(self) -> io::Result<Self> {
        let absolute = |path: PathBuf| std::path::absolute(path);
        Ok(match self {
            Self::File(dir) => Self::File(absolute(dir)?),
            Self::Etcd(EtcdCluster { endpoints, tls, prefix }) => {
                let of = |TlsFiles { ca, identity }| {
                    let own = |(cert, key)| Ok::<_, io::Error>((absolute(cert)?, absolute(key)?));
                    let identity = identity.map(own).transpose()?;
                    Ok::<_, io::Error>(TlsFiles {
                        ca: absolute(ca)?,
                        identity,
                    })
                };
                let tls = tls.map(of).transpose()?;
                Self::Etcd(EtcdCluster { endpoints, tls, prefix })
            }
        })
    }
}

impl FromStr for Description {
    type Err = ArbiterError;

    fn from_str(text: &str) -> Result<Self, ArbiterError> {
        let parsed = match text.split_once(':') {
            Some(("file", "")) => Err("the directory is missing".to_string()),
            Some(("file", dir)) => Ok(Self::File(dir.into())),
            Some(("etcd", parts)) => cluster(parts).map(Self::Etcd),
            Some((kind, _)) => Err(format!("kind `{kind}` is not known")),
            None => Err("has no kind".to_string()),
        };
        parsed.map_err(|reason| ArbiterError::BadDescription {
            text: text.chars().take(200).collect(),
            reason,
        })
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(dir) => write!(f, "file:{}", dir.display()),
            Self::Etcd(cluster) => {
                write!(f, "etcd:{}", cluster.endpoints.join("+"))?;
                if let Some(tls) = &cluster.tls {
                    write!(f, "+ca={}", tls.ca.display())?;
                    if let Some((cert, key)) = &tls.identity {
                        write!(f, "+cert={}+key={}", cert.display(), key.display())?;
                    }
                }
                if cluster.prefix != DEFAULT_PREFIX {
                    write!(f, "+prefix={}", cluster.prefix)?;
                }
                Ok(())
            }
        }
    }
}

/// `HOST:PORT[+HOST:PORT...][+KEY=VALUE...]`
fn cluster(parts: &str) -> Result<EtcdCluster, String> {
    let mut endpoints: Vec<String> = Vec::new();
    let (mut ca, mut cert, mut key, mut prefix) = (None, None, None, None);
    for part in parts.split('+') {
        let Some((name, value)) = part.split_once('=') else {
            let endpoint = endpoint(part)?;
            if endpoints.contains(&endpoint) {
                return Err(format!("endpoint {endpoint} is given twice"));
            }
            endpoints.push(endpoint);
            continue;
        };
        let place = match name {
            "ca" => &mut ca,
            "cert" => &mut cert,
            "key" => &mut key,
            "prefix" => &mut prefix,
            _ => return Err(format!("`{name}` is not supported; supported: {KEYS}")),
        };
        if value.is_empty() {
            return Err(format!("`{name}` is empty"));
        }
        if place.replace(value).is_some() {
            return Err(format!("`{name}` is given twice"));
        }
    }
    if endpoints.is_empty() {
        return Err("no HOST:PORT is given".into());
    }
    let path = |text: &str| Path::new(text).to_path_buf();
    let identity = match (cert, key) {
        (None, None) => None,
        (Some(cert), Some(key)) => Some((path(cert), path(key))),
        _ => return Err("`cert` and `key` go together".into()),
    };
    let tls = match (ca, identity) {
        (Some(ca), identity) => Some(TlsFiles { ca: path(ca), identity }),
        (None, None) => None,
        (None, Some(_)) => return Err("`cert` and `key` need `ca`".into()),
    };
    let prefix = prefix.unwrap_or(DEFAULT_PREFIX);
    let good = |segment: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !segment.is_empty() && segment.chars().all(known)
    };
    match prefix.strip_prefix('/') {
        Some(rest) if prefix.len() <= 128 && rest.split('/').all(good) => {}
        _ => {
            let rule = "must be like /ft or /site/ft: letters, digits, `-`, `_`, `.`, at most 128 bytes";
            return Err(format!("prefix `{prefix}` {rule}"));
        }
    }
    Ok(EtcdCluster {
        endpoints,
        tls,
        prefix: prefix.into(),
    })
}

fn endpoint(text: &str) -> Result<String, String> {
    let bad = || format!("`{text}` is neither HOST:PORT nor one of {KEYS}");
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let good = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c)),
    };
    let digits = port.chars().all(|c| c.is_ascii_digit());
    if !good || !digits || !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err(bad());
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_is_shown() {
        for text in [
            "file:/srv/arbiter",
            "file:a,b+c",
            "etcd:10.0.0.5:2379",
            "etcd:a.example:2379+[::1]:2379+c:1",
            "etcd:a:1+ca=/etc/ft/ca.pem",
            "etcd:a:1+b:2+ca=/ca+cert=/c+key=/k+prefix=/site-1/ft",
        ] {
            assert_eq!(text.parse::<Description>().unwrap().to_string(), text);
        }
        let Description::Etcd(cluster) = "etcd:prefix=/x+a:1+ca=c+b:2".parse().unwrap() else {
            panic!("no etcd")
        };
        assert_eq!((cluster.endpoints.len(), cluster.prefix.as_str()), (2, "/x"));
    }

    #[test]
    fn paths_are_made_absolute() {
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        let absolute = |text: &str| text.parse::<Description>().unwrap().absolute().unwrap().to_string();
        assert_eq!(absolute("file:a"), format!("file:{here}/a"));
        assert_eq!(
            absolute("etcd:h:1+ca=a+cert=/b+key=c"),
            format!("etcd:h:1+ca={here}/a+cert=/b+key={here}/c")
        );
        assert_eq!(absolute("etcd:h:1"), "etcd:h:1");
    }

    #[test]
    fn bad_descriptions_say_what_is_bad() {
        for (text, reason) in [
            ("", "has no kind"),
            ("/srv/arbiter", "has no kind"),
            ("zk:h:1", "kind `zk` is not known"),
            ("file:", "the directory is missing"),
            ("etcd:", "`` is neither HOST:PORT"),
            ("etcd:h", "`h` is neither HOST:PORT"),
            ("etcd:h:0", "`h:0` is neither"),
            ("etcd:h:+1", "`h:` is neither"),
            ("etcd:h:65536", "`h:65536` is neither"),
            ("etcd:::1:2379", "`::1:2379` is neither"),
            ("etcd:http://h:1", "`http://h:1` is neither"),
            ("etcd:h:1,i:2", "`h:1,i:2` is neither"),
            ("etcd:h:1+h:1", "endpoint h:1 is given twice"),
            ("etcd:ca=/x", "no HOST:PORT"),
            ("etcd:h:1+user=x", "`user` is not supported; supported: ca=FILE"),
            ("etcd:h:1+ca=", "`ca` is empty"),
            ("etcd:h:1+ca=/a+ca=/b", "`ca` is given twice"),
            ("etcd:h:1+ca=/a+cert=/b", "go together"),
            ("etcd:h:1+cert=/a+key=/b", "need `ca`"),
            ("etcd:h:1+prefix=ft", "prefix `ft` must be like /ft"),
            ("etcd:h:1+prefix=/ft/", "prefix `/ft/` must"),
        ] {
            let error = text.parse::<Description>().unwrap_err();
            assert!(error.is_request_error());
            let error = error.to_string();
            assert!(
                error.contains(reason) && error.contains("etcd:HOST:PORT"),
                "{text}: {error}"
            );
        }
    }
}
