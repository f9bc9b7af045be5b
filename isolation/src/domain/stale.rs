//! Pages of which P has copies that are not the guest's, left by calls that failed: dropped when
//! the next call begins, so that no caller waits for it.

use super::view::Pfn;

/// See the module's text.
#[derive(Debug, Default)]
pub struct StalePages(Vec<Pfn>);

impl StalePages {
    /// There are these, too.
    pub fn extend(&mut self, pages: impl IntoIterator<Item = Pfn>) {
        self.0.extend(pages);
    }

    /// All were dropped.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Has `drop` drop them, which gets them sorted and without duplicates. Where it fails they
    /// stay, for the next time: nobody else knows of them, and to drop one twice does no harm.
    pub fn drop_by<T, E>(&mut self, drop: impl FnOnce(&[Pfn]) -> Result<T, E>) -> Result<T, E> {
        self.0.sort_unstable();
        self.0.dedup();
        let dropped = drop(&self.0)?;
        self.0.clear();
        Ok(dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_could_not_be_dropped_are_dropped_the_next_time() {
        let mut stale = StalePages::default();
        stale.extend([Pfn(7), Pfn(3)]);
        assert_eq!(stale.drop_by(|_| Err::<(), _>("no")), Err("no"));
        stale.extend([Pfn(3), Pfn(5)]);
        let mut seen = Vec::new();
        let dropped = stale.drop_by(|pages| {
            seen.extend_from_slice(pages);
            Ok::<_, ()>(pages.len())
        });
        assert_eq!(dropped, Ok(3));
        assert_eq!(seen, [Pfn(3), Pfn(5), Pfn(7)]);
        assert_eq!(stale.drop_by(|pages| Ok::<_, ()>(pages.len())), Ok(0));
    }
}
