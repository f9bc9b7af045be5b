//! What names mean, kept: each is looked for among a kernel's hundred thousand types otherwise, at
//! every call.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::guest::btf::{Btf, Function, Member, TypeId};

/// Answers to questions by name about one [`Btf`], which does not change. There are as many as the
/// rules have names, and one for each function of the driver that was called.
#[derive(Debug, Default)]
pub struct Names {
    structs: RefCell<HashMap<&'static str, Option<TypeId>>>,
    members: RefCell<HashMap<(TypeId, &'static str), Option<Member>>>,
    functions: RefCell<HashMap<String, Option<TypeId>>>,
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
