//! A device for tests and fuzzing, whose registers behave as the 82574L's do where it matters, and
//! what a device host does with it.

#![allow(
    clippy::unwrap_used,
    reason = "what goes wrong here is what is looked for"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::super::description::Description;
use super::super::mdio::mdic;
use super::super::{RegisterAccess, RegisterCheckpoint};
use super::{Parked, ParkedLink, Survey};

pub(super) const CTRL: u32 = 0x0000;
pub(super) const STATUS: u32 = 0x0008;
pub(super) const EEC: u32 = 0x0010;
pub(super) const EERD: u32 = 0x0014;
pub(super) const MDIC: u32 = 0x0020;
pub(super) const ICR: u32 = 0x00c0;
pub(super) const ICS: u32 = 0x00c8;
pub(super) const IMS: u32 = 0x00d0;
pub(super) const IMC: u32 = 0x00d8;
pub(super) const RCTL: u32 = 0x0100;
pub(super) const TCTL: u32 = 0x0400;
pub(super) const EXTCNF_CTRL: u32 = 0x0f00;
pub(super) const PBA: u32 = 0x1000;
pub(super) const SWSM: u32 = 0x5b50;
pub(super) const RAL: u32 = 0x5400;
pub(super) const RAH: u32 = 0x5404;

pub(super) const MASTER: u32 = 1 << 19;

/// Its registers are plain but for those that say something of what is behind them.
#[derive(Clone)]
pub(super) struct Fake {
    pub registers: BTreeMap<u32, u32>,
    pub phy: [u16; 32],
    pub nvm: Vec<u16>,
    /// Bits that no register holds.
    pub lacks: u32,
    /// And none of the PHY.
    pub phy_lacks: u16,
    cold: BTreeMap<u32, u32>,
}

impl Fake {
    pub fn new() -> Self {
        let mut nvm = vec![0x1234; 64];
        nvm[..3].copy_from_slice(&[0x5452, 0x1200, 0x5634]);
        let sum = nvm[..63]
            .iter()
            .fold(0u16, |sum, one| sum.wrapping_add(*one));
        nvm[63] = 0xbaba_u16.wrapping_sub(sum);
        let cold: BTreeMap<u32, u32> = [
            (CTRL, 0x0010_0240),
            (STATUS, 0x0008_0283),
            (EEC, 0x0000_0302),
            (PBA, 0x0014_0014),
            (RAL, 0x1200_5452),
            (RAH, 0x8000_5634),
            (0xb608, 0x1),
        ]
        .into();
        let mut phy = [0; 32];
        phy[0] = 0x1140;
        phy[1] = 0x796d;
        phy[2..4].copy_from_slice(&[0x0141, 0x0cb1]);
        phy[4..7].copy_from_slice(&[0x0de1, 0xcde1, 0x000d]);
        phy[9..11].copy_from_slice(&[0x0e00, 0x7800]);
        phy[17] = 0xac08;
        Self {
            registers: cold.clone(),
            phy,
            nvm,
            lacks: 0,
            phy_lacks: 0,
            cold,
        }
    }

    pub fn get(&self, offset: u32) -> u32 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }
}

impl RegisterAccess for Fake {
    fn load(&mut self, offset: u32) -> u32 {
        let value = self.get(offset);
        match offset {
            STATUS if self.get(CTRL) & 4 != 0 => value & !MASTER,
            STATUS => value | MASTER,
            ICR => self.registers.remove(&ICR).unwrap_or(0),
            ICS | IMC => 0,
            _ => value,
        }
    }

    fn store(&mut self, offset: u32, value: u32) {
        let held = value & !self.lacks;
        match offset {
            CTRL if value & 1 << 26 != 0 => self.registers = self.cold.clone(),
            STATUS | EEC => {}
            ICS => *self.registers.entry(ICR).or_default() |= value,
            IMS => *self.registers.entry(IMS).or_default() |= held,
            IMC => *self.registers.entry(IMS).or_default() &= !value,
            PBA => {
                let rest = 40u32.saturating_sub(value & 0xffff) << 16;
                self.registers.insert(PBA, value & 0xffff | rest);
            }
            EERD => {
                let word = self.nvm.get((value >> 2) as usize & 0x3fff);
                if let Some(word) = word.filter(|_| value & 1 != 0) {
                    let answer = u32::from(*word) << 16 | value & 0xfffc | 2;
                    self.registers.insert(EERD, answer);
                } else {
                    self.registers.insert(EERD, 0);
                }
            }
            MDIC => {
                let register = (value >> 16 & 31) as usize;
                if value & mdic::WRITE != 0 {
                    self.phy[register] = value as u16 & !self.phy_lacks;
                }
                let answer = mdic::READY | value & 0x0fff_0000 | u32::from(self.phy[register]);
                self.registers.insert(MDIC, answer);
            }
            _ => {
                self.registers.insert(offset, held);
            }
        }
    }

    fn load_config(&mut self, _offset: u16, data: &mut [u8]) {
        data.copy_from_slice(&[0x86, 0x80, 0xd3, 0x10][..data.len()]);
    }

    fn store_config(&mut self, _offset: u16, _data: &[u8]) {}
}

pub(super) fn description() -> Arc<Description> {
    static DESCRIPTION: OnceLock<Arc<Description>> = OnceLock::new();
    let description = DESCRIPTION.get_or_init(|| Arc::new(Description::intel_82574l().unwrap()));
    description.clone()
}

pub(super) fn surveyed(description: &Description) -> Arc<Survey> {
    // Made once: to find the end of non-volatile memory takes a while.
    static SURVEY: OnceLock<Arc<Survey>> = OnceLock::new();
    let survey = SURVEY.get_or_init(|| Arc::new(description.survey(&mut Fake::new()).unwrap()));
    survey.clone()
}

/// Takes the device from its user.
pub(super) fn park(
    description: &Arc<Description>,
    survey: &Arc<Survey>,
    device: &mut Fake,
    link: ParkedLink,
) -> Parked {
    let running = description.look(device).unwrap();
    description.quiesce(device).unwrap();
    let shown = description.shown(device, link).unwrap();
    let saved = description.save(device, &running).unwrap();
    Parked::new(description.clone(), survey.clone(), saved, &shown, link).unwrap()
}

pub(super) fn load(parked: &mut Parked, offset: u32) -> u32 {
    let mut data = [0; 4];
    parked.read(offset.into(), &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn store(parked: &mut Parked, offset: u32, value: u32) {
    parked.write(offset.into(), &value.to_le_bytes());
}

/// Gives the device to whoever has this state, who finds it at rest and then as it was.
pub(super) fn give(description: &Description, device: &mut Fake, saved: &RegisterCheckpoint) {
    description.load(device, saved).unwrap();
    let units = device.get(RCTL) & 2 | device.get(TCTL) & 2 | device.get(IMS);
    assert_eq!(units, 0, "it stands still");
    description.resume(device, saved).unwrap();
}
