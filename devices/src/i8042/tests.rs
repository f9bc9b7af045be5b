//! Ports, lines, commands and packets, one at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::hold::{DeviceAddress, Holdable};

/// A line that counts its edges.
#[derive(Default)]
pub(super) struct Line {
    up: AtomicBool,
    pub edges: AtomicUsize,
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        if !self.up.swap(asserted, Ordering::AcqRel) && asserted {
            self.edges.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// A controller as a driver sees it.
pub(super) struct Guest {
    pub controller: Arc<Mutex<I8042>>,
    pub keyboard: Arc<Line>,
    pub aux: Arc<Line>,
    pub resets: Arc<AtomicUsize>,
    data: Port,
    command: Port,
}

impl Guest {
    pub fn new() -> Self {
        let (keyboard, aux) = (Arc::new(Line::default()), Arc::new(Line::default()));
        let resets = Arc::new(AtomicUsize::new(0));
        let counted = resets.clone();
        let on_reset = move || {
            counted.fetch_add(1, Ordering::AcqRel);
        };
        let controller = I8042::new(keyboard.clone(), aux.clone(), Box::new(on_reset));
        let controller = Arc::new(Mutex::new(controller));
        Self {
            data: Port::data(controller.clone()),
            command: Port::command(controller.clone()),
            controller,
            keyboard,
            aux,
            resets,
        }
    }

    /// One whose mouse is switched on, with a wheel.
    fn with_wheel() -> Self {
        let guest = Self::new();
        guest.tell(0x60);
        guest.give(0x47);
        for byte in [0xf3, 200, 0xf3, 100, 0xf3, 80] {
            assert_eq!(guest.mouse(byte), [0xfa]);
        }
        assert_eq!(guest.mouse(0xf2), [0xfa, 3]);
        assert_eq!(guest.mouse(0xf4), [0xfa]);
        guest
    }

    pub fn tell(&self, command: u8) {
        self.command.write(0, &[command]);
    }

    pub fn give(&self, byte: u8) {
        self.data.write(0, &[byte]);
    }

    pub fn status(&self) -> u8 {
        let mut byte = [0];
        self.command.read(0, &mut byte);
        byte[0]
    }

    pub fn take(&self) -> u8 {
        let mut byte = [0];
        self.data.read(0, &mut byte);
        byte[0]
    }

    /// All that there is to be read, with the status before each.
    fn all(&self) -> Vec<(u8, u8)> {
        let mut all = Vec::new();
        while self.status() & status::OUTPUT_FULL != 0 {
            all.push((self.status(), self.take()));
            assert!(all.len() < 100_000, "it has no end");
        }
        all
    }

    fn bytes(&self) -> Vec<u8> {
        self.all().into_iter().map(|(_, byte)| byte).collect()
    }

    /// What the mouse answers to a byte.
    fn mouse(&self, byte: u8) -> Vec<u8> {
        self.tell(0xd4);
        self.give(byte);
        self.bytes()
    }

    pub fn event(&self, event: MouseEvent) -> Result<(), NotMoved> {
        lock(&self.controller).move_mouse(event)
    }

    fn aux_edges(&self) -> usize {
        self.aux.edges.load(Ordering::Acquire)
    }
}

/// What moved, by a packet of four bytes.
fn moved(packet: &[u8]) -> (i32, i32, i32, u8) {
    let value = |low: u8, sign: u8| i32::from(low) - (i32::from(packet[0] >> sign & 1) << 8);
    let (x, y) = (value(packet[1], 4), value(packet[2], 5));
    assert_eq!(packet[0] & 8, 8, "the bit that is always set");
    (x, y, i32::from(packet[3] as i8), packet[0] & 7)
}

#[test]
fn a_driver_that_looks_for_the_controller_finds_it() {
    let guest = Guest::new();
    assert_eq!(guest.status() & status::OUTPUT_FULL, 0, "nothing to flush");
    assert_ne!(guest.status() & status::NOT_LOCKED, 0, "not locked");
    for (command, answer) in [(0xaa, 0x55), (0xa9, 0), (0xab, 0), (0xa4, 0xf1)] {
        guest.tell(command);
        let all = guest.all();
        assert_eq!(all.len(), 1, "{command:#x}");
        assert_eq!((all[0].0 & status::AUX, all[0].1), (0, answer));
    }
    // The auxiliary port is switched off and on, as the command byte says.
    for (command, bit) in [(0xa8, 0), (0xa7, 0x20), (0xad, 0x30), (0xae, 0x20)] {
        guest.tell(command);
        guest.tell(0x20);
        assert_eq!(guest.take() & 0x30, bit, "{command:#x}");
    }
    // It comes back as the auxiliary device's, and it is no multiplexer, which would answer a version.
    for byte in [0x5a, 0xf0, 0x56, 0xa4] {
        guest.tell(0xd3);
        guest.give(byte);
        let all = guest.all();
        assert_eq!((all[0].0 & status::AUX, all[0].1), (status::AUX, byte));
    }
    // Nobody is at the other port.
    guest.give(0xf2);
    let all = guest.all();
    assert_eq!(
        all[0].0 & (status::TIME_OUT | status::AUX),
        status::TIME_OUT
    );
    assert_eq!(all[0].1, 0xfe);
    // All of its memory is there.
    for at in 1..32u8 {
        guest.tell(0x60 + at);
        guest.give(at ^ 0x5a);
    }
    for at in 1..32u8 {
        guest.tell(0x20 + at);
        assert_eq!(guest.take(), at ^ 0x5a);
    }
}

#[test]
fn each_byte_has_an_edge_if_the_command_byte_lets_it() {
    let guest = Guest::new();
    guest.tell(0x60);
    guest.give(0x44);
    guest.tell(0xd3);
    guest.give(1);
    assert_eq!(guest.aux_edges(), 0, "not asked for");
    guest.tell(0x60);
    guest.give(0x47);
    assert_eq!(guest.aux_edges(), 1, "what waits interrupts when it may");
    guest.take();
    guest.tell(0xd4);
    guest.give(0xff);
    assert_eq!(guest.bytes(), [0xfa, 0xaa, 0]);
    assert_eq!(guest.aux_edges(), 4, "one each");
    assert_eq!(guest.keyboard.edges.load(Ordering::Acquire), 0);
    guest.tell(0x20);
    guest.take();
    assert_eq!(guest.keyboard.edges.load(Ordering::Acquire), 1);
    assert_eq!(guest.take(), 0x47, "an empty buffer shows what it held");
    assert_eq!(guest.keyboard.edges.load(Ordering::Acquire), 1);
}

#[test]
fn a_pulse_of_the_reset_line_resets() {
    let guest = Guest::new();
    guest.tell(0xff);
    guest.tell(0xf1);
    guest.tell(0xd1);
    guest.give(0x03);
    assert_eq!(guest.resets.load(Ordering::Acquire), 0);
    guest.tell(0xfe);
    guest.tell(0xd1);
    guest.give(0x02);
    assert_eq!(guest.resets.load(Ordering::Acquire), 2);
}

#[test]
fn the_mouse_tells_what_it_is_and_how_it_is_set() {
    let guest = Guest::new();
    guest.tell(0xa8);
    assert_eq!(guest.mouse(0xff), [0xfa, 0xaa, 0]);
    assert_eq!(guest.mouse(0xf2), [0xfa, 0]);
    assert_eq!(guest.mouse(0xe9), [0xfa, 0, 2, 100]);
    for (byte, argument) in [(0xf3, 40), (0xe8, 3)] {
        assert_eq!(guest.mouse(byte), [0xfa]);
        assert_eq!(guest.mouse(argument), [0xfa]);
    }
    guest.mouse(0xe7);
    guest.mouse(0xf4);
    assert_eq!(guest.mouse(0xe9), [0xfa, 0x30, 3, 40]);
    guest.mouse(0xf0);
    assert_eq!(guest.mouse(0xe9), [0xfa, 0x70, 3, 40]);
    assert_eq!(guest.mouse(0xf6), [0xfa]);
    assert_eq!(guest.mouse(0xe9), [0xfa, 0, 2, 100]);
    // What there is not: once more, then an error; and the next one begins anew.
    assert_eq!(guest.mouse(0xe1), [0xfe]);
    assert_eq!(guest.mouse(0xe1), [0xfc]);
    assert_eq!(guest.mouse(0xe1), [0xfe]);
    assert_eq!(guest.mouse(0xf3), [0xfa]);
    assert_eq!(guest.mouse(7), [0xfe]);
    assert_eq!(guest.mouse(60), [0xfa], "the argument comes again");
    assert_eq!(guest.mouse(0xe9)[3], 60);
    // In wrap mode all but two bytes come back.
    assert_eq!(guest.mouse(0xee), [0xfa]);
    assert_eq!(guest.mouse(0xf4), [0xf4]);
    assert_eq!(guest.mouse(0xf3), [0xf3]);
    assert_eq!(guest.mouse(0xec), [0xfa]);
    assert_eq!(guest.mouse(0xe9)[1], 0, "it was not switched on");
    // A wheel comes by the knock, and goes with a reset.
    for byte in [0xf3, 200, 0xf3, 100, 0xf3, 80] {
        guest.mouse(byte);
    }
    assert_eq!(guest.mouse(0xf2), [0xfa, 3]);
    assert_eq!(guest.mouse(0xff), [0xfa, 0xaa, 0]);
    assert_eq!(guest.mouse(0xf2), [0xfa, 0]);
}

#[test]
fn what_happens_comes_as_packets_in_order() {
    let guest = Guest::with_wheel();
    guest.event(MouseEvent::Move { x: 10, y: -5 }).unwrap();
    guest.event(MouseEvent::Click(Button::Left)).unwrap();
    guest.event(MouseEvent::Wheel(-9)).unwrap();
    guest.event(MouseEvent::Press(Button::Right)).unwrap();
    guest.event(MouseEvent::Press(Button::Right)).unwrap();
    guest.event(MouseEvent::Move { x: -600, y: 300 }).unwrap();
    let before = guest.aux_edges();
    let bytes = guest.bytes();
    assert_eq!(
        guest.aux_edges() - before,
        bytes.len() - 1,
        "the first one came before"
    );
    let packets: Vec<_> = bytes.chunks(4).map(moved).collect();
    let expected = [
        (10, 5, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 0, 0),
        (0, 0, 7, 0),
        (0, 0, 2, 0),
        (0, 0, 0, 2),
        (-255, -255, 0, 2),
        (-255, -45, 0, 2),
        (-90, 0, 0, 2),
    ];
    assert_eq!(packets, expected);
    assert!(
        bytes.chunks(4).all(|packet| packet[0] & 0xc0 == 0),
        "no counter overflowed"
    );
    let counts = lock(&guest.controller).mouse_counts();
    assert_eq!((counts.steps, counts.packets, counts.waiting), (9, 9, 0));
}

#[test]
fn a_mouse_to_which_nobody_listens_says_so_and_a_full_queue_does() {
    let guest = Guest::new();
    guest.tell(0xa8);
    let event = MouseEvent::Move { x: 1, y: 0 };
    assert_eq!(guest.event(event), Err(NotMoved::NotListening));
    guest.mouse(0xf4);
    assert_eq!(guest.event(MouseEvent::Wheel(1)), Err(NotMoved::NoWheel));
    let far = MouseEvent::Move {
        x: i32::MIN,
        y: i32::MAX,
    };
    assert_eq!(guest.event(far), Err(NotMoved::TooFar));
    let taken = (0..).take_while(|_| guest.event(event).is_ok()).count();
    // One is on its way.
    assert_eq!(taken, MAX_EVENTS + 1);
    assert_eq!(guest.event(event), Err(NotMoved::Full));
    assert_eq!(guest.bytes().len(), 3 * taken);
    guest.event(event).unwrap();
}

#[test]
fn a_packet_that_a_command_cuts_comes_again_as_a_whole() {
    let guest = Guest::with_wheel();
    guest.event(MouseEvent::Move { x: 3, y: 0 }).unwrap();
    guest.event(MouseEvent::Move { x: 4, y: 0 }).unwrap();
    guest.take();
    // The second byte is in the output buffer already.
    assert_eq!(guest.mouse(0xf5), [3, 0xfa]);
    assert_eq!(
        guest.event(MouseEvent::Wheel(1)),
        Err(NotMoved::NotListening)
    );
    let mut bytes = guest.mouse(0xf4);
    assert_eq!(bytes.remove(0), 0xfa);
    let packets: Vec<_> = bytes.chunks(4).map(moved).collect();
    assert_eq!(packets, [(3, 0, 0, 0), (4, 0, 0, 0)]);
    // Asked for again it is not there twice.
    guest.event(MouseEvent::Move { x: 5, y: 0 }).unwrap();
    guest.take();
    assert_eq!(guest.mouse(0xfe), [5, 8, 5, 0, 0]);
    assert_eq!(guest.mouse(0xfe), [8, 5, 0, 0], "the last one");
}

#[test]
fn counters_that_are_read_on_demand_stop_at_their_ends() {
    let guest = Guest::with_wheel();
    assert_eq!(guest.mouse(0xf0), [0xfa]);
    assert_eq!(guest.mouse(0xeb), [0xfa, 8, 0, 0, 0]);
    guest.event(MouseEvent::Move { x: 100, y: 0 }).unwrap();
    guest.event(MouseEvent::Move { x: 100, y: -7 }).unwrap();
    assert_eq!(guest.mouse(0xeb), [0xfa, 8, 200, 7, 0]);
    guest.event(MouseEvent::Move { x: 700, y: 700 }).unwrap();
    guest.event(MouseEvent::Press(Button::Middle)).unwrap();
    assert_eq!(guest.mouse(0xeb), [0xfa, 0xe8, 255, 0, 0], "and says so");
    assert_eq!(
        guest.mouse(0xeb),
        [0xfa, 0x0c, 0, 0, 0],
        "a button is not added up"
    );
    assert_eq!(guest.mouse(0xeb), [0xfa, 0x0c, 0, 0, 0]);
}

#[test]
fn scaling_doubles_large_counts() {
    let guest = Guest::with_wheel();
    guest.mouse(0xe7);
    for (counts, shown) in [
        (1, 1),
        (2, 1),
        (3, 3),
        (4, 6),
        (5, 9),
        (6, 12),
        (-100, -200),
    ] {
        guest.event(MouseEvent::Move { x: counts, y: 0 }).unwrap();
        assert_eq!(moved(&guest.bytes()).0, shown);
    }
    guest.event(MouseEvent::Move { x: 200, y: 0 }).unwrap();
    assert_eq!(guest.bytes(), [0x48, 255, 0, 0]);
}

#[test]
fn a_held_controller_interrupts_when_it_is_let_go() {
    let guest = Guest::with_wheel();
    let holdable = HoldableI8042(guest.controller.clone());
    let edges = guest.aux_edges();
    let held = holdable.hold(&mut |held| {
        assert!(held.owns_port(0x60) && held.owns_port(0x64) && !held.owns_port(0x61));
        held.freeze_interrupts();
        held.checkpoint();
        held.write(DeviceAddress::Port(0x64), &[0xd4]);
        held.write(DeviceAddress::Port(0x60), &[0xf5]);
        assert_eq!(guest.aux_edges(), edges);
    });
    held.unwrap();
    assert_eq!(guest.aux_edges(), edges + 1);
    assert_eq!(guest.bytes(), [0xfa]);
    guest.mouse(0xf4);
    // A call that is taken back has told it nothing.
    let held = holdable.hold(&mut |held| {
        held.checkpoint();
        let before = held.state().unwrap();
        held.write(DeviceAddress::Port(0x64), &[0xd4]);
        held.write(DeviceAddress::Port(0x60), &[0xf5]);
        let after = held.state().unwrap();
        held.restore().unwrap();
        let foreign = crate::hold::DeviceState(Arc::new(7));
        assert!(held.undo(&[(foreign, after)]).is_err());
        held.put_back(&before).unwrap();
    });
    held.unwrap();
    assert_eq!(guest.bytes(), [0; 0]);
    assert_eq!(guest.mouse(0xe9)[1] & 0x20, 0x20, "it is still on");
    // Nor has one that had gone on meanwhile, and the guest has seen the answers of the mouse.
    let state = || {
        let mut state = None;
        holdable.hold(&mut |held| state = held.state()).unwrap();
        state.unwrap()
    };
    let before = state();
    for byte in [0xf5, 0xf3, 40, 0xe8, 3] {
        assert_eq!(guest.mouse(byte), [0xfa]);
    }
    let parts = [(before, state())];
    holdable
        .hold(&mut |held| held.undo(&parts).unwrap())
        .unwrap();
    assert_eq!(guest.mouse(0xe9), [0xfa, 0x20, 2, 80]);
    holdable.hold(&mut |held| held.silence()).unwrap();
    let event = MouseEvent::Move { x: 1, y: 1 };
    assert_eq!(guest.event(event), Err(NotMoved::NotListening));
}

#[test]
fn a_reset_lets_go_of_a_line_that_was_withheld() {
    let guest = Guest::with_wheel();
    let holdable = HoldableI8042(guest.controller.clone());
    holdable
        .hold(&mut |held| held.withhold_interrupts(true))
        .unwrap();
    let edges = guest.aux_edges();
    guest.event(MouseEvent::Move { x: 1, y: 1 }).unwrap();
    assert_eq!(guest.aux_edges(), edges, "it is withheld");
    // The driver that comes next has never asked for that.
    lock(&guest.controller).reset();
    guest.tell(0x60);
    guest.give(0x47);
    guest.tell(0xd4);
    guest.give(0xf4);
    assert_eq!(guest.aux_edges(), edges + 1);
    assert_eq!(guest.bytes(), [0xfa]);
}
