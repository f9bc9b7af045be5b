use std::collections::BTreeMap;

use super::*;

const CTRL: u32 = 0;
const STATUS: u32 = 8;
const IMS: u32 = 0xd0;
const IMC: u32 = 0xd8;
const ICS: u32 = 0xc8;
const RCTL: u32 = 0x100;
const TCTL: u32 = 0x400;
const MDIC: u32 = 0x20;
const MASTER: u32 = 1 << 19;

/// Registers that hold what is stored to them, with the behaviour that matters of an 82574L.
#[derive(Default, Clone)]
struct Fake {
    registers: BTreeMap<u32, u32>,
    phy: [u16; 32],
    /// Looks at STATUS until requests under way are done; `None` if they never are.
    busy_looks: Option<u32>,
    /// A register that holds nothing.
    broken: Option<u32>,
    stored: Vec<u32>,
    loaded: Vec<u32>,
    gone: bool,
}

impl Fake {
    fn new() -> Self {
        Self {
            busy_looks: Some(2),
            ..Self::default()
        }
    }

    fn get(&self, offset: u32) -> u32 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    /// As a driver would leave it that runs, with values of its own.
    fn run_with(&mut self, salt: u32) {
        let description = Description::intel_82574l().unwrap();
        for register in &description.register {
            for at in register.offsets() {
                let value = (at.wrapping_mul(0x9e37_79b9) ^ salt) & register.keep;
                self.registers.insert(at, value);
            }
        }
        for (offset, value) in [
            (CTRL, 0x0014_0241),
            (RCTL, 0x0400_8002),
            (TCTL, 0x3003_f0fa),
        ] {
            self.registers.insert(offset, value ^ (salt & 0x10_0000));
        }
        self.registers.insert(IMS, 0x01f0_0004 | salt & 0xff);
        self.phy[4] = salt as u16;
        self.stored.clear();
        self.loaded.clear();
    }

    fn is_at_rest(&self) -> bool {
        self.get(IMS) == 0
            && self.get(RCTL) & 2 == 0
            && self.get(TCTL) & 2 == 0
            && self.get(CTRL) & 4 == 4
    }
}

impl RegisterAccess for Fake {
    fn load(&mut self, offset: u32) -> u32 {
        self.loaded.push(offset);
        if offset == STATUS {
            let stops = self.get(CTRL) & 4 != 0;
            return match &mut self.busy_looks {
                Some(0) if stops => 0,
                Some(looks) if stops => {
                    *looks -= 1;
                    MASTER
                }
                _ => MASTER,
            };
        }
        self.get(offset)
    }

    fn store(&mut self, offset: u32, value: u32) {
        self.stored.push(offset);
        match offset {
            _ if self.broken == Some(offset) => {}
            IMS => *self.registers.entry(IMS).or_default() |= value,
            IMC => *self.registers.entry(IMS).or_default() &= !value,
            MDIC => {
                let register = (value >> 16 & 31) as usize;
                if value & 1 << 26 != 0 {
                    self.phy[register] = value as u16;
                }
                let answer = 1 << 28 | value & 0x03ff_0000 | u32::from(self.phy[register]);
                self.registers.insert(MDIC, answer);
            }
            _ => {
                self.registers.insert(offset, value);
            }
        }
    }

    fn load_config(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if !self.gone {
            data.copy_from_slice(&[0x86, 0x80, 0xd3, 0x10][..data.len()]);
        }
    }

    fn store_config(&mut self, _offset: u16, _data: &[u8]) {}
}

fn save(description: &Description, device: &mut Fake) -> RegisterCheckpoint {
    let running = description.look(device).unwrap();
    description.quiesce(device).unwrap();
    description.save(device, &running).unwrap()
}

/// What a guest set, without what a switch itself leaves behind.
fn state(device: &Fake) -> BTreeMap<u32, u32> {
    let mut registers = device.registers.clone();
    registers.retain(|offset, _| ![ICS, MDIC].contains(offset));
    registers
}

#[test]
fn two_users_have_a_device_by_turns_and_each_finds_its_own_state() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(0x1111_1111);
    let first = (state(&device), device.phy);
    let first_saved = save(&description, &mut device);
    assert!(device.is_at_rest());
    device.run_with(0x2222_2222);
    let second = (state(&device), device.phy);
    let second_saved = save(&description, &mut device);
    for _ in 0..3 {
        for (saved, expected) in [(&first_saved, &first), (&second_saved, &second)] {
            description.load(&mut device, saved).unwrap();
            assert!(device.is_at_rest(), "until it is let go");
            assert_ne!(device.stored.last(), Some(&ICS));
            description.resume(&mut device, saved).unwrap();
            assert_eq!(device.stored.last(), Some(&ICS), "the driver looks");
            assert!(state(&device) == expected.0);
            assert_eq!(device.phy, expected.1);
            assert!(save(&description, &mut device) == *saved);
        }
    }
}

#[test]
fn what_must_not_be_touched_is_not() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(7);
    let saved = save(&description, &mut device);
    description.load(&mut device, &saved).unwrap();
    description.resume(&mut device, &saved).unwrap();
    // ICR, statistics, SWSM
    for untouched in [0xc0, 0x4000, 0x40d4, 0x5b50] {
        assert!(!device.loaded.contains(&untouched), "{untouched:#x}");
    }
    let again = device.clone();
    device.stored.clear();
    description.load(&mut device, &saved).unwrap();
    description.resume(&mut device, &saved).unwrap();
    assert!(state(&device) == state(&again));
}

#[test]
fn a_device_that_does_not_stand_still_is_told_and_runs_on() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(3);
    let before = state(&device);
    device.busy_looks = None;
    let running = description.look(&mut device).unwrap();
    let error = description.quiesce(&mut device).unwrap_err();
    assert!(matches!(error, CheckpointError::Restless(_)), "{error}");
    description.go_on(&mut device, &running).unwrap();
    assert!(state(&device) == before);
}

#[test]
fn quiescing_twice_is_as_good_as_once() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(9);
    let before = state(&device);
    let running = description.look(&mut device).unwrap();
    description.quiesce(&mut device).unwrap();
    let once = state(&device);
    description.quiesce(&mut device).unwrap();
    assert!(state(&device) == once);
    description.go_on(&mut device, &running).unwrap();
    assert!(state(&device) == before);
}

#[test]
fn a_device_that_is_gone_or_holds_nothing_is_told() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(1);
    let saved = save(&description, &mut device);
    device.run_with(2);
    device.broken = Some(0x2800);
    let error = description.load(&mut device, &saved).unwrap_err();
    assert!(error.to_string().contains("RDBAL0"), "{error}");
    device.gone = true;
    assert!(matches!(
        description.look(&mut device),
        Err(CheckpointError::OtherDevice { .. })
    ));
    description.quiesce(&mut device).unwrap_err();
    description.load(&mut device, &saved).unwrap_err();
}

#[test]
fn a_state_of_another_device_is_refused_before_anything_is_touched() {
    let description = Description::intel_82574l().unwrap();
    let mut device = Fake::new();
    device.run_with(1);
    let mut saved = save(&description, &mut device);
    saved.version += 1;
    device.stored.clear();
    description.load(&mut device, &saved).unwrap_err();
    description.resume(&mut device, &saved).unwrap_err();
    assert!(device.stored.is_empty());
}
