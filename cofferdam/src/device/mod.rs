//! The device host: the process that has a NIC for good, and the guests that share it by turns.
//!
//! ```text
//!  device.sock ─► attach: a line each way, then vfio-user ─► context: one for each VM, with a thread
//!  control.sock ─► service ─► host: whose turn, switches ◄─ keeper: clients that have gone, time slices
//!                               │
//!                             card: a model of a NIC, at a wire by turns; or a function of the host
//! ```

mod at_step;
mod attach;
mod card;
pub mod client;
mod context;
mod driven;
mod follows;
mod happened;
mod held;
pub mod hello;
mod history;
mod host;
mod keeper;
mod model;
mod passed;
pub mod protocol;
mod service;
mod share;

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use devices::vfio::notices::Notices;
use devices::vfio::passed::opened::Opened;
use devices::wire::turns::{Parked, Turns};
use event_manager::{EventManager, SubscriberOps};
use vmm::SharedSubscriber;

use self::card::Card;
use self::driven::{DrivenCard, OverSockets};
use self::host::Host;
use self::model::ModelCard;
use self::passed::PassedCard;
use self::passed::notices::Hears;
use self::service::DeviceService;
use crate::control::server::serve_protocol;
use crate::ending::Ending;
use crate::options::{NetSpec, NicModel, PciAddress, VmName};
use crate::run::machine::plug;
use crate::run::watch::Belongings;
use crate::runtime_dir::{RuntimeRoot, VmPaths};
use crate::sandbox::MachineSandbox;
use crate::signals::{Asked, EndingSignal, Signals, stop_process};

/// How long those who wait for an answer may hold up the end.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// What guests without the turn see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ParkedAs {
    /// A link that is down.
    Down,
    /// A link that stays up for up to a second, three of a function of the host, in which frames
    /// wait.
    Stall,
}

/// What becomes of the turn of a VM that goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExit {
    /// It waits for the VM to come back.
    Keep,
    /// It goes on to the next VM that is attached.
    Next,
}

/// Which NIC a device host has.
#[derive(Debug, Clone)]
pub enum CardConfig {
    /// A model.
    Model {
        /// Which one.
        model: NicModel,
        /// What it is plugged into.
        net: NetSpec,
    },
    /// A function of the host.
    Function {
        /// Where it is.
        address: PciAddress,
        /// How its state is taken; by its description where there is one, if that is not said.
        state: Option<StateBy>,
    },
}

/// How the state of a function of the host is taken from one guest and given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StateBy {
    /// By its registers and rings, as its description has them.
    Registers,
    /// By the suspend and resume functions of the drivers in the guests, whose agents are asked.
    Driver,
}

/// How a device host shares what it has.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Its name.
    pub name: VmName,
    /// What its NIC is plugged into, in words.
    pub wire: String,
    /// What guests without the turn see.
    pub parked: ParkedAs,
    /// What becomes of the turn of a VM that goes.
    pub on_exit: OnExit,
    /// How many VMs can have a context.
    pub slots: usize,
}

/// Why a device host ends.
#[derive(Debug)]
pub enum End {
    /// Somebody asked for it.
    Asked,
    /// A signal did.
    Signal(EndingSignal),
    /// The host wants its function back.
    WantedBack(PciAddress),
}

/// Serves a device to its end, behind the walls of `sandbox`.
pub fn serve(
    config: HostConfig,
    card: CardConfig,
    sandbox: &MachineSandbox,
) -> anyhow::Result<Ending> {
    let signals = Signals::block().context("cannot block signals")?;
    let (end, ended) = channel();
    let belongings = Arc::new(Belongings::default());
    listen_to(signals, end.clone(), belongings.clone())?;
    let result = serve_until(config, (card, sandbox), end, &ended, &belongings);
    belongings.clear();
    match result? {
        End::Asked => Ok(Ending::SUCCESS),
        End::Signal(signal) => Ok(Ending::Signal(signal)),
        End::WantedBack(address) => bail!(
            "the host took {address} back: it was removed, or is to be another driver's; its guests go on without a NIC \
             until a device host of that name is there again"
        ),
    }
}

/// Has a thread wait for signals. The second one that asks for the end does not wait for it.
fn listen_to(
    signals: Signals,
    end: Sender<End>,
    belongings: Arc<Belongings>,
) -> anyhow::Result<()> {
    let listen = move || {
        let mut asked = false;
        loop {
            match signals.wait() {
                Ok(Asked::End(signal)) if asked => {
                    belongings.clear();
                    signal.end_process();
                }
                Ok(Asked::End(signal)) => {
                    asked = true;
                    // The main thread goes only with the process.
                    let _ = end.send(End::Signal(signal));
                }
                Ok(Asked::Stop) => stop_process(),
                Ok(Asked::Continued) => {}
                Err(error) => {
                    tracing::error!("signals cannot be waited for: {error}");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(listen)
        .context("cannot start the signal thread")?;
    Ok(())
}

fn serve_until(
    config: HostConfig,
    (card, sandbox): (CardConfig, &MachineSandbox),
    end: Sender<End>,
    ended: &Receiver<End>,
    belongings: &Belongings,
) -> anyhow::Result<End> {
    let dir = RuntimeRoot::from_environment()
        .devices()
        .claim(&config.name)?;
    let paths = dir.paths().clone();
    belongings.add_dir(dir);
    match card {
        CardConfig::Model { model, net } => {
            let plugged = plug(&net, 0, belongings)?;
            sandbox.enter(net.own_socket().cloned().into_iter().collect(), None)?;
            if !plugged.subscribers.is_empty() {
                serve_events("wire", plugged.subscribers)?;
            }
            let parked = match config.parked {
                ParkedAs::Down => Parked::Down,
                ParkedAs::Stall => Parked::STALL,
            };
            let card = ModelCard::new(model, Turns::new(plugged.wire, parked));
            serve_card(config, card, &paths, end, ended)
        }
        CardConfig::Function { address, state } => {
            let notices = Notices::new()?;
            let opened = Opened::open(address, &notices)?;
            let described = match opened.is_described() {
                true => StateBy::Registers,
                false => StateBy::Driver,
            };
            let hears = Hears::of(address, notices, end.clone());
            let hears = || serve_events("function", vec![Arc::new(Mutex::new(hears))]);
            match state.unwrap_or(described) {
                StateBy::Registers => {
                    let card = PassedCard::open(opened, config.parked)?;
                    sandbox.enter(Vec::new(), None)?;
                    hears()?;
                    serve_card(config, card, &paths, end, ended)
                }
                StateBy::Driver => {
                    let drivers = OverSockets {
                        root: RuntimeRoot::from_environment(),
                        host: config.name.clone(),
                    };
                    let card = DrivenCard::open(opened, drivers)?;
                    sandbox.enter(Vec::new(), None)?;
                    hears()?;
                    serve_card(config, card, &paths, end, ended)
                }
            }
        }
    }
}

/// Has threads serve `card`, until somebody asks for the end.
fn serve_card<C: Card>(
    config: HostConfig,
    card: C,
    paths: &VmPaths,
    end: Sender<End>,
    ended: &Receiver<End>,
) -> anyhow::Result<End> {
    let (keeper, events) = channel();
    let name = config.name.clone();
    let host = Arc::new(Host::new(config, card, keeper));
    let kept = host.clone();
    std::thread::Builder::new()
        .name("keeper".to_owned())
        .spawn(move || keeper::keep(&kept, &events))
        .context("cannot start the thread that keeps house")?;
    attach::listen(&paths.device_socket(), host.clone())?;
    let service = Arc::new(DeviceService::new(host.clone(), end));
    let control = serve_protocol(&paths.control_socket(), service)?;
    tracing::info!(%name, "the device can be attached");
    let end = ended.recv().context("nobody is left to ask for the end")?;
    host.end();
    control.wait_for_answers(ANSWER_TIME);
    Ok(end)
}

/// Has a thread called `name` serve what the card needs besides its shares.
fn serve_events(name: &str, subscribers: Vec<SharedSubscriber>) -> anyhow::Result<()> {
    let mut manager = EventManager::new().context("no event loop for the card")?;
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || context::serve(manager, &AtomicBool::new(false)))
        .context("cannot start the card's thread")?;
    Ok(())
}
