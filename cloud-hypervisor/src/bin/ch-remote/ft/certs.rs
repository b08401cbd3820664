//! `ft make-certs`: an authority and certificates of hosts, for `--tls`.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use ft::transport::tls::{CA_FILE, CERT_FILE, KEY_FILE};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::output;

/// Private key of the authority.
const CA_KEY_FILE: &str = "ca-key.pem";

fn write(path: &Path, text: &str) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(if path.ends_with(CERT_FILE) || path.ends_with(CA_FILE) {
            0o644
        } else {
            0o600
        })
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.with_context(|| format!("cannot make the directory {}", path.display()))
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Makes `out` with the authority, and in it a directory for each of `hosts`.
pub fn make(out: &Path, hosts: &[String], json: bool) -> Result<()> {
    if let Some(odd) = hosts.iter().find(|host| host.contains('/') || host.starts_with('.')) {
        bail!("host {odd:?}: must be a DNS name or an IP address");
    }
    directory(out)?;
    let mut authority = CertificateParams::default();
    authority.distinguished_name = named("fault tolerance of cloud-hypervisor");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let ca = authority.self_signed(&key)?.pem();
    write(&out.join(CA_FILE), &ca)?;
    write(&out.join(CA_KEY_FILE), &key.serialize_pem())?;
    let issuer = Issuer::new(authority, key);
    for host in hosts {
        let mut params = CertificateParams::new(vec![host.clone()]).with_context(|| format!("host {host:?}"))?;
        params.distinguished_name = named(host);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        let dir = out.join(host);
        directory(&dir)?;
        write(&dir.join(CA_FILE), &ca)?;
        write(&dir.join(CERT_FILE), &certificate.pem())?;
        write(&dir.join(KEY_FILE), &key.serialize_pem())?;
    }
    if json {
        output::done(true);
    } else {
        output::line(&format!(
            "copy {0}/HOST to each host and name the copy with --tls; keep {0}/{CA_KEY_FILE} safe",
            out.display()
        ));
    }
    Ok(())
}
