//! Statistics registers (13.7): cleared by reading, stuck at their highest value.
//!
//! Octet counters are pairs of registers; reading the high half clears both. Sizes of packets count
//! the FCS.

use super::regs::RegisterFile;

/// Missed Packets Count (13.7.5).
pub const MPC: u32 = 0x4010;
/// XON Received Count (13.7.16).
pub const XONRXC: u32 = 0x4048;
/// XOFF Received Count (13.7.18).
pub const XOFFRXC: u32 = 0x4050;
/// FC Received Unsupported Count (13.7.20).
pub const FCRUC: u32 = 0x4058;
/// First of six counts of received packets by size (13.7.21).
pub const PRC64: u32 = 0x405c;
/// Good Packets Received Count (13.7.27).
pub const GPRC: u32 = 0x4074;
/// Broadcast Packets Received Count (13.7.28).
pub const BPRC: u32 = 0x4078;
/// Multicast Packets Received Count (13.7.29).
pub const MPRC: u32 = 0x407c;
/// Good Packets Transmitted Count (13.7.30).
pub const GPTC: u32 = 0x4080;
/// Good Octets Received Count, low half (13.7.31).
pub const GORCL: u32 = 0x4088;
/// Good Octets Transmitted Count, low half (13.7.32).
pub const GOTCL: u32 = 0x4090;
/// Receive No Buffers Count (13.7.33).
pub const RNBC: u32 = 0x40a0;
/// Receive Undersize Count (13.7.34).
pub const RUC: u32 = 0x40a4;
/// Receive Oversize Count (13.7.36).
pub const ROC: u32 = 0x40ac;
/// Total Octets Received, low half (13.7.41).
pub const TORL: u32 = 0x40c0;
/// Total Octets Transmitted, low half (13.7.42).
pub const TOTL: u32 = 0x40c8;
/// Total Packets Received (13.7.43).
pub const TPR: u32 = 0x40d0;
/// Total Packets Transmitted (13.7.44).
pub const TPT: u32 = 0x40d4;
/// First of six counts of transmitted packets by size (13.7.45).
pub const PTC64: u32 = 0x40d8;
/// Multicast Packets Transmitted Count (13.7.51).
pub const MPTC: u32 = 0x40f0;
/// Broadcast Packets Transmitted Count (13.7.52).
pub const BPTC: u32 = 0x40f4;
/// TCP Segmentation Context Transmitted Count (13.7.53).
pub const TSCTC: u32 = 0x40f8;
/// TCP Segmentation Context Transmit Fail Count (13.7.54).
pub const TSCTFC: u32 = 0x40fc;

/// First and last statistics register.
pub const RANGE: std::ops::RangeInclusive<u32> = 0x4000..=0x4124;

/// Low halves of the octet counters.
const PAIRS: [u32; 4] = [GORCL, GOTCL, TORL, TOTL];

/// How a packet is addressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cast {
    /// To one station.
    Unicast,
    /// To a group.
    Multicast,
    /// To all.
    Broadcast,
}

impl Cast {
    /// By destination address, the first six bytes of `frame`.
    pub fn of(frame: &[u8]) -> Self {
        match frame {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] => Self::Broadcast,
            [first, ..] if first & 1 != 0 => Self::Multicast,
            _ => Self::Unicast,
        }
    }
}

impl RegisterFile {
    /// Reads a statistics register and clears it.
    pub(super) fn read_statistic(&mut self, offset: u32) -> u32 {
        let value = self.get(offset);
        if let Some(low) = PAIRS
            .into_iter()
            .find(|&low| offset == low || offset == low + 4)
        {
            if offset != low {
                self.set(low, 0);
                self.set(offset, 0);
            }
        } else {
            self.set(offset, 0);
        }
        value
    }

    /// Adds 1 to a statistics register.
    pub(super) fn count(&mut self, offset: u32) {
        self.set(offset, self.get(offset).saturating_add(1));
    }

    fn count_octets(&mut self, low: u32, octets: usize) {
        let old = u64::from(self.get(low + 4)) << 32 | u64::from(self.get(low));
        let new = old.saturating_add(octets as u64);
        self.set(low, new as u32);
        self.set(low + 4, (new >> 32) as u32);
    }

    fn count_size(&mut self, first: u32, bytes_with_fcs: usize) {
        let class = match bytes_with_fcs {
            ..=64 => 0,
            65..=127 => 1,
            128..=255 => 2,
            256..=511 => 3,
            512..=1023 => 4,
            _ => 5,
        };
        self.count(first + 4 * class);
    }

    /// A packet was sent.
    pub(super) fn count_transmitted(&mut self, cast: Cast, bytes_with_fcs: usize) {
        self.count(TPT);
        self.count(GPTC);
        self.count_octets(TOTL, bytes_with_fcs);
        self.count_octets(GOTCL, bytes_with_fcs);
        self.count_size(PTC64, bytes_with_fcs);
        match cast {
            Cast::Unicast => {}
            Cast::Multicast => self.count(MPTC),
            Cast::Broadcast => self.count(BPTC),
        }
    }

    /// A packet came by, whether or not it is for this station.
    pub(super) fn count_seen(&mut self, bytes_with_fcs: usize) {
        self.count(TPR);
        self.count_octets(TORL, bytes_with_fcs);
    }

    /// A good packet passed the filters.
    pub(super) fn count_received(&mut self, cast: Cast, bytes_with_fcs: usize) {
        self.count(GPRC);
        self.count_octets(GORCL, bytes_with_fcs);
        self.count_size(PRC64, bytes_with_fcs);
        match cast {
            Cast::Unicast => {}
            Cast::Multicast => self.count(MPRC),
            Cast::Broadcast => self.count(BPRC),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_clears_and_counters_stick() {
        let mut regs = RegisterFile::power_on();
        regs.set(MPC, u32::MAX);
        regs.count(MPC);
        assert_eq!(regs.read_statistic(MPC), u32::MAX);
        assert_eq!(regs.read_statistic(MPC), 0);
    }

    #[test]
    fn octets_carry_and_are_cleared_by_the_high_half_only() {
        let mut regs = RegisterFile::power_on();
        regs.set(GORCL, u32::MAX - 10);
        regs.count_received(Cast::Unicast, 64);
        assert_eq!(regs.read_statistic(GORCL), 53);
        assert_eq!(regs.read_statistic(GORCL), 53);
        assert_eq!(regs.read_statistic(GORCL + 4), 1);
        assert_eq!((regs.get(GORCL), regs.get(GORCL + 4)), (0, 0));
    }

    #[test]
    fn each_size_has_one_class() {
        let sizes = [
            (64, 0),
            (65, 1),
            (127, 1),
            (128, 2),
            (511, 3),
            (1023, 4),
            (1024, 5),
        ];
        for (size, class) in sizes {
            let mut regs = RegisterFile::power_on();
            regs.count_transmitted(Cast::Broadcast, size);
            let counts: Vec<u32> = (0..6).map(|i| regs.get(PTC64 + 4 * i)).collect();
            assert_eq!(counts.iter().position(|&c| c == 1), Some(class));
            assert_eq!(counts.iter().sum::<u32>(), 1);
            assert_eq!(regs.get(BPTC), 1);
        }
    }
}
