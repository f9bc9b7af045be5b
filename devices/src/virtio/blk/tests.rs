//! A disk as its driver uses it, and as no driver should.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::virtio::testing::Driver;

const SECTORS: u64 = 64;

struct Machine {
    driver: Driver<Block>,
    directory: TempDir,
}

fn image(directory: &TempDir, content: &[u8]) -> PathBuf {
    let path = directory.path().join("disk.img");
    std::fs::write(&path, content).unwrap();
    path
}

fn content() -> Vec<u8> {
    (0..SECTORS * SECTOR_BYTES)
        .map(|n| (n / SECTOR_BYTES) as u8 + 1)
        .collect()
}

impl Machine {
    fn new(read_only: bool, features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::open(&image(&directory, &content()), read_only).unwrap();
        let mut driver = Driver::new(Block::new(disk, "serial-1"));
        driver.enable_msix();
        driver.start(features);
        Self { driver, directory }
    }

    /// Sends a request; returns its data and status.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> (Vec<u8>, u8) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let head = if room == 0 {
            self.driver.post(0, &[&header, out], &[1])
        } else {
            self.driver.post(0, &[&header, out], &[room, 1])
        };
        self.driver.kick(0);
        let used = self.driver.used(0);
        assert_eq!((used.len(), used[0].head), (1, head));
        assert_eq!(self.driver.vectors.take_triggered(), [1]);
        let mut data = used[0].data.clone();
        let status = data.pop().unwrap();
        (data, status)
    }

    fn on_host(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("disk.img")).unwrap()
    }
}

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    let mut machine = Machine::new(false, F_FLUSH);
    let (data, status) = machine.request(T_IN, 3, &[], 1024);
    assert_eq!((data[0], data[1023], status), (4, 5, S_OK));
    assert_eq!(machine.request(T_OUT, 5, &[0xaa; 1536], 0).1, S_OK);
    assert_eq!(machine.request(T_FLUSH, 0, &[], 0).1, S_OK);
    let (data, _) = machine.request(T_IN, 4, &[], 512 * 5);
    assert_eq!(data[..512], [5; 512]);
    assert_eq!(data[512..2048], [0xaa; 1536]);
    assert_eq!(data[2048..], [9; 512]);
    assert_eq!(machine.on_host()[5 * 512..8 * 512], [0xaa; 1536]);
}

#[test]
fn header_data_and_status_may_be_cut_into_any_buffers() {
    let mut machine = Machine::new(false, 0);
    let header = [&T_OUT.to_le_bytes()[..], &[0; 4], &9u64.to_le_bytes()].concat();
    let out: [&[u8]; 4] = [
        &header[..5],
        &[&header[5..], &[1; 100]].concat(),
        &[1; 400],
        &[1; 12],
    ];
    machine.driver.post(0, &out, &[1]);
    machine.driver.kick(0);
    assert_eq!(machine.driver.used(0)[0].data, [S_OK]);
    assert_eq!(machine.on_host()[9 * 512..10 * 512], [1; 512]);
    let header = [&T_IN.to_le_bytes()[..], &[0; 4], &9u64.to_le_bytes()].concat();
    machine.driver.post(0, &[&header], &[1, 500, 10, 2]);
    machine.driver.kick(0);
    let used = machine.driver.used(0);
    assert_eq!(used[0].data, [&[1; 512][..], &[S_OK]].concat());
}

#[test]
fn requests_over_the_end_or_of_odd_length_fail_and_change_nothing() {
    let mut machine = Machine::new(false, F_FLUSH);
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(machine.request(T_IN, sector, &[], 1024).1, S_IOERR);
        assert_eq!(machine.request(T_OUT, sector, &[7; 1024], 0).1, S_IOERR);
    }
    assert_eq!(machine.request(T_OUT, 0, &[7; 100], 0).1, S_IOERR);
    assert_eq!(machine.request(T_IN, 0, &[], 100).1, S_IOERR);
    assert_eq!(machine.request(99, 0, &[], 0).1, S_UNSUPP);
    assert_eq!(machine.on_host(), content());
    assert_eq!(machine.driver.status(), 15, "the device still works");
}

#[test]
fn a_request_without_status_or_header_does_no_harm() {
    let mut machine = Machine::new(false, 0);
    machine.driver.post(0, &[b"short"], &[1]);
    machine.driver.kick(0);
    assert_eq!(machine.driver.used(0)[0].data, [S_IOERR]);
    machine.driver.post(0, &[&[0; 16]], &[]);
    machine.driver.kick(0);
    assert_eq!(machine.driver.status() & 64, 64);
}

#[test]
fn a_request_of_more_than_the_limit_is_refused() {
    let mut machine = Machine::new(false, 0);
    // One buffer 200 times: 16 MiB and more without as much memory. Indirect, for the many places.
    let header = [&T_OUT.to_le_bytes()[..], &[0; 12]].concat();
    let memory = machine.driver.memory.clone();
    let write = |at: u64, bytes: &[u8]| {
        use vm_memory::Bytes;
        memory
            .write_slice(bytes, vm_memory::GuestAddress(at))
            .unwrap();
    };
    write(0x8000, &header);
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let mut table = descriptor(0x8000, 16, 1, 1);
    for n in 1..201 {
        table.extend(descriptor(0x10_0000, 128 << 10, 1, n + 1));
    }
    table.extend(descriptor(0x9000, 1, 2, 0));
    write(0x8_0000, &table);
    write(0x9000, &[0xff]);
    machine
        .driver
        .descriptor(0, 0, (0x8_0000, table.len() as u32), 4, 0);
    machine.driver.offer(0, 0);
    machine.driver.kick(0);
    let mut status = [0];
    vm_memory::Bytes::read_slice(&*memory, &mut status, vm_memory::GuestAddress(0x9000)).unwrap();
    assert_eq!(status, [S_IOERR]);
    assert_eq!(machine.on_host(), content());
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let mut machine = Machine::new(true, F_RO);
    assert_eq!(machine.request(T_IN, 0, &[], 512), (vec![1; 512], S_OK));
    assert_eq!(machine.request(T_OUT, 0, &[7; 512], 0).1, S_IOERR);
    let range = [0u64.to_le_bytes(), 1u64.to_le_bytes()].concat();
    assert_eq!(machine.request(T_WRITE_ZEROES, 0, &range, 0).1, S_IOERR);
    assert_eq!(machine.on_host(), content());
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut machine = Machine::new(false, F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    let range = |sector: u64, sectors: u32, flags: u32| {
        [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    assert_eq!(
        machine.request(T_WRITE_ZEROES, 0, &range(2, 3, 0), 0).1,
        S_OK
    );
    assert_eq!(
        machine.request(T_WRITE_ZEROES, 0, &range(8, 8, 1), 0).1,
        S_OK
    );
    assert_eq!(machine.request(T_DISCARD, 0, &range(16, 8, 0), 0).1, S_OK);
    let host = machine.on_host();
    assert_eq!(host.len() as u64, SECTORS * 512);
    assert_eq!(
        (host[2 * 512 - 1], &host[2 * 512..5 * 512], host[5 * 512]),
        (2, &[0; 1536][..], 6)
    );
    assert_eq!(host[8 * 512..16 * 512], [0; 8 * 512]);
    assert_eq!(
        machine.request(T_DISCARD, 0, &range(16, 8, 1), 0).1,
        S_UNSUPP
    );
    assert_eq!(
        machine.request(T_DISCARD, 0, &range(SECTORS, 1, 0), 0).1,
        S_IOERR
    );
    assert_eq!(
        machine
            .request(T_WRITE_ZEROES, 0, &range(0, u32::MAX, 0), 0)
            .1,
        S_IOERR
    );
    assert_eq!(machine.request(T_WRITE_ZEROES, 0, b"odd", 0).1, S_UNSUPP);
}

#[test]
fn identity_capacity_and_limits_are_told() {
    let mut machine = Machine::new(false, 0);
    let (id, status) = machine.request(T_GET_ID, 0, &[], 20);
    assert_eq!((&id[..9], status), (&b"serial-1\0"[..], S_OK));
    assert_eq!(machine.driver.read(0x2000, 8), SECTORS);
    assert_eq!(machine.driver.read(0x200c, 4), 126);
    assert_eq!(machine.driver.read(0x2014, 4), 512);
}

#[test]
fn files_that_are_no_disk_are_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    assert!(matches!(
        Disk::open(&missing, false),
        Err(DiskError::NotFound(_))
    ));
    for read_only in [false, true] {
        let result = Disk::open(directory.path(), read_only);
        assert!(matches!(result, Err(DiskError::Directory(_))));
    }
    let odd = image(&directory, &[0; 700]);
    assert!(matches!(
        Disk::open(&odd, false),
        Err(DiskError::Size { bytes: 700, .. })
    ));
    let empty = image(&directory, &[]);
    assert!(matches!(
        Disk::open(&empty, true),
        Err(DiskError::Size { bytes: 0, .. })
    ));
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &content());
    let writer = Disk::open(&path, false).unwrap();
    assert!(matches!(
        Disk::open(&path, false),
        Err(DiskError::Locked(_))
    ));
    assert!(matches!(Disk::open(&path, true), Err(DiskError::Locked(_))));
    drop(writer);
    let _first = Disk::open(&path, true).unwrap();
    let _second = Disk::open(&path, true).unwrap();
    assert!(matches!(
        Disk::open(&path, false),
        Err(DiskError::Locked(_))
    ));
}

#[test]
fn one_notification_moves_a_bounded_amount_and_the_event_loop_goes_on() {
    const REQUESTS: u16 = 15;
    const BYTES: usize = 2 << 20;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(u64::from(REQUESTS) * BYTES as u64)
        .unwrap();
    let mut driver = Driver::new(Block::new(Disk::open(&path, false).unwrap(), "serial"));
    driver.enable_msix();
    driver.start(F_FLUSH);
    // All read into the same memory. Indirect: each takes one descriptor of the table.
    let memory = driver.memory.clone();
    let write = |at: u64, bytes: &[u8]| {
        vm_memory::Bytes::write_slice(&*memory, bytes, vm_memory::GuestAddress(at)).unwrap();
    };
    for index in 0..REQUESTS {
        let at = 0x8_0000 + u64::from(index) * 0x100;
        let sector = u64::from(index) * BYTES as u64 / SECTOR_BYTES;
        write(
            at,
            &[&T_IN.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
        );
        let mut table = Vec::new();
        for (address, length, flags, next) in [
            (at, 16u32, 1u16, 1u16),
            (0x10_0000, BYTES as u32, 3, 2),
            (at + 0x10, 1, 2, 0),
        ] {
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        write(at + 0x20, &table);
        driver.descriptor(0, index, (at + 0x20, table.len() as u32), 4, 0);
        driver.offer(0, index);
    }
    let done = |driver: &Driver<Block>| driver.used_index(0);
    driver.kick(0);
    let mut before = 0;
    let mut turns = 0;
    loop {
        let now = done(&driver);
        assert!(now > before, "a turn does something: {now} after {before}");
        assert!(
            usize::from(now - before) * BYTES <= 4 << 20,
            "a turn is bounded: {now} after {before}"
        );
        (before, turns) = (now, turns + 1);
        if now == REQUESTS {
            break;
        }
        driver.run_events();
    }
    assert!(turns > 5, "{turns}");
    driver.run_events();
    assert_eq!(done(&driver), REQUESTS);
}

/// A loop device of 4096-byte sectors over `image`, where this process may make one.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(image: &std::path::Path) -> Option<Self> {
        let out = std::process::Command::new("losetup")
            .args(["--sector-size", "4096", "--find", "--show"])
            .arg(image)
            .output();
        let path = out.ok().filter(|out| out.status.success());
        let path = path.and_then(|out| String::from_utf8(out.stdout).ok());
        if path.is_none() {
            skipped::skip(
                "devices::virtio::blk (4096-byte sectors)",
                "this process may not make loop devices",
            );
        }
        path.map(|path| Self(path.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let result = std::process::Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        assert!(result.unwrap().success());
    }
}

/// Zeroes and discards ranges that no sector of the backing begins or ends with; nothing else may
/// change, and no old data may be left in what was zeroed.
fn clear_odd_ranges(path: &std::path::Path) {
    let mut driver = Driver::new(Block::new(Disk::open(path, false).unwrap(), "serial"));
    driver.start(F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    let mut expected = std::fs::read(path).unwrap();
    for (kind, sector, sectors, flags) in [
        (T_WRITE_ZEROES, 11u64, 3u32, 0u32),
        (T_WRITE_ZEROES, 17, 9, RANGE_UNMAP),
        (T_WRITE_ZEROES, 32, 16, RANGE_UNMAP),
        (T_WRITE_ZEROES, 50, 1, 0),
        (T_DISCARD, 53, 2, 0),
    ] {
        let header = [&kind.to_le_bytes()[..], &[0; 12]].concat();
        let range = [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ];
        driver.post(0, &[&header, &range.concat()], &[1]);
        driver.kick(0);
        driver.run_events();
        assert_eq!(driver.used(0)[0].data, [S_OK], "{kind} {sector}+{sectors}");
        if kind == T_WRITE_ZEROES {
            let start = sector as usize * 512;
            expected[start..start + sectors as usize * 512].fill(0);
        }
    }
    let now = std::fs::read(path).unwrap();
    let discarded = 53 * 512..55 * 512;
    assert_eq!(now[..discarded.start], expected[..discarded.start]);
    assert_eq!(now[discarded.end..], expected[discarded.end..]);
}

#[test]
fn sectors_of_a_backing_with_larger_ones_are_zeroed() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &content());
    let Some(device) = LoopDevice::new(&path) else {
        return;
    };
    clear_odd_ranges(&device.0);
}

#[test]
fn sectors_of_a_backing_that_cannot_punch_holes_are_zeroed() {
    // A ramfs knows no fallocate at all.
    let directory = tempfile::tempdir().unwrap();
    let mounted = directory.path().join("mounted");
    std::fs::create_dir(&mounted).unwrap();
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        let status = std::process::Command::new(program).args(arguments).output();
        status.is_ok_and(|out| out.status.success())
    };
    let ramfs = ["-t", "ramfs", "ramfs"].map(std::ffi::OsStr::new);
    if !run("mount", &[&ramfs[..], &[mounted.as_os_str()]].concat()) {
        skipped::skip(
            "devices::virtio::blk (no holes)",
            "this process may not mount a ramfs",
        );
        return;
    }
    let path = mounted.join("disk.img");
    std::fs::write(&path, content()).unwrap();
    clear_odd_ranges(&path);
    assert!(run("umount", &[mounted.as_os_str()]));
}
