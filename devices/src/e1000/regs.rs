//! Registers of the 82540EM by the names and section numbers of Intel's *PCI/PCI-X Family of
//! Gigabit Ethernet Controllers Software Developer's Manual* (8254x), and the file that keeps their
//! values (`file.rs`).
//!
//! Offsets are bytes from base address register 0. Which bits software can change is
//! [`write_mask`]; registers whose writes do something are handled in `mmio.rs`.

mod file;

pub use file::RegisterFile;

/// Device Control (13.4.1).
pub const CTRL: u32 = 0x0000;
/// Second address of [`CTRL`] (13.4.1).
pub const CTRL_DUP: u32 = 0x0004;
/// Device Status (13.4.2).
pub const STATUS: u32 = 0x0008;
/// EEPROM/Flash Control and Data (13.4.3).
pub const EECD: u32 = 0x0010;
/// EEPROM Read (13.4.4).
pub const EERD: u32 = 0x0014;
/// Extended Device Control (13.4.6).
pub const CTRL_EXT: u32 = 0x0018;
/// MDI Control (13.4.7).
pub const MDIC: u32 = 0x0020;
/// Flow Control Address Low (13.4.8).
pub const FCAL: u32 = 0x0028;
/// Flow Control Address High (13.4.9).
pub const FCAH: u32 = 0x002c;
/// Flow Control Type (13.4.10).
pub const FCT: u32 = 0x0030;
/// VLAN Ether Type (13.4.11).
pub const VET: u32 = 0x0038;
/// Interrupt Cause Read (13.4.17).
pub const ICR: u32 = 0x00c0;
/// Interrupt Throttling (13.4.18), in units of 256 ns.
pub const ITR: u32 = 0x00c4;
/// Interrupt Cause Set (13.4.19).
pub const ICS: u32 = 0x00c8;
/// Interrupt Mask Set/Read (13.4.20).
pub const IMS: u32 = 0x00d0;
/// Interrupt Mask Clear (13.4.21).
pub const IMC: u32 = 0x00d8;
/// Receive Control (13.4.22).
pub const RCTL: u32 = 0x0100;
/// Flow Control Transmit Timer Value (13.4.12).
pub const FCTTV: u32 = 0x0170;
/// Transmit Configuration Word (13.4.13).
pub const TXCW: u32 = 0x0178;
/// Transmit Control (13.4.33).
pub const TCTL: u32 = 0x0400;
/// Transmit Inter Packet Gap (13.4.34).
pub const TIPG: u32 = 0x0410;
/// Adaptive IFS Throttle (13.4.35).
pub const AIT: u32 = 0x0458;
/// LED Control (13.4.15).
pub const LEDCTL: u32 = 0x0e00;
/// Packet Buffer Allocation (13.4.16), in KiB.
pub const PBA: u32 = 0x1000;
/// Flow Control Receive Threshold Low (13.4.23).
pub const FCRTL: u32 = 0x2160;
/// Flow Control Receive Threshold High (13.4.24).
pub const FCRTH: u32 = 0x2168;
/// Receive Descriptor Base Address Low (13.4.25).
pub const RDBAL: u32 = 0x2800;
/// Receive Descriptor Base Address High (13.4.26).
pub const RDBAH: u32 = 0x2804;
/// Receive Descriptor Length (13.4.27), in bytes.
pub const RDLEN: u32 = 0x2808;
/// Receive Descriptor Head (13.4.28).
pub const RDH: u32 = 0x2810;
/// Receive Descriptor Tail (13.4.29).
pub const RDT: u32 = 0x2818;
/// Receive Delay Timer (13.4.30), in units of 1.024 us.
pub const RDTR: u32 = 0x2820;
/// Receive Descriptor Control (13.4.46).
pub const RXDCTL: u32 = 0x2828;
/// Receive Interrupt Absolute Delay Timer (13.4.31), in units of 1.024 us.
pub const RADV: u32 = 0x282c;
/// Receive Small Packet Detect Interrupt (13.4.32), in bytes.
pub const RSRPD: u32 = 0x2c00;
/// TX DMA Control (13.4.42).
pub const TXDMAC: u32 = 0x3000;
/// Transmit Descriptor Base Address Low (13.4.36).
pub const TDBAL: u32 = 0x3800;
/// Transmit Descriptor Base Address High (13.4.37).
pub const TDBAH: u32 = 0x3804;
/// Transmit Descriptor Length (13.4.38), in bytes.
pub const TDLEN: u32 = 0x3808;
/// Transmit Descriptor Head (13.4.39).
pub const TDH: u32 = 0x3810;
/// Transmit Descriptor Tail (13.4.40).
pub const TDT: u32 = 0x3818;
/// Transmit Interrupt Delay Value (13.4.41), in units of 1.024 us.
pub const TIDV: u32 = 0x3820;
/// Transmit Descriptor Control (13.4.43).
pub const TXDCTL: u32 = 0x3828;
/// Transmit Absolute Interrupt Delay Value (13.4.44), in units of 1.024 us.
pub const TADV: u32 = 0x382c;
/// TCP Segmentation Pad and Minimum Threshold (13.4.45).
pub const TSPMT: u32 = 0x3830;
/// Receive Checksum Control (13.4.47).
pub const RXCSUM: u32 = 0x5000;
/// Multicast Table Array, 128 registers (13.5.1).
pub const MTA: u32 = 0x5200;
/// Receive Address Low and High, 16 pairs (13.5.2, 13.5.3).
pub const RA: u32 = 0x5400;
/// VLAN Filter Table Array, 128 registers (13.5.4).
pub const VFTA: u32 = 0x5600;
/// Wakeup Control (13.6.1).
pub const WUC: u32 = 0x5800;
/// Wakeup Filter Control (13.6.2).
pub const WUFC: u32 = 0x5808;
/// Management Control: only stored, there is no management controller.
pub const MANC: u32 = 0x5820;
/// IP Address Valid (13.6.4).
pub const IPAV: u32 = 0x5838;
/// IPv4 Address Table (13.6.5).
pub const IP4AT: u32 = 0x5840;
/// IPv6 Address Table (13.6.6).
pub const IP6AT: u32 = 0x5880;
/// Flexible Filter Length Table (13.6.9).
pub const FFLT: u32 = 0x5f00;
/// Flexible Filter Mask Table (13.6.10).
pub const FFMT: u32 = 0x9000;
/// Flexible Filter Value Table (13.6.11).
pub const FFVT: u32 = 0x9800;

/// Address pairs in [`RA`].
pub const RECEIVE_ADDRESSES: u32 = 16;

/// Bits of [`CTRL`].
pub mod ctrl {
    /// Full duplex.
    pub const FD: u32 = 1 << 0;
    /// Set Link Up: the MAC looks at the PHY's link indication.
    pub const SLU: u32 = 1 << 6;
    /// Speed, bits 9:8: 10, 100, 1000 Mb/s.
    pub const SPEED_SHIFT: u32 = 8;
    /// Speed of 1000 Mb/s.
    pub const SPEED_1000: u32 = 2 << SPEED_SHIFT;
    /// Force Speed.
    pub const FRCSPD: u32 = 1 << 11;
    /// Force Duplex.
    pub const FRCDPX: u32 = 1 << 12;
    /// Device Reset, clears itself.
    pub const RST: u32 = 1 << 26;
    /// Receive Flow Control Enable.
    pub const RFCE: u32 = 1 << 27;
    /// VLAN Mode Enable.
    pub const VME: u32 = 1 << 30;
    /// PHY Reset, for as long as it is set.
    pub const PHY_RST: u32 = 1 << 31;
}

/// Bits of [`CTRL_EXT`].
pub mod ctrl_ext {
    /// EEPROM Reset: load the defaults again; clears itself.
    pub const EE_RST: u32 = 1 << 13;
}

/// Bits of [`STATUS`].
pub mod status {
    /// Full duplex.
    pub const FD: u32 = 1 << 0;
    /// Link up.
    pub const LU: u32 = 1 << 1;
    /// Link speed, bits 7:6.
    pub const SPEED_SHIFT: u32 = 6;
    /// Auto-speed detection value, bits 9:8.
    pub const ASDV_SHIFT: u32 = 8;
}

/// Bits of [`MDIC`].
pub mod mdic {
    /// PHY register, bits 20:16.
    pub const REGADD_SHIFT: u32 = 16;
    /// PHY address, bits 25:21.
    pub const PHYADD_SHIFT: u32 = 21;
    /// Opcode write.
    pub const OP_WRITE: u32 = 1 << 26;
    /// Opcode read.
    pub const OP_READ: u32 = 2 << 26;
    /// Opcode bits.
    pub const OP_MASK: u32 = 3 << 26;
    /// Ready: the access is over.
    pub const READY: u32 = 1 << 28;
    /// Interrupt enable: set [`super::icr::MDAC`] at the end.
    pub const INTERRUPT: u32 = 1 << 29;
    /// Error: no PHY answered.
    pub const ERROR: u32 = 1 << 30;
}

/// Bits of [`ICR`], [`ICS`], [`IMS`] and [`IMC`].
pub mod icr {
    /// Transmit descriptor written back.
    pub const TXDW: u32 = 1 << 0;
    /// Transmit queue empty.
    pub const TXQE: u32 = 1 << 1;
    /// Link status change.
    pub const LSC: u32 = 1 << 2;
    /// Receive descriptor minimum threshold reached.
    pub const RXDMT0: u32 = 1 << 4;
    /// Receiver overrun.
    pub const RXO: u32 = 1 << 6;
    /// Receiver timer.
    pub const RXT0: u32 = 1 << 7;
    /// MDIO access complete.
    pub const MDAC: u32 = 1 << 9;
    /// Transmit descriptor low threshold reached.
    pub const TXD_LOW: u32 = 1 << 15;
    /// Small receive packet detected.
    pub const SRPD: u32 = 1 << 16;
    /// All bits that can be set; software may set and mask the reserved ones too.
    pub const ALL: u32 = 0x0001_ffff;
}

/// Bits of [`RCTL`].
pub mod rctl {
    /// Receiver enable.
    pub const EN: u32 = 1 << 1;
    /// Unicast promiscuous.
    pub const UPE: u32 = 1 << 3;
    /// Multicast promiscuous.
    pub const MPE: u32 = 1 << 4;
    /// Long packet enable.
    pub const LPE: u32 = 1 << 5;
    /// Loopback mode, bits 7:6.
    pub const LBM_MASK: u32 = 3 << 6;
    /// Receive descriptor minimum threshold size, bits 9:8.
    pub const RDMTS_SHIFT: u32 = 8;
    /// Multicast offset, bits 13:12.
    pub const MO_SHIFT: u32 = 12;
    /// Broadcast accept mode.
    pub const BAM: u32 = 1 << 15;
    /// Receive buffer size, bits 17:16.
    pub const BSIZE_SHIFT: u32 = 16;
    /// VLAN filter enable.
    pub const VFE: u32 = 1 << 18;
    /// Canonical form indicator enable.
    pub const CFIEN: u32 = 1 << 19;
    /// Canonical form indicator that is accepted.
    pub const CFI: u32 = 1 << 20;
    /// Discard pause frames.
    pub const DPF: u32 = 1 << 22;
    /// Pass MAC control frames.
    pub const PMCF: u32 = 1 << 23;
    /// Buffer size extension: sizes times 16.
    pub const BSEX: u32 = 1 << 25;
    /// Strip Ethernet CRC.
    pub const SECRC: u32 = 1 << 26;
}

/// Bits of [`TCTL`].
pub mod tctl {
    /// Transmit enable.
    pub const EN: u32 = 1 << 1;
    /// Pad short packets.
    pub const PSP: u32 = 1 << 3;
    /// Software XOFF transmission, clears itself.
    pub const SWXOFF: u32 = 1 << 22;
}

/// Bits of [`RXCSUM`].
pub mod rxcsum {
    /// Packet checksum start, bits 7:0.
    pub const PCSS_MASK: u32 = 0xff;
    /// IP checksum offload.
    pub const IPOFLD: u32 = 1 << 8;
    /// TCP/UDP checksum offload.
    pub const TUOFLD: u32 = 1 << 9;
}

/// Bit 31 of [`RDTR`] and [`TIDV`]: flush partial descriptor block, that is let the delayed
/// interrupt happen now; reads as 0.
pub const FPD: u32 = 1 << 31;

/// Address Valid bit of a Receive Address High register (13.5.3).
pub const RAH_AV: u32 = 1 << 31;

/// Bits of `offset` that a write changes; `None` where nothing is stored by a plain write.
pub fn write_mask(offset: u32) -> Option<u32> {
    Some(match offset {
        FCAL | RDBAH | TDBAH | LEDCTL | TSPMT | MANC => u32::MAX,
        FCAH | FCT | VET | FCTTV | ITR | AIT => 0xffff,
        RDH | RDT | TDH | TDT | RDTR | RADV | TIDV | TADV => 0xffff,
        TXCW => 0xc000_ffff,
        TIPG => 0x3fff_ffff,
        FCRTL | FCRTH => 0x8000_fff8,
        RDBAL | TDBAL => 0xffff_fff0,
        RDLEN | TDLEN => 0x000f_ff80,
        RCTL => 0x06df_b3fe,
        TCTL => 0x037f_fffa & !tctl::SWXOFF,
        CTRL => !ctrl::RST,
        CTRL_EXT => !ctrl_ext::EE_RST,
        PBA => 0x7f,
        RXDCTL => 0x013f_3f3f,
        TXDCTL => 0xff7f_3f3f,
        RSRPD => 0xfff,
        TXDMAC => 0x1,
        RXCSUM => 0x7ff,
        WUC => 0xf,
        WUFC => 0x000f_80ff,
        IPAV => 0x0001_000f,
        _ => match offset {
            MTA..0x5400 | VFTA..0x5800 => u32::MAX,
            RA..0x5480 if offset & 4 == 0 => u32::MAX,
            RA..0x5480 => RAH_AV | 0x0003_ffff,
            IP4AT..0x5860 | IP6AT..0x5890 => u32::MAX,
            FFLT..0x5f20 => 0x7ff,
            FFMT..0x9400 => 0xf,
            FFVT..0x9c00 => u32::MAX,
            _ => return None,
        },
    })
}

/// Register that an 82542-compatible alias address stands for (13.2, alternate offsets).
pub fn unalias(offset: u32) -> u32 {
    match offset {
        CTRL_DUP => CTRL,
        0x0040..0x00c0 => offset - 0x0040 + RA,
        0x0108 => RDTR,
        0x0110 => RDBAL,
        0x0114 => RDBAH,
        0x0118 => RDLEN,
        0x0120 => RDH,
        0x0128 => RDT,
        0x0160 => FCRTH,
        0x0168 => FCRTL,
        0x0200..0x0400 => offset - 0x0200 + MTA,
        0x0420 => TDBAL,
        0x0424 => TDBAH,
        0x0428 => TDLEN,
        0x0430 => TDH,
        0x0438 => TDT,
        0x0440 => TIDV,
        0x0600..0x0800 => offset - 0x0600 + VFTA,
        _ => offset,
    }
}
