//! What kernel functions do that outlasts a call: the model that a call is undone by once a part of it is in
//! the guest.
//!
//! The model is data (`models/linux-6.1.toml`, whose head explains it). It may come from a file of a
//! user's own: it is bounded, every name is one that a kernel symbol can have, every argument
//! exists, and a function that is irrevocable has no opposite.

use std::collections::{BTreeMap, BTreeSet};

use isolation::compensation::effects::{
    ArgumentModel, FunctionModel, KernelModel, MemberOf, OppositeModel,
};
use serde::{Deserialize, Serialize};

/// The models that come with this crate, by the series of the kernel that they are of.
const MODELS: [(&str, &str); 1] = [("6.1", include_str!("../models/linux-6.1.toml"))];

/// Version of the schema.
const SCHEMA: u32 = 1;
/// Longest model, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// Longest name of a symbol (`KSYM_NAME_LEN` with its end byte).
const MAX_NAME: usize = 511;
/// Arguments that are passed in registers (System V ABI, section 3.2.3).
const REGISTER_ARGUMENTS: u8 = 6;
/// Most members of members.
const MAX_NESTING: usize = 8;

/// Why a model cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// Too long.
    #[error("a model has at most {MAX_BYTES} bytes, this one has {0}")]
    TooLong(usize),
    /// Not of the schema.
    #[error("this is not a model of kernel functions: {0}")]
    Syntax(String),
    /// Another version.
    #[error("the model has schema {0}, this program reads {SCHEMA}")]
    Schema(u32),
    /// A name that no symbol has.
    #[error("{0:?} is not the name of a kernel symbol")]
    Name(String),
    /// Twice in the model.
    #[error("{0} is in the model twice")]
    Twice(String),
    /// An opposite that cannot be called.
    #[error(
        "{function}: the opposite {text:?} is not understood: write name(result, 0, *1, 2.member, =3)"
    )]
    Undo {
        /// The function that has it.
        function: String,
        /// What stands there.
        text: String,
    },
    /// Fields that contradict each other.
    #[error("{0}: {1}")]
    Contradiction(String, &'static str),
}

/// A kind of thing that a function hands out or takes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Bytes of the heap or of per-CPU memory.
    Memory,
    /// Whole pages.
    Page,
    /// A packet.
    Packet,
    /// Memory, or a mapping of memory, that a device may use.
    Dma,
    /// An interrupt.
    Interrupt,
    /// A device of the kernel's.
    Device,
    /// A range of a bus.
    Region,
    /// A mapping of a device's memory.
    Mapping,
    /// A number out of a set.
    Number,
    /// A counted reference.
    Reference,
}

/// What an opposite is called with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// What the function returned.
    Result,
    /// An argument of the function, from 0.
    Own(u8),
    /// What an argument of the function pointed at when it returned.
    Behind(u8),
    /// A member of the structure that an argument of the function pointed at, when it returned.
    Member(u8, String),
    /// A number.
    Constant(u64),
}

/// The opposite of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undo {
    /// Its name.
    pub function: String,
    /// What it is called with.
    pub arguments: Vec<Argument>,
}

/// A member of the structure that an argument points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The argument, from 0.
    pub argument: u8,
    /// The member.
    pub member: String,
}

/// What one function does that outlasts a call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effect {
    /// What takes it back.
    pub undo: Option<Undo>,
    /// Arguments that must be objects of the driver.
    pub owned: Vec<u8>,
    /// What it hands out.
    pub allocates: Option<Resource>,
    /// What it takes back.
    pub frees: Option<Resource>,
    /// Whether it may wait.
    pub sleeps: bool,
    /// Whether nothing takes it back.
    pub irrevocable: bool,
    /// Whether it can wait until the call commits.
    pub deferrable: bool,
    /// What is another number afterwards if it did something.
    pub changes: Option<Changed>,
}

/// What is known of a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known<'a> {
    /// A variable.
    Data,
    /// A function that leaves nothing behind but bytes in memory.
    Transient,
    /// Any other function.
    Lasting(&'a Effect),
}

/// What is known of a kernel's functions.
#[derive(Debug, Clone)]
pub struct Model {
    kernel: String,
    data: BTreeSet<String>,
    transient: BTreeSet<String>,
    lasting: BTreeMap<String, Effect>,
    interrupts_off: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: u32,
    /// Series of the kernel.
    kernel: String,
    data: Vec<String>,
    transient: Vec<String>,
    #[serde(default)]
    interrupts_off: Vec<String>,
    function: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    undo: Option<String>,
    #[serde(default)]
    owned: Vec<u8>,
    allocates: Option<Resource>,
    frees: Option<Resource>,
    #[serde(default)]
    sleeps: bool,
    #[serde(default)]
    irrevocable: bool,
    #[serde(default)]
    deferrable: bool,
    changes: Option<String>,
}

impl Model {
    /// The model that comes with this crate for the kernel of this release, as `uname -r` has it; `None` if there is
    /// none for its series. What a function leaves behind in one series it need not in another.
    pub fn for_release(release: &str) -> Option<Result<Self, ModelError>> {
        let series = series(release)?;
        let mut models = MODELS.iter();
        let (_, text) = models.find(|(kernel, _)| *kernel == series)?;
        Some(Self::parse(text))
    }

    /// The series of the kernel that it is of, such as `6.1`.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Reads a model.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        if text.len() > MAX_BYTES {
            return Err(ModelError::TooLong(text.len()));
        }
        let file: File =
            toml::from_str(text).map_err(|error| ModelError::Syntax(error.message().to_owned()))?;
        if file.schema != SCHEMA {
            return Err(ModelError::Schema(file.schema));
        }
        if let Some(name) = file.interrupts_off.iter().find(|name| !is_symbol(name)) {
            return Err(ModelError::Name(name.clone()));
        }
        let mut seen = BTreeSet::new();
        let names = file.data.iter().chain(&file.transient);
        for name in names.chain(file.function.keys()) {
            if !is_symbol(name) {
                return Err(ModelError::Name(name.clone()));
            }
            if !seen.insert(name.as_str()) {
                return Err(ModelError::Twice(name.clone()));
            }
        }
        let lasting = file.function.iter().map(|(name, entry)| {
            let effect = entry.effect(name)?;
            Ok((name.clone(), effect))
        });
        let lasting = lasting.collect::<Result<_, ModelError>>()?;
        Ok(Self {
            kernel: file.kernel,
            data: file.data.into_iter().collect(),
            transient: file.transient.into_iter().collect(),
            lasting,
            interrupts_off: file.interrupts_off.into_iter().collect(),
        })
    }

    /// What is known of `symbol`; `None` if nothing is.
    pub fn get(&self, symbol: &str) -> Option<Known<'_>> {
        if let Some(effect) = self.lasting.get(symbol) {
            return Some(Known::Lasting(effect));
        }
        if self.transient.contains(symbol) {
            return Some(Known::Transient);
        }
        self.data.contains(symbol).then_some(Known::Data)
    }

    /// What isolated calls are journalled and compensated by.
    pub fn for_isolation(&self) -> KernelModel {
        let mut model = KernelModel {
            kernel: self.kernel.clone(),
            harmless: self.data.iter().chain(&self.transient).cloned().collect(),
            lasting: Vec::new(),
            interrupts_off: self.interrupts_off.iter().cloned().collect(),
        };
        for (name, effect) in &self.lasting {
            if effect.undo.is_none() && !effect.irrevocable && !effect.deferrable {
                model.harmless.push(name.clone());
                continue;
            }
            model.lasting.push(FunctionModel {
                name: name.clone(),
                undo: effect.undo.as_ref().map(Undo::for_isolation),
                deferred: effect.deferrable && effect.undo.is_none(),
                changes: effect.changes.as_ref().map(|changes| MemberOf {
                    argument: changes.argument,
                    member: changes.member.clone(),
                }),
            });
        }
        model
    }

    /// All functions with effects that last, by name.
    pub fn lasting(&self) -> impl Iterator<Item = (&str, &Effect)> {
        let all = self.lasting.iter();
        all.map(|(name, effect)| (name.as_str(), effect))
    }

    /// All else that is known, by name: variables and functions that leave nothing behind.
    pub fn others(&self) -> impl Iterator<Item = (&str, Known<'_>)> {
        let data = self.data.iter().map(|name| (name.as_str(), Known::Data));
        let transient = self.transient.iter();
        data.chain(transient.map(|name| (name.as_str(), Known::Transient)))
    }
}

impl Undo {
    fn for_isolation(&self) -> OppositeModel {
        let arguments = self.arguments.iter().map(|argument| match argument {
            Argument::Result => ArgumentModel::Result,
            Argument::Own(index) => ArgumentModel::Own(*index),
            Argument::Behind(index) => ArgumentModel::Behind(*index),
            Argument::Member(argument, member) => ArgumentModel::Member(MemberOf {
                argument: *argument,
                member: member.clone(),
            }),
            Argument::Constant(number) => ArgumentModel::Constant(*number),
        });
        OppositeModel {
            function: self.function.clone(),
            arguments: arguments.collect(),
        }
    }
}

impl Entry {
    fn effect(&self, name: &str) -> Result<Effect, ModelError> {
        let contradiction = |what| Err(ModelError::Contradiction(name.to_owned(), what));
        if self.irrevocable && self.undo.is_some() {
            return contradiction("what is irrevocable has no opposite");
        }
        if self.owned.iter().any(|index| *index >= REGISTER_ARGUMENTS) {
            return contradiction("a function has six arguments in registers, 0 to 5");
        }
        let changes = match self.changes.as_deref() {
            None => None,
            Some(text) => match parse_member(text) {
                Some(changed) => Some(changed),
                None => return contradiction("what it changes is written like 0.state"),
            },
        };
        let undo = self.undo.as_deref().map(|text| {
            parse_undo(text).ok_or_else(|| ModelError::Undo {
                function: name.to_owned(),
                text: text.to_owned(),
            })
        });
        Ok(Effect {
            undo: undo.transpose()?,
            owned: self.owned.clone(),
            allocates: self.allocates,
            frees: self.frees,
            sleeps: self.sleeps,
            irrevocable: self.irrevocable,
            deferrable: self.deferrable,
            changes,
        })
    }
}

/// `6.1` of `6.1.0-44-amd64`: the first two numbers of a kernel's release.
fn series(release: &str) -> Option<&str> {
    let mut ends = release.match_indices(|c: char| !c.is_ascii_digit());
    let (first, dot) = ends.next()?;
    let end = ends.next().map_or(release.len(), |(at, _)| at);
    let minor = release.get(first + 1..end)?;
    (first > 0 && dot == "." && !minor.is_empty()).then(|| &release[..end])
}

fn parse_index(text: &str) -> Option<u8> {
    let index: u8 = text.parse().ok()?;
    (index < REGISTER_ARGUMENTS).then_some(index)
}

/// `0.member`, `0.member.of.it`.
fn parse_member(text: &str) -> Option<Changed> {
    let (argument, member) = text.split_once('.')?;
    let argument = parse_index(argument)?;
    let names = || member.split('.');
    (names().all(is_symbol) && names().count() <= MAX_NESTING).then(|| Changed {
        argument,
        member: member.to_owned(),
    })
}

/// `name(argument, ...)`.
fn parse_undo(text: &str) -> Option<Undo> {
    let (function, arguments) = text.strip_suffix(')')?.split_once('(')?;
    let arguments: Vec<&str> = match arguments.trim() {
        "" => Vec::new(),
        list => list.split(',').map(str::trim).collect(),
    };
    if !is_symbol(function) || arguments.len() > usize::from(REGISTER_ARGUMENTS) {
        return None;
    }
    let arguments = arguments.into_iter().map(|argument| {
        if argument == "result" {
            return Some(Argument::Result);
        }
        if let Some(number) = argument.strip_prefix('=') {
            return number.parse().ok().map(Argument::Constant);
        }
        if let Some(behind) = argument.strip_prefix('*') {
            return parse_index(behind).map(Argument::Behind);
        }
        match parse_member(argument) {
            Some(Changed { argument, member }) => Some(Argument::Member(argument, member)),
            None => parse_index(argument).map(Argument::Own),
        }
    });
    Some(Undo {
        function: function.to_owned(),
        arguments: arguments.collect::<Option<_>>()?,
    })
}

fn is_symbol(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(functions: &str) -> Result<Model, ModelError> {
        Model::parse(&format!(
            "schema = 1\nkernel = \"x\"\ndata = [\"jiffies\"]\ntransient = [\"memcpy\"]\n[function]\n{functions}\n"
        ))
    }

    #[test]
    fn the_guests_kernel_chooses_the_model() {
        for release in ["6.1", "6.1.0-44-amd64", "6.1.158+", "6.1-rc3"] {
            let model = Model::for_release(release).unwrap().unwrap();
            assert_eq!(model.kernel(), "6.1", "{release}");
            assert_eq!(model.for_isolation().kernel, "6.1");
        }
        let others = "6.12.117+deb13-amd64 6.10.0 16.1.0 7.2.13 6 6. 6-1 .6.1 x 6.é 6.1é";
        for other in others.split(' ').chain([""]) {
            let series = if other == "6.1é" { 1 } else { 0 };
            assert_eq!(
                usize::from(Model::for_release(other).is_some()),
                series,
                "{other}"
            );
        }
        // Each is what it is filed under.
        for (kernel, text) in MODELS {
            assert_eq!(Model::parse(text).unwrap().kernel(), kernel);
        }
    }

    #[test]
    fn what_undoes_a_function_says_what_it_is_called_with() {
        let model = Model::for_release("6.1.0").unwrap().unwrap();
        let Some(Known::Lasting(effect)) = model.get("dma_alloc_attrs") else {
            panic!("dma_alloc_attrs has no entry")
        };
        let undo = effect.undo.as_ref().unwrap();
        assert_eq!(undo.function, "dma_free_attrs");
        use Argument::{Behind, Own, Result};
        assert_eq!(undo.arguments, [Own(0), Own(1), Result, Behind(2), Own(4)]);
        assert!(effect.sleeps && effect.allocates == Some(Resource::Dma));
        assert_eq!(model.get("memcpy"), Some(Known::Transient));
        assert_eq!(model.get("jiffies"), Some(Known::Data));
        assert_eq!(model.get("no_such_function"), None);
    }

    #[test]
    fn every_function_that_hands_something_out_says_how_it_is_given_back() {
        for (name, effect) in Model::for_release("6.1.0").unwrap().unwrap().lasting() {
            if effect.allocates.is_some() && !effect.irrevocable && name != "napi_get_frags" {
                assert!(effect.undo.is_some(), "{name}");
            }
            // What is freed can only be undone by not doing it yet.
            if effect.frees.is_some() {
                assert!(effect.deferrable || effect.irrevocable, "{name}");
            }
        }
    }

    #[test]
    fn isolation_gets_what_has_to_be_seen_and_what_has_not() {
        let model = Model::for_release("6.1.0")
            .unwrap()
            .unwrap()
            .for_isolation();
        let of = |name: &str| model.lasting.iter().find(|function| function.name == name);
        // Given back only at the end of the call, because nothing brings it back.
        assert!(of("kfree").is_some_and(|f| f.deferred && f.undo.is_none()));
        assert!(of("queue_work_on").is_some_and(|f| !f.deferred && f.undo.is_some()));
        assert!(of("free_irq").is_some_and(|f| !f.deferred && f.undo.is_none()));
        let carrier = of("netif_carrier_off").unwrap().changes.clone().unwrap();
        assert_eq!((carrier.argument, carrier.member.as_str()), (0, "state"));
        for harmless in ["memcpy", "jiffies", "msleep", "ioread32", "iowrite32"] {
            assert!(
                model.harmless.iter().any(|name| name == harmless),
                "{harmless}"
            );
            assert!(of(harmless).is_none(), "{harmless}");
        }
    }

    #[test]
    fn a_model_that_contradicts_itself_is_refused() {
        assert!(with("f = {}").is_ok());
        for wrong in [
            "f = { undo = \"g(0)\", irrevocable = true }",
            "f = { undo = \"g\" }",
            "f = { undo = \"g(6)\" }",
            "f = { undo = \"g(-1)\" }",
            "f = { undo = \"g(**0)\" }",
            "f = { undo = \"g(0.)\" }",
            "f = { undo = \"g(6.x)\" }",
            "f = { undo = \"g(=-1)\" }",
            "f = { changes = \"state\" }",
            "f = { changes = \"0.a.b.c.d.e.f.g.h.i\" }",
            "f = { undo = \"g(0,1,2,3,4,5,0)\" }",
            "f = { undo = \"(0)\" }",
            "f = { owned = [6] }",
            "f = { owned = [-1] }",
            "f = { frees = \"everything\" }",
            "f = { sleep = true }",
            "memcpy = {}",
            "\"a b\" = {}",
            "\"\" = {}",
            "\"9\" = {}",
            "f = {}\nf = {}",
        ] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nonsense_and_other_versions_are_refused() {
        for text in ["", "schema = 1", "[[[", "schema = \"1\"", "\u{0}"] {
            assert!(Model::parse(text).is_err(), "{text:?}");
        }
        let text = "schema = 2\nkernel = \"\"\ndata = []\ntransient = []\n[function]\n";
        assert_eq!(Model::parse(text).unwrap_err(), ModelError::Schema(2));
        let long = format!("# {}", "x".repeat(MAX_BYTES));
        assert!(matches!(Model::parse(&long), Err(ModelError::TooLong(_))));
        let deep = format!("a = {}", "[".repeat(100_000));
        assert!(Model::parse(&deep).is_err());
    }
}
