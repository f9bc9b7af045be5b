//! The device of the stress test: registers that calls use, words of its own in pages that they
//! write, and a line.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::bus::MutBusDevice;
use devices::dma::GuestMemory;
use devices::hold::{DeviceAddress, DeviceState};
use devices::hold::{DeviceLost, HeldDevice, Holdable};
use devices::irq::IrqLine;
use vm_memory::{Bytes, GuestAddress};

use super::{NEVER, guest};

/// The device: a register for each vCPU, a line, and words in guest memory.
pub struct Inner {
    registers: [u64; 8],
    line: Arc<dyn IrqLine>,
    /// When the line was raised, if it is.
    raised: Option<Instant>,
    pub interrupts: u64,
}

pub struct Device(Mutex<Inner>);

impl Device {
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self(Mutex::new(Inner {
            registers: [0; 8],
            line,
            raised: None,
            interrupts: 0,
        }))
    }

    pub fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holdable for Device {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut inner = self.lock();
        with(&mut Held {
            registers: &mut inner.registers,
            saved: None,
        });
        Ok(())
    }
}

struct Held<'a> {
    registers: &'a mut [u64; 8],
    saved: Option<[u64; 8]>,
}

impl Held<'_> {
    fn index(at: DeviceAddress) -> usize {
        let DeviceAddress::Memory(gpa) = at else {
            panic!("the device has no ports");
        };
        (gpa - guest::DEVICE_GPA) as usize / 8
    }
}

impl HeldDevice for Held<'_> {
    fn owns(&self, gpa: u64) -> bool {
        (guest::DEVICE_GPA..guest::DEVICE_GPA + 64).contains(&gpa)
    }

    fn owns_port(&self, _port: u16) -> bool {
        false
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        let value = self.registers[Self::index(at)].to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.registers[Self::index(at)] = u64::from_le_bytes(value);
    }

    fn checkpoint(&mut self) {
        self.saved = Some(*self.registers);
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        *self.registers = self.saved.take().expect("a checkpoint");
        Ok(())
    }

    fn state(&self) -> Option<DeviceState> {
        None
    }

    fn undo(&mut self, _: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        Err("not in parts".into())
    }

    fn put_back(&mut self, _: &DeviceState) -> Result<(), DeviceLost> {
        Err(DeviceLost("it does not give its state away".into()))
    }

    fn requests_changed(&self, _: &DeviceState, _: &DeviceState) -> bool {
        false
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    fn freeze_interrupts(&mut self) {}

    fn withhold_interrupts(&mut self, _withhold: bool) {}

    fn silence(&mut self) {}
}

/// Where the guest's interrupt handler tells the device that it has come.
pub struct Acknowledge(pub Arc<Device>);

impl MutBusDevice for Acknowledge {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        let mut inner = self.0.lock();
        if inner.raised.take().is_some() {
            inner.interrupts += 1;
        }
        inner.line.set_level(false);
    }
}

/// Writes the device's words and raises its line, until it is told to stop; says what is wrong.
pub fn transfer(device: &Device, memory: &GuestMemory, stop: &AtomicBool) -> Result<u64, String> {
    let mut written = guest::BY_DEVICE.map(|_| 0u64);
    let mut random = 1u64;
    let mut transfers = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut inner = device.lock();
        for (va, last) in guest::BY_DEVICE.into_iter().zip(&mut written) {
            let at = GuestAddress(guest::gpa_of(va));
            let now: u64 = memory.read_obj(at).unwrap();
            if now != *last {
                return Err(format!(
                    "the device wrote {last:#x} at {va:#x}, where {now:#x} is"
                ));
            }
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *last = random;
            memory.write_obj(random, at).unwrap();
        }
        transfers += 1;
        match inner.raised {
            None => {
                inner.raised = Some(Instant::now());
                inner.line.set_level(true);
            }
            Some(since) if since.elapsed() > NEVER => {
                return Err(format!("interrupt {} was not taken", inner.interrupts + 1));
            }
            Some(_) => {}
        }
        drop(inner);
        std::thread::sleep(Duration::from_micros(random >> 32 & 0xff));
    }
    Ok(transfers)
}
