//! Which bytes of guest memory an isolated call may write, and whose they are.
//!
//! Objects may overlap: a structure inside an allocation, two names for one buffer. A byte may be
//! written if some open object of kind [`Permit::Write`] covers it and none of [`Permit::Guard`]
//! does. The table cuts the address space into segments, each with the few objects that cover it,
//! so that a lookup costs the logarithm of the number of objects.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::guest::addr::{Gva, GvaRange};

/// Most objects open at once.
pub const MAX_OBJECTS: usize = 1 << 16;

/// Most objects that may cover one byte.
pub const MAX_DEPTH: usize = 16;

/// What an object is to the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectKind {
    /// The call's own stack frame, below the entry stack pointer.
    Stack,
    /// The stack frames of its callers.
    CallerFrames,
    /// `.data`, `.bss` or another writable section of the driver.
    DriverData,
    /// Private data that the kernel allocated for the driver behind a structure of its own.
    PrivateArea,
    /// An object that an argument points at, or that is reached from there by type.
    Argument,
    /// Memory that the driver allocated.
    Allocated,
    /// What passes through the driver: a packet's data, what a block I/O reads into, whole pages
    /// that were handed out. The next call may find it somebody else's.
    Passing,
    /// Coherent DMA memory of the driver's device.
    Dma,
    /// Something else that the label names.
    Other,
}

/// Whether an object is there to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Permit {
    /// The call may write it.
    Write,
    /// The call may not, whatever else covers it.
    Guard,
}

/// How long an object stays open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// Until it is closed: it belongs to the driver.
    Driver,
    /// Until the call of this number ends.
    Call(u64),
}

/// A piece of memory with an owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Object {
    /// Where it is.
    pub range: GvaRange,
    /// What it is to the call.
    pub kind: ObjectKind,
    /// Whether it may be written.
    pub permit: Permit,
    /// How long it stays open.
    pub lifetime: Lifetime,
    /// Type and how it is reached, for reports: `struct net_device (argument 0)`.
    pub label: String,
}

/// Names an open object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(u64);

/// Why an object could not be opened. The table is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeTableError {
    /// [`MAX_OBJECTS`].
    #[error("more than {MAX_OBJECTS} writable objects: the driver's data cannot be what it seems")]
    Full,
    /// [`MAX_DEPTH`].
    #[error(
        "more than {MAX_DEPTH} objects overlap at {at}: the driver's data cannot be what it seems"
    )]
    TooDeep {
        /// First byte where they do.
        at: Gva,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    last: u64,
    /// Objects that cover all of it; never empty, in order of opening.
    covered_by: Vec<ObjectId>,
}

/// The objects of a driver and of its calls.
#[derive(Debug, Clone, Default)]
pub struct RangeTable {
    objects: BTreeMap<ObjectId, Object>,
    /// By first byte; disjoint.
    segments: BTreeMap<u64, Segment>,
    next: u64,
}

impl RangeTable {
    /// How many objects are open.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Opens an object.
    pub fn open(&mut self, object: Object) -> Result<ObjectId, RangeTableError> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err(RangeTableError::Full);
        }
        let range = object.range;
        let deep = |(_, segment): &(u64, &Segment)| segment.covered_by.len() >= MAX_DEPTH;
        if let Some((first, _)) = self.segments_in(range).find(deep) {
            return Err(RangeTableError::TooDeep {
                at: Gva(first.max(range.first().0)),
            });
        }
        let id = ObjectId(self.next);
        self.next += 1;
        self.cut(range);
        let mut at = Some(range.first().0);
        while let Some(first) = at.filter(|first| *first <= range.last().0) {
            let covered = self.segments.range_mut(first..=range.last().0).next();
            let gap_end = match covered {
                Some((start, segment)) if *start == first => {
                    segment.covered_by.push(id);
                    at = segment.last.checked_add(1);
                    continue;
                }
                Some((start, _)) => start - 1,
                None => range.last().0,
            };
            self.segments.insert(
                first,
                Segment {
                    last: gap_end,
                    covered_by: vec![id],
                },
            );
            at = gap_end.checked_add(1);
        }
        self.objects.insert(id, object);
        Ok(id)
    }

    /// Closes an object. `None` if it is not open.
    pub fn close(&mut self, id: ObjectId) -> Option<Object> {
        let object = self.objects.remove(&id)?;
        let range = object.range;
        let firsts: Vec<u64> = self
            .segments
            .range(range.first().0..=range.last().0)
            .map(|(first, _)| *first)
            .collect();
        for first in &firsts {
            if let Some(segment) = self.segments.get_mut(first) {
                segment.covered_by.retain(|other| *other != id);
                if segment.covered_by.is_empty() {
                    self.segments.remove(first);
                }
            }
        }
        self.join(range);
        Some(object)
    }

    /// Closes all objects that live no longer than call `call`.
    pub fn end_call(&mut self, call: u64) {
        let over: Vec<ObjectId> = self
            .objects
            .iter()
            .filter(|(_, object)| object.lifetime == Lifetime::Call(call))
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.close(id);
        }
    }

    /// The open object of this name.
    pub fn get(&self, id: ObjectId) -> Option<&Object> {
        self.objects.get(&id)
    }

    /// All open objects, in order of opening.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, &Object)> {
        self.objects.iter().map(|(id, object)| (*id, object))
    }

    /// The object that says most about the byte at `at`: a guard if one covers it, else the
    /// smallest; of equal ones the latest.
    pub fn lookup(&self, at: Gva) -> Option<(ObjectId, &Object)> {
        let (_, segment) = self.segments_in(GvaRange::aligned(at, 1)).next()?;
        segment
            .covered_by
            .iter()
            .filter_map(|id| Some((*id, self.objects.get(id)?)))
            .min_by_key(|(id, object)| {
                let guard = object.permit == Permit::Guard;
                (!guard, object.range.len_bytes(), std::cmp::Reverse(*id))
            })
    }

    /// The objects that cover the byte at `at`.
    pub fn covering(&self, at: Gva) -> impl Iterator<Item = &Object> {
        let segment = self.segments_in(GvaRange::aligned(at, 1)).next();
        let ids = segment
            .into_iter()
            .flat_map(|(_, segment)| &segment.covered_by);
        ids.filter_map(|id| self.objects.get(id))
    }

    /// Whether the call may write every byte of `range`.
    pub fn may_write(&self, range: GvaRange) -> bool {
        self.first_denied(range).is_none()
    }

    /// The first byte of `range` that the call may not write.
    pub fn first_denied(&self, range: GvaRange) -> Option<Gva> {
        let mut next = range.first();
        for (first, segment) in self.segments_in(range) {
            if first > next.0 || !self.is_writable(segment) {
                return Some(next);
            }
            match Gva(segment.last).checked_add(1) {
                Some(behind) if segment.last < range.last().0 => next = behind,
                _ => return None,
            }
        }
        Some(next)
    }

    fn permits<'a>(&'a self, segment: &'a Segment) -> impl Iterator<Item = Permit> + 'a {
        segment
            .covered_by
            .iter()
            .filter_map(|id| Some(self.objects.get(id)?.permit))
    }

    fn is_writable(&self, segment: &Segment) -> bool {
        self.permits(segment).all(|permit| permit == Permit::Write)
    }

    /// The segments with a byte in `range`, by first byte.
    fn segments_in(&self, range: GvaRange) -> impl Iterator<Item = (u64, &Segment)> {
        let before = self.segments.range(..range.first().0).next_back();
        let before = before.filter(|(_, segment)| segment.last >= range.first().0);
        let within = self.segments.range(range.first().0..=range.last().0);
        before
            .into_iter()
            .chain(within)
            .map(|(first, segment)| (*first, segment))
    }

    /// Makes the ends of `range` ends of segments.
    fn cut(&mut self, range: GvaRange) {
        self.cut_before(range.first().0);
        if let Some(behind) = range.last().checked_add(1) {
            self.cut_before(behind.0);
        }
    }

    fn cut_before(&mut self, at: u64) {
        let Some((_, segment)) = self.segments.range_mut(..at).next_back() else {
            return;
        };
        if segment.last >= at {
            let behind = Segment {
                last: segment.last,
                covered_by: segment.covered_by.clone(),
            };
            segment.last = at - 1;
            self.segments.insert(at, behind);
        }
    }

    /// Joins neighbouring segments in and around `range` that have the same objects.
    fn join(&mut self, range: GvaRange) {
        let around = GvaRange::inclusive(
            range.first().checked_sub(1).unwrap_or(range.first()),
            range.last().checked_add(1).unwrap_or(range.last()),
        );
        let Some(around) = around else { return };
        let firsts: Vec<u64> = self.segments_in(around).map(|(first, _)| first).collect();
        let mut kept: Option<u64> = None;
        for first in firsts {
            let same = kept.and_then(|kept| {
                let (left, right) = (self.segments.get(&kept)?, self.segments.get(&first)?);
                let adjacent = left.last.checked_add(1) == Some(first);
                (adjacent && left.covered_by == right.covered_by).then_some((kept, right.last))
            });
            if let Some((kept, last)) = same {
                self.segments.remove(&first);
                if let Some(left) = self.segments.get_mut(&kept) {
                    left.last = last;
                }
            } else {
                kept = Some(first);
            }
        }
    }
}

#[cfg(test)]
#[path = "range_table_tests.rs"]
mod tests;
