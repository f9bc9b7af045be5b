//! `inject --kind`: one instruction of a driver changed, in calls of the domain or in the guest's
//! own text; `--list` and `--undo`.

use anyhow::bail;
use devices::edge::When;
use isolation::mutation::{Kind, Mutation};
use serde::Serialize;

use super::isolation::ask;
use super::when::probability;
use super::{print_bytes, print_json};
use crate::code_fault::{CodeFault, Injected, fitting_sites, text_request};
use crate::control::protocol::{FaultsState, FunctionBytes, Reply, Request};
use crate::options::VmName;
use crate::table::table;
use crate::words::{counted, ordinal};

fn words(when: When, seed: u64) -> String {
    match when {
        When::Once => "the first call that comes to it".to_owned(),
        When::Nth(number) => format!("the {} call", ordinal(number)),
        When::Always => "each call".to_owned(),
        When::Chance(millionths) => format!(
            "each call with probability {} by seed {seed}",
            probability(millionths)
        ),
    }
}

/// What was changed, and into which calls; nothing of one in the guest's own text.
#[derive(Debug, Serialize)]
struct Told {
    #[serde(flatten)]
    injected: Injected,
    #[serde(skip_serializing_if = "Option::is_none")]
    into: Option<String>,
}

impl Told {
    fn text(&self) -> String {
        let injected = &self.injected;
        let Mutation {
            offset,
            old_text,
            new_text,
            says,
            ..
        } = &injected.mutation;
        let kind = injected.kind.name().replace('_', " ");
        let place = match &self.into {
            Some(calls) => format!("in the domain's copy, for {calls}"),
            None => "in the guest's own text, until `--undo`, a rewind or a reset".to_owned(),
        };
        format!(
            "{kind} at {}+{offset:#x} ({:#x}), {place}\n  was  {old_text}\n  is   {new_text}\n  {says}\n",
            injected.function, injected.address
        )
    }
}

/// Puts a fault into a function of a module of `vm`.
pub fn inject(vm: &VmName, fault: CodeFault, json: bool) -> anyhow::Result<()> {
    let text = text(vm, &fault.module, &fault.function)?;
    let (when, seed) = (fault.when, fault.seed);
    if !text.isolated {
        eprintln!(
            "cofferdam: {} is not isolated: the fault goes into the guest's own text, and nothing takes back what it breaks",
            fault.function
        );
    }
    let (request, injected) = fault.order(&text)?;
    let Reply::Done {} = ask(vm, &request)? else {
        bail!("the VM answered something else");
    };
    let told = Told {
        injected,
        into: text.isolated.then(|| words(when, seed)),
    };
    match json {
        true => print_json(&told),
        false => print_bytes(told.text().as_bytes()),
    }
}

/// Lists the instructions of a function that faults fit, all kinds or one.
pub fn list(
    vm: &VmName,
    (module, function): (&str, &str),
    kind: Option<Kind>,
    json: bool,
) -> anyhow::Result<()> {
    let sites = fitting_sites(function, &text(vm, module, function)?, kind);
    if json {
        return print_json(&sites);
    }
    let mut table = table(&["offset", "instruction", "kinds"]);
    for site in &sites {
        let kinds: Vec<_> = site.kinds.iter().map(|kind| kind.name()).collect();
        table.add_row(vec![
            format!("+{:#x}", site.offset),
            site.text.clone(),
            kinds.join(" "),
        ]);
    }
    print_bytes(format!("{table}\n").as_bytes())
}

fn text(vm: &VmName, module: &str, function: &str) -> anyhow::Result<FunctionBytes> {
    match ask(vm, &text_request(module, function))? {
        Reply::FunctionText(text) => Ok(text),
        _ => bail!("the VM answered something else"),
    }
}

/// Takes back what is not used up of the faults of `module`.
pub fn undo(vm: &VmName, module: &str, json: bool) -> anyhow::Result<()> {
    let request = Request::UndoFaults {
        module: module.to_owned(),
    };
    let Reply::Faults(state) = ask(vm, &request)? else {
        bail!("the VM answered something else");
    };
    match json {
        true => print_json(&state),
        false => print_bytes(undone(module, &state).as_bytes()),
    }
}

fn undone(module: &str, state: &FaultsState) -> String {
    let mut text = String::new();
    if let Some(count) = state.calls {
        text.push_str(&format!(
            "no more faults in calls of {module}; of the one that was ordered last {} it, {}\n",
            counted(count.reached, "call came to", "calls came to"),
            counted(count.failed, "call failed", "calls failed"),
        ));
    }
    if let Some(fault) = &state.own_text {
        let reached = match (fault.tells, fault.reached_ns) {
            (_, Some(_)) => "the guest came there",
            (true, None) => "the guest did not come there",
            (false, None) => "whether the guest came there is not known",
        };
        text.push_str(&format!(
            "the driver's own code is at {:#x} again; {reached}\n",
            fault.at
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use isolation::attach::text_fault::TextFaultStatus;
    use isolation::dispatch::fault::FaultCount;

    use super::*;

    #[test]
    fn calls_are_told_in_words() {
        assert_eq!(words(When::Nth(3), 1), "the 3rd call");
        assert_eq!(
            words(When::Chance(1000), 7),
            "each call with probability 0.001 by seed 7"
        );
    }

    #[test]
    fn what_was_undone_is_said_in_english() {
        let calls = FaultCount {
            tried: 3,
            reached: 1,
            failed: 0,
            left: 0,
            reached_ns: None,
        };
        let own_text = TextFaultStatus {
            module: "e1000".to_owned(),
            at: 0x1000,
            reached_ns: None,
            tells: true,
        };
        let state = |calls, own_text| FaultsState { calls, own_text };
        let said = undone("e1000", &state(Some(calls), None));
        assert!(said.contains("1 call came to it, 0 calls failed"), "{said}");
        let said = undone("e1000", &state(None, Some(own_text)));
        assert!(
            said.contains("0x1000 again; the guest did not come there"),
            "{said}"
        );
    }
}
