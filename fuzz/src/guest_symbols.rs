//! Whatever a guest, or a kernel's image, says its symbols are is read without harm
//! (`/proc/kallsyms`, and its tables in an image). The first byte says which.

use isolation::guest::addr::Gva;
use isolation::guest::symbols::image::{MOST_TRIED, names_in_image, symbols_in_image};
use isolation::guest::symbols::read_kallsyms;

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, data)) = input.split_first() else {
        return;
    };
    match which % 2 {
        0 => list(data),
        _ => in_image(data),
    }
}

fn list(data: &[u8]) {
    let Ok(table) = read_kallsyms(data, |_| true) else {
        return;
    };
    for symbol in table.iter() {
        // Address 0 is that of absolute symbols.
        let found = table.lookup(symbol.at).is_some() == (symbol.at != Gva(0));
        assert!(found, "a symbol is not found at its own address");
        assert!(
            table.named(symbol.name).next().is_some(),
            "a symbol is not found by its name"
        );
    }
}

fn in_image(data: &[u8]) {
    let names = names_in_image(data);
    let Ok(symbols) = symbols_in_image(data, &mut { MOST_TRIED }) else {
        return;
    };
    let same = names.is_ok_and(|names| names.iter().eq(symbols.iter().map(|symbol| symbol.name)));
    assert!(same, "names differ with and without addresses");
}
