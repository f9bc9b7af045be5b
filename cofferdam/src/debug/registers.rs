//! Registers as `gdb` wants them: those of x86-64, and the control registers beside them.

use gdbstub::arch::Arch;
use isolation::fault_image::Manifest;

/// x86-64.
#[derive(Debug)]
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Registers;
    type BreakpointKind = ();
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        Some(DESCRIPTION)
    }
}

/// Registers of the floating-point unit: of `st0` to `st7` 10 bytes each, of eight others 4. An
/// image has none of them: a call that uses the unit goes on in the guest.
const UNKNOWN_BYTES: usize = 8 * 10 + 8 * 4;

/// Registers at a fault.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Registers {
    /// `rax` to `r15` and `rip`, in the order of the description.
    general: [u64; 17],
    /// `eflags` and the segments.
    flags_and_segments: [u32; 7],
    /// `fs_base`, `gs_base`, `cr0`, `cr2`, `cr3`, `cr4`, `efer`.
    control: [u64; 7],
}

impl Registers {
    /// Those of an image.
    pub fn of(manifest: &Manifest) -> Self {
        let (now, control) = (&manifest.registers, &manifest.control);
        let segments = [
            control.cs, control.ss, control.ds, control.es, control.fs, control.gs,
        ];
        let mut flags_and_segments = [0; 7];
        // The upper half is reserved and zero.
        let flags = std::iter::once(now.rflags as u32);
        let all = flags.chain(segments.map(u32::from));
        for (to, from) in flags_and_segments.iter_mut().zip(all) {
            *to = from;
        }
        Self {
            general: [
                now.rax, now.rbx, now.rcx, now.rdx, now.rsi, now.rdi, now.rbp, now.rsp, now.r8,
                now.r9, now.r10, now.r11, now.r12, now.r13, now.r14, now.r15, now.rip,
            ],
            flags_and_segments,
            control: [
                control.fs_base,
                control.gs_base,
                control.cr0,
                control.cr2,
                control.cr3,
                control.cr4,
                control.efer,
            ],
        }
    }
}

impl gdbstub::arch::Registers for Registers {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let [.., rip] = self.general;
        rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        let mut put = |bytes: &[u8]| bytes.iter().for_each(|byte| write_byte(Some(*byte)));
        for value in self.general {
            put(&value.to_le_bytes());
        }
        for value in self.flags_and_segments {
            put(&value.to_le_bytes());
        }
        for _ in 0..UNKNOWN_BYTES {
            write_byte(None);
        }
        for value in self.control {
            value
                .to_le_bytes()
                .iter()
                .for_each(|byte| write_byte(Some(*byte)));
        }
    }

    fn gdb_deserialize(&mut self, _bytes: &[u8]) -> Result<(), ()> {
        // Nothing is written.
        Ok(())
    }
}

/// The target description (gdb manual, appendix G).
const DESCRIPTION: &str = r#"<?xml version="1.0"?>
<!DOCTYPE target SYSTEM "gdb-target.dtd">
<target version="1.0">
<architecture>i386:x86-64</architecture>
<feature name="org.gnu.gdb.i386.core">
<flags id="i386_eflags" size="4">
<field name="CF" start="0" end="0"/>
<field name="PF" start="2" end="2"/>
<field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/>
<field name="SF" start="7" end="7"/>
<field name="TF" start="8" end="8"/>
<field name="IF" start="9" end="9"/>
<field name="DF" start="10" end="10"/>
<field name="OF" start="11" end="11"/>
<field name="AC" start="18" end="18"/>
</flags>
<reg name="rax" bitsize="64" type="int64" regnum="0"/>
<reg name="rbx" bitsize="64" type="int64"/>
<reg name="rcx" bitsize="64" type="int64"/>
<reg name="rdx" bitsize="64" type="int64"/>
<reg name="rsi" bitsize="64" type="int64"/>
<reg name="rdi" bitsize="64" type="int64"/>
<reg name="rbp" bitsize="64" type="data_ptr"/>
<reg name="rsp" bitsize="64" type="data_ptr"/>
<reg name="r8" bitsize="64" type="int64"/>
<reg name="r9" bitsize="64" type="int64"/>
<reg name="r10" bitsize="64" type="int64"/>
<reg name="r11" bitsize="64" type="int64"/>
<reg name="r12" bitsize="64" type="int64"/>
<reg name="r13" bitsize="64" type="int64"/>
<reg name="r14" bitsize="64" type="int64"/>
<reg name="r15" bitsize="64" type="int64"/>
<reg name="rip" bitsize="64" type="code_ptr"/>
<reg name="eflags" bitsize="32" type="i386_eflags"/>
<reg name="cs" bitsize="32" type="int32"/>
<reg name="ss" bitsize="32" type="int32"/>
<reg name="ds" bitsize="32" type="int32"/>
<reg name="es" bitsize="32" type="int32"/>
<reg name="fs" bitsize="32" type="int32"/>
<reg name="gs" bitsize="32" type="int32"/>
<reg name="st0" bitsize="80" type="i387_ext"/>
<reg name="st1" bitsize="80" type="i387_ext"/>
<reg name="st2" bitsize="80" type="i387_ext"/>
<reg name="st3" bitsize="80" type="i387_ext"/>
<reg name="st4" bitsize="80" type="i387_ext"/>
<reg name="st5" bitsize="80" type="i387_ext"/>
<reg name="st6" bitsize="80" type="i387_ext"/>
<reg name="st7" bitsize="80" type="i387_ext"/>
<reg name="fctrl" bitsize="32" type="int" group="float"/>
<reg name="fstat" bitsize="32" type="int" group="float"/>
<reg name="ftag" bitsize="32" type="int" group="float"/>
<reg name="fiseg" bitsize="32" type="int" group="float"/>
<reg name="fioff" bitsize="32" type="int" group="float"/>
<reg name="foseg" bitsize="32" type="int" group="float"/>
<reg name="fooff" bitsize="32" type="int" group="float"/>
<reg name="fop" bitsize="32" type="int" group="float"/>
</feature>
<feature name="org.gnu.gdb.i386.segments">
<reg name="fs_base" bitsize="64" type="int64"/>
<reg name="gs_base" bitsize="64" type="int64"/>
</feature>
<feature name="org.cofferdam.control">
<reg name="cr0" bitsize="64" type="int64" group="system"/>
<reg name="cr2" bitsize="64" type="data_ptr" group="system"/>
<reg name="cr3" bitsize="64" type="int64" group="system"/>
<reg name="cr4" bitsize="64" type="int64" group="system"/>
<reg name="efer" bitsize="64" type="int64" group="system"/>
</feature>
</target>
"#;
