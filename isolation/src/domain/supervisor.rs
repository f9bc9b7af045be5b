//! What a call in the domain asks of the layer that knows the guest: its functions, objects and
//! devices.

use devices::hold::{Access, DeviceAddress, DeviceState};

use super::effects::KernelCall;
use super::failing::Failing;
use super::monitor::{Asked, ExceptionFrame};
use super::undo_log::Restorable;
use crate::guest::addr::GvaRange;

/// What to do about an exception in a kernel function that the driver called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelExceptionVerdict {
    /// The kernel expects it (a user page that is not present, a `WARN`): let the guest take it.
    Expected,
    /// The kernel would oops: the driver passed something bad.
    DriversFault,
}

/// Whether kernel functions may be run by the guest when a call is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOver {
    /// They may not: the call is run once more, and calls them itself.
    Refused,
    /// They may.
    Accepted {
        /// Stores to the device that come after this one of them wait until all have returned.
        stores_wait_for: Option<usize>,
    },
}

/// An object that a kernel function has answered a call with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Guest virtual address of the function.
    pub function: u64,
    /// Guest virtual address of the object.
    pub at: u64,
}

/// Memory behind what a call has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    /// Where.
    pub range: GvaRange,
    /// It is a red zone, which the kernel fills and looks at itself; zero, or filled by the kernel's
    /// checks, otherwise.
    pub is_red_zone: bool,
}

/// Knowledge about the guest and access to the isolated device.
pub trait Supervisor {
    /// Whether this call may write at least one byte around guest virtual address `va`, on its
    /// page; the driver's stack frame is not asked for.
    fn may_write(&mut self, va: u64) -> bool;

    /// Whether what the call may write at `va` is the driver's beyond the call: if not, the page is
    /// closed again at its end.
    fn lasts(&self, _va: u64) -> bool {
        true
    }

    /// Where a call that is about to begin will probably store in what is not the driver's beyond
    /// it: the pages are opened before, if it may.
    fn expected(&mut self) -> Vec<u64> {
        Vec::new()
    }

    /// The call stores at `va`, for which a page was opened that is closed again at its end.
    fn stored(&mut self, _va: u64) {}

    /// Whether kernel functions that can wait until the call has ended ([`Domain::let_wait`]) may
    /// wait for this one, which is about to begin.
    ///
    /// [`Domain::let_wait`]: super::Domain::let_wait
    fn may_hand_over(&mut self) -> bool {
        false
    }

    /// Looks at what these kernel functions are given, which the guest runs when the call is
    /// committed.
    fn hands_over(&mut self, _calls: &[KernelCall]) -> HandOver {
        HandOver::Refused
    }

    /// Whether it is known without looking further that the call may write all of the `bytes` bytes
    /// at `va`.
    fn owns(&self, va: u64, bytes: u64) -> bool;

    /// Whether this call may change the `bytes` bytes at `va`.
    fn may_change(&mut self, va: u64, bytes: u64) -> bool;

    /// Whether one of these values, which the call has in registers, says at once that it may write
    /// the byte at `va`: if none does, it is [`Supervisor::may_write`]'s to say.
    fn may_write_in(&mut self, _va: u64, _values: &[u64]) -> bool {
        false
    }

    /// The call, which holds these values in registers and on its stack, stores where nothing says
    /// that it may, and [`Supervisor::may_write`] is asked once more: what kernel functions have
    /// returned to it is among them.
    fn holds(&mut self, _values: &[u64]) {}

    /// The call has asked for memory, or has given some back, in this order.
    fn asked_for(&mut self, _asked: &[Asked]) {}

    /// What lies behind what the call has asked for and has a known content, as long as nobody
    /// writes there.
    fn behind_asked(&self) -> Vec<Behind> {
        Vec::new()
    }

    /// The kernel calls back into the driver's `function` with these register arguments (`rdi`,
    /// `rsi`, `rdx`, `rcx`, `r8`, `r9`): the call may write what they lead to, too.
    fn called_back(&mut self, _function: u64, _arguments: [u64; 6]) {}

    /// The stack that `rsp` is on, if it is one that the kernel may have switched to in the middle
    /// of the call, for interrupts and what they leave to be done: what it calls the driver back on
    /// is the call's own.
    fn interrupt_stack(&mut self, _rsp: u64) -> Option<GvaRange> {
        None
    }

    /// Something of the call is put into the guest's page at guest physical address `gpa`, which
    /// has been `old` until now, and the call goes on.
    fn publishing(&mut self, _gpa: u64, _old: &[u8; 4096]) {}

    /// The call is about to be committed, with the `bytes` bytes at `va` changed, on a page that it
    /// was let write to.
    fn committing(&mut self, _va: u64, _bytes: u64) {}

    /// The call is about to go on in the guest, with these values in registers and on the call's
    /// stack.
    fn leaves(&mut self, _values: &[u64]) {}

    /// A kernel function that went on in the guest has returned `value` to the driver: what was
    /// handed out there is the driver's to write.
    fn returned(&mut self, _value: u64) {}

    /// A kernel function whose answers are told ([`Domain::tell_answers`]) has returned `result` to
    /// the driver, which had called it with these arguments: the object that it has answered with,
    /// if it has.
    ///
    /// [`Domain::tell_answers`]: super::Domain::tell_answers
    fn answered(&mut self, _call: &KernelCall, _result: u64) -> Option<Answer> {
        None
    }

    /// The call comes back from the guest, and kernel functions had answered it with these objects.
    fn was_answered(&mut self, _answers: &[Answer]) {}

    /// Whether a function of the kernel or of another module begins at `va`.
    fn is_kernel_function(&self, va: u64) -> bool;

    /// Whether code that the kernel has made while it ran, and that has no name, begins at `va`,
    /// where it is called with this second argument.
    fn is_made_by_kernel(&self, _va: u64, _second: u64) -> bool {
        false
    }

    /// Whether a function of the isolated driver begins at `va`.
    fn is_driver_function(&self, va: u64) -> bool;

    /// Judges an exception in a kernel function; `address` is CR2.
    fn kernel_exception(&self, frame: &ExceptionFrame, address: u64) -> KernelExceptionVerdict;

    /// Whether guest physical address `gpa` belongs to the isolated device.
    fn owns_mmio(&self, gpa: u64) -> bool;

    /// Whether I/O port `port` belongs to the isolated device.
    fn owns_port(&self, _port: u16) -> bool {
        false
    }

    /// Whether no device of the machine is at any of the `bytes` I/O ports from `port`.
    fn is_nobodys_port(&self, _port: u16, _bytes: usize) -> bool {
        false
    }

    /// Loads `bytes` (1 to 8, from ports 1 to 4) from the isolated device.
    fn device_read(&mut self, at: DeviceAddress, bytes: usize) -> u64;

    /// What a load of `bytes` from the isolated device shows, if it has no effect and the stores to
    /// `waiting`, which come before it, change nothing of that.
    fn device_read_past(
        &mut self,
        _at: DeviceAddress,
        _bytes: usize,
        _waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        None
    }

    /// Stores the low `bytes` (1 to 8, to ports 1 to 4) of `value` to the isolated device.
    fn device_write(&mut self, at: DeviceAddress, value: u64, bytes: usize);

    /// Whether this access of `bytes` may have the isolated device look at guest memory, or write
    /// to it.
    fn device_uses_memory(&self, _at: DeviceAddress, _bytes: usize, _access: Access) -> bool {
        true
    }

    /// Takes the device's state, before the call reaches it for the first time.
    fn checkpoint_device(&mut self);

    /// The call has failed, and memory that the device was shown is about to be put back: a device
    /// that goes on by itself is made to stand still, as far as that can be done.
    fn stand_still(&mut self) {}

    /// Puts the state taken last back; `false` if the device is not as it was.
    fn restore_device(&mut self) -> bool;

    /// Guest memory that belongs to the driver now, when a call begins that may go on in the guest:
    /// what is put back if it fails later. What kernel functions keep there is not part of it.
    fn restorable(&mut self) -> Restorable {
        Restorable::default()
    }

    /// The device's state now; `None` if it cannot be taken.
    fn device_state(&mut self) -> Option<DeviceState> {
        None
    }

    /// Takes back what a call did to the device in parts, of which others may have used it in
    /// between: its state before and after each part, oldest first. All or nothing; the error says
    /// what is in the way.
    fn undo_device(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        match parts {
            [] => Ok(()),
            _ => Err("it cannot be put back in parts".to_owned()),
        }
    }

    /// Whether the call changed where the device takes requests of others from between `before` and
    /// `after`: one given to it from now on would be in the way of putting it back.
    fn requests_changed(&self, _before: &DeviceState, _after: &DeviceState) -> bool {
        false
    }

    /// Loads `bytes` from the platform's interrupt controller at `gpa`, as stores of this call left
    /// it; `None` if there is none at that address.
    fn platform_read(&mut self, _gpa: u64, _bytes: usize) -> Option<u64> {
        None
    }

    /// Stores to the platform's interrupt controller when the call commits; `false` if there is
    /// none at that address.
    fn platform_write(&mut self, _gpa: u64, _value: u64, _bytes: usize) -> bool {
        false
    }

    /// Writes a register of the processor's interrupt controller or timer when the call commits;
    /// `false` if it is not one that can wait.
    fn platform_msr_write(&mut self, _index: u32, _value: u64) -> bool {
        false
    }

    /// Performs what waited. If the call does not commit, it is forgotten.
    fn commit_platform(&mut self) {}

    /// Forgets what waited.
    fn forget_platform(&mut self) {}

    /// Nothing of the call is left, and it is run once more from its beginning: what it was told to
    /// be its own since then is not, and what waited is forgotten.
    fn begin_again(&mut self) {
        self.forget_platform();
    }

    /// Whether [`Supervisor::failing`] is to be told.
    fn watches_faults(&self) -> bool {
        false
    }

    /// The call has broken a rule, and nothing of it is taken back yet. It stands still, and with
    /// it the guest, until this returns.
    fn failing(&mut self, _failing: &Failing<'_>) {}

    /// Writes to an I/O port on behalf of a kernel function, where that may happen at once whatever
    /// becomes of the call (console output); `false` where it may not.
    fn harmless_port_write(&mut self, port: u16, value: u32, bytes: usize) -> bool;
}
