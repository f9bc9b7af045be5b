//! Whether the guest's kernel has panicked, by what it prints on its console.
//!
//! It is the guest that says so: whatever runs in it can print the same line. What follows from it
//! is no more than words for a person, and that nobody waits long for the guest's agent.

use std::sync::{Arc, Mutex, PoisonError};

use devices::serial::SerialObserver;
use vmm::{Kept, Participant, PausedVcpus, RestFor, Unsettled};

/// How every Linux kernel begins the line (`panic` in `kernel/panic.c`), behind its time and the
/// task's number.
const PANIC: &str = "Kernel panic - not syncing";

/// Longest line that is looked at, in bytes.
const MAX_LINE: usize = 256;

/// What a guest said when it panicked.
#[derive(Debug, Clone, Default)]
pub struct GuestPanic(Arc<Mutex<Option<String>>>);

impl GuestPanic {
    /// The line, if the guest has panicked since it was booted.
    pub fn line(&self) -> Option<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The guest boots anew.
    pub fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Who looks for it on the console.
    pub fn observer(&self) -> Box<dyn SerialObserver> {
        Box::new(Console {
            line: Vec::new(),
            panic: self.clone(),
        })
    }
}

/// A guest that was rewound has panicked if it had at the mark.
impl Participant for GuestPanic {
    fn name(&self) -> String {
        "the watch for panics".to_owned()
    }

    fn settle(&self, _rest: RestFor, _vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        Ok(())
    }

    fn go_on(&self) {}

    fn keep(&self) -> Result<Kept, Unsettled> {
        Ok(Some(Arc::new(self.line())))
    }

    fn put_back(&self, kept: &Kept) -> Result<(), String> {
        let line = kept.as_ref().and_then(|kept| kept.downcast_ref());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = line.cloned().flatten();
        Ok(())
    }
}

#[derive(Debug)]
struct Console {
    line: Vec<u8>,
    panic: GuestPanic,
}

impl SerialObserver for Console {
    fn wrote(&mut self, byte: u8) {
        match byte {
            b'\n' => {
                if let Some(line) = panic_line(&self.line) {
                    let mut said = self.panic.0.lock().unwrap_or_else(PoisonError::into_inner);
                    // What comes after the first is its consequence.
                    said.get_or_insert(line);
                }
                self.line.clear();
            }
            byte if self.line.len() < MAX_LINE => self.line.push(byte),
            _ => {}
        }
    }
}

/// The message of a line of a kernel that panicked.
fn panic_line(line: &[u8]) -> Option<String> {
    let text: String = line
        .iter()
        .map(|byte| char::from(*byte))
        .filter(|c| matches!(c, ' '..='~'))
        .collect();
    let mut message = text.trim();
    // `[   12.345678]`, and with CONFIG_PRINTK_CALLER `[    T1]`.
    while let Some((_, rest)) = message.strip_prefix('[').and_then(|m| m.split_once(']')) {
        message = rest.trim_start();
    }
    message.starts_with(PANIC).then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(output: &[u8]) -> Option<String> {
        let panic = GuestPanic::default();
        let mut console = panic.observer();
        for byte in output {
            console.wrote(*byte);
        }
        panic.line()
    }

    #[test]
    fn the_line_of_a_panic_is_found_and_kept_until_the_guest_boots_anew() {
        let panic = GuestPanic::default();
        let mut console = panic.observer();
        let output = b"[    3.1] sysrq: Trigger a crash\r\n\
            [    3.2][  T123] Kernel panic - not syncing: sysrq triggered crash\r\n\
            [    3.3] Kernel panic - not syncing: another\r\n";
        for byte in output {
            console.wrote(*byte);
        }
        let line = "Kernel panic - not syncing: sysrq triggered crash";
        assert_eq!(panic.line().as_deref(), Some(line));
        panic.forget();
        assert_eq!(panic.line(), None);
    }

    #[test]
    fn a_guest_that_is_rewound_has_panicked_if_it_had_at_the_mark() {
        let panic = GuestPanic::default();
        let well = panic.keep().unwrap();
        let mut console = panic.observer();
        for byte in b"Kernel panic - not syncing: died\n" {
            console.wrote(*byte);
        }
        let died = panic.keep().unwrap();
        panic.put_back(&well).unwrap();
        assert_eq!(panic.line(), None);
        panic.put_back(&died).unwrap();
        assert!(panic.line().unwrap().ends_with("died"));
        panic.put_back(&None).unwrap();
        assert_eq!(panic.line(), None);
    }

    #[test]
    fn other_lines_are_none() {
        for output in [
            &b"I read: Kernel panic - not syncing\n"[..],
            b"[    0.1] Kernel command line: panic=1\n",
            b"Kernel panic - not syn",
            b"[[[[[[[[\n",
            b"",
        ] {
            assert_eq!(said(output), None);
        }
    }

    #[test]
    fn a_line_without_end_costs_no_memory_and_what_it_says_is_printable() {
        let mut output = vec![b'['; 1 << 20];
        output.extend(b"]\n\x1b[2JKernel panic - not syncing\n");
        assert_eq!(said(&output), None);
        let mut output = b"Kernel panic - not syncing: \x1b\x07".to_vec();
        output.extend([b'x'; 10_000]);
        output.push(b'\n');
        let line = said(&output).unwrap();
        assert!(line.len() <= MAX_LINE && line.is_ascii() && !line.contains('\x1b'));
    }
}
