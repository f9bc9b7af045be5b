//! The same as a page that needs nothing else. All text is escaped: names come from files.

use std::path::Path;

use anyhow::Context;
use isolation::analysis::Report;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::all::{Table, lines};
use super::text;

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #8888; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
td.n { text-align: right; }
.note { opacity: .75; }";

/// Writes what there is to say of some modules.
pub fn write_modules(reports: &[Report], path: &Path) -> anyhow::Result<()> {
    write(
        "Cofferdam: modules",
        html! { @for report in reports { (module(report)) } },
        path,
    )
}

/// Writes the table of all modules.
pub fn write_table(table: &Table, path: &Path) -> anyhow::Result<()> {
    let columns: Vec<_> = table
        .families
        .values()
        .chain([&table.total])
        .map(lines)
        .collect();
    let names = lines(&table.total);
    let body = html! {
        table {
            tr { th {} @for family in table.families.keys() { th { (family) } } th { "all" } }
            @for (index, (name, _)) in names.iter().enumerate() {
                tr {
                    td { (name) }
                    @for column in &columns { td.n { (column.get(index).map_or(0, |(_, count)| *count)) } }
                }
            }
        }
        h2 { "Findings" }
        table {
            @for module in &table.modules {
                @for finding in &module.findings {
                    tr { td { (module.name()) } (cells(finding)) }
                }
            }
        }
        @for (file, why) in &table.unread { p.note { "not read: " (file) ": " (why) } }
    };
    write("Cofferdam: all modules", body, path)
}

fn write(title: &str, body: Markup, path: &Path) -> anyhow::Result<()> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { h1 { (title) } (body) }
        }
    };
    std::fs::write(path, page.into_string())
        .with_context(|| format!("cannot write {}", path.display()))
}

fn cells(finding: &isolation::analysis::findings::Finding) -> Markup {
    html! {
        td { (finding.function) "+" (format!("{:#x}", finding.offset)) }
        td { (finding.kind.words()) }
        td { (finding.what) }
    }
}

fn module(report: &Report) -> Markup {
    html! {
        h2 { (report.name) }
        p { (report.functions) " functions, " (report.instructions) " instructions" }
        @for driver in &report.drivers {
            p {
                (driver.structure) " " (driver.object)
                ": suspend " (driver.suspend.as_deref().unwrap_or("none"))
                ", resume " (driver.resume.as_deref().unwrap_or("none"))
            }
        }
        table {
            tr { th { "entry" } th { "from" } th { "atomic" } th { "isolation" } }
            @for entry in report.entries.iter().filter(|entry| !entry.runs_once()) {
                tr {
                    td { (entry.function) }
                    td { (text::origins(entry)) }
                    td { (text::atomic(&entry.atomic)) }
                    td { (text::isolation(&entry.isolation)) }
                }
            }
        }
        table { @for finding in &report.findings { tr { (cells(finding)) } } }
        @if let Some(command) = &report.isolate { pre { (command) } }
    }
}
