//! A card in another process, as far as a thread can be one: the crate `vfio_user` serves it.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use devices::pci::config::InterruptPin;
use devices::vfio_user::{Client, Limits, VfioUserFunction};
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};
use vmm::{PciSlot, Vm};

pub const PAGE: u64 = 0x1000;
/// The page of its register that can be mapped.
pub const MAPPED: u64 = PAGE;
const BAR_BYTES: u64 = 4 * PAGE;
/// Where the register is in its file.
const IN_FILE: u64 = 2 * PAGE;
/// `VFIO_REGION_INFO_FLAG_` READ, WRITE and MMAP.
const FLAGS: [u32; 2] = [3, 7];
const CONFIG: u32 = 7;

/// See the module.
pub struct Remote {
    file: Arc<File>,
    accesses: Arc<AtomicU64>,
    path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

struct Backend {
    config: Vec<u8>,
    file: Arc<File>,
    accesses: Arc<AtomicU64>,
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, at: u64, data: &mut [u8]) -> Result<()> {
        if region == CONFIG {
            let bytes = self.config.get(at as usize..at as usize + data.len());
            data.copy_from_slice(bytes.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?);
            return Ok(());
        }
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.file.read_exact_at(data, IN_FILE + at)
    }

    fn region_write(&mut self, region: u32, at: u64, data: &[u8]) -> Result<()> {
        if region == CONFIG {
            return Ok(());
        }
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.file.write_all_at(data, IN_FILE + at)
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        _address: u64,
        _size: u64,
        _fd: Option<File>,
    ) -> Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, _address: u64, _size: u64) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _index: u32,
        _flags: u32,
        _start: u32,
        _count: u32,
        _fds: Vec<File>,
    ) -> Result<()> {
        Ok(())
    }
}

impl Remote {
    /// Serves until its client has gone.
    pub fn new() -> Self {
        let fd = rustix::fs::memfd_create("card", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(fd));
        file.set_len(IN_FILE + BAR_BYTES).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mappable = file.as_raw_fd();
        let region = |index: u32| {
            let (size, can_be) = match index {
                0 => (BAR_BYTES, true),
                CONFIG => (256, false),
                _ => (0, false),
            };
            let area = SparseArea {
                area: vfio_region_sparse_mmap_area {
                    offset: MAPPED,
                    size: PAGE,
                },
            };
            ServerRegion {
                region_info: vfio_region_info {
                    argsz: size_of::<vfio_region_info>() as u32,
                    flags: FLAGS[usize::from(can_be)],
                    index,
                    cap_offset: 0,
                    size,
                    offset: if can_be { IN_FILE } else { 0 },
                },
                sparse_areas: if can_be { vec![area] } else { Vec::new() },
                mmap_fd: can_be.then_some(mappable),
            }
        };
        let regions = (0..9).map(region).collect();
        let irq = |index| IrqInfo {
            index,
            flags: 1,
            count: 0,
        };
        let server = Server::new(&path, true, (0..5).map(irq).collect(), regions).unwrap();
        let accesses = Arc::new(AtomicU64::new(0));
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        let mut backend = Backend {
            config,
            file: file.clone(),
            accesses: accesses.clone(),
        };
        std::thread::spawn(move || server.run(&mut backend));
        Self {
            file,
            accesses,
            path,
            _folder: folder,
        }
    }

    /// Its card, for a slot of a machine.
    pub fn function(&self, vm: &mut Vm, slot: &PciSlot) -> Arc<Mutex<VfioUserFunction>> {
        let stream = UnixStream::connect(&self.path).unwrap();
        let client = Client::new(stream, vm.dma_space(), Limits::default()).unwrap();
        let line = slot.intx_line(InterruptPin::A);
        let function = VfioUserFunction::new(client, line, &mut |_| Err("none".into()));
        let function = Arc::new(Mutex::new(function.unwrap()));
        vm.add_subscriber(function.clone());
        function
    }

    /// Accesses to its register that came by messages.
    pub fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::SeqCst)
    }

    /// What is in its register.
    pub fn word(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.file
            .read_exact_at(&mut data, IN_FILE + offset)
            .unwrap();
        u32::from_le_bytes(data)
    }
}
