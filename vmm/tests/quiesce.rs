//! Bringing a machine to rest: participants, refusals, instructions under way; and what guests tell
//! of panics.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Guest, config, start};
use devices::bus::BusDevice;
use vmm::{Participant, PausedVcpus, QuiesceError, Refused, RestFor, Unsettled, VmState};

const LIMIT: Duration = Duration::from_secs(20);

guest_code!(
    counts,
    "1: inc qword ptr [0x200000]",
    "mov edx, 0x500",
    "mov eax, [0x200000]",
    "out dx, eax",
    "jmp 1b",
);

/// Says what was asked of it, and settles as told.
struct Probe {
    name: &'static str,
    log: Arc<Mutex<Vec<String>>>,
    answer: Mutex<Box<dyn FnMut() -> Result<(), Unsettled> + Send>>,
}

impl Probe {
    fn shared(
        name: &'static str,
        log: &Arc<Mutex<Vec<String>>>,
        answer: impl FnMut() -> Result<(), Unsettled> + Send + 'static,
    ) -> Arc<dyn Participant> {
        Arc::new(Self {
            name,
            log: log.clone(),
            answer: Mutex::new(Box::new(answer)),
        })
    }
}

impl Participant for Probe {
    fn name(&self) -> String {
        self.name.to_owned()
    }
    fn settle(&self, _rest: RestFor, vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        assert_eq!(vcpus.count(), 2);
        self.log
            .lock()
            .unwrap()
            .push(format!("{} settles", self.name));
        self.answer.lock().unwrap()()
    }
    fn go_on(&self) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{} goes on", self.name));
    }
}

fn busy(reason: &str, soon: bool) -> Result<(), Unsettled> {
    Err(Unsettled {
        reason: reason.to_owned(),
        soon,
    })
}

#[test]
fn participants_settle_in_order_and_go_on_in_reverse() {
    let guest = start(counts(), 2);
    guest.report();
    let log = Arc::new(Mutex::new(Vec::new()));
    let first = Probe::shared("disk", &log, || Ok(()));
    let mut tries = 0;
    let second = Probe::shared("calls", &log, move || {
        tries += 1;
        match tries {
            1..=3 => busy("one is open", true),
            _ => Ok(()),
        }
    });
    guest.handle.add_participant(first.clone());
    guest.handle.add_participant(second);
    let state = guest
        .handle
        .quiesce(LIMIT, |quiesced| {
            log.lock().unwrap().push("at rest".to_owned());
            quiesced.save().unwrap()
        })
        .unwrap();
    assert!(!state.to_bytes().unwrap().is_empty());
    let again = ["disk settles", "calls settles", "disk goes on"];
    let finally = [
        "disk settles",
        "calls settles",
        "at rest",
        "calls goes on",
        "disk goes on",
    ];
    let expected: Vec<_> = again.iter().cycle().take(9).chain(&finally).collect();
    assert_eq!(log.lock().unwrap().iter().collect::<Vec<_>>(), expected);
    assert_eq!(guest.handle.state(), VmState::Running);
    guest.handle.remove_participant(&first);
    log.lock().unwrap().clear();
    guest.handle.quiesce(LIMIT, |_| ()).unwrap();
    assert_eq!(*log.lock().unwrap(), ["calls settles", "calls goes on"]);
    guest.drain();
    guest.report();
    guest.power_off();
}

#[test]
fn a_refusal_names_who_and_why_and_leaves_the_machine_as_it_was() {
    let guest = start(counts(), 2);
    let log = Arc::new(Mutex::new(Vec::new()));
    let refusing = Probe::shared("calls", &log, || busy("`e1000_open` is open", false));
    guest.handle.add_participant(refusing.clone());
    let error = guest.handle.quiesce(LIMIT, |_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "calls did not come to rest: `e1000_open` is open"
    );
    guest.drain();
    guest.report();
    guest.handle.remove_participant(&refusing);
    // One that is paused cannot end what is open, however soon it would.
    guest
        .handle
        .add_participant(Probe::shared("disk", &log, || busy("a request", true)));
    guest.handle.pause().unwrap();
    let error = guest.handle.quiesce(LIMIT, |_| ()).unwrap_err();
    assert!(matches!(error, QuiesceError::Unsettled { .. }), "{error}");
    assert_eq!(guest.handle.state(), VmState::Paused);
    guest.handle.resume().unwrap();
    // One that never gets there is given up.
    let error = guest
        .handle
        .quiesce(Duration::from_millis(50), |_| ())
        .unwrap_err();
    assert!(matches!(error, QuiesceError::Unsettled { .. }), "{error}");
    guest.drain();
    guest.report();
    let handle = guest.handle.clone();
    guest.power_off();
    let error = handle.quiesce(LIMIT, |_| ()).unwrap_err();
    assert!(matches!(error, QuiesceError::Refused(Refused::Stopped)));
}

guest_code!(
    copies_to_a_device,
    "cld",
    "xor r12d, r12d",
    "1: mov esi, 0x100000",
    "mov edi, 0x30000000", // beyond memory, mapped one to one
    "mov ecx, 3000",
    "rep movsb",
    "inc r12",
    "jmp 1b",
);

#[derive(Default)]
struct Counter(AtomicU64);

impl BusDevice for Counter {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.fetch_add(data.len() as u64, Ordering::AcqRel);
    }
}

/// A string instruction that stores to a device can be interrupted only between two of its stores:
/// registers must say how far it is.
#[test]
fn registers_are_those_behind_the_last_store_of_a_string_instruction() {
    let guest = Guest::new(config(copies_to_a_device(), 1));
    let counter = Arc::new(Counter::default());
    guest
        .vm
        .handle()
        .mmio_bus()
        .map(0x3000_0000, 0x1000, counter.clone())
        .unwrap();
    let guest = guest.start();
    let mut in_the_middle = 0;
    for _ in 0..30 {
        std::thread::sleep(Duration::from_millis(2));
        let regs = guest
            .handle
            .quiesce(LIMIT, |quiesced| {
                quiesced.save().unwrap();
                quiesced.vcpus().get(0).unwrap().get_regs().unwrap()
            })
            .unwrap();
        // What `quiesce` saw is what the device had then, unless it went on since.
        let done = guest
            .handle
            .quiesce(LIMIT, |quiesced| {
                let regs = quiesced.vcpus().get(0).unwrap().get_regs().unwrap();
                let copied = regs.rdi.saturating_sub(0x3000_0000);
                in_the_middle += u32::from((1..3000).contains(&copied));
                (
                    regs.r12 * 3000 + copied,
                    counter.0.load(Ordering::Acquire),
                    regs.rcx,
                )
            })
            .unwrap();
        // At the end of a round RDI still stands behind its last byte while R12 has counted it.
        let (by_registers, by_device, left) = done;
        assert!(
            by_registers == by_device || left == 0 && by_registers == by_device + 3000,
            "{by_registers} bytes by registers, {by_device} at the device, {left} left, before {regs:?}"
        );
    }
    assert!(in_the_middle > 0, "never in the middle of the instruction");
    guest.power_off();
}

guest_code!(
    panics_once,
    "mov edx, 0x505",
    "in al, dx",
    "mov edx, 0x500",
    "out dx, al",
    "mov edx, 0x505",
    "mov al, 1",
    "out dx, al",
    "out dx, al",
    "mov edx, 0x500",
    "mov al, 2",
    "out dx, al",
    "1: hlt",
    "jmp 1b",
);

#[test]
fn a_guest_that_panics_is_noticed_until_it_starts_again() {
    let guest = start(panics_once(), 1);
    assert_eq!(guest.report(), 3, "both events are understood");
    assert_eq!(guest.report(), 2);
    let status = guest.handle.status();
    assert!(status.panicked);
    assert_eq!(status.panics, 1);
    guest.handle.reset().unwrap();
    assert_eq!((guest.report(), guest.report()), (3, 2));
    assert_eq!(guest.handle.status().panics, 2);
    guest.power_off();
}
