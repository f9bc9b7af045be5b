//! The memory of a client: what of it can be mapped, and what becomes of it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use devices::dma::{DmaListener, DmaRegion};
use devices::vfio_user::ServerEvent;
use devices::vfio_user::message::{Command, DmaMap, DmaUnmap, Payload, RegionAccess, UNMAP_ALL};

use crate::raw::{Raw, header};
use crate::support::{Host, PATIENCE, eventually, memfd};

const MIB: u64 = 1 << 20;

fn map(address: u64, size: u64, offset: u64) -> DmaMap {
    DmaMap {
        flags: 3,
        offset,
        address,
        size,
    }
}

fn give(raw: &mut Raw, map: &DmaMap, file: &File) -> Result<Vec<u8>, i32> {
    raw.ask_with(Command::DmaMap, &map.to_bytes(), &[file.as_fd()])
}

fn take(raw: &mut Raw, flags: u32, address: u64, size: u64) -> Result<Vec<u8>, i32> {
    let unmap = DmaUnmap {
        flags,
        address,
        size,
    };
    raw.ask(Command::DmaUnmap, &unmap.to_bytes())
}

/// Addresses of regions that have gone and come, for each change.
#[derive(Default)]
struct Heard(Mutex<Vec<(Vec<u64>, Vec<u64>)>>);

impl DmaListener for Heard {
    fn changed(&self, removed: &[DmaRegion], added: &[DmaRegion]) {
        let places = |all: &[DmaRegion]| all.iter().map(|one| one.address).collect();
        let heard = (places(removed), places(added));
        self.0.lock().unwrap().push(heard);
    }
}

#[test]
fn what_is_mapped_is_reached_until_it_is_unmapped() {
    let host = Host::new("e1000");
    let heard = Arc::new(Heard::default());
    let listener: Arc<dyn DmaListener> = heard.clone();
    host.offered.dma.listen(Arc::downgrade(&listener));
    let (mut raw, _served) = Raw::on(&host);
    let file = memfd(4 * MIB);
    give(&mut raw, &map(4 * MIB, MIB, MIB), &file).unwrap();
    give(&mut raw, &map(0, MIB, 0), &file).unwrap();
    give(&mut raw, &map(MIB, 3 * MIB, MIB), &file).unwrap();
    let dma = &host.offered.dma;
    assert_eq!(dma.regions().len(), 3);
    dma.write(4 * MIB - 8, &[7; 16]).unwrap();
    let mut seen = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, MIB).unwrap();
    assert_eq!(seen, [7; 8]);
    for strange in [
        (0, 2 * MIB),
        (1, MIB),
        (MIB, MIB),
        (MIB, 4 * MIB),
        (8 * MIB, MIB),
    ] {
        assert_eq!(take(&mut raw, 0, strange.0, strange.1), Err(libc::ENOENT));
    }
    assert_eq!(take(&mut raw, 1, 0, MIB), Err(libc::EINVAL));
    assert_eq!(take(&mut raw, UNMAP_ALL, 0, MIB), Err(libc::EINVAL));
    take(&mut raw, 0, MIB, 3 * MIB).unwrap();
    assert!(dma.read(MIB, &mut [0]).is_err());
    assert!(dma.read(0, &mut [0]).is_ok());
    assert_eq!(take(&mut raw, 0, MIB, 3 * MIB), Err(libc::ENOENT));
    take(&mut raw, UNMAP_ALL, 0, 0).unwrap();
    assert!(dma.read(0, &mut [0]).is_err());
    // Each change was told before its message was answered.
    let told = heard.0.lock().unwrap().clone();
    let changes = [
        (vec![], vec![4 * MIB]),
        (vec![], vec![0]),
        (vec![], vec![MIB]),
        (vec![MIB], vec![]),
        (vec![0, 4 * MIB], vec![]),
    ];
    assert_eq!(told, changes);
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    let file = memfd(2 * MIB);
    give(&mut raw, &map(16 * MIB, MIB, 0), &file).unwrap();
    let cases = [
        (map(0x800, MIB, 0), libc::EINVAL),
        (map(0, 0x1800, 0), libc::EINVAL),
        (map(0, MIB, 0x10), libc::EINVAL),
        (map(0, 0, 0), libc::EINVAL),
        (map(u64::MAX - 0xfff, 0x2000, 0), libc::EINVAL),
        (map(0, 3 * MIB, 0), libc::EINVAL),
        (map(0, MIB, 2 * MIB), libc::EINVAL),
        (map(0, MIB, !0xfff), libc::EINVAL),
        (map(32 * MIB, 1 << 62, 0), libc::ENOSPC),
        (map(16 * MIB, MIB, MIB), libc::EEXIST),
        (map(16 * MIB + 0x1000, 0x1000, 0), libc::EEXIST),
        (map(15 * MIB, 2 * MIB, 0), libc::EEXIST),
        (
            DmaMap {
                flags: 1,
                ..map(0, MIB, 0)
            },
            libc::EOPNOTSUPP,
        ),
        (
            DmaMap {
                flags: 7,
                ..map(0, MIB, 0)
            },
            libc::EOPNOTSUPP,
        ),
    ];
    for (map, errno) in cases {
        assert_eq!(give(&mut raw, &map, &file), Err(errno), "{map:?}");
    }
    let good = map(0, MIB, 0);
    let bytes = good.to_bytes();
    assert_eq!(
        raw.ask(Command::DmaMap, &bytes),
        Err(libc::EOPNOTSUPP),
        "no file"
    );
    let two = [file.as_fd(), file.as_fd()];
    assert_eq!(
        raw.ask_with(Command::DmaMap, &bytes, &two),
        Err(libc::EOPNOTSUPP)
    );
    let on_disk = File::open(std::env::current_exe().unwrap()).unwrap();
    assert!(give(&mut raw, &good, &on_disk).is_err());
    let read_only = File::open(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file)
    ));
    assert!(give(&mut raw, &good, &read_only.unwrap()).is_err());
    assert_eq!(host.offered.dma.regions().len(), 1);
    give(&mut raw, &good, &file).unwrap();
}

#[test]
fn a_client_maps_so_much_and_no_more() {
    let host = Host::new("e1000");
    let (mut raw, served) = Raw::on(&host);
    let file = memfd(0x1000);
    let mut given = 0_u64;
    while give(&mut raw, &map(given * 0x1000, 0x1000, 0), &file).is_ok() {
        given += 1;
    }
    assert_eq!(given, 512);
    let last = give(&mut raw, &map(given * 0x1000, 0x1000, 0), &file);
    assert_eq!(last, Err(libc::ENOSPC));
    drop(raw);
    served.gone();
    assert!(host.offered.dma.regions().is_empty());
}

#[test]
fn memory_that_is_taken_away_from_under_the_device_reads_as_zeros_and_ends_the_connection() {
    let host = Host::new("e1000");
    let (mut raw, served) = Raw::on(&host);
    let file = memfd(MIB);
    give(&mut raw, &map(0, MIB, 0), &file).unwrap();
    let dma = &host.offered.dma;
    dma.write(0, &[7; 0x3000]).unwrap();
    file.set_len(0x1000).unwrap();
    let mut data = [1; 0x2000];
    dma.read(0, &mut data).unwrap();
    assert_eq!((data[0xfff], data[0x1000]), (7, 0));
    dma.write(0x8_0000, &[9; 0x1000]).unwrap();
    let read = RegionAccess {
        offset: 0,
        region: 7,
        count: 4,
        data: vec![],
    };
    let payload = read.to_bytes();
    raw.send(header(Command::RegionRead, 1, payload.len()), &payload);
    assert!(raw.is_closed());
    assert!(served.gone().contains("memory"));
    assert!(dma.read(0, &mut [0]).is_err());
    // The next client has nothing of it.
    let (mut raw, next) = Raw::on(&host);
    give(&mut raw, &map(0, MIB, 0), &memfd(MIB)).unwrap();
    raw.works();
    let first = next.events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(first, ServerEvent::Negotiated);
    eventually(|| dma.read(0, &mut [0]).ok());
}
