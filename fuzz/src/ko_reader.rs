//! Whatever a module's file says, it is read or refused, and so is everything that is made of it:
//! code, operations, findings. An input is changes to a module made by hand, so that most of them
//! are read as one; the first byte says whether it is that, or a whole file. The module and its
//! kernel's types are those of the analysis' own tests, which keep them up to date.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use isolation::analysis::analyze;
use isolation::analysis::kernel::Kernel;
use isolation::guest::btf::Btf;

const MODULE: &[u8] = include_bytes!("../seeds/ko_reader/module.ko");
const TYPES: &[u8] = include_bytes!("../seeds/ko_reader/kernel.btf");

static KERNEL: LazyLock<Option<Kernel>> = LazyLock::new(|| {
    let types = Btf::parse(TYPES, None).ok()?;
    Some(Kernel::from_parts(
        Arc::new(types),
        HashMap::new(),
        HashMap::new(),
    ))
});

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, data)) = input.split_first() else {
        return;
    };
    let kernel = KERNEL.as_ref().expect("the types are those of the tests");
    if which % 4 == 0 {
        let _either = analyze(data, kernel);
        return;
    }
    let mut changed = MODULE.to_vec();
    // A change is a place and the byte that stands there then.
    for change in data.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % changed.len();
        changed[at] = change[2];
    }
    let _either = analyze(&changed, kernel);
}
