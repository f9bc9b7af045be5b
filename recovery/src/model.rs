//! What kernel functions do that outlasts a call: the model that a call is undone by once a part of
//! it is in the guest.
//!
//! The model is data (`models/linux-6.1.toml`, whose head explains it). That of another series says
//! what differs. It may come from a file of a user's own: it is bounded, every name is one that a
//! kernel symbol can have, every argument exists, and a function that is irrevocable has no
//! opposite.

mod file;
mod for_isolation;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use file::{File, MAX_BYTES, SCHEMA};
use serde::{Deserialize, Serialize};

/// The models that come with this crate, by the series of the kernel that they are of.
const MODELS: [(&str, &str); 2] = [
    ("6.1", include_str!("../models/linux-6.1.toml")),
    ("6.12", include_str!("../models/linux-6.12.toml")),
];

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
    /// Based on a model that there is not, or that is based on another one itself.
    #[error("there is no model of Linux {0} that another can be based on")]
    Base(String),
    /// Said to be gone, and not there.
    #[error("{0} is said to be gone, but the model that this one is based on has no such name")]
    NotGone(String),
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

/// Something that a function keeps of what it is given, and what it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeps {
    /// The argument, from 0.
    pub argument: u8,
    /// The member of what it points at that is meant; the argument itself if it is missing.
    pub member: Option<String>,
    /// What it has to be.
    pub is: Required,
}

/// What something that is kept has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Required {
    /// A function.
    Function,
    /// An object in a list of the kernel's: the list's head, the objects' structure, the member
    /// that is in the list.
    Listed(String, String, String),
}

/// A function that begins or ends what is over before the call is: a lock that is held, a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pair {
    /// It begins it.
    Begins,
    /// It begins it, or goes on with it.
    GoesOn,
    /// It ends it, and does nothing else.
    Ends,
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
    /// What it keeps of what it is given.
    pub keeps: Vec<Keeps>,
    /// What it begins, or ends, that is over before the call is.
    pub pair: Option<Pair>,
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
#[derive(Debug, Clone, Default)]
pub struct Model {
    kernel: String,
    data: BTreeSet<String>,
    transient: BTreeSet<String>,
    lasting: BTreeMap<String, Effect>,
    interrupts_off: BTreeSet<String>,
}

impl Model {
    /// The model that comes with this crate for the kernel of this release, as `uname -r` has it;
    /// `None` if there is none for its series. What a function leaves behind in one series it need
    /// not in another.
    pub fn for_release(release: &str) -> Option<Result<Self, ModelError>> {
        let series = series(release)?;
        Some(Self::parse(text_of(series)?))
    }

    /// The series of the kernel that it is of, such as `6.1`.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Reads a model.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let file = File::read(text)?;
        let base = file.base.as_deref().map(Self::base).transpose()?;
        base.unwrap_or_default().with(file)
    }

    /// The model of `series`, for another one to be based on.
    fn base(series: &str) -> Result<Self, ModelError> {
        let none = || ModelError::Base(series.to_owned());
        let file = File::read(text_of(series).ok_or_else(none)?)?;
        // One step: no model leads back to itself.
        match file.base {
            None => Self::default().with(file),
            Some(_) => Err(none()),
        }
    }

    /// This, but for what the file says.
    fn with(mut self, file: File) -> Result<Self, ModelError> {
        for name in &file.gone {
            if !self.forget(name) {
                return Err(ModelError::NotGone(name.clone()));
            }
        }
        for (name, entry) in file.function {
            let effect = entry.effect(&name)?;
            self.forget(&name);
            self.lasting.insert(name, effect);
        }
        for name in file.transient {
            self.forget(&name);
            self.transient.insert(name);
        }
        for name in file.data {
            self.forget(&name);
            self.data.insert(name);
        }
        self.interrupts_off.extend(file.interrupts_off);
        self.kernel = file.kernel;
        Ok(self)
    }

    /// Whether something was known of `name`, which is not any more.
    fn forget(&mut self, name: &str) -> bool {
        self.interrupts_off.remove(name);
        let known = [
            self.lasting.remove(name).is_some(),
            self.transient.remove(name),
            self.data.remove(name),
        ];
        known.contains(&true)
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

/// `6.1` of `6.1.0-44-amd64`: the first two numbers of a kernel's release.
fn series(release: &str) -> Option<&str> {
    let mut ends = release.match_indices(|c: char| !c.is_ascii_digit());
    let (first, dot) = ends.next()?;
    let end = ends.next().map_or(release.len(), |(at, _)| at);
    let minor = release.get(first + 1..end)?;
    (first > 0 && dot == "." && !minor.is_empty()).then(|| &release[..end])
}

/// The model that comes with this crate for this series.
fn text_of(series: &str) -> Option<&'static str> {
    let mut models = MODELS.iter();
    let (_, text) = models.find(|(kernel, _)| *kernel == series)?;
    Some(text)
}
