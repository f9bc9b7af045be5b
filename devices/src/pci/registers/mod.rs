//! The state of a PCI function by its registers: for devices that cannot give their state away as a
//! whole.
//!
//! Which fields and registers, and in which order they are written back, is data ([`Description`]).
//! Every register is read again after it was written: a device that does not hold what it was given
//! is not the one that was saved.
//!
//! What is not held is what cannot be read, or not without changing it: statistics, causes of
//! interrupts, timers that run, a frame that is half moved.

pub mod description;
mod mdio;
pub mod parked;
mod reset;
mod ring;
pub mod switch;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::description::entries::{ConfigField, Register};
pub use self::description::{Description, DescriptionError};
use self::parked::FromImage;
use self::ring::MAX_RING;
use super::PciFunction;
use crate::dma::{DmaError, DmaSpace};

/// Why a function's state cannot be taken or put back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The function is not of the kind that is described, or is gone: all ones.
    #[error("the device is {vendor:04x}:{device:04x}, not a {wanted}")]
    OtherDevice {
        /// Its vendor identifier.
        vendor: u16,
        /// Its device identifier.
        device: u16,
        /// What is described.
        wanted: String,
    },
    /// The function sleeps.
    #[error("the device sleeps ({0} is {1:#x}) and has no registers to save")]
    Asleep(String, u32),
    /// The checkpoint does not go with the description.
    #[error("the checkpoint is none of a {wanted}: {what}")]
    OtherCheckpoint {
        /// What is described.
        wanted: String,
        /// What does not fit.
        what: String,
    },
    /// A register does not hold what was put back.
    #[error(
        "the device does not answer as before: {register} was given {given:#x} and has {has:#x}"
    )]
    DoesNotHold {
        /// Name of the register, with an index where there are several.
        register: String,
        /// What it was given.
        given: u32,
        /// What it has.
        has: u32,
    },
    /// The PHY does not answer.
    #[error("the device's PHY does not answer")]
    NoPhy,
    /// A word of the device's non-volatile memory does not come.
    #[error("the device does not answer for word {0} of its non-volatile memory")]
    NoNvm(u32),
    /// The description does not say how an image of the device answers.
    #[error("the description of the {0} does not say how it answers while another guest has it")]
    NoImage(String),
    /// The device does not stand still.
    #[error("the device still reads or writes memory {0} us after it was told to stop")]
    Restless(u64),
    /// The device does not come out of a reset.
    #[error("the device is not back from its reset after {0} us")]
    Resets(u64),
    /// A ring lies outside of memory.
    #[error("the {0} ring cannot be reached: {1}")]
    Ring(String, DmaError),
}

/// How a device's registers are reached: a function in this process, or one of the host's.
pub trait RegisterAccess {
    /// Loads the register at `offset`; all ones if the device does not answer.
    fn load(&mut self, offset: u32) -> u32;
    /// Stores to the register at `offset`.
    fn store(&mut self, offset: u32, value: u32);
    /// Reads configuration space.
    fn load_config(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn store_config(&mut self, offset: u16, data: &[u8]);
}

/// The state of a function, taken by its registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterCheckpoint {
    device: String,
    version: u32,
    config: Vec<(String, u32)>,
    registers: Vec<(String, Vec<u32>)>,
    phy: Vec<(String, u16)>,
    rings: Vec<SavedRing>,
    #[serde(skip)]
    image: FromImage,
}

/// A ring that was in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRing {
    name: String,
    address: u64,
    contents: Vec<u8>,
}

impl Description {
    /// Takes the state of `function`, whose rings are in `memory`. Nobody else may use it
    /// meanwhile.
    ///
    /// The function goes on unchanged, but for the register through which a PHY is reached: that
    /// holds the last access.
    pub fn take(
        &self,
        function: &mut dyn PciFunction,
        memory: &DmaSpace,
    ) -> Result<RegisterCheckpoint, CheckpointError> {
        let bar = self.device.bar;
        self.read_state(&mut FunctionRegisters { function, bar }, Some(memory))
    }

    /// Reads the state of a device, with the rings in `memory`.
    fn read_state(
        &self,
        registers: &mut dyn RegisterAccess,
        memory: Option<&DmaSpace>,
    ) -> Result<RegisterCheckpoint, CheckpointError> {
        let mut access = Access(registers);
        self.is_device(&mut access)?;
        let mut config = Vec::new();
        for field in &self.config {
            let value = access.config(field);
            if value & field.awake != 0 {
                return Err(CheckpointError::Asleep(field.name.clone(), value));
            }
            config.push((field.name.clone(), value & field.keep));
        }
        let registers = self.register.iter().map(|register| {
            let values = register.offsets().map(|at| access.read(at) & register.keep);
            (register.name.clone(), values.collect())
        });
        let registers = registers.collect();
        let mut rings = Vec::new();
        for ring in &self.ring {
            if let (Some(memory), Some((address, length))) = (memory, ring.in_use(&mut access)) {
                let mut contents = vec![0; length];
                // A ring outside of memory is one that the device cannot write either.
                if memory.read(address, &mut contents).is_ok() {
                    rings.push(SavedRing {
                        name: ring.name.clone(),
                        address,
                        contents,
                    });
                }
            }
        }
        let mut phy = Vec::new();
        if let Some(mdio) = &self.mdio {
            for register in &mdio.saved {
                let value = mdio.read(&mut access, register.number)?;
                phy.push((register.name.clone(), value & register.keep));
            }
        }
        Ok(RegisterCheckpoint {
            device: self.device.name.clone(),
            version: self.device.version,
            config,
            registers,
            phy,
            rings,
            image: FromImage::default(),
        })
    }

    /// Guest memory that the device writes by itself: address and length of each ring that it uses,
    /// in bytes.
    pub fn rings(&self, registers: &mut dyn RegisterAccess) -> Vec<(u64, u64)> {
        let mut access = Access(registers);
        let rings = self.ring.iter();
        let used = rings.filter_map(|ring| ring.in_use(&mut access));
        used.map(|(address, bytes)| (address, bytes as u64))
            .collect()
    }

    /// Stops the device's units and masks its interrupts: nobody drives it any more.
    pub fn silence(&self, registers: &mut dyn RegisterAccess) {
        self.stop(&mut Access(registers));
    }

    /// Puts a state back. On an error the function is in no state that can be relied on, with its
    /// units stopped if it still listens.
    pub fn put_back(
        &self,
        function: &mut dyn PciFunction,
        memory: &DmaSpace,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        self.fits(saved)?;
        let bar = self.device.bar;
        let mut access = Access(&mut FunctionRegisters { function, bar });
        self.is_device(&mut access)?;
        self.put_config_back(&mut access, saved)?;
        self.stop(&mut access);
        let result = self.put_registers_back(&mut access, memory, saved);
        if result.is_err() {
            self.stop(&mut access);
        }
        result
    }

    fn put_config_back(
        &self,
        access: &mut Access<'_>,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        for (field, (_, value)) in self.config.iter().zip(&saved.config) {
            if access.config(field) & field.keep == *value {
                continue;
            }
            access.set_config(field, *value);
            if field.settle_us > 0 {
                std::thread::sleep(Duration::from_micros(field.settle_us));
            }
            held(&field.name, *value, access.config(field) & field.keep)?;
        }
        Ok(())
    }

    fn put_registers_back(
        &self,
        access: &mut Access<'_>,
        memory: &DmaSpace,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        for ring in &saved.rings {
            let unreachable = |error| CheckpointError::Ring(ring.name.clone(), error);
            memory
                .write(ring.address, &ring.contents)
                .map_err(unreachable)?;
        }
        self.put_phy_back(access, saved)?;
        for (register, (_, values)) in self.register.iter().zip(&saved.registers) {
            for (index, (at, value)) in register.offsets().zip(values).enumerate() {
                register.put_back(access, index, at, *value, &saved.image)?;
            }
        }
        for store in &self.after {
            access.write(store.offset, store.value);
        }
        Ok(())
    }

    fn put_phy_back(
        &self,
        access: &mut Access<'_>,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        if let Some(mdio) = &self.mdio {
            for (register, (_, value)) in mdio.saved.iter().zip(&saved.phy) {
                if mdio.read(access, register.number)? & register.keep == *value {
                    continue;
                }
                mdio.write(access, register.number, *value)?;
                if saved.image.stored_phy >> register.number & 1 != 0 {
                    continue;
                }
                let has = mdio.read(access, register.number)? & register.keep;
                held(&register.name, (*value).into(), has.into())?;
            }
        }
        Ok(())
    }

    /// Stops the device's units.
    fn stop(&self, access: &mut Access<'_>) {
        for store in &self.before {
            access.write(store.offset, store.value);
        }
    }

    /// Whether the function is one of those that are described.
    fn is_device(&self, access: &mut Access<'_>) -> Result<(), CheckpointError> {
        let mut identity = [0; 4];
        access.0.load_config(0, &mut identity);
        let [v0, v1, d0, d1] = identity;
        let (vendor, device) = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1]));
        if (vendor, device) == (self.device.vendor, self.device.device) {
            return Ok(());
        }
        Err(CheckpointError::OtherDevice {
            vendor,
            device,
            wanted: self.device.name.clone(),
        })
    }

    /// Whether a checkpoint has what is described, and nothing else.
    fn fits(&self, saved: &RegisterCheckpoint) -> Result<(), CheckpointError> {
        let other = |what: String| CheckpointError::OtherCheckpoint {
            wanted: self.device.name.clone(),
            what,
        };
        let device = &self.device;
        if (&saved.device, saved.version) != (&device.name, device.version) {
            let (name, version) = (&saved.device, saved.version);
            return Err(other(format!(
                "it is of a {name}, description {version} (here {})",
                device.version
            )));
        }
        let same = |known: &mut dyn Iterator<Item = &String>,
                    there: &mut dyn Iterator<Item = &String>| loop {
            match (known.next(), there.next()) {
                (None, None) => return Ok(()),
                (Some(known), Some(there)) if known == there => {}
                (_, Some(there)) => return Err(other(format!("{there} is not expected"))),
                (Some(known), None) => return Err(other(format!("{known} is missing"))),
            }
        };
        same(
            &mut self.config.iter().map(|field| &field.name),
            &mut saved.config.iter().map(|(name, _)| name),
        )?;
        same(
            &mut self.register.iter().map(|register| &register.name),
            &mut saved.registers.iter().map(|(name, _)| name),
        )?;
        let phy = self.mdio.iter().flat_map(|mdio| &mdio.saved);
        same(
            &mut phy.map(|register| &register.name),
            &mut saved.phy.iter().map(|(name, _)| name),
        )?;
        for (register, (name, values)) in self.register.iter().zip(&saved.registers) {
            if values.len() != register.count as usize {
                return Err(other(format!("{name} has {} values", values.len())));
            }
        }
        for ring in &saved.rings {
            let known = self.ring.iter().any(|known| known.name == ring.name);
            if !known || ring.contents.len() > MAX_RING as usize {
                return Err(other(format!("ring {} is not expected", ring.name)));
            }
        }
        Ok(())
    }
}

/// Between two looks at a device that is waited for.
const POLL: Duration = Duration::from_micros(10);

/// Least looks at one: whoever was kept from the processor has not waited for it.
const LEAST_LOOKS: u32 = 32;

/// Looks at a device until it is done, for so many microseconds; whether it was.
fn wait_until(us: u64, mut is_done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_micros(us);
    let mut looks = 0;
    while !is_done() {
        looks += 1;
        if looks >= LEAST_LOOKS && Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

fn held(register: &str, given: u32, has: u32) -> Result<(), CheckpointError> {
    if given == has {
        return Ok(());
    }
    Err(CheckpointError::DoesNotHold {
        register: register.to_owned(),
        given,
        has,
    })
}

impl Register {
    /// Gives number `index` of these, at `at`, a value, unless it has it.
    fn put_back(
        &self,
        access: &mut Access<'_>,
        index: usize,
        at: u32,
        value: u32,
        image: &FromImage,
    ) -> Result<(), CheckpointError> {
        if access.read(at) & self.keep == value {
            return Ok(());
        }
        access.write(at, value);
        if image.stored.contains(&at) {
            return Ok(());
        }
        let has = access.read(at) & self.keep & !self.moves | value & self.moves;
        match self.count {
            1 => held(&self.name, value, has),
            _ => held(&format!("{}[{index}]", self.name), value, has),
        }
    }
}

/// A function and the base address register that its registers are behind.
pub struct FunctionRegisters<'a> {
    function: &'a mut dyn PciFunction,
    bar: u8,
}

impl<'a> FunctionRegisters<'a> {
    /// The registers of `function`, where they are described.
    pub fn new(function: &'a mut dyn PciFunction, description: &Description) -> Self {
        Self {
            function,
            bar: description.device.bar,
        }
    }
}

impl RegisterAccess for FunctionRegisters<'_> {
    fn load(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(self.bar, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn store(&mut self, offset: u32, value: u32) {
        self.function
            .bar_write(self.bar, offset.into(), &value.to_le_bytes());
    }

    fn load_config(&mut self, offset: u16, data: &mut [u8]) {
        self.function.config_read(offset, data);
    }

    fn store_config(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
    }
}

/// A device's registers, as a description names them.
struct Access<'a>(&'a mut dyn RegisterAccess);

impl Access<'_> {
    fn read(&mut self, offset: u32) -> u32 {
        self.0.load(offset)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.0.store(offset, value);
    }

    fn config(&mut self, field: &ConfigField) -> u32 {
        let mut data = [0; 4];
        let bytes = usize::from(field.bytes).min(4);
        self.0.load_config(field.offset, &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    fn set_config(&mut self, field: &ConfigField, value: u32) {
        let bytes = usize::from(field.bytes).min(4);
        self.0
            .store_config(field.offset, &value.to_le_bytes()[..bytes]);
    }
}
