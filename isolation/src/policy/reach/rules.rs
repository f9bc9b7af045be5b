//! What the kernel's types do not say about what a driver may write.

use std::sync::LazyLock;

use serde::Deserialize;

use crate::guest::btf::{Btf, TypeId};
use crate::models::{built_in, kept};

/// Private data of the driver right behind a structure of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrivateArea {
    /// The structure.
    pub behind: &'static str,
    /// Alignment of the private data, a power of two in bytes.
    pub align: u64,
    /// Where its size is noted that was asked for, a path from the structure.
    #[serde(borrow)]
    pub size: Option<&'static str>,
    /// What the private data is where nothing in it tells: the first of these structures that the
    /// module defines.
    #[serde(default, deserialize_with = "kept")]
    pub is: &'static [&'static str],
}

/// Private data of the driver in the middle of a structure of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InsideArea {
    /// What it is come to by: the first member of the structure.
    pub of: &'static str,
    /// The structure.
    pub holder: &'static str,
    /// The member that is the driver's.
    pub member: &'static str,
    /// What is in it: the first of these structures that the module defines. Only pointers are of
    /// interest.
    #[serde(default, deserialize_with = "kept")]
    pub is: &'static [&'static str],
}

/// A buffer described by two members of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PacketData {
    /// The structure.
    pub of: &'static str,
    /// Member that points at the first byte.
    pub base: &'static str,
    /// Member that has the offset of the end.
    pub end: &'static str,
    /// Structure that lies at the end and belongs to the buffer.
    pub trailer: &'static str,
}

/// A structure of the kernel's that drivers embed in their own, and get back as an argument.
pub type Embedded = &'static str;

/// A pointer in a structure of the kernel's that leads to what a driver may write: its own data, or
/// what inline functions of the kernel that became part of the driver write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Followed {
    /// The structure.
    pub of: &'static str,
    /// The pointer; `a->b` for member `b` of what `a` points at, which is not to be written for
    /// that.
    pub member: &'static str,
    /// Member with the number of elements, if it is an array.
    #[serde(borrow)]
    pub count: Option<&'static str>,
    /// What a `void *` is: the first of these structures that the module defines. Where none is, it
    /// is the module's structure that points back.
    #[serde(default, deserialize_with = "kept")]
    pub is: &'static [&'static str],
    /// Followed also where the structure itself is only to be read.
    #[serde(default)]
    pub from_const: bool,
    /// Not followed where it is none of the module's structures.
    #[serde(default)]
    pub own_only: bool,
}

/// A list in a structure of the module's (`struct list_head`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// The structure.
    pub of: &'static str,
    /// The list's head in it.
    pub member: &'static str,
    /// What is in the list, a structure of the module's.
    pub element: &'static str,
    /// The link in there.
    pub link: &'static str,
}

/// A structure of the kernel's of which a driver has one, from whose pages it is given memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// The structure.
    pub of: &'static str,
    /// The head of the list of its pages in it.
    pub pages: &'static str,
    /// The bytes of each, in it.
    pub bytes: &'static str,
    /// What is in the list.
    pub page: &'static str,
    /// The link in there.
    pub link: &'static str,
    /// The address of the page's memory in there.
    pub memory: &'static str,
}

/// A structure of the kernel's of which a driver has one, with the requests under way: arrays of
/// pointers to them by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagSet {
    /// The structure.
    pub of: &'static str,
    /// Its member that points at an array of pointers to `each`.
    pub tags: &'static str,
    /// How many these are, in it.
    pub count: &'static str,
    /// What has requests.
    pub each: &'static str,
    /// Its member that points at an array of pointers to them.
    pub requests: &'static str,
    /// How many these are, in it.
    pub depth: &'static str,
}

/// What an argument points at whose type does not say so (`void *`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Untyped {
    /// What the function returns, a typedef.
    pub returns: &'static str,
    /// The argument, from 0.
    pub argument: u8,
    /// The first of these structures that the module defines.
    #[serde(default, deserialize_with = "kept")]
    pub is: &'static [&'static str],
}

/// A pointer in a structure of the kernel's to another one, of which inline functions write parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counted {
    /// The structure.
    pub of: &'static str,
    /// The pointer.
    pub member: &'static str,
    /// Member with the number of elements, if it points at an array of pointers.
    #[serde(borrow)]
    pub count: Option<&'static str>,
    /// What is written there besides the counts of references.
    #[serde(default, deserialize_with = "kept")]
    pub also: &'static [&'static str],
}

/// A pointer in a structure of the kernel's to data of the current processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerCpuPointer {
    /// The structure.
    pub of: &'static str,
    /// The pointer, a path ([`Path::find`](super::Path::find)). Only that of the kernel's version
    /// at hand exists; members of a union are all named, the largest counts.
    #[serde(default, deserialize_with = "kept")]
    pub members: &'static [&'static str],
    /// Also where the structure itself is only to be read.
    #[serde(default)]
    pub from_const: bool,
}

/// What a module keeps in each network namespace (`net_generic`), by a number in a structure of its
/// own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InNamespace {
    /// The structure.
    pub of: &'static str,
    /// Path from there to the namespace's `struct net_generic`.
    pub generic: &'static str,
    /// The member with the number.
    pub number: &'static str,
    /// What is kept.
    pub is: &'static str,
}

/// Structures that belong to modules although the kernel knows them, too: something that is built
/// in has their header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModulesOwn {
    /// The modules.
    #[serde(default, deserialize_with = "kept")]
    pub modules: &'static [&'static str],
    /// The structure behind which each keeps its own ([`PrivateArea`]).
    pub behind: &'static str,
    /// What each keeps there.
    pub private: &'static str,
    /// What else is their own.
    #[serde(default, deserialize_with = "kept")]
    pub others: &'static [&'static str],
}

/// A structure of the kernel's in which drivers keep things by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Numbered {
    /// The structure.
    pub of: &'static str,
    /// The member that is an xarray; none for what is one itself.
    #[serde(borrow)]
    pub member: Option<&'static str>,
}

/// A structure of the kernel's that is in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chained {
    /// The structure.
    pub of: &'static str,
    /// The member that has the next.
    pub next: &'static str,
    /// A structure that is a list of them, and its member that has the first.
    #[serde(borrow)]
    pub list: Option<[&'static str; 2]>,
}

/// A member that kernel functions keep in a structure that is otherwise the driver's to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelsMember {
    /// The structure.
    pub of: &'static str,
    /// The member.
    pub member: &'static str,
}

/// Members of the kernel's objects that inline functions write, behind pointers in a structure of
/// the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// The structure.
    pub of: &'static str,
    /// The members, paths from it ([`Path::find`](super::Path::find)).
    #[serde(default, deserialize_with = "kept")]
    pub members: &'static [&'static str],
}

/// An object that kernel functions answer a driver with, of which it, or an inline function that
/// became part of it, writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answered {
    /// The functions, by all names that they have had.
    #[serde(default, deserialize_with = "kept")]
    pub by: &'static [&'static str],
    /// The argument, from 0, that points at where they put the pointer to the object; without one
    /// they return it.
    pub argument: Option<u8>,
    /// What that points at, and the member of it with the pointer; without one it points at the
    /// pointer itself.
    #[serde(borrow)]
    pub member: Option<[&'static str; 2]>,
    /// The object.
    pub is: &'static str,
    /// What of it is written, paths from it ([`Path::find`](super::Path::find)).
    #[serde(default, deserialize_with = "kept")]
    pub also: &'static [&'static str],
    /// Its members with the address of a buffer that is written, and with the buffer's bytes.
    #[serde(borrow)]
    pub buffer: Option<[&'static str; 2]>,
    /// It is the driver's to write as what the driver's own structures have pointers to.
    #[serde(default)]
    pub whole: bool,
}

/// What of the kernel's structures is a driver's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnTypes {
    /// What it keeps behind the structure of this name.
    pub private: Option<(&'static str, TypeId)>,
    /// All.
    pub all: Vec<TypeId>,
}

/// All rules.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// Private data behind a structure.
    #[serde(default, deserialize_with = "kept")]
    pub private_areas: &'static [PrivateArea],
    /// Private data in a structure.
    #[serde(default, deserialize_with = "kept")]
    pub inside: &'static [InsideArea],
    /// Buffers.
    #[serde(default, deserialize_with = "kept")]
    pub packet_data: &'static [PacketData],
    /// Structures whose whole allocation is the driver's (`container_of`).
    #[serde(default, deserialize_with = "kept")]
    pub embedded: &'static [Embedded],
    /// Pointers that are followed though they are the kernel's.
    #[serde(default, deserialize_with = "kept")]
    pub followed: &'static [Followed],
    /// Pointers to data of the current processor.
    #[serde(default, deserialize_with = "kept")]
    pub per_cpu: &'static [PerCpuPointer],
    /// Structures of modules that the kernel knows, too.
    #[serde(default, deserialize_with = "kept")]
    pub modules_own: &'static [ModulesOwn],
    /// Lists in the module's structures.
    #[serde(default, deserialize_with = "kept")]
    pub listed: &'static [Listed],
    /// Pools of memory.
    #[serde(default, deserialize_with = "kept")]
    pub pools: &'static [Pool],
    /// Sets of requests.
    #[serde(default, deserialize_with = "kept")]
    pub tag_sets: &'static [TagSet],
    /// Arguments.
    #[serde(default, deserialize_with = "kept")]
    pub untyped: &'static [Untyped],
    /// Pointers in the kernel's structures to others of which inline functions count the
    /// references.
    #[serde(default, deserialize_with = "kept")]
    pub counted: &'static [Counted],
    /// Structures of the kernel's in which drivers keep things by number.
    #[serde(default, deserialize_with = "kept")]
    pub arrays: &'static [Numbered],
    /// Structures of the kernel's that are queues of packets, linked by their first member; in a
    /// driver's structure they hold packets of the driver's.
    #[serde(default, deserialize_with = "kept")]
    pub queues: &'static [&'static str],
    /// Structures that an argument may have a pointer to the first of a chain of.
    #[serde(default, deserialize_with = "kept")]
    pub chained: &'static [Chained],
    /// Structures of the kernel's that are part of the driver's: what they are part of is the
    /// driver's, if only one of its structures can be.
    #[serde(default, deserialize_with = "kept")]
    pub parts: &'static [&'static str],
    /// Members of the kernel's objects that are written.
    #[serde(default, deserialize_with = "kept")]
    pub written: &'static [Written],
    /// What kernel functions answer drivers with.
    #[serde(default, deserialize_with = "kept")]
    pub answered: &'static [Answered],
    /// What a driver keeps in each network namespace by a number in a structure of its own.
    #[serde(default, deserialize_with = "kept")]
    pub in_namespaces: &'static [InNamespace],
    /// Structures that a driver's pointer does not make the driver's: shared by the whole kernel.
    #[serde(default, deserialize_with = "kept")]
    pub closed: &'static [&'static str],
    /// Structures that kernel functions keep, wherever they lie: what a call did to them is undone
    /// by calling other kernel functions, not by putting bytes back.
    #[serde(default, deserialize_with = "kept")]
    pub kernels: &'static [&'static str],
    /// Of these, the links of lists that inline functions of the kernel change, too: a pointer to
    /// the next and one to the previous.
    pub links: &'static str,
    /// Members of the running thread's `struct task_struct` that inline functions of the kernel
    /// write.
    #[serde(default, deserialize_with = "kept")]
    pub running_thread: &'static [&'static str],
    /// Members that kernel functions keep in structures that are otherwise the driver's to write.
    #[serde(default, deserialize_with = "kept")]
    pub kernels_members: &'static [KernelsMember],
}

/// Those for Linux.
static LINUX: LazyLock<Rules> =
    LazyLock::new(|| built_in(include_str!("../../../models/types.toml")));

impl Rules {
    /// For Linux (`models/types.toml`).
    pub fn linux() -> &'static Self {
        &LINUX
    }

    /// What of the kernel's structures is the module's own.
    pub fn own_of(&self, module: &str, types: &Btf) -> OwnTypes {
        let mut rules = self.modules_own.iter();
        let Some(rule) = rules.find(|rule| rule.modules.contains(&module)) else {
            return OwnTypes::default();
        };
        let private = types.find_struct(rule.private);
        let others = rule
            .others
            .iter()
            .filter_map(|name| types.find_struct(name));
        OwnTypes {
            private: private.map(|id| (rule.behind, id)),
            all: private.into_iter().chain(others).collect(),
        }
    }
}
