//! The machine: whether it runs, what is plugged in, its states on disk and in memory.

use std::time::Duration;

use devices::i8042::{self, MouseEvent};
use recovery::asker::Asker;
use vmm::Refused;
use vmm::snapshot::{Beside, SnapshotRequest};

use super::{VmService, done, json, text};
use crate::control::protocol::Reply;
use crate::error_text::chain;
use crate::run::elsewhere;
use crate::run::summary::nic_status;

/// How long a guest may take to come to rest: calls that are open have to end.
pub(super) const REST_TIME: Duration = Duration::from_secs(10);

impl VmService {
    pub(super) fn pause(&self) -> Result<Reply, String> {
        let paused = elsewhere::pause(&self.vm, &self.nics);
        // Asked for twice is as good as once.
        done(paused, Some(Refused::AlreadyPaused))
    }

    pub(super) fn resume(&self) -> Result<Reply, String> {
        let resumed = elsewhere::resume(&self.vm, &self.nics);
        done(resumed, Some(Refused::NotPaused))
    }

    pub(super) fn plug(&self, net: Option<&str>, nic: Option<&str>) -> Result<Reply, String> {
        let plugged = match (net, nic) {
            (Some(net), None) => self.plugging.plug_net(net.parse().map_err(text)?),
            (None, Some(nic)) => {
                let nic = nic.parse().map_err(text)?;
                elsewhere::may_come(&self.vm, self.isolator())?;
                self.plugging.plug_nic(nic)
            }
            _ => return Err("give one NIC: either --net or --nic".to_owned()),
        };
        Ok(Reply::Plugged(nic_status(&plugged.map_err(chain)?)))
    }

    pub(super) fn mark(&self, name: &str, asker: &dyn Asker) -> Result<Reply, String> {
        elsewhere::give_state(&self.nics, "marked")?;
        self.has_small_pages("marked")?;
        asker.tell("setting a mark").map_err(text)?;
        let marked = self.vm.mark(name, REST_TIME);
        self.learned.forget(name);
        marked.map(Reply::Marked).map_err(text)
    }

    pub(super) fn rewind(&self, name: Option<&str>, asker: &dyn Asker) -> Result<Reply, String> {
        asker.tell("going back").map_err(text)?;
        let rewound = self.vm.rewind(name, REST_TIME);
        rewound.map(Reply::Rewound).map_err(text)
    }

    /// Has the mouse see `event`, and tells what became of all.
    pub(super) fn mouse(&self, event: Option<MouseEvent>) -> Result<Reply, String> {
        let Some(controller) = self.vm.i8042() else {
            return Err("the VM has no mouse: `cofferdam run --mouse` gives it one".to_owned());
        };
        // Not while the machine is at rest: what it saves has all of an event or nothing.
        self.vm.with_devices(|| {
            let mut controller = i8042::lock(&controller);
            if let Some(event) = event {
                controller.move_mouse(event).map_err(text)?;
            }
            Ok(Reply::Mouse(controller.mouse_counts()))
        })
    }

    pub(super) fn forget_mark(&self, name: &str) -> Result<Reply, String> {
        self.vm.forget_mark(name).map_err(text)?;
        self.learned.forget(name);
        Ok(self.marks())
    }

    pub(super) fn marks(&self) -> Reply {
        Reply::Marks {
            marks: self.vm.marks(),
        }
    }

    pub(super) fn snapshot(
        &self,
        request: &SnapshotRequest<'_>,
        asker: &dyn Asker,
    ) -> Result<Reply, String> {
        self.has_small_pages("saved")?;
        elsewhere::give_state(&self.nics, "saved")?;
        if self.nics.forget_gone(&self.vm) {
            return Err(
                "a VM with NICs that came while it ran cannot be saved yet: `cofferdam unplug` takes them out"
                    .to_owned(),
            );
        }
        let paths = std::iter::once(request.dir).chain(request.parent);
        if paths.into_iter().any(|path| !path.is_absolute()) {
            return Err("a snapshot's directory is named by its whole path".to_owned());
        }
        let mut tell = |what: &str| asker.tell(what).is_ok();
        let mut beside = || {
            if let Some(module) = self.supervisor.suspended().first() {
                return Err(format!(
                    "the devices of {module} are suspended: `cofferdam resume-device` brings them back"
                ));
            }
            let isolated = self.supervisor.isolated();
            let clean = self.isolator().clean_bytes().into_iter();
            Ok(Beside {
                vm: json(&self.saved.with_isolated(isolated))?,
                instead: clean.map(|clean| (clean.at, clean.bytes)).collect(),
            })
        };
        let taken = self.vm.snapshot(request, &mut tell, &mut beside);
        let taken = taken.map_err(text)?;
        let guest = self.supervisor.guest();
        guest.has_snapshot(request.dir.to_owned(), taken.id);
        Ok(Reply::Snapshot(taken))
    }
}
