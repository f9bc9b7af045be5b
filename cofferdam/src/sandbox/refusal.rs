//! What a person is told of a system call that the filter refused, before the process ends by
//! `SIGSYS`.
//!
//! The handler runs on the thread that made the call, wherever that was: it calls nothing but what
//! signal-safety(7) allows, and nothing that the filter refuses.

use std::ffi::CStr;
use std::sync::Once;

use super::calls::name_of;
use crate::run::terminal;

/// Longest line, in bytes.
const MAX_LINE: usize = 256;

/// `SYS_SECCOMP` of asm-generic/siginfo.h: a filter raised the signal.
const SYS_SECCOMP: libc::c_int = 1;

/// What `siginfo_t` has behind its head for `SIGSYS` (`_sigsys` of asm-generic/siginfo.h).
#[repr(C)]
struct Refused {
    _head: [libc::c_int; 4],
    _address: *const libc::c_void,
    call: libc::c_int,
    _architecture: libc::c_uint,
}

/// Has a refused call told. Called again it does nothing.
///
/// # Errors
/// There can be no handler.
pub fn watch() -> std::io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid, and the handler is of the kind that SA_SIGINFO
        // says; it calls nothing but what is safe in one.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_refusal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) != 0
        };
        if failed {
            result = Err(std::io::Error::last_os_error());
        }
    });
    result
}

extern "C" fn on_refusal(
    signal: libc::c_int,
    info: *const libc::siginfo_t,
    _context: *const libc::c_void,
) {
    terminal::restore();
    // SAFETY: the kernel hands a whole siginfo_t, at least as large as `Refused` and aligned as it
    // is; its last part is read only where a filter raised the signal, which is when it was filled.
    let (code, call) = unsafe { ((*info).si_code, (*info.cast::<Refused>()).call) };
    if code == SYS_SECCOMP {
        tell(call);
    }
    // SAFETY: both calls are async-signal-safe. The signal is blocked while its handler runs, so
    // that it takes its default effect when the handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Writes the line about call number `call` to standard error.
fn tell(call: libc::c_int) {
    let mut thread = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, the last of them zero (prctl(2)).
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let mut line = Line::default();
    line.add(b"cofferdam: the sandbox refused the system call ");
    line.add_number(call.unsigned_abs());
    if let Some(name) = name_of(call.into()) {
        line.add(b" (");
        line.add(name.as_bytes());
        line.add(b")");
    }
    line.add(b" to the thread ");
    line.add(CStr::from_bytes_until_nul(&thread).map_or(b"", CStr::to_bytes));
    line.add(b": the process ends; --sandbox log tells of such calls and lets them be\n");
    // SAFETY: the buffer is as long as is said. Where standard error takes nothing there is nobody
    // to be told.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
}

/// A line that is put together without memory being allocated; what does not fit is left out.
struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; MAX_LINE],
            length: 0,
        }
    }
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text) {
            *to = *from;
            self.length += 1;
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut digits = [b'0'; 10];
        let mut rest = number;
        let mut first = digits.len();
        for (index, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
            first = index;
            if rest == 0 {
                break;
            }
        }
        self.add(digits.get(first..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_out_and_a_line_that_is_too_long_is_cut() {
        for number in [0, 7, 10, 59, u32::MAX] {
            let mut line = Line::default();
            line.add_number(number);
            assert_eq!(&line.bytes[..line.length], number.to_string().as_bytes());
        }
        let mut line = Line::default();
        (0..100).for_each(|_| line.add(b"four"));
        assert_eq!(line.length, MAX_LINE);
    }
}
