//! Faults in a driver's code, by kind: one instruction changed as programmers' mistakes would have
//! it.
//!
//! A VM process tells which bytes a function is, and is told what to put where. Which change a kind
//! is, and where it fits, is decided here, by whoever asks: the command line and the service.

use agent_protocol::message::Bytes;
use anyhow::{Context, ensure};
use devices::edge::{MILLION, When};
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::mutation::{Kind, Mutation, Site, mutate, sites};
use serde::Serialize;

use crate::campaign::with_function;
use crate::control::protocol::{FaultyCalls, FunctionBytes, Request};

/// A fault that is to be put into a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeFault {
    /// The module.
    pub module: String,
    /// One of its functions.
    pub function: String,
    /// What is changed.
    pub kind: Kind,
    /// At which instruction, in bytes from the function's start; where the seed says if it is not
    /// given.
    pub offset: Option<u64>,
    /// Into which calls of an isolated function.
    pub when: When,
    /// What chooses among places and ways, and by chance.
    pub seed: u64,
}

/// What was changed.
#[derive(Debug, Serialize)]
pub struct Injected {
    /// The module.
    pub module: String,
    /// The function.
    pub function: String,
    /// What kind of mistake it is.
    pub kind: Kind,
    /// In the guest's address space.
    pub address: u64,
    /// The change.
    #[serde(flatten)]
    pub mutation: Mutation,
    /// In the guest's own text, not in the domain's copy.
    pub own_text: bool,
}

/// Asks which bytes a function is.
pub fn text_request(module: &str, function: &str) -> Request {
    Request::FunctionText {
        module: module.to_owned(),
        function: function.to_owned(),
    }
}

/// The instructions of a function that faults fit, all kinds or one.
pub fn fitting_sites(function: &str, text: &FunctionBytes, kind: Option<Kind>) -> Vec<Site> {
    let mut sites = with_function(function, text, sites);
    if let Some(kind) = kind {
        sites.retain(|site| site.kinds.contains(&kind));
    }
    sites
}

impl CodeFault {
    /// The request that puts it into the function, which is `text`.
    ///
    /// # Errors
    /// It fits nowhere, or not there, or in the guest's own text not so.
    pub fn order(self, text: &FunctionBytes) -> anyhow::Result<(Request, Injected)> {
        let calls = calls(self.when, self.seed)?;
        ensure!(
            text.isolated || self.when == When::Once,
            "in the guest's own text a fault stays from the first time on: it has no when"
        );
        let offset = match self.offset {
            Some(offset) => u32::try_from(offset).ok(),
            None => chosen(
                &fitting_sites(&self.function, text, None),
                self.kind,
                self.seed,
            ),
        };
        let offset = offset.with_context(|| {
            format!(
                "{} fits nowhere in {}: list what fits where",
                self.kind.name(),
                self.function
            )
        })?;
        let mutation = with_function(&self.function, text, |function| {
            mutate(function, self.kind, offset, self.seed)
        })?;
        let request = Request::InjectCode {
            module: self.module.clone(),
            function: self.function.clone(),
            offset: offset.into(),
            old: Bytes(mutation.old.clone()),
            new: Bytes(mutation.new.clone()),
            replaces_whole: mutation.replaces_whole,
            calls: text.isolated.then_some(calls),
        };
        let injected = Injected {
            module: self.module,
            function: self.function,
            kind: self.kind,
            address: text.start.wrapping_add(offset.into()),
            mutation,
            own_text: !text.isolated,
        };
        Ok((request, injected))
    }
}

/// Which calls of an isolated function have a fault; the seed decides where chance does.
fn calls(when: When, seed: u64) -> anyhow::Result<FaultyCalls> {
    let (which, times) = match when {
        When::Once => (WhichCalls::ALL, 1),
        When::Nth(number) => {
            ensure!(number > 0, "calls are counted from 1");
            (WhichCalls::Every(number), 1)
        }
        When::Always => (WhichCalls::ALL, u64::MAX),
        When::Chance(millionths) => {
            ensure!(
                (1..=MILLION).contains(&millionths),
                "a probability is 1 to {MILLION} millionths"
            );
            (WhichCalls::Chance { millionths, seed }, u64::MAX)
        }
    };
    Ok(FaultyCalls {
        which,
        times,
        used_up_by: UsedUpBy::Reaching,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_those_that_were_asked_for() {
        let third = calls(When::Nth(3), 1).unwrap();
        assert_eq!((third.which, third.times), (WhichCalls::Every(3), 1));
        let chance = calls(When::Chance(1000), 7).unwrap();
        let which = WhichCalls::Chance {
            millionths: 1000,
            seed: 7,
        };
        assert_eq!((chance.which, chance.times), (which, u64::MAX));
        for wrong in [When::Nth(0), When::Chance(0), When::Chance(MILLION + 1)] {
            calls(wrong, 1).unwrap_err();
        }
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
    fn in_the_guests_own_text_a_fault_is_put_once() {
        // push rbp; mov rbp, rsp; mov eax, 1; pop rbp; ret
        let code = vec![0x55, 0x48, 0x89, 0xe5, 0xb8, 1, 0, 0, 0, 0x5d, 0xc3];
        let text = |isolated| FunctionBytes {
            start: 0xffff_ffff_c000_0000,
            code: Bytes(code.clone()),
            callees: Vec::new(),
            isolated,
        };
        let fault = |when| CodeFault {
            module: "m".to_owned(),
            function: "f".to_owned(),
            kind: Kind::Nop,
            offset: Some(9),
            when,
            seed: 1,
        };
        let (request, injected) = fault(When::Once).order(&text(false)).unwrap();
        assert!(matches!(request, Request::InjectCode { calls: None, .. }));
        assert!(injected.own_text);
        assert_eq!(injected.address, 0xffff_ffff_c000_0009);
        fault(When::Always).order(&text(false)).unwrap_err();
        let (request, _) = fault(When::Always).order(&text(true)).unwrap();
        assert!(matches!(
            request,
            Request::InjectCode { calls: Some(_), .. }
        ));
        let nowhere = CodeFault {
            offset: Some(3),
            ..fault(When::Once)
        };
        nowhere.order(&text(true)).unwrap_err();
    }
}
