//! What names mean and how types hang together, kept: each answer is looked for among a kernel's
//! hundred thousand types, or all of a module's, otherwise, at every call.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use super::Path;
use super::counted::reference_counts;
use super::own::{Candidate, Holders, holders_of, pointing_at};
use crate::guest::addr::GvaRange;
use crate::guest::btf::{Btf, Function, Member, TypeId};

/// Answers by what was asked about.
type Answers<Q, A> = RefCell<HashMap<Q, A>>;

/// Answers to questions about one [`Btf`], which does not change. There are as many as the rules
/// have names and the types structures, and one for each function of the driver that was called:
/// none is of a value that the guest says.
#[derive(Debug, Default)]
pub struct Names {
    structs: Answers<&'static str, Option<TypeId>>,
    members: Answers<(TypeId, &'static str), Option<Member>>,
    functions: Answers<String, Option<TypeId>>,
    paths: Answers<(TypeId, &'static str), Option<Arc<Path>>>,
    counts: Answers<TypeId, Arc<[GvaRange]>>,
    pointing: Answers<TypeId, Arc<[Candidate]>>,
    holders: Answers<TypeId, Arc<Holders>>,
    leading: Answers<TypeId, Arc<[Member]>>,
}

impl Names {
    /// The structure or union of this name.
    pub fn find_struct(&self, types: &Btf, name: &'static str) -> Option<TypeId> {
        let mut known = self.structs.borrow_mut();
        *known.entry(name).or_insert_with(|| types.find_struct(name))
    }

    /// The member of this name.
    pub fn find_member(&self, types: &Btf, of: TypeId, name: &'static str) -> Option<Member> {
        let mut known = self.members.borrow_mut();
        *known
            .entry((of, name))
            .or_insert_with(|| types.find_member(of, name))
    }

    /// The member that a path of the rules leads to, see [`Path::find`].
    pub(super) fn find_path(
        &self,
        types: &Btf,
        of: TypeId,
        path: &'static str,
    ) -> Option<Arc<Path>> {
        let mut known = self.paths.borrow_mut();
        let found = || Path::find(types, of, path).map(Arc::new);
        known.entry((of, path)).or_insert_with(found).clone()
    }

    /// Where the structure `of` has counts of references, from its beginning.
    pub(super) fn reference_counts(&self, types: &Btf, of: TypeId) -> Arc<[GvaRange]> {
        let mut known = self.counts.borrow_mut();
        let found = || reference_counts(types, of).into();
        known.entry(of).or_insert_with(found).clone()
    }

    /// The module's structures that have pointers to `of`, the largest first.
    pub(super) fn pointing_at(&self, types: &Btf, of: TypeId) -> Arc<[Candidate]> {
        let mut known = self.pointing.borrow_mut();
        let found = || pointing_at(types, of).into();
        known.entry(of).or_insert_with(found).clone()
    }

    /// Where the module's structures have the structure `id` as a member.
    pub(super) fn holders_of(&self, types: &Btf, id: TypeId) -> Arc<Holders> {
        let mut known = self.holders.borrow_mut();
        let found = || holders_of(types, id).into();
        known.entry(id).or_insert_with(found).clone()
    }

    /// The members of the structure `of` that lead anywhere, which `find` finds.
    pub(super) fn leading_members(
        &self,
        of: TypeId,
        find: impl FnOnce() -> Vec<Member>,
    ) -> Arc<[Member]> {
        let mut known = self.leading.borrow_mut();
        known.entry(of).or_insert_with(|| find().into()).clone()
    }

    /// The function of this name.
    pub fn find_function<'a>(&self, types: &'a Btf, name: &str) -> Option<Function<'a>> {
        if let Some(known) = self.functions.borrow().get(name) {
            return types.function((*known)?);
        }
        let found = types.find_function(name);
        let id = found.as_ref().map(|function| function.id);
        self.functions.borrow_mut().insert(name.to_owned(), id);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;

    #[test]
    fn what_is_asked_again_is_answered_as_before() {
        let mut e = Encoder::new(None);
        let word = e.int("unsigned long", 8, 0);
        let list = e.structure("list_head", 16, &[("next", word, 0), ("prev", word, 8)]);
        let pointer = e.pointer(list);
        e.function("add", word, &[("list", pointer)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let names = Names::default();
        for _ in 0..2 {
            let found = names.find_struct(&types, "list_head");
            assert_eq!(found, Some(list));
            assert_eq!(names.find_struct(&types, "net_device"), None);
            let member = names.find_member(&types, list, "prev").unwrap();
            assert_eq!((member.bit_offset, member.type_id), (64, word));
            assert_eq!(names.find_member(&types, list, "first"), None);
            let function = names.find_function(&types, "add").unwrap();
            assert_eq!(function.returns, word);
            assert_eq!(function.params.iter().count(), 1);
            assert!(names.find_function(&types, "list_head").is_none());
        }
    }
}
