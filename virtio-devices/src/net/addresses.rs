//! The guest's own addresses: learned from what it sends, announced after a move.
//!
//! Learned from ARP and IPv6 neighbour discovery alone, in which a machine speaks of its own addresses. The source
//! addresses of other packets do not serve: a guest that routes sends those of others, and announcing these would
//! draw their traffic here.

use super::persist::LearnedAddress;
use crate::backend::VNET_HEADER_SIZE;

/// Addresses that are kept.
const MAX: usize = 16;
/// Bytes of a frame (without vnet header) that are looked at: Ethernet, IPv6, neighbour advertisement.
pub(super) const PEEK: usize = 14 + 40 + 24;

const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

fn array<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

/// The address that a frame sent by `mac` says is its own.
pub(super) fn own_address(frame: &[u8], mac: &[u8; 6]) -> Option<LearnedAddress> {
    match array::<2>(frame, 12)? {
        ETHERTYPE_ARP => {
            // Hardware Ethernet, protocol IPv4, lengths 6 and 4; then operation, sender MAC, sender IP.
            let header: [u8; 6] = array(frame, 14)?;
            let ip: [u8; 4] = array(frame, 28)?;
            let own = header == [0, 1, 8, 0, 6, 4] && array::<6>(frame, 22)? == *mac;
            // A probe has no sender address (RFC 5227).
            (own && ip != [0; 4] && ip != [0xff; 4] && ip[0] & 0xf0 != 0xe0).then_some(LearnedAddress::V4(ip))
        }
        ETHERTYPE_IPV6 => {
            if frame.get(20) != Some(&ICMPV6) || array::<6>(frame, 6)? != *mac {
                return None;
            }
            let ip: [u8; 16] = match *frame.get(54)? {
                NEIGHBOUR_SOLICITATION => array(frame, 22)?,
                NEIGHBOUR_ADVERTISEMENT => array(frame, 62)?,
                _ => return None,
            };
            (ip != [0; 16] && ip[0] != 0xff).then_some(LearnedAddress::V6(ip))
        }
        _ => None,
    }
}

/// Puts an address at the end of the table, the oldest out when it is full.
pub(super) fn remember(table: &mut Vec<LearnedAddress>, address: LearnedAddress) {
    if table.last() == Some(&address) {
        return;
    }
    table.retain(|known| *known != address);
    if table.len() >= MAX {
        table.remove(0);
    }
    table.push(address);
}

fn ethernet(destination: [u8; 6], mac: &[u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER_SIZE];
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(mac);
    frame.extend_from_slice(&ethertype);
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(VNET_HEADER_SIZE + 60), 0);
    frame
}

/// ARP and RARP share their format.
fn arp(operation: u8, sender: &[u8; 6], sender_ip: [u8; 4], target: &[u8; 6], target_ip: [u8; 4]) -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4, 0, operation];
    payload.extend_from_slice(sender);
    payload.extend_from_slice(&sender_ip);
    payload.extend_from_slice(target);
    payload.extend_from_slice(&target_ip);
    payload
}

/// An unsolicited neighbour advertisement (RFC 4861, 4.4 and 7.2.6), with the override flag.
fn neighbour_advertisement(mac: &[u8; 6], ip: [u8; 16]) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend_from_slice(&ip);
    // Option: target link-layer address.
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(mac);
    let mut sum = message.len() as u32 + u32::from(ICMPV6);
    for pair in [&ip[..], &ALL_NODES, &message].concat().chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, 255];
    packet.extend_from_slice(&ip);
    packet.extend_from_slice(&ALL_NODES);
    packet.extend_from_slice(&message);
    packet
}

/// Frames, with vnet headers, that tell switches and neighbours where the guest now is: RARP for the switches, whatever
/// the guest speaks, and gratuitous ARP or unsolicited neighbour advertisements for the addresses known.
pub(super) fn announcements(mac: &[u8; 6], learned: &[LearnedAddress]) -> Vec<Vec<u8>> {
    let mut frames = vec![ethernet(
        BROADCAST,
        mac,
        ETHERTYPE_RARP,
        &arp(3, mac, [0; 4], mac, [0; 4]),
    )];
    for address in learned {
        frames.push(match *address {
            LearnedAddress::V4(ip) => ethernet(BROADCAST, mac, ETHERTYPE_ARP, &arp(1, mac, ip, &[0; 6], ip)),
            LearnedAddress::V6(ip) => {
                let packet = neighbour_advertisement(mac, ip);
                ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6, &packet)
            }
        });
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn what_is_announced_is_what_would_be_learned() {
        let learned = [LearnedAddress::V4([10, 0, 0, 7]), LearnedAddress::V6([0xfd; 16])];
        let frames = announcements(&MAC, &learned);
        assert_eq!(frames.len(), 3);
        assert_eq!(own_address(&frames[0][VNET_HEADER_SIZE..], &MAC), None);
        for (frame, address) in frames[1..].iter().zip(learned) {
            let frame = &frame[VNET_HEADER_SIZE..];
            assert_eq!(own_address(frame, &MAC), Some(address));
            assert_eq!(own_address(frame, &[2, 0, 0, 0, 0, 8]), None, "another machine's");
            for len in 0..frame.len() {
                own_address(&frame[..len], &MAC);
            }
        }
        // The checksum of the advertisement over its pseudo header is right: all ones with the sum put in.
        let packet = &frames[2][VNET_HEADER_SIZE + 14..];
        let mut sum = 32 + u32::from(ICMPV6);
        for pair in packet[8..72].chunks_exact(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        }
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn other_packets_and_probes_teach_nothing() {
        let mut ipv4 = vec![0; 64];
        ipv4[6..12].copy_from_slice(&MAC);
        ipv4[12..14].copy_from_slice(&[8, 0]);
        assert_eq!(own_address(&ipv4, &MAC), None);
        let probe = ethernet(
            BROADCAST,
            &MAC,
            ETHERTYPE_ARP,
            &arp(1, &MAC, [0; 4], &[0; 6], [10, 0, 0, 1]),
        );
        assert_eq!(own_address(&probe[VNET_HEADER_SIZE..], &MAC), None);
    }

    #[test]
    fn the_table_keeps_the_newest() {
        let mut table = Vec::new();
        for n in 0..40u8 {
            remember(&mut table, LearnedAddress::V4([10, 0, 0, n]));
            remember(&mut table, LearnedAddress::V4([10, 0, 0, 1]));
        }
        assert_eq!(table.len(), MAX);
        assert_eq!(table.last(), Some(&LearnedAddress::V4([10, 0, 0, 1])));
        assert!(table.contains(&LearnedAddress::V4([10, 0, 0, 39])));
    }
}
