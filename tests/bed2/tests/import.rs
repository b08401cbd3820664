//! `scripts/images import` on disk images that the test makes itself; nothing is booted. Needs qemu-utils, e2fsprogs,
//! fdisk, dosfstools and mtools.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

const PARTITION: u64 = 1 << 20;
const PARTITION_SIZE: u64 = 16 << 20;

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}; scripts/deps installs it"))
}

fn must(program: &str, args: &[&str]) -> Vec<u8> {
    let output = run(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A qcow2 with a GPT and one ext4 partition that holds `files` (path, content).
fn image(dir: &Path, files: &[(&str, &[u8])]) -> String {
    let tree = dir.join("tree");
    for (path, content) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let text = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let (file_system, raw, qcow2) = (text("ext4"), text("raw"), text("image.qcow2"));
    let size = format!("{}k", PARTITION_SIZE >> 10);
    must(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), &file_system, &size],
    );
    let mut disk = File::options().write(true).create_new(true).open(&raw).unwrap();
    disk.set_len(PARTITION + PARTITION_SIZE + (1 << 20)).unwrap();
    let mut sfdisk = Command::new("sfdisk")
        .args(["-q", &raw])
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk of package fdisk");
    let table = format!("label: gpt\nstart={}, size={}\n", PARTITION / 512, PARTITION_SIZE / 512);
    sfdisk.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    disk.seek(SeekFrom::Start(PARTITION)).unwrap();
    std::io::copy(&mut File::open(&file_system).unwrap(), &mut disk).unwrap();
    must("qemu-img", &["convert", "-O", "qcow2", &raw, &qcow2]);
    qcow2
}

fn import(image: &str, out: &Path, more: &[&str]) -> Output {
    let script = bed2::places::repository().join("scripts/images");
    let mut args = vec!["import", image, "--out", out.to_str().unwrap()];
    args.extend(more);
    run(script.to_str().unwrap(), &args)
}

#[test]
fn an_image_gives_its_newest_kernel_its_disk_and_a_seed() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = b"\x4dZ newest kernel".repeat(5000);
    let image = image(
        dir.path(),
        &[
            ("boot/vmlinuz-6.1.0-9-cloud", b"old"),
            ("boot/vmlinuz-6.1.0-10-cloud", &kernel),
            ("boot/initrd.img-6.1.0-9-cloud", b"old initrd"),
            ("boot/initrd.img-6.1.0-10-cloud", b"newest initrd"),
            ("etc/fstab", b"/dev/vda1 / ext4 defaults 0 1\n"),
        ],
    );
    let key = dir.path().join("key.pub");
    fs::write(&key, "ssh-ed25519 AAAA somebody\n").unwrap();
    let out = dir.path().join("out");
    let result = import(
        &image,
        &out,
        &[
            "--ssh-key",
            key.to_str().unwrap(),
            "--user",
            "admin",
            "--ip",
            "10.0.0.2/24,10.0.0.1",
        ],
    );
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(fs::read(out.join("vmlinuz")).unwrap(), kernel);
    assert_eq!(fs::read(out.join("initrd")).unwrap(), b"newest initrd");
    let command = String::from_utf8(result.stdout).unwrap();
    for part in ["root=/dev/vda1 ", "--initramfs", "seed.img,readonly=on"] {
        assert!(command.contains(part), "no {part} in {command}");
    }
    let mut disk = File::open(out.join("disk.raw")).unwrap();
    disk.seek(SeekFrom::Start(PARTITION + 0x438)).unwrap();
    let mut magic = [0; 2];
    disk.read_exact(&mut magic).unwrap();
    assert_eq!(magic, [0x53, 0xef], "the ext4 superblock is where it was");
    let seed = out.join("seed.img");
    let read = |name: &str| {
        let file = format!("::{name}");
        String::from_utf8(must("mtype", &["-i", seed.to_str().unwrap(), &file])).unwrap()
    };
    assert!(
        read("user-data").starts_with("#cloud-config\n") && read("user-data").contains("ssh-ed25519 AAAA somebody")
    );
    assert!(read("network-config").contains("10.0.0.2/24") && read("network-config").contains("10.0.0.1"));
    assert!(read("meta-data").contains("instance-id: "));
}

#[test]
fn what_cannot_be_imported_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |image: &str, more: &[&str], reason: &str| {
        let result = import(image, &out, more);
        let message = String::from_utf8_lossy(&result.stderr).into_owned();
        assert!(!result.status.success() && message.contains(reason), "{message}");
    };
    refused("/no/such/image", &[], "no such file");
    let image = image(dir.path(), &[("etc/fstab", b"nothing to boot\n")]);
    refused(&image, &[], "no ext4 partition with /boot/vmlinuz-VERSION");
    refused(&image, &["--user", "a b"], "is no user name");
    refused(&image, &["--ip", "somewhere"], "--ip: ADDR/LEN,GATEWAY");
}
