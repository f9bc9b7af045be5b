//! The reader against the encoder, and against damaged data.

use proptest::prelude::*;

use super::encode::Encoder;
use super::*;

fn kernel() -> (Encoder, [TypeId; 4]) {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let device = e.structure("net_device", 64, &[("mtu", int, 8)]);
    let busy = e.enumeration("netdev_tx", 4);
    let tx = e.typedef("netdev_tx_t", busy);
    (e, [int, device, busy, tx])
}

#[test]
fn a_modules_types_go_on_where_the_kernels_end() {
    let (kernel, [int, device, busy, tx]) = kernel();
    let base = Arc::new(Btf::parse(&kernel.bytes(), None).unwrap());
    let mut e = Encoder::new(Some(&base));
    let pointer = e.pointer(device);
    let private = e.structure("my_private", 24, &[("dev", pointer, 0), ("hits", int, 16)]);
    e.function("my_xmit", tx, &[("dev", pointer)]);
    let btf = Btf::parse(&e.bytes(), Some(Arc::clone(&base))).unwrap();

    let function = btf.find_function("my_xmit").unwrap();
    assert_eq!(btf.type_name(function.returns), "netdev_tx_t");
    assert_eq!(btf.names_of(function.returns), ["netdev_tx_t", "netdev_tx"]);
    assert!(
        matches!(btf.resolve(function.returns), Some((id, Kind::Enum { bytes: 4, .. })) if id == busy)
    );
    let params: Vec<_> = function.params.iter().collect();
    assert_eq!(btf.string(params[0].name_at), "dev");
    assert_eq!(btf.type_name(params[0].type_id), "struct net_device *");
    assert_eq!(btf.pointee(params[0].type_id), Some(device));
    assert_eq!(btf.size_of(device), Some(64));
    assert_eq!(btf.find_struct("my_private"), Some(private));
    assert_eq!(btf.find_struct("net_device"), Some(device));
    assert!(btf.is_own(private) && !btf.is_own(device));
    assert!(btf.find_function("net_device").is_none());
    assert!(base.find_struct("my_private").is_none());
}

#[test]
fn a_string_is_the_one_that_it_is_said_to_be_and_no_other() {
    let (kernel, [_, device, ..]) = kernel();
    let base = Arc::new(Btf::parse(&kernel.bytes(), None).unwrap());
    let mut e = Encoder::new(Some(&base));
    e.structure(
        "my_private",
        24,
        &[("hits", TypeId(1), 16), ("", device, 24)],
    );
    let own = Btf::parse(&e.bytes(), Some(base.clone())).unwrap();
    let names = [
        "",
        "h",
        "hits",
        "hitsx",
        "its",
        "my_private",
        "net_device",
        "mtu",
    ];
    for at in 0..own.end_string() + 3 {
        for name in names {
            let inside = at < own.end_string();
            let is = own.is_string(at, name);
            assert_eq!(is, inside && own.string(at) == name, "{name:?} at {at}");
        }
    }
    let mut cut = e.bytes();
    cut.pop();
    let strings = cut.len() as u32 - 24 - own.types.len() as u32;
    cut[20..24].copy_from_slice(&strings.to_le_bytes());
    let open = Btf::parse(&cut, Some(base)).unwrap();
    // Its last letter, before the zero that is cut off.
    let last = own.end_string() - 2;
    let name = own.string(last);
    assert!(own.is_string(last, name) && !open.is_string(last, name));
}

#[test]
fn what_is_written_is_what_was_read() {
    let (kernel, _) = kernel();
    let base = Arc::new(Btf::parse(&kernel.bytes(), None).unwrap());
    let mut e = Encoder::new(Some(&base));
    e.structure("my_private", 24, &[("hits", TypeId(1), 16)]);
    let own = Btf::parse(&e.bytes(), Some(base.clone())).unwrap();
    for (types, base) in [(&*base, None), (&own, Some(base.clone()))] {
        let mut bytes = Vec::new();
        types.write(&mut bytes).unwrap();
        let again = Btf::parse(&bytes, base).unwrap();
        assert_eq!(*again.types, *types.types);
        assert_eq!(*again.strings, *types.strings);
        assert_eq!(again.first_id, types.first_id);
    }
}

#[test]
fn every_kind_is_read_and_written_out() {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let boolean = e.int("_Bool", 1, 4);
    let constant = e.refer(10, "", int);
    let pointer = e.pointer(constant);
    let array = e.array(pointer, 7);
    let volatile = e.refer(9, "", array);
    let restrict = e.refer(11, "", pointer);
    let tag = e.refer(18, "user", int);
    let tagged = e.pointer(tag);
    let float = e.raw("double", 16 << 24, 8, &[]);
    let forward = e.raw("later", 7 << 24 | 1 << 31, 0, &[]);
    let wide = e.enumeration64("wide", &[("FAR", -1)]);
    e.enumeration_of("pageflags", &[("PG_locked", 0), ("PG_slab", 9)]);
    let variable = e.raw("var", 14 << 24, wide.0, &[1]);
    let section = e.raw(".data", 15 << 24 | 1, 96, &[variable.0, 0, 96]);
    let decl = e.raw("tag", 17 << 24, variable.0, &[0]);
    let proto = e.raw("", 13 << 24 | 2, 0, &[0, int.0, 0, 0]);
    let callback = e.pointer(proto);
    let union = e.composite(5, "", 8, &[("a", int, 0), ("b", float, 0)]);
    // Bit fields: 3 bits at bit 5.
    let bits = e.raw("bits", 4 << 24 | 1 << 31 | 1, 4, &[0, int.0, 3 << 24 | 5]);
    let btf = Btf::parse(&e.bytes(), None).unwrap();

    assert_eq!(btf.enum_value("PG_slab"), Some(9));
    assert_eq!(btf.enum_value("FAR"), Some(-1));
    assert_eq!(btf.enum_value("PG_none"), None);
    let names = [
        (TypeId::VOID, "void"),
        (boolean, "_Bool"),
        (pointer, "const int *"),
        (array, "const int *[7]"),
        (restrict, "const int * restrict"),
        (tagged, "int *"),
        (float, "double"),
        (forward, "union later"),
        (wide, "enum wide"),
        (variable, "var"),
        (section, ".data"),
        (callback, "void (*)(int, ...)"),
        (union, "union (anonymous)"),
        (TypeId(999), "(type 999)"),
    ];
    for (id, name) in names {
        assert_eq!(btf.type_name(id), name);
    }
    let sizes = [
        (volatile, Some(56)),
        (wide, Some(8)),
        (variable, Some(8)),
        (section, Some(96)),
        (float, Some(8)),
        (union, Some(8)),
        (forward, None),
        (callback, Some(8)),
        (proto, None),
        (decl, None),
    ];
    for (id, size) in sizes {
        assert_eq!(btf.size_of(id), size, "{}", btf.type_name(id));
    }
    assert!(matches!(
        btf.kind(boolean),
        Some(Kind::Int {
            boolean: true,
            signed: false,
            bytes: 1
        })
    ));
    assert!(matches!(btf.kind(decl), Some(Kind::DeclTag(id)) if id == variable));
    let to = btf.pointee(tagged).unwrap();
    assert!(btf.has_tag(to, &["iomem", "user"]) && !btf.has_tag(to, &["rcu"]));
    assert!(btf.is_const(btf.pointee(restrict).unwrap()) && !btf.is_const(int));
    let Some(Kind::Struct { members, .. }) = btf.kind(bits) else {
        panic!()
    };
    let member = members.iter().next().unwrap();
    assert_eq!((member.bit_offset, member.bit_size), (5, 3));
}

#[test]
fn members_are_found_through_anonymous_unions() {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let inner = e.structure("", 8, &[("x", int, 0), ("y", int, 4)]);
    let union = e.composite(5, "", 8, &[("", inner, 0), ("raw", int, 0)]);
    let outer = e.structure("outer", 24, &[("head", int, 0), ("", union, 16)]);
    let alias = e.typedef("outer_t", outer);
    let btf = Btf::parse(&e.bytes(), None).unwrap();
    let offset = |name| btf.find_member(alias, name).map(|m| m.bit_offset / 8);
    assert_eq!(offset("head"), Some(0));
    assert_eq!(offset("raw"), Some(16));
    assert_eq!(offset("y"), Some(20));
    assert_eq!(offset("z"), None);
}

#[test]
fn circles_end() {
    let mut e = Encoder::new(None);
    let loop_type = TypeId(1);
    e.typedef("me", loop_type);
    let pointer = e.pointer(TypeId(2));
    let array = e.array(TypeId(3), 2);
    e.structure("box", 8, &[("", TypeId(4), 0)]);
    let btf = Btf::parse(&e.bytes(), None).unwrap();
    assert!(btf.resolve(loop_type).is_none());
    assert_eq!(btf.size_of(array), None);
    assert!(btf.find_member(TypeId(4), "x").is_none());
    assert!(btf.type_name(pointer).len() <= MAX_HOPS + 8);
    assert_eq!(btf.names_of(loop_type).len(), MAX_HOPS);
}

#[test]
fn data_that_is_no_btf_says_so() {
    let bytes = kernel().0.bytes();
    let parse = |bytes: &[u8]| Btf::parse(bytes, None).err();
    assert_eq!(parse(b""), Some(BtfError::NotBtf));
    assert_eq!(parse(&[0; 64]), Some(BtfError::NotBtf));
    assert_eq!(parse(&bytes[..bytes.len() - 1]), Some(BtfError::Size));
    let mut long = bytes.clone();
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(parse(&long), Some(BtfError::Size));
    let mut e = Encoder::new(None);
    e.raw("new", 31 << 24, 0, &[]);
    assert_eq!(
        parse(&e.bytes()),
        Some(BtfError::UnknownKind { id: 1, kind: 31 })
    );
    let mut e = Encoder::new(None);
    e.raw("cut", 4 << 24 | 9, 0, &[1, 2, 3]);
    assert_eq!(parse(&e.bytes()), Some(BtfError::TypeCutShort { id: 1 }));
    assert!(matches!(Btf::from_elf(b"no", None), Err(BtfError::Elf(_))));
}

/// Asks everything about every type.
fn ask_all(btf: &Btf) -> usize {
    let mut answers = 0;
    for id in btf.ids().chain([TypeId::VOID, TypeId(u32::MAX)]) {
        answers += btf.type_name(id).len();
        answers += usize::from(btf.size_of(id).is_some());
        answers += usize::from(btf.find_member(id, "nothing").is_some());
        answers += btf.names_of(id).len();
        answers += usize::from(btf.is_const(id) || btf.has_tag(id, &["user"]));
        assert!(btf.type_name(id).len() <= 210);
    }
    answers
}

proptest! {
    #[test]
    fn mutated_btf_is_read_without_harm(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..12),
        cut in any::<usize>(),
    ) {
        let (mut e, [int, device, ..]) = kernel();
        let pointer = e.pointer(device);
        e.function("f", int, &[("d", pointer), ("n", int)]);
        e.array(pointer, 3);
        let mut bytes = e.bytes();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if cut % 4 == 0 {
            bytes.truncate(cut % bytes.len());
        }
        if let Ok(btf) = Btf::parse(&bytes, None) {
            prop_assert!(btf.ids().count() * 12 <= bytes.len());
            ask_all(&btf);
            let split = Btf::parse(&bytes, Some(Arc::new(btf)));
            prop_assert!(split.is_ok_and(|split| ask_all(&split) > 0));
        }
    }

    #[test]
    fn random_types_behind_a_good_header_are_read_without_harm(
        words in prop::collection::vec((any::<u32>(), 0u32..20, 0u32..4, 0u32..12), 0..40),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut e = Encoder::new(None);
        for (name, kind, entries, to) in words {
            let extra = [to; 12];
            let info = kind << 24 | entries | (name & 1) << 31;
            let words = kinds::record_bytes(info).map_or(0, |bytes| (bytes - 12) / 4);
            e.raw(if name & 2 == 0 { "x" } else { "" }, info, to, &extra[..words]);
        }
        let mut bytes = e.bytes();
        bytes.extend(tail);
        match Btf::parse(&bytes, None) {
            Ok(btf) => { ask_all(&btf); }
            Err(error) => {
                let unknown = matches!(error, BtfError::UnknownKind { kind: 0, .. });
                prop_assert!(unknown, "{error}");
            }
        }
    }
}
