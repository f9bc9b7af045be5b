//! Instructions in words, as the rest of the project prints them, with the names of what they lead
//! to.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, Mnemonic};

use super::listing::{Listing, is_near};

/// One instruction.
pub(super) fn of(listing: &Listing<'_>, i: &Instruction) -> String {
    let mut text = String::new();
    let mut formatter = GasFormatter::new();
    if i.is_invalid() {
        return "(bad)".to_owned();
    }
    if !is_near(i) {
        formatter.format(i, &mut text);
        return text;
    }
    formatter.format_mnemonic(i, &mut text);
    let target = i.near_branch_target();
    let function = listing.function;
    let to = if listing.inside(target) {
        let offset = target.wrapping_sub(function.start);
        format!("{}+{offset:#x}", function.name)
    } else {
        (function.callee)(target).unwrap_or_else(|| format!("{target:#x}"))
    };
    format!("{} {to}", text.trim_end())
}

/// What is put in place of an instruction at `ip`, without the NOPs that fill it up.
pub(super) fn of_bytes(listing: &Listing<'_>, bytes: &[u8], ip: u64) -> String {
    let decoder = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE);
    let all: Vec<Instruction> = decoder.into_iter().collect();
    let filling = all
        .iter()
        .rev()
        .take_while(|i| i.mnemonic() == Mnemonic::Nop)
        .count();
    let texts: Vec<String> = all
        .iter()
        .take(all.len().saturating_sub(filling))
        .map(|i| of(listing, i))
        .collect();
    if texts.is_empty() {
        return "nop".to_owned();
    }
    texts.join("; ")
}
