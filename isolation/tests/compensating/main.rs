//! Calls that had gone on in the guest and then fail, of a hand-made guest, on the host's real KVM:
//! what is put back, and which kernel functions the guest is to call.

#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;
mod device;
mod ends;
mod limits;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::effects::{
    Effect, KernelCall, KernelEffects, Opposite, OppositeArgument, Pair, Success,
};
use isolation::domain::host_memory::HostMemory;
use isolation::domain::journal::{MAX_CALLS, Published, Stays};
use isolation::domain::transaction::{
    CallEnd, CallRequest, CallResult, PassThroughReason, SpilledCall,
};
use kvm_bindings::kvm_regs;
use std::time::Duration;

/// Kernel functions. `ALLOC` counts up and returns what it counted, `FREE` counts too, `WAITS`
/// calls the scheduler, the others do nothing.
const ALLOC: u64 = KERNEL_TEXT + 0x100;
const FREE: u64 = KERNEL_TEXT + 0x140;
const SWITCH_ON: u64 = KERNEL_TEXT + 0x180;
const SWITCH_OFF: u64 = KERNEL_TEXT + 0x1c0;
const WAITS: u64 = KERNEL_TEXT + 0x200;
const FOREVER: u64 = KERNEL_TEXT + 0x240;
const HARMLESS: u64 = KERNEL_TEXT + 0x280;
const UNKNOWN: u64 = KERNEL_TEXT + 0x2c0;
const SCHEDULER: u64 = KERNEL_TEXT + 0x300;
/// Nobody ends what the first begins.
const LOCK: u64 = KERNEL_TEXT + 0x340;
const UNLOCK: u64 = KERNEL_TEXT + 0x380;
const RETURN_GATE: u64 = DRIVER_TEXT + 2;
/// What `ALLOC` counts in, and `FREE`.
const ALLOCATED: u64 = KERNEL_DATA;
const FREED: u64 = KERNEL_DATA + 8;

fn effects() -> KernelEffects {
    let effect = |undo: Option<(u64, OppositeArgument)>| Effect {
        undo: undo.map(|(function, argument)| Opposite {
            function,
            arguments: vec![argument],
        }),
        deferred: false,
        success: Success::Always,
        changes: None,
        pair: None,
    };
    let own = OppositeArgument::Own(0);
    let lasting = [
        (ALLOC, effect(Some((FREE, OppositeArgument::Result)))),
        (
            FREE,
            Effect {
                deferred: true,
                ..effect(None)
            },
        ),
        (SWITCH_ON, effect(Some((SWITCH_OFF, own)))),
        (SWITCH_OFF, effect(Some((SWITCH_ON, own)))),
        (FOREVER, effect(None)),
        (
            LOCK,
            Effect {
                pair: Some(Pair::Begins),
                ..effect(Some((UNLOCK, own)))
            },
        ),
        (UNLOCK, effect(Some((LOCK, own)))),
    ];
    KernelEffects {
        lasting: lasting.into(),
        harmless: [WAITS, HARMLESS].into(),
        interrupts_off: [SWITCH_OFF].into(),
        ..KernelEffects::default()
    }
}

/// A step of the driver.
#[derive(Clone, Copy)]
enum Do {
    /// Calls a kernel function with this argument.
    Call(u64, u64),
    /// Stores a number at an offset in its data.
    Store(u64, u64),
    /// Stores to the device.
    Device(u64),
    /// Loads from the device, which makes what it did so far visible there.
    Load,
    /// Dereferences NULL.
    Fault,
    /// Calls a kernel function by a pointer.
    Indirect(u64),
}

struct Bench {
    guest: Guest,
    domain: Domain,
    kernel: Kernel,
    effects: KernelEffects,
}

impl Bench {
    fn new(steps: &[Do]) -> Self {
        Self::with(steps, |_| {})
    }

    /// With more code in the guest.
    fn with(steps: &[Do], more: impl FnOnce(&Guest)) -> Self {
        Self::in_guest(Guest::new(), steps, more)
    }

    fn in_guest(guest: Guest, steps: &[Do], more: impl FnOnce(&Guest)) -> Self {
        more(&guest);
        for (function, counter) in [(ALLOC, ALLOCATED), (FREE, FREED)] {
            guest.code(function, |a| {
                a.mov(rcx, counter).unwrap();
                a.inc(qword_ptr(rcx)).unwrap();
                a.mov(rax, qword_ptr(rcx)).unwrap();
                a.ret().unwrap();
            });
        }
        let others = [SWITCH_ON, SWITCH_OFF, FOREVER, HARMLESS, UNKNOWN, SCHEDULER];
        for function in others.into_iter().chain([LOCK, UNLOCK]) {
            guest.code(function, |a| a.ret().unwrap());
        }
        guest.code(WAITS, |a| {
            a.call(SCHEDULER).unwrap();
            a.ret().unwrap();
        });
        let mut code = CodeAssembler::new(64).unwrap();
        for step in steps {
            match *step {
                Do::Call(function, argument) => {
                    code.mov(rdi, argument).unwrap();
                    // In use by the driver, as far as the kernel function is concerned.
                    code.mov(r11, 0x1111u64).unwrap();
                    code.call(function).unwrap();
                }
                Do::Store(offset, number) => {
                    code.mov(rcx, DRIVER_DATA + offset).unwrap();
                    code.mov(rdx, number).unwrap();
                    code.mov(qword_ptr(rcx), rdx).unwrap();
                }
                Do::Device(number) => {
                    code.mov(rcx, DEVICE).unwrap();
                    code.mov(rdx, number).unwrap();
                    code.mov(dword_ptr(rcx), edx).unwrap();
                }
                Do::Load => {
                    code.mov(rcx, DEVICE).unwrap();
                    code.mov(ecx, dword_ptr(rcx)).unwrap();
                }
                Do::Fault => {
                    code.xor(eax, eax).unwrap();
                    code.mov(rax, qword_ptr(rax)).unwrap();
                }
                Do::Indirect(function) => {
                    code.mov(rax, function).unwrap();
                    code.call(rax).unwrap();
                }
            }
        }
        code.mov(eax, 7).unwrap();
        code.ret().unwrap();
        let bytes = code.assemble(DRIVER_TEXT).unwrap();
        guest.code(DRIVER_TEXT, |a| a.db(&bytes).unwrap());
        let mut domain = guest.domain();
        let mut decoder =
            iced_x86::Decoder::with_ip(64, &bytes, DRIVER_TEXT, iced_x86::DecoderOptions::NONE);
        for instruction in &mut decoder {
            if instruction.is_call_near() {
                domain
                    .redirect(instruction.ip(), instruction.near_branch_target())
                    .unwrap();
            }
        }
        domain.trap_function(SCHEDULER).unwrap();
        let kernel = Kernel {
            memory: Some(guest.memory.clone()),
            ..Kernel::with_data()
        };
        Self {
            guest,
            domain,
            kernel,
            effects: effects(),
        }
    }

    /// Redirects the direct calls of the driver.
    fn redirect_calls(&mut self) {
        let words = (0..16).map(|word| self.guest.read(DRIVER_TEXT + word * 8));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let decoder =
            iced_x86::Decoder::with_ip(64, &bytes, DRIVER_TEXT, iced_x86::DecoderOptions::NONE);
        for call in decoder
            .into_iter()
            .filter(iced_x86::Instruction::is_call_near)
        {
            self.domain
                .redirect(call.ip(), call.near_branch_target())
                .unwrap();
        }
    }

    fn request<'a>(
        guest: &'a Guest,
        effects: &'a KernelEffects,
        regs: kvm_regs,
    ) -> CallRequest<'a> {
        CallRequest {
            regs,
            sregs: &guest.sregs,
            stack: guest.stack_around(regs.rsp),
            clock: None,
            vcpu: 0,
            function: DRIVER_TEXT,
            return_gate: Some(RETURN_GATE),
            effects: Some(effects),
            budget: Duration::from_secs(300),
            sleep_limit: Duration::ZERO,
        }
    }

    fn begin(&mut self) -> CallResult {
        let request = Self::request(&self.guest, &self.effects, self.guest.entry_regs());
        self.domain.call(&request, &mut self.kernel).unwrap()
    }

    /// The kernel function that went on in the guest returns `value` there.
    fn go_on(&mut self, before: &CallResult, value: u64) -> CallResult {
        let mut call = spilled(before).clone();
        let regs = kvm_regs {
            rax: value,
            rip: RETURN_GATE + 2,
            rsp: call.returns_with(),
            ..before.regs
        };
        let request = Self::request(&self.guest, &self.effects, regs);
        self.domain
            .go_on(&mut call, &request, &mut self.kernel)
            .unwrap()
    }

    /// Runs the call to its end, the kernel functions that go on in the guest returning 0.
    fn run(&mut self) -> CallResult {
        let mut result = self.begin();
        while let CallEnd::Spilled(..) = result.end {
            result = self.go_on(&result, 0);
        }
        result
    }

    fn data(&self, offset: u64) -> u64 {
        self.guest.read(DRIVER_DATA + offset)
    }
}

fn spilled(result: &CallResult) -> &SpilledCall {
    match &result.end {
        CallEnd::Spilled(_, call) => call,
        other => panic!("expected a spilled call, got {other:?}"),
    }
}

fn published(result: &CallResult) -> &Published {
    violation(result).published.as_ref().unwrap()
}

fn calls(result: &CallResult) -> Vec<(u64, u64)> {
    let calls = result.kernel_calls.iter();
    calls
        .map(|call: &KernelCall| (call.function, call.arguments[0]))
        .collect()
}

const WAIT: Do = Do::Call(WAITS, 0);

#[test]
fn a_failed_call_is_taken_back_to_its_beginning_in_reverse_order() {
    let mut bench = Bench::new(&[
        Do::Call(ALLOC, 0),
        Do::Store(0, 11),
        Do::Call(SWITCH_ON, 5),
        WAIT,
        Do::Store(0, 12),
        Do::Store(64, 13),
        Do::Call(ALLOC, 0),
        WAIT,
        // Never in the guest: nothing of it is to be taken back.
        Do::Store(128, 14),
        Do::Call(ALLOC, 0),
        Do::Fault,
    ]);
    bench.guest.write(DRIVER_DATA, 10);
    let regs = bench.guest.entry_regs();
    let result = bench.begin();
    assert_eq!((bench.data(0), bench.guest.read(ALLOCATED)), (11, 1));
    let result = bench.go_on(&result, 0);
    assert_eq!((bench.data(0), bench.guest.read(ALLOCATED)), (12, 2));
    let end = bench.go_on(&result, 0);
    assert_eq!(violation(&end).spills, 2);
    assert_eq!([0, 64, 128].map(|at| bench.data(at)), [10, 0, 0]);
    assert_eq!(calls(&end), [(FREE, 2), (SWITCH_OFF, 5), (FREE, 1)]);
    // What the kernel counted is for those functions to put back.
    assert_eq!(bench.guest.read(ALLOCATED), 2);
    let Published::Undone { kernel_calls, .. } = published(&end) else {
        panic!("{end:?}")
    };
    assert_eq!(*kernel_calls, 3);
    assert_eq!((end.regs.rip, end.regs.rsp), (CALLER, regs.rsp + 8));
    assert_eq!((end.regs.rbx, end.regs.r15), (0xb0b0, 15));
}

#[test]
fn the_same_domain_carries_out_calls_as_before_afterwards() {
    let steps = [
        Do::Call(ALLOC, 0),
        WAIT,
        Do::Store(0, 12),
        Do::Call(FREE, 9),
    ];
    let mut bench = Bench::new(&steps);
    for time in 1..4 {
        let end = bench.run();
        assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
        assert_eq!(end.regs.rax, 7);
        assert_eq!(bench.guest.read(ALLOCATED), time);
        assert_eq!(calls(&end), [(FREE, 9)]);
        assert_eq!(bench.guest.read(FREED), 0, "the guest's to do");
    }
}

#[test]
fn what_others_wrote_meanwhile_stays() {
    let mut bench = Bench::new(&[Do::Store(0, 11), Do::Store(8, 12), WAIT, Do::Fault]);
    let result = bench.begin();
    bench.guest.write(DRIVER_DATA + 8, 99);
    bench.guest.write(DRIVER_DATA + 16, 98);
    let end = bench.go_on(&result, 0);
    assert_eq!([0, 8, 16].map(|at| bench.data(at)), [0, 99, 98]);
    assert_eq!(
        *published(&end),
        Published::Undone {
            bytes: 1,
            kernel_calls: 0
        }
    );
}

#[test]
fn what_kernel_functions_keep_is_not_put_back_byte_by_byte() {
    let mut bench = Bench::new(&[Do::Store(0, 11), Do::Store(8, 12), WAIT, Do::Fault]);
    bench.kernel.kernels = vec![(DRIVER_DATA + 8, 8)];
    bench.run();
    assert_eq!([0, 8].map(|at| bench.data(at)), [0, 12]);
}

#[test]
fn what_a_kernel_function_returns_in_the_guest_is_what_it_is_taken_back_with() {
    let mut bench = Bench::new(&[Do::Call(ALLOC, 0), Do::Fault]);
    bench.domain.trap_function(ALLOC).unwrap();
    let result = bench.begin();
    assert_eq!(result.regs.rip, ALLOC);
    // The part after it is dropped, but what it did in the guest is done.
    let end = bench.go_on(&result, 0x8000);
    assert_eq!(calls(&end), [(FREE, 0x8000)]);
}

#[test]
fn things_are_given_back_only_when_the_call_has_ended_well() {
    let steps = [Do::Call(FREE, 1), WAIT, Do::Call(FREE, 2)];
    let mut bench = Bench::new(&steps);
    let end = bench.run();
    assert!(matches!(end.end, CallEnd::Committed), "{end:?}");
    assert_eq!(calls(&end), [(FREE, 1), (FREE, 2)]);
    let mut bench = Bench::new(&[&steps[..], &[Do::Fault]].concat());
    let end = bench.run();
    assert_eq!(calls(&end), []);
    assert_eq!(bench.guest.read(FREED), 0);
    assert!(!violation(&end).stays());
}

#[test]
fn a_domain_that_fails_leaves_an_open_call_as_it_came_back_and_gives_it_to_the_guest() {
    let before = [Do::Store(0, 1), Do::Call(FREE, 1), Do::Call(ALLOC, 0), WAIT];
    let after = [
        Do::Store(0, 2),
        Do::Device(1),
        Do::Load,
        Do::Call(FREE, 2),
        Do::Indirect(HARMLESS),
    ];
    let mut bench = Bench::new(&[&before[..], &after[..]].concat());
    bench.kernel.kernel_functions.insert(HARMLESS);
    let result = bench.begin();
    use_up_trampolines(&mut bench.domain);
    let there = bench.guest.all();
    let mut call = spilled(&result).clone();
    let regs = kvm_regs {
        rip: RETURN_GATE + 2,
        rsp: call.returns_with(),
        ..result.regs
    };
    let request = Bench::request(&bench.guest, &bench.effects, regs);
    let failed = bench.domain.go_on(&mut call, &request, &mut bench.kernel);
    assert!(failed.is_err(), "{failed:?}");
    assert!(bench.guest.all() == there);
    assert_eq!((bench.kernel.checkpoints, bench.kernel.restores), (1, 1));
    // The guest goes on behind the call of WAITS, and gives back what the call could not any more.
    let next = bench.domain.hand_over(&call);
    let mut code = [0; 5];
    bench.domain.code(next - 5, &mut code).unwrap();
    assert!(
        (DRIVER_TEXT..DRIVER_TEXT + PAGE).contains(&next) && code[0] == 0xe8,
        "{next:#x}"
    );
    let deferred = call.take_deferred();
    let deferred: Vec<_> = deferred
        .iter()
        .map(|call| (call.function, call.arguments[0]))
        .collect();
    assert_eq!(deferred, [(FREE, 1)]);
}

#[test]
fn a_lock_that_was_released_is_not_released_again() {
    let mut bench = Bench::new(&[
        Do::Call(SWITCH_ON, 5),
        Do::Call(SWITCH_ON, 6),
        WAIT,
        Do::Call(SWITCH_OFF, 5),
        WAIT,
        // Released in the part that is dropped: still held.
        Do::Call(SWITCH_OFF, 6),
        Do::Fault,
    ]);
    let end = bench.run();
    assert_eq!(calls(&end), [(SWITCH_OFF, 6)]);
}

#[test]
fn a_call_that_cannot_be_taken_back_stays_as_it_is_and_says_why() {
    let first = [Do::Store(0, 11), Do::Call(FREE, 3), Do::Call(ALLOC, 0)];
    let stays = |then: Do, kernel: Kernel| {
        let mut bench = Bench::new(&[&first[..], &[then, WAIT, Do::Fault]].concat());
        bench.kernel = kernel;
        let end = bench.run();
        assert_eq!(bench.data(0), 11);
        // What the driver let go of is nobody's any more.
        assert_eq!(calls(&end), [(FREE, 3)]);
        match published(&end) {
            Published::Stays(stays) => stays.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        stays(Do::Call(FOREVER, 1), Kernel::with_data()),
        Stays::Irrevocable { function: FOREVER }
    );
    assert_eq!(
        stays(Do::Call(UNKNOWN, 1), Kernel::with_data()),
        Stays::Unknown { function: UNKNOWN }
    );
    let in_use = Kernel {
        device_is_in_use: true,
        ..Kernel::with_data()
    };
    assert!(matches!(stays(Do::Device(1), in_use), Stays::Device { .. }));
}
