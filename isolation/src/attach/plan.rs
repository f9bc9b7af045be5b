//! What has to be patched to isolate functions of a module: worked out from symbols and memory
//! before anything is touched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Serialize};

use super::kernel_functions::{LINUX, Names};
use crate::domain::console::Console;
use crate::domain::monitor::Measure;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::gate::{GateSite, NoGate};
use crate::guest::module_text::{Reach, SiteKind, TextScan, TextTooLarge};
use crate::guest::modules::{ModuleLayout, ModuleText};
use crate::guest::symbols::{Symbol, SymbolTable};

/// Names of the processor's thunks, which must stay executable in the driver root.
fn is_thunk(name: &[u8]) -> bool {
    name.starts_with(b"__x86_indirect_")
        || name.starts_with(b"__x86_return_")
        || name.ends_with(b"_return_thunk")
        || name.ends_with(b"_untrain_ret")
        || name.ends_with(b"_safe_ret")
        || name.ends_with(b"_safe_ret_alias")
}

/// None of the kernel's functions that run with the driver's rights is longer, in bytes.
const LONGEST_COMMON: u64 = 2048;

/// Why a failure of the function of this name has no answer that would do, if that is so.
pub type NoAnswer<'a> = &'a dyn Fn(&str) -> Option<&'static str>;

/// Which functions of a module are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// All that can be gated.
    All,
    /// These, each of which must be gateable.
    Named(Vec<String>),
    /// All gateable ones whose name matches the pattern, as a shell's: `*`, `?`, `[a-z]`,
    /// `{open,close}`.
    Matching(String),
}

/// A function that will be gated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedGate {
    /// Its name.
    pub name: String,
    /// Where its gate goes.
    pub site: GateSite,
}

/// A function that was asked for and cannot be gated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: NoGate,
}

/// Why there is nothing to do.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Named functions that cannot be gated.
    #[error("cannot isolate {}", list(.0))]
    Refused(Vec<Refusal>),
    /// A pattern that is none.
    #[error("this is no pattern: {0}")]
    Pattern(String),
    /// A pattern that fits no function.
    #[error("no function of the module that can be isolated matches {0}")]
    NothingMatches(String),
    /// The module's text.
    #[error(transparent)]
    Text(#[from] TextTooLarge),
}

fn list(refusals: &[Refusal]) -> String {
    let each = refusals
        .iter()
        .map(|refusal| format!("{}: {}", refusal.name, refusal.reason));
    each.collect::<Vec<_>>().join("; ")
}

/// Everything that is patched or mapped specially.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Functions to gate, by address.
    pub gates: Vec<PlannedGate>,
    /// Further functions that get a gate while calls must not come between, by address.
    pub guards: Vec<PlannedGate>,
    /// Functions that fit `All` or a pattern but cannot be gated.
    pub refused: Vec<Refusal>,
    /// Direct calls and jumps out of the module: instruction and target.
    pub redirects: Vec<(Gva, Gva)>,
    /// Pages of the module's text.
    pub text_pages: Vec<Gva>,
    /// Pages of kernel code that runs with the rights of whoever calls it: thunks, functions that
    /// only copy or fill, and others that need no more.
    pub common_pages: Vec<Gva>,
    /// Kernel functions that need no other rights than the driver's.
    pub modest: Vec<Gva>,
    /// Kernel functions that tell how much memory is asked for.
    pub measured: Vec<(Gva, Measure)>,
    /// Kernel functions whose callers pass through.
    pub guest_only: Vec<Gva>,
    /// Kernel functions that wait, with the unit of their first argument.
    pub sleeps: Vec<(Gva, Duration)>,
    /// Kernel functions that return at once.
    pub skipped: Vec<Gva>,
    /// The kernel's console, where all of it is known by name.
    pub console: Option<Console>,
    /// Kernel functions that no call may reach.
    pub fatal: Vec<Gva>,
}

impl Plan {
    /// Works out how to isolate the `wanted` functions of the module with this layout and text, and
    /// how to guard those of which `is_guarded` is true by name. Those of which `no_answer` has a
    /// reason are isolated only if they are named.
    pub fn new(
        wanted: &Wanted,
        layout: &ModuleLayout,
        text: &ModuleText,
        symbols: &SymbolTable,
        (is_guarded, no_answer): (&dyn Fn(&str) -> bool, NoAnswer<'_>),
    ) -> Result<Self, PlanError> {
        let scan = text.scan(symbols)?;
        let gate_at = |symbol: &Symbol<'_>| match no_answer(symbol.name) {
            Some(why) => Err(NoGate::NoAnswer { why }),
            None => layout.gate_at(symbol.at, text, &scan, symbols),
        };
        let (gates, refused) = gates(wanted, layout, text, &scan, symbols, &gate_at)?;
        let others = symbols.in_module(&layout.name).filter(|symbol| {
            symbol.is_code()
                && is_guarded(symbol.name)
                && !gates.iter().any(|gate| gate.site.function == symbol.at)
        });
        let guards = others.filter_map(|symbol| {
            Some(PlannedGate {
                name: symbol.name.to_owned(),
                site: layout.gate_at(symbol.at, text, &scan, symbols).ok()?,
            })
        });
        let guards = guards.collect();
        let (copies, modest) = (
            extents(&LINUX.copies, symbols),
            extents(&LINUX.modest, symbols),
        );
        let text_sections = layout.sections.iter().filter(|section| section.is_text());
        let text_pages = text_sections.flat_map(|section| section.range.pages());
        let kernel = |lists: [&[Names]; 2]| addresses(&lists, symbols);
        Ok(Self {
            gates,
            guards,
            refused,
            redirects: redirects(&scan, &copies),
            text_pages: pages(&mut text_pages.map(|page| page.0)),
            common_pages: common_pages(symbols, &[&copies, &modest]),
            modest: modest.into_keys().collect(),
            measured: measured(symbols),
            guest_only: kernel([&LINUX.guest_only, &LINUX.guest_only_with_kvm]),
            sleeps: sleeps(symbols),
            skipped: kernel([&LINUX.yields, &LINUX.fpu_questions]),
            console: console(symbols),
            fatal: kernel([&LINUX.fatal, &[]]),
        })
    }
}

/// Where direct branches lead out of the module, by where their displacements are. Those to
/// `copies` stay as they are.
fn redirects(scan: &TextScan, copies: &BTreeMap<Gva, GvaRange>) -> Vec<(Gva, Gva)> {
    let redirects = scan.sites().iter().filter_map(|site| match site.kind {
        SiteKind::Direct {
            target,
            reach: Reach::Outside,
            ..
        } if site.len >= 5 && !copies.contains_key(&target) => {
            // The displacement is the last four bytes; a jcc has one byte more in front.
            Some((Gva(site.at.0 + u64::from(site.len) - 5), target))
        }
        _ => None,
    });
    redirects.collect()
}

/// Pages of thunks, and of these `functions`.
fn common_pages(symbols: &SymbolTable, functions: &[&BTreeMap<Gva, GvaRange>]) -> Vec<Gva> {
    let thunks = symbols.code_where(is_thunk).into_iter();
    let extents = functions.iter().flat_map(|functions| functions.values());
    let of_functions = extents.flat_map(GvaRange::pages);
    pages(
        &mut thunks
            .map(|thunk| thunk.0)
            .chain(of_functions.map(|page| page.0)),
    )
}

/// The pages that these addresses are on, each once.
fn pages(addresses: &mut dyn Iterator<Item = u64>) -> Vec<Gva> {
    let pages: BTreeSet<u64> = addresses.map(|at| at & !0xfff).collect();
    pages.into_iter().map(Gva).collect()
}

/// Where those of these functions begin that this kernel has.
fn addresses(lists: &[&[Names]], symbols: &SymbolTable) -> Vec<Gva> {
    let functions = lists.iter().copied().flatten();
    functions
        .flatten()
        .filter_map(|name| symbols.kernel_symbol(name))
        .map(|symbol| symbol.at)
        .collect()
}

/// Kernel functions that wait, with the unit of their first argument.
fn sleeps(symbols: &SymbolTable) -> Vec<(Gva, Duration)> {
    let sleeps = LINUX.sleeps.iter().filter_map(|(name, unit)| {
        let symbol = symbols.kernel_symbol(name)?;
        Some((symbol.at, Duration::from_micros(*unit)))
    });
    sleeps.collect()
}

/// Kernel functions that tell how much memory is asked for, and those after which that is not known
/// any more.
fn measured(symbols: &SymbolTable) -> Vec<(Gva, Measure)> {
    let sized = LINUX.sized.iter().flat_map(|function| {
        let (size, flags) = (function.size, function.flags);
        let measure = Measure::HandsOut { size, flags };
        function.names.iter().map(move |name| (*name, measure))
    });
    let unsized_now = LINUX.unsized_now.iter().flatten();
    let all = sized.chain(unsized_now.map(|name| (*name, Measure::Forgets)));
    all.filter_map(|(name, measure)| Some((symbols.kernel_symbol(name)?.at, measure)))
        .collect()
}

/// Those of `functions` that this kernel has, by where they begin.
fn extents(functions: &[Names], symbols: &SymbolTable) -> BTreeMap<Gva, GvaRange> {
    let names = functions.iter().flatten();
    let found = names.filter_map(|name| symbols.kernel_symbol(name));
    let extent = |at| symbols.extent(at, GvaRange::new(at, LONGEST_COMMON)?);
    found
        .filter(Symbol::is_code)
        .filter_map(|symbol| Some((symbol.at, extent(symbol.at)?)))
        .collect()
}

/// Where the kernel takes its console, if its function has room for what is put there.
fn console(symbols: &SymbolTable) -> Option<Console> {
    let console = &LINUX.console;
    let at = |name: &str| symbols.kernel_symbol(name).map(|symbol| symbol.at);
    let take = at(console.take)?;
    let room = GvaRange::new(take, Console::CODE_BYTES)?;
    let is_whole = symbols.extent(take, room) == Some(room);
    let (writer, defer) = (at(console.writer)?, at(console.defer)?);
    is_whole
        .then(|| Console::new(take.0, writer.0, defer.0))
        .flatten()
}

fn gates(
    wanted: &Wanted,
    layout: &ModuleLayout,
    text: &ModuleText,
    scan: &TextScan,
    symbols: &SymbolTable,
    gate_at: &dyn Fn(&Symbol<'_>) -> Result<GateSite, NoGate>,
) -> Result<(Vec<PlannedGate>, Vec<Refusal>), PlanError> {
    let (mut gates, mut refused) = (Vec::new(), Vec::new());
    match wanted {
        Wanted::Named(names) => {
            for name in names {
                match layout.find_gate(name, text, scan, symbols) {
                    Ok(site) => gates.push(PlannedGate {
                        name: name.clone(),
                        site,
                    }),
                    Err(reason) => refused.push(Refusal {
                        name: name.clone(),
                        reason,
                    }),
                }
            }
            if !refused.is_empty() {
                return Err(PlanError::Refused(refused));
            }
        }
        Wanted::All | Wanted::Matching(_) => {
            let matcher = match wanted {
                Wanted::Matching(pattern) => Some(matcher(pattern)?),
                _ => None,
            };
            for symbol in symbols
                .in_module(&layout.name)
                .filter(|symbol| symbol.is_code())
            {
                if matcher
                    .as_ref()
                    .is_some_and(|matcher| !matcher.is_match(symbol.name))
                {
                    continue;
                }
                let name = symbol.name.to_owned();
                match gate_at(&symbol) {
                    Ok(site) => gates.push(PlannedGate { name, site }),
                    Err(reason) => refused.push(Refusal { name, reason }),
                }
            }
        }
    }
    gates.sort_by_key(|gate| gate.site.gate);
    gates.dedup_by_key(|gate| gate.site.gate);
    match wanted {
        Wanted::Matching(pattern) if gates.is_empty() => {
            Err(PlanError::NothingMatches(pattern.clone()))
        }
        Wanted::All if gates.is_empty() => Err(PlanError::NothingMatches("*".into())),
        _ => Ok((gates, refused)),
    }
}

/// What tells whether a name fits `pattern`.
fn matcher(pattern: &str) -> Result<GlobMatcher, PlanError> {
    let glob = Glob::new(pattern);
    let glob = glob.map_err(|error| PlanError::Pattern(error.to_string()))?;
    Ok(glob.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let matches = |pattern, name| matcher(pattern).unwrap().is_match(name);
        assert!(matches("e1000_get_*", "e1000_get_regs"));
        assert!(matches("*_xmit*", "dummy_xmit"));
        assert!(matches("a*b*c", "a__b__c"));
        assert!(matches("exact", "exact"));
        assert!(matches("e1000_{open,close}", "e1000_close"));
        assert!(matches(
            "nullb_device_[a-h]*",
            "nullb_device_home_node_show"
        ));
        assert!(!matches("exact", "exactly"));
        assert!(!matches("a*b*c", "a__c__b"));
        assert!(!matches("ab*ba", "aba"));
        for broken in ["a[", "{a", "a{b,{c}"] {
            let error = matcher(broken).unwrap_err().to_string();
            assert!(error.contains(broken), "{error}");
        }
    }
}
