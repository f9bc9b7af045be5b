//! A driver restart as one request, so that the time between its steps is the guest's own and not
//! the channel's.

use std::time::Duration;

use agent_protocol::message::{Done, ModuleSource, RestartDriver, Step, StepName};

use crate::fail::Result;
use crate::modules;
use crate::net::{self, Watch};
use crate::sys::stamp;

/// Removes and inserts the driver and puts the interface back.
pub fn restart(request: &RestartDriver) -> Result<Done> {
    let limit = Duration::from_millis(request.limit_ms);
    let watch = Watch::new()?;
    let mut steps = Vec::new();
    let mut timed = |step, act: &mut dyn FnMut() -> Result<()>| {
        let begin = stamp();
        act()?;
        steps.push(Step {
            step,
            begin,
            end: stamp(),
        });
        Ok(())
    };
    let interface = request.interface.as_str();
    timed(StepName::Remove, &mut || {
        modules::remove(&request.module).map(drop)
    })?;
    let source = ModuleSource::Name(request.module.clone());
    timed(StepName::Insert, &mut || {
        modules::load(&source, &request.params).map(drop)
    })?;
    timed(StepName::Interface, &mut || watch.present(interface, limit))?;
    timed(StepName::Address, &mut || {
        net::set_address(interface, request.address)
    })?;
    timed(StepName::Up, &mut || {
        net::set_link(interface, true)?;
        request.gateway.map_or(Ok(()), net::set_gateway)
    })?;
    if request.wait_carrier {
        timed(StepName::Carrier, &mut || watch.carrier(interface, limit))?;
    }
    Ok(Done::Restart(steps))
}
