//! Faults in one instruction of a stock driver: by hand and taken back, and as a campaign.

use std::path::Path;

use agent_protocol::message::Bytes;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::campaign::worker::Setup;
use cofferdam::campaign::{self, CampaignOptions, with_function};
use cofferdam::control::protocol::{FaultyCalls, FunctionBytes, Reply, Request};
use isolation::attach::request::Contain;
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::mutation::{Kind, Site, mutate, sites};
use recovery::campaign::Way;
use recovery::campaign::record::Record;
use recovery::campaign::summary::Summary;
use recovery::campaign::verdict::Verdict;
use recovery::campaign::workload::{Workload, checks};
use recovery::ladder::{LadderConfig, OnFault, State};

use super::victim::{DRIVER, Victim};
use super::{GATEWAY, options};

/// Fills in the driver's name, by a call that can be left out.
const DRVINFO: &str = "e1000_get_drvinfo";
/// Takes packets out of the ring for reception; `e1000_clean` calls it.
const CLEAN_RX: &str = "e1000_clean_rx_irq";

fn text_of(victim: &mut Victim, function: &str) -> FunctionBytes {
    victim.guest.agent().disconnect();
    match victim.ask(&Request::FunctionText {
        module: DRIVER.to_owned(),
        function: function.to_owned(),
    }) {
        Reply::FunctionText(text) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_call_is_left_out_of_a_driver_that_is_not_isolated_and_put_back() {
    let mut victim = Victim::boot();
    let says_driver = |victim: &mut Victim| {
        let info = victim.guest.run(&["ethtool", "-i", "eth0"]).unwrap();
        info.lines().any(|line| line.trim() == "driver: e1000")
    };
    assert!(says_driver(&mut victim));
    let text = text_of(&mut victim, DRVINFO);
    assert!(!text.isolated);
    // The first that copies a text copies the driver's name.
    let mutation = with_function(DRVINFO, &text, |function| {
        let all = sites(function);
        let copies = |site: &&Site| site.text.contains("strscpy");
        let mut copying = all.iter().filter(copies);
        let site = copying.find(|site| site.kinds.contains(&Kind::MissingCall));
        mutate(function, Kind::MissingCall, site.unwrap().offset, 0)
    });
    let mutation = mutation.unwrap();
    eprintln!("{mutation:?}");
    victim.guest.agent().disconnect();
    victim.ask(&Request::InjectCode {
        module: DRIVER.to_owned(),
        function: DRVINFO.to_owned(),
        offset: mutation.offset.into(),
        old: Bytes(mutation.old.clone()),
        new: Bytes(mutation.new.clone()),
        replaces_whole: mutation.replaces_whole,
        calls: None,
    });
    assert!(!says_driver(&mut victim));
    let undo = Request::UndoFaults {
        module: DRIVER.to_owned(),
    };
    victim.guest.agent().disconnect();
    let Reply::Faults(faults) = victim.ask(&undo) else {
        panic!("no faults");
    };
    assert!(faults.own_text.unwrap().reached_ns.is_some());
    assert!(says_driver(&mut victim));
    assert_eq!(text_of(&mut victim, DRVINFO), text);
    victim.assert_healthy("a call that was left out for a while");
}

/// A length that no packet has room for: the kernel prints that and gives up (`skb_over_panic`, net/core/skbuff.c).
fn absurd_length(victim: &mut Victim) -> Request {
    let text = text_of(victim, CLEAN_RX);
    let mutation = with_function(CLEAN_RX, &text, |function| {
        let all = sites(function);
        let lengths = all
            .iter()
            .filter(|site| site.kinds.contains(&Kind::LengthOverrun));
        let mut changes = lengths.flat_map(|site| {
            let change = |seed| mutate(function, Kind::LengthOverrun, site.offset, seed).ok();
            (0..16).filter_map(change)
        });
        let change = changes.find(|change| {
            change.says.contains("skb_put gets") && change.says.contains("stack pointer")
        });
        change.ok_or("no such change")
    });
    let mutation = mutation.unwrap();
    eprintln!("{mutation:?}");
    Request::InjectCode {
        module: DRIVER.to_owned(),
        function: CLEAN_RX.to_owned(),
        offset: mutation.offset.into(),
        old: Bytes(mutation.old),
        new: Bytes(mutation.new),
        replaces_whole: mutation.replaces_whole,
        calls: Some(FaultyCalls {
            which: WhichCalls::ALL,
            times: 1,
            used_up_by: UsedUpBy::Reaching,
        }),
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_call_that_makes_the_kernel_print_and_give_up_is_taken_back_and_a_stopped_driver_is_not_polled()
{
    let mut victim = Victim::boot();
    victim.isolate("e1000_clean", LadderConfig::default());
    let mut once = absurd_length(&mut victim);
    victim.guest.agent().disconnect();
    victim.ask(&once);
    victim.ping();
    let violations = victim.violations();
    assert_eq!(victim.ladder().rungs.errors, 1, "{violations:?}");
    assert!(violations[0].contains("invalid opcode"), "{violations:?}");
    assert!(violations[0].contains("skb_panic"), "{violations:?}");
    victim.assert_healthy("a kernel function that gave up");
    // What it printed went with the call.
    assert!(!victim.run(&["dmesg"]).contains("skb_over_panic"));
    victim.release();
    // A driver that is stopped while the device is polled: nobody polls it for ever.
    let stop = LadderConfig {
        on_fault: Some(OnFault::Stop),
        ..LadderConfig::default()
    };
    victim.isolate("e1000_clean", stop);
    if let Request::InjectCode { calls, .. } = &mut once {
        *calls = Some(FaultyCalls {
            which: WhichCalls::ALL,
            times: u64::MAX,
            used_up_by: UsedUpBy::Reaching,
        });
    }
    victim.guest.agent().disconnect();
    victim.ask(&once);
    // An answer may be slow in coming.
    for _ in 0..60 {
        victim.try_command(&["ping", "-c", "1", "-W", "1", GATEWAY]);
        if victim.ladder().state == State::Stopped {
            break;
        }
    }
    assert_eq!(victim.ladder().state, State::Stopped);
    let polled = |victim: &Victim| {
        let entry = &victim.module().unwrap().entries[0];
        entry.calls + entry.refused
    };
    let before = polled(&victim);
    victim.run(&["sleep", "2"]);
    // An interrupt may have been on its way.
    assert!(polled(&victim) - before < 10, "{before}");
    // The interface can be set down, which waits for the end of a poll.
    victim.run(&["ip", "link", "set", "eth0", "down"]);
    victim.release();
    victim.run(&["ip", "link", "set", "eth0", "up"]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
}

/// A campaign of a few faults with this workload.
fn campaign(folder: &Path, workload: Workload, kinds: &[Kind], trials: u32) -> CampaignOptions {
    CampaignOptions {
        setup: Setup {
            guest: options().with(&workload.run).with(&checks()),
            workload,
            contain: Contain::Full,
        },
        kinds: kinds.to_vec(),
        trials,
        seed: 1,
        ways: Way::ALL.to_vec(),
        jobs: 1,
        file: folder.join("campaign.jsonl"),
    }
}

/// Makes it. Each fault that the guest comes to crashes it natively and not when isolated; the records, and figures.
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
    let kinds = [Kind::NullDereference, Kind::UndefinedInstruction];
    let mut campaign = campaign(folder.path(), workload, &kinds, 2);
    let (records, summary) = run(&campaign);
    let written = campaign::read(&campaign.file).unwrap();
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

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn faults_in_a_block_driver_and_in_what_its_isolated_function_calls_are_recovered_from() {
    let folder = tempfile::tempdir().unwrap();
    let workload = Workload::of_driver("null_blk").unwrap();
    let kinds = [Kind::NullDereference, Kind::UndefinedInstruction];
    let campaign = campaign(folder.path(), workload, &kinds, 6);
    let (records, _) = run(&campaign);
    let in_helpers = records.iter().filter(|record| {
        let workload = &campaign.setup.workload;
        workload.helpers.contains(&record.trial.function)
    });
    let reached = |record: &&Record| record.runs[&Way::Once].seen.reached == Some(true);
    assert!(in_helpers.filter(reached).count() > 0, "{records:?}");
}
