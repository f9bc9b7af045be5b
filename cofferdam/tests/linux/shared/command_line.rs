//! `cofferdam isolate` and its like by the command line.

use super::shared;
use crate::isolation::{ask, ask_json, isolated, refused};
use crate::{ping, shell};

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_command_line_isolates_injects_reports_and_releases() {
    let mut guest = shared();
    for (words, says) in [
        ("isolate nobody e1000 --entries all", "no VM named"),
        ("isolate guest floppy --entries all", "no module floppy"),
        ("isolate guest e1000 --entry e1000_fly", "e1000_fly"),
        ("isolate guest e1000 --match e1000_fly_*", "e1000_fly_*"),
        ("release guest e1000", "not isolated"),
        ("violations guest e1000", "not isolated"),
        ("inject guest e1000 e1000_clean", "not isolated"),
    ] {
        refused(&mut guest, words, says);
    }
    let reply = ask_json(
        &mut guest,
        "isolate guest e1000 --match e1000_get_* --budget-us 10000000",
    );
    let entries = reply["entries"].as_array().unwrap();
    assert!(
        entries.contains(&"e1000_get_ethtool_stats".into()),
        "{reply}"
    );
    refused(
        &mut guest,
        "inject guest e1000 e1000_fly",
        "no function e1000_fly",
    );
    // It fills a buffer that it was handed before it read the device.
    let eeprom = guest.shell("ethtool -e eth0 offset 0 length 6");
    let violations = ask(&mut guest, "violations guest e1000");
    assert!(eeprom.is_ok(), "{eeprom:?} {violations}");
    let statistics = shell(&mut guest, "ethtool -S eth0");
    assert!(statistics.contains("rx_packets"), "{statistics}");
    ask(
        &mut guest,
        "inject guest e1000 e1000_get_ethtool_stats --fault undefined_instruction",
    );
    // The function returns nothing, so it is run again after the fault.
    shell(&mut guest, "ethtool -S eth0");
    let text = ask(&mut guest, "violations guest e1000");
    assert!(
        text.contains("e1000_get_ethtool_stats") && text.contains("invalid opcode"),
        "{text}"
    );
    let reports = ask_json(&mut guest, "violations guest e1000");
    let all = reports["violations"].as_array().unwrap();
    assert_eq!((all.len(), &all[0]["count"]), (1, &1.into()), "{reports}");
    assert_eq!(reports["last_reports"].as_array().unwrap().len(), 1);

    let status = &isolated(&mut guest)[0];
    let entry = status["entries"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["name"] == "e1000_get_ethtool_stats")
        .unwrap();
    assert_eq!(entry["aborts"], 1, "{entry}");
    assert!(entry["commits"].as_u64() >= Some(2), "{entry}");
    let table = ask(&mut guest, "release guest e1000");
    assert!(table.contains("e1000_get_ethtool_stats"), "{table}");
    assert_eq!(isolated(&mut guest).len(), 0);
    // What they did wrong is still known.
    let text = ask(&mut guest, "violations guest e1000");
    assert!(text.contains("invalid opcode"), "{text}");
    ping(&mut guest, "10.0.2.2", 56);
}
