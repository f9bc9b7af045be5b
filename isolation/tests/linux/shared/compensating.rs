//! Calls of the stock e1000 that went on in the guest, fail there and are taken back to their
//! beginning.

use std::collections::BTreeSet;
use std::time::Duration;

use isolation::compensation::effects::{ArgumentModel, OppositeModel};
use isolation::dispatch::fault::{FaultOrder, InstructionKind, UsedUpBy, WhichCalls};

use super::e1000::E1000_ENTRIES;
use super::leaks::{ANSWERED, Resources, noise};
use super::{Lent, with_silent_network};
use crate::machine::Machine;
use crate::named;

/// `ud2`.
const FAULT: [u8; 2] = [0x0f, 0x0b];

/// A machine in which every wait of a call goes on in the guest, with all entries isolated.
fn machine(guest_only: &[&str]) -> Lent {
    machine_with(E1000_ENTRIES, guest_only)
}

/// As [`machine`], with only these entries isolated.
fn machine_with(entries: &[&str], guest_only: &[&str]) -> Lent {
    let mut machine = with_silent_network();
    // With larger frames a reset gives pages back, which nothing takes back (docs/recovery.md).
    machine.run("ip link set eth0 mtu 1500; linked");
    machine.settings.sleep_limit = Duration::ZERO;
    machine.settings.model = Some(machine.kernel_model());
    // Since 6.10 the allocators' names say whether what they allocate is accounted to its place in
    // the code.
    let own = |name: &&str| match machine.has_symbol(name) {
        true => (*name).to_owned(),
        false => format!("{name}_noprof"),
    };
    machine.settings.guest_only = guest_only.iter().map(own).collect();
    machine.isolate("e1000", named(entries)).unwrap();
    machine
}

/// Recoveries of each function that are looked at for leaks: a hundred in a full run, a few
/// otherwise, unless `COFFERDAM_RECOVERIES` says how many.
fn recoveries() -> u64 {
    let full = std::env::var_os("COFFERDAM_FULL").is_some();
    let usual = if full { 100 } else { 8 };
    std::env::var("COFFERDAM_RECOVERIES").map_or(usual, |text| text.parse().unwrap())
}

/// Places for faults: behind each call of a kernel function, and at the last instruction.
fn places(machine: &Machine, function: &str) -> Vec<u64> {
    let all = machine.isolator.instructions("e1000", function).unwrap();
    let behind = all.windows(2).filter_map(|pair| {
        matches!(pair[0].kind, InstructionKind::Calls(_)).then_some(pair[1].offset)
    });
    let last = all
        .iter()
        .rev()
        .find(|at| at.kind == InstructionKind::Return);
    behind.chain(last.map(|at| at.offset)).collect()
}

/// Orders `times` faults at `offset` of `function`, of each call.
fn order(machine: &Machine, function: &str, offset: u64, times: u64) {
    let order = FaultOrder {
        function: function.to_owned(),
        offset,
        code: FAULT.to_vec(),
        which: WhichCalls::ALL,
        times,
        used_up_by: UsedUpBy::Failing,
    };
    machine.isolator.order_fault("e1000", order).unwrap();
}

/// How often in a row a cache has to grow, over as many recoveries each time, for a leak.
const BATCHES: u32 = 3;

/// Calls of a function that fail and are taken back, at one place after the other.
struct Recoveries<'a> {
    function: &'a str,
    /// What calls it, and what makes undone what that did if it did not fail.
    operation: (&'a str, &'a str),
    places: Vec<u64>,
    /// Next place.
    index: usize,
    /// Faults that were reached.
    hit: u64,
    /// Of these, those after a spill.
    done: u64,
    /// Nanoseconds for memory, device, and kernel functions with the return.
    times: Vec<(u64, u64, u64)>,
    /// Answers that came later.
    late: u64,
}

impl<'a> Recoveries<'a> {
    fn new(machine: &Machine, function: &'a str, operation: (&'a str, &'a str)) -> Self {
        // The first are those with the most to take back.
        let mut places = places(machine, function);
        places.reverse();
        assert!(!places.is_empty());
        Self {
            function,
            operation,
            places,
            index: 0,
            hit: 0,
            done: 0,
            times: Vec::new(),
            late: 0,
        }
    }

    /// Has as many more calls fail after a spill and be taken back.
    fn run(&mut self, machine: &mut Machine, count: u64) {
        let (wanted, limit) = (self.done + count, self.index + self.places.len() * 64);
        // Places that an undisturbed call does not come by are passed over.
        while self.done < wanted && self.index < limit {
            self.next(machine);
        }
        assert!(
            self.done >= wanted,
            "{} failed after a spill {} times only, of {wanted}",
            self.function,
            self.done
        );
    }

    /// Has a call fail at the next place.
    fn next(&mut self, machine: &mut Machine) {
        let (function, (operation, back)) = (self.function, self.operation);
        let offset = self.places[self.index % self.places.len()];
        self.index += 1;
        let earlier = machine.entry("e1000", function);
        let losses = machine.link_losses();
        order(machine, function, offset, 1);
        let ended = machine.run(&format!("({operation}) >/dev/null 2>&1 && echo well; true"));
        let now = machine.entry("e1000", function);
        order(machine, function, offset, 0);
        if now.aborts == earlier.aborts {
            assert_eq!(ended.trim(), "well", "{function}+{offset:#x}");
            machine.run(back);
            return;
        }
        self.hit += 1;
        let report = machine.isolator.reports("e1000").unwrap().pop().unwrap();
        // An adapter that is reset loses its link; what was taken back nobody has seen.
        if function == "e1000_set_ringparam" {
            assert_eq!(machine.link_losses(), losses, "{report}");
        }
        assert_eq!(ended.trim(), "", "{function}+{offset:#x} did not fail");
        assert_eq!(now.left_over, 0, "{report}");
        if now.undone > earlier.undone {
            let phases = report.phases;
            let returned = phases.compensate_ns + phases.returned_ns;
            self.times
                .push((phases.memory_ns, phases.device_ns, returned));
        }
        self.done += now.undone - earlier.undone;
        let answered = machine.run(ANSWERED);
        assert!(
            answered.contains("answered"),
            "{function}+{offset:#x}: {answered}"
        );
        self.late += u64::from(answered.contains("late"));
    }

    fn print(&self, machine: &Machine) {
        let status = machine.entry("e1000", self.function);
        eprintln!(
            "{}: {} places, {} faults, {} of them after a spill; {} bytes put back, {} kernel functions called",
            self.function,
            self.places.len(),
            self.hit,
            self.done,
            status.restored_bytes,
            status.compensations
        );
        let median_and_longest = |of: fn(&(u64, u64, u64)) -> u64| {
            let mut all: Vec<u64> = self.times.iter().map(of).collect();
            all.sort_unstable();
            (all.get(all.len() / 2).copied(), all.last().copied())
        };
        eprintln!(
            "median and longest in ns: memory {:?}, device {:?}, kernel functions and return {:?}",
            median_and_longest(|time| time.0),
            median_and_longest(|time| time.1),
            median_and_longest(|time| time.2)
        );
        eprintln!("answered later than after 2 s: {}", self.late);
    }
}

/// Has `function`, which `operation` calls, fail at its places and be taken back each time, and
/// looks for leaks in `count` of these recoveries. An object that stays at each of them makes its
/// cache grow every time; what other threads of the guest take and give does not.
fn fail_everywhere(machine: &mut Machine, function: &str, operation: (&str, &str), count: u64) {
    let mut recoveries = Recoveries::new(machine, function, operation);
    // What is made once and kept is there by then: in a long run after a fault at each place.
    recoveries.run(machine, 1);
    while count >= recoveries.places.len() as u64 && recoveries.index < recoveries.places.len() {
        recoveries.next(machine);
    }
    let noise = noise(machine, operation);
    let mut leaking: Option<BTreeSet<String>> = None;
    let mut before = Resources::of(machine);
    for _ in 0..BATCHES {
        let earlier = recoveries.done;
        recoveries.run(machine, count);
        let now = Resources::of(machine);
        let grown = now.grown(&before, &noise, recoveries.done - earlier);
        before = now;
        let still = match leaking.take() {
            Some(leaking) => leaking.intersection(&grown).cloned().collect(),
            None => grown,
        };
        let is_over = still.is_empty();
        leaking = Some(still);
        if is_over {
            break;
        }
    }
    recoveries.print(machine);
    let leaking = leaking.unwrap_or_default();
    assert!(
        leaking.is_empty(),
        "{function}: {leaking:?} grew {BATCHES} times in a row"
    );
}

/// Packets in both directions until the file is gone, their contents checked.
const PACKETS: &str = "touch /tmp/on; \
    (while [ -e /tmp/on ]; do /init traffic udp_echo 10.0.2.2 3; done; touch /tmp/ended) \
        </dev/null >/tmp/stream 2>&1 & \
    (while [ -e /tmp/on ]; do ping -c 50 -i 0.02 -s 1000 10.0.2.2; done) </dev/null >/dev/null 2>&1 &";

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_call_that_was_taken_back_can_be_run_again() {
    let mut machine = with_silent_network();
    machine.settings.sleep_limit = Duration::ZERO;
    machine.settings.retry = true;
    machine.settings.model = Some(machine.kernel_model());
    machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
    let function = "e1000_set_ringparam";
    let places = places(&machine, function);
    let most = usize::try_from(recoveries()).unwrap() / 2;
    for (round, offset) in places.into_iter().rev().take(most).enumerate() {
        order(&machine, function, offset, 1);
        let size = [128, 256][round % 2];
        // Nobody outside notices that it failed.
        machine.run(&format!(
            "ethtool -G eth0 rx {size}; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2"
        ));
        assert!(machine.run("ethtool -g eth0").contains(&size.to_string()));
        order(&machine, function, offset, 0);
    }
    let status = machine.entry("e1000", function);
    assert!(
        status.undone > 0 && status.retries == status.aborts,
        "{status:?}"
    );
    assert_eq!(status.left_over, 0);
    machine.assert_healthy();
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn packets_on_their_way_do_not_keep_a_reset_from_being_taken_back() {
        let mut machine = machine(&["vzalloc"]);
        machine.run(PACKETS);
        fail_everywhere(
            &mut machine,
            "e1000_set_ringparam",
            ("ethtool -G eth0 rx 128", "ethtool -G eth0 rx 256"),
            recoveries(),
        );
        machine.print_status();
        machine.run("rm /tmp/on; linked; ping -c 50 -i 0.02 -W 2 10.0.2.2; while ! [ -e /tmp/ended ]; do sleep 0.2; done");
        let stream = machine.run("cat /tmp/stream");
        eprintln!("{stream}");
        assert!(stream.contains("\"corrupted\":0"), "{stream}");
        let corrupted = stream.matches("\"corrupted\":");
        assert_eq!(
            corrupted.count(),
            stream.matches("\"corrupted\":0,").count()
        );
        // The calls of the others went through the domain meanwhile, and none of them failed.
        for entry in ["e1000_intr", "e1000_clean", "e1000_xmit_frame"] {
            let entry = machine.entry("e1000", entry);
            assert!(entry.calls > 50 && entry.aborts == 0, "{entry:?}");
        }
        let transmitted = machine.entry("e1000", "e1000_xmit_frame");
        let undone = machine.entry("e1000", "e1000_set_ringparam").undone;
        eprintln!(
            "{} packets kept out, {undone} calls taken back",
            transmitted.kept_out
        );
        machine.assert_healthy();
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_reset_of_the_adapter_that_fails_with_its_rings_emptied_in_the_guest_is_taken_back() {
        // The new rings are allocated in the guest, when the old ones are empty and the adapter has
        // been reset.
        let mut machine = machine(&["vzalloc"]);
        machine
            .run("ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; linked; ping -c 1 -W 2 10.0.2.2");
        fail_everywhere(
            &mut machine,
            "e1000_set_ringparam",
            ("ethtool -G eth0 rx 128", "ethtool -G eth0 rx 256"),
            recoveries(),
        );
        machine.print_status();
        assert_eq!(machine.status("e1000").broken, None);
        machine.run("ping -c 300 -i 0.01 -W 2 10.0.2.2");
        machine.isolator.release("e1000").unwrap();
        machine.run("ping -c 2 -i 0.1 -W 2 10.0.2.2; ethtool -G eth0 rx 128; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2");
        machine.assert_healthy();
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn an_opposite_that_does_not_return_is_given_up() {
        let mut machine = with_silent_network();
        machine.settings.sleep_limit = Duration::ZERO;
        let mut model = machine.kernel_model();
        let carrier = model
            .lasting
            .iter_mut()
            .find(|f| f.name == "netif_carrier_off");
        carrier.unwrap().undo = Some(OppositeModel {
            function: "msleep".to_owned(),
            arguments: vec![ArgumentModel::Constant(18_000)],
        });
        machine.settings.model = Some(model);
        machine.isolate("e1000", named(E1000_ENTRIES)).unwrap();
        let function = "e1000_set_ringparam";
        let offset = *places(&machine, function).last().unwrap();
        order(&machine, function, offset, 1);
        machine.run("(ethtool -G eth0 rx 128; echo done > /tmp/done) </dev/null >/dev/null 2>&1 &");
        let entry = |machine: &Machine| machine.entry("e1000", function);
        while entry(&machine).left_over == 0 {
            std::thread::sleep(Duration::from_millis(200));
        }
        let report = machine.isolator.reports("e1000").unwrap().pop().unwrap();
        assert!(report.violation.stays());
        assert!(
            report
                .to_string()
                .contains("msleep, called to take it back, does not return"),
            "{report}"
        );
        // It does after all: the caller is not left alone.
        machine.run(
            "while ! [ -e /tmp/done ]; do sleep 0.2; done; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2",
        );
        assert_eq!((entry(&machine).left_over, entry(&machine).undone), (1, 0));
        machine.assert_healthy();
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn packets_are_kept_out_where_only_the_reset_is_isolated_too() {
        let function = "e1000_set_ringparam";
        let mut machine = machine_with(&[function], &["vzalloc"]);
        machine.run(PACKETS);
        let operation = ("ethtool -G eth0 rx 128", "ethtool -G eth0 rx 256");
        fail_everywhere(&mut machine, function, operation, recoveries());
        machine.print_status();
        machine.run("rm /tmp/on; linked; ping -c 20 -i 0.02 -W 2 10.0.2.2");
        let status = machine.status("e1000");
        let transmit = status.entries.iter().find(|e| e.name == "e1000_xmit_frame");
        // The guard was there for as long as it had to be only, and let nothing into the domain.
        if let Some(transmit) = transmit {
            assert!(transmit.kept_out > 0 && transmit.calls == 0, "{transmit:?}");
        }
        machine.assert_healthy();
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn an_open_that_fails_after_its_interrupt_was_requested_in_the_guest_is_taken_back() {
        let mut machine = machine(&["request_threaded_irq"]);
        machine.run("ip link set eth0 down; ip link set eth0 up; linked; ping -c 1 -W 2 10.0.2.2");
        fail_everywhere(
            &mut machine,
            "e1000_open",
            ("ip link set eth0 down; ip link set eth0 up", "true"),
            recoveries(),
        );
        machine.print_status();
        assert_eq!(machine.status("e1000").broken, None);
        machine.isolator.release("e1000").unwrap();
        machine.run(
            "ip link set eth0 down; ip link set eth0 up; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2",
        );
        machine.assert_healthy();
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_reset_of_the_adapter_that_fails_after_it_slept_is_taken_back() {
        let mut machine = machine(&[]);
        machine
            .run("ethtool -G eth0 rx 128; ethtool -G eth0 rx 256; linked; ping -c 1 -W 2 10.0.2.2");
        fail_everywhere(
            &mut machine,
            "e1000_set_ringparam",
            ("ethtool -G eth0 rx 128", "ethtool -G eth0 rx 256"),
            recoveries(),
        );
        machine.print_status();
        assert_eq!(machine.status("e1000").broken, None);
        // As if nothing had been: the rings are as large as before, and can be changed.
        assert!(machine.run("ethtool -g eth0").contains("256"));
        machine.run("ethtool -G eth0 rx 128; linked; ping -c 3 -i 0.1 -W 2 10.0.2.2; ethtool -G eth0 rx 256; linked; ping -c 3 -i 0.1 -W 2 10.0.2.2");
        machine.isolator.release("e1000").unwrap();
        machine.run(
            "ip link set eth0 down; ip link set eth0 up; linked; ping -c 2 -i 0.1 -W 2 10.0.2.2",
        );
        machine.assert_healthy();
    }
}
