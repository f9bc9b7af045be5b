//! One run of a call in the domain, or of what is left of one that comes back from the guest, step
//! by step.
//!
//! ```text
//!   fault put in ─► policy told ─► device held ─► Domain::carry_out ─► counted ─┬─ committed, aborted: what the guest calls then
//!                                                                               ├─ goes on in the guest: kept
//!                                                                               └─ passes through, domain broken: the guest's
//! ```

use std::time::Instant;

use devices::clock::monotonic_ns;
use devices::dma::GuestMemory;
use devices::hold::{DeviceLost, HeldDevice, Holdable, OutsideChanges};
use kvm_bindings::kvm_regs;

use crate::compensation::guest_calls::{Failure, GuestCalls};
use crate::dispatch::armed::{
    Armed, AtGate, OpenCall, RETURN_GATE_OFFSET, arguments, may_be_taken_back,
};
use crate::dispatch::call_trace;
use crate::dispatch::failed::Failed;
use crate::dispatch::platform::Platform;
use crate::dispatch::supervisor::{CallPolicy, CallSupervisor, KeepsFaults, Knowledge};
use crate::domain::Domain;
use crate::domain::attempt::Attempt;
use crate::domain::error::DomainError;
use crate::domain::recorder::{Ended, Happened};
use crate::domain::transaction::{
    CallEnd, CallRequest, CallResult, PassThroughReason, SpilledCall,
};
use crate::domain::violation::{Violation, ViolationKind};
use crate::fault_image::Kept;
use crate::guest::addr::Gva;
use crate::guest::paging::VirtMemory;
use crate::guest::stack::stack_around;
use crate::policy::call::{CallMemory, MemoryBefore, STACK_ARGUMENTS};

/// Most calls that are in the guest at once; further ones that would have to go on there pass
/// through. Each has a stack of its own, and no honest guest has as many in one driver.
const MAX_OPEN: usize = 4096;

/// What is being run.
struct Run<'a> {
    gate: u64,
    attempt: Attempt,
    /// Registers at the entry of the call.
    entry: kvm_regs,
    /// It comes back from the guest.
    comes_back: bool,
    at: &'a AtGate<'a>,
}

/// What the domain made of it.
struct Done {
    result: Result<CallResult, DomainError>,
    device_lost: Option<DeviceLost>,
    /// What became of the image of its fault.
    image: Option<Kept>,
}

impl Armed {
    /// Runs a call, or what is left of one, in the domain. `None` if the guest must run it itself.
    pub(super) fn run(
        &mut self,
        gate: u64,
        spilled: Option<&mut SpilledCall>,
        attempt: Attempt,
        at: &AtGate<'_>,
    ) -> Option<kvm_regs> {
        let start = Instant::now();
        let run = Run {
            gate,
            attempt,
            entry: spilled.as_ref().map_or(at.regs, |call| *call.entry()),
            comes_back: spilled.is_some(),
            at,
        };
        self.begin_trace(gate, (attempt, run.comes_back), at);
        self.put_fault_in(&run);
        let Done {
            result,
            device_lost,
            image,
        } = self.carry_out(&run, spilled)?;
        self.trace_result(&result);
        let failed = matches!(&result, Ok(result) if matches!(result.end, CallEnd::Aborted(_)));
        if failed {
            self.timers.failed(gate);
        }
        let next = match result {
            Ok(result) => {
                if let Some(known) = self.gates.get_mut(&gate) {
                    known.count(&result, run.comes_back, start.elapsed(), at.holding);
                }
                self.ended(&run, result, device_lost, image)
            }
            Err(error) => {
                self.domain_failed(gate, run.entry, &error, device_lost);
                None
            }
        };
        self.take_fault_out(&run, failed);
        next
    }

    fn put_fault_in(&mut self, run: &Run<'_>) {
        if let Some(gate) = self.gates.get(&run.gate) {
            let (name, cr3) = (&gate.entry.name, run.at.sregs.cr3);
            let begun = self
                .faults
                .begin(name, run.comes_back, cr3, &mut self.domain);
            if let Err(error) = begun {
                tracing::error!("a fault cannot be put into {name}: {error}");
            }
        }
    }

    fn take_fault_out(&mut self, run: &Run<'_>, failed: bool) {
        let Some(gate) = self.gates.get(&run.gate) else {
            return;
        };
        let ended = self.faults.end(&gate.entry.name, failed, &mut self.domain);
        if let Err(error) = ended {
            self.domain_failed(run.gate, run.entry, &error, None);
        }
    }

    /// Has the domain carry it out with the device held, and tells the policy. `None` if the device
    /// could not be held.
    fn carry_out(&mut self, run: &Run<'_>, spilled: Option<&mut SpilledCall>) -> Option<Done> {
        let at = run.at;
        let space = self.space(&at.sregs);
        let gate = self.gates.get(&run.gate)?;
        let others_open = may_be_taken_back(&self.open.spilled);
        let (private, shared) = self.domain.memories();
        let virt = VirtMemory {
            space,
            memory: &shared,
        };
        let stack = stack_around(virt, Gva(run.entry.rsp));
        let request = CallRequest {
            regs: at.regs,
            sregs: &at.sregs,
            clock: Some(at.vcpu),
            vcpu: at.index,
            stack,
            function: gate.body,
            return_gate: (self.open.spilled.len() < MAX_OPEN)
                .then_some(run.gate + RETURN_GATE_OFFSET),
            effects: self.guest.effects.as_ref(),
            budget: self.limits.budget.saturating_sub(run.attempt.spent),
            sleep_limit: self.limits.sleep_limit,
        };
        if let Some(policy) = &mut self.policy {
            policy.begin(&gate.entry.name, arguments(&run.entry));
            policy.has_on_stack(on_stack(virt, run.entry.rsp));
        }
        let policy = self.policy.as_mut().map(|policy| CallPolicy {
            policy,
            memory: CallMemory {
                private: VirtMemory {
                    space,
                    memory: &private,
                },
                before: MemoryBefore::new(&shared),
                stack: Some(stack),
                per_cpu_base: at.sregs.gs.base,
            },
        });
        let in_domain = InDomain {
            domain: &mut self.domain,
            knowledge: &self.guest.knowledge,
            policy,
            platform: Platform::new(at.vm, at.vcpu).with_ports(at.ports),
            request: &request,
            spilled,
            keeps: self.failures.keeper.as_ref().map(|keeper| KeepsFaults {
                keeper,
                entry: &gate.entry.name,
            }),
        };
        let device = self.device.holdable.as_deref();
        let (done, left) = with_device_held(device, in_domain, run.comes_back, others_open);
        if let Some(left) = left {
            self.domain.recorder.note(|| Happened::DeviceReleased);
            self.device.withholding |= left.withheld;
            self.device.outside_kept = left.outside_kept;
        } else if device.is_some() {
            // It could not be held.
            let recorder = &mut self.domain.recorder;
            recorder.note(|| Happened::Ended(Ended::DomainFailed));
        }
        let stays = |end: &CallEnd| matches!(end, CallEnd::Committed | CallEnd::Spilled(..));
        if let Some(policy) = &mut self.policy {
            policy
                .end(matches!(&done, Some(Done { result: Ok(result), .. }) if stays(&result.end)));
        }
        done
    }

    /// What the guest's vCPU goes on with after a run. `None` if the guest must run the call
    /// itself.
    fn ended(
        &mut self,
        run: &Run<'_>,
        result: CallResult,
        device_lost: Option<DeviceLost>,
        image: Option<Kept>,
    ) -> Option<kvm_regs> {
        let CallResult {
            end,
            regs,
            time,
            phases,
            kernel_calls,
            handed_over,
            later,
            kept,
            lists,
            ..
        } = result;
        let (ended, ended_ns) = (Instant::now(), monotonic_ns());
        let failure = match end {
            CallEnd::PassThrough(_) => return None,
            CallEnd::Spilled(reason, call) => {
                return Some(self.goes_on_in_the_guest(run, reason, call, regs));
            }
            CallEnd::Committed => None,
            CallEnd::Aborted(violation) => {
                let mut failed = self.found(run, *violation);
                let took = phases.detect_ns + phases.keep_ns + phases.memory_ns + phases.device_ns;
                failed.at_ns = ended_ns.saturating_sub(took);
                failed.phases = phases;
                failed.image = image;
                failed.device_lost = device_lost
                    .map(|lost| lost.to_string())
                    .or_else(|| asleep(self.device.holdable.as_deref(), &failed.violation));
                self.trace_violation(&failed);
                Some(Failure {
                    failed,
                    attempt: run.attempt.after(time.own),
                    entry: run.entry,
                    ended,
                    unheard: self.is_unheard(run),
                    lists,
                })
            }
        };
        let gate = self.gates.get(&run.gate)?;
        let finally = match &failure {
            Some(_) => kvm_regs {
                rax: gate.aborted.value.rax(&arguments(&run.entry)),
                ..regs
            },
            None => regs,
        };
        let in_its_place = !handed_over.is_empty();
        let mut calls = handed_over;
        calls.extend(kernel_calls);
        let calls = self.and_let_packets_pass(calls);
        let mut calls = GuestCalls::new(run.gate, calls, finally, failure).keeping(kept);
        if in_its_place {
            calls = calls.in_its_place(later);
        }
        if run.comes_back && calls.failure.is_some() {
            calls = calls.below(run.at.regs.rsp);
        }
        Some(self.run_guest_calls(calls, run.at))
    }

    /// Whether the caller of a call goes on whatever it returns.
    fn is_unheard(&self, run: &Run<'_>) -> bool {
        let memory = self.domain.memories().1;
        let virt = VirtMemory {
            space: self.space(&run.at.sregs),
            memory: &memory,
        };
        let policy = self.policy.as_ref();
        policy.is_some_and(|policy| policy.is_unheard(virt, run.gate, &arguments(&run.entry)))
    }

    /// Keeps a call that goes on in the guest with these registers, until it comes back.
    fn goes_on_in_the_guest(
        &mut self,
        run: &Run<'_>,
        reason: PassThroughReason,
        call: Box<SpilledCall>,
        regs: kvm_regs,
    ) -> kvm_regs {
        if let Some(gate) = self.gates.get(&run.gate) {
            tracing::debug!(
                "{} goes on in the guest at {}: {}",
                gate.entry.name,
                self.guest.knowledge.symbols.place_of(regs.rip),
                reason.name()
            );
        }
        let open = OpenCall {
            gate: run.gate,
            attempt: run.attempt,
            call,
        };
        self.open.guest_calls.remove(&open.call.returns_with());
        self.open.spilled.insert(open.call.returns_with(), open);
        regs
    }

    /// What there is to say of a violation, with what it touched.
    fn found(&self, run: &Run<'_>, violation: Violation) -> Failed {
        let name = self
            .gates
            .get(&run.gate)
            .map(|gate| gate.entry.name.as_str());
        let name = name.unwrap_or_default();
        let mut failed = self.guest.knowledge.failed(name, violation, &self.domain);
        if let (None, Some(policy)) = (&failed.touched, &self.policy) {
            let memory = self.domain.memories().1;
            let virt = VirtMemory {
                space: self.space(&run.at.sregs),
                memory: &memory,
            };
            let touched = failed.violation.touched();
            failed.touched = touched.and_then(|at| policy.whose(virt, Gva(at)));
        }
        failed
    }
}

/// What lies above the return address on the stack of a call that begins with this stack pointer:
/// its arguments, if it has more than fit into registers; 0 where nothing is mapped.
fn on_stack(virt: VirtMemory<'_, GuestMemory>, rsp: u64) -> [u64; STACK_ARGUMENTS] {
    let mut arguments = [0; STACK_ARGUMENTS];
    for (argument, number) in arguments.iter_mut().zip(1..) {
        let at = Gva(rsp).checked_add(8 * number);
        *argument = at.and_then(|at| virt.read_u64(at).ok()).unwrap_or(0);
    }
    arguments
}

/// What a run in the domain takes.
struct InDomain<'a> {
    domain: &'a mut Domain,
    knowledge: &'a Knowledge,
    policy: Option<CallPolicy<'a>>,
    platform: Platform<'a>,
    request: &'a CallRequest<'a>,
    spilled: Option<&'a mut SpilledCall>,
    keeps: Option<KeepsFaults<'a>>,
}

impl InDomain<'_> {
    fn carry_out(self, held: Option<&mut dyn HeldDevice>) -> Done {
        let device = held.map(|held| -> &mut dyn HeldDevice { held });
        let mut supervisor = CallSupervisor::new(
            self.knowledge,
            self.policy,
            device,
            self.platform,
            self.keeps,
        );
        let result = self
            .domain
            .carry_out(self.request, &mut supervisor, self.spilled);
        self.domain.recorder.note(|| call_trace::ended(&result));
        let (device_lost, image) = supervisor.ended();
        Done {
            result,
            device_lost,
            image,
        }
    }
}

/// Has the domain carry a call out while the `device` is held, if there is one, and says what of it
/// is kept from the world then. A device that cannot be held is why the call has failed.
fn with_device_held(
    device: Option<&dyn Holdable>,
    in_domain: InDomain<'_>,
    comes_back: bool,
    others_open: bool,
) -> (Option<Done>, Option<Left>) {
    let Some(device) = device else {
        return (Some(in_domain.carry_out(None)), None);
    };
    let mut in_domain = Some(in_domain);
    let (mut done, mut left) = (None, None);
    let held = device.hold(&mut |held| {
        let Some(in_domain) = in_domain.take() else {
            return;
        };
        before_call(held, comes_back);
        let ran = in_domain.carry_out(Some(held));
        left = Some(after_call(held, &ran.result, others_open));
        done = Some(ran);
    });
    if let Err(lost) = held {
        done = Some(Done {
            result: Err(lost.into()),
            device_lost: None,
            image: None,
        });
    }
    (done, left)
}

/// What of a device is kept from the world after a call.
struct Left {
    /// It does not interrupt.
    withheld: bool,
    /// The outside does not see what becomes of it.
    outside_kept: bool,
}

/// Makes a device ready for a call, or for one that comes back from the guest.
fn before_call(held: &mut dyn HeldDevice, comes_back: bool) {
    if comes_back {
        held.freeze_interrupts();
    }
    held.keep_outside();
}

/// Shows the world what a call has made of a device, as far as that is known by now; `others_open`
/// if another call is in the guest that may be taken back.
fn after_call(
    held: &mut dyn HeldDevice,
    result: &Result<CallResult, DomainError>,
    others_open: bool,
) -> Left {
    let is_aborted = |result: &CallResult| matches!(result.end, CallEnd::Aborted(_));
    let withheld = matches!(result, Ok(result) if result.is_to_be_taken_back());
    if withheld {
        held.withhold_interrupts(true);
    }
    held.call_ended(result.as_ref().is_ok_and(is_aborted));
    let outside_kept = others_open || matches!(result, Ok(result) if result.is_open());
    if !outside_kept {
        // What was taken back nobody has seen.
        let is_undone = result.as_ref().map_or(true, CallResult::leaves_nothing);
        held.show_outside(match is_undone {
            true => OutsideChanges::Forgotten,
            false => OutsideChanges::Shown,
        });
    }
    Left {
        withheld,
        outside_kept,
    }
}

/// Why a device is lost that was not where its driver reached for it, although it has not gone.
fn asleep(device: Option<&dyn Holdable>, violation: &Violation) -> Option<String> {
    let ViolationKind::ForeignMmio { gpa, .. } = violation.kind else {
        return None;
    };
    let mut asleep = false;
    let held = device?.hold(&mut |held| asleep = held.sleeps_at(gpa));
    if let Err(lost) = held {
        return Some(lost.to_string());
    }
    asleep.then(|| "it is in a sleep state, of which its driver does not know".to_owned())
}
