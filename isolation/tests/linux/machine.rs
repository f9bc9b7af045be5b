//! A Debian guest in this process, with a NIC on a gateway of its own and the agent's channel.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use agent_protocol::Client;
use agent_protocol::message::Exec;
use devices::dma::GuestMemory;
use devices::e1000::HoldableE1000;
use devices::e1000::{E1000, E1000Config};
use devices::hold::CheckpointBy;
use devices::pci::config::InterruptPin;
use devices::serial::SerialBackend;
use devices::virtio::console::Console;
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::gateway::{Gateway, GatewayConfig};
use isolation::attach::kernel_image::KernelImage;
use isolation::attach::plan::Wanted;
use isolation::attach::request::{Contain, IsolateRequest, Isolated};
use isolation::attach::{AttachError, DEFAULT_SLEEP_LIMIT, Isolator};
use isolation::compensation::effects::KernelModel;
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy, ReturnErrors};
use isolation::guest::addr::Gva;
use isolation::guest::btf::Btf;
use isolation::guest::module_text::{Site, SiteKind};
use isolation::guest::modules::{ModuleLayout, ModuleText};
use isolation::guest::paging::{AddressSpace, VirtMemory};
use isolation::guest::symbols::SymbolTable;
use isolation::status::{EntryStatus, ModuleStatus};
use recovery::model::Model;

use vmm::memory::MemorySource;
use vmm::{DEFAULT_COMMAND_LINE, OnGuestReset, Payload, Vm, VmConfig, VmHandle};

use crate::wire::CountingWire;

/// Time for a call: only one that hangs should reach it, in a lab that is busy with other things as
/// well.
const BUDGET: Duration = Duration::from_secs(30);

/// Time for a boot in the lab when it is busy.
const BOOT_TIME: Duration = Duration::from_secs(120);

/// Time to come to rest.
pub const REST_TIME: Duration = Duration::from_secs(60);

/// Runs calls that failed once more.
struct Retry;

impl FaultPolicy for Retry {
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault {
        match call.attempts {
            1 => AfterFault::Retry,
            _ => AfterFault::ReturnError,
        }
    }
}

/// What the command line of every guest ends with: `COFFERDAM_GUEST_APPEND`.
fn append_of_all() -> String {
    std::env::var("COFFERDAM_GUEST_APPEND").unwrap_or_default()
}

/// How modules are isolated.
pub struct Settings {
    /// Time that calls may wait for and remain atomic.
    pub sleep_limit: Duration,
    /// What calls that go on in the guest are journalled by.
    pub model: Option<KernelModel>,
    /// Whether calls that failed are run once more.
    pub retry: bool,
    /// How far calls are contained.
    pub contain: Contain,
    /// Further kernel functions that only the guest may run.
    pub guest_only: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sleep_limit: DEFAULT_SLEEP_LIMIT,
            model: None,
            retry: false,
            contain: Contain::Full,
            guest_only: Vec::new(),
        }
    }
}

/// A running guest.
pub struct Machine {
    pub agent: Client,
    pub isolator: Arc<Isolator>,
    pub handle: VmHandle,
    pub nic: Arc<Mutex<E1000>>,
    nic_slot: u8,
    link_losses: Arc<AtomicU64>,
    symbols: Arc<SymbolTable>,
    /// Read with the first module.
    /// Symbols and types of the guest's kernel.
    kernel: Option<(Arc<SymbolTable>, Arc<Btf>)>,
    images: PathBuf,
    /// First kernel message after the boot.
    boot_end: u64,
    /// How modules are isolated.
    pub settings: Settings,
    /// Marks that were set, with the symbols that were known.
    marks: BTreeMap<&'static str, Arc<SymbolTable>>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Machine {
    /// Boots a guest with `vcpus` vCPUs and `append` at the end of its command line.
    pub fn boot(vcpus: u8, append: &str) -> Self {
        let images =
            std::env::var_os("COFFERDAM_IMAGES").expect("COFFERDAM_IMAGES names the images");
        let images = PathBuf::from(images);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let console_log = std::fs::File::create(directory.path().join("console")).unwrap();
        let mut vm = Vm::new(VmConfig {
            memory_bytes: 256 << 20,
            memory: MemorySource::default(),
            vcpus,
            payload: Payload::Linux {
                kernel: images.join("vmlinux"),
                initrd: Some(images.join("initrd.cpio")),
                cmdline: format!("{DEFAULT_COMMAND_LINE} {append} {}", append_of_all()),
            },
            console: SerialBackend::Output(console_log),
            on_guest_reset: OnGuestReset::Exit,
        })
        .unwrap();
        let console = Console::new(
            "org.cofferdam.agent.0",
            UnixListener::bind(&socket).unwrap(),
        );
        let slot = vm.reserve_pci_slot().unwrap();
        let console = VirtioPciFunction::new(
            console.unwrap(),
            vm.dma_space(),
            slot.intx_line(InterruptPin::A),
            vm.msi_vectors(8).unwrap(),
        );
        let console = Arc::new(Mutex::new(console.unwrap()));
        vm.add_pci(&slot, console.clone()).unwrap();
        vm.add_subscriber(console);
        let link_losses = Arc::new(AtomicU64::new(0));
        let gateway = Gateway::new(&GatewayConfig::default()).unwrap();
        vm.add_subscriber(Arc::new(Mutex::new(gateway.timer())));
        let slot = vm.reserve_pci_slot().unwrap();
        let nic = E1000::new(
            E1000Config::new([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            vm.dma_space(),
            slot.intx_line(InterruptPin::A),
            Box::new(CountingWire {
                gateway,
                losses: link_losses.clone(),
            }),
        );
        let nic = Arc::new(Mutex::new(nic.unwrap()));
        vm.add_pci(&slot, nic.clone()).unwrap();
        vm.add_subscriber(nic.clone());
        let handle = vm.handle();
        let isolator = Isolator::attach(handle.clone()).unwrap();
        let thread = std::thread::spawn(move || {
            vm.run().unwrap();
        });
        let mut agent = Client::unix(&socket);
        agent.hello(BOOT_TIME).unwrap();
        agent.set_limit(Duration::from_secs(60));
        // The emulated processor's quirks make the kernel warn while it boots.
        let (_, boot_end) = agent.kmsg(0).unwrap();
        Self {
            boot_end,
            link_losses,
            settings: Settings::default(),
            marks: BTreeMap::new(),
            agent,
            isolator,
            handle,
            nic,
            nic_slot: slot.number(),
            symbols: Arc::new(SymbolTable::default()),
            kernel: None,
            images,
            thread: Some(thread),
            _directory: directory,
        }
    }

    /// Sets a mark where the guest is.
    pub fn mark(&mut self, name: &'static str) {
        self.agent.disconnect();
        self.handle.mark(name, REST_TIME).unwrap();
        self.marks.insert(name, self.symbols.clone());
    }

    pub fn has_mark(&self, name: &str) -> bool {
        self.marks.contains_key(name)
    }

    pub fn forget_mark(&mut self, name: &'static str) {
        self.handle.forget_mark(name).unwrap();
        self.marks.remove(name);
    }

    /// Takes the guest back to a mark, at which nothing is isolated.
    pub fn rewind(&mut self, name: &'static str) {
        self.agent.disconnect();
        self.handle.rewind(Some(name), REST_TIME).unwrap();
        assert!(self.isolator.status().is_empty());
        self.symbols = self.marks[name].clone();
        self.settings = Settings::default();
        self.agent.hello(BOOT_TIME).unwrap();
    }

    /// Runs a program in the guest, which must succeed, and returns what it wrote.
    pub fn run(&mut self, command: &str) -> String {
        self.run_within(Duration::from_secs(180), command)
    }

    /// The same with another limit.
    pub fn run_within(&mut self, limit: Duration, command: &str) -> String {
        let exec = Exec {
            argv: ["busybox", "sh", "-c", command].map(str::to_owned).to_vec(),
            limit_ms: Some(u64::try_from(limit.as_millis()).unwrap()),
            ..Exec::default()
        };
        let result = match self.agent.exec(exec) {
            Ok(result) => result,
            Err(error) => {
                self.print_status();
                panic!("{command}: {error}");
            }
        };
        let text = result.stdout_text();
        let errors = String::from_utf8_lossy(&result.stderr).into_owned();
        if !result.success() {
            self.print_status();
            panic!("{command}: {:?} {text} {errors}", result.end);
        }
        text
    }

    /// What is known of the functions of the guest's kernel.
    pub fn kernel_model(&mut self) -> KernelModel {
        let release = self.run("uname -r");
        let model = Model::for_release(release.trim());
        let model = model.unwrap_or_else(|| panic!("there is no model of {release}"));
        model.unwrap().for_isolation()
    }

    /// Loads a module and reads the guest's symbols anew.
    pub fn load(&mut self, module: &str, params: &str) {
        self.agent.load_module(module, params).unwrap();
        self.read_symbols(module);
    }

    fn read_symbols(&mut self, module: &str) {
        let kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => {
                let image = self.kernel_image(module);
                let types = Btf::parse(&image.types.unwrap(), None).unwrap();
                (image.symbols, Arc::new(types))
            }
        };
        let (base, types) = self.kernel.insert(kernel);
        let loaded = self.agent.modules(Some(module)).unwrap();
        let sections = &loaded[0].sections;
        let symbols = self
            .isolator
            .symbols_of_modules(module, sections, base, types);
        self.symbols = Arc::new(symbols.unwrap());
    }

    /// What the kernel has of itself in memory; `module` is loaded.
    pub fn kernel_image(&mut self, module: &str) -> KernelImage {
        let loaded = self.agent.modules(Some(module)).unwrap();
        let image = self.isolator.kernel_image(module, &loaded[0].sections);
        image.unwrap()
    }

    /// All symbols of the guest.
    pub fn symbols(&self) -> &SymbolTable {
        &self.symbols
    }

    /// Whether the kernel has a symbol of this name.
    pub fn has_symbol(&self, name: &str) -> bool {
        self.symbols.kernel_symbol(name).is_some()
    }

    /// Address of a symbol of the kernel's.
    pub fn symbol(&self, name: &str) -> u64 {
        self.symbols.kernel_symbol(name).unwrap().at.0
    }

    pub fn isolate(&mut self, module: &str, wanted: Wanted) -> Result<Isolated, AttachError> {
        let modules = self.agent.modules(Some(module)).unwrap();
        let device = (module == "e1000")
            .then(|| HoldableE1000::new(self.nic.clone(), CheckpointBy::Exact).unwrap());
        let file = self.images.join(format!("modules/{module}.ko"));
        let file = std::fs::read(file).unwrap();
        let of_kernel = self.kernel.as_ref().map(|(_, types)| types.clone());
        let types = Btf::from_elf(&file, of_kernel).unwrap();
        self.isolator.isolate(IsolateRequest {
            module: module.to_owned(),
            types: Some(Arc::new(types)),
            kernel: "6.1".to_owned(),
            contain: self.settings.contain,
            sections: modules[0].sections.clone(),
            symbols: self.symbols.clone(),
            wanted,
            model: self.settings.model.clone(),
            guest_only: self.settings.guest_only.clone(),
            device_slots: device.iter().map(|_| self.nic_slot).collect(),
            memory_moves: false,
            device: device.map(|device| Arc::new(device) as _),
            budget: BUDGET,
            policy: match self.settings.retry {
                true => Box::new(Retry),
                false => Box::new(ReturnErrors),
            },
            sleep_limit: self.settings.sleep_limit,
            keep_faults: None,
        })
    }

    /// What `read` finds in memory as the guest's kernel has it now.
    fn in_kernel_memory<T>(&self, read: impl Fn(&VirtMemory<'_, GuestMemory>) -> Option<T>) -> T {
        let memory = self.handle.ram().memory().clone();
        let found = self.handle.with_paused(|vcpus| {
            let sregs = vcpus.get(0).unwrap().get_sregs().unwrap();
            // With page-table isolation the kernel's tables are those beside the user's.
            let spaces = [sregs.cr3, sregs.cr3 & !0x1000]
                .map(|cr3| AddressSpace::from_registers(cr3, sregs.cr4, sregs.efer, 40));
            spaces.into_iter().find_map(|space| {
                read(&VirtMemory {
                    space,
                    memory: &*memory,
                })
            })
        });
        found.unwrap().unwrap()
    }

    /// The first bytes of a function of the kernel, as they are in the guest's memory now.
    pub fn kernel_code(&self, function: &str) -> Vec<u8> {
        let at = self.symbol(function);
        self.in_kernel_memory(|virt| virt.read_vec(Gva(at), 16).ok())
    }

    /// The text of a module as it is in the guest's memory now.
    pub fn module_text(&mut self, module: &str) -> ModuleText {
        let sections = self.agent.modules(Some(module)).unwrap()[0]
            .sections
            .clone();
        self.in_kernel_memory(|virt| {
            let layout = ModuleLayout::new(module, &sections, None, virt).ok()?;
            layout.read_text(virt).ok()
        })
    }

    /// Offsets in `function` of its direct calls of the kernel's `target`.
    pub fn calls_in(&mut self, module: &str, function: &str, target: &str) -> Vec<u64> {
        let scan = self.module_text(module).scan(&self.symbols).unwrap();
        let start = self.symbols.named(function).next().unwrap().at;
        let wanted = self.symbols.kernel_symbol(target).unwrap().at;
        let own = |site: &&Site| {
            let symbol = self.symbols.lookup(site.at);
            symbol.is_some_and(|(symbol, _)| symbol.name == function)
                && matches!(site.kind, SiteKind::Direct { target, .. } if target == wanted)
        };
        scan.sites()
            .iter()
            .filter(own)
            .map(|site| site.at.0 - start.0)
            .collect()
    }

    pub fn status(&self, module: &str) -> ModuleStatus {
        let all = self.isolator.status();
        all.into_iter()
            .find(|status| status.module == module)
            .unwrap()
    }

    pub fn entry(&self, module: &str, entry: &str) -> EntryStatus {
        let status = self.status(module);
        assert_eq!(status.broken, None);
        status
            .entries
            .into_iter()
            .find(|status| status.name == entry)
            .unwrap()
    }

    /// What the domains did so far, for whoever looks at a test.
    pub fn print_status(&self) {
        for status in self.isolator.status() {
            for entry in status.entries.iter().filter(|entry| entry.calls > 0) {
                let calls = entry.calls as f64;
                let per_call = |count: u64| count as f64 / calls;
                eprintln!(
                    "{:24} calls {} commits {} aborts {} kept out {} passed {:?} spilled {:?}; a call: crossings {:.1}, exits {:.2}, fills {:.2}, \
                     indirect {:.2}, callbacks {:.2}, rebuilds {:.2}, dirty {:.1}, bytes {:.0}, posted {:.1}, reads {:.1}, \
                     syscalls {:.1}, {:.0} us, of which {:.0} us until others were held, longest {} us",
                    entry.name,
                    entry.calls,
                    entry.commits,
                    entry.aborts,
                    entry.kept_out,
                    entry.pass_throughs,
                    entry.spills,
                    per_call(entry.crossings),
                    per_call(entry.private_exits),
                    per_call(entry.fills),
                    per_call(entry.indirect_calls),
                    per_call(entry.callbacks),
                    per_call(entry.rebuilds),
                    per_call(entry.dirty_pages),
                    per_call(entry.committed_bytes),
                    per_call(entry.posted_writes),
                    per_call(entry.device_reads),
                    per_call(entry.other_syscalls),
                    per_call(entry.total_ns) / 1e3,
                    per_call(entry.holding_ns) / 1e3,
                    entry.longest_ns / 1000,
                );
            }
            if let Some(broken) = status.broken {
                eprintln!("  broken: {broken}");
            }
            for report in self.isolator.reports(&status.module).unwrap_or_default() {
                eprintln!("  {report}");
            }
        }
    }

    /// How often the far end of the wire saw the link go.
    pub fn link_losses(&self) -> u64 {
        self.link_losses.load(Ordering::Relaxed)
    }

    /// Kernel messages that no healthy guest writes.
    pub fn assert_healthy(&mut self) {
        let (records, _) = self.agent.kmsg(self.boot_end).unwrap();
        for record in records {
            for bad in [
                "BUG:",
                "WARNING: CPU",
                "Oops",
                "Call Trace",
                "soft lockup",
                "stall",
            ] {
                assert!(!record.text.contains(bad), "dmesg: {}", record.text);
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let stopped = self.handle.power_off().is_ok();
        if let Some(thread) = self.thread.take()
            && stopped
        {
            let _ = thread.join();
        }
    }
}
