//! `cargo xtask demo`: a little of every measurement, in one report.

use std::process::ExitCode;

use super::{Bench, Common};
use crate::steps::Steps;
use crate::workspace::Workspace;

/// Rollbacks of each entry point that a demo makes.
const ROLLBACKS: u16 = 6;

/// Switches of a NIC that a demo makes of each kind, and moves by unplug and plug.
const SWITCHES: u16 = 30;
const MOVES: u16 = 3;

/// Snapshots and restores that a demo makes of each kind.
const SUSPENDS: u16 = 2;

/// Faults that a demo tries in each of the ways.
const FAULTS: u32 = 8;
/// The driver that they are in: one that is quickly tried.
pub const DRIVER: &str = "null_blk";
/// Of what kinds they are: one of each, of those that a machine seldom survives.
const KINDS: &str = "null_dereference,pointer,wild_jump,smashed_return,undefined_instruction,halt,endless_loop,interrupts_left_off";

/// Shows what Cofferdam does, and measures it
///
/// Installs what is missing, builds, boots guests on this host's KVM where that is fast enough and
/// in the lab where it is not, and writes target/demo/report.json and target/demo/report.html.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    #[command(flatten)]
    common: Common,
}

/// Does it.
pub fn demo(workspace: &Workspace, args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let steps = Steps::new(9);
    let mut bench = Bench::prepare(workspace, "target/demo/parts", &steps)?;
    let runs = args.common.runs;
    steps.must("boot", || bench.demo_boots(runs))?;
    steps.must("recovery", || bench.recovery(runs, ROLLBACKS))?;
    steps.must("suspend", || bench.suspend(SUSPENDS, &[256]))?;
    steps.must("switch", || bench.switch(SWITCHES, MOVES, &[256]))?;
    steps.must("switch of a function", || {
        let ways = ["--method", "context-stall,hotplug"];
        bench.function_switch(SWITCHES, MOVES, &[256], &ways)
    })?;
    steps.must("faults", || bench.campaign(DRIVER, KINDS, FAULTS))?;
    let report = bench.finish(&workspace.path("target/demo"), "report", args.common.json)?;
    steps.summary();
    eprintln!(
        "\nThe report: {}\n            {}",
        report.display(),
        report.with_extension("html").display()
    );
    Ok(ExitCode::SUCCESS)
}
