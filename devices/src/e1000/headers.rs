//! The headers of packets on their way out: checksum contexts, VLAN tags, and what segmentation
//! changes from segment to segment (3.3.6 and 3.5.7).

use serde::{Deserialize, Serialize};

use super::checksum::{fold, insert};
use super::tx_descriptor::command;

/// Room in front of packet data for a VLAN tag, in bytes.
pub const TAG_BYTES: usize = 4;

/// Packet options of a data descriptor (3.3.7.3): insert the IP checksum.
pub const POPTS_IXSM: u8 = 1 << 0;
/// Insert the TCP or UDP checksum.
pub const POPTS_TXSM: u8 = 1 << 1;

/// A checksum context (3.3.6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// IP checksum start, offset and end.
    pub ipcss: u8,
    pub ipcso: u8,
    pub ipcse: u16,
    /// TCP/UDP checksum start, offset and end.
    pub tucss: u8,
    pub tucso: u8,
    pub tucse: u16,
    /// Payload length in bytes.
    pub paylen: u32,
    /// Header length in bytes.
    pub hdrlen: u8,
    /// Maximum segment size in bytes.
    pub mss: u16,
    pub tcp: bool,
    pub ipv4: bool,
}

impl Context {
    /// From a context descriptor whose third word is `lower`.
    pub fn decode(descriptor: &[u8; 16], lower: u32) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([descriptor[at], descriptor[at + 1]]);
        Self {
            ipcss: descriptor[0],
            ipcso: descriptor[1],
            ipcse: u16_at(2),
            tucss: descriptor[4],
            tucso: descriptor[5],
            tucse: u16_at(6),
            paylen: lower & 0xf_ffff,
            hdrlen: descriptor[13],
            mss: u16_at(14),
            tcp: lower & command::TCP != 0,
            ipv4: lower & command::IP != 0,
        }
    }
}

/// Moves the addresses to the front of `data`, which begins with `TAG_BYTES` of room, and puts the
/// tag behind them.
pub fn insert_tag(data: &mut [u8], ethertype: u16, tag: u16) {
    data.copy_within(TAG_BYTES..TAG_BYTES + 12, 0);
    data[12..14].copy_from_slice(&ethertype.to_be_bytes());
    data[14..16].copy_from_slice(&tag.to_be_bytes());
}

/// Adapts the headers of one segment (3.5.7): lengths, IP identification, sequence number, flags,
/// checksums. `segment` begins with `TAG_BYTES` of room; fields that lie outside of it are left
/// out.
pub fn fix_up(
    context: &Context,
    popts: u8,
    index: u32,
    last: bool,
    payload_offset: usize,
    segment: &mut [u8],
) {
    let frame = &mut segment[TAG_BYTES..];
    let length = frame.len();
    let (ip, transport) = (usize::from(context.ipcss), usize::from(context.tucss));
    let put = |frame: &mut [u8], at: usize, value: u16| {
        if let Some(field) = frame.get_mut(at..at + 2) {
            field.copy_from_slice(&value.to_be_bytes());
        }
    };
    let get = |frame: &[u8], at: usize| match frame.get(at..at + 2) {
        Some(field) => u16::from_be_bytes([field[0], field[1]]),
        None => 0,
    };
    let ip_bytes = length.saturating_sub(ip);
    if context.ipv4 {
        put(frame, ip + 2, ip_bytes as u16);
        let id = get(frame, ip + 4).wrapping_add(index as u16);
        put(frame, ip + 4, id);
    } else {
        put(frame, ip + 4, ip_bytes.saturating_sub(40) as u16);
    }
    let transport_bytes = length.saturating_sub(transport) as u16;
    if context.tcp {
        if let Some(field) = frame.get_mut(transport + 4..transport + 8) {
            let old = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
            field.copy_from_slice(&old.wrapping_add(payload_offset as u32).to_be_bytes());
        }
        if !last && let Some(flags) = frame.get_mut(transport + 13) {
            // FIN and PSH belong to the last segment only.
            *flags &= !0x09;
        }
    } else {
        put(frame, transport + 4, transport_bytes);
    }
    if popts & POPTS_IXSM != 0 {
        insert(frame, context.ipcss, context.ipcso, context.ipcse, false);
    }
    if popts & POPTS_TXSM != 0 {
        // The driver put the sum of the pseudo header there, without the length.
        let field = usize::from(context.tucso);
        let seed = u64::from(get(frame, field)) + u64::from(transport_bytes);
        put(frame, field, fold(seed));
        insert(
            frame,
            context.tucss,
            context.tucso,
            context.tucse,
            !context.tcp,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_outside_of_a_segment_are_left_out() {
        let context = Context {
            ipcss: 255,
            ipcso: 255,
            tucss: 254,
            tucso: 255,
            ..Context::default()
        };
        for tcp in [false, true] {
            for ipv4 in [false, true] {
                let context = Context {
                    tcp,
                    ipv4,
                    ..context
                };
                let mut segment = vec![7; 60];
                fix_up(&context, 3, 5, false, 100, &mut segment);
                assert_eq!(segment, vec![7; 60]);
            }
        }
    }
}
