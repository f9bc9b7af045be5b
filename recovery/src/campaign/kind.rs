//! What goes wrong in a trial: an instruction of the driver, or what its device answers.

use devices::edge::EdgeKind;
use isolation::mutation::Kind;
use serde::{Deserialize, Serialize};

/// See the module. No two have the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrialKind {
    /// One instruction is another one.
    Code(Kind),
    /// The device fails, as its driver sees it.
    Edge(EdgeKind),
}

impl TrialKind {
    /// All of them, those of instructions first.
    pub fn all() -> impl Iterator<Item = Self> {
        let code = Kind::ALL.iter().copied().map(Self::Code);
        code.chain(EdgeKind::ALL.map(Self::Edge))
    }

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Code(kind) => kind.name(),
            Self::Edge(kind) => kind.name(),
        }
    }

    /// What goes wrong, in one sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Code(kind) => kind.sentence(),
            Self::Edge(kind) => kind.sentence(),
        }
    }

    /// The publication or document that faults of this kind come from.
    pub fn source(self) -> &'static str {
        match self {
            Self::Code(kind) => kind.source(),
            Self::Edge(kind) => kind.source(),
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|kind| kind.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_tell_all_kinds_apart_and_are_those_of_files() {
        let names: BTreeSet<_> = TrialKind::all().map(TrialKind::name).collect();
        assert_eq!(names.len(), Kind::ALL.len() + EdgeKind::ALL.len());
        for kind in TrialKind::all() {
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("\"{}\"", kind.name()));
            assert_eq!(serde_json::from_str::<TrialKind>(&json).unwrap(), kind);
            assert_eq!(TrialKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(TrialKind::from_name("gremlin"), None);
    }
}
