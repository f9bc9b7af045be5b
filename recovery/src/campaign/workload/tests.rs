#![allow(clippy::unwrap_used, reason = "test code")]

use std::process::Command;

use super::*;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn small(steps: &str) -> Result<Workload, WorkloadError> {
    Workload::read(&format!(
        "driver = \"d\"\nentries = [\"f\"]\nworks = \"true\"\n{steps}"
    ))
}

fn step(name: &str, command: &str) -> String {
    format!("[[steps]]\nname = \"{name}\"\ncommand = '''{command}'''\n")
}

#[test]
fn the_programs_own_are_workloads_each_of_another_driver() {
    let own: Vec<_> = OWN
        .iter()
        .map(|text| Workload::read(text).unwrap())
        .collect();
    assert_eq!(own.len(), Workload::own().count());
    for workload in &own {
        assert_eq!(
            Workload::of_driver(&workload.driver).as_ref(),
            Some(workload)
        );
    }
    assert!(Workload::of_driver("another").is_none());
}

#[test]
fn each_step_is_run_and_read_from_what_the_script_writes() {
    let text = step("well", "true")
        + &step("ends its shell", "exit 3")
        + &step("says much", "echo 'step:0 end'; echo sent: >&2")
        + &step("uses a function", "five")
        + "compares = false\nthen = \"exit 9\"\n"
        + &step("differs", "exit 1")
        + "compares = true\n"
        + &step("fails", "exit 2")
        + "compares = true\n";
    let mut workload = small(&text).unwrap();
    workload.shell = "five() { return 5; }".to_owned();
    let output = Command::new("sh")
        .args(["-c", &workload.script("eth0", GATEWAY)])
        .output()
        .unwrap();
    let outcome = workload.read_output(&String::from_utf8(output.stdout).unwrap());
    let steps: Vec<_> = outcome
        .steps
        .iter()
        .map(|(step, status)| (step.as_str(), status.as_str()))
        .collect();
    let expected = [
        ("differs", "1"),
        ("ends its shell", "3"),
        ("fails", "2"),
        ("says much", "0"),
        ("uses a function", "5"),
        ("well", "0"),
    ];
    assert_eq!(steps, expected);
    assert_eq!(
        outcome.corrupted, 1,
        "what could not be compared is not corrupted"
    );
    assert!(outcome.finished && outcome.works);
    // There is no such file here.
    assert!(outcome.contents_changed);
}

#[test]
fn traffic_is_the_agents_tools_and_its_corruption_is_counted() {
    let workload = Workload::of_driver("e1000").unwrap();
    let script = workload.script("eth0", GATEWAY);
    assert!(script.starts_with("IF=eth0 GATEWAY=10.0.2.2\n"));
    assert!(script.contains("\nt ping_flood; echo \"step:$? pings\"\n"));
    let sent = serde_json::to_string(&TrafficResult {
        corrupted: 2,
        ..TrafficResult::default()
    });
    let output = format!(
        "sent:{}\nstep:0 pings\nsent:\nstep:1 stream\nstep:0 works\nstep:0 contents\nnoise\nstep:0 end\n",
        sent.unwrap()
    );
    let outcome = workload.read_output(&output);
    assert_eq!(outcome.steps.len(), 2);
    assert_eq!(
        (outcome.corrupted, outcome.works, outcome.finished),
        (2, true, true)
    );
    assert!(!outcome.contents_changed);
    assert!(workload.read_output("step:1 contents\n").contents_changed);
    let nothing = workload.read_output("\u{0}step\nstep:\nsent:{");
    assert_eq!(nothing, Outcome::default());
}

#[test]
fn what_ended_otherwise_is_named_and_what_varies_by_itself_is_left_out() {
    let text = step("a", "true") + &step("b", "true") + &step("c", "true");
    let workload = small(&text).unwrap();
    let well = workload.read_output("step:0 a\nstep:0 b\nstep:0 c\n");
    let other = workload.read_output("step:0 a\nstep:0 b\nstep:1 c\n");
    let baseline = well.clone().alike(&other);
    let faulty = workload.read_output("step:1 a\nstep:0 c\n");
    assert_eq!(
        faulty.differs(&baseline, &workload),
        ["a: 1", "b: not done"]
    );
    assert!(well.differs(&baseline, &workload).is_empty());
    let failed = workload.read_output("step:0 a\nstep:2 b\n");
    assert!(well.differs(&failed, &workload).is_empty(), "it succeeds");
    let part = workload.only(&["b".to_owned()]);
    assert_eq!(faulty.differs(&baseline, &part), ["b: not done"]);
}

#[test]
fn the_guest_says_how_long_each_step_took() {
    let text = step("a", "true") + &step("b", "true");
    let workload = small(&text).unwrap();
    let said = "at:5.00\nstep:0 a\nat:7.50\nstep:0 b\nat:8.00\nstep:0 works\nat:9.00\n";
    let slow = workload.read_output(said);
    let fast = workload.read_output("at:1\nstep:0 a\nat:2\nstep:0 b\nat:9\n");
    let both = slow.alike(&fast);
    let part = |steps: &[&str]| {
        let steps: Vec<_> = steps.iter().map(|&step| step.to_owned()).collect();
        both.left_out(&workload.only(&steps))
    };
    assert_eq!(part(&["a", "b"]), Duration::ZERO);
    assert_eq!(part(&["a"]), Duration::from_secs(7));
    assert_eq!(part(&["b"]), Duration::from_millis(2500));
    // One that goes back, or says no time.
    for said in [
        "at:9\nstep:0 a\nat:1\n",
        "at:-1\nstep:0 a\nat:inf\nat:1e300\nat:\n",
    ] {
        let took = workload.read_output(said).took;
        assert!(took.values().all(Duration::is_zero), "{took:?}");
    }
}

#[test]
fn the_kernel_says_sooner_that_it_stands_still_until_that_is_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let named = |script: String| {
        let script = script.replace(WATCHES[0].0, &path("watchdog"));
        // This one is not there.
        script
            .replace(WATCHES[1].0, &path("none"))
            .replace("K=/tmp/", &format!("K={}", path("kept-")))
    };
    let run = |script: String| {
        let status = Command::new("sh").args(["-c", &named(script)]).status();
        assert!(status.unwrap().success());
        std::fs::read_to_string(path("watchdog")).unwrap()
    };
    std::fs::write(path("watchdog"), "10\n").unwrap();
    assert_eq!(run(watch_closely()), "2\n");
    assert_eq!(run(watch_as_usual()), "10\n");
    std::fs::write(path("watchdog"), "7\n").unwrap();
    assert_eq!(
        run(watch_as_usual()),
        "7\n",
        "there is nothing to take back"
    );
    let files = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(files.count(), 1, "nothing else is left");
}

#[test]
fn what_is_no_workload_is_refused_with_the_reason() {
    let refused = |text: &str| small(text).unwrap_err().to_string();
    assert!(refused("").contains("steps"));
    assert!(refused("steps = []").contains("steps: none"));
    let unknown = refused("speed = 3\n");
    assert!(
        unknown.contains("line 4") && unknown.contains("speed"),
        "{unknown}"
    );
    assert_eq!(unknown.lines().count(), 1, "{unknown}");
    let twice = step("a", "true") + &step("a", "false");
    assert!(refused(&twice).contains("two steps"));
    for name in [
        "end",
        "works",
        "contents",
        "",
        "a\\nstep:0 end",
        "$(reboot)",
    ] {
        refused(&step(name, "true"));
    }
    assert!(refused("[[steps]]\nname = \"a\"\n").contains("command or traffic"));
    let traffic = "[[steps]]\nname = \"a\"\ntraffic = \"ping_flood\"\n";
    assert!(refused(traffic).contains("network"));
    let mut workload = small(&step("a", "true")).unwrap();
    workload.helpers = vec!["f; reboot".to_owned()];
    assert!(
        workload
            .check()
            .unwrap_err()
            .to_string()
            .contains("f; reboot")
    );
    workload.helpers.clear();
    workload.entries.clear();
    assert!(workload.check().is_err());
}
