//! Isolating and releasing: what is left afterwards, and what is refused.

use agent_protocol::message::SymbolFilter;
use isolation::attach::plan::Wanted;

use super::{booted, with_network};
use crate::machine::Machine;
use crate::named;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_released_module_has_every_byte_of_its_text_back() {
    let mut machine = with_network();
    let before = machine.module_text("e1000");
    let kernel_before = machine.kernel_code("free_module");
    let ping = "ping -c 3 -i 0.1 -W 2 10.0.2.2 >/dev/null";
    machine.isolate("e1000", Wanted::All).unwrap();
    assert_ne!(machine.module_text("e1000"), before, "gates are in place");
    machine.run(ping);
    let final_status = machine.isolator.release("e1000").unwrap();
    assert!(final_status.entries.iter().any(|entry| entry.calls > 0));
    assert!(
        machine.module_text("e1000") == before,
        "text differs after release"
    );
    assert_eq!(machine.kernel_code("free_module"), kernel_before);
    let traps = |machine: &Machine| -> u64 {
        machine
            .handle
            .status()
            .exits
            .iter()
            .map(|exits| exits.trap)
            .sum()
    };
    let traps_before = traps(&machine);
    machine.run(ping);
    assert_eq!(
        traps(&machine),
        traps_before,
        "a released module still exits at gates"
    );
    machine.assert_healthy();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn symbols_and_types_in_the_kernels_memory_are_those_that_it_tells() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    let image = machine.kernel_image("dummy");
    let told = machine.agent.symbols(SymbolFilter::default()).unwrap();
    let told: Vec<_> = told
        .iter()
        .filter(|symbol| symbol.module.is_none())
        .map(|symbol| (symbol.address, symbol.kind, symbol.name.as_str()))
        .collect();
    let found: Vec<_> = image
        .symbols
        .iter()
        .map(|symbol| (symbol.at.0, symbol.kind, symbol.name))
        .collect();
    assert!(found.len() > 50_000, "{}", found.len());
    let other = found.iter().zip(&told).find(|(found, told)| found != told);
    assert_eq!((found.len(), other), (told.len(), None));
    let told = machine.agent.read_file("/sys/kernel/btf/vmlinux").unwrap();
    assert!(image.types == Some(told), "types differ");
    let modules = SymbolFilter {
        of_modules: true,
        ..SymbolFilter::default()
    };
    let modules = machine.agent.symbols(modules).unwrap();
    assert!(modules.iter().any(|symbol| symbol.name == "dummy_xmit"));
    // Of exported symbols the list has the letter in upper case.
    let mut told: Vec<_> = modules
        .iter()
        .map(|symbol| {
            let kind = symbol.kind.to_ascii_lowercase();
            (
                symbol.address,
                kind,
                symbol.name.as_str(),
                symbol.module.as_deref().unwrap(),
            )
        })
        .collect();
    let mut found: Vec<_> = machine
        .symbols()
        .iter()
        .filter_map(|symbol| {
            let kind = symbol.kind.to_ascii_lowercase();
            Some((symbol.at.0, kind, symbol.name, symbol.module?))
        })
        .collect();
    told.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, told);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn what_cannot_be_isolated_is_refused_with_the_reason() {
    let mut machine = booted();
    machine.load("dummy", "numdummies=1");
    let refusal = |machine: &mut Machine, wanted| {
        machine
            .isolate("dummy", wanted)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let misspelt = refusal(&mut machine, named(&["dummy_xmitt"]));
    assert!(misspelt.contains("no such function"), "{misspelt}");
    let nothing = refusal(&mut machine, Wanted::Matching("e1000_*".into()));
    assert!(nothing.contains("matches e1000_*"), "{nothing}");
    machine.isolate("dummy", named(&["dummy_xmit"])).unwrap();
    let twice = refusal(&mut machine, named(&["dummy_xmit"]));
    assert!(twice.contains("isolated already"), "{twice}");
    machine.isolator.release("dummy").unwrap();
    let gone = machine.isolator.release("dummy").unwrap_err().to_string();
    assert!(gone.contains("is not isolated"), "{gone}");
    machine.assert_healthy();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_module_that_is_removed_is_not_isolated_any_more() {
    let mut machine = with_network();
    let kernel_before = machine.kernel_code("free_module");
    machine.isolate("e1000", Wanted::All).unwrap();
    assert_ne!(machine.kernel_code("free_module"), kernel_before);
    machine.agent.remove_module("e1000").unwrap();
    assert!(machine.isolator.status().is_empty());
    assert_eq!(machine.kernel_code("free_module"), kernel_before);
    let gone = machine.isolator.release("e1000").unwrap_err().to_string();
    assert!(gone.contains("is not isolated"), "{gone}");
    // It comes back elsewhere, and can be isolated there.
    machine.load("e1000", "");
    machine.run("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; linked");
    machine.isolate("e1000", Wanted::All).unwrap();
    machine.run("ping -c 2 -i 0.1 -W 5 10.0.2.2");
    assert!(machine.entry("e1000", "e1000_xmit_frame").commits > 0);
    machine.isolator.release("e1000").unwrap();
    machine.assert_healthy();
}
