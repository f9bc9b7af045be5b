//! Questions about types: what is behind a name, how large, where a member is, how it is written.

use super::{Btf, Kind, Member, Params, TypeId};

/// Most references that are followed in a row (typedefs, qualifiers, arrays of arrays, nested
/// structures). Real types need about ten.
pub const MAX_HOPS: usize = 64;

/// Longest type name that is written out, in bytes.
const MAX_NAME: usize = 200;

/// Most members that a search through anonymous structures looks at.
const MAX_MEMBERS: usize = 1 << 16;

/// A function and its type.
#[derive(Debug, Clone, Copy)]
pub struct Function<'a> {
    /// The function.
    pub id: TypeId,
    /// What it returns.
    pub returns: TypeId,
    /// What it takes.
    pub params: Params<'a>,
}

/// What a typedef, qualifier or tag stands before; `None` for a type of its own.
fn behind(kind: &Kind<'_>) -> Option<TypeId> {
    match kind {
        Kind::Typedef(next)
        | Kind::Const(next)
        | Kind::Volatile(next)
        | Kind::Restrict(next)
        | Kind::TypeTag(next) => Some(*next),
        _ => None,
    }
}

impl Btf {
    /// The type behind typedefs, qualifiers and tags. `None` if it does not exist or the references
    /// form a circle.
    pub fn resolve(&self, mut id: TypeId) -> Option<(TypeId, Kind<'_>)> {
        for _ in 0..MAX_HOPS {
            let kind = self.kind(id)?;
            let Some(next) = behind(&kind) else {
                return Some((id, kind));
            };
            id = next;
        }
        None
    }

    /// The names on the way from a type to what is behind it: its typedefs, and the name of the
    /// structure, enumeration or integer at the end.
    pub fn names_of(&self, mut id: TypeId) -> Vec<&str> {
        let mut names = Vec::new();
        for _ in 0..MAX_HOPS {
            let name = self.name(id);
            if !name.is_empty() && !matches!(self.kind(id), Some(Kind::TypeTag(_))) {
                names.push(name);
            }
            let Some(next) = self.kind(id).as_ref().and_then(behind) else {
                return names;
            };
            id = next;
        }
        names
    }

    /// What a pointer type points at.
    pub fn pointee(&self, id: TypeId) -> Option<TypeId> {
        match self.resolve(id)?.1 {
            Kind::Pointer(to) => Some(to),
            _ => None,
        }
    }

    /// Whether the memory behind a pointer to this type is for reading only.
    pub fn is_const(&self, mut id: TypeId) -> bool {
        for _ in 0..MAX_HOPS {
            id = match self.kind(id) {
                Some(Kind::Const(_)) => return true,
                Some(
                    Kind::Typedef(next)
                    | Kind::Volatile(next)
                    | Kind::Restrict(next)
                    | Kind::TypeTag(next),
                ) => next,
                Some(Kind::Array { element, .. }) => element,
                _ => return false,
            };
        }
        false
    }

    /// Whether the type carries one of these tags (`user`, `rcu`, `percpu`, `iomem`) before
    /// anything else than qualifiers and typedefs.
    pub fn has_tag(&self, mut id: TypeId, tags: &[&str]) -> bool {
        for _ in 0..MAX_HOPS {
            let kind = self.kind(id);
            if matches!(kind, Some(Kind::TypeTag(_))) && tags.contains(&self.name(id)) {
                return true;
            }
            let Some(next) = kind.as_ref().and_then(behind) else {
                return false;
            };
            id = next;
        }
        false
    }

    /// Size in bytes. `None` for what has none (functions, forward declarations) or an absurd one.
    pub fn size_of(&self, id: TypeId) -> Option<u64> {
        let mut id = id;
        let mut times = 1u64;
        for _ in 0..MAX_HOPS {
            let bytes = match self.resolve(id)?.1 {
                Kind::Int { bytes, .. }
                | Kind::Struct { bytes, .. }
                | Kind::Union { bytes, .. }
                | Kind::Enum { bytes, .. }
                | Kind::DataSection { bytes }
                | Kind::Float { bytes } => bytes,
                Kind::Pointer(_) => 8,
                Kind::Array { element, count } => {
                    times = times.checked_mul(u64::from(count))?;
                    id = element;
                    continue;
                }
                Kind::Variable(of) => {
                    id = of;
                    continue;
                }
                _ => return None,
            };
            return times.checked_mul(u64::from(bytes));
        }
        None
    }

    /// The structure or union of this name, not one that is only declared. A module's own first.
    pub fn find_struct(&self, name: &str) -> Option<TypeId> {
        let is_struct = |id: &TypeId| {
            matches!(
                self.kind(*id),
                Some(Kind::Struct { .. } | Kind::Union { .. })
            )
        };
        self.own_named(name)
            .find(is_struct)
            .or_else(|| self.base.as_ref()?.find_struct(name))
    }

    /// The function that `id` is, if it is one.
    pub fn function(&self, id: TypeId) -> Option<Function<'_>> {
        let Kind::Function(of) = self.kind(id)? else {
            return None;
        };
        match self.kind(of)? {
            Kind::FunctionType { returns, params } => Some(Function {
                id,
                returns,
                params,
            }),
            _ => None,
        }
    }

    /// The function of this name. A module's own first.
    pub fn find_function(&self, name: &str) -> Option<Function<'_>> {
        self.own_named(name)
            .find_map(|id| self.function(id))
            .or_else(|| self.base.as_ref()?.find_function(name))
    }

    /// The number of the enumeration value `name`. The first that is found, of all enumerations.
    pub fn enum_value(&self, name: &str) -> Option<i64> {
        let value = |id| match self.kind(id)? {
            Kind::Enum { values, .. } => values
                .iter()
                .find(|(name_at, _)| self.is_string(*name_at, name))
                .map(|(_, n)| n),
            _ => None,
        };
        self.own_enumerations()
            .find_map(value)
            .or_else(|| self.base.as_ref()?.enum_value(name))
    }

    /// The member `name` of a structure or union; anonymous structures and unions in it are looked
    /// through. The offset is from the start of the outermost.
    pub fn find_member(&self, id: TypeId, name: &str) -> Option<Member> {
        let mut work = MAX_MEMBERS;
        self.member_in(id, name, 0, &mut work, 8)
    }

    fn member_in(
        &self,
        id: TypeId,
        name: &str,
        base_bits: u32,
        work: &mut usize,
        depth: usize,
    ) -> Option<Member> {
        let (Kind::Struct { members, .. } | Kind::Union { members, .. }) = self.resolve(id)?.1
        else {
            return None;
        };
        let depth = depth.checked_sub(1)?;
        for member in members.iter() {
            *work = work.checked_sub(1)?;
            let bit_offset = base_bits.checked_add(member.bit_offset)?;
            if self.is_string(member.name_at, name) {
                return Some(Member {
                    bit_offset,
                    ..member
                });
            }
            if self.is_string(member.name_at, "")
                && let Some(found) = self.member_in(member.type_id, name, bit_offset, work, depth)
            {
                return Some(found);
            }
        }
        None
    }

    /// The type as C has it, shortened if it is long: `const struct net_device *`.
    pub fn type_name(&self, id: TypeId) -> String {
        let mut hops = MAX_HOPS;
        let mut name = self.write_type(id, &mut hops);
        if name.len() > MAX_NAME {
            let mut end = MAX_NAME;
            while !name.is_char_boundary(end) {
                end -= 1;
            }
            name.truncate(end);
            name.push_str("...");
        }
        name
    }

    fn write_type(&self, id: TypeId, hops: &mut usize) -> String {
        let Some(left) = hops.checked_sub(1) else {
            return "...".to_owned();
        };
        *hops = left;
        let named = |keyword: &str| match self.name(id) {
            "" => format!("{keyword} (anonymous)"),
            name => format!("{keyword} {name}"),
        };
        let qualified = |word: &str, inner: TypeId, hops: &mut usize| {
            // A qualifier of a pointer stands behind it.
            match matches!(self.kind(inner), Some(Kind::Pointer(_))) {
                true => format!("{} {word}", self.write_type(inner, hops)),
                false => format!("{word} {}", self.write_type(inner, hops)),
            }
        };
        match self.kind(id) {
            Some(Kind::Void) => "void".to_owned(),
            Some(Kind::Int { .. } | Kind::Float { .. } | Kind::Typedef(_)) => {
                self.name(id).to_owned()
            }
            Some(Kind::Struct { .. } | Kind::Forward { union: false }) => named("struct"),
            Some(Kind::Union { .. } | Kind::Forward { union: true }) => named("union"),
            Some(Kind::Enum { .. }) => named("enum"),
            Some(Kind::Pointer(to)) => match self.kind(to) {
                Some(Kind::FunctionType { returns, params }) => {
                    let list = self.write_params(params, hops);
                    format!("{} (*)({list})", self.write_type(returns, hops))
                }
                _ => {
                    let inner = self.write_type(to, hops);
                    let space = if inner.ends_with('*') { "" } else { " " };
                    format!("{inner}{space}*")
                }
            },
            Some(Kind::Array { element, count }) => {
                format!("{}[{count}]", self.write_type(element, hops))
            }
            Some(Kind::Const(inner)) => qualified("const", inner, hops),
            Some(Kind::Volatile(inner)) => qualified("volatile", inner, hops),
            Some(Kind::Restrict(inner)) => qualified("restrict", inner, hops),
            Some(Kind::TypeTag(inner)) => self.write_type(inner, hops),
            Some(Kind::FunctionType { returns, params }) => {
                let list = self.write_params(params, hops);
                format!("{} ({list})", self.write_type(returns, hops))
            }
            Some(Kind::Function(_) | Kind::Variable(_) | Kind::DataSection { .. }) => {
                self.name(id).to_owned()
            }
            Some(Kind::DeclTag(_)) | None => format!("(type {})", id.0),
        }
    }

    fn write_params(&self, params: Params<'_>, hops: &mut usize) -> String {
        let mut list = String::new();
        for param in params.iter() {
            if !list.is_empty() {
                list.push_str(", ");
            }
            if list.len() > MAX_NAME {
                list.push_str("...");
                break;
            }
            match param.type_id {
                TypeId::VOID => list.push_str("..."),
                id => list.push_str(&self.write_type(id, hops)),
            }
        }
        if list.is_empty() {
            "void".to_owned()
        } else {
            list
        }
    }
}
