//! Goes through all functions of a module for what is wrong or doubtful in them.

use super::code::Code;
use super::findings::{Finding, FindingKind};
use super::flow::Flow;
use super::image::Ko;
use super::objects::Objects;
use super::values::Shared;
use super::{device, errors, loops};
use crate::guest::btf::Btf;

/// How often all functions are gone through: what one learns the others know the next time.
const ROUNDS: usize = 4;
/// Most findings of a module.
const MAX_FINDINGS: usize = 10_000;

/// What is found.
pub fn find(ko: &Ko<'_>, codes: &[Code], types: Option<&Btf>) -> Vec<Finding> {
    let objects = types.map(Objects::new);
    let mut shared = Shared::default();
    let mut found: Vec<Finding> = Vec::new();
    for round in 0..ROUNDS {
        for (function, code) in codes.iter().enumerate() {
            let Some(mut flow) = Flow::of(ko, code, function, objects.as_ref(), &mut shared) else {
                continue;
            };
            if round + 1 < ROUNDS {
                continue;
            }
            let start = code.insns.first().map_or(0, |insn| insn.i.ip());
            let waiting = loops::waiting(code, &mut flow)
                .into_iter()
                .map(|(deciding, load)| {
                    let load = code
                        .insns
                        .get(load)
                        .map_or(0, |insn| insn.i.ip().wrapping_sub(start));
                    let what =
                        format!("nothing else ends the loop that loads the register at +{load:#x}");
                    (deciding, FindingKind::WaitsForDevice, what)
                });
            let of_device = device::find(ko, code, &mut flow, objects.as_ref());
            let waiting: Vec<_> = waiting.collect();
            let all = waiting.into_iter().chain(of_device);
            found.extend(all.filter_map(|(at, kind, what)| {
                device::finding(ko, function, code, at, kind, what)
            }));
        }
    }
    for (function, code) in codes.iter().enumerate() {
        let ignored = errors::ignored(ko, code, function, types).into_iter();
        found.extend(ignored.filter_map(|(at, name)| {
            let what = format!("what {name} returns");
            device::finding(ko, function, code, at, FindingKind::ErrorIgnored, what)
        }));
    }
    found.sort();
    found.dedup();
    found.truncate(MAX_FINDINGS);
    found
}
