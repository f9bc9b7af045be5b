//! The memory that a block I/O or an argument reads into: pages that somebody wants filled, and
//! that inline functions map and fill.

use super::walk::{Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, FindAllocation};
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most I/Os of one request that are looked at.
const MAX_CHAIN: usize = 256;
/// Most pieces of memory of one I/O (`BIO_MAX_VECS`, include/linux/bio.h).
const MAX_PIECES: u64 = 256;
/// The bit of `bio.bi_opf` of operations that take data from memory (`op_is_write`,
/// include/linux/blk_types.h).
const WRITES: u64 = 1;

/// Which part of a `bio`'s pieces of memory is its own.
struct Part {
    /// The first piece.
    first: u64,
    /// Bytes of that one which belong to somebody else.
    skipped: u64,
    /// Bytes in all; `None` for all of as many pieces as `pieces` says.
    bytes: Option<u64>,
    pieces: u64,
}

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// What the page that an argument stands for holds (`rw_page` in include/linux/blkdev.h,
    /// `read_folio` in include/linux/fs.h).
    pub(super) fn page(&mut self, item: &Item, id: TypeId, name: &str) {
        if name != "page" && name != "folio" || item.kind != ObjectKind::Argument {
            return;
        }
        let first = self.reach.allocations.page_address(item.at);
        let whole = first.and_then(|first| self.allocation(first));
        let whole = whole.filter(|all| all.kind == AllocationKind::Pages);
        if let Some(range) = whole.map(|all| all.range) {
            self.add(range, ObjectKind::Passing, id, &item.path);
        }
    }

    /// What is read into by the `bio` or the `request` at hand.
    pub(super) fn block_io(&mut self, item: &Item, id: TypeId, name: &str) {
        let Some(bio) = self.reach.struct_named("bio") else {
            return;
        };
        let mut next = match name {
            "bio" => Some(item.at.0),
            "request" => self.member_value(item.at, id, "bio"),
            _ => return,
        };
        for _ in 0..MAX_CHAIN {
            let Some(at) = next.filter(|at| *at != 0).map(Gva) else {
                return;
            };
            self.pieces(item, bio, at);
            // The next one of a `bio` is not the submitted one's.
            next = self
                .member_value(at, bio, "bi_next")
                .filter(|_| name == "request");
        }
    }

    /// The pieces of memory of the `bio` at `at`, if it reads.
    fn pieces(&mut self, item: &Item, bio: TypeId, at: Gva) {
        let operation = self.member_value(at, bio, "bi_opf");
        if operation.is_none_or(|operation| operation & WRITES != 0) {
            return;
        }
        let (Some(array), Some(part), Some(piece)) = (
            self.member_value(at, bio, "bi_io_vec"),
            self.part(bio, at),
            self.reach.struct_named("bio_vec"),
        ) else {
            return;
        };
        let size = self.reach.types.size_of(piece).unwrap_or(0);
        let (mut skipped, mut left) = (part.skipped, part.bytes.unwrap_or(u64::MAX));
        // Pieces that follow each other are one.
        let mut run: Option<GvaRange> = None;
        for index in (part.first..).take(part.pieces.min(MAX_PIECES) as usize) {
            let at = index
                .checked_mul(size)
                .and_then(|offset| Gva(array).checked_add(offset));
            let Some((first, bytes)) = at.and_then(|at| self.piece(piece, at)) else {
                break;
            };
            let bytes = bytes.saturating_sub(skipped).min(left);
            let range = first.checked_add(skipped);
            if let Some(range) = range.and_then(|first| GvaRange::new(first, bytes)) {
                let longer = run.and_then(|run| followed_by(run, range));
                if let (None, Some(run)) = (longer, run) {
                    self.read_into(item, piece, run);
                }
                run = longer.or(Some(range));
            }
            (skipped, left) = (0, left - bytes);
            if left == 0 {
                break;
            }
        }
        if let Some(run) = run {
            self.read_into(item, piece, run);
        }
    }

    fn read_into(&mut self, item: &Item, piece: TypeId, range: GvaRange) {
        let path = format!("{}->bi_io_vec", item.path);
        self.add_data(range, piece, &path);
    }

    /// First byte and length of the piece of memory that the `bio_vec` at `at` describes.
    fn piece(&self, piece: TypeId, at: Gva) -> Option<(Gva, u64)> {
        let member = |name| self.member_value(at, piece, name);
        let page = self
            .reach
            .allocations
            .page_address(Gva(member("bv_page")?))?;
        Some((page.checked_add(member("bv_offset")?)?, member("bv_len")?))
    }

    /// What is the own of the `bio` at `at`: all of its pieces, or, where it has none and is a part
    /// of another one, what is left of it (`bio_split`, block/bio.c).
    fn part(&self, bio: TypeId, at: Gva) -> Option<Part> {
        let pieces = self.member_value(at, bio, "bi_vcnt")?;
        if pieces > 0 {
            return Some(Part {
                first: 0,
                skipped: 0,
                bytes: None,
                pieces,
            });
        }
        let place = self.reach.member_named(bio, "bi_iter")?;
        let at = at.checked_add(u64::from(place.bit_offset / 8))?;
        let member = |name| self.member_value(at, place.type_id, name);
        Some(Part {
            first: member("bi_idx")?,
            skipped: member("bi_bvec_done")?,
            bytes: Some(member("bi_size")?),
            pieces: MAX_PIECES,
        })
    }
}

/// Both of them, if the second follows the first.
fn followed_by(first: GvaRange, second: GvaRange) -> Option<GvaRange> {
    let next = first.last().checked_add(1)?;
    GvaRange::inclusive(first.first(), second.last()).filter(|_| next == second.first())
}
