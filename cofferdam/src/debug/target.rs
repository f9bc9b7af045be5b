//! An image as what `gdb` looks at: one thread that stands still, registers and memory to read,
//! nothing to write.

use std::convert::Infallible;

use gdbstub::common::Signal;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
    SingleThreadSingleStepOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use isolation::fault_image::FaultImage;

use super::registers::{Registers, X86};
use super::words::answer;

/// "Bad address", for memory that is not mapped or not in the image.
const EFAULT: u8 = 14;
/// "Read-only file system", for everything that would be written.
const EROFS: u8 = 30;

/// A guest at a fault.
#[derive(Debug)]
pub struct Fault<'a>(pub &'a FaultImage);

impl Target for Fault<'_> {
    type Arch = X86;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Infallible> {
        BaseOps::SingleThread(self)
    }

    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        // Breakpoints are stores, and none of them is carried out.
        true
    }

    fn use_no_ack_mode(&self) -> bool {
        // What is damaged on its way is asked for again.
        false
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Fault<'_> {
    fn read_registers(&mut self, registers: &mut Registers) -> TargetResult<(), Self> {
        *registers = Registers::of(self.0.manifest());
        Ok(())
    }

    fn write_registers(&mut self, _registers: &Registers) -> TargetResult<(), Self> {
        Err(TargetError::Errno(EROFS))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        let read = self.0.read(start, data);
        read.map_err(|_| TargetError::Errno(EFAULT))
    }

    fn write_addrs(&mut self, _start: u64, _data: &[u8]) -> TargetResult<(), Self> {
        Err(TargetError::Errno(EROFS))
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadResume for Fault<'_> {
    fn resume(&mut self, _signal: Option<Signal>) -> Result<(), Infallible> {
        // The session says that it does not run.
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for Fault<'_> {
    fn step(&mut self, _signal: Option<Signal>) -> Result<(), Infallible> {
        Ok(())
    }
}

impl MonitorCmd for Fault<'_> {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        let command = String::from_utf8_lossy(command);
        out.write_raw(answer(self.0, &command).as_bytes());
        Ok(())
    }
}
