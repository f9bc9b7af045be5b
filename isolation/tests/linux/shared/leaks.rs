//! What a leak would show in, and how much else changes meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use crate::machine::Machine;

/// Whether the gateway answers, and what there is to know if it does not.
pub const ANSWERED: &str = "ip link set eth0 up; linked; ping -c 1 -W 2 10.0.2.2 >/dev/null && echo answered && exit 0; \
    for i in $(seq 15); do ping -c 1 -W 2 10.0.2.2 >/dev/null && echo answered late && exit 0; done; \
    cd /sys/class/net/eth0/queues/tx-0; grep . tx_timeout byte_queue_limits/inflight byte_queue_limits/limit; \
    ethtool -S eth0; ethtool -d eth0; dmesg | tail -n 20; cat /proc/net/softnet_stat; exit 0";

/// Rounds without a fault by which it is known how much else changes meanwhile.
const UNDISTURBED: u32 = 6;

/// What a leak would show in: mappings, interrupts, users of the module, the objects of each slab
/// cache, and pages.
pub struct Resources {
    mappings: String,
    interrupts: String,
    users: String,
    pages: u64,
    objects: BTreeMap<String, u64>,
}

impl Resources {
    pub fn of(machine: &mut Machine) -> Self {
        let mappings = "grep -c e1000 /proc/vmallocinfo; true";
        let interrupts = "grep -c eth0 /proc/interrupts; ls /proc/irq | wc -l";
        // A processor's own slab counts as used up. Shrinking takes it away, and others may have
        // one again until it is read: the least of three readings is next to what is used.
        let caches = machine.run(
            "for i in 1 2 3; do for c in /sys/kernel/slab/kmalloc-*; do echo 1 > $c/shrink; done; \
             tail -n +3 /proc/slabinfo | grep -e kmalloc -e skbuff -e proc | sed 's/ *  */ /g' | cut -d' ' -f1,2; done",
        );
        let mut objects = BTreeMap::new();
        for (name, count) in caches.lines().filter_map(|line| line.split_once(' ')) {
            let Ok(count) = count.trim().parse::<u64>() else {
                continue;
            };
            let least = objects.entry(name.to_owned()).or_insert(count);
            *least = count.min(*least);
        }
        assert!(!objects.is_empty());
        let used = "awk '/^MemTotal/{t=$2} /^MemFree/{f=$2} /^Cached/{c=$2} END{print int((t-f-c)/4)}' /proc/meminfo";
        Self {
            mappings: machine.run(mappings),
            interrupts: machine.run(interrupts),
            users: machine.run("cat /sys/module/e1000/refcnt"),
            pages: machine.run(used).trim().parse().unwrap(),
            objects,
        }
    }

    /// Caches that have grown by more than the `noise` in them and one object for every two of so
    /// many `recoveries`.
    pub fn grown(
        &self,
        before: &Self,
        noise: &BTreeMap<String, u64>,
        recoveries: u64,
    ) -> BTreeSet<String> {
        assert_eq!(self.mappings, before.mappings);
        assert_eq!(self.interrupts, before.interrupts);
        assert_eq!(self.users, before.users);
        // A ring's buffers are 128 pages, a ring's descriptors one.
        eprintln!(
            "pages in use: {} -> {} in {recoveries} recoveries",
            before.pages, self.pages
        );
        assert!(self.pages.saturating_sub(before.pages) <= 512 + recoveries / 2);
        let mut grown = BTreeSet::new();
        for (cache, now) in &self.objects {
            let then = before.objects.get(cache).copied().unwrap_or(0);
            let noise = noise.get(cache).copied().unwrap_or(0);
            if *now > then {
                eprintln!("{cache}: {then} -> {now} in {recoveries} recoveries, noise {noise}");
            }
            if now.saturating_sub(then) > noise + recoveries / 2 {
                grown.insert(cache.clone());
            }
        }
        grown
    }
}

/// By how much the objects of each cache differ while `operation` is carried out without a fault.
pub fn noise(machine: &mut Machine, (operation, back): (&str, &str)) -> BTreeMap<String, u64> {
    let mut range: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut read = |machine: &mut Machine| {
        for (cache, now) in Resources::of(machine).objects {
            let (least, most) = range.entry(cache).or_insert((now, now));
            (*least, *most) = (now.min(*least), now.max(*most));
        }
    };
    for round in 0..UNDISTURBED {
        if round.is_multiple_of(2) {
            read(machine);
        }
        let ended = machine.run(&format!("({operation}) >/dev/null 2>&1 && echo well; true"));
        assert_eq!(ended.trim(), "well");
        machine.run(back);
        let answered = machine.run(ANSWERED);
        assert!(answered.contains("answered"), "{answered}");
    }
    read(machine);
    range
        .into_iter()
        .map(|(cache, (least, most))| (cache, most - least))
        .collect()
}
