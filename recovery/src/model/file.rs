//! A model as its file has it, and what has to be so in one.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{Argument, Changed, Effect, Keeps, ModelError, Pair, Required, Resource, Undo};

/// Version of the schema.
pub(super) const SCHEMA: u32 = 1;

/// Longest model, in bytes.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Longest name of a symbol (`KSYM_NAME_LEN` with its end byte).
const MAX_NAME: usize = 511;

/// Arguments that are passed in registers (System V ABI, section 3.2.3).
const REGISTER_ARGUMENTS: u8 = 6;

/// Most members of members.
const MAX_NESTING: usize = 8;

/// All of a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) schema: u32,
    /// Series of the kernel.
    pub(super) kernel: String,
    /// Series of the model that holds for everything that is not said here.
    pub(super) base: Option<String>,
    /// What that one has and this kernel has not.
    #[serde(default)]
    pub(super) gone: Vec<String>,
    pub(super) data: Vec<String>,
    pub(super) transient: Vec<String>,
    #[serde(default)]
    pub(super) interrupts_off: Vec<String>,
    pub(super) function: BTreeMap<String, Entry>,
}

/// What it says of one function.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
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
    #[serde(default)]
    keeps: Vec<String>,
    pair: Option<Pair>,
}

impl File {
    /// One of this schema in which each name is a symbol's, and is there once.
    pub(super) fn read(text: &str) -> Result<Self, ModelError> {
        if text.len() > MAX_BYTES {
            return Err(ModelError::TooLong(text.len()));
        }
        let file: Self =
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
        Ok(file)
    }
}

impl Entry {
    pub(super) fn effect(&self, name: &str) -> Result<Effect, ModelError> {
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
        let keeps: Option<Vec<Keeps>> = self.keeps.iter().map(|text| parse_keeps(text)).collect();
        let Some(keeps) = keeps else {
            return contradiction(
                "what it keeps is written like `1 in list by structure.links` or `2.work.func is function`",
            );
        };
        if !keeps.is_empty() && self.undo.is_none() && !self.irrevocable && !self.deferrable {
            return contradiction("what keeps something has an effect that lasts");
        }
        match (self.pair, self.undo.is_some()) {
            (Some(Pair::Begins | Pair::GoesOn), false) => {
                return contradiction("what begins something has an opposite that ends it");
            }
            (Some(Pair::Ends), true) => {
                return contradiction("what only ends something has no opposite");
            }
            _ => {}
        }
        if self.pair == Some(Pair::Ends) && (self.irrevocable || self.deferrable) {
            return contradiction("what only ends something is done at once and leaves nothing");
        }
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
            keeps,
            pair: self.pair,
        })
    }
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

/// `1 in list by structure.links`, `1 is function`, `2.member.of.it is function`.
fn parse_keeps(text: &str) -> Option<Keeps> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let (what, is) = match words.as_slice() {
        [what, "is", "function"] => (*what, Required::Function),
        [what, "in", head, "by", by] => {
            let (structure, links) = by.split_once('.')?;
            if ![*head, structure, links].into_iter().all(is_symbol) {
                return None;
            }
            let [head, structure, links] = [*head, structure, links].map(str::to_owned);
            (*what, Required::Listed(head, structure, links))
        }
        _ => return None,
    };
    let (argument, member) = match parse_member(what) {
        Some(Changed { argument, member }) => (argument, Some(member)),
        None => (parse_index(what)?, None),
    };
    Some(Keeps {
        argument,
        member,
        is,
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
