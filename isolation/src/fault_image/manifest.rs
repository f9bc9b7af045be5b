//! The head of an image: what failed, for people and for the reader.

use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_sregs};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm::snapshot::StoredFile;

use super::FaultImageError;
use crate::domain::monitor::CrossingFrame;
use crate::domain::roots::Root;
use crate::domain::view::PAGE_SIZE;

/// Version of the directory's form. Changes with every change of it or of what is in it.
pub const FORMAT_VERSION: u32 = 1;
/// What the head of a manifest says.
const FORMAT: &str = "cofferdam-fault-image";
/// What that of a snapshot says.
const SNAPSHOT_FORMAT: &str = "cofferdam-snapshot";
/// Longest manifest that is looked at, in bytes.
pub(super) const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// Most memory of a guest that is believed, in bytes.
const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Most regions of memory, crossings, call-backs and sections each.
const MAX_LIST: usize = 4096;

/// General registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "they are the processor's")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl From<kvm_regs> for Registers {
    fn from(regs: kvm_regs) -> Self {
        let kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = regs;
        Self {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rbp,
            rsp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        }
    }
}

impl Registers {
    /// With their names, as a debugger orders them.
    pub fn named(&self) -> [(&'static str, u64); 18] {
        [
            ("rax", self.rax),
            ("rbx", self.rbx),
            ("rcx", self.rcx),
            ("rdx", self.rdx),
            ("rsi", self.rsi),
            ("rdi", self.rdi),
            ("rbp", self.rbp),
            ("rsp", self.rsp),
            ("r8", self.r8),
            ("r9", self.r9),
            ("r10", self.r10),
            ("r11", self.r11),
            ("r12", self.r12),
            ("r13", self.r13),
            ("r14", self.r14),
            ("r15", self.r15),
            ("rip", self.rip),
            ("rflags", self.rflags),
        ]
    }

    /// The arguments that a function gets in registers (System V ABI).
    pub fn arguments(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.rcx, self.r8, self.r9]
    }
}

/// Control registers and segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "they are the processor's")]
pub struct Control {
    pub cr0: u64,
    /// Of the domain: what the last page fault was about.
    pub cr2: u64,
    /// Of the guest, by whose tables addresses are translated.
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub cs: u16,
    pub ss: u16,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
    pub fs_base: u64,
    pub gs_base: u64,
}

impl Control {
    /// Of the guest's vCPU, with CR2 of the domain.
    pub(super) fn new(sregs: &kvm_sregs, cr2: u64) -> Self {
        Self {
            cr0: sregs.cr0,
            cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cs: sregs.cs.selector,
            ss: sregs.ss.selector,
            ds: sregs.ds.selector,
            es: sregs.es.selector,
            fs: sregs.fs.selector,
            gs: sregs.gs.selector,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
        }
    }
}

/// Where something would have returned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReturnPoint {
    /// Return address.
    pub address: u64,
    /// Stack pointer after the return.
    pub rsp: u64,
}

impl From<&CrossingFrame> for ReturnPoint {
    fn from(frame: &CrossingFrame) -> Self {
        Self {
            address: frame.return_address,
            rsp: frame.rsp,
        }
    }
}

/// A region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Guest physical address.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
}

/// A section of the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Guest virtual address.
    pub address: u64,
}

/// The files besides the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// Pages that the call had otherwise.
    pub private: StoredFile,
    /// The guest's symbols.
    pub symbols: StoredFile,
    /// Types of the kernel, if they are known.
    pub kernel_types: Option<StoredFile>,
    /// Types of the module, if they are known.
    pub module_types: Option<StoredFile>,
    /// The list of the guest's pages.
    pub map: StoredFile,
    /// The guest's pages, without a checksum of the whole.
    pub memory: StoredFile,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// When it was written: seconds since 1970 (UTC).
    pub created_unix_s: u64,
    /// Program and version that wrote it.
    pub program: String,
    /// Release of the guest's kernel, as `uname -r` has it.
    pub kernel: String,
    /// The module.
    pub module: String,
    /// Its sections.
    pub sections: Vec<Section>,
    /// The isolated function whose call failed.
    pub entry: String,
    /// What it did, for people.
    pub text: String,
    /// The same for programs, as `cofferdam violations --json` has it.
    pub report: Value,
    /// Instruction that did it, or that was to be executed next.
    pub at: u64,
    /// With whose rights that ran.
    pub root: Root,
    /// Registers at the fault. Where the function had returned they are as its caller would have
    /// got them.
    pub registers: Registers,
    /// Whether the function, or one that the kernel had called back, had returned.
    pub returned: bool,
    /// Control registers and segments.
    pub control: Control,
    /// Bits of a guest physical address.
    pub physical_bits: u8,
    /// Registers at the entry of the call; RIP is not used.
    pub called_with: Registers,
    /// Where the call would have returned to.
    pub returns_to: ReturnPoint,
    /// Where in the driver kernel functions that it had called would have returned to, outermost
    /// first.
    pub crossings: Vec<ReturnPoint>,
    /// Where in the kernel functions of the driver that it had called back would have returned to,
    /// outermost first.
    pub callbacks: Vec<ReturnPoint>,
    /// Regions of guest memory, by address.
    pub regions: Vec<Region>,
    /// The other files.
    pub files: Files,
}

/// The file: a manifest and its checksum.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Enveloped {
    format: String,
    crc32: u32,
    manifest: Value,
}

impl Manifest {
    /// Guest memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.bytes))
    }

    /// The file's text.
    pub(super) fn to_text(&self) -> Result<String, String> {
        let manifest = serde_json::to_value(self).map_err(|error| error.to_string())?;
        let enveloped = Enveloped {
            format: FORMAT.to_owned(),
            crc32: checksum(&manifest),
            manifest,
        };
        let mut text =
            serde_json::to_string_pretty(&enveloped).map_err(|error| error.to_string())?;
        text.push('\n');
        if text.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(format!("it has {} bytes", text.len()));
        }
        Ok(text)
    }

    /// The manifest in `bytes`, which were read from `path`.
    pub(super) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, FaultImageError> {
        let damaged = |what: String| FaultImageError::damaged(path, what);
        let enveloped: Enveloped =
            serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if enveloped.format == SNAPSHOT_FORMAT {
            let dir = path.parent().unwrap_or(path);
            return Err(FaultImageError::Snapshot(dir.to_owned()));
        }
        if enveloped.format != FORMAT {
            return Err(damaged("it is of another program".to_owned()));
        }
        // A later version may say whatever it likes besides its number.
        let version = enveloped.manifest.get("version").and_then(Value::as_u64);
        match version {
            Some(version) if version == u64::from(FORMAT_VERSION) => {}
            Some(found) => {
                let path = path.to_owned();
                return Err(FaultImageError::Version { path, found });
            }
            None => return Err(damaged("it has no version".to_owned())),
        }
        if enveloped.crc32 != checksum(&enveloped.manifest) {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        let manifest: Self = serde_json::from_value(enveloped.manifest)
            .map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let longest = [
            self.regions.len(),
            self.crossings.len(),
            self.callbacks.len(),
            self.sections.len(),
        ];
        if longest.iter().any(|len| *len > MAX_LIST) {
            return Err("one of its lists is absurdly long".to_owned());
        }
        let mut end = 0;
        for region in &self.regions {
            let is_pages = |bytes: u64| bytes.is_multiple_of(PAGE_SIZE);
            let behind = region.gpa.checked_add(region.bytes);
            match behind.filter(|_| is_pages(region.gpa) && is_pages(region.bytes)) {
                Some(behind) if region.gpa >= end && region.bytes > 0 => end = behind,
                _ => return Err(format!("a region of memory at {:#x} is none", region.gpa)),
            }
        }
        let memory = self.memory_bytes();
        if memory == 0 || memory > MAX_MEMORY_BYTES {
            return Err(format!("it tells of {memory} bytes of memory"));
        }
        if self.files.memory.bytes != memory {
            return Err("its image is not as long as its memory".to_owned());
        }
        Ok(())
    }
}

/// CRC-32 of a value as compact JSON: how it is laid out in the file makes no difference.
fn checksum(value: &Value) -> u32 {
    crc32fast::hash(value.to_string().as_bytes())
}
