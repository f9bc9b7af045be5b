//! The same protocol in other words: with the crate `vfio_user` at the other end.

use std::fs::File;
use std::io::Error;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use devices::irq::IrqLine;
use devices::pci::PciFunction;
use devices::pci::config::offset;
use devices::vfio_user::message::INTX;
use devices::vfio_user::{Client, VfioUserFunction};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::{Host, LIMITS, Lines, eventually, memfd, memory};

#[test]
fn another_client_uses_our_server() {
    let host = Host::new("e1000");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || vfio_user::Client::new(&path).unwrap());
    let served = host.serve(listener.accept().unwrap().0);
    let mut client = other.join().unwrap();
    let registers = client.region(0).unwrap();
    assert_eq!(registers.size, 128 << 10);
    assert_eq!(client.region(7).unwrap().size, 256);
    let mut ids = [0; 4];
    client.region_read(7, 0, &mut ids).unwrap();
    assert_eq!(ids, [0x86, 0x80, 0x0e, 0x10]);
    let irq = client.get_irq_info(INTX).unwrap();
    assert_eq!((irq.index, irq.count), (0, 1));
    let file = memfd(1 << 20);
    client
        .dma_map(0, 0x10_0000, 1 << 20, file.as_raw_fd())
        .unwrap();
    assert_eq!(host.offered.dma.regions()[0].address, 0x10_0000);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client
        .set_irqs(INTX, flags, 0, 1, &[event.as_raw_fd()])
        .unwrap();
    // IMS, then ICS: the card interrupts.
    client.region_write(0, 0xd0, &4_u32.to_le_bytes()).unwrap();
    client.region_write(0, 0xc8, &4_u32.to_le_bytes()).unwrap();
    eventually(|| event.read().ok());
    client.dma_unmap(0x10_0000, 1 << 20).unwrap();
    client.reset().unwrap();
    assert!(host.offered.dma.regions().is_empty());
    client.shutdown().unwrap();
    served.gone();
}

/// A device of 4 KiB of memory that interrupts when its last byte is written.
struct Backend {
    config: Vec<u8>,
    registers: Vec<u8>,
    seen: Arc<Mutex<Vec<String>>>,
    trigger: Option<File>,
}

fn refused() -> Error {
    Error::from_raw_os_error(libc::EIO)
}

impl Backend {
    fn region(&mut self, region: u32) -> &mut Vec<u8> {
        match region {
            7 => &mut self.config,
            _ => &mut self.registers,
        }
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, at: u64, data: &mut [u8]) -> Result<(), Error> {
        let at = at as usize;
        let bytes = self.region(region).get(at..at + data.len());
        data.copy_from_slice(bytes.ok_or_else(refused)?);
        Ok(())
    }

    fn region_write(&mut self, region: u32, at: u64, data: &[u8]) -> Result<(), Error> {
        let at = at as usize;
        let bytes = self.region(region).get_mut(at..at + data.len());
        bytes.ok_or_else(refused)?.copy_from_slice(data);
        if region == 0
            && at == 0xfff
            && let Some(trigger) = &mut self.trigger
        {
            std::io::Write::write_all(trigger, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> Result<(), Error> {
        let seen = format!("map {address:#x} {size:#x} {offset:#x} {}", fd.is_some());
        self.seen.lock().unwrap().push(seen);
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> Result<(), Error> {
        self.seen
            .lock()
            .unwrap()
            .push(format!("unmap {address:#x} {size:#x}"));
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.seen.lock().unwrap().push("reset".to_owned());
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        mut fds: Vec<File>,
    ) -> Result<(), Error> {
        let seen = format!("irqs {index} {flags:#x} {start} {count} {}", fds.len());
        self.seen.lock().unwrap().push(seen);
        if flags & VFIO_IRQ_SET_ACTION_TRIGGER != 0 {
            self.trigger = fds.pop();
        }
        Ok(())
    }
}

#[test]
fn our_client_uses_another_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let region = |index: u32, size: u64| ServerRegion {
        region_info: vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            flags: 3,
            index,
            cap_offset: 0,
            size,
            offset: 0,
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let sizes = [0x1000, 0, 0, 0, 0, 0, 0, 256, 0];
    let regions = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| region(index as u32, *size));
    let irqs = (0..5).map(|index| IrqInfo {
        index,
        flags: 1,
        count: u32::from(index == 0),
    });
    let server = vfio_user::Server::new(&path, true, irqs.collect(), regions.collect()).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut config = vec![0; 256];
    config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
    config[usize::from(offset::INTERRUPT_PIN)] = 1;
    let mut backend = Backend {
        config,
        registers: vec![0; 0x1000],
        seen: seen.clone(),
        trigger: None,
    };
    let thread = std::thread::spawn(move || server.run(&mut backend));
    let (dma, _file) = memory(1 << 20);
    let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let client = Client::new(stream, dma, LIMITS).unwrap();
    let lines = Lines::new(0);
    let intx: Arc<dyn IrqLine> = lines.clone();
    let mut function = VfioUserFunction::new(client, intx, &mut |_| Err("none".into())).unwrap();
    let trigger_and_unmask = ["irqs 0 0x24 0 1 1", "irqs 0 0x14 0 1 1"].map(str::to_owned);
    let mapped = ["reset".to_owned(), "map 0x0 0x100000 0x0 true".to_owned()];
    assert_eq!(*seen.lock().unwrap(), [mapped, trigger_and_unmask].concat());
    let mut ids = [0; 4];
    function.config_read(0, &mut ids);
    assert_eq!(ids, [0x34, 0x12, 0x78, 0x56]);
    function.config_write(offset::BAR0, &[0xff; 4]);
    let mut bar = [0; 4];
    function.config_read(offset::BAR0, &mut bar);
    assert_eq!(u32::from_le_bytes(bar), 0xffff_f000, "4 KiB");
    function.bar_write(0, 0x10, &[1, 2, 3, 4]);
    let mut data = [0; 4];
    function.bar_read(0, 0x10, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    function.bar_write(0, 0xfff, &[1]);
    lines.triggered();
    assert!(function.is_connected());
    drop(function);
    thread.join().unwrap().unwrap();
}
