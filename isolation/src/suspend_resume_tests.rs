//! The calls of a driver's functions, on a make-believe guest: what each vCPU that comes to the
//! gate goes on with.

use crate::guest::btf::encode::Encoder;
use crate::guest::gate::FTRACE_NOP;
use crate::guest::paging::Levels;
use crate::guest::paging::testing::TestGuest;
use crate::guest::symbols::{Line, SymbolTableBuilder};
use devices::dma::GuestMemory;

use super::*;

const STORE_AT: u64 = 0xffff_ffff_8180_0000;
const DEVICE: u64 = 0xffff_8880_0000_0100;
const DRIVER: u64 = 0xffff_8880_0000_0200;
const OPERATIONS: u64 = 0xffff_8880_0000_0300;
const BUFFER: u64 = 0xffff_8880_0000_0400;
const STACK: u64 = 0xffff_c900_0000_0ff8;
const CALLER: u64 = 0xffff_ffff_8190_0000;
const SUSPEND: u64 = 0xffff_ffff_c000_1000;
const RESUME: u64 = 0xffff_ffff_c000_1100;
const BOTH: DriverCalls = DriverCalls::SuspendAndResume;
const WORD: &[u8] = b"cofferdam-1f";

struct World {
    memory: GuestMemory,
    space: crate::guest::paging::AddressSpace,
    symbols: SymbolTable,
    types: Btf,
}

impl World {
    /// A device whose driver's functions are these.
    fn new(suspend: u64, resume: u64) -> Self {
        let mut guest = TestGuest::new(Levels::Four);
        guest.put(Gva(STORE_AT), &FTRACE_NOP, 3);
        guest.put(Gva(DEVICE + 0x10), &DRIVER.to_le_bytes(), 3);
        guest.put(Gva(DRIVER + 0x20), &OPERATIONS.to_le_bytes(), 3);
        guest.put(Gva(OPERATIONS), &suspend.to_le_bytes(), 3);
        guest.put(Gva(OPERATIONS + 8), &resume.to_le_bytes(), 3);
        guest.put(Gva(BUFFER), WORD, 3);
        guest.put(Gva(STACK), &CALLER.to_le_bytes(), 3);
        let ranges = [
            (GuestAddress(0), 4 << 20),
            (GuestAddress(0x4000_0000), 1 << 20),
        ];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        for (page, bytes) in &guest.memory.pages {
            memory
                .write_slice(&bytes[..], GuestAddress(page << 12))
                .unwrap();
        }
        let mut symbols = SymbolTableBuilder::default();
        for (address, name, module) in [
            (STORE_AT, STORE, None),
            (SUSPEND, "nic_suspend", Some("nic")),
            (RESUME, "nic_resume", Some("nic")),
        ] {
            let line = Line {
                address,
                kind: 't',
                name,
                module,
            };
            symbols.add(&line).unwrap();
        }
        let mut types = Encoder::new(None);
        let word = types.int("long unsigned int", 8, 0);
        types.structure("device", 0x40, &[("driver", word, 0x10)]);
        types.structure("device_driver", 0x40, &[("pm", word, 0x20)]);
        types.structure(
            "dev_pm_ops",
            0x40,
            &[("suspend", word, 0), ("resume", word, 8)],
        );
        Self {
            memory,
            space: guest.space,
            symbols: symbols.finish(),
            types: Btf::parse(&types.bytes(), None).unwrap(),
        }
    }

    fn virt(&self) -> VirtMemory<'_, GuestMemory> {
        VirtMemory {
            space: self.space,
            memory: &self.memory,
        }
    }

    fn arm(&self) -> SuspendResume {
        let (types, symbols) = (&self.types, &self.symbols);
        SuspendResume::arm(BOTH, ("nic", WORD), types, symbols, &self.virt(), 46).unwrap()
    }

    fn arm_for(&self, calls: DriverCalls) -> SuspendResume {
        SuspendResume {
            calls,
            ..self.arm()
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let virt = self.virt();
        let gpa = virt.space.walk(virt.memory, Gva(at)).unwrap().gpa.0;
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn text(&self) -> [u8; GATE_BYTES] {
        let mut text = [0; GATE_BYTES];
        self.virt().read(Gva(STORE_AT), &mut text).unwrap();
        text
    }
}

/// The agent's write.
fn entry() -> kvm_regs {
    kvm_regs {
        rip: STORE_AT + 2,
        rsp: STACK,
        rdi: DEVICE,
        rdx: BUFFER,
        rcx: WORD.len() as u64,
        rbx: 0x77,
        ..kvm_regs::default()
    }
}

/// A function of the driver has returned `rax` to the gate.
fn back(called: &kvm_regs, rax: u64) -> kvm_regs {
    kvm_regs {
        rip: STORE_AT + 4,
        rsp: called.rsp + 8,
        rax,
        rdi: 0xdead,
        ..*called
    }
}

#[test]
fn suspend_and_resume_are_called_one_after_the_other_and_the_write_is_done() {
    let world = World::new(SUSPEND, RESUME);
    let mut calls = world.arm();
    assert_eq!(world.text(), GATE.bytes());
    let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    assert_eq!((first.rip, first.rdi), (SUSPEND, DEVICE));
    // As behind any call: eight bytes off a multiple of 16, with the return address on top.
    assert_eq!(first.rsp % 16, STACK % 16);
    assert_eq!(world.virt().read_u64(Gva(first.rsp)).unwrap(), STORE_AT + 2);
    let second = calls
        .step(STORE_AT + 2, &back(&first, 0), &world.virt())
        .unwrap();
    assert_eq!(
        (second.rip, second.rdi, second.rsp),
        (RESUME, DEVICE, first.rsp)
    );
    let done = calls
        .step(STORE_AT + 2, &back(&second, 0), &world.virt())
        .unwrap();
    assert_eq!((done.rip, done.rsp), (CALLER, STACK + 8));
    assert_eq!((done.rax, done.rbx), (WORD.len() as u64, 0x77));
    assert!(calls.disarm(&world.memory).unwrap().is_ok());
    assert_eq!(world.text(), FTRACE_NOP);
}

#[test]
fn a_gate_goes_behind_what_indirect_branches_land_on() {
    let world = World::new(SUSPEND, RESUME);
    let code = [&[0xf3, 0x0f, 0x1e, 0xfa][..], &FTRACE_NOP].concat();
    world.put(STORE_AT, &code);
    let mut calls = world.arm();
    assert!(calls.step(STORE_AT, &entry(), &world.virt()).is_none());
    let entry = kvm_regs {
        rip: STORE_AT + 6,
        ..entry()
    };
    let first = calls.step(STORE_AT + 4, &entry, &world.virt()).unwrap();
    assert_eq!(first.rip, SUSPEND);
    assert_eq!(world.virt().read_u64(Gva(first.rsp)).unwrap(), STORE_AT + 6);
}

#[test]
fn either_function_is_called_alone() {
    for (which, function, name) in [
        (DriverCalls::Suspend, SUSPEND, "suspend"),
        (DriverCalls::Resume, RESUME, "resume"),
    ] {
        let world = World::new(SUSPEND, RESUME);
        let mut calls = world.arm_for(which);
        let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
        assert_eq!((first.rip, first.rdi), (function, DEVICE));
        assert_eq!(calls.out(), SuspendError::NotBack(name));
        let done = calls
            .step(STORE_AT + 2, &back(&first, 0), &world.virt())
            .unwrap();
        assert_eq!((done.rip, done.rsp), (CALLER, STACK + 8));
        assert!(calls.disarm(&world.memory).unwrap().is_ok());
        let mut calls = world.arm_for(which);
        let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
        let failed = back(&first, 0xffff_fffb);
        calls.step(STORE_AT + 2, &failed, &world.virt()).unwrap();
        let result = calls.disarm(&world.memory).unwrap();
        assert_eq!(result, Err(SuspendError::Failed(name, -5)));
    }
}

#[test]
fn the_writes_of_others_are_what_they_were() {
    let world = World::new(SUSPEND, RESUME);
    let mut calls = world.arm();
    for other in [
        kvm_regs { rcx: 2, ..entry() },
        kvm_regs {
            rdx: DRIVER,
            ..entry()
        },
        kvm_regs {
            rdx: 0x1000,
            ..entry()
        },
    ] {
        let next = calls.step(STORE_AT, &other, &world.virt()).unwrap();
        assert_eq!(next.rip, STORE_AT + GATE_BYTES as u64);
        assert_eq!(
            kvm_regs {
                rip: other.rip,
                ..next
            },
            other
        );
    }
    // Once is enough, and who comes back from elsewhere is not ours.
    let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    let again = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    assert_eq!(again.rip, STORE_AT + GATE_BYTES as u64);
    let stray = kvm_regs {
        rsp: STACK,
        ..back(&first, 0)
    };
    assert_eq!(calls.step(STORE_AT + 2, &stray, &world.virt()), None);
    assert_eq!(calls.step(CALLER, &entry(), &world.virt()), None);
}

#[test]
fn a_function_that_fails_ends_it() {
    let world = World::new(SUSPEND, RESUME);
    let mut calls = world.arm();
    let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    let failed = back(&first, 0xffff_fffb);
    let done = calls.step(STORE_AT + 2, &failed, &world.virt()).unwrap();
    assert_eq!((done.rip, done.rsp), (CALLER, STACK + 8));
    let result = calls.disarm(&world.memory).unwrap();
    assert_eq!(result, Err(SuspendError::Failed("suspend", -5)));
}

#[test]
fn nothing_but_functions_of_the_driver_is_called() {
    for (suspend, resume) in [
        (0, 0),
        (SUSPEND, 0),
        (SUSPEND + 1, RESUME),
        (SUSPEND, CALLER),
    ] {
        let world = World::new(suspend, resume);
        let mut calls = world.arm();
        let done = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
        assert_eq!((done.rip, done.rsp), (CALLER, STACK + 8));
        let result = calls.disarm(&world.memory).unwrap();
        assert_eq!(result, Err(SuspendError::NoFunctions));
    }
}

#[test]
fn a_gate_to_which_somebody_has_to_return_stays() {
    let world = World::new(SUSPEND, RESUME);
    let mut calls = world.arm();
    let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    let mut calls = calls.disarm(&world.memory).unwrap_err();
    assert_eq!(calls.out(), SuspendError::NotBack("suspend"));
    assert_eq!(world.text(), GATE.bytes());
    let second = calls
        .step(STORE_AT + 2, &back(&first, 0), &world.virt())
        .unwrap();
    assert_eq!(calls.out(), SuspendError::NotBack("resume"));
    calls
        .step(STORE_AT + 2, &back(&second, 0), &world.virt())
        .unwrap();
    assert!(calls.disarm(&world.memory).unwrap().is_ok());
    let nobody = world.arm().disarm(&world.memory).unwrap();
    assert_eq!(nobody, Err(SuspendError::NotReached));
}

#[test]
fn a_kernel_that_is_not_as_expected_is_left_alone() {
    let world = World::new(SUSPEND, RESUME);
    let (memory, symbols) = (&world.memory, SymbolTableBuilder::default().finish());
    let none = SuspendResume::arm(
        BOTH,
        ("nic", WORD),
        &world.types,
        &symbols,
        &world.virt(),
        46,
    );
    assert_eq!(none.unwrap_err(), SuspendError::NoGate);
    let empty = Btf::parse(&Encoder::new(None).bytes(), None).unwrap();
    let none = SuspendResume::arm(
        BOTH,
        ("nic", WORD),
        &empty,
        &world.symbols,
        &world.virt(),
        46,
    );
    assert_eq!(none.unwrap_err(), SuspendError::NoGate);
    let at = world.space.walk(memory, Gva(STORE_AT)).unwrap().gpa;
    memory.write_slice(&[0xcc], at).unwrap();
    let none = SuspendResume::arm(
        BOTH,
        ("nic", WORD),
        &world.types,
        &world.symbols,
        &world.virt(),
        46,
    );
    assert_eq!(none.unwrap_err(), SuspendError::NoGate);
    assert_eq!(world.text()[1..], FTRACE_NOP[1..]);
}

/// Its caller gave it up while its function was out, which has returned since.
#[test]
fn an_earlier_one_that_is_over_is_in_nobodys_way_and_one_that_is_out_is() {
    let world = World::new(SUSPEND, RESUME);
    let mut earlier = None;
    SuspendResume::end_earlier(&mut earlier, &world.memory).unwrap();
    let mut calls = world.arm_for(DriverCalls::Suspend);
    let first = calls.step(STORE_AT, &entry(), &world.virt()).unwrap();
    earlier = Some(calls);
    let busy = SuspendResume::end_earlier(&mut earlier, &world.memory);
    assert_eq!(busy, Err(SuspendError::Busy));
    assert_eq!(world.text(), GATE.bytes());
    let out = earlier.as_mut().unwrap();
    out.step(STORE_AT + 2, &back(&first, 0), &world.virt());
    SuspendResume::end_earlier(&mut earlier, &world.memory).unwrap();
    assert!(earlier.is_none());
    assert_eq!(world.text(), FTRACE_NOP);
}
