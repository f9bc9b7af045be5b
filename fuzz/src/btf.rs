//! Whatever a guest says its types are (BTF) is read without harm: every type is asked for
//! everything it offers.

use isolation::guest::btf::{Btf, Kind};

/// One input.
pub fn run(data: &[u8]) {
    let Ok(types) = Btf::parse(data, None) else {
        return;
    };
    for id in types.ids() {
        types.type_name(id);
        types.size_of(id);
        types.pointee(id);
        types.is_const(id);
        types.names_of(id);
        types.find_member(id, "a");
        if let Some((_, Kind::Struct { members, .. } | Kind::Union { members, .. })) =
            types.resolve(id)
        {
            for member in members.iter() {
                types.string(member.name_at);
            }
        }
        let name = types.name(id).to_owned();
        types.find_struct(&name);
        types.find_function(&name);
        types.enum_value(&name);
    }
}
