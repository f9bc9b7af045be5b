//! Symbols and sections: `/proc/kallsyms` and `/sys/module`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;

use agent_protocol::message::{Body, Done, Module, Symbol, SymbolFilter};

use crate::fail::{Context, Result, error};

/// Symbols in one message.
const BATCH: usize = 2000;

/// Sends the symbols that pass the filter, in parts.
pub fn symbols(filter: &SymbolFilter, part: &mut dyn FnMut(Body) -> Result<()>) -> Result<Done> {
    let path = "/proc/kallsyms";
    let mut lines = BufReader::with_capacity(
        1 << 16,
        File::open(path).context(|| format!("open {path}"))?,
    );
    let names: Option<BTreeSet<&str>> = filter
        .names
        .as_ref()
        .map(|n| n.iter().map(String::as_str).collect());
    let mut batch = Vec::new();
    let mut count = 0;
    let mut line = String::new();
    loop {
        line.clear();
        if lines
            .read_line(&mut line)
            .context(|| format!("read {path}"))?
            == 0
        {
            break;
        }
        let Some((address, kind, name, module)) = parse(&line) else {
            continue;
        };
        let wanted = filter
            .prefix
            .as_ref()
            .is_none_or(|p| name.starts_with(p.as_str()))
            && filter
                .module
                .as_ref()
                .is_none_or(|m| module.unwrap_or("") == m)
            && names.as_ref().is_none_or(|n| n.contains(name))
            && (module.is_some() || !filter.of_modules);
        if !wanted {
            continue;
        }
        count += 1;
        batch.push(Symbol {
            address,
            kind,
            name: name.into(),
            module: module.map(str::to_string),
        });
        if batch.len() == BATCH {
            part(Body::Symbols(std::mem::take(&mut batch)))?;
        }
    }
    if !batch.is_empty() {
        part(Body::Symbols(batch))?;
    }
    Ok(Done::Symbols(count))
}

/// `ffffffffc0000000 t e1000_open\t[e1000]`
fn parse(line: &str) -> Option<(u64, char, &str, Option<&str>)> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let kind = words.next()?.chars().next()?;
    let name = words.next()?;
    let module = words
        .next()
        .map(|m| m.trim_start_matches('[').trim_end_matches(']'));
    Some((address, kind, name, module))
}

/// Loaded modules, or the one with this name.
pub fn modules(name: Option<&str>) -> Result<Vec<Module>> {
    let class = Path::new("/sys/module");
    let mut modules = Vec::new();
    for entry in fs::read_dir(class).context(|| "list /sys/module".into())? {
        let entry = entry.context(|| "list /sys/module".into())?;
        let found = entry.file_name().to_string_lossy().into_owned();
        if name.is_none_or(|n| n == found)
            && let Some(module) = module(&entry.path(), found)
        {
            modules.push(module);
        }
    }
    if let Some(name) = name
        && modules.is_empty()
    {
        return Err(error(format!("module {name} is not loaded")));
    }
    modules.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(modules)
}

/// What `/sys/module/NAME` says, or none for code that is built into the kernel (which has no
/// state).
fn module(directory: &Path, name: String) -> Option<Module> {
    let text = |file: &str| {
        Some(
            fs::read_to_string(directory.join(file))
                .ok()?
                .trim_end()
                .to_string(),
        )
    };
    let state = text("initstate")?;
    let mut sections = Vec::new();
    for entry in entries(&directory.join("sections")) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let address = fs::read_to_string(entry.path()).unwrap_or_default();
        if let Ok(address) = u64::from_str_radix(address.trim().trim_start_matches("0x"), 16) {
            sections.push((name, address));
        }
    }
    sections.sort_by_key(|(_, address)| *address);
    let mut holders: Vec<String> = entries(&directory.join("holders"))
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    holders.sort();
    Some(Module {
        name,
        size: text("coresize").and_then(|t| t.parse().ok()).unwrap_or(0),
        refcnt: text("refcnt").and_then(|t| t.parse().ok()),
        state,
        holders,
        sections,
    })
}

/// A directory's entries; none when it is not there (the module may go while we look).
fn entries(directory: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(directory).into_iter().flatten().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kallsyms_lines_are_read() {
        assert_eq!(
            parse("ffffffffc0001230 t e1000_open\t[e1000]\n"),
            Some((0xffff_ffff_c000_1230, 't', "e1000_open", Some("e1000")))
        );
        assert_eq!(
            parse("0000000000000000 A fixed_percpu_data\n"),
            Some((0, 'A', "fixed_percpu_data", None))
        );
        assert_eq!(parse("zz t x"), None);
        assert_eq!(parse("10 t"), None);
    }

    #[test]
    fn module_directory_is_read_and_built_in_code_skipped() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("initstate", "live\n");
        put("coresize", "155648\n");
        put("refcnt", "0\n");
        put("sections/.text", "0xffffffffc0001000\n");
        put("sections/.data", "0xffffffffc0009000\n");
        put("holders/other/x", "");
        let found = module(root.path(), "e1000".into()).unwrap();
        assert_eq!(
            (found.size, found.refcnt, found.state.as_str()),
            (155_648, Some(0), "live")
        );
        assert_eq!(found.sections[0], (".text".into(), 0xffff_ffff_c000_1000));
        assert_eq!(found.holders, ["other"]);
        fs::remove_file(root.path().join("initstate")).unwrap();
        assert_eq!(module(root.path(), "e1000".into()), None);
    }
}
