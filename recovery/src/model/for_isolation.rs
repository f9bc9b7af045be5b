//! A model as isolated calls are journalled and compensated by it.

use isolation::compensation::effects::{
    ArgumentModel, FunctionModel, KeptModel, KernelModel, MemberOf, OppositeModel, RequiredModel,
};
use isolation::domain::effects;

use super::{Argument, Keeps, Model, Pair, Required, Undo};

impl Model {
    /// What isolated calls are journalled and compensated by.
    pub fn for_isolation(&self) -> KernelModel {
        let mut model = KernelModel {
            kernel: self.kernel.clone(),
            harmless: self.data.iter().chain(&self.transient).cloned().collect(),
            lasting: Vec::new(),
            interrupts_off: self.interrupts_off.iter().cloned().collect(),
        };
        for (name, effect) in &self.lasting {
            let ends = effect.pair == Some(Pair::Ends);
            if effect.undo.is_none() && !effect.irrevocable && !effect.deferrable && !ends {
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
                keeps: effect.keeps.iter().map(Keeps::for_isolation).collect(),
                pair: effect.pair.map(Pair::for_isolation),
            });
        }
        model
    }
}

impl Keeps {
    fn for_isolation(&self) -> KeptModel {
        KeptModel {
            argument: self.argument,
            member: self.member.clone(),
            is: match &self.is {
                Required::Function => RequiredModel::Function,
                Required::Listed(head, structure, links) => RequiredModel::Listed {
                    head: head.clone(),
                    structure: structure.clone(),
                    links: links.clone(),
                },
            },
        }
    }
}

impl Pair {
    fn for_isolation(self) -> effects::Pair {
        match self {
            Self::Begins => effects::Pair::Begins,
            Self::GoesOn => effects::Pair::GoesOn,
            Self::Ends => effects::Pair::Ends,
        }
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
