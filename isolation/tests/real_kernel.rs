//! The readers of guest knowledge against Debian's real kernel and modules.
//!
//! Needs what `cargo xtask images` builds (or `COFFERDAM_IMAGES`); the comparison of types needs
//! `bpftool` too (Debian package `bpftool`, or its path in `BPFTOOL`).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use isolation::attach::kernel_functions::lacking;
use isolation::guest::addr::{Gva, GvaRange};
use isolation::guest::btf::{Btf, Kind, TypeId};
use isolation::guest::module_text::{TextPart, TextScan};
use isolation::guest::symbols::image::{MOST_TRIED, names_in_image, symbols_in_image};
use isolation::guest::symbols::{Line, SymbolTable, SymbolTableBuilder};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

fn images() -> PathBuf {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/images"));
    std::env::var_os("COFFERDAM_IMAGES").map_or_else(default, PathBuf::from)
}

fn kernel_types() -> Arc<Btf> {
    let kernel = std::fs::read(images().join("vmlinux")).unwrap();
    Arc::new(Btf::from_elf(&kernel, None).unwrap())
}

fn module(name: &str) -> Vec<u8> {
    std::fs::read(images().join("modules").join(name)).unwrap()
}

/// What `bpftool btf dump` prints of a type, members and parameters left out.
fn as_bpftool(btf: &Btf, id: TypeId) -> String {
    let name = match btf.name(id) {
        "" => "(anon)",
        name => name,
    };
    let of = |kind: &str, to: TypeId| format!("{kind} '{name}' type_id={}", to.0);
    let sized = |kind: &str, bytes: u32| format!("{kind} '{name}' size={bytes}");
    let rest = match btf.kind(id).unwrap() {
        Kind::Void => String::new(),
        Kind::Int { bytes, .. } => sized("INT", bytes),
        Kind::Pointer(to) => of("PTR", to),
        Kind::Array { element, count } => {
            return format!("[{}] ARRAY '{name}' type_id={} {count}", id.0, element.0);
        }
        Kind::Struct { bytes, members } => {
            format!("{} vlen={}", sized("STRUCT", bytes), members.len())
        }
        Kind::Union { bytes, members } => {
            format!("{} vlen={}", sized("UNION", bytes), members.len())
        }
        Kind::Enum { bytes, .. } => sized("ENUM", bytes),
        Kind::Forward { union } => {
            format!(
                "FWD '{name}' fwd_kind={}",
                if union { "union" } else { "struct" }
            )
        }
        Kind::Typedef(to) => of("TYPEDEF", to),
        Kind::Const(to) => of("CONST", to),
        Kind::Volatile(to) => of("VOLATILE", to),
        Kind::Restrict(to) => of("RESTRICT", to),
        Kind::TypeTag(to) => of("TYPE_TAG", to),
        Kind::Function(to) => of("FUNC", to),
        Kind::FunctionType { returns, params } => {
            format!(
                "FUNC_PROTO '{name}' ret_type_id={} vlen={}",
                returns.0,
                params.len()
            )
        }
        Kind::Variable(to) => of("VAR", to),
        Kind::DataSection { bytes } => sized("DATASEC", bytes),
        Kind::Float { bytes } => sized("FLOAT", bytes),
        Kind::DeclTag(to) => of("DECL_TAG", to),
    };
    format!("[{}] {rest}", id.0)
}

/// Compares every type of `btf`'s own part with a dump. Returns how many there were.
fn compare(btf: &Btf, dump: &str) -> usize {
    let mut ids = btf.own_ids();
    let mut count = 0;
    let mut lines = dump.lines().peekable();
    while let Some(line) = lines.next() {
        let id = ids
            .next()
            .unwrap_or_else(|| panic!("bpftool has more: {line}"));
        let ours = as_bpftool(btf, id);
        // Things that only the dump tells apart.
        let line = [
            ("ENUM64 ", "ENUM "),
            (" encoding=UNSIGNED", ""),
            (" encoding=SIGNED", ""),
        ]
        .iter()
        .fold(
            line.replace("index_type_id=", "index "),
            |line, (from, to)| line.replace(from, to),
        );
        let theirs = match line.split_once(" index ") {
            Some((array, rest)) => {
                let elements = rest.split_once("nr_elems=").unwrap().1;
                format!("{array} {elements}")
            }
            None => line,
        };
        assert!(theirs.starts_with(&ours), "ours: {ours}\nbpftool: {theirs}");
        count += 1;
        let members: Vec<String> = match btf.kind(id).unwrap() {
            Kind::Struct { members, .. } | Kind::Union { members, .. } => members
                .iter()
                .map(|m| {
                    let bits = match m.bit_size {
                        0 => String::new(),
                        size => format!(" bitfield_size={size}"),
                    };
                    let (name, id, at) = (btf.string(m.name_at), m.type_id.0, m.bit_offset);
                    let name = if name.is_empty() { "(anon)" } else { name };
                    format!("'{name}' type_id={id} bits_offset={at}{bits}")
                })
                .collect(),
            Kind::FunctionType { params, .. } => params
                .iter()
                .map(|p| {
                    let name = btf.string(p.name_at);
                    let name = if name.is_empty() { "(anon)" } else { name };
                    format!("'{name}' type_id={}", p.type_id.0)
                })
                .collect(),
            // Names of values are not read.
            _ => Vec::new(),
        };
        let is_checked = !members.is_empty();
        let mut members = members.into_iter();
        while let Some(theirs) = lines.next_if(|line| line.starts_with('\t')) {
            if is_checked {
                assert_eq!(members.next().as_deref(), Some(theirs.trim()), "in {ours}");
            }
        }
        assert!(members.next().is_none());
    }
    assert!(ids.next().is_none(), "bpftool has fewer");
    count
}

#[test]
#[ignore = "needs target/images (cargo xtask images) and bpftool"]
fn types_are_those_that_bpftool_prints() {
    let bpftool = std::env::var("BPFTOOL").unwrap_or_else(|_| "bpftool".into());
    let dump = |arguments: &[&Path]| {
        let output = Command::new(&bpftool).args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let kernel_file = images().join("vmlinux");
    let [btf, dump_word, file] = ["btf", "dump", "file"].map(Path::new);
    let kernel = kernel_types();
    assert!(compare(&kernel, &dump(&[btf, dump_word, file, &kernel_file])) > 50_000);
    for name in ["dummy.ko", "e1000.ko", "null_blk.ko"] {
        let types = Btf::from_elf(&module(name), Some(Arc::clone(&kernel))).unwrap();
        let path = images().join("modules").join(name);
        let text = dump(&[Path::new("-B"), &kernel_file, btf, dump_word, file, &path]);
        assert!(compare(&types, &text) > 5);
    }
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn entry_points_of_real_drivers_have_their_types() {
    let kernel = kernel_types();
    let types = Btf::from_elf(&module("e1000.ko"), Some(kernel)).unwrap();
    let xmit = types.find_function("e1000_xmit_frame").unwrap();
    assert_eq!(types.type_name(xmit.returns), "netdev_tx_t");
    let params: Vec<_> = xmit
        .params
        .iter()
        .map(|p| types.type_name(p.type_id))
        .collect();
    assert_eq!(params, ["struct sk_buff *", "struct net_device *"]);
    let adapter = types.find_struct("e1000_adapter").unwrap();
    assert!(types.is_own(adapter) && types.size_of(adapter) > Some(1000));
    let clean = types.find_function("e1000_clean").unwrap();
    let params: Vec<_> = clean
        .params
        .iter()
        .map(|p| types.type_name(p.type_id))
        .collect();
    assert_eq!(params, ["struct napi_struct *", "int"]);
}

/// Symbols of a module file as if its `.text` had been loaded at `at`.
fn text_symbols(file: &object::File<'_>, at: u64) -> SymbolTable {
    let text = file.section_by_name(".text").unwrap().index();
    let mut table = SymbolTableBuilder::default();
    for symbol in file.symbols() {
        if symbol.kind() == SymbolKind::Text && symbol.section_index() == Some(text) {
            let (address, name) = (at + symbol.address(), symbol.name().unwrap());
            table
                .add(&Line {
                    address,
                    kind: 't',
                    name,
                    module: Some("m"),
                })
                .unwrap();
        }
    }
    table.finish()
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn real_text_is_decoded_whole_and_every_relocated_branch_is_found() {
    const AT: u64 = 0xffff_ffff_c000_0000;
    for name in ["dummy.ko", "e1000.ko", "null_blk.ko"] {
        let data = module(name);
        let file = object::File::parse(data.as_slice()).unwrap();
        let text = file.section_by_name(".text").unwrap();
        let bytes = text.data().unwrap();
        let symbols = text_symbols(&file, AT);
        let part = TextPart { at: Gva(AT), bytes };
        let scan = TextScan::of(&[part], &symbols).unwrap();
        let sites = scan.sites();
        use isolation::guest::module_text::SiteKind;
        assert!(
            sites.iter().all(|site| site.kind != SiteKind::Undecodable),
            "{name}"
        );
        // A branch that the loader relocates (to a function, a thunk or __fentry__) has its
        // relocation in its last four bytes; unrelocated it goes to its own end.
        let whole = GvaRange::new(Gva(AT), bytes.len() as u64).unwrap();
        let inner: Vec<Gva> = scan.targets_in(whole).collect();
        let mut branches = 0;
        for (offset, relocation) in text.relocations() {
            let object::RelocationTarget::Symbol(index) = relocation.target() else {
                continue;
            };
            let symbol = file.symbol_by_index(index).unwrap();
            let plain = matches!(
                relocation.flags(),
                object::RelocationFlags::Elf {
                    r_type: object::elf::R_X86_64_PLT32
                }
            );
            if !plain || !symbol.is_undefined() {
                continue;
            }
            branches += 1;
            let end = Gva(AT + offset + 4);
            let after_jump = inner.binary_search(&end).is_ok();
            let outside = sites
                .iter()
                .any(|site| site.at.0 + u64::from(site.len) == end.0);
            assert!(
                after_jump || outside,
                "{name}: branch before {end} to {:?}",
                symbol.name()
            );
        }
        assert!(branches > 10, "{name}");
    }
}

/// Where the images of the tested kernels are.
fn kernels() -> PathBuf {
    std::env::var_os("COFFERDAM_KERNELS").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/images")),
        PathBuf::from,
    )
}

/// What is known by name of 6.1 and 6.12 is all there, and what is taken away is named.
#[test]
#[ignore = "needs the guest images of both: cargo xtask test runs it"]
fn calls_can_be_contained_in_the_kernels_that_are_tested() {
    for folder in [kernels(), kernels().join("6.12-amd64")] {
        let image = std::fs::read(folder.join("vmlinux")).unwrap();
        let types = Btf::from_elf(&image, None).unwrap();
        let names = names_in_image(&image).unwrap();
        assert!(names.len() > 50_000, "{}", names.len());
        let has = |name: &str| names.iter().any(|other| other == name);
        assert_eq!(lacking(&types, &has), [""; 0], "{}", folder.display());
        let without = lacking(&types, &|name| name != "__schedule" && has(name));
        assert_eq!(without, ["__schedule"]);
    }
}

/// The addresses of symbols in the images are those of what they name: the banner is there, and the
/// types lie between the two that are around them.
#[test]
#[ignore = "needs the guest images of both: cargo xtask test runs it"]
fn symbols_are_where_an_image_has_what_they_name() {
    use object::{Object, ObjectSection, ObjectSegment};
    for folder in [kernels(), kernels().join("6.12-amd64")] {
        let image = std::fs::read(folder.join("vmlinux")).unwrap();
        let mut left = MOST_TRIED;
        let symbols = symbols_in_image(&image, &mut left).unwrap();
        println!("{} names gone over", MOST_TRIED - left);
        assert_eq!(
            names_in_image(&image).unwrap(),
            symbols.iter().map(|symbol| symbol.name).collect::<Vec<_>>()
        );
        let address = |name: &str| {
            let mut named = symbols.iter().filter(|symbol| symbol.name == name);
            let found = named.next().unwrap();
            assert!(named.next().is_none(), "{name}");
            found.address
        };
        let elf = object::File::parse(image.as_slice()).unwrap();
        let banner = elf.segments().find_map(|segment| {
            segment
                .data_range(address("linux_banner"), 14)
                .ok()
                .flatten()
        });
        assert_eq!(banner, Some(&b"Linux version "[..]));
        let types = elf.section_by_name(".BTF").unwrap();
        assert_eq!(
            (address("__start_BTF"), address("__stop_BTF")),
            (types.address(), types.address() + types.size())
        );
        let text = elf.section_by_name(".text").unwrap();
        assert_eq!(address("_text"), text.address());
        let schedule = symbols.iter().find(|symbol| symbol.name == "schedule");
        assert_eq!(schedule.map(|symbol| symbol.kind), Some('T'));
    }
}
