//! Names of a kernel's symbols out of its image, without running it: the tables of `kallsyms`
//! (`scripts/kallsyms.c`).
//!
//! ```text
//!   num_syms │ names │ markers │ ... │ token table │ token index
//!   names: for each symbol its length and so many tokens; a token stands for a piece of text, the first letter is the kind
//!   markers: where in the names every 256th symbol is
//! ```
//!
//! Addresses are before the number of symbols or behind the token index, by the kernel's version.
//!
//! Nothing says where the tables are. The token table is found by its tokens for the digits, which
//! every kernel has, the others by what they have to be for each other.

use memchr::memmem;

use super::Line;

/// Tokens that there are.
const TOKENS: usize = 256;
/// The token of `0`; those of the other digits follow.
const FIRST_DIGIT: usize = b'0' as usize;
/// What the token table has for the digits.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// Symbols from one marker to the next.
const PER_MARKER: usize = 256;
/// How many symbols a kernel may have.
const COUNTS: std::ops::RangeInclusive<usize> = 256..=1 << 21;
/// Most bytes from the first name to the token table.
const MOST_BYTES: usize = 16 << 20;
/// Most bytes of all kinds and names together.
const MOST_TEXT: usize = 16 << 20;
/// Most bytes of a kind and a name (`KSYM_NAME_LEN` is 512).
const LONGEST_NAME: usize = 1024;
/// How many names may be gone over in all while the number of names is looked for.
pub const MOST_TRIED: usize = 64 << 20;
/// Longest text of a token.
const LONGEST_TOKEN: usize = 512;

/// A kernel's symbols as its tables have them.
#[derive(Debug, Default)]
pub struct TableSymbols {
    /// Kinds and names, one behind the other.
    text: String,
    rows: Vec<Row>,
}

/// A symbol of [`TableSymbols`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) address: u64,
    /// Where its name begins in the text of all, and how long it is, in bytes.
    pub(super) name_at: u32,
    pub(super) name_len: u16,
    pub(super) kind: char,
}

impl TableSymbols {
    /// All of them in the tables' order. Addresses are as linked, where the kernel has not been
    /// moved yet.
    pub fn iter(&self) -> impl Iterator<Item = Line<'_>> {
        self.rows.iter().filter_map(|row| {
            let name = row.name_at as usize..row.name_at as usize + usize::from(row.name_len);
            Some(Line {
                address: row.address,
                kind: row.kind,
                name: self.text.get(name)?,
                module: None,
            })
        })
    }

    /// The text of all names, and the symbols.
    pub(super) fn into_parts(self) -> (String, Vec<Row>) {
        (self.text, self.rows)
    }
}

/// Names of all symbols in a kernel's image.
///
/// # Errors
/// What of the tables is not found: the image has none, or keeps them in another order.
pub fn names_in_image(image: &[u8]) -> Result<Vec<String>, &'static str> {
    let tables = Tables::find(image, &mut { MOST_TRIED })?;
    let none = vec![0; tables.names.count];
    let symbols = tables.names.read(&tables.tokens, none).ok_or(DAMAGED)?;
    Ok(symbols
        .iter()
        .map(|symbol| symbol.name.to_owned())
        .collect())
}

/// All symbols that the tables in `image` have, in their order. `image` begins at a multiple of
/// eight bytes. No more than `left` names are gone over, from which those are taken that were:
/// [`MOST_TRIED`] at first.
///
/// # Errors
/// What of the tables is not found.
pub fn symbols_in_image(image: &[u8], left: &mut usize) -> Result<TableSymbols, &'static str> {
    let tables = Tables::find(image, left)?;
    let addresses = tables
        .addresses(image)
        .ok_or("its addresses are not found")?;
    tables.names.read(&tables.tokens, addresses).ok_or(DAMAGED)
}

/// Where the tokens' digits are in `bytes`, if they are there: what a search begins with.
pub fn find_digits(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, DIGITS)
}

/// How long what [`find_digits`] looks for is, in bytes.
pub const DIGITS_BYTES: usize = DIGITS.len();

const DAMAGED: &str = "its names are damaged";

/// The tables of one kernel.
struct Tables<'a> {
    tokens: Tokens<'a>,
    names: Names<'a>,
}

impl<'a> Tables<'a> {
    fn find(image: &'a [u8], left: &mut usize) -> Result<Self, &'static str> {
        let mut from = 0;
        while let Some(found) = memmem::find(image.get(from..).unwrap_or_default(), DIGITS) {
            if let Some(tokens) = Tokens::around(image, from + found) {
                let names =
                    Names::before(image, tokens.start, left).ok_or("its names are not found")?;
                return Ok(Self { tokens, names });
            }
            from += found + 1;
        }
        Err("it has no table of tokens")
    }

    /// The address of each symbol. Up to Linux 6.3 these come before the names, later behind the
    /// tokens: 32 bits each, relative to an address behind them, which `scripts/kallsyms.c` calls
    /// `kallsyms_relative_base`.
    fn addresses(&self, image: &[u8]) -> Option<Vec<u64>> {
        let len = self.names.count.checked_mul(4)?.next_multiple_of(8);
        let before = || self.names.start.checked_sub(16 + len);
        let behind = self.tokens.end.checked_next_multiple_of(8);
        let places = [before(), behind];
        places
            .into_iter()
            .flatten()
            .find_map(|at| self.addresses_at(image, at, len))
    }

    fn addresses_at(&self, image: &[u8], at: usize, len: usize) -> Option<Vec<u64>> {
        let base_at = at.checked_add(len)?;
        let base = image.get(base_at..base_at.checked_add(8)?)?;
        let base = u64::from_le_bytes(base.try_into().ok()?);
        let offsets = image.get(at..base_at)?.as_chunks::<4>().0;
        let offsets = offsets.get(..self.names.count)?;
        let offsets = offsets.iter().map(|bytes| i32::from_le_bytes(*bytes));
        // With `CONFIG_KALLSYMS_ABSOLUTE_PERCPU` those of the kernel are below zero, and the few
        // others are the addresses themselves.
        let below = offsets.clone().filter(|offset| *offset < 0).count();
        let is_signed = below > self.names.count / 2;
        let addresses: Vec<u64> = offsets
            .map(|offset| match (is_signed, offset) {
                (true, 0..) => u64::from(offset.unsigned_abs()),
                (true, _) => base
                    .wrapping_sub(1)
                    .wrapping_add(u64::from(offset.unsigned_abs())),
                (false, _) => base.wrapping_add(u64::from(offset.cast_unsigned())),
            })
            .collect();
        // They are in the order of addresses, and the kernel is in the last 2 GiB.
        let fits = base >= KERNEL && addresses.is_sorted();
        fits.then_some(addresses)
    }
}

/// Where a kernel can be (`__START_KERNEL_map`, arch/x86/include/asm/page_64_types.h).
const KERNEL: u64 = 0xffff_ffff_8000_0000;

fn word(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// The text of each token, and where the table of them begins.
struct Tokens<'a> {
    start: usize,
    /// Behind their index.
    end: usize,
    texts: Vec<&'a [u8]>,
}

impl<'a> Tokens<'a> {
    /// The table whose token of the first digit is at `digit`, if its index says the same.
    fn around(image: &'a [u8], digit: usize) -> Option<Self> {
        let end =
            (FIRST_DIGIT..TOKENS).try_fold(digit, |at, _| Some(at + text(image, at)?.len() + 1))?;
        [4, 8]
            .into_iter()
            .find_map(|alignment| Self::with_index(image, digit, end.next_multiple_of(alignment)))
    }

    /// The same, if its index is at `index`.
    fn with_index(image: &'a [u8], digit: usize, index: usize) -> Option<Self> {
        let offset = |token: usize| {
            let at = index + 2 * token;
            let bytes = image.get(at..at + 2)?.try_into().ok()?;
            Some(usize::from(u16::from_le_bytes(bytes)))
        };
        let start = digit.checked_sub(offset(FIRST_DIGIT)?)?;
        let mut at = start;
        let mut texts = Vec::with_capacity(TOKENS);
        for token in 0..TOKENS {
            if offset(token)? != at - start {
                return None;
            }
            let text = text(image, at)?;
            at += text.len() + 1;
            texts.push(text);
        }
        let end = index.checked_add(2 * TOKENS)?;
        Some(Self { start, end, texts })
    }
}

/// The text at `at`, up to its end byte.
fn text(image: &[u8], at: usize) -> Option<&[u8]> {
    let rest = image.get(at..)?;
    let len = rest
        .iter()
        .take(LONGEST_TOKEN)
        .position(|byte| *byte == 0)?;
    rest.get(..len)
}

/// Where the names are.
struct Names<'a> {
    start: usize,
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Names<'a> {
    /// Those before the token table at `tokens`: a number of names, so many names, and markers that
    /// agree with them.
    fn before(image: &'a [u8], tokens: usize, left: &mut usize) -> Option<Self> {
        let words = image.get(..tokens)?.as_chunks::<4>().0;
        let lowest = words.len().saturating_sub(MOST_BYTES / 4);
        // Nearly no word could be a number of symbols: a plain loop, which a build for tests makes
        // fast as well.
        let mut at = words.len();
        while at > lowest {
            at -= 1;
            let count = u32::from_le_bytes(words[at]) as usize;
            if !COUNTS.contains(&count) {
                continue;
            }
            // What follows it begins at a multiple of eight bytes in most kernels.
            for start in [4 * at + 8, 4 * at + 4] {
                let Some(bytes) = image.get(start..tokens) else {
                    continue;
                };
                let names = Self {
                    start,
                    bytes,
                    count,
                };
                // A name has a length and two tokens at least.
                if count > bytes.len() / 3 {
                    continue;
                }
                if names.fit(left) == Some(true) {
                    return Some(names);
                }
                if *left == 0 {
                    return None;
                }
            }
        }
        None
    }

    /// Whether markers come behind the names that say where every 256th is. No more than `left`
    /// names are gone over, of which those are taken that were.
    fn fit(&self, left: &mut usize) -> Option<bool> {
        let (mut at, mut marks) = (0, Vec::new());
        for number in 0..self.count {
            *left = left.checked_sub(1)?;
            if number % PER_MARKER == 0 {
                marks.push(at);
            }
            at = self.next(at)?.1;
        }
        // The tables begin at multiples of four or of eight bytes.
        Some([4, 8].into_iter().any(|alignment| {
            let first = at.next_multiple_of(alignment);
            let marked = |number: usize| word(self.bytes, first + 4 * number);
            (0..marks.len()).all(|number| marked(number) == Some(marks[number]))
        }))
    }

    /// The tokens of the name at `at`, and where the next one is. Long names have a length of two
    /// bytes.
    fn next(&self, at: usize) -> Option<(&'a [u8], usize)> {
        let low = usize::from(*self.bytes.get(at)?);
        let (len, begin) = match low & 0x80 {
            0 => (low, at + 1),
            _ => {
                let high = usize::from(*self.bytes.get(at + 1)?);
                (low & 0x7f | high << 7, at + 2)
            }
        };
        let tokens = self.bytes.get(begin..begin + len)?;
        (len > 1).then_some((tokens, begin + len))
    }

    /// Kinds and names, with these addresses.
    fn read(&self, tokens: &Tokens<'_>, addresses: Vec<u64>) -> Option<TableSymbols> {
        let mut text = Vec::with_capacity(MOST_TEXT.min(32 * self.count));
        let mut rows = Vec::with_capacity(self.count);
        let mut at = 0;
        for address in addresses {
            let (packed, next) = self.next(at)?;
            let begin = text.len();
            for token in packed {
                text.extend_from_slice(tokens.texts.get(usize::from(*token))?);
                if text.len() - begin > LONGEST_NAME || text.len() > MOST_TEXT {
                    return None;
                }
            }
            let kind = char::from(*text.get(begin)?);
            rows.push(Row {
                address,
                name_at: begin as u32 + 1,
                name_len: (text.len() - begin) as u16 - 1,
                kind,
            });
            at = next;
        }
        // So that a name is text wherever it begins.
        let text = text.is_ascii().then_some(text)?;
        let text = String::from_utf8(text).ok()?;
        Some(TableSymbols { text, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::symbols::SymbolTable;

    /// An image with these names, one of whose tokens is longer than a letter.
    fn image(names: &[&str]) -> Vec<u8> {
        image_with(names, &[], &[])
    }

    /// The same, with bytes before the number of names and behind the tokens.
    fn image_with(names: &[&str], before: &[u8], behind: &[u8]) -> Vec<u8> {
        let mut image = b"what comes before".to_vec();
        let align = |image: &mut Vec<u8>| image.resize(image.len().next_multiple_of(8), 0);
        align(&mut image);
        image.extend(before);
        image.extend((names.len() as u32).to_le_bytes());
        align(&mut image);
        let (start, mut markers) = (image.len(), Vec::new());
        for (number, name) in names.iter().enumerate() {
            if number % 256 == 0 {
                markers.extend(((image.len() - start) as u32).to_le_bytes());
            }
            let packed = format!("T{name}").replace("alloc", "\x01").into_bytes();
            match packed.len() {
                short @ ..0x80 => image.push(short as u8),
                long => image.extend([long as u8 | 0x80, (long >> 7) as u8]),
            }
            image.extend(packed);
        }
        align(&mut image);
        image.extend(markers);
        align(&mut image);
        let (mut table, mut index) = (Vec::new(), Vec::new());
        for token in 0..=255u8 {
            index.extend((table.len() as u16).to_le_bytes());
            match token {
                1 => table.extend(b"alloc"),
                _ if token.is_ascii_graphic() => table.push(token),
                _ => {}
            }
            table.push(0);
        }
        image.extend(table);
        align(&mut image);
        image.extend(index);
        align(&mut image);
        image.extend(behind);
        image.extend(b"what comes after");
        image
    }

    /// Offsets and the address that they are relative to, as the tables have them.
    fn addresses(offsets: impl Iterator<Item = u32>, base: u64) -> Vec<u8> {
        let mut bytes: Vec<u8> = offsets.flat_map(u32::to_le_bytes).collect();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend(base.to_le_bytes());
        bytes
    }

    #[test]
    fn addresses_are_found_on_either_side_and_of_either_kind() {
        let names: Vec<String> = (0..601).map(|number| format!("f{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let base = KERNEL + 0x100_0000;
        let wanted: Vec<u64> = (0..601).map(|number| base + 16 * number).collect();
        let plain = addresses((0..601).map(|number| 16 * number), base);
        // Below zero from the address before the base on; the first is an address by itself.
        let signed = |number: u32| match number {
            0 => 0x40,
            _ => (16 * number + 1).wrapping_neg(),
        };
        let percpu = addresses((0..601).map(signed), base);
        let mut with_percpu = wanted.clone();
        with_percpu[0] = 0x40;
        for (bytes, wanted) in [(&plain, &wanted), (&percpu, &with_percpu)] {
            for image in [
                image_with(&names, bytes, &[]),
                image_with(&names, &[], bytes),
            ] {
                let symbols = symbols_in_image(&image, &mut { MOST_TRIED }).unwrap();
                let found: Vec<_> = symbols.iter().map(|symbol| symbol.address).collect();
                assert_eq!(found, *wanted);
                assert!(symbols.iter().zip(&names).all(|(symbol, name)| {
                    (symbol.kind, symbol.name, symbol.module) == ('T', *name, None)
                }));
                let table = SymbolTable::from(symbols);
                let some = ["f600", "f601", "f1"].map(|name| table.kernel_symbol(name));
                let some = some.map(|symbol| symbol.map(|symbol| symbol.at.0));
                assert_eq!(some, [Some(base + 9600), None, Some(base + 16)]);
            }
        }
        for no_kernel in [
            addresses((0..601).map(|number| 16 * number), KERNEL - 1),
            addresses((0..601).map(|number| 16 * (number ^ 1)), base),
        ] {
            let image = image_with(&names, &no_kernel, &[]);
            assert!(symbols_in_image(&image, &mut { MOST_TRIED }).is_err());
        }
    }

    #[test]
    fn names_are_found_and_unpacked() {
        let long = "l".repeat(LONGEST_NAME - 1);
        let many: Vec<String> = (0..1000)
            .map(|number| format!("kmalloc_{number}"))
            .collect();
        let mut names: Vec<&str> = many.iter().map(String::as_str).collect();
        names.insert(700, &long);
        assert_eq!(names_in_image(&image(&names)).unwrap(), names);
        let absurd = "l".repeat(LONGEST_NAME);
        names[700] = &absurd;
        assert_eq!(names_in_image(&image(&names)), Err(DAMAGED));
    }

    #[test]
    fn an_image_without_its_tables_or_cut_or_changed_has_no_names() {
        let names: Vec<String> = (0..600).map(|number| format!("f{number}")).collect();
        let whole = image(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let index = whole.len() - 600;
        for len in (0..whole.len() - 500).step_by(97).chain([index]) {
            assert!(names_in_image(&whole[..len]).is_err(), "{len}");
        }
        assert_eq!(names_in_image(b"nothing"), Err("it has no table of tokens"));
        // Any byte changed: an error or names, no panic.
        for at in (0..whole.len()).step_by(31) {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            let _either = names_in_image(&changed);
        }
    }
}
