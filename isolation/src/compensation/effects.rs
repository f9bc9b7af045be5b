//! What kernel functions do that outlasts a call, by name, as whoever has a model of the kernel
//! says it; and what becomes of that with a guest's symbols and types.

use crate::domain::effects::{
    Effect, KeptArgument, KernelEffects, Opposite, OppositeArgument, Pair, Place, Required, Success,
};
use crate::guest::btf::{Btf, Function, Kind, TypeId};
use crate::guest::symbols::SymbolTable;

/// What is known of a kernel's functions.
#[derive(Debug, Clone, Default)]
pub struct KernelModel {
    /// Series of the kernel that it is a model of, such as `6.1`.
    pub kernel: String,
    /// Functions that do something that lasts.
    pub lasting: Vec<FunctionModel>,
    /// Functions that leave nothing behind but bytes in memory.
    pub harmless: Vec<String>,
    /// Functions that may be called with interrupts off.
    pub interrupts_off: Vec<String>,
}

/// What a function does.
#[derive(Debug, Clone, Default)]
pub struct FunctionModel {
    /// Its name.
    pub name: String,
    /// What takes it back.
    pub undo: Option<OppositeModel>,
    /// It is done only when the call has ended well.
    pub deferred: bool,
    /// It did something only if this member of what its argument points at is another one
    /// afterwards.
    pub changes: Option<MemberOf>,
    /// What it keeps of what it is given.
    pub keeps: Vec<KeptModel>,
    /// What it begins, or ends, that is over before the call is.
    pub pair: Option<Pair>,
}

/// Something that a function keeps, and what it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptModel {
    /// Which argument, from 0 to 5.
    pub argument: u8,
    /// The member of what it points at that is meant; the argument itself if it is missing.
    pub member: Option<String>,
    /// What it has to be.
    pub is: RequiredModel,
}

/// What something that is kept has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequiredModel {
    /// A function.
    Function,
    /// An object in a list of the kernel's.
    Listed {
        /// Name of the list's head.
        head: String,
        /// Name of the objects' structure.
        structure: String,
        /// The member of it that is in the list.
        links: String,
    },
}

/// A member of the structure that an argument points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberOf {
    /// Which argument, from 0 to 5.
    pub argument: u8,
    /// The member; members of members after dots.
    pub member: String,
}

/// What takes a function back.
#[derive(Debug, Clone)]
pub struct OppositeModel {
    /// Its name.
    pub function: String,
    /// At most six.
    pub arguments: Vec<ArgumentModel>,
}

/// What an opposite is called with.
#[derive(Debug, Clone)]
pub enum ArgumentModel {
    /// What the function returned.
    Result,
    /// An argument of the function, from 0 to 5.
    Own(u8),
    /// The 8 bytes that an argument points at.
    Behind(u8),
    /// A member of what an argument points at.
    Member(MemberOf),
    /// A number.
    Constant(u64),
}

impl KernelModel {
    /// For the guest with these symbols and types.
    pub fn resolve(&self, symbols: &SymbolTable, types: &Btf) -> KernelEffects {
        let at = |name: &str| symbols.kernel_symbol(name).map(|symbol| symbol.at.0);
        let mut effects = KernelEffects {
            harmless: self.harmless.iter().filter_map(|name| at(name)).collect(),
            interrupts_off: self
                .interrupts_off
                .iter()
                .filter_map(|name| at(name))
                .collect(),
            ..KernelEffects::default()
        };
        for model in &self.lasting {
            if let Some(va) = at(&model.name) {
                effects
                    .lasting
                    .insert(va, model.resolve(types, &|name| at(name)));
                let keeps = model.kept(types, &|name| at(name));
                if !keeps.is_empty() {
                    effects.keeps.insert(va, keeps);
                }
            }
        }
        effects
    }
}

impl FunctionModel {
    fn resolve(&self, types: &Btf, at: &dyn Fn(&str) -> Option<u64>) -> Effect {
        let function = types.find_function(&self.name);
        let place = |of: &MemberOf| place(types, function.as_ref()?, of);
        let undo = self.undo.as_ref().and_then(|undo| {
            let arguments = undo.arguments.iter().map(|argument| {
                Some(match argument {
                    ArgumentModel::Result => OppositeArgument::Result,
                    ArgumentModel::Own(index) => OppositeArgument::Own((*index).min(5)),
                    ArgumentModel::Behind(index) => OppositeArgument::At(Place {
                        argument: (*index).min(5),
                        offset: 0,
                        bytes: 8,
                    }),
                    ArgumentModel::Member(of) => OppositeArgument::At(place(of)?),
                    ArgumentModel::Constant(number) => OppositeArgument::Constant(*number),
                })
            });
            Some(Opposite {
                function: at(&undo.function)?,
                arguments: arguments.collect::<Option<_>>()?,
            })
        });
        Effect {
            undo,
            deferred: self.deferred,
            success: function.map_or(Success::Always, |function| success(types, &function)),
            changes: self.changes.as_ref().and_then(place),
            pair: self.pair,
        }
    }
}

impl FunctionModel {
    /// What it keeps, as far as this kernel has it.
    fn kept(&self, types: &Btf, at: &dyn Fn(&str) -> Option<u64>) -> Vec<KeptArgument> {
        let function = types.find_function(&self.name);
        let resolved = self.keeps.iter().filter_map(|kept| {
            let offset = match &kept.member {
                None => None,
                Some(member) => {
                    let of = MemberOf {
                        argument: kept.argument,
                        member: member.clone(),
                    };
                    let place = place(types, function.as_ref()?, &of);
                    Some(place.filter(|place| place.bytes == 8)?.offset)
                }
            };
            let is = match &kept.is {
                RequiredModel::Function => Required::Function,
                RequiredModel::Listed {
                    head,
                    structure,
                    links,
                } => {
                    let member = types.find_member(types.find_struct(structure)?, links)?;
                    Required::Listed {
                        head: at(head)?,
                        links: u64::from(member.bit_offset / 8),
                    }
                }
            };
            Some(KeptArgument {
                argument: kept.argument,
                offset,
                is,
            })
        });
        resolved.collect()
    }
}

/// Where the member is, by the type of the function's parameter.
fn place(types: &Btf, function: &Function<'_>, of: &MemberOf) -> Option<Place> {
    let parameter = function.params.iter().nth(usize::from(of.argument))?;
    let mut type_id: TypeId = types.pointee(parameter.type_id)?;
    let mut offset = 0u64;
    for name in of.member.split('.') {
        let member = types.find_member(type_id, name)?;
        offset = offset.checked_add(u64::from(member.bit_offset / 8))?;
        type_id = member.type_id;
    }
    let bytes = types
        .size_of(type_id)
        .filter(|bytes| [1, 2, 4, 8].contains(bytes))?;
    Some(Place {
        argument: of.argument,
        offset,
        bytes: u8::try_from(bytes).ok()?,
    })
}

/// What the type of the result says about success.
fn success(types: &Btf, function: &Function<'_>) -> Success {
    match types.resolve(function.returns) {
        Some((_, Kind::Pointer(_))) => Success::Pointer,
        Some((_, Kind::Int { boolean: true, .. })) => Success::True,
        Some((
            _,
            Kind::Int {
                signed: true,
                bytes: 4,
                ..
            },
        )) => Success::NotNegative,
        Some((
            _,
            Kind::Int {
                signed: true,
                bytes: 8,
                ..
            },
        )) => Success::NotNegativeLong,
        Some((_, Kind::Int { bytes: 8, .. })) => Success::NotAllOnes,
        _ => Success::Always,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::symbols::{Line, SymbolTableBuilder};

    /// Most of it is one model that has something of each kind.
    #[test]
    #[expect(
        clippy::too_many_lines,
        reason = "one table of what is made of each name"
    )]
    fn names_become_addresses_and_members_offsets() {
        let mut e = Encoder::new(None);
        let (int, word) = (e.int("int", 4, 1), e.int("unsigned long", 8, 0));
        let boolean = e.int("bool", 1, 4);
        let inner = e.structure("inner", 16, &[("", word, 0), ("cpu", int, 8)]);
        let outer = e.structure("outer", 32, &[("state", word, 0), ("inner", inner, 8)]);
        let pointer = e.pointer(outer);
        e.function("cancel", boolean, &[("what", pointer)]);
        e.function("get", pointer, &[("how", int)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let mut symbols = SymbolTableBuilder::default();
        for (address, name) in [(0x1000, "cancel"), (0x2000, "queue"), (0x3000, "get")] {
            let line = Line {
                address,
                kind: 'T',
                name,
                module: None,
            };
            symbols.add(&line).unwrap();
        }
        let member = |member: &str| MemberOf {
            argument: 0,
            member: member.to_owned(),
        };
        let undo = |function: &str| {
            Some(OppositeModel {
                function: function.to_owned(),
                arguments: vec![
                    ArgumentModel::Member(member("inner.cpu")),
                    ArgumentModel::Own(0),
                ],
            })
        };
        let model = KernelModel {
            kernel: "6.1".to_owned(),
            lasting: vec![
                FunctionModel {
                    name: "cancel".into(),
                    undo: undo("queue"),
                    changes: Some(member("state")),
                    keeps: vec![
                        KeptModel {
                            argument: 0,
                            member: Some("state".into()),
                            is: RequiredModel::Function,
                        },
                        KeptModel {
                            argument: 0,
                            member: None,
                            is: RequiredModel::Listed {
                                head: "queue".into(),
                                structure: "outer".into(),
                                links: "inner".into(),
                            },
                        },
                        KeptModel {
                            argument: 0,
                            member: Some("not_in_this_kernel".into()),
                            is: RequiredModel::Function,
                        },
                    ],
                    deferred: false,
                    pair: None,
                },
                FunctionModel {
                    name: "get".into(),
                    undo: undo("not_in_this_kernel"),
                    ..FunctionModel::default()
                },
                FunctionModel {
                    name: "not_in_this_kernel".into(),
                    ..FunctionModel::default()
                },
            ],
            harmless: vec!["queue".into(), "not_in_this_kernel".into()],
            interrupts_off: vec!["get".into(), "not_in_this_kernel".into()],
        };
        let effects = model.resolve(&symbols.finish(), &types);
        assert_eq!(effects.lasting.len(), 2);
        let cancel = &effects.lasting[&0x1000];
        let cpu = Place {
            argument: 0,
            offset: 16,
            bytes: 4,
        };
        let opposite = cancel.undo.as_ref().unwrap();
        assert_eq!(opposite.function, 0x2000);
        assert_eq!(
            opposite.arguments,
            [OppositeArgument::At(cpu), OppositeArgument::Own(0)]
        );
        assert_eq!(cancel.changes.unwrap().offset, 0);
        assert_eq!(cancel.success, Success::True);
        let (function, listed) = (
            Required::Function,
            Required::Listed {
                head: 0x2000,
                links: 8,
            },
        );
        let kept = |offset, is| KeptArgument {
            argument: 0,
            offset,
            is,
        };
        assert_eq!(
            effects.keeps[&0x1000],
            [kept(Some(0), function), kept(None, listed)]
        );
        assert_eq!(effects.keeps.len(), 1);
        // Without its opposite a function cannot be taken back.
        assert_eq!(effects.lasting[&0x3000].undo, None);
        assert_eq!(effects.lasting[&0x3000].success, Success::Pointer);
        assert!(effects.interrupts_off.iter().eq([&0x3000]));
        assert!(!effects.matters(0x2000) && effects.matters(0x4000));
    }
}
