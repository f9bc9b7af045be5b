//! The memory that a block I/O reads into: pages that somebody wants filled, and that inline functions map and fill.

use super::walk::{Item, Walk};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::FindAllocation;
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;

/// Most I/Os of one request that are looked at.
const MAX_CHAIN: usize = 256;
/// Most pieces of memory of one I/O (`BIO_MAX_VECS`, include/linux/bio.h).
const MAX_PIECES: u64 = 256;
/// The bits of `bio.bi_opf` that say what is done, and reading (include/linux/blk_types.h).
const REQ_OP_MASK: u64 = 0xff;
const REQ_OP_READ: u64 = 0;

impl<M: GuestPhys, A: FindAllocation> Walk<'_, '_, M, A> {
    /// What is read into by the `bio` or the `request` at hand.
    pub(super) fn block_io(&mut self, item: &Item, id: TypeId, name: &str) {
        let types = self.reach.types;
        let Some(bio) = types.find_struct("bio") else {
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
        let types = self.reach.types;
        let operation = self.member_value(at, bio, "bi_opf");
        if operation.is_none_or(|operation| operation & REQ_OP_MASK != REQ_OP_READ) {
            return;
        }
        let member = |name| self.member_value(at, bio, name);
        let (Some(first), Some(count)) = (member("bi_io_vec"), member("bi_vcnt")) else {
            return;
        };
        let Some(piece) = types.find_struct("bio_vec") else {
            return;
        };
        let bytes = types.size_of(piece).unwrap_or(0);
        for index in 0..count.min(MAX_PIECES) {
            let Some(at) = Gva(first).checked_add(index * bytes) else {
                return;
            };
            let member = |name| self.member_value(at, piece, name);
            let range = || {
                let page = self
                    .reach
                    .allocations
                    .page_address(Gva(member("bv_page")?))?;
                GvaRange::new(page.checked_add(member("bv_offset")?)?, member("bv_len")?)
            };
            if let Some(range) = range() {
                let path = format!("{}->bi_io_vec[{index}]", item.path);
                self.add(range, item.kind, piece, &path);
            }
        }
    }
}
