//! Hand-made guests: a few instructions on a real KVM, reporting to the test through an I/O port.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // Each test file uses a part of it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::bus::MutBusDevice;
use devices::serial::SerialBackend;
use vm_memory::GuestAddress;
use vmm::memory::MemorySource;
use vmm::{Error, ExitReason, OnGuestReset, Payload, Vm, VmConfig, VmHandle};

/// Port at which guests report: width and value of each write arrive at the test.
pub const REPORT_PORT: u16 = 0x500;
/// Where guest code is loaded and entered.
pub const CODE: u64 = 0x10_0000;
/// Bytes of guest memory.
pub const MEMORY: u64 = 4 << 20;
/// A guest that has not reported by then is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Assembles guest code into the test program; `$name()` gives its bytes.
#[macro_export]
macro_rules! guest_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".global ", stringify!($name), "_start"),
            concat!(stringify!($name), "_start:"),
            $($line,)+
            concat!(".global ", stringify!($name), "_end"),
            concat!(stringify!($name), "_end:"),
            ".code64",
            ".popsection",
        );
        fn $name() -> Vec<u8> {
            unsafe extern "C" {
                #[link_name = concat!(stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both symbols are in this program's read-only data, the second behind the
            // first.
            unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }.to_vec()
        }
    };
}

/// Reports and answers a read with one less than the last report.
pub struct Reporter {
    sender: Sender<(usize, u32)>,
    last: u32,
}

impl MutBusDevice for Reporter {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let answer = self.last.wrapping_sub(1).to_le_bytes();
        let len = data.len().min(4);
        data[..len].copy_from_slice(&answer[..len]);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value[..data.len().min(4)].copy_from_slice(&data[..data.len().min(4)]);
        self.last = u32::from_le_bytes(value);
        // The test may have seen enough and gone.
        let _ = self.sender.send((data.len(), self.last));
    }
}

pub fn config(code: Vec<u8>, vcpus: u8) -> VmConfig {
    VmConfig {
        memory_bytes: MEMORY,
        memory: MemorySource::default(),
        vcpus,
        payload: Payload::Code {
            code,
            address: GuestAddress(CODE),
        },
        console: SerialBackend::None,
        on_guest_reset: OnGuestReset::Restart,
    }
}

/// A machine whose guest reports to the test.
pub struct Guest {
    pub vm: Vm,
    pub reports: Receiver<(usize, u32)>,
    pub reporter: Arc<Mutex<Reporter>>,
}

impl Guest {
    pub fn new(config: VmConfig) -> Self {
        let vm = Vm::new(config).expect("this host has no usable KVM");
        let (sender, reports) = channel();
        let reporter = Arc::new(Mutex::new(Reporter { sender, last: 0 }));
        vm.handle()
            .pio_bus()
            .map(u64::from(REPORT_PORT), 4, reporter.clone())
            .unwrap();
        Self {
            vm,
            reports,
            reporter,
        }
    }

    pub fn start(self) -> Running {
        let Self {
            mut vm, reports, ..
        } = self;
        let handle = vm.handle();
        let thread = std::thread::spawn(move || {
            let result = vm.run();
            if let Err(error) = &result {
                eprintln!("the machine ended: {error}");
            }
            result
        });
        Running {
            handle,
            reports,
            thread,
        }
    }
}

pub fn start(code: Vec<u8>, vcpus: u8) -> Running {
    Guest::new(config(code, vcpus)).start()
}

/// A running machine.
pub struct Running {
    pub handle: VmHandle,
    pub reports: Receiver<(usize, u32)>,
    thread: JoinHandle<Result<ExitReason, Error>>,
}

impl Running {
    /// The next value that the guest reports.
    pub fn report(&self) -> u32 {
        self.report_with_width().1
    }

    pub fn report_with_width(&self) -> (usize, u32) {
        match self.reports.recv_timeout(STUCK) {
            Ok(report) => report,
            Err(RecvTimeoutError::Timeout) => panic!("guest is stuck: {:?}", self.handle.status()),
            Err(RecvTimeoutError::Disconnected) => panic!("machine ended without a report"),
        }
    }

    /// Forgets reports that are waiting.
    pub fn drain(&self) -> Vec<u32> {
        self.reports.try_iter().map(|(_, value)| value).collect()
    }

    /// Waits for the machine's end.
    pub fn end(self) -> Result<ExitReason, Error> {
        self.thread.join().expect("main loop panicked")
    }

    pub fn power_off(self) {
        self.handle.power_off().unwrap();
        assert_eq!(self.end().unwrap(), ExitReason::HostPowerOff);
    }
}
