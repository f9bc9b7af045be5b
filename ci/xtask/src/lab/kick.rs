//! Gives the emulated processors an interrupt now and then.
//!
//! QEMU up to 10.1 can lose one: its `VMRUN` and `#VMEXIT` change a processor's `interrupt_request`
//! word with neither lock nor atomic instruction (`CPU_INTERRUPT_VIRQ` in
//! `target/i386/tcg/*/svm_helper.c`), and what another thread sets in it at that moment, such as
//! the local APIC's timer, is gone. The APIC still has the interrupt in its request register, but
//! nothing looks there before the next one comes; Linux arms its timer anew only in the handler, so
//! that on a processor which runs a guest none may ever come. Any other interrupt brings the lost
//! one back. So one is sent to all processors: the message-signalled interrupt of Linux'
//! rescheduling vector, which does nothing where nothing is to be rescheduled.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Between two kicks: what a lost timer interrupt costs at most.
const INTERVAL: Duration = Duration::from_secs(1);

/// To all processors, physical destination (AMD64 manual volume 2, section 16.11):
/// `RESCHEDULE_VECTOR` of Linux.
const MESSAGE: &[u8] = b"writel 0xfeeff000 0xfd\n";

/// Sends them through QEMU's test port.
pub struct Kick {
    /// Absent once it broke: the lab works without.
    stream: Option<UnixStream>,
    last: Instant,
}

impl Kick {
    /// `stream` is QEMU's test port.
    pub fn new(stream: UnixStream) -> Self {
        let stream = stream.set_nonblocking(true).is_ok().then_some(stream);
        Self {
            stream,
            last: Instant::now(),
        }
    }

    /// Sends one if the last was long enough ago.
    pub fn now_and_then(&mut self) {
        if self.last.elapsed() < INTERVAL {
            return;
        }
        self.last = Instant::now();
        let Some(stream) = &mut self.stream else {
            return;
        };
        // The answers to earlier ones, so that QEMU is not held up by a full socket.
        while let Ok(1..) = stream.read(&mut [0; 256]) {}
        if !matches!(stream.write(MESSAGE), Ok(count) if count == MESSAGE.len()) {
            self.stream = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_are_whole_messages_and_not_too_many() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut kick = Kick::new(ours);
        kick.now_and_then();
        kick.last -= INTERVAL;
        kick.now_and_then();
        kick.now_and_then();
        drop(kick);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).unwrap();
        assert_eq!(sent, MESSAGE);
    }

    #[test]
    fn a_port_that_is_gone_is_left_alone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut kick = Kick::new(ours);
        drop(theirs);
        for _ in 0..3 {
            kick.last -= INTERVAL;
            kick.now_and_then();
        }
        assert!(kick.stream.is_none());
    }
}
