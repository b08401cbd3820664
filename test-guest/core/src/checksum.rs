//! The Internet checksum of TCP and UDP over IPv4 in Ethernet frames (RFC 1071, 768, 9293), for cards that leave it to us
//! or take it from us.

const ETHERNET: usize = 14;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// Where a card finds what it needs to finish a segment's checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// Where the segment starts in the frame: the sum runs from here.
    pub start: u16,
    /// Where the sum goes, from there.
    pub offset: u16,
    /// Bytes of all headers.
    pub headers: u16,
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
    let (halves, odd) = tail.as_chunks::<2>();
    total += halves.iter().map(|h| u64::from(u16::from_ne_bytes(*h))).sum::<u64>();
    total + odd.iter().map(|b| u64::from(u16::from_ne_bytes([*b, 0]))).sum::<u64>()
}

/// Folds to 16 bits, in the byte order of memory.
fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// A segment of a frame.
struct Segment {
    protocol: u8,
    start: usize,
    end: usize,
    pseudo: u64,
}

/// The TCP or UDP segment of an IPv4 frame that is not a fragment.
fn segment(frame: &[u8]) -> Option<Segment> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != TYPE_IPV4 || ip.len() < 20 {
        return None;
    }
    let header = 4 * usize::from(ip[0] & 0xf);
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
    if header < 20 || total < header || total > ip.len() || fragment {
        return None;
    }
    let (protocol, len) = (ip[9], (total - header) as u16);
    let minimum = match protocol {
        PROTOCOL_TCP => 20,
        PROTOCOL_UDP => 8,
        _ => return None,
    };
    let pseudo = sum(&ip[12..20]) + u64::from(u16::from_ne_bytes([0, protocol])) + u64::from(len.to_be());
    (len >= minimum).then_some(Segment {
        protocol,
        start: ETHERNET + header,
        end: ETHERNET + total,
        pseudo,
    })
}

/// Puts the pseudo-header's sum into a TCP frame, for a card that does the rest. None for any other frame.
pub fn prepare(frame: &mut [u8]) -> Option<Partial> {
    let found = segment(frame).filter(|s| s.protocol == PROTOCOL_TCP)?;
    let at = found.start + TCP_CHECKSUM;
    frame[at..at + 2].copy_from_slice(&fold(found.pseudo).to_ne_bytes());
    let tcp_header = 4 * usize::from(frame[found.start + 12] >> 4);
    Some(Partial {
        start: found.start as u16,
        offset: TCP_CHECKSUM as u16,
        headers: (found.start + tcp_header) as u16,
    })
}

/// The frame's TCP or UDP checksum holds; true for frames without one.
pub fn holds(frame: &[u8]) -> bool {
    let Some(found) = segment(frame) else { return true };
    let bytes = &frame[found.start..found.end];
    if found.protocol == PROTOCOL_UDP && bytes[UDP_CHECKSUM..UDP_CHECKSUM + 2] == [0, 0] {
        return true;
    }
    fold(found.pseudo + sum(bytes)) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(protocol: u8, segment: &[u8]) -> Vec<u8> {
        let mut out = vec![0; ETHERNET];
        out[12..14].copy_from_slice(&TYPE_IPV4);
        let total = (20 + segment.len()) as u16;
        out.extend_from_slice(&[0x45, 0]);
        out.extend_from_slice(&total.to_be_bytes());
        out.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0, 192, 168, 100, 1, 192, 168, 100, 2]);
        out.extend_from_slice(segment);
        out
    }

    /// A card that follows the virtio specification.
    fn finish(frame: &mut [u8], partial: Partial) {
        let start = usize::from(partial.start);
        let value = !fold(sum(&frame[start..]));
        let at = start + usize::from(partial.offset);
        frame[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    #[test]
    fn known_datagram() {
        // By hand: c0a8 6401 c0a8 6402 0011 000a, 1234 0007 000a and 6869 sum to 0x2c41c, that is 0xc41e.
        let segment = [0x12, 0x34, 0, 7, 0, 10, 0, 0, b'h', b'i'];
        let mut datagram = frame(PROTOCOL_UDP, &segment);
        assert!(holds(&datagram), "no checksum");
        datagram[40..42].copy_from_slice(&[0x3b, 0xe1]);
        assert!(holds(&datagram));
        datagram[43] ^= 1;
        assert!(!holds(&datagram));
    }

    #[test]
    fn prepared_frames_hold_when_finished() {
        for len in [20usize, 21, 22, 23, 60, 1460, 64_000] {
            let mut segment: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            segment[12] = 5 << 4;
            let mut tcp = frame(PROTOCOL_TCP, &segment);
            let partial = prepare(&mut tcp).unwrap();
            assert_eq!((partial.start, partial.offset, partial.headers), (34, 16, 54));
            finish(&mut tcp, partial);
            assert!(holds(&tcp), "{len}");
            tcp[34 + len - 1] ^= 0x40;
            assert!(!holds(&tcp), "{len}");
        }
    }

    #[test]
    fn other_frames_are_left_alone() {
        for bad in [&[][..], &[0; 13], &[0; 60]] {
            assert!(holds(bad));
            assert_eq!(prepare(&mut bad.to_vec()), None);
        }
        let whole = frame(PROTOCOL_TCP, &[1; 40]);
        assert!(!holds(&whole));
        for cut in 0..whole.len() {
            assert!(holds(&whole[..cut]), "{cut}");
        }
        let mut fragment = whole.clone();
        fragment[20] = 0x20;
        assert!(holds(&fragment));
        assert_eq!(prepare(&mut frame(PROTOCOL_UDP, &[1; 40])), None);
    }
}
