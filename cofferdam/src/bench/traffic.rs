//! Traffic through a guest's NIC with every byte checked, driven from inside the guest.

use std::time::Duration;

use agent_protocol::message::Exec;
use agent_protocol::traffic::{TrafficKind, TrafficResult};
use anyhow::{Context, ensure};

use super::device_host::{self, DeviceHost};
use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::network::{self, GATEWAY, LINK_TIME};
use crate::options::NicModel;
use crate::report::traffic::{NicPlace, Traffic};
use crate::report::{Guest as GuestFacts, Stat};

/// Where the traffic tool is in the guest.
const TOOL: &str = "/init";

/// How long the tool may take beyond the time it was given.
const GRACE: Duration = Duration::from_secs(60);

/// What to send.
#[derive(Debug, Clone)]
pub struct TrafficOptions {
    /// The guest; without a network, which is added.
    pub guest: GuestOptions,
    /// Which NIC.
    pub nic: NicModel,
    /// Where it is, one after the other.
    pub places: Vec<NicPlace>,
    /// What.
    pub kinds: Vec<TrafficKind>,
    /// How long each.
    pub time: Duration,
}

/// Sends, telling `progress` what is done.
pub fn measure(
    options: &TrafficOptions,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Vec<Traffic>, Option<GuestFacts>)> {
    let (mut all, mut facts) = (Vec::new(), None);
    for &place in &options.places {
        progress(&format!("NIC in the {}: booting a guest", place.words()));
        let mut networked = Networked::boot(options, place)?;
        let guest = &mut networked.guest;
        for &kind in &options.kinds {
            progress(&format!("{} for {} s", kind.name(), options.time.as_secs()));
            let result = send(guest, kind, options.time)?;
            if let Some(error) = &result.error {
                anyhow::bail!("{}: {error}", kind.name());
            }
            all.push(traffic(kind, options.nic, place, &result));
        }
        facts.get_or_insert(guest_facts(guest)?);
    }
    Ok((all, facts))
}

/// A guest whose NIC works.
struct Networked {
    // Dropped in this order.
    guest: Guest,
    _host: Option<(DeviceHost, tempfile::TempDir)>,
}

impl Networked {
    fn boot(options: &TrafficOptions, place: NicPlace) -> anyhow::Result<Self> {
        let (guest, model) = (options.guest.clone(), options.nic.name());
        let (guest, host) = match place {
            NicPlace::Vmm => (guest.with(&format!("--net user --nic {model}")), None),
            NicPlace::DeviceHost => {
                let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
                let program = &options.guest.program;
                let host = DeviceHost::start(
                    program,
                    folder.path(),
                    &["--model", model, "--net", "user"],
                )?;
                let name = guest.name;
                let guest = guest.among(folder.path(), name);
                let guest = guest.with(&format!("--nic device={}", device_host::NAME));
                (guest, Some((host, folder)))
            }
        };
        let mut guest = Guest::boot(&guest, BOOT_TIME)?;
        network::insert_slowly(&mut guest, driver(options.nic))?;
        network::configure(&mut guest)?;
        network::wait_for_link(&mut guest, LINK_TIME)?;
        Ok(Self { guest, _host: host })
    }
}

/// Whether all of it arrived once, in order and as it was sent.
pub fn all_well(traffic: &Traffic) -> bool {
    traffic.sent == traffic.answered
        && traffic.reordered.unwrap_or(0) == 0
        && traffic.duplicated.unwrap_or(0) == 0
        && traffic.corrupted == 0
}

/// Runs the tool in the guest.
pub fn send(guest: &mut Guest, kind: TrafficKind, time: Duration) -> anyhow::Result<TrafficResult> {
    let seconds = time.as_secs().to_string();
    let gateway = GATEWAY.to_string();
    let argv = [TOOL, "traffic", kind.name(), &gateway, &seconds];
    let limit = time + GRACE;
    let result = guest
        .agent()
        .exec(Exec {
            argv: argv.map(str::to_owned).to_vec(),
            limit_ms: Some(u64::try_from(limit.as_millis())?),
            ..Exec::default()
        })
        .context("the guest's agent could not run the traffic tool")?;
    ensure!(
        !result.stdout.is_empty(),
        "the traffic tool said nothing ({:?}): {}",
        result.end,
        String::from_utf8_lossy(&result.stderr).trim()
    );
    serde_json::from_slice(&result.stdout)
        .with_context(|| format!("the traffic tool said: {}", result.stdout_text().trim()))
}

/// The driver of a NIC.
fn driver(nic: NicModel) -> &'static str {
    nic.drivers().first().copied().unwrap_or_default()
}

/// A result as a part of a report.
fn traffic(kind: TrafficKind, nic: NicModel, nic_at: NicPlace, result: &TrafficResult) -> Traffic {
    let packets = result.sent > 0;
    let count = |n: u64| packets.then_some(n);
    Traffic {
        kind: kind.name().to_owned(),
        driver: driver(nic).to_owned(),
        nic_at,
        seconds: result.elapsed_ns as f64 / 1e9,
        sent: count(result.sent),
        answered: count(result.answered),
        reordered: count(result.reordered),
        duplicated: count(result.duplicated),
        bytes_to_peer: result.bytes_to_peer,
        bytes_from_peer: result.bytes_from_peer,
        corrupted: result.corrupted,
        round_trip_us: result.round_trip_ns.map(|[min, p50, p99, max]| Stat {
            n: result.answered,
            min: min as f64 / 1e3,
            p50: p50 as f64 / 1e3,
            p99: p99 as f64 / 1e3,
            max: max as f64 / 1e3,
        }),
    }
}
