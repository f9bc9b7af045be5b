//! A VM that goes on from a snapshot: where its state comes from, and what its guest is told.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_protocol::Client;
use anyhow::Context;
use devices::clock::monotonic_ns;
use recovery::asker::Nobody;
use recovery::guest::LiveGuest;
use recovery::request::IsolatedModule;
use recovery::supervisor::Supervisor;
use vmm::Vm;
use vmm::memory::{MemorySource, Userfault};
use vmm::snapshot::{Chain, Tell, WorkingSet};

use super::isolation::Isolation;
use super::memory;
use super::nics::Nics;
use super::saved::{Restored, SavedVm};
use crate::options::MacAddress;

/// How long the guest's agent may take to answer.
const AGENT_TIME: Duration = Duration::from_secs(60);

/// What is touched for so long counts as touched first, where no agent answers before.
const FIRST_TIME: Duration = Duration::from_secs(5);

/// An open snapshot.
pub struct Saved {
    chain: Chain,
    lazy: bool,
    userfault: Option<Arc<Userfault>>,
    /// Of one that is lazy: what it touches first.
    first: Mutex<WorkingSet>,
}

impl Saved {
    /// Opens the snapshot. With `userfault` a guest that goes on lazily can be isolated without a
    /// copy of all of its memory.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn open(from: &Restored, userfault: Option<Arc<Userfault>>) -> anyhow::Result<Self> {
        let chain = Chain::open(&from.dir)?;
        let first = match from.lazy {
            true => WorkingSet::of(chain.top()),
            false => WorkingSet::default(),
        };
        Ok(Self {
            chain,
            lazy: from.lazy,
            userfault,
            first: Mutex::new(first),
        })
    }

    /// Where the VM's memory comes from.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn memory(&self) -> anyhow::Result<MemorySource> {
        match self.lazy {
            true => Ok(self.chain.template(self.userfault.clone())?),
            false => Ok(MemorySource::Fresh),
        }
    }

    /// Begins to fetch what the guest of `vm` touches first, if it goes on lazily and that is
    /// known.
    ///
    /// # Errors
    /// There is no thread.
    pub fn fetch_ahead(&self, vm: &Vm) -> anyhow::Result<()> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.pages().is_empty() {
            return Ok(());
        }
        let (handle, pages) = (vm.handle(), first.pages().to_vec());
        std::thread::Builder::new()
            .name("fetch-ahead".to_owned())
            .spawn(move || {
                handle.ram().fetch_ahead(&pages);
                tracing::debug!(at_ns = monotonic_ns(), "what is touched first is there");
            })
            .context("cannot start a thread that fetches memory")?;
        Ok(())
    }

    /// Gives the VM, which has its devices, the state. NICs that are to have other addresses than
    /// the saved ones get them.
    ///
    /// # Errors
    /// The snapshot is damaged, is of another VM, or is not wanted any more, as `tell` says.
    pub fn put_into(&self, vm: &mut Vm, nics: &Nics, tell: Tell<'_>) -> anyhow::Result<()> {
        let loaded = memory::with_huge_pages(|| vm.go_on_from(&self.chain, tell))?;
        tracing::info!(pages = loaded.pages, "the snapshot was read");
        for (nic, saved) in nics.all().iter().zip(self.addresses()?) {
            if let Some(mac) = nic.config.mac.filter(|mac| saved != Some(*mac)) {
                (nic.nic.set_address)(mac.0);
            }
        }
        Ok(())
    }

    /// Addresses that the NICs had.
    fn addresses(&self) -> anyhow::Result<Vec<Option<MacAddress>>> {
        SavedVm::of(self.chain.top().manifest())?.addresses()
    }

    /// If nobody has yet, records what the guest of `vm` has touched when its agent has answered,
    /// which is when what comes back is dropped, or after [`FIRST_TIME`].
    fn record_first(&self, vm: &Vm) -> anyhow::Result<Option<Sender<()>>> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(recorder) = first.recorder() else {
            return Ok(None);
        };
        let (answered, is_answered) = channel();
        let handle = vm.handle();
        std::thread::Builder::new()
            .name("first-pages".to_owned())
            .spawn(move || {
                let _: Result<(), _> = is_answered.recv_timeout(FIRST_TIME);
                let recorded = match handle.ram().touched() {
                    Ok(Some(pages)) if !pages.is_empty() => recorder.record(&pages),
                    // Its memory is its own by now: who goes on next records it.
                    Ok(_) => Ok(()),
                    Err(error) => Err(error),
                };
                if let Err(error) = recorded {
                    tracing::debug!("what the guest touches first is not recorded: {error}");
                }
            })
            .context("cannot start a thread that looks what is touched")?;
        Ok(Some(answered))
    }

    /// Has it done, once the guest goes on and its agent, which was got in line for, answers, what
    /// only the guest can do (its real time stood still, a clone has other addresses), and what was
    /// isolated when the snapshot was taken isolated again. At last what only the start needed is
    /// given back. What does not work is said in the log.
    ///
    /// # Errors
    /// The snapshot does not say what VM it is of, or there is no thread.
    pub fn tell_guest(
        &self,
        vm: &Vm,
        nics: &Nics,
        supervisor: &Arc<Supervisor<Isolation>>,
        agent: Client,
    ) -> anyhow::Result<()> {
        let manifest = self.chain.top().manifest();
        let saved = SavedVm::of(manifest)?;
        let now: Vec<_> = nics.all().iter().map(|nic| nic.config.mac).collect();
        let pairs = self.addresses()?.into_iter().zip(now);
        let pairs = pairs.filter_map(|(was, is)| was.zip(is));
        let news = News {
            addresses: pairs.filter(|(was, is)| was != is).collect(),
            isolated: saved.isolated().to_vec(),
        };
        // A clone would have the addresses of its original there. Its path as it is now: the
        // process may be moved to another folder.
        if news.addresses.is_empty()
            && let Ok(dir) = self.chain.top().dir().canonicalize()
        {
            supervisor.guest().has_snapshot(dir, manifest.id);
        }
        let answered = self.record_first(vm)?;
        let supervisor = supervisor.clone();
        std::thread::Builder::new()
            .name("after-restore".to_owned())
            .spawn(move || news.tell(agent, answered, &supervisor))
            .context("cannot start a thread that tells the guest")?;
        Ok(())
    }
}

/// The guest's agent, in whose line this is the first, as long as the guest does not go on.
///
/// # Errors
/// The agent's socket is not there.
pub fn get_in_line(supervisor: &Supervisor<Isolation>) -> anyhow::Result<Client> {
    let mut agent = supervisor.guest().agent();
    agent
        .get_in_line()
        .context("cannot connect to the agent's socket")?;
    Ok(agent)
}

/// What a guest does not know that goes on from a snapshot.
struct News {
    /// What addresses of NICs became of which.
    addresses: Vec<(MacAddress, MacAddress)>,
    isolated: Vec<IsolatedModule>,
}

impl News {
    /// `answered` is dropped when the agent has answered, or does not.
    fn tell(
        self,
        mut agent: Client,
        answered: Option<Sender<()>>,
        supervisor: &Supervisor<Isolation>,
    ) {
        let told = self.tell_agent(&mut agent);
        drop(answered);
        // Others wait for their turn.
        drop(agent);
        if let Err(error) = told {
            tracing::warn!("the guest was not told that it goes on from a snapshot: {error:#}");
        }
        for (module, error) in supervisor.isolate_as_told(self.isolated, &Nobody) {
            tracing::error!(
                "{module} is not isolated as it was when the guest was saved: {error:#}"
            );
        }
        // Until now it would only have had to be read again, while somebody waits.
        memory::give_back_unused();
    }

    fn tell_agent(&self, agent: &mut Client) -> anyhow::Result<()> {
        // The time of now, not of when this began to wait for its turn.
        agent.hello(AGENT_TIME)?;
        tracing::debug!(at_ns = monotonic_ns(), "the guest's agent answered");
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        agent
            .set_time(u64::try_from(now.as_nanos())?)
            .context("its clock was not set")?;
        if self.addresses.is_empty() {
            return Ok(());
        }
        let interfaces = agent.interfaces().context("its interfaces are not known")?;
        for (was, is) in &self.addresses {
            let was = was.to_string();
            let Some(interface) = interfaces.iter().find(|interface| interface.mac == was) else {
                continue;
            };
            agent
                .readdress(&interface.name, Some(is.0), None, None)
                .with_context(|| format!("{} did not get the address {is}", interface.name))?;
        }
        Ok(())
    }
}
