//! What can be asked of a device host, carried out.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use recovery::asker::Asker;

use super::End;
use super::card::Card;
use super::host::Host;
use super::protocol::{DeviceProtocol, MAX_SLICE_MS, MIN_SLICE_MS, Reply, Request};
use crate::control::server::Handler;
use crate::error_text::chain;
use crate::options::VmName;

/// See the module.
pub struct DeviceService<C: Card> {
    host: Arc<Host<C>>,
    /// Where the end is asked for.
    end: Sender<End>,
}

impl<C: Card> DeviceService<C> {
    /// Answers for `host`.
    pub fn new(host: Arc<Host<C>>, end: Sender<End>) -> Self {
        Self { host, end }
    }

    fn turn(&self) -> Reply {
        Reply::Turn {
            turn: self.host.turn(),
        }
    }
}

impl<C: Card> Handler<DeviceProtocol> for DeviceService<C> {
    fn handle(&self, request: Request, _: &dyn Asker) -> Result<Reply, String> {
        match request {
            Request::Status {} => Ok(Reply::Status(Box::new(self.host.status()))),
            Request::Switch { to } => {
                let record = self.host.switch_to(&name(&to)?).map_err(chain)?;
                Ok(Reply::Switched(Box::new(record)))
            }
            Request::Every { ms } => {
                if !(MIN_SLICE_MS..=MAX_SLICE_MS).contains(&ms) {
                    return Err(format!(
                        "a time slice is {MIN_SLICE_MS} to {MAX_SLICE_MS} milliseconds"
                    ));
                }
                self.host.set_every(Some(Duration::from_millis(ms)));
                Ok(self.turn())
            }
            Request::Hold {} => {
                self.host.set_every(None);
                Ok(self.turn())
            }
            Request::Yield { vm } => {
                self.host.set_away(&name(&vm)?, true).map_err(chain)?;
                Ok(self.turn())
            }
            Request::GiveUp { vm } => {
                self.host.driver_lost(&name(&vm)?).map_err(chain)?;
                Ok(self.turn())
            }
            Request::Return { vm } => {
                self.host.set_away(&name(&vm)?, false).map_err(chain)?;
                Ok(self.turn())
            }
            Request::Quit {} => {
                // The main thread goes only with the process.
                let _ = self.end.send(End::Asked);
                Ok(Reply::Done {})
            }
        }
    }
}

fn name(text: &str) -> Result<VmName, String> {
    text.parse()
        .map_err(|error: crate::options::BadValue| error.to_string())
}
