use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::irq::MsiMessage;
use crate::pci::config::{BAR_COUNT, CONFIG_SPACE_BYTES};
use crate::vfio::dma::tests::Host;

const VECTORS: u8 = 2;
/// The base address register with the table of MSI-X, and where the capability is.
const TABLE: BarIndex = 3;
const CAPABILITY: u16 = 0xa0;

/// Counts interrupts of the guest.
#[derive(Default)]
struct Guest(AtomicUsize);

impl MsiVectors for Guest {
    fn count(&self) -> u16 {
        VECTORS.into()
    }
    fn route(&self, _: u16, _: Option<MsiMessage>) {}
    fn trigger(&self, _: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn event(&self, _: u16) -> Option<EventFd> {
        EventFd::new(EFD_NONBLOCK).ok()
    }
}

/// A function whose host refuses whatever it is asked, and whose driver uses its vectors.
fn in_use() -> (VfioFunction, Arc<Guest>) {
    in_use_of(VfioDevice::refuses())
}

fn in_use_of(device: VfioDevice) -> (VfioFunction, Arc<Guest>) {
    let mut bytes = [0; CONFIG_SPACE_BYTES];
    bytes[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
    // Capabilities.
    bytes[6] = 0x10;
    bytes[0x34] = CAPABILITY as u8;
    let msix = [0x11, 0, VECTORS - 1, 0, TABLE, 0, 0, 0, TABLE, 0x20, 0, 0];
    bytes[CAPABILITY.into()..][..msix.len()].copy_from_slice(&msix);
    let mut bars = [0; BAR_COUNT];
    (bars[0], bars[usize::from(TABLE)]) = (0x2_0000, 0x4000);
    let device = Arc::new(device);
    let view = HostView {
        bytes: &bytes,
        bars,
    };
    let view = view.for_guest(device.address()).unwrap();
    let guest = Arc::new(Guest::default());
    let vectors = Arc::new(PassedVectors::new(device.clone(), guest.clone()).unwrap());
    let found = view.msix.unwrap();
    let msix = Msix::at(vectors.clone(), found.layout, found.capability);
    let mut function = VfioFunction {
        areas: Vec::new(),
        interrupts: Interrupts::new(device.clone(), None, Some(vectors.clone())),
        map: None,
        device,
        dma: DmaSpace::empty(),
        side: UserSide::new(view.config, Some(msix), view.pmcsr, false),
        vectors: Some(vectors),
        masters: false,
        refused: Refused::default(),
        withheld: false,
        told_again: 0,
        notices: Notices::new().unwrap(),
        gone: false,
    };
    // Memory space and bus mastering; MSI-X; no vector is masked.
    function.config_write(offset::COMMAND, &6u16.to_le_bytes());
    function.config_write(CAPABILITY + 2, &0x8000u16.to_le_bytes());
    for vector in 0..u64::from(VECTORS) {
        function.bar_write(TABLE, vector * 16 + 12, &[0; 4]);
    }
    (function, guest)
}

#[test]
fn a_function_that_was_given_back_interrupts_nobody_and_is_asked_for_nothing() {
    let (mut function, guest) = in_use();
    let interrupts = || guest.0.swap(0, Ordering::Relaxed);
    function.interrupt(vec![1]);
    assert_eq!(interrupts(), 1);
    function.after_call(true);
    assert_eq!(interrupts(), usize::from(VECTORS));
    function.withhold(true);
    assert_eq!(interrupts(), 0);
    function.withhold(false);
    assert_eq!(interrupts(), usize::from(VECTORS));
    // What the host was asked for, and did not give.
    assert_eq!(function.refused.mode, Some(Mode::Msix));
    assert!(function.give_back(), "nothing of it is mapped");
    function.refused = Refused::default();
    function.interrupt(vec![1]);
    function.after_call(true);
    for withhold in [true, false] {
        function.withhold(withhold);
    }
    assert_eq!(interrupts(), 0);
    assert_eq!(function.refused.mode, None);
    assert!(!function.refused.mastering && function.map.is_none());
    let mut data = [0; 4];
    function.bar_read(0, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn a_function_whose_registers_stay_mapped_is_known_not_to_be_the_hosts() {
    let mut options = std::fs::File::options();
    let zero = options.read(true).write(true).open("/dev/zero").unwrap();
    for stays in [false, true] {
        let (mut function, _guest) = in_use();
        let memory = crate::pci::areas::BarMemory::of_device(&zero, 0, 4096).unwrap();
        let area = BarArea::new(0, 0, memory).unwrap();
        // As with a memory slot that could not be taken away.
        let kept = stays.then(|| area.memory().clone());
        function.areas.push(area);
        assert_eq!(function.give_back(), !stays);
        drop(kept);
    }
}

/// What the device reaches is known, whatever the host does not do.
#[test]
fn memory_that_the_host_does_not_take_out_of_the_map_is_known_and_taken_out_later() {
    let host = Arc::new(Host::default());
    let (mut function, _guest) = in_use_of(VfioDevice::refuses_but(host.clone()));
    let (_file, space) = crate::dma::tests::two_parts();
    let all: u64 = space.regions().iter().map(|region| region.len).sum();
    let known = |function: &VfioFunction| function.map.as_ref().map_or(0, DmaMap::bytes);
    function.dma = space;
    host.takes(usize::MAX);
    function.map_memory().unwrap();
    assert_eq!((known(&function), host.reached()), (all, all));
    host.keeps(true);
    for _ in 0..2 {
        function.reset();
        assert_eq!((known(&function), host.reached()), (all, all));
    }
    // One part goes, the other stays; what has gone comes again.
    host.gives_up(1);
    function.reset();
    let left = host.reached();
    assert!(0 < left && left < all);
    assert_eq!(known(&function), left);
    function.map_memory().unwrap();
    assert_eq!((known(&function), host.reached()), (all, all));
    host.keeps(false);
    function.reset();
    assert_eq!((known(&function), host.reached()), (0, 0));
    // One that gets a part only has none.
    host.takes(1);
    function.map_memory().unwrap_err();
    assert_eq!((known(&function), host.reached()), (0, 0));
}
