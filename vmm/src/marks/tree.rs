//! Marks as a tree: each has the one that the machine was at when it was made as its parent.
//!
//! ```text
//!   a (all pages) ─┬─ b (pages other than at a) ── d
//!                  └─ c ── now
//! ```
//!
//! A page's bytes at a mark are those of the nearest mark on the way to the root that has the page.
//! From one mark to another differ at most the pages of the marks on the way between them, the
//! nearest common one left out.

use std::collections::BTreeMap;

use super::error::MarkError;
use super::pages::{Found, Pages};
use crate::dirty::PageSet;

/// Number of a mark, never used twice.
pub(super) type Id = u64;

/// A mark.
pub(super) struct Node<T> {
    /// `None` for one that was forgotten and that others build on.
    pub name: Option<String>,
    pub parent: Option<Id>,
    pub pages: Pages,
    /// State of all but memory; `None` for one that was forgotten.
    pub state: Option<T>,
}

/// See the module's text.
pub(super) struct Tree<T> {
    nodes: BTreeMap<Id, Node<T>>,
    next: Id,
    /// The mark that memory is that of, but for pages that changed since.
    current: Option<Id>,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            next: 0,
            current: None,
        }
    }
}

impl<T> Tree<T> {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The mark that the machine is at, or has gone on from.
    pub fn current(&self) -> Option<Id> {
        self.current
    }

    /// Memory is that of `id` now.
    pub fn set_current(&mut self, id: Id) {
        self.current = Some(id);
    }

    /// A mark.
    pub fn get(&self, id: Id) -> Option<&Node<T>> {
        self.nodes.get(&id)
    }

    /// The mark with this name.
    pub fn find(&self, name: &str) -> Option<Id> {
        let mut nodes = self.nodes.iter();
        nodes
            .find(|(_, node)| node.name.as_deref() == Some(name))
            .map(|(id, _)| *id)
    }

    /// All of them, parents before children.
    pub fn iter(&self) -> impl Iterator<Item = (Id, &Node<T>)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    /// Adds a mark behind the current one, and goes there. The first has all pages.
    pub fn add(&mut self, name: String, pages: Pages, state: T) -> Id {
        let id = self.next;
        self.next += 1;
        let node = Node {
            name: Some(name),
            parent: self.current,
            pages,
            state: Some(state),
        };
        self.nodes.insert(id, node);
        self.current = Some(id);
        id
    }

    fn parent(&self, id: Id) -> Option<Id> {
        self.nodes.get(&id)?.parent
    }

    fn depth(&self, id: Id) -> usize {
        std::iter::successors(Some(id), |&id| self.parent(id)).count()
    }

    /// Adds the pages to `set` that may differ between the current mark and `target`.
    pub fn add_path(&self, target: Id, set: &mut PageSet) {
        let Some(mut from) = self.current else { return };
        let mut to = target;
        let (mut from_depth, mut to_depth) = (self.depth(from), self.depth(to));
        while from != to {
            let (lower, depth) = match from_depth >= to_depth {
                true => (&mut from, &mut from_depth),
                false => (&mut to, &mut to_depth),
            };
            let Some(node) = self.nodes.get(lower) else {
                return;
            };
            if let Pages::Delta(delta) = &node.pages {
                delta.pages().iter().for_each(|&page| set.insert(page));
            }
            let Some(parent) = node.parent else { return };
            *lower = parent;
            *depth -= 1;
        }
    }

    /// The bytes of `page` at mark `id`.
    pub fn content(&self, id: Id, page: u32) -> Found {
        let mut at = Some(id);
        while let Some(node) = at.and_then(|id| self.nodes.get(&id)) {
            match node.pages.find(page) {
                Found::Before => at = node.parent,
                found => return found,
            }
        }
        Found::Zero
    }

    /// Forgets mark `id`. `changed` are the pages that changed since the current one, and since the
    /// one that is the current one afterwards.
    pub fn forget(&mut self, id: Id, changed: &mut PageSet) -> Result<(), MarkError> {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.name = None;
            node.state = None;
        }
        // What it was kept for may be gone with it.
        let mut next = Some(id);
        while let Some(id) = next {
            next = self.parent(id);
            if !self.fold(id, changed)? {
                break;
            }
        }
        Ok(())
    }

    /// Takes `id`, which has no name, out of the tree, if not two others build on it. Whether it
    /// did.
    fn fold(&mut self, id: Id, changed: &mut PageSet) -> Result<bool, MarkError> {
        if self.nodes.get(&id).is_none_or(|node| node.name.is_some()) {
            return Ok(false);
        }
        let children = self.iter().filter(|(_, node)| node.parent == Some(id));
        let children: Vec<_> = children.map(|(id, _)| id).collect();
        match children[..] {
            [] => self.drop_leaf(id, changed),
            [child] => self.merge_into(id, child, changed)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn drop_leaf(&mut self, id: Id, changed: &mut PageSet) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        if self.current == Some(id) {
            if let Pages::Delta(delta) = &node.pages {
                delta.pages().iter().for_each(|&page| changed.insert(page));
            }
            self.current = node.parent;
        }
    }

    fn merge_into(&mut self, id: Id, child: Id, changed: &mut PageSet) -> Result<(), MarkError> {
        let (Some(node), Some(below)) = (self.nodes.get(&id), self.nodes.get(&child)) else {
            return Ok(());
        };
        let Pages::Delta(later) = &below.pages else {
            return Ok(());
        };
        // The current mark becomes its parent, or where there is none, the child.
        if self.current == Some(id) {
            let moved = match &node.pages {
                Pages::Delta(delta) => delta,
                Pages::Base(_) => later,
            };
            moved.pages().iter().for_each(|&page| changed.insert(page));
            self.current = Some(node.parent.unwrap_or(child));
        }
        let merged = match &node.pages {
            Pages::Delta(earlier) => Some(Pages::Delta(earlier.then(later)?)),
            Pages::Base(_) => None,
        };
        let Some(node) = self.nodes.remove(&id) else {
            return Ok(());
        };
        let Some(below) = self.nodes.get_mut(&child) else {
            return Ok(());
        };
        below.parent = node.parent;
        below.pages = match (merged, node.pages, &below.pages) {
            (Some(merged), ..) => merged,
            (None, Pages::Base(mut base), Pages::Delta(later)) => {
                base.absorb(later);
                Pages::Base(base)
            }
            (None, other, _) => other,
        };
        Ok(())
    }
}
