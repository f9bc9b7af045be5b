//! Which received frames are for this station (3.2.1 and 13.5): sizes, MAC control frames, address
//! filters, VLAN filter.

use super::regs::{
    CTRL, FCAH, FCAL, MTA, RA, RAH_AV, RCTL, RECEIVE_ADDRESSES, RegisterFile, VET, VFTA, ctrl, rctl,
};
use super::stats::{Cast, FCRUC, ROC, RUC, XOFFRXC, XONRXC};

/// Shortest frame without FCS that has a header, in bytes.
pub const HEADER_BYTES: usize = 14;
/// Length of the FCS in bytes.
pub const FCS_BYTES: usize = 4;
/// Longest frame with FCS that is not a long packet, in bytes; a VLAN tag adds 4 (13.4.22, LPE).
const NORMAL_BYTES: usize = 1518;
/// Longest frame with FCS at all, in bytes.
const LONG_BYTES: usize = 16384;
/// Ethertype of MAC control frames.
const MAC_CONTROL: u16 = 0x8808;

/// What the filters say of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not for this station; counts in this statistics register, if any.
    Reject(Option<u32>),
    /// For this station.
    Accept {
        /// It passed by a filter that is not exact (PIF in the descriptor).
        inexact: bool,
        /// It carries an 802.1Q tag.
        tagged: bool,
    },
}

fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]))
}

/// Position of a multicast address in the multicast table array: the 12 bits of its last two bytes
/// that RCTL.MO selects (13.5.1).
pub fn multicast_hash(address: &[u8; 6], offset: u32) -> u32 {
    let high = u32::from(address[5]) << 8 | u32::from(address[4]);
    let shift = match offset {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 0,
    };
    high >> shift & 0xfff
}

/// The unicast addresses that pass exactly.
pub fn stations(regs: &RegisterFile) -> impl Iterator<Item = [u8; 6]> {
    let pairs = (0..RECEIVE_ADDRESSES).filter_map(|pair| {
        let high = regs.get(RA + 8 * pair + 4);
        let [a, b, c, d] = regs.get(RA + 8 * pair).to_le_bytes();
        let [e, f, ..] = high.to_le_bytes();
        // Valid, and the destination address is what is compared, as in `exact_match`.
        (high & (RAH_AV | 0x3_0000) == RAH_AV).then_some([a, b, c, d, e, f])
    });
    pairs.filter(|address| address[0] & 1 == 0)
}

fn exact_match(regs: &RegisterFile, address: &[u8; 6]) -> bool {
    let low = u32::from_le_bytes([address[0], address[1], address[2], address[3]]);
    let high = u32::from(u16::from_le_bytes([address[4], address[5]]));
    (0..RECEIVE_ADDRESSES).any(|pair| {
        let stored = regs.get(RA + 8 * pair + 4);
        // Address select (bits 17:16) must be "destination address".
        stored & RAH_AV != 0 && stored & 0x3_ffff == high && regs.get(RA + 8 * pair) == low
    })
}

fn table_bit(regs: &RegisterFile, table: u32, index: u32) -> bool {
    regs.get(table + 4 * (index >> 5 & 0x7f)) >> (index & 0x1f) & 1 != 0
}

/// A MAC control frame: never more than counted unless software asked for it.
fn mac_control(regs: &RegisterFile, frame: &[u8], address: &[u8; 6]) -> Option<Verdict> {
    let control = regs.get(RCTL);
    let flow_control = {
        let low = u32::from_le_bytes([address[0], address[1], address[2], address[3]]);
        let high = u32::from(u16::from_le_bytes([address[4], address[5]]));
        regs.get(FCAL) == low && regs.get(FCAH) == high || exact_match(regs, address)
    };
    if !flow_control || !regs.is_set(CTRL, ctrl::RFCE) {
        return (control & rctl::PMCF == 0).then_some(Verdict::Reject(None));
    }
    let counter = match (u16_at(frame, 14), u16_at(frame, 16)) {
        (Some(1), Some(0)) => XONRXC,
        (Some(1), Some(_)) => XOFFRXC,
        _ => FCRUC,
    };
    let pause = counter != FCRUC;
    let pass = control & rctl::PMCF != 0 && !(pause && control & rctl::DPF != 0);
    (!pass).then_some(Verdict::Reject(Some(counter)))
}

/// Judges `frame`, which has no FCS.
pub fn judge(regs: &RegisterFile, frame: &[u8]) -> Verdict {
    let control = regs.get(RCTL);
    let Some(address) = frame
        .first_chunk::<6>()
        .filter(|_| frame.len() >= HEADER_BYTES)
    else {
        return Verdict::Reject(Some(RUC));
    };
    let ethertype = u16_at(frame, 12).unwrap_or(0);
    let tagged = u32::from(ethertype) == regs.get(VET) && frame.len() >= HEADER_BYTES + 4;
    let bytes = frame.len() + FCS_BYTES;
    let limit = match control & rctl::LPE {
        0 => NORMAL_BYTES + if tagged { 4 } else { 0 },
        _ => LONG_BYTES,
    };
    if bytes > limit {
        return Verdict::Reject(Some(ROC));
    }
    if ethertype == MAC_CONTROL
        && let Some(verdict) = mac_control(regs, frame, address)
    {
        return verdict;
    }
    if tagged && control & rctl::VFE != 0 {
        let tag = u16_at(frame, 14).unwrap_or(0);
        let canonical = tag & 1 << 12 != 0;
        if !table_bit(regs, VFTA, u32::from(tag & 0xfff))
            || control & rctl::CFIEN != 0 && canonical != (control & rctl::CFI != 0)
        {
            return Verdict::Reject(None);
        }
    }
    let inexact = match Cast::of(address) {
        Cast::Broadcast if control & rctl::BAM != 0 => false,
        _ if exact_match(regs, address) => false,
        Cast::Unicast if control & rctl::UPE != 0 => true,
        Cast::Unicast => return Verdict::Reject(None),
        _ if control & rctl::MPE != 0 => true,
        _ => {
            let hash = multicast_hash(address, control >> rctl::MO_SHIFT & 3);
            if !table_bit(regs, MTA, hash) {
                return Verdict::Reject(None);
            }
            true
        }
    };
    Verdict::Accept { inexact, tagged }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXACT: Verdict = Verdict::Accept {
        inexact: false,
        tagged: false,
    };
    const INEXACT: Verdict = Verdict::Accept {
        inexact: true,
        tagged: false,
    };
    const NO: Verdict = Verdict::Reject(None);

    fn frame(address: [u8; 6], ethertype: u16, len: usize) -> Vec<u8> {
        let mut frame = vec![0; len];
        frame[..6].copy_from_slice(&address);
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        frame
    }

    fn regs(control: u32) -> RegisterFile {
        let mut regs = RegisterFile::power_on();
        regs.set(RCTL, control);
        regs
    }

    #[test]
    fn unicast_needs_a_valid_address_pair_or_promiscuity() {
        let address = [2, 0, 0, 0, 0, 9];
        let frame = frame(address, 0x800, 60);
        let mut regs = regs(0);
        assert_eq!(judge(&regs, &frame), NO);
        regs.set(RA + 8 * 15, 0x0000_0002);
        regs.set(RA + 8 * 15 + 4, 0x0900);
        assert_eq!(judge(&regs, &frame), NO, "the pair is not valid");
        regs.set(RA + 8 * 15 + 4, RAH_AV | 0x0900);
        assert_eq!(judge(&regs, &frame), EXACT);
        regs.set(RA + 8 * 15 + 4, 0);
        regs.set(RCTL, rctl::UPE);
        assert_eq!(judge(&regs, &frame), INEXACT);
    }

    #[test]
    fn the_stations_are_the_valid_unicast_pairs() {
        let mut regs = regs(0);
        for (pair, low, high) in [
            (0, 0x0403_0202, RAH_AV | 0x0605),
            (3, 0x0403_0204, 0x0605),
            (4, 0x0403_0201, RAH_AV | 0x0605),
            (5, 0x0403_0206, RAH_AV | 0x1_0605),
            (15, 0x0403_0208, RAH_AV | 0x0605),
        ] {
            regs.set(RA + 8 * pair, low);
            regs.set(RA + 8 * pair + 4, high);
        }
        let all: Vec<_> = stations(&regs).collect();
        assert_eq!(all, [[2, 2, 3, 4, 5, 6], [8, 2, 3, 4, 5, 6]]);
        for address in all {
            assert_eq!(judge(&regs, &frame(address, 0x800, 60)), EXACT);
        }
    }

    #[test]
    fn broadcast_needs_bam() {
        let frame = frame([0xff; 6], 0x806, 60);
        assert_eq!(judge(&regs(0), &frame), NO);
        assert_eq!(judge(&regs(rctl::UPE), &frame), NO);
        assert_eq!(judge(&regs(rctl::BAM), &frame), EXACT);
        assert_eq!(judge(&regs(rctl::MPE), &frame), INEXACT);
    }

    #[test]
    fn long_frames_need_lpe_and_a_tag_adds_four_bytes() {
        let plain = |len| frame([0xff; 6], 0x800, len);
        let tagged = |len| frame([0xff; 6], 0x8100, len);
        let mut regs = regs(rctl::BAM);
        assert_eq!(judge(&regs, &plain(1514)), EXACT);
        assert_eq!(judge(&regs, &plain(1515)), Verdict::Reject(Some(ROC)));
        assert!(matches!(
            judge(&regs, &tagged(1518)),
            Verdict::Accept { tagged: true, .. }
        ));
        assert_eq!(judge(&regs, &tagged(1519)), Verdict::Reject(Some(ROC)));
        regs.set(RCTL, rctl::BAM | rctl::LPE);
        assert_eq!(judge(&regs, &plain(16380)), EXACT);
        assert_eq!(judge(&regs, &plain(16381)), Verdict::Reject(Some(ROC)));
        assert_eq!(judge(&regs, &plain(14)[..13]), Verdict::Reject(Some(RUC)));
    }

    #[test]
    fn vlan_filter_looks_at_the_table_and_the_canonical_bit() {
        let mut frame = frame([0xff; 6], 0x8100, 64);
        frame[14..16].copy_from_slice(&0x6123u16.to_be_bytes());
        let mut regs = regs(rctl::BAM | rctl::VFE);
        assert_eq!(judge(&regs, &frame), NO);
        regs.set(VFTA + 4 * (0x123 >> 5), 1 << (0x123 & 0x1f));
        assert_ne!(judge(&regs, &frame), NO);
        regs.set(RCTL, rctl::BAM | rctl::VFE | rctl::CFIEN | rctl::CFI);
        assert_eq!(judge(&regs, &frame), NO);
        frame[14] |= 0x10;
        assert_ne!(judge(&regs, &frame), NO);
    }

    #[test]
    fn pause_frames_are_counted_and_kept_from_the_host() {
        let mut frame = frame([0x01, 0x80, 0xc2, 0, 0, 1], MAC_CONTROL, 60);
        frame[14..18].copy_from_slice(&[0, 1, 0xff, 0xff]);
        let mut regs = regs(rctl::MPE);
        assert_eq!(judge(&regs, &frame), NO);
        regs.set(FCAL, 0x00c2_8001);
        regs.set(FCAH, 0x0100);
        regs.set(CTRL, ctrl::RFCE);
        assert_eq!(judge(&regs, &frame), Verdict::Reject(Some(XOFFRXC)));
        frame[16..18].fill(0);
        assert_eq!(judge(&regs, &frame), Verdict::Reject(Some(XONRXC)));
        regs.set(RCTL, rctl::MPE | rctl::PMCF);
        assert_eq!(judge(&regs, &frame), INEXACT);
    }

    proptest! {
        /// The driver's own formula for the table position, per multicast offset.
        #[test]
        fn multicast_passes_by_its_hash_bit_only(mut address in any::<[u8; 6]>(), mo in 0u32..4) {
            address[0] |= 1;
            prop_assume!(address != [0xff; 6]);
            let (a4, a5) = (u32::from(address[4]), u32::from(address[5]));
            let hash = match mo {
                0 => a4 >> 4 | a5 << 4,
                1 => a4 >> 3 | a5 << 5,
                2 => a4 >> 2 | a5 << 6,
                _ => a4 | a5 << 8,
            } & 0xfff;
            let frame = frame(address, 0x800, 60);
            let mut regs = regs(mo << rctl::MO_SHIFT);
            prop_assert_eq!(judge(&regs, &frame), NO);
            regs.set(MTA + 4 * (hash >> 5), 1 << (hash & 0x1f));
            prop_assert_eq!(judge(&regs, &frame), INEXACT);
            for register in 0..128 {
                regs.set(MTA + 4 * register, u32::MAX);
            }
            regs.set(MTA + 4 * (hash >> 5), !(1 << (hash & 0x1f)));
            prop_assert_eq!(judge(&regs, &frame), NO);
        }
    }
}
