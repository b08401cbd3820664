//! Automatic re-protection: whoever runs the VM alone finds its next backup by itself. Needs /dev/kvm and root.

use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bed1::failover;
use bed1::loads::{self, Loads};
use bed1::netns::{Network, guest};
use bed1::pair::{Bed, Host, Options, Side};
use load::CONTROL_PORT;
use load::control::Control;
use serde_json::Value;

/// Hang guard of a search: the pauses between its rounds add up.
const LIMIT: Duration = Duration::from_secs(120);

fn options() -> Options {
    Options {
        spares: true,
        ..Options::default()
    }
}

fn address(side: Side, port: u16) -> String {
    format!("tcp:{}:{port}", Network::log_ip(side.name()))
}

/// A VMM on `side` that waits at its usual address.
fn listener(bed: &mut Bed, side: Side) -> Result<Host> {
    let mut host = bed.start(side, &[])?;
    bed.receive_at(&mut host, &address(side, 7100))?;
    Ok(host)
}

fn enable(bed: &Bed, primary: &mut Host, backup: &mut Host, spares: &[String]) -> Result<()> {
    let args = bed.enable_args(backup);
    let list = spares.join(",");
    let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
    all.extend(["--no-wait", "--auto-reprotect"]);
    if !spares.is_empty() {
        all.extend(["--spares", &list]);
    }
    primary.vmm.remote(&all)?;
    bed1::pair::wait_protected(primary, backup)
}

/// Waits until `host` is the primary of a protected VM, and `backup` its backup.
fn protected_by(host: &mut Host, backup: &mut Host, loads: &Loads) -> Result<()> {
    let name = backup.vmm.name.clone();
    host.vmm
        .wait_for(&format!("protection by {name}"), LIMIT, |vmm| {
            loads.check()?;
            let info = vmm.ft_info()?;
            Ok(info["state"] == "protected" && info["role"] == "primary")
        })
        .with_context(|| format!("{}: {:?}", host.vmm.name, host.vmm.ft_info()))?;
    backup.vmm.wait_ft_state("protected", LIMIT)?;
    ensure!(host.vmm.ft_info()?["peer"] == backup.peer.as_str());
    Ok(())
}

/// FT's events of a VMM, with their properties.
fn events(host: &Host) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(host.vmm.events())?;
    let all = text.split("\n\n").filter(|event| !event.trim().is_empty());
    let all: Vec<Value> = all.map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(all.into_iter().filter(|event| event["source"] == "ft").collect())
}

/// Kills the primary; its backup, which is then protected by `spare` without anybody's doing, is returned.
fn kill(mut primary: Host, mut backup: Host, spare: &mut Host, loads: &mut Loads, generation: u64) -> Result<Host> {
    loads.wait_progress(20)?;
    loads.new_phase();
    let moment = primary.vmm.kill()?;
    protected_by(&mut backup, spare, loads)?;
    let takeover = failover::after(moment, &mut backup, loads)?;
    eprintln!(
        "{} killed: protected again after {} ms, gap {:.0} ms",
        primary.vmm.name,
        moment.elapsed().as_millis(),
        takeover.gap_ms
    );
    for event in events(&backup)? {
        if event["event"].as_str().is_some_and(|name| name.ends_with("failed")) {
            eprintln!("    {event}");
        }
    }
    ensure!(backup.vmm.ft_info()?["generation"] == generation);
    loads.verify(&backup.disk)?;
    Ok(backup)
}

fn chain(options: Options) -> Result<()> {
    let mut bed = Bed::new(options)?;
    let mut a = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(1))?;
    let mut b = listener(&mut bed, Side::B)?;
    let mut s = listener(&mut bed, Side::S)?;
    enable(&bed, &mut a, &mut b, &[address(Side::S, 7100), address(Side::A, 7100)])?;
    let spares = serde_json::json!(["tcp:10.99.0.3:7100", "tcp:10.99.0.1:7100", "tcp:10.99.0.2:7100"]);
    for host in [&a, &b] {
        let info = host.vmm.ft_info()?;
        ensure!(info["auto_reprotect"] == true && info["spares"] == spares, "{info}");
    }

    let b = kill(a, b, &mut s, &mut loads, 1)?;
    let mut a = listener(&mut bed, Side::A)?;
    let s = kill(b, s, &mut a, &mut loads, 2)?;
    let mut b = listener(&mut bed, Side::B)?;
    let a = kill(s, a, &mut b, &mut loads, 3)?;
    ensure!(a.vmm.ft_info()?["spares"] == spares);
    // The last one's backup is as good as the first.
    loads.pause()?;
    loads.check_disk(&a.disk)?;
    loads.check_disk(&b.disk)?;
    loads.check_gets()?;
    loads.check_guest()?;
    loads.resume();
    loads.stop().map(drop)
}

#[test]
fn kvm_root_three_hosts_lose_one_after_the_other_and_stay_protected() -> Result<()> {
    chain(options())
}

/// The backup that takes over shows its own certificate, and checks the spare's by the name in its address.
#[test]
fn kvm_root_three_hosts_with_tls() -> Result<()> {
    chain(Options { tls: true, ..options() })
}

/// The first spare is dead, the second has a disk of another size, the third takes the VM.
#[test]
fn kvm_root_a_lost_backup_is_replaced_by_the_first_spare_that_takes_the_vm() -> Result<()> {
    let mut bed = Bed::new(options())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(2))?;
    let mut backup = listener(&mut bed, Side::B)?;
    let mut wrong = bed.start(Side::S, &[])?;
    wrong.disk = bed.dir.join("wrong.img");
    File::create(&wrong.disk)?.set_len((bed.options.disk_mib + 1) << 20)?;
    bed.receive_at(&mut wrong, &address(Side::S, 7101))?;
    let mut spare = listener(&mut bed, Side::S)?;
    let dead = address(Side::B, 7199);
    enable(
        &bed,
        &mut primary,
        &mut backup,
        &[dead.clone(), wrong.peer.clone(), spare.peer.clone()],
    )?;
    loads.wait_progress(20)?;
    let moment = backup.vmm.kill()?;
    protected_by(&mut primary, &mut spare, &loads)?;
    failover::after(moment, &mut primary, &loads)?;
    let told: Vec<Value> = events(&primary)?;
    let reason = |peer: &str| {
        let event = told
            .iter()
            .find(|event| event["event"] == "reprotect_failed" && event["properties"]["peer"] == peer);
        event.map_or(String::new(), |event| event["properties"]["reason"].to_string())
    };
    ensure!(told.iter().any(|event| event["event"] == "reprotecting"), "{told:?}");
    ensure!(reason(&dead).contains("refused"), "{told:?}");
    ensure!(
        reason(&wrong.peer).contains("size of disk _disk0 is 16 MiB on the primary and 17 MiB here"),
        "{told:?}"
    );
    ensure!(wrong.vmm.ft_state()? == "listening", "a refusal used the wrong one up");
    // What the spare got is whole.
    let moment = primary.vmm.kill()?;
    spare.vmm.wait_ft_state("solo", LIMIT)?;
    failover::after(moment, &mut spare, &loads)?;
    loads.verify(&spare.disk).map(drop)
}

/// Nobody is there: the search goes on, says so, and ends when a host appears; or when it is told to.
#[test]
fn kvm_root_the_search_goes_on_until_a_host_appears_or_it_is_ended() -> Result<()> {
    let mut bed = Bed::new(options())?;
    let mut primary = bed.boot(Side::A)?;
    let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(3))?;
    let mut backup = listener(&mut bed, Side::B)?;
    enable(&bed, &mut primary, &mut backup, &[address(Side::S, 7100)])?;
    backup.vmm.kill()?;
    let search = |info: &Value| info["reprotection"]["attempts"].as_u64().unwrap_or_default();
    primary.vmm.wait_for("attempts", LIMIT, |vmm| {
        let info = vmm.ft_info()?;
        let error = info["reprotection"]["last_error"].as_str().unwrap_or_default();
        Ok(info["state"] == "solo" && search(&info) > 4 && error.contains("refused"))
    })?;
    let table = primary.vmm.remote(&["ft", "info"])?;
    ensure!(table.contains("re-protection") && table.contains("refused"), "{table}");
    loads.wait_progress(20)?;
    // The same host again, at its address of before.
    let mut backup = listener(&mut bed, Side::B)?;
    protected_by(&mut primary, &mut backup, &loads)?;
    ensure!(primary.vmm.ft_info()?["reprotection"].is_null());
    // The same failures were told once in each search.
    let failures = |host: &Host| -> Result<usize> {
        let told = events(host)?;
        Ok(told.iter().filter(|e| e["event"] == "reprotect_failed").count())
    };
    ensure!(failures(&primary)? <= 4, "{:?}", events(&primary)?);

    backup.vmm.kill()?;
    primary
        .vmm
        .wait_for("another search", LIMIT, |vmm| Ok(search(&vmm.ft_info()?) > 0))?;
    primary.vmm.remote(&["ft", "disable"])?;
    let mut backup = listener(&mut bed, Side::B)?;
    let mut spare = listener(&mut bed, Side::S)?;
    // Longer than any pause of this search so far.
    std::thread::sleep(Duration::from_secs(10));
    for host in [&mut backup, &mut spare] {
        ensure!(host.vmm.ft_state()? == "listening", "the search goes on");
    }
    let info = primary.vmm.ft_info()?;
    ensure!(info["state"] == "disabled" && info["auto_reprotect"] == false, "{info}");
    loads.wait_progress(20)?;
    loads.stop().map(drop)
}

/// A host that takes the connection and says nothing holds nobody up who ends FT, or the VM.
#[test]
fn kvm_root_a_spare_that_does_not_answer_holds_nobody_up() -> Result<()> {
    let mut bed = Bed::new(options())?;
    let silent = bed.network.within("s", || TcpListener::bind("10.99.0.3:7100"))?;
    silent.set_nonblocking(true)?;
    let accept = |loads: &Loads| -> Result<std::net::TcpStream> {
        let start = Instant::now();
        loop {
            loads.check()?;
            match silent.accept() {
                Ok((stream, _)) => break Ok(stream),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            ensure!(start.elapsed() < LIMIT, "nobody asks the silent spare");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    // The attempt itself would last a minute.
    let hung_up = |mut stream: std::net::TcpStream| -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut all = Vec::new();
        match stream.read_to_end(&mut all) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(e).context("the attempt goes on"),
        }
    };
    for end in ["disable", "power-off", "shutdown-vmm"] {
        // The model knows nothing of the VM before.
        bed.new_disk(Side::A)?;
        let mut primary = bed.boot(Side::A)?;
        let loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(4))?;
        let mut backup = listener(&mut bed, Side::B)?;
        enable(&bed, &mut primary, &mut backup, &[address(Side::S, 7100)])?;
        backup.vmm.kill()?;
        let stream = accept(&loads)?;
        let trying = primary.vmm.ft_info()?["reprotection"]["trying"].clone();
        ensure!(trying == "tcp:10.99.0.3:7100", "{trying}");
        loads.wait_progress(20)?;
        if end == "disable" {
            primary.vmm.remote(&["ft", "disable"])?;
            hung_up(stream)?;
            ensure!(primary.vmm.ft_state()? == "disabled");
            loads.wait_progress(20)?;
            continue;
        }
        loads.stop()?;
        match end {
            "power-off" => Control::open(&*bed.network, guest(CONTROL_PORT))?.power_off()?,
            _ => drop(primary.vmm.remote(&[end])?),
        }
        hung_up(stream)?;
        ensure!(
            primary.vmm.wait_end(LIMIT)?,
            "{end}: the VMM ended with an error: {}",
            primary.vmm.tail()
        );
    }
    Ok(())
}

/// A backup that is ended by its operator, or whose disk fails, leaves the VM unprotected just as a dead one does.
#[test]
fn kvm_root_a_backup_that_leaves_is_replaced() -> Result<()> {
    let mut bed = Bed::new(options())?;
    let mut primary = bed.boot(Side::A)?;
    let mut loads = Loads::start(&bed, &loads::model(&bed), &loads::Options::everything(5))?;
    let mut backup = listener(&mut bed, Side::B)?;
    let mut spare = listener(&mut bed, Side::S)?;
    enable(&bed, &mut primary, &mut backup, &[spare.peer.clone()])?;
    backup.vmm.remote(&["ft", "disable"])?;
    protected_by(&mut primary, &mut spare, &loads)?;
    // A planned failover keeps the list, too.
    bed.receive_at(&mut backup, &address(Side::B, 7100))?;
    primary.vmm.remote(&["ft", "failover"])?;
    protected_by(&mut spare, &mut backup, &loads)?;
    ensure!(primary.vmm.ft_state()? == "stopped");
    loads.verify(&spare.disk).map(drop)
}
