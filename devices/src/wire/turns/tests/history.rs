//! Random histories: whatever happens in whatever order, each frame has one receiver, the right
//! one, in order, and none is unaccounted for.

use proptest::prelude::*;

use super::*;

const PORTS: u8 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// A frame for the address given to a port (or nobody's, or a group's).
    Arrives(u8),
    Give(Option<u8>),
    Receive(u8),
    Send(u8),
    Plug(u8, bool),
    Stations(u8, u8),
    Full(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..PORTS + 3).prop_map(Step::Arrives),
        4 => proptest::option::weighted(0.8, 0..PORTS).prop_map(Step::Give),
        8 => (0..PORTS).prop_map(Step::Receive),
        4 => (0..PORTS).prop_map(Step::Send),
        1 => (0..PORTS, any::<bool>()).prop_map(|(port, on)| Step::Plug(port, on)),
        1 => (0..PORTS, 0..PORTS + 2).prop_map(|(port, to)| Step::Stations(port, to)),
        1 => any::<bool>().prop_map(Step::Full),
    ]
}

fn destination(to: u8) -> [u8; 6] {
    match to {
        to if to == PORTS + 2 => [0xff; 6],
        to => address(to),
    }
}

struct History {
    turns: Turns,
    far: FarEnd,
    ports: Vec<Port>,
    holder: Option<u8>,
    plugged: [bool; PORTS as usize],
    arrived: u32,
    sent: u32,
    /// Number of the last frame that each has received.
    last: [u32; PORTS as usize],
    received: Vec<u32>,
}

impl History {
    fn new(parked: Parked) -> Self {
        let (wire, far) = wire();
        let turns = Turns::new(wire, parked);
        let ports = ports(&turns, PORTS);
        Self {
            turns,
            far,
            ports,
            holder: None,
            plugged: [true; PORTS as usize],
            arrived: 0,
            sent: 0,
            last: [0; PORTS as usize],
            received: Vec::new(),
        }
    }

    fn at_wire(&self, port: u8) -> bool {
        self.holder == Some(port) && self.plugged[usize::from(port)]
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Arrives(to) => {
                self.arrived += 1;
                let number = self.arrived.to_be_bytes();
                self.far
                    .arrives([&destination(to)[..], &[to], &number].concat());
            }
            Step::Give(to) => {
                let id = to.map(|port| self.ports[usize::from(port)].id());
                self.turns.give(id).unwrap();
                self.holder = to;
            }
            Step::Receive(port) => self.receive(port),
            Step::Send(port) => self.send(port),
            Step::Plug(port, on) => {
                self.turns
                    .plug(self.ports[usize::from(port)].id(), on)
                    .unwrap();
                self.plugged[usize::from(port)] = on;
            }
            Step::Stations(port, to) => {
                self.ports[usize::from(port)].stations(&[destination(to)]);
            }
            Step::Full(full) => self.far.far().full = full,
        }
        assert_eq!(
            self.turns.holder(),
            self.holder.map(|port| self.ports[usize::from(port)].id())
        );
    }

    fn receive(&mut self, port: u8) {
        let Some(frame) = receive(&mut self.ports[usize::from(port)]) else {
            return;
        };
        assert!(self.at_wire(port), "only who has the turn receives");
        let to = frame[6];
        let number = u32::from_be_bytes(*frame[7..].first_chunk().unwrap());
        // Whose an address was that NICs ask for themselves, when the frame came, is not known
        // here.
        assert!(to >= PORTS || to == port, "the frame is another's");
        assert!(!self.received.contains(&number), "delivered twice");
        assert!(number > self.last[usize::from(port)], "out of order");
        self.last[usize::from(port)] = number;
        self.received.push(number);
    }

    fn send(&mut self, port: u8) {
        let full = self.far.far().full;
        let number = self.sent.to_be_bytes();
        let outcome =
            self.ports[usize::from(port)].send(&[&address(99)[..], &[port], &number].concat());
        let expected = match (self.at_wire(port), full) {
            (true, false) => SendOutcome::Sent,
            (true, true) => SendOutcome::Full,
            // What a parked one is told depends on how it is parked; on the wire it is not.
            (false, _) => outcome,
        };
        assert_eq!(outcome, expected);
        assert!(self.at_wire(port) || outcome != SendOutcome::Sent);
        self.sent += u32::from(outcome == SendOutcome::Sent);
        let far = self.far.far();
        assert_eq!(far.sent.len() as u32, self.sent);
    }

    /// Each frame that came is on the wire, received, waiting or counted as lost.
    fn account(&self) {
        let mut known = self.far.far().incoming.len() as u64 + self.turns.lost_without_turn();
        for port in &self.ports {
            let c = self.turns.counters(port.id()).unwrap();
            known += c.received + c.lost_while_parked + c.waited - c.delivered_after_wait;
        }
        assert_eq!(known, u64::from(self.arrived));
    }
}

proptest! {
    #[test]
    fn each_frame_has_one_receiver_the_right_one_in_order(
        steps in proptest::collection::vec(step(), 1..200),
        parked in prop_oneof![
            Just(Parked::Down), Just(FOR_EVER), Just(Parked::Stall(Duration::ZERO)),
        ],
    ) {
        let mut history = History::new(parked);
        for step in &steps {
            history.step(step);
            history.account();
        }
    }
}
