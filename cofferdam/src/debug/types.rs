//! Types of the guest's kernel and module as C has them, by name (BTF).

use std::fmt::Write;

use isolation::guest::btf::{Btf, Kind, Member, TypeId};

/// Most members and values that are listed.
const MAX_LISTED: usize = 2048;

/// A type, or the prototype of a function, by name; `None` if there is none.
pub fn declaration(types: &Btf, name: &str) -> Option<String> {
    let plain = name
        .trim_start_matches("struct ")
        .trim_start_matches("union ")
        .trim_start_matches("enum ")
        .trim();
    if let Some(id) = types.find_struct(plain) {
        return structure(types, plain, id);
    }
    if let Some(prototype) = prototype(types, plain) {
        return Some(format!("{prototype};\n"));
    }
    let own = types.own_named(plain).find_map(|id| other(types, id));
    own.or_else(|| {
        let base = types.base()?;
        base.own_named(plain).find_map(|id| other(base, id))
    })
}

/// `int f(struct s *a)`.
pub fn prototype(types: &Btf, name: &str) -> Option<String> {
    let function = types.find_function(name)?;
    let parameters: Vec<String> = function
        .params
        .iter()
        .take(MAX_LISTED)
        .map(|parameter| match parameter.type_id {
            TypeId::VOID => "...".to_owned(),
            id => declared(&types.type_name(id), types.string(parameter.name_at)),
        })
        .collect();
    let parameters = match parameters.is_empty() {
        true => "void".to_owned(),
        false => parameters.join(", "),
    };
    let returned = types.type_name(function.returns);
    Some(format!("{}({parameters})", declared(&returned, name)))
}

/// `f(a=0x1, b=0x2)`: what the function of this name was called with. Arguments that are not in
/// registers are left out.
pub fn called(types: Option<&Btf>, name: &str, arguments: [u64; 6]) -> String {
    let Some(function) = types.and_then(|types| types.find_function(name)) else {
        let [first, second, third, ..] = arguments;
        return format!("{name}({first:#x}, {second:#x}, {third:#x}, ...)");
    };
    let named = function.params.iter().zip(arguments);
    let listed: Vec<String> = named
        .map(|(parameter, value)| {
            let name = types.map_or("", |types| types.string(parameter.name_at));
            match name {
                "" => format!("{value:#x}"),
                name => format!("{name}={value:#x}"),
            }
        })
        .collect();
    format!("{name}({})", listed.join(", "))
}

/// A type in front of a name, with a pointer's star at the name.
fn declared(type_name: &str, name: &str) -> String {
    // `int[4]` has its length behind the name, a pointer to a function its name within.
    if let Some((element, length)) = type_name.split_once('[') {
        return format!("{element} {name}[{length}");
    }
    if let Some((returned, parameters)) = type_name.split_once("(*)") {
        return format!("{returned}(*{name}){parameters}");
    }
    let space = match type_name.ends_with('*') || name.is_empty() {
        true => "",
        false => " ",
    };
    format!("{type_name}{space}{name}")
}

fn structure(types: &Btf, name: &str, id: TypeId) -> Option<String> {
    let (keyword, bytes, members) = match types.kind(id)? {
        Kind::Struct { bytes, members } => ("struct", bytes, members),
        Kind::Union { bytes, members } => ("union", bytes, members),
        _ => return None,
    };
    let mut text = format!("{keyword} {name} {{  /* {bytes} bytes */\n");
    for member in members.iter().take(MAX_LISTED) {
        let Member {
            name_at,
            type_id,
            bit_offset,
            bit_size,
        } = member;
        let name = types.string(name_at);
        let width = match bit_size {
            0 => String::new(),
            bits => format!(" : {bits}"),
        };
        let declared = declared(&types.type_name(type_id), name);
        // Writing to a text does not fail.
        let _ = writeln!(text, "  /* {:#06x} */ {declared}{width};", bit_offset / 8);
    }
    text.push_str("};\n");
    Some(text)
}

/// Other types than structures and functions.
fn other(types: &Btf, id: TypeId) -> Option<String> {
    let name = types.name(id);
    match types.kind(id)? {
        Kind::Typedef(of) => Some(format!(
            "typedef {};\n",
            declared(&types.type_name(of), name)
        )),
        Kind::Enum { bytes, values } => {
            let mut text = format!("enum {name} {{  /* {bytes} bytes */\n");
            for (name_at, value) in values.iter().take(MAX_LISTED) {
                let _ = writeln!(text, "  {} = {value},", types.string(name_at));
            }
            text.push_str("};\n");
            Some(text)
        }
        Kind::Int { bytes, signed, .. } => {
            let sign = if signed { "signed" } else { "unsigned" };
            Some(format!("{name}: {sign}, {bytes} bytes\n"))
        }
        Kind::Forward { union } => {
            let keyword = if union { "union" } else { "struct" };
            Some(format!(
                "{keyword} {name};  /* its members are not known */\n"
            ))
        }
        _ => None,
    }
}
