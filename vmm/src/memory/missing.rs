//! Pages of a template that come into the memory's own file when somebody touches them.
//!
//! A guest whose driver is isolated has its memory in a file of its own, of which a private view is
//! a second mapping. What the guest has written is copied there; of the rest each page comes when
//! it is first touched, by whomever and through whichever mapping, and so such a guest costs what
//! it touches.
//!
//! ```text
//!  guest, devices ─► mapping of the own file, shared ──┐ page is
//!  private view ───► the same file, copy-on-write ─────┤ missing ─► thread: from the template into the file ─► go on
//! ```
//!
//! The kernel puts a page there or says that there is one, so that nobody's writes are lost. The
//! thread touches nothing that it has to bring, and takes no lock that others hold while they touch
//! memory.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use devices::dma::{MissingPages, ViewToken};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::lost::Watched;
use super::userfault::Userfault;
use super::{MemoryError, PAGE_BYTES, RamRegion, data_of};

/// Why a page does not come.
#[derive(Debug, thiserror::Error)]
pub(super) enum BringError {
    /// The template does not have it, or it is no page of the memory.
    #[error("a page of the template cannot be read: {0}")]
    Read(#[source] Error),
    /// The kernel does not put it into the own file: most likely the host has no more memory.
    #[error("the host has no memory for a page of the guest: {0}")]
    Page(#[source] Error),
}

impl From<BringError> for MemoryError {
    fn from(error: BringError) -> Self {
        match error {
            BringError::Read(error) => Self::Template(error),
            BringError::Page(error) => Self::Allocate(error),
        }
    }
}

/// Why pages do not come any more.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Bring(#[from] BringError),
    /// Nobody can be asked who waits for one, or be woken.
    #[error("the kernel does not tell of pages that are missing: {0}")]
    Kernel(#[from] Error),
}

/// The further mappings of the file.
#[derive(Debug, Default)]
struct Views {
    known: Vec<View>,
    /// Nobody answers any more.
    ended: bool,
}

/// A further mapping of the file.
#[derive(Debug)]
struct View {
    at: Range<u64>,
    file_offset: u64,
    /// Gone with the view.
    token: Weak<()>,
}

/// What the thread works with.
#[derive(Debug)]
struct Serving {
    userfault: Arc<Userfault>,
    template: Arc<File>,
    /// Bytes of memory.
    bytes: u64,
    own: Arc<File>,
    regions: Vec<RamRegion>,
    views: Mutex<Views>,
    watched: Arc<Watched>,
}

/// See the module's text. Dropped, pages that are missing are zero.
#[derive(Debug)]
pub(super) struct Missing {
    serving: Arc<Serving>,
    end: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Missing {
    /// Has pages of `template` come into the file `own`, which is mapped at `regions`, shared, and
    /// of which nobody touches a missing page before this returns.
    pub fn serve(
        userfault: Arc<Userfault>,
        template: Arc<File>,
        own: Arc<File>,
        regions: &[RamRegion],
        watched: Arc<Watched>,
    ) -> Result<Self> {
        let bytes = regions.iter().map(|region| region.len).sum();
        let serving = Arc::new(Serving {
            userfault,
            template,
            bytes,
            own,
            regions: regions.to_vec(),
            views: Mutex::default(),
            watched,
        });
        for region in regions {
            serving.userfault.register(&at(region))?;
        }
        let end = EventFd::new(EFD_CLOEXEC)?;
        let (served, ends) = (serving.clone(), end.try_clone()?);
        let thread = std::thread::Builder::new()
            .name("missing-pages".to_owned())
            .spawn(move || {
                if let Err(error) = served.run(&ends) {
                    tracing::error!("pages of the guest's memory do not come any more: {error}");
                    served.watched.end_because(&error);
                }
            })?;
        Ok(Self {
            serving,
            end,
            thread: Some(thread),
        })
    }

    /// For whoever makes further mappings of the file.
    pub fn for_views(&self) -> Arc<dyn MissingPages> {
        self.serving.clone()
    }

    /// Offsets of the pages that are not there yet. What is a hole in both files is zero with or
    /// without us.
    pub fn absent(&self) -> Result<Vec<u64>> {
        let serving = &self.serving;
        absent(&serving.template, &serving.own, serving.bytes)
    }

    /// Brings the pages at `offsets` of the file that are not there.
    pub fn bring(&self, offsets: &[u64]) -> std::result::Result<(), BringError> {
        let mut offsets = offsets.iter();
        offsets.try_for_each(|&offset| self.serving.bring(offset))
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        let ended = self.end.write(1).map(|()| self.thread.take());
        match ended.map(|thread| thread.map(JoinHandle::join)) {
            Ok(Some(Err(_)) | None) | Err(_) => {
                tracing::debug!("a thread that brings pages failed")
            }
            Ok(Some(Ok(()))) => {}
        }
        self.serving.end();
    }
}

impl Serving {
    fn run(&self, end: &EventFd) -> std::result::Result<(), ServeError> {
        // SAFETY: the descriptor is open as long as `end` is borrowed.
        let end =
            unsafe { rustix::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(end)) };
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.userfault.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(end, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::from(errno).into()),
            }
            while let Some(address) = self.userfault.next()? {
                self.answer(address & !(PAGE_BYTES - 1))?;
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
        }
    }

    /// Pages that are missing are zero from now on.
    fn end(&self) {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        views.ended = true;
        let alive = views
            .known
            .iter()
            .filter(|view| view.token.strong_count() > 0);
        let alive = alive.map(|view| view.at.clone());
        for at in self.regions.iter().map(at).chain(alive) {
            if let Err(error) = self.userfault.unregister(&at) {
                tracing::debug!(%error, "pages stay missing");
            }
        }
    }

    /// Somebody waits for the page at `address`.
    fn answer(&self, address: u64) -> std::result::Result<(), ServeError> {
        let mut regions = self.regions.iter();
        if let Some(region) = regions.find(|region| at(region).contains(&address)) {
            return Ok(self.bring(region.file_offset + (address - region.host_address))?);
        }
        let offset = {
            let views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
            // The newest one is the one that is there.
            let mut known = views.known.iter().rev();
            let view = known.find(|view| view.at.contains(&address));
            view.map(|view| view.file_offset + (address - view.at.start))
        };
        if let Some(offset) = offset {
            self.bring(offset)?;
        }
        // Who waits at another address than that of the guest's mapping is not woken by the copy.
        Ok(self.userfault.wake(&(address..address + PAGE_BYTES))?)
    }

    /// Brings the page at `offset` of the file, if it is not there.
    fn bring(&self, offset: u64) -> std::result::Result<(), BringError> {
        let beyond = || {
            let what = format!("no page at {offset:#x}");
            BringError::Read(Error::new(ErrorKind::InvalidInput, what))
        };
        let mut regions = self.regions.iter();
        let region = regions
            .find(|region| (region.file_offset..region.file_offset + region.len).contains(&offset));
        let region = region.ok_or_else(beyond)?;
        let to = region.host_address + (offset - region.file_offset);
        let page = to..to + PAGE_BYTES;
        let mut content = [0; PAGE_BYTES as usize];
        if let Err(error) = self.template.read_exact_at(&mut content, offset) {
            self.watched.end_if_cut();
            return Err(BringError::Read(error));
        }
        loop {
            match self.userfault.copy(to, &content) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return self.userfault.wake(&page).map_err(BringError::Page);
                }
                // The address space is just changed: by who maps or unmaps something.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now()
                }
                Err(error) => return Err(BringError::Page(error)),
            }
        }
    }
}

impl MissingPages for Serving {
    fn view(&self, at: Range<u64>, file_offset: u64) -> Result<ViewToken> {
        let token = ViewToken::default();
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if views.ended {
            // All is there, or zero.
            return Ok(token);
        }
        views.known.retain(|view| view.token.strong_count() > 0);
        views.known.push(View {
            at: at.clone(),
            file_offset,
            token: token.watch(),
        });
        // Known first: somebody may touch it as soon as it is registered.
        self.userfault.register(&at)?;
        Ok(token)
    }

    fn data(&self) -> Result<Vec<Range<u64>>> {
        let mut found = data_of(&self.template, self.bytes)?;
        self.watched.end_if_cut();
        found.extend(data_of(&self.own, self.bytes)?);
        Ok(super::template::joined(found))
    }
}

/// Offsets of pages among the first `bytes` that `template` has and `own` has not.
pub(super) fn absent(template: &File, own: &File, bytes: u64) -> Result<Vec<u64>> {
    let own = data_of(own, bytes)?;
    let is_there = |offset: &u64| {
        let next = own.partition_point(|range| range.end <= *offset);
        own.get(next).is_some_and(|range| range.contains(offset))
    };
    let found = data_of(template, bytes)?.into_iter();
    let found = found.flat_map(|range| range.step_by(PAGE_BYTES as usize));
    Ok(found.filter(|offset| !is_there(offset)).collect())
}

fn at(region: &RamRegion) -> Range<u64> {
    region.host_address..region.host_address + region.len
}
