//! Campaigns: faults in one instruction of a stock driver, each made natively and isolated.

use std::path::Path;

use cofferdam::campaign::worker::Setup;
use cofferdam::campaign::{self, CampaignOptions};
use cofferdam::json_lines::Elsewhere;
use devices::edge::EdgeKind;
use isolation::attach::request::Contain;
use isolation::mutation::Kind;
use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::record::Record;
use recovery::campaign::summary::Summary;
use recovery::campaign::verdict::Verdict;
use recovery::campaign::workload::{Steps, Workload, checks};

use super::options;
use super::victim::DRIVER;

/// Fills in the driver's name, by a call that can be left out.
const DRVINFO: &str = "e1000_get_drvinfo";

/// A campaign of a few faults with this workload.
fn campaign(
    folder: &Path,
    workload: Workload,
    kinds: &[TrialKind],
    trials: u32,
) -> CampaignOptions {
    CampaignOptions {
        setup: Setup {
            steps: Steps::Called,
            guest: options().with(&workload.run).with(&checks()),
            workload,
            contain: Contain::Full,
            twins: 0,
        },
        kinds: kinds.to_vec(),
        trials,
        seed: 1,
        ways: Way::ALL.to_vec(),
        jobs: 1,
        file: folder.join("campaign.jsonl"),
        elsewhere: Elsewhere::Followed,
    }
}

/// Makes it. Each fault in the driver's code that the guest comes to crashes it natively and not
/// when isolated; the records, and figures.
fn run(campaign: &CampaignOptions) -> (Vec<Record>, Summary) {
    let mut tell = |what: &str| eprintln!("{what}");
    let mut records = Vec::new();
    let done = campaign::run(campaign, &mut tell, &mut |progress| {
        eprintln!("{}: {:?}", progress.record.says, progress.record.runs);
        records.push(progress.record.clone());
        true
    })
    .unwrap();
    assert_eq!((done.made, done.stopped), (campaign.trials, false));
    let verdict = |record: &Record, way| record.runs[&way].verdict;
    let reached: Vec<_> = records
        .iter()
        .filter(|record| matches!(record.trial.kind, TrialKind::Code(_)))
        .filter(|record| record.runs[&Way::Native].seen.reached == Some(true))
        .collect();
    assert!(
        !reached.is_empty(),
        "the seed has no fault that the guest comes to"
    );
    for record in reached {
        assert_eq!(verdict(record, Way::Native), Verdict::Crash, "{record:?}");
        for way in [Way::Once, Way::Stays] {
            assert_ne!(verdict(record, way), Verdict::Escaped, "{record:?}");
        }
        assert_eq!(verdict(record, Way::Once), Verdict::Recovered, "{record:?}");
        let detected = record.runs[&Way::Once].seen.violation.as_ref().unwrap();
        assert!(detected.rollback_ns > 0, "{record:?}");
    }
    (records, done.summary)
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn faults_that_crash_a_guest_are_recovered_from_when_the_driver_is_isolated() {
    let folder = tempfile::tempdir().unwrap();
    let mut workload = Workload::of_driver(DRIVER).unwrap();
    workload.entries = ["e1000_xmit_frame", DRVINFO, "e1000_open"]
        .map(str::to_owned)
        .to_vec();
    workload.helpers.clear();
    // What comes to these functions.
    let kept = ["pings", "ethtool -i", "down", "up", "pings again"];
    workload
        .steps
        .retain(|step| kept.contains(&step.name.as_str()));
    assert_eq!(workload.steps.len(), kept.len());
    let kinds = [
        TrialKind::Code(Kind::NullDereference),
        TrialKind::Edge(EdgeKind::Removed),
    ];
    let mut campaign = campaign(folder.path(), workload, &kinds, 2);
    let (records, summary) = run(&campaign);
    // A device that was pulled out does not work, and the guest lives. How many events there are
    // depends on how fast the machine is: isolated, the work may be over before it comes to that
    // many.
    for (way, run) in &records[1].runs {
        let came_to_it = run.seen.reached == Some(true);
        assert!(came_to_it || *way != Way::Native, "{run:?}");
        assert!(run.seen.answers && run.seen.works != came_to_it, "{run:?}");
        assert_ne!(run.verdict, Verdict::Escaped, "{way:?}: {run:?}");
    }
    assert_eq!(records[1].runs.len(), 3);
    let written = campaign::read(&campaign.file, Elsewhere::Followed).unwrap();
    assert_eq!(written.records, records);
    assert_eq!(Summary::of(&written.records), summary);
    // Another campaign does not go on in this one's file.
    campaign.seed = 2;
    let refused = campaign::run(&campaign, &mut |_| {}, &mut |_| true).unwrap_err();
    assert!(
        refused.to_string().contains("another campaign"),
        "{refused:#}"
    );
}

/// Run in the full form of the suite, or by name.
mod long {
    use std::time::Duration;

    use cofferdam::campaign::alarms;

    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn no_call_of_a_driver_without_a_fault_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let workload = Workload::of_driver(DRIVER).unwrap();
        let entries = workload.entries.clone();
        let setup = campaign(folder.path(), workload, &[], 1).setup;
        let mut tell = |what: &str| eprintln!("{what}");
        let mut rounds = 0;
        // Two rounds.
        let mut each = |_: &alarms::FalseAlarms| {
            rounds += 1;
            rounds < 2
        };
        let found = alarms::look(&setup, 1, Duration::MAX, &mut tell, &mut each).unwrap();
        assert_eq!((found.rounds, found.totals().1), (2, 0), "{found:?}");
        assert!(found.alarms.is_empty(), "{found:?}");
        for entry in &entries {
            let calls = found.entries.iter().find(|calls| calls.name == *entry);
            assert!(
                calls.is_some_and(|calls| calls.calls > 0),
                "{entry}: {found:?}"
            );
        }
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn faults_in_a_block_driver_and_in_what_its_isolated_function_calls_are_recovered_from() {
        let folder = tempfile::tempdir().unwrap();
        let workload = Workload::of_driver("null_blk").unwrap();
        let kinds = [Kind::NullDereference, Kind::UndefinedInstruction].map(TrialKind::Code);
        let campaign = campaign(folder.path(), workload, &kinds, 6);
        let (records, _) = run(&campaign);
        let in_helpers = records.iter().filter(|record| {
            let workload = &campaign.setup.workload;
            workload.helpers.contains(&record.trial.function)
        });
        let once = |record: &Record| record.runs.get(&Way::Once).and_then(|run| run.seen.reached);
        let reached = |record: &&Record| once(record) == Some(true);
        assert!(in_helpers.filter(reached).count() > 0, "{records:?}");
    }
}
