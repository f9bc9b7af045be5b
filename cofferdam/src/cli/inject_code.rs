//! `inject --kind`: one instruction of a driver changed, in calls of the domain or in the guest's own text; `--list` and
//! `--undo`.

use agent_protocol::message::Bytes;
use anyhow::{Context, bail};
use devices::edge::When;
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::mutation::{Kind, Mutation, Site, mutate, sites};
use serde::Serialize;

use super::isolation::ask;
use super::table::table;
use super::when::probability;
use super::{print_bytes, print_json};
use crate::campaign::with_function;
use crate::control::protocol::{FaultsState, FaultyCalls, FunctionBytes, Reply, Request};
use crate::options::VmName;
use crate::words::{counted, ordinal};

/// Which calls of an isolated function have a fault; the seed decides where chance does.
fn calls(when: When, seed: u64) -> FaultyCalls {
    let (which, times) = match when {
        When::Once => (WhichCalls::ALL, 1),
        When::Nth(number) => (WhichCalls::Every(number), 1),
        When::Always => (WhichCalls::ALL, u64::MAX),
        When::Chance(millionths) => (WhichCalls::Chance { millionths, seed }, u64::MAX),
    };
    FaultyCalls {
        which,
        times,
        used_up_by: UsedUpBy::Reaching,
    }
}

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

/// Where it goes.
pub struct Where<'a> {
    /// The VM.
    pub vm: &'a VmName,
    /// The module.
    pub module: &'a str,
    /// The function.
    pub function: &'a str,
}

/// What was changed.
#[derive(Debug, Serialize)]
struct Injected {
    module: String,
    function: String,
    kind: Kind,
    /// In the guest's address space.
    address: u64,
    #[serde(flatten)]
    mutation: Mutation,
    /// In the guest's own text, not in the domain's copy.
    own_text: bool,
    /// Into which calls; nothing of one in the guest's own text.
    #[serde(skip_serializing_if = "Option::is_none")]
    into: Option<String>,
}

impl Injected {
    fn text(&self) -> String {
        let Mutation {
            offset,
            old_text,
            new_text,
            says,
            ..
        } = &self.mutation;
        let kind = self.kind.name().replace('_', " ");
        let place = match &self.into {
            Some(calls) => format!("in the domain's copy, for {calls}"),
            None => "in the guest's own text, until `--undo`, a rewind or a reset".to_owned(),
        };
        format!(
            "{kind} at {}+{offset:#x} ({:#x}), {place}\n  was  {old_text}\n  is   {new_text}\n  {says}\n",
            self.function, self.address
        )
    }
}

impl Where<'_> {
    fn text(&self) -> anyhow::Result<FunctionBytes> {
        let request = Request::FunctionText {
            module: self.module.to_owned(),
            function: self.function.to_owned(),
        };
        match ask(self.vm, &request)? {
            Reply::FunctionText(text) => Ok(text),
            _ => bail!("the VM answered something else"),
        }
    }

    /// Puts a fault of `kind` at `offset`, or where the seed says.
    pub fn inject(
        &self,
        kind: Kind,
        offset: Option<u64>,
        when: When,
        seed: u64,
        json: bool,
    ) -> anyhow::Result<()> {
        let text = self.text()?;
        let offset = match offset {
            Some(offset) => u32::try_from(offset).ok(),
            None => chosen(&self.sites(&text), kind, seed),
        };
        let offset = offset.with_context(|| {
            format!(
                "{} fits nowhere in {}: --list shows what fits where",
                kind.name(),
                self.function
            )
        })?;
        let mutation = with_function(self.function, &text, |function| {
            mutate(function, kind, offset, seed)
        })?;
        if !text.isolated {
            eprintln!(
                "cofferdam: {} is not isolated: the fault goes into the guest's own text, and nothing takes back what \
                 it breaks",
                self.function
            );
            if when != When::Once {
                bail!(
                    "in the guest's own text a fault stays from the first time on: leave --when away"
                );
            }
        }
        let request = Request::InjectCode {
            module: self.module.to_owned(),
            function: self.function.to_owned(),
            offset: offset.into(),
            old: Bytes(mutation.old.clone()),
            new: Bytes(mutation.new.clone()),
            replaces_whole: mutation.replaces_whole,
            calls: text.isolated.then(|| calls(when, seed)),
        };
        let Reply::Done {} = ask(self.vm, &request)? else {
            bail!("the VM answered something else");
        };
        let injected = Injected {
            module: self.module.to_owned(),
            function: self.function.to_owned(),
            kind,
            address: text.start.wrapping_add(offset.into()),
            mutation,
            own_text: !text.isolated,
            into: text.isolated.then(|| words(when, seed)),
        };
        match json {
            true => print_json(&injected),
            false => print_bytes(injected.text().as_bytes()),
        }
    }

    /// Lists the instructions that faults fit, all kinds or one.
    pub fn list(&self, kind: Option<Kind>, json: bool) -> anyhow::Result<()> {
        let mut sites = self.sites(&self.text()?);
        if let Some(kind) = kind {
            sites.retain(|site| site.kinds.contains(&kind));
        }
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

    fn sites(&self, text: &FunctionBytes) -> Vec<Site> {
        with_function(self.function, text, sites)
    }
}

/// One of the places that the kind fits.
fn chosen(sites: &[Site], kind: Kind, seed: u64) -> Option<u32> {
    let fitting: Vec<_> = sites
        .iter()
        .filter(|site| site.kinds.contains(&kind))
        .collect();
    let index = seed.checked_rem(fitting.len() as u64)?;
    fitting
        .get(usize::try_from(index).ok()?)
        .map(|site| site.offset)
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
    fn calls_are_those_that_were_asked_for() {
        assert_eq!(words(When::Nth(3), 1), "the 3rd call");
        let third = calls(When::Nth(3), 1);
        assert_eq!((third.which, third.times), (WhichCalls::Every(3), 1));
        let chance = calls(When::Chance(1000), 7);
        let which = WhichCalls::Chance {
            millionths: 1000,
            seed: 7,
        };
        assert_eq!((chance.which, chance.times), (which, u64::MAX));
        assert_eq!(
            words(When::Chance(1000), 7),
            "each call with probability 0.001 by seed 7"
        );
    }

    #[test]
    fn a_seed_chooses_among_the_places_that_fit() {
        let site = |offset, kinds: &[Kind]| Site {
            offset,
            kinds: kinds.to_vec(),
            text: String::new(),
        };
        let sites = [
            site(5, &[Kind::Nop]),
            site(9, &[]),
            site(12, &[Kind::Nop, Kind::Branch]),
        ];
        let of = |kind| [0, 1, 2].map(|seed| chosen(&sites, kind, seed));
        assert_eq!(of(Kind::Nop), [Some(5), Some(12), Some(5)]);
        assert_eq!(of(Kind::Branch), [Some(12); 3]);
        assert_eq!(of(Kind::Halt), [None; 3]);
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
