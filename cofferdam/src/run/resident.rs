//! How much memory this process has, the guest's and its own apart.
//!
//! ```text
//!  all of guest memory is its own file, mapped shared    /proc/self/status: what is resident by kind
//!  some is a template's, or a domain has a view of it    /proc/self/smaps: mapping by mapping, once a second
//! ```
//!
//! Reading `smaps` takes time with each mapping and with each page that is resident, and one who
//! looks at a guest waits for it.

use std::fs::File;
use std::io::{BufRead, BufReader, Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmm::memory::RamRegion;

use crate::smaps::{self, Line};

/// For how long it is not counted anew mapping by mapping.
const WALK_EVERY: Duration = Duration::from_secs(1);

/// Resident memory of a process, in KiB. Pages that it shares with others, such as those of a
/// template, count in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resident {
    /// Guest memory.
    pub guest_kib: u64,
    /// Everything else, shared libraries and the program itself included.
    pub own_kib: u64,
}

/// Where guest memory is mapped.
#[derive(Debug, Clone, Copy)]
pub enum GuestMemory<'a> {
    /// It is a file of its own, mapped shared and nowhere else, and no other memory of this process
    /// is shared: what of it is resident is what the kernel counts as shared.
    Shared,
    /// Some of it may be mapped privately, at these places or as views of its file.
    Mapped(&'a [RamRegion]),
}

/// Counts this process's memory.
#[derive(Debug, Default)]
pub struct Counter {
    /// What was counted last mapping by mapping, and when that was done.
    walked: Mutex<Option<(Instant, Resident)>>,
    /// `/proc/self/status`, once somebody has asked: it is made anew at each read from its start.
    status: OnceLock<File>,
}

impl Counter {
    /// Resident memory of this process: now, or where mappings have to be looked at one by one
    /// within the last [`WALK_EVERY`].
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn read(&self, guest: GuestMemory<'_>) -> std::io::Result<Resident> {
        let regions = match guest {
            GuestMemory::Shared => return by_kind(&self.status()?),
            GuestMemory::Mapped(regions) => regions,
        };
        // Several who ask at once wait for one count.
        let mut walked = self.walked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, resident)) = *walked
            && when.elapsed() < WALK_EVERY
        {
            return Ok(resident);
        }
        let resident = walk(regions)?;
        *walked = Some((Instant::now(), resident));
        Ok(resident)
    }

    /// The text of `/proc/self/status`.
    fn status(&self) -> std::io::Result<String> {
        let file = match self.status.get() {
            Some(file) => file,
            None => {
                let file = File::open("/proc/self/status")?;
                self.status.get_or_init(|| file)
            }
        };
        let mut text = vec![0; STATUS_BYTES];
        loop {
            // All of it at once: it changes between two reads.
            let read = file.read_at(&mut text, 0)?;
            if read < text.len() {
                text.truncate(read);
                break;
            }
            if text.len() >= MAX_STATUS_BYTES {
                return Err(Error::new(
                    ErrorKind::InvalidData,
                    "/proc/self/status does not end",
                ));
            }
            text.resize(text.len() * 2, 0);
        }
        String::from_utf8(text).map_err(|error| Error::new(ErrorKind::InvalidData, error))
    }
}

/// Room for all of `/proc/self/status` of most processes, in bytes: with less it takes several
/// reads, since the file does not say how long it is.
const STATUS_BYTES: usize = 4 << 10;

/// Most of it that is read, in bytes: a process may be in 65,536 groups, all of which are named
/// (`NGROUPS_MAX` of linux/limits.h).
const MAX_STATUS_BYTES: usize = 1 << 20;

/// What `/proc/PID/status` says of it by kind (proc_pid_status(5)): shared memory is the guest's.
fn by_kind(status: &str) -> std::io::Result<Resident> {
    let of = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = value.and_then(|value| value.trim().strip_suffix(" kB"));
        let kib = kib.and_then(|kib| kib.parse::<u64>().ok());
        kib.ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("it has no {name}")))
    };
    Ok(Resident {
        guest_kib: of("RssShmem:")?,
        own_kib: of("RssAnon:")?.saturating_add(of("RssFile:")?),
    })
}

/// Resident memory of this process, whose guest memory is mapped at `guest`, mapping by mapping.
pub(super) fn walk(guest: &[RamRegion]) -> std::io::Result<Resident> {
    let smaps = BufReader::new(File::open("/proc/self/smaps")?);
    sum(smaps, |start| {
        guest
            .iter()
            .any(|region| (region.host_address..region.host_address + region.len).contains(&start))
    })
}

/// Adds up the mappings of an `smaps` (proc_pid_smaps(5)); those that `is_guest` says, by the address where
/// they start, and those of guest memory's own file are the guest's.
fn sum(smaps: impl BufRead, is_guest: impl Fn(u64) -> bool) -> std::io::Result<Resident> {
    let mut total = Resident::default();
    let mut of_guest = false;
    smaps::read(smaps, |line| match line {
        Line::Mapping { start, path } => {
            of_guest = path.contains(vmm::memory::FILE_NAME) || start.is_some_and(&is_guest);
        }
        Line::Field { name: "Rss", kib } => {
            let part = match of_guest {
                true => &mut total.guest_kib,
                false => &mut total.own_kib,
            };
            *part = part.saturating_add(kib);
        }
        Line::Field { .. } => {}
    })?;
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_apart() {
        let smaps = "\
55e0c0a00000-55e0c0b00000 r-xp 00000000 08:01 1234 /usr/bin/cofferdam
Size:               1024 kB
Rss:                 900 kB
Pss:                 900 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-s 00000000 00:01 77 /memfd:cofferdam-guest (deleted)
Size:             262144 kB
Rss:               70000 kB
7f1000000000-7f1000100000 rw-p 00000000 08:01 99 /var/lib/snapshots/a/memory
Rss:                1000 kB
7f2000000000-7f2000100000 rw-p 00000000 08:01 99 /var/lib/snapshots/a/memory
Rss:                  60 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  40 kB
";
        let resident = sum(smaps.as_bytes(), |start| start == 0x7f10_0000_0000).unwrap();
        assert_eq!(
            resident,
            Resident {
                guest_kib: 71_000,
                own_kib: 1_000
            }
        );
    }

    #[test]
    fn this_process_has_some() {
        assert!(walk(&[]).unwrap().own_kib > 100);
    }

    #[test]
    fn shared_memory_is_the_guests_where_nothing_else_is_shared() {
        let status = "\
VmRSS:\t   16484 kB
RssAnon:\t    2492 kB
RssFile:\t    9896 kB
RssShmem:\t    4096 kB
Threads:\t7
";
        let resident = Resident {
            guest_kib: 4096,
            own_kib: 12_388,
        };
        assert_eq!(by_kind(status).unwrap(), resident);
        for missing in ["RssAnon", "RssFile", "RssShmem"] {
            let without = status.replace(missing, "Rss");
            let error = by_kind(&without).unwrap_err().to_string();
            assert!(error.contains(missing), "{error}");
            assert!(
                by_kind(&status.replace(&format!("{missing}:\t"), &format!("{missing}:\tx")))
                    .is_err()
            );
        }
    }

    /// Guest memory of which `touched` bytes were written.
    fn guest_memory(touched: usize) -> vmm::memory::GuestRam {
        let ram = vmm::memory::GuestRam::new(256 << 20).unwrap();
        let host = ram.regions()[0].host_address as *mut u8;
        for at in (0..touched).step_by(4096) {
            // SAFETY: `touched` is less than the first region, which is mapped to be written.
            unsafe { host.add(at).write(1) };
        }
        ram
    }

    #[test]
    fn what_is_touched_is_in_both_counts() {
        let ram = guest_memory(64 << 20);
        let counter = Counter::default();
        // Other tests of this process have shared memory, too.
        for count in [
            counter.read(GuestMemory::Shared).unwrap(),
            walk(ram.regions()).unwrap(),
        ] {
            assert!(count.guest_kib >= 64 << 10, "{count:?}");
            assert!(count.own_kib > 100, "{count:?}");
        }
    }

    #[test]
    fn mappings_are_looked_at_once_a_second_and_again_after_it() {
        let counter = Counter::default();
        let ram = guest_memory(32 << 20);
        let guest = GuestMemory::Mapped(ram.regions());
        let first = Resident {
            guest_kib: 1,
            own_kib: 1,
        };
        let just_now = Instant::now() + Duration::from_secs(3600);
        *counter.walked.lock().unwrap() = Some((just_now, first));
        assert_eq!(counter.read(guest).unwrap(), first);
        let long_ago = Instant::now().checked_sub(WALK_EVERY).unwrap();
        *counter.walked.lock().unwrap() = Some((long_ago, first));
        let next = counter.read(guest).unwrap();
        assert!(next.guest_kib >= 32 << 10, "{next:?}");
    }
}
