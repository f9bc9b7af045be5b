//! Interrupt controllers and timer of the guest's processor as a call in the domain reaches them.
//!
//! The private VM has none. What a kernel function writes to the I/O APIC, to send an interrupt to
//! another processor or to set the timer is kept until the call commits, and forgotten otherwise.

use devices::bus::Bus;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, Msrs, kvm_irqchip, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};

/// Guest physical address of the I/O APIC's page (82093AA datasheet, section 3.0).
const IO_APIC: u64 = 0xfec0_0000;
const PAGE_SIZE: u64 = 0x1000;
/// I/O register select and window registers (82093AA datasheet, section 3.1).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
/// Index registers: identification, version, arbitration, first redirection table entry (section
/// 3.2).
const IOAPICID: u32 = 0;
const IOAPICVER: u32 = 1;
const IOAPICARB: u32 = 2;
const IOREDTBL: u32 = 0x10;
/// Version of KVM's I/O APIC, with the number of its last pin in bits 16 to 23.
const VERSION: u32 = 0x11 | 23 << 16;
/// Delivery status and remote IRR of a redirection table entry are read-only.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;

/// IA32_X2APIC_ICR, IA32_X2APIC_SELF_IPI and IA32_TSC_DEADLINE (Intel SDM volume 3, table 11-6 and
/// section 11.5.4.1).
const POSTED_MSRS: [u32; 3] = [0x830, 0x83f, 0x6e0];
/// Most register writes that wait; no honest call makes nearly as many.
const MAX_POSTED: usize = 256;

/// Ports below are of devices that are on a PC's board; KVM has some of them itself.
const BOARD_PORTS_END: u16 = 0x100;
/// Edge or level of the interrupt controllers' inputs, which KVM has (82371AB datasheet, section
/// 4.2.7).
const ELCR_PORTS: std::ops::RangeInclusive<u16> = 0x4d0..=0x4d1;

/// The platform during one call.
pub struct Platform<'a> {
    ports: Option<&'a Bus>,
    vm: &'a VmFd,
    vcpu: &'a VcpuFd,
    io_apic: Option<Box<kvm_irqchip>>,
    /// Redirection table entries that were stored to, by bit.
    changed: u32,
    msrs: Vec<kvm_msr_entry>,
}

impl<'a> Platform<'a> {
    /// For a call on `vcpu` of the guest `vm`, whose other vCPUs are held.
    pub fn new(vm: &'a VmFd, vcpu: &'a VcpuFd) -> Self {
        Self {
            ports: None,
            vm,
            vcpu,
            io_apic: None,
            changed: 0,
            msrs: Vec::new(),
        }
    }

    /// The same with the devices at these ports.
    pub fn with_ports(self, ports: &'a Bus) -> Self {
        Self {
            ports: Some(ports),
            ..self
        }
    }

    /// Whether no device is at the `bytes` ports from `port`: loads give all ones there and stores
    /// are lost, whoever makes them. A driver may look for a device that this machine has not.
    pub fn is_nobodys_port(&self, port: u16, bytes: usize) -> bool {
        let last = port.saturating_add(u16::try_from(bytes).unwrap_or(u16::MAX).saturating_sub(1));
        let kvms =
            port < BOARD_PORTS_END || port <= *ELCR_PORTS.end() && *ELCR_PORTS.start() <= last;
        let answers = |bus: &Bus| bus.answers(port.into(), bytes as u64);
        !kvms && self.ports.is_some_and(|bus| !answers(bus))
    }

    /// Loads from the I/O APIC.
    pub fn read(&mut self, gpa: u64, bytes: usize) -> Option<u64> {
        let offset = register(gpa, bytes)?;
        let chip = self.io_apic()?;
        // SAFETY: the chip was filled in as an I/O APIC.
        let state = unsafe { &chip.chip.ioapic };
        Some(u64::from(match offset {
            IOREGSEL => state.ioregsel,
            _ => match state.ioregsel {
                IOAPICID | IOAPICARB => state.id << 24,
                IOAPICVER => VERSION,
                index => {
                    let (entry, high) = redirection(index)?;
                    // SAFETY: every pattern of bits is a valid entry.
                    let bits = unsafe { state.redirtbl.get(entry)?.bits };
                    // An interrupt on its way is one that comes after the call: no vCPU takes it
                    // before, and `synchronize_irq` would wait for that.
                    let bits = bits & !REMOTE_IRR;
                    (bits >> if high { 32 } else { 0 }) as u32
                }
            },
        }))
    }

    /// Stores to the I/O APIC at commit.
    pub fn write(&mut self, gpa: u64, value: u64, bytes: usize) -> bool {
        let Some(offset) = register(gpa, bytes) else {
            return false;
        };
        let Some(chip) = self.io_apic() else {
            return false;
        };
        let value = value as u32;
        let mut changed = 0;
        // SAFETY: the chip was filled in as an I/O APIC.
        let state = unsafe { &mut chip.chip.ioapic };
        if offset == IOREGSEL {
            state.ioregsel = value & 0xff;
        } else if let Some((pin, high)) = redirection(state.ioregsel) {
            let Some(entry) = state.redirtbl.get_mut(pin) else {
                return false;
            };
            changed = 1 << pin;
            // SAFETY: every pattern of bits is a valid entry.
            let old = unsafe { entry.bits };
            entry.bits = redirected(old, value, high);
        } else if state.ioregsel == IOAPICID {
            state.id = value >> 24 & 0xf;
        }
        self.changed |= changed;
        true
    }

    /// Writes a register at commit.
    pub fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let waits = POSTED_MSRS.contains(&index) && self.msrs.len() < MAX_POSTED;
        if waits {
            self.msrs.push(kvm_msr_entry {
                index,
                data: value,
                ..Default::default()
            });
        }
        waits
    }

    /// Forgets what waited.
    pub fn forget(&mut self) {
        *self = Self::new(self.vm, self.vcpu);
    }

    /// Does what waited.
    pub fn commit(&mut self) {
        if let Some(chip) = self.io_apic.take() {
            self.commit_io_apic(&chip);
        }
        for entry in self.msrs.drain(..) {
            let written = Msrs::from_entries(&[entry])
                .ok()
                .and_then(|msrs| self.vcpu.set_msrs(&msrs).ok());
            if written != Some(1) {
                tracing::error!("KVM refused MSR {:#x} after an isolated call", entry.index);
            }
        }
    }

    /// Brings the entries that the call changed into the I/O APIC's present state: lines may have
    /// been raised since the call began.
    fn commit_io_apic(&mut self, ours: &kvm_irqchip) {
        let changed = std::mem::take(&mut self.changed);
        let Some(chip) = self.io_apic() else {
            return;
        };
        // SAFETY: both chips were filled in as I/O APICs.
        let (now, ours) = unsafe { (&mut chip.chip.ioapic, &ours.chip.ioapic) };
        now.ioregsel = ours.ioregsel;
        now.id = ours.id;
        for (pin, (now, ours)) in now.redirtbl.iter_mut().zip(&ours.redirtbl).enumerate() {
            if changed & 1 << pin != 0 {
                // SAFETY: every pattern of bits is a valid entry.
                let (old, new) = unsafe { (now.bits, ours.bits) };
                now.bits = redirected(old, new as u32, false) & 0xffff_ffff | new & !0xffff_ffff;
            }
        }
        if let Some(chip) = self.io_apic.take()
            && let Err(error) = self.vm.set_irqchip(&chip)
        {
            tracing::error!("KVM refused the I/O APIC's state after an isolated call: {error}");
        }
    }

    /// The I/O APIC's state, from KVM at first.
    fn io_apic(&mut self) -> Option<&mut kvm_irqchip> {
        if self.io_apic.is_none() {
            let mut chip = Box::new(kvm_irqchip {
                chip_id: KVM_IRQCHIP_IOAPIC,
                ..Default::default()
            });
            self.vm
                .get_irqchip(&mut chip)
                .inspect_err(|error| tracing::error!("KVM_GET_IRQCHIP: {error}"))
                .ok()?;
            self.io_apic = Some(chip);
        }
        self.io_apic.as_deref_mut()
    }
}

/// Which of the two registers an access of the right size is to.
fn register(gpa: u64, bytes: usize) -> Option<u64> {
    let offset = gpa.checked_sub(IO_APIC).filter(|at| *at < PAGE_SIZE)?;
    ([IOREGSEL, IOWIN].contains(&offset) && bytes == 4).then_some(offset)
}

/// The redirection table entry behind an index, and whether it is the upper half.
fn redirection(index: u32) -> Option<(usize, bool)> {
    let word = index.checked_sub(IOREDTBL)?;
    Some(((word / 2) as usize, word % 2 == 1))
}

/// A redirection table entry after a store to one half.
fn redirected(old: u64, value: u32, high: bool) -> u64 {
    if high {
        return old & 0xffff_ffff | u64::from(value) << 32;
    }
    let new = old & !0xffff_ffff | u64::from(value) & !READ_ONLY | old & READ_ONLY;
    // An edge-triggered interrupt has no remote IRR.
    if new & LEVEL_TRIGGERED == 0 {
        new & !REMOTE_IRR
    } else {
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    use kvm_ioctls::Kvm;

    fn machine() -> (VmFd, VcpuFd) {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        (vm, vcpu)
    }

    fn entry(vm: &VmFd, pin: usize) -> u64 {
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the chip was filled in as an I/O APIC, and an entry is any pattern of bits.
        unsafe { chip.chip.ioapic.redirtbl[pin].bits }
    }

    #[test]
    fn a_port_is_nobodys_where_the_machine_has_no_device() {
        struct Device;
        impl devices::bus::BusDevice for Device {
            fn read(&self, _offset: u64, _data: &mut [u8]) {}
            fn write(&self, _offset: u64, _data: &[u8]) {}
        }
        let bus = Bus::new();
        bus.map(0x1000, 8, std::sync::Arc::new(Device)).unwrap();
        let (vm, vcpu) = machine();
        let alone = Platform::new(&vm, &vcpu);
        assert!(!alone.is_nobodys_port(0x5658, 4), "not known");
        let platform = alone.with_ports(&bus);
        for (port, bytes, nobodys) in [
            (0x5658, 4, true),
            (0xffff, 1, true),
            (0xffc, 4, true),
            (0xffd, 4, false),
            (0x1007, 1, false),
            // Where KVM has devices of its own.
            (0x40, 1, false),
            (0x4ce, 4, false),
            (0x4d2, 1, true),
        ] {
            let is = platform.is_nobodys_port(port, bytes);
            assert_eq!(is, nobodys, "{port:#x}, {bytes}");
        }
    }

    #[test]
    fn redirections_reach_kvm_at_commit_and_not_before() {
        let (vm, vcpu) = machine();
        let before = entry(&vm, 11);
        let mut platform = Platform::new(&vm, &vcpu);
        assert!(platform.write(IO_APIC, 0x10 + 22, 4));
        assert!(platform.write(IO_APIC + IOWIN, 0x1_a055, 4));
        assert_eq!(platform.read(IO_APIC + IOWIN, 4), Some(0x1_a055));
        assert_eq!(entry(&vm, 11), before, "before the commit");
        platform.commit();
        assert_eq!(entry(&vm, 11) & 0xffff_ffff, 0x1_a055);
    }

    #[test]
    fn a_line_that_was_raised_meanwhile_stays_raised() {
        let (vm, vcpu) = machine();
        let mut platform = Platform::new(&vm, &vcpu);
        assert!(platform.write(IO_APIC, 0x10 + 22, 4));
        assert!(platform.write(IO_APIC + IOWIN, 0x1_a055, 4));
        vm.set_irq_line(11, true).unwrap();
        platform.commit();
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the chip was filled in as an I/O APIC.
        assert_eq!(unsafe { chip.chip.ioapic.irr } & 1 << 11, 1 << 11);
    }

    #[test]
    fn an_interrupt_on_its_way_is_not_waited_for() {
        let (vm, vcpu) = machine();
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).unwrap();
        let in_service = LEVEL_TRIGGERED | REMOTE_IRR | 0x31;
        // SAFETY: the chip was filled in as an I/O APIC.
        unsafe { chip.chip.ioapic.redirtbl[11].bits = in_service };
        vm.set_irqchip(&chip).unwrap();
        let mut platform = Platform::new(&vm, &vcpu);
        assert!(platform.write(IO_APIC, 0x10 + 22, 4));
        assert_eq!(
            platform.read(IO_APIC + IOWIN, 4),
            Some(LEVEL_TRIGGERED | 0x31)
        );
        platform.commit();
        assert_eq!(entry(&vm, 11), in_service, "it is still on its way");
    }

    #[test]
    fn what_is_forgotten_leaves_no_trace() {
        let (vm, vcpu) = machine();
        let before = entry(&vm, 3);
        let mut platform = Platform::new(&vm, &vcpu);
        assert!(platform.write(IO_APIC, 0x10 + 6, 4));
        assert!(platform.write(IO_APIC + IOWIN, 0x55, 4));
        drop(platform);
        assert_eq!(entry(&vm, 3), before);
    }

    #[test]
    fn read_only_bits_stay_and_edges_have_no_remote_irr() {
        let level = LEVEL_TRIGGERED | REMOTE_IRR | 0x31;
        assert_eq!(redirected(level, 0x8032, false), 0x8032 | REMOTE_IRR);
        assert_eq!(redirected(level, 0x32, false), 0x32);
        assert_eq!(redirected(0x31, 0xab00_0000, true), 0xab00_0000_0000_0031);
    }

    #[test]
    fn other_addresses_sizes_and_registers_are_refused() {
        let (vm, vcpu) = machine();
        let mut platform = Platform::new(&vm, &vcpu);
        assert!(!platform.write(IO_APIC + 0x20, 0, 4));
        assert!(!platform.write(IO_APIC + IOWIN, 0, 8));
        assert_eq!(platform.read(IO_APIC - 4, 4), None);
        assert!(platform.write(IO_APIC, 0xff, 4));
        assert!(!platform.write(IO_APIC + IOWIN, 0, 4), "no such entry");
        assert!(!platform.write_msr(0xc000_0080, 0));
        assert!(platform.write_msr(0x6e0, 0));
    }
}
