//! The log channel's format: round trips, and that nothing that arrives can make us panic or allocate without bound.

#![allow(clippy::unwrap_used)]

use ft::audit::{ChunkSum, Mismatch, PageSum, Place};
use ft::config::{FtAudit, FtDurability, FtLimits};
use ft::copies::{BlockRun, CopyClaim, KnownCopy, SessionId, Side};
use ft::core::staging::{Staging, StagingError};
use ft::machine::{DiskChange, DiskIdentity, Identity, Input, Output, PAGE_SIZE, PageRun, Refusal, SharedDisk};
use ft::reprotect::{MAX_SPARES, Reprotect};
use ft::wire::frame::{EndMarker, Frame, Kind, OutFrame, encode};
use ft::wire::hello::{Accept, Hello};
use ft::wire::lines::PageLines;
use ft::wire::reader::{FrameReader, ReadError};
use ft::wire::{DecodeError, MAX_PAYLOAD, MAX_PIECE, header};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn bytes(frame: &OutFrame<'_>, seq: u64, mark: u64, stamp: u64) -> Vec<u8> {
    let (head, body) = frame.payload();
    [&frame.header(seq, mark, stamp)[..], head, body].concat()
}

fn stream(frames: &[Frame]) -> Vec<u8> {
    let out: Vec<OutFrame<'static>> = frames.iter().flat_map(encode).collect();
    (0u64..)
        .zip(&out)
        .flat_map(|(seq, frame)| bytes(frame, seq, seq + 7, seq + 9))
        .collect()
}

fn read_all(stream: &[u8]) -> (Vec<Frame>, ReadError) {
    let mut reader = FrameReader::new(stream);
    let mut frames = Vec::new();
    loop {
        match reader.next(&mut || ()) {
            Ok((envelope, frame)) => {
                assert_eq!(envelope.stamp, envelope.mark + 2);
                frames.push(frame);
            }
            Err(e) => return (frames, e),
        }
    }
}

fn claim() -> impl Strategy<Value = CopyClaim> {
    let runs = vec((any::<u64>(), any::<u64>()), 0..5);
    let known = (
        "[a-z0-9-]{0,30}",
        any::<u64>(),
        any::<bool>(),
        runs,
        vec(any::<(u64, u32)>(), 0..5),
    );
    let known = known.prop_map(|(name, generation, primary, runs, sample)| {
        CopyClaim::Known(KnownCopy {
            session: SessionId { name, generation },
            side: if primary { Side::Primary } else { Side::Backup },
            doubtful: runs
                .into_iter()
                .map(|(first, count)| BlockRun { first, count })
                .collect(),
            sample,
        })
    });
    prop_oneof![".{0,40}".prop_map(CopyClaim::Unknown), known]
}

fn identity() -> impl Strategy<Value = Identity> {
    let shared = proptest::option::of(proptest::option::of(any::<u64>()));
    let disk = ("[a-z]{1,8}", any::<u64>(), any::<bool>(), shared);
    let disk = disk.prop_map(|(id, size, readonly, shared)| DiskIdentity {
        id,
        size,
        readonly,
        shared: shared.map(|lock_gap| SharedDisk { lock_gap }),
    });
    let feature = ("[a-z0-9. ]{1,20}", any::<u32>());
    let memory = vec((any::<u64>(), any::<u64>()), 0..4);
    let numbers = (any::<u32>(), any::<u32>(), any::<u32>());
    (
        "[a-z]{0,20}",
        ".{0,50}",
        memory,
        vec(feature, 0..5),
        vec(disk, 0..3),
        numbers,
    )
        .prop_map(
            |(vm_id, config, memory, cpu_features, disks, (vcpus, tsc_khz, nics))| Identity {
                vm_id,
                vmm_version: "1".into(),
                config,
                memory,
                vcpus,
                cpu_features,
                tsc_khz,
                disks,
                nics,
            },
        )
}

fn runs(max: u64) -> impl Strategy<Value = Vec<PageRun>> {
    vec(
        (0u64..1 << 40, 1..=max).prop_map(|(page, count)| PageRun {
            gpa: page * PAGE_SIZE as u64,
            count,
        }),
        1..4,
    )
}

fn change() -> impl Strategy<Value = DiskChange> {
    prop_oneof![
        (0u64..1 << 60, vec(any::<u8>(), 0..2000)).prop_map(|(offset, data)| DiskChange::Write { offset, data }),
        (0u64..1 << 60, 0u64..1 << 60, any::<bool>()).prop_map(|(offset, len, unmap)| DiskChange::Zero {
            offset,
            len,
            unmap
        }),
        Just(DiskChange::Flush),
        (0u64..1 << 60, 0..=MAX_PIECE as u64, any::<u32>()).prop_map(|(offset, len, crc)| DiskChange::Check {
            offset,
            len,
            crc
        }),
    ]
}

fn output() -> impl Strategy<Value = Output> {
    let data = || vec(any::<u8>(), 1..300);
    prop_oneof![
        (any::<u16>(), data()).prop_map(|(nic, data)| Output::Frame { nic, data }),
        (any::<u16>(), data()).prop_map(|(console, data)| Output::Console { console, data }),
    ]
}

fn marker() -> impl Strategy<Value = EndMarker> {
    vec(any::<u64>(), 11).prop_map(|n| EndMarker {
        epoch: n[0],
        pages: n[1],
        zero_pages: n[2],
        disk: n[3],
        inputs: n[4],
        outputs: n[5],
        state_len: n[6],
        age_ns: n[7],
        audited: n[8],
        line_pages: n[9],
        audited_chunks: n[10],
        anew: n[0] % 2 == 0,
    })
}

fn mismatch() -> impl Strategy<Value = Mismatch> {
    let chunk = |ChunkSum { disk, offset, len, .. }| Place::Chunk { disk, offset, len };
    let place = prop_oneof![
        any::<u64>().prop_map(|gpa| Place::Page { gpa }),
        chunk_sum().prop_map(chunk)
    ];
    (place, any::<u32>(), any::<u32>()).prop_map(|(place, found, expected)| Mismatch { place, found, expected })
}

fn chunk_sum() -> impl Strategy<Value = ChunkSum> {
    (any::<u16>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(disk, offset, len, crc)| ChunkSum {
        disk,
        offset,
        len,
        crc,
    })
}

fn spares() -> impl Strategy<Value = Option<Reprotect>> {
    option::of(
        vec("tcp:[a-z]{1,20}:[1-9]", 0..=MAX_SPARES).prop_map(|spares| Reprotect {
            spares,
            peer: "unix:/b".into(),
        }),
    )
}

fn frame() -> impl Strategy<Value = Frame> {
    let limits = (1u32..10_000).prop_map(|n| FtLimits {
        max_epoch_ms: n,
        ..FtLimits::default()
    });
    prop_oneof![
        Just(Frame::Heartbeat),
        Just(Frame::Disarmed),
        (identity(), any::<u64>(), limits.clone(), spares()).prop_map(|(identity, generation, limits, reprotect)| {
            let (node, arbiter, store, token) = ("n".into(), "file:/x".into(), "s".into(), "t".into());
            Frame::Hello(Box::new(Hello {
                node,
                identity,
                generation,
                arbiter,
                store,
                token,
                durability: FtDurability::DiskOfBoth,
                audit: FtAudit::Repair,
                limits,
                reprotect,
            }))
        }),
        (any::<u64>(), vec((0u64..1 << 40, any::<u32>()), 1..40)).prop_map(|(epoch, sums)| {
            let sum = |(page, crc)| PageSum { gpa: page * 4096, crc };
            let sums = sums.into_iter().map(sum).collect();
            Frame::Audit { epoch, sums }
        }),
        (any::<u64>(), vec(chunk_sum(), 1..17)).prop_map(|(epoch, sums)| Frame::DiskAudit { epoch, sums }),
        vec(mismatch(), 1..17).prop_map(Frame::Mismatch),
        (".{0,40}", vec(claim(), 0..4)).prop_map(|(node, copies)| Frame::Accept(Box::new(Accept { node, copies }))),
        (".{0,40}", ".{0,40}").prop_map(|(code, message)| Frame::Refuse(Refusal { code, message })),
        (any::<u64>(), runs(3), any::<u8>()).prop_map(|(epoch, runs, fill)| {
            let pages: u64 = runs.iter().map(|run| run.count).sum();
            Frame::Pages {
                epoch,
                runs,
                data: vec![fill; pages as usize * PAGE_SIZE].into(),
            }
        }),
        (any::<u64>(), runs(1 << 20)).prop_map(|(epoch, runs)| Frame::ZeroPages { epoch, runs }),
        (any::<u64>(), vec((0u64..1 << 40, 1u64..), 1..20), any::<u8>()).prop_map(|(epoch, pages, fill)| {
            let page = |(page, mask)| PageLines { gpa: page * 4096, mask };
            let pages: Vec<PageLines> = pages.into_iter().map(page).collect();
            let data = vec![fill; pages.iter().map(|page| page.bytes()).sum()];
            Frame::Lines {
                epoch,
                pages,
                data: data.into(),
            }
        }),
        (any::<u64>(), any::<u16>(), change()).prop_map(|(epoch, disk, change)| Frame::Disk { epoch, disk, change }),
        (any::<u64>(), any::<u16>(), vec(any::<u8>(), 0..2000)).prop_map(|(epoch, nic, data)| Frame::Input {
            epoch,
            input: Input::Frame { nic, data: data.into() }
        }),
        (any::<u64>(), vec(output(), 1..5)).prop_map(|(epoch, outputs)| Frame::Outputs { epoch, outputs }),
        (any::<u64>(), vec(any::<u8>(), 1..2000)).prop_map(|(epoch, data)| Frame::State { epoch, data }),
        marker().prop_map(Frame::End),
        any::<u64>().prop_map(Frame::Ack),
        any::<u64>().prop_map(Frame::Handover),
        any::<u64>().prop_map(Frame::HandedOver),
        (any::<u64>(), ".{0,40}").prop_map(|(generation, reason)| Frame::HandoverFailed { generation, reason }),
        ".{0,40}".prop_map(Frame::Disarm),
        ".{0,40}".prop_map(Frame::Bye),
        limits.prop_map(Frame::Limits),
    ]
}

proptest! {
    #[test]
    fn frames_come_back_as_they_were(frames in vec(frame(), 1..8)) {
        let (back, end) = read_all(&stream(&frames));
        prop_assert_eq!(back, frames);
        prop_assert!(matches!(end, ReadError::Closed));
    }

    #[test]
    fn a_flipped_bit_is_always_found(frames in vec(frame(), 1..4), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut damaged = stream(&frames);
        let at = at.index(damaged.len());
        damaged[at] ^= 1 << bit;
        let (back, end) = read_all(&damaged);
        // Whole frames before the damage are as they were; the damaged one and what follows never comes out.
        prop_assert!(back.len() < frames.iter().map(|f| encode(f).len()).sum::<usize>());
        prop_assert!(matches!(end, ReadError::Decode { .. }), "{}", end);
    }

    #[test]
    fn a_cut_stream_gives_a_prefix(frames in vec(frame(), 1..4), at in any::<prop::sample::Index>()) {
        let whole = stream(&frames);
        let (back, end) = read_all(&whole[..at.index(whole.len())]);
        prop_assert!(frames.starts_with(&back));
        prop_assert!(matches!(end, ReadError::Closed));
    }

    #[test]
    fn random_bytes_are_no_frame(noise in vec(any::<u8>(), 0..5000)) {
        prop_assert!(read_all(&noise).0.is_empty());
    }

    /// A peer whose checksums are right but whose payloads are nonsense.
    #[test]
    fn random_payloads_never_panic(kind in any::<u8>(), flags in 0u8..3, payload in vec(any::<u8>(), 0..500)) {
        let _ = ft::wire::decode::decode(kind, flags, payload);
    }

    #[test]
    fn damaged_payloads_never_panic(frame in frame(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        for out in encode(&frame) {
            let (head, body) = out.payload();
            let mut payload = [head, body].concat();
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            let _ = ft::wire::decode::decode(out.kind() as u8, 0, payload);
        }
    }

    /// Frames of a broken primary: the staging area refuses, and never holds more than the VM can have.
    #[test]
    fn staging_stays_within_its_bounds(frames in vec(frame(), 1..60)) {
        let identity = Identity {
            vm_id: "vm".into(),
            vmm_version: "1".into(),
            config: String::new(),
            memory: vec![(0, 1 << 45)],
            vcpus: 1,
            cpu_features: Vec::new(),
            tsc_khz: 0,
            disks: [None, Some(SharedDisk { lock_gap: None })]
                .map(|shared| DiskIdentity { id: "d".into(), size: 1 << 61, readonly: false, shared })
                .to_vec(),
            nics: 1,
        };
        let mut staging = Staging::new(&identity, 4096);
        let mut logged = 0;
        for frame in frames {
            let one = 1;
            let taken = match frame {
                Frame::Pages { runs, data, .. } => staging.pages(one, runs, data).is_ok(),
                Frame::ZeroPages { runs, .. } => staging.zero_pages(one, &runs).is_ok(),
                Frame::Lines { pages, data, .. } => staging.lines(one, pages, data).is_ok(),
                Frame::Disk { disk, change, .. } => {
                    let size = if let DiskChange::Write { data, .. } = &change { data.len() } else { 0 };
                    let (disk, check) = (disk % 3, matches!(change, DiskChange::Check { .. }));
                    if disk == 1 {
                        prop_assert!(staging.check_copy(disk, &change).is_err());
                    }
                    let taken = staging.disk(one, disk, change).is_ok();
                    prop_assert!(!taken || disk == 1 || disk == 0 && !check);
                    logged += if taken { size } else { 0 };
                    taken
                }
                Frame::End(marker) => staging.end(&EndMarker { epoch: one, ..marker }).is_ok(),
                _ => false,
            };
            let _ = taken;
            prop_assert!(logged <= 4096);
        }
    }
}

#[test]
fn long_things_are_cut_into_pieces_and_come_back_whole() {
    let data: Vec<u8> = (0..MAX_PIECE * 5 / 2).map(|n| n as u8).collect();
    let frames = [
        Frame::Disk {
            epoch: 3,
            disk: 1,
            change: DiskChange::Write {
                offset: 512,
                data: data.clone(),
            },
        },
        Frame::State {
            epoch: 3,
            data: data.clone(),
        },
        Frame::Outputs {
            epoch: 3,
            outputs: vec![Output::Console {
                console: 0,
                data: data.clone(),
            }],
        },
    ];
    let (mut disk, mut state, mut console) = (Vec::new(), Vec::new(), Vec::new());
    for frame in read_all(&stream(&frames)).0 {
        match frame {
            Frame::Disk {
                change: DiskChange::Write { offset, data },
                ..
            } => {
                assert_eq!(offset, 512 + disk.len() as u64);
                disk.extend(data);
            }
            Frame::State { data, .. } => state.extend(data),
            Frame::Outputs { outputs, .. } => {
                for output in outputs {
                    let Output::Console { data, .. } = output else { panic!() };
                    console.extend(data);
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(disk == data && state == data && console == data);
}

/// A hello with these spares.
fn hello(spares: Vec<String>, peer: &str) -> Vec<u8> {
    let identity = Identity {
        vm_id: "v".into(),
        vmm_version: "1".into(),
        config: "{}".into(),
        memory: Vec::new(),
        vcpus: 1,
        cpu_features: Vec::new(),
        tsc_khz: 1,
        disks: Vec::new(),
        nics: 0,
    };
    let (node, arbiter, store, token) = ("n".into(), "file:/x".into(), "s".into(), "t".into());
    let peer = peer.into();
    let hello = Hello {
        node,
        identity,
        generation: 0,
        arbiter,
        store,
        token,
        durability: FtDurability::DiskOfBoth,
        audit: FtAudit::Stop,
        limits: FtLimits::default(),
        reprotect: Some(Reprotect { spares, peer }),
    };
    stream(&[Frame::Hello(Box::new(hello))])
}

#[test]
fn spares_of_a_peer_are_addresses_and_bounded() {
    let good = |n: usize| vec!["tcp:h:1".to_string(); n];
    let taken = |stream: &[u8]| read_all(stream).0.len() == 1;
    assert!(taken(&hello(good(MAX_SPARES), "tcp:h:1")));
    assert!(!taken(&hello(good(MAX_SPARES + 1), "tcp:h:1")));
    assert!(!taken(&hello(good(1), "nowhere")));
    assert!(!taken(&hello(vec!["unix:".into()], "tcp:h:1")));
    assert!(taken(&hello(vec![format!("tcp:{}:1", "h".repeat(249))], "tcp:h:1")));
    assert!(!taken(&hello(vec![format!("tcp:{}:1", "h".repeat(250))], "tcp:h:1")));
}

#[test]
fn r6_a_damaged_frame_is_named_by_number_and_type() {
    let mut damaged = stream(&[Frame::Heartbeat, Frame::Ack(7)]);
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    let said = read_all(&damaged).1.to_string();
    assert!(
        said.starts_with("frame number 1: payload checksum of a frame of type Ack is 0x"),
        "{said}"
    );
    damaged[4] ^= 1;
    let said = read_all(&damaged).1.to_string();
    assert!(
        said.starts_with("frame number 0: frame header checksum is 0x"),
        "{said}"
    );
}

#[test]
fn an_audit_without_a_checksum_is_refused() {
    let empty = ft::wire::decode::decode(Kind::Audit as u8, 0, 7u64.to_le_bytes().to_vec());
    assert!(
        matches!(empty, Err(DecodeError::Payload { kind: "audit", .. })),
        "{empty:?}"
    );
}

#[test]
fn r6_an_epoch_has_so_many_checksums_of_a_disk_at_most_and_of_such_pieces() {
    let disk = |size, readonly| DiskIdentity {
        id: "d".into(),
        size,
        readonly,
        shared: None,
    };
    let identity = Identity {
        vm_id: "vm".into(),
        vmm_version: "1".into(),
        config: String::new(),
        memory: Vec::new(),
        vcpus: 1,
        cpu_features: Vec::new(),
        tsc_khz: 0,
        disks: vec![disk(1 << 20, false), disk(1 << 20, true)],
        nics: 0,
    };
    let sum = |disk, offset, len| ChunkSum {
        disk,
        offset,
        len,
        crc: 0,
    };
    let mut staging = Staging::new(&identity, 4096);
    for wrong in [
        sum(0, 0, 0),
        sum(0, 0, 4097),
        sum(0, (1 << 20) - 1, 2),
        sum(0, u64::MAX, 1),
        sum(1, 0, 1),
        sum(2, 0, 1),
    ] {
        assert!(staging.disk_audit(1, vec![wrong]).is_err(), "{wrong:?}");
    }
    assert!(staging.disk_audit(1, vec![sum(0, 0, 4096); 256]).is_ok());
    assert!(staging.disk_audit(1, vec![sum(0, 0, 1)]).is_err());
    let marker = |audited_chunks| EndMarker {
        epoch: 1,
        audited_chunks,
        ..EndMarker::default()
    };
    assert!(staging.end(&marker(255)).is_err());
    assert!(staging.end(&marker(256)).is_ok());
}

#[test]
fn what_a_peer_can_make_us_allocate_is_bounded() {
    // A header that announces more than a frame can have, with right checksums.
    let header = header::Header {
        kind: 1,
        flags: 0,
        seq: 0,
        mark: 0,
        stamp: 0,
        len: u32::MAX,
        payload_crc: 0,
    };
    let (_, error) = read_all(&header.encode());
    let too_long = DecodeError::TooLong(u32::MAX);
    assert!(matches!(error, ReadError::Decode { number: 0, source } if source == too_long));
    // A small compressed frame that says it is 64 GiB.
    let mut payload = 7u64.to_le_bytes().to_vec();
    payload.extend(1u32.to_le_bytes());
    payload.extend(0u64.to_le_bytes());
    payload.extend((1u64 << 24).to_le_bytes());
    payload.extend([0; 100]);
    for flags in [0, header::FLAG_LZ4] {
        assert!(ft::wire::decode::decode(5, flags, payload.clone()).is_err());
    }
    assert!(u64::from(u32::MAX) > MAX_PAYLOAD as u64);
    // A gap in the numbers.
    let beat = &encode(&Frame::Heartbeat)[0];
    let (_, error) = read_all(&[bytes(beat, 0, 0, 2), bytes(beat, 2, 0, 2)].concat());
    assert!(matches!(
        error,
        ReadError::Decode {
            number: 1,
            source: DecodeError::Sequence { found: 2, expected: 1 }
        }
    ));
}

/// A frame of a few bytes must not make the backup write its RAM many times over: during pre-copy nothing is counted.
#[test]
fn a_frame_that_repeats_pages_is_refused() {
    let pages = 1 << 20;
    let identity = Identity {
        vm_id: "vm".into(),
        vmm_version: "1".into(),
        config: String::new(),
        memory: vec![(0, pages * PAGE_SIZE as u64)],
        vcpus: 1,
        cpu_features: Vec::new(),
        tsc_khz: 0,
        disks: Vec::new(),
        nics: 0,
    };
    let staging = Staging::new(&identity, 4096);
    let all = PageRun { gpa: 0, count: pages };
    assert_eq!(staging.check_pages(&[all]), Ok(()));
    let first = PageRun { gpa: 0, count: 1 };
    for runs in [vec![all, first], vec![all; 1000]] {
        assert!(matches!(staging.check_pages(&runs), Err(StagingError::Repeated { .. })));
    }
}
