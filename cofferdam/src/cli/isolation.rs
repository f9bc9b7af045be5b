//! `isolate`, `release`: functions of a guest's driver in a domain of their own.

use anyhow::bail;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::{Contain, Strength};
use isolation::status::{EntryStatus, ModuleStatus};
use recovery::ladder::{LadderConfig, LadderStatus, MayReset, OnFault, State};
use recovery::request::Spilling;

use super::keep::KeepArgs;
use super::{Ending, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{Reply, Request};
use crate::long_work::LongWork;
use crate::options::VmName;
use crate::runtime_dir::RuntimeRoot;
use crate::table::{number, table};
use crate::words::{counted, rungs};

/// Asks a VM, with what it does meanwhile on a terminal if that takes long.
pub(super) fn ask(vm: &VmName, request: &Request) -> anyhow::Result<Reply> {
    let vm = RuntimeRoot::from_environment().find(Some(vm))?;
    let mut word = LongWork::begin();
    ControlClient::to(&vm, ANSWER_TIME)?.ask_and_watch(request, &mut |what| word.tell(what))
}

/// `isolate`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam isolate web e1000 --entry e1000_xmit_frame --entry e1000_clean
  cofferdam isolate web e1000 --match 'e1000_get_*' --on-fault retry
  cofferdam isolate web e1000 --entry e1000_open --on-fault e1000_open=restart
  cofferdam isolate web e1000 --entries all --keep-faults faults
  cofferdam isolate web dummy --entries all")]
pub struct IsolateOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the module, as lsmod shows it in the guest
    module: String,
    #[command(flatten)]
    which: Which,
    /// Processor time of its own that a call may take before it is taken to hang and is taken back,
    /// in microseconds, over all of its parts and runs; a second without it. What the host does for
    /// it and waits do not count
    #[arg(long, value_name = "US")]
    budget_us: Option<u64>,
    /// What is done about a call that failed, once it was taken back: error, retry, resume, restart
    /// or stop; for one function with FUNCTION= in front. May be given several times. Without it a
    /// function that returns nothing is run again, and any other returns an error
    #[arg(long, value_name = "[FUNCTION=]WHAT", value_parser = parse_on_fault)]
    on_fault: Vec<(Option<String>, OnFault)>,
    /// Failed calls in one minute, above which the driver is stopped: its calls return errors
    /// without being run
    #[arg(long, value_name = "N", default_value_t = LadderConfig::default().recoveries_per_minute)]
    max_recoveries_per_minute: u32,
    /// How often one call is run again
    #[arg(long, value_name = "N", default_value_t = LadderConfig::default().retries)]
    retries: u32,
    /// Failed calls of one function, with none that ends well in between, after which the device is
    /// resumed whatever was chosen; after as many more the driver is restarted, then stopped. A
    /// call that hangs counts for 25
    #[arg(long, value_name = "N", default_value_t = LadderConfig::default().failures_in_a_row, value_parser = clap::value_parser!(u32).range(1..))]
    max_failures_in_a_row: u32,
    /// How the device's state is taken before a call reaches it: exact, or registers as of a piece
    /// of hardware
    #[arg(long, value_name = "HOW", default_value = "exact", value_parser = parse_checkpoint)]
    device_checkpoint: CheckpointBy,
    /// How long a call may wait with the guest standing still, in microseconds; a longer wait goes
    /// on in the guest
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    wait_us: Option<u64>,
    /// A kernel function that calls always go on in the guest for; may be given several times
    #[arg(long, value_name = "FUNCTION")]
    guest_only: Vec<String>,
    #[command(flatten)]
    stores: StoresArgs,
    /// How far calls have to be contained: full, exact as with --stores exact, or none where too
    /// little is known of the guest's kernel; a faulty call may then write to all of its heap
    #[arg(long, value_name = "HOW", default_value = "full", value_parser = parse_contain)]
    contain: Contain,
    /// Reset the guest when the driver cannot be restarted: have it boot, or go back (snapshot) to
    /// its last mark or, where it has none, to the last snapshot that was taken of it or that it
    /// went on from; it boots where there is neither, or where going back has not helped. Boot
    /// without a value
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "boot", value_parser = parse_may_reset)]
    may_reset_guest: Option<MayReset>,
    #[command(flatten)]
    keep: KeepArgs,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Which stores are checked.
#[derive(Debug, clap::Args)]
pub struct StoresArgs {
    /// Which stores of an isolated call are checked: the first to each page, or exactly each one to
    /// a page that others have objects on, which takes two exits a store
    #[arg(long, value_name = "HOW", default_value = "page", value_parser = ["page", "exact"])]
    stores: String,
}

impl StoresArgs {
    /// How calls are contained that otherwise were so.
    pub fn contain(&self, otherwise: Contain) -> anyhow::Result<Contain> {
        match (self.stores.as_str(), otherwise) {
            ("exact", Contain::None) => {
                bail!("with --contain none no store is checked: leave one of the two out")
            }
            ("exact", _) => Ok(Contain::Exact),
            (_, contain) => Ok(contain),
        }
    }
}

/// `WHAT` or `FUNCTION=WHAT`.
fn parse_on_fault(text: &str) -> Result<(Option<String>, OnFault), String> {
    let (function, what) = match text.split_once('=') {
        Some((function, what)) if !function.is_empty() => (Some(function.to_owned()), what),
        Some(_) => return Err("give the function's name before =".to_owned()),
        None => (None, text),
    };
    let names = OnFault::ALL.map(OnFault::name).join(", ");
    let on_fault = OnFault::from_name(what).ok_or_else(|| format!("there are {names}"))?;
    Ok((function, on_fault))
}

fn parse_checkpoint(name: &str) -> Result<CheckpointBy, String> {
    let names = CheckpointBy::ALL.map(CheckpointBy::name).join(", ");
    CheckpointBy::from_name(name).ok_or_else(|| format!("there are {names}"))
}

fn parse_contain(name: &str) -> Result<Contain, String> {
    let names = Contain::ALL.map(Contain::name).join(", ");
    Contain::from_name(name).ok_or_else(|| format!("there are {names}"))
}

fn parse_may_reset(name: &str) -> Result<MayReset, String> {
    let names = MayReset::ALLOWED.map(MayReset::name).join(", ");
    MayReset::from_name(name).ok_or_else(|| format!("there are {names}"))
}

/// Which functions.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// A function to isolate; may be given several times
    #[arg(long, value_name = "FUNCTION")]
    entry: Vec<String>,
    /// Isolate all functions whose name fits a pattern as a shell's: *, ?, [a-z], {open,close}
    #[arg(long = "match", value_name = "PATTERN")]
    matching: Option<String>,
    /// Isolate every function that can be
    #[arg(long, value_name = "all", value_parser = ["all"])]
    entries: Option<String>,
}

impl IsolateOptions {
    /// `isolate`
    pub fn run(self) -> anyhow::Result<Ending> {
        let entries = match (self.which.matching, self.which.entry) {
            (Some(pattern), _) => Wanted::Matching(pattern),
            (None, names) if !names.is_empty() => Wanted::Named(names),
            _ => Wanted::All,
        };
        let mut recovery = LadderConfig {
            recoveries_per_minute: self.max_recoveries_per_minute,
            retries: self.retries,
            failures_in_a_row: self.max_failures_in_a_row,
            may_reset_guest: self.may_reset_guest.unwrap_or_default(),
            ..LadderConfig::default()
        };
        for (function, on_fault) in self.on_fault {
            match function {
                Some(function) => {
                    recovery.per_entry.insert(function, on_fault);
                }
                None => recovery.on_fault = Some(on_fault),
            }
        }
        let contain = self.stores.contain(self.contain)?;
        let keep_faults = self.keep.wanted()?;
        let request = Request::Isolate {
            module: self.module.clone(),
            entries,
            budget_us: self.budget_us,
            device_checkpoint: self.device_checkpoint,
            recovery,
            spilling: Spilling {
                wait_us: self.wait_us,
                guest_only: self.guest_only,
            },
            contain,
            keep_faults: keep_faults.clone(),
        };
        let Reply::Isolated(isolated) = ask(&self.vm, &request)? else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&isolated)?;
            return Ok(Ending::SUCCESS);
        }
        let count = |key: &str| isolated[key].as_array().map_or(0, Vec::len);
        let mut text = format!(
            "{} of {} isolated; the guest stood still for {} us\n",
            counted(count("entries") as u64, "function", "functions"),
            self.module,
            isolated["stopped_us"],
        );
        let unknown: Vec<&str> = isolated["not_modelled"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|name| name.as_str())
            .collect();
        if !unknown.is_empty() {
            text.push_str(&format!(
                "the model of kernel functions has no entry for {}: a call that sleeps after one of them cannot \
                 be taken back as a whole\n",
                unknown.join(", ")
            ));
        }
        if count("refused") > 0 {
            text.push_str(&format!(
                "{} cannot be isolated; --json says why\n",
                counted(count("refused") as u64, "function", "functions")
            ));
        }
        if let Some(keep) = keep_faults {
            text.push_str(&format!(
                "up to {} images of faults are kept in {}; the guest stands still while one is written\n",
                keep.at_most,
                keep.dir.display()
            ));
        }
        print_bytes(text.as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

/// `release`
#[derive(Debug, clap::Args)]
pub struct ReleaseOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the module
    module: String,
    /// The final counters as JSON
    #[arg(long)]
    json: bool,
}

impl ReleaseOptions {
    /// `release`
    pub fn run(self) -> anyhow::Result<Ending> {
        let request = Request::Release {
            module: self.module,
        };
        let Reply::Released(status) = ask(&self.vm, &request)? else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&status)?;
        } else {
            print_bytes(status_text(&status).as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// Counters of a module's entries as a table.
pub fn status_text(status: &ModuleStatus) -> String {
    let mut rows = table(&[
        &format!("isolated in {}", status.module),
        "calls",
        "commits",
        "aborts",
        "crossings",
        "mean us",
        "max us",
    ]);
    for entry in &status.entries {
        let mean = entry.total_ns / entry.calls.max(1) / 1000;
        rows.add_row(vec![
            entry.name.clone().into(),
            number(entry.calls),
            number(entry.commits),
            number(entry.aborts),
            number(entry.crossings),
            number(mean),
            number(entry.longest_ns / 1000),
        ]);
    }
    let mut text = format!("{rows}\n{}", strength_text(&status.strength));
    for entry in &status.entries {
        text.push_str(&after_spills(entry));
    }
    if let Some(broken) = &status.broken {
        text.push_str(&format!("not isolated any more: {broken}\n"));
    }
    text
}

/// How strong the isolation of a module is, in lines.
fn strength_text(strength: &Strength) -> String {
    let mut text = match strength.contained {
        true if strength.each_store => {
            "each store is checked against what the call may write, byte by byte".to_owned()
        }
        true => "each store is checked against what the call may write, the first to each page"
            .to_owned(),
        false => "NOT CONTAINED: a faulty call may write to all of the guest's heap".to_owned(),
    };
    match &strength.model {
        Some(kernel) => text.push_str(&format!(
            "; calls that go on in the guest can be taken back (model of Linux {kernel})\n"
        )),
        None => text.push_str("; calls that go on in the guest are not taken back\n"),
    }
    for missing in &strength.missing {
        text.push_str(&format!("not known: {missing}\n"));
    }
    if !strength.untyped.is_empty() {
        text.push_str(&format!(
            "no type is known of {}: calls that fail return -EIO\n",
            strength.untyped.join(", ")
        ));
    }
    text
}

/// What became of an entry's calls that failed after they had gone on in the guest, and what was
/// kept out meanwhile, in lines; empty if there was nothing.
fn after_spills(entry: &EntryStatus) -> String {
    let mut line = String::new();
    for (why, count) in &entry.pass_throughs {
        let calls = counted(*count, "call was", "calls were");
        line.push_str(&format!(
            "{}: {calls} run in the guest itself: {why}\n",
            entry.name
        ));
    }
    if entry.kept_out > 0 {
        line.push_str(&format!(
            "{}: packets were kept out {} while a call that had changed the device's transmitter was in the guest\n",
            entry.name,
            counted(entry.kept_out, "time", "times")
        ));
    }
    if entry.undone > 0 {
        line.push_str(&format!(
            "{}: {} gone on in the guest and {} taken back (by calling {}; {} were put back)\n",
            entry.name,
            counted(entry.undone, "failed call had", "failed calls had"),
            if entry.undone == 1 { "was" } else { "were" },
            counted(entry.compensations, "kernel function", "kernel functions"),
            counted(entry.restored_bytes, "byte", "bytes"),
        ));
    }
    if entry.left_over > 0 {
        line.push_str(&format!(
            "{}: {} gone on in the guest and could not be taken back; `cofferdam violations` says why\n",
            entry.name,
            counted(entry.left_over, "failed call had", "failed calls had")
        ));
    }
    line
}

/// How recovery of a module stands, in lines.
pub fn recovery_text(module: &str, status: &LadderStatus) -> String {
    let state = match status.state {
        State::Running => "runs",
        State::Resuming => "resumes its device",
        State::Restarting => "is being restarted",
        State::Resetting => "goes with the guest, which is being reset",
        State::Stopped => "is stopped: its calls return errors",
        State::Unisolated => "runs in the guest and is NOT isolated",
    };
    let mut text = format!("{module} {state}; {}\n", rungs(&status.rungs));
    if let Some(why) = &status.gave_up {
        text.push_str(&format!("stopped because {why}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_says_what_became_of_calls_that_had_gone_on_in_the_guest() {
        let entry = EntryStatus {
            undone: 3,
            compensations: 12,
            restored_bytes: 4000,
            left_over: 1,
            ..EntryStatus::new("e1000_open")
        };
        let text = after_spills(&entry);
        assert!(text.contains("e1000_open: 3 failed calls"), "{text}");
        assert!(text.contains("12 kernel functions") && text.contains("4000 bytes"));
        assert!(
            text.lines()
                .nth(1)
                .is_some_and(|line| line.contains("1 failed call had gone on"))
        );
        assert_eq!(after_spills(&EntryStatus::new("e1000_open")), "");
        let entry = EntryStatus {
            kept_out: 7,
            ..EntryStatus::new("e1000_xmit_frame")
        };
        assert!(after_spills(&entry).contains("e1000_xmit_frame: packets were kept out 7 times"));
    }

    #[test]
    fn stores_are_looked_at_one_by_one_only_where_calls_are_contained() {
        let stores = |how: &str| StoresArgs {
            stores: how.to_owned(),
        };
        for contain in Contain::ALL {
            assert_eq!(stores("page").contain(contain).unwrap(), contain);
        }
        for contain in [Contain::Full, Contain::Exact] {
            assert_eq!(stores("exact").contain(contain).unwrap(), Contain::Exact);
        }
        let refused = stores("exact").contain(Contain::None).unwrap_err();
        assert!(refused.to_string().contains("--contain none"), "{refused}");
    }

    #[test]
    fn the_status_says_how_strong_isolation_is() {
        let strong = Strength {
            contained: true,
            each_store: false,
            model: Some("6.1".to_owned()),
            ..Strength::default()
        };
        let text = strength_text(&strong);
        assert!(
            text.contains("is checked") && text.contains("Linux 6.1"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
        let weak = Strength {
            untyped: vec!["f.isra.0".to_owned()],
            missing: vec!["PG_slab not found".to_owned()],
            ..Strength::default()
        };
        let text = strength_text(&weak);
        for part in ["NOT CONTAINED", "not taken back", "PG_slab", "f.isra.0"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn what_to_do_about_faults_is_said_for_all_or_for_one() {
        assert_eq!(parse_on_fault("retry"), Ok((None, OnFault::Retry)));
        let one = parse_on_fault("e1000_open=restart").unwrap();
        assert_eq!(one, (Some("e1000_open".to_owned()), OnFault::Restart));
        for wrong in ["", "=", "=stop", "e1000_open=", "reboot"] {
            assert!(parse_on_fault(wrong).is_err(), "{wrong}");
        }
    }
}
