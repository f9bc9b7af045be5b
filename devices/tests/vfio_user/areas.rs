//! Regions that a server lets be mapped: what of them a guest is given, and what becomes of servers
//! that say what cannot be.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::dma::DmaSpace;
use devices::irq::IrqLine;
use devices::pci::PciFunction;
use devices::vfio_user::message::{
    CONFIG_REGION, Command, MSIX, Payload, REGION_MMAP, REGION_READ, REGION_WRITE, RegionAccess,
    RegionInfo,
};
use devices::vfio_user::{Client, FunctionError, VfioUserFunction};

use crate::client::{good, reply};
use crate::raw::Raw;
use crate::support::{LIMITS, Lines, memfd};

const BAR_BYTES: u64 = 0x8000;
/// Where the region is in its file.
const IN_FILE: u64 = 0x3000;
/// Where MSI-X has its table in the register: 3 vectors.
const TABLE: u32 = 0x2000;
const ALL_FLAGS: u32 = REGION_READ | REGION_WRITE | REGION_MMAP;

/// Configuration space of a function with a register in memory, and MSI-X.
fn config() -> Vec<u8> {
    let mut config = vec![0; 256];
    config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
    config[6] = 0x10; // It has capabilities.
    config[0x34] = 0x40;
    config[0x40..0x44].copy_from_slice(&[0x11, 0, 2, 0]);
    config[0x44..0x48].copy_from_slice(&TABLE.to_le_bytes());
    config
}

/// The register as a region of which all can be mapped.
fn whole() -> RegionInfo {
    RegionInfo {
        argsz: RegionInfo::BYTES,
        flags: ALL_FLAGS,
        index: 0,
        size: BAR_BYTES,
        offset: IN_FILE,
        areas: None,
    }
}

fn sparse(areas: &[(u64, u64)]) -> RegionInfo {
    // Built by its bytes, as those that cannot be are refused elsewhere.
    let area = |&(offset, size): &(u64, u64)| devices::vfio_user::message::Area { offset, size };
    let mut region = whole();
    region.areas = Some(areas.iter().map(area).collect());
    region.argsz = region.whole();
    region
}

/// A server of such a function whose register is `region`, in `files`. Gives, at its end, which of
/// the stores to it wanted a reply.
fn serve(region: RegionInfo, files: Vec<Arc<File>>) -> (UnixStream, JoinHandle<Vec<bool>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut raw = Raw::new(theirs);
        let mut waited = Vec::new();
        while let Some((header, payload)) = raw.receive() {
            let command = Command::from_number(header.command).unwrap();
            let (mut answer, mut fds) = (good_or_config(&header, &payload), Vec::new());
            match command {
                Command::GetRegionInfo if payload[8] == 0 => {
                    let room = u32::from_le_bytes(payload[..4].try_into().unwrap()) as usize;
                    answer = region.to_bytes();
                    if room >= answer.len() {
                        fds.extend(files.iter().map(|file| file.as_fd()));
                    }
                    answer.truncate(room);
                }
                Command::GetIrqInfo if u32::from(payload[8]) == MSIX => {
                    answer[12..16].copy_from_slice(&3_u32.to_le_bytes());
                }
                Command::RegionWrite if payload[8] == 0 => waited.push(!header.wants_no_reply()),
                _ => {}
            }
            match header.wants_no_reply() {
                true => {}
                false if fds.is_empty() => raw.send(reply(&header, &answer), &answer),
                false => raw.send_with(reply(&header, &answer), &answer, &fds),
            }
        }
        waited
    });
    (ours, thread)
}

fn good_or_config(header: &devices::vfio_user::message::Header, payload: &[u8]) -> Vec<u8> {
    if header.command == Command::RegionRead as u16 {
        let mut access = RegionAccess::parse(payload).unwrap();
        let start = access.offset as usize;
        if access.region == CONFIG_REGION {
            access.data = config()[start..start + access.count as usize].to_vec();
            return access.to_bytes();
        }
    }
    good(header, payload)
}

fn function(stream: UnixStream) -> Result<VfioUserFunction, FunctionError> {
    let client = Client::new(stream, DmaSpace::empty(), LIMITS)?;
    let lines = Lines::new(3);
    let intx: Arc<dyn IrqLine> = lines.clone();
    VfioUserFunction::new(client, intx, &mut |_| Ok(lines.clone()))
}

fn file() -> Arc<File> {
    Arc::new(memfd(IN_FILE + BAR_BYTES))
}

fn ranges(function: &VfioUserFunction) -> Vec<(u64, u64)> {
    let areas = function.areas().iter();
    areas
        .map(|area| (area.range().start, area.range().end))
        .collect()
}

/// The areas of a function whose server answers so, which works otherwise.
fn areas_of(region: RegionInfo, files: Vec<Arc<File>>) -> Vec<(u64, u64)> {
    let (stream, thread) = serve(region, files);
    let mut function = function(stream).unwrap();
    let mut data = [0; 4];
    function.bar_read(0, 0x10, &mut data);
    assert_eq!(data, [5; 4]);
    let ranges = ranges(&function);
    drop(function);
    thread.join().unwrap();
    ranges
}

#[test]
fn what_a_server_lets_be_mapped_is_given_to_the_guest_but_for_the_vector_table() {
    let file = file();
    let (stream, thread) = serve(
        sparse(&[(0x1000, 0x2800), (0x4000, 0x1000)]),
        vec![file.clone()],
    );
    let mut machine = function(stream).unwrap();
    assert_eq!(ranges(&machine), [(0x1000, 0x2000), (0x4000, 0x5000)]);
    file.write_all_at(b"seen", IN_FILE + 0x4010).unwrap();
    let at = machine.areas()[1].memory().host_address() + 0x10;
    // SAFETY: within the area's page, which is mapped as long as there is the area.
    let seen = unsafe { (at as *const [u8; 4]).read_volatile() };
    assert_eq!(&seen, b"seen");
    // Elsewhere it is spoken to; and stores are waited for, as those to the areas would pass them.
    machine.bar_write(0, 0x10, &[1, 2, 3, 4]);
    // A server that has gone has no memory.
    machine.disconnect("it is tested");
    assert!(machine.areas().is_empty());
    assert_eq!(thread.join().unwrap(), [true]);
    let (stream, thread) = serve(whole(), vec![file]);
    machine.reconnect(stream).unwrap();
    assert_eq!(ranges(&machine), [(0, 0x2000), (0x3000, BAR_BYTES)]);
    drop(machine);
    // The table of vectors is written when it is connected anew.
    assert!(thread.join().unwrap().iter().all(|waited| *waited));
}

#[test]
fn without_areas_stores_are_posted_as_ever() {
    let (stream, thread) = serve(whole(), Vec::new());
    let mut machine = function(stream).unwrap();
    assert_eq!(ranges(&machine), []);
    machine.bar_write(0, 0x10, &[1, 2, 3, 4]);
    drop(machine);
    assert_eq!(thread.join().unwrap(), [false]);
}

#[test]
fn a_file_that_cannot_be_mapped_is_none_and_everything_goes_by_messages() {
    let short = Arc::new(memfd(IN_FILE + BAR_BYTES - 1));
    let on_disk = Arc::new(File::open("/proc/self/exe").unwrap());
    let pipe = std::io::pipe().unwrap();
    let pipe = Arc::new(File::from(std::os::fd::OwnedFd::from(pipe.0)));
    for files in [
        vec![on_disk],
        vec![pipe],
        vec![file(), file()],
        vec![Arc::new(memfd(0))],
    ] {
        assert_eq!(areas_of(whole(), files), []);
    }
    // As far as it goes.
    assert_eq!(areas_of(whole(), vec![short]), [(0, 0x2000)]);
    let read_only = RegionInfo {
        flags: REGION_READ | REGION_MMAP,
        ..whole()
    };
    assert_eq!(areas_of(read_only, vec![file()]), []);
    let not_said = RegionInfo {
        flags: REGION_READ | REGION_WRITE,
        ..whole()
    };
    assert_eq!(areas_of(not_said, vec![file()]), []);
    let crooked = RegionInfo {
        offset: IN_FILE + 0x10,
        ..whole()
    };
    assert_eq!(areas_of(crooked, vec![file()]), []);
    // Parts of pages are none, and neither is nothing.
    assert_eq!(
        areas_of(sparse(&[(0x800, 0x1000), (0, 0)]), vec![file()]),
        []
    );
    // A list of no areas is not all of it.
    assert_eq!(areas_of(sparse(&[]), vec![file()]), []);
}

#[test]
fn areas_that_cannot_be_are_the_end_of_the_server() {
    for areas in [
        &[(0, BAR_BYTES + 1)][..],
        &[(BAR_BYTES, 0x1000)],
        &[(u64::MAX, 2)],
        &[(u64::MAX - 0xfff, 0x1000)],
        &[(0x1000, 0x2000), (0x2000, 0x1000)],
        &[(0x4000, 0x1000), (0x4000, 0x1000)],
        &[(0, 0x1000); 257],
    ] {
        let (stream, thread) = serve(sparse(areas), vec![file()]);
        let refused = function(stream).err().unwrap();
        assert!(
            matches!(
                refused,
                FunctionError::Unusable(_) | FunctionError::Client(_)
            ),
            "{refused}"
        );
        thread.join().unwrap();
    }
    let nowhere = RegionInfo {
        offset: u64::MAX - 0xfff,
        ..whole()
    };
    let (stream, thread) = serve(nowhere, vec![file()]);
    assert!(matches!(function(stream), Err(FunctionError::Unusable(_))));
    thread.join().unwrap();
}

#[test]
fn a_server_has_no_more_mapped_than_there_is_room_for() {
    // Every other page of its region.
    let pages: Vec<_> = (0..64).map(|page| (page * 0x2000, 0x1000)).collect();
    let many = RegionInfo {
        size: 1 << 20,
        ..sparse(&pages)
    };
    let file = Arc::new(memfd(IN_FILE + (1 << 20)));
    let areas = areas_of(many, vec![file]);
    assert_eq!(areas.len(), 16);
    assert_eq!(areas[0], (0, 0x1000));
    let huge = RegionInfo {
        size: 1 << 31,
        offset: 0,
        ..sparse(&[(0, 0x1000), (0x3000, 0x4000_0000), (0x4000_4000, 0x1000)])
    };
    let file = Arc::new(memfd(1 << 31));
    // One that is too large costs those behind it nothing.
    assert_eq!(
        areas_of(huge, vec![file]),
        [(0, 0x1000), (0x4000_4000, 0x4000_5000)]
    );
}

/// What the crate `vfio_user` has at its end of it.
struct Backend(Arc<Mutex<Vec<u64>>>);

impl vfio_user::ServerBackend for Backend {
    fn region_read(&mut self, region: u32, at: u64, data: &mut [u8]) -> std::io::Result<()> {
        match region {
            CONFIG_REGION => data.copy_from_slice(&config()[at as usize..at as usize + data.len()]),
            _ => data.fill(7),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, at: u64, _data: &[u8]) -> std::io::Result<()> {
        if region == 0 {
            self.0.lock().unwrap().push(at);
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: vfio_user::DmaMapFlags,
        _offset: u64,
        _address: u64,
        _size: u64,
        _fd: Option<File>,
    ) -> std::io::Result<()> {
        Ok(())
    }

    fn dma_unmap(
        &mut self,
        _flags: vfio_user::DmaUnmapFlags,
        _address: u64,
        _size: u64,
    ) -> std::io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _index: u32,
        _flags: u32,
        _start: u32,
        _count: u32,
        _fds: Vec<File>,
    ) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn another_servers_areas_are_mapped() {
    use std::os::fd::AsRawFd;
    use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let file = file();
    let area = |offset, size| vfio_user::SparseArea {
        area: vfio_region_sparse_mmap_area { offset, size },
    };
    let region = |index: u32, size: u64| vfio_user::ServerRegion {
        region_info: vfio_region_info {
            argsz: RegionInfo::BYTES,
            flags: if index == 0 { ALL_FLAGS } else { 3 },
            index,
            cap_offset: 0,
            size,
            offset: if index == 0 { IN_FILE } else { 0 },
        },
        sparse_areas: match index {
            0 => vec![area(0, 0x1000), area(0x4000, 0x4000)],
            _ => Vec::new(),
        },
        mmap_fd: (index == 0).then(|| file.as_raw_fd()),
    };
    let regions = (0..9).map(|index| match index {
        0 => region(0, BAR_BYTES),
        7 => region(7, 256),
        index => region(index, 0),
    });
    let irqs = (0..5).map(|index| vfio_user::IrqInfo {
        index,
        flags: 1,
        count: 0,
    });
    let server = vfio_user::Server::new(&path, true, irqs.collect(), regions.collect()).unwrap();
    let stores = Arc::new(Mutex::new(Vec::new()));
    let mut backend = Backend(stores.clone());
    let thread = std::thread::spawn(move || server.run(&mut backend));
    let mut machine = function(UnixStream::connect(&path).unwrap()).unwrap();
    assert_eq!(ranges(&machine), [(0, 0x1000), (0x4000, BAR_BYTES)]);
    file.write_all_at(b"there", IN_FILE + 0x7ff0).unwrap();
    let at = machine.areas()[1].memory().host_address() + 0x3ff0;
    // SAFETY: within the area, which is mapped as long as there is the area.
    let seen = unsafe { (at as *const [u8; 5]).read_volatile() };
    assert_eq!(&seen, b"there");
    machine.bar_write(0, 0x1008, &[1, 2, 3, 4]);
    assert_eq!(*stores.lock().unwrap(), [0x1008], "it is waited for");
    drop(machine);
    thread.join().unwrap().unwrap();
}
