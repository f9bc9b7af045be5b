//! SIGBUS: an access to a page of a mapping whose file has it no more (sigaction(2)).

use libc::{c_int, c_void, siginfo_t};

/// `BUS_ADRERR` of `<asm-generic/siginfo.h>`: there is no such page.
const BUS_ADRERR: i32 = 2;

/// What is called for the signal.
pub type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Has `handler` called for the signal in this process. What was there before; `None` where the
/// kernel refuses it.
///
/// # Safety
/// The handler does only what a signal handler may (signal-safety(7)).
pub unsafe fn handle(handler: Handler) -> Option<libc::sigaction> {
    // SAFETY: all-zero is a valid sigaction, and the handler is one, as the caller says.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut before: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let result = libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before);
        (result == 0).then_some(before)
    }
}

/// The address of the page that is missing; `None` where the signal says something else.
///
/// # Safety
/// `info` is what the kernel has passed to a [`Handler`].
pub unsafe fn missing(info: *const siginfo_t) -> Option<usize> {
    // SAFETY: with SA_SIGINFO it is valid, and `si_addr` is there for this code.
    unsafe { ((*info).si_code == BUS_ADRERR).then(|| (*info).si_addr() as usize) }
}
