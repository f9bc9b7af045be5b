//! What becomes of calls that fail, of a hand-made guest that runs, on the host's real KVM.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

#[path = "../arming/guest.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;
mod own_stack;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::hold::{DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable, OutsideChanges};
use guest::*;
use isolation::attach::request::IsolateRequest;
use isolation::compensation::effects::{FunctionModel, KernelModel, OppositeModel};
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy, ReturnErrors};
use isolation::guest::btf::Btf;

/// -EIO, what a call returns that failed and whose type is not known.
const ERROR: u64 = -5i64 as u64;
const RETRIES: u32 = 2;
/// `jmp` to itself.
const HANGS: [u8; 2] = [0xeb, 0xfe];
/// `ud2`.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// A failed call as its policy is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    attempts: u32,
    out_of_time: bool,
    in_a_row: bool,
}

/// Has calls run again, and keeps what it is told.
#[derive(Clone, Default)]
struct Retry(Arc<Mutex<Vec<Told>>>);

impl FaultPolicy for Retry {
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault {
        self.0.lock().unwrap().push(Told {
            attempts: call.attempts,
            out_of_time: call.out_of_time,
            in_a_row: call.in_a_row,
        });
        match call.attempts > RETRIES || call.out_of_time {
            true => AfterFault::ReturnError,
            false => AfterFault::Retry,
        }
    }
}

impl Retry {
    fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Types of nothing at all: BTF with an empty string in it (Documentation/bpf/btf.rst).
fn no_types() -> Arc<Btf> {
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24u32, 0, 0, 0, 1] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.push(0);
    Arc::new(Btf::parse(&bytes, None).unwrap())
}

/// A guest whose first module is isolated, its calls going on in the guest for `kernel_schedule`.
fn spilling(policy: Box<dyn FaultPolicy>) -> Guest {
    let guest = Guest::start();
    let model = KernelModel {
        harmless: vec!["kernel_waits".to_owned()],
        ..KernelModel::default()
    };
    guest
        .isolator
        .isolate(IsolateRequest {
            types: Some(no_types()),
            model: Some(model),
            guest_only: vec!["kernel_schedule".to_owned()],
            policy,
            ..Guest::request("first")
        })
        .unwrap();
    guest
}

fn failed(attempts: u32) -> Told {
    Told {
        attempts,
        out_of_time: false,
        in_a_row: attempts > 1,
    }
}

#[test]
fn a_call_that_fails_after_it_went_on_in_the_guest_is_run_again_at_most_as_often_as_any() {
    let policy = Retry::default();
    let guest = spilling(Box::new(policy.clone()));
    guest.write(FAILS, 1);
    assert_eq!(guest.call(WAITS), ERROR);
    assert_eq!(policy.take(), [failed(1), failed(2), failed(3)]);
    // It went on in the guest in each of them, and nothing of it is left there.
    assert_eq!(guest.read(SCHEDULED), 3);
    assert_eq!(guest.read(RUNS), 0);
    let entry = guest.entry("first_waits");
    assert_eq!((entry.aborts, entry.retries, entry.undone), (3, 2, 3));
    // How long that took is told of each.
    assert_eq!(entry.taken_back.count(), 3);
    assert!(entry.taken_back.sum_ns() > 0);
    guest.write(FAILS, 0);
    assert_eq!(guest.call(WAITS), 7);
    assert_eq!(guest.read(RUNS), 1);
    // The one before that has ended well.
    guest.write(FAILS, 1);
    assert_eq!(guest.call(WAITS), ERROR);
    assert_eq!(policy.take(), [failed(1), failed(2), failed(3)]);
}

#[test]
fn a_call_that_hangs_is_not_run_again_and_the_next_one_is_told_to_be_in_a_row() {
    let policy = Retry::default();
    let guest = Guest::start();
    guest
        .isolator
        .isolate(IsolateRequest {
            policy: Box::new(policy.clone()),
            budget: Duration::from_millis(50),
            ..Guest::request("first")
        })
        .unwrap();
    let isolator = &guest.isolator;
    let before = isolator.inject("first", "first_counts", 5, &HANGS).unwrap();
    let hung = |in_a_row| Told {
        attempts: 1,
        out_of_time: true,
        in_a_row,
    };
    assert_eq!((guest.call(FIRST), guest.call(FIRST)), (ERROR, ERROR));
    assert_eq!(policy.take(), [hung(false), hung(true)]);
    isolator
        .inject("first", "first_counts", 5, &before)
        .unwrap();
    assert_eq!(guest.call(FIRST), 1);
    isolator.inject("first", "first_counts", 5, &HANGS).unwrap();
    assert_eq!(guest.call(FIRST), ERROR);
    assert_eq!(policy.take(), [hung(false)]);
}

/// A device whose interrupts and link can be held back, and nothing else.
#[derive(Default)]
struct Link(Mutex<Held>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Held {
    outside: bool,
    interrupts: bool,
    silenced: u32,
}

impl Holdable for Link {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        with(&mut *self.0.lock().unwrap());
        Ok(())
    }
}

impl HeldDevice for Held {
    fn owns(&self, _gpa: u64) -> bool {
        false
    }
    fn owns_port(&self, _port: u16) -> bool {
        false
    }
    fn read(&mut self, _at: DeviceAddress, _data: &mut [u8]) {}
    fn write(&mut self, _at: DeviceAddress, _data: &[u8]) {}
    fn checkpoint(&mut self) {}
    fn restore(&mut self) -> Result<(), DeviceLost> {
        Ok(())
    }
    fn state(&self) -> Option<DeviceState> {
        None
    }
    fn undo(&mut self, _parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        Ok(())
    }
    fn put_back(&mut self, _state: &DeviceState) -> Result<(), DeviceLost> {
        Ok(())
    }
    fn requests_changed(&self, _before: &DeviceState, _after: &DeviceState) -> bool {
        false
    }
    fn memory(&mut self) -> Vec<(u64, u64)> {
        Vec::new()
    }
    fn freeze_interrupts(&mut self) {}
    fn withhold_interrupts(&mut self, withhold: bool) {
        self.interrupts = withhold;
    }
    fn keep_outside(&mut self) {
        self.outside = true;
    }
    fn show_outside(&mut self, _changes: OutsideChanges) {
        self.outside = false;
    }
    fn silence(&mut self) {
        self.silenced += 1;
    }
}

#[test]
fn a_reset_with_a_call_in_the_guest_lets_the_device_go() {
    let guest = Guest::start();
    let device = Arc::new(Link::default());
    guest
        .isolator
        .isolate(IsolateRequest {
            types: Some(no_types()),
            model: Some(KernelModel {
                harmless: vec!["kernel_waits".to_owned()],
                ..KernelModel::default()
            }),
            guest_only: vec!["kernel_schedule".to_owned()],
            policy: Box::new(ReturnErrors),
            device: Some(device.clone()),
            ..Guest::request("first")
        })
        .unwrap();
    guest.write(STAYS, 1);
    guest.order(WAITS);
    while guest.read(SCHEDULED) == 0 {
        std::thread::yield_now();
    }
    assert!(device.0.lock().unwrap().outside);
    guest
        .handle
        .with_paused(|_| guest.isolator.forget())
        .unwrap();
    assert!(!device.0.lock().unwrap().outside);
}

#[test]
fn the_device_of_a_stopped_driver_is_silenced_again_by_each_call() {
    let guest = Guest::start();
    let device = Arc::new(Link::default());
    let request = IsolateRequest {
        device: Some(device.clone()),
        ..Guest::request("first")
    };
    guest.isolator.isolate(request).unwrap();
    let silenced = || device.0.lock().unwrap().silenced;
    assert_eq!((guest.call(FIRST), silenced()), (1, 0));
    guest.isolator.stop("first").unwrap();
    assert_eq!(silenced(), 1);
    // Functions that are not isolated may have set it going in between.
    assert_eq!((guest.call(FIRST), silenced()), (ERROR, 2));
    assert_eq!((guest.call(FIRST), silenced()), (ERROR, 3));
    assert_eq!(guest.entry("first_counts").refused, 2);
}

/// Has the function rest at its second failure.
#[derive(Default)]
struct Rests(u32);

impl FaultPolicy for Rests {
    fn after_fault(&mut self, _call: &FailedCall<'_>) -> AfterFault {
        self.0 += 1;
        match self.0 {
            2 => AfterFault::Rest,
            _ => AfterFault::ReturnError,
        }
    }
}

#[test]
fn a_function_that_rests_is_not_run_and_its_device_is_silent_until_it_is_isolated_anew() {
    let guest = Guest::start();
    let device = Arc::new(Link::default());
    let request = || IsolateRequest {
        device: Some(device.clone()),
        policy: Box::new(Rests::default()),
        ..Guest::request("first")
    };
    guest.isolator.isolate(request()).unwrap();
    let silenced = || device.0.lock().unwrap().silenced;
    let inject = |code: &[u8]| guest.isolator.inject("first", "first_counts", 5, code);
    let before = inject(&UD2).unwrap();
    assert_eq!((guest.call(FIRST), silenced()), (ERROR, 0));
    assert_eq!((guest.call(FIRST), silenced()), (ERROR, 1));
    inject(&before).unwrap();
    assert_eq!((guest.call(FIRST), silenced()), (ERROR, 2));
    assert_eq!(guest.entry("first_counts").refused, 1);
    assert!(!guest.status("first").stopped);
    guest.isolator.release("first").unwrap();
    guest.isolator.isolate(request()).unwrap();
    assert_eq!((guest.call(FIRST), silenced()), (1, 2));
}

/// As the guest that spills, with a function that takes `kernel_waits` back, and a device.
fn taking_back(policy: Box<dyn FaultPolicy>, device: Arc<Link>) -> Guest {
    let guest = Guest::start();
    let waits = FunctionModel {
        name: "kernel_waits".to_owned(),
        undo: Some(OppositeModel {
            function: "kernel_undoes".to_owned(),
            arguments: Vec::new(),
        }),
        ..FunctionModel::default()
    };
    guest
        .isolator
        .isolate(IsolateRequest {
            types: Some(no_types()),
            model: Some(KernelModel {
                lasting: vec![waits],
                ..KernelModel::default()
            }),
            guest_only: vec!["kernel_schedule".to_owned()],
            policy,
            device: Some(device),
            ..Guest::request("first")
        })
        .unwrap();
    guest.write(FAILS, 1);
    guest
}

fn wait_until(what: impl Fn() -> bool) {
    while !what() {
        std::thread::yield_now();
    }
}

#[test]
fn a_reset_while_a_call_is_taken_back_lets_the_device_interrupt() {
    let device = Arc::new(Link::default());
    let guest = taking_back(Box::new(ReturnErrors), device.clone());
    let held = || *device.0.lock().unwrap();
    guest.write(UNDO_STAYS, 1);
    guest.order(WAITS);
    wait_until(|| guest.read(UNDONE) == 1);
    assert!(held().interrupts, "not while the driver is half back");
    guest
        .handle
        .with_paused(|_| guest.isolator.forget())
        .unwrap();
    assert_eq!(held(), Held::default());
    // Without a reset, as soon as it is back.
    let device = Arc::new(Link::default());
    let guest = taking_back(Box::new(ReturnErrors), device.clone());
    assert_eq!(guest.call(WAITS), ERROR);
    assert_eq!(guest.read(UNDONE), 1);
    assert_eq!(*device.0.lock().unwrap(), Held::default());
    assert_eq!(guest.entry("first_waits").undone, 1);
}

#[test]
fn a_call_whose_stack_is_gone_when_it_is_to_be_taken_back_is_not_said_to_be() {
    let policy = Retry::default();
    let guest = taking_back(Box::new(policy.clone()), Arc::default());
    // Its return address is the lowest word of the stack's last page: all that it does is on the
    // page below.
    let last_page = STACK_TOP - PAGE;
    guest
        .handle
        .with_paused(|vcpus| {
            let vcpu = vcpus.get(0).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            regs.rsp = last_page + 8;
            vcpu.set_regs(&regs).unwrap();
        })
        .unwrap();
    guest.write(STAYS, 1);
    guest.order(WAITS);
    wait_until(|| guest.read(SCHEDULED) == 1);
    guest
        .handle
        .with_paused(|_| guest.remap(last_page, |entry| entry & !1))
        .unwrap();
    guest.write(STAYS, 0);
    wait_until(|| guest.status("first").violations == 1);
    assert_eq!(guest.read(UNDONE), 0);
    let entry = guest.entry("first_waits");
    assert_eq!((entry.undone, entry.left_over, entry.retries), (0, 1, 0));
    let report = guest.isolator.reports("first").unwrap().pop().unwrap();
    assert!(report.violation.stays(), "{report}");
    assert!(report.stays.unwrap().contains("stack"));
    assert_eq!(policy.take(), [failed(1)]);
}

/// A device that cannot be held.
struct Lost;

impl Holdable for Lost {
    fn hold(&self, _with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        Err(DeviceLost("it is gone".to_owned()))
    }
}

/// Keeps whether what it is told of is the domain's own failure.
#[derive(Clone, Default)]
struct OfDomain(Arc<Mutex<Vec<bool>>>);

impl FaultPolicy for OfDomain {
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault {
        self.0.lock().unwrap().push(call.domain_failed());
        AfterFault::Retry
    }
}

#[test]
fn a_domain_that_fails_is_told_to_whoever_decides_and_the_guest_runs_its_calls() {
    let guest = Guest::start();
    let policy = OfDomain::default();
    guest
        .isolator
        .isolate(IsolateRequest {
            device: Some(Arc::new(Lost)),
            policy: Box::new(policy.clone()),
            ..Guest::request("first")
        })
        .unwrap();
    assert_eq!((guest.call(FIRST), guest.call(FIRST)), (1, 2));
    assert_eq!(*policy.0.lock().unwrap(), [true], "once, and not run again");
    let status = guest.status("first");
    assert!(status.broken.unwrap().contains("it is gone"));
    assert_eq!(status.violations, 1);
    guest.isolator.release("first").unwrap();
    assert_eq!(guest.call(FIRST), 3);
}
