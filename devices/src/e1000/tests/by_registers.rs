//! The controller's state taken and put back by its registers, against its exact state.

use super::driver::{Driver, MEMORY_BYTES, broadcast};
use super::histories::{Random, histories};
use crate::dma::DmaSpace;
use crate::e1000::bench::Bench;
use crate::e1000::ops::{Exercise, Op};
use crate::e1000::regs::*;
use crate::pci::PciFunction;
use crate::pci::config::offset::COMMAND;
use crate::pci::registers::{CheckpointError, Description, RegisterCheckpoint};

fn description() -> Description {
    Description::intel_82540em().unwrap()
}

fn take(bench: &mut Bench) -> Result<RegisterCheckpoint, CheckpointError> {
    description().take(&mut bench.nic, &bench.dma)
}

fn put_back(bench: &mut Bench, saved: &RegisterCheckpoint) -> Result<(), CheckpointError> {
    description().put_back(&mut bench.nic, &bench.dma, saved)
}

#[test]
fn after_any_history_the_registers_and_rings_are_as_they_were() {
    let mut compared = 0;
    for seed in histories(60) {
        let mut random = Random(seed << 24 | 7);
        let mut exercise = Exercise::new().unwrap();
        for op in random.ops() {
            exercise.apply(&op);
        }
        // Nothing is on its way in or out when the state is taken.
        exercise.apply(&Op::Room { frames: None });
        exercise.bench().far_end().to_nic.clear();
        exercise.apply(&Op::Serve);
        let plugged_in = exercise.bench().far_end().plugged_in;
        let mut exact = exercise.twin().unwrap();
        let saved = match take(exercise.bench()) {
            Ok(saved) => saved,
            Err(CheckpointError::Asleep(..)) => continue,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        assert_eq!(take(exact.bench()), Ok(saved.clone()), "seed {seed}");
        for op in random.ops() {
            exercise.apply(&op);
        }
        let bench = exercise.bench();
        bench.far_end().to_nic.clear();
        bench.far_end().room = None;
        bench.far_end().plugged_in = plugged_in;
        bench.serve();
        put_back(bench, &saved).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        // Whatever the units still have to do, they do in both.
        exercise.apply(&Op::Serve);
        exact.apply(&Op::Serve);
        assert_eq!(take(exercise.bench()), take(exact.bench()), "seed {seed}");
        compared += 1;
    }
    assert!(compared > 20, "{compared} histories were compared");
}

#[test]
fn traffic_goes_on_where_it_was_at_the_checkpoint() {
    let mut driver = Driver::new();
    driver.send(&broadcast(60));
    driver.bench.deliver(&broadcast(100));
    assert!(driver.receive().is_some());
    driver.sent();
    let saved = take(&mut driver.bench).unwrap();
    driver.bench.far_end().nic_link.clear();
    // What a reset of the adapter does, and more.
    driver.bench.write(CTRL, ctrl::RST);
    for register in [RCTL, TCTL, RDBAL, TDBAL, RDLEN, TDLEN, MTA, VFTA, RA] {
        driver.bench.write(register, 0);
    }
    put_back(&mut driver.bench, &saved).unwrap();
    assert_eq!(take(&mut driver.bench), Ok(saved));
    driver.send(&broadcast(70));
    assert_eq!(driver.sent(), [broadcast(70)]);
    driver.bench.deliver(&broadcast(110));
    let received = driver.receive().unwrap().data;
    assert_eq!(received[..110], broadcast(110), "behind it is the FCS");
    assert_eq!(
        driver.bench.far_end().nic_link,
        [true; 0],
        "the link was lost"
    );
}

#[test]
fn a_driver_that_lost_an_interrupt_is_made_to_look() {
    let mut driver = Driver::new();
    driver.bench.write(IMS, icr::RXT0 | icr::LSC);
    driver.bench.read(ICR);
    driver.bench.deliver(&broadcast(100));
    let saved = take(&mut driver.bench).unwrap();
    assert!(
        driver.bench.interrupt(),
        "taking the state acknowledges nothing"
    );
    driver.bench.read(ICR);
    assert!(!driver.bench.interrupt());
    put_back(&mut driver.bench, &saved).unwrap();
    assert!(driver.bench.interrupt());
    assert!(driver.bench.read(ICR) & icr::RXT0 != 0);
}

#[test]
fn a_phy_that_was_powered_down_is_powered_up_again() {
    let mut driver = Driver::new();
    let control = driver.bench.read_phy(0);
    let saved = take(&mut driver.bench).unwrap();
    driver.bench.write_phy(0, control | 1 << 11);
    assert_eq!(driver.bench.read(STATUS) & status::LU, 0);
    put_back(&mut driver.bench, &saved).unwrap();
    assert_eq!(driver.bench.read_phy(0), control);
    assert_ne!(driver.bench.read(STATUS) & status::LU, 0);
}

#[test]
fn a_sleeping_controller_is_not_saved_and_one_that_fell_asleep_is_woken() {
    let mut driver = Driver::new();
    let saved = take(&mut driver.bench).unwrap();
    driver.bench.nic.config_write(0xe0, &[3, 0]);
    let error = take(&mut driver.bench).unwrap_err();
    assert!(matches!(error, CheckpointError::Asleep(..)), "{error}");
    put_back(&mut driver.bench, &saved).unwrap();
    assert_eq!(take(&mut driver.bench), Ok(saved));
}

#[test]
fn checkpoints_of_other_devices_or_versions_are_refused_and_change_nothing() {
    let mut driver = Driver::new();
    let saved = take(&mut driver.bench).unwrap();
    let before = driver.bench.nic.save();
    let stored = serde_json::to_value(&saved).unwrap();
    let mut damaged = Vec::new();
    for (key, value) in [
        ("device", serde_json::json!("82541")),
        ("version", serde_json::json!(2)),
        ("registers", serde_json::json!([])),
        ("config", serde_json::json!([["COMMAND", 7]])),
        ("phy", serde_json::json!([["XYZ", 7]])),
        (
            "rings",
            serde_json::json!([{"name": "x", "address": 0, "contents": []}]),
        ),
    ] {
        let mut other = stored.clone();
        other[key] = value;
        damaged.push(other);
    }
    let mut other = stored.clone();
    other["registers"][0][0] = "XYZ".into();
    damaged.push(other);
    let mut other = stored.clone();
    other["registers"][0][1] = serde_json::json!([1, 2]);
    damaged.push(other);
    for other in damaged {
        let other: RegisterCheckpoint = serde_json::from_value(other).unwrap();
        let error = put_back(&mut driver.bench, &other).unwrap_err();
        assert!(
            matches!(error, CheckpointError::OtherCheckpoint { .. }),
            "{error}"
        );
    }
    assert_eq!(driver.bench.nic.save(), before);
    let stored: RegisterCheckpoint = serde_json::from_value(stored).unwrap();
    assert_eq!(stored, saved);
}

/// A controller of which one register does not hold what it is given, or that is gone.
struct Faulty<'a> {
    bench: &'a mut Bench,
    stuck: Option<u32>,
    gone: bool,
}

impl PciFunction for Faulty<'_> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        match self.gone {
            true => data.fill(0xff),
            false => self.bench.nic.config_read(offset, data),
        }
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.bench.nic.config_write(offset, data);
    }
    fn decoded(&self) -> Vec<crate::pci::BarRange> {
        self.bench.nic.decoded()
    }
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        self.bench.nic.bar_read(bar, offset, data);
    }
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if self.stuck != u32::try_from(offset).ok() {
            self.bench.nic.bar_write(bar, offset, data);
        }
    }
    fn reset(&mut self) {
        self.bench.nic.reset();
    }
}

#[test]
fn a_device_that_does_not_hold_its_registers_is_told_and_stopped() {
    let mut driver = Driver::new();
    let saved = take(&mut driver.bench).unwrap();
    driver.bench.write(RDBAL, 0x1000);
    let memory: DmaSpace = driver.bench.dma.clone();
    let mut faulty = Faulty {
        bench: &mut driver.bench,
        stuck: Some(RDBAL),
        gone: false,
    };
    let error = description().put_back(&mut faulty, &memory, &saved);
    let error = error.unwrap_err();
    assert!(error.to_string().contains("RDBAL was given"), "{error}");
    faulty.gone = true;
    let error = description().put_back(&mut faulty, &memory, &saved);
    assert!(matches!(error, Err(CheckpointError::OtherDevice { .. })));
    let error = description().take(&mut faulty, &memory);
    assert!(matches!(error, Err(CheckpointError::OtherDevice { .. })));
    assert_eq!(driver.bench.read(RCTL) & rctl::EN, 0);
    assert_eq!(driver.bench.read(TCTL) & tctl::EN, 0);
    assert_eq!(driver.bench.read(IMS), 0);
    // The bus is as the guest had it.
    let mut command = [0; 2];
    driver.bench.nic.config_read(COMMAND, &mut command);
    assert_eq!(command, [7, 0]);
}

#[test]
fn rings_are_put_back_with_their_contents() {
    let mut driver = Driver::new();
    let saved = take(&mut driver.bench).unwrap();
    let ring = driver.bench.read(RDBAL);
    let mut before = [0; 64];
    driver.bench.dma.read(ring.into(), &mut before).unwrap();
    driver.bench.dma.write(ring.into(), &[0xaa; 64]).unwrap();
    put_back(&mut driver.bench, &saved).unwrap();
    let mut after = [0; 64];
    driver.bench.dma.read(ring.into(), &mut after).unwrap();
    assert_eq!(after, before);
    assert!(u64::from(ring) + 64 < MEMORY_BYTES as u64);
}
