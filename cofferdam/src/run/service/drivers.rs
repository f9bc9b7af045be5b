//! Drivers of the guest that are isolated, exchanged, or given their device anew.

use std::time::Duration;

use recovery::asker::Asker;
use recovery::ladder::LadderConfig;
use recovery::model::Model;
use recovery::request::IsolationRequest;
use recovery::resume_device::Resumed;

use super::{VmService, json, text};
use crate::control::protocol::Reply;
use crate::error_text::chain;
use crate::run::attachment::Attachment;
use crate::run::memory;
use crate::run::nics::GuestNic;

impl VmService {
    /// Isolates what was asked for, unless who asked has gone when all is known that it takes.
    pub(super) fn isolate(
        &self,
        request: IsolationRequest,
        recovery: LadderConfig,
        asker: &dyn Asker,
    ) -> Result<Reply, String> {
        self.guest_runs()?;
        self.has_small_pages("isolated")?;
        let isolated = self
            .supervisor
            .isolate(request, recovery, asker)
            .map_err(chain);
        // The agent's lists are large, and what reads them is not needed soon.
        memory::give_back_unused();
        let isolated = isolated?;
        let mut reply = json(&isolated)?;
        let model = isolated.strength.model.as_deref();
        if let Some(model) = model
            .and_then(Model::for_release)
            .transpose()
            .map_err(text)?
        {
            reply["not_modelled"] = json(&not_modelled(&model, &isolated.imports))?;
        }
        Ok(Reply::Isolated(reply))
    }

    pub(super) fn release(&self, module: &str, asker: &dyn Asker) -> Result<Reply, String> {
        asker
            .tell(&format!("waiting for calls of {module} to end"))
            .map_err(text)?;
        let status = self.supervisor.release(module).map_err(chain)?;
        memory::give_back_unused();
        Ok(Reply::Released(Box::new(status)))
    }

    pub(super) fn upgrade(
        &self,
        module: &str,
        file: &[u8],
        limit: Duration,
        asker: &dyn Asker,
    ) -> Result<Reply, String> {
        self.guest_runs()?;
        let upgraded = self.supervisor.upgrade(module, file, limit, asker);
        Ok(Reply::Upgraded(Box::new(upgraded.map_err(chain)?)))
    }

    pub(super) fn suspend_device(&self, module: &str, asker: &dyn Asker) -> Result<Reply, String> {
        self.guest_runs()?;
        let phases = self.supervisor.suspend_device(module, asker);
        phases.map(Reply::DeviceSuspended).map_err(chain)
    }

    pub(super) fn resume_device(&self, module: &str, asker: &dyn Asker) -> Result<Reply, String> {
        self.guest_runs()?;
        let us = |time: &Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let resumed = self.supervisor.resume_device(module, asker);
        match resumed.map_err(chain)? {
            Resumed::FromRest(phases) => Ok(Reply::DeviceResumed(phases)),
            Resumed::Anew(times) => Ok(Reply::Resumed {
                times_us: times.iter().map(us).collect(),
            }),
        }
    }

    /// The guest's NIC of the device host `device`.
    fn nic_of(&self, device: &str) -> Result<(GuestNic, Attachment), String> {
        let mut all = self.nics.all().into_iter();
        let own = all.find_map(|nic| {
            let attachment = nic.attachment.clone()?;
            (attachment.host.as_str() == device).then_some((nic, attachment))
        });
        own.ok_or_else(|| format!("the VM has no NIC of the device host {device}"))
    }

    pub(super) fn hand_over(&self, device: &str, asker: &dyn Asker) -> Result<Reply, String> {
        let (nic, _) = self.nic_of(device)?;
        self.guest_runs()?;
        let given = self.supervisor.hand_over(&nic.address(), asker);
        let how = given.map_err(chain)?;
        Ok(Reply::GivenAway { how })
    }

    pub(super) fn take_over(&self, device: &str, asker: &dyn Asker) -> Result<Reply, String> {
        let (nic, attachment) = self.nic_of(device)?;
        self.guest_runs()?;
        let (address, mac) = (nic.address(), attachment.mac.to_string());
        let taken = self.supervisor.take_over(&address, &mac, asker);
        let how = taken.map_err(chain)?;
        Ok(Reply::TakenOver { how })
    }

    pub(super) fn violations(&self, module: &str) -> Result<Reply, String> {
        let all = self.supervisor.violations(module);
        let reports = self.isolator().reports(module);
        let isolated = reports.is_ok();
        // Of one that was released what it did is still known.
        let reports = match reports {
            Err(error) if all.is_empty() => return Err(error.to_string()),
            reports => reports.unwrap_or_default(),
        };
        Ok(Reply::Violations {
            isolated,
            all,
            texts: reports.iter().map(ToString::to_string).collect(),
            reports: json(&reports)?,
        })
    }

    pub(super) fn instructions(&self, module: &str, function: &str) -> Result<Reply, String> {
        let instructions = self.isolator().instructions(module, function);
        Ok(Reply::Instructions {
            instructions: instructions.map_err(text)?,
        })
    }
}

/// Imports of which the model of kernel functions knows nothing: a call that spills and reaches one
/// cannot be taken back as a whole.
fn not_modelled<'a>(model: &Model, imports: &'a [Vec<String>]) -> Vec<&'a str> {
    let known = |name: &String| model.get(name).is_some();
    let unknown = imports.iter().filter(|names| !names.iter().any(known));
    unknown
        .filter_map(|names| names.first())
        .map(String::as_str)
        .collect()
}
