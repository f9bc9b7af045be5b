//! Names of a kernel's symbols out of its image, without running it: the tables of `kallsyms`
//! (`scripts/kallsyms.c`).
//!
//! ```text
//!   num_syms │ names │ markers │ ... │ token table │ token index
//!   names: for each symbol its length and so many tokens; a token stands for a piece of text, the first letter is the kind
//!   markers: where in the names every 256th symbol is
//! ```
//!
//! Nothing says where the tables are. The token table is found by its tokens for the digits, which
//! every kernel has, the others by what they have to be for each other.

use memchr::memmem;

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
/// Longest text of a token.
const LONGEST_TOKEN: usize = 512;

/// Names of all symbols in a kernel's image.
///
/// # Errors
/// What of the tables is not found: the image has none, or keeps them in another order.
pub fn names_in_image(image: &[u8]) -> Result<Vec<String>, &'static str> {
    let mut from = 0;
    while let Some(found) = memmem::find(image.get(from..).unwrap_or_default(), DIGITS) {
        if let Some(tokens) = Tokens::around(image, from + found) {
            let names = Names::before(image, tokens.start).ok_or("its names are not found")?;
            return names.read(&tokens).ok_or("its names are damaged");
        }
        from += found + 1;
    }
    Err("it has no table of tokens")
}

fn word(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// The text of each token, and where the table of them begins.
struct Tokens<'a> {
    start: usize,
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
        Some(Self { start, texts })
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
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Names<'a> {
    /// Those before the token table at `tokens`: a number of names, so many names, and markers that
    /// agree with them.
    fn before(image: &'a [u8], tokens: usize) -> Option<Self> {
        let highest = tokens.checked_sub(1)? & !3;
        let lowest = highest.saturating_sub(MOST_BYTES).max(8);
        (lowest..=highest).rev().step_by(4).find_map(|start| {
            let counts = [8, 4].map(|before| word(image, start - before));
            counts.into_iter().flatten().find_map(|count| {
                let bytes = image.get(start..tokens)?;
                let names = Self { bytes, count };
                (COUNTS.contains(&count) && names.fit()?).then_some(names)
            })
        })
    }

    /// Whether markers come behind the names that say where every 256th is.
    fn fit(&self) -> Option<bool> {
        let (mut at, mut marks) = (0, Vec::new());
        for number in 0..self.count {
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

    fn read(&self, tokens: &Tokens<'_>) -> Option<Vec<String>> {
        let mut names = Vec::with_capacity(self.count);
        let mut at = 0;
        for _ in 0..self.count {
            let (packed, next) = self.next(at)?;
            let bytes = packed
                .iter()
                .flat_map(|token| tokens.texts[usize::from(*token)].iter().copied());
            // The first letter is the kind.
            let name: Vec<u8> = bytes.skip(1).collect();
            names.push(String::from_utf8(name).ok()?);
            at = next;
        }
        Some(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with these names, one of whose tokens is longer than a letter.
    fn image(names: &[&str]) -> Vec<u8> {
        let mut image = b"what comes before".to_vec();
        let align = |image: &mut Vec<u8>| image.resize(image.len().next_multiple_of(8), 0);
        align(&mut image);
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
        image.extend(b"what comes after");
        image
    }

    #[test]
    fn names_are_found_and_unpacked() {
        let long = "l".repeat(300);
        let many: Vec<String> = (0..1000)
            .map(|number| format!("kmalloc_{number}"))
            .collect();
        let mut names: Vec<&str> = many.iter().map(String::as_str).collect();
        names.insert(700, &long);
        assert_eq!(names_in_image(&image(&names)).unwrap(), names);
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
