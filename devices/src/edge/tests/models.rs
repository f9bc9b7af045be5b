//! Faults at the edge of the 82540EM model, by the bus, by its registers, and while it is held.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::{Edge, EdgeKind, EdgeOrder, OrderError, When};
use crate::bus::Bus;
use crate::e1000::bench::{Bench, BenchLine, MAC};
use crate::e1000::{E1000, E1000Config, HoldableE1000};
use crate::hold::{CheckpointBy, DeviceAddress};
use crate::pci::PciFunction;
use crate::pci::bus::{ConfigPorts, PciBus};
use crate::pci::config::offset;
use crate::wire::gateway::{Gateway, GatewayConfig};

/// Device Control and its bit to set the link up (13.4.1).
const CTRL: u64 = 0;
const CTRL_SLU: u32 = 1 << 6;
/// Device Status and its link bit, Interrupt Cause Read and its link bit, Interrupt Mask Set
/// (13.4.2, 13.4.17, 13.4.20).
const STATUS: u64 = 0x8;
const STATUS_LU: u32 = 1 << 1;
const ICR: u64 = 0xc0;
const ICR_LSC: u32 = 1 << 2;
const ICS: u64 = 0xc8;
const IMS: u64 = 0xd0;
/// Transmit descriptor base, low word (13.4.35).
const TDBAL: u64 = 0x3800;
/// Where the bus has the registers.
const BASE: u64 = 0xc000_0000;

fn read(edge: &Edge, nic: &mut E1000, register: u64) -> u32 {
    let mut data = [0; 4];
    edge.around(nic).bar_read(0, register, &mut data);
    u32::from_le_bytes(data)
}

fn write(edge: &Edge, nic: &mut E1000, register: u64, value: u32) {
    edge.around(nic)
        .bar_write(0, register, &value.to_le_bytes());
}

/// A bench whose driver has set the link up.
fn bench() -> Bench {
    let mut bench = Bench::new(1 << 20, E1000Config::new(MAC)).unwrap();
    bench.set_bits(0, 1 << 6);
    bench.read(ICR as u32);
    bench
}

#[test]
fn a_status_register_reads_as_the_fault_says() {
    let (mut bench, edge) = (bench(), Edge::default());
    let nic = &mut bench.nic;
    let healthy = read(&edge, nic, STATUS);
    assert_ne!(healthy & STATUS_LU, 0);
    let order = EdgeOrder::new(EdgeKind::StuckZeroes).mask(STATUS_LU.into());
    edge.arm(order.bar(0).offsets(STATUS..STATUS + 4), nic)
        .unwrap();
    assert_eq!(read(&edge, nic, STATUS), healthy & !STATUS_LU);
    write(&edge, nic, TDBAL, 0x1230);
    assert_eq!(read(&edge, nic, TDBAL), 0x1230, "another register");
    edge.disarm(None, nic);
    assert_eq!(read(&edge, nic, STATUS), healthy);
}

#[test]
fn a_load_whose_value_is_lost_acknowledges_the_interrupt_all_the_same() {
    let (mut bench, edge) = (bench(), Edge::default());
    write(&edge, &mut bench.nic, IMS, ICR_LSC);
    write(&edge, &mut bench.nic, ICS, ICR_LSC);
    assert!(bench.interrupt());
    let order = EdgeOrder::new(EdgeKind::LoadZeroes).when(When::Once);
    edge.arm(order.offsets(ICR..ICR + 4), &mut bench.nic)
        .unwrap();
    assert_eq!(read(&edge, &mut bench.nic, ICR), 0);
    assert!(!bench.interrupt());
}

#[test]
fn the_link_flaps_and_the_driver_is_told_both_times() {
    let (mut bench, edge) = (bench(), Edge::default());
    let cable = Arc::<Mutex<Vec<bool>>>::default();
    let told = cable.clone();
    edge.has_link(Arc::new(move |plugged| told.lock().unwrap().push(plugged)));
    let order = EdgeOrder::new(EdgeKind::LinkFlap).when(When::Once).span(3);
    edge.arm(order, &mut bench.nic).unwrap();
    let nic = &mut bench.nic;
    let mut read = |register| {
        let value = read(&edge, nic, register);
        edge.accessed();
        for plugged in cable.lock().unwrap().drain(..) {
            nic.set_cable(plugged);
        }
        value
    };
    assert_ne!(read(STATUS) & STATUS_LU, 0, "it goes with this access");
    assert_eq!(read(STATUS) & STATUS_LU, 0);
    assert_ne!(read(ICR) & ICR_LSC, 0);
    read(STATUS);
    assert_ne!(read(STATUS) & STATUS_LU, 0);
    assert_ne!(read(ICR) & ICR_LSC, 0);
    assert_eq!(
        bench.far_end().nic_link,
        [true, false, true],
        "the port has seen it too"
    );
}

#[test]
fn a_function_without_a_cable_has_no_link_that_flaps() {
    let (mut bench, edge) = (bench(), Edge::default());
    let flap = EdgeOrder::new(EdgeKind::LinkFlap);
    let refused = edge.arm(flap, &mut bench.nic);
    assert_eq!(refused, Err(OrderError::NoLink));
    assert!(!edge.is_armed());
}

/// The controller on a bus, at [`BASE`], with its edge.
struct Machine {
    memory: Arc<Bus>,
    ports: ConfigPorts,
    nic: Arc<Mutex<E1000>>,
    edge: Arc<Edge>,
    line: Arc<BenchLine>,
}

fn machine() -> Machine {
    let memory = Arc::new(Bus::new());
    let pci = Arc::new(PciBus::new(Arc::new(Bus::new()), memory.clone()));
    let (edge, line) = (Arc::new(Edge::default()), Arc::new(BenchLine::default()));
    let dma = Bench::new(1 << 20, E1000Config::new(MAC)).unwrap().dma;
    let wire = Gateway::new(&GatewayConfig::default()).unwrap();
    let intx = edge.line(line.clone());
    let nic = E1000::new(E1000Config::new(MAC), dma, intx, Box::new(wire)).unwrap();
    let nic = Arc::new(Mutex::new(nic));
    let plugged = nic.clone();
    edge.has_link(Arc::new(move |is_in| {
        plugged.lock().unwrap().set_cable(is_in);
    }));
    pci.insert_at_edge(2, nic.clone(), edge.clone()).unwrap();
    pci.config_write(2, offset::BAR0, &(BASE as u32).to_le_bytes());
    pci.config_write(2, offset::COMMAND, &[7, 0]);
    Machine {
        memory,
        ports: ConfigPorts(pci),
        nic,
        edge,
        line,
    }
}

impl Machine {
    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(BASE + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.memory.write(BASE + register, &value.to_le_bytes());
    }

    fn arm(&self, order: EdgeOrder) {
        self.edge
            .arm(order, &mut *self.nic.lock().unwrap())
            .unwrap();
    }

    fn disarm(&self) {
        self.edge.disarm(None, &mut *self.nic.lock().unwrap());
        self.edge.tell_link();
    }

    /// Vendor and device as the guest reads them.
    fn identity(&self) -> u32 {
        use crate::bus::BusDevice;
        self.ports.write(0, &(1u32 << 31 | 2 << 11).to_le_bytes());
        let mut data = [0; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }
}

#[test]
fn what_comes_by_the_bus_passes_the_edge_and_what_the_host_does_goes_past() {
    let machine = machine();
    machine.write(IMS, ICR_LSC);
    machine.write(ICS, ICR_LSC);
    assert!(machine.line.asserted());
    assert_eq!(machine.identity(), 0x100e_8086);
    machine.arm(EdgeOrder::new(EdgeKind::Removed));
    assert_eq!(machine.read(STATUS), u32::MAX);
    assert_eq!(machine.identity(), u32::MAX);
    assert!(!machine.line.asserted());
    let mut vendor = [0; 2];
    machine.ports.0.config_read(2, 0, &mut vendor);
    assert_eq!(vendor, [0x86, 0x80], "the host still finds it");
    // The guest is reset; the card is still not there for it.
    machine.ports.0.reset();
    assert_eq!(machine.identity(), u32::MAX);
    machine.disarm();
    assert_eq!(machine.identity(), 0x100e_8086);
    assert!(!machine.line.asserted(), "it was reset as well");
}

#[test]
fn a_link_flaps_by_the_bus_and_in_calls_that_hold_the_card() {
    let machine = machine();
    machine.write(CTRL, CTRL_SLU);
    let has_link = || {
        let mut data = [0; 4];
        machine.nic.lock().unwrap().bar_read(0, STATUS, &mut data);
        u32::from_le_bytes(data) & STATUS_LU != 0
    };
    assert!(has_link());
    let flap = EdgeOrder::new(EdgeKind::LinkFlap).when(When::Once).span(2);
    machine.arm(flap.clone());
    machine.read(TDBAL);
    assert!(!has_link());
    machine.write(TDBAL, 0);
    machine.read(TDBAL);
    assert!(has_link());
    machine.disarm();
    let held = HoldableE1000::new(machine.nic.clone(), CheckpointBy::Exact).unwrap();
    let device = machine.edge.holdable(Arc::new(held), machine.nic.clone());
    machine.arm(flap);
    let at = DeviceAddress::Memory(BASE + TDBAL);
    device.hold(&mut |held| held.read(at, &mut [0; 4])).unwrap();
    assert!(!has_link());
    machine.disarm();
    assert!(has_link());
}

#[test]
fn isolated_calls_pass_the_edge_and_a_call_that_is_taken_back_takes_its_late_stores_along() {
    let machine = machine();
    let held = HoldableE1000::new(machine.nic.clone(), CheckpointBy::Exact).unwrap();
    let device = machine.edge.holdable(Arc::new(held), machine.nic.clone());
    let at = |register: u64| DeviceAddress::Memory(BASE + register);
    let load = || {
        let mut data = [0; 4];
        let mut read = |held: &mut dyn crate::hold::HeldDevice| held.read(at(TDBAL), &mut data);
        device.hold(&mut read).unwrap();
        u32::from_le_bytes(data)
    };
    machine.write(TDBAL, 0x1230);
    assert_eq!(load(), 0x1230);
    machine.arm(EdgeOrder::new(EdgeKind::LoadFlipped).mask(0x10));
    assert_eq!(load(), 0x1220);
    device
        .hold(&mut |held| {
            assert!(held.owns(BASE + TDBAL) && !held.owns(0x1000));
            assert_eq!(held.read_past(at(TDBAL), 4, &mut std::iter::empty()), None);
        })
        .unwrap();
    machine.disarm();
    machine.arm(EdgeOrder::new(EdgeKind::StoreLate).span(2));
    device
        .hold(&mut |held| {
            held.checkpoint();
            held.write(at(TDBAL), &0x4560u32.to_le_bytes());
            held.restore().unwrap();
        })
        .unwrap();
    for _ in 0..4 {
        assert_eq!(load(), 0x1230);
    }
    // A store that was kept does arrive, in a call or by the guest.
    let mut store = |held: &mut dyn crate::hold::HeldDevice| {
        held.write(at(TDBAL), &0x4560u32.to_le_bytes());
    };
    device.hold(&mut store).unwrap();
    assert_eq!((load(), load()), (0x1230, 0x4560));
}

/// The cable takes the card's lock, which who arms a fault has.
#[test]
fn a_fault_is_armed_while_a_link_is_told() {
    let (edge, bench) = (Edge::default(), Mutex::new(bench()));
    let (tells, telling) = channel();
    let (arms, armed) = channel();
    let armed = Mutex::new(armed);
    edge.has_link(Arc::new(move |plugged| {
        tells.send(plugged).unwrap();
        let armed = armed.lock().unwrap();
        armed.recv_timeout(Duration::from_secs(30)).unwrap();
    }));
    let flap = EdgeOrder::new(EdgeKind::LinkFlap).when(When::Once);
    edge.arm(flap, &mut bench.lock().unwrap().nic).unwrap();
    read(&edge, &mut bench.lock().unwrap().nic, STATUS);
    std::thread::scope(|scope| {
        let (edge, bench) = (&edge, &bench);
        scope.spawn(move || {
            assert!(!telling.recv().unwrap());
            let order = EdgeOrder::new(EdgeKind::Removed);
            edge.arm(order, &mut bench.lock().unwrap().nic).unwrap();
            arms.send(()).unwrap();
        });
        edge.accessed();
    });
    assert_eq!(edge.statuses().len(), 2);
}
