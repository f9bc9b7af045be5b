//! The accesses of Linux' e1000e, in the order of its source: drivers/net/ethernet/intel/e1000e/,
//! `82571.c`, `mac.c`, `phy.c`, `nvm.c`, `netdev.c`. What it waits for has to come, or it says so
//! in the kernel's log.

use super::*;

const GIO_MASTER_DISABLE: u32 = 0x4;
const SLU: u32 = 0x40;
const FORCED: u32 = 0x1800;
const RST: u32 = 1 << 26;
const PHY_RST: u32 = 1 << 31;
const OWNERSHIP: u32 = 0x20;
const AUTO_RD: u32 = 0x200;
const CTRL_EXT: u32 = 0x18;
const GCR: u32 = 0x5b00;
const GCR2: u32 = 0x5b64;
/// More than e1000e waits for anything.
const TRIES: u32 = 100;

impl RegisterAccess for Parked {
    fn load(&mut self, offset: u32) -> u32 {
        super::load(self, offset)
    }

    fn store(&mut self, offset: u32, value: u32) {
        super::store(self, offset, value);
    }

    fn load_config(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn store_config(&mut self, _offset: u16, _data: &[u8]) {}
}

/// The driver, and who answers it: an image or a device.
struct E1000e<'a>(&'a mut dyn RegisterAccess);

impl E1000e<'_> {
    fn poll(&mut self, what: &str, offset: u32, mask: u32, value: u32) {
        let mut tries = 0..TRIES;
        let comes = tries.any(|_| self.0.load(offset) & mask == value);
        assert!(comes, "{what}: the driver waits in vain");
    }

    fn change(&mut self, offset: u32, clear: u32, set: u32) {
        let value = self.0.load(offset);
        self.0.store(offset, value & !clear | set);
    }

    /// `e1000_get_hw_semaphore_82573`.
    fn take_semaphore(&mut self) {
        self.change(EXTCNF_CTRL, 0, OWNERSHIP);
        self.poll("ownership of MDIO", EXTCNF_CTRL, OWNERSHIP, OWNERSHIP);
    }

    fn put_semaphore(&mut self) {
        self.change(EXTCNF_CTRL, OWNERSHIP, 0);
    }

    /// `e1000e_read_phy_reg_mdic`.
    fn mdic(&mut self, operation: u32, number: u32, value: u16) -> u16 {
        let command = operation | 1 << 21 | number << 16 | u32::from(value);
        self.0.store(MDIC, command);
        self.poll("an access of the PHY", MDIC, mdic::READY, mdic::READY);
        let answer = self.0.load(MDIC);
        assert_eq!(answer & mdic::ERROR, 0, "PHY register {number}");
        assert_eq!(answer >> 16 & 31, number, "offset error");
        answer as u16
    }

    /// `e1000e_read_phy_reg_bm2`: registers above 15 are on pages.
    fn read_phy(&mut self, number: u32) -> u16 {
        self.take_semaphore();
        if number > 15 {
            self.mdic(mdic::WRITE, 22, 0);
        }
        let value = self.mdic(mdic::READ, number, 0);
        self.put_semaphore();
        value
    }

    fn write_phy(&mut self, number: u32, value: u16) {
        self.take_semaphore();
        if number > 15 {
            self.mdic(mdic::WRITE, 22, 0);
        }
        self.mdic(mdic::WRITE, number, value);
        self.put_semaphore();
    }

    /// `e1000e_read_nvm_eerd`.
    fn read_nvm(&mut self, number: u32) -> u16 {
        self.0.store(EERD, number << 2 | 1);
        self.poll("a word of the NVM", EERD, 2, 2);
        (self.0.load(EERD) >> 16) as u16
    }

    /// `e1000_reset_hw_82571`.
    fn reset_hw(&mut self) {
        self.change(CTRL, 0, GIO_MASTER_DISABLE);
        self.poll("master requests", STATUS, MASTER, 0);
        self.0.store(IMC, u32::MAX);
        self.0.store(RCTL, 0);
        self.change(TCTL, 2, 0);
        self.take_semaphore();
        self.change(CTRL, 0, RST);
        self.put_semaphore();
        self.poll("auto read", EEC, AUTO_RD, AUTO_RD);
        self.0.store(IMC, u32::MAX);
        self.0.load(ICR);
        assert_eq!(self.0.load(CTRL) & (RST | GIO_MASTER_DISABLE), 0);
    }

    /// `e1000_init_hw_82571`, with `e1000_setup_copper_link_82571`.
    fn init_hw(&mut self) {
        for at in [0x3828, 0x3928] {
            self.change(at, 0, 1 << 22);
        }
        self.change(0x3840, 0xf << 27, 1 << 26);
        self.change(CTRL, 1 << 29, 0);
        self.change(CTRL_EXT, 1 << 23, 1 << 22);
        self.change(GCR, 0, 1 << 22);
        self.change(GCR2, 0, 1);
        self.read_nvm(0x4);
        for offset in (0x5600..0x5800).step_by(4) {
            self.0.store(offset, 0);
            self.0.load(STATUS);
        }
        for offset in (0x5200..0x5400).step_by(4) {
            self.0.store(offset, 0);
        }
        self.change(CTRL, FORCED, SLU);
        let control = self.read_phy(16);
        self.write_phy(16, control & !0x0060 & !0x0800 | 0x60);
        self.software_reset_phy();
        self.write_phy(16, control | 0x0860);
        self.write_phy(29, 3);
        self.write_phy(30, 0);
        self.software_reset_phy();
        self.write_phy(4, 0x0de1);
        self.write_phy(9, 0x0200);
        let bmcr = self.read_phy(0);
        self.write_phy(0, bmcr | 0x1200);
        for offset in [0x28, 0x2c, 0x30, 0x170, 0x2160, 0x2168] {
            self.0.store(offset, 0x8808);
        }
        self.change(0x3828, 0x3f << 16, 0x0141_0000);
        self.change(GCR, 0, 1 << 27);
        for offset in (0x4000..0x4128).step_by(4) {
            assert_eq!(self.0.load(offset), 0, "statistics");
        }
    }

    /// `e1000e_phy_sw_reset`.
    fn software_reset_phy(&mut self) {
        let bmcr = self.read_phy(0);
        self.write_phy(0, bmcr | 0x8000);
    }

    /// `e1000e_phy_hw_reset_generic`.
    fn hardware_reset_phy(&mut self) {
        self.take_semaphore();
        let ctrl = self.0.load(CTRL);
        self.0.store(CTRL, ctrl | PHY_RST);
        self.0.store(CTRL, ctrl);
        self.put_semaphore();
    }

    /// `e1000_probe`: identifiers, checksum, address.
    fn probe(&mut self) -> [u32; 2] {
        assert_eq!([self.read_phy(2), self.read_phy(3)], [0x141, 0xcb1]);
        self.reset_hw();
        let words = (0..64).map(|number| self.read_nvm(number));
        assert_eq!(words.fold(0, u16::wrapping_add), 0xbaba);
        self.hardware_reset_phy();
        [self.0.load(RAL), self.0.load(RAH)]
    }

    /// `e1000e_phy_has_link_generic`.
    fn has_link(&mut self) -> bool {
        self.read_phy(1);
        self.read_phy(1) & 4 != 0
    }

    /// Of `e1000_configure`: rings of 256 descriptors, and the units on.
    fn open(&mut self) {
        for (base, at) in [(0x3800, 0x10_0000), (0x2800, 0x20_0000)] {
            self.0.store(base, at);
            self.0.store(base + 4, 1);
            self.0.store(base + 8, 4096);
            self.0.store(base + 0x10, 0);
            self.0.store(base + 0x18, 0);
        }
        self.change(TCTL, 0, 0x0103_f0fa);
        self.change(RCTL, 0, 0x0400_8002);
        self.0.store(0x2818, 254);
        self.0.store(IVAR, 0x800a_0908);
        self.0.store(EIAC, 0x01f0_0000);
        self.0.store(IMS, 0x01f0_0004);
    }
}

#[test]
fn e1000e_finds_all_that_it_waits_for() {
    let description = description();
    let survey = surveyed(&description);
    let mut device = Fake::new();
    E1000e(&mut device).open();
    let mut parked = park(&description, &survey, &mut device, ParkedLink::Down);
    let mut driver = E1000e(&mut parked);
    assert!(!driver.has_link());
    for _ in 0..2 {
        driver.reset_hw();
        driver.init_hw();
        driver.open();
        assert!(!driver.has_link());
    }
    assert_eq!(driver.probe(), [0x1200_5452, 0x8000_5634]);
    driver.init_hw();
    driver.open();
    driver.0.store(TDT, 12);
    unpark(&description, &mut device, parked);
    // The same on the device.
    let mut other = Fake::new();
    let mut driver = E1000e(&mut other);
    driver.reset_hw();
    driver.init_hw();
    driver.open();
    driver.0.store(TDT, 12);
    for register in &description.register {
        for at in register.offsets() {
            let kept = [&device, &other].map(|one| one.get(at) & register.keep);
            assert_eq!(kept[0], kept[1], "{} at {at:#x}", register.name);
        }
    }
    assert!(E1000e(&mut device).has_link(), "the device's own");
}

#[test]
fn the_script_is_one_that_a_device_answers() {
    let mut device = Fake::new();
    let mut driver = E1000e(&mut device);
    assert_eq!(driver.probe(), [0x1200_5452, 0x8000_5634]);
    driver.init_hw();
    driver.open();
    assert!(driver.has_link());
}
