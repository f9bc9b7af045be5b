//! A VM that goes on from a snapshot: where its state comes from, and what its guest is told.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use recovery::asker::Nobody;
use recovery::request::IsolatedModule;
use recovery::supervisor::Supervisor;
use vmm::Vm;
use vmm::memory::MemorySource;
use vmm::snapshot::Chain;

use super::isolation::Isolation;
use super::saved::SavedVm;
use super::{RunConfig, memory};

/// The snapshot that a VM goes on from.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Its directory.
    pub dir: PathBuf,
    /// Whether the guest begins before its memory is there.
    pub lazy: bool,
}

/// An open snapshot.
pub struct Saved {
    chain: Chain,
    lazy: bool,
}

impl Saved {
    /// Opens the snapshot.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn open(from: &Restored) -> anyhow::Result<Self> {
        Ok(Self {
            chain: Chain::open(&from.dir)?,
            lazy: from.lazy,
        })
    }

    /// Where the VM's memory comes from.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn memory(&self) -> anyhow::Result<MemorySource> {
        match self.lazy {
            true => Ok(self.chain.template()?),
            false => Ok(MemorySource::Fresh),
        }
    }

    /// Gives the VM, which has its devices, the state.
    ///
    /// # Errors
    /// The snapshot is damaged, or is of another VM.
    pub fn put_into(&self, vm: &mut Vm) -> anyhow::Result<()> {
        let loaded = memory::with_huge_pages(|| vm.go_on_from(&self.chain))?;
        tracing::info!(pages = loaded.pages, "the snapshot was read");
        Ok(())
    }

    /// Has it done, once the guest goes on and its agent answers, what only the guest can do, and what was isolated when
    /// the snapshot was taken isolated again.
    ///
    /// # Errors
    /// The snapshot does not say what VM it is of, or there is no thread.
    pub fn tell_guest(
        &self,
        _config: &RunConfig,
        supervisor: &Arc<Supervisor<Isolation>>,
    ) -> anyhow::Result<()> {
        let saved = SavedVm::of(self.chain.top().manifest())?;
        isolate_again(supervisor, saved.isolated())
    }
}

/// Isolates what was isolated when the snapshot was taken. Where that does not work, `cofferdam status` says so.
fn isolate_again(
    supervisor: &Arc<Supervisor<Isolation>>,
    isolated: &[IsolatedModule],
) -> anyhow::Result<()> {
    if isolated.is_empty() {
        return Ok(());
    }
    let (supervisor, isolated) = (supervisor.clone(), isolated.to_vec());
    std::thread::Builder::new()
        .name("isolate-again".to_owned())
        .spawn(move || {
            for (module, error) in supervisor.isolate_as_told(isolated, &Nobody) {
                tracing::error!(
                    "{module} is not isolated as it was when the guest was saved: {error:#}"
                );
            }
        })
        .context("cannot start a thread that isolates again")?;
    Ok(())
}
