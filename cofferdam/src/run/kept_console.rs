//! The last of what the guest printed on its console, kept in memory, and a way to type into it:
//! both through the control socket.
//!
//! Whoever reads says from which byte on, so that any number may read, each as fast as it can: one
//! that is too slow finds that something is not kept any more. The guest is never held up.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::message::Bytes;
use devices::serial::SerialObserver;

use crate::control::protocol::{ConsoleOutput, MAX_TYPED_BYTES};

/// Most that is kept, in bytes.
const MAX_KEPT: usize = 64 << 10;

/// Most that is told at once, in bytes.
const MAX_TOLD: usize = 16 << 10;

/// What the guest printed last, and a way to type.
#[derive(Debug, Clone)]
pub struct KeptConsole(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    output: Mutex<Output>,
    printed: Condvar,
    /// A pipe to the port, if what is typed comes from here.
    typed: Option<File>,
}

#[derive(Debug, Default)]
struct Output {
    kept: VecDeque<u8>,
    /// How much was printed since the process began.
    printed: u64,
    /// How many wait for more.
    waiting: usize,
    ended: bool,
}

impl KeptConsole {
    /// One that nothing was printed on. What is typed goes into `typed`, a pipe that nobody waits
    /// for.
    pub fn new(typed: Option<File>) -> Self {
        Self(Arc::new(Shared {
            output: Mutex::default(),
            printed: Condvar::new(),
            typed,
        }))
    }

    /// Who keeps what is printed, and has `other` look at it too.
    pub fn observer(&self, other: Box<dyn SerialObserver>) -> Box<dyn SerialObserver> {
        Box::new(Observer {
            console: self.clone(),
            other,
        })
    }

    /// What was printed from byte `from` on, or from the oldest that is kept; waits up to `limit`
    /// for there to be something.
    pub fn read(&self, from: Option<u64>, limit: Duration) -> ConsoleOutput {
        let mut output = self.lock();
        let from = from.unwrap_or(0).min(output.printed);
        if output.printed == from && !output.ended && !limit.is_zero() {
            output.waiting += 1;
            let nothing = |output: &mut Output| output.printed == from && !output.ended;
            let waited = self.0.printed.wait_timeout_while(output, limit, nothing);
            output = waited.unwrap_or_else(PoisonError::into_inner).0;
            output.waiting = output.waiting.saturating_sub(1);
        }
        let oldest = output.printed.saturating_sub(output.kept.len() as u64);
        let from = from.max(oldest);
        let skipped = usize::try_from(from - oldest).unwrap_or(usize::MAX);
        let told = output.kept.iter().skip(skipped).take(MAX_TOLD).copied();
        let bytes: Vec<u8> = told.collect();
        let all_told = from.saturating_add(bytes.len() as u64) == output.printed;
        ConsoleOutput {
            from,
            bytes: Bytes(bytes),
            ended: output.ended && all_told,
        }
    }

    /// Types `bytes`, all of them or none.
    ///
    /// # Errors
    /// What is typed comes from elsewhere, it is too long, or the guest does not read.
    pub fn type_in(&self, bytes: &[u8]) -> Result<(), String> {
        let Some(mut typed) = self.0.typed.as_ref() else {
            return Err(
                "what is typed into this console comes from where its --serial says".to_owned(),
            );
        };
        if bytes.len() > MAX_TYPED_BYTES {
            return Err(format!("at most {MAX_TYPED_BYTES} bytes are typed at once"));
        }
        match typed.write(bytes) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Err("the guest does not read what is typed: try again later".to_owned())
            }
            Err(error) => Err(format!("the console takes no input: {error}")),
        }
    }

    /// The guest has ended: nobody waits any more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.0.printed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        let output = self.0.output.lock();
        output.unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Observer {
    console: KeptConsole,
    other: Box<dyn SerialObserver>,
}

impl SerialObserver for Observer {
    fn wrote(&mut self, byte: u8) {
        self.other.wrote(byte);
        let mut output = self.console.lock();
        if output.kept.len() >= MAX_KEPT {
            output.kept.pop_front();
        }
        output.kept.push_back(byte);
        output.printed = output.printed.saturating_add(1);
        if output.waiting > 0 {
            self.console.0.printed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::super::panic_watch::GuestPanic;
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn print(console: &KeptConsole, bytes: &[u8]) {
        let mut observer = console.observer(GuestPanic::default().observer());
        bytes.iter().for_each(|byte| observer.wrote(*byte));
    }

    #[test]
    fn what_was_printed_is_read_from_any_byte_that_is_kept() {
        let console = KeptConsole::new(None);
        assert_eq!(console.read(None, Duration::ZERO).bytes.0, b"");
        print(&console, b"hello");
        let output = console.read(None, LONG);
        assert_eq!(
            (output.from, output.bytes.0.as_slice()),
            (0, b"hello".as_slice())
        );
        assert_eq!(console.read(Some(3), LONG).bytes.0, b"lo");
        // Bytes that were not printed yet are not waited for by their number.
        assert_eq!(console.read(Some(u64::MAX), Duration::ZERO).from, 5);
        print(&console, &vec![b'x'; MAX_KEPT]);
        let late = console.read(Some(3), LONG);
        assert_eq!((late.from, late.bytes.0.len()), (5, MAX_TOLD));
        assert_eq!(console.lock().kept.len(), MAX_KEPT);
    }

    #[test]
    fn who_waits_is_told_when_something_is_printed_and_at_the_end() {
        let console = KeptConsole::new(None);
        thread::scope(|scope| {
            let reader = scope.spawn(|| console.read(Some(0), LONG));
            while console.lock().waiting == 0 {
                thread::yield_now();
            }
            print(&console, b"!");
            assert_eq!(reader.join().unwrap().bytes.0, b"!");
            let reader = scope.spawn(|| console.read(Some(1), LONG));
            while console.lock().waiting == 0 {
                thread::yield_now();
            }
            console.end();
            assert!(reader.join().unwrap().ended);
        });
        let rest = console.read(None, LONG);
        assert!(rest.ended && rest.bytes.0 == b"!");
    }

    #[test]
    fn what_is_typed_is_taken_whole_or_refused() {
        let (mut port, typed) = pipe_with(PipeFlags::NONBLOCK)
            .map(|(a, b)| (File::from(a), File::from(b)))
            .unwrap();
        let console = KeptConsole::new(Some(typed));
        console.type_in(b"ls\n").unwrap();
        let mut read = [0; 8];
        assert_eq!(port.read(&mut read).unwrap(), 3);
        let most = vec![b'x'; MAX_TYPED_BYTES];
        console
            .type_in(&[most.as_slice(), b"x"].concat())
            .unwrap_err();
        let mut taken = 0;
        let refused = loop {
            match console.type_in(&most) {
                Ok(()) => taken += most.len(),
                Err(error) => break error,
            }
        };
        assert!(refused.contains("does not read"), "{refused}");
        let mut all = Vec::new();
        drop(console);
        port.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), taken);
        let elsewhere = KeptConsole::new(None).type_in(b"x").unwrap_err();
        assert!(elsewhere.contains("--serial"), "{elsewhere}");
    }
}
