//! A sweep in VMs of this process's own: one module after the other, each from the same warm state,
//! with all of its functions isolated.

mod vm;

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use recovery::sweep::Case;
use recovery::sweep::record::{self, FORMAT, Header, MAX_FILE, Record, Sweep};

use crate::bench::guest::GuestOptions;
use crate::json_lines::{self, Contents, Elsewhere, append, text};
use vm::Vm;

/// What to sweep.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    /// The guest.
    pub guest: GuestOptions,
    /// The modules, and what each does.
    pub cases: Vec<Case>,
    /// In how many functions of each a fault is tried at most.
    pub faults: u32,
    /// Where it is written, and gone on with if it is there.
    pub file: PathBuf,
}

/// Guests that were lost in a row, each by another module, after which a sweep is given up.
const MAX_LOST: u32 = 8;

/// Sweeps the modules that the file does not have yet. `each` is told of each.
///
/// # Errors
/// A guest cannot be made ready; the file is another sweep's, or cannot be written: what was made
/// is in it.
pub fn run(
    options: &SweepOptions,
    progress: &mut dyn FnMut(&str),
    each: &mut dyn FnMut(&Record),
) -> anyhow::Result<Sweep> {
    let mut vm = Vm::start(&options.guest, progress)?;
    let header = Header {
        sweep: FORMAT,
        kernel: vm.kernel().to_owned(),
        faults: options.faults,
    };
    let (mut file, mut records) = open(&options.file, &header)?;
    let is_done = |case: &&Case| !records.iter().any(|record| record.name() == case.name());
    let left: Vec<_> = options.cases.iter().filter(is_done).collect();
    let mut lost = 0;
    for (number, case) in (1..).zip(&left) {
        if !vm.lives() {
            ensure!(
                lost < MAX_LOST,
                "{lost} guests were lost in a row: the last lines of the file say how"
            );
            progress("that guest is lost: another one");
            vm = Vm::start(&options.guest, progress)?;
        }
        progress(&format!("{} ({number} of {})", case.name(), left.len()));
        let record = vm.sweep(case, options.faults);
        lost = if vm.lives() { 0 } else { lost + 1 };
        append(&mut file, &record).with_context(|| options.file.display().to_string())?;
        each(&record);
        records.push(record);
    }
    let written = file.metadata().context("the sweep's file")?.len();
    Ok(Sweep {
        header,
        records,
        whole_bytes: usize::try_from(written)?,
    })
}

/// Reads a sweep's file.
///
/// # Errors
/// It is none, or too large.
pub fn read(path: &Path) -> anyhow::Result<Sweep> {
    let text = text(path, Elsewhere::Followed, MAX_FILE)?;
    record::read(&text).with_context(|| path.display().to_string())
}

/// The file to go on in, and what is in it.
fn open(path: &Path, header: &Header) -> anyhow::Result<(File, Vec<Record>)> {
    let read = |text: &str| {
        let sweep = record::read(text)?;
        Ok(Contents {
            header: sweep.header,
            records: sweep.records,
            whole_bytes: sweep.whole_bytes,
        })
    };
    let differs = "another sweep (kernel or number of faults differ)";
    json_lines::open((path, Elsewhere::Followed), header, MAX_FILE, read, differs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_gone_on_with_behind_its_last_whole_line_and_another_sweeps_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep.jsonl");
        let header = Header {
            sweep: FORMAT,
            kernel: "6.1".to_owned(),
            faults: 3,
        };
        let record = Record {
            class: "qdisc".to_owned(),
            module: "sch_htb".to_owned(),
            ..Record::default()
        };
        let (mut file, records) = open(&path, &header).unwrap();
        assert!(records.is_empty());
        append(&mut file, &record).unwrap();
        file.write_all(b"{\"class\":\"qd").unwrap();
        drop(file);
        let (mut file, records) = open(&path, &header).unwrap();
        assert_eq!(records, std::slice::from_ref(&record));
        let next = Record {
            module: "sch_drr".to_owned(),
            ..record.clone()
        };
        append(&mut file, &next).unwrap();
        drop(file);
        assert_eq!(read(&path).unwrap().records, [record, next]);
        let other = Header {
            kernel: "6.12".to_owned(),
            ..header
        };
        let refused = open(&path, &other).unwrap_err().to_string();
        assert!(refused.contains("another sweep"), "{refused}");
    }
}
